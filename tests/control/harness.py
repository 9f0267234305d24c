"""A control server on loopback with scripted streams, and a peer that speaks raw frames, well or badly."""

from __future__ import annotations

import base64
import contextlib
import json
import os
import struct
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import attrs
import trio

from supervisor.control import ControlLimits, ControlServer, Resolved, ShutdownParams, StartParams
from supervisor.control.frames import OP_CLOSE, OP_PING, OP_TEXT, build_frame
from supervisor.control.session import Session
from supervisor.errors import ConfigurationError
from supervisor.stores import Store
from supervisor.streams import Deadlines, Limits, MemoryPolicy, Output, Supervisor, open_supervisor

SourceFunction = Callable[[Output], Awaitable[None]]


@attrs.define
class Scene:
    """A server under test."""

    supervisor: Supervisor
    server: ControlServer
    port: int
    nursery: trio.Nursery
    sources: dict[str, SourceFunction]
    shutdowns: list[ShutdownParams]
    started: list[StartParams]
    peers: list[Peer] = attrs.Factory(list)

    async def dial(self, **options: Any) -> Peer:
        """Connect a peer that sends nothing by itself."""
        peer = await Peer.dial(self.port, **options)
        self.peers.append(peer)
        return peer

    async def peer(self, **options: Any) -> Peer:
        """Connect a peer that has shaken hands."""
        peer = await self.dial(**options)
        await peer.stream.send_all(handshake(self.port))
        status, _ = await peer.head()
        assert status == 101
        return peer

    @property
    def url(self) -> str:
        return f"ws://127.0.0.1:{self.port}"


async def ten(out: Output) -> None:
    """Ten events of text, then the end."""
    for number in range(10):
        await out.send(f"t{number} ")


async def forever(out: Output) -> None:
    """One event of text, then nothing, until it is stopped."""
    await out.send("begun ")
    await trio.sleep_forever()


async def until(condition: Callable[[], bool]) -> None:
    """Let everybody else run until the condition holds."""
    while True:
        await trio.lowlevel.checkpoint()
        if condition():
            return


async def clog(scene: Scene) -> Session:
    """Fill the way to the one connected peer, which must not be reading, up to its outbox; return its session."""
    (session,) = scene.server.sessions
    outbox = session._link.outbox
    pong = build_frame(0xA, b"x" * 125)
    outbox.append(pong * (16 << 20 >> 7))  # the writer, and the kernel's buffers
    await until(lambda: not outbox.nbytes)
    outbox.append(pong * 4096)
    assert not outbox.has_room
    return session


@contextlib.asynccontextmanager
async def open_scene(
    *,
    limits: ControlLimits | None = None,
    token: str | None = None,
    shutdown: bool = True,
    supervisor_limits: Limits | None = None,
    store: Store | None = None,
    memory: MemoryPolicy | None = None,
) -> AsyncIterator[Scene]:
    """Serve a supervisor on loopback; its upstreams are the functions in `scene.sources`."""
    sources: dict[str, SourceFunction] = {"ten": ten, "forever": forever}
    shutdowns: list[ShutdownParams] = []
    started: list[StartParams] = []

    def resolve(params: StartParams) -> Resolved:
        started.append(params)
        if params.upstream not in sources:
            raise ConfigurationError("upstream", params.upstream, f"one of {sorted(sources)}")
        return Resolved(source=sources[params.upstream], deadlines=Deadlines(idle_s=7.0), meta={"model": "m"})

    async with open_supervisor(limits=supervisor_limits, store=store, memory=memory) as supervisor:
        async with trio.open_nursery() as nursery:
            server = ControlServer(
                supervisor,
                resolve=resolve,
                on_shutdown=shutdowns.append if shutdown else None,
                token=token,
                limits=limits,
            )
            (port,) = await nursery.start(server.run)
            scene = Scene(supervisor, server, port, nursery, sources, shutdowns, started)
            try:
                yield scene
            finally:
                with trio.CancelScope(shield=True):
                    for peer in scene.peers:
                        await trio.aclose_forcefully(peer.stream)
                nursery.cancel_scope.cancel()
        await supervisor.shutdown()


class Closed(Exception):  # noqa: N818  # an ending, not an error
    """The server closed the connection; `code` is None if it did so without a Close frame."""

    def __init__(self, code: int | None, reason: str = "") -> None:
        super().__init__(code, reason)
        self.code = code
        self.reason = reason


class Peer:
    """A client that sends what it is told, frame by frame or byte by byte."""

    def __init__(self, stream: trio.SocketStream) -> None:
        self.stream = stream
        self._buffer = bytearray()
        self._ids = 0

    @classmethod
    async def dial(cls, port: int, *, receive_buffer: int | None = None) -> Peer:
        """Connect, and send nothing."""
        if receive_buffer is None:
            return cls(await trio.open_tcp_stream("127.0.0.1", port))
        socket = trio.socket.socket()
        socket.setsockopt(trio.socket.SOL_SOCKET, trio.socket.SO_RCVBUF, receive_buffer)
        await socket.connect(("127.0.0.1", port))
        return cls(trio.SocketStream(socket))

    async def head(self) -> tuple[int, bytes]:
        """Read an HTTP head; return the status and what came after the head."""
        while b"\r\n\r\n" not in self._buffer:
            data = await self.stream.receive_some()
            if not data:
                raise Closed(None)
            self._buffer += data
        end = self._buffer.index(b"\r\n\r\n") + 4
        status = int(bytes(self._buffer[:end]).split(b" ")[1])
        del self._buffer[:end]
        return status, bytes(self._buffer)

    async def send(self, data: bytes) -> None:
        await self.stream.send_all(data)

    async def text(self, message: str | bytes) -> None:
        """Send a text message."""
        raw = message.encode() if isinstance(message, str) else message
        await self.send(build_frame(OP_TEXT, raw, mask=True))

    async def ask(self, method: str, **params: Any) -> int:
        """Send a request; return its id."""
        self._ids += 1
        await self.text(json.dumps({"jsonrpc": "2.0", "id": self._ids, "method": method, "params": params}))
        return self._ids

    async def tell(self, method: str, **params: Any) -> None:
        """Send a notification."""
        await self.text(json.dumps({"jsonrpc": "2.0", "method": method, "params": params}))

    async def call(self, method: str, **params: Any) -> dict[str, Any]:
        """Send a request and return the whole reply, leaving out what else comes before it."""
        call_id = await self.ask(method, **params)
        while (reply := await self.message()).get("id") != call_id:
            pass
        return reply

    async def frame(self) -> tuple[int, bytes]:
        """Read one frame. Raises Closed at the end, or for a Close frame."""
        while True:
            parsed = self._parse()
            if parsed is not None:
                opcode, payload = parsed
                if opcode == OP_CLOSE:
                    code = struct.unpack("!H", payload[:2])[0] if payload else None
                    raise Closed(code, payload[2:].decode())
                return opcode, payload
            try:
                data = await self.stream.receive_some()
            except trio.BrokenResourceError:
                raise Closed(None) from None
            if not data:
                raise Closed(None)
            self._buffer += data

    async def message(self) -> Any:
        """Read the next text message, past any Ping."""
        while True:
            opcode, payload = await self.frame()
            if opcode == OP_TEXT:
                return json.loads(payload)
            assert opcode in {OP_PING, 0xA}

    async def closed(self) -> Closed:
        """Read on to the end; return how it came."""
        try:
            while True:
                await self.frame()
        except Closed as ending:
            return ending

    async def closed_after_anything(self) -> None:
        """Read whatever is said, such as a refusal in HTTP, up to the end."""
        try:
            while await self.stream.receive_some():
                pass
        except trio.BrokenResourceError:
            pass

    def _parse(self) -> tuple[int, bytes] | None:
        buffer = self._buffer
        if len(buffer) < 2:
            return None
        length, start = buffer[1], 2
        assert length < 128, "a server does not mask"
        if length == 126:
            if len(buffer) < 4:
                return None
            (length,) = struct.unpack_from("!H", buffer, 2)
            start = 4
        elif length == 127:
            if len(buffer) < 10:
                return None
            (length,) = struct.unpack_from("!Q", buffer, 2)
            start = 10
        if len(buffer) < start + length:
            return None
        payload = bytes(buffer[start : start + length])
        opcode = buffer[0] & 15
        del buffer[: start + length]
        return opcode, payload


def handshake(port: int, *headers: str, subprotocol: str | None = "stream-supervisor.v1") -> bytes:
    """Return an upgrade request."""
    lines = [
        "GET / HTTP/1.1",
        f"Host: 127.0.0.1:{port}",
        "Connection: Upgrade",
        "Upgrade: websocket",
        "Sec-WebSocket-Version: 13",
        f"Sec-WebSocket-Key: {base64.b64encode(os.urandom(16)).decode()}",
        *([] if subprotocol is None else [f"Sec-WebSocket-Protocol: {subprotocol}"]),
        *headers,
    ]
    return "\r\n".join([*lines, "", ""]).encode()
