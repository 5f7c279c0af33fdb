"""What clients are told about errors."""

from __future__ import annotations

import inspect
import logging
import warnings
from collections.abc import AsyncIterator

import grpc
import pytest
from ray.exceptions import RayTaskError

from blockrag.access import THE_SYSTEM, Access, Caller, OnBehalf
from blockrag.errors import InvalidRequestError, NotFoundError, OverloadedError, UnauthenticatedError
from blockrag.grpc_status import InternalError, as_known_error, rpc, translated
from blockrag.settings import GatewaySettings, KvCacheSettings, Settings
from blockrag.tenants import TenantSettings

with warnings.catch_warnings():
    # Importing Serve warns about its own use of pydantic.
    warnings.simplefilter("ignore", DeprecationWarning)
    from ray.serve.exceptions import BackPressureError


class FakeContext:
    def __init__(self) -> None:
        self.code: grpc.StatusCode | None = None
        self.details = ""

    def set_code(self, code: grpc.StatusCode) -> None:
        self.code = code

    def set_details(self, details: str) -> None:
        self.details = details

    def invocation_metadata(self) -> tuple[tuple[str, str], ...]:
        return ()

    def peer(self) -> str:
        return "ipv4:127.0.0.1:5000"


class Service:
    access = Access(Settings())

    @rpc
    async def Call(self, request: Exception | None, grpc_context: FakeContext | None = None) -> str:
        if request is not None:
            raise request
        return "fine"

    @rpc
    async def Stream(self, request: Exception | None) -> AsyncIterator[int]:
        yield 1
        if request is not None:
            raise request
        yield 2


def crossed_a_handle(error: Exception) -> Exception:
    wrapped = RayTaskError("Call", "Traceback: /home/somebody/secret.py", error, proctitle="p", pid=1, ip="127.0.0.1")
    return wrapped.as_instanceof_cause()


async def test_our_errors_get_their_status_and_message() -> None:
    context = FakeContext()
    with pytest.raises(InvalidRequestError):
        await Service().Call(InvalidRequestError("top_k", "must be at least 1"), grpc_context=context)
    assert context.code is grpc.StatusCode.INVALID_ARGUMENT
    assert context.details == "top_k: must be at least 1"


async def test_a_remote_error_is_unwrapped() -> None:
    context = FakeContext()
    with pytest.raises(NotFoundError):
        await Service().Call(crossed_a_handle(crossed_a_handle(NotFoundError("no collection x"))), grpc_context=context)
    assert context.code is grpc.StatusCode.NOT_FOUND
    assert context.details == "no collection x"


async def test_the_unforeseen_becomes_internal_without_a_traceback(caplog: pytest.LogCaptureFixture) -> None:
    context = FakeContext()
    with caplog.at_level(logging.ERROR), pytest.raises(InternalError):
        await Service().Call(ValueError("secret.py broke"), grpc_context=context)
    assert context.code is grpc.StatusCode.INTERNAL
    assert "secret" not in context.details
    error_id = context.details.rsplit(" ", 1)[1]
    assert error_id in caplog.text
    assert "secret.py broke" in caplog.text


async def test_a_stream_keeps_what_came_before_the_error() -> None:
    context = FakeContext()
    seen = []
    with pytest.raises(OverloadedError):
        async for item in Service().Stream(OverloadedError("64 answers are in progress", 250), grpc_context=context):  # type: ignore[call-arg]
            seen.append(item)
    assert seen == [1]
    assert context.code is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert context.details == "64 answers are in progress; retry in 250 ms"


async def test_without_a_grpc_context_errors_pass_unchanged() -> None:
    with pytest.raises(ValueError, match="as it was"):
        await Service().Call(ValueError("as it was"))
    assert await Service().Call(None) == "fine"
    assert [item async for item in Service().Stream(None)] == [1, 2]


async def test_context_manager_form() -> None:
    context = FakeContext()
    with pytest.raises(NotFoundError):
        async with translated(context):
            raise NotFoundError("nothing")
    assert context.code is grpc.StatusCode.NOT_FOUND


def test_serve_sees_the_kind_of_method_and_the_context() -> None:
    assert inspect.iscoroutinefunction(Service.Call)
    assert inspect.isasyncgenfunction(Service.Stream)
    assert "grpc_context" in inspect.signature(Service.Stream).parameters


def test_backpressure_is_overload() -> None:
    known = as_known_error(crossed_a_handle(BackPressureError(num_queued_requests=5, max_queued_requests=5)))
    assert isinstance(known, OverloadedError)


def test_timeouts_are_deadlines() -> None:
    assert type(as_known_error(TimeoutError())).__name__ == "DeadlineError"
    assert as_known_error(KeyError("x")) is None


class Unguarded:
    """A replica that was given no access."""

    @rpc
    async def Call(self, request: None, grpc_context: FakeContext | None = None) -> str:
        return "served"

    @rpc
    async def Stream(self, request: None) -> AsyncIterator[str]:
        yield "served"


async def test_a_replica_that_was_not_told_whom_to_serve_serves_nobody_from_outside() -> None:
    context = FakeContext()
    with pytest.raises(UnauthenticatedError, match="serves nobody"):
        await Unguarded().Call(None, grpc_context=context)
    assert context.code is grpc.StatusCode.UNAUTHENTICATED
    with pytest.raises(UnauthenticatedError):
        async for _ in Unguarded().Stream(None, grpc_context=FakeContext()):  # type: ignore[call-arg]
            pytest.fail("served")
    assert await Unguarded().Call(None) == "served"


async def test_a_method_is_told_who_calls() -> None:
    class Asked:
        access = Access(
            Settings(
                gateway=GatewaySettings(tenants=(TenantSettings(name="acme", api_key="acme-key-0123456789"),)),
                kv_cache=KvCacheSettings(secret="not the one that everybody knows"),
            )
        )

        @rpc
        async def Call(self, request: None, *, caller: Caller) -> Caller:
            return caller

    class Known(FakeContext):
        def invocation_metadata(self) -> tuple[tuple[str, str], ...]:
            return (("authorization", "Bearer acme-key-0123456789"),)

    assert await Asked().Call(None, grpc_context=Known()) == Caller("acme")  # type: ignore[call-arg]
    assert await Asked().Call(None) == THE_SYSTEM  # type: ignore[call-arg]
    with pytest.raises(UnauthenticatedError):
        await Asked().Call(None, grpc_context=FakeContext())  # type: ignore[call-arg]


async def test_calls_from_outside_leave_a_line_each_without_what_was_said(caplog: pytest.LogCaptureFixture) -> None:
    calls = logging.getLogger("blockrag.audit")
    service = Service()
    with caplog.at_level(logging.INFO, "blockrag.audit"):
        calls.disabled = False
        await service.Call(None, grpc_context=FakeContext())
        with pytest.raises(NotFoundError):
            await service.Call(NotFoundError("document secret.txt"), grpc_context=FakeContext())
        stream = service.Stream(None, grpc_context=FakeContext())
        await anext(stream)
        await stream.aclose()
        await service.Call(None)  # through a handle
        calls.disabled = True
        await service.Call(None, grpc_context=FakeContext())
        calls.disabled = False
    lines = [(r.__dict__["tenant"], r.__dict__["method"], r.__dict__["status"]) for r in caplog.records]
    assert lines == [
        ("public", "Service.Call", "OK"),
        ("public", "Service.Call", "NOT_FOUND"),
        ("public", "Service.Stream", "CANCELLED"),
    ]
    assert "secret" not in caplog.text


async def test_another_door_speaks_for_whom_it_admitted() -> None:
    class Asked:
        @rpc
        async def Call(
            self, request: Exception | None, grpc_context: OnBehalf, *, caller: Caller
        ) -> tuple[Caller, str]:
            if request is not None:
                raise request
            return caller, dict(grpc_context.invocation_metadata())["request_id"]

    call = OnBehalf(Caller("acme"), (("request_id", "r7"),))
    assert await Asked().Call(None, grpc_context=call) == (Caller("acme"), "r7")  # type: ignore[call-arg]
    with pytest.raises(NotFoundError):
        await Asked().Call(NotFoundError("gone"), grpc_context=call)  # type: ignore[call-arg]
    with pytest.raises(ZeroDivisionError):
        await Asked().Call(ZeroDivisionError(), grpc_context=call)  # type: ignore[call-arg]
