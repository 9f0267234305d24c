"""`HttpSource`: one request to a provider, made as often as the retry policy allows, read into a stream.

The chain from bytes to journal is one synchronous call (`BodyReader.feed`); what is here is around it: build the request,
open an exchange, read, and decide what becomes of an attempt that failed. That decision is made in one place. Whatever
ends an attempt badly (no connection, an HTTP error, a body that breaks off, an error from the provider) becomes a
`_Failure`, and only `__call__` turns that into another attempt or into the stream's ending. To that end the reader does not
write to the stream's `Output` but to a `_Attempt`, which passes everything on at once, except a failure, and an error
that comes before any event: those it keeps. Nothing is awaited between the failure and the decision.

Providers are sent a credential, and some repeat it in their error messages. So everything that comes back (payloads and
names of events, what they mean, reasons, faults) is looked through for it before it reaches a fault, a journal or a
message: as it stands, and as JSON may escape it, also in JSON within strings of JSON, up to `_LEVELS` deep. Three
limits: a credential shorter than 8 characters (`EMPTY`, `none`) is no secret and is left, as it may be an ordinary word;
one that arrives in pieces, split over several events, is not recognized; nor is one that is encoded in other ways.
"""

from __future__ import annotations

import random
import re
import ssl
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Final, Protocol

import attrs
import httpx
import msgspec
import trio

from supervisor.dialects import Delta, Dialect, Fault, ToolCallDelta, UnparseableError
from supervisor.dialects.reading import BodyReader
from supervisor.errors import (
    ConfigurationError,
    ConnectError,
    RemoteProtocolError,
    UpstreamClosedError,
    UpstreamError,
)
from supervisor.upstream.exchange import Exchange
from supervisor.upstream.retry import RetryPolicy, retry_after_s, should_retry

if TYPE_CHECKING:
    from supervisor.streams import Output
    from supervisor.upstream.catalog import Upstream

__all__ = ["HttpSource", "Transport"]

MAX_REQUEST_BYTES: Final = 32 << 20
"""The largest request body."""
ERROR_BODY_BYTES: Final = 64 << 10
"""How much of an error response is read."""
ERROR_BODY_S: Final = 5.0
"""How long the body of an error response is waited for, in seconds: its status is known already."""

_HIDDEN: Final = "[credential removed]"
_SECRET_CHARS: Final = 8
_PREFIX_CHARS: Final = 12
_CAUSE_CHARS: Final = 500
_WITHHELD: Final = msgspec.json.encode({"choices": [], "note": _HIDDEN})
"""What is journaled of a payload from which the credential could not be taken out: an event that means nothing."""
_LEVELS: Final = 4
"""How often JSON in a string in JSON is looked into."""
_ESCAPE: Final = re.compile(r"\\(?:u([0-9a-fA-F]{4})|(.))", re.DOTALL)
_PLAIN: Final = {"b": "\b", "f": "\f", "n": "\n", "r": "\r", "t": "\t"}


class Transport(Protocol):
    """What a source needs of `StreamTransport`."""

    async def open(self, request: httpx.Request, *, on_sent: Callable[[], None] | None = None) -> Exchange:
        """Send a request, call `on_sent` when all of it is sent, return when the response's head is there."""
        ...


@attrs.frozen
class _Failure:
    """How an attempt failed: what the stream's outcome will say, unless there is another attempt."""

    reason: str
    fault: Fault
    again: bool
    """Whether another attempt may help."""
    event: tuple[bytes, str, tuple[Delta, ...]] | None = None
    """The upstream's event that told it, where it was the first: for the journal, if it is the ending."""


class HttpSource:
    """A source that posts one request to an upstream and reads its stream.

    upstream: where and how. request: the JSON object to post, or its bytes; `"stream": true` is put in where it is
    missing. transport: shared by all streams. retry: in place of the upstream's policy.

    Attempts are repeated only before the first event. Cancelled, it closes its connection at once, in whatever phase.
    Raises ConfigurationError for a request that is no JSON object, is too large, or says `"stream": false`, and for a
    credential that is missing: it is looked for here, and read again for each attempt.
    """

    __slots__ = ("_body", "_draw", "_retry", "_transport", "_upstream", "dialect", "upstream")

    def __init__(
        self,
        upstream: Upstream,
        request: Mapping[str, Any] | bytes,
        *,
        transport: Transport,
        retry: RetryPolicy | None = None,
        draw: Callable[[], float] = random.random,
    ) -> None:
        self._upstream = upstream
        self._body = _streaming_body(request)
        self._transport = transport
        self._retry = upstream.retry if retry is None else retry
        self._draw = draw
        self.dialect: Dialect = upstream.dialect
        self.upstream: str = upstream.name
        self._credential()

    def __repr__(self) -> str:
        return f"<HttpSource {self._upstream.name}: {len(self._body)} bytes to {self._upstream.url}>"

    async def __call__(self, out: Output, /) -> None:
        """Make attempts until the stream is sealed. The stream's clocks bound all that is waited for here."""
        number, cause, delay_s = 1, None, 0.0
        while True:
            details = {} if number == 1 else {"rung": "retry"}
            out.attempt(number, cause=cause, delay_s=round(delay_s, 3), upstream=self.upstream, **details)
            failure = await self._attempt(out)
            if failure is None or out.sealed:
                return
            again = self._retry.delay_s(number, asked_s=failure.fault.retry_after_s, draw=self._draw)
            if not failure.again or again is None:
                if failure.event is not None:
                    out.append(*failure.event)
                out.fail(failure.reason, _counted(failure.fault, number))
                return
            cause, delay_s = f"{failure.reason}: {failure.fault.message}"[:_CAUSE_CHARS], again
            out.waiting()
            await trio.sleep(delay_s)
            number += 1

    # --- one attempt -------------------------------------------------------------------------------------------------

    async def _attempt(self, out: Output) -> _Failure | None:
        """Make one attempt. None: the stream is sealed."""
        secret, request = self._request()
        attempt = _Attempt(out, secret, self.dialect)
        try:
            exchange = await self._transport.open(request, on_sent=attempt.sent)
        except UpstreamError as exc:
            return attempt.hide(_not_opened(exc))
        if not attempt.connected:  # an answer that came before the whole request was sent
            attempt.sent()
        out.on_abort(exchange.abort)
        try:
            if 200 <= exchange.status < 300:
                return await self._read(exchange, attempt)
            return attempt.hide(await self._refused(exchange))
        except trio.ClosedResourceError:
            # The seal closed the exchange while this task was about to run: no cancel was delivered to it.
            if not out.sealed:
                raise
            return None
        finally:
            out.on_abort(None)
            exchange.abort()  # of no effect after the aclose of an exchange that ended well

    async def _read(self, exchange: Exchange, attempt: _Attempt) -> _Failure | None:
        encoding = exchange.headers.get("content-encoding", "identity").strip().lower()
        if encoding not in ("", "identity"):
            message = f"the response is encoded as {encoding[:40]!r}, though only identity was asked for"
            return attempt.hide(_Failure("protocol", Fault(kind="protocol", message=message), again=False))
        out = attempt.out
        reader = BodyReader(
            self.dialect,
            attempt,
            content_type=exchange.headers.get("content-type"),
            max_line_bytes=out.max_event_bytes,  # an event is most often one line
            max_event_bytes=out.max_event_bytes,
        )
        broken: RemoteProtocolError | None = None
        while not attempt.sealed:
            try:
                data = await exchange.receive()
            except UpstreamClosedError as exc:
                reader.end(clean=False, cause=str(exc))
                break
            except RemoteProtocolError as exc:
                broken = exc
                reader.end(clean=False, cause=str(exc))
                break
            if not data:
                reader.end(clean=True)
                break
            reader.feed(data)
            out.flush()
            if out.congested:
                await out.flow()
        if reader.terminal or exchange.at_end:
            await exchange.aclose()
        if attempt.failed is None:
            return None
        reason, fault = attempt.failed
        if broken is not None and reason == "truncated":
            reason, fault = "protocol", Fault(kind="protocol", message=str(broken))
        again = not attempt.begun and (
            reason == "truncated" or (reason == "provider_error" and fault.temporary)
        )
        return attempt.hide(_Failure(reason, fault, again, attempt.told))

    async def _refused(self, exchange: Exchange) -> _Failure:
        """Read an HTTP error."""
        status, headers = exchange.status, exchange.headers
        if status in (301, 302, 303, 307, 308):
            message = (
                f"the upstream redirects (HTTP {status}) to {_place(headers.get('location', ''))}; redirects are not "
                f"followed, as they would take the request and its credential elsewhere: correct the base_url"
            )
            return _Failure(
                "http_status", Fault(kind="invalid_request", message=message, status=status), again=False
            )
        body = bytearray()
        with trio.move_on_after(ERROR_BODY_S):
            try:
                while len(body) < ERROR_BODY_BYTES and (data := await exchange.receive()):
                    body += data
            except UpstreamError:
                pass  # the status stands, with as much of the message as has come
        if exchange.at_end:
            await exchange.aclose()
        if headers.get("content-encoding", "identity").strip().lower() not in ("", "identity"):
            body.clear()
        fault = self.dialect.fault(status, bytes(body[:ERROR_BODY_BYTES]))
        if (asked := retry_after_s(headers)) is not None:
            fault = msgspec.structs.replace(fault, retry_after_s=asked)
        return _Failure("http_status", fault, should_retry(self._retry, status, fault, headers))

    def _request(self) -> tuple[str, httpx.Request]:
        upstream = self._upstream
        secret = self._credential()
        headers = httpx.Headers(
            {
                "Content-Type": "application/json",
                "Accept": "text/event-stream",
                "Accept-Encoding": "identity",
                "User-Agent": "stream-supervisor",
            }
        )
        headers.update(upstream.headers)
        if upstream.credential is not None:
            name, value = upstream.credential.header_for(secret)
            headers[name] = value
        extensions: dict[str, Any] = {}
        if upstream.proxy is not None:
            extensions["proxy"] = None if upstream.proxy == "direct" else upstream.proxy
        return secret, httpx.Request(
            "POST", upstream.url, headers=headers, content=self._body, extensions=extensions
        )

    def _credential(self) -> str:
        credential = self._upstream.credential
        return "" if credential is None else credential.secret()


class _Attempt:
    """The sink of one attempt: passes on everything but failures, and lets no credential through."""

    __slots__ = ("_dialect", "_veil", "begun", "connected", "failed", "out", "told")

    def __init__(self, out: Output, secret: str, dialect: Dialect) -> None:
        self.out = out
        self._dialect = dialect
        self.failed: tuple[str, Fault] | None = None
        self.connected = False
        self.begun = False
        """Whether anything of this attempt is in the journal."""
        self.told: tuple[bytes, str, tuple[Delta, ...]] | None = None
        self._veil = _Veil(secret, out.max_event_bytes) if len(secret) >= _SECRET_CHARS else None

    @property
    def sealed(self) -> bool:
        return self.failed is not None or self.out.sealed

    def sent(self) -> None:
        self.connected = True
        self.out.connected()

    def append(self, payload: bytes, name: str, deltas: tuple[Delta, ...]) -> None:
        veil = self._veil
        if veil is not None and veil.needed(payload, name, deltas):
            payload, name, deltas = veil.event(payload, name, deltas, self._dialect)
        if not self.begun:
            if any(delta.fault is not None for delta in deltas):
                self.told = (payload, name, deltas)
                return
            self.begun = True
        self.out.append(payload, name, deltas)

    def skip(self, payload: bytes, why: str) -> None:
        self.begun = True
        veil = self._veil
        if veil is not None:
            payload, why = veil.payload(payload), veil.shortened(why)
        self.out.skip(payload, why)

    def touch(self) -> None:
        self.out.touch()

    def mark(self, reason: str | None) -> None:
        self.out.mark(reason if reason is None else self._hidden(reason))

    def complete(self, reason: str) -> bool:
        return self.out.complete(self._hidden(reason))

    def fail(self, reason: str, fault: Fault) -> bool:
        self.failed = (reason, fault)
        return True

    def hide(self, failure: _Failure) -> _Failure:
        """Return a failure without the credential."""
        return failure if self._veil is None else attrs.evolve(failure, fault=self._veil.fault(failure.fault))

    def _hidden(self, reason: str) -> str:
        return reason if self._veil is None else self._veil.shortened(reason)


class _Veil:
    """Takes a credential out of what an upstream sent. What `needed` asks is asked of every event."""

    __slots__ = ("_beginning", "_bytes", "_max_bytes", "_secret", "_sign")

    def __init__(self, secret: str, max_bytes: int) -> None:
        self._secret = secret
        self._bytes = secret.encode()
        self._beginning = secret[:_PREFIX_CHARS]
        self._max_bytes = max_bytes
        # What any escaped form of the secret, also one within strings within strings, has in it. A credential is a word
        # of printable ASCII, so what is in many events is no sign: `\\n`, `\\"`, other letters, and HTML's characters.
        sign = rb"\\u00(?!2[267]|3[ce])[2-7]"
        if set("\\\"&'<>") & set(secret):
            sign = rb"\\"
        elif "/" in secret:
            sign += rb"|\\/"
        self._sign = re.compile(sign, re.IGNORECASE).search

    def needed(self, payload: bytes, name: str, deltas: tuple[Delta, ...]) -> bool:
        """Whether the credential is or may be in an event."""
        return (
            # `find`, as `in` takes twice as long on bytes.
            payload.find(self._bytes) >= 0
            or (payload.find(b"\\") >= 0 and self._sign(payload) is not None)
            or (name != "" and self._secret in name)
            or self._told(deltas)
        )

    def event(
        self, payload: bytes, name: str, deltas: tuple[Delta, ...], dialect: Dialect
    ) -> tuple[bytes, str, tuple[Delta, ...]]:
        """Return an event without the credential.

        A dialect may put it together from several parts. Then the payload is withheld as well: it would mean the same to
        whoever reads it from the journal.
        """
        kept = self.payload(payload)
        clean = tuple(map(self._shortened, deltas))
        if kept is not payload or self._told(clean):
            clean = tuple(map(self._answer, clean))
            if kept is payload or self._told(_meaning(dialect, kept, name)):
                kept = _WITHHELD
        return kept, self.shortened(name), clean

    def payload(self, data: bytes) -> bytes:
        """Return a payload without the credential: changed in its place, or encoded anew, or withheld."""
        plain = data.replace(self._bytes, _HIDDEN.encode())
        if b"\\" in plain and self._sign(plain) is not None and self._shown(plain.decode("utf-8", "replace")):
            plain = self._anew(plain) or _WITHHELD
        return plain if len(plain) <= self._max_bytes or plain is data else _WITHHELD

    def shortened(self, text: str) -> str:
        """Return a text without the credential, of which it may hold only the beginning as it was cut short."""
        level = text = self._cut(text)
        for _ in range(_LEVELS):
            if "\\" not in level:
                break
            level = _unescaped(level)
            if self._beginning in level:
                level = text = self._cut(level)
        return text

    def fault(self, fault: Fault) -> Fault:
        """Return a fault without the credential."""
        code = None if fault.code is None else self.shortened(fault.code)
        return msgspec.structs.replace(fault, message=self.shortened(fault.message), code=code)

    def _told(self, deltas: tuple[Delta, ...]) -> bool:
        """Whether the credential stands in what an event means, or its beginning may, as some of that is cut short."""
        secret = self._secret
        for delta in deltas:
            if (
                secret in delta.text
                or (delta.reasoning and secret in delta.reasoning)
                or (delta.refusal and secret in delta.refusal)
            ):
                return True
            if delta.tool_calls:
                for call in delta.tool_calls:
                    if secret in call.arguments or secret in call.name or secret in call.id:
                        return True
            if (delta.model is not None and secret in delta.model) or (
                delta.response_id is not None and secret in delta.response_id
            ):
                return True
            if delta.finish_reason is not None and self._beginning in delta.finish_reason:
                return True
            if delta.fault is not None and self.fault(delta.fault) != delta.fault:
                return True
        return False

    def _shortened(self, delta: Delta) -> Delta:
        """Return a delta with what a dialect cuts short looked through."""
        if delta.finish_reason is None and delta.fault is None:
            return delta
        return msgspec.structs.replace(
            delta,
            finish_reason=None if delta.finish_reason is None else self.shortened(delta.finish_reason),
            fault=None if delta.fault is None else self.fault(delta.fault),
        )

    def _answer(self, delta: Delta) -> Delta:
        return msgspec.structs.replace(
            delta,
            text=self._text(delta.text),
            reasoning=self._text(delta.reasoning),
            refusal=self._text(delta.refusal),
            tool_calls=tuple(
                ToolCallDelta(
                    call.index, self._text(call.id), self._text(call.name), self._text(call.arguments)
                )
                for call in delta.tool_calls
            ),
            model=None if delta.model is None else self._text(delta.model),
            response_id=None if delta.response_id is None else self._text(delta.response_id),
        )

    def _text(self, text: str) -> str:
        """Return a string of a JSON value without the credential; it may be JSON itself."""
        text = text.replace(self._secret, _HIDDEN)
        if "\\" not in text or not self._shown(text):
            return text
        anew = self._anew(text)
        return _HIDDEN if anew is None else anew.decode()

    def _shown(self, text: str) -> bool:
        """Whether a text holds the credential, as it stands or once its escapes are undone."""
        for _ in range(_LEVELS):
            if self._secret in text:
                return True
            if "\\" not in text:
                return False
            text = _unescaped(text)
        return self._secret in text

    def _anew(self, data: bytes | str) -> bytes | None:
        """Return JSON encoded anew, without the credential; None if that cannot be done."""
        try:
            clean = msgspec.json.encode(self._value(msgspec.json.decode(data)))
            return None if self._shown(clean.decode()) else clean
        except (ValueError, TypeError, OverflowError, RecursionError):
            return None

    def _value(self, value: Any) -> Any:
        if isinstance(value, str):
            return self._text(value)
        if isinstance(value, list):
            return [self._value(item) for item in value]
        if isinstance(value, dict):
            return {self._text(key): self._value(item) for key, item in value.items()}
        return value

    def _cut(self, text: str) -> str:
        """Return a text without the credential, and without what begins it."""
        secret, parts, done = self._secret, [], 0
        at = text.find(self._beginning)
        while at >= 0:
            end = at + len(self._beginning)
            while end < len(text) and end - at < len(secret) and text[end] == secret[end - at]:
                end += 1
            parts += [text[done:at], _HIDDEN]
            done = end
            at = text.find(self._beginning, end)
        return "".join([*parts, text[done:]]) if parts else text


def _unescaped(text: str) -> str:
    """Undo the escapes of JSON strings, wherever they are."""
    return _ESCAPE.sub(_plain_character, text)


def _plain_character(escape: re.Match[str]) -> str:
    digits, character = escape.groups()
    if digits is None:
        return _PLAIN.get(character, character)
    code = int(digits, 16)
    return "\ufffd" if 0xD800 <= code < 0xE000 else chr(code)  # half a pair is a string that no encoder takes


def _meaning(dialect: Dialect, payload: bytes, name: str) -> tuple[Delta, ...]:
    """Return what a payload means by itself."""
    try:
        return dialect.reader().read(payload, name or "message")
    except UnparseableError:
        return ()


def _not_opened(exc: UpstreamError) -> _Failure:
    fault = Fault(kind="network", message=str(exc), temporary=True)
    if isinstance(exc, ConnectError):
        if _distrusted(exc):
            return _Failure("connect", msgspec.structs.replace(fault, temporary=False), again=False)
        return _Failure("connect", fault, again=True)
    if isinstance(exc, UpstreamClosedError):
        return _Failure("truncated", fault, again=True)
    return _Failure("protocol", Fault(kind="protocol", message=str(exc)), again=False)


def _distrusted(exc: BaseException | None) -> bool:
    """Say whether a connection was refused by us, for its certificate: trying again changes nothing."""
    while exc is not None:
        if isinstance(exc, ssl.SSLCertVerificationError):
            return True
        exc = exc.__cause__
    return False


def _counted(fault: Fault, attempts: int) -> Fault:
    if attempts == 1:
        return fault
    return msgspec.structs.replace(fault, message=f"{fault.message} (after {attempts} attempts)")


def _place(location: str) -> str:
    """Return scheme and host of a URL: the rest of it may hold secrets."""
    try:
        url = httpx.URL(location)
    except httpx.InvalidURL:
        return "an invalid address"
    if not url.host:
        return "another path on the same host"
    return f"{url.scheme or 'https'}://{url.host}"


def _streaming_body(request: Mapping[str, Any] | bytes) -> bytes:
    """Return the body to post, with `"stream": true` in it."""
    given = request if isinstance(request, bytes) else None
    if given is not None:
        try:
            request = msgspec.json.decode(given, type=dict[str, Any])
        except (msgspec.DecodeError, RecursionError):
            raise ConfigurationError("request", f"({len(given)} bytes)", "a JSON object") from None
    if not isinstance(request, Mapping):
        raise ConfigurationError("request", type(request), "a JSON object: a mapping, or its bytes")
    stream = request.get("stream")
    if stream not in (None, True):
        raise ConfigurationError("request.stream", stream, "true, or nothing: a supervised stream is one")
    if given is not None and stream is True:
        body = given
    else:
        try:
            body = msgspec.json.encode({**request, "stream": True})
        except (TypeError, ValueError, RecursionError) as exc:
            raise ConfigurationError("request", f"({type(exc).__name__})", f"JSON values: {exc}") from None
    if len(body) > MAX_REQUEST_BYTES:
        raise ConfigurationError("request", f"({len(body)} bytes)", f"at most {MAX_REQUEST_BYTES} bytes")
    return body
