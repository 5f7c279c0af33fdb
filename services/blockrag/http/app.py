"""The HTTP application: OpenAI's paths over a ``RemoteGateway``, and the page. Needs neither Ray nor a model.

The page at ``/`` is files beside this module, served as they are, with headers that leave a browser nothing else. Its
policy allows no script and no style but the page's own, and no string to become markup (Trusted Types), so what a
document says can only be text. All addresses within it are relative: it works below any prefix.
"""

from __future__ import annotations

import hashlib
from importlib.resources import files
from typing import Any

from fastapi import APIRouter, FastAPI
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Route

import blockrag
from blockrag.http import chat, extensions, responses, vector_stores
from blockrag.http.door import Door, Guard, RemoteGateway, Visit
from blockrag.http.error_objects import ERROR_RESPONSES, add_handlers
from blockrag.http.shared_fields import MODEL
from blockrag.settings import Settings

_TYPES = {
    "html": "text/html; charset=utf-8",
    "css": "text/css; charset=utf-8",
    "js": "text/javascript; charset=utf-8",
    "svg": "image/svg+xml",
}
_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; base-uri 'none'; "
    "form-action 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'; trusted-types 'none'"
)
HEADERS = {
    "Content-Security-Policy": _POLICY,
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Permissions-Policy": "camera=(), geolocation=(), microphone=()",
    "Cache-Control": "no-cache",
}
_FIRST = "index.html"


def page_files() -> dict[str, bytes]:
    """The page's files by name."""
    folder = files("blockrag.http") / "page"
    return {file.name: file.read_bytes() for file in folder.iterdir() if file.name.rpartition(".")[2] in _TYPES}


def routes() -> list[BaseRoute]:
    """``/``, and the page's other files below ``/page``. They are read here, once."""
    return [
        Route("/" if name == _FIRST else f"/page/{name}", _File(name, content).answer, methods=["GET"])
        for name, content in page_files().items()
    ]


class _File:
    """One file."""

    def __init__(self, name: str, content: bytes) -> None:
        tag = hashlib.sha256(content).hexdigest()[:32]
        self._content = content
        self._headers = {**HEADERS, "Content-Type": _TYPES[name.rpartition(".")[2]], "ETag": f'"{tag}"'}

    async def answer(self, request: Request) -> Response:
        if request.headers.get("if-none-match") == self._headers["ETag"]:
            return Response(status_code=304, headers=self._headers)
        return Response(self._content, headers=self._headers)


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
    app.routes.extend(routes())
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
