"""Reading a Hugging Face checkpoint: with every weight that it holds, or not at all.

transformers leaves out weights that its class has no place for, fills missing ones with random numbers, asks on the
terminal whether to run a checkpoint's own code, and needs packages of its own for each kind of quantised weights. What
that concerns is refused here by what the files say, before any weight is read.

``load_stock_model`` is the one place where a bundle's parts become weights.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, PreTrainedConfig, PreTrainedModel

from blockrag.errors import BundleError
from blockrag.modeling.adapter import merge_adapter, put_token_rows, read_adapter, read_token_rows
from blockrag.modeling.bundle import Bundle
from blockrag.modeling.files import check_safetensors, read_json
from blockrag.modeling.loading import DTYPES, LOAD_ERRORS, check_finite, check_none, load_weights, skeleton
from blockrag.modeling.pear import fold
from blockrag.modeling.support import ModelFacts, inspect_model

_INDEX = "model.safetensors.index.json"
_QUANTISED_FILES = ("quantize_config.json", "quant_config.json", "quant_log.csv", "hf_quant_config.json")
_ADAPTER = "adapter_config.json"
_NAMED = 8


def check_checkpoint(folder: Path, *, weights: bool = True) -> None:
    """Check what the files of a checkpoint say; ``weights`` False for a directory that holds none.

    Raises BundleError naming the file and the reason: quantised weights, code of its own, an adapter, missing shards,
    damaged files.
    """
    config = read_json(folder / "config.json")
    _check_config(folder, config)
    if weights:
        _check_weights(folder)


def inspect_checkpoint(folder: Path) -> ModelFacts:
    """What its configuration says of driving it. Raises BundleError, UnsupportedModelError as ``inspect_model``."""
    config = read_config(folder)
    try:
        model = skeleton(config)
    except LOAD_ERRORS as error:
        raise BundleError(f"{folder}: no causal language model in the Hugging Face format: {error}") from error
    return inspect_model(model)


def read_config(folder: Path) -> PreTrainedConfig:
    """The configuration. Raises BundleError, for a checkpoint with code of its own too."""
    if not (folder / "config.json").is_file():
        raise BundleError(f"{folder}: no causal language model in the Hugging Face format: lacks config.json")
    check_checkpoint(folder, weights=False)
    try:
        config: PreTrainedConfig = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except LOAD_ERRORS as error:
        raise BundleError(f"{folder}: no causal language model in the Hugging Face format: {error}") from error
    return config


def load_checkpoint(folder: Path, dtype: torch.dtype, config: PreTrainedConfig | None = None) -> PreTrainedModel:
    """The model with all weights of the checkpoint, on the CPU; ``config`` instead of the checkpoint's own.

    Raises BundleError as ``check_checkpoint``, and naming the weights that are missing, of another shape or left over.
    """
    config = config or read_config(folder)
    check_checkpoint(folder)
    options = {"config": config, "dtype": dtype, "ignore_mismatched_sizes": True}  # refused below, by their names
    model, info = load_weights(AutoModelForCausalLM, folder, "the weights do", **options)
    other = [f"{name} ({list(there)} for {list(wanted)})" for name, there, wanted in info["mismatched_keys"]]
    check_none(folder, other, "weights have another shape than the configuration says")
    check_none(folder, info["missing_keys"])
    check_none(
        folder,
        info["unexpected_keys"],
        f"{type(model).__name__}, as its configuration describes it, has no place for weights that the checkpoint "
        "holds, so it would compute something else",
    )
    return model


def _check_config(folder: Path, config: dict[str, Any]) -> None:
    quantised = config.get("quantization_config") or config.get("compression_config")
    kind = quantised.get("quant_method") if isinstance(quantised, dict) else None
    beside = next((name for name in _QUANTISED_FILES if (folder / name).is_file()), None)
    if quantised or beside:
        raise BundleError(
            f"{folder}: its weights are quantised ({kind or beside or 'quantization_config'}): they must be float32, "
            "float16 or bfloat16, or a GGUF file, which is converted; take the checkpoint that it was quantised from"
        )
    if code := config.get("auto_map"):
        files = sorted({str(name) for name in code.values()}) if isinstance(code, dict) else [str(code)]
        raise BundleError(
            f"{folder / 'config.json'}: names code of its own (auto_map: {', '.join(files[:_NAMED])}), and no "
            "checkpoint's code is run; if transformers' own class of its model_type computes the same, remove auto_map"
        )
    if (folder / _ADAPTER).is_file():
        raise BundleError(f"{folder}: holds an adapter ({_ADAPTER}): merge it into the weights first")


def _check_weights(folder: Path) -> None:
    if (folder / "model.safetensors").is_file():
        shards = ["model.safetensors"]
    elif (folder / _INDEX).is_file():
        places = read_json(folder / _INDEX).get("weight_map")
        if not isinstance(places, dict) or not places or not all(isinstance(name, str) for name in places.values()):
            raise BundleError(f"{folder / _INDEX}: has no weight_map")
        shards = sorted(set(places.values()))
        absent = [name for name in shards if not (folder / name).is_file()]
        if absent:
            raise BundleError(
                f"{folder}: {len(absent)} of {len(shards)} shards are missing: {', '.join(absent[:_NAMED])}"
            )
    else:
        found = sorted(path.name for path in folder.glob("*.safetensors"))
        if not found:
            raise BundleError(f"{folder}: lacks weights in safetensors (*.safetensors)")
        raise BundleError(f"{folder}: has {', '.join(found[:_NAMED])}, but neither model.safetensors nor {_INDEX}")
    for name in shards:
        types = check_safetensors(folder / name)
        narrow = [tensor for tensor in sorted(types) if types[tensor].startswith(("F8", "F6", "F4", "I", "U"))]
        if narrow:
            raise BundleError(
                f"{folder / name}: weights that are no floating-point numbers of 16 bits or more (quantised?): "
                f"{', '.join(narrow[:_NAMED])}"
            )


def load_stock_model(
    bundle: Bundle,
    *,
    device: str | torch.device = "cpu",
    compute_dtype: str | None = None,
    with_adapter: bool = True,
) -> PreTrainedModel:
    """The bundle's decoder as transformers loads it, checked for NaN and infinity. Raises BundleError.

    A base's rows for added tokens, its adapter and PEAR's coefficients are put into the weights here, in this order,
    and only here, so that whoever serves, verifies or evaluates a bundle has the same weights. ``with_adapter`` False
    leaves the adapter out, for who trains it further; a bundle with coefficients is refused then, because they were
    learnt for the merged weights.
    """
    dtype = DTYPES.get(compute_dtype or bundle.compute_dtype)
    if dtype is None:
        raise ValueError(f"compute_dtype {compute_dtype!r}: must be one of {', '.join(DTYPES)}")
    if not with_adapter and bundle.pear is not None:
        raise BundleError(f"{bundle.path}: its coefficients of heads (PEAR) do not fit the base without the adapter")
    model = _load(bundle, dtype, with_adapter)
    check_finite(bundle.decoder_dir, model.named_parameters())
    if bundle.pear is not None:
        fold(model, bundle.pear.heads)
    return model.train(False).to(device)


def load_first_layers(bundle: Bundle, layers: int) -> PreTrainedModel:
    """The first ``layers`` layers of the bundle's decoder without its head and its last norm, in float32.

    Of a bundle with a base they are the base's, without adapter and coefficients: they stay as they are while an
    adapter is trained. Raises BundleError for damaged weights.
    """
    trunk: PreTrainedModel = _load(bundle, torch.float32, with_adapter=False).model
    trunk.layers = trunk.layers[:layers]
    trunk.config.num_hidden_layers = layers
    trunk.norm = torch.nn.Identity()
    check_finite(bundle.decoder_dir, trunk.named_parameters())
    return trunk.train(False).requires_grad_(False)


def _load(bundle: Bundle, dtype: torch.dtype, with_adapter: bool) -> PreTrainedModel:
    """On a base the configuration is the bundle's, but for the vocabulary, which grows from the base's."""
    folder = bundle.weights_dir()
    if bundle.base is None:
        return load_checkpoint(folder, dtype)
    stored = read_json(folder / "config.json")
    config = read_config(bundle.decoder_dir)
    config.vocab_size = int(stored["vocab_size"])
    # merged before anything is rounded to a narrower type
    kept = torch.float32 if stored.get("dtype", stored.get("torch_dtype")) != "bfloat16" else dtype
    model = load_checkpoint(folder, kept, config)
    if bundle.token_rows is not None:
        rows = read_token_rows(bundle.path, bundle.token_rows)
        put_token_rows(model, rows, bundle.vocab_size, bundle.path)
    elif bundle.vocab_size != config.vocab_size:
        raise BundleError(
            f"{bundle.decoder_dir}: a vocabulary of {bundle.vocab_size}, where the base has {config.vocab_size} and no "
            "token_rows were added"
        )
    if with_adapter and bundle.adapter is not None:
        merge_adapter(model, read_adapter(bundle.adapter_dir))
    if kept != dtype:
        for parameter in model.parameters():  # not model.to: that rounds the rotary frequencies too
            parameter.data = parameter.data.to(dtype)
        model.config.dtype = dtype
    if (bundle.decoder_dir / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(bundle.decoder_dir, local_files_only=True)
    return model


def configured_ends(model: PreTrainedModel) -> set[int]:
    """Tokens that end an answer, as the model's configuration has them."""
    ends: set[int] = set()
    for config in (model.config, model.generation_config):
        value = getattr(config, "eos_token_id", None)
        if value is not None:
            ends.update(value if isinstance(value, list) else [value])
    return ends
