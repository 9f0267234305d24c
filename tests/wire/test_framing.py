"""Which framing a body is in, by its first bytes, what it is said to be, and what is expected."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from supervisor.wire.framing import MAX_INDENT_BYTES, FramingChooser, framing_by_type
from tests.wire.feeding import cut


def chosen(
    pieces: list[bytes], dialect: str = "sse", said: str | None = None, limit: int = 1000
) -> tuple[str, bytes]:
    """Return the framing, and what was kept of the body and not yet fed."""
    chooser = FramingChooser(dialect, said, max_line_bytes=limit)  # type: ignore[arg-type]  # one of the three
    for number, piece in enumerate(pieces):
        if (framing := chooser.feed(piece)) is not None:
            return framing, bytes(chooser.head) + b"".join(pieces[number + 1 :])
    return chooser.end(), bytes(chooser.head)


@pytest.mark.parametrize(
    ("said", "framing"),
    [
        (None, None),
        ("", None),
        ("text/html", None),
        ("text/event-stream; charset=utf-8", "sse"),
        ("Text/Event-Stream", "sse"),
        ("application/x-ndjson", "ndjson"),
        ("application/jsonl;charset=utf-8", "ndjson"),
        ("application/stream+json", "ndjson"),
        ("application/json-seq", "ndjson"),
        ("application/json; charset=UTF-8", "json-array"),
        ("application/problem+json", "json-array"),
    ],
)
def test_content_types(said: str | None, framing: str | None) -> None:
    """Parameters and case do not matter; a type that names no framing says nothing."""
    assert framing_by_type(said) == framing


LINES = b'{"a":1}\n{"b":2}\n'
ARRAY = b'[{"a":1},\n{"b":2}]'
OBJECT = b'{\n "error": {}\n}\n'


@pytest.mark.parametrize(
    ("body", "dialect", "said", "framing"),
    [
        (b"data: x\n\n", "sse", None, "sse"),
        (b": hi\n\n", "ndjson", "application/x-ndjson", "sse"),
        (b"event: x\n", "json-array", "application/json", "sse"),
        (b"<html>", "ndjson", None, "sse"),
        (LINES, "sse", None, "json-array"),
        (LINES, "sse", "application/x-ndjson", "ndjson"),
        (LINES, "ndjson", "text/event-stream", "ndjson"),
        (LINES, "ndjson", "application/json", "ndjson"),
        (b"\xef\xbb\xbf \n\r\n\t" + LINES, "ndjson", None, "ndjson"),
        (OBJECT, "ndjson", "application/x-ndjson", "json-array"),
        (OBJECT.replace(b"\n", b"\r"), "ndjson", None, "json-array"),
        (b'{"a":1}', "ndjson", None, "json-array"),
        (ARRAY, "sse", "text/event-stream", "json-array"),
        (ARRAY, "ndjson", None, "json-array"),
        (b"[1]\n[2]\n", "sse", "application/jsonl", "ndjson"),
        (ARRAY, "sse", "application/jsonl", "json-array"),
        (b'"a"\n', "ndjson", None, "ndjson"),
        (b'"a"\n', "sse", None, "sse"),
        (b'"a"\n', "sse", "application/json", "json-array"),
        (b"404 page not found\n", "ndjson", "application/json", "sse"),
        (b"not found\n", "ndjson", None, "sse"),
        (b"", "ndjson", None, "sse"),
        (b'{"a":"' + b"x" * 2000 + b'"}\n', "ndjson", None, "json-array"),
        (b" " * (MAX_INDENT_BYTES + 1) + LINES, "sse", None, "sse"),
        (b"\n" * 5000 + b" " * MAX_INDENT_BYTES + ARRAY, "sse", None, "json-array"),
    ],
)
def test_the_table(body: bytes, dialect: str, said: str | None, framing: str) -> None:
    """The first bytes decide, then what is said, then what is expected; the same byte by byte, and nothing is lost."""
    for pieces in ([body], [body[at : at + 1] for at in range(len(body))], [body[:7], body[7:]]):
        found, kept = chosen(pieces, dialect, said)
        assert found == framing
        assert kept.lstrip(b"\xef\xbb\xbf \t\r\n") == body.lstrip(b"\xef\xbb\xbf \t\r\n")


def test_blank_lines_are_not_kept() -> None:
    """Whatever time a server keeps a connection alive with blank lines, they are counted and forgotten."""
    chooser = FramingChooser("ndjson")
    for _ in range(1000):
        assert chooser.feed(b"\r\n" * 100) is None
    assert (chooser.comments, bytes(chooser.head)) == (100_000, b"\n")


@given(
    st.lists(
        st.sampled_from(
            [b"{", b"}", b"[", b'"a"', b":", b"1", b"\n", b"\r", b" ", b"d", b"\xef\xbb\xbf", b"\xef"]
        ),
        max_size=14,
    ).map(b"".join),
    st.lists(st.integers(0, 20), max_size=4),
    st.sampled_from(["sse", "ndjson", "json-array"]),
    st.sampled_from([None, "application/jsonl", "application/json", "text/event-stream"]),
)
def test_no_split_decides(body: bytes, at: list[int], dialect: str, said: str | None) -> None:
    """The decision is the same under every split."""
    whole = chosen([body], dialect, said, limit=5)[0]
    assert whole == chosen(cut(body, at), dialect, said, limit=5)[0]
    assert whole == chosen([body[n : n + 1] for n in range(len(body))], dialect, said, limit=5)[0]
