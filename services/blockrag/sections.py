"""What every part of the settings is."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class Section(BaseModel):
    """A part of the settings: unknown keys are errors, attributes are documented."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)
