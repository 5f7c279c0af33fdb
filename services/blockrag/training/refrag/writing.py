"""The bundle that a stage ends with."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from blockrag.modeling.bundle import Bundle, file_sha256, load_bundle
from blockrag.modeling.bundle_writing import write_refrag
from blockrag.modeling.loading import no_progress_bar
from blockrag.modeling.model import load_stock_model
from blockrag.training.refrag.config import RefragConfig
from blockrag.training.refrag.opening import Start
from blockrag.training.refrag.reader import RefragReader

_DECODER = "decoder.model."


def write_stage(
    weights: Mapping[str, Tensor],
    reader: RefragReader,
    start: Start,
    config: RefragConfig,
    facts: Mapping[str, Any],
) -> Bundle:
    """Write ``weights`` (the whole state dict of ``reader``) as the bundle ``config.out``; policies are left behind.

    ``facts`` become the last of the stages that the manifest lists. The decoder's files are copied as they are when
    the stage left the decoder alone; else they are written anew in their own type, with PEAR's coefficients, if there
    are any, part of the weights. The directory appears whole or not at all.
    """
    config.out.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=f".{config.out.name}-", dir=config.out.parent))
    try:
        learnt = config.stage != "reconstruction" or config.train_decoder
        base = _base(weights if learnt else None, start, config, staging / "base")
        reader.load_state_dict({name: tensor.float() for name, tensor in weights.items()})
        reader.float()
        return write_refrag(
            base, config.out, reader.encoder, reader.projector, policies={}, facts=[*_stages(start), dict(facts)]
        )
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _stages(start: Start) -> list[Mapping[str, Any]]:
    """The stages before."""
    return [] if start.bundle.refrag is None else [*start.bundle.refrag.training]


def _base(weights: Mapping[str, Tensor] | None, start: Start, config: RefragConfig, folder: Path) -> Bundle:
    """A bundle without chunk compression: the one started from, with the decoder that was learnt, and with k."""
    source = start.bundle
    manifest = json.loads((source.path / "manifest.json").read_text(encoding="utf-8"))
    manifest.pop("refrag", None)
    kept = [name for name in source.files if name.startswith("decoder/")]
    for name in [*kept, "MODEL_CARD.md"]:
        if (source.path / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source.path / name, folder / name)
    if weights is not None:
        _write_decoder(weights, source, folder / "decoder")
        manifest.pop("pear", None)
        manifest["quality"] = {}  # it was measured with other weights
    manifest.update(
        name=config.name or source.name,
        chunk_tokens=start.chunk_tokens,
        files={
            path.relative_to(folder).as_posix(): file_sha256(path)
            for path in sorted((folder / "decoder").rglob("*"))
            if path.is_file()
        },
    )
    (folder / "manifest.json").write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
    return load_bundle(folder, verify_files=False, compute_dtype=source.compute_dtype, kv_dtype=source.kv_dtype)


def _write_decoder(weights: Mapping[str, Tensor], source: Bundle, folder: Path) -> None:
    """The checkpoint's files, with ``weights`` in the type that the checkpoint names."""
    model = load_stock_model(source)
    own = {name.removeprefix(_DECODER): tensor.float() for name, tensor in weights.items() if name.startswith(_DECODER)}
    model.load_state_dict(own)
    named = json.loads((source.decoder_dir / "config.json").read_text(encoding="utf-8")).get("dtype")
    if isinstance(named, str):
        model.to(getattr(torch, named))
    for path in folder.glob("*.safetensors*"):
        path.unlink()
    saved = folder.with_name("saved")
    with no_progress_bar():
        model.save_pretrained(saved)
    for path in saved.iterdir():  # configurations stay as they came
        if ".safetensors" in path.name:
            path.chmod(0o644)  # safetensors writes files that only their owner can read
            path.replace(folder / path.name)
    shutil.rmtree(saved)
