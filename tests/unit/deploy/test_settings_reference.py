"""``cluster/settings.reference.yaml`` is what the settings' models say."""

from __future__ import annotations

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


def test_every_key_has_its_documentation_and_limits() -> None:
    lines = settings_reference().splitlines()
    keys = [number for number, line in enumerate(lines) if line.startswith("  ") and not line.startswith("  #")]

    assert all(lines[number - 1].startswith("  # ") for number in keys)
    assert max(map(len, lines)) <= 120
