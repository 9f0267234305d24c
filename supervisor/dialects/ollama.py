"""Ollama's own API: `/api/chat` and `/api/generate`.

The wire is one JSON object to a line (Ollama API documentation, "Streaming" and "Errors"). A line has a piece of the answer in
`message` (chat) or in `response` and `thinking` (generate); tool calls come whole, their arguments an object. The last line
says `"done": true`, why (`done_reason`), and the usage. When something breaks after the answer has begun, the HTTP status
has been sent already, so the error is a line: `{"error": "…"}`. An answer that was not streamed is the last line alone,
with everything in it.

A line is decoded into structs that name only what is read; what they refuse is read again as generic JSON, piece by
piece. Nothing of the reader's state changes before the whole line has been read.

**How it ends.** Only `"done": true` ends the answer. Servers before 0.1.38 give no reason with it: then there is no finish
reason, and the stream completes as `done`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final, NamedTuple

import msgspec

from supervisor.dialects.base import Delta, ToolCallDelta, UnparseableError, Usage
from supervisor.dialects.dialect import Asking, Call, Dialect, Endings
from supervisor.dialects.faults import error_fault, find_fault, flat_fault, http_fault, shown
from supervisor.dialects.lenient import count, index, loads, text
from supervisor.dialects.tool_calls import MAX_CALLS, CallPiece, CallSorter
from supervisor.errors import ConfigurationError

__all__ = ["OLLAMA"]

MAX_LABEL_CHARS = 256
"""What is kept of a finish reason. A longer name of the model is none."""

_CHAT: Final = "/api/chat"
_NOTHING: Final = Delta()
_KNOWN: Final = frozenset({"model", "message", "response", "thinking", "done", "created_at", "status"})


# --- the typed way ---------------------------------------------------------------------------------------------------
# A field typed None must be null or absent: anything else sends the line the tolerant way.


class _WireMessage(msgspec.Struct, gc=False):
    content: str | None = None
    thinking: str | None = None
    tool_calls: None = None


class _WireLine(msgspec.Struct, gc=False):
    model: str
    done: bool
    message: _WireMessage | None = None
    response: str | None = None
    thinking: str | None = None
    done_reason: str | None = None
    prompt_eval_count: int | None = None
    eval_count: int | None = None
    error: None = None


_decode_line = msgspec.json.Decoder(_WireLine).decode


class _Line(NamedTuple):
    """What a line says."""

    text: str
    thinking: str
    pieces: tuple[CallPiece, ...]
    model: str | None
    done: bool
    reason: str | None
    usage: Usage | None


# --- the reader ------------------------------------------------------------------------------------------------------


class _OllamaReader:
    __slots__ = ("_calls", "_finish_reason", "_model", "_terminal")

    def __init__(self) -> None:
        self._calls = CallSorter()
        self._model: str | None = None
        self._finish_reason: str | None = None
        self._terminal = False

    def read(self, data: bytes, event: str = "message") -> tuple[Delta, ...]:  # noqa: ARG002 - lines have no names
        """Say what one line means. Raises UnparseableError, and is then as it was before."""
        try:
            line = _decode_line(data)
        except (ValueError, RecursionError):
            return self._read_tolerant(data)
        message = line.message
        if message is None:
            content, thinking = line.response or "", line.thinking or ""
        else:
            content, thinking = (
                message.content or line.response or "",
                message.thinking or line.thinking or "",
            )
        if self._model is not None and not line.done:
            # The shortest way, for nearly every line of nearly every stream.
            return (Delta(content, thinking),) if content or thinking else ()
        usage = _usage(line.prompt_eval_count, line.eval_count)
        return self._take(_Line(content, thinking, (), line.model, line.done, line.done_reason, usage))

    def ending(self) -> str | None:
        """Return the reason why the answer is done, once it is."""
        return (self._finish_reason or "done") if self._terminal else None

    def _read_tolerant(self, data: bytes) -> tuple[Delta, ...]:
        if not data.strip():
            return ()
        value = loads(data)
        if not isinstance(value, dict):
            if (fault := find_fault(value)) is not None:
                return (Delta(fault=fault),)
            raise UnparseableError(f"not a JSON object: {shown(data, 100)}")
        message = value.get("message")
        if value.get("error") or isinstance(message, str) or not _KNOWN & value.keys():
            if (fault := find_fault(value) or flat_fault(value)) is not None:
                return (Delta(fault=fault),)
            if value.get("error") is not None:
                return (Delta(fault=error_fault(value["error"])),)
            raise UnparseableError(f"not a line of Ollama's: {shown(data, 100)}")
        if message is None:
            message = {}
        if not isinstance(message, dict):
            raise UnparseableError(f"message is a {type(message).__name__}")
        done = value.get("done")
        if not isinstance(done, bool | None):
            raise UnparseableError(f"done is a {type(done).__name__}")
        model = value.get("model")
        return self._take(
            _Line(
                text=text(message.get("content"), "content") or text(value.get("response"), "response"),
                thinking=text(message.get("thinking"), "thinking") or text(value.get("thinking"), "thinking"),
                pieces=_pieces(message.get("tool_calls")) or _pieces(value.get("tool_calls")),
                model=model if isinstance(model, str) else None,
                done=bool(done),
                reason=text(value.get("done_reason"), "done_reason"),
                usage=_usage(count(value.get("prompt_eval_count")), count(value.get("eval_count"))),
            )
        )

    def _take(self, line: _Line) -> tuple[Delta, ...]:
        """Change the state by what was read, and tell it."""
        if len(self._calls) + len(line.pieces) > MAX_CALLS:
            raise UnparseableError(f"more than {MAX_CALLS} tool calls")
        calls: tuple[ToolCallDelta, ...] = tuple(filter(None, map(self._calls.take, line.pieces)))
        new_model = finish = None
        if line.model and self._model is None and len(line.model) <= MAX_LABEL_CHARS:
            new_model = self._model = line.model
        if line.done:
            self._terminal = True
            self._finish_reason = finish = (line.reason or "")[:MAX_LABEL_CHARS] or None
        delta = Delta(
            line.text,
            line.thinking,
            tool_calls=calls,
            finish_reason=finish,
            usage=line.usage,
            model=new_model,
            terminal=line.done,
        )
        return () if delta == _NOTHING else (delta,)


def _pieces(calls: Any) -> tuple[CallPiece, ...]:
    if calls is None:
        return ()
    if isinstance(calls, dict):
        calls = [calls]
    if not isinstance(calls, list):
        raise UnparseableError(f"tool_calls is a {type(calls).__name__}")
    return tuple(_piece(call) for call in calls if call is not None)


def _piece(call: Any) -> CallPiece:
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict):
        raise UnparseableError("a tool call without a function")
    arguments = function.get("arguments")
    if arguments is None:
        arguments = {}
    if not isinstance(arguments, str):
        try:
            arguments = msgspec.json.encode(arguments).decode()
        except (ValueError, RecursionError) as exc:
            raise UnparseableError(f"a tool call's arguments are not JSON ({exc})") from None
    at = index(function["index"] if "index" in function else call.get("index"))
    if at is not None and not 0 <= at < MAX_CALLS:
        raise UnparseableError("a tool call's index is out of range")
    return CallPiece(
        at, text(call.get("id"), "a tool call's id"), text(function.get("name"), "a name"), arguments
    )


def _usage(prompt: int | None, output: int | None) -> Usage | None:
    """Return the usage of the last line. A prompt that was in the cache as a whole has no count in older servers."""
    prompt, output = count(prompt), count(output)
    return None if prompt is None and output is None else Usage(prompt, output)


# --- asking ----------------------------------------------------------------------------------------------------------


def _first(request: Mapping[str, Any], path: str) -> Call:
    """Post the object: to `generate` in place of `chat` if it has a prompt and no messages."""
    if request.get("stream") is False:
        raise ConfigurationError("request.stream", False, "true, or nothing: a supervised answer is streamed")
    if "prompt" in request and "messages" not in request and path.endswith("/chat"):
        path = f"{path.removesuffix('/chat')}/generate"
    return Call(path=path, body={**request, "stream": True})


def _continuation(request: Mapping[str, Any], so_far: str) -> Mapping[str, Any] | str:
    """Have the model go on: with the text as the last message, which Ollama continues; with a raw prompt, after it."""
    if request.get("format"):
        return "`format` asks for JSON, which has to be valid as a whole"
    if request.get("think") not in (None, False):
        return "`think` is on: the model would think again, in the middle of its answer"
    if request.get("logprobs") or request.get("top_logprobs"):
        return "logprobs of the text so far would be missing"
    choice = request.get("tool_choice")
    if isinstance(choice, Mapping) or choice in ("required", "any"):
        return "tool_choice forces a tool call"
    messages = request.get("messages")
    if messages is None:
        return _continued_prompt(request, so_far)
    if not isinstance(messages, list) or not messages or not isinstance(messages[-1], Mapping):
        return "the request has no messages"
    last = messages[-1]
    if last.get("role") != "assistant":
        return {**request, "messages": [*messages, {"role": "assistant", "content": so_far}]}
    if last.get("tool_calls") or last.get("thinking") or not isinstance(last.get("content", ""), str):
        return "the last message is the assistant's and has more than text"
    joined = {**last, "content": last.get("content", "") + so_far}
    return {**request, "messages": [*messages[:-1], joined]}


def _continued_prompt(request: Mapping[str, Any], so_far: str) -> Mapping[str, Any] | str:
    prompt = request.get("prompt")
    if not isinstance(prompt, str):
        return "the request has neither messages nor a prompt"
    if request.get("raw") is not True:
        return "a prompt without `raw` is put into the model's template, in which no answer can be begun"
    if request.get("suffix"):
        return "`suffix` asks for what stands between two texts"
    return {**request, "prompt": prompt + so_far}


OLLAMA: Final = Dialect(
    name="ollama",
    framing="ndjson",
    reader=_OllamaReader,
    fault=http_fault,
    endings=Endings(
        markers=("`done: true`",),
        well="a line with `done: true`",
        incomplete={
            "length": "the limit of tokens (`num_predict`) or of the context was reached",
            "load": "nothing was asked: the model was loaded",
            "unload": "nothing was asked: the model was unloaded",
        },
        errors=(
            "a line with `error`",
            "an object that calls itself an error, or is only a message, where a line should be",
        ),
    ),
    asking=Asking(path=_CHAT, first=_first, continuation=_continuation),
    abort_stops_billing=True,
    usage_rule="in the last line: `prompt_eval_count` and `eval_count`; a stopped answer has none",
)
