"""The gateway as the HTTP door calls it: the protocol that the door is built on, and the one that runs in a cluster."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing
from typing import Protocol

import grpc

from blockrag.access import OnBehalf
from blockrag.client_calls import translated
from blockrag.gateway.remote import FindHandle, RemoteService
from blockrag.v1 import corpus_pb2, corpus_pb2_grpc, rag_pb2, system_pb2


class Gateway(Protocol):
    """What the door needs. Every method raises errors of ``blockrag.errors``; ``call`` names who was admitted."""

    def generate(
        self, request: rag_pb2.GenerateRequest, call: OnBehalf
    ) -> AsyncGenerator[rag_pb2.GenerateResponse, None]:
        """Streams an answer; closing the stream stops the work."""
        ...

    async def retrieve(self, request: rag_pb2.RetrieveRequest, call: OnBehalf) -> rag_pb2.RetrieveResponse:
        """Searches without answering."""
        ...

    async def ingest(
        self, header: corpus_pb2.DocumentHeader, pieces: AsyncIterator[bytes], authorization: str
    ) -> corpus_pb2.IngestDocumentResponse:
        """Stores a document. ``authorization``: the header that the client sent, which is checked anew."""
        ...

    async def list_documents(
        self, request: corpus_pb2.ListDocumentsRequest, call: OnBehalf
    ) -> corpus_pb2.ListDocumentsResponse:
        """Pages through a collection."""
        ...

    async def list_collections(self, call: OnBehalf) -> corpus_pb2.ListCollectionsResponse:
        """Names the tenant's collections."""
        ...

    async def delete_document(
        self, request: corpus_pb2.DeleteDocumentRequest, call: OnBehalf
    ) -> corpus_pb2.DeleteDocumentResponse:
        """Removes a document, its passages and their KV."""
        ...

    def warm(self, request: corpus_pb2.WarmRequest, call: OnBehalf) -> AsyncGenerator[corpus_pb2.WarmResponse, None]:
        """Encodes passages ahead of time and says how far it is; closing the stream stops the work."""
        ...

    async def describe(self, call: OnBehalf) -> system_pb2.DescribeResponse:
        """The bundle, the limits and every service's state."""
        ...

    async def trace(self, trace_id: str, call: OnBehalf) -> system_pb2.GetTraceResponse:
        """The spans of one request."""
        ...


class RemoteGateway(RemoteService):
    """The gateway behind its deployment's handle, and for uploads behind the node's own gRPC port."""

    def __init__(self, find_handle: FindHandle, target: str, application: str = "gateway") -> None:
        """``target``: host:port of the gRPC ingress on this node. A handle takes no stream of requests, and a document
        of 64 MiB as one argument would be held whole by both sides and by the object store."""
        super().__init__(find_handle)
        self.name = application
        self._target = target
        self._channel: grpc.aio.Channel | None = None

    async def generate(
        self, request: rag_pb2.GenerateRequest, call: OnBehalf
    ) -> AsyncGenerator[rag_pb2.GenerateResponse, None]:
        """Streams an answer."""
        async with aclosing(self._stream("Generate", request, "completion", grpc_context=call)) as events:
            async for event in events:
                yield event

    async def retrieve(self, request: rag_pb2.RetrieveRequest, call: OnBehalf) -> rag_pb2.RetrieveResponse:
        """Searches without answering."""
        return await self._call("Retrieve", request, grpc_context=call)  # type: ignore[no-any-return]

    async def ingest(
        self, header: corpus_pb2.DocumentHeader, pieces: AsyncIterator[bytes], authorization: str
    ) -> corpus_pb2.IngestDocumentResponse:
        """Stores a document."""

        async def requests() -> AsyncIterator[corpus_pb2.IngestDocumentRequest]:
            yield corpus_pb2.IngestDocumentRequest(header=header)
            async for piece in pieces:
                yield corpus_pb2.IngestDocumentRequest(content=piece)

        if self._channel is None:  # made here: a channel belongs to the event loop it is made in
            self._channel = grpc.aio.insecure_channel(self._target)
        stub = corpus_pb2_grpc.CorpusServiceStub(self._channel)  # type: ignore[no-untyped-call]
        metadata = [("application", self.name)]
        if authorization:
            metadata.append(("authorization", authorization))
        with translated():
            return await stub.IngestDocument(requests(), metadata=metadata)  # type: ignore[no-any-return]

    async def list_documents(
        self, request: corpus_pb2.ListDocumentsRequest, call: OnBehalf
    ) -> corpus_pb2.ListDocumentsResponse:
        """Pages through a collection."""
        return await self._call("ListDocuments", request, grpc_context=call)  # type: ignore[no-any-return]

    async def list_collections(self, call: OnBehalf) -> corpus_pb2.ListCollectionsResponse:
        """Names the tenant's collections."""
        request = corpus_pb2.ListCollectionsRequest()
        return await self._call("ListCollections", request, grpc_context=call)  # type: ignore[no-any-return]

    async def delete_document(
        self, request: corpus_pb2.DeleteDocumentRequest, call: OnBehalf
    ) -> corpus_pb2.DeleteDocumentResponse:
        """Removes a document."""
        return await self._call("DeleteDocument", request, grpc_context=call)  # type: ignore[no-any-return]

    async def warm(
        self, request: corpus_pb2.WarmRequest, call: OnBehalf
    ) -> AsyncGenerator[corpus_pb2.WarmResponse, None]:
        """Encodes passages ahead of time."""
        async with aclosing(self._stream("Warm", request, grpc_context=call)) as steps:
            async for step in steps:
                yield step

    async def describe(self, call: OnBehalf) -> system_pb2.DescribeResponse:
        """The running system."""
        return await self._call("Describe", system_pb2.DescribeRequest(), grpc_context=call)  # type: ignore[no-any-return]

    async def trace(self, trace_id: str, call: OnBehalf) -> system_pb2.GetTraceResponse:
        """The spans of one request."""
        request = system_pb2.GetTraceRequest(trace_id=trace_id)
        return await self._call("GetTrace", request, grpc_context=call)  # type: ignore[no-any-return]
