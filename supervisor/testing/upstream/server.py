"""The simulated upstream: real TCP on loopback, scripted answers, and a record of what it saw.

The record is the point. A test that asks "did the abort reach the wire" must not ask the client, so each connection has a
task that does nothing but read: it sees the client's FIN or RST at once, also while the answer is paced, stalled or
silent, notes which of the two it was, and stops the answer. All the rest of a connection (parse a request with h11, carry
out the steps of its script) is one more task.

Nothing here is unbounded: connections, request sizes, what is buffered of a pipelining client, and the records kept.
"""

from __future__ import annotations

import math
import socket
import ssl
import struct
import time
from collections import deque
from collections.abc import Awaitable, Callable, Iterator
from contextlib import AbstractAsyncContextManager
from types import TracebackType
from typing import Any, Literal, Self

import attrs
import h11
import trio

from supervisor.testing.upstream.plan import Close, Hang, Pause, Send, Step, Until
from supervisor.testing.upstream.records import UpstreamConnection, UpstreamExchange, UpstreamRequest
from supervisor.testing.upstream.responder import Responder
from supervisor.testing.upstream.script import Script
from supervisor.testing.upstream.stored import StoredResponse

__all__ = ["AcceptMode", "SimulatedUpstream"]

AcceptMode = Literal["normal", "silent", "close", "reset"]
"""What a new connection gets before any request: service; silence (also no TLS handshake); a FIN; a RST."""

_RECEIVE_BYTES = 1 << 16
_LINGER_RESET = struct.pack("ii", 1, 0)


class _GoneError(Exception):
    """The client has closed, or asked for what cannot be given."""


@attrs.define(eq=False, kw_only=True)
class SimulatedUpstream:
    """A provider on loopback with scripted faults, which speaks every dialect: the request's path says which.

    `async with SimulatedUpstream() as up:` serves until the block is left, then closes every connection; or run it in a
    nursery of your own with `await nursery.start(up.run)`. `up.base_url` ends in `/v1`.

    What a request gets is decided by, in this order: the next script of `enqueue`; `respond(request)` where that gives
    one; its `x-sim-script` header, or its model name, if that begins with `sim/` (see `script.py`); `default`.
    """

    respond: Callable[[UpstreamRequest], Script | None] | None = None
    default: Script = attrs.field(factory=Script)
    accept: AcceptMode | Callable[[int], AcceptMode] = "normal"
    """For every connection, or by its number (from 1). May be changed while running."""
    backlog: int = 512
    host: str = "127.0.0.1"
    port: int = 0
    """0: any free port; the one taken is here once running."""
    ssl_context: ssl.SSLContext | None = None
    server_name: str | None = None
    """The host name in `base_url`, for a certificate; the default is `host`."""
    max_connections: int = 4096
    max_request_bytes: int = 16 << 20
    max_records: int = 10_000
    """How many requests, connections, exchanges and stored responses are remembered; the oldest are forgotten first."""

    requests: deque[UpstreamRequest] = attrs.field(init=False, repr=False)
    connections: deque[UpstreamConnection] = attrs.field(init=False, repr=False)
    ledger: deque[UpstreamExchange] = attrs.field(init=False, repr=False)
    """What each request was answered, how much of it was sent, and how much it is billed for."""
    accepted: int = attrs.field(default=0, init=False)
    turned_away: int = attrs.field(default=0, init=False)
    """Connections closed at once because `max_connections` were open."""
    request_count: int = attrs.field(default=0, init=False)
    ended_count: int = attrs.field(default=0, init=False)
    """Answers that have ended, however."""
    _open: dict[int, UpstreamConnection] = attrs.field(factory=dict, init=False, repr=False)
    _last_ended: UpstreamExchange = attrs.field(init=False, repr=False)
    _responder: Responder = attrs.field(init=False, repr=False)
    _lot: trio.lowlevel.ParkingLot = attrs.field(factory=trio.lowlevel.ParkingLot, init=False, repr=False)
    _entered: AbstractAsyncContextManager[trio.Nursery] | None = attrs.field(
        default=None, init=False, repr=False
    )
    _nursery: trio.Nursery | None = attrs.field(default=None, init=False, repr=False)

    def __attrs_post_init__(self) -> None:
        self.requests = deque(maxlen=self.max_records)
        self.connections = deque(maxlen=self.max_records)
        self.ledger = deque(maxlen=self.max_records)
        self._responder = Responder(limit=self.max_records)

    # --- what a test asks

    @property
    def base_url(self) -> str:
        """The base URL for clients, `http(s)://host:port/v1`."""
        scheme = "http" if self.ssl_context is None else "https"
        return f"{scheme}://{self.server_name or self.host}:{self.port}/v1"

    @property
    def open_connections(self) -> list[UpstreamConnection]:
        """The connections that neither side has closed, oldest first."""
        return [c for c in self._open.values() if c.open]

    def enqueue(self, *scripts: Script) -> None:
        """Give these scripts to the next requests, one each, before any other rule."""
        self._responder.queue.extend(scripts)

    def response(self, response_id: str) -> StoredResponse:
        """Return a response of the Responses API by its id. Raises KeyError."""
        return self._responder.stored[response_id]

    async def wait_requests(self, count: int) -> UpstreamRequest:
        """Wait until `count` requests have arrived; return the latest. May be cancelled."""
        await self._wait_until(lambda: self.request_count >= count)
        return self.requests[-1]

    async def wait_ended(self, count: int) -> UpstreamExchange:
        """Wait until `count` answers have ended, however; return the latest. May be cancelled."""
        await self._wait_until(lambda: self.ended_count >= count)
        return self._last_ended

    async def wait_accepted(self, count: int) -> UpstreamConnection:
        """Wait until `count` connections were accepted; return the latest. May be cancelled."""
        await self._wait_until(lambda: self.accepted >= count)
        return self.connections[-1]

    async def wait_open(self, count: int = 0) -> None:
        """Wait until exactly `count` connections are open. May be cancelled."""
        await self._wait_until(lambda: len(self._open) == count)

    async def _wait_until(self, true: Callable[[], bool]) -> None:
        await trio.lowlevel.checkpoint()
        while not true():
            await self._lot.park()

    # --- serving

    async def __aenter__(self) -> Self:
        self._entered = trio.open_nursery()
        self._nursery = await self._entered.__aenter__()
        await self._nursery.start(self.run)
        return self

    def __aexit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> Awaitable[bool | None]:
        return self._leave(kind, value, trace)

    async def _leave(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> bool | None:
        assert self._entered is not None
        assert self._nursery is not None
        self._nursery.cancel_scope.cancel()
        if isinstance(value, trio.Cancelled):
            return await self._entered.__aexit__(kind, value, trace)
        # Any other exception of the block is the caller's and leaves as it is, in no group of ours.
        await self._entered.__aexit__(None, None, None)
        return None

    async def run(self, *, task_status: trio.TaskStatus[Self] = trio.TASK_STATUS_IGNORED) -> None:
        """Serve until cancelled; every connection is closed before this returns."""
        family = socket.AF_INET6 if ":" in self.host else socket.AF_INET
        with trio.socket.socket(family, socket.SOCK_STREAM) as listener:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            await listener.bind((self.host, self.port))
            listener.listen(self.backlog)
            self.port = listener.getsockname()[1]
            async with trio.open_nursery() as nursery:
                task_status.started(self)
                while True:
                    try:
                        sock, _ = await listener.accept()
                    except OSError:  # out of descriptors, or a client that was gone again
                        await trio.sleep(0.05)
                        continue
                    if len(self._open) >= self.max_connections:
                        self.turned_away += 1
                        sock.close()
                        continue
                    nursery.start_soon(self._serve, sock, self._register())

    def _register(self) -> UpstreamConnection:
        self.accepted += 1
        connection = UpstreamConnection(number=self.accepted, opened_at=trio.current_time())
        self.connections.append(connection)
        self._open[connection.number] = connection
        self._lot.unpark_all()
        return connection

    async def _serve(self, sock: trio.socket.SocketType, connection: UpstreamConnection) -> None:
        try:
            mode = self.accept if isinstance(self.accept, str) else self.accept(connection.number)
            if mode in ("close", "reset"):
                if mode == "reset":
                    _reset_on_close(sock)
                return
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            tcp = trio.SocketStream(sock)
            stream: trio.abc.Stream = tcp
            if mode == "normal" and self.ssl_context is not None:
                stream = trio.SSLStream(tcp, self.ssl_context, server_side=True, https_compatible=True)
            async with trio.open_nursery() as nursery:
                incoming = _Incoming(stream, connection, nursery.cancel_scope)
                if isinstance(stream, trio.SSLStream):
                    await _handshake(stream, connection)
                nursery.start_soon(incoming.run)
                if mode == "silent":
                    await trio.sleep_forever()
                await self._converse(stream, sock, incoming, connection)
                connection._closed("upstream")  # noqa: SLF001 (the record is written by its server only)
                nursery.cancel_scope.cancel()
        except* _GoneError:
            pass
        finally:
            connection._closed("upstream")  # noqa: SLF001 (see above); no effect if the client was first
            sock.close()
            self._open.pop(connection.number, None)
            self._lot.unpark_all()

    async def _converse(
        self,
        stream: trio.abc.Stream,
        sock: trio.socket.SocketType,
        incoming: _Incoming,
        connection: UpstreamConnection,
    ) -> None:
        while True:
            request = await self._next_request(stream, incoming, connection)
            if request is None:
                return
            exchange = UpstreamExchange(request=request)
            self.ledger.append(exchange)
            steps = self._responder.answer(
                request, exchange, respond=self.respond, default=self.default, report=self.report
            )
            try:
                closing = await self._carry_out(steps, stream, sock, connection, exchange)
            except _GoneError:
                exchange.ended = "client"
                raise
            finally:
                if exchange.ended is None:  # cancelled: the client has gone, or the simulator is being closed
                    exchange.ended = "upstream" if connection.open else "client"
                self.ended_count += 1
                self._last_ended = exchange
                self._lot.unpark_all()
            if closing or request.header("connection").lower() == "close":
                return

    async def _carry_out(
        self,
        steps: Iterator[Step],
        stream: trio.abc.Stream,
        sock: trio.socket.SocketType,
        connection: UpstreamConnection,
        exchange: UpstreamExchange,
    ) -> bool:
        """Carry out the steps of one answer; return whether the connection is to be closed."""
        script = exchange.script
        closing = reset = False
        pace = _Pace()
        for step in steps:
            match step:
                case Send(data, words, events):
                    await _send(stream, connection, data, words, script)
                    exchange.words_sent += words
                    exchange.events_sent += events
                case Pause(seconds):
                    await pace.wait(seconds)
                case Until(at):
                    await trio.sleep_until(at)
                case Hang(beat, every_s):
                    while every_s:
                        await trio.sleep(every_s)
                        await _send(stream, connection, beat, 0, script)
                    await trio.sleep_forever()
                case Close(reset):
                    closing = True
                    break
        exchange.ended = "upstream" if script.fault is not None else "whole"
        if exchange.ended == "whole" and exchange.response is not None:
            exchange.response.kept = True
        if reset:
            _reset_on_close(sock)
        elif closing and isinstance(stream, trio.SSLStream) and script.fault is None:
            with trio.move_on_after(1):
                await stream.aclose()  # a close_notify; a dropped connection is cut without one
        return closing

    async def _next_request(
        self, stream: trio.abc.Stream, incoming: _Incoming, connection: UpstreamConnection
    ) -> UpstreamRequest | None:
        parser = h11.Connection(h11.SERVER, max_incomplete_event_size=1 << 18)
        head: h11.Request | None = None
        body = bytearray()
        try:
            while True:
                event = parser.next_event()
                if event is h11.NEED_DATA:
                    if parser.they_are_waiting_for_100_continue:
                        await stream.send_all(b"HTTP/1.1 100 Continue\r\n\r\n")
                        parser.send(h11.InformationalResponse(status_code=100, headers=[]))
                    parser.receive_data(await incoming.take())
                elif isinstance(event, h11.Request):
                    head = event
                elif isinstance(event, h11.Data):
                    body += event.data
                    if len(body) > self.max_request_bytes:
                        raise _GoneError
                elif isinstance(event, h11.EndOfMessage):
                    break
                else:
                    return None
        except h11.RemoteProtocolError:
            await _send(
                stream,
                connection,
                b"HTTP/1.1 400 Bad Request\r\ncontent-length: 0\r\nconnection: close\r\n\r\n",
            )
            return None
        assert head is not None
        incoming.put_back(parser.trailing_data[0])
        self.request_count += 1
        connection.requests += 1
        request = UpstreamRequest(
            number=self.request_count,
            connection=connection.number,
            method=head.method.decode(),
            target=head.target.decode("latin-1"),
            headers=tuple((k.decode("latin-1"), v.decode("latin-1")) for k, v in head.headers),
            body=bytes(body),
            at=trio.current_time(),
        )
        self.requests.append(request)
        self._lot.unpark_all()
        return request

    def report(self) -> dict[str, Any]:
        """Return what was seen, as JSON-able data; also served at `/sim/report` for a simulator in its own process."""
        return {
            "accepted": self.accepted,
            "turned_away": self.turned_away,
            "open": len(self._open),
            "requests": self.request_count,
            "monotonic_s": time.monotonic(),
            "connections": [
                {
                    "number": c.number,
                    "closed_by": c.closed_by,
                    "closed_monotonic_s": c.closed_monotonic_s,
                    "bytes_sent": c.bytes_sent,
                    "events_sent": c.events_sent,
                    "requests": c.requests,
                }
                for c in self.connections
            ],
            "ledger": [exchange.to_json_object() for exchange in self.ledger],
        }


class _Pace:
    """Pauses that do not drift: each is counted from when the one before it should have ended."""

    def __init__(self) -> None:
        self._due = trio.current_time()

    async def wait(self, seconds: float) -> None:
        if math.isinf(seconds):
            await trio.sleep_forever()
        self._due = max(self._due + seconds, trio.current_time() - 1)  # at most a second is made up for
        await trio.sleep_until(self._due)


class _Incoming:
    """The reading half of a connection: a bounded buffer, and the first to know that the client has gone."""

    _MAX_BYTES = 1 << 20

    def __init__(
        self, stream: trio.abc.Stream, connection: UpstreamConnection, scope: trio.CancelScope
    ) -> None:
        self._stream = stream
        self._connection = connection
        self._scope = scope
        self._data = bytearray()
        self._change = trio.Event()

    async def run(self) -> None:
        """Read until the client closes, then end the connection."""
        by: Literal["eof", "reset"] = "eof"
        try:
            while data := await self._stream.receive_some(_RECEIVE_BYTES):
                self._connection.bytes_received += len(data)
                self._data += data
                self._change.set()
                while len(self._data) > self._MAX_BYTES:
                    self._change = trio.Event()
                    await self._change.wait()
        except trio.BrokenResourceError as exc:
            by = "reset" if isinstance(exc.__cause__, OSError) else "eof"
        except trio.ClosedResourceError:
            return
        self._connection._closed(by)  # noqa: SLF001 (the record is written by its server only)
        self._scope.cancel()

    async def take(self) -> bytes:
        """Return what has arrived, waiting for something."""
        while not self._data:
            self._change = trio.Event()
            await self._change.wait()
        data = bytes(self._data)
        self._data.clear()
        self._change.set()
        return data

    def put_back(self, data: bytes) -> None:
        """Return what belongs to the next request."""
        self._data[:0] = data


async def _handshake(stream: trio.SSLStream[trio.SocketStream], connection: UpstreamConnection) -> None:
    try:
        await stream.do_handshake()
    except trio.BrokenResourceError as exc:
        connection._closed("reset" if isinstance(exc.__cause__, ConnectionError) else "eof")  # noqa: SLF001 (as above)
        raise _GoneError from None


async def _send(
    stream: trio.abc.Stream,
    connection: UpstreamConnection,
    data: bytes,
    events: int = 0,
    script: Script | None = None,
) -> None:
    try:
        if script is not None and script.trickle_bytes:
            for at in range(0, len(data), script.trickle_bytes):
                await stream.send_all(data[at : at + script.trickle_bytes])
                await trio.sleep(script.trickle_interval_s)
        else:
            await stream.send_all(data)
    except (trio.BrokenResourceError, trio.ClosedResourceError):
        connection._closed("reset")  # noqa: SLF001 (the record is written by its server only)
        raise _GoneError from None
    connection._sent(len(data), events)  # noqa: SLF001 (the record is written by its server only)


def _reset_on_close(sock: trio.socket.SocketType) -> None:
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _LINGER_RESET)
