"""The words in which every provider's stream is told, and the protocol of what reads it.

A dialect turns one wire event into deltas. It never decides how the stream ends; it says what the event *means*
(`Delta.finish_reason`, `Delta.terminal`, `Delta.fault`) and, at the end of the body, whether what was seen is an ended
answer (`Reader.ending`). The deciding is `seal`'s, in `supervisor.streams.lifecycle`.
"""

from __future__ import annotations

from typing import Literal, Protocol

import attrs
import msgspec

__all__ = [
    "Choice",
    "Delta",
    "Fault",
    "FaultKind",
    "Reader",
    "Snapshot",
    "ToolCall",
    "ToolCallDelta",
    "UnparseableError",
    "Usage",
]

FaultKind = Literal[
    "rate_limit",
    "overloaded",
    "auth",
    "invalid_request",
    "context_length",
    "content_filter",
    "server",
    "timeout",
    "network",
    "truncated",
    "protocol",
]


class UnparseableError(ValueError):
    """One wire event could not be read by the dialect. The stream goes on, up to its limit of such events."""


class Usage(msgspec.Struct, frozen=True, gc=False, omit_defaults=True):
    """Tokens as the provider counted them. None: not stated."""

    input: int | None = None
    output: int | None = None
    reasoning: int | None = None
    cached: int | None = None

    def plus(self, other: Usage | None) -> Usage:
        """Return what two requests used together; what only one of them stated counts."""
        if other is None:
            return self
        return Usage(
            _sum(self.input, other.input),
            _sum(self.output, other.output),
            _sum(self.reasoning, other.reasoning),
            _sum(self.cached, other.cached),
        )


def _sum(one: int | None, other: int | None) -> int | None:
    return other if one is None else one if other is None else one + other


class Fault(msgspec.Struct, frozen=True, gc=False, omit_defaults=True):
    """What went wrong, in the provider's own words where it gave any."""

    kind: FaultKind
    message: str
    code: str | None = None
    """The provider's own code or type, as text."""
    status: int | None = None
    """The HTTP status, when the fault came as one."""
    temporary: bool = False
    retry_after_s: float | None = None


class ToolCallDelta(msgspec.Struct, frozen=True, gc=False, omit_defaults=True):
    """A piece of a tool call. `index` is the call's ordinal within its choice, already made unambiguous."""

    index: int
    id: str = ""
    name: str = ""
    arguments: str = ""


class Delta(msgspec.Struct, frozen=True, omit_defaults=True, gc=False):
    """What one wire event adds to one choice of the answer."""

    text: str = ""
    reasoning: str = ""
    refusal: str = ""
    tool_calls: tuple[ToolCallDelta, ...] = ()
    choice: int = 0
    finish_reason: str | None = None
    usage: Usage | None = None
    model: str | None = None
    response_id: str | None = None
    terminal: bool = False
    """The dialect's unconditional end marker (such as `[DONE]`): nothing that follows belongs to the answer."""
    fault: Fault | None = None
    """The provider reports an error inside the stream."""
    restated: bool = False
    """The event tells again what others may have told in pieces: only those before it say whether its text is new."""


@attrs.frozen
class ToolCall:
    """One tool call of the answer, its arguments joined."""

    id: str
    name: str
    arguments: str


@attrs.frozen
class Choice:
    """One of the answers asked for with `n`."""

    index: int
    text: str
    reasoning: str
    refusal: str
    tool_calls: tuple[ToolCall, ...]
    finish_reason: str | None


@attrs.frozen
class Snapshot:
    """The fold of a journal up to `(epoch, seq)`.

    `text`, `reasoning`, `refusal`, `tool_calls` and `finish_reason` are those of choice 0; `choices` has them all, in
    order of index.
    """

    text: str = ""
    reasoning: str = ""
    refusal: str = ""
    tool_calls: tuple[ToolCall, ...] = ()
    finish_reason: str | None = None
    choices: tuple[Choice, ...] = ()
    usage: Usage | None = None
    model: str | None = None
    response_id: str | None = None
    epoch: int = 1
    seq: int = 0
    joined_at: tuple[int, ...] = ()
    """Where in `text` (in characters) another attempt went on from what the one before it had left."""


class Reader(Protocol):
    """Reads the events of one response body. One per attempt; it may keep state between events."""

    def read(self, data: bytes, event: str = "message") -> tuple[Delta, ...]:
        """Say what one wire event means; `()` for nothing.

        Raises UnparseableError when the event cannot be read; the reader stays usable.
        """
        ...

    def ending(self) -> str | None:
        """Return the completed reason if the answer has ended as far as the events so far say, else None.

        Asked when the body ends, the connection is lost or a clock runs out: None makes that a truncation.
        """
        ...
