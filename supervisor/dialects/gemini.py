"""Google Gemini's `streamGenerateContent`, of the Gemini API and of Vertex AI.

Each event is a whole `GenerateContentResponse` with the next piece of each candidate. With `alt=sse` they come as server-sent
events (the dialect `gemini`), without it as the elements of one JSON array (`gemini-jsonarray`); what they say is the same, and
one reader reads both. From the parts of a candidate are read:

- `text`, which is reasoning where the part is a `thought`;
- `functionCall`, with its arguments as an object, or told piece by piece as `partialArgs` (see `partial_arguments`). Several
  calls may be in one list of parts. An id is given by newer models only;
- nothing else: executable code, its result, inline data and files are in the journal, but not text.

**How it ends.** There is no end marker. Older models put `finishReason: STOP` on every chunk and then another reason on the
last, so a finish reason does not end the answer: it has ended when every candidate seen has one *and* the body ends. What
follows a finish reason (empty parts, usage, more text) is read as before.

A prompt that is blocked gives no candidate but a `promptFeedback.blockReason`. That is an error of kind `content_filter`, not
an empty answer: nothing was generated, and the same request will be refused again.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, Final, NamedTuple

import attrs
import msgspec

from supervisor.dialects import lenient
from supervisor.dialects.base import Delta, Fault, ToolCallDelta, UnparseableError, Usage
from supervisor.dialects.dialect import Asking, Call, Dialect, Endings, named_model
from supervisor.dialects.faults import (
    MAX_MESSAGE_CHARS,
    classify,
    error_fault,
    find_fault,
    flat_fault,
    http_fault,
    shown,
)
from supervisor.dialects.partial_arguments import ArgumentsBudget, ArgumentsWriter, PartialValue, parse_path
from supervisor.dialects.tool_calls import MAX_CALLS
from supervisor.errors import ConfigurationError

__all__ = ["GEMINI", "GEMINI_JSONARRAY"]

MAX_CANDIDATES = 1024
"""Candidate indexes from this on are refused (the event is unparseable)."""
MAX_CALLS_IN_ALL = 4 * MAX_CALLS
"""How many function calls the candidates of a response may have together; one candidate, `MAX_CALLS`."""
MAX_LABEL_CHARS = 256
"""What is kept of a finish reason. A longer name of the model or id of the response is none."""

_NONE: Final = frozenset({"", "FINISH_REASON_UNSPECIFIED", "BLOCK_REASON_UNSPECIFIED", "0"})


# --- the wire --------------------------------------------------------------------------------------------------------


class _WireArgument(msgspec.Struct, rename="camel", gc=False):
    json_path: str
    string_value: str | None = None
    number_value: float | int | None = None
    bool_value: bool | None = None
    null_value: Any = msgspec.UNSET
    will_continue: bool | None = None


class _WireCall(msgspec.Struct, rename="camel", gc=False):
    name: str | None = None
    id: str | None = None
    args: Any = None
    partial_args: list[_WireArgument] | None = None
    will_continue: bool | None = None


class _WirePart(msgspec.Struct, rename="camel", gc=False):
    text: str | None = None
    thought: bool | None = None
    function_call: _WireCall | None = None


class _WireContent(msgspec.Struct, gc=False):
    parts: list[_WirePart] | None = None


class _WireCandidate(msgspec.Struct, rename="camel", gc=False):
    content: _WireContent | None = None
    index: int | None = None
    finish_reason: str | int | None = None


class _WireUsage(msgspec.Struct, rename="camel", gc=False):
    prompt_token_count: Any = None
    candidates_token_count: Any = None
    thoughts_token_count: Any = None
    cached_content_token_count: Any = None


class _WireFeedback(msgspec.Struct, rename="camel", gc=False):
    block_reason: str | int | None = None
    block_reason_message: str | None = None


class _WireChunk(msgspec.Struct, rename="camel", gc=False):
    candidates: list[_WireCandidate] | None = None
    usage_metadata: _WireUsage | None = None
    prompt_feedback: _WireFeedback | None = None
    model_version: str | None = None
    response_id: str | None = None
    error: None = None  # anything else than null sends the chunk the tolerant way
    response: None = None


_decode_chunk = msgspec.json.Decoder(_WireChunk).decode


class _CallPiece(NamedTuple):
    name: str
    id: str
    arguments: str | None
    """The arguments as JSON text, where they came whole and not empty."""
    values: tuple[PartialValue, ...]
    continues: bool

    @property
    def opens(self) -> bool:
        return bool(self.name or self.id)


class _Part(NamedTuple):
    """What an event says of one candidate."""

    candidate: int
    text: str
    reasoning: str
    calls: tuple[_CallPiece, ...]
    finish_reason: str | None


@attrs.define
class _OpenCall:
    ordinal: int
    id: str
    writer: ArgumentsWriter | None
    """None: the arguments came whole."""


@attrs.define
class _Candidate:
    finish_reason: str | None = None
    calls: int = 0
    open: _OpenCall | None = None


# --- the reader ------------------------------------------------------------------------------------------------------


class _GeminiReader:
    __slots__ = (
        "_arguments",
        "_calls_left",
        "_candidates",
        "_model",
        "_open",
        "_response_id",
        "_terminal",
        "_usage",
    )

    def __init__(self) -> None:
        self._candidates: dict[int, _Candidate] = {}
        self._open = 0
        self._calls_left = MAX_CALLS_IN_ALL
        self._arguments = ArgumentsBudget()
        self._usage = Usage()
        self._model: str | None = None
        self._response_id: str | None = None
        self._terminal = False

    def read(self, data: bytes, event: str = "message") -> tuple[Delta, ...]:
        """Say what one event means. Raises UnparseableError, and is then as it was before."""
        if event == "error":
            return (Delta(fault=_named_error(data)),)
        try:
            chunk = _decode_chunk(data)
        except (ValueError, RecursionError):
            return self._read_tolerant(data)
        candidates = chunk.candidates
        if candidates and len(candidates) == 1 and self._model is not None:
            # The shortest way, for nearly every event of nearly every stream: one more piece of the only candidate's text.
            candidate = candidates[0]
            parts = candidate.content.parts if candidate.content is not None else None
            if (
                parts
                and len(parts) == 1
                and candidate.finish_reason is None
                and not candidate.index
                and 0 in self._candidates
                and parts[0].text
                and parts[0].function_call is None
                and (self._response_id is not None or chunk.response_id is None)
            ):
                text = parts[0].text
                usage = self._count(chunk.usage_metadata)
                return (Delta("", text, usage=usage) if parts[0].thought else Delta(text, usage=usage),)
        if not chunk.candidates and chunk.prompt_feedback is None and chunk.usage_metadata is None:
            # Nothing of a chunk: perhaps an error under another name.
            return self._read_tolerant(data)
        return self._take([chunk])

    def ending(self) -> str | None:
        """Return the finish reason of the first candidate, if all candidates seen have one."""
        if not self._terminal and (self._open or not self._candidates):
            return None
        first = self._candidates.get(0)
        if first is not None and first.finish_reason is not None:
            return first.finish_reason
        finished = [index for index, known in self._candidates.items() if known.finish_reason is not None]
        return self._candidates[min(finished)].finish_reason if finished else "done"

    def _read_tolerant(self, data: bytes) -> tuple[Delta, ...]:
        marker = data.strip()
        if marker == b"[DONE]":
            # Not Google's; proxies put it at the end.
            self._terminal = True
            return (Delta(terminal=True),)
        if not marker:
            return ()
        value = lenient.loads(data)
        # A whole array in place of an event: what comes without `alt=sse`, or one error.
        chunks: list[_WireChunk] = []
        for item in value if isinstance(value, list) else [value]:
            if not isinstance(item, dict):
                raise UnparseableError(f"not a JSON object: {shown(data, 100)}")
            if not item.get("candidates") or item.get("error"):
                if (fault := _with_details(find_fault(item) or flat_fault(item), item)) is not None:
                    return (*self._take(chunks), Delta(fault=fault))
                if isinstance(inner := item.get("response"), dict):
                    item = inner  # noqa: PLW2901 - Code Assist puts each chunk into an envelope
            try:
                chunks.append(
                    msgspec.convert({**item, "error": None, "response": None}, _WireChunk, strict=False)
                )
            except (ValueError, RecursionError) as exc:
                raise UnparseableError(f"not a chunk ({exc}): {shown(data, 100)}") from None
        return self._take(chunks)

    def _take(self, chunks: list[_WireChunk]) -> tuple[Delta, ...]:
        """Change the state by what was read, and tell it."""
        parts = [[_part(candidate) for candidate in chunk.candidates or ()] for chunk in chunks]
        self._check([part for some in parts for part in some])
        deltas: list[Delta] = []
        for chunk, some in zip(chunks, parts, strict=True):
            told = [delta for part in some if (delta := self._take_part(part)) is not None]
            if (envelope := self._take_envelope(chunk)) is not None:
                if told:
                    told[0] = msgspec.structs.replace(
                        told[0],
                        usage=envelope.usage,
                        model=envelope.model,
                        response_id=envelope.response_id,
                    )
                else:
                    told = [envelope]
            deltas += told
            if (fault := _blocked(chunk)) is not None:
                deltas.append(Delta(fault=fault))
                break
        return tuple(deltas)

    def _check(self, parts: list[_Part]) -> None:
        opening = 0
        for part in parts:
            if not 0 <= part.candidate < MAX_CANDIDATES:
                raise UnparseableError(f"a candidate's index is out of range (0 to {MAX_CANDIDATES - 1})")
            if not part.calls:
                continue
            known = self._candidates.get(part.candidate)
            going_on = known is not None and known.open is not None
            opening += sum(call.opens or not going_on for call in part.calls)
            if opening + (known.calls if known else 0) > MAX_CALLS:
                raise UnparseableError(f"more than {MAX_CALLS} function calls in one candidate")
        if opening > self._calls_left:
            raise UnparseableError("too many function calls in all candidates together")
        self._arguments.check(value for part in parts for call in part.calls for value in call.values)

    def _count(self, stated: _WireUsage | None) -> Usage | None:
        """Take a running total, and return it if it has changed."""
        if stated is None:
            return None
        merged = _merged(self._usage, stated)
        if merged == self._usage:
            return None
        self._usage = merged
        return merged

    def _take_envelope(self, chunk: _WireChunk) -> Delta | None:
        usage = self._count(chunk.usage_metadata)
        model = response_id = None
        if self._model is None and chunk.model_version and len(chunk.model_version) <= MAX_LABEL_CHARS:
            model = self._model = chunk.model_version
        if self._response_id is None and chunk.response_id and len(chunk.response_id) <= MAX_LABEL_CHARS:
            response_id = self._response_id = chunk.response_id
        if usage is None and model is None and response_id is None:
            return None
        return Delta(usage=usage, model=model, response_id=response_id)

    def _take_part(self, part: _Part) -> Delta | None:
        known = self._candidates.get(part.candidate)
        is_new = known is None
        if known is None:
            known = self._candidates[part.candidate] = _Candidate()
            self._open += 1
        calls = [piece for call in part.calls for piece in self._take_call(known, call)]
        finish_reason = part.finish_reason
        if finish_reason is not None:
            if known.finish_reason is None:
                self._open -= 1
            known.finish_reason = finish_reason = finish_reason[:MAX_LABEL_CHARS]
            if finish_reason == "STOP":
                # It ended well, so the call is whole even if nobody said so. After any other reason it may be a part.
                calls += _closed(known)
        elif not (part.text or part.reasoning or calls or (is_new and part.candidate)):
            return None
        return Delta(part.text, part.reasoning, "", tuple(calls), part.candidate, finish_reason)

    def _take_call(self, known: _Candidate, call: _CallPiece) -> list[ToolCallDelta]:
        current = known.open
        told: list[ToolCallDelta] = []
        call_id, name = call.id, call.name
        if current is None or (call.opens and not (call.id and call.id == current.id)):
            if not (call.opens or call.arguments is not None or call.values):
                return []  # it closes a call that is closed
            told += _closed(known)
            current = known.open = _OpenCall(
                known.calls, call.id[:MAX_LABEL_CHARS], ArgumentsWriter(self._arguments)
            )
            known.calls += 1
            self._calls_left -= 1
        else:
            call_id = name = ""
        text = ""
        if current.writer is not None:
            if call.arguments is not None and not current.writer.begun:
                text = call.arguments
                current.writer = None
            else:
                text = "".join(map(current.writer.add, call.values))
        if call_id or name or text:
            told.append(ToolCallDelta(current.ordinal, call_id, name, text))
        if not call.continues:
            told += _closed(known)
        return _joined(told)


def _closed(known: _Candidate) -> list[ToolCallDelta]:
    """Close the candidate's open call, if it has one, and return what ends its arguments."""
    current, known.open = known.open, None
    if current is None or current.writer is None:
        return []
    return [ToolCallDelta(current.ordinal, "", "", current.writer.finish())]


def _joined(told: list[ToolCallDelta]) -> list[ToolCallDelta]:
    """Make one piece of the first and the last of a call that came whole."""
    if len(told) > 1 and told[-1].index == told[-2].index:
        first, last = told[-2:]
        told[-2:] = [ToolCallDelta(first.index, first.id, first.name, first.arguments + last.arguments)]
    return told


# --- what a chunk says -----------------------------------------------------------------------------------------------


def _part(candidate: _WireCandidate) -> _Part:
    text: list[str] = []
    reasoning: list[str] = []
    calls: list[_CallPiece] = []
    content = candidate.content
    for part in (content.parts or ()) if content is not None else ():
        if part.text:
            (reasoning if part.thought else text).append(part.text)
        if part.function_call is not None:
            calls.append(_call(part.function_call))
    reason = candidate.finish_reason
    finish_reason = None if reason is None or str(reason) in _NONE else str(reason)
    return _Part(candidate.index or 0, "".join(text), "".join(reasoning), tuple(calls), finish_reason)


def _call(call: _WireCall) -> _CallPiece:
    values = []
    for argument in call.partial_args or ():
        value: str | float | bool | None
        if argument.string_value is not None:
            value = argument.string_value
        elif argument.number_value is not None:
            value = argument.number_value
        elif argument.bool_value is not None:
            value = argument.bool_value
        elif argument.null_value is not msgspec.UNSET:
            value = None
        else:
            continue
        path = parse_path(argument.json_path)
        if path:
            values.append(
                PartialValue(path, value, argument.will_continue is True and isinstance(value, str))
            )
    return _CallPiece(
        call.name or "", call.id or "", _arguments(call.args), tuple(values), call.will_continue is True
    )


def _arguments(args: Any) -> str | None:
    if isinstance(args, str):
        return args or None  # Google sends an object; proxies have sent its text
    if not args:
        return None
    try:
        return msgspec.json.encode(args).decode()
    except (ValueError, RecursionError) as exc:
        raise UnparseableError(f"a function call's arguments are not JSON ({exc})") from None


def _merged(known: Usage, stated: _WireUsage) -> Usage:
    """Return the running totals: what this chunk states, and what it leaves out as it was."""
    return Usage(
        _newer(stated.prompt_token_count, known.input),
        _newer(stated.candidates_token_count, known.output),
        _newer(stated.thoughts_token_count, known.reasoning),
        _newer(stated.cached_content_token_count, known.cached),
    )


def _newer(stated: Any, known: int | None) -> int | None:
    if stated is None or (count := lenient.count(stated)) is None:
        return known
    return count


# --- errors ----------------------------------------------------------------------------------------------------------


def _blocked(chunk: _WireChunk) -> Fault | None:
    """Return the fault of a blocked prompt."""
    feedback = chunk.prompt_feedback
    if feedback is None or chunk.candidates:
        return None
    reason = feedback.block_reason
    if reason is None or str(reason) in _NONE:
        return None
    code = str(reason)[:MAX_LABEL_CHARS]
    message = feedback.block_reason_message or f"the prompt was blocked (blockReason: {code})"
    return Fault(kind="content_filter", message=message[:MAX_MESSAGE_CHARS], code=code)


def _named_error(data: bytes) -> Fault:
    try:
        value = lenient.loads(data)
    except UnparseableError:
        return error_fault(shown(data, 2000))
    return _with_details(find_fault(value) or error_fault(value), value) or error_fault(value)


def _with_details(fault: Fault | None, value: Any) -> Fault | None:
    """Return the fault with what Google says in its `details` (google.rpc.ErrorInfo and RetryInfo)."""
    if fault is None:
        return None
    item = next((entry for entry in value if entry), None) if isinstance(value, list) else value
    error = item.get("error") if isinstance(item, dict) else None
    details = error.get("details") if isinstance(error, dict) else None
    if not isinstance(error, dict) or not isinstance(details, list):
        return fault
    words: list[str] = []
    retry_after_s = None
    for detail in details[:16]:
        if isinstance(detail, dict):
            if isinstance(detail.get("reason"), str):
                words.append(detail["reason"][:200])
            retry_after_s = _seconds(detail.get("retryDelay")) if retry_after_s is None else retry_after_s
    words += [str(error[name])[:200] for name in ("status", "code") if isinstance(error.get(name), str | int)]
    kind, temporary = classify(message=fault.message, words=tuple(words), status=fault.status)
    if retry_after_s is not None:
        # Google speaks of the quota and of billing in the message of a limit per minute, too.
        temporary = True
    elif temporary:
        retry_after_s = fault.retry_after_s
    return msgspec.structs.replace(fault, kind=kind, temporary=temporary, retry_after_s=retry_after_s)


def _seconds(duration: Any) -> float | None:
    """Read a google.protobuf.Duration, such as `34.074824224s`."""
    if not isinstance(duration, str) or not re.fullmatch(r"\d{1,9}(\.\d{1,9})?s", duration):
        return None
    return float(duration[:-1])


def _fault(status: int, body: bytes) -> Fault:
    """Read an HTTP error response."""
    fault = http_fault(status, body)
    try:
        value = lenient.loads(body)
    except UnparseableError:
        return fault
    return _with_details(fault, value) or fault


# --- asking ----------------------------------------------------------------------------------------------------------

_PATH: Final = "/models/{model}:streamGenerateContent"
_MODEL: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._@-]{0,199}")


def _prompt(prompt: str, model: str | None) -> Mapping[str, Any]:
    return {"model": named_model(model), "contents": [{"role": "user", "parts": [{"text": prompt}]}]}


def _first(request: Mapping[str, Any], path: str) -> Call:
    """Make the request. `{model}` in the path is the request's `model`, which is no field of the body.

    Raises ConfigurationError for a model that is missing where the path needs it, or is not a plain name.
    """
    body = {name: value for name, value in request.items() if name not in {"model", "stream"}}
    stream = request.get("stream")
    if stream not in (None, True):
        raise ConfigurationError("request.stream", stream, "true, or nothing: a supervised stream is one")
    if "{model}" in path:
        model = request.get("model")
        plain = model.removeprefix("models/") if isinstance(model, str) else ""
        if not _MODEL.fullmatch(plain):
            raise ConfigurationError(
                "request.model", model, "the plain name of a model, such as gemini-2.5-flash"
            )
        path = path.replace("{model}", plain)
    return Call(path=path, body=body)


_ENDINGS: Final = Endings(
    well="a finish reason for every candidate seen, and then the end of the body: there is no end marker",
    incomplete={
        "MAX_TOKENS": "the limit of tokens was reached",
        "SAFETY": "the safety filter cut the answer off",
        "RECITATION": "the answer repeated a source too closely and was cut off",
        "LANGUAGE": "the answer turned to a language that is not supported",
        "BLOCKLIST": "a forbidden term cut the answer off",
        "PROHIBITED_CONTENT": "the filter for prohibited content cut the answer off",
        "SPII": "the filter for personal data cut the answer off",
        "IMAGE_SAFETY": "the safety filter kept an image back",
        "MALFORMED_FUNCTION_CALL": "the model wrote a function call that could not be read",
        "UNEXPECTED_TOOL_CALL": "the model called a tool that was not offered",
        "TOO_MANY_TOOL_CALLS": "the model called tools too often",
        "OTHER": "another reason that the provider does not name",
    },
    errors=(
        "an object with an `error`, or an array with one",
        "an object that calls itself an error, or is only a message, where an event should be",
        "a `promptFeedback.blockReason` without candidates: the prompt was refused (kind `content_filter`)",
    ),
)
_USAGE_RULE: Final = (
    "`usageMetadata` on any chunk is a running total, and the last counts; the tokens of thoughts are not in `output`, but "
    "in `reasoning` only"
)

GEMINI: Final = Dialect(
    name="gemini",
    framing="sse",
    reader=_GeminiReader,
    fault=_fault,
    endings=_ENDINGS,
    asking=Asking(path=f"{_PATH}?alt=sse", key_header="x-goog-api-key", prompt=_prompt, first=_first),
    stop="drain",
    usage_rule=_USAGE_RULE,
)
GEMINI_JSONARRAY: Final = attrs.evolve(
    GEMINI,
    name="gemini-jsonarray",
    framing="json-array",
    asking=Asking(path=_PATH, key_header="x-goog-api-key", prompt=_prompt, first=_first),
)
