"""What people watch: the state of a run so far, in a few lines of text."""
