"""Dashboards and alerts ask for metrics that exist, and alerts fire when they should."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

from tests.unit.deploy.files import REPOSITORY, read_yaml
from tests.unit.deploy.monitoring import MONITORING, expressions, series_declared, series_used

# What a histogram's buckets are labelled by, and what Prometheus' scraping of Kubernetes adds.
_ADDED = {"le"}


def test_every_metric_is_one_that_is_exported() -> None:
    ours = {name for name in series_used() if name.startswith("ray_blockrag_")}
    assert len(ours) > 15
    assert ours <= set(series_declared())


def test_series_are_asked_for_by_labels_that_they_have() -> None:
    declared = series_declared()
    asked = 0
    for expression in expressions():
        names = [name for name in series_used() if re.search(rf"{name}\b", expression)]
        labels = {label for found in re.findall(r"by \(([^)]*)\)", expression) for label in found.split(",")}
        matched = {
            label for found in re.findall(r"\{([^}]*)\}", expression) for label in re.findall(r"(\w+)[=!]", found)
        }
        wanted = {label.strip() for label in labels | matched} - _ADDED
        for name in names:
            if name in declared and len(names) == 1:
                assert wanted <= set(declared[name]), expression
                asked += 1
    assert asked > 10


@pytest.mark.skipif(shutil.which("promtool") is None, reason="promtool (Debian: prometheus) is not installed")
def test_alerts_fire_when_they_should(tmp_path: Path) -> None:
    rules = read_yaml(MONITORING / "alerts.yaml")["spec"]
    (tmp_path / "rules.yaml").write_text(yaml.safe_dump(rules), encoding="utf-8")
    cases = tmp_path / "alerts_test.yaml"
    cases.write_bytes((REPOSITORY / "tests" / "data" / "alerts_test.yaml").read_bytes())
    for command in (["check", "rules", "rules.yaml"], ["test", "rules", cases.name]):
        result = subprocess.run(["promtool", *command], cwd=tmp_path, capture_output=True, text=True, check=False)
        assert result.returncode == 0, result.stdout + result.stderr


def test_every_alert_is_tried() -> None:
    groups = read_yaml(MONITORING / "alerts.yaml")["spec"]["groups"]
    alerts = {rule["alert"] for group in groups for rule in group["rules"] if "alert" in rule}
    cases = read_yaml(REPOSITORY / "tests" / "data" / "alerts_test.yaml")["tests"]
    fired = {case["alertname"] for test in cases for case in test["alert_rule_test"] if case["exp_alerts"]}
    quiet = {case["alertname"] for test in cases for case in test["alert_rule_test"] if not case["exp_alerts"]}
    assert alerts <= fired | quiet
