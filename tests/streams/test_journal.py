"""The journal by itself: pulling by cursor from tail and store, without gap or duplicate, or with an explicit error."""

from __future__ import annotations

import pytest
import trio
from hypothesis import given, settings
from hypothesis import strategies as st

from supervisor import Cursor, GapError, StreamSealedError
from supervisor.dialects.native import NATIVE
from supervisor.stores import Event, MemoryStore, StoredStream
from supervisor.streams.journal import Journal

from .gated import GatedStore


def journal_on(
    store: MemoryStore, *, tail_events: int = 8, tail_bytes: int = 1 << 20, durable: bool = False
) -> Journal:
    store.create(StoredStream(id="s", key=None, created_at=0.0, head=b"{}"))
    return Journal(
        "s", store, dialect=NATIVE, tail_events=tail_events, tail_bytes=tail_bytes, durable_delivery=durable
    )


def fill(journal: Journal, count: int) -> None:
    for n in range(count):
        journal.add(0.0, "data", b'{"text":"%d"}' % n, "", str(n))
    journal.publish()


async def test_what_left_memory_is_read_back_with_its_text():
    """The tail keeps the newest events; older ones come from the store, and say the same."""
    journal = journal_on(MemoryStore())
    for _ in range(10):
        fill(journal, 5)

    assert journal.take(0, 100) is None
    old = await journal.fetch(Cursor(1, 0), 42)
    new = journal.take(42, 100)

    assert new is not None
    assert [event.seq for event in [*old, *new]] == list(range(1, 51))
    assert [event.text for event in old] == [str(n % 5) for n in range(42)]


async def test_an_event_stays_in_memory_until_it_is_durable():
    """Between memory and store there is never a hole, however far the store is behind."""
    store = GatedStore()
    journal = journal_on(store)
    store.hold()
    fill(journal, 50)
    assert len(journal.take(0, 100) or ()) == 50

    store.release()
    fill(journal, 1)

    assert journal.take(0, 100) is None
    assert len(journal.take(43, 100) or ()) == 8


async def test_the_tail_is_bounded_in_bytes_too():
    """A few large events fill it as many small ones do."""
    journal = journal_on(MemoryStore(), tail_events=1000, tail_bytes=10_000)
    for _ in range(30):
        journal.add(0.0, "data", b'{"text":"%s"}' % (b"x" * 1000), "", "")
        journal.publish()

    assert journal.tail_bytes <= 10_000
    assert journal.tail_seq == 30


async def test_lost_history_is_a_gap_error_with_positions():
    """A reader that asks for what the store gave up is told the earliest and the last position, not moved on."""
    store = MemoryStore(max_bytes=6000)
    journal = journal_on(store, tail_events=4)
    for _ in range(100):
        fill(journal, 1)

    with pytest.raises(GapError) as caught:
        await journal.fetch(Cursor(1, 0), 10)

    earliest = caught.value.earliest_seq
    assert 1 < earliest <= 97
    assert caught.value.tail_seq == 100
    assert (await journal.fetch(Cursor(1, earliest - 1), 10))[0].seq == earliest


@pytest.mark.parametrize(
    ("cursor", "good"),
    [
        (Cursor(1, 0), True),
        (Cursor(1, 5), True),
        (Cursor(1, 6), False),
        (Cursor(3, 6), True),
        (Cursor(3, 9), True),
        (Cursor(3, 10), False),
        (Cursor(2, 6), False),
        (Cursor(5, 9), False),
        (Cursor(0, 0), False),
        (Cursor(1, -1), False),
    ],
)
async def test_a_cursor_is_good_if_its_epoch_reached_it(cursor: Cursor, good: bool):
    """A reader that saw events which are no longer history is told; one that did not reads on across the epochs."""
    journal = journal_on(MemoryStore())
    fill(journal, 5)
    journal.new_epoch()
    fill(journal, 4)

    if good:
        journal.check(cursor)
    else:
        with pytest.raises(GapError):
            journal.check(cursor)


async def test_nothing_is_added_after_the_seal():
    """What was added before it stays; what comes after it is refused."""
    journal = journal_on(MemoryStore())
    journal.add(0.0, "data", b"{}")
    journal.publish()
    journal.seal()

    assert journal.visible_seq == 1
    with pytest.raises(StreamSealedError):
        journal.add(0.0, "data", b"{}")
    assert journal.tail_seq == 1


async def test_durable_delivery_shows_only_what_is_durable(nursery):
    """With `delivery="durable"` an event that a crash could take back is shown to nobody."""
    store = GatedStore()
    journal = journal_on(store, durable=True)
    nursery.start_soon(journal.follow_durability)
    await trio.testing.wait_all_tasks_blocked()
    store.hold()
    fill(journal, 3)
    await trio.testing.wait_all_tasks_blocked()
    assert journal.visible_seq == 0
    assert journal.take(0, 10) == ()

    store.release()
    await trio.testing.wait_all_tasks_blocked()

    assert journal.visible_seq == 3
    nursery.cancel_scope.cancel()


@settings(deadline=None)
@given(st.data())
def test_readers_see_every_event_once_across_the_seam(data: st.DataObject):
    """Appends, trims and reads of any size in any order: each reader gets 1, 2, 3, … to the outcome."""

    async def scenario() -> None:
        journal = journal_on(MemoryStore(), tail_events=data.draw(st.integers(1, 6)))
        readers: list[list[Event]] = [[], [], []]

        async def read(got: list[Event]) -> None:
            limit = data.draw(st.integers(1, 7))
            cursor = Cursor(got[-1].epoch, got[-1].seq) if got else Cursor(1, 0)
            journal.check(cursor)
            batch = journal.take(cursor.seq, limit)
            got += await journal.fetch(cursor, limit) if batch is None else batch

        for _ in range(data.draw(st.integers(1, 12))):
            fill(journal, data.draw(st.integers(0, 5)))
            if data.draw(st.booleans()):
                journal.new_epoch()
            await read(data.draw(st.sampled_from(readers)))
        journal.seal()
        outcome = Event(journal.epoch, journal.tail_seq + 1, 0.0, "outcome", b"{}")
        journal.write_outcome(outcome, state="completed", ended_at=0.0)
        assert journal.visible_seq == outcome.seq - 1
        journal.close(outcome)
        if data.draw(st.booleans()):
            journal.release_tail()
        for got in readers:
            while not got or got[-1].kind != "outcome":
                await read(got)
            assert [event.seq for event in got] == list(range(1, outcome.seq + 1))

    trio.run(scenario)
