"""An adapter trained by two processes over FSDP2 is the one that a single process trains."""

from __future__ import annotations

import os
import pickle
import socket
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from blockrag.errors import SetupError
from blockrag.modeling.adapter import read_adapter
from blockrag.modeling.bundle import load_bundle
from blockrag.modeling.verify import verify_bundle
from blockrag.training.adaptation.block import adapt_block, prepare
from blockrag.training.adaptation.block_config import BlockAdaptConfig

_WORKER = """
import pickle, sys
import torch
import torch.distributed as dist
from blockrag.training.workers import ShardedWorkers
from blockrag.training.adaptation.block import adapt_block
with open(sys.argv[1], "rb") as file:
    config = pickle.load(file)
dist.init_process_group("gloo")
adapt_block(config, ShardedWorkers(torch.device("cpu")))
dist.destroy_process_group()
"""


def test_two_workers_train_the_same_adapter(config: Callable[..., BlockAdaptConfig], tmp_path: Path) -> None:
    one = config(lora_rank=4, questions=4, masks="mixed", batch_size=6, micro_batch=1, steps=3, out=tmp_path / "one")
    two = replace(one, out=tmp_path / "two")
    (tmp_path / "config").write_bytes(pickle.dumps(two))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", _WORKER, str(tmp_path / "config")]
    workers = [subprocess.Popen(command, env={**os.environ, **address, "RANK": str(rank)}) for rank in range(2)]
    try:
        adapt_block(one)
        assert [worker.wait(timeout=110) for worker in workers] == [0, 0]
    finally:
        for worker in workers:
            worker.kill()
            worker.wait()

    alone, shared = read_adapter(one.out / "adapter"), read_adapter(two.out / "adapter")
    assert alone.tensors.keys() == shared.tensors.keys()
    for name, pair in alone.tensors.items():
        for expected, got in zip(pair, shared.tensors[name], strict=True):
            torch.testing.assert_close(got, expected, rtol=1e-2, atol=1e-4)
    assert verify_bundle(load_bundle(two.out)).passed


def test_passes_that_workers_would_make_in_different_numbers_are_refused(
    config: Callable[..., BlockAdaptConfig],
) -> None:
    with pytest.raises(SetupError, match="micro_batch 2: masks 'mixed' on several workers take 1"):
        prepare(config(masks="mixed", micro_batch=2), workers=2)
