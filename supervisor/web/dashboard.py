"""The dashboard: one page for who operates the streams, served as it lies in `static/`.

The page needs no build step and asks nobody but the daemon it came from, which its Content-Security-Policy holds it to. It uses what
every client of the HTTP front can use (`/overview`, `/streams`, a stream's events and trace), so nothing here knows of streams. The
files are public; what they show is not, and is asked for with the cookie that `POST /session` sets.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from importlib import resources
from typing import Final

import attrs
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from supervisor.web.app import Part

__all__ = ["CONTENT_SECURITY_POLICY", "dashboard"]

CONTENT_SECURITY_POLICY: Final = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self' data:; "
    "base-uri 'none'; form-action 'self'; frame-ancestors 'none'"
)
"""What the page may do: run our own scripts, and ask the daemon it came from."""

_TYPES: Final = {
    "css": "text/css; charset=utf-8",
    "html": "text/html; charset=utf-8",
    "js": "text/javascript; charset=utf-8",
}
_PAGE: Final = "index.html"


def _suffix(name: str) -> str:
    return name.rpartition(".")[2]


@attrs.frozen
class _File:
    """One file, as it is served."""

    body: bytes
    headers: Mapping[str, str]

    @classmethod
    def of(cls, name: str, body: bytes) -> _File:
        headers = {
            "content-type": _TYPES[_suffix(name)],
            "cache-control": "no-cache",  # kept, but asked about: an upgrade shows at once
            "etag": f'"{hashlib.sha256(body).hexdigest()[:32]}"',
            "content-security-policy": CONTENT_SECURITY_POLICY,
        }
        return cls(body, headers)

    async def respond(self, request: Request) -> Response:
        """Answer with it, or that it has not changed."""
        if self.headers["etag"] in request.headers.get("if-none-match", ""):
            return Response(status_code=304, headers=self.headers)
        return Response(self.body, headers=self.headers)


def dashboard() -> Part:
    """Return the page, at `/`, and its files, under `/static/`. They are read now, once."""
    folder = resources.files("supervisor.web") / "static"
    files = {
        entry.name: _File.of(entry.name, entry.read_bytes())
        for entry in folder.iterdir()
        if _suffix(entry.name) in _TYPES  # not what an editor may have left there
    }
    page = files.pop(_PAGE)
    routes = [Route("/", page.respond)]
    routes.extend(Route(f"/static/{name}", file.respond) for name, file in sorted(files.items()))
    return Part(routes=routes, open=True)
