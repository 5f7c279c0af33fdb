"""What the tests of plans share: passages, a planner, requests for it, and how plans are counted."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from blockrag.compressor.compression_request import CompressionAbility
from blockrag.compressor.mixing import Mixer
from blockrag.compressor.plans import Planner
from blockrag.compressor.tokenizing import PassageDrafts, PassageTokenizer
from blockrag.compressor.ttft import TtftEstimator
from blockrag.decoder.detokenizer import detokenizer_factory
from blockrag.encoder.forms import FormEncoder
from blockrag.keys import KeyMaker
from blockrag.kv_cache.shard_messages import FetchedBlock, Tier, WarmOutcome
from blockrag.modeling.bundle import Bundle
from blockrag.modeling.model import SlotModel
from blockrag.modeling.refrag.compression import ChunkCompressor
from blockrag.types import FULL, BlockForm, BlockRequest
from blockrag.v1.common_pb2 import (
    ATTENTION_MODE_BLOCK,
    Compression,
    Passage,
    RequestContext,
)
from blockrag.v1.compressor_pb2 import PlanRequest, PlanResponse
from blockrag.v1.decoder_pb2 import EstimatePrefillRequest, EstimatePrefillResponse

CHUNK = 4
TEXTS = [
    "the capital of the country is the largest city of the land",
    "it was founded in the year when there was",
    "Übergröße – naïve café, 1,234.5 and \U0001f600 signs",
    "x",
]


class Encoding:
    """The cache and the encoder in one."""

    def __init__(self, bundle: Bundle) -> None:
        self._encoder = FormEncoder(SlotModel.load(bundle), ChunkCompressor.load(bundle))
        self.fetched: list[BlockRequest] = []

    async def fetch(self, requests: Sequence[BlockRequest]) -> list[FetchedBlock]:
        self.fetched += requests
        return [FetchedBlock(block, "encoded") for block in self._encoder.encode(requests)]

    async def locate(self, keys: Sequence[str]) -> list[Tier]:
        return ["encoded"] * len(keys)


class Decoder:
    """Says what prompts take, and that the blocks of passages are where it is told, by their place; else in its L1."""

    def __init__(self, **said: Any) -> None:
        self.said = EstimatePrefillResponse(base_ms=10.0, slot_ms=0.5, measured_prefills=9)
        self.said.MergeFrom(EstimatePrefillResponse(**said))
        self.passages: dict[int, str] = {}
        self.before: list[str] = ["l1"]
        """Of the instruction block and of turns."""
        self.forms = 1
        self.asked: list[EstimatePrefillRequest] = []
        self.warmed: list[BlockRequest] = []
        self.error: Exception | None = None
        """Of warming."""

    async def estimate(self, request: EstimatePrefillRequest) -> EstimatePrefillResponse:
        self.asked.append(request)
        answer = EstimatePrefillResponse()
        answer.CopyFrom(self.said)
        passages = (len(request.blocks) - len(self.before)) // self.forms
        assert len(request.blocks) == len(self.before) + passages * self.forms
        answer.tiers.extend(self.before)
        answer.tiers.extend(self.passages.get(place, "l1") for place in range(passages) for _ in range(self.forms))
        return answer

    async def warm(self, blocks: Sequence[BlockRequest], pin: bool) -> WarmOutcome:
        if self.error is not None:
            raise self.error
        assert not pin
        self.warmed += blocks
        return WarmOutcome()


def make_estimator(bundle: Bundle, decoder: Decoder) -> TtftEstimator:
    if bundle.refrag is None:
        return TtftEstimator(decoder.estimate, decoder, KeyMaker(bundle.fingerprint, b"secret"), [FULL])
    decoder.forms = 2
    keys = KeyMaker(bundle.fingerprint, b"secret", bundle.compression_fingerprint)
    return TtftEstimator(decoder.estimate, decoder, keys, [FULL, BlockForm("compressed", CHUNK)])


def make_planner(bundle: Bundle, mixer: Mixer | None, decoder: Decoder | None = None) -> Planner:
    tokenizer = bundle.load_tokenizer()
    drafts = PassageDrafts(detokenizer_factory(tokenizer, ""), bundle.chunk_tokens)
    return Planner(
        PassageTokenizer(tokenizer, bundle.template),
        bundle.max_context_tokens,
        CompressionAbility.of(bundle),
        drafts,
        mixer,
        None if decoder is None else make_estimator(bundle, decoder),
    )


def request(compression: Compression | None = None, **fields: object) -> PlanRequest:
    values = {"attention_mode": ATTENTION_MODE_BLOCK, "max_tokens": 8, "collection": "c", **fields}
    return PlanRequest(
        context=RequestContext(tenant="t", traceparent="trace"),
        question="when was the largest city founded",
        passages=[
            Passage(passage_id=f"p{place}", document_id=f"d{place}", title="title", text=text)
            for place, text in enumerate(TEXTS)
        ],
        compression=compression,
        **values,  # type: ignore[arg-type]
    )


def slots(plan: PlanResponse) -> int:
    return plan.prompt_tokens - len(plan.instruction_token_ids) - len(plan.final_token_ids)


def tokens(plan: PlanResponse) -> int:
    return sum(len(passage.token_ids) for passage in plan.passages if passage.in_prompt)


def forms(plan: PlanResponse) -> list[list[int]]:
    return [[chunk.form for chunk in passage.chunks] for passage in plan.passages]
