"""Compiling the kernels, and which compiled library is loaded."""

from __future__ import annotations

import logging
import os
import platform
import shutil
from pathlib import Path

import pytest

from blockrag.modeling.native import build

TARGET = build.TARGETS[-1]
"""Whichever: none of these tests runs what was compiled."""

needs_compiler = pytest.mark.skipif(
    platform.machine() != "x86_64" or not (shutil.which("cc") or shutil.which("gcc")),
    reason="no C compiler for the kernels",
)


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build.library(TARGET, (tmp_path_factory.mktemp("built"),))


@pytest.fixture
def copied(built: Path, tmp_path: Path) -> Path:
    """A library with its record, to be spoilt."""
    for file in (built, built.with_name(f"{built.name}.sha256")):
        shutil.copy(file, tmp_path)
    return tmp_path / built.name


@needs_compiler
def test_the_library_is_built_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = tmp_path / "package", tmp_path / "cache"
    path = build.library(TARGET, (first, second))
    assert path.parent == second
    assert sorted(entry.name for entry in second.iterdir()) == [path.name, f"{path.name}.sha256"]
    monkeypatch.setattr(build, "build", lambda *_: pytest.fail("built again"))
    assert build.library(TARGET, (second, first)) == build.library(TARGET, (first, second)) == path


@needs_compiler
@pytest.mark.parametrize("umask", [0o022, 0o002, 0o000])
def test_a_library_is_trusted_whatever_the_umask(umask: int, tmp_path: Path) -> None:
    before = os.umask(umask)
    try:
        build.check_library(build.library(TARGET, (tmp_path / "cache",)))
    finally:
        os.umask(before)


@needs_compiler
@pytest.mark.parametrize("changed", ["source", "options", "target", "compiler"])
def test_a_library_of_another_version_is_not_taken(
    changed: str, built: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if changed == "source":
        other = tmp_path / "slots.c"
        other.write_bytes(build.SOURCES[0].read_bytes() + b"\n")
        monkeypatch.setattr(build, "SOURCES", (other, *build.SOURCES[1:]))
    elif changed == "options":
        monkeypatch.setattr(build, "_OPTIONS", (*build._OPTIONS, "-DOTHER"))
    elif changed == "compiler":
        monkeypatch.setattr(build, "_compiler_version", lambda: b"another")
    made: list[Path] = []
    monkeypatch.setattr(build, "build", lambda _, path: made.append(path) or path)
    target = build.TARGETS[0] if changed == "target" else TARGET
    assert build.library(target, (built.parent,)) == made[0] != built


@needs_compiler
@pytest.mark.parametrize("compiler", ["", "false"])
def test_where_no_compiler_works_any_compiler_s_library_is_taken(
    compiler: str, built: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CC", compiler)
    monkeypatch.setenv("PATH", str(tmp_path) if not compiler else os.environ["PATH"])
    assert build.library(TARGET, (built.parent, tmp_path)) == built


@needs_compiler
@pytest.mark.parametrize("spoilt", ["content", "record", "no record", "mode", "record's mode", "link", "owner"])
def test_a_library_that_others_may_have_changed_is_built_anew(
    spoilt: str, copied: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    record = copied.with_name(f"{copied.name}.sha256")
    if spoilt == "content":
        copied.write_bytes(copied.read_bytes()[:-1] + b"?")
    elif spoilt == "record":
        record.write_text("0" * 64)
    elif spoilt == "no record":
        record.unlink()
    elif spoilt == "mode":
        copied.chmod(0o664)
    elif spoilt == "record's mode":
        record.chmod(0o646)
    elif spoilt == "link":
        copied.symlink_to(copied.rename(copied.with_suffix(".elsewhere")))
    else:
        monkeypatch.setattr(os, "geteuid", lambda: 4321)
        if os.getuid() == 0:
            os.chown(copied, 1234, -1)
    with pytest.raises(build.UntrustedLibraryError, match=copied.name):
        build.check_library(copied)
    monkeypatch.undo()
    if spoilt == "owner" and os.getuid() != 0:
        return
    with caplog.at_level(logging.WARNING):
        assert build.library(TARGET, (copied.parent,)) == copied
    assert "left alone" in caplog.text
    build.check_library(copied)


@pytest.mark.parametrize(
    ("compiler", "message"),
    [("", "no C compiler"), ("false", "false failed"), ("/nowhere/cc", "/nowhere/cc")],
)
def test_without_a_compiler_that_works(
    compiler: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CC", compiler)
    if not compiler:
        monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(build.CannotBuildError, match=message):
        build.library(TARGET, (tmp_path / "cache",))
    assert not list(tmp_path.glob("cache/*"))


def test_an_image_for_other_processors_builds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(platform, "machine", lambda: "aarch64")
    monkeypatch.setattr(build, "library", lambda *_: pytest.fail("compiled"))
    assert build.main() == 0
    assert "nothing to compile: for x86-64" in capsys.readouterr().out


@pytest.mark.parametrize(("flags", "code"), [("avx512f avx512_bf16", 1), ("avx2 fma", 1), ("avx2 avx512f", 0)])
def test_a_compiler_that_fails_stops_an_image_only_where_the_kernels_would_run(
    flags: str, code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text(f"flags\t\t: {flags} sse2\n")
    monkeypatch.setattr(platform, "machine", lambda: "x86_64")
    monkeypatch.setattr(build, "_CPUINFO", cpuinfo)
    monkeypatch.setattr(build, "_HERE", tmp_path)
    monkeypatch.setenv("CC", "false")
    assert build.main() == code
    written = capsys.readouterr().out
    assert all(f"not compiled for {target.name}: false failed" in written for target in build.TARGETS)


@needs_compiler
def test_an_image_gets_all_libraries_where_its_builder_has_no_instructions(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "cpuinfo").write_text("flags\t\t: sse2\n")
    monkeypatch.setattr(build, "_CPUINFO", tmp_path / "cpuinfo")
    monkeypatch.setattr(build, "_HERE", tmp_path)
    assert build.main() == 0
    libraries = {Path(line) for line in capsys.readouterr().out.splitlines()}
    assert libraries == {build.library(target, (tmp_path,)) for target in build.TARGETS}
    assert len(libraries) == len(build.TARGETS)
    for library in libraries:
        build.check_library(library)
    with pytest.raises(build.CannotBuildError, match="none of AVX-512 BF16, AVX2"):
        build.processor()


@pytest.mark.parametrize(
    ("flags", "names"),
    [
        ("avx2 fma avx512f avx512_bf16", ["AVX-512 BF16", "AVX2 and FMA"]),
        ("avx2 fma avx512f", ["AVX2 and FMA"]),
        ("avx2", []),
        ("fma", []),
    ],
)
def test_the_fastest_that_runs_is_taken(
    flags: str, names: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "cpuinfo").write_text(f"flags\t\t: sse2 {flags}\n")
    monkeypatch.setattr(build, "_CPUINFO", tmp_path / "cpuinfo")
    monkeypatch.setattr(platform, "machine", lambda: "x86_64")
    assert [target.name for target in build.runnable()] == names
    if names:
        assert build.processor().name == names[0]
