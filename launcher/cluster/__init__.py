"""A run on several machines: one launcher on each, of which the head's decides and the others obey."""
