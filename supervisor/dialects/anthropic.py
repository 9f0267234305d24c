"""Anthropic Messages, as streamed by Anthropic, the clouds that host its models, and the gateways that imitate it.

The wire is server-sent events, each a JSON object whose `type` repeats the event's name (Anthropic API, "Streaming
messages"); streams that leave the `event:` lines out are read by `type` alone. A message is told in blocks, each by a
`content_block_start`, deltas and a `content_block_stop`:

- `text` blocks are the text, `thinking` blocks the reasoning; signatures, redacted thinking and citations are neither;
- every block whose type ends in `tool_use` is a tool call, whoever runs it (`tool_use`, `server_tool_use`,
  `mcp_tool_use`); results of tools are not part of the answer. Arguments come in pieces, or whole in the start, and are
  `{}` where the block ends without any;
- a `compaction` block is a summary made for the next request. It is the text only of a message that has nothing else;
- events, deltas and blocks of an unknown type mean nothing, because Anthropic may add some at any time ("Versioning");
- a `message_start` that already has content, and even a stop reason, is believed (a message continued after code was
  run comes so); repeated, it is the same message again. A `fallback` block names the model that goes on.

**How it ends.** Only `message_stop` ends the answer, and only one that has begun. A stop reason without it is a truncation, because a stop reason is
told before the end of what was counted. An event that carries an error is that error and nothing else.

**Usage** is told in `message_start`, and again, as running totals, in `message_delta`: each number is the last one stated.
Input does not count what was read from or written to the cache; `cached` is what was read from it.

**Continuation** is Anthropic's prefill: the request's last message is the assistant's, and the model goes on from it. Only
models up to Claude 4.5 take one, and not with thinking, a forced tool or an output format. An unknown model is taken
for one that does not, since the price of being wrong is a rung not climbed rather than an answer joined to nothing.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any, Final

import msgspec

from supervisor.dialects import lenient
from supervisor.dialects.base import Delta, Fault, ToolCallDelta, UnparseableError, Usage
from supervisor.dialects.dialect import Asking, Call, Dialect, Endings, chat_prompt
from supervisor.dialects.faults import error_fault, find_fault, flat_fault, http_fault, shown
from supervisor.dialects.tool_calls import MAX_CALLS
from supervisor.errors import ConfigurationError

__all__ = ["ANTHROPIC"]

MAX_LABEL_CHARS = 256
"""What is kept of a finish reason. A longer name of the model or id of the message is none."""
MAX_BLOCK_INDEX = (1 << 53) - 1
"""The largest index of a block; an event with a larger or a negative one is unparseable."""
MAX_HELD_CHARS = 1 << 18
"""Up to this length a compaction's summary is held until it is known whether the message has anything else."""
VERSION: Final = "2023-06-01"
"""The version of the API that is asked for, and that this module reads."""
PROMPT_MAX_TOKENS: Final = 4096
"""What a request made of a prompt alone has as `max_tokens`, which the API demands: all its models can write so much."""


# --- the typed way ---------------------------------------------------------------------------------------------------
# A field typed None must be null or absent: anything else sends the event the tolerant way.


class _TextDelta(msgspec.Struct, tag="text_delta", tag_field="type", gc=False):
    text: str


class _ThinkingDelta(msgspec.Struct, tag="thinking_delta", tag_field="type", gc=False):
    thinking: str


class _InputDelta(msgspec.Struct, tag="input_json_delta", tag_field="type", gc=False):
    partial_json: str


class _WireDelta(msgspec.Struct, tag="content_block_delta", tag_field="type", gc=False):
    delta: _TextDelta | _ThinkingDelta | _InputDelta
    index: int | None = None
    error: None = None


_decode_delta = msgspec.json.Decoder(_WireDelta).decode


class _Tool:
    """A tool call, as far as it has been told."""

    __slots__ = ("id", "ordinal", "told", "whole")

    def __init__(self, ordinal: int, call_id: str) -> None:
        self.ordinal = ordinal
        self.id = call_id[:MAX_LABEL_CHARS]
        self.told = False
        """Some of its arguments were told."""
        self.whole = False
        """All of its arguments were told."""


# --- the reader ------------------------------------------------------------------------------------------------------


class _MessageReader:
    __slots__ = (
        "_calls",
        "_finish_reason",
        "_given",
        "_given_whole",
        "_held",
        "_held_chars",
        "_last",
        "_message_id",
        "_spoke",
        "_started",
        "_stopped",
        "_tools",
        "_usage",
    )

    def __init__(self) -> None:
        self._tools: dict[int, _Tool] = {}
        """By the index of the block; at most MAX_CALLS."""
        self._last: _Tool | None = None
        self._calls = 0
        self._started = False
        self._message_id = ""
        self._given = 0
        """How many blocks the message had when it started."""
        self._given_whole = False
        self._usage: Usage | None = None
        self._finish_reason: str | None = None
        self._stopped = False
        self._spoke = False
        """Something of the answer was told."""
        self._held: list[str] = []
        self._held_chars = 0

    def read(self, data: bytes, event: str = "message") -> tuple[Delta, ...]:
        """Say what one event means. Raises UnparseableError, and is then as it was before."""
        if event == "error":
            return (Delta(fault=_named_error(data)),)
        try:
            wire = _decode_delta(data)
        except (ValueError, RecursionError):
            return self._read_tolerant(data, event)
        piece = wire.delta
        if self._given_whole and wire.index is not None and wire.index < self._given:
            return ()
        kind = type(piece)
        if kind is _TextDelta:
            text = piece.text  # type: ignore[union-attr] # its type was just compared; isinstance costs twice that
            if not text:
                return ()
            self._spoke = True
            return (Delta(text),)
        if kind is _InputDelta:
            return self._add_arguments(wire.index, piece.partial_json)  # type: ignore[union-attr] # as above
        text = piece.thinking  # type: ignore[union-attr] # as above
        if not text:
            return ()
        self._spoke = True
        return (Delta("", text),)

    def ending(self) -> str | None:
        """Return the stop reason, or `done` if there was none, once the message has stopped."""
        return (self._finish_reason or "done") if self._stopped else None

    def _read_tolerant(self, data: bytes, event: str) -> tuple[Delta, ...]:
        marker = data.strip(b" \t\r\n\"'")
        if not marker or marker == b"[DONE]":  # some imitations send it; it ends nothing
            return ()
        value = lenient.loads(data)
        if not isinstance(value, dict):
            if (fault := find_fault(value)) is not None:
                return (Delta(fault=fault),)
            raise UnparseableError(f"not a JSON object: {shown(data, 100)}")
        kind = value.get("type")
        if kind is None and event != "message":
            kind = event
        if kind == "error" or value.get("error") or value.get("errors") or kind is None:
            fault = find_fault(value) or (error_fault(value) if kind == "error" else None)
            if fault is not None:
                return (Delta(fault=fault),)
        if (not isinstance(kind, str) or kind not in _EVENTS) and (fault := flat_fault(value)) is not None:
            return (Delta(fault=fault),)
        if not isinstance(kind, str):
            raise UnparseableError(f"an event without a type: {shown(data, 100)}")
        read = _EVENTS.get(kind)
        return () if read is None else read(self, value)

    # --- events ---

    def _start_message(self, value: dict[str, Any]) -> tuple[Delta, ...]:
        message = value.get("message")
        if not isinstance(message, dict):
            raise UnparseableError("a message_start without a message")
        return self._take_message(message)

    def _take_message(self, message: dict[str, Any]) -> tuple[Delta, ...]:
        message_id = _label(message.get("id"))
        content = message.get("content")
        blocks = content if isinstance(content, list) else [content] if content else []
        if isinstance(content, str):
            blocks = [{"type": "text", "text": content}]
        finish_reason = _stop_reason(message)
        if self._started and (message_id or "") == self._message_id:
            return ()  # the same start again
        self._check_room(sum(_is_call(block) for block in blocks))
        opened = [_opened(block) for block in blocks]
        # Nothing can be refused from here on.
        self._started = True
        self._message_id = message_id or ""
        self._tools = {}
        self._last = None
        self._given = len(blocks)
        self._given_whole = finish_reason is not None
        usage = self._total(message.get("usage"))
        model = _label(message.get("model"))
        deltas = []
        if usage is not None or model is not None or message_id is not None:
            deltas.append(Delta(usage=usage, model=model, response_id=message_id))
        for index, block in enumerate(opened):
            deltas += self._open(index, block)
            if self._given_whole:
                deltas += self._close(index)
        if finish_reason is not None:
            self._finish_reason = finish_reason
            deltas.append(self._finished(finish_reason))
        return tuple(deltas)

    def _start_block(self, value: dict[str, Any]) -> tuple[Delta, ...]:
        index = _index(value)
        block = value.get("content_block")
        if index is None:
            index = len(self._tools)
        if index < self._given:
            return ()  # it came with the message
        self._check_room(_is_call(block))
        return tuple(self._open(index, _opened(block)))

    def _read_delta(self, value: dict[str, Any]) -> tuple[Delta, ...]:
        index = _index(value)
        piece = value.get("delta")
        if not isinstance(piece, dict):
            raise UnparseableError("a content_block_delta without a delta")
        kind = piece.get("type")
        if self._given_whole and index is not None and index < self._given:
            return ()
        if kind == "input_json_delta":
            arguments = piece.get("partial_json")
            return self._add_arguments(index, "" if arguments is None else _json_text(arguments))
        if kind == "compaction_delta":
            self._hold(_text(piece.get("content"), "a compaction's content"))
            return ()
        if kind is None or kind == "text_delta":
            delta = Delta(_text(piece.get("text"), "a text_delta's text"))
        elif kind == "thinking_delta":
            delta = Delta("", _text(piece.get("thinking"), "a thinking_delta's thinking"))
        else:
            return ()
        if not (delta.text or delta.reasoning):
            return ()
        self._spoke = True
        return (delta,)

    def _stop_block(self, value: dict[str, Any]) -> tuple[Delta, ...]:
        index = _index(value)
        if index is None:
            index = next((at for at, tool in self._tools.items() if tool is self._last), None)
        return () if index is None else tuple(self._close(index))

    def _change_message(self, value: dict[str, Any]) -> tuple[Delta, ...]:
        delta = value.get("delta")
        if delta is not None and not isinstance(delta, dict):
            raise UnparseableError(f"a message_delta's delta is a {type(delta).__name__}")
        finish_reason = _stop_reason(delta or {}) or _stop_reason(value)
        usage = self._total(value.get("usage"))
        if finish_reason is None:
            return () if usage is None else (Delta(usage=usage),)
        self._finish_reason = finish_reason
        told = self._finished(finish_reason)
        return (told if usage is None else msgspec.structs.replace(told, usage=usage),)

    def _stop_message(self, value: dict[str, Any]) -> tuple[Delta, ...]:
        if not (self._started or self._spoke or self._finish_reason):
            return ()  # it ends nothing
        usage = self._total(value.get("usage"))
        deltas = [delta for index in self._tools for delta in self._close(index, cut=True)]
        if (text := self._unheld()) or usage is not None:
            deltas.append(Delta(text, usage=usage, restated=bool(text)))
        self._stopped = True
        return (*deltas, Delta(terminal=True))

    def _whole_message(self, value: dict[str, Any]) -> tuple[Delta, ...]:
        """Take a message that came in place of a stream: it has ended if it says why."""
        if _stop_reason(value) is None:
            return self._take_message(value)
        deltas = self._take_message(value)
        return deltas + self._stop_message({})

    # --- what events add ---

    def _check_room(self, calls: int) -> None:
        if self._calls + calls > MAX_CALLS:
            raise UnparseableError(f"more than {MAX_CALLS} tool calls")

    def _open(self, index: int, block: _Opened) -> list[Delta]:
        """Begin a block: what it has in itself is told."""
        if not block.is_call:
            self._tools.pop(index, None)
            self._hold(block.summary)
            if block.model is not None:
                return [Delta(model=block.model)]
            if not (block.text or block.reasoning):
                return []
            self._spoke = True
            return [Delta(block.text, block.reasoning)]
        known = self._tools.get(index)
        if known is not None and block.id and known.id == block.id[:MAX_LABEL_CHARS]:
            return []  # the same start again
        tool = self._tools[index] = self._last = _Tool(self._calls, block.id)
        self._calls += 1
        self._spoke = True
        tool.told = tool.whole = bool(block.arguments)
        return [Delta(tool_calls=(ToolCallDelta(tool.ordinal, block.id, block.name, block.arguments),))]

    def _add_arguments(self, index: int | None, arguments: str) -> tuple[Delta, ...]:
        tool = self._last if index is None else self._tools.get(index)
        # Blocks that are no calls may have such deltas as well. What came whole in the start is repeated by them.
        if tool is None or tool.whole or not arguments:
            return ()
        tool.told = True
        return (Delta("", "", "", (ToolCallDelta(tool.ordinal, "", "", arguments),)),)

    def _close(self, index: int, *, cut: bool = False) -> list[Delta]:
        """End a block. A call without any arguments has none, unless the message was cut before them."""
        tool = self._tools.get(index)
        if tool is None or tool.told or (cut and self._finish_reason != "tool_use"):
            return []
        tool.told = tool.whole = True
        return [Delta(tool_calls=(ToolCallDelta(tool.ordinal, "", "", "{}"),))]

    def _finished(self, finish_reason: str) -> Delta:
        # Without anything told before, a held summary is the text; a reader that missed the beginning cannot know.
        restated = not self._spoke
        return Delta(self._unheld(), finish_reason=finish_reason, restated=restated)

    def _hold(self, summary: str) -> None:
        if summary:
            self._held_chars += len(summary)
            self._held.append(summary)
            if self._held_chars > MAX_HELD_CHARS:
                self._held.clear()

    def _unheld(self) -> str:
        """Return the held summary, once, if the message has nothing else."""
        if self._spoke or not self._held:
            return ""
        self._spoke = True
        text = "".join(self._held)
        self._held.clear()
        return text

    def _total(self, value: Any) -> Usage | None:
        """Return the usage with these numbers in it; None if they say nothing."""
        if not isinstance(value, dict):
            return None
        details = value.get("output_tokens_details")
        stated = Usage(
            lenient.count(value.get("input_tokens")),
            lenient.count(value.get("output_tokens")),
            lenient.first_count(details, "thinking_tokens", "reasoning_tokens")
            if isinstance(details, dict)
            else None,
            lenient.count(value.get("cache_read_input_tokens")),
        )
        if stated == Usage():
            return None
        before = self._usage or stated
        self._usage = Usage(
            before.input if stated.input is None else stated.input,
            before.output if stated.output is None else stated.output,
            before.reasoning if stated.reasoning is None else stated.reasoning,
            before.cached if stated.cached is None else stated.cached,
        )
        return self._usage


_EVENTS: Final[Mapping[str, Callable[[_MessageReader, dict[str, Any]], tuple[Delta, ...]]]] = {
    # The reader's own methods, by the type of event they read.
    "content_block_delta": _MessageReader._read_delta,  # noqa: SLF001 - as are all the following
    "content_block_start": _MessageReader._start_block,  # noqa: SLF001
    "content_block_stop": _MessageReader._stop_block,  # noqa: SLF001
    "message": _MessageReader._whole_message,  # noqa: SLF001
    "message_delta": _MessageReader._change_message,  # noqa: SLF001
    "message_start": _MessageReader._start_message,  # noqa: SLF001
    "message_stop": _MessageReader._stop_message,  # noqa: SLF001
}


# --- the tolerant way ------------------------------------------------------------------------------------------------


class _Opened(msgspec.Struct, frozen=True, gc=False):
    """What the start of a block says."""

    is_call: bool = False
    id: str = ""
    name: str = ""
    arguments: str = ""
    text: str = ""
    reasoning: str = ""
    summary: str = ""
    model: str | None = None


def _is_call(block: Any) -> bool:
    kind = block.get("type") if isinstance(block, dict) else None
    return isinstance(kind, str) and kind.endswith("tool_use")


def _opened(block: Any) -> _Opened:
    if isinstance(block, str):
        return _Opened(text=block)
    if not isinstance(block, dict):
        raise UnparseableError(f"a content block is a {type(block).__name__}")
    kind = block.get("type")
    if _is_call(block):
        arguments = block.get("input")
        return _Opened(
            is_call=True,
            id=_text(block.get("id"), "a tool call's id"),
            name=_text(block.get("name"), "a tool call's name"),
            arguments=_json_text(arguments) if arguments else "",
        )
    if kind == "text":
        return _Opened(text=_text(block.get("text"), "a text block's text"))
    if kind == "thinking":
        return _Opened(reasoning=_text(block.get("thinking"), "a thinking block's thinking"))
    if kind == "compaction":
        return _Opened(summary=_text(block.get("content"), "a compaction's content"))
    if kind == "fallback" and isinstance(to := block.get("to"), dict):
        return _Opened(model=_label(to.get("model")))
    return _Opened()


def _named_error(data: bytes) -> Fault:
    value: Any
    try:
        value = lenient.loads(data)
    except UnparseableError:
        value = shown(data, 2000)
    return find_fault(value) or error_fault(value)


def _index(value: dict[str, Any]) -> int | None:
    index = lenient.index(value.get("index"))
    if index is not None and not 0 <= index <= MAX_BLOCK_INDEX:
        raise UnparseableError("a block's index is out of range")
    return index


def _text(value: Any, field: str) -> str:
    return lenient.text(value, field)


def _json_text(value: Any) -> str:
    """Return arguments as text: as they are, or as the JSON that they stand for."""
    if isinstance(value, str):
        return value
    try:
        return msgspec.json.encode(value).decode()
    except (ValueError, RecursionError) as exc:
        raise UnparseableError(f"a tool call's arguments are not JSON ({exc})") from None


def _stop_reason(value: dict[str, Any]) -> str | None:
    reason = _text(value.get("stop_reason"), "stop_reason")
    return reason[:MAX_LABEL_CHARS] or None


def _label(value: Any) -> str | None:
    return value if isinstance(value, str) and 0 < len(value) <= MAX_LABEL_CHARS else None


# --- asking ----------------------------------------------------------------------------------------------------------

_TAKES_PREFILL: Final = re.compile(
    r"(?:[a-z]{2,6}\.)?(?:anthropic[./])?"
    r"claude-(?:2(?:[.:][01])?|instant(?:-1(?:\.\d)?)?"
    r"|3(?:[-.][57])?-(?:opus|sonnet|haiku)"
    r"|(?:opus|sonnet|haiku)-4(?:[-.][0-5])?"
    r"|4(?:[-.][0-5])?-(?:opus|sonnet|haiku))"
    r"(?:-v\d(?=@))?(?:[-@](?:20\d{6}|latest|default))?(?:-v\d(?::\d(?::\d+k)?)?)?"
)
"""The models that take a prefill, by the names of Anthropic, Bedrock, Vertex AI and OpenRouter.

Claude Opus 4.6, Sonnet 4.6 and later answer 400 (Claude docs, "Prefill Claude's response").
"""


def _prompt(prompt: str, model: str | None) -> Mapping[str, Any]:
    return {**chat_prompt(prompt, model), "max_tokens": PROMPT_MAX_TOKENS}


def _first(request: Mapping[str, Any], path: str) -> Call:
    stream = request.get("stream")
    if stream not in (None, True):
        raise ConfigurationError("request.stream", stream, "true, or nothing: a supervised stream is one")
    return Call(path=path, body={**request, "stream": True}, headers={"anthropic-version": VERSION})


def _continuation(request: Mapping[str, Any], text: str) -> Mapping[str, Any] | str:
    """Return the request with the text as prefill, or why the model would not go on from it."""
    if reason := _why_no_prefill(request):
        return reason
    messages = request.get("messages")
    if not isinstance(messages, list) or not messages or not isinstance(messages[-1], Mapping):
        return "the request has no list of messages"
    last = messages[-1]
    if last.get("role") != "assistant":
        return {**request, "messages": [*messages, {"role": "assistant", "content": text}]}
    content = last.get("content")
    if isinstance(content, str):
        longer: Any = content + text
    elif isinstance(content, list) and not content:
        longer = text
    elif (
        isinstance(content, list)
        and isinstance(content[-1], Mapping)
        and content[-1].get("type") == "text"
        and isinstance(content[-1].get("text"), str)
    ):
        longer = [*content[:-1], {**content[-1], "text": content[-1]["text"] + text}]
    else:
        return "the request's own prefill does not end in text"
    return {**request, "messages": [*messages[:-1], {**last, "content": longer}]}


def _why_no_prefill(request: Mapping[str, Any]) -> str:
    model = request.get("model")
    if not isinstance(model, str) or len(model) > MAX_LABEL_CHARS or not _TAKES_PREFILL.fullmatch(model):
        return "the model is not known to take a prefill (Claude up to 4.5 does)"
    thinking = request.get("thinking")
    if thinking is not None and not (isinstance(thinking, Mapping) and thinking.get("type") == "disabled"):
        return "thinking is enabled, which a prefill cannot be combined with"
    choice = request.get("tool_choice")
    if choice is not None and not (isinstance(choice, Mapping) and choice.get("type") in ("auto", "none")):
        return "tool_choice forces a tool"
    config = request.get("output_config")
    if request.get("output_format") or (isinstance(config, Mapping) and config.get("format")):
        return "the request asks for an output format, which a prefill cannot be combined with"
    return ""


ANTHROPIC: Final = Dialect(
    name="anthropic",
    framing="sse",
    reader=_MessageReader,
    fault=http_fault,
    endings=Endings(
        markers=("message_stop",),
        well="`message_stop`",
        incomplete={
            "max_tokens": "the limit of tokens was reached",
            "model_context_window_exceeded": "the model's context window was full",
            "pause_turn": "a long turn was paused; sent back, it goes on",
            "refusal": "the model or a classifier refused to go on",
        },
        errors=(
            "an event named `error`, or of that type",
            "an `error` in any event, also after the stop reason",
            "an object that calls itself an error, or is only a message, where an event should be",
        ),
        truncated="the body ends, or the connection is lost, before `message_stop`, even after the stop reason",
    ),
    asking=Asking(
        path="/messages", key_header="x-api-key", prompt=_prompt, first=_first, continuation=_continuation
    ),
    abort_stops_billing=True,
    usage_rule=(
        "in `message_start`, then in `message_delta` as running totals, of which the last stated counts; input is without "
        "what was read from or written to the cache, cached is what was read"
    ),
)
