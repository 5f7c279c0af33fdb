"""What a frozen reader says of masks."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from blockrag.budget import composed_slots
from blockrag.modeling.bundle import Bundle, load_bundle
from blockrag.modeling.model import SlotModel, load_stock_model
from blockrag.modeling.refrag.chunk_encoder import ChunkEncoder
from blockrag.modeling.refrag.compression import ChunkCompressor, Projector, compose_passage
from blockrag.modeling.refrag.refrag_writing import write_refrag
from blockrag.training.adaptation.batch import Branch
from blockrag.training.refrag.policy_reader import PolicyReader
from tests.models import TINY_VOCAB, make_tiny_bundle


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    folder = tmp_path_factory.mktemp("policy")
    torch.manual_seed(0)
    encoder, projector = ChunkEncoder.for_tokens(TINY_VOCAB, None, width=16, heads=2), Projector(16, 32)
    plain = load_bundle(make_tiny_bundle(folder / "plain"))
    return write_refrag(plain, folder / "bundle", encoder=encoder, projector=projector, chunk_tokens=4, training=())


def test_losses_are_those_of_the_served_model(bundle: Bundle) -> None:
    """Nats of a target under a mask, composed as serving composes it."""
    passages = [[3, 10, 11, 12, 13, 14, 15], [3, 20, 21, 22, 23, 24, 25, 26, 27]]
    masks = np.array([[True, False, False, False, True], [False] * 5, [True] * 5])
    branch = Branch([5, 30, 31, 6], [40, 41, 2])
    reader = PolicyReader.load(bundle)
    context = reader.capture([1], passages)
    assert (context.chunks, context.tokens) == (5, 16)
    losses = reader.losses(context, branch, masks)
    bare = reader.prompt_losses(context, [context.without_passages(branch)])

    served, compressor = SlotModel.load(bundle), ChunkCompressor.load(bundle)
    full = [served.to_resident(one) for one in served.encode([[1], *passages], ["i", "a", "b"])]
    projected = compressor.project(compressor.embed(passages))
    short = [served.to_resident(one) for one in served.encode_embeddings(projected, passages, ["c", "d"])]

    def expected(expanded: np.ndarray | None) -> float:
        pieces = [full[0]]
        if expanded is not None:
            pieces += compose_passage(full[1], short[0], expanded[:2].tolist(), 4)
            pieces += compose_passage(full[2], short[1], expanded[2:].tolist(), 4)
        state = served.new_sequence(pieces, len(branch.prompt) + len(branch.answer))
        found, tokens = 0.0, branch.prompt
        for target in branch.answer:
            logits = served.forward([(state, tokens)])
            found += float(F.cross_entropy(logits, torch.tensor([target])))
            tokens = [target]
        state.release()
        return found / len(branch.answer)

    assert losses.tolist() == pytest.approx([expected(mask) for mask in masks], abs=1e-4)
    assert float(bare) == pytest.approx(expected(None), abs=1e-4)
    assert len(set(losses.tolist())) == 3


def test_divergences_are_from_the_uncompressed_predictions(bundle: Bundle) -> None:
    passages = [[3, 10, 11, 12, 13, 14, 15], [3, 20, 21, 22, 23, 24, 25, 26, 27]]
    masks = np.array([[True, False, False, False, True], [False] * 5, [True] * 5])
    branch = Branch([5, 30, 31, 6], [40, 41, 2])
    reader = PolicyReader.load(bundle)
    context = reader.capture([1], passages)
    found = reader.divergences(context, branch, masks)

    with torch.no_grad():
        logs = [
            reader.decoder.logits(reader.decoder.final(context.bank, [context.prompt(branch, mask)])).log_softmax(-1)
            for mask in masks
        ]
    for place in range(3):
        expected = F.kl_div(logs[place], logs[2], log_target=True, reduction="sum") / 3
        assert float(found[place]) == pytest.approx(float(expected), rel=1e-3, abs=1e-6)
    assert float(found[0]) > 1e-4 and float(found[1]) > 1e-4


def test_chunk_losses_are_those_of_the_block_pass(bundle: Bundle) -> None:
    passages = [[3, 10, 11, 12, 13, 14], [7], [3, 20, 21]]
    found = np.concatenate(PolicyReader.load(bundle).chunk_losses(passages))
    model = load_stock_model(bundle)
    expected = []
    with torch.no_grad():
        for passage in (passages[0], passages[2]):
            logits = model(torch.tensor([passage])).logits[0, :-1]
            losses = F.cross_entropy(logits, torch.tensor(passage[1:]), reduction="none")
            expected.append(losses.numpy())
    want = [expected[0][:3].mean(), expected[0][3:].mean(), 0.0, expected[1].mean()]
    assert found.tolist() == pytest.approx(want, abs=1e-4)


def test_masks_at_a_rate(bundle: Bundle) -> None:
    context = PolicyReader.load(bundle).capture([1], [list(range(3, 23))])
    scores = np.arange(5, dtype=np.float32)
    assert context.mask_at(scores, 4.0).sum() == 0
    assert context.mask_at(scores, 100.0).sum() == 0
    assert context.mask_at(scores, 1.0).all()
    mask = context.mask_at(scores, 2.0)
    assert mask.tolist() == [False, False, False, False, True]
    assert composed_slots([20], mask, 4) <= context.tokens / 2
