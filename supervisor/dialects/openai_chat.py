"""OpenAI Chat Completions, as streamed by OpenAI and by the many servers that imitate it.

The wire is server-sent events, each with a `chat.completion.chunk` (OpenAI API reference, "Streaming" under Chat), and
`data: [DONE]` at the end. What the imitations do differently is read here, not special-cased by provider:

- content as a string, a list of parts (text and thinking), an object or null; reasoning in `reasoning`,
  `reasoning_content`, `reasoning_details` or thinking parts; a whole `message` where a `delta` should be;
- tool calls with an index that is missing, null, shared by two calls or different in each piece; with an id missing,
  repeated or new in each piece; with arguments as an object; and the older `function_call`;
- usage in a chunk of its own, on every chunk (running totals: the last wins), in a choice, or in `x_groq`;
- errors as objects, strings, in a choice, in `x_groq`, as an event named `error`, or as a `finish_reason`.

**Two ways in.** A chunk is first decoded into structs that name only what is read, and in which a field that must be
absent (such as `error`) is typed as null, so that its presence costs nothing to test: the decoder refuses the chunk.
Whatever is refused goes the tolerant way: generic JSON, looked at piece by piece. Both end in `Part`s, and nothing of the
reader's state changes before the whole event has been read.

**How it ends.** `[DONE]` ends the answer whatever came before. Without it, the answer has ended as far as seen when every
choice seen has a finish reason; if the connection was lost, as many as `n` asked for must have one. An event that carries an error is that error and nothing else, also after a finish reason.
"""

from __future__ import annotations

from typing import Any, Final

import msgspec

from supervisor.dialects import lenient
from supervisor.dialects.base import Delta, UnparseableError
from supervisor.dialects.dialect import Asking, Dialect, Endings
from supervisor.dialects.faults import http_fault
from supervisor.dialects.openai_chunks import (
    MAX_CHOICES,
    ODD_FINISHES,
    ChunkReader,
    Part,
    choices_of,
    finish_of,
    usage_of,
)
from supervisor.dialects.tool_calls import CallPiece

__all__ = ["MAX_CHOICES", "OPENAI_CHAT", "chat_part"]


# --- the typed way ---------------------------------------------------------------------------------------------------
# A field typed None must be null or absent: anything else sends the chunk the tolerant way.


class _WireFunction(msgspec.Struct, gc=False):
    name: str | None = None
    arguments: str | None = None


class _WireCall(msgspec.Struct, gc=False):
    index: int | None = None
    id: str | None = None
    function: _WireFunction | None = None


class _WireDelta(msgspec.Struct, gc=False):
    content: str | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None
    refusal: str | None = None
    tool_calls: list[_WireCall] | None = None
    function_call: None = None
    reasoning_text: None = None
    thinking: None = None
    error: None = None
    reasoning_details: msgspec.Raw = msgspec.Raw(b"")  # read only where the reasoning is nowhere else


class _WireChoice(msgspec.Struct, gc=False):
    delta: _WireDelta
    index: int | None = None
    finish_reason: str | None = None
    error: None = None
    usage: None = None
    message: None = None


class _WireChunk(msgspec.Struct, gc=False):
    choices: list[_WireChoice]
    usage: dict[str, Any] | None = None
    model: str | None = None
    id: str | None = None
    error: None = None
    errors: None = None
    x_groq: None = None


_decode_chunk = msgspec.json.Decoder(_WireChunk).decode


# --- the reader ------------------------------------------------------------------------------------------------------


class _ChatReader(ChunkReader):
    __slots__ = ()

    def read(self, data: bytes, event: str = "message") -> tuple[Delta, ...]:
        """Say what one event means. Raises UnparseableError, and is then as it was before."""
        if event != "message" and event and (named := self.read_named(data, event)) is not None:
            return named
        try:
            chunk = _decode_chunk(data)
        except (ValueError, RecursionError):
            return self.read_tolerant(data)
        choices = chunk.choices
        first = self._first
        if first is not None and len(choices) == 1 and chunk.usage is None:
            # The shortest way, for nearly every event of nearly every stream.
            choice = choices[0]
            if not choice.finish_reason and not choice.index:
                part = choice.delta
                text = part.content
                reasoning = part.reasoning_content or part.reasoning
                calls = part.tool_calls
                if calls or part.refusal:
                    if calls and not (text or reasoning or part.refusal) and len(calls) == 1:
                        call = calls[0]
                        function = call.function
                        if function is not None and not call.id and not function.name and function.arguments:
                            piece = first.calls.go_on(call.index, function.arguments)
                            if piece is not None:
                                return (Delta("", "", "", (piece,)),)
                elif text:
                    if not reasoning:
                        return (Delta(text),)
                elif reasoning:
                    return (Delta("", reasoning),)
        if not choices:
            # An empty list is usage, a keep-alive, or an odd error.
            return self.read_tolerant(data)
        parts = []
        for choice in choices:
            part = choice.delta
            reasoning = part.reasoning_content or part.reasoning or ""
            if not reasoning and bytes(part.reasoning_details) not in {b"", b"null", b"[]"}:
                return self.read_tolerant(data)
            finish = choice.finish_reason or None
            if finish is not None and finish in ODD_FINISHES:
                return self.read_tolerant(data)
            parts.append(
                Part(
                    choice.index or 0,
                    part.content or "",
                    reasoning,
                    part.refusal or "",
                    _typed_pieces(part.tool_calls) if part.tool_calls else (),
                    finish,
                )
            )
        return self.take(parts, usage_of(chunk.usage), chunk.model, chunk.id)

    def part(self, choice: Any) -> Part:
        """Read one choice, as generic JSON."""
        return chat_part(choice)


# --- the tolerant way ------------------------------------------------------------------------------------------------


def chat_part(choice: Any) -> Part:
    """Read one choice of a chat chunk, as generic JSON. Raises UnparseableError."""
    if not isinstance(choice, dict):
        raise UnparseableError("a choice is not an object")
    delta = choice.get("delta")
    whole = False
    if not delta and choice.get("message") is not None:
        delta = choice["message"]
        whole = True
    if delta is None:
        delta = {"content": choice.get("text")}  # a choice of legacy completions
    if not isinstance(delta, dict):
        raise UnparseableError("a delta is not an object")
    text, reasoning, refusal = _content(delta.get("content"))
    return Part(
        choice=lenient.index(choice.get("index")) or 0,
        text=text,
        reasoning=_reasoning(delta) or reasoning,
        refusal=lenient.text(delta.get("refusal"), "refusal") or refusal,
        pieces=_pieces(delta),
        finish_reason=finish_of(choice.get("finish_reason")),
        whole=whole,
    )


def _content(content: Any) -> tuple[str, str, str]:
    """Return the text, reasoning and refusal in a `content` of any shape."""
    if content is None or isinstance(content, str):
        return content or "", "", ""
    if isinstance(content, dict):
        content = [content]
    if not isinstance(content, list):
        raise UnparseableError(f"content is a {type(content).__name__}")
    text: list[str] = []
    reasoning: list[str] = []
    refusal: list[str] = []
    for part in content:
        if isinstance(part, str):
            text.append(part)
        elif isinstance(part, dict):
            kind = part.get("type")
            if not isinstance(kind, str | None):
                raise UnparseableError("a content part's type is not a string")
            if kind in {"thinking", "reasoning"} or (kind is None and "thinking" in part):
                reasoning.append(_gathered(part.get("thinking") or part.get("reasoning") or part.get("text")))
            elif kind == "refusal":
                refusal.append(_gathered(part.get("refusal")))
            elif kind in {"text", "output_text", None}:
                text.append(_gathered(part.get("text")))
            # Other parts (references, images, audio) are not text.
    return "".join(text), "".join(reasoning), "".join(refusal)


def _gathered(value: Any, depth: int = 4) -> str:
    """Return the text in a string, in an object with one, or in a list of either, not nested deeply."""
    if isinstance(value, str):
        return value
    if not depth:
        return ""
    if isinstance(value, dict):
        return next(
            (
                text
                for name in ("text", "content", "summary", "value")
                if (text := _gathered(value.get(name), depth - 1))
            ),
            "",
        )
    if isinstance(value, list):
        return "".join(_gathered(item, depth - 1) for item in value)
    return ""


def _reasoning(delta: dict[str, Any]) -> str:
    # Servers that fill several of these put the same text into each.
    for name in ("reasoning_content", "reasoning", "reasoning_text", "thinking"):
        if text := _gathered(delta.get(name)):
            return text
    details = delta.get("reasoning_details")
    return _gathered(details) if isinstance(details, list) else ""


def _typed_pieces(calls: list[_WireCall]) -> tuple[CallPiece, ...]:
    pieces = []
    for call in calls:
        function = call.function
        if function is None:
            pieces.append(CallPiece(call.index, call.id or "", "", ""))
        else:
            pieces.append(CallPiece(call.index, call.id or "", function.name or "", function.arguments or ""))
    return tuple(pieces)


def _pieces(delta: dict[str, Any]) -> tuple[CallPiece, ...]:
    calls = delta.get("tool_calls")
    if calls is None:
        calls = []
    elif isinstance(calls, dict):
        calls = [calls]
    if not isinstance(calls, list):
        raise UnparseableError("tool_calls is not a list")
    pieces = [_piece(call) for call in calls if call is not None]
    older = delta.get("function_call")
    if isinstance(older, dict):
        name, arguments = _function(older)
        pieces.append(CallPiece("function_call", "", name, arguments))
    return tuple(pieces)


def _piece(call: Any) -> CallPiece:
    if not isinstance(call, dict):
        raise UnparseableError("a tool call is not an object")
    function = call.get("function")
    if function is None:
        function = call.get("custom")  # a custom tool: its input is free text
    if function is None:
        function = call if "name" in call or "arguments" in call else {}
    if not isinstance(function, dict):
        raise UnparseableError("a tool call's function is not an object")
    name, arguments = _function(function)
    call_id = call.get("id")
    if isinstance(call_id, int) and not isinstance(call_id, bool):
        call_id = str(call_id)
    return CallPiece(
        lenient.index(call.get("index")), lenient.text(call_id, "a tool call's id"), name, arguments
    )


def _function(function: dict[str, Any]) -> tuple[str, str]:
    arguments = function.get("arguments")
    if arguments is None:
        arguments = function.get("input")
    if arguments is None:
        arguments = ""
    elif not isinstance(arguments, str):
        try:
            arguments = msgspec.json.encode(arguments).decode()
        except (ValueError, RecursionError) as exc:
            raise UnparseableError(f"a tool call's arguments are not JSON ({exc})") from None
    return lenient.text(function.get("name"), "a tool call's name"), arguments


OPENAI_CHAT: Final = Dialect(
    name="openai-chat",
    framing="sse",
    reader=_ChatReader,
    fault=http_fault,
    endings=Endings(
        markers=("[DONE]",),
        well="`[DONE]`; or, without it, a finish reason for every choice seen and then the end of the body (for every one asked for, if the connection is lost)",
        incomplete={
            "length": "the limit of tokens was reached",
            "content_filter": "the provider's filter cut the answer off",
        },
        errors=(
            "an `error` in a chunk, also after a finish reason, in a choice or in `x_groq`",
            "an event named `error`",
            "an object that calls itself an error, or is only a message, where an event should be",
            "a finish reason `error`, `abort` or `insufficient_system_resource`",
        ),
    ),
    asking=Asking(path="/chat/completions", choices=choices_of),
    abort_stops_billing=True,
    usage_rule="with `stream_options.include_usage`, in a chunk of its own before `[DONE]`; on every chunk it is a running total",
)
