"""The HTTP application: OpenAI's paths over a ``RemoteGateway``. Needs neither Ray nor a model."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, FastAPI

import blockrag
from blockrag.http import chat, extensions, responses, static, vector_stores
from blockrag.http.door import Door, Guard
from blockrag.http.error_objects import ERROR_RESPONSES, add_handlers
from blockrag.http.gateway import RemoteGateway, Visit
from blockrag.http.shared_fields import MODEL
from blockrag.settings import Settings

_models = APIRouter()


def build_app(gateway: RemoteGateway, settings: Settings) -> FastAPI:
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
    for part in (chat.router, responses.router, _models, vector_stores.router, extensions.router):
        app.include_router(part, prefix="/v1", responses=ERROR_RESPONSES)
    app.routes.extend(static.routes())
    return app


@_models.get("/models")
async def list_models(visit: Visit) -> dict[str, Any]:
    """The model, alone and with each of the tenant's collections."""
    found = await visit.gateway.list_collections(None, visit.call)
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
