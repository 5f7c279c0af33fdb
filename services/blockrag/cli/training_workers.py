"""Workers of Ray Train for the commands that train."""

from __future__ import annotations

import importlib.util
import os
import secrets
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

from blockrag.cli import console
from blockrag.errors import SetupError

WorkersOption = Annotated[int, typer.Option(help="Workers of Ray Train, one GPU or CPU each; 1: this process.")]
RayOption = Annotated[str, typer.Option(help="Ray cluster for the workers; default: one of this command's own.")]


def tell_made(bundle: Path, run_dir: Path, as_json: bool) -> None:
    """Name what was made, and what to do next."""
    if as_json:
        console.print_json_line({"bundle": bundle, "run": run_dir})
    else:
        console.out.print(f"bundle: {bundle}\nmetrics: {run_dir}\ncheck it: blockrag bundle verify {bundle}")


def check_workers(workers: int) -> None:
    """Raises SetupError for less than one."""
    if workers < 1:
        raise SetupError(f"workers {workers}: must be at least 1")


@contextmanager
def training_workers(ray_address: str, workers: int, *, on_gpus: bool) -> Iterator[None]:
    """Connect this process to the Ray at ``ray_address``; empty: one of this command's own, stopped at the end.

    Import what imports Ray inside. Raises SetupError when Ray Train's packages are absent.
    """
    missing = [package for package in ("pyarrow", "pandas") if importlib.util.find_spec(package) is None]
    if missing:
        absent = ", ".join(missing)
        raise SetupError(f"several workers need Ray Train: install the package ray[train] ({absent} absent)")
    with tempfile.NamedTemporaryFile("w", prefix="blockrag-token-") as token:
        if not ray_address:
            # Ray reads its authentication mode when it is imported; a token of our own leaves none in the user's home
            token.write(secrets.token_hex(32))
            token.flush()
            os.environ.update(RAY_AUTH_MODE="token", RAY_AUTH_TOKEN_PATH=token.name)
        from blockrag.distributed_training.connecting import connected_ray

        with connected_ray(ray_address, workers, on_gpus=on_gpus):
            yield
