"""NDJSON: what a line is, what is a keep-alive, the limits, and that no split changes anything."""

from __future__ import annotations

import json
from contextlib import suppress
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from supervisor.errors import ConfigurationError, RemoteProtocolError
from supervisor.wire import NDJSONDecoder
from tests.wire.feeding import cut

CUTS = st.lists(st.integers(0, 200), max_size=8)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=6),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=8,
)


def lines(*pieces: bytes, **limits: int) -> tuple[list[bytes], NDJSONDecoder]:
    decoder = NDJSONDecoder(**limits)
    return [event.data for piece in pieces for event in decoder.feed(piece)], decoder


def until_fault(pieces: list[bytes], **limits: int) -> tuple[list[bytes], str]:
    decoder = NDJSONDecoder(**limits)
    events: list[bytes] = []
    with suppress(RemoteProtocolError):
        for piece in pieces:
            events += [event.data for event in decoder.feed(piece)]
            assert decoder.buffered_bytes <= min(decoder.max_line_bytes, decoder.max_event_bytes)
    return events, str(decoder.fault or "")


@pytest.mark.parametrize("end", [b"\n", b"\r\n", b"\r"])
def test_line_ends(end: bytes) -> None:
    """LF, CRLF and CR end a line, whatever way they are cut; nothing else does."""
    body = b'{"a":1}' + end + '{"b":"\u2028\u0085"}'.encode() + end + b"[]" + end
    wanted = [b'{"a":1}', '{"b":"\u2028\u0085"}'.encode(), b"[]"]
    for at in range(len(body) + 1):
        found, decoder = lines(body[:at], body[at:])
        assert (found, decoder.comments, decoder.open) == (wanted, 0, False)


def test_keep_alives() -> None:
    """Blank lines, lines of white space and lines that begin with a colon are no events, but counted."""
    found, decoder = lines(b'\n\r\n{"a":1}\n  \t\n: alive\n\x1e{"b":2}\n')
    assert (found, decoder.comments) == ([b'{"a":1}', b'{"b":2}'], 4)


def test_a_byte_order_mark_and_split_characters() -> None:
    """A BOM at the very start is taken off, and a character split between two reads is one."""
    body = b"\xef\xbb\xbf" + '{"t":"\u00e9\U0001f600"}\n'.encode()
    assert lines(*(body[at : at + 1] for at in range(len(body))))[0] == [body[3:-1]]
    assert lines(b"\xef\xbb", b"1\n")[0] == [b"\xef\xbb1"]


def test_a_broken_line_costs_only_itself() -> None:
    """What is no JSON is an event, for the dialect to refuse, and the next line stands."""
    assert lines(b'{"a": "b\n<p>\n{"c":1}\n')[0] == [b'{"a": "b', b"<p>", b'{"c":1}']


def test_the_unfinished_line() -> None:
    """It is pending, also after the end; blanks alone leave nothing open."""
    found, decoder = lines(b'1\n{"a"')
    assert (found, decoder.pending, decoder.buffered_bytes, decoder.open) == ([b"1"], b'{"a"', 4, True)
    decoder.end()
    assert decoder.pending == b'{"a"'
    with pytest.raises(RuntimeError):
        decoder.feed(b"}")
    assert not lines(b"1\n  ")[1].open
    assert "ended" in repr(decoder)


@pytest.mark.parametrize("limits", [{"max_line_bytes": 4}, {"max_event_bytes": 4}])
@pytest.mark.parametrize("end", [b"", b"\n"])
def test_a_line_past_its_limit(limits: dict[str, int], end: bytes) -> None:
    """A line at the limit is read; one byte more is a fault, after the lines before it, under every split."""
    assert lines(b"1234\n", **limits)[0] == [b"1234"]
    body = b"1\n1234\n12345" + end
    for at in range(len(body) + 1):
        found, fault = until_fault([body[:at], body[at:]], **limits)
        assert found == [b"1", b"1234"]
        assert next(iter(limits)) in fault
    decoder = NDJSONDecoder(**limits)
    assert [event.data for event in decoder.feed(body)] == [b"1", b"1234"]
    with pytest.raises(RemoteProtocolError):
        decoder.feed(b"1\n")


@pytest.mark.parametrize("field", ["max_line_bytes", "max_event_bytes"])
@pytest.mark.parametrize("value", [0, -1, "many"])
def test_limits_are_checked(field: str, value: Any) -> None:
    """A limit that is not a positive number is named."""
    with pytest.raises(ConfigurationError, match=field):
        NDJSONDecoder(**{field: value})


@given(st.binary(max_size=120), CUTS)
def test_arbitrary_bytes(body: bytes, at: list[int]) -> None:
    """Any bytes are cut the same under every split, within the memory that is stated."""
    limits = {"max_line_bytes": 16, "max_event_bytes": 12}
    whole = until_fault([body], **limits)
    assert whole == until_fault(cut(body, at), **limits)
    assert whole == until_fault([body[n : n + 1] for n in range(len(body))], **limits)


@given(st.lists(VALUES, max_size=6), CUTS, st.sampled_from(["\n", "\r\n", "\r", "\n\n", " \n"]))
def test_values_come_back(values: list[Any], at: list[int], end: str) -> None:
    """Values written one to a line are what is cut out."""
    body = "".join(json.dumps(value, ensure_ascii=False) + end for value in values).encode()
    assert [json.loads(data) for data in lines(*cut(body, at))[0]] == values
