from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import BertConfig, BertModel, DistilBertConfig, DistilBertModel, RobertaConfig, RobertaModel

from blockrag.errors import BundleError, InvalidRequestError
from blockrag.modeling.bundle import load_bundle
from blockrag.modeling.checkpoint import load_first_layers, load_stock_model
from blockrag.modeling.refrag.chunk_encoder import ChunkEncoder
from blockrag.modeling.refrag.compression import ChunkCompressor, Projector
from blockrag.retriever.embedding import find_embedding
from tests.models import TINY_VOCAB, make_tiny_bundle, make_tiny_tokenizer

CHUNKS = [[5, 6, 7, 8], [9], [200, 201, 10]]


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


def tiny_encoder(embeddings: Tensor | None = None, width: int = 16) -> ChunkEncoder:
    return ChunkEncoder.for_tokens(TINY_VOCAB, embeddings, width=width, layers=2, heads=2, max_chunk=8)


@pytest.mark.parametrize("pooling", ["mean", "cls"])
def test_a_chunk_is_encoded_alone(pooling: str, tmp_path: Path) -> None:
    tiny_encoder().save(tmp_path)
    encoder = ChunkEncoder.from_pretrained(tmp_path, "tokens", pooling)  # type: ignore[arg-type]
    together = encoder(CHUNKS)
    assert (together.shape, together.dtype) == ((3, 16), torch.float32)
    for vector, chunk in zip(together, CHUNKS, strict=True):
        hidden = encoder.encoder(input_ids=torch.tensor([chunk])).last_hidden_state[0]
        expected = hidden.mean(0) if pooling == "mean" else hidden[0]
        torch.testing.assert_close(vector, expected, atol=1e-5, rtol=1e-5)
    assert encoder([]).shape == (0, 16)


def test_starts_from_the_decoders_embeddings() -> None:
    generator = torch.Generator().manual_seed(1)
    table = torch.randn(TINY_VOCAB, 12, generator=generator) @ torch.randn(12, 48, generator=generator)
    encoder = tiny_encoder(table, width=12)
    kept = encoder.encoder.embeddings.word_embeddings.weight.detach()
    products, expected = kept @ kept.T, table @ table.T
    torch.testing.assert_close(products / products.norm(), expected / expected.norm(), atol=1e-6, rtol=1e-3)
    narrow = tiny_encoder(table[:, :10], width=16).encoder.embeddings.word_embeddings.weight.detach()
    torch.testing.assert_close(narrow[:, :10] / narrow[0, 0], table[:, :10] / table[0, 0], atol=1e-4, rtol=1e-4)


def test_gradients_reach_the_encoder_unless_it_is_frozen() -> None:
    encoder = tiny_encoder()
    encoder(CHUNKS).sum().backward()
    assert encoder.encoder.embeddings.word_embeddings.weight.grad is not None
    encoder.requires_grad_(False)
    assert not encoder(CHUNKS).requires_grad


@pytest.mark.parametrize("pooling", ["mean", "concat"])
def test_the_decoders_own_first_layers_read_a_chunk_alone(pooling: str, tmp_path: Path) -> None:
    bundle = load_bundle(make_tiny_bundle(tmp_path / "bundle", num_hidden_layers=3, bos_token_id=3))
    encoder = ChunkEncoder.of_decoder(bundle, 2, pooling, 4)  # type: ignore[arg-type]
    together = encoder(CHUNKS)

    stock = load_stock_model(bundle)
    width = stock.config.hidden_size
    assert encoder.layers == 2
    assert (together.shape, together.dtype) == ((3, width * (4 if pooling == "concat" else 1)), torch.float32)
    for vector, chunk in zip(together, CHUNKS, strict=True):
        states = stock(torch.tensor([[3, *chunk]]), output_hidden_states=True).hidden_states[2][0, 1:]
        states = states / states.square().mean(-1, keepdim=True).sqrt()
        whole = torch.cat([states, torch.zeros(4 - len(chunk), width)]).flatten()
        expected = states.mean(0) if pooling == "mean" else whole
        torch.testing.assert_close(vector, expected, atol=1e-4, rtol=1e-4)
    assert not encoder(CHUNKS).requires_grad
    if pooling == "concat":
        with pytest.raises(InvalidRequestError, match="a chunk of 5 tokens"):
            encoder([[1, 2, 3, 4, 5]])
    with pytest.raises(BundleError, match="the first 4 layers of a decoder that has 3"):
        ChunkEncoder.of_decoder(bundle, 4, pooling, 4)  # type: ignore[arg-type]


def test_the_decoders_first_layers_keep_their_windows(tmp_path: Path) -> None:
    windows = {"use_sliding_window": True, "sliding_window": 3, "max_window_layers": 1}
    bundle = load_bundle(make_tiny_bundle(tmp_path / "bundle", family="qwen2", num_hidden_layers=3, **windows))
    chunk = [5, 7, 9, 11, 13, 15]

    found = load_first_layers(bundle, 2)(torch.tensor([chunk]), use_cache=False).last_hidden_state

    stock = load_stock_model(bundle)
    torch.testing.assert_close(found, stock(torch.tensor([chunk]), output_hidden_states=True).hidden_states[2])
    stock.config.sliding_window = 512
    wide = stock(torch.tensor([chunk]), output_hidden_states=True).hidden_states[2]
    assert (found - wide).abs().max() > 1e-2, "the window is shorter than the chunk, so it shows"


@pytest.mark.parametrize("kind", ["bert", "distilbert", "roberta"])
def test_any_encoder_reads_the_text(kind: str, tmp_path: Path) -> None:
    sizes = {
        "vocab_size": TINY_VOCAB,
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 16,
        "max_position_embeddings": 40,
        "pad_token_id": 0,
    }
    kinds: dict[str, Any] = {
        "bert": (BertConfig, BertModel),
        "distilbert": (DistilBertConfig, DistilBertModel),
        "roberta": (RobertaConfig, RobertaModel),
    }
    config_type, model_type = kinds[kind]
    model = model_type(config_type(**sizes))
    model.eval().save_pretrained(tmp_path)
    tokenizer = make_tiny_tokenizer()
    tokenizer.save_pretrained(tmp_path)
    encoder = ChunkEncoder.from_pretrained(tmp_path, "text", "mean", tokenizer)
    long = tokenizer("the capital of the country" * 20)["input_ids"]
    words = [[3, *tokenizer(text)["input_ids"]] for text in ("the land", "Å")] + [[3], long]
    vectors = encoder(words)
    assert vectors.shape == (4, 16)
    alone = model(torch.tensor([tokenizer("the land")["input_ids"]])).last_hidden_state[0].mean(0)
    torch.testing.assert_close(vectors[0], alone, atol=1e-5, rtol=1e-5)
    assert bool(torch.isfinite(vectors).all())
    encoder.save(tmp_path / "again")
    again = ChunkEncoder.from_pretrained(tmp_path / "again", "text", "mean", tokenizer)
    torch.testing.assert_close(again(words), vectors)


@pytest.mark.parametrize(
    ("chunk", "problem"),
    [([], "at least one"), ([TINY_VOCAB], "vocabulary"), ([-1], "vocabulary"), ([1] * 9, "9 tokens, where .* has 8")],
)
def test_refuses_chunks_that_it_cannot_read(chunk: list[int], problem: str) -> None:
    with pytest.raises(InvalidRequestError, match=problem):
        tiny_encoder()([[1, 2], chunk])


def test_names_what_is_wrong_with_a_directory(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="chunk encoder does not load"):
        ChunkEncoder.from_pretrained(tmp_path / "nothing", "tokens", "mean")
    tiny_encoder().save(tmp_path)
    with pytest.raises(BundleError, match="tokenizer"):
        ChunkEncoder.from_pretrained(tmp_path, "text", "mean", make_tiny_tokenizer())
    weights = tmp_path / "model.safetensors"
    tensors = load_file(weights)
    name = "encoder.layer.1.output.dense.bias"
    save_file({**tensors, name: tensors[name] * torch.nan}, weights, metadata={"format": "pt"})
    with pytest.raises(BundleError, match=f"NaN or infinity in {name}"):
        ChunkEncoder.from_pretrained(tmp_path, "tokens", "mean")
    save_file({key: tensors[key] for key in tensors if key != name}, weights, metadata={"format": "pt"})
    with pytest.raises(BundleError, match=f"missing: {name}"):
        ChunkEncoder.from_pretrained(tmp_path, "tokens", "mean")


def test_projector_keeps_its_weights(tmp_path: Path) -> None:
    projector = Projector(16, 32, hidden=24)
    projector.save(tmp_path / "p.safetensors")
    loaded = Projector.load(tmp_path / "p.safetensors")
    assert (loaded.first.in_features, loaded.second.out_features) == (16, 32)
    vectors = torch.randn(3, 16)
    assert torch.equal(loaded(vectors), projector(vectors))
    assert loaded(vectors).shape == (3, 32)


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"second.bias": torch.full((32,), torch.inf)}, "NaN or infinity in second.bias"),
        ({"second.weight": torch.zeros(32, 9)}, "do not fit"),
        ({"third.weight": torch.zeros(1)}, "no projector"),
    ],
)
def test_projector_refuses_other_weights(change: dict[str, Tensor], problem: str, tmp_path: Path) -> None:
    path = tmp_path / "p.safetensors"
    with pytest.raises(BundleError, match="does not load"):
        Projector.load(path)
    Projector(16, 32).save(path)
    save_file({**load_file(path), **change}, path)
    with pytest.raises(BundleError, match=problem):
        Projector.load(path)


def test_compressor_cuts_blocks_into_chunks() -> None:
    compressor = ChunkCompressor(tiny_encoder(), Projector(16, 32), chunk_tokens=4)
    blocks = [list(range(20, 30)), [7], list(range(40, 48))]
    embeddings = compressor.embed(blocks)
    assert [tuple(found.shape) for found in embeddings] == [(3, 16), (1, 16), (2, 16)]
    torch.testing.assert_close(embeddings[0][2:], compressor.encoder([[28, 29]]), atol=1e-5, rtol=1e-5)
    inputs = compressor.project(embeddings)
    assert [tuple(found.shape) for found in inputs] == [(3, 32), (1, 32), (2, 32)]
    torch.testing.assert_close(inputs[2], compressor.projector(embeddings[2]))
    assert compressor.embed([]) == compressor.project([]) == []


def test_compressor_refuses_empty_blocks_and_damaged_embeddings() -> None:
    compressor = ChunkCompressor(tiny_encoder(), Projector(16, 32), chunk_tokens=4)
    with pytest.raises(InvalidRequestError, match="at least one token"):
        compressor.embed([[1], []])
    for damaged in (torch.zeros(2, 17), torch.zeros(0, 16), torch.full((1, 16), torch.nan)):
        with pytest.raises(InvalidRequestError, match="embeddings"):
            compressor.project([damaged])


def test_the_packaged_sentence_encoder_reads_chunks() -> None:
    files = find_embedding("")
    tokenizer = make_tiny_tokenizer()
    encoder = ChunkEncoder.from_pretrained(files.path, "text", "mean", tokenizer)
    texts = ["the river crosses the town", "a stream runs through the city", "prime numbers are infinite"]
    vectors = torch.nn.functional.normalize(encoder([tokenizer(text)["input_ids"] for text in texts]), dim=1)
    assert vectors.shape == (3, files.dimensions)
    assert vectors[0] @ vectors[1] > 0.5 > vectors[0] @ vectors[2]
