"""The sequence numbers of OpenAI Responses: which events were seen before, and from which one on a response can be asked for again.

A background response can be asked for again from an event on, and the same reader goes on with what comes. Some imitations
repeat events that were seen: an event whose number is not above the last is a repetition, unless the numbers prove to be none
(the same for different events, or beginning again with another event than at first).
"""

from __future__ import annotations

import hashlib

from supervisor.dialects.openai_response_items import MAX_INDEX, MAX_LABEL_CHARS, WireDelta

__all__ = ["EventNumbers"]

MAX_LAST_BYTES = 4096
"""Up to this length the last event is remembered as it is, to tell its repetition."""


class EventNumbers:
    """The numbers of one response's events, as its reader meets them."""

    __slots__ = ("_first", "_first_type", "_last_data", "_relied_on", "last")

    def __init__(self) -> None:
        self._relied_on = True
        self.last = -1
        """The last number; -1 before the first. Only an event with one that is not above it can be a repetition."""
        self._last_data = b""
        self._first = -1
        self._first_type = ""

    @property
    def reliable_last(self) -> int | None:
        """The last number; None if there is none, or they are not to be relied on."""
        return self.last if self._relied_on and self.last >= 0 else None

    def is_repeated(self, number: int, data: bytes, kind: str | type[WireDelta]) -> bool:
        """Whether an event, whose number is not above the last, was seen before."""
        if not self._relied_on or number < 0:
            return False
        if number == self.last:
            return _kept_data(data) == self._last_data
        if number == self._first:
            return _type_name(kind) == self._first_type
        return number > self._first

    def count(self, number: int, data: bytes, kind: str | type[WireDelta]) -> None:
        """Take note of an event that was read."""
        if not self._relied_on:
            return
        if number <= self.last or number > MAX_INDEX:
            self._relied_on = False
            return
        if self._first < 0:
            self._first = number
            self._first_type = _type_name(kind)[:MAX_LABEL_CHARS]
        self.last = number
        # Nearly every event is short, and a call would cost more than the comparison.
        self._last_data = data if len(data) <= MAX_LAST_BYTES else _kept_data(data)


def _kept_data(data: bytes) -> bytes:
    """Return what an event is remembered by: itself, or the digest of a long one."""
    return data if len(data) <= MAX_LAST_BYTES else hashlib.blake2b(data, digest_size=32).digest()


def _type_name(kind: str | type[WireDelta]) -> str:
    return kind if isinstance(kind, str) else str(kind.__struct_config__.tag)
