"""What a simulated upstream does with one request, as data.

A `Script` is a frozen description; `plan` turns it into steps (send these bytes, pause, hang, close) without touching a
socket, so that what a fault looks like on the wire is written down, and tested, in one place. The server in `server.py`
only carries steps out.

A script can be written as a model name, so that a program that only lets its user choose a model can choose a fault:
`sim/<name>?<field>=<value>&…`, where `<name>` is one of `PRESETS`, a fault, or an HTTP status, and the fields are those
of `Script`: `sim/stall?after=3`, `sim/429?times=2&retry_after=1`, `sim/paced?tokens=200&interval_s=0.02`.

Events are counted without the opening role chunk, which travels with the first token: `after=0` strikes after the head
and before any event.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator, Mapping
from typing import Any, Literal, get_args
from urllib.parse import parse_qsl

import attrs
import msgspec

from supervisor.errors import ConfigurationError

__all__ = [
    "PRESETS",
    "Close",
    "ErrorShape",
    "FaultName",
    "Hang",
    "Pause",
    "Script",
    "Send",
    "Step",
    "plan",
    "script_for_model",
]

FaultName = Literal[
    "bad-chunk",
    "bad-json",
    "drop",
    "drop-head",
    "end",
    "error",
    "error-after-finish",
    "extra-after-done",
    "garbage-head",
    "hang-after-finish",
    "huge-head",
    "oversized",
    "reset",
    "reset-head",
    "silent",
    "stall",
]
"""`bad-chunk`: break the chunked framing. `drop`: close in the middle of an event. `end`: end the body well after `after` events, with no marker. `drop-head`,
`reset-head`: close or reset instead of answering. `silent`: never answer. `hang-after-finish`: no `[DONE]`, no end."""

ErrorShape = Literal["data", "event", "chunk", "field", "bare", "string", "flat"]
"""How an error inside a stream is told: in a `data:` object, under `event: error`, in a chunk with
`finish_reason: "error"`, in an SSE *field* named `error`, as a line of bare JSON, as a string, or without an envelope."""

CYCLE = 1024
"""The numbered words repeat after this many, so that a flood is sent from prebuilt bytes."""

_NEWLINES = {"lf": b"\n", "crlf": b"\r\n", "cr": b"\r"}
_ID = "chatcmpl-sim"
_CREATED = 1_700_000_000
_MODEL = "sim-1"
_REASONS = {
    200: "OK", 204: "No Content", 307: "Temporary Redirect", 308: "Permanent Redirect", 400: "Bad Request",
    401: "Unauthorized", 403: "Forbidden", 404: "Not Found", 408: "Request Timeout", 409: "Conflict",
    413: "Content Too Large", 425: "Too Early", 429: "Too Many Requests", 500: "Internal Server Error",
    502: "Bad Gateway", 503: "Service Unavailable", 504: "Gateway Timeout", 529: "Overloaded",
}  # fmt: skip


@attrs.frozen(kw_only=True)
class Script:
    """What one request gets. Times are in seconds; the defaults are a well-formed answer of eight words, at once."""

    tokens: int | None = 8
    """How many numbered words to send when `text` is None; None: endless, until the client closes."""
    text: str | None = None
    """The answer, sent a word an event."""
    interval_s: float = 0.0
    """The pace: one write (`events_per_write` events) each interval. 0: as fast as the client reads."""
    head_after_s: float = 0.0
    first_after_s: float = 0.0
    """The silence between the head and the first event."""
    events_per_write: int = 1
    role: bool = True
    """Whether the first token is preceded by the chunk that names the role."""
    usage: bool = True
    """Whether the chunk with the usage is sent after the finish reason."""
    finish_reason: str | None = "stop"
    done: bool = True
    """Whether `[DONE]` is sent."""
    framing: Literal["chunked", "content-length", "until-close"] = "chunked"
    chunk_bytes: int = 0
    """The size of chunks, cut without regard to events; 0: one chunk an event."""
    keep_alive: bool = True
    comment_every: int = 0
    """A comment line before each so many events; 0: none."""
    heartbeat_s: float = 0.0
    """While stalled, a comment each so many seconds; 0: silence."""
    newline: Literal["lf", "crlf", "cr"] = "lf"
    trickle_bytes: int = 0
    """Write so many bytes at a time, head included; 0: whole writes."""
    trickle_interval_s: float = 0.0
    fault: FaultName | None = None
    after: int = 3
    """How many events are sent before the fault."""
    times: int | None = None
    """How many requests with this script get the fault or the status; later ones are answered well. None: all."""
    size_bytes: int = 8 << 20
    """The size of an oversized event or a huge head."""
    error_shape: ErrorShape = "data"
    status: int = 200
    message: str | None = None
    """The provider's message in an error."""
    code: str | None = None
    retry_after: str | None = None
    retry_after_ms: str | None = None
    location: str | None = None
    echo_credential: bool = False
    """Whether the error message repeats the credential of the request, as some providers do."""
    content_type: str = "text/event-stream"
    headers: tuple[tuple[str, str], ...] = ()
    body: bytes | None = None
    """Sent as it is in place of events."""
    key: str = ""
    """Ignored; tells apart scripts that are counted separately by `times`."""

    def __attrs_post_init__(self) -> None:
        for field in ("events_per_write",):
            if getattr(self, field) < 1:
                raise ConfigurationError(field, getattr(self, field), "an integer of at least 1")
        for field in (
            "interval_s",
            "head_after_s",
            "first_after_s",
            "after",
            "heartbeat_s",
            "trickle_interval_s",
        ):
            if getattr(self, field) < 0:
                raise ConfigurationError(field, getattr(self, field), "a number that is not negative")
        if not 100 <= self.status <= 599:
            raise ConfigurationError("status", self.status, "an HTTP status")
        if self.framing == "content-length" and self.tokens is None and self.text is None:
            raise ConfigurationError("framing", self.framing, "another framing for an endless answer")

    @property
    def pieces(self) -> int | None:
        """How many token events a well-formed answer has; None: endless."""
        return self.tokens if self.text is None else len(_words(self.text))

    def expected_text(self, events: int | None = None) -> str:
        """Return the text of the first `events` events, or of the whole answer."""
        if self.text is not None:
            return "".join(_words(self.text)[:events])
        count = self.tokens if events is None else events if self.tokens is None else min(events, self.tokens)
        if count is None:
            raise ConfigurationError("events", events, "a number, as the answer is endless")
        return "".join(_numbered(i) for i in range(count))

    def well(self) -> Script:
        """Return the same answer without its fault."""
        return attrs.evolve(
            self, fault=None, status=200, times=None, retry_after=None, retry_after_ms=None, body=None,
            content_type="text/event-stream", location=None, head_after_s=0.0,
        )  # fmt: skip


PRESETS: Mapping[str, Mapping[str, Any]] = {
    "ok": {},
    "paced": {"tokens": 100, "interval_s": 0.02},
    "flood": {"tokens": 100_000, "events_per_write": 64},
    "endless": {"tokens": None, "interval_s": 0.02},
    "trickle": {"trickle_bytes": 1},
    "no-marker": {"finish_reason": None, "done": False, "usage": False},
    "no-done": {"done": False},
    "json": {"content_type": "application/json"},
}
"""Names for `sim/<name>` beside the faults and the HTTP statuses."""


@functools.cache
def _field_types() -> dict[str, Any]:
    attrs.resolve_types(Script)
    return {f.name: f.type for f in attrs.fields(Script) if f.name not in {"headers", "body"}}


@functools.lru_cache(maxsize=4096)
def script_for_model(model: str) -> Script | None:
    """Read a script from a model name. None if the name does not begin with `sim/`.

    Raises ConfigurationError naming what is not understood.
    """
    scheme, slash, rest = model.partition("/")
    if scheme != "sim" or not slash:
        return None
    name, _, query = rest.partition("?")
    fields: dict[str, Any] = {}
    if name in PRESETS:
        fields.update(PRESETS[name])
    elif name in get_args(FaultName):
        fields["fault"] = name
    elif name.isascii() and name.isdecimal():
        fields["status"] = int(name)
    else:
        raise ConfigurationError(
            "model", model, f"sim/ and one of {', '.join([*PRESETS, *get_args(FaultName)])} or a status"
        )
    types = _field_types()
    for field, value in parse_qsl(query, keep_blank_values=True):
        if field not in types:
            raise ConfigurationError(f"model field {field}", value, f"one of {', '.join(types)}")
        try:
            fields[field] = (
                value if types[field] is str else msgspec.convert(value, types[field], strict=False)
            )
        except msgspec.ValidationError as exc:
            raise ConfigurationError(f"model field {field}", value, str(exc)) from None
    return Script(**fields)


# --- steps -----------------------------------------------------------------------------------------------------------


@attrs.frozen
class Send:
    """Write these bytes, which hold so many token events."""

    data: bytes
    events: int = 0


@attrs.frozen
class Pause:
    """Wait so many seconds after the previous pause ended (so that a pace does not drift)."""

    seconds: float


@attrs.frozen
class Hang:
    """Do nothing until the client goes, except `beat` each `every_s` seconds if that is not 0."""

    beat: bytes = b""
    every_s: float = 0.0


@attrs.frozen
class Close:
    """End the connection: with a FIN, or with a RST."""

    reset: bool = False


Step = Send | Pause | Hang | Close


def plan(script: Script, *, credential: str = "", stream: bool = True) -> Iterator[Step]:
    """Yield the steps of one answer. The connection may be used again if they end without a `Close`."""
    if script.fault in ("drop-head", "reset-head"):
        yield Close(reset=script.fault == "reset-head")
        return
    if script.fault == "silent":
        yield Hang()
        return
    if script.head_after_s:
        yield Pause(script.head_after_s)
    if script.fault == "garbage-head":
        yield Send(b"\x00\xff this is not HTTP\r\n\r\n")
        yield Close()
        return
    if script.status != 200:
        yield from _whole(script, script.body or error_body(script, credential), "application/json")
    elif script.body is not None:
        yield from _whole(script, script.body, script.content_type)
    elif not stream or script.content_type.startswith("application/json"):
        yield from _whole(script, _completion(script), "application/json")
    else:
        yield from _streamed(script, credential)
    if script.framing == "until-close" or not script.keep_alive:
        yield Close()


def error_body(script: Script, credential: str = "") -> bytes:
    """Return the JSON body of an HTTP error, in OpenAI's shape."""
    message = script.message or f"simulated {_REASONS.get(script.status, 'error')}"
    if script.echo_credential:
        message = f"{message}: Incorrect API key provided: {credential}"
    kind = {401: "authentication_error", 429: "rate_limit_error"}.get(script.status, "server_error")
    return msgspec.json.encode({"error": {"message": message, "type": kind, "code": script.code}})


def _whole(script: Script, body: bytes, content_type: str) -> Iterator[Step]:
    sized = (
        script if script.framing != "chunked" else attrs.evolve(script, framing="content-length", tokens=0)
    )
    yield Send(_head(sized, content_type, len(body)))
    yield Send(body)


def _head(script: Script, content_type: str, length: int | None = None) -> bytes:
    lines = [
        f"HTTP/1.1 {script.status} {_REASONS.get(script.status, 'Status')}",
        f"content-type: {content_type}",
    ]
    if script.framing == "chunked":
        lines.append("transfer-encoding: chunked")
    elif script.framing == "content-length" and length is not None:
        lines.append(f"content-length: {length}")
    if not script.keep_alive or script.framing == "until-close":
        lines.append("connection: close")
    for name, value in (
        ("retry-after", script.retry_after),
        ("retry-after-ms", script.retry_after_ms),
        ("location", script.location),
    ):
        if value is not None:
            lines.append(f"{name}: {value}")
    lines += [f"{name}: {value}" for name, value in script.headers]
    if script.fault == "huge-head":
        lines.append("x-filler: " + "a" * script.size_bytes)
    return ("\r\n".join(lines) + "\r\n\r\n").encode("latin-1")


def _streamed(script: Script, credential: str) -> Iterator[Step]:
    if script.framing == "content-length":
        # The length has to be known first; what a fault leaves out is then missing from it, as in a real cut.
        length = sum(
            len(s.data) for s in _body(attrs.evolve(script.well(), heartbeat_s=0), "") if isinstance(s, Send)
        )
        yield Send(_head(script, script.content_type, length))
    else:
        yield Send(_head(script, script.content_type))
    if script.first_after_s:
        yield Pause(script.first_after_s)
    cut = False
    for step in _body(script, credential):
        yield step
        cut = isinstance(step, Close)
    if script.framing == "chunked" and not cut:
        yield Send(b"0\r\n\r\n")
    elif script.framing == "content-length" and script.fault is not None and not cut:
        yield Close()  # a fault has changed the length that the head promised


def _body(script: Script, credential: str) -> Iterator[Step]:
    total = script.pieces
    stops = script.fault in ("bad-chunk", "bad-json", "drop", "end", "error", "oversized", "reset", "stall")
    limit = total if not stops else script.after if total is None else min(total, script.after)
    yield from _tokens(script, 0, limit)
    match script.fault:
        case "stall":
            yield Hang(_framed(script, b": keep-alive\n\n"), script.heartbeat_s)
            return
        case "drop":
            whole = _framed(script, _event(_chunk({"content": "never seen"})))
            yield Send(whole[: len(whole) // 2])
            yield Close()
            return
        case "reset":
            yield Close(reset=True)
            return
        case "bad-chunk":
            yield Send(b"not a size\r\n")
            yield Close()
            return
        case "end":
            return
        case "error":
            yield Send(_framed(script, _error_event(script, credential)))
            return
        case "bad-json":
            yield Send(_framed(script, b'data: {"choices": [{"delta": {"content": "cut\n\n'))
            yield from _tokens(script, limit or 0, total)
        case "oversized":
            yield from _oversized(script)
            yield from _tokens(script, limit or 0, total)
        case _:
            pass
    yield from _closing(script, credential)


def _closing(script: Script, credential: str) -> Iterator[Step]:
    end: list[bytes] = []
    if script.finish_reason is not None:
        end.append(_event(_chunk({}, script.finish_reason)))
    if script.fault == "error-after-finish":
        end.append(_error_event(script, credential))
        script = attrs.evolve(script, usage=False, done=False)
    if script.usage:
        end.append(_event(_chunk(None, usage=_usage(script))))
    if script.fault == "hang-after-finish":
        yield Send(b"".join(_framed(script, e) for e in end))
        yield Hang(_framed(script, b": keep-alive\n\n"), script.heartbeat_s)
        return
    if script.done:
        end.append(b"data: [DONE]\n\n")
    if script.fault == "extra-after-done":
        end.append(_event(_chunk({"content": "after the end"})))
    if end:
        yield Send(b"".join(_framed(script, e) for e in end))


def _tokens(script: Script, start: int, stop: int | None) -> Iterator[Step]:
    words = None if script.text is None else _words(script.text)
    # Prebuilt blocks repeat every CYCLE words; anything that makes events differ builds them one by one.
    plain = words is None and not script.comment_every
    at = start
    while stop is None or at < stop:
        count = script.events_per_write if stop is None else min(script.events_per_write, stop - at)
        if script.interval_s and at:
            yield Pause(script.interval_s)
        if plain and (at or not script.role):
            yield Send(
                _block(at % CYCLE, count, script.framing == "chunked", script.chunk_bytes, script.newline),
                count,
            )
        else:
            parts = (
                [_framed(script, _event(_chunk({"role": "assistant", "content": ""})))]
                if script.role and not at
                else []
            )
            for i in range(at, at + count):
                if script.comment_every and i % script.comment_every == 0:
                    parts.append(_framed(script, b": keep-alive\n\n"))
                word = _numbered(i) if words is None else words[i]
                parts.append(_framed(script, _event(_chunk({"content": word}))))
            yield Send(b"".join(parts), count)
        at += count


@functools.lru_cache(maxsize=2 * CYCLE)
def _block(start: int, count: int, chunked: bool, chunk_bytes: int, newline: str) -> bytes:  # noqa: FBT001 (a cache key)
    end = _NEWLINES[newline]
    events = (
        _event(_chunk({"content": _numbered(i)})).replace(b"\n", end) for i in range(start, start + count)
    )
    return b"".join(_chunked(e, chunk_bytes) if chunked else e for e in events)


def _oversized(script: Script) -> Iterator[Step]:
    left = script.size_bytes
    yield Send(_framed(script, b'data: {"choices":[{"index":0,"delta":{"content":"'))
    while left > 0:
        piece = min(left, 1 << 16)
        yield Send(_framed(script, b"x" * piece))
        left -= piece
    yield Send(_framed(script, b'"},"finish_reason":null}]}\n\n'))


def _numbered(i: int) -> str:
    return f"w{i % CYCLE} "


@functools.lru_cache(maxsize=256)
def _words(text: str) -> list[str]:
    return re.findall(r"\S+\s*|\s+", text)


def _usage(script: Script) -> dict[str, int]:
    output = script.pieces or 0
    return {"prompt_tokens": 7, "completion_tokens": output, "total_tokens": 7 + output}


def _chunk(
    delta: dict[str, Any] | None, finish_reason: str | None = None, usage: dict[str, int] | None = None
) -> dict[str, Any]:
    choices = [] if delta is None else [{"index": 0, "delta": delta, "finish_reason": finish_reason}]
    chunk: dict[str, Any] = {
        "id": _ID, "object": "chat.completion.chunk", "created": _CREATED, "model": _MODEL, "choices": choices,
    }  # fmt: skip
    if usage is not None:
        chunk["usage"] = usage
    return chunk


def _completion(script: Script) -> bytes:
    message = {"role": "assistant", "content": script.expected_text()}
    return msgspec.json.encode(
        {
            "id": _ID, "object": "chat.completion", "created": _CREATED, "model": _MODEL, "usage": _usage(script),
            "choices": [{"index": 0, "message": message, "finish_reason": script.finish_reason}],
        }
    )  # fmt: skip


def _error_event(script: Script, credential: str) -> bytes:
    message = script.message or "simulated failure inside the stream"
    if script.echo_credential:
        message = f"{message} (key {credential})"
    error = {"message": message, "type": "server_error", "code": script.code}
    envelope = msgspec.json.encode({"error": error})
    match script.error_shape:
        case "data":
            return b"data: " + envelope + b"\n\n"
        case "event":
            return b"event: error\ndata: " + envelope + b"\n\n"
        case "chunk":
            return _event(_chunk({"content": ""}, "error") | {"error": error})
        case "field":
            return b"error: " + msgspec.json.encode(error) + b"\n\n"
        case "bare":
            return envelope + b"\n"
        case "string":
            return b"data: " + msgspec.json.encode({"error": message}) + b"\n\n"
        case "flat":
            return b"data: " + msgspec.json.encode({"object": "error"} | error) + b"\n\n"


def _event(payload: Mapping[str, Any]) -> bytes:
    return b"data: " + msgspec.json.encode(payload) + b"\n\n"


def _framed(script: Script, event: bytes) -> bytes:
    event = event.replace(b"\n", _NEWLINES[script.newline])
    return _chunked(event, script.chunk_bytes) if script.framing == "chunked" else event


def _chunked(data: bytes, size: int) -> bytes:
    if not size or size >= len(data):
        return b"%x\r\n%b\r\n" % (len(data), data)
    return b"".join(
        b"%x\r\n%b\r\n" % (len(p), p) for p in (data[i : i + size] for i in range(0, len(data), size))
    )
