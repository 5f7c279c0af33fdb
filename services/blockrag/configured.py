"""From settings to what they name: every service finds its bundle and its device in the same way."""

from __future__ import annotations

from typing import TYPE_CHECKING

from blockrag.keys import KeyMaker
from blockrag.settings import Settings

if TYPE_CHECKING:
    from blockrag.modeling.bundle import Bundle


def configured_bundle(settings: Settings, *, verify_files: bool = False) -> Bundle:
    """The bundle of the settings, with their dtypes in its fingerprint.

    Services that load the weights verify the files; the others only read what is small. Raises ``BundleError``.
    """
    from blockrag.modeling.bundle import DEFAULT_BUNDLE, load_bundle

    return load_bundle(
        settings.bundle.path or DEFAULT_BUNDLE,
        verify_files=verify_files,
        compute_dtype=settings.bundle.compute_dtype,
        kv_dtype=settings.bundle.kv_dtype,
    )


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
