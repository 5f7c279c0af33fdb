"""What every RPC method goes through: who calls, and the status that a gRPC client sees of what is raised.

Serve returns a status of our choice when the method sets it on its gRPC context and then raises; anything else would
reach the client as INTERNAL with a traceback in it. Trailing metadata of a failed call is dropped by Serve, so what
the client needs to know (when to retry) is in the status message.
"""

from __future__ import annotations

import asyncio
import functools
import inspect
import logging
import secrets
import sys
import time
from collections.abc import AsyncIterator, Callable, Container, Iterator
from contextlib import aclosing, asynccontextmanager, contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import grpc

from blockrag.access import THE_SYSTEM, Access, OnBehalf
from blockrag.errors import (
    BlockragError,
    DeadlineError,
    InvalidRequestError,
    OverloadedError,
    ReplicaLostError,
    UnauthenticatedError,
    UnavailableError,
)
from blockrag.limits import RETRY_AFTER_MS
from blockrag.status import status_code
from blockrag.telemetry.logs import AUDIT

_logger = logging.getLogger(__name__)

_calls = logging.getLogger(AUDIT)

_LONGEST_MESSAGE = 2000
_LONGEST_ID = 128
INTERNAL_MESSAGE = "internal error; the server's log has more"
"""How the message of each unforeseen error begins."""

Method = TypeVar("Method", bound=Callable[..., Any])


@dataclass(frozen=True)
class MalformedRequest:
    """Stands in the place of a request whose bytes could not be parsed."""

    problem: str

    def error(self) -> InvalidRequestError:
        """What its sender is told."""
        return InvalidRequestError("request", f"is not a valid message: {self.problem}")


class InternalError(Exception):
    """Something unforeseen; the message holds an id that is in the log beside the traceback."""


def rpc(method: Method) -> Method:
    """Decorator of every RPC method: parses, authenticates, authorises, gives clients the right status, closes streams.

    The method is a coroutine function or an async generator function of ``(self, request)``, and of ``grpc_context``
    and ``caller`` where it names them. Serve passes the context for calls from outside. These must be admitted by the
    replica's ``self.access``; a replica that has none refuses them. Through a handle there is no context, and the
    caller is the system itself, or an ``OnBehalf`` that names who was admitted at another door; errors pass unchanged.
    """
    return _rpc_stream(method) if inspect.isasyncgenfunction(method) else _rpc_call(method)  # type: ignore[return-value]


def as_known_error(error: BaseException, service: str = "") -> BlockragError | None:
    """The error of ours that an exception is or stands for; None when it is unforeseen.

    Unwraps what crossed a deployment handle and translates Ray's own errors: refused by backpressure, replica gone.
    ``service`` is who was called, to name it.
    """
    cause = original_error(error)
    if isinstance(cause, BlockragError):
        return cause
    if isinstance(cause, TimeoutError):
        return DeadlineError("the request ran out of time")
    return _from_ray(cause, service or "a service")


def status_name(error: BaseException) -> str:
    """The status that a call has which ends with this error."""
    if isinstance(error, asyncio.CancelledError | GeneratorExit):
        return "CANCELLED"
    known = as_known_error(error)
    return status_code(known).name if known is not None else "INTERNAL"


def original_error(error: BaseException) -> BaseException:
    """The exception that a remote method raised, without Ray's wrapping."""
    cause = error
    while type(cause).__module__.startswith("ray.") or type(cause).__name__.startswith("RayTaskError"):
        inner = getattr(cause, "cause", None) or getattr(cause, "original_exception", None)
        if not isinstance(inner, BaseException) or inner is cause:
            break
        cause = inner
    return cause


@asynccontextmanager
async def translated(context: Any) -> AsyncIterator[None]:
    """Sets the status of Serve's gRPC context, where there is one, when the body raises."""
    try:
        yield
    except Exception as error:
        if context is None or isinstance(context, OnBehalf):
            raise
        known = as_known_error(error)
        if known is not None:
            context.set_code(status_code(known))
            context.set_details(str(known)[:_LONGEST_MESSAGE])
            raise known from None
        if _is_cancellation(error):
            context.set_code(grpc.StatusCode.CANCELLED)
            context.set_details("cancelled")
            raise
        error_id = secrets.token_hex(8)
        _logger.error("internal error %s", error_id, exc_info=error)
        message = f"{INTERNAL_MESSAGE} under id {error_id}"
        context.set_code(grpc.StatusCode.INTERNAL)
        context.set_details(message)
        raise InternalError(message) from None


def _rpc_call(method: Callable[..., Any]) -> Callable[..., Any]:
    wanted = inspect.signature(method).parameters.keys()

    async def call(self: Any, request: Any, grpc_context: Any = None) -> Any:
        async with translated(grpc_context):
            with _audited(self, method, grpc_context) as audit:
                return await method(self, request, **_admitted(self, request, grpc_context, wanted, audit))

    return _dressed(call, method)


def _rpc_stream(method: Callable[..., Any]) -> Callable[..., Any]:
    wanted = inspect.signature(method).parameters.keys()

    async def stream(self: Any, request: Any, grpc_context: Any = None) -> Any:
        async with translated(grpc_context):
            with _audited(self, method, grpc_context) as audit:
                own = _admitted(self, request, grpc_context, wanted, audit)
                async with aclosing(method(self, request, **own)) as events:
                    async for event in events:
                        yield event

    return _dressed(stream, method)


@dataclass
class _Audit:
    """What is known of a call's caller."""

    tenant: str = ""


@contextmanager
def _audited(replica: Any, method: Callable[..., Any], context: Any) -> Iterator[_Audit]:
    """Logs a call from outside when it ends: who, what, when, the outcome; nothing of what was said."""
    audit = _Audit()
    if context is None or not _calls.isEnabledFor(logging.INFO):
        yield audit
        return
    started, status = time.perf_counter(), "OK"
    try:
        yield audit
    except BaseException as error:
        status = status_name(error)
        raise
    finally:
        sent = dict(context.invocation_metadata())
        facts = {
            "tenant": audit.tenant,
            "method": f"{type(replica).__name__}.{method.__name__}",
            "status": status,
            "milliseconds": round((time.perf_counter() - started) * 1000, 1),
            "request_id": str(sent.get("request_id", ""))[:_LONGEST_ID],
        }
        _calls.info("call", extra=facts)


def _admitted(replica: Any, request: Any, context: Any, wanted: Container[str], audit: _Audit) -> dict[str, Any]:
    """What the method gets beside the request; raises for a call that is not admitted."""
    if isinstance(request, MalformedRequest):
        raise request.error()
    caller = THE_SYSTEM
    if isinstance(context, OnBehalf):
        caller = context.caller
    elif context is not None:
        access: Access | None = getattr(replica, "access", None)
        if access is None:
            raise UnauthenticatedError("this service was not told whom to serve, and so serves nobody")
        caller = access.check(request, context)
    audit.tenant = caller.tenant
    given = {"grpc_context": context, "caller": caller}
    return {name: value for name, value in given.items() if name in wanted}


def _dressed(wrapper: Callable[..., Any], method: Callable[..., Any]) -> Callable[..., Any]:
    functools.update_wrapper(wrapper, method)
    # Serve reads the signature to see whether a method wants the context: it must see the wrapper's.
    del wrapper.__wrapped__  # type: ignore[attr-defined]
    return wrapper


def _from_ray(error: BaseException, service: str) -> BlockragError | None:
    gone = ReplicaLostError(f"{service}: a replica that worked on this request went away; send it again")
    # Looked up, not imported: an exception of Ray's can only exist where Ray is imported already.
    if (serve_errors := sys.modules.get("ray.serve.exceptions")) is not None:
        if isinstance(error, serve_errors.BackPressureError):
            return OverloadedError(f"{service}: too many requests are waiting", RETRY_AFTER_MS)
        if isinstance(error, serve_errors.DeploymentUnavailableError):
            return UnavailableError(f"{service}: {error.message}")
        if isinstance(error, serve_errors.ReplicaUnavailableError):
            return gone
    if (ray_errors := sys.modules.get("ray.exceptions")) is not None:
        if isinstance(error, ray_errors.RayActorError | ray_errors.WorkerCrashedError | ray_errors.NodeDiedError):
            return gone
        if isinstance(error, ray_errors.GetTimeoutError):
            return DeadlineError("the request ran out of time")
    return None


def _is_cancellation(error: BaseException) -> bool:
    ray_errors = sys.modules.get("ray.exceptions")
    return ray_errors is not None and isinstance(original_error(error), ray_errors.TaskCancelledError)
