"""What Serve's own gRPC servers say when a replica dies: not who it was.

Serve turns the error of a dead actor into INTERNAL with its id, process, namespace and address in the text. To a client
that is a fault of the server which will not pass, and more than it should know.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import AsyncIterator, Callable
from contextlib import aclosing
from typing import Any

import grpc

from blockrag.grpc_status import INTERNAL_MESSAGE

LOST = "a replica that worked on this request went away; send it again"
# grpc.aio gives the code back as a number.
_INTERNAL = (grpc.StatusCode.INTERNAL, grpc.StatusCode.INTERNAL.value[0])
_RAY_S_WORDS = ("actor", "replica", "node", "worker", "raylet")

_logger = logging.getLogger(__name__)


class DiscreetHandlers:
    """Makes Serve's handlers, with contexts that keep to themselves what Ray says.

    Takes the place of ``gRPCGenericServer.service_handler_factory``.
    """

    def __init__(self, make: Callable[..., Callable[..., Any]]) -> None:
        self._make = make

    def __call__(self, **options: Any) -> Callable[..., Any]:
        handler = self._make(**options)
        if inspect.isasyncgenfunction(handler):

            async def stream(request: Any, context: Any) -> AsyncIterator[Any]:
                async with aclosing(handler(request, DiscreetContext(context))) as messages:
                    async for message in messages:
                        yield message

            return stream

        async def call(request: Any, context: Any) -> Any:
            return await handler(request, DiscreetContext(context))

        return call


class DiscreetContext:
    """A gRPC context on which an INTERNAL that is not of ours tells nothing of actors and addresses."""

    def __init__(self, context: Any) -> None:
        self._context = context

    def __getattr__(self, name: str) -> Any:
        return getattr(self._context, name)

    def set_details(self, details: str) -> None:
        """Called after ``set_code``, as Serve does."""
        if self._context.code() in _INTERNAL and not details.startswith(INTERNAL_MESSAGE):
            _logger.warning("kept from a client: %s", details)
            if any(word in details.lower() for word in _RAY_S_WORDS):
                self._context.set_code(grpc.StatusCode.UNAVAILABLE)
                details = LOST
            else:
                details = INTERNAL_MESSAGE
        self._context.set_details(details)
