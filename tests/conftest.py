"""What all tests share: marks, property tests that do not measure how busy the machine is, a bundle for whole texts."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

# Rich wraps at the width of a terminal, and the temporary paths in messages have any length.
os.environ["COLUMNS"] = "240"

# The first input of a run builds hypothesis' tables, which on a slow or shared machine alone takes more than its check
# allows; pytest's own timeout ends what hangs.
settings.register_profile("any machine", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("any machine")


SLOW = (
    "tests/unit/cli/test_adapt_refrag.py::test_every_stage_in_turn",
    "tests/unit/cli/test_filters.py::test_any_text_is_a_filter_or_an_error",
    "tests/unit/decoder/test_engine_model.py::test_the_engine_needs_no_ray_pydantic_or_grpc",
    "tests/unit/ingest/test_pipeline.py::test_fifty_megabytes_need_little_memory",
    "tests/unit/load_tests/test_run.py",
    "tests/unit/load_tests/test_users.py",
    "tests/unit/training/adaptation/test_block.py",
    "tests/unit/training/adaptation/test_resume.py",
    "tests/unit/training/adaptation/test_workers.py",
    "tests/unit/training/refrag/test_stages.py",
    "tests/unit/training/refrag/test_distillation.py",
    "tests/unit/training/refrag/test_policy_learning.py",
    "tests/unit/training/refrag/test_policy_stage.py",
    "tests/unit/training/refrag/test_workers.py",
)
"""Files and tests of more than two seconds, measured with ``--durations``: `make check` leaves them to `make test`."""
OWN_CLUSTER = ("tests/integration/test_distributed_training.py",)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Marks what the lists above name."""
    for item in items:
        name = f"{item.path.relative_to(config.rootpath).as_posix()}::{item.nodeid.partition('::')[2]}"
        for paths, mark in ((SLOW, pytest.mark.slow), (OWN_CLUSTER, pytest.mark.own_cluster)):
            if any(re.match(rf"{re.escape(path)}(::|\[|$)", name) for path in paths):
                item.add_marker(mark)


@pytest.fixture(scope="session")
def small_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of a random bundle whose vocabulary knows words."""
    from tests.models import make_small_bundle  # brings torch, which most tests do without

    return make_small_bundle(tmp_path_factory.mktemp("bundles") / "small")
