"""Delivering events to many: when it is written, in which pieces, and what one connection costs the others."""

from __future__ import annotations

import contextlib
import json
import os
import random
from collections.abc import AsyncIterator, Iterator
from types import SimpleNamespace
from typing import cast

import attrs
import pytest
import trio
import trio.testing
import trio_websocket

from supervisor.control.frames import OP_CLOSE, OP_TEXT, build_close, build_frame
from supervisor.control.link import GuardedStream, Link, LinkLimits
from supervisor.control.session import Session
from supervisor.dialects import Delta
from supervisor.errors import ControlClosedError
from supervisor.streams import Output

from .harness import Peer, Scene, clog, handshake, open_scene, until

PONG = build_frame(0xA, b"pong")
CLOSE = 0x80 | OP_CLOSE


# --- one connection ---------------------------------------------------------------------------------------------------


@contextlib.asynccontextmanager
async def narrow(limits: LinkLimits) -> AsyncIterator[tuple[Link, GuardedStream, trio.SocketStream]]:
    """Give a server's link over a socket that takes few bytes at a time, and the peer's end."""
    here, there = trio.socket.socketpair()
    here.setsockopt(
        trio.socket.SOL_SOCKET, trio.socket.SO_SNDBUF, 1
    )  # the kernel's least: a few thousand bytes
    ours, theirs = trio.SocketStream(here), trio.SocketStream(there)
    guard = GuardedStream(ours, client=False, limits=limits)
    await theirs.send_all(handshake(1))
    await guard.receive_some()
    await guard.send_all(b"HTTP/1.1 101 Switching Protocols\r\n\r\n")
    assert (await theirs.receive_some()).endswith(b"\r\n\r\n")
    guard.opened()
    async with ours, theirs:
        yield (
            Link(cast("trio_websocket.WebSocketConnection", None), guard, limits, client=False),
            guard,
            theirs,
        )


def frames(data: bytes) -> Iterator[tuple[int, bytes]]:
    """Cut what a server sent into frames; none may be cut off."""
    while data:
        length, start = data[1], 2
        if length >= 126:
            start = 4 if length == 126 else 10
            length = int.from_bytes(data[2:start], "big")
        assert len(data) >= start + length, "a part of a frame"
        yield data[0], data[start : start + length]
        data = data[start + length :]


@pytest.mark.parametrize("seed", range(8))
async def test_frames_of_all_who_write_stay_whole_and_in_order(seed: int) -> None:
    """Events, answers, Pongs and the Close share a socket that takes a part of a frame: none lands inside another."""
    chance = random.Random(seed)
    received = bytearray()
    said: list[bytes] = []
    pongs = 0
    limits = LinkLimits(close_s=60)
    with trio.fail_after(10):
        async with narrow(limits) as (link, guard, theirs), trio.open_nursery() as nursery:

            async def peer() -> None:
                while not received.endswith(b"\x88\x05\x0f\xa0bye"):
                    received.extend(await theirs.receive_some(chance.choice((10, 500, 5000))))
                    for _ in range(chance.randrange(3)):
                        await trio.lowlevel.checkpoint()
                await theirs.send_all(build_frame(OP_CLOSE, b"", mask=True))

            nursery.start_soon(peer)
            async with trio.open_nursery() as ours:
                ours.start_soon(link.run)
                for number in range(60):
                    message = b"%d:" % number + b"x" * chance.choice((1, 200, 3000, 20_000))
                    act = chance.randrange(4)
                    if act < 3:
                        said.append(message)
                    if act < 2:
                        link.write(link.frame(message))
                    elif act == 2:
                        link.send_nowait(message)
                    else:
                        pongs += 1
                        ours.start_soon(guard.send_all, PONG)
                    for _ in range(chance.choice((0, 1, 5))):
                        await trio.lowlevel.checkpoint()
                await until(lambda: len(ours.child_tasks) == 1)  # the Pongs are sent
                if seed % 2:
                    await until(lambda: not link.outbox.nbytes and not guard.unfinished)
                ours.cancel_scope.cancel()
            await link.close(4000, "bye")
    came = list(frames(bytes(received)))
    assert [payload for opcode, payload in came if opcode == 0x80 | OP_TEXT] == said
    assert [payload for opcode, payload in came if opcode == PONG[0]] == [b"pong"] * pongs
    assert [opcode for opcode, _ in came].index(CLOSE) == len(came) - 1


async def test_the_rest_of_a_frame_is_sent_though_nothing_follows() -> None:
    """A frame that the socket took a part of is finished by the writer, without another to wake it."""
    async with narrow(LinkLimits()) as (link, guard, theirs), trio.open_nursery() as nursery:
        nursery.start_soon(link.run)
        frame = link.frame(b"x" * 100_000)
        link.write(frame)
        assert guard.unfinished
        received = b""
        with trio.fail_after(10):
            while len(received) < len(frame):
                received += await theirs.receive_some()
        assert received == frame
        nursery.cancel_scope.cancel()


async def test_nothing_is_written_before_the_rest_or_after_the_close() -> None:
    """With a frame half sent, or our Close sent, a socket that takes more is not written to by who does not wait."""
    async with narrow(LinkLimits()) as (link, guard, theirs):
        frame = link.frame(b"x" * 100_000)
        assert guard.send_nowait(frame)
        received = os.read(theirs.socket.fileno(), 1 << 20)  # in this very step: nobody could send the rest
        assert guard.unfinished
        assert not guard.send_nowait(PONG)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(guard.send_close, build_close(4000, "bye"))
            while not received.endswith(b"bye"):
                received += await theirs.receive_some()
        assert [opcode for opcode, _ in frames(received)] == [0x80 | OP_TEXT, CLOSE]
        assert not guard.send_nowait(PONG)


async def test_a_connection_that_is_lost_while_it_is_written_to_ends() -> None:
    """What cannot be written is not kept, and not passed over in silence either: the link says that the connection is over."""
    async with narrow(LinkLimits()) as (link, _, theirs):
        link._socket = cast("trio_websocket.WebSocketConnection", SimpleNamespace(closed=None))
        await theirs.aclose()
        with pytest.RaisesGroup(ControlClosedError), trio.fail_after(10):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(link.run)
                link.write(link.frame(b"lost"))
                assert not link.outbox.nbytes
        link.write(link.frame(b"too late"))  # never reaches the socket; bounded by who looks for room
        assert link.outbox.nbytes


# --- many connections -------------------------------------------------------------------------------------------------


@attrs.define
class Fed:
    """Streams that the test writes to, and who watches them."""

    scene: Scene
    outs: list[Output] = attrs.field(factory=list)
    sessions: dict[Peer, Session] = attrs.field(factory=dict)

    async def start(self, count: int) -> list[str]:
        async def source(out: Output) -> None:
            self.outs.append(out)
            await trio.sleep_forever()

        self.scene.sources["fed"] = source
        peer = await self.scene.peer()
        ids = []
        for number in range(count):
            ids.append((await peer.call("stream.start", upstream="fed", request={}))["result"]["id"])
            await until(lambda wanted=number + 1: len(self.outs) == wanted)
        await peer.stream.aclose()
        await until(lambda: not self.scene.server.sessions)
        return ids

    async def watch(self, *ids: str, credit: int = 100) -> Peer:
        before = set(self.scene.server.sessions)
        peer = await self.scene.peer()
        for stream in ids:
            assert "result" in await peer.call("stream.subscribe", id=stream, after="tail", credit=credit)
        (self.sessions[peer],) = set(self.scene.server.sessions) - before
        return peer

    def append(self, stream: int, text: str = "x") -> None:
        out = self.outs[stream]
        out.append(b"{}", "", (Delta(text=text),))
        out.flush()


@contextlib.asynccontextmanager
async def fed(count: int) -> AsyncIterator[tuple[Fed, list[str]]]:
    async with open_scene() as scene:
        it = Fed(scene)
        yield it, await it.start(count)


@pytest.fixture
def writes(monkeypatch: pytest.MonkeyPatch) -> list[tuple[GuardedStream, bytes]]:
    """Return what is written without waiting, and to whom, as it happens."""
    made: list[tuple[GuardedStream, bytes]] = []
    send = GuardedStream.send_nowait

    def noted(guard: GuardedStream, data: bytes) -> bool:
        made.append((guard, data))
        return send(guard, data)

    monkeypatch.setattr(GuardedStream, "send_nowait", noted)
    return made


def spans(data: bytes) -> list[tuple[int, int]]:
    """Return the first and last event of each notification."""
    return [
        (params["first"], params["last"])
        for _, payload in frames(data)
        for params in [json.loads(payload)["params"]]
    ]


async def test_a_turn_costs_each_connection_one_write(writes: list[tuple[GuardedStream, bytes]]) -> None:
    """Events of several streams, several each, in one turn of the loop: one write a connection, one notification a stream."""
    async with fed(3) as (it, ids):
        peers = [await it.watch(*ids) for _ in range(2)]
        peers.append(await it.watch(ids[1]))
        for _ in range(2):  # not only the first time
            writes.clear()
            for number in range(12):
                it.append(number % 3)
            await until(lambda: bool(writes))
            await trio.testing.wait_all_tasks_blocked()
            assert len(writes) == 3
            written = {guard: spans(data) for guard, data in writes}
            for peer, notifications in zip(peers, (3, 3, 1), strict=True):
                its = written[it.sessions[peer]._link._guard]
                assert len(its) == notifications
                assert {last - first + 1 for first, last in its} == {4}


async def test_credit_is_kept_by_each_of_many() -> None:
    """Of subscribers that are served together each is sent what its own credit is for, and goes on with the next grant."""
    async with fed(1) as (it, ids):
        peers = [await it.watch(*ids, credit=credit) for credit in (9, 2, 9, 3)]
        for _ in range(4):
            it.append(0)
            await trio.testing.wait_all_tasks_blocked()
        for peer, count in zip(peers, (4, 2, 4, 3), strict=True):
            for _ in range(count):
                assert (await peer.message())["method"] == "stream.events"
            reply = await peer.call("stream.credit", sub="s1", credit=1)
            assert reply["result"]["credit"] == {4: 6, 2: 1, 3: 1}[count]


class Turns(trio.abc.Instrument):
    """Counts the turns of the loop."""

    def __init__(self) -> None:
        self.count = 0

    def before_io_wait(self, timeout: float) -> None:
        """Count one."""
        del timeout
        self.count += 1


@pytest.mark.parametrize("watched", [1, 2])
async def test_at_rest_an_event_waits_for_one_turn(
    watched: int, writes: list[tuple[GuardedStream, bytes]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is held back to be sent with more: what is appended in one turn of the loop is written in the next."""
    turns = Turns()
    async with fed(watched) as (it, ids):
        for _ in range(3):
            await it.watch(*ids)
        when: list[int] = []
        noted = GuardedStream.send_nowait

        def timed(guard: GuardedStream, data: bytes) -> bool:
            when.append(turns.count)
            return noted(guard, data)

        monkeypatch.setattr(GuardedStream, "send_nowait", timed)
        trio.lowlevel.add_instrument(turns)
        for _ in range(5):
            await trio.testing.wait_all_tasks_blocked()
            when.clear()
            begun = turns.count
            for stream in range(watched):
                it.append(stream)
            await until(lambda: len(when) == 3)
            assert when == [begun + 1] * 3
        trio.lowlevel.remove_instrument(turns)


@pytest.mark.parametrize("streams", [1, 2], ids=["written at once", "staged"])
@pytest.mark.parametrize("broken", [0, 1, 3], ids=["first", "second", "last"])
@pytest.mark.parametrize("where", ["send", "serve"])
async def test_an_error_for_one_subscriber_reaches_nobody_else(
    streams: int, broken: int, where: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A bug met in serving one connection ends that one with 4004; all others get the same events, before and after."""
    async with fed(streams) as (it, ids):
        peers = [await it.watch(*ids) for _ in range(4)]
        delivery = it.sessions[peers[broken]]._delivery

        def boom(*_: object) -> None:
            raise ValueError("a bug")

        if where == "serve" and broken:  # have it served by itself, not as one of many that differ in nothing
            for watch in delivery._watches.values():
                watch.text = True
        monkeypatch.setattr(delivery, where, boom)
        for stream in range(streams):
            it.append(stream, "one")
        sick = peers.pop(broken)
        assert (await sick.closed()).code == 4004
        for stream in range(streams):
            it.append(stream, "two")
        for peer in peers:
            texts = ""
            while texts.count("two") < streams:
                texts += "".join(event["text"] for event in (await peer.message())["params"]["events"])
            assert texts.count("one") == streams
        await sick.stream.aclose()
        await until(lambda: it.scene.server.statistics().crashes == 1)
        assert len(it.scene.server.sessions) == len(peers)
        assert "a bug" in caplog.text


async def test_a_stalled_subscriber_costs_the_others_nothing(
    writes: list[tuple[GuardedStream, bytes]],
) -> None:
    """It goes out of step once, and then no event is encoded, staged or offered to its socket on its behalf."""
    async with fed(1) as (it, ids):
        await it.watch(*ids)  # and reads nothing
        session = await clog(it.scene)
        peers = [await it.watch(*ids) for _ in range(6)]
        server = it.scene.server
        seqs: dict[Peer, list[int]] = {peer: [] for peer in peers}
        for _ in range(10):
            before = server.statistics().delivery
            writes.clear()
            it.append(0)
            for peer in peers:
                message = await peer.message()
                seqs[peer] += [event["seq"] for event in message["params"]["events"]]
            await trio.testing.wait_all_tasks_blocked()
            assert session._link._guard not in [guard for guard, _ in writes]
            assert len(writes) == len(peers)
            after = server.statistics().delivery
            assert (after.encoded - before.encoded, after.shared - before.shared) == (1, len(peers) - 1)
            (topic,) = server.deliveries._topics.values()
            assert len(topic.in_step) == len(peers)
        assert len(set(map(tuple, seqs.values()))) == 1
        assert len(seqs[peers[0]]) == 10
        assert len(session._delivery.behind) == 1
