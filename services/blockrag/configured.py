"""From settings to what they name: every service finds its bundle and its device in the same way."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from blockrag.keys import KeyMaker
from blockrag.modeling.native.build import BFLOAT16, has_instructions
from blockrag.settings import Settings

if TYPE_CHECKING:
    from blockrag.modeling.bundle import Bundle


def configured_bundle(settings: Settings, *, verify_files: bool = False) -> Bundle:
    """The bundle of the settings, with their dtypes in its fingerprint; "auto" is decided here.

    Services that load the weights verify the files, each read once for all of them; the others only read what is
    small. Raises ``BundleError``.
    """
    from blockrag.modeling.bundle import DEFAULT_BUNDLE, load_bundle
    from blockrag.modeling.cache import remembered_sha256

    return load_bundle(
        settings.bundle.path or DEFAULT_BUNDLE,
        verify_files=verify_files,
        compute_dtype=configured_compute_dtype(settings),
        kv_dtype=settings.bundle.kv_dtype,
        weights=settings.bundle.weights,
        sha256=remembered_sha256,
    )


def configured_compute_dtype(settings: Settings) -> str:
    """Type of weights and activations, "float32" or "bfloat16"; without torch, since every service asks.

    ``auto`` goes by the device that the settings name and by this machine's processor, never by a GPU that only some
    services see: their answers must be one.
    """
    if settings.bundle.compute_dtype != "auto":
        return settings.bundle.compute_dtype
    on_gpu = settings.bundle.device.startswith("cuda")
    return "bfloat16" if on_gpu or has_instructions(BFLOAT16) else "float32"


def configured_device(settings: Settings, *, granted: bool = True) -> str:
    """Where the calling process computes: ``auto`` is a GPU exactly when there is one that it may use.

    ``granted``: in a replica, whether Ray gave it one; a replica that asked for none may still see them all.
    """
    if settings.bundle.device != "auto":
        return settings.bundle.device
    import torch

    return "cuda" if granted and torch.cuda.is_available() else "cpu"


def configured_keys(settings: Settings, bundle: Bundle) -> KeyMaker:
    """Makes the keys of the bundle's blocks."""
    compression = bundle.compression_fingerprint if bundle.refrag is not None else ""
    return KeyMaker(bundle.fingerprint, settings.kv_cache.secret.encode(), compression)


def token_bytes(bundle: Bundle, settings: Settings) -> int:
    """Bytes of K and V of one token of a running sequence, over all layers; no less than of a cached one."""
    config = json.loads((bundle.decoder_dir / "config.json").read_text(encoding="utf-8"))
    width = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    heads = config.get("num_key_value_heads") or config["num_attention_heads"]
    return int(2 * config["num_hidden_layers"] * heads * width * (4 if settings.bundle.kv_dtype == "float32" else 2))
