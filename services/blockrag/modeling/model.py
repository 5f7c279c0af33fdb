"""A causal language model driven over slots: encode blocks, compose prompts, prefill and decode in ragged batches."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import PreTrainedModel

from blockrag.errors import InvalidRequestError, PromptTooLongError, UnsupportedModelError
from blockrag.modeling.attention.contract import Capture, RaggedBatch, Segment, SlotAttention, segments_of
from blockrag.modeling.attention.over_lists import BATCH, attention_over_lists, register
from blockrag.modeling.bundle import Bundle
from blockrag.modeling.checkpoint import configured_ends, load_stock_model
from blockrag.modeling.linear_layers import fuse_linear_layers, keep_freed_memory, speed_up_linear_layers
from blockrag.modeling.loading import KV_DTYPES
from blockrag.modeling.long_pass import LongPass
from blockrag.modeling.measuring import (
    STEP_TOLERANCE,
    TOLERANCES,
    check_close,
    measure_rotations,
    own_logits,
    probe_of,
    without_rotation,
)
from blockrag.modeling.plain_decoder import UnsuitableError
from blockrag.modeling.rotary import LayerRotaries, Rotation
from blockrag.modeling.served import load_served_model
from blockrag.modeling.slots import ResidentBlock, SequenceState, SlotArena, Slots, resident_block, stored_block
from blockrag.modeling.step import Step
from blockrag.modeling.stock_passes import traced
from blockrag.modeling.support import ModelFacts, inspect_model
from blockrag.types import BlockKV

__all__ = ["SlotModel", "load_stock_model"]

_logger = logging.getLogger(__name__)

_ARENA_SLOTS = 65_536


class SlotModel:
    """A decoder over slot lists. Not thread-safe: one thread computes.

    One set of weights serves every attention mode: ``full`` is a sequence without blocks and all prompt tokens in
    ``forward``; ``block`` a sequence composed of blocks and the final block in ``forward``.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        facts: ModelFacts,
        rotations: Sequence[Rotation],
        *,
        kv_dtype: torch.dtype,
        end_token_ids: Iterable[int],
        unused_token_ids: Iterable[int] = (),
    ) -> None:
        """``model`` already goes through slot attention; use ``load`` or ``from_pretrained_model``."""
        self._model = model
        self._facts = facts
        self.num_layers = facts.shape.num_layers
        self.num_kv_heads = facts.shape.num_kv_heads
        self.head_dim = facts.shape.head_dim
        self.vocab_size = facts.vocab_size
        self._num_parameters = model.num_parameters()
        self.width = int(model.config.hidden_size)
        """Numbers of an input embedding."""
        self.max_positions = facts.max_positions
        """Longest slot list, prompt and answer together."""
        self.end_token_ids = frozenset(end_token_ids)
        """Tokens that end an answer."""
        self.device: torch.device = model.device
        self.compute_dtype: torch.dtype = model.dtype
        self.kv_dtype = kv_dtype
        self.slot_bytes = facts.shape.numbers * kv_dtype.itemsize
        """Bytes of K and V of one slot of a block, over all layers; of int8 without the scales."""
        if self.device.type == "cpu":
            keep_freed_memory()
        self.unused_token_ids = torch.tensor(sorted(unused_token_ids), dtype=torch.long, device=self.device)
        """Ids that the vocabulary has room for and the tokenizer has no text for; never to be sampled."""
        self.rotary = LayerRotaries(rotations, facts.max_positions, self.device)
        """Rotations by position, for whoever composes slots in another way than ``new_sequence``."""
        # attention over slots of bfloat16 is computed in bfloat16: half the memory to read, twice the products' speed
        narrow = torch.bfloat16 in (self.compute_dtype, kv_dtype) or kv_dtype == torch.int8
        self._slot_dtype = torch.bfloat16 if narrow else self.compute_dtype
        self._arena = SlotArena(facts.shape, self._slot_dtype, self.device, _ARENA_SLOTS)
        self._long: LongPass | None = None
        self._step: Step | None = None
        self._trace: list[Tensor] | None = None

    @classmethod
    def load(
        cls,
        bundle: Bundle,
        *,
        device: str | torch.device = "cpu",
        compute_dtype: str | None = None,
        kv_dtype: str | None = None,
        weights: str | None = None,
    ) -> SlotModel:
        """Load a bundle's decoder.

        ``compute_dtype`` is "float32" or "bfloat16", ``kv_dtype`` one of these or "int8"; None takes the bundle's,
        which its fingerprint counts. ``weights``, by default the bundle's, is one of ``bundle.WEIGHTS``; "none" is for
        who only encodes. Raises BundleError for damaged weights and UnsupportedModelError for a model that cannot be
        driven, or not so.
        """
        served = load_served_model(bundle, device=device, compute_dtype=compute_dtype)
        stock = served.model
        tokenizer = bundle.load_tokenizer()
        ends = {*tokenizer(bundle.template.end, add_special_tokens=False)["input_ids"], *configured_ends(stock)}
        model = cls.from_pretrained_model(
            stock,
            kv_dtype=kv_dtype or bundle.kv_dtype,
            end_token_ids=ends,
            unused_token_ids=set(range(bundle.vocab_size)).difference(tokenizer.get_vocab().values()),
        )
        wanted = weights or bundle.weights
        if wanted != "none":
            model.quantise_steps(required=wanted == "int8", packed=served.packed)
        return model

    @classmethod
    def from_pretrained_model(
        cls,
        model: PreTrainedModel,
        *,
        kv_dtype: str = "float32",
        end_token_ids: Iterable[int] | None = None,
        unused_token_ids: Iterable[int] = (),
        attention: SlotAttention = attention_over_lists,
    ) -> SlotModel:
        """Take ``model`` over: its rotary modules and attention are replaced, so keep a copy to compare with.

        Raises UnsupportedModelError when the model's structure does not allow it, or when eight tokens computed over
        slots, at its first positions or its last, differ from the model's own logits.
        """
        model.train(False)
        model.requires_grad_(False)
        facts = inspect_model(model)
        if kv_dtype not in KV_DTYPES:
            raise ValueError(f"kv_dtype {kv_dtype!r}: must be one of {', '.join(KV_DTYPES)}")
        ends = configured_ends(model) if end_token_ids is None else end_token_ids
        probe = probe_of(facts)
        rotations = measure_rotations(model, facts)
        firsts = (0, facts.max_positions - len(probe))
        expected = [own_logits(model, probe, first) for first in firsts]
        model.set_attn_implementation(register(attention))
        without_rotation(model)
        fuse_linear_layers(model.model.layers)
        speed_up_linear_layers(model)
        slot_model = cls(
            model,
            facts,
            rotations,
            kv_dtype=KV_DTYPES[kv_dtype],
            end_token_ids=ends,
            unused_token_ids=unused_token_ids,
        )
        slot_model._check(probe, firsts, expected, "over slots")
        if attention is attention_over_lists:
            try:
                slot_model._long = LongPass(model, facts, rotations)
                slot_model._check(probe, firsts, expected, "in compiled passes")
            except UnsuitableError as error:
                _logger.info("blocks and long prefills are computed by the model's own modules: %s", error)
        return slot_model

    def quantise_steps(self, *, required: bool = False, packed: Mapping[str, Tensor] | None = None) -> bool:
        """Compute decode steps and questions' prefills in one compiled call, with a copy of the weights in eight bits.

        ``packed`` has those that are made already. False, and the reason in the log, where the processor or the model
        is not for it: all is computed with the whole weights then, as blocks and long prefills always are. Raises
        UnsupportedModelError there if it is ``required``, and where the step's logits differ from the model's.
        """
        try:
            step = Step(self._model, self._facts, self.rotary.rotations, packed, self._slot_dtype)
        except UnsuitableError as error:
            if required:
                raise UnsupportedModelError(f"no weights in eight bits for {self._facts.name}: {error}") from error
            _logger.info("steps are computed with the whole weights: %s", error)
            return False
        probe = probe_of(self._facts)
        expected = self._probed(probe)
        self._step = step
        check_close(self._facts.name, self._probed(probe), expected, STEP_TOLERANCE, "in eight bits")
        return True

    @property
    def weights(self) -> str:
        """What steps are computed with: "int8", or "none" where nothing is quantised."""
        return "none" if self._step is None else "int8"

    @contextmanager
    def traced(self) -> Iterator[list[Tensor]]:
        """Hidden states after each layer, [tokens, width] each, of the forward pass inside, whatever computes it."""
        with traced(self.layers) as trace:
            self._trace = trace
            try:
                yield trace
            finally:
                self._trace = None

    @property
    def layers(self) -> nn.ModuleList:
        """The model's decoder layers, for looking at hidden states."""
        layers: nn.ModuleList = self._model.model.layers
        return layers

    @torch.inference_mode()
    def encode(self, blocks: Sequence[Sequence[int]], keys: Sequence[str]) -> list[BlockKV]:
        """Encode blocks in one ragged forward pass; each attends causally inside itself only.

        ``keys[i]`` names block i. Raises InvalidRequestError for an empty block or a token outside the vocabulary,
        PromptTooLongError for a block longer than the model's positions.
        """
        if len(blocks) != len(keys):
            raise ValueError(f"{len(blocks)} blocks and {len(keys)} keys")
        if not blocks:
            return []
        token_ids = [self._checked(block) for block in blocks]
        return self._encode({"input_ids": self._as_input(token_ids)}, [len(ids) for ids in token_ids], token_ids, keys)

    @torch.inference_mode()
    def encode_embeddings(
        self, inputs: Sequence[Tensor], token_ids: Sequence[Sequence[int]], keys: Sequence[str]
    ) -> list[BlockKV]:
        """Encode blocks that are given as input embeddings [m, width], one slot each, in one ragged forward pass.

        ``token_ids[i]`` are the tokens that block i stands for, of any number. Compressed blocks come from projected
        chunk embeddings; ``compression.mixed_inputs`` makes blocks of chunks and tokens. Raises InvalidRequestError for
        an empty block, another width, NaN or infinity, PromptTooLongError as ``encode``.
        """
        if not len(inputs) == len(token_ids) == len(keys):
            raise ValueError(f"{len(inputs)} inputs, {len(token_ids)} blocks and {len(keys)} keys")
        if not inputs:
            return []
        checked = [self._checked(block) for block in token_ids]
        for rows in inputs:
            if rows.ndim != 2 or rows.shape[0] == 0 or rows.shape[1] != self.width:
                raise InvalidRequestError("embeddings", f"{list(rows.shape)} where [slots, {self.width}] is needed")
            if not bool(torch.isfinite(rows).all()):
                raise InvalidRequestError("embeddings", "NaN or infinity in an input embedding")
        rows = torch.cat([rows.to(self.device, self.compute_dtype) for rows in inputs])
        return self._encode({"inputs_embeds": rows.unsqueeze(0)}, [len(rows) for rows in inputs], checked, keys)

    @torch.inference_mode()
    def embed_tokens(self, token_ids: Sequence[int]) -> Tensor:
        """Input embeddings of tokens, [n, width]. Raises InvalidRequestError as ``encode``."""
        embedded: Tensor = self._model.get_input_embeddings()(self._as_input([self._checked(token_ids)]))[0]
        return embedded

    @torch.inference_mode()
    def to_resident(self, block: BlockKV) -> ResidentBlock:
        """Copy a block to the device. Raises DataError when its shape or type is not this model's."""
        return resident_block(block, self._facts.shape, self.kv_dtype, self.device)

    @torch.inference_mode()
    def new_sequence(self, blocks: Sequence[Slots], capacity: int, *, first_position: int = 0) -> SequenceState:
        """Compose a slot list from blocks and slices of blocks: slot i stands at position ``first_position`` + i.

        ``capacity`` further slots are reserved for what ``forward`` appends; prompts begin at position 0. Raises
        PromptTooLongError when the whole does not fit the model's positions.
        """
        if capacity < 0 or first_position < 0:
            raise ValueError(f"capacity {capacity}, position {first_position}: must not be negative")
        self._check_length(first_position + sum(block.num_slots for block in blocks) + capacity)
        return SequenceState(self._arena, blocks, capacity, self.rotary, first_position)

    @torch.inference_mode()
    def forward(self, work: Sequence[tuple[SequenceState, Sequence[int]]], *, every_token: bool = False) -> Tensor:
        """Append each item's tokens to its sequence; logits of each item's last token, float32 [len(work), vocab].

        With ``every_token`` of all tokens, one item's behind the other's, [tokens, vocab].

        Pieces of prefills and single decode steps mix in one ragged batch: linear layers run over all tokens
        together, attention per sequence. Nothing is changed when an item is refused: InvalidRequestError for no
        token or one outside the vocabulary, ValueError for a sequence that is full, released or named twice.
        """
        token_ids = [self._checked(tokens) for _, tokens in work]
        if len({id(state) for state, _ in work}) != len(work):
            raise ValueError("a sequence stands twice in one forward pass")
        for (state, _), ids in zip(work, token_ids, strict=True):
            if state.released:
                raise ValueError("the sequence was released")
            if len(ids) > state.free_slots:
                raise ValueError(
                    f"{len(ids)} tokens do not fit: {state.num_slots} of the sequence's {state.capacity} slots are used"
                )
        if not work:
            return torch.empty(0, self.vocab_size)
        segments = segments_of([(state, len(ids)) for (state, _), ids in zip(work, token_ids, strict=True)])
        logits = self._run({"input_ids": self._as_input(token_ids)}, segments, None, every_token)
        for (state, _), ids in zip(work, token_ids, strict=True):
            state.advance(len(ids))
        return logits

    def multiply_adds(self, work: Sequence[tuple[SequenceState, int]]) -> int:
        """About how many multiplications ``forward`` makes for so many tokens of each sequence."""
        heads_width = int(self._model.config.num_attention_heads) * self.head_dim
        return sum(
            tokens * (self._num_parameters + 2 * self.num_layers * heads_width * state.num_slots)
            for state, tokens in work
        )

    def _encode(
        self,
        inputs: Mapping[str, Tensor],
        lengths: Sequence[int],
        token_ids: Sequence[NDArray[np.int64]],
        keys: Sequence[str],
    ) -> list[BlockKV]:
        for length in lengths:
            self._check_length(length)
        shape = (self.num_layers, self.num_kv_heads, sum(lengths), self.head_dim)
        narrow = self.kv_dtype == torch.int8
        options: dict[str, Any] = {"dtype": self.compute_dtype if narrow else self.kv_dtype, "device": self.device}
        capture = Capture(keys=torch.empty(shape, **options), values=torch.empty(shape, **options))
        segments = segments_of([(None, length) for length in lengths])
        self._run(inputs, segments, capture)
        captured_keys, captured_values = capture.keys.cpu(), capture.values.cpu()
        encoded = []
        for segment, ids, key in zip(segments, token_ids, keys, strict=True):
            span = slice(segment.start, segment.start + segment.length)
            parts = (captured_keys[:, :, span], captured_values[:, :, span])
            encoded.append(stored_block(key, ids, *parts, self.kv_dtype))
        return encoded

    def _run(
        self,
        inputs: Mapping[str, Tensor],
        segments: tuple[Segment, ...],
        capture: Capture | None,
        every_token: bool = False,
    ) -> Tensor:
        spans = [(segment.first_position, segment.first_position + segment.length) for segment in segments]
        batch = RaggedBatch(
            segments=segments,
            rotations=self.rotary.rotations,
            phases=tuple(phases.unsqueeze(1) for phases in self.rotary.phases(spans)),
            last_layer=self.num_layers if every_token else self.num_layers - 1,
            capture=capture,
        )
        if self._step is not None and capture is None and not every_token:
            stepped = self._step(inputs["input_ids"], batch, self._trace)
            if stepped is not None:
                return stepped
        last = torch.tensor([segment.start + segment.length - 1 for segment in segments], device=self.device)
        if self._long is not None and self._trace is None:
            ids = inputs.get("input_ids")
            rows = inputs["inputs_embeds"] if ids is None else self._model.get_input_embeddings()(ids)
            hidden = self._long(rows[0], batch)
            if hidden is not None:
                head = self._model.get_output_embeddings()
                return hidden if capture is not None else head(hidden if every_token else hidden[last]).float()
        positions = torch.cat([torch.arange(first, end, device=self.device) for first, end in spans])
        options = {**inputs, "position_ids": positions.unsqueeze(0), "use_cache": False}
        told = BATCH.set(batch)
        try:
            if capture is not None:
                self._model.model(**options)
                return torch.empty(0)
            logits: Tensor = self._model(**options, logits_to_keep=0 if every_token else last).logits[0]
            return logits.float()
        finally:
            BATCH.reset(told)

    def _as_input(self, token_ids: Sequence[NDArray[np.int64]]) -> Tensor:
        return torch.from_numpy(np.concatenate(token_ids)).to(self.device).unsqueeze(0)

    def _checked(self, tokens: Sequence[int]) -> NDArray[np.int64]:
        ids = np.asarray(tokens, dtype=np.int64)
        if ids.ndim != 1 or ids.size == 0:
            raise InvalidRequestError("token_ids", "a block needs at least one token")
        if int(ids.min()) < 0 or int(ids.max()) >= self.vocab_size:
            raise InvalidRequestError("token_ids", f"outside the vocabulary of {self.vocab_size} tokens")
        return ids

    def _check_length(self, slots: int) -> None:
        if slots > self.max_positions:
            raise PromptTooLongError(f"{slots} positions, where the model has {self.max_positions}")

    def _check(self, probe: list[int], firsts: Sequence[int], expected: Sequence[Tensor], how: str) -> None:
        for first, logits in zip(firsts, expected, strict=True):
            got, limit = self._probed(probe, first), TOLERANCES[self._slot_dtype]
            check_close(self._facts.name, got, logits, limit, f"{how} from position {first} on")

    def _probed(self, probe: list[int], first_position: int = 0) -> Tensor:
        state = self.new_sequence([], len(probe), first_position=first_position)
        got = self.forward([(state, probe)])[0]
        state.release()
        return got
