"""Cohere's v2 chat: typed events, the last of them `message-end` with the finish reason and the usage."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Final

from supervisor.testing.upstream.answers.openai_chat import messages_prefix
from supervisor.testing.upstream.answers.shape import Answer, Event, Failure, Shape, json

__all__ = ["COHERE"]

_FINISHES = {"stop": "COMPLETE", "length": "MAX_TOKENS", "tool_calls": "TOOL_CALL", "content_filter": "ERROR"}


def _event(kind: str, *, of: Any = "", **fields: Any) -> Event:
    return Event(json({"type": kind, **fields}), name=kind, kind=of)


def _message(**fields: Any) -> dict[str, Any]:
    return {"message": fields}


def _opening(answer: Answer) -> Iterator[Event]:
    empty: dict[str, Any] = {
        "role": "assistant",
        "content": [],
        "tool_plan": "",
        "tool_calls": [],
        "citations": [],
    }
    yield _event("message-start", id="sim", delta=_message(**empty))
    if answer.reasoning:
        begun = _message(content={"type": "thinking", "thinking": ""})
        yield _event("content-start", index=0, delta=begun)
        for piece in answer.reasoning:
            yield _event("content-delta", index=0, delta=_message(content={"thinking": piece}))
        yield _event("content-end", index=0)
    started = _message(content={"type": "text", "text": ""})
    yield _event("content-start", index=_index(answer), delta=started)


def _index(answer: Answer) -> int:
    return int(bool(answer.reasoning))


def _token(answer: Answer, at: int, text: str) -> Event:
    del at
    return _event("content-delta", of="token", index=_index(answer), delta=_message(content={"text": text}))


def _closing(answer: Answer, at: int) -> Iterator[Event]:
    del at
    yield _event("content-end", index=_index(answer))
    if answer.script.tool:
        begun = _call(answer.script.tool, "")
        yield _event("tool-call-start", index=0, delta=_message(tool_calls=begun))
        for piece in answer.arguments:
            told = _message(tool_calls={"function": {"arguments": piece}})
            yield _event("tool-call-delta", index=0, delta=told)
        yield _event("tool-call-end", index=0)
    if answer.finish is not None:
        finish = _FINISHES.get(answer.finish, answer.finish)
        yield _event("message-end", of="marker", id="sim", delta={"finish_reason": finish} | _usage(answer))


def _call(name: str, arguments: str) -> dict[str, Any]:
    return {"id": "call_sim", "type": "function", "function": {"name": name, "arguments": arguments}}


def _usage(answer: Answer) -> dict[str, Any]:
    if not answer.script.usage:
        return {}
    counted = {"input_tokens": answer.input_tokens, "output_tokens": answer.output_tokens}
    return {"usage": {"billed_units": counted, "tokens": counted}}


def _whole(answer: Answer) -> dict[str, Any]:
    message: dict[str, Any] = {"role": "assistant", "content": [{"type": "text", "text": answer.text}]}
    if answer.reasoning:
        message["content"].insert(0, {"type": "thinking", "thinking": "".join(answer.reasoning)})
    if answer.script.tool:
        message["tool_calls"] = [_call(answer.script.tool, answer.script.tool_arguments)]
    finish = None if answer.finish is None else _FINISHES.get(answer.finish, answer.finish)
    return {"id": "sim", "finish_reason": finish, "message": message, **_usage(answer)}


def _envelope(failure: Failure) -> dict[str, Any]:
    return {"id": "sim", "message": failure.message}


def _error(failure: Failure, at: int) -> Event:
    del at
    return _event("message-end", id="sim", delta={"finish_reason": "ERROR", "error": failure.message})


COHERE: Final = Shape(
    name="cohere",
    opening=_opening,
    token=_token,
    closing=_closing,
    whole=_whole,
    error=_error,
    envelope=_envelope,
    broken=b'{"type":"content-delta","index":0,"delta":{"message":{"content":{"text":"cut',
    prefix=messages_prefix,
)
