"""What a sweep of the memory manager is going to do: which streams are to go or to spill, and what the figures would be then.

A rule asks the plan, not the streams, how many there are and what they hold: so each goes on from what the rules before it have
decided, and a dry run, which does nothing of it, comes to the same list.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import attrs

from supervisor.streams.pools import Pool

if TYPE_CHECKING:
    from supervisor.streams.stream import Stream

__all__ = ["Act", "Plan"]


@attrs.frozen
class Act:
    """What is to be done to one stream, and why."""

    stream: Stream
    reason: str
    message: str


@attrs.define
class Plan:
    """What a sweep has decided on so far and not done yet: taken off all figures."""

    gone: set[str] = attrs.field(factory=set)
    spilled: set[str] = attrs.field(factory=set)
    counts: dict[Pool, int] = attrs.field(factory=dict)
    freed: dict[Pool, int] = attrs.field(factory=dict)
    spared: int = 0
    """Bytes that holders beside the streams would give up."""

    def reap(self, stream: Stream) -> None:
        """Have a live stream gone, with all that it still holds."""
        self.gone.add(stream.id)
        rest = self.held(stream)
        for pool in stream.pools:
            self.counts[pool] = self.counts.get(pool, 0) + 1
            self.freed[pool] = self.freed.get(pool, 0) + rest

    def spill(self, stream: Stream) -> None:
        """Have a stream hold less, and go on."""
        self.spilled.add(stream.id)
        freed = stream.spillable_bytes
        for pool in stream.pools:
            self.freed[pool] = self.freed.get(pool, 0) + freed

    def held(self, stream: Stream) -> int:
        """Return what a stream would hold."""
        return stream.bytes_held - (stream.spillable_bytes if stream.id in self.spilled else 0)

    def live(self, pool: Pool) -> int:
        """Return how many live streams a pool would have."""
        return len(pool) - self.counts.get(pool, 0)

    def nbytes(self, pool: Pool) -> int:
        """Return how many bytes a pool would hold."""
        return pool.nbytes - self.freed.get(pool, 0)
