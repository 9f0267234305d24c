"""What is kept of ended streams: by age, count and bytes, of all and of each tenant, and that telling is like doing."""

from __future__ import annotations

import logging
import sqlite3

import pytest
import trio
import trio.testing
from hypothesis import given, settings
from hypothesis import strategies as st

from supervisor import open_supervisor
from supervisor.errors import ConfigurationError, GapError, StoreError
from supervisor.stores import Keep, MemoryStore, PruneReport, Retention, SQLiteStore, Store, retain
from supervisor.stores.retention import EndedStream, Totals, select

from . import faults
from .records import event, events, head, opened, pruned, until, write_ended


@pytest.fixture
def path(tmp_path):
    return tmp_path / "store.db"


@pytest.fixture(params=["memory", "sqlite"])
def store(request, path) -> Store:
    return MemoryStore() if request.param == "memory" else SQLiteStore(path, commit_interval_s=0)


async def left(store: Store) -> str:
    return " ".join(sorted(stream.id for stream in await store.list()))


def by_rule(report: PruneReport) -> dict[str, int]:
    return {rule: removed.streams for rule, removed in report.rules.items()}


# --- which go --------------------------------------------------------------------------------------------------------

KEEP = st.builds(
    Keep,
    max_ended=st.none() | st.integers(0, 5),
    max_age_s=st.none() | st.integers(0, 9),
    max_bytes=st.none() | st.integers(0, 30),
)
STREAMS = st.lists(
    st.tuples(st.sampled_from([None, "a", "b", ""]), st.integers(0, 9), st.integers(1, 9)), max_size=12
)


def stays(keep: Keep, streams: list[EndedStream], now: float) -> list[EndedStream]:
    """Say it as the documentation does, at whatever cost: what ended first goes until every limit holds."""
    streams = list(streams)
    while streams and (
        (keep.max_age_s is not None and streams[0].ended_at < now - keep.max_age_s)
        or (keep.max_ended is not None and len(streams) > keep.max_ended)
        or (keep.max_bytes is not None and sum(one.nbytes for one in streams) > keep.max_bytes)
    ):
        del streams[0]
    return streams


@settings(deadline=None)
@given(whole=KEEP, each=KEEP, named=KEEP, streams=STREAMS, limit=st.integers(1, 12))
def test_the_limits_hold_and_nothing_more_goes(whole, each, named, streams, limit):
    """Tenant by tenant, then all together; in portions of any size as in one."""
    retention = Retention(
        max_ended=whole.max_ended,
        max_age_s=whole.max_age_s,
        max_bytes=whole.max_bytes,
        tenant=each,
        tenants={"b": named},
    )
    kept = [
        (tenant, EndedStream(number, ended_at, nbytes))
        for number, (tenant, ended_at, nbytes) in enumerate(sorted(streams, key=lambda one: one[1]))
    ]

    def of(tenant):
        return [one for owner, one in kept if owner == tenant]

    expected = of(None)
    for tenant in ("a", "b", ""):
        expected += stays(named if tenant == "b" else each, of(tenant), 10.0)
    expected = stays(whole, sorted(expected, key=lambda one: (one.ended_at, one.ref)), 10.0)

    complete = False
    while not complete:
        groups = {owner for owner, _ in kept}
        chosen, complete = select(
            retention,
            now=10.0,
            totals=[
                Totals(t, len(of(t)), sum(one.nbytes for one in of(t)), of(t)[0].ended_at) for t in groups
            ],
            oldest=lambda t, kept=kept: iter([one for owner, one in kept if t is None or owner == t]),
            limit=limit,
        )
        assert len(chosen) <= limit
        assert complete or len(chosen) == limit
        gone = {one.ref for one, _ in chosen}
        kept = [(owner, one) for owner, one in kept if one.ref not in gone]
    assert [one.ref for one in expected] == [one.ref for _, one in kept]


@pytest.mark.parametrize(
    "options",
    [
        {"max_ended": -1},
        {"max_age_s": float("nan")},
        {"max_bytes": "1"},
        {"tenants": {"a": 1}},
        {"tenants": 1},
    ],
)
def test_impossible_limits_are_refused(options):
    """Each names its field."""
    with pytest.raises(ConfigurationError, match=next(iter(options))):
        Retention(**options)


# --- in every store --------------------------------------------------------------------------------------------------


async def test_bytes_are_brought_under_their_limit(store):
    """Those that ended first make room, as many as it takes; the report says how many bytes they took."""
    async with opened(store):
        for index in range(6):
            write_ended(store, f"s{index}", 1, size=100_000, ended_at=float(index))
            await store.wait_durable(f"s{index}", 2)
        report = await store.prune(Retention(max_bytes=350_000))
        assert by_rule(report) == {"max_bytes": 3}
        assert 300_000 < report.nbytes == report.rules["max_bytes"].nbytes < 310_000
        assert await left(store) == "s3 s4 s5"
        assert (await store.prune(Retention(max_bytes=350_000))).streams == 0


async def test_a_tenant_pays_for_itself(store):
    """One that keeps much loses its own, by the rules of all tenants or by its own; the limits of all come after."""
    async with opened(store):
        for index in range(4):
            for tenant in ("hog", "own", None):
                write_ended(store, f"{tenant or 'free'}{index}", 1, tenant=tenant, ended_at=float(index))
                await store.wait_durable(f"{tenant or 'free'}{index}", 2)
        retention = Retention(
            max_ended=7,
            tenant=Keep(max_ended=2),
            tenants={"own": Keep(max_age_s=10.0), "absent": Keep(max_ended=0)},
        )
        report = await store.prune(retention, now=11.5)
        assert by_rule(report) == {"tenant.max_ended": 2, "tenants.own.max_age_s": 2, "max_ended": 1}
        assert await left(store) == "free1 free2 free3 hog2 hog3 own2 own3"


async def test_retention_counts_from_the_outcome_and_leaves_the_living(store):
    """A stream that was started long ago and ended just now stays; one that lives is not looked at by any rule."""
    async with opened(store):
        store.create(head("live", tenant="t"))
        store.append("live", events(1, 3, size=1000))
        write_ended(store, "a_old_but_late", 1, ended_at=1000.0, tenant="t")
        write_ended(store, "b_new_but_early", 1, ended_at=10.0, tenant="t")
        await store.wait_durable("b_new_but_early", 2)
        assert by_rule(await store.prune(Retention(max_age_s=100), now=1050.0)) == {"max_age_s": 1}
        assert await left(store) == "a_old_but_late"
        assert await pruned(store, max_ended=0, tenant=Keep(max_ended=0, max_bytes=0)) == 1
        assert [stream.id for stream in await store.unfinished()] == ["live"]
        assert len(await store.read("live", after_seq=0, limit=9)) == 3


async def test_a_dry_run_tells_what_a_prune_does(store):
    """The same report, and nothing is changed; `complete` says whether the limit of one call was reached."""
    async with opened(store):
        for index in range(5):
            write_ended(store, f"s{index}", 3, ended_at=float(index), tenant="t" if index == 4 else None)
            await store.wait_durable(f"s{index}", 4)
        retention = Retention(max_ended=2, tenant=Keep(max_bytes=0))
        told = await store.prune(retention, dry_run=True)
        assert await left(store) == "s0 s1 s2 s3 s4"
        assert not (await store.prune(retention, dry_run=True, limit=2)).complete
        assert told == await store.prune(retention)
        assert (told.complete, by_rule(told)) == (True, {"tenant.max_bytes": 1, "max_ended": 2})
        assert await left(store) == "s2 s3"


async def test_the_tenant_is_kept_with_the_stream(store):
    """What was created with a tenant is described with it."""
    async with opened(store):
        write_ended(store, "s1", 1, tenant="acme")
        store.create(head("s2"))
        await store.wait_durable("s2", 0)
        assert (await store.get(stream_id="s1")).tenant == "acme"
        assert (await store.get(stream_id="s2")).tenant is None


# --- in the background -----------------------------------------------------------------------------------------------


class Counting(MemoryStore):
    """Counts the sweeps; `after` happens at the end of each."""

    def __init__(self) -> None:
        super().__init__()
        self.sweeps: list[float] = []
        self.broken = False

    async def prune(self, retention, *, now=None, limit=1000, dry_run=False):
        self.sweeps.append(trio.current_time())
        if self.broken:
            raise StoreError("the disk is gone")
        return await super().prune(retention, now=now, limit=2, dry_run=dry_run)


async def test_sweeps_come_again_and_at_once_while_there_is_more(autojump_clock):
    """A sweep that leaves some is followed by the next; then one in each interval, and each removes what has come."""
    store = Counting()
    start = trio.current_time()
    async with opened(store), trio.open_nursery() as nursery:
        for index in range(5):
            write_ended(store, f"s{index}", 1)
        nursery.start_soon(lambda: retain(store, Retention(max_ended=0), every_s=9.0))
        await trio.sleep(1)
        assert [at - start for at in store.sweeps] == [0, 0, 0]
        assert await left(store) == ""
        write_ended(store, "s9", 1)
        await trio.sleep(9)
        assert await left(store) == ""
        assert [at - start for at in store.sweeps[3:]] == [9]
        nursery.cancel_scope.cancel()


async def test_a_sweep_that_fails_is_logged_and_tried_again(autojump_clock, caplog):
    """Retention outlives the troubles of its store."""
    store = Counting()
    async with opened(store), trio.open_nursery() as nursery:
        write_ended(store, "s1", 1)
        store.broken = True
        nursery.start_soon(lambda: retain(store, Retention(max_ended=0), every_s=9.0))
        await trio.sleep(1)
        assert "retention: the disk is gone" in caplog.text
        assert await left(store) == "s1"
        store.broken = False
        await trio.sleep(9)
        assert await left(store) == ""
        nursery.cancel_scope.cancel()


async def test_a_prune_stands_back_while_the_store_is_behind(path, monkeypatch):
    """Sources that wait for room are not made to wait longer; on a disk that fails it goes on, for it may make the room."""
    disk = faults.install(monkeypatch)
    store = SQLiteStore(path, commit_interval_s=0, high_water_bytes=1 << 20)
    async with opened(store), trio.open_nursery() as nursery:
        write_ended(store, "s1", 1)
        await store.wait_durable("s1", 2)
        disk.writes.clear()
        store.create(head("s2"))
        store.append("s2", events(1, 2, size=1 << 20))
        await trio.testing.wait_all_tasks_blocked()
        assert store.congested
        done = trio.Event()

        async def prune() -> None:
            assert await pruned(store, max_ended=0) == 1
            assert not store.congested
            done.set()

        nursery.start_soon(prune)
        await until(lambda: store._flowing.statistics().tasks_waiting == 1)
        assert store._write_limiter.statistics().tasks_waiting == 0
        disk.writes.set()
        await done.wait()

        disk.before = faults.failing("UPDATE store", 1_000_000)
        store.append("s2", events(3, 4, size=1 << 20))
        write_ended(store, "s3", 1)
        await until(lambda: store.congested and store.failing is not None)
        assert await pruned(store, max_ended=0) == 0  # it did not wait for a flow that will not come
        disk.before = lambda _: None


async def test_a_reader_of_what_retention_has_removed_is_told(store):
    """Still in memory but gone from the store: a gap that says so, never an empty answer or an end without a beginning."""

    async def words(out):
        for word in ("one ", "two ", "three"):
            await out.send(word)

    async with open_supervisor(store=store) as sup:
        stream = await sup.start(words)
        outcome = await stream.wait()
        assert (await store.prune(Retention(max_ended=0))).streams == 1
        with pytest.raises(GapError) as caught:
            async with stream.subscribe() as reading:
                _ = [event async for event in reading]
        assert (caught.value.after_seq, caught.value.tail_seq) == (0, outcome.last_seq)
        assert caught.value.earliest_seq > caught.value.tail_seq  # nothing can be read any more
        assert stream.outcome == outcome


# --- the file --------------------------------------------------------------------------------------------------------


def query(path, *statements: str) -> list[tuple]:
    connection = sqlite3.connect(path, isolation_level=None)
    try:
        rows = []
        for statement in statements:
            rows = connection.execute(statement).fetchall()
        return rows
    finally:
        connection.close()


ON_DISK = (
    "SELECT id, nbytes, 400 + length(head) + length(outcome)"
    " + (SELECT sum(length(body) + 48) FROM segments WHERE stream = streams.n) FROM streams WHERE ended_at IS NOT NULL"
)


async def test_sizes_are_those_in_the_file(path, monkeypatch):
    """Over many commits, failed ones, ones that happened all the same, and a restart in the middle."""
    disk = faults.install(monkeypatch)
    async with opened(SQLiteStore(path, commit_interval_s=0)) as store:
        store.create(head("s1"))
        for seq in range(1, 6):
            (fault, word) = [("before", "INSERT INTO seg"), ("before", "COMMIT"), ("after", "COMMIT")][
                seq % 3
            ]
            setattr(disk, fault, faults.failing(word, 1))
            store.append("s1", events(seq, seq, size=700 * seq))
            await store.wait_durable("s1", seq)
            disk.before = disk.after = lambda _: None
    async with opened(SQLiteStore(path, commit_interval_s=0)) as store:
        store.append("s1", events(6, 9, size=3000))
        await store.wait_durable("s1", 9)
        store.end("s1", event(10, kind="outcome"), state="completed", ended_at=1.0)
        store.create(head("s2"))
        disk.after = faults.failing("COMMIT", 1)
        store.append("s2", events(1, 50))
        await store.wait_durable("s2", 50)
        store.end("s2", event(51, kind="outcome"), state="completed", ended_at=1.0)
        await store.wait_durable("s2", 51)
        for _, told, there in query(path, ON_DISK):
            assert told == there > 0
        assert len(query(path, ON_DISK)) == 2


V1 = """
CREATE TABLE streams (n INTEGER PRIMARY KEY, id TEXT NOT NULL UNIQUE, key TEXT, created_at REAL NOT NULL, state TEXT,
    ended_at REAL, epoch INTEGER NOT NULL, first_seq INTEGER NOT NULL DEFAULT 1, last_seq INTEGER, outcome BLOB, head BLOB NOT NULL);
CREATE INDEX streams_by_key ON streams (key, id) WHERE key IS NOT NULL;
CREATE INDEX streams_by_state ON streams (state, id);
CREATE INDEX streams_by_end ON streams (ended_at, id) WHERE ended_at IS NOT NULL;
CREATE TABLE segments (n INTEGER PRIMARY KEY, stream INTEGER NOT NULL, first_seq INTEGER NOT NULL,
    last_seq INTEGER NOT NULL, epoch INTEGER NOT NULL, crc INTEGER NOT NULL, body BLOB NOT NULL);
CREATE UNIQUE INDEX segments_by_position ON segments (stream, last_seq);
CREATE TABLE store (commits INTEGER NOT NULL)
"""
"""The first layout, as files of it have it."""


async def test_a_file_of_the_first_layout_is_brought_up_to_date(path):
    """Its streams are there, counted as what they take; those that end from now on have tenants; the plans have their indexes."""
    async with opened(SQLiteStore(path)) as store:
        write_ended(store, "s1", 20, size=999, ended_at=5.0)
        store.create(head("s2"))
        store.append("s2", events(1, 3))
        await store.wait_durable("s1", 21)
    made_now = query(path, "SELECT type, name, sql FROM sqlite_master ORDER BY name")
    sizes = query(path, ON_DISK)
    old = path.with_name("old.db")
    connection = sqlite3.connect(old, isolation_level=None)
    connection.executescript(f"PRAGMA auto_vacuum = INCREMENTAL; PRAGMA journal_mode = WAL; {V1};")
    connection.execute("ATTACH ? AS made", (str(path),))
    common = "n, id, key, created_at, state, ended_at, epoch, first_seq, last_seq, outcome, head"
    connection.executescript(f"""
        INSERT INTO streams ({common}) SELECT {common} FROM made.streams;
        INSERT INTO segments SELECT * FROM made.segments;
        INSERT INTO store SELECT * FROM made.store;
        PRAGMA application_id = {0x53747376};
        PRAGMA user_version = 1;
    """)
    connection.close()
    async with opened(SQLiteStore(old, commit_interval_s=0)) as store:
        assert sizes == query(old, ON_DISK)
        assert (await store.get(stream_id="s1")).tenant is None
        assert [(s.id, s.last_seq) for s in await store.unfinished()] == [("s2", 3)]
        write_ended(store, "s3", 1, tenant="t", ended_at=6.0)
        await store.wait_durable("s3", 2)
        assert by_rule(await store.prune(Retention(max_ended=1, tenant=Keep(max_ended=0)))) == {
            "tenant.max_ended": 1
        }
    names = [(kind, name) for kind, name, _ in made_now]
    assert names == query(old, "SELECT type, name FROM sqlite_master ORDER BY name")
    indexes = "SELECT sql FROM sqlite_master WHERE type = 'index' AND sql IS NOT NULL ORDER BY name"
    assert query(path, indexes) == query(old, indexes)


async def test_a_file_that_cannot_shrink_is_told_of_with_what_to_do(path, caplog):
    """A prune of it works and comes to an end; the log names the command that changes the file."""
    async with opened(SQLiteStore(path)) as store:
        for index in range(30):
            write_ended(store, f"s{index:02}", 50, size=4000, ended_at=float(index))
        await store.wait_durable("s29", 51)
    assert "auto_vacuum" not in caplog.text
    query(path, "PRAGMA journal_mode = DELETE", "PRAGMA auto_vacuum = NONE", "VACUUM")
    with caplog.at_level(logging.WARNING):
        async with opened(SQLiteStore(path)) as store:
            assert await pruned(store, max_ended=1) == 29
            assert await left(store) == "s29"
    assert "PRAGMA auto_vacuum = INCREMENTAL; VACUUM'" in caplog.text
