"""The memory manager: ends streams that are too old, stale, too many or too big, always with a recorded reason.

It owns the policy and the account of bytes; it ends a stream only through the seal, like everybody else, so a stream that
completes in the same instant is completed.

**Order.** Rules are applied in the order age, staleness, bytes of one stream, count, bytes in all; a stream is taken by the
first that applies. Where a rule needs *some* stream to go (count, bytes in all) it is the oldest.

**Cost.** Streams are kept in the order they were started, so age and count look only at those they take. Staleness uses the
same lazy heap as the clocks: a stream is looked at once per `stale_s`, not once per sweep. Bytes are accounted where they
change, and only a stream over its own limit is looked at. A sweep that finds nothing costs the same with ten streams or ten
thousand. Ending streams is done in slices, for sealing thousands in one go would hold up everybody's events.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

import attrs
import trio

from supervisor.streams.clocks import LazyHeap
from supervisor.streams.spec import MemoryPolicy

if TYPE_CHECKING:
    from supervisor.streams.stream import Stream

__all__ = ["MemoryManager", "MemoryStatistics", "ReapReport", "Reaped"]

SLICE = 64
"""Streams sealed between two checkpoints, wherever many are ended together."""


@attrs.frozen(kw_only=True)
class Reaped:
    """One stream that was reaped, or would be."""

    id: str
    key: str | None
    reason: str
    message: str
    age_s: float
    idle_s: float
    bytes_held: int
    settled: bool = False
    """Whether its outcome was durable when this was told; until then a crash could still make it `interrupted`."""


@attrs.frozen(kw_only=True)
class ReapReport:
    """What a sweep did. With `dry_run` nothing was ended."""

    dry_run: bool
    live: int
    """Live streams before the sweep."""
    reaped: tuple[Reaped, ...]


@attrs.frozen(kw_only=True)
class MemoryStatistics:
    """The memory manager's figures at one moment."""

    bytes_held: int
    sweeps: int
    reaped: Mapping[str, int]
    """Outcomes by reason, since the start."""


class MemoryManager:
    """Applies a `MemoryPolicy` to the live streams, which it is given as a mapping in the order they were started."""

    def __init__(self, policy: MemoryPolicy, live: Mapping[str, Stream]) -> None:
        self.policy = policy
        self._live = live
        self._stale: LazyHeap[Stream] = LazyHeap()
        self._oversize: dict[str, Stream] = {}
        self._bytes_held = 0
        self._sweeps = 0
        self._reaped: dict[str, int] = {}
        self._wake = trio.Event()

    def __repr__(self) -> str:
        return f"<MemoryManager {len(self._live)} live, {self._bytes_held} bytes, {sum(self._reaped.values())} reaped>"

    # --- the account -------------------------------------------------------------------------------------------------

    def admitted(self, stream: Stream) -> None:
        """Take note of a new stream, and look at the limits soon."""
        if self.policy.stale_s is not None:
            self._stale.arm(stream, stream.last_event_at + self.policy.stale_s)
        if self.policy.max_count is not None and len(self._live) > self.policy.max_count:
            self._wake.set()

    def account(self, stream: Stream, change: int) -> None:
        """Take note that a stream holds more or fewer bytes, before it says so in `bytes_held`."""
        self._bytes_held += change
        policy = self.policy
        if policy.max_stream_bytes is not None and stream.bytes_held + change > policy.max_stream_bytes:
            self._oversize[stream.id] = stream
            self._wake.set()
        elif policy.max_bytes is not None and self._bytes_held > policy.max_bytes:
            self._wake.set()

    def gone(self, stream: Stream) -> None:
        """Take note that a stream has been sealed."""
        self._stale.discard(stream)
        self._oversize.pop(stream.id, None)
        self._bytes_held -= stream.bytes_held

    def statistics(self) -> MemoryStatistics:
        """Return the manager's figures."""
        return MemoryStatistics(
            bytes_held=self._bytes_held, sweeps=self._sweeps, reaped=dict(sorted(self._reaped.items()))
        )

    # --- the sweep ---------------------------------------------------------------------------------------------------

    async def run(self) -> None:
        """Sweep periodically, and whenever an admission or an event takes the streams over a limit, until cancelled."""
        while True:
            with trio.move_on_after(self.policy.sweep_every_s):
                await self._wake.wait()
            self._wake = trio.Event()
            await self.sweep()

    async def sweep(self, *, dry_run: bool = False, wait_s: float = 0.0) -> ReapReport:
        """Reap what the policy says, in slices, and wait at most `wait_s` for the outcomes.

        With `dry_run` only say what would go. Cancelling it ends nothing half-way.
        """
        live = len(self._live)
        self._sweeps += not dry_run
        reaped: list[Reaped] = []
        await trio.lowlevel.checkpoint()
        chosen = list(self.candidates(trio.current_time()))
        ended: list[Stream] = []
        for done, (stream, reason, message) in enumerate(chosen, start=1):
            entry = self._entry(stream, reason, message)
            if dry_run or stream.reaped(reason, message):
                reaped.append(entry)
                ended.append(stream)
            if done % SLICE == 0:
                await trio.lowlevel.checkpoint()
        if ended and wait_s > 0 and not dry_run:
            with trio.move_on_after(wait_s):
                for stream in ended:
                    await stream.settled()
            reaped = [
                attrs.evolve(entry, settled=stream.outcome is not None)
                for entry, stream in zip(reaped, ended, strict=True)
            ]
        return ReapReport(dry_run=dry_run, live=live, reaped=tuple(reaped))

    def count(self, reason: str) -> None:
        """Count an outcome, if it was a reap."""
        if reason.startswith("reaped_"):
            self._reaped[reason] = self._reaped.get(reason, 0) + 1

    def candidates(self, now: float) -> Iterator[tuple[Stream, str, str]]:
        """Yield who is to go and why, each stream once, in the order of the rules. Changes nothing."""
        policy, taken, freed = self.policy, set[str](), 0
        for stream, reason, message in self._by_own_limits(now):
            if stream.id not in taken:
                taken.add(stream.id)
                freed += stream.bytes_held
                yield stream, reason, message
        surplus = math.inf if policy.max_count is None else policy.max_count
        remaining = len(self._live) - len(taken)
        excess = 0 if policy.max_bytes is None else self._bytes_held - freed - policy.max_bytes
        if remaining <= surplus and excess <= 0:
            return
        for stream in self._live.values():  # oldest first, and no further than needed
            if stream.id in taken:
                continue
            if remaining > surplus:
                yield (
                    stream,
                    "reaped_count",
                    f"{len(self._live)} streams are live; the limit is {policy.max_count}",
                )
            elif excess > 0:
                yield (
                    stream,
                    "reaped_bytes",
                    f"{self._bytes_held} bytes are held; the limit is {policy.max_bytes}",
                )
            else:
                return
            remaining -= 1
            excess -= stream.bytes_held

    def _by_own_limits(self, now: float) -> Iterator[tuple[Stream, str, str]]:
        policy = self.policy
        if policy.max_age_s is not None:
            for stream in self._live.values():
                age = now - stream.started
                if age < policy.max_age_s:
                    break
                yield stream, "reaped_age", f"{age:.3f} s old; the limit is {policy.max_age_s:g} s"
        if policy.stale_s is not None:
            due = list(self._stale.pop_due(now))
            for stream in due:
                self._stale.arm(
                    stream, max(stream.last_event_at + policy.stale_s, math.nextafter(now, math.inf))
                )
            for stream in due:
                idle = now - stream.last_event_at
                if idle >= policy.stale_s:
                    yield (
                        stream,
                        "reaped_stale",
                        f"no event for {idle:.3f} s; the limit is {policy.stale_s:g} s",
                    )
        for stream in self._oversize.values():
            yield (
                stream,
                "reaped_bytes",
                f"it holds {stream.bytes_held} bytes; the limit is {policy.max_stream_bytes}",
            )

    def _entry(self, stream: Stream, reason: str, message: str) -> Reaped:
        now = trio.current_time()
        return Reaped(
            id=stream.id,
            key=stream.key,
            reason=reason,
            message=message,
            age_s=now - stream.started,
            idle_s=now - stream.last_event_at,
            bytes_held=stream.bytes_held,
        )
