"""Blocks as files: one file a block, one folder a document, checked before use.

A file's path is ``<tenant>/<collection>/<document>/<key>``, the first three as hashes, so that whatever belongs to a
document or a collection can be removed without any record beside the files. A file is::

    prefix   magic, CRC-32 of all that follows it, bytes of the header, bytes of the arrays (little endian)
    header   JSON: tenant, form, what it cost to encode, token ids, shapes; spaces up to a multiple of 64 bytes
    arrays   K and V before rotation and, of int8, their scales, or the chunks' embeddings

Its key can be made anew from the header (tenant, form, token ids) and a ``KeyMaker``: a file of other weights, another
template or another secret has another key than its name says.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
import struct
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from blockrag.errors import DataError
from blockrag.keys import KeyMaker
from blockrag.kv_cache.shard_messages import DocumentId
from blockrag.types import BlockForm, BlockKV, BlockRequest, CachedBlock, ChunkEmbeddings

UNFINISHED = ".part"
"""Ends the name of a file that is being written; the name without it is a whole file, or none."""
_MAGIC = b"blockkv2"
_PREFIX = struct.Struct("<8sIIQ")
_CRC_FROM = 12
"""The checksum counts everything from here: the sizes too."""
_ALIGNMENT = 64
_DTYPES = ("<u2", "<f4", "|i1")
_FOLDER = re.compile(r"[0-9a-f]{16}")
_KEY = re.compile(r"[0-9a-f]{40}")
_MOST_HEADER_BYTES = 4 * 2**20
_TRIES = 5


@dataclass(frozen=True)
class BlockHeader:
    """What a file says of its block."""

    tenant: str
    form: BlockForm
    encode_s: float
    """Seconds that encoding it took."""
    token_ids: NDArray[np.int32]
    shapes: tuple[tuple[int, ...], ...]
    dtypes: tuple[str, ...]

    @property
    def sizes(self) -> list[int]:
        """Bytes of each array."""
        return [
            int(np.prod(shape)) * np.dtype(dtype).itemsize
            for shape, dtype in zip(self.shapes, self.dtypes, strict=True)
        ]


@lru_cache(maxsize=4096)
def folder_of(document: DocumentId) -> str:
    """Path of the folder, under the cache's, of a document's blocks. Blocks of no document have one too."""
    return "/".join(hashlib.blake2b(part.encode(), digest_size=8).hexdigest() for part in document)


def purged_folder(document: DocumentId) -> str:
    """Path of the folder that a purge is about: the document's, or its collection's when it names none."""
    folder = folder_of(document)
    return folder if document.document_id else folder.rpartition("/")[0]


def most_header_bytes(tokens: int) -> int:
    """What a file may take beside its arrays."""
    return 512 + 12 * tokens


def packed(block: CachedBlock, tenant: str, form: BlockForm, encode_s: float) -> list[bytes | memoryview]:
    """The bytes of a block's file, in parts."""
    arrays = [np.ascontiguousarray(array) for array in _arrays(block)]
    described = {
        "tenant": tenant,
        "form": [form.kind, form.chunk_tokens],
        "encode_s": encode_s,
        "token_ids": block.token_ids.tolist(),
        "shapes": [array.shape for array in arrays],
        "dtypes": [array.dtype.str for array in arrays],
    }
    header = json.dumps(described).encode()
    header += b" " * (-(_PREFIX.size + len(header)) % _ALIGNMENT)
    payload = sum(array.nbytes for array in arrays)
    checksum = zlib.crc32(_PREFIX.pack(_MAGIC, 0, len(header), payload)[_CRC_FROM:])
    parts: list[bytes | memoryview] = [header, *map(_bytes, arrays)]
    for part in parts:
        checksum = zlib.crc32(part, checksum)
    return [_PREFIX.pack(_MAGIC, checksum, len(header), payload), *parts]


def unpacked(content: bytes, request: BlockRequest) -> tuple[CachedBlock, float]:
    """The block asked for, in read-only views of a file's bytes, and the seconds that encoding it took.

    Raises ``DataError`` for a file that is damaged or holds another block.
    """
    header, start = _parsed(content, len(content))
    magic, checksum, _, _ = _PREFIX.unpack_from(content)
    if zlib.crc32(memoryview(content)[_CRC_FROM:]) != checksum or magic != _MAGIC:
        raise DataError("the checksum is another")
    if (
        header.tenant != request.tenant
        or header.form != request.form
        or not np.array_equal(header.token_ids, request.token_ids)
    ):
        raise DataError("holds another block")
    found = []
    for shape, dtype in zip(header.shapes, header.dtypes, strict=True):
        array = np.frombuffer(content, dtype, int(np.prod(shape)), start).reshape(shape)
        found.append(array)
        start += array.nbytes
    if header.form.kind == "chunks":
        return ChunkEmbeddings(request.key, header.token_ids, found[0]), header.encode_s
    scales = (found[2], found[3]) if found[2:] else None
    return BlockKV(request.key, header.token_ids, found[0], found[1], scales), header.encode_s


def write_block(path: Path, block: CachedBlock, tenant: str, form: BlockForm, encode_s: float) -> int:
    """Writes a block; whole or not at all. Its bytes. Raises ``OSError``; then nothing is left."""
    parts = packed(block, tenant, form, encode_s)
    unfinished = path.with_name(path.name + UNFINISHED)

    def write() -> None:
        with _new_file(unfinished) as file:
            for part in parts:
                file.write(part)
        unfinished.replace(path)

    try:
        _in_folder_of(path, write)
    except BaseException:
        with contextlib.suppress(OSError):
            unfinished.unlink()
        raise
    return sum(len(part) for part in parts)


def read_block(path: Path, request: BlockRequest) -> CachedBlock:
    """The block asked for, in read-only views of the file's bytes.

    Raises ``DataError`` for a file that is damaged or holds another block, ``OSError`` for one that cannot be read.
    """
    if path.name != request.key:
        raise DataError(f"{path}: named as another block")
    try:
        return unpacked(_read(path), request)[0]
    except DataError as error:
        raise DataError(f"{path}: {error}") from error


def read_header(path: Path, keys: KeyMaker) -> BlockHeader:
    """The header of a file whose name is the key that ``keys`` makes of it; its arrays are not looked at.

    Raises ``DataError`` for any other file, ``OSError`` for one that cannot be read.
    """
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        start = file.read(_PREFIX.size)
        if len(start) == _PREFIX.size:
            start += file.read(min(_PREFIX.unpack(start)[2], _MOST_HEADER_BYTES))
    header, _ = _parsed(start, size)
    try:
        key = keys.block_key(header.tenant, header.token_ids, header.form)
    except ValueError as error:
        raise DataError(f"{path}: {error}") from error
    if key != path.name:
        raise DataError(f"{path}: of other weights, another template or another secret")
    return header


def block_paths(root: Path) -> Iterator[Path]:
    """All files below the cache's folder that are named as blocks are, unfinished ones too; nothing else."""
    for folder in _folders(root, 3):
        with contextlib.suppress(FileNotFoundError), os.scandir(folder) as entries:
            for entry in entries:
                if _KEY.fullmatch(entry.name.removesuffix(UNFINISHED)) and entry.is_file(follow_symlinks=False):
                    yield Path(entry.path)


def move_file(path: Path, target: Path) -> None:
    """Gives a block's file to another document. Raises ``OSError``; then it is removed, as no purge would find it."""
    try:
        _in_folder_of(target, lambda: path.replace(target))
    except OSError:
        remove_file(path)
        raise


def remove_file(path: Path) -> None:
    """Removes a block's file and the folders that this leaves empty. A file that is gone already is no error."""
    path.unlink(missing_ok=True)
    with contextlib.suppress(OSError):  # not empty
        for folder in list(path.parents)[:3]:
            folder.rmdir()


def remove_folder(root: Path, folder: str) -> None:
    """Removes a document's or a collection's folder; once this returns it is gone after a power cut too.

    Raises ``OSError``. A folder that is not there is no error.
    """
    path = root / folder
    if not os.path.lexists(path):  # or nothing can be looked for there, and so nothing was ever written
        return
    # another shard may be writing into it; it will be told of the purge as well
    for attempts_left in reversed(range(_TRIES)):
        try:
            shutil.rmtree(path)
            break
        except FileNotFoundError:
            break
        except OSError:
            if not attempts_left:
                raise
    with contextlib.suppress(FileNotFoundError):
        handle = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def remove_all(root: Path) -> None:
    """Removes every folder of blocks below the cache's; what else is there stays. Raises ``OSError``."""
    for folder in _folders(root, 1):
        with contextlib.suppress(FileNotFoundError):
            shutil.rmtree(folder)


def _folders(root: Path, depth: int) -> Iterator[Path]:
    if not depth:
        yield root
        return
    with contextlib.suppress(FileNotFoundError), os.scandir(root) as entries:
        for entry in entries:
            if _FOLDER.fullmatch(entry.name) and entry.is_dir(follow_symlinks=False):
                yield from _folders(Path(entry.path), depth - 1)


def _arrays(block: CachedBlock) -> Sequence[NDArray[Any]]:
    return [block.keys, block.values, *(block.scales or ())] if isinstance(block, BlockKV) else [block.embeddings]


def _bytes(array: NDArray[Any]) -> memoryview:
    return array.reshape(-1).view(np.uint8).data


def _new_file(path: Path) -> Any:
    def opener(name: str, flags: int) -> int:
        return os.open(name, flags | os.O_NOFOLLOW, 0o600)

    path.unlink(missing_ok=True)
    return open(path, "xb", buffering=0, opener=opener)


def _in_folder_of(path: Path, call: Callable[[], object]) -> None:
    """Makes a file's folder, then calls; and again where another shard removes the folder meanwhile, because it is
    empty or purged."""
    for tries_left in reversed(range(_TRIES)):
        try:
            path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            call()
            return
        except (FileNotFoundError, FileExistsError):  # the latter too is what mkdir raises then
            if not tries_left:
                raise


def _read(path: Path) -> bytes:
    """Not through a mapping: a bad sector, or a file that is cut off meanwhile, would end the process (SIGBUS)."""
    with os.fdopen(os.open(path, os.O_RDONLY | os.O_NOFOLLOW), "rb", buffering=0) as file:
        return file.read()


def _parsed(start: bytes, size: int) -> tuple[BlockHeader, int]:
    """The header of a file of ``size`` bytes that begins so, and where its arrays begin. Raises ``DataError``."""
    if len(start) < _PREFIX.size:
        raise DataError("a block's file is cut off")
    magic, _, header_bytes, payload = _PREFIX.unpack_from(start)
    arrays_from = _PREFIX.size + header_bytes
    if magic != _MAGIC or arrays_from + payload != size or header_bytes > _MOST_HEADER_BYTES:
        raise DataError("a block's file is cut off, or no block's file")
    try:
        found = json.loads(start[_PREFIX.size : arrays_from])
        header = BlockHeader(
            str(found["tenant"]),
            BlockForm(found["form"][0], int(found["form"][1])),
            float(found["encode_s"]),
            np.array(found["token_ids"], dtype=np.int32),
            tuple(tuple(int(side) for side in shape) for shape in found["shapes"]),
            tuple(map(str, found["dtypes"])),
        )
        counts = (1,) if header.form.kind == "chunks" else (2, 4)
        if not set(header.dtypes) <= set(_DTYPES) or len(header.shapes) not in counts:
            raise ValueError("unknown arrays")
        if min((min(shape, default=0) for shape in header.shapes), default=-1) < 0 or not header.encode_s >= 0:
            raise ValueError("negative sizes")
        if sum(header.sizes) != payload:
            raise ValueError("other sizes")
    except (ValueError, KeyError, TypeError, IndexError, OverflowError) as error:
        raise DataError(f"a block's file has a header that says nothing: {error}") from error
    return header, arrays_from
