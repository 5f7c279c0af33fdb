"""Imports after which copies of a process are as good as new ones."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from blockrag.local.local_system import _supervisor_environment
from blockrag.settings import load_settings

_CHECKED = """
import os, sys
from blockrag.local.inert import LIGHT, WHOLE, NotInertError, check_inert, import_inert
import_inert([*LIGHT, *WHOLE])
check_inert()
assert not {"RAY_JOB_ID", "RAY_RAYLET_PID"} & set(os.environ)
assert "pandas" not in sys.modules
from ray import ActorClassID, UniqueID
import ray.actor
assert ray.actor.ActorClassID is ActorClassID
import threading
end = threading.Event()
thread = threading.Thread(target=end.wait)
for prepare in (thread.start, lambda: (end.set(), thread.join(), UniqueID.from_random())):
    prepare()
    try:
        check_inert()
    except NotInertError as error:
        print(error)
"""


def test_copies_share_nothing_unless_something_was_used_before(tmp_path: Path) -> None:
    environment = _supervisor_environment(load_settings(environment={"BLOCKRAG_CLUSTER__STATE_DIR": str(tmp_path)}))
    done = subprocess.run(
        [sys.executable, "-c", _CHECKED], capture_output=True, text=True, timeout=300, check=False, env=environment
    )
    assert not done.returncode, done.stderr
    assert done.stdout.splitlines() == ["2 threads, of which a copy would have one", "copies would draw the same ids"]
