"""The heads of an exchange: the request's written and the response's parsed, both by h11, both bounded.

h11 is used for what it is strict about and left before the body, whose framing (`supervisor.wire.http1`) decodes once per
read instead of once per chunk.

A header that would break out of its line never reaches the wire: names, values, method and target are checked here, so
that the error can name the header without showing its value (the usual culprit is an API key read with its newline), and
h11 checks them a second time. The framing headers are ours: `Content-Length` is the length of the body that we send, and
a caller's `Transfer-Encoding` is dropped.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

import attrs
import h11

from supervisor.errors import ConfigurationError, RemoteProtocolError

__all__ = ["HeadReader", "ResponseHead", "checked_headers", "write_head"]

MAX_INFORMATIONAL = 16
"""How many 1xx responses may precede the final one; their bytes count towards the bound of the head as well."""

_NAME = re.compile(rb"[-!#$%&'*+.^_`|~0-9A-Za-z]+")
_VALUE = re.compile(rb"[\t\x20-\x7e\x80-\xff]*")
_BLANK_LINE = re.compile(rb"\n\r?\n")
_CONTROL = re.compile(rb"[\x00\x0b\x0c]|\r(?=[^\n])")
_BODILESS = frozenset({b"GET", b"HEAD", b"OPTIONS", b"TRACE", b"DELETE"})

Headers = Sequence[tuple[bytes, bytes]]


@attrs.frozen(kw_only=True)
class ResponseHead:
    """A final response's head. Header names are in lower case, folded lines are joined with a space (RFC 9112, 5.2)."""

    status: int
    reason: bytes
    http_version: bytes
    """`1.0` or `1.1`, as bytes."""
    headers: Headers

    def tokens(self, name: bytes) -> set[bytes]:
        """Return the comma-separated tokens of every header of this name, in lower case."""
        return tokens(self.headers, name)


def tokens(headers: Iterable[tuple[bytes, bytes]], name: bytes) -> set[bytes]:
    """Return the comma-separated tokens of the headers called `name` (lower case), in lower case."""
    return {
        token.strip().lower()
        for key, value in headers
        if key.lower() == name
        for token in value.split(b",")
        if token.strip()
    }


def checked_headers(method: bytes, headers: Iterable[tuple[bytes, bytes]], *, body_bytes: int) -> Headers:
    """Return the headers to send: each checked, our own framing added.

    Raises ConfigurationError naming the header, without its value, if one could not stand on one line.
    """
    checked: list[tuple[bytes, bytes]] = []
    for name, value in headers:
        if not _NAME.fullmatch(name):
            raise ConfigurationError("request header name", name[:80], "an RFC 9110 token")
        trimmed = value.strip(b" \t")
        if not _VALUE.fullmatch(trimmed):
            raise ConfigurationError(
                f"request header {name.decode('ascii')}",
                "(not shown)",
                "a value on one line, without control characters (is there a line break at its end?)",
            )
        if name.lower() not in (b"content-length", b"transfer-encoding"):
            checked.append((name, trimmed))
    if body_bytes or method not in _BODILESS:
        checked.append((b"Content-Length", b"%d" % body_bytes))
    return checked


def write_head(
    method: bytes, target: bytes, headers: Headers, *, max_head_bytes: int
) -> tuple[bytes, HeadReader]:
    """Return the bytes of the request's head, and the reader for the response's.

    Raises ConfigurationError if method, target or a header is not valid HTTP; the message shows none of them.
    """
    # h11 enforces its own bound only on heads that are still incomplete; HeadReader's comes first and covers both.
    connection = h11.Connection(h11.CLIENT, max_incomplete_event_size=2 * max_head_bytes + (1 << 20))
    try:
        request = h11.Request(method=method, target=target, headers=list(headers))
        data = connection.send(request)
    except h11.LocalProtocolError:  # not chained: h11's messages quote the offending value
        raise ConfigurationError(
            "request",
            "(not shown)",
            "a method, target and headers that HTTP/1.1 can carry, with one Host header",
        ) from None
    assert data is not None
    return data, HeadReader(connection, max_head_bytes=max_head_bytes)


class HeadReader:
    """Reads one response head, skipping 1xx responses. Feed it until it returns the head; `rest` is what follows."""

    __slots__ = ("_connection", "_context", "_informational", "_max_head_bytes", "received", "rest")

    def __init__(self, connection: h11.Connection, *, max_head_bytes: int) -> None:
        self._connection = connection
        self._max_head_bytes = max_head_bytes
        self._informational = 0
        self._context = b""  # the last bytes of the head so far: what a blank line may have begun with
        self.received = 0
        """Bytes fed so far. Zero: nothing came back, not even part of a head."""
        self.rest = b""

    def feed(self, data: bytes) -> ResponseHead | None:
        """Take bytes; return the final head once it is complete. Raises RemoteProtocolError."""
        self.received += len(data)
        while True:
            head, data = self._cut(data)
            try:
                self._connection.receive_data(head)
                event = self._connection.next_event()
            except h11.RemoteProtocolError as exc:
                raise RemoteProtocolError(
                    f"the upstream's response is not HTTP/1.1: {str(exc)[:200]}"
                ) from None
            if isinstance(event, h11.Response):
                break
            if isinstance(event, h11.InformationalResponse):
                self._skip(event)
            if not data:
                self._bound(self.received)
                return None
        self.rest = self._connection.trailing_data[0] + data
        self._bound(self.received - len(self.rest))
        return ResponseHead(
            status=event.status_code,
            reason=event.reason,
            http_version=event.http_version,
            headers=list(event.headers),
        )

    def _cut(self, data: bytes) -> tuple[bytes, bytes]:
        """Return the bytes of this head, up to its blank line, and those after it. Raises RemoteProtocolError.

        Control characters are refused here: h11 would refuse them too, but looks for them in a time that grows with the
        square of the white space before them, which in a head of 64 KiB takes seconds.
        """
        window = self._context + data
        blank = _BLANK_LINE.search(window)
        end = len(window) if blank is None else blank.end()
        if _CONTROL.search(window, 0, end):
            raise RemoteProtocolError(
                "the upstream's response is not HTTP/1.1: a control character in its head"
            )
        cut = end - len(self._context)
        self._context = window[-3:] if blank is None else b""
        return data[:cut], data[cut:]

    def _skip(self, event: h11.InformationalResponse) -> None:
        if event.status_code == 101:
            raise RemoteProtocolError(
                "the upstream switches to another protocol (101), which nobody asked for"
            )
        self._informational += 1
        if self._informational > MAX_INFORMATIONAL:
            raise RemoteProtocolError(
                f"the upstream sent more than {MAX_INFORMATIONAL} 1xx responses before its answer"
            )

    def _bound(self, head_bytes: int) -> None:
        if head_bytes > self._max_head_bytes:
            raise RemoteProtocolError(
                f"the response's head is larger than {self._max_head_bytes} bytes (max_head_bytes); nothing of it was kept"
            )
