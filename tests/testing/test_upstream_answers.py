"""What the simulated upstream tells in each provider's shape, read back by the dialect of that name.

Two readings of each provider's documentation are held against each other here: the simulator's, which writes, and the
dialect's, which reads. They share no code.
"""

from __future__ import annotations

import json
import re
from typing import Any

import attrs
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from supervisor.dialects import BUILTIN, Usage
from supervisor.dialects.replay import ReplayResult, replay
from supervisor.testing.upstream.answers import (
    ANTHROPIC,
    COHERE,
    EVENTS,
    GEMINI,
    GEMINI_ARRAY,
    OLLAMA_CHAT,
    OLLAMA_GENERATE,
    OPENAI_CHAT,
    OPENAI_COMPLETIONS,
    OPENAI_RESPONSES,
    Answer,
    Shape,
)
from supervisor.testing.upstream.plan import Close, Pause, Send, plan, total_events
from supervisor.testing.upstream.script import Script, script_for_model

SHAPES = {
    "anthropic": ANTHROPIC,
    "cohere": COHERE,
    "events": EVENTS,
    "gemini": GEMINI,
    "gemini-jsonarray": GEMINI_ARRAY,
    "ollama-chat": OLLAMA_CHAT,
    "ollama-generate": OLLAMA_GENERATE,
    "openai-chat": OPENAI_CHAT,
    "openai-completions": OPENAI_COMPLETIONS,
    "openai-responses": OPENAI_RESPONSES,
}
EVERY = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
FINISHES = {
    "anthropic": {"stop": "end_turn", "length": "max_tokens", "tool_calls": "tool_use"},
    "cohere": {"stop": "COMPLETE", "length": "MAX_TOKENS", "tool_calls": "TOOL_CALL"},
    "gemini": {"stop": "STOP", "length": "MAX_TOKENS", "tool_calls": "STOP"},
    "gemini-jsonarray": {"stop": "STOP", "length": "MAX_TOKENS", "tool_calls": "STOP"},
    "ollama": {"stop": "stop", "length": "length", "tool_calls": "stop"},
    "openai-responses": {"stop": "completed", "length": "max_output_tokens", "tool_calls": "completed"},
}
WITHOUT_REASONING = (EVENTS, OPENAI_COMPLETIONS)
WITHOUT_TOOLS = (EVENTS, OLLAMA_GENERATE, OPENAI_COMPLETIONS)


def finish(shape: Shape, said: str) -> str:
    return FINISHES.get(shape.name, {}).get(said, said)


def body(script: Script, shape: Shape, **more: Any) -> bytes:
    """Return the body of a response that is framed by the connection's end."""
    plain = script_of(script, framing="until-close")
    sends = [step.data for step in plan(plain, shape=shape, **more) if isinstance(step, Send)]
    return b"".join(sends[1:])


def script_of(script: Script, **changes: Any) -> Script:
    return attrs.evolve(script, **changes)


def ending(result: ReplayResult) -> tuple[str, str]:
    return result.state, result.reason


def usage_of(result: ReplayResult) -> tuple[int | None, int | None]:
    usage = result.snapshot.usage or Usage()
    return usage.input, usage.output


TEXTS = st.text(st.characters(codec="utf-8", exclude_categories=("Cc", "Cs")), max_size=40) | st.sampled_from(
    [
        "Hello there",
        "one\ntwo\r\n\u2028three\u0085",
        "  spaces  ",
        "data: [DONE]\n\n",
        "]\n,{",
        "日本 語 🙂",
    ]
)


@EVERY
@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_what_is_told_is_what_is_read(shape: Shape, data: st.DataObject) -> None:
    """Any script, in any shape, is read back as its text, finish and usage, however the bytes are cut."""
    script = Script(
        text=data.draw(TEXTS),
        finish_reason=data.draw(st.sampled_from(["stop", "length"])),
        reasoning=data.draw(st.none() | st.just("Let me think.")),
        tool=None if shape in WITHOUT_TOOLS else data.draw(st.none() | st.just("weather")),
        events_per_write=data.draw(st.integers(1, 3)),
        comment_every=data.draw(st.integers(0, 2)),
        newline="lf" if shape.framing != "sse" else data.draw(st.sampled_from(["lf", "crlf", "cr"])),
    )
    result = replay(shape.name, body(script, shape), chunk=data.draw(st.integers(1, 100)))
    assert result.state == "completed", result
    answer = result.snapshot
    assert answer.text == script.text
    said = "tool_calls" if script.tool and script.finish_reason == "stop" else script.finish_reason
    assert answer.finish_reason == finish(shape, said or "")
    told = Answer(script=script)
    if shape not in WITHOUT_REASONING:
        assert answer.reasoning == (script.reasoning or "")
    if shape not in WITHOUT_TOOLS:
        assert [call.name for call in answer.tool_calls] == ([script.tool] if script.tool else [])
        if script.tool:
            assert answer.tool_calls[0].arguments.replace(" ", "") == '{"city":"Paris"}'
    # Gemini counts thoughts apart.
    output = told.output_tokens - (len(told.reasoning) if shape in (GEMINI, GEMINI_ARRAY) else 0)
    assert usage_of(result) == (7, output)
    assert result.skipped == 0


@EVERY
def test_numbered_words_from_blocks_are_told_like_any_others(shape: Shape) -> None:
    """Words from prebuilt blocks, in writes of several, past the point where they repeat: the same bytes as one by one."""
    fast = Script(tokens=2100, events_per_write=64)
    slow = script_of(fast, at_event=1 << 30)
    assert body(fast, shape) == body(slow, shape)
    assert replay(shape.name, body(fast, shape)).snapshot.text == fast.expected_text()


@EVERY
@pytest.mark.parametrize("tool", [None, "weather"])
def test_cut_at_each_event_of_any_kind(shape: Shape, tool: str | None) -> None:
    """`at_event` cuts before each event of an answer; no cut is read as a whole answer before it has ended well."""
    script = Script(tokens=3, reasoning="Hm, well.", tool=None if shape in WITHOUT_TOOLS else tool)
    total = total_events(shape, Answer(script=script))
    assert total is not None
    completed = []
    for at in range(total + 1):
        for fault in ("end", "drop", "reset"):
            cut = script_of(script, fault=fault, at_event=at)
            steps = list(plan(cut, shape=shape))
            assert isinstance(steps[-1], Close) is (fault != "end")
            assert sum(step.events for step in steps if isinstance(step, Send)) == at
        result = replay(shape.name, body(script_of(script, fault="end", at_event=at), shape))
        if result.state == "completed":
            completed.append(at)
        else:
            assert ending(result) == ("failed", "truncated")
        assert script.expected_text().startswith(result.snapshot.text)
    # Once an answer has ended, what follows (usage, a marker that may be left out) changes nothing of that.
    assert completed == list(range(completed[0], total + 1))
    assert completed[0] >= total - 2


@EVERY
def test_a_whole_answer_in_place_of_a_stream(shape: Shape) -> None:
    """`sim/json`: the provider's answer as one object says the same."""
    script = Script(content_type="application/json", text="Hello there")
    result = replay(shape.name, body(script, shape))
    assert (result.state, result.snapshot.text) == ("completed", "Hello there")
    assert result.snapshot.finish_reason == finish(shape, "stop")


@EVERY
@pytest.mark.parametrize("told", ["data", "event", "chunk", "field", "bare", "string", "flat"])
def test_errors_inside_a_stream(shape: Shape, told: Any) -> None:
    """However an error is told, it ends the answer as failed, with the provider's words."""
    script = Script(fault="error", after=2, message="The model is on fire", error_shape=told)
    result = replay(shape.name, body(script, shape))
    assert result.snapshot.text == "w0 w1 "
    assert result.state == "failed"
    if told == "flat" and shape in (ANTHROPIC, OPENAI_RESPONSES):
        return  # an event of neither a known name nor a known type: these two providers say to ignore it
    assert result.reason == "provider_error"
    assert result.fault is not None
    assert result.fault.message == "The model is on fire"


@EVERY
def test_an_error_after_the_finish_reason(shape: Shape) -> None:
    """It still fails the answer, where the provider tells the finish before the end."""
    result = replay(shape.name, body(Script(fault="error-after-finish", message="late"), shape))
    assert ending(result) == ("failed", "provider_error")


@EVERY
def test_http_errors_are_in_the_providers_shape(shape: Shape) -> None:
    """The body of an HTTP error is read by the dialect's own function, with its kind."""
    script = Script(status=429, message="Slow down, please")
    fault = BUILTIN[shape.name].fault(429, body(script, shape))
    assert (fault.message, fault.kind, fault.temporary) == ("Slow down, please", "rate_limit", True)


@EVERY
@pytest.mark.parametrize("model", ["sim/bad-json?after=1", "sim/oversized?after=1&size_bytes=5000"])
def test_faults_of_one_event(shape: Shape, model: str) -> None:
    """One event that is not JSON is skipped, and one that is long is read; the answer goes on."""
    script = script_for_model(model)
    assert script is not None
    if shape is GEMINI_ARRAY and script.fault == "bad-json":
        return  # an array with a broken element has no further elements
    result = replay(shape.name, body(script, shape))
    assert result.state == "completed"
    assert result.skipped == int(script.fault == "bad-json")
    read = result.snapshot.text.replace("x" * 5000, "")
    assert read == script.expected_text()


@EVERY
def test_an_answer_without_its_end(shape: Shape) -> None:
    """`sim/no-marker`: all of the text and then the end of the body is a truncation in every dialect."""
    script = script_for_model("sim/no-marker")
    assert script is not None
    assert ending(replay(shape.name, body(script, shape))) == ("failed", "truncated")


@EVERY
def test_a_continued_answer(shape: Shape) -> None:
    """What is told after a beginning joins it to the whole; the beginning counts as input."""
    script = Script(text="Hello there, dear world")
    rest = Answer(script=script, start=2, lead=" ")
    result = replay(shape.name, body(script, shape, answer=rest))
    assert "Hello there," + result.snapshot.text == script.text
    assert usage_of(result) == (9, 3)


@pytest.mark.parametrize("script", [Script(tokens=3, tool="weather", reasoning="Hm."), Script(tokens=0)])
def test_what_follows_an_event_that_the_client_has_had(script: Script) -> None:
    """`skip` leaves out exactly the events before, which the Responses API numbers without a gap."""
    whole = body(script, OPENAI_RESPONSES)
    numbers = [int(found) for found in re.findall(rb'"sequence_number":(\d+)', whole)]
    assert numbers == list(range(total_events(OPENAI_RESPONSES, Answer(script=script)) or 0))
    for had in range(len(numbers) + 1):
        rest = body(script, OPENAI_RESPONSES, skip=had)
        assert whole.endswith(rest)
        assert [int(found) for found in re.findall(rb'"sequence_number":(\d+)', rest)] == numbers[had:]


def test_a_pace_is_planned_event_by_event_too() -> None:
    """Answers that are planned event by event pause between words, and nowhere else."""
    script = Script(tokens=4, interval_s=0.5, at_event=99)
    steps = list(plan(script, shape=ANTHROPIC))
    assert [step for step in steps if isinstance(step, Pause)] == [Pause(0.5)] * 3


@EVERY
def test_numbered_words_go_on_where_they_were(shape: Shape) -> None:
    """A continued answer has the words that are left, also those from prebuilt blocks."""
    script = Script(tokens=1030, events_per_write=8)
    rest = replay(shape.name, body(script, shape, answer=Answer(script=script, start=1020))).snapshot
    assert script.expected_text(1020) + rest.text == script.expected_text()


@pytest.mark.parametrize("tokens", [0, 1, 3])
def test_the_array_is_json(tokens: int) -> None:
    """A whole answer as a JSON array is one, and without its end marker it is not."""
    script = Script(tokens=tokens)
    assert len(json.loads(body(script, GEMINI_ARRAY))) == tokens + 1
    with pytest.raises(json.JSONDecodeError):
        json.loads(body(script_of(script, done=False), GEMINI_ARRAY))
