"""What is told of streams and of their supervisor: figures, whether it is well, and what a cancel or a reap came to."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal

import attrs

from supervisor.stores.base import StoreHealth, StoreStatistics
from supervisor.streams.lifecycle import Outcome, State

if TYPE_CHECKING:
    from supervisor.streams.journal import Journal
    from supervisor.streams.stream import Stream
    from supervisor.streams.tally import Tally

__all__ = [
    "CancelOutcome",
    "CancelResult",
    "Health",
    "MemoryStatistics",
    "Phase",
    "PoolStatistics",
    "ReapReport",
    "Reaped",
    "StreamInfo",
    "SupervisorStatistics",
    "describe",
]

CancelOutcome = Literal["won", "already_terminal", "requested", "tombstoned"]
Phase = Literal["open", "draining", "closed"]


@attrs.frozen(kw_only=True)
class CancelResult:
    """What a cancel came to, answered from the settled state.

    `won`: the stream ended by this cancel. `already_terminal`: it had ended, or something else sealed first.
    `requested`: it is still stopping (`wait_s` passed, or its drain budget runs). `tombstoned`: the key has not been
    seen yet; a start with it will be cancelled at once.
    """

    outcome: CancelOutcome
    id: str | None
    key: str | None
    state: State | None
    reason: str | None
    error: str | None = None
    """Why there is no answer, where many were cancelled together: the outcome of this one could not be recorded."""


@attrs.frozen(kw_only=True)
class StreamInfo:
    """A stream at one moment."""

    id: str
    key: str | None
    state: State
    reason: str | None
    """Refines a terminal state."""
    tenant: str | None
    upstream: str | None
    dialect: str
    labels: Mapping[str, str]
    meta: Mapping[str, Any]
    delivery: str
    created_at: float
    """Seconds since the Unix epoch."""
    ended_at: float | None
    age_s: float
    """From start until now, or until the end."""
    idle_s: float | None
    """Since the last event; None once the stream has ended."""
    first_event_s: float | None
    """From the start to the first event; None if there was none, or if it is not known any more: after a restart."""
    attempts: int
    events: int
    skipped: int
    journal_bytes: int | None
    """What its journal comes to: payloads, names and text. None if that is not known any more: after a restart."""
    readers: int
    bytes_held: int
    """Held in memory for this stream: its tail and its fold."""
    tail_bytes: int
    """Of that, the newest events."""
    pending_bytes: int
    """Of those, what is not durable yet."""
    epoch: int
    tail_seq: int
    """The last event readers may see."""
    durable_seq: int
    outcome: Outcome | None


def describe(stream: Stream, journal: Journal, tally: Tally, *, now: float, durable: int) -> StreamInfo:
    """Describe a stream by its parts. durable: the last seq that the store has of it, while its journal is open."""
    outcome, spec = stream.outcome, stream.spec
    return StreamInfo(
        id=stream.id,
        key=spec.key,
        state=stream.state,
        reason=outcome.reason if outcome is not None else None,
        tenant=spec.tenant,
        upstream=spec.upstream,
        dialect=spec.dialect,
        labels=spec.labels,
        meta=spec.meta,
        delivery=spec.delivery,
        created_at=stream.created_at,
        ended_at=outcome.ended_at if outcome is not None else None,
        age_s=outcome.duration_s if outcome is not None else now - stream.started,
        idle_s=None if outcome is not None else now - stream.last_event_at,
        first_event_s=stream.first_event_s,
        attempts=outcome.attempts if outcome is not None else tally.attempts,
        events=outcome.events if outcome is not None else tally.events,
        skipped=outcome.skipped if outcome is not None else tally.skipped,
        journal_bytes=journal.total_bytes,
        readers=stream.readers,
        bytes_held=stream.bytes_held,
        tail_bytes=journal.tail_bytes,
        pending_bytes=journal.pending_bytes,
        epoch=journal.epoch,
        tail_seq=journal.visible_seq,
        durable_seq=journal.visible_seq if journal.closed else min(durable, journal.visible_seq),
        outcome=outcome,
    )


@attrs.frozen(kw_only=True)
class Reaped:
    """One stream that was reaped or spilled, or would be."""

    id: str
    key: str | None
    reason: str
    """`reaped_…`, or `spilled`: then it goes on, and holds less."""
    message: str
    """The limit, the value and the bound."""
    age_s: float
    idle_s: float
    bytes_held: int
    """Before that."""
    settled: bool = False
    """Whether its outcome was durable when this was told; until then a crash could still make it `interrupted`."""


@attrs.frozen(kw_only=True)
class ReapReport:
    """What a sweep did. With `dry_run` nothing was."""

    dry_run: bool
    live: int
    """Live streams before the sweep."""
    reaped: tuple[Reaped, ...]
    spilled: tuple[Reaped, ...] = ()
    """Streams that gave up what the store has of them, and went on."""


@attrs.frozen(kw_only=True)
class PoolStatistics:
    """The live streams of a tenant or group."""

    live: int
    bytes_held: int


@attrs.frozen(kw_only=True)
class MemoryStatistics:
    """The memory manager's figures at one moment. Counts are since the start."""

    bytes_held: int
    """By live streams."""
    ending_bytes: int
    """By streams that have been sealed, and whose outcome is not durable yet."""
    total_bytes: int
    """By everything that is counted."""
    beside: Mapping[str, int]
    """Bytes held beside live and ending streams, by whom: ended streams, tombstones, connections."""
    tenants: Mapping[str, PoolStatistics]
    """Of tenants with live streams, those that hold most."""
    groups: Mapping[str, PoolStatistics]
    """The same of groups."""
    process_bytes: int | None
    """The process's resident memory as of the last sweep; None where that is not known."""
    process_limit_bytes: int | None
    pressure: bool
    """Whether the process's memory is short, from the high mark until below the low one."""
    sweeps: int
    looked_at: int
    """Streams that sweeps have looked at."""
    reaped: Mapping[str, int]
    """Outcomes by reason."""
    spilled: int
    """How often a stream was made to give up what the store has of it."""
    rejected: Mapping[str, int]
    """Starts refused, by limit; `store`: because it could not write."""


@attrs.frozen(kw_only=True)
class SupervisorStatistics:
    """A supervisor's figures at one moment. Counts are since it was opened."""

    state: Phase
    live: int
    settling: int
    unrecorded: int
    """Of the settling ones, those whose outcome could not be made durable in time; it is announced if it still can be."""
    finished_in_memory: int
    finished_bytes: int
    tasks: int
    """Streams' tasks, with those of sources that have not ended after the seal."""
    keys: int
    tombstones: int
    readers: int
    started: int
    attached: int
    rejected: int
    ended: Mapping[str, Mapping[str, int]]
    """By state, then by reason. Cancelled is never counted as failed or completed."""
    memory: MemoryStatistics
    store: StoreStatistics


@attrs.frozen(kw_only=True)
class Health:
    """Whether the supervisor can do its work: `ok`, `degraded` (and why), or `draining`."""

    status: Literal["ok", "degraded", "draining"]
    problems: tuple[str, ...]
    live: int
    max_live: int
    store: StoreHealth
    circuits: Mapping[str, Mapping[str, Any]]
    """By upstream, what its circuit says (`supervisor.upstream.CircuitStatistics`). An open one is the upstream's trouble: `status`
    does not go by it."""
