"""The simulated upstream, checked with a client of plain sockets and h11: it must tell the truth about what it saw."""

from __future__ import annotations

import json
import os
import signal
import socket
import ssl
import struct
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import attrs
import h11
import httpx
import pytest
import trio
import trio.testing
import trustme

from supervisor.errors import ConfigurationError
from supervisor.testing.upstream import Script, SimulatedUpstream, script_for_model, unreachable_url


@attrs.define
class Answer:
    status: int = 0
    headers: dict[str, str] = attrs.field(factory=dict)
    body: bytes = b""
    whole: bool = False

    @property
    def text(self) -> str:
        out = ""
        for line in self.body.splitlines():
            with suppress(json.JSONDecodeError):  # the line that a fault has cut
                chunk = json.loads(line[6:]) if line.startswith(b"data: {") else {}
                for choice in chunk.get("choices", []):
                    out += choice["delta"].get("content") or ""
        return out


def post(model: str = "other", **more: Any) -> bytes:
    body = json.dumps({"model": model, "stream": True, "messages": []} | more).encode()
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer sk-1\r\nContent-Length: {len(body)}\r\n\r\n"
    return head.encode() + body


dialled: list[trio.SocketStream] = []


@pytest.fixture(autouse=True)
def hang_up() -> Iterator[None]:
    """Close what a test has dialled."""
    yield
    while dialled:
        if (fd := dialled.pop().socket.detach()) >= 0:
            os.close(fd)


async def dial(up: SimulatedUpstream) -> trio.SocketStream:
    dialled.append(await trio.open_tcp_stream(up.host, up.port))
    return dialled[-1]


async def read_answer(stream: trio.abc.ReceiveStream) -> Answer:
    """Read one response, or as much of it as comes."""
    client = h11.Connection(h11.CLIENT, max_incomplete_event_size=1 << 24)
    client.send(h11.Request(method="POST", target="/", headers=[("host", "x"), ("content-length", "0")]))
    client.send(h11.EndOfMessage())
    answer = Answer()
    while True:
        try:
            event = client.next_event()
            if event is h11.NEED_DATA:
                client.receive_data(bytes(await stream.receive_some()))
            elif isinstance(event, h11.Response):
                answer.status = event.status_code
                answer.headers = {k.decode(): v.decode() for k, v in event.headers}
            elif isinstance(event, h11.Data):
                answer.body += event.data
            elif isinstance(event, h11.EndOfMessage):
                answer.whole = True
                return answer
            else:
                return answer
        except h11.RemoteProtocolError:
            return answer


async def ask(up: SimulatedUpstream, model: str = "other", **more: Any) -> Answer:
    stream = await dial(up)
    async with stream:
        await stream.send_all(post(model, **more))
        return await read_answer(stream)


@pytest.mark.parametrize("framing", ["chunked", "content-length", "until-close"])
@pytest.mark.parametrize("newline", ["lf", "crlf"])
async def test_a_plain_answer_is_whole_in_every_framing(framing: Any, newline: Any) -> None:
    """The text, the usage and the marker arrive, whatever the framing and line ends."""
    script = Script(tokens=20, framing=framing, newline=newline, comment_every=5, events_per_write=3)
    async with SimulatedUpstream(default=script) as up:
        answer = await ask(up)
        assert (answer.status, answer.whole) == (200, True)
        assert answer.text == script.expected_text()
        assert answer.body.rstrip().endswith(b"data: [DONE]")
        assert answer.body.count(b": keep-alive") == 4
        assert b'"completion_tokens":20' in answer.body


async def test_chunks_may_be_cut_without_regard_to_events() -> None:
    """Chunks of seven bytes carry the same body."""
    async with SimulatedUpstream(default=Script(text="héllo wörld", chunk_bytes=7)) as up:
        assert (await ask(up)).text == "héllo wörld"


async def test_a_flood_is_exact() -> None:
    """A flood from prebuilt blocks has every word once and in order, past the point where they repeat."""
    script = Script(tokens=3000, events_per_write=64)
    async with SimulatedUpstream(default=script) as up:
        assert (await ask(up)).text == script.expected_text()
        assert up.connections[0].events_sent == 3000


async def test_requests_are_recorded_and_connections_reused() -> None:
    """Two requests on one kept connection are both recorded, with their headers and bodies."""
    async with SimulatedUpstream() as up:
        stream = await dial(up)
        async with stream:
            for n in (1, 2):
                await stream.send_all(post("m", n=n))
                assert (await read_answer(stream)).whole
                assert up.requests[-1].json()["n"] == n
        first, second = up.requests
        assert (first.connection, second.connection, up.accepted) == (1, 1, 1)
        assert first.credential == "sk-1"
        assert first.header("Host") == "x"
        await up.connections[0].wait_closed()
        assert up.connections[0].closed_by == "eof"
        assert up.open_connections == []


@pytest.mark.parametrize(
    "model", ["sim/silent", "sim/stall?after=2", "sim/paced?interval_s=3600", "sim/hang-after-finish"]
)
@pytest.mark.parametrize("how", ["eof", "reset"])
async def test_a_close_by_the_client_is_seen_at_once(model: str, how: str) -> None:
    """Whatever the answer is waiting for, the client's FIN or RST ends the connection and is told apart."""
    async with SimulatedUpstream() as up:
        stream = await dial(up)
        await stream.send_all(post(model))
        await up.wait_requests(1)
        connection = up.connections[0]
        await trio.testing.wait_all_tasks_blocked(0.01)
        assert connection.open
        if how == "reset":
            stream.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        else:
            while connection.bytes_sent > 0:  # a close with unread bytes would be a RST
                with trio.move_on_after(0.01):
                    await stream.receive_some()
                    continue
                break
        stream.socket.close()
        with trio.fail_after(5):
            await connection.wait_closed()
            await up.wait_open(0)
        assert connection.closed_by == how
        assert connection.closed_at is not None


async def test_a_close_during_a_flood_is_seen() -> None:
    """A client that goes away in the middle of an endless flood stops it."""
    async with SimulatedUpstream(default=Script(tokens=None, events_per_write=64)) as up:
        stream = await dial(up)
        await stream.send_all(post())
        await stream.receive_some(100)
        stream.socket.close()
        with trio.fail_after(5):
            await up.wait_open(0)
        assert up.connections[0].closed_by in ("eof", "reset")


FAULTS: list[tuple[str, str, bool, bytes]] = [
    ("sim/drop?after=2", "w0 w1 ", False, b""),
    ("sim/end?after=2", "w0 w1 ", True, b""),
    ("sim/end?after=0", "", True, b""),
    ("sim/no-marker?tokens=2", "w0 w1 ", True, b""),
    ("sim/no-done?tokens=2", "w0 w1 ", True, b'"finish_reason":"stop"'),
    ("sim/error?after=1&message=boom", "w0 ", True, b'data: {"error":{"message":"boom"'),
    ("sim/error?after=0&error_shape=event", "", True, b"event: error\ndata: "),
    ("sim/error?after=0&error_shape=field", "", True, b"error: {"),
    ("sim/error?after=0&error_shape=bare", "", True, b'{"error":'),
    ("sim/error-after-finish?tokens=1", "", True, b'"finish_reason":"stop"'),
    ("sim/extra-after-done?tokens=1", "w0 after the end", True, b"data: [DONE]\n\ndata: {"),
    ("sim/trickle?tokens=2", "w0 w1 ", True, b"[DONE]"),
    ("sim/oversized?after=1&tokens=2&size_bytes=100000", "", True, b"x" * 100_000),
    ("sim/bad-json?after=1&tokens=2", "", True, b'"content": "cut\n'),
]


@pytest.mark.parametrize(("model", "text", "whole", "contains"), FAULTS)
async def test_faults_inside_a_body(model: str, text: str, contains: bytes, *, whole: bool) -> None:
    """Each fault looks on the wire as its description says."""
    async with SimulatedUpstream() as up:
        answer = await ask(up, model)
        assert answer.status == 200
        assert answer.whole is whole
        assert contains in answer.body
        if text:
            assert answer.text == text


async def test_a_reset_is_a_reset() -> None:
    """`reset` reaches the client as a RST, not as an end of the stream."""
    async with SimulatedUpstream() as up:
        stream = await dial(up)
        await stream.send_all(post("sim/reset?after=1"))
        with pytest.raises(trio.BrokenResourceError):
            await read_answer(stream)
        await up.wait_open(0)
        assert up.connections[0].closed_by == "upstream"


@pytest.mark.parametrize(("model", "starts"), [("sim/garbage-head", b"\x00\xff"), ("sim/drop-head", b"")])
async def test_faults_of_the_head(model: str, starts: bytes) -> None:
    """A garbage head is no HTTP; a dropped one is nothing at all."""
    async with SimulatedUpstream() as up:
        stream = await dial(up)
        await stream.send_all(post(model))
        data = await stream.receive_some()
        assert data[:2] == starts


async def test_a_huge_head_is_as_huge_as_said() -> None:
    """The filler header has the size asked for."""
    async with SimulatedUpstream() as up:
        answer = await ask(up, "sim/huge-head?size_bytes=200000")
        assert len(answer.headers["x-filler"]) == 200_000


async def test_statuses_come_a_number_of_times_and_then_well() -> None:
    """`times=2`: two 429 with their Retry-After, then the plain answer; another key is counted apart."""
    async with SimulatedUpstream() as up:
        model = "sim/429?times=2&retry_after=1&retry_after_ms=5&message=slow%20down"
        answers = [await ask(up, model) for _ in range(3)]
        assert [a.status for a in answers] == [429, 429, 200]
        assert (answers[0].headers["retry-after"], answers[0].headers["retry-after-ms"]) == ("1", "5")
        assert json.loads(answers[0].body)["error"]["message"] == "slow down"
        assert (await ask(up, model + "&key=other")).status == 429


async def test_scripts_come_from_the_queue_then_the_callable_then_the_model() -> None:
    """The order of the rules."""
    async with SimulatedUpstream(
        respond=lambda r: Script(text="called") if r.json().get("call") else None
    ) as up:
        up.enqueue(Script(text="queued"))
        assert (await ask(up, "sim/503")).text == "queued"
        assert (await ask(up, "sim/503", call=True)).text == "called"
        assert (await ask(up, "sim/503")).status == 503
        assert (await ask(up, "gpt")).text == Script().expected_text()
        assert (await ask(up, "sim/nonsense")).status == 400


async def test_a_body_that_is_no_text_is_refused() -> None:
    """Junk costs its client a 400, and the simulator nothing."""
    async with SimulatedUpstream() as up:
        for body in (b'{"x":"\xff"}', b'{"x":' + b"[" * 100_000):
            stream = await dial(up)
            async with stream:
                head = b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n" % len(
                    body
                )
                await stream.send_all(head + body)
                assert (await read_answer(stream)).status == 400
        assert (await ask(up)).status == 200


async def test_an_echoed_credential() -> None:
    """A provider that repeats the key in its message can be played."""
    async with SimulatedUpstream() as up:
        answer = await ask(up, "sim/401?echo_credential=true")
        assert b"sk-1" in answer.body


async def test_a_pace_is_kept_in_virtual_time(autojump_clock: trio.testing.MockClock) -> None:
    """A hundred tokens at 20 ms take 1.98 s of the clock."""
    autojump_clock.autojump_threshold = 0.02
    async with SimulatedUpstream() as up:
        start = trio.current_time()
        assert (await ask(up, "sim/paced")).whole
        assert trio.current_time() - start == pytest.approx(1.98)


async def test_heartbeats_while_stalled(autojump_clock: trio.testing.MockClock) -> None:
    """A stalled answer with a heartbeat sends comments and nothing else."""
    autojump_clock.autojump_threshold = 0.02
    async with SimulatedUpstream() as up:
        stream = await dial(up)
        await stream.send_all(post("sim/stall?after=0&heartbeat_s=5"))
        data = b""
        while data.count(b": keep-alive") < 3:
            data += await stream.receive_some()
        assert b"data:" not in data
        assert trio.current_time() >= 15


async def test_connections_before_any_request() -> None:
    """Connections can be met with silence, a FIN or a RST, by number, and are limited in number."""
    async with SimulatedUpstream(
        accept=lambda n: ("silent", "close", "reset", "normal")[min(n, 4) - 1]
    ) as up:
        silent = await dial(up)
        await silent.send_all(post())
        with trio.move_on_after(0.01) as scope:
            await silent.receive_some()
        assert scope.cancelled_caught
        assert await (await dial(up)).receive_some() == b""
        with pytest.raises((trio.BrokenResourceError, OSError)):
            await (await dial(up)).receive_some()
        assert (await ask(up)).whole
        up.max_connections = 1
        assert await (await dial(up)).receive_some() == b""
        assert up.turned_away == 1


async def test_a_request_past_the_limit_is_cut() -> None:
    """A body larger than `max_request_bytes` ends the connection without an answer."""
    async with SimulatedUpstream(max_request_bytes=1000) as up:
        stream = await dial(up)
        await stream.send_all(post("m", filler="x" * 2000))
        await up.wait_accepted(1)
        await up.connections[0].wait_closed()
        assert up.request_count == 0


async def test_tls_and_a_client_of_httpx() -> None:
    """It speaks TLS, serves the models, and answers a request that does not stream."""
    authority = trustme.CA()
    server = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    authority.issue_cert("localhost").configure_cert(server)
    client = ssl.create_default_context()
    authority.configure_trust(client)
    async with SimulatedUpstream(ssl_context=server, server_name="localhost") as up:
        async with httpx.AsyncClient(verify=client, base_url=up.base_url, trust_env=False) as http:
            assert (await http.get("models")).json()["object"] == "list"
            answer = (await http.post("chat/completions", json={"model": "sim/ok"})).json()
            assert answer["choices"][0]["message"]["content"] == Script().expected_text()
            streamed = await http.post("chat/completions", json={"model": "sim/ok", "stream": True})
            assert streamed.text.endswith("data: [DONE]\n\n")
            with pytest.raises(httpx.RemoteProtocolError):
                await http.post("chat/completions", json={"model": "sim/drop", "stream": True})
            with pytest.raises(httpx.ReadTimeout):
                await http.post(
                    "chat/completions", json={"model": "sim/silent"}, timeout=httpx.Timeout(5, read=0.05)
                )
        await up.wait_open(0)


def test_models_are_read_into_scripts() -> None:
    """Names and fields are read with their types; what is not understood is named."""
    assert script_for_model("gpt-5") is None
    assert script_for_model("sim/stall?after=7&interval_s=0.5&done=false") == Script(
        fault="stall", after=7, interval_s=0.5, done=False
    )
    assert script_for_model("sim/503?retry_after=2") == Script(status=503, retry_after="2")
    for wrong in ("sim/what", "sim/ok?wrong=1", "sim/ok?after=x", "sim/ok?after=-1", "sim/ok?framing=odd"):
        with pytest.raises(ConfigurationError):
            script_for_model(wrong)
    with pytest.raises(ConfigurationError):
        Script(framing="content-length", tokens=None)


async def test_unreachable_urls() -> None:
    """One address refuses at once; the other leaves a connect waiting."""
    with unreachable_url() as url, pytest.raises(OSError, match=r"all attempts to connect|refused"):
        await trio.open_tcp_stream("127.0.0.1", httpx.URL(url).port or 0)
    with unreachable_url(mode="unanswered") as url, trio.move_on_after(0.05) as scope:
        await trio.open_tcp_stream("127.0.0.1", httpx.URL(url).port or 0)
    assert scope.cancelled_caught


@pytest.mark.parametrize("stop", ["sigterm", "stdin"])
def test_as_its_own_process(stop: str) -> None:
    """It prints one line with its address, serves, reports what it saw, and stops cleanly when told to."""
    with subprocess.Popen(
        [sys.executable, "-m", "supervisor.testing.upstream", "--until-stdin-closes"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    ) as process:
        try:
            assert process.stdout is not None
            line = json.loads(process.stdout.readline())
            url = httpx.URL(line["base_url"])
            with httpx.Client(trust_env=False) as http:
                body = http.post(f"{url}/chat/completions", json={"model": "sim/ok", "stream": True}).text
                assert body.endswith("data: [DONE]\n\n")
                report = http.get(url.copy_with(path="/sim/report")).json()
            assert report["requests"] == 2
            assert report["connections"][0]["events_sent"] == 8
            if stop == "sigterm":
                process.send_signal(signal.SIGTERM)
            _, errors = process.communicate(timeout=10)
            assert (process.returncode, errors) == (0, b"")
        finally:
            process.kill()


async def test_exceptions_of_the_block_come_out_as_they_are() -> None:
    """Leaving neither wraps nor swallows what the block raised, nor a cancel from outside."""
    with pytest.raises(ZeroDivisionError):
        async with SimulatedUpstream() as up:
            await dial(up)
            raise ZeroDivisionError
    assert up.open_connections == []
    with trio.CancelScope() as scope:
        async with SimulatedUpstream():
            scope.cancel()
            await trio.sleep_forever()
    assert scope.cancelled_caught
