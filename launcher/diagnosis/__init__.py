"""What happened: evidence of ended and of living ranks, and the one rank that it points to."""
