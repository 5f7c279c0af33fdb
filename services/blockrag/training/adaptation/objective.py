"""The losses of an adaptation, as sums over answer tokens."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor
from torch.nn import functional as F

from blockrag.training.adaptation.batch import IGNORED


@dataclass(frozen=True)
class AnswerScores:
    """What the logits of a batch say about its answers."""

    loss: Tensor
    """Scalar float32: sum of cross-entropies over answer tokens, in nats."""
    exact: Tensor
    """Scalar: answers whose every token is the most likely one after those before it. Greedy decoding would give
    exactly these."""


def score_answers(logits: Tensor, targets: Tensor) -> AnswerScores:
    """Scores of ``logits`` [B, K, V], of the places that predict ``targets`` [B, K]."""
    loss = F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), ignore_index=IGNORED, reduction="sum")
    right = (logits.argmax(-1) == targets) | (targets == IGNORED)
    return AnswerScores(loss, right.all(1).sum())


def distillation(student: Tensor, teacher: Tensor, targets: Tensor) -> Tensor:
    """Sum over answer tokens of p(t) · KL(teacher ‖ student), scalar float32.

    ``teacher`` [B, K, V] are the logits of the same weights under the full mask, ``student`` those under the block
    mask; no gradient flows into the teacher. The weight p(t) is the probability that the teacher gives the right
    token: where it is wrong, or guesses, there is nothing to learn from it that cross-entropy would not unlearn. Not
    normalised by the sum of the weights, so an unsure teacher counts less over all.
    """
    places = targets != IGNORED
    expected = teacher.detach()[places].float().log_softmax(-1)
    got = student[places].float().log_softmax(-1)
    trust = expected.gather(1, targets[places][:, None])[:, 0].exp()
    divergence = F.kl_div(got, expected, log_target=True, reduction="none").sum(-1)
    return (trust * divergence).sum()
