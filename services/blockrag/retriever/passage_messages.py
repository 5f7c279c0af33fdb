"""Between protobuf messages and the index's own types."""

from __future__ import annotations

from collections.abc import Sequence

from blockrag.access import PUBLIC_TENANT
from blockrag.alike import alike
from blockrag.errors import InvalidRequestError
from blockrag.identity import (
    DEFAULT_COLLECTION,
    CollectionId,
    check_document_id,
    check_normalised,
    passage_id,
)
from blockrag.metadata import metadata_of, struct_of
from blockrag.results import PassageHolder
from blockrag.retriever.vector_index import Document, Passage
from blockrag.v1 import common_pb2, retriever_pb2

MAX_STAGED_PASSAGES = 256
_VERSION_CHARS = 128


def collection_of(context: common_pb2.RequestContext, name: str) -> CollectionId:
    """The collection a request names; tenant and collection have defaults."""
    return CollectionId(tenant_of(context), name or DEFAULT_COLLECTION)


def tenant_of(context: common_pb2.RequestContext) -> str:
    """The tenant of a request; "public" where nobody set one."""
    return context.tenant or PUBLIC_TENANT


def staged_passages(collection: CollectionId, request: retriever_pb2.AddPassagesRequest) -> list[Passage]:
    """The passages of a request, with their ids. Raises ``InvalidRequestError`` naming what is wrong."""
    if not 1 <= len(request.passages) <= MAX_STAGED_PASSAGES:
        raise InvalidRequestError(
            "passages", f"must be 1 to {MAX_STAGED_PASSAGES} at a time, not {len(request.passages)}"
        )
    first = request.passages[0]
    check_document_id(first.document_id)
    check_version(first.document_version)
    metadata = metadata_of(first.metadata)
    passages: list[Passage] = []
    for number, message in enumerate(request.passages):
        if (message.document_id, message.document_version) != (first.document_id, first.document_version):
            raise InvalidRequestError("passages", f"passage {number} is of another document or version")
        if not message.text.strip():
            raise InvalidRequestError("passages", f"passage {number} has no text")
        check_normalised("passages", message.title)
        check_normalised("passages", message.text)
        passages.append(
            alike(
                Passage,
                message,
                passage_id=passage_id(collection, message.document_id, message.document_version, message.ordinal),
                version=message.document_version,
                metadata=metadata if message.metadata == first.metadata else metadata_of(message.metadata),
            )
        )
    if len({passage.ordinal for passage in passages}) < len(passages):
        raise InvalidRequestError("passages", "an ordinal occurs twice")
    return passages


def committed_document(request: retriever_pb2.CommitDocumentRequest) -> Document:
    """The document of a request. Raises ``InvalidRequestError`` naming what is wrong."""
    check_document_id(request.document_id)
    check_version(request.version)
    if not request.passages:
        raise InvalidRequestError("passages", "must be at least 1")
    check_normalised("title", request.title)
    check_normalised("source", request.source)
    return alike(Document, request, metadata=metadata_of(request.metadata))


def check_version(version: str) -> None:
    """Raises ``InvalidRequestError`` unless ``version`` can name a version."""
    if not version or len(version) > _VERSION_CHARS or not version.isprintable():
        raise InvalidRequestError("version", f"must be 1 to {_VERSION_CHARS} printable characters")


def passage_message(passage: Passage, score: float = 0.0, also_in: Sequence[PassageHolder] = ()) -> common_pb2.Passage:
    """A stored passage as a message."""
    return alike(
        common_pb2.Passage,
        passage,
        document_version=passage.version,
        metadata=struct_of(passage.metadata),
        score=score,
        also_in=[alike(common_pb2.PassageHolder, holder) for holder in also_in],
    )
