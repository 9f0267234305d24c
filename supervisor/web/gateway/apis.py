"""The providers' APIs as a client of one sees them: how errors are told, and how events are put on the wire.

An SDK raises its own exceptions for an error that is told in its provider's shape: as the body of an HTTP error while nothing has
been sent, and after that as an event of the stream. An answer that broke off must not look complete, so that what ends badly ends
with such an event, and never just ends.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Final, Literal

import attrs
import msgspec

__all__ = [
    "ANTHROPIC",
    "CONTENT_TYPES",
    "GEMINI",
    "OLLAMA",
    "OPENAI",
    "RESPONSES",
    "Api",
    "Failure",
    "Framing",
    "sse",
]

Framing = Literal["sse", "ndjson", "json-array", "json"]

CONTENT_TYPES: Final[Mapping[Framing, str]] = {
    "sse": "text/event-stream; charset=utf-8",
    "ndjson": "application/x-ndjson",
    "json-array": "application/json",
    "json": "application/json",
}
_OPENAI_TYPES: Final = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    409: "conflict_error",
    413: "invalid_request_error",
    429: "rate_limit_error",
}
_ANTHROPIC_TYPES: Final = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    409: "invalid_request_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
    504: "timeout_error",
}
_GOOGLE_STATUSES: Final = {
    400: "INVALID_ARGUMENT",
    401: "UNAUTHENTICATED",
    403: "PERMISSION_DENIED",
    404: "NOT_FOUND",
    409: "ABORTED",
    413: "INVALID_ARGUMENT",
    429: "RESOURCE_EXHAUSTED",
    499: "CANCELLED",
    502: "UNAVAILABLE",
    503: "UNAVAILABLE",
    504: "DEADLINE_EXCEEDED",
}


@attrs.frozen(kw_only=True)
class Failure:
    """What went wrong, as a client is told it."""

    status: int
    """What HTTP would call it."""
    code: str
    """One word for it: a reason of an outcome, or of our own."""
    message: str
    retry_after_s: float | None = None
    again: bool = True
    """Whether the client's own repeating it may help."""
    stream_id: str | None = None


@attrs.frozen(kw_only=True)
class Api:
    """One provider's way to tell an error."""

    error: Callable[[Failure], Mapping[str, Any]]
    """Makes the body of an HTTP error."""
    event: Callable[[Failure, int], tuple[str, Mapping[str, Any]]]
    """Makes the event, with its name, that ends a stream badly; given how many events came before it."""
    told: Callable[[str | None, Mapping[str, Any]], bool]
    """Whether an event of this name, or (None) a body, is an error in just the form that the API's SDKs look for."""
    keep_alive: bytes = b": keep-alive\n\n"
    """What is sent in an event stream for a sign of life."""

    def body(self, failure: Failure) -> bytes:
        """Return the body of an HTTP error."""
        return msgspec.json.encode(self.error(failure))

    def last(self, failure: Failure, events: int) -> tuple[str, bytes]:
        """Return the name and the payload of the event that ends a stream badly."""
        name, value = self.event(failure, events)
        return name, msgspec.json.encode(value)

    def tells(self, name: str | None, payload: bytes) -> bool:
        """Whether an event of this name, or (None) a body, is what an SDK takes for an error: other words for it are passed over."""
        try:
            value = msgspec.json.decode(payload)
        except (ValueError, RecursionError):
            return False
        return isinstance(value, dict) and self.told(name, value)


def sse(name: str, payload: bytes) -> bytes:
    """Return an event of an event stream."""
    if b"\n" in payload or b"\r" in payload:
        payload = payload.replace(b"\r\n", b"\n").replace(b"\r", b"\n").replace(b"\n", b"\ndata: ")
    return b"event: %b\ndata: %b\n\n" % (name.encode(), payload) if name else b"data: %b\n\n" % payload


def _openai(failure: Failure) -> Mapping[str, Any]:
    kind = _OPENAI_TYPES.get(
        failure.status, "server_error" if failure.status >= 500 else "invalid_request_error"
    )
    return {"error": {"message": failure.message, "type": kind, "param": None, "code": failure.code}}


def _openai_event(failure: Failure, events: int) -> tuple[str, Mapping[str, Any]]:
    del events
    return "", _openai(failure)


def _openai_told(name: str | None, value: Mapping[str, Any]) -> bool:
    del name
    return bool(value.get("error"))


def _responses_event(failure: Failure, events: int) -> tuple[str, Mapping[str, Any]]:
    # Both shapes that OpenAI's own streams have had: SDKs look at the one or at the other.
    told = {"type": "error", "code": failure.code, "message": failure.message, "param": None}
    return "error", {**told, "sequence_number": events, **_openai(failure)}


def _responses_told(name: str | None, value: Mapping[str, Any]) -> bool:
    return _openai_told(name, value) or (
        name is not None and value.get("type") in ("error", "response.failed")
    )


def _anthropic(failure: Failure) -> Mapping[str, Any]:
    kind = _ANTHROPIC_TYPES.get(
        failure.status, "api_error" if failure.status >= 500 else "invalid_request_error"
    )
    told: dict[str, Any] = {"type": "error", "error": {"type": kind, "message": failure.message}}
    return told if failure.stream_id is None else {**told, "request_id": failure.stream_id}


def _anthropic_event(failure: Failure, events: int) -> tuple[str, Mapping[str, Any]]:
    del events
    return "error", _anthropic(failure)


def _anthropic_told(name: str | None, value: Mapping[str, Any]) -> bool:
    return name in (None, "error") and value.get("type") == "error" and isinstance(value.get("error"), dict)


def _google(failure: Failure) -> Mapping[str, Any]:
    status = _GOOGLE_STATUSES.get(failure.status, "INTERNAL")
    return {"error": {"code": failure.status, "message": failure.message, "status": status}}


def _google_event(failure: Failure, events: int) -> tuple[str, Mapping[str, Any]]:
    del events
    return "", _google(failure)


def _google_told(name: str | None, value: Mapping[str, Any]) -> bool:
    # google-genai looks at how the object begins, knows of no names, and compares the code.
    error = value.get("error")
    first = next(iter(value), None)
    return not name and first == "error" and isinstance(error, dict) and type(error.get("code")) is int


def _ollama(failure: Failure) -> Mapping[str, Any]:
    return {"error": failure.message}


def _ollama_event(failure: Failure, events: int) -> tuple[str, Mapping[str, Any]]:
    del events
    return "", _ollama(failure)


def _ollama_told(name: str | None, value: Mapping[str, Any]) -> bool:
    del name
    error = value.get("error")
    return isinstance(error, str) and bool(error)


OPENAI: Final = Api(error=_openai, event=_openai_event, told=_openai_told)
RESPONSES: Final = Api(error=_openai, event=_responses_event, told=_responses_told)
ANTHROPIC: Final = Api(error=_anthropic, event=_anthropic_event, told=_anthropic_told)
# google-genai takes a comment for a line of JSON; an empty line it skips, as the event-stream standard has it.
GEMINI: Final = Api(error=_google, event=_google_event, told=_google_told, keep_alive=b"\n")
OLLAMA: Final = Api(error=_ollama, event=_ollama_event, told=_ollama_told)
