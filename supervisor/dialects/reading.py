"""From body bytes to deltas and an ending: the one synchronous chain that every stream runs through.

`BodyReader.feed` is the hot path of the whole program: bytes are cut into events, the dialect says what each means, and the
sink takes it, without a task switch, a generator or a queue. It stops at the first seal.

How a body ends well or badly, in the order in which it is asked:

| what was seen | outcome |
|---|---|
| an error from the provider: in an event, as a field named `error`, or as bare JSON between or instead of events | failed(`provider_error`) |
| more unreadable events than allowed, or a line or event past its limit | failed(`protocol`) |
| the dialect's end marker, or finish reasons for all choices seen and then the end of the body, however it came | completed; but there may have been more of the answer if the connection was lost, and in a dialect without an end marker also if an event was cut off: then it is none. With an end marker a lost connection is believed if as many choices have ended as were asked for |
| a whole JSON answer in place of a stream | completed, if it says that it ended |
| the clean end of a body in which nothing is left open, for a dialect whose answers, or whole answers, end so (`Endings.clean_end`) | completed(`done`) |
| a cleanly ended body that is something else: HTML, plain text, other JSON | failed(`protocol`): it was never a stream of this dialect, so nothing of it was cut off |
| anything else, also an empty body | failed(`truncated`) |

A last event that the body's end cut off before its empty line is discarded, as the event-stream standard says: it may
be a part. There is one exception, after a clean end only: if that event says that the provider failed, or is the
dialect's end marker (in a dialect without one: has a finish reason), it is believed, because none of these can be part
of something else. A last line of JSON without its line end counts if it is whole: an object, a list or a string cannot be
a part of another; anything else counts only after a clean end.

How the body is cut into events is decided by its first bytes, with what the response and the dialect say of it: see
`supervisor.wire.framing`. So a dialect is read from whatever framing its provider, or a proxy, sends.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Final, Literal, Protocol

import msgspec

from supervisor.dialects.base import Delta, Fault, Reader, UnparseableError
from supervisor.dialects.dialect import Dialect
from supervisor.dialects.faults import error_fault, find_fault, flat_fault, shown
from supervisor.errors import ConfigurationError, RemoteProtocolError
from supervisor.wire.event import WireEvent
from supervisor.wire.framing import BodyFraming, FramingChooser
from supervisor.wire.json_array import JSONArrayDecoder
from supervisor.wire.ndjson import NDJSONDecoder
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

    def append(self, payload: bytes, name: str, deltas: tuple[Delta, ...]) -> bool | None:
        """Take one wire event: its payload, its name where it is not the default (else ""), and what it means.

        True if the sink is sealed by it.
        """
        ...

    def skip(self, payload: bytes, why: str, name: str = "") -> None:
        """Take an event that could not be read; `name` as for `append`."""
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

    asides: list[tuple[int, bytes]]
    comments: int
    stray: bytes
    fault: RemoteProtocolError | None

    @property
    def pending(self) -> bytes: ...
    @property
    def buffered_bytes(self) -> int: ...
    def feed(self, data: bytes) -> list[WireEvent]: ...
    def end(self) -> None: ...


_DECODERS: Final[Mapping[str, Callable[[int, int, str], _Decoder]]] = {
    "sse": lambda line, event, last_id: SSEDecoder(
        max_line_bytes=line, max_event_bytes=event, last_event_id=last_id
    ),
    "ndjson": lambda line, event, _: NDJSONDecoder(max_line_bytes=line, max_event_bytes=event),
    "json-array": lambda _line, event, _id: JSONArrayDecoder(max_event_bytes=event),
}


class BodyReader:
    """Reads one response body into a sink. One per attempt.

    `events` and `skipped` count the events read and those that could not be; `terminal` is true once the dialect's
    end marker was seen. `choices` tells how many were asked for; None: as many as come. Past `max_unparseable` skipped events the stream is failed(`protocol`). `content_type` helps to
    tell how the body is framed, and what came in place of a stream. `reader` reads on where it stopped in an earlier body
    of the same answer. `last_event_id` is that of an event stream that this one goes on from, and `first_event_id` the first id
    of that: an event stream that goes on does not begin with it, and one that does has begun anew (failed, `protocol`).

    Raises ConfigurationError for a dialect whose framing is not that of a body.
    """

    __slots__ = (
        "_asked",
        "_choices",
        "_chooser",
        "_content_type",
        "_decoder",
        "_dialect",
        "_ended",
        "_event_id",
        "_event_id_before",
        "_finished",
        "_first_before",
        "_framing",
        "_head",
        "_limits",
        "_marked",
        "_max_unparseable",
        "_only",
        "_reader",
        "_seen_comments",
        "_sink",
        "_torn",
        "events",
        "first_event_id",
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
        reader: Reader | None = None,
        last_event_id: str = "",
        first_event_id: str = "",
        choices: Callable[[], int] | None = None,
    ) -> None:
        if dialect.framing not in _DECODERS:
            expected = f"a dialect whose framing is one of {', '.join(sorted(_DECODERS))}"
            raise ConfigurationError("dialect", f"{dialect.name} ({dialect.framing})", expected)
        if max_unparseable < 0:
            raise ConfigurationError("max_unparseable", max_unparseable, "a number of events, 0 or more")
        _DECODERS["sse"](
            max_line_bytes, max_event_bytes, ""
        )  # judges the limits, before the first byte has come
        self.events = 0
        self.skipped = 0
        self.terminal = False
        self._dialect = dialect
        self._sink = sink
        self._reader = dialect.reader() if reader is None else reader
        self._limits = (max_line_bytes, max_event_bytes)
        self._chooser = FramingChooser(
            dialect.framing,  # type: ignore[arg-type]  # "none" has just been refused
            content_type,
            max_line_bytes=min(self._limits),
        )
        self._decoder: _Decoder | None = None
        self._framing: BodyFraming = "sse"
        self._content_type = content_type
        self._max_unparseable = max_unparseable
        self._choices = choices
        self._asked: int | None = None
        self._finished: set[int] = set()
        self._marked = False
        self._ended = False
        self._torn = False
        self._event_id: str | None = None
        self._event_id_before = last_event_id
        # An event without an id has the last one: where there was only one, beginning anew looks like going on.
        self._first_before = first_event_id if last_event_id != first_event_id else ""
        self.first_event_id = first_event_id
        self._seen_comments = 0
        # The beginning of the body, kept until an event shows that it is a stream.
        self._head: bytearray | None = bytearray()
        # The one JSON value of such a body, as long as there is no other.
        self._only: bytes | None = None

    def __repr__(self) -> str:
        return f"<BodyReader of {self._dialect.name}: {self.events} events, {self.skipped} skipped>"

    @property
    def last_event_id(self) -> str:
        """The event stream's last event id, no later than the last event that the sink took; "" if there is none."""
        if self._event_id is not None:
            return self._event_id
        return self._decoder.last_event_id if isinstance(self._decoder, SSEDecoder) else self._event_id_before

    @property
    def framing(self) -> Literal["sse", "ndjson", "json-array", "json"] | None:
        """How the body is framed, once that is clear; `json`: a JSON value that is in no array."""
        if self._decoder is None:
            return None
        decoder = self._decoder
        return "json" if isinstance(decoder, JSONArrayDecoder) and not decoder.arrays else self._framing

    @property
    def retry_ms(self) -> int | None:
        """The reconnection time that the event stream asked for, in milliseconds; None if it asked for none."""
        return self._decoder.retry if isinstance(self._decoder, SSEDecoder) else None

    def feed(self, body: bytes) -> None:
        """Take bytes of the body. Does nothing once the sink is sealed.

        An exception from the dialect other than UnparseableError is a bug in it and is not caught.
        """
        if self._ended:
            return
        decoder = self._decoder
        if decoder is None:
            framing = self._chooser.feed(body)
            if framing is None:
                self._touch(self._chooser.comments)
                return
            decoder, body = self._begin(framing)
        if self._head is not None:
            self._head += body[: max(0, _HEAD_BYTES - len(self._head))]
        events: list[WireEvent] = []
        refused = None
        try:
            events = decoder.feed(body)
        except RemoteProtocolError as exc:
            refused = str(exc)
        fault = None
        if decoder.asides:
            # What came after an error outside of events is not read, whether or not it came in the same read.
            count, fault = _fault_aside(decoder)
            if fault is not None:
                del events[count:]
        if events and not self.events and not self._may_go_on(events[0].id):
            message = f"asked for what follows event {self._event_id_before[:100]!r}, the upstream began its event stream anew"
            self._fail("protocol", Fault(kind="protocol", message=message))
            return
        if not events:
            self._touch(decoder.comments)
        elif self._head is None:
            self._take(events)
        else:
            self._take_first(events)
        if fault is not None:
            self._fail("provider_error", fault)
        elif refused is not None or decoder.fault is not None:
            self._fail("protocol", Fault(kind="protocol", message=refused or str(decoder.fault)))

    def _may_go_on(self, first_id: str) -> bool:
        """Look at the id of the first event. False if the stream that was to be gone on with begins with it again."""
        if not self.first_event_id:
            self.first_event_id = first_id
        return not (self._first_before and first_id == self._first_before)

    def end(self, *, clean: bool, cause: str = "") -> None:
        """Say that the body has ended (`clean`: its framing was complete), or that the connection died of `cause`.

        Seals the sink, if it is not sealed: see the module's table. Idempotent.
        """
        if self._ended:
            return
        whole = self._read_rest(clean=clean)
        self._ended = True
        decoder = self._decoder
        if decoder is not None:
            decoder.end()
        if self._sink.sealed:
            return
        if (fault := self._fault_outside()) is not None:
            self._fail("provider_error", fault)
        elif (reason := self._ending()) is not None and (
            (clean or self._left() == 0) if self._dialect.endings.markers else (clean and not self._torn)
        ):
            self._sink.complete(reason)
        elif clean and whole and self.events and self._may_end_so():
            self._sink.complete("done")
        elif clean and (head := self._foreign()):
            what = f"{self._content_type}; it begins: " if self._content_type else "it begins: "
            message = f"the body is not a stream of {self._dialect.name} events ({what}{shown(head, 200)!r})"
            self._fail("protocol", Fault(kind="protocol", message=message))
        else:
            message = (
                "the body ended before the answer did" if clean else "the connection was lost in the middle"
            )
            if cause:
                message = f"{message}: {cause}"
            self._fail("truncated", Fault(kind="truncated", message=message, temporary=True))

    def _left(self) -> int:
        """How many of the choices asked for have yet to end, where those seen have; below 0: there are more than that."""
        if self._choices is None:
            return 0
        if self._asked is None:
            self._asked = self._choices()
        return self._asked - max(1, len(self._finished))

    def _may_end_so(self) -> bool:
        """Whether the end of the body is an ending by itself."""
        so = self._dialect.endings.clean_end
        return so is True or (so == "whole" and self._framing != "sse")

    # --- the beginning and the end of a body ---

    def _begin(self, framing: BodyFraming) -> tuple[_Decoder, bytes]:
        """Go by this framing from now on. Return what was kept until it was clear, for the decoder to be fed."""
        self._framing = framing
        decoder = self._decoder = _DECODERS[framing](*self._limits, self._event_id_before)
        self._seen_comments = 0
        body = bytes(self._chooser.head)
        self._chooser.head.clear()
        return decoder, body

    def _take_first(self, events: list[WireEvent]) -> None:
        """Read events as long as nothing has shown that the body is a stream, rather than one JSON value in its place."""
        if self._framing == "sse":
            self._head = None
            self._take(events)
            return
        alone = len(events) == 1 and not (self.events or self.skipped)
        meant = self._take(events)
        self._only = events[0].data if alone and not meant else None
        if meant:
            self._head = None

    def _read_rest(self, *, clean: bool) -> bool:
        """Read what the body's end left without its line end. True if nothing was left open. See the module."""
        if self._sink.sealed:
            return True
        if self._decoder is None and self._chooser.head:
            _, body = self._begin(self._chooser.end())
            self.feed(body)
        decoder = self._decoder
        if decoder is None or self._sink.sealed:
            return True
        if isinstance(decoder, NDJSONDecoder | JSONArrayDecoder):
            value = decoder.pending.strip()
            whole = clean or value[:1] in {b"{", b"[", b'"'}
            if value and whole and not _in_array(decoder) and _is_json(value):
                self.feed(b"\n")
            else:
                self._torn = value[:1] in {b"{", b"[", b'"'}
            return not decoder.open
        left = decoder.buffered_bytes
        comment = len(decoder.pending) if decoder.pending.startswith(b":") else 0
        if clean:
            self._read_last_block(decoder)
        else:
            self._torn = left > comment
        return not left

    def _read_last_block(self, decoder: _Decoder) -> None:
        """Look at the event that the body's end cut off before its empty line. See the module."""
        try:
            events = decoder.feed(b"\n\n")
        except RemoteProtocolError:
            return
        if (fault := _fault_aside(decoder)[1]) is not None:
            self._fail("provider_error", fault)
            return
        for event in events:
            try:
                meant = self._dialect.reader().read(event.data, event.event)
            except UnparseableError:
                self._torn = True
                continue
            if any(delta.fault is not None or delta.terminal or self._ends(delta) for delta in meant):
                self._head = None
                self._take([event])
            elif any(delta.text or delta.reasoning or delta.tool_calls for delta in meant):
                self._torn = True

    def _ends(self, delta: Delta) -> bool:
        """Whether this finish reason is all that a dialect without an end marker says of its ending."""
        return delta.finish_reason is not None and not self._dialect.endings.markers

    def _foreign(self) -> bytes:
        """Return the beginning of a body that never was a stream of this dialect; b"" of one that may have been."""
        head = bytes(self._head or b"").strip().removeprefix(b"\xef\xbb\xbf").strip()
        expected = self._dialect.framing
        decoder = self._decoder
        if self._framing == "sse":
            mute = not head.startswith(_FIELDS) and not self.events and not self.skipped
        elif self._framing == expected:
            mute = self.skipped > 0 and not self.events
        else:
            # A value that was cut off may have been the answer's first, if the dialect's are JSON values.
            cut_off = isinstance(decoder, JSONArrayDecoder) and decoder.open
            mute = not (cut_off and (expected != "sse" or _in_array(decoder)))
        return head if mute else b""

    # --- events ---

    def _take(self, events: list[WireEvent]) -> bool:
        """Read events into the sink. True if any of them meant something."""
        sink = self._sink
        append = sink.append
        read = self._reader.read
        meant = False
        sealed: bool | None = sink.sealed
        last_id = self._event_id
        for event in events:
            if sealed:
                self._event_id = last_id or ""
                break
            data = event.data
            last_id = event.id
            name = event.event
            try:
                deltas = read(data, name)
            except UnparseableError as exc:
                self._skip(data, str(exc), "" if name == "message" else name)
                sealed = sink.sealed
                continue
            self.events += 1
            sealed = append(data, "" if name == "message" else name, deltas)
            if self._marked and (self._reader.ending() is None or self._left() > 0):
                self._marked = False
                sink.mark(None)
            for delta in deltas:
                meant = True
                if delta.finish_reason is not None or delta.terminal or delta.fault is not None:
                    self._conclude(deltas)
                    sealed = sink.sealed
                    break
        return meant

    def _conclude(self, deltas: tuple[Delta, ...]) -> None:
        """Act on an event that says something of how the answer ends."""
        for delta in deltas:
            if delta.fault is not None:
                self._fail("provider_error", delta.fault)
                return
        self._finished.update(delta.choice for delta in deltas if delta.finish_reason is not None)
        reason = self._ending()
        if any(delta.terminal for delta in deltas):
            self.terminal = True
            if not self._sink.sealed:
                self._sink.complete(reason or "done")
        elif (
            reason is not None
            and not self._marked
            and not self._sink.sealed
            and self._dialect.endings.markers
            and self._left() <= 0
        ):
            self._marked = True
            self._sink.mark(reason)

    def _ending(self) -> str | None:
        reason = self._reader.ending()
        return None if reason is None else reason[:MAX_REASON_CHARS]

    def _skip(self, data: bytes, why: str, name: str) -> None:
        self.skipped += 1
        self._sink.skip(data, why, name)
        if self.skipped > self._max_unparseable:
            message = f"{self.skipped} events could not be read (max_unparseable is {self._max_unparseable}); the last: {why}"
            self._fail("protocol", Fault(kind="protocol", message=message))

    def _fail(self, reason: str, fault: Fault) -> None:
        # The sink of an attempt holds failures back, and must hear only the first.
        if not self._sink.sealed:
            self._sink.fail(reason, fault)

    # --- what is outside of events ---

    def _touch(self, comments: int) -> None:
        if comments != self._seen_comments and not self._sink.sealed:
            self._seen_comments = comments
            self._sink.touch()

    def _fault_outside(self) -> Fault | None:
        """Return the error that the body told, but not in an event of the dialect."""
        if self._only is not None:
            return find_fault(_json(self._only), lenient=True)
        # Each line was looked at when it came; an error may also be told over several.
        return None if self._decoder is None else _stray_fault(_json(self._decoder.stray))


def _fault_aside(decoder: _Decoder) -> tuple[int, Fault | None]:
    """Return the error told outside of events, a field named `error` or bare JSON, and how many events came before it."""
    asides = decoder.asides[:]
    decoder.asides.clear()
    for count, line in asides:
        text = line.strip()
        if text.startswith(b"error:"):
            value = _json(text[6:])
            if value is None:
                value = shown(text[6:], 2000)
            return count, find_fault(value) or error_fault(value)
        if text.startswith((b"{", b"[")) and (fault := _stray_fault(_json(text))) is not None:
            return count, fault
    return 0, None


def _stray_fault(value: Any) -> Fault | None:
    """Return the error that JSON outside of events tells."""
    return find_fault(value) or (flat_fault(value) if isinstance(value, dict) else None)


def _json(data: bytes) -> Any:
    try:
        return msgspec.json.decode(data)
    except (ValueError, RecursionError):
        return None


def _is_json(data: bytes) -> bool:
    try:
        msgspec.json.decode(data)
    except (ValueError, RecursionError):
        return False
    return True


def _in_array(decoder: _Decoder | None) -> bool:
    return isinstance(decoder, JSONArrayDecoder) and decoder.in_array
