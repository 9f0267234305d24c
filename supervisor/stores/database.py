"""What is done to the database file, in plain synchronous code: `supervisor.stores.sqlite` runs it in threads.

Two connections: one writes, one reads, and each is used by one thread at a time. A commit is a transaction that also
advances the counter in the table `store`. SQLite may report an error for a COMMIT that did happen, so after a failure the
counter tells whether it did, and a commit is never done twice.
"""

from __future__ import annotations

import contextlib
import logging
import sqlite3
from collections.abc import Iterator, Sequence
from heapq import merge
from pathlib import Path
from typing import Any

import attrs

from supervisor.errors import StoreCorruptError, StoreError
from supervisor.stores import pruning, schema
from supervisor.stores.base import EVENT_OVERHEAD_BYTES, Event, StoredStream
from supervisor.stores.positions import Position
from supervisor.stores.pruning import Garbage
from supervisor.stores.retention import EndedStream, Retention
from supervisor.stores.segments import checksum, cut, decode, encode

__all__ = ["Database", "RejectedError", "Write"]

_log = logging.getLogger("supervisor.stores")

_NEXT_NUMBER = """
    SELECT 1 + max((SELECT COALESCE(max(n), 0) FROM streams), (SELECT COALESCE(max(stream), 0) FROM removed))
"""
_STREAM = """
    SELECT s.id, s.key, s.created_at, s.head, s.state, s.ended_at, s.outcome,
        CASE WHEN s.last_seq IS NOT NULL THEN s.epoch ELSE COALESCE(
            (SELECT g.epoch FROM segments g WHERE g.stream = s.n ORDER BY g.last_seq DESC LIMIT 1), s.epoch) END,
        s.first_seq,
        s.tenant,
        COALESCE(s.last_seq, (SELECT max(g.last_seq) FROM segments g WHERE g.stream = s.n), s.first_seq - 1),
        s.n
    FROM streams s
"""


class RejectedError(Exception):
    """A batch that can never be written, because of what is in it."""


@attrs.define(eq=False)
class Write:
    """One enqueued call of `create`, `append` or `end`."""

    position: Position
    nbytes: int
    events: Sequence[Event] = ()
    stream: StoredStream | None = None
    """The head, for `create`."""
    end: tuple[str, float] | None = None
    """`(state, ended_at)`, for `end`."""


@attrs.define(eq=False)
class Database:
    """An open store file."""

    path: Path
    synchronous: str
    busy_timeout_s: float
    writer: sqlite3.Connection | None = attrs.field(default=None, init=False)
    reader: sqlite3.Connection | None = attrs.field(default=None, init=False)
    _lock: schema.FileLock | None = attrs.field(default=None, init=False)
    _commits: int = attrs.field(default=0, init=False)
    _next_number: int = attrs.field(default=1, init=False)
    _unsure: bool = attrs.field(default=False, init=False)
    _written: dict[Position, int] = attrs.field(factory=dict, init=False)
    """What the batch in hand adds to each of its streams, in bytes."""

    def open(self) -> Sequence[Position]:
        """Lock and open the file, creating or migrating it; return where the streams without an outcome stand.

        Raises StoreLockedError, StoreCorruptError or StoreError, and then holds nothing.
        """
        path = self.path.resolve()
        self._lock = schema.FileLock(path)
        try:
            self._lock.acquire()
            schema.create_file(path)
            with self._translated():
                writer = self.writer = self._connect()
                schema.prepare(writer, path)
                if not pruning.can_shrink(writer):
                    _log.warning(
                        "%s was made without auto_vacuum: what retention removes makes room for what is written next, but "
                        "the file does not get smaller; to change that, stop what uses it and run: "
                        "sqlite3 %s 'PRAGMA auto_vacuum = INCREMENTAL; VACUUM'",
                        path,
                        path,
                    )
                self.reader = self._connect(reader=True)
                self._commits = self._counter(writer)
                self._next_number = writer.execute(_NEXT_NUMBER).fetchone()[0]
                rows = writer.execute(f"{_STREAM} WHERE s.state IS NULL ORDER BY s.id").fetchall()
                return [self._position(writer, _stored(row), row[-1]) for row in rows]
        except BaseException:
            self.close_reader()
            self.close_writer()
            raise

    def open_to_read(self) -> None:
        """Open the file to read it, beside whoever has it, without its lock and without changing anything.

        Raises StoreError, also for a file that would have to be brought up to date first.
        """
        with self._translated():
            self.reader = self._connect(reader=True)
            schema.check(self.reader, self.path)

    @staticmethod
    def _position(writer: sqlite3.Connection, stream: StoredStream, number: int) -> Position:
        (nbytes,) = writer.execute(
            "SELECT COALESCE(sum(length(body) + ?), 0) FROM segments WHERE stream = ?",
            (schema.SEGMENT_BYTES, number),
        ).fetchone()
        nbytes += len(stream.head) + schema.STREAM_BYTES
        return Position(
            stream.id, number=number, last_seq=stream.last_seq, durable=stream.last_seq, nbytes=nbytes
        )

    def close_reader(self) -> None:
        """Close the reading connection."""
        if self.reader is not None:
            self.reader.close()
            self.reader = None

    def close_writer(self) -> None:
        """Close the writing connection (the last one: it moves the log into the file) and let go of the lock."""
        try:
            if self.writer is not None:
                self.writer.close()
                self.writer = None
        finally:
            if self._lock is not None:
                self._lock.release()
                self._lock = None

    # --- writing -----------------------------------------------------------------------------------------------------

    def commit(self, batch: Sequence[Write]) -> None:
        """Write a batch in one transaction.

        Raises RejectedError if it can never be written; any other exception means that it was not, this time, and that
        the same batch may be given again.
        """
        try:
            if self.writer is None:
                self.writer = self._connect()
            writer = self.writer
            if self._unsure and self._counter(writer) > self._commits:
                self._committed()  # the last attempt did happen, whatever it reported
                return
            writer.execute("BEGIN IMMEDIATE")
            self._write(writer, batch)
            writer.execute("UPDATE store SET commits = ?", (self._commits + 1,))
            self._unsure = True
            writer.execute("COMMIT")
        except Exception as exc:
            self._roll_back()
            if _is_rejection(exc):
                raise RejectedError(str(exc)) from exc
            raise
        self._committed()

    def _committed(self) -> None:
        self._commits += 1
        self._unsure = False
        for position, nbytes in self._written.items():
            position.nbytes += nbytes

    def _write(self, writer: sqlite3.Connection, batch: Sequence[Write]) -> None:
        written = self._written = {}
        events_of: dict[Position, list[Event]] = {}
        for write in batch:
            if write.stream is not None:
                self._insert(writer, write.position, write.stream)
                written[write.position] = len(write.stream.head) + schema.STREAM_BYTES
            events_of.setdefault(write.position, []).extend(write.events)
        rows = []
        for position, events in events_of.items():
            number = position.number
            assert number is not None
            nbytes = written.get(position, 0)
            for run in cut(events):
                where = (number, run[0].seq, run[-1].seq, run[0].epoch)
                body = encode(run)
                nbytes += len(body) + schema.SEGMENT_BYTES
                rows.append((*where, checksum(where, body), body))
            written[position] = nbytes
        writer.executemany(
            "INSERT INTO segments (stream, first_seq, last_seq, epoch, crc, body) VALUES (?, ?, ?, ?, ?, ?)",
            rows,
        )
        for write in batch:
            if write.end is not None:
                state, ended_at = write.end
                event, position = write.events[-1], write.position
                nbytes = position.nbytes + written[position] + len(event.payload)
                ended = writer.execute(
                    "UPDATE streams SET state = ?, ended_at = ?, outcome = ?, epoch = ?, last_seq = ?, nbytes = ?"
                    " WHERE n = ? AND state IS NULL",
                    (state, ended_at, event.payload, event.epoch, event.seq, nbytes, position.number),
                )
                if ended.rowcount != 1:
                    raise RejectedError("the store has an outcome of this stream already")

    def _insert(self, writer: sqlite3.Connection, position: Position, stream: StoredStream) -> None:
        if position.number is None:  # else an earlier attempt has given it one
            position.number = self._next_number
            self._next_number += 1
        writer.execute(
            "INSERT INTO streams (n, id, key, tenant, created_at, epoch, head) VALUES (?, ?, ?, ?, ?, ?, ?)",
            (
                position.number,
                stream.id,
                stream.key,
                stream.tenant,
                stream.created_at,
                stream.epoch,
                stream.head,
            ),
        )

    def _roll_back(self) -> None:
        """Undo a failed transaction; where even that fails, drop the connection, and the next commit makes a new one."""
        if self.writer is None:
            return
        try:
            if self.writer.in_transaction:
                self.writer.execute("ROLLBACK")
        except sqlite3.Error:
            with contextlib.suppress(sqlite3.Error):
                self.writer.close()
            self.writer = None

    # --- retention ---------------------------------------------------------------------------------------------------

    def plan(
        self, retention: Retention, now: float, limit: int
    ) -> tuple[list[tuple[EndedStream, str]], bool]:
        """Return up to `limit` streams that are to go, each with the rule, and whether those are all."""
        with self._reading() as reader:
            return pruning.plan(reader, retention, now, limit)

    def remove(self, numbers: Sequence[int]) -> int:
        """Remove streams in one small transaction, the first ones first; return how many."""
        with self._transaction() as writer:
            return pruning.remove(writer, numbers)

    def garbage(self) -> Garbage:
        """Return some of what removed streams have left in the file."""
        with self._reading() as reader:
            return pruning.garbage(reader)

    def collect(self, left: Garbage) -> bool:
        """Delete some garbage in one small transaction, and take it off `left`; return whether there is more of that."""
        with self._transaction() as writer:
            count = pruning.collect(writer, left)
        del left.segments[:count]
        return bool(left.segments)

    def shrink(self) -> bool:
        """Give some free pages back to the file system; return whether there are more to give."""
        with self._translated():
            return pruning.shrink(self._writer())

    # --- reading -----------------------------------------------------------------------------------------------------

    def read(self, stream_id: str, after_seq: int, limit: int, max_bytes: int) -> list[Event]:
        """Return events after `after_seq`. Raises StoreCorruptError naming the seqs that are damaged or missing."""
        found: list[Event] = []
        nbytes = 0
        with self._reading() as reader:
            stream = reader.execute(
                "SELECT n, first_seq, last_seq FROM streams WHERE id = ?", (stream_id,)
            ).fetchone()
            if stream is None or limit < 1:
                return found
            number, first_seq, last_seq = stream
            due = max(after_seq + 1, first_seq)
            rows = reader.execute(
                "SELECT first_seq, last_seq, epoch, crc, body FROM segments WHERE stream = ? AND last_seq >= ?"
                " ORDER BY last_seq",
                (number, due),
            )
            for first, last, epoch, crc, body in rows:
                if first > due:
                    if found:
                        return found
                    raise _missing(stream_id, due, first - 1)
                try:
                    events = decode((number, first, last, epoch), crc, body)
                except ValueError as exc:
                    if found:  # what is sound is given first; the next read, from here, reports the damage
                        return found
                    raise StoreCorruptError(
                        f"stream {stream_id}: the stored events {first} to {last} are damaged ({exc}); those before "
                        f"and after can still be read; restore {self.path} from a copy to have them back"
                    ) from exc
                if first < due:
                    del events[: due - first]
                for event in events:
                    nbytes += (
                        len(event.payload) + len(event.name) + EVENT_OVERHEAD_BYTES
                    )  # `nbytes`: it has no text
                    if len(found) == limit or (found and nbytes > max_bytes):
                        return found
                    found.append(event)
                due = last + 1
        if not found and last_seq is not None and due <= last_seq:
            raise _missing(stream_id, due, last_seq)
        return found

    def get(self, stream_id: str | None, key: str | None) -> StoredStream | None:
        """Return one stream, by its id or as the highest id of a key."""
        with self._reading() as reader:
            if stream_id is not None:
                row = reader.execute(f"{_STREAM} WHERE s.id = ?", (stream_id,)).fetchone()
            else:
                row = reader.execute(
                    f"{_STREAM} WHERE s.key IS NOT NULL AND s.key = ? ORDER BY s.id DESC LIMIT 1", (key,)
                ).fetchone()
        return None if row is None else _stored(row)

    def unfinished(self) -> list[StoredStream]:
        """Return the streams without an outcome, lowest id first."""
        with self._reading() as reader:
            return [_stored(r) for r in reader.execute(f"{_STREAM} WHERE s.state IS NULL ORDER BY s.id")]

    def list(self, before_id: str | None, states: Sequence[str] | None, limit: int) -> Sequence[StoredStream]:
        """Return ended streams, highest id first: one walk down an index, or one per state, merged."""
        below, bounds = ("", ()) if before_id is None else (" AND s.id < ?", (before_id,))
        order = " ORDER BY s.id DESC LIMIT ?"
        with self._reading() as reader:
            if states is None:
                rows = reader.execute(f"{_STREAM} WHERE s.state IS NOT NULL{below}{order}", (*bounds, limit))
                return [_stored(row) for row in rows]
            walks = (
                reader.execute(
                    f"{_STREAM} WHERE s.state = ?{below}{order}", (state, *bounds, limit)
                ).fetchall()
                for state in sorted(set(states))
            )
            merged = merge(*walks, key=lambda row: str(row[0]), reverse=True)
            return [_stored(row) for row, _ in zip(merged, range(limit), strict=False)]

    # --- connections -------------------------------------------------------------------------------------------------

    def _connect(self, *, reader: bool = False) -> sqlite3.Connection:
        return schema.connect(
            self.path.resolve(),
            busy_timeout_s=self.busy_timeout_s,
            synchronous=self.synchronous,
            reader=reader,
        )

    def _writer(self) -> sqlite3.Connection:
        if self.writer is None:
            self.writer = self._connect()
        return self.writer

    @contextlib.contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        with self._translated():
            try:
                writer = self._writer()
                writer.execute("BEGIN IMMEDIATE")
                yield writer
                writer.execute("COMMIT")
            except BaseException:
                self._roll_back()
                raise

    @contextlib.contextmanager
    def _reading(self) -> Iterator[sqlite3.Connection]:
        """Read from one state of the database."""
        reader = self.reader
        if reader is None:
            raise StoreError(f"{self.path} is closed; nothing can be read from it")
        with self._translated():
            reader.execute("BEGIN")
            try:
                yield reader
            finally:
                reader.execute("ROLLBACK")

    @contextlib.contextmanager
    def _translated(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.Error as exc:
            raise schema.translate(exc, self.path) from exc

    @staticmethod
    def _counter(connection: sqlite3.Connection) -> int:
        commits: int = connection.execute("SELECT commits FROM store").fetchone()[0]
        return commits


def _stored(row: Sequence[Any]) -> StoredStream:  # Any: columns of a row
    return StoredStream(
        id=row[0],
        key=row[1],
        created_at=row[2],
        head=row[3],
        state=row[4],
        ended_at=row[5],
        outcome=row[6],
        epoch=row[7],
        first_seq=row[8],
        tenant=row[9],
        last_seq=row[10],
    )


def _missing(stream_id: str, first_seq: int, last_seq: int) -> StoreCorruptError:
    return StoreCorruptError(
        f"stream {stream_id}: the stored events {first_seq} to {last_seq} are missing, and no retention removed them; "
        f"restore the file from a copy to have them back"
    )


def _is_rejection(exc: Exception) -> bool:
    """Whether what failed is the data given, which no retry can mend, rather than the disk or the file."""
    if isinstance(exc, sqlite3.Error):
        return isinstance(
            exc,
            sqlite3.IntegrityError | sqlite3.DataError | sqlite3.InterfaceError | sqlite3.ProgrammingError,
        )
    return not isinstance(exc, MemoryError | OSError)
