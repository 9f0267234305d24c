"""The body of an HTTP/1.1 response: where it ends, and what of the bytes on the connection belongs to it.

How a body is framed is settled by RFC 9112 section 6.3, in `framing_for`. Each framing is fed what was read from the
connection after the head, and returns the body's bytes in it: joined once a read, not handed out chunk by chunk.

Chunked bodies. Providers flush each event as a chunk of its own, so a read of 64 KiB holds hundreds. Such a read is split
at CRLF once; that every second piece is as long as the piece before it says proves the split right (by induction: each
chunk starts where the one before ended), whatever the data are. A read for which this fails, as its data hold CRLF or it
holds the last chunk, is walked chunk by chunk.

Strictness. The grammar is held to where leniency lets two readers disagree on where a message ends: a chunk size is hex
digits only (no sign, no spaces around it, no `0x`, no underscores, all of which `int` accepts), lines end with CRLF and
not with LF alone, and CRLF must follow each chunk's data. Everything a peer can make us hold is bounded.

A fault does not swallow what came before it: if the same read held body bytes, `feed` returns them, sets `fault`, and the
next `feed` raises.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Final, Protocol

import attrs

from supervisor.errors import RemoteProtocolError

__all__ = [
    "ChunkedBody",
    "ContentLengthBody",
    "Framing",
    "NoBody",
    "UntilCloseBody",
    "framing_for",
]

_MAX_LENGTH: Final = 2**63 - 1
_MAX_SIZE_DIGITS: Final = 16
_MAX_SIZE_LINE_BYTES: Final = 4 << 10
_MAX_TRAILER_BYTES: Final = 16 << 10
_MAX_EXCESS_BYTES: Final = 64 << 10
_SIZE_LINE_NAME: Final = f"chunk size line of more than {_MAX_SIZE_LINE_BYTES} bytes"
_TRAILERS_NAME: Final = f"trailer section of more than {_MAX_TRAILER_BYTES} bytes"
_HEX: Final = b"0123456789abcdefABCDEF"
# The size, then nothing or an extension; the extension's grammar is nobody's business, control characters are.
_SIZE_LINE: Final = re.compile(rb"([0-9a-fA-F]+)(?:;[^\x00-\x08\x0a-\x1f\x7f]*)?")
_TRAILER_LINE: Final = re.compile(rb"([-!#$%&'*+.^_`|~0-9a-zA-Z]+):[ \t]*+([^\x00-\x08\x0a-\x1f\x7f]*+)")


class Framing(Protocol):
    """Reads one response body from what follows the head on the connection."""

    @property
    def complete(self) -> bool:
        """Whether the whole body has been read."""
        ...

    @property
    def excess(self) -> bytes:
        """What came after the end of the body, at least the first 64 KiB of it."""
        ...

    @property
    def trailers(self) -> tuple[tuple[bytes, bytes], ...]:
        """The trailer fields: names in lower case, values stripped."""
        ...

    @property
    def reusable(self) -> bool:
        """Whether another response can follow on this connection, as far as the framing says.

        The caller also has to honour `Connection: close` and HTTP/1.0.
        """
        ...

    @property
    def fault(self) -> RemoteProtocolError | None:
        """Set once the framing was found broken; nothing after it is read."""
        ...

    def feed(self, data: bytes) -> bytes:
        """Return the body's bytes among those read from the connection.

        Raises RemoteProtocolError when the framing is broken or a limit is passed; if body bytes came before it in the
        same read they are returned first, with `fault` set, and the next call raises.
        """
        ...

    def end(self) -> bool:
        """Say that the peer has closed; return whether the body was complete."""
        ...


@attrs.define(eq=False, repr=False)
class _Body:
    """What the framings share."""

    complete: bool = attrs.field(default=False, init=False)
    excess: bytes = attrs.field(default=b"", init=False)
    trailers: tuple[tuple[bytes, bytes], ...] = attrs.field(default=(), init=False)
    fault: RemoteProtocolError | None = attrs.field(default=None, init=False)
    _closed: bool = attrs.field(default=False, init=False)

    @property
    def reusable(self) -> bool:
        return self.complete and not self.excess and not self._closed

    def end(self) -> bool:
        self._closed = True
        return self.complete

    def _exceed(self, data: bytes) -> None:
        if data and len(self.excess) < _MAX_EXCESS_BYTES:
            self.excess += data

    def __repr__(self) -> str:
        state = (
            "complete" if self.complete else "failed" if self.fault else "closed" if self._closed else "open"
        )
        return f"<{type(self).__name__} {state}, {len(self.excess)} bytes in excess>"


@attrs.define(eq=False, repr=False)
class NoBody(_Body):
    """No body, whatever the headers say: answers to HEAD, 1xx, 204, 304, and a tunnel opened by CONNECT."""

    complete: bool = attrs.field(default=True, init=False)

    def feed(self, data: bytes) -> bytes:
        """Return nothing; all is excess."""
        self._exceed(data)
        return b""


@attrs.define(eq=False, repr=False)
class UntilCloseBody(_Body):
    """A body that ends when the peer closes: whether it was cut off cannot be told from the framing."""

    def feed(self, data: bytes) -> bytes:
        """Return all of it."""
        return data

    def end(self) -> bool:
        """Say that the peer has closed, which completes the body."""
        self.complete = True
        return super().end()


@attrs.define(eq=False, repr=False)
class ContentLengthBody(_Body):
    """A body of as many bytes as were announced."""

    remaining: int
    """Bytes of the body still to come."""

    def __attrs_post_init__(self) -> None:
        self.complete = not self.remaining

    def feed(self, data: bytes) -> bytes:
        """Return the body's bytes among these; the rest is excess."""
        remaining = self.remaining
        if len(data) < remaining:
            self.remaining = remaining - len(data)
            return data
        self.remaining = 0
        self.complete = True
        if len(data) == remaining:
            return data
        self._exceed(data[remaining:])
        return data[:remaining]


@attrs.define(eq=False, repr=False)
class ChunkedBody(_Body):
    """A chunked body (RFC 9112 section 7.1).

    `also_length` says that the response had a Content-Length too: a sign of request smuggling or of a broken peer, after
    which the connection must not be used again (section 6.3).
    """

    also_length: bool = attrs.field(default=False, kw_only=True)
    _left: int = attrs.field(default=0, init=False)  # bytes of the current chunk's data still to come
    _delimiter: bytes = attrs.field(
        default=b"", init=False
    )  # what must follow the data of a chunk, still to come
    _in_trailers: bool = attrs.field(default=False, init=False)
    _line: bytearray = attrs.field(factory=bytearray, init=False)  # the unfinished size or trailer line
    _fields: list[tuple[bytes, bytes]] = attrs.field(factory=list, init=False)  # the trailers so far
    _trailer_bytes: int = attrs.field(default=0, init=False)

    @property
    def reusable(self) -> bool:
        """Whether another response can follow on this connection, as far as the framing says."""
        return not self.also_length and super().reusable

    @property
    def buffered_bytes(self) -> int:
        """Bytes held of an unfinished size line or of the trailers."""
        return len(self._line) + self._trailer_bytes

    def feed(self, data: bytes) -> bytes:
        """Return the body's bytes among these, the chunk framing removed.

        Raises RemoteProtocolError when the framing is broken or a limit is passed; if body bytes came before it in the
        same read they are returned first, with `fault` set, and the next call raises.
        """
        if self.fault is not None:
            raise RemoteProtocolError(*self.fault.args)
        if len(data) < self._left:
            self._left -= len(data)
            return data
        if self.complete:
            self._exceed(data)
            return b""
        if not (self._left or self._delimiter or self._line or self._in_trailers) and data[-2:] == b"\r\n":
            # The shortest way, for a paced stream: a read is one chunk, whole.
            stop = data.find(b"\r\n", 1, _MAX_SIZE_DIGITS + 2)
            if stop > 0 and not (digits := data[:stop]).translate(None, _HEX):
                size = int(digits, 16)
                if size and size == len(data) - stop - 4:
                    return data[stop + 2 : -2]
        parts: list[bytes] = []
        try:
            self._walk(data, parts)
        except RemoteProtocolError as fault:
            # Not the exception itself: its traceback would keep this read alive.
            self.fault = RemoteProtocolError(*fault.args)
            self._line.clear()
            if not parts:
                raise
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def _walk(self, data: bytes, parts: list[bytes]) -> None:
        at = 0
        tried = False
        while at < len(data):
            if self._left:
                part = data[at : at + self._left]
                parts.append(part)
                at += len(part)
                self._left -= len(part)
                if not self._left:
                    self._delimiter = b"\r\n"
            elif self._delimiter:
                seen = data[at : at + len(self._delimiter)]
                if not self._delimiter.startswith(seen):
                    raise RemoteProtocolError(
                        "the upstream sent something else than CRLF after the data of a chunk"
                    )
                self._delimiter = self._delimiter[len(seen) :]
                at += len(seen)
            elif self._in_trailers:
                at = self._trailer(data, at)
                if self.complete:
                    self._exceed(data[at:])
                    return
            elif not tried and not self._line:
                tried = True
                at += self._whole_chunks(data[at:] if at else data, parts)
            else:
                at = self._size(data, at)

    def _whole_chunks(self, data: bytes, parts: list[bytes]) -> int:
        """Take the whole chunks at the start of the data if none of them is the last; return how many bytes that were."""
        pieces = data.split(b"\r\n")
        # size, data, size, data, …, and one or two pieces of a chunk that has not ended
        count = (len(pieces) - 1) // 2
        if not count:
            return 0
        sizes = pieces[: 2 * count : 2]
        bodies = pieces[1 : 2 * count : 2]
        digits = b"".join(sizes)
        if digits.translate(None, _HEX) or len(max(sizes, key=len)) > _MAX_SIZE_DIGITS or b"" in sizes:
            return 0
        lengths = [int(size, 16) for size in sizes]
        if lengths != list(map(len, bodies)) or 0 in lengths:
            return 0
        parts += bodies
        return len(digits) + sum(lengths) + 4 * count

    def _size(self, data: bytes, at: int) -> int:
        line, at = self._line_from(data, at, _MAX_SIZE_LINE_BYTES, _SIZE_LINE_NAME)
        if line is None:
            return at
        match = _SIZE_LINE.fullmatch(line)
        if match is None:
            raise RemoteProtocolError(f"the upstream sent a malformed chunk size: {line[:40]!r}")
        digits = match[1]
        if len(digits) > _MAX_SIZE_DIGITS or (size := int(digits, 16)) > _MAX_LENGTH:
            raise RemoteProtocolError(f"the upstream announced a chunk beyond any limit: {line[:40]!r}")
        self._left = size
        self._in_trailers = not size
        return at

    def _trailer(self, data: bytes, at: int) -> int:
        limit = _MAX_TRAILER_BYTES - self._trailer_bytes
        line, at = self._line_from(data, at, limit, _TRAILERS_NAME)
        if line is None:
            return at
        if not line:
            self.complete = True
            self.trailers = tuple(self._fields)
            return at
        match = _TRAILER_LINE.fullmatch(line)
        if match is None:
            raise RemoteProtocolError(f"the upstream sent a malformed trailer field: {line[:40]!r}")
        self._trailer_bytes += len(line) + 2
        self._fields.append((match[1].lower(), match[2].rstrip(b" \t")))
        return at

    def _line_from(self, data: bytes, at: int, limit: int, what: str) -> tuple[bytes | None, int]:
        """Return the line that starts at `at`, or was begun earlier, and where the next one starts; None: not all here.

        `limit` is the longest line, without its CRLF.
        """
        held = self._line
        line = None
        if held.endswith(b"\r") and data.startswith(b"\n", at):
            line, at = bytes(held[:-1]), at + 1
            held.clear()
        else:
            stop = data.find(b"\r\n", at)
            if stop >= 0:
                line, at = bytes(held) + data[at:stop], stop + 2
                held.clear()
            else:
                held += data[at:]
                at = len(data)
        # One byte more may be the CR of a CRLF whose LF has not come.
        if len(held) > limit + held.endswith(b"\r") or (line is not None and len(line) > limit):
            raise RemoteProtocolError(f"the upstream sent a {what}")
        return line, at


def framing_for(status: int, headers: Iterable[tuple[bytes, bytes]], *, method: str = "POST") -> Framing:
    """Return how the body of a response is framed, by RFC 9112 section 6.3.

    `headers` are pairs of bytes as received; names in any case. The only transfer coding accepted is `chunked`, since no
    other was asked for. Raises RemoteProtocolError for any other, and for a Content-Length that is malformed or told in
    several ways that differ.
    """
    encodings: list[bytes] = []
    lengths: list[bytes] = []
    for name, value in headers:
        field = name.lower()
        if field == b"transfer-encoding":
            encodings += value.split(b",")
        elif field == b"content-length":
            lengths += value.split(b",")
    if method == "HEAD" or status < 200 or status in {204, 304} or (method == "CONNECT" and status < 300):
        return NoBody()
    if encodings:
        # Empty elements of a list are to be ignored (RFC 9110 section 5.6.1).
        codings = [coding for part in encodings if (coding := part.strip(b" \t").lower())]
        if codings != [b"chunked"]:
            raise RemoteProtocolError(
                f"the upstream used the transfer coding {b','.join(encodings)[:80]!r}, not chunked"
            )
        return ChunkedBody(also_length=bool(lengths))
    if lengths:
        values = {length.strip(b" \t") for length in lengths}
        if not all(value.isdigit() and len(value) <= 19 for value in values):
            raise RemoteProtocolError(
                f"the upstream sent a malformed Content-Length: {b','.join(lengths)[:80]!r}"
            )
        numbers = {int(value) for value in values}
        if len(numbers) > 1:
            raise RemoteProtocolError(
                f"the upstream sent Content-Lengths that differ: {b','.join(lengths)[:80]!r}"
            )
        length = numbers.pop()
        if length > _MAX_LENGTH:
            raise RemoteProtocolError(f"the upstream announced a body beyond any limit: {length} bytes")
        return ContentLengthBody(length)
    return UntilCloseBody()
