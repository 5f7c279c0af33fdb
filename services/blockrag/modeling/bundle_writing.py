"""Making a bundle: from a Hugging Face checkpoint (``blockrag bundle create``), or with coefficients for its heads."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor

from blockrag.errors import BundleError
from blockrag.modeling.adapter import Adapter, TokenRows, write_adapter, write_token_rows
from blockrag.modeling.adapter_record import ADAPTER_DIR, TOKEN_ROWS_FILE
from blockrag.modeling.base import Base, is_base, open_base
from blockrag.modeling.bundle import FORMAT, Bundle, file_sha256, load_bundle
from blockrag.modeling.chat_template import default_template
from blockrag.modeling.checkpoint import check_checkpoint, inspect_checkpoint, read_config
from blockrag.modeling.files import read_json, replace_file, staged
from blockrag.modeling.loading import no_progress_bar, read_tokenizer, skeleton, stored_dtype
from blockrag.modeling.model import SlotModel
from blockrag.modeling.pear_record import PearRecord
from blockrag.modeling.template import PromptTemplate

_WEIGHTS = ("*.safetensors", "*.safetensors.index.json")
_COPIED = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
)


def create_bundle(
    model: str | Path,
    out: str | Path,
    template: PromptTemplate | None = None,
    *,
    base: Base | None = None,
    adapter: Adapter | None = None,
    token_rows: TokenRows | None = None,
    name: str = "",
    chunk_tokens: int = 16,
    passage_tokens: int = 128,
    max_context_tokens: int | None = None,
    training: Mapping[str, Any] | None = None,
    model_card: str = "",
) -> Bundle:
    """Make a new bundle ``out`` from a checkpoint and check it.

    ``model`` is a Hugging Face directory (safetensors, fast tokenizer), which is copied, or a GGUF file or package
    (see ``open_base``), which becomes the bundle's base. ``base`` says instead where the weights of a directory are,
    which then needs none, and ``adapter`` and ``token_rows`` what was learnt on top of them. ``template`` defaults to
    one by the tokenizer, ``max_context_tokens`` to the model's positions. The directory appears whole or not at all.
    Raises BundleError when ``out`` exists or the checkpoint is incomplete, UnsupportedModelError when the model cannot
    be driven over slots.
    """
    target = Path(out).expanduser()
    if target.exists():  # before a GGUF file is converted
        raise BundleError(f"{target}: exists already")
    if is_base(model):
        base = open_base(model, target)
        source, label = base.checkpoint(target), base.label
    else:
        source = Path(model).expanduser()
        label = source.resolve().name
    if base is None and (adapter is not None or token_rows is not None):
        raise ValueError("an adapter or added tokens need a base")
    facts = inspect_checkpoint(source)
    if base is None:
        check_checkpoint(source)
    if max_context_tokens is not None and max_context_tokens > facts.max_positions:
        raise BundleError(f"{source}: {max_context_tokens} context tokens, where the model has {facts.max_positions}")
    with new_folder(target) as staging:
        _copy_checkpoint(source, staging / "decoder", weights=base is None)
        if model_card:
            (staging / "MODEL_CARD.md").write_text(model_card, encoding="utf-8")
        on_top = _write_on_top(staging, base, adapter, token_rows)
        template = template or default_template(read_tokenizer(source))
        manifest = {
            "format": FORMAT,
            "name": name or label,
            "version": "1",
            **on_top,
            "template": template.to_dict(),
            "chunk_tokens": chunk_tokens,
            "passage_tokens": passage_tokens,
            "max_context_tokens": max_context_tokens or facts.max_positions,
            "files": digests(staging, "decoder", ADAPTER_DIR, TOKEN_ROWS_FILE),
            "quality": {},
            "training": dict(training or {}),
        }
        write_manifest(staging, manifest)
        _check_driven(load_bundle(staging, verify_files=False))
    return load_bundle(target, verify_files=False)


def _check_driven(made: Bundle) -> None:
    """Load it once as it will be served: what is wrong with the weights is said now, not at the first start."""
    stored = read_json(made.weights_dir() / "config.json")
    narrow = stored.get("dtype", stored.get("torch_dtype")) in ("bfloat16", "float16")
    SlotModel.load(made, compute_dtype="bfloat16" if narrow else "float32")


def _write_on_top(
    staging: Path, base: Base | None, adapter: Adapter | None, token_rows: TokenRows | None
) -> dict[str, Any]:
    """Write what was learnt on top of ``base``; gives the manifest's keys for it."""
    keys: dict[str, Any] = {}
    if base is not None:
        keys["base"] = base.to_dict()
        if adapter is not None:
            write_adapter(staging / ADAPTER_DIR, adapter, base.identity)
            keys["adapter"] = adapter.config.to_dict()
        if token_rows is not None:
            write_token_rows(staging, token_rows)
            keys["token_rows"] = {"first": token_rows.first, "count": len(token_rows.embedding)}
    return keys


@contextmanager
def new_folder(target: Path) -> Iterator[Path]:
    """A directory that becomes ``target`` when the body succeeds. Raises BundleError when ``target`` exists."""
    if target.exists():
        raise BundleError(f"{target}: exists already")
    target.parent.mkdir(parents=True, exist_ok=True)
    with staged(target) as staging:
        yield staging


def digests(root: Path, *names: str) -> dict[str, str]:
    """SHA-256 of the files ``names`` that are there, and of those in directories among them, by path in ``root``."""
    found = (path for name in names for path in ((root / name).iterdir() if (root / name).is_dir() else [root / name]))
    return {path.relative_to(root).as_posix(): file_sha256(path) for path in sorted(found) if path.is_file()}


def copy_files(bundle: Bundle, target: Path, names: Iterable[str]) -> None:
    """Copy files of a bundle to the same places within ``target``."""
    for name in names:
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(bundle.path / name, target / name)


def save_weights(weights: Mapping[str, Tensor], checkpoint: Path, folder: Path, vocab_size: int | None = None) -> None:
    """Write a whole state dict to ``folder`` as ``checkpoint``'s configuration has it, in the type that it names.

    ``vocab_size``: of the weights, where it is another. Raises BundleError for weights that do not fit.
    """
    config = read_config(checkpoint)
    config.vocab_size = vocab_size or config.vocab_size
    dtype = stored_dtype(config)
    model = skeleton(config, dtype=dtype)
    try:
        cast = {name: tensor.detach().to("cpu", dtype) for name, tensor in weights.items()}
        unknown = model.load_state_dict(cast, assign=True, strict=False).unexpected_keys
    except RuntimeError as error:
        raise BundleError(f"the weights given for the decoder do not fit {checkpoint}: {error}") from error
    model.tie_weights()
    absent = [name for name, parameter in model.named_parameters() if parameter.is_meta]
    if unknown or absent:
        wrong = ", ".join([*unknown, *absent][:8])
        raise BundleError(f"the weights given for the decoder do not fit {checkpoint}: {wrong}")
    with no_progress_bar():
        model.save_pretrained(folder)


def write_manifest(root: Path, manifest: Mapping[str, Any]) -> None:
    """Write ``manifest.json``."""
    replace_file(root / "manifest.json", json.dumps(manifest, indent=2) + "\n")


def with_section(card: str, heading: str, body: Iterable[str]) -> str:
    """A model card whose section ``heading`` ("## …") has these lines; it is put last when it was not there."""
    before, _, rest = card.partition(heading)
    _, mark, after = rest.partition("\n## ")
    parts = [before.rstrip(), "\n".join([heading, "", *body]), f"## {after.rstrip()}" if mark else ""]
    return "\n\n".join(part for part in parts if part) + "\n"


def write_pear(bundle: Bundle, record: PearRecord, out: str | Path | None) -> Bundle:
    """A copy of ``bundle`` at ``out`` with these coefficients, instead of those it may have; None: ``bundle`` itself.

    Only the manifest and the model card differ; the weights stay as they are and are folded when they are loaded. The
    manifest's quality is emptied, because it was measured with other effective weights. A kill leaves the bundle with
    or without the coefficients, never in between. Raises BundleError when ``out`` exists, and for a bundle whose chunk
    compression was trained with the present weights.
    """
    if bundle.refrag is not None:
        raise BundleError(
            f"{bundle.path}: its chunk compression was trained with the decoder's present weights: apply PEAR first, "
            "then blockrag adapt refrag"
        )
    manifest = read_json(bundle.path / "manifest.json")
    manifest.update(pear=record.to_dict(), quality={})
    card = bundle.path / "MODEL_CARD.md"
    described = _describe_pear(card.read_text(encoding="utf-8") if card.exists() else "", record)
    options: dict[str, Any] = {"compute_dtype": bundle.compute_dtype, "kv_dtype": bundle.kv_dtype}
    if out is None:
        write_manifest(bundle.path, manifest)
        replace_file(card, described)
        return load_bundle(bundle.path, verify_files=False, **options)
    target = Path(out).expanduser()
    if bundle.base is not None:
        manifest["base"] = bundle.base.moved(bundle.path, target).to_dict()
    with new_folder(target) as staging:
        copy_files(bundle, staging, bundle.files)
        write_manifest(staging, manifest)
        (staging / card.name).write_text(described, encoding="utf-8")
        load_bundle(staging, verify_files=False)
    return load_bundle(target, verify_files=False, **options)


_PEAR_HEADING = "## Re-weighted heads (PEAR)"


def _describe_pear(card: str, record: PearRecord) -> str:
    rows = [f"| {item.layer} | {item.head} | {item.tau:.3f} | {item.delta_pi:+.1%} |" for item in record.heads]
    losses = [
        f"{mask} mask {record.before[mask].loss:.3f} to {record.after[mask].loss:.3f} nats" for mask in record.before
    ]
    body = (
        f"Detected and learned under the {record.mask} mask; loss of copying random tokens: {'; '.join(losses)}. "
        "Scores above were measured before.",
        "",
        "| layer | head | coefficient | why: the copied token's logit without it |",
        "|---|---|---|---|",
        *rows,
    )
    return with_section(card, _PEAR_HEADING, body)


def _copy_checkpoint(source: Path, decoder: Path, *, weights: bool) -> None:
    decoder.mkdir()
    for pattern in (*_COPIED, *(_WEIGHTS if weights else ())):
        for path in sorted(source.glob(pattern)):
            shutil.copyfile(path, decoder / path.name)
    needed = (("*.safetensors", "weights in safetensors"),) if weights else ()
    for pattern, what in (*needed, ("tokenizer.json", "a fast tokenizer")):
        if not any(decoder.glob(pattern)):
            raise BundleError(f"{source}: lacks {what} ({pattern})")
