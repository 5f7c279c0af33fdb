"""The one table that turns errors into gRPC status."""

from __future__ import annotations

import grpc

from blockrag.errors import (
    BlockragError,
    DataError,
    DeadlineError,
    InvalidRequestError,
    NotFoundError,
    OverloadedError,
    PromptTooLongError,
    SetupError,
    UnauthenticatedError,
    UnavailableError,
)

_STATUS: tuple[tuple[type[BlockragError], grpc.StatusCode], ...] = (
    (InvalidRequestError, grpc.StatusCode.INVALID_ARGUMENT),
    (PromptTooLongError, grpc.StatusCode.INVALID_ARGUMENT),
    (NotFoundError, grpc.StatusCode.NOT_FOUND),
    (UnauthenticatedError, grpc.StatusCode.UNAUTHENTICATED),
    (OverloadedError, grpc.StatusCode.RESOURCE_EXHAUSTED),
    (DeadlineError, grpc.StatusCode.DEADLINE_EXCEEDED),
    (UnavailableError, grpc.StatusCode.UNAVAILABLE),
    (DataError, grpc.StatusCode.DATA_LOSS),
    (SetupError, grpc.StatusCode.FAILED_PRECONDITION),
)


def status_code(error: BlockragError) -> grpc.StatusCode:
    """The gRPC status of an error; INTERNAL for a kind the table does not know."""
    for kind, code in _STATUS:
        if isinstance(error, kind):
            return code
    return grpc.StatusCode.INTERNAL
