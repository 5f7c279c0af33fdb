"""Bundles: a directory with everything that reads and answers, checked before it is used.

Reading what a bundle says of itself needs no torch: the gateway and the cache know it only so.

::

    manifest.json           format, name, version, template, sizes, SHA-256 of every file, quality, training;
                            optionally base, adapter and token_rows, weights that are elsewhere and what was learnt on
                            top of them, pear, the coefficients that are folded into the weights whenever they are
                            loaded, and refrag, what chunks are compressed with
    decoder/                a Hugging Face checkpoint with its tokenizer; with base, all of it but the weights
    adapter/                with adapter: a LoRA adapter in PEFT's format
    token_rows.safetensors  with token_rows: embeddings of tokens that the base does not have
    chunk_encoder/          with refrag: a Hugging Face encoder, which may bring its tokenizer
    projector.safetensors   with refrag: from a chunk embedding to an input embedding of the decoder
    policy-NAME.safetensors with refrag: policies that choose the chunks to expand
    MODEL_CARD.md
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from blockrag.errors import BundleError
from blockrag.modeling.adapter_record import (
    ADAPTER_DIR,
    ADAPTER_FILES,
    TOKEN_ROWS_FILE,
    AdapterConfig,
    check_adapter,
    check_token_rows_place,
)
from blockrag.modeling.base import Base
from blockrag.modeling.files import DEFAULT_BUNDLE, check_listed, file_sha256, hashed, read_json
from blockrag.modeling.pear_record import PearRecord
from blockrag.modeling.refrag.record import (
    CHUNK_ENCODER_DIR,
    PROJECTOR_FILE,
    RefragRecord,
    check_fingerprints,
    check_part_files,
    is_refrag_file,
)
from blockrag.modeling.running_text import FastTokenizer
from blockrag.modeling.template import PromptTemplate

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

__all__ = ["DEFAULT_BUNDLE", "DTYPES", "FORMAT", "Bundle", "file_sha256", "load_bundle"]

FORMAT = 1
DTYPES = ("float32", "bfloat16")
"""What models are loaded in, by torch's names."""
KV_DTYPES = (*DTYPES, "int8")
"""What K and V of blocks are kept in."""
WEIGHTS = ("auto", "int8", "none")
"""What decode steps and prefills of questions read: a copy of the weights in eight bits where there can be one, that or
an error, or no copy."""

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
_OPTIONAL_KEYS: dict[str, type] = {"base": dict, "adapter": dict, "token_rows": dict, "pear": dict, "refrag": dict}
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
    weights: str = "none"
    """What decode steps read, of ``WEIGHTS``; in no fingerprint, since no block is encoded with it."""
    quality: Mapping[str, Any] = field(default_factory=dict)
    training: Mapping[str, Any] = field(default_factory=dict)
    base: Base | None = None
    """Where the weights are, when the bundle does not hold them."""
    adapter: AdapterConfig | None = None
    """What ``load_stock_model`` merges into the base's weights."""
    token_rows: Mapping[str, int] | None = None
    """First id and number of the tokens that are added to the base's."""
    pear: PearRecord | None = None
    """Coefficients of heads; ``load_stock_model`` folds them into the weights."""
    refrag: RefragRecord | None = None
    """What chunks are compressed with, if the bundle can compress."""

    @property
    def decoder_dir(self) -> Path:
        """Directory of the Hugging Face checkpoint: configuration and tokenizer, and the weights without ``base``."""
        return self.path / "decoder"

    @property
    def adapter_dir(self) -> Path:
        """Directory of the adapter, when ``adapter`` is there."""
        return self.path / ADAPTER_DIR

    @property
    def decoder_files(self) -> tuple[str, ...]:
        """Names of the files that make the decoder, but for ``base``, by name."""
        return tuple(name for name in sorted(self.files) if is_decoder_file(name))

    def weights_dir(self) -> Path:
        """Directory of the checkpoint that holds the weights before anything is merged into them.

        A base that is a GGUF file is converted by the first who asks. Raises BundleError.
        """
        return self.decoder_dir if self.base is None else self.base.checkpoint(self.path)

    @property
    def chunk_encoder_dir(self) -> Path:
        """Directory of the chunk encoder, when ``refrag`` is there."""
        return self.path / CHUNK_ENCODER_DIR

    @property
    def projector_file(self) -> Path:
        """The projector's weights, when ``refrag`` is there."""
        return self.path / PROJECTOR_FILE

    @property
    def fingerprint(self) -> str:
        """40 hex digits over everything that K and V of full blocks depend on: decoder, template, dtypes.

        Not over the bundle's place, name, quality, model card or what it compresses chunks with.
        """
        return hashed({**self._decoder_content(), "compute_dtype": self.compute_dtype, "kv_dtype": self.kv_dtype})

    @property
    def decoder_fingerprint(self) -> str:
        """40 hex digits over the decoder's files, its coefficients and the template: what was trained, in any dtype."""
        return hashed(self._decoder_content())

    @property
    def compression_fingerprint(self) -> str:
        """40 hex digits over everything that compressed blocks and chunk embeddings depend on.

        Raises BundleError when the bundle has no chunk compression.
        """
        return hashed({"fingerprint": self.fingerprint, **self._compression_content()})

    @property
    def policy_basis(self) -> str:
        """40 hex digits over what a policy was trained with: decoder, chunk encoder, projector and k, in any dtype.

        Raises BundleError when the bundle has no chunk compression.
        """
        return hashed({"decoder": self.decoder_fingerprint, **self._compression_content()})

    def _decoder_content(self) -> dict[str, Any]:
        content: dict[str, Any] = {
            "format": FORMAT,
            "files": {name: self.files[name] for name in self.decoder_files},
            "template": self.template.to_dict(),
        }
        if self.base is not None:
            content["base"] = self.base.content
        if self.token_rows is not None:
            content["token_rows"] = dict(self.token_rows)
        if self.pear is not None:
            content["pear"] = sorted((head.layer, head.head, float(head.tau)) for head in self.pear.heads)
        return content

    def compression(self) -> RefragRecord:
        """``refrag``, for who needs it. Raises BundleError when the bundle has no chunk compression."""
        if self.refrag is None:
            raise BundleError(f"{self.path}: the bundle has no chunk compression (refrag)")
        return self.refrag

    def _compression_content(self) -> dict[str, Any]:
        return {
            "chunk_tokens": self.chunk_tokens,
            "alignment": self.compression().alignment,
            "pooling": self.compression().pooling,
            "parts": {name: self.files[name] for name in sorted(self.files) if is_refrag_file(name)},
        }

    def load_tokenizer(self) -> PreTrainedTokenizerFast:
        """The bundle's tokenizer. Raises BundleError when it does not fit the decoder or the template."""
        from blockrag.modeling.loading import read_tokenizer

        tokenizer = read_tokenizer(self.decoder_dir)
        check_tokenizer(tokenizer, self.template, self.vocab_size, self.decoder_dir)
        return tokenizer

    def load_fast_tokenizer(self) -> FastTokenizer:
        """The same tokens as from ``load_tokenizer``, without transformers; for a process that holds no model."""
        tokenizer = FastTokenizer.load(self.decoder_dir)
        check_tokenizer(tokenizer, self.template, self.vocab_size, self.decoder_dir)
        return tokenizer


def is_decoder_file(name: str) -> bool:
    """Whether a file of a bundle belongs to its decoder."""
    return name.startswith(("decoder/", f"{ADAPTER_DIR}/")) or name == TOKEN_ROWS_FILE


def load_bundle(
    path: str | Path,
    *,
    verify_files: bool = True,
    compute_dtype: str = "float32",
    kv_dtype: str = "float32",
    weights: str = "none",
    sha256: Callable[[Path], str] = file_sha256,
) -> Bundle:
    """Check the directory ``path``.

    ``verify_files`` compares the SHA-256 of every file, those of ``base`` too, as ``sha256`` gives it; without it only
    presence and the lengths that safetensors headers promise are checked, and torch is not needed. The dtypes are what
    the model will be loaded with: the fingerprint counts them; ``weights`` is what decode steps read. Raises
    BundleError naming the file and the problem.
    """
    root = Path(path).expanduser()
    for dtype, allowed in ((compute_dtype, DTYPES), (kv_dtype, KV_DTYPES)):
        if dtype not in allowed:
            raise BundleError(f"dtype {dtype!r}: must be one of {', '.join(allowed)}")
    if weights not in WEIGHTS:
        raise BundleError(f"weights {weights!r}: must be one of {', '.join(WEIGHTS)}")
    manifest = _read_manifest(root)
    template = PromptTemplate.from_dict(manifest["template"], root / "manifest.json")
    files = _check_files(root, manifest, verify_files=verify_files, sha256=sha256)
    base, adapter, token_rows = _read_base(root, manifest, verify_files, sha256)
    config = read_json(root / "decoder" / "config.json")
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
        weights=weights,
        quality=manifest["quality"],
        training=manifest["training"],
        base=base,
        adapter=adapter,
        token_rows=token_rows,
        pear=PearRecord.from_dict(manifest["pear"], str(root / "manifest.json")) if "pear" in manifest else None,
        refrag=_read_refrag(root, manifest, files, config, verify_files) if "refrag" in manifest else None,
    )
    if bundle.refrag is not None:
        check_fingerprints(root, bundle.refrag, bundle.decoder_fingerprint, bundle.policy_basis)
    return bundle


def _read_manifest(root: Path) -> dict[str, Any]:
    if not root.is_dir():
        raise BundleError(f"{root}: no such directory")
    path = root / "manifest.json"
    manifest = read_json(path)
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


def _read_refrag(
    root: Path, manifest: Mapping[str, Any], files: Mapping[str, str], config: Mapping[str, Any], verify_files: bool
) -> RefragRecord:
    record = RefragRecord.from_dict(manifest["refrag"], str(root / "manifest.json"))
    check_part_files(root, record, files)
    if verify_files:
        from blockrag.modeling.refrag.parts import check_parts

        check_parts(root, record, files, decoder_config=config, chunk_tokens=manifest["chunk_tokens"])
    return record


def _check_files(
    root: Path, manifest: Mapping[str, Any], *, verify_files: bool, sha256: Callable[[Path], str]
) -> dict[str, str]:
    where, listed = root / "manifest.json", manifest["files"]
    needed = [
        *_REQUIRED_FILES,
        *(ADAPTER_FILES if "adapter" in manifest else ()),
        *((TOKEN_ROWS_FILE,) if "token_rows" in manifest else ()),
    ]
    for name in needed:
        if name not in listed:
            raise BundleError(f"{where}: files lacks {name}")
    weights = [name for name in listed if name.startswith("decoder/") and name.endswith(".safetensors")]
    if "base" not in manifest:
        for key in ("adapter", "token_rows"):
            if key in manifest:
                raise BundleError(f"{where}: {key} without the base that it was made for")
        if not weights:
            raise BundleError(f"{where}: files lacks weights (*.safetensors)")
    elif weights:
        raise BundleError(f"{where}: both a base and weights of its own: {', '.join(weights)}")
    return check_listed(root, listed, where, verify_files=verify_files, sha256=sha256)


def _read_base(
    root: Path, manifest: Mapping[str, Any], verify_files: bool, sha256: Callable[[Path], str]
) -> tuple[Base | None, AdapterConfig | None, dict[str, int] | None]:
    if "base" not in manifest:
        return None, None, None
    base = Base.from_dict(manifest["base"], root / "manifest.json")
    base.check(root, verify_files=verify_files, sha256=sha256)
    adapter = rows = None
    if "adapter" in manifest:
        adapter = AdapterConfig.from_dict(manifest["adapter"], root / "manifest.json")
        check_adapter(root, adapter, base, read_weights=verify_files)
    if "token_rows" in manifest:
        check_token_rows_place(root, manifest["token_rows"])
        if verify_files:
            from blockrag.modeling.adapter import read_token_rows

            read_token_rows(root, manifest["token_rows"])
        rows = dict(manifest["token_rows"])
    return base, adapter, rows


def check_tokenizer(
    tokenizer: PreTrainedTokenizerFast | FastTokenizer, template: PromptTemplate, vocab_size: int, where: Path
) -> None:
    """Raises BundleError naming ``where`` for a tokenizer that does not fit the embedding's rows or the template."""
    highest = max(tokenizer.get_vocab().values(), default=-1)
    if highest >= vocab_size:
        raise BundleError(f"{where}: wrong vocabulary: token id {highest}, {vocab_size} embeddings")
    literal = " ".join((template.instruction, template.passage, template.final))
    for text in sorted({*_SPECIAL.findall(literal), template.end}):
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        if len(ids) != 1 or ids[0] == tokenizer.unk_token_id:
            raise BundleError(f"{where}: wrong vocabulary: the template's {text!r} is no single token")
