"""A plain event stream with ids, as the WHATWG standard has it: resumed by `Last-Event-ID`, paced by `retry:`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Final

from supervisor.testing.upstream.answers.openai_chat import envelope
from supervisor.testing.upstream.answers.shape import Answer, Event, Failure, Shape, json

__all__ = ["EVENTS"]


def _opening(answer: Answer) -> Iterator[Event]:
    del answer
    return iter(())


def _token(answer: Answer, at: int, text: str) -> Event:
    retry_ms = None if at else answer.script.retry_ms
    return Event(json({"text": text}), id=str(at + 1), kind="token", retry_ms=retry_ms)


def _closing(answer: Answer, at: int) -> Iterator[Event]:
    if answer.script.finish_reason is not None:
        last = {"finish_reason": answer.script.finish_reason} | _usage(answer)
        yield Event(json(last), id=str(at + 1), kind="finish")
        at += 1
    yield Event(b"[DONE]", id=str(at + 1), kind="marker")


def _usage(answer: Answer) -> dict[str, Any]:
    if not answer.script.usage:
        return {}
    return {"usage": {"input_tokens": answer.input_tokens, "output_tokens": answer.output_tokens}}


def _whole(answer: Answer) -> dict[str, Any]:
    return {"text": answer.text, "finish_reason": answer.script.finish_reason} | _usage(answer)


def _error(failure: Failure, at: int) -> Event:
    del at
    return Event(json(envelope(failure)), name="error")


EVENTS: Final = Shape(
    name="generic",
    opening=_opening,
    token=_token,
    closing=_closing,
    whole=_whole,
    error=_error,
    envelope=envelope,
    broken=b'{"text":"cut',
    numbered=True,
)
