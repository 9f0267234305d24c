"""The control channel's listener: who gets in, how many, and what one connection can do to the others (nothing).

Every connection is handled in a nursery of its own, and whatever comes out of that nursery, be it a bug of ours, an error
of trio-websocket's reader task or a hostile client's doing, is caught there, logged and counted: `trio.serve_listeners`
would otherwise end the listener, and every other connection with it.

Bounds: handshakes under way (`max_handshakes`; the oldest makes room, so that slow ones cannot keep others out), each at
most `handshake_s`; connections (`max_connections`; one more is refused with 503); and for each connection `LinkLimits` and
`SessionLimits`. Origin and token are checked before the handshake is accepted (`supervisor.control.auth`).
"""

from __future__ import annotations

import logging
import secrets
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NoReturn

import attrs
import trio
import trio_websocket

from supervisor.control.auth import Access, Token, require_safe_address
from supervisor.control.delivery import Deliveries, DeliveryStatistics
from supervisor.control.link import NORMAL, GuardedStream, Link, LinkLimits
from supervisor.control.messages import CLOSE_CODES, SUBPROTOCOL, CloseCode, ShutdownParams, StartParams
from supervisor.control.session import Session, SessionLimits
from supervisor.errors import AuthenticationError, ConfigurationError, ControlClosedError
from supervisor.observe import Figures
from supervisor.streams import Deadlines, Holder, Source, Supervisor
from supervisor.version import version

__all__ = ["ControlLimits", "ControlServer", "ControlStatistics", "Resolve", "Resolved", "serve"]

_log = logging.getLogger("supervisor.control")


@attrs.frozen(kw_only=True)
class ControlLimits:
    """Every bound of the channel. Times in seconds, sizes in bytes."""

    max_connections: int = 256
    max_handshakes: int = 64
    handshake_s: float = 5.0
    shared_bytes: int = 1 << 20
    """Encoded events kept for more subscribers of the same stream, of all connections together."""
    link: LinkLimits = attrs.field(factory=LinkLimits)
    session: SessionLimits = attrs.field(factory=SessionLimits)

    def __attrs_post_init__(self) -> None:
        for name, value in self.told().items():
            if not value > 0:
                raise ConfigurationError(name, value, "a number above 0")

    def told(self) -> dict[str, float]:
        """Return all limits by name, as `hello` tells them."""
        own = {"max_connections": self.max_connections, "max_handshakes": self.max_handshakes}
        return {
            **own,
            "handshake_s": self.handshake_s,
            "shared_bytes": self.shared_bytes,
            **attrs.asdict(self.link),
            **attrs.asdict(self.session),
        }


@attrs.frozen(kw_only=True)
class Resolved:
    """What a `stream.start` comes to: the source, and what goes with it."""

    source: Source
    deadlines: Deadlines | None = None
    """The clocks where the request states none; None: the supervisor's."""
    meta: Mapping[str, Any] = attrs.field(factory=dict)
    """Small facts for the record, such as the model asked for."""


Resolve = Callable[[StartParams], Resolved]
"""Turns the parameters of a `stream.start` into a source, at once. Raises ConfigurationError for what it cannot use."""


@attrs.frozen(kw_only=True)
class ControlStatistics:
    """The channel's figures at one moment. Counts are since the server was made."""

    connections: int
    handshakes: int
    subscriptions: int
    pending_requests: int
    bytes_held: int
    """What waits to be sent to clients, and what is kept of encoded batches."""
    largest_bytes: int
    """What waits to be sent to the client that is most behind."""
    accepted: int
    refused_unauthenticated: int
    refused_full: int
    failed_handshakes: int
    protocol_errors: int
    stalled: int
    silent: int
    handler_errors: int
    crashes: int
    delivery: DeliveryStatistics


@attrs.define
class Counts:
    """What a server counts."""

    accepted: int = 0
    refused_unauthenticated: int = 0
    refused_full: int = 0
    failed_handshakes: int = 0
    protocol_errors: int = 0
    stalled: int = 0
    silent: int = 0
    handler_errors: int = 0
    """Requests that failed in a way nobody expected."""
    crashes: int = 0
    """Connections that ended by an exception nobody expected."""


class Host:
    """What a session knows of the server it belongs to."""

    def __init__(
        self,
        supervisor: Supervisor,
        *,
        resolve: Resolve | None = None,
        on_shutdown: Callable[[ShutdownParams], None] | None = None,
        figures: Figures | None = None,
        limits: ControlLimits | None = None,
    ) -> None:
        self.supervisor = supervisor
        self.figures = figures
        self.limits = ControlLimits() if limits is None else limits
        self.on_shutdown = on_shutdown
        self.counts = Counts()
        self.deliveries = Deliveries(self.limits.shared_bytes)
        self.instance = secrets.token_hex(8)
        self.version = version()
        self.sessions: set[Session] = set()
        self.handshakes: dict[object, trio.CancelScope] = {}
        self.admitted: set[object] = set()
        self._resolve = resolve
        supervisor.memory.register("connections", Holder(held=lambda: self.bytes_held))

    @property
    def bytes_held(self) -> int:
        """What waits to be sent to clients, and what is kept of encoded batches."""
        return self.deliveries.bytes_held + sum(session.bytes_held for session in self.sessions)

    def resolve(self, params: StartParams) -> Resolved:
        """Turn the parameters into a source. Raises ConfigurationError."""
        if self._resolve is None:
            raise ConfigurationError("upstream", params.upstream, "nothing: this server has no upstreams")
        return self._resolve(params)

    def statistics(self) -> ControlStatistics:
        """Return the channel's figures."""
        return ControlStatistics(
            connections=len(self.sessions),
            handshakes=len(self.handshakes),
            subscriptions=sum(session.subscriptions for session in self.sessions),
            pending_requests=sum(session.pending for session in self.sessions),
            bytes_held=self.bytes_held,
            largest_bytes=max((session.bytes_held for session in self.sessions), default=0),
            delivery=self.deliveries.statistics(),
            **attrs.asdict(self.counts),
        )


class ControlServer(Host):
    """Serves the control channel of one supervisor. Serve with `run`, or one connection at a time with `handle`.

    `resolve` turns the parameters of a `stream.start` into a source; `on_shutdown` is called, once its reply is queued, for
    each `supervisor.shutdown`, and must not block; `figures` are what `supervisor.overview` tells. Without them those methods are
    refused.
    """

    def __init__(
        self,
        supervisor: Supervisor,
        *,
        resolve: Resolve | None = None,
        on_shutdown: Callable[[ShutdownParams], None] | None = None,
        figures: Figures | None = None,
        token: str | None = None,
        origins: Iterable[str] = (),
        limits: ControlLimits | None = None,
    ) -> None:
        super().__init__(supervisor, resolve=resolve, on_shutdown=on_shutdown, figures=figures, limits=limits)
        self._access = Access(token=None if token is None else Token(token), origins=frozenset(origins))
        self.ports: tuple[int, ...] = ()
        """The ports listened on, once `run` has started."""
        self.http: str | None = None
        """Where HTTP is served beside it, for those who ask here for that."""

    def __repr__(self) -> str:
        return f"<ControlServer on {self.ports}: {len(self.sessions)} connections>"

    async def run(  # noqa: ASYNC114  # no context manager starts it
        self,
        host: str = "127.0.0.1",
        port: int = 0,
        *,
        task_status: trio.TaskStatus[tuple[int, ...]] = trio.TASK_STATUS_IGNORED,
    ) -> NoReturn:
        """Listen and serve until cancelled; report the ports as started. Connections are then closed with 4000.

        Raises ConfigurationError if `host` reaches beyond this machine and there is no token, OSError if it cannot listen.
        """
        await require_safe_address(host, self._access.token)
        listeners = await trio.open_tcp_listeners(port, host=host)
        self.ports = tuple(listener.socket.getsockname()[1] for listener in listeners)
        task_status.started(self.ports)
        await trio.serve_listeners(self.handle, listeners)

    async def handle(self, transport: trio.abc.Stream) -> None:
        """Serve one connection to its end. Raises nothing but `trio.Cancelled`."""
        guard = GuardedStream(transport, client=False, limits=self.limits.link)
        guard.told_http = _for_http(self.http)
        try:
            await self._handle(guard)
        except* Exception as group:  # noqa: BLE001  # the boundary: one connection's error must not reach another
            if guard in self.admitted:
                self.counts.crashes += 1
                _log.error("a connection ended by an unexpected error", exc_info=group)
            else:  # wsproto and h11 raise all sorts of things for a handshake made to confuse them
                self.counts.failed_handshakes += 1
                _log.info("a handshake failed: %s", type(group.exceptions[0]).__name__)
        finally:
            self.admitted.discard(guard)
            await guard.shut(  # noqa: ASYNC102  # shields and bounds itself
                CloseCode.INTERNAL_ERROR, "an unexpected error"
            )

    async def _handle(self, guard: GuardedStream) -> None:
        async with trio.open_nursery() as nursery:
            socket = await self._handshake(nursery, guard)
            if socket is not None:
                link = Link(socket, guard, self.limits.link, client=False)
                await self._serve(link)
            nursery.cancel_scope.cancel()

    async def _serve(self, link: Link) -> None:
        session = Session(link, self)
        self.sessions.add(session)
        code, reason = CloseCode.GOING_AWAY, "the server is going away"  # what holds if we are cancelled
        try:
            try:
                await session.run()
            except* ControlClosedError as group:
                code, reason = self._ended(_first(group))
            except* Exception:
                code, reason = CloseCode.INTERNAL_ERROR, "an unexpected error"
                raise
        finally:
            self.sessions.discard(session)
            await link.close(code, reason)  # noqa: ASYNC102  # shields and bounds itself

    def _ended(self, ending: ControlClosedError) -> tuple[int, str]:
        """Count how a connection ended; return what to close it with."""
        if ending.code is None or ending.code not in CLOSE_CODES:  # the client left
            return NORMAL, ""
        if ending.code == CloseCode.STALLED:
            self.counts.stalled += 1
        elif ending.code == CloseCode.HEARTBEAT:
            self.counts.silent += 1
        else:
            self.counts.protocol_errors += 1
        _log.info("a connection was dropped: %s", ending)
        return ending.code, ending.reason

    # --- the handshake -----------------------------------------------------------------------------------------------

    async def _handshake(
        self, nursery: trio.Nursery, guard: GuardedStream
    ) -> trio_websocket.WebSocketConnection | None:
        """Read, judge and answer one handshake. None if it came to nothing."""
        while len(self.handshakes) >= self.limits.max_handshakes:
            oldest = next(iter(self.handshakes))
            self.handshakes.pop(oldest).cancel()
        socket = None
        with trio.move_on_after(self.limits.handshake_s) as scope:
            self.handshakes[guard] = scope
            try:
                nursery.start_soon(_cancel_when_over, guard, scope)
                socket = await self._answer(nursery, guard)
            finally:
                self.handshakes.pop(guard, None)
        if socket is None:
            self.counts.failed_handshakes += 1
        return socket

    async def _answer(
        self, nursery: trio.Nursery, guard: GuardedStream
    ) -> trio_websocket.WebSocketConnection | None:
        request = await trio_websocket.wrap_server_stream(
            nursery,
            guard,
            message_queue_size=8,
            max_message_size=self.limits.link.max_message_bytes,
            receive_buffer_size=None,
        )
        try:
            self._access.check(request.headers)
        except AuthenticationError as error:
            self.counts.refused_unauthenticated += 1
            _log.warning("a connection was refused: %s", error)
            await request.reject(
                401, extra_headers=[(b"WWW-Authenticate", b"Bearer")], body=str(error).encode()
            )
            return None
        if SUBPROTOCOL not in request.proposed_subprotocols:
            await request.reject(400, body=b"the subprotocol must be " + SUBPROTOCOL.encode())
            return None
        if len(self.admitted) >= self.limits.max_connections:
            self.counts.refused_full += 1
            await request.reject(503, extra_headers=[(b"Retry-After", b"1")], body=b"too many connections")
            return None
        self.admitted.add(guard)
        socket = await request.accept(subprotocol=SUBPROTOCOL)
        guard.opened()
        self.counts.accepted += 1
        return socket


def _for_http(http: str | None) -> bytes:
    """Return the answer to a request that is not for a WebSocket."""
    where = "" if http is None else f" HTTP is served at {http}"
    told = (
        f"This is the control channel of stream-supervisor, which is for WebSocket clients.{where}\n".encode()
    )
    return (
        b"HTTP/1.1 426 Upgrade Required\r\nUpgrade: websocket\r\nConnection: upgrade, close\r\n"
        b"Content-Type: text/plain; charset=utf-8\r\nContent-Length: %d\r\n\r\n%b" % (len(told), told)
    )


async def _cancel_when_over(guard: GuardedStream, scope: trio.CancelScope) -> None:
    """End a handshake whose peer has gone or was refused: trio-websocket would wait on for its request."""
    await guard.over.wait()
    scope.cancel()


def _first(group: BaseExceptionGroup[ControlClosedError]) -> ControlClosedError:
    first = group.exceptions[0]
    return _first(first) if isinstance(first, BaseExceptionGroup) else first


async def serve(  # noqa: ASYNC128  # `run` reports as started
    supervisor: Supervisor,
    *,
    host: str = "127.0.0.1",
    port: int = 0,
    resolve: Resolve | None = None,
    on_shutdown: Callable[[ShutdownParams], None] | None = None,
    token: str | None = None,
    origins: Iterable[str] = (),
    limits: ControlLimits | None = None,
    task_status: trio.TaskStatus[tuple[int, ...]] = trio.TASK_STATUS_IGNORED,
) -> NoReturn:
    """Serve a supervisor's control channel until cancelled: `ControlServer(...).run(...)` in one call."""
    server = ControlServer(
        supervisor, resolve=resolve, on_shutdown=on_shutdown, token=token, origins=origins, limits=limits
    )
    await server.run(host, port, task_status=task_status)
