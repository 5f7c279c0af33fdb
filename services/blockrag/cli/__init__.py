"""What a person types: ``blockrag``."""

from blockrag.cli.main import main

__all__ = ["main"]
