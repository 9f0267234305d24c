"""Cancels for keys that nobody has started yet: so that a Stop that overtakes its start is not lost.

Bounded by number (the oldest makes room) and by time; what is overdue goes with the next sweep of the memory manager.
"""

from __future__ import annotations

from collections import OrderedDict

import attrs

__all__ = ["Tombstone", "Tombstones"]

_OVERHEAD_BYTES = 300


@attrs.frozen
class Tombstone:
    """Who asked for the stop, and why."""

    expires: float
    actor: str | None
    reason: str

    @property
    def nbytes(self) -> int:
        """What it is accounted as, without its key."""
        return len(self.actor or "") + len(self.reason) + _OVERHEAD_BYTES


class Tombstones:
    """Tombstones by key, oldest first."""

    def __init__(self, *, max_count: int, keep_s: float) -> None:
        self._max_count = max_count
        self._keep_s = keep_s
        self._by_key: OrderedDict[str, Tombstone] = OrderedDict()
        self.bytes_held = 0
        """What they are accounted as."""

    def __repr__(self) -> str:
        return f"<Tombstones: {len(self._by_key)}>"

    def __len__(self) -> int:
        return len(self._by_key)

    def bury(self, key: str, *, actor: str | None, reason: str, now: float) -> None:
        """Leave a tombstone for a key, in place of the one it may have."""
        self._drop(key)
        self.expire(now)
        while len(self._by_key) >= self._max_count:
            self._drop(next(iter(self._by_key)))
        stone = self._by_key[key] = Tombstone(now + self._keep_s, actor, reason)
        self.bytes_held += len(key) + stone.nbytes

    def take(self, key: str, now: float) -> Tombstone | None:
        """Remove and return the tombstone of a key, unless it has none or that is overdue."""
        stone = self._drop(key)
        return stone if stone is not None and stone.expires > now else None

    def expire(self, now: float, most: int | None = None) -> int:
        """Let go of those that are overdue, of `most` at most; return how many."""
        gone = 0
        while self._by_key and gone != most:
            key = next(iter(self._by_key))
            if self._by_key[key].expires > now:
                break
            self._drop(key)
            gone += 1
        return gone

    def _drop(self, key: str) -> Tombstone | None:
        stone = self._by_key.pop(key, None)
        if stone is not None:
            self.bytes_held -= len(key) + stone.nbytes
        return stone
