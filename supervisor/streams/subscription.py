"""Reading a stream: a cursor that pulls from the journal.

A subscription is a position and, while it is entered, a reader that counts for `on_detach`. It holds no events. The same
object serves a program's `async for` and the pump of a control connection that reads hundreds of streams in one task
(`take_nowait` and `wake`).

**Far behind.** Whoever wants the answer rather than each step on the way to it says how many events it will catch up on
(`max_behind`). Further behind than that, it is given one event in place of all that it missed: a `snapshot`, the fold up to a
position from which the events go on. It takes the outcome from nobody: that stays the last event, by itself. Such an event is
made for its reader and is in no journal.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Literal, Self

import attrs
import msgspec
import trio

from supervisor.dialects import Snapshot
from supervisor.errors import ConfigurationError, GapError
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

    def __init__(
        self, stream: Stream, journal: Journal, after: After, *, max_batch: int, max_behind: int | None = None
    ) -> None:
        if max_behind is not None and max_behind < 1:
            raise ConfigurationError("max_behind", max_behind, "a whole number, 1 or more, or None")
        self._stream = stream
        self._journal = journal
        self._max_batch = max_batch
        self.max_behind = max_behind
        """How many events behind it may be before it is given a snapshot in place of them; None: as many as there are."""
        self._entered = False
        self._closed = False
        self._buffer: Sequence[Event] = ()
        self._index = 0
        self._arrived: trio.Event | None = None
        self._epoch: int
        self.seq: int
        """The position of the last event that was taken. Set by `advance`."""
        self.wake: Callable[[], None] | None = None
        """Called, synchronously and perhaps more than once, when something new may be there. Must not raise."""
        self.first_snapshot: Snapshot | None = None
        """With `after="snapshot"`: the fold up to the cursor this subscription starts from."""
        if after == "start":
            self._epoch, self.seq = 1, 0
        elif after == "tail":
            self._epoch, self.seq = journal.visible_epoch, journal.visible_seq
        elif after == "snapshot":
            self.first_snapshot = stream.snapshot()
            self._epoch, self.seq = self.first_snapshot.epoch, self.first_snapshot.seq
        elif isinstance(after, Cursor):
            journal.check(after)
            self._epoch, self.seq = after.epoch, after.seq
        else:
            raise ConfigurationError("after", after, "a Cursor, 'start', 'tail' or 'snapshot'")

    def __repr__(self) -> str:
        return f"<Subscription to {self._stream.id} at {Cursor(self._epoch, self.seq)}{', closed' if self._closed else ''}>"

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
        return Cursor(self._epoch, self.seq)

    @property
    def at_end(self) -> bool:
        """Whether the outcome has been read."""
        journal = self._journal
        return journal.closed and self.seq >= journal.published_seq and self._index >= len(self._buffer)

    @property
    def tail(self) -> int:
        """The position of the last event that a reader may see now."""
        return self._journal.visible_seq

    @property
    def far_behind(self) -> bool:
        """Whether a snapshot comes next, for being more than `max_behind` events behind."""
        return self.max_behind is not None and self._journal.visible_seq - self.seq > self.max_behind

    def take_nowait(self, max_events: int | None = None) -> Sequence[Event] | None:
        """Take what is in memory after the cursor: `()` if nothing is new, None if it must be read with `next_batch`.

        Raises StoreError if nothing more will come because the outcome could not be recorded.
        """
        batch = self.peek_nowait(max_events)
        if batch:
            self.advance(batch[-1].epoch, batch[-1].seq)
        return batch

    def peek_nowait(self, max_events: int | None = None) -> Sequence[Event] | None:
        """Return what `take_nowait` would take, and leave the cursor where it is. Raises as it does."""
        self._check_entered()
        if self.max_behind is not None and self.far_behind and not self._closed:
            return None
        batch = self._journal.take(self.seq, max_events or self._max_batch)
        if not batch and batch is not None and self._journal.failure is not None and not self._closed:
            raise self._journal.failure
        return batch

    def advance(self, epoch: int, seq: int) -> None:
        """Move the cursor over events that its reader has got: by `peek_nowait`, or from another reader of the stream."""
        self._epoch = epoch
        self.seq = seq

    async def next_batch(self, max_events: int | None = None) -> Sequence[Event]:
        """Wait for the next events, at least one; `()` only after the outcome (or `close`).

        One that is a `snapshot` comes alone. Raises GapError if history after the cursor is gone, StoreError if the outcome could not be recorded. A checkpoint;
        a cancel takes no event.
        """
        limit = max_events or self._max_batch
        while True:
            await trio.lowlevel.checkpoint()
            batch = self.take_nowait(limit)
            if batch is None:
                batch = await self._fetch(limit)
                self.advance(batch[-1].epoch, batch[-1].seq)
            if batch or self.at_end or self._closed:
                return batch
            self._arrived = trio.Event()
            await self._arrived.wait()

    async def _fetch(self, limit: int) -> Sequence[Event]:
        """Read what is not in memory, or make a snapshot where that was asked for and is wanted or is all there is."""
        cursor = Cursor(self._epoch, self.seq)
        if not self.far_behind:
            try:
                return await self._journal.fetch(cursor, limit)
            except GapError:
                if self.max_behind is None:
                    raise
        jump = await self._jump()
        return await self._journal.fetch(cursor, limit) if jump is None else (jump,)

    async def _jump(self) -> Event | None:
        """Return the `snapshot` event that leads on from here; None if there is none."""
        try:
            shot = await self._stream.read_snapshot()
        except GapError:  # a part of what it would be made of is gone
            return None
        journal, at = self._journal, Cursor(shot.epoch, shot.seq)
        if journal.closed and at.seq == journal.published_seq:
            at = journal.cursor_at(at.seq - 1)  # the outcome is to follow
            shot = attrs.evolve(shot, epoch=at.epoch, seq=at.seq)
        if at.seq <= self.seq:
            return None
        try:
            payload = msgspec.json.encode(shot)
        except UnicodeEncodeError:  # half a surrogate pair in a text of a program's own
            payload = json.dumps(msgspec.to_builtins(shot), ensure_ascii=False).encode("utf-8", "replace")
        return Event(at.epoch, at.seq, time.time(), "snapshot", payload, text=shot.text)

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

    # --- many readers that are woken as one --------------------------------------------------------------------------

    def wake_by(self, wake: Callable[[], None]) -> None:
        """Have the journal call `wake` in place of this subscription's own: once, for all that share it.

        Only for one that is read with `take_nowait` and its like. Whoever shares it ends it, with `wake_no_more`, when the
        last of them has left.
        """
        self._check_entered()
        self._journal.remove_waker(self._notify)
        self._journal.add_waker(wake)

    def wake_no_more(self, wake: Callable[[], None]) -> None:
        """End what `wake_by` began."""
        self._journal.remove_waker(wake)

    def _notify(self) -> None:
        if self._arrived is not None:
            self._arrived.set()
        if self.wake is not None:
            self.wake()

    def _check_entered(self) -> None:
        if not self._entered:
            raise RuntimeError("enter the subscription first: `with stream.subscribe() as events:`")
