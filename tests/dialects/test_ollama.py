"""What Ollama sends, and how it is asked, one statement a test."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from supervisor.dialects import ToolCall, Usage
from supervisor.dialects.ollama import OLLAMA
from supervisor.dialects.tool_calls import MAX_CALLS
from supervisor.errors import ConfigurationError
from tests.dialects.answers import CUTS, WORDS, folded, odd_json, read, read_cut, refused, survives, tell

DONE = {"done": True, "done_reason": "stop", "prompt_eval_count": 3, "eval_count": 2}


def chat(content: Any = "", **fields: Any) -> dict[str, Any]:
    """Return a line of a chat."""
    known = {name: fields.pop(name) for name in ("model", "done", *DONE) if name in fields}
    message = {"role": "assistant", "content": content, **fields}
    return {"model": "m", "created_at": "2026-01-01T00:00:00Z", "message": message, "done": False, **known}


def generate(response: Any = "", **fields: Any) -> dict[str, Any]:
    """Return a line of a generation."""
    return {"model": "m", "created_at": "2026-01-01T00:00:00Z", "response": response, "done": False, **fields}


def call(name: Any = "f", arguments: Any = None, **fields: Any) -> dict[str, Any]:
    """Return a tool call, as Ollama has them."""
    function = {"name": name, "arguments": {} if arguments is None else arguments}
    if "index" in fields:
        function["index"] = fields.pop("index")
    return {"function": function, **fields}


def wire(*values: Any) -> bytes:
    """Return a body."""
    return b"".join(json.dumps(value).encode() + b"\n" for value in values)


@pytest.mark.parametrize("line", [chat, generate])
def test_an_answer(line: Any) -> None:
    """Thinking, text, then the last line with the reason and the usage, in chat and in generate."""
    sink = read(OLLAMA, wire(line("", thinking="hm"), line("He"), line("llo"), line("", **DONE)))
    snapshot = sink.snapshot
    assert (sink.ending, snapshot.text, snapshot.reasoning) == (("completed", "stop"), "Hello", "hm")
    assert (snapshot.finish_reason, snapshot.usage, snapshot.model) == ("stop", Usage(3, 2), "m")


@pytest.mark.parametrize("indent", [None, 2])
@pytest.mark.parametrize("end", ["", "\n"])
def test_an_answer_that_was_not_streamed(indent: int | None, end: str) -> None:
    """The whole answer in one object, over one line or several, with or without a line end."""
    body = json.dumps(chat("Hello", tool_calls=[call()], **DONE), indent=indent) + end
    for clean in (True, False):
        sink = read(OLLAMA, body.encode(), clean=clean)
        assert (sink.ending, sink.snapshot.text) == (("completed", "stop"), "Hello")
        assert [one.name for one in sink.snapshot.tool_calls] == ["f"]


@pytest.mark.parametrize(
    ("last", "finish", "reason"),
    [
        ({"done": True, "done_reason": "length"}, "length", "length"),
        ({"done": True}, None, "done"),
        ({"done": True, "done_reason": ""}, None, "done"),
        ({"done": True, "done_reason": None}, None, "done"),
        ({"done": True, "done_reason": "load"}, "load", "load"),
    ],
)
def test_reasons(last: dict[str, Any], finish: str | None, reason: str) -> None:
    """The reason is the provider's; without one the stream is done."""
    sink = read(OLLAMA, wire(chat("x", **last)))
    assert (sink.ending, sink.snapshot.finish_reason, sink.snapshot.usage) == (
        ("completed", reason),
        finish,
        None,
    )


@pytest.mark.parametrize("clean", [True, False])
def test_only_done_ends_it(*, clean: bool) -> None:
    """Text, a reason without `done`, a last line cut off, and no line at all are truncations."""
    for body in (
        wire(chat("Hello")),
        wire(chat("Hello", done_reason="stop")),
        wire(chat("Hello"), chat("", **DONE))[:-2],
        b"",
        b"\n\n",
        b'{"model":',
    ):
        sink = read(OLLAMA, body, clean=clean)
        assert sink.ending == ("failed", "truncated")
        assert sink.snapshot.model == ("m" if b"Hello" in body else None)


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        ({"error": "model runner has unexpectedly stopped"}, "server"),
        ({"error": {"message": "too many requests", "code": 429}}, "rate_limit"),
        ({"error": "unauthorized", "StatusCode": 401, "Status": "401 Unauthorized"}, "auth"),
        ({"error": "", "model": None}, "server"),
        ({"message": "model not found", "code": 404}, "invalid_request"),
        ({"detail": "Not Found"}, "server"),
        ([{"error": "x"}], "server"),
    ],
)
def test_errors(error: Any, kind: str) -> None:
    """An error is a line, also after text and after the last line of a broken server; its message is the provider's."""
    sink = read(OLLAMA, wire(chat("He"), error, chat("", **DONE)))
    if error == {"error": "", "model": None}:
        assert sink.ending == ("completed", "stop")  # nothing is wrong, says the server
        return
    assert sink.fault is not None
    assert (sink.ending, sink.fault.kind, sink.snapshot.text) == (("failed", "provider_error"), kind, "He")


def test_an_error_in_place_of_a_stream() -> None:
    """A JSON error over several lines, and what only calls itself a message, fail with that message."""
    for body in (
        b'{\n  "error": "no such model"\n}\n',
        b'{"error":"no such model"}',
        b'{"msg": "no such model"}',
    ):
        sink = read(OLLAMA, body)
        assert sink.fault is not None
        assert (sink.ending, sink.fault.message) == (("failed", "provider_error"), "no such model")
    assert read(OLLAMA, b"<html>bad gateway</html>").ending == ("failed", "protocol")
    assert read(OLLAMA, b"not found\n").ending == ("failed", "protocol")
    assert read(OLLAMA, b'{"hello": "world"}\n').ending == ("failed", "protocol")


def test_tool_calls() -> None:
    """Calls come whole, several at once or one to a line, with or without ids and indexes; arguments become JSON text."""
    lines = [
        chat("", tool_calls=[call("f", {"a": 1}), call("f", {"a": 2})]),
        chat("", tool_calls=[call("g", "{}", id="call_1")]),
        chat("", tool_calls=[call("h", {"b": [True]}, index=3, id="call_2")]),
        chat("", **DONE),
    ]
    expected = (
        ToolCall("", "f", '{"a":1}'),
        ToolCall("", "f", '{"a":2}'),
        ToolCall("call_1", "g", "{}"),
        ToolCall("call_2", "h", '{"b":[true]}'),
    )
    assert read(OLLAMA, wire(*lines)).snapshot.tool_calls == expected


def test_calls_on_one_index() -> None:
    """Two calls that both say index 0, each on a line of its own, are two calls."""
    lines = [chat("", tool_calls=[call(name, {"x": name}, index=0)]) for name in ("f", "g", "f")]
    assert [one.arguments for one in read(OLLAMA, wire(*lines)).snapshot.tool_calls] == [
        '{"x":"f"}',
        '{"x":"g"}',
        '{"x":"f"}',
    ]


@pytest.mark.parametrize(
    "line",
    [
        b"<p>",
        b"3",
        {"hello": "world"},
        chat(3),
        chat("", tool_calls=3),
        chat("", tool_calls=["f"]),
        chat("", tool_calls=[{"name": "f"}]),
        chat("", tool_calls=[call(index=-1)]),
        chat("", tool_calls=[call(index=MAX_CALLS)]),
        chat("", tool_calls=[call()] * (MAX_CALLS + 1)),
        {"message": ["x"]},
        {"response": "x", "done": "true"},
        {"response": 3},
    ],
)
def test_what_cannot_be_read(line: Any) -> None:
    """A line of another shape is refused and changes nothing."""
    reader = OLLAMA.reader()
    assert refused(reader, line)
    assert (reader.ending(), folded(tell(reader, chat("x"))).text) == (None, "x")


def test_calls_are_bounded() -> None:
    """A call more than a choice may have is refused, whatever lines they come on."""
    reader = OLLAMA.reader()
    tell(reader, chat("", tool_calls=[call(index=n) for n in range(MAX_CALLS)]))
    assert "tool calls" in refused(reader, chat("", tool_calls=[call()]))


def test_lines_that_say_nothing() -> None:
    """Progress of loading a model, a line without text, and null fields are read and mean nothing."""
    reader = OLLAMA.reader()
    tell(reader, chat("x"))
    nothing = [
        {"status": "loading"},
        chat(""),
        chat(None, thinking=None, tool_calls=None),
        generate(None, error=None),
    ]
    assert tell(reader, *nothing) == []


def test_long_labels() -> None:
    """Of a reason only the start is kept; a model that long is none."""
    snapshot = read(
        OLLAMA, wire(chat("x", model="m" * 999), chat("", done=True, done_reason="r" * 999))
    ).snapshot
    assert snapshot.model == "m"
    assert len(snapshot.finish_reason or "") < 999


def test_other_framings() -> None:
    """A proxy's event stream, and an array, of the same objects are read as the lines are."""
    values = [chat("He"), chat("llo"), chat("", **DONE)]
    wanted = read(OLLAMA, wire(*values)).snapshot
    events = b": hi\n\n" + b"".join(b"data: " + json.dumps(one).encode() + b"\n\n" for one in values)
    for body in (events, json.dumps(values).encode(), json.dumps(values, indent=1).encode()):
        sink = read(OLLAMA, body)
        assert (sink.ending, sink.snapshot) == (("completed", "stop"), wanted)


# --- asking ---


def test_the_first_request() -> None:
    """Chat by default, generate for a prompt, streamed, and the request unchanged."""
    first = OLLAMA.asking.first
    assert first is not None
    request: dict[str, Any] = {"model": "m", "messages": []}
    asked = first(request, "/api/chat")
    assert (asked.path, asked.method, asked.body) == ("/api/chat", "POST", {**request, "stream": True})
    assert first({"prompt": "p"}, "/x/api/chat").path == "/x/api/generate"
    assert first({"prompt": "p"}, "/mine").path == "/mine"
    assert first({"prompt": "p", **request}, "/api/chat").path == "/api/chat"
    assert request == {"model": "m", "messages": []}
    with pytest.raises(ConfigurationError, match="stream"):
        first({**request, "stream": False}, "/api/chat")


USER = {"role": "user", "content": "u"}


@pytest.mark.parametrize(
    ("request_", "wanted"),
    [
        ({"messages": [USER]}, {"messages": [USER, {"role": "assistant", "content": "so far"}]}),
        (
            {"messages": [USER, {"role": "assistant", "content": "And "}], "think": False},
            {"messages": [USER, {"role": "assistant", "content": "And so far"}], "think": False},
        ),
        ({"prompt": "p: ", "raw": True}, {"prompt": "p: so far", "raw": True}),
        (
            {"messages": [USER], "tools": [{}]},
            {"messages": [USER, {"role": "assistant", "content": "so far"}], "tools": [{}]},
        ),
    ],
)
def test_continuation(request_: dict[str, Any], wanted: dict[str, Any]) -> None:
    """The text becomes the assistant's last message, or the end of a raw prompt; the request is not changed."""
    before = json.dumps(request_)
    assert OLLAMA.asking.continuation is not None
    assert OLLAMA.asking.continuation(request_, "so far") == wanted
    assert json.dumps(request_) == before


@pytest.mark.parametrize(
    "request_",
    [
        {"messages": [USER], "format": "json"},
        {"messages": [USER], "format": {"type": "object"}},
        {"messages": [USER], "think": True},
        {"messages": [USER], "think": "high"},
        {"messages": [USER], "logprobs": True},
        {"messages": [USER], "tool_choice": "required"},
        {"messages": [USER], "tool_choice": {"function": {"name": "f"}}},
        {"messages": []},
        {"messages": [USER, {"role": "assistant", "content": "", "tool_calls": [{}]}]},
        {"messages": [USER, {"role": "assistant", "content": [{"type": "text"}]}]},
        {"prompt": "p"},
        {"prompt": "p", "raw": True, "suffix": "s"},
        {},
    ],
)
def test_no_continuation(request_: dict[str, Any]) -> None:
    """Where a joined answer would not be the answer, or cannot be had, there is a reason."""
    assert OLLAMA.asking.continuation is not None
    assert isinstance(OLLAMA.asking.continuation(request_, "so far"), str)


# --- properties ---

FIELDS = (
    "model",
    "message",
    "content",
    "thinking",
    "tool_calls",
    "function",
    "name",
    "arguments",
    "index",
    "id",
    "response",
    "done",
    "done_reason",
    "error",
    "prompt_eval_count",
    "eval_count",
)


@settings(deadline=None)  # a test asserts no time
@given(
    st.lists(odd_json(*FIELDS) | st.builds(chat, odd_json(*FIELDS), tool_calls=odd_json(*FIELDS)), max_size=5)
)
def test_any_json_is_read_or_refused(values: list[Any]) -> None:
    """A reader raises UnparseableError or nothing, and its deltas can be folded."""
    survives(OLLAMA, values, "message")


@settings(deadline=None)  # a test asserts no time
@given(
    st.lists(
        st.sampled_from(
            [
                b"{",
                b"}",
                b"\n",
                b"\r",
                b'"',
                b"\xff",
                b"data: ",
                b"[",
                *(wire(one) for one in (chat("x"), chat("", **DONE), {"error": "e"}, 3)),
            ]
        )
        | st.binary(max_size=4),
        max_size=12,
    ).map(b"".join),
    CUTS,
)
def test_any_bytes_end_the_same_under_every_split(body: bytes, cuts: list[int]) -> None:
    """Arbitrary bytes end in one way, the same whole and cut anywhere."""
    whole = read(OLLAMA, body)
    if body[:1] in b"{[":  # an error outside of the events of an event stream ends it where the read ends
        cut = read_cut(OLLAMA, body, cuts)
        assert (whole.ending, whole.payloads, whole.snapshot) == (cut.ending, cut.payloads, cut.snapshot)


@settings(deadline=None)  # a test asserts no time
@given(
    st.lists(st.tuples(st.sampled_from(["content", "thinking"]), WORDS), max_size=10),
    st.lists(
        st.tuples(WORDS.filter(bool), st.dictionaries(WORDS, WORDS | st.integers(-9, 9), max_size=3)),
        max_size=3,
    ),
    st.integers(0, 10**9),
    st.booleans(),
    CUTS,
)
def test_a_generated_stream_comes_back(
    pieces: list[tuple[str, str]],
    calls: list[tuple[str, dict[str, Any]]],
    count: int,
    chatting: bool,
    cuts: list[int],
) -> None:
    """Text, thinking, tool calls and usage are read as they were written, under any split."""
    lines = []
    for field, text in pieces:
        if chatting:
            lines.append(chat(**{field: text}))
        else:
            lines.append(generate(text) if field == "content" else generate(thinking=text))
    calls = calls if chatting else []
    lines += [chat("", tool_calls=[call(name, arguments)]) for name, arguments in calls]
    lines.append(chat("", done=True, done_reason="stop", eval_count=count))
    sink = read_cut(OLLAMA, wire(*lines), cuts)
    snapshot = sink.snapshot
    assert sink.ending == ("completed", "stop")
    assert snapshot.text == "".join(text for field, text in pieces if field == "content")
    assert snapshot.reasoning == "".join(text for field, text in pieces if field == "thinking")
    assert [(one.name, json.loads(one.arguments)) for one in snapshot.tool_calls] == calls
    assert snapshot.usage == Usage(None, count)
    assert not sink.skipped
