"""From a prompt's parts and the blocks that were loaded for them to the slots that the engine composes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from blockrag.decoder.blocks import BlockTier, LoadedBlocks
from blockrag.decoder.prompt import PromptPart
from blockrag.modeling.refrag.composing import compose_passage

if TYPE_CHECKING:
    from blockrag.modeling.slots import Slots


@dataclass(frozen=True)
class ComposedPrompt:
    """The cached part of a prompt."""

    blocks: tuple[Slots, ...]
    """Blocks and slices of blocks, in order."""
    found: tuple[Mapping[BlockTier, int], ...]
    """Of each part, its slots in the prompt by where their blocks were found."""

    def slots(self, tier: BlockTier) -> int:
        """Slots in the prompt whose blocks were found there."""
        return sum(part[tier] for part in self.found)


def compose(parts: Sequence[PromptPart], loaded: LoadedBlocks, chunk_tokens: int) -> ComposedPrompt:
    """Put the cached part of a prompt together; ``loaded`` holds the parts' requests in order.

    ``chunk_tokens`` are those of a chunk of the parts that are mixtures.
    """
    slots: list[Slots] = []
    found: list[dict[BlockTier, int]] = []
    blocks = iter(zip(loaded.blocks, loaded.tiers, strict=True))
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
        elif full is not None:
            slots.append(full)
    return ComposedPrompt(tuple(slots), tuple(found))
