"""From a DecodeRequest to what the engine and the block loader work on; every problem is named by its field.

And from its parts, with the blocks that were loaded for them, to the slots that the engine composes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from blockrag.alike import alike
from blockrag.budget import composed_slots
from blockrag.decoder.block_loading import BlockTier, LoadedBlocks
from blockrag.decoder.sequence import SamplingParams
from blockrag.errors import InvalidRequestError
from blockrag.keys import KeyMaker
from blockrag.modeling.refrag.compression import compose_passage
from blockrag.modeling.slots import SlotSlice
from blockrag.types import FULL, BlockForm, BlockRequest
from blockrag.v1 import common_pb2, decoder_pb2

if TYPE_CHECKING:
    from blockrag.modeling.slots import Slots

MODE_NAMES = {
    common_pb2.ATTENTION_MODE_BLOCK: "block",
    common_pb2.ATTENTION_MODE_FULL: "full",
    common_pb2.ATTENTION_MODE_NONE: "none",
}
_IN_PROMPT = {common_pb2.CHUNK_FORM_EXPANDED: True, common_pb2.CHUNK_FORM_COMPRESSED: False}


@dataclass(frozen=True)
class PromptPart:
    """One block of a prompt: as it is, or a mixture of its expanded and its compressed chunks."""

    full: BlockRequest | None
    """None: no chunk is expanded."""
    compressed: BlockRequest | None = None
    """None: no chunk is compressed."""
    expanded: tuple[bool, ...] = ()
    """Of each chunk, for a mixture; empty: the full block as it is."""
    kept: tuple[tuple[int, int], ...] = ()
    """First tokens and ends of what is taken of the full block; empty: all of it."""
    slots: int = 0
    """Positions in the prompt."""

    @property
    def requests(self) -> tuple[BlockRequest, ...]:
        """The forms of the block that are needed."""
        return tuple(request for request in (self.full, self.compressed) if request is not None)


@dataclass(frozen=True)
class Prompt:
    """A checked prompt."""

    mode: str
    """block, full or none; a tag of metrics and spans."""
    parts: tuple[PromptPart, ...]
    """Blocks to compose, in order; empty unless in block mode."""
    token_ids: tuple[int, ...]
    """Tokens to prefill behind them."""
    slots: int
    """Slots of the whole prompt."""
    sampling: SamplingParams

    @property
    def requests(self) -> tuple[BlockRequest, ...]:
        """Every block that is needed, each in the forms that are needed."""
        return tuple(request for part in self.parts for request in part.requests)

    @property
    def composed_slots(self) -> int:
        """Slots of the blocks."""
        return sum(part.slots for part in self.parts)


def read_prompt(request: decoder_pb2.DecodeRequest, keys: KeyMaker, vocab_size: int, chunk_tokens: int = 0) -> Prompt:
    """Check a request and take it apart.

    In block mode each block is one to compose from the caches, or a mixture of its chunks; ``chunk_tokens`` are those
    of the bundle's chunks, 0 when it cannot compress. In the other modes all blocks are tokens to prefill, in front of
    the final block's. Raises ``InvalidRequestError``.
    """
    mode = request.attention_mode or common_pb2.ATTENTION_MODE_BLOCK
    if mode not in MODE_NAMES:
        raise InvalidRequestError("attention_mode", f"{mode} is unknown")
    final = _token_ids("final_token_ids", request.final_token_ids, vocab_size)
    blocks = [
        _token_ids(f"blocks[{place}].token_ids", block.token_ids, vocab_size)
        for place, block in enumerate(request.blocks)
    ]
    sampling = _sampling(request.sampling)
    if mode != common_pb2.ATTENTION_MODE_BLOCK:
        for place, block in enumerate(request.blocks):
            for field in ("forms", "kept"):
                if getattr(block, field):
                    raise InvalidRequestError(f"blocks[{place}].{field}", "can be given with attention_mode block only")
        whole = np.concatenate([*blocks, final])
        return Prompt(MODE_NAMES[mode], (), tuple(whole.tolist()), len(whole), sampling)
    parts = tuple(
        _part(f"blocks[{place}]", block, token_ids, request.context.tenant, keys, chunk_tokens)
        for place, (block, token_ids) in enumerate(zip(request.blocks, blocks, strict=True))
    )
    slots = sum(part.slots for part in parts) + len(final)
    return Prompt(MODE_NAMES[mode], parts, tuple(final.tolist()), slots, sampling)


def read_blocks(
    request: decoder_pb2.EstimatePrefillRequest, keys: KeyMaker, vocab_size: int, chunk_tokens: int = 0
) -> list[BlockRequest]:
    """One block for each of the request's; as ``read_prompt``. Raises ``InvalidRequestError``."""
    wanted: list[BlockRequest] = []
    for place, block in enumerate(request.blocks):
        field = f"blocks[{place}]"
        ids = _token_ids(f"{field}.token_ids", block.token_ids, vocab_size)
        requests = _part(field, block, ids, request.context.tenant, keys, chunk_tokens).requests
        if len(requests) != 1:
            raise InvalidRequestError(f"{field}.forms", "must be of one form: it is said of each where it is")
        wanted += requests
    return wanted


def _part(
    field: str,
    block: common_pb2.PromptBlock,
    token_ids: NDArray[np.int32],
    tenant: str,
    keys: KeyMaker,
    chunk_tokens: int,
) -> PromptPart:
    wanted = partial(keys.block_request, tenant, token_ids, collection=block.collection, document_id=block.document_id)
    if not block.forms:
        kept = _kept(f"{field}.kept", block.kept, len(token_ids))
        return PromptPart(wanted(FULL), kept=kept, slots=sum(end - start for start, end in kept) or len(token_ids))
    if block.kept:
        raise InvalidRequestError(f"{field}.kept", "cannot be given together with forms")
    if not chunk_tokens:
        raise InvalidRequestError(f"{field}.forms", "the bundle has no chunk encoder, so no chunk can be compressed")
    if block.chunk_tokens != chunk_tokens:
        raise InvalidRequestError(
            f"{field}.chunk_tokens", f"is {block.chunk_tokens}; the bundle's chunks have {chunk_tokens} tokens"
        )
    compressed = BlockForm("compressed", chunk_tokens)
    if len(block.forms) != compressed.size(len(token_ids)):
        raise InvalidRequestError(
            f"{field}.forms",
            f"holds {len(block.forms)}, where {len(token_ids)} tokens have {compressed.size(len(token_ids))} chunks",
        )
    if not all(form in _IN_PROMPT for form in block.forms):
        raise InvalidRequestError(f"{field}.forms", "every chunk must be expanded or compressed")
    expanded = tuple(_IN_PROMPT[form] for form in block.forms)
    return PromptPart(
        full=wanted(FULL) if any(expanded) else None,
        compressed=None if all(expanded) else wanted(compressed),
        expanded=expanded,
        slots=composed_slots([len(token_ids)], expanded, chunk_tokens),
    )


def _kept(field: str, spans: Sequence[common_pb2.TokenSpan], tokens: int) -> tuple[tuple[int, int], ...]:
    before = 0
    for place, span in enumerate(spans):
        if not before <= span.start < span.end <= tokens:
            raise InvalidRequestError(
                f"{field}[{place}]", f"is {span.start} to {span.end}, behind {before} of {tokens}"
            )
        before = span.end
    return tuple((span.start, span.end) for span in spans)


def _sampling(message: common_pb2.Sampling) -> SamplingParams:
    # an absent field is 0
    return alike(SamplingParams, message, top_p=message.top_p or 1.0, stop=tuple(message.stop))


def _token_ids(field: str, values: Sequence[int], vocab_size: int) -> NDArray[np.int32]:
    ids = np.array(values, dtype=np.int64)  # takes every uint32
    if ids.size == 0:
        raise InvalidRequestError(field, "must hold at least one token")
    if int(ids.max()) >= vocab_size:
        raise InvalidRequestError(field, f"holds {int(ids.max())}, outside the vocabulary of {vocab_size} tokens")
    return ids.astype(np.int32)


@dataclass(frozen=True)
class ComposedPrompt:
    """The cached part of a prompt."""

    blocks: tuple[Slots, ...]
    """Blocks and slices of blocks, in order."""
    found: tuple[Mapping[BlockTier, int], ...]
    """Of each part, its slots in the prompt by where their blocks were found; a volume's are the disk's."""

    def slots(self, tier: BlockTier) -> int:
        """Slots in the prompt whose blocks were found there."""
        return sum(part[tier] for part in self.found)


def compose(parts: Sequence[PromptPart], loaded: LoadedBlocks, chunk_tokens: int) -> ComposedPrompt:
    """Put the cached part of a prompt together; ``loaded`` holds the parts' requests in order.

    ``chunk_tokens`` are those of a chunk of the parts that are mixtures.
    """
    slots: list[Slots] = []
    found: list[dict[BlockTier, int]] = []
    tiers: list[BlockTier] = ["disk" if tier == "volume" else tier for tier in loaded.tiers]  # files, either way
    blocks = iter(zip(loaded.blocks, tiers, strict=True))
    for part in parts:
        counts: dict[BlockTier, int] = {"l1": 0, "store": 0, "disk": 0, "encoded": 0}
        found.append(counts)
        full = compressed = None
        compressed_slots = part.expanded.count(False)
        if part.full is not None:
            full, tier = next(blocks)
            counts[tier] += part.slots - compressed_slots
        if part.compressed is not None:
            compressed, tier = next(blocks)
            counts[tier] += compressed_slots
        if part.expanded:
            slots += compose_passage(full, compressed, part.expanded, chunk_tokens)
        elif full is not None and part.kept:
            slots += [SlotSlice(full, start, end) for start, end in part.kept]
        elif full is not None:
            slots.append(full)
    return ComposedPrompt(tuple(slots), tuple(found))
