"""Sort the pieces of tool calls into calls, where a provider's labels cannot be trusted.

A streamed tool call comes in pieces, and its index should say which call a piece belongs to, its id and name coming once,
with the first. Providers leave the index out, send null, use one index for several calls or a new index for each piece;
they leave the id out, repeat it, or make a new one for each piece; they repeat the name. So:

1. an id seen before decides;
2. otherwise the index does;
3. otherwise the piece belongs to the call before it.

A piece opens a new call where nothing stands at the place so found, or where another call stands there: it brings a name
while that call has another id, or has all its arguments already (they are a whole JSON value). A piece without a name
goes on with the call before it, if there is any way to.
"""

from __future__ import annotations

from typing import NamedTuple

import msgspec

from supervisor.dialects.base import ToolCallDelta

__all__ = ["MAX_CALLS", "CallPiece", "CallSorter"]

MAX_CALLS = 1024
"""How many calls a choice may have; whoever takes pieces refuses those beyond."""
MAX_WATCHED_CHARS = 16 << 10
"""Up to this length a call's arguments are watched, to tell a repetition from a second call."""

_decode = msgspec.json.Decoder().decode


class CallPiece(NamedTuple):
    """A piece of a tool call as the provider labels it."""

    at: int | str | None
    """The index, or what stands for one."""
    id: str
    name: str
    arguments: str


class _Call:
    __slots__ = ("_watched", "arguments", "id", "name", "ordinal")

    def __init__(self, ordinal: int) -> None:
        self.ordinal = ordinal
        self.id = ""
        self.name = ""
        self.arguments: list[str] = []
        self._watched = 0

    def watch(self, piece: str) -> None:
        if self._watched < MAX_WATCHED_CHARS:
            self._watched += len(piece)
            self.arguments.append(piece)
            if self._watched >= MAX_WATCHED_CHARS:
                self.arguments.clear()

    @property
    def has_arguments(self) -> bool:
        return self._watched > 0

    @property
    def text(self) -> str:
        return "".join(self.arguments)

    @property
    def complete(self) -> bool:
        """Whether its arguments are a whole JSON value: more of them could only be another call's, or the same again."""
        if not self.arguments:
            return False
        try:
            _decode(self.text)
        except (ValueError, RecursionError):
            return False
        return True


class CallSorter:
    """The tool calls of one choice: says which call each piece belongs to."""

    __slots__ = ("_by_id", "_by_index", "_last", "_ordinals")

    def __init__(self) -> None:
        self._by_index: dict[int | str, _Call] = {}
        self._by_id: dict[str, _Call] = {}
        self._last: _Call | None = None
        self._ordinals: set[int] = set()

    def __len__(self) -> int:
        return len(self._ordinals)

    def go_on(self, at: int | None, arguments: str) -> ToolCallDelta | None:
        """Take a piece that has only an index and arguments, if the index is known. What `take` does, sooner."""
        call = self._by_index.get(at) if at is not None else None
        if call is None:
            return None
        self._last = call
        call.watch(arguments)
        return ToolCallDelta(call.ordinal, "", "", arguments)

    def take(self, piece: CallPiece) -> ToolCallDelta | None:
        """Return the piece with its call's ordinal; None if it adds nothing."""
        call, repeated = self._find(piece)
        if call is None:
            call = self._open(piece.at)
            repeated = False
        self._last = call
        if piece.at is not None:
            self._by_index[piece.at] = call
        call_id = ""
        if piece.id:
            self._by_id[piece.id] = call
            if not call.id:
                call_id = call.id = piece.id
        name = ""
        if piece.name and piece.name != call.name and not (call.name and call.has_arguments):
            # A name in pieces, or a running one; once arguments have begun, a name again is only a repetition.
            name = call.name = piece.name if piece.name.startswith(call.name) else call.name + piece.name
        arguments = "" if repeated else piece.arguments
        if arguments:
            call.watch(arguments)
        if not (call_id or name or arguments):
            return None
        return ToolCallDelta(call.ordinal, call_id, name, arguments)

    def _find(self, piece: CallPiece) -> tuple[_Call | None, bool]:
        """Return the call this piece continues (None: it opens one), and whether it only repeats it."""
        at_index = None if piece.at is None else self._by_index.get(piece.at)
        known = self._by_id.get(piece.id) if piece.id else None
        if known is not None:
            if piece.name and piece.arguments and known.complete:
                # The same call sent again, or another with the same id.
                return (known, True) if piece.arguments == known.text else (None, False)
            return known, False
        last = at_index if piece.at is not None else self._last
        if last is None:
            # An index not seen before. Without a name and an id of its own it is the last call's, under a rotating index.
            return (None, False) if piece.name or piece.id else (self._last, False)
        if piece.name:
            if piece.id and last.id:
                # Another id on the same place: another call, unless the id merely changes with each piece of one.
                rotating = piece.name == last.name and last.has_arguments and not last.complete
                return (last, False) if rotating else (None, False)
            if not last.name:
                return last, False
            if piece.at is None:
                going_on = piece.name == last.name and last.has_arguments and not last.complete
                return (last, False) if going_on else (None, False)
            if piece.arguments and last.complete:
                return (None, False)
            return last, False
        if piece.id and last.id and piece.at is None and last.complete:
            return None, False
        return last, False

    def _open(self, index: int | str | None) -> _Call:
        # The provider's own index where it is free, so that calls told out of order still stand in order.
        ordinal = index if isinstance(index, int) and 0 <= index < MAX_CALLS else len(self._ordinals)
        while ordinal in self._ordinals:
            ordinal += 1
        self._ordinals.add(ordinal)
        return _Call(ordinal)
