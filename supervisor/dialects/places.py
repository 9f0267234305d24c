"""What a generic dialect looks for in a server's JSON, and where such things commonly stand."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

import attrs
import msgspec

from supervisor.dialects.pointers import MISSING, Pointer, pointer
from supervisor.errors import ConfigurationError

__all__ = [
    "DONE",
    "ERROR",
    "FINISH",
    "INPUT_TOKENS",
    "OUTPUT_TOKENS",
    "REASONING",
    "TEXT",
    "Places",
    "markers",
    "pointers",
    "strings",
]

TEXT: Final = (
    "",
    "/choices/0/delta/content",
    "/choices/0/text",
    "/delta/text",
    "/delta/content",
    "/delta/content/0/text/value",
    "/delta/message/content/text",
    "/delta",
    "/message/content",
    "/candidates/0/content/parts/0/text",
    "/token/text",
    "/text",
    "/content",
    "/response",
    "/completion",
    "/answer",
    "/token",
    "/generated_text",
    "/generation",
    "/outputText",
    "/output",
    "/output/text",
    "/output/choices/0/message/content",
    "/result/text",
    "/result/response",
    "/result",
    "/data/text",
    "/data/content",
    "/data/delta",
    "/data",
    "/chunk",
    "/chunk/text",
    "/value",
    "/message",
)
"""Where the text of an event commonly stands."""

REASONING: Final = (
    "/choices/0/delta/reasoning_content",
    "/choices/0/delta/reasoning",
    "/delta/thinking",
    "/delta/reasoning",
    "/delta/reasoning_content",
    "/message/thinking",
    "/message/reasoning_content",
    "/thinking",
    "/reasoning",
    "/reasoning_content",
)
"""Where the text of reasoning commonly stands. Text of an event or delta whose `type` speaks of thinking is reasoning, too."""

ERROR: Final = (
    "/error",
    "/errors",
    "/last_error",
    "/response/error",
    "/error_message",
    "error",
    "exception",
    "failed",
    "response.failed",
)
"""Where errors commonly stand, and the names of events that are errors."""

FINISH: Final = (
    "/choices/0/finish_reason",
    "/finish_reason",
    "/done_reason",
    "/stop_reason",
    "/delta/finish_reason",
    "/delta/stop_reason",
    "/candidates/0/finishReason",
    "/finishReason",
    "/completionReason",
    "/response/finish_reason",
    "/incomplete_details/reason",
    "/token/finish_reason",
    "/details/finish_reason",
)
"""Where the finish reason commonly stands."""

DONE: Final = (
    "[DONE]",
    "[END]",
    "/done=true",
    "/is_finished=true",
    "/finished=true",
    "/is_final=true",
    "/is_end=true",
    "/stop=true",
    "done",
    "end",
    "complete",
    "completed",
    "close",
    "finish",
    "finished",
    "message_stop",
    "message_end",
    "message-end",
    "stream-end",
    "stream_end",
    "response.completed",
    "interaction.completed",
    "interaction.complete",
)
"""What commonly ends an answer."""

INPUT_TOKENS: Final = (
    "/usage/prompt_tokens",
    "/usage/input_tokens",
    "/message/usage/input_tokens",
    "/prompt_eval_count",
    "/usageMetadata/promptTokenCount",
    "/interaction/usage/total_input_tokens",
    "/response/usage/input_tokens",
    "/response/meta/tokens/input_tokens",
    "/delta/usage/tokens/input_tokens",
    "/tokens_evaluated",
    "/metadata/usage/prompt_tokens",
)
"""Where the number of input tokens commonly stands."""

OUTPUT_TOKENS: Final = (
    "/usage/completion_tokens",
    "/usage/output_tokens",
    "/eval_count",
    "/usageMetadata/candidatesTokenCount",
    "/interaction/usage/total_output_tokens",
    "/response/usage/output_tokens",
    "/response/meta/tokens/output_tokens",
    "/delta/usage/tokens/output_tokens",
    "/details/generated_tokens",
    "/tokens_predicted",
    "/metadata/usage/completion_tokens",
)
"""Where the number of output tokens commonly stands."""


@attrs.frozen(kw_only=True)
class Places:
    """Where things stand, in the form in which the reader uses it."""

    text: tuple[Pointer, ...]
    plain: bool
    reasoning: tuple[Pointer, ...]
    errors: tuple[Pointer, ...]
    error_names: frozenset[str]
    guess_errors: bool
    finish: tuple[Pointer, ...]
    input: tuple[Pointer, ...]
    output: tuple[Pointer, ...]
    done: tuple[tuple[Pointer, Any], ...]
    done_data: frozenset[bytes]
    done_names: frozenset[str]


def strings(field: str, value: object) -> tuple[str, ...]:
    """Return what may be one string or several. Raises ConfigurationError, naming the field, for anything else."""
    if isinstance(value, str):
        return (value,)
    if not isinstance(value, Sequence) or not all(isinstance(one, str) for one in value):
        raise ConfigurationError(field, value, "a string or a list of strings")
    return tuple(value)


def pointers(field: str, value: str | Sequence[str]) -> tuple[Pointer, ...]:
    """Return one JSON pointer or several. Raises ConfigurationError, naming the field."""
    return tuple(pointer(field, one) for one in strings(field, value))


def markers(value: str | Sequence[str]) -> tuple[list[tuple[Pointer, Any]], set[bytes], set[str]]:
    """Return the markers told apart: places with the values that stand there, data, and names of events."""
    places: list[tuple[Pointer, Any]] = []
    data: set[bytes] = set()
    names: set[str] = set()
    for one in strings("done", value):
        if one.startswith("/"):
            where, sign, wanted = one.partition("=")
            try:
                expected = msgspec.json.decode(wanted.encode()) if sign else MISSING
            except (ValueError, RecursionError):
                raise ConfigurationError(
                    "done", one, 'a pointer and a JSON value, such as "/done=true"'
                ) from None
            places.append((pointer("done", where), expected))
        elif one.startswith("data:") or (one.startswith("[") and one.endswith("]")):
            text = one.removeprefix("data:").strip()
            if not text:
                raise ConfigurationError("done", one, "the data that ends the answer, after `data:`")
            data.add(text.encode())
        elif one and not one.isspace():
            names.add(one.casefold())
        else:
            raise ConfigurationError("done", one, 'a marker such as "[DONE]", "/done=true" or "message_stop"')
    return places, data, names
