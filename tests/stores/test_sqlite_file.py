"""The SQLite store's file: who may open it, what is refused and why, damage, migration, retention and indexes."""

from __future__ import annotations

import errno
import os
import re
import sqlite3
import stat
import subprocess
import sys
import textwrap

import pytest
import trio

from supervisor.errors import StoreCorruptError, StoreError, StoreLockedError
from supervisor.stores import Keep, Retention, SQLiteStore, pruning, schema
from supervisor.stores.database import Database

from . import faults
from .records import event, events, head, opened, pruned, until, write_ended


@pytest.fixture
def path(tmp_path):
    return tmp_path / "store.db"


@pytest.fixture
async def filled(path):
    """A closed file with ended streams s0 to s4 of 20 events each, in four segments."""
    async with opened(SQLiteStore(path)) as store:
        for index in range(5):
            store.create(head(f"s{index}", "k"))
            for first in range(1, 21, 5):
                store.append(f"s{index}", events(first, first + 4))
                await store.wait_durable(f"s{index}", first + 4)
            store.end(f"s{index}", event(21, kind="outcome"), state="completed", ended_at=100.0 + index)
            await store.wait_durable(f"s{index}", 21)
    return path


def edit(path, *statements: str) -> list[tuple]:
    """Change a file behind the store's back; return the last statement's rows."""
    connection = sqlite3.connect(path, isolation_level=None)
    try:
        rows = []
        for statement in statements:
            rows = connection.execute(statement).fetchall()
        return rows
    finally:
        connection.close()


async def refused(path, error: type[StoreError], match: str, **options) -> None:
    """Show that the store does not open, says why, and can be closed."""
    store = SQLiteStore(path, **options)
    with pytest.raises(error, match=match):
        await store.run()
    await store.aclose()
    with pytest.raises(StoreError, match="not open"):
        await store.get(stream_id="s1")


# --- opening ---------------------------------------------------------------------------------------------------------


async def test_a_new_file_is_ours_and_private(path):
    """Mode 0600 on every file, our application id and version, write-ahead log and incremental vacuum."""
    before = os.umask(0)
    try:
        async with opened(SQLiteStore(path)) as store:
            write_ended(store, "s1", 1)
            await store.wait_durable("s1", 2)
            files = sorted(path.parent.iterdir())
            assert [f.name for f in files] == ["store.db", "store.db-shm", "store.db-wal", "store.db.lock"]
            assert {0o600} == {stat.S_IMODE(f.stat().st_mode) for f in files}
    finally:
        os.umask(before)
    pragmas = [
        edit(path, f"PRAGMA {name}")[0][0]
        for name in ("application_id", "user_version", "journal_mode", "auto_vacuum")
    ]
    assert pragmas == [schema.APPLICATION_ID, schema.SCHEMA_VERSION, "wal", 2]


@pytest.mark.parametrize("synchronous", [("OFF", 0), ("NORMAL", 1), ("FULL", 2), ("EXTRA", 3)])
async def test_synchronous_is_what_was_asked_for(path, synchronous):
    """The option reaches the connection that writes."""
    name, number = synchronous
    async with opened(SQLiteStore(path, synchronous=name)) as store:
        assert (number,) == store._database.writer.execute("PRAGMA synchronous").fetchone()
        write_ended(store, "s1", 1)
        await store.wait_durable("s1", 2)


async def test_an_interrupted_stream_goes_on_after_a_restart(path):
    """What a run left without an outcome is written on after its last durable event, and can be given an outcome."""
    async with opened(SQLiteStore(path)) as store:
        for stream_id in ("s1", "s2"):
            store.create(head(stream_id, "k"))
            store.append(stream_id, events(1, 3))
    async with opened(SQLiteStore(path)) as store:
        assert [(s.id, s.last_seq) for s in await store.unfinished()] == [("s1", 3), ("s2", 3)]
        assert store.durable_seq("s1") == 3
        with pytest.raises(StoreError, match="created twice"):
            store.create(head("s1"))
        store.append("s1", events(4, 5))
        store.end("s1", event(6, kind="outcome"), state="completed", ended_at=1.0)
        store.end("s2", event(4, kind="outcome"), state="failed", ended_at=2.0)
        await store.wait_durable("s1", 6)
        await store.wait_durable("s2", 4)
        assert list(await store.unfinished()) == []
        assert [*events(1, 5), event(6, kind="outcome")] == list(await store.read("s1", after_seq=0, limit=9))


async def test_one_file_one_store(path, tmp_path):
    """A second store on the file, under any name of it, is refused and told who has it; then it is free again."""
    link = tmp_path / "link.db"
    link.symlink_to(path)
    async with opened(SQLiteStore(path)):
        for name in (path, link):
            await refused(
                name, StoreLockedError, rf"in use by process {os.getpid()}, which holds .*store\.db\.lock"
            )
    async with opened(SQLiteStore(link)) as store:
        write_ended(store, "s1", 1)


async def test_another_process_holds_the_file(path):
    """The lock works between processes, names the other's pid, and goes with it when it is killed."""
    code = textwrap.dedent("""
        import sys, trio
        from supervisor.stores import SQLiteStore
        async def main():
            async with trio.open_nursery() as nursery:
                await nursery.start(SQLiteStore(sys.argv[1]).run)
                print("open", flush=True)
        trio.run(main)
    """)
    command = [sys.executable, "-c", code, str(path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as other:  # noqa: ASYNC220  # waits for one line only
        try:
            assert other.stdout is not None
            assert await trio.to_thread.run_sync(other.stdout.readline) == b"open\n"
            await refused(path, StoreLockedError, f"in use by process {other.pid}")
        finally:
            other.kill()
    async with opened(SQLiteStore(path)) as store:
        write_ended(store, "s1", 1)


async def test_another_programs_lock_on_the_database(filled):
    """A program that has locked the database itself is reported as such."""
    other = sqlite3.connect(filled, isolation_level=None)
    other.execute("PRAGMA locking_mode = EXCLUSIVE")
    other.execute("BEGIN EXCLUSIVE")
    try:
        await refused(filled, StoreLockedError, "locked by another program", busy_timeout_s=0)
    finally:
        other.close()


async def test_a_missing_directory_is_named(tmp_path):
    """Nothing is created on the way to a file."""
    await refused(
        tmp_path / "nowhere" / "store.db", StoreError, r"directory .*nowhere does not exist; create it"
    )
    assert list(tmp_path.iterdir()) == []


async def test_a_path_that_is_no_file(tmp_path):
    """A directory in the place of the file, or a file in the place of the directory."""
    (tmp_path / "dir").mkdir()
    await refused(tmp_path / "dir", StoreError, "cannot be opened for writing: Is a directory")
    (tmp_path / "file").touch()
    await refused(tmp_path / "file" / "store.db", StoreError, "cannot be opened for writing: Not a directory")


async def test_a_read_only_place(path, monkeypatch):
    """Where nothing may be written the store says so."""

    def denied(name, *args, **kwargs):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), name)

    with monkeypatch.context() as patch:
        patch.setattr(schema.os, "open", denied)
        await refused(
            path, StoreError, "cannot be opened for writing: Read-only file system; nothing was changed"
        )


async def test_a_file_system_without_a_log(path, monkeypatch):
    """Where SQLite cannot use its write-ahead log the store does not run on something weaker."""
    disk = faults.install(monkeypatch)
    disk.rewrite = {"PRAGMA journal_mode = WAL": "PRAGMA journal_mode = DELETE"}
    await refused(path, StoreError, "cannot hold a write-ahead log")


async def test_what_is_no_database_is_left_alone(path):
    """A file of something else is refused with what to do, and stays as it is."""
    path.write_bytes(b"my diary\n" * 1000)
    await refused(
        path, StoreCorruptError, r"damaged or is not an SQLite database.*left as it is; move it away"
    )
    assert path.read_bytes() == b"my diary\n" * 1000


async def test_another_programs_database_is_left_alone(path):
    """So is a database that is not ours."""
    edit(path, "CREATE TABLE recipes (name)", "INSERT INTO recipes VALUES ('soup')")
    await refused(path, StoreCorruptError, "of another program")
    assert edit(path, "SELECT * FROM recipes") == [("soup",)]


async def test_a_damaged_file_is_refused_or_says_so_when_read(filled):
    """A schema that cannot be read is StoreCorruptError at opening, a page that cannot be read is one at reading."""
    sound = filled.read_bytes()
    filled.write_bytes(sound[:100] + b"\xff" * 3996 + sound[4096:])
    await refused(filled, StoreCorruptError, "damaged")
    page = edit_page(sound, filled, "segments")
    filled.write_bytes(sound[: page * 4096] + b"\xff" * 4096 + sound[(page + 1) * 4096 :])
    async with opened(SQLiteStore(filled)) as store:
        with pytest.raises(StoreCorruptError, match="damaged"):
            await store.read("s1", after_seq=0, limit=99)


def edit_page(sound: bytes, path, table: str) -> int:
    path.write_bytes(sound)
    return edit(path, f"SELECT rootpage FROM sqlite_master WHERE name = '{table}'")[0][0] - 1


# --- versions --------------------------------------------------------------------------------------------------------


async def test_a_newer_file_is_refused(filled):
    """A file of a version to come is left as it is."""
    edit(filled, "PRAGMA user_version = 7")
    await refused(filled, StoreError, r"newer version \(schema 7, this one knows 2\).*upgrade")
    assert edit(filled, "PRAGMA user_version") == [(7,)]


async def test_an_older_file_is_migrated_step_by_step(filled, monkeypatch):
    """Each version's step runs once, in order, in its own transaction; what was stored is still there."""
    monkeypatch.setattr(schema, "SCHEMA_VERSION", 4)
    ran = []

    def step(version, statement):
        def migrate(connection):
            ran.append(version)
            connection.execute(statement)

        return migrate

    steps = {
        2: step(2, "ALTER TABLE streams ADD COLUMN colour TEXT"),
        3: step(3, "UPDATE streams SET colour = 'none'"),
    }
    monkeypatch.setattr(schema, "MIGRATIONS", steps)
    for _ in range(2):
        async with opened(SQLiteStore(filled)) as store:
            assert len(await store.list()) == 5
            assert len(await store.read("s3", after_seq=0, limit=99)) == 21
    assert ran == [2, 3]
    assert edit(filled, "SELECT colour, count(*) FROM streams GROUP BY colour") == [("none", 5)]
    assert edit(filled, "PRAGMA user_version") == [(4,)]


async def test_a_migration_that_fails_changes_nothing(filled, monkeypatch):
    """The step's transaction is rolled back, the file keeps its version, and the next try starts from there."""

    def broken(connection):
        connection.execute("DELETE FROM streams")
        connection.execute("nonsense")

    monkeypatch.setattr(schema, "SCHEMA_VERSION", 3)
    monkeypatch.setattr(schema, "MIGRATIONS", {2: broken})
    await refused(filled, StoreError, "nonsense")
    assert edit(filled, "SELECT count(*), (SELECT * FROM pragma_user_version) FROM streams") == [(5, 2)]
    monkeypatch.setattr(schema, "MIGRATIONS", {})
    await refused(filled, StoreError, "has schema 2, from which there is no way to 3")


async def test_a_start_that_was_cut_off_begins_again(path):
    """A file that a crash left with a header and no tables is taken for the new file it is."""
    edit(path, "PRAGMA auto_vacuum = INCREMENTAL", "PRAGMA journal_mode = WAL")
    async with opened(SQLiteStore(path)) as store:
        write_ended(store, "s1", 1)
        await store.wait_durable("s1", 2)
    assert edit(path, "PRAGMA auto_vacuum") == [(2,)]


# --- damage ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "damage",
    [
        "UPDATE segments SET body = CAST(substr(body, 1, 20) || x'00' || substr(body, 22) AS BLOB)",
        "UPDATE segments SET body = x''",
        "UPDATE segments SET epoch = 2",
        "UPDATE segments SET crc = crc + 1",
        "UPDATE segments SET first_seq = first_seq + 1",
    ],
)
async def test_a_damaged_segment_is_named_and_the_rest_is_read(filled, damage):
    """One changed byte or column is found out; the error names stream and seqs; before and after are still read."""
    edit(filled, f"{damage} WHERE stream = (SELECT n FROM streams WHERE id = 's2') AND last_seq = 10")
    async with opened(SQLiteStore(filled)) as store:
        assert events(1, 5) == list(await store.read("s2", after_seq=0, limit=99))
        with pytest.raises(
            StoreCorruptError, match=r"stream s2: the stored events 6 to \d+ are (damaged|missing)"
        ):
            await store.read("s2", after_seq=5, limit=99)
        assert events(11, 20) == list(await store.read("s2", after_seq=10, limit=10))
        assert len(await store.read("s1", after_seq=0, limit=99)) == 21


@pytest.mark.parametrize(("gone", "named"), [(5, "1 to 5"), (10, "6 to 10"), (21, "21 to 21")])
async def test_a_missing_segment_is_no_silent_gap(filled, gone, named):
    """Rows that are gone without retention having removed them are reported, at the start, in the middle, at the end."""
    edit(
        filled,
        f"DELETE FROM segments WHERE stream = (SELECT n FROM streams WHERE id = 's2') AND last_seq = {gone}",
    )
    async with opened(SQLiteStore(filled)) as store:
        seen = 0
        with pytest.raises(StoreCorruptError, match=f"stream s2: the stored events {named} are missing"):
            while found := await store.read("s2", after_seq=seen, limit=99):
                seen = found[-1].seq
        assert int(named.split()[0]) - 1 == seen


# --- retention -------------------------------------------------------------------------------------------------------


async def test_pruning_shrinks_the_file(path):
    """Pages of removed streams go back to the file system, but for a tenth; what is left is whole."""
    async with opened(SQLiteStore(path)) as store:
        for index in range(40):
            write_ended(store, f"s{index:02}", 50, size=4000, ended_at=float(index))
        await store.wait_durable("s39", 51)
        full = edit(path, "PRAGMA page_count")[0][0]
        assert await pruned(store, max_ended=5) == 35
        assert edit(path, "PRAGMA page_count")[0][0] < full / 5
        assert len(await store.read("s39", after_seq=0, limit=99)) == 51
        assert edit(path, "PRAGMA integrity_check") == [("ok",)]
        assert edit(path, "SELECT count(DISTINCT stream) FROM segments") == [(5,)]
    assert path.stat().st_size < full * 4096 / 5


async def test_what_a_large_stream_has_left_goes_piece_by_piece(path):
    """A stream goes as a whole and at once; its events are cleared away in transactions of a bounded part each."""
    async with opened(SQLiteStore(path)) as store:
        for stream_id in ("s1", "s2"):
            store.create(head(stream_id))
            for seq in range(1, 81):
                store.append(stream_id, events(seq, seq, size=300_000))
            store.end(stream_id, event(81, kind="outcome"), state="completed", ended_at=1.0)
        await store.wait_durable("s2", 81)
        ((victim, rule),), complete = store._database.plan(Retention(max_ended=1), 0.0, 5)
        assert (rule, complete) == ("max_ended", True)
        assert await trio.to_thread.run_sync(store._database.remove, [victim.ref]) == 1
        assert await store.get(stream_id="s1") is None
        assert list(await store.read("s1", after_seq=0, limit=99)) == []
        garbage = store._database.garbage()
        steps = 1
        while await trio.to_thread.run_sync(store._database.collect, garbage):
            steps += 1
        assert 80 * 300_000 // pruning.PRUNE_BYTES <= steps <= 1 + 80 * 300_000 // pruning.PRUNE_BYTES
        assert edit(path, "SELECT count(*) FROM removed") == [(0,)]
        assert [stream.id for stream in await store.list()] == ["s2"]
        assert len(await store.read("s2", after_seq=80, limit=99)) == 1


async def test_a_prune_that_was_cut_off_is_finished_by_the_next(filled, monkeypatch):
    """What a crash leaves is nobody's: a stream that is new does not get the number, nor the events, of one that is gone."""
    monkeypatch.setattr(pruning, "PRUNE_SEGMENTS", 3)
    async with opened(SQLiteStore(filled)) as store:
        chosen, _ = store._database.plan(Retention(max_ended=1), 0.0, 9)
        newest = max(number for (number,) in edit(filled, "SELECT n FROM streams"))
        await trio.to_thread.run_sync(store._database.remove, [*(ended.ref for ended, _ in chosen), newest])
        assert list(await store.list()) == []
        assert await trio.to_thread.run_sync(store._database.collect, store._database.garbage())
    async with opened(SQLiteStore(filled)) as store:
        write_ended(store, "new", 3)
        await store.wait_durable("new", 4)
        assert len(await store.read("new", after_seq=0, limit=99)) == 4
        assert edit(filled, "SELECT n > ? FROM streams".replace("?", str(newest))) == [(1,)]
        assert (await store.prune(Retention())).streams == 0
        assert edit(filled, "SELECT count(*), count(DISTINCT stream) FROM segments") == [(1, 1)]
        assert edit(filled, "SELECT count(*) FROM removed") == [(0,)]
        assert len(await store.read("new", after_seq=0, limit=99)) == 4


async def test_garbage_is_looked_for_a_bounded_part_at_a_time(filled, monkeypatch):
    """However much there is, and wherever that cuts it: in the middle of a stream, between two, after the last."""
    monkeypatch.setattr(pruning, "LOOK_SEGMENTS", 4)
    monkeypatch.setattr(pruning, "PRUNE_SEGMENTS", 3)
    monkeypatch.setattr(pruning, "PRUNE_STREAMS", 2)
    looks = []
    look = Database.garbage

    def looked(self):
        found = look(self)
        looks.append(len(found.segments))
        return found

    monkeypatch.setattr(Database, "garbage", looked)
    async with opened(SQLiteStore(filled)) as store:
        assert await pruned(store, max_ended=0) == 5
        assert max(looks) == 4
        assert edit(filled, "SELECT (SELECT count(*) FROM segments) + (SELECT count(*) FROM removed)") == [
            (0,)
        ]


async def test_commits_go_on_while_a_prune_does(path):
    """A prune takes turns with the writer: a stream ends durably before a long prune is over."""
    async with opened(SQLiteStore(path, commit_interval_s=0)) as store:
        for index in range(3):
            write_ended(store, f"s{index}", 300, size=20_000)
        await store.wait_durable("s2", 301)
        done = trio.Event()

        async def prune() -> None:
            await pruned(store, max_ended=0)
            done.set()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(prune)
            await until(lambda: store._write_limiter.borrowed_tokens == 1)
            write_ended(store, "s9", 1)
            await store.wait_durable("s9", 2)
            assert not done.is_set()


async def test_a_prune_that_fails_says_so_and_changes_nothing(path, monkeypatch):
    """A failing disk is a StoreError from `prune`; the next one works."""
    disk = faults.install(monkeypatch)
    async with opened(SQLiteStore(path)) as store:
        write_ended(store, "s1", 5)
        await store.wait_durable("s1", 6)
        disk.before = faults.failing("COMMIT", 1)
        with pytest.raises(StoreError, match="simulated"):
            await pruned(store, max_ended=0)
        assert len(await store.read("s1", after_seq=0, limit=99)) == 6
        assert await pruned(store, max_ended=0) == 1


# --- cost ------------------------------------------------------------------------------------------------------------


async def test_no_statement_reads_a_whole_table(filled, monkeypatch):
    """Every statement of writing, reading, listing and pruning finds its rows by an index, in the index's order."""
    seen: list[str] = []
    connect = schema.connect

    def traced(*args, **kwargs):
        connection = connect(*args, **kwargs)
        connection.set_trace_callback(seen.append)
        return connection

    monkeypatch.setattr(schema, "connect", traced)
    async with opened(SQLiteStore(filled)) as store:
        store.create(head("s8"))
        write_ended(store, "s9", 3, key="k")
        await store.wait_durable("s9", 4)
        await store.read("s9", after_seq=2, limit=9)
        await store.get(stream_id="s1")
        await store.get(key="k")
        await store.unfinished()
        await store.list(limit=2)
        await store.list(before_id="s4", limit=2)
        await store.list(before_id="s4", states=["completed", "failed"], limit=2)
        write_ended(store, "t1", 3, tenant="acme")
        await store.wait_durable("t1", 4)
        await store.prune(Retention(max_ended=3, tenant=Keep(max_ended=0)))
        await pruned(store, ended_before=103.0)
    connection = sqlite3.connect(filled)
    looked_at = 0
    for statement in dict.fromkeys(seen):
        if not re.match(r"\s*(SELECT|UPDATE|DELETE)", statement) or "sqlite_master" in statement:
            continue
        for *_, step in connection.execute(f"EXPLAIN QUERY PLAN {statement}"):
            looked_at += 1
            by_index = step.startswith(("SEARCH", "CORRELATED", "SCALAR")) or "USING" in step
            assert by_index or step in ("SCAN store", "SCAN removed", "SCAN CONSTANT ROW"), (step, statement)
            assert "TEMP B-TREE" not in step, (step, statement)
    connection.close()
    assert looked_at > 20


def test_the_database_is_usable_without_trio(path):
    """The synchronous half stands by itself: opening twice at once is refused, closing twice is nothing."""
    one, other = (Database(path, "NORMAL", 0.0) for _ in range(2))
    assert list(one.open()) == []
    with pytest.raises(StoreLockedError):
        other.open()
    for _ in range(2):
        one.close_reader()
        one.close_writer()
    assert list(other.open()) == []
    other.close_reader()
    other.close_writer()
