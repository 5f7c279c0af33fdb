"""blockrag: retrieval-augmented generation whose time to first token does not grow with what it retrieves."""

__version__ = "0.1.0"
