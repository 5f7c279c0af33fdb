"""A run of ``blockrag eval retrieval`` written down: JSON and Markdown."""

from __future__ import annotations

import json
from dataclasses import asdict

from blockrag.evaluation.markdown import percent, table
from blockrag.evaluation.retrieval import RetrievalReport

FORMAT = 1


def to_json(report: RetrievalReport) -> str:
    """The report as one JSON object."""
    return json.dumps({"format": FORMAT, **asdict(report)}, ensure_ascii=False, indent=2) + "\n"


def to_markdown(report: RetrievalReport) -> str:
    """The report as tables."""
    head = [
        f"# {report.data}: retrieval, {report.questions} questions",
        "",
        f"{report.passages} passages in {report.pieces} pieces, embedding {report.embedding}, {report.candidates} "
        f"candidates of each search, RRF constant {report.rrf_k}. Percent with bootstrap 95 % intervals over questions "
        f"(seed {report.seed}), differences paired. {report.without_gold} questions without answer or gold passage "
        "were passed over.",
        "",
        f"- {report.environment.source}, {report.environment.date}, {report.environment.cpu}, {report.seconds:.0f} s",
        f"- passages as bundle `{report.bundle_fingerprint}` splits them",
        *(f"- {name}: SHA-256 `{digest}`" for name, digest in report.sha256.items()),
        "",
    ]
    header = ["metric", *(one.search for one in report.scores)]
    header += [f"{one.first} − {one.second}" for one in report.differences]
    rows = [
        [
            name,
            *(percent(one.metrics[name]) for one in report.scores),
            *(percent(one.metrics[name], sign=True) for one in report.differences),
        ]
        for name in report.scores[0].metrics
    ]
    return "\n".join([*head, *table(header, rows)])
