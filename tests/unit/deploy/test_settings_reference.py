"""``cluster/settings.reference.yaml`` is what the settings' models say."""

from __future__ import annotations

from pathlib import Path

import yaml

from blockrag.settings import Settings, load_settings
from blockrag.settings_reference import settings_reference
from tests.unit.deploy.files import CLUSTER

REFERENCE = CLUSTER / "settings.reference.yaml"


def test_the_file_is_up_to_date() -> None:
    assert REFERENCE.read_text(encoding="utf-8") == settings_reference(), (
        "run: python -m blockrag.settings_reference > cluster/settings.reference.yaml"
    )


def test_it_loads_to_the_defaults() -> None:
    assert load_settings(REFERENCE, environment={}) == Settings()


def test_it_has_every_key(tmp_path: Path) -> None:
    written = yaml.safe_load(settings_reference())
    models = Settings.model_fields

    assert {section: list(keys) for section, keys in written.items()} == {
        name: list(type(field.default).model_fields) for name, field in models.items()
    }


def test_every_key_has_its_documentation_and_limits() -> None:
    lines = settings_reference().splitlines()
    keys = [number for number, line in enumerate(lines) if line.startswith("  ") and not line.startswith("  #")]

    assert all(lines[number - 1].startswith("  # ") for number in keys)
    assert (
        "  # Type of cached K and V, and of the attention over them. bfloat16 takes half the memory of float32, and"
        in lines
    )
    assert max(map(len, lines)) <= 120
