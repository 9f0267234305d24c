"""Anthropic's Messages: blocks that are opened and closed, the usage in two parts, and pings."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Final

import msgspec

from supervisor.testing.upstream.answers.openai_chat import messages_prefix
from supervisor.testing.upstream.answers.shape import MODEL, Answer, Event, Failure, Shape, json

__all__ = ["ANTHROPIC"]

_STOPS = {"stop": "end_turn", "length": "max_tokens", "tool_calls": "tool_use", "content_filter": "refusal"}
_TYPES = {
    400: "invalid_request_error", 401: "authentication_error", 403: "permission_error", 404: "not_found_error",
    413: "request_too_large", 429: "rate_limit_error", 500: "api_error", 529: "overloaded_error",
}  # fmt: skip


def _event(kind: str, *, of: Any = "", **fields: Any) -> Event:
    return Event(json({"type": kind, **fields}), name=kind, kind=of)


def _message(answer: Answer, **fields: Any) -> dict[str, Any]:
    return {
        "id": "msg_sim", "type": "message", "role": "assistant", "model": MODEL, "content": [],
        "stop_reason": None, "stop_sequence": None,
    } | fields | ({"usage": _usage(answer, 1)} if answer.script.usage and "usage" not in fields else {})  # fmt: skip


def _usage(answer: Answer, output: int) -> dict[str, int]:
    return {
        "input_tokens": answer.input_tokens, "cache_creation_input_tokens": 0, "cache_read_input_tokens": 0,
        "output_tokens": output,
    }  # fmt: skip


def _index(answer: Answer) -> int:
    return int(bool(answer.reasoning))


def _opening(answer: Answer) -> Iterator[Event]:
    yield _event("message_start", message=_message(answer))
    if answer.reasoning:
        block = {"type": "thinking", "thinking": "", "signature": ""}
        yield _event("content_block_start", index=0, content_block=block)
        for piece in answer.reasoning:
            delta = {"type": "thinking_delta", "thinking": piece}
            yield _event("content_block_delta", index=0, delta=delta)
        signed = {"type": "signature_delta", "signature": "c2ltdWxhdGVk"}
        yield _event("content_block_delta", index=0, delta=signed)
        yield _event("content_block_stop", index=0)
    yield _event("content_block_start", index=_index(answer), content_block={"type": "text", "text": ""})
    yield _event("ping")


def _token(answer: Answer, at: int, text: str) -> Event:
    del at
    delta = {"type": "text_delta", "text": text}
    return _event("content_block_delta", of="token", index=_index(answer), delta=delta)


def _closing(answer: Answer, at: int) -> Iterator[Event]:
    del at
    index, script = _index(answer), answer.script
    yield _event("content_block_stop", index=index)
    if script.tool:
        index += 1
        block = {"type": "tool_use", "id": "toolu_sim", "name": script.tool, "input": {}}
        yield _event("content_block_start", index=index, content_block=block)
        for piece in answer.arguments:
            delta = {"type": "input_json_delta", "partial_json": piece}
            yield _event("content_block_delta", index=index, delta=delta)
        yield _event("content_block_stop", index=index)
    if answer.finish is not None:
        usage = {"usage": {"output_tokens": answer.output_tokens}} if script.usage else {}
        stop = {"stop_reason": _STOPS.get(answer.finish, answer.finish), "stop_sequence": None}
        yield _event("message_delta", of="finish", delta=stop, **usage)
    yield _event("message_stop", of="marker")


def _whole(answer: Answer) -> dict[str, Any]:
    content: list[dict[str, Any]] = []
    if answer.reasoning:
        content.append(
            {"type": "thinking", "thinking": "".join(answer.reasoning), "signature": "c2ltdWxhdGVk"}
        )
    content.append({"type": "text", "text": answer.text})
    if answer.script.tool:
        called = {"id": "toolu_sim", "name": answer.script.tool, "input": _raw(answer.script.tool_arguments)}
        content.append({"type": "tool_use", **called})
    finish = answer.finish
    return _message(
        answer,
        content=content,
        stop_reason=None if finish is None else _STOPS.get(finish, finish),
        usage=_usage(answer, answer.output_tokens),
    )


def _raw(arguments: str) -> Any:
    return msgspec.Raw(arguments.encode())


def _envelope(failure: Failure) -> dict[str, Any]:
    kind = failure.code or _TYPES.get(failure.status, "api_error")
    return {"type": "error", "error": {"type": kind, "message": failure.message}, "request_id": "req_sim"}


def _error(failure: Failure, at: int) -> Event:
    del at
    return Event(json(_envelope(failure)), name="error")


ANTHROPIC: Final = Shape(
    name="anthropic",
    opening=_opening,
    token=_token,
    closing=_closing,
    whole=_whole,
    error=_error,
    other_errors={"event": _error},
    envelope=_envelope,
    broken=b'{"type":"content_block_delta","index":0,"delta":{"type":"text_delta","text":"cut',
    prefix=messages_prefix,
    refusal="This model does not support assistant message prefill. The conversation must end with a user message.",
    space_refusal="messages: final assistant content cannot end with trailing whitespace",
    beat=b'event: ping\ndata: {"type": "ping"}\n\n',
)
