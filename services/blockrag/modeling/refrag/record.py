"""What a bundle's manifest says of its chunk compression: ``refrag``."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

from blockrag.errors import BundleError
from blockrag.modeling.files import check_keys

Alignment = Literal["tokens", "text", "decoder"]
"""What the chunk encoder reads, and what it is. ``tokens``: an encoder over the decoder's token ids. ``text``: one over
each chunk's text. ``decoder``: the decoder's own first layers, as the bundle's base has them; nothing is stored."""
Pooling = Literal["mean", "cls", "concat"]
"""``mean`` of a chunk's states, the state of its first position (``cls``), or all of them side by side (``concat``,
with "decoder" only): k times as wide, and the order of the tokens stays."""
ALIGNMENTS: tuple[Alignment, ...] = get_args(Alignment)
POOLINGS: tuple[Pooling, ...] = get_args(Pooling)

CHUNK_ENCODER_DIR = "chunk_encoder"
PROJECTOR_FILE = "projector.safetensors"

_POLICY_NAME = re.compile(r"[a-z][a-z0-9_-]*")


def policy_file(name: str) -> str:
    """File of a policy within a bundle."""
    return f"policy-{name}.safetensors"


@dataclass(frozen=True)
class PolicyRecord:
    """One policy of a bundle."""

    query: bool
    """Whether it sees the question."""
    file: str
    basis: str
    """The bundle's ``policy_basis`` that it was trained with."""
    facts: Mapping[str, Any] = field(default_factory=dict)
    """How it was trained and what was measured."""


@dataclass(frozen=True)
class RefragRecord:
    """The manifest's ``refrag``."""

    alignment: Alignment
    pooling: Pooling
    encoder_width: int
    """Numbers of a chunk embedding."""
    encoder_layers: int
    """With "decoder", how many of its layers read the chunks; else 0."""
    decoder: str
    """``decoder_fingerprint`` of the decoder that the chunk encoder and the projector were trained with."""
    policies: Mapping[str, PolicyRecord] = field(default_factory=dict)
    training: tuple[Mapping[str, Any], ...] = ()
    """The stages of training, in order."""

    def to_dict(self) -> dict[str, Any]:
        """For the manifest, as JSON has it."""
        return {**asdict(self), "training": [dict(stage) for stage in self.training]}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], where: str) -> RefragRecord:
        """Read a manifest's ``refrag``. Raises BundleError naming ``where`` and the problem."""
        check_keys(cls, values, f"{where}: refrag")
        if values["alignment"] not in ALIGNMENTS:
            raise BundleError(f"{where}: refrag: alignment {values['alignment']!r}, not one of {', '.join(ALIGNMENTS)}")
        if values["pooling"] not in POOLINGS:
            raise BundleError(f"{where}: refrag: pooling {values['pooling']!r}, not one of {', '.join(POOLINGS)}")
        width = values["encoder_width"]
        if not isinstance(width, int) or isinstance(width, bool) or width < 1:
            raise BundleError(f"{where}: refrag: encoder_width must be a positive integer")
        layers = values["encoder_layers"]
        own = values["alignment"] == "decoder"
        if not isinstance(layers, int) or isinstance(layers, bool) or (layers > 0) != own:
            raise BundleError(f"{where}: refrag: encoder_layers must be positive with alignment 'decoder', 0 without")
        if not isinstance(values["decoder"], str):
            raise BundleError(f"{where}: refrag: decoder must be a fingerprint")
        stages, policies = values["training"], values["policies"]
        if not isinstance(stages, list) or not all(isinstance(stage, dict) for stage in stages):
            raise BundleError(f"{where}: refrag: training must be a list of objects")
        if not isinstance(policies, dict):
            raise BundleError(f"{where}: refrag: policies must be an object")
        read = {name: _read_policy(name, policy, where) for name, policy in policies.items()}
        return cls(**{**values, "policies": read, "training": tuple(stages)})


def is_refrag_file(name: str) -> bool:
    """Whether the file belongs to what turns chunks into input embeddings: chunk encoder and projector."""
    return name == PROJECTOR_FILE or name.startswith(f"{CHUNK_ENCODER_DIR}/")


def check_part_files(root: Path, record: RefragRecord, files: Mapping[str, str]) -> None:
    """Raises BundleError where the bundle ``root`` lists a file too few of what it compresses chunks with."""
    needed = [PROJECTOR_FILE]
    if record.alignment != "decoder":
        needed += [f"{CHUNK_ENCODER_DIR}/config.json", f"{CHUNK_ENCODER_DIR}/model.safetensors"]
    if record.alignment == "text":
        needed.append(f"{CHUNK_ENCODER_DIR}/tokenizer.json")
    needed += [policy.file for policy in record.policies.values()]
    for name in needed:
        if name not in files:
            raise BundleError(f"{root / 'manifest.json'}: files lacks {name}")


def check_fingerprints(root: Path, record: RefragRecord, decoder: str, basis: str) -> None:
    """Raises BundleError when the projector or a policy was trained with other weights than those beside it.

    ``decoder`` and ``basis`` are the bundle's ``decoder_fingerprint`` and ``policy_basis``.
    """
    if record.decoder != decoder:
        raise BundleError(
            f"{root}: the projector and the chunk encoder were trained with the decoder {record.decoder[:12]}, "
            f"the bundle's is {decoder[:12]}: adapt them to it (blockrag adapt refrag)"
        )
    for name, policy in record.policies.items():
        if policy.basis != basis:
            raise BundleError(
                f"{root / policy.file}: the policy {name!r} was trained with other parts ({policy.basis[:12]}) than "
                f"the bundle's decoder, chunk encoder and projector ({basis[:12]}): train it again "
                "(blockrag adapt refrag policy)"
            )


def _read_policy(name: str, values: Any, where: str) -> PolicyRecord:
    place = f"{where}: refrag: policy {name!r}"
    if not _POLICY_NAME.fullmatch(name):
        raise BundleError(f"{place}: a name is made of a-z, 0-9, - and _")
    if not isinstance(values, dict):
        raise BundleError(f"{place}: must be an object")
    check_keys(PolicyRecord, values, place)
    kinds = {"query": bool, "file": str, "basis": str, "facts": dict}
    for key, kind in kinds.items():
        if not isinstance(values[key], kind):
            raise BundleError(f"{place}: {key} must be of type {kind.__name__}")
    return PolicyRecord(**values)
