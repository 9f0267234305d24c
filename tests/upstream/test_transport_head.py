"""Heads without a network: what is written is one request for any parser, and what is read is the same at any split."""

from __future__ import annotations

import contextlib
import itertools

import h11
import pytest
from hypothesis import given
from hypothesis import strategies as st

from supervisor.errors import ConfigurationError, RemoteProtocolError
from supervisor.upstream.head import checked_headers, write_head

NASTY = st.binary(max_size=12) | st.sampled_from(
    [
        b"a\r\nb: c",
        b"a\nb",
        b"a\r\n\r\nGET / HTTP/1.1",
        b"\x0b",
        b"a\x85b",
        b" a ",
        b"\ta",
        b":",
        b"",
        b"\xe2\x80\xa8",
    ]
)


@given(
    method=st.sampled_from([b"POST", b"GET"]) | NASTY,
    target=st.sampled_from([b"/v1", b"*"]) | NASTY,
    headers=st.lists(
        st.tuples(st.sampled_from([b"X-A", b"Content-Length", b"Host"]) | NASTY, NASTY), max_size=3
    ),
)
def test_any_request_is_written_as_itself_or_refused(method, target, headers):
    """A server's parser reads back exactly the method, target and headers given, or nothing was written at all."""
    try:
        checked = checked_headers(method, [(b"Host", b"h"), *headers], body_bytes=2)
        data, _ = write_head(method, target, checked, max_head_bytes=1 << 16)
    except ConfigurationError:
        return
    server = h11.Connection(h11.SERVER)
    server.receive_data(data + b"{}")
    request = server.next_event()
    assert isinstance(request, h11.Request)
    assert (method, target) == (request.method, request.target)
    given_headers = [
        (name.lower(), value.strip(b" \t"))
        for name, value in headers
        if name.lower() not in (b"content-length", b"transfer-encoding")
    ]
    assert [(b"host", b"h"), *given_headers, (b"content-length", b"2")] == list(request.headers)
    assert isinstance(server.next_event(), h11.Data)
    assert isinstance(server.next_event(), h11.EndOfMessage)
    assert server.trailing_data[0] == b""


@pytest.mark.parametrize("character", [b"\x00", b"\x0b", b"\x0c", b"\r"])
@pytest.mark.parametrize("piece", [1 << 16, 1000, 1])
def test_white_space_before_a_control_character_costs_nothing(character, piece):
    """A head that a parser could spend seconds on is refused at once, at any split, also after a 1xx response."""
    evil = b"HTTP/1.1 103 Early\r\n\r\nHTTP/1.1 200 OK\r\nx:" + b" " * 60_000 + character + b"y\r\n\r\n"
    _, reader = write_head(b"GET", b"/", [(b"Host", b"h")], max_head_bytes=1 << 16)
    with pytest.raises(RemoteProtocolError, match="control character"):
        for at in range(0, len(evil), piece):
            assert reader.feed(evil[at : at + piece]) is None


RESPONSE = (
    b"HTTP/1.1 103 Early\r\nLink: a\r\n\r\nHTTP/1.1 200 OK\r\nX-A: b\r\n c\r\nContent-Length: 4\r\n\r\nbody"
)


@given(st.lists(st.integers(0, len(RESPONSE)), max_size=8))
def test_a_response_is_read_alike_at_any_split(cuts):
    """However a head arrives in pieces, it is the same head, and what follows it is kept byte for byte."""
    _, reader = write_head(b"GET", b"/", [(b"Host", b"h")], max_head_bytes=256)
    edges = [0, *sorted(cuts), len(RESPONSE)]
    rest = b""
    head = None
    for start, stop in itertools.pairwise(edges):
        piece = RESPONSE[start:stop]
        if head is not None:
            rest += piece
        elif piece and (head := reader.feed(piece)):
            rest = reader.rest
    assert head is not None
    assert (head.status, head.reason, head.http_version) == (200, b"OK", b"1.1")
    assert list(head.headers) == [(b"x-a", b"b c"), (b"content-length", b"4")]
    assert rest == b"body"


@given(st.lists(st.binary(min_size=1, max_size=200), max_size=20))
def test_garbage_is_bounded(pieces):
    """Whatever arrives, a reader ends with a head or RemoteProtocolError and never takes more than its bound."""
    _, reader = write_head(b"GET", b"/", [(b"Host", b"h")], max_head_bytes=256)
    with contextlib.suppress(RemoteProtocolError):
        for piece in pieces:
            if reader.feed(piece) is not None:
                break
            assert reader.received <= 256


@pytest.mark.parametrize(("slack", "accepted"), [(0, True), (1, False)])
def test_the_bound_is_exact(slack, accepted):
    """A head of `max_head_bytes` is read and one of a byte more is not, even if it arrives whole, with a body."""
    head = b"HTTP/1.1 200 OK\r\nX: "
    head += b"a" * (256 + slack - len(head) - 4) + b"\r\n\r\n"
    _, reader = write_head(b"GET", b"/", [(b"Host", b"h")], max_head_bytes=256)
    if accepted:
        assert reader.feed(head + b"b" * 999)
        assert reader.rest == b"b" * 999
    else:
        with pytest.raises(RemoteProtocolError, match="larger than 256"):
            reader.feed(head + b"b" * 999)
