from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from blockrag.training.adaptation.batch import Batch, distillation, score_answers

TARGETS = torch.tensor([[-100, 2, 0], [1, 1, 3]])
NOTHING = torch.zeros(0, dtype=torch.long)
BATCH = Batch(
    input_ids=NOTHING,
    position_ids=NOTHING,
    segments=NOTHING,
    predicted=torch.arange(3),
    targets=TARGETS,
    answers=torch.tensor([[0, 0, 0], [1, 2, 2]]),
    count=3,
    tokens=0,
)


def random_logits(seed: int) -> torch.Tensor:
    return torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(seed)) * 2


def test_loss_counts_answer_tokens_only() -> None:
    logits = random_logits(0)
    expected = -sum(logits[row, k].log_softmax(-1)[TARGETS[row, k]] for row in (0, 1) for k in range(3) if row or k)

    assert float(score_answers(logits, BATCH).loss) == pytest.approx(float(expected), rel=1e-6)


def test_an_answer_is_exact_when_all_its_tokens_are_most_likely() -> None:
    logits = F.one_hot(TARGETS.clamp_min(0), 4).float() * 9
    logits[0, 0] = torch.tensor([0.0, 9, 0, 0])  # belongs to no answer

    assert int(score_answers(logits, BATCH).exact) == 3
    logits[1, 2] = torch.tensor([9.0, 0, 0, 0])
    assert int(score_answers(logits, BATCH).exact) == 2
    logits[1, 1] = torch.tensor([9.0, 0, 0, 0])
    assert int(score_answers(logits, BATCH).exact) == 2, "one answer, two wrong tokens"


def test_distillation_is_zero_between_equals_and_positive_otherwise() -> None:
    logits = random_logits(1)

    assert float(distillation(logits, logits, TARGETS)) == pytest.approx(0.0, abs=1e-6)
    assert float(distillation(random_logits(2), logits, TARGETS)) > 0.1


def test_distillation_weighs_a_token_by_the_teachers_probability_of_the_right_one() -> None:
    student, teacher = random_logits(3), random_logits(4)
    expected = 0.0
    for row, place in ((0, 1), (0, 2), (1, 0), (1, 1), (1, 2)):
        p, q = teacher[row, place].softmax(-1), student[row, place].softmax(-1)
        expected += float(p[TARGETS[row, place]] * (p * (p / q).log()).sum())

    assert float(distillation(student, teacher, TARGETS)) == pytest.approx(expected, rel=1e-5)


def test_no_gradient_reaches_the_teacher() -> None:
    student, teacher = random_logits(5).requires_grad_(), random_logits(6).requires_grad_()

    distillation(student, teacher, TARGETS).backward()

    assert teacher.grad is None
    assert student.grad is not None and float(student.grad.abs().sum()) > 0
    assert float(student.grad[0, 0].abs().sum()) == 0
