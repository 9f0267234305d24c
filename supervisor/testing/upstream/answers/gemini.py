"""Gemini's `streamGenerateContent`: whole responses, each with a piece, as an event stream or as one JSON array.

There is no end marker in the event stream: the last response has the finish reason. A function call comes whole.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Final

import attrs
import msgspec

from supervisor.testing.upstream.answers.openai_chat import text_of
from supervisor.testing.upstream.answers.shape import MODEL, Answer, Event, Failure, Shape, json

__all__ = ["GEMINI", "GEMINI_ARRAY"]

_FINISHES = {"stop": "STOP", "length": "MAX_TOKENS", "tool_calls": "STOP", "content_filter": "SAFETY"}
_STATUSES = {
    400: "INVALID_ARGUMENT", 401: "UNAUTHENTICATED", 403: "PERMISSION_DENIED", 404: "NOT_FOUND",
    429: "RESOURCE_EXHAUSTED", 500: "INTERNAL", 503: "UNAVAILABLE", 504: "DEADLINE_EXCEEDED",
}  # fmt: skip


def _response(parts: list[dict[str, Any]], **fields: Any) -> dict[str, Any]:
    candidate = {"content": {"parts": parts, "role": "model"}, **fields, "index": 0}
    return {"candidates": [candidate], "modelVersion": MODEL, "responseId": "sim"}


def _opening(answer: Answer) -> Iterator[Event]:
    for piece in answer.reasoning:
        yield Event(json(_response([{"text": piece, "thought": True}])))


def _token(answer: Answer, at: int, text: str) -> Event:
    del answer, at
    return Event(json(_response([{"text": text}])), kind="token")


def _calls(answer: Answer) -> list[dict[str, Any]]:
    if not answer.script.tool:
        return []
    arguments = msgspec.Raw(answer.script.tool_arguments.encode())
    return [{"functionCall": {"name": answer.script.tool, "args": arguments}}]


def _closing(answer: Answer, at: int) -> Iterator[Event]:
    del at
    if calls := _calls(answer):
        yield Event(json(_response(calls)))
    if answer.finish is not None:
        last = _response([{"text": ""}], finishReason=_FINISHES.get(answer.finish, answer.finish))
        yield Event(json(last | _usage(answer)), kind="finish")


def _closing_array(answer: Answer, at: int) -> Iterator[Event]:
    yield from _closing(answer, at)
    yield Event(b"]", kind="marker")


def _usage(answer: Answer) -> dict[str, Any]:
    if not answer.script.usage:
        return {}
    thought, told = len(answer.reasoning), answer.count or 0
    counted = {"promptTokenCount": answer.input_tokens, "candidatesTokenCount": told}
    if thought:
        counted["thoughtsTokenCount"] = thought
    return {"usageMetadata": counted | {"totalTokenCount": answer.input_tokens + told + thought}}


def _whole(answer: Answer) -> dict[str, Any]:
    parts: list[dict[str, Any]] = [{"text": answer.text}, *_calls(answer)]
    if answer.reasoning:
        parts.insert(0, {"text": "".join(answer.reasoning), "thought": True})
    finish = {} if answer.finish is None else {"finishReason": _FINISHES.get(answer.finish, answer.finish)}
    return _response(parts, **finish) | _usage(answer)


def _envelope(failure: Failure) -> dict[str, Any]:
    status = failure.code or _STATUSES.get(failure.status, "UNKNOWN")
    return {"error": {"code": failure.status, "message": failure.message, "status": status}}


def _error(failure: Failure, at: int) -> Event:
    del at
    return Event(json(_envelope(failure)))


def _prefix(request: Mapping[str, Any]) -> str | None:
    contents = request.get("contents")
    last = contents[-1] if isinstance(contents, list) and contents else None
    if not isinstance(last, dict) or last.get("role") != "model":
        return None
    return text_of(last.get("parts"))


GEMINI: Final = Shape(
    name="gemini",
    opening=_opening,
    token=_token,
    closing=_closing,
    whole=_whole,
    error=_error,
    envelope=_envelope,
    broken=b'{"candidates": [{"content": {"parts": [{"text": "cut',
    prefix=_prefix,
)

GEMINI_ARRAY: Final = attrs.evolve(
    GEMINI,
    name="gemini-jsonarray",
    content_type="application/json",
    framing="json-array",
    closing=_closing_array,
    beat=b"\n",
)
