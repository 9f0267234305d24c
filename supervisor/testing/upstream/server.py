"""The simulated upstream: real TCP on loopback, scripted answers, and a record of what it saw.

The record is the point. A test that asks "did the abort reach the wire" must not ask the client, so each connection has a
task that does nothing but read: it sees the client's FIN or RST at once, also while the answer is paced, stalled or
silent, notes which of the two it was, and stops the answer. All the rest of a connection (parse a request with h11, carry
out the steps of its script) is one more task.

Nothing here is unbounded: connections, request sizes, what is buffered of a pipelining client, and the records kept.
"""

from __future__ import annotations

import math
import select
import socket
import ssl
import struct
import time
from collections import OrderedDict, deque
from collections.abc import Awaitable, Callable, Iterator
from contextlib import AbstractAsyncContextManager, contextmanager
from types import TracebackType
from typing import Any, Literal, Self

import attrs
import h11
import msgspec
import trio

from supervisor.errors import ConfigurationError
from supervisor.testing.upstream.script import Close, Hang, Pause, Script, Send, Step, plan, script_for_model

__all__ = ["AcceptMode", "SimulatedUpstream", "UpstreamConnection", "UpstreamRequest", "unreachable_url"]

AcceptMode = Literal["normal", "silent", "close", "reset"]
"""What a new connection gets before any request: service; silence (also no TLS handshake); a FIN; a RST."""

_RECEIVE_BYTES = 1 << 16
_LINGER_RESET = struct.pack("ii", 1, 0)


class _GoneError(Exception):
    """The client has closed, or asked for what cannot be given."""


@attrs.frozen(kw_only=True)
class UpstreamRequest:
    """One request as it arrived."""

    number: int
    """From 1, over all connections."""
    connection: int
    method: str
    target: str
    headers: tuple[tuple[str, str], ...]
    """Names in lower case, in the order sent."""
    body: bytes
    at: float
    """By trio's clock."""

    def header(self, name: str, default: str = "") -> str:
        """Return the first value of a header."""
        return next((value for key, value in self.headers if key == name.lower()), default)

    def json(self) -> Any:
        """Return the body, decoded. Raises msgspec.DecodeError."""
        return msgspec.json.decode(self.body)

    @property
    def credential(self) -> str:
        """The bearer token or `x-api-key` of the request."""
        scheme, _, token = self.header("authorization").partition(" ")
        return token if scheme.lower() == "bearer" else self.header("x-api-key") or self.header("api-key")


@attrs.define(eq=False, kw_only=True)
class UpstreamConnection:
    """One connection, seen from the upstream's side. Times are by trio's clock."""

    number: int
    opened_at: float
    closed_at: float | None = None
    closed_monotonic_s: float | None = None
    """`time.monotonic()` at the close, comparable with another process on the same machine."""
    closed_by: Literal["eof", "reset", "upstream"] | None = None
    """How it ended: the client's FIN, the client's RST (or its death while we wrote), or our own doing. None: open."""
    bytes_received: int = 0
    bytes_sent: int = 0
    events_sent: int = 0
    """Token events of all answers on this connection."""
    requests: int = 0
    _lot: trio.lowlevel.ParkingLot = attrs.field(factory=trio.lowlevel.ParkingLot, init=False, repr=False)

    @property
    def open(self) -> bool:
        """Whether neither side has closed it."""
        return self.closed_by is None

    async def wait_closed(self) -> None:
        """Wait until the upstream has seen the end of the connection. May be cancelled."""
        await self._wait_until(lambda: not self.open)

    async def wait_events(self, count: int) -> None:
        """Wait until so many events were written, or the connection has ended. May be cancelled."""
        await self._wait_until(lambda: self.events_sent >= count or not self.open)

    async def _wait_until(self, true: Callable[[], bool]) -> None:
        await trio.lowlevel.checkpoint()
        while not true():
            await self._lot.park()

    def _sent(self, nbytes: int, events: int) -> None:
        self.bytes_sent += nbytes
        self.events_sent += events
        self._lot.unpark_all()

    def _closed(self, by: Literal["eof", "reset", "upstream"]) -> None:
        if self.closed_by is None:
            self.closed_by = by
            self.closed_at = trio.current_time()
            self.closed_monotonic_s = time.monotonic()
            self._lot.unpark_all()


@attrs.define(eq=False, kw_only=True)
class SimulatedUpstream:
    """An OpenAI-compatible server on loopback with scripted faults.

    `async with SimulatedUpstream() as up:` serves until the block is left, then closes every connection; or run it in a
    nursery of your own with `await nursery.start(up.run)`. `up.base_url` ends in `/v1`.

    What a request gets is decided by, in this order: the next script of `enqueue`; `respond(request)` where that gives
    one; the request's model name if it begins with `sim/` (see `script.py`); `default`.
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
    """How many requests and connections are remembered; the oldest are forgotten first."""

    requests: deque[UpstreamRequest] = attrs.field(init=False, repr=False)
    connections: deque[UpstreamConnection] = attrs.field(init=False, repr=False)
    accepted: int = attrs.field(default=0, init=False)
    turned_away: int = attrs.field(default=0, init=False)
    """Connections closed at once because `max_connections` were open."""
    request_count: int = attrs.field(default=0, init=False)
    _open: dict[int, UpstreamConnection] = attrs.field(factory=dict, init=False, repr=False)
    _queue: deque[Script] = attrs.field(factory=deque, init=False, repr=False)
    _faulted: OrderedDict[Script, int] = attrs.field(factory=OrderedDict, init=False, repr=False)
    _lot: trio.lowlevel.ParkingLot = attrs.field(factory=trio.lowlevel.ParkingLot, init=False, repr=False)
    _entered: AbstractAsyncContextManager[trio.Nursery] | None = attrs.field(
        default=None, init=False, repr=False
    )
    _nursery: trio.Nursery | None = attrs.field(default=None, init=False, repr=False)

    def __attrs_post_init__(self) -> None:
        self.requests = deque(maxlen=self.max_records)
        self.connections = deque(maxlen=self.max_records)

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
        self._queue.extend(scripts)

    async def wait_requests(self, count: int) -> UpstreamRequest:
        """Wait until `count` requests have arrived; return the latest. May be cancelled."""
        await self._wait_until(lambda: self.request_count >= count)
        return self.requests[-1]

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
            steps, kept = self._steps(request)
            closing = reset = False
            pace = _Pace()
            for step in steps:
                match step:
                    case Send(data, events):
                        await _send(stream, connection, data, events, kept)
                    case Pause(seconds):
                        await pace.wait(seconds)
                    case Hang(beat, every_s):
                        while every_s:
                            await trio.sleep(every_s)
                            await _send(stream, connection, beat, 0, kept)
                        await trio.sleep_forever()
                    case Close(reset):
                        closing = True
                        break
            if reset:
                _reset_on_close(sock)
            elif closing and isinstance(stream, trio.SSLStream) and kept.fault is None:
                with trio.move_on_after(1):
                    await stream.aclose()  # a close_notify; a dropped connection is cut without one
            if closing or request.header("connection").lower() == "close":
                return

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

    # --- what to answer

    def _steps(self, request: UpstreamRequest) -> tuple[Iterator[Step], Script]:
        path = request.target.partition("?")[0]
        if request.method == "GET" and path.endswith("/models"):
            script = _json_script(
                200, {"object": "list", "data": [{"id": "sim/ok", "object": "model", "owned_by": "sim"}]}
            )
            return plan(script), script
        if request.method == "GET" and path == "/sim/report":
            script = _json_script(200, self.report())
            return plan(script), script
        if request.method != "POST" or not path.endswith("/chat/completions"):
            script = _refusal(404, f"no such route: {request.method} {path}")
            return plan(script), script
        try:
            asked = msgspec.json.decode(request.body, type=dict[str, Any])
            script = self._script(request, asked)
        except (msgspec.DecodeError, ConfigurationError) as exc:
            script = _refusal(400, str(exc))
            return plan(script), script
        return plan(script, credential=request.credential, stream=asked.get("stream") is True), script

    def _script(self, request: UpstreamRequest, asked: dict[str, Any]) -> Script:
        script = self._queue.popleft() if self._queue else None
        if script is None and self.respond is not None:
            script = self.respond(request)
        if script is None and isinstance(model := asked.get("model"), str):
            script = script_for_model(model)
        if script is None:
            script = self.default
        if script.times is None:
            return script
        seen = self._faulted.pop(script, 0)
        self._faulted[script] = seen + 1
        while len(self._faulted) > self.max_records:
            self._faulted.popitem(last=False)
        return script if seen < script.times else script.well()

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


def _json_script(status: int, value: object) -> Script:
    return Script(status=status, body=msgspec.json.encode(value), content_type="application/json")


def _refusal(status: int, message: str) -> Script:
    return Script(status=status, message=message, code="simulated_upstream")


@contextmanager
def unreachable_url(*, mode: Literal["refused", "unanswered"] = "refused") -> Iterator[str]:
    """Give a base URL on loopback to which no connection can be made, and keep its port while the block runs.

    `refused`: the kernel answers with a RST. `unanswered`: a listener whose backlog is full and who never accepts, so that
    a connect waits (Linux; elsewhere the connect may succeed and be met with silence).
    """
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{sock.getsockname()[1]}/v1"
        fillers: list[socket.socket] = []
        try:
            if mode == "unanswered":
                sock.listen(0)
                while len(fillers) < 8:
                    filler = socket.socket()
                    filler.setblocking(False)
                    filler.connect_ex(sock.getsockname())
                    fillers.append(filler)
                    if not select.select([], [filler], [], 0.02)[1]:
                        break  # this one's SYN was dropped: the backlog is full
            yield url
        finally:
            for filler in fillers:
                filler.close()
