"""A bundle in this process, planned for and answered by the services' own code, so that what is measured is served.

The compressor's planner chooses, ranks and counts; the decoder's service composes and its engine generates, under the
settings' types and limits. Two things are never served and answered by the same engine all the same: blocks that keep
their own positions, and mixtures that are encoded anew.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch

from blockrag.compressor import assembly as compressing
from blockrag.compressor.compression_request import CompressionAbility
from blockrag.compressor.rating import ChunkRater
from blockrag.configured import configured_keys
from blockrag.decoder import service as decoding
from blockrag.decoder.block_loading import EncodingBlockSource
from blockrag.decoder.engine import Engine
from blockrag.decoder.prompt import PromptPart, compose, read_prompt
from blockrag.decoder.sequence import GenerationRequest, TokenStream
from blockrag.errors import PromptTooLongError
from blockrag.evaluation.drawing import Piece
from blockrag.evaluation.experiment_options import Mode
from blockrag.evaluation.scoring import normalize
from blockrag.gateway.planning import decode_request
from blockrag.modeling.bundle import Bundle
from blockrag.modeling.model import SlotModel
from blockrag.modeling.refrag.compression import ChunkCompressor, mixed_inputs
from blockrag.modeling.rotary import rotate_into
from blockrag.modeling.slots import ResidentBlock, SequenceState, Slots, wide_slots
from blockrag.settings import Settings
from blockrag.v1.common_pb2 import (
    ATTENTION_MODE_BLOCK,
    ATTENTION_MODE_FULL,
    ATTENTION_MODE_NONE,
    AttentionMode,
    Compression,
    Passage,
    RequestContext,
    Sampling,
)
from blockrag.v1.compressor_pb2 import PlanRequest, PlanResponse
from blockrag.v1.decoder_pb2 import DecodeRequest

_SERVED: dict[Mode, AttentionMode] = {
    "full": ATTENTION_MODE_FULL,
    "block": ATTENTION_MODE_BLOCK,
    "no-reencoding": ATTENTION_MODE_BLOCK,
    "none": ATTENTION_MODE_NONE,
}
_CONTEXT = RequestContext(request_id="evaluation", tenant="public")


@dataclass(frozen=True)
class Prompt:
    """A question and the passages shown with it, best first."""

    passages: tuple[Piece, ...]
    question: str
    mode: Mode = "block"
    compression: Compression | None = None
    best_last: bool = False
    """They stand in the prompt in the opposite order, as retrieved ones are served by ``gateway.best_passage``."""
    reencoded: bool = False
    """Each mixed passage is encoded anew as this mixture instead of composed: the exact alternative."""


@dataclass(frozen=True)
class PlannedPrompt:
    """A prompt and what the planner made of it."""

    prompt: Prompt
    plan: PlanResponse

    @property
    def slots(self) -> int:
        """Slots of the passages."""
        return self.plan.prompt_tokens - len(self.plan.instruction_token_ids) - len(self.plan.final_token_ids)

    @property
    def tokens(self) -> int:
        """Tokens of the passages."""
        return sum(len(passage.token_ids) for passage in self.plan.passages)

    @property
    def read(self) -> set[Piece]:
        """The passages that are in the prompt, if only in part."""
        both = zip(self.prompt.passages, self.plan.passages, strict=True)
        return {piece for piece, passage in both if passage.in_prompt}


class Reader:
    """Plans and answers with one bundle; to be closed. Not thread-safe, and not for use inside an event loop."""

    def __init__(
        self,
        bundle: Bundle,
        settings: Settings,
        *,
        device: str = "cpu",
        max_answer_tokens: int = 64,
        rater: ChunkRater | None = None,
        ability: CompressionAbility | None = None,
    ) -> None:
        """``rater`` and ``ability`` as in ``blockrag.compressor.assembly.assemble``."""
        self.bundle = bundle
        self.settings = settings
        self.model = SlotModel.load(bundle, device=device)
        self._compressor = ChunkCompressor.load(bundle, device) if bundle.refrag is not None else None
        source = EncodingBlockSource(self.model, self._compressor)
        self._runtime = decoding.assemble(bundle, self.model, source, settings)
        embeddings = compressing.embedding_cache(source, settings) if self._compressor is not None else None
        self.planner = compressing.assemble(bundle, settings, embeddings, rater=rater, ability=ability)
        self._keys = configured_keys(settings, bundle)
        self._max_answer_tokens = max_answer_tokens
        self._in_place: Engine | None = None
        self._closing = ExitStack()
        self._runner = self._closing.enter_context(asyncio.Runner())
        self._start(self._runtime.engine)

    def __enter__(self) -> Reader:
        return self

    def __exit__(self, *_: object) -> None:
        self._closing.close()

    def plan(self, prompt: Prompt) -> PlannedPrompt:
        """What the compressor makes of a prompt.

        Raises ``PromptTooLongError`` where a passage does not fit the model: serving would leave it out, and another
        prompt would be measured than was asked for. What compression leaves out is what was asked for.
        """
        plan = self._runner.run(self.planner.plan(self.plan_request(prompt)))
        asked = prompt.compression is not None and (self._compressor is None or prompt.compression.auto)
        for passage in plan.passages:
            if not passage.in_prompt and not asked:
                raise PromptTooLongError(f"{len(prompt.passages)} passages do not fit: {passage.dropped_reason}")
        return PlannedPrompt(prompt, plan)

    def plan_request(self, prompt: Prompt) -> PlanRequest:
        """What the gateway would ask of the compressor for given passages."""
        return PlanRequest(
            context=_CONTEXT,
            question=prompt.question,
            passages=[
                Passage(passage_id=str(place), title=piece.title, text=piece.text)
                for place, piece in enumerate(prompt.passages)
            ],
            attention_mode=_SERVED[prompt.mode],
            max_tokens=self._max_answer_tokens,
            compression=prompt.compression,
        )

    def answer(self, planned: Sequence[PlannedPrompt]) -> list[str]:
        """Greedy answers as the decoder streams them, in order; as many at a time as the decoder computes together."""
        return self._runner.run(self._answers(planned))

    def is_refusal(self, answer: str) -> bool:
        """Whether an answer is the template's refusal, but for case and punctuation."""
        return normalize(answer) == normalize(self.bundle.template.refusal)

    def decode_request(self, planned: PlannedPrompt) -> DecodeRequest:
        """What the gateway would ask of the decoder."""
        sampling = Sampling(max_tokens=self._max_answer_tokens)
        request = decode_request(
            planned.plan, sampling, mode=_SERVED[planned.prompt.mode], best_last=planned.prompt.best_last
        )
        request.context.CopyFrom(_CONTEXT)
        return request

    def _start(self, engine: Engine) -> None:
        engine.start()
        self._closing.callback(engine.stop)

    async def _answers(self, planned: Sequence[PlannedPrompt]) -> list[str]:
        places = asyncio.Semaphore(self.settings.decoder.max_sequences)

        async def answer(one: PlannedPrompt) -> str:
            unserved = one.prompt.reencoded or one.prompt.mode == "no-reencoding"
            async with places:
                return await (self._unserved(one) if unserved else self._served(one))

        async with asyncio.TaskGroup() as tasks:
            answers = [tasks.create_task(answer(one)) for one in planned]
        return [task.result() for task in answers]

    async def _served(self, planned: PlannedPrompt) -> str:
        messages = self._runtime.decode(self.decode_request(planned))
        return "".join([message.text async for message in messages])

    async def _unserved(self, planned: PlannedPrompt) -> str:
        chunk_tokens = self.bundle.chunk_tokens if self._compressor is not None else 0
        prompt = read_prompt(self.decode_request(planned), self._keys, self.model.vocab_size, chunk_tokens)
        blocks: list[Slots] = []
        with ExitStack() as held:
            for part in prompt.parts:
                if planned.prompt.reencoded and part.full is not None and part.compressed is not None:
                    blocks.append(self._reencode(part))
                    continue
                loaded = await self._runtime.loader.load(part.requests)
                held.callback(self._runtime.loader.release, loaded)
                blocks += compose([part], loaded, chunk_tokens).blocks
            stream = TokenStream()
            engine = self._runtime.engine if planned.prompt.mode == "block" else self._unrotated()
            engine.submit(GenerationRequest("", tuple(blocks), prompt.token_ids, prompt.sampling), stream.push)
            text = ""
            while (event := await stream.read()).finish is None:
                text += event.text
            return text + event.text

    def _reencode(self, part: PromptPart) -> ResidentBlock:
        assert self._compressor is not None and part.full is not None
        ids = part.full.token_ids.tolist()
        projected = self._compressor.project(self._compressor.embed([ids]))[0]
        inputs = mixed_inputs(self.model, ids, projected, part.expanded, self.bundle.chunk_tokens)
        (block,) = self.model.encode_embeddings([inputs], [ids], ["mixed"])
        return self.model.to_resident(block)

    def _unrotated(self) -> Engine:
        if self._in_place is None:
            model = cast(SlotModel, _InPlace(self.model))
            runtime = decoding.assemble(self.bundle, model, EncodingBlockSource(self.model), self.settings)
            self._in_place = runtime.engine
            self._start(self._in_place)
        return self._in_place


class _InPlace:
    """A model that composes blocks without giving them positions in the prompt."""

    def __init__(self, model: SlotModel) -> None:
        self._model = model
        self.new_sequence = partial(compose_without_reencoding, model)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)


@torch.inference_mode()
def compose_without_reencoding(model: SlotModel, blocks: Sequence[ResidentBlock], capacity: int) -> SequenceState:
    """A slot list whose keys are rotated by their place inside their own block, every block from position 0.

    What Block-Attention calls "without position re-encoding" (arXiv 2409.15355, section 3.3): the blocks' KV is
    concatenated as each block alone would have had it. Only keys of blocks differ from ``SlotModel.new_sequence``:
    what is appended afterwards, the final block and the answer, goes on from the number of slots as it does there.
    """
    slots = sum(block.num_slots for block in blocks)
    state = model.new_sequence([], slots + capacity)
    for block in blocks:
        start, end = state.num_slots, state.num_slots + block.num_slots
        phases, kept = model.rotary.phases([(0, block.num_slots)]), wide_slots(block)
        for layer in range(model.num_layers):
            keys, values = state.layer(layer)
            rotate_into(keys[:, start:end], kept[0, layer], phases[layer])
            values[:, start:end].copy_(kept[1, layer])
        state.advance(block.num_slots)
    return state
