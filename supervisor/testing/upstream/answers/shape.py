"""What an answer is, whoever tells it, and what a provider's shape of telling it consists of.

A `Shape` is data and pure functions: which events open an answer, carry one word of it and close it, and how an error is
told. It knows nothing of sockets, pauses or faults: those are `plan`'s, which treats every shape alike.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal

import attrs
import msgspec

from supervisor.errors import ConfigurationError
from supervisor.testing.upstream.script import Script, word, words

__all__ = ["CREATED", "MODEL", "Answer", "Event", "Failure", "Framing", "Shape", "frame", "json"]

Framing = Literal["sse", "ndjson", "json-array"]

MODEL = "sim-1"
CREATED = 1_700_000_000
INPUT_TOKENS = 7

_ARGUMENT_CHARS = 8
json = msgspec.json.encode


@attrs.frozen
class Event:
    """One event of an answer, not yet framed."""

    data: bytes
    name: str = ""
    id: str = ""
    kind: Literal["", "token", "finish", "usage", "marker"] = ""
    """What it is to the answer. An event that is several of these is called by the last of them."""
    retry_ms: int | None = None


@attrs.frozen(kw_only=True)
class Failure:
    """An error to be told."""

    message: str
    code: str | None = None
    status: int = 500


@attrs.frozen(kw_only=True)
class Answer:
    """What is told of a script's text: all of it, or what follows a text that the request gave as its beginning."""

    script: Script
    number: int = 1
    """Tells apart answers that have an id of their own."""
    start: int = 0
    """How many whole words the request gave."""
    lead: str = ""
    """The rest of the word that it broke off in; told as an event of its own."""
    background: bool = False

    @property
    def count(self) -> int | None:
        """How many events of text there are; None: endless."""
        total = self.script.pieces
        return None if total is None else max(0, total - self.start) + bool(self.lead)

    def piece(self, i: int) -> str:
        """Return the text of the event of text with this number, from 0."""
        if self.lead:
            if i == 0:
                return self.lead
            i -= 1
        return word(self.script, self.start + i)

    @functools.cached_property
    def text(self) -> str:
        """All that is told. Raises ConfigurationError for an endless answer."""
        if (count := self.count) is None:
            raise ConfigurationError("tokens", None, "a number, as an endless answer has no whole")
        return "".join(map(self.piece, range(count)))

    @property
    def reasoning(self) -> tuple[str, ...]:
        """The events of reasoning that precede the text; none in an answer that goes on."""
        return tuple(words(self.script.reasoning)) if self.script.reasoning and not self._goes_on else ()

    @property
    def arguments(self) -> tuple[str, ...]:
        """The pieces of the tool call's arguments; none if no tool is called."""
        whole = self.script.tool_arguments if self.script.tool else ""
        return tuple(whole[at : at + _ARGUMENT_CHARS] for at in range(0, len(whole), _ARGUMENT_CHARS))

    @property
    def finish(self) -> str | None:
        """The finish reason in OpenAI's words."""
        said = self.script.finish_reason
        return "tool_calls" if said == "stop" and self.script.tool else said

    @property
    def input_tokens(self) -> int:
        """What was read: the prompt and the words that the request gave."""
        return INPUT_TOKENS + self.start

    @property
    def output_tokens(self) -> int:
        """What is told, reasoning included; each piece counts for one."""
        return (self.count or 0) + len(self.reasoning)

    @property
    def _goes_on(self) -> bool:
        return bool(self.start or self.lead)


@attrs.frozen(kw_only=True, eq=False)
class Shape:
    """How one provider tells an answer."""

    name: str
    """The dialect's name."""
    content_type: str = "text/event-stream"
    framing: Framing = "sse"
    opening: Callable[[Answer], Iterable[Event]]
    """What precedes the text. It travels with the first word."""
    token: Callable[[Answer, int, str], Event]
    """One piece of the text, as the event with this number, from 0."""
    closing: Callable[[Answer, int], Iterable[Event]]
    """What follows the text, the first of it being the event with this number."""
    whole: Callable[[Answer], Mapping[str, Any]]
    """The answer as one JSON object."""
    error: Callable[[Failure, int], Event]
    """An error inside the stream, in the provider's own shape."""
    other_errors: Mapping[str, Callable[[Failure, int], Event]] = attrs.field(factory=dict)
    """The other ways in which it tells one, by `ErrorShape`."""
    envelope: Callable[[Failure], Mapping[str, Any]]
    """The JSON body of an HTTP error."""
    broken: bytes
    """The beginning of an event's JSON that breaks off."""
    prefix: Callable[[Mapping[str, Any]], str | None] | None = None
    """The text that the request gives for the beginning of the answer, if it gives one."""
    prompt: Callable[[Mapping[str, Any]], str | None] | None = None
    """In place of `prefix`, where the prompt is one text and the answer's beginning is the end of it."""
    refusal: str = (
        "The last message must be from the user: this model does not go on with an answer that was begun."
    )
    """The message of the 400 that refuses a beginning."""
    space_refusal: str | None = None
    """The message of the 400 that refuses a beginning that ends in white space; None: it does not matter."""
    numbered: bool = False
    """Whether events bear their number, so that no two are alike."""
    beat: bytes = b": keep-alive\n\n"
    """What is sent to keep a silent connection open."""


def frame(framing: Framing, event: Event, at: int) -> bytes:
    """Return the bytes of the event with this number, from 0."""
    if framing == "ndjson":
        return event.data + b"\n"
    if framing == "json-array":
        if event.kind == "marker":
            return b"\n]" if at else b"[]"
        return (b",\r\n" if at else b"[") + event.data
    lines = [b"data: " + line for line in event.data.split(b"\n")]
    if event.name:
        lines.insert(0, b"event: " + event.name.encode())
    if event.id:
        lines.insert(0, b"id: " + event.id.encode())
    if event.retry_ms is not None:
        lines.insert(0, b"retry: %d" % event.retry_ms)
    return b"\n".join(lines) + b"\n\n"
