"""The HTTP listener: what reaches the application, and what one client can do to the others (nothing)."""

from __future__ import annotations

import trio
import trio.testing
from starlette.requests import Request
from starlette.responses import PlainTextResponse
from starlette.types import Receive, Scope, Send

from tests.web.wire import Client, serving


async def echo(scope: Scope, receive: Receive, send: Send) -> None:
    body = await Request(scope, receive).body()
    await PlainTextResponse(body)(scope, receive, send)


async def test_one_connection_carries_several_requests() -> None:
    """Requests after each other on one connection are each answered, and the connection counts once."""
    async with serving(echo) as server, Client.of(server) as client:
        for word in (b"one", b"two"):
            await client.send(b"POST / HTTP/1.1\r\nhost: x\r\ncontent-length: 3\r\n\r\n" + word)
            answer = await client.answer()
            assert (answer.status, answer.body) == (200, word)
        await trio.testing.wait_all_tasks_blocked()
        figures = server.statistics()
        assert (figures.connections, figures.requests, figures.body_bytes) == (1, 2, 0)
