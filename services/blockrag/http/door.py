"""Who may come in over HTTP, and with how much, by the rule that gRPC has, with the same keys; and where they go.

Without keys a system serves its own machine. A browser on that machine would carry any web page's requests here, which
gRPC's port cannot be asked by; so there the request must be for this machine by address and come from no other site.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from dataclasses import dataclass
from ipaddress import ip_address
from typing import Annotated
from urllib.parse import urlsplit

import grpc
from fastapi import Depends
from starlette.requests import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from blockrag.access import Access, OnBehalf
from blockrag.client_calls import open_channel, translated
from blockrag.errors import UnauthenticatedError
from blockrag.handles import FindHandle, RemoteService, Rpc
from blockrag.http.error_objects import error_response, too_large
from blockrag.limits import LOOPBACK_NAMES
from blockrag.settings import Settings
from blockrag.v1 import corpus_pb2, corpus_pb2_grpc, rag_pb2, system_pb2

MAX_JSON_BYTES = 4 * 2**20
"""Largest body that is no form; the gateway's own limits of texts are lower."""
_FORM_BYTES = 65_536
"""What a form may have beside its file."""


class Guard:
    """Stands before the application: admits a request to ``/v1`` before any of its body is read, and bounds the body.

    The admitted call is the request's ``state.call``.
    """

    def __init__(self, app: ASGIApp, door: Door, max_document_bytes: int) -> None:
        self._app = app
        self._door = door
        self._max_document_bytes = max_document_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        is_http = scope["type"] == "http"  # a server's start and end have no path
        if not is_http or not scope["path"].removeprefix(scope.get("root_path", "")).startswith("/v1/"):
            await self._app(scope, receive, send)
            return
        request = Request(scope)
        try:
            request.state.call = self._door.admit(request)
        except UnauthenticatedError as error:
            await error_response(error)(scope, receive, send)
            return
        most = self._max_document_bytes + _FORM_BYTES if is_form(request) else MAX_JSON_BYTES
        declared = request.headers.get("content-length", "")
        if declared.isdigit() and int(declared) > most:
            await error_response(too_large(most))(scope, receive, send)
            return
        received = 0

        async def bounded() -> Message:
            nonlocal received
            message = await receive()
            received += len(message.get("body", b""))
            if received > most:  # sent without saying how much it is
                raise too_large(most)
            return message

        await self._app(scope, bounded, send)


def is_form(request: Request) -> bool:
    """Whether its body is a form, however its type is written."""
    return request.headers.get("content-type", "").lower().startswith("multipart/form-data")


class Door:
    """Admits requests."""

    def __init__(self, settings: Settings) -> None:
        self._access = Access(settings)
        self._keys = settings.gateway.asks_for_keys

    def admit(self, request: Request) -> OnBehalf:
        """Who calls. Raises ``UnauthenticatedError``."""
        if not self._keys:
            _check_site(request.headers.get("host", ""), request.headers.get("origin"))
        caller = self._access.check(None, _Origin(request))
        sent = {"request_id": request.headers.get("x-request-id"), "traceparent": request.headers.get("traceparent")}
        return OnBehalf(caller, tuple((name, value) for name, value in sent.items() if value))


class _Origin:
    """A request as the access policy sees calls."""

    def __init__(self, request: Request) -> None:
        self._request = request

    def invocation_metadata(self) -> Sequence[tuple[str, str | bytes]]:
        return list(self._request.headers.items())

    def peer(self) -> str:
        """As gRPC names a caller. Behind the proxy this is the proxy, which listens where ``cluster.host`` says."""
        client = self._request.client
        if client is None:
            return ""
        return f"ipv6:[{client.host}]:{client.port}" if ":" in client.host else f"ipv4:{client.host}:{client.port}"


def _check_site(host: str, origin: str | None) -> None:
    try:
        name, site = urlsplit(f"//{host}").hostname or "", urlsplit(origin or "").netloc
    except ValueError:  # no closing bracket
        raise UnauthenticatedError("this system has no keys and is asked under no name that can be read") from None
    if name not in LOOPBACK_NAMES and not _is_address(name):
        raise UnauthenticatedError(
            f"this system has no keys and is asked as {name!r}: use its address, or give tenants keys"
        )
    if origin is not None and site != host:
        raise UnauthenticatedError("this system has no keys and answers no other site's pages")


def _is_address(name: str) -> bool:
    try:
        ip_address(name)
    except ValueError:
        return False
    return True


class RemoteGateway(RemoteService):
    """The gateway behind its deployment's handle, and for uploads behind the node's own gRPC port.

    Every method raises errors of ``blockrag.errors``; ``call`` names who was admitted.
    """

    def __init__(self, find_handle: FindHandle, target: str, application: str = "gateway") -> None:
        """``target``: host:port of the gRPC ingress on this node. A handle takes no stream of requests, and a document
        of 64 MiB as one argument would be held whole by both sides and by the object store."""
        super().__init__(find_handle)
        self.name = application
        self._target = target
        self._channel: grpc.aio.Channel | None = None

    retrieve = Rpc(rag_pb2.RetrieveRequest, rag_pb2.RetrieveResponse)
    list_documents = Rpc(corpus_pb2.ListDocumentsRequest, corpus_pb2.ListDocumentsResponse)
    list_collections = Rpc(corpus_pb2.ListCollectionsRequest, corpus_pb2.ListCollectionsResponse)
    delete_document = Rpc(corpus_pb2.DeleteDocumentRequest, corpus_pb2.DeleteDocumentResponse)
    describe = Rpc(system_pb2.DescribeRequest, system_pb2.DescribeResponse)
    trace = Rpc(system_pb2.GetTraceRequest, system_pb2.GetTraceResponse, name="GetTrace")

    def generate(
        self, request: rag_pb2.GenerateRequest, call: OnBehalf
    ) -> AsyncGenerator[rag_pb2.GenerateResponse, None]:
        """Streams an answer; closing the stream stops the work."""
        return self.stream("Generate", request, "completion", grpc_context=call)

    def warm(self, request: corpus_pb2.WarmRequest, call: OnBehalf) -> AsyncGenerator[corpus_pb2.WarmResponse, None]:
        """Encodes passages ahead of time and says how far it is; closing the stream stops the work."""
        return self.stream("Warm", request, grpc_context=call)

    async def ingest(
        self, header: corpus_pb2.DocumentHeader, pieces: AsyncIterator[bytes], authorization: str
    ) -> corpus_pb2.IngestDocumentResponse:
        """Stores a document. ``authorization``: the header that the client sent, which is checked anew."""

        async def requests() -> AsyncIterator[corpus_pb2.IngestDocumentRequest]:
            yield corpus_pb2.IngestDocumentRequest(header=header)
            async for piece in pieces:
                yield corpus_pb2.IngestDocumentRequest(content=piece)

        if self._channel is None:  # made here: a channel belongs to the event loop it is made in
            self._channel = open_channel(self._target, None)
        stub = corpus_pb2_grpc.CorpusServiceStub(self._channel)  # type: ignore[no-untyped-call]
        metadata = [("application", self.name)]
        # No key has other characters: a system without keys takes whatever is sent, and gRPC does not.
        if authorization and authorization.isascii() and authorization.isprintable():
            metadata.append(("authorization", authorization))
        with translated():
            return await stub.IngestDocument(requests(), metadata=metadata)  # type: ignore[no-any-return]


@dataclass(frozen=True)
class _Visit:
    """An admitted request, and whom it asks."""

    gateway: RemoteGateway
    call: OnBehalf


async def _visit(request: Request) -> _Visit:  # FastAPI hands what is not async to another thread, for a millisecond
    return _Visit(request.app.state.gateway, request.state.call)


Visit = Annotated[_Visit, Depends(_visit)]
"""What every path of ``/v1`` is given."""
