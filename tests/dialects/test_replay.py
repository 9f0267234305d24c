"""Replaying recorded bodies: the JSON object that is printed."""

from __future__ import annotations

from typing import Any

import pytest

from supervisor.dialects import BUILTIN, NATIVE, find
from supervisor.dialects.openai_chat import OPENAI_CHAT
from supervisor.dialects.replay import replay
from supervisor.errors import ConfigurationError
from tests.dialects.bodies import DONE, call, chunk, event


def test_the_object() -> None:
    """Every field has its place; what the answer does not have is null, and its text is never null."""
    body = chunk({"content": "Hi"}) + call(0, "a", "f", "{}") + chunk(finish="tool_calls")
    body += event({"choices": [], "usage": {"prompt_tokens": 1, "completion_tokens": 2}}) + DONE
    assert replay("openai-chat", body).to_json_object("x.sse") == {
        "file": "x.sse",
        "state": "completed",
        "reason": "tool_calls",
        "text": "Hi",
        "reasoning": None,
        "refusal": None,
        "tool_calls": [{"id": "a", "name": "f", "arguments": "{}"}],
        "choices": [{"index": 0, "text": "Hi", "finish_reason": "tool_calls"}],
        "finish_reason": "tool_calls",
        "usage": {"input": 1, "output": 2},
        "error": None,
        "events": 5,
    }


def test_a_failure() -> None:
    """An error has kind and message; without `file` there is none in the object."""
    told = replay("openai-chat", event({"error": {"message": "m", "code": 429}})).to_json_object()
    assert (
        told["state"],
        told["reason"],
        told["error"],
    ) == ("failed", "provider_error", {"kind": "rate_limit", "message": "m"})
    assert (
        told["text"],
        told["tool_calls"],
        told["usage"],
        told["choices"],
        told["events"],
    ) == ("", None, None, [], 1)
    assert "file" not in told


@pytest.mark.parametrize("feed", [{}, {"chunk": 1}, {"chunk": 5}])
def test_an_event_stream_without_dialect(feed: dict[str, Any]) -> None:
    """`sse` tells each event and the last id, and discards an unfinished event."""
    body = b"id: 1\nevent: e\nretry: 5\ndata: a\xff\ndata: b\n\n: c\n\ndata: late"
    assert replay("sse", body, **feed).to_json_object("f") == {
        "file": "f",
        "events": [{"event": "e", "data": "a\ufffd\nb", "id": "1", "retry": 5}],
        "last_event_id": "1",
    }


def test_an_event_stream_past_a_limit() -> None:
    """What was decoded before is told, and the fault."""
    told = replay("sse", [b"data: a\n\n" + b"x" * (2 << 20), b"data: b\n\n"]).to_json_object()
    assert (len(told["events"]), told["error"]["kind"]) == (1, "protocol")


def test_pieces_of_any_kind() -> None:
    """A body may come as bytes, in pieces, or in pieces cut again."""
    body = chunk({"content": "Hi"}) + DONE
    whole = replay("openai-chat", body)
    assert (
        whole
        == replay("openai-chat", iter([body[:9], b"", body[9:]]))
        == replay("openai-chat", [body], chunk=4)
    )


@pytest.mark.parametrize("name", ["nonsense", "native", ""])
def test_dialects_that_do_not_exist(name: str) -> None:
    """The error names those that do."""
    with pytest.raises(ConfigurationError, match=r"openai-chat, .*sse"):
        replay(name, b"")


def test_the_catalogue() -> None:
    """Dialects are found by their name; an unknown name is an error that lists them."""
    assert OPENAI_CHAT is find("openai-chat")
    assert NATIVE is find("native")
    assert all(name == dialect.name for name, dialect in BUILTIN.items())
    with pytest.raises(ConfigurationError, match=r"native, .*openai-chat"):
        find("nonsense")


def test_chunk_must_be_positive() -> None:
    """A chunk of no bytes would never end."""
    with pytest.raises(ConfigurationError, match="chunk"):
        replay("openai-chat", b"", chunk=0)
