"""The Ray that training workers run on."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

import ray


@contextmanager
def connected_ray(address: str, workers: int, *, on_gpus: bool) -> Iterator[None]:
    """Connect this process to the Ray at ``address``; empty: start one with room for ``workers``, and stop it after."""
    if address:
        ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
    else:
        ray.init(
            address="local",
            num_cpus=workers + 1,  # one for Ray Train's controller
            num_gpus=workers if on_gpus else 0,
            include_dashboard=False,
            log_to_driver=False,
            logging_level=logging.ERROR,
            object_store_memory=128 * 2**20,
        )
    try:
        yield
    finally:
        ray.shutdown()
