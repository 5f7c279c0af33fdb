"""How each layer of a model rotates its queries and keys, found by looking at what arrives at its attention.

The model runs with an attention that records its inputs and answers zeros, so that hidden states are the same in every
run: once with its own rotary modules, once without rotation, once without and at other positions. From the first two
follows which pairs each layer turns by which frequencies, at positions up to the model's last; from the last two that
nothing else which attention gets depends on positions. Nothing of this is taken from the name of a model.

And a probe: eight tokens through a model as it is and as it is driven; what is loaded computes the same, or is refused.
"""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel

from blockrag.errors import UnsupportedModelError
from blockrag.modeling.rotary import IdentityRotary, Rotation, pairs_as_real
from blockrag.modeling.support import ModelFacts, rotary_modules

_RECORDING = "blockrag_recording"
"""Name in transformers' ``AttentionInterface``. No mask function has it, so transformers builds no mask."""
_TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-3}
_NARROW = 5e-2
_KNOWN_TENSORS = frozenset({"position_ids", "cache_position"})


_RECORD: ContextVar[dict[int, _Call]] = ContextVar("what was recorded so far, by layer")


@dataclass(frozen=True)
class _Call:
    """What one layer's attention was given: query, key and value [heads, T, head_dim] before all else."""

    query: Tensor
    key: Tensor
    value: Tensor
    options: dict[str, Any]
    causal: bool


@torch.inference_mode()
def measure_rotations(model: PreTrainedModel, facts: ModelFacts) -> tuple[Rotation, ...]:
    """The rotation of every layer. ``model`` is as it was afterwards.

    Raises UnsupportedModelError for a layer whose attention gets something else than rotated queries and keys.
    """
    own = {path: _exact(module, model.config) for path, module in rotary_modules(model).items()}
    still = {path: IdentityRotary(module) for path, module in own.items()}
    last = facts.max_positions - 1
    positions = sorted({0, 1, 2, 3, 7, last // 3, last // 2, last - 2, last - 1, last} & set(range(last + 1)))
    try:
        rotated = _record(model, own, positions)
        plain = _record(model, still, positions)
        elsewhere = _record(model, still, positions[::-1])
    except UnsupportedModelError:
        raise
    except Exception as error:  # whatever a model does with an attention that it does not expect
        raise UnsupportedModelError(f"{facts.name}: its layers cannot be looked into: {error}") from error
    layers = range(facts.shape.num_layers)
    if any(sorted(calls) != list(layers) for calls in (rotated, plain, elsewhere)):
        raise UnsupportedModelError(
            f"{facts.name}: the attention of every layer must go through transformers' AttentionInterface, once"
        )
    places = torch.tensor(positions)
    found = []
    for layer in layers:
        _check_call(facts, model.config, layer, plain[layer])
        for kind in ("query", "key", "value"):
            if not _close(getattr(plain[layer], kind), getattr(elsewhere[layer], kind)):
                raise UnsupportedModelError(
                    f"{facts.name}: layer {layer}: its {kind} states depend on positions otherwise than by rotation"
                )
        matching = (
            rotation
            for rotation in _candidates(facts, own.values())
            if all(
                _close(getattr(rotated[layer], kind), _turned(getattr(plain[layer], kind), rotation, places))
                for kind in ("query", "key")
            )
        )
        rotation = next(matching, None)
        if rotation is None or not _close(rotated[layer].value, plain[layer].value):
            raise UnsupportedModelError(
                f"{facts.name}: layer {layer}: its rotary embedding is of a kind that is not known"
            )
        found.append(rotation)
    return tuple(found)


def without_rotation(model: PreTrainedModel) -> None:
    """Replace the rotary modules of ``model`` by the identity."""
    for path, module in rotary_modules(model).items():
        model.set_submodule(path, IdentityRotary(module))


def _exact(module: nn.Module, config: Any) -> nn.Module:
    """A copy with frequencies in float32; made anew where the model's were rounded when it was cast."""
    if all(buffer.dtype == torch.float32 for name, buffer in module.named_buffers() if name.endswith("inv_freq")):
        return copy.deepcopy(module)
    fresh: nn.Module = type(module)(config=config)
    return fresh.to(next(module.buffers()).device)


def _record(model: PreTrainedModel, modules: Mapping[str, nn.Module], positions: Sequence[int]) -> dict[int, _Call]:
    """What each layer's attention is given with these rotary modules in place of the model's own."""
    vocabulary = int(model.config.vocab_size)
    ids = torch.tensor([[(7 * place + 3) % vocabulary for place in range(len(positions))]], device=model.device)
    before = {path: model.get_submodule(path) for path in modules}
    implementation = model.config._attn_implementation
    AttentionInterface.register(_RECORDING, _recording)
    record: dict[int, _Call] = {}
    told = _RECORD.set(record)
    try:
        for path, module in modules.items():
            model.set_submodule(path, module)
        model.set_attn_implementation(_RECORDING)
        places = torch.tensor([list(positions)], device=model.device)
        model.model(input_ids=ids, position_ids=places, use_cache=False)
    finally:
        for path, module in before.items():
            model.set_submodule(path, module)
        model.set_attn_implementation(implementation)
        _RECORD.reset(told)
    return record


def _recording(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
) -> tuple[Tensor, None]:
    record = _RECORD.get()
    layer = int(module.layer_idx)  # type: ignore[arg-type]
    if layer in record:
        raise UnsupportedModelError(f"{type(module).__name__}: layer {layer} attends twice")
    causal = bool(getattr(module, "is_causal", True)) and options.get("is_causal", True) is not False
    record[layer] = _Call(query[0].cpu(), key[0].cpu(), value[0].cpu(), options, causal)
    return query.new_zeros(1, query.shape[2], query.shape[1], value.shape[3]), None


def _check_call(facts: ModelFacts, config: Any, layer: int, call: _Call) -> None:
    where = f"{facts.name}: layer {layer}"
    shape = (facts.shape.num_kv_heads, call.key.shape[1], facts.shape.head_dim)
    if call.key.shape != shape or call.value.shape != shape or call.query.shape[2] != facts.shape.head_dim:
        raise UnsupportedModelError(
            f"{where}: keys {list(call.key.shape)} and values {list(call.value.shape)}, where its configuration says "
            f"{list(shape)}"
        )
    if not call.causal:
        raise UnsupportedModelError(f"{where}: its attention sees later positions")
    unknown = [name for name, given in call.options.items() if isinstance(given, Tensor) and name not in _KNOWN_TENSORS]
    if unknown:
        raise UnsupportedModelError(f"{where}: its attention is given {', '.join(unknown)}, which is not supported")
    kinds = getattr(config, "layer_types", None)
    slides = kinds[layer] == "sliding_attention" if kinds else facts.window is not None
    if call.options.get("sliding_window") != (facts.window if slides else None):
        raise UnsupportedModelError(
            f"{where}: its attention is not told of the window that its mask has, or of another"
        )


def _candidates(facts: ModelFacts, modules: Any) -> Iterator[Rotation]:
    yield Rotation(facts.shape.head_dim)
    for module in modules:
        for name, buffer in module.named_buffers(recurse=False):
            kind, is_frequencies, _ = name.rpartition("inv_freq")
            if not is_frequencies or kind.endswith("original_") or buffer.ndim != 1:
                continue
            if 2 * len(buffer) <= facts.shape.head_dim:
                scaling = float(getattr(module, f"{kind}attention_scaling", 1.0))
                frequencies = tuple(buffer.float().tolist())
                for neighbours in (False, True):
                    yield Rotation(facts.shape.head_dim, frequencies, scaling, neighbours)


def _turned(states: Tensor, rotation: Rotation, places: Tensor) -> Tensor:
    """``states`` [heads, T, head_dim] rotated, in the model's order."""
    turned = torch.empty_like(states, dtype=torch.float32)
    turned[..., rotation.order] = pairs_as_real(rotation.to_pairs(states) * rotation.phases(places))
    return turned


def _close(got: Tensor, expected: Tensor) -> bool:
    scale = expected.float().abs().max().clamp_min(1e-6)
    difference = (got.float() - expected.float()).abs().max() / scale
    return bool(difference <= _TOLERANCE.get(got.dtype, _NARROW))


_TOKENS = 8
TOLERANCES = defaultdict(lambda: 6e-2, {torch.float32: 1e-3})
"""Largest difference of logits over slots, as a fraction of the largest, by the slots' type."""
STEP_TOLERANCE = 0.1
"""Of a step in eight bits: rounding of random models' weights costs up to 3 %, another computation 50 % and more."""


def probe_of(facts: ModelFacts) -> list[int]:
    """Token ids that are compared."""
    return [(7 * i + 3) % facts.vocab_size for i in range(min(_TOKENS, facts.max_positions))]


@torch.inference_mode()
def own_logits(model: PreTrainedModel, tokens: list[int], first_position: int) -> Tensor:
    """The stock model's logits of the last of ``tokens``, float32 [vocab]."""
    positions = torch.arange(first_position, first_position + len(tokens), device=model.device)
    inputs = torch.tensor([tokens], device=model.device)
    logits: Tensor = model(input_ids=inputs, position_ids=positions[None], use_cache=False).logits[0, -1]
    return logits.float()


def check_close(name: str, got: Tensor, expected: Tensor, tolerance: float, how: str) -> None:
    """Raise UnsupportedModelError where logits, computed ``how``, are not the model's own, float32 [vocab] both."""
    difference = float((got - expected).abs().max() / expected.abs().max().clamp_min(1e-6))
    if not difference <= tolerance:
        raise UnsupportedModelError(
            f"{name}: logits {how} differ from the model's own by {difference:.1e} of their scale; its attention is of "
            "a kind that is not supported"
        )
