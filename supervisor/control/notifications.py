"""`stream.events` on the wire: events as JSON, cut into notifications, one encoding for all who are at the same place.

What the subscribers of a stream get differs in `sub` and in nothing else. So a `Batch` is encoded once, as everything that
follows `sub`, and a frame is its header, a prefix with the `sub`, and that; most connections even have the same `sub`, and
then the frame itself is the same bytes.

What a batch holds is decided by the stream, the view and the position it begins after, for a `seq` is given once in the
life of a stream, whatever becomes of its epochs. How far it reaches is decided by the limits of a notification or, in a
batch that is not `full`, by how far the stream had come: such a one is not used any more once the stream has gone on, so
that those who are behind get more in one.
"""

from __future__ import annotations

import base64
import functools
from collections.abc import Iterator, Sequence
from typing import Any, cast

import attrs
import msgspec

from supervisor.control.frames import OP_TEXT, build_head
from supervisor.control.messages import EventMessage, SnapshotMessage
from supervisor.stores import Event

__all__ = [
    "NOTHING",
    "Batch",
    "cut",
    "encode_event",
    "encode_events",
    "encode_text",
    "event_messages",
    "snapshot_event",
    "sub_prefix",
    "text_messages",
]

_OVERHEAD_BYTES = 512
_encode = msgspec.json.Encoder().encode


def encode_events(events: Sequence[Event]) -> bytes:
    """Encode events as the JSON array of the view `events`. The same bytes serve every subscriber of the stream."""
    return _encoded(event_messages(events))


def encode_text(events: Sequence[Event]) -> bytes:
    """Encode events as the JSON array of the view `text`."""
    return _encoded(text_messages(events))


def encode_event(message: EventMessage) -> bytes:
    """Encode one event as JSON."""
    return _encoded([message])[1:-1]


def event_messages(events: Sequence[Event]) -> list[EventMessage]:
    """Return the view `events`: each as it is."""
    return [_event_message(event) for event in events]


def text_messages(events: Sequence[Event]) -> list[EventMessage]:
    """Return the view `text`: runs of text joined, everything but `data` as it is."""
    messages: list[EventMessage] = []
    run: list[Event] = []
    for event in events:
        if event.kind == "data":
            if event.text:
                run.append(event)
            continue
        messages.extend(_text_message(run))
        run = []
        messages.append(_event_message(event))
    messages.extend(_text_message(run))
    return messages


def snapshot_event(event: Event, *, after: int, stream_id: str, state: str) -> EventMessage:
    """Return a `snapshot` event, which stands for all events after a position: it is no part of the journal."""
    # Our own JSON, as in `_event_message`, with what a snapshot of the channel tells beside.
    told = b'{"id":%b,"state":%b,%b' % (_encode(stream_id), _encode(state), event.payload[1:])
    return EventMessage(
        kind="snapshot",
        at=event.at,
        seq=event.seq,
        first=after + 1,
        last=event.seq,
        snapshot=cast("SnapshotMessage", msgspec.Raw(told)),
    )


def _text_message(run: Sequence[Event]) -> Iterator[EventMessage]:
    if run:
        end = run[-1]
        text = "".join([event.text for event in run])
        yield EventMessage(kind="text", at=end.at, seq=end.seq, first=run[0].seq, last=end.seq, text=text)


def _event_message(event: Event) -> EventMessage:
    if event.kind != "data":
        # Our own JSON, embedded as it is stored; the declared type says what a reader will find.
        stored = cast("dict[str, Any]", msgspec.Raw(event.payload))
        if event.kind == "outcome":
            return EventMessage(kind="outcome", at=event.at, seq=event.seq, outcome=stored)
        return EventMessage(kind=event.kind, at=event.at, seq=event.seq, name=event.name, details=stored)
    data: str | None
    try:
        data, data_b64 = event.payload.decode(), None
    except UnicodeDecodeError:
        data, data_b64 = None, base64.b64encode(event.payload).decode()
    return EventMessage(
        kind="data",
        at=event.at,
        seq=event.seq,
        name=event.name,
        data=data,
        data_b64=data_b64,
        text=event.text,
    )


def _encoded(messages: list[EventMessage]) -> bytes:
    try:
        return _encode(messages)
    except UnicodeEncodeError:  # half a surrogate pair in a text, which JSON of ours must not hand on
        return _encode(
            [msgspec.structs.replace(m, text=_sound(m.text), name=_sound(m.name)) for m in messages]
        )


def _sound(text: str) -> str:
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def cut(events: Sequence[Event], max_events: int, max_bytes: int) -> Sequence[Event]:
    """Return what one notification takes of some events: up to the end of an epoch, and not too much; at least one."""
    first = events[0]
    count = min(len(events), max_events)
    if count == 1:
        return events if len(events) == 1 else events[:1]
    size = 0
    for index in range(count):
        event = events[index]
        size += len(event.payload)
        if index and (size > max_bytes or event.epoch != first.epoch):
            return events[:index]
    return events if count == len(events) else events[:count]


@functools.lru_cache(maxsize=1024)
def sub_prefix(sub: str) -> bytes:
    """Return how every notification of a subscription begins: what a batch does not hold."""
    return b'{"jsonrpc":"2.0","method":"stream.events","params":{"sub":"%b' % sub.encode()


@attrs.define(eq=False)
class Batch:
    """The events after a position, encoded for whoever is there. Never empty, and of one epoch."""

    after: int
    text: bool
    """Whether it is of the view `text`."""
    epoch: int
    last: int
    full: bool
    """Whether a limit ended it, so that it stays what it is when the stream goes on."""
    rest: bytes
    """The message from after the `sub`."""
    prefix: bytes = b""
    """Of `framed`."""
    framed: bytes = b""
    """The last frame that was made of it: most ask for the same."""

    @classmethod
    def of(cls, events: Sequence[Event], *, text: bool, full: bool) -> Batch:
        """Encode events."""
        first, last = events[0], events[-1]
        encoded = encode_text(events) if text else encode_events(events)
        rest = b'","epoch":%d,"first":%d,"last":%d,"events":%b}}' % (
            first.epoch,
            first.seq,
            last.seq,
            encoded,
        )
        return cls(first.seq - 1, text, first.epoch, last.seq, full, rest)

    @classmethod
    def of_snapshot(cls, event: Event, *, after: int, stream_id: str, state: str) -> Batch:
        """Encode a `snapshot` event."""
        message = snapshot_event(event, after=after, stream_id=stream_id, state=state)
        rest = b'","epoch":%d,"first":%d,"last":%d,"events":%b}}' % (
            event.epoch,
            after + 1,
            event.seq,
            _encode([message]),
        )
        return cls(after=after, text=True, epoch=event.epoch, last=event.seq, full=True, rest=rest)

    @property
    def count(self) -> int:
        """How many events it is of: what it costs in credit."""
        return self.last - self.after

    @property
    def nbytes(self) -> int:
        """What keeping it takes, in bytes: a frame beside what it is made of."""
        return 2 * len(self.rest) + _OVERHEAD_BYTES

    def frame(self, prefix: bytes) -> bytes:
        """Return the frame for the subscription of this `sub_prefix`. A server's: it is not masked."""
        if prefix != self.prefix:
            rest = self.rest
            self.framed = b"%b%b%b" % (build_head(OP_TEXT, len(prefix) + len(rest)), prefix, rest)
            self.prefix = prefix
        return self.framed


NOTHING = Batch(0, text=False, epoch=0, last=0, full=False, rest=b"")
"""Stands for no batch where nothing is new."""
