"""Telling the reader where an answer stands, while it is trained.

The answer's own loss says what to copy, and only through several layers from where. A second loss asks that some head
of a middle layer looks from the last token of a question at the words around its answer, and some head of each of the
last two layers at the answer itself. "Some head" is a noisy-or over the heads, so one that looks there is enough and
the others stay free. It costs a few rows of scores, and nothing at inference.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

_MOST_PLACES = 2
"""Of an answer in its context; one that stands in more places than this is no evidence for any."""
_AROUND = 14
"""Tokens on each side of an answer that belong to its surroundings, where its block has them."""
_LEAST = 1e-6


@dataclass(frozen=True)
class Evidence:
    """Where the answers of one row's questions stand; Q questions, T tokens a row."""

    asked: torch.Tensor
    """[Q] int64; place of the last token before the answer."""
    around: torch.Tensor
    """[Q, T] bool; the answer and the words around it in its block."""
    exact: torch.Tensor
    """[Q, T] bool; the answer's tokens in the context."""


def find_evidence(
    blocks: Sequence[Sequence[int]], asked: Sequence[int], answers: Sequence[Sequence[int]], width: int
) -> Evidence:
    """Look the answers up in the blocks, which stand one after another from the row's beginning.

    ``answers[i]``: token ids of the answer to the question whose last token stands at ``asked[i]``. A question whose
    answer is not found, or found too often, is left out.
    """
    ids = np.array([token for block in blocks for token in block], dtype=np.int64)
    ends = np.cumsum([len(block) for block in blocks])
    kept: list[int] = []
    around: list[NDArray[np.bool_]] = []
    exact: list[NDArray[np.bool_]] = []
    for place, answer in zip(asked, answers, strict=True):
        starts = _occurrences(ids, answer)
        if not 1 <= len(starts) <= _MOST_PLACES:
            continue
        near, itself = np.zeros(width, bool), np.zeros(width, bool)
        for start in starts:
            block = int(np.searchsorted(ends, start, side="right"))
            first, end = (int(ends[block - 1]) if block else 0), int(ends[block])
            itself[start : min(end, start + len(answer))] = True
            near[max(first, start - _AROUND) : min(end, start + len(answer) + _AROUND)] = True
        kept.append(place)
        around.append(near)
        exact.append(itself)
    rows = (len(kept), width)
    return Evidence(
        asked=torch.tensor(kept, dtype=torch.int64),
        around=torch.from_numpy(np.array(around, dtype=bool).reshape(rows)),
        exact=torch.from_numpy(np.array(exact, dtype=bool).reshape(rows)),
    )


def _occurrences(ids: NDArray[np.int64], answer: Sequence[int]) -> list[int]:
    starts = np.flatnonzero(ids[: len(ids) - len(answer) + 1] == answer[0]) if answer else np.array([], np.int64)
    return [int(start) for start in starts if ids[start : start + len(answer)].tolist() == list(answer)]


class Watched(NamedTuple):
    """What some head of a layer should look at."""

    kind: Literal["around", "exact"]
    layer: int


def watched_layers(layers: int) -> tuple[Watched, ...]:
    """Of a model of ``layers`` layers: surroundings in the middle, the answer itself in the last two."""
    return Watched("around", layers // 2), Watched("exact", layers - 2), Watched("exact", layers - 1)


@dataclass
class EvidenceLosses:
    """Collects the losses of a forward pass, which hands it through to the attention of every layer."""

    rows: Sequence[Evidence]
    """One per row of the batch."""
    watched: Sequence[Watched]
    found: dict[Watched, torch.Tensor] = field(default_factory=dict)
    """Loss of every question, nats, float32 [all questions]."""

    @property
    def questions(self) -> int:
        return sum(len(row.asked) for row in self.rows)

    def look(self, layer: int, query: torch.Tensor, key: torch.Tensor, mask: torch.Tensor, scaling: float) -> None:
        """Adds a layer's losses; ``query`` and ``key`` [B, heads, T, D], ``mask`` additive [B, 1, T, T]."""
        for watched in self.watched:
            if layer == watched.layer and self.questions:
                self.found[watched] = torch.cat(list(self._losses(watched.kind, query, key, mask, scaling)))

    def total(self) -> torch.Tensor | None:
        """Sum of all questions' losses in all watched layers; None where there is no question."""
        return torch.stack([losses.sum() for losses in self.found.values()]).sum() if self.found else None

    def _losses(
        self, kind: str, query: torch.Tensor, key: torch.Tensor, mask: torch.Tensor, scaling: float
    ) -> Iterator[torch.Tensor]:
        for number, row in enumerate(self.rows):
            if not len(row.asked):
                continue
            scores = query[number][:, row.asked] @ key[number].transpose(1, 2) * scaling + mask[number][:, row.asked]
            wanted = row.around if kind == "around" else row.exact
            yield missed(scores.float().softmax(-1), wanted.to(scores.device))


def missed(attended: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    """-log of the chance that at least one head looks at a wanted place, [Q] in nats.

    ``attended`` [heads, Q, T] sums to 1 over T; ``wanted`` [Q, T] bool. The heads count as independent (noisy-or).
    """
    mass = (attended * wanted).sum(-1).clamp(max=1 - _LEAST)
    none = torch.log1p(-mass).sum(0)
    return -torch.log((-torch.expm1(none)).clamp(min=_LEAST))
