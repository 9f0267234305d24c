"""The application: who may ask, what every answer carries, and where the routes of the parts are hung in.

**Adding routes.** A part of the front is a function that takes the `Front`, and whatever else it needs, and returns a `Part`:
some Starlette routes and whether they are open.

    def part(front: Front, registry: Registry) -> Part:
        async def metrics(request: Request) -> Response: ...
        return Part(routes=[Route("/metrics", metrics)])

`daemon._Daemon._parts` calls it; a part knows no other part. Routes that are not `open` are
not reached without the token: as `Authorization: Bearer`, or by the cookie that `POST /session` gives a browser for it.
`open=True` is for what anybody may see (health, the page's own files) and for what asks for keys of its own (the gateway), with
`front.access.allows(scope)` where the token is also good enough.

In an endpoint: read the body whole (`await request.body()`; its limits are kept below) before anything that takes time, for a
client that leaves is told behind what it has sent. Raise what goes wrong: a `SupervisorError`, an `RpcError` and an
`HTTPException` become the JSON of `problem` with the right status, outside of any nursery of your own. Answer with
`answer(value)`: msgspec knows every type that the control channel knows. What goes on for long waits for `http.disconnect` beside it, and
sends the very last piece when it does so no more: `http.disconnect` also comes when an answer is complete.

**What is checked of each request**, by `_Gate`, before any route: `Host`, where no token is asked for, because a page whose name
was rebound to 127.0.0.1 has the browser's user behind it, but not the name; and `Origin` or `Sec-Fetch-Site` of what may change
something, because any page may have a browser post here. Web origins that the configuration allows are let through and told
so (CORS). No header is trusted that says who the client is.
"""

from __future__ import annotations

import copy
import hmac
import logging
import time
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from typing import Any

import attrs
import msgspec
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Mount, Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from supervisor.control.auth import Access, Token
from supervisor.control.messages import StreamParams
from supervisor.control.rpc import ErrorMessage, RpcError, error_for, read_params
from supervisor.control.server import Resolve
from supervisor.errors import AuthenticationError, SupervisorError
from supervisor.streams import Supervisor
from supervisor.web.server import WebLimits

__all__ = ["Front", "Part", "WebAccess", "alive", "answer", "create_app", "problem", "route", "which"]

_log = logging.getLogger("supervisor.web")

SESSION_S = 12 * 3600
"""How long a browser's cookie is good for, in seconds."""
_REQUIRED = "a bearer token is required: Authorization: Bearer …"
_LOCAL_HOSTS = frozenset({"localhost", "127.0.0.1", "[::1]"})
_SAFE_METHODS = frozenset({"GET", "HEAD", "OPTIONS"})
_SAME = frozenset({b"same-origin", b"none"})
_HEADERS = (
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
    (b"cross-origin-resource-policy", b"same-origin"),
    (b"cache-control", b"no-store"),
)

STATUS: Mapping[str, int] = {
    "parse_error": 400,
    "invalid_request": 400,
    "invalid_params": 400,
    "configuration": 400,
    "unauthenticated": 401,
    "forbidden": 403,
    "unknown_stream": 404,
    "not_found": 404,
    "method_not_allowed": 405,
    "timeout": 408,
    "key_conflict": 409,
    "sealed": 409,
    "gap": 410,
    "too_large": 413,
    "misdirected": 421,
    "admission": 429,
    "too_many_requests": 429,
    "internal": 500,
    "supervisor": 500,
    "unsupported": 501,
    "upstream": 502,
    "closed": 503,
    "store": 503,
    "overloaded": 503,
}
"""The status of each kind of error. The kinds of the control channel are in `supervisor.control.rpc`; the others are HTTP's own."""
_KINDS = {400: "invalid_request", 429: "too_many_requests", 500: "internal", 503: "overloaded"} | {
    status: kind
    for kind, status in STATUS.items()
    if kind in {"not_found", "method_not_allowed", "timeout", "too_large"}
}
_TEMPORARY = frozenset({"timeout", "overloaded"})

Endpoint = Callable[[Request], Awaitable[Response]]
_encode = msgspec.json.Encoder(enc_hook=str).encode


def _as_names(given: Iterable[str]) -> frozenset[str]:
    return frozenset(name.lower() for name in given)


@attrs.frozen(kw_only=True)
class WebAccess:
    """Who may ask for what."""

    token: Token | None = None
    origins: frozenset[str] = attrs.field(factory=frozenset, converter=_as_names)
    """Other web origins whose pages may call, as browsers write them."""
    hosts: frozenset[str] = attrs.field(factory=frozenset, converter=_as_names)
    """Names that the front is reached by. Empty: without a token those of loopback, with one any."""

    def __attrs_post_init__(self) -> None:
        Access(origins=self.origins)  # raises ConfigurationError for what is no origin

    def allows(self, scope: Scope) -> bool:
        """Say whether a request shows the token, or none is asked for."""
        if self.token is None:
            return True
        try:
            Access(token=self.token).check(
                [(name, value) for name, value in scope["headers"] if name == b"authorization"]
            )
        except AuthenticationError:
            return self._has_session(scope)
        return True

    def refuses(self, scope: Scope) -> str | None:
        """Say why a request that changes something, or costs, is not for this page to make; None: it may."""
        headers = dict(scope["headers"])
        origin = headers.get(b"origin")
        if origin is not None:
            host = headers.get(b"host", b"").decode("latin-1").lower()
            theirs = origin.decode("latin-1").lower()
            same = theirs.partition("://")[2] == host and bool(host)
            if not same and theirs not in self.origins:
                return "this Origin may not do this; allow it by `origins` in the configuration"
        elif headers.get(b"sec-fetch-site", b"none") not in _SAME:
            return "a page of another site may not do this"
        return None

    # --- a browser's session: a cookie, good for a time, that cannot be made without the token -----------------------

    def session(self, scope: Scope) -> tuple[str, str]:
        """Return the name and the value of a new cookie."""
        until = str(int(time.time()) + SESSION_S)
        return _cookie_name(scope), f"{until}.{self._sign(until)}"

    def _has_session(self, scope: Scope) -> bool:
        value = Request(scope).cookies.get(_cookie_name(scope), "")
        until, _, signature = value.partition(".")
        if not (until.isascii() and until.isdecimal() and len(until) < 16 and int(until) > time.time()):
            return False
        return hmac.compare_digest(signature.encode(), self._sign(until).encode())

    def _sign(self, until: str) -> str:
        assert self.token is not None
        return hmac.digest(self.token.header(), f"session until {until}".encode(), "sha256").hex()


def _cookie_name(scope: Scope) -> str:
    """Return a name of its own for each port, which cookies are not kept apart by (RFC 6265, 8.5)."""
    server = scope.get("server")
    return f"stream-supervisor-{server[1] if server else 0}"


@attrs.define(eq=False, kw_only=True)
class Front:
    """What the parts of the front have in common."""

    supervisor: Supervisor
    resolve: Resolve
    """Turns the parameters of a start into a source: the daemon's, the same as the control channel's."""
    access: WebAccess = attrs.field(factory=WebAccess)
    limits: WebLimits = attrs.field(factory=WebLimits)
    stats: dict[str, Callable[[], Any]] = attrs.field(factory=dict)
    """Further figures for `/stats`, by the name of what they are of."""


@attrs.frozen(kw_only=True)
class Part:
    """Some routes, and whether they are open to anybody."""

    routes: Sequence[BaseRoute]
    open: bool = False


def create_app(front: Front, parts: Iterable[Part] = ()) -> Starlette:
    """Return the application: the session, and what the parts have."""
    routes: list[BaseRoute] = [*_session(front).routes]
    for part in parts:
        routes.extend(part.routes if part.open else [_locked(one, front.access) for one in part.routes])
    middleware = [Middleware(_Gate, access=front.access)]
    if front.access.origins:
        middleware.append(
            Middleware(
                CORSMiddleware,
                allow_origins=sorted(front.access.origins),
                allow_methods=["GET", "POST", "DELETE"],
                allow_headers=["*"],
                allow_credentials=True,
                expose_headers=["Retry-After", "X-Stream-Id"],
            )
        )
    handlers: dict[Any, Any] = {
        ClientDisconnect: _nobody,
        HTTPException: _refused,
        RpcError: _refused,
        SupervisorError: _refused,
        Exception: _refused,
    }
    app = Starlette(routes=routes, middleware=middleware, exception_handlers=handlers)
    app.router.redirect_slashes = False  # it would answer with the Host it was asked by
    return app


def route(path: str, **by_method: Endpoint) -> Route:
    """Return one route for all methods of a path, so that a 405 names them all."""

    async def endpoint(request: Request) -> Response:
        return await by_method["GET" if request.method == "HEAD" else request.method](request)

    return Route(path, endpoint, methods=list(by_method))


def which(request: Request) -> StreamParams:
    """Return the stream that a path names: by its id, or as `key:KEY`. Raises RpcError."""
    named: str = request.path_params["id"]
    key = named.removeprefix("key:")
    return read_params(msgspec.Raw(_encode({"id": named} if key == named else {"key": key})), StreamParams)


# --- answers ---------------------------------------------------------------------------------------------------------


def answer(value: object, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    """Return a JSON answer."""
    return Response(_encode(value), status, headers, "application/json")


def problem(
    kind: str, message: str, *, status: int | None = None, headers: Mapping[str, str] | None = None
) -> Response:
    """Return an answer that says what is wrong, of a kind in `STATUS`."""
    told = ErrorMessage(0, message, {"kind": kind, "temporary": kind in _TEMPORARY, "retry_after_s": None})
    return _problem(told, status, headers)


def _problem(error: ErrorMessage, status: int | None, headers: Mapping[str, str] | None) -> Response:
    kind = error.data["kind"]
    status = STATUS.get(kind, 500) if status is None else status
    given = dict(headers or {})
    retry_after_s = error.data.get("retry_after_s")
    if retry_after_s is None and status in {429, 503}:
        retry_after_s = 1.0
    if retry_after_s is not None:
        given.setdefault("retry-after", str(max(1, round(retry_after_s))))
    if status == 401:
        given.setdefault("www-authenticate", "Bearer")
    told = {"kind": kind, "message": error.message, **error.data, "retry_after_s": retry_after_s}
    return answer({"error": told}, status, given)


async def _refused(request: Request, error: Exception) -> Response:
    """Turn an exception into an answer. What nobody expected is raised on, and logged, by Starlette."""
    del request
    if isinstance(error, HTTPException):
        kind = _KINDS.get(error.status_code, "invalid_request" if error.status_code < 500 else "internal")
        message = "there is nothing here" if error.status_code == 404 else error.detail
        return problem(kind, message, status=error.status_code, headers=error.headers)
    return _problem(error_for(error), None, None)


async def _nobody(request: Request, error: Exception) -> None:
    """Answer nothing to who has left before its body was whole."""
    del request, error


# --- the gate --------------------------------------------------------------------------------------------------------


class _Gate:
    """Judges each request before anything else sees it, and gives each answer its headers."""

    def __init__(self, app: ASGIApp, *, access: WebAccess) -> None:
        self._app = app
        self._access = access

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        async def guarded(message: Message) -> None:
            if message["type"] == "http.response.start":
                given = list(message.get("headers", ()))
                names = {name.lower() for name, _ in given}
                message["headers"] = given + [row for row in _HEADERS if row[0] not in names]
            await send(message)

        refusal = self._judge(scope)
        if refusal is not None:
            await refusal(scope, receive, guarded)
        else:
            await self._app(scope, receive, guarded)

    def _judge(self, scope: Scope) -> Response | None:
        access = self._access
        headers = dict(scope["headers"])
        host = headers.get(b"host", b"").decode("latin-1").lower()
        known = access.hosts if access.hosts or access.token is not None else _LOCAL_HOSTS
        if access.token is None:
            known |= _LOCAL_HOSTS
        if known and host and _name(host) not in known:
            return problem(
                "misdirected", "this server has another name; allow this one by `hosts` in its configuration"
            )
        if scope["method"] in _SAFE_METHODS:
            return None
        refusal = access.refuses(scope)
        return None if refusal is None else problem("forbidden", refusal)


def _name(host: str) -> str:
    """Return a Host without its port."""
    name, colon, port = host.rpartition(":")
    return name if colon and port.isdecimal() and not name.endswith(":") else host


def _locked(route: BaseRoute, access: WebAccess) -> BaseRoute:
    """Return a route behind the token."""
    assert isinstance(route, Route | Mount), "only these can be locked"
    behind = copy.copy(route)
    behind.app = _Locked(route.app, access)
    return behind


class _Locked:
    """Asks for the token, or a session, before a route is reached."""

    def __init__(self, app: ASGIApp, access: WebAccess) -> None:
        self._app = app
        self._access = access

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and not self._access.allows(scope):
            shown = Request(scope).headers.get("authorization", "").lower().startswith("bearer ")
            told = "the bearer token is not the right one" if shown else _REQUIRED
            refusal = problem("unauthenticated", told)
            await refusal(scope, receive, send)
            return
        await self._app(scope, receive, send)


# --- whether it is alive ---------------------------------------------------------------------------------------------


def alive(front: Front) -> Part:
    """`/healthz`: that the process is there and its loop turns. It says nothing of the store, nor of any upstream."""
    del front

    async def healthz(request: Request) -> Response:
        del request
        return answer({"status": "ok"})

    return Part(routes=[Route("/healthz", healthz)], open=True)


# --- the session of a browser ----------------------------------------------------------------------------------------


class _Login(msgspec.Struct, forbid_unknown_fields=True):
    token: str


def _session(front: Front) -> Part:
    """`/session`: a browser shows the token once and has a cookie for it from then on, which no script can read."""
    access = front.access

    async def look(request: Request) -> Response:
        return answer({"required": access.token is not None, "authenticated": access.allows(request.scope)})

    async def enter(request: Request) -> Response:
        try:
            offered = msgspec.json.decode(await request.body(), type=_Login).token
        except (msgspec.DecodeError, UnicodeError, RecursionError):
            raise RpcError("invalid_params", 'give {"token": "…"}') from None
        if access.token is None:
            return answer({"required": False, "authenticated": True})
        if not access.token.matches(offered.encode("utf-8", "replace")):
            raise AuthenticationError("the token is not the right one")
        name, value = access.session(request.scope)
        reply = answer({"required": True, "authenticated": True})
        https = request.headers.get("origin", "").startswith("https://")
        reply.set_cookie(
            name, value, max_age=SESSION_S, path="/", httponly=True, samesite="strict", secure=https
        )
        return reply

    async def leave(request: Request) -> Response:
        reply = Response(status_code=204)
        reply.delete_cookie(_cookie_name(request.scope), path="/", httponly=True, samesite="strict")
        return reply

    return Part(routes=[route("/session", GET=look, POST=enter, DELETE=leave)], open=True)
