"""The event-stream format of WHATWG HTML section 9.2.6, decoded incrementally from bytes.

The standard's algorithm decodes the stream as UTF-8 and then works on lines. Here lines are cut from bytes, which is the
same: CR, LF, the colon and the field names are ASCII, and a broken UTF-8 sequence never swallows an ASCII byte. It saves
decoding data which the dialect hands to a JSON parser that wants bytes anyway, and nothing but CR and LF can end a line
(text splitters also end lines at U+2028, U+0085 and others, which occur unescaped in JSON strings).

A read is split at LF once, and the lines are then taken in one of two ways, with the same results:

- the **block way**, for what providers really send: a run of `data: …` blocks, or of `event: …`, `data: …` blocks. That
  the lines are such a run is established by looking at every second (third) of them; the cost is a few C calls a read
  and one slice and one struct an event.
- the **line way**, for everything else, and for the block that an earlier read has begun.

The unfinished last line of a read is gathered in a buffer which grows in amortised constant time and is not searched
again, so an event trickled byte by byte costs its length.

CR and CRLF are first rewritten to LF; an LF at the start of a read after a CR at the end of the one before is dropped.
So a CR ends its line at once, and an event is not held back until the byte after it has come.

Limits. A line longer than `max_line_bytes`, or an event with more than `max_event_bytes` of data, is a
`RemoteProtocolError`. The events before it are not lost: if the same read completed any, `feed` returns them, sets `fault`,
and the next `feed` raises. So what is decoded does not depend on how the stream was cut into reads.
"""

from __future__ import annotations

from typing import Final

import attrs

from supervisor.errors import ConfigurationError, RemoteProtocolError
from supervisor.wire.event import WireEvent

__all__ = ["SSEDecoder"]

_BOM: Final = b"\xef\xbb\xbf"
_STRAY_BYTES: Final = 4096
_MAX_RETRY_MS: Final = 2**63 - 1
# Event names are few and repeat. The table is bounded, so that a peer which invents them cannot make it grow.
_NAMES: Final = 64
_NAME_LINE_BYTES: Final = 128


@attrs.define(kw_only=True, eq=False, repr=False)
class SSEDecoder:
    """Decode one event stream, fed in pieces of any size.

    Raises ConfigurationError for a limit that is not a positive number.
    """

    max_line_bytes: int = 1 << 20
    """The longest line, without its line end."""
    max_event_bytes: int = 4 << 20
    """The longest data of one event, its lines joined."""

    comments: int = attrs.field(default=0, init=False)
    """Comment lines seen: providers send them to show that they are alive."""
    last_event_id: str = attrs.field(default="", init=False)
    """The last event id, as of the last block that ended with an empty line."""
    retry: int | None = attrs.field(default=None, init=False)
    """The reconnection time in milliseconds; at most 2**63 - 1, to which a larger one is lowered."""
    stray: bytes = attrs.field(default=b"", init=False)
    """The first 4 KiB of lines (each ended by LF) that are neither a comment nor a field of the standard."""
    fault: RemoteProtocolError | None = attrs.field(default=None, init=False)
    """Set once a limit was passed; nothing after it is read."""

    _fast_bytes: int = attrs.field(default=0, init=False)
    _ended: bool = attrs.field(default=False, init=False)
    _begun: bool = attrs.field(default=False, init=False)
    _after_cr: bool = attrs.field(default=False, init=False)
    _in_block: bool = attrs.field(default=False, init=False)  # lines of an unfinished block have been taken
    _line: bytearray = attrs.field(factory=bytearray, init=False)  # the unfinished line
    _data: bytes | None = attrs.field(default=None, init=False)  # the first data line of the block
    _more: bytearray = attrs.field(factory=bytearray, init=False)  # the others, an LF before each
    _event: str = attrs.field(default="", init=False)
    _id: str = attrs.field(default="", init=False)
    _names: dict[bytes, str] = attrs.field(factory=dict, init=False)

    def __attrs_post_init__(self) -> None:
        for field in ("max_line_bytes", "max_event_bytes"):
            value = getattr(self, field)
            if not isinstance(value, int) or value < 1:
                raise ConfigurationError(field, value, "a positive number of bytes")
        self._fast_bytes = min(self.max_line_bytes, self.max_event_bytes)

    def __repr__(self) -> str:
        state = "ended" if self._ended else "failed" if self.fault else "open"
        return f"<SSEDecoder {state}, {self.buffered_bytes} bytes buffered, {self.comments} comments>"

    @property
    def pending(self) -> bytes:
        """The line that has not ended yet; at most `max_line_bytes`. Still there after `end`."""
        return bytes(self._line)

    @property
    def buffered_bytes(self) -> int:
        """Bytes held of the unfinished block: its unfinished line, data, and name.

        At most `max_event_bytes + 2 * max_line_bytes`.
        """
        return len(self._line) + len(self._data or b"") + len(self._more) + len(self._event)

    def feed(self, data: bytes) -> list[WireEvent]:
        """Return the events which these bytes complete.

        Raises RemoteProtocolError when a limit is passed; if events came before it in the same bytes they are returned
        first, with `fault` set, and the next call raises.
        """
        if self.fault is not None or self._ended:
            raise self._refusal()
        if not data:
            return []
        if not self._begun:
            data = self._without_bom(data)
            if not data:
                return []
        if self._after_cr or b"\r" in data:
            data = self._with_lf(data)
        held = self._line
        if (
            data.find(b"\n") == len(data) - 2
            and data.startswith(b"data: ")
            and data.endswith(b"\n")
            and not (held or self._in_block)
            and len(data) <= self._fast_bytes
        ):
            # One data block is the whole read, as it mostly is when a provider generates at its own pace.
            return [WireEvent(data[6:-2], "message", self._id, self.retry)]
        events: list[WireEvent] = []
        lines = data.split(b"\n")
        rest = lines.pop()
        try:
            if lines:
                fits = len(held) + len(data) <= self._fast_bytes
                if held:
                    held += lines[0]
                    lines[0] = bytes(held)
                    held.clear()
                self._take(lines, events, fits=fits)
            if len(held) + len(rest) > self.max_line_bytes:
                raise self._line_too_long()
            held += rest
        except RemoteProtocolError as fault:
            # Not the exception itself: its traceback would keep this read alive.
            self.fault = RemoteProtocolError(*fault.args)
            self._line.clear()
            self._discard_block()
            if not events:
                raise
        return events

    def end(self) -> None:
        """Say that the stream has ended: a block that was not ended by an empty line is discarded.

        `pending` and `stray` can still be read. Feeding again is a RuntimeError.
        """
        self._ended = True
        self._discard_block()

    def _refusal(self) -> Exception:
        if self.fault is not None:
            return RemoteProtocolError(*self.fault.args)
        return RuntimeError(
            "this decoder was told that the stream has ended; make a new one for the next response"
        )

    def _discard_block(self) -> None:
        self._data = None
        self._more.clear()
        self._event = ""
        self._in_block = False

    # --- the start of the stream, and line ends ---

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
        self._after_cr = data.endswith(b"\r")
        return data.replace(b"\r\n", b"\n").replace(b"\r", b"\n")

    # --- complete lines ---

    def _take(self, lines: list[bytes], events: list[WireEvent], *, fits: bool) -> None:
        """Take complete lines. `fits` says that none of them, alone or joined, can pass a limit."""
        if self._in_block:
            first = lines.index(b"") + 1 if b"" in lines else len(lines)
            self._line_by_line(lines[:first], events)
            lines = lines[first:]
        whole = len(lines)
        while whole and lines[whole - 1]:
            whole -= 1
        if whole:
            blocks = lines if whole == len(lines) else lines[:whole]
            if not (fits and (self._data_blocks(blocks, events) or self._named_blocks(blocks, events))):
                self._line_by_line(blocks, events)
        if whole < len(lines):
            self._in_block = True
            self._line_by_line(lines[whole:], events)

    def _data_blocks(self, lines: list[bytes], events: list[WireEvent]) -> bool:
        """Take the lines if they are data lines and empty lines in turn."""
        if lines[0][:6] != b"data: " or any(lines[1::2]):
            return False
        values = [line[6:] for line in lines[::2] if line[:6] == b"data: "]
        if 2 * len(values) != len(lines):
            return False
        if self.retry is None and not self._id:
            events.extend(map(WireEvent, values))
        else:
            events.extend([WireEvent(value, "message", self._id, self.retry) for value in values])
        return True

    def _named_blocks(self, lines: list[bytes], events: list[WireEvent]) -> bool:
        """Take the lines if they are event lines of known names, data lines and empty lines in turn."""
        if lines[0][:6] != b"event:" or len(lines) % 3 or any(lines[2::3]):
            return False
        names = [self._names.get(line) for line in lines[::3]]
        last_id, retry = self._id, self.retry
        blocks = [
            WireEvent(line[6:], name, last_id, retry)
            for line, name in zip(lines[1::3], names, strict=True)
            if name is not None and line[:6] == b"data: "
        ]
        if len(blocks) != len(names):
            return False
        events.extend(blocks)
        return True

    def _line_by_line(self, lines: list[bytes], events: list[WireEvent]) -> None:
        for line in lines:
            if line:
                self._field(line)
            else:
                self._dispatch(events)

    def _field(self, line: bytes) -> None:
        if len(line) > self.max_line_bytes:
            raise self._line_too_long()
        field, _, value = line.partition(b":")
        if value.startswith(b" "):
            value = value[1:]
        if field == b"data":
            held = 0 if self._data is None else len(self._data) + len(self._more) + 1
            if held + len(value) > self.max_event_bytes:
                raise RemoteProtocolError(
                    f"the upstream sent an event with more than {self.max_event_bytes} bytes of data (max_event_bytes)"
                )
            if self._data is None:
                self._data = value
            else:
                self._more += b"\n"
                self._more += value
        elif not field:
            self.comments += 1
        elif field == b"event":
            self._event = self._name(line)
        elif field == b"id":
            if b"\0" not in value:
                self._id = value.decode("utf-8", "replace")
        elif field == b"retry":
            if value.isdigit():
                digits = value.lstrip(b"0") or b"0"
                self.retry = _MAX_RETRY_MS if len(digits) > 19 else min(int(digits), _MAX_RETRY_MS)
        elif len(self.stray) < _STRAY_BYTES:
            self.stray = (self.stray + line[:_STRAY_BYTES] + b"\n")[:_STRAY_BYTES]

    def _name(self, line: bytes) -> str:
        """Return the event type which an event line sets; an empty one means `message`."""
        name = self._names.get(line)
        if name is None:
            value = line.partition(b":")[2].removeprefix(b" ")
            name = value.decode("utf-8", "replace") or "message"
            if len(self._names) < _NAMES and len(line) <= _NAME_LINE_BYTES:
                self._names[line] = name
        return name

    def _dispatch(self, events: list[WireEvent]) -> None:
        self.last_event_id = self._id
        if self._data is not None:
            data = self._data + self._more if self._more else self._data
            events.append(WireEvent(data, self._event or "message", self._id, self.retry))
            self._data = None
            self._more.clear()
        self._event = ""
        self._in_block = False

    def _line_too_long(self) -> RemoteProtocolError:
        return RemoteProtocolError(
            f"the upstream sent a line of more than {self.max_line_bytes} bytes in its event stream (max_line_bytes)"
        )
