"""A stream's journal, told to one client as the provider would have told it.

The client is a reader like any other: it pulls from the journal, holds nothing beyond the batch that is being sent, and where it is
slow only its own socket waits. What it gets are the payloads of the journal's events, byte for byte, in the framing that the upstream
used.

**The head** goes with the first event, so that until then an HTTP status can say what went wrong: the upstream's own error, passed on,
or one of ours. In an event stream it goes earlier if there is nothing to tell for `keep_alive_s`.

**The end** is told only when the outcome is durable. An answer that ended well ends; any other ends with an error event in the
provider's shape, unless the upstream's own last event was one in just that shape. An answer that is one JSON value is held until then,
and so is never sent by halves; if it says that it failed, it comes with a status that says so too.
"""

from __future__ import annotations

import base64
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Final

import attrs
import msgspec
import trio
from starlette.types import Send

from supervisor.dialects import Dialect
from supervisor.errors import (
    AdmissionError,
    ConnectError,
    GapError,
    StoreError,
    StoreUnavailableError,
    SupervisorClosedError,
    SupervisorError,
    UpstreamClosedError,
    UpstreamError,
)
from supervisor.stores.base import Event
from supervisor.streams import Outcome, State, Stream, Subscription
from supervisor.upstream.source import Answered
from supervisor.web.gateway.apis import CONTENT_TYPES, Api, Failure, Framing, sse

__all__ = ["Relay", "failure_here", "failure_of", "passed_headers", "send_answered", "send_failure"]

_log = logging.getLogger("supervisor.web.gateway")

_PASSED: Final = frozenset(
    {
        "apim-request-id",
        "cf-ray",
        "request-id",
        "retry-after",
        "retry-after-ms",
        "x-request-id",
        "x-should-retry",
    }
)
_PASSED_PREFIXES: Final = ("anthropic-", "openai-", "ratelimit-", "x-ratelimit-")
_NOT_PASSED: Final = frozenset({"anthropic-organization-id", "openai-organization", "openai-project"})
"""They say whose key it is."""

_AS_DATA: Final = (
    (b"content-security-policy", b"default-src 'none'; sandbox"),
    (b"x-content-type-options", b"nosniff"),
)
"""With every answer: its type is the upstream's, and were it a page, it would be one of our origin."""

_STATUSES: Final[Mapping[str, int]] = {
    "connect": 502,
    "http_status": 502,
    "provider_error": 502,
    "truncated": 502,
    "protocol": 502,
    "interrupted": 502,
    "source_error": 500,
    "requested": 499,
    "replaced": 499,
    "detached": 499,
    "shutdown": 503,
}
_TOLD: Final[Mapping[str, str]] = {
    "connect": "the upstream could not be reached",
    "http_status": "the upstream did not answer as it should",
    "truncated": "the upstream's answer broke off before its end",
    "protocol": "the upstream's answer could not be read to its end",
    "interrupted": "the gateway was interrupted; what it had received is kept",
    "source_error": "the gateway failed",
}
"""In place of messages that are the operator's to read: they name addresses. The stream's id leads to them, or else the log."""
_FAULT_STATUSES: Final[Mapping[str, int]] = {
    "rate_limit": 429,
    "overloaded": 503,
    "invalid_request": 400,
    "context_length": 400,
    "content_filter": 400,
}


def passed_headers(answered: Answered | None) -> list[tuple[bytes, bytes]]:
    """Return those of an upstream's headers that its client is to see."""
    if answered is None:
        return []
    return [
        (name.encode("latin-1"), value.encode("latin-1", "replace"))
        for name, value in answered.headers.items()
        if (name in _PASSED or name.startswith(_PASSED_PREFIXES)) and name not in _NOT_PASSED
    ]


def failure_of(outcome: Outcome) -> Failure:
    """Return what a client is told of an answer that did not end well."""
    fault = outcome.fault
    if outcome.state is State.EXPIRED:
        status = 503 if outcome.reason.startswith("reaped") else 504
    elif fault is not None and outcome.reason == "provider_error":
        status = _FAULT_STATUSES.get(fault.kind, 502)
    else:
        status = _STATUSES.get(outcome.reason, 502)
    if outcome.reason == "http_status" and fault is not None and (fault.status or 0) >= 400:
        return Failure(
            status=fault.status or 502,
            code=fault.code or outcome.reason,
            message=fault.message,
            retry_after_s=fault.retry_after_s,
            again=fault.temporary,
        )
    ended = f"the answer ended as {outcome.state.value}({outcome.reason})"
    message = _TOLD.get(outcome.reason) or outcome.message or ended
    if outcome.state is State.CANCELLED:
        by = f" by {outcome.actor}" if outcome.actor else ""
        message = f"the answer was cancelled{by}{f': {outcome.message}' if outcome.message else ''}"
    return Failure(
        status=status,
        code=outcome.reason,
        message=message,
        retry_after_s=None if fault is None else fault.retry_after_s,
        again=outcome.state is not State.CANCELLED and (fault is None or fault.temporary),
    )


def failure_here(error: SupervisorError) -> Failure:
    """Return what a client is told of an error of ours."""
    if isinstance(error, AdmissionError):
        return Failure(status=429, code="admission", message=str(error), retry_after_s=error.retry_after_s)
    if isinstance(error, StoreUnavailableError):
        return Failure(status=503, code="store", message=str(error), retry_after_s=error.retry_after_s)
    if isinstance(error, StoreError | SupervisorClosedError):
        code = "store" if isinstance(error, StoreError) else "closed"
        return Failure(status=503, code=code, message=str(error), retry_after_s=1.0)
    if isinstance(error, UpstreamError):
        _log.warning("an upstream could not be asked: %s", error)
        closed = "truncated" if isinstance(error, UpstreamClosedError) else "protocol"
        code = "connect" if isinstance(error, ConnectError) else closed
        return Failure(status=502, code=code, message=_TOLD[code])
    if isinstance(error, GapError):
        return Failure(status=410, code="gap", message=str(error), again=False)
    _log.error("a request could not be served: %s", error)  # what is wrong here is not the client's to know
    message = "the gateway cannot serve this request as it is configured; its log says why"
    return Failure(status=500, code="configuration", message=message, again=False)


async def send_failure(
    send: Send,
    api: Api,
    failure: Failure,
    headers: Sequence[tuple[bytes, bytes]] = (),
    *,
    body: bytes | None = None,
) -> None:
    """Send an error in the API's shape: our own, or a body that has it."""
    more = [(b"content-type", b"application/json"), *headers]
    if failure.retry_after_s is not None and not any(name == b"retry-after" for name, _ in headers):
        more.append((b"retry-after", b"%d" % max(1, round(failure.retry_after_s))))
    if not failure.again:
        more.append((b"x-should-retry", b"false"))
    await _send_whole(send, failure.status, api.body(failure) if body is None else body, more)


async def send_answered(send: Send, answered: Answered, headers: Sequence[tuple[bytes, bytes]]) -> None:
    """Send what an upstream answered that is no stream, as it is."""
    kind = answered.headers.get("content-type", "application/json").encode("latin-1", "replace")
    await _send_whole(send, answered.status, answered.body, [(b"content-type", kind), *headers])


async def _send_whole(send: Send, status: int, body: bytes, headers: Sequence[tuple[bytes, bytes]]) -> None:
    sized = [*headers, *_AS_DATA, (b"content-length", b"%d" % len(body))]
    await send({"type": "http.response.start", "status": status, "headers": sized})
    await send({"type": "http.response.body", "body": body})


@attrs.define(kw_only=True)
class Relay:
    """Tells one client of one stream. `run` does it, from the beginning to the end."""

    stream: Stream
    api: Api
    dialect: Dialect
    whole: bool
    """Whether the client asked for one JSON value."""
    send: Send
    answered: Callable[[], Answered | None]
    """How the upstream answered, once it has."""
    keep_alive_s: float
    on_first: Callable[[str, bytes], None]
    """Given the first event, its name and payload, before it is sent."""
    _framing: Framing | None = None
    """Set with the head."""
    _events: int = 0
    _last: tuple[str, bytes] = ("", b"")
    _held: tuple[str, bytes] | None = None
    """A JSON value that waits for the outcome."""

    async def run(self, events: Subscription) -> None:
        """Tell all of it. The client's leaving is a cancel."""
        while True:
            batch: Sequence[Event] | None = None
            with trio.move_on_after(self.keep_alive_s):
                try:
                    batch = await events.next_batch()
                except SupervisorError as error:
                    await self._break_off(failure_here(error))
                    return
            if batch is None:
                await self._keep_alive()
            elif await self._tell(batch):
                return

    async def _tell(self, batch: Sequence[Event]) -> bool:
        """Send what a batch has. True if that was the end."""
        parts: list[bytes] = []
        for event in batch:
            kind = event.kind
            if kind == "data":
                self._take(event.name, event.payload, parts)
            elif kind == "skipped":
                kept = _skipped(event)
                if kept is None:
                    await self._flush(parts)
                    message = "an event could not be read, and was too long to be passed on"
                    await self._break_off(Failure(status=502, code="protocol", message=message))
                    return True
                self._take(event.name, kept, parts)
            elif kind == "outcome":
                await self._flush(parts)
                await self._end(Outcome.from_json(event.payload))
                return True
        await self._flush(parts)
        return False

    def _take(self, name: str, payload: bytes, parts: list[bytes]) -> None:
        """Put one event to what is to be sent, in the upstream's framing."""
        if not self._events:
            self.on_first(name, payload)
        framing = self._framing
        if framing is None:
            framing = self._likely_framing()
            if framing == "json" and not self._events:
                self._held = name, payload
                self._last = self._held
                self._events = 1
                return
            if self._held is not None:  # more than one value after all
                parts.append(self._held[1] + b"\n")
                self._held = None
        first = self._events == 0
        self._events += 1
        self._last = name, payload
        if framing == "sse":
            parts.append(sse(name, payload))
        elif framing == "json-array":
            parts += [b"[" if first else b",\r\n", payload]
        else:
            parts += [payload, b"\n"]

    def _likely_framing(self) -> Framing:
        answered = self.answered()
        framing = None if answered is None else answered.framing
        if self.whole and framing in (None, "ndjson"):  # one line of Ollama's is one value
            return "json"
        if framing is not None:
            return framing
        assert self.dialect.framing != "none", "an upstream's dialect has a framing"
        return self.dialect.framing

    async def _flush(self, parts: list[bytes]) -> None:
        if not parts:
            return
        await self._begin()
        await self.send({"type": "http.response.body", "body": b"".join(parts), "more_body": True})
        parts.clear()

    async def _begin(self) -> None:
        """Send the head of a stream, once."""
        if self._framing is not None:
            return
        self._framing = self._likely_framing()
        await self.send(
            {
                "type": "http.response.start",
                "status": 200,
                "headers": [*self._headers(), *_AS_DATA, (b"x-accel-buffering", b"no")],
            }
        )

    def _headers(self) -> list[tuple[bytes, bytes]]:
        answered = self.answered()
        kind = (
            "" if answered is None or answered.framing is None else answered.headers.get("content-type", "")
        )
        kind = kind or CONTENT_TYPES[self._framing or self._likely_framing()]
        return [
            (b"content-type", kind.encode("latin-1", "replace")),
            (b"x-stream-id", self.stream.id.encode()),
            *passed_headers(answered),
        ]

    async def _keep_alive(self) -> None:
        if (
            self.whole
            or self.dialect.framing != "sse"
            or self._framing not in (None, "sse")
            or self._held is not None
        ):
            return
        await self._begin()
        if self._framing == "sse":
            await self.send({"type": "http.response.body", "body": self.api.keep_alive, "more_body": True})

    # --- the end -----------------------------------------------------------------------------------------------------

    async def _end(self, outcome: Outcome) -> None:
        """Tell how it ended."""
        well, held = outcome.state is State.COMPLETED, self._held is not None
        name, payload = self._last
        told = (
            outcome.reason == "provider_error"
            and self._events > 0
            and self.api.tells(None if held else name, payload)
        )
        if well and held:
            await _send_whole(self.send, 200, payload, self._headers())
        elif well or (told and not held):
            await self._begin()
            last = b"" if self._framing != "json-array" else b"]" if self._events else b"[]"
            await self.send({"type": "http.response.body", "body": last})
        else:
            refused = outcome.reason == "http_status"
            await self._break_off(failure_of(outcome), refused=refused, body=payload if told else None)

    async def _break_off(self, failure: Failure, *, refused: bool = False, body: bytes | None = None) -> None:
        """End an answer that is not whole: by a status, or, if the head has been sent, by an event.

        `refused`: by an HTTP error. `body`: what the upstream says of it, in the API's shape.
        """
        failure = attrs.evolve(failure, stream_id=self.stream.id)
        if self._framing is None:
            answered = self.answered()
            headers = [(b"x-stream-id", self.stream.id.encode()), *passed_headers(answered)]
            if refused and answered is not None and answered.framing is None:
                await send_answered(self.send, answered, headers)
            else:
                await send_failure(self.send, self.api, failure, headers, body=body)
            return
        name, payload = self.api.last(failure, self._events)
        if self._framing == "sse":
            last = sse(name, payload)
        elif self._framing == "json-array":
            last = b"%b%b]" % (b",\r\n" if self._events else b"[", payload)
        else:
            last = payload + b"\n"
        await self.send({"type": "http.response.body", "body": last})


class _SkippedRecord(msgspec.Struct):
    """What the journal has of an event that could not be read."""

    bytes: int
    payload: str | None = None
    payload_b64: str | None = None


def _skipped(event: Event) -> bytes | None:
    """Return the payload of an event that could not be read; None if it was too long to be kept."""
    record = msgspec.json.decode(event.payload, type=_SkippedRecord)
    kept = b"" if record.payload is None else record.payload.encode()
    if record.payload_b64 is not None:
        kept = base64.b64decode(record.payload_b64)
    return kept if len(kept) == record.bytes else None
