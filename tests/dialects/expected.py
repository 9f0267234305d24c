"""What a recorded transcript is expected to give, in the words of this project.

The expectations were written down in each provider's own shapes: a tool call has `input` (Anthropic) or `arguments` that are
an object (Gemini) or text (the others), Gemini's usage has `thoughts`, and an answer without any event has no text at all
(null). Here they are turned into one shape, in which a reading is compared with them.

`JUDGED_WRONG` lists what of a transcript is expected wrongly, with the reason; only those fields of it are left out.
"""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Iterator
from typing import Any

from supervisor.dialects.base import Snapshot, Usage

STATES = {"completed": "completed", "error": "failed", "incomplete": "failed"}

_UNNAMED = "its events have no `event:` lines, and what is expected was derived with the vendor's SDK, which ignores such events:"
JUDGED_WRONG: dict[str, tuple[frozenset[str], str]] = {
    **{
        f"anthropic__ai__anthropic-language-model-test-ts-{line}": (
            frozenset({"usage"}),
            f"{_UNNAMED} the usage stated in `message_start` and `message_delta` is missing",
        )
        for line in (7159, 7560, 7754)
    },
    "anthropic__ai__anthropic-language-model-test-ts-9766": (
        frozenset({"finish", "tool_calls", "usage"}),
        f"{_UNNAMED} the tool call, the stop reason and the usage are missing",
    ),
    "openai-responses__ai__openai-responses-language-model-test-ts-9733": (
        frozenset({"text"}),
        "no text is expected, as it has no deltas; but three of its events have it, `response.completed` among them",
    ),
}
"""By id: the fields expected wrongly, and why."""


def wrong(case: dict[str, Any]) -> frozenset[str]:
    """Return the fields whose expectation does not count."""
    return JUDGED_WRONG.get(case["id"], (frozenset(), ""))[0]


# --- the shapes ------------------------------------------------------------------------------------------------------


def call(told: dict[str, Any]) -> tuple[str | None, str, Any]:
    """Return a tool call as (id, name, arguments): no id where the provider gives none, arguments as JSON where they are."""
    arguments = told["input"] if "input" in told else told["arguments"]
    return told.get("id"), told["name"], _value(arguments)


def calls(
    expected: list[dict[str, Any]] | None, read: list[dict[str, Any]] | None
) -> tuple[list[Any], list[Any]]:
    """Return the calls expected and those read, each as `call` gives them; ids only where they are expected."""
    wanted = [call(one) for one in expected or ()]
    got = [call(one) for one in read or ()]
    got = [
        (one[0] if index >= len(wanted) or wanted[index][0] is not None else None, *one[1:])
        for index, one in enumerate(got)
    ]
    return wanted, got


def text_of_arguments(expected: list[dict[str, Any]] | None) -> list[str] | None:
    """Return the arguments as text, where the expectation has them so: then they are compared letter by letter."""
    if not expected or not all(isinstance(one.get("arguments"), str) for one in expected):
        return None
    return [one["arguments"] for one in expected]


def usage(expected: dict[str, Any] | None, read: Usage | None) -> tuple[Any, Any]:
    """Return the usage expected and the one read, in the fields of the expectation. What is not stated is None."""
    if expected is None or read is None:
        return expected, read
    names = {"input": read.input, "output": read.output, "thoughts": read.reasoning}
    return expected, {name: names[name] for name in expected}


def _value(arguments: Any) -> Any:
    if not isinstance(arguments, str):
        return arguments
    try:
        return json.loads(arguments) if arguments else {}
    except ValueError:
        return _begun(arguments)


def _begun(text: str) -> Any:
    """Return what there is of a JSON value that was cut off: its whole members, as SDKs give it."""
    found: Any = text
    closing = ""
    quoted = False
    for at, sign in enumerate(text):
        if sign == '"' and (at == 0 or text[at - 1] != "\\"):
            quoted = not quoted
        if quoted:
            continue
        if sign in "[{":
            closing = {"[": "]", "{": "}"}[sign] + closing
        elif sign in "]}":
            closing = closing[1:]
        if sign in ",]}[{":
            with contextlib.suppress(ValueError):
                found = json.loads(text[: at + (sign != ",")] + closing)
    return found


# --- comparing -------------------------------------------------------------------------------------------------------


def check(case: dict[str, Any], told: dict[str, Any], snapshot: Snapshot) -> None:
    """Compare everything that is expected of a transcript with the object that `replay` tells, and with the snapshot."""
    skipped = wrong(case)
    assert STATES[case["expected_terminal"]] == told["state"]
    assert told["text"] == snapshot.text
    if "text" not in skipped:
        assert (case["expected_text"] or "") == told["text"]
    assert case["expected_reasoning"] == told["reasoning"] == (snapshot.reasoning or None)
    assert case["expected_refusal"] == told["refusal"] == (snapshot.refusal or None)
    check_ending(case, told["reason"], told["error"])
    if "finish" not in skipped:
        assert case["expected_finish"] == told["finish_reason"] == snapshot.finish_reason
    if "tool_calls" not in skipped:
        wanted, got = calls(case["expected_tool_calls"], told["tool_calls"])
        assert wanted == got
        if (texts := text_of_arguments(case["expected_tool_calls"])) is not None:
            assert texts == [one.arguments for one in snapshot.tool_calls]
    if "usage" not in skipped:
        wanted_usage, got_usage = usage(case["expected_usage"], snapshot.usage)
        assert wanted_usage == got_usage
        if case["expected_usage"] is not None:
            both = {name: case["expected_usage"][name] for name in ("input", "output")}
            assert both == {name: told["usage"][name] for name in both}
    if case["expected_choices"] is not None:
        check_choices(case["expected_choices"], snapshot)


def check_ending(case: dict[str, Any], reason: str, error: dict[str, Any] | None) -> None:
    """Compare the reason of the ending: the provider's finish reason, or what kind of failure it was."""
    terminal = case["expected_terminal"]
    if terminal == "completed":
        assert (case["expected_finish"] or "done", None) == (reason, error)
        return
    assert error is not None
    assert error["message"]
    if terminal == "incomplete":
        assert (reason, error["kind"]) == ("truncated", "truncated")
    elif case["terminal_detail"] == "malformed_json":
        assert reason in {"protocol", "truncated"}  # nobody said that it failed: it could not be read
    else:
        assert reason == "provider_error"


def check_choices(expected: list[dict[str, Any]], snapshot: Snapshot) -> None:
    for want, choice in zip(expected, snapshot.choices, strict=True):
        assert (want["index"], want["text"]) == (choice.index, choice.text)
        assert (want["reasoning"] or "", want["refusal"] or "") == (choice.reasoning, choice.refusal)
        assert want["finish_reason"] == choice.finish_reason
        read = [{"id": one.id, "name": one.name, "arguments": one.arguments} for one in choice.tool_calls]
        wanted, got = calls(want["tool_calls"], read)
        assert wanted == got
        if (texts := text_of_arguments(want["tool_calls"])) is not None:
            assert texts == [one.arguments for one in choice.tool_calls]


# --- events ----------------------------------------------------------------------------------------------------------

_BLOCK_END = re.compile(rb"\r\n\r\n|\n\n|\r\r")


def boundaries(framing: str, body: bytes) -> list[int]:
    """Return where the events of a body end, each with all that ends it. What comes after the last is no event."""
    if framing == "sse":
        return [match.end() for match in _BLOCK_END.finditer(body)]
    if framing == "ndjson":
        return [match.end() for match in re.finditer(rb"\n", body)]
    return [end for _, end in _elements(body)]


def data_of(framing: str, body: bytes) -> list[str]:
    """Return the data of each whole event of a body, cut out without the decoders under test."""
    if framing == "sse":
        found = []
        start = 0
        for end in boundaries(framing, body):
            block = body[start:end].decode("utf-8", "replace")
            start = end
            lines = [line for line in re.split(r"\r\n|\r|\n", block) if line.startswith("data:")]
            if lines:
                found.append("\n".join(line[5:].removeprefix(" ") for line in lines))
        return found
    if framing == "ndjson":
        return [line.decode() for line in body.split(b"\n") if line.strip()]
    return [body[start:end].decode() for start, end in _elements(body)]


def _elements(body: bytes) -> Iterator[tuple[int, int]]:
    """Yield where the elements of a JSON array begin and end, in bytes."""
    text = body.decode("latin-1")  # a character a byte: JSON's own signs are ASCII
    at = text.index("[") + 1
    decoder = json.JSONDecoder(strict=False)
    while match := re.compile(r"[\s,]*(?=\{)").match(text, at):
        _, end = decoder.raw_decode(text, match.end())
        yield match.end(), end
        at = end


# --- endings, said a second time -------------------------------------------------------------------------------------


def has_ended(dialect: str, events: list[str]) -> bool:
    """Whether an answer has ended with these events, by a rule of each provider's own, written without the readers."""
    values = [_object(data) for data in events]
    if dialect in {"openai-chat", "openai-completions"}:
        reasons: dict[int, Any] = {}
        for value in values:
            for choice in value.get("choices") or ():
                index = choice.get("index") or 0
                reasons[index] = choice.get("finish_reason") or reasons.get(index)
        return "[DONE]" in (data.strip() for data in events) or (bool(reasons) and all(reasons.values()))
    if dialect == "anthropic":
        return any(value.get("type") == "message_stop" for value in values)
    if dialect == "openai-responses":
        return any(value.get("type") in {"response.completed", "response.incomplete"} for value in values)
    if dialect in {"gemini", "gemini-jsonarray"}:
        return any(
            (value.get("promptFeedback") or {}).get("blockReason")
            or any(candidate.get("finishReason") for candidate in value.get("candidates") or ())
            for value in values
        )
    if dialect == "ollama":
        return any(value.get("done") is True for value in values)
    if dialect == "cohere":
        return any(value.get("type") == "message-end" for value in values)
    raise AssertionError(f"no rule for {dialect}")


def _object(data: str) -> dict[str, Any]:
    try:
        value = json.loads(data, strict=False)
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}
