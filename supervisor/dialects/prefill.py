"""Ask a chat model to go on after a text that it has already given: a prefill of the assistant's message.

OpenAI takes none: an assistant message at the end is history there, and the model begins a new answer. Of the servers that
speak its dialect many do take one, each in its own form, so which form it is has to be said of each upstream:

| form | who takes it | the request |
|---|---|---|
| `assistant` | OpenRouter (for models that can), LiteLLM to Anthropic | the last message is the assistant's |
| `prefix` | Mistral; DeepSeek under `/beta` | the last message is the assistant's and has `"prefix": true` |
| `partial` | Moonshot, Alibaba Model Studio | the last message is the assistant's and has `"partial": true` |
| `continue_final_message` | vLLM, SGLang | also `"continue_final_message": true` and `"add_generation_prompt": false` |

Where the request itself ends with a prefill of that form, its text is extended. A request is refused, with the reason,
where a joined answer would not be the answer to it: several choices, a forced tool call, JSON that is to be valid as a
whole, logprobs, thinking that would be done again, audio.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Final, Literal, get_args

from supervisor.errors import ConfigurationError

__all__ = ["PrefillForm", "chat_continuation"]

PrefillForm = Literal["assistant", "prefix", "partial", "continue_final_message"]

_GUIDED: Final = (
    "guided_choice",
    "guided_grammar",
    "guided_json",
    "guided_regex",
    "structured_outputs",
    "ebnf",
    "grammar",
    "json_schema",
    "regex",
)
"""Further names under which servers (vLLM, SGLang, llama.cpp) take what the output has to match."""
_NO_THINKING: Final = ("disabled", "minimal", "none", "off", "")


def chat_continuation(form: PrefillForm) -> Callable[[Mapping[str, Any], str], Mapping[str, Any] | str]:
    """Return the function that makes the continuing request of a chat request and the text so far.

    It returns the request, or a sentence saying why there is none; it changes nothing that it is given. Put it into the
    `continuation` of an upstream's `Asking`. Raises ConfigurationError for a form that does not exist.
    """
    if form not in get_args(PrefillForm):
        raise ConfigurationError("form", form, f"one of {', '.join(sorted(get_args(PrefillForm)))}")

    def continuation(request: Mapping[str, Any], text: str) -> Mapping[str, Any] | str:
        messages = request.get("messages")
        if not isinstance(messages, list) or not messages or not isinstance(messages[-1], Mapping):
            return "the request has no messages"
        if (reason := _refusal(request)) is not None:
            return reason
        last = messages[-1]
        if last.get("role") == "assistant" and _is_prefill(form, request, last):
            if last.get("tool_calls") or last.get("function_call"):
                return "the last message has tool calls"
            content = _extended(last.get("content"), text)
            if content is None:
                return "the last message has content that is not text"
            messages = [*messages[:-1], {**last, "content": content}]
        else:
            messages = [*messages, {"role": "assistant", "content": text}]
        if form in ("prefix", "partial"):
            messages[-1][form] = True
        changed = {**request, "messages": messages}
        if form == "continue_final_message":
            changed |= {"continue_final_message": True, "add_generation_prompt": False}
        return changed

    return continuation


def _is_prefill(form: PrefillForm, request: Mapping[str, Any], last: Mapping[str, Any]) -> bool:
    """Whether the request's own last message is one that the answer goes on from, rather than history."""
    if form == "assistant":
        return True
    if form == "continue_final_message":
        return request.get("continue_final_message") is True
    return last.get(form) is True


def _extended(content: Any, text: str) -> Any:
    """Return a message's content with the text at its end; None if it cannot have any there."""
    if content is None or isinstance(content, str):
        return (content or "") + text
    if not isinstance(content, list):
        return None
    last = content[-1] if content else None
    if isinstance(last, Mapping) and last.get("type") == "text" and isinstance(last.get("text"), str):
        return [*content[:-1], {**last, "text": last["text"] + text}]
    return [*content, {"type": "text", "text": text}]


def _refusal(request: Mapping[str, Any]) -> str | None:
    """Return why no continuation of this request would be an answer to it; None if there is nothing against it."""
    if request.get("n") not in (None, 1):
        return "n asks for more than one answer"
    choice = request.get("tool_choice")
    if choice in ("any", "required") or isinstance(choice, Mapping):
        return "tool_choice forces a tool call"
    if isinstance(request.get("function_call"), Mapping):
        return "function_call forces a function call"
    wanted = request.get("response_format")
    if isinstance(wanted, Mapping) and wanted.get("type") not in (None, "text"):
        return f"response_format asks for {wanted.get('type')}, which has to be valid as a whole"
    if (name := next((name for name in _GUIDED if request.get(name) is not None), None)) is not None:
        return f"{name} says what the whole answer has to match"
    if request.get("logprobs") not in (None, False) or request.get("top_logprobs"):
        return "logprobs of the text so far would be missing"
    if request.get("echo") not in (None, False):
        return "echo would give the text so far again"
    modalities = request.get("modalities")
    if isinstance(modalities, list) and any(kind != "text" for kind in modalities):
        return "modalities asks for more than text"
    return _thinking(request)


def _thinking(request: Mapping[str, Any]) -> str | None:
    """Return the reason if the request turns thinking on: the model would think before its answer, not within it."""
    template = request.get("chat_template_kwargs")
    for holder in (request, template if isinstance(template, Mapping) else {}):
        for name in ("thinking", "enable_thinking", "reasoning", "reasoning_effort", "include_reasoning"):
            if _turned_on(holder.get(name)):
                return f"{name} turns thinking on, which a prefill would come before"
    return None


def _turned_on(value: Any) -> bool:
    if isinstance(value, str):
        return value not in _NO_THINKING
    if isinstance(value, Mapping):
        if (
            value.get("enabled") is False
            or value.get("type") in _NO_THINKING
            or value.get("effort") == "none"
        ):
            return False
        return bool(value)
    return value is True
