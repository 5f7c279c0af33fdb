"""What all tests share: property tests that do not measure how busy the machine is, and a bundle for whole texts."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

# The first input of a run builds hypothesis' tables, which on a slow or shared machine alone takes more than its check
# allows; pytest's own timeout ends what hangs.
settings.register_profile("any machine", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("any machine")


@pytest.fixture(scope="session")
def small_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of a random bundle whose vocabulary knows words."""
    from tests.models import make_small_bundle  # brings torch, which most tests do without

    return make_small_bundle(tmp_path_factory.mktemp("bundles") / "small")
