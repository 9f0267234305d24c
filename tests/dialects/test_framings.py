"""A body is read by what it is, whatever the dialect expected: the endings hold in every framing."""

from __future__ import annotations

import json
from typing import Any

import pytest

from supervisor.dialects import Dialect
from supervisor.dialects.generic import GENERIC, generic
from supervisor.dialects.ollama import OLLAMA
from supervisor.dialects.openai_chat import OPENAI_CHAT
from supervisor.dialects.reading import BodyReader
from tests.dialects.bodies import RecordingSink

ARRAYS = generic("arrays", framing="json-array")
TEXT = {"choices": [{"index": 0, "delta": {"content": "Hi"}}]}
LAST = {"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]}
ERROR = {"error": {"message": "boom"}}


def as_lines(*values: Any) -> bytes:
    return b"".join(json.dumps(value).encode() + b"\n" for value in values)


def as_array(*values: Any) -> bytes:
    return json.dumps(values, indent=1).encode()


def as_events(*values: Any) -> bytes:
    return b"".join(b"data: " + json.dumps(value).encode() + b"\n\n" for value in values)


def read(
    dialect: Dialect, body: bytes, *, clean: bool = True, content_type: str | None = None, **options: Any
) -> RecordingSink:
    """Read a body whole, byte by byte and in two; check that it makes no difference."""
    sinks = []
    for size in (len(body) + 1, 1, max(1, len(body) // 2)):
        sink = RecordingSink()
        reader = BodyReader(dialect, sink, content_type=content_type, **options)
        for at in range(0, len(body), size):
            reader.feed(body[at : at + size])
        reader.end(clean=clean)
        assert (reader.events, reader.skipped) == (len(sink.payloads), len(sink.skipped))
        sinks.append(sink)
    for sink in sinks[1:]:
        assert (sink.ending, sink.payloads, sink.fault) == (
            sinks[0].ending,
            sinks[0].payloads,
            sinks[0].fault,
        )
    return sinks[0]


TYPES = [None, "text/event-stream", "application/x-ndjson", "application/json", "text/plain"]


@pytest.mark.parametrize("content_type", TYPES)
@pytest.mark.parametrize("form", [as_lines, as_array, as_events])
@pytest.mark.parametrize("dialect", [OPENAI_CHAT, GENERIC, ARRAYS], ids=lambda dialect: dialect.name)
def test_any_framing_under_any_label(dialect: Dialect, form: Any, content_type: str | None) -> None:
    """The same objects, framed in any way and labelled as any other, are the same answer, or the same failure."""
    sink = read(dialect, form(TEXT, TEXT, LAST), content_type=content_type)
    assert (sink.ending, sink.snapshot.text) == (("completed", "stop"), "HiHi")
    for values in ((TEXT, ERROR), (TEXT, LAST, ERROR), (ERROR,)):
        failed = read(dialect, form(*values), content_type=content_type)
        assert failed.fault is not None
        assert (failed.ending, failed.fault.message) == (("failed", "provider_error"), "boom")
    cut = read(dialect, form(TEXT, TEXT), content_type=content_type)
    assert (cut.ending, cut.snapshot.text) == (("failed", "truncated"), "HiHi")


@pytest.mark.parametrize("clean", [True, False])
def test_an_array_that_never_closed(*, clean: bool) -> None:
    """It is truncated, unless the answer had ended before."""
    assert read(ARRAYS, as_array(TEXT)[:-2], clean=clean).ending == ("failed", "truncated")
    assert read(ARRAYS, as_array(TEXT, LAST)[:-2], clean=clean).ending == ("completed", "stop")
    assert read(OPENAI_CHAT, as_array(TEXT)[:20], clean=clean).ending == ("failed", "truncated")


@pytest.mark.parametrize("clean", [True, False])
def test_a_last_line_without_its_end(*, clean: bool) -> None:
    """It counts if it is whole, also when the connection was lost: an object cannot be part of another."""
    body = as_lines({"response": "Hi"}, {"response": "", "done": True})
    assert read(OLLAMA, body[:-1], clean=clean).ending == ("completed", "done")
    assert read(OLLAMA, body[:-2], clean=clean).ending == ("failed", "truncated")
    words = generic("words", framing="ndjson", end="clean")
    assert read(words, b'"a"\n12', clean=clean).snapshot.text == ("a12" if clean else "a")
    assert read(words, b'["a",12', clean=clean).snapshot.text == "a"  # in an array it may be a part of 123


@pytest.mark.parametrize("content_type", [None, "application/json", "text/html"])
@pytest.mark.parametrize("dialect", [OPENAI_CHAT, OLLAMA, ARRAYS], ids=lambda dialect: dialect.name)
def test_what_was_never_a_stream(dialect: Dialect, content_type: str | None) -> None:
    """HTML, text and foreign JSON are failed(protocol), saying what came; lost half-way they are truncated."""
    for body in (b"<!doctype html><title>Sign in</title>", b"upstream connect error", b"not found"):
        sink = read(dialect, body, content_type=content_type)
        assert sink.ending == ("failed", "protocol")
        assert sink.fault is not None
        assert "never" not in sink.fault.message
        assert read(dialect, body, content_type=content_type, clean=False).ending == ("failed", "truncated")
    if dialect is not ARRAYS:
        foreign = read(dialect, b'{"hello": "world"}', content_type=content_type)
        assert foreign.ending == ("failed", "protocol")
        assert foreign.fault is not None
        assert "hello" in foreign.fault.message


@pytest.mark.parametrize("dialect", [OPENAI_CHAT, OLLAMA, ARRAYS], ids=lambda dialect: dialect.name)
def test_an_error_that_only_has_a_message(dialect: Dialect) -> None:
    """One JSON object in place of a stream, of which the dialect knows nothing, may tell an error by its message alone."""
    for body in (
        b'{"msg": "no such model"}',
        b'{\n "msg": "no such model"\n}\n',
        b'[{"msg": "no such model"}]',
    ):
        sink = read(dialect, body)
        assert sink.fault is not None
        assert (sink.ending, sink.fault.message) == (("failed", "provider_error"), "no such model")
    assert read(dialect, b'{"msg": "x"}\n{"msg": "y"}\n').reason != "provider_error"


@pytest.mark.parametrize("form", [as_lines, as_array])
def test_limits(form: Any) -> None:
    """A value past its limit is failed(protocol), and what came before it is kept."""
    sink = read(OPENAI_CHAT, form(TEXT, {"x": "y" * 2000}), max_event_bytes=1000, max_line_bytes=1000)
    assert (sink.ending, sink.snapshot.text) == (("failed", "protocol"), "Hi")
    assert sink.fault is not None
    assert "max_event_bytes" in sink.fault.message or "max_line_bytes" in sink.fault.message


def test_keep_alives() -> None:
    """Blank lines show that the upstream is alive, before the first value and between two."""
    sink = RecordingSink()
    reader = BodyReader(OLLAMA, sink)
    for body, touches in ((b"\n", 1), (b" ", 1), (b"\n", 2), (as_lines({"response": "x"}), 2), (b"\r\n", 3)):
        reader.feed(body)
        assert sink.touches == touches
    array = BodyReader(ARRAYS, sink)
    array.feed(b"[")
    array.feed(b"\n")
    assert sink.touches == 4


def test_last_event_id_and_retry() -> None:
    """What the event stream says of resuming; other framings say nothing."""
    sink = RecordingSink()
    reader = BodyReader(GENERIC, sink)
    assert (reader.last_event_id, reader.retry_ms) == ("", None)
    reader.feed(b"id: a\nretry: 5\ndata: x\n\nid: b\ndata: y\n\nid: c\ndata: z")
    assert (reader.last_event_id, reader.retry_ms) == ("b", 5)
    lines = BodyReader(OLLAMA, RecordingSink())
    lines.feed(as_lines({"response": "x"}))
    assert (lines.last_event_id, lines.retry_ms) == ("", None)


def test_the_last_event_id_is_of_an_event_that_was_taken() -> None:
    """Events of the same read that came after the seal do not count: they are not in the journal."""
    sink = RecordingSink(seal_after=1)
    reader = BodyReader(GENERIC, sink)
    reader.feed(b"id: a\ndata: x\n\nid: b\ndata: y\n\n")
    assert (reader.last_event_id, sink.payloads) == ("a", [b"x"])


def test_a_reader_goes_on_in_another_body() -> None:
    """A body that continues an answer is given the reader of the body before, with what it remembers."""
    dialect_reader = OPENAI_CHAT.reader()
    first = RecordingSink()
    BodyReader(OPENAI_CHAT, first, reader=dialect_reader).feed(as_events(TEXT, LAST))
    second = RecordingSink()
    BodyReader(OPENAI_CHAT, second, reader=dialect_reader).end(clean=True)
    assert second.ending == ("completed", "stop")


def test_a_clean_end() -> None:
    """Where the dialect takes the end of the body for an ending, it must be clean, have had an event, and leave none open."""
    dialect = generic("plain", end="clean", done=(), finish=())
    assert read(dialect, b"data: a\n\n").ending == ("completed", "done")
    assert read(dialect, as_array({"text": "a"})).ending == ("completed", "done")
    assert read(dialect, b"data: a\n\ndata: b").ending == ("failed", "truncated")
    assert read(dialect, b"data: a\n\ndata: b\n").ending == ("failed", "truncated")
    assert read(dialect, as_array({"text": "a"})[:-1]).ending == ("failed", "truncated")
    assert (
        read(dialect, as_lines({"text": "a"}) + b'{"text"', content_type="application/jsonl").reason
        == "truncated"
    )
    assert read(dialect, b"data: a\n\n", clean=False).ending == ("failed", "truncated")
    assert read(dialect, b": hi\n\n").ending == ("failed", "truncated")
    assert read(GENERIC, b"data: a\n\n").ending == ("failed", "truncated")
