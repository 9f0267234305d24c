"""Streams that share limits: how many they are, what they hold, and which of them would go first.

A *pool* is a set of streams with two figures, kept where they change: a number and a sum of bytes. All live streams are one, those
of a tenant another, those that a `MemoryGroup` is about one more for each value; the streams that are ending, and the ended ones
in memory, are pools without limits. A stream is in few of them, knows which, and its bytes are in every one of them exactly.

**Order.** A pool has its streams in the order they came. Where a limit ends the least watched first, a heap has them by their number
of readers, and among equals by age; it changes when a reader comes or goes, never for an event. Those that have much to give up
are noted apart as they come to hold it (`HEAVY_BYTES`), so that nobody looks for them among those that have not.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Container, Iterator, Mapping
from itertools import islice
from typing import TYPE_CHECKING

import attrs

from supervisor.streams.clocks import LazyHeap
from supervisor.streams.spec import ANY, MemoryGroup, StreamSpec

if TYPE_CHECKING:
    from supervisor.streams.stream import Stream

__all__ = ["HEAVY_BYTES", "NEVER", "Bound", "Pool", "Pools"]

HEAVY_BYTES = 16 << 10
"""A stream that holds less has too little to spill."""
NEVER = 1 << 62
"""More bytes than there are."""


@attrs.frozen
class Bound:
    """A limit on a pool."""

    name: str
    """As the configuration has it."""
    limit: int
    action: str


class Pool:
    """Streams that share limits."""

    __slots__ = (
        "_by_watchers",
        "alarm",
        "bytes_bound",
        "count_bounds",
        "heavy",
        "nbytes",
        "of",
        "place",
        "streams",
    )

    def __init__(self, of: str = "", place: tuple[int, tuple[str, ...]] | str | None = None) -> None:
        self.of = of
        """Which streams these are, as messages go on after "live streams"."""
        self.place = place
        """Where `Pools` has it: the number and values of a group, or the name of a tenant."""
        self.streams: OrderedDict[str, Stream] = OrderedDict()
        self.nbytes = 0
        self.count_bounds: tuple[Bound, ...] = ()
        self.bytes_bound: Bound | None = None
        self.alarm = NEVER
        """Above so many bytes something must be done."""
        self.heavy: OrderedDict[str, Stream] = OrderedDict()
        self._by_watchers: LazyHeap[Stream] | None = None

    def __repr__(self) -> str:
        return f"<Pool{self.of}: {len(self.streams)} streams, {self.nbytes} bytes>"

    def __len__(self) -> int:
        return len(self.streams)

    def bind(self, *counts: Bound | None, nbytes: Bound | None) -> None:
        """Set the limits."""
        self.count_bounds = tuple(bound for bound in counts if bound is not None)
        self.bytes_bound = nbytes
        self.alarm = NEVER if nbytes is None or nbytes.action == "reject" else nbytes.limit
        if any(
            bound.action == "reap_least_watched" for bound in (*self.count_bounds, *filter(None, [nbytes]))
        ):
            self.rank()

    def rank(self) -> None:
        """Keep an order of the least watched from now on."""
        if self._by_watchers is None:
            self._by_watchers = LazyHeap()
            for stream in self.streams.values():
                self.watched(stream)

    def add(self, stream: Stream) -> None:
        """Take in a stream with what it holds."""
        self.streams[stream.id] = stream
        self.nbytes += stream.bytes_held
        self.watched(stream)

    def remove(self, stream: Stream) -> None:
        """Take a stream out with what it holds."""
        del self.streams[stream.id]
        self.nbytes -= stream.bytes_held
        self.heavy.pop(stream.id, None)
        if self._by_watchers is not None:
            self._by_watchers.discard(stream)

    def watched(self, stream: Stream) -> None:
        """Take note that a stream has more or fewer readers."""
        if self._by_watchers is not None:
            self._by_watchers.discard(stream)
            self._by_watchers.arm(stream, stream.readers, stream.number)

    def first(self, action: str, skip: Container[str], count: int) -> list[Stream]:
        """Return the `count` that are to go first, in turn, leaving out `skip`."""
        if action != "reap_least_watched" or self._by_watchers is None:
            return list(islice((one for one in self.streams.values() if one.id not in skip), count))
        found: list[Stream] = []
        looked: list[Stream] = []
        for stream in self._by_watchers.pop_due(NEVER):
            looked.append(stream)
            if stream.id not in skip:
                found.append(stream)
                if len(found) == count:
                    break
        for stream in looked:
            self.watched(stream)
        return found


class Pools:
    """The pools of tenants and groups, each there for as long as it has streams."""

    def __init__(self, groups: tuple[MemoryGroup, ...]) -> None:
        self._groups = groups
        self._pools: dict[tuple[int, tuple[str, ...]], Pool] = {}
        self.tenants: dict[str, Pool] = {}

    def of(self, spec: StreamSpec) -> list[Pool]:
        """Return the pools that a stream of this description would be in, those that there are."""
        places = self._places(spec)
        return [self._pools[place] for place in places if place in self._pools]

    def join(self, stream: Stream, spec: StreamSpec) -> tuple[Pool, ...]:
        """Put a stream into its pools, and return them."""
        pools = []
        for number, values in self._places(spec):
            pool = self._pools.get((number, values))
            if pool is None:
                pool = self._pools[number, values] = self._made(number, values)
            pools.append(pool)
        if spec.tenant is not None:
            pools.append(self.tenants.setdefault(spec.tenant, Pool(place=spec.tenant)))
        for pool in pools:
            pool.add(stream)
        return tuple(pools)

    def leave(self, stream: Stream, pools: tuple[Pool, ...]) -> None:
        """Take a stream out of the pools that `join` returned, whatever its labels say by now; those that are empty go."""
        for pool in pools:
            pool.remove(stream)
            if pool.streams:
                continue
            if isinstance(pool.place, tuple):
                del self._pools[pool.place]
            elif pool.place is not None:
                del self.tenants[pool.place]

    def __iter__(self) -> Iterator[Pool]:
        return iter(self._pools.values())

    def _places(self, spec: StreamSpec) -> list[tuple[int, tuple[str, ...]]]:
        return [
            (number, values)
            for number, group in enumerate(self._groups)
            if (values := _values(group, spec.tenant, spec.labels)) is not None
        ]

    def _made(self, number: int, values: tuple[str, ...]) -> Pool:
        group = self._groups[number]
        names = ["the tenant", *group.labels] if group.tenant is not None else list(group.labels)
        told = ", ".join(f"{name} {value!r}" for name, value in zip(names, values, strict=True))
        pool = Pool(f" of {told}", (number, values))
        where = f"groups[{number}]"
        pool.bind(
            None
            if group.max_count is None
            else Bound(f"{where}.max_count", group.max_count, group.at_max_count),
            nbytes=None
            if group.max_bytes is None
            else Bound(f"{where}.max_bytes", group.max_bytes, group.at_max_bytes),
        )
        return pool


def _values(group: MemoryGroup, tenant: str | None, labels: Mapping[str, str]) -> tuple[str, ...] | None:
    """Return the values that make a stream one of a group's; None if it is none of them."""
    wanted = [(group.tenant, tenant)] if group.tenant is not None else []
    wanted += [(value, labels.get(name)) for name, value in group.labels.items()]
    if any(have is None or want not in (ANY, have) for want, have in wanted):
        return None
    return tuple(str(have) for _, have in wanted)
