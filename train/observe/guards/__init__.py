"""State that leaks between steps, shards or ranks, named while it is small: `--check`."""
