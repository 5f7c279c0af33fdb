"""The metrics that a dashboard or an alert asks Prometheus for."""

from __future__ import annotations

import importlib
import itertools
import json
import re

from blockrag.telemetry.metrics import Counter, Histogram
from tests.unit.deploy.files import KUBERNETES, read_yaml

MONITORING = KUBERNETES / "components" / "monitoring"
_MODULES = ("blockrag.telemetry.metrics", "blockrag.kv_cache.shard", "blockrag.encoder.block_encoder")
_SERIES = re.compile(r"\b(?:ray_(?:blockrag|serve)|kubelet)_\w+")


def expressions() -> list[str]:
    """Every PromQL expression of the component."""
    rules = [
        rule["expr"] for group in read_yaml(MONITORING / "alerts.yaml")["spec"]["groups"] for rule in group["rules"]
    ]
    dashboard = json.loads((MONITORING / "blockrag.json").read_text(encoding="utf-8"))
    return rules + [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]


def series_used() -> set[str]:
    """Names of all series that the expressions name."""
    return {name for expression in expressions() for name in _SERIES.findall(expression)}


def series_declared() -> dict[str, tuple[str, ...]]:
    """Names of the series that our metrics become, with their labels."""
    found: dict[str, tuple[str, ...]] = {}
    for module in map(importlib.import_module, _MODULES):
        tables = [
            table for name, table in vars(module).items() if isinstance(table, dict) and not name.startswith("__")
        ]
        for metric in (*vars(module).values(), *itertools.chain.from_iterable(map(dict.values, tables))):
            if not hasattr(metric, "tags") or not hasattr(metric, "_record") or isinstance(metric, type):
                continue
            suffixes = ("_bucket", "_sum", "_count") if isinstance(metric, Histogram) else ("",)
            suffixes = ("_total",) if isinstance(metric, Counter) else suffixes
            found.update({f"ray_{metric.name}{suffix}": metric.tags for suffix in suffixes})
    return found
