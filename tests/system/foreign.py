"""What one tenant can learn of another: pairs of requests that name what is another's, and what nobody has.

Both must be answered alike, on every method of every gRPC service and every route over HTTP; a method that asks for
nothing by name is asked before and after the other tenant did something. ``python -m tests.system.foreign`` starts a
system of its own, tries 1,000 pairs and compares the times too.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import re
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import grpc
import httpx
from google.protobuf.json_format import MessageToDict
from google.protobuf.message import Message

from blockrag.client import BlockragClient
from blockrag.local import LocalSystem
from blockrag.settings import GatewaySettings, KvCacheSettings, Settings
from blockrag.tenants import TenantSettings
from blockrag.v1 import (
    common_pb2,
    compressor_pb2,
    corpus_pb2,
    decoder_pb2,
    encoder_pb2,
    kv_cache_pb2,
    rag_pb2,
    retriever_pb2,
    system_pb2,
)
from tests.system.faults import fault_settings
from tests.system.rpcs import Outcome, Rpc, all_rpcs, call

KEYS = {name: f"{name}-key-0123456789abcdef" for name in ("alice", "mallory")}
WORDS = "The merger with Quokka Zinc closes in October."
MARKS = ("quokka", "zinc", "alice")
"""What must not be in anything that is said to mallory, who never says it."""
_VOLATILE = re.compile(
    "(?i)request_?id|trace_?id|milliseconds|_ms$|stages|seed|^version$|^text$|^tokens$|completion|reason"
)


@dataclass(frozen=True)
class Names:
    """What a request names."""

    collection: str
    document: str
    source: str
    trace_id: str
    tokens: tuple[int, ...]
    """Of a block."""


def _context() -> common_pb2.RequestContext:
    return common_pb2.RequestContext(request_id=str(uuid.uuid4()), tenant="mallory")


def _passage(names: Names) -> common_pb2.Passage:
    return common_pb2.Passage(document_id=names.document, document_version="v1", text="Harmless words.", title="t")


def _block(names: Names) -> common_pb2.PromptBlock:
    # Of mallory's own: what it names would be hers by then.
    return common_pb2.PromptBlock(token_ids=names.tokens, collection="own", document_id="own.txt")


def _ingest(names: Names) -> list[Message]:
    header = corpus_pb2.DocumentHeader(
        collection=names.collection, document_id=names.document, media_type="text/plain", dry_run=True
    )
    return [
        corpus_pb2.IngestDocumentRequest(header=header),
        corpus_pb2.IngestDocumentRequest(content=b"Harmless words."),
    ]


def _stored(make: Callable[..., Message], names: Names, **more: Any) -> list[Message]:
    return [make(context=_context(), collection=names.collection, **more)]


def _documents(names: Names) -> list[kv_cache_pb2.DocumentRef]:
    return [kv_cache_pb2.DocumentRef(collection=names.collection, document_id=names.document)]


_SAMPLING = common_pb2.Sampling(max_tokens=1)
_QUESTION = "What closes in October?"
CASES: dict[str, Callable[[Names], Sequence[Message]]] = {
    "CompressorService/Plan": lambda n: [
        compressor_pb2.PlanRequest(context=_context(), question=_QUESTION, passages=[_passage(n)], max_tokens=4)
    ],
    "CompressorService/PrepareQuestion": lambda n: [
        compressor_pb2.PrepareQuestionRequest(context=_context(), question=_QUESTION)
    ],
    "CompressorService/TokenizePassages": lambda n: [
        compressor_pb2.TokenizePassagesRequest(context=_context(), passages=[_passage(n)])
    ],
    "CorpusService/DeleteCollection": lambda n: [corpus_pb2.DeleteCollectionRequest(collection=n.collection)],
    "CorpusService/DeleteDocument": lambda n: [
        corpus_pb2.DeleteDocumentRequest(collection=n.collection, document_id=n.document)
    ],
    "CorpusService/DeleteSource": lambda n: [corpus_pb2.DeleteSourceRequest(collection=n.collection, source=n.source)],
    "CorpusService/IngestDocument": _ingest,
    "CorpusService/ListCollections": lambda n: [corpus_pb2.ListCollectionsRequest()],
    "CorpusService/ListDocuments": lambda n: [
        corpus_pb2.ListDocumentsRequest(collection=n.collection, document_ids=[n.document])
    ],
    "CorpusService/Warm": lambda n: [corpus_pb2.WarmRequest(collection=n.collection, document_ids=[n.document])],
    "DecoderService/Decode": lambda n: [
        decoder_pb2.DecodeRequest(
            context=_context(), blocks=[_block(n)], final_token_ids=n.tokens[:3], attention_mode=1, sampling=_SAMPLING
        )
    ],
    "DecoderService/EstimatePrefill": lambda n: [
        decoder_pb2.EstimatePrefillRequest(context=_context(), blocks=[_block(n)])
    ],
    "DecoderService/GetDecoderStatus": lambda n: [decoder_pb2.GetDecoderStatusRequest()],
    "EncoderService/EncodeBlocks": lambda n: [
        encoder_pb2.EncodeBlocksRequest(context=_context(), blocks=[encoder_pb2.TokenBlock(token_ids=n.tokens)])
    ],
    "EncoderService/GetEncoderStatus": lambda n: [encoder_pb2.GetEncoderStatusRequest()],
    "KvCacheService/GetKvCacheStatus": lambda n: [kv_cache_pb2.GetKvCacheStatusRequest()],
    "KvCacheService/PurgeDocuments": lambda n: [
        kv_cache_pb2.PurgeDocumentsRequest(context=_context(), documents=_documents(n))
    ],
    "KvCacheService/SetPins": lambda n: [
        kv_cache_pb2.SetPinsRequest(context=_context(), documents=_documents(n), pinned=False)
    ],
    "KvCacheService/WarmBlocks": lambda n: [kv_cache_pb2.WarmBlocksRequest(context=_context(), blocks=[_block(n)])],
    "RagService/Generate": lambda n: [
        rag_pb2.GenerateRequest(question=_QUESTION, collection=n.collection, max_tokens=1)
    ],
    "RagService/Retrieve": lambda n: [rag_pb2.RetrieveRequest(query=_QUESTION, collection=n.collection)],
    "RetrieverService/AddPassages": lambda n: _stored(retriever_pb2.AddPassagesRequest, n, passages=[_passage(n)]),
    "RetrieverService/CommitDocument": lambda n: _stored(
        retriever_pb2.CommitDocumentRequest, n, document_id=n.document, version="v1", passages=1
    ),
    "RetrieverService/GetRetrieverStatus": lambda n: [retriever_pb2.GetRetrieverStatusRequest()],
    "RetrieverService/RemoveCollection": lambda n: _stored(retriever_pb2.RemoveCollectionRequest, n),
    "RetrieverService/RemoveDocument": lambda n: _stored(
        retriever_pb2.RemoveDocumentRequest, n, document_id=n.document
    ),
    "RetrieverService/ScanCollections": lambda n: [retriever_pb2.ScanCollectionsRequest(context=_context())],
    "RetrieverService/ScanDocuments": lambda n: _stored(
        retriever_pb2.ScanDocumentsRequest, n, document_ids=[n.document]
    ),
    "RetrieverService/ScanPassages": lambda n: _stored(retriever_pb2.ScanPassagesRequest, n, document_ids=[n.document]),
    "RetrieverService/Search": lambda n: _stored(retriever_pb2.SearchRequest, n, query=_QUESTION, top_k=3),
    "SystemService/Describe": lambda n: [system_pb2.DescribeRequest()],
    "SystemService/GetTrace": lambda n: [system_pb2.GetTraceRequest(trace_id=n.trace_id)],
}
"""By service and method, what is asked."""
NAMELESS = tuple(
    name for name in CASES if name.endswith(("Status", "/Describe", "/ListCollections", "/ScanCollections"))
)
"""Those that ask for everything that the caller may see."""
_FLUSHED_S = 3.0
"""After so long what was stored is on the disk, and what mallory takes of it stays as it is."""
_REMOVE = "RetrieverService/RemoveCollection"


def _form(collection: str, document: str) -> dict[str, Any]:
    options = {"collection": collection, "document_id": document}
    return {"files": {"file": (document, b"", "text/plain")}, "data": {"blockrag": json.dumps(options)}}


def _chat(names: Names) -> dict[str, Any]:
    messages = [{"role": "user", "content": _QUESTION}]
    return {"json": {"model": f"blockrag/{names.collection}", "messages": messages, "max_tokens": 1}}


HTTP_CASES: dict[tuple[str, str], Callable[[Names], dict[str, Any]]] = {
    ("POST", "/v1/chat/completions"): _chat,
    ("POST", "/v1/responses"): lambda n: {"json": {"model": f"blockrag/{n.collection}", "input": _QUESTION}},
    ("GET", "/v1/models"): lambda n: {},
    ("POST", "/v1/vector_stores/{collection}/search"): lambda n: {"json": {"query": _QUESTION}},
    ("POST", "/v1/files"): lambda n: _form(n.collection, n.document),
    ("GET", "/v1/files"): lambda n: {},
    ("GET", "/v1/files/{file_id}"): lambda n: {},
    ("DELETE", "/v1/files/{file_id}"): lambda n: {},
    ("POST", "/v1/vector_stores/{collection}/files"): lambda n: {"json": {"file_id": f"{n.collection}/{n.document}"}},
    ("GET", "/v1/vector_stores/{collection}/files"): lambda n: {},
    ("GET", "/v1/vector_stores/{collection}/files/{file_id}"): lambda n: {},
    ("DELETE", "/v1/vector_stores/{collection}/files/{file_id}"): lambda n: {},
    ("GET", "/v1/blockrag/system"): lambda n: {},
    ("GET", "/v1/blockrag/traces/{trace_id}"): lambda n: {},
    ("POST", "/v1/blockrag/warm"): lambda n: {
        "json": {"collection": n.collection, "file_ids": [f"{n.collection}/{n.document}"]}
    },
}
"""By method and path of the OpenAPI schema, what is sent."""
UNGUARDED_PATHS = frozenset({("GET", "/")})
"""What is served to everybody and holds nothing of anybody."""


@dataclass
class Report:
    """What the pairs told."""

    pairs: int = 0
    leaks: list[str] = field(default_factory=list)
    seconds: dict[str, tuple[list[float], list[float]]] = field(default_factory=dict)
    """Of what is another's, and of what nobody has."""

    def compare(self, what: str, theirs: tuple[str, str], nobodys: tuple[str, str]) -> None:
        """Status and what was said, once for each."""
        self.pairs += 1
        if theirs != nobodys:
            self.leaks.append(f"{what}: {theirs} is not {nobodys}"[:1500])
        for status, said in (theirs, nobodys):
            if any(mark in said.lower() for mark in MARKS):
                self.leaks.append(f"{what} says what is another's: {status} {said}"[:1500])

    def auc(self) -> dict[str, float]:
        """By method, how well times tell what is another's: 0.5 not at all, 1 always."""
        return {what: max(score := _auc(*both), 1 - score) for what, both in self.seconds.items()}


class Trial:
    """Alice has something, mallory asks."""

    def __init__(self, system: LocalSystem, seed: int) -> None:
        self._system = system
        self._draw = random.Random(seed)
        base_url = system.http_url.removesuffix("/v1")
        self._http = httpx.AsyncClient(base_url=base_url, timeout=60, trust_env=False)
        self._alice = BlockragClient(system.target, api_key=KEYS["alice"])
        self._theirs: Names | None = None
        self.report = Report()

    async def run(self, rounds: int, http_rounds: int, timing_rounds: int) -> Report:
        """Each method and route so many times."""
        async with self._alice, self._http, grpc.aio.insecure_channel(self._system.target) as channel:
            await self._prepare()
            for number in range(rounds):
                for rpc in all_rpcs():
                    await self._pair(channel, rpc, number)
            routes = await self._routes()
            for number in range(http_rounds):
                for method, path in routes:
                    await self._http_pair(method, path, number)
            for name in ("RagService/Retrieve", "CorpusService/ListDocuments", "SystemService/GetTrace"):
                await self._time(channel, name, timing_rounds)
            await self._is_as_it_was()
        return self.report

    async def _prepare(self) -> None:
        self._collection, self._document = "quarterly-plans", "october.txt"
        await self._alice.ingest_text(self._document, WORDS, collection=self._collection)
        answer = await self._alice.ask(_QUESTION, collection=self._collection, max_tokens=2, timeout_s=60)
        async for _ in self._alice.warm(collection=self._collection):
            pass
        tokens = tuple(self._draw.randrange(10, 200) for _ in range(24))
        self._theirs = Names(self._collection, self._document, self._document, answer.completion.trace_id, tokens)
        mallory = BlockragClient(self._system.target, api_key=KEYS["mallory"])
        async with mallory:
            await mallory.ingest_text("own.txt", "Nothing but harmless words.", collection="own")
        await asyncio.sleep(_FLUSHED_S)

    async def _warmed(self, channel: grpc.aio.Channel) -> Names:
        """Alice's names with a block that is in her cache, and that mallory has not named before."""
        assert self._theirs is not None
        names = replace(self._theirs, tokens=tuple(self._draw.randrange(10, 200) for _ in self._theirs.tokens))
        warm = kv_cache_pb2.WarmBlocksRequest(context=common_pb2.RequestContext(tenant="alice"), blocks=[_block(names)])
        rpc = _rpc("KvCacheService/WarmBlocks")
        done = await call(channel, rpc, warm.SerializeToString(), metadata=_key("alice"))
        if done.code is not grpc.StatusCode.OK:
            raise RuntimeError(done.details)
        return names

    def _nobodys(self) -> Names:
        """Names that nobody has, as long as alice's and made of the same letters."""
        assert self._theirs is not None
        letters = "".join(self._draw.sample("abcdefghijklmnopqrstuvwxyz", 9))
        tokens = tuple(self._draw.randrange(10, 200) for _ in self._theirs.tokens)
        return Names(
            f"{letters}-plans", f"{letters[:7]}.txt", f"{letters[:7]}.txt", self._draw.randbytes(16).hex(), tokens
        )

    async def _pair(self, channel: grpc.aio.Channel, rpc: Rpc, number: int) -> None:
        assert self._theirs is not None
        name = f"{rpc.service}/{rpc.method}"
        case = CASES[name]
        nobodys = self._nobodys()
        named = await self._warmed(channel) if rpc.method in ("WarmBlocks", "Decode") else self._theirs
        outcomes = []
        first, second = (named, nobodys) if number % 2 else (nobodys, named)
        for names in (first, second):
            if name in NAMELESS and names is second:
                await self._alice_acts(number)
            outcome = await _ask(channel, rpc, case(names))
            outcomes.append((outcome.code.name, _said(rpc, outcome, names)))
            if rpc.method == "AddPassages":  # what it made in mallory's own name
                await _ask(
                    channel,
                    _rpc("RetrieverService/RemoveCollection"),
                    CASES["RetrieverService/RemoveCollection"](names),
                )
        theirs, nobody = outcomes if first is named else reversed(outcomes)
        self.report.compare(name, theirs, nobody)
        if "context" in rpc.request.DESCRIPTOR.fields_by_name:  # in alice's name, with mallory's key
            for tenant in ("alice", "nobody"):
                asked = case(self._theirs)
                asked[0].context.tenant = tenant  # type: ignore[attr-defined]
                outcome = await _ask(channel, rpc, asked)
                if outcome.code is not grpc.StatusCode.INVALID_ARGUMENT:
                    self.report.leaks.append(f"{name} is answered in another's name: {outcome}"[:500])

    async def _http_pair(self, method: str, path: str, number: int) -> None:
        assert self._theirs is not None
        if (method, path) in UNGUARDED_PATHS:
            return
        case = HTTP_CASES[(method, path)]
        nobodys = self._nobodys()
        outcomes = []
        for place, names in enumerate((self._theirs, nobodys)):
            if "{" not in path and not case(names) and place:
                await self._alice_acts(number)
            filled = path.replace("{collection}", names.collection)
            filled = filled.replace("{file_id}", f"{names.collection}/{names.document}")
            filled = filled.replace("{trace_id}", names.trace_id)
            headers = {"Authorization": f"Bearer {KEYS['mallory']}"}
            answer = await self._http.request(method, filled, headers=headers, **case(names))
            outcomes.append((str(answer.status_code), _without(answer.text, names)))
        self.report.compare(f"{method} {path}", *outcomes)

    async def _routes(self) -> list[tuple[str, str]]:
        answer = await self._http.get("/openapi.json")
        return [(method.upper(), path) for path, methods in answer.json()["paths"].items() for method in methods]

    async def _alice_acts(self, number: int) -> None:
        await self._alice.ingest_text(f"more-{number}", f"{WORDS} {number}", collection=f"more-{number % 3}")
        await self._alice.ask(_QUESTION, collection=f"more-{number % 3}", max_tokens=1, timeout_s=60)

    async def _time(self, channel: grpc.aio.Channel, name: str, rounds: int) -> None:
        assert self._theirs is not None
        rpc, (theirs, nobody) = _rpc(name), self.report.seconds.setdefault(name, ([], []))
        for _ in range(rounds):
            pair = [(theirs, self._theirs), (nobody, self._nobodys())]
            self._draw.shuffle(pair)
            for seconds, names in pair:
                asked = CASES[name](names)
                started = time.perf_counter()
                await _ask(channel, rpc, asked)
                seconds.append(time.perf_counter() - started)

    async def _is_as_it_was(self) -> None:
        """Nothing that mallory did has touched what alice has."""
        found = await self._alice.retrieve(_QUESTION, collection=self._collection)
        if [passage.document_id for passage in found] != [self._document]:
            self.report.leaks.append(f"alice finds {found}")


async def _ask(channel: grpc.aio.Channel, rpc: Rpc, messages: Sequence[Message]) -> Outcome:
    return await call(
        channel, rpc, *(each.SerializeToString() for each in messages), metadata=_key("mallory"), timeout_s=60
    )


def _rpc(name: str) -> Rpc:
    return next(each for each in all_rpcs() if f"{each.service}/{each.method}" == name)


def _key(tenant: str) -> list[tuple[str, str | bytes]]:
    return [("authorization", f"Bearer {KEYS[tenant]}")]


def _said(rpc: Rpc, outcome: Outcome, names: Names) -> str:
    """What an outcome says, but for what differs from call to call and the names that the caller said itself."""
    messages = [
        MessageToDict(rpc.response.FromString(each), preserving_proto_field_name=True) for each in outcome.messages
    ]
    steady = [_steady(message) for message in messages]
    if rpc.method in ("TokenizePassages", "Plan", "EncodeBlocks"):  # of what was sent along with it
        steady = [sorted(message) for message in messages]
    return _without(outcome.details + json.dumps(steady, sort_keys=True), names)


def _steady(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _steady(item) for key, item in value.items() if not _VOLATILE.search(key)}
    return [_steady(item) for item in value] if isinstance(value, list) else value


def _without(text: str, names: Names) -> str:
    for place, name in enumerate((names.collection, names.document, names.trace_id)):
        text = text.replace(name, f"<{place}>")
    text = re.sub(r"(resp|chatcmpl|msg|rs)[-_][0-9a-f]+", "<id>", text)
    return re.sub(r'"(created|created_at|completed_at|milliseconds)": ?[\d.e-]+', "<time>", text)


def _auc(ones: Sequence[float], others: Sequence[float]) -> float:
    """The chance that one of ``ones`` is larger than one of ``others``."""
    larger = sum((one > other) + 0.5 * (one == other) for one in ones for other in others)
    return larger / (len(ones) * len(others))


def two_tenants(state_dir: Path, bundle: str) -> Settings:
    """A system with keys for alice and mallory."""
    tenants = tuple(TenantSettings(name=name, api_key=key) for name, key in KEYS.items())
    settings = fault_settings(state_dir, bundle)
    return settings.model_copy(
        update={
            "gateway": GatewaySettings(tenants=tenants),
            "kv_cache": KvCacheSettings(budget_mb=128, secret="of this system alone"),
        }
    )


@contextmanager
def tenants_system(bundle: str) -> Iterator[LocalSystem]:
    """A system of ``two_tenants``, started for the body."""
    with (
        tempfile.TemporaryDirectory() as folder,
        LocalSystem.start(two_tenants(Path(folder) / "state", bundle), owned=True) as system,
    ):
        yield system


def main() -> None:
    """The long form."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=29, help="of all methods over gRPC")
    parser.add_argument("--http-rounds", type=int, default=10, help="of all routes")
    parser.add_argument("--timing-rounds", type=int, default=400)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--bundle", default="", help="empty: the reader that ships")
    options = parser.parse_args()
    with tenants_system(options.bundle) as system:
        trial = Trial(system, options.seed)
        report = asyncio.run(trial.run(options.rounds, options.http_rounds, options.timing_rounds))
    for leak in report.leaks[:40]:
        print("LEAK", leak)
    print(json.dumps({"pairs": report.pairs, "leaks": len(report.leaks), "auc": report.auc()}))


if __name__ == "__main__":
    main()
