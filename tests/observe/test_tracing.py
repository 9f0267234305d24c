"""The trace of a stream says what happened when, from its journal alone, and is small whatever the stream was like."""

from __future__ import annotations

import itertools
import json
import time
import tracemalloc
from collections.abc import Sequence
from typing import Any

import msgspec
import pytest
import trio
from hypothesis import given
from hypothesis import strategies as st

from supervisor import Deadlines, Limits, MemoryStore, Outcome, Output, SQLiteStore, open_supervisor
from supervisor.observe import Trace, chrome_trace, trace, tracing
from supervisor.observe.timeline import MAX_ENDS, MAX_MARKS, MAX_STALLS, MAX_STEPS, Timeline
from supervisor.stores import Event, StoredStream

START = 1_700_000_000.0


def event(seq: int, at_ms: float, kind: str = "data", payload: bytes = b"x" * 10) -> Event:
    return Event(1, seq, START + at_ms / 1000, kind, payload)


def attempt(seq: int, at_ms: float, number: int, **fields: Any) -> Event:
    return event(seq, at_ms, "attempt", msgspec.json.encode({"attempt": number, "cause": None, **fields}))


def timeline(events: Sequence[Event], duration_ms: float) -> Timeline:
    made = Timeline(started_at=START, duration_ms=duration_ms)
    for one in events:
        made.take(one)
    return made


def test_a_timeline_of_two_attempts():
    """Times, sizes, the stall and the reconnect are where the journal has them; a wait between attempts is no gap."""
    made = timeline(
        [
            attempt(1, 1, 1, upstream="a", delay_s=0),
            *(event(2 + n, 100 + 10 * n) for n in range(20)),
            event(22, 300, "note", b'{"what":"ever"}'),
            attempt(23, 1000, 2, upstream="b", rung="restart", delay_s=0.5, kept={"seq": 3}),
            event(24, 1200, "withdrawn", b'{"attempt":2,"first":1,"last":23}'),
            event(25, 1200, payload=b"y" * 100),
            event(26, 1200.4, payload=b"y" * 100),
            event(27, 1600),
            event(28, 1700, "skipped", b'{"why":"not JSON","bytes":7,"payload":"private"}'),
            event(29, 1800, "outcome", b"{}"),
        ],
        1800,
    )
    first, second = made.attempts
    assert (first.from_ms, first.first_event_ms, first.to_ms) == (1, 100, 500)
    assert (first.events, first.bytes, first.first_seq, first.last_seq) == (20, 200, 2, 21)
    assert (first.withdrawn, first.rung, first.upstream, first.details) == (True, None, "a", {})
    assert (second.from_ms, second.first_event_ms, second.to_ms) == (1000, 1200, 1800)
    assert (second.events, second.bytes, second.withdrawn, second.delay_ms) == (3, 210, False, 500)
    assert (second.rung, second.details) == ("restart", {"kept": {"seq": 3}})
    assert (made.first_event_ms, made.bytes, made.arrivals) == (100, 410, 22)
    assert (made.gap_ms.count, made.gap_ms.max) == (19 + 2, 399.6)
    assert (made.event_bytes.count, made.event_bytes.p50, made.event_bytes.max) == (23, 10, 100)
    assert made.stall_from_ms == 250
    (stall,) = made.stalls
    assert (stall.from_ms, stall.to_ms, stall.ms, stall.attempt, stall.after_seq) == (
        1200.4,
        1600,
        399.6,
        2,
        26,
    )
    assert [(mark.at_ms, mark.kind, mark.seq) for mark in made.marks] == [
        (300, "note", 22),
        (1200, "withdrawn", 24),
        (1700, "skipped", 28),
    ]
    assert made.marks[0].details == {"what": "ever"}
    assert made.marks[2].details == {"why": "not JSON", "bytes": 7}
    steps = made.timeline
    assert (steps.step_ms, len(steps.events), sum(steps.events), sum(steps.bytes)) == (10, 180, 23, 410)
    assert (steps.events[10], steps.events[120], steps.bytes[120]) == (1, 2, 200)


def test_what_a_stall_is_goes_by_the_stream():
    """Ten times the median gap: what is usual in a slow stream is no stall, and 5 s always is one."""
    gaps = [400.0] * 20 + [3000.0, 6000.0]
    slow = timeline([event(n + 1, at) for n, at in enumerate(itertools.accumulate(gaps))], 20_000)
    assert 3000 < slow.stall_from_ms <= 4200
    assert [stall.ms for stall in slow.stalls] == [6000]
    very_slow = timeline([event(n + 1, 2000.0 * n) for n in range(9)] + [event(10, 22_000)], 22_000)
    assert very_slow.stall_from_ms == 5000
    assert [stall.ms for stall in very_slow.stalls] == [6000]


def test_a_clock_that_goes_back():
    """Nothing has a negative length, and nothing is before what came before it."""
    made = timeline([attempt(1, 50, 1), event(2, 100), event(3, -500), event(4, 90), event(5, 120)], 60)
    assert made.gap_ms.max == 20
    assert made.attempts[0].first_event_ms == 100
    assert sum(made.timeline.events) == 4


def test_what_a_trace_tells_is_bounded():
    """Of thousands of attempts, stalls and marks the first and last, the longest, and the first; the others are counted."""
    seqs = itertools.count(1)
    events: list[Event] = []
    at = 0.0
    for number in range(1, 1001):
        events.append(attempt(next(seqs), at, number, last_event_id="x" * 5000, rung="retry"))
        events.append(event(next(seqs), at + 1))
        at += 300 + number
        events.append(event(next(seqs), at))
        events.append(event(next(seqs), at, "note", b'{"long":"%b"}' % (b"n" * 5000)))
        events += [event(next(seqs), at + n / 100) for n in range(4)]
    made = timeline(events, at)
    assert [one.attempt for one in made.attempts] == [*range(1, MAX_ENDS + 1), *range(951, 1001)]
    assert (made.attempts_left_out, made.attempts[0].rung, made.attempts[0].details) == (900, "retry", {})
    assert len(made.stalls) == MAX_STALLS
    assert min(stall.ms for stall in made.stalls) == 300 + 951 - 1
    assert [stall.from_ms for stall in made.stalls] == sorted(stall.from_ms for stall in made.stalls)
    assert made.stalls_left_out == 950
    assert (len(made.marks), made.marks_left_out, made.marks[0].details) == (MAX_MARKS, 900, {})
    assert len(made.timeline.events) <= MAX_STEPS
    assert len(msgspec.json.encode((made.attempts, made.stalls, made.marks, made.timeline))) < 100_000


@given(st.floats(0, 1e9))
def test_steps_are_round_and_few(duration_ms):
    """Whatever a stream took, at most 200 steps of 1, 2 or 5 times a power of ten cover it."""
    steps = Timeline(started_at=0, duration_ms=duration_ms).timeline
    assert 1 <= len(steps.events) <= MAX_STEPS
    assert len(steps.events) * steps.step_ms >= duration_ms
    assert f"{steps.step_ms:e}"[0] in "125"
    assert steps.step_ms >= 1


def test_records_that_are_none_of_ours():
    """What cannot be read of a record is left out; the trace is made all the same."""
    made = timeline(
        [event(1, 0, "attempt", b"\xff"), event(2, 1, "note", b"[1]"), event(3, 2, "withdrawn", b"{}")], 10
    )
    assert [one.attempt for one in made.attempts] == [0]
    assert [mark.details for mark in made.marks] == [{}, {}]


# --- of streams ------------------------------------------------------------------------------------------------------


async def climbing(out: Output) -> None:
    out.attempt(1, upstream="one")
    for _ in range(5):
        out.append(b'{"a":1}', "", ())
        out.flush()
        await trio.lowlevel.checkpoint()
    out.attempt(2, upstream="two", rung="restart", cause="connect: lost")
    out.append(b'{"a":2}', "", ())
    out.flush()
    out.complete("stop")


async def test_of_a_stream_live_and_after_the_fact(tmp_path):
    """The same from memory, from the store, and after a restart; the client's type reads what is written."""
    go = trio.Event()

    async def source(out: Output) -> None:
        await climbing(out)
        await go.wait()

    async def live(out: Output) -> None:
        out.attempt(1)
        out.append(b"{}", "", ())
        out.flush()
        await go.wait()

    async with open_supervisor(store=SQLiteStore(tmp_path / "s.db")) as sup:
        unended = await sup.start(live, deadlines=Deadlines(idle_s=None), meta={"model": "m"}, key="k")
        await trio.testing.wait_all_tasks_blocked()
        now = await trace(unended)
        assert (now.state, now.ended, now.reason, now.outcome) == ("streaming", False, None, None)
        assert (now.key, now.model, now.events, now.bytes, now.deadlines["idle_s"]) == ("k", "m", 1, 2, None)
        assert (unended.readers, len(now.attempts), now.first_event_ms is not None) == (0, 1, True)
        go.set()
        await unended.wait()
        stream = await sup.start(source, upstream="one", labels={"a": "b"})
        outcome = await stream.wait()
        told = await trace(stream)
        stream_id = stream.id
    assert (told.state, told.reason, told.ended, told.labels) == ("completed", "stop", True, {"a": "b"})
    assert [one.withdrawn for one in told.attempts] == [True, False]
    assert (told.events, told.bytes, told.left_out) == (6, 42, ())
    assert told.duration_ms == round(outcome.duration_s * 1000, 2)
    read = msgspec.json.decode(msgspec.json.encode(told), type=Trace)
    assert read == told
    assert isinstance(read.outcome, Outcome)
    async with open_supervisor(store=SQLiteStore(tmp_path / "s.db")) as sup:
        assert await trace(await sup.find(stream_id)) == told


@pytest.mark.parametrize("events", [0, 3])
async def test_of_one_that_a_crash_interrupted(tmp_path, events):
    """It lasted until its last event, however long the process was down: only that is known of it."""
    path = tmp_path / "s.db"
    store = SQLiteStore(path)
    created = time.time() - 3600
    head = msgspec.json.encode({"key": None, "dialect": "native"})
    async with trio.open_nursery() as nursery:
        await nursery.start(store.run)
        store.create(StoredStream(id="01a", key=None, created_at=created, head=head))
        told = [Event(1, seq, created + seq, "data", b'{"text":"a"}') for seq in range(1, events + 1)]
        store.append("01a", told)
        await store.wait_durable("01a", events)
        await store.aclose()
    async with open_supervisor(store=SQLiteStore(path)) as sup:
        told = await trace(await sup.find("01a"))
    assert (told.state, told.reason, told.ended) == ("failed", "interrupted", True)
    assert (told.events, told.duration_ms, told.outcome.duration_s > 3000) == (events, events * 1000, True)


async def test_of_one_whose_history_is_gone():
    """What retention has removed is named, and the rest is traced."""

    async def source(out: Output) -> None:
        for number in range(200):
            await out.send(f"{number:03}" * 5)

    async with open_supervisor(store=MemoryStore(max_bytes=20_000), limits=Limits(tail_events=10)) as sup:
        stream = await sup.start(source)
        await stream.wait()
        await (await sup.start(source)).wait()
        told = await trace(stream)
    (gone,) = told.left_out
    assert gone.first == 1
    assert 1 < gone.last < 201
    assert told.event_bytes.count == 200 - gone.last
    assert told.events == 200


async def test_of_a_very_long_one(monkeypatch):
    """Only so much from either end is read, and the hole between is no gap in the stream."""
    monkeypatch.setattr(tracing, "MAX_END_EVENTS", 2000)
    read: list[int] = []

    class Counting(MemoryStore):
        async def read(self, stream_id, *, after_seq, limit, max_bytes=1 << 20):
            page = await super().read(stream_id, after_seq=after_seq, limit=limit, max_bytes=max_bytes)
            read.append(len(page))
            return page

    async def source(out: Output) -> None:
        out.attempt(1)
        for number in range(12_000):
            out.append(b"x" * 50, "", ())
            if number % 200 == 0:
                out.flush()
                await trio.lowlevel.checkpoint()
        out.complete("stop")

    async with open_supervisor(store=Counting()) as sup:
        stream = await sup.start(source)
        await stream.wait()
        told = await trace(stream)
        (hole,) = told.left_out
        assert (told.events, told.event_bytes.count + (hole.last - hole.first + 1)) == (12_000, 12_000)
        assert sum(read) < 6000
        assert told.gap_ms.count == told.event_bytes.count - 2
        assert told.attempts[0].last_seq == 12_001
        monkeypatch.setattr(tracing, "MAX_END_BYTES", 20_000)
        read.clear()
        told = await trace(stream)
        assert (len(told.left_out), told.attempts[0].last_seq) == (1, 12_001)
        assert told.event_bytes.count < 2 * 1024 + 1
        assert sum(read) < 4000
        monkeypatch.undo()
        tracemalloc.start()
        try:
            await trace(stream)
            peak = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
        assert peak < 1 << 20


async def test_a_file_for_viewers():
    """Every event of the file is well formed; attempts, stalls, marks and counters are on rows that have names."""
    async with open_supervisor() as sup:
        stream = await sup.start(climbing, upstream="one")
        await stream.wait()
        told = await trace(stream)
    file = chrome_trace(told)
    json.dumps(file)
    events = file["traceEvents"]
    assert {one["ph"] for one in events} == {"M", "X", "i", "C"}
    assert all(one["dur"] >= 0 and one["ts"] >= 0 for one in events if one["ph"] == "X")
    rows = {one["tid"] for one in events if one["name"] == "thread_name"}
    assert {one["tid"] for one in events} <= rows
    names = [one["name"] for one in events if one["ph"] == "X"]
    assert "completed(stop)" in names
    assert "1: first at one (withdrawn)" in names
    assert "2: restart at two" in names
    assert sum(one["args"]["events/s"] for one in events if one["name"] == "events/s") > 0


async def test_a_cancelled_trace_leaves_nothing_behind():
    """Who no longer wants it, cancels it."""
    async with open_supervisor() as sup:
        stream = await sup.start(climbing)
        await stream.wait()
        with trio.CancelScope() as scope:
            scope.cancel()
            await trace(stream)
        assert scope.cancelled_caught
        with pytest.raises(trio.TooSlowError), trio.fail_after(0):
            await trace(stream)
