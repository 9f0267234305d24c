"""Body framing: each rule of RFC 9112 sections 6.3 and 7.1 that matters to a client, with h11 as the oracle."""

from __future__ import annotations

import tracemalloc
from collections.abc import Iterable
from contextlib import suppress

import h11
import hypothesis.strategies as st
import pytest
from hypothesis import assume, example, given, settings

from supervisor.errors import RemoteProtocolError
from supervisor.wire.http1 import (
    ChunkedBody,
    ContentLengthBody,
    Framing,
    NoBody,
    UntilCloseBody,
    framing_for,
)
from tests.wire.feeding import cut

CHUNKED = [(b"Transfer-Encoding", b"chunked")]
places = st.lists(st.integers(0, 200), max_size=10)


def read(framing: Framing, pieces: Iterable[bytes]) -> tuple[bytes, bytes, str]:
    """Return the body, the excess and the fault's message, if any."""
    body = b""
    with suppress(RemoteProtocolError):
        for piece in pieces:
            body += framing.feed(piece)
    return body, framing.excess, str(framing.fault or "")


def each_byte(stream: bytes) -> list[bytes]:
    return [bytes([byte]) for byte in stream]


def chunk(data: bytes, extension: bytes = b"") -> bytes:
    return b"%x%b\r\n%b\r\n" % (len(data), extension, data)


# --- which framing ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("status", "method"),
    [(200, "HEAD"), (204, "POST"), (304, "POST"), (100, "POST"), (101, "POST"), (199, "POST"), (200, "CONNECT"), (299, "CONNECT")],
)  # fmt: skip
@pytest.mark.parametrize(
    "headers", [[], CHUNKED, [(b"content-length", b"5")], [(b"transfer-encoding", b"gzip")], [(b"content-length", b"x")]]
)  # fmt: skip
def test_no_body_whatever_the_headers_say(status, method, headers):
    """Answers to HEAD, 1xx, 204, 304 and an opened tunnel have no body, even where headers describe one."""
    framing = framing_for(status, headers, method=method)
    assert isinstance(framing, NoBody)
    assert framing.complete
    assert framing.reusable
    assert framing.feed(b"HTTP/1.1") == b""
    assert framing.excess == b"HTTP/1.1"
    assert not framing.reusable
    assert framing.end()


def test_a_refused_tunnel_has_a_body():
    """A CONNECT that failed is framed like any other answer."""
    assert isinstance(framing_for(407, [(b"content-length", b"3")], method="CONNECT"), ContentLengthBody)


@pytest.mark.parametrize("value", [b"chunked", b"Chunked", b" chunked\t", b"chunked,", b", chunked"])
def test_chunked(value):
    """The one transfer coding we take, in any case, with the empty list elements that are to be ignored."""
    assert isinstance(framing_for(200, [(b"transfer-encoding", value)]), ChunkedBody)


@pytest.mark.parametrize(
    "values",
    [
        [b"gzip, chunked"],
        [b"chunked, gzip"],
        [b"chunked, chunked"],
        [b"chunked", b"chunked"],
        [b"gzip", b"chunked"],
        [b"identity"],
        [b""],
        [b"chunked;q=1"],
        [b"\x0bchunked"],
        [b'"chunked"'],
        [b"xchunked"],
    ],
)
@pytest.mark.parametrize("length", [[], [(b"content-length", b"5")]])
def test_any_other_transfer_coding_is_refused(values, length):
    """No other coding was asked for, and guessing where such a body ends is how responses get mixed up."""
    headers = [(b"Transfer-Encoding", value) for value in values]
    with pytest.raises(RemoteProtocolError, match="transfer coding"):
        framing_for(200, headers + length)


@pytest.mark.parametrize("length", [b"5", b"7", b"nonsense"])
def test_chunked_wins_over_a_length_and_ends_the_connection(length):
    """RFC 9112 section 6.3: the length is ignored, but the connection must not be used again."""
    framing = framing_for(200, [(b"content-length", length), *CHUNKED])
    assert framing.feed(chunk(b"hello") + b"0\r\n\r\n") == b"hello"
    assert framing.complete
    assert not framing.excess
    assert not framing.reusable


@pytest.mark.parametrize(
    ("values", "length"),
    [([b"5"], 5), ([b"5", b"5"], 5), ([b"5, 5 ,5"], 5), ([b" 5\t"], 5), ([b"0"], 0), ([b"005", b"5"], 5), ([b"9223372036854775807"], 2**63 - 1)],
)  # fmt: skip
def test_content_length(values, length):
    """A length, also when repeated without contradiction."""
    framing = framing_for(200, [(b"Content-Length", value) for value in values])
    assert isinstance(framing, ContentLengthBody)
    assert framing.remaining == length
    assert framing.complete == (length == 0)


@pytest.mark.parametrize(
    "values",
    [[b"5", b"6"], [b"5, 6"], [b"5", b"5", b"0"], [b""], [b"5,"], [b"+5"], [b"-5"], [b"5_0"], [b"0x5"], [b"5.0"], [b"5 5"],
     ["\u0665".encode()], [b"\x0b5"], [b"9223372036854775808"], [b"9" * 5000], [b"5", b"x"]],
)  # fmt: skip
def test_a_bad_content_length_is_refused(values):
    """Contradiction, anything but digits, and lengths beyond 64 bits."""
    with pytest.raises(RemoteProtocolError, match=r"Content-Length|beyond any limit"):
        framing_for(200, [(b"content-length", value) for value in values])


def test_until_close():
    """Without either header the body lasts until the peer closes: complete then, and only then."""
    framing = framing_for(200, [(b"content-type", b"text/event-stream")])
    assert isinstance(framing, UntilCloseBody)
    assert framing.feed(b"abc") == b"abc"
    assert not framing.complete
    assert not framing.reusable
    assert framing.end()
    assert framing.complete
    assert not framing.reusable


# --- content-length --------------------------------------------------------------------------------------------------


@given(st.binary(max_size=40), st.binary(max_size=10), places)
def test_content_length_at_random_splits(body, excess, at):
    """The body ends after its length; what follows is excess."""
    framing = ContentLengthBody(len(body))
    assert read(framing, cut(body + excess, at)) == (body, excess, "")
    assert framing.complete
    assert framing.reusable == (not excess)
    assert framing.end()


def test_a_short_body_is_incomplete():
    """A peer that closes before the announced length has not sent the whole body."""
    framing = ContentLengthBody(5)
    assert framing.feed(b"1234") == b"1234"
    assert framing.remaining == 1
    assert not framing.end()
    assert not framing.complete


def test_a_closed_connection_is_not_reusable():
    """After the peer has closed nothing can follow, complete or not."""
    for framing, stream in [(ContentLengthBody(1), b"x"), (ChunkedBody(), b"0\r\n\r\n"), (NoBody(), b"")]:
        framing.feed(stream)
        assert framing.reusable
        assert framing.end()
        assert not framing.reusable


def test_excess_is_bounded():
    """A peer that goes on sending after the end does not fill memory."""
    for framing in (ContentLengthBody(0), NoBody(), ChunkedBody()):
        framing.feed(b"0\r\n\r\n")
        for _ in range(20):
            framing.feed(b"x" * 30_000)
        assert 64 << 10 <= len(framing.excess) < 100_000


# --- chunked ---------------------------------------------------------------------------------------------------------

data_pieces = st.lists(
    st.binary(min_size=1, max_size=30) | st.sampled_from([b"\r\n", b"a\r\nb", b"0\r\n\r\n", b"data: x\n\n", b"\r", b"\n"]), max_size=8
)  # fmt: skip
size_formats = st.sampled_from([b"%x", b"%X", b"0%x", b"%015x", b"%x;a=b", b'%x;a="b c"', b"%x;"])
endings = st.sampled_from([b"0\r\n\r\n", b"00\r\n\r\n", b"0;last\r\n\r\n", b"0\r\nX-A: 1\r\nx-b:2 \r\n\r\n"])


def _h11_body(stream: bytes) -> tuple[bytes, bool, bytes]:
    """Return the body h11 reads, whether it ended, and what it left over; raises h11.RemoteProtocolError."""
    connection = h11.Connection(h11.CLIENT)
    connection.send(h11.Request(method="POST", target="/", headers=[("host", "x"), ("content-length", "0")]))
    connection.send(h11.EndOfMessage())
    connection.receive_data(b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n")
    assert isinstance(connection.next_event(), h11.Response)
    if stream:
        connection.receive_data(stream)
    body = b""
    while isinstance(event := connection.next_event(), h11.Data):
        body += event.data
    return body, isinstance(event, h11.EndOfMessage), connection.trailing_data[0]


@settings(max_examples=300, deadline=None)
@given(data_pieces, st.data(), endings, st.sampled_from([b"", b"HTTP/1.1 200"]), places)
def test_chunked_agrees_with_h11(pieces, data, ending, excess, at):
    """Well-formed bodies, in all spellings of a size, at random splits and byte by byte."""
    stream = b"".join(data.draw(size_formats) % len(piece) + b"\r\n" + piece + b"\r\n" for piece in pieces)
    stream += ending + excess
    body, complete, left = _h11_body(stream)
    assert (b"".join(pieces), True, excess) == (body, complete, left)
    for fed in ([stream], cut(stream, at), each_byte(stream)):
        framing = ChunkedBody()
        assert read(framing, fed) == (body, left, "")
        assert framing.complete
        assert framing.reusable == (not excess)
        assert (framing.trailers == ((b"x-a", b"1"), (b"x-b", b"2"))) == (b"X-A" in ending)


fragments = st.lists(
    st.sampled_from([b"5\r\nhello\r\n", b"1\r\nx\r\n", b"2\r\n\r\n\r\n", b"0", b"5", b"\r\n", b"\r", b"\n", b";", b"a=b", b" ", b"\t",
                     b"+", b"0x", b"_", b"-", b"F", b"g", b"hello", b"0\r\n\r\n", b"x: y\r\n", b"\x00", b"\xff"])
    | st.binary(max_size=3),
    max_size=10,
).map(b"".join)  # fmt: skip


@settings(max_examples=1500, deadline=None)
@given(fragments, places)
@example(b"5 \r\nhello\r\n", [])
@example(b"5\r\nhello\r\r\n", [])
@example(b"1\r\nx\r\n1\r\nxy\r\n", [])
def test_chunked_never_takes_what_h11_refuses(stream, at):
    """On soup the framing is never laxer than h11, and where both accept they see the same body."""
    ours = read(ChunkedBody(), [stream])
    for fed in (cut(stream, at), each_byte(stream)):
        assert ours == read(ChunkedBody(), fed)
    if ours[2]:
        return
    try:
        body, complete, left = _h11_body(stream)
    except h11.RemoteProtocolError:
        # We still wait for the end of a size line, which h11 has given up on early; a line end shows that we refuse it too.
        framing = ChunkedBody()
        assert read(framing, [stream + b"\r\n\r\n"])[2] or read(ChunkedBody(), [stream + b"x\r\n"])[2]
        return
    framing = ChunkedBody()
    framing.feed(stream)
    # h11 ends trailers at a bare LF too; we do not.
    assume(not (complete and not framing.complete))
    assert (body, complete, left if complete else b"") == (ours[0], framing.complete, ours[1])


BAD = [
    b" 5\r\nhello\r\n",
    b"5 \r\nhello\r\n",
    b"\t5\r\nhello\r\n",
    b"5\t\r\nhello\r\n",
    b"+5\r\nhello\r\n",
    b"-5\r\nhello\r\n",
    b"0x5\r\nhello\r\n",
    b"0_5\r\nhello\r\n",
    b"5\x0b\r\nhello\r\n",
    b"\r\n5\r\nhello\r\n",
    b";a\r\n",
    b"g\r\n",
    b"5\nhello\r\n",
    b"5\n\r\nhello\r\n",
    b"5;a\nb\r\nhello\r\n",
    b"5;a\rb\r\nhello\r\n",
    b"5;a\x00\r\nhello\r\n",
    b"8000000000000000\r\n",
    b"FFFFFFFFFFFFFFFF\r\n",
    b"00000000000000005\r\nhello\r\n",
    b"5\r\nhello\n0\r\n\r\n",
    b"5\r\nhello\r0\r\n\r\n",
    b"5\r\nhello0\r\n\r\n",
    b"5\r\nhelloXX0\r\n\r\n",
    b"5\r\nhello!\r\n0\r\n\r\n",
    b"0\r\nbad\r\n\r\n",
    b"0\r\na b: c\r\n\r\n",
    b"0\r\na : c\r\n\r\n",
    b"0\r\n: c\r\n\r\n",
    b"0\r\na: b\r\n folded\r\n\r\n",
    b"0\r\na: \x00\r\n\r\n",
    b"0\r\na: b\nc: d\r\n\r\n",
    b"0\r\na:\x0bb\r\n\r\n",
]


@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("before", [b"", b"2\r\nok\r\n", b"2\r\nok\r\n" * 3])
def test_bad_chunks_are_refused(bad, before):
    """Every trick with sizes, line ends and trailers is a fault, at any split; what came before it is kept."""
    stream = before + bad
    for pieces in ([stream], each_byte(stream), *(cut(stream, [at]) for at in range(len(stream)))):
        framing = ChunkedBody()
        body, _, fault = read(framing, pieces)
        assert fault
        assert body.startswith(b"ok" * before.count(b"ok"))
        assert not framing.complete
        assert not framing.end()
        with pytest.raises(RemoteProtocolError):
            framing.feed(b"0\r\n\r\n")


def test_a_bad_size_among_many_good_chunks_is_refused():
    """The way that takes a whole read at once is as strict as the other: `int` would take all of these sizes."""
    for bad in (b" 5", b"5 ", b"+5", b"0x5", b"0_5", b"5\n", b"0" * 16 + b"5"):
        stream = b"".join([chunk(b"hello") * 5, bad, b"\r\nhello\r\n", chunk(b"hello") * 5])
        body, _, fault = read(ChunkedBody(), [stream])
        assert (body, fault != "") == (b"hello" * 5, True)


def test_body_before_a_fault_is_not_lost():
    """The read that holds the fault still yields the body before it; the next one raises."""
    framing = ChunkedBody()
    assert framing.feed(b"5\r\nhello\r\nnonsense\r\n") == b"hello"
    assert isinstance(framing.fault, RemoteProtocolError)
    assert not framing.reusable
    with pytest.raises(RemoteProtocolError, match="malformed chunk size: b'nonsense'"):
        framing.feed(b"5\r\nhello\r\n")


@pytest.mark.parametrize(
    ("start", "limit", "match"),
    [
        (b"5;", 4 << 10, "chunk size line of more than 4096"),
        (b"0\r\nx: ", 16 << 10, "trailer section of more than 16384"),
    ],
)
def test_lines_of_the_framing_are_bounded(start, limit, match):
    """Extensions and trailers up to their limit, CRLF or not, however they arrive; never more is held."""
    first = start.rpartition(b"\r\n")[0]
    longest = start + b"x" * (limit - len(start) + len(first) + (2 if first else 0))
    for step in (1, 1000, 1 << 20):
        for over, fails in ((b"", False), (b"x", True), (b"\r", True)):
            framing = ChunkedBody()
            stream = longest + over + b"\r\n"
            _, _, fault = read(framing, cut(stream, range(0, len(stream), step)))
            assert bool(fault) == fails
            if over == b"x":
                assert match in fault
        framing = ChunkedBody()
        with suppress(RemoteProtocolError):
            for piece in cut(start + b"x" * 40_000, range(0, 40_000, step)):
                framing.feed(piece)
                assert framing.buffered_bytes <= limit + 1
        assert match in str(framing.fault)


def test_many_small_trailers_are_bounded():
    """The limit is on the trailers together, not on each."""
    for step in (5, 1 << 20):
        framing = ChunkedBody()
        stream = b"0\r\n" + b"a:b\r\n" * 4000
        _, _, fault = read(framing, cut(stream, range(0, len(stream), step)))
        assert "16384" in fault
        assert framing.buffered_bytes <= (16 << 10) + 2


def test_a_chunked_body_that_stops_is_incomplete():
    """Without the last chunk and the empty line after it, the peer closing is a truncation, at every byte."""
    stream = chunk(b"hello") + b"0\r\nx: y\r\n\r\n"
    for length in range(len(stream)):
        framing = ChunkedBody()
        framing.feed(stream[:length])
        assert not framing.complete
        assert not framing.end()


def test_a_large_chunk_is_passed_on_as_it_comes():
    """A read inside one chunk is returned itself, without a copy; the size of a chunk costs no memory."""
    framing = ChunkedBody()
    assert framing.feed(b"7fffffffffffffff\r\n") == b""
    piece = b"x" * 1000
    assert framing.feed(piece) is piece
    assert framing.buffered_bytes == 0


def test_repr_shows_state():
    """What a log needs to see of a framing."""
    framing = ChunkedBody()
    assert repr(framing) == "<ChunkedBody open, 0 bytes in excess>"
    framing.feed(b"0\r\n\r\nabc")
    assert repr(framing) == "<ChunkedBody complete, 3 bytes in excess>"
    broken = ChunkedBody()
    with pytest.raises(RemoteProtocolError):
        broken.feed(b"x\r\n")
    assert repr(broken) == "<ChunkedBody failed, 0 bytes in excess>"
    closed = ContentLengthBody(1)
    closed.end()
    assert repr(closed) == "<ContentLengthBody closed, 0 bytes in excess>"


@settings(max_examples=300, deadline=None)
@given(st.lists(st.binary(max_size=40), max_size=10))
def test_arbitrary_bytes_never_crash(pieces):
    """Whatever comes: bytes, or a RemoteProtocolError."""
    for framing in (ChunkedBody(), ContentLengthBody(20), UntilCloseBody(), NoBody()):
        body, excess, _ = read(framing, pieces)
        assert len(body) + len(excess) <= sum(map(len, pieces))


def test_a_trickled_body_holds_nothing():
    """A body of 100,000 chunks fed in small pieces leaves nothing behind."""
    framing = ChunkedBody()
    stream = chunk(b"hello") * 10
    tracemalloc.start()
    try:
        for _ in range(1000):
            for piece in cut(stream, range(0, len(stream), 7)):
                framing.feed(piece)
        held, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert held < 10_000


def test_white_space_before_a_bad_trailer_costs_nothing():
    """A trailer as long as is allowed, blank but for a control character at its end, is refused at once, a thousand times."""
    body = b"0\r\nx:" + b" " * 16_000 + b"\x01\r\n\r\n"
    for _ in range(1000):
        with pytest.raises(RemoteProtocolError, match="malformed trailer"):
            _fed_to_the_end(ChunkedBody(), body)


def _fed_to_the_end(framing: ChunkedBody, body: bytes) -> None:
    framing.feed(body)
    if framing.fault is not None:
        raise framing.fault
