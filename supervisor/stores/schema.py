"""The database file: who may open it, what is in it, and how it came from an older version.

Opening goes through three gates, and each that does not open says why and what to do:

1. a lock file beside the database, held with `flock` as long as the store is open, so that two processes never write one
   file. SQLite's own locks would let them take turns, and `locking_mode=EXCLUSIVE` would shut out our own reader;
2. the file is an SQLite database, and one of ours (`application_id`);
3. its schema version (`user_version`) is ours, or older and then migrated, one transaction per version.

The database, its lock file and (by SQLite's rule) its `-wal` and `-shm` files are created with mode 0600, for they hold
what users wrote. The mode of a file that exists is left as it is.
"""

from __future__ import annotations

import contextlib
import os
import sqlite3
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import attrs

from supervisor.errors import StoreCorruptError, StoreError, StoreLockedError

__all__ = [
    "APPLICATION_ID",
    "MIGRATIONS",
    "SCHEMA_VERSION",
    "SEGMENT_BYTES",
    "STREAM_BYTES",
    "FileLock",
    "check",
    "connect",
    "create_file",
    "prepare",
    "translate",
]

APPLICATION_ID = 0x53747376  # "Stsv"
SCHEMA_VERSION = 2

_SCHEMA = """
CREATE TABLE streams (
    n INTEGER PRIMARY KEY,
    id TEXT NOT NULL UNIQUE,
    key TEXT,
    tenant TEXT,
    created_at REAL NOT NULL,
    state TEXT,                          -- of the outcome, NULL while there is none
    ended_at REAL,
    nbytes INTEGER,                      -- what it takes in this file, once ended
    epoch INTEGER NOT NULL,              -- the last one, once ended (until then the segments know it)
    first_seq INTEGER NOT NULL DEFAULT 1,
    last_seq INTEGER,                    -- once ended (until then the segments know it)
    outcome BLOB,
    head BLOB NOT NULL
);
CREATE INDEX streams_by_key ON streams (key, id) WHERE key IS NOT NULL;
CREATE INDEX streams_by_state ON streams (state, id);
CREATE INDEX streams_by_end ON streams (ended_at, id, nbytes) WHERE ended_at IS NOT NULL;
CREATE INDEX streams_by_tenant ON streams (tenant, ended_at, id, nbytes) WHERE ended_at IS NOT NULL;
CREATE TABLE segments (
    n INTEGER PRIMARY KEY,
    stream INTEGER NOT NULL,             -- streams.n
    first_seq INTEGER NOT NULL,
    last_seq INTEGER NOT NULL,
    epoch INTEGER NOT NULL,
    crc INTEGER NOT NULL,
    body BLOB NOT NULL
);
CREATE UNIQUE INDEX segments_by_position ON segments (stream, last_seq);
CREATE TABLE removed (stream INTEGER PRIMARY KEY);
CREATE TABLE store (commits INTEGER NOT NULL);
INSERT INTO store VALUES (0);
"""

STREAM_BYTES = 400
SEGMENT_BYTES = 48
"""What a stream, and each of its segments, is taken to need in the file beside head, outcome and bodies: rows and indexes."""


def _to_2(connection: sqlite3.Connection) -> None:
    """Add what retention needs: tenants, sizes, and a place for what it removes. What was stored before has no tenant."""
    connection.execute("ALTER TABLE streams ADD COLUMN tenant TEXT")
    connection.execute("ALTER TABLE streams ADD COLUMN nbytes INTEGER")
    connection.execute(
        "UPDATE streams SET nbytes = ? + length(head) + length(outcome) + COALESCE("
        "(SELECT sum(length(body) + ?) FROM segments WHERE stream = streams.n), 0) WHERE ended_at IS NOT NULL",
        (STREAM_BYTES, SEGMENT_BYTES),
    )
    connection.execute("DROP INDEX streams_by_end")
    for statement in _SCHEMA.strip().split(";"):
        if any(f" {name} " in statement for name in ("streams_by_end", "streams_by_tenant", "TABLE removed")):
            connection.execute(statement)


MIGRATIONS: Mapping[int, Callable[[sqlite3.Connection], None]] = {1: _to_2}
"""For each older version, what makes it the next one. Runs inside a transaction; must not commit."""

_CORRUPT = frozenset({sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB})
_LOCKED = frozenset({sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED})


@attrs.define(eq=False)
class FileLock:
    """An exclusive lock on a store, held by an open file beside it; it goes with the process, however that ends."""

    path: Path
    """The database's path, links resolved, so that two names of one file are one lock."""
    _fd: int | None = attrs.field(default=None, init=False)

    @property
    def lock_path(self) -> Path:
        """The lock file's path. It stays when the lock is released: removing it would race with the next holder."""
        return self.path.with_name(self.path.name + ".lock")

    def acquire(self) -> None:
        """Take the lock. Raises StoreLockedError at once if it is held, StoreError if there can be no lock file."""
        if sys.platform == "win32":
            raise StoreError("SQLiteStore needs flock, which this platform does not have; use MemoryStore")
        import fcntl  # noqa: PLC0415  # not there on Windows, where this module must still import

        try:
            fd = os.open(self.lock_path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as exc:
            raise _unusable(self.path, exc) from exc
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as exc:
            holder = os.read(fd, 32).decode("ascii", "replace").strip()
            os.close(fd)
            if not isinstance(exc, BlockingIOError):
                raise StoreError(f"{self.lock_path} cannot be locked: {exc.strerror}") from exc
            who = f"process {holder}" if holder else "another process"
            raise StoreLockedError(
                f"{self.path} is in use by {who}, which holds {self.lock_path}; stop it, or use another path"
            ) from exc
        self._fd = fd
        os.ftruncate(fd, 0)
        os.pwrite(fd, f"{os.getpid()}\n".encode(), 0)

    def release(self) -> None:
        """Let go of the lock, if it is held."""
        if self._fd is not None:
            os.close(self._fd)
            self._fd = None


def create_file(path: Path) -> None:
    """Create an empty file of mode 0600 if there is none, and see that it can be written. Raises StoreError."""
    try:
        os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600))
    except OSError as exc:
        raise _unusable(path, exc) from exc


def connect(
    path: Path, *, busy_timeout_s: float, synchronous: str, reader: bool = False
) -> sqlite3.Connection:
    """Open a connection, to be used by one thread at a time. Transactions are ours to begin and end."""
    connection = sqlite3.connect(path, timeout=busy_timeout_s, isolation_level=None, check_same_thread=False)
    try:
        connection.execute(f"PRAGMA synchronous = {synchronous}")
        connection.execute("PRAGMA temp_store = MEMORY")
        connection.execute("PRAGMA journal_size_limit = 16777216")
        if reader:
            connection.execute("PRAGMA query_only = ON")
    except BaseException:
        connection.close()
        raise
    return connection


def prepare(
    connection: sqlite3.Connection,
    path: Path,
    *,
    version: int | None = None,
    migrations: Mapping[int, Callable[[sqlite3.Connection], None]] | None = None,
) -> None:
    """Make sure that the database is ours, in WAL mode and of our version: create, migrate, or refuse with a reason.

    `version` and `migrations` are this module's own unless a test says otherwise.
    """
    version = SCHEMA_VERSION if version is None else version
    migrations = MIGRATIONS if migrations is None else migrations
    application = _pragma(connection, "application_id")
    found = _pragma(connection, "user_version")
    tables = connection.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]
    fresh = not (application or found or tables)
    if not fresh and application != APPLICATION_ID:
        raise StoreCorruptError(
            f"{path} is an SQLite database of another program (application_id {application:#x}); it was left as it is; "
            f"use another path"
        )
    if found > version:
        raise StoreError(
            f"{path} was written by a newer version (schema {found}, this one knows {version}); it was left as it is; "
            f"upgrade, or use another path"
        )
    if fresh:
        connection.execute("PRAGMA auto_vacuum = INCREMENTAL")  # only possible before there is a table
    mode = connection.execute("PRAGMA journal_mode = WAL").fetchone()[0]
    if mode != "wal":
        raise StoreError(
            f"{path}: this file system cannot hold a write-ahead log (journal mode is {mode}); use a local one"
        )
    if fresh:
        with _transaction(connection):
            for statement in _SCHEMA.strip().split(";"):
                connection.execute(statement)
            connection.execute(f"PRAGMA application_id = {APPLICATION_ID}")
            connection.execute(f"PRAGMA user_version = {version}")
        return
    for older in range(found, version):
        step = migrations.get(older)
        if step is None:
            raise StoreError(
                f"{path} has schema {older}, from which there is no way to {version}; it was left as it is"
            )
        with _transaction(connection):
            step(connection)
            connection.execute(f"PRAGMA user_version = {older + 1}")


def check(connection: sqlite3.Connection, path: Path) -> None:
    """Make sure that the database is ours and of this version, without changing it. Raises StoreError."""
    if _pragma(connection, "application_id") != APPLICATION_ID:
        raise StoreCorruptError(f"{path} is not a store of this program")
    found = _pragma(connection, "user_version")
    if found != SCHEMA_VERSION:
        raise StoreError(
            f"{path} was written by another version (schema {found}, this one knows {SCHEMA_VERSION}) and nothing was changed; "
            f"an older one is brought up to date when a daemon opens it"
        )


def translate(exc: sqlite3.Error, path: Path) -> StoreError:
    """Say what an SQLite error means for the store at `path`."""
    code = (getattr(exc, "sqlite_errorcode", None) or 0) & 0xFF
    if code in _CORRUPT:
        return StoreCorruptError(
            f"{path} is damaged or is not an SQLite database ({exc}); it was left as it is; move it away to start "
            f"afresh, or restore it from a copy (`sqlite3 FILE .recover` can save what is readable)"
        )
    if code in _LOCKED:
        return StoreLockedError(f"{path} is locked by another program ({exc}); close what has it open")
    return StoreError(f"{path}: {exc}")


@contextlib.contextmanager
def _transaction(connection: sqlite3.Connection) -> Iterator[None]:
    connection.execute("BEGIN IMMEDIATE")
    try:
        yield
        connection.execute("COMMIT")
    except BaseException:
        with contextlib.suppress(sqlite3.Error):
            connection.execute("ROLLBACK")
        raise


def _pragma(connection: sqlite3.Connection, name: str) -> int:
    value: int = connection.execute(f"PRAGMA {name}").fetchone()[0]
    return value


def _unusable(path: Path, exc: OSError) -> StoreError:
    if isinstance(exc, FileNotFoundError):
        return StoreError(
            f"{path}: the directory {path.parent} does not exist; create it, or use another path"
        )
    return StoreError(f"{path} cannot be opened for writing: {exc.strerror}; nothing was changed")
