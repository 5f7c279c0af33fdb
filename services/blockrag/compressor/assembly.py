"""All parts of a compressor put together: in a Serve replica, in evaluation and benchmarks, in tests.

What computes with torch is imported for bundles that compress only: a replica for others has no use for it, and starts
in half the time and the memory without.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from blockrag.compressor.compression_request import CompressionAbility
from blockrag.compressor.plans import Planner
from blockrag.compressor.tokenizing import PassageDrafts, PassageTokenizer
from blockrag.compressor.ttft import Estimate, TtftEstimator
from blockrag.configured import configured_keys
from blockrag.decoder.detokenizer import detokenizer_factory
from blockrag.limits import MIB
from blockrag.modeling.bundle import Bundle
from blockrag.settings import Settings
from blockrag.types import FULL, BlockForm

if TYPE_CHECKING:
    from blockrag.compressor.mixing import EmbeddingCache
    from blockrag.compressor.rating import ChunkRater
    from blockrag.kv_cache.shard_messages import BlockSource
    from blockrag.kv_cache.shards import ShardGroup


def embedding_cache(source: BlockSource, settings: Settings) -> EmbeddingCache:
    """Chunk embeddings of ``source``, kept within the settings' budget."""
    from blockrag.compressor.mixing import EmbeddingCache

    return EmbeddingCache(source, settings.compressor.embeddings_mb * MIB)


def assemble(
    bundle: Bundle,
    settings: Settings,
    embeddings: EmbeddingCache | None,
    *,
    timing: tuple[Estimate, ShardGroup] | None = None,
    rater: ChunkRater | None = None,
    ability: CompressionAbility | None = None,
) -> Planner:
    """A planner of ``bundle``; it belongs to one event loop.

    ``embeddings``: where it has chunk embeddings from, None for a bundle that cannot compress; ``timing``: who
    tells what prompts take, and has late blocks brought into memory; without them no plan is made for a time. ``rater``
    and ``ability`` default to what the bundle has; others let somebody else choose chunks under the same budgets.
    """
    tokenizer = bundle.load_fast_tokenizer()
    mixer, keys = None, configured_keys(settings, bundle)
    forms = [FULL]
    if embeddings is not None:
        from blockrag.compressor.mixing import Mixer
        from blockrag.compressor.rating import ChunkRater

        rater = rater or ChunkRater.load(bundle)
        rater.warm_up()
        forms.append(BlockForm("compressed", bundle.chunk_tokens))
        mixer = Mixer(
            bundle.chunk_tokens,
            rater,
            embeddings,
            keys,
            threads=settings.compressor.threads,
        )
    return Planner(
        PassageTokenizer(tokenizer, bundle.template),
        bundle.max_context_tokens,
        ability or CompressionAbility.of(bundle),
        PassageDrafts(detokenizer_factory(tokenizer, ""), bundle.chunk_tokens),
        mixer,
        None if timing is None else TtftEstimator(*timing, keys, forms),
    )
