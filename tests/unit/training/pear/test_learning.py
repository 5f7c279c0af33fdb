from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel

from blockrag.errors import InvalidRequestError, SetupError
from blockrag.modeling.pear import attention_heads, fold
from blockrag.modeling.pear_record import HeadCoefficient, Mask, PearRecord
from blockrag.training.pear.passes import ProxyTask, ordinary_tokens
from blockrag.training.pear.pear_config import CONDITIONS, LearningConfig, PearConfig
from blockrag.training.pear.procedure import PearReport, adapt, learn, proxy_score, scaled, task_of
from blockrag.training.run import RunFolder, StepMetrics
from blockrag.training.workers import Workers
from tests.unit.training.pear.copying import INDUCTION, SUPPRESSOR, VOCAB, copying_model
from tests.unit.training.pear.models import KINDS, make_model
from tests.unit.training.pear.models import VOCAB as SMALL_VOCAB

CANDIDATES = ordinary_tokens(VOCAB, range(3))
CONFIG = PearConfig(
    heads=2,
    sizes=((20, 12), (20, 8)),
    distractors=2,
    learning=LearningConfig(n=12, steps=60, batch=10, learning_rate=2e-2),
)


@pytest.fixture(scope="session", params=["full", "block"])
def adapted(request: pytest.FixtureRequest) -> tuple[Mask, PreTrainedModel, PearReport, PearRecord]:
    model = copying_model(suppression=0.8)
    report = adapt(model, CANDIDATES, replace(CONFIG, mask=request.param))
    assert report.record is not None
    return request.param, model, report, report.record


Adapted = tuple[Mask, PreTrainedModel, PearReport, PearRecord]


class TestPlantedSuppressor:
    def test_holds_the_model_back(self, adapted: Adapted) -> None:
        mask, _, report, _ = adapted
        without = proxy_score(copying_model(), task_of(CONFIG, mask), CANDIDATES, seed=CONFIG.seed + 2)

        assert without.accuracy > 0.9
        assert report.before[mask].accuracy < 0.7

    def test_detection_ranks_it_first_under_every_mask(self, adapted: Adapted) -> None:
        for condition in CONDITIONS:
            ranked = adapted[2].detections[condition].ranked()
            assert ranked[0][:2] == SUPPRESSOR
            assert ranked[0][2] > 1.0 > 5 * abs(ranked[1][2])
            assert ranked[-1][:2] == INDUCTION and ranked[-1][2] < -0.5

    def test_learning_drives_its_coefficient_down(self, adapted: Adapted) -> None:
        first = adapted[3].heads[0]

        assert (first.layer, first.head) == SUPPRESSOR
        assert first.tau < 0.7

    def test_the_model_copies_again_under_both_masks(self, adapted: Adapted) -> None:
        record = adapted[3]
        for mask in ("full", "block"):
            assert record.after[mask].accuracy > record.before[mask].accuracy + 0.2
            assert record.after[mask].loss < 0.5 * record.before[mask].loss

    def test_the_record_says_what_was_done(self, adapted: Adapted) -> None:
        mask, model, report, record = adapted

        assert (record.mask, record.n, record.steps, record.batch, record.seed) == (mask, 12, 60, 10, 0)
        assert record.before == report.before
        assert record.after[mask] == proxy_score(model, task_of(CONFIG, mask), CANDIDATES, seed=2)
        assert PearRecord.from_dict(record.to_dict(), "here") == record
        assert set(report.seconds) == {
            *(f"detect, {name}" for name in CONDITIONS),
            "score before",
            "learn",
            "score after",
        }


def test_without_learning_nothing_is_folded() -> None:
    model = copying_model(suppression=0.8)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    report = adapt(model, CANDIDATES, CONFIG, learning=False)

    assert report.record is None
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_no_head_with_a_positive_change_means_no_coefficient() -> None:
    model = copying_model()
    heads = attention_heads(model)
    with torch.no_grad():
        for layer in range(2):
            for head in range(4):
                if (layer, head) != INDUCTION:
                    heads.columns(layer, head).zero_()
    report = adapt(model, CANDIDATES, CONFIG)

    assert float(report.detections["block"].delta_pi.max()) < 1e-5
    assert report.record is None


@pytest.mark.parametrize("kind", KINDS)
def test_a_step_goes_against_the_gradient_of_folding(kind: str) -> None:
    model = make_model(kind)
    candidates = ordinary_tokens(SMALL_VOCAB, range(3))
    task = ProxyTask(6, "block", 2)
    chosen = [(1, 2), (0, 3), (1, 0)]
    before = {name: value.clone() for name, value in model.state_dict().items()}

    taus = learn(model, chosen, task, candidates, LearningConfig(n=6, steps=1, batch=8, learning_rate=0.1), seed=1)

    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    for (layer, head), tau in zip(chosen, taus, strict=True):
        losses = []
        for folded in (0.95, 1.05):
            copied = copy.deepcopy(model)
            fold(copied, [HeadCoefficient(layer, head, folded, 0.0)])
            losses.append(proxy_score(copied, task, candidates, seed=1, samples=8, batch=8).loss)
        # Adam's first step is as long as its rate, which the warm-up halves
        assert tau == pytest.approx(1.05 if losses[1] < losses[0] else 0.95, abs=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_scaling_in_front_of_the_projection_is_folding(kind: str) -> None:
    model = make_model(kind)
    tokens = torch.arange(3, 23).view(2, 10)
    chosen, taus = [(1, 2), (0, 3), (1, 0)], [0.5, -1.0, 2.0]
    with torch.no_grad(), scaled(attention_heads(model), chosen, torch.tensor(taus)):
        expected = model(tokens).logits
    fold(model, [HeadCoefficient(*place, tau, 0.0) for place, tau in zip(chosen, taus, strict=True)])
    with torch.no_grad():
        torch.testing.assert_close(model(tokens).logits, expected, atol=1e-5, rtol=1e-5)


def test_the_same_seed_learns_the_same() -> None:
    model = copying_model(suppression=0.8)
    config = replace(CONFIG.learning, steps=3)
    task = task_of(CONFIG, "block")
    first, again, other = (learn(model, [SUPPRESSOR], task, CANDIDATES, config, seed) for seed in (1, 1, 2))

    assert first == again != other


def test_a_stopped_run_goes_on_with_what_was_detected_and_learned(tmp_path: Path) -> None:
    config = replace(CONFIG, learning=replace(CONFIG.learning, steps=40))
    whole = adapt(copying_model(suppression=0.8), CANDIDATES, config)
    folder = RunFolder(tmp_path / "run", Workers())
    seen: list[tuple[str, int]] = []

    def show(stop: int) -> Callable[[StepMetrics], None]:
        def note(metrics: StepMetrics) -> None:
            seen.append((metrics.stage, metrics.step))
            if seen[-1] == ("learn", stop):
                raise InterruptedError

        return note

    with pytest.raises(InterruptedError), folder.opened({"kind": "pear", "recipe": asdict(config)}):
        adapt(copying_model(suppression=0.8), CANDIDATES, config, folder, on_progress=show(30))
    assert {stage for stage, _ in seen} == {"learn", *(f"detect, {condition}" for condition in CONDITIONS)}
    seen.clear()
    with folder.opened({"kind": "pear", "recipe": asdict(config)}):
        resumed = adapt(copying_model(suppression=0.8), CANDIDATES, config, folder, on_progress=show(-1))

    assert seen == [("learn", step) for step in range(26, 41)]
    assert resumed.record == whole.record and resumed.record is not None
    assert resumed.correlations == whole.correlations
    with (
        pytest.raises(SetupError, match="holds another run: recipe"),
        folder.opened({"kind": "pear", "recipe": asdict(CONFIG)}),
    ):
        pass


def test_one_pass_says_how_good_the_untrained_guess_is() -> None:
    model = make_model("gpt2")
    with torch.no_grad():
        model.lm_head.weight.zero_()
    score = proxy_score(model, ProxyTask(5), ordinary_tokens(SMALL_VOCAB), seed=0, samples=30, batch=7)

    assert score.loss == pytest.approx(torch.tensor(float(SMALL_VOCAB)).log().item(), abs=1e-5)


@pytest.mark.parametrize(
    ("make", "problem"),
    [
        (lambda: adapt(copying_model(), CANDIDATES, replace(CONFIG, heads=9)), "heads: 9, where the model has 8"),
        (lambda: adapt(copying_model(), CANDIDATES, replace(CONFIG, heads=0)), "heads: 0, where the model has 8"),
        (lambda: adapt(copying_model(), CANDIDATES[:20], CONFIG), "different tokens, where the vocabulary has 20"),
        (lambda: LearningConfig(steps=0), "learning: steps, batch and learning rate must be positive"),
        (
            lambda: learn(make_model("opt"), [(0, 0)], ProxyTask(40), CANDIDATES, LearningConfig(n=40), 0),
            "80 tokens, where the model has 64 positions",
        ),
    ],
)
def test_refuses(make: object, problem: str) -> None:
    assert callable(make)
    with pytest.raises(InvalidRequestError, match=problem):
        make()
