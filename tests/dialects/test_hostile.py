"""A provider that means harm: bodies made to cost time, and labels made to be remembered. All of it ends, and is bounded."""

from __future__ import annotations

import sys
from typing import Any

import pytest

from supervisor.dialects.base import Reader, UnparseableError
from supervisor.dialects.openai_chat import MAX_CHOICES, OPENAI_CHAT
from supervisor.dialects.reading import MAX_REASON_CHARS, BodyReader
from supervisor.dialects.tool_calls import (
    MAX_CALLS,
    MAX_CALLS_IN_ALL,
    MAX_LABELS,
    MAX_NAME_CHARS,
    CallBudget,
    CallPiece,
    CallSorter,
)
from tests.dialects.bodies import DONE, RecordingSink, call, chunk, event, read

MEGABYTE = 1 << 20


def held(value: Any, seen: set[int] | None = None) -> int:
    """Return the bytes that an object of the project holds, with all that it refers to."""
    seen = set() if seen is None else seen
    if id(value) in seen:
        return 0
    seen.add(id(value))
    inner: list[Any] = [getattr(value, name) for name in getattr(type(value), "__slots__", ())]
    if isinstance(value, dict):
        inner += [*value, *value.values()]
    elif isinstance(value, list | tuple | set):
        inner += value
    return sys.getsizeof(value) + sum(held(item, seen) for item in inner)


def take(reader: Reader, *events: bytes) -> None:
    for data in events:
        reader.read(data.removeprefix(b"data: ").strip())


# --- time ---

SLOW: list[tuple[str, bytes]] = [
    ("open lists", b"data: " + b"[" * 1_000_000 + b"\n\n"),
    ("open objects", b"data: " + b'{"a":' * 200_000 + b"\n\n"),
    ("choices", event({"choices": [{"delta": {"content": "x"}}] * 20_000})),
    ("content parts", chunk({"content": [{"type": "text", "text": "x"}] * 30_000})),
    ("nested thinking", chunk({"content": [{"thinking": [{"text": [{"text": ["x"] * 50_000}]}]}]})),
    ("details", chunk({"reasoning_details": [{"summary": [{"content": "x"}] * 50_000}]})),
    ("calls", chunk({"tool_calls": [{"id": "a", "function": {"name": "f", "arguments": "1"}}] * 20_000})),
    ("digits", event('{"choices":[{"index":' + "1" * 1_000_000 + "}]}")),
    ("escapes", event('{"choices":[{"delta":{"content":"' + "\\ud800" * 150_000 + '"}}]}')),
    ("stray lines", b"x\n" * 500_000),
    ("stray errors", b"error:{\n" * 200_000),
    ("stray lists", b"[[[[[[[[\n" * 200_000),
    ("data lines", b"data:\n" * 300_000 + b"\n"),
    ("events", b"event: a\nevent: b\n" * 100_000),
    ("blank lines", b"\n" * 1_000_000),
    ("carriage returns", b"\r" * 1_000_000),
    ("spaces", b" " * 1_000_000),
    ("a page", b"<html>" + b"<title>" * 150_000),
]


@pytest.mark.parametrize("body", [body for _, body in SLOW], ids=[name for name, _ in SLOW])
@pytest.mark.parametrize("piece", [1 << 26, 1000, 64])
def test_a_body_made_to_be_slow(body: bytes, piece: int) -> None:
    """A body of a megabyte is read to an ending, however it is cut, and whatever in it invites looking at it again."""
    sink = RecordingSink()
    reader = BodyReader(OPENAI_CHAT, sink, max_line_bytes=4 * MEGABYTE)
    for start in range(0, len(body), piece):
        reader.feed(body[start : start + piece])
    reader.end(clean=True)
    assert sink.sealed


def test_a_name_that_never_ends() -> None:
    """A tool's name in hundreds of thousands of pieces, each of which tells the whole so far, stops growing."""
    sorter = CallSorter()
    name = ""
    for _ in range(300_000):
        for piece in ("ab", "xy"):
            delta = sorter.take(CallPiece(0, "", piece, ""))
            name = delta.name if delta else name
    assert name == "abxy" * (MAX_NAME_CHARS // 4)


# --- memory ---


@pytest.mark.parametrize("labels", ["ids", "indexes"])
def test_labels_are_forgotten_not_collected(labels: str) -> None:
    """Of new ids and indexes for each piece of one call only the latest are kept, and the call stays one call."""
    reader = OPENAI_CHAT.reader()
    take(reader, call(0, "first", "f", "["))
    for number in range(5 * MAX_CALLS):
        at = 0 if labels == "ids" else number
        take(reader, call(at, None if labels == "indexes" else f"id-{number}", None, "1,"))
    assert held(reader) < MEGABYTE
    sorter = CallSorter()
    for number in range(5 * MAX_CALLS):
        piece = CallPiece(
            0 if labels == "ids" else number,
            "" if labels == "indexes" else f"id-{number}",
            "" if number else "f",
            "1,",
        )
        delta = sorter.take(piece)
        assert delta is not None
        assert delta.index == 0
    assert len(sorter) == 1
    assert MAX_CALLS <= sorter.remembered <= 2 * MAX_CALLS
    last = sorter.take(CallPiece(None, "" if labels == "indexes" else f"id-{number}", "", "2"))
    assert last is not None
    assert last.index == 0


def test_a_long_id_is_told_apart_but_not_kept() -> None:
    """Two ids of a megabyte which differ in their last character are two calls, and each is told whole, once."""
    reader = OPENAI_CHAT.reader()
    ids = ["x" * MEGABYTE + end for end in "ab"]
    deltas = [
        delta
        for call_id, name in 2 * [*zip(ids, "fg", strict=True)]
        for delta in reader.read(call(None, call_id, name, "[").strip()[6:])
    ]
    assert [(piece.index, piece.id) for delta in deltas for piece in delta.tool_calls] == [
        (0, ids[0]),
        (1, ids[1]),
        (0, ""),
        (1, ""),
    ]
    assert held(reader) < MEGABYTE / 8


def test_choices_share_what_is_remembered() -> None:
    """A thousand choices with a thousand ids each are remembered no better than a few: the bound is the response's."""
    budget = CallBudget()
    sorters = [CallSorter(budget) for _ in range(MAX_CHOICES)]
    for sorter in sorters:
        for number in range(20):
            sorter.take(CallPiece(number, f"id-{number}", "" if number else "f", "x" * 5000))
    assert sum(sorter.remembered for sorter in sorters) == MAX_LABELS
    assert held(sorters) < 8 * MEGABYTE


def test_calls_are_counted_over_all_choices() -> None:
    """Choices with calls below their own limit are refused, as unreadable, once the response has too many."""
    reader = OPENAI_CHAT.reader()
    calls = [{"id": f"id-{n}", "function": {"name": "f"}} for n in range(MAX_CALLS)]
    for index in range(MAX_CALLS_IN_ALL // MAX_CALLS):
        take(reader, chunk({"tool_calls": calls}, index=index))
    with pytest.raises(UnparseableError, match="all choices"):
        take(reader, chunk({"tool_calls": calls[:1]}, index=9))


@pytest.mark.parametrize("digits", ["9" * 16, "-" + "9" * 16, "9" * 4000])
def test_an_index_beyond_any_use(digits: str) -> None:
    """A call's index of thousands of digits is unreadable rather than remembered."""
    data = '{"choices":[{"delta":{"tool_calls":[{"index":%s,"function":{"name":"f"}}]}}]}' % digits  # noqa: UP031 - braces
    with pytest.raises(UnparseableError):
        OPENAI_CHAT.reader().read(data.encode())


def test_labels_of_the_answer_are_bounded() -> None:
    """Of finish reasons only the start is kept, by the reader and in the deltas; a model that long is none."""
    reader = OPENAI_CHAT.reader()
    long = "y" * 100_000
    body = [chunk({"content": "x"}, index=n, finish=long) for n in range(200)]
    take(reader, chunk({"content": "x"}, model=long, id=long), *body)
    assert held(reader) < 2 * MEGABYTE
    answer = read(chunk({"content": "x"}, model=long, id=long), *body, DONE).snapshot
    assert (answer.model, answer.response_id) == (None, None)
    assert max(len(choice.finish_reason or "") for choice in answer.choices) < 1000


@pytest.mark.parametrize("last", [DONE, b""])
def test_a_reason_is_short(last: bytes) -> None:
    """A finish reason becomes the reason of an ending cut to 64 characters, marked or completed, at the marker or the end."""
    sink = read(chunk({"content": "x"}, finish="length" + "h" * 100), last)
    short = "length" + "h" * (MAX_REASON_CHARS - 6)
    assert len(short) == 64
    assert (sink.marks, sink.ending) == ([short], ("completed", short))


def test_the_lowest_choice_gives_the_reason() -> None:
    """The reason is that of the lowest choice which has one, in whatever order they came and end."""
    sink = read(chunk({}, index=2, finish="two"), chunk({}, index=1, finish="one"), DONE)
    assert sink.ending == ("completed", "one")
