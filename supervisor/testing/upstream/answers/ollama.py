"""Ollama's `/api/chat` and `/api/generate`: a JSON object a line, the last of them with `done: true` and the counts."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, Final

import msgspec

from supervisor.testing.upstream.answers.openai_chat import messages_prefix
from supervisor.testing.upstream.answers.openai_completions import prompt
from supervisor.testing.upstream.answers.shape import MODEL, Answer, Event, Failure, Shape, json

__all__ = ["OLLAMA_CHAT", "OLLAMA_GENERATE"]

_CREATED = "2025-01-01T00:00:00.000000Z"
_DONE = {"tool_calls": "stop"}


def _said(text: str, **fields: Any) -> dict[str, Any]:
    return {"message": {"role": "assistant", "content": text, **fields}}


def _generated(text: str, **fields: Any) -> dict[str, Any]:
    return {"response": text, **fields}


def _line(said: Mapping[str, Any], *, done: bool = False, **fields: Any) -> dict[str, Any]:
    return {"model": MODEL, "created_at": _CREATED, **said, "done": done, **fields}


def _ending(answer: Answer) -> dict[str, Any]:
    counts: dict[str, Any] = {"total_duration": 5_000_000, "load_duration": 1_000_000}
    if answer.script.usage:
        counts |= {"prompt_eval_count": answer.input_tokens, "prompt_eval_duration": 1_000_000}
        counts |= {"eval_count": answer.output_tokens, "eval_duration": 3_000_000}
    finish = answer.finish
    return {"done_reason": _DONE.get(finish, finish)} | counts if finish is not None else counts


def _shape(
    said: Callable[..., dict[str, Any]], calls_of: Callable[[Answer], dict[str, Any]], **fields: Any
) -> Shape:
    def opening(answer: Answer) -> Iterator[Event]:
        for piece in answer.reasoning:
            yield Event(json(_line(said("", thinking=piece))))

    def token(answer: Answer, at: int, text: str) -> Event:
        del answer, at
        return Event(json(_line(said(text))), kind="token")

    def closing(answer: Answer, at: int) -> Iterator[Event]:
        del at
        if calls := calls_of(answer):
            yield Event(json(_line(said("", **calls))))
        if answer.finish is not None:
            yield Event(json(_line(said(""), done=True, **_ending(answer))), kind="marker")

    def whole(answer: Answer) -> dict[str, Any]:
        thought = {"thinking": "".join(answer.reasoning)} if answer.reasoning else {}
        return _line(said(answer.text, **thought, **calls_of(answer)), done=True, **_ending(answer))

    return Shape(
        name="ollama",
        content_type="application/x-ndjson",
        framing="ndjson",
        opening=opening,
        token=token,
        closing=closing,
        whole=whole,
        error=_error,
        envelope=_envelope,
        broken=json(_line(said("cut")))[:-12],
        beat=b"\n",
        **fields,
    )


def _calls(answer: Answer) -> dict[str, Any]:
    if not answer.script.tool:
        return {}
    arguments = msgspec.Raw(answer.script.tool_arguments.encode())
    return {"tool_calls": [{"function": {"name": answer.script.tool, "arguments": arguments}}]}


def _no_calls(answer: Answer) -> dict[str, Any]:
    """Return nothing: a text is generated, and calls no tool."""
    del answer
    return {}


def _envelope(failure: Failure) -> dict[str, Any]:
    return {"error": failure.message}


def _error(failure: Failure, at: int) -> Event:
    del at
    return Event(json(_envelope(failure)))


OLLAMA_CHAT: Final = _shape(_said, _calls, prefix=messages_prefix)
OLLAMA_GENERATE: Final = _shape(_generated, _no_calls, prompt=prompt)
