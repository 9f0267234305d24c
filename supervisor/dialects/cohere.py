"""Cohere's chat, version 2 (`/v2/chat`), streamed.

The wire is server-sent events whose JSON has a `type` (Cohere API reference, "Chat with Streaming"). The name of the event says
the same and is used only where the type is missing. An answer is a `message-start`, content blocks (text or thinking, each
with a start, deltas and an end), tool calls likewise, citations, and a `message-end` with the finish reason and the usage.
After it `[DONE]` may come, which says nothing more.

The blocks of text are one text, those of thinking one reasoning. The *tool plan* is neither: it is what the model says of the
calls that it is about to make, and is found in the journal only.

**How it ends.** `message-end` ends the answer, and nothing else does: a body without one is truncated, also if it has a
`[DONE]`. Its finish reasons `ERROR` (and the older `ERROR_TOXIC`, `ERROR_LIMIT`) and `TIMEOUT` say that the generation failed, so
they are errors; `delta.error` then has the message.
"""

from __future__ import annotations

from typing import Any, Final

import msgspec

from supervisor.dialects import lenient
from supervisor.dialects.base import Delta, Fault, FaultKind, ToolCallDelta, UnparseableError, Usage
from supervisor.dialects.dialect import Asking, Dialect, Endings
from supervisor.dialects.faults import error_fault, find_fault, http_fault, shown
from supervisor.dialects.tool_calls import MAX_CALLS, CallPiece, CallSorter

__all__ = ["COHERE"]

MAX_CALL_INDEX = (1 << 53) - 1
"""The largest index of a tool call, of either sign; an event with a larger one is unparseable."""
MAX_LABEL_CHARS = 256
"""What is kept of a finish reason. A longer id of the response is none."""

_FAILED: Final[dict[str, FaultKind | None]] = {
    "ERROR": None,
    "ERROR_LIMIT": "context_length",
    "ERROR_TOXIC": "content_filter",
    "TIMEOUT": "timeout",
}
"""Finish reasons that are errors, and their kind; None: what the message says."""


# --- the typed way ---------------------------------------------------------------------------------------------------
# A field typed None must be null or absent: anything else sends the event the tolerant way.


class _WireContent(msgspec.Struct, gc=False):
    text: str | None = None
    thinking: str | None = None


class _WireFunction(msgspec.Struct, gc=False):
    name: str | None = None
    arguments: str | None = None


class _WireCall(msgspec.Struct, gc=False):
    id: str | None = None
    function: _WireFunction | None = None


class _WireMessage(msgspec.Struct, gc=False):
    content: _WireContent | None = None
    tool_calls: _WireCall | None = None


class _WireDelta(msgspec.Struct, gc=False):
    message: _WireMessage
    finish_reason: None = None
    error: None = None


class _WireEvent(msgspec.Struct, gc=False):
    type: str
    delta: _WireDelta
    index: int | None = None
    error: None = None


_decode_event = msgspec.json.Decoder(_WireEvent).decode

_CONTENT: Final = frozenset({"content-start", "content-delta"})
_CALL: Final = frozenset({"tool-call-start", "tool-call-delta"})


class _CohereReader:
    __slots__ = ("_calls", "_finish_reason", "_response_id")

    def __init__(self) -> None:
        self._calls = CallSorter()
        self._finish_reason: str | None = None
        self._response_id: str | None = None

    def read(self, data: bytes, event: str = "message") -> tuple[Delta, ...]:
        """Say what one event means. Raises UnparseableError, and is then as it was before."""
        try:
            wire = _decode_event(data)
        except (ValueError, RecursionError):
            return self._read_tolerant(data, event)
        message = wire.delta.message
        if wire.type in _CONTENT:
            content = message.content
            if content is None or not (content.text or content.thinking):
                return ()
            return (Delta(content.text or "", content.thinking or ""),)
        if wire.type in _CALL and message.tool_calls is not None:
            call = message.tool_calls
            function = call.function or _WireFunction()
            return self._take_calls(
                [CallPiece(wire.index, call.id or "", function.name or "", function.arguments or "")]
            )
        return self._read_tolerant(data, event)

    def ending(self) -> str | None:
        """Return the finish reason of `message-end`, once it came."""
        return self._finish_reason

    def _read_tolerant(self, data: bytes, event: str) -> tuple[Delta, ...]:
        marker = data.strip()
        if marker in (b"", b"[DONE]"):
            return ()
        try:
            value = lenient.loads(data)
        except UnparseableError:
            if event != "error":
                raise
            value = shown(data, 2000)
        if event == "error":
            return (Delta(fault=find_fault(value) or error_fault(value)),)
        if not isinstance(value, dict):
            if (fault := find_fault(value)) is not None:
                return (Delta(fault=fault),)
            raise UnparseableError(f"not a JSON object: {shown(data, 100)}")
        kind = value.get("type") or ("" if event == "message" else event)
        if not isinstance(kind, str):
            raise UnparseableError("the type of an event is not a string")
        if value.get("error") or kind == "error" or isinstance(value.get("message"), str):
            return (Delta(fault=find_fault(value) or error_fault(value)),)
        if not kind and (fault := find_fault(value)) is not None:
            return (Delta(fault=fault),)
        delta = value.get("delta")
        if not isinstance(delta, dict):
            delta = {}
        message = delta.get("message")
        if not isinstance(message, dict):
            message = {}
        if kind in _CONTENT:
            text, thinking = _content(message.get("content"))
            return (Delta(text, thinking),) if text or thinking else ()
        if kind in _CALL:
            return self._take_calls(_pieces(message.get("tool_calls"), lenient.index(value.get("index"))))
        if kind == "message-start":
            return self._take_id(value)
        if kind == "message-end":
            return self._end(delta)
        if not kind and isinstance(value.get("message"), dict) and value.get("finish_reason"):
            return self._read_whole(value)
        return ()

    def _take_id(self, value: dict[str, Any]) -> tuple[Delta, ...]:
        response_id = value.get("id")
        if not isinstance(response_id, str) or not 0 < len(response_id) <= MAX_LABEL_CHARS:
            return ()
        if self._response_id is not None:
            return ()
        self._response_id = response_id
        return (Delta(response_id=response_id),)

    def _take_calls(self, pieces: list[CallPiece]) -> tuple[Delta, ...]:
        if len(self._calls) + len(pieces) > MAX_CALLS and any(piece.id or piece.name for piece in pieces):
            raise UnparseableError(f"more than {MAX_CALLS} tool calls")
        if any(isinstance(piece.at, int) and abs(piece.at) > MAX_CALL_INDEX for piece in pieces):
            raise UnparseableError("a tool call's index is out of range")
        told: tuple[ToolCallDelta, ...] = tuple(filter(None, map(self._calls.take, pieces)))
        return (Delta(tool_calls=told),) if told else ()

    def _end(self, delta: dict[str, Any]) -> tuple[Delta, ...]:
        reason = lenient.text(delta.get("finish_reason"), "finish_reason")[:MAX_LABEL_CHARS] or None
        usage = _usage(delta.get("usage"))
        self._finish_reason = reason or "done"
        failed = reason is not None and reason.upper() in _FAILED
        if delta.get("error") or failed:
            fault = _failure(delta.get("error"), reason)
            return (Delta(finish_reason=reason, usage=usage), Delta(fault=fault))
        return (Delta(finish_reason=reason, usage=usage, terminal=True),)

    def _read_whole(self, value: dict[str, Any]) -> tuple[Delta, ...]:
        """Read the answer that came whole, in place of a stream."""
        message = value["message"]
        text, thinking = _content(message.get("content"))
        pieces = _pieces(message.get("tool_calls"), None)
        lenient.text(value.get("finish_reason"), "finish_reason")
        calls = self._take_calls(pieces)
        said = (Delta(text, thinking),) if text or thinking else ()
        return (*self._take_id(value), *said, *calls, *self._end(value))


def _content(content: Any) -> tuple[str, str]:
    """Return the text and the thinking in content: a block, a list of blocks, or a string."""
    text = thinking = ""
    for block in content if isinstance(content, list) else [content]:
        if isinstance(block, str):
            text += block
        elif isinstance(block, dict):
            text += lenient.text(block.get("text"), "text")
            thinking += lenient.text(block.get("thinking"), "thinking")
        elif block is not None:
            raise UnparseableError(f"content is a {type(block).__name__}")
    return text, thinking


def _pieces(calls: Any, at: int | None) -> list[CallPiece]:
    if calls is None:
        return []
    pieces = []
    for number, call in enumerate(calls if isinstance(calls, list) else [calls]):
        if not isinstance(call, dict):
            raise UnparseableError("a tool call is not an object")
        function = call.get("function")
        if function is None:
            function = {}
        if not isinstance(function, dict):
            raise UnparseableError("a tool call's function is not an object")
        arguments = function.get("arguments")
        if arguments is not None and not isinstance(arguments, str):
            try:
                arguments = msgspec.json.encode(arguments).decode()
            except (ValueError, RecursionError) as exc:
                raise UnparseableError(f"a tool call's arguments are not JSON ({exc})") from None
        pieces.append(
            CallPiece(
                at if at is not None or not isinstance(calls, list) else number,
                lenient.text(call.get("id"), "a tool call's id"),
                lenient.text(function.get("name"), "a tool call's name"),
                arguments or "",
            )
        )
    return pieces


def _failure(error: Any, reason: str | None) -> Fault:
    """Return the fault of a generation that failed."""
    said = error or f"the provider ended the answer with finish_reason {reason!r}"
    fault = error_fault(said)
    kind = _FAILED.get((reason or "").upper())
    if kind is not None:
        fault = msgspec.structs.replace(fault, kind=kind, temporary=kind == "timeout")
    return msgspec.structs.replace(fault, code=fault.code or reason)


def _usage(value: Any) -> Usage | None:
    """Return the tokens; where only what is billed is stated, that."""
    if not isinstance(value, dict):
        return None
    for name in ("tokens", "billed_units"):
        counts = value.get(name)
        if isinstance(counts, dict):
            usage = Usage(
                lenient.count(counts.get("input_tokens")),
                lenient.count(counts.get("output_tokens")),
                cached=lenient.count(value.get("cached_tokens")),
            )
            if (usage.input, usage.output) != (None, None):
                return usage
    return None


COHERE: Final = Dialect(
    name="cohere",
    framing="sse",
    reader=_CohereReader,
    fault=http_fault,
    endings=Endings(
        markers=("message-end",),
        well="`message-end` with the finish reason `COMPLETE`, `STOP_SEQUENCE` or `TOOL_CALL`",
        incomplete={
            "MAX_TOKENS": "the limit of tokens was reached",
            "USER_CANCEL": "the answer was stopped on the provider's side",
        },
        errors=(
            "`message-end` with an `error`, or with the finish reason `ERROR`, `ERROR_LIMIT`, `ERROR_TOXIC` or `TIMEOUT`",
            "an event named `error`, or an object that calls itself an error, or is only a message",
        ),
    ),
    asking=Asking(path="/chat"),
    stop="drain",
    usage_rule=(
        "in `message-end`: all `tokens`, which are more than the `billed_units`; `cached` is what of the input was cached"
    ),
)
