"""Streams of no provider in particular: what is text, what ends it, what is an error, and how it is asked for again."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from supervisor.dialects import PRESETS, Snapshot, Usage, find
from supervisor.dialects.dialect import Progress
from supervisor.dialects.generic import GENERIC, generic
from supervisor.dialects.places import FINISH, TEXT
from supervisor.dialects.pointers import MISSING, lookup, pointer
from supervisor.dialects.replay import replay
from supervisor.errors import ConfigurationError
from tests.cases import cases_dir, transcripts
from tests.dialects.answers import CUTS, WORDS, odd_json, read, read_cut, refused, survives, tell
from tests.dialects.bodies import DONE, event

# --- text ---


def test_plain_text() -> None:
    """Data that is no JSON is text as it stands, numbers and white space included; a JSON string is what it spells."""
    sink = read(GENERIC, b"data: He\n\ndata: llo\n\ndata:  \n\ndata: 42\n\ndata: a\ndata: b\n\n", DONE)
    assert (sink.ending, sink.snapshot.text) == (("completed", "done"), "Hello 42a\nb")
    assert read(GENERIC, event('"a\\n"'), event('"b"'), DONE).snapshot.text == "a\nb"
    assert (
        read(GENERIC, b"data: a\n\n", event('"b"'), event("{}"), event('{"x"'), DONE).snapshot.text
        == 'a"b"{}{"x"'
    )


@pytest.mark.parametrize("where", [where for where in TEXT if where])
def test_common_places(where: str) -> None:
    """Text is found where it commonly stands, alone and beside other fields, and no other field is taken for it."""
    value: Any = "Hi"
    for token in reversed(pointer("text", where)):
        value = [value] if token == "0" else {token: value}
    value |= {"id": "r", "index": 0, "created": 1}
    sink = read(GENERIC, event(value), event(value), event("[DONE]"))
    assert (sink.snapshot.text, sink.snapshot.response_id, sink.skipped) == ("HiHi", "r", [])


def test_json_that_is_no_json() -> None:
    """In a stream of JSON, data that is none is unreadable; so is a first event that begins like JSON."""
    reader = GENERIC.reader()
    assert refused(reader, b'{"text": "x')
    tell(reader, {"text": "x"})
    assert refused(reader, b"oops")
    assert refused(reader, b"12")
    assert refused(reader, b"[1]")
    assert reader.read(b"") == reader.read(b"  ") == reader.read(b"null") == ()
    assert refused(generic(text="/text").reader(), b"oops")


def test_an_event_that_repeats_the_answer() -> None:
    """The text of an event whose name says that something is over counts only if there was none before."""
    body = event({"delta": "He", "type": "output.delta"}) + event({"delta": "llo", "type": "output.delta"})
    assert read(GENERIC, body, event({"text": "Hello", "type": "output.done"}), DONE).snapshot.text == "Hello"
    assert read(GENERIC, body, event({"text": "Hello"}, "complete")).snapshot.text == "Hello"
    assert read(GENERIC, event({"text": "Hello"}, "complete")).snapshot.text == "Hello"
    assert read(GENERIC, event({"text": "He"}), event({"text": "llo", "done": True})).snapshot.text == "Hello"


def test_reasoning_and_tools() -> None:
    """Reasoning is apart from the text, by its place or by the type that it says; what are arguments is neither."""
    body = [
        event({"delta": {"thinking": "a"}}),
        event({"delta": {"type": "thought_summary", "text": "b"}}),
        event({"type": "reasoning", "content": "c"}),
        event({"delta": '{"x":', "type": "response.function_call_arguments.delta"}),
        event({"content": "Hi"}),
    ]
    snapshot = read(GENERIC, *body, DONE).snapshot
    assert (snapshot.text, snapshot.reasoning) == ("Hi", "abc")


def test_names_that_say_nothing() -> None:
    """Keep-alive events, and text in events about the stream, are not of the answer; a list is its objects."""
    body = (
        event("x", "ping")
        + event({"text": "x"}, "keep-alive")
        + event("ok", "status")
        + event([{"text": "a"}, {"text": "b"}])
    )
    assert read(GENERIC, body, DONE).snapshot.text == "ab"


# --- endings ---


@pytest.mark.parametrize(
    "last",
    [
        event("[DONE]"),
        event('"[DONE]"'),
        event(" [DONE] "),
        event("bye", "done"),
        event({"x": 1}, "End"),
        event({"done": True}),
        event({"type": "message_stop"}),
        event({"event_type": "stream-end"}),
        event({"is_finished": True, "finish_reason": "COMPLETE"}),
        b"data: [DONE]",
    ],
)
def test_common_markers(last: bytes) -> None:
    """With a marker the answer is complete, at once, and nothing after it is read."""
    sink = read(
        GENERIC, event({"text": "Hi"}), last, event({"text": "more"}) if last.endswith(b"\n\n") else b""
    )
    assert (sink.state, sink.snapshot.text) == ("completed", "Hi")
    assert sink.reason == ("COMPLETE" if b"COMPLETE" in last else "done")


@pytest.mark.parametrize(
    "almost",
    [
        event({"done": False}),
        event({"done": 1}),
        event({"done": "true"}),
        event("DONE"),
        event({"type": "done?"}),
    ],
)
def test_what_is_no_marker(almost: bytes) -> None:
    """Without one, a clean end is a truncation."""
    assert read(GENERIC, event({"text": "Hi"}), almost).ending == ("failed", "truncated")


def test_a_finish_reason_ends_it_too() -> None:
    """A finish reason and then the end of the body is an ending; a status that says that it goes on is none."""
    for where in FINISH:
        value: Any = "length"
        for token in reversed(pointer("finish", where)):
            value = [value] if token == "0" else {token: value}
        assert read(GENERIC, event({"text": "Hi"}), event(value), clean=False).ending == (
            "completed",
            "length",
        )
    for status in ("", "null", None, "in_progress", 3):
        assert read(GENERIC, event({"text": "Hi", "finish_reason": status})).ending == ("failed", "truncated")


@pytest.mark.parametrize(
    ("done", "last", "ended"),
    [
        ("data:END", b"data: END\n\n", True),
        ("data:END", b"event: end\ndata: x\n\n", False),
        ("bye", b"event: Bye\ndata: x\n\n", True),
        ("bye", event({"event": "bye"}), True),
        ("bye", event("bye"), False),
        ("/a/0/b", event({"a": [{"b": 1}]}), True),
        ("/a/0/b", event({"a": [{"b": 0}]}), False),
        ("/state=3", event({"state": 3}), True),
        ("/state=3", event({"state": "3"}), False),
        ('/state="over"', event({"state": "over"}), True),
        ("/done=true", event({"done": 1}), False),
        (["[EOS]", "/x"], event("[EOS]"), True),
        ("[EOS]", event("[DONE]"), False),
    ],
)
def test_chosen_markers(done: Any, last: bytes, *, ended: bool) -> None:
    """A marker is data, the name of an event, or a place and its value; only those chosen end it."""
    dialect = generic(done=done, finish=())
    assert read(dialect, event({"text": "Hi"}), last).state == ("completed" if ended else "failed")


# --- errors ---


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (event({"error": {"message": "boom", "code": 429}}), "rate_limit"),
        (event({"error": "boom"}), "server"),
        (event({"error": True, "message": "boom"}), "server"),
        (event("boom", "error"), "server"),
        (event({"detail": "boom"}, "error"), "server"),
        (event({"type": "error", "message": "boom"}), "server"),
        (event({"message": "boom", "code": 503}), "overloaded"),
        (event({"detail": "boom"}), "server"),
        (event({"last_error": {"message": "boom", "code": "rate_limit_exceeded"}}), "rate_limit"),
        (event({"errors": [{"message": "boom"}]}), "server"),
        (event([{"error": "boom"}]), "server"),
        (b"error: boom\n\n", "server"),
        (b'{"error": "boom"}\n', "server"),
    ],
)
def test_errors(error: bytes, kind: str) -> None:
    """Wherever an error is told, it ends the stream with the provider's message, also after a finish reason."""
    for before in (b"", event({"text": "Hi"}), event({"text": "Hi", "finish_reason": "stop"})):
        if not before and error.startswith(b"{"):
            continue
        sink = read(GENERIC, before + error)
        assert sink.fault is not None
        assert (sink.ending, sink.fault.message, sink.fault.kind) == (
            ("failed", "provider_error"),
            "boom",
            kind,
        )


def test_what_is_no_error() -> None:
    """Empty errors, a message without an error's code, and details beside text are none."""
    values: list[Any] = [
        {"text": "a", "error": None},
        {"text": "b", "error": ""},
        {"text": "c", "error": {}, "errors": []},
        {"text": "d", "detail": "high"},
        {"text": "e", "message": "ok", "code": 200},
    ]
    sink = read(GENERIC, *map(event, values), DONE)
    assert (sink.state, sink.snapshot.text) == ("completed", "abcde")


def test_a_finish_reason_that_is_an_error() -> None:
    """A reason that begins with error, or is `failed`, is the provider's failure."""
    for reason in ("error", "ERROR_TOXIC", "failed"):
        assert (
            read(GENERIC, event({"text": "Hi", "finish_reason": reason, "done": True})).reason
            == "provider_error"
        )


def test_chosen_errors() -> None:
    """With error places of one's own only those count, and only those names."""
    dialect = generic(error=("/fault/text", "oops"))
    assert read(dialect, event({"fault": {"text": "boom"}}), DONE).reason == "provider_error"
    assert read(dialect, event({"text": "boom"}, "oops"), DONE).reason == "provider_error"
    assert read(dialect, event({"error": "boom", "text": "x"}, "error"), DONE).snapshot.text == "x"


# --- usage, labels ---


def test_usage_is_merged() -> None:
    """Input told in one event and output in another are one usage; of repeated numbers the last counts."""
    body = (
        event({"usage": {"prompt_tokens": 3}})
        + event({"usage": {"completion_tokens": 1}})
        + event({"eval_count": 2})
    )
    assert read(GENERIC, body, DONE).snapshot.usage == Usage(3, 2)
    dialect = generic(input_tokens="/in", output_tokens="/n/out")
    assert read(dialect, event({"in": 1, "n": {"out": 2}}), event({"in": -1}), DONE).snapshot.usage == Usage(
        1, 2
    )


def test_long_labels() -> None:
    """Of a finish reason only the start is kept; a model or id that long is none."""
    snapshot = read(
        GENERIC, event({"model": "m" * 999, "id": "i" * 999, "finish_reason": "f" * 999})
    ).snapshot
    assert (snapshot.model, snapshot.response_id) == (None, None)
    assert len(snapshot.finish_reason or "") < 999


# --- the options ---


@pytest.mark.parametrize(
    ("options", "field"),
    [
        ({"name": ""}, "name"),
        ({"text": "text"}, "text"),
        ({"text": "/a~2"}, "text"),
        ({"text": ()}, "text"),
        ({"text": ["/a", 3]}, "text"),
        ({"text": "/a" * 99}, "text"),
        ({"finish": 3}, "finish"),
        ({"reasoning": "x"}, "reasoning"),
        ({"error": "/a~"}, "error"),
        ({"done": "/a=nope"}, "done"),
        ({"done": "data: "}, "done"),
        ({"done": ""}, "done"),
        ({"done": (), "finish": ()}, "done"),
        ({"input_tokens": "n"}, "input_tokens"),
        ({"output_tokens": "n"}, "output_tokens"),
        ({"framing": "none"}, "framing"),
        ({"end": "never"}, "end"),
        ({"method": "PUT"}, "method"),
        ({"path": "x"}, "path"),
    ],
)
def test_options_are_checked(options: dict[str, Any], field: str) -> None:
    """A wrong option is named."""
    with pytest.raises(ConfigurationError) as caught:
        generic(**options)
    assert caught.value.field == field


def test_options_show() -> None:
    """Name, framing, path, markers and the clean end are in the dialect as they were given."""
    dialect = generic(
        "mine", framing="ndjson", path="/x", done="/done", end="clean", abort_stops_billing=True
    )
    assert (dialect.name, dialect.framing, dialect.asking.path) == ("mine", "ndjson", "/x")
    assert (dialect.endings.markers, dialect.endings.clean_end) == (("/done",), True)
    assert (dialect.abort_stops_billing, GENERIC.abort_stops_billing) == (True, None)
    assert not GENERIC.endings.clean_end


def test_pointers() -> None:
    """RFC 6901: escapes, indexes without leading zeros, the whole value; nothing is found beside the data."""
    value = {"a/b": {"m~n": [1, {"": "x"}]}, "0": "zero"}
    assert lookup(value, pointer("f", "/a~1b/m~0n/0")) == 1
    assert lookup(value, pointer("f", "/a~1b/m~0n/1/")) == "x"
    assert lookup(value, pointer("f", "/0")) == "zero"
    assert lookup(value, pointer("f", "")) is value
    for absent in ("/b", "/a~1b/m~0n/00", "/a~1b/m~0n/9", "/a~1b/m~0n/-", "/0/0"):
        assert lookup(value, pointer("f", absent)) is MISSING


# --- asking ---


def progress(last_id: str = "", path: str = "/p") -> Progress:
    return Progress(snapshot=Snapshot(), last_event_id=last_id, path=path)


def test_the_first_request() -> None:
    """An object is posted as it is; without one, or by GET, its fields go into the query."""
    first = GENERIC.asking.first
    assert first is not None
    posted = first({"q": "x"}, "/p")
    assert (posted.method, posted.path, posted.body) == ("POST", "/p", {"q": "x"})
    got = first({}, "/p")
    assert (got.method, got.path, got.body) == ("GET", "/p", None)
    by_get = generic(method="GET").asking.first
    assert by_get is not None
    assert by_get({"q": "a b&c", "n": 1, "deep": True}, "/p").path == "/p?q=a+b%26c&n=1&deep=true"
    with pytest.raises(ConfigurationError, match=r"request\.q"):
        by_get({"q": [1]}, "/p")


def test_going_on_after_an_id() -> None:
    """With an id the same request is made again, with the id in the header that the standard names."""
    resume = GENERIC.asking.resume
    assert resume is not None
    call = resume({"q": "x"}, progress("abc"))
    assert call is not None
    assert (call.method, call.path, call.body, call.headers) == (
        "POST",
        "/p",
        {"q": "x"},
        {"Last-Event-ID": "abc"},
    )
    call = resume({}, progress("abc"))
    assert call is not None
    assert (call.method, call.body, call.headers) == ("GET", None, {"Last-Event-ID": "abc"})
    assert GENERIC.asking.resume_ends == {204}
    for unsendable in ("a\x01b", "\u00e9", " a"):
        assert resume({}, progress(unsendable)) is None


@pytest.mark.parametrize(
    ("options", "request_", "again"),
    [
        ({}, {"q": 1}, False),
        ({}, {}, True),
        ({"method": "GET"}, {"q": 1}, True),
        ({"method": "GET", "framing": "ndjson"}, {}, False),
        ({"method": "GET", "reconnect": False}, {}, False),
        ({"reconnect": True}, {"q": 1}, True),
    ],
)
def test_asking_again_without_an_id(
    options: dict[str, Any], request_: dict[str, Any], *, again: bool
) -> None:
    """A GET of an event stream is repeated, as the standard does; a POST would begin a second answer."""
    resume = generic(**options).asking.resume
    assert resume is not None
    call = resume(request_, progress())
    assert (call is not None) == again
    if call is not None:
        assert call.headers == {}


@pytest.mark.parametrize(
    "case",
    [
        case
        for case in json.loads((cases_dir() / "sse_reconnect_cases.json").read_text())
        if "send" in case["script"][0]
    ],
    ids=lambda case: case["name"],
)
def test_reconnect_cases(case: dict[str, Any]) -> None:
    """What the published scripts expect of the second request, said by the dialect: the id, and that there is one."""
    body = case["script"][0]["send"].encode()
    told = replay("sse", body)
    assert GENERIC.asking.resume is not None
    call = GENERIC.asking.resume({}, progress(told.last_event_id))
    assert call is not None
    wanted = case["script"][1].get("expect_request", {}).get("last-event-id", told.last_event_id or None)
    assert call.headers.get("Last-Event-ID") == wanted


# --- recorded streams ---

RECORDED = transcripts(*PRESETS)
WANTED = {
    "cohere-v1-ndjson": ("COMPLETE", Usage(69, 116)),
    "google-interactions": ("completed", Usage(10, 29)),
    "openai-assistants": ("done", Usage(382, 90)),
}


@pytest.mark.parametrize("name", [None, "generic"])
@pytest.mark.parametrize("case", RECORDED, ids=lambda case: case["id"])
def test_presets(case: dict[str, Any], name: str | None) -> None:
    """Recorded streams of APIs that are read as generic give their text, usage and ending, by preset and without."""
    result = replay(name or case["dialect"], case["body"])
    reason, usage = WANTED.get(case["dialect"], (None, None))
    assert (result.state, result.skipped) == ("completed", 0)
    assert result.snapshot.text
    if usage is not None:
        assert (result.reason, result.snapshot.usage) == (
            reason if name is None or reason != "completed" else "done",
            usage,
        )
    for size in (1, 97):
        assert replay(name or case["dialect"], case["body"], chunk=size) == result


@pytest.mark.parametrize("case", RECORDED, ids=lambda case: case["id"])
def test_presets_cut(case: dict[str, Any]) -> None:
    """Cut before its marker such a stream is truncated; other line ends and keep-alives change nothing."""
    body = case["body"].rstrip(b"\n")
    sse = find(case["dialect"]).framing == "sse"
    blocks = body.split(b"\n\n" if sse else b"\n")
    end = b"\n\n" if sse else b"\n"
    for count in range(1, len(blocks)):
        cut = replay(case["dialect"], end.join(blocks[:count]) + end)
        assert (cut.state, cut.reason) == ("failed", "truncated")
    whole = replay(case["dialect"], case["body"])
    for changed in (
        body.replace(b"\n", b"\r\n") + b"\r\n" * 2,
        end.join(blocks).replace(end, end + b": alive" + end) + end,
        b"\xef\xbb\xbf" + body + end,
    ):
        assert replay(case["dialect"], changed) == whole


# --- properties ---

FIELDS = (
    "text",
    "content",
    "delta",
    "message",
    "error",
    "detail",
    "code",
    "type",
    "event",
    "done",
    "finish_reason",
    "usage",
    "prompt_tokens",
    "completion_tokens",
    "id",
    "model",
    "choices",
    "data",
)


@settings(deadline=None)  # a test asserts no time
@given(
    st.lists(odd_json(*FIELDS), max_size=6), st.sampled_from(["message", "error", "ping", "done", "other"])
)
def test_any_json_is_read_or_refused(values: list[Any], name: str) -> None:
    """A reader raises UnparseableError or nothing, and its deltas can be folded."""
    survives(GENERIC, values, name)


FRAGMENTS = st.sampled_from(
    [
        b"{",
        b"}",
        b"[",
        b"]",
        b'"',
        b",",
        b"\n",
        b"\r\n",
        b"data: ",
        b"event: done\n",
        b"[DONE]",
        b'{"text":"a"}',
        b'{"done":true}',
        b'{"error":"x"}',
        b"1",
        b"\xff",
    ]
)


@settings(deadline=None)  # a test asserts no time
@given(st.lists(FRAGMENTS | st.binary(max_size=4), max_size=14).map(b"".join), CUTS)
def test_any_bytes_end_the_same_under_every_split(body: bytes, cuts: list[int]) -> None:
    """Arbitrary bytes end in one way, the same whole and cut anywhere.

    But for errors outside of events: the events which came in the same read are kept.
    """
    whole, cut = read(GENERIC, body), read_cut(GENERIC, body, cuts)
    assert whole.ending == cut.ending
    if whole.reason != "provider_error":
        assert (whole.payloads, whole.snapshot) == (cut.payloads, cut.snapshot)


@settings(deadline=None)  # a test asserts no time
@given(
    st.lists(WORDS, min_size=1, max_size=8),
    st.sampled_from(["/text", "/a/0/b~1c", ""]),
    st.sampled_from(["[END]", "/over=true", "fin"]),
    st.sampled_from(["sse", "ndjson", "json-array"]),
    CUTS,
)
def test_a_generated_stream_comes_back(
    words: list[str], where: str, done: str, framing: Any, cuts: list[int]
) -> None:
    """Text at a chosen place, a chosen marker, in each framing, is read as it was written."""
    tokens = pointer("text", where)
    values: list[Any] = []
    for word in words:
        value: Any = word
        for token in reversed(tokens):
            value = [value] if token == "0" else {token: value}
        values.append(value)
    values.append({"[END]": "[END]", "/over=true": {"over": True}, "fin": {"type": "fin"}}[done])
    texts = [json.dumps(value, ensure_ascii=False) for value in values]
    body = {
        "sse": "".join(f"data: {text}\n\n" for text in texts),
        "ndjson": "".join(f"{text}\n" for text in texts),
        "json-array": f"[{','.join(texts)}]",
    }[framing]
    dialect = generic(text=where, done=done, framing=framing, error=())
    sink = read_cut(dialect, body.encode(), cuts)
    expected = (
        "".join(words) if "[END]" not in words or done != "[END]" else "".join(words[: words.index("[END]")])
    )
    assert (sink.ending, sink.snapshot.text, sink.skipped) == (("completed", "done"), expected, [])
