"""Clients that mean harm: each is bounded, is told what is wrong where it can be, and nobody else notices."""

from __future__ import annotations

import logging
import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
import trio
import trio.testing
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from supervisor.web.server import WebServer
from tests.web.scene import scene
from tests.web.test_server import GET, Endless, echo
from tests.web.wire import Client, serving


async def counted(scope: Scope, receive: Receive, send: Send) -> None:
    """Answer with the length of the body, or with the status of what is wrong with it."""
    try:
        told = str(len(await Request(scope, receive).body()))
        await PlainTextResponse(told)(scope, receive, send)
    except HTTPException as error:
        await PlainTextResponse(error.detail, error.status_code, error.headers)(scope, receive, send)


@asynccontextmanager
async def attacked(app: ASGIApp = counted, **limits: float) -> AsyncIterator[WebServer]:
    """Serve for the length of a block; another client is answered before and after whatever happens in it."""
    async with serving(app, **limits) as server, Client.of(server) as other:
        assert (await other.ask("POST", "/", body=b"abc")).body == b"3"
        yield server
        assert (await other.ask("POST", "/", body=b"abcd")).body == b"4"
        assert server.statistics().crashes == 0


NO_REQUEST = {
    "a bare word": b"hello\r\n\r\n",
    "no version": b"GET /\r\n\r\n",
    "a version there is not": b"GET / HTTP/3.0\r\nhost: x\r\n\r\n",
    "no Host": b"GET / HTTP/1.1\r\n\r\n",
    "two Hosts": b"GET / HTTP/1.1\r\nhost: x\r\nhost: y\r\n\r\n",
    "a space before the colon": b"GET / HTTP/1.1\r\nhost : x\r\n\r\n",
    "a NUL in a header": b"GET / HTTP/1.1\r\nhost: x\r\na: b\0c\r\n\r\n",
    "a CR in a header": b"GET / HTTP/1.1\r\nhost: x\r\na: b\rset-cookie: c\r\n\r\n",
    "a space in the target": b"GET /a b HTTP/1.1\r\nhost: x\r\n\r\n",
    "not ASCII in the target": b"GET /\xc3\xa9 HTTP/1.1\r\nhost: x\r\n\r\n",
    "two lengths": b"POST / HTTP/1.1\r\nhost: x\r\ncontent-length: 3\r\ncontent-length: 4\r\n\r\nabc",
    "a negative length": b"POST / HTTP/1.1\r\nhost: x\r\ncontent-length: -1\r\n\r\n",
    "a length in words": b"POST / HTTP/1.1\r\nhost: x\r\ncontent-length: three\r\n\r\nabc",
    "an unknown coding": b"POST / HTTP/1.1\r\nhost: x\r\ntransfer-encoding: gzip, chunked\r\n\r\n",
    "a TLS hello": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + b"\0" * 40 + b"\r\n\r\n",
    "binary": bytes(range(256)) * 4,
}


@pytest.mark.parametrize("sent", NO_REQUEST.values(), ids=NO_REQUEST)
async def test_what_is_no_request_is_refused_in_words(sent: bytes) -> None:
    """Bytes that are no HTTP/1.1 request get one answer, 400, 501 or 505 with an error as JSON, and their connection closed."""
    async with attacked() as server:
        async with Client.of(server) as client:
            await client.send(sent)
            said = await client.closed()
        head, _, body = said.partition(b"\r\n\r\n")
        assert head.split()[1] in {b"400", b"501", b"505"}
        assert said.count(b"HTTP/1.1") == 1 + body.count(b"HTTP/1.1")
        assert body.startswith(b'{"error":{"kind":"')
        assert server.statistics().protocol_errors == 1


@pytest.mark.parametrize(
    "body",
    [b"zz\r\nabc\r\n", b"3\r\nabcdef\r\n", b"-1\r\n", b"ffffffffffffffffffffff\r\n", b"3" + b"0" * 100_000],
)
async def test_bad_chunks_end_the_request(body: bytes) -> None:
    """A body whose chunks are none is refused; the application is told that its client is gone, not that the body is whole."""
    outcomes: list[str] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        while True:
            message = await receive()
            if message["type"] == "http.disconnect" or not message["more_body"]:
                outcomes.append(message["type"])
                break

    async with serving(app) as server, Client.of(server) as client:
        await client.send(b"POST / HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n" + body)
        said = await client.closed()
        assert said.split()[1] in {b"400", b"413", b"431"}, said
        assert outcomes == ["http.disconnect"]


@pytest.mark.parametrize(
    "head",
    [
        b"a: " + b"x" * 40_000,
        b"".join(b"a%d: %b\r\n" % (number, b"x" * 100) for number in range(400)),
        b"x" * 40_000,
    ],
    ids=["one", "many", "without an end"],
)
async def test_a_head_that_is_too_large(head: bytes) -> None:
    """A head above `max_head_bytes` is answered 431, and the connection closed."""
    async with attacked(max_head_bytes=32_000) as server, Client.of(server) as client:
        await client.send(b"GET / HTTP/1.1\r\nhost: x\r\n" + head)
        said = await client.closed()
        assert said.split()[1] == b"431"
        assert b'"too_large"' in said


async def test_a_head_that_drips_is_cut_off(autojump_clock: trio.testing.MockClock) -> None:
    """A head has `head_s` from its first byte, however often a byte of it comes; then 408. Without one: `idle_s`, and no word."""
    async with serving(counted, head_s=3, idle_s=5) as server:
        async with Client.of(server) as silent:
            begun = trio.current_time()
            assert await silent.closed() == b""
            assert trio.current_time() - begun == pytest.approx(5, abs=0.01)

        async def drip() -> None:
            for byte in b"GET / HTTP/1.1\r\nhost: x\r\nx: " + b"y" * 1000:
                await client.send(bytes([byte]))
                await trio.sleep(0.5)

        async with Client.of(server) as client, trio.open_nursery() as nursery:
            await trio.sleep(1)
            begun = trio.current_time()
            nursery.start_soon(drip)
            said = await client.answer()
            assert (said.status, said.kind) == (408, "timeout")
            assert trio.current_time() - begun == pytest.approx(3, abs=0.01)
            nursery.cancel_scope.cancel()
        assert server.statistics().timeouts == 1


async def test_a_body_that_drips_is_cut_off(autojump_clock: trio.testing.MockClock) -> None:
    """A body has `body_s` from the end of the head, however often a byte of it comes; then 408, and the connection is closed."""
    async with serving(counted, body_s=3) as server:

        async def drip() -> None:
            while True:
                await client.send(b"x")
                await trio.sleep(0.5)

        async with Client.of(server) as client, trio.open_nursery() as nursery:
            await client.send(b"POST / HTTP/1.1\r\nhost: x\r\ncontent-length: 1000\r\n\r\n")
            begun = trio.current_time()
            nursery.start_soon(drip)
            assert (await client.answer()).status == 408
            assert trio.current_time() - begun == pytest.approx(3, abs=0.01)
            nursery.cancel_scope.cancel()
        assert server.statistics().body_bytes == 0


@pytest.mark.parametrize("chunked", [False, True])
async def test_a_body_that_is_too_large(chunked: bool) -> None:
    """A body above `max_body_bytes` is answered 413, by its stated length before any of it, and heard by who sends on."""
    async with attacked(max_body_bytes=100_000) as server, Client.of(server) as client:
        if chunked:
            await client.send(b"POST / HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n")
            for _ in range(40):
                await client.send(b"4e20\r\n" + b"x" * 20_000 + b"\r\n")
        else:
            await client.send(b"POST / HTTP/1.1\r\nhost: x\r\ncontent-length: 100001\r\n\r\n")
        answer = await client.answer()
        assert (answer.status, answer.body) == (413, b"a body may have at most 100000 bytes")
        assert server.statistics().body_bytes <= 200_000
        exact = b"POST / HTTP/1.1\r\nhost: x\r\ncontent-length: 100000\r\n\r\n" + b"x" * 100_000
        async with Client.of(server) as another:
            await another.send(exact)
            assert (await another.answer()).body == b"100000"


async def test_bodies_are_bounded_together() -> None:
    """Bodies that arrive at the same time share `bodies_bytes`; one more is told 503, and when they go there is room again."""
    async with attacked(bodies_bytes=10_000) as server:
        head = b"POST / HTTP/1.1\r\nhost: x\r\ncontent-length: 9000\r\n\r\n"
        async with Client.of(server) as first:
            await first.send(head + b"x" * 8000)
            while server.statistics().body_bytes < 8000:
                await trio.testing.wait_all_tasks_blocked()
            async with Client.of(server) as second:
                await second.send(head + b"x" * 9000)
                refused = await second.answer()
                assert (refused.status, refused.headers["retry-after"]) == (503, "1")
            await first.send(b"x" * 1000)
            assert (await first.answer()).body == b"9000"
        while server.statistics().body_bytes:
            await trio.testing.wait_all_tasks_blocked()


async def test_connections_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """At the limit who has had no request for the longest makes room; else newcomers are told 503, but few at the same time."""
    monkeypatch.setattr("supervisor.web.server._MAX_REFUSING", 1)
    app = Endless()
    async with (
        serving(app, max_connections=3) as server,
        Client.of(server) as oldest,
        Client.of(server) as second,
        Client.of(server) as third,
    ):
        await oldest.send(GET)
        await app.begun.wait()
        async with Client.of(server) as fourth:
            assert await second.closed() == b""
            for client in (third, fourth):
                await client.send(GET)
                await client.event()
            async with Client.of(server) as fifth:
                refused = await fifth.answer()
                assert (refused.status, refused.kind) == (503, "too_many_connections")
                assert await fifth.closed() == b""
                async with Client.of(server) as sixth:
                    assert await sixth.closed() == b""
            figures = server.statistics()
            assert (figures.connections, figures.busy) == (3, 3)
            assert (figures.made_room, figures.refused_full) == (1, 2)
            await trio.testing.wait_all_tasks_blocked()
            async with Client.of(server) as seventh:
                assert (await seventh.answer()).status == 503


async def test_what_is_sent_ahead_is_bounded() -> None:
    """Who sends more than `max_head_bytes` while it is being answered is dropped, and its request is told so."""
    app = Endless()
    async with serving(app, max_head_bytes=10_000) as server, Client.of(server) as client:
        await client.send(GET)
        await app.begun.wait()
        with pytest.raises(trio.BrokenResourceError):
            for _ in range(10_000):
                await client.send(GET * 100)
        await app.told.wait()


async def test_a_client_that_takes_nothing_is_dropped() -> None:
    """Who does not read its answer for `send_s` is dropped, and its request is told so; nothing is held for it but one piece."""
    told = trio.Event()

    async def flood(scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        async with trio.open_nursery() as nursery:

            async def watch() -> None:
                while (await receive())["type"] != "http.disconnect":
                    pass
                told.set()
                nursery.cancel_scope.cancel()

            nursery.start_soon(watch)
            while True:
                await send({"type": "http.response.body", "body": b"x" * 65536, "more_body": True})

    async with serving(flood, send_s=0.05) as server, Client.of(server, receive_buffer=4096) as client:
        await client.send(GET)
        await told.wait()
        while server.statistics().connections:
            await trio.testing.wait_all_tasks_blocked()
        assert server.statistics().stalled == 1


async def test_nothing_follows_a_piece_that_was_cut_short() -> None:
    """After a piece that was not taken whole in time nothing more is sent, or a client that reads on would take it for the rest."""
    sent = trio.Event()

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"x" * (16 << 20), "more_body": True})
        await send({"type": "http.response.body", "body": b"the second piece", "more_body": True})
        sent.set()
        await send({"type": "http.response.body", "body": b"the last piece"})

    async with serving(app, send_s=0.05) as server, Client.of(server, receive_buffer=4096) as client:
        await client.send(GET)
        await sent.wait()
        client.stream.setsockopt(trio.socket.SOL_SOCKET, trio.socket.SO_RCVBUF, 1 << 20)
        said = await client.closed()
        assert len(said) < 16 << 20
        assert b"piece" not in said


async def test_an_endless_answer_leaves_the_others_their_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    """An answer whose client takes all of it at once, so that sending never waits, gives the others a turn now and then."""
    monkeypatch.setattr("supervisor.web.server._IN_A_ROW_BYTES", 1000)
    turns: list[int] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        async def other() -> None:
            while True:
                turns.append(1)
                await trio.lowlevel.checkpoint()

        await send({"type": "http.response.start", "status": 200, "headers": []})
        async with trio.open_nursery() as nursery:
            nursery.start_soon(other)
            for _ in range(20):
                await send({"type": "http.response.body", "body": b"x" * 500, "more_body": True})
            nursery.cancel_scope.cancel()
        await send({"type": "http.response.body", "body": b""})

    async with serving(app) as server, Client.of(server) as client:
        assert len((await client.ask("GET", "/")).body) == 10_000
    assert 5 <= len(turns) < 20


async def test_what_follows_a_request_is_the_next_one() -> None:
    """Bytes after a whole request are read as a request of their own: refused, and never part of the one before."""
    async with serving(echo) as server, Client.of(server) as client:
        await client.send(
            b"POST /first HTTP/1.1\r\nhost: x\r\ncontent-length: 2\r\n\r\nhiGARBAGE\r\n\r\nGET /second HTTP/1.1\r\nhost: x\r\n\r\n"
        )
        assert (await client.answer()).body == b"/firsthi"
        refused = await client.answer()
        assert (refused.status, refused.kind) == (400, "invalid_request")
        assert await client.closed() == b""
        assert server.statistics().requests == 1


async def test_a_length_beside_chunks_smuggles_nothing() -> None:
    """Where both a length and chunks are given the chunks hold (RFC 9112, 6.3), and what follows them is a request."""
    async with serving(echo) as server, Client.of(server) as client:
        await client.send(
            b"POST /a HTTP/1.1\r\nhost: x\r\ncontent-length: 60\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n"
            b"GET /b HTTP/1.1\r\nhost: x\r\n\r\n"
        )
        first = await client.answer()
        assert first.body == b"/a" or first.status == 400
        if first.status == 200:
            assert (await client.answer()).body == b"/b"


SEEDS = (
    b"GET /healthz HTTP/1.1\r\nhost: localhost\r\n\r\n",
    b'POST /streams HTTP/1.1\r\nhost: localhost\r\ncontent-length: 34\r\n\r\n{"upstream": "ten", "prompt": "x"}',
    b"POST /streams HTTP/1.1\r\nhost: localhost\r\ntransfer-encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\n\r\n",
    b"GET /streams/ID/events?after=1-0 HTTP/1.1\r\nhost: localhost\r\nlast-event-id: 1-2\r\n\r\n",
    b"POST /session HTTP/1.1\r\nhost: localhost\r\nexpect: 100-continue\r\ncontent-length: 2\r\n\r\n{}",
    b"OPTIONS * HTTP/1.1\r\nhost: localhost\r\norigin: http://x\r\ncookie: a=b\r\n\r\n",
)
PIECES = (
    *(
        b"\r\n",
        b"\n",
        b"\0",
        b"\xff",
        b" ",
        b":",
        b"/../",
        b"%00",
        b"%ff",
        b"?",
        b"HTTP/1.0",
        b"ffffffff\r\n",
    ),
    *(b"transfer-encoding: chunked\r\n", b"content-length: 5\r\n", b"connection: close\r\n", b"0\r\n\r\n"),
    *(b"upgrade: h2c\r\nconnection: upgrade\r\n", b"expect: 100-continue\r\n", b"host: x\r\n"),
)


def nearly(draw: random.Random) -> bytes:
    """Return one to three requests with up to four mistakes in them."""
    data = bytearray(b"".join(draw.choices(SEEDS, k=draw.choice((1, 1, 2, 3)))))
    for _ in range(draw.randrange(5)):
        at = draw.randrange(len(data) + 1)
        other = draw.randrange(len(data) + 1)
        match draw.randrange(5):
            case 0:
                data[at : at + 1] = bytes([draw.randrange(256)])
            case 1:
                data[at:at] = draw.choice(PIECES)
            case 2:
                del data[at : at + draw.randrange(8)]
            case 3:
                del data[at:]
            case _:
                data[at:at] = data[min(at, other) : max(at, other)][:50]
    return bytes(data) or b"x"


@pytest.mark.parametrize("seed", range(4))
async def test_requests_that_are_nearly_right(seed: int, caplog: pytest.LogCaptureFixture) -> None:
    """Requests with mistakes anywhere, cut into pieces anywhere, from many clients: each comes to an end, and none to an error of ours."""
    draw = random.Random(seed)
    brief = {"head_s": 0.05, "idle_s": 0.05, "body_s": 0.05, "linger_s": 0.02, "leave_s": 0.1}
    async with scene(**brief) as front:
        stream_id = (await front.ended()).encode()

        async def try_it(data: bytes, size: int) -> None:
            async with front.client() as client:
                try:
                    for at in range(0, len(data), size):
                        await client.send(data[at : at + size])
                    with trio.move_on_after(0.2):
                        await client.closed()
                except trio.BrokenResourceError:
                    pass

        async with trio.open_nursery() as nursery:
            for _ in range(60):
                data = nearly(draw).replace(b"ID", stream_id)
                nursery.start_soon(try_it, data, draw.choice((1, 7, 10_000)))
        while front.server.statistics().connections:
            await trio.testing.wait_all_tasks_blocked(0.01)
        assert (await front.ask("GET", "/healthz")).status == 200
        figures = front.server.statistics()
        assert (figures.crashes, figures.body_bytes) == (0, 0)
    assert [record for record in caplog.records if record.levelno >= logging.ERROR] == []
