"""What the events of OpenAI Responses say: their typed decoder, and the tolerant reading of items, places and usage.

Pure functions of JSON. What is news and what was told before is for the reader, in `openai_responses`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final, Literal

import msgspec

from supervisor.dialects import lenient
from supervisor.dialects.base import UnparseableError, Usage

__all__ = [
    "MAX_INDEX",
    "MAX_LABEL_CHARS",
    "ArgumentsDelta",
    "Kind",
    "ReasoningDelta",
    "SummaryDelta",
    "TextDelta",
    "Where",
    "Whole",
    "WireDelta",
    "decode_delta",
    "delta_text",
    "in_range",
    "incomplete_reason",
    "index_of",
    "json_text",
    "label",
    "place",
    "usage_of",
    "whole_item",
]

MAX_INDEX = (1 << 53) - 1
"""The largest index; an event with a larger or a negative one is unparseable."""
MAX_LABEL_CHARS = 256
"""What is kept of a finish reason. A longer name of the model or id is none."""

Kind = Literal["message", "reasoning", "call"]
_KINDS: Final[Mapping[str, Kind]] = {
    "message": "message",
    "reasoning": "reasoning",
    "function_call": "call",
    "custom_tool_call": "call",
}


# --- the typed way ---------------------------------------------------------------------------------------------------
# A field typed None must be null or absent: anything else sends the event the tolerant way.


class WireDelta(msgspec.Struct, tag_field="type", gc=False):
    """What the common deltas have in common."""

    delta: str
    output_index: int | None = None
    item_id: str | None = None
    sequence_number: int | None = None
    error: None = None
    part: int | None = msgspec.field(default=None, name="content_index")


class TextDelta(WireDelta, tag="response.output_text.delta", gc=False):
    """Of the text of a message."""


class ArgumentsDelta(WireDelta, tag="response.function_call_arguments.delta", gc=False):
    """Of the arguments of a function call."""


class ReasoningDelta(WireDelta, tag="response.reasoning_text.delta", gc=False):
    """Of the reasoning itself."""


class SummaryDelta(WireDelta, tag="response.reasoning_summary_text.delta", gc=False):
    """Of a summary of the reasoning."""

    part: int | None = msgspec.field(default=None, name="summary_index")


decode_delta = msgspec.json.Decoder(TextDelta | ArgumentsDelta | ReasoningDelta | SummaryDelta).decode


# --- items -----------------------------------------------------------------------------------------------------------


# --- items -----------------------------------------------------------------------------------------------------------


class Where(msgspec.Struct, frozen=True, gc=False):
    """How an event says which item it is about."""

    index: int | None
    id: str


class Whole(msgspec.Struct, frozen=True, gc=False):
    """An item as it is told whole."""

    kind: Kind
    id: str
    texts: tuple[tuple[str, int, str], ...] = ()
    """Field, index and text of each part."""
    call_id: str = ""
    name: str = ""
    arguments: str = ""
    completed: bool = False


# --- the tolerant way ------------------------------------------------------------------------------------------------


def whole_item(item: Any, *, done: bool = False) -> Whole | None:
    """Read an item; None for one that is not part of the answer."""
    if not isinstance(item, dict):
        raise UnparseableError(f"an item is a {type(item).__name__}")
    name = item.get("type")
    kind = _KINDS.get(name) if isinstance(name, str) else None
    if kind is None:
        return None
    item_id = label(item.get("id")) or ""
    if kind == "message":
        return Whole(kind, item_id, _parts(item.get("content"), "text"))
    if kind == "reasoning":
        # Either is a telling of the other.
        texts = _parts(item.get("summary"), "summary") or _parts(item.get("content"), "content")
        return Whole(kind, item_id, texts)
    arguments = item.get("input") if name == "custom_tool_call" else item.get("arguments")
    return Whole(
        kind,
        item_id,
        call_id=lenient.text(item.get("call_id") or item.get("id"), "a call's id"),
        name=lenient.text(item.get("name"), "a call's name"),
        arguments=json_text(arguments),
        completed=done or item.get("status") == "completed",
    )


def _parts(content: Any, field: str) -> tuple[tuple[str, int, str], ...]:
    """Return the field, index and text of each part of a content of any shape."""
    if content is None:
        return ()
    if isinstance(content, str):
        return ((field, 0, content),) if content else ()
    if not isinstance(content, list):
        raise UnparseableError(f"an item's content is a {type(content).__name__}")
    texts = []
    for index, part in enumerate(content):
        if isinstance(part, str):
            texts.append((field, index, part))
        elif isinstance(part, dict):
            if isinstance(text := part.get("text"), str) and text:
                texts.append((field, index, text))
            if field == "text" and isinstance(refusal := part.get("refusal"), str) and refusal:
                texts.append(("refusal", index, refusal))
    return tuple(texts)


def delta_text(value: Any) -> str:
    """Return the text of a delta: a string, or an object with one."""
    if isinstance(value, dict):
        value = value.get("text")
    return lenient.text(value, "a delta")


def json_text(value: Any) -> str:
    """Return arguments as text: as they are, or as the JSON that they stand for."""
    if value is None or isinstance(value, str):
        return value or ""
    try:
        return msgspec.json.encode(value).decode()
    except (ValueError, RecursionError) as exc:
        raise UnparseableError(f"a tool call's arguments are not JSON ({exc})") from None


def place(value: dict[str, Any], item_id: str = "") -> Where:
    """Return which item an event is about. `item_id` is that of the item which it tells."""
    return Where(index_of(value, "output_index"), label(value.get("item_id")) or item_id)


def index_of(value: dict[str, Any], name: str) -> int | None:
    """Return the index in this field; None if it is missing."""
    return in_range(lenient.index(value.get(name)))


def in_range(index: int | None) -> int | None:
    """Return an index, if it is one."""
    if index is not None and not 0 <= index <= MAX_INDEX:
        raise UnparseableError("an index is out of range")
    return index


def label(value: Any) -> str | None:
    """Return a name or an id; None for one that is too long to be kept."""
    return value if isinstance(value, str) and 0 < len(value) <= MAX_LABEL_CHARS else None


def incomplete_reason(response: dict[str, Any]) -> str:
    """Return why a response is incomplete."""
    details = response.get("incomplete_details")
    reason = details.get("reason") if isinstance(details, dict) else details
    return reason if isinstance(reason, str) and reason else "incomplete"


def usage_of(value: Any) -> Usage | None:
    """Return a usage as stated; None if nothing is stated."""
    if not isinstance(value, dict):
        return None
    inputs = value.get("input_tokens_details")
    outputs = value.get("output_tokens_details")
    usage = Usage(
        lenient.first_count(value, "input_tokens", "prompt_tokens"),
        lenient.first_count(value, "output_tokens", "completion_tokens"),
        lenient.count(outputs.get("reasoning_tokens")) if isinstance(outputs, dict) else None,
        lenient.count(inputs.get("cached_tokens")) if isinstance(inputs, dict) else None,
    )
    return None if usage == Usage() else usage
