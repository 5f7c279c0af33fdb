"""``blockrag eval retrieval``: does the retriever find the passages that answer?

All pieces of a file's passages go into the embedded index that serving uses; every question searches it by dense
vectors, by BM25 and by both fused.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from blockrag.bm25 import SparseVector, bm25_of
from blockrag.errors import SetupError
from blockrag.evaluation.drawing import Piece, PieceMaker, holding_pieces
from blockrag.evaluation.experiment import Report, describe_environment, percent, table
from blockrag.evaluation.question_data import SourceQuestion, load_questions
from blockrag.evaluation.scoring import Interval, bootstrap, bootstrap_difference, ndcg, recall, reciprocal_rank
from blockrag.identity import CollectionId, passage_id
from blockrag.modeling.bundle import load_bundle
from blockrag.retriever.edge import EdgeIndex
from blockrag.retriever.embedding import Embedder, embedded, find_embedding
from blockrag.retriever.vector_index import Document, Passage, SearchQuery
from blockrag.settings import RetrieverSettings

Search = Literal["dense", "bm25", "fused"]
SEARCHES: tuple[Search, ...] = ("dense", "bm25", "fused")

_COLLECTION = CollectionId("public", "evaluation")
_DOCUMENT = "all"
_STAGED_AT_ONCE = 256


@dataclass(frozen=True)
class RetrievalOptions:
    """What a run is asked to do."""

    data: Path
    bundle: Path
    """Its tokenizer and template say where passages are split."""
    retriever: RetrieverSettings
    questions: int = 1000
    at: tuple[int, ...] = (1, 5, 10, 20)
    """Numbers of results to score; the largest is how many are asked for."""
    seed: int = 0


@dataclass(frozen=True)
class RetrievalScore:
    """Scores of one kind of search, means over questions."""

    search: Search
    metrics: Mapping[str, Interval]
    """"recall@k": share of the relevant pieces among the first k. "ndcg@k": normalised discounted cumulative gain.
    "mrr": reciprocal rank of the first relevant piece, 0 beyond the largest k."""


@dataclass(frozen=True)
class RetrievalDifference:
    """Paired differences on the same questions: first minus second."""

    first: Search
    second: Search
    metrics: Mapping[str, Interval]


@dataclass(frozen=True, kw_only=True)
class RetrievalReport(Report):
    """A finished run."""

    questions: int
    without_gold: int
    """Questions passed over, because the file names no answer or no gold passage for them."""
    passages: int
    """Passages of the file that were searched."""
    pieces: int
    """Pieces that they were split into."""
    bundle_fingerprint: str
    embedding: str
    candidates: int
    rrf_k: int
    scores: tuple[RetrievalScore, ...]
    differences: tuple[RetrievalDifference, ...]

    def to_markdown(self) -> str:
        """The report as tables."""
        head = [
            f"# {self.data}: retrieval, {self.questions} questions",
            "",
            f"{self.passages} passages in {self.pieces} pieces, embedding {self.embedding}, {self.candidates} "
            f"candidates of each search, RRF constant {self.rrf_k}. Percent with bootstrap 95 % intervals over "
            f"questions (seed {self.seed}), differences paired. {self.without_gold} questions without answer or gold "
            "passage were passed over.",
            "",
            *self.facts(f"passages as bundle `{self.bundle_fingerprint}` splits them"),
        ]
        header = ["metric", *(one.search for one in self.scores)]
        header += [f"{one.first} − {one.second}" for one in self.differences]
        rows = [
            [
                name,
                *(percent(one.metrics[name]) for one in self.scores),
                *(percent(one.metrics[name], sign=True) for one in self.differences),
            ]
            for name in self.scores[0].metrics
        ]
        return "\n".join([*head, *table(header, rows)])


async def evaluate_retrieval(
    options: RetrievalOptions, progress: Callable[[str, int, int], None] = lambda *_: None
) -> RetrievalReport:
    """Index the file's passages and search for every question.

    A piece is relevant when it is of a gold passage and holds an answer; where no piece of the gold passages holds
    one word for word, all of them are. ``progress`` gets what is done, how much of it and of how much. Raises
    ``SetupError`` for bad data and for more results wanted than there are pieces.
    """
    started = time.perf_counter()
    bundle = load_bundle(options.bundle)
    data = load_questions(options.data, options.seed)
    chosen, without_gold = data.first(options.questions)
    maker = PieceMaker(bundle.template, bundle.load_tokenizer(), bundle.passage_tokens)
    searched = data.searched(chosen)
    pieces: list[Piece] = []
    numbers: dict[int, range] = {}
    for passage in searched:
        cut = maker.pieces(data.passages[passage])
        numbers[passage] = range(len(pieces), len(pieces) + len(cut))
        pieces += cut
    relevant = []
    for question in chosen:
        own = [number for passage in question.gold for number in numbers[passage]]
        if not own:
            raise SetupError(f"{data.name}: question {question.id}: the gold passage has no text")
        holding = set(holding_pieces([pieces[number] for number in own], question.answers))
        relevant.append(frozenset(number for number in own if pieces[number] in holding) or frozenset(own))
    if max(options.at) > len(pieces):
        raise SetupError(f"{data.name}: {max(options.at)} results are asked for, and there are {len(pieces)} pieces")
    embedder = Embedder(find_embedding(options.retriever.embedding_model))
    with tempfile.TemporaryDirectory(prefix="blockrag-retrieval-") as folder:
        index = EdgeIndex(Path(folder) / "index", embedder.info)
        try:
            await _fill(index, pieces, embedder, options.retriever.language, progress)
            rankings = await _search(index, chosen, embedder, options, progress)
        finally:
            await index.close()
    values = {search: _values(found, relevant, options.at) for search, found in rankings.items()}
    return RetrievalReport(
        data=data.name,
        sha256=data.sha256,
        questions=len(chosen),
        without_gold=without_gold,
        passages=len(searched),
        pieces=len(pieces),
        bundle_fingerprint=bundle.fingerprint,
        embedding=embedder.files.fingerprint,
        candidates=_candidates(options),
        rrf_k=options.retriever.rrf_k,
        seed=options.seed,
        seconds=round(time.perf_counter() - started, 1),
        scores=tuple(
            RetrievalScore(search, {name: bootstrap(column, options.seed) for name, column in columns.items()})
            for search, columns in values.items()
        ),
        differences=tuple(
            RetrievalDifference(
                "fused",
                other,
                {
                    name: bootstrap_difference(column, values[other][name], options.seed)
                    for name, column in values["fused"].items()
                },
            )
            for other in SEARCHES
            if other != "fused"
        ),
        environment=describe_environment(),
    )


async def _fill(
    index: EdgeIndex,
    pieces: Sequence[Piece],
    embedder: Embedder,
    language: str,
    progress: Callable[[str, int, int], None],
) -> None:
    bm25 = bm25_of(language)
    for start in range(0, len(pieces), _STAGED_AT_ONCE):
        progress("embedding passages", start, len(pieces))
        part = pieces[start : start + _STAGED_AT_ONCE]
        passages = [
            Passage(passage_id(_COLLECTION, _DOCUMENT, "1", number), _DOCUMENT, "1", number, piece.title, piece.text)
            for number, piece in enumerate(part, start)
        ]
        await index.stage(_COLLECTION, embedded(embedder, bm25, passages), language)
    await index.commit(_COLLECTION, Document(_DOCUMENT, "1", _DOCUMENT, len(pieces)))


async def _search(
    index: EdgeIndex,
    questions: Sequence[SourceQuestion],
    embedder: Embedder,
    options: RetrievalOptions,
    progress: Callable[[str, int, int], None],
) -> dict[Search, list[list[int]]]:
    """Numbers of the pieces found, best first, for every kind of search and question."""
    bm25, no_words = bm25_of(options.retriever.language), SparseVector((), ())
    found: dict[Search, list[list[int]]] = {search: [] for search in SEARCHES}
    for done, question in enumerate(questions):
        progress("searching", done, len(questions))
        dense, sparse = embedder.embed_query(question.text), bm25.embed_query(question.text)
        for search in SEARCHES:
            query = SearchQuery(
                dense=None if search == "bm25" else dense,
                sparse=no_words if search == "dense" else sparse,
                limit=max(options.at),
                candidates=_candidates(options),
                rrf_k=options.retriever.rrf_k,
            )
            # A question of stop words only has nothing for BM25 to search with.
            results = await index.search(_COLLECTION, query) if search != "bm25" or sparse.indices else []
            found[search].append([result.passage.ordinal for result in results])
    progress("searching", len(questions), len(questions))
    return found


def _candidates(options: RetrievalOptions) -> int:
    return max(options.retriever.candidates, *options.at)


def _values(
    rankings: Sequence[Sequence[int]], relevant: Sequence[frozenset[int]], at: Sequence[int]
) -> dict[str, NDArray[np.float64]]:
    """Each metric of each question."""
    pairs = list(zip(rankings, relevant, strict=True))
    columns = {f"recall@{k}": [recall(*pair, k) for pair in pairs] for k in at}
    columns["mrr"] = [reciprocal_rank(*pair) for pair in pairs]
    columns |= {f"ndcg@{k}": [ndcg(*pair, k) for pair in pairs] for k in at}
    return {name: np.array(column) for name, column in columns.items()}
