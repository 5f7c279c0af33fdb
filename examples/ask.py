"""Ask a running system: the answer as it comes, then what it was read from.

python examples/ask.py QUESTION [COLLECTION] [HOST:PORT]
"""

import asyncio
import sys

from blockrag.client import BlockragClient
from blockrag.results import Completion, TextChunk


async def main(question: str, collection: str = "default", target: str = "127.0.0.1:9000") -> None:
    async with BlockragClient(target) as client:
        async for event in client.generate(question, collection=collection):
            if isinstance(event, TextChunk):
                print(event, end="", flush=True)
            elif isinstance(event, Completion):
                print(f"\nfirst token after {event.time_to_first_token_ms:.0f} ms")
                for citation in event.citations:
                    print(f"[{citation.index + 1}] {citation.title}")


asyncio.run(main(*sys.argv[1:]))
