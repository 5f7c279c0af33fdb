"""What loading any Hugging Face model needs: quiet, and no weight left to chance."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerFast
from transformers.utils import logging

from blockrag.errors import BundleError
from blockrag.modeling import bundle
from blockrag.modeling.running_text import load_tokenizer

DTYPES = {name: getattr(torch, name) for name in bundle.DTYPES}
"""torch's types by the names that bundles and settings have for them."""
KV_DTYPES = {name: getattr(torch, name) for name in bundle.KV_DTYPES}
"""The same of cached K and V."""
LOAD_ERRORS = (OSError, ValueError, KeyError, RuntimeError, ImportError, AttributeError, TypeError, SafetensorError)
"""What transformers raises for files that it cannot load."""
_NAMED = 8


@contextmanager
def no_progress_bar() -> Iterator[None]:
    """transformers shows no progress bar inside, whatever it does outside."""
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def load_weights(kind: Any, folder: Path, what: str, **options: Any) -> tuple[PreTrainedModel, dict[str, Any]]:
    """A model by one of transformers' Auto classes, and which weights are missing or left over: who loads must look.

    Raises BundleError saying that ``what`` not load.
    """
    before = logging.get_verbosity()
    logging.set_verbosity_error()  # transformers would list them
    options |= {"local_files_only": True, "trust_remote_code": False, "output_loading_info": True}
    try:
        with no_progress_bar():
            model, info = kind.from_pretrained(folder, **options)
    except LOAD_ERRORS as error:
        raise BundleError(f"{folder}: {what} not load: {error}") from error
    finally:
        logging.set_verbosity(before)
    return model, info


def skeleton(config: PreTrainedConfig, **options: Any) -> PreTrainedModel:
    """The causal language model that a configuration describes, without weights; ``options`` as of ``from_config``."""
    with torch.device("meta"):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config, trust_remote_code=False, **options)
    return model


def check_none(where: Path, names: Iterable[object], problem: str = "weights are missing") -> None:
    """Raises BundleError naming weights, such as those that transformers would fill with random numbers."""
    found = sorted(str(name) for name in names)
    if found:
        more = f" and {len(found) - _NAMED} more" if len(found) > _NAMED else ""
        raise BundleError(f"{where}: {problem}: {', '.join(found[:_NAMED])}{more}")


def read_tensors(path: Path, problem: str = "") -> dict[str, Tensor]:
    """All tensors of a safetensors file. Raises BundleError naming it."""
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise BundleError(f"{path}: {problem}{error}") from error


def check_finite(where: str | Path, tensors: Iterable[tuple[str, Tensor]]) -> None:
    """Raises BundleError naming the first tensor with NaN or infinity."""
    for name, tensor in tensors:
        if not bool(torch.isfinite(tensor).all()):
            raise BundleError(f"{where}: NaN or infinity in {name}")


def stored_dtype(config: PreTrainedConfig) -> torch.dtype:
    """The type that a checkpoint's weights are kept in, by its configuration."""
    dtype = config.dtype or torch.float32
    return dtype if isinstance(dtype, torch.dtype) else getattr(torch, str(dtype))


def read_tokenizer(folder: Path) -> PreTrainedTokenizerFast:
    """The tokenizer of a checkpoint, by its ``tokenizer.json`` as it stands. Raises BundleError.

    A class chosen by the model's type may add tokens of its own.
    """
    return load_tokenizer(folder, lambda: PreTrainedTokenizerFast.from_pretrained(folder, local_files_only=True))
