"""What the chunks of OpenAI's two completion APIs have in common, and the state of the answer that they add to.

Chat and legacy completions send the same envelope (`id`, `model`, `choices`, `usage`, an `error` in its place) with another
body in each choice. A dialect decodes that body into `Part`s, the typed way or the tolerant one; from there on it is the
same: which choices there are, which tool call a piece belongs to, what has ended, what was told before. Nothing of the
state changes before the whole event has been read.
"""

from __future__ import annotations

from typing import Any, Final, NamedTuple

import msgspec

from supervisor.dialects import lenient
from supervisor.dialects.base import Delta, Fault, UnparseableError, Usage
from supervisor.dialects.faults import error_fault, find_fault, flat_fault, shown
from supervisor.dialects.tool_calls import MAX_CALLS, CallBudget, CallPiece, CallSorter

__all__ = [
    "MAX_CHOICES",
    "MAX_LABEL_CHARS",
    "ODD_FINISHES",
    "ChunkReader",
    "Part",
    "choices_of",
    "finish_of",
    "usage_of",
]

MAX_CHOICES = 1024
"""Choice indexes from this on are refused (the event is unparseable)."""
MAX_CALL_INDEX = (1 << 53) - 1
"""The largest index of a tool call, of either sign; an event with a larger one is unparseable."""
MAX_LABEL_CHARS = 256
"""What is kept of a finish reason. A longer name of the model or id of the response is none."""

_IGNORED_EVENTS: Final = frozenset({"ping", "keepalive", "keep-alive", "heartbeat"})
_FAILED_FINISHES: Final = frozenset({"abort", "error", "insufficient_system_resource"})
ODD_FINISHES: Final = _FAILED_FINISHES | {"null"}
"""Finish reasons that are not reasons: errors, and an odd way to say none. The tolerant way knows what they mean."""


class Part(NamedTuple):
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


class ChunkReader:
    """The state of one response, and what reads the events that are alike. A dialect adds `read` and `part`."""

    __slots__ = ("_budget", "_choices", "_first", "_model", "_open", "_response_id", "_terminal")

    def __init__(self) -> None:
        self._choices: dict[int, _Choice] = {}
        self._budget = CallBudget()
        self._open = 0
        self._first: _Choice | None = None
        """Choice 0, once it was streamed, and the model is known or will not be: from then on the shortest way is open."""
        self._model: str | None = None
        self._response_id: str | None = None
        self._terminal = False

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

    def read_named(self, data: bytes, event: str) -> tuple[Delta, ...] | None:
        """Read an event by its name alone; None if the name says nothing."""
        if event in _IGNORED_EVENTS:
            return ()
        if event != "error":
            return None
        try:
            value = lenient.loads(data)
        except UnparseableError:
            value = shown(data, 2000)
        return (Delta(fault=find_fault(value) or error_fault(value)),)

    def part(self, choice: Any) -> Part:
        """Read one choice of a chunk, as generic JSON. Raises UnparseableError."""
        raise NotImplementedError

    def envelope(self, value: dict[str, Any]) -> dict[str, Any]:
        """Return the chunk that this object is, where it comes in another shape."""
        return value

    def read_tolerant(self, data: bytes) -> tuple[Delta, ...]:
        """Read an event that the typed decoder refused, or in which errors are to be looked for."""
        marker = data.strip(b" \t\r\n\"'")
        if marker == b"[DONE]":
            self._terminal = True
            return (Delta(terminal=True),)
        if not marker:
            return ()
        value = lenient.loads(data)
        if not isinstance(value, dict):
            if (fault := find_fault(value)) is not None:
                return (Delta(fault=fault),)
            raise UnparseableError(f"not a JSON object: {shown(data, 100)}")
        if (fault := _chunk_fault(value)) is not None:
            return (Delta(fault=fault),)
        value = self.envelope(value)
        choices = value.get("choices")
        if choices is None:
            choices = []
        if not isinstance(choices, list):
            raise UnparseableError(f"choices is not a list: {shown(data, 100)}")
        parts = [self.part(choice) for choice in choices]
        usage = usage_of(value.get("usage"))
        x_groq = value.get("x_groq")
        if usage is None and isinstance(x_groq, dict):
            usage = usage_of(x_groq.get("usage"))
        if usage is None:
            usage = next(filter(None, (usage_of(choice.get("usage")) for choice in choices)), None)
        model, response_id = value.get("model"), value.get("id")
        deltas = self.take(
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

    def take(
        self, parts: list[Part], usage: Usage | None, model: str | None, response_id: str | None
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
                choice.streamed |= bool(part.text or part.reasoning or part.refusal or part.pieces)
            elif choice.streamed:
                # The whole answer repeated after its pieces: only how it ended is new.
                part = Part(part.choice, finish_reason=part.finish_reason)  # noqa: PLW2901 - the part as it counts
            calls = tuple(filter(None, map(choice.calls.take, part.pieces))) if part.pieces else ()
            if part.choice == 0 and choice.streamed and (self._model is not None or part.text):
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

    def _check(self, parts: list[Part]) -> None:
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


def _chunk_fault(value: dict[str, Any]) -> Fault | None:
    """Return the error that a chunk carries, wherever it carries it."""
    choices = value.get("choices")
    if not choices:
        if (fault := find_fault(value) or flat_fault(value)) is not None:
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


class _Asked(msgspec.Struct, gc=False):
    n: int | None = None
    prompt: msgspec.Raw = msgspec.Raw(b"")
    """Of legacy completions, which answer each prompt of a list."""


_decode_asked = msgspec.json.Decoder(_Asked).decode


def choices_of(request: bytes) -> int:
    """Return how many choices a request asks for."""
    try:
        asked = _decode_asked(request)
        prompts = msgspec.json.decode(asked.prompt) if bytes(asked.prompt).startswith(b"[") else []
    except (ValueError, RecursionError):
        return 1  # it is the provider's to refuse
    tokens = bool(prompts) and isinstance(prompts[0], int)
    return max(1, asked.n or 1) * (1 if tokens else max(1, len(prompts)))


def finish_of(value: Any) -> str | None:
    """Return a finish reason given as a string or in an object; None for none. Raises UnparseableError."""
    if isinstance(value, dict):
        value = value.get("type") or value.get("reason")
    if value is None or value is False:
        return None
    if not isinstance(value, str):
        raise UnparseableError(f"finish_reason is a {type(value).__name__}")
    return None if value in {"", "null"} else value


def usage_of(value: Any) -> Usage | None:
    """Return a usage as stated; None if nothing is stated."""
    if not isinstance(value, dict):
        return None
    prompt = value.get("prompt_tokens_details")
    completion = value.get("completion_tokens_details")
    spent = (
        lenient.first_count(value, "prompt_tokens", "input_tokens"),
        lenient.first_count(value, "completion_tokens", "output_tokens"),
    )
    if spent == (None, None):
        return None
    reasoning = lenient.count(completion.get("reasoning_tokens")) if isinstance(completion, dict) else None
    cached = lenient.count(prompt.get("cached_tokens")) if isinstance(prompt, dict) else None
    return Usage(
        spent[0],
        spent[1],
        lenient.count(value.get("reasoning_tokens")) if reasoning is None else reasoning,
        lenient.first_count(value, "prompt_cache_hit_tokens", "cached_tokens") if cached is None else cached,
    )
