"""JSON values one to a line (NDJSON, JSON Lines, JSON text sequences), cut incrementally from bytes.

A line is an event. Lines are cut from bytes, not from text: no line end but LF, CRLF and CR is one, so that a U+2028 inside a
JSON string stays where it is, and a character may be split between two reads. A raw line end can never be inside a JSON
string, so a line that is broken costs that line only; whether a line is JSON is for the dialect to find out.

Blank lines, and lines which begin with a colon (some proxies keep NDJSON alive as they do event streams), are keep-alives:
they are counted in `comments`. The record separators of RFC 7464 are white space here.

The unfinished last line is gathered in a buffer that is not searched again. A line of more than `max_line_bytes` or
`max_event_bytes` is a `RemoteProtocolError`: the events before it are returned first, with `fault` set, and the next `feed`
raises, so what is decoded does not depend on how the stream was cut into reads.
"""

from __future__ import annotations

from typing import Final

import attrs

from supervisor.errors import ConfigurationError, RemoteProtocolError
from supervisor.wire.event import WireEvent

__all__ = ["NDJSONDecoder"]

_BOM: Final = b"\xef\xbb\xbf"
_BLANK: Final = b" \t\x1e"


@attrs.define(kw_only=True, eq=False, repr=False)
class NDJSONDecoder:
    """Decode one body of lines, fed in pieces of any size.

    Raises ConfigurationError for a limit that is not a positive number.
    """

    max_line_bytes: int = 1 << 20
    """The longest line, without its line end."""
    max_event_bytes: int = 4 << 20
    """The same, under the name that it has in every framing: the smaller of both counts."""

    comments: int = attrs.field(default=0, init=False)
    """Blank lines and lines that begin with a colon: the upstream is alive."""
    stray: bytes = attrs.field(default=b"", init=False)
    """Always empty: what is no JSON is an event, too, which the dialect will refuse."""
    asides: list[tuple[int, bytes]] = attrs.field(factory=list, init=False)
    """Always empty, for the same reason."""
    fault: RemoteProtocolError | None = attrs.field(default=None, init=False)
    """Set once a limit was passed; nothing after it is read."""

    _ended: bool = attrs.field(default=False, init=False)
    _begun: bool = attrs.field(default=False, init=False)
    _after_cr: bool = attrs.field(default=False, init=False)
    _line: bytearray = attrs.field(factory=bytearray, init=False)  # the unfinished line
    _limit: int = attrs.field(default=0, init=False)

    def __attrs_post_init__(self) -> None:
        for field in ("max_line_bytes", "max_event_bytes"):
            value = getattr(self, field)
            if not isinstance(value, int) or value < 1:
                raise ConfigurationError(field, value, "a positive number of bytes")
        self._limit = min(self.max_line_bytes, self.max_event_bytes)

    def __repr__(self) -> str:
        state = "ended" if self._ended else "failed" if self.fault else "open"
        return f"<NDJSONDecoder {state}, {self.buffered_bytes} bytes buffered, {self.comments} comments>"

    @property
    def pending(self) -> bytes:
        """The line that has not ended yet; at most `max_line_bytes`. Still there after `end`."""
        return bytes(self._line)

    @property
    def buffered_bytes(self) -> int:
        """Bytes held of the unfinished line: at most the smaller of the two limits."""
        return len(self._line)

    @property
    def open(self) -> bool:
        """Whether something has begun and not ended: a line that is not blank so far."""
        return bool(self._line.strip(_BLANK))

    def feed(self, data: bytes) -> list[WireEvent]:
        """Return the events which these bytes complete.

        Raises RemoteProtocolError when a limit is passed; if events came before it in the same bytes they are returned
        first, with `fault` set, and the next call raises.
        """
        if self.fault is not None:
            raise RemoteProtocolError(*self.fault.args)
        if self._ended:
            raise RuntimeError(
                "this decoder was told that the body has ended; make a new one for the next response"
            )
        if not self._begun:
            data = self._without_bom(data)
        if not data:
            return []
        if self._after_cr or b"\r" in data:
            data = self._with_lf(data)
        held = self._line
        lines = data.split(b"\n")
        rest = lines.pop()
        if lines and held:
            held += lines[0]
            lines[0] = bytes(held)
            held.clear()
        events: list[WireEvent] = []
        for line in lines:
            if len(line) > self._limit:
                return self._too_long(events)
            text = line.strip(_BLANK)
            if not text or text[0] == 0x3A:
                self.comments += 1
            else:
                events.append(WireEvent(text))
        if len(held) + len(rest) > self._limit:
            return self._too_long(events)
        held += rest
        return events

    def end(self) -> None:
        """Say that the body has ended. `pending` can still be read. Feeding again is a RuntimeError."""
        self._ended = True

    def _without_bom(self, data: bytes) -> bytes:
        head = bytes(self._line) + data
        if len(head) < len(_BOM) and _BOM.startswith(head):
            self._line[:] = head
            return b""
        self._begun = True
        self._line.clear()
        return head.removeprefix(_BOM)

    def _with_lf(self, data: bytes) -> bytes:
        if self._after_cr and data.startswith(b"\n"):
            data = data[1:]
            self._after_cr = False
        if data:
            self._after_cr = data.endswith(b"\r")
        return data.replace(b"\r\n", b"\n").replace(b"\r", b"\n")

    def _too_long(self, events: list[WireEvent]) -> list[WireEvent]:
        name = "max_line_bytes" if self._limit == self.max_line_bytes else "max_event_bytes"
        self.fault = RemoteProtocolError(
            f"the upstream sent a line of more than {self._limit} bytes ({name})"
        )
        self._line.clear()
        if not events:
            raise RemoteProtocolError(*self.fault.args)
        return events
