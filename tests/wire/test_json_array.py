"""Streamed JSON arrays: each element as soon as it is whole, what stands in place of an array, limits and splits."""

from __future__ import annotations

import json
from contextlib import suppress
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from supervisor.errors import ConfigurationError, RemoteProtocolError
from supervisor.wire import JSONArrayDecoder
from tests.wire.feeding import cut
from tests.wire.test_ndjson import CUTS, VALUES

TRICKY = st.text(st.sampled_from('"\\{}[],: \n\t\u00e9\U0001f600a'), max_size=8)
ELEMENTS = st.lists(VALUES | st.dictionaries(TRICKY, TRICKY, max_size=3) | TRICKY, max_size=6)


def elements(*pieces: bytes, **limits: int) -> tuple[list[bytes], JSONArrayDecoder]:
    decoder = JSONArrayDecoder(**limits)
    return [event.data for piece in pieces for event in decoder.feed(piece)], decoder


def until_fault(pieces: list[bytes], limit: int) -> tuple[list[bytes], str]:
    decoder = JSONArrayDecoder(max_event_bytes=limit)
    events: list[bytes] = []
    with suppress(RemoteProtocolError):
        for piece in pieces:
            events += [event.data for event in decoder.feed(piece)]
            assert decoder.buffered_bytes <= limit
    return events, str(decoder.fault or "")


def bytewise(body: bytes) -> list[bytes]:
    return [body[at : at + 1] for at in range(len(body))]


def test_each_element_as_soon_as_it_is_whole() -> None:
    """An element is an event with its last byte, before anything that separates it from the next."""
    decoder = JSONArrayDecoder()
    told = [
        (piece, [event.data for event in decoder.feed(piece)]) for piece in bytewise(b'[{"a":[1]},\n "b" ,3]')
    ]
    assert [(piece, found) for piece, found in told if found] == [
        (b"}", [b'{"a":[1]}']),
        (b'"', [b'"b"']),
        (b"]", [b"3"]),
    ]
    assert not decoder.open


def test_strings_hide_brackets() -> None:
    """Brackets, commas and quotes in strings mean nothing, however they are escaped and split."""
    body = rb'[{"a":"}]\"\\","{":"[\\\""},["\\"]]'
    wanted = [rb'{"a":"}]\"\\","{":"[\\\""}', rb'["\\"]']
    for at in range(len(body) + 1):
        assert elements(body[:at], body[at:])[0] == wanted
    assert elements(*bytewise(body))[0] == wanted


@pytest.mark.parametrize(
    ("body", "wanted"),
    [
        (b'{"error":\r\n {"code": 1}\r\n}\r\n', [b'{"error":\r\n {"code": 1}\r\n}']),
        (b'{"a":1}{"b":2}\n{"c":3},{"d":4}', [b'{"a":1}', b'{"b":2}', b'{"c":3}', b'{"d":4}']),
        (b'[{"a":1}]\n[{"b":2}]', [b'{"a":1}', b'{"b":2}']),
        (b"[[1,2],[3]]", [b"[1,2]", b"[3]"]),
        (b"[]", []),
        (b" \n[ ]\n", []),
        (b'"x"\n12\ntrue\n', [b'"x"', b"12", b"true"]),
        (b"[1,2 ,null]", [b"1", b"2", b"null"]),
        (b'\xef\xbb\xbf[{"a":1}]', [b'{"a":1}']),
        (b"upstream connect error\nx\n", [b"upstream connect error", b"x"]),
        (b'{"a":1}\ndata: {"b":2}\n', [b'{"a":1}', b'data: {"b":2}']),
        (b"[1}2,x]", [b"1", b"}2", b"x"]),
        (b"}]\n", [b"}]"]),
    ],
)
def test_what_stands_in_place_of_an_array(body: bytes, wanted: list[bytes]) -> None:
    """Objects alone or in a row, several arrays, scalars, and what is no JSON at all: cut the same under every split."""
    for at in range(len(body) + 1):
        found, decoder = elements(body[:at], body[at:])
        assert found == wanted
        assert not decoder.open
    assert elements(*bytewise(body))[0] == wanted


@pytest.mark.parametrize(
    ("body", "pending", "in_array"),
    [
        (b"[", b"", True),
        (b'[{"a":1}', b"", True),
        (b'[{"a":1},\n{"b"', b'{"b"', True),
        (b'{"b"', b'{"b"', False),
        (b'"b', b'"b', False),
        (b"[1", b"1", True),
    ],
)
def test_what_is_left_open(body: bytes, pending: bytes, *, in_array: bool) -> None:
    """An array without its closing bracket, and an element that was cut off, are open; the element is pending."""
    _, decoder = elements(body)
    decoder.end()
    assert (decoder.open, decoder.pending, decoder.in_array) == (True, pending, in_array)
    with pytest.raises(RuntimeError):
        decoder.feed(b"]")


def test_line_ends_between_elements_are_keep_alives() -> None:
    """They are counted; those within an element are not."""
    assert elements(b"\n[\n{\n},\n\n", b"\n")[1].comments == 5


def test_an_element_past_its_limit() -> None:
    """An element at the limit is read; one byte more is a fault, after the elements before it, under every split."""
    body = b'[{"a":1},{"a":12}]'
    for pieces in ([body], bytewise(body), [body[:12], body[12:]]):
        assert until_fault(pieces, 8)[1] == ""
        found, fault = until_fault(pieces, 7)
        assert found == [b'{"a":1}']
        assert "max_event_bytes" in fault
    decoder = JSONArrayDecoder(max_event_bytes=7)
    decoder.feed(body)
    with pytest.raises(RemoteProtocolError):
        decoder.feed(b"1")
    assert "failed" in repr(decoder)


@pytest.mark.parametrize("value", [0, -1, "many"])
def test_the_limit_is_checked(value: Any) -> None:
    """A limit that is not a positive number is named."""
    with pytest.raises(ConfigurationError, match="max_event_bytes"):
        JSONArrayDecoder(max_event_bytes=value)


def test_long_runs_of_everything() -> None:
    """Depth, strings, escapes and brackets beyond what one match of a pattern takes are one element."""
    for element in (
        "[" * 3000 + "]" * 3000,
        json.dumps(["x"] * 3000),
        json.dumps('"\\' * 3000),
        '{"a":' * 999 + "1" + "}" * 999,
    ):
        body = f"[{element},{element}]".encode()
        assert elements(body)[0] == elements(*bytewise(body))[0] == [element.encode()] * 2


@given(st.binary(max_size=80) | st.text(st.sampled_from('"\\{}[],1a \n:'), max_size=60).map(str.encode), CUTS)
def test_arbitrary_bytes(body: bytes, at: list[int]) -> None:
    """Any bytes are cut the same under every split, within the memory that is stated."""
    whole = until_fault([body], 12)
    assert whole == until_fault(cut(body, at), 12) == until_fault(bytewise(body), 12)


@given(ELEMENTS, CUTS, st.sampled_from([{}, {"indent": 1}, {"ensure_ascii": False}]))
def test_arrays_come_back(values: list[Any], at: list[int], style: dict[str, Any]) -> None:
    """The elements of an array that json wrote are what json reads of it, and the array is closed."""
    body = json.dumps(values, **style).encode()
    found, decoder = elements(*cut(body, at))
    assert [json.loads(data) for data in found] == json.loads(body) == values
    assert not decoder.open
