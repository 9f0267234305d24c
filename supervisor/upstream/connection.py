"""One connection: a non-blocking socket, the TLS layers over it, and the few calls that touch them.

Everything that waits is in this file and in `Exchange.receive`; everything else between the socket and the body is
synchronous (`decode`). A reader of another kind (one task and one epoll for all sockets) replaces `receive_raw` alone.

`receive_raw` waits first and reads afterwards. trio's own `recv` reads first, and in a paced stream that read nearly
always fails: measured here, waiting first costs 5.8 µs an event against 8.1 µs. Only after a read that filled its buffer
is there likely to be more, and then it reads again after a mere checkpoint.

Closing never waits. `abort` closes the file descriptor in the step in which it is called, without `close_notify`, and
wakes a task that waits for the socket. If the request was still being written it resets the connection (`SO_LINGER` 0),
because otherwise the kernel would go on delivering the rest of the request to a provider that should not begin. `close` is
for idle connections: it says goodbye first, if that takes no waiting.
"""

from __future__ import annotations

import contextlib
import os
import socket
import ssl
import struct
from collections.abc import Awaitable, Callable

import attrs
import trio

from supervisor.errors import ConnectError, RemoteProtocolError
from supervisor.upstream.dial import dial
from supervisor.upstream.head import write_head
from supervisor.upstream.names import Names
from supervisor.upstream.proxy import Proxy, authority
from supervisor.upstream.tls import SessionKey, Sessions, TLSLayer

__all__ = ["Connection", "Counters", "Origin", "connect"]

_PIECE_BYTES = 1 << 16
"""How much of a request is encrypted and queued at a time."""

_MAX_UNSENT_BYTES = 1 << 16
"""How much TLS may queue on its own (answers to key updates) to a peer that does not read."""

_RESET_ON_CLOSE = struct.pack("ii", 1, 0)


@attrs.frozen(kw_only=True, cache_hash=True)
class Origin:
    """What two requests must share to share a connection."""

    scheme: str
    host: str
    port: int
    proxy: Proxy | None = None
    server_hostname: str | None = None
    """The name for SNI and verification, where it is not the host."""

    def __str__(self) -> str:
        via = "" if self.proxy is None else f" through the proxy {self.proxy}"
        return f"{self.scheme}://{authority(self.host, self.port)}{via}"


@attrs.define
class Counters:
    """What a transport counts. One object, shared by all its connections."""

    open: int = 0
    opened: int = 0
    resumed: int = 0
    reused: int = 0
    retried: int = 0
    aborted: int = 0


class Connection:
    """An open connection to an origin. Made by `connect`; owned by one exchange, or by the pool."""

    __slots__ = (
        "_counters",
        "_early",
        "_layers",
        "_likely_more",
        "_read_bytes",
        "_sending",
        "_unsent",
        "closed",
        "encrypted",
        "keep_s",
        "origin",
        "socket",
        "unkept",
    )

    def __init__(self, sock: socket.socket, origin: Origin, *, read_bytes: int, counters: Counters) -> None:
        self.socket = sock
        self.origin = origin
        self.closed = False
        self.encrypted = False
        """Whether there is TLS: bytes off the socket have to go through `decode`."""
        self.keep_s = float("inf")
        """For how many seconds the server says it keeps the connection when idle (`Keep-Alive: timeout=`)."""
        self.unkept: tuple[tuple[SessionKey, TLSLayer], ...] = ()
        """The layers that began with a full handshake, whose sessions are to be kept once their servers have given them."""
        self._read_bytes = read_bytes
        self._counters = counters
        self._layers: tuple[TLSLayer, ...] = ()
        self._unsent = bytearray()
        self._sending = False
        self._early = b""
        self._likely_more = False
        counters.open += 1
        counters.opened += 1

    def __repr__(self) -> str:
        state = "closed" if self.closed else "open"
        return f"<Connection {self.origin} {state}>"

    @property
    def truncatable(self) -> bool:
        """Whether an end of file now would not prove that the peer meant to end: TLS without its `close_notify`."""
        return bool(self._layers) and not self._layers[-1].closed

    @property
    def ended(self) -> bool:
        """Whether nothing follows as TLS has ended: the peer has said so, or it broke."""
        for layer in self._layers:  # noqa: SIM110  # asked before each read: a generator would cost three times as much
            if layer.closed or layer.fault is not None:
                return True
        return False

    @property
    def fault(self) -> ssl.SSLError | None:
        """What broke TLS after the bytes that were read last, if anything did."""
        return next((layer.fault for layer in self._layers if layer.fault is not None), None)

    # --- reading -----------------------------------------------------------------------------------------------------

    async def receive_raw(self) -> bytes:
        """Return the bytes of one read of the socket, `b""` at its end of file. A checkpoint.

        Raises OSError if the connection broke, trio.ClosedResourceError if this end was aborted.
        """
        if self._likely_more:
            self._likely_more = False
            await trio.lowlevel.checkpoint()
        else:
            self._check_open()
            await trio.lowlevel.wait_readable(self.socket)
        while True:
            self._check_open()
            try:
                data = self.socket.recv(self._read_bytes)
            except BlockingIOError:
                await trio.lowlevel.wait_readable(self.socket)
                continue
            self._likely_more = len(data) == self._read_bytes
            return data

    def decode(self, raw: bytes) -> bytes:
        """Turn bytes off the socket into bytes of HTTP. Synchronous.

        Raises ssl.SSLError (an OSError) if TLS fails, RemoteProtocolError if the peer abuses it.
        """
        layers = self._layers
        if not layers:
            return raw
        for layer in layers:
            raw = layer.decrypt(raw)
        self._unsent += self._encode(b"")
        if self._unsent:
            with contextlib.suppress(OSError):  # reading will tell
                self._push()
            if len(self._unsent) > _MAX_UNSENT_BYTES and not self._sending:
                raise RemoteProtocolError("the upstream makes TLS answer faster than it reads the answers")
        return raw

    async def receive(self) -> bytes:
        """Return the HTTP bytes of one or more reads, `b""` at the end. For heads and handshakes; bodies use the parts."""
        if self._early:
            data, self._early = self._early, b""
            await trio.lowlevel.checkpoint()
            return data
        if self.ended:
            await trio.lowlevel.checkpoint()
            if (fault := self.fault) is not None:
                raise fault
            return b""
        while True:
            raw = await self.receive_raw()
            data = self.decode(raw)
            if data or not raw or self.ended:
                return data

    def stale(self) -> bool:
        """Tell, without waiting, whether an idle connection was closed by the peer or received what nobody asked for."""
        try:
            self.socket.recv(1, socket.MSG_PEEK)
        except BlockingIOError:
            return False
        except OSError:
            return True
        return True

    # --- writing -----------------------------------------------------------------------------------------------------

    async def send(self, data: bytes) -> bool:
        """Send `data`; return False if the peer answered, or closed, before it had all of it.

        A server that refuses a large request may answer and stop reading: waiting for it to read on would never end, so
        while sending is blocked this also reads. What came is returned by the next `receive`. Raises nothing for a
        broken connection, for the same reason: there may be an answer to read. Not always a checkpoint.
        """
        view = memoryview(data)
        self._sending = True
        try:
            for start in range(0, len(view), _PIECE_BYTES):
                self._unsent += self._encode(view[start : start + _PIECE_BYTES])
                while not self._push():
                    await self._wait_either()
                    if self._answered():
                        return False
        except OSError:
            return False
        self._sending = False
        return True

    def _encode(self, data: bytes | memoryview) -> bytes | memoryview:
        for layer in reversed(self._layers):
            if data:
                layer.encrypt(data)
            data = layer.take()
        return data

    def _push(self) -> bool:
        unsent = self._unsent
        while unsent:
            try:
                sent = self.socket.send(unsent)
            except BlockingIOError:
                return False
            del unsent[:sent]
        return True

    async def _wait_either(self) -> None:
        async def watch(wait: Callable[[socket.socket], Awaitable[None]]) -> None:
            await wait(self.socket)
            nursery.cancel_scope.cancel()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(watch, trio.lowlevel.wait_readable)
            nursery.start_soon(watch, trio.lowlevel.wait_writable)

    def _answered(self) -> bool:
        try:
            raw = self.socket.recv(self._read_bytes)
        except BlockingIOError:
            return False
        self._early += self.decode(raw)
        return bool(self._early) or not raw or self.ended

    # --- opening and closing -----------------------------------------------------------------------------------------

    async def start_tls(self, key: SessionKey, session: ssl.SSLSession | None) -> bool:
        """Add a TLS layer, shake hands, and return whether the session offered was resumed.

        Raises OSError (ssl.SSLError among them) or ValueError (a bad name).
        """
        context, _, _, server_hostname = key
        layer = TLSLayer(context, server_hostname, session)
        data = b""
        while True:
            try:
                done = layer.handshake(data)
            except ssl.SSLError:
                with contextlib.suppress(OSError):  # the alert tells the peer why, if it still listens
                    self._unsent += self._encode(layer.take())
                    self._push()
                raise
            sent = await self.send(layer.take())
            if done:
                break
            data = await self.receive() if sent else b""
            if not data:
                raise ConnectionError("the connection was closed during the TLS handshake")
        if layer.alpn not in (None, "http/1.1"):
            raise ConnectionError(f"the server chose {layer.alpn} (ALPN), and only HTTP/1.1 is spoken here")
        self._layers += (layer,)
        self.encrypted = True
        self._early += layer.decrypt(b"")  # what came together with the end of the handshake
        if layer.resumed:
            self._counters.resumed += 1
            return True
        self.unkept += ((key, layer),)
        return False

    def close(self) -> None:
        """Close an idle connection now, telling a TLS peer if that takes no waiting. Idempotent."""
        if self._layers and not self.closed:
            with contextlib.suppress(OSError):
                self._layers[-1].close()
                self._unsent += self._encode(b"")
                self._push()
        self.abort()

    def abort(self) -> None:
        """Close the socket now, whatever is going on. Synchronous and idempotent; wakes a task that waits for it."""
        if self.closed:
            return
        self.closed = True
        self._counters.open -= 1
        if self._sending:
            with contextlib.suppress(OSError):
                self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET_ON_CLOSE)
        with contextlib.suppress(RuntimeError):  # outside of a trio run nobody can be waiting
            trio.lowlevel.notify_closing(self.socket)
        self.socket.close()

    def _check_open(self) -> None:
        if self.closed:
            raise trio.ClosedResourceError("this connection was closed here")


async def connect(
    origin: Origin,
    *,
    names: Names,
    ssl_context: Callable[[], ssl.SSLContext],
    sessions: Sessions,
    read_bytes: int,
    max_head_bytes: int,
    counters: Counters,
) -> Connection:
    """Connect to an origin, through its proxy if it has one, up to where a request can be written.

    See `names`, `dial` and `tls`. A TLS session that does not even lead to a full handshake is forgotten, and the connection
    made once more without it. A cancel closes whatever is open at once. Raises ConnectError, whose message has the
    host and the cause and whose `__cause__` is the OSError.
    """
    proxy = origin.proxy
    offered: Sessions | None = sessions
    while True:
        sock = await _dial(origin, names)
        connection = Connection(sock, origin, read_bytes=read_bytes, counters=counters)
        try:
            if proxy is not None and proxy.scheme == "https":
                key = (ssl_context(), proxy.host, proxy.port, proxy.host)
                await _secure(connection, key, offered, f"the proxy {proxy}")
            if origin.scheme == "https":
                if proxy is not None:
                    await _tunnel(connection, proxy, max_head_bytes)
                key = (ssl_context(), origin.host, origin.port, origin.server_hostname or origin.host)
                await _secure(connection, key, offered, str(origin))
        except _ResumptionError:
            connection.abort()
            offered = None
        except BaseException:
            connection.abort()
            raise
        else:
            return connection


async def _dial(origin: Origin, names: Names) -> socket.socket:
    proxy = origin.proxy
    host, port = (origin.host, origin.port) if proxy is None else (proxy.host, proxy.port)
    try:
        addresses = await names.addresses(host, port)
        try:
            return await dial(addresses)
        except OSError:
            names.forget(host, port, addresses)
            raise
    except (OSError, ValueError) as exc:
        whose = "" if proxy is None else "the proxy cannot be reached: "
        raise ConnectError(f"cannot connect to {origin}: {whose}{_causes(exc)}") from exc


class _ResumptionError(Exception):
    """A handshake failed in which a session was offered. That may have been the reason."""


async def _secure(connection: Connection, key: SessionKey, sessions: Sessions | None, whom: str) -> None:
    session = None if sessions is None else sessions.find(key, now=trio.current_time())
    try:
        resumed = await connection.start_tls(key, session)
    except (OSError, ValueError) as exc:
        if sessions is None or session is None:
            raise ConnectError(f"cannot connect to {whom}: {_causes(exc)}") from exc
        sessions.drop(key, session)
        raise _ResumptionError from exc
    if sessions is not None and session is not None and not resumed:
        sessions.drop(key, session)


async def _tunnel(connection: Connection, proxy: Proxy, max_head_bytes: int) -> None:
    origin = connection.origin
    target = authority(origin.host, origin.port).encode("ascii")
    headers = [(b"Host", target)]
    if proxy.authorization is not None:
        headers.append((b"Proxy-Authorization", proxy.authorization))
    request, reader = write_head(b"CONNECT", target, headers, max_head_bytes=max_head_bytes)
    head = None
    try:
        await connection.send(request)
        while head is None:
            data = await connection.receive()
            if not data:
                raise ConnectError(
                    f"cannot connect to {origin}: the proxy closed the connection without an answer"
                )
            head = reader.feed(data)
    except (OSError, RemoteProtocolError) as exc:
        raise ConnectError(f"cannot connect to {origin}: the proxy failed: {_causes(exc)}") from exc
    if not 200 <= head.status < 300:
        reason = head.reason[:100].decode("ascii", "replace")
        raise ConnectError(
            f"cannot connect to {origin}: the proxy refused the tunnel: {head.status} {reason}"
        )
    if reader.rest:
        raise ConnectError(
            f"cannot connect to {origin}: the proxy sent data of its own before the tunnel was used"
        )


def _causes(exc: BaseException) -> str:
    """Say why, in the system's words or the TLS library's own."""
    if isinstance(exc, ssl.SSLCertVerificationError):
        return f"its certificate is not trusted: {exc.verify_message}"
    if isinstance(exc, ssl.SSLError):
        return f"TLS failed: {exc.reason or exc}"
    if isinstance(exc, OSError) and exc.errno is not None and exc.errno > 0:
        return os.strerror(exc.errno)
    return str(exc)
