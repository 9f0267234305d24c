"""OpenAI's chat completions, and those of the many servers that imitate them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Final

from supervisor.testing.upstream.answers.shape import CREATED, MODEL, Answer, Event, Failure, Shape, json

__all__ = ["DONE", "OPENAI_CHAT", "envelope", "messages_prefix", "text_of", "usage"]

DONE: Final = Event(b"[DONE]", kind="marker")

_ID = "chatcmpl-sim"


def _chunk(delta: Mapping[str, Any] | None, finish_reason: str | None = None) -> dict[str, Any]:
    choices = [] if delta is None else [{"index": 0, "delta": delta, "finish_reason": finish_reason}]
    return {
        "id": _ID, "object": "chat.completion.chunk", "created": CREATED, "model": MODEL, "choices": choices,
    }  # fmt: skip


def _opening(answer: Answer) -> Iterator[Event]:
    if answer.script.role:
        yield Event(json(_chunk({"role": "assistant", "content": ""})))
    for piece in answer.reasoning:
        yield Event(json(_chunk({"reasoning_content": piece})))


def _token(answer: Answer, at: int, text: str) -> Event:
    del answer, at
    return Event(json(_chunk({"content": text})), kind="token")


def _closing(answer: Answer, at: int) -> Iterator[Event]:
    del at
    script = answer.script
    if script.tool:
        call = {"index": 0, "id": "call_sim", "type": "function"}
        called = {"name": script.tool, "arguments": ""}
        yield Event(json(_chunk({"tool_calls": [{**call, "function": called}]})))
        for piece in answer.arguments:
            yield Event(json(_chunk({"tool_calls": [{"index": 0, "function": {"arguments": piece}}]})))
    if answer.finish is not None:
        yield Event(json(_chunk({}, answer.finish)), kind="finish")
    if script.usage:
        yield Event(json(_chunk(None) | {"usage": usage(answer)}), kind="usage")
    yield DONE


def usage(answer: Answer) -> dict[str, Any]:
    """Return the usage of a completion."""
    spent, told = answer.input_tokens, answer.output_tokens
    counted: dict[str, Any] = {
        "prompt_tokens": spent,
        "completion_tokens": told,
        "total_tokens": spent + told,
    }
    if answer.reasoning:
        counted["completion_tokens_details"] = {"reasoning_tokens": len(answer.reasoning)}
    return counted


def _whole(answer: Answer) -> dict[str, Any]:
    message: dict[str, Any] = {"role": "assistant", "content": answer.text}
    if answer.reasoning:
        message["reasoning_content"] = "".join(answer.reasoning)
    if answer.script.tool:
        function = {"name": answer.script.tool, "arguments": answer.script.tool_arguments}
        message["tool_calls"] = [{"id": "call_sim", "type": "function", "function": function}]
    return {
        "id": _ID, "object": "chat.completion", "created": CREATED, "model": MODEL, "usage": usage(answer),
        "choices": [{"index": 0, "message": message, "finish_reason": answer.finish}],
    }  # fmt: skip


def envelope(failure: Failure) -> dict[str, Any]:
    """Return the body of an HTTP error."""
    kinds = {400: "invalid_request_error", 401: "authentication_error", 429: "rate_limit_error"}
    kind = kinds.get(failure.status, "server_error")
    return {"error": {"message": failure.message, "type": kind, "code": failure.code}}


def _error(failure: Failure, at: int) -> Event:
    del at
    return Event(json(envelope(failure)))


def _error_event(failure: Failure, at: int) -> Event:
    del at
    return Event(json(envelope(failure)), name="error")


def _error_chunk(failure: Failure, at: int) -> Event:
    del at
    return Event(json(_chunk({"content": ""}, "error") | envelope(failure)))


def messages_prefix(request: Mapping[str, Any]) -> str | None:
    """Return the text of the last message if it is the assistant's."""
    messages = request.get("messages")
    last = messages[-1] if isinstance(messages, list) and messages else None
    if not isinstance(last, dict) or last.get("role") != "assistant":
        return None
    return text_of(last.get("content"))


def text_of(content: Any) -> str:
    """Return the text in a content: a string, or a list of parts."""
    if isinstance(content, str):
        return content
    parts = content if isinstance(content, list) else []
    return "".join(
        part["text"] for part in parts if isinstance(part, dict) and isinstance(part.get("text"), str)
    )


OPENAI_CHAT: Final = Shape(
    name="openai-chat",
    opening=_opening,
    token=_token,
    closing=_closing,
    whole=_whole,
    error=_error,
    other_errors={"event": _error_event, "chunk": _error_chunk},
    envelope=envelope,
    broken=b'{"choices": [{"delta": {"content": "cut',
    prefix=messages_prefix,
)
