"""The bundle that ships, through the running services: whether answers are right, which no random bundle can show."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from blockrag.client import BlockragClient
from blockrag.local import LocalSystem
from blockrag.local.preflight import free_port
from blockrag.settings import ClusterSettings, Settings

COLLECTION = "notes"
TEXTS = {
    "Fiji": "Fiji is a country of islands in the South Pacific. The capital of Fiji is Suva.",
    "Norway": "Norway is a country in northern Europe. The capital of Norway is Oslo. Its currency is the krone.",
    "Arle Bridge": "The Arle Bridge was built in 1874. It is 212 metres long and was designed by Clara Voss.",
}
QUESTIONS = {
    "What is the capital of Fiji?": ("Fiji", "Suva"),
    "What is the capital of Norway?": ("Norway", "Oslo"),
    "Who designed the Arle Bridge?": ("Arle Bridge", "Voss"),
    "When was the Arle Bridge built?": ("Arle Bridge", "1874"),
}


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """gRPC address of a system with the default bundle, stopped at the end."""
    settings = Settings(
        cluster=ClusterSettings(
            grpc_port=free_port(), http_port=free_port(), state_dir=str(tmp_path_factory.mktemp("state"))
        )
    )
    with LocalSystem.start(settings, owned=True) as system:
        yield system.target


@pytest.mark.timeout(600)
@pytest.mark.parametrize("mode", ["block", "full"])
async def test_what_short_texts_say_is_answered(target: str, mode: Any) -> None:
    async with BlockragClient(target) as client:
        for title, text in TEXTS.items():
            await client.ingest_text(title, text, title=title, collection=COLLECTION)
        right = 0
        for question, (title, expected) in QUESTIONS.items():
            answers = [
                await client.ask(question, collection=COLLECTION, top_k=3, max_tokens=32, attention_mode=mode)
                for _ in range(2)
            ]
            right += expected in answers[0].text
            assert answers[1].text == answers[0].text, "from the cache"
            assert title in {citation.title for citation in answers[0].completion.citations if citation.in_prompt}
    # a reader of this size takes one capital for the other where another country's passage stands last
    assert right >= len(QUESTIONS) - 1
