"""What a client asks for: which API, which model, as a stream or as a whole, and the call that asks an upstream for the same.

Of a request's body only what has to be known is read: the model, and whether a stream is wanted. The bytes go to the upstream as
they came; only where that has another name for the model is the name put in, everything beside it left as it was written.

An upstream is of a provider's *family*: one that is configured for OpenAI's chat also serves completions and responses, under the
same base URL, read in the dialect that the endpoint has.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Mapping
from typing import Any, Final
from urllib.parse import quote, unquote_to_bytes

import attrs
import msgspec

from supervisor.dialects import Call, Dialect
from supervisor.dialects.anthropic import ANTHROPIC as ANTHROPIC_DIALECT
from supervisor.dialects.anthropic import VERSION
from supervisor.dialects.catalog import find
from supervisor.upstream.catalog import Upstream
from supervisor.web.gateway.apis import ANTHROPIC, GEMINI, OLLAMA, OPENAI, RESPONSES, Api, Failure

__all__ = [
    "ENDPOINTS",
    "FAMILIES",
    "VIA",
    "Asked",
    "BadRequestError",
    "Endpoint",
    "about",
    "adapted",
    "digest",
    "read",
    "read_google",
]

FAMILIES: Final[Mapping[str, str]] = {
    "openai-chat": "openai",
    "openai-completions": "openai",
    "openai-responses": "openai",
    "anthropic": "anthropic",
    "gemini": "gemini",
    "gemini-jsonarray": "gemini",
    "ollama": "ollama",
}
"""The provider whose API an upstream speaks, by the dialect that it is configured for. Others have no gateway."""

_PASSED: Final = (
    b"anthropic-beta",
    b"anthropic-version",
    b"http-referer",
    b"idempotency-key",
    b"openai-beta",
    b"openai-organization",
    b"openai-project",
    b"traceparent",
    b"tracestate",
    b"x-stream-via",
    b"x-title",
)
"""Headers of a client that are passed on: what the providers' APIs and OpenRouter's know, and the trace."""
VIA: Final = "x-stream-via"
"""Names the gateways that a request has come through, so that one which goes in a circle is noticed."""
MAX_MODEL_CHARS: Final = 512
"""The longest name of a model."""
_ID: Final = re.compile(r"(?=[^.])[\w.:~=+@-]{1,256}", re.ASCII)
_CONTROL: Final = re.compile(r"[\x00-\x08\n-\x1f\x7f]")
_GOOGLE: Final = re.compile(
    r"(?P<model>[^/\x00-\x20?#].{0,255}):(?P<verb>streamGenerateContent|generateContent)"
)


class BadRequestError(Exception):
    """A request that cannot be understood, or not be served; `failure` is what its client is told."""

    def __init__(self, status: int, code: str, message: str) -> None:
        super().__init__(message)
        self.failure = Failure(status=status, code=code, message=message, again=False)


@attrs.frozen(kw_only=True)
class Endpoint:
    """One endpoint of a provider's API."""

    dialect: Dialect
    api: Api
    path: str
    """What follows an upstream's base URL."""

    @property
    def family(self) -> str:
        """The provider."""
        return FAMILIES[self.dialect.name]


_CHAT: Final = Endpoint(dialect=find("openai-chat"), api=OPENAI, path="/chat/completions")
_RESPONSES: Final = Endpoint(dialect=find("openai-responses"), api=RESPONSES, path="/responses")
_GEMINI: Final = Endpoint(dialect=find("gemini"), api=GEMINI, path="/models/{model}:{verb}")
ENDPOINTS: Final[Mapping[str, Endpoint]] = {
    "/v1/chat/completions": _CHAT,
    "/v1/completions": Endpoint(dialect=find("openai-completions"), api=OPENAI, path="/completions"),
    "/v1/responses": _RESPONSES,
    "/v1/messages": Endpoint(dialect=ANTHROPIC_DIALECT, api=ANTHROPIC, path="/messages"),
    "/api/chat": Endpoint(dialect=find("ollama"), api=OLLAMA, path="/api/chat"),
    "/api/generate": Endpoint(dialect=find("ollama"), api=OLLAMA, path="/api/generate"),
}
"""By their path here. Gemini's have the model in their path."""


@attrs.frozen(kw_only=True)
class Asked:
    """One request, understood."""

    endpoint: Endpoint
    dialect: Dialect
    """What its answer is read as."""
    model: str | None
    streamed: bool
    background: bool = False
    """Whether the provider makes the answer, and keeps it, also if nobody listens."""
    body: bytes
    call: Callable[[Upstream], Call]
    """Makes the request to an upstream."""


class _Body(msgspec.Struct):
    """Of a request's body what has to be known."""

    model: Any = None
    stream: Any = None
    background: Any = None


_read_body = msgspec.json.Decoder(_Body).decode
_read_fields = msgspec.json.Decoder(dict[str, msgspec.Raw]).decode


def read(endpoint: Endpoint, scope: Mapping[str, Any], body: bytes, *, headers: frozenset[bytes]) -> Asked:
    """Understand a request to one of `ENDPOINTS`. `headers`: what is passed on beside the usual. Raises BadRequestError."""
    known = _known(body)
    if not isinstance(known.model, str) or not known.model:
        raise BadRequestError(400, "missing_model", "the request names no model: `model` has to be a string")
    model = known.model
    if len(model) > MAX_MODEL_CHARS:
        raise BadRequestError(400, "model", f"a model's name has at most {MAX_MODEL_CHARS} characters here")
    always = endpoint.dialect.framing == "ndjson"  # Ollama's API streams unless it is told not to
    streamed = known.stream is not False if always else known.stream is True
    passed = _passed(scope, headers, endpoint, streamed=streamed)
    query = _query(scope)

    def call(upstream: Upstream) -> Call:
        path = upstream.path or endpoint.path
        if path.endswith("/chat") and endpoint.path.endswith(
            "/generate"
        ):  # a place of its own for Ollama's API
            path = f"{path.removesuffix('/chat')}/generate"
        name = upstream.models.get(model)
        return Call(path=path + query, body=body if name is None else _renamed(body, name), headers=passed)

    return Asked(
        endpoint=endpoint,
        dialect=_as_whole(endpoint.dialect, streamed=streamed),
        model=model,
        streamed=streamed,
        background=known.background is True and endpoint is _RESPONSES,
        body=body,
        call=call,
    )


def read_google(call: str, scope: Mapping[str, Any], body: bytes, *, headers: frozenset[bytes]) -> Asked:
    """Understand a request to Gemini's API, `call` being what follows `models/`. Raises BadRequestError."""
    found = _GOOGLE.fullmatch(call)
    if found is None or ".." in call:
        raise BadRequestError(
            404, "not_found", "there is streamGenerateContent and generateContent of a model here"
        )
    _known(body)
    model, verb = found["model"], found["verb"]
    streamed = verb == "streamGenerateContent"
    query = _query(scope)
    as_events = not streamed or _says(query, "alt=sse")
    passed = _passed(scope, headers, _GEMINI, streamed=streamed)

    def make(upstream: Upstream) -> Call:
        path = (upstream.path or _GEMINI.path).replace("streamGenerateContent", verb).replace("{verb}", verb)
        name = upstream.models.get(model, model)
        return Call(path=path.replace("{model}", quote(name, safe="@")) + query, body=body, headers=passed)

    dialect = _as_whole(find("gemini" if as_events else "gemini-jsonarray"), streamed=streamed)
    return Asked(endpoint=_GEMINI, dialect=dialect, model=model, streamed=streamed, body=body, call=make)


def about(
    scope: Mapping[str, Any], method: Any, response_id: str, rest: str, *, headers: frozenset[bytes]
) -> Asked:
    """Understand a request about a response of OpenAI that was made before. Raises BadRequestError."""
    if not _ID.fullmatch(response_id):
        raise BadRequestError(404, "not_found", "that is not the id of a response")
    query = _query(scope)
    streamed = method == "GET" and not rest and _says(query, "stream=true")
    passed = _passed(scope, headers, _RESPONSES, streamed=streamed)

    def call(upstream: Upstream) -> Call:
        path = f"{upstream.path or _RESPONSES.path}/{quote(response_id, safe='')}{rest}{query}"
        return Call(method=method, path=path, headers=passed)

    dialect = _as_whole(_RESPONSES.dialect, streamed=streamed)
    return Asked(endpoint=_RESPONSES, dialect=dialect, model=None, streamed=streamed, body=b"{}", call=call)


def adapted(upstream: Upstream, asked: Asked) -> Upstream:
    """Return an upstream as it serves this endpoint, and its fallbacks with it."""
    path = upstream.path if upstream.dialect.name == asked.dialect.name else None
    if asked.endpoint is _GEMINI:
        path = upstream.path
    return attrs.evolve(
        upstream,
        dialect=asked.dialect,
        path=path,
        prefill=None,
        retry=attrs.evolve(
            upstream.retry, resume=tuple(rung for rung in upstream.retry.resume if rung == "sequence")
        ),
        fallback=tuple(adapted(fallback, asked) for fallback in upstream.fallback),
    )


def digest(scope: Mapping[str, Any], body: bytes) -> str:
    """Return what a request is known by when it is made again: its method, path, query, less a key in it, and body."""
    target = f"{scope['method']} {scope['path']!r} {_query(scope)!r}\n"  # quoted, so that no path looks like a query
    return hashlib.sha256(target.encode() + body).hexdigest()


# --- the parts of a request ------------------------------------------------------------------------------------------


def _known(body: bytes) -> _Body:
    try:
        if not body.isascii():
            body.decode()  # what is not read is not looked at, and no other program should stumble over it
        return _read_body(body)
    except (msgspec.DecodeError, UnicodeError, RecursionError) as error:
        raise BadRequestError(400, "invalid_json", f"the body is not a JSON object: {error}") from None


def _renamed(body: bytes, model: str) -> bytes:
    """Put another model into a JSON object, each other value left as it was written."""
    return msgspec.json.encode({**_read_fields(body), "model": model})


def _as_whole(dialect: Dialect, *, streamed: bool) -> Dialect:
    """Return a dialect for an answer that is one JSON value: the end of the body is its ending, whatever it says.

    Not that of an event stream that comes in its place.
    """
    if streamed:
        return dialect
    return attrs.evolve(dialect, endings=attrs.evolve(dialect.endings, clean_end="whole"))


def _query(scope: Mapping[str, Any]) -> str:
    """Return the query with its question mark, without the key that Google's API may have in it."""
    query: bytes = scope.get("query_string", b"")
    kept = b"&".join(part for part in query.split(b"&") if part and _name(part) != b"key")
    return f"?{kept.decode('latin-1')}" if kept else ""


def _says(query: str, parameter: str) -> bool:
    """Whether a query, as `_query` returns it, has a parameter with this value."""
    return parameter in query.removeprefix("?").split("&")


def _name(part: bytes) -> bytes:
    """Return the name of a query's parameter, which need not be written as it is read."""
    return unquote_to_bytes(part.partition(b"=")[0].replace(b"+", b" "))


def _passed(
    scope: Mapping[str, Any], more: frozenset[bytes], endpoint: Endpoint, *, streamed: bool
) -> Mapping[str, str]:
    """Return what is passed on of a client's headers, a character for each byte. Raises BadRequestError for one that cannot be."""
    passed = {"anthropic-version": VERSION} if endpoint.api is ANTHROPIC else {}
    if not streamed:
        passed["accept"] = "application/json"
    for name, value in scope["headers"]:
        if name in _PASSED or name in more:
            key = name.decode("latin-1")
            text = value.decode("latin-1")
            if _CONTROL.search(text):
                message = f"the header {key} has a control character in it, and cannot be passed on"
                raise BadRequestError(400, "header", message)
            passed[key] = f"{passed[key]},{text}" if key == "anthropic-beta" and key in passed else text
    return passed
