"""Which samples a step takes, in which order, with which random numbers."""
