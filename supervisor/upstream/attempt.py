"""One attempt: one connection to an upstream, read into a stream until the answer, the body or the connection ends.

Whatever ends an attempt badly (no connection, an HTTP error, a body that breaks off, an error from the provider) becomes a
`Failure`, which it returns. To that end the reader does not write to the stream's `Output` but to the attempt, which passes
everything on at once, except a failure, and an error that comes before any event: those it keeps. Nothing is awaited between
the failure and the return, so that nothing can come between the failure and the decision on it.

Providers are sent a credential, and some repeat it. Everything that comes back is looked through for it before it reaches
a fault, a journal or a message: see `supervisor.upstream.veil`.
"""

from __future__ import annotations

import ssl
from collections.abc import Callable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any, Final, Literal, Protocol

import attrs
import httpx
import msgspec
import trio

from supervisor.dialects import Call, Delta, Fault, Reader
from supervisor.dialects.reading import BodyReader
from supervisor.errors import ConnectError, RemoteProtocolError, UpstreamClosedError, UpstreamError
from supervisor.upstream.exchange import Exchange
from supervisor.upstream.ladder import Failure
from supervisor.upstream.retry import RetryPolicy, retry_after_s, should_retry
from supervisor.upstream.veil import Veil, veil_for

if TYPE_CHECKING:
    from supervisor.streams import Output
    from supervisor.upstream.catalog import Upstream

__all__ = ["Answered", "Attempt", "Transport", "ask", "make_request"]

ERROR_BODY_BYTES: Final = 64 << 10
"""How much of an error response is read."""
ERROR_BODY_S: Final = 5.0
"""How long the body of an error response is waited for, in seconds: its status is known already."""
MAX_REDIRECTS: Final = 5
"""How many redirects one attempt follows."""

_REDIRECTS: Final = frozenset({301, 302, 303, 307, 308})
_NO_STREAM: Final = frozenset({204, 205})
_ACCEPT: Final[Mapping[str, str]] = {
    "sse": "text/event-stream",
    "ndjson": "application/x-ndjson",
    "json-array": "application/json",
}


class Transport(Protocol):
    """What a source needs of `StreamTransport`."""

    async def open(self, request: httpx.Request, *, on_sent: Callable[[], None] | None = None) -> Exchange:
        """Send a request, call `on_sent` when all of it is sent, return when the response's head is there."""
        ...


@attrs.frozen(kw_only=True)
class Answered:
    """How an upstream answered, without the credential that it may have repeated."""

    upstream: str
    status: int
    headers: Mapping[str, str]
    """By their names in lower case; of several of one name, all in one."""
    body: bytes = b""
    """Of an error, or of what is no stream: as much of it as was read."""
    framing: Literal["sse", "ndjson", "json-array", "json"] | None = None
    """How the events of a stream are framed."""


class Attempt:
    """One attempt, and the sink of its reader. `run` makes it; what it has learned is there afterwards.

    policy: which statuses are worth another attempt. ends: the HTTP statuses that say there is nothing more. reader and last_event_id: to
    read on where an earlier attempt of the same response stopped. on_answered: told of an HTTP error, and of a stream before its
    first event is added.
    """

    __slots__ = (
        "_ends",
        "_first_event_id",
        "_headers",
        "_last_event_id",
        "_policy",
        "_transport",
        "_upstream",
        "_veil",
        "append",
        "begun",
        "body",
        "connected",
        "failed",
        "on_answered",
        "on_begun",
        "out",
        "reader",
        "told",
    )

    def __init__(
        self,
        out: Output,
        upstream: Upstream,
        *,
        transport: Transport,
        policy: RetryPolicy,
        ends: frozenset[int] = frozenset(),
        reader: Reader | None = None,
        last_event_id: str = "",
        first_event_id: str = "",
        on_begun: Callable[[], None] | None = None,
        on_answered: Callable[[Answered], None] | None = None,
    ) -> None:
        self.out = out
        self._upstream = upstream
        self._transport = transport
        self._policy = policy
        self._ends = ends
        self._veil = veil_for("", out.max_event_bytes)
        self.reader = upstream.dialect.reader() if reader is None else reader
        self._last_event_id = last_event_id
        self._first_event_id = first_event_id
        self.on_begun = on_begun
        """Called when the first event has come."""
        self.on_answered = on_answered
        self._headers: tuple[int, Mapping[str, str]] = (0, {})
        self.append: Callable[[bytes, str, tuple[Delta, ...]], bool | None] = self._append
        """Takes one wire event: once the answer has begun and there is no credential to look for, the stream's output itself."""
        self.failed: tuple[str, Fault] | None = None
        self.connected = False
        self.begun = False
        """Whether anything of this attempt is in the journal."""
        self.told: tuple[bytes, str, tuple[Delta, ...]] | None = None
        self.body: BodyReader | None = None

    def __repr__(self) -> str:
        return f"<Attempt at {self._upstream.name}{', begun' if self.begun else ''}>"

    async def run(self, call: Call | bytes) -> Failure | None:
        """Make the attempt. None: the stream is sealed."""
        secret = self._upstream.secret()
        self._veil = veil_for(secret, self.out.max_event_bytes)
        request = make_request(self._upstream, call, secret)
        for _ in range(MAX_REDIRECTS + 1):
            answered = await self._exchange(request)
            if not isinstance(answered, httpx.Request):
                break
            request = answered
        else:
            fault = Fault(kind="protocol", message=f"the upstream redirects more than {MAX_REDIRECTS} times")
            answered = Failure("http_status", fault, again=False)
        if answered is None:
            return None
        failure = answered
        if self._veil is not None:
            failure = attrs.evolve(failure, fault=self._veil.fault(failure.fault))
        return failure

    def let_go(self) -> BodyReader | None:
        """Be over, and return the reader of the body, if there was one.

        Nothing of it refers back to it any more: thousands of ended streams are then freed one by one as they are let go of, and not
        all together by a full garbage collection, which stops everybody.
        """
        body, self.body = self.body, None
        self.on_begun = self.on_answered = None
        self.append = self.out.append
        return body

    async def _exchange(self, request: httpx.Request) -> Failure | httpx.Request | None:
        try:
            exchange = await self._transport.open(request, on_sent=self._sent)
        except UpstreamError as exc:
            return _not_opened(exc)
        if not self.connected:  # an answer that came before the whole request was sent
            self._sent()
        out = self.out
        out.on_abort(exchange.abort)
        try:
            if exchange.status in self._ends:
                return self._nothing_more(exchange.status)
            if 200 <= exchange.status < 300 and exchange.status not in _NO_STREAM:
                return await self._read(exchange, request.content)
            if exchange.status in _REDIRECTS:
                return self._redirected(request, exchange)
            return await self._refused(exchange)
        except trio.ClosedResourceError:
            # The seal closed the exchange while this task was about to run: no cancel was delivered to it.
            if not out.sealed:
                raise
            return None
        finally:
            out.on_abort(None)
            exchange.abort()  # of no effect after the aclose of an exchange that ended well

    async def _read(self, exchange: Exchange, sent: bytes) -> Failure | None:
        message = _encoded(exchange.headers)
        if message is not None:
            return Failure("protocol", Fault(kind="protocol", message=message), again=False)
        out = self.out
        self._headers = exchange.status, exchange.headers
        choices = self._upstream.dialect.asking.choices
        reader = self.body = BodyReader(
            self._upstream.dialect,
            self,
            content_type=exchange.headers.get("content-type"),
            max_unparseable=self._upstream.max_unparseable,
            max_line_bytes=out.max_event_bytes,  # an event is most often one line
            max_event_bytes=out.max_event_bytes,
            reader=self.reader,
            last_event_id=self._last_event_id,
            first_event_id=self._first_event_id,
            choices=None if choices is None else partial(choices, sent),
        )

        def take(data: bytes) -> bool:
            reader.feed(data)
            return out.flush() and self.failed is None

        broken: str | None = None
        while not self.sealed:
            try:
                more = await exchange.pump(take)
            except UpstreamClosedError as exc:
                reader.end(clean=False, cause=str(exc))
                break
            except RemoteProtocolError as exc:
                broken = str(exc)  # not the exception, which knows this frame
                reader.end(clean=False, cause=broken)
                break
            if not more:
                reader.end(clean=True)
                break
            if out.congested and not self.sealed:
                await out.flow()
        if reader.terminal or exchange.at_end:
            await exchange.aclose()
        if self.failed is None:
            return None
        reason, fault = self.failed
        if broken is not None and reason == "truncated":
            reason, fault = "protocol", Fault(kind="protocol", message=broken)
        again = (
            reason == "truncated"
            or (reason == "provider_error" and fault.temporary)
            or reader.skipped > self._upstream.max_unparseable  # garbled, which need not happen again
        )
        return Failure(reason, fault, again, self.told, self.begun)

    def _nothing_more(self, status: int) -> Failure | None:
        """Act on a status that answers a resume with: there is nothing more."""
        if self._last_event_id:  # nothing after the last event: then that was the last of the answer
            self.out.complete(self.out.answer.finish_reason or "done")
            return None
        message = f"the upstream has nothing more (HTTP {status}), and the answer had no end marker"
        return Failure("truncated", Fault(kind="truncated", message=message, status=status), again=False)

    def _redirected(self, request: httpx.Request, exchange: Exchange) -> Failure | httpx.Request:
        """Follow a redirect of a GET where the credential goes nowhere else; refuse any other."""
        location = exchange.headers.get("location", "")
        try:
            url = request.url.join(location) if location else None
        except httpx.InvalidURL:
            url = None
        origin = (request.url.scheme, request.url.host, request.url.port)
        if url is not None and request.method == "GET" and (url.scheme, url.host, url.port) == origin:
            return httpx.Request("GET", url, headers=request.headers, extensions=request.extensions)
        message = (
            f"the upstream redirects (HTTP {exchange.status}) to {_place(location)}; only a GET is redirected, and only on "
            f"the same host, as anything else would take the request and its credential elsewhere: correct the base_url"
        )
        fault = Fault(kind="invalid_request", message=message, status=exchange.status)
        return Failure("http_status", fault, again=False)

    async def _refused(self, exchange: Exchange) -> Failure:
        """Read an HTTP error."""
        status, headers = exchange.status, exchange.headers
        if status in _NO_STREAM:
            fault = Fault(
                kind="protocol", message=f"the upstream answered HTTP {status}: no stream", status=status
            )
            return Failure("http_status", fault, again=False)
        body = bytearray()
        with trio.move_on_after(ERROR_BODY_S):
            try:
                while len(body) < ERROR_BODY_BYTES and (data := await exchange.receive()):
                    body += data
            except UpstreamError:
                pass  # the status stands, with as much of the message as has come
        if exchange.at_end:
            await exchange.aclose()
        if _encoded(headers) is not None:
            body.clear()
        told = bytes(body[:ERROR_BODY_BYTES])
        if self.on_answered is not None:
            self.on_answered(_answered(self._upstream, status, headers, self._veil, body=told))
        fault = self._upstream.dialect.fault(status, told)
        if (asked := retry_after_s(headers)) is not None:
            fault = msgspec.structs.replace(fault, retry_after_s=asked)
        return Failure("http_status", fault, should_retry(self._policy, status, fault, headers))

    def _sent(self) -> None:
        self.connected = True
        self.out.connected()

    # --- the sink of the reader --------------------------------------------------------------------------------------

    @property
    def sealed(self) -> bool:
        """Whether nothing more is to be read: the attempt has failed, or the stream is sealed."""
        return self.failed is not None or self.out.sealed

    def _append(self, payload: bytes, name: str, deltas: tuple[Delta, ...]) -> None:
        veil = self._veil
        if veil is not None and veil.needed(payload, name, deltas):
            payload, name, deltas = veil.event(payload, name, deltas, self._upstream.dialect)
        if not self.begun:
            if any(delta.fault is not None for delta in deltas):
                self._tell()
                self.told = (payload, name, deltas)
                return
            self._begin()
        self.out.append(payload, name, deltas)

    def skip(self, payload: bytes, why: str, name: str = "") -> None:
        """Take an event that could not be read."""
        if not self.begun:
            self._begin()
        veil = self._veil
        if veil is not None:
            payload, why, name = veil.payload(payload), veil.shortened(why), veil.shortened(name)
        self.out.skip(payload, why, name)

    def touch(self) -> None:
        """Learn that the upstream is alive."""
        self.out.touch()

    def mark(self, reason: str | None) -> None:
        """Learn that the answer has ended as far as seen, or (None) that it has not."""
        self.out.mark(reason if reason is None else self._hidden(reason))

    def complete(self, reason: str) -> bool:
        """Seal the stream as completed."""
        return self.out.complete(self._hidden(reason))

    def fail(self, reason: str, fault: Fault) -> bool:
        """Keep a failure for whoever made the attempt."""
        self.failed = (reason, fault)
        return True

    def _tell(self) -> None:
        if self.on_answered is not None and self.body is not None:
            framing = self.body.framing
            self.on_answered(_answered(self._upstream, *self._headers, self._veil, framing=framing))

    def _begin(self) -> None:
        self._tell()
        self.begun = True
        if self._veil is None:
            self.append = self.out.append
        if self.on_begun is not None:
            self.on_begun()

    def _hidden(self, reason: str) -> str:
        return reason if self._veil is None else self._veil.shortened(reason)


# --- requests --------------------------------------------------------------------------------------------------------


def make_request(upstream: Upstream, call: Call | bytes, secret: str) -> httpx.Request:
    """Return the HTTP request for a call; bytes are a body to post to the upstream's path."""
    method, body, url = "POST", call if isinstance(call, bytes) else b"", upstream.url
    headers = httpx.Headers(
        {
            "Accept": _ACCEPT.get(upstream.dialect.framing, "*/*"),
            "Accept-Encoding": "identity",
            "User-Agent": "stream-supervisor",
        }
    )
    if isinstance(call, Call):
        method, url = call.method, upstream.base_url.rstrip("/") + call.path
        headers.update(httpx.Headers(dict(call.headers), encoding="latin-1"))  # a character is a byte
        given = call.body
        body = given if isinstance(given, bytes) else b"" if given is None else msgspec.json.encode(given)
    if method == "POST":
        headers["Content-Type"] = "application/json"
    headers.update(upstream.headers)
    if upstream.credential is not None:
        name, value = upstream.credential.header_for(secret, default=upstream.dialect.asking.key_header)
        headers[name] = value
    extensions: dict[str, Any] = {}
    if upstream.proxy is not None:
        extensions["proxy"] = None if upstream.proxy == "direct" else upstream.proxy
    return httpx.Request(
        method, url, headers=headers, content=body if method == "POST" else None, extensions=extensions
    )


async def ask(transport: Transport, upstream: Upstream, call: Call, *, max_bytes: int) -> Answered:
    """Make a request that is no stream; return the answer with all of its body.

    Raises UpstreamError, also for a body that does not end as it should, is larger than `max_bytes`, or is encoded.
    """
    secret = upstream.secret()
    exchange = await transport.open(make_request(upstream, call, secret))
    try:
        if (message := _encoded(exchange.headers)) is not None:
            raise RemoteProtocolError(message)
        body = bytearray()
        while data := await exchange.receive():
            body += data
            if len(body) > max_bytes:
                raise RemoteProtocolError(f"the answer is larger than {max_bytes} bytes")
        if exchange.at_end:
            await exchange.aclose()
        veil = veil_for(secret, max_bytes)
        return _answered(upstream, exchange.status, exchange.headers, veil, body=bytes(body))
    finally:
        exchange.abort()  # of no effect after the aclose of an exchange that ended well


def _encoded(headers: Mapping[str, str]) -> str | None:
    """Return what is wrong with a body that is encoded, though that was not asked for; None of one that is as it is."""
    encoding = headers.get("content-encoding", "identity").strip().lower()
    if encoding in ("", "identity"):
        return None
    return f"the response is encoded as {encoding[:40]!r}, though only identity was asked for"


def _answered(
    upstream: Upstream,
    status: int,
    headers: Mapping[str, str],
    veil: Veil | None,
    *,
    body: bytes = b"",
    framing: Literal["sse", "ndjson", "json-array", "json"] | None = None,
) -> Answered:
    if veil is not None:
        body = veil.payload(body)
        headers = {name: veil.shortened(value) for name, value in headers.items()}
    return Answered(upstream=upstream.name, status=status, headers=dict(headers), body=body, framing=framing)


# --- failures --------------------------------------------------------------------------------------------------------


def _not_opened(exc: UpstreamError) -> Failure:
    fault = Fault(kind="network", message=str(exc), temporary=True)
    if isinstance(exc, ConnectError):
        if _distrusted(exc):
            return Failure("connect", msgspec.structs.replace(fault, temporary=False), again=False)
        return Failure("connect", fault, again=True)
    if isinstance(exc, UpstreamClosedError):
        return Failure("truncated", fault, again=True)
    return Failure("protocol", Fault(kind="protocol", message=str(exc)), again=False)


def _distrusted(exc: BaseException | None) -> bool:
    """Say whether a connection was refused by us, for its certificate: trying again changes nothing."""
    while exc is not None:
        if isinstance(exc, ssl.SSLCertVerificationError):
            return True
        exc = exc.__cause__
    return False


def _place(location: str) -> str:
    """Return scheme and host of a URL: the rest of it may hold secrets."""
    if not location:
        return "nowhere (its Location is empty or missing)"
    try:
        url = httpx.URL(location)
    except httpx.InvalidURL:
        return "an invalid address"
    if not url.host:
        return "another path on the same host"
    return f"{url.scheme or 'https'}://{url.host}"
