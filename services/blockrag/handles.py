"""The services as they call each other: typed methods over deployment handles, errors translated.

Handles are found when they are first needed, since all applications start at the same time, and kept.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Callable, Coroutine
from contextlib import suppress
from typing import Any, Generic, Protocol, TypeVar

from google.protobuf.empty_pb2 import Empty
from google.protobuf.message import Message

from blockrag.access import OnBehalf
from blockrag.errors import UnavailableError
from blockrag.grpc_status import as_known_error
from blockrag.v1 import compressor_pb2, decoder_pb2, encoder_pb2, kv_cache_pb2, retriever_pb2

FindHandle = Callable[[str], Any]
"""Name of an application → handle of its ingress. Blocking; raises when it is not deployed."""

# Serve's gRPC between replicas instead of actor calls: measured on two busy cores, 2.8 ms instead of 4.2 for a plan,
# 2.3 instead of 4.3 to a stream's first message. Messages hold no object refs (it would pin them for good) and stay
# under its 4 MB: see the limits in validation.py and corpus.py.
_TRANSPORT = {"_by_reference": False}

_ATTEMPTS = 3
"""How often a call that may happen twice is made when replicas go away."""
_FIRST_PAUSE_S = 0.05

_logger = logging.getLogger(__name__)

Request = TypeVar("Request", bound=Message, contravariant=True)
Response = TypeVar("Response", bound=Message, covariant=True)


class RemoteService:
    """One application's ingress."""

    name: str

    def __init__(self, find_handle: FindHandle) -> None:
        self._find_handle = find_handle
        self._handle: Any = None
        self._streams: dict[str, Any] = {}

    async def call(self, method: str, request: Message, attempts: int = 1, **context: Any) -> Any:
        """The answer. ``attempts`` above 1: what a lost replica leaves unanswered is asked of another one, or of the
        one that takes its place; the caller's deadline bounds the wait. For calls that may happen twice."""
        for attempt in range(1, attempts):
            try:
                return await self._call_once(method, request, **context)
            except UnavailableError as error:
                _logger.warning("%s.%s was lost, asking again (%d): %s", self.name, method, attempt, error)
                await asyncio.sleep(_FIRST_PAUSE_S * 4 ** (attempt - 1))
        return await self._call_once(method, request, **context)

    async def stream(self, method: str, request: Message, last: str = "", **context: Any) -> AsyncGenerator[Any, None]:
        """The messages of a stream, whose last one has the field ``last`` where it is named; closing it ends the work
        there."""
        handle = self._handle or await self._connect()
        if method not in self._streams:  # options make a handle anew, so this one is kept
            self._streams[method] = getattr(handle.options(stream=True, **_TRANSPORT), method)
        responses = self._streams[method].remote(request, **context)
        messages = aiter(responses)
        finished = False
        try:
            async for response in messages:
                finished = bool(last) and response.HasField(last)
                if finished:
                    # To the end of the stream, or Serve goes on counting the request as one that its replica has.
                    with suppress(Exception):
                        async for _ in messages:
                            pass
                yield response
            finished = True
        except Exception as error:
            finished = True
            raise self._translated(error) from error
        finally:
            if not finished:
                responses.cancel()

    async def _call_once(self, method: str, request: Message, **context: Any) -> Any:
        handle = self._handle or await self._connect()
        response = getattr(handle, method).remote(request, **context)
        try:
            return await response
        except asyncio.CancelledError:
            response.cancel()
            raise
        except Exception as error:
            raise self._translated(error) from error

    async def _connect(self) -> Any:
        try:
            found = await asyncio.to_thread(self._find_handle, self.name)
        except Exception as error:
            raise UnavailableError(f"{self.name}: not deployed, or still starting") from error
        self._handle = found.options(**_TRANSPORT)
        return self._handle

    def _translated(self, error: Exception) -> Exception:
        return as_known_error(error, self.name) or error


class Call(Protocol[Request, Response]):
    """Calls one RPC; without a request, with an empty one. ``call`` names who was admitted, where it matters."""

    def __call__(
        self, request: Request | None = None, call: OnBehalf | None = None, /
    ) -> Coroutine[Any, Any, Response]: ...


class Rpc(Generic[Request, Response]):
    """A unary method of a remote service, called as its RPC is, in snake case, where no other ``name`` is given."""

    def __init__(
        self, request: type[Request], response: type[Response], *, twice: bool = False, name: str = ""
    ) -> None:
        """``twice``: it may happen more than once, so what a lost replica leaves unanswered is asked again."""
        self._request = request
        self._attempts = _ATTEMPTS if twice else 1
        self._name = name

    def __set_name__(self, owner: type[RemoteService], name: str) -> None:
        self._name = self._name or name.title().replace("_", "")

    def __get__(self, service: RemoteService, owner: type[RemoteService]) -> Call[Request, Response]:
        def call(request: Request | None = None, call: OnBehalf | None = None, /) -> Coroutine[Any, Any, Response]:
            context = {} if call is None else {"grpc_context": call}
            sent = self._request() if request is None else request
            return service.call(self._name, sent, self._attempts, **context)

        return call


class RetrieverClient(RemoteService):
    """The retriever."""

    name = "retriever"
    search = Rpc(retriever_pb2.SearchRequest, retriever_pb2.SearchResponse, twice=True)
    add_passages = Rpc(retriever_pb2.AddPassagesRequest, retriever_pb2.AddPassagesResponse, twice=True)
    commit_document = Rpc(retriever_pb2.CommitDocumentRequest, retriever_pb2.CommitDocumentResponse, twice=True)
    remove_document = Rpc(retriever_pb2.RemoveDocumentRequest, retriever_pb2.RemoveDocumentResponse)
    remove_collection = Rpc(retriever_pb2.RemoveCollectionRequest, retriever_pb2.RemoveCollectionResponse)
    scan_documents = Rpc(retriever_pb2.ScanDocumentsRequest, retriever_pb2.ScanDocumentsResponse, twice=True)
    scan_passages = Rpc(retriever_pb2.ScanPassagesRequest, retriever_pb2.ScanPassagesResponse, twice=True)
    scan_collections = Rpc(retriever_pb2.ScanCollectionsRequest, retriever_pb2.ScanCollectionsResponse, twice=True)
    status = Rpc(
        retriever_pb2.GetRetrieverStatusRequest, retriever_pb2.GetRetrieverStatusResponse, name="GetRetrieverStatus"
    )


class CompressorClient(RemoteService):
    """The compressor. It has no state to report: that it answers is what counts."""

    name = "compressor"
    plan = Rpc(compressor_pb2.PlanRequest, compressor_pb2.PlanResponse, twice=True)
    prepare_question = Rpc(compressor_pb2.PrepareQuestionRequest, compressor_pb2.PrepareQuestionResponse)
    tokenize_passages = Rpc(compressor_pb2.TokenizePassagesRequest, compressor_pb2.TokenizePassagesResponse, twice=True)


class KvCacheClient(RemoteService):
    """The KV cache's own RPCs; blocks themselves are fetched by ``kv_cache.fetching``."""

    name = "kv_cache"
    warm_blocks = Rpc(kv_cache_pb2.WarmBlocksRequest, kv_cache_pb2.WarmBlocksResponse, twice=True)
    purge_documents = Rpc(kv_cache_pb2.PurgeDocumentsRequest, kv_cache_pb2.PurgeDocumentsResponse, twice=True)
    status = Rpc(kv_cache_pb2.GetKvCacheStatusRequest, kv_cache_pb2.GetKvCacheStatusResponse, name="GetKvCacheStatus")


class EncoderClient(RemoteService):
    """The encoder; only its state is asked for."""

    name = "encoder"
    status = Rpc(encoder_pb2.GetEncoderStatusRequest, encoder_pb2.GetEncoderStatusResponse, name="GetEncoderStatus")


class HttpClient(RemoteService):
    """The HTTP door; only whether it answers is asked for."""

    name = "http"
    answer = Rpc(Empty, Empty)


class DecoderClient(RemoteService):
    """The decoder."""

    name = "decoder"
    status = Rpc(decoder_pb2.GetDecoderStatusRequest, decoder_pb2.GetDecoderStatusResponse, name="GetDecoderStatus")

    estimate_prefill = Rpc(decoder_pb2.EstimatePrefillRequest, decoder_pb2.EstimatePrefillResponse, twice=True)

    def decode(self, request: decoder_pb2.DecodeRequest) -> AsyncGenerator[decoder_pb2.DecodeResponse, None]:
        """Streams an answer; closing the stream cancels the work."""
        return self.stream("Decode", request, "finish")
