"""The one table that turns errors into gRPC status, and a status that a client sees into an error again."""

from __future__ import annotations

import re

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
from blockrag.limits import RETRY_AFTER_MS

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

_FIELD = re.compile(r"^([a-z_]+(?:\[\d+\])?(?:\.[a-z_]+(?:\[\d+\])?)*): (.*)$", re.DOTALL)
_RETRY = re.compile(r"^(.*); retry in (\d+) ms$", re.DOTALL)
# What clients of gRPC make of a proxy or a server that went away in the middle of a call.
_GONE = re.compile(r"^(Received RST_STREAM|Received http2 header with status: 5|Stream removed|Socket closed)")
# gRPC's own refusal, which a smaller message passes and a later one does not.
_TOO_LARGE = re.compile(r"^(?:(CLIENT|SERVER): )?(Sent|Received) message larger than max")
LOST_STATUS = (grpc.StatusCode.INTERNAL, "Internal error from Core")
"""What gRPC's asyncio client reads, once in a hundred times, from a call that ended while it was still being sent
(grpc/grpc issue 36066); no server of ours says so."""


def status_code(error: BlockragError) -> grpc.StatusCode:
    """The gRPC status of an error; INTERNAL for a kind the table does not know."""
    for kind, code in _STATUS:
        if isinstance(error, kind):
            return code
    return grpc.StatusCode.INTERNAL


def error_of(code: grpc.StatusCode, details: str) -> BlockragError:
    """The error that a status stands for, as far as it says."""
    if code is grpc.StatusCode.INVALID_ARGUMENT:
        found = _FIELD.match(details)
        return InvalidRequestError(found[1], found[2]) if found else PromptTooLongError(details)
    if code is grpc.StatusCode.RESOURCE_EXHAUSTED:
        if (large := _TOO_LARGE.match(details)) is not None:
            answer = large.groups() == ("CLIENT", "Received")
            return BlockragError(f"the answer: {details}") if answer else InvalidRequestError("request", details)
        found = _RETRY.match(details)
        return OverloadedError(found[1], int(found[2])) if found else OverloadedError(details, RETRY_AFTER_MS)
    if code is grpc.StatusCode.NOT_FOUND:
        # Serve says the same of an application that is not there (yet).
        gone = details.startswith("Application ")
        return UnavailableError(f"the gateway is not deployed: {details}") if gone else NotFoundError(details)
    if (code, details) == LOST_STATUS:
        return UnavailableError("the call ended while it was being sent, and gRPC lost the reason")
    if code in (grpc.StatusCode.INTERNAL, grpc.StatusCode.UNKNOWN) and _GONE.match(details):
        return UnavailableError(f"the connection was lost in the middle of the call ({details[:100]})")
    if code is grpc.StatusCode.CANCELLED:
        return UnavailableError(details)
    for kind, status in _STATUS:
        if status is code:
            return kind(details)
    return BlockragError(f"{code.name}: {details}")
