import gzip
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer, LlamaForCausalLM

from blockrag.evaluation.reader import ReaderQuestion, evaluate_reader, greedy_answers
from blockrag.training.export import export_bundle
from blockrag.training.reader import ModelShape
from blockrag.training.tokenizer import save_tokenizer, train_tokenizer

SHAPE = ModelShape(vocab_size=320, width=32, layers=2, heads=4, kv_heads=2, head_dim=8, intermediate=48)
END = 2


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    model = LlamaForCausalLM(SHAPE.config()).eval()
    for parameter in model.parameters():
        if parameter.ndim == 2:  # with the usual small weights every answer is the last token again and again
            torch.nn.init.normal_(parameter, std=0.3)
    return model


QUESTIONS = [
    ReaderQuestion([[1], [3, 20, 21, 22], [3, 30]], [5, 40, 6], ("x",), "r"),
    ReaderQuestion([[1], [3, 60]], [5, 50, 51, 6], ("x",), "r"),
    ReaderQuestion([[1]], [5, 6], ("x",), "r"),
]


def _naive(model: LlamaForCausalLM, question: ReaderQuestion, mode: str, tokens: int) -> list[int]:
    """One forward pass over the whole prompt per token, the mask written out."""
    blocks = question.blocks if mode != "none" else question.blocks[:1]
    ids = [token for block in blocks for token in block]
    context = len(ids)
    ids += question.prompt
    found: list[int] = []
    for _ in range(tokens):
        mask = torch.ones(len(ids), len(ids)).tril().bool()
        start = 0
        for block in blocks if mode != "full" else []:
            mask[start : start + len(block), :start] = False
            start += len(block)
        assert mode == "full" or start == context
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([ids]), attention_mask=mask[None, None]).logits
        token = int(logits[0, -1].argmax())
        if token == END:
            break
        found.append(token)
        ids.append(token)
    return found


@pytest.mark.parametrize("mode", ["block", "full", "none"])
def test_batched_answers_are_those_of_one_pass_per_token(model: LlamaForCausalLM, mode: Any) -> None:
    expected = [_naive(model, question, mode, 6) for question in QUESTIONS]
    assert greedy_answers(model, QUESTIONS, mode, END, max_tokens=6) == expected


def test_modes_differ(model: LlamaForCausalLM) -> None:
    with torch.no_grad():
        answers = {mode: greedy_answers(model, QUESTIONS[:1], mode, END, max_tokens=6)[0] for mode in ("block", "none")}
    assert answers["block"] != answers["none"]


def _write(path: Path, rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with gzip.open(path, "wt", encoding="utf-8") as target:
        target.writelines(json.dumps(row) + "\n" for row in rows)


def test_scores_of_a_bundle(model: LlamaForCausalLM, tmp_path: Path) -> None:
    texts = [f"Town {number} has {number * 37} people. It is small." for number in range(12)]
    intros = [{"url": f"/{n}", "title": f"Town {n}", "text": text} for n, text in enumerate(texts)]
    _write(tmp_path / "train/wiki_intros.jsonl.gz", intros)
    asked = [
        {"url": f"/{n}", "rel": "population", "question": f"People in Town {n}?", "answers": [answer]}
        for n, answer in ((1, "37"), (2, "74"), (3, "nowhere in the text"), (4, "148"))
    ]
    _write(tmp_path / "dev/wiki_pattern_qa.jsonl.gz", [row | {"distractor_table": "towns"} for row in asked])
    with gzip.open(tmp_path / "train/wiki_table_to_urls.json.gz", "wt") as target:
        json.dump({"towns": ["/0", "/1", "/2"]}, target)
    save_tokenizer(train_tokenizer(iter(texts), SHAPE.vocab_size), tmp_path / "tokenizer", 512)
    from blockrag.training.export import BundleFacts

    bundle = export_bundle(model, tmp_path / "tokenizer", tmp_path / "bundle", BundleFacts())
    assert len(AutoTokenizer.from_pretrained(bundle / "decoder")) <= SHAPE.vocab_size
    scores = evaluate_reader(bundle, tmp_path, questions=10, absent=True)
    assert (scores.questions, scores.skipped) == (3, 1)
    assert scores.by_relation.keys() == {"population"}
    assert 0 <= scores.exact_match <= scores.contains <= 1
    assert scores.absent_refusal_rate == 0
    assert scores == evaluate_reader(bundle, tmp_path, questions=10, absent=True)
    json.dumps(scores.to_dict())
