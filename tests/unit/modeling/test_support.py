"""Which models are driven, each family with a tiny random model, and why others are not."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import transformers
from torch import nn
from transformers import PreTrainedModel

from blockrag.errors import UnsupportedModelError
from blockrag.modeling.model import SlotModel
from blockrag.modeling.stock_passes import block_mask, stock_mask
from tests.models import make_tiny_model

_SIZES: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 256,
    "initializer_range": 0.2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_WINDOW = {"sliding_window": 16}
_YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 64}
_LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 1e4,
    "short_factor": [1.0, 1.1, 1.2, 1.5],
    "long_factor": [2.0] * 4,
    "original_max_position_embeddings": 128,
}
_LLAMA_4 = {**_YARN, "llama_4_scaling_beta": 0.1, "original_max_position_embeddings": 128}
# Classes of transformers by the first part of their names, with what makes each what it is.
DRIVEN: dict[str, dict[str, Any]] = {
    "Apertus": {},
    "Arcee": {},
    "Cohere": {},
    "Cohere2": _WINDOW,
    "Cwm": _WINDOW,
    "Ernie4_5": {},
    "Exaone4": _WINDOW,
    "Gemma": {},
    "Gemma2": {**_WINDOW, "attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0},
    "Gemma3": {**_WINDOW, "num_hidden_layers": 7},
    "Glm": {},
    "Glm4": {},
    "Granite": {"attention_multiplier": 0.3, "logits_scaling": 2.0, "residual_multiplier": 0.5},
    "Helium": {},
    "HunYuanDenseV1": {},
    "Llama": {"rope_parameters": _YARN},
    "Ministral": _WINDOW,
    "Ministral3": {"rope_parameters": _LLAMA_4},
    "Mistral": _WINDOW,
    "Mixtral": {"num_local_experts": 4},
    "Nemotron": {},
    "Olmo": {},
    "Olmo2": {},
    "Olmo3": _WINDOW,
    "Phi": {},
    "Phi3": {"rope_parameters": _LONGROPE, "original_max_position_embeddings": 128},
    "Qwen2": {},
    "Qwen3": {},
    "SeedOss": {},
    "SmolLM3": {},
    "StableLm": {"use_qkv_bias": True},
    "Starcoder2": _WINDOW,
    "VaultGemma": _WINDOW,
}
_MODELS = {"GPT2": "GPT2LMHeadModel"}
_CONFIGURATIONS = {"Gemma3": "Gemma3TextConfig"}


def build(family: str, **overrides: Any) -> PreTrainedModel:
    config_type = getattr(transformers, _CONFIGURATIONS.get(family, f"{family}Config"))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model: PreTrainedModel = getattr(transformers, _MODELS.get(family, f"{family}ForCausalLM"))(
            config_type(**{**_SIZES, **overrides})
        )
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                nn.init.normal_(parameter, std=0.2)
    return model.eval()


def _ids(count: int, seed: int) -> list[int]:
    return torch.randint(64, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


@pytest.mark.parametrize("family", DRIVEN)
@torch.inference_mode()
def test_a_family_is_driven(family: str) -> None:
    """Full mode in pieces, and blocks of the cache up to the model's last position, equal the stock model; A3."""
    stock = build(family, **DRIVEN[family])
    model = SlotModel.from_pretrained_model(copy.deepcopy(stock))
    tokens = _ids(90, 1)
    expected = stock(torch.tensor([tokens]), use_cache=False).logits[0]
    state = model.new_sequence([], 90)
    model.forward([(state, tokens[:30])])
    got = torch.cat(
        [model.forward([(state, tokens[30:88])], every_token=True), model.forward([(state, tokens[88:89])])]
    )
    torch.testing.assert_close(got, expected[30:89], rtol=0, atol=1e-4 * float(expected.abs().max()))

    blocks, final = [_ids(1, 2), _ids(37, 3), _ids(25, 4)], _ids(11, 5)
    prompt = [token for block in blocks for token in block] + final
    far = model.max_positions - len(prompt)
    mask = stock_mask(stock, block_mask([len(block) for block in blocks], len(final)))
    positions = torch.arange(far, model.max_positions)[None]
    expected = stock(torch.tensor([prompt]), attention_mask=mask, position_ids=positions, use_cache=False).logits[0]
    resident = [model.to_resident(block) for block in model.encode(blocks, list("abc"))]
    state = model.new_sequence(resident, len(final), first_position=far)
    got = model.forward([(state, final)], every_token=True)
    torch.testing.assert_close(got, expected[-11:], rtol=0, atol=1e-4 * float(expected.abs().max()))


def test_positions_end_where_a_model_begins_to_compute_something_else() -> None:
    """A3 of the cases: queries scaled by position, and frequencies that change with the prompt's length."""
    assert SlotModel.from_pretrained_model(build("Ministral3", **DRIVEN["Ministral3"])).max_positions == 128
    assert SlotModel.from_pretrained_model(build("Phi3", **DRIVEN["Phi3"])).max_positions == 128
    assert SlotModel.from_pretrained_model(build("Mistral", **_WINDOW)).max_positions == 256


@torch.inference_mode()
def test_what_a_model_computes_from_positions_gets_them() -> None:
    """A3 of the cases: true position ids reach every layer."""
    model = SlotModel.from_pretrained_model(make_tiny_model("llama"))
    seen: list[list[int]] = []
    model.layers[1].register_forward_pre_hook(
        lambda _, __, options: seen.append(options["position_ids"][0].tolist()), with_kwargs=True
    )
    first, second = model.new_sequence([], 9), model.new_sequence([], 9, first_position=500)
    model.forward([(first, [3, 4])])
    model.forward([(first, [5]), (second, [6, 7])])
    assert seen == [[0, 1], [2, 500, 501]]


@torch.inference_mode()
def test_a_cast_model_is_rotated_by_frequencies_that_were_not() -> None:
    stock = make_tiny_model("llama").to(torch.bfloat16)
    exact = make_tiny_model("llama").model.rotary_emb.inv_freq
    rotations = SlotModel.from_pretrained_model(stock).rotary.rotations
    assert rotations[0].frequencies == tuple(exact.tolist())


@pytest.mark.parametrize(
    ("family", "problem"),
    [
        ("GPT2", "no decoder with a list of layers at model.layers"),
        ("Bloom", "no decoder with a list of layers at model.layers"),
        ("GPTNeoX", "no decoder with a list of layers at model.layers"),
        ("GptOss", "attention sinks are not supported"),
        ("GraniteSWA", "attention sinks are not supported"),
    ],
)
def test_names_what_a_model_lacks(family: str, problem: str) -> None:
    experts = {"num_local_experts": 2} if family == "GptOss" else {}
    with pytest.raises(UnsupportedModelError, match=problem):
        SlotModel.from_pretrained_model(build(family, **experts))


def test_refuses_rotary_variants_that_depend_on_the_prompt() -> None:
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}
    with pytest.raises(UnsupportedModelError, match="dynamic"):
        SlotModel.from_pretrained_model(make_tiny_model("llama", rope_parameters=rope))


def test_refuses_a_model_without_rotary_embedding() -> None:
    model = make_tiny_model("llama")
    model.model.rotary_emb = nn.Identity()
    with pytest.raises(UnsupportedModelError, match="no rotary position embedding"):
        SlotModel.from_pretrained_model(model)


@pytest.mark.parametrize(
    ("method", "problem"),
    [
        ("backwards", "layer 0: its rotary embedding is of a kind that is not known"),
        ("value", "layer 0: its value states depend on positions otherwise than by rotation"),
        ("later", "layer 0: its attention sees later positions"),
        ("given", "layer 0: its attention is given position_bias, which is not supported"),
        ("window", "layer 0: its attention is not told of the window"),
    ],
)
def test_refuses_what_only_looks_like_a_driven_model(method: str, problem: str) -> None:
    model = make_tiny_model("llama")
    attention = model.model.layers[0].self_attn

    def before(_module: nn.Module, arguments: Any, options: dict[str, Any]) -> Any:
        cosine, sine = options["position_embeddings"]
        if method == "backwards":
            options["position_embeddings"] = cosine, -sine
        elif method == "value":
            attention.v_proj.bias = nn.Parameter(options["position_ids"][0, 0] * torch.ones(16))
        elif method == "given":
            options["position_bias"] = torch.zeros(1)
        elif method == "window":
            options["sliding_window"] = 4
        return arguments, options

    attention.register_forward_pre_hook(before, with_kwargs=True)
    attention.is_causal = method != "later"
    with pytest.raises(UnsupportedModelError, match=problem):
        SlotModel.from_pretrained_model(model)


def test_refuses_unknown_layer_types() -> None:
    model = make_tiny_model("qwen3")
    model.config.layer_types = ["full_attention", "linear_attention", "full_attention"]
    with pytest.raises(UnsupportedModelError, match="linear_attention"):
        SlotModel.from_pretrained_model(model)


def test_refuses_an_unknown_cache_type() -> None:
    with pytest.raises(ValueError, match="int8"):
        SlotModel.from_pretrained_model(make_tiny_model("llama"), kv_dtype="int4")
