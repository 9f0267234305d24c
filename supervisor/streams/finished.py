"""Ended streams that are kept in memory, and with them the keys they hold: bounded by number, bytes and age.

Their events are in the store; what is kept here is the answer, so that a repeated start is told what the first came to, and whoever
asks soon is answered without a read. They are the first to go when memory is short.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from supervisor.streams.pools import Pool
from supervisor.streams.spec import Limits

if TYPE_CHECKING:
    from supervisor.streams.stream import Stream

__all__ = ["Finished"]


class Finished:
    """Ended streams by id, in the order in which they ended. `dropped` is called with each that leaves."""

    def __init__(self, limits: Limits, dropped: Callable[[Stream], None]) -> None:
        self._limits = limits
        self._dropped = dropped
        self._since: dict[str, float] = {}
        self.pool = Pool()

    def __repr__(self) -> str:
        return f"<Finished: {len(self.pool)} streams, {self.pool.nbytes} bytes>"

    def __len__(self) -> int:
        return len(self.pool)

    @property
    def bytes_held(self) -> int:
        """What they hold in memory."""
        return self.pool.nbytes

    def keep(self, stream: Stream, now: float) -> None:
        """Take one in; the oldest make room, though never for the last."""
        self._since[stream.id] = now
        stream.pools = (self.pool,)
        self.pool.add(stream)
        self.expire(now)
        limits = self._limits
        while len(self.pool) > limits.max_finished or (
            self.pool.nbytes > limits.max_finished_bytes and len(self.pool) > 1
        ):
            self._drop_oldest()

    def expire(self, now: float, most: int | None = None) -> int:
        """Let go of those that were kept long enough, of `most` at most; return how many."""
        keep_s, gone = self._limits.finished_s, 0
        while keep_s is not None and self.pool.streams and gone != most:
            if now - self._since[next(iter(self.pool.streams))] <= keep_s:
                break
            self._drop_oldest()
            gone += 1
        return gone

    def spare(self, nbytes: int, most: int) -> int:
        """Give up the oldest until they held `nbytes`, of `most` at most; return how many."""
        gone, until = 0, self.pool.nbytes - nbytes
        while self.pool.streams and self.pool.nbytes > max(until, 0) and gone != most:
            self._drop_oldest()
            gone += 1
        return gone

    def _drop_oldest(self) -> None:
        stream = next(iter(self.pool.streams.values()))
        self.pool.remove(stream)
        stream.pools = ()
        del self._since[stream.id]
        self._dropped(stream)
