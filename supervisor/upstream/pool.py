"""Connections that ended clean and wait for another request to the same origin.

httpcore's pool rescans all its connections on each event, which is quadratic in the number of streams. This one holds idle
connections only (a busy one belongs to its exchange), in two orders: per origin, newest first, because the newest is the
least likely to have been closed by the server meanwhile; and all together, oldest first, for the two bounds. Every
operation touches the ends of these orders alone, and each connection is expired once, so the cost is O(1), amortised.
Expiry is lazy: there is no timer, an overdue connection is closed by the next use of the pool.
"""

from __future__ import annotations

from collections import OrderedDict

from supervisor.upstream.connection import Connection, Origin

__all__ = ["IDLE_BYTES", "IdlePool"]

IDLE_BYTES = 16 << 10
"""What an idle connection is accounted as: most of it is the TLS library's, which does not tell."""


class IdlePool:
    """At most `max_count` idle connections, each for at most its own `keep_s` and `max_age_s` seconds."""

    __slots__ = ("_by_age", "_by_origin", "_max_age_s", "_max_count")

    def __init__(self, *, max_count: int, max_age_s: float) -> None:
        self._max_count = max_count
        self._max_age_s = max_age_s
        self._by_age: OrderedDict[Connection, float] = OrderedDict()
        self._by_origin: dict[Origin, OrderedDict[Connection, None]] = {}

    def __len__(self) -> int:
        return len(self._by_age)

    def take(self, origin: Origin, *, now: float) -> Connection | None:
        """Return the newest usable connection to `origin`, now the caller's, or None.

        One that is overdue, closed by the server, or has received anything while idle is closed on the way.
        """
        self._expire(now)
        waiting = self._by_origin.get(origin)
        while waiting:
            connection = next(reversed(waiting))
            expires_at = self._remove(connection)
            if expires_at > now and not connection.stale():
                return connection
            connection.close()
        return None

    def put(self, connection: Connection, *, now: float) -> None:
        """Keep an idle connection, closing the oldest if there are too many."""
        self._expire(now)
        self._by_age[connection] = now + min(self._max_age_s, connection.keep_s)
        self._by_origin.setdefault(connection.origin, OrderedDict())[connection] = None
        while len(self._by_age) > self._max_count:
            self._drop_oldest()

    @property
    def bytes_held(self) -> int:
        """What the idle connections are accounted as."""
        return len(self._by_age) * IDLE_BYTES

    def expire(self, now: float, most: int) -> int:
        """Close connections that are overdue, `most` at most, and return how many: for a supervisor's memory manager."""
        gone = 0
        while self._by_age and gone < most and self._by_age[next(iter(self._by_age))] <= now:
            self._drop_oldest()
            gone += 1
        return gone

    def spare(self, nbytes: int, most: int) -> int:
        """Close connections, the oldest first, until that was `nbytes`, `most` at most; return how many: as `expire`."""
        count = min(len(self._by_age), most, -(-nbytes // IDLE_BYTES))
        for _ in range(count):
            self._drop_oldest()
        return count

    def close(self) -> None:
        """Close every idle connection."""
        while self._by_age:
            self._drop_oldest()

    def _expire(self, now: float) -> None:
        while self._by_age:
            if self._by_age[next(iter(self._by_age))] > now:
                return
            self._drop_oldest()

    def _drop_oldest(self) -> None:
        connection = next(iter(self._by_age))
        self._remove(connection)
        connection.close()

    def _remove(self, connection: Connection) -> float:
        origin = connection.origin
        waiting = self._by_origin[origin]
        del waiting[connection]
        if not waiting:
            del self._by_origin[origin]
        return self._by_age.pop(connection)
