"""The kinds of providers' errors, and their messages."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from supervisor.dialects import (
    ANTHROPIC,
    COHERE,
    GEMINI,
    OLLAMA,
    OPENAI_CHAT,
    OPENAI_COMPLETIONS,
    OPENAI_RESPONSES,
    Dialect,
)
from supervisor.dialects.faults import (
    MAX_MESSAGE_CHARS,
    classify,
    error_fault,
    find_fault,
    flat_fault,
    http_fault,
    shown,
)
from tests.dialects.answers import read as read_as
from tests.dialects.bodies import event, read

json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(
            st.sampled_from(
                ["error", "errors", "message", "detail", "code", "type", "status", "object", "retry_after"]
            )
            | st.text(max_size=5),
            inner,
            max_size=5,
        )
    ),
    max_leaves=15,
)


@pytest.mark.parametrize(
    ("message", "words", "status", "kind", "temporary"),
    [
        ("m", ("rate_limit_exceeded",), None, "rate_limit", True),
        ("m", ("RateLimitError",), None, "rate_limit", True),
        ("m", ("RESOURCE_EXHAUSTED",), 429, "rate_limit", True),
        ("You exceeded your current quota", ("insufficient_quota",), 429, "rate_limit", False),
        ("m", ("overloaded_error",), 529, "overloaded", True),
        ("m", ("engine_overloaded",), 503, "overloaded", True),
        ("m", ("invalid_api_key",), 401, "auth", False),
        ("m", (), 403, "auth", False),
        ("m", (), 402, "auth", False),
        ("m", ("context_length_exceeded", "invalid_request_error"), 400, "context_length", False),
        (
            "This model's maximum context length is 8192 tokens",
            ("BadRequestError",),
            400,
            "context_length",
            False,
        ),
        ("prompt is too long: 9 > 8", ("invalid_request_error",), 400, "context_length", False),
        ("m", ("content_filter",), 400, "content_filter", False),
        ("m", ("data_inspection_failed",), 400, "content_filter", False),
        ("m", ("invalid_request_error",), None, "invalid_request", False),
        ("m", ("NotFoundError",), 404, "invalid_request", False),
        ("m", ("tool_use_failed",), None, "invalid_request", False),
        ("m", ("server_error",), None, "server", True),
        ("m", ("InternalServerError",), 500, "server", True),
        ("m", ("502",), None, "server", True),
        ("m", ("429",), None, "rate_limit", True),
        ("m", (), 408, "timeout", True),
        ("m", ("DEADLINE_EXCEEDED",), 504, "timeout", True),
        ("Too many requests, slow down", (), None, "rate_limit", True),
        ("The engine is currently overloaded", (), None, "overloaded", True),
        ("Incorrect API key provided", (), None, "auth", False),
        ("flagged by our content policy", (), None, "content_filter", False),
        ("The request timed out", (), None, "timeout", True),
        ("something", (), None, "server", True),
    ],
)
def test_kinds(
    *, message: str, words: tuple[str, ...], status: int | None, kind: str, temporary: bool
) -> None:
    """A kind comes from the most specific statement, and says whether trying again may help."""
    assert (kind, temporary) == classify(message=message, words=words, status=status)


@pytest.mark.parametrize(
    ("body", "message", "code"),
    [
        (b'{"error":{"message":"m","type":"t","code":"c"}}', "m", "c"),
        (b'{"error":{"message":"m","type":"t","code":null}}', "m", "t"),
        (b'{"error":{"message":"m","code":42}}', "m", "42"),
        (b'{"error":"m","code":"c"}', "m", "c"),
        (b'{"error":{"error":{"message":"m"}}}', "m", None),
        (b'{"errors":[{"message":"m"}]}', "m", None),
        (b'{"error":true,"message":"m"}', "m", None),
        (b'{"detail":{"error":{"message":"m"}}}', "m", None),
        (b'{"detail":[{"msg":"a"},{"msg":"b"}]}', "a", None),
        (b'{"message":"m"}', "m", None),
        (b'"m"', "m", None),
        (b"plain\n text", "plain text", None),
        (b"<html><head><title>502 Bad\nGateway</title></head><body>x</body></html>", "502 Bad Gateway", None),
        (b"", "HTTP status 502 without a message", None),
        (b"{}", "{}", None),
    ],
)
def test_http_errors(body: bytes, message: str, code: str | None) -> None:
    """An HTTP error tells the provider's message and code, from JSON of any usual shape, text or a page's title."""
    fault = OPENAI_CHAT.fault(502, body)
    assert (message, code, 502) == (fault.message, fault.code, fault.status)
    assert (fault.kind, fault.temporary) == ("server", True)


@pytest.mark.parametrize(
    ("fields", "seconds"),
    [
        ({"message": "Please try again in 1.5s."}, 1.5),
        ({"message": "Please retry after 20 seconds"}, 20.0),
        ({"message": "try again in 250ms"}, 0.25),
        ({"message": "wait 2 minutes"}, 120.0),
        ({"message": "x", "retry_after": 7}, 7.0),
        ({"message": "x", "retry_after_ms": 1500}, 1.5),
        ({"message": "x", "retry_after": True}, None),
        ({"message": f"try again in {'9' * 400}s"}, None),
        ({"message": "try again in 1000000000s"}, None),
        ({"message": "x"}, None),
    ],
)
def test_when_to_try_again(fields: dict[str, Any], seconds: float | None) -> None:
    """A stated delay is read in seconds, from a field or from the message."""
    assert seconds == error_fault({**fields, "code": 429}).retry_after_s


@pytest.mark.parametrize(
    "value",
    [
        {"code": 0, "message": "ok"},
        {"code": "200", "message": "ok"},
        {"type": "status", "message": "searching"},
        {"type": "status", "detail": "searching"},
        {"type": "tool_progress", "detail": {"step": 1}},
        {"error": None, "message": "hello"},
        {"base_resp": {"status_code": 0, "status_msg": "success"}},
        {"base_resp": 1},
        {"status": 200, "message": "fine"},
        {"id": 1},
        "error",
        [],
    ],
)
def test_what_is_no_error(value: Any) -> None:
    """A message without an error code, or with one that says all is well, is no error."""
    assert find_fault(value) is None


@pytest.mark.parametrize(
    "kind",
    [
        None,
        3,
        "",
        "about:blank",
        "https://example.com/probs/x",
        "error",
        "AuthFailure",
        "invalid_request",
        "RuntimeException",
    ],
)
def test_a_detail_is_an_error(kind: Any) -> None:
    """A detail alone, in a problem of RFC 9457 or beside a type that speaks of an error is an error's message."""
    fault = find_fault({"type": kind, "detail": "broken"})
    assert fault is not None
    assert fault.message == "broken"


def test_a_fault_of_minimax() -> None:
    """MiniMax answers 200 and tells what went wrong beside null choices, as an event or in place of the stream."""
    value = {
        "id": "",
        "choices": None,
        "base_resp": {"status_code": 1008, "status_msg": "insufficient balance"},
    }
    for body in (json.dumps(value).encode(), event(value)):
        fault = read(body).fault
        assert fault is not None
        assert (fault.message, fault.code, fault.temporary) == ("insufficient balance", "1008", False)


CLOSED = {
    ANTHROPIC: event({"type": "message_start", "message": {"id": "m", "content": []}}, "message_start"),
    COHERE: event({"type": "message-start", "id": "m"}),
    GEMINI: event({"candidates": [{"content": {"parts": [{"text": "Once"}]}}]}),
    OLLAMA: b'{"model":"m","message":{"content":"Once"},"done":false}\n',
    OPENAI_CHAT: event({"choices": [{"index": 0, "delta": {"content": "Once"}}]}),
    OPENAI_COMPLETIONS: event({"choices": [{"index": 0, "text": "Once"}]}),
    OPENAI_RESPONSES: event({"type": "response.created", "response": {"id": "r"}}),
}
"""How an answer begins, in each dialect whose events are known."""


@pytest.mark.parametrize("dialect", CLOSED, ids=lambda dialect: dialect.name)
@pytest.mark.parametrize(
    "flat",
    [
        {"object": "error", "message": "gone"},
        {"object": "error", "message": "gone", "type": "BadRequestError", "param": None, "code": None},
        {"type": "invalid_request_error", "message": "gone"},
        {"type": "ThrottlingException", "message": "gone"},
        {"object": "error", "type": "problem", "message": "gone"},
        {"id": "abc", "message": "gone"},
        {"message": "gone", "request_id": "abc", "code": None},
        {"detail": "gone"},
    ],
    ids=",".join,
)
def test_an_error_without_an_envelope(dialect: Dialect, flat: dict[str, Any]) -> None:
    """An object in place of an event that is an error itself ends the answer with its message, in every dialect."""
    told = json.dumps(flat).encode() + b"\n" if dialect is OLLAMA else event(flat)
    sink = read_as(dialect, CLOSED[dialect], told)
    assert (sink.state, sink.reason) == ("failed", "provider_error")
    assert sink.fault is not None
    assert sink.fault.message == "gone"


@pytest.mark.parametrize(
    "news",
    [
        {"type": "progress", "message": "loading"},
        {"step": 1, "message": "loading"},
        {"error": None, "message": "loading"},
        {"code": 0, "message": "ok"},
        {"id": "abc", "message": {"content": "hello"}},
        {"type": "error", "message": ""},
        {"message": ["loading"]},
    ],
)
def test_what_is_no_flat_error(news: dict[str, Any]) -> None:
    """A message beside anything that may say what it is, or none, does not make an object an error."""
    assert flat_fault(news) is None


def test_a_message_of_several_parts() -> None:
    """Mistral's message may be an object: what is said in it is the message."""
    fault = flat_fault({"object": "error", "message": {"detail": [{"msg": "gone"}]}, "type": "problem"})
    assert fault is not None
    assert fault.message == "gone"


@pytest.mark.parametrize("body", [b'{"message": "gone"}\n', b'{\n"message": "gone"\n}\n'])
def test_a_bare_message_outside_of_events(body: bytes) -> None:
    """It ends the answer also where it is no event, on one line or several."""
    sink = read_as(OPENAI_CHAT, CLOSED[OPENAI_CHAT], body)
    assert sink.fault is not None
    assert (sink.reason, sink.fault.message) == ("provider_error", "gone")


@settings(deadline=None)  # a test asserts no time
@given(json_values, st.sampled_from([400, 429, 500]))
def test_any_json_gives_a_bounded_fault(value: Any, status: int) -> None:
    """Whatever the body, there is a message, it is bounded, and nothing raises."""
    fault = http_fault(status, json.dumps(value).encode())
    assert fault.message
    assert len(fault.message) <= MAX_MESSAGE_CHARS
    assert error_fault(value).message
    find_fault(value)
    if isinstance(value, dict):
        flat_fault(value)


def test_long_messages_are_cut() -> None:
    """A message of megabytes is not carried along."""
    assert len(error_fault("x" * 1_000_000).message) == MAX_MESSAGE_CHARS


@pytest.mark.parametrize(
    "body",
    [
        b"<title>" + b" " * 2_000_000,
        b"<title" * 300_000,
        b"<title>" * 300_000,
        b"<title>a" + b" \n" * 1_000_000 + b"</titl",
    ],
    ids=["spaces", "unclosed tags", "titles", "no end"],
)
def test_a_page_made_to_be_slow(body: bytes) -> None:
    """Looking for a page's title ends, where a search that goes back over megabytes of it would not."""
    assert shown(body, len(body))
    assert http_fault(500, body).message


HOSTILE = [
    "wait" + "1" * 300_000,
    "wait 1" + " " * 300_000,
    "try again" * 30_000,
    "input" * 60_000,
    "prompt exceed" * 25_000,
    "time" * 75_000,
    "api" * 100_000,
    "aB" * 150_000,
    "_" * 300_000,
]


@pytest.mark.parametrize("text", HOSTILE, ids=lambda text: text[:12])
def test_a_message_made_to_be_slow(text: str) -> None:
    """A message and a code of 300 kB are classified, by patterns none of which goes back over what it has read."""
    assert classify(message=text, words=(text,))
    for body in (
        text,
        {"error": text},
        {"error": {"message": [[text]] * 9, "code": text}},
        {"detail": [text]},
    ):
        assert len(http_fault(500, json.dumps(body).encode()).message) <= MAX_MESSAGE_CHARS


@pytest.mark.parametrize(
    ("opening", "closing"),
    [('{"error":', "}"), ('{"detail":', "}"), ("[", "]"), ('{"message":[', "]}"), ('{"errors":[', "]}")],
)
@pytest.mark.parametrize("depth", [7, 400, 400_000])
def test_errors_nested_in_errors(opening: str, closing: str, depth: int) -> None:
    """However deeply an error is nested, it gives a fault with a message; each level is looked at once."""
    assert http_fault(500, (opening * depth + '"m"' + closing * depth).encode()).message


def test_an_error_that_branches() -> None:
    """An error whose every level has eight more in it costs no more than its own length."""
    value = '"m"'
    for _ in range(6):
        value = f'{{"message":[{",".join([value] * 8)}]}}'
    assert http_fault(500, value.encode()).message
