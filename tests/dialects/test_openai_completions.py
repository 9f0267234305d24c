"""What OpenAI's legacy completions and their imitations send, one statement a test."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from supervisor.dialects import Usage
from supervisor.dialects.openai_chunks import MAX_CHOICES
from supervisor.dialects.openai_completions import OPENAI_COMPLETIONS
from tests.dialects.answers import CUTS, WORDS, folded, odd_json, read, read_cut, refused, survives, tell
from tests.dialects.bodies import DONE, event


def choice(text: Any = "", *, index: Any = 0, finish: Any = None, **fields: Any) -> dict[str, Any]:
    """Return a choice."""
    return {"text": text, "index": index, "logprobs": None, "finish_reason": finish, **fields}


def chunk(*choices: Any, **fields: Any) -> dict[str, Any]:
    """Return a chunk with these choices."""
    return {"id": "cmpl-1", "object": "text_completion", "model": "m", "choices": list(choices), **fields}


def test_an_answer() -> None:
    """Text, finish reason, usage in a chunk of its own, and the end marker; log probabilities are not text."""
    logprobs = {"tokens": ["b"], "token_logprobs": [-0.1], "text_offset": [1]}
    sink = read(
        OPENAI_COMPLETIONS,
        event(chunk(choice("a"))),
        event(chunk(choice("b", logprobs=logprobs, stop_reason=None), usage=None)),
        event(chunk(choice("c"))),
        event(chunk(choice("", finish="length"))),
        event(chunk(usage={"prompt_tokens": 3, "completion_tokens": 2, "total_tokens": 5})),
        DONE,
    )
    assert (sink.snapshot.text, sink.snapshot.usage) == ("abc", Usage(3, 2))
    assert (sink.snapshot.model, sink.snapshot.response_id) == ("m", "cmpl-1")
    assert sink.ending == ("completed", "length")


def test_the_last_text_with_its_reason() -> None:
    """The finish reason may come with the last piece of text."""
    body = [event(chunk(choice("a"))), event(chunk(choice("b"))), event(chunk(choice("c", finish="length")))]
    sink = read(OPENAI_COMPLETIONS, *body)
    assert (sink.snapshot.text, sink.ending) == ("abc", ("completed", "length"))


def test_several_choices() -> None:
    """With `n` each choice has its index, and all must have ended."""
    body = [
        event(chunk(choice("a"), choice("x", index=1))),
        event(chunk(choice("b", index=1, finish="stop"))),
    ]
    assert read(OPENAI_COMPLETIONS, *body).ending == ("failed", "truncated")
    sink = read(OPENAI_COMPLETIONS, *body, event(chunk(choice(finish="length"))))
    assert sink.ending == ("completed", "length")
    assert [(one.text, one.finish_reason) for one in sink.snapshot.choices] == [
        ("a", "length"),
        ("xb", "stop"),
    ]


@pytest.mark.parametrize("field", ["reasoning", "reasoning_content"])
def test_reasoning(field: str) -> None:
    """Where a server takes it out of the text, it is reasoning, on each way in."""
    reader = OPENAI_COMPLETIONS.reader()
    deltas = tell(
        reader,
        chunk(choice("x")),
        chunk(choice("", **{field: "h"})),
        chunk(choice("y", **{field: "m"})),
        chunk(choice(None, **{field: "!"})),
        chunk(choice("z")),
    )
    assert (folded(deltas).text, folded(deltas).reasoning) == ("xyz", "hm!")


def test_a_choice_in_the_shape_of_chat() -> None:
    """A server that answers both paths with one function is read all the same."""
    deltas = tell(
        OPENAI_COMPLETIONS.reader(),
        chunk({"index": 0, "delta": {"content": "a", "reasoning_content": "hm"}}),
        chunk({"index": 0, "delta": {"content": "b"}, "finish_reason": "stop"}),
    )
    assert (folded(deltas).text, folded(deltas).reasoning, folded(deltas).finish_reason) == (
        "ab",
        "hm",
        "stop",
    )


@pytest.mark.parametrize(
    ("last", "finish"),
    [
        ({"stop_type": "eos"}, "stop"),
        ({"stop_type": "limit"}, "length"),
        ({"stopped_eos": True, "stopped_limit": False}, "stop"),
        ({"stopped_limit": True}, "length"),
    ],
)
def test_llama_cpp(last: dict[str, Any], finish: str) -> None:
    """Objects with `content` and `stop`, without `[DONE]`."""
    body = [
        {"content": "He", "stop": False, "index": 0, "tokens_predicted": 1, "tokens_evaluated": 4},
        {"content": "llo", "stop": False},
        {
            "content": "",
            "stop": True,
            "model": "m.gguf",
            "tokens_predicted": 2,
            "tokens_evaluated": 4,
            **last,
        },
    ]
    sink = read(OPENAI_COMPLETIONS, *map(event, body))
    assert (sink.snapshot.text, sink.snapshot.usage, sink.ending) == (
        "Hello",
        Usage(4, 2),
        ("completed", finish),
    )
    assert read(OPENAI_COMPLETIONS, *map(event, body[:2])).ending == ("failed", "truncated")
    cut = read(OPENAI_COMPLETIONS, event(body[0]), event({"error": {"code": 500, "message": "no slot"}}))
    assert cut.ending == ("failed", "provider_error")


def test_text_generation_inference() -> None:
    """Objects with a `token`; a special one is not text, and `index` counts tokens."""
    details = {"finish_reason": "eos_token", "generated_tokens": 3, "seed": None}
    body = [
        {
            "index": 1,
            "token": {"id": 5, "text": "He", "logprob": -0.1, "special": False},
            "generated_text": None,
            "details": None,
        },
        {"index": 2, "token": {"id": 6, "text": "llo", "special": False}},
        {
            "index": 3,
            "token": {"id": 2, "text": "</s>", "special": True},
            "generated_text": "Hello",
            "details": details,
        },
    ]
    sink = read(OPENAI_COMPLETIONS, *map(event, body))
    assert (sink.snapshot.text, sink.snapshot.usage) == ("Hello", Usage(None, 3))
    assert sink.ending == ("completed", "eos_token")
    body[-1]["details"] = None
    assert read(OPENAI_COMPLETIONS, *map(event, body)).ending == ("completed", "stop")
    failed = read(
        OPENAI_COMPLETIONS, event(body[0]), event({"error": "overloaded", "error_type": "overloaded"})
    )
    assert failed.ending == ("failed", "provider_error")


@pytest.mark.parametrize(
    "last",
    [
        event({"error": {"message": "no", "type": "server_error"}}),
        event(chunk(choice("x"), error={"message": "no"})),
        event(chunk(choice("x", error={"message": "no"}))),
        event({"message": "no"}, "error"),
        b'{"error": {"message": "no"}}\n',
    ],
)
@pytest.mark.parametrize("before", [choice("Hi"), choice("Hi", finish="stop")])
def test_errors(last: bytes, before: dict[str, Any]) -> None:
    """Wherever an error is told, it fails the stream with its message, also after a finish reason."""
    sink = read(OPENAI_COMPLETIONS, event(chunk(before)), last)
    assert sink.ending == ("failed", "provider_error")
    assert sink.fault is not None
    assert sink.fault.message == "no"


def test_a_finish_reason_that_is_an_error() -> None:
    """`error` is no way to end well, and `null` as text is no reason."""
    assert read(OPENAI_COMPLETIONS, event(chunk(choice("Hi", finish="error")))).ending == (
        "failed",
        "provider_error",
    )
    assert read(OPENAI_COMPLETIONS, event(chunk(choice("Hi", finish="null")))).ending == (
        "failed",
        "truncated",
    )


def test_a_whole_answer_in_place_of_a_stream() -> None:
    """A server that does not stream gives the answer all the same."""
    sink = read(OPENAI_COMPLETIONS, json.dumps(chunk(choice("Hi", finish="stop"))).encode())
    assert (sink.snapshot.text, sink.ending) == ("Hi", ("completed", "stop"))


@pytest.mark.parametrize(
    "value",
    [
        chunk(choice("x", index=-1)),
        chunk(choice("x", index=MAX_CHOICES)),
        chunk(choice("x", index="one")),
        chunk(choice(5)),
        chunk(choice("x", reasoning=5)),
        chunk(choice("x", finish=5)),
        chunk(choice("a"), 5),
        {"choices": "x"},
        {"content": "x", "stop": False, "index": 1.5},
        {"token": {"text": 5}},
        5,
        b"{",
        b"[" * 100_000,
    ],
)
def test_what_cannot_be_read_changes_nothing(value: Any) -> None:
    """Such an event is refused whole, and the reader goes on as if it had not come."""
    reader, other = OPENAI_COMPLETIONS.reader(), OPENAI_COMPLETIONS.reader()
    rest = [chunk(choice("b")), chunk(choice("c", finish="stop"))]
    expected = tell(other, chunk(choice("a")), *rest)
    told = tell(reader, chunk(choice("a")))
    assert refused(reader, value)
    assert expected == told + tell(reader, *rest)


# --- asking ---


@pytest.mark.parametrize(("prompt", "joined"), [("Once", "Once upon"), (["Once"], "Once upon")])
def test_going_on(prompt: Any, joined: str) -> None:
    """The text so far is put at the end of the prompt; the request is not changed."""
    assert OPENAI_COMPLETIONS.asking.continuation is not None
    request = {"model": "m", "prompt": prompt, "n": 1, "echo": False, "suffix": None}
    before = json.dumps(request)
    assert OPENAI_COMPLETIONS.asking.continuation(request, " upon") == {**request, "prompt": joined}
    assert before == json.dumps(request)


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"prompt": ["a", "b"]}, "prompt"),
        ({"prompt": [1, 2]}, "prompt"),
        ({"prompt": None}, "prompt"),
        ({"n": 2}, "n asks"),
        ({"best_of": 3}, "best_of"),
        ({"echo": True}, "echo"),
        ({"suffix": "."}, "suffix"),
        ({"logprobs": 0}, "logprobs"),
    ],
)
def test_where_it_cannot_go_on(fields: dict[str, Any], reason: str) -> None:
    """What a joined text would not be the answer to is refused, with the reason."""
    assert OPENAI_COMPLETIONS.asking.continuation is not None
    told = OPENAI_COMPLETIONS.asking.continuation({"prompt": "x", **fields}, "y")
    assert isinstance(told, str)
    assert reason in told


# --- anything at all ---

ODD = odd_json(
    *(
        "choices",
        "text",
        "index",
        "finish_reason",
        "usage",
        "prompt_tokens",
        "error",
        "message",
        "delta",
        "content",
    ),
    *("reasoning", "stop", "token", "details", "generated_text", "special", "code", "logprobs"),
)
CHUNKS = ODD | st.builds(lambda choices: {"choices": choices}, st.lists(ODD, max_size=3))


@settings(deadline=None)  # a test asserts no time
@given(st.lists(CHUNKS, max_size=6), st.sampled_from(["message", "error", "ping", "other"]))
def test_any_json_is_read_or_refused(values: list[Any], name: str) -> None:
    """A reader raises UnparseableError or nothing."""
    survives(OPENAI_COMPLETIONS, values, name)


@settings(deadline=None)  # a test asserts no time
@given(
    st.lists(st.tuples(st.integers(0, 2), WORDS), max_size=15),
    st.none() | st.tuples(st.integers(0, 10**9), st.integers(0, 10**9)),
    st.sampled_from([b"", DONE]),
    CUTS,
)
def test_a_generated_stream_comes_back(
    pieces: list[tuple[int, str]], usage: tuple[int, int] | None, marker: bytes, cuts: list[int]
) -> None:
    """The text of several choices and the usage are read as they were written, wherever the body is cut."""
    body = [event(chunk(choice(text, index=index))) for index, text in pieces]
    indexes = sorted({0, *(index for index, _ in pieces)})
    body += [event(chunk(choice(index=index, finish="stop"))) for index in indexes]
    if usage is not None:
        body.append(event(chunk(usage={"prompt_tokens": usage[0], "completion_tokens": usage[1]})))
    sink = read_cut(OPENAI_COMPLETIONS, b"".join(body) + marker, cuts)
    assert sink.ending == ("completed", "stop")
    told = {index: "".join(text for at, text in pieces if at == index) for index in indexes}
    assert told == {one.index: one.text for one in sink.snapshot.choices}
    assert (None if usage is None else Usage(*usage)) == sink.snapshot.usage
    assert not sink.skipped
