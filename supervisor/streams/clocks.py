"""Deadlines for thousands of streams from one task.

A timeout object per event would cost more than the event (`trio.fail_after` ~7 µs, moving a deadline ~2 µs, against
under 1 µs for reading an event), and a task per stream would wake thousands of times for nothing. So an event only writes a
timestamp (`Clocks.touched`), and one watchdog task looks at a heap that is *lazy*: an entry is a promise to look at the
stream no later than then. When it comes due the real deadline is worked out from the timestamps; if it has moved on, which
is the normal case, the entry is put back at the new time. Each stream has one entry, and a deadline that moves *earlier*
(a phase with a shorter clock begins) replaces it.

Prior art: the hashed and hierarchical timing wheels of Varghese & Lauck (1987) do the same in O(1) with a fixed
resolution; a heap with lazy entries needs no tick, and an idle supervisor sleeps.
"""

from __future__ import annotations

import heapq
import itertools
import math
from collections.abc import Callable, Iterator
from typing import Generic, Literal, TypeVar

import trio

from supervisor.streams.spec import Deadlines

__all__ = ["ClockKind", "Clocks", "LazyHeap", "Phase", "Watchdog"]

T = TypeVar("T")
Phase = Literal["connect", "first_event", "idle"]
ClockKind = Literal["connect", "first_event", "idle", "total", "drain", "detach", "cleanup"]
_NEVER = math.inf


class Clocks:
    """The deadlines of one stream, in trio's clock."""

    __slots__ = ("_deadlines", "_due", "_held", "_phase", "_total_at", "touched")

    def __init__(self, deadlines: Deadlines, now: float) -> None:
        self._deadlines = deadlines
        self._total_at = now + _seconds(deadlines.total_s)
        self._phase: Phase | None = None
        self._held = 0
        self._due: dict[ClockKind, float] = {}  # drain, detach and cleanup, while they run
        self.touched = now
        """When the upstream last showed life: all that an event writes."""

    def begin(self, phase: Phase | None, now: float) -> None:
        """Start the clock of a phase, in place of the one before. None: only the total clock runs."""
        self._phase = phase
        self.touched = now

    def hold(self, now: float) -> None:
        """Rest the phase's clock until as many `release`."""
        self._held += 1
        self.touched = now

    def release(self, now: float) -> None:
        """End one `hold`; after the last the phase's clock starts anew."""
        self._held -= 1
        self.touched = now

    def set(self, kind: Literal["drain", "detach", "cleanup"], due: float | None) -> None:
        """Set a single deadline, or take it away."""
        if due is None:
            self._due.pop(kind, None)
        else:
            self._due[kind] = due

    def shorten(self, kind: Literal["drain", "detach", "cleanup"], due: float) -> None:
        """Set a single deadline, unless an earlier one is set."""
        self._due[kind] = min(due, self._due.get(kind, _NEVER))

    def stop(self) -> None:
        """Turn every clock off."""
        self._phase = None
        self._total_at = _NEVER
        self._due.clear()

    def next_due(self) -> tuple[float, ClockKind]:
        """Return the earliest deadline and its kind; infinity if none runs."""
        due, kind = self._total_at, "total"
        if self._phase is not None and not self._held:
            limit = self._phase_limit()
            if self.touched + limit < due:
                due, kind = self.touched + limit, self._phase
        for other, at in self._due.items():
            if at < due:
                due, kind = at, other
        return due, kind  # type: ignore[return-value]  # mypy widens the literals bound in the branches to str

    def _phase_limit(self) -> float:
        if self._phase == "connect":
            return _seconds(self._deadlines.connect_s)
        if self._phase == "first_event":
            return _seconds(self._deadlines.first_event_s)
        return _seconds(self._deadlines.idle_s)


def _seconds(value: float | None) -> float:
    return _NEVER if value is None else value


class LazyHeap(Generic[T]):
    """Items to look at no later than a time. Arming, discarding and popping cost O(log n), amortised."""

    __slots__ = ("_dead", "_entries", "_heap", "_order")

    def __init__(self) -> None:
        self._heap: list[list[float | int | T | None]] = []
        self._entries: dict[T, list[float | int | T | None]] = {}
        self._order = itertools.count()
        self._dead = 0

    def __len__(self) -> int:
        return len(self._entries)

    def arm(self, item: T, due: float, rank: int = 0) -> bool:
        """Look at `item` by `due`, if no earlier look is promised. True if the earliest time of all may have changed.

        Of those due at the same time the one of the lowest `rank` is first, and among equals the one that was armed first.
        """
        entry = self._entries.get(item)
        if entry is not None:
            if entry[0] <= due:  # type: ignore[operator]  # entry[0] is the time
                return False
            self._kill(entry)
        if due == _NEVER:
            return False
        entry = [due, rank, next(self._order), item]
        self._entries[item] = entry
        heapq.heappush(self._heap, entry)
        return self._heap[0] is entry

    def discard(self, item: T) -> None:
        """Forget `item`, and hold no reference to it from now on."""
        entry = self._entries.pop(item, None)
        if entry is not None:
            self._kill(entry)
            if self._dead > 64 and self._dead * 2 > len(self._heap):
                self._heap = [live for live in self._heap if live[3] is not None]
                heapq.heapify(self._heap)
                self._dead = 0

    def next_due(self) -> float:
        """Return the earliest time at which something is to be looked at; infinity if nothing is."""
        while self._heap and self._heap[0][3] is None:
            heapq.heappop(self._heap)
            self._dead -= 1
        return self._heap[0][0] if self._heap else _NEVER  # type: ignore[return-value]  # the time

    def pop_due(self, now: float) -> Iterator[T]:
        """Yield the items whose time has come, earliest first; each must be armed again to be looked at again."""
        while self.next_due() <= now:
            item: T = heapq.heappop(self._heap)[3]  # type: ignore[assignment]  # a live entry holds its item
            del self._entries[item]
            yield item

    def _kill(self, entry: list[float | int | T | None]) -> None:
        entry[3] = None
        self._dead += 1


class Watchdog(Generic[T]):
    """The one task that keeps every stream's clocks.

    `clocks_of` gives an item's clocks and `expire` is called, synchronously, with an item and the kind that ran out.
    """

    def __init__(self, clocks_of: Callable[[T], Clocks], expire: Callable[[T, ClockKind], None]) -> None:
        self._clocks_of = clocks_of
        self._expire = expire
        self._heap: LazyHeap[T] = LazyHeap()
        self._sleep: trio.CancelScope | None = None

    def __repr__(self) -> str:
        return f"<Watchdog of {len(self._heap)}>"

    def __len__(self) -> int:
        return len(self._heap)

    def arm(self, item: T) -> None:
        """Take note that an item's clocks may come due earlier than they did."""
        due, _ = self._clocks_of(item).next_due()
        if self._heap.arm(item, due) and self._sleep is not None and due < self._sleep.deadline:
            self._sleep.deadline = due

    def discard(self, item: T) -> None:
        """Watch the item no more."""
        self._heap.discard(item)

    async def run(self, *, slice_size: int = 64) -> None:
        """Expire what comes due, at most `slice_size` between two checkpoints, until cancelled."""
        while True:
            with trio.CancelScope(deadline=self._heap.next_due()) as self._sleep:
                await trio.sleep_forever()
            self._sleep = None
            now = trio.current_time()
            for done, item in enumerate(self._heap.pop_due(now), start=1):
                due, kind = self._clocks_of(item).next_due()
                if due <= now:
                    self._expire(item, kind)
                self._heap.arm(item, self._clocks_of(item).next_due()[0])
                if done % slice_size == 0:
                    await trio.lowlevel.checkpoint()
