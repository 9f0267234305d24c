"""What Cohere's chat sends, one statement a test."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from supervisor.dialects import ToolCall, Usage
from supervisor.dialects.cohere import COHERE
from supervisor.dialects.tool_calls import MAX_CALLS
from tests.dialects.answers import CUTS, WORDS, folded, odd_json, read, read_cut, refused, survives, tell
from tests.dialects.bodies import event

START = {
    "id": "m-1",
    "type": "message-start",
    "delta": {"message": {"role": "assistant", "content": [], "tool_calls": []}},
}


def content(index: int = 0, kind: str = "content-delta", **block: Any) -> dict[str, Any]:
    """Return an event with a piece of a content block."""
    return {"type": kind, "index": index, "delta": {"message": {"content": block}}}


def call(kind: str, index: Any = 0, **fields: Any) -> dict[str, Any]:
    """Return an event with a piece of a tool call."""
    return {"type": f"tool-call-{kind}", "index": index, "delta": {"message": {"tool_calls": fields}}}


def end(reason: Any = "COMPLETE", usage: Any = None, **fields: Any) -> dict[str, Any]:
    """Return the last event."""
    return {"type": "message-end", "delta": {"finish_reason": reason, "usage": usage, **fields}}


def wire(*values: dict[str, Any], named: bool = True) -> bytes:
    """Return a body."""
    return b"".join(event(value, value["type"] if named else "") for value in values)


@pytest.mark.parametrize("named", [True, False])
def test_an_answer(named: bool) -> None:
    """Blocks of thinking and of text, a citation, the end and `[DONE]`, with and without names of events."""
    body = wire(
        START,
        content(0, "content-start", type="thinking", thinking=""),
        content(0, thinking="hm"),
        {"type": "content-end", "index": 0},
        content(1, "content-start", type="text", text=""),
        content(1, text="He"),
        {
            "type": "citation-start",
            "index": 0,
            "delta": {"message": {"citations": {"start": 0, "text": "He"}}},
        },
        {"type": "citation-end", "index": 0},
        content(1, text="llo"),
        content(2, "content-start", type="text", text="!"),
        end(
            usage={
                "billed_units": {"input_tokens": 1, "output_tokens": 2},
                "tokens": {"input_tokens": 507.0, "output_tokens": 10.0},
                "cached_tokens": 448,
            }
        ),
        named=named,
    )
    sink = read(COHERE, body + event("[DONE]"))
    assert (sink.snapshot.text, sink.snapshot.reasoning) == ("Hello!", "hm")
    assert (sink.snapshot.usage, sink.snapshot.response_id) == (Usage(507, 10, cached=448), "m-1")
    assert (sink.ending, sink.snapshot.finish_reason) == (("completed", "COMPLETE"), "COMPLETE")


def test_the_name_stands_in_for_the_type() -> None:
    """Where the JSON has no type, the event's name says it; where both do, the JSON counts."""
    value = content(text="Hi")
    sink = read(
        COHERE,
        event({**value, "type": "content-delta"}, "citation-start"),
        event({"delta": value["delta"]}, "content-delta"),
        event({"delta": end()["delta"]}, "message-end"),
    )
    assert (sink.snapshot.text, sink.ending) == ("HiHi", ("completed", "COMPLETE"))


def test_tool_calls_and_the_plan() -> None:
    """Calls come in pieces under an index; one without arguments has none; the plan is neither text nor reasoning."""
    sink = read(
        COHERE,
        wire(
            START,
            {"type": "tool-plan-delta", "delta": {"message": {"tool_plan": "I will"}}},
            call("start", 0, id="f_1", type="function", function={"name": "f", "arguments": ""}),
            call("delta", 0, function={"arguments": '{"a"'}),
            call("delta", 0, function={"arguments": ":1}"}),
            {"type": "tool-call-end", "index": 0},
            call("start", 1, id="g_1", type="function", function={"name": "g", "arguments": ""}),
            {"type": "tool-call-end", "index": 1},
            end("TOOL_CALL"),
        ),
    )
    assert sink.snapshot.tool_calls == (ToolCall("f_1", "f", '{"a":1}'), ToolCall("g_1", "g", ""))
    assert (sink.snapshot.text, sink.snapshot.reasoning, sink.ending) == ("", "", ("completed", "TOOL_CALL"))


def test_two_calls_without_an_index() -> None:
    """A new id is a new call."""
    deltas = tell(
        COHERE.reader(),
        call("start", None, id="a", function={"name": "f", "arguments": ""}),
        call("delta", None, function={"arguments": "{}"}),
        call("start", None, id="b", function={"name": "f", "arguments": {"x": 1}}),
    )
    assert folded(deltas).tool_calls == (ToolCall("a", "f", "{}"), ToolCall("b", "f", '{"x":1}'))


# --- endings ---


@pytest.mark.parametrize("reason", ["COMPLETE", "STOP_SEQUENCE", "MAX_TOKENS", "TOOL_CALL", "A_NEW_ONE"])
def test_only_the_end_ends(reason: str) -> None:
    """`message-end` is the end marker, at once; without it the answer is truncated, also where it says `[DONE]`."""
    started = wire(START, content(text="Hi"))
    assert read(COHERE, started + wire(end(reason)) + event("x"), clean=False).ending == ("completed", reason)
    for rest in (b"", wire({"type": "content-end", "index": 0}), event("[DONE]")):
        sink = read(COHERE, started + rest)
        assert (sink.ending, sink.skipped) == (("failed", "truncated"), [])


def test_an_end_without_a_reason() -> None:
    """It ends the answer all the same."""
    assert read(COHERE, wire(content(text="Hi"), {"type": "message-end"})).ending == ("completed", "done")


def test_a_last_event_without_its_empty_line() -> None:
    """The end marker is believed there."""
    assert read(COHERE, wire(content(text="Hi"), end())[:-2]).ending == ("completed", "COMPLETE")


@pytest.mark.parametrize(
    ("reason", "error", "kind", "message"),
    [
        ("ERROR", None, "server", "the provider ended the answer with finish_reason 'ERROR'"),
        ("ERROR", "the model is overloaded", "overloaded", "the model is overloaded"),
        (
            "ERROR_TOXIC",
            None,
            "content_filter",
            "the provider ended the answer with finish_reason 'ERROR_TOXIC'",
        ),
        ("ERROR_LIMIT", "too long", "context_length", "too long"),
        ("TIMEOUT", None, "timeout", "the provider ended the answer with finish_reason 'TIMEOUT'"),
        ("error", "no", "server", "no"),
        ("COMPLETE", "it broke", "server", "it broke"),
        (None, {"message": "it broke"}, "server", "it broke"),
    ],
)
def test_an_end_that_is_an_error(reason: Any, error: Any, kind: str, message: str) -> None:
    """A failed generation fails the stream with the provider's message, and keeps text, reason and usage."""
    usage = {"tokens": {"input_tokens": 1, "output_tokens": 2}}
    sink = read(COHERE, wire(content(text="Hi"), end(reason, usage, error=error)))
    assert sink.ending == ("failed", "provider_error")
    assert sink.fault is not None
    assert (sink.fault.kind, sink.fault.message, sink.fault.code) == (kind, message, reason)
    assert sink.fault.temporary == (kind in {"server", "overloaded", "timeout"})
    assert (sink.snapshot.text, sink.snapshot.finish_reason, sink.snapshot.usage) == (
        "Hi",
        reason,
        Usage(1, 2),
    )


@pytest.mark.parametrize(
    ("data", "name"),
    [
        ({"message": "out of tokens"}, ""),
        ({"type": "error", "message": "out of tokens"}, ""),
        ({"error": {"message": "out of tokens"}}, ""),
        ([{"error": "out of tokens"}], ""),
        ({"message": "out of tokens"}, "error"),
        ("out of tokens", "error"),
    ],
)
def test_errors_in_the_stream(data: Any, name: str) -> None:
    """An object that is only a message, one with an error, or an event of that name."""
    sink = read(COHERE, wire(content(text="Hi")), event(data, name))
    assert sink.ending == ("failed", "provider_error")
    assert sink.fault is not None
    assert sink.fault.message == "out of tokens"


def test_an_error_in_place_of_a_stream() -> None:
    """A bare JSON body with a message is what the stream failed of."""
    sink = read(COHERE, b'{"id": "x", "message": "invalid api token"}')
    assert sink.ending == ("failed", "provider_error")
    assert sink.fault is not None
    assert sink.fault.message == "invalid api token"


def test_a_whole_answer_in_place_of_a_stream() -> None:
    """A server that does not stream gives the answer all the same."""
    blocks = [{"type": "thinking", "thinking": "hm"}, {"type": "text", "text": "Hi"}]
    calls = [
        {"id": str(n), "type": "function", "function": {"name": "f", "arguments": "{}"}} for n in range(2)
    ]
    message = {"role": "assistant", "content": blocks, "tool_calls": calls}
    whole = {
        "id": "m",
        "finish_reason": "COMPLETE",
        "message": message,
        "usage": {"billed_units": {"input_tokens": 1, "output_tokens": 2}},
    }
    sink = read(COHERE, json.dumps(whole).encode())
    assert sink.ending == ("completed", "COMPLETE")
    assert (sink.snapshot.text, sink.snapshot.reasoning, sink.snapshot.usage) == ("Hi", "hm", Usage(1, 2))
    assert [one.id for one in sink.snapshot.tool_calls] == ["0", "1"]


# --- what is not quite Cohere ---


@pytest.mark.parametrize(
    "value",
    [
        {"type": "debug", "prompt": "x"},
        {"type": "new-thing", "delta": {"x": 1}},
        {},
        {"type": None},
        content(),
        content(text=None),
        {"type": "content-delta"},
    ],
)
def test_what_says_nothing(value: dict[str, Any]) -> None:
    """Unknown types and empty blocks are read and mean nothing."""
    assert tell(COHERE.reader(), value) == []


@pytest.mark.parametrize(
    "block",
    [{"text": "Hi"}, [{"type": "text", "text": "H"}, {"text": "i"}], "Hi", {"text": "Hi", "thinking": None}],
)
def test_content_of_any_shape(block: Any) -> None:
    """A block, a list of blocks or a string."""
    value = {"type": "content-delta", "delta": {"message": {"content": block}}}
    assert folded(tell(COHERE.reader(), value)).text == "Hi"


@pytest.mark.parametrize(
    "value",
    [
        content(text=5),
        {"type": "content-delta", "delta": {"message": {"content": 5}}},
        {"type": ["x"]},
        call("start", "x", id="i", function={"name": "f"}),
        call("start", 1 << 60, id="i", function={"name": "f"}),
        call("start", True, id="i", function={"name": "f"}),
        call("start", 1, id={}, function={"name": "f"}),
        call("start", 1, id="i", function=[]),
        {"type": "tool-call-start", "index": 1, "delta": {"message": {"tool_calls": ["x"]}}},
        {
            "type": "tool-call-start",
            "delta": {"message": {"tool_calls": [{"id": str(n)} for n in range(MAX_CALLS + 1)]}},
        },
        end(5),
        {"finish_reason": "COMPLETE", "message": {"tool_calls": 5}},
        5,
        b"{",
        b'{"a":' * 100_000,
    ],
)
def test_what_cannot_be_read_changes_nothing(value: Any) -> None:
    """Such an event is refused, and the reader goes on as if it had not come."""
    reader, other = COHERE.reader(), COHERE.reader()
    rest = [call("start", 0, id="a", function={"name": "f"}), START, content(text="b")]
    expected = tell(other, *rest)
    assert refused(reader, value)
    assert reader.ending() is None
    assert expected == tell(reader, *rest)


def test_calls_are_bounded() -> None:
    """There cannot be calls without end, but the last one goes on."""
    reader = COHERE.reader()
    for number in range(MAX_CALLS):
        tell(reader, call("start", number, id=str(number), function={"name": "f", "arguments": "["}))
    assert "tool calls" in refused(reader, call("start", MAX_CALLS, id="x", function={"name": "f"}))
    assert tell(reader, call("delta", MAX_CALLS - 1, function={"arguments": "1"}))


def test_long_labels() -> None:
    """Of a finish reason the start is kept; an id that long is none."""
    reason = "R" * 9999
    sink = read(COHERE, wire({**START, "id": reason}, end(reason)))
    assert sink.snapshot.response_id is None
    assert len(sink.snapshot.finish_reason or "") < 1000


def test_what_is_declared() -> None:
    """The marker, how it is asked, and that nothing is promised of an abort."""
    assert (COHERE.endings.markers, COHERE.asking.path) == (("message-end",), "/chat")
    assert (COHERE.stop, COHERE.abort_stops_billing, COHERE.asking.continuation) == ("drain", None, None)


# --- anything at all ---

ODD = odd_json(
    *(
        "type",
        "index",
        "id",
        "delta",
        "message",
        "content",
        "text",
        "thinking",
        "tool_calls",
        "function",
        "name",
    ),
    *("arguments", "finish_reason", "usage", "tokens", "input_tokens", "error", "tool_plan", "code"),
)
TYPES = st.sampled_from(
    ["message-start", "content-delta", "content-start", "tool-call-start", "tool-call-delta", "message-end"]
)
EVENTS = ODD | st.builds(
    lambda kind, message, index: {"type": kind, "index": index, "delta": {"message": message}},
    TYPES,
    ODD,
    ODD,
)


@settings(deadline=None)  # a test asserts no time
@given(st.lists(EVENTS, max_size=6), st.sampled_from(["message", "error", "message-end", "content-delta"]))
def test_any_json_is_read_or_refused(values: list[Any], name: str) -> None:
    """A reader raises UnparseableError or nothing."""
    survives(COHERE, values, name)


@settings(deadline=None)  # a test asserts no time
@given(
    st.lists(st.tuples(st.booleans(), st.lists(WORDS, max_size=4)), max_size=4),
    st.lists(
        st.tuples(WORDS.filter(bool), st.dictionaries(WORDS, WORDS, max_size=2).map(json.dumps)), max_size=3
    ),
    st.none() | st.tuples(st.integers(0, 10**9), st.integers(0, 10**9)),
    st.booleans(),
    CUTS,
)
def test_a_generated_stream_comes_back(
    blocks: list[tuple[bool, list[str]]],
    calls: list[tuple[str, str]],
    usage: tuple[int, int] | None,
    named: bool,
    cuts: list[int],
) -> None:
    """Blocks, calls and usage are read as they were written, wherever the body is cut."""
    events: list[dict[str, Any]] = [START]
    for index, (thinks, pieces) in enumerate(blocks):
        field = "thinking" if thinks else "text"
        events.append(content(index, "content-start", type=field, **{field: ""}))
        events += [content(index, **{field: piece}) for piece in pieces]
        events.append({"type": "content-end", "index": index})
    for index, (name, arguments) in enumerate(calls):
        events.append(
            call("start", index, id=f"c{index}", type="function", function={"name": name, "arguments": ""})
        )
        events += [
            call("delta", index, function={"arguments": arguments[at : at + 3]})
            for at in range(0, len(arguments), 3)
        ]
        events.append({"type": "tool-call-end", "index": index})
    told = None if usage is None else {"tokens": {"input_tokens": usage[0], "output_tokens": usage[1]}}
    sink = read_cut(COHERE, wire(*events, end("TOOL_CALL" if calls else "COMPLETE", told), named=named), cuts)
    assert sink.ending == ("completed", "TOOL_CALL" if calls else "COMPLETE")
    snapshot = sink.snapshot
    assert "".join(piece for thinks, pieces in blocks if not thinks for piece in pieces) == snapshot.text
    assert "".join(piece for thinks, pieces in blocks if thinks for piece in pieces) == snapshot.reasoning
    assert tuple(ToolCall(f"c{n}", *one) for n, one in enumerate(calls)) == snapshot.tool_calls
    assert (None if usage is None else Usage(*usage)) == snapshot.usage
    assert not sink.skipped
