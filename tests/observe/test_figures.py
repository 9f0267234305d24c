"""What becomes of streams is counted, once each, in a bounded space."""

from __future__ import annotations

import gc
import tracemalloc
from functools import partial

import attrs
import msgspec
import pytest
import trio

from supervisor import Deadlines, Delta, MemoryStore, Output, Usage, open_supervisor
from supervisor.dialects import Fault
from supervisor.errors import StoreError
from supervisor.observe import Figures, overview
from supervisor.observe.figures import MAX_CHILDREN, MAX_VALUES
from supervisor.observe.window import Error, ErrorKey, Minute, Window


class Clock:
    """A wall clock that stands still."""

    def __init__(self, now: float = 1_700_000_000.0) -> None:
        self.now = now

    def __call__(self) -> float:
        return self.now


async def answer(out: Output, *, pieces: int = 3, fault: Fault | None = None) -> None:
    for _ in range(pieces):
        await out.send("word ")
    if fault is not None:
        out.fail("provider_error", fault)
    await out.send(Delta(usage=Usage(input=10, output=pieces)))


async def never(out: Output) -> None:
    await out.send("so far")
    await trio.sleep_forever()


async def silent(out: Output) -> None:
    await trio.sleep_forever()


async def test_the_overview_of_an_hour(autojump_clock):
    """Completed, failed, cancelled and expired are told apart; a cancelled one is no failure; what is live is counted by what it does."""
    clock = Clock()
    async with open_supervisor() as sup:
        figures = Figures(sup, clock=clock)
        for _ in range(3):
            await (await sup.start(answer, upstream="one")).wait()
        slow = Fault(kind="rate_limit", message="slow down")
        for _ in range(2):
            failed = await sup.start(partial(answer, fault=slow), upstream="two")
            await failed.wait()
        for _ in range(2):
            await (await sup.start(never)).cancel()
        expired = await sup.start(never, deadlines=Deadlines(idle_s=3), upstream="one")
        await expired.wait()
        await sup.start(never)
        await sup.start(silent)
        await trio.testing.wait_all_tasks_blocked()
        told = overview(figures, clock=clock)
        assert (told.active.live, told.active.waiting, told.active.answering) == (2, 1, 1)
        hour = told.hour
        assert hour.started == 10
        assert hour.ended == {"completed": 3, "failed": 2, "cancelled": 2, "expired": 1}
        assert hour.success_rate == 0.5
        assert (hour.events.count, hour.events.p50, hour.events.max) == (8, 3, 4)
        assert (hour.output_tokens.count, hour.output_tokens.p50) == (3, 3)
        assert hour.first_event_s.count == 3 + 2 + 1 + 1  # not of those that were stopped before it
        assert hour.bytes.count == 8
        worst, other = hour.errors
        assert (worst.reason, worst.kind, worst.upstream, worst.count) == (
            "provider_error",
            "rate_limit",
            "two",
            2,
        )
        assert (worst.last_id, worst.last_message) == (failed.id, "slow down")
        assert (other.state, other.reason, other.kind, other.last_id) == (
            "expired",
            "idle",
            None,
            expired.id,
        )
        assert told.total.ended["completed"] == {"done": 3}
        assert told.minutes.completed[-1] == 3
        assert told.minutes.live[-1] == 2
        assert told.minutes.live[0] is None
        msgspec.json.encode(told)
        await sup.shutdown()
        assert figures.answering == 0


async def test_an_hour_passes(autojump_clock):
    """Each minute has a column of its own; after sixty it is gone, and the totals stay."""
    clock = Clock(60.0 * 28_000_000)
    async with open_supervisor() as sup:
        figures = Figures(sup, clock=clock)
        await (await sup.start(answer)).wait()
        clock.now += 59 * 60
        await (await sup.start(answer)).wait()
        told = overview(figures, clock=clock)
        assert told.minutes.first == 60.0 * 28_000_000
        assert [at for at, count in enumerate(told.minutes.completed) if count] == [0, 59]
        assert told.hour.ended["completed"] == 2
        clock.now += 60
        told = overview(figures, clock=clock)
        assert [at for at, count in enumerate(told.minutes.completed) if count] == [58]
        assert told.hour.ended["completed"] == told.hour.duration_s.count == 1
        clock.now -= 3600  # set back: nothing is lost
        await (await sup.start(answer)).wait()
        assert overview(figures, clock=clock).hour.ended["completed"] == 2
        clock.now += 10 * 3600
        told = overview(figures, clock=clock)
        assert (told.hour.ended["completed"], told.hour.success_rate) == (0, None)
        assert told.total.ended["completed"] == {"done": 3}


async def test_what_is_kept_is_bounded(autojump_clock):
    """Thousands of models, reasons and upstreams that clients make up take no more room than a few dozen."""
    async with open_supervisor() as sup:
        figures = Figures(sup)

        async def named(out: Output, reason: str) -> None:
            out.append(b"{}", "", ())
            out.finish(reason)

        async def some(first: int, count: int) -> None:
            for number in range(first, first + count):
                stream = sup.start_nowait(
                    partial(named, reason=f"reason {number}"),
                    upstream=f"up {number}",
                    meta={"model": f"{'m' * 200}{number}" if number % 2 else f"model {number}"},
                ).stream
                await stream.wait()

        await some(0, 150)
        models = {labels[2] for labels in figures.first_event_s.children}
        assert len(models) == MAX_VALUES + 1
        assert "other" in models
        assert max(map(len, models)) == 128
        assert len(figures.ended_by.children) == MAX_VALUES + 1
        assert figures.ended_by.children["other", "completed", "other"] == 150 - MAX_VALUES
        assert sum(figures.ended_by.children.values()) == 150
    for number in range(MAX_CHILDREN + 5):
        figures.duration_s.add((str(number),) * 6, 1.0)
        figures.started_by.add((str(number),))
    assert len(figures.duration_s.children) == MAX_CHILDREN + 1
    assert len(figures.started_by.children) <= MAX_CHILDREN + 1
    minute = Minute(0)
    for number in range(200):
        key = ErrorKey("failed", str(number), None, None)
        minute.failed(key, at=number, stream_id="id", message="m" * 1000)
    assert len(minute.errors) == 65
    assert minute.errors[ErrorKey("failed", "other", None, None)] == Error(136, 199, "id", "m" * 300)


async def test_a_lost_outcome_is_counted_as_gone():
    """A stream whose outcome was never recorded is no figure, and is not live for ever."""

    class Refusing(MemoryStore):
        def end(self, *args, **kwargs):
            raise StoreError("no")

    async with open_supervisor(store=Refusing()) as sup:
        figures = Figures(sup)
        stream = await sup.start(answer)
        with pytest.raises(StoreError):
            await stream.wait()
        assert figures.answering == 0
        assert overview(figures).hour.duration_s.count == 0


async def test_attempts_are_counted_by_where_they_are_made():
    """The upstream of an attempt is its own, not its stream's; tokens that were estimated are none of the provider's."""

    async def climbing(out: Output) -> None:
        out.attempt(1, upstream="first")
        out.attempt(2, upstream="second", rung="fallback")
        out.append(b"{}", "", (Delta(text="words " * 20),))
        out.complete("stop")

    async with open_supervisor() as sup:
        figures = Figures(sup)
        stream = await sup.start(climbing, upstream="first")
        await stream.wait()
        assert dict(figures.attempts_by.children) == {("first", "first"): 1, ("second", "fallback"): 1}
        assert overview(figures).hour.retried == 1
        told = Usage(input=3, output=5)
        ending = attrs.evolve(await stream.wait(), usage=told, usage_quality="estimated")
        assert list(figures._stated(ending)) == []
        assert list(figures._stated(attrs.evolve(ending, usage_quality="exact"))) == [
            (3, "input"),
            (5, "output"),
        ]
        figures.close()
        await (await sup.start(climbing, upstream="first")).wait()
        assert figures.attempts_by.children["first", "first"] == 1


async def test_nothing_is_done_or_kept_for_an_event():
    """A stream of ten thousand events leaves as much behind as one of ten, and is told of as often."""
    calls: list[str] = []

    async def many(out: Output, count: int) -> None:
        for _ in range(count):
            out.append(b"{}", "", ())
            out.flush()

    class Counting(Figures):
        def began(self, stream):
            calls.append("began")
            super().began(stream)

        def ended(self, stream, outcome):
            calls.append("ended")
            super().ended(stream, outcome)

    async with open_supervisor() as sup:
        Counting(sup)
        for count in (10, 10_000):
            await (await sup.start(partial(many, count=count))).wait()
    assert calls == ["began", "ended"] * 2


async def test_sampling(autojump_clock):
    """While it runs, it looks every ten seconds; of records written it keeps how many were new, of memory the most."""
    clock = Clock()
    async with open_supervisor() as sup, trio.open_nursery() as nursery:
        figures = Figures(sup, clock=clock)
        nursery.start_soon(figures.run)
        stream = await sup.start(never)
        await trio.sleep(11)
        minute = figures.window.now
        assert (minute.live, minute.records) == (1, 2)
        held = minute.bytes_held
        await stream.cancel()
        await trio.sleep(10)
        assert (minute.live, minute.records, minute.bytes_held) == (1, 3, max(held, minute.bytes_held))
        nursery.cancel_scope.cancel()


def test_the_window_is_bounded_in_bytes():
    """An hour in which everything happens takes a few megabytes at most."""
    clock = Clock()
    gc.collect()
    tracemalloc.start()
    try:
        window = Window(clock)
        for _ in range(62):
            minute = window.now
            for number in range(70):
                for name in ("duration_s", "first_event_s", "events", "bytes", "output_tokens"):
                    getattr(minute, name).add(1.6**number / 1e6)
                key = ErrorKey("failed", str(number), None, None)
                minute.failed(key, at=0, stream_id="id", message=f"{number}" * 400)
            clock.now += 60
        used = tracemalloc.get_traced_memory()[0]
    finally:
        tracemalloc.stop()
    assert len(window._minutes) == 60
    assert used < 4 << 20
