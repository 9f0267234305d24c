"""A store that lags or cannot write: sources are held back, then ended; nothing is lost in silence, nor told before it is durable."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from contextlib import asynccontextmanager

import pytest
import trio
import trio.testing

from supervisor import (
    Limits,
    SQLiteStore,
    State,
    StoreError,
    StoreUnavailableError,
    open_supervisor,
)
from supervisor.stores import Event, sqlite
from supervisor.streams import supervisor as registry
from supervisor.testing import Script
from tests.stores.records import head, until
from tests.streams.gated import GatedStore
from tests.upstream.attempts import bench

MIB = 1 << 20


# --- held back, then ended -------------------------------------------------------------------------------------------


async def test_a_stream_that_is_held_back_too_long_is_ended_with_the_stores_error(autojump_clock):
    """After `held_s`, not before; by the store, with what it says; and what had been received is kept."""
    store = GatedStore()

    async def source(out):
        await out.send("kept")
        store.behind, store.trouble = True, "disk full"
        await out.send("never taken")

    async with open_supervisor(store=store, limits=Limits(held_s=30)) as sup:
        began = trio.current_time()
        stream = await sup.start(source)
        outcome = await stream.wait()
        assert trio.current_time() - began == 30
        assert (outcome.state, outcome.reason, outcome.actor) == (State.EXPIRED, "reaped_pressure", "store")
        assert outcome.message == "the store could not take this stream's events for 30 s: disk full"
        assert stream.snapshot().text == "kept"
        assert sup.statistics().memory.reaped == {"reaped_pressure": 1}


async def test_what_is_held_back_goes_on_when_the_store_has_caught_up(autojump_clock, no_share):
    """Each wait has the whole time for itself: one that was short is forgotten, and nothing is missing."""
    store = GatedStore()

    async def source(out):
        for word in ["one", "two", "three", "four"]:
            store.behind, store._caught_up = True, trio.Event()
            out.nursery.start_soon(catch_up_later)
            await out.send(f"{word} ")

    async def catch_up_later():
        await trio.sleep(20)
        store.catch_up()

    async with open_supervisor(store=store, limits=Limits(held_s=30)) as sup:
        began = trio.current_time()
        stream = await sup.start(source)
        outcome = await stream.wait()
        assert (outcome.state, trio.current_time() - began) == (State.COMPLETED, 80)
        assert stream.snapshot().text == "one two three four "


async def test_a_store_that_catches_up_in_the_last_moment_has_caught_up(autojump_clock):
    """It is the store that is asked when the time is over, not the clock alone."""

    class JustInTime(GatedStore):
        async def wait_flow(self) -> None:
            try:
                await super().wait_flow()
            finally:
                self.behind = False

    store = JustInTime()

    async def source(out):
        store.behind = True
        await out.send("taken")

    async with open_supervisor(store=store) as sup:
        assert (await (await sup.start(source)).wait()).state is State.COMPLETED


async def test_an_answer_that_has_ended_as_far_as_seen_is_complete_though_the_store_is_behind(autojump_clock):
    """Only the end of the body was still to come."""
    store = GatedStore()

    async def source(out):
        await out.send("all of it")
        out.mark("stop")
        store.behind = True
        await out.flow()

    async with open_supervisor(store=store) as sup:
        outcome = await (await sup.start(source)).wait()
        assert (outcome.state, outcome.reason) == (State.COMPLETED, "stop")


async def test_a_stop_that_drains_is_what_a_held_stream_ends_by(autojump_clock, no_share):
    """Somebody had asked for the end already: it is their cancel."""
    store = GatedStore()

    async def source(out):
        store.behind = True
        await out.send("never taken")

    async with open_supervisor(store=store, limits=Limits(held_s=5)) as sup:
        stream = await sup.start(source)
        await trio.testing.wait_all_tasks_blocked()
        (result,) = await sup.cancel(stream.id, mode="drain", drain_s=50, wait_s=60, actor="reader")
        assert (result.outcome, result.state, result.reason) == ("won", State.CANCELLED, "requested")


# --- starts and health -----------------------------------------------------------------------------------------------


async def test_starts_are_refused_while_nothing_can_be_written():
    """With an error that says why and when to come back; what runs can be joined, and starts go on with the store."""
    store = GatedStore()

    async def silent(out):
        await trio.sleep_forever()

    async with open_supervisor(store=store, limits=Limits(retry_after_s=3)) as sup:
        stream = await sup.start(silent, key="k")
        store.trouble = "disk full"
        with pytest.raises(
            StoreUnavailableError, match=r"cannot write \(disk full\); nothing was started"
        ) as caught:
            await sup.start(silent, key="other")
        assert caught.value.retry_after_s == 3
        with pytest.raises(StoreUnavailableError):
            await sup.start(silent, key="k", on_conflict="replace")
        assert await sup.start(silent, key="k") is stream
        assert (sup.statistics().live, sup.statistics().keys, sup.statistics().rejected) == (1, 1, 2)
        store.trouble = None
        await sup.start(silent, key="other")
        await sup.cancel(all_streams=True)


# --- a database that is full -----------------------------------------------------------------------------------------


class Disk:
    """The room of a database: `fill` leaves it `pages` to grow by, `mend` all it wants."""

    def __init__(self, store: SQLiteStore) -> None:
        self._store = store

    def fill(self, pages: int) -> None:
        now = self._run("PRAGMA page_count")
        self._run(f"PRAGMA max_page_count = {now + pages}")

    def mend(self) -> None:
        self._run("PRAGMA max_page_count = 1073741823")

    def _run(self, statement: str) -> int:
        return self._store._database.writer.execute(statement).fetchone()[0]


@asynccontextmanager
async def on_a_small_disk(path, **options):
    """Give a supervisor whose file may grow by 40 pages, its store, and its disk. In real time, and short of it."""
    store = SQLiteStore(
        path, commit_interval_s=0, high_water_bytes=MIB, low_water_bytes=MIB // 2, patience_s=0.05
    )
    with trio.fail_after(20):
        async with open_supervisor(store=store, limits=Limits(**{"settle_s": 0.15, **options})) as sup:
            disk = Disk(store)
            disk.fill(40)
            try:
                yield sup, store, disk
            finally:
                disk.mend()


@pytest.fixture
def impatient(monkeypatch):
    """Look again at what failed, and at outcomes that are late, at once."""
    monkeypatch.setattr(sqlite, "BACKOFF_INITIAL_S", 0.001)
    monkeypatch.setattr(sqlite, "BACKOFF_MAX_S", 0.001)
    monkeypatch.setattr(registry, "_LATE_S", 0.001)


async def chatter(out):
    """Say more than the disk takes, as fast as it may."""
    for index in range(1000):
        await out.send(f"{index} ".ljust(20_000, "."))


async def numbers(stream) -> list[str]:
    async with stream.subscribe() as reading:
        return [event.text.split()[0] async for event in reading if event.kind == "data"]


async def test_a_full_disk_ends_streams_and_tells_nobody_before_it_has_room(path, impatient):
    """The outcome is written when there is room; until then who asks gets the store's error, and memory is bounded."""
    async with on_a_small_disk(path, held_s=0.15) as (sup, store, disk):
        stream = await sup.start(chatter)
        with pytest.raises(StoreError, match="database or disk is full"):
            await stream.wait()
        assert (stream.state, stream.outcome) == (State.STOPPING, None)
        with pytest.raises(StoreError, match="full"):
            await numbers(stream)  # all there is, and then the error, not an end
        assert (sup.statistics().unrecorded, sup.statistics().ended) == (1, {})
        assert MIB // 2 <= store.statistics().held_bytes < MIB + 50_000
        with pytest.raises(StoreUnavailableError, match="full"):
            await sup.start(chatter)
        health = sup.health()
        assert (health.status, health.store.state) == ("degraded", "failing")
        assert "full" in health.store.error
        assert health.store.failing_since is not None
        assert health.store.lag_bytes == store.statistics().pending_bytes
        assert health.store.lag_events > 10
        assert health.store.lag_s > 0

        disk.mend()
        await until(lambda: stream.outcome is not None)
        outcome = await stream.wait()
        assert (outcome.state, outcome.reason, outcome.actor) == (State.EXPIRED, "reaped_pressure", "store")
        assert "full" in outcome.message
        read = await numbers(stream)
        assert read == [str(index) for index in range(outcome.events)]
        assert sup.health().store.state == "ok"
        assert sup.health().store.failing_since is None
        stored = await store.get(stream_id=stream.id)
        assert (stored.state, stored.last_seq) == ("expired", outcome.last_seq)


async def test_room_that_comes_back_in_time_is_all_that_it_takes(path, impatient):
    """Streams go on by themselves, whole and in order."""
    async with on_a_small_disk(path, held_s=10, settle_s=10) as (sup, store, disk):
        stream = await sup.start(chatter)
        await until(lambda: store.congested and store.failing is not None)
        before = stream.tail_seq
        await until(lambda: store.statistics().failed_commits > 9)
        assert stream.tail_seq == before
        disk.mend()
        assert (await stream.wait()).state is State.COMPLETED
        assert await numbers(stream) == [str(index) for index in range(1000)]


async def test_an_upstream_is_held_back_by_tcp_while_the_disk_is_full(path, monkeypatch, impatient):
    """Not a byte is read from its socket meanwhile, and what is in memory stays within the mark and one read."""
    monkeypatch.setenv("STREAM_SUPERVISOR_TEST_KEY", "sk-test-0123456789abcdef")
    store = SQLiteStore(path, commit_interval_s=0, high_water_bytes=MIB, low_water_bytes=MIB // 2)
    words = Script(tokens=200_000, events_per_write=64)
    with trio.fail_after(20):
        async with bench(store=store, default=words) as b:
            await until(lambda: store._state == "open")
            disk = Disk(store)
            disk.fill(10)
            stream = await b.start("m")
            await until(lambda: store.congested)
            await until(lambda: not len(b.transport._reader))
            sent, tail = -1, stream.tail_seq
            while sent != b.up.connections[0].events_sent:  # until the buffers between the two are full
                sent = b.up.connections[0].events_sent
                seen = store.statistics().failed_commits + 20
                await until(lambda seen=seen: store.statistics().failed_commits > seen)
            assert tail == stream.tail_seq
            assert tail < sent < 200_000
            assert store.statistics().held_bytes < MIB + 64 * 1024 * 3
            disk.mend()
            await until(lambda: stream.tail_seq > tail)
            await stream.cancel()


async def test_a_file_that_may_not_grow_is_the_same(tmp_path):
    """The system refuses to let the file grow, as a full disk or a quota does; then it lets it."""
    code = textwrap.dedent("""
        import resource, sys, trio
        from supervisor import SQLiteStore, StoreUnavailableError, StoreError, Limits, open_supervisor
        from supervisor.stores import sqlite
        from supervisor.streams import supervisor as registry
        sqlite.BACKOFF_INITIAL_S = sqlite.BACKOFF_MAX_S = registry._LATE_S = 0.001

        async def chatter(out):
            for index in range(400):
                await out.send(f"{index} ".ljust(20_000, "."))

        async def main():
            store = SQLiteStore(sys.argv[1], commit_interval_s=0, high_water_bytes=1 << 20, patience_s=0.05)
            with trio.fail_after(20):
                async with open_supervisor(store=store, limits=Limits(held_s=0.15, settle_s=0.15)) as sup:
                    hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
                    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, hard))
                    stream = await sup.start(chatter)
                    try:
                        await stream.wait()
                    except StoreError as error:
                        print("untold", stream.outcome, bool(store.failing))
                    try:
                        await sup.start(chatter)
                    except StoreUnavailableError as error:
                        print("refused", error.retry_after_s)
                    resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
                    while stream.outcome is None:
                        await trio.lowlevel.checkpoint()
                    print(stream.outcome.state, stream.outcome.reason, "I/O" in stream.outcome.message or "full" in stream.outcome.message)
                    async with stream.subscribe() as reading:
                        seqs = [event.seq async for event in reading]
                    print(seqs == list(range(1, stream.outcome.last_seq + 1)), store.failing)

        trio.run(main)
    """)
    command = [sys.executable, "-c", code, str(tmp_path / "store.db")]
    done = await trio.run_process(command, capture_stdout=True, stdin=subprocess.DEVNULL)
    assert done.stdout.decode().splitlines() == [
        "untold None True",
        "refused 1.0",
        "expired reaped_pressure True",
        "True None",
    ]


# --- at the end of the process ---------------------------------------------------------------------------------------


async def test_a_process_that_ends_with_a_full_disk_says_what_was_lost(path, impatient):
    """What nobody was told of is lost and said to be; the next run finds a prefix, and gives the stream its one outcome."""
    store = SQLiteStore(path, commit_interval_s=0, high_water_bytes=MIB, patience_s=0.05)

    async def chatter_until_full(out):
        for index in range(3):
            await out.send(str(index))
        await store.wait_durable(out.id, 3)
        Disk(store).fill(0)
        for index in range(3, 1000):
            await out.send(f"{index} ".ljust(20_000, "."))

    with pytest.raises(StoreError, match=r"records were not written.*full"):
        async with open_supervisor(store=store, limits=Limits(settle_s=0.02, held_s=0.02)) as sup:
            stream = await sup.start(chatter_until_full)
            with pytest.raises(StoreError):
                await stream.wait()
    async with open_supervisor(store=SQLiteStore(path)) as sup:
        found = await sup.find(stream.id)
        assert (found.outcome.state, found.outcome.reason) == (State.FAILED, "interrupted")
        read = await numbers(found)
        assert read == [str(index) for index in range(found.outcome.events)]
        assert found.outcome.events == 3


async def test_a_disk_that_does_not_answer_counts_as_failing(path, monkeypatch):
    """A commit that hangs gives no error: after the patience the store says so itself, and for how long."""
    store = SQLiteStore(path, commit_interval_s=0, patience_s=0.02)
    gate = trio.Event()
    async with open_supervisor(store=store) as sup:
        limiter = store._write_limiter
        await limiter.acquire_on_behalf_of(gate)  # as a thread that does not come back does
        store.create(head("s1"))
        store.append("s1", [Event(1, 1, 1.0, "data", b"x")])
        assert (store.failing, sup.health().store.state) == (None, "ok")
        await until(lambda: store.failing is not None)
        assert "does not answer" in sup.health().store.error
        assert sup.health().store.failing_since is not None
        limiter.release_on_behalf_of(gate)
        await until(lambda: store.durable_seq("s1") == 1)
        assert (store.failing, sup.health().store.lag_s) == (None, 0.0)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "store.db"
