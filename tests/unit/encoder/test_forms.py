from __future__ import annotations

import asyncio

import numpy as np
import pytest
import torch

from blockrag.encoder.block_encoder import BlockEncoder
from blockrag.encoder.forms import FormEncoder
from blockrag.errors import DataError, InvalidRequestError
from blockrag.modeling.model import SlotModel
from blockrag.modeling.refrag.chunk_encoder import ChunkEncoder
from blockrag.modeling.refrag.compression import ChunkCompressor, Projector
from blockrag.types import FULL, BlockForm, BlockKV, BlockRequest, ChunkEmbeddings
from tests.models import TINY_VOCAB, make_tiny_model

CHUNK = 4
COMPRESSED, CHUNKS = BlockForm("compressed", CHUNK), BlockForm("chunks", CHUNK)


@pytest.fixture(scope="module")
def model() -> SlotModel:
    return SlotModel.from_pretrained_model(make_tiny_model())


@pytest.fixture(scope="module")
def compressor() -> ChunkCompressor:
    torch.manual_seed(0)
    return ChunkCompressor(
        ChunkEncoder.for_tokens(TINY_VOCAB, None, width=16, heads=2).eval(), Projector(16, 32), CHUNK
    )


@pytest.fixture
def encoder(model: SlotModel, compressor: ChunkCompressor) -> FormEncoder:
    return FormEncoder(model, compressor)


def block(key: str, tokens: int, form: BlockForm = FULL) -> BlockRequest:
    ids = np.random.default_rng(tokens).integers(0, TINY_VOCAB, tokens, dtype=np.int32)
    return BlockRequest(key, ids, "t", form=form)


def test_forms_of_several_blocks_in_one_batch(
    encoder: FormEncoder, model: SlotModel, compressor: ChunkCompressor
) -> None:
    wanted = [
        block("chunks of ten", 10, CHUNKS),
        block("full", 10),
        block("ten", 10, COMPRESSED),
        block("four", 4, COMPRESSED),
        block("chunks of one", 1, CHUNKS),
    ]
    found = encoder.encode(wanted)
    assert [each.key for each in found] == [each.key for each in wanted]
    for request, each in zip(wanted, found, strict=True):
        np.testing.assert_array_equal(each.token_ids, request.token_ids)
    chunks, full, ten, four, one = found
    assert isinstance(chunks, ChunkEmbeddings)
    assert isinstance(one, ChunkEmbeddings)
    assert isinstance(full, BlockKV)
    assert isinstance(ten, BlockKV)
    assert isinstance(four, BlockKV)
    assert (chunks.embeddings.shape, one.embeddings.shape) == ((3, 16), (1, 16))
    assert (full.num_slots, ten.num_slots, four.num_slots) == (10, 3, 1)
    [embedded] = compressor.embed([wanted[0].token_ids.tolist()])
    np.testing.assert_allclose(chunks.embeddings, embedded, atol=1e-6)
    [alone] = model.encode_embeddings(compressor.project([embedded]), [wanted[2].token_ids.tolist()], ["ten"])
    np.testing.assert_allclose(ten.keys, alone.keys, atol=1e-5)
    np.testing.assert_allclose(ten.values, alone.values, atol=1e-5)
    [plain] = model.encode([wanted[1].token_ids.tolist()], ["full"])
    np.testing.assert_array_equal(full.keys, plain.keys)


def test_embeddings_are_arrays_of_their_own(encoder: FormEncoder) -> None:
    """A view of the batch would drag the whole batch into the object store."""
    found = encoder.encode([block("a", 9, CHUNKS), block("b", 5, CHUNKS)])
    for each in found:
        assert isinstance(each, ChunkEmbeddings)
        assert each.embeddings.base is None
        assert each.nbytes == each.embeddings.size * 4


@pytest.mark.parametrize("form", [COMPRESSED, CHUNKS])
def test_a_bundle_without_a_chunk_encoder_has_full_blocks_only(model: SlotModel, form: BlockForm) -> None:
    with pytest.raises(InvalidRequestError, match="no chunk encoder"):
        FormEncoder(model).encode([block("a", 5, form)])


def test_other_chunks_than_the_bundles_are_refused(encoder: FormEncoder) -> None:
    with pytest.raises(InvalidRequestError, match="is compressed-8; the bundle's chunks have 4 tokens"):
        encoder.encode([block("a", 5, BlockForm("compressed", 8))])


def test_embeddings_that_are_no_numbers_are_an_error(model: SlotModel) -> None:
    broken = ChunkEncoder.for_tokens(TINY_VOCAB, None, width=16, heads=2).eval()
    torch.nn.init.constant_(broken.encoder.embeddings.word_embeddings.weight, float("nan"))
    with pytest.raises(DataError, match="NaN or infinite"):
        FormEncoder(model, ChunkCompressor(broken, Projector(16, 32), CHUNK)).encode([block("a", 5, CHUNKS)])


async def test_forms_mix_in_the_batches_of_an_encoder(model: SlotModel, compressor: ChunkCompressor) -> None:
    encoder = BlockEncoder(model, compressor, max_batch_tokens=64, batch_wait_ms=1.0, threads=1)
    wanted = [block(f"{form} {tokens}", tokens, form) for tokens in (5, 30) for form in (FULL, COMPRESSED, CHUNKS)]
    found = await asyncio.gather(*(encoder.encode(each) for each in wanted))
    assert [each.key for each in found] == [each.key for each in wanted]
    with pytest.raises(InvalidRequestError, match=r"blocks\[3\]\.form"):
        encoder.check(np.array([1]), BlockForm("chunks", 5), block="blocks[3].")
