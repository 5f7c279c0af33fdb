"""What a peer's process does: reads a task a line from its standard input, answers each with a line.

``{"stream_prompts": [{"blocks": [[…]], "question": […]}], "state": "…", "new_tokens": 16}``, all token ids, one prompt
a stream, is answered by ``{"first_ms": …, "token_ms": …}``: the time until every stream has its first token, and that
of a step of all streams after it; ``{"error": "…"}`` where it failed. The first line that a process writes is
``{"ready": "its version and types"}``. llama.cpp's process (``llama.mjs``) does the same.

``python -m blockrag.evaluation.peers.ours blockrag|transformers SETTINGS_JSON``
"""

from __future__ import annotations

import json
import os
import pickle
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import DynamicCache

from blockrag.configured import configured_bundle, configured_keys
from blockrag.decoder.sequence import GenerationRequest, SamplingParams
from blockrag.evaluation.ttft_model import answer_in_thread, encode_in_passes, engine_of
from blockrag.kv_cache.block_files import read_block, write_block
from blockrag.modeling.checkpoint import load_stock_model
from blockrag.modeling.model import SlotModel
from blockrag.modeling.slots import ResidentBlock
from blockrag.settings import Settings
from blockrag.types import FULL, BlockKV, BlockRequest

_TENANT = "bench"


@dataclass(frozen=True)
class Prompt:
    """Of one stream."""

    blocks: tuple[tuple[int, ...], ...]
    question: tuple[int, ...]

    @property
    def tokens(self) -> list[int]:
        """All of them."""
        return [*(token for block in self.blocks for token in block), *self.question]


class Blockrag:
    """The decoder's engine without the services. States: memory, store, disk, cold, full."""

    def __init__(self, settings: Settings, folder: Path) -> None:
        """``folder`` gets files of blocks."""
        bundle = configured_bundle(settings)
        self._model = SlotModel.load(bundle)
        self.name = settings_text(bundle.compute_dtype, self._model.weights)
        """Types, and a version, as they are behind its label in the rows."""
        self._model.end_token_ids = frozenset()  # random prompts may be answered by the end of an answer
        self._engine = engine_of(bundle, self._model, settings, slots=2**30, max_sequences=64)
        self._keys = configured_keys(settings, bundle)
        self._folder, self._threads = folder, settings.decoder.threads
        self._stored: dict[tuple[int, ...], bytes] = {}
        self._resident: dict[tuple[int, ...], ResidentBlock] = {}

    def run(self, prompts: Sequence[Prompt], state: str, new_tokens: int) -> tuple[float, float]:
        """Seconds until every stream has its first token, and seconds of each step after it."""
        torch.set_num_threads(self._threads)
        blocks = list(dict.fromkeys(block for prompt in prompts for block in prompt.blocks))
        load: dict[str, Callable[[], dict[tuple[int, ...], ResidentBlock]]] = {
            "memory": lambda: self._resident,
            "store": lambda: {block: self._model.to_resident(pickle.loads(self._stored[block])) for block in blocks},
            "disk": lambda: {block: self._model.to_resident(self._read(block)) for block in blocks},
            "cold": lambda: dict(zip(blocks, map(self._model.to_resident, self._encode(blocks)), strict=True)),
            "full": dict,
        }
        if state in ("memory", "store", "disk"):
            self._prepare(blocks, state)
        start = time.perf_counter()
        found = load[state]()
        loaded = time.perf_counter() - start
        requests = []
        for prompt in prompts:
            composed = () if state == "full" else tuple(found[block] for block in prompt.blocks)
            tokens = tuple(prompt.tokens) if state == "full" else prompt.question
            requests.append(GenerationRequest("bench", composed, tokens, SamplingParams(max_tokens=new_tokens)))
        stages = answer_in_thread(self._engine, requests)
        first = max(one.queue + one.compose + one.prefill for one in stages)
        # the last to begin decodes with all others beside it
        last = min(one.decode for one in stages)
        return loaded + first, last / (new_tokens - 1)

    def _prepare(self, blocks: Sequence[tuple[int, ...]], state: str) -> None:
        missing = [block for block in blocks if block not in self._stored]
        for block, encoded in zip(missing, self._encode(missing), strict=True):
            self._stored[block] = pickle.dumps(encoded)
            write_block(self._folder / encoded.key, encoded, _TENANT, FULL, 0.0)
        self._resident.clear()
        if state == "memory":
            self._resident.update(
                {block: self._model.to_resident(pickle.loads(self._stored[block])) for block in blocks}
            )

    def _encode(self, blocks: Sequence[tuple[int, ...]]) -> list[BlockKV]:
        return encode_in_passes(self._model, blocks, [self._request(block).key for block in blocks])

    def _read(self, block: tuple[int, ...]) -> BlockKV:
        request = self._request(block)
        found = read_block(self._folder / request.key, request)
        assert isinstance(found, BlockKV)
        return found

    def _request(self, block: tuple[int, ...]) -> BlockRequest:
        ids = torch.tensor(block, dtype=torch.int32).numpy()
        return BlockRequest(self._keys.block_key(_TENANT, ids), ids, _TENANT)


class Transformers:
    """The stock model. States: new, all is computed; again, what stands in the cache from the last run is kept."""

    def __init__(self, settings: Settings) -> None:
        bundle = configured_bundle(settings)
        self._model: Any = load_stock_model(bundle)
        self.name = f"{transformers.__version__}, {settings_text(bundle.compute_dtype, 'none')}"
        self._threads = settings.decoder.threads
        self._cache = DynamicCache()

    @torch.inference_mode()
    def run(self, prompts: Sequence[Prompt], state: str, new_tokens: int) -> tuple[float, float]:
        torch.set_num_threads(self._threads)
        tokens = torch.tensor([prompt.tokens for prompt in prompts])
        kept = len(prompts[0].tokens) - len(prompts[0].question) if state == "again" else 0
        if kept:
            self._cache.crop(kept - self._cache.get_seq_length())  # negative: so many are removed
        else:
            self._cache = DynamicCache()
        start = time.perf_counter()
        last = self._step(tokens[:, kept:])
        first = time.perf_counter() - start
        for _ in range(new_tokens - 1):
            last = self._step(last)
        return first, (time.perf_counter() - start - first) / (new_tokens - 1)

    def _step(self, tokens: torch.Tensor) -> torch.Tensor:
        output = self._model(input_ids=tokens, past_key_values=self._cache, use_cache=True, logits_to_keep=1)
        chosen: torch.Tensor = output.logits[:, -1].argmax(-1, keepdim=True)
        return chosen


def settings_text(compute_dtype: str, weights: str) -> str:
    """What is computed with, in words."""
    return f"{compute_dtype}, steps in int8" if weights == "int8" else compute_dtype


def serve(peer: Blockrag | Transformers) -> None:
    """Answer tasks until the input ends."""
    answer = os.fdopen(os.dup(1), "w", buffering=1, encoding="utf-8")
    os.dup2(2, 1)  # what libraries print is no answer
    answer.write(json.dumps({"ready": peer.name}) + "\n")
    for line in sys.stdin:
        task = json.loads(line)
        prompts = [
            Prompt(tuple(map(tuple, prompt["blocks"])), tuple(prompt["question"])) for prompt in task["stream_prompts"]
        ]
        try:
            first, each = peer.run(prompts, task["state"], task["new_tokens"])
            answer.write(json.dumps({"first_ms": 1000 * first, "token_ms": 1000 * each}) + "\n")
        except Exception as error:  # the row says it
            answer.write(json.dumps({"error": f"{type(error).__name__}: {error}"}) + "\n")


def main(arguments: Sequence[str]) -> None:
    """Be the peer that is named."""
    name, text = arguments
    settings = Settings.model_validate_json(text)
    if name == "transformers":
        serve(Transformers(settings))
        return
    with tempfile.TemporaryDirectory(prefix="blockrag-bench-") as folder:
        serve(Blockrag(settings, Path(folder)))


if __name__ == "__main__":
    main(sys.argv[1:])
