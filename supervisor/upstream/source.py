"""`HttpSource`: one request to a provider, made as often as the retry policy allows, read into a stream.

The chain from bytes to journal is one synchronous call (`BodyReader.feed`); what is here is around it: build the request,
open an exchange, read, and decide what becomes of an attempt that failed. That decision is made in one place. Whatever
ends an attempt badly (no connection, an HTTP error, a body that breaks off, an error from the provider) becomes a
`_Failure`, and only `__call__` turns that into another attempt or into the stream's ending. To that end the reader does not
write to the stream's `Output` but to a `_Attempt`, which passes everything on at once, except a failure, and an error
that comes before any event: those it keeps. Nothing is awaited between the failure and the decision.

Providers are sent a credential, and some repeat it. Everything that comes back is looked through for it before it reaches
a fault, a journal or a message: see `supervisor.upstream.veil`.
"""

from __future__ import annotations

import random
import ssl
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Final, Protocol

import attrs
import httpx
import msgspec
import trio

from supervisor.dialects import Delta, Dialect, Fault
from supervisor.dialects.reading import BodyReader
from supervisor.errors import (
    ConfigurationError,
    ConnectError,
    RemoteProtocolError,
    UpstreamClosedError,
    UpstreamError,
)
from supervisor.upstream.exchange import Exchange
from supervisor.upstream.retry import RetryPolicy, retry_after_s, should_retry
from supervisor.upstream.veil import veil_for

if TYPE_CHECKING:
    from supervisor.streams import Output
    from supervisor.streams.attempts import Rung
    from supervisor.upstream.catalog import Upstream

__all__ = ["HttpSource", "Transport"]

MAX_REQUEST_BYTES: Final = 32 << 20
"""The largest request body."""
ERROR_BODY_BYTES: Final = 64 << 10
"""How much of an error response is read."""
ERROR_BODY_S: Final = 5.0
"""How long the body of an error response is waited for, in seconds: its status is known already."""

_CAUSE_CHARS: Final = 500


class Transport(Protocol):
    """What a source needs of `StreamTransport`."""

    async def open(self, request: httpx.Request, *, on_sent: Callable[[], None] | None = None) -> Exchange:
        """Send a request, call `on_sent` when all of it is sent, return when the response's head is there."""
        ...


@attrs.frozen
class _Failure:
    """How an attempt failed: what the stream's outcome will say, unless there is another attempt."""

    reason: str
    fault: Fault
    again: bool
    """Whether another attempt may help."""
    event: tuple[bytes, str, tuple[Delta, ...]] | None = None
    """The upstream's event that told it, where it was the first: for the journal, if it is the ending."""


class HttpSource:
    """A source that posts one request to an upstream and reads its stream.

    upstream: where and how. request: the JSON object to post, or its bytes; `"stream": true` is put in where it is
    missing. transport: shared by all streams. retry: in place of the upstream's policy.

    Attempts are repeated only before the first event. Cancelled, it closes its connection at once, in whatever phase.
    Raises ConfigurationError for a request that is no JSON object, is too large, or says `"stream": false`, and for a
    credential that is missing: it is looked for here, and read again for each attempt.
    """

    __slots__ = ("_body", "_draw", "_retry", "_transport", "_upstream", "dialect", "upstream")

    def __init__(
        self,
        upstream: Upstream,
        request: Mapping[str, Any] | bytes,
        *,
        transport: Transport,
        retry: RetryPolicy | None = None,
        draw: Callable[[], float] = random.random,
    ) -> None:
        self._upstream = upstream
        self._body = _streaming_body(request)
        self._transport = transport
        self._retry = upstream.retry if retry is None else retry
        self._draw = draw
        self.dialect: Dialect = upstream.dialect
        self.upstream: str = upstream.name
        self._credential()

    def __repr__(self) -> str:
        return f"<HttpSource {self._upstream.name}: {len(self._body)} bytes to {self._upstream.url}>"

    async def __call__(self, out: Output, /) -> None:
        """Make attempts until the stream is sealed. The stream's clocks bound all that is waited for here."""
        number, cause, delay_s = 1, None, 0.0
        while True:
            rung: Rung | None = None if number == 1 else "retry"
            out.attempt(number, cause=cause, delay_s=round(delay_s, 3), rung=rung, upstream=self.upstream)
            failure = await self._attempt(out)
            if failure is None or out.sealed:
                return
            again = self._retry.delay_s(number, asked_s=failure.fault.retry_after_s, draw=self._draw)
            if not failure.again or again is None:
                if failure.event is not None:
                    out.append(*failure.event)
                out.fail(failure.reason, _counted(failure.fault, number))
                return
            cause, delay_s = f"{failure.reason}: {failure.fault.message}"[:_CAUSE_CHARS], again
            out.waiting()
            await trio.sleep(delay_s)
            number += 1

    # --- one attempt -------------------------------------------------------------------------------------------------

    async def _attempt(self, out: Output) -> _Failure | None:
        """Make one attempt. None: the stream is sealed."""
        secret, request = self._request()
        attempt = _Attempt(out, secret, self.dialect)
        try:
            exchange = await self._transport.open(request, on_sent=attempt.sent)
        except UpstreamError as exc:
            return attempt.hide(_not_opened(exc))
        if not attempt.connected:  # an answer that came before the whole request was sent
            attempt.sent()
        out.on_abort(exchange.abort)
        try:
            if 200 <= exchange.status < 300:
                return await self._read(exchange, attempt)
            return attempt.hide(await self._refused(exchange))
        except trio.ClosedResourceError:
            # The seal closed the exchange while this task was about to run: no cancel was delivered to it.
            if not out.sealed:
                raise
            return None
        finally:
            out.on_abort(None)
            exchange.abort()  # of no effect after the aclose of an exchange that ended well

    async def _read(self, exchange: Exchange, attempt: _Attempt) -> _Failure | None:
        encoding = exchange.headers.get("content-encoding", "identity").strip().lower()
        if encoding not in ("", "identity"):
            message = f"the response is encoded as {encoding[:40]!r}, though only identity was asked for"
            return attempt.hide(_Failure("protocol", Fault(kind="protocol", message=message), again=False))
        out = attempt.out
        reader = BodyReader(
            self.dialect,
            attempt,
            content_type=exchange.headers.get("content-type"),
            max_line_bytes=out.max_event_bytes,  # an event is most often one line
            max_event_bytes=out.max_event_bytes,
        )
        broken: RemoteProtocolError | None = None
        while not attempt.sealed:
            try:
                data = await exchange.receive()
            except UpstreamClosedError as exc:
                reader.end(clean=False, cause=str(exc))
                break
            except RemoteProtocolError as exc:
                broken = exc
                reader.end(clean=False, cause=str(exc))
                break
            if not data:
                reader.end(clean=True)
                break
            reader.feed(data)
            out.flush()
            if out.congested:
                await out.flow()
        if reader.terminal or exchange.at_end:
            await exchange.aclose()
        if attempt.failed is None:
            return None
        reason, fault = attempt.failed
        if broken is not None and reason == "truncated":
            reason, fault = "protocol", Fault(kind="protocol", message=str(broken))
        again = not attempt.begun and (
            reason == "truncated" or (reason == "provider_error" and fault.temporary)
        )
        return attempt.hide(_Failure(reason, fault, again, attempt.told))

    async def _refused(self, exchange: Exchange) -> _Failure:
        """Read an HTTP error."""
        status, headers = exchange.status, exchange.headers
        if status in (301, 302, 303, 307, 308):
            message = (
                f"the upstream redirects (HTTP {status}) to {_place(headers.get('location', ''))}; redirects are not "
                f"followed, as they would take the request and its credential elsewhere: correct the base_url"
            )
            return _Failure(
                "http_status", Fault(kind="invalid_request", message=message, status=status), again=False
            )
        body = bytearray()
        with trio.move_on_after(ERROR_BODY_S):
            try:
                while len(body) < ERROR_BODY_BYTES and (data := await exchange.receive()):
                    body += data
            except UpstreamError:
                pass  # the status stands, with as much of the message as has come
        if exchange.at_end:
            await exchange.aclose()
        if headers.get("content-encoding", "identity").strip().lower() not in ("", "identity"):
            body.clear()
        fault = self.dialect.fault(status, bytes(body[:ERROR_BODY_BYTES]))
        if (asked := retry_after_s(headers)) is not None:
            fault = msgspec.structs.replace(fault, retry_after_s=asked)
        return _Failure("http_status", fault, should_retry(self._retry, status, fault, headers))

    def _request(self) -> tuple[str, httpx.Request]:
        upstream = self._upstream
        secret = self._credential()
        headers = httpx.Headers(
            {
                "Content-Type": "application/json",
                "Accept": "text/event-stream",
                "Accept-Encoding": "identity",
                "User-Agent": "stream-supervisor",
            }
        )
        headers.update(upstream.headers)
        if upstream.credential is not None:
            name, value = upstream.credential.header_for(secret)
            headers[name] = value
        extensions: dict[str, Any] = {}
        if upstream.proxy is not None:
            extensions["proxy"] = None if upstream.proxy == "direct" else upstream.proxy
        return secret, httpx.Request(
            "POST", upstream.url, headers=headers, content=self._body, extensions=extensions
        )

    def _credential(self) -> str:
        credential = self._upstream.credential
        return "" if credential is None else credential.secret()


class _Attempt:
    """The sink of one attempt: passes on everything but failures, and lets no credential through."""

    __slots__ = ("_dialect", "_veil", "begun", "connected", "failed", "out", "told")

    def __init__(self, out: Output, secret: str, dialect: Dialect) -> None:
        self.out = out
        self._dialect = dialect
        self.failed: tuple[str, Fault] | None = None
        self.connected = False
        self.begun = False
        """Whether anything of this attempt is in the journal."""
        self.told: tuple[bytes, str, tuple[Delta, ...]] | None = None
        self._veil = veil_for(secret, out.max_event_bytes)

    @property
    def sealed(self) -> bool:
        return self.failed is not None or self.out.sealed

    def sent(self) -> None:
        self.connected = True
        self.out.connected()

    def append(self, payload: bytes, name: str, deltas: tuple[Delta, ...]) -> None:
        veil = self._veil
        if veil is not None and veil.needed(payload, name, deltas):
            payload, name, deltas = veil.event(payload, name, deltas, self._dialect)
        if not self.begun:
            if any(delta.fault is not None for delta in deltas):
                self.told = (payload, name, deltas)
                return
            self.begun = True
        self.out.append(payload, name, deltas)

    def skip(self, payload: bytes, why: str) -> None:
        self.begun = True
        veil = self._veil
        if veil is not None:
            payload, why = veil.payload(payload), veil.shortened(why)
        self.out.skip(payload, why)

    def touch(self) -> None:
        self.out.touch()

    def mark(self, reason: str | None) -> None:
        self.out.mark(reason if reason is None else self._hidden(reason))

    def complete(self, reason: str) -> bool:
        return self.out.complete(self._hidden(reason))

    def fail(self, reason: str, fault: Fault) -> bool:
        self.failed = (reason, fault)
        return True

    def hide(self, failure: _Failure) -> _Failure:
        """Return a failure without the credential."""
        return failure if self._veil is None else attrs.evolve(failure, fault=self._veil.fault(failure.fault))

    def _hidden(self, reason: str) -> str:
        return reason if self._veil is None else self._veil.shortened(reason)


def _not_opened(exc: UpstreamError) -> _Failure:
    fault = Fault(kind="network", message=str(exc), temporary=True)
    if isinstance(exc, ConnectError):
        if _distrusted(exc):
            return _Failure("connect", msgspec.structs.replace(fault, temporary=False), again=False)
        return _Failure("connect", fault, again=True)
    if isinstance(exc, UpstreamClosedError):
        return _Failure("truncated", fault, again=True)
    return _Failure("protocol", Fault(kind="protocol", message=str(exc)), again=False)


def _distrusted(exc: BaseException | None) -> bool:
    """Say whether a connection was refused by us, for its certificate: trying again changes nothing."""
    while exc is not None:
        if isinstance(exc, ssl.SSLCertVerificationError):
            return True
        exc = exc.__cause__
    return False


def _counted(fault: Fault, attempts: int) -> Fault:
    if attempts == 1:
        return fault
    return msgspec.structs.replace(fault, message=f"{fault.message} (after {attempts} attempts)")


def _place(location: str) -> str:
    """Return scheme and host of a URL: the rest of it may hold secrets."""
    try:
        url = httpx.URL(location)
    except httpx.InvalidURL:
        return "an invalid address"
    if not url.host:
        return "another path on the same host"
    return f"{url.scheme or 'https'}://{url.host}"


def _streaming_body(request: Mapping[str, Any] | bytes) -> bytes:
    """Return the body to post, with `"stream": true` in it."""
    given = request if isinstance(request, bytes) else None
    if given is not None:
        try:
            request = msgspec.json.decode(given, type=dict[str, Any])
        except (msgspec.DecodeError, RecursionError):
            raise ConfigurationError("request", f"({len(given)} bytes)", "a JSON object") from None
    if not isinstance(request, Mapping):
        raise ConfigurationError("request", type(request), "a JSON object: a mapping, or its bytes")
    stream = request.get("stream")
    if stream not in (None, True):
        raise ConfigurationError("request.stream", stream, "true, or nothing: a supervised stream is one")
    if given is not None and stream is True:
        body = given
    else:
        try:
            body = msgspec.json.encode({**request, "stream": True})
        except (TypeError, ValueError, RecursionError) as exc:
            raise ConfigurationError("request", f"({type(exc).__name__})", f"JSON values: {exc}") from None
    if len(body) > MAX_REQUEST_BYTES:
        raise ConfigurationError("request", f"({len(body)} bytes)", f"at most {MAX_REQUEST_BYTES} bytes")
    return body
