"""The ordered, append-only record of one stream; everything shown to anybody is read from it.

**One writer, any number of readers, no queues.** The stream appends; readers *pull* by cursor. A reader that stalls holds a
position, two integers, and nothing else: it cannot slow the stream, and nothing is buffered for it. (A channel per reader,
the usual design, makes either the reader's memory or the writer's speed depend on the slowest reader.)

**Tail and store.** The newest events stay in memory (`Limits.tail_events`, `tail_bytes`); older ones are read back from the
store. An event leaves memory only when the store has it durably, so between the two there is never a hole. Where both have
lost an event (retention, or a store that keeps no history) a reader gets `GapError`, never a jump.

**Appending and publishing.** `add` only puts an event in the tail; `publish`, once per read from the wire, hands all new
events to the store together and wakes the readers. An event is *visible* once published (`delivery="immediate"`) or once
durable (`delivery="durable"`).

**Closing.** The outcome goes to the store first (`write_outcome`) and becomes visible only when it is durable (`close`). A
sealed stream appends nothing: `seal` stops `add`, and the outcome takes the seq after the last event.

**Positions.** `seq` counts from 1 without a hole for the whole life of the stream. `epoch` goes up when history is replaced
(a restart withdraws the text so far; a crash loses what was shown but not yet durable). A cursor `(epoch, seq)` is good as
long as `seq` was reached in that epoch: then reading on is seamless, whatever the epoch is now. Otherwise the reader has
seen events that are no longer part of history, and is told so by `GapError`.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from itertools import islice

import attrs
import msgspec
import trio

from supervisor.dialects import Dialect
from supervisor.errors import ConfigurationError, GapError, StoreError, StreamSealedError
from supervisor.stores.base import EVENT_OVERHEAD_BYTES, Event, Store
from supervisor.streams.attempts import Texts

__all__ = ["Cursor", "Journal"]

Waker = Callable[[], None]

_log = logging.getLogger("supervisor.streams")
_RETRY_S = 1.0
_PAGE = 1024
_SLACK = 16  # of a tail that is full, one part in so many is let go of at once


@attrs.frozen(order=True)
class Cursor:
    """A position in a journal: what has been read up to and including `seq`. `Cursor(1, 0)` is before the first event."""

    epoch: int
    seq: int


class Journal:
    """The journal of one stream. See the module's text for its rules."""

    __slots__ = (
        "_closed",
        "_dialect",
        "_durable_delivery",
        "_first",
        "_max_event_bytes",
        "_on_durable",
        "_released_bytes",
        "_sealed",
        "_store",
        "_tail",
        "_tail_bytes_limit",
        "_tail_events_limit",
        "_to_follow",
        "_trim_bytes",
        "_trim_events",
        "_unpublished",
        "_wakers",
        "durable_seen",
        "epoch",
        "epoch_starts",
        "failure",
        "published_seq",
        "stream_id",
        "tail_bytes",
    )

    def __init__(
        self,
        stream_id: str,
        store: Store,
        *,
        dialect: Dialect | None,
        tail_events: int,
        tail_bytes: int,
        max_event_bytes: int = 4 << 20,
        durable_delivery: bool = False,
        on_durable: Callable[[int], None] | None = None,
    ) -> None:
        self.stream_id = stream_id
        self._store = store
        self._dialect = dialect
        self._tail_events_limit = tail_events
        self._tail_bytes_limit = tail_bytes
        self._trim_events = tail_events - tail_events // _SLACK
        self._trim_bytes = tail_bytes - tail_bytes // _SLACK
        self._max_event_bytes = max_event_bytes
        self._durable_delivery = durable_delivery
        self._on_durable = on_durable
        self._tail: list[Event] = []
        self._first = 1  # the seq of _tail[0]
        self._unpublished = 0
        self._wakers: dict[Waker, None] = {}
        self._sealed = False
        self._closed = False
        self._to_follow = trio.Event()
        self._released_bytes: int | None = 0  # of events that were in the tail; None: nobody counted
        self.tail_bytes = 0
        self.epoch = 1
        self.epoch_starts: tuple[tuple[int, int], ...] = ((1, 1),)
        self.published_seq = 0
        self.durable_seen = 0
        """What readers know to be durable, where delivery waits for it."""
        self.failure: StoreError | None = None
        """Why the outcome could not be made durable, if it could not: readers raise it."""

    def __repr__(self) -> str:
        held = f"{self._first}..{self._first + len(self._tail) - 1}" if self._tail else "nothing"
        return f"<Journal {self.stream_id} at ({self.epoch}, {self.tail_seq}), {held} in memory, {len(self._wakers)} readers>"

    # --- writing -----------------------------------------------------------------------------------------------------

    @property
    def tail_seq(self) -> int:
        """The last event there is, visible or not; 0 if none."""
        return self._first + len(self._tail) - 1

    @property
    def total_bytes(self) -> int | None:
        """What all its events come to: payloads, names and text; None where they were not counted, as it was restored."""
        if self._released_bytes is None:
            return None
        return self._released_bytes + self.tail_bytes - EVENT_OVERHEAD_BYTES * self.tail_seq

    @property
    def closed(self) -> bool:
        """Whether the outcome is visible: nothing will follow."""
        return self._closed

    def add(self, at: float, kind: str, payload: bytes, name: str = "", text: str = "") -> None:
        """Put an event into the tail. Raises StreamSealedError once the stream is sealed, ConfigurationError if it is too big."""
        size = len(payload)
        if self._sealed or size > self._max_event_bytes:
            self.check_add(payload)
        tail = self._tail
        tail.append(Event(self.epoch, self._first + len(tail), at, kind, payload, name, text))
        self.tail_bytes += size + len(name) + len(text) + EVENT_OVERHEAD_BYTES
        self._unpublished += 1

    def check_add(self, payload: bytes) -> None:
        """Raise what `add` would, for who changes something before it."""
        if self._sealed:
            raise StreamSealedError(self.stream_id)
        if len(payload) > self._max_event_bytes:
            expected = f"at most {self._max_event_bytes} bytes (Limits.max_event_bytes), not {len(payload)}"
            raise ConfigurationError("event", payload[:64], expected)

    def publish(self) -> bool:
        """Hand the new events to the store and wake the readers. False if there were none."""
        count = self._unpublished
        if not count:
            return False
        tail = self._tail
        self._store.append(self.stream_id, tail[-count:])
        self._unpublished = 0
        self.published_seq = self._first + len(tail) - 1
        if len(tail) > self._tail_events_limit or self.tail_bytes > self._tail_bytes_limit:
            self._trim()
        if self._durable_delivery:
            self._to_follow.set()
        elif self._wakers:
            self._wake()
        return True

    def new_epoch(self) -> None:
        """Start a new epoch with the next event: the history before it has been replaced.

        Epochs that begin in a running stream are odd. A crash may lose one together with its first events, although readers
        have seen them; recovery begins an even one, so that a cursor of the lost epoch is never taken for one of its own.
        """
        self.epoch += 2
        self.epoch_starts += ((self.epoch, self.tail_seq + 1),)

    def seal(self) -> None:
        """Take nothing more. What was added is to be published first."""
        self._sealed = True

    def write_outcome(self, event: Event, *, state: str, ended_at: float) -> None:
        """Hand the outcome to the store; `close` makes it visible once it is durable."""
        assert event.seq == self.tail_seq + 1, "the outcome is the next event of the journal"
        self._store.end(self.stream_id, event, state=state, ended_at=ended_at)

    def close(self, event: Event) -> None:
        """Make the durable outcome visible, and wake the readers."""
        self._tail.append(event)
        self.tail_bytes += event.nbytes
        self.published_seq = self.durable_seen = event.seq
        self._closed = True
        self._on_durable = None  # it is the stream's: an ended one is to be freed with its last reference
        self._to_follow.set()
        self._wake()

    def fail(self, error: StoreError) -> None:
        """Give up on the outcome: readers get the error after the last event."""
        self.failure = error
        self._to_follow.set()
        self._wake()

    async def follow_durability(self) -> None:
        """Show readers what has become durable, where delivery waits for it, until the journal is closed or has failed.

        A store that fails for a while is asked again; one that fails for good is told of by the outcome.
        """
        while not self._closed and self.failure is None:
            seq = self.published_seq
            if seq <= self.durable_seen:
                self._to_follow = trio.Event()
                await self._to_follow.wait()
                continue
            try:
                await self._store.wait_durable(self.stream_id, seq)
            except StoreError as error:
                _log.warning("stream %s: readers wait for events to be durable: %s", self.stream_id, error)
                await trio.sleep(_RETRY_S)
            else:
                self.durable_seen = max(seq, self.durable_seen)
                if self._on_durable is not None:
                    self._on_durable(self.durable_seen)
                self._wake()

    def restore(self, *, last_seq: int, epoch_starts: tuple[tuple[int, int], ...]) -> None:
        """Become the journal of an ended stream: everything is in the store."""
        self._first = last_seq + 1
        self._released_bytes = None
        self.published_seq = self.durable_seen = last_seq
        self.epoch_starts = epoch_starts
        self.epoch = epoch_starts[-1][0]
        self._sealed = self._closed = True
        self._on_durable = None

    def release_tail(self, *, keep_bytes: int = 0) -> None:
        """Let go of the tail of a closed journal but its newest `keep_bytes`: the rest is read from the store."""
        kept = len(self._tail)
        held = 0
        while kept and held + self._tail[kept - 1].nbytes <= keep_bytes:
            kept -= 1
            held += self._tail[kept].nbytes
        del self._tail[:kept]
        self._first += kept
        self._release(self.tail_bytes - held)

    def spill(self) -> None:
        """Let go of all that the store has durably: readers read it from there."""
        count = max(0, min(len(self._tail), self._store.durable_seq(self.stream_id) + 1 - self._first))
        self._release(sum([event.nbytes for event in self._tail[:count]]))
        del self._tail[:count]
        self._first += count

    def _release(self, nbytes: int) -> None:
        self.tail_bytes -= nbytes
        if self._released_bytes is not None:
            self._released_bytes += nbytes

    @property
    def pending_bytes(self) -> int:
        """Of `tail_bytes`, what is not durable yet. Costs nothing if that is all or nothing, else as much as it is events."""
        count = 0 if self._closed else self.tail_seq - self._store.durable_seq(self.stream_id)
        if count >= len(self._tail):
            return self.tail_bytes
        return sum([event.nbytes for event in self._tail[-count:]]) if count > 0 else 0

    def _trim(self) -> None:
        """Let go of events, to a little less than the limits so that not every event has to."""
        tail, drop, freed = self._tail, 0, 0
        over, over_bytes = len(tail) - self._trim_events, self.tail_bytes - self._trim_bytes
        durable = self._store.durable_seq(self.stream_id) + 1 - self._first
        for event in islice(tail, max(0, min(durable, len(tail) - 1))):
            if drop >= over and freed >= over_bytes:
                break
            freed += len(event.payload) + len(event.name) + len(event.text) + EVENT_OVERHEAD_BYTES
            drop += 1
        del tail[:drop]
        self._first += drop
        self._release(freed)

    # --- reading -----------------------------------------------------------------------------------------------------

    @property
    def visible_seq(self) -> int:
        """The last event a reader may see."""
        return self.durable_seen if self._durable_delivery else self.published_seq

    @property
    def visible_epoch(self) -> int:
        """The epoch of the last event a reader may see: a new one may have begun that is not durable yet."""
        return self.cursor_at(self.visible_seq).epoch

    def cursor_at(self, seq: int) -> Cursor:
        """Return the position after an event: with the epoch that the event was of."""
        return Cursor(next((epoch for epoch, first in reversed(self.epoch_starts) if first <= seq), 1), seq)

    def check(self, cursor: Cursor) -> None:
        """Raise GapError unless the cursor's position is part of this history."""
        reached = self.visible_seq
        for epoch, first in self.epoch_starts:
            if epoch > cursor.epoch:
                reached = min(reached, first - 1)
                break
        if not (1 <= cursor.epoch <= self.epoch and 0 <= cursor.seq <= reached):
            raise self._gap(cursor, earliest=1)

    def take(self, after_seq: int, max_events: int) -> Sequence[Event] | None:
        """Return the visible events after `after_seq` that are in memory: `()` if none is new, None if the store must be read."""
        visible = self.visible_seq
        if after_seq >= visible:
            return ()
        start = after_seq + 1 - self._first
        if start < 0:
            return None
        return self._tail[start : min(start + max_events, visible + 1 - self._first)]

    async def fetch(self, cursor: Cursor, max_events: int, *, texts: bool = True) -> Sequence[Event]:
        """Read the events after the cursor from the store, with their text if asked. Raises GapError if they are gone."""
        events = await self._store.read(self.stream_id, after_seq=cursor.seq, limit=max_events)
        visible = self.visible_seq
        events = [event for event in events if event.seq <= visible]
        if not events or events[0].seq != cursor.seq + 1:
            again = self.take(
                cursor.seq, max_events
            )  # the tail may reach the cursor: the store answers as of its last commit
            if again:
                return again
            raise self._gap(cursor, earliest=events[0].seq if events else self._first)
        return events if self._dialect is None or not texts else await self._with_text(events, self._dialect)

    async def _with_text(self, events: Sequence[Event], dialect: Dialect) -> list[Event]:
        """Derive again what `Event.text` said when the event was new.

        What a reader keeps between events is not text, with one exception: an event that restates text is new only where
        nothing told it before. So if there is one, and the page does not begin with its attempt, the journal is read from
        the start.
        """
        texts = Texts(dialect, whole=events[0].seq == 1)
        told = [texts.of(event) for event in events]
        if texts.doubtful:
            texts, seq, before = Texts(dialect, whole=True), 0, events[0].seq - 1
            while seq < before:
                page = await self._store.read(self.stream_id, after_seq=seq, limit=min(_PAGE, before - seq))
                if not page:  # the beginning is gone: an event that restates is then all that is left of what it restates
                    break
                for event in page:
                    texts.of(event)
                seq = page[-1].seq
            told = [texts.of(event) for event in events]
        return [
            event if text == event.text else msgspec.structs.replace(event, text=text)
            for event, text in zip(events, told, strict=True)
        ]

    def add_waker(self, waker: Waker) -> None:
        """Call `waker` whenever something new may be visible. It must be quick and must not raise."""
        self._wakers[waker] = None

    def remove_waker(self, waker: Waker) -> None:
        """Stop calling `waker`."""
        self._wakers.pop(waker, None)

    def _wake(self) -> None:
        for waker in tuple(self._wakers):
            try:
                waker()
            except Exception:  # noqa: BLE001  # the reader's own trouble; it is logged
                self._wakers.pop(waker, None)
                _log.exception(
                    "stream %s: a reader's wake raised; it will not be woken again", self.stream_id
                )

    def _gap(self, cursor: Cursor, *, earliest: int) -> GapError:
        return GapError(
            stream_id=self.stream_id,
            epoch=self.epoch,
            after_epoch=cursor.epoch,
            after_seq=cursor.seq,
            earliest_seq=earliest,
            tail_seq=self.visible_seq,
        )
