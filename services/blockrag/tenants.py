"""Tenants as settings name them: their keys, and the file of them that may change while the system runs."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, Self

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    PositiveInt,
    TypeAdapter,
    ValidationError,
    model_validator,
)

from blockrag.errors import SettingsError
from blockrag.limits import TENANT_PATTERN

HASHED_KEY = "sha256:"
"""Begins a key that is given by its hash."""
_SHORTEST_KEY = 16


class Section(BaseModel):
    """A part of the settings: unknown keys are errors, attributes are documented."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


def _checked_key(key: str) -> str:
    if key.startswith(HASHED_KEY) and not re.fullmatch(r"[0-9a-f]{64}", key.removeprefix(HASHED_KEY)):
        raise ValueError("a hashed key is sha256: and 64 hexadecimal digits, as `blockrag key` prints it")
    if len(key) < _SHORTEST_KEY:
        raise ValueError(f"a key has at least {_SHORTEST_KEY} characters")
    if not (key.isascii() and key.isprintable()) or key != key.strip():
        raise ValueError("a key is printable ASCII without white space around it: no header carries another")
    return key


def key_digest(key: str) -> bytes:
    """What a key is known by, given as it is or by its hash."""
    given = key.startswith(HASHED_KEY)
    return bytes.fromhex(key.removeprefix(HASHED_KEY)) if given else hashlib.sha256(key.encode()).digest()


ApiKey = Annotated[str, AfterValidator(_checked_key)]


class TenantLimits(Section):
    """The most that one tenant may have, and do at a time. What is left out has no limit of its own.

    What is stored is counted by the retriever. Of the others each gateway replica holds its share, at least one.
    """

    collections: PositiveInt | None = None
    """Collections that it has."""
    documents: PositiveInt | None = None
    """Documents in all of them."""
    index_mb: PositiveInt | None = None
    """What they take of the index's disk, in MiB: a new passage is refused once it is reached. About 6 KiB a passage;
    removed passages leave the disk with their collection."""
    uploads: PositiveInt | None = None
    """Documents that are received at a time."""
    questions: PositiveInt | None = None
    """Questions and searches under way at a time."""
    questions_a_minute: PositiveInt | None = None
    """Questions and searches begun in a minute."""
    tokens_a_minute: PositiveInt | None = None
    """Tokens of prompts and answers in a minute, counted when an answer ends: the question that passes the limit is
    answered, the next one waits until as many are free again."""


NO_LIMITS = TenantLimits()
LimitsOf = Callable[[str], TenantLimits]
"""What a tenant may have and do, as it is now."""


def no_limits(tenant: str) -> TenantLimits:
    """For what is nobody's in particular."""
    return NO_LIMITS


class TenantSettings(Section):
    """One tenant of the server."""

    name: Annotated[str, Field(pattern=f"^{TENANT_PATTERN}$")]
    """Lower-case name; part of every collection's and cache entry's identity."""
    api_key: ApiKey | None = None
    """Bearer token of the tenant, or the hash that `blockrag key` prints of one: sha256:…, so that the file gives no
    key away."""
    api_keys: tuple[ApiKey, ...] = ()
    """More of them: while a key is replaced, the old one and the new one are known."""
    operator: bool = False
    """Whether its status and traces list what belongs to other tenants too."""
    limits: TenantLimits = NO_LIMITS
    """What it may have and do."""

    @model_validator(mode="after")
    def _has_a_key(self) -> Self:
        if not self.keys:
            raise ValueError("api_key or api_keys must be set")
        return self

    @property
    def keys(self) -> tuple[str, ...]:
        """All of its keys, as they are written."""
        return (*((self.api_key,) if self.api_key is not None else ()), *self.api_keys)


def check_distinct(tenants: Sequence[TenantSettings]) -> Sequence[TenantSettings]:
    """Raises ValueError where a key is two tenants': one of them would be shown what the other has."""
    names: dict[bytes, str] = {}
    for tenant in tenants:
        for key in tenant.keys:
            other = names.setdefault(key_digest(key), tenant.name)
            if other != tenant.name:
                raise ValueError(f"{other} and {tenant.name} have the same key")
    return tenants


TenantList = Annotated[tuple[TenantSettings, ...], AfterValidator(check_distinct)]
_TENANT_LIST = TypeAdapter(TenantList)


def read_tenants(path: Path) -> tuple[TenantSettings, ...]:
    """The tenants of a ``gateway.tenants_file``. Raises ``SettingsError`` naming the file and the problem."""
    where = f"gateway.tenants_file {path}"
    try:
        return _TENANT_LIST.validate_python(read_yaml(path, where))
    except ValidationError as error:
        raise SettingsError(f"{where}: {problems_of(error)}") from error


def read_yaml(path: Path, where: str) -> Any:
    """What a YAML file holds. Raises ``SettingsError`` that begins with ``where``."""
    try:
        return yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise SettingsError(f"{where}: {error}") from error


def problems_of(error: ValidationError) -> str:
    """What is wrong with settings, by their names; no values, which may be keys."""
    problems = error.errors(include_input=False)
    return "; ".join(f"{'.'.join(map(str, item['loc']))}: {item['msg']}".removeprefix(": ") for item in problems)
