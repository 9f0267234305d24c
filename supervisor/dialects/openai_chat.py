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
Whatever is refused goes the tolerant way: generic JSON, looked at piece by piece. Both end in `_Part`s, and nothing of the
reader's state changes before the whole event has been read.

**How it ends.** `[DONE]` ends the answer whatever came before. Without it, the answer has ended as far as seen when every
choice seen has a finish reason. An event that carries an error is that error and nothing else, also after a finish reason.
"""

from __future__ import annotations

import json
from typing import Any, Final, NamedTuple

import msgspec

from supervisor.dialects.base import Delta, Fault, UnparseableError, Usage
from supervisor.dialects.dialect import Asking, Dialect, Endings
from supervisor.dialects.faults import error_fault, find_fault, http_fault, shown
from supervisor.dialects.tool_calls import MAX_CALLS, CallBudget, CallPiece, CallSorter

__all__ = ["OPENAI_CHAT"]

MAX_CHOICES = 1024
"""Choice indexes from this on are refused (the event is unparseable)."""
MAX_CALL_INDEX = (1 << 53) - 1
"""The largest index of a tool call, of either sign; an event with a larger one is unparseable."""
MAX_LABEL_CHARS = 256
"""What is kept of a finish reason. A longer name of the model or id of the response is none."""

_IGNORED_EVENTS: Final = frozenset({"ping", "keepalive", "keep-alive", "heartbeat"})
_FAILED_FINISHES: Final = frozenset({"error", "insufficient_system_resource"})
_ODD_FINISHES: Final = _FAILED_FINISHES | {"null"}


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


class _WireChunk(msgspec.Struct, gc=False):
    choices: list[_WireChoice]
    usage: dict[str, Any] | None = None
    model: str | None = None
    id: str | None = None
    error: None = None
    errors: None = None
    x_groq: None = None


_decode_chunk = msgspec.json.Decoder(_WireChunk).decode
_decode_any = msgspec.json.Decoder().decode


class _Part(NamedTuple):
    """What an event says of one choice."""

    choice: int
    text: str = ""
    reasoning: str = ""
    refusal: str = ""
    pieces: tuple[CallPiece, ...] = ()
    finish_reason: str | None = None
    whole: bool = False
    """It came as a `message`: the whole answer, not a piece."""


class _Choice:
    __slots__ = ("calls", "finish_reason", "streamed")

    def __init__(self, budget: CallBudget) -> None:
        self.calls = CallSorter(budget)
        self.finish_reason: str | None = None
        self.streamed = False
        """It came in deltas: a whole message after them is a repetition."""


# --- the reader ------------------------------------------------------------------------------------------------------


class _ChatReader:
    __slots__ = ("_budget", "_choices", "_first", "_model", "_open", "_response_id", "_terminal")

    def __init__(self) -> None:
        self._choices: dict[int, _Choice] = {}
        self._budget = CallBudget()
        self._open = 0
        self._first: _Choice | None = None
        """Choice 0, once the model is known or will not be: from then on the shortest way is open."""
        self._model: str | None = None
        self._response_id: str | None = None
        self._terminal = False

    def read(self, data: bytes, event: str = "message") -> tuple[Delta, ...]:
        """Say what one event means. Raises UnparseableError, and is then as it was before."""
        if event != "message" and event and (named := self._read_named(data, event)) is not None:
            return named
        try:
            chunk = _decode_chunk(data)
        except (ValueError, RecursionError):
            return self._read_tolerant(data)
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
            return self._read_tolerant(data)
        parts = []
        for choice in choices:
            part = choice.delta
            reasoning = part.reasoning_content or part.reasoning or ""
            if not reasoning and bytes(part.reasoning_details) not in {b"", b"null", b"[]"}:
                return self._read_tolerant(data)
            finish_reason = choice.finish_reason or None
            if finish_reason is not None and finish_reason in _ODD_FINISHES:
                return self._read_tolerant(data)
            parts.append(
                _Part(
                    choice.index or 0,
                    part.content or "",
                    reasoning,
                    part.refusal or "",
                    _typed_pieces(part.tool_calls) if part.tool_calls else (),
                    finish_reason,
                )
            )
        return self._take(parts, _usage(chunk.usage), chunk.model, chunk.id)

    def ending(self) -> str | None:
        """Return the finish reason of the first choice that has one, or `done`, if the answer has ended."""
        if not self._terminal and (self._open or not self._choices):
            return None
        # Asked at each event after the first finish reason, so it must not look at all choices to find choice 0.
        first = self._choices.get(0)
        if first is not None and first.finish_reason is not None:
            return first.finish_reason
        finished = [index for index, choice in self._choices.items() if choice.finish_reason is not None]
        return self._choices[min(finished)].finish_reason if finished else "done"

    def _read_named(self, data: bytes, event: str) -> tuple[Delta, ...] | None:
        if event in _IGNORED_EVENTS:
            return ()
        if event != "error":
            return None
        try:
            value = _loads(data)
        except UnparseableError:
            value = shown(data, 2000)
        return (Delta(fault=find_fault(value) or error_fault(value)),)

    def _read_tolerant(self, data: bytes) -> tuple[Delta, ...]:
        marker = data.strip(b" \t\r\n\"'")
        if marker == b"[DONE]":
            self._terminal = True
            return (Delta(terminal=True),)
        if not marker:
            return ()
        value = _loads(data)
        if not isinstance(value, dict):
            if (fault := find_fault(value)) is not None:
                return (Delta(fault=fault),)
            raise UnparseableError(f"not a JSON object: {shown(data, 100)}")
        if (fault := _chunk_fault(value)) is not None:
            return (Delta(fault=fault),)
        choices = value.get("choices")
        if choices is None:
            choices = []
        if not isinstance(choices, list):
            raise UnparseableError(f"choices is not a list: {shown(data, 100)}")
        parts = [_part(choice) for choice in choices]
        usage = _usage(value.get("usage"))
        x_groq = value.get("x_groq")
        if usage is None and isinstance(x_groq, dict):
            usage = _usage(x_groq.get("usage"))
        if usage is None:
            usage = next(filter(None, (_usage(choice.get("usage")) for choice in choices)), None)
        model, response_id = value.get("model"), value.get("id")
        deltas = self._take(
            parts,
            usage,
            model if isinstance(model, str) else None,
            response_id if isinstance(response_id, str) else None,
        )
        failed = next((part.finish_reason for part in parts if part.finish_reason in _FAILED_FINISHES), None)
        if failed is not None:
            fault = error_fault(
                {"message": f"the provider ended the answer with finish_reason {failed!r}", "code": failed}
            )
            return (*deltas, Delta(fault=fault))
        return deltas

    def _take(
        self, parts: list[_Part], usage: Usage | None, model: str | None, response_id: str | None
    ) -> tuple[Delta, ...]:
        """Change the state by what was read, and tell it."""
        self._check(parts)
        new_model = new_id = None
        if model and self._model is None and len(model) <= MAX_LABEL_CHARS:
            new_model = self._model = model
        if response_id and self._response_id is None and len(response_id) <= MAX_LABEL_CHARS:
            new_id = self._response_id = response_id
        deltas: list[Delta] = []
        for part in parts:
            choice = self._choices.get(part.choice)
            is_new = choice is None
            if choice is None:
                choice = self._choices[part.choice] = _Choice(self._budget)
                self._open += 1
            if not part.whole:
                choice.streamed = True
            elif choice.streamed:
                # The whole answer repeated after its pieces: only how it ended is new.
                part = _Part(part.choice, finish_reason=part.finish_reason)  # noqa: PLW2901 - the part as it counts
            calls = tuple(filter(None, map(choice.calls.take, part.pieces))) if part.pieces else ()
            if part.choice == 0 and (self._model is not None or part.text):
                self._first = choice
            finish_reason = part.finish_reason
            if finish_reason is not None:
                finish_reason = finish_reason[:MAX_LABEL_CHARS]
                if choice.finish_reason is None:
                    self._open -= 1
                choice.finish_reason = finish_reason
            elif not (part.text or part.reasoning or part.refusal or calls or (is_new and part.choice)):
                continue
            deltas.append(Delta(part.text, part.reasoning, part.refusal, calls, part.choice, finish_reason))
        if usage is not None or new_model is not None or new_id is not None:
            if deltas:
                deltas[0] = msgspec.structs.replace(
                    deltas[0], usage=usage, model=new_model, response_id=new_id
                )
            else:
                deltas.append(Delta(usage=usage, model=new_model, response_id=new_id))
        return tuple(deltas)

    def _check(self, parts: list[_Part]) -> None:
        pieces = sum(len(part.pieces) for part in parts)
        if pieces > self._budget.calls:
            raise UnparseableError("too many tool calls in all choices together")
        for part in parts:
            if not 0 <= part.choice < MAX_CHOICES:
                raise UnparseableError(f"a choice index is out of range (0 to {MAX_CHOICES - 1})")
            known = self._choices.get(part.choice)
            if part.pieces and pieces + (len(known.calls) if known else 0) > MAX_CALLS:
                raise UnparseableError(f"more than {MAX_CALLS} tool calls in one choice")
            for piece in part.pieces:
                if isinstance(piece.at, int) and abs(piece.at) > MAX_CALL_INDEX:
                    raise UnparseableError("a tool call's index is out of range")


# --- the tolerant way ------------------------------------------------------------------------------------------------


def _loads(data: bytes) -> Any:
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


def _chunk_fault(value: dict[str, Any]) -> Fault | None:
    """Return the error that a chunk carries, wherever it carries it."""
    choices = value.get("choices")
    if not choices:
        if (fault := find_fault(value)) is not None:
            return fault
    elif value.get("error") or value.get("errors"):
        return find_fault(value)
    x_groq = value.get("x_groq")
    if isinstance(x_groq, dict) and x_groq.get("error"):
        return error_fault(x_groq["error"])
    if isinstance(choices, list):
        for choice in choices:
            if isinstance(choice, dict):
                for place in (choice, choice.get("delta"), choice.get("message")):
                    if isinstance(place, dict) and place.get("error"):
                        return error_fault(place["error"])
    return None


def _part(choice: Any) -> _Part:
    if not isinstance(choice, dict):
        raise UnparseableError("a choice is not an object")
    delta = choice.get("delta")
    whole = False
    if delta is None:
        delta = choice.get("message")
        whole = delta is not None
    if delta is None:
        delta = {}
    if not isinstance(delta, dict):
        raise UnparseableError("a delta is not an object")
    text, reasoning, refusal = _content(delta.get("content"))
    return _Part(
        choice=_index(choice.get("index")) or 0,
        text=text,
        reasoning=_reasoning(delta) or reasoning,
        refusal=_text(delta.get("refusal"), "refusal") or refusal,
        pieces=_pieces(delta),
        finish_reason=_finish_reason(choice.get("finish_reason")),
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


def _text(value: Any, field: str) -> str:
    if value is None:
        return ""
    if not isinstance(value, str):
        raise UnparseableError(f"{field} is a {type(value).__name__}")
    return value


def _index(value: Any) -> int | None:
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


def _finish_reason(value: Any) -> str | None:
    if isinstance(value, dict):
        value = value.get("type") or value.get("reason")
    if value is None or value is False:
        return None
    if not isinstance(value, str):
        raise UnparseableError(f"finish_reason is a {type(value).__name__}")
    return None if value in {"", "null"} else value


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
    return CallPiece(_index(call.get("index")), _text(call_id, "a tool call's id"), name, arguments)


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
    return _text(function.get("name"), "a tool call's name"), arguments


def _usage(value: Any) -> Usage | None:
    """Return a usage as stated; None if nothing is stated."""
    if not isinstance(value, dict):
        return None
    prompt = value.get("prompt_tokens_details")
    completion = value.get("completion_tokens_details")
    spent = (
        _first_count(value, "prompt_tokens", "input_tokens"),
        _first_count(value, "completion_tokens", "output_tokens"),
    )
    if spent == (None, None):
        return None
    reasoning = _count(completion.get("reasoning_tokens")) if isinstance(completion, dict) else None
    cached = _count(prompt.get("cached_tokens")) if isinstance(prompt, dict) else None
    return Usage(
        spent[0],
        spent[1],
        _count(value.get("reasoning_tokens")) if reasoning is None else reasoning,
        _first_count(value, "prompt_cache_hit_tokens", "cached_tokens") if cached is None else cached,
    )


def _first_count(value: dict[str, Any], *names: str) -> int | None:
    return next((count for name in names if (count := _count(value.get(name))) is not None), None)


def _count(value: Any) -> int | None:
    if isinstance(value, bool):
        return None
    if isinstance(value, float) and not value.is_integer():
        return None
    if isinstance(value, float) or (
        isinstance(value, str) and value.isascii() and value.isdigit() and len(value) < 16
    ):
        value = int(value)
    return value if isinstance(value, int) and 0 <= value < 1 << 53 else None


OPENAI_CHAT: Final = Dialect(
    name="openai-chat",
    framing="sse",
    reader=_ChatReader,
    fault=http_fault,
    endings=Endings(
        markers=("[DONE]",),
        well="`[DONE]`; or, without it, a finish reason for every choice seen and then the end of the body",
        incomplete={
            "length": "the limit of tokens was reached",
            "content_filter": "the provider's filter cut the answer off",
        },
        errors=(
            "an `error` in a chunk, also after a finish reason, in a choice or in `x_groq`",
            "an event named `error`",
            "a finish reason `error` or `insufficient_system_resource`",
        ),
    ),
    asking=Asking(path="/chat/completions"),
    abort_stops_billing=True,
    usage_rule="with `stream_options.include_usage`, in a chunk of its own before `[DONE]`; on every chunk it is a running total",
)
