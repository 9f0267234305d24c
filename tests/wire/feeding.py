"""Ways of feeding a stream to a decoder: cut in pieces, up to its end, or up to its fault."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import suppress
from itertools import pairwise

from supervisor.errors import RemoteProtocolError
from supervisor.wire import SSEDecoder, WireEvent


def cut(stream: bytes, at: Iterable[int]) -> list[bytes]:
    edges = [0, *sorted(min(place, len(stream)) for place in at), len(stream)]
    return [stream[start:stop] for start, stop in pairwise(edges)]


def decode(pieces: Iterable[bytes], decoder: SSEDecoder | None = None) -> tuple[list[WireEvent], SSEDecoder]:
    decoder = SSEDecoder() if decoder is None else decoder
    events = [event for piece in pieces for event in decoder.feed(piece)]
    decoder.end()
    return events, decoder


def decode_until_fault(pieces: Iterable[bytes], decoder: SSEDecoder) -> tuple[list[WireEvent], str]:
    """Return the events and the fault's message, if any."""
    events: list[WireEvent] = []
    with suppress(RemoteProtocolError):
        for piece in pieces:
            events += decoder.feed(piece)
    return events, str(decoder.fault or "")


def as_text(events: Iterable[WireEvent]) -> list[WireEvent]:
    """The events with broken UTF-8 replaced, as the standard's algorithm yields them."""
    return [
        WireEvent(event.data.decode("utf-8", "replace").encode(), event.event, event.id, event.retry)
        for event in events
    ]
