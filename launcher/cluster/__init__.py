"""Beyond one machine: hand a run to an engine that places, watches and requeues nodes."""
