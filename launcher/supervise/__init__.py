"""One event loop over the ranks of a run: processes, their output, the operator, time."""
