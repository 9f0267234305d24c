"""The outcome's way to the store: persist, then announce.

The outcome of a sealed stream is written once, and waited for, shielded and for a bounded time, until it is durable. Until then it
is not there for anybody. One that is not durable in time may be later: it has been handed over, and is announced if it still comes.
"""

from __future__ import annotations

import logging
from collections.abc import Callable

import trio

from supervisor.errors import StoreError
from supervisor.stores.base import Event, Store
from supervisor.streams.journal import Journal
from supervisor.streams.lifecycle import Outcome
from supervisor.streams.raised import told

__all__ = ["Settling"]

_log = logging.getLogger("supervisor.streams")


class Settling:
    """The settling of one stream."""

    __slots__ = ("_journal", "_store", "begun", "done", "event", "outcome")

    def __init__(self, journal: Journal, store: Store) -> None:
        self._journal = journal
        self._store = store
        self.begun = False
        self.event: Event | None = None
        """The outcome as it was handed to the store."""
        self.outcome: Outcome | None = None
        """The outcome, once it is durable."""
        self.done = trio.Event()
        """Set once the outcome is announced, or could not be made durable in time."""

    def __repr__(self) -> str:
        return f"<Settling of {self._journal.stream_id}{', done' if self.done.is_set() else ''}>"

    async def write(self, conclude: Callable[[], Outcome], *, settle_s: float) -> StoreError | None:
        """Write the outcome that `conclude` returns, and wait until it is durable. Return why it is not, if it is not."""
        stream_id = self._journal.stream_id
        failure: StoreError | None = None
        with trio.CancelScope(shield=True, deadline=trio.current_time() + settle_s):
            try:
                outcome = conclude()
                event = Event(outcome.epoch, outcome.last_seq, outcome.ended_at, "outcome", outcome.to_json())
                self._journal.write_outcome(event, state=outcome.state.value, ended_at=outcome.ended_at)
                self.event = event
                await self._store.wait_durable(stream_id, event.seq)
                self.outcome = outcome
            except StoreError as error:
                failure = error
            except Exception as error:  # noqa: BLE001  # whatever a store raises, it is this stream's trouble and no other's
                _log.exception("stream %s: its outcome could not be recorded", stream_id)
                failure = StoreError(f"stream {stream_id}: its outcome could not be recorded: {told(error)}")
        if self.outcome is None and failure is None:
            failure = StoreError(
                f"stream {stream_id}: its outcome was not durable after {settle_s:g} s "
                f"({self._store.failing or 'the store is behind'}); it is told when it is"
            )
        return failure

    def has_come(self) -> bool:
        """Whether an outcome that was not durable in time is by now."""
        event = self.event
        if event is None or self._store.durable_seq(self._journal.stream_id) < event.seq:
            return False
        self.outcome = Outcome.from_json(event.payload)
        return True
