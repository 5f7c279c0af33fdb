"""A bundle's weights as they are served, made once per machine and mapped by all who hold them.

Before a decoder serves, its base is read, an adapter merged into it, everything brought into the type that is computed
in, queries, keys and values put behind one another, and a copy made in eight bits. Each replica would do that, and hold
the result for itself. The first one writes it to ``served/`` in the user's cache instead (``blockrag.modeling.cache``);
the others map the same file, whose pages are in memory once.

::

    weights.bin         parameters and buffers, and the products in eight bits, each at a multiple of 64 bytes; those
                        that are fused lie behind one another
    tensors.json        type, shape and place of each
    config.json, generation_config.json     the model's, as transformers writes them

What is read back is compared with what was written before it is used. Where the cache cannot be written or others may
have written it, and for small models, weights are made in memory as ever.
"""

from __future__ import annotations

import json
import logging
import math
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers
from torch import Tensor, nn
from transformers import AutoConfig, GenerationConfig, PreTrainedModel

from blockrag.errors import UnsupportedModelError
from blockrag.modeling.bundle import Bundle
from blockrag.modeling.cache import cache_dir, changed_file, is_ours, made, remembered_sha256
from blockrag.modeling.checkpoint import load_stock_model
from blockrag.modeling.files import hashed
from blockrag.modeling.linear_layers import GROUPS, give_freed_memory_back
from blockrag.modeling.loading import skeleton
from blockrag.modeling.measuring import own_logits, probe_of
from blockrag.modeling.plain_decoder import UnsuitableError
from blockrag.modeling.step import pack, packed_weights, stepped_dtypes
from blockrag.modeling.support import inspect_model

FORM = 2
"""Version of the files: with a change of what they hold, they are made again."""
LEAST_BYTES = 16 * 2**20
"""Models with smaller weights are loaded as fast as they are mapped."""
_KEPT = 4
"""Folders that stay when one is made: of the bundles and types that were used last."""
_ROOM = 3
"""Free bytes for each byte of weights: the cache never takes the last of a disk."""
_WEIGHTS, _TENSORS = "weights.bin", "tensors.json"
_ALIGNMENT = 64

_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ServedModel:
    """A decoder as transformers has it, in the type that it computes in."""

    model: PreTrainedModel
    packed: Mapping[str, Tensor]
    """Products in eight bits by name (``step.packed_weights``); empty where they are not made yet."""


def load_served_model(
    bundle: Bundle,
    *,
    device: str | torch.device = "cpu",
    compute_dtype: str | None = None,
    least_bytes: int = LEAST_BYTES,
) -> ServedModel:
    """The decoder of ``bundle`` with all that is merged into it. Raises BundleError for damaged weights.

    Mapped on the CPU; for other devices it is loaded as ever. ``least_bytes``: of the files that its weights are in;
    what has less is not kept.
    """
    dtype = compute_dtype or bundle.compute_dtype
    weights = sum(file.stat().st_size for file in bundle.weights_dir().glob("*.safetensors"))
    if weights >= least_bytes and torch.device(device).type == "cpu":
        try:
            folder = _folder(bundle, dtype)
            return _read(_made(bundle, dtype, folder, weights))
        except _NotServedError as error:
            _logger.warning("%s: its weights are held by each process: %s", bundle.path, error)
    return ServedModel(load_stock_model(bundle, device=device, compute_dtype=dtype), {})


class _NotServedError(Exception):
    """Why weights are made in memory."""


def _folder(bundle: Bundle, dtype: str) -> Path:
    key = {
        "decoder": bundle.decoder_fingerprint,
        "dtype": dtype,
        "form": FORM,
        "torch": str(torch.__version__),
        "transformers": transformers.__version__,
    }
    try:
        return cache_dir() / "served" / hashed(key)
    except RuntimeError as error:
        raise _NotServedError(str(error)) from error


def _made(bundle: Bundle, dtype: str, folder: Path, weights: int) -> Path:
    def make(staging: Path) -> None:
        free = shutil.disk_usage(staging).free
        if free < _ROOM * weights:
            raise _NotServedError(f"{free >> 20} MiB are free in {staging.parent}, for weights of {weights >> 20} MiB")
        _write(load_stock_model(bundle, compute_dtype=dtype), staging)

    try:
        there = folder.exists()
        made(folder, make, bundle.name)
        if not all(is_ours(path) for path in (folder, *folder.iterdir())):
            raise _NotServedError(f"{folder} may be written by others")
        if there and changed_file(folder, remembered_sha256) is not None:
            _logger.warning("%s is not what was written, and is made again", folder)
            shutil.rmtree(folder)
            made(folder, make, bundle.name)
        if not there:
            _forget_old(folder)
            give_freed_memory_back()
        with suppress(OSError):
            os.utime(folder)  # when it was used last
    except OSError as error:
        raise _NotServedError(str(error)) from error
    return folder


def _forget_old(newest: Path) -> None:
    """Removes what was not used for longest. Who has mapped it keeps it."""
    with suppress(OSError):
        others = [path for path in newest.parent.iterdir() if path.is_dir() and path != newest]
        others.sort(key=lambda path: path.stat().st_mtime, reverse=True)
        for path in others[_KEPT - 1 :]:
            shutil.rmtree(path, ignore_errors=True)


def _write(model: PreTrainedModel, folder: Path) -> None:
    """Raises _NotServedError for a model that is not the same when it is read back."""
    model.config.save_pretrained(folder)
    if model.generation_config is not None:
        model.generation_config.save_pretrained(folder)
    named = dict(model.named_parameters())  # of tied ones the first
    names = {id(tensor): name for name, tensor in named.items()}
    tied = {
        name: names[id(tensor)]
        for name, tensor in model.named_parameters(remove_duplicate=False)
        if names[id(tensor)] != name
    }
    buffers = dict(model.named_buffers())
    facts = inspect_model(model)
    packed: dict[str, Tensor] = {}
    if model.dtype in stepped_dtypes():
        with suppress(UnsuitableError):
            packed = packed_weights(pack(model, facts))
    places: dict[str, dict[str, list[object]]] = {"parameters": {}, "buffers": {}, "packed": {}}
    with (folder / _WEIGHTS).open("wb") as file:
        for kind, tensors in (("parameters", named), ("buffers", buffers), ("packed", packed)):
            for group in _groups(tensors):
                file.write(bytes(-file.tell() % _ALIGNMENT))
                for name in group:
                    tensor = tensors[name].detach().contiguous()
                    places[kind][name] = [str(tensor.dtype).removeprefix("torch."), [*tensor.shape], file.tell()]
                    file.write(tensor.reshape(-1).view(torch.uint8).numpy().data)
    (folder / _TENSORS).write_text(json.dumps({**places, "tied": tied}), encoding="utf-8")
    _check_same(model, _read(folder).model)


def _groups(tensors: Mapping[str, Tensor]) -> Iterator[Sequence[str]]:
    """Names of all of them in their order, but what is fused together."""
    done: set[str] = set()
    for name in tensors:
        if name in done:
            continue
        group = _fused_with(name, tensors)
        done.update(group)
        yield group


def _fused_with(name: str, tensors: Mapping[str, Tensor]) -> Sequence[str]:
    module, _, leaf = name.rpartition(".")
    parent, _, linear = module.rpartition(".")
    for _, linears in GROUPS:
        together = [f"{parent}.{other}.{leaf}" for other in linears]
        there = [tensors[other].dtype for other in together if other in tensors]
        if linear in linears and len(there) == len(together) and len(set(there)) == 1:
            return together
    return (name,)


def _read(folder: Path) -> ServedModel:
    """Raises _NotServedError for what cannot be read."""
    try:
        described = json.loads((folder / _TENSORS).read_text(encoding="utf-8"))
        size = (folder / _WEIGHTS).stat().st_size
        # a private mapping: whoever wrote to it would change a copy of the page
        storage = torch.from_file(str(folder / _WEIGHTS), shared=False, size=size, dtype=torch.uint8).untyped_storage()
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        model = skeleton(config, dtype=config.dtype)
        parameters = {
            name: nn.Parameter(_tensor(storage, place), requires_grad=False)
            for name, place in described["parameters"].items()
        }
        parameters |= {name: parameters[other] for name, other in described["tied"].items()}
        for name, parameter in parameters.items():
            owner, leaf = _owner(model, name)
            owner._parameters[leaf] = parameter
        for name, place in described["buffers"].items():
            owner, leaf = _owner(model, name)
            owner._buffers[leaf] = _tensor(storage, place).clone()
        if (folder / "generation_config.json").is_file():
            model.generation_config = GenerationConfig.from_pretrained(folder, local_files_only=True)
        packed = {name: _tensor(storage, place) for name, place in described["packed"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RuntimeError) as error:
        raise _NotServedError(f"{folder}: {error}") from error
    left = [name for name, tensor in (*model.named_parameters(), *model.named_buffers()) if tensor.is_meta]
    if left:
        raise _NotServedError(f"{folder}: no {', '.join(left[:8])}")
    return ServedModel(model.train(False), packed)


def _owner(model: PreTrainedModel, name: str) -> tuple[nn.Module, str]:
    module, _, leaf = name.rpartition(".")
    return model.get_submodule(module), leaf


def _tensor(storage: torch.UntypedStorage, place: Sequence[object]) -> Tensor:
    name, shape, offset = place
    dtype: torch.dtype = getattr(torch, str(name))
    sizes = [int(size) for size in shape]  # type: ignore[attr-defined]
    start = int(offset)  # type: ignore[call-overload]
    if start % dtype.itemsize or start + math.prod(sizes) * dtype.itemsize > storage.nbytes():
        raise ValueError(f"{name} {shape} at {offset}, where there are {storage.nbytes()} bytes")
    strides = [math.prod(sizes[axis + 1 :]) for axis in range(len(sizes))]
    return torch.empty(0, dtype=dtype).set_(storage, start // dtype.itemsize, sizes, strides)


def _check_same(model: PreTrainedModel, read: PreTrainedModel) -> None:
    """Raises _NotServedError where the model that was read computes otherwise than ``model``, which was written."""
    try:
        facts = inspect_model(model)
        probe = probe_of(facts)
        for first in (0, facts.max_positions - len(probe)):
            expected, got = (own_logits(each, probe, first) for each in (model, read))
            if not torch.equal(expected, got):
                raise _NotServedError(f"{facts.name}: read back, it does not compute the same")
    except UnsupportedModelError as error:
        raise _NotServedError(str(error)) from error
