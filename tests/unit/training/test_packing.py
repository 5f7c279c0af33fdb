import numpy as np
import torch

from blockrag.training.contexts import Branch, Context
from blockrag.training.packing import IGNORED, Weights, pack

CONTEXTS = [
    Context([[1], [3, 20, 21], [3, 30]], [Branch([5, 40, 6], [41, 2]), Branch([5, 50, 51, 6], [52, 53, 2])]),
    Context([[1], [3, 60]], [Branch([5, 6], [61, 2])]),
]


def _may_see(context: Context, block: bool) -> np.ndarray:
    """The definition, token by token: (place, part) of a query against (place, part) of a key."""
    parts: list[tuple[str, int]] = []
    for number, tokens in enumerate(context.blocks):
        parts += [("block", number)] * len(tokens)
    for number, branch in enumerate(context.branches):
        parts += [("branch", number)] * (len(branch.prompt) + len(branch.answer))
    allowed = np.zeros((len(parts), len(parts)), bool)
    for query, (query_kind, query_number) in enumerate(parts):
        for key, (key_kind, key_number) in enumerate(parts[: query + 1]):
            if query_kind == "branch":
                allowed[query, key] = key_kind == "block" or key_number == query_number
            else:
                allowed[query, key] = query_number == key_number if block else True
    return allowed


def test_masks_are_the_definition() -> None:
    for block in (True, False):
        batch = pack(CONTEXTS, block=block, weights=Weights())
        for row, context in enumerate(CONTEXTS):
            expected = _may_see(context, block)
            size = len(expected)
            assert np.array_equal(batch.mask()[row, 0, :size, :size].numpy(), expected)
            assert not batch.mask()[row, 0, :size, size:].any()


def test_every_query_has_a_key() -> None:
    batch = pack(CONTEXTS, block=True, weights=Weights(), multiple=32)
    assert batch.input_ids.shape == (2, 32)
    assert batch.mask().any(-1).all()


def test_questions_start_right_after_the_context() -> None:
    batch = pack(CONTEXTS, block=True, weights=Weights())
    assert batch.position_ids[0, :6].tolist() == [0, 1, 2, 3, 4, 5]
    assert batch.position_ids[0, 6:11].tolist() == [6, 7, 8, 9, 10]
    assert batch.position_ids[0, 11:18].tolist() == [6, 7, 8, 9, 10, 11, 12]


def test_gaps_move_what_stands_behind_them() -> None:
    spread = Context(CONTEXTS[0].blocks, CONTEXTS[0].branches, (0, 10, 0, 5))
    batch = pack([spread], block=True, weights=Weights())
    assert batch.position_ids[0, :6].tolist() == [0, 11, 12, 13, 14, 15]
    assert batch.position_ids[0, 6:11].tolist() == [21, 22, 23, 24, 25]
    assert batch.position_ids[0, 11:18].tolist() == [21, 22, 23, 24, 25, 26, 27]
    contiguous = pack([CONTEXTS[0]], block=True, weights=Weights())
    assert torch.equal(batch.mask(), contiguous.mask())
    assert torch.equal(batch.targets, contiguous.targets)


def test_targets_and_weights() -> None:
    batch = pack(CONTEXTS, block=True, weights=Weights(passage=0.25, question=0.5))
    assert batch.targets[0].tolist()[:6] == [IGNORED, 20, 21, IGNORED, 30, IGNORED]
    assert batch.targets[0, 6:11].tolist() == [40, 6, 41, 2, IGNORED]
    assert batch.weights[0, 6:11].tolist() == [0.5, 0.5, 1.0, 1.0, 0.0]
    assert batch.branches[0, 6:18].tolist() == [-1, -1, 0, 0, -1, -1, -1, -1, 1, 1, 1, -1]
    assert batch.branches[1].max() == 2
    assert batch.tokens == 18 + 7


def test_a_context_without_questions_is_causal() -> None:
    batch = pack([Context([[1, 2, 3], [4, 5]], [])], block=False, weights=Weights())
    assert torch.equal(batch.mask()[0, 0], torch.ones(5, 5).tril().bool())
