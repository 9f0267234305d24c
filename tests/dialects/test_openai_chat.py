"""What the servers that imitate OpenAI chat do differently, one oddity a test."""

from __future__ import annotations

import json
from typing import Any

import pytest

from supervisor.dialects import ToolCall, UnparseableError, Usage
from supervisor.dialects.openai_chat import MAX_CHOICES, OPENAI_CHAT
from supervisor.dialects.tool_calls import MAX_CALLS
from tests.dialects.bodies import DONE, call, chunk, event, read

TEXT = {"content": "Hi"}


@pytest.mark.parametrize(
    ("content", "text", "reasoning"),
    [
        ("plain", "plain", ""),
        (None, "", ""),
        ("", "", ""),
        ([{"type": "text", "text": "a"}, {"type": "text", "text": "b"}], "ab", ""),
        ([{"type": "thinking", "thinking": [{"type": "text", "text": "hm"}]}], "", "hm"),
        ([{"type": "thinking", "thinking": "hm"}, {"type": "text", "text": "ok"}], "ok", "hm"),
        ([{"type": "reference", "reference_ids": [1]}, "s"], "s", ""),
        ({"type": "text", "text": "one"}, "one", ""),
        ([{"type": "image_url", "image_url": {"url": "x"}}], "", ""),
    ],
)
def test_content_of_any_shape(content: Any, text: str, reasoning: str) -> None:
    """Content as a string, parts, one part, or nothing; thinking parts are reasoning; other parts are not text."""
    sink = read(chunk({"role": "assistant"}), chunk({"content": content}), chunk(finish="stop"), DONE)
    assert (text, reasoning) == (sink.snapshot.text, sink.snapshot.reasoning)
    assert sink.ending == ("completed", "stop")
    assert not sink.skipped


@pytest.mark.parametrize(
    "delta",
    [
        {"reasoning": "hm"},
        {"reasoning_content": "hm"},
        {"reasoning": "hm", "reasoning_content": "hm"},
        {"reasoning": "hm", "reasoning_details": [{"type": "reasoning.text", "text": "hm"}]},
        {"reasoning": None, "reasoning_details": [{"type": "reasoning.text", "text": "hm"}]},
        {"reasoning_text": "hm"},
        {"thinking": "hm"},
        {"reasoning": {"content": "hm"}},
        {"content": "", "reasoning": "hm"},
    ],
)
def test_reasoning_wherever_it_is(delta: dict[str, Any]) -> None:
    """Every name of reasoning is read, once where several say the same, also on the shortest way."""
    sink = read(chunk(delta), chunk(delta), chunk({"content": "x", "reasoning_content": None}), DONE)
    assert (sink.snapshot.reasoning, sink.snapshot.text) == ("hmhm", "x")


def test_refusal() -> None:
    """A refusal is kept apart from the text."""
    sink = read(chunk({"refusal": "I "}), chunk({"refusal": "won't", "content": ""}), chunk(finish="stop"))
    assert (sink.snapshot.refusal, sink.snapshot.text) == ("I won't", "")


@pytest.mark.parametrize(
    ("pieces", "expected"),
    [
        pytest.param(
            [call(0, "a", "f", ""), call(0, None, None, '{"x"'), call(0, None, None, ":1}")],
            [("a", "f", '{"x":1}')],
            id="as OpenAI does",
        ),
        pytest.param(
            [
                call(0, "a", "f", ""),
                call(1, "b", "g", ""),
                call(1, None, None, "[1]"),
                call(0, None, None, "[0]"),
            ],
            [("a", "f", "[0]"), ("b", "g", "[1]")],
            id="interleaved",
        ),
        pytest.param(
            [call(1, "b", "g", "[1]"), call(0, "a", "f", "[0]")],
            [("a", "f", "[0]"), ("b", "g", "[1]")],
            id="out of order",
        ),
        pytest.param(
            [call(None, "a", "f", "{"), call(None, None, None, "}"), call(None, "b", "g", "{}")],
            [("a", "f", "{}"), ("b", "g", "{}")],
            id="index missing",
        ),
        pytest.param(
            [call("null", "a", "f", "{"), call("null", "a", None, "}"), call("null", "b", "g", "{}")],
            [("a", "f", "{}"), ("b", "g", "{}")],
            id="index null, id repeated",
        ),
        pytest.param(
            [call(0, "a", "f", "{"), call(1, None, None, '"k":'), call(2, None, None, "2}")],
            [("a", "f", '{"k":2}')],
            id="index rotating, id once",
        ),
        pytest.param(
            [call(0, "a", "f", "{"), call(1, "a", None, '"k":'), call(2, "a", "f", "2}")],
            [("a", "f", '{"k":2}')],
            id="index rotating, id repeated",
        ),
        pytest.param(
            [call(0, "a", "f", "{}"), call(0, "b", "f", "{}"), call(0, None, None, " ")],
            [("a", "f", "{}"), ("b", "f", "{} ")],
            id="two calls on one index",
        ),
        pytest.param(
            [
                call(0, "a", "f", ""),
                call(0, "b", "f", ""),
                call(0, "a", None, "[1]"),
                call(0, "b", None, "[2]"),
            ],
            [("a", "f", "[1]"), ("b", "f", "[2]")],
            id="two calls on one index, told apart by id",
        ),
        pytest.param(
            [call(0, "", "f", "{}"), call(0, "", "f", '{"again":true}')],
            [("", "f", "{}"), ("", "f", '{"again":true}')],
            id="two calls on one index without ids",
        ),
        pytest.param(
            [call(0, "a", "f", '{"x"'), call(0, "b", None, ":"), call(0, "c", None, "1}")],
            [("a", "f", '{"x":1}')],
            id="a new id for each piece",
        ),
        pytest.param(
            [call(0, "a", "f", '{"x"'), call(0, "b", "f", ":"), call(0, "c", "f", "1}")],
            [("a", "f", '{"x":1}')],
            id="a new id and the name in each piece",
        ),
        pytest.param(
            [call(0, "a", "f", '{"x"'), call(0, "a", "f", ":1}")],
            [("a", "f", '{"x":1}')],
            id="id and name repeated",
        ),
        pytest.param(
            [call(0, "a", "f", '{"x":1}'), call(0, "a", "f", '{"x":1}')],
            [("a", "f", '{"x":1}')],
            id="the whole call repeated",
        ),
        pytest.param(
            [
                call(0, "a", "f"),
                call(0, None, None, '{"x"'),
                call(0, None, None, ":1}"),
                call(0, "a", "f", '{"x":1}'),
            ],
            [("a", "f", '{"x":1}')],
            id="the whole call repeated after its pieces",
        ),
        pytest.param(
            [
                call(0, "a", "f", "["),
                call(1, "b", "g", "{"),
                call(0, None, None, "1"),
                call(None, None, None, "]"),
            ],
            [("a", "f", "[1]"), ("b", "g", "{")],
            id="an index left out after another call's piece",
        ),
        pytest.param(
            [call(None, "a", "f", "{}"), call(None, "b", None, "{}"), call(None, "b", "g", None)],
            [("a", "f", "{}"), ("b", "g", "{}")],
            id="a second call without index or name",
        ),
        pytest.param(
            [call(0, "a", "f", '{"x":1}'), call(1, "a", "f", '{"x":2}')],
            [("a", "f", '{"x":1}'), ("a", "f", '{"x":2}')],
            id="two calls with one id",
        ),
        pytest.param(
            [call(0, "a", "get_"), call(0, None, "weather", ""), call(0, None, None, "{}")],
            [("a", "get_weather", "{}")],
            id="name in pieces",
        ),
        pytest.param([call(0, "a", "f", {"x": [1]})], [("a", "f", '{"x":[1]}')], id="arguments as an object"),
        pytest.param([call(0, "a", "f", None)], [("a", "f", "")], id="no arguments"),
        pytest.param([call(0, 7, "f", "{}")], [("7", "f", "{}")], id="id as a number"),
        pytest.param(
            [call("0", "a", "f", "{"), call("0", None, None, "}")], [("a", "f", "{}")], id="index as digits"
        ),
        pytest.param(
            [call(0, None, "f", "{}"), call(0, "late", None, None)], [("late", "f", "{}")], id="id comes late"
        ),
        pytest.param(
            [
                chunk({"function_call": {"name": "f", "arguments": "{"}}),
                chunk({"function_call": {"arguments": "}"}}),
            ],
            [("", "f", "{}")],
            id="function_call",
        ),
        pytest.param(
            [chunk({"tool_calls": {"id": "a", "index": 0, "function": {"name": "f", "arguments": "{}"}}})],
            [("a", "f", "{}")],
            id="one call, not in a list",
        ),
        pytest.param([chunk({"tool_calls": []}), chunk({"tool_calls": None})], [], id="none"),
    ],
)
@pytest.mark.parametrize("before", [chunk({"role": "assistant"}), chunk(TEXT)], ids=["role", "text"])
def test_tool_calls(before: bytes, pieces: list[bytes], expected: list[tuple[str, str, str]]) -> None:
    """However calls are labelled, each piece goes to the call it belongs to, on the shortest way and on the long one."""
    sink = read(before, *pieces, chunk(finish="tool_calls"), DONE)
    assert tuple(ToolCall(*call) for call in expected) == sink.snapshot.tool_calls
    assert sink.ending == ("completed", "tool_calls")
    assert not sink.skipped


def test_calls_of_choices_are_apart() -> None:
    """The same id and index in two choices are two calls."""
    pieces = [{"index": 0, "id": "a", "function": {"name": "f", "arguments": text}} for text in ("{}", "[]")]
    sink = read(*(chunk({"tool_calls": [piece]}, index=index) for index, piece in enumerate(pieces)), DONE)
    assert [choice.tool_calls[0].arguments for choice in sink.snapshot.choices] == ["{}", "[]"]


USAGE = {"prompt_tokens": 3, "completion_tokens": 5, "total_tokens": 8}


@pytest.mark.parametrize(
    ("last", "expected"),
    [
        (event({"choices": [], "usage": USAGE}), Usage(3, 5)),
        (event({"choices": None, "usage": USAGE}), Usage(3, 5)),
        (event({"usage": USAGE}), Usage(3, 5)),
        (chunk(usage={"input_tokens": 3, "output_tokens": 5.0}), Usage(3, 5)),
        (chunk(x_groq={"id": "r", "usage": USAGE}), Usage(3, 5)),
        (event({"choices": [{"index": 0, "delta": {}, "usage": USAGE}]}), Usage(3, 5)),
        (chunk(usage=USAGE | {"prompt_tokens_details": {"cached_tokens": 2}}), Usage(3, 5, None, 2)),
        (chunk(usage=USAGE | {"completion_tokens_details": {"reasoning_tokens": 4}}), Usage(3, 5, 4)),
        (
            chunk(usage=USAGE | {"prompt_cache_hit_tokens": 1, "completion_tokens_details": None}),
            Usage(3, 5, None, 1),
        ),
        (chunk(usage={}), None),
        (chunk(usage=None), None),
        (chunk(usage=[]), None),
        (chunk(usage={"prompt_tokens": -1, "completion_tokens": True}), None),
    ],
)
def test_usage_wherever_it_is(last: bytes, expected: Usage | None) -> None:
    """Usage is read from its own chunk, any chunk, a choice or x_groq; a null or empty one states nothing."""
    sink = read(chunk(TEXT), chunk(finish="stop"), last, DONE)
    assert expected == sink.snapshot.usage
    assert sink.ending == ("completed", "stop")
    assert not sink.skipped


def test_running_usage_is_not_summed() -> None:
    """With usage on every chunk the last one counts, and no text is lost."""
    body = [chunk({"content": "x"}, usage={"prompt_tokens": 4, "completion_tokens": n}) for n in range(1, 6)]
    sink = read(*body, chunk(finish="stop"), chunk(usage=None), DONE)
    assert (Usage(4, 5), "xxxxx") == (sink.snapshot.usage, sink.snapshot.text)


def test_model_and_id_are_the_first_stated() -> None:
    """The model and id are those of the first chunk that has them; an empty one does not count."""
    sink = read(
        chunk(model="", id=""),
        chunk(TEXT, model="m-1", id="c-1"),
        chunk(finish="stop", model="m-2", id="c-2"),
    )
    assert (sink.snapshot.model, sink.snapshot.response_id) == ("m-1", "c-1")


@pytest.mark.parametrize(
    "marker", ["[DONE]", " [DONE] ", "[DONE]\t", '"[DONE]"'], ids=["plain", "spaces", "tab", "quoted"]
)
def test_done_ends_the_answer(marker: str) -> None:
    """[DONE] completes with the finish reason, or `done` without one, and what follows is not read."""
    sink = read(chunk(TEXT), chunk(finish="length"), event(marker), event({"error": "late"}))
    assert sink.ending == ("completed", "length")
    bare = read(chunk(TEXT), event(marker), chunk({"content": "late"}))
    assert (*bare.ending, bare.snapshot.text) == ("completed", "done", "Hi")


@pytest.mark.parametrize("finish", [None, "", "null", False])
def test_what_is_no_finish_reason(finish: Any) -> None:
    """An empty finish reason on every chunk does not end the answer."""
    sink = read(chunk(TEXT, finish=finish), chunk({"content": "!"}, finish=finish))
    assert sink.ending == ("failed", "truncated")
    assert (sink.snapshot.text, sink.snapshot.finish_reason, sink.marks) == ("Hi!", None, [])


@pytest.mark.parametrize(
    "finish", ["stop", "length", "tool_calls", "content_filter", "function_call", "model_length"]
)
def test_finish_reason_without_done(finish: str) -> None:
    """A finish reason ends the answer, as the provider words it, however the connection then ends."""
    for clean in (True, False):
        sink = read(chunk(TEXT), chunk(finish=finish), event({"choices": [], "usage": USAGE}), clean=clean)
        assert ("completed", finish) == sink.ending
        assert [finish] == sink.marks


def test_every_choice_must_finish() -> None:
    """With one of two choices unfinished the answer has not ended; then it has."""
    body = [chunk({"content": "a"}), chunk({"content": "b"}, index=1), chunk(finish="stop")]
    assert read(*body).ending == ("failed", "truncated")
    assert read(*body, chunk(finish="stop")).ending == ("failed", "truncated")
    ended = read(*body, chunk(index=1, finish="length"))
    assert (*ended.ending, ended.marks) == ("completed", "stop", ["stop"])
    assert [(c.text, c.finish_reason) for c in ended.snapshot.choices] == [("a", "stop"), ("b", "length")]


def test_a_role_opens_a_choice() -> None:
    """A choice that has only been announced is waited for."""
    sink = read(chunk({"role": "assistant"}, index=1), chunk(TEXT, finish="stop"))
    assert sink.ending == ("failed", "truncated")
    assert [choice.index for choice in sink.snapshot.choices] == [0, 1]


ERROR = {"message": "Rate limit reached", "type": "tokens", "code": "rate_limit_exceeded"}


@pytest.mark.parametrize(
    ("last", "kind", "message"),
    [
        (event({"error": ERROR}), "rate_limit", "Rate limit reached"),
        (event({"error": "the model crashed"}), "server", "the model crashed"),
        (event({"error": {"code": 429, "message": "slow down"}}), "rate_limit", "slow down"),
        (event({"error": {"code": "502", "message": "bad"}, "choices": [{"delta": TEXT}]}), "server", "bad"),
        (
            event({"object": "error", "message": "too big", "type": "BadRequestError"}),
            "invalid_request",
            "too big",
        ),
        (
            event({"type": "error", "error": {"type": "overloaded_error", "message": "Busy"}}),
            "overloaded",
            "Busy",
        ),
        (event({"detail": "not allowed here"}), "server", "not allowed here"),
        (event({"detail": [{"loc": ["x"], "msg": "bad x", "type": "value_error"}]}), "server", "bad x"),
        (event({"code": "InvalidApiKey", "message": "No key"}), "auth", "No key"),
        (
            event([{"error": {"code": 400, "message": "m", "status": "INVALID_ARGUMENT"}}]),
            "invalid_request",
            "m",
        ),
        (event({"error": {"message": "x"}}, "error"), "server", "x"),
        (event({"message": "x"}, "error"), "server", "x"),
        (event("plain words", "error"), "server", "plain words"),
        (event("17", "error"), "server", "17"),
        (event({"choices": [{"index": 0, "error": {"message": "x", "code": 503}}]}), "overloaded", "x"),
        (chunk({"error": {"message": "x"}}), "server", "x"),
        (chunk(x_groq={"error": "over capacity"}), "overloaded", "over capacity"),
    ],
)
@pytest.mark.parametrize("ended", [False, True], ids=["open", "after the finish reason"])
def test_errors_in_all_their_shapes(*, last: bytes, kind: str, message: str, ended: bool) -> None:
    """An error fails the stream with the provider's message, also after a finish reason; the partial is kept."""
    sink = read(chunk(TEXT), *([chunk(finish="stop")] if ended else []), last, DONE)
    assert sink.ending == ("failed", "provider_error")
    assert sink.fault is not None
    assert (kind, message) == (sink.fault.kind, sink.fault.message)
    assert ("Hi", "stop" if ended else None) == (sink.snapshot.text, sink.snapshot.finish_reason)


@pytest.mark.parametrize("finish", ["error", "abort", "insufficient_system_resource"])
def test_finish_reasons_that_are_errors(finish: str) -> None:
    """A finish reason that says the provider broke off is a failure; the text with it counts."""
    sink = read(chunk(TEXT), chunk({"content": "!"}, finish=finish), DONE)
    assert (sink.ending, sink.snapshot.text) == (("failed", "provider_error"), "Hi!")
    assert sink.snapshot.finish_reason == finish


@pytest.mark.parametrize("empty", [None, "", {}, [], False])
def test_no_error_is_no_error(empty: Any) -> None:
    """An `error` that is null or empty beside choices means nothing."""
    sink = read(chunk(TEXT, error=empty), chunk(finish="stop", error=empty), DONE)
    assert (sink.ending, sink.snapshot.text) == (("completed", "stop"), "Hi")


def test_keep_alive_events() -> None:
    """Pings, empty data and objects without choices are neither text nor unreadable."""
    sink = read(
        event("now", "ping"), event({}), b"data:\n\n", b"data: \n\n", chunk(TEXT), chunk(finish="stop"), DONE
    )
    assert (sink.ending, sink.snapshot.text, sink.skipped) == (("completed", "stop"), "Hi", [])


@pytest.mark.parametrize(
    "value",
    [
        "not json",
        "123",
        "null",
        '"text"',
        '{"choices":"x"}',
        '{"choices":[1]}',
        '{"choices":[{"delta":5}]}',
        '{"choices":[{"delta":{"content":5}}]}',
        '{"choices":[{"delta":{"content":[{"type":[]}]}}]}',
        '{"choices":[{"index":true,"delta":{}}]}',
        '{"choices":[{"index":-1,"delta":{}}]}',
        f'{{"choices":[{{"index":{MAX_CHOICES},"delta":{{}}}}]}}',
        '{"choices":[{"finish_reason":5,"delta":{}}]}',
        '{"choices":[{"delta":{"tool_calls":"x"}}]}',
        '{"choices":[{"delta":{"tool_calls":[5]}}]}',
        '{"choices":[{"delta":{"tool_calls":[{"index":"x"}]}}]}',
        '{"choices":[{"delta":{"tool_calls":[{"function":"x"}]}}]}',
        json.dumps({"choices": [{"delta": {"tool_calls": [{"index": n} for n in range(MAX_CALLS + 1)]}}]}),
        "[" * 100_000,
        '{"choices":[{"delta":{"content":"lost"}},{"delta":{"content":5}}]}',
    ],
    ids=lambda value: value[:50],
)
def test_unreadable_events_change_nothing(value: str) -> None:
    """What cannot be read raises UnparseableError, and the reader goes on as if it had not come."""
    reader = OPENAI_CHAT.reader()
    with pytest.raises(UnparseableError):
        reader.read(value.encode())
    sink = read(chunk(TEXT), event(value), chunk({"content": "!"}, finish="stop"), DONE)
    assert (sink.ending, sink.snapshot.text) == (("completed", "stop"), "Hi!")
    assert [value.encode()] == sink.skipped
    assert len(sink.snapshot.choices) == 1


@pytest.mark.parametrize(
    ("data", "text"),
    [
        (b'{"choices":[{"delta":{"content":"a\\ud83db"}}]}', "a\ufffdb"),
        (b'{"choices":[{"delta":{"content":"a\xffb"}}]}', "a\ufffdb"),
        (b'{"choices":[{"delta":{"content":"x"},"logprob":NaN}]}', "x"),
        (b'\xef\xbb\xbf{"choices":[{"delta":{"content":"x"}}]}', "x"),
        (b'{"choices":[{"delta":{"content":"x"},"index":0.0}]}', "x"),
    ],
)
def test_damaged_json_is_mended(data: bytes, text: str) -> None:
    """Half a surrogate pair, broken UTF-8, NaN or a BOM cost a character at most."""
    deltas = OPENAI_CHAT.reader().read(data)
    assert [text] == [delta.text for delta in deltas]


def test_a_whole_message_repeated_at_the_end_is_not_doubled() -> None:
    """A choice that came in deltas and then whole is told once; beside a delta the message is ignored."""
    whole = {"index": 0, "message": {"content": "Hi!"}, "finish_reason": "stop"}
    sink = read(
        chunk(TEXT),
        event({"choices": [{"index": 0, "delta": {"content": "!"}, "message": {"content": "Hi!"}}]}),
        event({"choices": [whole]}),
        DONE,
    )
    assert (sink.ending, sink.snapshot.text) == (("completed", "stop"), "Hi!")


@pytest.mark.parametrize(
    "choice",
    [
        {"message": {"content": "Hello"}},
        {"delta": None, "message": {"content": "Hello"}},
        {"delta": {}, "message": {"content": "Hello"}},
        {"text": "Hello"},
        {"delta": None, "text": "Hello"},
    ],
)
@pytest.mark.parametrize(
    "before", [b"", chunk({"role": "assistant"}), chunk({"role": "assistant"}, model="m")]
)
def test_a_text_in_another_place_is_not_lost(before: bytes, choice: dict[str, Any]) -> None:
    """A message beside an empty delta, or after one that told nothing, and the text of a legacy choice, are told; once."""
    last = event({"choices": [{"index": 0, "finish_reason": "stop", **choice}]})
    sink = read(before, last, DONE)
    assert (sink.ending, sink.snapshot.text) == (("completed", "stop"), "Hello")
    if "message" in choice:
        sink = read(before, *(chunk({"content": piece}) for piece in ("He", "llo")), last, DONE)
        assert (sink.ending, sink.snapshot.text) == (("completed", "stop"), "Hello")


def test_an_sdk_reads_the_same() -> None:
    """The vendor's SDK, where it is installed, accumulates the same answer from a plain stream."""
    openai = pytest.importorskip("openai", reason="the openai SDK is only installed for benchmarks")
    from openai.types.chat import ChatCompletionChunk

    del openai
    body = [
        chunk({"role": "assistant", "content": ""}, id="c", created=1, model="m"),
        *(chunk({"content": word}, id="c", created=1, model="m") for word in ("one ", "two\u2028", "three")),
        chunk(finish="stop", id="c", created=1, model="m"),
    ]
    text = ""
    for piece in body:
        parsed = ChatCompletionChunk.model_validate_json(piece.removeprefix(b"data: "))
        text += parsed.choices[0].delta.content or ""
    assert text == read(*body, DONE).snapshot.text
