"""Every error that blockrag raises on purpose. ``blockrag.status`` turns them into gRPC status.

::

    BlockragError
    ├── InvalidRequestError       the caller's input; names the field
    │   └── UnsupportedError      something of another API that this server does not do
    ├── NotFoundError             unknown collection, document, trace
    ├── UnauthenticatedError      no or wrong credentials
    ├── OverloadedError           admission refused; says when to retry
    ├── DeadlineError             the request's time ran out
    ├── UnavailableError          a part of the system cannot be reached; names it
    │   └── ReplicaLostError      what worked on the request went away before it answered
    ├── PromptTooLongError        the final block alone does not fit the model
    ├── DataError                 something stored is damaged
    └── SetupError                what an operator must change before anything runs
        ├── SettingsError         unknown key, bad value
        ├── BundleError           missing or damaged file, wrong vocabulary, NaN, wrong fingerprint
        ├── UnsupportedModelError a model that cannot be driven over slots; names what is missing
        └── EnvironmentSetupError port in use, too little shared memory, Ray running already

Foreign errors are translated where they enter.
"""

from __future__ import annotations


class BlockragError(Exception):
    """Base of all errors raised on purpose. The message is written for the caller."""


class InvalidRequestError(BlockragError):
    """The request cannot be served as it is; nothing was stored."""

    def __init__(self, field: str, problem: str) -> None:
        super().__init__(f"{field}: {problem}")
        self.field = field
        self.problem = problem

    def __reduce__(self) -> tuple[type[InvalidRequestError], tuple[str, str]]:
        return type(self), (self.field, self.problem)


class UnsupportedError(InvalidRequestError):
    """Something of another API that would change the answer and that this server does not do."""


class NotFoundError(BlockragError):
    """What the request names does not exist."""


class UnauthenticatedError(BlockragError):
    """No credentials, or wrong ones."""


class OverloadedError(BlockragError):
    """Too much is running; retry after ``retry_after_ms`` milliseconds."""

    def __init__(self, what: str, retry_after_ms: int) -> None:
        super().__init__(f"{what}; retry in {retry_after_ms} ms")
        self.what = what
        self.retry_after_ms = retry_after_ms

    def __reduce__(self) -> tuple[type[OverloadedError], tuple[str, int]]:
        return type(self), (self.what, self.retry_after_ms)


class DeadlineError(BlockragError):
    """The request's deadline passed; its work was stopped."""


class UnavailableError(BlockragError):
    """A part of the system cannot be reached; the message names it."""


class ReplicaLostError(UnavailableError):
    """What worked on the request went away before it answered."""


class PromptTooLongError(BlockragError):
    """Instruction, question and answer alone do not fit the model."""


class DataError(BlockragError):
    """Something that was stored cannot be read back."""


class SetupError(BlockragError):
    """An operator must change something before the system can run."""


class SettingsError(SetupError):
    """An unknown key or a value out of range in the settings."""


class BundleError(SetupError):
    """A bundle that is incomplete, damaged or does not fit."""


class UnsupportedModelError(SetupError):
    """A model that cannot be driven over slots; the message names what is missing."""


class EnvironmentSetupError(SetupError):
    """The machine is not ready: a port in use, too little shared memory, Ray running already."""
