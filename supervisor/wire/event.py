"""What a wire decoder yields: one event of an event stream, before any dialect has looked at it."""

from __future__ import annotations

import msgspec

__all__ = ["WireEvent"]


class WireEvent(msgspec.Struct, frozen=True, gc=False):
    """One dispatched event.

    `data` is kept as the bytes received (lines joined with LF), so that nothing is decoded that nobody reads; the
    WHATWG algorithm's UTF-8 decoding with replacement is `data.decode("utf-8", "replace")`.
    """

    data: bytes
    event: str = "message"
    id: str = ""
    """The last event id in force when the event was dispatched."""
    retry: int | None = None
    """The reconnection time in force when the event was dispatched, in milliseconds."""
