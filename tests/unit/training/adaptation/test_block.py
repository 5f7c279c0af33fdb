from __future__ import annotations

import fcntl
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import GPT2Config, GPT2LMHeadModel

from blockrag.errors import BundleError, DataError, SetupError, UnsupportedModelError
from blockrag.modeling.adapter import read_adapter
from blockrag.modeling.bundle import Bundle, load_bundle
from blockrag.modeling.model import SlotModel, load_stock_model
from blockrag.modeling.verify import verify_bundle
from blockrag.training.adaptation.block import adapt_block
from blockrag.training.adaptation.block_config import BlockAdaptConfig
from blockrag.training.run import StepMetrics, open_tensorboard
from tests.models import TEST_TEMPLATE, make_tiny_bundle, make_tiny_checkpoint, make_tiny_model, make_tiny_tokenizer
from tests.unit.training.adaptation.conftest import colour_rows, write_rows

Make = Callable[..., BlockAdaptConfig]


def weights(bundle: Path) -> dict[str, torch.Tensor]:
    return load_file(bundle / "decoder" / "model.safetensors")


def largest_difference(first: Path, second: Path) -> float:
    one, other = weights(first), weights(second)
    assert one.keys() == other.keys()
    return max(float((one[name] - other[name]).abs().max()) for name in one)


def answered(bundle: Bundle, mode: str) -> list[int]:
    """Ids of the greedy answer over slots, with cached blocks or in one piece; at most 15."""
    model, tokenizer = SlotModel.load(bundle), bundle.load_tokenizer()
    blocks = [bundle.template.instruction_ids(tokenizer)]
    blocks.append(bundle.template.passage_ids(tokenizer, "Brod", "The gate of Brod is red. It is old."))
    final = bundle.template.final_ids(tokenizer, "What colour is the gate of Brod?")
    if mode == "block":
        encoded = model.encode(blocks, ["instruction", "passage"])
        state = model.new_sequence([model.to_resident(block) for block in encoded], len(final) + 16)
        pending = final
    else:
        pending = [token for block in blocks for token in block] + final
        state = model.new_sequence([], len(pending) + 16)
    answer: list[int] = []
    while len(answer) < 15:
        token = int(model.forward([(state, pending)])[0].argmax())
        if token in model.end_token_ids:
            break
        answer.append(token)
        pending = [token]
    return answer


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llama", "qwen3", "mistral"])
def test_a_checkpoint_learns_under_both_masks_and_serves_cached_blocks(
    family: str, config: Make, tmp_path: Path
) -> None:
    checkpoint = make_tiny_checkpoint(tmp_path / family, family=family, max_position_embeddings=512)
    progress: list[StepMetrics] = []
    recipe = config(
        model=checkpoint,
        steps=30,
        batch_size=6,
        micro_batch=6,
        learning_rate=5e-3,
        max_passages=2,
        gradient_checkpointing=False,
    )

    out = adapt_block(recipe, on_progress=progress.append)

    first, last = progress[0].dev, progress[-1].dev
    assert last["block"]["nats"] < 0.4 * first["block"]["nats"]
    assert last["full"]["nats"] < 0.4 * first["full"]["nats"]
    assert (progress[-1].step, progress[-1].fraction) == (30, 1.0)
    assert progress[-1].tokens_per_second > 0 and progress[-1].eta_seconds == 0
    assert progress[5].eta_seconds > 0
    report = verify_bundle(out)
    assert report.passed, report.checks
    for mode in ("block", "full"):
        # so few steps teach an answer's form, one word and then the end, if not yet which word
        assert 1 <= len(answered(load_bundle(out), mode)) <= 12


def test_the_bundle_says_what_was_done(config: Make, data: Path) -> None:
    out = adapt_block(config())

    bundle = load_bundle(out)
    training = dict(bundle.training)
    assert training["recipe"]["steps"] == 3
    assert training["data"][0]["file"] == data.name
    assert len(training["base"]) == 40
    assert training["recipe"]["passage_tokens"] == bundle.passage_tokens == 64
    assert set(training["dev_scores"]) == {"before", "after"}
    assert bundle.max_context_tokens == 512
    card = (out / "MODEL_CARD.md").read_text(encoding="utf-8")
    assert "the block mask and the full mask" in card and "rows.jsonl" in card
    run = out.parent / "bundle.run"
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [line["step"] for line in lines] == [0, 1, 2, 3]
    assert lines[-1]["tokens"] == training["tokens"]
    assert not list(run.glob("checkpoint-*")), "a finished run needs none"


def test_both_masks_are_trained_on_every_sample(config: Make, tmp_path: Path) -> None:
    progress: list[StepMetrics] = []
    adapt_block(config(steps=1), on_progress=progress.append)
    alone: dict[str, StepMetrics] = {}
    for mask in ("block", "full"):
        found: list[StepMetrics] = []
        adapt_block(config(steps=1, masks=mask, out=tmp_path / mask), on_progress=found.append)
        alone[mask] = found[-1]

    both = progress[-1]
    assert both.losses["block"] == pytest.approx(alone["block"].losses["block"])
    assert both.losses["full"] == pytest.approx(alone["full"].losses["full"])
    assert both.losses["block"] != pytest.approx(both.losses["full"], abs=1e-3)
    assert (list(alone["block"].losses), list(alone["full"].losses)) == (["block"], ["full"])
    assert both.tokens == 2 * alone["block"].tokens == 2 * alone["full"].tokens


def test_micro_batches_and_gradient_checkpointing_change_nothing(config: Make, tmp_path: Path) -> None:
    plain = adapt_block(config(gradient_checkpointing=False, micro_batch=4))
    saving = adapt_block(config(out=tmp_path / "saving", gradient_checkpointing=True, micro_batch=1))

    assert largest_difference(plain, saving) < 1e-4
    assert largest_difference(plain, saving) < 0.01 * largest_difference_to_start(plain, config().model)


def largest_difference_to_start(bundle: Path, checkpoint: Path) -> float:
    start = load_file(checkpoint / "model.safetensors")
    return max(float((tensor - start[name]).abs().max()) for name, tensor in weights(bundle).items())


def test_bf16_trains_and_the_checkpoints_own_type_is_written(config: Make, tmp_path: Path) -> None:
    half = tmp_path / "half"
    make_tiny_model(max_position_embeddings=512).to(torch.bfloat16).save_pretrained(half)
    make_tiny_tokenizer().save_pretrained(half)
    progress: list[StepMetrics] = []

    out = adapt_block(config(model=half, precision="bf16", steps=10), on_progress=progress.append)

    assert progress[-1].losses["block"] < progress[1].losses["block"]
    assert {tensor.dtype for tensor in weights(out).values()} == {torch.bfloat16}
    assert verify_bundle(out).passed


def test_distillation_is_reported_and_changes_the_result(config: Make, tmp_path: Path) -> None:
    progress: list[StepMetrics] = []
    distilled = adapt_block(config(distillation=1.0), on_progress=progress.append)
    plain = adapt_block(config(out=tmp_path / "plain"))

    assert progress[-1].losses["distillation"] > 0
    assert largest_difference(distilled, plain) > 0


def test_link_and_sink_tokens_are_served_like_any_other(config: Make) -> None:
    out = adapt_block(config(link_tokens=2, sink_tokens=1))

    bundle = load_bundle(out)
    assert bundle.template.passage == "<|sink_0|>Title: {title}\n{text}\n\n<|link_0|><|link_1|>"
    assert bundle.vocab_size == 303
    assert verify_bundle(out).passed
    tokenizer = bundle.load_tokenizer()
    block = bundle.template.passage_ids(tokenizer, "T", "x")
    assert (block[0], block[-2:]) == (300, [301, 302])


def test_nothing_but_the_new_tokens_changes_when_they_alone_are_trained(config: Make) -> None:
    out = adapt_block(config(link_tokens=2, train="tokens", steps=2))
    untouched = adapt_block(config(link_tokens=2, train="tokens", steps=1, learning_rate=1e-12, out=out.parent / "b"))

    trained, start = weights(out), weights(untouched)
    changed = {name for name in trained if not torch.allclose(trained[name], start[name], atol=1e-9)}
    assert changed == {"model.embed_tokens.weight"}
    rows = (trained["model.embed_tokens.weight"] - start["model.embed_tokens.weight"]).abs().sum(1) > 1e-9
    assert rows.nonzero().flatten().tolist() == [300, 301]


def test_a_bundle_keeps_its_template_and_sizes(config: Make, tmp_path: Path) -> None:
    base = make_tiny_bundle(tmp_path / "base", max_position_embeddings=700)

    bundle = load_bundle(adapt_block(config(model=base, passage_tokens=None)))

    assert bundle.template == TEST_TEMPLATE
    assert (bundle.passage_tokens, bundle.max_context_tokens) == (64, 700)
    assert bundle.training["base"] == load_bundle(base).fingerprint


def test_rows_that_do_not_fit_are_reported(config: Make, tmp_path: Path) -> None:
    rows = colour_rows(30)
    rows[11]["question"] = "why " * 300
    path = write_rows(tmp_path / "long.jsonl", rows)
    progress: list[StepMetrics] = []

    out = adapt_block(config(data=(path,), steps=8, dev_rows=0), on_progress=progress.append)

    reported = {place: tokens for metrics in progress for place, tokens in metrics.left_out.items()}
    assert list(reported) == [f"{path}:12"]
    assert reported[f"{path}:12"] > 400
    assert load_bundle(out).training["rows_too_long"] == 1


def adapter_of(bundle: Path) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    return dict(read_adapter(bundle / "adapter").tensors)


class TestAdapters:
    """``lora_rank``: the base stays as it is, an adapter is trained and kept beside it."""

    def test_it_is_kept_on_its_base_and_serves(self, config: Make, checkpoint: Path) -> None:
        progress: list[StepMetrics] = []
        out = adapt_block(config(lora_rank=4, steps=12, learning_rate=2e-2), on_progress=progress.append)

        bundle = load_bundle(out)
        assert bundle.base is not None and bundle.adapter is not None and bundle.adapter.rank == 4
        assert not list((out / "decoder").glob("*.safetensors"))
        assert all(float(up.abs().max()) > 0 for _, up in adapter_of(out).values())
        assert verify_bundle(bundle).passed
        first, last = progress[0].dev, progress[-1].dev
        assert last["block"]["nats"] < first["block"]["nats"]
        merged, start = load_stock_model(bundle), load_file(checkpoint / "model.safetensors")
        weight = merged.state_dict()["model.layers.0.self_attn.q_proj.weight"]
        down, up = adapter_of(out)["model.layers.0.self_attn.q_proj"]
        torch.testing.assert_close(weight, start["model.layers.0.self_attn.q_proj.weight"] + up @ down)
        assert "LoRA adapter of rank 4" in (out / "MODEL_CARD.md").read_text(encoding="utf-8")

    def test_training_goes_on_from_one(self, config: Make, tmp_path: Path) -> None:
        first = adapt_block(config(lora_rank=4))
        again = adapt_block(config(model=first, lora_rank=4, learning_rate=1e-12, steps=1, out=tmp_path / "again"))
        before, after = adapter_of(first), adapter_of(again)

        assert before.keys() == after.keys()
        for name, pair in before.items():
            for one, other in zip(pair, after[name], strict=True):
                torch.testing.assert_close(one, other, rtol=0, atol=1e-6)
        with pytest.raises(SetupError, match="has rank 4, not 2"):
            adapt_block(config(model=first, lora_rank=2, out=tmp_path / "narrow"))

    def test_it_can_be_merged_by_training_all_weights_on(self, config: Make, tmp_path: Path) -> None:
        first = adapt_block(config(lora_rank=4))
        whole = adapt_block(config(model=first, learning_rate=1e-12, steps=1, out=tmp_path / "whole"))

        expected = load_stock_model(load_bundle(first)).state_dict()
        for name, tensor in weights(whole).items():
            torch.testing.assert_close(tensor, expected[name], rtol=0, atol=1e-6)

    def test_with_link_tokens_their_rows_are_trained_too(self, config: Make, checkpoint: Path) -> None:
        out = adapt_block(config(lora_rank=4, link_tokens=2))

        bundle = load_bundle(out)
        assert verify_bundle(bundle).passed
        rows = load_file(out / "token_rows.safetensors")["embedding"]
        start = load_file(checkpoint / "model.safetensors")["model.embed_tokens.weight"]
        embedding = load_stock_model(bundle).get_input_embeddings().weight
        assert torch.equal(embedding[300:], rows) and torch.equal(embedding[:300], start)

    def test_in_bfloat16_the_adapter_itself_is_trained_in_float32(self, config: Make) -> None:
        progress: list[StepMetrics] = []
        recipe = config(lora_rank=4, precision="bf16", steps=12, learning_rate=2e-2)
        adapt_block(recipe, on_progress=progress.append)

        assert progress[-1].dev["block"]["nats"] < progress[0].dev["block"]["nats"]

    def test_threads_compute_the_same_gradients(self, config: Make, tmp_path: Path) -> None:
        one = adapt_block(config(lora_rank=4, micro_batch=1))
        two = adapt_block(config(lora_rank=4, micro_batch=1, threads=2, out=tmp_path / "threads"))

        for name, pair in adapter_of(one).items():
            for a, b in zip(pair, adapter_of(two)[name], strict=True):
                torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


def test_many_questions_behind_one_context(config: Make, tmp_path: Path) -> None:
    progress: list[StepMetrics] = []
    dev = write_rows(tmp_path / "dev.jsonl", colour_rows(10, seed=1))
    recipe = config(questions=6, masks="mixed", lora_rank=4, steps=6, learning_rate=2e-2, dev=dev, shares=(2.0,))

    out = adapt_block(recipe, on_progress=progress.append)

    assert set(progress[-1].losses) == {"block", "full"}
    assert verify_bundle(out).passed
    training = load_bundle(out).training
    assert training["recipe"]["questions"] == 6 and training["recipe"]["shares"] == [2.0]
    assert "up to 6 questions behind one context" in (out / "MODEL_CARD.md").read_text(encoding="utf-8")


class TestRefusals:
    """Each before anything is trained or written."""

    def test_no_such_model(self, config: Make, tmp_path: Path) -> None:
        with pytest.raises(BundleError, match=r"absent: no such model directory"):
            adapt_block(config(model=tmp_path / "absent"))

    def test_a_directory_that_is_no_checkpoint(self, config: Make, tmp_path: Path) -> None:
        (tmp_path / "empty").mkdir()
        with pytest.raises(BundleError, match=r"empty: no causal language model"):
            adapt_block(config(model=tmp_path / "empty"))

    def test_an_unsupported_architecture_is_named(self, config: Make, tmp_path: Path) -> None:
        GPT2LMHeadModel(GPT2Config(vocab_size=300, n_embd=32, n_layer=1, n_head=2)).save_pretrained(tmp_path / "gpt2")
        make_tiny_tokenizer().save_pretrained(tmp_path / "gpt2")
        with pytest.raises(UnsupportedModelError, match=r"GPT2LMHeadModel \(gpt2\)"):
            adapt_block(config(model=tmp_path / "gpt2"))

    def test_no_tokenizer_and_no_weights(self, config: Make, checkpoint: Path) -> None:
        (checkpoint / "tokenizer.json").unlink()
        with pytest.raises(BundleError, match=r"lacks a fast tokenizer"):
            adapt_block(config())
        (checkpoint / "model.safetensors").unlink()
        with pytest.raises(BundleError, match=r"lacks weights in safetensors"):
            adapt_block(config())

    def test_a_template_whose_end_is_no_token(self, config: Make, tmp_path: Path) -> None:
        path = tmp_path / "template.json"
        path.write_text(json.dumps({**TEST_TEMPLATE.to_dict(), "end": "<|finis|>"}), encoding="utf-8")
        with pytest.raises(BundleError, match=r"template's '<\|finis\|>' is no single token"):
            adapt_block(config(template_file=path))

    def test_bad_data(self, config: Make, tmp_path: Path) -> None:
        empty = write_rows(tmp_path / "empty.jsonl", [])
        with pytest.raises(SetupError, match=r"empty\.jsonl: no rows"):
            adapt_block(config(data=(empty,)))
        unanswered = write_rows(tmp_path / "bad.jsonl", [*colour_rows(2), {**colour_rows(1)[0], "answers": []}])
        with pytest.raises(SetupError, match=r"bad\.jsonl:3: no answer"):
            adapt_block(config(data=(unanswered,)))

    def test_an_output_that_exists(self, config: Make, tmp_path: Path) -> None:
        (tmp_path / "bundle").mkdir()
        with pytest.raises(SetupError, match=r"bundle: exists already"):
            adapt_block(config())

    def test_a_run_folder_of_another_run(self, config: Make, tmp_path: Path) -> None:
        adapt_block(config()).rename(tmp_path / "elsewhere")
        with pytest.raises(SetupError, match=r"bundle\.run holds another run: recipe is .*'seed': 0.*'seed': 5"):
            adapt_block(config(seed=5))

    def test_a_run_folder_in_use(self, config: Make, tmp_path: Path) -> None:
        run = tmp_path / "bundle.run"
        run.mkdir()
        with (run / "lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            with pytest.raises(SetupError, match="another process is training there"):
                adapt_block(config())

    def test_a_damaged_checkpoint(self, config: Make, tmp_path: Path) -> None:
        folder = tmp_path / "bundle.run" / "checkpoint-2"
        folder.mkdir(parents=True)
        (folder / "state.json").write_text('{"step": 2, "tokens": 9, "seconds": 1.0}', encoding="utf-8")
        with pytest.raises(DataError, match=r"checkpoint-2: the checkpoint cannot be read"):
            adapt_block(config())

    @pytest.mark.parametrize(
        ("change", "problem"),
        [
            ({"steps": 0}, "steps 0"),
            ({"max_passages": 2, "min_passages": 3}, "max_passages 2"),
            ({"refusal_share": 1.5}, "refusal_share 1.5"),
            ({"distillation": 1.0, "masks": "block"}, "needs both masks"),
            ({"train": "tokens"}, "needs link_tokens or sink_tokens"),
            ({"learning_rate": 0.0}, "learning_rate 0.0"),
            ({"passage_tokens": 4}, "passage_tokens 4"),
            ({"lora_rank": -1}, "lora_rank -1"),
            ({"lora_rank": 4, "train": "tokens", "link_tokens": 1}, "not the tokens alone"),
            ({"questions": 4, "shares": (1.0, 2.0)}, "one for each file"),
            ({"shares": (1.0,)}, "questions 1"),
            ({"threads": 2, "device": "cuda"}, "threads 2"),
        ],
    )
    def test_values_out_of_range(self, config: Make, change: dict[str, Any], problem: str) -> None:
        with pytest.raises(SetupError, match=problem):
            config(**change)


def test_tensorboard_is_written_when_asked_for(config: Make) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    out = adapt_block(config(tensorboard=True))

    events = EventAccumulator(str(out.parent / "bundle.run" / "tensorboard"))
    events.Reload()
    assert [event.step for event in events.Scalars("losses/block")] == [1, 2, 3]
    assert [event.step for event in events.Scalars("dev/block/exact")] == [0, 3]


def test_an_absent_tensorboard_is_named(tmp_path: Path) -> None:
    with pytest.raises(SetupError, match="install the package tensorboard"):
        open_tensorboard(tmp_path, package="no_such_package")
