"""The store protocol and the records a store keeps.

A store is an append-only log per stream, dumb on purpose: it knows events, one opaque description per stream and one
outcome per stream, and nothing of what they mean. Writing is a synchronous enqueue (`create`, `append`, `end`) that never
blocks and never fails for a reason of the environment; a writer inside `run` commits what is queued from all streams in
groups. What is durable is learnt from `wait_durable` and `durable_seq`, never assumed. All of it is called from the trio
thread.

Rules every implementation keeps (`tests/stores/` runs one suite over all of them):

- Records of one stream become durable in the order they were enqueued; a crash keeps a prefix.
- `end` is durable only together with, or after, everything enqueued before it for that stream.
- Misuse is refused by the call itself: `create` of a stream that is being written, `append` or `end` of one that is not,
  anything after the outcome, and a seq that does not follow the last one raise StoreError and change nothing. What only
  the stored data can tell (`create` with the id of a stream of an earlier run) is a StoreError from `wait_durable`, and from then
  on of `append` and `end`; `refusal` tells it too.
- A stream that an earlier run left without an outcome is being written again as soon as `run` has started: `append` and
  `end` go on after its last stored seq.
- The queue is bounded by back-pressure, not by loss: past `high_water_bytes` `congested` is true and sources wait in
  `wait_flow`.
- A failing commit is retried by the store as long as `run` lasts; `wait_durable` raises StoreError after the store's
  documented patience, and the records stay queued.
- While commits fail, or do not come back, `failing` says why; who would start something that could not be recorded asks first.
- Ids sort by age: "newest" among streams is the highest id, as text. Retention goes by when a stream ended.
- Reading shows what is durable. Where retention removed events, `first_seq` says so and `read` begins there.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, Protocol

import attrs
import msgspec
import trio

from supervisor.errors import StoreError
from supervisor.stores.retention import PruneReport, Retention

__all__ = ["Event", "EventKind", "Store", "StoreHealth", "StoreStatistics", "StoredStream"]

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
    tenant: str | None = None
    """On whose behalf it runs: retention has limits for each."""
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
    failing_since: float | None = None
    """When that failure began: seconds since the Unix epoch."""
    lag_s: float = 0.0
    """How long the record that has waited longest to be committed has waited; 0 if none does."""
    held_bytes: int = 0
    """Bytes of records held in this process: what is queued, and for a store in memory all it keeps."""
    evicted_events: int = 0
    """Events that a bounded store gave up to stay within its bounds; not those removed by `prune`."""


@attrs.frozen(kw_only=True)
class StoreHealth:
    """Whether a store can write, and how far it is behind."""

    state: Literal["ok", "behind", "failing"]
    """`behind`: it writes, but more is queued than its high-water mark, so that sources are held back. `failing`: nothing can be written;
    starts are refused."""
    lag_events: int
    """Records that are queued: given to the store and not yet durable."""
    lag_bytes: int
    lag_s: float
    """How long the first of them has waited."""
    failing_since: float | None
    """Seconds since the Unix epoch."""
    error: str | None
    """Why nothing can be written."""

    @classmethod
    def of(cls, store: Store) -> StoreHealth:
        """Ask a store."""
        figures = store.statistics()
        failing = figures.last_error
        return cls(
            state="failing" if failing is not None else "behind" if store.congested else "ok",
            lag_events=figures.pending_records,
            lag_bytes=figures.pending_bytes,
            lag_s=round(figures.lag_s, 3),
            failing_since=figures.failing_since,
            error=failing,
        )


class Store(Protocol):
    """Keeps journals. See the module's rules."""

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Open the store, report started, and write until `aclose` was called and the queue is empty.

        Raises StoreLockedError, StoreCorruptError or StoreError if it cannot be opened. A cancel stops it at once and
        loses what is queued: a supervisor shields it and calls `aclose`.
        """
        ...

    async def aclose(self) -> None:
        """Commit what is queued, make `run` return, and wait until it has. Idempotent.

        Raises StoreError if it had to give up and records were lost. A cancel leaves the closing to go on in `run`.
        """
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
        """Return the last seq known to be durable of a stream being written; 0 if none, or if it is unknown."""
        ...

    async def wait_durable(self, stream_id: str, seq: int) -> None:
        """Wait until `seq` (0: the head) is durable. At once if it is; it may be a seq that is yet to be appended.

        Raises StoreError if it cannot be made so. A cancel leaves nothing behind.
        """
        ...

    def refusal(self, stream_id: str) -> StoreError | None:
        """Return why the records of a stream being written never will be, whatever becomes of the disk; None while that is not known."""
        ...

    def forget(self, stream_id: str) -> None:
        """Drop the in-memory position of an ended stream (as soon as its outcome is durable). Never fails."""
        ...

    @property
    def congested(self) -> bool:
        """Whether the queue is past its high-water mark."""
        ...

    @property
    def failing(self) -> str | None:
        """Why nothing can be written at present; None while the store is well, or merely behind."""
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
        """Return the streams without an outcome, lowest id first: after a start, those a crash interrupted."""
        ...

    async def list(
        self, *, before_id: str | None = None, states: Sequence[str] | None = None, limit: int = 100
    ) -> Sequence[StoredStream]:
        """Return ended streams, newest id first, with ids below `before_id`."""
        ...

    async def prune(
        self, retention: Retention, *, now: float | None = None, limit: int = 1000, dry_run: bool = False
    ) -> PruneReport:
        """Remove up to `limit` ended streams that are more than `retention` keeps, or with `dry_run` only tell.

        `now` is for ages: seconds since the Unix epoch, the clock's by default. A cancel leaves each stream whole or gone.
        """
        ...

    def statistics(self) -> StoreStatistics:
        """Return the store's figures."""
        ...
