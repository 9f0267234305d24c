"""Where each stream being written stands: what has been enqueued, what is durable, and who waits for it.

Both stores keep one `Position` for every stream without an outcome, and for an ended one until `forget`. This is what
makes misuse (an append after the end, a second end, a seq out of line) an error of the very call that commits it, at a
cost that depends on nothing but the call.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import attrs
import trio

from supervisor.errors import StoreError
from supervisor.stores.base import Event

__all__ = ["Position", "Positions"]

NOTHING_DURABLE = -1
"""`Position.durable` while not even the head is durable."""


@attrs.define(eq=False)
class Position:
    """How far one stream has been written."""

    stream_id: str
    number: int | None = None
    """The store's own short name for the stream, where it has one."""
    last_seq: int = 0
    """The last seq enqueued."""
    durable: int = NOTHING_DURABLE
    """The last seq known to be durable; 0 is the head."""
    nbytes: int = 0
    """What has been written of it, in bytes, where the store counts them."""
    ended: bool = False
    forgotten: bool = False
    error: StoreError | None = None
    """Why this stream can never be written: a fault of its records, not of the store."""
    changed: trio.Event | None = None
    """Set, and replaced, when `durable` or `error` changes; None while nobody waits."""

    async def wait_changed(self) -> None:
        """Wait until `durable` or `error` changes. A cancel leaves nothing behind."""
        if self.changed is None:
            self.changed = trio.Event()
        await self.changed.wait()

    def wake(self) -> None:
        """Wake who waits in `wait_changed`."""
        if self.changed is not None:
            self.changed.set()
            self.changed = None


@attrs.define(eq=False)
class Positions:
    """The positions of the streams that are being written."""

    _by_id: dict[str, Position] = attrs.field(factory=dict, init=False)

    def __iter__(self) -> Iterator[Position]:
        return iter(self._by_id.values())

    def __len__(self) -> int:
        return len(self._by_id)

    def get(self, stream_id: str) -> Position | None:
        """Return the position of a stream, None if it has none (any more)."""
        return self._by_id.get(stream_id)

    def adopt(self, position: Position) -> None:
        """Take in a stream that an earlier run has left without an outcome."""
        self._by_id[position.stream_id] = position

    def create(self, stream_id: str) -> Position:
        """Begin a stream. Raises StoreError if it is being written already."""
        if stream_id in self._by_id:
            raise StoreError(f"stream {stream_id}: created twice; the second changed nothing")
        position = self._by_id[stream_id] = Position(stream_id)
        return position

    def append(self, stream_id: str, events: Sequence[Event]) -> Position:
        """Advance a stream by events. Raises StoreError, and changes nothing, if they do not follow on."""
        position = self._by_id.get(stream_id)
        if position is None or position.ended or position.error is not None:
            position = self._writable(stream_id, "append")
        first, last = events[0].seq, events[-1].seq
        if first != position.last_seq + 1 or last != position.last_seq + len(events):
            raise StoreError(
                f"stream {stream_id}: append of seq {first} to {last} ({len(events)} events) does not follow "
                f"seq {position.last_seq}; nothing was written"
            )
        position.last_seq = last
        return position

    def end(self, stream_id: str, event: Event) -> Position:
        """Advance a stream by its last event. Raises StoreError, and changes nothing, if it cannot be the last."""
        position = self._writable(stream_id, "end")
        if event.seq != position.last_seq + 1:
            raise StoreError(
                f"stream {stream_id}: an outcome with seq {event.seq} does not follow seq {position.last_seq}; "
                f"nothing was written"
            )
        position.last_seq = event.seq
        position.ended = True
        return position

    def settle(self, position: Position, seq: int) -> None:
        """Record that everything up to `seq` is durable."""
        position.durable = seq
        position.wake()
        self._drop_if_done(position)

    def fail(self, position: Position, error: StoreError) -> None:
        """Record that a stream can never be written."""
        position.error = error
        position.wake()
        self._drop_if_done(position)

    def forget(self, stream_id: str) -> None:
        """Drop a position: now if its outcome is durable, else as soon as it is."""
        position = self._by_id.get(stream_id)
        if position is not None:
            position.forgotten = True
            self._drop_if_done(position)

    def refusal(self, stream_id: str) -> StoreError | None:
        """Return why a stream can never be written; None if it can, or has no position."""
        position = self._by_id.get(stream_id)
        return None if position is None else position.error

    def _drop_if_done(self, position: Position) -> None:
        done = position.ended and position.durable >= position.last_seq
        if position.forgotten and (done or position.error is not None):
            self._by_id.pop(position.stream_id, None)

    def _writable(self, stream_id: str, verb: str) -> Position:
        position = self._by_id.get(stream_id)
        if position is None:
            raise StoreError(
                f"stream {stream_id}: {verb} of a stream that is not being written; it was never created here, or "
                f"it has ended and was forgotten"
            )
        if position.ended:
            raise StoreError(f"stream {stream_id}: {verb} after its outcome; nothing was written")
        if position.error is not None:
            raise StoreError(str(position.error)) from position.error
        return position
