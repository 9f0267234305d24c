"""Observers are told what becomes of streams, each thing once, and are nobody's trouble."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import trio

from supervisor import Cursor, GapError, Limits, MemoryStore, Outcome, Output, Stream, open_supervisor
from supervisor.errors import StoreError
from supervisor.stores.base import Event

from .gated import GatedStore


class Notes:
    """Writes down what it is told."""

    def __init__(self) -> None:
        self.told: list[tuple[Any, ...]] = []

    def started(self, stream: Stream) -> None:
        self.told.append(("started", stream.key))

    def attempted(self, stream: Stream, record: Mapping[str, Any]) -> None:
        self.told.append(("attempted", stream.key, record["attempt"], record.get("rung")))

    def began(self, stream: Stream) -> None:
        self.told.append(("began", stream.key, stream.first_event_s))

    def ended(self, stream: Stream, outcome: Outcome | None) -> None:
        state = None if outcome is None else outcome.state.value
        self.told.append(("ended", stream.key, state, stream.outcome is outcome))


async def test_they_are_told_each_thing_once(autojump_clock):
    """A start, each attempt, the first event of all, the durable ending: in this order; and nothing once they have left."""
    notes = Notes()

    async def source(out: Output) -> None:
        out.attempt(1)
        await trio.sleep(2)
        out.append(b"{}", "", ())
        out.append(b"{}", "", ())
        out.attempt(2, rung="restart")
        out.append(b"{}", "", ())
        out.flush()
        out.complete("stop")

    async with open_supervisor() as sup:
        leave = sup.observe(notes)
        stream = await sup.start(source, key="k")
        await sup.start(source, key="k")  # joins
        await stream.wait()
        assert notes.told == [
            ("started", "k"),
            ("attempted", "k", 1, None),
            ("began", "k", 2.0),
            ("attempted", "k", 2, "restart"),
            ("ended", "k", "completed", True),
        ]
        assert stream.info().first_event_s == 2.0
        leave()
        await (await sup.start(source)).wait()
        assert len(notes.told) == 5


async def test_an_ending_is_told_when_it_is_durable():
    """Not before, however long that takes; and of one that never will be, that it was lost."""
    notes, store = Notes(), GatedStore()

    async def source(out: Output) -> None:
        await out.send("a")

    async with open_supervisor(store=store) as sup:
        sup.observe(notes)
        stream = await sup.start(source, key="late")
        store.hold()
        await trio.testing.wait_all_tasks_blocked()
        assert stream.state == "stopping"
        assert [told[0] for told in notes.told] == ["started", "began"]
        store.release()
        await stream.wait()
        assert notes.told[-1] == ("ended", "late", "completed", True)


class Refusing(MemoryStore):
    """Refuses every outcome."""

    def end(self, stream_id: str, event: Event, *, state: str, ended_at: float) -> None:
        raise StoreError("not this one")


async def test_an_ending_that_is_lost_is_told_as_that():
    """A stream whose outcome never will be recorded has ended for its observers too, without one."""
    notes = Notes()

    async def source(out: Output) -> None:
        await out.send("a")

    async with open_supervisor(store=Refusing()) as sup:
        sup.observe(notes)
        stream = await sup.start(source, key="lost")
        with pytest.raises(StoreError):
            await stream.wait()
        assert notes.told[-1] == ("ended", "lost", None, True)


async def test_what_an_observer_raises_is_its_own_trouble(caplog):
    """It is logged each time; the stream and the other observers go on."""

    class Broken(Notes):
        def started(self, stream: Stream) -> None:
            raise ValueError("started")

        def attempted(self, stream: Stream, record: Mapping[str, Any]) -> None:
            raise ValueError("attempted")

        def began(self, stream: Stream) -> None:
            raise ValueError("began")

        def ended(self, stream: Stream, outcome: Outcome | None) -> None:
            raise ValueError("ended")

    notes = Notes()

    async def source(out: Output) -> None:
        out.attempt(1)
        out.append(b"{}", "", ())
        out.complete("stop")

    async with open_supervisor() as sup:
        sup.observe(Broken())
        sup.observe(notes)
        assert (await (await sup.start(source)).wait()).state == "completed"
    assert [told[0] for told in notes.told] == ["started", "attempted", "began", "ended"]
    assert [str(record.exc_info[1]) for record in caplog.records] == [told[0] for told in notes.told]


async def test_what_a_journal_comes_to():
    """Its bytes are counted over all that has left memory, live and ended; not of one that comes from the store."""
    sent = [f"piece {number} {'x' * 50}" for number in range(40)]

    async def source(out: Output) -> None:
        for number, piece in enumerate(sent):
            await out.send(piece)
            if number == 30:
                out.stream.spill()

    store = MemoryStore()
    limits = Limits(tail_events=8, max_finished=1)
    async with open_supervisor(store=store, limits=limits) as sup:
        first = await sup.start(source)
        await first.wait()
        events = await first.page(0)
        expected = sum(len(event.payload) for event in events) + sum(map(len, sent))
        assert [event.kind for event in events] == ["data"] * 40 + ["outcome"]
        assert first.info().journal_bytes == expected
        await (await sup.start(source)).wait()
        assert (await sup.find(first.id)).info().journal_bytes is None


async def test_a_page_of_a_journal_is_read_without_being_a_reader():
    """From the tail or from the store, nothing where nothing follows; what is gone is told of; `readers` stays 0."""
    go = trio.Event()
    seen: list[int] = []

    async def source(out: Output) -> None:
        for number in range(20):
            await out.send(str(number))
        seen.append(out.stream.readers)
        await go.wait()

    async with open_supervisor(store=MemoryStore(), limits=Limits(tail_events=4)) as sup:
        stream = await sup.start(source)
        await trio.testing.wait_all_tasks_blocked()
        assert [event.seq for event in await stream.page(0, 5)] == [1, 2, 3, 4, 5]
        assert [event.seq for event in await stream.page(18)] == [19, 20]
        assert await stream.page(20) == ()
        assert (stream.readers, seen) == (0, [0])
        go.set()
        outcome = await stream.wait()
        assert outcome.events_unread == 20
        assert (await stream.page(20))[0].kind == "outcome"
    evicting = MemoryStore(max_bytes=2000)
    async with open_supervisor(store=evicting) as sup:
        go.set()
        stream = await sup.start(source)
        await stream.wait()
        await (await sup.start(source)).wait()
        with pytest.raises(GapError) as gap:
            await stream.page(0)
        assert gap.value.earliest_seq > 1
        assert stream.subscribe(Cursor(1, 21)) is not None
