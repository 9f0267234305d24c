"""What an earlier run has left in the store, brought back: ended streams as they were, cut ones with the outcome of a crash."""

from __future__ import annotations

import logging
import time
from collections import Counter
from typing import TYPE_CHECKING

import msgspec

from supervisor.errors import StoreCorruptError
from supervisor.stores.base import Store, StoredStream
from supervisor.streams.attempts import decode_attempt
from supervisor.streams.lifecycle import Outcome, State
from supervisor.streams.spec import StreamSpec
from supervisor.streams.stream import Stream

if TYPE_CHECKING:
    from collections.abc import Mapping

    from supervisor.dialects import Dialect
    from supervisor.streams.supervisor import Supervisor

__all__ = ["interrupted", "restored", "restored_if_readable"]

_log = logging.getLogger("supervisor.streams")
_PAGE = 4096  # events read at a time
_HEAD = msgspec.json.Decoder(StreamSpec)


def restored(supervisor: Supervisor, stored: StoredStream, dialects: Mapping[str, Dialect]) -> Stream:
    """Return the ended stream that the store remembers. Raises StoreCorruptError if its record cannot be read."""
    assert stored.outcome is not None, "only an ended stream is restored"
    try:
        spec, outcome = _HEAD.decode(stored.head), Outcome.from_json(stored.outcome)
    except msgspec.MsgspecError as error:
        raise StoreCorruptError(
            f"stream {stored.id}: its record cannot be read ({error}); it is left as it is, and not shown"
        ) from error
    dialect = dialects.get(spec.dialect)
    stream = Stream(supervisor, stored.id, spec, None, dialect=dialect, created_at=stored.created_at)
    stream.restore(outcome)
    return stream


def restored_if_readable(
    supervisor: Supervisor, stored: StoredStream, dialects: Mapping[str, Dialect]
) -> Stream | None:
    """As `restored`, but for a record that cannot be read: that is logged."""
    try:
        return restored(supervisor, stored, dialects)
    except StoreCorruptError as error:
        _log.error("%s", error)  # the error says it all
        return None


async def interrupted(stored: StoredStream, store: Store) -> Outcome:
    """Return the outcome of a stream that a crash interrupted, its counts taken from the durable journal.

    It begins a new epoch: readers may have seen events that were not durable, and a cursor past the durable end must be
    told of the gap rather than be continued with something else.
    """
    last, epoch = stored.last_seq, stored.epoch
    counts: Counter[str] = Counter()
    starts, rungs = {1: 1}, []
    seq = stored.first_seq - 1
    try:
        while seq < last and (page := await store.read(stored.id, after_seq=seq, limit=_PAGE)):
            for event in page:
                counts[event.kind] += 1
                starts.setdefault(event.epoch, event.seq)
                if event.kind == "attempt" and (rung := decode_attempt(event.payload).rung) is not None:
                    rungs.append(rung)
            seq = page[-1].seq
    except (StoreCorruptError, msgspec.MsgspecError) as error:
        _log.error("stream %s: %s", stored.id, error)  # the error says it all; what could be read is counted
    return Outcome(
        id=stored.id,
        key=stored.key,
        state=State.FAILED,
        reason="interrupted",
        message=f"the process ended while the stream was live; {last} events were durable and are kept",
        attempts=counts["attempt"],
        events=counts["data"],
        skipped=counts["skipped"],
        epoch=epoch + 1,  # even: see Journal.new_epoch
        last_seq=last + 1,
        rungs=tuple(rungs),
        epoch_starts=(*sorted(starts.items()), (epoch + 1, last + 1)),
        started_at=stored.created_at,
        ended_at=time.time(),
    )
