"""Takes a credential out of what an upstream sends back.

Providers are sent a credential, and some repeat it in their error messages. So everything that comes back (payloads and
names of events, what they mean, reasons, faults) is looked through for it before it reaches a fault, a journal or a
message: as it stands, and as JSON may escape it, also in JSON within strings of JSON, up to `_LEVELS` deep. Three
limits: a credential shorter than `MIN_SECRET_CHARS` (`EMPTY`, `none`) is no secret and is left, as it may be an ordinary
word; one that arrives in pieces, split over several events, is not recognized; nor is one that is encoded in other ways.
"""

from __future__ import annotations

import re
from typing import Any, Final

import msgspec

from supervisor.dialects import Delta, Dialect, Fault, ToolCallDelta, UnparseableError

__all__ = ["MIN_SECRET_CHARS", "Veil", "veil_for"]

MIN_SECRET_CHARS: Final = 8

_HIDDEN: Final = "[credential removed]"
_PREFIX_CHARS: Final = 12
_WITHHELD: Final = msgspec.json.encode({"choices": [], "note": _HIDDEN})
"""What is journaled of a payload from which the credential could not be taken out: an event that means nothing."""
_LEVELS: Final = 4
"""How often JSON in a string in JSON is looked into."""
_ESCAPE: Final = re.compile(r"\\(?:u([0-9a-fA-F]{4})|(.))", re.DOTALL)
_PLAIN: Final = {"b": "\b", "f": "\f", "n": "\n", "r": "\r", "t": "\t"}


def veil_for(secret: str, max_bytes: int) -> Veil | None:
    """Return a veil for a credential, for payloads of at most `max_bytes`; None for one that is too short to be a secret."""
    return Veil(secret, max_bytes) if len(secret) >= MIN_SECRET_CHARS else None


class Veil:
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
