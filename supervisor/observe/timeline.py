"""What happened when in one stream: its trace, and how it is made of a journal's events, one by one.

Everything that is kept on the way is bounded: of many attempts the first and the last, of stalls the longest, of gaps and sizes only
how they are distributed, of the rest a timeline in at most 200 steps. So the trace of a stream of a million events is as small
as that of a stream of a hundred, and costs no more memory to make.
"""

from __future__ import annotations

import heapq
import math
from collections import deque
from collections.abc import Mapping
from typing import Any

import msgspec

from supervisor.observe.distribution import Distribution, Percentiles
from supervisor.stores import Event
from supervisor.streams import Outcome

__all__ = ["Timeline", "Trace", "TraceAttempt", "TraceMark", "TraceRange", "TraceStall", "TraceTimeline"]

MAX_ENDS = 50
"""Attempts kept from either end."""
MAX_STALLS = 50
MAX_MARKS = 100
MAX_STEPS = 200
_MAX_DETAILS_BYTES = 2048  # of an attempt's or mark's details; longer ones are left out
_TOGETHER_MS = 1.0
_LEAST_STALL_MS, _MOST_STALL_MS = 250.0, 5000.0
_STALL_GAPS = 10  # how many median gaps a stall is
_STEPS = (1, 2, 5)


class _Told(msgspec.Struct, frozen=True, kw_only=True):
    """The base of what is told."""


class TraceAttempt(_Told, frozen=True, kw_only=True):
    """One connection."""

    attempt: int
    rung: str | None
    """How it went on from the one before it; null: it was the first."""
    upstream: str | None
    from_ms: float
    first_event_ms: float | None
    """Null: it got none."""
    to_ms: float
    """When it was over: then the wait for the next one began, or the stream ended."""
    events: int
    bytes: int
    """Payloads."""
    first_seq: int | None
    last_seq: int | None
    withdrawn: bool
    """Whether what it received is no longer part of the answer."""
    delay_ms: float
    """How long was waited before it."""
    cause: str | None
    """Why there had to be one more."""
    details: dict[str, Any]
    """What else its record says."""


class TraceStall(_Told, frozen=True, kw_only=True):
    """A gap in which nothing came."""

    from_ms: float
    to_ms: float
    ms: float
    attempt: int | None
    after_seq: int


class TraceMark(_Told, frozen=True, kw_only=True):
    """An event that is no part of the answer: a `note`, `skipped` or `withdrawn`."""

    at_ms: float
    kind: str
    seq: int
    details: dict[str, Any]


class TraceTimeline(_Told, frozen=True, kw_only=True):
    """What came in each step, from the start on; at most 200."""

    step_ms: float
    events: tuple[int, ...]
    bytes: tuple[int, ...]


class TraceRange(_Told, frozen=True, kw_only=True):
    """Positions of a journal, both ends included."""

    first: int
    last: int


class Trace(_Told, frozen=True, kw_only=True):
    """What happened when in one stream. Times that end in `_ms` are milliseconds since its start."""

    id: str
    key: str | None
    state: str
    reason: str | None
    tenant: str | None
    upstream: str | None
    dialect: str
    model: str | None
    """As it was asked for."""
    labels: dict[str, str]
    started_at: float
    ended: bool
    duration_ms: float
    """Until its end, or until now; of an interrupted stream until its last event, for nobody knows more."""
    first_event_ms: float | None
    deadlines: dict[str, float | None]
    """The clocks that it runs by; null: turned off."""
    events: int
    bytes: int
    """Payloads, as are those of attempts and of the timeline: of what was looked at (`left_out`)."""
    skipped: int
    arrivals: int
    """Events that came within 1 ms of each other counted as one: about how many reads of the socket they took."""
    attempts: tuple[TraceAttempt, ...]
    """The first 50 and the last 50."""
    attempts_left_out: int
    gap_ms: Percentiles
    """Between two events of one attempt."""
    event_bytes: Percentiles
    """Of an event's payload."""
    stall_from_ms: float
    """How long a gap must be to be a stall: ten times the median gap, from 250 ms to 5 s."""
    stalls: tuple[TraceStall, ...]
    """The 50 longest, in order of time."""
    stalls_left_out: int
    marks: tuple[TraceMark, ...]
    """The first 100."""
    marks_left_out: int
    timeline: TraceTimeline
    outcome: Outcome | None
    """As the stream's; null until it is durable."""
    left_out: tuple[TraceRange, ...]
    """What was not looked at: retention has removed it, or the journal is too long."""


class _Attempt:
    """An attempt as it is read."""

    __slots__ = (
        "bytes",
        "events",
        "first_ms",
        "first_seq",
        "from_ms",
        "last_seq",
        "record",
        "to_ms",
        "withdrawn",
    )

    def __init__(self, from_ms: float, record: Mapping[str, Any]) -> None:
        self.from_ms, self.record = from_ms, record
        self.to_ms: float | None = None
        self.first_ms: float | None = None
        self.first_seq: int | None = None
        self.last_seq: int | None = None
        self.events = self.bytes = 0
        self.withdrawn = False

    def told(self, until_ms: float) -> TraceAttempt:
        record = self.record
        return TraceAttempt(
            attempt=int(record.get("attempt", 0)),
            rung=record.get("rung"),
            upstream=record.get("upstream"),
            from_ms=_ms(self.from_ms),
            first_event_ms=None if self.first_ms is None else _ms(self.first_ms),
            to_ms=_ms(until_ms if self.to_ms is None else self.to_ms),
            events=self.events,
            bytes=self.bytes,
            first_seq=self.first_seq,
            last_seq=self.last_seq,
            withdrawn=self.withdrawn,
            delay_ms=_ms(_waited_ms(record)),
            cause=record.get("cause"),
            details={name: value for name, value in record.items() if name not in _SHOWN},
        )


_SHOWN = ("attempt", "rung", "upstream", "delay_s", "cause")


class Timeline:
    """Takes the events of a journal in order, and keeps what a trace tells of them.

    duration_ms: until the end, or until now: what the timeline is divided by.
    """

    def __init__(self, *, started_at: float, duration_ms: float) -> None:
        self._started_at = started_at
        self._duration_ms = duration_ms
        self._step_ms = _step(duration_ms)
        self._steps = max(1, min(MAX_STEPS, math.ceil(duration_ms / self._step_ms)))
        self._now_ms = 0.0
        self._last_ms: float | None = None  # of the last event of this attempt
        self._head: list[_Attempt] = []
        self._tail: deque[_Attempt] = deque(maxlen=MAX_ENDS)
        self._attempts = 0
        self._current: _Attempt | None = None
        self._gaps, self._sizes = Distribution(), Distribution()
        self._longest: list[
            tuple[float, float, int, int | None]
        ] = []  # a heap: ms, from_ms, after_seq, attempt
        self._marks: list[TraceMark] = []
        self._marked = 0
        self._events = [0] * self._steps
        self._bytes = [0] * self._steps
        self.first_event_ms: float | None = None
        self.bytes = 0
        self.arrivals = 0

    def __repr__(self) -> str:
        return f"<Timeline of {self._gaps.count} gaps, {self._attempts} attempts>"

    def skip(self) -> None:
        """Take note that events have been left out: what lies between the two is no gap."""
        self._last_ms = None

    def take(self, event: Event) -> None:
        """Take one event."""
        # A wall clock may go back; time does not.
        at_ms = self._now_ms = max(self._now_ms, (event.at - self._started_at) * 1000)
        if event.kind == "data":
            self._data(event, at_ms)
        elif event.kind == "attempt":
            self._attempt(event, at_ms)
        elif event.kind != "outcome":
            self._mark(event, at_ms)

    def _data(self, event: Event, at_ms: float) -> None:
        size = len(event.payload)
        self.bytes += size
        self._sizes.add(size)
        step = min(int(at_ms / self._step_ms), self._steps - 1)
        self._events[step] += 1
        self._bytes[step] += size
        current = self._current
        if current is not None:
            current.events += 1
            current.bytes += size
            if current.first_ms is None:
                current.first_ms, current.first_seq = at_ms, event.seq
            current.last_seq = event.seq
        if self.first_event_ms is None:
            self.first_event_ms = _ms(at_ms)
        if self._last_ms is None:
            self.arrivals += 1
        else:
            gap_ms = at_ms - self._last_ms
            self._gaps.add(gap_ms)
            self.arrivals += gap_ms >= _TOGETHER_MS
            if gap_ms >= _LEAST_STALL_MS:
                self._stall(gap_ms, self._last_ms, event.seq - 1)
        self._last_ms = at_ms

    def _stall(self, gap_ms: float, from_ms: float, after_seq: int) -> None:
        number = None if self._current is None else self._current.record.get("attempt")
        found = (gap_ms, from_ms, after_seq, number)
        if len(self._longest) < MAX_STALLS:
            heapq.heappush(self._longest, found)
        else:
            heapq.heappushpop(self._longest, found)

    def _attempt(self, event: Event, at_ms: float) -> None:
        record = _record(event.payload)
        if self._current is not None:  # the wait before this one belongs to neither
            last_ms = self._current.from_ms if self._last_ms is None else self._last_ms
            self._current.to_ms = max(at_ms - _waited_ms(record), last_ms)
        if len(event.payload) > _MAX_DETAILS_BYTES:
            record = {name: value for name, value in record.items() if name in _SHOWN}
        self._current = _Attempt(at_ms, record)
        self._attempts += 1
        if len(self._head) < MAX_ENDS:
            self._head.append(self._current)
        else:
            self._tail.append(self._current)
        self._last_ms = None

    def _mark(self, event: Event, at_ms: float) -> None:
        details = _record(event.payload)
        if event.kind == "withdrawn":
            for attempt in (*self._head, *self._tail):
                attempt.withdrawn = attempt.events > 0
        elif event.kind == "skipped":
            details = {name: value for name, value in details.items() if name in ("why", "bytes")}
        elif len(event.payload) > _MAX_DETAILS_BYTES:
            details = {}
        self._marked += 1
        if len(self._marks) < MAX_MARKS:
            self._marks.append(TraceMark(at_ms=_ms(at_ms), kind=event.kind, seq=event.seq, details=details))

    # --- what came of it ---------------------------------------------------------------------------------------------

    @property
    def attempts(self) -> tuple[TraceAttempt, ...]:
        """The attempts kept."""
        return tuple(attempt.told(self._duration_ms) for attempt in (*self._head, *self._tail))

    @property
    def attempts_left_out(self) -> int:
        """How many are not."""
        return self._attempts - len(self._head) - len(self._tail)

    @property
    def gap_ms(self) -> Percentiles:
        """The gaps between events."""
        return self._gaps.percentiles()

    @property
    def event_bytes(self) -> Percentiles:
        """The sizes of payloads."""
        return self._sizes.percentiles()

    @property
    def stall_from_ms(self) -> float:
        """How long a gap must be to be a stall."""
        median = self._gaps.quantile(0.5) or 0.0
        return round(min(max(_LEAST_STALL_MS, _STALL_GAPS * median), _MOST_STALL_MS), 1)

    @property
    def stalls(self) -> tuple[TraceStall, ...]:
        """The longest stalls, in order of time."""
        least = self.stall_from_ms
        return tuple(
            TraceStall(
                from_ms=_ms(from_ms), to_ms=_ms(from_ms + ms), ms=_ms(ms), attempt=number, after_seq=seq
            )
            for ms, from_ms, seq, number in sorted(self._longest, key=lambda found: found[2])
            if ms >= least
        )

    @property
    def stalls_left_out(self) -> int:
        """How many stalls there were beside these, to within what a `Distribution` tells apart."""
        if len(self._longest) < MAX_STALLS:
            return 0
        return max(0, self._gaps.at_least(self.stall_from_ms) - len(self.stalls))

    @property
    def marks(self) -> tuple[TraceMark, ...]:
        """The marks kept."""
        return tuple(self._marks)

    @property
    def marks_left_out(self) -> int:
        """How many are not."""
        return self._marked - len(self._marks)

    @property
    def timeline(self) -> TraceTimeline:
        """What came in each step."""
        return TraceTimeline(step_ms=self._step_ms, events=tuple(self._events), bytes=tuple(self._bytes))


def _record(payload: bytes) -> dict[str, Any]:
    """Return what a record of the journal's own says; nothing of one that is not."""
    try:
        record = msgspec.json.decode(payload)
    except msgspec.DecodeError:
        return {}
    return record if isinstance(record, dict) else {}


def _waited_ms(record: Mapping[str, Any]) -> float:
    delay_s = record.get("delay_s")
    return 1000.0 * delay_s if isinstance(delay_s, int | float) else 0.0


def _step(duration_ms: float) -> float:
    """Return a round step of which at most 200 make up the duration; 1 ms at least."""
    least = max(duration_ms / MAX_STEPS, 1.0)
    power = 10.0 ** math.floor(math.log10(least))
    return next((step * power for step in _STEPS if step * power >= least), 10 * power)


def _ms(value: float) -> float:
    return round(value, 2)
