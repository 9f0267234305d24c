"""The store protocol and the records a store keeps.

A store is an append-only log per stream, dumb on purpose: it knows events, one opaque description per stream and one
outcome per stream, and nothing of what they mean. Writing is a synchronous enqueue (`create`, `append`, `end`) that never
blocks and never fails; a writer inside `run` commits what is queued from all streams in groups. What is durable is
learnt from `wait_durable` and `durable_seq`, never assumed.

Rules every implementation keeps (`tests/stores/` runs one suite over all of them):

- Records of one stream become durable in the order they were enqueued; a crash keeps a prefix.
- `end` is durable only together with, or after, everything enqueued before it for that stream.
- A second `end` for the same stream changes nothing and is reported as a bug (StoreError from `wait_durable`).
- The queue is bounded by back-pressure, not by loss: past `high_water_bytes` `congested` is true and sources wait in
  `wait_flow`.
- A failing commit is retried by the store as long as `run` lasts; `wait_durable` raises StoreError after the store's
  documented patience, and the records stay queued.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import attrs
import msgspec
import trio

__all__ = ["Event", "EventKind", "Store", "StoreStatistics", "StoredStream"]

EventKind = str
"""One of `data` (an upstream payload, exact), `attempt`, `skipped` (an unparseable payload), `note`, `outcome`."""


class Event(msgspec.Struct, frozen=True, gc=False):
    """One record of a journal. `(epoch, seq)` is its position; `seq` is contiguous from 1 across epochs' lifetimes."""

    epoch: int
    seq: int
    at: float
    """When it was appended: seconds since the Unix epoch."""
    kind: EventKind
    payload: bytes
    """`data`: the upstream's bytes exactly as received. Every other kind: a JSON object of ours."""
    name: str = ""
    """The wire's event name where it is not the default."""
    text: str = ""
    """The text this event adds to choice 0: a view of `payload`, not stored, derived again when read back."""

    @property
    def nbytes(self) -> int:
        """What the event is accounted as, in bytes: its payload, name and text, and a fixed overhead."""
        return len(self.payload) + len(self.name) + len(self.text) + EVENT_OVERHEAD_BYTES


EVENT_OVERHEAD_BYTES = 160


@attrs.frozen(kw_only=True)
class StoredStream:
    """What the store knows of one stream."""

    id: str
    key: str | None
    created_at: float
    """Seconds since the Unix epoch."""
    head: bytes
    """The stream's description: JSON, written once by `create`, opaque to the store."""
    state: str | None = None
    """The outcome's state; None while the stream has no outcome."""
    ended_at: float | None = None
    outcome: bytes | None = None
    """The outcome: JSON, written once by `end`, opaque to the store."""
    epoch: int = 1
    first_seq: int = 1
    """The first event still stored (1 unless retention removed some)."""
    last_seq: int = 0
    """The last event stored; 0 if none."""


@attrs.frozen(kw_only=True)
class StoreStatistics:
    """A store's figures at one moment."""

    pending_records: int
    pending_bytes: int
    committed_records: int
    commits: int
    failed_commits: int
    last_commit_s: float
    """How long the last commit took, in seconds."""
    last_error: str | None
    """The message of the failure the store is in now; None when it is well."""


class Store(Protocol):
    """Keeps journals. See the module's rules."""

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Open the store, report started, and write until `aclose` was called and the queue is empty.

        Raises StoreLockedError, StoreCorruptError or StoreError if it cannot be opened. A cancel stops it at once and
        loses what is queued: a supervisor shields it and calls `aclose`.
        """
        ...

    async def aclose(self) -> None:
        """Commit what is queued and make `run` return. Idempotent."""
        ...

    def create(self, stream: StoredStream) -> None:
        """Enqueue a new stream's head."""
        ...

    def append(self, stream_id: str, events: Sequence[Event]) -> None:
        """Enqueue events, in order."""
        ...

    def end(self, stream_id: str, event: Event, *, state: str, ended_at: float) -> None:
        """Enqueue the outcome: `event` (kind `outcome`) is the last of the journal and its payload the outcome."""
        ...

    def durable_seq(self, stream_id: str) -> int:
        """Return the last seq known to be durable of a stream written in this run; 0 if none, or if it is unknown."""
        ...

    async def wait_durable(self, stream_id: str, seq: int) -> None:
        """Wait until `seq` (0: the head) is durable. At once if it is. Raises StoreError if it cannot be made so."""
        ...

    def forget(self, stream_id: str) -> None:
        """Drop the in-memory position of a stream whose outcome is durable: it will not be written again."""
        ...

    @property
    def congested(self) -> bool:
        """Whether the queue is past its high-water mark."""
        ...

    async def wait_flow(self) -> None:
        """Wait until the queue is below its low-water mark. At once if it is not congested."""
        ...

    async def read(
        self, stream_id: str, *, after_seq: int, limit: int, max_bytes: int = 1 << 20
    ) -> Sequence[Event]:
        """Return up to `limit` durable events with seq greater than `after_seq`, in order; at least one if there is one."""
        ...

    async def get(self, *, stream_id: str | None = None, key: str | None = None) -> StoredStream | None:
        """Return a stored stream by id, or the newest one with this key; None if there is none."""
        ...

    async def unfinished(self) -> Sequence[StoredStream]:
        """Return the streams without an outcome, oldest first: after a start, those a crash interrupted."""
        ...

    async def list(
        self, *, before_id: str | None = None, states: Sequence[str] | None = None, limit: int = 100
    ) -> Sequence[StoredStream]:
        """Return ended streams, newest id first, with ids below `before_id`."""
        ...

    async def prune(self, *, ended_before: float | None = None, keep: int | None = None, limit: int = 500) -> int:
        """Remove up to `limit` ended streams: those that ended before a time, or beyond the newest `keep`. Return how many."""
        ...

    def statistics(self) -> StoreStatistics:
        """Return the store's figures."""
        ...
