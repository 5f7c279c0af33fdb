"""Imports of what Ray's workers need, after which a copy of the process is as good as a new one.

Three things of Ray's library would be shared that must not be. What its environment says of a worker is read when the
library is loaded, so it must be there then. Its ids are random numbers whose generator is seeded when it is first used,
and two copies of one that is would draw the same ids: nothing may use it before, and that is tried before any copy is
made. And pandas, which Serve imports where it is installed and nothing here needs, starts threads, of which a copy has
none: it is left out.
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from blockrag.local.launch import JOB_ID
from blockrag.services import SERVICES

LIGHT = ("ray", "ray.serve", *(service.import_path.partition(":")[0] for service in SERVICES))
"""What the process that starts Ray needs too."""
WHOLE = (
    "ray._private.workers.default_worker",
    "ray.serve._private.controller",
    "ray.serve._private.haproxy",
    "ray.serve._private.proxy",
    "ray.serve._private.replica",
    "ray.serve.experimental.consistent_hash_router",
    "blockrag.gateway.servicers",
    # what comes with the replicas that have models, and the kinds that the bundled ones are of
    "blockrag.decoder.routing",
    "blockrag.decoder.service",
    "blockrag.encoder.block_encoder",
    "blockrag.modeling.refrag.compression",
    "transformers.models.bert.modeling_bert",
    "transformers.models.llama.modeling_llama",
)


class NotInertError(Exception):
    """Copies of this process would not be as good as new ones; the message says why."""


def import_inert(modules: Sequence[str]) -> None:
    """Imports them. Raises ImportError."""
    with _told_as_a_worker():
        ray_actor: Any = importlib.import_module("ray.actor")
        with _without_pandas(), _other_class_ids(ray_actor):
            for module in modules:
                importlib.import_module(module)


def check_inert() -> None:
    """Raises NotInertError when this process has more than one thread, or two copies of it draw one id."""
    threads = len(list(Path("/proc/self/task").iterdir()))
    if threads != 1:
        raise NotInertError(f"{threads} threads, of which a copy would have one")
    drawn = [_drawn_by_a_copy() for _ in range(2)]
    if drawn[0] == drawn[1]:
        raise NotInertError("copies would draw the same ids")


def _drawn_by_a_copy() -> bytes:
    from ray import UniqueID

    reader, writer = os.pipe()
    copy = os.fork()
    if not copy:
        try:
            os.write(writer, UniqueID.from_random().binary())
        finally:
            os._exit(0)
    os.close(writer)
    try:
        return os.read(reader, 64)
    finally:
        os.close(reader)


@contextmanager
def _told_as_a_worker() -> Iterator[None]:
    """The job is the first of this process's Ray. The process whose end is a worker's is this one, not the raylet,
    which is not there yet: it ends with this one, and a worker whose raylet ends has lost its connection."""
    told = {"RAY_JOB_ID": JOB_ID, "RAY_RAYLET_PID": str(os.getpid())}
    before = {name: os.environ.get(name) for name in told}
    os.environ.update(told)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


@contextmanager
def _without_pandas() -> Iterator[None]:
    if "pandas" in sys.modules:
        yield
        return
    sys.modules["pandas"] = None  # type: ignore[assignment]  # importing it is an ImportError
    try:
        yield
    finally:
        del sys.modules["pandas"]


@contextmanager
def _other_class_ids(ray_actor: Any) -> Iterator[None]:
    """Ids of the actors' classes that modules define, drawn from the system, not from Ray's generator."""
    kind = ray_actor.ActorClassID

    class FromSystem:
        @staticmethod
        def from_random() -> Any:
            return kind(os.urandom(kind.size()))

    ray_actor.ActorClassID = FromSystem
    try:
        yield
    finally:
        ray_actor.ActorClassID = kind
