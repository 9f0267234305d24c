"""Read JSON that is not quite as its provider documents it: the way in for what a typed decoder refuses.

Each function either returns what was meant, or raises UnparseableError with the reason; none changes what it is given.
"""

from __future__ import annotations

import json
from typing import Any

import msgspec

from supervisor.dialects.base import UnparseableError
from supervisor.dialects.faults import shown

__all__ = ["MAX_COUNT", "count", "first_count", "index", "loads", "text"]

MAX_COUNT = (1 << 53) - 1
"""The largest number of tokens that is believed: the largest integer that every JSON implementation can hold."""

_decode_any = msgspec.json.Decoder().decode


def loads(data: bytes) -> Any:
    """Decode JSON as leniently as is safe: broken UTF-8, lone surrogates, NaN and a BOM are survived."""
    try:
        return _decode_any(data)
    except (ValueError, RecursionError):
        pass
    try:
        return _mended(json.loads(data.decode("utf-8", "replace").removeprefix("\ufeff")))
    except (ValueError, RecursionError) as exc:
        raise UnparseableError(f"not JSON ({exc}): {shown(data, 100)}") from None


def _mended(value: Any) -> Any:
    """Replace lone surrogates, which no encoder takes, by U+FFFD."""
    if isinstance(value, str):
        return value.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    if isinstance(value, list):
        return [_mended(item) for item in value]
    if isinstance(value, dict):
        return {_mended(name): _mended(item) for name, item in value.items()}
    return value


def text(value: Any, field: str) -> str:
    """Return a string, or "" for null. `field` is what it is called in the reason why anything else is refused."""
    if value is None:
        return ""
    if not isinstance(value, str):
        raise UnparseableError(f"{field} is a {type(value).__name__}")
    return value


def index(value: Any) -> int | None:
    """Return an index given as a number or as digits; None if it is missing."""
    if isinstance(value, bool):
        raise UnparseableError("an index is a bool")
    if value is None or isinstance(value, int):
        return value
    if isinstance(value, float) and value.is_integer():
        return int(value)
    if isinstance(value, str) and value.isascii() and value.isdigit() and len(value) < 10:
        return int(value)
    raise UnparseableError(f"an index is a {type(value).__name__} that is no number")


def count(value: Any) -> int | None:
    """Return a number of tokens given as an integer, a whole float or digits; None for anything else."""
    if isinstance(value, bool):
        return None
    if isinstance(value, float) and not value.is_integer():
        return None
    if isinstance(value, float) or (
        isinstance(value, str) and value.isascii() and value.isdigit() and len(value) < 16
    ):
        value = int(value)
    return value if isinstance(value, int) and 0 <= value <= MAX_COUNT else None


def first_count(value: dict[str, Any], *names: str) -> int | None:
    """Return the first of these fields that is a number of tokens."""
    return next((found for name in names if (found := count(value.get(name))) is not None), None)
