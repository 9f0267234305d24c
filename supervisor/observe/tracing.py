"""Reads the trace of a stream from its journal: of a live one, or long after its end.

The journal is read page by page, and others get their turn between two pages; nothing of it is kept but what `Timeline` keeps.
Of a very long one only so much from either end is read. Who traces a stream is no reader of it: nothing about the stream changes.
"""

from __future__ import annotations

import contextlib
import time

import attrs

from supervisor.errors import GapError
from supervisor.observe.timeline import Timeline, Trace, TraceRange
from supervisor.stores import Event
from supervisor.streams import Stream, StreamInfo

__all__ = ["MAX_END_BYTES", "MAX_END_EVENTS", "trace"]

MAX_END_EVENTS = 50_000
"""Events read from either end of a journal."""
MAX_END_BYTES = 32 << 20
"""Bytes read from either end of a journal, but for its last page."""
_PAGE = 512  # events between two turns of others: about a millisecond


async def trace(stream: Stream) -> Trace:
    """Return what happened when in a stream, up to now. Raises StoreError. A cancel leaves nothing behind."""
    info = stream.info()
    outcome = info.outcome
    last_seq = info.tail_seq
    duration_s = max(0.0, await _ended_at(stream, info) - info.created_at)
    reading = _Reading(stream, Timeline(started_at=info.created_at, duration_ms=duration_s * 1000), last_seq)
    await reading.run()
    timeline = reading.timeline
    model = info.meta.get("model")
    return Trace(
        id=info.id,
        key=info.key,
        state=info.state.value,
        reason=info.reason,
        tenant=info.tenant,
        upstream=info.upstream,
        dialect=info.dialect,
        model=model if isinstance(model, str) else None,
        labels=dict(info.labels),
        started_at=info.created_at,
        ended=outcome is not None,
        duration_ms=round(duration_s * 1000, 2),
        first_event_ms=timeline.first_event_ms,
        deadlines=attrs.asdict(stream.spec.deadlines),
        events=info.events,
        bytes=timeline.bytes,
        skipped=info.skipped,
        arrivals=timeline.arrivals,
        attempts=timeline.attempts,
        attempts_left_out=timeline.attempts_left_out,
        gap_ms=timeline.gap_ms,
        event_bytes=timeline.event_bytes,
        stall_from_ms=timeline.stall_from_ms,
        stalls=timeline.stalls,
        stalls_left_out=timeline.stalls_left_out,
        marks=timeline.marks,
        marks_left_out=timeline.marks_left_out,
        timeline=timeline.timeline,
        outcome=outcome,
        left_out=tuple(reading.left_out),
    )


async def _ended_at(stream: Stream, info: StreamInfo) -> float:
    """Return when a stream ended: if a crash interrupted it, when its last event came, for nobody knows more; if it is live, now."""
    if info.outcome is None:
        return time.time()
    if info.outcome.reason == "interrupted":
        with contextlib.suppress(GapError):
            last = [
                event.at for event in await stream.page(max(0, info.tail_seq - 2)) if event.kind != "outcome"
            ]
            return last[0] if last else info.created_at
    return info.outcome.ended_at


class _Reading:
    """The reading of one journal, up to a last seq."""

    def __init__(self, stream: Stream, timeline: Timeline, last_seq: int) -> None:
        self._stream = stream
        self.timeline = timeline
        self._last_seq = last_seq
        self._seq = 0  # the last that was read, or left out
        self.left_out: list[TraceRange] = []

    def __repr__(self) -> str:
        return f"<Reading of {self._stream.id} at {self._seq} of {self._last_seq}>"

    async def run(self) -> None:
        """Read from both ends."""
        events, nbytes = await self._read(MAX_END_EVENTS, MAX_END_BYTES)
        if self._seq >= self._last_seq:
            return
        # As many from the other end as are likely to be as much.
        likely = min(MAX_END_EVENTS, int(MAX_END_BYTES / (nbytes / events))) if nbytes else MAX_END_EVENTS
        self._leave_out(self._last_seq - likely)
        await self._read(MAX_END_EVENTS, 2 * MAX_END_BYTES)
        self._leave_out(self._last_seq)

    async def _read(self, most: int, most_bytes: int) -> tuple[int, int]:
        """Read on, up to so many events and bytes; return how many they were."""
        events = nbytes = 0
        while self._seq < self._last_seq and events < most and nbytes < most_bytes:
            page = await self._page()
            for event in page:
                if event.seq > self._last_seq:  # it has come since
                    break
                self.timeline.take(event)
                nbytes += len(event.payload)
                events += 1
                self._seq = event.seq
        return events, nbytes

    async def _page(self) -> tuple[Event, ...]:
        """Return the next events; `()`, and they are left out, where they are gone."""
        try:
            page = tuple(await self._stream.page(self._seq, _PAGE))
        except GapError as error:
            self._leave_out(max(error.earliest_seq - 1, self._seq + 1))
            return ()
        if not page:
            self._leave_out(self._last_seq)
        return page

    def _leave_out(self, last: int) -> None:
        """Go on after `last`, if that is further on."""
        last = min(last, self._last_seq)
        if last > self._seq:
            self.left_out.append(TraceRange(first=self._seq + 1, last=last))
            self.timeline.skip()
            self._seq = last
