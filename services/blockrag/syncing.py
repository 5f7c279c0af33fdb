"""A collection made equal to files: what they no longer hold is removed.

::

    plan = await Sync.begin(client, "work")
    for path in paths:
        plan.keep(await client.ingest_file(path, collection="work"))
    removed = await plan.finish()

What others store meanwhile stays: only what was there at the beginning is removed.
"""

from __future__ import annotations

from collections.abc import Iterable

from blockrag.characters import normalise
from blockrag.client import BlockragClient
from blockrag.errors import NotFoundError
from blockrag.results import Document, IngestedDocument


class Sync:
    """One run; ``begin`` it before anything is stored."""

    def __init__(self, client: BlockragClient, collection: str, before: Iterable[Document]) -> None:
        self._client = client
        self._collection = collection
        self._before = {document.document_id: document for document in before}
        self._kept: set[str] = set()
        self._failed: set[str] = set()

    @classmethod
    async def begin(cls, client: BlockragClient, collection: str) -> Sync:
        """Remembers what the collection holds; it may not exist yet."""
        try:
            before = [document async for document in client.list_documents(collection=collection, page_size=500)]
        except NotFoundError:
            before = []
        return cls(client, collection, before)

    def keep(self, stored: Iterable[IngestedDocument]) -> None:
        """One of the files holds these documents."""
        self._kept.update(document.document_id for document in stored)

    def keep_all_of(self, source: str) -> None:
        """The file ``source`` could not be stored: nothing that came from it is removed."""
        self._failed.add(normalise(source))  # as it is stored: names of files may be decomposed

    def gone(self) -> list[Document]:
        """What is to be removed, by id."""
        return [
            document
            for document_id, document in sorted(self._before.items())
            if document_id not in self._kept and not {document_id, document.source} & self._failed
        ]

    async def finish(self) -> list[Document]:
        """Removes it, with its KV; returns it."""
        removed = []
        for document in self.gone():
            try:
                await self._client.delete_document(document.document_id, collection=self._collection)
            except NotFoundError:  # somebody else was faster
                continue
            removed.append(document)
        return removed
