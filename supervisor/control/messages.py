"""The control channel's messages: the typed parameters and results of every method, and the notifications.

Everything a client can say or hear is a type in this file; the reference in the docs is generated from it
(`supervisor.control.reference`), the session decodes with it and the client library encodes with it. Two rules:

- What a client sends is read strictly: an unknown field, a wrong type or a value out of range is refused with the name of
  the field and what would be right. What a client receives may grow fields: readers ignore those they do not know.
- Units are in the names (`_s` seconds, `_bytes`); absolute times are seconds since the Unix epoch.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

import attrs
import msgspec

from supervisor.control.rpc import ErrorMessage
from supervisor.observe import Overview, Trace

__all__ = [
    "CLOSE_CODES",
    "METHODS",
    "NOTIFICATIONS",
    "SUBPROTOCOL",
    "CancelManyResult",
    "CancelParams",
    "CancelResultMessage",
    "CloseCode",
    "CreditParams",
    "CreditResult",
    "CursorMessage",
    "DeadlinesMessage",
    "DrainParams",
    "DrainResult",
    "EventMessage",
    "EventsNotification",
    "FailedNotification",
    "GapNotification",
    "HelloParams",
    "HelloResult",
    "ListParams",
    "ListResult",
    "Method",
    "NoParams",
    "OnDetachMessage",
    "ReapParams",
    "ReapResult",
    "ReapedMessage",
    "RequestCancelParams",
    "RetryMessage",
    "ShutdownParams",
    "ShutdownResult",
    "SnapshotMessage",
    "StartParams",
    "StartResult",
    "StreamMessage",
    "StreamParams",
    "SubscribeParams",
    "SubscribeResult",
    "UnsubscribeParams",
    "UnsubscribeResult",
    "WaitParams",
    "WaitResult",
]

SUBPROTOCOL = "stream-supervisor.v1"
"""The WebSocket subprotocol both sides must name."""


class CloseCode:
    """The codes this server closes a connection with. 4000 to 4499: reconnect; 4500 to 4999: do not."""

    GOING_AWAY = 4000
    STALLED = 4001
    HEARTBEAT = 4002
    OVERLOADED = 4003
    INTERNAL_ERROR = 4004
    PROTOCOL_ERROR = 4500
    UNSUPPORTED_DATA = 4501
    INVALID_TEXT = 4502
    MESSAGE_TOO_BIG = 4503
    FLOODED = 4504


CLOSE_CODES: Mapping[int, str] = {
    CloseCode.GOING_AWAY: "the server is shutting down or restarting",
    CloseCode.STALLED: "the client did not take what was sent to it in time; resume by cursor",
    CloseCode.HEARTBEAT: "the client did not answer a ping in time",
    CloseCode.OVERLOADED: "the server has no room for what this connection is sending; come back later",
    CloseCode.INTERNAL_ERROR: "the server failed in a way it did not expect; streams are not affected",
    CloseCode.PROTOCOL_ERROR: "a frame broke RFC 6455 (unmasked, reserved bits, bad length, bad fragmentation)",
    CloseCode.UNSUPPORTED_DATA: "a binary message; every message is JSON in a text message",
    CloseCode.INVALID_TEXT: "a text message that is not UTF-8",
    CloseCode.MESSAGE_TOO_BIG: "a message above the limit in bytes or in fragments",
    CloseCode.FLOODED: "requests sent on and on without reading the answers",
}

# --- the vocabulary of parameters -------------------------------------------------------------------------------------

Name = Annotated[str, msgspec.Meta(min_length=1, max_length=256)]
Labels = Annotated[
    dict[
        Annotated[str, msgspec.Meta(min_length=1, max_length=64)],
        Annotated[str, msgspec.Meta(max_length=256)],
    ],
    msgspec.Meta(max_length=32),
]
Seconds = Annotated[float, msgspec.Meta(ge=0, le=31_536_000)]
Positive = Annotated[float, msgspec.Meta(gt=0, le=31_536_000)]
Count = Annotated[int, msgspec.Meta(ge=0, le=1_000_000)]
StateName = Literal[
    "pending", "connecting", "streaming", "stopping", "completed", "failed", "cancelled", "expired"
]


class _Params(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True, kw_only=True):
    """The base of everything a client sends."""


class _Result(msgspec.Struct, frozen=True, kw_only=True):
    """The base of everything a server answers; a reader ignores fields it does not know."""


class NoParams(_Params, frozen=True, kw_only=True):
    """No parameters."""


class CursorMessage(_Params, frozen=True, kw_only=True):
    """A position in a journal: the events after it are the ones that follow."""

    epoch: Annotated[int, msgspec.Meta(ge=1)]
    seq: Annotated[int, msgspec.Meta(ge=0)]


class OnDetachMessage(_Params, frozen=True, kw_only=True):
    """What happens when the last reader leaves."""

    mode: Literal["keep", "cancel"] = "keep"
    grace_s: Seconds = 30.0


class DeadlinesMessage(_Params, frozen=True, kw_only=True):
    """The four clocks, in seconds. Null: none. Left out: the upstream's or the server's default."""

    connect_s: Positive | msgspec.UnsetType | None = msgspec.UNSET
    first_event_s: Positive | msgspec.UnsetType | None = msgspec.UNSET
    idle_s: Positive | msgspec.UnsetType | None = msgspec.UNSET
    total_s: Positive | msgspec.UnsetType | None = msgspec.UNSET

    def given(self) -> dict[str, float | None]:
        """Return the clocks that were stated."""
        fields = ("connect_s", "first_event_s", "idle_s", "total_s")
        return {name: value for name in fields if (value := getattr(self, name)) is not msgspec.UNSET}


class RetryMessage(_Params, frozen=True, kw_only=True):
    """How often, and how patiently, attempts are made, and what may be done once an answer has begun."""

    attempts: Annotated[int, msgspec.Meta(ge=1, le=100)] | msgspec.UnsetType = msgspec.UNSET
    wait_initial_s: Seconds | msgspec.UnsetType = msgspec.UNSET
    wait_max_s: Seconds | msgspec.UnsetType = msgspec.UNSET
    resume: (
        Annotated[tuple[Literal["sequence", "continuation", "restart"], ...], msgspec.Meta(max_length=3)]
        | msgspec.UnsetType
    ) = msgspec.UNSET

    def given(self) -> dict[str, Any]:
        """Return the settings that were stated."""
        fields = ("attempts", "wait_initial_s", "wait_max_s", "resume")
        return {name: value for name in fields if (value := getattr(self, name)) is not msgspec.UNSET}


def _one_of(**given: object) -> None:
    if sum(value is not None and value is not False for value in given.values()) != 1:
        raise ValueError(f"give exactly one of: {', '.join(given)}")


class StreamParams(_Params, frozen=True, kw_only=True):
    """Which stream: exactly one of `id` and `key`."""

    id: Name | None = None
    key: Name | None = None

    def __post_init__(self) -> None:
        _one_of(id=self.id, key=self.key)


class HelloParams(_Params, frozen=True, kw_only=True):
    """Who is calling, for the server's log and the `actor` of cancels."""

    client: Annotated[str, msgspec.Meta(max_length=64)] = ""


class HelloResult(_Result, frozen=True, kw_only=True):
    """Who is answering, and the limits of this connection."""

    protocol: str
    server: str
    version: str
    instance: str
    """Random for each run of the server: another value means that it was restarted."""
    methods: tuple[str, ...]
    limits: dict[str, float]


class StartParams(_Params, frozen=True, kw_only=True):
    """A stream to start: exactly one of `request` and `prompt`."""

    upstream: Name
    request: dict[str, Any] | None = None
    """The body for the provider, in the upstream's own dialect."""
    prompt: str | None = None
    """A user's words, of which the server makes the body as the upstream's dialect has it: the shortest that there is."""
    model: Name | None = None
    """The model; it wins over the one in `request`."""
    key: Name | None = None
    on_conflict: Literal["attach", "reject", "replace"] = "attach"
    on_detach: OnDetachMessage = OnDetachMessage()
    deadlines: DeadlinesMessage = DeadlinesMessage()
    retry: RetryMessage = RetryMessage()
    labels: Labels = {}
    tenant: Name | None = None
    """On whose behalf it runs, for limits and figures."""
    delivery: Literal["immediate", "durable"] = "immediate"

    def __post_init__(self) -> None:
        _one_of(request=self.request, prompt=self.prompt)


class StartResult(_Result, frozen=True, kw_only=True):
    """The stream, recorded in the store. `created` is false when an existing stream with the key was joined."""

    id: str
    key: str | None
    epoch: int
    created: bool
    state: str


class ListParams(_Params, frozen=True, kw_only=True):
    """Which streams, newest first. `before` continues after the last id of the page before."""

    states: Annotated[tuple[StateName, ...], msgspec.Meta(max_length=8)] | None = None
    labels: Labels | None = None
    key: Name | None = None
    upstream: Name | None = None
    tenant: Name | None = None
    live: bool | None = None
    before: Name | None = None
    limit: Annotated[int, msgspec.Meta(ge=1, le=500)] = 100


class CancelParams(_Params, frozen=True, kw_only=True):
    """What to cancel: exactly one of `id`, `key`, `labels` (every stream that has them all) and `all`."""

    id: Name | None = None
    key: Name | None = None
    labels: Labels | None = None
    all: bool = False
    reason: Annotated[str, msgspec.Meta(max_length=1024)] = ""
    """Free text for the outcome's message."""
    actor: Annotated[str, msgspec.Meta(max_length=128)] | None = None
    mode: Literal["abort", "drain"] | None = None
    """`abort`: end it at once. `drain`: let the answer end by itself first, within `drain_s` and `drain_tokens`. Null: what the
    stream's dialect does, which is to drain where an abort saves nothing."""
    drain_s: Seconds = 10.0
    """How long a drain may take."""
    drain_tokens: Annotated[int, msgspec.Meta(ge=0, le=1_000_000_000)] | None = None
    """How much output may still come, as the provider counts it or else as its length suggests. Null: no limit but the time."""
    wait_s: Seconds = 5.0

    def __post_init__(self) -> None:
        _one_of(id=self.id, key=self.key, labels=self.labels, all=self.all)
        if self.labels is not None and not self.labels:
            raise ValueError('labels must name at least one label; to cancel every stream give "all": true')


class CancelResultMessage(_Result, frozen=True, kw_only=True):
    """How a cancel ended for one stream; asking again gives the settled state again.

    `won`: this cancel decided how the stream ended. `already_terminal`: it had ended otherwise. `requested`: it has not
    settled within `wait_s`. `tombstoned`: no stream has the key yet; one started with it soon will be cancelled.
    """

    outcome: Literal["won", "already_terminal", "requested", "tombstoned"]
    id: str | None = None
    key: str | None = None
    state: str | None = None
    reason: str | None = None
    error: str | msgspec.UnsetType = msgspec.UNSET
    """Only by `labels` or `all`, and only if there is one: why this stream's outcome could not be recorded."""


class CancelManyResult(_Result, frozen=True, kw_only=True):
    """How a cancel by `labels` or `all` ended, stream by stream."""

    results: tuple[CancelResultMessage, ...]


class SubscribeParams(StreamParams, frozen=True, kw_only=True):
    """What to watch. `credit` is how many journal events the client accepts before it grants more."""

    after: CursorMessage | Literal["start", "tail", "snapshot"] = "start"
    view: Literal["events", "text"] = "events"
    credit: Count = 256
    max_behind: Annotated[int, msgspec.Meta(ge=1, le=1_000_000)] | None = None
    """Further behind than so many events, be sent one `snapshot` event in place of them. Null: be sent all, however many."""


class CreditParams(_Params, frozen=True, kw_only=True):
    """`credit` more journal events are accepted."""

    sub: Name
    credit: Count


class CreditResult(_Result, frozen=True, kw_only=True):
    """How many events are accepted now; the server stops counting at 1,000,000."""

    credit: int


class UnsubscribeParams(_Params, frozen=True, kw_only=True):
    """The subscription to end. The stream goes on."""

    sub: Name


class UnsubscribeResult(_Result, frozen=True, kw_only=True):
    """The position after the last event that was sent."""

    epoch: int
    seq: int


class WaitParams(StreamParams, frozen=True, kw_only=True):
    """Which outcome to wait for, and how long (null: as long as it takes)."""

    timeout_s: Seconds | None = None


class WaitResult(_Result, frozen=True, kw_only=True):
    """The settled outcome; null with the present state if `timeout_s` ran out first."""

    id: str
    state: str
    outcome: dict[str, Any] | None


class ReapParams(_Params, frozen=True, kw_only=True):
    """`dry_run`: say what would be reaped and why, and reap nothing. `wait_s`: how long to wait for the outcomes."""

    dry_run: bool = False
    wait_s: Seconds = 5.0


class ReapedMessage(_Result, frozen=True, kw_only=True):
    """One stream reaped or spilled, or to be."""

    id: str
    key: str | None
    reason: str
    message: str
    age_s: float
    idle_s: float
    bytes_held: int
    settled: bool = False
    """Whether its outcome was durable within `wait_s`."""


class ReapResult(_Result, frozen=True, kw_only=True):
    """What the memory manager did, or would do."""

    dry_run: bool
    live: int
    """Live streams before the sweep."""
    reaped: tuple[ReapedMessage, ...]
    spilled: tuple[ReapedMessage, ...] = ()
    """Streams that go on, having given up in memory what the store has of them."""


class DrainParams(_Params, frozen=True, kw_only=True):
    """Start nothing more and wait for what is live, at most `timeout_s` (null: as long as it takes)."""

    timeout_s: Seconds | None = None


class DrainResult(_Result, frozen=True, kw_only=True):
    """How many streams are still live."""

    live: int


class ShutdownParams(_Params, frozen=True, kw_only=True):
    """How long live streams may go on before they are cancelled with reason `shutdown`. Null: the server's own default."""

    grace_s: Seconds | None = None


class ShutdownResult(_Result, frozen=True, kw_only=True):
    """The shutdown has begun; the connection will be closed with 4000."""

    accepted: bool


class RequestCancelParams(_Params, frozen=True, kw_only=True):
    """The id of the request that need not be answered any more."""

    id: str | int | float | None


class StreamMessage(_Result, frozen=True, kw_only=True):
    """What is known of one stream."""

    id: str
    key: str | None = None
    state: str
    reason: str | None = None
    tenant: str | None = None
    upstream: str | None = None
    dialect: str | None = None
    labels: dict[str, str] = {}
    meta: dict[str, Any] = {}
    delivery: str = "immediate"
    created_at: float
    ended_at: float | None = None
    age_s: float
    idle_s: float | None = None
    first_event_s: float | None = None
    """From its start to its first event; null if there was none, or it is not known any more."""
    attempts: int
    events: int
    skipped: int = 0
    journal_bytes: int | None = None
    """What its journal comes to: payloads, names and text; null if that is not known any more."""
    readers: int
    bytes_held: int
    """Held in memory for it."""
    tail_bytes: int = 0
    """Of that, its newest events."""
    pending_bytes: int = 0
    """Of those, what is not durable yet."""
    epoch: int
    tail_seq: int
    durable_seq: int
    outcome: dict[str, Any] | None = None
    """The outcome; null until it is durable."""


class ListResult(_Result, frozen=True, kw_only=True):
    """A page of streams; `next` is the `before` of the next page, null on the last."""

    streams: tuple[StreamMessage, ...]
    next: str | None


class ToolCallMessage(_Result, frozen=True, kw_only=True):
    """One tool call, its arguments joined."""

    id: str
    name: str
    arguments: str


class ChoiceMessage(_Result, frozen=True, kw_only=True):
    """One of several answers."""

    index: int
    text: str
    reasoning: str
    refusal: str
    tool_calls: tuple[ToolCallMessage, ...]
    finish_reason: str | None


class SnapshotMessage(_Result, frozen=True, kw_only=True):
    """The fold of a stream's journal up to `(epoch, seq)`: the answer so far, or the whole of it."""

    id: str
    state: str
    epoch: int
    seq: int
    text: str
    reasoning: str
    refusal: str
    tool_calls: tuple[ToolCallMessage, ...]
    finish_reason: str | None
    choices: tuple[ChoiceMessage, ...]
    usage: dict[str, Any] | None
    model: str | None
    response_id: str | None
    joined_at: tuple[int, ...] = ()
    """Where in `text`, in characters, another attempt went on from what was received before it."""


class SubscribeResult(_Result, frozen=True, kw_only=True):
    """The subscription: events after `from` will follow, up to the outcome; `tail` is the last there is now."""

    sub: str
    id: str
    epoch: int
    from_: int = msgspec.field(name="from")
    tail: int
    state: str
    credit: int
    snapshot: SnapshotMessage | None = None
    """The fold up to `from`, for `after: "snapshot"`."""


# --- notifications ----------------------------------------------------------------------------------------------------


class EventMessage(msgspec.Struct, frozen=True, omit_defaults=True, kw_only=True):
    """One event of a journal.

    `data` events carry the upstream's payload exactly as received, as a JSON string in `data`, or in `data_b64` when it
    is not UTF-8. In the view `text`, `data` events are replaced by `text` events that join the text of the events `first`
    to `last`. `attempt`, `withdrawn`, `skipped` and `note` carry `details`; after `withdrawn` the answer begins anew, as what was
    received before is no longer part of it. `outcome` is always the last and carries the outcome.

    A `snapshot` event is sent only where it was asked for, with `max_behind` of `stream.subscribe`: in place of the events `first`
    to `last`, it carries the whole answer up to `last`, which takes the place of all that was received before.
    """

    kind: str
    at: float
    """When it was recorded; of a `text` event: when its last part was; of a `snapshot`: when it was made."""
    seq: int = 0
    """Its position; of a `text` event: that of its last part; of a `snapshot`: `last`."""
    first: int = 0
    """Only in `text` and `snapshot` events: the first position it covers."""
    last: int = 0
    """Only in `text` and `snapshot` events: the last position it covers."""
    name: str = ""
    """The wire's event name where it is not the default."""
    data: str | None = None
    data_b64: str | None = None
    text: str = ""
    """The text the event adds to the answer (choice 0)."""
    details: dict[str, Any] | None = None
    outcome: dict[str, Any] | None = None
    snapshot: SnapshotMessage | None = None


class EventsNotification(_Result, frozen=True, kw_only=True):
    """The events `first` to `last` of a subscription, with no gap since the one before; costs `last - first + 1` credit.

    A `snapshot` event comes alone, and costs 1.
    """

    sub: str
    epoch: int
    first: int
    last: int
    events: tuple[EventMessage, ...]


class GapNotification(_Result, frozen=True, kw_only=True):
    """The subscription has ended: retention has removed the history it was about to read."""

    sub: str
    error: ErrorMessage


class FailedNotification(_Result, frozen=True, kw_only=True):
    """The subscription has ended for another reason than its stream's outcome. Resume by cursor if it is temporary."""

    sub: str
    error: ErrorMessage


# --- the tables -------------------------------------------------------------------------------------------------------


@attrs.frozen
class Method:
    """One method: its types and what it is for."""

    name: str
    params: type[msgspec.Struct]
    result: type[Any] | None
    """The type of the result; None for what is only sent as a notification."""
    summary: str


METHODS: Mapping[str, Method] = {
    method.name: method
    for method in (
        Method(
            "hello",
            HelloParams,
            HelloResult,
            "Name the client; learn the server's version, methods and limits.",
        ),
        Method("stream.start", StartParams, StartResult, "Start a stream, or join the one that has the key."),
        Method("stream.get", StreamParams, StreamMessage, "What is known of a stream, live or stored."),
        Method("stream.list", ListParams, ListResult, "Streams by filter, newest first, page by page."),
        Method(
            "stream.cancel",
            CancelParams,
            CancelResultMessage,
            "Cancel by id, key, labels or all. Idempotent.",
        ),
        Method("stream.subscribe", SubscribeParams, SubscribeResult, "Watch a stream from a position on."),
        Method("stream.credit", CreditParams, CreditResult, "Accept more events of a subscription."),
        Method(
            "stream.unsubscribe", UnsubscribeParams, UnsubscribeResult, "Stop watching. The stream goes on."
        ),
        Method("stream.wait", WaitParams, WaitResult, "Wait for a stream's durable outcome."),
        Method(
            "stream.snapshot",
            StreamParams,
            SnapshotMessage,
            "The answer so far of any stream, live or stored.",
        ),
        Method(
            "stream.trace",
            StreamParams,
            Trace,
            "What happened when in any stream, live or stored: attempts, gaps, stalls, sizes.",
        ),
        Method(
            "supervisor.overview",
            NoParams,
            Overview,
            "How the supervisor is now, and how the last hour went.",
        ),
        Method("supervisor.stats", NoParams, dict, "Figures of the supervisor and of this channel."),
        Method("supervisor.health", NoParams, dict, "Whether the supervisor is well, and why not."),
        Method(
            "supervisor.reap", ReapParams, ReapResult, "Run the memory manager now, or ask what it would do."
        ),
        Method("supervisor.drain", DrainParams, DrainResult, "Start nothing more; wait for what is live."),
        Method("supervisor.shutdown", ShutdownParams, ShutdownResult, "Shut the server down."),
        Method(
            "request.cancel",
            RequestCancelParams,
            None,
            "A notification: withdraw a request of this connection. What it has begun is not undone.",
        ),
    )
}

NOTIFICATIONS: Mapping[str, tuple[type[msgspec.Struct], str]] = {
    "stream.events": (EventsNotification, "Events of a subscription."),
    "stream.gap": (GapNotification, "A subscription has lost its place."),
    "stream.failed": (FailedNotification, "A subscription has failed."),
}
