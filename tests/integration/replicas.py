"""Killing replicas of a running system, to see what becomes of the rest."""

from __future__ import annotations

import os
import signal

import ray


def replica_pids(app: str, deployment: str) -> list[int]:
    """Process ids of a deployment's replicas on this machine."""
    prefix = f"SERVE_REPLICA::{app}#{deployment}#"
    names = [each for each in ray.util.list_named_actors(all_namespaces=True) if each["name"].startswith(prefix)]
    actors = [ray.get_actor(each["name"], namespace=each["namespace"]) for each in names]
    return list(ray.get([actor.__ray_call__.remote(lambda _: os.getpid()) for actor in actors], timeout=30))


def kill(pids: list[int]) -> None:
    """Kills replicas as the kernel would, without a chance to say goodbye. Raises when there is none to kill."""
    if not pids:
        raise ValueError("no replica is running")
    for pid in pids:
        os.kill(pid, signal.SIGKILL)
