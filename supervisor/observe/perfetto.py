"""A trace as a file for viewers of Chrome's trace events: https://ui.perfetto.dev, chrome://tracing, speedscope.

The format is the JSON object of "Trace Event Format" (Google, 2016): `X` events have a start and a length, `i` events a moment, `C` events
values that are drawn as an area; times are microseconds.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import msgspec

from supervisor.observe.timeline import Trace, TraceAttempt

__all__ = ["chrome_trace"]

_PID = 1
_STREAM, _ATTEMPTS, _STALLS, _MARKS = 1, 2, 3, 4
_ROWS = {_STREAM: "stream", _ATTEMPTS: "attempts", _STALLS: "stalls", _MARKS: "marks"}


def chrome_trace(trace: Trace) -> dict[str, Any]:
    """Return the trace as a JSON object that these viewers open."""
    return {
        "displayTimeUnit": "ms",
        "otherData": {"id": trace.id, "started_at": trace.started_at, "state": trace.state},
        "traceEvents": [*_names(trace), *_rows(trace), *_counters(trace)],
    }


def _names(trace: Trace) -> Iterator[dict[str, Any]]:
    yield _event("M", "process_name", _STREAM, args={"name": f"stream {trace.id}"})
    for row, name in _ROWS.items():
        yield _event("M", "thread_name", row, args={"name": name})
        yield _event("M", "thread_sort_index", row, args={"sort_index": row})


def _rows(trace: Trace) -> Iterator[dict[str, Any]]:
    ended = f"{trace.state}({trace.reason})" if trace.ended else trace.state
    about = {"key": trace.key, "upstream": trace.upstream, "model": trace.model, "labels": trace.labels}
    about["outcome"] = msgspec.to_builtins(trace.outcome)
    yield _span(ended, _STREAM, 0.0, trace.duration_ms, about)
    for attempt in trace.attempts:
        yield from _attempt(attempt)
    for stall in trace.stalls:
        where = {"attempt": stall.attempt, "after_seq": stall.after_seq}
        yield _span(f"nothing for {stall.ms:.0f} ms", _STALLS, stall.from_ms, stall.to_ms, where)
    for mark in trace.marks:
        told = {"seq": mark.seq, **mark.details}
        yield _event("i", mark.kind, _MARKS, ts=mark.at_ms * 1000, s="t", args=told)


def _attempt(attempt: TraceAttempt) -> Iterator[dict[str, Any]]:
    told = msgspec.to_builtins(attempt)
    name = f"{attempt.attempt}: {attempt.rung or 'first'} at {attempt.upstream or '?'}"
    if attempt.withdrawn:
        name += " (withdrawn)"
    yield _span(name, _ATTEMPTS, attempt.from_ms, attempt.to_ms, told)
    first_ms = attempt.first_event_ms
    if first_ms is None:
        yield _span("no event", _ATTEMPTS, attempt.from_ms, attempt.to_ms, {})
        return
    yield _span("until the first event", _ATTEMPTS, attempt.from_ms, first_ms, {})
    yield _span(f"{attempt.events} events", _ATTEMPTS, first_ms, attempt.to_ms, {"bytes": attempt.bytes})


def _counters(trace: Trace) -> Iterator[dict[str, Any]]:
    step = trace.timeline.step_ms
    for number, (events, nbytes) in enumerate(zip(trace.timeline.events, trace.timeline.bytes, strict=True)):
        ts = number * step * 1000
        yield _event("C", "events/s", _STREAM, ts=ts, args={"events/s": events * 1000 / step})
        yield _event("C", "bytes/s", _STREAM, ts=ts, args={"bytes/s": nbytes * 1000 / step})


def _span(name: str, row: int, from_ms: float, to_ms: float, args: dict[str, Any]) -> dict[str, Any]:
    return _event("X", name, row, ts=from_ms * 1000, dur=max(0.0, to_ms - from_ms) * 1000, args=args)


def _event(phase: str, name: str, row: int, **fields: Any) -> dict[str, Any]:
    return {"ph": phase, "name": name, "pid": _PID, "tid": row, "ts": 0.0, **fields}
