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

What is remembered for this is not part of the answer, so no limit on the answer bounds it, and a provider that invents
labels could make it grow without end. It has bounds of its own, those of `CallBudget` shared by all choices of a
response: when they are reached the oldest label is forgotten, and arguments are no longer watched. What that costs is
only the telling apart of calls whose labels are wrong. A long id is remembered by its digest, a long name by its start.
"""

from __future__ import annotations

import hashlib
from typing import NamedTuple, TypeVar

import msgspec

from supervisor.dialects.base import ToolCallDelta

__all__ = ["MAX_CALLS", "CallBudget", "CallPiece", "CallSorter"]

MAX_CALLS = 1024
"""How many calls a choice may have; whoever takes pieces refuses those beyond."""
MAX_CALLS_IN_ALL = 4 * MAX_CALLS
"""How many calls the choices of a response may have together."""
MAX_LABELS = 2 * MAX_CALLS_IN_ALL
"""How many ids and indexes are remembered for the choices of a response together; for one choice, `MAX_CALLS` of each."""
MAX_ID_CHARS = 128
"""A longer id is remembered by its digest."""
MAX_NAME_CHARS = 1024
"""What of a call's name is kept. A name may come in pieces, and each piece gives the whole so far."""
MAX_WATCHED_CHARS = 16 << 10
"""Up to this length a call's arguments are watched, to tell a repetition from a second call."""
MAX_WATCHED_IN_ALL = 1 << 20
"""The same for all calls of a response together, each piece counted with `PIECE_CHARS` more."""
PIECE_CHARS = 48

_decode = msgspec.json.Decoder().decode

_Label = TypeVar("_Label", int | str, str)


class CallPiece(NamedTuple):
    """A piece of a tool call as the provider labels it."""

    at: int | str | None
    """The index, or what stands for one."""
    id: str
    name: str
    arguments: str


class CallBudget:
    """What the sorters of one response's choices may still remember together."""

    __slots__ = ("calls", "labels", "watched")

    def __init__(self) -> None:
        self.calls = MAX_CALLS_IN_ALL
        self.labels = MAX_LABELS
        self.watched = MAX_WATCHED_IN_ALL


class _Call:
    __slots__ = ("_budget", "_watched", "arguments", "has_id", "name", "ordinal")

    def __init__(self, ordinal: int, budget: CallBudget) -> None:
        self.ordinal = ordinal
        self.has_id = False
        self.name = ""
        self.arguments: list[str] = []
        self._budget = budget
        self._watched = 0

    def watch(self, piece: str) -> None:
        if self._watched < MAX_WATCHED_CHARS:
            self._watched += len(piece)
            self._budget.watched -= len(piece) + PIECE_CHARS
            self.arguments.append(piece)
            if self._watched >= MAX_WATCHED_CHARS or self._budget.watched < 0:
                self._watched = MAX_WATCHED_CHARS
                self.arguments.clear()

    @property
    def has_arguments(self) -> bool:
        return self._watched > 0

    @property
    def text(self) -> str:
        if len(self.arguments) > 1:
            self.arguments = ["".join(self.arguments)]
        return self.arguments[0] if self.arguments else ""

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
    """The tool calls of one choice: says which call each piece belongs to. The choices of a response share a budget."""

    __slots__ = ("_budget", "_by_id", "_by_index", "_last", "_ordinals")

    def __init__(self, budget: CallBudget | None = None) -> None:
        self._budget = CallBudget() if budget is None else budget
        self._by_index: dict[int | str, _Call] = {}
        self._by_id: dict[str, _Call] = {}
        self._last: _Call | None = None
        self._ordinals: set[int] = set()

    def __len__(self) -> int:
        return len(self._ordinals)

    @property
    def remembered(self) -> int:
        """How many ids and indexes are remembered: at most `2 * MAX_CALLS`, and never more than the budget has."""
        return len(self._by_id) + len(self._by_index)

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
        key = _key(piece.id)
        call, repeated = self._find(piece, key)
        if call is None:
            call = self._open(piece.at)
            repeated = False
        self._last = call
        if piece.at is not None:
            self._remember(self._by_index, piece.at, call)
        call_id = ""
        if key:
            self._remember(self._by_id, key, call)
            if not call.has_id:
                call.has_id = True
                call_id = piece.id
        name = ""
        if piece.name and piece.name != call.name and not (call.name and call.has_arguments):
            # A name in pieces, or a running one; once arguments have begun, a name again is only a repetition.
            whole = piece.name if piece.name.startswith(call.name) else call.name + piece.name
            whole = whole[:MAX_NAME_CHARS]
            if whole != call.name:
                name = call.name = whole
        arguments = "" if repeated else piece.arguments
        if arguments:
            call.watch(arguments)
        if not (call_id or name or arguments):
            return None
        return ToolCallDelta(call.ordinal, call_id, name, arguments)

    def _find(self, piece: CallPiece, key: str) -> tuple[_Call | None, bool]:
        """Return the call this piece continues (None: it opens one), and whether it only repeats it."""
        at_index = None if piece.at is None else self._by_index.get(piece.at)
        known = self._by_id.get(key) if key else None
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
            if piece.id and last.has_id:
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
        if piece.id and last.has_id and piece.at is None and last.complete:
            return None, False
        return last, False

    def _open(self, index: int | str | None) -> _Call:
        # The provider's own index where it is free, so that calls told out of order still stand in order.
        ordinal = index if isinstance(index, int) and 0 <= index < MAX_CALLS else len(self._ordinals)
        while ordinal in self._ordinals:
            ordinal += 1
        self._ordinals.add(ordinal)
        self._budget.calls -= 1
        return _Call(ordinal, self._budget)

    def _remember(self, calls: dict[_Label, _Call], label: _Label, call: _Call) -> None:
        """Note whose label this is. At the bound the oldest label gives way; where there is none, this one does."""
        if label not in calls:
            if len(calls) < MAX_CALLS and self._budget.labels:
                self._budget.labels -= 1
            elif calls:
                del calls[next(iter(calls))]
            else:
                return
        calls[label] = call


def _key(call_id: str) -> str:
    """Return what an id is remembered by."""
    if len(call_id) <= MAX_ID_CHARS:
        return call_id
    return hashlib.blake2b(call_id.encode("utf-8", "surrogatepass"), digest_size=32).hexdigest()
