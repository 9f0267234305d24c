"""Reading a stream: a cursor that pulls from the journal.

A subscription is a position and, while it is entered, a reader that counts for `on_detach`. It holds no events. The same
object serves a program's `async for` and the pump of a control connection that reads hundreds of streams in one task
(`take_nowait` and `wake`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Literal, Self

import trio

from supervisor.dialects import Snapshot
from supervisor.errors import ConfigurationError
from supervisor.stores.base import Event
from supervisor.streams.journal import Cursor, Journal

if TYPE_CHECKING:
    from supervisor.streams.stream import Stream

__all__ = ["After", "Subscription"]

After = Cursor | Literal["start", "tail", "snapshot"]


class Subscription:
    """Events of a stream from a cursor on, each exactly once, the outcome last.

    Use it as `with stream.subscribe() as events:` (or `async with`; entering and leaving do not block). Leaving detaches:
    it never cancels the stream, except through the stream's own `on_detach`.
    """

    def __init__(self, stream: Stream, journal: Journal, after: After, *, max_batch: int) -> None:
        self._stream = stream
        self._journal = journal
        self._max_batch = max_batch
        self._entered = False
        self._closed = False
        self._buffer: Sequence[Event] = ()
        self._index = 0
        self._arrived: trio.Event | None = None
        self.wake: Callable[[], None] | None = None
        """Called, synchronously and perhaps more than once, when something new may be there. Must not raise."""
        self.first_snapshot: Snapshot | None = None
        """With `after="snapshot"`: the fold up to the cursor this subscription starts from."""
        if after == "start":
            self._cursor = Cursor(1, 0)
        elif after == "tail":
            self._cursor = Cursor(journal.epoch, journal.visible_seq)
        elif after == "snapshot":
            self.first_snapshot = stream.snapshot()
            self._cursor = Cursor(self.first_snapshot.epoch, self.first_snapshot.seq)
        elif isinstance(after, Cursor):
            journal.check(after)
            self._cursor = after
        else:
            raise ConfigurationError("after", after, "a Cursor, 'start', 'tail' or 'snapshot'")

    def __repr__(self) -> str:
        return f"<Subscription to {self._stream.id} at {self._cursor}{', closed' if self._closed else ''}>"

    # --- being a reader ----------------------------------------------------------------------------------------------

    def __enter__(self) -> Self:
        if self._entered:
            raise RuntimeError(
                "a subscription can be entered once; subscribe again, after its cursor, to go on"
            )
        self._stream._attach(self._notify)  # noqa: SLF001  # the subscription is the reader's half of the stream
        self._entered = True
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    async def __aenter__(self) -> Self:
        return self.__enter__()

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Detach. A `next_batch` that is waiting returns nothing more. Idempotent; does not block."""
        if self._entered and not self._closed:
            self._stream._detach(self._notify)  # noqa: SLF001  # as above
        self._closed = True
        if self._arrived is not None:
            self._arrived.set()

    # --- reading -----------------------------------------------------------------------------------------------------

    @property
    def cursor(self) -> Cursor:
        """The position after the last event that was handed out: subscribe after it to go on without a gap."""
        if self._index < len(self._buffer):  # iteration took a batch and hands it out one at a time
            waiting = self._buffer[self._index]
            return Cursor(waiting.epoch, waiting.seq - 1)
        return self._cursor

    @property
    def at_end(self) -> bool:
        """Whether the outcome has been read."""
        return self._journal.closed and self.cursor.seq >= self._journal.published_seq

    def take_nowait(self, max_events: int | None = None) -> Sequence[Event] | None:
        """Take what is in memory after the cursor: `()` if nothing is new, None if it must be read with `next_batch`.

        Raises StoreError if nothing more will come because the outcome could not be recorded.
        """
        self._check_entered()
        batch = self._journal.take(self._cursor.seq, max_events or self._max_batch)
        if batch:
            self._cursor = Cursor(batch[-1].epoch, batch[-1].seq)
        elif batch is not None and self._journal.failure is not None and not self._closed:
            raise self._journal.failure
        return batch

    async def next_batch(self, max_events: int | None = None) -> Sequence[Event]:
        """Wait for the next events, at least one; `()` only after the outcome (or `close`).

        Raises GapError if history after the cursor is gone, StoreError if the outcome could not be recorded. A checkpoint;
        a cancel takes no event.
        """
        limit = max_events or self._max_batch
        while True:
            await trio.lowlevel.checkpoint()
            batch = self.take_nowait(limit)
            if batch is None:
                batch = await self._journal.fetch(self._cursor, limit)
                self._cursor = Cursor(batch[-1].epoch, batch[-1].seq)
            if batch or self.at_end or self._closed:
                return batch
            self._arrived = trio.Event()
            await self._arrived.wait()

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Event:
        if self._index >= len(self._buffer):
            self._buffer, self._index = (), 0
            self._buffer = await self.next_batch()
            if not self._buffer:
                raise StopAsyncIteration
        event = self._buffer[self._index]
        self._index += 1
        return event

    def _notify(self) -> None:
        if self._arrived is not None:
            self._arrived.set()
        if self.wake is not None:
            self.wake()

    def _check_entered(self) -> None:
        if not self._entered:
            raise RuntimeError("enter the subscription first: `with stream.subscribe() as events:`")
