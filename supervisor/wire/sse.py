"""The event-stream format of WHATWG HTML section 9.2.6, decoded incrementally from bytes.

The standard's algorithm decodes the stream as UTF-8 and then works on lines. Here lines are cut from bytes, which is the
same: CR, LF, the colon and the field names are ASCII, and a broken UTF-8 sequence never swallows an ASCII byte. It saves
decoding data which the dialect hands to a JSON parser that wants bytes anyway, and nothing but CR and LF can end a line
(text splitters also end lines at U+2028, U+0085 and others, which occur unescaped in JSON strings).

A read is taken in one of four ways, all with the same results; each is tried on what the one before has refused:

- **one block**: the read is one event, as it mostly is when a provider generates at its own pace. Three cuts find its data,
  and what stands before it is looked up in a table.
- **like blocks**: a run of blocks that begin with the same bytes (`data: `, or an `event: …` line and `data: `). It is
  split where one block ends and the next begins, so that what comes out are the events' data; that no LF is left in them
  shows that it was such a run. The bytes that blocks begin with are learned from the last block seen.
- **columns**, for runs of blocks of the same lines, where names or ids differ: the read is split at LF, and every second
  (third, fourth) line is of one kind.
- **line by line**, for everything else.

The unfinished last line of a read is gathered in a buffer which grows in amortised constant time and is not searched
again, so an event trickled byte by byte costs its length. The whole lines of its block before it are kept as they are
and read again with the rest, if they are few and have no effect before the block ends; else they are taken at once.

CR and CRLF are first rewritten to LF; an LF at the start of a read after a CR at the end of the one before is dropped.
So a CR ends its line at once, and an event is not held back until the byte after it has come.

Limits. A line longer than `max_line_bytes`, or an event with more than `max_event_bytes` of data, is a
`RemoteProtocolError`. The events before it are not lost: if the same read completed any, `feed` returns them, sets `fault`,
and the next `feed` raises. So what is decoded does not depend on how the stream was cut into reads.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import repeat
from typing import Final

import attrs

from supervisor.errors import ConfigurationError, RemoteProtocolError
from supervisor.wire.event import WireEvent

__all__ = ["SSEDecoder"]

# As numbers: asked for a byte string, `in` first tries whether it is a number, which takes six times as long.
_CR: Final = 13
_LF: Final = 10
_BOM: Final = b"\xef\xbb\xbf"
_STRAY_BYTES: Final = 4096
_MAX_RETRY_MS: Final = 2**63 - 1
# Event names are few and repeat. The table is bounded, so that a peer which invents them cannot make it grow.
_NAMES: Final = 64
_NAME_LINE_BYTES: Final = 128
# Fields that nobody sees before their block has ended. Few lines of them may be read again: that bounds the repetition.
_WITHOUT_EFFECT: Final = (b"data:", b"event:", b"id:")
_FEW_LINES: Final = 3
_SMALL_BYTES: Final = 1024
"""Only a read up to this size is looked at twice for being one block: there it saves more than it costs."""


@attrs.define(kw_only=True, eq=False, repr=False)
class SSEDecoder:
    """Decode one event stream, fed in pieces of any size.

    Raises ConfigurationError for a limit that is not a positive number.
    """

    max_line_bytes: int = 1 << 20
    """The longest line, without its line end."""
    max_event_bytes: int = 4 << 20
    """The longest data of one event, its lines joined."""
    last_event_id: str = ""
    """The last event id, as of the last block that ended with an empty line. Given: that of the connection before this one,
    which it takes the place of (WHATWG HTML, 9.2.3)."""

    comments: int = attrs.field(default=0, init=False)
    """Comment lines seen: providers send them to show that they are alive."""
    retry: int | None = attrs.field(default=None, init=False)
    """The reconnection time in milliseconds; at most 2**63 - 1, to which a larger one is lowered."""
    stray: bytes = attrs.field(default=b"", init=False)
    """The first 4 KiB of lines (each ended by LF) that are neither a comment nor a field of the standard."""
    asides: list[tuple[int, bytes]] = attrs.field(factory=list, init=False)
    """Those lines of the last `feed` that met any, each after the number of events of that `feed` that came before it."""
    fault: RemoteProtocolError | None = attrs.field(default=None, init=False)
    """Set once a limit was passed; nothing after it is read."""

    _fast_bytes: int = attrs.field(default=0, init=False)
    _between: bool = attrs.field(
        default=False, init=False
    )  # nothing is unfinished: a read begins with a block
    _ended: bool = attrs.field(default=False, init=False)
    _begun: bool = attrs.field(default=False, init=False)
    _after_cr: bool = attrs.field(default=False, init=False)
    _in_block: bool = attrs.field(default=False, init=False)  # lines of an unfinished block have been taken
    _before: bytes = attrs.field(default=b"", init=False)  # lines of an unfinished block that have not
    _line: bytearray = attrs.field(factory=bytearray, init=False)  # the unfinished line
    _data: bytes | None = attrs.field(default=None, init=False)  # the first data line of the block
    _more: bytearray = attrs.field(factory=bytearray, init=False)  # the others, an LF before each
    _event: str = attrs.field(default="", init=False)
    _id: str = attrs.field(default="", init=False)
    _names: dict[bytes, str] = attrs.field(factory=dict, init=False)  # by event line
    _heads: dict[bytes, str] = attrs.field(
        factory=lambda: {b"": "message"}, init=False
    )  # by that line and its LF
    # What the next block is expected to begin with: see `_expect`.
    _head: bytes = attrs.field(default=b"", init=False)
    _head_name: str = attrs.field(default="message", init=False)
    _start: bytes = attrs.field(default=b"data: ", init=False)
    _after_id: bytes = attrs.field(default=b"", init=False)
    _seam: bytes = attrs.field(default=b"\n\ndata: ", init=False)

    def __attrs_post_init__(self) -> None:
        for field in ("max_line_bytes", "max_event_bytes"):
            value = getattr(self, field)
            if not isinstance(value, int) or value < 1:
                raise ConfigurationError(field, value, "a positive number of bytes")
        self._id = self.last_event_id
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
        return (
            len(self._before) + len(self._line) + len(self._data or b"") + len(self._more) + len(self._event)
        )

    def feed(self, data: bytes) -> list[WireEvent]:  # noqa: PLR0915 - the hot path makes no calls it can do without
        """Return the events which these bytes complete.

        Raises RemoteProtocolError when a limit is passed; if events came before it in the same bytes they are returned
        first, with `fault` set, and the next call raises.
        """
        if self._between and len(data) <= self._fast_bytes:
            rest = data.removeprefix(self._start)
            if len(rest) != len(data):
                line, _, rest = rest.partition(b"\n")
                if rest == b"\n":
                    if _CR not in data and not self._after_id:
                        return [WireEvent(line, self._head_name, self._id, self.retry)]
                elif self._after_id:
                    value, _, end = rest.removeprefix(self._after_id).partition(b"\n")
                    if end == b"\n" and len(value) + 2 != len(rest) and _CR not in data and 0 not in line:
                        self._id = self.last_event_id = line.decode("utf-8", "replace")
                        return [WireEvent(value, self._head_name, self._id, self.retry)]
            if len(data) <= _SMALL_BYTES and (event := self._one_block(data)) is not None:
                return [event]
        elif self.fault is not None or self._ended:
            raise self._refusal()
        if not data:
            return []
        if not self._begun:
            data = self._without_bom(data)
            if not data:
                return []
        if self._after_cr or _CR in data:
            data = self._with_lf(data)
        events: list[WireEvent] = []
        if self.asides:
            self.asides.clear()
        held = self._line
        try:
            if held or self._before:
                if _LF not in data:
                    if len(held) + len(data) > self.max_line_bytes:
                        raise self._line_too_long()
                    held += data
                    return events
                data = b"".join((self._before, held, data))
                self._before = b""
                held.clear()
            fits = len(data) <= self._fast_bytes
            if fits and not (self._in_block or self._after_id) and data[: len(self._start)] == self._start:
                data = self._like_blocks(data, events)
            if data:
                lines = data.split(b"\n")
                rest = lines.pop()
                if lines:
                    self._take(lines, events, fits=fits)
                if len(rest) > self.max_line_bytes:
                    raise self._line_too_long()
                held += rest
        except RemoteProtocolError as fault:
            # Not the exception itself: its traceback would keep this read alive.
            self.fault = RemoteProtocolError(*fault.args)
            self._between = False
            self._line.clear()
            self._discard_block()
            if not events:
                raise
        else:
            self._between = not (held or self._before or self._in_block or self._after_cr)
        return events

    def end(self) -> None:
        """Say that the stream has ended: a block that was not ended by an empty line is discarded.

        `pending` and `stray` can still be read. Feeding again is a RuntimeError.
        """
        self._ended = True
        self._between = False
        self._discard_block()

    def _refusal(self) -> Exception:
        if self.fault is not None:
            return RemoteProtocolError(*self.fault.args)
        return RuntimeError(
            "this decoder was told that the stream has ended; make a new one for the next response"
        )

    def _discard_block(self) -> None:
        self._before = b""
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

    # --- whole blocks ---

    def _one_block(self, data: bytes) -> WireEvent | None:
        """Take a read that is a block with a usual head before its one data line; None if it is anything else."""
        head, _, rest = data.partition(b"data: ")
        value, _, end = rest.partition(b"\n")
        if end != b"\n" or _CR in data:
            return None
        last_id, ended, more = head.removeprefix(b"id: ").partition(b"\n")
        if head[:4] != b"id: ":
            more = head
        elif not ended or 0 in last_id:
            return None
        name = self._heads.get(more)
        if name is None:
            return None
        if more is not head:
            self._id = self.last_event_id = last_id.decode("utf-8", "replace")
        self._expect(more, name, with_id=more is not head)
        return WireEvent(value, name, self._id, self.retry)

    def _expect(self, head: bytes, name: str, *, with_id: bool) -> None:
        """Expect that the next blocks are like this one: an id or none, and before their data line `head`."""
        self._head = head
        self._head_name = name
        start = head + b"data: "
        self._start, self._after_id = (b"id: ", start) if with_id else (start, b"")
        self._seam = b"\n\n" + self._start

    def _like_blocks(self, data: bytes, events: list[WireEvent]) -> bytes:
        """Take the blocks that `data` begins with, if all but the last begin as expected; return what is left."""
        values = data.split(self._seam)
        values[0] = values[0].removeprefix(self._start)
        last = values.pop()
        if values and _LF in b"".join(values):
            return data
        value, ended, after = last.partition(b"\n")
        if after[:1] == b"\n":
            values.append(value)
            left = after[1:]
        elif not ended:
            self._before = self._head
            self._line += b"data: "
            self._line += value
            left = b""
        else:
            left = self._start + last
        if self._head or self._id or self.retry is not None:
            name, last_id, retry = self._head_name, self._id, self.retry
            events += [WireEvent(value, name, last_id, retry) for value in values]
        else:
            events += map(WireEvent, values)
        return left

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
            if not (fits and self._columns(blocks, events)):
                self._line_by_line(blocks, events)
        if whole < len(lines):
            lines = lines[whole:]
            if fits and _without_effect(lines):
                self._before = b"\n".join(lines) + b"\n"
            else:
                self._in_block = True
                self._line_by_line(lines, events)

    def _columns(self, lines: list[bytes], events: list[WireEvent]) -> bool:
        """Take the lines if they are blocks of the same kinds of lines: `id: `, `event:` of a known name, `data: `."""
        count = lines.index(b"") + 1
        if count > 4 or len(lines) % count or any(lines[count - 1 :: count]):
            return False
        column = lines[count - 2 :: count]
        values = [line.removeprefix(b"data: ") for line in column]
        if len(b"".join(column)) - len(b"".join(values)) != 6 * len(values):
            return False
        at = int(lines[0][:4] == b"id: ")
        head, name = b"", "message"
        names: Iterable[str] = repeat(name)
        if count - at == 3:
            column = lines[at::count]
            found = [told for line in column if (told := self._names.get(line)) is not None]
            if len(found) != len(column):
                return False
            head, name, names = column[-1] + b"\n", found[-1], found
        elif count - at != 2:
            return False
        ids: list[str] = []
        if at:
            joined = b"\n".join(lines[::count])
            # A broken UTF-8 sequence does not reach over a line end, so the ids may be decoded together.
            ids = joined[4:].decode("utf-8", "replace").split("\nid: ")
            if 0 in joined or len(ids) != len(values):
                return False
            self._id = self.last_event_id = ids[-1]
        events += map(WireEvent, values, names, ids or repeat(self._id), repeat(self.retry))
        if head != self._head or bool(self._after_id) != bool(ids):
            self._expect(head, name, with_id=bool(ids))
        return True

    def _line_by_line(self, lines: list[bytes], events: list[WireEvent]) -> None:
        for line in lines:
            if line:
                if not self._field(line):
                    self.asides.append((len(events), line))
            else:
                self._dispatch(events)

    def _field(self, line: bytes) -> bool:
        """Take a line that is not empty. False if it is neither a comment nor a field of the standard."""
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
        else:
            if len(self.stray) < _STRAY_BYTES:
                self.stray = (self.stray + line[:_STRAY_BYTES] + b"\n")[:_STRAY_BYTES]
            return False
        return True

    def _name(self, line: bytes) -> str:
        """Return the event type which an event line sets; an empty one means `message`."""
        name = self._names.get(line)
        if name is None:
            value = line.partition(b":")[2].removeprefix(b" ")
            name = value.decode("utf-8", "replace") or "message"
            if len(self._names) < _NAMES and len(line) <= _NAME_LINE_BYTES:
                self._names[line] = name
                self._heads[line + b"\n"] = name
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


def _without_effect(lines: list[bytes]) -> bool:
    """Whether these lines may be kept and read again: nobody sees anything of them before their block has ended."""
    if len(lines) > _FEW_LINES:
        return False
    for line in lines:  # noqa: SIM110 - as fast as may be: `all` makes a generator
        if not line.startswith(_WITHOUT_EFFECT):
            return False
    return True
