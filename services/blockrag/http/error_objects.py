"""Errors as OpenAI's clients read them: one object, one status for each kind of ours."""

from __future__ import annotations

import logging
import math
import secrets
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from blockrag.errors import (
    BlockragError,
    DeadlineError,
    InvalidRequestError,
    NotFoundError,
    OverloadedError,
    PromptTooLongError,
    UnauthenticatedError,
    UnavailableError,
    UnsupportedError,
)
from blockrag.grpc_status import as_known_error

_LOGGER = logging.getLogger(__name__)


class ErrorDetail(BaseModel):
    """What went wrong."""

    message: str
    type: str
    param: str | None = None
    code: str | None = None


class ErrorBody(BaseModel):
    """OpenAI's error object."""

    error: ErrorDetail


_KINDS: tuple[tuple[type[BlockragError], int, str, str], ...] = (
    (UnsupportedError, 400, "invalid_request_error", "unsupported_value"),
    (InvalidRequestError, 400, "invalid_request_error", "invalid_value"),
    (PromptTooLongError, 400, "invalid_request_error", "context_length_exceeded"),
    (NotFoundError, 404, "invalid_request_error", "not_found"),
    (UnauthenticatedError, 401, "authentication_error", "invalid_api_key"),
    (OverloadedError, 429, "rate_limit_error", "rate_limit_exceeded"),
    (DeadlineError, 504, "timeout_error", "timeout"),
    (UnavailableError, 503, "server_error", "unavailable"),
)
_CODES = {404: "not_found", 405: "method_not_allowed", 413: "request_too_large"}
"""Of errors that the framework raises."""
ERROR_RESPONSES: dict[int | str, dict[str, Any]] = {
    status: {"model": ErrorBody} for status in (400, 401, 404, 413, 429, 500, 503, 504)
}
"""For the OpenAPI schema of every path."""


@contextmanager
def named(**params: str) -> Iterator[None]:
    """Where what the gateway refuses is a field, tells it by the name that the request has for it; ``params`` by the
    gateway's names. What is not among them is told as it is."""
    try:
        yield
    except Exception as error:
        known = as_known_error(error)
        if not isinstance(known, InvalidRequestError):
            raise
        for field, param in params.items():
            if known.field == field or known.field.startswith((f"{field}.", f"{field}[")):
                inner = known.field[len(field) :] if field == "compression" else ""
                raise type(known)(param + inner, known.problem) from error
        raise


def error_detail(error: BaseException) -> tuple[int, ErrorDetail]:
    """Status and object of an error; what is unforeseen is logged under an id that the client is told."""
    known = as_known_error(error)
    if known is not None:
        status, kind, code = _kind(known)
        if not isinstance(known, InvalidRequestError):
            return status, ErrorDetail(message=str(known), type=kind, code=code)
        return status, ErrorDetail(message=str(known), type=kind, param=known.field, code=code)
    error_id = secrets.token_hex(8)
    _LOGGER.error("internal error %s", error_id, exc_info=error)
    message = f"internal error; the server's log has more under id {error_id}"
    return 500, ErrorDetail(message=message, type="server_error", code="internal_error")


def error_response(error: BaseException) -> Response:
    """The response that tells of an error, of ours, of the framework's or an unforeseen one."""
    if isinstance(error, RequestValidationError):
        return _response(400, _validation_detail(error.errors()))
    if isinstance(error, HTTPException):
        code = _CODES.get(error.status_code, "invalid_value")
        detail = ErrorDetail(message=str(error.detail), type="invalid_request_error", code=code)
        return _response(error.status_code, detail, dict(error.headers or {}))
    status, detail = error_detail(error)
    headers = {}
    if status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    known = as_known_error(error)
    if isinstance(known, OverloadedError):
        headers["Retry-After"] = str(math.ceil(known.retry_after_ms / 1000))
        headers["Retry-After-Ms"] = str(known.retry_after_ms)  # OpenAI's clients take this one first
    return _response(status, detail, headers)


def too_large(most: int) -> HTTPException:
    """What a body is refused with that has more than ``most`` bytes. FastAPI lets no other kind through."""
    return HTTPException(413, f"the body is larger than the {most // 2**20} MiB that are allowed")


def add_handlers(app: FastAPI) -> None:
    """Has the application answer every error with OpenAI's object."""

    async def answer(request: Request, error: Exception) -> Response:
        return error_response(error)

    for kind in (BlockragError, RequestValidationError, HTTPException, Exception):
        app.add_exception_handler(kind, answer)


def _kind(error: BlockragError) -> tuple[int, str, str]:
    for of, status, kind, code in _KINDS:
        if isinstance(error, of):
            return status, kind, code
    return 500, "server_error", "internal_error"


def _response(status: int, detail: ErrorDetail, headers: dict[str, str] | None = None) -> Response:
    return JSONResponse(ErrorBody(error=detail).model_dump(), status, headers)


def _validation_detail(problems: Sequence[Any]) -> ErrorDetail:
    first = problems[0]
    if first["type"] == "json_invalid":
        where = "".join(f" at character {part}" for part in first["loc"][1:])
        told = f"the body is no JSON{where}: {first.get('ctx', {}).get('error', first['msg'])}"
        return ErrorDetail(message=told[:2000], type="invalid_request_error", code="invalid_value")
    if isinstance(first.get("input"), bytes):
        told = "the body was not read as JSON: send it with Content-Type: application/json"
        return ErrorDetail(message=told, type="invalid_request_error", code="invalid_value")
    place = [str(part) for part in first["loc"]]
    if place and place[0] in ("body", "query", "path", "header"):  # where it was looked for; a field may be called so
        del place[0]
    param = ".".join(place) or None
    if first["type"] == "extra_forbidden":
        return ErrorDetail(
            message=f"{param}: is not known here, and what is not known is not ignored",
            type="invalid_request_error",
            param=param,
            code="unknown_parameter",
        )
    code = "unsupported_value" if first["type"] == "unsupported" else "invalid_value"
    message = f"{param}: {first['msg']}" if param else str(first["msg"])
    return ErrorDetail(message=message[:2000], type="invalid_request_error", param=param, code=code)
