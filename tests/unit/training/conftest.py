"""Small data files of the shape the training reads, made of invented towns."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from random import Random
from typing import Any

import pytest

_SYLLABLES = ("ba", "do", "ki", "lu", "mor", "nes", "pra", "quin", "ra", "sol", "tam", "ver")


EVALUATED = "The quick method that is evaluated here was never to be seen while a reader was trained on anything."


def write_lines(path: Path, rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with gzip.open(path, "wt", encoding="utf-8") as target:
        target.writelines(json.dumps(row) + "\n" for row in rows)


def town(number: int) -> tuple[str, str, str]:
    """Url, title and intro of an invented town."""
    random = Random(number)
    name = "".join(random.choice(_SYLLABLES) for _ in range(3)).capitalize() + f" {number}"
    people, year = random.randrange(1000, 9999), random.randrange(1100, 1999)
    text = f"{name} is a town. It was founded in {year}. Its population is {people}. The town lies on a river."
    return f"/wiki/town_{number}", name, text


def question(number: int) -> dict[str, Any]:
    url, name, text = town(number)
    people = text.split("population is ")[1].split(".")[0]
    return {
        "url": url,
        "rel": "population",
        "question": f"What is the population of {name}?",
        "answers": [people],
        "distractor_table": f"towns_{number % 4}",
    }


@pytest.fixture(scope="session")
def data_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """240 towns in four tables; the last 40 are asked about in dev, and town 0 has a redirect to a dev town's text."""
    root = tmp_path_factory.mktemp("data")
    towns = [town(number) for number in range(240)]
    intros = [{"url": url, "title": title, "text": text} for url, title, text in towns]
    intros.append({"url": "/wiki/redirect", "title": "Redirect", "text": towns[220][2]})
    # An intro that repeats an evaluated passage, with a question of its own and a place in a table.
    intros[0] = intros[0] | {"text": towns[0][2] + " " + EVALUATED}
    write_lines(root / "train/wiki_intros.jsonl.gz", intros)
    train = [question(number) for number in range(200)]
    train.append(question(220) | {"url": "/wiki/redirect"})
    write_lines(root / "train/wiki_pattern_qa.jsonl.gz", train)
    write_lines(root / "dev/wiki_pattern_qa.jsonl.gz", [question(number) for number in range(200, 240)])
    tables = {f"towns_{k}": [url for n, (url, _, _) in enumerate(towns) if n % 4 == k] for k in range(4)}
    with gzip.open(root / "train/wiki_table_to_urls.json.gz", "wt", encoding="utf-8") as target:
        json.dump(tables, target)
    people = [
        {
            "question": f"Who crossed bridge {number}?",
            "answers": [f"Captain {number}"],
            "passages": [
                {"title": "story", "text": f"At dawn Captain {number} crossed bridge {number}.", "gold": True}
            ],
        }
        for number in range(150)
    ]
    # A paragraph that stands in dev/ word for word, with another end.
    people.append(
        {
            "question": "What is evaluated?",
            "answers": ["evaluated"],
            "passages": [{"title": "story", "text": EVALUATED + " And it goes on.", "gold": True}],
        }
    )
    write_lines(root / "train/qamr_dev.jsonl.gz", people)
    write_lines(root / "dev/xquad_en.jsonl.gz", [{"passages": [{"title": "dev", "text": EVALUATED, "gold": True}]}])
    pages = [
        {
            "title": f"Bridge {number}",
            "paragraphs": [
                "# A heading of the page that is long enough to be taken for a paragraph of it",
                f"Captain Morla {number} built the first bridge over the river in {1500 + number}, and it was long.",
                f"In {1500 + number} the town had three mills. The bridge was paid for by Captain Morla {number}.",
                EVALUATED,
            ],
        }
        for number in range(12)
    ]
    write_lines(root / "train/wikitablequestions_wiki_pages.jsonl.gz", pages)
    return root
