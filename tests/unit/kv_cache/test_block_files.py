from __future__ import annotations

import os
import random
import stat
import threading
import time
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from blockrag.errors import DataError
from blockrag.keys import KeyMaker
from blockrag.kv_cache.block_files import (
    UNFINISHED,
    block_paths,
    folder_of,
    move_file,
    purged_folder,
    read_block,
    read_header,
    remove_all,
    remove_file,
    remove_folder,
    write_block,
)
from blockrag.kv_cache.shard import document_of
from blockrag.kv_cache.shard_messages import DocumentId
from blockrag.types import FULL, BlockForm, BlockKV, BlockRequest
from tests.unit.kv_cache.disk_parts import KEYS, arrays_of, assert_same_block, block_of, files, wanted

FORMS = (FULL, BlockForm("compressed", 2), BlockForm("chunks", 2))


def written(root: Path, request: BlockRequest, encode_s: float = 0.5) -> Path:
    path = root / folder_of(document_of(request)) / request.key
    write_block(path, block_of(request), request.tenant, request.form, encode_s)
    return path


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_a_block_of_any_form_is_read_as_it_was_written(form: BlockForm, tmp_path: Path) -> None:
    request = wanted(3, form=form)
    path = written(tmp_path, request, 0.25)
    found = read_block(path, request)
    assert_same_block(found, block_of(request))
    assert not any(array.flags.writeable for array in arrays_of(found))
    header = read_header(path, KEYS)
    assert (header.tenant, header.form, header.encode_s) == ("t", form, 0.25)


def test_float32_is_kept_and_the_size_told(tmp_path: Path) -> None:
    request = wanted(3)
    values = np.random.default_rng(0).standard_normal((2, 3, 2, 5, 8), dtype=np.float32)
    block = BlockKV(request.key, request.token_ids, values[0], values[1])
    nbytes = write_block(tmp_path / request.key, block, "t", FULL, 0.1)
    assert_same_block(read_block(tmp_path / request.key, request), block)
    assert nbytes == (tmp_path / request.key).stat().st_size


def test_eight_bits_are_kept_with_their_scales(tmp_path: Path) -> None:
    request, source = wanted(3), np.random.default_rng(0)
    keys, values = source.integers(-127, 128, (2, 3, 2, 5, 8), dtype=np.int8)
    scales = (
        source.integers(0, 999, (2, 3, 2, 8), dtype=np.uint16),
        source.integers(0, 999, (3, 2, 5), dtype=np.uint16),
    )
    block = BlockKV(request.key, request.token_ids, keys, values, scales)
    nbytes = write_block(tmp_path / request.key, block, "t", FULL, 0.1)
    assert block.nbytes <= nbytes == (tmp_path / request.key).stat().st_size
    found = read_block(tmp_path / request.key, request)
    assert_same_block(found, block)


def test_files_and_folders_are_their_owner_s_alone(tmp_path: Path) -> None:
    path = written(tmp_path, wanted(1))
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700


@given(place=st.floats(0, 1, exclude_max=True), change=st.integers(1, 255))
def test_a_byte_that_changed_anywhere_is_noticed(
    place: float, change: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    request = wanted(1)
    path = written(tmp_path_factory.mktemp("blocks"), request)
    content = bytearray(path.read_bytes())
    content[int(place * len(content))] ^= change
    path.write_bytes(content)
    with pytest.raises(DataError):
        read_block(path, request)


@given(kept=st.floats(0, 1, exclude_max=True), garbage=st.binary(max_size=100))
def test_a_file_that_was_cut_off_or_overwritten_is_noticed(
    kept: float, garbage: bytes, tmp_path_factory: pytest.TempPathFactory
) -> None:
    request = wanted(1)
    path = written(tmp_path_factory.mktemp("blocks"), request)
    content = path.read_bytes()
    for damaged in (content[: int(kept * len(content))], content + b"x", garbage):
        path.write_bytes(damaged)
        with pytest.raises(DataError):
            read_block(path, request)
        with pytest.raises(DataError):
            read_header(path, KEYS)


def test_files_that_are_damaged_while_they_are_read(tmp_path: Path) -> None:
    """Whatever happens to a file meanwhile, what is read is the block or nothing; and it is nobody's end."""
    requests = [wanted(number) for number in range(1, 5)]
    paths = [written(tmp_path, request) for request in requests]
    blocks = [read_block(path, request) for path, request in zip(paths, requests, strict=True)]
    whole, stop = [path.read_bytes() for path in paths], threading.Event()

    def damage() -> None:
        draw = random.Random(0)
        while not stop.is_set():
            number = draw.randrange(len(paths))
            path, content = paths[number], bytearray(whole[number])
            kind = draw.randrange(5)
            if kind == 0:
                os.truncate(path, draw.randrange(len(content)))
            elif kind == 1:
                content[draw.randrange(len(content))] ^= 1 + draw.randrange(255)
                path.write_bytes(content)
            elif kind == 2:
                path.write_bytes(draw.choice(whole))
            else:
                path.write_bytes(content)

    damaging = threading.Thread(target=damage)
    damaging.start()
    right = wrong = 0
    try:
        until = time.monotonic() + 2
        while time.monotonic() < until:
            for path, request, block in zip(paths, requests, blocks, strict=True):
                try:
                    found = read_block(path, request)
                except DataError:
                    wrong += 1
                else:
                    assert_same_block(found, block)
                    right += 1
    finally:
        stop.set()
        damaging.join()
    assert right
    assert wrong


def test_what_was_read_stays_when_the_file_is_cut_off(tmp_path: Path) -> None:
    request = wanted(1)
    path = written(tmp_path, request)
    found = read_block(path, request)
    os.truncate(path, 0)  # of a mapping nothing could be read any more
    assert_same_block(found, read_block(written(tmp_path, request), request))


def test_a_file_of_another_block_is_not_the_one_asked_for(tmp_path: Path) -> None:
    request, other = wanted(1), wanted(2)
    path = written(tmp_path, request)
    renamed = path.with_name(other.key)
    path.rename(renamed)
    for asked in (other, request, replace(other, tenant="u"), replace(other, form=BlockForm("compressed", 2))):
        with pytest.raises(DataError, match="another"):
            read_block(renamed, asked)
    with pytest.raises(DataError):
        read_header(renamed, KEYS)


@pytest.mark.parametrize(
    "keys",
    [KeyMaker("new weights", b"secret", "c"), KeyMaker("fingerprint", b"new secret", "compression")],
    ids=["weights", "secret"],
)
def test_a_file_of_other_weights_or_another_secret_is_known_by_its_name(keys: KeyMaker, tmp_path: Path) -> None:
    path = written(tmp_path, wanted(1))
    with pytest.raises(DataError, match="other weights"):
        read_header(path, keys)


def test_a_form_that_the_bundle_no_longer_has_is_of_no_use(tmp_path: Path) -> None:
    path = written(tmp_path, wanted(1, form=FORMS[1]))
    with pytest.raises(DataError):
        read_header(path, KeyMaker("fingerprint", b"secret"))


def test_documents_and_collections_have_folders(tmp_path: Path) -> None:
    for document_id in ("d", "e"):
        written(tmp_path, wanted(1, document_id))
    elsewhere = written(tmp_path, wanted(2, collection="x"))
    nowhere = written(tmp_path, wanted(3, "", collection=""))
    assert len(list(block_paths(tmp_path))) == 4
    remove_folder(tmp_path, purged_folder(DocumentId("t", "c", "d")))
    assert len(list(block_paths(tmp_path))) == 3
    remove_folder(tmp_path, purged_folder(DocumentId("t", "c", "")))
    assert set(block_paths(tmp_path)) == {elsewhere, nowhere}
    remove_folder(tmp_path, purged_folder(DocumentId("t", "c", "")))
    remove_file(elsewhere)
    remove_file(elsewhere)
    assert not elsewhere.parent.parent.exists()
    assert nowhere.exists()


def test_what_others_keep_in_the_folder_stays(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("x")
    (tmp_path / "0123456789abcdef-mine").mkdir()
    path = written(tmp_path, wanted(1))
    (path.parent / "notes").write_text("x")
    unfinished = path.with_name(path.name + UNFINISHED)
    unfinished.write_bytes(b"x")
    (path.parent / ("a" * 40)).symlink_to(tmp_path / "mine.txt")
    assert set(block_paths(tmp_path)) == {path, unfinished}
    remove_all(tmp_path)
    assert {each.name for each in tmp_path.iterdir()} == {"mine.txt", "0123456789abcdef-mine"}
    remove_all(tmp_path / "missing")


def test_a_write_that_fails_leaves_nothing(tmp_path: Path) -> None:
    request = wanted(1)
    path = tmp_path / request.key
    path.mkdir()
    (path / "in the way").write_text("x")
    with pytest.raises(OSError, match="irectory"):
        write_block(path, block_of(request), "t", FULL, 0.1)
    assert files(tmp_path) == [path / "in the way"]


def purging(monkeypatch: pytest.MonkeyPatch, root: Path, times: int) -> None:
    """Another shard removes all folders before a file gets its name, so many times."""
    replace_file, left = Path.replace, [None] * times

    def after_a_purge(path: Path, target: Path) -> Path:
        if left:
            left.pop()
            remove_folder(root, target.relative_to(root).parts[0])
        return replace_file(path, target)

    monkeypatch.setattr(Path, "replace", after_a_purge)


def test_a_folder_that_is_purged_by_another_shard_while_a_block_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    purging(monkeypatch, tmp_path, 2)
    path = written(tmp_path, wanted(3))
    assert_same_block(read_block(path, wanted(3)), block_of(wanted(3)))
    assert files(tmp_path) == [path]


@pytest.mark.parametrize(("times", "moved"), [(0, True), (1, True), (99, False)])
def test_a_file_is_at_its_new_place_or_nowhere(
    times: int, moved: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = written(tmp_path / "from", wanted(3))
    target = tmp_path / "to" / folder_of(DocumentId("t", "c", "other")) / path.name
    purging(monkeypatch, tmp_path, times)
    with nullcontext() if moved else pytest.raises(FileNotFoundError):
        move_file(path, target)
    assert files(tmp_path) == ([target] if moved else [])


def test_a_link_is_not_followed(tmp_path: Path) -> None:
    request = wanted(1)
    target = written(tmp_path / "elsewhere", request)
    link = tmp_path / request.key
    link.symlink_to(target)
    with pytest.raises(OSError, match="symbolic"):
        read_block(link, request)
    outside = tmp_path / "outside"
    link.with_name(request.key + UNFINISHED).symlink_to(outside)
    write_block(link, block_of(request), "t", FULL, 0.1)
    assert not outside.exists()
    assert not link.is_symlink()
