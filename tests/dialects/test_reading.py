"""From body bytes to an ending: the order of what is told, the limits, and bodies that are no streams."""

from __future__ import annotations

import json
from typing import Any

import pytest

from supervisor.dialects import GEMINI, GENERIC, NATIVE, Delta
from supervisor.dialects.openai_chat import OPENAI_CHAT
from supervisor.dialects.openai_chunks import choices_of
from supervisor.dialects.reading import BodyReader
from supervisor.errors import ConfigurationError
from tests.dialects.bodies import DONE, RecordingSink, chunk, event, read

BODY = chunk({"content": "Hi"}) + chunk(finish="stop")
WHOLE = {
    "id": "c",
    "object": "chat.completion",
    "model": "m",
    "choices": [{"index": 0, "message": {"role": "assistant", "content": "Hi"}, "finish_reason": "stop"}],
    "usage": {"prompt_tokens": 1, "completion_tokens": 2},
}


def test_payloads_are_as_received() -> None:
    """The sink gets each event's bytes unchanged, and its name only where it is not the default."""
    first = b'{"choices":[{"delta":{"content":"\\u00e9 \xc3\xa9"}}] }'
    sink = read(b"data: " + first + b"\n\nevent: completion.chunk\ndata: {}\n\n", DONE)
    assert [first, b"{}", b"[DONE]"] == sink.payloads
    assert sink.names == ["", "completion.chunk", ""]
    assert sink.snapshot.text == "é é"


def test_nothing_is_read_after_a_seal() -> None:
    """Events in the same read after the end marker, an error or a seal from outside are not appended."""
    assert len(read(chunk({"content": "a"}) + DONE + BODY).payloads) == 2
    assert len(read(chunk({"content": "a"}) + event({"error": "x"}) + BODY).payloads) == 2
    sink = RecordingSink(seal_after=1)
    body = BodyReader(OPENAI_CHAT, sink)
    body.feed(BODY + DONE)
    body.feed(BODY)
    body.end(clean=True)
    assert (sink.ending, len(sink.payloads)) == (("expired", "reaped_bytes"), 1)


def test_a_seal_by_the_event_that_ends_the_answer_stands() -> None:
    """If appending the finishing event seals the stream, it is not marked, completed or failed on top."""
    for last in (chunk(finish="stop"), DONE, event({"error": "x"})):
        sink = RecordingSink(seal_after=1)
        BodyReader(OPENAI_CHAT, sink).feed(last)
        assert (sink.ending, sink.marks) == (("expired", "reaped_bytes"), [])


def test_a_lost_connection_ends_an_answer_of_as_many_choices_as_were_asked_for() -> None:
    """Without the end marker, a choice that never began is missed, and so may one be where more came than were asked for."""
    one = chunk({"content": "a"}) + chunk(finish="stop")
    two = chunk({"content": "b"}, index=1) + chunk(index=1, finish="length")
    for body, asked, ending, marks in (
        (one, 1, ("completed", "stop"), ["stop"]),
        (one, 2, ("failed", "truncated"), []),
        (one + two, 2, ("completed", "stop"), ["stop"]),
        (one + two, 1, ("failed", "truncated"), ["stop", None, "stop"]),
    ):
        for clean in (False, True):
            sink = RecordingSink()
            reader = BodyReader(OPENAI_CHAT, sink, choices=lambda asked=asked: asked)
            reader.feed(body)
            reader.end(clean=clean)
            assert sink.ending == (("completed", "stop") if clean else ending), (body, asked)
            assert sink.marks == marks


@pytest.mark.parametrize(
    ("request_", "choices"),
    [
        (b"{}", 1),
        (b'{"n":null}', 1),
        (b'{"n":3}', 3),
        (b'{"n":0}', 1),
        (b'{"n":"3"}', 1),
        (b'{"n":2,"prompt":"a"}', 2),
        (b'{"n":2,"prompt":["a","b"]}', 4),
        (b'{"prompt":[1,2]}', 1),
        (b'{"prompt":[[1],[2]]}', 2),
        (b"{", 1),
    ],
)
def test_how_many_choices_a_request_asks_for(request_: bytes, choices: int) -> None:
    """By `n`, for each prompt of several; what cannot be read is the provider's to refuse."""
    assert choices_of(request_) == choices


def test_only_the_first_failure_is_told() -> None:
    """An error, then another outside of events and an oversized line, all in one read, are one failure: the first."""
    sink = read(event({"error": "first"}) + b"error: second\n\n" + b"x" * 2000, max_line_bytes=1000)
    assert sink.fault is not None
    assert sink.fault.message == "first"


def test_the_end_marker_completes_at_once() -> None:
    """[DONE] seals without waiting for the body to end; a finish reason only marks, once."""
    sink = RecordingSink()
    body = BodyReader(OPENAI_CHAT, sink)
    body.feed(BODY + chunk(finish="stop"))
    assert (sink.state, sink.marks, body.terminal) == ("", ["stop"], False)
    body.feed(DONE)
    assert (sink.ending, body.terminal) == (("completed", "stop"), True)


def test_comments_touch() -> None:
    """A keep-alive comment without an event tells that the upstream is alive; an event does that itself."""
    sink = RecordingSink()
    body = BodyReader(OPENAI_CHAT, sink)
    body.feed(b": hi\n")
    body.feed(b": hi")
    assert sink.touches == 1
    body.feed(b"\n\n")
    assert sink.touches == 2
    body.feed(chunk({"content": "x"}))
    assert sink.touches == 2


@pytest.mark.parametrize("limit", [0, 3])
def test_unreadable_events_up_to_a_limit(limit: int) -> None:
    """So many are skipped, and one more fails the stream, with the last reason told."""
    odd = event("oops")
    allowed = read(odd * limit + BODY, max_unparseable=limit)
    assert (("completed", "stop"), limit) == (allowed.ending, len(allowed.skipped))
    past = read(chunk({"content": "Hi"}) + odd * (limit + 1) + DONE, max_unparseable=limit)
    assert (("failed", "protocol"), limit + 1, "Hi") == (past.ending, len(past.skipped), past.snapshot.text)
    assert past.fault is not None
    assert (past.fault.kind, "oops" in past.fault.message) == ("protocol", True)


def test_a_bug_in_a_dialect_is_not_swallowed() -> None:
    """Any exception but UnparseableError is raised out of feed."""

    class Broken:
        name = "broken"
        framing = "sse"

        def reader(self) -> Any:
            return self

        def read(self, data: bytes, event: str = "message") -> tuple[Delta, ...]:
            raise KeyError(data)

    with pytest.raises(KeyError):
        BodyReader(Broken(), RecordingSink()).feed(BODY)


@pytest.mark.parametrize("split", [False, True])
def test_limits_of_line_and_event(*, split: bool) -> None:
    """An oversized line or event is failed(protocol); what came before it is kept."""
    body = chunk({"content": "Hi"}) + b"data: " + b"x" * 3000 + b"\n\n"
    pieces = [body[at : at + 100] for at in range(0, len(body), 100)] if split else [body]
    for options in ({"max_line_bytes": 1000}, {"max_event_bytes": 1000}):
        sink = read(*pieces, **options)
        assert (sink.ending, sink.snapshot.text) == (("failed", "protocol"), "Hi")
        assert sink.fault is not None
        assert next(iter(options)) in sink.fault.message


@pytest.mark.parametrize("clean", [True, False])
@pytest.mark.parametrize("body", [b"", b"\n\n", b": comment\n\n", b"\xef\xbb\xbf", b"event: x\nid: 1\n\n"])
def test_an_empty_body_is_truncated(*, body: bytes, clean: bool) -> None:
    """No event at all, not even of another kind: the answer is missing, so it was cut off."""
    sink = read(body, clean=clean, cause="reset by peer")
    assert sink.ending == ("failed", "truncated")
    assert sink.fault is not None
    assert (sink.fault.kind, sink.fault.temporary) == ("truncated", True)
    assert "reset by peer" in sink.fault.message


@pytest.mark.parametrize(
    "body",
    [
        b"<!doctype html><html><head><title>Sign in</title></head></html>\n",
        b"upstream connect error",
        b'{"hello": "world"}',
        b"[1, 2]",
        b'{"broken":',
    ],
)
def test_another_kind_of_body_is_a_protocol_fault(body: bytes) -> None:
    """HTML, text or foreign JSON in place of a stream says what came; from a lost connection it is truncated."""
    sink = read(body, content_type="text/html")
    assert sink.ending == ("failed", "protocol")
    assert sink.fault is not None
    assert "text/html" in sink.fault.message
    assert read(body, clean=False).ending == ("failed", "truncated")


@pytest.mark.parametrize("newline", [b"", b"\n", b"\r\n\r\n"])
@pytest.mark.parametrize("indent", [None, 2])
@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({"error": {"message": "no such model", "code": 404}}, "no such model"),
        ({"error": "no such model"}, "no such model"),
        ({"message": "no such model"}, "no such model"),
        ({"detail": "no such model", "padding": "x" * 9000}, "no such model"),
        ([{"error": {"message": "no such model"}}], "no such model"),
    ],
)
def test_a_json_error_in_place_of_a_stream(
    value: Any, message: str, indent: int | None, newline: bytes
) -> None:
    """A bare JSON error body is the provider's error, in one line or many, whole or in pieces."""
    body = json.dumps(value, indent=indent).encode() + newline
    for pieces in ([body], [body[at : at + 7] for at in range(0, len(body), 7)]):
        sink = read(*pieces)
        assert sink.ending == ("failed", "provider_error")
        assert sink.fault is not None
        assert message == sink.fault.message


@pytest.mark.parametrize("indent", [None, 2])
def test_a_whole_answer_in_place_of_a_stream(indent: int | None) -> None:
    """A non-streamed completion is read as an answer."""
    body = json.dumps(WHOLE, indent=indent).encode()
    sink = read(body[:50], body[50:])
    assert (("completed", "stop"), "Hi", [body]) == (sink.ending, sink.snapshot.text, sink.payloads)
    assert (sink.snapshot.model, sink.snapshot.usage and sink.snapshot.usage.output) == ("m", 2)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"error":{"message":"boom"}}\n', "boom"),
        (b'error: {"message":"boom"}\n', "boom"),
        (b'error: {"error":{"message":"boom"}}\n', "boom"),
        (b"error: boom\n", "boom"),
        (b"error:\n", "the provider reported an error without a message"),
    ],
)
def test_an_error_between_events(line: bytes, message: str) -> None:
    """Bare JSON in the stream, or a field named `error`, fails it at once, before the body ends."""
    for before in (chunk({"content": "Hi"}), BODY):
        sink = RecordingSink()
        body = BodyReader(OPENAI_CHAT, sink)
        body.feed(before + line)
        assert sink.ending == ("failed", "provider_error")
        assert sink.fault is not None
        assert message == sink.fault.message
    assert read(BODY + line.rstrip(b"\n")).ending == ("failed", "provider_error")


@pytest.mark.parametrize(
    ("parts", "ending", "text"),
    [
        ([chunk({"content": "Hi"}), b"error: boom\n\n", DONE], ("failed", "provider_error"), "Hi"),
        (
            [chunk({"content": "Hi"}), b"error: boom\n\n", chunk({"content": "!"})],
            ("failed", "provider_error"),
            "Hi",
        ),
        ([chunk({"content": "Hi"}), DONE, b"error: boom\n\n"], ("completed", "done"), "Hi"),
        (
            [b"x: y\n", chunk({"content": "Hi"}), b'{"error":"boom"}\n', DONE],
            ("failed", "provider_error"),
            "Hi",
        ),
        (
            [b"x: y\n" * 2000, chunk({"content": "Hi"}), b"error: boom\n", DONE],
            ("failed", "provider_error"),
            "Hi",
        ),
        (
            [chunk({"content": "Hi"}), b"error: boom\n", b"data: " + b"x" * 3000],
            ("failed", "provider_error"),
            "Hi",
        ),
        ([b"error: boom\n", b"data: " + b"x" * 3000], ("failed", "provider_error"), ""),
        ([chunk({"content": "Hi"}), b"x" * 3000, b"error: boom\n\n"], ("failed", "protocol"), "Hi"),
        ([chunk({"content": "Hi"}), b"error: boom\n", DONE[:-1]], ("failed", "provider_error"), "Hi"),
        ([chunk({"content": "Hi"}), DONE[:-1], b"error: boom"], ("failed", "provider_error"), "Hi"),
        ([b"x: y\n" * 2000, chunk(finish="stop"), b"error: boom"], ("failed", "provider_error"), ""),
    ],
)
def test_an_error_outside_of_events_keeps_its_place(
    parts: list[bytes], ending: tuple[str, str], text: str
) -> None:
    """What came before it is read and what came after it is not, whether they came in one read, by themselves or bytewise."""
    body = b"".join(parts)
    for pieces in ([body], parts, [body[at : at + 1] for at in range(len(body))]):
        sink = read(*pieces, max_line_bytes=2500)
        assert (sink.ending, sink.snapshot.text, sink.skipped) == (ending, text, [])


def test_other_stray_lines_mean_nothing() -> None:
    """Unknown fields and JSON that reports no error are ignored, as the standard says."""
    sink = read(b'foo: bar\n{"id": 1}\nerrors: 0\n' + BODY + DONE)
    assert sink.ending == ("completed", "stop")


def test_a_last_event_without_its_empty_line() -> None:
    """It is discarded, unless it is the end marker or an error, and the body ended cleanly."""
    assert read(chunk({"content": "Hi"}), chunk(finish="stop").rstrip()).reason == "truncated"
    assert read(chunk({"content": "Hi"}), chunk(finish="stop")[:-1]).reason == "truncated"
    assert read(chunk({"content": "Hi"}), DONE.rstrip()).ending == ("completed", "done")
    assert read(BODY, event({"error": "x"})[:-1]).reason == "provider_error"
    assert read(chunk({"content": "Hi"}), DONE.rstrip(), clean=False).reason == "truncated"


def test_end_is_idempotent_and_final() -> None:
    """The first end decides; later bytes and ends change nothing."""
    sink = RecordingSink()
    body = BodyReader(OPENAI_CHAT, sink)
    body.feed(chunk({"content": "Hi"}))
    body.end(clean=False, cause="timeout")
    body.feed(BODY)
    body.end(clean=True)
    assert (sink.ending, body.events) == (("failed", "truncated"), 1)
    assert "BodyReader of openai-chat: 1 events" in repr(body)


def test_options_are_checked() -> None:
    """A dialect without a body, and impossible limits, are named."""
    with pytest.raises(ConfigurationError, match="dialect"):
        BodyReader(NATIVE, RecordingSink())
    for field in ("max_unparseable", "max_line_bytes", "max_event_bytes"):
        with pytest.raises(ConfigurationError, match=field):
            BodyReader(OPENAI_CHAT, RecordingSink(), **{field: -1})


NESTS = [("[", "]"), *((f'{{"{name}":', "}") for name in ("error", "message", "detail", "text", "content"))]
FRAMES = [
    "%s",
    '{"error":%s}',
    '{"detail":%s}',
    '{"choices":[{"delta":{"content":[{"type":"thinking","thinking":%s}]}}]}',
    '{"choices":[{"delta":{"tool_calls":[{"function":{"arguments":%s}}]}}]}',
    '{"choices":[{"index":%s}]}',
]


@pytest.mark.parametrize("depth", [30, 300, 450, 700, 950, 5000])
def test_deep_nesting_exhausts_no_stack(depth: int) -> None:
    """Whatever a peer nests, as an event, an error event, a stray line or a body, it is read or refused, never raised."""
    for opening, closing in NESTS:
        for frame in FRAMES:
            value = (frame % (opening * depth + '"x"' + closing * depth)).encode()
            for body in (
                value,
                b"data: " + value + b"\n\n",
                b"event: error\ndata: " + value + b"\n\n",
                b"error: " + value,
            ):
                assert read(body + b"\n").state == "failed"
            assert OPENAI_CHAT.fault(500, value).message


@pytest.mark.parametrize("frame", FRAMES)
def test_huge_numbers(frame: str) -> None:
    """A number of thousands of digits is no number that counts, and printing it is not attempted."""
    value = (frame % ("1" + "0" * 6000)).encode()
    assert read(event(value.decode()), event(value.decode(), "error")).state == "failed"
    assert OPENAI_CHAT.fault(500, value).message


def test_a_further_choice_takes_the_mark_back():
    """Choices that come one after another: the answer has ended as far as seen only between them, and at the end."""
    sink = read(
        chunk({"content": "a"}, finish="stop"),
        chunk({"content": "b"}, index=1),
        chunk({}, index=1, finish="length"),
    )

    assert sink.marks == ["stop", None, "stop"]
    assert sink.ending == ("completed", "stop")


def test_a_finish_reason_is_no_mark_where_there_is_no_marker():
    """More of the answer may follow it: a clock that runs out then, or a stop, must not complete it."""
    sink = RecordingSink()
    candidate = {"content": {"parts": [{"text": "a"}]}, "finishReason": "STOP"}
    BodyReader(GEMINI, sink).feed(event({"candidates": [candidate]}))
    assert (sink.marks, sink.snapshot.finish_reason) == ([], "STOP")


@pytest.mark.parametrize(
    ("first", "last", "pieces", "begun_anew"),
    [
        ("1", "2", [b"id: 1\ndata: a\n\n"], True),
        ("1", "2", [b"id: 3\ndata: c\n\n", b"id: 1\ndata: d\n\n"], False),
        ("1", "1", [b"data: b\n\n"], False),
        ("1", "1", [b"id: 1\ndata: b\n\n"], False),
        ("1", "2", [b"data: c\n\n"], False),
    ],
    ids=["its first id again", "used again later", "only one id", "that one sent again", "no id"],
)
def test_an_event_stream_that_is_gone_on_with(first: str, last: str, pieces: list[bytes], begun_anew: bool):
    """It has begun anew if its first event is the first of all; an id that proves nothing is no reason to give the answer up."""
    sink = RecordingSink()
    body = BodyReader(GENERIC, sink, last_event_id=last, first_event_id=first)
    for piece in pieces:
        body.feed(piece)
    assert (sink.state, sink.reason) == (("failed", "protocol") if begun_anew else ("", ""))
    assert len(sink.payloads) == (0 if begun_anew else len(pieces))
