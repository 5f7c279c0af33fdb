from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, GGUFWriter, TokenType
from transformers import AutoModelForCausalLM, GgufConfig, PreTrainedModel, PreTrainedTokenizerFast

from blockrag.errors import BundleError
from blockrag.modeling.gguf_file import convert, open_gguf
from blockrag.modeling.loading import no_progress_bar
from tests.gguf_files import CHAT_TEMPLATE, F32, make_tiny_gguf, tiny_gguf_model
from tests.models import make_tiny_tokenizer

TOKENS = torch.tensor([[1, 40, 41, 42, 99, 7, 150, 299]])


def converted_model(gguf: Path, folder: Path) -> PreTrainedModel:
    folder.mkdir()
    convert(open_gguf(gguf), folder)
    with no_progress_bar():
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, local_files_only=True)
    assert isinstance(model, PreTrainedModel)
    return model.eval()


@torch.inference_mode()
def logits(model: PreTrainedModel) -> torch.Tensor:
    found: torch.Tensor = model(TOKENS, use_cache=False).logits
    return found


@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("llama", {}),
        ("llama", {"tie_word_embeddings": False, "head_dim": 16}),
        ("mistral", {"sliding_window": None}),
        ("qwen2", {}),
        ("qwen3", {"head_dim": 16}),
        ("llama", {"rope_parameters": {"rope_type": "default", "rope_theta": 777.0}}),
    ],
)
def test_float32_comes_back_as_it_was(family: str, options: dict[str, Any], tmp_path: Path) -> None:
    model = tiny_gguf_model(family, **options)
    file = make_tiny_gguf(tmp_path / "tiny.gguf", model, kind=F32)

    assert open_gguf(file).config.dtype == torch.float32
    assert torch.equal(logits(converted_model(file, tmp_path / "out")), logits(model))


@pytest.mark.parametrize("kind", ["F16", "BF16"])
def test_sixteen_bits_keep_their_values(kind: str, tmp_path: Path) -> None:
    dtype = {"F16": torch.float16, "BF16": torch.bfloat16}[kind]
    model = tiny_gguf_model()
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype).float()
    file = make_tiny_gguf(tmp_path / "tiny.gguf", model, kind=GGMLQuantizationType[kind])

    assert open_gguf(file).config.dtype == (torch.float32 if kind == "F16" else torch.bfloat16)
    assert torch.equal(logits(converted_model(file, tmp_path / "out")), logits(model))


@pytest.mark.parametrize("kind", ["Q4_1", "Q8_0"])
def test_quantised_weights_are_what_transformers_makes_of_them(kind: str, tmp_path: Path) -> None:
    file = make_tiny_gguf(tmp_path / "tiny.gguf", kind=GGMLQuantizationType[kind])

    ours = converted_model(file, tmp_path / "out")

    with no_progress_bar():
        theirs = AutoModelForCausalLM.from_pretrained(
            tmp_path, gguf_file=file.name, dtype=torch.bfloat16, quantization_config=GgufConfig(dequantize=True)
        )
    assert ours.config.dtype == torch.float32 and open_gguf(file).config.dtype == torch.bfloat16
    expected = theirs.state_dict()
    assert ours.state_dict().keys() == expected.keys()
    for name, tensor in ours.state_dict().items():
        assert torch.equal(tensor, expected[name].float()), name


def test_the_tokenizer_gives_the_same_ids(tmp_path: Path) -> None:
    converted_model(make_tiny_gguf(tmp_path / "tiny.gguf"), tmp_path / "out")

    tokenizer = PreTrainedTokenizerFast.from_pretrained(tmp_path / "out", local_files_only=True)
    expected = make_tiny_tokenizer()
    for text in ("<|begin|>the capital<|end|>", "Ångström 42,  and 1989", "<|passage|> it was founded<|text|> a b"):
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert ids == expected(text, add_special_tokens=False)["input_ids"]
    assert tokenizer.chat_template == CHAT_TEMPLATE
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (1, 2, 0)


def test_digits_stand_alone_where_the_vocabulary_wants_it(tmp_path: Path) -> None:
    converted_model(make_tiny_gguf(tmp_path / "tiny.gguf", fields={"pre": "smollm"}), tmp_path / "out")

    tokenizer = PreTrainedTokenizerFast.from_pretrained(tmp_path / "out", local_files_only=True)
    pieces = [piece for piece, _ in tokenizer.backend_tokenizer.pre_tokenizer.pre_tokenize_str("in  1989")]
    assert pieces == ["in", "ĠĠ", "1", "9", "8", "9"]


def test_a_sentencepiece_vocabulary_is_read(tmp_path: Path) -> None:
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    merged = ["▁", "t", "h", "e", "▁t", "▁th", "▁the", "c", "a", "ca", "▁ca", "▁cat"]
    pieces += [*merged, *(f"x{number}" for number in range(300 - len(pieces) - len(merged)))]

    def change(writer: GGUFWriter) -> None:
        for key in ("tokens", "token_type", "merges"):
            del writer.kv_data[0][f"tokenizer.ggml.{key}"]
        kinds = [TokenType.UNKNOWN, *[TokenType.CONTROL] * 2, *[TokenType.BYTE] * 256]
        kinds += [TokenType.NORMAL] * (len(pieces) - len(kinds))
        writer.add_token_list(pieces)
        writer.add_token_types(kinds)
        writer.add_token_scores([-float(number) for number in range(len(pieces))])

    file = make_tiny_gguf(tmp_path / "tiny.gguf", fields={"tokenizer": "llama"}, change=change)
    converted_model(file, tmp_path / "out")

    tokenizer = PreTrainedTokenizerFast.from_pretrained(tmp_path / "out", local_files_only=True)
    assert tokenizer("the cat", add_special_tokens=False)["input_ids"] == [pieces.index("▁the"), pieces.index("▁cat")]
    assert tokenizer("<s>the", add_special_tokens=False)["input_ids"][0] == 1
    assert tokenizer("ü", add_special_tokens=False)["input_ids"][1:] == [3 + 0xC3, 3 + 0xBC]
    assert tokenizer.decode(tokenizer("the cat", add_special_tokens=False)["input_ids"]) == "the cat"
    assert tokenizer("the")["input_ids"][0] == 1  # llama.cpp adds it where a file does not say otherwise


def llama3_factors(factor: float = 8.0) -> np.ndarray[Any, Any]:
    """As llama.cpp's converter computes them for heads of 8 numbers and theta 500,000."""
    found = []
    for number in range(4):
        frequency = 500000.0 ** -(2 * number / 8)
        wavelength = 2 * math.pi / frequency
        if wavelength < 8192 / 4.0:
            found.append(1.0)
        elif wavelength > 8192 / 1.0:
            found.append(factor)
        else:
            smooth = (8192 / wavelength - 1.0) / (4.0 - 1.0)
            found.append(1 / ((1 - smooth) / factor + smooth))
    return np.array(found, np.float32)


def test_llama_3s_frequencies_are_recognised(tmp_path: Path) -> None:
    model = tiny_gguf_model(
        max_position_embeddings=16384,
        rope_parameters={
            "rope_type": "llama3",
            "rope_theta": 500000.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
    )
    file = make_tiny_gguf(tmp_path / "tiny.gguf", model, kind=F32, tensors={"rope_freqs.weight": llama3_factors()})
    assert llama3_factors().max() == 8.0

    converted = converted_model(file, tmp_path / "out")

    assert converted.config.rope_parameters["rope_type"] == "llama3"
    assert torch.equal(logits(converted), logits(model))


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "another architecture": ({"fields": {"architecture": "gpt2"}}, "architecture 'gpt2' cannot be read; these can"),
    "a part of a file": ({"change": lambda writer: writer.add_uint16("split.count", 3)}, "one of 3 parts; join them"),
    "a mixture of experts": ({"change": lambda writer: writer.add_expert_count(4)}, "a mixture of experts"),
    "scaled positions": (
        {"change": lambda writer: writer.add_rope_scaling_type(type("", (), {"value": "yarn"}))},
        "rotary positions scaled by 'yarn'",
    ),
    "unknown frequencies": (
        {"tensors": {"rope_freqs.weight": np.array([1, 1, 3, 8], np.float32)}},
        r"rope_freqs\.weight scales rotary positions in a way that is not known",
    ),
    "partial positions": (
        {"change": lambda writer: writer.add_rope_dimension_count(4)},
        "rotary positions over a part of each head",
    ),
    "a missing tensor": ({"tensors": {"blk.1.ffn_up.weight": None}}, r"lacks the tensors blk\.1\.ffn_up\.weight"),
    "a tensor that nothing reads": (
        {"tensors": {"blk.0.attn_sinks.weight": np.ones(4, np.float32)}},
        r"has tensors that are not known: blk\.0\.attn_sinks\.weight",
    ),
    "a tensor of another size": (
        {"tensors": {"blk.0.ffn_up.weight": np.ones((32, 64), np.float32)}},
        r"blk\.0\.ffn_up\.weight is of shape \[32, 64\], not \[64, 32\]",
    ),
    "fewer tokens than rows": ({"fields": {"tokens": 290}}, "the tokenizer has 290 tokens, the embedding 300 rows"),
    "another kind of tokenizer": ({"fields": {"tokenizer": "bert"}}, "its tokenizer is 'bert'"),
    "an unknown split": ({"fields": {"pre": "no-such"}}, "its tokenizer splits text as 'no-such'"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refuses_by_the_header(name: str, tmp_path: Path) -> None:
    options, problem = REFUSED[name]
    file = make_tiny_gguf(tmp_path / "tiny.gguf", **options)
    with pytest.raises(BundleError, match=rf"tiny\.gguf: .*{problem}"):
        open_gguf(file)


def test_refuses_a_type_that_cannot_be_dequantised(tmp_path: Path) -> None:
    file = make_tiny_gguf(tmp_path / "tiny.gguf")
    content = bytearray(file.read_bytes())
    name = b"blk.0.ffn_up.weight"
    at = content.index(name) + len(name) + 4 + 2 * 8  # its number of dimensions, its dimensions, then its type
    assert content[at] == GGMLQuantizationType.Q8_0
    content[at] = GGMLQuantizationType.Q8_1
    file.write_bytes(content)
    with pytest.raises(BundleError, match=r"blk\.0\.ffn_up\.weight is of type Q8_1, which cannot be dequantised"):
        open_gguf(file)


def test_refuses_a_type_that_is_not_known(tmp_path: Path) -> None:
    file = make_tiny_gguf(tmp_path / "tiny.gguf")
    content = bytearray(file.read_bytes())
    name = b"blk.0.ffn_up.weight"
    content[content.index(name) + len(name) + 4 + 2 * 8] = 99
    file.write_bytes(content)
    with pytest.raises(BundleError, match=r"a tensor's type is not known, so it cannot be dequantised: .*99"):
        open_gguf(file)


@pytest.mark.parametrize("kept", [0.001, 0.01, 0.1, 0.5, 0.999])
def test_refuses_a_truncated_file(kept: float, tmp_path: Path) -> None:
    file = make_tiny_gguf(tmp_path / "tiny.gguf")
    content = file.read_bytes()
    file.write_bytes(content[: int(kept * len(content))])
    with pytest.raises(BundleError, match=r"tiny\.gguf: truncated or damaged"):
        open_gguf(file)


def test_refuses_what_is_no_gguf_file(tmp_path: Path) -> None:
    (tmp_path / "model.gguf").write_bytes(b"GGML, an older format")
    with pytest.raises(BundleError, match=r"no GGUF file: it starts with b'GGML'"):
        open_gguf(tmp_path / "model.gguf")
    with pytest.raises(BundleError, match=r"absent\.gguf: No such file"):
        open_gguf(tmp_path / "absent.gguf")


def test_refuses_nan(tmp_path: Path) -> None:
    model = tiny_gguf_model()
    with torch.no_grad():
        model.get_parameter("model.layers.1.mlp.up_proj.weight")[3, 4] = torch.nan
    (tmp_path / "out").mkdir()
    file = open_gguf(make_tiny_gguf(tmp_path / "tiny.gguf", model, kind=F32))
    with pytest.raises(BundleError, match=r"NaN or infinity in blk\.1\.ffn_up\.weight"):
        convert(file, tmp_path / "out")
