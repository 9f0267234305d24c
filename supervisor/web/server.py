"""HTTP/1.1 for an ASGI application: the listener, its connections, and everything that bounds them.

The protocol is anycorn's (`H11Protocol`, over h11), and so is what lies between it and the application. The connection is
ours, for what must hold of it here:

- **A client that leaves is noticed at once**, also while it is being answered: somebody always reads from the socket. anycorn
  stops reading when a further request has come in before the answer to this one is complete (pipelining); here reading goes
  on (`_Pause`), up to `max_head_bytes`. A half-close counts as leaving. The application is told by `http.disconnect`, and has
  `leave_s` to end by itself.
- **Nothing waits without end.** A head has `head_s` from its first byte, a connection without a request `idle_s`, a body
  `body_s`, and each piece of an answer `send_s` to be taken. What a connection that we end has still sent is read for
  `linger_s`, or the answer to it, such as a 413, might be lost with it (RFC 9112, 9.6).
- **Bounded.** Connections by `max_connections`: when there are as many, the one that has had no request for the longest makes
  room, and if all are being answered the new one is told 503. Bodies by `max_body_bytes`, those of all requests together by
  `bodies_bytes`.
- **One connection hurts no other.** Whatever comes out of one is caught at its own nursery, logged and counted.
- **HTTP/1.1 and nothing else.** An `Upgrade` is ignored, as RFC 9110 (7.8) allows: there is no way from here to HTTP/2 or WebSocket.
"""

from __future__ import annotations

import logging
import os
from collections import OrderedDict
from typing import Any, NoReturn

import anycorn.config
import attrs
import h11
import trio
from anycorn.events import Closed, Event, RawData, Updated
from anycorn.protocol.h11 import H11Protocol
from anycorn.task_group import TaskGroup
from anycorn.typing import ConnectionState
from anycorn.worker_context import WorkerContext
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from supervisor.errors import ConfigurationError

__all__ = ["WebLimits", "WebServer", "WebStatistics"]

_log = logging.getLogger("supervisor.web")

_READ_BYTES = 1 << 16
_LINGER_BYTES = 1 << 20
_MAX_REFUSING = 64
_BETWEEN = frozenset({h11.IDLE, h11.DONE, h11.MUST_CLOSE})
_IN_A_ROW_BYTES = 256 << 10
_FULL = (
    b"HTTP/1.1 503 Service Unavailable\r\nconnection: close\r\nretry-after: 1\r\n"
    b"content-type: application/json\r\ncontent-length: %d\r\n\r\n%b"
)
_FULL_BODY = (
    b'{"error":{"kind":"too_many_connections","message":"as many requests are being answered as may be; try again",'
    b'"temporary":true,"retry_after_s":1}}'
)

_MISTAKES = {
    400: (b"invalid_request", b"this is not HTTP/1.1"),
    408: (b"timeout", b"the head of the request did not arrive in time"),
    431: (b"too_large", b"the head of the request is too large"),
    501: (b"unsupported", b"this transfer encoding is not known here"),
    505: (b"unsupported", b"only HTTP/1.1 is spoken here"),
}


@attrs.frozen(kw_only=True)
class WebLimits:
    """Every bound of the HTTP front. Times in seconds, sizes in bytes."""

    max_connections: int = 4096
    """Clients connected at the same time. One that has no request makes room; if there is none, 503."""
    max_head_bytes: int = 32 << 10
    """The head of a request, and what may be sent ahead while one is answered; more: 431."""
    max_body_bytes: int = 32 << 20
    """The body of a request; a larger one: 413."""
    bodies_bytes: int = 256 << 20
    """The bodies of all requests that are being answered; one more: 503."""
    large_answers: int = 16
    """Answers that may be large (snapshots, long lists) that are made at the same time; more of them wait."""
    answers_bytes: int = 256 << 20
    """Large answers that wait for their clients to take them, together; one more: 503."""
    head_s: float = 10.0
    """From the first byte of a request to the end of its head; longer: 408."""
    idle_s: float = 75.0
    """How long a connection is kept for a next request."""
    body_s: float = 60.0
    """From the end of a head to the end of the body; longer: 408."""
    send_s: float = 30.0
    """How long a client may take to take a piece of an answer; longer, and it is dropped."""
    keep_alive_s: float = 15.0
    """Silence after which a client that waits for events is sent a comment."""
    leave_s: float = 5.0
    """How long the answering may go on for a client that has left."""
    linger_s: float = 1.0
    """How long what a client still sends is read when the connection is ended, so that the answer gets there."""

    def __attrs_post_init__(self) -> None:
        for name, value in attrs.asdict(self).items():
            if not 0 < value < float("inf"):
                raise ConfigurationError(name, value, "a number above 0")


@attrs.frozen(kw_only=True)
class WebStatistics:
    """The front's figures at one moment. Counts are since the server was made."""

    connections: int
    busy: int
    """Connections with a request that is being answered."""
    body_bytes: int
    """Held of the bodies of requests."""
    requests: int
    refused_full: int
    made_room: int
    """Connections without a request that were closed for others to come in."""
    timeouts: int
    """Heads and bodies that did not arrive in time."""
    stalled: int
    """Clients that did not take what was sent to them in time."""
    protocol_errors: int
    crashes: int
    """Connections that ended by an exception nobody expected."""


@attrs.define
class _Counts:
    requests: int = 0
    refused_full: int = 0
    made_room: int = 0
    timeouts: int = 0
    stalled: int = 0
    protocol_errors: int = 0
    crashes: int = 0


class WebServer:
    """Serves an ASGI application. Serve with `run`, or one connection at a time with `handle`."""

    def __init__(self, app: ASGIApp, *, limits: WebLimits | None = None) -> None:
        self.app = app
        self.limits = WebLimits() if limits is None else limits
        self.counts = _Counts()
        self.body_bytes = 0
        """Held of the bodies of requests."""
        self.context = WorkerContext(None)
        self.config = anycorn.config.Config()
        self.config.include_server_header = False
        self.config.errorlog = _log
        self.config.h11_max_incomplete_size = self.limits.max_head_bytes
        self.idle: OrderedDict[_Connection, None] = OrderedDict()
        """The connections without a request, the one that has been so for the longest first."""
        self.ports: tuple[int, ...] = ()
        """The ports listened on, once `run` has started."""
        self._connections: set[_Connection] = set()
        self._refusing = 0
        self._ended = trio.Event()

    def __repr__(self) -> str:
        return f"<WebServer on {self.ports}: {len(self._connections)} connections, {len(self.idle)} idle>"

    def statistics(self) -> WebStatistics:
        """Return the front's figures."""
        return WebStatistics(
            connections=len(self._connections),
            busy=len(self._connections) - len(self.idle),
            body_bytes=self.body_bytes,
            **attrs.asdict(self.counts),
        )

    async def run(  # noqa: ASYNC114  # no context manager starts it
        self,
        host: str = "127.0.0.1",
        port: int = 0,
        *,
        task_status: trio.TaskStatus[tuple[int, ...]] = trio.TASK_STATUS_IGNORED,
    ) -> NoReturn:
        """Listen and serve until cancelled; report the ports as started. Raises OSError if it cannot listen."""
        listeners = await trio.open_tcp_listeners(port, host=host)
        self.ports = tuple(listener.socket.getsockname()[1] for listener in listeners)
        task_status.started(self.ports)
        await trio.serve_listeners(self.handle, listeners)

    async def end(self) -> None:
        """Close connections without a request, and each other one after its answer; return when there is none left.

        Cancelled before that, it leaves the rest as they are.
        """
        await self.context.terminated.set()
        for connection in tuple(self.idle):
            connection.reading.cancel(reason="the server is ending")
        while self._connections:
            self._ended = trio.Event()
            await self._ended.wait()

    async def handle(self, transport: trio.SocketStream) -> None:
        """Serve one connection to its end. Raises nothing but `trio.Cancelled`."""
        if self.context.terminated.is_set():
            await trio.aclose_forcefully(transport)
            return
        if len(self._connections) >= self.limits.max_connections and not self._make_room():
            self.counts.refused_full += 1
            await self._refuse(transport)
            return
        connection = _Connection(self, transport)
        self._connections.add(connection)
        self.idle[connection] = None
        try:
            await connection.run()
        except* Exception:  # noqa: BLE001  # the boundary: one connection's error must not reach another
            self.counts.crashes += 1
            _log.exception("a connection ended by an unexpected error")
        finally:
            self._connections.discard(connection)
            self.idle.pop(connection, None)
            self._ended.set()

    def _make_room(self) -> bool:
        """End the connection that has been without a request for the longest. False if there is none."""
        if not self.idle:
            return False
        connection, _ = self.idle.popitem(last=False)
        self._connections.discard(connection)
        self.counts.made_room += 1
        connection.drop()
        return True

    async def _refuse(self, transport: trio.SocketStream) -> None:
        """Say that there is no room; to so many at the same time, that is: the others are told nothing."""
        self._refusing += 1
        try:
            if self._refusing <= _MAX_REFUSING:
                with trio.move_on_after(self.limits.linger_s):
                    await transport.send_all(_FULL % (len(_FULL_BODY), _FULL_BODY))
                    await _linger(transport)
        except (trio.BrokenResourceError, trio.ClosedResourceError, OSError):
            pass
        finally:
            self._refusing -= 1
            await trio.aclose_forcefully(transport)


async def _linger(transport: trio.SocketStream) -> None:
    """Say that nothing more will come, and read away what still does, for a reset would take the answer with it."""
    await transport.send_eof()
    read = 0
    while read < _LINGER_BYTES and (data := await transport.receive_some(_READ_BYTES)):
        read += len(data)


# --- one connection --------------------------------------------------------------------------------------------------


class _Left(Exception):  # noqa: N818  # it is no error
    """The client has closed the connection, or has sent more than it may while it is being answered."""


class _H11(h11.Connection):
    """h11's, which takes no offence at what clients send behind a request (RFC 9112, 2.2 and 9.6)."""

    def next_event(self) -> h11.Event | type[h11.NEED_DATA | h11.PAUSED]:
        buffer = self._receive_buffer
        if buffer and self.their_state in _BETWEEN:
            ahead = bytes(buffer)
            # No request may follow a last one; before another there may be empty lines.
            kept = b"" if self.their_state is h11.MUST_CLOSE else ahead.lstrip(b"\r\n")
            if len(kept) < len(ahead):
                buffer.maybe_extract_at_most(len(ahead) - len(kept))
        return super().next_event()


class _Protocol(H11Protocol):
    """anycorn's, without the ways out of HTTP/1.1."""

    counts: _Counts

    async def _check_protocol(self, event: h11.Request) -> None:
        """Take no notice of an upgrade to HTTP/2, nor of its preface."""

    async def _send_error_response(self, status_code: int) -> None:
        """Refuse what is no request, in words."""
        self.counts.protocol_errors += status_code != 408
        kind, message = _MISTAKES.get(status_code, _MISTAKES[400])
        body = b'{"error":{"kind":"%b","message":"%b","temporary":false,"retry_after_s":null}}' % (
            kind,
            message,
        )
        headers = [
            (b"content-type", b"application/json"),
            (b"content-length", b"%d" % len(body)),
            (b"connection", b"close"),
        ]
        await self._send_h11_event(h11.Response(status_code=status_code, headers=headers))
        await self._send_h11_event(h11.Data(data=body))
        await self._send_h11_event(h11.EndOfMessage())

    async def _create_stream(self, request: h11.Request) -> None:
        if request.http_version not in {b"1.0", b"1.1"}:
            await self._send_error_response(505)
            await self.send(Closed())
            return
        names = {name for name, _ in request.headers}
        if names >= {b"content-length", b"transfer-encoding"}:  # who is before us may go by the other one
            await self._send_error_response(400)
            await self.send(Closed())
            return
        if b"upgrade" in names:
            request = h11.Request(
                method=request.method,
                target=request.target,
                headers=[(name, value) for name, value in request.headers if name != b"upgrade"],
                http_version=request.http_version,
            )
        await super()._create_stream(request)


class _Pause:
    """What anycorn waits for when a request is pipelined: here it goes on reading, or nobody would see the client leave."""

    def __init__(self, connection: _Connection) -> None:
        self._connection = connection
        self._over = False
        self._reading = trio.CancelScope()

    async def clear(self) -> None:
        self._over = False

    async def set(self) -> None:
        self._over = True
        self._reading.cancel()

    def is_set(self) -> bool:
        return self._over

    async def wait(self) -> None:
        connection, read = self._connection, 0
        with trio.CancelScope() as self._reading:
            while not self._over:
                data = await connection.receive()
                read += len(data)
                if read > connection.limits.max_head_bytes:
                    connection.server.counts.protocol_errors += 1
                    raise _Left
                connection.protocol.connection.receive_data(data)


class _Connection:
    """One client. Three parties: the reader (`_read`), the application's task, and the deadline of `reading`."""

    def __init__(self, server: WebServer, transport: trio.SocketStream) -> None:
        self.server = server
        self.limits = server.limits
        self.protocol: _Protocol
        self.reading = trio.CancelScope()
        """Around all reading: to cancel it is to end the connection, its deadline is that of the next request."""
        self._transport = transport
        self._sending = trio.Lock()
        self._begun = False
        """Whether something of the next request has arrived."""
        self._gathering = False
        self._gathered = b""
        self._in_a_row = 0
        """Bytes sent since anybody else had a turn."""
        self._dead = False
        """Whether there is no point in sending."""

    async def run(self) -> None:
        transport = self._transport
        try:
            client = _peer(transport.socket.getpeername())
            here = _peer(transport.socket.getsockname())
            with trio.CancelScope() as self._scope:
                async with TaskGroup() as tasks:
                    server = self.server
                    self.protocol = _Protocol(
                        self._serve,  # type: ignore[arg-type]  # anycorn types messages more closely than ASGI does
                        server.config,
                        server.context,
                        tasks,
                        ConnectionState({}),
                        client,
                        here,
                        self._send,
                        None,
                    )
                    self.protocol.connection = _H11(
                        h11.SERVER, max_incomplete_event_size=self.limits.max_head_bytes
                    )
                    self.protocol.counts = server.counts
                    self.protocol.can_read = _Pause(self)
                    await self._read()
                    self._scope.deadline = trio.current_time() + self.limits.leave_s
                    await self.protocol.handle(Closed())
            if self._begun and not self._dead:
                with trio.move_on_after(self.limits.linger_s):
                    await _linger(transport)
        except (trio.BrokenResourceError, trio.ClosedResourceError, OSError):
            pass
        finally:
            await trio.aclose_forcefully(transport)

    def drop(self) -> None:
        """End it, with no more words."""
        self._dead = True
        self.reading.cancel(reason="it was dropped")

    async def receive(self) -> bytes:
        """Return what the client sends next. Raises _Left."""
        try:
            data = await self._transport.receive_some(_READ_BYTES)
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            data = b""
        if not data:
            self._dead = True
            raise _Left
        return data

    async def _read(self) -> None:
        """Hand what arrives to the protocol, until the client leaves or the connection is to end."""
        with self.reading:
            self.reading.deadline = trio.current_time() + self.limits.idle_s
            while True:
                try:
                    data = await self.receive()
                    if not self._begun and data.strip(b"\r\n"):
                        self._begun = True
                        self.reading.deadline = trio.current_time() + self.limits.head_s
                    await self.protocol.handle(RawData(bytes(data)))
                except _Left:
                    return
        if self._begun and self in self.server.idle:  # its time is over
            self.server.counts.timeouts += 1
            with trio.move_on_after(self.limits.linger_s):
                await self.protocol._send_error_response(408)  # noqa: SLF001  # as it answers a head that is too large

    async def _send(self, event: Event) -> None:
        """Do what the protocol says."""
        if isinstance(event, RawData):
            if self._gathering:
                self._gathered += event.data
            else:
                await self._write(event.data)
            return
        await self._flush()
        if isinstance(event, Updated):
            idle = self.server.idle
            if event.idle:
                self._begun = False
                idle[self] = None
                self.reading.deadline = trio.current_time() + self.limits.idle_s
            else:
                self._begun = True
                idle.pop(self, None)
                self.reading.deadline = float("inf")
        elif isinstance(event, Closed):
            self.reading.cancel(reason="the protocol has ended the connection")

    async def _flush(self) -> None:
        """Send what has been gathered."""
        data, self._gathered = self._gathered, b""
        await self._write(data)

    async def _write(self, data: bytes) -> None:
        """Send a piece of an answer: at once what the socket takes at once, which spares a task switch; the rest in `send_s`."""
        if not data:
            return
        if self._dead:
            await trio.lowlevel.checkpoint()  # an application that sends on and on must get to hear of it
            return
        sent = 0
        if not self._sending.locked():
            try:
                sent = os.write(self._transport.socket.fileno(), data)  # trio's own `send` is a checkpoint
            except BlockingIOError:
                pass
            except OSError:
                self.drop()
                return
            if sent == len(data):
                self._in_a_row += sent
                if self._in_a_row > _IN_A_ROW_BYTES:
                    self._in_a_row = 0
                    await trio.lowlevel.checkpoint()
                return
        self._in_a_row = 0
        async with self._sending:
            whole = False
            try:
                with trio.fail_after(self.limits.send_s):
                    await self._transport.send_all(memoryview(data)[sent:])
                whole = True
            except trio.TooSlowError:
                self.server.counts.stalled += 1
            except (trio.BrokenResourceError, trio.ClosedResourceError):
                pass
            finally:
                if not whole:  # what has been cut short cannot be gone on with
                    self.drop()

    async def _serve(
        self,
        scope: Scope,
        receive: Receive,
        send: Send,
        _run_sync: object,
        _call_soon: object,
    ) -> None:
        """Have a request answered, its body within its limits."""
        self.server.counts.requests += 1
        scope["extensions"] = {}  # of which we have none
        body = _Body(self.server, scope, receive)

        async def gathered(message: Message) -> None:
            """Pass a message on; what comes of it is sent at once, and a head with the first piece of its body."""
            self._gathering = True
            if body.unread and message["type"] == "http.response.start":
                message = {**message, "headers": [*message.get("headers", ()), (b"connection", b"close")]}
            try:
                await send(message)
            finally:
                self._gathering = False
            if message["type"] != "http.response.start":
                await self._flush()

        try:
            await self.server.app(scope, body.receive, gathered)
        finally:
            body.forget()


class _Body:
    """The body of a request on its way to the application: how much there is, and how long it takes."""

    def __init__(self, server: WebServer, scope: Scope, receive: Receive) -> None:
        self._server = server
        self._receive = receive
        self._deadline = trio.current_time() + server.limits.body_s
        self._size = 0
        self._whole = False
        self._stated = next((value for name, value in scope["headers"] if name == b"content-length"), b"0")
        self._chunked = any(name == b"transfer-encoding" for name, _ in scope["headers"])

    async def receive(self) -> Message:
        """Return what comes next. Raises HTTPException 413, 408 or 503; a cancel takes nothing."""
        if self._whole:
            return await self._receive()
        server, limits = self._server, self._server.limits
        if int(self._stated) > limits.max_body_bytes:
            raise self._too_large()
        message: Message | None = None
        with trio.move_on_at(self._deadline):
            message = await self._receive()
        if message is None:
            server.counts.timeouts += 1
            raise HTTPException(408, f"the body did not arrive within {limits.body_s:g} s")
        if message["type"] == "http.request":
            size = len(message.get("body", b""))
            self._size += size
            server.body_bytes += size
            self._whole = not message.get("more_body", False)
            if self._size > limits.max_body_bytes:
                raise self._too_large()
            if server.body_bytes > limits.bodies_bytes:
                raise HTTPException(
                    503,
                    "the bodies of the requests under way take all the room there is",
                    {"retry-after": "1"},
                )
        else:
            self._whole = True
        return message

    @property
    def unread(self) -> bool:
        """Whether some of it may be on its way still: what is answered before that ends the connection, and has to say so."""
        return not self._whole and (self._chunked or int(self._stated) > 0)

    def forget(self) -> None:
        """Hold it no more."""
        self._server.body_bytes -= self._size
        self._size = 0

    def _too_large(self) -> HTTPException:
        return HTTPException(413, f"a body may have at most {self._server.limits.max_body_bytes} bytes")


def _peer(address: Any) -> tuple[str, int] | None:
    return (address[0], address[1]) if isinstance(address, tuple) else None
