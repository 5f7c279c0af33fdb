"""The disk tier against a model of it: a list of keys in the order of use."""

from __future__ import annotations

import asyncio
import shutil
import tempfile
from collections.abc import Coroutine
from pathlib import Path
from typing import Any, TypeVar

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from blockrag.kv_cache.block_files import block_paths, folder_of
from blockrag.kv_cache.shard_messages import DocumentId
from tests.unit.kv_cache.disk_parts import FILE_BYTES, found, keep, open_tier, wanted

T = TypeVar("T")

_BLOCKS = 6
_NUMBERS = st.integers(0, 11)
_DOCUMENTS = st.sampled_from(["d", "e", "f"])


class AgainstAModel(RuleBasedStateMachine):
    """What the tier holds is what a list of keys, in the order of use, says; whatever happens to files and process."""

    @initialize()
    def start(self) -> None:
        self.loop = asyncio.new_event_loop()
        self.root = Path(tempfile.mkdtemp())
        self.now = 1_000_000.0
        self.model: dict[str, tuple[str, float]] = {}
        """Document and cost of each key; the one used last stands last."""
        self.restart()

    def teardown(self) -> None:
        shutil.rmtree(self.root)
        self.loop.close()

    def run(self, call: Coroutine[Any, Any, T]) -> T:
        self.now += 100
        return self.loop.run_until_complete(call)

    @rule()
    def restart(self) -> None:
        self.tier = open_tier(self.root, _BLOCKS, clock=lambda: self.now)

    @rule(number=_NUMBERS, document=_DOCUMENTS, cost=st.integers(1, 9))
    def write(self, number: int, document: str, cost: int) -> None:
        request = wanted(number, document)
        self.run(keep(self.tier, request, float(cost)))
        if request.key not in self.model:
            if len(self.model) == _BLOCKS:
                del self.model[min(self.model, key=lambda key: self.model[key][1])]
            self.model[request.key] = (document, cost)

    @rule(number=_NUMBERS, document=_DOCUMENTS)
    def read(self, number: int, document: str) -> None:
        request = wanted(number, document)
        assert self.run(found(self.tier, request)) == (request.key in self.model)
        if request.key in self.model:
            self.model[request.key] = self.model.pop(request.key)

    @rule(document=_DOCUMENTS)
    def purge(self, document: str) -> None:
        expected = {key for key, (of, _) in self.model.items() if of == document}
        assert self.tier.forget(DocumentId("t", "c", document)) == expected
        self.run(self.tier.erase(DocumentId("t", "c", document)))
        for key in expected:
            del self.model[key]

    @rule()
    def purge_the_collection(self) -> None:
        assert self.tier.forget(DocumentId("t", "c", "")) == set(self.model)
        self.run(self.tier.erase(DocumentId("t", "c", "")))
        self.model.clear()

    @rule(number=_NUMBERS, place=st.floats(0, 1, exclude_max=True), change=st.integers(1, 255), again=st.booleans())
    def damage(self, number: int, place: float, change: int, again: bool) -> None:
        request = wanted(number)
        if request.key in self.model:
            path = self.root / folder_of(DocumentId("t", "c", self.model[request.key][0])) / request.key
            content = bytearray(path.read_bytes())
            content[int(place * len(content))] ^= change
            path.write_bytes(content)
            if again:
                self.restart()
            assert not self.run(found(self.tier, request))
            del self.model[request.key]

    @invariant()
    def files_are_what_is_held(self) -> None:
        if not hasattr(self, "tier"):
            return
        self.loop.run_until_complete(self.tier.settled())
        paths = list(block_paths(self.root))
        assert {path.name for path in paths} == set(self.model) == {key for key in self.model if key in self.tier.index}
        assert len(self.tier.index) == len(self.model)
        assert self.tier.index.nbytes == FILE_BYTES * len(self.model) <= self.tier.index.budget_bytes


AgainstAModel.TestCase.settings = settings(max_examples=40, stateful_step_count=30)
TestAgainstAModel = AgainstAModel.TestCase
