"""The overview: how a supervisor is now, and how its last hour went, in one object.

What the dashboard and `stream-supervisor top` show. It costs the same however many streams there are.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import attrs
import msgspec

from supervisor.observe.distribution import Percentiles
from supervisor.observe.figures import Figures
from supervisor.observe.window import MINUTES, Minute, Window

__all__ = ["Overview", "overview"]

_ERRORS = 10
_STATES = ("completed", "failed", "cancelled", "expired")


class _Told(msgspec.Struct, frozen=True, kw_only=True):
    """The base of what is told."""


class Active(_Told, frozen=True, kw_only=True):
    """The streams of this moment."""

    live: int
    waiting: int
    """For their first event, of those that have not settled."""
    answering: int
    """Past their first event, of those that have not settled."""
    settling: int
    """Sealed, their outcomes not durable yet."""
    max_live: int
    readers: int


class ErrorCount(_Told, frozen=True, kw_only=True):
    """How often streams ended by the same error, and the last of them."""

    state: str
    reason: str
    kind: str | None
    """The fault's, where there was one."""
    upstream: str | None
    count: int
    last_at: float
    last_id: str
    last_message: str


class Hour(_Told, frozen=True, kw_only=True):
    """What became of streams within the last hour."""

    started: int
    ended: dict[str, int]
    """By state."""
    success_rate: float | None
    """Completed, of those that completed, failed or expired: a cancelled one counts for neither side. Null: there was none."""
    retried: int
    """Ended streams that took more than one attempt."""
    duration_s: Percentiles
    first_event_s: Percentiles
    events: Percentiles
    bytes: Percentiles
    """Payloads, names and text, as journalled."""
    output_tokens: Percentiles
    """Where the provider stated them."""
    errors: tuple[ErrorCount, ...]
    """The commonest, at most 10."""


class Total(_Told, frozen=True, kw_only=True):
    """Counts since the supervisor was opened."""

    started: int
    attached: int
    rejected: dict[str, int]
    """Starts, by the limit that refused them."""
    ended: dict[str, dict[str, int]]
    """By state, then by reason."""


class MemoryNow(_Told, frozen=True, kw_only=True):
    """Memory against its limits."""

    bytes_held: int
    """By live streams."""
    total_bytes: int
    """By everything that is counted."""
    max_bytes: int | None
    """The limit of `total_bytes`."""
    process_bytes: int | None
    process_limit_bytes: int | None
    pressure: bool
    beside: dict[str, int]


class Minutes(_Told, frozen=True, kw_only=True):
    """Columns of 60 values, the oldest minute first, the current one last. Null: nothing is known of that minute."""

    first: float
    """When the oldest began."""
    step_s: int
    started: tuple[int, ...]
    completed: tuple[int, ...]
    failed: tuple[int, ...]
    cancelled: tuple[int, ...]
    expired: tuple[int, ...]
    duration_p50_s: tuple[float | None, ...]
    duration_p95_s: tuple[float | None, ...]
    first_event_p50_s: tuple[float | None, ...]
    first_event_p95_s: tuple[float | None, ...]
    live: tuple[int | None, ...]
    """The most that was seen, as in the two columns that follow."""
    bytes_held: tuple[int | None, ...]
    process_bytes: tuple[int | None, ...]
    records: tuple[int | None, ...]
    """Journal records that were written to the store."""


class Overview(_Told, frozen=True, kw_only=True):
    """How things are now, and how the last hour went."""

    at: float
    since: float
    """From when on `hour` and `minutes` count."""
    window_s: int
    status: str
    """As in `supervisor.health`."""
    problems: tuple[str, ...]
    active: Active
    hour: Hour
    total: Total
    memory: MemoryNow
    store: dict[str, Any]
    """As in `supervisor.health`, as is `circuits`."""
    circuits: dict[str, dict[str, Any]]
    minutes: Minutes


def overview(figures: Figures, *, clock: Callable[[], float] = time.time) -> Overview:
    """Return the overview of a supervisor, of which these are the figures."""
    figures.sample()
    supervisor = figures.supervisor
    told, health = supervisor.statistics(), supervisor.health()
    memory = told.memory
    unsettled = told.live + told.settling
    return Overview(
        at=clock(),
        since=figures.since,
        window_s=MINUTES * 60,
        status=health.status,
        problems=health.problems,
        active=Active(
            live=told.live,
            waiting=max(0, unsettled - figures.answering),
            answering=min(figures.answering, unsettled),
            settling=told.settling,
            max_live=health.max_live,
            readers=told.readers,
        ),
        hour=_hour(figures.window.merged()),
        total=Total(
            started=told.started,
            attached=told.attached,
            rejected=dict(memory.rejected),
            ended={state: dict(reasons) for state, reasons in told.ended.items()},
        ),
        memory=MemoryNow(
            bytes_held=memory.bytes_held,
            total_bytes=memory.total_bytes,
            max_bytes=supervisor.memory.policy.max_bytes,
            process_bytes=memory.process_bytes,
            process_limit_bytes=memory.process_limit_bytes,
            pressure=memory.pressure,
            beside=dict(memory.beside),
        ),
        store=attrs.asdict(health.store),
        circuits={name: msgspec.to_builtins(circuit) for name, circuit in health.circuits.items()},
        minutes=_minutes(figures.window),
    )


def _hour(hour: Minute) -> Hour:
    ended = {state: hour.ended[state] for state in _STATES}
    judged = sum(ended.values()) - ended["cancelled"]
    worst = sorted(hour.errors.items(), key=lambda item: (-item[1].count, -item[1].last_at))[:_ERRORS]
    return Hour(
        started=hour.started,
        ended=ended,
        success_rate=round(ended["completed"] / judged, 4) if judged else None,
        retried=hour.retried,
        duration_s=hour.duration_s.percentiles(),
        first_event_s=hour.first_event_s.percentiles(),
        events=hour.events.percentiles(),
        bytes=hour.bytes.percentiles(),
        output_tokens=hour.output_tokens.percentiles(),
        errors=tuple(
            ErrorCount(
                state=key.state,
                reason=key.reason,
                kind=key.kind,
                upstream=key.upstream,
                count=error.count,
                last_at=error.last_at,
                last_id=error.last_id,
                last_message=error.last_message,
            )
            for key, error in worst
        ),
    )


def _minutes(window: Window) -> Minutes:
    first = window.first
    known = {minute.number: minute for minute in window}
    nothing = Minute(0)
    all_of_them = [known.get(number, nothing) for number in range(first, first + MINUTES)]

    def ended(state: str) -> tuple[int, ...]:
        return tuple(minute.ended[state] for minute in all_of_them)

    return Minutes(
        first=first * 60.0,
        step_s=60,
        started=tuple(minute.started for minute in all_of_them),
        completed=ended("completed"),
        failed=ended("failed"),
        cancelled=ended("cancelled"),
        expired=ended("expired"),
        duration_p50_s=tuple(minute.duration_s.quantile(0.5) for minute in all_of_them),
        duration_p95_s=tuple(minute.duration_s.quantile(0.95) for minute in all_of_them),
        first_event_p50_s=tuple(minute.first_event_s.quantile(0.5) for minute in all_of_them),
        first_event_p95_s=tuple(minute.first_event_s.quantile(0.95) for minute in all_of_them),
        live=tuple(minute.live for minute in all_of_them),
        bytes_held=tuple(minute.bytes_held for minute in all_of_them),
        process_bytes=tuple(minute.process_bytes for minute in all_of_them),
        records=tuple(minute.records for minute in all_of_them),
    )
