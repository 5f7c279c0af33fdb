"""The page at ``/``: files beside this module, served as they are, with headers that leave a browser nothing else.

Its policy allows no script and no style but the page's own, and no string to become markup (Trusted Types), so what a
document says can only be text. All addresses within it are relative: it works below any prefix.
"""

from __future__ import annotations

import hashlib
from importlib.resources import files

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Route

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
