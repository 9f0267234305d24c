"""The elements of a streamed JSON array, cut incrementally from bytes.

Google's APIs stream an array whose elements arrive one by one: `[{…},` … `{…}]`, mostly over several lines each. An element
is an event as soon as its last byte is there. Elements are cut without being parsed: only brackets and strings are
looked at, and the dialect parses what was cut out.

What stands where an array should be is cut the same way, because errors and some proxies come like that: a bare value,
such as an object over many lines, and any number of values one after the other, with or without white space or commas
between them. What can begin no JSON value is an event as well, up to the end of its line (in an array: up to the next
separator): the dialect will refuse it.

An array that has not been closed leaves `open` true: whether that is a truncation is for those to say who know whether
the answer has ended.

**Linear in time.** Every byte is passed over once, by a compiled pattern, whatever the pieces: the state between two reads is
a depth, whether a string is open, and how far the unfinished element has been looked at. The patterns repeat a bounded
number of times each, so that their own stack is bounded too.

An element of more than `max_event_bytes` is a `RemoteProtocolError`: the events before it are returned first, with `fault`
set, and the next `feed` raises. Depth costs nothing and has no limit.
"""

from __future__ import annotations

import re
from typing import Final

import attrs

from supervisor.errors import ConfigurationError, RemoteProtocolError
from supervisor.wire.event import WireEvent

__all__ = ["JSONArrayDecoder"]

_BOM: Final = b"\xef\xbb\xbf"
_BETWEEN: Final = re.compile(rb"[ \t\r\n,\x1e]*")
# What brackets and unusual strings stand between. It cannot fail, so it never looks back.
_PLAIN: Final = re.compile(rb'(?:[^"{}\[\]]+|"[^"\\]*"){0,256}')
_STRING: Final = re.compile(rb'(?:[^"\\]+|\\.){0,256}', re.DOTALL)
_WORD_END: Final = re.compile(rb'[ \t\r\n,\[\]{}"]')
_LINE_END: Final = re.compile(rb"[\r\n]")

_QUOTE: Final = 0x22
_BACKSLASH: Final = 0x5C
_ARRAY: Final = 0x5B
_ARRAY_END: Final = 0x5D
_OPENING: Final = b"{["
_CLOSING: Final = b"}]"


@attrs.define(kw_only=True, eq=False, repr=False)
class JSONArrayDecoder:
    """Decode one body of JSON values, fed in pieces of any size.

    Raises ConfigurationError for a limit that is not a positive number.
    """

    max_event_bytes: int = 4 << 20
    """The longest element."""

    comments: int = attrs.field(default=0, init=False)
    """Line ends between elements: the upstream is alive."""
    stray: bytes = attrs.field(default=b"", init=False)
    """Always empty: what is no JSON is an event, too, which the dialect will refuse."""
    asides: list[tuple[int, bytes]] = attrs.field(factory=list, init=False)
    """Always empty, for the same reason."""
    fault: RemoteProtocolError | None = attrs.field(default=None, init=False)
    """Set once a limit was passed; nothing after it is read."""

    _ended: bool = attrs.field(default=False, init=False)
    _begun: bool = attrs.field(default=False, init=False)
    arrays: int = attrs.field(default=0, init=False)
    """How many arrays have begun."""
    _in_array: bool = attrs.field(default=False, init=False)
    _held: bytearray = attrs.field(factory=bytearray, init=False)  # the unfinished element
    _at: int = attrs.field(default=0, init=False)  # how far it has been looked at
    _depth: int = attrs.field(default=0, init=False)
    _in_string: bool = attrs.field(default=False, init=False)
    _in_word: bool = attrs.field(default=False, init=False)

    def __attrs_post_init__(self) -> None:
        field = "max_event_bytes"
        value = getattr(self, field)
        if not isinstance(value, int) or value < 1:
            raise ConfigurationError(field, value, "a positive number of bytes")

    def __repr__(self) -> str:
        state = "ended" if self._ended else "failed" if self.fault else "open"
        return f"<JSONArrayDecoder {state}, {self.buffered_bytes} bytes buffered, {self.comments} comments>"

    @property
    def pending(self) -> bytes:
        """The element that has not ended yet; at most `max_event_bytes`. Still there after `end`."""
        return bytes(self._held)

    @property
    def buffered_bytes(self) -> int:
        """Bytes held of the unfinished element: at most `max_event_bytes`."""
        return len(self._held)

    @property
    def in_array(self) -> bool:
        """Whether an array has begun and its closing bracket has not come."""
        return self._in_array

    @property
    def open(self) -> bool:
        """Whether something has begun and not ended: an array or an element."""
        return self._in_array or bool(self._held)

    def feed(self, data: bytes) -> list[WireEvent]:
        """Return the events which these bytes complete.

        Raises RemoteProtocolError when the limit is passed; if events came before it in the same bytes they are returned
        first, with `fault` set, and the next call raises.
        """
        if self.fault is not None:
            raise RemoteProtocolError(*self.fault.args)
        if self._ended:
            raise RuntimeError(
                "this decoder was told that the body has ended; make a new one for the next response"
            )
        held = self._held
        held += data
        if not self._begun and not self._begin():
            return []
        events: list[WireEvent] = []
        start = 0
        while True:
            if not (self._depth or self._in_string or self._in_word):
                start = self._open()
                if start < 0:
                    held.clear()
                    self._at = 0
                    return events
            whole = self._scan()
            if (self._at if whole else len(held)) - start > self.max_event_bytes:
                return self._too_long(events)
            if not whole:
                del held[:start]
                self._at -= start
                return events
            events.append(WireEvent(bytes(held[start : self._at])))

    def end(self) -> None:
        """Say that the body has ended. `pending` and `open` can still be read. Feeding again is a RuntimeError."""
        self._ended = True

    def _begin(self) -> bool:
        """Take the byte order mark off. False: more has to come, to see whether it is one."""
        held = self._held
        if len(held) < len(_BOM) and _BOM.startswith(held):
            return False
        self._begun = True
        if held.startswith(_BOM):
            del held[: len(_BOM)]
        return True

    def _open(self) -> int:
        """Pass over what stands between elements; return where the next begins, -1 if it has not come."""
        held = self._held
        while True:
            at = self._at
            self._at = end = _BETWEEN.match(held, at).end()  # type: ignore[union-attr]  # it matches anything
            if end > at:
                self.comments += held.count(b"\n", at, end)
            if end == len(held):
                return -1
            first = held[end]
            if first == _ARRAY and not self._in_array:
                self._in_array = True
                self.arrays += 1
            elif first == _ARRAY_END and self._in_array:
                self._in_array = False
            else:
                if first == _QUOTE:
                    self._in_string = True
                elif first in _OPENING:
                    self._depth = 1
                else:
                    self._in_word = True
                self._at = end + 1
                return end
            self._at = end + 1

    def _scan(self) -> bool:
        """Go on through the element. True if it has ended, just before `_at`."""
        held = self._held
        length = len(held)
        at = self._at
        depth = self._depth
        if self._in_word:
            ends = (_WORD_END if self._in_array else _LINE_END).search(held, at)
            self._at = length if ends is None else ends.start()
            self._in_word = ends is None
            return ends is not None
        in_string = self._in_string
        while at < length:
            if in_string:
                at = _STRING.match(held, at).end()  # type: ignore[union-attr]  # it matches anything
                if at == length:
                    break
                byte = held[at]
                if byte == _QUOTE:
                    in_string = False
                    at += 1
                    if not depth:
                        break
                elif byte == _BACKSLASH and at + 1 == length:
                    break  # what it escapes has not come
                continue
            at = _PLAIN.match(held, at).end()  # type: ignore[union-attr]  # it matches anything
            if at == length:
                break
            byte = held[at]
            if byte in _OPENING:
                depth += 1
                at += 1
            elif byte in _CLOSING:
                depth -= 1
                at += 1
                if not depth:
                    break
            elif byte == _QUOTE:
                in_string = True
                at += 1
        self._at, self._depth, self._in_string = at, depth, in_string
        return not (depth or in_string)

    def _too_long(self, events: list[WireEvent]) -> list[WireEvent]:
        self.fault = RemoteProtocolError(
            f"the upstream sent a JSON value of more than {self.max_event_bytes} bytes (max_event_bytes)"
        )
        self._held.clear()
        if not events:
            raise RemoteProtocolError(*self.fault.args)
        return events
