from __future__ import annotations

import base64
import hashlib
from functools import partial
from typing import Any

import attrs
import pytest
import trio
import trio.testing

from supervisor.control import ClientLimits, CloseCode, ControlLimits, LinkLimits, SessionLimits, connect
from supervisor.control.event_stream import EventStream
from supervisor.control.frames import OP_TEXT, build_frame
from supervisor.errors import (
    AuthenticationError,
    ConfigurationError,
    ControlClosedError,
    GapError,
    RequestError,
)
from supervisor.streams import Cursor, Output, State, Supervisor, open_supervisor

from .harness import Scene, open_scene, until

FAST = ClientLimits(connect_s=5, retry_initial_s=0.01, retry_max_s=0.02)
TEN = "".join(f"t{number} " for number in range(10))


async def on_loopback(  # noqa: ASYNC114, ASYNC128  # serve_tcp reports as started
    handler: Any, *, task_status: trio.TaskStatus[Any]
) -> None:
    await trio.serve_tcp(handler, 0, host="127.0.0.1", task_status=task_status)


async def text_of(events: EventStream) -> str:
    return "".join([event.text async for event in events])


async def drop_all(scene: Scene) -> None:
    """Cut every connection of the server, without a Close."""
    for session in list(scene.server.sessions):
        await trio.aclose_forcefully(session._link._guard._transport)


async def test_every_method() -> None:
    """Each method of the library does what the method of the protocol does, and returns its type."""
    async with open_scene() as scene, connect(scene.url, name="tests") as client:
        assert client.server is not None
        assert client.server.server == "stream-supervisor"
        started = await client.start("ten", {"model": "m"}, key="k", labels={"a": "b"})
        assert started.created
        async with client.subscribe(started.id) as events:
            seen = [event async for event in events]
        assert [event.seq for event in seen] == list(range(1, 12))
        assert "".join(event.text for event in seen) == TEN
        assert seen[-1].outcome is not None
        assert events.cursor == Cursor(1, 11)
        async with client.subscribe(key="k", view="text") as events:
            assert [(event.kind, event.first, event.last) async for event in events] == [
                ("text", 1, 10),
                ("outcome", 0, 0),
            ]
        outcome = await client.wait(key="k")
        assert outcome is not None
        assert (outcome.state, outcome.last_seq) == (State.COMPLETED, 11)
        assert (await client.get(started.id)).outcome == seen[-1].outcome
        assert (await client.snapshot(started.id)).text == TEN
        assert [row.id for row in (await client.list(states=[State.COMPLETED])).streams] == [started.id]
        live = await client.start("forever", {}, labels={"team": "x"})
        assert await client.wait(live.id, timeout_s=0) is None
        cancelled = await client.cancel(live.id, reason="why")
        assert (cancelled.outcome, cancelled.state) == ("won", "cancelled")
        ended = await client.wait(live.id)
        assert ended is not None
        assert (ended.actor, ended.message) == ("tests", "why")
        assert await client.cancel_many(labels={"team": "x"}) == ()
        spent = await client.start("forever", {}, labels={"team": "y"})
        for cancel in (client.cancel, client.cancel_many):
            with pytest.raises(ConfigurationError, match="drain_tokens"):
                await cancel(
                    **{"stream_id": "x"} if cancel == client.cancel else {"all_streams": True},
                    drain_tokens=-1,
                )
        async with client.subscribe(spent.id, after="tail"):
            (result,) = await client.cancel_many(
                labels={"team": "y"}, mode="drain", drain_s=60, drain_tokens=0
            )
            assert result.outcome == "won"
        assert (await client.cancel(spent.id, mode="drain", drain_tokens=5)).outcome == "already_terminal"
        assert (await client.stats())["supervisor"]["started"] == 3
        assert (await client.health())["status"] == "ok"
        assert (await client.reap(dry_run=True)).reaped == ()
        assert await client.drain() == 0
        assert (await client.shutdown(grace_s=1)).accepted
        assert [params.grace_s for params in scene.shutdowns] == [1.0]


async def test_errors_are_typed() -> None:
    """A refusal carries code, kind and data; a gap is a GapError; a mistake of the caller's own is not even sent."""
    async with open_scene() as scene, connect(scene.url) as client:
        with pytest.raises(RequestError) as unknown:
            await client.get("nope")
        assert (unknown.value.code, unknown.value.kind, unknown.value.data["id"]) == (
            -32001,
            "unknown_stream",
            "nope",
        )
        started = await client.start("forever", {})
        with pytest.raises(GapError) as gap:
            async with client.subscribe(started.id, after=Cursor(3, 7)):
                pass
        assert (gap.value.stream_id, gap.value.after_epoch, gap.value.after_seq) == (started.id, 3, 7)
        for wrong in (
            client.get,
            lambda: client.cancel(started.id, key="k"),
            client.cancel_many,
            lambda: client.list(limit=0),
        ):
            with pytest.raises(ConfigurationError):
                await wrong()
        with pytest.raises(ConfigurationError):
            client.subscribe(started.id, window=0)
        with pytest.raises(RuntimeError, match="async with"):
            client.subscribe(started.id).__aiter__()


async def test_many_tasks_share_one_connection() -> None:
    """Calls, waits and event streams of fifty tasks interleave on one connection, each getting its own answers."""
    async with open_scene() as scene, connect(scene.url) as client:
        texts: list[str] = []

        async def one(number: int) -> None:
            started = await client.start("ten", {"n": number})
            async with client.subscribe(started.id, window=3) as events:
                texts.append(await text_of(events))
            outcome = await client.wait(started.id)
            assert outcome is not None
            assert outcome.id == started.id

        async with trio.open_nursery() as nursery:
            for number in range(50):
                nursery.start_soon(one, number)
        assert texts == [TEN] * 50
        assert scene.server.statistics().subscriptions == 0


async def test_a_cancelled_call_leaves_the_connection_usable() -> None:
    """Cancelled waits free their places at the server; cancelled subscribes leave no subscription; nothing is mixed up."""
    limits = attrs.evolve(ControlLimits(), session=SessionLimits(max_requests=2))
    async with open_scene(limits=limits) as scene, connect(scene.url) as client:
        started = await client.start("forever", {})
        for _ in range(20):  # more than the server would allow if they stayed
            with trio.move_on_after(0):
                await client.wait(started.id)
            with trio.CancelScope() as scope:
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(client.wait, started.id)
                    await trio.testing.wait_all_tasks_blocked()
                    scope.cancel()
            assert (await client.health())["live"] == 1
        for checkpoints in range(12):
            with trio.CancelScope() as scope:
                async with trio.open_nursery() as nursery:

                    async def watch() -> None:
                        async with client.subscribe(started.id, after="tail") as events:
                            await text_of(events)

                    nursery.start_soon(watch)
                    for _ in range(checkpoints):
                        await trio.lowlevel.checkpoint()
                    scope.cancel()
        while (await client.get(started.id)).readers:
            pass
        assert (await client.stats())["control"]["subscriptions"] == 0
        assert (await client.stats())["control"]["pending_requests"] == 0


async def test_a_subscribe_cancelled_before_its_answer_leaves_no_subscription() -> None:
    """The server has subscribed and its answer is on the way when the caller gives up: it is unsubscribed again."""
    async with open_scene() as scene, connect(scene.url) as client:
        started = await client.start("forever", {})
        async with trio.open_nursery() as nursery:

            async def watch() -> None:
                async with client.subscribe(started.id, after="tail"):
                    raise AssertionError("it was cancelled before")

            nursery.start_soon(watch)
            await until(lambda: scene.server.statistics().subscriptions > 0)
            nursery.cancel_scope.cancel()
        with trio.fail_after(5):
            while (await client.stats())["control"]["subscriptions"]:
                pass


async def test_a_resumed_event_stream_keeps_to_its_window() -> None:
    """Credit that was owed on the lost connection is not granted again on the new one."""
    async with open_scene() as scene, connect(scene.url, reconnect=True, limits=FAST) as client:
        go = trio.Event()

        async def burst(out: Output) -> None:
            for number in range(3):
                await out.send(f"{number} ")
            await go.wait()
            for number in range(3, 500):
                await out.send(f"{number} ")

        scene.sources["burst"] = burst
        started = await client.start("burst", {})
        async with client.subscribe(started.id, window=8) as events:
            text = "".join([(await events.__anext__()).text for _ in range(3)])
            with trio.move_on_after(0.02):
                await events.__anext__()  # takes note that all three were consumed
            await drop_all(scene)
            await until(lambda: scene.server.statistics().accepted == 2)
            go.set()
            most = 0
            async for event in events:
                text += event.text
                await trio.testing.wait_all_tasks_blocked()
                most = max(
                    most, sum(n.last - n.first + 1 for n in events._notifications) + events._current_cost
                )
        assert text == "".join(f"{number} " for number in range(500))
        assert most <= 8


async def test_a_slow_consumer_holds_no_more_than_its_window() -> None:
    """Of a thousand events a consumer with a window of 8 is sent 8 at a time, and gets them all."""
    async with open_scene() as scene, connect(scene.url) as client:

        async def many(out: Output) -> None:
            for number in range(1000):
                await out.send(f"{number} ")

        scene.sources["many"] = many
        started = await client.start("many", {})
        await client.wait(started.id)
        text = ""
        for view in ("events", "text"):
            text = ""
            async with client.subscribe(started.id, window=8, view=view) as events:
                async for event in events:
                    text += event.text
                    held = sum(n.last - n.first + 1 for n in events._notifications) + events._current_cost
                    assert held <= 8
            assert text == "".join(f"{number} " for number in range(1000))


async def test_leaving_early_unsubscribes() -> None:
    """Breaking out of an event stream ends the subscription and not the stream."""
    async with open_scene() as scene, connect(scene.url) as client:
        started = await client.start("forever", {})
        async with client.subscribe(started.id) as events:
            async for _ in events:
                break
        while (info := await client.get(started.id)).readers:
            pass
        assert info.state == "streaming"


async def test_positions_at_the_end() -> None:
    """Subscribed after the outcome there is nothing to wait for; a snapshot of an ended stream is whole."""
    async with open_scene() as scene, connect(scene.url) as client:
        started = await client.start("ten", {})
        await client.wait(started.id)
        async with client.subscribe(started.id, after="snapshot") as events:
            assert events.snapshot is not None
            assert events.snapshot.text == TEN
            assert await text_of(events) == ""
        async with client.subscribe(started.id, after="tail") as events:
            assert [event async for event in events] == []


async def test_a_lost_connection_ends_calls_and_streams() -> None:
    """Without `reconnect`, what is under way raises ControlClosedError, and so does everything after."""
    async with open_scene() as scene, connect(scene.url) as client:
        started = await client.start("forever", {})
        failed: list[str] = []
        watching = trio.Event()

        async def waits() -> None:
            with pytest.raises(ControlClosedError):
                await client.wait(started.id)
            failed.append("wait")

        async def watches() -> None:
            async with client.subscribe(started.id) as events:
                await events.__anext__()
                watching.set()
                with pytest.raises(ControlClosedError):
                    await text_of(events)
            failed.append("watch")

        async with trio.open_nursery() as nursery:
            nursery.start_soon(waits)
            nursery.start_soon(watches)
            await watching.wait()
            await drop_all(scene)
        assert sorted(failed) == ["wait", "watch"]
        with pytest.raises(ControlClosedError):
            await client.health()


async def test_event_streams_go_on_over_lost_connections() -> None:
    """With `reconnect` the connection is cut after each few events, and the text arrives whole, once, in order."""
    async with open_scene() as scene:
        step, stepped = trio.open_memory_channel[str](0)

        async def stepwise(out: Output) -> None:
            async for part in stepped:
                await out.send(part)

        scene.sources["stepwise"] = stepwise
        async with connect(scene.url, reconnect=True, limits=FAST) as client:
            started = await client.start("stepwise", {}, key="k")
            text = ""
            seqs: list[int] = []
            async with client.subscribe(key="k", window=5) as events:
                for number in range(30):
                    await step.send(f"{number} ")
                    event = await events.__anext__()
                    text += event.text
                    seqs.append(event.seq)
                    if number % 7 == 3:
                        await drop_all(scene)
                    if number % 7 == 5:
                        assert (await client.get(started.id)).state == "streaming"
                await step.aclose()
                rest = [event.kind async for event in events]
            assert rest == ["outcome"]
            assert text == "".join(f"{number} " for number in range(30))
            assert seqs == list(range(1, 31))
            assert scene.server.statistics().accepted >= 4


async def test_without_resume_a_lost_connection_ends_the_iteration() -> None:
    """`resume=False`: the client reconnects, the event stream does not."""
    async with open_scene() as scene, connect(scene.url, reconnect=True, limits=FAST) as client:
        started = await client.start("forever", {})
        async with client.subscribe(started.id, resume=False) as events:
            await events.__anext__()
            await drop_all(scene)
            with pytest.raises(ControlClosedError):
                await events.__anext__()
        assert (await client.health())["status"] == "ok"


async def test_a_code_that_says_do_not_reconnect_is_obeyed() -> None:
    """After a close with a code from 4500 on the client stays closed and says why."""
    limits = attrs.evolve(ControlLimits(), link=LinkLimits(max_message_bytes=1000))
    async with open_scene(limits=limits) as scene, connect(scene.url, reconnect=True, limits=FAST) as client:
        with pytest.raises(ControlClosedError) as closed:
            await client.start("ten", {"too": "x" * 2000})
        assert closed.value.code == CloseCode.MESSAGE_TOO_BIG
        with pytest.raises(ControlClosedError) as closed:
            await client.health()
        assert closed.value.code == CloseCode.MESSAGE_TOO_BIG
        assert scene.server.statistics().accepted == 1


async def test_a_restarted_server_tells_of_a_gap() -> None:
    """If the history is gone after a restart the event stream raises GapError or RequestError, never goes on with a gap."""
    async with open_scene() as scene, connect(scene.url, reconnect=True, limits=FAST) as client:
        started = await client.start("forever", {})
        async with client.subscribe(started.id) as events:
            await events.__anext__()
            async with open_supervisor() as other:
                replace_supervisor(scene, other)
                await drop_all(scene)
                with pytest.raises(RequestError) as gone:
                    await events.__anext__()
                assert gone.value.kind == "unknown_stream"


def replace_supervisor(scene: Scene, supervisor: Supervisor) -> None:
    scene.server.supervisor = supervisor


async def test_what_cannot_be_connected_to() -> None:
    """Nothing there, no WebSocket there, another protocol, silence: each is a ControlClosedError that says what was met."""

    def answer(data: bytes) -> Any:
        async def handle(stream: trio.SocketStream) -> None:
            async with stream:
                await stream.receive_some()
                if data:
                    await stream.send_all(data)
                else:
                    await trio.sleep_forever()

        return handle

    with pytest.raises(ControlClosedError, match="no connection"):
        async with connect("ws://127.0.0.1:1"):
            pass
    ok = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nhi"
    for data, said in (
        (ok, "HTTP 200"),
        (b"SSH-2.0\r\n\r\n", "closed|failed|connection"),
        (b"", "did not answer"),
        (b"HTTP/1.1 1", "closed|failed|did not answer|connection"),
    ):
        async with trio.open_nursery() as nursery:
            (listener,) = await nursery.start(on_loopback, answer(data))
            port = listener.socket.getsockname()[1]
            with pytest.raises(ControlClosedError, match=said):
                async with connect(f"ws://127.0.0.1:{port}", limits=attrs.evolve(FAST, connect_s=0.1)):
                    pass
            nursery.cancel_scope.cancel()


async def test_a_server_that_is_just_starting(monkeypatch: pytest.MonkeyPatch) -> None:
    """A connection that is refused is tried again for `wait_s`, none by default; another failure is not."""
    dial, tries = trio.open_tcp_stream, 0

    async def counted(host: str, port: int) -> trio.abc.Stream:
        nonlocal tries
        tries += 1
        return await dial(host, port)

    monkeypatch.setattr(trio, "open_tcp_stream", counted)
    with trio.socket.socket() as sock:
        await sock.bind(("127.0.0.1", 0))  # and nobody listens yet
        url = f"ws://127.0.0.1:{sock.getsockname()[1]}"
        for wait_s, least in ((0, 1), (0.03, 2)):
            tries = 0
            with pytest.raises(ControlClosedError, match="no connection"):
                async with connect(url, limits=attrs.evolve(FAST, wait_s=wait_s)):
                    pass
            assert least <= tries <= least * least * 2
        tries = 0
        async with open_scene() as scene, trio.open_nursery() as nursery:

            async def listen() -> None:
                await until(lambda: tries >= 2)
                sock.listen()
                await trio.serve_listeners(scene.server.handle, [trio.SocketListener(sock)])

            nursery.start_soon(listen)
            async with connect(url, limits=attrs.evolve(FAST, wait_s=60)) as client:
                assert (await client.health())["status"] == "ok"
            nursery.cancel_scope.cancel()
    async with open_scene(token="t") as scene:
        with pytest.raises(AuthenticationError), trio.fail_after(5):
            async with connect(scene.url, limits=attrs.evolve(FAST, wait_s=60)):
                pass


async def test_start_takes_a_prompt() -> None:
    """`prompt` and `model` are sent as the protocol has them; both or neither of `prompt` and `request` are refused, with what is."""
    async with open_scene() as scene, connect(scene.url) as client:
        await client.start("ten", prompt="Hello", model="m")
        await client.start("ten", {"model": "m"})
        assert [(one.prompt, one.model, one.request) for one in scene.started] == [
            ("Hello", "m", None),
            (None, None, {"model": "m"}),
        ]
        for given in ({}, {"prompt": "Hello", "request": {}}):
            with pytest.raises(ConfigurationError, match="expected exactly one of: request, prompt"):
                await client.start("ten", **given)
        with pytest.raises(ConfigurationError, match=r"^key: '' is not valid; expected a string of 1 to 256"):
            await client.start("ten", {}, key="")


@pytest.mark.parametrize("url", ["http://x", "ws://", "ws://x?token=t", "ws://u:p@x", "ws://x:99999", "x"])
async def test_urls(url: str) -> None:
    """A URL that cannot be right, or that would carry a secret, is refused, and not repeated in the message."""
    with pytest.raises(ConfigurationError) as wrong:
        async with connect(url):
            pass
    assert "token=t" not in str(wrong.value)
    assert "u:p" not in str(wrong.value)


async def test_the_callers_own_exception_comes_out_as_it_was() -> None:
    """What the body raises is not wrapped in a group, and a cancel from outside stays a cancel."""
    async with open_scene() as scene:
        with pytest.raises(KeyError, match="mine"):
            async with connect(scene.url):
                raise KeyError("mine")
        with trio.CancelScope() as scope:
            async with connect(scene.url):
                scope.cancel()
                await trio.sleep_forever()
        assert scope.cancelled_caught


async def test_a_server_that_lies_is_left() -> None:
    """A server that sends what is no message of the protocol ends the connection, not the program."""
    async with trio.open_nursery() as nursery:

        async def handle(stream: trio.SocketStream) -> None:
            head = (await stream.receive_some()).decode()
            key = next(
                line for line in head.split("\r\n") if line.lower().startswith("sec-websocket-key")
            ).split(": ")[1]
            digest = hashlib.sha1((key + "258EAFA5-E914-47DA-95CA-C5AB0DC85B11").encode()).digest()
            await stream.send_all(
                b"HTTP/1.1 101 x\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
                b"Sec-WebSocket-Protocol: stream-supervisor.v1\r\nSec-WebSocket-Accept: "
                + base64.b64encode(digest)
                + b"\r\n\r\n"
                + build_frame(OP_TEXT, b'{"id": []}')
            )
            await stream.receive_some()
            await stream.aclose()

        (listener,) = await nursery.start(on_loopback, handle)
        with pytest.raises(ControlClosedError):
            async with connect(f"ws://127.0.0.1:{listener.socket.getsockname()[1]}", limits=FAST):
                pass
        nursery.cancel_scope.cancel()


async def page(stream: trio.SocketStream) -> None:
    """Answer as a web server does."""
    await stream.receive_some()
    body = b"<!doctype html>" * 20
    head = b"HTTP/1.1 200 OK\r\nContent-Type: text/html\r\nContent-Length: %d\r\n\r\n" % len(body)
    await stream.send_all(head + body)


async def test_an_http_address_is_told_as_one() -> None:
    """Who connects to where HTTP is served is told so, and where the control channel is, without a page of HTML."""
    async with trio.open_nursery() as nursery:
        listeners = await nursery.start(partial(trio.serve_tcp, page, 0, host="127.0.0.1"))
        port = listeners[0].socket.getsockname()[1]
        with pytest.raises(ControlClosedError, match=r"HTTP address.*ws://HOST:7433") as caught:
            async with connect(f"ws://127.0.0.1:{port}"):
                pass
        assert "<" not in str(caught.value)
        nursery.cancel_scope.cancel()
