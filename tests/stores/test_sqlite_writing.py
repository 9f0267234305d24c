"""The SQLite store's writer: when it commits, what a failing disk does to it, and what it never loses."""

from __future__ import annotations

import sqlite3

import pytest
import trio
import trio.testing

from supervisor.errors import ConfigurationError, StoreError
from supervisor.stores import SQLiteStore, sqlite

from . import faults
from .records import event, events, head, opened, until, write_ended

FOREVER_S = 1e6
"""An interval that no test lives to see the end of: what is committed was committed for another reason."""


@pytest.fixture
def path(tmp_path):
    return tmp_path / "store.db"


@pytest.fixture
def disk(monkeypatch):
    monkeypatch.setattr(sqlite, "BACKOFF_INITIAL_S", 0.001)
    return faults.install(monkeypatch)


# --- when it commits -------------------------------------------------------------------------------------------------


async def test_one_commit_for_many_streams(path):
    """Records of many streams go in one transaction, and a waiter does not wait for the interval."""
    async with opened(SQLiteStore(path, commit_interval_s=FOREVER_S)) as store:
        for index in range(200):
            store.create(head(f"s{index}"))
            store.append(f"s{index}", events(1, 3))
        assert store.statistics().pending_records == 800
        await store.wait_durable("s0", 1)
        assert (
            store.statistics().commits,
            store.statistics().committed_records,
            store.statistics().pending_bytes,
        ) == (1, 800, 0)
        assert store.durable_seq("s199") == 3


async def test_a_commit_wakes_its_waiters_in_slices(path):
    """The loop goes round in between, however many streams a commit was waited for by."""
    woken = 0

    async def wait(stream_id):
        nonlocal woken
        await store.wait_durable(stream_id, 0)
        woken += 1

    async with opened(SQLiteStore(path)) as store, trio.open_nursery() as nursery:
        for index in range(1000):
            store.create(head(f"s{index}"))
            nursery.start_soon(wait, f"s{index}")
        most = before = 0
        while woken < 1000:
            most, before = max(most, woken - before), woken
            await trio.lowlevel.checkpoint()
        assert store.statistics().commits == 1
        assert most <= 2 * 64  # two slices, where this task is first in one turn and last in the next


async def test_an_outcome_does_not_wait_for_the_interval(path):
    """`end` alone has everything before it committed."""
    async with opened(SQLiteStore(path, commit_interval_s=FOREVER_S)) as store:
        write_ended(store, "s1", 3)
        await until(lambda: store.durable_seq("s1") == 4)


async def test_bytes_do_not_wait_for_the_interval(path):
    """`commit_bytes` queued have them committed; less does not."""
    async with opened(SQLiteStore(path, commit_interval_s=FOREVER_S, commit_bytes=10_000)) as store:
        store.create(head("s1"))
        store.append("s1", events(1, 1, size=8000))
        await trio.testing.wait_all_tasks_blocked()
        assert store.statistics().commits == 0
        store.append("s1", events(2, 2, size=2000))
        await until(lambda: store.durable_seq("s1") == 2)


async def test_the_interval_commits_by_itself(path):
    """With nobody waiting and little queued, a record is committed when the interval has passed."""
    async with opened(SQLiteStore(path, commit_interval_s=0.001)) as store:
        store.create(head("s1"))
        store.append("s1", events(1, 1))
        await until(lambda: store.durable_seq("s1") == 1)


async def test_a_large_backlog_goes_in_several_transactions(path):
    """No transaction takes much more than its bound, and order is kept over all of them."""
    async with opened(SQLiteStore(path, commit_interval_s=FOREVER_S)) as store:
        store.create(head("s1"))
        for seq in range(1, 101):
            store.append("s1", events(seq, seq, size=100_000))
        await store.wait_durable("s1", 100)
        assert store.statistics().commits == 3
        got = await store.read("s1", after_seq=0, limit=1000, max_bytes=1 << 30)
        assert events(1, 100, size=100_000) == list(got)


async def test_closing_writes_what_is_queued(path):
    """`aclose` returns when everything enqueued is durable, without waiting for the interval."""
    async with opened(SQLiteStore(path, commit_interval_s=FOREVER_S)) as store:
        store.create(head("s1"))
        store.append("s1", events(1, 9))
    async with opened(SQLiteStore(path)) as store:
        assert len(await store.read("s1", after_seq=0, limit=99)) == 9


async def test_a_cancelled_run_says_what_it_lost(path):
    """A cancel of `run` ends it at once; `aclose` and waiters are told that records were not written."""
    store = SQLiteStore(path, commit_interval_s=FOREVER_S)
    told: list[str] = []

    async def wait() -> None:
        with pytest.raises(StoreError) as caught:
            await store.wait_durable("s1", 99)
        told.append(str(caught.value))

    async with trio.open_nursery() as waiters, trio.open_nursery() as nursery:
        await nursery.start(store.run)
        waiters.start_soon(wait)
        store.create(head("s1"))
        await store.wait_durable("s1", 0)
        store.append("s1", events(1, 2))
        await trio.testing.wait_all_tasks_blocked()
        nursery.cancel_scope.cancel()
    assert told == ["stream s1: the store has stopped before seq 99 was written"]
    with pytest.raises(StoreError, match="2 records were not written"):
        await store.aclose()
    with pytest.raises(StoreError, match="not open"):
        await store.get(stream_id="s1")
    await store.wait_flow()


async def test_records_enqueued_before_run_are_written_by_it(path):
    """The queue exists before the file is open; a store closed without ever running says what it lost."""
    store = SQLiteStore(path)
    write_ended(store, "s1", 1)
    async with opened(store):
        await store.wait_durable("s1", 2)
    store = SQLiteStore(path)
    write_ended(store, "s2", 1)
    with pytest.raises(StoreError, match="never opened"):
        await store.aclose()


# --- back-pressure ---------------------------------------------------------------------------------------------------


async def test_congestion_begins_high_and_ends_low(path, disk):
    """Past the high-water mark the store is congested, and stays so until the queue is below the low one."""
    store = SQLiteStore(path, commit_bytes=1, high_water_bytes=10 << 20, low_water_bytes=6 << 20)
    flowing = trio.Event()

    async def wait_flow() -> None:
        await store.wait_flow()
        flowing.set()

    async with trio.open_nursery() as nursery, opened(store):
        store.create(head("s1"))
        await store.wait_durable("s1", 0)
        disk.writes.clear()
        for seq in range(1, 11):
            store.append("s1", events(seq, seq, size=1 << 20))
            assert (seq == 10) == store.congested
        nursery.start_soon(wait_flow)
        await trio.testing.wait_all_tasks_blocked()
        assert not flowing.is_set()
        disk.writes.set()
        with trio.fail_after(10):
            await flowing.wait()
        assert not store.congested
        assert store.statistics().pending_bytes < 6 << 20
        await store.wait_durable("s1", 10)


async def test_what_a_commit_in_flight_holds_counts_as_queued(path, disk):
    """Congestion begins at the mark also where nearly all is in the batches that are being written."""
    store = SQLiteStore(path, commit_interval_s=0, commit_bytes=1 << 20, high_water_bytes=2 << 20)
    async with opened(store):
        disk.writes.clear()
        store.create(head("s1"))
        store.append("s1", events(1, 2, size=1_000_000))
        await until(lambda: not store._queue)
        assert not store.congested
        store.append("s1", events(3, 3, size=100_000))
        assert store.congested
        disk.writes.set()
        await store.wait_flow()


# --- a failing disk --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "statement", ["BEGIN", "INSERT INTO streams", "UPDATE streams", "UPDATE store", "COMMIT"]
)
async def test_a_failed_commit_is_done_again(path, disk, statement):
    """Wherever in the transaction it fails, the retry writes everything once, and the failure shows meanwhile."""
    async with opened(SQLiteStore(path, commit_interval_s=0)) as store:
        disk.before = faults.failing(statement, 3)
        write_ended(store, "s1", 4)
        await until(lambda: store.statistics().failed_commits > 0 or store.durable_seq("s1") > 0)
        assert "simulated" in (store.statistics().last_error or "")
        assert "failing" in repr(store)
        await store.wait_durable("s1", 5)
        figures = store.statistics()
        assert (figures.failed_commits, figures.committed_records, figures.last_error) == (3, 6, None)
        assert [*events(1, 4), event(5, kind="outcome")] == list(await store.read("s1", after_seq=0, limit=9))


async def test_a_commit_that_happened_but_reported_failure_is_not_done_twice(path, disk):
    """SQLite may fail a COMMIT that took place: the counter in the file tells, and nothing is doubled or refused."""
    async with opened(SQLiteStore(path, commit_interval_s=0)) as store:
        disk.after = faults.failing("COMMIT", 1)
        write_ended(store, "s1", 4)
        await store.wait_durable("s1", 5)
        write_ended(store, "s2", 1)
        await store.wait_durable("s2", 2)
        assert store.statistics().failed_commits == 1
        assert len(await store.read("s1", after_seq=0, limit=99)) == 5
        assert [stream.id for stream in await store.list()] == ["s2", "s1"]


async def test_a_connection_that_cannot_roll_back_is_replaced(path, disk):
    """When even ROLLBACK fails the next commit goes through a new connection."""
    async with opened(SQLiteStore(path, commit_interval_s=0)) as store:
        commit, rollback = faults.failing("COMMIT", 1), faults.failing("ROLLBACK", 1)
        disk.before = lambda statement: (commit(statement), rollback(statement))
        before = disk.connections
        write_ended(store, "s1", 4)
        await store.wait_durable("s1", 5)
        assert before + 1 == disk.connections
        assert len(await store.read("s1", after_seq=0, limit=99)) == 5


async def test_who_waits_is_told_after_the_patience_and_the_records_stay(path, disk):
    """With the disk failing on, `wait_durable` raises, again and at once; when it is mended all is written in order."""
    async with opened(SQLiteStore(path, commit_interval_s=0, patience_s=0.05)) as store:
        disk.before = faults.failing("COMMIT", 1_000_000)
        write_ended(store, "s1", 2)
        with pytest.raises(StoreError, match=r"seq 3 is not durable.*simulated.*stays queued"):
            await store.wait_durable("s1", 3)
        with pytest.raises(StoreError, match="seq 0 is not durable"):
            await store.wait_durable("s1", 0)
        write_ended(store, "s2", 2)
        assert store.statistics().pending_records == 8
        disk.before = lambda _: None
        await until(lambda: store.durable_seq("s2") == 3)
        await store.wait_durable("s1", 3)
        assert [stream.id for stream in await store.list()] == ["s2", "s1"]


async def test_a_disk_that_does_not_answer_is_told_too(path, disk):
    """A commit that hangs counts like one that fails."""
    async with opened(SQLiteStore(path, commit_interval_s=0, patience_s=0.05)) as store:
        disk.writes.clear()
        write_ended(store, "s1", 2)
        with pytest.raises(StoreError, match="the disk does not answer"):
            await store.wait_durable("s1", 3)
        disk.writes.set()
        await until(lambda: store.durable_seq("s1") == 3)


async def test_closing_on_a_failing_disk_gives_up_after_the_patience(path, disk):
    """`aclose` does not hang: it says how many records were lost, every time."""
    store = SQLiteStore(path, commit_interval_s=0, patience_s=0.05)
    async with trio.open_nursery() as nursery:
        await nursery.start(store.run)
        disk.before = faults.failing("COMMIT", 1_000_000)
        write_ended(store, "s1", 2)
        for _ in range(2):
            with pytest.raises(StoreError, match=r"4 records were not written.*simulated"):
                await store.aclose()


async def test_a_full_disk_holds_the_records_until_there_is_room(path):
    """A database at its size limit fails with SQLITE_FULL; with room again everything is written, in order, once."""
    store = SQLiteStore(path, commit_interval_s=0, patience_s=0.1, high_water_bytes=1 << 20)
    async with opened(store):
        store.create(head("s1"))
        await store.wait_durable("s1", 0)
        writer = store._database.writer
        pages = writer.execute("PRAGMA page_count").fetchone()[0]
        writer.execute(f"PRAGMA max_page_count = {pages + 20}")
        for seq in range(1, 41):
            store.append("s1", events(seq, seq, size=50_000))
            await trio.lowlevel.checkpoint()
        with pytest.raises(StoreError, match="full"):
            await store.wait_durable("s1", 40)
        assert store.congested
        durable = store.durable_seq("s1")
        assert durable < 40
        assert events(1, durable, size=50_000) == list(
            await store.read("s1", after_seq=0, limit=99, max_bytes=1 << 30)
        )
        writer.execute("PRAGMA max_page_count = 1073741823")
        await store.wait_flow()
        await until(lambda: store.durable_seq("s1") == 40)
        got = await store.read("s1", after_seq=0, limit=99, max_bytes=1 << 30)
        assert events(1, 40, size=50_000) == list(got)


async def test_another_programs_lock_is_waited_out(path):
    """A writer elsewhere makes commits fail as locked; when it is done they go on."""
    async with opened(SQLiteStore(path, commit_interval_s=0, busy_timeout_s=0)) as store:
        other = sqlite3.connect(path, isolation_level=None)
        other.execute("BEGIN IMMEDIATE")
        write_ended(store, "s1", 1)
        await until(lambda: store.statistics().failed_commits > 0)
        assert "locked by another program" in (store.statistics().last_error or "")
        other.execute("ROLLBACK")
        other.close()
        await store.wait_durable("s1", 2)


# --- records that cannot be written ----------------------------------------------------------------------------------


async def test_a_stream_that_cannot_be_written_costs_no_other(path):
    """An id of an earlier run is refused by its own wait; streams in the same commit and after it are written."""
    async with opened(SQLiteStore(path)) as store:
        write_ended(store, "s1", 1)
    async with opened(SQLiteStore(path, commit_interval_s=FOREVER_S)) as store:
        store.create(head("s0"))
        write_ended(store, "s1", 5, state="failed")
        write_ended(store, "s2", 1)
        with pytest.raises(StoreError, match=r"stream s1: the store refuses.*UNIQUE.*discarded"):
            await store.wait_durable("s1", 6)
        await store.wait_durable("s2", 2)
        await store.wait_durable("s0", 0)
        assert (
            (await store.get(stream_id="s1")).last_seq,
            (await store.get(stream_id="s1")).state,
        ) == (2, "completed")
        assert (store.statistics().pending_records, store.statistics().pending_bytes) == (0, 0)
        store.forget("s1")
        await store.wait_durable("s1", 2)


async def test_what_comes_after_a_refusal_is_discarded(path, disk):
    """Records enqueued while their stream is refused do not reach the file, nor stay in the queue; later ones are not taken."""
    async with opened(SQLiteStore(path)) as store:
        write_ended(store, "s1", 1)
    async with opened(SQLiteStore(path, commit_interval_s=0)) as store:
        disk.writes.clear()
        store.create(head("s1"))
        await trio.testing.wait_all_tasks_blocked()
        store.append("s1", events(1, 3))
        store.create(head("s2"))
        disk.writes.set()
        await store.wait_durable("s2", 0)
        with pytest.raises(StoreError, match="refuses"):
            store.append("s1", events(4, 4))
        with pytest.raises(StoreError, match="refuses"):
            store.end("s1", event(4, kind="outcome"), state="failed", ended_at=1.0)
        with pytest.raises(StoreError, match="refuses"):
            await store.wait_durable("s1", 3)
        assert "refuses" in str(store.refusal("s1"))
        assert store.refusal("s2") is None
        assert (store.statistics().pending_records, store.statistics().pending_bytes) == (0, 0)
        assert len(await store.read("s1", after_seq=0, limit=9)) == 2


async def test_text_that_is_not_text_is_refused(path):
    """A lone surrogate, which UTF-8 cannot hold, is the fault of its stream, not of the disk."""
    async with opened(SQLiteStore(path)) as store:
        store.create(head("s1"))
        store.append("s1", [event(1, name="\ud800")])
        store.create(head("s2", "\ud800"))
        with pytest.raises(StoreError, match="surrogates"):
            await store.wait_durable("s1", 1)
        with pytest.raises(StoreError, match="surrogates"):
            await store.wait_durable("s2", 0)
        assert store.statistics().failed_commits == 0


async def test_the_file_itself_refuses_a_second_outcome(path):
    """Even past the bookkeeping in memory, an outcome in the file is never replaced."""
    async with opened(SQLiteStore(path)) as store:
        store.create(head("s1"))
        store.append("s1", events(1, 1))
        await store.wait_durable("s1", 1)
        other = sqlite3.connect(path)
        other.execute("UPDATE streams SET state = 'failed', ended_at = 1, outcome = x'00', last_seq = 1")
        other.commit()
        other.close()
        store.end("s1", event(2, kind="outcome"), state="completed", ended_at=2.0)
        with pytest.raises(StoreError, match="an outcome of this stream already"):
            await store.wait_durable("s1", 2)
        assert (await store.get(stream_id="s1")).state == "failed"


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("path", ":memory:"),
        ("path", ""),
        ("synchronous", "normal"),
        ("commit_interval_s", -1),
        ("commit_interval_s", float("nan")),
        ("commit_bytes", 0),
        ("high_water_bytes", 0),
        ("low_water_bytes", 0),
        ("low_water_bytes", 65 << 20),
        ("patience_s", 0),
        ("busy_timeout_s", -0.1),
    ],
)
def test_impossible_options_are_refused(field, value):
    """Each names its field."""
    options = {"path": "store.db", field: value}
    with pytest.raises(ConfigurationError) as caught:
        SQLiteStore(**options)
    assert field == caught.value.field
    assert caught.value.value is value
