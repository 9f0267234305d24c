"""From body bytes to deltas and an ending: the one synchronous chain that every stream runs through.

`BodyReader.feed` is the hot path of the whole program: bytes are cut into events, the dialect says what each means, and the
sink takes it, without a task switch, a generator or a queue. It stops at the first seal.

How a body ends well or badly, in the order in which it is asked:

| what was seen | outcome |
|---|---|
| an error from the provider: in an event, as a field named `error`, or as bare JSON between or instead of events | failed(`provider_error`) |
| more unreadable events than allowed, or a line or event past its limit | failed(`protocol`) |
| the dialect's end marker, or finish reasons for all choices seen and then the end of the body, however it came | completed |
| a whole JSON answer in place of a stream | completed, if it says that it ended |
| a cleanly ended body that is something else: HTML, plain text, other JSON | failed(`protocol`): it was never a stream of this dialect, so nothing of it was cut off |
| anything else, also an empty body | failed(`truncated`) |

A last event that the body's end cut off before its empty line is discarded, as the event-stream standard says: it may
be a part. There is one exception, after a clean end only: if that event says that the provider failed, or is the
dialect's end marker (in a dialect without one: has a finish reason), it is believed, because none of these can be part
of something else.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Final, Protocol

import msgspec

from supervisor.dialects.base import Delta, Fault, UnparseableError
from supervisor.dialects.dialect import Dialect
from supervisor.dialects.faults import error_fault, find_fault, shown
from supervisor.errors import ConfigurationError, RemoteProtocolError
from supervisor.wire.event import WireEvent
from supervisor.wire.sse import SSEDecoder

__all__ = ["BodyReader", "Sink"]

MAX_REASON_CHARS: Final = 64
"""How much of a provider's finish reason becomes the reason of an ending."""

_HEAD_BYTES: Final = 2048
_FIELDS: Final = (b":", b"data", b"event", b"id", b"retry")


class Sink(Protocol):
    """Where what was read goes. All methods are synchronous."""

    @property
    def sealed(self) -> bool:
        """Whether it has been decided how the stream ends. Nothing is appended after that."""
        ...

    def append(self, payload: bytes, name: str, deltas: tuple[Delta, ...]) -> None:
        """Take one wire event: its payload, its name where it is not the default (else ""), and what it means."""
        ...

    def skip(self, payload: bytes, why: str) -> None:
        """Take an event that could not be read."""
        ...

    def touch(self) -> None:
        """Learn that the upstream is alive without having sent an event."""
        ...

    def mark(self, reason: str | None) -> None:
        """Learn that the answer has ended as far as seen: only an error or the end marker may follow.

        None takes that back: a further choice has begun after those before it had ended.
        """
        ...

    def complete(self, reason: str) -> bool:
        """Seal as completed. True if this was the first seal."""
        ...

    def fail(self, reason: str, fault: Fault) -> bool:
        """Seal as failed. True if this was the first seal."""
        ...


class _Decoder(Protocol):
    """What a framing's decoder offers."""

    comments: int
    stray: bytes
    fault: RemoteProtocolError | None

    def feed(self, data: bytes) -> list[WireEvent]: ...
    def end(self) -> None: ...


def _sse(max_line_bytes: int, max_event_bytes: int) -> _Decoder:
    return SSEDecoder(max_line_bytes=max_line_bytes, max_event_bytes=max_event_bytes)


_DECODERS: Final[Mapping[str, Callable[[int, int], _Decoder]]] = {"sse": _sse}


class BodyReader:
    """Reads one response body into a sink. One per attempt.

    `events` and `skipped` count the events read and those that could not be; `terminal` is true once the dialect's
    end marker was seen. Past `max_unparseable` skipped events the stream is failed(`protocol`). `content_type` is only
    used to say what came in place of a stream.

    Raises ConfigurationError for a dialect whose framing is not that of a body.
    """

    __slots__ = (
        "_content_type",
        "_decoder",
        "_dialect",
        "_ended",
        "_head",
        "_head_limit",
        "_marked",
        "_max_bare",
        "_max_unparseable",
        "_reader",
        "_seen_comments",
        "_seen_stray",
        "_sink",
        "_stray_fault",
        "events",
        "skipped",
        "terminal",
    )

    def __init__(
        self,
        dialect: Dialect,
        sink: Sink,
        *,
        content_type: str | None = None,
        max_unparseable: int = 10,
        max_line_bytes: int = 1 << 20,
        max_event_bytes: int = 4 << 20,
    ) -> None:
        make = _DECODERS.get(dialect.framing)
        if make is None:
            expected = f"a dialect whose framing is one of {', '.join(sorted(_DECODERS))}"
            raise ConfigurationError("dialect", f"{dialect.name} ({dialect.framing})", expected)
        if max_unparseable < 0:
            raise ConfigurationError("max_unparseable", max_unparseable, "a number of events, 0 or more")
        self.events = 0
        self.skipped = 0
        self.terminal = False
        self._dialect = dialect
        self._sink = sink
        self._reader = dialect.reader()
        self._decoder = make(max_line_bytes, max_event_bytes)
        self._content_type = content_type
        self._max_unparseable = max_unparseable
        self._max_bare = max_event_bytes
        self._marked = False
        self._ended = False
        self._seen_comments = 0
        self._seen_stray = 0
        self._stray_fault: Fault | None = None
        # The beginning of the body, kept until the first event shows that it is a stream.
        self._head: bytearray | None = bytearray()
        self._head_limit = 0

    def __repr__(self) -> str:
        return f"<BodyReader of {self._dialect.name}: {self.events} events, {self.skipped} skipped>"

    def feed(self, body: bytes) -> None:
        """Take bytes of the body. Does nothing once the sink is sealed.

        An exception from the dialect other than UnparseableError is a bug in it and is not caught.
        """
        if self._ended or self._sink.sealed:
            return
        if self._head is not None:
            self._keep(body)
        decoder = self._decoder
        try:
            events = decoder.feed(body)
        except RemoteProtocolError as exc:
            self._fail("protocol", Fault(kind="protocol", message=str(exc)))
            return
        if len(decoder.stray) != self._seen_stray:
            self._look_at_stray()
        if events:
            self._head = None
            self._take(events)
        elif decoder.comments != self._seen_comments:
            self._seen_comments = decoder.comments
            self._sink.touch()
        if self._stray_fault is not None:
            self._fail("provider_error", self._stray_fault)
        elif decoder.fault is not None:
            self._fail("protocol", Fault(kind="protocol", message=str(decoder.fault)))

    def end(self, *, clean: bool, cause: str = "") -> None:
        """Say that the body has ended (`clean`: its framing was complete), or that the connection died of `cause`.

        Seals the sink, if it is not sealed: see the module's table. Idempotent.
        """
        if self._ended:
            return
        if clean and not self._sink.sealed:
            self._read_last_block()
        self._ended = True
        self._decoder.end()
        head = bytes(self._head) if self._head else b""
        self._head = None
        if self._sink.sealed:
            return
        bare = head.strip().removeprefix(b"\xef\xbb\xbf").strip()
        if bare and self._read_bare(bare):
            return
        if fault := _stray_fault(self._decoder.stray, whole=True):
            self._fail("provider_error", fault)
        elif (reason := self._ending()) is not None:
            self._sink.complete(reason)
        elif clean and bare and not bare.startswith(_FIELDS) and self._never_a_stream():
            what = f"{self._content_type}; it begins: " if self._content_type else "it begins: "
            message = f"the body is not a stream of {self._dialect.name} events ({what}{shown(bare, 200)!r})"
            self._fail("protocol", Fault(kind="protocol", message=message))
        else:
            message = (
                "the body ended before the answer did" if clean else "the connection was lost in the middle"
            )
            if cause:
                message = f"{message}: {cause}"
            self._fail("truncated", Fault(kind="truncated", message=message, temporary=True))

    # --- events ---

    def _take(self, events: list[WireEvent]) -> None:
        sink = self._sink
        append = sink.append
        read = self._reader.read
        for event in events:
            if sink.sealed:
                return
            data = event.data
            name = event.event
            try:
                deltas = read(data, name)
            except UnparseableError as exc:
                self._skip(data, str(exc))
                continue
            self.events += 1
            append(data, "" if name == "message" else name, deltas)
            if self._marked and self._reader.ending() is None:
                self._marked = False
                sink.mark(None)
            for delta in deltas:
                if delta.finish_reason is not None or delta.terminal or delta.fault is not None:
                    self._conclude(deltas)
                    break

    def _conclude(self, deltas: tuple[Delta, ...]) -> None:
        """Act on an event that says something of how the answer ends."""
        for delta in deltas:
            if delta.fault is not None:
                self._fail("provider_error", delta.fault)
                return
        reason = self._ending()
        if any(delta.terminal for delta in deltas):
            self.terminal = True
            if self._stray_fault is None and not self._sink.sealed:
                self._sink.complete(reason or "done")
        elif reason is not None and not self._marked and not self._sink.sealed:
            self._marked = True
            self._sink.mark(reason)

    def _ending(self) -> str | None:
        reason = self._reader.ending()
        return None if reason is None else reason[:MAX_REASON_CHARS]

    def _skip(self, data: bytes, why: str) -> None:
        self.skipped += 1
        self._sink.skip(data, why)
        if self.skipped > self._max_unparseable:
            message = f"{self.skipped} events could not be read (max_unparseable is {self._max_unparseable}); the last: {why}"
            self._fail("protocol", Fault(kind="protocol", message=message))

    def _fail(self, reason: str, fault: Fault) -> None:
        # The sink of an attempt holds failures back, and must hear only the first.
        if not self._sink.sealed:
            self._sink.fail(reason, fault)

    # --- what is not a stream ---

    def _keep(self, body: bytes) -> None:
        head = self._head
        assert head is not None
        if not self._head_limit:
            first = (bytes(head[:16]) + body[:_HEAD_BYTES]).removeprefix(b"\xef\xbb\xbf").lstrip()[:1]
            if first:
                self._head_limit = self._max_bare if first in b"{[" else _HEAD_BYTES
        room = (self._head_limit or _HEAD_BYTES) - len(head)
        if room > 0:
            head += body[:room]

    def _read_bare(self, bare: bytes) -> bool:
        """Read a body that may be one JSON value in place of a stream. True if that decided the ending."""
        if bare[:1] not in {b"{", b"["} or self.events or self.skipped:
            return False
        try:
            deltas = self._reader.read(bare)
        except UnparseableError:
            return False
        if any(delta.fault is not None or delta.finish_reason is not None for delta in deltas):
            self._take_one(bare, deltas)
        elif (fault := find_fault(_json(bare), lenient=True)) is not None:
            self._fail("provider_error", fault)
        return self._sink.sealed

    def _take_one(self, data: bytes, deltas: tuple[Delta, ...], name: str = "") -> None:
        self.events += 1
        self._sink.append(data, name, deltas)
        self._conclude(deltas)

    def _never_a_stream(self) -> bool:
        return not self.events and not self.skipped

    def _read_last_block(self) -> None:
        """Look at the event that the body's end cut off before its empty line. See the module."""
        try:
            events = self._decoder.feed(b"\n\n")
        except RemoteProtocolError:
            return
        for event in events:
            try:
                meant = self._dialect.reader().read(event.data, event.event)
            except UnparseableError:
                continue
            if any(delta.fault is not None or delta.terminal or self._ends(delta) for delta in meant):
                self._head = None
                self._take([event])

    def _ends(self, delta: Delta) -> bool:
        """Whether this finish reason is all that a dialect without an end marker says of its ending."""
        return delta.finish_reason is not None and not self._dialect.endings.markers

    def _look_at_stray(self) -> None:
        stray = self._decoder.stray
        # Which events of this read came before the error is not known: they are all kept, but the error decides.
        self._stray_fault = _stray_fault(stray[self._seen_stray :])
        self._seen_stray = len(stray)


def _stray_fault(stray: bytes, *, whole: bool = False) -> Fault | None:
    """Return the error told by lines that are not of an event stream: a field named `error`, or bare JSON."""
    if not stray:
        return None
    for line in stray.splitlines():
        text = line.strip()
        if text.startswith(b"error:"):
            value = _json(text[6:])
            if value is None:
                value = shown(text[6:], 2000)
            return find_fault(value) or error_fault(value)
        if text.startswith((b"{", b"[")) and (fault := find_fault(_json(text))) is not None:
            return fault
    return find_fault(_json(stray)) if whole else None


def _json(data: bytes) -> Any:
    try:
        return msgspec.json.decode(data)
    except (ValueError, RecursionError):
        return None
