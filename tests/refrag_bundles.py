"""Bundles that compress, with random parts: enough for everything but the quality of answers."""

from __future__ import annotations

from pathlib import Path

import torch

from blockrag.modeling.bundle import Bundle
from blockrag.modeling.refrag.chunk_encoder import ChunkEncoder
from blockrag.modeling.refrag.compression import Projector
from blockrag.modeling.refrag.policy import ChunkPolicy, PolicyConfig
from blockrag.modeling.refrag.refrag_writing import PolicyPart, write_refrag


def make_refrag_bundle(plain: Bundle, out: Path, *, width: int, chunk_tokens: int, decoder_width: int) -> Bundle:
    """``plain`` at ``out`` with a chunk encoder, a projector and the policies "query" and "blind", all random."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        encoder = ChunkEncoder.for_tokens(plain.vocab_size, None, width=width, heads=2)
        projector = Projector(width, decoder_width)
        policies = {name: PolicyPart(_policy(width, query=name == "query")) for name in ("query", "blind")}
        return write_refrag(
            plain, out, encoder=encoder, projector=projector, policies=policies, chunk_tokens=chunk_tokens
        )


def _policy(width: int, *, query: bool) -> ChunkPolicy:
    policy = ChunkPolicy(PolicyConfig(width, query, width=64, heads=2, hidden=128))
    # an untrained policy starts with equal logits
    torch.nn.init.normal_(policy.score.weight)
    return policy.eval()
