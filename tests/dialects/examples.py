"""Bodies of each built-in dialect, written from the providers' documentation: what `check_dialect` is given."""

from __future__ import annotations

import json
from typing import Any

import attrs

from tests.dialects.bodies import event


@attrs.frozen
class Bodies:
    """The arguments of `check_dialect`."""

    streams: list[tuple[bytes, str]]
    incomplete: list[bytes]
    errors: list[bytes]


def events(*values: Any) -> bytes:
    """Return an event stream whose events have no names; a str is sent as it is."""
    return b"".join(event(value) for value in values)


def named(*values: dict[str, Any]) -> bytes:
    """Return an event stream whose events are named after their `type`."""
    return b"".join(event(value, value["type"]) for value in values)


def lines(*values: Any) -> bytes:
    return b"".join(json.dumps(value).encode() + b"\n" for value in values)


def array(*values: Any) -> bytes:
    return b"[" + b"\n,\r\n".join(json.dumps(value, indent=1).encode() for value in values) + b"\n]\n"


# --- OpenAI ----------------------------------------------------------------------------------------------------------


def chat(delta: dict[str, Any], finish: str | None = None, index: int = 0, **fields: Any) -> dict[str, Any]:
    return {
        "id": "chatcmpl-1",
        "object": "chat.completion.chunk",
        "model": "m-1",
        "choices": [{"index": index, "delta": delta, "finish_reason": finish}],
        **fields,
    }


def piece(index: int, arguments: str, **more: Any) -> dict[str, Any]:
    function = {"arguments": arguments, **({"name": more.pop("name")} if "name" in more else {})}
    return {"tool_calls": [{"index": index, "function": function, **more}]}


CHAT_USAGE = {
    "id": "chatcmpl-1",
    "object": "chat.completion.chunk",
    "model": "m-1",
    "choices": [],
    "usage": {
        "prompt_tokens": 9,
        "completion_tokens": 5,
        "completion_tokens_details": {"reasoning_tokens": 2},
        "prompt_tokens_details": {"cached_tokens": 4},
    },
}
CHAT = Bodies(
    streams=[
        (
            events(
                chat({"role": "assistant", "content": ""}),
                chat({"reasoning_content": "Hm. "}),
                chat({"content": "Good "}),
                chat({"content": "day, «é»"}),
                chat({}, "stop"),
                CHAT_USAGE,
                "[DONE]",
            ),
            "Good day, «é»",
        ),
        (
            events(
                chat({"content": "One"}),
                chat({"content": "Uno"}, index=1),
                chat({"refusal": "No."}, index=1),
                chat({}, "stop", index=1),
                chat({}, "stop"),
                "[DONE]",
            ),
            "One",
        ),
        (
            events(
                chat(piece(0, "", id="call_a", type="function", name="look")),
                chat(piece(0, '{"at":')),
                chat(piece(0, '"sea"}')),
                chat(piece(1, "", id="call_b", type="function", name="list")),
                chat(piece(1, "{}")),
                chat({}, "tool_calls"),
                "[DONE]",
            ),
            "",
        ),
    ],
    incomplete=[events(chat({"content": "Once upon"}), chat({}, "length"), CHAT_USAGE, "[DONE]")],
    errors=[
        events(
            chat({"content": "Once"}),
            {"error": {"message": "Slow down", "type": "rate_limit_error", "code": 429}},
        ),
        events(
            chat({"content": "Once"}),
            chat({}, "stop"),
            {"error": {"message": "Late", "type": "server_error"}},
        ),
        json.dumps({"error": {"message": "No such model", "type": "invalid_request_error"}}).encode(),
    ],
)


def completion(text: str, finish: str | None = None, index: int = 0) -> dict[str, Any]:
    choice = {"index": index, "text": text, "logprobs": None, "finish_reason": finish}
    return {"id": "cmpl-1", "object": "text_completion", "model": "m-1", "choices": [choice]}


COMPLETIONS = Bodies(
    streams=[
        (
            events(
                completion("Good "),
                completion("day"),
                completion("", "stop"),
                {**completion(""), "choices": [], "usage": {"prompt_tokens": 3, "completion_tokens": 2}},
                "[DONE]",
            ),
            "Good day",
        ),
        (events(completion("a"), completion("b", "stop", 1), completion("c", "stop"), "[DONE]"), "ac"),
    ],
    incomplete=[events(completion("Once upon", "length"), "[DONE]")],
    errors=[
        events(completion("Once"), {"error": {"message": "The engine is overloaded", "type": "server_error"}})
    ],
)


def response(status: str, **fields: Any) -> dict[str, Any]:
    return {
        "id": "resp_1",
        "object": "response",
        "model": "m-1",
        "status": status,
        "output": [],
        "usage": None,
        **fields,
    }


def responses(*told: dict[str, Any]) -> bytes:
    return named(*({**value, "sequence_number": number} for number, value in enumerate(told)))


def message(text: str) -> list[dict[str, Any]]:
    """Return the events of one message, its text in two pieces and then told three times more."""
    at = {"item_id": "msg_1", "output_index": 0, "content_index": 0}
    part = {"type": "output_text", "text": text, "annotations": []}
    item = {"id": "msg_1", "type": "message", "role": "assistant"}
    half = len(text) // 2
    return [
        {"type": "response.created", "response": response("in_progress")},
        {
            "type": "response.output_item.added",
            "output_index": 0,
            "item": {**item, "status": "in_progress", "content": []},
        },
        {"type": "response.content_part.added", **at, "part": {**part, "text": ""}},
        {"type": "response.output_text.delta", **at, "delta": text[:half]},
        {"type": "response.output_text.delta", **at, "delta": text[half:]},
        {"type": "response.output_text.done", **at, "text": text},
        {"type": "response.content_part.done", **at, "part": part},
        {
            "type": "response.output_item.done",
            "output_index": 0,
            "item": {**item, "status": "completed", "content": [part]},
        },
    ]


ITEM = {
    "id": "msg_1",
    "type": "message",
    "role": "assistant",
    "status": "completed",
    "content": [{"type": "output_text", "text": "Good day", "annotations": []}],
}
CALL = {"id": "fc_1", "type": "function_call", "call_id": "call_1", "name": "look", "status": "in_progress"}
RESPONSES_USAGE = {
    "input_tokens": 9,
    "input_tokens_details": {"cached_tokens": 4},
    "output_tokens": 5,
    "output_tokens_details": {"reasoning_tokens": 2},
    "total_tokens": 14,
}
RESPONSES = Bodies(
    streams=[
        (
            responses(
                *message("Good day"),
                {
                    "type": "response.completed",
                    "response": response("completed", output=[ITEM], usage=RESPONSES_USAGE),
                },
            ),
            "Good day",
        ),
        (
            responses(
                {"type": "response.created", "response": response("in_progress")},
                {"type": "response.output_item.added", "output_index": 0, "item": {**CALL, "arguments": ""}},
                {
                    "type": "response.function_call_arguments.delta",
                    "item_id": "fc_1",
                    "output_index": 0,
                    "delta": '{"at":',
                },
                {
                    "type": "response.function_call_arguments.delta",
                    "item_id": "fc_1",
                    "output_index": 0,
                    "delta": '"sea"}',
                },
                {
                    "type": "response.function_call_arguments.done",
                    "item_id": "fc_1",
                    "output_index": 0,
                    "arguments": '{"at":"sea"}',
                },
                {
                    "type": "response.output_item.done",
                    "output_index": 0,
                    "item": {**CALL, "arguments": '{"at":"sea"}', "status": "completed"},
                },
                {
                    "type": "response.completed",
                    "response": response(
                        "completed", output=[{**CALL, "arguments": '{"at":"sea"}'}], usage=RESPONSES_USAGE
                    ),
                },
            ),
            "",
        ),
    ],
    incomplete=[
        responses(
            *message("Once upon")[:5],
            {
                "type": "response.incomplete",
                "response": response("incomplete", incomplete_details={"reason": "max_output_tokens"}),
            },
        )
    ],
    errors=[
        responses(
            *message("Once upon")[:5],
            {
                "type": "response.failed",
                "response": response("failed", error={"code": "server_error", "message": "The model failed"}),
            },
        ),
        responses({"type": "error", "code": "rate_limit_exceeded", "message": "Slow down", "param": None}),
    ],
)

# --- Anthropic -------------------------------------------------------------------------------------------------------


def claude(*told: dict[str, Any], stop: str = "end_turn") -> bytes:
    start = {
        "id": "msg_1",
        "type": "message",
        "role": "assistant",
        "content": [],
        "model": "m-1",
        "stop_reason": None,
    }
    return named(
        {"type": "message_start", "message": {**start, "usage": {"input_tokens": 9, "output_tokens": 1}}},
        {"type": "ping"},
        *told,
        {
            "type": "message_delta",
            "delta": {"stop_reason": stop, "stop_sequence": None},
            "usage": {"output_tokens": 5},
        },
        {"type": "message_stop"},
    )


def block(index: int, start: dict[str, Any], *deltas: dict[str, Any]) -> list[dict[str, Any]]:
    return [
        {"type": "content_block_start", "index": index, "content_block": start},
        *({"type": "content_block_delta", "index": index, "delta": delta} for delta in deltas),
        {"type": "content_block_stop", "index": index},
    ]


def claude_text(index: int, *pieces: str) -> list[dict[str, Any]]:
    return block(
        index, {"type": "text", "text": ""}, *({"type": "text_delta", "text": text} for text in pieces)
    )


ANTHROPIC = Bodies(
    streams=[
        (
            claude(
                *block(
                    0,
                    {"type": "thinking", "thinking": "", "signature": ""},
                    {"type": "thinking_delta", "thinking": "Hm. "},
                    {"type": "signature_delta", "signature": "c2ln"},
                ),
                *claude_text(1, "Good ", "day"),
            ),
            "Good day",
        ),
        (
            claude(
                *claude_text(0, "Let me see."),
                *block(
                    1,
                    {"type": "tool_use", "id": "toolu_1", "name": "look", "input": {}},
                    {"type": "input_json_delta", "partial_json": ""},
                    {"type": "input_json_delta", "partial_json": '{"at":'},
                    {"type": "input_json_delta", "partial_json": '"sea"}'},
                ),
                *block(2, {"type": "tool_use", "id": "toolu_2", "name": "list", "input": {}}),
                stop="tool_use",
            ),
            "Let me see.",
        ),
    ],
    incomplete=[claude(*claude_text(0, "Once ", "upon"), stop="max_tokens")],
    errors=[
        claude(*claude_text(0, "Once"))[:-50].rpartition(b"event: message_delta")[0]
        + event({"type": "error", "error": {"type": "overloaded_error", "message": "Overloaded"}}, "error"),
        json.dumps(
            {"type": "error", "error": {"type": "invalid_request_error", "message": "max_tokens: required"}}
        ).encode(),
    ],
)

# --- Gemini ----------------------------------------------------------------------------------------------------------


def gemini(*parts: dict[str, Any], finish: str | None = None, spent: int | None = None) -> dict[str, Any]:
    candidate: dict[str, Any] = {"content": {"parts": list(parts), "role": "model"}, "index": 0}
    if finish:
        candidate["finishReason"] = finish
    told: dict[str, Any] = {"candidates": [candidate], "modelVersion": "m-1", "responseId": "r-1"}
    if spent is not None:
        told["usageMetadata"] = {
            "promptTokenCount": 9,
            "candidatesTokenCount": spent,
            "thoughtsTokenCount": 2,
        }
    return told


GEMINI_STREAMS = [
    (
        [
            gemini({"text": "Hm.", "thought": True}),
            gemini({"text": "Good "}, spent=1),
            gemini({"text": "day"}, finish="STOP", spent=5),
        ],
        "Good day",
    ),
    (
        [
            gemini(
                {"functionCall": {"name": "look", "args": {"at": "sea"}}},
                {"functionCall": {"name": "list", "args": {}}},
            ),
            gemini({"text": ""}, finish="STOP", spent=5),
        ],
        "",
    ),
]
GEMINI_INCOMPLETE = [gemini({"text": "Once"}), gemini({"text": " upon"}, finish="MAX_TOKENS", spent=2)]
GEMINI_ERRORS = [
    [
        gemini({"text": "Once"}),
        {"error": {"code": 503, "message": "The model is overloaded", "status": "UNAVAILABLE"}},
    ],
    [{"promptFeedback": {"blockReason": "SAFETY"}, "usageMetadata": {"promptTokenCount": 9}}],
]
GEMINI = Bodies(
    streams=[(events(*told), text) for told, text in GEMINI_STREAMS],
    incomplete=[events(*GEMINI_INCOMPLETE)],
    errors=[events(*told) for told in GEMINI_ERRORS],
)
GEMINI_JSONARRAY = Bodies(
    streams=[(array(*told), text) for told, text in GEMINI_STREAMS],
    incomplete=[array(*GEMINI_INCOMPLETE)],
    errors=[array(*told) for told in GEMINI_ERRORS],
)

# --- Ollama, Cohere --------------------------------------------------------------------------------------------------


def ollama(content: str, **fields: Any) -> dict[str, Any]:
    told = {"role": "assistant", "content": content, **fields.pop("message", {})}
    return {"model": "m-1", "created_at": "2025-01-01T00:00:00Z", "message": told, "done": False, **fields}


def ollama_end(reason: str) -> dict[str, Any]:
    return ollama("", done=True, done_reason=reason, total_duration=10, prompt_eval_count=9, eval_count=5)


OLLAMA = Bodies(
    streams=[
        (
            lines(
                ollama("", message={"thinking": "Hm."}), ollama("Good "), ollama("day"), ollama_end("stop")
            ),
            "Good day",
        ),
        (
            lines(
                ollama(
                    "", message={"tool_calls": [{"function": {"name": "look", "arguments": {"at": "sea"}}}]}
                ),
                ollama_end("stop"),
            ),
            "",
        ),
        (
            lines(
                {"model": "m-1", "created_at": "2025-01-01T00:00:00Z", "response": "Good day", "done": False},
                {"model": "m-1", "response": "", "done": True, "done_reason": "stop", "eval_count": 2},
            ),
            "Good day",
        ),
    ],
    incomplete=[lines(ollama("Once upon"), ollama_end("length"))],
    errors=[
        lines(ollama("Once"), {"error": "an error was encountered while running the model"}),
        lines({"error": "model not found"}),
    ],
)


def cohere_end(reason: str) -> dict[str, Any]:
    usage = {
        "billed_units": {"input_tokens": 7, "output_tokens": 5},
        "tokens": {"input_tokens": 9, "output_tokens": 5},
    }
    return {"type": "message-end", "delta": {"finish_reason": reason, "usage": usage}}


def cohere_text(text: str) -> dict[str, Any]:
    return {"type": "content-delta", "index": 0, "delta": {"message": {"content": {"text": text}}}}


COHERE_START = {
    "id": "c-1",
    "type": "message-start",
    "delta": {"message": {"role": "assistant", "content": []}},
}
COHERE = Bodies(
    streams=[
        (
            named(
                COHERE_START,
                {
                    "type": "content-start",
                    "index": 0,
                    "delta": {"message": {"content": {"type": "text", "text": ""}}},
                },
                cohere_text("Good "),
                cohere_text("day"),
                {"type": "content-end", "index": 0},
                cohere_end("COMPLETE"),
            ),
            "Good day",
        ),
        (
            named(
                COHERE_START,
                {"type": "tool-plan-delta", "delta": {"message": {"tool_plan": "I look."}}},
                {
                    "type": "tool-call-start",
                    "index": 0,
                    "delta": {
                        "message": {
                            "tool_calls": {
                                "id": "look_1",
                                "type": "function",
                                "function": {"name": "look", "arguments": ""},
                            }
                        }
                    },
                },
                *(
                    {
                        "type": "tool-call-delta",
                        "index": 0,
                        "delta": {"message": {"tool_calls": {"function": {"arguments": arguments}}}},
                    }
                    for arguments in ('{"at":', '"sea"}')
                ),
                {"type": "tool-call-end", "index": 0},
                cohere_end("TOOL_CALL"),
            ),
            "",
        ),
    ],
    incomplete=[named(COHERE_START, cohere_text("Once upon"), cohere_end("MAX_TOKENS"))],
    errors=[
        named(COHERE_START, cohere_text("Once"), cohere_end("ERROR")),
        named(COHERE_START, cohere_text("Once"), {"type": "message-end", "delta": {"error": "it broke"}}),
    ],
)

# --- servers without a dialect ---------------------------------------------------------------------------------------

GENERIC = Bodies(
    streams=[
        (
            events(
                {"text": "Good "},
                {"text": "day"},
                {"text": "", "usage": {"input_tokens": 1, "output_tokens": 2}},
                "[DONE]",
            ),
            "Good day",
        ),
        (events("Good", " day", "[DONE]"), "Good day"),
        (lines({"response": "Good "}, {"response": "day"}, {"response": "", "done": True}), "Good day"),
        (array({"delta": {"text": "Good day"}}, {"finish_reason": "stop"}), "Good day"),
        (event("Good day") + event("{}", "done"), "Good day"),
    ],
    incomplete=[],
    errors=[
        events({"text": "Once"}, {"error": {"message": "it broke"}}),
        events({"text": "Once"}) + event({"message": "it broke"}, "error"),
        lines({"text": "Once"}, {"error": "it broke"}),
    ],
)

EXAMPLES = {
    "anthropic": ANTHROPIC,
    "cohere": COHERE,
    "gemini": GEMINI,
    "gemini-jsonarray": GEMINI_JSONARRAY,
    "generic": GENERIC,
    "ollama": OLLAMA,
    "openai-chat": CHAT,
    "openai-completions": COMPLETIONS,
    "openai-responses": RESPONSES,
}
"""By the dialect's name."""
