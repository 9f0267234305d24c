"""OpenAI's Responses: typed events with sequence numbers, by which a response made in the background is resumed.

The text is told three times: in deltas, in the `done` events of its part and item, and whole in the response that
`response.completed` carries.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from typing import Any, Final

from supervisor.testing.upstream.answers.openai_chat import envelope
from supervisor.testing.upstream.answers.shape import CREATED, MODEL, Answer, Event, Failure, Shape, json

__all__ = ["OPENAI_RESPONSES", "response", "response_id"]

_INCOMPLETE = {"length": "max_output_tokens", "content_filter": "content_filter"}


def response_id(number: int) -> str:
    """Return the id of the response to the request with this number."""
    return f"resp_sim{number:08x}"


def response(answer: Answer, status: str, *, told: int | None = None, **fields: Any) -> dict[str, Any]:
    """Return the response object; with its output and usage where it is over, of so many words if it was cut short."""
    over = status in ("completed", "incomplete", "cancelled")
    used = over and answer.script.usage
    output = answer.output_tokens if told is None else told + len(answer.reasoning)
    return {
        "id": response_id(answer.number), "object": "response", "created_at": CREATED, "status": status,
        "background": answer.background, "error": None, "incomplete_details": None, "model": MODEL,
        "output": list(_items(answer)) if over and told is None else [],
        "usage": _usage(answer, output) if used else None,
    } | fields  # fmt: skip


def _usage(answer: Answer, output: int) -> dict[str, Any]:
    return {
        "input_tokens": answer.input_tokens, "input_tokens_details": {"cached_tokens": 0},
        "output_tokens": output, "output_tokens_details": {"reasoning_tokens": len(answer.reasoning)},
        "total_tokens": answer.input_tokens + output,
    }  # fmt: skip


def _part(text: str) -> dict[str, Any]:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}


def _items(answer: Answer) -> Iterator[dict[str, Any]]:
    if answer.reasoning:
        summary = {"type": "summary_text", "text": "".join(answer.reasoning)}
        yield {"id": "rs_sim", "type": "reasoning", "summary": [summary]}
    yield _message("completed", [_part(answer.text)])
    if answer.script.tool:
        yield _call(answer, "completed", answer.script.tool_arguments)


def _message(status: str, content: list[dict[str, Any]]) -> dict[str, Any]:
    return {"id": "msg_sim", "type": "message", "status": status, "role": "assistant", "content": content}


def _call(answer: Answer, status: str, arguments: str) -> dict[str, Any]:
    return {
        "id": "fc_sim", "type": "function_call", "status": status, "call_id": "call_sim",
        "name": answer.script.tool, "arguments": arguments,
    }  # fmt: skip


def _event(kind: str, at: int, *, of: Any = "", **fields: Any) -> Event:
    return Event(json({"type": kind, "sequence_number": at, **fields}), name=kind, kind=of)


def _opening(answer: Answer) -> Iterator[Event]:
    at = itertools.count()
    begun = ("queued", "in_progress") if answer.background else ("in_progress",)
    yield _event("response.created", next(at), response=response(answer, begun[0]))
    for status in begun:
        yield _event(f"response.{status}", next(at), response=response(answer, status))
    if answer.reasoning:
        where = {"item_id": "rs_sim", "output_index": 0, "summary_index": 0}
        whole = {"type": "summary_text", "text": "".join(answer.reasoning)}
        item: dict[str, Any] = {"id": "rs_sim", "type": "reasoning", "summary": []}
        yield _event("response.output_item.added", next(at), output_index=0, item=item)
        part = whole | {"text": ""}
        yield _event("response.reasoning_summary_part.added", next(at), **where, part=part)
        for piece in answer.reasoning:
            yield _event("response.reasoning_summary_text.delta", next(at), **where, delta=piece)
        yield _event("response.reasoning_summary_text.done", next(at), **where, text=whole["text"])
        yield _event("response.reasoning_summary_part.done", next(at), **where, part=whole)
        yield _event("response.output_item.done", next(at), output_index=0, item=item | {"summary": [whole]})
    index = _text_index(answer)
    yield _event("response.output_item.added", next(at), output_index=index, item=_message("in_progress", []))
    yield _event("response.content_part.added", next(at), **_where(answer), part=_part(""))


def _text_index(answer: Answer) -> int:
    return int(bool(answer.reasoning))


def _where(answer: Answer) -> dict[str, Any]:
    return {"item_id": "msg_sim", "output_index": _text_index(answer), "content_index": 0}


def _token(answer: Answer, at: int, text: str) -> Event:
    where = _where(answer)
    return _event("response.output_text.delta", at, of="token", **where, delta=text, logprobs=[])


def _closing(answer: Answer, first: int) -> Iterator[Event]:
    at = itertools.count(first)
    index, text = _text_index(answer), answer.text
    yield _event("response.output_text.done", next(at), **_where(answer), text=text, logprobs=[])
    yield _event("response.content_part.done", next(at), **_where(answer), part=_part(text))
    message = _message("completed", [_part(text)])
    yield _event("response.output_item.done", next(at), output_index=index, item=message)
    if answer.script.tool:
        index += 1
        where = {"item_id": "fc_sim", "output_index": index}
        begun = _call(answer, "in_progress", "")
        yield _event("response.output_item.added", next(at), output_index=index, item=begun)
        for piece in answer.arguments:
            yield _event("response.function_call_arguments.delta", next(at), **where, delta=piece)
        whole = answer.script.tool_arguments
        yield _event("response.function_call_arguments.done", next(at), **where, arguments=whole)
        called = _call(answer, "completed", whole)
        yield _event("response.output_item.done", next(at), output_index=index, item=called)
    if answer.finish is not None:
        over = _whole(answer)
        yield _event(f"response.{over['status']}", next(at), of="marker", response=over)


def _whole(answer: Answer) -> dict[str, Any]:
    finish = answer.finish or "stop"
    if finish in ("stop", "tool_calls"):
        return response(answer, "completed")
    details = {"reason": _INCOMPLETE.get(finish, finish)}
    return response(answer, "incomplete", incomplete_details=details)


def _error(failure: Failure, at: int) -> Event:
    error = {"code": failure.code or "server_error", "message": failure.message}
    failed = {
        "id": "resp_sim", "object": "response", "created_at": CREATED, "status": "failed", "error": error,
        "incomplete_details": None, "model": MODEL, "output": [], "usage": None,
    }  # fmt: skip
    return _event("response.failed", at, response=failed)


def _error_event(failure: Failure, at: int) -> Event:
    return _event("error", at, code=failure.code, message=failure.message, param=None)


def _envelope(failure: Failure) -> Mapping[str, Any]:
    told = envelope(failure)
    if failure.status == 404:
        told["error"] |= {"type": "invalid_request_error", "param": None}
    return told


OPENAI_RESPONSES: Final = Shape(
    name="openai-responses",
    opening=_opening,
    token=_token,
    closing=_closing,
    whole=_whole,
    error=_error,
    other_errors={"event": _error_event},
    envelope=_envelope,
    broken=b'{"type":"response.output_text.delta","delta":"cut',
    numbered=True,
)
