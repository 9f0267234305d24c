"""A pooled connection that had gone: replaced without the stream, its journal or its outcome noticing."""

from __future__ import annotations

import pytest

from supervisor import open_supervisor
from supervisor.upstream import HttpSource, RetryPolicy, StreamTransport, Upstream

from .scripted import serve

BODY = b'data: {"choices":[{"delta":{"content":"hi"},"finish_reason":"stop"}]}\n\ndata: [DONE]\n\n'
HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nContent-Length: %d\r\n\r\n" % len(BODY)


@pytest.mark.parametrize("byte", [False, True])
async def test_a_stale_connection_is_no_attempt(nursery, byte):
    """It ends without an answer: the request is made again within the attempt. After a byte of one it is not."""

    async def handler(peer):
        await peer.request()
        await peer.send(HEAD + BODY)
        await peer.request()
        if byte:
            await peer.send(b"H")

    server = await serve(nursery, handler)
    upstream = Upstream(name="u", base_url=f"http://127.0.0.1:{server.port}", dialect="openai-chat")
    policy = RetryPolicy(attempts=1)
    async with open_supervisor() as sup, StreamTransport(trust_env=False) as transport:
        outcomes = []
        for _ in range(2):
            stream = await sup.start(HttpSource(upstream, {}, transport=transport, retry=policy))
            outcomes.append(await stream.wait())
        assert transport.statistics().retried == (not byte)
        assert server.connections == 1 + (not byte)
    assert [(str(one.state), one.attempts) for one in outcomes] == [
        ("completed", 1),
        ("failed" if byte else "completed", 1),
    ]
