"""Whose a request is, which upstream it goes to, and the routes of the gateway.

**Clients.** A key is taken from wherever an SDK puts it. It says which tenant the client is, and goes no further: the upstream is sent
its own. A stream belongs to its tenant: a key (`X-Stream-Key`) or a response that is another's is as good as taken, or not there.

**Leaving.** A client reads its stream as a subscriber. When it leaves, the stream's own `on_detach` does what was asked for: it cancels,
and the upstream's socket is closed in that step, or it keeps on, to be read by other means.
"""

from __future__ import annotations

import re
import secrets
import weakref
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Mapping
from fnmatch import fnmatchcase
from functools import partial
from typing import Any, Final

import attrs
import httpx
import msgspec
import trio
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.routing import Route
from starlette.types import Message, Receive, Scope, Send

from supervisor.control.auth import Token
from supervisor.dialects import Call, UnparseableError
from supervisor.dialects.anthropic import VERSION
from supervisor.errors import SupervisorError, UnknownStreamError
from supervisor.streams import Deadlines, OnDetach, Started, State, Stream
from supervisor.upstream.attempt import Transport, ask
from supervisor.upstream.catalog import Upstream
from supervisor.upstream.exchange import Exchange
from supervisor.upstream.ladder import Breaker
from supervisor.upstream.source import Answered
from supervisor.web.app import Front, Part
from supervisor.web.gateway.apis import ANTHROPIC, GEMINI, OPENAI, RESPONSES, Api, Failure
from supervisor.web.gateway.asked import (
    ENDPOINTS,
    FAMILIES,
    VIA,
    Asked,
    BadRequestError,
    Endpoint,
    about,
    adapted,
    digest,
    read,
    read_google,
)
from supervisor.web.gateway.astray import astray
from supervisor.web.gateway.config import GatewayConfig, GatewayRoute
from supervisor.web.gateway.relay import Relay, failure_here, passed_headers, send_answered, send_failure

__all__ = ["Gateway", "gateway"]

_KEY: Final = re.compile(r"[\x21-\x7e]{1,256}")
MODELS_BYTES: Final = 4 << 20
"""Read of an upstream's list of models."""
MODELS_S: Final = 5.0
"""How long it is waited for, in seconds."""
RESPONSE_BYTES: Final = 32 << 20
"""Read of the answer to a request about a response."""
ASK_S: Final = 60.0
"""How long it is waited for, in seconds."""


def gateway(
    front: Front,
    config: GatewayConfig,
    *,
    upstreams: Mapping[str, Upstream],
    transport: Transport,
    circuits: Callable[[str], Breaker | None],
    environ: Mapping[str, str],
) -> Part:
    """Return the gateway's part of the front. Raises ConfigurationError for a configuration that cannot be served."""
    config.check(upstreams, environ)
    keys = tuple((client.key(environ), client.tenant) for client in config.clients)
    made = Gateway(
        front=front, config=config, upstreams=upstreams, transport=transport, circuits=circuits, keys=keys
    )
    return Part(routes=made.routes(), open=True)


@attrs.frozen(kw_only=True)
class _Chosen:
    """Where a request goes."""

    upstream: Upstream
    route: GatewayRoute | None = None


@attrs.frozen
class _Made:
    """Who made a response of OpenAI, and for whom."""

    upstream: str
    tenant: str | None


@attrs.frozen
class _Signing:
    """A transport whose every request says that it has been here, so that one which comes back is refused."""

    transport: Transport
    id: str

    async def open(self, request: httpx.Request, *, on_sent: Callable[[], None] | None = None) -> Exchange:
        """Send a request."""
        been = request.headers.get(VIA)
        request.headers[VIA] = self.id if been is None else f"{been}, {self.id}"
        return await self.transport.open(request, on_sent=on_sent)


@attrs.define(eq=False)
class _Listing:
    """A list of models that an upstream is being asked for."""

    models: list[dict[str, Any]] | None = None
    """None: whoever asked has left before there was an answer."""
    over: trio.Event = attrs.field(factory=trio.Event)


@attrs.define(eq=False, kw_only=True)
class Gateway:
    """The gateway of one daemon."""

    front: Front
    config: GatewayConfig
    upstreams: Mapping[str, Upstream]
    transport: Transport
    """Made to tell in each request that it comes from here."""
    circuits: Callable[[str], Breaker | None]
    keys: tuple[tuple[Token, str], ...] = ()
    _listings: dict[str, _Listing] = attrs.field(factory=dict)
    """The lists of models that upstreams are being asked for."""
    _adapted: dict[tuple[str, str, object], Upstream] = attrs.field(factory=dict)
    _responses: OrderedDict[str, _Made] = attrs.field(factory=OrderedDict)
    _answered: weakref.WeakKeyDictionary[Stream, list[Answered]] = attrs.field(
        factory=weakref.WeakKeyDictionary
    )
    """How the upstreams of streams with a key answered, for those who join one."""
    _headers: frozenset[bytes] = frozenset()
    _id: str = attrs.field(factory=lambda: secrets.token_hex(8))
    """What this gateway knows its own requests by, should one come back."""

    def __attrs_post_init__(self) -> None:
        self._headers = frozenset(name.lower().encode() for name in self.config.headers)
        self.transport = _Signing(self.transport, self._id)

    def routes(self) -> list[Route]:
        """Return the routes."""
        responses = "/v1/responses/{id}"
        routes = [
            *(self._posted(path, endpoint) for path, endpoint in ENDPOINTS.items()),
            *(self._google(f"/{version}/models/{{call:path}}") for version in ("v1beta", "v1alpha", "v1")),
            self._about(responses, "GET", ""),
            self._about(responses, "DELETE", ""),
            self._about(f"{responses}/cancel", "POST", "/cancel"),
            self._about(f"{responses}/input_items", "GET", "/input_items"),
            Route("/v1/models", _Endpoint(self._models, OPENAI), methods=["GET"]),
        ]
        return [*routes, *astray(routes)]

    def _posted(self, path: str, endpoint: Endpoint) -> Route:
        async def serve(request: Request, send: Send) -> None:
            tenant = self._tenant(request)
            body = await self._body(request)
            await self._stream(
                request, send, read(endpoint, request.scope, body, headers=self._headers), tenant
            )

        return Route(path, _Endpoint(serve, endpoint.api), methods=["POST"])

    def _google(self, path: str) -> Route:
        async def serve(request: Request, send: Send) -> None:
            tenant = self._tenant(request)
            body = await self._body(request)
            asked = read_google(request.path_params["call"], request.scope, body, headers=self._headers)
            await self._stream(request, send, asked, tenant)

        return Route(path, _Endpoint(serve, GEMINI), methods=["POST"])

    def _about(self, path: str, method: str, rest: str) -> Route:
        async def serve(request: Request, send: Send) -> None:
            tenant = self._tenant(request)
            await self._body(request)
            response_id = request.path_params["id"]
            asked = about(request.scope, method, response_id, rest, headers=self._headers)
            chosen = self._maker(response_id, asked, tenant)
            if asked.streamed:
                await self._stream(request, send, asked, tenant, chosen)
                return
            await _unless_left(request.receive, send, partial(self._ask, asked, chosen.upstream))

        return Route(path, _Endpoint(serve, RESPONSES), methods=[method])

    async def _ask(self, asked: Asked, upstream: Upstream, send: Send) -> None:
        """Pass on a request that is no stream, and its answer."""
        answered: Answered | Failure = Failure(
            status=504, code="total", message="the upstream did not answer"
        )
        with trio.move_on_after(ASK_S):
            try:
                answered = await ask(self.transport, upstream, asked.call(upstream), max_bytes=RESPONSE_BYTES)
            except SupervisorError as error:
                answered = failure_here(error)
        if isinstance(answered, Answered) and 200 <= answered.status < 300 and not _whole(answered):
            message = "the upstream's answer is not JSON, or not all of it"
            answered = Failure(status=502, code="protocol", message=message)
        if isinstance(answered, Failure):
            await send_failure(send, asked.endpoint.api, answered)
        else:
            await send_answered(send, answered, passed_headers(answered))

    # --- whose it is -------------------------------------------------------------------------------------------------

    def _tenant(self, request: Request) -> str | None:
        """Return whose request it is. Raises BadRequestError for one that shows no key, or not the right one, or has been here."""
        if self._id in request.headers.get(VIA, "").split(", "):
            message = "this request has come back: an upstream's base_url leads to this gateway itself"
            raise BadRequestError(508, "loop", message)
        if request.method == "HEAD":  # Starlette lets it in with GET
            raise BadRequestError(405, "method_not_allowed", "there is no HEAD here")
        # Also of a GET: any asks an upstream.
        refusal = self.front.access.refuses(request.scope)
        if refusal is not None:
            raise BadRequestError(403, "forbidden", refusal)
        offered = _offered_keys(request)
        if self.keys:
            for key, tenant in self.keys:
                if any(key.matches(one) for one in offered):
                    return tenant
        elif self.front.access.allows(request.scope):
            return None
        else:
            token = self.front.access.token
            if token is not None and any(token.matches(one) for one in offered):
                return None
        message = "the key is not one that this gateway knows" if offered else "a key is required"
        raise BadRequestError(401, "invalid_api_key", message)

    async def _body(self, request: Request) -> bytes:
        if request.headers.get("content-encoding", "identity").strip().lower() not in ("", "identity"):
            message = "the body has to be sent as it is, not encoded"
            raise BadRequestError(415, "content_encoding", message)
        return await request.body()

    # --- where it goes -----------------------------------------------------------------------------------------------

    def _choose(self, asked: Asked) -> _Chosen:
        """Return the upstream for a request. Raises BadRequestError if there is none."""
        family = asked.endpoint.family
        model = asked.model
        if self.config.routes and model is not None:
            route = self._route(family, model)
            if route is None:
                message = f"no route is configured here for the model {model!r}"
                raise BadRequestError(404, "model_not_found", message)
            return _Chosen(upstream=self._adapt(self.upstreams[route.upstream], asked), route=route)
        first = self._first(family, asked.endpoint.dialect.name)
        if first is None:
            raise BadRequestError(
                404, "no_upstream", f"no upstream is configured here that speaks the API of {family}"
            )
        return _Chosen(upstream=self._adapt(first, asked))

    def _route(self, family: str, model: str) -> GatewayRoute | None:
        """Return the first route that fits, of those to upstreams of a family."""
        for route in self.config.routes:
            upstream = self.upstreams[route.upstream]
            if FAMILIES.get(upstream.dialect.name) == family and any(
                fnmatchcase(model, pattern) for pattern in route.models
            ):
                return route
        return None

    def _first(self, family: str, dialect: str) -> Upstream | None:
        """Return the first upstream of a dialect, or else of its provider's family."""
        of_family = [up for up in self.upstreams.values() if FAMILIES.get(up.dialect.name) == family]
        exact = (up for up in of_family if up.dialect.name == dialect)
        return next(exact, of_family[0] if of_family else None)

    def _adapt(self, upstream: Upstream, asked: Asked) -> Upstream:
        key = upstream.name, asked.dialect.name, asked.dialect.endings.clean_end
        if key not in self._adapted:
            self._adapted[key] = adapted(upstream, asked)
        return self._adapted[key]

    def _maker(self, response_id: str, asked: Asked, tenant: str | None) -> _Chosen:
        """Return the upstream that made a response; not known, the first that could have. Raises BadRequestError."""
        made = self._responses.get(response_id)
        if made is not None and made.tenant != tenant:
            raise BadRequestError(404, "not_found", f"there is no response {response_id!r}")
        if made is not None and made.upstream in self.upstreams:
            return _Chosen(upstream=self._adapt(self.upstreams[made.upstream], asked))
        return self._choose(asked)

    # --- a stream ----------------------------------------------------------------------------------------------------

    async def _stream(
        self, request: Request, send: Send, asked: Asked, tenant: str | None, chosen: _Chosen | None = None
    ) -> None:
        """Start, or join, a stream and tell it to its client, until the end or until the client leaves."""
        chosen = self._choose(asked) if chosen is None else chosen
        latest: list[Answered] = []
        started = self._start(request, asked, tenant, chosen, latest)
        stream = started.stream
        if stream.key is not None:
            latest = self._answered.setdefault(stream, latest)

        def learn(name: str, payload: bytes) -> None:
            response_id = _response_id(asked, name, payload) if asked.endpoint.api is RESPONSES else None
            if response_id is not None:
                self._remember(response_id, _Made(stream.info().upstream or "", tenant))

        async def tell(send: Send) -> None:
            relay = Relay(
                stream=stream,
                api=asked.endpoint.api,
                dialect=asked.dialect,
                whole=not asked.streamed,
                send=send,
                answered=lambda: latest[-1] if latest else None,
                keep_alive_s=self.config.keep_alive_s,
                on_first=learn,
            )
            await relay.run(events)

        with stream.subscribe(after="start") as events:
            await _unless_left(request.receive, send, tell)
        if (
            stream.state is State.FAILED
        ):  # it is told as it was to whoever is reading, and asked anew for others
            self._answered.pop(stream, None)

    def _start(
        self, request: Request, asked: Asked, tenant: str | None, chosen: _Chosen, latest: list[Answered]
    ) -> Started:
        supervisor, upstream = self.front.supervisor, chosen.upstream
        key = request.headers.get("x-stream-key")
        if key is not None and not _KEY.fullmatch(key):
            raise BadRequestError(
                400, "stream_key", "X-Stream-Key has to be 1 to 256 printable ASCII characters"
            )

        def answered(told: Answered) -> None:
            latest[:] = [told]

        source = upstream.source(
            asked.body,
            transport=self.transport,
            circuits=self.circuits,
            first=asked.call,
            answered=answered,
        )
        meta: dict[str, Any] = {"endpoint": asked.endpoint.path, "streamed": asked.streamed}
        if asked.model is not None:
            meta["model"] = asked.model
        if key is not None:  # by which the same request is known
            meta["request_sha256"] = digest(request.scope, asked.body)
        started = supervisor.start_nowait(
            source,
            key=key,
            on_conflict="replace" if key is not None and self._came_to_nothing(key, tenant) else "attach",
            on_detach=self._on_detach(request, asked, chosen.route),
            deadlines=self._deadlines(asked, upstream),
            meta=meta,
            tenant=tenant,
        )
        if not started.created:
            info = started.stream.info()
            theirs = {name: info.meta.get(name) for name in meta}
            if info.tenant != tenant or theirs != meta:
                raise BadRequestError(409, "key_conflict", f"the key {key!r} is that of another request")
        return started

    def _came_to_nothing(self, key: str, tenant: str | None) -> bool:
        """Whether the stream of a key ended without an event, and nobody meant it to: then the same request again is no second one."""
        try:
            info = self.front.supervisor.get_by_key(key).info()
        except UnknownStreamError:
            return False
        unmeant = info.state in (State.FAILED, State.EXPIRED) or info.reason == "detached"
        return unmeant and not info.events and info.tenant == tenant

    def _on_detach(self, request: Request, asked: Asked, route: GatewayRoute | None) -> OnDetach:
        mode, grace_s = self.config.on_disconnect, self.config.grace_s
        if route is not None and route.on_disconnect is not None:
            mode = route.on_disconnect
        if route is not None and route.grace_s is not None:
            grace_s = route.grace_s
        if asked.background:
            mode = "keep"
        said = request.headers.get("x-stream-on-disconnect")
        if said is not None:
            if said not in ("cancel", "keep"):
                raise BadRequestError(400, "on_disconnect", "X-Stream-On-Disconnect is 'cancel' or 'keep'")
            mode = "keep" if said == "keep" else "cancel"
        return OnDetach(mode=mode, grace_s=grace_s)

    def _deadlines(self, asked: Asked, upstream: Upstream) -> Deadlines:
        deadlines = upstream.deadlines or self.front.supervisor.deadlines
        if asked.streamed:
            return deadlines
        # One event, at the end: what is between is silence.
        return attrs.evolve(
            deadlines, first_event_s=self.config.whole_answer_s, idle_s=self.config.whole_answer_s
        )

    def _remember(self, response_id: str, made: _Made) -> None:
        self._responses[response_id] = made
        self._responses.move_to_end(response_id)
        while len(self._responses) > self.config.max_responses:
            self._responses.popitem(last=False)

    # --- the models --------------------------------------------------------------------------------------------------

    async def _models(self, request: Request, send: Send) -> None:
        """Tell the models of every upstream whose API has such a list, where a request for one would go to it."""
        self._tenant(request)
        await self._body(request)
        wanted = ("anthropic",) if "anthropic-version" in request.headers else ("openai", "anthropic")
        asked = [up for up in self.upstreams.values() if FAMILIES.get(up.dialect.name) in wanted]
        via = request.headers.get(VIA)
        lists: dict[str, list[dict[str, Any]]] = {}
        async with trio.open_nursery() as nursery:
            for upstream in asked:
                nursery.start_soon(self._list, upstream, via, lists)
        data: dict[str, dict[str, Any]] = {}
        for upstream in asked:
            named = [{"id": name} for name in upstream.models]
            for model in [*named, *lists.get(upstream.name, ())]:
                if self._leads(model["id"], upstream):
                    told = {"object": "model", "created": 0, "owned_by": upstream.name, **model}
                    data.setdefault(model["id"], told)
        ids: list[str | None] = [*data] or [None]
        answer = {"object": "list", "data": list(data.values()), "has_more": False}
        body = msgspec.json.encode({**answer, "first_id": ids[0], "last_id": ids[-1]})
        await send_answered(send, Answered(upstream="", status=200, headers={}, body=body), [])

    async def _list(
        self, upstream: Upstream, via: str | None, lists: dict[str, list[dict[str, Any]]]
    ) -> None:
        """Learn an upstream's models, by one request for all who ask meanwhile; but not for gateways, which might wait for one another."""
        while via is None and upstream.name in self._listings:
            listing = self._listings[upstream.name]
            await listing.over.wait()
            if listing.models is not None:
                lists[upstream.name] = listing.models
                return
        listing = _Listing()
        if via is None:
            self._listings[upstream.name] = listing
        try:
            listing.models = lists[upstream.name] = await self._ask_models(upstream, via)
        finally:
            listing.over.set()
            if via is None:
                del self._listings[upstream.name]

    async def _ask_models(self, upstream: Upstream, via: str | None) -> list[dict[str, Any]]:
        """Ask an upstream for its models; return none if it does not tell: the others' are told."""
        headers = {"accept": "application/json"} if via is None else {"accept": "application/json", VIA: via}
        if FAMILIES[upstream.dialect.name] == "anthropic":
            headers["anthropic-version"] = VERSION
        with trio.move_on_after(MODELS_S):
            try:
                call = Call(method="GET", path="/models", headers=headers)
                answered = await ask(self.transport, upstream, call, max_bytes=MODELS_BYTES)
                value = msgspec.json.decode(answered.body)
            except (SupervisorError, ValueError, RecursionError):
                return []
            data = value.get("data") if isinstance(value, dict) and answered.status == 200 else None
            if isinstance(data, list):
                return [one for one in data if isinstance(one, dict) and isinstance(one.get("id"), str)]
        return []

    def _leads(self, model: str, upstream: Upstream) -> bool:
        """Whether a request for this model would go to this upstream."""
        family = FAMILIES[upstream.dialect.name]
        if self.config.routes:
            route = self._route(family, model)
            return route is not None and route.upstream == upstream.name
        return any(
            endpoint.family == family and self._first(family, endpoint.dialect.name) is upstream
            for endpoint in ENDPOINTS.values()
        )


@attrs.frozen
class _Endpoint:
    """An ASGI application around a handler: what it cannot serve is told in the API's shape."""

    serve: Callable[[Request, Send], Any]
    api: Api

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        request = Request(scope, receive)
        api = ANTHROPIC if "anthropic-version" in request.headers and self.api is OPENAI else self.api
        try:
            await self.serve(request, send)
        except BadRequestError as error:
            await send_failure(send, api, error.failure)
        except ClientDisconnect:
            pass
        except HTTPException as error:  # of the body, which is too large or does not come
            failure = Failure(status=error.status_code, code="request", message=error.detail, again=False)
            await send_failure(send, api, failure)
        except SupervisorError as error:
            await send_failure(send, api, failure_here(error))


def _response_id(asked: Asked, name: str, payload: bytes) -> str | None:
    """Return the id that a response of OpenAI's first event has."""
    try:
        meant = asked.dialect.reader().read(payload, name or "message")
    except UnparseableError:
        return None
    return next((delta.response_id for delta in meant if delta.response_id is not None), None)


def _whole(answered: Answered) -> bool:
    """Whether an answer is one JSON value, or is meant to have no body."""
    try:
        msgspec.json.decode(answered.body, type=msgspec.Raw)
    except (msgspec.DecodeError, RecursionError):
        return answered.status == 204 and not answered.body
    return True


async def _unless_left(receive: Receive, send: Send, tell: Callable[[Send], Awaitable[None]]) -> None:
    """Tell a client something; if it leaves, cancel that.

    The server says http.disconnect also once it has been given the last of an answer, while that is still being written: from then on
    nobody listens to it, and who leaves is noticed by the writing.
    """
    async with trio.open_nursery() as nursery:
        watching = trio.CancelScope()

        async def watch() -> None:
            with watching:
                while (await receive())["type"] != "http.disconnect":
                    pass
                nursery.cancel_scope.cancel(reason="the client has left")

        async def watched(message: Message) -> None:
            if message["type"] == "http.response.body" and not message.get("more_body", False):
                watching.cancel(reason="the last of the answer is sent")
            await send(message)

        nursery.start_soon(watch)
        await tell(watched)
        nursery.cancel_scope.cancel(reason="it has been told")


def _offered_keys(request: Request) -> list[bytes]:
    """Return the keys that a request shows, wherever SDKs put them."""
    headers = request.headers
    offered = [headers[name] for name in ("x-api-key", "x-goog-api-key", "api-key") if name in headers]
    scheme, _, credential = headers.get("authorization", "").partition(" ")
    if scheme.lower() == "bearer":
        offered.append(credential.strip())
    if "key" in request.query_params:
        offered.append(request.query_params["key"])
    return [key.encode("utf-8", "replace") for key in offered if key]
