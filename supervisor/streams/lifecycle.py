"""How a stream lives and ends: states and transitions as data, and the seal.

Two rules. Everything that affects a stream's state is in this file, and this file knows nothing else: no clock, no task,
no journal. The transitions are a table (`TRANSITIONS`), and the diagram in the documentation is generated from it.

**The seal.** Completion and abort race by nature: the terminal marker arrives in the same instant as somebody presses
Stop. There is no way to order them but to let one be first, so the ending is decided by a single synchronous function,
`Lifecycle.seal`, with no await inside: in a cooperative scheduler that makes it atomic. The first caller's verdict stands,
every later one is told that it lost, and nobody ever works out an ending from anything else: not from
`CancelScope.cancel_called` (true also when the answer had completed already) nor from `cancelled_caught` (false when the
task finished before it could be interrupted).

**Settling.** A sealed stream still has to close its wire and make its outcome durable. Until that is done nobody may be
shown how it ended, for a crash could take it back; so what is visible between the seal and `announce` is `stopping`.
Prior art: Erlang's monitors deliver exactly one DOWN message for the same reason; a future's first-writer-wins `set_result`
has the rule but not the durability.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping
from types import MappingProxyType

import attrs
import msgspec

from supervisor.dialects import Fault, Usage
from supervisor.errors import ConfigurationError

__all__ = [
    "LIVE_STATES",
    "REASONS",
    "TERMINAL_STATES",
    "TRANSITIONS",
    "Lifecycle",
    "Outcome",
    "State",
    "UsageQuality",
    "Verdict",
]


class State(enum.StrEnum):
    """Where a stream is. The last four are terminal."""

    PENDING = "pending"
    CONNECTING = "connecting"
    STREAMING = "streaming"
    STOPPING = "stopping"
    COMPLETED = "completed"
    FAILED = "failed"
    CANCELLED = "cancelled"
    EXPIRED = "expired"


TERMINAL_STATES = frozenset({State.COMPLETED, State.FAILED, State.CANCELLED, State.EXPIRED})
LIVE_STATES = frozenset(State) - TERMINAL_STATES

TRANSITIONS: Mapping[State, frozenset[State]] = MappingProxyType(
    {
        State.PENDING: frozenset({State.CONNECTING, State.STOPPING}) | TERMINAL_STATES,
        # connecting → connecting is a further attempt; streaming → connecting one after events were received.
        State.CONNECTING: frozenset({State.CONNECTING, State.STREAMING, State.STOPPING}) | TERMINAL_STATES,
        State.STREAMING: frozenset({State.CONNECTING, State.STOPPING}) | TERMINAL_STATES,
        State.STOPPING: TERMINAL_STATES,
        State.COMPLETED: frozenset(),
        State.FAILED: frozenset(),
        State.CANCELLED: frozenset(),
        State.EXPIRED: frozenset(),
    }
)

REASONS: Mapping[State, frozenset[str] | None] = MappingProxyType(
    {
        State.COMPLETED: None,  # open: the provider's finish reason, or "done" where it gave none
        State.FAILED: frozenset(
            {
                "connect",
                "http_status",
                "provider_error",
                "truncated",
                "protocol",
                "interrupted",
                "source_error",
            }
        ),
        State.CANCELLED: frozenset({"requested", "replaced", "detached", "shutdown"}),
        State.EXPIRED: frozenset(
            {
                "connect",
                "first_event",
                "idle",
                "total",
                "reaped_age",
                "reaped_stale",
                "reaped_count",
                "reaped_bytes",
                "reaped_pressure",
            }
        ),
    }
)

MAX_REASON_CHARS = 64
MAX_MESSAGE_CHARS = 2000
MAX_ACTOR_CHARS = 256

UsageQuality = str
"""`exact`: the provider's final figure of a completed answer, and of all that was asked for it; `provider_partial`: its latest before
the end, or without what earlier attempts took; `estimated`: the output alone, from its length; `unknown`."""


def _storable_text(field: str, value: object, limit: int) -> str:
    """Return text that can be stored and shown: cut to `limit` characters, without lone surrogates."""
    if not isinstance(value, str):
        raise ConfigurationError(field, value, f"a string of at most {limit} characters")
    cut = value if len(value) <= limit else f"{value[: limit - 1]}…"
    return cut if cut.isascii() else cut.encode("utf-8", "replace").decode()


def _reason(value: str) -> str:
    return _storable_text("reason", value, MAX_REASON_CHARS)


def _actor(value: str | None) -> str | None:
    return None if value is None else _storable_text("actor", value, MAX_ACTOR_CHARS)


def _message(value: str) -> str:
    return _storable_text("message", value, MAX_MESSAGE_CHARS)


def _storable(fault: Fault | None) -> Fault | None:
    if fault is None:
        return None
    if not isinstance(fault, Fault):
        raise ConfigurationError("fault", fault, "a Fault, or None")
    code = None if fault.code is None else _storable_text("code", fault.code, MAX_ACTOR_CHARS)
    return msgspec.structs.replace(fault, message=_message(fault.message), code=code)


@attrs.frozen(kw_only=True)
class Verdict:
    """How a stream is to end, as the one who wants to end it says.

    Texts are cut to a bounded length. Raises ConfigurationError for what is no text, and ValueError for a reason that does
    not belong to the state: nothing gets into an outcome that could not be read back from a store.
    """

    state: State
    reason: str = attrs.field(converter=_reason)
    actor: str | None = attrs.field(default=None, converter=_actor)
    """Who asked, where somebody did: a client's name, `parent`, `memory`, another stream's id."""
    message: str = attrs.field(default="", converter=_message)
    fault: Fault | None = attrs.field(default=None, converter=_storable)

    def __attrs_post_init__(self) -> None:
        if self.state not in TERMINAL_STATES:
            raise ValueError(f"a verdict needs a terminal state, not {self.state}")
        allowed = REASONS[self.state]
        if allowed is not None and self.reason not in allowed:
            raise ValueError(f"{self.reason!r} is not a reason of {self.state}; one of {sorted(allowed)} is")


class Lifecycle:
    """The state of one stream."""

    __slots__ = ("_announced", "_state", "_verdict", "sealed")

    def __init__(self) -> None:
        self.sealed = False
        """Whether the ending is decided; only `seal` sets it. A plain attribute, as every event asks."""
        self._state = State.PENDING
        self._verdict: Verdict | None = None
        self._announced = False

    def __repr__(self) -> str:
        return f"<Lifecycle {self.visible}{' (sealed)' if self._verdict is not None else ''}>"

    @property
    def verdict(self) -> Verdict | None:
        """The verdict that sealed the stream, or None. For the stream's own machinery: it may not be durable yet."""
        return self._verdict

    @property
    def announced(self) -> bool:
        """Whether the ending may be shown."""
        return self._announced

    @property
    def visible(self) -> State:
        """The state as anybody outside may see it."""
        if self._verdict is None:
            return self._state
        return self._verdict.state if self._announced else State.STOPPING

    def advance(self, state: State) -> bool:
        """Go on to a state that is not terminal. False, and nothing done, if sealed or if the table has no such step."""
        if self._verdict is not None or state not in TRANSITIONS[self._state] or state in TERMINAL_STATES:
            return False
        self._state = state
        return True

    def seal(self, verdict: Verdict) -> bool:
        """Decide how the stream ends. True if this call decided it; False if it had been decided before."""
        if self._verdict is not None:
            return False
        self._verdict = verdict
        self.sealed = True
        return True

    def announce(self) -> None:
        """Make the ending visible: its outcome is durable."""
        if self._verdict is None:
            raise RuntimeError("a stream can only be announced once it is sealed")
        self._announced = True


@attrs.frozen(kw_only=True)
class Outcome:
    """The terminal record of a stream. Written once, last in the journal, durable before anybody sees it."""

    id: str
    key: str | None
    state: State
    reason: str
    actor: str | None = None
    message: str = ""
    fault: Fault | None = None
    usage: Usage | None = None
    usage_quality: UsageQuality = "unknown"
    attempts: int = 0
    events: int = 0
    """Upstream payloads in the journal."""
    skipped: int = 0
    """Upstream payloads that could not be read."""
    epoch: int = 1
    last_seq: int
    """The seq of the outcome itself: nothing follows it."""
    epoch_starts: tuple[tuple[int, int], ...] = ((1, 1),)
    """For each epoch of the journal, the first seq that belongs to it."""
    started_at: float
    """Seconds since the Unix epoch."""
    ended_at: float
    """When the stream was sealed, in seconds since the Unix epoch."""
    events_unread: int = 0
    """Of `events`, those that arrived after the last reader had left: all if there was none, 0 if one was there at the end (and after
    a crash, when it is not known)."""
    rungs: tuple[str, ...] = ()
    """How each attempt after the first went on from the one before it."""
    joined_at: tuple[int, ...] = ()
    """Where in the text of choice 0, in characters, an attempt's text was joined to what was received before it."""
    cleanup_error: str | None = None
    """What the source raised after the seal, if it did. It changes nothing about the ending."""

    @property
    def duration_s(self) -> float:
        """From start to seal, in seconds."""
        return self.ended_at - self.started_at

    def to_json(self) -> bytes:
        """Return the outcome as the JSON object that journals and replies carry."""
        return msgspec.json.encode(self)

    @classmethod
    def from_json(cls, data: bytes) -> Outcome:
        """Read back what `to_json` wrote. Raises msgspec.ValidationError for anything else."""
        return _DECODER.decode(data)


_DECODER = msgspec.json.Decoder(Outcome)
