"""Whatever comes, reading neither crashes nor depends on how it was cut; generated streams come back."""

from __future__ import annotations

import itertools
import json
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from supervisor.dialects import ToolCall, UnparseableError, Usage
from supervisor.dialects.openai_chat import OPENAI_CHAT
from supervisor.dialects.replay import replay
from tests.dialects.bodies import DONE, chunk, event, read

FIELDS = st.sampled_from(
    [
        "choices",
        "delta",
        "message",
        "content",
        "reasoning",
        "reasoning_content",
        "reasoning_details",
        "tool_calls",
        "function",
        "function_call",
        "name",
        "arguments",
        "index",
        "id",
        "finish_reason",
        "usage",
        "prompt_tokens",
        "completion_tokens",
        "error",
        "errors",
        "code",
        "type",
        "detail",
        "object",
        "x_groq",
        "text",
        "thinking",
        "refusal",
        "model",
        "status",
    ]
)
SCALARS = (
    st.none()
    | st.booleans()
    | st.integers(-2, 3)
    | st.integers()
    | st.floats()
    | st.sampled_from(["", "stop", "error", "null", "text", "thinking", "[DONE]", "{}"])
    | st.text(max_size=5)
)
JSON = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(FIELDS, inner, max_size=5),
    max_leaves=20,
)
DELTAS = st.dictionaries(FIELDS, JSON, max_size=4)
CHUNKS = JSON | st.builds(
    lambda choices, extra: {**extra, "choices": choices},
    st.lists(
        st.builds(
            lambda delta, extra: {**extra, "delta": delta},
            DELTAS,
            st.dictionaries(FIELDS, SCALARS, max_size=2),
        ),
        max_size=3,
    ),
    st.dictionaries(FIELDS, JSON, max_size=2),
)
FRAGMENTS = st.sampled_from(
    [
        *(
            b"data: ",
            b"data:",
            b"event: error\n",
            b"\n",
            b"\r",
            b"\r\n",
            b"\n\n",
            b": c\n",
            b"error: x\n",
            b"[DONE]",
        ),
        *(
            b'{"error":"x"}',
            b'{"choices":[',
            b"]}",
            b'{"delta":{"content":"a"}}',
            b'{"finish_reason":"stop"}',
            b"<p>",
        ),
        *(
            chunk({"content": "é"}),
            chunk(finish="stop"),
            DONE,
            b"\xef\xbb\xbf",
            b"\xff",
            b"id: 1\n",
            b"retry: 2\n",
        ),
    ]
)
BODIES = st.lists(FRAGMENTS | st.binary(max_size=8), max_size=25).map(b"".join)


@settings(deadline=None)  # a test asserts no time
@given(st.lists(CHUNKS, max_size=6), st.sampled_from(["message", "error", "ping", "other"]))
def test_any_json_is_read_or_refused(values: list[Any], name: str) -> None:
    """A reader raises UnparseableError or nothing, and its deltas can be folded and encoded."""
    reader = OPENAI_CHAT.reader()
    for value in values:
        try:
            deltas = reader.read(json.dumps(value).encode(), name)
        except UnparseableError:
            continue
        assert all(delta.fault is None or delta.fault.message for delta in deltas)
    reader.ending()
    read(*(event(value) for value in values), max_unparseable=100)


@settings(deadline=None)  # a test asserts no time
@given(BODIES, st.lists(st.integers(0, 200), max_size=6))
def test_any_bytes_end_the_same_under_every_split(body: bytes, cuts: list[int]) -> None:
    """Arbitrary bytes end in one way, the same whole, byte by byte and cut anywhere."""
    bounds = [0, *sorted(min(cut, len(body)) for cut in cuts), len(body)]
    whole = replay("openai-chat", body)
    assert whole.state in {"completed", "failed"}
    bytewise = replay("openai-chat", body, chunk=1)
    pieces = replay("openai-chat", [body[a:b] for a, b in itertools.pairwise(bounds)])
    assert whole == bytewise == pieces


WORDS = st.text(st.characters(exclude_categories=["Cs"]), max_size=6)
ARGUMENTS = st.dictionaries(WORDS, WORDS | st.integers(), max_size=3).map(json.dumps)


@settings(deadline=None)  # a test asserts no time
@given(
    st.lists(
        st.tuples(st.integers(0, 2), st.sampled_from(["content", "reasoning", "refusal"]), WORDS), max_size=20
    ),
    st.lists(st.tuples(WORDS.filter(bool), ARGUMENTS), max_size=3),
    st.none() | st.tuples(st.integers(0, 10**9), st.integers(0, 10**9)),
    st.sampled_from([b"", DONE]),
    st.integers(1, 5),
)
def test_a_generated_stream_comes_back(
    pieces: list[tuple[int, str, str]],
    calls: list[tuple[str, str]],
    usage: tuple[int, int] | None,
    marker: bytes,
    size: int,
) -> None:
    """Text of several choices, tool calls in pieces, usage and finish reasons are read as they were written."""
    body = [chunk({"role": "assistant", "content": ""})]
    told: dict[tuple[int, str], str] = {}
    for index, field, text in pieces:
        body.append(chunk({field: text}, index=index))
        told[index, field] = told.get((index, field), "") + text
    for index, (name, arguments) in enumerate(calls):
        head = {
            "index": index,
            "id": f"call_{index}",
            "type": "function",
            "function": {"name": name, "arguments": ""},
        }
        body.append(chunk({"tool_calls": [head]}))
        for at in range(0, len(arguments), size):
            piece = {"index": index, "function": {"arguments": arguments[at : at + size]}}
            body.append(chunk({"tool_calls": [piece]}))
    indexes = sorted({0, *(index for index, _, _ in pieces)})
    body += [chunk(index=index, finish="stop") for index in indexes]
    if usage is not None:
        body.append(
            event({"choices": [], "usage": {"prompt_tokens": usage[0], "completion_tokens": usage[1]}})
        )
    sink = read(*body, marker, clean=bool(marker))
    assert sink.ending == ("completed", "stop")
    snapshot = sink.snapshot
    assert indexes == [choice.index for choice in snapshot.choices]
    for choice in snapshot.choices:
        assert told.get((choice.index, "content"), "") == choice.text
        assert told.get((choice.index, "reasoning"), "") == choice.reasoning
        assert told.get((choice.index, "refusal"), "") == choice.refusal
    assert tuple(ToolCall(f"call_{n}", *call) for n, call in enumerate(calls)) == snapshot.tool_calls
    assert (None if usage is None else Usage(*usage)) == snapshot.usage
    assert not sink.skipped
