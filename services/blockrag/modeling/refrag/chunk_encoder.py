"""The chunk encoder: a Hugging Face encoder that turns each chunk of a block into one vector.

Each chunk is encoded alone and without the question, so its vector is the same in every prompt and is computed once.
Chunks are cut on the decoder's tokens, and there are two ways to read them ("alignment"): ``tokens``, an encoder over
the decoder's own vocabulary reads the token ids as they are; ``text``, any encoder reads the chunk's text through its
own tokenizer.

Source: REFRAG (arXiv 2509.01092, section 2), which leaves the pooling unspecified.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
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
from blockrag.modeling.loading import check_finite, check_missing, no_load_report, no_progress_bar
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
    ) -> None:
        """``tokenizer`` is the encoder's and ``decoder_tokenizer`` writes the text that it reads: for "text" only."""
        super().__init__()
        if alignment not in ALIGNMENTS or pooling not in POOLINGS:
            raise ValueError(f"alignment {alignment!r}, pooling {pooling!r}")
        if alignment == "text" and (tokenizer is None or decoder_tokenizer is None):
            raise ValueError("alignment 'text' needs both tokenizers")
        self.encoder = encoder
        self.alignment = alignment
        self.pooling = pooling
        self.width = int(encoder.config.hidden_size)
        """Numbers of a chunk's vector."""
        self._tokenizer = tokenizer
        self._decoder_tokenizer = decoder_tokenizer

    @property
    def vocab_size(self) -> int:
        """Token ids that the encoder has embeddings for; with "tokens", those of chunks must be below."""
        return int(self.encoder.config.vocab_size)

    @property
    def max_chunk_tokens(self) -> int:
        """Longest chunk in the encoder's own tokens."""
        return encoder_positions(self.encoder.config)

    @property
    def trainable(self) -> bool:
        """Whether gradients reach the encoder's weights; may be set."""
        return any(parameter.requires_grad for parameter in self.encoder.parameters())

    @trainable.setter
    def trainable(self, wanted: bool) -> None:
        self.encoder.requires_grad_(wanted)

    def forward(self, chunks: Sequence[Sequence[int]]) -> Tensor:
        """Vectors of ``chunks`` (the decoder's token ids, at least one each), [len(chunks), width], differentiable.

        All chunks run as one padded batch. Raises InvalidRequestError for an empty chunk, a token outside the
        vocabulary and, with "tokens", a chunk that is longer than the encoder's positions.
        """
        device = self.encoder.device
        if not chunks:
            return torch.empty(0, self.width, device=device)
        if any(len(chunk) == 0 for chunk in chunks):
            raise InvalidRequestError("token_ids", "a chunk needs at least one token")
        if self.alignment == "tokens":
            inputs, mask = self._pad(chunks)
        else:
            inputs, mask = self._tokenize(chunks)
        inputs, mask = inputs.to(device), mask.to(device)
        hidden = self.encoder(input_ids=inputs, attention_mask=mask).last_hidden_state.float()
        if self.pooling == "cls":
            first: Tensor = hidden[:, 0]
            return first
        weights = mask.to(hidden.dtype).unsqueeze(-1)
        pooled: Tensor = (hidden * weights).sum(1) / weights.sum(1)
        return pooled

    def save(self, path: str | Path, *, dtype: torch.dtype = torch.float32) -> None:
        """Write the encoder in ``dtype``, with "text" its tokenizer too, to the directory ``path``."""
        encoder = self.encoder if self.encoder.dtype == dtype else copy.deepcopy(self.encoder).to(dtype)
        with no_progress_bar():
            encoder.save_pretrained(path)
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
            try:
                tokenizer = PreTrainedTokenizerFast.from_pretrained(where, local_files_only=True)
            except Exception as error:  # the tokenizers library raises bare Exception
                raise BundleError(f"{where}: the chunk encoder's tokenizer does not load: {error}") from error
            if tokenizer.pad_token_id is None:
                raise BundleError(f"{where}: the chunk encoder's tokenizer has no padding token")
        made = cls(
            encoder, alignment=alignment, pooling=pooling, tokenizer=tokenizer, decoder_tokenizer=decoder_tokenizer
        )
        return made.eval().to(device)

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
        if int(inputs.min()) < 0 or int(inputs.max()) >= self.vocab_size:
            raise InvalidRequestError("token_ids", f"outside the chunk encoder's vocabulary of {self.vocab_size}")
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


def _load_encoder(where: Path) -> PreTrainedModel:
    try:
        config = AutoConfig.from_pretrained(where, local_files_only=True, trust_remote_code=False)
        kind = MODEL_MAPPING[type(config)]
        # BERT's own pooling layer is not used; a chunk's vector is pooled here
        pooler = "add_pooling_layer" in inspect.signature(kind.__init__).parameters
        with no_progress_bar(), no_load_report():
            model, info = AutoModel.from_pretrained(
                where,
                dtype=torch.float32,
                local_files_only=True,
                trust_remote_code=False,
                output_loading_info=True,
                **({"add_pooling_layer": False} if pooler else {}),
            )
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise BundleError(f"{where}: the chunk encoder does not load: {error}") from error
    if getattr(config, "is_encoder_decoder", False):
        raise BundleError(f"{where}: {type(model).__name__} is no encoder")
    check_missing(where, info["missing_keys"])
    check_finite(where, model.named_parameters())
    loaded: PreTrainedModel = model
    return loaded


def _reduced(embeddings: Tensor, width: int) -> Tensor:
    """The principal directions of ``embeddings`` where it has more than ``width``; products change least."""
    if embeddings.shape[1] <= width:
        return embeddings.clone()
    values, vectors = torch.linalg.eigh(embeddings.T.double() @ embeddings.double())
    chosen = vectors[:, values.argsort(descending=True)[:width]]
    reduced: Tensor = (embeddings.double() @ chosen).float()
    return reduced
