"""Documents as OpenAI's files and vector stores: a vector store is a collection, a file one of its documents.

A file's id is ``COLLECTION/DOCUMENT``: a document belongs to one collection, and is what its uploads and its citations
name. Sizes and dates are not kept, so they read 0.
"""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Query
from fastapi.exceptions import RequestValidationError
from google.protobuf.json_format import ParseDict, ParseError
from google.protobuf.struct_pb2 import Struct
from pydantic import Field, ValidationError
from starlette.datastructures import FormData, UploadFile
from starlette.requests import Request

from blockrag.errors import InvalidRequestError, NotFoundError
from blockrag.http.door import RemoteGateway, Visit, is_form
from blockrag.http.error_objects import named
from blockrag.http.events import file_id
from blockrag.http.responses import attributes
from blockrag.http.shared_fields import Body, Filter, RankingOptions, conditions, only, set_number
from blockrag.identity import DEFAULT_COLLECTION, page_token_after
from blockrag.v1 import corpus_pb2, rag_pb2

router = APIRouter()
_PIECE_BYTES = 512 * 1024
_PREFIX, _SUFFIX = "blockrag[", "]"


class SearchRequest(Body):
    """``POST /v1/vector_stores/COLLECTION/search``."""

    query: str | Annotated[list[str], Field(min_length=1, max_length=1)]
    """What to look for."""
    max_num_results: int | None = None
    """How many passages; left out: the server's default."""
    filters: Filter | None = None
    """Conditions on documents' metadata."""
    ranking_options: RankingOptions | None = None
    rewrite_query: Annotated[bool | None, only(None, False)] = None


class AttachRequest(Body):
    """``POST /v1/vector_stores/COLLECTION/files`` with the id of a file that the collection holds."""

    file_id: str
    attributes: Annotated[dict[str, Any] | None, only(None, {})] = None
    chunking_strategy: Annotated[Any, only(None, {"type": "auto"})] = None


class UploadOptions(Body):
    """Fields of an upload's form under ``blockrag``: as JSON, or one by one (``blockrag[collection]``)."""

    collection: str = ""
    document_id: str = ""
    """Left out: the file's name. The same id again replaces the document."""
    title: str = ""
    media_type: str = ""
    """text/plain, text/markdown, text/html, application/pdf or application/jsonl; left out: by the id's suffix."""
    metadata: dict[str, Any] = Field(default_factory=dict)
    """Can be filtered on."""
    source: str = ""
    """What it comes from; left out: the document's id."""
    language: str = ""
    """Of a new collection; left out: the server's setting."""


class Page(Body):
    """Where a listing begins and ends."""

    limit: Annotated[int, Field(ge=1, le=100)] = 20
    after: str = ""
    """Id of the file before the first."""
    order: Literal["asc"] = "asc"
    """By id."""


Paging = Annotated[Page, Query()]
_FORM = {
    "requestBody": {
        "required": True,
        "content": {
            "multipart/form-data": {
                "schema": {
                    "type": "object",
                    "required": ["file"],
                    "properties": {
                        "file": {"type": "string", "format": "binary"},
                        "purpose": {"type": "string", "description": "Accepted; changes nothing."},
                        "blockrag": UploadOptions.model_json_schema(),
                    },
                }
            }
        },
    }
}


def split_id(id: str) -> tuple[str, str]:
    """Collection and document of a file's id; ``NotFoundError`` for what cannot be one."""
    collection, slash, document_id = id.partition("/")
    if not (collection and slash and document_id):
        raise NotFoundError(f"there is no file {id!r}: ids are COLLECTION/DOCUMENT")
    return collection, document_id


def file_object(collection: str, document: corpus_pb2.DocumentSummary | corpus_pb2.IngestedDocument) -> dict[str, Any]:
    """OpenAI's file."""
    return {
        "id": file_id(collection, document.document_id),
        "object": "file",
        "bytes": 0,
        "created_at": 0,
        "filename": document.document_id,
        "purpose": "assistants",
        "status": "processed",
        "expires_at": None,
        "status_details": None,
        "blockrag": {"collection": collection, **_details(document)},
    }


def stored_file_object(
    collection: str, document: corpus_pb2.DocumentSummary | corpus_pb2.IngestedDocument
) -> dict[str, Any]:
    """OpenAI's file of a vector store."""
    metadata = document.metadata if isinstance(document, corpus_pb2.DocumentSummary) else Struct()
    return {
        "id": file_id(collection, document.document_id),
        "object": "vector_store.file",
        "usage_bytes": 0,
        "created_at": 0,
        "vector_store_id": collection,
        "status": "completed",
        "last_error": None,
        "attributes": attributes(metadata),
        "chunking_strategy": {"type": "other"},
        "blockrag": _details(document),
    }


def list_object(items: list[dict[str, Any]], more: bool) -> dict[str, Any]:
    """OpenAI's page."""
    return {
        "object": "list",
        "data": items,
        "first_id": items[0]["id"] if items else None,
        "last_id": items[-1]["id"] if items else None,
        "has_more": more,
    }


@router.post("/vector_stores/{collection}/search")
async def search(collection: str, body: SearchRequest, visit: Visit) -> dict[str, Any]:
    """Passages of a collection, best first."""
    query = body.query if isinstance(body.query, str) else body.query[0]
    message = rag_pb2.RetrieveRequest(query=query, collection=collection, filter=conditions(body.filters, "filters"))
    set_number(message, "top_k", body.max_num_results, "max_num_results")
    with named(top_k="max_num_results", filter="filters"):
        found = await visit.gateway.retrieve(message, visit.call)
    return {
        "object": "vector_store.search_results.page",
        "search_query": [query],
        "data": [
            {
                "file_id": file_id(collection, passage.document_id),
                "filename": passage.document_id,
                "score": passage.score,
                "attributes": attributes(passage.metadata),
                "content": [{"type": "text", "text": passage.text}],
                "blockrag": {"also_in": [file_id(collection, holder.document_id) for holder in passage.also_in]},
            }
            for passage in found.passages
        ],
        "has_more": False,
        "next_page": None,
    }


async def _documents(
    visit: Visit, collection: str, limit: int, after: str = ""
) -> tuple[list[corpus_pb2.DocumentSummary], bool]:
    """Documents that follow ``after``, and whether there are more."""
    token = page_token_after(collection, after) if after else ""
    request = corpus_pb2.ListDocumentsRequest(collection=collection, page_size=limit, page_token=token)
    found = await visit.gateway.list_documents(request, visit.call)
    return list(found.documents), bool(found.next_page_token)


@router.post("/files", openapi_extra=_FORM)
async def create_file(request: Request, visit: Visit) -> dict[str, Any]:
    """Stores a document in the collection that the form names, else in ``default``."""
    return file_object(*await upload(visit.gateway, request))


@router.get("/files")
async def list_files(visit: Visit, page: Paging) -> dict[str, Any]:
    """Documents of all collections."""
    first, after = split_id(page.after) if page.after else ("", "")
    collections = (await visit.gateway.list_collections(None, visit.call)).collections
    files: list[dict[str, Any]] = []
    for name in (one.name for one in collections if one.name >= first):
        left = page.limit + 1 - len(files)
        try:
            found, _ = await _documents(visit, name, left, after if name == first else "")
        except NotFoundError:  # removed since they were listed
            continue
        files += [file_object(name, document) for document in found]
        if len(files) > page.limit:
            break
    return list_object(files[: page.limit], len(files) > page.limit)


@router.get("/files/{file_id:path}")
async def get_file(file_id: str, visit: Visit) -> dict[str, Any]:
    """One document."""
    return file_object(split_id(file_id)[0], await find(visit, file_id))


@router.delete("/files/{file_id:path}")
async def delete_file(file_id: str, visit: Visit) -> dict[str, Any]:
    """Removes a document, its passages and what is cached of them."""
    await delete(visit, *split_id(file_id))
    return {"id": file_id, "object": "file", "deleted": True}


@router.post("/vector_stores/{collection}/files", openapi_extra=_FORM)
async def create_store_file(collection: str, request: Request, visit: Visit) -> dict[str, Any]:
    """Stores a document in the collection. As JSON with a ``file_id``: says that the collection holds it."""
    if is_form(request):
        return stored_file_object(*await upload(visit.gateway, request, collection))
    try:
        body = AttachRequest.model_validate_json(await request.body())
    except ValidationError as error:
        raise RequestValidationError(error.errors()) from None
    # A document is uploaded to its collection.
    if split_id(body.file_id)[0] != collection:
        raise InvalidRequestError(
            "file_id",
            f"{body.file_id!r} belongs to another collection; upload the file to this one: POST "
            f"/v1/vector_stores/{collection}/files with a form that has it as file, or /v1/files with blockrag "
            f"[collection]={collection}",
        )
    return stored_file_object(collection, await find(visit, body.file_id))


@router.get("/vector_stores/{collection}/files")
async def list_store_files(collection: str, visit: Visit, page: Paging) -> dict[str, Any]:
    """Documents of the collection."""
    after = within(collection, page.after)[1] if page.after else ""
    found, more = await _documents(visit, collection, page.limit, after)
    return list_object([stored_file_object(collection, document) for document in found], more)


@router.get("/vector_stores/{collection}/files/{file_id:path}")
async def get_store_file(collection: str, file_id: str, visit: Visit) -> dict[str, Any]:
    """One document of the collection."""
    return stored_file_object(collection, await find(visit, file_id, collection))


@router.delete("/vector_stores/{collection}/files/{file_id:path}")
async def delete_store_file(collection: str, file_id: str, visit: Visit) -> dict[str, Any]:
    """Removes a document: it belongs to no other collection."""
    await delete(visit, *within(collection, file_id))
    return {"id": file_id, "object": "vector_store.file.deleted", "deleted": True}


async def find(visit: Visit, id: str, collection: str = "") -> corpus_pb2.DocumentSummary:
    """The document of a file's id; ``NotFoundError`` where there is none (in ``collection``)."""
    of, document_id = within(collection, id) if collection else split_id(id)
    request = corpus_pb2.ListDocumentsRequest(collection=of, document_ids=[document_id], page_size=1)
    found = await visit.gateway.list_documents(request, visit.call)
    if not found.documents:
        raise NotFoundError(f"there is no file {id!r}")
    return found.documents[0]


async def delete(visit: Visit, collection: str, document_id: str) -> None:
    """Removes a document; ``NotFoundError`` where there is none."""
    request = corpus_pb2.DeleteDocumentRequest(collection=collection, document_id=document_id)
    await visit.gateway.delete_document(request, visit.call)


async def upload(
    gateway: RemoteGateway, request: Request, collection: str = ""
) -> tuple[str, corpus_pb2.IngestedDocument]:
    """Stores the file of a form and says in which collection. Of a jsonl file the first document is told.

    Raises ``InvalidRequestError`` and what the gateway raises.
    """
    async with request.form(max_files=1, max_fields=16) as form:
        options = _upload_options(form)
        if collection and options.collection not in ("", collection):
            raise InvalidRequestError("blockrag", "names another collection than the path")
        file = form.get("file")
        if not isinstance(file, UploadFile):
            raise InvalidRequestError("file", "is missing: send a form with the document as file")
        header = corpus_pb2.DocumentHeader(
            collection=collection or options.collection or DEFAULT_COLLECTION,
            document_id=options.document_id or file.filename or "",
            title=options.title,
            media_type=options.media_type,
            source=options.source,
            language=options.language,
        )
        try:
            ParseDict(options.metadata, header.metadata)
        except (ParseError, OverflowError) as error:
            raise InvalidRequestError("blockrag.metadata", str(error)) from None
        params = {name: f"blockrag.{name}" for name in UploadOptions.model_fields}
        if collection:
            del params["collection"]
        if not options.document_id:
            params["document_id"] = "file"
        with named(content="file", **params):
            stored = await gateway.ingest(header, _pieces(file), request.headers.get("authorization", ""))
    return header.collection, stored.documents[0]


def _details(document: corpus_pb2.DocumentSummary | corpus_pb2.IngestedDocument) -> dict[str, Any]:
    told: dict[str, Any] = {"passages": document.passages, "version": document.version}
    if isinstance(document, corpus_pb2.DocumentSummary):
        return {**told, "title": document.title}
    return {**told, "outcome": corpus_pb2.IngestOutcome.Name(document.outcome).removeprefix("INGEST_OUTCOME_").lower()}


def within(collection: str, id: str) -> tuple[str, str]:
    """Collection and document of a file's id; ``NotFoundError`` for another collection's."""
    of, document_id = split_id(id)
    if of != collection:
        raise NotFoundError(f"there is no file {id!r} in {collection!r}")
    return of, document_id


def _upload_options(form: FormData) -> UploadOptions:
    known = {"file", "purpose", "blockrag"}
    values: dict[str, Any] = {}
    for name, value in form.multi_items():
        if name.startswith(_PREFIX) and name.endswith(_SUFFIX):
            field, inner, _ = name[len(_PREFIX) : -len(_SUFFIX)].partition("][")
            if inner:  # as clients write an object within an object, of whose values all are text then
                raise InvalidRequestError(
                    f"blockrag.{field}", "holds an object: send all of blockrag as one text of JSON"
                )
            values[field] = value
        elif name not in known:
            raise InvalidRequestError(name[:100], "is not known here, and what is not known is not ignored")
    try:
        if isinstance(whole := form.get("blockrag", "{}"), str):
            values |= json.loads(whole)
        return UploadOptions.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        raise InvalidRequestError(".".join(["blockrag", *map(str, first["loc"])]), first["msg"]) from None
    except (ValueError, TypeError, RecursionError) as error:
        raise InvalidRequestError("blockrag", f"is no JSON object: {error}") from None


async def _pieces(file: UploadFile) -> AsyncIterator[bytes]:
    while piece := await file.read(_PIECE_BYTES):
        yield piece
