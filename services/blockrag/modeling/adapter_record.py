"""What a manifest says of what was learnt on top of a base: ``adapter`` and ``token_rows``. Needs no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from blockrag.errors import BundleError
from blockrag.modeling.base import Base
from blockrag.modeling.files import check_keys, read_json

ADAPTER_DIR = "adapter"
ADAPTER_FILES = (f"{ADAPTER_DIR}/adapter_config.json", f"{ADAPTER_DIR}/adapter_model.safetensors")
TOKEN_ROWS_FILE = "token_rows.safetensors"

ADAPTER_CONFIG, ADAPTER_WEIGHTS = (name.partition("/")[2] for name in ADAPTER_FILES)

# Other kinds of LoRA that PEFT writes into the same file; each would merge otherwise.
_UNSUPPORTED = ("use_rslora", "use_dora", "fan_in_fan_out", "rank_pattern", "alpha_pattern", "modules_to_save")


@dataclass(frozen=True)
class AdapterConfig:
    """How an adapter was made."""

    rank: int
    alpha: float
    """What B A is scaled by, times the rank."""
    target_modules: tuple[str, ...]
    """Last names of the adapted linear layers, such as "q_proj"."""

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], where: Path) -> AdapterConfig:
        """Read a manifest's ``adapter``. Raises BundleError naming ``where`` and the problem."""
        check_keys(cls, values, f"{where}: adapter")
        rank, alpha, targets = (values[name] for name in ("rank", "alpha", "target_modules"))
        if not isinstance(rank, int) or isinstance(rank, bool) or rank < 1:
            raise BundleError(f"{where}: adapter rank {rank!r}: must be a positive whole number")
        if not isinstance(alpha, int | float) or isinstance(alpha, bool) or not 0 < alpha < float("inf"):
            raise BundleError(f"{where}: adapter alpha {alpha!r}: must be positive")
        if not isinstance(targets, list | tuple) or not targets or not all(isinstance(name, str) for name in targets):
            raise BundleError(f"{where}: adapter target_modules {targets!r}: must name linear layers")
        return cls(rank=rank, alpha=float(alpha), target_modules=tuple(sorted(targets)))

    def to_dict(self) -> dict[str, Any]:
        """For the manifest."""
        return {"rank": self.rank, "alpha": self.alpha, "target_modules": list(self.target_modules)}


def read_adapter_config(folder: Path) -> tuple[AdapterConfig, str]:
    """Configuration of the adapter in ``folder``, and the name of its base. Raises BundleError."""
    path = folder / ADAPTER_CONFIG
    values = read_json(path)
    if values.get("peft_type") != "LORA":
        raise BundleError(f"{path}: peft_type {values.get('peft_type')!r}; LORA can be read")
    other = [name for name in _UNSUPPORTED if values.get(name)]
    if values.get("bias", "none") != "none":
        other.append("bias")
    if other:
        raise BundleError(f"{path}: {', '.join(other)} cannot be read")
    named = {
        "rank": values.get("r"),
        "alpha": values.get("lora_alpha"),
        "target_modules": values.get("target_modules"),
    }
    return AdapterConfig.from_dict(named, path), str(values.get("base_model_name_or_path") or "")


def check_adapter(root: Path, config: AdapterConfig, base: Base, *, read_weights: bool) -> None:
    """Check the adapter of the bundle ``root`` against its manifest. Raises BundleError."""
    stored, base_name = read_adapter_config(root / ADAPTER_DIR)
    if stored != config:
        raise BundleError(f"{root / ADAPTER_FILES[0]}: {stored}, where the manifest has {config}")
    if base_name.startswith(("sha256:", "blake2b:")) and base_name != base.identity:
        raise BundleError(
            f"{root / ADAPTER_FILES[0]}: made for another base: {base_name}, where the bundle's is {base.identity}"
        )
    if read_weights:
        from blockrag.modeling.adapter import read_adapter

        read_adapter(root / ADAPTER_DIR)


def check_token_rows_place(root: Path, place: Mapping[str, Any]) -> tuple[int, int]:
    """First id and number of the added tokens. Raises BundleError unless ``place`` is {"first": id, "count": n}."""
    first, count = place.get("first"), place.get("count")
    if set(place) != {"first", "count"} or not all(isinstance(item, int) and item >= 0 for item in (first, count)):
        raise BundleError(f"{root / 'manifest.json'}: token_rows must have the whole numbers first and count")
    return int(place["first"]), int(place["count"])
