"""The C code under the address and undefined-behaviour sanitizers."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from blockrag.modeling.native import build

SANITIZED = ("-O1", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer")
COMPILER = shutil.which("gcc") or shutil.which("cc")


@pytest.fixture(scope="module", params=build.TARGETS, ids=lambda target: target.name)
def driver(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    if COMPILER is None:
        pytest.skip("no C compiler")
    folder = tmp_path_factory.mktemp("sanitized")
    empty = folder / "empty.c"
    empty.write_text("int main(void) { return 0; }")
    tried = subprocess.run([COMPILER, *SANITIZED, "-o", str(folder / "empty"), str(empty)], capture_output=True)
    if tried.returncode:
        pytest.skip("the compiler has no sanitizers")
    target: build.Target = request.param
    try:
        if target not in build.runnable():
            pytest.skip(f"the processor has no {target.name}")
    except build.CannotBuildError as error:
        pytest.skip(str(error))
    made = folder / "driver"
    sources = [*map(str, build.SOURCES), str(Path(__file__).with_name("native_driver.c"))]
    subprocess.run(
        [COMPILER, *SANITIZED, "-std=gnu11", "-fopenmp", *target.options, "-o", str(made), *sources], check=True
    )
    return made


def run(driver: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    # what the OpenMP runtime keeps until the end is no leak of ours
    environment = {"ASAN_OPTIONS": "detect_leaks=0:abort_on_error=0", "OMP_NUM_THREADS": "2"}
    return subprocess.run([driver, *arguments], capture_output=True, text=True, env=environment, timeout=120)


def test_nothing_beyond_the_buffers_is_touched(driver: Path) -> None:
    watched = run(driver)
    assert watched.returncode == 0, watched.stderr
    assert watched.stdout == "356 calls\n"


@pytest.mark.parametrize("function", ["attend", "step", "between"])
def test_a_slot_too_many_is_found(function: str, driver: Path) -> None:
    watched = run(driver, function)
    assert watched.returncode != 0
    assert "heap-buffer-overflow" in watched.stderr
