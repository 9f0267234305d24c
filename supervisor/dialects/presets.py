"""`generic` for providers' streams that are read for their text, ending, errors and usage only.

Their tool calls, and whatever else their APIs have, are not read. Who needs that wants a dialect of its own.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from supervisor.dialects.dialect import named_model
from supervisor.dialects.generic import generic

__all__ = ["COHERE_V1_NDJSON", "GOOGLE_INTERACTIONS", "OPENAI_ASSISTANTS"]


def _message(prompt: str, model: str | None) -> Mapping[str, Any]:
    return {**({} if model is None else {"model": model}), "message": prompt, "stream": True}


def _input(prompt: str, model: str | None) -> Mapping[str, Any]:
    return {"model": named_model(model), "input": prompt, "stream": True}


COHERE_V1_NDJSON: Final = generic(
    "cohere-v1-ndjson",
    framing="ndjson",
    text="/text",
    reasoning=(),
    error=("/error", "error"),
    finish=("/finish_reason", "/response/finish_reason"),
    done=("/is_finished=true", "stream-end"),
    input_tokens=("/response/meta/tokens/input_tokens", "/response/meta/billed_units/input_tokens"),
    output_tokens=("/response/meta/tokens/output_tokens", "/response/meta/billed_units/output_tokens"),
    prompt=_message,
)
"""Cohere's Chat API, version 1 (Cohere API reference, "Chat with Streaming (V1)")."""

GOOGLE_INTERACTIONS: Final = generic(
    "google-interactions",
    text=("/delta/text",),
    reasoning=("/delta/content/text", "/delta/thought"),
    error=("/error", "/interaction/error", "error", "interaction.failed"),
    finish="/interaction/status",
    done=("interaction.completed", "interaction.complete", "[DONE]"),
    input_tokens="/interaction/usage/total_input_tokens",
    output_tokens="/interaction/usage/total_output_tokens",
    prompt=_input,
)
"""The Interactions API of Gemini (Google AI for Developers, "Streaming interactions")."""

OPENAI_ASSISTANTS: Final = generic(
    "openai-assistants",
    text="/delta/content/0/text/value",
    reasoning=(),
    error=(
        "/error",
        "/last_error",
        "error",
        "thread.run.failed",
        "thread.run.expired",
        "thread.run.cancelled",
    ),
    finish="/incomplete_details/reason",
    done=("done", "[DONE]"),
    input_tokens="/usage/prompt_tokens",
    output_tokens="/usage/completion_tokens",
    prompt=None,  # a run belongs to a thread, and to an assistant
)
"""The streams of runs of OpenAI's Assistants API (OpenAI API reference, "Assistants", "Streaming")."""
