"""A server on loopback, and a client that sends bytes as they are given and reads answers with h11."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any, Self

import attrs
import h11
import msgspec
import trio
from starlette.types import ASGIApp

from supervisor.web.server import WebLimits, WebServer

WAIT_S = 20.0


@asynccontextmanager
async def serving(app: ASGIApp, **limits: Any) -> AsyncIterator[WebServer]:
    """Serve an application for the length of a block."""
    server = WebServer(app, limits=WebLimits(**limits))
    with trio.fail_after(WAIT_S):
        async with trio.open_nursery() as nursery:
            await nursery.start(server.run)
            yield server
            nursery.cancel_scope.cancel()


@attrs.frozen
class Answer:
    """What came back."""

    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return msgspec.json.decode(self.body)

    @property
    def kind(self) -> str:
        """Of an error."""
        return str(self.json["error"]["kind"])


class Client:
    """One connection."""

    def __init__(self, stream: trio.SocketStream) -> None:
        self.stream = stream
        self._reader = h11.Connection(h11.CLIENT)

    @classmethod
    @asynccontextmanager
    async def of(cls, server: WebServer, *, receive_buffer: int | None = None) -> AsyncIterator[Self]:
        socket = trio.socket.socket()
        if receive_buffer is not None:
            socket.setsockopt(trio.socket.SOL_SOCKET, trio.socket.SO_RCVBUF, receive_buffer)
        await socket.connect(("127.0.0.1", server.ports[0]))
        stream = trio.SocketStream(socket)
        try:
            yield cls(stream)
        finally:
            await trio.aclose_forcefully(stream)

    async def send(self, data: bytes) -> None:
        await self.stream.send_all(data)

    async def ask(
        self, method: str, target: str, *, headers: dict[str, str] | None = None, body: bytes = b""
    ) -> Answer:
        given = {"host": "localhost", "content-length": str(len(body)), **(headers or {})}
        head = "".join(f"{name}: {value}\r\n" for name, value in given.items())
        await self.send(f"{method} {target} HTTP/1.1\r\n{head}\r\n".encode("latin-1") + body)
        return await self.answer(method)

    async def event(self, method: str = "GET") -> Any:
        """Return the next h11 event of an answer."""
        if self._reader.our_state is h11.IDLE:  # what was sent went past h11: say what it may expect
            self._reader.send(h11.Request(method=method, target="/", headers=[("host", "x")]))
            self._reader.send(h11.EndOfMessage())
        while (event := self._reader.next_event()) is h11.NEED_DATA:
            self._reader.receive_data(await self.stream.receive_some(65536))
        return event

    async def answer(self, method: str = "GET") -> Answer:
        """Read one whole answer."""
        head = await self.event(method)
        body = await self.rest()
        headers = {name.decode(): value.decode("latin-1") for name, value in head.headers}
        return Answer(head.status_code, headers, body)

    async def rest(self) -> bytes:
        """Read an answer whose head has been read to its end; return what is left of its body."""
        body = bytearray()
        while not isinstance(event := await self.event(), h11.EndOfMessage):
            body += event.data
        if self._reader.their_state is h11.DONE:
            self._reader.start_next_cycle()
        return bytes(body)

    async def cut_short(self) -> bytes:
        """Read an answer that is never complete, up to where it breaks off; return its body."""
        body = bytearray()
        try:
            while True:
                event = await self.event()
                if isinstance(event, h11.Data):
                    body += event.data
                assert not isinstance(event, h11.EndOfMessage), "it was complete"
        except (h11.RemoteProtocolError, trio.BrokenResourceError):
            return bytes(body)

    async def closed(self) -> bytes:
        """Read until the server has closed the connection; return what came before that."""
        data = bytearray()
        while more := await self.stream.receive_some(65536):
            data += more
        return bytes(data)
