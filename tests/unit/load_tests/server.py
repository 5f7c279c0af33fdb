"""A small RagService for the load test's users: it waits, streams, and fails when told to."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import grpc

from blockrag.v1 import rag_pb2, rag_pb2_grpc


@dataclass
class FakeRag(rag_pb2_grpc.RagServiceServicer):
    """Answers in three pieces. ``target`` is where it listens."""

    delay_s: float = 0.0
    """Time to the first token."""
    fail_every: int = 0
    """Every n-th call is refused as UNAVAILABLE; 0: none."""
    break_off: bool = False
    """End the stream before its completion."""
    target: str = ""
    requests: list[rag_pb2.GenerateRequest] = field(default_factory=list)
    metadata: list[dict[str, str]] = field(default_factory=list)
    peers: set[str] = field(default_factory=set)

    async def Generate(  # type: ignore[override]
        self, request: rag_pb2.GenerateRequest, context: grpc.aio.ServicerContext
    ) -> AsyncIterator[rag_pb2.GenerateResponse]:
        self.requests.append(request)
        self.metadata.append({key: str(value) for key, value in context.invocation_metadata() or ()})
        self.peers.add(context.peer())
        if self.fail_every and len(self.requests) % self.fail_every == 0:
            await context.abort(grpc.StatusCode.UNAVAILABLE, "no decoder")
        yield rag_pb2.GenerateResponse(retrieved=rag_pb2.Retrieved())
        await asyncio.sleep(self.delay_s)
        for word in ("Pico ", "Bolívar", "."):
            yield rag_pb2.GenerateResponse(text=rag_pb2.TextChunk(text=word, tokens=1))
        if not self.break_off:
            completion = rag_pb2.Completion(answer="Pico Bolívar.")
            completion.usage.l1_tokens, completion.usage.prefill_tokens = 30, 12
            yield rag_pb2.GenerateResponse(completion=completion)


@asynccontextmanager
async def serve(rag: FakeRag) -> AsyncIterator[FakeRag]:
    """Serves on a free loopback port."""
    server = grpc.aio.server()
    rag_pb2_grpc.add_RagServiceServicer_to_server(rag, server)
    rag.target = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    await server.start()
    try:
        yield rag
    finally:
        await server.stop(grace=None)
