"""OpenAI's legacy completions: the prompt is one text, and so is the answer."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Final

from supervisor.testing.upstream.answers.openai_chat import DONE, envelope, usage
from supervisor.testing.upstream.answers.shape import CREATED, MODEL, Answer, Event, Failure, Shape, json

__all__ = ["OPENAI_COMPLETIONS", "prompt"]


def _chunk(text: str | None, finish_reason: str | None = None) -> dict[str, Any]:
    choice = {"text": text, "index": 0, "logprobs": None, "finish_reason": finish_reason}
    return {
        "id": "cmpl-sim", "object": "text_completion", "created": CREATED, "model": MODEL,
        "choices": [] if text is None else [choice],
    }  # fmt: skip


def _opening(answer: Answer) -> Iterator[Event]:
    del answer
    return iter(())


def _token(answer: Answer, at: int, text: str) -> Event:
    del answer, at
    return Event(json(_chunk(text)), kind="token")


def _closing(answer: Answer, at: int) -> Iterator[Event]:
    del at
    if answer.script.finish_reason is not None:
        yield Event(json(_chunk("", answer.script.finish_reason)), kind="finish")
    if answer.script.usage:
        yield Event(json(_chunk(None) | {"usage": usage(answer)}), kind="usage")
    yield DONE


def _whole(answer: Answer) -> dict[str, Any]:
    return _chunk(answer.text, answer.script.finish_reason) | {"usage": usage(answer)}


def _error(failure: Failure, at: int) -> Event:
    del at
    return Event(json(envelope(failure)))


def prompt(request: Mapping[str, Any]) -> str | None:
    """Return the prompt, of a list the last."""
    value = request.get("prompt")
    if isinstance(value, list) and value:
        value = value[-1]
    return value if isinstance(value, str) else None


OPENAI_COMPLETIONS: Final = Shape(
    name="openai-completions",
    opening=_opening,
    token=_token,
    closing=_closing,
    whole=_whole,
    error=_error,
    envelope=envelope,
    broken=b'{"choices": [{"text": "cut',
    prompt=prompt,
)
