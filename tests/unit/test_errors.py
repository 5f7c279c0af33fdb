import pickle

import grpc
import pytest

from blockrag import errors
from blockrag.status import status_code


def _all_kinds() -> list[type[errors.BlockragError]]:
    found: list[type[errors.BlockragError]] = []
    waiting = [errors.BlockragError]
    while waiting:
        kind = waiting.pop()
        found.append(kind)
        waiting.extend(kind.__subclasses__())
    return found


def _make(kind: type[errors.BlockragError]) -> errors.BlockragError:
    if issubclass(kind, errors.InvalidRequestError):
        return kind("top_k", "must be at least 1")
    if issubclass(kind, errors.OverloadedError):
        return kind("too many requests", 50)
    return kind("a message")


@pytest.mark.parametrize("kind", _all_kinds())
def test_every_error_survives_a_process_boundary(kind: type[errors.BlockragError]) -> None:
    error = _make(kind)
    copy = pickle.loads(pickle.dumps(error))
    assert type(copy) is kind
    assert str(copy) == str(error)
    assert vars(copy) == vars(error)


@pytest.mark.parametrize("kind", [kind for kind in _all_kinds() if kind is not errors.BlockragError])
def test_every_error_has_a_status(kind: type[errors.BlockragError]) -> None:
    assert status_code(_make(kind)) is not grpc.StatusCode.INTERNAL


@pytest.mark.parametrize("kind", _all_kinds())
def test_the_tree_in_the_docstring_is_complete(kind: type[errors.BlockragError]) -> None:
    assert errors.__doc__ is not None
    assert kind.__name__ in errors.__doc__
