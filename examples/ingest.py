"""Ingest a file into a running system and encode it ahead of the first question.

python examples/ingest.py FILE [COLLECTION] [HOST:PORT]
"""

import asyncio
import sys
from pathlib import Path

from blockrag.client import BlockragClient


async def main(file: str, collection: str = "default", target: str = "127.0.0.1:9000") -> None:
    async with BlockragClient(target) as client:
        for stored in await client.ingest_file(Path(file), collection=collection):
            print(f"{stored.document_id}: {stored.passages} passages, {stored.outcome}")
        async for progress in client.warm(collection=collection):
            print(f"{progress.done} of {progress.total} encoded")


asyncio.run(main(*sys.argv[1:]))
