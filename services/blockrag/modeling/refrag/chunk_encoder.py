"""The chunk encoder: turns each chunk of a block into one vector.

Each chunk is encoded alone and without the question, so its vector is the same in every prompt and is computed once.
Chunks are cut on the decoder's tokens, and there are three ways to read them ("alignment"): ``tokens``, an encoder over
the decoder's own vocabulary reads the token ids as they are; ``text``, any encoder reads the chunk's text through its
own tokenizer; ``decoder``, the decoder's own first layers, which need no second model and are in its space already.

Source: REFRAG (arXiv 2509.01092, section 2), which leaves the pooling unspecified.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import (
    MODEL_MAPPING,
    AutoConfig,
    AutoModel,
    BertConfig,
    BertModel,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from blockrag.errors import BundleError, InvalidRequestError
from blockrag.modeling.bundle import Bundle
from blockrag.modeling.checkpoint import load_first_layers
from blockrag.modeling.files import read_json
from blockrag.modeling.loading import check_finite, check_none, load_weights, no_progress_bar, read_tokenizer
from blockrag.modeling.refrag.parts import encoder_positions
from blockrag.modeling.refrag.record import ALIGNMENTS, POOLINGS, Alignment, Pooling


class ChunkEncoder(nn.Module):
    """Chunks of the decoder's token ids to vectors, float32."""

    def __init__(
        self,
        encoder: PreTrainedModel,
        *,
        alignment: Alignment,
        pooling: Pooling,
        tokenizer: PreTrainedTokenizerFast | None = None,
        decoder_tokenizer: PreTrainedTokenizerFast | None = None,
        chunk_tokens: int = 0,
    ) -> None:
        """``tokenizer`` is the encoder's and ``decoder_tokenizer`` writes the text that it reads: for "text" only.
        ``chunk_tokens`` (k) is needed where all states are kept side by side."""
        super().__init__()
        if alignment not in ALIGNMENTS or pooling not in POOLINGS:
            raise ValueError(f"alignment {alignment!r}, pooling {pooling!r}")
        if alignment == "text" and (tokenizer is None or decoder_tokenizer is None):
            raise ValueError("alignment 'text' needs both tokenizers")
        if (pooling == "concat" and (alignment != "decoder" or chunk_tokens < 1)) or (
            pooling == "cls" and alignment == "decoder"
        ):
            raise ValueError(f"pooling {pooling!r} with alignment {alignment!r} and chunks of {chunk_tokens} tokens")
        self.encoder = encoder
        self.alignment = alignment
        self.pooling = pooling
        self.width = int(encoder.config.hidden_size) * (chunk_tokens if pooling == "concat" else 1)
        """Numbers of a chunk's vector."""
        self.layers = int(encoder.config.num_hidden_layers) if alignment == "decoder" else 0
        """With "decoder", how many of its layers read the chunks."""
        self._chunk_tokens = chunk_tokens
        self._tokenizer = tokenizer
        self._decoder_tokenizer = decoder_tokenizer

    @property
    def max_chunk_tokens(self) -> int:
        """Longest chunk in the encoder's own tokens."""
        return self._chunk_tokens if self.pooling == "concat" else encoder_positions(self.encoder.config)

    def forward(self, chunks: Sequence[Sequence[int]]) -> Tensor:
        """Vectors of ``chunks`` (the decoder's token ids, at least one each), [len(chunks), width], differentiable.

        All chunks run as one padded batch. Raises InvalidRequestError for an empty chunk, a token outside the
        vocabulary and, but for "text", a chunk that is longer than the encoder takes.
        """
        device = self.encoder.device
        if not chunks:
            return torch.empty(0, self.width, device=device)
        if any(len(chunk) == 0 for chunk in chunks):
            raise InvalidRequestError("token_ids", "a chunk needs at least one token")
        inputs, mask = self._tokenize(chunks) if self.alignment == "text" else self._pad(chunks)
        inputs, mask = inputs.to(device), mask.to(device)
        if self.alignment == "decoder":
            return self._first_layers(inputs, mask)
        hidden = self.encoder(input_ids=inputs, attention_mask=mask).last_hidden_state.float()
        if self.pooling == "cls":
            first: Tensor = hidden[:, 0]
            return first
        return _mean(hidden, mask)

    def _first_layers(self, inputs: Tensor, mask: Tensor) -> Tensor:
        """What the decoder's first layers make of chunks, padded on the right, so causal attention needs no mask."""
        opening = self.encoder.config.bos_token_id
        if opening is not None:
            # a pretrained decoder's first position collects attention without another aim: not one of the chunk's
            inputs = torch.cat([inputs.new_full((len(inputs), 1), opening), inputs], 1)
        hidden = self.encoder(input_ids=inputs, use_cache=False).last_hidden_state.float()[:, opening is not None :]
        hidden = F.rms_norm(hidden, hidden.shape[-1:]) * mask.unsqueeze(-1)
        if self.pooling == "mean":
            return _mean(hidden, mask)
        return F.pad(hidden, (0, 0, 0, self._chunk_tokens - hidden.shape[1])).flatten(1)

    def save(self, path: str | Path) -> None:
        """Write the encoder, with "text" its tokenizer too, to the directory ``path``; nothing of the decoder's own
        layers."""
        if self.alignment == "decoder":
            return
        with no_progress_bar():
            self.encoder.save_pretrained(path)
        if self._tokenizer is not None:
            self._tokenizer.save_pretrained(path)

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        alignment: Alignment,
        pooling: Pooling,
        decoder_tokenizer: PreTrainedTokenizerFast | None = None,
        *,
        device: str | torch.device = "cpu",
    ) -> ChunkEncoder:
        """Load an encoder's directory in float32 and evaluation mode; no network is used.

        ``decoder_tokenizer`` is needed with "text". Raises BundleError for an encoder that does not load, for weights
        that are missing and for NaN or infinity.
        """
        where = Path(path)
        encoder = _load_encoder(where)
        tokenizer = None
        if alignment == "text":
            tokenizer = read_tokenizer(where)
            if tokenizer.pad_token_id is None:
                raise BundleError(f"{where}: the chunk encoder's tokenizer has no padding token")
        made = cls(
            encoder, alignment=alignment, pooling=pooling, tokenizer=tokenizer, decoder_tokenizer=decoder_tokenizer
        )
        return made.eval().to(device)

    @classmethod
    def load(cls, bundle: Bundle, *, device: str | torch.device = "cpu") -> ChunkEncoder:
        """The chunk encoder of a bundle that compresses chunks, as ``from_pretrained``."""
        record = bundle.compression()
        if record.alignment == "decoder":
            made = cls.of_decoder(bundle, record.encoder_layers, record.pooling, bundle.chunk_tokens)
            return made.eval().to(device)
        tokenizer = bundle.load_tokenizer() if record.alignment == "text" else None
        return cls.from_pretrained(bundle.chunk_encoder_dir, record.alignment, record.pooling, tokenizer, device=device)

    @classmethod
    def of_decoder(cls, bundle: Bundle, layers: int, pooling: Pooling, chunk_tokens: int) -> ChunkEncoder:
        """The first ``layers`` layers of the bundle's decoder. Raises BundleError where it has fewer."""
        there = int(read_json(bundle.decoder_dir / "config.json")["num_hidden_layers"])
        if not 0 < layers <= there:
            raise BundleError(f"{bundle.path}: the first {layers} layers of a decoder that has {there}")
        trunk = load_first_layers(bundle, layers)
        return cls(trunk, alignment="decoder", pooling=pooling, chunk_tokens=chunk_tokens)

    @classmethod
    def for_tokens(
        cls,
        vocab_size: int,
        embeddings: Tensor | None,
        width: int = 256,
        layers: int = 2,
        heads: int = 4,
        max_chunk: int = 64,
        pooling: Pooling = "mean",
    ) -> ChunkEncoder:
        """A small BERT over the decoder's vocabulary, without dropout, for chunks of up to ``max_chunk`` tokens.

        ``embeddings`` are the decoder's, [≥ vocab_size, decoder_width]: its word embeddings start from them, reduced
        to ``width`` by their principal components where the decoder is wider; None: random. The rest is random, from
        torch's global generator.
        """
        config = BertConfig(
            vocab_size=vocab_size,
            hidden_size=width,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            intermediate_size=4 * width,
            max_position_embeddings=max_chunk,
            type_vocab_size=1,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
            pad_token_id=0,
        )
        encoder = BertModel(config, add_pooling_layer=False)
        if embeddings is not None:
            with torch.no_grad():
                start = _reduced(embeddings[:vocab_size].detach().float().cpu(), width)
                # of the size that position embeddings start with, so that neither drowns the other
                start *= config.initializer_range / start.std().clamp_min(1e-12)
                encoder.embeddings.word_embeddings.weight[:, : start.shape[1]] = start
        return cls(encoder, alignment="tokens", pooling=pooling)

    def _pad(self, chunks: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
        longest = max(map(len, chunks))
        if longest > self.max_chunk_tokens:
            raise InvalidRequestError(
                "token_ids", f"a chunk of {longest} tokens, where the chunk encoder has {self.max_chunk_tokens}"
            )
        inputs = torch.zeros(len(chunks), longest, dtype=torch.long)
        mask = torch.zeros(len(chunks), longest, dtype=torch.long)
        for row, chunk in enumerate(chunks):
            inputs[row, : len(chunk)] = torch.as_tensor(chunk, dtype=torch.long)
            mask[row, : len(chunk)] = 1
        known = int(self.encoder.config.vocab_size)
        if int(inputs.min()) < 0 or int(inputs.max()) >= known:
            raise InvalidRequestError("token_ids", f"outside the chunk encoder's vocabulary of {known}")
        return inputs, mask

    def _tokenize(self, chunks: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
        assert self._tokenizer is not None and self._decoder_tokenizer is not None
        # markers of the template are no text; a character cut by a chunk's end reads as U+FFFD
        texts = self._decoder_tokenizer.batch_decode([list(chunk) for chunk in chunks], skip_special_tokens=True)
        encoded: Any = self._tokenizer(
            texts, padding=True, truncation=True, max_length=self.max_chunk_tokens, return_tensors="pt"
        )
        inputs, mask = encoded["input_ids"], encoded["attention_mask"]
        if inputs.shape[1] == 0:
            inputs = mask = torch.zeros(len(texts), 1, dtype=torch.long)
        # a chunk of markers alone has no text, and some tokenizers add no token of their own: read as padding
        return inputs.long(), mask.long().scatter(1, torch.zeros(len(texts), 1, dtype=torch.long), 1)


def _mean(hidden: Tensor, mask: Tensor) -> Tensor:
    """Of the states [n, length, width] that ``mask`` [n, length] shows."""
    weights = mask.to(hidden.dtype).unsqueeze(-1)
    pooled: Tensor = (hidden * weights).sum(1) / weights.sum(1)
    return pooled


def _load_encoder(where: Path) -> PreTrainedModel:
    try:
        config = AutoConfig.from_pretrained(where, local_files_only=True, trust_remote_code=False)
        kind = MODEL_MAPPING[type(config)]
        # BERT's own pooling layer is not used; a chunk's vector is pooled here
        pooler = "add_pooling_layer" in inspect.signature(kind.__init__).parameters
    except (OSError, ValueError, KeyError) as error:
        raise BundleError(f"{where}: the chunk encoder does not load: {error}") from error
    options = {"add_pooling_layer": False} if pooler else {}
    model, info = load_weights(AutoModel, where, "the chunk encoder does", dtype=torch.float32, **options)
    if getattr(config, "is_encoder_decoder", False):
        raise BundleError(f"{where}: {type(model).__name__} is no encoder")
    check_none(where, info["missing_keys"])
    check_finite(where, model.named_parameters())
    return model


def _reduced(embeddings: Tensor, width: int) -> Tensor:
    """The principal directions of ``embeddings`` where it has more than ``width``; products change least."""
    if embeddings.shape[1] <= width:
        return embeddings.clone()
    values, vectors = torch.linalg.eigh(embeddings.T.double() @ embeddings.double())
    chosen = vectors[:, values.argsort(descending=True)[:width]]
    reduced: Tensor = (embeddings.double() @ chosen).float()
    return reduced
