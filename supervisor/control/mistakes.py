"""What is wrong with parameters, in words: the field, the value it was given, and what would be right.

msgspec says where it stumbled (`$.retry.attempts`) and over what, but not what it was given, nor which choices there were.
Both are looked up here: the value in what was sent, what would be right in the types.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Hashable, Iterable
from typing import Any

import attrs
import msgspec
from msgspec import inspect

__all__ = ["Mistake", "find_mistake"]

_MAX_SHOWN_CHARS = 80
_AS_JSON = {None: "null", True: "true", False: "false"}
_ANY = "[...]"
_AT = re.compile(r" - at (?:`key` in )?`\$\.?([^`]*)`$")
_STEP = re.compile(r"\[[^\]]*\]|[^.\[\]]+")
_UNKNOWN = re.compile(r"unknown field `([^`]*)`")
_MISSING = re.compile(r"missing required field `([^`]*)`")


@attrs.frozen
class Mistake:
    """One thing that is wrong."""

    field: str
    """Its path, such as `retry.attempts`; empty where it is about all of them."""
    told: str
    """What is wrong, without the field."""
    expected: str
    value: object = None
    """What it was given; of a mistake about all of them, their names."""


def find_mistake(error: msgspec.ValidationError, given: object, kind: Any) -> Mistake:
    """Say what `error` is about, which reading `given` as a `kind` has raised. Values are cut, and objects not shown."""
    message = str(error)
    at = _AT.search(message)
    path = at.group(1) if at else ""
    said = message[: at.start()] if at else message
    types: list[inspect.Type] = [_types(kind)]
    values = [given]
    for step in _STEP.findall(path):
        types = [inner for one in types for inner in _inside(one, step)]
        values = [inner for one in values for inner in _at(one, step)]
    if found := _UNKNOWN.search(said) or _MISSING.search(said):
        name = f"{path}.{found.group(1)}".lstrip(".")
        known = [field.encode_name for one in types for field in getattr(one, "fields", ())]
        if found.re is _MISSING:
            return Mistake(name, "this field is required", "a value")
        expected = ", ".join(known) or "none"
        return Mistake(name, f"unknown field; known here are: {expected}", f"one of {expected}")
    if at is None:
        return Mistake(
            "", said, said.removeprefix("give "), list(given) if isinstance(given, dict) else given
        )
    if "`key` in" in message:
        types = [
            one.key_type for kind in types for one in _alternatives(kind) if isinstance(one, inspect.DictType)
        ]
        expected = f"names that are {_described(types)}"
    else:
        expected = f"{'values that are ' if path.endswith(_ANY) else ''}{_described(types)}"
        path = path.removesuffix(_ANY)
    value = values[0] if values else None
    return Mistake(path, f"{_shown(value)} is not valid; expected {expected}", expected, value)


@functools.cache
def _types(kind: Hashable) -> inspect.Type:
    return inspect.type_info(kind)


def _inside(kind: inspect.Type, step: str) -> Iterable[inspect.Type]:
    """Return the types of what one step leads to."""
    for one in _alternatives(kind):
        if isinstance(one, inspect.StructType):
            yield from (field.type for field in one.fields if field.encode_name == step)
        elif isinstance(one, inspect.DictType):
            yield one.value_type
        elif isinstance(one, inspect.VarTupleType):
            yield one.item_type


def _alternatives(kind: inspect.Type) -> Iterable[inspect.Type]:
    return kind.types if isinstance(kind, inspect.UnionType) else (kind,)


def _at(value: Any, step: str) -> Iterable[object]:
    """Return what one step leads to; of an object any name of which may be meant (`_ANY`), the object."""
    if isinstance(value, dict):
        return (value,) if step == _ANY else (value[step],) if step in value else ()
    at = step[1:-1]
    return (
        (value[int(at)],)
        if isinstance(value, list | tuple) and at.isdecimal() and int(at) < len(value)
        else ()
    )


def _described(types: Iterable[inspect.Type]) -> str:
    return " or ".join(filter(None, map(_words, types)))


def _words(kind: inspect.Type) -> str:
    match kind:
        case inspect.UnionType():
            return _described(kind.types)
        case inspect.NoneType():
            return "null"
        case inspect.LiteralType():
            return f"one of {', '.join(map(repr, kind.values))}"
        case inspect.IntType():
            return f"a whole number{_bounds(kind)}"
        case inspect.FloatType():
            return f"a number{_bounds(kind)}"
        case inspect.StrType():
            least, most = kind.min_length, kind.max_length
            between = f"{least} to {most}" if least else f"at most {most}"
            return "a string" if most is None else f"a string of {between} characters"
        case inspect.BoolType():
            return "true or false"
        case inspect.VarTupleType():
            most = kind.max_length
            return "an array" if most is None else f"an array of at most {most}"
        case inspect.DictType():
            most = kind.max_length
            return "an object" if most is None else f"an object of at most {most} fields"
        case inspect.StructType():
            return "an object"
        case _:  # that it may be left out
            return ""


def _bounds(kind: inspect.IntType | inspect.FloatType) -> str:
    least = (
        ""
        if kind.ge is None
        else f" from {kind.ge:,.0f}"
        if kind.le is not None
        else f" of at least {kind.ge:,.0f}"
    )
    least = f" above {kind.gt:,.0f}" if kind.gt is not None else least
    return (
        least
        if kind.le is None
        else f"{least} to {kind.le:,.0f}"
        if kind.gt is None
        else f"{least}, up to {kind.le:,.0f}"
    )


def _shown(value: object) -> str:
    if isinstance(value, dict):
        return "an object"
    if isinstance(value, list | tuple):
        return "an array"
    shown = _AS_JSON[value] if value is None or isinstance(value, bool) else repr(value)
    return shown if len(shown) <= _MAX_SHOWN_CHARS else f"{shown[: _MAX_SHOWN_CHARS - 1]}…"
