"""Recorded OpenAI chat streams give what was expected of them, however they arrive."""

from __future__ import annotations

import random
from typing import Any

import pytest

from supervisor.dialects.openai_chat import OPENAI_CHAT
from supervisor.dialects.reading import BodyReader
from supervisor.dialects.replay import ReplayResult, replay
from tests.cases import transcripts
from tests.dialects.bodies import RecordingSink

TRANSCRIPTS = transcripts("openai-chat")
STATES = {"completed": "completed", "error": "failed", "incomplete": "failed"}
SHORT_BYTES = 2500

each = pytest.mark.parametrize("case", TRANSCRIPTS, ids=lambda case: case["id"])


def check(case: dict[str, Any], result: ReplayResult) -> None:
    told = result.to_json_object()
    assert STATES[case["expected_terminal"]] == told["state"]
    assert case["expected_text"] == told["text"]
    assert case["expected_reasoning"] == told["reasoning"]
    assert case["expected_refusal"] == told["refusal"]
    assert case["expected_tool_calls"] == told["tool_calls"]
    assert case["expected_finish"] == told["finish_reason"]
    assert case["expected_usage"] == told["usage"]
    if told["state"] == "completed":
        assert (case["expected_finish"] or "done", None) == (told["reason"], told["error"])
    else:
        assert told["reason"] == "provider_error"
        assert told["error"]["message"]
    if case["expected_choices"] is not None:
        for expected, choice in zip(case["expected_choices"], result.snapshot.choices, strict=True):
            assert (expected["index"], expected["text"]) == (choice.index, choice.text)
            assert (expected["reasoning"] or "", expected["refusal"] or "") == (
                choice.reasoning,
                choice.refusal,
            )
            assert expected["finish_reason"] == choice.finish_reason
            assert expected["tool_calls"] == [
                {"id": call.id, "name": call.name, "arguments": call.arguments} for call in choice.tool_calls
            ]


@each
def test_whole(case: dict[str, Any]) -> None:
    """Read in one piece, nothing unreadable."""
    result = replay("openai-chat", case["body"])
    check(case, result)
    assert result.skipped == 0


@each
def test_splits(case: dict[str, Any]) -> None:
    """Short ones split in two at every byte; all of them byte by byte or at random places."""
    body = case["body"]
    if len(body) <= SHORT_BYTES:
        for at in range(1, len(body)):
            check(case, replay("openai-chat", [body[:at], body[at:]]))
        check(case, replay("openai-chat", body, chunk=1))
    chosen = random.Random(case["id"])
    for _ in range(3):
        cuts = sorted(chosen.choices(range(len(body) + 1), k=40))
        check(
            case, replay("openai-chat", [body[a:b] for a, b in zip([0, *cuts], [*cuts, None], strict=True)])
        )


@each
@pytest.mark.parametrize("variant", ["crlf", "cr", "bom", "comments", "no-space"])
def test_variants(case: dict[str, Any], variant: str) -> None:
    """Other line ends, a byte order mark, keep-alive comments, and no space after the colon change nothing."""
    body = case["body"].replace(b"\r\n", b"\n")
    changed = {
        "crlf": body.replace(b"\n", b"\r\n"),
        "cr": body.replace(b"\n", b"\r"),
        "bom": b"\xef\xbb\xbf" + body,
        "comments": b": hello\n\n" + body.replace(b"\n\n", b"\n: alive\n\n: still\n\n"),
        "no-space": body.replace(b"data: ", b"data:"),
    }[variant]
    check(case, replay("openai-chat", changed))
    check(case, replay("openai-chat", changed, chunk=113))


@each
def test_cut_at_every_event_boundary(case: dict[str, Any]) -> None:
    """A body that ends, or a connection that dies, between two events is truncated unless the answer had ended."""
    events = [
        block + b"\n\n" for block in case["body"].replace(b"\r\n", b"\n").split(b"\n\n") if block.strip()
    ]
    live = RecordingSink()
    growing = BodyReader(OPENAI_CHAT, live)
    step = max(1, len(events) // 40)
    for count, block in enumerate(events, 1):
        growing.feed(block)
        if count % step and count < len(events) - 4:
            continue
        result = replay("openai-chat", b"".join(events[:count]))
        if live.sealed:
            assert (live.state, live.reason) == (result.state, result.reason)
        elif growing._reader.ending() is not None:
            assert result.state == "completed"
            assert live.marks
        else:
            assert (result.state, result.reason) == ("failed", "truncated")
            assert result.fault is not None
            assert result.fault.kind == "truncated"
        assert live.snapshot.text == result.snapshot.text
