"""The last hour, minute by minute.

Sixty minutes at most are kept, each with counts and distributions of a bounded size, whatever happens in them. A minute begins with
the first thing that is told in it; of one in which nothing happened there is nothing. A clock that goes back adds to the newest.
"""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence

import attrs

from supervisor.observe.distribution import Distribution

__all__ = ["MINUTES", "Error", "Minute", "Window"]

MINUTES = 60
_MAX_ERRORS = 64  # kinds of errors told apart within one minute
_MAX_MESSAGE_CHARS = 300


@attrs.frozen
class ErrorKey:
    """What makes two endings the same error."""

    state: str
    reason: str
    kind: str | None
    upstream: str | None


@attrs.define
class Error:
    """How often a kind of error was met, and the last of them."""

    count: int = 0
    last_at: float = 0.0
    last_id: str = ""
    last_message: str = ""

    def update(self, other: Error) -> None:
        """Add another one, of the same kind."""
        self.count += other.count
        if other.last_at >= self.last_at:
            self.last_at, self.last_id, self.last_message = other.last_at, other.last_id, other.last_message


@attrs.define(eq=False)
class Minute:
    """What was told in one minute."""

    number: int
    """Minutes since the Unix epoch."""
    started: int = 0
    retried: int = 0
    ended: Counter[str] = attrs.field(factory=Counter)
    duration_s: Distribution = attrs.field(factory=Distribution)
    first_event_s: Distribution = attrs.field(factory=Distribution)
    events: Distribution = attrs.field(factory=Distribution)
    bytes: Distribution = attrs.field(factory=Distribution)
    output_tokens: Distribution = attrs.field(factory=Distribution)
    errors: dict[ErrorKey, Error] = attrs.field(factory=dict)
    live: int | None = None
    bytes_held: int | None = None
    process_bytes: int | None = None
    records: int | None = None

    def failed(self, key: ErrorKey, *, at: float, stream_id: str, message: str) -> None:
        """Count an error; kinds beyond the first 64 of a minute as one."""
        if key not in self.errors and len(self.errors) >= _MAX_ERRORS:
            key = ErrorKey(key.state, "other", None, None)
        error = self.errors.setdefault(key, Error())
        error.update(Error(1, at, stream_id, message[:_MAX_MESSAGE_CHARS]))

    def saw(self, *, live: int, bytes_held: int, process_bytes: int | None, records: int) -> None:
        """Take note of figures as they were at a moment: the most is kept, and of `records` the sum."""
        self.live = max(live, self.live or 0)
        self.bytes_held = max(bytes_held, self.bytes_held or 0)
        if process_bytes is not None:
            self.process_bytes = max(process_bytes, self.process_bytes or 0)
        self.records = (self.records or 0) + records


class Window:
    """The last hour."""

    __slots__ = ("_clock", "_minutes")

    def __init__(self, clock: Callable[[], float] = time.time) -> None:
        self._clock = clock
        self._minutes: deque[Minute] = deque(maxlen=MINUTES)

    def __repr__(self) -> str:
        return f"<Window of {len(self._minutes)} minutes>"

    @property
    def now(self) -> Minute:
        """The current minute."""
        number = int(self._clock() // 60)
        if not self._minutes or number > self._minutes[-1].number:
            self._minutes.append(Minute(number))
        return self._minutes[-1]

    def __iter__(self) -> Iterator[Minute]:
        """Give the minutes of the last hour in which anything was told, the oldest first."""
        oldest = self.first
        return iter([minute for minute in self._minutes if minute.number >= oldest])

    @property
    def first(self) -> int:
        """The number of the oldest minute of the hour; the current one is its last."""
        newest = int(self._clock() // 60)
        if self._minutes:
            newest = max(newest, self._minutes[-1].number)
        return newest - MINUTES + 1

    def merged(self) -> Minute:
        """Return the hour as if it had been one minute; of what is not a sum (`live` and the like) it has nothing."""
        whole = Minute(self.first)
        for minute in self:
            whole.started += minute.started
            whole.retried += minute.retried
            whole.ended.update(minute.ended)
            for name in _DISTRIBUTIONS:
                getattr(whole, name).update(getattr(minute, name))
            for key, error in minute.errors.items():
                whole.errors.setdefault(key, Error()).update(error)
        return whole


_DISTRIBUTIONS: Sequence[str] = ("duration_s", "first_event_s", "events", "bytes", "output_tokens")
