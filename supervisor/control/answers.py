"""What the methods that need no connection of their own answer, by whichever channel they are asked: WebSocket or HTTP.

Each takes the parameters as `supervisor.control.messages` has them, asks the supervisor, and returns the message. What is wrong is
raised, and becomes an error on the wire in one place (`supervisor.control.rpc.error_for`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, cast

import attrs
import msgspec

from supervisor.control.messages import (
    CancelManyResult,
    CancelParams,
    CancelResultMessage,
    CursorMessage,
    ListParams,
    ListResult,
    SnapshotMessage,
    StartParams,
    StartResult,
    StreamMessage,
    StreamParams,
    SubscribeParams,
)
from supervisor.dialects import Snapshot
from supervisor.observe import Trace
from supervisor.observe import trace as trace_of
from supervisor.streams import After, CancelResult, Cursor, OnDetach, Outcome, Stream, StreamInfo, Supervisor

if TYPE_CHECKING:
    from supervisor.control.server import Resolved

__all__ = [
    "cancel",
    "get",
    "list_streams",
    "outcome_json",
    "place_of",
    "snapshot",
    "snapshot_message",
    "start",
    "stream_message",
    "trace",
]


async def start(
    supervisor: Supervisor, resolve: Callable[[StartParams], Resolved], params: StartParams
) -> StartResult:
    """Start a stream, or join the one that has the key; return once it is recorded."""
    resolved = resolve(params)
    started = supervisor.start_nowait(
        resolved.source,
        key=params.key,
        on_conflict=params.on_conflict,
        on_detach=OnDetach(mode=params.on_detach.mode, grace_s=params.on_detach.grace_s),
        deadlines=attrs.evolve(resolved.deadlines or supervisor.deadlines, **params.deadlines.given()),
        labels=params.labels,
        tenant=params.tenant,
        upstream=params.upstream,
        delivery=params.delivery,
        meta=resolved.meta,
    )
    stream = started.stream
    await stream.recorded()
    return StartResult(
        id=stream.id, key=stream.key, epoch=stream.epoch, created=started.created, state=str(stream.state)
    )


async def get(supervisor: Supervisor, params: StreamParams) -> StreamMessage:
    """Tell what is known of a stream."""
    stream = await supervisor.find(params.id, key=params.key)
    return stream_message(stream.info())


async def list_streams(supervisor: Supervisor, params: ListParams) -> ListResult:
    """Return a page of streams."""
    wanted = params.limit + 1
    if params.live is None:
        found = await supervisor.history(
            states=params.states,
            labels=params.labels,
            key=params.key,
            upstream=params.upstream,
            tenant=params.tenant,
            before_id=params.before,
            limit=wanted,
        )
    else:
        found = supervisor.list(
            states=params.states,
            labels=params.labels,
            key=params.key,
            upstream=params.upstream,
            tenant=params.tenant,
            live=params.live,
        )
        if params.before is not None:
            found = [info for info in found if info.id < params.before]
    page = found[: params.limit]
    more = len(found) > params.limit
    return ListResult(streams=tuple(map(stream_message, page)), next=page[-1].id if more and page else None)


async def cancel(
    supervisor: Supervisor, params: CancelParams, *, actor: str
) -> CancelResultMessage | CancelManyResult:
    """Cancel one stream or many; `actor` is who did it where the parameters do not say."""
    results = await supervisor.cancel(
        params.id,
        key=params.key,
        labels=params.labels,
        all_streams=params.all,
        reason=params.reason,
        actor=params.actor or actor,
        mode=params.mode,
        drain_s=params.drain_s,
        drain_tokens=params.drain_tokens,
        wait_s=params.wait_s,
    )
    if params.id is not None or params.key is not None:
        return _cancel_message(results[0])
    return CancelManyResult(results=tuple(map(_cancel_message, results)))


async def snapshot(supervisor: Supervisor, params: StreamParams) -> SnapshotMessage:
    """Return the answer so far."""
    stream = await supervisor.find(params.id, key=params.key)
    return snapshot_message(stream, await stream.read_snapshot())


async def trace(supervisor: Supervisor, params: StreamParams) -> Trace:
    """Tell what happened when in a stream."""
    return await trace_of(await supervisor.find(params.id, key=params.key))


def place_of(params: SubscribeParams) -> After:
    """Return where a subscription is to begin."""
    after = params.after
    return Cursor(after.epoch, after.seq) if isinstance(after, CursorMessage) else after


# --- from the domain to the wire --------------------------------------------------------------------------------------


def outcome_json(outcome: Outcome | None) -> dict[str, Any] | None:
    """Return an outcome's own JSON, embedded as it is journalled; the declared type says what a reader will find."""
    return None if outcome is None else cast("dict[str, Any]", msgspec.Raw(outcome.to_json()))


def stream_message(info: StreamInfo) -> StreamMessage:
    """Return what is told of a stream."""
    fields = {field: getattr(info, field) for field in StreamMessage.__struct_fields__}
    return StreamMessage(**{**fields, "outcome": outcome_json(info.outcome)})


def snapshot_message(stream: Stream, folded: Snapshot) -> SnapshotMessage:
    """Return what is told of a fold."""
    fields = msgspec.to_builtins(folded)
    return msgspec.convert({**fields, "id": stream.id, "state": str(stream.state)}, SnapshotMessage)


def _cancel_message(result: CancelResult) -> CancelResultMessage:
    return CancelResultMessage(
        outcome=result.outcome,
        id=result.id,
        key=result.key,
        state=None if result.state is None else str(result.state),
        reason=result.reason,
        error=msgspec.UNSET if result.error is None else result.error,
    )
