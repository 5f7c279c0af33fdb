"""Small question files in every format."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

TOWNS = 12


def write_jsonl(path: Path, rows: list[dict[str, Any]]) -> Path:
    """Rows as JSON lines, gzipped where the name says so."""
    path.parent.mkdir(parents=True, exist_ok=True)
    opened = gzip.open if path.suffix == ".gz" else open
    with opened(path, "wt", encoding="utf-8") as target:
        target.writelines(json.dumps(row) + "\n" for row in rows)
    return path


def town(number: int) -> str:
    """A text of a few pieces: the founder stands in the first, the people in the last."""
    middle = " ".join(f"In {1900 + year} the bridge of the town was painted again by {year} men." for year in range(6))
    return f"Town {number} was founded by Baron Number{number}. {middle} It has {number * 1037} people."


def write_rows(path: Path) -> Path:
    """Question rows with one gold passage each and nothing else."""
    return write_jsonl(
        path,
        [
            {
                "id": f"q{number}",
                "source": "towns",
                "question": f"How many people has Town {number}?",
                "answers": [str(number * 1037)],
                "passages": [{"title": f"Town {number}", "text": town(number), "gold": True}],
            }
            for number in range(1, TOWNS)
        ],
    )


def write_patterns(folder: Path) -> Path:
    """A data directory with pattern questions; returns it."""
    intros = [{"url": f"/{n}", "title": f"Town {n}", "text": town(n)} for n in range(TOWNS)]
    # A redirect: the same intro under a second url.
    intros.append({"url": "/other-name", "title": "Town 1", "text": town(1)})
    write_jsonl(folder / "train/wiki_intros.jsonl.gz", intros)
    asked = [
        {
            "url": f"/{n}",
            "rel": relation,
            "question": f"{question} Town {n}?",
            "answers": [answer],
            "distractor_table": "towns",
        }
        for n in (1, 2, 3, 4)
        for relation, question, answer in (
            ("population", "How many people has", str(n * 1037)),
            ("founder", "Who founded", f"Baron Number{n}"),
        )
    ]
    write_jsonl(folder / "dev/wiki_pattern_qa.jsonl.gz", asked)
    with gzip.open(folder / "train/wiki_table_to_urls.json.gz", "wt") as target:
        json.dump({"towns": [f"/{n}" for n in range(8)] + ["/other-name", "/missing"]}, target)
    return folder


def write_key_values(path: Path, records: int = 8) -> Path:
    """Two look-ups among the same number of records."""
    rows = []
    for line in range(2):
        pairs = [[f"key{line}{number}", f"value{line}{number}"] for number in range(records)]
        rows.append({"ordered_kv_records": pairs, "key": pairs[line][0], "value": pairs[line][1]})
    return write_jsonl(path, rows)
