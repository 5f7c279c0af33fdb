"""Making a bundle that compresses chunks, from one that does not or with newer parts than it has."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from blockrag.errors import BundleError
from blockrag.modeling.adapter import Adapter, write_adapter
from blockrag.modeling.adapter_record import ADAPTER_DIR, ADAPTER_FILES, TOKEN_ROWS_FILE
from blockrag.modeling.bundle import Bundle, load_bundle
from blockrag.modeling.bundle_writing import (
    copy_files,
    digests,
    new_folder,
    save_weights,
    with_section,
    write_manifest,
)
from blockrag.modeling.files import read_json
from blockrag.modeling.loading import check_finite
from blockrag.modeling.refrag.chunk_encoder import ChunkEncoder
from blockrag.modeling.refrag.compression import Projector
from blockrag.modeling.refrag.policy import ChunkPolicy
from blockrag.modeling.refrag.record import (
    CHUNK_ENCODER_DIR,
    PROJECTOR_FILE,
    PolicyRecord,
    RefragRecord,
    is_refrag_file,
    policy_file,
)

_WEIGHTS = (".safetensors", ".safetensors.index.json")
_HEADING = "## Chunk compression (REFRAG)"


@dataclass(frozen=True)
class PolicyPart:
    """A policy for a bundle."""

    policy: ChunkPolicy
    facts: Mapping[str, Any] = field(default_factory=dict)
    """How it was trained and what was measured, for the manifest."""
    basis: str | None = None
    """``policy_basis`` of the bundle it was trained with; None: the caller vouches for the parts written with it."""


def write_refrag(
    bundle: Bundle,
    out: str | Path,
    *,
    encoder: ChunkEncoder | None = None,
    projector: Projector | None = None,
    policies: Mapping[str, PolicyPart] | None = None,
    decoder: Mapping[str, Tensor] | None = None,
    adapter: Adapter | None = None,
    chunk_tokens: int | None = None,
    training: Sequence[Mapping[str, Any]] | None = None,
    name: str = "",
) -> Bundle:
    """A copy of ``bundle`` at ``out`` with these parts; what is None is taken from ``bundle``.

    ``decoder`` is a whole state dict, written in the checkpoint's own type; it is taken to hold the bundle's base,
    adapter and coefficients of heads already, as ``load_stock_model`` gives it, so the new manifest has none.
    ``adapter`` takes the place of the adapter on the bundle's base; all else of the decoder stays as it is, byte for
    byte. With either the quality is emptied. ``policies`` replaces all: {} writes none,
    and None keeps those of ``bundle``, which must have been trained with the parts that are written. ``training`` has
    the stages in order.

    The directory appears whole or not at all. Raises BundleError when ``out`` exists, when parts do not fit each
    other, for NaN or infinity in any of them and for a bundle without chunk compression where a part is None.
    """
    k = bundle.chunk_tokens if chunk_tokens is None else chunk_tokens
    if k < 1:
        raise BundleError(f"chunk_tokens {k}: must be at least 1")
    before = bundle.refrag
    if before is None and (encoder is None or projector is None):
        raise BundleError(f"{bundle.path}: has no chunk compression, so an encoder and a projector are both needed")
    target = Path(out).expanduser()
    with new_folder(target) as staging:
        _write_decoder(bundle, staging, decoder, adapter)
        if encoder is not None:
            encoder.save(staging / CHUNK_ENCODER_DIR)
        else:
            parts = [name for name in bundle.files if is_refrag_file(name)]
            copy_files(bundle, staging, [name for name in parts if name != PROJECTOR_FILE])
        if projector is not None:
            projector.save(staging / PROJECTOR_FILE)
        else:
            copy_files(bundle, staging, [PROJECTOR_FILE])
        manifest = read_json(bundle.path / "manifest.json")
        manifest.pop("refrag", None)
        if bundle.base is not None:
            manifest["base"] = bundle.base.moved(bundle.path, target).to_dict()
        if decoder is not None:
            for key in ("pear", "base", "adapter", "token_rows"):  # all of them are in the weights given
                manifest.pop(key, None)
        if adapter is not None:
            manifest["adapter"] = adapter.config.to_dict()
        if decoder is not None or adapter is not None:
            manifest["quality"] = {}
        manifest.update(
            chunk_tokens=k,
            name=name or bundle.name,
            files=digests(staging, "decoder", ADAPTER_DIR, TOKEN_ROWS_FILE, CHUNK_ENCODER_DIR, PROJECTOR_FILE),
        )
        write_manifest(staging, manifest)
        plain = load_bundle(staging, verify_files=False)
        if encoder is not None:
            sizes = encoder.alignment, encoder.pooling, encoder.width, encoder.layers
        else:
            assert before is not None  # both parts are given where the bundle has none
            sizes = before.alignment, before.pooling, before.encoder_width, before.encoder_layers
        record = RefragRecord(
            *sizes,
            decoder=plain.decoder_fingerprint,
            training=tuple(training if training is not None else before.training if before is not None else ()),
        )
        basis = replace(plain, refrag=record).policy_basis
        record = replace(record, policies=_write_policies(bundle, staging, policies, basis))
        manifest["refrag"] = record.to_dict()
        manifest["files"].update(digests(staging, *(policy.file for policy in record.policies.values())))
        write_manifest(staging, manifest)
        card = bundle.path / "MODEL_CARD.md"
        text = card.read_text(encoding="utf-8") if card.exists() else f"# {manifest['name']}\n"
        (staging / card.name).write_text(with_section(text, _HEADING, _described(record, k)), encoding="utf-8")
        load_bundle(staging).load_tokenizer()
    return load_bundle(target, verify_files=False, compute_dtype=bundle.compute_dtype, kv_dtype=bundle.kv_dtype)


def _write_decoder(
    bundle: Bundle, staging: Path, weights: Mapping[str, Tensor] | None, adapter: Adapter | None
) -> None:
    if adapter is not None:
        if bundle.base is None or weights is not None:
            raise BundleError(f"{bundle.path}: an adapter belongs on a base, and this one's weights are its own")
        write_adapter(staging / ADAPTER_DIR, adapter, bundle.base.identity)
        copy_files(bundle, staging, [name for name in bundle.decoder_files if name not in ADAPTER_FILES])
        return
    if weights is None:
        copy_files(bundle, staging, bundle.decoder_files)
        return
    check_finite(bundle.decoder_dir, weights.items())
    save_weights(weights, bundle.decoder_dir, staging / "decoder")
    # everything else as it came, byte for byte: the tokenizer and the configuration
    names = [name for name in bundle.decoder_files if name.startswith("decoder/")]
    copy_files(bundle, staging, [name for name in names if not name.endswith(_WEIGHTS)])


def _write_policies(
    bundle: Bundle, staging: Path, policies: Mapping[str, PolicyPart] | None, basis: str
) -> dict[str, PolicyRecord]:
    if policies is None:
        kept = dict(bundle.refrag.policies) if bundle.refrag is not None else {}
        copy_files(bundle, staging, [policy.file for policy in kept.values()])
        return kept
    records = {}
    for name, part in policies.items():
        part.policy.save(staging / policy_file(name))
        records[name] = PolicyRecord(
            query=part.policy.config.query, file=policy_file(name), basis=part.basis or basis, facts=dict(part.facts)
        )
    return records


def _described(record: RefragRecord, chunk_tokens: int) -> list[str]:
    reading = {
        "tokens": "the decoder's own tokens",
        "text": "each chunk's text, through its own tokenizer",
        "decoder": f"the decoder's tokens through its first {record.encoder_layers} layers",
    }
    policies = ", ".join(
        f"{name} ({'sees' if policy.query else 'does not see'} the question)"
        for name, policy in record.policies.items()
    )
    lines = [
        f"Chunks of {chunk_tokens} tokens; the chunk encoder reads {reading[record.alignment]}, {record.pooling} "
        f"pooling, {record.encoder_width} numbers a chunk.",
        "",
        f"Policies that choose what is expanded: {policies or 'none'}.",
    ]
    if record.training:
        lines += ["", "Stages of training, in order:", ""]
        for stage in record.training:
            facts = [f"{key.replace('_', ' ')} {value}" for key, value in stage.items() if not isinstance(value, dict)]
            lines.append(f"- {'; '.join(facts)}")
    return lines
