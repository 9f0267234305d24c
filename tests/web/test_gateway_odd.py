"""The gateway before upstreams that answer byte for byte as each test wants: large, by halves, encoded, or as no API does."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import httpx
import pytest
import trio

from tests.upstream.scripted import Peer, serve
from tests.web.gateways import WHOLE, Place, gateway_at, upstreams_at

ABOUT = "/v1/responses/resp_1"


@asynccontextmanager
async def saying(head: str, body: bytes = b"") -> AsyncIterator[tuple[Place, httpx.AsyncClient]]:
    """Serve before an upstream that says this to whatever it is asked, and closes."""

    async def answer(peer: Peer) -> None:
        await peer.request()
        await peer.send(f"HTTP/1.1 200 OK\r\n{head}connection: close\r\n\r\n".encode() + body)

    async with trio.open_nursery() as nursery:
        server = await serve(nursery, answer)
        url = f"http://127.0.0.1:{server.port}"
        async with gateway_at(upstreams=lambda _: upstreams_at(url)) as place, place.client() as client:
            yield place, client
        nursery.cancel_scope.cancel()


# --- whole answers ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("what", ["an answer", "what is kept"])
async def test_a_whole_answer_may_be_large(what: str) -> None:
    """What does not fit into a socket at once, and so is still being written when the last was told, comes whole."""
    body = json.dumps({"id": "x", "choices": [{"message": {"content": "a" * 4_000_000}}]}).encode()
    head = f"content-type: application/json\r\ncontent-length: {len(body)}\r\n"
    async with saying(head, body) as (_, client):
        path, asking = WHOLE["chat"]
        answer = await (client.get(ABOUT) if what == "what is kept" else client.post(path, json=asking))
        assert (answer.status_code, answer.content == body) == (200, True)
