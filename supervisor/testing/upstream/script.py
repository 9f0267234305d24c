"""What a simulated upstream does with one request, as data.

A `Script` is a frozen description, the same for every provider's shape: how many words, at what pace, and what goes wrong
where. `plan` (in `plan.py`) turns it into steps, in the shape that the request's path asks for.

A script can be written as a model name, so that a program that only lets its user choose a model can choose a fault:
`sim/<name>?<field>=<value>&…`, where `<name>` is one of `PRESETS`, a fault, or an HTTP status, and the fields are those
of `Script`: `sim/stall?after=3`, `sim/429?times=2&retry_after=1`, `sim/paced?tokens=200&interval_s=0.02`.

`after` counts events of text, and what opens the answer travels with the first of them: `after=0` strikes after the head
and before any event. `at_event` counts all events instead: those that open the answer, the text, and those that close it.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping
from typing import Any, Literal, get_args
from urllib.parse import parse_qsl

import attrs
import msgspec

from supervisor.errors import ConfigurationError

__all__ = [
    "CYCLE",
    "PRESETS",
    "ErrorShape",
    "FaultName",
    "Script",
    "script_for_model",
    "word",
    "words",
]

FaultName = Literal[
    "bad-chunk",
    "bad-json",
    "drop",
    "drop-head",
    "end",
    "error",
    "error-after-finish",
    "extra-after-done",
    "garbage-head",
    "hang-after-finish",
    "huge-head",
    "oversized",
    "reset",
    "reset-head",
    "silent",
    "stall",
]
"""`bad-chunk`: break the chunked framing. `drop`: close in the middle of an event. `end`: end the body well after `after` events, with no marker. `drop-head`,
`reset-head`: close or reset instead of answering. `silent`: never answer. `hang-after-finish`: no `[DONE]`, no end."""

ErrorShape = Literal["data", "event", "chunk", "field", "bare", "string", "flat"]
"""How an error inside a stream is told. `data`: in the provider's own way, and `chunk`, `event`: in its other ways, if it
has any (OpenAI's chat: a `data:` object, a chunk with `finish_reason: "error"`, an `event: error`). The others are what
servers that imitate a provider do: an SSE *field* named `error`, a line of bare JSON, a string, or no envelope."""

CYCLE = 1024
"""The numbered words repeat after this many, so that a flood is sent from prebuilt bytes."""


@attrs.frozen(kw_only=True)
class Script:
    """What one request gets. Times are in seconds; the defaults are a well-formed answer of eight words, at once."""

    tokens: int | None = 8
    """How many numbered words to send when `text` is None; None: endless, until the client closes."""
    text: str | None = None
    """The answer, sent a word an event."""
    reasoning: str | None = None
    """What is thought before the answer, where the provider has a place for it; sent with the first word."""
    tool: str | None = None
    """The name of a tool that is called after the text."""
    tool_arguments: str = '{"city": "Paris"}'
    """The JSON of its arguments, sent in pieces where the provider does that."""
    interval_s: float = 0.0
    """The pace: one write (`events_per_write` events) each interval. 0: as fast as the client reads."""
    head_after_s: float = 0.0
    first_after_s: float = 0.0
    """The silence between the head and the first event."""
    events_per_write: int = 1
    role: bool = True
    """Whether the first token is preceded by the chunk that names the role (OpenAI's chat)."""
    usage: bool = True
    """Whether the usage is told."""
    finish_reason: str | None = "stop"
    """In OpenAI's words, which are told in the provider's; any other is told as it is."""
    done: bool = True
    """Whether the answer's end marker is sent: `[DONE]`, or the event that is it."""
    framing: Literal["chunked", "content-length", "until-close"] = "chunked"
    chunk_bytes: int = 0
    """The size of chunks, cut without regard to events; 0: one chunk an event."""
    keep_alive: bool = True
    comment_every: int = 0
    """A comment line before each so many events; 0: none."""
    heartbeat_s: float = 0.0
    """While stalled, a comment each so many seconds; 0: silence."""
    newline: Literal["lf", "crlf", "cr"] = "lf"
    trickle_bytes: int = 0
    """Write so many bytes at a time, head included; 0: whole writes."""
    trickle_interval_s: float = 0.0
    fault: FaultName | None = None
    after: int = 3
    """How many words are sent before the fault."""
    at_event: int | None = None
    """In place of `after`: how many events of any kind are sent before the fault."""
    times: int | None = None
    """How many requests with this script get the fault or the status; later ones are answered well. None: all."""
    size_bytes: int = 8 << 20
    """The size of an oversized event or a huge head."""
    error_shape: ErrorShape = "data"
    status: int = 200
    message: str | None = None
    """The provider's message in an error."""
    code: str | None = None
    retry_after: str | None = None
    retry_after_ms: str | None = None
    location: str | None = None
    echo_credential: bool = False
    """Whether the error message repeats the credential of the request, as some providers do."""
    content_type: str | None = None
    """None: the provider's own."""
    headers: tuple[tuple[str, str], ...] = ()
    body: bytes | None = None
    """Sent as it is in place of events; `drop`, `reset` and `stall` strike after it."""
    beginning: Literal["continue", "ignore", "refuse"] = "continue"
    """What becomes of a text that the request gives for the beginning of the answer: the answer goes on after it, or
    starts anew, or is refused with a 400."""
    runs_on: bool = False
    """Whether the answer is generated, and billed, to its end although the client has gone."""
    expires_s: float | None = None
    """When a stored response is forgotten, after it was made; None: not."""
    retry_ms: int | None = None
    """The `retry:` field of an event stream with ids."""
    key: str = ""
    """Ignored; tells apart scripts that are counted separately by `times`."""

    def __attrs_post_init__(self) -> None:
        for field in ("events_per_write",):
            if getattr(self, field) < 1:
                raise ConfigurationError(field, getattr(self, field), "an integer of at least 1")
        for field in (
            "interval_s",
            "head_after_s",
            "first_after_s",
            "after",
            "heartbeat_s",
            "trickle_interval_s",
            "at_event",
            "expires_s",
            "retry_ms",
        ):
            if (getattr(self, field) or 0) < 0:
                raise ConfigurationError(field, getattr(self, field), "a number that is not negative")
        if not 100 <= self.status <= 599:
            raise ConfigurationError("status", self.status, "an HTTP status")
        if self.framing == "content-length" and self.tokens is None and self.text is None:
            raise ConfigurationError("framing", self.framing, "another framing for an endless answer")

    @property
    def pieces(self) -> int | None:
        """How many events of text a well-formed answer has; None: endless."""
        return self.tokens if self.text is None else len(words(self.text))

    def expected_text(self, events: int | None = None) -> str:
        """Return the text of the first `events` words, or of the whole answer."""
        if self.text is not None:
            return "".join(words(self.text)[:events])
        count = self.tokens if events is None else events if self.tokens is None else min(events, self.tokens)
        if count is None:
            raise ConfigurationError("events", events, "a number, as the answer is endless")
        return "".join(word(self, i) for i in range(count))

    def well(self) -> Script:
        """Return the same answer without its fault."""
        return attrs.evolve(
            self, fault=None, status=200, times=None, retry_after=None, retry_after_ms=None, body=None,
            content_type=None, location=None, head_after_s=0.0,
        )  # fmt: skip


PRESETS: Mapping[str, Mapping[str, Any]] = {
    "ok": {},
    "paced": {"tokens": 100, "interval_s": 0.02},
    "flood": {"tokens": 100_000, "events_per_write": 64},
    "endless": {"tokens": None, "interval_s": 0.02},
    "trickle": {"trickle_bytes": 1},
    "no-marker": {"finish_reason": None, "done": False, "usage": False},
    "no-done": {"done": False},
    "json": {"content_type": "application/json"},
}
"""Names for `sim/<name>` beside the faults and the HTTP statuses."""


@functools.cache
def _field_types() -> dict[str, Any]:
    attrs.resolve_types(Script)
    return {f.name: f.type for f in attrs.fields(Script) if f.name not in {"headers", "body"}}


@functools.lru_cache(maxsize=4096)
def script_for_model(model: str) -> Script | None:
    """Read a script from a model name. None if the name does not begin with `sim/`.

    Raises ConfigurationError naming what is not understood.
    """
    scheme, slash, rest = model.partition("/")
    if scheme != "sim" or not slash:
        return None
    name, _, query = rest.partition("?")
    fields: dict[str, Any] = {}
    if name in PRESETS:
        fields.update(PRESETS[name])
    elif name in get_args(FaultName):
        fields["fault"] = name
    elif name.isascii() and name.isdecimal():
        fields["status"] = int(name)
    else:
        raise ConfigurationError(
            "model", model, f"sim/ and one of {', '.join([*PRESETS, *get_args(FaultName)])} or a status"
        )
    types = _field_types()
    for field, value in parse_qsl(query, keep_blank_values=True):
        if field not in types:
            raise ConfigurationError(f"model field {field}", value, f"one of {', '.join(types)}")
        try:
            fields[field] = (
                value if types[field] is str else msgspec.convert(value, types[field], strict=False)
            )
        except msgspec.ValidationError as exc:
            expected = str(exc).partition(", got")[0].removeprefix("Expected ").replace("`", "")
            raise ConfigurationError(f"model field {field}", value, f"a value of type {expected}") from None
    return Script(**fields)


@functools.lru_cache(maxsize=256)
def words(text: str) -> list[str]:
    """Cut a text into the pieces in which it is sent; joined, they are the text."""
    return re.findall(r"\S+\s*|\s+", text)


def word(script: Script, i: int) -> str:
    """Return the piece of an answer's text with this number, from 0."""
    return f"w{i % CYCLE} " if script.text is None else words(script.text)[i]
