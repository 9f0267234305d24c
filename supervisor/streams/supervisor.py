"""The supervisor: owns the root nursery, the registry of streams, the memory manager and the store.

**Claiming.** `start_nowait` claims the key and registers the stream in one synchronous step, so two starts with one key can
never both create a stream, and a stop can never fall between the two. A key names one piece of work: it stays claimed while
its stream is live and as long as the ended stream is kept in memory, so that a start repeated after a lost reply joins what
it started the first time instead of paying for it again.

**Registry.** A stream is *live* from its start to its seal, *settling* from there until its outcome is durable, and then
*finished*: kept in memory, bounded by count and age, and beyond that in the store alone. Live streams are in the order they
were started, which is what the memory manager needs.

How a supervisor is opened and closed is in `opening.py`.
"""

from __future__ import annotations

import builtins
import inspect
import itertools
import logging
import math
from collections import deque
from collections.abc import Awaitable, Callable, Iterable, Mapping
from typing import Any, Literal, get_args

import attrs
import msgspec
import trio

from supervisor.dialects import Dialect
from supervisor.dialects.catalog import BUILTIN
from supervisor.errors import (
    ConfigurationError,
    KeyConflictError,
    StoreError,
    StoreUnavailableError,
    SupervisorClosedError,
    UnknownStreamError,
)
from supervisor.stores.base import Event, Store, StoredStream, StoreHealth
from supervisor.streams.clocks import Watchdog
from supervisor.streams.memory import SLICE, Holder, MemoryManager
from supervisor.streams.observers import Observer, Observers
from supervisor.streams.recovery import interrupted, restored, restored_if_readable
from supervisor.streams.report import (
    CancelResult,
    Health,
    Phase,
    ReapReport,
    StreamInfo,
    SupervisorStatistics,
)
from supervisor.streams.selection import Selection, check_exactly_one
from supervisor.streams.spec import (
    CircuitReport,
    Deadlines,
    Delivery,
    IdFactory,
    Limits,
    MemoryPolicy,
    OnConflict,
    OnDetach,
    Source,
    StopMode,
    StreamSpec,
    check_stop,
    monotonic_ids,
)
from supervisor.streams.stream import Stream
from supervisor.streams.tombstones import Tombstones

__all__ = ["Started", "Supervisor"]

_log = logging.getLogger("supervisor.streams")
_MAX_REASONS = 64  # distinct reasons counted for one state
_LOST_TOLD_S = 300.0  # for how long health tells of an outcome that was lost
MAX_DIALECTS = 256
"""Dialects remembered that sources brought, beside those built in and given to the supervisor."""
_LATE_S = 1.0  # between two looks at outcomes that were not durable in time


@attrs.frozen
class Started:
    """What a start came to: the stream, and whether it is new or was attached to."""

    stream: Stream
    created: bool


class Supervisor:
    """The registry and root nursery of streams. Made by `open_supervisor`."""

    def __init__(
        self,
        nursery: trio.Nursery,
        *,
        store: Store,
        limits: Limits,
        deadlines: Deadlines,
        memory: MemoryPolicy,
        dialects: Iterable[Dialect],
        circuits: CircuitReport | None = None,
        new_id: IdFactory | None,
    ) -> None:
        self._nursery = nursery
        self.store = store
        self.limits = limits
        self.deadlines = deadlines
        self._circuits = circuits
        self._new_id = new_id  # None: `recover` makes one that goes on from the store's
        self._dialects: dict[str, Dialect] = {**BUILTIN, **{dialect.name: dialect for dialect in dialects}}
        self._learned: deque[str] = deque()  # names of those that sources brought
        self._unrecorded: dict[
            str, Stream
        ] = {}  # of the settling ones, those that nobody is made to wait for
        self._keys: dict[str, Stream] = {}
        self._tombstones = Tombstones(max_count=limits.max_tombstones, keep_s=limits.tombstone_s)
        self._phase: Phase = "open"
        self._idle = trio.Event()
        self.watchdog: Watchdog[Stream] = Watchdog(lambda stream: stream.clocks, Stream.expire)
        self.memory = MemoryManager(memory, limits, dropped=self._stream_dropped)
        stones = self._tombstones
        self.memory.register("tombstones", Holder(held=lambda: stones.bytes_held, expire=stones.expire))
        self._live: Mapping[str, Stream] = self.memory.live.streams
        self._settling: Mapping[str, Stream] = self.memory.ending.streams
        self._finished: Mapping[str, Stream] = self.memory.finished.pool.streams
        self.readers = 0
        self.observers = Observers()
        self._tasks = 0
        self._started = 0
        self._attached = 0
        self._ended: dict[str, dict[str, int]] = {}
        self._lost = 0  # streams whose outcome will never be recorded
        self._lost_last, self._lost_at = "", -math.inf

    def __repr__(self) -> str:
        return f"<Supervisor {self._phase}: {len(self._live)} live, {len(self._settling)} settling, {len(self._finished)} finished>"

    # --- starting ----------------------------------------------------------------------------------------------------

    async def start(
        self,
        source: Source,
        *,
        key: str | None = None,
        on_conflict: OnConflict = "attach",
        on_detach: OnDetach | None = None,
        deadlines: Deadlines | None = None,
        labels: Mapping[str, str] | None = None,
        dialect: Dialect | None = None,
        upstream: str | None = None,
        delivery: Delivery = "immediate",
        meta: Mapping[str, Any] | None = None,
        tenant: str | None = None,
    ) -> Stream:
        """Start a stream, or join the one that has the key, and return it before any of its I/O.

        A checkpoint, then one synchronous step: a cancelled `start` has started nothing. See `start_nowait` for the rest.
        """
        await trio.lowlevel.checkpoint()
        return self.start_nowait(
            source,
            key=key,
            on_conflict=on_conflict,
            on_detach=on_detach,
            deadlines=deadlines,
            labels=labels,
            dialect=dialect,
            upstream=upstream,
            delivery=delivery,
            meta=meta,
            tenant=tenant,
        ).stream

    @trio.lowlevel.enable_ki_protection
    def start_nowait(
        self,
        source: Source,
        *,
        key: str | None = None,
        on_conflict: OnConflict = "attach",
        on_detach: OnDetach | None = None,
        deadlines: Deadlines | None = None,
        labels: Mapping[str, str] | None = None,
        dialect: Dialect | None = None,
        upstream: str | None = None,
        delivery: Delivery = "immediate",
        meta: Mapping[str, Any] | None = None,
        tenant: str | None = None,
    ) -> Started:
        """Claim the key and register the stream, synchronously.

        `on_conflict` says what a claimed key does: `"attach"` joins its stream (live or ended), `"reject"` raises
        KeyConflictError, `"replace"` ends it as `cancelled(replaced)` and takes the key. `dialect` and `upstream` default to
        the source's own attributes, `deadlines` to the supervisor's. `meta` is small JSON for the record. `tenant` is on whose
        behalf it runs, for limits and figures.

        Raises AdmissionError at a limit that rejects, StoreUnavailableError while the store cannot write (both say when to come
        back), SupervisorClosedError while draining or closed, and ConfigurationError for a bad option; in each case
        nothing has changed.
        """
        if not _may_be_source(source):
            raise ConfigurationError("source", source, "an async callable that takes the stream's output")
        if on_conflict not in get_args(OnConflict):
            raise ConfigurationError("on_conflict", on_conflict, "'attach', 'reject' or 'replace'")
        chosen: Dialect | None = dialect if dialect is not None else getattr(source, "dialect", None)
        spec = StreamSpec(
            key=key,
            upstream=upstream if upstream is not None else getattr(source, "upstream", None),
            dialect="native" if chosen is None else chosen.name,
            labels={} if labels is None else labels,
            deadlines=self.deadlines if deadlines is None else deadlines,
            on_detach=OnDetach() if on_detach is None else on_detach,
            delivery=delivery,
            meta={} if meta is None else meta,
            tenant=tenant,
        )
        try:
            head = msgspec.json.encode(spec)
        except ValueError as error:  # a text of half a surrogate pair
            raise ConfigurationError("key, tenant, upstream, dialect or labels", spec, "text") from error
        if self._phase != "open":
            raise SupervisorClosedError(self._phase)
        holder = self._keys.get(key) if key is not None else None
        if holder is not None:
            if on_conflict == "attach":
                self._attached += 1
                return Started(holder, created=False)
            if on_conflict == "reject":
                assert key is not None, "only a key has a holder"
                raise KeyConflictError(key, stream_id=holder.id, state=holder.state.value)
        if (failing := self.store.failing) is not None:
            self.memory.refused("store")
            raise StoreUnavailableError(failing, retry_after_s=self.limits.retry_after_s)
        acts = self.memory.admit(spec, replacing=holder, tasks=self._tasks)
        assert self._new_id is not None, "a supervisor recovers before it starts streams"
        stream = Stream(self, self._new_id(), spec, source, dialect=chosen or self._dialects["native"])
        self.store.create(
            StoredStream(
                id=stream.id, key=spec.key, created_at=stream.created_at, head=head, tenant=spec.tenant
            )
        )  # first: if it refuses, nothing else has changed
        for act in acts:
            act.stream.reaped(act.reason, act.message)
        if holder is not None:
            holder.stop_for("replaced", actor=stream.id)
        if chosen is not None:
            self._learn(chosen)
        self._register(stream, spec)
        self.observers.started(stream)
        return Started(stream, created=True)

    def _learn(self, dialect: Dialect) -> None:
        """Keep a dialect that a source brought, for its ended streams; of many the newest."""
        if dialect.name not in self._dialects:
            if len(self._learned) >= MAX_DIALECTS:
                del self._dialects[self._learned.popleft()]
            self._learned.append(dialect.name)
            self._dialects[dialect.name] = dialect

    def _register(self, stream: Stream, spec: StreamSpec) -> None:
        if self._idle.is_set():
            self._idle = trio.Event()
        if spec.key is not None:
            self._keys[spec.key] = stream
        self._started += 1
        self._tasks += 1
        stream.arm_first_clocks()
        self.memory.admitted(stream)
        self._nursery.start_soon(stream.run, name=f"stream {stream.id}")
        if spec.delivery == "durable":
            self._nursery.start_soon(stream.follow_durability, name=f"durability of {stream.id}")
        tombstone = None if spec.key is None else self._tombstones.take(spec.key, trio.current_time())
        if tombstone is not None:
            stream.stop_for(
                "requested",
                actor=tombstone.actor,
                message=tombstone.reason or "cancelled before it was started",
            )

    # --- finding -----------------------------------------------------------------------------------------------------

    def get(self, stream_id: str) -> Stream:
        """Return a stream in memory by id. Raises UnknownStreamError; `find` looks in the store too."""
        stream = self._live.get(stream_id) or self._settling.get(stream_id)
        if stream is None and stream_id in self._finished:
            stream = self._finished[stream_id]
        if stream is None:
            raise UnknownStreamError(stream_id=stream_id)
        return stream

    def get_by_key(self, key: str) -> Stream:
        """Return the stream in memory that holds the key. Raises UnknownStreamError."""
        stream = self._keys.get(key)
        if stream is None:
            raise UnknownStreamError(key=key)
        return stream

    async def find(self, stream_id: str | None = None, *, key: str | None = None) -> Stream:
        """Return a stream by id or by key, from memory or from the store. Raises UnknownStreamError."""
        check_exactly_one(stream_id=stream_id, key=key)
        try:
            stream = self.get(stream_id) if stream_id is not None else self.get_by_key(str(key))
        except UnknownStreamError:
            stored = await self.store.get(stream_id=stream_id, key=key)  # noqa: ASYNC120  # cancelled: nobody asks
            if stored is None or stored.outcome is None:
                raise
            return restored(self, stored, self._dialects)
        await trio.lowlevel.checkpoint()
        return stream

    def list(
        self,
        *,
        states: Iterable[str] | None = None,
        labels: Mapping[str, str] | None = None,
        key: str | None = None,
        upstream: str | None = None,
        tenant: str | None = None,
        live: bool | None = None,
    ) -> builtins.list[StreamInfo]:
        """Describe the streams in memory that match every filter given, newest first."""
        wanted = Selection(states=states, labels=labels, key=key, upstream=upstream, tenant=tenant)
        return [stream.info() for stream in self._select(wanted, live=live)]

    async def history(
        self,
        *,
        states: Iterable[str] | None = None,
        labels: Mapping[str, str] | None = None,
        key: str | None = None,
        upstream: str | None = None,
        tenant: str | None = None,
        before_id: str | None = None,
        limit: int = 100,
    ) -> builtins.list[StreamInfo]:
        """Describe matching streams in memory and in the store, newest first: up to `limit` with ids below `before_id`.

        The last id of a page is the next page's `before_id`.
        """
        wanted = Selection(states=states, labels=labels, key=key, upstream=upstream, tenant=tenant)
        found: dict[str, StreamInfo] = {}
        for stream in self._select(wanted):
            if before_id is None or stream.id < before_id:
                found[stream.id] = stream.info()
                if len(found) >= limit:
                    break
        stored_states = None if wanted.states is None else [state.value for state in wanted.states]
        position, matched = before_id, 0
        while matched < limit:
            page = await self.store.list(before_id=position, states=stored_states, limit=limit)
            for stored in page:
                if stored.id in found:
                    matched += 1
                elif stored.outcome is not None and not self._in_memory(stored.id):
                    again = restored_if_readable(self, stored, self._dialects)
                    if again is not None and wanted.matches(again):
                        found[again.id] = again.info()
                        matched += 1
            if len(page) < limit:
                break
            position = page[-1].id
        return [found[stream_id] for stream_id in sorted(found, reverse=True)[:limit]]

    def _in_memory(self, stream_id: str) -> bool:
        return stream_id in self._live or stream_id in self._settling or stream_id in self._finished

    def _select(self, wanted: Selection, *, live: bool | None = None) -> builtins.list[Stream]:
        everything = [*self._live.values(), *self._settling.values()]
        if live is not True:
            everything += self._finished.values()
        if live is False:
            everything = [*self._finished.values()]
        chosen = [stream for stream in everything if wanted.matches(stream)]
        chosen.sort(key=lambda stream: stream.id, reverse=True)
        return chosen

    # --- ending ------------------------------------------------------------------------------------------------------

    async def cancel(
        self,
        stream_id: str | None = None,
        *,
        key: str | None = None,
        labels: Mapping[str, str] | None = None,
        all_streams: bool = False,
        reason: str = "",
        actor: str | None = None,
        mode: StopMode | None = None,
        drain_s: float = 10.0,
        drain_tokens: int | None = None,
        wait_s: float = 5.0,
    ) -> builtins.list[CancelResult]:
        """Stop streams by exactly one of id, key, labels or `all_streams`, and tell what that came to for each.

        As `Stream.cancel`, also the options. An unknown id raises UnknownStreamError. A key that no stream in memory holds leaves a tombstone: a
        start with it within `Limits.tombstone_s` ends at once as `cancelled(requested)`. Many streams are stopped in slices.
        """
        check_stop(mode, drain_s, drain_tokens)
        check_exactly_one(stream_id=stream_id, key=key, labels=labels, all_streams=all_streams or None)
        if key is not None and key not in self._keys:
            StreamSpec(key=key)  # validates
            self._tombstones.bury(key, actor=actor, reason=reason, now=trio.current_time())
            await trio.lowlevel.checkpoint()
            return [CancelResult(outcome="tombstoned", id=None, key=key, state=None, reason=None)]
        if stream_id is not None or key is not None:
            stream = await self.find(stream_id) if stream_id is not None else self._keys[str(key)]
            stop = stream.request_stop(
                reason=reason, actor=actor, mode=mode, drain_s=drain_s, drain_tokens=drain_tokens
            )
            return [await stream.stopped(stop, wait_s=wait_s)]
        wanted = Selection(labels=labels)
        chosen = [stream for stream in self._live.values() if wanted.matches(stream)]
        stops = []
        for done, stream in enumerate(chosen, start=1):
            stop = stream.request_stop(
                reason=reason, actor=actor, mode=mode, drain_s=drain_s, drain_tokens=drain_tokens
            )
            stops.append((stream, stop))
            if done % SLICE == 0:
                await trio.lowlevel.checkpoint()
        until = trio.current_time() + wait_s
        results = []
        for stream, verdict in stops:
            left = max(0.0, until - trio.current_time())
            try:
                results.append(await stream.stopped(verdict, wait_s=left))
            except (
                StoreError
            ) as error:  # one that cannot be recorded does not take the answers for the others away
                results.append(
                    CancelResult(
                        outcome="requested",
                        id=stream.id,
                        key=stream.key,
                        state=stream.state,
                        reason=None,
                        error=str(error),
                    )
                )
        return results

    async def reap(self, *, dry_run: bool = False, wait_s: float = 5.0) -> ReapReport:
        """Apply the memory policy now, and wait at most `wait_s` for the outcomes; with `dry_run` only say who would go.

        Each entry says whether its outcome was durable by then (`settled`).
        """
        return await self.memory.sweep(dry_run=dry_run, wait_s=wait_s)

    async def drain(self, *, timeout_s: float | None = None) -> int:
        """Refuse new streams and wait until none is live, at most `timeout_s`. Returns how many still are.

        Cancelling it stops the wait; the supervisor stays draining.
        """
        if self._phase == "open":
            self._phase = "draining"
        with trio.move_on_after(float("inf") if timeout_s is None else timeout_s):
            await self._wait_idle()
        return len(self._live) + len(self._settling)

    async def shutdown(self, *, grace_s: float = 0.0, actor: str | None = None) -> None:
        """Drain for `grace_s`, then end what is left as `cancelled(shutdown)`, in slices, and wait for the outcomes."""
        await self.drain(timeout_s=grace_s)
        while self._live:
            for stream in builtins.list(itertools.islice(self._live.values(), SLICE)):
                if not stream.stop_for("shutdown", actor=actor):
                    self.stream_sealed(stream)
            await trio.lowlevel.checkpoint()
        await self._wait_idle()

    async def _wait_idle(self) -> None:
        await trio.lowlevel.checkpoint()
        while self._live or len(self._settling) > len(self._unrecorded):
            await self._idle.wait()

    # --- telling -----------------------------------------------------------------------------------------------------

    def observe(self, observer: Observer) -> Callable[[], None]:
        """Tell an observer what becomes of streams from now on (never of an event); call what this returns to end that."""
        return self.observers.add(observer)

    def statistics(self) -> SupervisorStatistics:
        """Return the supervisor's figures."""
        memory = self.memory.statistics()
        return SupervisorStatistics(
            state=self._phase,
            live=len(self._live),
            settling=len(self._settling),
            unrecorded=len(self._unrecorded),
            finished_in_memory=len(self._finished),
            finished_bytes=self.memory.finished.bytes_held,
            tasks=self._tasks,
            keys=len(self._keys),
            tombstones=len(self._tombstones),
            readers=self.readers,
            started=self._started,
            attached=self._attached,
            rejected=sum(memory.rejected.values()),
            ended={state: dict(sorted(reasons.items())) for state, reasons in sorted(self._ended.items())},
            memory=memory,
            store=self.store.statistics(),
        )

    def health(self) -> Health:
        """Return whether the supervisor can do its work."""
        problems = []
        store = StoreHealth.of(self.store)
        if store.error is not None:
            problems.append(f"the store cannot write: {store.error}; starts are rejected")
        if trio.current_time() - self._lost_at < _LOST_TOLD_S:
            problems.append(
                f"the outcomes of {self._lost} streams could not be recorded and never will be; the last: {self._lost_last}"
            )
        if self._unrecorded:
            problems.append(f"{len(self._unrecorded)} outcomes are not durable yet and are overdue")
        if self.store.congested:
            problems.append(f"the store is behind by {store.lag_bytes} bytes; sources are held back")
        if len(self._live) >= self.limits.max_live and self.limits.when_full == "reject":
            problems.append(f"at the limit of {self.limits.max_live} live streams; starts are rejected")
        status: Literal["ok", "degraded", "draining"] = "degraded" if problems else "ok"
        return Health(
            status=status if self._phase == "open" else "draining",
            problems=tuple(problems),
            live=len(self._live),
            max_live=self.limits.max_live,
            store=store,
            circuits={} if self._circuits is None else self._circuits(trio.current_time()),
        )

    def dialect(self, name: str) -> Dialect:
        """Return a dialect by name: built in, or given to this supervisor. Raises ConfigurationError."""
        try:
            return self._dialects[name]
        except KeyError:
            raise ConfigurationError("dialect", name, f"one of {sorted(self._dialects)}") from None

    # --- called by streams -------------------------------------------------------------------------------------------

    def stream_sealed(self, stream: Stream) -> None:
        """Take note of a seal."""
        if stream.id in self._live:
            self.memory.sealed(stream)

    def stream_settled(self, stream: Stream) -> None:
        """Take note that a stream's outcome is announced."""
        outcome = stream.outcome
        assert outcome is not None, "only an announced stream is settled"
        self._unrecorded.pop(stream.id, None)
        reasons = self._ended.setdefault(outcome.state.value, {})
        known = outcome.reason in reasons or len(reasons) < _MAX_REASONS
        reason = (
            outcome.reason if known else "other"
        )  # a completed reason is the provider's, or the program's, to choose
        reasons[reason] = reasons.get(reason, 0) + 1
        self.memory.count(outcome.reason)
        self.memory.settled(stream)
        self.store.forget(stream.id)
        self.observers.ended(stream, outcome)
        self._note_idle()

    def stream_unrecorded(self, stream: Stream, *, hopeless: bool) -> None:
        """Take note that an outcome could not be made durable in time: announce it when it is, unless that is `hopeless`."""
        if hopeless:
            self._unrecorded.pop(stream.id, None)
            self._lost += 1
            self._lost_last = stream.loss
            self._lost_at = trio.current_time()
            self.store.forget(stream.id)
            self.memory.settled(stream)
            self.observers.ended(stream, None)
        else:
            if not self._unrecorded:
                self._nursery.start_soon(self._announce_late, name="late outcomes")
            self._unrecorded[stream.id] = stream
        self._note_idle()

    def stream_unwound(self) -> None:
        """Take note that a stream's task has come to its end."""
        self._tasks -= 1

    async def _announce_late(self) -> None:
        """Announce outcomes that become durable after all, until there are none left to wait for."""
        while self._unrecorded:
            await trio.sleep(_LATE_S)
            for stream in builtins.list(self._unrecorded.values()):
                stream.announce_late()

    def _note_idle(self) -> None:
        if not self._live and len(self._settling) == len(self._unrecorded):
            self._idle.set()

    def _stream_dropped(self, stream: Stream) -> None:
        """Let go of the key of an ended stream that leaves memory."""
        if stream.key is not None and self._keys.get(stream.key) is stream:
            del self._keys[stream.key]

    def spawn(self, function: Callable[[], Awaitable[object]]) -> None:
        """Run a stream's own housekeeping beside its task."""
        self._nursery.start_soon(function)

    # --- opening -----------------------------------------------------------------------------------------------------

    async def recover(self) -> int:
        """Give every stream that a crash interrupted its outcome, and remember the keys of the newest ended ones.

        Returns how many were interrupted.
        """
        left = await self.store.unfinished()
        for stored in left:
            outcome = await interrupted(stored, self.store)
            event = Event(outcome.epoch, outcome.last_seq, outcome.ended_at, "outcome", outcome.to_json())
            self.store.end(stored.id, event, state=outcome.state.value, ended_at=outcome.ended_at)
        for stored in left:
            await self.store.wait_durable(stored.id, stored.last_seq + 1)
            self.store.forget(stored.id)
        newest = await self.store.list(limit=self.limits.max_finished)
        for stored in reversed(newest):
            stream = restored_if_readable(self, stored, self._dialects)
            if stream is None:
                continue
            if stream.key is not None:
                self._keys[stream.key] = stream
            self.memory.keep(stream)
        if self._new_id is None:
            highest = max((stored.id for stored in [*left[-1:], *newest[:1]]), default=None)
            self._new_id = monotonic_ids(after=highest)  # also if the clock was set back since
        return len(left)

    async def close(self) -> None:
        """Wait for the live streams, and for those they start, as a nursery does; then stop the housekeeping."""
        await self._wait_idle()
        self._phase = "closed"
        self._nursery.cancel_scope.cancel(reason="the supervisor is closed")


def _may_be_source(source: object) -> bool:
    yields = inspect.isgeneratorfunction(source) or inspect.isasyncgenfunction(source)
    return callable(source) and not yields  # calling what yields does nothing
