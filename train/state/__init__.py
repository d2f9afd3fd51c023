"""What a run needs to go on, and how it reaches the disk."""
