"""The dialect of an embedding program's own sources: a payload is the JSON of a `Delta`.

There is no body and no provider: `Output.send` encodes an item, the journal keeps the bytes, and reading them back
gives the delta again. A JSON object that is not a delta is read for whatever fields of one it has, so that a program
may journal records of its own shape; the rest of it is the program's business.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

import msgspec

from supervisor.dialects.base import Delta, Fault, UnparseableError
from supervisor.dialects.dialect import Asking, Dialect, Endings
from supervisor.errors import ConfigurationError

__all__ = ["NATIVE", "encode"]

_decode_delta = msgspec.json.Decoder(Delta).decode
_encode = msgspec.json.Encoder().encode
_FIELDS: Final = {field.name: field.type for field in msgspec.structs.fields(Delta)}


def encode(item: str | Delta | Mapping[str, Any]) -> tuple[bytes, tuple[Delta, ...]]:
    """Return the payload of one item of an own source, and what it means.

    A str is text; a mapping is a JSON object, read for the fields of a `Delta` that it has. Raises ConfigurationError
    for anything else, and for what JSON cannot hold.
    """
    if isinstance(item, str):
        delta = Delta(text=item)
    elif isinstance(item, Delta):
        delta = item
    elif isinstance(item, Mapping):
        return _encode_mapping(item)
    else:
        raise ConfigurationError("item", item, "a str, a Delta or a mapping")
    try:
        payload = _encode(delta)
        if delta is item:
            _decode_delta(payload)  # a Delta does not look at what it is made of
    except (TypeError, ValueError, RecursionError, msgspec.MsgspecError) as exc:
        raise ConfigurationError("item", item, f"something that JSON can hold ({exc})") from exc
    return payload, (delta,)


def _encode_mapping(item: Mapping[str, Any]) -> tuple[bytes, tuple[Delta, ...]]:
    try:
        payload = _encode(dict(item))
        return payload, _read(payload)
    except (TypeError, ValueError, RecursionError, msgspec.MsgspecError) as exc:
        raise ConfigurationError("item", item, f"a mapping that JSON can hold ({exc})") from exc


def _read(data: bytes) -> tuple[Delta, ...]:
    try:
        return (_decode_delta(data),)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        pass
    try:
        fields = msgspec.json.decode(data)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as exc:
        raise UnparseableError(f"not JSON: {exc}") from exc
    if not isinstance(fields, dict):
        raise UnparseableError("not a JSON object")
    known: dict[str, Any] = {}
    for name, kind in _FIELDS.items():
        if name in fields:
            try:
                known[name] = msgspec.convert(fields[name], kind)
            except msgspec.ValidationError:
                continue  # the program's own field of the same name
    return (Delta(**known),) if known else ()


class _NativeReader:
    __slots__ = ("_reason",)

    def __init__(self) -> None:
        self._reason: str | None = None

    def read(self, data: bytes, event: str = "message") -> tuple[Delta, ...]:  # noqa: ARG002 - no names here
        """Say what one payload means."""
        deltas = _read(data)
        for delta in deltas:
            if delta.finish_reason is not None and (delta.choice == 0 or self._reason is None):
                self._reason = delta.finish_reason
            elif delta.terminal and self._reason is None:
                self._reason = "done"
        return deltas

    def ending(self) -> str | None:
        """Return the finish reason, if one was sent."""
        return self._reason


def _fault(status: int, body: bytes) -> Fault:
    """Say that an HTTP response makes no sense here: there is no HTTP."""
    message = f"a native source has no HTTP response, but one came ({len(body)} bytes)"
    return Fault(kind="protocol", message=message, status=status)


NATIVE: Final = Dialect(
    name="native",
    framing="none",
    reader=_NativeReader,
    fault=_fault,
    endings=Endings(
        well="the source returns, calls `finish`, or sends a delta with `finish_reason` and then returns",
        errors=("an exception from the source: failed(`source_error`)",),
        truncated="never: a source that returns has ended",
    ),
    asking=Asking(estimate=False),
    usage_rule="as the source states it",
)
