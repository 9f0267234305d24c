"""OpenAI's legacy Completions, as streamed by OpenAI and by the servers that still offer it.

The wire is that of chat: server-sent events, each with a chunk, and `data: [DONE]` at the end (OpenAI API reference,
"Completions"). A choice has its `text` instead of a `delta`. What the imitations do differently is read here:

- a choice in the shape of chat (`delta`, `message`), from servers that answer both paths with one function;
- reasoning in `reasoning` or `reasoning_content`, where the server takes it out of the text;
- the streams that llama.cpp's server and text-generation-inference send under their own names: an object with `content` and
  `stop`, and an object with a `token`. Both end without `[DONE]`.

With `echo` the prompt comes back as the first text; it is text like any other, because nothing marks it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

import msgspec

from supervisor.dialects import lenient
from supervisor.dialects.base import Delta, UnparseableError
from supervisor.dialects.dialect import Asking, Dialect, Endings, named_model
from supervisor.dialects.faults import http_fault
from supervisor.dialects.openai_chat import chat_part
from supervisor.dialects.openai_chunks import ODD_FINISHES, ChunkReader, Part, choices_of, finish_of, usage_of

__all__ = ["OPENAI_COMPLETIONS"]


class _WireChoice(msgspec.Struct, gc=False):
    text: str
    index: int | None = None
    finish_reason: str | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None
    delta: None = None
    message: None = None
    error: None = None
    usage: None = None


class _WireChunk(msgspec.Struct, gc=False):
    choices: list[_WireChoice]
    usage: dict[str, Any] | None = None
    model: str | None = None
    id: str | None = None
    error: None = None
    errors: None = None
    x_groq: None = None


_decode_chunk = msgspec.json.Decoder(_WireChunk).decode


class _CompletionsReader(ChunkReader):
    __slots__ = ()

    def read(self, data: bytes, event: str = "message") -> tuple[Delta, ...]:
        """Say what one event means. Raises UnparseableError, and is then as it was before."""
        if event != "message" and event and (named := self.read_named(data, event)) is not None:
            return named
        try:
            chunk = _decode_chunk(data)
        except (ValueError, RecursionError):
            return self.read_tolerant(data)
        choices = chunk.choices
        if self._first is not None and len(choices) == 1 and chunk.usage is None:
            choice = choices[0]
            if (
                choice.text
                and not choice.finish_reason
                and not choice.index
                and not (choice.reasoning_content or choice.reasoning)
            ):
                return (Delta(choice.text),)
        if not choices:
            # An empty list is usage, a keep-alive, or an odd error.
            return self.read_tolerant(data)
        parts = []
        for choice in choices:
            finish = choice.finish_reason or None
            if finish is not None and finish in ODD_FINISHES:
                return self.read_tolerant(data)
            reasoning = choice.reasoning_content or choice.reasoning or ""
            parts.append(Part(choice.index or 0, choice.text, reasoning, finish_reason=finish))
        return self.take(parts, usage_of(chunk.usage), chunk.model, chunk.id)

    def part(self, choice: Any) -> Part:
        """Read one choice, as generic JSON."""
        if not isinstance(choice, dict):
            raise UnparseableError("a choice is not an object")
        if choice.get("text") is None and (choice.get("delta") or choice.get("message")):
            return chat_part(choice)
        reasoning = choice.get("reasoning_content") or choice.get("reasoning")
        return Part(
            lenient.index(choice.get("index")) or 0,
            lenient.text(choice.get("text"), "text"),
            lenient.text(reasoning, "reasoning"),
            finish_reason=finish_of(choice.get("finish_reason")),
        )

    def envelope(self, value: dict[str, Any]) -> dict[str, Any]:
        """Return the chunk that an object in a server's own shape is."""
        if "choices" in value:
            return value
        if isinstance(value.get("stop"), bool) and isinstance(value.get("content"), str):
            return _from_llama_cpp(value)
        if isinstance(value.get("token"), dict):
            return _from_text_generation_inference(value)
        return value


def _from_llama_cpp(value: dict[str, Any]) -> dict[str, Any]:
    """Read an event of llama.cpp's own `/completion` (its server's README, "Result JSON")."""
    finish = None
    if value["stop"]:
        limited = value.get("stopped_limit") is True or value.get("stop_type") == "limit"
        finish = "length" if limited else "stop"
    usage = {
        "prompt_tokens": value.get("tokens_evaluated"),
        "completion_tokens": value.get("tokens_predicted"),
    }
    return {
        "choices": [{"text": value["content"], "index": value.get("index"), "finish_reason": finish}],
        "usage": usage if finish else None,
        "model": value.get("model"),
    }


def _from_text_generation_inference(value: dict[str, Any]) -> dict[str, Any]:
    """Read an event of text-generation-inference's own `/generate_stream` (its API's `StreamResponse`)."""
    token = value["token"]
    text = "" if token.get("special") is True else token.get("text")
    details = value.get("details")
    if not isinstance(details, dict):
        details = {}
    finish = details.get("finish_reason")
    if finish is None and isinstance(value.get("generated_text"), str):
        finish = "stop"
    # `index` counts tokens here, not choices.
    return {
        "choices": [{"text": text, "finish_reason": finish}],
        "usage": {"completion_tokens": details.get("generated_tokens")},
    }


def _continuation(request: Mapping[str, Any], text: str) -> Mapping[str, Any] | str:
    """Make the request whose prompt ends with the text so far: what this API was made for."""
    prompt = request.get("prompt")
    alone = prompt[0] if isinstance(prompt, list) and len(prompt) == 1 else prompt
    if not isinstance(alone, str):
        return "the prompt is not one text"
    for name in ("n", "best_of"):
        if request.get(name) not in (None, 1):
            return f"{name} asks for more than one answer"
    if request.get("echo") not in (None, False):
        return "echo would give the text so far again"
    if request.get("suffix"):
        return "the answer is to be inserted before a suffix"
    if request.get("logprobs") is not None:
        return "logprobs of the text so far would be missing, and the offsets of the rest wrong"
    return {**request, "prompt": alone + text}


def _prompt(prompt: str, model: str | None) -> Mapping[str, Any]:
    return {"model": named_model(model), "prompt": prompt}


OPENAI_COMPLETIONS: Final = Dialect(
    name="openai-completions",
    framing="sse",
    reader=_CompletionsReader,
    fault=http_fault,
    endings=Endings(
        markers=("[DONE]",),
        well="`[DONE]`; or, without it, a finish reason for every choice seen and then the end of the body (for every one asked for, if the connection is lost)",
        incomplete={
            "length": "the limit of tokens was reached",
            "content_filter": "the provider's filter cut the answer off",
        },
        errors=(
            "an `error` in a chunk, also after a finish reason, or in a choice",
            "an event named `error`",
            "an object that calls itself an error, or is only a message, where an event should be",
            "a finish reason `error`",
        ),
    ),
    asking=Asking(path="/completions", prompt=_prompt, choices=choices_of, continuation=_continuation),
    abort_stops_billing=True,
    usage_rule="with `stream_options.include_usage`, in a chunk of its own before `[DONE]`; on every chunk it is a running total",
)
