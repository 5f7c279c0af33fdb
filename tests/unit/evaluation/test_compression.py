"""``blockrag eval compression`` from the command line, on a tiny random bundle with compression and policies."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from blockrag.cli.main import app
from blockrag.evaluation.compression_run import plan_cells, rank_passages
from blockrag.evaluation.compression_scores import (
    AUTO,
    COMPRESSED,
    FULL,
    NO_CONTEXT,
    UNCOMPRESSED,
    Answers,
    Cell,
    TextLosses,
    TextRun,
    score_questions,
    score_text,
)
from blockrag.evaluation.compression_selectors import answer_spans, holding_answer, similar_to_question
from blockrag.evaluation.drawing import DrawnQuestion, Piece
from blockrag.evaluation.question_data import SourceQuestion
from blockrag.evaluation.reader import Prompt, Reader
from blockrag.modeling.bundle import Bundle, load_bundle
from blockrag.modeling.refrag.chunk_encoder import ChunkEncoder
from blockrag.modeling.refrag.compression import Projector
from blockrag.modeling.refrag.policy import ChunkPolicy, PolicyConfig
from blockrag.modeling.refrag.refrag_writing import PolicyPart, write_refrag
from blockrag.settings import Settings
from blockrag.v1.common_pb2 import Compression
from tests.models import TINY_VOCAB, make_tiny_bundle, make_tiny_tokenizer
from tests.unit.evaluation.question_files import write_jsonl, write_patterns, write_rows

PIECES = (Piece("town", "it was founded in 1203"), Piece("land", "the largest city"), Piece("sea", "a"))


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    folder = tmp_path_factory.mktemp("compression")
    torch.manual_seed(0)
    policies = {}
    for name, query in (("blind", False), ("query", True)):
        policy = ChunkPolicy(PolicyConfig(16, query, width=16, heads=2, hidden=16))
        torch.nn.init.normal_(policy.score.weight)
        policies[name] = PolicyPart(policy)
    return write_refrag(
        load_bundle(make_tiny_bundle(folder / "plain")),
        folder / "bundle",
        encoder=ChunkEncoder.for_tokens(TINY_VOCAB, None, width=16, heads=2),
        projector=Projector(16, 32),
        chunk_tokens=4,
        training=(),
        policies=policies,
    )


PLAIN = ("sentences", "retrieval")


def _run(bundle: Bundle, *arguments: object) -> dict[str, Any]:
    given = ["eval", "compression", "--json", "--max-answer-tokens", "4", "--bundle", bundle.path, *arguments]
    result = CliRunner().invoke(app, list(map(str, given)))
    assert result.exit_code == 0, result.output
    report: dict[str, Any] = json.loads(result.stdout)
    return report


def _refused(*arguments: object) -> str:
    result = CliRunner().invoke(app, ["eval", "compression", *map(str, arguments)], env={"COLUMNS": "400"})
    assert result.exit_code == 1
    assert "Traceback" not in result.output
    return " ".join(result.output.split())


def test_questions_and_paragraphs(bundle: Bundle, tmp_path: Path) -> None:
    data, out = write_patterns(tmp_path / "data"), tmp_path / "out"
    text = write_jsonl(
        tmp_path / "books.jsonl",
        [{"title": "b", "paragraphs": [f"Part {p} of the {n}th." for p in range(12)]} for n in range(3)],
    )
    asked = ["--passages", 3, "--rates", "1,2,4", "--paragraphs", 3, "--context", 2, "--out", out]
    report = _run(bundle, "--data", data, "--text", text, *asked)
    names = ["query", "blind", "random", "high perplexity", "low perplexity", "retrieval", "similarity", "oracle"]
    results = report["results"]
    cells = [(score["rate"], score["selector"], score["reencoded"]) for score in results["scores"]]
    assert cells == [
        (1.0, UNCOMPRESSED, False),
        *((2.0, name, False) for name in names),
        (2.0, "query", True),
        (4.0, COMPRESSED, False),
        (0.0, AUTO, False),
    ]
    assert results["questions"] == results["numeric"] == 8
    slots = {(score["rate"], score["selector"]): score["slots"] for score in results["scores"]}
    assert slots[4.0, COMPRESSED] < slots[2.0, "query"] < slots[1.0, UNCOMPRESSED]
    assert all(score["effective_rate"] >= 2 for score in results["scores"] if score["rate"] == 2)
    pairs = {(one["rate"], one["first"], one["second"]) for one in results["differences"]}
    assert {(2.0, "query", "random"), (2.0, "query", "blind"), (2.0, "query", "query, re-encoded")} <= pairs
    assert (2.0, "random", UNCOMPRESSED) in pairs and (4.0, COMPRESSED, UNCOMPRESSED) in pairs
    assert len(pairs) == len(results["differences"])

    texts = {(score["rate"], score["selector"]): score for score in results["text"]}
    assert texts[1.0, "full attention"]["recovered"]["mean"] == 1.0
    assert texts[0.0, "no context"]["recovered"]["mean"] == 0.0
    assert texts[0.0, "no context"]["effective_rate"] is None
    assert {name for _, name in texts} == {
        *("no context", "full attention", UNCOMPRESSED, COMPRESSED),
        *(set(names) - {"similarity", "oracle"}),
    }
    assert json.loads((out / "compression.json").read_text()) == {"format": 1, **report}
    page = (out / "compression.md").read_text()
    assert "| 2 | query, re-encoded |" in page and "log-perplexity" in page
    assert (out / "compression.png").read_bytes().startswith(b"\x89PNG")
    lines = [json.loads(line) for line in (out / "answers.jsonl").read_text().splitlines()]
    assert len(lines) == 8 and len(lines[0]["outputs"]) == len(cells)


def test_sentences_and_whole_passages_where_nothing_encodes_chunks(tmp_path: Path) -> None:
    data, plain = write_patterns(tmp_path / "data"), load_bundle(make_tiny_bundle(tmp_path / "plain"))
    report = _run(plain, "--data", data, "--passages", 3, "--rates", "1,2,4", "--out", tmp_path / "out")
    scores = {(score["rate"], score["selector"]): score for score in report["results"]["scores"]}
    assert set(scores) == {(1.0, UNCOMPRESSED), *((rate, name) for rate in (2.0, 4.0) for name in PLAIN), (0.0, AUTO)}
    assert 0 < scores[0.0, AUTO]["slots"] <= scores[1.0, UNCOMPRESSED]["slots"]
    assert "| – | auto |" in (tmp_path / "out" / "compression.md").read_text()
    only = _run(plain, "--data", data, "--passages", 3, "--selectors", "auto", "--rates", "1,2")
    assert {score["selector"] for score in only["results"]["scores"]} == {UNCOMPRESSED, AUTO}
    assert scores[4.0, "sentences"]["slots"] <= scores[2.0, "sentences"]["slots"] < scores[1.0, UNCOMPRESSED]["slots"]
    pairs = {(one["rate"], one["first"], one["second"]) for one in report["results"]["differences"]}
    assert {(2.0, *PLAIN), (2.0, "sentences", UNCOMPRESSED), (4.0, *PLAIN)} <= pairs
    assert (report["compression"], report["policies"]) == ("", [])


def test_pairs(bundle: Bundle, tmp_path: Path) -> None:
    data, plain = write_patterns(tmp_path / "data"), load_bundle(make_tiny_bundle(tmp_path / "plain"))
    asked = ["--data", data, "--pairs", "--passages", 4, "--rates", "1,2"]
    report = _run(plain, *asked, "--selectors", "retrieval,auto", "--out", tmp_path / "out")
    assert (report["data"], report["results"]["questions"]) == ("wiki_pattern_qa, pairs", 4)
    whole, half, _ = report["results"]["scores"]
    assert (whole["read"], whole["gold_read"]) == (4.0, 1.0)
    assert half["read"] < 4 and half["gold_read"] in (0.0, 0.25, 0.5, 0.75, 1.0)
    line = json.loads((tmp_path / "out" / "answers.jsonl").read_text().splitlines()[0])
    assert line["gold"]["title"] != line["further_gold"][0]["title"]
    mixed = _run(bundle, *asked, "--selectors", "oracle")
    assert {score["gold_read"] for score in mixed["results"]["scores"]} == {1.0}
    assert "--passages 1: must be at least 2" in _refused("--data", data, "--pairs", "--passages", 1)


def test_what_is_not_compressed_is_block_mode_and_one_form_is_the_same_encoded_anew(bundle: Bundle) -> None:
    with Reader(bundle, Settings(), max_answer_tokens=6) as reader:

        def answer(rate: float | None, reencoded: bool = False) -> str:
            compression = Compression(rate=rate) if rate is not None else None
            prompt = Prompt(PIECES, "when was it?", compression=compression, reencoded=reencoded)
            return reader.answer([reader.plan(prompt)])[0]

        assert answer(None) == answer(1) == answer(1, reencoded=True)
        assert answer(4) == answer(4, reencoded=True)
        planned = reader.plan(Prompt(PIECES, "when was it?", compression=Compression(rate=2)))
        part = next(one for one in planned.plan.passages if len({chunk.form for chunk in one.chunks}) == 2)
        assert part.in_prompt
        assert answer(2) != answer(2, reencoded=True)


def test_cells() -> None:
    cells = plan_cells(["a", "b"], [4.0, 1.0, 2.0, 8.0], 8, ("a", 2.0))
    assert [(cell.rate, cell.label) for cell in cells] == [
        (1.0, UNCOMPRESSED),
        *((2.0, "a"), (2.0, "b"), (4.0, "a"), (4.0, "b"), (2.0, "a, re-encoded")),
        (8.0, COMPRESSED),
    ]


def test_answers_are_found_in_chunks() -> None:
    tokenizer = make_tiny_tokenizer()
    block = tokenizer("it was 1203 and then 77", add_special_tokens=False)["input_ids"]
    (span,) = answer_spans(block, ["1203"], 3, tokenizer)
    assert "1203" in tokenizer.decode(block[span[0] : span[1]])
    assert span[1] - span[0] <= 6
    assert answer_spans(block, ["1999"], 3, tokenizer) == []


def test_passages_are_ranked_by_words() -> None:
    pieces = [Piece("sea", "water"), Piece("river", "the bridge of Orla"), Piece("hill", "a bridge")]
    assert rank_passages(pieces, "Who crossed the bridge of Orla?") == (pieces[1], pieces[2], pieces[0])


def _question(number: int, answer: str) -> DrawnQuestion:
    source = SourceQuestion(str(number), "?", (answer,), (0,), ())
    return DrawnQuestion(source, PIECES[0], True, (), (), 0.0)


def test_scores_are_those_of_the_answers() -> None:
    questions = [_question(0, "12"), _question(1, "north"), _question(2, "east")]
    tokens, one = np.array([90, 90, 120]), np.array([1, 1, 1])
    answers = {
        Cell(UNCOMPRESSED, 1.0): Answers(["12", "north", "west"], tokens, tokens, 3 * one, one > 0),
        Cell("query", 3.0): Answers(["13", "north", "east"], 30 * one, tokens, one, np.array([True, False, True])),
        Cell("random", 3.0): Answers(["13", "south", "west"], 30 * one, tokens, one, one > 1),
    }
    scores, differences = score_questions(questions, answers, seed=0)
    assert [round(score.exact_match.mean, 3) for score in scores] == [0.667, 0.667, 0.0]
    assert [score.numeric.mean for score in scores if score.numeric] == [1.0, 0.0, 0.0]
    assert scores[1].other is not None and scores[1].other.mean == 1.0
    assert (scores[1].slots, scores[1].effective_rate) == (30.0, pytest.approx(300 / 90))
    assert [(score.read, round(score.gold_read, 2)) for score in scores] == [(3.0, 1.0), (1.0, 0.67), (1.0, 0.0)]
    found = {(one.first, one.second): one.exact_match.mean for one in differences}
    assert found == {
        ("query", UNCOMPRESSED): 0.0,
        ("query", "random"): pytest.approx(2 / 3),
        ("random", UNCOMPRESSED): pytest.approx(-2 / 3),
    }


def test_recovered_share_of_the_gap() -> None:
    def losses(*nats: float) -> TextLosses:
        return TextLosses(np.array(nats), np.array([10, 10]), np.array([40, 40]))

    cells = {NO_CONTEXT: losses(30, 50), FULL: losses(20, 40), Cell(COMPRESSED, 4.0): losses(22, 43)}
    scores, differences = score_text(TextRun(cells, np.array([10, 10])), seed=0)
    assert [score.nats.mean for score in scores] == [4.0, 3.0, 3.25]
    assert scores[2].recovered is not None and scores[2].recovered.mean == pytest.approx(0.75)
    assert not differences


def test_what_cannot_be_measured_is_refused(bundle: Bundle, tmp_path: Path) -> None:
    data = write_rows(tmp_path / "rows.jsonl")
    plain = make_tiny_bundle(tmp_path / "plain")
    assert "selectors query: the bundle has sentences, retrieval" in _refused(
        "--data", data, "--bundle", plain, "--selectors", "query", "--passages", 2
    )
    assert "paragraphs (--text) need one" in _refused("--text", data, "--bundle", plain)
    ours = ("--bundle", bundle.path)
    assert "nothing to measure" in _refused(*ours)
    for rates in ("0.5", "9"):
        assert "from 1 to the bundle's chunk tokens (4)" in _refused("--data", data, *ours, "--rates", rates)
    assert "write numbers" in _refused("--data", data, *ours, "--rates", "fast")
    assert "selectors best" in _refused("--data", data, *ours, "--selectors", "best", "--passages", 2)
    assert "no-such" in _refused("--text", tmp_path / "no-such.jsonl", *ours)


def test_chunks_like_the_question_come_first() -> None:
    question = torch.tensor([[0.0, 2.0], [5.0, 0.0]])
    near = similar_to_question(torch.tensor([[1.0, 0.0], [-1.0, -1.0], [1.0, 1.0]]), question)
    assert near.tolist() == pytest.approx([1.0, -(0.5**0.5), 0.5**0.5])
    assert not similar_to_question(torch.ones(2, 2), question[:0]).any()


def test_an_oracle_opens_the_answer_first() -> None:
    passages = [[1] * 6, [1] * 12]
    scores = holding_answer(passages, 3, {1: [(5, 7)]})
    # the answer's tokens 5 and 6 stand in two chunks of the second passage
    assert np.argsort(-scores, kind="stable").tolist() == [3, 4, 2, 5, 0, 1]
    assert np.argmax(holding_answer(passages, 3, {0: []})) == 0
    # the first chunk of the first passage beside the answer's of the second
    both = holding_answer(passages, 3, {0: [(0, 1)], 1: [(5, 7)]})
    assert np.argsort(-both, kind="stable").tolist() == [0, 3, 4, 1, 2, 5]
