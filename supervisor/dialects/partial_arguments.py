"""Write the JSON text of a tool call's arguments while they are told as values at paths.

Gemini can stream the arguments of a function call as `partialArgs` (Vertex AI, "Streaming function call arguments"): each has
a JSON path (RFC 9535, of names and indexes only), a string, number, bool or null, and `willContinue` while a string is not
whole. An answer here is text that only grows, so the text is written as the values come: what is open stays open, and is
closed when a path leaves it. That needs no memory of what was written as long as paths come in the order of the text, which
is how they do come.

A path that goes back, into something closed or replacing something, cannot be written there any more. From then on values
are only kept, and at the end each argument that changed is written once more, whole: of two members with one name the later
one counts, for every parser that there is. For this the values are kept as a tree; its size is bounded by the
`ArgumentsBudget` that all calls of a response share, which refuses what is beyond.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any, NamedTuple

import msgspec

from supervisor.dialects.base import UnparseableError

__all__ = ["MAX_DEPTH", "MAX_KEPT_BYTES", "ArgumentsBudget", "ArgumentsWriter", "PartialValue", "parse_path"]

MAX_DEPTH = 64
"""How many names and indexes a path may have."""
MAX_KEPT_BYTES = 4 << 20
"""How much may be kept of the arguments of all calls of a response, each value and each step to it counted in full."""
MAX_GAPS = 1024
"""How many elements that were passed over may be written as null; beyond, an element takes the next free index."""
STEP_BYTES = 128

_STEP = re.compile(r"""\.([^.\[\]'"*?@]+)|\[(\d{1,9})\]|\['((?:[^'\\]|\\.)*)'\]|\["((?:[^"\\]|\\.)*)"\]""")
_ESCAPE = re.compile(r"\\(u[0-9a-fA-F]{4}|.)")
_ESCAPES = {"b": "\b", "f": "\f", "n": "\n", "r": "\r", "t": "\t"}


def parse_path(path: str) -> tuple[str | int, ...]:
    """Return the names and indexes of a JSON path; none for the root.

    Raises UnparseableError for one that names several places, or goes too deep.
    """
    if not path.startswith("$"):
        raise UnparseableError(f"not a JSON path: {path[:100]!r}")
    steps: list[str | int] = []
    at = 1
    while at < len(path):
        found = _STEP.match(path, at)
        if found is None or len(steps) == MAX_DEPTH:
            if path[at:] == ".":
                break
            raise UnparseableError(f"a JSON path that cannot be followed: {path[:100]!r}")
        name, index, single, double = found.groups()
        if index is not None:
            steps.append(int(index))
        else:
            steps.append(name if name is not None else _unescaped(double if single is None else single))
        at = found.end()
    if steps and isinstance(steps[0], int):
        raise UnparseableError(f"a JSON path into arguments that are no list: {path[:100]!r}")
    return tuple(steps)


class PartialValue(NamedTuple):
    """A value, or a piece of a string, and where it belongs."""

    path: tuple[str | int, ...]
    value: str | float | bool | None
    continues: bool = False
    """More of the string is to follow."""

    @property
    def nbytes(self) -> int:
        """What keeping it may cost."""
        names = sum(len(step) for step in self.path if isinstance(step, str))
        text = len(self.value) if isinstance(self.value, str) else 0
        return names + text + STEP_BYTES * (len(self.path) + 1)


class ArgumentsBudget:
    """What may still be kept for the calls of one response."""

    __slots__ = ("gaps", "left")

    def __init__(self) -> None:
        self.left = MAX_KEPT_BYTES
        self.gaps = MAX_GAPS

    def check(self, values: Iterable[PartialValue]) -> None:
        """Raise UnparseableError if there is no room for these."""
        if sum(value.nbytes for value in values) > self.left:
            raise UnparseableError(f"more than {MAX_KEPT_BYTES} bytes of streamed arguments")


class _Text:
    """A string that may grow."""

    __slots__ = ("pieces",)

    def __init__(self, text: str) -> None:
        self.pieces = [text]


class ArgumentsWriter:
    """The arguments of one call. `add` and `finish` return the text to append; joined, it is one JSON object."""

    __slots__ = ("_begun", "_budget", "_changed", "_nodes", "_root", "_steps")

    def __init__(self, budget: ArgumentsBudget) -> None:
        self._budget = budget
        self._root: dict[str, Any] = {}
        self._begun = False
        self._nodes: list[Any] = [self._root]
        """What is open in the text: objects, lists, and last perhaps a string."""
        self._steps: list[str | int] = []
        """The path to the last of them."""
        self._changed: dict[str, None] | None = None
        """The arguments to be written once more; None while the text is in order."""

    @property
    def begun(self) -> bool:
        """Whether any value came."""
        return self._begun

    def add(self, piece: PartialValue) -> str:
        """Take a value that the budget has room for."""
        if not piece.path:
            return ""
        self._budget.left -= piece.nbytes
        known = self._at(piece.path)
        if piece.value == "" and isinstance(known, _Text) and self._nodes[-1] is not known:
            return ""  # it says only that a string which was closed already is whole
        text = ""
        if self._changed is None:
            written = self._write(piece)
            if written is not None:
                if not self._begun:
                    self._begun = True
                    written = "{" + written
                return written
            text = self._close(1)
            self._changed = {}
        self._changed[str(piece.path[0])] = None
        self._keep(piece)
        return text

    def finish(self) -> str:
        """Return what closes the object."""
        if not self._begun:
            return "{}"
        text = self._close(1)
        for name in self._changed or ():
            text += f",{_dump(name)}:{_dump(self._root[name])}"
        return text + "}"

    def _at(self, path: tuple[str | int, ...]) -> Any:
        node: Any = self._root
        for step in path:
            if isinstance(node, dict):
                node = node.get(step)
            elif isinstance(node, list) and isinstance(step, int) and step < len(node):
                node = node[step]
            else:
                return None
        return node

    # --- in order ---

    def _write(self, piece: PartialValue) -> str | None:
        """Write a value where the text is, if it belongs there."""
        path, value, continues = piece
        nodes, steps = self._nodes, self._steps
        if isinstance(nodes[-1], _Text) and tuple(steps) == path:
            if not isinstance(value, str):
                return None
            nodes[-1].pieces.append(value)
            return _escaped(value) + ("" if continues else self._close(len(nodes) - 1))
        common = 0
        last = len(path) - 1
        while common < last and common < len(steps) and steps[common] == path[common]:
            common += 1
        node = nodes[common]
        step = path[common]
        if isinstance(node, dict):
            if not isinstance(step, str) or step in node:
                return None
        elif not isinstance(node, list) or not isinstance(step, int) or step < len(node):
            return None
        text = self._close(common + 1)
        if node:
            text += ","
        for depth in range(common, last + 1):
            step = path[depth]
            child: Any
            if depth < last:
                child = [] if isinstance(path[depth + 1], int) else {}
            else:
                child = _Text(value) if isinstance(value, str) else value
            text += _dump(step) + ":" if isinstance(node, dict) else "null," * self._fill(node, step)
            _put(node, step, child)
            node = child
            if depth < last:
                text += "[" if isinstance(child, list) else "{"
            elif isinstance(child, _Text):
                text += '"' + _escaped(str(value)) + ("" if continues else '"')
                if not continues:
                    break
            else:
                text += _dump(value)
                break
            nodes.append(child)
            steps.append(step)
        return text

    def _close(self, depth: int) -> str:
        """Close what is open deeper than this."""
        text = ""
        nodes = self._nodes
        while len(nodes) > depth:
            node = nodes.pop()
            self._steps.pop()
            text += '"' if isinstance(node, _Text) else "]" if isinstance(node, list) else "}"
        return text

    # --- out of order ---

    def _keep(self, piece: PartialValue) -> None:
        """Put a value into the tree, in place of whatever stands in its way."""
        path, value, _ = piece
        node: Any = self._root
        for depth, step in enumerate(path):
            inside = node.get(step) if isinstance(node, dict) else None
            if isinstance(node, list):
                self._fill(node, step)
                inside = node[step] if isinstance(step, int) and step < len(node) else None
            if depth == len(path) - 1:
                if isinstance(value, str) and isinstance(inside, _Text):
                    inside.pieces.append(value)
                else:
                    _put(node, step, _Text(value) if isinstance(value, str) else value)
                return
            wanted = list if isinstance(path[depth + 1], int) else dict
            if not isinstance(inside, wanted):
                inside = wanted()
                _put(node, step, inside)
            node = inside

    def _fill(self, node: list[Any], step: str | int) -> int:
        """Put null for the elements that were passed over, and return how many that are."""
        gap = max(0, int(step) - len(node))
        if gap > self._budget.gaps:
            return 0
        self._budget.gaps -= gap
        node += [None] * gap
        return gap


def _put(node: Any, step: str | int, child: Any) -> None:
    if isinstance(node, list) and int(step) >= len(node):
        node.append(child)
    else:
        node[step] = child


def _dump(value: Any) -> str:
    if isinstance(value, _Text):
        return _dump("".join(value.pieces))
    if isinstance(value, list):
        return "[" + ",".join(map(_dump, value)) + "]"
    if isinstance(value, dict):
        return "{" + ",".join(f"{_dump(name)}:{_dump(item)}" for name, item in value.items()) + "}"
    return msgspec.json.encode(value).decode()


def _escaped(text: str) -> str:
    return msgspec.json.encode(text).decode()[1:-1]


def _unescaped(name: str) -> str:
    """Return a quoted name of a path as it is meant (RFC 9535, section 2.3.1.1)."""

    def character(found: re.Match[str]) -> str:
        escape = found[1]
        return chr(int(escape[1:], 16)) if len(escape) > 1 else _ESCAPES.get(escape, escape)

    # Two escapes may be one character, and one of them alone is none.
    return _ESCAPE.sub(character, name).encode("utf-16", "surrogatepass").decode("utf-16", "replace")
