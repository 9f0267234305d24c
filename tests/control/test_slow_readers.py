"""Slow readers over the channel: joined text, snapshots, gaps, stalled sockets, and coming back."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from typing import Any, cast

import attrs
import pytest
import trio
import trio.testing

from supervisor.control import (
    ClientLimits,
    CloseCode,
    ControlClient,
    ControlLimits,
    LinkLimits,
    connect,
)
from supervisor.control.session import Session
from supervisor.dialects import Delta
from supervisor.errors import GapError
from supervisor.stores import MemoryStore
from supervisor.streams import Limits, OnDetach, Output, Stream

from .harness import Closed, Peer, Scene, clog, open_scene, until

FAST = ClientLimits(connect_s=5, retry_initial_s=0.01, retry_max_s=0.02)
SMALL_TAIL = Limits(tail_events=8)


class Told:
    """A stream that says what the test makes it say."""

    def __init__(self, pad: str = "") -> None:
        self.pad = pad
        self.outs: list[Output] = []
        self.count = 0
        self._ending = trio.Event()

    async def __call__(self, out: Output) -> None:
        self.outs.append(out)
        await self._ending.wait()

    def say(self, count: int) -> None:
        for _ in range(count):
            self.count += 1
            word = self.word(self.count)
            self.outs[0].append(b'{"text":"%b"}' % word.encode(), "", (Delta(text=word),))
        self.outs[0].flush()

    def end(self) -> None:
        self._ending.set()

    @property
    def text(self) -> str:
        return "".join(map(self.word, range(1, self.count + 1)))

    def word(self, number: int) -> str:
        return f"{number}{self.pad} "


async def talk(scene: Scene, count: int = 0, *, pad: str = "", **options: Any) -> tuple[Stream, Told]:
    told = Told(pad)
    stream = await scene.supervisor.start(told, **options)
    await until(lambda: bool(told.outs))
    if count:
        told.say(count)
    return stream, told


@attrs.define
class Reading:
    """What one subscription of a peer has come to: checked for gaps and repetition as it goes."""

    peer: Peer
    last: int = 0
    text: str = ""
    credit_used: int = 0
    kinds: list[str] = attrs.field(factory=list)

    async def next(self) -> dict[str, Any]:
        params = (await self.peer.message())["params"]
        assert params["first"] == self.last + 1
        self.last = params["last"]
        for event in params["events"]:
            self.kinds.append(event["kind"])
            if event["kind"] == "snapshot":
                assert len(params["events"]) == 1
                assert (event["first"], event["last"], event["seq"]) == (
                    params["first"],
                    self.last,
                    self.last,
                )
                assert (event["snapshot"]["epoch"], event["snapshot"]["seq"]) == (params["epoch"], self.last)
                assert "text" not in event
                self.text = event["snapshot"]["text"]
            self.text += event.get("text", "")
        self.credit_used += 1 if self.kinds[-1:] == ["snapshot"] else params["last"] - params["first"] + 1
        return cast("dict[str, Any]", params)

    async def to_the_end(self) -> None:
        while self.kinds[-1:] != ["outcome"]:
            await self.next()


def held(session: Session) -> int:
    """Return what waits to be sent on a connection."""
    link = session._link
    return link.outbox.nbytes + len(link._taken) + link._guard.rest_bytes


# --- what was missed -------------------------------------------------------------------------------------------------


async def test_the_view_text_joins_what_a_slow_reader_missed() -> None:
    """One event a notification, whatever each event was: of 2000 events in memory or in the store, eight."""
    for limits in (Limits(), SMALL_TAIL):
        async with open_scene(supervisor_limits=limits) as scene:
            stream, told = await talk(scene, 2000)
            reading = Reading(await scene.peer())
            await reading.peer.call("stream.subscribe", id=stream.id, view="text", credit=1_000_000)
            while reading.last < 2000:
                await reading.next()
            assert reading.kinds == ["text"] * 8
            told.end()
            await reading.to_the_end()
            assert reading.text == told.text


@pytest.mark.parametrize("view", ["events", "text"])
@pytest.mark.parametrize(
    "limits", [Limits(), attrs.evolve(SMALL_TAIL, fold_bytes=1000)], ids=["memory", "store"]
)
async def test_far_behind_one_snapshot_comes_in_place_of_the_backlog(view: str, limits: Limits) -> None:
    """At the start, and again whenever the credit comes late; it costs 1; the events go on from it, the outcome last."""
    async with open_scene(supervisor_limits=limits) as scene:
        stream, told = await talk(scene, 5000)
        reading = Reading(await scene.peer())
        reply = await reading.peer.call("stream.subscribe", id=stream.id, view=view, credit=11, max_behind=10)
        sub = reply["result"]["sub"]
        params = await reading.next()
        assert (params["first"], params["last"]) == (1, 5000)
        shot = params["events"][0]["snapshot"]
        assert (shot["id"], shot["state"]) == (stream.id, "streaming")
        assert shot == (await reading.peer.call("stream.snapshot", id=stream.id))["result"]
        told.say(10)
        while reading.last < 5010:
            await reading.next()
        assert "snapshot" not in reading.kinds[1:]
        told.say(300)  # there is no credit for these
        reply = await reading.peer.call("stream.credit", sub=sub, credit=3)
        assert reply["result"]["credit"] == 3
        params = await reading.next()
        assert (params["first"], params["last"], reading.kinds[-1]) == (5011, 5310, "snapshot")
        reply = await reading.peer.call("stream.credit", sub=sub, credit=0)
        assert reply["result"]["credit"] == 2
        told.say(1)
        told.end()
        await reading.to_the_end()
        assert reading.text == told.text
        assert reading.credit_used == 1 + 10 + 1 + 2


async def test_a_snapshot_is_for_those_who_asked() -> None:
    """Subscribers at the same place on the same connection and on others: each has what it asked for, the whole text."""
    async with open_scene() as scene:
        stream, told = await talk(scene)
        readings = []
        for max_behind in (None, 10, None, 10):
            reading = Reading(await scene.peer())
            asked = {} if max_behind is None else {"max_behind": max_behind}
            await reading.peer.call("stream.subscribe", id=stream.id, credit=0, **asked)
            readings.append(reading)
        told.say(400)
        for reading in readings:
            await reading.peer.call("stream.credit", sub="s1", credit=1000)
            if "max_behind" in asked:
                await reading.next()
        told.end()
        for reading in readings:
            await reading.to_the_end()
            assert reading.text == told.text
        plain, jumping = readings[::2], readings[1::2]
        assert all(reading.kinds == ["data"] * 400 + ["outcome"] for reading in plain)
        assert all(reading.kinds == ["snapshot", "outcome"] for reading in jumping)


async def test_those_who_come_at_once_are_not_served_alike() -> None:
    """In one turn of the loop, one after the other on the same stream: the second asked for a snapshot and gets it."""
    async with open_scene() as scene:
        stream, told = await talk(scene, 1)
        readings = [Reading(await scene.peer(), last=1) for _ in range(3)]
        for reading, max_behind in zip(readings, (None, 10, None), strict=True):
            asked = {} if max_behind is None else {"max_behind": max_behind}
            await reading.peer.call("stream.subscribe", id=stream.id, after="tail", credit=1000, **asked)
        told.say(100)
        for reading in readings:
            await reading.next()
        assert [reading.kinds[0] for reading in readings] == ["data", "snapshot", "data"]


async def test_no_snapshot_is_made_for_a_socket_that_takes_nothing() -> None:
    """It is made once there is room, and then of that moment: a stalled subscriber holds a position and no answer."""
    async with open_scene(limits=attrs.evolve(ControlLimits(), link=LinkLimits(stall_s=60))) as scene:
        stream, told = await talk(scene, 1)
        reading = Reading(await scene.peer())
        await reading.peer.call("stream.subscribe", id=stream.id, credit=1000, max_behind=10)
        await reading.next()
        session = await clog(scene)
        before = held(session)
        for _ in range(20):
            told.say(50)
            await trio.testing.wait_all_tasks_blocked()
            assert held(session) == before
        await reading.next()
        assert (reading.kinds, reading.last) == (["data", "snapshot"], 1001)
        assert reading.text == told.text


async def test_a_snapshot_waits_for_its_turn_and_then_for_room() -> None:
    """While its connection makes another large answer, and the socket fills meanwhile: it is of the moment it is sent in."""
    limits = attrs.evolve(ControlLimits(), link=LinkLimits(stall_s=60))
    async with open_scene(limits=limits) as scene:
        stream, told = await talk(scene, 20)
        reading = Reading(await scene.peer())
        sub = (await reading.peer.call("stream.subscribe", id=stream.id, credit=0, max_behind=10))["result"][
            "sub"
        ]
        (session,) = scene.server.sessions
        for _ in range(2):
            await session._turns.acquire()
        await reading.peer.tell("stream.credit", sub=sub, credit=1000)
        await until(lambda: session._delivery._watches[sub].fetching)
        await clog(scene)
        for _ in range(2):
            session._turns.release()
        await trio.testing.wait_all_tasks_blocked()
        told.say(100)
        await reading.next()
        assert (reading.kinds, reading.last) == (["snapshot"], 120)


async def test_what_was_read_for_a_subscription_and_not_sent_is_not_skipped() -> None:
    """Unsubscribed while a batch from the store waits for room, the position told is that of what was sent."""
    limits = attrs.evolve(ControlLimits(), link=LinkLimits(stall_s=60))
    async with open_scene(limits=limits, supervisor_limits=SMALL_TAIL) as scene:
        stream, told = await talk(scene, 1)
        reading = Reading(await scene.peer())
        sub = (await reading.peer.call("stream.subscribe", id=stream.id, credit=1))["result"]["sub"]
        await reading.next()
        told.say(200)
        await clog(scene)
        await reading.peer.tell("stream.credit", sub=sub, credit=1000)
        await trio.testing.wait_all_tasks_blocked()
        reply = await reading.peer.call("stream.unsubscribe", sub=sub)
        assert reply["result"] == {"epoch": 1, "seq": 1}


# --- what is gone ----------------------------------------------------------------------------------------------------


async def test_a_gap_is_told_while_subscribed() -> None:
    """History goes while there is no credit for it: the notification names what can be read, and ends the subscription."""
    async with open_scene(store=MemoryStore(max_bytes=50_000), supervisor_limits=SMALL_TAIL) as scene:
        stream, told = await talk(scene, 10)
        reading = Reading(await scene.peer())
        sub = (await reading.peer.call("stream.subscribe", id=stream.id, credit=5))["result"]["sub"]
        await reading.next()
        for _ in range(100):
            told.say(10)
        await reading.peer.tell("stream.credit", sub=sub, credit=1000)
        gap = await reading.peer.message()
        assert (gap["method"], gap["params"]["sub"]) == ("stream.gap", sub)
        data = gap["params"]["error"]["data"]
        assert (data["id"], data["after_epoch"], data["after_seq"], data["tail"]) == (stream.id, 1, 5, 1010)
        assert (stream.info().readers, scene.server.statistics().subscriptions) == (0, 0)
        after = {"epoch": data["epoch"], "seq": data["earliest"] - 1}
        reading.last = after["seq"]
        await reading.peer.call("stream.subscribe", id=stream.id, after=after, credit=5000)
        told.end()
        await reading.to_the_end()


async def test_the_client_library_tells_a_gap_after_what_it_had() -> None:
    """Iterating hands out all that came before, then raises GapError; with `max_behind` a snapshot takes its place."""
    async with (
        open_scene(store=MemoryStore(max_bytes=50_000), supervisor_limits=SMALL_TAIL) as scene,
        connect(scene.url) as client,
    ):
        stream, told = await talk(scene, 10)
        async with (
            client.subscribe(stream.id, window=4) as events,
            client.subscribe(stream.id, window=4, max_behind=500) as jumping,
        ):
            await events.__anext__()
            text = (await jumping.__anext__()).text
            for _ in range(100):
                told.say(10)
            seqs = [1]
            with pytest.raises(GapError) as caught:
                async for event in events:
                    seqs.append(event.seq)
            assert seqs == list(range(1, caught.value.after_seq + 1))
            assert seqs[-1] < caught.value.earliest_seq - 1
            assert (caught.value.stream_id, caught.value.tail_seq) == (stream.id, 1010)
            told.end()
            kinds = []
            async for event in jumping:
                kinds.append(event.kind)
                text = event.snapshot.text if event.snapshot is not None else text + event.text
            assert kinds == ["data"] * 3 + ["snapshot", "outcome"]
            assert text == told.text


# --- stalled sockets -------------------------------------------------------------------------------------------------


@attrs.define
class Stalling:
    """A client whose socket can be left unread, and of which the server's end buffers little."""

    client: ControlClient
    session: Session
    _released: trio.Event = attrs.field(factory=trio.Event)

    def stall(self) -> None:
        assert self.client._link is not None
        transport = self.client._link._guard._transport
        receive = transport.receive_some

        async def wait_first(max_bytes: int | None = None) -> bytes | bytearray:
            await self._released.wait()
            return await receive(max_bytes)

        transport.receive_some = wait_first  # type: ignore[method-assign]  # this socket's alone

    def release(self) -> None:
        self._released.set()


@contextlib.asynccontextmanager
async def stalling(scene: Scene) -> AsyncIterator[Stalling]:
    before = set(scene.server.sessions)
    async with connect(scene.url, reconnect=True, limits=FAST) as client:
        (session,) = set(scene.server.sessions) - before
        socket = cast("trio.SocketStream", session._link._guard._transport).socket
        socket.setsockopt(trio.socket.SOL_SOCKET, trio.socket.SO_SNDBUF, 4096)
        stalled = Stalling(client, session)
        try:
            yield stalled
        finally:
            stalled.release()


@pytest.mark.parametrize("max_behind", [None, 100], ids=["events", "snapshot"])
@pytest.mark.parametrize("view", ["events", "text"])
async def test_a_stalled_socket_is_given_up_and_its_client_goes_on_where_it_was(
    view: Any, max_behind: int | None
) -> None:
    """After `stall_s` nothing is held for it; others notice nothing; reading again it gets the rest, each event once."""
    limits = attrs.evolve(ControlLimits(), link=LinkLimits(stall_s=0.05, close_s=0.05, outbox_bytes=50_000))
    async with open_scene(limits=limits) as scene, stalling(scene) as slow, connect(scene.url) as other:
        stream, told = await talk(scene, 5, pad="." * 400)
        async with (
            slow.client.subscribe(stream.id, view=view, window=10_000, max_behind=max_behind) as events,
            other.subscribe(stream.id) as healthy,
        ):
            seen = await events.__anext__()
            text, last = seen.text, seen.seq
            slow.stall()
            told_to_healthy = 5
            for _ in range(5):
                await healthy.__anext__()
            while (
                not scene.server.statistics().stalled
            ):  # what it is told meanwhile, the other one is told at once
                if slow.session in scene.server.sessions and told.count < 3000:
                    told.say(50)
                    # It may be a snapshot that waits, which has the text twice, as it is and encoded, beside the batch before it.
                    most = 0 if max_behind is None else 4 * len(told.text)
                    assert held(slow.session) < 2 * 50_000 + 170_000 + most
                for _ in range(told.count - told_to_healthy):
                    assert (await healthy.__anext__()).seq == told_to_healthy + 1
                    told_to_healthy += 1
                await trio.lowlevel.checkpoint()
            await until(lambda: held(slow.session) == 0)
            assert slow.session not in scene.server.sessions
            assert (stream.info().readers, scene.server.statistics().subscriptions) == (1, 1)
            told.say(500)
            slow.release()
            told.end()
            kinds = []
            async for event in events:
                kinds.append(event.kind)
                assert event.first == last + 1 if event.first else event.seq == last + 1
                last = event.seq
                text = event.snapshot.text if event.snapshot is not None else text + event.text
            assert text == told.text
            assert kinds[-1] == "outcome"
            assert ("snapshot" in kinds) == (max_behind is not None)
        assert scene.server.statistics().accepted == 3


@pytest.mark.parametrize(("pad", "burst"), [(10, 300), (900, 1), (900, 7), (50_000, 1)])
async def test_who_reads_again_soon_is_told_why_it_was_given_up(pad: int, burst: int) -> None:
    """What it was sent in part is sent to its end, whatever it was, then the code that says: reconnect; nothing else."""
    limits = attrs.evolve(ControlLimits(), link=LinkLimits(stall_s=0.02, close_s=5))
    async with open_scene(limits=limits) as scene:
        stream, told = await talk(scene, pad="." * pad)
        reading = Reading(await scene.peer(receive_buffer=4096))
        await reading.peer.call("stream.subscribe", id=stream.id, credit=1_000_000)
        (session,) = scene.server.sessions
        guard = session._link._guard
        socket = cast("trio.SocketStream", guard._transport).socket
        socket.setsockopt(trio.socket.SOL_SOCKET, trio.socket.SO_SNDBUF, 4096)
        while not guard.stalled:
            if held(session) < 100_000:
                told.say(burst)
            await trio.lowlevel.checkpoint()
        with pytest.raises(Closed) as closed, trio.fail_after(5):
            await reading.to_the_end()
        assert closed.value.code == CloseCode.STALLED
        assert held(session) == 0
        assert reading.last < told.count


async def test_a_stalled_reader_keeps_a_stream_until_it_is_given_up() -> None:
    """`on_detach` counts from when its connection is closed: until then it is a reader, and nothing runs against it."""
    limits = attrs.evolve(ControlLimits(), link=LinkLimits(stall_s=0.1, close_s=0.1))
    async with open_scene(limits=limits) as scene:
        reading = Reading(await scene.peer(receive_buffer=4096))
        told = Told()
        stream = scene.supervisor.start_nowait(told, on_detach=OnDetach(mode="cancel", grace_s=0)).stream
        with stream.subscribe():  # so that it is watched from its first moment
            await reading.peer.call("stream.subscribe", id=stream.id, credit=1000)
            await until(lambda: bool(told.outs))
        session = await clog(scene)
        guard = session._link._guard
        while not guard.stalled:
            assert (stream.info().readers, stream.sealed) == (1, False)
            await trio.lowlevel.checkpoint()
        assert (await stream.wait()).reason == "detached"
        assert scene.server.statistics().subscriptions == 0


async def test_coming_back_in_time_stops_the_grace() -> None:
    """A connection that is cut detaches; the client library is back within the grace, and the stream goes on."""
    async with open_scene() as scene, connect(scene.url, reconnect=True, limits=FAST) as client:
        stream, told = await talk(scene, 3, on_detach=OnDetach(mode="cancel", grace_s=30))
        async with client.subscribe(stream.id) as events:
            await events.__anext__()
            for session in list(scene.server.sessions):
                await trio.aclose_forcefully(session._link._guard._transport)
            await until(lambda: scene.server.statistics().accepted == 2 and stream.info().readers == 1)
            assert stream.clocks.next_due()[1] != "detach"
            told.say(3)
            told.end()
            assert [event.seq async for event in events] == [2, 3, 4, 5, 6, 7]


def test_a_stall_is_told_as_something_to_come_back_from() -> None:
    """The code for it is one of those that say: reconnect."""
    assert 4000 <= CloseCode.STALLED <= 4499
