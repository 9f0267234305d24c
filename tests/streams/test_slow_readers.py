"""Readers that fall behind, miss what retention took, stall or leave: what each is given, and what a stream makes of it."""

from __future__ import annotations

import contextlib
import random
from pathlib import Path

import msgspec
import pytest
import trio
import trio.testing

from supervisor import (
    ConfigurationError,
    Cursor,
    Deadlines,
    Delta,
    GapError,
    Limits,
    MemoryStore,
    OnDetach,
    Snapshot,
    SQLiteStore,
    State,
    open_supervisor,
)
from supervisor.streams import Output, Stream, Subscription

PATIENT = Deadlines(first_event_s=None, idle_s=None)


class Told:
    """A stream that says what the test makes it say, and what a reader of all of it would have."""

    def __init__(self) -> None:
        self.out: Output
        self.text = [""]  # up to each seq
        self._ending = trio.Event()

    async def __call__(self, out: Output) -> None:
        self.out = out
        await self._ending.wait()

    def say(self, count: int) -> None:
        """Append so many events, and publish them together."""
        for _ in range(count):
            word = f"{len(self.text)} "
            self.out.append(b'{"text":"%b"}' % word.encode(), "", (Delta(text=word),))
            self.text.append(self.text[-1] + word)
        self.out.flush()

    def end(self) -> None:
        self._ending.set()


async def talk(sup, count: int = 0, **options) -> tuple[Stream, Told]:
    told = Told()
    stream = await sup.start(told, **options)
    await trio.testing.wait_all_tasks_blocked()
    if count:
        told.say(count)
    return stream, told


class Reader:
    """Reads in batches, and checks at each that it has neither lost nor doubled anything."""

    def __init__(self, events: Subscription, told: Told) -> None:
        self.events = events
        self.told = told
        self.text = ""
        self.kinds: list[str] = []

    async def read(self, max_events: int | None = None) -> bool:
        """Read one batch; False at the end."""
        before, tail = self.events.seq, self.events.tail
        batch = await self.events.next_batch(max_events)
        for event in batch:
            self.kinds.append(event.kind)
            if event.kind == "snapshot":
                assert len(batch) == 1
                shot = msgspec.json.decode(event.payload, type=Snapshot)
                assert (shot.text, Cursor(shot.epoch, shot.seq)) == (event.text, self.events.cursor)
                assert event.seq > before
                self.text = event.text
            else:
                assert event.seq == before + 1
                assert self.events.max_behind is None or tail - before <= self.events.max_behind
                self.text += event.text
                before = event.seq
            assert self.text == self.told.text[min(event.seq, len(self.told.text) - 1)]
        return bool(batch)


# --- far behind ------------------------------------------------------------------------------------------------------


async def test_whoever_is_far_behind_and_asked_for_it_gets_a_snapshot_in_place_of_what_it_missed():
    """One event for any backlog, and from there on the events; up to `max_behind` all of them; unasked never."""
    async with open_supervisor(limits=Limits(tail_events=8)) as sup:
        stream, told = await talk(sup, 5000)
        with stream.subscribe(max_behind=10) as events, stream.subscribe() as whole:
            reader, other = Reader(events, told), Reader(whole, told)
            await reader.read()
            assert reader.kinds == ["snapshot"]
            told.say(10)
            await reader.read()
            assert reader.kinds[1:] == ["data"] * 10
            told.say(11)
            await reader.read()
            assert reader.kinds[11:] == ["snapshot"]
            told.end()
            while await reader.read():
                pass
            assert reader.kinds[12:] == ["outcome"]
            while await other.read():
                pass
            assert other.kinds == ["data"] * 5021 + ["outcome"]


@pytest.mark.parametrize("spilled", [False, True], ids=["in memory", "spilled"])
async def test_the_outcome_is_not_swallowed_by_a_snapshot(spilled: bool):
    """Of an ended stream the whole answer comes in one event, and the outcome after it."""
    async with open_supervisor(limits=Limits(fold_bytes=1000 if spilled else 1 << 20)) as sup:
        stream, told = await talk(sup, 2000)
        told.end()
        outcome = await stream.wait()
        with stream.subscribe(max_behind=1) as events:
            got = [event async for event in events]
    assert [(event.kind, event.seq) for event in got] == [("snapshot", 2000), ("outcome", 2001)]
    assert got[0].text == told.text[-1]
    assert got[-1].payload == outcome.to_json()


async def test_a_stream_of_an_earlier_run_has_a_snapshot_too(tmp_path: Path):
    """What is read back from the store is folded for whoever does not want it event by event."""
    async with open_supervisor(store=SQLiteStore(tmp_path / "journal.db")) as sup:
        stream, told = await talk(sup, 600)
        told.end()
        await stream.wait()
    async with open_supervisor(store=SQLiteStore(tmp_path / "journal.db")) as sup:
        stream = await sup.find(stream.id)
        with stream.subscribe(max_behind=100) as events:
            got = [event async for event in events]
    assert [(event.kind, event.seq) for event in got] == [("snapshot", 600), ("outcome", 601)]
    assert got[0].text == told.text[-1]


@pytest.mark.parametrize("seed", range(25))
async def test_at_any_pace_the_text_is_whole(seed: int):
    """Bursts, reads and limits of any size in any order: after each event a reader has just the text up to there."""
    chance = random.Random(seed)
    limits = Limits(tail_events=chance.choice((4, 1000)), fold_bytes=chance.choice((200, 1 << 20)))
    async with open_supervisor(limits=limits) as sup:
        stream, told = await talk(sup)
        with contextlib.ExitStack() as stack:
            readers = [
                Reader(stack.enter_context(stream.subscribe(max_behind=max_behind)), told)
                for max_behind in (None, 1, chance.randrange(2, 30), chance.randrange(2, 300))
            ]
            for _ in range(12):
                told.say(chance.choice((1, 3, 20, 200)))
                for reader in chance.sample(readers, 2):
                    for _ in range(chance.randrange(3)):
                        if reader.events.seq < stream.tail_seq:
                            await reader.read(chance.choice((1, 7, None)))
            told.end()
            for reader in readers:
                while await reader.read(chance.choice((1, 50, None))):
                    pass
                assert reader.kinds[-1] == "outcome"
                assert reader.text == told.text[-1]


async def test_a_cancelled_read_of_a_snapshot_takes_nothing():
    """A reader that gives up while its snapshot is being read back is where it was."""
    async with open_supervisor(limits=Limits(fold_bytes=1000, tail_events=8)) as sup:
        stream, told = await talk(sup, 2000)
        with stream.subscribe(max_behind=10) as events:
            reader = Reader(events, told)
            for checkpoints in range(1, 6):
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(events.next_batch)
                    for _ in range(checkpoints):
                        await trio.lowlevel.checkpoint()
                    nursery.cancel_scope.cancel()
                assert events.cursor == Cursor(1, 0)
            await reader.read()
            assert reader.kinds == ["snapshot"]
        await stream.cancel()


async def test_taking_without_waiting_leaves_a_snapshot_to_next_batch():
    """Far behind, `take_nowait` says None as it does for what must be read from the store; closed, it does not."""
    async with open_supervisor() as sup:
        stream, told = await talk(sup, 20)
        events = stream.subscribe(max_behind=10).__enter__()
        assert (events.far_behind, events.take_nowait()) == (True, None)
        assert [event.kind for event in await events.next_batch()] == ["snapshot"]
        told.say(10)
        assert (events.far_behind, len(events.take_nowait() or ())) == (False, 10)
        events.close()
        await stream.cancel()


async def test_half_a_surrogate_pair_does_not_keep_a_snapshot_from_its_reader():
    """A program may send a text that no encoder takes: the snapshot's JSON has a question mark for it."""
    async with open_supervisor() as sup:
        stream, told = await talk(sup)
        for _ in range(3):
            told.out.append(b"{}", "", (Delta(text="a\ud800"),))
        told.out.flush()
        with stream.subscribe(max_behind=2) as events:
            (event,) = await events.next_batch()
        await stream.cancel()
    assert event.text == "a\ud800" * 3
    assert msgspec.json.decode(event.payload, type=Snapshot).text == "a?a?a?"


@pytest.mark.parametrize("max_behind", [0, -1])
async def test_a_reader_must_be_let_behind_a_little(max_behind: int):
    """`max_behind` is 1 or more: with 0 there would be no events."""
    async with open_supervisor() as sup:
        stream, _ = await talk(sup)
        with pytest.raises(ConfigurationError, match="max_behind"):
            stream.subscribe(max_behind=max_behind)
        await stream.cancel()


# --- what is gone ----------------------------------------------------------------------------------------------------


async def test_a_reader_that_the_stores_bound_has_passed_is_told_what_there_is():
    """While it is subscribed, and where it can read on: nothing is skipped silently."""
    async with open_supervisor(store=MemoryStore(max_bytes=50_000), limits=Limits(tail_events=8)) as sup:
        stream, told = await talk(sup, 10)
        with stream.subscribe() as events:
            assert len(await events.next_batch(5)) == 5
            for _ in range(100):
                told.say(10)
            with pytest.raises(GapError) as caught:
                await events.next_batch()
            gap = caught.value
            assert (gap.stream_id, gap.epoch, gap.after_epoch, gap.after_seq) == (stream.id, 1, 1, 5)
            assert 6 < gap.earliest_seq < gap.tail_seq == 1010
            with stream.subscribe(Cursor(1, gap.earliest_seq - 1)) as rest:
                assert (await rest.next_batch(1))[0].seq == gap.earliest_seq
        await stream.cancel()


async def test_whoever_asked_for_snapshots_gets_one_in_place_of_a_gap():
    """Also where it is not far behind: the answer is there, only the steps to it are gone."""
    async with open_supervisor(store=MemoryStore(max_bytes=50_000), limits=Limits(tail_events=8)) as sup:
        stream, told = await talk(sup, 10)
        with stream.subscribe(max_behind=10_000) as events:
            reader = Reader(events, told)
            await reader.read(5)
            for _ in range(100):
                told.say(10)
            await reader.read()
            assert reader.kinds == ["data"] * 5 + ["snapshot"]
            told.end()
            while await reader.read():
                pass
            assert reader.text == told.text[-1]


async def test_without_a_snapshot_to_be_had_the_events_go_on_or_the_gap_is_told():
    """The beginning is gone, and the answer was too long for memory: the reader keeps its place while that can be read."""
    store = MemoryStore(max_bytes=50_000)
    async with open_supervisor(store=store, limits=Limits(tail_events=8, fold_bytes=1000)) as sup:
        stream, told = await talk(sup)
        for _ in range(100):
            told.say(10)
        with stream.subscribe("tail", max_behind=10) as events:
            told.say(20)
            assert events.far_behind
            assert [event.seq for event in await events.next_batch(5)] == list(range(1001, 1006))
            for _ in range(100):
                told.say(10)
            with pytest.raises(GapError) as caught:
                await events.next_batch()
            assert caught.value.after_seq == 1005  # its own place, not that of the reading for a snapshot
        await stream.cancel()


async def test_a_stream_that_is_removed_under_its_reader_is_a_gap():
    """Retention takes the stream itself: one snapshot at most is left of it in memory, and no second one is made of it."""
    store = MemoryStore(max_streams=1)
    async with open_supervisor(store=store, limits=Limits(tail_events=8)) as sup:
        stream, told = await talk(sup, 100)
        with stream.subscribe(max_behind=1000) as events:
            told.end()
            await stream.wait()
            other, told = await talk(sup)
            told.end()
            await other.wait()
            assert [event.kind for event in await events.next_batch()] == ["snapshot"]
            stream._journal.release_tail()  # as when more readers have come and gone
            with pytest.raises(GapError):
                await events.next_batch()


# --- leaving ---------------------------------------------------------------------------------------------------------


async def test_any_of_several_readers_keeps_a_stream(autojump_clock: trio.testing.MockClock):
    """The grace begins when the last one leaves, whoever that is, and each that comes back stops it."""
    async with open_supervisor(deadlines=PATIENT) as sup:
        stream, _ = await talk(sup, 1, on_detach=OnDetach(mode="cancel", grace_s=5))
        one, two = stream.subscribe().__enter__(), stream.subscribe("tail").__enter__()
        await trio.sleep(20)
        one.close()
        one.close()  # leaving twice is leaving once
        await trio.sleep(20)
        assert stream.state is State.STREAMING
        two.close()
        await trio.sleep(4.9)
        with stream.subscribe():
            await trio.sleep(20)
            assert stream.state is State.STREAMING
        left = trio.current_time()
        outcome = await stream.wait()
    assert (outcome.state, outcome.reason) == (State.CANCELLED, "detached")
    assert trio.current_time() - left == pytest.approx(5)


async def test_a_reader_that_does_not_read_is_a_reader(autojump_clock: trio.testing.MockClock):
    """It stands still for as long as it likes, far behind and with a snapshot ahead of it, and the stream is kept for it."""
    async with open_supervisor(limits=Limits(tail_events=8), deadlines=PATIENT) as sup:
        stream, told = await talk(sup, on_detach=OnDetach(mode="cancel", grace_s=1))
        with stream.subscribe(max_behind=10) as events:
            for _ in range(20):
                await trio.sleep(50)
                told.say(100)
            assert stream.state is State.STREAMING
            assert [event.kind for event in await events.next_batch()] == ["snapshot"]
        assert (await stream.wait()).reason == "detached"


async def test_a_stream_that_was_kept_to_its_end_is_complete(autojump_clock: trio.testing.MockClock):
    """Leaving after the end, or while the grace runs as it ends, changes nothing."""
    async with open_supervisor(deadlines=PATIENT) as sup:
        stream, told = await talk(sup, 3, on_detach=OnDetach(mode="cancel", grace_s=5))
        with stream.subscribe():
            await trio.sleep(50)
        await trio.sleep(4)
        told.end()
        outcome = await stream.wait()
        with stream.subscribe():
            pass
        await trio.sleep(50)
    assert (outcome.state, stream.outcome) == (State.COMPLETED, outcome)
