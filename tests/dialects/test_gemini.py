"""What Gemini's two APIs send, in both framings, one statement a test."""

from __future__ import annotations

import json
from typing import Any

import attrs
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from supervisor.dialects import Dialect, ToolCall, UnparseableError, Usage
from supervisor.dialects.gemini import GEMINI, GEMINI_JSONARRAY, MAX_CALLS_IN_ALL, MAX_CANDIDATES
from supervisor.dialects.partial_arguments import MAX_KEPT_BYTES
from supervisor.dialects.reading import BodyReader
from supervisor.dialects.tool_calls import MAX_CALLS
from supervisor.errors import ConfigurationError
from tests.dialects.answers import CUTS, WORDS, folded, odd_json, read, read_cut, refused, survives, tell
from tests.dialects.bodies import RecordingSink, event

TEXT = {"text": "Hi"}


def chunk(*parts: Any, finish: Any = None, index: Any = None, **fields: Any) -> dict[str, Any]:
    """Return a chunk with one candidate."""
    candidate: dict[str, Any] = {"content": {"role": "model", "parts": list(parts)}}
    if finish is not None:
        candidate["finishReason"] = finish
    if index is not None:
        candidate["index"] = index
    return {"candidates": [candidate], **fields}


def call(**fields: Any) -> dict[str, Any]:
    """Return a part with a function call."""
    return {"functionCall": fields}


def partial(path: str, value: Any, *, more: bool = False, call_goes_on: bool = True) -> dict[str, Any]:
    """Return a part with one streamed argument."""
    kind = {str: "stringValue", bool: "boolValue", int: "numberValue", float: "numberValue"}.get(type(value))
    argument = {"jsonPath": path, **({kind: value} if kind else {"nullValue": "NULL_VALUE"})}
    if more:
        argument["willContinue"] = True
    return call(partialArgs=[argument], **({"willContinue": True} if call_goes_on else {}))


def calls(*chunks: Any) -> list[tuple[str, str, str]]:
    """Return the calls of an answer as (id, name, arguments)."""
    told = folded(tell(GEMINI.reader(), *chunks)).tool_calls
    return [(one.id, one.name, one.arguments) for one in told]


# --- what is said ---


def test_text_and_thoughts() -> None:
    """Text is text, and reasoning where the part is a thought; both may be in one list of parts."""
    sink = read(
        GEMINI,
        event(chunk({"text": "hm", "thought": True}, {"text": "a"}, {"text": "b", "thoughtSignature": "x"})),
        event(chunk({"text": ""}, {"text": "c", "thought": False}, finish="STOP")),
    )
    assert (sink.snapshot.text, sink.snapshot.reasoning) == ("abc", "hm")
    assert sink.ending == ("completed", "STOP")


@pytest.mark.parametrize(
    "part",
    [
        {"executableCode": {"language": "PYTHON", "code": "1"}},
        {"codeExecutionResult": {"outcome": "OUTCOME_OK", "output": "1"}},
        {"inlineData": {"mimeType": "image/png", "data": "AA=="}},
        {"fileData": {"fileUri": "gs://x"}},
        {"thoughtSignature": "x"},
        {},
    ],
)
def test_other_parts_are_not_text(part: dict[str, Any]) -> None:
    """Code, its result, data and signatures are kept as events only."""
    sink = read(GEMINI, event(chunk(part)), event(chunk(TEXT, finish="STOP")))
    assert (sink.snapshot.text, len(sink.payloads)) == ("Hi", 2)


def test_candidates_by_index() -> None:
    """Each candidate is its own choice, and the answer has ended when all of them have."""
    reader = GEMINI.reader()
    deltas = tell(reader, chunk({"text": "a"}, index=0), chunk({"text": "b"}, index=1, finish="MAX_TOKENS"))
    assert reader.ending() is None
    deltas += tell(reader, chunk({"text": "c"}, finish="STOP"))
    assert reader.ending() == "STOP"
    assert [(one.index, one.text, one.finish_reason) for one in folded(deltas).choices] == [
        (0, "ac", "STOP"),
        (1, "b", "MAX_TOKENS"),
    ]


def test_usage_is_a_running_total() -> None:
    """The last count of each kind stands, also where a later chunk leaves it out; the traffic type is no count."""
    reader = GEMINI.reader()
    deltas = tell(
        reader,
        chunk(TEXT, usageMetadata={"trafficType": "ON_DEMAND"}),
        chunk(
            TEXT, usageMetadata={"promptTokenCount": 9, "cachedContentTokenCount": 4, "totalTokenCount": 9}
        ),
        chunk(
            TEXT, usageMetadata={"promptTokenCount": 9, "candidatesTokenCount": 2, "thoughtsTokenCount": 5}
        ),
        {"usageMetadata": {"promptTokenCount": 9, "candidatesTokenCount": 3.0}},
        {"usageMetadata": {"promptTokenCount": True, "candidatesTokenCount": "3"}},
    )
    assert [delta.usage for delta in deltas] == [
        None,
        Usage(9, cached=4),
        Usage(9, 2, 5, 4),
        Usage(9, 3, 5, 4),
    ]


def test_model_and_id_are_told_once() -> None:
    """`modelVersion` and `responseId` are on every chunk; too long ones are none."""
    names = {"modelVersion": "gemini-x", "responseId": "r"}
    deltas = tell(GEMINI.reader(), chunk(TEXT, **names), chunk(TEXT, **names), names)
    assert [(delta.model, delta.response_id) for delta in deltas] == [("gemini-x", "r"), (None, None)]
    assert tell(GEMINI.reader(), {**chunk(), "modelVersion": "m" * 999}) == []


@pytest.mark.parametrize(
    "later",
    [
        chunk({"text": "b"}),
        chunk({"text": "b", "thought": True}),
        chunk({"text": "b"}, index=1),
        chunk({"text": "b"}, finish="SAFETY"),
        chunk({"text": "b"}, {"text": "c", "thought": True}),
        chunk({"text": "b", "functionCall": {"name": "f"}}),
        chunk({"text": ""}),
        chunk({"text": "b"}, responseId="r"),
        chunk({"text": "b"}, usageMetadata={"promptTokenCount": 4}),
        chunk({"text": "b"}, usageMetadata={"trafficType": "X"}),
        {"candidates": [{}]},
        {"candidates": [{"content": {"parts": []}}]},
    ],
)
@pytest.mark.parametrize(
    "first", [chunk({"text": "a"}), chunk({"text": "a"}, index=2, finish="STOP"), {"usageMetadata": {}}]
)
def test_the_shortest_way_says_the_same(first: dict[str, Any], later: dict[str, Any]) -> None:
    """Once the model is known most events are read on a shorter way, and mean what they would without it."""
    short, long = GEMINI.reader(), GEMINI.reader()
    told = tell(short, {**first, "modelVersion": "m"}, later, later)
    expected = tell(long, first, later, later)
    assert attrs.evolve(folded(told), model=None) == folded(expected)
    assert short.ending() == long.ending()


# --- function calls ---


def test_whole_calls() -> None:
    """Several in one list of parts, with and without arguments and ids, each its own, also with the same name."""
    assert calls(
        chunk(
            call(name="f", args={"a": [1, "é"], "b": {}}),
            call(name="f", args={}, id="x"),
            call(name="f"),
            call(name="g", args=None, id="y"),
        ),
        chunk(call(name="g", args={"z": 1e3})),
    ) == [
        ("", "f", '{"a":[1,"é"],"b":{}}'),
        ("x", "f", "{}"),
        ("", "f", "{}"),
        ("y", "g", "{}"),
        ("", "g", '{"z":1000.0}'),
    ]


def test_arguments_as_text() -> None:
    """A proxy that sends the arguments as text is believed."""
    assert calls(chunk(call(name="f", args='{"a":1}'))) == [("", "f", '{"a":1}')]


def test_streamed_arguments() -> None:
    """Arguments that come piece by piece are written as they come, and closed with the call."""
    reader = GEMINI.reader()
    deltas = tell(
        reader,
        chunk(call(name="f", id="c1", willContinue=True)),
        chunk(partial("$.list[0].name", "App", more=True)),
        chunk(partial("$.list[0].name", "le")),
        chunk(call(willContinue=True)),
        chunk(partial("$.list[1].n", 2), partial("$.ok", True)),
        chunk(partial("$.none", None)),
        chunk(call()),
        chunk(finish="STOP"),
    )
    pieces = [piece for delta in deltas for piece in delta.tool_calls]
    assert [(piece.index, piece.id, piece.name, piece.arguments) for piece in pieces] == [
        (0, "c1", "f", ""),
        (0, "", "", '{"list":[{"name":"App'),
        (0, "", "", 'le"'),
        (0, "", "", '},{"n":2'),
        (0, "", "", '}],"ok":true'),
        (0, "", "", ',"none":null'),
        (0, "", "", "}"),
    ]


def test_streamed_calls_one_after_another() -> None:
    """A call ends with a part that does not go on, with the next name, or with the answer's good end."""
    assert calls(
        chunk(call(name="f", willContinue=True)),
        chunk(partial("$.a", "x", call_goes_on=False)),
        chunk(call()),  # the end of a call that has ended
        chunk(call(name="f", willContinue=True)),
        chunk(partial("$.a", "y")),
        chunk(call(name="g", willContinue=True), partial("$.b", 1)),
        chunk({"text": ""}, finish="STOP"),
    ) == [("", "f", '{"a":"x"}'), ("", "f", '{"a":"y"}'), ("", "g", '{"b":1}')]


def test_a_call_that_is_cut_off_stays_open() -> None:
    """Where the limit of tokens ended the answer, a call that was to go on is not made to look whole."""
    assert calls(
        chunk(call(name="f", willContinue=True)),
        chunk(partial("$.a", "x", more=True)),
        chunk(finish="MAX_TOKENS"),
    ) == [("", "f", '{"a":"x')]


def test_names_and_ids_repeated_with_each_piece() -> None:
    """Pieces with the id of the open call are its own, whatever else they repeat."""
    piece = {"name": "f", "id": "c", "willContinue": True}
    assert calls(
        chunk(call(**piece)),
        chunk(call(**piece, partialArgs=[{"jsonPath": "$.a", "stringValue": "x", "willContinue": True}])),
        chunk(call(**piece, partialArgs=[{"jsonPath": "$.a", "stringValue": "y"}])),
        chunk(call(name="f", id="c")),
    ) == [("c", "f", '{"a":"xy"}')]


def test_arguments_whole_after_the_name() -> None:
    """Arguments that come whole in a later piece are taken; after streamed ones they are a repetition."""
    assert calls(
        chunk(call(name="f", willContinue=True)),
        chunk(call(args={"a": 1}, willContinue=True)),
        chunk(call()),
        chunk(call(name="g", willContinue=True)),
        chunk(partial("$.a", 1)),
        chunk(call(args={"a": 1})),
    ) == [("", "f", '{"a":1}'), ("", "g", '{"a":1}')]


def test_arguments_without_a_value_mean_nothing() -> None:
    """A path alone, and an empty path, say nothing."""
    nothing = call(name="f", partialArgs=[{"jsonPath": "$.a"}, {"jsonPath": "$.", "stringValue": "x"}])
    assert calls(chunk(nothing)) == [("", "f", "{}")]


# --- endings ---


def test_a_finish_reason_on_every_chunk() -> None:
    """Older models say STOP with each chunk; the last reason is the answer's, and only the body's end ends it."""
    chunks = [
        chunk({"text": "a"}, finish="STOP"),
        chunk({"text": "b"}, finish="STOP"),
        {"candidates": [{"finishReason": "RECITATION"}]},
    ]
    sink = read(GEMINI, *map(event, chunks))
    assert (sink.snapshot.text, sink.ending) == ("ab", ("completed", "RECITATION"))


@pytest.mark.parametrize("reason", ["STOP", "MAX_TOKENS", "SAFETY", "MALFORMED_FUNCTION_CALL", "A_NEW_ONE"])
@pytest.mark.parametrize("clean", [True, False])
def test_any_finish_reason_ends(reason: str, clean: bool) -> None:
    """Any reason, known or not, ends the answer, and usage may follow. But STOP may come with each chunk: only a clean end is one."""
    after = {"usageMetadata": {"promptTokenCount": 1, "candidatesTokenCount": 2}}
    sink = read(GEMINI, event(chunk(TEXT, finish=reason)), event(after), clean=clean)
    assert sink.ending == (("completed", reason) if clean else ("failed", "truncated"))
    assert sink.snapshot.usage == Usage(1, 2)


@pytest.mark.parametrize("dialect", [GEMINI, GEMINI_JSONARRAY])
@pytest.mark.parametrize("clean", [True, False])
def test_an_event_that_was_cut_off_undoes_the_finish_reason(dialect: Dialect, clean: bool) -> None:
    """Where STOP comes with each chunk it ends nothing: what was begun after it shows that there was more of the answer."""
    one, two = (json.dumps(chunk({"text": text}, finish="STOP")) for text in "ab")
    for cut in (1, len(two) // 2, len(two) - 1):
        body = f"data: {one}\n\ndata: {two[:cut]}" if dialect is GEMINI else f"[{one}\n,\r\n{two[:cut]}"
        sink = read(dialect, body.encode(), clean=clean)
        assert (sink.snapshot.text, sink.ending) == ("a", ("failed", "truncated"))
    for body in (f"data: {one}\n\n: ali", f"data: {one}\n\n", f"{one}\n", f"[{one}"):
        ended = ("completed", "STOP") if clean else ("failed", "truncated")
        assert read(dialect, body.encode(), clean=clean).ending == ended
    if dialect is GEMINI:
        more = event(chunk({"text": "b"}))
        assert read(GEMINI, f"data: {one}\n\n".encode(), more.rstrip(), clean=clean).ending == (
            "failed",
            "truncated",
        )
        usage = event({"usageMetadata": {"promptTokenCount": 1}})
        assert read(GEMINI, f"data: {one}\n\n".encode(), usage.rstrip()).ending == ("completed", "STOP")


def test_a_finish_reason_that_may_come_with_each_chunk_is_no_mark() -> None:
    """A stream that stalls after it has not ended as far as seen: a clock that runs out then has nothing to complete."""
    sink = RecordingSink()
    reader = BodyReader(GEMINI, sink)
    reader.feed(event(chunk(TEXT, finish="STOP")))
    assert sink.marks == []


@pytest.mark.parametrize("reason", [None, "", "FINISH_REASON_UNSPECIFIED", 0])
def test_no_finish_reason_is_a_truncation(reason: Any) -> None:
    """Without a reason, or with the one that says none, the body's end cut the answer off."""
    assert read(GEMINI, event(chunk(TEXT, finish=reason))).ending == ("failed", "truncated")


@pytest.mark.parametrize("end", ["", "\n"])
def test_a_last_event_without_its_empty_line(end: str) -> None:
    """There is no end marker, so the finish reason in it is believed, if the body ended cleanly and its JSON is whole."""
    last = event(chunk({"text": "!"}, finish="STOP")).rstrip() + end.encode()
    assert read(GEMINI, event(chunk(TEXT)), last).ending == ("completed", "STOP")
    assert read(GEMINI, event(chunk(TEXT)), last).snapshot.text == "Hi!"
    assert read(GEMINI, event(chunk(TEXT)), last, clean=False).ending == ("failed", "truncated")
    assert read(GEMINI, event(chunk(TEXT)), last[:-3]).ending == ("failed", "truncated")
    assert read(GEMINI, event(chunk(TEXT)), event(chunk(TEXT)).rstrip()).snapshot.text == "Hi"


def test_done_from_a_proxy() -> None:
    """`[DONE]` is not Google's; where a proxy puts it, it ends the answer."""
    assert read(GEMINI, event(chunk(TEXT, finish="STOP")), event("[DONE]")).ending == ("completed", "STOP")


# --- errors ---


@pytest.mark.parametrize("before", [[], [chunk(TEXT)], [chunk(TEXT, finish="STOP")]])
@pytest.mark.parametrize("wrap", [lambda error: error, lambda error: [error]])
def test_errors_in_the_stream(before: list[Any], wrap: Any) -> None:
    """An error, alone or in an array, fails the stream with Google's message, also after a finish reason."""
    error = {"error": {"code": 503, "message": "The model is overloaded.", "status": "UNAVAILABLE"}}
    sink = read(GEMINI, *map(event, before), event(wrap(error)))
    assert sink.ending == ("failed", "provider_error")
    assert sink.fault is not None
    assert (sink.fault.kind, sink.fault.message, sink.fault.temporary) == (
        "overloaded",
        "The model is overloaded.",
        True,
    )


def test_an_error_beside_candidates() -> None:
    """An error in a chunk is that error and nothing else."""
    (delta,) = tell(GEMINI.reader(), chunk(TEXT, error={"code": 500, "message": "no", "status": "INTERNAL"}))
    assert delta.fault is not None
    assert (delta.fault.message, delta.text) == ("no", "")


def test_an_event_named_error() -> None:
    """Whatever an event named `error` has, it is one."""
    for data in (b'{"message": "down"}', b"down"):
        (delta,) = GEMINI.reader().read(data, "error")
        assert delta.fault is not None
        assert delta.fault.message == "down"


@pytest.mark.parametrize("dialect", [GEMINI, GEMINI_JSONARRAY])
@pytest.mark.parametrize("indent", [None, 2])
def test_an_error_in_place_of_a_stream(dialect: Dialect, indent: int | None) -> None:
    """A bare JSON error, as an object or in an array, is what the stream failed of."""
    error = {"error": {"code": 400, "message": "API key not valid.", "status": "INVALID_ARGUMENT"}}
    for body in (error, [error]):
        sink = read(dialect, json.dumps(body, indent=indent).encode())
        assert sink.ending == ("failed", "provider_error")
        assert sink.fault is not None
        assert sink.fault.message == "API key not valid."


@pytest.mark.parametrize(
    ("feedback", "message"),
    [
        ({"blockReason": "SAFETY"}, "the prompt was blocked (blockReason: SAFETY)"),
        ({"blockReason": "OTHER", "blockReasonMessage": "Reasons"}, "Reasons"),
    ],
)
def test_a_blocked_prompt(feedback: dict[str, Any], message: str) -> None:
    """A prompt that is refused is an error of its own kind, and what it cost is kept; so is what came before."""
    blocked = {"promptFeedback": feedback, "usageMetadata": {"promptTokenCount": 9}}
    for before in ([], [chunk(TEXT)]):
        sink = read(GEMINI, *map(event, before), event(blocked))
        assert sink.ending == ("failed", "provider_error")
        assert sink.fault is not None
        assert (sink.fault.kind, sink.fault.message) == ("content_filter", message)
        assert (sink.fault.code, sink.fault.temporary) == (feedback["blockReason"], False)
        assert (sink.snapshot.usage, sink.snapshot.text) == (Usage(9), "Hi" if before else "")


@pytest.mark.parametrize(
    "feedback", [{}, {"safetyRatings": []}, {"blockReason": "BLOCK_REASON_UNSPECIFIED"}, None]
)
def test_feedback_that_blocks_nothing(feedback: Any) -> None:
    """Ratings of the prompt are not a refusal."""
    sink = read(
        GEMINI,
        event({"promptFeedback": feedback}),
        event(chunk(TEXT, finish="STOP", promptFeedback=feedback)),
    )
    assert sink.ending == ("completed", "STOP")


def test_what_google_says_in_details() -> None:
    """The reason of an error tells its kind, and a retry delay makes it temporary, whatever the message speaks of."""
    details = [
        {"@type": "type.googleapis.com/google.rpc.QuotaFailure", "violations": []},
        {"@type": "type.googleapis.com/google.rpc.RetryInfo", "retryDelay": "34.5s"},
    ]
    message = "You exceeded your current quota, please check your plan and billing details."
    limited = {"error": {"code": 429, "message": message, "status": "RESOURCE_EXHAUSTED", "details": details}}
    for body in (limited, [limited]):
        fault = GEMINI.fault(429, json.dumps(body).encode())
        assert (fault.kind, fault.temporary, fault.retry_after_s) == ("rate_limit", True, 34.5)
        assert (fault.message, fault.status) == (message, 429)
    del limited["error"]["details"]
    assert not GEMINI.fault(429, json.dumps(limited).encode()).temporary
    invalid = {
        "error": {
            "code": 400,
            "message": "Not valid.",
            "status": "INVALID_ARGUMENT",
            "details": [{"reason": "API_KEY_INVALID"}, None, {"retryDelay": "soon"}],
        }
    }
    assert GEMINI.fault(400, json.dumps(invalid).encode()).kind == "auth"
    assert GEMINI.fault(502, b"<title>Bad gateway</title>").message == "Bad gateway"


# --- what is not quite Gemini ---


def test_odd_envelopes() -> None:
    """Chunks in a `response`, a whole array as one event, keep-alives, and objects that say nothing."""
    sink = read(
        GEMINI,
        event({"response": chunk({"text": "a"}), "traceId": "t"}),
        event([chunk({"text": "b"}), chunk({"text": "c"}, finish="STOP", index="0")]),
        event({"this": [{"is": "not"}]}),
        event("  "),
        event([]),
        event({"candidates": []}),
        event({"candidates": [{"content": {"missing-parts": True}}]}),
        event(b"\xef\xbb\xbf".decode() + json.dumps(chunk({"text": "d"}))),
    )
    assert (sink.snapshot.text, sink.skipped, sink.ending) == ("abcd", [], ("completed", "STOP"))


@pytest.mark.parametrize(
    "value",
    [
        chunk(index=-1),
        chunk(index=MAX_CANDIDATES),
        chunk(index="x"),
        chunk({"text": 5}),
        chunk({"functionCall": "f"}),
        chunk(call(name=["f"])),
        chunk(call(name="f", partialArgs=[{"stringValue": "x"}])),
        chunk(call(name="f", partialArgs=[{"jsonPath": "$.*", "stringValue": "x"}])),
        chunk(call(name="f", partialArgs=[{"jsonPath": "$.a", "numberValue": [1]}])),
        chunk(*[call(name="f")] * (MAX_CALLS + 1)),
        {"candidates": "x"},
        {"candidates": [5]},
        [chunk(TEXT), chunk(index=-1)],
        5,
        "text",
        b"{",
        b"[" * 100_000,
    ],
)
def test_what_cannot_be_read_changes_nothing(value: Any) -> None:
    """Such an event is refused whole, and the reader goes on as if it had not come."""
    reader, other = GEMINI.reader(), GEMINI.reader()
    start = chunk({"text": "a"}, call(name="g", willContinue=True))
    rest = [chunk(partial("$.a", "x")), chunk({"text": "b"}, finish="STOP", modelVersion="m")]
    expected = tell(other, start, *rest)
    told = tell(reader, start)
    assert refused(reader, value)
    assert expected == told + tell(reader, *rest)


def test_calls_are_bounded() -> None:
    """Neither one candidate nor all together can have calls without end, told whole or streamed."""
    reader = GEMINI.reader()
    for index in range(MAX_CALLS_IN_ALL // MAX_CALLS):
        tell(reader, chunk(*[call(name="f", willContinue=True)] * MAX_CALLS, index=index))
        assert "one candidate" in refused(reader, chunk(call(name="f"), index=index))
        assert tell(reader, chunk(partial("$.a", 1), index=index))
    assert "all candidates" in refused(reader, chunk(call(name="f"), index=9))


def test_streamed_arguments_are_bounded() -> None:
    """What is kept of streamed arguments has a limit for the response, over all of its calls."""
    reader = GEMINI.reader()
    piece = "x" * (MAX_KEPT_BYTES // 8)
    with pytest.raises(UnparseableError, match="streamed arguments"):
        for number in range(9):
            tell(reader, chunk(call(name="f", willContinue=True), partial("$.a", piece), index=number))
    assert number > 5


# --- asking ---


def test_the_model_is_in_the_path() -> None:
    """The request's model goes from the body into the path, and nothing says that it is to be a stream."""
    assert GEMINI.asking.first is not None
    assert GEMINI_JSONARRAY.asking.first is not None
    request = {"model": "models/gemini-2.5-flash", "contents": [], "stream": True}
    call_ = GEMINI.asking.first(request, GEMINI.asking.path or "")
    assert (call_.method, call_.path) == ("POST", "/models/gemini-2.5-flash:streamGenerateContent?alt=sse")
    assert call_.body == {"contents": []}
    assert request == {"model": "models/gemini-2.5-flash", "contents": [], "stream": True}
    other = GEMINI_JSONARRAY.asking.first({"model": "g", "contents": []}, GEMINI_JSONARRAY.asking.path or "")
    assert other.path == "/models/g:streamGenerateContent"
    vertex = "/projects/p/locations/l/publishers/google/models/{model}:streamGenerateContent?alt=sse"
    assert GEMINI.asking.first({"model": "g"}, vertex).path == vertex.replace("{model}", "g")


def test_a_path_of_the_upstream_is_used_as_it_is() -> None:
    """A path that names a model needs none in the request, and one there is not sent."""
    assert GEMINI.asking.first is not None
    requests: list[dict[str, Any]] = [{"contents": []}, {"contents": [], "model": "?"}]
    for request in requests:
        told = GEMINI.asking.first(request, "/models/x:streamGenerateContent?alt=sse")
        assert (told.path, told.body) == ("/models/x:streamGenerateContent?alt=sse", {"contents": []})


@pytest.mark.parametrize(
    "model", [None, "", 5, "a/b", "models/", "../x", "x?y", "x:y", "models/a b", "tunedModels/x", "é"]
)
def test_a_model_that_is_no_plain_name(model: Any) -> None:
    """What could change the address is refused, and named."""
    assert GEMINI.asking.first is not None
    with pytest.raises(ConfigurationError, match=r"request\.model"):
        GEMINI.asking.first({"model": model}, GEMINI.asking.path or "")


def test_a_request_that_is_to_be_no_stream() -> None:
    """`"stream": false` is refused."""
    assert GEMINI.asking.first is not None
    with pytest.raises(ConfigurationError, match=r"request\.stream"):
        GEMINI.asking.first({"model": "g", "stream": False}, GEMINI.asking.path or "")


def test_what_is_declared() -> None:
    """There is no marker, no promise that an abort saves anything, and no documented way to go on from a text."""
    for dialect, framing in ((GEMINI, "sse"), (GEMINI_JSONARRAY, "json-array")):
        assert dialect.framing == framing
        assert (dialect.endings.markers, dialect.stop, dialect.abort_stops_billing) == ((), "drain", None)
        assert dialect.asking.continuation is None


# --- anything at all ---

ODD = odd_json(
    *(
        "candidates",
        "content",
        "parts",
        "text",
        "thought",
        "functionCall",
        "name",
        "id",
        "args",
        "partialArgs",
    ),
    *(
        "jsonPath",
        "stringValue",
        "numberValue",
        "boolValue",
        "nullValue",
        "willContinue",
        "index",
        "finishReason",
    ),
    *(
        "usageMetadata",
        "promptTokenCount",
        "promptFeedback",
        "blockReason",
        "error",
        "message",
        "code",
        "details",
    ),
    *("retryDelay", "response", "modelVersion"),
)
CHUNKS = (
    ODD
    | st.lists(ODD, max_size=3).map(lambda parts: chunk(*parts))
    | st.builds(
        lambda arguments, fields: chunk({"functionCall": {**fields, "partialArgs": arguments}}),
        st.lists(
            st.fixed_dictionaries(
                {"jsonPath": st.sampled_from(["$.a", "$.a[1].b", "$.b", "$.a.c"])},
                optional={"stringValue": WORDS, "numberValue": st.floats(), "willContinue": st.booleans()},
            ),
            max_size=4,
        ),
        st.fixed_dictionaries({}, optional={"name": WORDS, "id": WORDS, "willContinue": st.booleans()}),
    )
)


@settings(deadline=None)  # a test asserts no time
@given(st.lists(CHUNKS, max_size=6), st.sampled_from(["message", "error", "other"]))
def test_any_json_is_read_or_refused(values: list[Any], name: str) -> None:
    """A reader raises UnparseableError or nothing."""
    survives(GEMINI, values, name)


CALLS = st.lists(
    st.tuples(
        WORDS.filter(bool),
        st.dictionaries(WORDS.filter(bool), WORDS | st.integers(-9, 9) | st.none(), max_size=3),
        st.booleans(),
    ),
    max_size=3,
)


@settings(deadline=None)  # a test asserts no time
@given(
    st.lists(st.tuples(st.integers(0, 2), st.booleans(), WORDS), max_size=12),
    CALLS,
    st.none() | st.tuples(st.integers(0, 10**9), st.integers(0, 10**9), st.integers(0, 10**9)),
    st.sampled_from([GEMINI, GEMINI_JSONARRAY]),
    CUTS,
)
def test_a_generated_stream_comes_back(
    pieces: list[tuple[int, bool, str]],
    told_calls: list[tuple[str, dict[str, Any], bool]],
    usage: tuple[int, int, int] | None,
    dialect: Dialect,
    cuts: list[int],
) -> None:
    """Text and thoughts of several candidates, calls whole and streamed, and usage are read as they were written."""
    chunks = []
    said: dict[tuple[int, bool], str] = {}
    for index, thought, text in pieces:
        chunks.append(chunk({"text": text, **({"thought": True} if thought else {})}, index=index))
        said[index, thought] = said.get((index, thought), "") + text
    for name, arguments, streamed in told_calls:
        if not streamed:
            chunks.append(chunk(call(name=name, args=arguments)))
            continue
        chunks.append(chunk(call(name=name, willContinue=True)))
        for key, value in arguments.items():
            path = f"$[{json.dumps(key)}]"
            if isinstance(value, str):
                chunks += [chunk(partial(path, value[:2], more=True)), chunk(partial(path, value[2:]))]
            else:
                chunks.append(chunk(partial(path, value)))
        chunks.append(chunk(call()))
    indexes = sorted({0, *(index for index, _, _ in pieces)})
    chunks += [chunk(index=index, finish="STOP") for index in indexes]
    if usage is not None:
        names = ("promptTokenCount", "candidatesTokenCount", "thoughtsTokenCount")
        chunks[-1]["usageMetadata"] = dict(zip(names, usage, strict=True))
    body = (
        json.dumps(chunks, indent=1).encode() if dialect is GEMINI_JSONARRAY else b"".join(map(event, chunks))
    )
    sink = read_cut(dialect, body, cuts)
    assert sink.ending == ("completed", "STOP")
    snapshot = sink.snapshot
    assert indexes == [choice.index for choice in snapshot.choices]
    for choice in snapshot.choices:
        assert said.get((choice.index, False), "") == choice.text
        assert said.get((choice.index, True), "") == choice.reasoning
    assert [ToolCall("", one.name, "") for one in snapshot.tool_calls] == [
        ToolCall("", name, "") for name, _, _ in told_calls
    ]
    assert [json.loads(one.arguments) for one in snapshot.tool_calls] == [
        arguments for _, arguments, _ in told_calls
    ]
    assert (None if usage is None else Usage(*usage)) == snapshot.usage
    assert not sink.skipped
