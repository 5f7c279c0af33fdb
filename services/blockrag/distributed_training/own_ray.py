"""A Ray of a command's own."""

from __future__ import annotations

import logging
import os
import secrets
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def connected_ray(address: str = "", *, cpus: int = 1, gpus: int = 0) -> Iterator[None]:
    """Connect this process to the Ray at ``address``; empty: one of this command's own, stopped at the end.

    Import what imports Ray inside.
    """
    with tempfile.NamedTemporaryFile("w", prefix="blockrag-token-") as token:
        options: dict[str, Any] = {"address": address}
        if not address:
            # Ray reads its authentication mode when it is imported; a token of our own leaves none in the user's home
            token.write(secrets.token_hex(32))
            token.flush()
            os.environ.update(RAY_AUTH_MODE="token", RAY_AUTH_TOKEN_PATH=token.name)
            options = {"address": "local", "num_cpus": cpus, "num_gpus": gpus, "include_dashboard": False}
            options["object_store_memory"] = 128 * 2**20
        import ray

        ray.init(**options, log_to_driver=False, logging_level=logging.ERROR)
        try:
            yield
        finally:
            ray.shutdown()
