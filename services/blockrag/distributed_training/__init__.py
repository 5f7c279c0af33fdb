"""Training on several workers through Ray Train; the training itself is ``blockrag.training``."""
