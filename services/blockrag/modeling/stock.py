"""A bundle's decoder as transformers has it: the one place where a bundle's parts become weights."""

from __future__ import annotations

import torch
from transformers import GenerationConfig, PreTrainedModel

from blockrag.errors import BundleError
from blockrag.modeling.adapter import merge_adapter, put_token_rows, read_adapter, read_token_rows
from blockrag.modeling.bundle import Bundle
from blockrag.modeling.checkpoint import load_checkpoint, read_config
from blockrag.modeling.files import read_json
from blockrag.modeling.loading import DTYPES, check_finite
from blockrag.modeling.pear import fold


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
    if bundle.base is None:
        model = load_checkpoint(bundle.weights_dir(), dtype)
    else:
        model = _load_on_base(bundle, dtype, with_adapter)
    check_finite(bundle.decoder_dir, model.named_parameters())
    if bundle.pear is not None:
        fold(model, bundle.pear.heads)
    return model.train(False).to(device)


def load_first_layers(bundle: Bundle, layers: int) -> PreTrainedModel:
    """The first ``layers`` layers of the bundle's decoder without its head and its last norm, in float32.

    Of a bundle with a base they are the base's, without adapter and coefficients: they stay as they are while an
    adapter is trained. Raises BundleError for damaged weights.
    """
    if bundle.base is None:
        model = load_checkpoint(bundle.weights_dir(), torch.float32)
    else:
        model = _load_on_base(bundle, torch.float32, False)
    trunk: PreTrainedModel = model.model
    trunk.layers = trunk.layers[:layers]
    trunk.config.num_hidden_layers = layers
    trunk.norm = torch.nn.Identity()
    check_finite(bundle.decoder_dir, trunk.named_parameters())
    return trunk.train(False).requires_grad_(False)


def _load_on_base(bundle: Bundle, dtype: torch.dtype, with_adapter: bool) -> PreTrainedModel:
    """The configuration is the bundle's, but for the vocabulary, which grows from the base's."""
    folder = bundle.weights_dir()
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
