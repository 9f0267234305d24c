"""A store in memory: for tests, for programs that need no history beyond their own life, and as the model of the rest.

Everything is durable the moment it is enqueued, in this store's sense of the word: **nothing survives the process**.
There are no threads and no timers, so it is deterministic under a mock clock and under a schedule explorer.

It is bounded by `max_streams` ended streams and `max_bytes` in all. Over a bound it gives up, in this order:

1. whole ended streams, the one that ended first going first (the one that ended last is kept, however large);
2. the older half of the events of one stream that has events, then of the next, in turn, until it fits. Halving in
   turn takes most from the largest, keeps the newest of each, and costs nothing in proportion to the number of streams.

A live stream's head and the outcome of a kept stream are never given up. `first_seq` tells what was, and a read begins
there, so that a reader sees the gap.
"""

from __future__ import annotations

import builtins
import time
from collections.abc import Sequence
from heapq import nlargest
from itertools import islice

import attrs
import trio

from supervisor.errors import ConfigurationError, StoreError
from supervisor.stores.base import EVENT_OVERHEAD_BYTES, Event, StoredStream, StoreStatistics
from supervisor.stores.positions import Positions
from supervisor.stores.retention import EndedStream, PruneReport, Retention, Totals, select

__all__ = ["MemoryStore"]

HEAD_OVERHEAD_BYTES = 500
"""What a kept stream is accounted as, beside its head, outcome and events."""


@attrs.define(eq=False)
class _Kept:
    stream: StoredStream
    events: list[Event] = attrs.field(factory=list)
    first_seq: int = 1
    nbytes: int = 0

    @property
    def last_seq(self) -> int:
        return self.first_seq + len(self.events) - 1

    def describe(self) -> StoredStream:
        epoch = self.events[-1].epoch if self.events else self.stream.epoch
        return attrs.evolve(self.stream, epoch=epoch, first_seq=self.first_seq, last_seq=self.last_seq)


class MemoryStore:
    """Keep journals in memory, within bounds; see the module for what goes first.

    `max_streams` bounds the ended streams kept, `max_bytes` the bytes accounted in all (see `Event.nbytes`). Reads give
    back the very `Event` objects that were appended.
    """

    def __init__(self, *, max_streams: int = 10_000, max_bytes: int = 256 << 20) -> None:
        if max_streams < 1:
            raise ConfigurationError("max_streams", max_streams, "at least 1")
        if max_bytes < 1:
            raise ConfigurationError("max_bytes", max_bytes, "at least 1")
        self._max_streams = max_streams
        self._max_bytes = max_bytes
        self._positions = Positions()
        self._kept: dict[str, _Kept] = {}
        self._ended: dict[str, _Kept] = {}  # in the order they ended
        self._by_key: dict[str, dict[str, None]] = {}  # key -> ids
        self._with_events: dict[str, _Kept] = {}  # whose turn it is to lose events: the first
        self._nbytes = 0
        self._records = 0
        self._commits = 0
        self._evicted = 0
        self._running = False
        self._closed = False
        self._closing = trio.Event()
        self._stopped = trio.Event()

    def __repr__(self) -> str:
        live = len(self._kept) - len(self._ended)
        return f"<MemoryStore: {live} live, {len(self._ended)} ended, {self._nbytes} bytes>"

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Report started and wait for `aclose`. A cancel ends it at once and loses nothing but the right to write."""
        if self._running or self._stopped.is_set():
            raise StoreError("a store runs once; make a new one")
        self._running = True
        try:
            task_status.started()
            await self._closing.wait()
        finally:
            self._running = False
            self._stop()
            for position in self._positions:
                position.wake()

    async def aclose(self) -> None:
        """Make `run` return and wait until it has. Idempotent. Reading still works afterwards."""
        self._closing.set()
        if self._running:
            await self._stopped.wait()
        else:
            self._stop()
            await trio.lowlevel.checkpoint()

    # --- writing -----------------------------------------------------------------------------------------------------

    def create(self, stream: StoredStream) -> None:
        """Keep a new stream's head. Raises StoreError if there is a stream of this id."""
        self._check_open()
        if stream.id in self._kept:
            raise StoreError(f"stream {stream.id}: created twice; the second changed nothing")
        position = self._positions.create(stream.id)
        kept = self._kept[stream.id] = _Kept(stream)
        kept.nbytes = len(stream.head) + HEAD_OVERHEAD_BYTES
        self._nbytes += kept.nbytes
        if stream.key is not None:
            self._by_key.setdefault(stream.key, {})[stream.id] = None
        self._committed(1)
        self._positions.settle(position, 0)
        self._fit()

    def append(self, stream_id: str, events: Sequence[Event]) -> None:
        """Keep events. Raises StoreError, and keeps none, if they do not follow on what there is."""
        if not events:
            return
        if self._closed:
            self._check_open()
        position = self._positions.append(stream_id, events)
        self._keep(stream_id, events)
        position.durable = position.last_seq
        if position.changed is not None:
            position.wake()
        if self._nbytes > self._max_bytes:
            self._fit()

    def end(self, stream_id: str, event: Event, *, state: str, ended_at: float) -> None:
        """Keep a stream's outcome. Raises StoreError, and changes nothing, if it has one."""
        self._check_open()
        position = self._positions.end(stream_id, event)
        kept = self._keep(stream_id, (event,))
        kept.stream = attrs.evolve(kept.stream, state=state, ended_at=ended_at, outcome=event.payload)
        self._ended[stream_id] = kept
        self._positions.settle(position, position.last_seq)
        self._fit()

    def durable_seq(self, stream_id: str) -> int:
        """Return the last seq appended to a stream that has not been forgotten; 0 if none."""
        position = self._positions.get(stream_id)
        return 0 if position is None else max(position.durable, 0)

    async def wait_durable(self, stream_id: str, seq: int) -> None:
        """Wait until `seq` has been appended: at once if it has.

        Raises StoreError if that cannot happen: there is no such stream, it has ended before `seq`, or the store has
        stopped. A cancel leaves nothing behind.
        """
        await trio.lowlevel.checkpoint()
        position = self._positions.get(stream_id)
        if position is None:
            kept = self._kept.get(stream_id)
            if kept is None or kept.last_seq < seq:
                raise StoreError(f"stream {stream_id}: seq {seq} is not in the store")
            return
        while position.durable < seq:
            if position.ended:
                raise StoreError(
                    f"stream {stream_id}: ended with seq {position.last_seq}; there will be no {seq}"
                )
            if self._stopped.is_set():
                raise StoreError(f"stream {stream_id}: the store has stopped before seq {seq} was written")
            await position.wait_changed()

    def refusal(self, stream_id: str) -> StoreError | None:
        """Return why the records of a stream being written never will be; None while that is not known."""
        return self._positions.refusal(stream_id)

    def forget(self, stream_id: str) -> None:
        """Drop the position of an ended stream; what is kept of it stays readable."""
        self._positions.forget(stream_id)

    @property
    def congested(self) -> bool:
        """Never: nothing is queued."""
        return False

    @property
    def failing(self) -> str | None:
        """Never."""
        return None

    async def wait_flow(self) -> None:
        """Return at once (a checkpoint)."""
        await trio.lowlevel.checkpoint()

    # --- reading -----------------------------------------------------------------------------------------------------

    async def read(
        self, stream_id: str, *, after_seq: int, limit: int, max_bytes: int = 1 << 20
    ) -> Sequence[Event]:
        """Return up to `limit` events after `after_seq`, up to `max_bytes` accounted, at least one if there is one."""
        await trio.lowlevel.checkpoint()
        kept = self._kept.get(stream_id)
        if kept is None:
            return ()
        start = max(after_seq + 1 - kept.first_seq, 0)
        found: builtins.list[Event] = []
        nbytes = 0
        for event in islice(kept.events, start, start + max(limit, 0)):
            nbytes += event.nbytes
            if found and nbytes > max_bytes:
                break
            found.append(event)
        return found

    async def get(self, *, stream_id: str | None = None, key: str | None = None) -> StoredStream | None:
        """Return a kept stream by id, or the one with the highest id of this key; None if there is none."""
        if (stream_id is None) == (key is None):
            raise ConfigurationError("stream_id, key", (stream_id, key), "exactly one of the two")
        await trio.lowlevel.checkpoint()
        if stream_id is None:
            assert key is not None
            ids = self._by_key.get(key)
            if not ids:
                return None
            stream_id = max(ids)
        kept = self._kept.get(stream_id)
        return None if kept is None else kept.describe()

    async def unfinished(self) -> Sequence[StoredStream]:
        """Return the streams without an outcome, lowest id first."""
        await trio.lowlevel.checkpoint()
        return [self._kept[i].describe() for i in sorted(self._kept.keys() - self._ended.keys())]

    async def list(
        self, *, before_id: str | None = None, states: Sequence[str] | None = None, limit: int = 100
    ) -> Sequence[StoredStream]:
        """Return up to `limit` ended streams with ids below `before_id`, highest id first."""
        await trio.lowlevel.checkpoint()
        wanted = None if states is None else frozenset(states)
        ids = nlargest(
            max(limit, 0),
            (
                stream_id
                for stream_id, kept in self._ended.items()
                if (before_id is None or stream_id < before_id)
                and (wanted is None or kept.stream.state in wanted)
            ),
        )
        return [self._ended[i].describe() for i in ids]

    async def prune(
        self, retention: Retention, *, now: float | None = None, limit: int = 1000, dry_run: bool = False
    ) -> PruneReport:
        """Remove up to `limit` ended streams that are more than `retention` keeps, or with `dry_run` only tell."""
        await trio.lowlevel.checkpoint()
        of_tenant: dict[str | None, builtins.list[EndedStream]] = {}
        everything = []
        for kept in sorted(self._ended.values(), key=lambda kept: (kept.stream.ended_at, kept.stream.id)):
            ended_at = kept.stream.ended_at
            assert ended_at is not None, "it has ended"
            ended = EndedStream(kept.stream.id, ended_at, kept.nbytes)
            everything.append(ended)
            of_tenant.setdefault(kept.stream.tenant, []).append(ended)
        chosen, complete = select(
            retention,
            now=time.time() if now is None else now,
            totals=[
                Totals(tenant, len(ended), sum(one.nbytes for one in ended), ended[0].ended_at)
                for tenant, ended in of_tenant.items()
            ],
            oldest=lambda tenant: iter(everything if tenant is None else of_tenant[tenant]),
            limit=limit,
        )
        if not dry_run:
            for ended, _ in chosen:
                self._remove(self._ended[str(ended.ref)])
        return PruneReport.of(chosen, complete=complete)

    def statistics(self) -> StoreStatistics:
        """Return the store's figures."""
        return StoreStatistics(
            pending_records=0,
            pending_bytes=0,
            committed_records=self._records,
            commits=self._commits,
            failed_commits=0,
            last_commit_s=0.0,
            last_error=None,
            held_bytes=self._nbytes,
            evicted_events=self._evicted,
        )

    # --- bounds ------------------------------------------------------------------------------------------------------

    def _check_open(self) -> None:
        if self._closed:
            raise StoreError("the store is closed; nothing was written")

    def _stop(self) -> None:
        self._closed = True
        self._stopped.set()

    def _committed(self, records: int) -> None:
        self._records += records
        self._commits += 1

    def _keep(self, stream_id: str, events: Sequence[Event]) -> _Kept:
        kept = self._kept[stream_id]
        kept.events.extend(events)
        nbytes = len(events) * EVENT_OVERHEAD_BYTES
        for event in events:
            nbytes += len(event.payload) + len(event.name) + len(event.text)
        kept.nbytes += nbytes
        self._nbytes += nbytes
        self._with_events[stream_id] = kept
        self._records += len(events)
        self._commits += 1
        return kept

    def _fit(self) -> None:
        while len(self._ended) > self._max_streams:
            self._evict_oldest()
        while self._nbytes > self._max_bytes and len(self._ended) > 1:
            self._evict_oldest()
        while self._nbytes > self._max_bytes and self._with_events:
            self._halve(next(iter(self._with_events.values())))

    def _evict_oldest(self) -> None:
        kept = next(iter(self._ended.values()))
        self._evicted += len(kept.events)
        self._remove(kept)

    def _halve(self, kept: _Kept) -> None:
        """Give up the older half of a stream's events (never its outcome) and put it last in turn."""
        stream_id = kept.stream.id
        del self._with_events[stream_id]
        droppable = len(kept.events) - (1 if kept.stream.state is not None else 0)
        if droppable < 1:
            return
        count = (droppable + 1) // 2
        nbytes = sum(event.nbytes for event in islice(kept.events, count))
        del kept.events[:count]
        kept.first_seq += count
        kept.nbytes -= nbytes
        self._nbytes -= nbytes
        self._evicted += count
        if count < droppable:
            self._with_events[stream_id] = kept

    def _remove(self, kept: _Kept) -> None:
        stream = kept.stream
        self._ended.pop(stream.id, None)
        self._with_events.pop(stream.id, None)
        del self._kept[stream.id]
        if stream.key is not None:
            ids = self._by_key[stream.key]
            del ids[stream.id]
            if not ids:
                del self._by_key[stream.key]
        self._nbytes -= kept.nbytes
