"""Logs what becomes of streams: what failed or expired at INFO, what else there is to say at DEBUG. Never an event, nor any text."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from supervisor.streams import Outcome, State, Stream

__all__ = ["StreamLog"]

_log = logging.getLogger("supervisor.streams")


class StreamLog:
    """An observer that logs: `supervisor.observe(StreamLog())`. Each record has the stream's id, and its facts as fields."""

    def __repr__(self) -> str:
        return "<StreamLog>"

    def started(self, stream: Stream) -> None:
        """Log a start."""
        if _log.isEnabledFor(logging.DEBUG):  # else nothing is made for it
            _log.debug("started", extra=_fields(stream))

    def attempted(self, stream: Stream, record: Mapping[str, Any]) -> None:
        """Log a further attempt, and why there has to be one."""
        if record.get("rung") is not None:
            more = {"attempt": record["attempt"], "rung": record["rung"], "at": record.get("upstream")}
            _log.info("another attempt: %s", record.get("cause") or "", extra=_fields(stream, more))

    def began(self, stream: Stream) -> None:
        """Log a first event."""
        if _log.isEnabledFor(logging.DEBUG):
            first_s = round(stream.first_event_s or 0.0, 3)
            _log.debug("the answer has begun", extra=_fields(stream, {"first_event_s": first_s}))

    def ended(self, stream: Stream, outcome: Outcome | None) -> None:
        """Log an ending; one that was lost has been logged as an error."""
        if outcome is None:
            return
        level = logging.INFO if outcome.state in (State.FAILED, State.EXPIRED) else logging.DEBUG
        if not _log.isEnabledFor(level):
            return
        more = {
            "actor": outcome.actor,
            "duration_s": round(outcome.duration_s, 3),
            "attempts": outcome.attempts,
            "events": outcome.events,
        }
        why = f": {outcome.message}" if outcome.message else ""
        _log.log(level, "%s(%s)%s", outcome.state, outcome.reason, why, extra=_fields(stream, more))


def _fields(stream: Stream, more: Mapping[str, Any] | None = None) -> dict[str, Any]:
    told = {"stream": stream.id, "key": stream.key, "upstream": stream.upstream, "tenant": stream.tenant}
    return {name: value for name, value in {**told, **(more or {})}.items() if value is not None}
