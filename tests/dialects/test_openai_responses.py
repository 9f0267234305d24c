"""OpenAI Responses: each event, what is told twice, numbers, errors, what is asked, hostile input, and generated answers."""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from supervisor.dialects import Delta, ToolCall, UnparseableError, Usage
from supervisor.dialects.base import Snapshot
from supervisor.dialects.dialect import Progress
from supervisor.dialects.openai_responses import MAX_ITEMS, MAX_PARTS, OPENAI_RESPONSES
from supervisor.dialects.reading import BodyReader
from supervisor.dialects.replay import ReplayResult, replay
from supervisor.dialects.tool_calls import MAX_CALLS
from tests.dialects.bodies import RecordingSink, event

MAX_INDEX = (1 << 53) - 1


ABSENT: Any = object()


def told(kind: str, **fields: Any) -> bytes:
    """Return an event under its name; a field that is ABSENT is left out."""
    kept = {name: value for name, value in fields.items() if value is not ABSENT}
    return event({"type": f"response.{kind}", **kept}, f"response.{kind}")


def data_of(piece: bytes) -> bytes:
    return piece.split(b"data: ", 1)[1].strip()


def start(kind: str = "created", **fields: Any) -> bytes:
    response = {"id": "resp_1", "object": "response", "model": "gpt-x", "status": "in_progress", "output": []}
    return told(kind, response=response, **fields)


def added(item: dict[str, Any], index: Any = 0, **fields: Any) -> bytes:
    return told("output_item.added", item=item, output_index=index, **fields)


def done(item: dict[str, Any], index: Any = 0, **fields: Any) -> bytes:
    return told("output_item.done", item=item, output_index=index, **fields)


def message(*texts: str, item_id: Any = "msg_1", refusal: str = "") -> dict[str, Any]:
    content: list[Any] = [{"type": "output_text", "text": text, "annotations": []} for text in texts]
    if refusal:
        content.append({"type": "refusal", "refusal": refusal})
    return {"type": "message", "id": item_id, "role": "assistant", "status": "completed", "content": content}


def function(
    name: str, arguments: Any, call_id: str = "call_1", item_id: Any = "fc_1", **fields: Any
) -> dict[str, Any]:
    item = {"type": "function_call", "id": item_id, "call_id": call_id, "name": name, "arguments": arguments}
    return {**item, **fields}


def reasoning(*summary: str, item_id: str = "rs_1", content: Any = None) -> dict[str, Any]:
    texts = [{"type": "summary_text", "text": text} for text in summary]
    return {"type": "reasoning", "id": item_id, "summary": texts, "content": content}


def text(piece: str, index: Any = 0, item_id: Any = "msg_1", part: Any = 0, **fields: Any) -> bytes:
    return told(
        "output_text.delta", delta=piece, output_index=index, item_id=item_id, content_index=part, **fields
    )


def arguments(
    piece: Any, index: Any = 0, item_id: Any = "fc_1", kind: str = "function_call_arguments"
) -> bytes:
    return told(f"{kind}.delta", delta=piece, output_index=index, item_id=item_id)


def part(kind: str, index: int = 0, item_id: str = "msg_1", text: str = "") -> bytes:
    piece = {"type": "output_text", "text": text}
    return told(f"content_part.{kind}", part=piece, output_index=index, item_id=item_id, content_index=0)


USAGE = {
    "input_tokens": 20,
    "input_tokens_details": {"cached_tokens": 8},
    "output_tokens": 9,
    "output_tokens_details": {"reasoning_tokens": 5},
}


def ends(*output: dict[str, Any], kind: str = "completed", **fields: Any) -> bytes:
    response = {
        "id": "resp_1",
        "object": "response",
        "model": "gpt-x",
        "status": kind,
        "output": list(output),
    }
    return told(kind, response={**response, "usage": USAGE, **fields})


def answer(*events: bytes) -> ReplayResult:
    return replay("openai-responses", b"".join(events))


def whole(*events: bytes) -> Any:
    """Return the answer in these events, which completed and were all readable."""
    result = answer(*events)
    assert (result.state, result.reason, result.skipped) == ("completed", "completed", 0)
    return result.snapshot


def called(*events: bytes) -> list[tuple[str, str, str]]:
    return [(call.id, call.name, call.arguments) for call in whole(*events).tool_calls]


# --- each event ---


def test_an_answer() -> None:
    """Reasoning, text and calls come from deltas; every repetition of them adds nothing."""
    thought, said = reasoning("Hm", "m"), message("Four", " it is")
    call = function("add", '{"a":1}')
    said_whole = whole(
        start(),
        start("in_progress"),
        added({**thought, "summary": []}),
        told("reasoning_summary_part.added", output_index=0, summary_index=0, part={"text": ""}),
        told("reasoning_summary_text.delta", delta="Hm", output_index=0, item_id="rs_1", summary_index=0),
        told("reasoning_summary_text.done", text="Hm", output_index=0, item_id="rs_1", summary_index=0),
        told("reasoning_summary_text.delta", delta="m", output_index=0, item_id="rs_1", summary_index=1),
        told("reasoning_summary_text.done", text="m", output_index=0, item_id="rs_1", summary_index=1),
        done(thought),
        added(message(), 1),
        part("added", 1),
        text("Fo", 1),
        text("ur", 1),
        told("output_text.annotation.added", annotation={"type": "url_citation"}, output_index=1),
        told("output_text.done", text="Four", output_index=1, item_id="msg_1", content_index=0),
        part("done", 1, text="Four"),
        text(" it is", 1, part=1),
        told("output_text.done", text=" it is", output_index=1, item_id="msg_1", content_index=1),
        done(said, 1),
        added(function("add", ""), 2),
        arguments('{"a"', 2),
        arguments(":1}", 2),
        told("function_call_arguments.done", arguments='{"a":1}', output_index=2, item_id="fc_1"),
        done(call, 2),
        ends(thought, said, call),
    )
    assert (said_whole.text, said_whole.reasoning, said_whole.refusal) == ("Four it is", "Hmm", "")
    assert said_whole.tool_calls == (ToolCall("call_1", "add", '{"a":1}'),)
    assert (said_whole.model, said_whole.response_id) == ("gpt-x", "resp_1")
    assert said_whole.usage == Usage(20, 9, 5, 8)


def test_refusals() -> None:
    """A refusal is told by its own deltas, or whole."""
    piece = told("refusal.delta", delta="No", output_index=0, item_id="msg_1", content_index=0)
    end = told("refusal.done", refusal="No", output_index=0, item_id="msg_1", content_index=0)
    for events in (
        [piece, end],
        [end],
        [piece, end, done(message(refusal="No"))],
        [done(message(refusal="No"))],
    ):
        said = whole(start(), *events, ends(message(refusal="No")))
        assert (said.text, said.refusal) == ("", "No")


def test_reasoning_itself() -> None:
    """Reasoning that the provider shows is told like a summary; an item with both told whole gives one of them."""
    piece = told("reasoning_text.delta", delta="Hm", output_index=0, item_id="rs_1", content_index=0)
    item = reasoning(content=[{"type": "reasoning_text", "text": "Hm"}])
    for events in ([piece], [piece, done(item)], [done(item)], []):
        assert whole(start(), *events, ends(item)).reasoning == "Hm"
    both = reasoning("Short", content=[{"type": "reasoning_text", "text": "Long"}])
    assert whole(start(), done(both), ends(both)).reasoning == "Short"


def test_custom_tools() -> None:
    """A custom tool's input is its arguments, as it is."""
    item = {"type": "custom_tool_call", "id": "ct_1", "call_id": "call_1", "name": "sql", "input": "SELECT"}
    pieces = [arguments(piece, 0, "ct_1", "custom_tool_call_input") for piece in ("SEL", "ECT")]
    end = told("custom_tool_call_input.done", input="SELECT", output_index=0, item_id="ct_1")
    for events in (
        [added({**item, "input": ""}), *pieces, end, done(item)],
        [done(item)],
        [added(item), end],
        [],
    ):
        assert called(start(), *events, ends(item)) == [("call_1", "sql", "SELECT")]


@pytest.mark.parametrize(
    "item",
    [
        {"type": "web_search_call", "id": "ws_1", "action": {"query": "x"}},
        {"type": "mcp_call", "id": "mcp_1", "name": "f", "arguments": "{}", "error": "broke", "output": "x"},
        {"type": "code_interpreter_call", "id": "ci_1", "code": "1+1", "outputs": None},
        {"type": "image_generation_call", "id": "ig_1", "result": "aGk="},
        {"type": "shell_call", "id": "sh_1", "call_id": "call_1", "action": {"commands": ["ls"]}},
        {"type": "mcp_list_tools", "id": "ml_1", "server_label": "x", "tools": []},
        {"type": "hologram", "id": "h_1", "content": [{"text": "no"}]},
    ],
)
def test_what_the_provider_runs(item: dict[str, Any]) -> None:
    """Calls that the provider runs itself, their events and their errors are not part of the answer."""
    kind = item["type"]
    said = whole(
        start(),
        added(item),
        told(f"{kind}.in_progress", output_index=0, item_id=item["id"]),
        told(f"{kind}_arguments.delta", delta="no", output_index=0, item_id=item["id"]),
        told(
            f"{kind}.failed",
            output_index=0,
            item_id=item["id"],
            error=ABSENT if kind == "hologram" else {"message": "broke"},
        ),
        told("image_generation_call.partial_image", partial_image_b64="aGk=", output_index=0),
        done(item),
        added(message(item_id="msg_1"), 1),
        text("yes", 1),
        ends(item, message("yes")),
    )
    assert (said.text, said.tool_calls) == ("yes", ())


def test_parallel_calls() -> None:
    """Each piece goes to its own call, in whatever order they come."""
    one, two = function("f", "11", "c1", "fc_1"), function("g", "22", "c2", "fc_2")
    empty = [added({**one, "arguments": ""}, 3), added({**two, "arguments": ""}, 1)]
    for key in (
        lambda at, item_id: (at, item_id),
        lambda at, item_id: (at, ABSENT),
        lambda at, item_id: (ABSENT, item_id),
    ):
        pieces = [
            arguments(piece, *key(at, name)) for piece, at, name in 2 * [("1", 3, "fc_1"), ("2", 1, "fc_2")]
        ]
        assert called(*empty, *pieces, done(one, 3), done(two, 1), ends()) == [
            ("c1", "f", "11"),
            ("c2", "g", "22"),
        ]


def test_no_event_lines_and_no_types() -> None:
    """Either the `event:` line or the `type` is enough, and a `[DONE]` of an imitation ends nothing."""
    plain = [b"data: " + data_of(piece) + b"\n\n" for piece in (start(), text("x"), ends())]
    assert whole(*plain).text == "x"
    named = event({"delta": "y"}, "response.output_text.delta")
    response = event({"response": {"usage": USAGE}}, "response.completed")
    assert whole(named, b"data: [DONE]\n\n", response).text == "y"
    assert answer(named, b"data: [DONE]\n\n").reason == "truncated"
    assert whole(named, event({"object": "response", "id": "r"}, "response.completed")).response_id == "r"


# --- what comes without deltas ---


def test_only_done_events() -> None:
    """What no delta told is taken from the first event that has it, once."""
    said, thought, call = message("Four", " it is"), reasoning("Hm", "m"), function("add", "[1]")
    parts = [
        told("reasoning_summary_text.done", text="Hm", output_index=0, item_id="rs_1", summary_index=0),
        told("reasoning_summary_text.done", text="m", output_index=0, item_id="rs_1", summary_index=1),
        told("output_text.done", text="Four", output_index=1, item_id="msg_1", content_index=0),
        told("output_text.done", text=" it is", output_index=1, item_id="msg_1", content_index=1),
        told("function_call_arguments.done", arguments="[1]", output_index=2, item_id="fc_1"),
    ]
    items = [done(thought), done(said, 1), done(call, 2)]
    for events in ([*parts, *items], items, [*items, *items], [*items, *parts], [added(said, 1), *items], []):
        back = whole(start(), *events, ends(thought, said, call))
        assert (back.text, back.reasoning) == ("Four it is", "Hmm")
        assert back.tool_calls == (ToolCall("call_1", "add", "[1]"),)


def test_only_done_events_without_places() -> None:
    """Without indexes and ids items are told apart by being done."""
    one, two = message("one", item_id=None), message(" two", item_id=None)
    calls = [function(name, "{}", f"c{name}", None) for name in "fg"]
    items = [done(item, ABSENT) for item in (one, two, *calls)]
    back = whole(*items, ends(one, two, *calls))
    assert back.text == "one two"
    assert [call.id for call in back.tool_calls] == ["cf", "cg"]


def test_output_text() -> None:
    """Some answers have only a joined text."""
    assert whole(ends(output_text="Hi")).text == "Hi"
    assert whole(text("Hi"), ends(output_text="Hi")).text == "Hi"


def test_text_that_stands_only_in_parts() -> None:
    """Parts that are announced and done, with no event of their text: the item, told whole, has it, once."""
    end = told("output_text.done", text="Four", output_index=0, item_id="msg_1", content_index=0)
    around = (
        [added(message()), part("added")],
        [part("done", text="Four"), done(message("Four")), ends(message("Four"))],
    )
    assert whole(*around[0], end, *around[1]).text == "Four"
    assert whole(*around[0], *around[1]).text == "Four"


def test_a_call_that_is_added_whole() -> None:
    """A call that is completed when it is added is told then; what is not completed waits for its arguments."""
    one = function("f", '{"a":1}', status="completed")
    assert called(added(one), ends()) == [("call_1", "f", '{"a":1}')]
    assert called(added(one), arguments('{"a":1}'), done(one), ends(one)) == [("call_1", "f", '{"a":1}')]
    begun = function("f", '{"a":1}', status="in_progress")
    assert called(added(begun), arguments('{"a":2}'), ends()) == [("call_1", "f", '{"a":2}')]


def test_arguments_of_an_object() -> None:
    """Arguments that are no text are told as JSON."""
    assert called(done(function("f", {"a": [1, "é"]})), ends()) == [("call_1", "f", '{"a":[1,"é"]}')]


def test_a_name_that_comes_late() -> None:
    """Arguments may come before the item, or name and id change when it is done: the last ones count."""
    late = done(function("f", "1", "late"))
    assert called(arguments("1"), late, ends()) == [("late", "f", "1")]
    assert called(added(function("", "", "early")), arguments("1"), late, ends()) == [("late", "f", "1")]


def test_restated_is_marked() -> None:
    """A delta whose text may have been told by events before it says so."""
    reader = OPENAI_RESPONSES.reader()
    assert [delta.restated for delta in reader.read(data_of(done(message("x"))))] == [True]
    assert [delta.restated for delta in reader.read(data_of(text("y", 1, "msg_2")))] == [False]
    assert [delta.restated for delta in reader.read(data_of(ends(message("x", item_id="msg_1"))))] == [False]


# --- places ---


def test_ids_that_change_with_each_event() -> None:
    """With indexes, ids do not matter; without them, pieces go to the last item of their kind that is not done."""
    one, two = message("one", item_id="z1"), message(" two", item_id="z2")
    for at in ((0, 1), (ABSENT, ABSENT)):
        back = whole(
            added(message(item_id="a"), at[0]),
            text("on", at[0], "b"),
            text("e", at[0], "c"),
            done({**one, "id": "d"}, at[0]),
            added(message(item_id="e"), at[1]),
            text(" two", at[1], "f"),
            done({**two, "id": "g"}, at[1]),
            ends(one, two),
        )
        assert back.text == "one two"


def test_one_index_for_all() -> None:
    """With a constant index, ids and kinds tell items apart."""
    thought, said, more = reasoning("Hm"), message("one"), message(" two", item_id="msg_2")
    calls = [function(name, name, f"c{name}", f"fc_{name}") for name in "fg"]
    back = whole(
        added({**thought, "summary": []}),
        told("reasoning_summary_text.delta", delta="Hm", output_index=0, item_id="rs_1", summary_index=0),
        done(thought),
        added(message()),
        text("one"),
        done(said),
        added(message(item_id="msg_2")),
        text(" two", 0, "msg_2"),
        done(more),
        *(added({**call, "arguments": ""}) for call in calls),
        *(arguments(name, 0, f"fc_{name}") for name in "fg"),
        *(done(call) for call in calls),
        ends(thought, said, more, *calls),
    )
    assert (back.text, back.reasoning) == ("one two", "Hm")
    assert [(call.name, call.arguments) for call in back.tool_calls] == [("f", "f"), ("g", "g")]


def test_one_index_for_all_told_whole() -> None:
    """With a constant index, an item that has no deltas is not taken for the one before it."""
    more = message(" two", item_id="msg_2")
    assert whole(added(message()), text("one"), added(more), done(more), ends()).text == "one two"


def test_one_place_for_all() -> None:
    """Without ids and with a constant index, kinds, ids of calls and parts tell deltas apart."""
    calls = [function(name, name, f"c{name}", None) for name in "fg"]
    events = [text("a", 0, None), text("b", 0, None, 1), arguments("1", 0, None), text("c", 0, None, 2)]
    ended = [
        told("output_text.done", text=piece, output_index=0, content_index=at)
        for at, piece in enumerate("abc")
    ]
    back = whole(*events, *ended, ends())
    assert (back.text, [call.arguments for call in back.tool_calls]) == ("abc", ["1"])
    mixed = [text("a", 0, None, None), arguments("1", 0, None), arguments("2", 5, None), ends()]
    assert [call.arguments for call in whole(*mixed).tool_calls] == ["1", "2"]
    each = [[added({**call, "arguments": ""}), arguments(call["name"], 0, None)] for call in calls]
    assert called(*each[0], *each[1], ends()) == [("cf", "f", "f"), ("cg", "g", "g")]


def test_one_id_for_all() -> None:
    """With a constant id, indexes tell items apart."""
    calls = [function(name, name, f"c{name}", "x") for name in "fg"]
    events = [added({**call, "arguments": ""}, at) for at, call in enumerate(calls)]
    events += [arguments(name, at, "x") for at, name in enumerate("fg")]
    assert called(*events, *(done(call, at) for at, call in enumerate(calls)), ends(*calls)) == [
        ("cf", "f", "f"),
        ("cg", "g", "g"),
    ]


def test_a_last_event_that_lists_other_items() -> None:
    """Where the whole response has other ids and places than its items had, nothing is told a second time."""
    for output in ([message("Hi", item_id="z")], [reasoning(), message("Hi", item_id="z")]):
        assert whole(added(message(), 4), text("Hi", 4), ends(*output)).text == "Hi"


def test_a_last_event_that_leaves_items_out() -> None:
    """An item on the place of one of another kind is itself."""
    thinking = told(
        "reasoning_summary_text.delta", delta="Hm", output_index=0, item_id="rs_1", summary_index=0
    )
    back = whole(thinking, ends(message("Hi")))
    assert (back.text, back.reasoning) == ("Hi", "Hm")


def test_reasoning_that_is_repeated_in_another_form() -> None:
    """Reasoning that came in deltas is not taken again, whatever the parts of its repetition."""
    thinking = told("reasoning_summary_text.delta", delta="Hm", output_index=0, item_id="rs_1")
    for item in (reasoning(content=[{"type": "reasoning_text", "text": "Hm"}]), reasoning("", "Hm")):
        assert whole(thinking, done(item), ends(item)).reasoning == "Hm"


@pytest.mark.parametrize(("index", "item_id"), [(0, "z"), (4, "msg_1")])
def test_an_item_that_only_the_last_event_tells(index: int, item_id: str) -> None:
    """An item that was added and never told is found in the whole response by its id, or by its place."""
    assert whole(added(message(), index), ends(message("Hi", item_id=item_id))).text == "Hi"


# --- numbers ---


def numbered(*events: bytes, first: int = 0) -> list[bytes]:
    """Return the events with sequence numbers."""
    return [
        event({**json.loads(data_of(piece)), "sequence_number": first + at})
        for at, piece in enumerate(events)
    ]


STREAM = numbered(
    start(),
    added(message()),
    part("added"),
    text("a"),
    text("a"),
    text("b"),
    done(message("aab")),
    added(function("f", ""), 1),
    arguments("1", 1),
    arguments("1", 1),
    ends(message("aab"), function("f", "11")),
)


@pytest.mark.parametrize("cut", range(1, len(STREAM)))
@pytest.mark.parametrize("back", [0, 1, 2, 3, 99])
def test_going_on_after_a_cut(cut: int, back: int) -> None:
    """The same reader goes on with what comes after the last number, and passes over what is repeated."""
    reader = OPENAI_RESPONSES.reader()
    sinks = []
    deltas: list[Delta] = []
    for events in (STREAM[:cut], STREAM[max(0, cut - back) :]):
        for piece in events:
            deltas += reader.read(data_of(piece))
        sinks.append(reader.ending())
    assert sinks == [None, "completed"]
    assert "".join(delta.text for delta in deltas) == "aab"
    assert "".join(call.arguments for delta in deltas for call in delta.tool_calls) == "11"
    assert sum(delta.terminal for delta in deltas) == 1


@pytest.mark.parametrize(
    "numbers",
    [
        [0] * 11,
        [-1] * 11,
        [0, 1, 2, 3, 3, 3, 3, 4, 4, 4, 4],
        [None, 0, None, 1, 1, 1, None, 2, 2, 2, 3],
        [0, 1, 2, 0, 1, 2, 3, 0, 1, 2, 3],
        [0, 1, 2, 3, 3, 3, 1, 2, 1, 2, 2],
        ["x"] * 11,
        [1.5, {}, [], True, False, True, False, None, 1 << 70, 1 << 70, 0],
    ],
)
def test_numbers_that_are_none(numbers: list[Any]) -> None:
    """Numbers that stand still, begin again or are no numbers cost no text."""
    letters = iter("abc")
    events = [json.loads(data_of(piece)) for piece in STREAM]
    for value, number in zip(events, numbers, strict=True):
        value["sequence_number"] = number
        if value["type"] == "response.output_text.delta":
            value["delta"] = next(letters)
        if value["type"] == "response.function_call_arguments.delta":
            value["delta"] += "23"[number == numbers[-2]]
    back = whole(*(event(value) for value in events))
    assert back.text == "abc"


def test_a_long_event_repeated() -> None:
    """Events too long to be kept are told apart as well."""
    reader = OPENAI_RESPONSES.reader()
    for piece, expected in zip(
        numbered(text("x" * 9000), first=7)
        + numbered(text("x" * 9000), first=7)
        + numbered(text("y" * 9000), first=7),
        (9000, 0, 9000),
        strict=True,
    ):
        assert sum(len(delta.text) for delta in reader.read(data_of(piece))) == expected


# --- endings ---


def test_only_the_last_event_ends_it() -> None:
    """Without it the answer is truncated, whatever was done before."""
    result = answer(start(), added(message()), text("Hi"), done(message("Hi")))
    assert (result.state, result.reason, result.snapshot.text) == ("failed", "truncated", "Hi")
    assert answer(start()).reason == "truncated"
    assert answer(told("done", response={"status": "completed"})).reason == "completed"
    assert answer(told("completed")).reason == "completed"
    assert answer(told("completed", response={"status": "in_progress"})).reason == "completed"


@pytest.mark.parametrize(
    ("details", "reason"),
    [
        ({"reason": "max_output_tokens"}, "max_output_tokens"),
        ({"reason": "content_filter"}, "content_filter"),
        ("max_output_tokens", "max_output_tokens"),
        (None, "incomplete"),
        ({"reason": 5}, "incomplete"),
    ],
)
@pytest.mark.parametrize("kind", ["incomplete", "completed"])
def test_incomplete(details: Any, reason: str, kind: str) -> None:
    """The finish reason of an incomplete response is why it is so, also where only its status says it."""
    end = ends(message("Hi"), kind=kind, status="incomplete", incomplete_details=details)
    result = answer(start(), text("Hi"), end)
    assert (result.state, result.reason, result.snapshot.text) == ("completed", reason, "Hi")
    assert result.snapshot.usage == Usage(20, 9, 5, 8)
    assert reason in OPENAI_RESPONSES.endings.incomplete


def test_cancelled() -> None:
    """A response that was cancelled on the provider's side has ended, and is not whole."""
    result = answer(start(), text("Hi"), ends(message("Hi"), kind="cancelled"))
    assert (result.state, result.reason) == ("completed", "cancelled")
    assert "cancelled" in OPENAI_RESPONSES.endings.incomplete


def test_a_body_that_is_no_stream() -> None:
    """A whole response in place of a stream is the answer, if it says that it ended."""
    response = json.loads(data_of(ends(message("Hi"), function("f", "{}"))))["response"]
    result = answer(json.dumps(response).encode())
    assert (result.state, result.reason, result.snapshot.text) == ("completed", "completed", "Hi")
    assert len(result.snapshot.tool_calls) == 1
    assert answer(json.dumps({**response, "status": "queued"}).encode()).state == "failed"
    failed = answer(json.dumps({**response, "status": "failed", "error": {"message": "Broke"}}).encode())
    assert (failed.reason, failed.fault and failed.fault.message) == ("provider_error", "Broke")


# --- errors ---

LIMIT = {"code": "rate_limit_exceeded", "message": "Slow down, try again in 2s"}


@pytest.mark.parametrize(
    "error",
    [
        ends(kind="failed", error=LIMIT),
        ends(kind="completed", status="failed", error=LIMIT),
        event({"type": "error", **LIMIT, "param": None, "sequence_number": 0}, "error"),
        event({"type": "error", **LIMIT, "param": None, "sequence_number": 0}),
        event({"type": "error", "error": {"type": "tokens", **LIMIT}}),
        event({"type": "response.error", "error": LIMIT}),
        event({"type": "response.failed", "error": LIMIT}),
        event({"error": LIMIT}),
        event(LIMIT, "error"),
        told("output_text.delta", delta="x", error=LIMIT),
        told("in_progress", error=LIMIT),
        json.dumps({"error": LIMIT}).encode() + b"\n",
        b"error: " + json.dumps(LIMIT).encode() + b"\n\n",
    ],
)
def test_errors(error: bytes) -> None:
    """However an error comes it is failed, with the provider's own message and what was told before."""
    result = answer(*numbered(start(), text("part")), error)
    assert (result.state, result.reason, result.snapshot.text) == ("failed", "provider_error", "part")
    assert result.fault is not None
    assert (result.fault.kind, result.fault.message) == ("rate_limit", LIMIT["message"])
    assert (result.fault.temporary, result.fault.retry_after_s) == (True, 2.0)


def test_a_failure_without_a_message() -> None:
    """It is a failure all the same, and keeps the usage."""
    result = answer(start(), text("part"), ends(kind="failed", error=None))
    assert (result.state, result.reason) == ("failed", "provider_error")
    assert result.snapshot.usage == Usage(20, 9, 5, 8)
    assert result.fault is not None
    assert result.fault.message
    broken = answer(event("it broke", "error")).fault
    assert broken is not None
    assert broken.message == "it broke"


# --- what is asked ---

BACKGROUND = {"model": "m", "input": "Hi", "background": True, "stream": True}
NUMBERED = b'{"type":"keepalive","sequence_number":4}'


def resumed(request: dict[str, Any], *payloads: bytes, response_id: str | None = "resp_1") -> Any:
    assert OPENAI_RESPONSES.asking.resume is not None
    before = copy.deepcopy(request)
    reader = OPENAI_RESPONSES.reader()
    for payload in payloads:
        reader.read(payload)
    progress = Progress(snapshot=Snapshot(response_id=response_id), reader=reader)
    call = OPENAI_RESPONSES.asking.resume(request, progress)
    assert request == before
    return call and (call.method, call.path, call.body)


def test_resume() -> None:
    """A background response is asked for from the event after the last one, with what the request wanted included."""
    payload = data_of(numbered(text("x"), first=41)[0])
    assert resumed(BACKGROUND, payload) == ("GET", "/responses/resp_1?stream=true&starting_after=41", None)
    wanted = {**BACKGROUND, "store": True, "include": ["reasoning.encrypted_content", 5, "a&b"]}
    path = "/responses/resp_1?stream=true&starting_after=41&include[]=reasoning.encrypted_content&include[]=a%26b"
    assert resumed(wanted, payload) == ("GET", path, None)
    assert resumed(BACKGROUND, payload, response_id="a:b@c")[1].startswith("/responses/a%3Ab%40c?")


def test_resume_after_an_event_without_a_number() -> None:
    """The rest is what follows the last event that had one, however many came after it without."""
    alive, odd = b'{"type":"keepalive"}', b'{"type":"keepalive","sequence_number":"x"}'
    payload = data_of(numbered(text("x"), first=7)[0])
    expected = ("GET", "/responses/resp_1?stream=true&starting_after=7", None)
    assert resumed(BACKGROUND, payload, alive, odd, alive) == expected
    assert resumed(BACKGROUND, payload, b'{"type":"keepalive","sequence_number":8}', alive)[1][-1] == "8"
    assert resumed(BACKGROUND, payload, b'{"type":"keepalive","sequence_number":7}') is None  # they are none


@pytest.mark.parametrize(
    ("request_", "payload", "response_id"),
    [
        ({"model": "m"}, NUMBERED, "resp_1"),
        ({**BACKGROUND, "background": "yes"}, NUMBERED, "resp_1"),
        ({**BACKGROUND, "store": False}, NUMBERED, "resp_1"),
        (BACKGROUND, b"", "resp_1"),
        (BACKGROUND, b'{"type":"keepalive"}', "resp_1"),
        (BACKGROUND, NUMBERED.replace(b"4", b"true"), "resp_1"),
        (BACKGROUND, NUMBERED.replace(b"4", b"-1"), "resp_1"),
        (BACKGROUND, NUMBERED.replace(b"4", b"1e30"), "resp_1"),
        (BACKGROUND, NUMBERED.replace(b"4", b'"4&x"'), "resp_1"),
        *((BACKGROUND, NUMBERED, one) for one in (None, "", "..", "a/b", "a?b", "a b", "x" * 257, "é")),
    ],
)
def test_no_resume(request_: dict[str, Any], payload: bytes, response_id: str | None) -> None:
    """What is not kept, not numbered or has no proper id cannot be resumed."""
    assert resumed(request_, payload, response_id=response_id) is None


def test_cancel_and_retrieve() -> None:
    """A background response is cancelled and asked for its usage by its id; another one has neither."""
    asking = OPENAI_RESPONSES.asking
    assert asking.path == "/responses"
    assert asking.continuation is None
    assert asking.cancel is not None
    assert asking.retrieve is not None
    assert asking.usage is not None
    stop, get = asking.cancel(BACKGROUND, "resp_1"), asking.retrieve(BACKGROUND, "resp_1")
    assert stop is not None
    assert get is not None
    assert (stop.method, stop.path, stop.body) == ("POST", "/responses/resp_1/cancel", None)
    assert (get.method, get.path, get.body) == ("GET", "/responses/resp_1", None)
    for request, response_id in (({}, "resp_1"), (BACKGROUND, ""), (BACKGROUND, "../files")):
        assert asking.cancel(request, response_id) is None
        assert asking.retrieve(request, response_id) is None
    assert asking.usage(json.dumps({"usage": USAGE}).encode()) == Usage(20, 9, 5, 8)
    assert asking.usage(json.dumps({"status": "cancelled", "usage": USAGE}).encode()) == Usage(20, 9, 5, 8)
    for status in ("queued", "in_progress"):  # not its last word
        assert asking.usage(json.dumps({"status": status, "usage": USAGE}).encode()) is None
    for body in (b"", b"[]", b"{}", b'{"usage":null}', b'{"usage":{"input_tokens":"x"}}'):
        assert asking.usage(body) is None


# --- hostile input ---

WRONG: list[Any] = [
    {"type": "response.output_text.delta", "delta": 5},
    {"type": "response.output_text.delta", "delta": "x", "output_index": -1},
    {"type": "response.output_text.delta", "delta": "x", "output_index": MAX_INDEX + 1},
    {"type": "response.output_text.delta", "delta": "x", "content_index": 1 << 60},
    {"type": "response.output_text.delta", "delta": "x", "output_index": "x"},
    {"type": "response.function_call_arguments.delta", "delta": "x", "output_index": 1 << 60},
    {"type": "response.output_text.done", "text": {}},
    {"type": "response.output_text.done", "text": "x", "content_index": -3},
    {"type": "response.output_item.added"},
    {"type": "response.output_item.added", "item": {"type": "function_call", "call_id": 5}},
    {"type": "response.output_item.added", "item": {"type": "function_call", "name": 5}},
    {"type": "response.output_item.done", "item": []},
    {"type": "response.output_item.done", "item": {"type": "message", "content": 5}},
    {"type": "response.output_item.done", "output_index": 1e300, "item": {"type": "message"}},
    {"type": "response.completed", "response": 5},
    {"type": "response.completed", "response": {"output": [5]}},
    {
        "type": "response.completed",
        "response": {"output": [{"type": "message", "content": "x"}, {"type": "reasoning", "summary": 5}]},
    },
    {"type": 5},
    {},
    5,
    "text",
    [],
]


def state(reader: Any) -> str:
    """Return all that a reader remembers, as text."""

    def shown(value: Any) -> Any:
        if type(value).__name__ == "_Item":
            return [
                (name, repr(getattr(value, name))) for name in type(value).__slots__ if name != "told"
            ] + sorted(value.told)
        if isinstance(value, dict):
            return [(key, shown(item)) for key, item in value.items()]
        return value

    return repr(
        [(name, shown(getattr(reader, name))) for name in sorted(type(reader).__slots__) if "hot" not in name]
    )


@pytest.mark.parametrize("value", WRONG, ids=lambda value: json.dumps(value)[:60])
def test_what_cannot_be_read_changes_nothing(value: Any) -> None:
    """An event of the wrong shape is unreadable, and leaves the reader as it was."""
    before = numbered(start(), added(message()), text("x"), added(function("f", ""), 2), arguments("1", 2))
    reader = OPENAI_RESPONSES.reader()
    for piece in before:
        reader.read(data_of(piece))
    known = state(reader)
    with pytest.raises(UnparseableError):
        reader.read(
            json.dumps(
                {**value, "sequence_number": 77} if isinstance(value, dict) and value else value
            ).encode()
        )
    assert state(reader) == known
    result = answer(*before, event(value), text("y"), ends())
    assert (result.state, result.snapshot.text, result.skipped) == ("completed", "xy", 1)


def test_too_many_calls() -> None:
    """Calls beyond the limit are unreadable, however they come; the rest is read on."""
    reader = OPENAI_RESPONSES.reader()
    for at in range(MAX_CALLS):
        reader.read(data_of(added(function("f", "", f"c{at}", f"fc_{at}"), at)))
    known = state(reader)
    for piece in (
        added(function("f", "", "z", "z"), 5000),
        done(function("f", "", "z", "z"), 5000),
        arguments("1", 5000, "z"),
        told("function_call_arguments.done", arguments="1", output_index=5000),
    ):
        with pytest.raises(UnparseableError, match="tool calls"):
            reader.read(data_of(piece))
    assert state(reader) == known
    assert reader.read(data_of(text("x", 9999)))[0].text == "x"
    reader = OPENAI_RESPONSES.reader()
    with pytest.raises(UnparseableError, match="tool calls"):
        reader.read(data_of(ends(*[function("f", "")] * (MAX_CALLS + 1))))
    assert reader.ending() is None


@pytest.mark.parametrize("many", ["items", "parts", "ids"])
def test_more_than_is_remembered(many: str) -> None:
    """Past the bounds deltas are still taken, each once, and repetitions are not."""
    reader = OPENAI_RESPONSES.reader()
    count = 3 * max(MAX_ITEMS, MAX_PARTS)
    for at in range(count):
        place = {"items": (at, f"m{at}", 0), "parts": (0, "m", at), "ids": (ABSENT, f"m{at}", 0)}[many]
        assert reader.read(data_of(text("x", *place)))[0].text == "x"
    assert len(reader._by_index) <= MAX_ITEMS  # type: ignore[attr-defined] # what is bounded
    assert len(reader._by_id) <= MAX_ITEMS  # type: ignore[attr-defined] # what is bounded
    kept = {id(item): item for item in [*reader._by_index.values(), *reader._by_id.values()]}  # type: ignore[attr-defined] # as above
    assert sum(len(item.told) for item in kept.values()) <= MAX_PARTS
    if many == "parts":
        assert reader.read(data_of(done(message(*["x"] * count, item_id="m")))) == ()
    items = [message("x", item_id=f"m{at}") for at in range(MAX_ITEMS + 5)]
    if many != "ids":
        assert "".join(delta.text for delta in reader.read(data_of(ends(*items)))) == ""
    assert reader.read(data_of(text("y", count, "y")))[0].text == "y"


def test_long_labels() -> None:
    """Long ids are not kept: items with them go by index, and a long model or response id is none."""
    long = "x" * 100_000
    reader = OPENAI_RESPONSES.reader()
    for at in range(3):
        reader.read(data_of(added(message(item_id=f"{long}{at}"), at)))
        assert reader.read(data_of(text("x", at, f"{long}{at}")))[0].text == "x"
        assert reader.read(data_of(done(message("x", item_id=f"{long}{at}"), at))) == ()
    assert len(state(reader)) < 10_000
    said = whole(told("created", response={"id": long, "model": long}), told("completed"))
    assert (said.model, said.response_id) == (None, None)
    assert called(done(function("f", "1", long)), ends()) == [(long, "f", "1")]


NAMES = st.sampled_from(
    [
        "type",
        "response",
        "item",
        "part",
        "delta",
        "text",
        "arguments",
        "input",
        "output_index",
        "item_id",
        "content_index",
        "summary_index",
        "sequence_number",
        "status",
        "output",
        "content",
        "summary",
        "usage",
        "error",
        "errors",
        "incomplete_details",
        "reason",
        "id",
        "call_id",
        "name",
        "model",
        "object",
        "refusal",
    ]
)
KINDS = st.sampled_from(
    [
        "response.created",
        "response.output_item.added",
        "response.output_item.done",
        "response.content_part.added",
        "response.output_text.delta",
        "response.output_text.done",
        "response.refusal.done",
        "response.reasoning_text.delta",
        "response.function_call_arguments.delta",
        "response.function_call_arguments.done",
        "response.completed",
        "response.failed",
        "response.incomplete",
        "response",
        "error",
        "message",
        "function_call",
        "reasoning",
        "custom_tool_call",
        "output_text",
        "completed",
        "failed",
    ]
)
SCALARS = (
    st.none() | st.booleans() | st.integers(-2, 3) | st.integers() | st.floats() | KINDS | st.text(max_size=3)
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(NAMES, inner, max_size=5),
    max_leaves=12,
)
EVENTS = st.builds(
    lambda kind, rest: {**rest, "type": kind}, KINDS, st.dictionaries(NAMES, VALUES, max_size=5)
)


@settings(max_examples=300, deadline=None)
@given(
    st.lists(
        st.tuples(EVENTS | VALUES, st.sampled_from(["message", "error", "response.completed"])), max_size=6
    )
)
def test_any_json_is_read_or_refused(events: list[tuple[Any, str]]) -> None:
    """No JSON value raises anything but UnparseableError, and one that does changes nothing."""
    reader = OPENAI_RESPONSES.reader()
    for value, name in events:
        before = state(reader)
        try:
            reader.read(json.dumps(value).encode(), name)
        except UnparseableError:
            assert state(reader) == before
        reader.ending()


# --- round trip ---

TEXTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
PIECES = st.lists(TEXTS, max_size=4)
ITEMS = st.one_of(
    st.tuples(st.just("message"), PIECES, TEXTS),
    st.tuples(st.just("reasoning"), PIECES, TEXTS),
    st.tuples(st.just("function_call"), PIECES, TEXTS),
)


def encode(
    items: list[Any], deltas: bool, parts: bool, last: bool
) -> tuple[list[bytes], str, str, list[Any]]:
    """Return the events of a response with these items, told as often as asked, and its text, reasoning and calls."""
    events, output, calls = [start(), start("in_progress")], [], []
    said = thought = ""
    for at, (kind, pieces, name) in enumerate(items):
        joined = "".join(pieces)
        item_id = f"id_{at}"
        if kind == "message":
            item, empty = message(joined, item_id=item_id), message(item_id=item_id)
            field, where = "output_text", {"content_index": 0}
            said += joined
        elif kind == "reasoning":
            item, empty = reasoning(joined, item_id=item_id), reasoning(item_id=item_id)
            field, where = "reasoning_summary_text", {"summary_index": 0}
            thought += joined
        else:
            item, empty = function(name, joined, f"c{at}", item_id), function(name, "", f"c{at}", item_id)
            field, where = "function_call_arguments", {}
            calls.append((f"c{at}", name, joined))
        output.append(item)
        place = {"output_index": at, "item_id": item_id, **where}
        if deltas:
            events.append(added(empty, at))
            events += [told(f"{field}.delta", delta=piece, **place) for piece in pieces]
        if parts:
            source = "arguments" if kind == "function_call" else "text"
            events.append(told(f"{field}.done", **{source: joined}, **place))
        if parts or not last:
            events.append(done(item, at))
    events.append(ends(*(output if last else [])))
    return numbered(*events), said, thought, calls


@settings(max_examples=150, deadline=None)
@given(st.lists(ITEMS, max_size=5), st.booleans(), st.booleans(), st.booleans(), st.data())
def test_round_trip(items: list[Any], deltas: bool, parts: bool, last: bool, data: st.DataObject) -> None:
    """A generated answer comes back the same, however often it is told and however it is cut, and whole only at its end."""
    events, said, thought, calls = encode(items, deltas, parts, last)
    body = b"".join(events)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(body)), max_size=8)))
    pieces = [body[a:b] for a, b in zip([0, *cuts], [*cuts, len(body)], strict=True)]
    result = replay("openai-responses", pieces)
    assert (result.state, result.reason, result.skipped) == ("completed", "completed", 0)
    back = result.snapshot
    assert (back.text, back.reasoning) == (said, thought)
    assert [(call.id, call.name, call.arguments) for call in back.tool_calls] == calls
    assert back.usage == Usage(20, 9, 5, 8)
    cut = data.draw(st.integers(len(events[0]), len(body) - len(events[-1])))
    sink = RecordingSink()
    reader = BodyReader(OPENAI_RESPONSES, sink)
    reader.feed(body[:cut])
    reader.end(clean=data.draw(st.booleans()))
    assert sink.ending == ("failed", "truncated")
    assert said.startswith(sink.snapshot.text)
