"""Training loops of one's own out of samestep's parts: several models, several optimizers, any number of passes."""
