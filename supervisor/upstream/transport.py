"""An httpx transport for streams: HTTP/1.1 on trio, one connection per stream.

Why not httpx's own: its one pool rescans itself for every request, leaks slots when starts are cancelled while queued,
and shields its close without a bound. Here there is no queue (admission is the supervisor's business) and nothing shared
but the idle connections, so no request costs in proportion to the number of others.

Cancellation
    In every phase (resolving, connecting, shaking hands, sending, waiting for the head, reading) a cancel closes the
    socket in the step in which it is delivered, without waiting for anything.

Reuse, and the race it brings
    A server may close an idle connection just as a request is being written to it. The check before reuse cannot see
    what is still on its way. Then the connection ends before a single byte of response, and the request is sent once more,
    on a fresh connection, without the caller noticing; its body is bytes, so it can be. For a POST this is a judgement: in
    theory the server may have acted on the request before it closed. Browsers and curl accept that, Go and urllib3 do not
    for POST. We accept it only where a closed idle connection is the likely story: the connection was a reused one,
    nothing at all came back, and it ended while the request was being sent or within `RACE_S` seconds after. A provider that
    has been computing silently for longer than that, and then closes, is reported (UpstreamClosedError, `sent=True`), so
    that a retry is the caller's visible decision.

Requests
    The body is read into memory before anything is sent. 101, `Expect` and trailers of requests are not supported.
    Beside httpx's `timeout` and `sni_hostname` extensions there is `proxy`: a proxy URL for this request, or None for a
    direct connection, in place of the transport's.
"""

from __future__ import annotations

import contextlib
import math
import os
import re
import ssl
from collections.abc import Callable, Iterator

import attrs
import httpx
import trio

from supervisor.errors import (
    ConfigurationError,
    ConnectError,
    RemoteProtocolError,
    UpstreamClosedError,
    UpstreamError,
)
from supervisor.upstream.connection import Connection, Counters, Origin, connect
from supervisor.upstream.exchange import Exchange
from supervisor.upstream.head import HeadReader, ResponseHead, checked_headers, tokens, write_head
from supervisor.upstream.names import Names
from supervisor.upstream.pool import IdlePool
from supervisor.upstream.proxy import EnvironmentProxies, Proxy
from supervisor.upstream.shared import SharedReader, shared_reading_works
from supervisor.upstream.tls import Sessions, shared_context
from supervisor.wire.http1 import framing_for

__all__ = ["Exchange", "StreamTransport", "TransportStatistics"]

RACE_S = 1.0
"""How long after a request was sent an ending without a byte of response still counts as the server's idle timeout."""

_PORTS = {"http": 80, "https": 443}
_JOINED_BYTES = 1 << 16
_KEEP_ALIVE_TIMEOUT = re.compile(rb"(?i)(?:^|[\s,;])timeout=(\d{1,6})")


@attrs.frozen(kw_only=True)
class TransportStatistics:
    """A transport's figures at one moment."""

    open: int
    """Connections open now, busy and idle."""
    idle: int
    """Connections waiting to be used again."""
    opened: int
    """TCP connections made since the start."""
    resumed: int
    """TLS handshakes that took up an earlier session."""
    reused: int
    """Requests sent on a connection that had carried another."""
    retried: int
    """Reused connections that turned out to be closed, their request sent again on a fresh one."""
    aborted: int
    """Requests whose connection was closed before their response was complete: cancels, errors, truncations."""


@attrs.frozen(kw_only=True)
class _Timeouts:
    """httpx's timeouts in seconds; infinite for `open`, whose callers have clocks of their own."""

    connect: float = math.inf
    read: float = math.inf
    write: float = math.inf

    @classmethod
    def of(cls, request: httpx.Request) -> _Timeouts:
        given = request.extensions.get("timeout") or {}
        return cls(
            **{
                name: math.inf if given.get(name) is None else float(given[name])
                for name in ("connect", "read", "write")
            }
        )


_NO_TIMEOUTS = _Timeouts()


@attrs.frozen(kw_only=True)
class _Prepared:
    """A request, checked, as it will be written; any number of times."""

    method: bytes
    target: bytes
    headers: tuple[tuple[bytes, bytes], ...] = attrs.field(repr=False)
    body: bytes = attrs.field(repr=False)
    max_head_bytes: int

    def write(self) -> tuple[bytes, HeadReader]:
        return write_head(self.method, self.target, self.headers, max_head_bytes=self.max_head_bytes)


class _StaleError(Exception):
    """A reused connection had been closed by the server: nothing came back."""


class StreamTransport(httpx.AsyncBaseTransport):
    """HTTP/1.1 for streams. Give it to `httpx.AsyncClient(transport=…)`, or call `open` for the bare exchange.

    ssl_context: for https; by default the process's shared one (certifi's roots, verification on). A context of the
      caller's is used as it is.
    max_head_bytes: bound of a response's head, 1xx responses included.
    max_idle_connections, idle_s: how many connections are kept for reuse, and each for how long, in seconds; less where
      the server's `Keep-Alive: timeout=` says so. 0 connections: no reuse.
    names_s: how long the addresses of a name are used before it is asked for again, in seconds; 0: each time.
    drain_s: how long `Exchange.aclose` may wait for the end of a body, in seconds.
    read_bytes: the most that one read of a socket returns.
    shared_reader: whether one task reads the bodies of all exchanges that are pumped; None: where the platform can.
    proxy, trust_env: see `supervisor.upstream.proxy`. With an explicit proxy the environment is not looked at.

    Raises ConfigurationError naming the option for a value it cannot have.
    """

    def __init__(
        self,
        *,
        ssl_context: ssl.SSLContext | None = None,
        max_head_bytes: int = 64 << 10,
        max_idle_connections: int = 100,
        idle_s: float = 30.0,
        names_s: float = 5.0,
        drain_s: float = 0.05,
        read_bytes: int = 64 << 10,
        proxy: str | None = None,
        trust_env: bool = True,
        shared_reader: bool | None = None,
    ) -> None:
        for name, value, least in (
            ("max_head_bytes", max_head_bytes, 256),
            ("max_idle_connections", max_idle_connections, 0),
            ("idle_s", idle_s, 0),
            ("names_s", names_s, 0),
            ("drain_s", drain_s, 0),
            ("read_bytes", read_bytes, 1),
        ):
            if not value >= least:
                raise ConfigurationError(name, value, f"{least} or more")
        if read_bytes > 1 << 20:
            raise ConfigurationError("read_bytes", read_bytes, "at most 1048576")
        self._ssl_context = ssl_context
        self._max_head_bytes = max_head_bytes
        self._drain_s = drain_s
        self._read_bytes = read_bytes
        self._proxy = None if proxy is None else Proxy.parse(proxy)
        self._environment = EnvironmentProxies(os.environ) if trust_env and proxy is None else None
        self._sessions = Sessions()
        self._names = Names(keep_s=names_s)
        self._pool = IdlePool(max_count=max_idle_connections, max_age_s=idle_s)
        self._counters = Counters()
        if shared_reader and not shared_reading_works():
            raise ConfigurationError(
                "shared_reader", shared_reader, "False: this platform has neither epoll nor kqueue"
            )
        wanted = shared_reading_works() if shared_reader is None else shared_reader
        self._reader = SharedReader(read_bytes=read_bytes) if wanted else None
        self._closed = False

    def __repr__(self) -> str:
        state = "closed" if self._closed else "open"
        via = "" if self._proxy is None else f" proxy={self._proxy}"
        busy = self._counters.open - len(self._pool)
        return f"<StreamTransport {state}: {busy} busy, {len(self._pool)} idle{via}>"

    @property
    def idle(self) -> IdlePool:
        """The connections kept for reuse, for a memory manager: see `supervisor.streams.Holder`."""
        return self._pool

    def statistics(self) -> TransportStatistics:
        """Return the figures of this moment."""
        return TransportStatistics(idle=len(self._pool), **attrs.asdict(self._counters))

    async def aclose(self) -> None:
        """Close the idle connections and keep no more. Exchanges under way are left to their owners. Does not wait."""
        self._closed = True
        self._pool.close()
        if self._reader is not None:
            self._reader.retire()

    async def open(self, request: httpx.Request, *, on_sent: Callable[[], None] | None = None) -> Exchange:
        """Send a request and return the exchange once the response's head has arrived, whatever its status.

        `on_sent` is called once all of the request is sent, so that the caller can go over from its clock for connecting
        to the one for the answer; a second time if a stale connection had to be replaced; not at all if the upstream
        answered before it had read everything.

        No clock runs here: callers bring their own cancel scope. A cancel closes the socket at once. Raises ConnectError
        (nothing was sent), UpstreamClosedError (`sent` tells whether the whole request was), RemoteProtocolError,
        ConfigurationError for a request that HTTP/1.1 cannot carry (no message shows a header's value, a query or
        credentials), and trio.ClosedResourceError after `aclose`.
        """
        return await self._open(request, _NO_TIMEOUTS, on_sent)

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        """Send a request for an `httpx.AsyncClient`, with httpx's timeouts and httpx's exceptions."""
        timeouts = _Timeouts.of(request)
        try:
            exchange = await self._open(request, timeouts)
        except (UpstreamError, ConfigurationError) as exc:
            raise _as_httpx(exc) from exc
        return httpx.Response(
            exchange.status,
            headers=exchange.headers,
            stream=_Body(exchange, timeouts.read),
            extensions={"http_version": b"HTTP/" + exchange.http_version, "reason_phrase": exchange.reason},
        )

    # --- one request -------------------------------------------------------------------------------------------------

    async def _open(
        self, request: httpx.Request, timeouts: _Timeouts, on_sent: Callable[[], None] | None = None
    ) -> Exchange:
        if self._closed:
            raise trio.ClosedResourceError("this transport was closed")
        origin = self._origin(request)
        prepared = await self._prepare(request, origin)
        prepared.write()  # an unsendable request fails here, before it costs a connection
        connection = self._pool.take(origin, now=trio.current_time())
        if connection is not None:
            self._counters.reused += 1
            try:
                return await self._perform(connection, prepared, timeouts, on_sent, reused=True)
            except _StaleError:
                self._counters.retried += 1
        with _within(timeouts.connect, httpx.ConnectTimeout):
            connection = await connect(
                origin,
                names=self._names,
                ssl_context=self._context,
                sessions=self._sessions,
                read_bytes=self._read_bytes,
                max_head_bytes=self._max_head_bytes,
                counters=self._counters,
            )
        return await self._perform(connection, prepared, timeouts, on_sent, reused=False)

    async def _perform(
        self,
        connection: Connection,
        prepared: _Prepared,
        timeouts: _Timeouts,
        on_sent: Callable[[], None] | None,
        *,
        reused: bool,
    ) -> Exchange:
        sent = False
        sent_at = math.inf
        reader = None
        try:
            head_bytes, reader = prepared.write()
            with _within(timeouts.write, httpx.WriteTimeout):
                if len(prepared.body) <= _JOINED_BYTES:
                    sent = await connection.send(head_bytes + prepared.body)
                else:
                    sent = await connection.send(head_bytes) and await connection.send(prepared.body)
            sent_at = trio.current_time()
            if sent and on_sent is not None:
                on_sent()
            head = await _receive_head(connection, reader, timeouts, sent=sent)
            return self._exchange(connection, prepared, head, reader.rest, sent=sent)
        except (OSError, UpstreamClosedError) as exc:
            connection.abort()
            nothing_came = reader is not None and not reader.received
            if reused and nothing_came and (not sent or trio.current_time() - sent_at <= RACE_S):
                raise _StaleError from exc
            self._counters.aborted += 1
            if isinstance(exc, UpstreamClosedError):
                raise
            raise UpstreamClosedError(_early_end(connection, f": {exc.strerror or exc}"), sent=sent) from exc
        except BaseException:
            connection.abort()
            self._counters.aborted += 1
            raise

    def _exchange(
        self, connection: Connection, prepared: _Prepared, head: ResponseHead, rest: bytes, *, sent: bool
    ) -> Exchange:
        keep_alive = (
            sent
            and head.http_version == b"1.1"
            and b"close" not in head.tokens(b"connection")
            and b"close" not in tokens(prepared.headers, b"connection")
        )
        for name, value in head.headers:
            if name == b"keep-alive" and (found := _KEEP_ALIVE_TIMEOUT.search(value)):
                # A second early: the two clocks differ by the way there.
                connection.keep_s = max(0.0, int(found[1]) - 1.0)
        for key, layer in connection.unkept:  # TLS 1.3 gives tickets before it gives data
            self._sessions.keep(key, layer, now=trio.current_time())
        connection.unkept = ()
        method = prepared.method.decode("ascii")
        return Exchange(
            connection,
            head,
            rest=rest,
            framing=framing_for(head.status, head.headers, method=method),
            keep_alive=keep_alive,
            drain_s=self._drain_s,
            release=self._release,
            counters=self._counters,
            label=f"{method} {connection.origin}",
            reader=self._reader,
        )

    def _release(self, connection: Connection) -> None:
        if self._closed:
            connection.close()
        else:
            self._pool.put(connection, now=trio.current_time())

    # --- what is asked for -------------------------------------------------------------------------------------------

    def _context(self) -> ssl.SSLContext:
        return self._ssl_context or shared_context()

    def _origin(self, request: httpx.Request) -> Origin:
        url = request.url
        if url.scheme not in _PORTS:
            raise ConfigurationError("url", f"{url.scheme}://…", "http:// or https://")
        host = url.raw_host.decode("ascii")
        if not host:
            raise ConfigurationError("url", f"{url.scheme}://", "a URL with a host")
        port = url.port or _PORTS[url.scheme]
        return Origin(
            scheme=url.scheme,
            host=host,
            port=port,
            proxy=self._proxy_for(request, url.scheme, host, port),
            server_hostname=request.extensions.get("sni_hostname"),
        )

    def _proxy_for(self, request: httpx.Request, scheme: str, host: str, port: int) -> Proxy | None:
        if "proxy" in request.extensions:
            value = request.extensions["proxy"]
            return None if value is None else Proxy.parse(value)
        if self._environment is not None:
            return self._environment.choose(scheme, host, port)
        return self._proxy

    async def _prepare(self, request: httpx.Request, origin: Origin) -> _Prepared:
        try:
            body = request.content
        except httpx.RequestNotRead:
            body = await request.aread()
        method = request.method.encode()
        target = request.url.raw_path
        headers = list(checked_headers(method, request.headers.raw, body_bytes=len(body)))
        if origin.proxy is not None and origin.scheme == "http":
            target = b"http://" + request.url.netloc + target
            if origin.proxy.authorization is not None:
                headers = [pair for pair in headers if pair[0].lower() != b"proxy-authorization"]
                headers.append((b"Proxy-Authorization", origin.proxy.authorization))
        return _Prepared(
            method=method,
            target=target,
            headers=tuple(headers),
            body=body,
            max_head_bytes=self._max_head_bytes,
        )


class _Body(httpx.AsyncByteStream):
    """A response's body for httpx. An iterator of its own rather than an async generator."""

    def __init__(self, exchange: Exchange, read_s: float) -> None:
        self._exchange = exchange
        self._read_s = read_s

    def __aiter__(self) -> _Body:
        return self

    async def __anext__(self) -> bytes:
        try:
            if self._read_s == math.inf:
                body = await self._exchange.receive()
            else:
                with _within(self._read_s, httpx.ReadTimeout):
                    body = await self._exchange.receive()
        except UpstreamError as exc:
            raise _as_httpx(exc) from exc
        if not body:
            raise StopAsyncIteration
        return body

    async def aclose(self) -> None:
        """Give the connection back or close it, within the transport's `drain_s`; at once if the caller is cancelled."""
        if trio.current_effective_deadline() == -math.inf and not self._exchange.at_end:
            self._exchange.abort()
        await self._exchange.aclose()


@contextlib.contextmanager
def _within(seconds: float, error: type[httpx.TimeoutException]) -> Iterator[None]:
    """Turn the passing of `seconds` into httpx's exception for it."""
    try:
        with trio.fail_after(seconds):
            yield
    except trio.TooSlowError as exc:
        raise error(f"no progress within {seconds:g} s") from exc


async def _receive_head(
    connection: Connection, reader: HeadReader, timeouts: _Timeouts, *, sent: bool
) -> ResponseHead:
    while True:
        with _within(timeouts.read, httpx.ReadTimeout):
            data = await connection.receive()
        if not data:
            raise UpstreamClosedError(_early_end(connection, ""), sent=sent)
        head = reader.feed(data)
        if head is not None:
            return head


def _early_end(connection: Connection, why: str) -> str:
    return f"the connection to {connection.origin} was closed before the response began{why}"


def _as_httpx(exc: UpstreamError | ConfigurationError) -> Exception:
    message = str(exc)
    if isinstance(exc, ConnectError):
        return httpx.ConnectError(message)
    if isinstance(exc, UpstreamClosedError):
        kind = httpx.ReadError if exc.sent else httpx.WriteError
        return kind(message)
    if isinstance(exc, RemoteProtocolError):
        return httpx.RemoteProtocolError(message)
    if isinstance(exc, ConfigurationError) and exc.field == "url":
        return httpx.UnsupportedProtocol(message)
    return httpx.LocalProtocolError(message)
