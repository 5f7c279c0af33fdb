from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from blockrag.decoder.block_loading import BlockTier, LoadedBlocks
from blockrag.decoder.l1 import L1Entry
from blockrag.decoder.prompt import Prompt, compose, read_prompt
from blockrag.errors import InvalidRequestError
from blockrag.keys import KeyMaker
from blockrag.modeling.slots import ResidentBlock, SlotSlice, wide_slots
from blockrag.types import FULL, BlockForm
from blockrag.v1.common_pb2 import (
    ATTENTION_MODE_BLOCK,
    ATTENTION_MODE_FULL,
    CHUNK_FORM_COMPRESSED,
    CHUNK_FORM_DROPPED,
    CHUNK_FORM_EXPANDED,
    CHUNK_FORM_UNSPECIFIED,
    AttentionMode,
    PromptBlock,
    RequestContext,
    Sampling,
    TokenSpan,
)
from blockrag.v1.decoder_pb2 import DecodeRequest

CHUNK = 4
KEYS = KeyMaker("bundle", b"secret", "compression")
COMPRESSED = BlockForm("compressed", CHUNK)
E, C = CHUNK_FORM_EXPANDED, CHUNK_FORM_COMPRESSED


def read(*blocks: PromptBlock, mode: AttentionMode = ATTENTION_MODE_BLOCK, chunk_tokens: int = CHUNK) -> Prompt:
    request = DecodeRequest(
        context=RequestContext(tenant="t"),
        blocks=blocks,
        final_token_ids=[7, 8],
        attention_mode=mode,
        sampling=Sampling(max_tokens=1),
    )
    return read_prompt(request, KEYS, 1000, chunk_tokens)


def block(tokens: int, forms: list[int], chunk_tokens: int = CHUNK) -> PromptBlock:
    return PromptBlock(token_ids=range(tokens), document_id="d", collection="c", chunk_tokens=chunk_tokens, forms=forms)


def test_only_the_forms_that_are_needed_are_asked_for() -> None:
    prompt = read(PromptBlock(token_ids=[1]), block(10, [E, C, E]), block(10, [C, C, C]), block(9, [E, E, E]))
    assert [[request.form for request in part.requests] for part in prompt.parts] == [
        [FULL],
        [FULL, COMPRESSED],
        [COMPRESSED],
        [FULL],
    ]
    assert [part.slots for part in prompt.parts] == [1, 4 + 1 + 2, 3, 9]
    assert (prompt.composed_slots, prompt.slots) == (20, 22)
    assert prompt.parts[1].expanded == (True, False, True)
    for request in prompt.requests[1:]:
        assert (request.tenant, request.collection, request.document_id) == ("t", "c", "d")
        assert request.key == KEYS.block_key("t", request.token_ids, request.form)


@pytest.mark.parametrize(
    ("bad", "problem"),
    [
        (block(10, [E, C]), r"blocks\[1\]\.forms: holds 2, where 10 tokens have 3 chunks"),
        (block(10, [E, C, E, E]), r"blocks\[1\]\.forms: holds 4"),
        (block(10, [E, C, CHUNK_FORM_DROPPED]), r"blocks\[1\]\.forms: every chunk must be"),
        (block(10, [E, C, CHUNK_FORM_UNSPECIFIED]), r"blocks\[1\]\.forms: every chunk must be"),
        (block(10, [E, C], 5), r"blocks\[1\]\.chunk_tokens: is 5; the bundle's chunks have 4 tokens"),
        (block(10, [E, C, E], 0), r"blocks\[1\]\.chunk_tokens: is 0"),
    ],
)
def test_mixtures_that_cannot_be_are_named(bad: PromptBlock, problem: str) -> None:
    with pytest.raises(InvalidRequestError, match=problem):
        read(PromptBlock(token_ids=[1]), bad)


def kept(tokens: int, *spans: tuple[int, int]) -> PromptBlock:
    return PromptBlock(token_ids=range(tokens), kept=[TokenSpan(start=start, end=end) for start, end in spans])


def test_parts_of_blocks_are_slots_of_the_whole_ones() -> None:
    prompt = read(PromptBlock(token_ids=[1]), kept(10, (0, 2), (5, 9)), kept(10), chunk_tokens=0)
    assert [part.slots for part in prompt.parts] == [1, 6, 10]
    assert [request.form for request in prompt.requests] == [FULL] * 3
    assert prompt.requests[1].key == prompt.requests[2].key  # one block in the caches
    assert prompt.slots == 1 + 6 + 10 + 2


@pytest.mark.parametrize(
    ("bad", "problem"),
    [
        (kept(10, (3, 3)), r"blocks\[1\]\.kept\[0\]: is 3 to 3"),
        (kept(10, (4, 2)), r"blocks\[1\]\.kept\[0\]: is 4 to 2"),
        (kept(10, (0, 11)), r"blocks\[1\]\.kept\[0\]: is 0 to 11"),
        (kept(10, (0, 4), (3, 6)), r"blocks\[1\]\.kept\[1\]: is 3 to 6, behind 4 of 10"),
        (PromptBlock(token_ids=range(8), chunk_tokens=CHUNK, forms=[E, C], kept=[TokenSpan(end=1)]), "together with"),
    ],
)
def test_parts_that_cannot_be_are_named(bad: PromptBlock, problem: str) -> None:
    with pytest.raises(InvalidRequestError, match=problem):
        read(PromptBlock(token_ids=[1]), bad)


def test_parts_are_of_cached_blocks_only() -> None:
    with pytest.raises(InvalidRequestError, match=r"blocks\[0\]\.kept: can be given with attention_mode block only"):
        read(kept(10, (0, 2)), mode=ATTENTION_MODE_FULL)


def test_a_bundle_that_cannot_compress_says_so() -> None:
    with pytest.raises(InvalidRequestError, match=r"blocks\[0\]\.forms: the bundle has no chunk encoder"):
        read(block(4, [C]), chunk_tokens=0)


def test_tokens_that_are_prefilled_cannot_be_compressed() -> None:
    with pytest.raises(InvalidRequestError, match="attention_mode block only"):
        read(block(4, [C]), mode=ATTENTION_MODE_FULL)


MASKS = st.lists(
    st.tuples(st.integers(1, 30), st.randoms(use_true_random=False), st.booleans()), min_size=1, max_size=6
)


@given(MASKS)
def test_a_composed_prompt_has_the_slots_of_its_chunks_in_order(passages: list) -> None:  # type: ignore[type-arg]
    masks = [
        [draw.random() < 0.5 for _ in range(COMPRESSED.size(tokens))] if mixed else None
        for tokens, draw, mixed in passages
    ]
    prompt = read(
        *(
            block(tokens, [E if keep else C for keep in mask] if mask else [])
            for (tokens, _, _), mask in zip(passages, masks, strict=True)
        )
    )
    tiers: tuple[BlockTier, ...] = ("l1", "store", "disk", "encoded")
    anywhere: tuple[BlockTier, ...] = (*tiers, "volume")
    residents = [
        _resident(request.key, request.size, place if request.form == FULL else -place)
        for place, request in enumerate(prompt.requests, start=1)
    ]
    places = [anywhere[place % 5] for place in range(len(residents))]
    loaded = LoadedBlocks(tuple(L1Entry(block, 0.0) for block in residents), tuple(places))
    composed = compose(prompt.parts, loaded, CHUNK)
    assert sum(piece.num_slots for piece in composed.blocks) == prompt.composed_slots
    assert sum(map(composed.slots, tiers)) == prompt.composed_slots
    assert [sum(part.values()) for part in composed.found] == [part.slots for part in prompt.parts]
    # Each slot's value says whose it is and which slot of it.
    found = np.concatenate([wide_slots(piece)[0, 0, 0].numpy() for piece in composed.blocks]).astype(int).tolist()
    expected, number = [], 0
    for (tokens, _, _), mask in zip(passages, masks, strict=True):
        needed = [True] if not mask else [kind for kind in (True, False) if kind in mask]
        name = {kind: number + 1 + place for place, kind in enumerate(needed)}
        number += len(needed)
        for position in range(tokens):
            chunk = position // CHUNK
            if mask and not mask[chunk]:
                if position % CHUNK == 0:
                    expected.append([-name[False], chunk])
            else:
                expected.append([name[True], position])
    assert found == expected
    by_tier = dict.fromkeys(tiers, 0)
    for owner, _ in expected:
        place = places[abs(owner) - 1]
        by_tier["disk" if place == "volume" else place] += 1
    assert {tier: composed.slots(tier) for tier in tiers} == by_tier


def test_without_mixtures_the_blocks_are_taken_as_they_are() -> None:
    prompt = read(PromptBlock(token_ids=[1]), block(10, []))
    residents = [_resident(request.key, request.size, 0) for request in prompt.requests]
    loaded = LoadedBlocks(tuple(L1Entry(each, 0.0) for each in residents), ("l1", "l1"))
    composed = compose(prompt.parts, loaded, 0)
    assert not any(isinstance(each, SlotSlice) for each in composed.blocks)
    assert [id(each) for each in composed.blocks] == [id(each) for each in residents]


def _resident(key: str, slots: int, owner: int) -> ResidentBlock:
    keys = torch.stack([torch.full((slots,), float(owner)), torch.arange(slots, dtype=torch.float32)], dim=-1)[
        None, None
    ]
    return ResidentBlock(key, torch.stack([keys, keys]))
