"""Requests of SDKs that no route serves: what is wrong with them, told in their API's own shape, so that the SDK shows it.

Most are for something that is served, at another path: the base URL that the client was given lacks its `/v1`, or has one too many.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import attrs
from starlette.requests import Request
from starlette.routing import Match, Route
from starlette.types import Receive, Scope, Send

from supervisor.web.gateway.apis import ANTHROPIC, GEMINI, OLLAMA, OPENAI, Api, Failure
from supervisor.web.gateway.asked import ENDPOINTS
from supervisor.web.gateway.relay import send_failure

__all__ = ["astray"]

MAX_PATH_CHARS: Final = 200
"""Told of a path."""
_SERVED: Final = (*ENDPOINTS, "/v1/models")
_VERSIONS: Final = ("/v1", "/v1beta", "/v1alpha", "/api")
_BARE: Final = ("/chat/completions", "/completions", "/responses", "/messages", "/models", "/embeddings")
"""What SDKs ask for below a base URL that lacks its version."""


def astray(routes: Sequence[Route]) -> list[Route]:
    """Return the routes that come after those of the gateway."""
    told = _Astray(routes)
    paths = (*(f"{version}/{{rest:path}}" for version in _VERSIONS), *_BARE)
    return [Route(path, told) for path in paths]


@attrs.frozen
class _Astray:
    """An ASGI application that tells what is wrong."""

    routes: Sequence[Route]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        del receive
        request = Request(scope)
        path, host = scope["path"][:MAX_PATH_CHARS], request.headers.get("host", "")
        methods = sorted({method for route in self.routes for method in _methods(route, scope)} - {"HEAD"})
        status, code, headers = 404, "not_found", []
        api = _api(request, path)
        served = next(
            (one for one in _SERVED if path.endswith(one.removeprefix("/v1")) and api is not GEMINI), None
        )
        if methods:
            status, code = 405, "method_not_allowed"
            headers = [(b"allow", ", ".join(methods).encode())]
            message = f"{path} is asked by {' or '.join(methods)} here, not by {request.method}"
        elif served is not None:
            bare = served.startswith("/api") or (served == "/v1/messages" and path.startswith("/v1/"))
            message = (
                f"there is no {path} here, but {served}: the gateway's base URL for this client is "
                f"http://{host}{'' if bare else '/v1'}"
            )
        else:
            message = f"{path} is not served here: answers of models are, embeddings, files, batches and counting tokens are not"
        failure = Failure(status=status, code=code, message=message, again=False)
        await send_failure(send, api, failure, headers)


def _methods(route: Route, scope: Scope) -> set[str]:
    """Return the methods that a route has for this path, if it has others than this one."""
    return (route.methods or set()) if route.matches(scope)[0] is Match.PARTIAL else set()


def _api(request: Request, path: str) -> Api:
    if "anthropic-version" in request.headers or "/messages" in path:
        return ANTHROPIC
    if "/api/" in path:
        return OLLAMA
    gemini = path.startswith(("/v1beta/", "/v1alpha/")) or (path.startswith("/v1/models/") and ":" in path)
    return GEMINI if gemini else OPENAI
