"""TLS without I/O: ciphertext in, plaintext out, so that it sits on the same synchronous path as everything else.

`trio.SSLStream` owns its transport and decrypts inside an `await`. Here whoever reads the socket (today a loop in the
stream's task, later one reader for all sockets) hands the bytes to `decrypt`, and what TLS itself wants to send
(handshake, alerts, answers to key updates) is picked up with `take`. Layers stack, which is what an https proxy needs.

How it ended matters: a `close_notify` alert is the peer saying "that was all"; an end of file without one may be
anybody's reset (RFC 8446 section 6.1). `closed` tells them apart, and only the first ends a body that has no framing
of its own.
"""

from __future__ import annotations

import contextlib
import functools
import ssl

import httpx

from supervisor.errors import ConfigurationError

__all__ = ["TLSLayer", "shared_context"]

_RECORD_BYTES = 1 << 14
"""The plaintext of one TLS record at most (RFC 8446 section 5.1), and so of one `SSLObject.read`."""


@functools.cache
def shared_context() -> ssl.SSLContext:
    """Return the process's one context: verification on, certifi's roots, ALPN `http/1.1`.

    Made on first use, because loading the roots takes tens of milliseconds of CPU; a daemon calls it once at start.
    `SSL_CERT_FILE` and `SSL_CERT_DIR` are honoured as httpx honours them. Raises ConfigurationError if they cannot be
    read.
    """
    try:
        context = httpx.create_ssl_context()
    except OSError as exc:
        raise ConfigurationError(
            "SSL_CERT_FILE or SSL_CERT_DIR", str(exc), "certificates in PEM form"
        ) from exc
    context.set_alpn_protocols(["http/1.1"])
    context.options |= ssl.OP_NO_RENEGOTIATION
    return context


class TLSLayer:
    """One TLS session, client side. Every method is synchronous and may raise `ssl.SSLError` (an OSError)."""

    __slots__ = ("_incoming", "_object", "_outgoing", "closed")

    def __init__(self, context: ssl.SSLContext, server_hostname: str) -> None:
        self._incoming = ssl.MemoryBIO()
        self._outgoing = ssl.MemoryBIO()
        self._object = context.wrap_bio(self._incoming, self._outgoing, server_hostname=server_hostname)
        self.closed = False
        """Whether the peer has sent `close_notify`: nothing follows, and nothing was cut off."""

    @property
    def alpn(self) -> str | None:
        """The protocol negotiated, None if the server does not negotiate."""
        return self._object.selected_alpn_protocol()

    def handshake(self, data: bytes) -> bool:
        """Take what the peer sent and return True once the session stands. Send what `take` returns either way."""
        self._incoming.write(data)
        try:
            self._object.do_handshake()
        except ssl.SSLWantReadError:
            return False
        return True

    def decrypt(self, data: bytes) -> bytes:
        """Return the plaintext that `data` completes; `b""` if it completes none."""
        incoming = self._incoming
        incoming.write(data)
        read = self._object.read
        parts: list[bytes] = []
        try:
            # Each read takes one whole record, so an empty BIO means there is nothing more to get: asking anyway would
            # cost an exception per network read.
            while incoming.pending:
                part = read(_RECORD_BYTES)
                if not part:
                    self.closed = True
                    break
                parts.append(part)
        except ssl.SSLWantReadError:
            pass
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def encrypt(self, data: bytes | memoryview) -> None:
        """Add plaintext to be sent; `take` has the ciphertext."""
        self._object.write(data)

    def take(self) -> bytes:
        """Return the ciphertext to be sent now."""
        return self._outgoing.read()

    def close(self) -> None:
        """Add a `close_notify` to be sent."""
        with contextlib.suppress(
            ssl.SSLError
        ):  # it always wants the peer's own alert next, for which we do not wait
            self._object.unwrap()
