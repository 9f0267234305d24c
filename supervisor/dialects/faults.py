"""Find and classify the errors that providers report in JSON.

There is no standard: the same fault comes as an `error` object, an `error` string, a `detail`, a bare `message`, a list
with one of those in it, or an object marked `"object": "error"`. The message is always the provider's own; the kind is
derived, from the most specific statement to the least:

1. a code, type or status word that names a kind (`rate_limit_exceeded`, `content_filter`, `RESOURCE_EXHAUSTED`);
2. a message that speaks of the context's length, because most providers send that as a plain bad request;
3. an HTTP status, the response's or one given as a code;
4. a code or type that says only whose fault it is (`invalid_request_error`, `server_error`);
5. what the message speaks of.

`temporary` says whether the same request may succeed later: true of rate limits, overload, server faults and timeouts,
but not of a used-up quota.
"""

from __future__ import annotations

import re
from typing import Any, Final

import msgspec

from supervisor.dialects.base import Fault, FaultKind

__all__ = ["classify", "error_fault", "find_fault", "http_fault", "shown"]

MAX_MESSAGE_CHARS = 4096
"""How much of a provider's message is kept."""
MAX_DEPTH: Final = 8
"""How deep errors in errors, and messages in messages, are followed: what a peer nests must not exhaust the stack."""

_WORDS: Final[tuple[tuple[FaultKind, tuple[str, ...]], ...]] = (
    (
        "context_length",
        ("context_length", "context_window", "prompt_too_long", "string_above_max", "max_context"),
    ),
    (
        "content_filter",
        (
            "content_filter",
            "content_policy",
            "responsible_ai",
            "safety",
            "moderation",
            "data_inspection",
            "guardrail",
        ),
    ),
    ("rate_limit", ("rate_limit", "too_many", "throttl", "quota", "resource_exhausted", "concurrency_limit")),
    ("overloaded", ("overload", "unavailable", "capacity", "busy", "insufficient_system_resource")),
    ("timeout", ("timeout", "timed_out", "deadline_exceeded")),
    (
        "auth",
        (
            "authent",
            "authoriz",
            "api_key",
            "apikey",
            "permission",
            "forbidden",
            "access_denied",
            "billing",
            "payment",
        ),
    ),
)
_GENERAL: Final[tuple[tuple[FaultKind, tuple[str, ...]], ...]] = (
    (
        "invalid_request",
        (
            "invalid",
            "bad_request",
            "not_found",
            "unsupported",
            "unprocessable",
            "validation",
            "tool_use_failed",
        ),
    ),
    ("server", ("server", "internal", "api_error")),
)
_CONTEXT: Final = re.compile(
    r"context[ _-]?(length|window|size)|maximum context|prompt is too long|too many (input )?tokens"
    r"|(input|prompt|request).{0,40}exceeds?.{0,40}token",
    re.IGNORECASE,
)
_MESSAGES: Final[tuple[tuple[FaultKind, re.Pattern[str]], ...]] = (
    ("rate_limit", re.compile(r"rate.?limit|too many requests|quota|throttl", re.IGNORECASE)),
    ("overloaded", re.compile(r"overload|capacity|unavailable|too busy", re.IGNORECASE)),
    ("content_filter", re.compile(r"content (policy|filter|management)|flagged|moderation", re.IGNORECASE)),
    ("auth", re.compile(r"api[ _-]?key|unauthori[sz]ed|authenticat|permission|forbidden", re.IGNORECASE)),
    ("timeout", re.compile(r"time(d)?[ -]?out", re.IGNORECASE)),
)
_USED_UP: Final = re.compile(
    r"insufficient_quota|exceeded your (current|monthly) quota|billing|insufficient (credit|balance)",
    re.IGNORECASE,
)
_LATER: Final = re.compile(
    r"(?:try again|retry(?:ing)?|wait)\D{0,20}?(\d+(?:\.\d+)?)\s*(ms|milliseconds?|m|min(?:ute)?s?|s|sec(?:ond)?s?)\b",
    re.IGNORECASE,
)
_TEMPORARY: Final = frozenset({"rate_limit", "overloaded", "server", "timeout", "network"})
_CAMEL: Final = re.compile(r"(?<=[a-z0-9])(?=[A-Z])")
_NOT_WORD: Final = re.compile(r"[^a-z0-9]+")
# No two parts of it can match the same characters, and none goes past a "<": its cost is linear, whatever the page.
_TITLE: Final = re.compile(r"<title[^<>]*>([^<]*)", re.IGNORECASE)

_MESSAGE_FIELDS: Final = (
    "message",
    "msg",
    "detail",
    "error_message",
    "error_msg",
    "description",
    "reason",
    "title",
)
_BARE: Final = frozenset({"id", "message", "request_id", "requestId", "connectionId", "trace_id"})
"""What an object may have that is only a message, without being anything else."""
_CODE_FIELDS: Final = ("code", "type", "status", "error_code", "status_code", "statusCode")


def classify(
    *, message: str, words: tuple[str, ...] = (), status: int | None = None
) -> tuple[FaultKind, bool]:
    """Return a fault's kind and whether it is temporary. `words` are the provider's codes and types."""
    plain = [_NOT_WORD.sub("_", _CAMEL.sub("_", word).lower()) for word in words]
    if status is None:
        status = next((int(word) for word in plain if word.isdigit() and 400 <= _small(word) < 600), None)
    kind = _kind(plain, message, status)
    used_up = _USED_UP.search(message) or any(_USED_UP.search(word) for word in plain)
    return kind, kind in _TEMPORARY and not used_up


def _kind(plain: list[str], message: str, status: int | None) -> FaultKind:
    if kind := _named(_WORDS, plain):
        return kind
    if _CONTEXT.search(message):
        return "context_length"
    if status is not None and (by_status := _by_status(status)):
        return by_status
    if kind := _named(_GENERAL, plain):
        return kind
    return next((kind for kind, pattern in _MESSAGES if pattern.search(message)), "server")


def _named(table: tuple[tuple[FaultKind, tuple[str, ...]], ...], plain: list[str]) -> FaultKind | None:
    for word in plain:
        for kind, parts in table:
            if any(part in word for part in parts):
                return kind
    return None


def _by_status(status: int) -> FaultKind | None:
    if status in {401, 402, 403, 407}:
        return "auth"
    if status in {408, 504, 522, 524}:
        return "timeout"
    if status == 429:
        return "rate_limit"
    if status in {498, 503, 529}:
        return "overloaded"
    if 400 <= status < 500:
        return "invalid_request"
    return "server" if status >= 500 else None


def error_fault(error: Any, *, around: dict[str, Any] | None = None, status: int | None = None) -> Fault:
    """Return the fault that an error value (an object, a string, a list) tells.

    `around` is the object it was found in, which may hold the code.
    """
    fields: dict[str, Any] = {}
    for _ in range(MAX_DEPTH):
        if isinstance(error, list):
            error = next((item for item in error if item), "")
        fields = error if isinstance(error, dict) else {}
        inner = fields.get("error")
        if not isinstance(inner, dict) or any(fields.get(name) for name in _MESSAGE_FIELDS):
            break
        error, around = inner, fields
    message = _message(error)
    words = _codes(fields) + _codes(around or {})
    kind, temporary = classify(message=message, words=words, status=status)
    return Fault(
        kind=kind,
        message=message or "the provider reported an error without a message",
        code=words[0] if words else None,
        status=status,
        temporary=temporary,
        retry_after_s=_retry_after(fields, message) if temporary else None,
    )


def find_fault(value: Any, *, status: int | None = None, lenient: bool = False) -> Fault | None:
    """Return the fault that a JSON value reports, or None if it reports none.

    It must say that it is an error: by an `error` or `errors`, by `"object"` or `"type"` being `error`, by a `detail` that is
    not an event's of another kind, by a message with a code, or by a `base_resp` (MiniMax) with a code other than 0. When `lenient` (the body of an HTTP error), any message will do.
    """
    if isinstance(value, list):
        objects = (item for item in value[:8] if isinstance(item, dict))
        return next((fault for item in objects if (fault := find_fault(item, status=status))), None)
    if not isinstance(value, dict):
        return None
    for name in ("error", "errors"):
        if value.get(name):
            if value[name] is True:
                return error_fault(value, status=status)
            return error_fault(value[name], around=_without(value, name), status=status)
    if "error" in (value.get("object"), value.get("type"), value.get("status")):
        return error_fault(value, status=status)
    if value.get("detail") and not _is_news(value.get("type")):
        return error_fault(value["detail"], around=_without(value, "detail"), status=status)
    base = value.get("base_resp")
    if isinstance(base, dict) and base.get("status_code"):
        return error_fault({"message": base.get("status_msg"), "code": base["status_code"]}, status=status)
    if "choices" not in value and _message(value) and (lenient or _coded(value)):
        return error_fault(value, status=status)
    return None


def flat_fault(value: dict[str, Any]) -> Fault | None:
    """Return the fault of an object that is one itself, in a stream whose events are known; None of any other.

    It calls itself an error (`"object": "error"`, a type such as `BadRequestError`) and has a message; or it has a message and
    nothing that says what else it is, as `{"id": "…", "message": "…"}`. To be asked of what is no event of the dialect.
    """
    if not isinstance(value.get("message"), str | dict) or not _message(value):
        return None
    kind = value.get("type")
    named = isinstance(kind, str) and kind.casefold().endswith(("error", "exception"))
    bare = isinstance(value["message"], str) and all(
        name in _BARE or (told is None and name != "error") for name, told in value.items()
    )
    return error_fault(value) if named or bare or value.get("object") == "error" else None


def http_fault(status: int, body: bytes) -> Fault:
    """Return the fault of an HTTP error response: the provider's message where it gave one, else the status."""
    try:
        value = msgspec.json.decode(body)
    except (ValueError, RecursionError):
        message = shown(body)
    else:
        if (fault := find_fault(value, status=status, lenient=True)) is not None:
            return fault
        message = value[:MAX_MESSAGE_CHARS] if isinstance(value, str) else shown(body)
    kind, temporary = classify(message=message, status=status)
    return Fault(
        kind=kind,
        message=message or f"HTTP status {status} without a message",
        status=status,
        temporary=temporary,
        retry_after_s=_retry_after({}, message) if temporary else None,
    )


def shown(body: bytes, limit: int = 500) -> str:
    """Return the start of a body as one line of text; of an HTML page, its title."""
    text = body[: 8 * limit].decode("utf-8", "replace")
    if (title := _TITLE.search(text)) and not title[1].isspace():
        text = title[1] or text
    text = " ".join(text.split())
    return text if len(text) <= limit else f"{text[:limit]}…"


def _message(error: Any, depth: int = MAX_DEPTH) -> str:
    if isinstance(error, str):
        return error[:MAX_MESSAGE_CHARS]
    if not depth:
        return ""
    if isinstance(error, dict):
        for name in _MESSAGE_FIELDS:
            if error.get(name):
                return _message(error[name], depth - 1)
        return _message(error["error"]) if isinstance(error.get("error"), str) else ""
    if isinstance(error, list):
        parts = (_message(item, depth - 1) for item in error[:8])
        return "; ".join(part for part in parts if part)[:MAX_MESSAGE_CHARS]
    return (
        str(error)
        if isinstance(error, int | float) and not isinstance(error, bool) and abs(error) < 1e15
        else ""
    )


def _codes(fields: dict[str, Any]) -> tuple[str, ...]:
    found = []
    for name in _CODE_FIELDS:
        value = fields.get(name)
        if isinstance(value, str) and value and value != "error":
            found.append(value[:200])
        elif isinstance(value, int) and not isinstance(value, bool) and abs(value) < 1 << 31:
            found.append(str(value))
    return tuple(found)


def _coded(value: dict[str, Any]) -> bool:
    """Whether the object has an error code, rather than one that says that all is well."""
    for name in ("code", "error_code", "status_code", "statusCode", "status"):
        code = value.get(name)
        if (
            isinstance(code, str)
            and name != "status"
            and code.lower() not in {"", "0", "200", "ok", "success"}
        ):
            return True
        if isinstance(code, int) and code >= (400 if name == "status" else 1) and code != 200:
            return True
    return False


def _is_news(kind: Any) -> bool:
    """Whether a type names an event that is no error. A problem of RFC 9457 has a URI there."""
    if not isinstance(kind, str) or not kind or ":" in kind:
        return False
    word = _NOT_WORD.sub("_", _CAMEL.sub("_", kind[:200]).lower())
    spoken = any(part in word for part in ("err", "exception", "fail", "problem"))
    return not (spoken or _named(_WORDS, [word]) or _named(_GENERAL, [word]))


def _without(value: dict[str, Any], name: str) -> dict[str, Any]:
    # `status` and `type` of the outer object count only where it is the error's envelope, not a chunk.
    return {} if "choices" in value else {key: item for key, item in value.items() if key != name}


def _small(digits: str) -> int:
    return int(digits) if len(digits) < 5 else -1


def _retry_after(fields: dict[str, Any], message: str) -> float | None:
    for name, scale in (("retry_after", 1.0), ("retry_after_s", 1.0), ("retry_after_ms", 0.001)):
        value = fields.get(name)
        if isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < 1e9:
            return value * scale
    if found := _LATER.search(message):
        unit = found[2].lower()
        scale = 0.001 if unit.startswith(("ms", "mil")) else 60.0 if unit.startswith("m") else 1.0
        value = float(found[1])
        return value * scale if value < 1e9 else None
    return None
