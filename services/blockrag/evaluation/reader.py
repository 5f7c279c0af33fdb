"""Scores of a reader bundle on the pattern questions: ``evaluate_reader``.

A simple decoder of its own, with the stock model and explicit masks, so that the scores do not depend on the serving
engine: per batch one pass over the passages, then one token per question and step with a KV cache.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from random import Random
from typing import Any, Literal, cast

import torch
from transformers import AutoTokenizer, DynamicCache, LlamaForCausalLM

from blockrag.evaluation.metrics import contains, exact_match, f1
from blockrag.modeling.bundle import load_bundle
from blockrag.modeling.model import load_stock_model
from blockrag.modeling.template import PromptTemplate
from blockrag.training.data import DEV_QUESTIONS, Article, read_articles, read_jsonl, read_tables
from blockrag.training.passages import cut_passage

Mode = Literal["block", "full", "none"]


@dataclass(frozen=True)
class ReaderQuestion:
    """A question with the blocks it is asked of."""

    blocks: list[list[int]]
    """The instruction block and the passages' blocks, in the order of the prompt."""
    prompt: list[int]
    """Ids of the last block."""
    answers: tuple[str, ...]
    relation: str


@dataclass(frozen=True)
class ReaderScores:
    """Scores of a bundle, each a share of the ``questions`` asked."""

    mode: str
    questions: int
    distractors: int
    distractor_kind: str
    seed: int
    exact_match: float
    f1: float
    contains: float
    refusal_rate: float
    """Share answered with the template's refusal although the gold passage was there."""
    absent_refusal_rate: float | None
    """Share refused of the same questions with the gold passage taken out; None where that was not measured."""
    skipped: int
    """Questions drawn and left out, because their answer is not in the gold passage once it is cut."""
    by_relation: dict[str, dict[str, float]]
    """Exact match and number of questions per relation."""
    fingerprint: str
    """SHA-256 of the bundle's manifest."""

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class _Reader:
    model: LlamaForCausalLM
    tokenizer: Any
    template: PromptTemplate
    passage_tokens: int


def evaluate_reader(
    bundle_dir: Path,
    data_dir: Path,
    questions: int = 1000,
    distractors: int = 3,
    mode: Mode = "block",
    seed: int = 0,
    same_kind: bool = True,
    absent: bool = False,
    batch: int = 32,
) -> ReaderScores:
    """Ask ``questions`` questions drawn from ``dev/wiki_pattern_qa`` and score the greedy answers.

    Each is asked of its own article's intro and ``distractors`` others, of the same kind (of the table named with
    the question; filled up with any intros where the table has too few) or, with ``same_kind=False``, any. Intros are
    cut at sentence ends to the bundle's ``passage_tokens``; a question whose answer is not in its cut intro is
    skipped and another is drawn. ``mode`` "none" asks without passages. ``absent`` asks once more with the gold
    passage replaced by another distractor, to count refusals.
    """
    reader = _load(bundle_dir)
    drawn, without_gold, skipped = _draw(reader, data_dir, questions, distractors, seed, same_kind)
    outputs = _answer(reader, drawn, mode, batch)
    refused = _refused(reader, _answer(reader, without_gold, mode, batch)) if absent else None
    relations: dict[str, list[bool]] = {}
    for question, output in zip(drawn, outputs, strict=True):
        relations.setdefault(question.relation, []).append(exact_match(output, question.answers))
    pairs = [(output, question.answers) for question, output in zip(drawn, outputs, strict=True)]
    count = max(1, len(drawn))
    return ReaderScores(
        mode=mode,
        questions=len(drawn),
        distractors=distractors,
        distractor_kind="same kind" if same_kind else "any",
        seed=seed,
        exact_match=sum(exact_match(*pair) for pair in pairs) / count,
        f1=sum(f1(*pair) for pair in pairs) / count,
        contains=sum(contains(*pair) for pair in pairs) / count,
        refusal_rate=_refused(reader, outputs),
        absent_refusal_rate=refused,
        skipped=skipped,
        by_relation={
            name: {"exact_match": sum(right) / len(right), "questions": len(right)}
            for name, right in sorted(relations.items())
        },
        fingerprint=hashlib.sha256((bundle_dir / "manifest.json").read_bytes()).hexdigest(),
    )


@torch.no_grad()
def greedy_answers(
    reader_model: LlamaForCausalLM, questions: list[ReaderQuestion], mode: Mode, end: int, max_tokens: int = 32
) -> list[list[int]]:
    """Greedy answers' ids, without the end token.

    Prompts are padded on the right to the longest; padding is masked away, and each answer's positions go on from
    its own prompt.
    """
    rows = [_row(question, mode) for question in questions]
    width = max(len(ids) for ids, _ in rows)
    ids = torch.zeros(len(rows), width, dtype=torch.long)
    segments = torch.full((len(rows), width), -1)
    lengths = torch.tensor([len(row) for row, _ in rows])
    for number, (row, row_segments) in enumerate(rows):
        ids[number, : len(row)] = torch.tensor(row)
        segments[number, : len(row)] = torch.tensor(row_segments)
    # The last block has the highest number of its row and sees all before it.
    last = segments == segments.amax(1, keepdim=True)
    same = segments[:, :, None] == segments[:, None, :]
    visible = torch.ones(width, width).tril().bool() & (same | last[:, :, None])
    cache = DynamicCache(config=reader_model.config)
    positions = torch.arange(width).expand(len(rows), width)
    hidden = reader_model.model(
        input_ids=ids, attention_mask=visible[:, None], position_ids=positions, past_key_values=cache
    ).last_hidden_state
    token = reader_model.lm_head(hidden[torch.arange(len(rows)), lengths - 1]).argmax(-1)
    keys = torch.arange(width)[None] < lengths[:, None]
    answers: list[list[int]] = [[] for _ in rows]
    alive = torch.arange(len(rows))
    for step in range(max_tokens):
        for number, found in zip(alive.tolist(), token.tolist(), strict=True):
            if found != end:
                answers[number].append(found)
        going = (token != end).nonzero()[:, 0]
        if len(going) == 0 or step == max_tokens - 1:
            break
        if len(going) <= 0.75 * len(alive):  # copying the cache costs about as much as a step over it
            cache.batch_select_indices(going)
            token, keys, alive = token[going], keys[going], alive[going]
        keys = torch.cat([keys, torch.ones(len(alive), 1, dtype=torch.bool)], 1)
        hidden = reader_model.model(
            input_ids=token[:, None],
            attention_mask=keys[:, None, None],
            position_ids=(lengths[alive] + step)[:, None],
            past_key_values=cache,
        ).last_hidden_state
        # An answer that has ended stays in the batch for a while and goes on saying that it has.
        token = torch.where(token == end, end, reader_model.lm_head(hidden[:, -1]).argmax(-1))
    return answers


def _row(question: ReaderQuestion, mode: Mode) -> tuple[list[int], list[int]]:
    """Ids of a prompt and the number of each token's block; in full mode everything is one block."""
    blocks = [*(question.blocks if mode != "none" else question.blocks[:1]), question.prompt]
    ids = [token for block in blocks for token in block]
    if mode == "full":
        return ids, [0] * len(ids)
    return ids, [number for number, block in enumerate(blocks) for _ in block]


def _answer(reader: _Reader, questions: list[ReaderQuestion], mode: Mode, batch: int) -> list[str]:
    end = reader.tokenizer.convert_tokens_to_ids(reader.template.end)
    order = sorted(range(len(questions)), key=lambda number: sum(map(len, questions[number].blocks)))
    outputs = [""] * len(questions)
    for start in range(0, len(order), batch):
        numbers = order[start : start + batch]
        found = greedy_answers(reader.model, [questions[number] for number in numbers], mode, end)
        for number, ids in zip(numbers, found, strict=True):
            outputs[number] = reader.tokenizer.decode(ids, skip_special_tokens=True).strip()
    return outputs


def _refused(reader: _Reader, outputs: list[str]) -> float:
    return sum(exact_match(output, [reader.template.refusal]) for output in outputs) / max(1, len(outputs))


def _load(bundle_dir: Path) -> _Reader:
    manifest = json.loads((bundle_dir / "manifest.json").read_text(encoding="utf-8"))
    model = cast(LlamaForCausalLM, load_stock_model(load_bundle(bundle_dir, verify_files=False)))
    tokenizer = AutoTokenizer.from_pretrained(bundle_dir / "decoder")
    return _Reader(model, tokenizer, PromptTemplate(**manifest["template"]), int(manifest["passage_tokens"]))


def _draw(
    reader: _Reader, data_dir: Path, count: int, distractors: int, seed: int, same_kind: bool
) -> tuple[list[ReaderQuestion], list[ReaderQuestion], int]:
    """Questions with their gold passage, the same without it, and how many were skipped."""
    articles, tables = read_articles(data_dir), read_tables(data_dir)
    rows = list(read_jsonl(data_dir / DEV_QUESTIONS))
    random = Random(seed)
    random.shuffle(rows)
    everything = list(articles)
    drawn: list[ReaderQuestion] = []
    without_gold: list[ReaderQuestion] = []
    skipped = 0
    for row in rows:
        if len(drawn) == count:
            break
        gold = articles[row["url"]]
        text = _cut(reader, gold)
        if not any(answer in text for answer in row["answers"]):
            skipped += 1
            continue
        table = tables.get(row.get("distractor_table") or "", []) if same_kind else []
        kind = list(dict.fromkeys(url for url in table if url in articles))
        pool = random.sample(kind, len(kind)) + random.sample(everything, distractors + 2)
        # A redirect's intro is the gold intro again.
        others = [articles[url] for url in pool if articles[url].text != gold.text][: distractors + 1]
        place = random.randrange(distractors + 1)
        for target, first in ((drawn, gold), (without_gold, others[-1])):
            shown = others[:distractors]
            shown.insert(place, first)
            target.append(_question(reader, shown, row))
    return drawn, without_gold, skipped


def _question(reader: _Reader, shown: list[Article], row: dict[str, Any]) -> ReaderQuestion:
    passages = [
        reader.template.passage_ids(reader.tokenizer, article.title, _cut(reader, article)) for article in shown
    ]
    return ReaderQuestion(
        blocks=[reader.template.instruction_ids(reader.tokenizer), *passages],
        prompt=reader.template.final_ids(reader.tokenizer, row["question"]),
        answers=tuple(row["answers"]),
        relation=row["rel"],
    )


def _cut(reader: _Reader, article: Article) -> str:
    return cut_passage(reader.tokenizer, reader.template, article.title, article.text, reader.passage_tokens)
