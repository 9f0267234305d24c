"""How a chat model is asked to go on after a text, and when it is not."""

from __future__ import annotations

import json
from typing import Any, get_args

import pytest

from supervisor.dialects.openai_chat import OPENAI_CHAT
from supervisor.dialects.prefill import PrefillForm, chat_continuation
from supervisor.errors import ConfigurationError

USER = {"role": "user", "content": "Tell me."}
EXTRA: dict[str, dict[str, Any]] = {
    "continue_final_message": {"continue_final_message": True, "add_generation_prompt": False}
}
FLAG: dict[str, dict[str, Any]] = {"prefix": {"prefix": True}, "partial": {"partial": True}}
FORMS: tuple[PrefillForm, ...] = get_args(PrefillForm)

each = pytest.mark.parametrize("form", FORMS)


def ask(form: PrefillForm, text: str = "Once", **fields: Any) -> Any:
    """Return what becomes of a request, having checked that it was not changed itself."""
    request = {"model": "m", "messages": [USER], "temperature": 0, **fields}
    before = json.dumps(request)
    told = chat_continuation(form)(request, text)
    assert before == json.dumps(request)
    return told


@each
def test_the_text_becomes_the_assistants_message(form: PrefillForm) -> None:
    """Each form says in its own way that the last message is to be gone on from; nothing else changes."""
    message = {"role": "assistant", "content": "Once", **FLAG.get(form, {})}
    expected = {"model": "m", "messages": [USER, message], "temperature": 0, **EXTRA.get(form, {})}
    assert ask(form) == expected


@each
@pytest.mark.parametrize(
    ("content", "joined"),
    [
        ("Well, ", "Well, Once"),
        (None, "Once"),
        (
            [{"type": "text", "text": "W"}, {"type": "text", "text": "ell, "}],
            [{"type": "text", "text": "W"}, {"type": "text", "text": "ell, Once"}],
        ),
        (
            [{"type": "refusal", "refusal": "x"}],
            [{"type": "refusal", "refusal": "x"}, {"type": "text", "text": "Once"}],
        ),
        ([], [{"type": "text", "text": "Once"}]),
    ],
)
def test_a_prefill_of_the_request_is_extended(form: PrefillForm, content: Any, joined: Any) -> None:
    """Where the request ends with a prefill of this form already, the answer so far comes after it."""
    last = {"role": "assistant", "content": content, **FLAG.get(form, {})}
    told = ask(form, messages=[USER, last], **EXTRA.get(form, {}))
    assert told["messages"] == [USER, {**last, "content": joined}]


@pytest.mark.parametrize("form", ["prefix", "partial", "continue_final_message"])
def test_an_assistants_message_that_is_history(form: PrefillForm) -> None:
    """Without the form's own sign the model began a new message after it, and so does the text so far."""
    last = {"role": "assistant", "content": "Well."}
    told = ask(form, messages=[USER, last])
    assert told["messages"] == [USER, last, {"role": "assistant", "content": "Once", **FLAG.get(form, {})}]


@each
@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"messages": []}, "messages"),
        ({"messages": None}, "messages"),
        ({"messages": ["x"]}, "messages"),
        ({"n": 2}, "n asks"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tool_choice": "any"}, "tool_choice"),
        ({"tool_choice": {"type": "function", "function": {"name": "f"}}}, "tool_choice"),
        ({"function_call": {"name": "f"}}, "function_call"),
        ({"response_format": {"type": "json_object"}}, "json_object"),
        ({"response_format": {"type": "json_schema", "json_schema": {}}}, "json_schema"),
        ({"guided_json": {}}, "guided_json"),
        ({"structured_outputs": {"regex": "x"}}, "structured_outputs"),
        ({"regex": "a+"}, "regex"),
        ({"logprobs": True}, "logprobs"),
        ({"top_logprobs": 2}, "logprobs"),
        ({"echo": True}, "echo"),
        ({"modalities": ["text", "audio"]}, "modalities"),
        ({"thinking": {"type": "enabled"}}, "thinking"),
        ({"enable_thinking": True}, "thinking"),
        ({"reasoning_effort": "high"}, "reasoning_effort"),
        ({"reasoning": {"effort": "low"}}, "reasoning"),
        ({"chat_template_kwargs": {"enable_thinking": True}}, "enable_thinking"),
    ],
)
def test_requests_that_are_refused(form: PrefillForm, fields: dict[str, Any], reason: str) -> None:
    """What a joined text would not be an answer to has a reason instead."""
    told = ask(form, **fields)
    assert isinstance(told, str)
    assert reason in told


@each
@pytest.mark.parametrize(
    "fields",
    [
        {"n": 1, "tools": [{"type": "function"}], "tool_choice": "auto", "function_call": "none"},
        {
            "response_format": {"type": "text"},
            "logprobs": False,
            "top_logprobs": None,
            "modalities": ["text"],
        },
        {"thinking": {"type": "disabled"}, "enable_thinking": False, "reasoning_effort": "none"},
        {
            "reasoning": {"enabled": False},
            "chat_template_kwargs": {"thinking": False},
            "include_reasoning": False,
        },
        {"reasoning": {"effort": "none"}, "thinking": None, "echo": False},
    ],
)
def test_requests_that_only_look_so(form: PrefillForm, fields: dict[str, Any]) -> None:
    """The same options turned off are no reason."""
    told = ask(form, **fields)
    assert told["messages"][-1]["content"] == "Once"
    assert {name: told[name] for name in fields} == fields


@each
@pytest.mark.parametrize(
    ("last", "reason"),
    [
        ({"content": "x", "tool_calls": [{"id": "1"}]}, "tool calls"),
        ({"content": 5}, "not text"),
    ],
)
def test_a_last_message_that_cannot_go_on(form: PrefillForm, last: dict[str, Any], reason: str) -> None:
    """A prefill with tool calls, or with content of no known shape, is not extended."""
    told = ask(
        form, messages=[USER, {"role": "assistant", **last, **FLAG.get(form, {})}], **EXTRA.get(form, {})
    )
    assert isinstance(told, str)
    assert reason in told


def test_the_form_has_to_be_said() -> None:
    """OpenAI takes no prefill, so the dialect has no continuation of its own, and a form must be one that exists."""
    assert OPENAI_CHAT.asking.continuation is None
    with pytest.raises(ConfigurationError, match="form"):
        chat_continuation("suffix")  # type: ignore[arg-type]  # what is to be refused
