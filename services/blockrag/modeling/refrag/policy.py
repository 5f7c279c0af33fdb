"""The policy that decides which chunks of a prompt's passages are expanded and which stay compressed.

A transformer of two layers over the chunk embeddings c_i of all passages of a prompt gives one logit per chunk. Chunks
are drawn one after another without replacement from softmax(s_i - n_i), n_i = ∞ for those already drawn; the logits s
are computed once (REFRAG, arXiv 2509.01092, section on selective compression). They do not depend on how many are
drawn, so one policy serves every budget, and a larger budget only adds chunks.

Two variants. ``blind`` is the paper's: it sees the embeddings and where each chunk stands. ``query`` sees the question
too: its chunks' embeddings as further tokens and as products with those of the passages, and the features of
``policy_features``.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

from blockrag.errors import BundleError
from blockrag.modeling.linear_layers import speed_up_linear_layers
from blockrag.modeling.loading import check_finite
from blockrag.modeling.refrag.policy_features import FEATURES, PLACE_FEATURES, TokenTraits, chunk_features

_METADATA = "policy"


@dataclass(frozen=True)
class PolicyConfig:
    """Sizes of a policy."""

    encoder_width: int
    """Width of the chunk embeddings."""
    query: bool
    """Whether it sees the question."""
    width: int = 96
    """Of the transformer."""
    layers: int = 2
    heads: int = 3
    hidden: int = 192
    """Width inside the feed-forward layers."""

    def __post_init__(self) -> None:
        if min(self.encoder_width, self.width, self.layers, self.heads, self.hidden) < 1 or self.width % self.heads:
            raise ValueError(f"{self}: sizes must be positive, and width a multiple of heads")


@dataclass(frozen=True)
class PolicyInput:
    """One prompt as a policy sees it. All float32, on the CPU or where the policy is."""

    embeddings: Tensor
    """Of the chunks of all passages in order, [chunks, encoder width]."""
    features: Tensor
    """[chunks, len(FEATURES)]."""
    question: Tensor
    """Embeddings of the question's chunks, [question chunks, encoder width]; no rows where there is no question."""

    @property
    def chunks(self) -> int:
        return int(self.embeddings.shape[0])


def make_policy_input(
    passages: Sequence[Sequence[int]],
    embeddings: Sequence[Tensor],
    question: Sequence[int],
    question_embeddings: Tensor,
    *,
    chunk_tokens: int,
    traits: TokenTraits,
    ranks: Sequence[int] | None = None,
) -> PolicyInput:
    """Put together what a policy sees.

    ``passages``: token ids of the passages' blocks, ``embeddings[i]``: [chunks of passage i, encoder width];
    ``question``: token ids of the final block, and ``question_embeddings`` [question chunks, encoder width], both may
    be empty; ``ranks`` as in ``chunk_features``. Raises ValueError where embeddings and passages do not fit.
    """
    features = chunk_features(passages, question, chunk_tokens, traits, ranks)
    joined = torch.cat(list(embeddings)) if len(embeddings) else question_embeddings[:0]
    if len(joined) != len(features):
        raise ValueError(f"{len(joined)} chunk embeddings for {len(features)} chunks")
    return PolicyInput(joined.float(), torch.from_numpy(features).to(joined.device), question_embeddings.float())


@dataclass(frozen=True)
class PolicyBatch:
    """Several prompts, padded."""

    embeddings: Tensor
    """[prompts, chunks, encoder width]"""
    features: Tensor
    """[prompts, chunks, len(FEATURES)]"""
    question: Tensor
    """[prompts, question chunks, encoder width]"""
    lengths: tuple[int, ...]
    """Chunks of each prompt."""
    question_lengths: tuple[int, ...]


def make_policy_batch(inputs: Sequence[PolicyInput]) -> PolicyBatch:
    """Stack prompts, of which there is at least one."""

    def padded(rows: Sequence[Tensor]) -> Tensor:
        return nn.utils.rnn.pad_sequence(list(rows), batch_first=True)

    return PolicyBatch(
        embeddings=padded([one.embeddings for one in inputs]),
        features=padded([one.features for one in inputs]),
        question=padded([one.question for one in inputs]),
        lengths=tuple(one.chunks for one in inputs),
        question_lengths=tuple(len(one.question) for one in inputs),
    )


class ChunkPolicy(nn.Module):
    """One logit per chunk."""

    def __init__(self, config: PolicyConfig) -> None:
        super().__init__()
        self.config = config
        width = config.width
        self.scale = nn.LayerNorm(config.encoder_width)
        self.embed = nn.Linear(config.encoder_width, width)
        self.place = nn.Linear(len(FEATURES) if config.query else len(PLACE_FEATURES), width)
        self.layers = nn.ModuleList(_Layer(width, config.heads, config.hidden) for _ in range(config.layers))
        self.norm = nn.LayerNorm(width)
        self.score = nn.Linear(width, 1)
        self.direct = nn.Linear(self.place.in_features, 1, bias=False)
        for weights in (self.score.weight, self.score.bias, self.direct.weight):
            nn.init.zeros_(weights)  # untrained, it draws at random
        if config.query:
            self.asked = nn.Parameter(torch.zeros(width))
            self.product = nn.Linear(width, width)

    def forward(self, batch: PolicyBatch) -> Tensor:
        """Logits [prompts, chunks]; minus infinity where a prompt has fewer chunks than the longest."""
        prompts, chunks, _ = batch.embeddings.shape
        own = self.embed(self.scale(batch.embeddings))
        features = batch.features if self.config.query else batch.features[..., : len(PLACE_FEATURES)]
        hidden = own + self.place(features)
        lengths = [(batch.lengths, chunks)]
        if self.config.query:
            question = self.embed(self.scale(batch.question))
            lengths.append((batch.question_lengths, question.shape[1]))
            here = _present(*lengths[1:], device=hidden.device)
            counts = torch.tensor(batch.question_lengths, device=hidden.device).clamp(min=1).view(prompts, 1)
            mean = (question if here is None else question * here.unsqueeze(-1)).sum(1) / counts
            hidden = torch.cat([hidden + self.product(own * mean.unsqueeze(1)), question + self.asked], dim=1)
        mask = _present(*lengths, device=hidden.device)
        seen = None if mask is None else mask[:, None, None, :]
        for layer in self.layers:
            hidden = layer(hidden, seen)
        logits: Tensor = (self.score(self.norm(hidden[:, :chunks])) + self.direct(features)).squeeze(-1)
        return logits if mask is None else logits.masked_fill(~mask[:, :chunks], float("-inf"))

    @torch.inference_mode()
    def rate(self, prompt: PolicyInput) -> NDArray[np.float32]:
        """Logits of one prompt's chunks, [chunks]."""
        if not prompt.chunks:
            return np.zeros(0, dtype=np.float32)
        logits: NDArray[np.float32] = self(make_policy_batch([prompt]))[0].cpu().numpy()
        return logits

    def save(self, path: str | Path) -> None:
        """Write weights and configuration as one safetensors file."""
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in self.state_dict().items()}
        save_file(tensors, path, metadata={_METADATA: json.dumps(asdict(self.config))})

    @classmethod
    def load(cls, path: str | Path, *, device: str | torch.device = "cpu") -> ChunkPolicy:
        """Read what ``save`` wrote, for inference only. Raises BundleError for anything else, and for NaN."""
        try:
            with safe_open(path, framework="pt", device="cpu") as source:
                config = PolicyConfig(**json.loads((source.metadata() or {})[_METADATA]))
                tensors = {name: source.get_tensor(name) for name in source.keys()}  # noqa: SIM118
            policy = cls(config)
            policy.load_state_dict(tensors)
        except (OSError, SafetensorError, KeyError, TypeError, ValueError, RuntimeError) as error:
            raise BundleError(f"{path}: no policy for chunks: {error}") from error
        check_finite(path, tensors.items())
        policy.train(False).requires_grad_(False).to(device)
        speed_up_linear_layers(policy)
        return policy


class _Layer(nn.Module):
    """A transformer layer, normalised first; every token sees every other."""

    def __init__(self, width: int, heads: int, hidden: int) -> None:
        super().__init__()
        self._heads = heads
        self.before_attention = nn.LayerNorm(width)
        self.attention = nn.Linear(width, 3 * width)
        self.attended = nn.Linear(width, width)
        self.before_hidden = nn.LayerNorm(width)
        self.up = nn.Linear(width, hidden)
        self.down = nn.Linear(hidden, width)

    def forward(self, tokens: Tensor, seen: Tensor | None) -> Tensor:
        """tokens [prompts, n, width]; ``seen``: bool [prompts, 1, 1, n], None for all."""
        prompts, count, width = tokens.shape
        joined = self.attention(self.before_attention(tokens)).view(prompts, count, 3, self._heads, -1)
        query, key, value = joined.permute(2, 0, 3, 1, 4)
        found = F.scaled_dot_product_attention(query, key, value, attn_mask=seen).transpose(1, 2)
        tokens = tokens + self.attended(found.reshape(prompts, count, width))
        update: Tensor = self.down(F.relu(self.up(self.before_hidden(tokens))))
        return tokens + update


def _present(*lengths: tuple[Sequence[int], int], device: torch.device) -> Tensor | None:
    """Where something stands among rows of padded parts, bool [prompts, all parts' longest]; None: everywhere.

    Each part is its length in each prompt and the longest.
    """
    if all(length == longest for own, longest in lengths for length in own):
        return None
    counted = [torch.tensor(own, device=device)[:, None] for own, _ in lengths]
    places = [torch.arange(longest, device=device)[None] for _, longest in lengths]
    return torch.cat([place < count for place, count in zip(places, counted, strict=True)], dim=1)


def draw(logits: Tensor, count: int, draws: int, generator: torch.Generator | None = None) -> Tensor:
    """Chunks drawn one after another without replacement, int64 [draws, count], in the order drawn.

    ``logits`` [chunks]. Adding Gumbel noise once and taking the largest draws from the same distribution as drawing
    one after another (Kool, van Hoof and Welling, arXiv 1903.06059, section 2.3).
    """
    if not 0 <= count <= len(logits):
        raise ValueError(f"{count} chunks of {len(logits)}")
    noise = torch.empty(draws, len(logits)).exponential_(generator=generator).log_().neg_()
    return (logits.detach().cpu() + noise).topk(count, dim=1, sorted=True).indices.to(logits.device)


def log_probabilities(logits: Tensor, drawn: Tensor) -> Tensor:
    """Log-probability of each draw given those before it, [draws, count], differentiable in ``logits`` [chunks].

    Their sum over the draws is the log-probability of the whole sequence.
    """
    chosen = logits[drawn]
    left = logits.expand(len(drawn), -1).scatter(1, drawn, float("-inf"))
    # what is still there at a draw: what is never drawn, and this and the later draws
    rest = torch.logsumexp(left, dim=1, keepdim=True) if drawn.shape[1] < logits.shape[0] else None
    later = chosen.flip(1) if rest is None else torch.cat([rest, chosen.flip(1)], dim=1)
    remaining = torch.logcumsumexp(later, dim=1).flip(1)
    return chosen - (remaining if rest is None else remaining[:, :-1])


def mask_of(drawn: Tensor, chunks: int) -> Tensor:
    """Masks of drawn chunks: bool [draws, chunks]."""
    return torch.zeros(len(drawn), chunks, dtype=torch.bool, device=drawn.device).scatter(1, drawn, True)
