"""Bundles: a directory with everything that reads and answers, checked before it is used.

::

    manifest.json           format, name, version, template, sizes, SHA-256 of every file, quality, training;
                            optionally pear, the coefficients that are folded into the weights whenever they are
                            loaded, and refrag, what chunks are compressed with
    decoder/                a Hugging Face checkpoint with its tokenizer
    chunk_encoder/          with refrag: a Hugging Face encoder, which may bring its tokenizer
    projector.safetensors   with refrag: from a chunk embedding to an input embedding of the decoder
    policy-NAME.safetensors with refrag: policies that choose the chunks to expand
    MODEL_CARD.md
"""

from __future__ import annotations

import hashlib
import json
import re
import struct
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from transformers import PreTrainedTokenizerFast

from blockrag.errors import BundleError
from blockrag.modeling.pear import PearRecord
from blockrag.modeling.refrag.parts import check_fingerprints, check_parts, is_refrag_file
from blockrag.modeling.refrag.record import CHUNK_ENCODER_DIR, PROJECTOR_FILE, RefragRecord
from blockrag.modeling.template import PromptTemplate

FORMAT = 1
DEFAULT_BUNDLE = Path(__file__).resolve().parent.parent / "bundles" / "reader"
"""The reader that ships with blockrag."""
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}

_SPECIAL = re.compile(r"<\|[^<>|]+\|>")
_KEYS: dict[str, type] = {
    "format": int,
    "name": str,
    "version": str,
    "template": dict,
    "chunk_tokens": int,
    "passage_tokens": int,
    "max_context_tokens": int,
    "files": dict,
    "quality": dict,
    "training": dict,
}
_OPTIONAL_KEYS: dict[str, type] = {"pear": dict, "refrag": dict}
_REQUIRED_FILES = ("decoder/config.json", "decoder/tokenizer.json")


@dataclass(frozen=True)
class Bundle:
    """A checked directory. Nothing heavy is loaded yet."""

    path: Path
    name: str
    version: str
    template: PromptTemplate
    chunk_tokens: int
    """Tokens of a chunk (k); the last one of a block may have fewer."""
    passage_tokens: int
    """Most tokens of a passage's block."""
    max_context_tokens: int
    """Longest prompt and answer that the decoder was made for."""
    vocab_size: int
    """Rows of the decoder's embedding."""
    files: Mapping[str, str]
    """Relative path to SHA-256, hex."""
    compute_dtype: str = "float32"
    kv_dtype: str = "float32"
    quality: Mapping[str, Any] = field(default_factory=dict)
    training: Mapping[str, Any] = field(default_factory=dict)
    pear: PearRecord | None = None
    """Coefficients of heads; ``load_stock_model`` folds them into the weights."""
    refrag: RefragRecord | None = None
    """What chunks are compressed with, if the bundle can compress."""

    @property
    def decoder_dir(self) -> Path:
        """Directory of the Hugging Face checkpoint."""
        return self.path / "decoder"

    @property
    def chunk_encoder_dir(self) -> Path:
        """Directory of the chunk encoder, when ``refrag`` is there."""
        return self.path / CHUNK_ENCODER_DIR

    @property
    def projector_file(self) -> Path:
        """The projector's weights, when ``refrag`` is there."""
        return self.path / PROJECTOR_FILE

    def policy_file(self, name: str) -> Path:
        """Weights of the policy ``name``. Raises BundleError when the bundle has no such policy."""
        policies = self.refrag.policies if self.refrag is not None else {}
        if name not in policies:
            known = ", ".join(policies) or "none"
            raise BundleError(f"{self.path}: no policy {name!r}; the bundle's policies: {known}")
        return self.path / policies[name].file

    @property
    def fingerprint(self) -> str:
        """40 hex digits over everything that K and V of full blocks depend on: decoder, template, dtypes.

        Not over the bundle's place, name, quality, model card or what it compresses chunks with.
        """
        return _hashed({**self._decoder_content(), "compute_dtype": self.compute_dtype, "kv_dtype": self.kv_dtype})

    @property
    def decoder_fingerprint(self) -> str:
        """40 hex digits over the decoder's files, its coefficients and the template: what was trained, in any dtype."""
        return _hashed(self._decoder_content())

    @property
    def compression_fingerprint(self) -> str:
        """40 hex digits over everything that compressed blocks and chunk embeddings depend on.

        Raises BundleError when the bundle has no chunk compression.
        """
        return _hashed({"fingerprint": self.fingerprint, **self._compression_content()})

    @property
    def policy_basis(self) -> str:
        """40 hex digits over what a policy was trained with: decoder, chunk encoder, projector and k, in any dtype.

        Raises BundleError when the bundle has no chunk compression.
        """
        return _hashed({"decoder": self.decoder_fingerprint, **self._compression_content()})

    def _decoder_content(self) -> dict[str, Any]:
        content: dict[str, Any] = {
            "format": FORMAT,
            "files": {name: self.files[name] for name in sorted(self.files) if name.startswith("decoder/")},
            "template": self.template.to_dict(),
        }
        if self.pear is not None:
            content["pear"] = sorted((head.layer, head.head, float(head.tau)) for head in self.pear.heads)
        return content

    def _compression_content(self) -> dict[str, Any]:
        if self.refrag is None:
            raise BundleError(f"{self.path}: the bundle has no chunk compression (refrag)")
        return {
            "chunk_tokens": self.chunk_tokens,
            "alignment": self.refrag.alignment,
            "pooling": self.refrag.pooling,
            "parts": {name: self.files[name] for name in sorted(self.files) if is_refrag_file(name)},
        }

    def load_tokenizer(self) -> PreTrainedTokenizerFast:
        """The bundle's tokenizer. Raises BundleError when it does not fit the decoder or the template."""
        try:
            # tokenizer.json as it stands; a class chosen by the model's type may add tokens of its own
            tokenizer: PreTrainedTokenizerFast = PreTrainedTokenizerFast.from_pretrained(
                self.decoder_dir, local_files_only=True
            )
        except Exception as error:  # the tokenizers library raises bare Exception
            raise BundleError(f"{self.decoder_dir}: the tokenizer does not load: {error}") from error
        _check_tokenizer(tokenizer, self.template, self.vocab_size, self.decoder_dir)
        return tokenizer


def load_bundle(
    path: str | Path,
    *,
    verify_files: bool = True,
    compute_dtype: str = "float32",
    kv_dtype: str = "float32",
) -> Bundle:
    """Check the directory ``path``.

    ``verify_files`` reads every file to compare its SHA-256; without it only presence and the lengths that
    safetensors headers promise are checked. The dtypes are what the model will be loaded with: the fingerprint counts
    them. Raises BundleError naming the file and the problem.
    """
    root = Path(path).expanduser()
    for dtype in (compute_dtype, kv_dtype):
        if dtype not in DTYPES:
            raise BundleError(f"dtype {dtype!r}: must be one of {', '.join(DTYPES)}")
    manifest = _read_manifest(root)
    template = _read_template(root, manifest["template"])
    files = _check_files(root, manifest["files"], verify_files=verify_files)
    config = _read_json(root / "decoder" / "config.json")
    vocab_size = config.get("vocab_size")
    if not isinstance(vocab_size, int) or vocab_size <= 0:
        raise BundleError(f"{root / 'decoder' / 'config.json'}: no vocab_size")
    bundle = Bundle(
        path=root.resolve(),
        name=manifest["name"],
        version=manifest["version"],
        template=template,
        chunk_tokens=manifest["chunk_tokens"],
        passage_tokens=manifest["passage_tokens"],
        max_context_tokens=manifest["max_context_tokens"],
        vocab_size=vocab_size,
        files=files,
        compute_dtype=compute_dtype,
        kv_dtype=kv_dtype,
        quality=manifest["quality"],
        training=manifest["training"],
        pear=PearRecord.from_dict(manifest["pear"], str(root / "manifest.json")) if "pear" in manifest else None,
        refrag=_read_refrag(root, manifest, files, config, verify_files) if "refrag" in manifest else None,
    )
    if bundle.refrag is not None:
        check_fingerprints(root, bundle.refrag, bundle.decoder_fingerprint, bundle.policy_basis)
    return bundle


def file_sha256(path: Path) -> str:
    """Hex SHA-256 of a file."""
    with path.open("rb") as source:
        return hashlib.file_digest(source, "sha256").hexdigest()


def _read_json(path: Path) -> dict[str, Any]:
    try:
        loaded = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise BundleError(f"{path}: missing") from error
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise BundleError(f"{path}: {error}") from error
    if not isinstance(loaded, dict):
        raise BundleError(f"{path}: must hold a JSON object")
    return loaded


def _read_manifest(root: Path) -> dict[str, Any]:
    if not root.is_dir():
        raise BundleError(f"{root}: no such directory")
    path = root / "manifest.json"
    manifest = _read_json(path)
    if manifest.get("format") != FORMAT:
        raise BundleError(f"{path}: format {manifest.get('format')!r} is unknown; this version reads {FORMAT}")
    unknown = sorted(set(manifest) - set(_KEYS) - set(_OPTIONAL_KEYS))
    missing = sorted(set(_KEYS) - set(manifest))
    if unknown:
        raise BundleError(f"{path}: unknown keys: {', '.join(unknown)}")
    if missing:
        raise BundleError(f"{path}: missing keys: {', '.join(missing)}")
    for key, kind in {**_KEYS, **_OPTIONAL_KEYS}.items():
        if key not in manifest:
            continue
        value = manifest[key]
        if not isinstance(value, kind) or isinstance(value, bool):
            raise BundleError(f"{path}: {key} must be of type {kind.__name__}")
        if isinstance(value, int) and value <= 0:
            raise BundleError(f"{path}: {key} must be positive")
    return manifest


def _read_template(root: Path, values: dict[str, Any]) -> PromptTemplate:
    path = root / "manifest.json"
    names = {item.name for item in fields(PromptTemplate)}
    if set(values) != names:
        wrong = ", ".join(sorted(set(values) ^ names))
        raise BundleError(f"{path}: template must have the keys {', '.join(sorted(names))}; wrong: {wrong}")
    if not all(isinstance(value, str) for value in values.values()):
        raise BundleError(f"{path}: template texts must be strings")
    for name, needed in (("passage", "{text}"), ("final", "{question}")):
        if needed not in values[name]:
            raise BundleError(f"{path}: template.{name} lacks {needed}")
    if not values["end"]:
        raise BundleError(f"{path}: template.end is empty")
    return PromptTemplate(**values)


def _read_refrag(
    root: Path, manifest: Mapping[str, Any], files: Mapping[str, str], config: Mapping[str, Any], verify_files: bool
) -> RefragRecord:
    record = RefragRecord.from_dict(manifest["refrag"], str(root / "manifest.json"))
    check_parts(
        root,
        record,
        files,
        decoder_config=config,
        chunk_tokens=manifest["chunk_tokens"],
        read_weights=verify_files,
    )
    return record


def _hashed(content: Mapping[str, Any]) -> str:
    encoded = json.dumps(content, sort_keys=True, ensure_ascii=True).encode()
    return hashlib.blake2b(encoded, digest_size=20, person=b"blockrag-bundle").hexdigest()


def _check_files(root: Path, listed: dict[str, Any], *, verify_files: bool) -> dict[str, str]:
    for name in _REQUIRED_FILES:
        if name not in listed:
            raise BundleError(f"{root / 'manifest.json'}: files lacks {name}")
    if not any(name.endswith(".safetensors") for name in listed):
        raise BundleError(f"{root / 'manifest.json'}: files lacks weights (*.safetensors)")
    for name, digest in listed.items():
        place = PurePosixPath(name)
        if place.is_absolute() or ".." in place.parts:
            raise BundleError(f"{root / 'manifest.json'}: file {name!r} is outside the bundle")
        if not isinstance(digest, str) or not re.fullmatch(r"[0-9a-f]{64}", digest):
            raise BundleError(f"{root / 'manifest.json'}: file {name!r} has no SHA-256")
        path = root / place
        if not path.is_file():
            raise BundleError(f"{path}: missing")
        if name.endswith(".safetensors"):
            _check_safetensors(path)
        if verify_files and file_sha256(path) != digest:
            raise BundleError(f"{path}: content differs from the manifest (SHA-256)")
    return dict(listed)


def _check_safetensors(path: Path) -> None:
    """The header says how long the file must be; see the safetensors format."""
    size = path.stat().st_size
    try:
        with path.open("rb") as source:
            (length,) = struct.unpack("<Q", source.read(8))
            if length > size:
                raise BundleError(f"{path}: truncated: {size} bytes, header of {length}")
            header = json.loads(source.read(length))
        ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
    except (struct.error, ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        raise BundleError(f"{path}: no safetensors header: {error}") from error
    expected = 8 + length + max(ends, default=0)
    if size != expected:
        raise BundleError(f"{path}: truncated: {size} bytes where its header promises {expected}")


def _check_tokenizer(
    tokenizer: PreTrainedTokenizerFast, template: PromptTemplate, vocab_size: int, where: Path
) -> None:
    highest = max(tokenizer.get_vocab().values(), default=-1)
    if highest >= vocab_size:
        raise BundleError(f"{where}: wrong vocabulary: token id {highest}, {vocab_size} embeddings")
    literal = " ".join((template.instruction, template.passage, template.final))
    for text in sorted({*_SPECIAL.findall(literal), template.end}):
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        if len(ids) != 1 or ids[0] == tokenizer.unk_token_id:
            raise BundleError(f"{where}: wrong vocabulary: the template's {text!r} is no single token")
