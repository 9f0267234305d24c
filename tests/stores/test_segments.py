"""The layout of a segment: everything comes back, and no damage goes unseen."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from supervisor.stores import Event, segments

from .records import event, events

_events = st.lists(
    st.tuples(
        st.floats(allow_nan=False),
        st.sampled_from(["data", "attempt", "note"]),
        st.binary(max_size=50),
        st.sampled_from(["", "delta", "ß"]) | st.text(max_size=5),
    ),
    min_size=1,
    max_size=12,
).map(lambda rows: [Event(3, 7 + index, *row) for index, row in enumerate(rows)])


@settings(deadline=None)
@given(_events)
def test_events_come_back_equal(written):
    """Whatever the times, kinds, payloads and names, one for all or each its own."""
    position = (5, 7, 6 + len(written), 3)
    body = segments.encode(written)
    assert written == segments.decode(position, segments.checksum(position, body), body)


@settings(deadline=None)
@given(_events, st.data())
def test_one_changed_bit_is_found(written, data):
    """In the blob or in any number beside it."""
    position = (5, 7, 6 + len(written), 3)
    body = segments.encode(written)
    crc = segments.checksum(position, body)
    where = data.draw(st.integers(0, len(body) * 8 + 4))
    if where < len(body) * 8:
        changed = bytearray(body)
        changed[where // 8] ^= 1 << where % 8
        body = bytes(changed)
    elif where < len(body) * 8 + 4:
        position = tuple(n + (where - len(body) * 8 == index) for index, n in enumerate(position))
    else:
        crc ^= 1
    with pytest.raises(ValueError, match="checksum"):
        segments.decode(position, crc, body)


@pytest.mark.parametrize("length", [1, 3])
@pytest.mark.parametrize(
    "body", [b"", b"\xc1", segments.encode(events(1, 2)), segments.encode(events(1, 2)) + b"\0"]
)
def test_a_blob_of_another_shape_is_found(body, length):
    """A checksum that fits does not make a segment of what is none, or of one of another length."""
    position = (5, 1, length, 1)
    with pytest.raises(ValueError):
        segments.decode(position, segments.checksum(position, body), body)


def test_text_is_not_stored():
    """`text` is a view of the payload, derived again by who reads."""
    written = Event(1, 1, 0.0, "data", b"x", text="seen")
    body = segments.encode([written])
    assert [Event(1, 1, 0.0, "data", b"x")] == segments.decode(
        (1, 1, 1, 1), segments.checksum((1, 1, 1, 1), body), body
    )


def test_cuts_are_bounded_and_keep_epochs_apart(monkeypatch):
    """A run has one epoch and about `SEGMENT_BYTES`; together they are all the events, in order."""
    monkeypatch.setattr(segments, "SEGMENT_BYTES", 1000)
    written = [
        *events(1, 10),
        *events(11, 20, epoch=2, size=400),
        event(21, epoch=2, size=5000),
        event(22, epoch=3),
    ]
    runs = [list(run) for run in segments.cut(written)]
    assert written == [one for run in runs for one in run]
    assert [len(run) for run in runs] == [10, 3, 3, 3, 2, 1]
    assert list(segments.cut([])) == []
