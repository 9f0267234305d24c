"""What a script looks like on the wire: steps (send these bytes, pause, hang, close), made without touching a socket.

So what a fault is, is written down and tested in one place, and the server in `server.py` only carries steps out.

Most answers are planned in writes of several words, from blocks that were built once, because a flood must cost the
simulator less than whoever reads it. An answer that is cut at an event of any kind, or that begins after one (a resumed
response, an event stream with a `Last-Event-ID`), is planned event by event instead. Both give the same bytes.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Generator, Iterable, Iterator

import attrs

from supervisor.testing.upstream.answers import OPENAI_CHAT, Answer, Event, Failure, Shape, frame
from supervisor.testing.upstream.answers.shape import json
from supervisor.testing.upstream.script import CYCLE, Script

__all__ = ["REASONS", "Close", "Hang", "Pause", "Send", "Step", "Until", "ending_of", "plan", "total_events"]

_NEWLINES = {"lf": b"\n", "crlf": b"\r\n", "cr": b"\r"}
_CUTS = ("bad-chunk", "bad-json", "drop", "end", "error", "oversized", "reset", "stall")
REASONS = {
    200: "OK", 204: "No Content", 301: "Moved Permanently", 302: "Found", 303: "See Other",
    307: "Temporary Redirect", 308: "Permanent Redirect", 400: "Bad Request",
    401: "Unauthorized", 403: "Forbidden", 404: "Not Found", 408: "Request Timeout", 409: "Conflict",
    413: "Content Too Large", 425: "Too Early", 429: "Too Many Requests", 500: "Internal Server Error",
    502: "Bad Gateway", 503: "Service Unavailable", 504: "Gateway Timeout", 529: "Overloaded",
}  # fmt: skip


@attrs.frozen
class Send:
    """Write these bytes, which hold so many words, and so many events of any kind."""

    data: bytes
    words: int = 0
    events: int = 0


@attrs.frozen
class Pause:
    """Wait so many seconds after the previous pause ended (so that a pace does not drift)."""

    seconds: float


@attrs.frozen
class Until:
    """Wait until this time of trio's clock."""

    at: float


@attrs.frozen
class Hang:
    """Do nothing until the client goes, except `beat` each `every_s` seconds if that is not 0."""

    beat: bytes = b""
    every_s: float = 0.0


@attrs.frozen
class Close:
    """End the connection: with a FIN, or with a RST."""

    reset: bool = False


Step = Send | Pause | Until | Hang | Close


def plan(
    script: Script,
    *,
    shape: Shape = OPENAI_CHAT,
    answer: Answer | None = None,
    credential: str = "",
    stream: bool = True,
    skip: int = 0,
    due: Callable[[int], float | None] | None = None,
) -> Iterator[Step]:
    """Yield the steps of one response. The connection may be used again if they end without a `Close`.

    `skip` events are left out, as the client has had them. `due` says when the event with this number is there to be
    sent, by trio's clock, or None if it never will be; without it, the script's pace says.
    """
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
    told = Answer(script=script) if answer is None else answer
    if script.status != 200:
        yield from _whole(script, script.body or error_body(script, shape, credential), "application/json")
    elif script.body is not None:
        yield from _given(script, script.body, shape)
    elif told.count is None and not stream:
        yield Hang()  # all of an endless answer takes for ever
    elif not stream or (script.content_type or "").startswith("application/json"):
        yield from _whole(script, json(shape.whole(told)), "application/json")
    else:
        yield from _streamed(_Telling(script, shape, told, credential, skip, due))
    if script.framing == "until-close" or not script.keep_alive:
        yield Close()


def error_body(script: Script, shape: Shape, credential: str = "") -> bytes:
    """Return the JSON body of an HTTP error, in the provider's shape."""
    if script.status in (204, 304) or 300 <= script.status < 400:
        return b""
    message = script.message or f"simulated {REASONS.get(script.status, 'error')}"
    if script.echo_credential:
        message = f"{message}: Incorrect API key provided: {credential}"
    return json(shape.envelope(Failure(message=message, code=script.code, status=script.status)))


def total_events(shape: Shape, answer: Answer) -> int | None:
    """Return how many events tell the whole answer; None: endless."""
    if answer.count is None:
        return None
    before = sum(1 for _ in shape.opening(answer)) + answer.count
    return before + len(ending_of(shape, answer, before))


def ending_of(shape: Shape, answer: Answer, at: int) -> tuple[Event, ...]:
    """Return the events after the text, the first of which has this number."""
    without = () if answer.script.done else ("marker",)
    return tuple(event for event in shape.closing(answer, at) if event.kind not in without)


def _whole(script: Script, body: bytes, content_type: str) -> Iterator[Step]:
    if script.status == 204:
        yield Send(_head(attrs.evolve(script, framing="content-length", tokens=0), None))
        return
    sized = (
        script if script.framing != "chunked" else attrs.evolve(script, framing="content-length", tokens=0)
    )
    yield Send(_head(sized, content_type, len(body)))
    yield Send(body)


def _given(script: Script, body: bytes, shape: Shape) -> Iterator[Step]:
    content_type = script.content_type or shape.content_type
    if script.fault not in ("drop", "reset", "stall"):
        yield from _whole(script, body, content_type)
        return
    yield Send(_head(script, content_type))
    yield Send(_chunked(body, 0) if script.framing == "chunked" and body else body)
    if script.fault == "stall":
        yield Hang(_framed(script, shape.beat), script.heartbeat_s)
    yield Close(reset=script.fault == "reset")


def _head(script: Script, content_type: str | None, length: int | None = None) -> bytes:
    lines = [f"HTTP/1.1 {script.status} {REASONS.get(script.status, 'Status')}"]
    if content_type is not None:
        lines.append(f"content-type: {content_type}")
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


# --- the body of a stream ----------------------------------------------------------------------------------------------


@attrs.frozen
class _Telling:
    """One answer on its way: what is told, in which shape, and what goes wrong."""

    script: Script
    shape: Shape
    answer: Answer
    credential: str = ""
    skip: int = 0
    due: Callable[[int], float | None] | None = None

    def bytes_of(self, event: Event, at: int) -> bytes:
        return _framed(self.script, frame(self.shape.framing, event, at))

    @property
    def beat(self) -> bytes:
        return _framed(self.script, self.shape.beat)


def _streamed(telling: _Telling) -> Iterator[Step]:
    script = telling.script
    content_type = script.content_type or telling.shape.content_type
    if script.framing == "content-length":
        # The length has to be known first; what a fault leaves out is then missing from it, as in a real cut.
        plain = attrs.evolve(telling, script=attrs.evolve(script.well(), heartbeat_s=0), due=None)
        length = sum(len(s.data) for s in _body(plain) if isinstance(s, Send))
        yield Send(_head(script, content_type, length))
    else:
        yield Send(_head(script, content_type))
    if script.first_after_s and telling.due is None:
        yield Pause(script.first_after_s)
    cut = False
    for step in _body(telling):
        yield step
        cut = isinstance(step, Close)
    if script.framing == "chunked" and not cut:
        yield Send(b"0\r\n\r\n")
    elif script.framing == "content-length" and script.fault is not None and not cut:
        yield Close()  # a fault has changed the length that the head promised


def _body(telling: _Telling) -> Iterator[Step]:
    script = telling.script
    if telling.skip or telling.due is not None or script.at_event is not None:
        yield from _each(telling)
        return
    total = telling.answer.count
    cuts = script.fault in _CUTS
    limit = total if not cuts else script.after if total is None else min(total, script.after)
    yield from _words(telling, 0, limit)
    if not cuts:
        yield from _closing(telling)
        return
    at = (limit or 0) + (len(_opening(telling)) if limit else 0)
    # The event that is not sent whole is one more word, also where the answer had none left.
    event = telling.shape.token(telling.answer, at, "never seen")
    if (yield from _strike(telling, at, event)):
        yield from _words(telling, limit or 0, total)
        yield from _closing(telling)


def _each(telling: _Telling) -> Iterator[Step]:
    """Plan event by event: from the one after `skip`, when it is due, up to the fault."""
    script = telling.script
    words = 0
    left = telling.answer.count
    if left is not None:
        left = max(0, left - max(0, telling.skip - len(_opening(telling))))
    limit = (
        script.at_event
        if script.at_event is not None
        else script.after
        if left is None
        else min(left, script.after)
    )
    struck = script.fault not in _CUTS
    for at, event in itertools.islice(enumerate(_events(telling)), telling.skip, None):
        counted = at - telling.skip if script.at_event is not None else words
        if not struck and counted >= limit:
            struck = True
            if not (yield from _strike(telling, at, event)):
                return
        if telling.due is not None:
            when = telling.due(at)
            if when is None:
                return
            yield Until(when)
            if telling.due(at) is None:  # stopped while it was waited for
                return
        elif script.interval_s and event.kind == "token" and words:
            yield Pause(script.interval_s)
        is_word = event.kind == "token"
        words += is_word
        yield Send(telling.bytes_of(event, at), int(is_word), 1)
    if not struck:
        yield from _strike(telling, telling.skip, None)


def _events(telling: _Telling) -> Iterator[Event]:
    opening = _opening(telling)
    yield from opening
    answer, shape = telling.answer, telling.shape
    for i in itertools.count() if answer.count is None else range(answer.count):
        yield shape.token(answer, len(opening) + i, answer.piece(i))
    yield from _ending(telling)


def _strike(telling: _Telling, at: int, event: Event | None) -> Generator[Step, None, bool]:
    """Yield the steps of the fault at this event; return whether the answer goes on after them."""
    script, shape = telling.script, telling.shape
    match script.fault:
        case "stall":
            yield Hang(telling.beat, script.heartbeat_s)
        case "drop":
            if event is not None:
                whole = telling.bytes_of(event, at)
                yield Send(whole[: len(whole) // 2])
            yield Close()
        case "reset":
            yield Close(reset=True)
        case "bad-chunk":
            yield Send(b"not a size\r\n")
            yield Close()
        case "error":
            yield Send(_error(telling, at))
        case "bad-json":
            yield Send(telling.bytes_of(Event(shape.broken), at))
            return True
        case "oversized":
            yield from _oversized(telling, at)
            return True
        case _:
            pass
    return False


def _oversized(telling: _Telling, at: int) -> Iterator[Step]:
    script = telling.script
    whole = frame(telling.shape.framing, telling.shape.token(telling.answer, at, "@@"), at)
    before, _, after = whole.partition(b"@@")
    yield Send(_framed(script, before))
    left = script.size_bytes
    while left > 0:
        piece = min(left, 1 << 16)
        yield Send(_framed(script, b"x" * piece))
        left -= piece
    yield Send(_framed(script, after))


def _opening(telling: _Telling) -> tuple[Event, ...]:
    return tuple(telling.shape.opening(telling.answer))


def _ending(telling: _Telling) -> tuple[Event, ...]:
    answer = telling.answer
    return ending_of(telling.shape, answer, len(_opening(telling)) + (answer.count or 0))


def _closing(telling: _Telling) -> Iterator[Step]:
    script = telling.script
    first = len(_opening(telling)) + (telling.answer.count or 0)
    events: Iterable[Event] = _ending(telling)
    if script.fault == "hang-after-finish":
        events = [event for event in events if event.kind != "marker"]
    elif script.fault == "error-after-finish":
        events = [event for event in events if event.kind not in ("marker", "usage")]
    if not telling.answer.count:  # what opens an answer had no word to travel with
        events = [*_opening(telling), *events]
        first = 0
    end = [telling.bytes_of(event, at) for at, event in enumerate(events, first)]
    at = first + len(end)
    if script.fault == "error-after-finish":
        end.append(_error(telling, at))
    elif script.fault == "extra-after-done":
        end.append(telling.bytes_of(telling.shape.token(telling.answer, at, "after the end"), at))
    if end:
        yield Send(b"".join(end), 0, len(end))
    if script.fault == "hang-after-finish":
        yield Hang(telling.beat, script.heartbeat_s)


def _words(telling: _Telling, start: int, stop: int | None) -> Iterator[Step]:
    script, shape, answer = telling.script, telling.shape, telling.answer
    opening = _opening(telling)
    before = len(opening)
    # Prebuilt blocks repeat every CYCLE words; anything that makes events differ builds them one by one.
    plain = script.text is None and not script.comment_every and not shape.numbered and not answer.lead
    at = start
    while stop is None or at < stop:
        count = script.events_per_write if stop is None else min(script.events_per_write, stop - at)
        if script.interval_s and at:
            yield Pause(script.interval_s)
        if plain and at:
            chunk_bytes = script.chunk_bytes if script.framing == "chunked" else None
            data = _block(shape, (answer.start + at) % CYCLE, count, script.newline, chunk_bytes)
            yield Send(data, count, count)
        else:
            parts = [telling.bytes_of(event, i) for i, event in enumerate(opening)] if not at else []
            opened = len(parts)
            for i in range(at, at + count):
                if script.comment_every and i % script.comment_every == 0:
                    parts.append(telling.beat)
                parts.append(telling.bytes_of(shape.token(answer, before + i, answer.piece(i)), before + i))
            yield Send(b"".join(parts), count, opened + count)
        at += count


@functools.lru_cache(maxsize=2 * CYCLE)
def _block(shape: Shape, start: int, count: int, newline: str, chunk_bytes: int | None) -> bytes:
    end = _NEWLINES[newline]
    answer = Answer(script=Script(tokens=None))
    # Not the first event of its body: in a JSON array, one that follows a comma.
    events = (
        frame(shape.framing, shape.token(answer, 1, answer.piece(i)), 1).replace(b"\n", end)
        for i in range(start, start + count)
    )
    return b"".join(events if chunk_bytes is None else (_chunked(event, chunk_bytes) for event in events))


def _error(telling: _Telling, at: int) -> bytes:
    script, shape = telling.script, telling.shape
    message = script.message or "simulated failure inside the stream"
    if script.echo_credential:
        message = f"{message} (key {telling.credential})"
    failure = Failure(message=message, code=script.code)
    told = script.error_shape
    if told in shape.other_errors:
        return telling.bytes_of(shape.other_errors[told](failure, at), at)
    error = {"message": message, "type": "server_error", "code": script.code}
    if told == "field" and shape.framing == "sse":
        return _framed(script, b"error: " + json(error) + b"\n\n")
    if told == "bare" and shape.framing == "sse":
        return _framed(script, json({"error": error}) + b"\n")
    if told == "string":
        return telling.bytes_of(Event(json({"error": message})), at)
    if told == "flat":
        return telling.bytes_of(Event(json({"object": "error"} | error)), at)
    return telling.bytes_of(shape.error(failure, at), at)


def _framed(script: Script, event: bytes) -> bytes:
    event = event.replace(b"\n", _NEWLINES[script.newline])
    return _chunked(event, script.chunk_bytes) if script.framing == "chunked" else event


def _chunked(data: bytes, size: int) -> bytes:
    if not size or size >= len(data):
        return b"%x\r\n%b\r\n" % (len(data), data)
    return b"".join(
        b"%x\r\n%b\r\n" % (len(p), p) for p in (data[i : i + size] for i in range(0, len(data), size))
    )
