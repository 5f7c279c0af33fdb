"""Learning from the uncompressed prompt: the loss, what teaches, and what stays as it was."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F

from blockrag.errors import SetupError
from blockrag.modeling.bundle import load_bundle
from blockrag.training.adaptation.batch import Branch
from blockrag.training.refrag.chunk_masks import constant_mask
from blockrag.training.refrag.refrag_reader import RefragReader, SampleLosses, linear_cross_entropy
from blockrag.training.refrag.stage_bundles import load_reader, open_start
from blockrag.training.refrag.stage_config import RefragConfig
from blockrag.training.refrag.stage_samples import RefragSample, View
from blockrag.training.refrag.stages import adapt_refrag
from blockrag.training.refrag.trainer import RefragTrainer
from blockrag.training.run import StepMetrics
from blockrag.training.workers import Workers

Make = Callable[..., RefragConfig]
TARGET = Branch([5, 6], [7, 8, 9, 10])
PASSAGES = ((11, 12, 13, 14, 15, 16), (17, 18, 19, 20, 21))


def test_loss_and_gradients_are_those_of_the_formula() -> None:
    torch.manual_seed(0)
    rows = 600  # more than a chunk
    hidden = torch.randn(rows, 12, requires_grad=True)
    head = torch.randn(30, 12, requires_grad=True)
    taught = torch.randn(rows, 12)
    targets, weights = torch.randint(30, (rows,)), torch.rand(rows)
    shares = torch.tensor([0.0, 0.3, 1.0]).repeat(rows // 3)

    total, losses, divergences = linear_cross_entropy(hidden, head, targets, weights, taught, shares)
    found = torch.autograd.grad(2 * total, (hidden, head))

    expected = F.cross_entropy(hidden @ head.T, targets, reduction="none")
    teacher = (taught @ head.detach().T).log_softmax(-1)
    divergence = F.kl_div((hidden @ head.T).log_softmax(-1), teacher, log_target=True, reduction="none").sum(-1)
    reference = (weights * ((1 - shares) * expected + shares * divergence)).sum()
    assert torch.allclose(losses, expected, atol=1e-5) and torch.allclose(divergences, divergence, atol=1e-5)
    assert torch.allclose(total, reference, rtol=1e-5)
    for one, other in zip(found, torch.autograd.grad(2 * reference, (hidden, head)), strict=True):
        assert torch.allclose(one, other, atol=1e-4)


def sample(expanded: bool, **changes: object) -> RefragSample:
    view = View(constant_mask(PASSAGES, 4, expanded), (TARGET,))
    return replace(RefragSample((1,), PASSAGES, (view,), "text"), **changes)  # type: ignore[arg-type]


@pytest.fixture
def reader(config: Make) -> RefragReader:
    wanted = config()
    found, _ = load_reader(open_start(wanted), wanted)
    found.distillation = 0.7
    return found


def read(reader: RefragReader, *samples: RefragSample) -> SampleLosses:
    found = reader(samples, {"text": 1.0, "answers": 1.0})
    assert isinstance(found, SampleLosses)
    return found


def test_the_uncompressed_prompt_teaches(reader: RefragReader) -> None:
    compressed, expanded = sample(False), sample(True)
    together = read(reader, expanded, compressed, sample(False, kind="answers"))

    logits = []
    for one in (compressed, expanded):
        blocks = reader._read_blocks([one], False)
        logits.append(reader.decoder.logits(reader.decoder.final(blocks.bank, reader._prompts([one], blocks))))
    wanted = F.kl_div(logits[0].log_softmax(-1), logits[1].log_softmax(-1), log_target=True, reduction="none").sum(-1)
    assert torch.allclose(together.divergences[4:8], wanted, atol=1e-5) and float(wanted.detach().sum()) > 1e-3
    assert float(together.divergences[:4].abs().max()) < 1e-5, "nothing is compressed: nothing to learn"
    assert float(together.divergences[8:].abs().max()) == 0.0, "answers have their label"
    labels = F.cross_entropy(
        torch.cat([logits[1], *[logits[0]] * 2]), torch.tensor(TARGET.answer * 3), reduction="none"
    )
    share = torch.tensor([0.7] * 8 + [0.0] * 4)
    expected = ((1 - share) * labels + share * together.divergences).sum()
    assert torch.allclose(together.losses, labels, atol=1e-4) and torch.allclose(together.total, expected, atol=1e-4)


def test_a_sample_under_the_full_mask_has_no_teacher(reader: RefragReader) -> None:
    whole = sample(True, views=(View((), (TARGET,)),), whole=True)
    assert float(read(reader, whole).divergences.abs().max()) == 0.0
    assert float(read(reader, whole, sample(False)).divergences[4:].sum()) > 0


def test_a_part_in_which_nothing_learns_is_passed(config: Make) -> None:
    wanted = config(stage="mixed", train_decoder=False, parts=1, distillation=0.5)
    reader, _ = load_reader(open_start(wanted), wanted)
    trainer = RefragTrainer(reader, wanted, Workers("cpu"))
    try:
        before = {name: value.clone() for name, value in reader.state_dict().items()}
        result = trainer.step([sample(True)], 1.0)
    finally:
        trainer.close()
    assert result.gradient_norm == 0.0 and result.losses["text"] > 0
    assert all(torch.equal(value, before[name]) for name, value in reader.state_dict().items())


@pytest.mark.parametrize("stage", ["mixed", "tune"])
def test_encoder_and_projector_learn_to_serve_a_frozen_decoder(config: Make, stage: str) -> None:
    seen: list[StepMetrics] = []
    wanted = config(
        stage=stage,
        steps=25,
        train_decoder=False,
        distillation=0.9,
        text_share=0.7,
        targets=3,
        compressed_share=1.0,
        expanded_share=1.0,  # left out with a frozen decoder: it would learn nothing from them
    )
    made = load_bundle(adapt_refrag(wanted, on_progress=seen.append))

    assert made.fingerprint == load_bundle(wanted.bundle).fingerprint
    # on the same paragraphs before and after: steps draw other samples, whose divergences do not compare
    assert seen[-1].dev["text, compressed"]["nats"] < seen[0].dev["text, compressed"]["nats"] - 0.05
    assert all(metrics.losses["divergence"] > 0 for metrics in seen[1:])
    assert seen[-1].dev["text, block"] == seen[0].dev["text, block"]


def test_what_cannot_be_distilled_is_refused(config: Make) -> None:
    with pytest.raises(SetupError, match=r"distillation 0.5: reconstruction has no other prompt"):
        config(stage="reconstruction", distillation=0.5)
    with pytest.raises(SetupError, match=r"distillation 2.0: must be from 0 to 1"):
        config(distillation=2.0)
