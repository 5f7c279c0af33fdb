"""What is wrong with this machine or configuration, before it hurts; each finding with the way out."""

from __future__ import annotations

import functools
import importlib.metadata
import importlib.util
import itertools
import math
import os
import platform
import resource
import shutil
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from blockrag.access import Access
from blockrag.errors import BlockragError, EnvironmentSetupError, SettingsError
from blockrag.limits import MIB
from blockrag.local.preflight import SHARED_MEMORY, check_disk, check_exposure, check_memory, check_port
from blockrag.local.state import read_state
from blockrag.settings import PUBLIC_SECRET, Settings

Level = Literal["ok", "warning", "problem"]

_OPEN_FILES = 4_096
_FREE_DISK_MB = 1_024
_VOLUME_TIMEOUT_S = 20.0
_FIXED_MB = 4 * 220 + 300
"""What Ray, Serve's controller and proxies and the services without models take whatever is set (measured)."""
_GATEWAY_MB, _COMPRESSOR_MB, _MODEL_SERVICE_MB = 300, 300, 650
"""Resident memory of a replica: of a model's service without its weights and buffers."""


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at."""

    subject: str
    level: Level
    text: str
    way_out: str = ""
    """What to do; empty where nothing is to be done."""


def examine(settings: Settings) -> list[Finding]:
    """Everything that is looked at, in the order in which a start needs it. Starts nothing."""
    installed = list(_versions())
    if any(finding.level == "problem" for finding in installed):
        return installed  # the rest needs what is missing
    looks = (
        installed,
        _limits(settings),
        _start(settings),
        _secrets(settings),
        _state_folder(settings),
        _volume(settings),
        _bundle_and_budgets(settings),
        _kernels(settings),
    )
    return list(itertools.chain.from_iterable(looks))


def _versions() -> Iterator[Finding]:
    version = platform.python_version()
    other = platform.python_version_tuple()[:2] != ("3", "11")
    text = f"{version}, where 3.11 is tested"
    yield _judged("python", version, other, text, "make the environment with Python 3.11")
    missing = [name for name in ("ray", "torch", "transformers", "qdrant_edge") if not importlib.util.find_spec(name)]
    if missing:
        yield Finding("packages", "problem", f"missing: {', '.join(missing)}", "pip install 'blockrag[serve]'")
        return
    from packaging.requirements import Requirement

    wrong = []
    for text in importlib.metadata.requires("blockrag") or []:
        requirement = Requirement(text)
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": "serve"}):
            continue
        try:
            installed = importlib.metadata.version(requirement.name)
        except importlib.metadata.PackageNotFoundError:
            wrong.append(f"{requirement.name} is missing")
            continue
        if not requirement.specifier.contains(installed, prereleases=True):
            wrong.append(f"{requirement.name} {installed}, where {requirement.specifier} is needed")
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("ray", "torch", "transformers"))
    way_out = "pip install --constraint constraints.txt 'blockrag[serve]'"
    yield _judged("packages", versions, bool(wrong), "; ".join(wrong), way_out, "problem")
    if not hasattr(os, "pidfd_open") or not Path("/proc/self/stat").exists():
        yield Finding("system", "problem", "no Linux with pidfd and /proc", "run on Linux 5.3 or later")


def _limits(settings: Settings) -> Iterator[Finding]:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    few = soft != resource.RLIM_INFINITY and soft < _OPEN_FILES
    wanted = f"at most {soft}; Ray and HAProxy want {_OPEN_FILES}"
    yield _judged("open files", f"at most {soft} of {hard}", few, wanted, f"ulimit -n {_OPEN_FILES}")
    cores = len(os.sched_getaffinity(0))
    threads = max(settings.decoder.threads, settings.encoder.threads)
    asked = f"{cores}, where decoder.threads and encoder.threads ask for up to {threads}"
    way_out = f"set decoder.threads and encoder.threads to at most {cores}"
    yield _judged("processors", str(cores), threads > cores, asked, way_out)


def _judged(subject: str, well: str, bad: bool, text: str, way_out: str, level: Level = "warning") -> Finding:
    return Finding(subject, level, text, way_out) if bad else Finding(subject, "ok", well)


def _start(settings: Settings) -> Iterator[Finding]:
    """What ``blockrag up`` would refuse."""
    cluster = settings.cluster
    if _is_running(settings):
        yield Finding("start", "ok", "it runs: ports and shared memory are its own")
    else:
        store = f"object store of {cluster.object_store_mb} MiB in {SHARED_MEMORY}"
        yield _looked("shared memory", store, lambda: check_memory(settings))
        for name in ("grpc_port", "http_port"):
            check = functools.partial(check_port, cluster.host, getattr(cluster, name), f"cluster.{name}")
            yield _looked(f"cluster.{name}", f"{getattr(cluster, name)} is free", check)
        if os.environ.get("RAY_ADDRESS"):
            yield Finding(
                "ray", "problem", "RAY_ADDRESS points to another Ray", "unset RAY_ADDRESS, or use serve deploy"
            )
    kept = f"kv_cache.disk_mb: {settings.kv_cache.disk_mb} MiB of blocks at most"
    yield _looked("blocks on disk", kept, lambda: check_disk(settings))
    try:
        tenants = Access(settings)
    except SettingsError as error:
        yield Finding("access", "problem", str(error), "mend the file that gateway.tenants_file names")
        return
    access = f"{len(set(tenants.names()))} tenants with keys" if tenants else "without keys, for this machine only"
    yield _looked("access", access, lambda: check_exposure(settings))


def _looked(subject: str, well: str, check: Callable[[], None]) -> Finding:
    try:
        check()
    except EnvironmentSetupError as error:
        text, _, way_out = str(error).partition(": ")
        return Finding(subject, "problem", text, way_out)
    return Finding(subject, "ok", well)


def _secrets(settings: Settings) -> Iterator[Finding]:
    public = "kv_cache.secret is the one that everybody knows; without tenants that harms nobody"
    is_public = settings.kv_cache.secret == PUBLIC_SECRET
    yield _judged(
        "secret", "kv_cache.secret is set", is_public, public, "before there are tenants: openssl rand -hex 32"
    )


def _state_folder(settings: Settings) -> Iterator[Finding]:
    folder = settings.state_path
    existing = next(path for path in (folder, *folder.parents) if path.exists())
    if not os.access(existing, os.W_OK):
        yield Finding("state", "problem", f"{existing} cannot be written", "set cluster.state_dir to a folder of yours")
        return
    free = shutil.disk_usage(existing).free // MIB
    little = f"{free} MiB are free on the disk of {folder}; documents and traces need room"
    way_out = "free some or set cluster.state_dir to another disk"
    yield _judged("state", f"{folder}, {free} MiB free", free < _FREE_DISK_MB, little, way_out, "problem")


def _volume(settings: Settings) -> Iterator[Finding]:
    if not settings.kv_cache.volume:
        return
    from blockrag.kv_cache.volume import Volume  # not where the client alone is installed

    failed: list[OSError] = []

    def check() -> None:
        try:
            Volume(settings.kv_cache.volume).check()
        except OSError as error:
            failed.append(error)

    checking = threading.Thread(target=check, daemon=True)  # a mount that hangs keeps its thread for ever
    checking.start()
    checking.join(_VOLUME_TIMEOUT_S)
    name = "kv_cache.volume"
    if checking.is_alive():
        text = f"{name} did not answer within {_VOLUME_TIMEOUT_S:g} s"
        yield Finding("volume", "problem", text, "look at the mount, the address and the network")
    elif failed:
        yield Finding("volume", "problem", f"{name}, {failed[0]}", _way_to_volume(failed[0].__cause__))
    else:
        yield Finding("volume", "ok", f"{name} can be written, read and removed from")


def _way_to_volume(cause: BaseException | None) -> str:
    match cause:
        case ImportError():
            return "install the package of the protocol, on every machine"
        case ValueError():
            return "begin it with a protocol of fsspec: file:///PATH, s3://BUCKET/PATH, gs://BUCKET/PATH"
        case PermissionError():
            return "let this user, or these credentials, write, read, list and delete below it"
        case _:
            return "check that the place exists, and the credentials and addresses in fsspec's own configuration"


def _bundle_and_budgets(settings: Settings) -> Iterator[Finding]:
    from blockrag.configured import configured_bundle, token_bytes  # not where the client alone is installed

    try:
        bundle = configured_bundle(settings)
    except BlockragError as error:
        yield Finding("bundle", "problem", str(error), "check bundle.path; 'blockrag bundle verify' says more")
        return
    token = token_bytes(bundle, settings)
    held = settings.kv_cache.budget_mb * MIB // token
    yield Finding("bundle", "ok", f"{bundle.name}, {bundle.max_context_tokens} positions")
    passages = held // settings.ingest.passage_tokens
    text = f"kv_cache.budget_mb holds {held} tokens, at least {passages} passages"
    few = passages < 2 * settings.gateway.default_top_k
    way_out = "raise kv_cache.budget_mb and cluster.object_store_mb"
    yield _judged("cache", text, few, text, way_out, "problem")
    if settings.decoder.slots < bundle.max_context_tokens:
        yield Finding(
            "slots",
            "warning",
            f"decoder.slots is {settings.decoder.slots}: the model's {bundle.max_context_tokens} are not reached",
            f"raise decoder.slots to {bundle.max_context_tokens} where memory allows",
        )
    numbers = sum(map(_numbers, bundle.weights_dir().glob("*.safetensors")))
    weights = numbers * (4 if bundle.compute_dtype == "float32" else 2) // MIB
    slots = settings.decoder.slots * token // MIB
    # eight bits each, and a bfloat16 scale for 32 of them
    copy = 0 if bundle.weights == "none" else numbers * 17 // 16 // MIB
    decoders = max(settings.decoder.replicas, settings.decoder.max_replicas) * (
        _MODEL_SERVICE_MB + weights + copy + slots + settings.decoder.l1_mb
    )
    encoders = settings.encoder.max_replicas * (_MODEL_SERVICE_MB + weights)
    others = settings.gateway.replicas * _GATEWAY_MB + settings.compressor.replicas * _COMPRESSOR_MB + _FIXED_MB
    wanted = decoders + encoders + others + _MODEL_SERVICE_MB + settings.cluster.object_store_mb
    there = _available_mb()
    text = f"{wanted} MiB when everything is full ({decoders} decoders, {encoders} encoders), {there} MiB available"
    much = wanted > there and not _is_running(settings)
    way_out = "lower decoder.slots, decoder.l1_mb, encoder.max_replicas or replicas"
    yield _judged("memory", text, much, text, way_out)


def _numbers(file: Path) -> int:
    from safetensors import safe_open  # not where the client alone is installed

    with safe_open(file, "numpy") as weights:
        return sum(math.prod(weights.get_slice(name).get_shape()) for name in weights.keys())  # noqa: SIM118


def _kernels(settings: Settings) -> Iterator[Finding]:
    from blockrag.modeling.native.build import BFLOAT16, CannotBuildError, has_instructions, processor

    if settings.bundle.device.startswith("cuda"):
        return
    if settings.bundle.compute_dtype == "bfloat16" and not has_instructions(BFLOAT16):
        yield Finding(
            "processor",
            "warning",
            "it has neither AVX-512 BF16 nor AMX: bfloat16 is emulated and slow",
            "set bundle.compute_dtype to float32",
        )
    try:
        name = processor().name
    except CannotBuildError as error:
        yield Finding("kernels", "warning", f"{error}: torch's own operations are used, which are slower")
    else:
        yield Finding("kernels", "ok", f"this processor has the compiled kernels' instructions: {name}")


def _available_mb() -> int:
    for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) // 1024
    return 0


def _is_running(settings: Settings) -> bool:
    state = read_state(settings.state_path)
    return state is not None and state.alive
