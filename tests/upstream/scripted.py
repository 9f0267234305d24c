"""A raw TCP server for the transport's tests: what it says, byte for byte, is written in each test.

It knows no HTTP beyond finding the end of a request, so that it can be as wrong as a test needs it to be.
"""

from __future__ import annotations

import ssl
from collections.abc import Awaitable, Callable
from typing import Literal

import trio

Handler = Callable[["Peer"], Awaitable[None]]


class Peer:
    """The server's end of one connection."""

    def __init__(self, stream: trio.abc.Stream, raw: trio.SocketStream, number: int) -> None:
        self.stream = stream
        self.raw = raw
        self.number = number
        self.buffer = b""

    async def request(self) -> tuple[bytes, bytes]:
        """Read one request; return its head (without the empty line) and its body."""
        while b"\r\n\r\n" not in self.buffer:
            await self._more()
        head, _, self.buffer = self.buffer.partition(b"\r\n\r\n")
        length = 0
        for line in head.split(b"\r\n"):
            name, _, value = line.partition(b":")
            if name.lower() == b"content-length":
                length = int(value)
        while len(self.buffer) < length:
            await self._more()
        body, self.buffer = self.buffer[:length], self.buffer[length:]
        return head, body

    async def _more(self) -> None:
        data = await self.stream.receive_some()
        if not data:
            raise EOFError
        self.buffer += data

    async def send(self, data: bytes) -> None:
        await self.stream.send_all(data)

    async def answer(self, body: bytes = b"ok", *, extra: bytes = b"") -> None:
        """Send a whole, reusable answer."""
        await self.send(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n%s\r\n%s" % (len(body), extra, body))

    async def closed(self) -> Literal["eof", "reset"]:
        """Wait until the other side has closed, dropping what it sent before."""
        try:
            while await self.raw.receive_some():
                pass
        except trio.BrokenResourceError:
            return "reset"
        return "eof"

    async def cut(self) -> None:
        """Close without a goodbye: under TLS no close_notify."""
        await self.raw.aclose()


class Server:
    """A listener on loopback, with one task per connection running the test's handler."""

    def __init__(self, port: int, *, tls: bool) -> None:
        self.port = port
        self.url = f"{'https' if tls else 'http'}://127.0.0.1:{port}/v1/chat"
        self.connections = 0


async def serve(
    nursery: trio.Nursery,
    handler: Handler,
    *,
    ssl_context: ssl.SSLContext | Callable[[], ssl.SSLContext] | None = None,
) -> Server:
    """Listen on a free port; a function is asked for the context of each connection. A handler that meets the end of its connection is done; any other error is the test's."""
    listeners = await trio.open_tcp_listeners(0, host="127.0.0.1")
    server = Server(listeners[0].socket.getsockname()[1], tls=ssl_context is not None)

    async def connection(raw: trio.SocketStream) -> None:
        server.connections += 1
        stream: trio.abc.Stream = raw
        if ssl_context is not None:
            context = ssl_context if isinstance(ssl_context, ssl.SSLContext) else ssl_context()
            stream = trio.SSLStream(raw, context, server_side=True)
        peer = Peer(stream, raw, server.connections)
        try:
            await handler(peer)
        except* (EOFError, trio.BrokenResourceError, trio.ClosedResourceError):
            pass
        finally:
            await trio.aclose_forcefully(raw)

    nursery.start_soon(trio.serve_listeners, connection, listeners)
    return server
