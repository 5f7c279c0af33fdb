"""What evaluation scores is what is served: its plans and answers against the gateway, the compressor and the decoder,
put together in this process as their deployments put them together."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from blockrag.compressor import assembly as compressing
from blockrag.compressor.compression_request import CompressionAbility
from blockrag.compressor.plans import Planner
from blockrag.compressor.tokenizing import PassageDrafts, PassageTokenizer
from blockrag.decoder import service as decoding
from blockrag.decoder.block_loading import EncodingBlockSource
from blockrag.decoder.detokenizer import detokenizer_factory
from blockrag.evaluation.compression_run import Asking
from blockrag.evaluation.compression_scores import COMPRESSED, UNCOMPRESSED, Cell
from blockrag.evaluation.compression_selectors import ORACLE, RULES, Selectors
from blockrag.evaluation.drawing import DrawnQuestion, Piece
from blockrag.evaluation.question_data import SourceQuestion
from blockrag.evaluation.reader import PlannedPrompt, Reader
from blockrag.gateway import validation
from blockrag.gateway.answering import Answering, Deadline, Timings
from blockrag.gateway.planning import NearPlanner
from blockrag.modeling.bundle import Bundle, load_bundle
from blockrag.modeling.model import SlotModel
from blockrag.modeling.refrag.compression import ChunkCompressor
from blockrag.settings import GatewaySettings, Settings
from blockrag.training.refrag.policy_reader import PolicyReader
from blockrag.v1.common_pb2 import Compression, Passage
from blockrag.v1.compressor_pb2 import (
    PassagePlan,
    PlanRequest,
    PlanResponse,
    PrepareQuestionRequest,
    PrepareQuestionResponse,
)
from blockrag.v1.rag_pb2 import Citation, Completion, GenerateRequest
from tests.models import make_tiny_bundle
from tests.refrag_bundles import make_refrag_bundle
from tests.unit.gateway.fakes import FakeSearcher
from tests.unit.gateway.questions import collected, request_span

CHUNK = 4
TOKENS = 6
SETTINGS = Settings()
POLICIES = ("query", "blind", "retrieval")
RATES = (1.3, 2.0, 3.0)
PIECES = tuple(
    Piece(title, text)
    for title, text in (
        ("land", "the capital of the country is the largest city of the land"),
        ("town", "it was founded in the year 1203, when there was a bridge"),
        ("sea", "Übergröße – naïve café, 1,234.5 signs"),
        ("hill", "x"),
        ("river", "the largest river of the land, and of the country"),
    )
)
CELLS = [Cell(UNCOMPRESSED, 1.0), *(Cell(*one) for one in itertools.product(POLICIES, RATES)), Cell(COMPRESSED, CHUNK)]
COUNTS = (1, 3, 5)


class Compressor:
    """The compressor's deployment without Ray."""

    def __init__(self, planner: Planner) -> None:
        self.planner = planner
        self.plans: list[PlanResponse] = []

    async def plan(self, request: PlanRequest) -> PlanResponse:
        self.plans.append(await self.planner.plan(request))
        return self.plans[-1]

    async def prepare_question(self, request: PrepareQuestionRequest) -> PrepareQuestionResponse:
        await self.planner.prepare(request.question)
        return PrepareQuestionResponse()


@pytest.fixture(scope="module", params=["float32", "bfloat16"])
def bundle(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    folder: Path = tmp_path_factory.mktemp("path")
    plain = load_bundle(make_tiny_bundle(folder / "plain"))
    made = make_refrag_bundle(plain, folder / "bundle", width=16, chunk_tokens=CHUNK, decoder_width=32)
    return load_bundle(made.path, compute_dtype=request.param, kv_dtype="bfloat16")


@pytest.fixture(scope="module")
def scored(bundle: Bundle) -> Iterator[dict[tuple[Cell, int], tuple[PlannedPrompt, str]]]:
    """What evaluation plans and scores."""
    selectors = Selectors.load(bundle)
    ability = selectors.ability(bundle.name, CHUNK)
    found = {}
    with Reader(bundle, SETTINGS, max_answer_tokens=TOKENS, rater=selectors, ability=ability) as reader:
        for count in COUNTS:
            asking = Asking(reader, selectors, PolicyReader.load(bundle), count)
            planned = asking.plan(0, question(), CELLS)
            for cell, one, text in zip(CELLS, planned, reader.answer(planned), strict=True):
                found[cell, count] = one, text
        rules = [Cell(name, 2.0) for name in (*RULES, ORACLE)]
        plans = Asking(reader, selectors, PolicyReader.load(bundle), 5).plan(0, question(), rules)
        budget = sum(len(passage.token_ids) for passage in plans[0].plan.passages) // 2
        assert all(budget - CHUNK < one.slots <= budget for one in plans), "rules are held to the policies' budget"
    yield found


def question() -> DrawnQuestion:
    source = SourceQuestion("0", "when was the largest city of the country founded", ("1203",), (0,), ())
    return DrawnQuestion(source, PIECES[1], True, (PIECES[0], *PIECES[2:]), (), 0.0)


async def test_the_plan_that_is_scored_is_the_plan_that_is_served_and_so_is_the_answer(
    bundle: Bundle, scored: dict[tuple[Cell, int], tuple[PlannedPrompt, str]]
) -> None:
    """Row A9, and every other rule: policies choose in serving as they were evaluated, token for token."""
    ability = CompressionAbility.of(bundle)
    model = SlotModel.load(bundle)
    source = EncodingBlockSource(model, ChunkCompressor.load(bundle))
    embeddings = compressing.embedding_cache(source, SETTINGS)
    compressor = Compressor(compressing.assemble(bundle, SETTINGS, embeddings))
    decoder = decoding.assemble(bundle, model, source, SETTINGS)
    tokenizer = bundle.load_tokenizer()
    passages = PassageTokenizer(tokenizer, bundle.template)
    drafts = PassageDrafts(detokenizer_factory(tokenizer, ""), CHUNK)
    near = NearPlanner(Planner(passages, bundle.max_context_tokens, ability, drafts), compressor)
    searcher = FakeSearcher()
    answering = Answering(searcher, near, decoder, bundle.fingerprint, bundle.name)
    decoder.engine.start()
    try:
        for (cell, count), (planned, text) in scored.items():
            compression = None
            if cell.selector != UNCOMPRESSED:
                policy = "" if cell.selector == COMPRESSED else cell.selector
                compression = Compression(rate=cell.rate, policy=policy)
            searcher.passages = [
                Passage(passage_id=str(place), title=piece.title, text=piece.text)
                for place, piece in enumerate(planned.prompt.passages)
            ]
            request = GenerateRequest(
                question=planned.prompt.question, top_k=count, max_tokens=TOKENS, compression=compression
            )
            done = await served(answering, request, ability)
            where = f"{cell}, {count} passages"
            assert [forms(one) for one in done.citations] == [forms(one) for one in planned.plan.passages], where
            assert done.usage.prompt_tokens == planned.plan.prompt_tokens, where
            assert done.answer == text, where
            if cell.selector in ("query", "blind"):
                made = compressor.plans[-1]
                for plan in (made, planned.plan):
                    plan.policy_ms = 0.0
                    for passage in plan.passages:
                        passage.passage_id = ""
                assert made == planned.plan, where
    finally:
        decoder.engine.stop()
    assert compressor.plans, "the policies were asked"


def forms(described: Citation | PassagePlan) -> list[tuple[int, int, int]]:
    return [(chunk.start_token, chunk.end_token, chunk.form) for chunk in described.chunks]


async def served(answering: Answering, request: GenerateRequest, ability: CompressionAbility) -> Completion:
    asked = validation.check_generate(request, GatewaySettings(), ability)
    with request_span() as current:
        events = answering.answer(asked, current, Timings(time.perf_counter()), Deadline(60_000))
        return (await collected(events))[-1].completion


def test_policies_differ_from_each_other(scored: dict[tuple[Cell, int], tuple[PlannedPrompt, str]]) -> None:
    """Or the comparison would hold nothing."""
    chosen = {str(scored[Cell(policy, 2.0), 5][0].plan.passages) for policy in POLICIES}
    assert len(chosen) == len(POLICIES)
    assert len({text for _, text in scored.values()}) > 3
