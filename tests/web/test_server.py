"""The HTTP listener: what reaches the application, and when a client that leaves is noticed."""

from __future__ import annotations

import os

import pytest
import trio
import trio.testing
from starlette.requests import Request
from starlette.responses import FileResponse, PlainTextResponse
from starlette.types import Receive, Scope, Send

from tests.web.wire import Client, serving

GET = b"GET / HTTP/1.1\r\nhost: x\r\n\r\n"


async def echo(scope: Scope, receive: Receive, send: Send) -> None:
    """Answer with the path and the body."""
    request = Request(scope, receive)
    await PlainTextResponse(scope["path"].encode() + await request.body())(scope, receive, send)


class Endless:
    """Begins an answer, and says when it was told that its client has left."""

    def __init__(self) -> None:
        self.begun = trio.Event()
        self.told = trio.Event()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"begun", "more_body": True})
        self.begun.set()
        while (await receive())["type"] != "http.disconnect":
            pass
        self.told.set()


async def test_one_connection_carries_several_requests() -> None:
    """Requests after each other on one connection are each answered, and the connection counts once."""
    async with serving(echo) as server, Client.of(server) as client:
        for word in (b"one", b"two"):
            await client.send(b"POST / HTTP/1.1\r\nhost: x\r\ncontent-length: 3\r\n\r\n" + word)
            answer = await client.answer()
            assert (answer.status, answer.body) == (200, b"/" + word)
        await trio.testing.wait_all_tasks_blocked()
        figures = server.statistics()
        assert (figures.connections, figures.busy, figures.requests, figures.body_bytes) == (1, 0, 2, 0)
    assert server.statistics().connections == 0


@pytest.mark.parametrize("how", ["content-length: 3", "transfer-encoding: chunked"])
async def test_an_answer_before_the_body_says_that_the_connection_ends(how: str) -> None:
    """A client whose body nobody reads is not left to find the connection closed when it uses it again."""

    async def refuse(scope: Scope, receive: Receive, send: Send) -> None:
        await PlainTextResponse("no", 401)(scope, receive, send)

    for app, says in ((refuse, "close"), (echo, None)):
        async with serving(app) as server, Client.of(server) as client:
            await client.send(f"POST / HTTP/1.1\r\nhost: x\r\n{how}\r\n\r\n".encode())
            if app is echo:
                await client.send(b"one" if "length" in how else b"3\r\none\r\n0\r\n\r\n")
            answer = await client.answer()
            assert answer.headers.get("connection") == says
    async with serving(refuse) as server, Client.of(server) as client:
        await client.send(GET)
        assert "connection" not in (await client.answer()).headers


async def test_an_answer_takes_as_few_writes_as_it_has_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """A head goes out with the first piece of its body, be that empty, and the end of the chunks with the last piece."""
    written: list[bytes] = []
    write = os.write

    def noted(descriptor: int, data: bytes) -> int:
        if data[:1] in b"H3":  # of the server's own: trio wakes itself by a socket, too
            written.append(data)
        return write(descriptor, data)

    monkeypatch.setattr("supervisor.web.server.os.write", noted)
    stuck = trio.Event()

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        if scope["path"] == "/head":
            await send({"type": "http.response.body", "body": b"", "more_body": True})
            await stuck.wait()
        await send({"type": "http.response.body", "body": b"one", "more_body": True})
        await send({"type": "http.response.body", "body": b"two"})

    async with serving(app) as server, Client.of(server) as client:
        assert (await client.ask("GET", "/")).body == b"onetwo"
        first, second = written
        assert first.endswith(b"\r\n\r\n3\r\none\r\n")
        assert second == b"3\r\ntwo\r\n0\r\n\r\n"
        await client.send(b"GET /head HTTP/1.1\r\nhost: x\r\n\r\n")
        assert (await client.event()).status_code == 200


async def test_a_file_is_read_and_sent() -> None:
    """A file that is answered with goes the way of every answer: there is no way around the bounds for it."""
    async with serving(FileResponse(__file__)) as server, Client.of(server) as client:
        assert (await client.ask("GET", "/")).body == await trio.Path(__file__).read_bytes()


async def test_a_body_in_pieces_and_one_that_waits_to_be_asked_for() -> None:
    """A chunked body arrives whole; a client that expects it is told 100 before it sends its own."""
    async with serving(echo) as server, Client.of(server) as client:
        await client.send(
            b"POST / HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n2\r\nab\r\n1;x=y\r\nc\r\n0\r\n\r\n"
        )
        assert (await client.answer()).body == b"/abc"
        await client.send(b"POST / HTTP/1.1\r\nhost: x\r\nexpect: 100-continue\r\ncontent-length: 2\r\n\r\n")
        assert (await client.event()).status_code == 100
        await client.send(b"hi")
        assert (await client.answer()).body == b"/hi"


async def test_pipelined_requests_are_answered_in_order() -> None:
    """Requests sent ahead are answered one after the other, bodies and all."""
    posts = b"".join(
        b"POST /%d HTTP/1.1\r\nhost: x\r\ncontent-length: 2\r\n\r\nhi" % number for number in range(20)
    )
    async with serving(echo) as server, Client.of(server) as client:
        await client.send(posts)
        assert [(await client.answer()).body for _ in range(20)] == [
            b"/%dhi" % number for number in range(20)
        ]


@pytest.mark.parametrize("last", [True, False])
async def test_what_is_no_request_behind_one_is_ignored(last: bool) -> None:
    """Empty lines between requests are none, nor is anything behind one that says that it is the last."""
    close = b"connection: close\r\n" if last else b""
    post = b"POST /a HTTP/1.1\r\nhost: x\r\n%bcontent-length: 2\r\n\r\nhi\r\n" % close
    async with serving(echo) as server, Client.of(server) as client:
        await client.send(b"\r\n" + post + (b"x\r\n\r\n" if last else post + b"\r\n"))
        for _ in range(1 if last else 2):
            assert (await client.answer()).body == b"/ahi"
        assert server.statistics().protocol_errors == 0


async def test_a_length_with_a_transfer_coding_is_refused() -> None:
    """Two programs may each go by the other of the two, so neither is gone by, and the connection ends."""
    body = b"content-length: 2\r\ntransfer-encoding: chunked\r\n\r\n2\r\nhi\r\n0\r\n\r\n"
    async with serving(echo) as server, Client.of(server) as client:
        await client.send(b"POST /a HTTP/1.1\r\nhost: x\r\n" + body)
        answer = await client.answer()
        assert (answer.status, answer.headers["connection"]) == (400, "close")


@pytest.mark.parametrize(
    "asked",
    [
        GET,
        GET * 3,
        b"POST / HTTP/1.1\r\nhost: x\r\ncontent-length: 100000\r\n\r\n" + b"x" * 1000,
        b"POST / HTTP/1.1\r\nhost: x\r\ncontent-length: 3\r\n\r\nabc" + GET,
    ],
    ids=["read", "pipelined", "body half sent", "body and pipelined"],
)
@pytest.mark.parametrize("how", ["close", "reset", "half-close"])
async def test_a_client_that_leaves_is_noticed_at_once(asked: bytes, how: str) -> None:
    """However it leaves, and whatever it has sent ahead, the application is told at once, and the connection is gone."""
    app = Endless()
    async with serving(app) as server, Client.of(server) as client:
        await client.send(asked)
        await app.begun.wait()
        if how == "half-close":
            await client.stream.send_eof()
        else:
            linger = b"\1\0\0\0\0\0\0\0" if how == "reset" else b"\0" * 8
            client.stream.setsockopt(trio.socket.SOL_SOCKET, trio.socket.SO_LINGER, linger)
            await trio.aclose_forcefully(client.stream)
        with trio.fail_after(1):
            await app.told.wait()
            while server.statistics().connections:
                await trio.testing.wait_all_tasks_blocked()


async def test_who_goes_on_for_a_client_that_has_left_is_cancelled(
    autojump_clock: trio.testing.MockClock,
) -> None:
    """An application that takes no notice of a client that has left is cancelled after `leave_s`."""
    begun, ended = trio.Event(), []

    async def deaf(scope: Scope, receive: Receive, send: Send) -> None:
        begun.set()
        try:
            await trio.sleep(1000)
        finally:
            ended.append(trio.current_time())

    async with serving(deaf, leave_s=3) as server:
        async with Client.of(server) as client:
            await client.send(GET)
            await begun.wait()
            left = trio.current_time()
        await server.end()
    assert ended == [left + 3]


async def test_an_error_is_one_clients_own(caplog: pytest.LogCaptureFixture) -> None:
    """An application that raises costs its client the answer, and is logged; the other connections know nothing of it."""

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["path"] == "/raise":
            raise ValueError("a mistake of ours")
        if scope["path"] == "/raise/late":
            await send({"type": "http.response.start", "status": 200, "headers": []})
            await send({"type": "http.response.body", "body": b"half", "more_body": True})
            async with trio.open_nursery():
                raise ValueError("another mistake of ours")
        await echo(scope, receive, send)

    async with serving(app) as server, Client.of(server) as other:
        assert (await other.ask("GET", "/one")).body == b"/one"
        async with Client.of(server) as client:
            assert (await client.ask("GET", "/raise")).status == 500
        async with Client.of(server) as client:
            await client.send(b"GET /raise/late HTTP/1.1\r\nhost: x\r\n\r\n")
            assert await client.cut_short() == b"half"
        assert (await other.ask("GET", "/two")).body == b"/two"
    assert "a mistake of ours" in caplog.text
    assert "another mistake of ours" in caplog.text


async def test_what_nobody_expected_ends_one_connection(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An exception out of a connection itself is caught, counted and logged; the listener and the others go on."""
    async with serving(echo) as server, Client.of(server) as other:
        assert (await other.ask("GET", "/one")).body == b"/one"
        with monkeypatch.context() as patched:

            async def fail(connection: object) -> None:
                raise ValueError("a mistake in the connection")

            patched.setattr("supervisor.web.server._Connection._read", fail)
            async with Client.of(server) as client:
                assert await client.closed() == b""
        assert (await other.ask("GET", "/two")).body == b"/two"
        async with Client.of(server) as another:
            assert (await another.ask("GET", "/three")).body == b"/three"
        assert server.statistics().crashes == 1
    assert "a mistake in the connection" in caplog.text


async def test_there_is_no_way_out_of_http_1() -> None:
    """An upgrade to WebSocket or HTTP/2 is ignored; HTTP/2's own preface is refused."""
    async with serving(echo) as server:
        for upgrade in (
            b"upgrade: websocket\r\nconnection: Upgrade\r\nsec-websocket-version: 13\r\nsec-websocket-key: AAAAAAAAAAAAAAAAAAAAAA==",
            b"upgrade: h2c\r\nconnection: Upgrade, HTTP2-Settings\r\nhttp2-settings: AAMAAABkAAQAAP__",
        ):
            async with Client.of(server) as client:
                await client.send(b"GET /same HTTP/1.1\r\nhost: x\r\n" + upgrade + b"\r\n\r\n")
                assert (await client.answer()).body == b"/same"
                await client.send(b"GET /again HTTP/1.1\r\nhost: x\r\n\r\n")
                assert (await client.answer()).body == b"/again"
        async with Client.of(server) as client:
            await client.send(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n")
            assert (await client.closed()).startswith(b"HTTP/1.1 505 ")


async def test_the_end_lets_answers_be_completed() -> None:
    """Ending closes who has no request, lets the others have their answer, and then their connection is closed too."""
    go = trio.Event()

    async def slow(scope: Scope, receive: Receive, send: Send) -> None:
        await go.wait()
        await echo(scope, receive, send)

    async with serving(slow, linger_s=0.02) as server, Client.of(server) as busy, Client.of(server) as idle:
        await busy.send(GET)
        while server.statistics().connections < 2 or not server.statistics().busy:
            await trio.testing.wait_all_tasks_blocked()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(server.end)
            assert await idle.closed() == b""
            async with Client.of(server) as late:
                assert await late.closed() == b""
            go.set()
            assert (await busy.answer()).body == b"/"
            assert await busy.closed() == b""
        assert server.statistics().connections == 0
