"""A store in one SQLite file.

Writing is a queue and one writer task. `create`, `append` and `end` put a record in the queue and return. The writer
gathers records for `commit_interval_s`, or until there are `commit_bytes`, or until somebody waits for one (an outcome
was enqueued, `wait_durable` was called), and commits them all in one transaction, in a thread. What arrives meanwhile
is the next commit, so that batches grow with the load by themselves. A thread is taken from trio's cache for each commit:
measured, that costs 60 µs against 45 for a thread of our own with a queue, at most fifty times a second, and needs no
protocol of start and stop. One thread at a time uses the writing connection and one the reading one, each behind
its own limiter, so neither waits for the other nor for other users of trio's threads.

What durable means depends on `synchronous`. After a crash of the process, however violent, every setting keeps all that
was reported durable. After a crash of the machine, `FULL` and `EXTRA` do; `NORMAL` may lose the last commits, in whole
and from the end, and stays consistent; `OFF` may damage the file. See https://www.sqlite.org/pragma.html#pragma_synchronous.

When a commit fails (disk full, I/O error, another program's lock) nothing is dropped: the batch is tried again, with
backoff, until it succeeds, and the queue grows to `high_water_bytes`, where `congested` holds the sources back. Only who
waits is told, once nothing could be written for `patience_s`. A record that the database will not take whatever the
disk does (such as an id of an earlier run) is the fault of one stream: that stream is given up and the others go on.
"""

from __future__ import annotations

import builtins
import logging
import os
import sqlite3
import time
from collections import deque
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Literal, TypeVar, get_args

import attrs
import trio

from supervisor.errors import ConfigurationError, StoreError
from supervisor.stores import schema
from supervisor.stores.base import EVENT_OVERHEAD_BYTES, Event, StoredStream, StoreStatistics
from supervisor.stores.database import Database, RejectedError, Write
from supervisor.stores.positions import Position, Positions
from supervisor.stores.retention import PruneReport, Retention

__all__ = ["SQLiteStore", "Synchronous"]

Synchronous = Literal["OFF", "NORMAL", "FULL", "EXTRA"]
"""SQLite's `PRAGMA synchronous`: what a commit waits for."""

HEAD_OVERHEAD_BYTES = 500
"""What a queued head is accounted as, beside its bytes."""
BATCH_BYTES = 4 << 20
"""What one transaction takes at most, however much is queued (or `commit_bytes`, if that is more)."""
BACKOFF_INITIAL_S = 0.05
BACKOFF_MAX_S = 2.0
CLOSE_S = 30.0

_WOKEN_TOGETHER = 64
"""Streams whose waiters are woken by a commit between two checkpoints: a commit may bring thousands of outcomes."""
_log = logging.getLogger("supervisor.stores")
_T = TypeVar("_T")


@attrs.define
class _Batch:
    """What one transaction is to write."""

    writes: Sequence[Write]
    since: float
    """Monotonic: when the first of it, or something before it, was enqueued."""


class SQLiteStore:
    """Keep journals in the SQLite file at `path`, which is created (mode 0600) if it does not exist.

    `synchronous` is what a commit waits for, see the module. `commit_interval_s` and `commit_bytes` bound how long and
    how much is gathered before a commit. Past `high_water_bytes` queued the store is `congested` until it is below
    `low_water_bytes` (default: half). `patience_s` is real time, for it is about the disk: how long nothing may be
    written before `wait_durable` raises, and before `aclose` gives up. `busy_timeout_s` is how long one attempt waits
    for another program's lock on the file.

    One process at a time: the store holds an flock on `path` + `.lock`. Reads see what is durable.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        synchronous: Synchronous = "NORMAL",
        commit_interval_s: float = 0.02,
        commit_bytes: int = 256 << 10,
        high_water_bytes: int = 64 << 20,
        low_water_bytes: int | None = None,
        patience_s: float = 30.0,
        busy_timeout_s: float = 5.0,
    ) -> None:
        low_water_bytes = high_water_bytes // 2 if low_water_bytes is None else low_water_bytes
        if os.fspath(path) in ("", ":memory:"):
            raise ConfigurationError(
                "path", path, "the path of a file; for a store in memory use MemoryStore"
            )
        if synchronous not in get_args(Synchronous):
            raise ConfigurationError("synchronous", synchronous, f"one of {', '.join(get_args(Synchronous))}")
        if not 0 <= commit_interval_s < float("inf"):
            raise ConfigurationError("commit_interval_s", commit_interval_s, "seconds, 0 or more")
        for field, value in (("commit_bytes", commit_bytes), ("high_water_bytes", high_water_bytes)):
            if value < 1:
                raise ConfigurationError(field, value, "at least 1")
        if not 0 < low_water_bytes <= high_water_bytes:
            raise ConfigurationError(
                "low_water_bytes", low_water_bytes, "above 0 and at most high_water_bytes"
            )
        if not patience_s > 0:
            raise ConfigurationError("patience_s", patience_s, "seconds, above 0")
        if not busy_timeout_s >= 0:
            raise ConfigurationError("busy_timeout_s", busy_timeout_s, "seconds, 0 or more")
        self.path = Path(path)
        self._commit_interval_s = commit_interval_s
        self._commit_bytes = commit_bytes
        self._high_water_bytes = high_water_bytes
        self._low_water_bytes = low_water_bytes
        self._patience_s = patience_s
        self._database = Database(self.path, synchronous, busy_timeout_s)
        self._write_limiter = trio.CapacityLimiter(1)
        self._read_limiter = trio.CapacityLimiter(1)

        self._state: Literal["new", "open", "closed"] = "new"
        self._closing = False
        self._closed = trio.Event()
        self._positions = Positions()
        self._queue: deque[Write] = deque()
        self._batches: deque[_Batch] = (
            deque()
        )  # taken from the queue and not yet committed; the first is next
        self._queued_since = 0.0  # monotonic: when the first of `_queue`, or something before it, came
        self._queued_bytes = 0  # in `_queue`
        self._pending_bytes = 0  # in `_queue` and `_batches`
        self._pending_records = 0
        self._congested = False
        self._flowing = trio.Event()
        self._nonempty = trio.Event()
        self._due = trio.Event()  # the next commit need not wait for its interval

        self._committed_records = 0
        self._commits = 0
        self._failed_commits = 0
        self._failures_in_a_row = 0
        self._last_commit_s = 0.0
        self._last_error: str | None = None
        self._failing_since: float | None = None
        self._pruning = trio.Lock()
        self._progress_at = 0.0  # monotonic: when the queue was last empty or made shorter
        self._lost: str | None = None

    def __repr__(self) -> str:
        state = "failing" if self._last_error is not None else self._state
        return f"<SQLiteStore {str(self.path)!r}: {state}, {self._pending_records} records to write>"

    # --- life --------------------------------------------------------------------------------------------------------

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Open the file, report started, and write until `aclose` was called and the queue is empty.

        Raises StoreLockedError if another process has the file, StoreCorruptError if it is damaged or not ours, and
        StoreError if it cannot be opened. A cancel ends it after the commit in flight and loses what is queued.
        """
        if self._state != "new":
            raise StoreError("a store runs once; make a new one")
        self._state = "open"
        try:
            unfinished = await trio.to_thread.run_sync(self._database.open, limiter=self._write_limiter)
            for position in unfinished:
                if self._positions.get(position.stream_id) is None:
                    self._positions.adopt(position)
            task_status.started()
            await self._write_until_closed()
        finally:
            if self._pending_records and self._lost is None:
                self._lost = f"{self._pending_records} records were not written to {self.path}"
            self._state = "closed"
            self._flowing.set()
            for position in self._positions:
                position.wake()
            with trio.move_on_after(CLOSE_S, shield=True):
                await trio.to_thread.run_sync(self._database.close_reader, limiter=self._read_limiter)
                await trio.to_thread.run_sync(self._database.close_writer, limiter=self._write_limiter)
            self._closed.set()

    async def aclose(self) -> None:
        """Commit what is queued, make `run` return, and wait until it has. Idempotent.

        Raises StoreError if records were lost: nothing could be written for `patience_s`, or `run` was cancelled or has
        failed before. A cancel leaves the closing to go on in `run`.
        """
        self._closing = True
        self._nonempty.set()
        self._due.set()
        if self._state == "new":
            self._state = "closed"
            self._closed.set()
            if self._pending_records:
                self._lost = f"{self._pending_records} records were not written: {self.path} was never opened"
        await self._closed.wait()
        if self._lost is not None:
            raise StoreError(self._lost)

    # --- writing -----------------------------------------------------------------------------------------------------

    def create(self, stream: StoredStream) -> None:
        """Enqueue a new stream's head. Raises StoreError if the stream is being written already."""
        self._check_open()
        position = self._positions.create(stream.id)
        self._enqueue(Write(position, len(stream.head) + HEAD_OVERHEAD_BYTES, stream=stream))

    def append(self, stream_id: str, events: Sequence[Event]) -> None:
        """Enqueue events. Raises StoreError, and takes none, if they do not follow on what was enqueued."""
        if not events:
            return
        self._check_open()
        position = self._positions.append(stream_id, events)
        nbytes = sum([len(e.payload) + len(e.name) + len(e.text) for e in events])
        self._enqueue(Write(position, nbytes + len(events) * EVENT_OVERHEAD_BYTES, events=tuple(events)))

    def end(self, stream_id: str, event: Event, *, state: str, ended_at: float) -> None:
        """Enqueue the outcome, to be committed at once. Raises StoreError if the stream has one or is unknown."""
        self._check_open()
        position = self._positions.end(stream_id, event)
        self._enqueue(Write(position, event.nbytes, events=(event,), end=(state, ended_at)))
        self._due.set()

    def durable_seq(self, stream_id: str) -> int:
        """Return the last seq known to be durable of a stream being written; 0 if none, or if it is unknown."""
        position = self._positions.get(stream_id)
        return 0 if position is None else max(position.durable, 0)

    async def wait_durable(self, stream_id: str, seq: int) -> None:
        """Wait until `seq` (0: the head) is durable, and have it committed at once if it is queued.

        Raises StoreError if it cannot be: nothing could be written for `patience_s` (the records stay queued, and a later
        call may succeed), the database refuses the stream, the stream has ended before `seq`, or the store has
        stopped. A cancel leaves nothing behind.
        """
        await trio.lowlevel.checkpoint()
        position = self._positions.get(stream_id)
        if position is None:
            stored = await self.get(stream_id=stream_id)
            if stored is None or stored.last_seq < seq:
                raise StoreError(
                    f"stream {stream_id}: seq {seq} is not in the store, nor is it being written"
                )
            return
        while position.durable < seq:
            if position.error is not None:
                raise StoreError(str(position.error)) from position.error
            if position.ended and position.last_seq < seq:
                raise StoreError(
                    f"stream {stream_id}: ended with seq {position.last_seq}; there will be no {seq}"
                )
            if self._state == "closed":
                raise StoreError(f"stream {stream_id}: the store has stopped before seq {seq} was written")
            left_s = self._patience_left_s()
            if left_s <= 0:
                raise StoreError(
                    f"stream {stream_id}: seq {seq} is not durable: nothing could be written to {self.path} for "
                    f"{self._patience_s:g} s ({self._last_error or 'the disk does not answer'}); it stays queued and "
                    f"is written when that is mended"
                )
            if position.last_seq >= seq:
                self._due.set()
            with trio.move_on_after(left_s):
                await position.wait_changed()

    def refusal(self, stream_id: str) -> StoreError | None:
        """Return why the records of a stream being written never will be; None while that is not known."""
        return self._positions.refusal(stream_id)

    def forget(self, stream_id: str) -> None:
        """Drop the position of an ended stream, as soon as its outcome is durable."""
        self._positions.forget(stream_id)

    @property
    def congested(self) -> bool:
        """Whether more than the high-water mark is queued, or was and it is not yet below the low-water mark."""
        return self._congested

    @property
    def failing(self) -> str | None:
        """What the last commit failed with, or that none has come back for `patience_s`; None while the store is well."""
        if self._last_error is None and self._patience_left_s() <= 0:
            return (
                f"{self.path}: nothing could be written for {self._patience_s:g} s: the disk does not answer"
            )
        return self._last_error

    async def wait_flow(self) -> None:
        """Wait until the store is not congested: at once if it is not, and when it has stopped."""
        await trio.lowlevel.checkpoint()
        while self._congested and self._state != "closed":
            await self._flowing.wait()

    # --- reading -----------------------------------------------------------------------------------------------------

    async def read(
        self, stream_id: str, *, after_seq: int, limit: int, max_bytes: int = 1 << 20
    ) -> Sequence[Event]:
        """Return up to `limit` events after `after_seq`, up to `max_bytes` accounted, at least one if there is one.

        Raises StoreCorruptError, naming the stream and the seqs, where they are damaged or missing: after everything
        before them has been read. A cancel waits for the read in flight.
        """
        return await self._reading(lambda: self._database.read(stream_id, after_seq, limit, max_bytes))

    async def get(self, *, stream_id: str | None = None, key: str | None = None) -> StoredStream | None:
        """Return a stored stream by id, or the one with the highest id of this key; None if there is none."""
        if (stream_id is None) == (key is None):
            raise ConfigurationError("stream_id, key", (stream_id, key), "exactly one of the two")
        return await self._reading(lambda: self._database.get(stream_id, key))

    async def unfinished(self) -> Sequence[StoredStream]:
        """Return the streams without a durable outcome, lowest id first."""
        return await self._reading(self._database.unfinished)

    async def list(
        self, *, before_id: str | None = None, states: Sequence[str] | None = None, limit: int = 100
    ) -> Sequence[StoredStream]:
        """Return up to `limit` ended streams with ids below `before_id`, highest id first."""
        return await self._reading(lambda: self._database.list(before_id, states, max(limit, 0)))

    async def prune(
        self, retention: Retention, *, now: float | None = None, limit: int = 1000, dry_run: bool = False
    ) -> PruneReport:
        """Remove up to `limit` ended streams that are more than `retention` keeps, or with `dry_run` only tell.

        In small transactions that take turns with commits, and stand back while the store is behind; then the file is
        shrunk to a tenth of free pages, likewise. Sizes are those in the file. A cancel, or StoreError, leaves each stream whole or
        gone, and what is left to be cleared away to the next prune.
        """
        now = time.time() if now is None else now
        async with self._pruning:
            chosen, complete = await self._reading(lambda: self._database.plan(retention, now, limit))
            report = PruneReport.of(chosen, complete=complete)
            if dry_run:
                return report
            left = [int(ended.ref) for ended, _ in chosen]
            while left:
                del left[: await self._in_turn(lambda: self._database.remove(left))]
            while (garbage := await self._reading(self._database.garbage)).streams or garbage.segments:
                while await self._in_turn(partial(self._database.collect, garbage)):
                    pass
            while await self._in_turn(self._database.shrink):
                pass
        return report

    async def _in_turn(self, job: Callable[[], _T]) -> _T:
        """Write something that is less urgent than records: not while those that come wait for room."""
        if self._congested and self._last_error is None:  # else this may be what makes the room
            await self.wait_flow()
        return await self._writing(job)

    def statistics(self) -> StoreStatistics:
        """Return the store's figures."""
        return StoreStatistics(
            pending_records=self._pending_records,
            pending_bytes=self._pending_bytes,
            committed_records=self._committed_records,
            commits=self._commits,
            failed_commits=self._failed_commits,
            last_commit_s=self._last_commit_s,
            last_error=self.failing,
            failing_since=self._failing_at(),
            lag_s=self._lag_s(),
            held_bytes=self._pending_bytes,
        )

    # --- the queue ---------------------------------------------------------------------------------------------------

    def _check_open(self) -> None:
        if self._state == "closed":
            raise StoreError(f"the store {self.path} is closed; nothing was written")

    def _enqueue(self, write: Write) -> None:
        if not self._queue:
            self._queued_since = time.monotonic()
            if not self._pending_records:
                self._progress_at = self._queued_since
                self._nonempty.set()
        self._queue.append(write)
        self._queued_bytes += write.nbytes
        self._pending_bytes += write.nbytes
        self._pending_records += _records(write)
        if self._queued_bytes >= self._commit_bytes:
            self._due.set()
        if self._pending_bytes > self._high_water_bytes and not self._congested:
            self._congested = True
            self._flowing = trio.Event()

    def _done(self, writes: Sequence[Write]) -> None:
        """Take writes off the books: they are committed, or never will be."""
        self._progress_at = time.monotonic()
        self._pending_bytes -= sum(write.nbytes for write in writes)
        self._pending_records -= sum(map(_records, writes))
        if self._congested and self._pending_bytes < self._low_water_bytes:
            self._congested = False
            self._flowing.set()

    def _patience_left_s(self) -> float:
        if not self._pending_records:
            return self._patience_s
        return self._progress_at + self._patience_s - time.monotonic()

    def _lag_s(self) -> float:
        since = self._batches[0].since if self._batches else self._queued_since if self._queue else None
        return 0.0 if since is None else time.monotonic() - since

    def _failing_at(self) -> float | None:
        if self._last_error is None and self.failing is not None:
            return time.time() - (time.monotonic() - self._progress_at)
        return self._failing_since

    # --- the writer --------------------------------------------------------------------------------------------------

    async def _write_until_closed(self) -> None:
        while True:
            if self._batches:
                await self._commit(self._batches[0].writes)
                if self._closing and self._last_error is not None and self._patience_left_s() <= 0:
                    self._lost = (
                        f"{self._pending_records} records were not written: nothing could be written to {self.path} "
                        f"for {self._patience_s:g} s ({self._last_error})"
                    )
                    return
            elif self._queue:
                if not self._closing:
                    with trio.move_on_after(self._commit_interval_s):
                        await self._due.wait()
                self._take()
            elif self._closing:
                return
            else:
                self._nonempty = trio.Event()
                await self._nonempty.wait()

    def _take(self) -> None:
        """Make the front of the queue the next batch."""
        batch: builtins.list[Write] = []
        room = max(BATCH_BYTES, self._commit_bytes)
        while self._queue and room > 0:
            write = self._queue.popleft()
            self._queued_bytes -= write.nbytes
            room -= write.nbytes
            batch.append(write)
        self._batches.append(_Batch(batch, self._queued_since))
        if not self._queue:  # else the rest is overdue already
            self._due = trio.Event()

    async def _commit(self, batch: Sequence[Write]) -> None:
        """Commit the first batch, or learn what is wrong with it, or wait a while."""
        began = time.perf_counter()
        try:
            await trio.to_thread.run_sync(self._database.commit, batch, limiter=self._write_limiter)
        except RejectedError as exc:
            self._reject(self._batches.popleft(), exc)
            return
        except Exception as exc:  # noqa: BLE001  # whatever it is, the records are kept and tried again
            self._failed_commits += 1
            self._failures_in_a_row += 1
            told = schema.translate(exc, self.path) if isinstance(exc, sqlite3.Error) else exc
            self._last_error = str(told)
            if self._failing_since is None:
                self._failing_since = time.time()
            await trio.sleep(
                min(BACKOFF_INITIAL_S * 2 ** min(self._failures_in_a_row - 1, 10), BACKOFF_MAX_S)
            )
            return
        self._batches.popleft()
        self._last_commit_s = time.perf_counter() - began
        self._last_error = self._failing_since = None
        self._failures_in_a_row = 0
        self._commits += 1
        self._committed_records += sum(map(_records, batch))
        self._done(batch)
        reached: dict[Position, int] = {}
        for write in batch:
            reached[write.position] = write.events[-1].seq if write.events else 0
        woken = 0
        for position, seq in reached.items():
            woken += position.changed is not None
            self._positions.settle(position, seq)
            if woken >= _WOKEN_TOGETHER:
                woken = 0
                await trio.lowlevel.cancel_shielded_checkpoint()

    def _reject(self, batch: _Batch, exc: RejectedError) -> None:
        """Find the stream whose records cannot be written: commit stream by stream, and give up the one left alone."""
        of_stream: dict[Position, builtins.list[Write]] = {}
        for write in batch.writes:
            of_stream.setdefault(write.position, []).append(write)
        if len(of_stream) > 1:
            self._batches.extendleft(_Batch(writes, batch.since) for writes in reversed(of_stream.values()))
            return
        (position,) = of_stream
        self._positions.fail(
            position,
            StoreError(
                f"stream {position.stream_id}: the store refuses its records: {exc}; they were discarded"
            ),
        )
        later = [write for write in self._queue if write.position is position]
        self._queue = deque(write for write in self._queue if write.position is not position)
        self._queued_bytes -= sum(write.nbytes for write in later)
        self._done([*batch.writes, *later])

    # --- threads -----------------------------------------------------------------------------------------------------

    async def _reading(self, job: Callable[[], _T]) -> _T:
        if self._state != "open":
            raise StoreError(f"the store {self.path} is not open; nothing can be read from it")
        return await trio.to_thread.run_sync(job, limiter=self._read_limiter)

    async def _writing(self, job: Callable[[], _T]) -> _T:
        if self._state != "open":
            raise StoreError(f"the store {self.path} is not open; nothing can be removed from it")
        return await trio.to_thread.run_sync(job, limiter=self._write_limiter)


def _records(write: Write) -> int:
    return len(write.events) or 1
