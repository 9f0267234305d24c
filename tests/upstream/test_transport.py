"""The transport on plain sockets: heads, bodies, endings, cancels and reuse, seen from both ends."""

from __future__ import annotations

import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import httpx
import pytest
import trio
import trio.testing

from supervisor.errors import (
    ConfigurationError,
    ConnectError,
    RemoteProtocolError,
    UpstreamClosedError,
)
from supervisor.upstream.exchange import Exchange
from supervisor.upstream.transport import RACE_S, StreamTransport

from .scripted import Peer, serve

CHUNKED = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"


@pytest.fixture
async def transport() -> AsyncIterator[StreamTransport]:
    async with StreamTransport(trust_env=False) as transport:
        yield transport


def post(url: str, content: bytes = b"{}", **kwargs) -> httpx.Request:
    return httpx.Request("POST", url, content=content, **kwargs)


async def everything(exchange: Exchange) -> bytes:
    parts = []
    while part := await exchange.receive():
        parts.append(part)
    return b"".join(parts)


def answering(*pieces: bytes, close: bool = False) -> Callable[[Peer], Awaitable[None]]:
    """Return a handler that answers each request with these pieces, each sent when the one before has been taken."""

    async def handler(peer: Peer) -> None:
        while True:
            await peer.request()
            for piece in pieces:
                await peer.send(piece)
            if close:
                return

    return handler


# --- heads -----------------------------------------------------------------------------------------------------------


async def test_request_as_sent_and_response_as_received(nursery, transport):
    """The request arrives as httpx described it, once, with our own framing; the response shows status and headers."""
    seen = []

    async def handler(peer):
        seen.append(await peer.request())
        await peer.send(b"HTTP/1.1 429 Slow Down\r\nRetry-After: 7\r\nContent-Length: 3\r\n\r\nno!")

    server = await serve(nursery, handler)
    exchange = await transport.open(
        post(f"{server.url}?a=b%20c", b'{"x":1}', headers={"Authorization": "Bearer k", "X-Padded": "  v  "})
    )
    assert exchange.status == 429
    assert exchange.reason == b"Slow Down"
    assert exchange.headers["retry-after"] == "7"
    assert await everything(exchange) == b"no!"
    await exchange.aclose()
    head, body = seen[0]
    lines = head.split(b"\r\n")
    assert lines[0] == b"POST /v1/chat?a=b%20c HTTP/1.1"
    assert b"Authorization: Bearer k" in lines
    assert b"X-Padded: v" in lines
    assert [line for line in lines if line.lower().startswith(b"content-length")] == [b"Content-Length: 7"]
    assert body == b'{"x":1}'


async def test_callers_framing_headers_are_replaced(nursery, transport):
    """A caller's own Content-Length and Transfer-Encoding never reach the wire, so it cannot smuggle a request."""
    seen = []

    async def handler(peer):
        seen.append(await peer.request())
        await peer.answer()

    server = await serve(nursery, handler)
    request = post(server.url, b"12345", headers={"Content-Length": "1", "Transfer-Encoding": "chunked"})
    exchange = await transport.open(request)
    exchange.abort()
    head, body = seen[0]
    assert b"chunked" not in head
    assert body == b"12345"


async def test_streamed_request_bodies_are_read_first(nursery, transport):
    """A body given as an async iterator is sent whole, with a Content-Length."""
    seen = []

    async def handler(peer):
        seen.append(await peer.request())
        await peer.answer()

    async def pieces():
        yield b"ab"
        await trio.lowlevel.checkpoint()
        yield b"cd"

    server = await serve(nursery, handler)
    async with httpx.AsyncClient(transport=transport) as client:
        response = await client.post(server.url, content=pieces())
    assert response.text == "ok"
    assert seen[0][1] == b"abcd"


@pytest.mark.parametrize("where", ["value", "name", "method"])
@pytest.mark.parametrize("bad", ["\r\nX-Evil: 1", "\nX", "\rX", "\x00"])
async def test_header_injection_is_refused_without_showing_the_value(nursery, transport, where, bad):
    """Nothing that would leave its line is sent, no connection is made, and the message does not quote the secret."""
    server = await serve(nursery, answering(b""))
    request = post(server.url)
    if where == "method":
        request.method = f"POST{bad}"
    else:
        pair = ("Authorization", f"Bearer s3cret{bad}") if where == "value" else (f"X-A{bad}", "v")
        request.headers = httpx.Headers([(b"Host", b"h"), (pair[0].encode(), pair[1].encode())])
    with pytest.raises(ConfigurationError) as caught:
        await transport.open(request)
    assert "s3cret" not in f"{caught.value!r} {caught.value.__cause__!r} {caught.value.__context__!r}"
    assert server.connections == 0
    assert transport.statistics().opened == 0


async def test_informational_responses_are_skipped(nursery, transport):
    """100 and 103 responses before the answer are not the answer."""
    head = b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 103 Early Hints\r\nLink: x\r\n\r\n"
    server = await serve(nursery, answering(head, b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"))
    exchange = await transport.open(post(server.url))
    assert exchange.status == 200
    assert await everything(exchange) == b"ok"
    exchange.abort()


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        pytest.param(
            b"HTTP/1.1 200 OK\r\nX: " + b"a" * (80 << 10) + b"\r\n\r\n", "larger than 65536", id="large"
        ),
        pytest.param(
            b"HTTP/1.1 200 OK\r\nX: " + b"a" * (200 << 10), "larger than 65536", id="large-incomplete"
        ),
        pytest.param(b"SSH-2.0-OpenSSH_9\r\n\r\n", "not HTTP/1.1", id="garbage"),
        pytest.param(b"\x16\x03\x01\x02\x00", "not HTTP/1.1", id="tls-on-plain"),
        pytest.param(b"HTTP/1.1 100 Continue\r\n\r\n" * 100, "1xx", id="many-1xx"),
        pytest.param(b"HTTP/1.1 103 E\r\nX: " + b"a" * 30000 + b"\r\n\r\n", "larger than", id="large-1xx"),
        pytest.param(b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: x\r\n\r\n", "_SWITCH_UPGRADE", id="101"),
        pytest.param(b"HTTP/1.1 200 OK\r\n folded at the start\r\n\r\n", "not HTTP/1.1", id="fold-first"),
        pytest.param(b"HTTP/1.1 200 OK\r\nNo Colon\r\n\r\n", "not HTTP/1.1", id="no-colon"),
        pytest.param(
            b"HTTP/1.1 200 OK\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\n",
            "not HTTP/1.1",
            id="two-lengths",
        ),
    ],
)
async def test_hostile_heads_are_refused(nursery, transport, answer, message):
    """A head that is too large, or is not one, ends the attempt with RemoteProtocolError and closes the socket."""

    async def handler(peer):
        await peer.request()
        for _ in range(3):  # large-1xx: it is their sum that counts
            await peer.send(answer)
        await peer.closed()

    server = await serve(nursery, handler)
    with trio.fail_after(5), pytest.raises(RemoteProtocolError, match=message) as caught:
        await transport.open(post(server.url))
    assert len(str(caught.value)) < 400
    assert transport.statistics().open == 0


async def test_an_upgrade_is_refused_even_if_asked_for(nursery, transport):
    """101 hands the connection to another protocol, which nobody here speaks."""
    answer = b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: upgrade\r\n\r\n"
    server = await serve(nursery, answering(answer))
    with pytest.raises(RemoteProtocolError, match="101"):
        await transport.open(post(server.url, headers={"Upgrade": "websocket", "Connection": "upgrade"}))
    assert transport.statistics().open == 0


async def test_folded_headers_are_joined(nursery, transport):
    """A folded header is read as RFC 9112 section 5.2 says, with a space for each fold."""
    answer = b"HTTP/1.1 200 OK\r\nX-Long: one\r\n  two\r\n\tthree\r\nContent-Length: 0\r\n\r\n"
    server = await serve(nursery, answering(answer))
    exchange = await transport.open(post(server.url))
    assert exchange.headers["x-long"] == "one two three"
    exchange.abort()


async def test_head_split_at_every_byte(nursery, transport):
    """A head and body that arrive byte by byte are read like one that arrives at once."""
    answer = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n2\r\nde\r\n0\r\n\r\n"
    server = await serve(nursery, answering(answer))
    exchange = await transport.open(post(server.url))
    assert await everything(exchange) == b"abcde"
    await exchange.aclose()
    tiny = StreamTransport(trust_env=False, read_bytes=1)
    exchange = await tiny.open(post(server.url))
    assert await everything(exchange) == b"abcde"
    await exchange.aclose()
    assert tiny.statistics().idle == 1
    await tiny.aclose()


async def test_on_sent_is_called_once_the_request_is_out(nursery, transport):
    """`on_sent` tells, before any answer, that the whole request has been sent; an early answer means it was not."""
    sent = trio.Event()

    async def handler(peer):
        if peer.number == 1:
            await peer.request()
            await sent.wait()
            await peer.answer()
        else:
            await peer.raw.receive_some(100)
            await peer.answer(b"too large", extra=b"Connection: close\r\n")
            await trio.sleep_forever()

    server = await serve(nursery, handler)
    with trio.fail_after(5):
        exchange = await transport.open(post(server.url), on_sent=sent.set)
        exchange.abort()
        called = trio.Event()
        exchange = await transport.open(post(server.url, b"x" * (64 << 20)), on_sent=called.set)
        exchange.abort()
    assert not called.is_set()


# --- bodies and how they end -----------------------------------------------------------------------------------------


async def test_receive_reads_on_over_reads_without_body(nursery, transport):
    """A read that brings only framing is not shown as an empty body, which would mean the end."""

    async def handler(peer):
        await peer.request()
        await peer.send(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
        for piece in (b"4", b"\r\n", b"abcd", b"\r\n", b"0\r\n", b"\r\n"):
            await ready.wait()
            await peer.send(piece)
            await trio.testing.wait_all_tasks_blocked()

    ready = trio.Event()
    server = await serve(nursery, handler)
    exchange = await transport.open(post(server.url))
    ready.set()
    assert await everything(exchange) == b"abcd"
    assert exchange.at_end
    assert exchange.reusable
    assert await exchange.receive() == b""
    exchange.abort()


@pytest.mark.parametrize(
    "answer",
    [
        pytest.param(b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\nabc", id="content-length"),
        pytest.param(CHUNKED + b"3\r\nabc\r\n", id="chunked"),
    ],
)
@pytest.mark.parametrize("how", ["eof", "reset"])
async def test_a_body_cut_short_is_an_error(nursery, transport, answer, how):
    """EOF or reset before the framing is complete raises UpstreamClosedError(sent=True), after the bytes that came."""

    async def handler(peer):
        await peer.request()
        await peer.send(answer)
        await read.wait()
        if how == "reset":
            peer.raw.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\x01\0\0\0\0\0\0\0")
        await peer.cut()

    read = trio.Event()
    server = await serve(nursery, handler)
    exchange = await transport.open(post(server.url))
    assert await exchange.receive() == b"abc"
    read.set()
    with pytest.raises(UpstreamClosedError, match=f"127.0.0.1:{server.port}") as caught:
        await exchange.receive()
    assert caught.value.sent
    with pytest.raises(trio.ClosedResourceError):
        await exchange.receive()
    assert transport.statistics().open == 0
    assert transport.statistics().aborted == 1


async def test_until_close_body_ends_with_the_connection(nursery, transport):
    """Without a length, end of file is the end, and the connection is not kept."""
    server = await serve(nursery, answering(b"HTTP/1.1 200 OK\r\n\r\nabc", close=True))
    exchange = await transport.open(post(server.url))
    assert await everything(exchange) == b"abc"
    assert not exchange.reusable
    await exchange.aclose()
    assert transport.statistics().open == 0
    assert transport.statistics().aborted == 0


@pytest.mark.parametrize("pumped", [True, False])
@pytest.mark.parametrize("together", [True, False])
async def test_broken_framing_closes(nursery, transport, together, pumped):
    """A chunk size that is none raises RemoteProtocolError, after the body before it, and closes the socket."""
    got = []

    def take(data):
        got.append(data)
        return True

    async def handler(peer):
        await peer.request()
        head = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
        if not together:
            await peer.send(head)
            await opened.wait()
            head = b""
        await peer.send(head + b"3\r\nabc\r\nzz\r\n")
        await peer.closed()
        done.set()

    done, opened = trio.Event(), trio.Event()
    server = await serve(nursery, handler)
    exchange = await transport.open(post(server.url))
    opened.set()
    with trio.fail_after(5):
        if not pumped:
            got.append(await exchange.receive())
        with pytest.raises(RemoteProtocolError):
            await (exchange.pump(take) if pumped else exchange.receive())
        await done.wait()
    assert got == [b"abc"]


@pytest.mark.parametrize("request_read", [True, False])
async def test_no_answer_at_all(nursery, transport, request_read):
    """A connection that ends before the head raises UpstreamClosedError saying whether the request went out."""

    async def handler(peer):
        if request_read:
            await peer.request()

    server = await serve(nursery, handler)
    # Much more than the kernel's buffers take, so that the server's close comes in the middle of sending.
    content = b"{}" if request_read else b"x" * (64 << 20)
    with trio.fail_after(5), pytest.raises(UpstreamClosedError) as caught:
        await transport.open(post(server.url, content))
    assert caught.value.sent is request_read
    assert transport.statistics().open == 0
    assert transport.statistics().retried == 0


async def test_early_answer_to_a_large_request(nursery, transport):
    """A server that answers without reading the request on is heard at once; its connection is not used again."""

    async def handler(peer):
        await peer.raw.receive_some(100)
        await peer.answer(b"too large")
        await trio.sleep_forever()

    server = await serve(nursery, handler)
    with trio.fail_after(5):
        exchange = await transport.open(post(server.url, b"x" * (64 << 20)))
        assert await everything(exchange) == b"too large"
    assert not exchange.reusable
    await exchange.aclose()
    assert transport.statistics().open == 0


async def test_the_synchronous_steps_give_the_same_body(nursery, transport):
    """A reader of its own can drive an exchange with `first`, `feed_raw` and `feed_eof`, without `receive`."""
    server = await serve(
        nursery,
        answering(
            b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nab\r\n", b"2\r\ncd\r\n", b"0\r\n\r\n"
        ),
    )
    exchange = await transport.open(post(server.url))
    body = exchange.first()
    while not exchange.at_end:
        await trio.lowlevel.wait_readable(exchange.socket)
        body += exchange.feed_raw(exchange.socket.recv(7))
    assert body == b"abcd"
    await exchange.aclose()
    assert transport.statistics().idle == 1


# --- cancels ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("phase", ["silent", "mid-head", "mid-body", "sending"])
async def test_cancel_closes_the_socket(nursery, transport, phase):
    """In each phase the server sees the connection end when the client is cancelled, and nothing stays open."""
    outcome = []

    async def handler(peer):
        if phase == "sending":
            await peer.raw.receive_some(100)
        else:
            await peer.request()
        if phase == "mid-head":
            await peer.send(b"HTTP/1.1 200 OK\r\nX: ")
        if phase == "mid-body":
            await peer.send(CHUNKED + b"3\r\nabc\r\n")
        reached.set()
        await cancelled.wait()
        outcome.append(await peer.closed())
        done.set()

    async def client():
        with scope:
            exchange = await transport.open(post(server.url, b"x" * (64 << 20 if phase == "sending" else 10)))
            assert await exchange.receive() == b"abc"
            await exchange.receive()

    scope = trio.CancelScope()
    reached, cancelled, done = trio.Event(), trio.Event(), trio.Event()
    server = await serve(nursery, handler)
    with trio.fail_after(10):
        async with trio.open_nursery() as own:
            own.start_soon(client)
            await reached.wait()
            await trio.testing.wait_all_tasks_blocked()
            assert transport.statistics().open == 1
            scope.cancel()
        assert scope.cancelled_caught
        assert transport.statistics().open == 0
        assert transport.statistics().aborted == 1
        cancelled.set()
        await done.wait()
    assert outcome == ["reset" if phase == "sending" else "eof"]


async def test_cancel_while_connecting(transport):
    """A cancel before TCP has answered leaves no socket behind."""
    with socket.socket() as full, socket.socket() as first, socket.socket() as second:
        full.bind(("127.0.0.1", 0))
        full.listen(0)
        for filler in (first, second):  # a full backlog: further connects get no answer
            filler.setblocking(False)
            filler.connect_ex(full.getsockname())
        before = open_descriptors()
        async with trio.open_nursery() as own:
            own.start_soon(transport.open, post(f"http://127.0.0.1:{full.getsockname()[1]}/"))
            await trio.testing.wait_all_tasks_blocked(0.01)
            assert open_descriptors() > before
            own.cancel_scope.cancel()
        assert open_descriptors() == before
    assert transport.statistics().open == 0


async def test_abort_from_another_task(nursery, transport):
    """`abort` is synchronous: the descriptor is closed when it returns, the reader is woken, the server sees the end."""

    async def handler(peer):
        await peer.request()
        await peer.send(b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\nabc")
        await peer.closed()
        done.set()

    async def reader():
        assert await exchange.receive() == b"abc"
        with pytest.raises(trio.ClosedResourceError):
            await exchange.receive()

    done = trio.Event()
    server = await serve(nursery, handler)
    exchange = await transport.open(post(server.url))
    with trio.fail_after(5):
        async with trio.open_nursery() as own:
            own.start_soon(reader)
            await trio.testing.wait_all_tasks_blocked()
            exchange.abort()
            assert exchange.socket.fileno() == -1
        await done.wait()
    exchange.abort()
    await exchange.aclose()
    assert transport.statistics().aborted == 1
    assert "closed" in repr(exchange)


async def test_abort_while_the_shared_reader_has_the_socket(nursery, transport):
    """The task that pumps is told at once, and the reader knows the socket no more: its number may be another's next."""
    server = await serve(nursery, answering(CHUNKED + b"3\r\nabc\r\n"))
    exchange = await transport.open(post(server.url))
    pieces: list[bytes] = []

    async def pump() -> None:
        with pytest.raises(trio.ClosedResourceError):
            await exchange.pump(lambda data: pieces.append(data) is None)

    with trio.fail_after(5):
        async with trio.open_nursery() as tasks:
            tasks.start_soon(pump)
            await trio.testing.wait_all_tasks_blocked(0.01)
            exchange.abort()
    assert pieces == [b"abc"]


async def test_abort_while_there_is_more_to_read(nursery, monkeypatch):
    """A reader that had only paused before its next read is told the same as one that waited."""

    async def abort_at_the_pause():
        exchange.abort()
        await trio.lowlevel.cancel_shielded_checkpoint()

    server = await serve(nursery, answering(b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nabcdef"))
    async with StreamTransport(trust_env=False, read_bytes=1) as transport:
        exchange = await transport.open(post(server.url))
        assert await exchange.receive() == b"a"
        monkeypatch.setattr(trio.lowlevel, "checkpoint", abort_at_the_pause)
        with pytest.raises(trio.ClosedResourceError):
            await exchange.receive()
        monkeypatch.undo()


async def test_a_second_reader_is_told_and_does_not_end_the_first(nursery, transport):
    """Two tasks receiving at once is refused for the second one only."""

    async def handler(peer):
        await peer.request()
        await peer.send(b"HTTP/1.1 200 OK\r\nContent-Length: 3\r\n\r\n")
        await go.wait()
        await peer.send(b"abc")
        await peer.closed()

    async def first():
        got.append(await exchange.receive())

    got = []
    go = trio.Event()
    server = await serve(nursery, handler)
    exchange = await transport.open(post(server.url))
    async with trio.open_nursery() as own:
        own.start_soon(first)
        await trio.testing.wait_all_tasks_blocked()
        with pytest.raises(trio.BusyResourceError):
            await exchange.receive()
        go.set()
    assert got == [b"abc"]
    exchange.abort()


def open_descriptors() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="counts descriptors in /proc")
async def test_a_thousand_cycles_leak_nothing(nursery, transport):
    """After 1000 exchanges, complete, cancelled while silent and aborted mid-body, no descriptor is left."""

    async def handler(peer):
        while True:
            head, _ = await peer.request()
            if b"/silent" in head:
                await peer.closed()
                return
            if b"/flowing" in head:
                await peer.send(CHUNKED + b"3\r\nabc\r\n")
                await peer.closed()
                return
            await peer.answer()

    async def one(kind):
        request = post(f"http://127.0.0.1:{server.port}/{kind}")
        if kind == "silent":
            async with trio.open_nursery() as own:
                own.start_soon(transport.open, request)
                await trio.testing.wait_all_tasks_blocked()
                own.cancel_scope.cancel()
            return
        exchange = await transport.open(request)
        await exchange.receive()
        if kind == "flowing":
            exchange.abort()
        await exchange.aclose()

    server = await serve(nursery, handler)
    for kind in ("whole", "silent", "flowing"):
        await one(kind)
    await trio.testing.wait_all_tasks_blocked(0.01)
    before = open_descriptors()
    for _ in range(333):
        for kind in ("whole", "silent", "flowing"):
            await one(kind)
    await trio.testing.wait_all_tasks_blocked(0.01)
    assert open_descriptors() == before
    statistics = transport.statistics()
    # In each round the silent one is sent on the whole one's connection, and the flowing one needs a new one.
    assert (statistics.open, statistics.opened, statistics.reused) == (0, 2 * 334, 334)
    assert statistics.aborted == 2 * 334


# --- reuse -----------------------------------------------------------------------------------------------------------


async def whole(transport: StreamTransport, url: str, **kwargs) -> bytes:
    exchange = await transport.open(post(url, **kwargs))
    body = await everything(exchange)
    await exchange.aclose()
    return body


async def test_a_clean_connection_is_used_again(nursery, transport):
    """Two exchanges that end clean share a connection; one to another origin does not."""
    server = await serve(nursery, answering(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"))
    other = await serve(nursery, answering(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"))
    for _ in range(3):
        assert await whole(transport, server.url) == b"ok"
    assert await whole(transport, other.url) == b"ok"
    assert server.connections == 1
    assert other.connections == 1
    statistics = transport.statistics()
    assert (statistics.opened, statistics.reused, statistics.idle, statistics.open) == (2, 2, 2, 2)
    assert "0 busy, 2 idle" in repr(transport)


@pytest.mark.parametrize(
    ("answer", "headers"),
    [
        pytest.param(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nConnection: Close\r\n\r\nok", {}, id="close"),
        pytest.param(
            b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nConnection: x, close\r\n\r\nok", {}, id="close-in-list"
        ),
        pytest.param(
            b"HTTP/1.0 200 OK\r\nContent-Length: 2\r\nConnection: keep-alive\r\n\r\nok", {}, id="http-1.0"
        ),
        pytest.param(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok+", {}, id="excess"),
        pytest.param(
            b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok", {"Connection": "close"}, id="our-own-close"
        ),
        pytest.param(
            b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nok\r\n0\r\n\r\n",
            {},
            id="both-framings",
        ),
    ],
)
async def test_what_is_not_used_again(nursery, transport, answer, headers):
    """Connection: close from either side, HTTP/1.0, excess bytes and ambiguous framing each end the connection."""
    server = await serve(nursery, answering(answer))
    for _ in range(2):
        assert await whole(transport, server.url, headers=headers) == b"ok"
    assert server.connections == 2
    assert transport.statistics().open == 0


async def test_excess_after_a_response_without_body(nursery, transport):
    """Bytes after a response that has no body are excess: they are never the head of the next response."""
    server = await serve(nursery, answering(b"HTTP/1.1 204 No\r\n\r\nHTTP/1.1 200 OK\r\n\r\n"))
    exchange = await transport.open(post(server.url))
    assert not exchange.reusable
    await exchange.aclose()
    assert transport.statistics().open == 0


@pytest.mark.parametrize("what", [b"", b"HTTP/1.1 408 Request Timeout\r\n\r\n"])
async def test_stale_connections_are_noticed_before_use(nursery, transport, what):
    """A connection that the server closed, or spoke on, while idle is discarded before anything is written to it."""

    async def handler(peer):
        await peer.request()
        await peer.answer()
        if peer.number == 1:
            await go.wait()
            if what:
                await peer.send(what)
            else:
                await peer.cut()
            done.set()
        await trio.sleep_forever()

    go, done = trio.Event(), trio.Event()
    server = await serve(nursery, handler)
    await whole(transport, server.url)
    go.set()
    await done.wait()
    await trio.testing.wait_all_tasks_blocked()
    assert await whole(transport, server.url) == b"ok"
    statistics = transport.statistics()
    assert (statistics.opened, statistics.reused, statistics.retried, statistics.open) == (2, 0, 0, 1)


async def test_a_race_with_the_idle_timeout_is_retried_once(nursery, transport):
    """A reused connection that ends without a byte is replaced invisibly, and the same request is sent again."""
    seen = []

    async def handler(peer):
        while True:
            seen.append((peer.number, (await peer.request())[1]))
            if len(seen) == 2:
                return
            await peer.answer()

    server = await serve(nursery, handler)
    assert await whole(transport, server.url, content=b"1") == b"ok"
    assert await whole(transport, server.url, content=b"2") == b"ok"
    assert seen == [(1, b"1"), (1, b"2"), (2, b"2")]
    statistics = transport.statistics()
    assert (statistics.opened, statistics.reused, statistics.retried, statistics.aborted) == (2, 1, 1, 0)


async def test_the_retry_is_made_once_and_on_a_fresh_connection(nursery, transport):
    """A server that closes each connection without an answer gets the request twice at most."""
    requests = 0

    async def handler(peer):
        nonlocal requests
        await peer.request()
        requests += 1
        if peer.number <= 2:
            both.set() if peer.number == 2 else None
            await both.wait()
            await peer.answer()
            await peer.request()
            requests += 1

    both = trio.Event()
    server = await serve(nursery, handler)
    async with trio.open_nursery() as own:  # two idle connections, so that a second pooled one could be tried
        own.start_soon(whole, transport, server.url)
        own.start_soon(whole, transport, server.url)
    assert transport.statistics().idle == 2
    requests = 0
    with pytest.raises(UpstreamClosedError):
        await transport.open(post(server.url))
    assert requests == 2
    assert server.connections == 3


@pytest.mark.parametrize("why", ["some bytes came", "long after"])
async def test_what_is_not_retried(nursery, mock_clock, transport, why):
    """A request is not repeated once anything came back, nor when the server was silent for long before it closed."""
    requests = 0

    async def handler(peer):
        nonlocal requests
        await peer.request()
        requests += 1
        await peer.answer()
        await peer.request()
        requests += 1
        if why == "some bytes came":
            await peer.send(b"HTTP/1.1 2")
        else:
            await trio.testing.wait_all_tasks_blocked()
            mock_clock.jump(RACE_S + 0.5)

    server = await serve(nursery, handler)
    await whole(transport, server.url)
    with pytest.raises(UpstreamClosedError) as caught:
        await transport.open(post(server.url))
    assert caught.value.sent
    assert requests == 2
    assert transport.statistics().retried == 0
    assert transport.statistics().open == 0


async def test_the_pool_is_bounded_in_count(nursery):
    """The oldest idle connection is closed when there would be more than `max_idle_connections`."""
    async with StreamTransport(trust_env=False, max_idle_connections=2) as transport:
        servers = [
            await serve(nursery, answering(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"))
            for _ in range(3)
        ]
        for server in servers:
            await whole(transport, server.url)
        assert transport.statistics().idle == 2
        assert transport.statistics().open == 2
        for server in reversed(servers):
            await whole(transport, server.url)
        assert [server.connections for server in servers] == [2, 1, 1]
    assert transport.statistics().open == 0


async def test_the_pool_is_bounded_in_age(nursery, mock_clock):
    """An idle connection is not used after `idle_s`, and is closed by the next use of the pool, of any origin."""
    async with StreamTransport(trust_env=False, idle_s=30) as transport:
        server = await serve(nursery, answering(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"))
        other = await serve(nursery, answering(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"))
        await whole(transport, server.url)
        mock_clock.jump(29)
        await whole(transport, server.url)
        assert server.connections == 1
        mock_clock.jump(31)
        exchange = await transport.open(post(other.url))
        assert transport.statistics().open == 1
        await exchange.aclose()
        await whole(transport, server.url)
        assert server.connections == 2


async def test_the_newest_idle_connection_is_used_first(nursery, transport):
    """Of several idle connections to an origin the one used last is taken, the least likely to be stale."""
    used = []

    async def handler(peer):
        while True:
            await peer.request()
            used.append(peer.number)
            await peer.answer()

    server = await serve(nursery, handler)
    first = await transport.open(post(server.url))
    second = await transport.open(post(server.url))
    for exchange in (second, first):
        await exchange.aclose()
    await whole(transport, server.url)
    assert used == [1, 2, 1]


async def test_a_body_nobody_read_can_be_given_back(nursery, transport):
    """A body that came whole with its head does not cost the connection, even if it was never asked for."""
    server = await serve(nursery, answering(b"HTTP/1.1 500 No\r\nContent-Length: 2\r\n\r\nno"))
    for _ in range(2):
        exchange = await transport.open(post(server.url))
        await exchange.aclose()
    assert server.connections == 1
    assert transport.statistics().aborted == 0


async def test_the_servers_own_idle_timeout_is_heeded(nursery, mock_clock, transport):
    """`Keep-Alive: timeout=5` shortens how long a connection is kept, to a second less than that."""
    server = await serve(
        nursery, answering(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nKeep-Alive: timeout=5, max=9\r\n\r\nok")
    )
    longer = await serve(nursery, answering(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"))
    await whole(transport, longer.url)  # the oldest in the pool, and not due before the other
    await whole(transport, server.url)
    mock_clock.jump(3.9)
    await whole(transport, server.url)
    mock_clock.jump(4.1)
    await whole(transport, server.url)
    assert server.connections == 2


# --- the graceful end ------------------------------------------------------------------------------------------------


async def test_aclose_waits_a_moment_for_the_terminator(nursery, transport):
    """The end of a chunked body that arrives just after is read, even in a cancelled scope, and the connection kept."""

    async def handler(peer):
        await peer.request()
        await peer.send(CHUNKED + b"3\r\nabc\r\n")
        await closing.wait()
        await peer.send(b"0\r\n\r\n")
        await peer.closed()

    closing = trio.Event()
    server = await serve(nursery, handler)
    exchange = await transport.open(post(server.url))
    assert await exchange.receive() == b"abc"
    with trio.CancelScope() as scope:
        scope.cancel()
        closing.set()
        await exchange.aclose(drain_s=5)
    assert transport.statistics().idle == 1
    assert transport.statistics().aborted == 0


async def test_aclose_does_not_wait_longer(nursery, autojump_clock):
    """Without the end, `aclose` closes the connection after `drain_s` on the clock, and nothing shields it longer."""
    async with StreamTransport(trust_env=False, drain_s=3) as transport:
        server = await serve(nursery, answering(CHUNKED + b"3\r\nabc\r\n"))
        autojump_clock.autojump_threshold = float("inf")
        exchange = await transport.open(post(server.url))
        assert await exchange.receive() == b"abc"
        autojump_clock.autojump_threshold = 0
        began = trio.current_time()
        await exchange.aclose()
        assert trio.current_time() - began == pytest.approx(3)
        assert transport.statistics().open == 0
        assert transport.statistics().aborted == 1


async def test_aclose_does_not_read_a_flood(nursery, mock_clock, transport):
    """An upstream that goes on sending is cut off after 16 KiB, with no clock needed."""

    async def handler(peer):
        await peer.request()
        await peer.send(CHUNKED + b"7fffffffffff\r\nabc")
        while True:
            await peer.send(b"x" * 65536)

    server = await serve(nursery, handler)
    exchange = await transport.open(post(server.url))
    await exchange.receive()
    await exchange.aclose()  # on a clock that stands still
    assert transport.statistics().open == 0


@pytest.mark.parametrize(
    "header", [b"Connection: close\r\nContent-Length: 9", b"X: until-close", b"Content-Length: 20000"]
)
async def test_aclose_waits_for_nothing_where_it_is_of_no_use(nursery, mock_clock, transport, header):
    """A connection that cannot be kept, or a body with much to come, is closed at once, on a clock that stands still."""
    server = await serve(nursery, answering(b"HTTP/1.1 200 OK\r\n%s\r\n\r\nabc" % header))
    exchange = await transport.open(post(server.url))
    assert await exchange.receive() == b"abc"
    await exchange.aclose()
    assert transport.statistics().open == 0


async def test_a_closed_transport_keeps_and_opens_nothing(nursery):
    """After `aclose` live exchanges go on, their connections are not kept, and new requests are refused."""
    transport = StreamTransport(trust_env=False)
    server = await serve(nursery, answering(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"))
    exchange = await transport.open(post(server.url))
    await transport.aclose()
    assert await everything(exchange) == b"ok"
    await exchange.aclose()
    assert transport.statistics().open == 0
    with pytest.raises(trio.ClosedResourceError):
        await transport.open(post(server.url))


# --- failing to connect ----------------------------------------------------------------------------------------------


async def test_connect_errors_name_host_and_cause_only(transport):
    """A refused connection names host, port and reason; neither userinfo nor query of the URL."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with pytest.raises(ConnectError) as caught:
        await transport.open(post(f"http://user:s3cret@127.0.0.1:{port}/path?key=s3cret"))
    assert str(caught.value) == f"cannot connect to http://127.0.0.1:{port}: Connection refused"
    assert isinstance(caught.value.__cause__, OSError)


async def test_names_that_do_not_resolve(transport):
    """Resolution failures, and names that are no names, are ConnectErrors with the host."""

    class Resolver(trio.abc.HostnameResolver):
        async def getaddrinfo(self, *args):
            raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

        async def getnameinfo(self, *args):
            raise NotImplementedError

    trio.socket.set_custom_hostname_resolver(Resolver())
    with pytest.raises(ConnectError, match=r"nowhere\.invalid:80: .*Name or service not known"):
        await transport.open(post("http://nowhere.invalid/"))


@pytest.mark.parametrize("url", ["ftp://127.0.0.1/", "http:///x"])
async def test_urls_that_cannot_be_requested(transport, url):
    """A scheme or URL that is not HTTP's is the caller's mistake."""
    with pytest.raises(ConfigurationError):
        await transport.open(post(url))


@pytest.mark.parametrize(
    "option",
    [{"max_head_bytes": 1}, {"idle_s": -1}, {"max_idle_connections": -1}, {"read_bytes": 0}, {"drain_s": -1}],
)
def test_options_are_checked(option):
    """An option out of range is refused by its name."""
    with pytest.raises(ConfigurationError, match=next(iter(option))):
        StreamTransport(**option)


# --- as an httpx transport -------------------------------------------------------------------------------------------


async def test_httpx_client(nursery, transport):
    """An httpx client reads whole and streamed responses, decodes content, and reuses the connection."""
    import gzip

    body = gzip.compress(b"hello")
    server = await serve(
        nursery,
        answering(
            b"HTTP/1.1 200 Fine\r\nContent-Encoding: gzip\r\nContent-Length: %d\r\n\r\n%s" % (len(body), body)
        ),
    )
    async with httpx.AsyncClient(transport=transport) as client:
        response = await client.get(server.url)
        assert response.text == "hello"
        assert response.reason_phrase == "Fine"
        assert response.http_version == "HTTP/1.1"
        async with client.stream("GET", server.url) as streamed:
            assert b"".join([part async for part in streamed.aiter_bytes()]) == b"hello"
    assert server.connections == 1
    assert transport.statistics().open == 0


@pytest.mark.parametrize(
    ("pieces", "error"),
    [
        ((b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nabc",), httpx.ReadError),
        ((b"nonsense\r\n\r\n",), httpx.RemoteProtocolError),
        ((b"",), httpx.ReadError),
        ((b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",), httpx.RemoteProtocolError),
    ],
)
async def test_httpx_errors(nursery, transport, pieces, error):
    """What goes wrong is raised as httpx names it, with the request that httpx attaches."""
    server = await serve(nursery, answering(*pieces, close=True))
    async with httpx.AsyncClient(transport=transport) as client:
        with pytest.raises(error) as caught:
            await client.get(server.url)
        assert caught.value.request.url == server.url
        with pytest.raises(httpx.LocalProtocolError):
            await client.get(server.url, headers=[(b"X-A", b"a\r\nb: c")])
        with pytest.raises(httpx.UnsupportedProtocol):
            await client.get("ftp://127.0.0.1/")
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        with pytest.raises(httpx.ConnectError):
            await client.get(f"http://127.0.0.1:{port}/")
    assert transport.statistics().open == 0


@pytest.mark.parametrize(
    ("phase", "error"),
    [
        ("connect", httpx.ConnectTimeout),
        ("write", httpx.WriteTimeout),
        ("head", httpx.ReadTimeout),
        ("body", httpx.ReadTimeout),
    ],
)
async def test_httpx_timeouts(nursery, mock_clock, transport, phase, error):
    """The connect, write and read timeouts of httpx hold, each in its phase, and close the socket."""

    async def handler(peer):
        if phase != "write":
            await peer.request()
        if phase == "body":
            await peer.send(b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nabc")
        await trio.sleep_forever()

    class Nowhere(trio.abc.HostnameResolver):
        async def getaddrinfo(self, *args):
            await trio.sleep_forever()

        async def getnameinfo(self, *args):
            raise NotImplementedError

    server = await serve(nursery, handler)
    url = server.url
    if phase == "connect":
        trio.socket.set_custom_hostname_resolver(Nowhere())
        url = "http://nowhere.invalid/"
    timeout = httpx.Timeout(None, **{{"head": "read", "body": "read"}.get(phase, phase): 5.0})
    content = b"x" * (64 << 20 if phase == "write" else 1)

    async def later():
        await trio.testing.wait_all_tasks_blocked(0.02)
        assert transport.statistics().open == (phase != "connect")
        mock_clock.jump(4.9)
        await trio.testing.wait_all_tasks_blocked()
        assert transport.statistics().open == (phase != "connect")
        mock_clock.jump(0.2)

    async with httpx.AsyncClient(transport=transport) as client:
        nursery.start_soon(later)
        with pytest.raises(error):
            await client.post(url, content=content, timeout=timeout)
        assert transport.statistics().open == 0


async def test_a_cancelled_httpx_user_closes_the_stream_at_once(nursery, mock_clock, transport):
    """Closing a response in a cancelled scope takes no time, on a clock that stands still."""
    server = await serve(nursery, answering(CHUNKED + b"3\r\nabc\r\n"))
    response = await transport.handle_async_request(post(server.url))
    assert await anext(response.stream) == b"abc"
    with trio.CancelScope() as scope:
        scope.cancel()
        await response.aclose()
    assert transport.statistics().open == 0
    assert transport.statistics().aborted == 1
