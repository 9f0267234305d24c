"""`SSEDecoder` against the standard's own algorithm, another parser, and hostile input."""

from __future__ import annotations

import codecs
import tracemalloc
from collections.abc import Iterable

import hypothesis.strategies as st
import pytest
from httpx_sse._decoders import SSEDecoder as HttpxSSEDecoder  # no public sans-IO entry point
from httpx_sse._decoders import SSELineDecoder
from hypothesis import example, given, settings

from supervisor.errors import ConfigurationError, RemoteProtocolError
from supervisor.wire import SSEDecoder, WireEvent
from tests.wire.feeding import as_text, cut, decode, decode_until_fault
from tests.wire.whatwg import interpret

# Pieces of event streams: what providers send, what the standard allows, and what tempts a decoder to go wrong.
FRAGMENTS = [
    b'data: {"a":1}\n\n', b"data: x\n\n", b"event: delta\ndata: y\n\n", b"event:delta\ndata: y\n\n", b"data: [DONE]\n\n",
    b"data", b"data:", b"data: ", b"event", b"event: ", b"event: x", b"id", b"id: 7\n", b"id:\n", b"id: a\0b\n", b"retry: 10\n",
    b"retry: -1\n", b"retry: 1_0\n", b"retry:  5\n", b"retry: \xd9\xa3\n", b": ping\n", b":", b": ", b" ", b"x", b"foo: bar\n",
    b"\n", b"\n\n", b"\n\n\n", b"\r", b"\r\n", b"\r\n\r\n", b"\n\r", b"\xef\xbb\xbf", b"\xef\xbb", b"\xef", b"\xe2\x80\xa8",
    "\x85\x0b\x0c\x1c\u2028\u2029".encode(), b"\xff", b"\xe2\x80", b"\0", b'{"error": "no"}', b"dat", b"a: 1",
]  # fmt: skip
soup = st.lists(st.sampled_from(FRAGMENTS) | st.binary(max_size=4), max_size=24).map(b"".join)
places = st.lists(st.integers(0, 200), max_size=12)

# --- oracles ---------------------------------------------------------------------------------------------------------


def _is_as_the_standard_says(stream: bytes, pieces: Iterable[bytes]) -> None:
    expected = interpret(stream)
    events, decoder = decode(pieces)
    assert expected.events == as_text(events)
    assert expected.last_event_id == decoder.last_event_id
    assert expected.retry == decoder.retry
    assert expected.comments == decoder.comments
    assert "".join(f"{line}\n" for line in expected.unknown) == decoder.stray.decode("utf-8", "replace")
    assert decoder.buffered_bytes == len(decoder.pending)


@settings(max_examples=400, deadline=None)
@given(soup)
@example(b"\xef\xbb\xbf\xef\xbb\xbfdata: x\n\ndata: y\n\n")
@example(b"data: x\n\n\ndata: y\n\n")
@example(b"data: x\n\ndata: y\ndata: z\n\ndata: w\n\n\n")
@example(b"event: a\ndata: x\n\nevent: a\ndata: x\n\ndata: 1\n\ndata: 2\n\n\nevent: a\ndata: x\n\n")
@example(b"id: 1\ndata: x\n\ndata: y\n\nid: 2\nretry: 3\ndata: z\n")
@example(b"data: x\r\r\ndata: y\n\r\n")
def test_agrees_with_the_standard_at_every_split(stream):
    """Soup of event-stream fragments means what the standard's algorithm says, wherever it is cut in two."""
    for at in range(len(stream) + 1):
        _is_as_the_standard_says(stream, cut(stream, [at]))
    _is_as_the_standard_says(stream, [bytes([byte]) for byte in stream])


@settings(max_examples=400, deadline=None)
@given(soup, places)
def test_agrees_with_the_standard_at_random_splits(stream, at):
    """The same with several cuts."""
    _is_as_the_standard_says(stream, cut(stream, at))


BLOCKS = [
    b"data: {}\n\n",
    b"data: \n\n",
    b"data:x\n\n",
    b"event: a\ndata: 1\n\n",
    b"event: b\ndata: 2\n\n",
    b": ping\n\n",
    b"data: 1\ndata: 2\n\n",
    b"event: a\n\n",
    b"event: a\nevent: b\n\n",
    b"\n",
    b"data: 1\nevent: a\n\n",
    b"id: 3\ndata: 4\n\n",
    b"id: 4\nevent: a\ndata: 4\n\n",
    b"event: a\nid: 5\ndata: 4\n\n",
    b"data: 1\nid\n\n",
    b"id: \xff\n\n",
    b"id: \xff\ndata: 5\n\n",
    b"id: a\0b\ndata: 5\n\n",
    b"id: id: 3\ndata: data: 5\n\n",
    b"id: 6data: 6\n\n",
    b"event: adata: 6\n\n",
    b"xdata: 6\n\n",
    b"event:\ndata: 5\n\n",
    b"retry: 9\n\n",
    b"event: a\ndata: 1\n: x\n",
]
blocks = st.lists(st.sampled_from(BLOCKS), max_size=12).map(b"".join)


@settings(max_examples=600, deadline=None)
@given(blocks, st.sampled_from([b"\n", b"\r\n", b"\r"]), st.lists(st.integers(0, 120), max_size=3))
@example(b"event:\ndata: 5\n\n" * 3, b"\n", [17])
@example(b"event: a\ndata: 1\n\n" + b"event: a\ndata: 1\ndata: 2\nevent: a\ndata: 3\n\n", b"\n", [18])
@example(b"retry: 9\n\ndata: 1\n\ndata: 2\n\n", b"\n", [10])
def test_the_block_way_agrees_with_the_standard(stream, line_end, at):
    """Nearly regular runs of blocks, which the fast way must tell from regular ones, with each of the line ends."""
    stream = stream.replace(b"\n", line_end)
    _is_as_the_standard_says(stream, cut(stream, at))


DATA, EVENT, ID = b"data: 1\n\n", b"event: a\ndata: 1\n\n", b"id: 3\ndata: 4\n\n"
NAMED = [EVENT, EVENT, DATA]  # its name is known, but what is expected is data alone


@pytest.mark.parametrize(
    "reads",
    [
        [DATA, b"data: 1\r2\n\n"],
        [DATA, b"data: \r\n\n"],
        [EVENT, EVENT, b"event: a\ndata: 1\r2\n\n"],
        [*NAMED, b"event: a\ndata: 1\r2\n\n"],
        [ID, ID, b"id: 3\ndata: 4\r5\n\n"],
        [ID, ID, b"id: 3\r4\ndata: 4\n\n"],
        [ID, ID, b"id: 5\n\n", DATA],
        [ID, ID, b"id: 5\nfoo\n\n", DATA],
        [ID, ID, b"id: a\0b\ndata: 5\n\n", DATA],
        [ID, ID, b"id: 3data: 4\n\n"],
        [*NAMED, EVENT + b"event: a\ndata: 2\nid: 9\nevent: a\ndata: 3\n\n"],
        [EVENT, EVENT, EVENT + b"event: a\nda", b"ta: 2\n\n"],
        [EVENT, EVENT, EVENT + b"event: a\ndata: 2", b"3\n\n" + EVENT],
        [EVENT, EVENT, EVENT + b"event: a\ndata: 2\n", b"data: 3\n\n" + EVENT],
        [DATA, DATA * 3, b"data: 1\n\ndata: 1\ndata: 2\n\ndata: 3\n\n"],
        [DATA, b": c\ndata: 1\n", b"data: 2\n\n"],
        [DATA, b"data: 1\ndata: 2\n", b"data: 3\n\n"],
        [DATA, b"data: 2\r\r", b"\ndata: 3\n\n", b"\n"],
        [DATA, b"data: 2\n", b"\n" + DATA, DATA],
        [ID, ID * 3 + b"id: 4\nda", b"ta: 5\n\n" + ID],
        [ID, ID, b"id: 4\nevent: a\ndata: 4\n\n" * 3, b"event: b\ndata: 4\n\n", DATA],
    ],
)
def test_a_read_that_is_nearly_as_expected(reads):
    """What the reads before let expect (a name, an id, the same lines again) is told from what only begins like it."""
    _is_as_the_standard_says(b"".join(reads), reads)


@settings(max_examples=600, deadline=None)
@given(
    st.lists(st.sampled_from(BLOCKS), min_size=1, max_size=3).flatmap(
        lambda kinds: st.lists(st.lists(st.sampled_from(kinds), max_size=4).map(b"".join), max_size=6)
    ),
    st.sampled_from([b"\n", b"\r\n", b"\r"]),
    st.lists(st.integers(0, 120), max_size=3),
)
def test_reads_of_whole_blocks_agree_with_the_standard(reads, line_end, at):
    """Reads that are one or several like blocks, which are not split into lines, and a few cuts elsewhere."""
    reads = [read.replace(b"\n", line_end) for read in reads]
    whole = [len(b"".join(reads[:count])) for count in range(len(reads))]
    _is_as_the_standard_says(b"".join(reads), cut(b"".join(reads), [*whole, *at]))


def _httpx_sse(pieces: Iterable[bytes]) -> list[tuple[str, str, str]]:
    text, line_decoder, decoder = (
        codecs.getincrementaldecoder("utf-8")("replace"),
        SSELineDecoder(),
        HttpxSSEDecoder(),
    )
    lines = [line for piece in pieces for line in line_decoder.decode(text.decode(piece))]
    found = [decoder.decode(line) for line in lines]
    return [(e.event, e.data, e.id) for e in found if e is not None]


# What httpx-sse 0.4 does otherwise than the standard, and what therefore is kept from it:
# - it keeps a leading BOM, so the first field is unknown;
# - it dispatches blocks without data if they have an event name or a retry, or if any id was seen before;
# - it takes `retry: -1`, `retry: 1_0`, and ` 5` for numbers, and forgets the time at the next event (not compared);
# - its event name is empty where the standard says `message` (the models put it right).
safe_blocks = st.lists(
    st.tuples(
        st.sampled_from([b"", b": ping\n", b"event: a\n", b"event:b\n", b"event\n", b"foo: bar\n", b" data: 1\n"]),
        st.sampled_from([b"", b"id: 4\n", b"id\n", b"id: a\0\n"]),
        st.lists(
            st.sampled_from([b"data\n", b"data: x\n", b"data:  y\n", "data: \u2028\x85é\n".encode()]), min_size=1, max_size=3
        ).map(b"".join),
    ).map(lambda block: b"".join(block) + b"\n"),
    max_size=6,
).map(b"".join)  # fmt: skip


@settings(max_examples=300, deadline=None)
@given(safe_blocks, st.sampled_from([b"\n", b"\r\n", b"\r"]), places)
def test_agrees_with_httpx_sse_where_that_is_right(stream, line_end, at):
    """A second parser, by other people, sees the same events in what it reads as the standard says."""
    # It holds a CR back until the next character; a comment lets it go.
    stream = stream.replace(b"\n", line_end) + b": end\n"
    events, _ = decode(cut(stream, at))
    assert _httpx_sse([stream]) == [(e.event, e.data.decode(), e.id) for e in events]


@pytest.mark.parametrize(
    ("stream", "theirs"),
    [
        (b"\xef\xbb\xbfdata: x\n\n", 0),
        (b"event: a\n\n", 1),
        (b"id: 1\n\n: ping\n\n", 2),
        (b"retry: -1\n\n", 1),
    ],
)
def test_httpx_sse_is_still_wrong_about(stream, theirs):
    """Each exception above is still needed: httpx-sse differs from the standard here."""
    assert theirs == len(_httpx_sse([stream]))
    assert theirs != len(interpret(stream).events)


# --- rules one by one ------------------------------------------------------------------------------------------------


def test_an_event_is_told_at_its_last_byte():
    """A CR ends a line at once: nothing waits for a byte which may be long in coming."""
    decoder = SSEDecoder()
    assert decoder.feed(b"data: x\r") == []
    assert decoder.feed(b"\r") == [WireEvent(b"x")]
    assert decoder.feed(b"\n") == []
    assert decoder.feed(b"data: y\n\n") == [WireEvent(b"y")]


def test_an_empty_read_between_cr_and_lf_changes_nothing():
    """CRLF is one line end also when an empty read comes between."""
    events, _ = decode([b"data: x\r", b"", b"\ndata: y\n\n"])
    assert events == [WireEvent(b"x\ny")]


def test_data_is_the_bytes_received():
    """Broken UTF-8 in data is passed on as it came; who reads the data decides."""
    events, _ = decode([b"data: \xff\xfe\n\n", b"event: \xff\ndata: 1\n\n"])
    assert events == [WireEvent(b"\xff\xfe"), WireEvent(b"1", "\ufffd")]


def test_an_undispatched_block_does_not_change_the_last_event_id():
    """The id of a block that never ended is not the last event id, neither before the end nor after."""
    decoder = SSEDecoder()
    decoder.feed(b"id: 1\ndata: x\n\nid: 2\ndata: y\n")
    assert decoder.last_event_id == "1"
    decoder.end()
    assert decoder.last_event_id == "1"


def test_a_block_of_an_id_alone_sets_the_last_event_id():
    """No event is dispatched, but its id is in force for the next ones."""
    events, _ = decode([b"id: 1\n\ndata: x\n\ndata: y\n\n"])
    assert events == [WireEvent(b"x", id="1"), WireEvent(b"y", id="1")]


def test_a_retry_beyond_every_integer_is_lowered():
    """Thousands of digits neither break Python's limit on them nor leave the range of 64 bits."""
    _, decoder = decode([b"retry: " + b"9" * 9000 + b"\n"])
    assert decoder.retry == 2**63 - 1
    _, decoder = decode([b"retry: " + b"0" * 9000 + b"12\n"])
    assert decoder.retry == 12


def test_stray_lines_are_kept_up_to_their_limit():
    """A JSON error in place of an event stream can be reported: its lines are kept, the first 4 KiB of them."""
    decoder = SSEDecoder()
    decoder.feed(b'{"error":\n: ping\ndata: x\n\nerror: overloaded\n "no"}')
    assert decoder.stray == b'{"error":\nerror: overloaded\n'
    assert decoder.pending == b' "no"}'
    decoder.feed((b"x" * 3000 + b"\n") * 3)
    assert len(decoder.stray) == 4096
    decoder.feed(b"x\n")
    assert len(decoder.stray) == 4096


def test_stray_lines_are_placed_among_the_events_of_their_read():
    """Each is told after the number of events before it, whole, and only until the next read that needs a second look."""
    decoder = SSEDecoder()
    long = b"x" * 5000
    assert len(decoder.feed(b"a\ndata: 1\n\ndata: 2\nb: c\n\n: d\n" + long + b"\n")) == 2
    assert decoder.asides == [(0, b"a"), (1, b"b: c"), (2, long)]
    decoder.feed(b"e\n: f\n\n")
    assert decoder.asides == [(0, b"e")]
    decoder.feed(b": g\n")
    assert decoder.asides == []


def test_pending_is_the_whole_unfinished_line():
    """A JSON body without a line end can be read when the body has ended."""
    _, decoder = decode([b'{"error":', b' {"message": "no"}}'])
    assert decoder.pending == b'{"error": {"message": "no"}}'


def test_event_names_are_remembered_within_bounds():
    """A peer that invents event names gets them all, and does not make the table of names grow."""
    decoder = SSEDecoder()
    assert decoder.feed(b"event: " + b"n" * 500 + b"\ndata: 1\n\n")[0].event == "n" * 500
    blocks = [f"event: n{number}\ndata: 1\n\n".encode() for number in range(500)]
    assert [e.event for e in decoder.feed(b"".join(blocks))] == [f"n{number}" for number in range(500)]
    assert len(decoder._names) == 64
    assert max(map(len, decoder._names)) <= 128
    assert [e.event for e in decoder.feed(b"".join(blocks) * 2)] == [
        f"n{number}" for number in range(500)
    ] * 2


@pytest.mark.parametrize("field", ["max_line_bytes", "max_event_bytes"])
@pytest.mark.parametrize("value", [0, -1, None, 1.5])
def test_a_limit_must_be_a_positive_number(field, value):
    """A limit that is none is refused by name."""
    with pytest.raises(ConfigurationError, match=field):
        SSEDecoder(**{field: value})


def test_feeding_after_the_end_is_a_mistake_of_the_caller():
    """A decoder belongs to one response; using it for another says so."""
    decoder = SSEDecoder()
    decoder.end()
    with pytest.raises(RuntimeError, match="make a new one"):
        decoder.feed(b"data: x\n\n")


def test_repr_shows_state_and_no_content():
    """The repr can be logged: it counts, and quotes nothing of the answer."""
    decoder = SSEDecoder(max_line_bytes=20)
    decoder.feed(b": hi\nevent: abc\ndata: secret\ndata: secret")
    assert repr(decoder) == "<SSEDecoder open, 21 bytes buffered, 1 comments>"
    with pytest.raises(RemoteProtocolError):
        decoder.feed(b"x" * 20)
    assert repr(decoder) == "<SSEDecoder failed, 0 bytes buffered, 1 comments>"
    decoder.end()
    assert repr(decoder) == "<SSEDecoder ended, 0 bytes buffered, 1 comments>"


# --- limits ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("step", [1, 7, 1000])
@pytest.mark.parametrize("start", [b"data: ", b": ", b"foo", b"id: ", b"event: "])
def test_a_line_at_its_limit_passes_and_one_byte_more_does_not(start, step):
    """The line limit counts the line without its end, for every kind of line and however it arrives."""
    for end in (b"\n", b"\r\n", b"\r"):
        for over in (0, 1):
            stream = start.ljust(100 + over, b"x") + end + b"data: y\n\n"
            decoder = SSEDecoder(max_line_bytes=100)
            events, fault = decode_until_fault(cut(stream, range(0, 120, step)), decoder)
            assert ("max_line_bytes" in fault) == bool(over)
            assert len(events) == 1 - over


@pytest.mark.parametrize("block", [b"data: %b\n\n", b"event: a\ndata: %b\n\n", b"id: 1\ndata: %b\n\n"])
@pytest.mark.parametrize("limit", ["max_line_bytes", "max_event_bytes"])
def test_a_limit_holds_for_reads_of_whole_blocks(block, limit):
    """The ways that do not look at single lines refuse what is too long, too, after any number of blocks that were not."""
    for most, before in ((94, 1), (94, 3), (100, 1), (100, 3)):
        for reads in ([before * [block % b"x"]], [[block % b"x"]] * before):
            for over in (0, 1):
                decoder = SSEDecoder(**{limit: most})
                size = most + over - (6 if limit == "max_line_bytes" else 0)
                events, fault = decode_until_fault(
                    [*map(b"".join, reads), block % (b"x" * size), block % b"x"], decoder
                )
                assert (limit in fault) == bool(over)
                assert len(events) == before + 2 * (1 - over)


@pytest.mark.parametrize("step", [1, 7, 1000])
def test_an_event_at_its_limit_passes_and_one_byte_more_does_not(step):
    """The event limit counts the data as delivered: the lines and the LF between them."""
    for lines in ([50, 49], [100], [0] * 101, [33, 33, 32]):
        for over in (0, 1):
            sizes = [*lines[:-1], lines[-1] + over]
            stream = b"".join(b"data: " + b"x" * size + b"\n" for size in sizes) + b"\n"
            decoder = SSEDecoder(max_event_bytes=100)
            events, fault = decode_until_fault(cut(stream, range(0, 2000, step)), decoder)
            assert ("max_event_bytes" in fault) == bool(over)
            assert [100] * (1 - over) == [len(event.data) for event in events]


def test_events_before_a_fault_are_not_lost():
    """What was decoded before the limit was passed is returned; `fault` is set, and the next feed raises."""
    decoder = SSEDecoder(max_line_bytes=20)
    assert decoder.feed(b"data: x\n\ndata: y\n\n" + b"data: " + b"z" * 20) == [
        WireEvent(b"x"),
        WireEvent(b"y"),
    ]
    assert isinstance(decoder.fault, RemoteProtocolError)
    assert decoder.buffered_bytes == 0
    for _ in range(2):
        with pytest.raises(RemoteProtocolError, match="20 bytes"):
            decoder.feed(b"data: x\n\n")


@settings(max_examples=300, deadline=None)
@given(soup, places, st.integers(1, 12), st.integers(1, 12))
@example(b"\xef\xbb\xbf", [], 1, 1)
def test_limits_do_not_depend_on_the_splits(stream, at, max_line, max_event):
    """One read, several, and byte by byte give the same events and the same fault; no more is held than allowed."""
    whole = decode_until_fault([stream], SSEDecoder(max_line_bytes=max_line, max_event_bytes=max_event))
    for pieces in (cut(stream, at), [bytes([byte]) for byte in stream]):
        decoder = SSEDecoder(max_line_bytes=max_line, max_event_bytes=max_event)
        events: list[WireEvent] = []
        try:
            for piece in pieces:
                events += decoder.feed(piece)
                assert decoder.buffered_bytes <= max_event + 2 * max_line + 3  # at most 3 of a possible BOM
                assert len(decoder.pending) <= max(max_line, 2)
                assert len(decoder.stray) <= 4096
        except RemoteProtocolError:
            pass
        assert whole == (events, str(decoder.fault or ""))


@settings(max_examples=300, deadline=None)
@given(st.lists(st.binary(max_size=64), max_size=20))
def test_arbitrary_bytes_never_crash(pieces):
    """Whatever comes, the decoder returns events and holds no more than it was given."""
    decoder = SSEDecoder()
    for piece in pieces:
        for event in decoder.feed(piece):
            assert type(event.data) is bytes
    assert decoder.buffered_bytes <= 3 * sum(map(len, pieces))
    decoder.end()


def test_a_trickled_event_is_not_searched_again():
    """A megabyte in pieces of a few bytes holds about a megabyte, not an object for each piece."""
    decoder = SSEDecoder()
    decoder.feed(b"data: ")
    piece = b"xyz"
    tracemalloc.start()
    try:
        for _ in range(100_000):
            decoder.feed(piece)
        held, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert held < 2 * 300_000
    assert [len(event.data) for event in decoder.feed(b"\n\n")] == [300_000]


def test_a_small_event_does_not_keep_its_read_alive():
    """Event data are copies: keeping one event does not keep the 64 KiB it came in."""
    tracemalloc.start()
    try:
        kept = [SSEDecoder().feed(b"data: x\n\n" * 7000)[0] for _ in range(20)]
        held, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert len(kept) == 20
    assert held < 100_000
