"""Anthropic Messages: each event, odd shapes, errors, what is asked, hostile input, and generated messages read back."""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from supervisor.dialects import ToolCall, UnparseableError, Usage
from supervisor.dialects.anthropic import ANTHROPIC, MAX_BLOCK_INDEX, MAX_HELD_CHARS, MAX_LABEL_CHARS
from supervisor.dialects.reading import BodyReader
from supervisor.dialects.replay import ReplayResult, replay
from supervisor.dialects.tool_calls import MAX_CALLS
from supervisor.errors import ConfigurationError
from tests.dialects.bodies import RecordingSink, event


def told(value: dict[str, Any]) -> bytes:
    """Return an event under its name."""
    return event(value, value["type"])


def start(**fields: Any) -> bytes:
    message = {"id": "msg_1", "type": "message", "role": "assistant", "model": "claude-x", "content": []}
    usage = {"input_tokens": 10, "cache_read_input_tokens": 4, "output_tokens": 1}
    return told(
        {"type": "message_start", "message": {**message, "stop_reason": None, "usage": usage, **fields}}
    )


def block(index: Any, kind: str, **fields: Any) -> bytes:
    return told({"type": "content_block_start", "index": index, "content_block": {"type": kind, **fields}})


def delta(index: Any, kind: str, **fields: Any) -> bytes:
    return told({"type": "content_block_delta", "index": index, "delta": {"type": kind, **fields}})


def close(index: Any) -> bytes:
    return told({"type": "content_block_stop", "index": index})


def text(piece: str, index: int = 0) -> bytes:
    return delta(index, "text_delta", text=piece)


def ends(stop_reason: Any = "end_turn", **usage: Any) -> bytes:
    value = {"type": "message_delta", "delta": {"stop_reason": stop_reason, "stop_sequence": None}}
    return told({**value, "usage": usage} if usage else value)


STOP = told({"type": "message_stop"})
TEXT = block(0, "text", text="")


def answer(*events: bytes) -> ReplayResult:
    return replay("anthropic", b"".join(events))


def calls(*events: bytes) -> list[tuple[str, str, str]]:
    result = answer(start(), *events, ends("tool_use"), STOP)
    assert (result.state, result.skipped) == ("completed", 0)
    return [(call.id, call.name, call.arguments) for call in result.snapshot.tool_calls]


# --- each event ---


def test_a_message() -> None:
    """Text, reasoning and a call are told; signatures, redacted thinking, citations and pings add nothing."""
    result = answer(
        start(),
        block(0, "thinking", thinking="", signature=""),
        delta(0, "thinking_delta", thinking="Hm"),
        delta(0, "signature_delta", signature="c2ln"),
        close(0),
        block(1, "redacted_thinking", data="secret"),
        close(1),
        told({"type": "ping"}),
        block(2, "text", text="So"),
        text(": 4", 2),
        delta(2, "citations_delta", citation={"cited_text": "four"}),
        close(2),
        block(3, "tool_use", id="toolu_1", name="add", input={}),
        delta(3, "input_json_delta", partial_json=""),
        delta(3, "input_json_delta", partial_json='{"a": '),
        delta(3, "input_json_delta", partial_json="1}"),
        close(3),
        ends("tool_use", output_tokens=30),
        STOP,
    )
    assert (result.state, result.reason, result.skipped) == ("completed", "tool_use", 0)
    said = result.snapshot
    assert (said.text, said.reasoning, said.refusal) == ("So: 4", "Hm", "")
    assert said.tool_calls == (ToolCall("toolu_1", "add", '{"a": 1}'),)
    assert (said.model, said.response_id) == ("claude-x", "msg_1")
    assert said.usage == Usage(10, 30, None, 4)


@pytest.mark.parametrize("kind", ["tool_use", "server_tool_use", "mcp_tool_use"])
def test_calls_of_every_kind(kind: str) -> None:
    """A call is one whoever runs it; its result is not."""
    result = kind.removesuffix("use") + "result"
    assert calls(
        block(0, kind, id="a", name="f", input={}),
        delta(0, "input_json_delta", partial_json="[1]"),
        close(0),
        block(1, result, tool_use_id="a", content=[{"type": "text", "text": "no"}], is_error=False),
        delta(1, "input_json_delta", partial_json="no"),
        close(1),
    ) == [("a", "f", "[1]")]


def test_arguments_that_come_whole() -> None:
    """Arguments in the start are told at once, and deltas after them only repeat them; none at all are an empty object."""
    assert calls(
        block(0, "tool_use", id="a", name="f", input={"x": [1, "é"]}),
        delta(0, "input_json_delta", partial_json='{"x": [1, "é"]}'),
        close(0),
        block(1, "tool_use", id="b", name="g", input={}),
        close(1),
        close(1),
        block(2, "tool_use", id="c", name="h", input='{"y":2}'),
        block(3, "tool_use", id="d", name="i"),
    ) == [("a", "f", '{"x":[1,"é"]}'), ("b", "g", "{}"), ("c", "h", '{"y":2}'), ("d", "i", "{}")]


def test_arguments_that_were_cut() -> None:
    """A call that the limit cut before its first argument has none, rather than empty ones."""
    opened = block(0, "tool_use", id="a", name="f", input={})
    result = answer(start(), opened, ends("max_tokens"), STOP)
    assert (result.reason, result.snapshot.tool_calls) == ("max_tokens", (ToolCall("a", "f", ""),))


def test_interleaved_calls() -> None:
    """Each piece of arguments goes to the call with its index; without one, to the last."""
    assert calls(
        block(5, "tool_use", id="a", name="f", input={}),
        block(2, "tool_use", id="b", name="g", input={}),
        delta(5, "input_json_delta", partial_json="1"),
        delta(2, "input_json_delta", partial_json="2"),
        delta(5, "input_json_delta", partial_json="1"),
        delta(None, "input_json_delta", partial_json="2"),
        close(None),
    ) == [("a", "f", "11"), ("b", "g", "22")]


def test_an_index_used_again() -> None:
    """A new block takes the place of the one before it; the same start again does not."""
    first = block(0, "tool_use", id="a", name="f", input={})
    second = block(0, "tool_use", id="b", name="f", input={})
    one = delta(0, "input_json_delta", partial_json="1")
    assert calls(first, first, one, second, one, close(0)) == [("a", "f", "1"), ("b", "f", "1")]
    assert calls(first, one, TEXT, one) == [("a", "f", "1")]
    whole = block(0, "tool_use", id="a", name="f", input={"x": 1})
    assert calls(whole, whole, close(0)) == [("a", "f", '{"x":1}')]


def test_a_start_with_content() -> None:
    """A start that has its content and stop reason is believed, and what follows about its blocks repeats it."""
    content = [{"type": "text", "text": "Hi"}, {"type": "tool_use", "id": "a", "name": "f", "input": {}}]
    whole = start(content=content, stop_reason="tool_use")
    for rest in (
        STOP,
        block(0, "text", text="Hi")
        + text("Hi")
        + delta(1, "input_json_delta", partial_json="{}")
        + whole
        + STOP,
    ):
        result = answer(whole, rest)
        assert (result.state, result.reason, result.snapshot.text) == ("completed", "tool_use", "Hi")
        assert result.snapshot.tool_calls == (ToolCall("a", "f", "{}"),)
    assert answer(whole).reason == "truncated"
    search = {"type": "server_tool_use", "id": "b", "name": "g", "input": {}}
    result = answer(start(content=[search], stop_reason="end_turn"), STOP)
    assert result.snapshot.tool_calls == (ToolCall("b", "g", "{}"),)


def test_a_start_with_a_beginning() -> None:
    """Content in a start without a stop reason is gone on with."""
    begun = start(content=[{"type": "text", "text": "Hi"}])
    for between in (b"", block(0, "text", text="Hi")):
        assert answer(begun, between, text(" there"), ends(), STOP).snapshot.text == "Hi there"


def test_another_message() -> None:
    """A second message in one stream (a gateway that goes on by itself) is joined; the same one again is not."""
    one = TEXT + text("one")
    assert answer(start(), start(), one, start(), ends(output_tokens=7), STOP).snapshot.usage == Usage(
        10, 7, None, 4
    )
    result = answer(start(), one, close(0), start(id="msg_2"), TEXT, text(" two"), ends(), STOP)
    assert (result.snapshot.text, result.snapshot.response_id) == ("one two", "msg_2")


def test_compaction() -> None:
    """A summary is the text only of a message that has nothing else."""
    summary = [
        block(0, "compaction", content=None),
        delta(0, "compaction_delta", content=None),
        delta(0, "compaction_delta", content="In short."),
        close(0),
    ]
    assert answer(start(), *summary, ends("compaction"), STOP).snapshot.text == "In short."
    assert answer(start(), *summary, STOP).snapshot.text == "In short."
    assert (
        answer(start(), *summary, block(1, "text", text=""), text("Yes", 1), ends(), STOP).snapshot.text
        == "Yes"
    )
    assert answer(start(), *summary).snapshot.text == ""
    assert answer(start(), block(0, "compaction", content="x"), ends(), STOP).snapshot.text == "x"
    much = delta(0, "compaction_delta", content="x" * (MAX_HELD_CHARS // 2 + 1))
    assert answer(start(), much, much, much, ends(), STOP).snapshot.text == ""


def test_a_summary_depends_on_what_was_before() -> None:
    """Only where nothing was told does the end of a message say that its text may be of another event."""
    reader = ANTHROPIC.reader()
    end = ends("end_turn").split(b"data: ")[1]
    assert [delta.restated for delta in reader.read(end)] == [True]
    reader.read(text("x").split(b"data: ")[1])
    assert [delta.restated for delta in reader.read(end)] == [False]


def test_fallback() -> None:
    """The model is the one that goes on."""
    fallback = block(0, "fallback", **{"from": {"model": "claude-x"}, "to": {"model": "claude-y"}})
    assert answer(start(), fallback, close(0), TEXT, text("x"), ends(), STOP).snapshot.model == "claude-y"


def test_what_is_unknown_means_nothing() -> None:
    """Events, blocks and deltas of types that are not known are passed over."""
    result = answer(
        told({"type": "vertex_event"}),
        start(),
        block(0, "hologram", text="no", id="x"),
        delta(0, "hologram_delta", text="no"),
        close(0),
        text("yes", 1),
        told({"type": "message_paused", "message": {"text": "no"}, "delta": "no"}),
        b"data: [DONE]\n\n",
        ends(),
        STOP,
    )
    assert (result.state, result.snapshot.text, result.skipped) == ("completed", "yes", 0)


def test_no_event_lines_and_no_types() -> None:
    """Either the `event:` line or the `type` is enough."""
    plain = [b"data: " + piece.split(b"data: ")[1] for piece in (start(), TEXT, text("x"), ends(), STOP)]
    assert answer(*plain).snapshot.text == "x"
    named = event({"index": 0, "delta": {"text": "y"}}, "content_block_delta")
    assert answer(start(), named, ends(), event({}, "message_stop")).snapshot.text == "y"


# --- endings ---


def test_only_message_stop_ends_it() -> None:
    """A stop reason without the marker is a truncation, and so is a `[DONE]` or a stop that ends nothing."""
    for rest in ([], [b"data: [DONE]\n\n"], [STOP[:-1]], [STOP.rstrip()]):
        result = answer(start(), TEXT, text("x"), ends(output_tokens=3), *rest)
        assert (result.state, result.reason) == ("failed", "truncated")
        assert (result.snapshot.text, result.snapshot.finish_reason) == ("x", "end_turn")
    assert answer(STOP).reason == "truncated"
    assert answer(start(), STOP).reason == "done"
    assert answer(text("x"), STOP).state == "completed"


@pytest.mark.parametrize("reason", [*ANTHROPIC.endings.incomplete, "stop_sequence", "something_new"])
def test_stop_reasons(reason: str) -> None:
    """The finish reason is what the provider says; a long one is cut."""
    assert answer(start(), ends(reason), STOP).reason == reason
    long = answer(start(), ends(reason * 100), STOP).snapshot.finish_reason
    assert long == (reason * 100)[:MAX_LABEL_CHARS]


def test_a_stop_reason_beside_the_delta() -> None:
    """Some imitations put it there."""
    beside = told({"type": "message_delta", "stop_reason": "end_turn", "usage": {"output_tokens": 2}})
    assert answer(start(), beside, STOP).reason == "end_turn"


def test_usage_is_a_running_total() -> None:
    """Each number is the last stated, zero too; what is no number is not stated."""
    details = {"output_tokens": 5, "output_tokens_details": {"thinking_tokens": 3}}
    middle = told({"type": "message_delta", "delta": {}, "usage": details})
    last = ends(input_tokens=12, output_tokens=9, cache_read_input_tokens=0)
    assert answer(start(), middle).snapshot.usage == Usage(10, 5, 3, 4)
    assert answer(start(), middle, last, STOP).snapshot.usage == Usage(12, 9, 3, 0)
    assert answer(start(), ends(input_tokens=12), STOP).snapshot.usage == Usage(12, 1, None, 4)
    odd = ends(input_tokens=-1, output_tokens="many", cache_read_input_tokens=None)
    assert answer(start(), odd, STOP).snapshot.usage == Usage(10, 1, None, 4)
    assert answer(start(usage=None), ends(), STOP).snapshot.usage is None


def test_a_body_that_is_no_stream() -> None:
    """A whole message in place of a stream is the answer, if it says that it ended."""
    message = {
        "id": "msg_1",
        "type": "message",
        "model": "m",
        "content": [{"type": "text", "text": "Hi"}],
        "stop_reason": "end_turn",
        "usage": {"input_tokens": 1, "output_tokens": 2},
    }
    result = answer(json.dumps(message).encode())
    assert (result.state, result.reason, result.snapshot.text) == ("completed", "end_turn", "Hi")
    assert result.snapshot.usage == Usage(1, 2)
    assert answer(json.dumps({**message, "stop_reason": None}).encode()).state == "failed"


# --- errors ---

OVERLOADED = {
    "type": "error",
    "error": {"type": "overloaded_error", "message": "Overloaded"},
    "request_id": "r",
}


@pytest.mark.parametrize(
    "error",
    [
        event(OVERLOADED, "error"),
        event(OVERLOADED),
        event(OVERLOADED, "message_delta"),
        event({"error": OVERLOADED["error"]}),
        event({"type": "overloaded_error", "message": "Overloaded"}, "error"),
        event("Overloaded", "error"),
        event(
            {**json.loads(text("x").split(b"data: ")[1]), "error": OVERLOADED["error"]}, "content_block_delta"
        ),
        event([OVERLOADED]),
        json.dumps(OVERLOADED).encode() + b"\n",
        b"error: " + json.dumps(OVERLOADED["error"]).encode() + b"\n\n",
    ],
)
@pytest.mark.parametrize("stopped", [False, True])
def test_errors(error: bytes, stopped: bool) -> None:
    """However an error comes, also after the stop reason, it is failed with the provider's own message."""
    before = [start(), TEXT, text("part"), *([ends()] if stopped else [])]
    result = answer(*before, error)
    assert (result.state, result.reason) == ("failed", "provider_error")
    assert result.snapshot.text == "part"
    assert result.fault is not None
    assert (result.fault.kind, result.fault.message, result.fault.temporary) == (
        "overloaded",
        "Overloaded",
        True,
    )


@pytest.mark.parametrize(
    ("code", "status", "kind", "temporary"),
    [
        ("rate_limit_error", 429, "rate_limit", True),
        ("authentication_error", 401, "auth", False),
        ("invalid_request_error", 400, "invalid_request", False),
        ("api_error", 500, "server", True),
        ("timeout_error", 504, "timeout", True),
        ("overloaded_error", 529, "overloaded", True),
    ],
)
def test_kinds_of_errors(code: str, status: int, kind: str, temporary: bool) -> None:
    """Anthropic's error types are told apart, in a stream and as the body of an HTTP error alike."""
    value = {"type": "error", "error": {"type": code, "message": "So it is"}}
    for fault in (answer(event(value, "error")).fault, ANTHROPIC.fault(status, json.dumps(value).encode())):
        assert fault is not None
        assert (fault.kind, fault.message, fault.code, fault.temporary) == (kind, "So it is", code, temporary)


# --- what is asked ---

REQUEST: dict[str, Any] = {
    "model": "claude-3-5-sonnet-20241022",
    "max_tokens": 100,
    "messages": [{"role": "user", "content": "Hi"}],
}


def continued(**changes: Any) -> Any:
    """Return the continuing request, or the reason; the request given is not changed."""
    request = {**copy.deepcopy(REQUEST), **changes}
    before = copy.deepcopy(request)
    assert ANTHROPIC.asking.continuation is not None
    result = ANTHROPIC.asking.continuation(request, "So far")
    assert request == before
    return result


def test_the_first_request() -> None:
    """It has the version's header, and asks for a stream."""
    assert ANTHROPIC.asking.path == "/messages"
    assert ANTHROPIC.asking.first is not None
    call = ANTHROPIC.asking.first(REQUEST, "/messages")
    assert (call.path, call.method, dict(call.headers)) == (
        "/messages",
        "POST",
        {"anthropic-version": "2023-06-01"},
    )
    assert call.body == {**REQUEST, "stream": True}
    with pytest.raises(ConfigurationError, match=r"request\.stream"):
        ANTHROPIC.asking.first({**REQUEST, "stream": False}, "/messages")


def test_continuation_is_a_prefill() -> None:
    """The text is the assistant's last message, or the end of the one that the request has."""
    user = REQUEST["messages"][0]
    assert continued()["messages"] == [user, {"role": "assistant", "content": "So far"}]
    for content, longer in (
        ("{", "{So far"),
        ([], "So far"),
        ([{"type": "text", "text": "{", "x": 1}], [{"type": "text", "text": "{So far", "x": 1}]),
    ):
        messages = [user, {"role": "assistant", "content": content}]
        assert continued(messages=messages)["messages"] == [user, {"role": "assistant", "content": longer}]


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"thinking": {"type": "enabled", "budget_tokens": 2000}}, "thinking"),
        ({"thinking": {"type": "adaptive"}}, "thinking"),
        ({"tool_choice": {"type": "any"}}, "tool"),
        ({"tool_choice": {"type": "tool", "name": "f"}}, "tool"),
        ({"output_format": {"type": "json_schema"}}, "format"),
        ({"output_config": {"format": {"type": "json_schema"}}}, "format"),
        ({"messages": []}, "messages"),
        ({"messages": None}, "messages"),
        ({"messages": [{"role": "assistant", "content": [{"type": "tool_use"}]}]}, "prefill"),
        ({"model": None}, "model"),
    ],
)
def test_no_continuation(changes: dict[str, Any], reason: str) -> None:
    """What a prefill cannot be combined with refuses it, with the reason."""
    result = continued(**changes)
    assert isinstance(result, str)
    assert reason in result


def test_what_allows_a_continuation() -> None:
    """Thinking that is off, tools that are not forced and an effort are no reason against it."""
    config = {
        "output_config": {"effort": "low"},
        "tool_choice": {"type": "auto"},
        "thinking": {"type": "disabled"},
    }
    assert isinstance(continued(**config), dict)


@pytest.mark.parametrize(
    "model",
    [
        "claude-2.1",
        "claude-instant-1.2",
        "claude-3-opus-20240229",
        "claude-3-5-haiku-latest",
        "claude-3-7-sonnet-20250219",
        "claude-sonnet-4-20250514",
        "claude-opus-4-0",
        "claude-opus-4-1-20250805",
        "claude-sonnet-4-5",
        "claude-haiku-4-5-20251001",
        "us.anthropic.claude-sonnet-4-5-20250929-v1:0",
        "anthropic.claude-3-haiku-20240307-v1:0",
        "claude-3-5-sonnet-v2@20241022",
        "claude-opus-4@20250514",
        "anthropic/claude-3.5-sonnet",
        "anthropic/claude-sonnet-4.5",
    ],
)
def test_models_that_take_a_prefill(model: str) -> None:
    """Claude up to 4.5, by the names that it has with each cloud."""
    assert isinstance(continued(model=model), dict)


@pytest.mark.parametrize(
    "model",
    [
        "claude-opus-4-6",
        "claude-opus-4-6-20260101",
        "claude-sonnet-4-6",
        "anthropic/claude-opus-4.6",
        "us.anthropic.claude-opus-4-6-v1",
        "claude-opus-4-7",
        "claude-opus-4-50",
        "claude-opus-4-10",
        "claude-opus-5",
        "claude-fable-5",
        "claude-mythos-preview",
        "claude-next",
        "gpt-4o",
        "",
        "claude-3-opus" + "-" * 1000,
    ],
)
def test_models_that_do_not(model: str) -> None:
    """Later models, and those that are not known, are refused."""
    assert "model" in continued(model=model)


# --- hostile input ---

WRONG: list[Any] = [
    {"type": "message_start"},
    {"type": "message_start", "message": []},
    {"type": "message_start", "message": {"id": "other", "stop_reason": 5}},
    {"type": "message_start", "message": {"id": "other", "content": [{"type": "text", "text": 5}]}},
    {"type": "message_start", "message": {"id": "other", "content": [5]}},
    {"type": "content_block_start", "index": 0},
    {"type": "content_block_start", "index": 0, "content_block": 5},
    {"type": "content_block_start", "index": -1, "content_block": {"type": "text", "text": "x"}},
    {"type": "content_block_start", "index": MAX_BLOCK_INDEX + 1, "content_block": {"type": "text"}},
    {"type": "content_block_start", "index": 1e300, "content_block": {"type": "text"}},
    {"type": "content_block_start", "index": True, "content_block": {"type": "text"}},
    {"type": "content_block_start", "index": 3, "content_block": {"type": "tool_use", "id": 5}},
    {"type": "content_block_start", "index": 3, "content_block": {"type": "tool_use", "id": "b", "name": {}}},
    {"type": "content_block_delta", "index": 0},
    {"type": "content_block_delta", "index": 0, "delta": "x"},
    {"type": "content_block_delta", "index": 0, "delta": {"type": "text_delta", "text": 5}},
    {"type": "content_block_delta", "index": 0, "delta": {"type": "compaction_delta", "content": 5}},
    {"type": "content_block_delta", "index": "x", "delta": {"type": "text_delta", "text": "x"}},
    {"type": "message_delta", "delta": []},
    {"type": "message_delta", "delta": {"stop_reason": 5}, "usage": {"output_tokens": 99}},
    {"type": 5},
    {},
    5,
    "text",
    [],
]


def state(reader: Any) -> str:
    """Return all that a reader remembers, as text."""
    names = sorted(type(reader).__slots__)
    parts = []
    for name in names:
        value = getattr(reader, name)
        if name == "_tools":
            value = {at: (tool.ordinal, tool.id, tool.told, tool.whole) for at, tool in value.items()}
        if name == "_last":
            value = value and value.ordinal
        parts.append((name, value))
    return repr(parts)


@pytest.mark.parametrize("value", WRONG, ids=lambda value: json.dumps(value)[:60])
def test_what_cannot_be_read_changes_nothing(value: Any) -> None:
    """An event of the wrong shape is unreadable, and leaves the reader as it was."""
    reader = ANTHROPIC.reader()
    for piece in (start(), text("x"), block(2, "tool_use", id="a", name="f", input={})):
        reader.read(piece.split(b"data: ")[1])
    before = state(reader)
    with pytest.raises(UnparseableError):
        reader.read(json.dumps(value).encode())
    assert state(reader) == before
    result = answer(start(), TEXT, text("x"), event(value), ends(), STOP)
    assert (result.state, result.snapshot.text, result.skipped) == ("completed", "x", 1)


def test_too_many_calls() -> None:
    """Calls beyond the limit are unreadable; blocks that are no calls cost nothing."""
    reader = ANTHROPIC.reader()
    for index in range(MAX_CALLS):
        reader.read(block(index, "tool_use", id=f"a{index}", name="f", input={}).split(b"data: ")[1])
        reader.read(block(MAX_CALLS + index, "text", text="x").split(b"data: ")[1])
    before = state(reader)
    for piece in (
        block(5000, "tool_use", id="z", name="f", input={}),
        start(content=[{"type": "tool_use", "id": "z", "name": "f", "input": {}}]),
    ):
        with pytest.raises(UnparseableError, match="tool calls"):
            reader.read(piece.split(b"data: ")[1])
    assert state(reader) == before
    reader.read(text("x").split(b"data: ")[1])


def test_long_labels() -> None:
    """A model or an id that is too long is none; two calls whose long ids differ at the end are two."""
    result = answer(start(id="x" * 300, model="y" * 300), ends(), STOP).snapshot
    assert (result.response_id, result.model) == (None, None)
    ids = ["x" * 100_000 + end for end in "ab"]
    told_calls = calls(*(block(at, "tool_use", id=one, name="f", input={}) for at, one in enumerate(ids)))
    assert [call[0] for call in told_calls] == ids


NAMES = st.sampled_from(
    [
        "type",
        "index",
        "delta",
        "text",
        "thinking",
        "partial_json",
        "message",
        "content",
        "content_block",
        "id",
        "name",
        "input",
        "stop_reason",
        "usage",
        "input_tokens",
        "output_tokens",
        "model",
        "error",
        "errors",
        "to",
        "content_block_start",
        "content_block_delta",
        "message_start",
    ]
)
KINDS = st.sampled_from(
    [
        "message",
        "message_start",
        "message_delta",
        "message_stop",
        "content_block_start",
        "content_block_delta",
        "content_block_stop",
        "error",
        "text_delta",
        "thinking_delta",
        "input_json_delta",
        "compaction_delta",
        "text",
        "thinking",
        "tool_use",
        "compaction",
        "fallback",
        "ping",
    ]
)
SCALARS = (
    st.none() | st.booleans() | st.integers(-2, 3) | st.integers() | st.floats() | KINDS | st.text(max_size=3)
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(NAMES | KINDS, inner, max_size=5),
    max_leaves=12,
)
EVENTS = st.builds(
    lambda kind, rest: {**rest, "type": kind}, KINDS, st.dictionaries(NAMES, VALUES, max_size=5)
)


@settings(max_examples=300, deadline=None)
@given(
    st.lists(
        st.tuples(EVENTS | VALUES, st.sampled_from(["message", "error", "message_stop", "x"])), max_size=6
    )
)
def test_any_json_is_read_or_refused(events: list[tuple[Any, str]]) -> None:
    """No JSON value raises anything but UnparseableError, and one that does changes nothing."""
    reader = ANTHROPIC.reader()
    for value, name in events:
        data = json.dumps(value).encode()
        before = state(reader)
        try:
            reader.read(data, name)
        except UnparseableError:
            assert state(reader) == before
        reader.ending()


# --- round trip ---

TEXTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
PIECES = st.lists(TEXTS, max_size=4)
BLOCKS = st.one_of(
    st.tuples(st.just("text"), PIECES),
    st.tuples(st.just("thinking"), PIECES),
    st.tuples(st.sampled_from(["tool_use", "server_tool_use"]), st.tuples(TEXTS, TEXTS, PIECES)),
    st.tuples(st.just("redacted_thinking"), PIECES),
)
COUNTS = st.none() | st.integers(0, 1 << 40)


def encode(blocks: list[Any], names: bool) -> tuple[list[bytes], str, str, list[tuple[str, str, str]]]:
    """Return the events of a message with these blocks, and its text, reasoning and calls."""
    events: list[bytes] = []
    said, thought, called = "", "", []
    for index, (kind, given_pieces) in enumerate(blocks):
        if kind.endswith("tool_use"):
            call_id, name, pieces = given_pieces
            events.append(block(index, kind, id=call_id, name=name, input={}))
            events += [delta(index, "input_json_delta", partial_json=piece) for piece in pieces]
            called.append((call_id, name, "".join(pieces) or "{}"))
        elif kind == "redacted_thinking":
            events.append(block(index, kind, data="".join(given_pieces)))
        else:
            field = {"text": "text", "thinking": "thinking"}[kind]
            events.append(block(index, kind, **{field: ""}))
            events += [delta(index, f"{kind}_delta", **{field: piece}) for piece in given_pieces]
            if kind == "text":
                said += "".join(given_pieces)
            else:
                thought += "".join(given_pieces)
        events.append(close(index))
    if not names:
        events = [piece[piece.index(b"data: ") :] for piece in events]
    return events, said, thought, called


@settings(max_examples=150, deadline=None)
@given(st.lists(BLOCKS, max_size=5), COUNTS, COUNTS, COUNTS, st.booleans(), st.data())
def test_round_trip(
    blocks: list[Any],
    read: int | None,
    written: int | None,
    cached: int | None,
    names: bool,
    data: st.DataObject,
) -> None:
    """A generated message comes back the same, however it is cut into pieces, and whole only at its end."""
    middle, said, thought, called = encode(blocks, names)
    usage = {"input_tokens": read, "output_tokens": 1, "cache_read_input_tokens": cached}
    body = b"".join([start(usage=usage), *middle, ends("end_turn", output_tokens=written), STOP])
    cuts = sorted(data.draw(st.lists(st.integers(0, len(body)), max_size=8)))
    pieces = [body[a:b] for a, b in zip([0, *cuts], [*cuts, len(body)], strict=True)]
    result = replay("anthropic", pieces)
    assert (result.state, result.reason, result.skipped) == ("completed", "end_turn", 0)
    back = result.snapshot
    assert (back.text, back.reasoning) == (said, thought)
    assert [(call.id, call.name, call.arguments) for call in back.tool_calls] == called
    assert back.usage == Usage(read, 1 if written is None else written, None, cached)
    cut = data.draw(st.integers(len(start(usage=usage)), len(body) - len(STOP)))
    sink = RecordingSink()
    reader = BodyReader(ANTHROPIC, sink)
    reader.feed(body[:cut])
    reader.end(clean=data.draw(st.booleans()))
    assert sink.ending == ("failed", "truncated")
    assert said.startswith(sink.snapshot.text)
