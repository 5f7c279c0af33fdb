"""The HTTP application: OpenAI's paths over a ``Gateway``. Needs neither Ray nor a model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any

from fastapi import APIRouter, Depends, FastAPI, Query, Request
from fastapi.exceptions import RequestValidationError
from pydantic import ValidationError
from starlette.responses import JSONResponse, Response

import blockrag
from blockrag.access import OnBehalf
from blockrag.http import chat, documents, responses, static, system
from blockrag.http.door import Door, Guard
from blockrag.http.errors import ERROR_RESPONSES, add_handlers
from blockrag.http.events import Answer, server_sent
from blockrag.http.gateway import Gateway
from blockrag.http.requests import MODEL
from blockrag.settings import Settings

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
                        "blockrag": documents.UploadOptions.model_json_schema(),
                    },
                }
            }
        },
    }
}
_SSE = {"description": "The answer; with stream as server-sent events.", "content": {"text/event-stream": {}}}


@dataclass(frozen=True)
class _Visit:
    """An admitted request, and whom it asks."""

    gateway: Gateway
    call: OnBehalf


async def _visit(request: Request) -> _Visit:  # FastAPI hands what is not async to another thread, for a millisecond
    return _Visit(request.app.state.gateway, request.state.call)


Visit = Annotated[_Visit, Depends(_visit)]
Paging = Annotated[documents.Page, Query()]

_router = APIRouter(prefix="/v1", responses=ERROR_RESPONSES)


def build_app(gateway: Gateway, settings: Settings) -> FastAPI:
    """The application. It takes ``/v1``, ``/openapi.json``, ``/docs``, and for the page ``/`` and ``/page``."""
    app = FastAPI(
        title="blockrag",
        version=blockrag.__version__,
        description="Answers from documents, for clients of OpenAI's API. Fields under `blockrag` are beyond it.",
        redoc_url=None,
    )
    app.state.gateway = gateway
    add_handlers(app)
    app.add_middleware(Guard, door=Door(settings), max_document_bytes=settings.gateway.max_document_mb * 2**20)
    app.include_router(_router)
    app.routes.extend(static.routes())
    return app


@_router.post("/chat/completions", responses={200: _SSE})
async def create_chat_completion(body: chat.ChatRequest, visit: Visit) -> Response:
    """Answers the last message of a conversation."""

    answer = await Answer.begin(visit.gateway.generate(body.to_message(), visit.call))
    if body.stream:
        return server_sent(chat.chunks(body, answer))
    return JSONResponse(await chat.whole(body, answer))


@_router.post("/responses", responses={200: _SSE})
async def create_response(body: responses.ResponsesRequest, visit: Visit) -> Response:
    """Answers with the documents that were read as citations."""
    message = body.to_message()
    answer = await Answer.begin(visit.gateway.generate(message, visit.call))
    if body.stream:
        return server_sent(responses.events(body, message.question, answer))
    return JSONResponse(await responses.whole(body, message.question, answer))


@_router.get("/models")
async def list_models(visit: Visit) -> dict[str, Any]:
    """The model, alone and with each of the tenant's collections."""
    found = await visit.gateway.list_collections(visit.call)
    names = [MODEL, *(f"{MODEL}/{one.name}" for one in found.collections)]
    data: list[dict[str, Any]] = [
        {"id": name, "object": "model", "created": 0, "owned_by": "blockrag"} for name in names
    ]
    for model, collection in zip(data[1:], found.collections, strict=True):
        model["blockrag"] = {
            "collection": collection.name,
            "documents": collection.documents,
            "passages": collection.passages,
            "language": collection.language,
        }
    return {"object": "list", "data": data}


@_router.post("/vector_stores/{collection}/search")
async def search(collection: str, body: documents.SearchRequest, visit: Visit) -> dict[str, Any]:
    """Passages of a collection, best first."""
    return await documents.search(visit.gateway, visit.call, collection, body)


@_router.post("/files", openapi_extra=_FORM)
async def create_file(request: Request, visit: Visit) -> dict[str, Any]:
    """Stores a document in the collection that the form names, else in ``default``."""
    return documents.file_object(*await documents.upload(visit.gateway, request))


@_router.get("/files")
async def list_files(visit: Visit, page: Paging) -> dict[str, Any]:
    """Documents of all collections."""
    return await documents.list_files(visit.gateway, visit.call, page)


@_router.get("/files/{file_id:path}")
async def get_file(file_id: str, visit: Visit) -> dict[str, Any]:
    """One document."""
    found = await documents.find(visit.gateway, visit.call, file_id)
    return documents.file_object(documents.split_id(file_id)[0], found)


@_router.delete("/files/{file_id:path}")
async def delete_file(file_id: str, visit: Visit) -> dict[str, Any]:
    """Removes a document, its passages and what is cached of them."""
    await documents.delete(visit.gateway, visit.call, file_id)
    return {"id": file_id, "object": "file", "deleted": True}


@_router.post("/vector_stores/{collection}/files", openapi_extra=_FORM)
async def create_store_file(collection: str, request: Request, visit: Visit) -> dict[str, Any]:
    """Stores a document in the collection. As JSON with a ``file_id``: says that the collection holds it."""
    if request.headers.get("content-type", "").startswith("multipart/form-data"):
        uploaded = await documents.upload(visit.gateway, request, collection)
        return documents.stored_file_object(*uploaded)
    try:
        body = documents.AttachRequest.model_validate_json(await request.body())
    except ValidationError as error:
        raise RequestValidationError(error.errors()) from None
    return await documents.attach(visit.gateway, visit.call, collection, body)


@_router.get("/vector_stores/{collection}/files")
async def list_store_files(collection: str, visit: Visit, page: Paging) -> dict[str, Any]:
    """Documents of the collection."""
    return await documents.list_stored_files(visit.gateway, visit.call, collection, page)


@_router.get("/vector_stores/{collection}/files/{file_id:path}")
async def get_store_file(collection: str, file_id: str, visit: Visit) -> dict[str, Any]:
    """One document of the collection."""
    found = await documents.find(visit.gateway, visit.call, file_id, collection)
    return documents.stored_file_object(collection, found)


@_router.delete("/vector_stores/{collection}/files/{file_id:path}")
async def delete_store_file(collection: str, file_id: str, visit: Visit) -> dict[str, Any]:
    """Removes a document: it belongs to no other collection."""
    await documents.delete(visit.gateway, visit.call, file_id, collection)
    return {"id": file_id, "object": "vector_store.file.deleted", "deleted": True}


@_router.get("/blockrag/system")
async def get_system(visit: Visit) -> dict[str, Any]:
    """The bundle that answers, the limits of requests, and every service."""
    return system.system_object(await visit.gateway.describe(visit.call))


@_router.get("/blockrag/traces/{trace_id}")
async def get_trace(trace_id: str, visit: Visit) -> dict[str, Any]:
    """The spans of a request whose answer named it in ``blockrag.trace_id``. Services write them a moment later,
    so there may be none yet."""
    return await system.trace_object(visit.gateway, visit.call, trace_id)


@_router.post("/blockrag/warm", responses={200: _SSE})
async def warm(body: system.WarmBody, visit: Visit) -> Response:
    """Encodes a collection's passages ahead of time, or those of some of its files."""
    warming = await system.Warming.begin(visit.gateway.warm(body.to_message(), visit.call))
    if body.stream:
        return server_sent(warming.events())
    return JSONResponse(await warming.finished())
