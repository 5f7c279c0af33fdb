"""The gateway as the HTTP door calls it."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator
from dataclasses import dataclass
from typing import Annotated

import grpc
from fastapi import Depends, Request

from blockrag.access import OnBehalf
from blockrag.client_calls import open_channel, translated
from blockrag.handles import FindHandle, RemoteService, Rpc
from blockrag.v1 import corpus_pb2, corpus_pb2_grpc, rag_pb2, system_pb2


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
        if authorization:
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
