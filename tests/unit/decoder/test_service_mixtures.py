"""Mixtures of expanded and compressed chunks through the whole decoder but for Ray."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import pytest

from blockrag.decoder.block_loading import EncodingBlockSource
from blockrag.decoder.detokenizer import detokenizer_factory
from blockrag.decoder.service import DecodeService, assemble
from blockrag.errors import InvalidRequestError
from blockrag.modeling.bundle import Bundle, load_bundle
from blockrag.modeling.model import SlotModel
from blockrag.modeling.refrag.compression import ChunkCompressor
from blockrag.modeling.slots import SlotSlice
from blockrag.settings import DecoderSettings, Settings
from blockrag.v1 import common_pb2, decoder_pb2
from tests.models import make_tiny_bundle
from tests.refrag_bundles import make_refrag_bundle

CHUNK = 4
BLOCKS = ((1,), (3, 40, 41, 4, 50, 51, 52, 53, 54), (3, 60, 4, 70, 71, 72))
FINAL = (5, 45, 67, 6)
E, C = common_pb2.CHUNK_FORM_EXPANDED, common_pb2.CHUNK_FORM_COMPRESSED


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    folder = tmp_path_factory.mktemp("bundle")
    plain = load_bundle(make_tiny_bundle(folder / "tiny"))
    return make_refrag_bundle(plain, folder / "compressing", width=16, chunk_tokens=CHUNK, decoder_width=32)


@pytest.fixture(scope="module")
def model(bundle: Bundle) -> SlotModel:
    return SlotModel.load(bundle)


@pytest.fixture
def decoder(bundle: Bundle, model: SlotModel) -> Iterator[DecodeService]:
    source = EncodingBlockSource(model, ChunkCompressor.load(bundle))
    decoder = assemble(bundle, model, source, Settings(decoder=DecoderSettings(l1_mb=1, threads=1)))
    decoder.engine.start()
    yield decoder
    decoder.engine.stop()


def request(forms: Sequence[Sequence[int]] = ((), (), ()), chunk_tokens: int = CHUNK) -> decoder_pb2.DecodeRequest:
    return decoder_pb2.DecodeRequest(
        context=common_pb2.RequestContext(request_id="r", tenant="public"),
        blocks=[
            common_pb2.PromptBlock(token_ids=ids, chunk_tokens=chunk_tokens if chosen else 0, forms=chosen)
            for ids, chosen in zip(BLOCKS, forms, strict=True)
        ],
        final_token_ids=FINAL,
        attention_mode=common_pb2.ATTENTION_MODE_BLOCK,
        sampling=common_pb2.Sampling(max_tokens=12),
    )


async def ask(decoder: DecodeService, wanted: decoder_pb2.DecodeRequest) -> tuple[str, common_pb2.Usage]:
    messages = [message async for message in decoder.decode(wanted)]
    return "".join(message.text for message in messages), messages[-1].finish.usage


async def test_everything_expanded_is_block_mode_exactly(decoder: DecodeService) -> None:
    plain, plain_usage = await ask(decoder, request())
    expanded, usage = await ask(decoder, request(((), (E, E, E), (E, E))))
    assert expanded == plain
    assert usage.prompt_tokens == plain_usage.prompt_tokens == 20
    assert (usage.l1_tokens, usage.encoded_tokens, usage.compressed_chunks) == (16, 0, 0)
    assert decoder.l1.stats().blocks == 3


async def test_a_mixture_is_composed_of_both_forms(decoder: DecodeService, bundle: Bundle, model: SlotModel) -> None:
    text, usage = await ask(decoder, request(((), (C, E, C), (C, C))))
    assert (usage.prompt_tokens, usage.compressed_chunks) == (1 + 1 + 4 + 1 + 2 + 4, 4)
    assert (usage.encoded_tokens, usage.cached_tokens, usage.prefill_tokens) == (9, 0, 4)
    assert decoder.l1.stats().blocks == 4, "the second passage's full block was not needed"
    again, cached = await ask(decoder, request(((), (C, E, C), (C, C))))
    assert again == text
    assert (cached.l1_tokens, cached.encoded_tokens) == (9, 0)
    assert text == explicitly(bundle, model)


def explicitly(bundle: Bundle, model: SlotModel) -> str:
    """The same answer from slots that are put together here."""
    compressor = ChunkCompressor.load(bundle)
    full = [model.to_resident(block) for block in model.encode(BLOCKS, ["i", "a", "b"])]
    inputs = compressor.project(compressor.embed(BLOCKS[1:]))
    small = [model.to_resident(block) for block in model.encode_embeddings(inputs, BLOCKS[1:], ["c", "d"])]
    pieces = [full[0], SlotSlice(small[0], 0, 1), SlotSlice(full[1], 4, 8), SlotSlice(small[0], 2, 3), small[1]]
    state = model.new_sequence(pieces, len(FINAL) + 12)
    tokens, logits = [], model.forward([(state, FINAL)])
    while len(tokens) < 12 and (token := int(logits.argmax())) not in model.end_token_ids:
        tokens.append(token)
        logits = model.forward([(state, [token])])
    detokenizer = detokenizer_factory(bundle.load_tokenizer(), bundle.template.answer_prefix)()
    return "".join(map(detokenizer.feed, tokens))


async def test_forms_that_do_not_fit_are_named(decoder: DecodeService) -> None:
    with pytest.raises(InvalidRequestError, match=r"blocks\[1\]\.forms"):
        await ask(decoder, request(((), (C, E), (C, C))))
    with pytest.raises(InvalidRequestError, match=r"blocks\[1\]\.chunk_tokens: is 8"):
        await ask(decoder, request(((), (C, E), (C,)), chunk_tokens=8))


async def test_it_is_estimated_where_blocks_are_and_what_a_first_token_takes(decoder: DecodeService) -> None:
    wanted = request(((), (C, C, C), (C, E)))
    blocks = [*wanted.blocks[:2], common_pb2.PromptBlock(token_ids=wanted.blocks[2].token_ids)]
    asked = decoder_pb2.EstimatePrefillRequest(context=wanted.context, blocks=blocks)
    before = await decoder.estimate(asked)
    assert (list(before.tiers), before.measured_prefills) == (["encoded"] * 3, 0)
    await ask(decoder, wanted)
    after = await decoder.estimate(asked)
    assert (list(after.tiers), after.measured_prefills) == (["l1"] * 3, 1)
    assert {each.tier: each.base_ms + each.token_ms > 0 for each in after.fetches} == {
        "encoded": True,
        "disk": False,
        "store": False,
    }
    both = decoder_pb2.EstimatePrefillRequest(context=wanted.context, blocks=wanted.blocks[2:])
    with pytest.raises(InvalidRequestError, match=r"blocks\[0\]\.forms: must be of one form"):
        await decoder.estimate(both)
    with pytest.raises(InvalidRequestError, match=r"blocks\[0\]\.token_ids"):
        await decoder.estimate(decoder_pb2.EstimatePrefillRequest(blocks=[common_pb2.PromptBlock()]))


async def test_the_status_tells_what_a_slot_costs(decoder: DecodeService) -> None:
    assert decoder.status().measured_prefills == 0
    await ask(decoder, request())
    await ask(decoder, request(((), (C, C, C), (C, C))))
    status = decoder.status()
    assert status.measured_prefills == 2
    # through two points of a busy machine the line may begin at 0
    assert status.prefill_base_ms + status.prefill_slot_ms > 0
