"""What a person types: ``blockrag``."""
