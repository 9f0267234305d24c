"""Feed a recorded response body through the decoding that live streams use, and tell how it would have ended."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import attrs

from supervisor.dialects.base import Delta, Fault, Snapshot
from supervisor.dialects.catalog import BUILTIN, PRESETS
from supervisor.dialects.fold import Fold
from supervisor.dialects.reading import BodyReader
from supervisor.errors import ConfigurationError, RemoteProtocolError
from supervisor.wire.event import WireEvent
from supervisor.wire.sse import SSEDecoder

__all__ = ["SSE", "ReplayResult", "replay"]

SSE = "sse"
"""The name that replays an event stream without any dialect."""


@attrs.frozen(kw_only=True)
class ReplayResult:
    """How a recorded body was read. For `sse`, only `wire_events`, `last_event_id` and `fault` say anything."""

    dialect: str
    state: str = ""
    reason: str = ""
    snapshot: Snapshot = attrs.field(factory=Snapshot)
    fault: Fault | None = None
    events: int = 0
    """How many events could be read, the end marker included."""
    skipped: int = 0
    wire_events: tuple[WireEvent, ...] = ()
    last_event_id: str = ""

    def to_json_object(self, file: str | None = None) -> dict[str, Any]:
        """Return the object that `replay --json` prints. What an answer does not have is null, but its text is ""."""
        named = {} if file is None else {"file": file}
        error = None if self.fault is None else {"kind": self.fault.kind, "message": self.fault.message}
        if self.dialect == SSE:
            told = {
                "events": [
                    {
                        "event": event.event,
                        "data": event.data.decode("utf-8", "replace"),
                        "id": event.id,
                        "retry": event.retry,
                    }
                    for event in self.wire_events
                ],
                "last_event_id": self.last_event_id,
            }
            return named | told | ({} if error is None else {"error": error})
        answer = self.snapshot
        usage = answer.usage
        return named | {
            "state": self.state,
            "reason": self.reason,
            "text": answer.text,
            "reasoning": answer.reasoning or None,
            "refusal": answer.refusal or None,
            "tool_calls": [
                {"id": call.id, "name": call.name, "arguments": call.arguments} for call in answer.tool_calls
            ]
            or None,
            "choices": [
                {"index": choice.index, "text": choice.text, "finish_reason": choice.finish_reason}
                for choice in answer.choices
            ],
            "finish_reason": answer.finish_reason,
            "usage": None if usage is None else {"input": usage.input, "output": usage.output},
            "error": error,
            "events": self.events,
        }


class _Recording:
    """A sink that keeps the fold and the first seal."""

    def __init__(self) -> None:
        self.fold = Fold()
        self.state = ""
        self.reason = ""
        self.fault: Fault | None = None

    @property
    def sealed(self) -> bool:
        return bool(self.state)

    def append(self, payload: bytes, name: str, deltas: tuple[Delta, ...]) -> None:  # noqa: ARG002 - only the meaning counts
        for delta in deltas:
            self.fold.apply(delta)

    def skip(self, payload: bytes, why: str, name: str = "") -> None:
        """Nothing: the body reader counts."""

    def touch(self) -> None:
        """Nothing: there is no clock."""

    def mark(self, reason: str | None) -> None:
        """Nothing: the body will end."""

    def complete(self, reason: str) -> bool:
        return self._seal("completed", reason, None)

    def fail(self, reason: str, fault: Fault) -> bool:
        return self._seal("failed", reason, fault)

    def _seal(self, state: str, reason: str, fault: Fault | None) -> bool:
        if self.state:
            return False
        self.state, self.reason, self.fault = state, reason, fault
        return True


def replay(dialect: str, data: bytes | Iterable[bytes], *, chunk: int | None = None) -> ReplayResult:
    """Read a recorded body (the response's body, its transfer coding removed) as a live stream would.

    `data` is the body, or its pieces; with `chunk`, it is fed that many bytes at a time. The body's end is taken for a
    clean one. Raises ConfigurationError for a dialect that does not exist or has no body, and for a `chunk` below 1.
    """
    if chunk is not None and chunk < 1:
        raise ConfigurationError("chunk", chunk, "a number of bytes, 1 or more")
    pieces = _pieces(data, chunk)
    if dialect == SSE:
        return _replay_sse(pieces)
    chosen = BUILTIN.get(dialect) or PRESETS.get(dialect)
    if chosen is None or chosen.framing == "none":
        names = sorted(name for name, known in {**BUILTIN, **PRESETS}.items() if known.framing != "none")
        raise ConfigurationError("dialect", dialect, f"one of {', '.join([*names, SSE])}")
    sink = _Recording()
    body = BodyReader(chosen, sink)
    for piece in pieces:
        if sink.sealed:
            break
        body.feed(piece)
    body.end(clean=True)
    return ReplayResult(
        dialect=dialect,
        state=sink.state,
        reason=sink.reason,
        snapshot=sink.fold.snapshot(seq=body.events),
        fault=sink.fault,
        events=body.events,
        skipped=body.skipped,
    )


def _replay_sse(pieces: Iterator[bytes]) -> ReplayResult:
    decoder = SSEDecoder()
    events: list[WireEvent] = []
    fault = None
    try:
        for piece in pieces:
            events += decoder.feed(piece)
            if decoder.fault is not None:
                raise decoder.fault
    except RemoteProtocolError as exc:
        fault = Fault(kind="protocol", message=str(exc))
    decoder.end()
    return ReplayResult(
        dialect=SSE,
        fault=fault,
        events=len(events),
        wire_events=tuple(events),
        last_event_id=decoder.last_event_id,
    )


def _pieces(data: bytes | Iterable[bytes], chunk: int | None) -> Iterator[bytes]:
    for piece in (data,) if isinstance(data, bytes | bytearray | memoryview) else data:
        whole = bytes(piece)
        if chunk is None:
            yield whole
        else:
            for start in range(0, len(whole), chunk):
                yield whole[start : start + chunk]
