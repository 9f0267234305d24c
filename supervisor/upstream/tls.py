"""TLS without I/O: ciphertext in, plaintext out, so that it sits on the same synchronous path as everything else.

`trio.SSLStream` owns its transport and decrypts inside an `await`. Here whoever reads the socket (a loop in the
stream's task, or one reader for all sockets) hands the bytes to `decrypt`, and what TLS itself wants to send
(handshake, alerts, answers to key updates) is picked up with `take`. Layers stack, which is what an https proxy needs.

How it ended matters: a `close_notify` alert is the peer saying "that was all"; an end of file without one may be
anybody's reset (RFC 8446 section 6.1). `closed` tells them apart, and only the first ends a body that has no framing
of its own.

Resumption spares a reconnect the proof by certificates, which is most of what a handshake costs, and with TLS 1.2 a round
trip. `Sessions` keeps one session for each server and name, whichever connection was first to get one. It is offered to
any number of connections (tickets that a server takes only once are refused, which costs nothing but the full
handshake), and for an hour at most, so that a certificate is looked at again that often.
"""

from __future__ import annotations

import contextlib
import functools
import ssl
from typing import Final

import attrs
import httpx

from supervisor.errors import ConfigurationError, RemoteProtocolError

__all__ = ["MAX_SESSIONS", "SESSION_S", "SessionKey", "Sessions", "TLSLayer", "shared_context"]

MAX_SESSIONS: Final = 64
"""TLS sessions kept to be resumed; the one that was not used for longest goes."""
SESSION_S: Final = 3600.0
"""How long after the handshake that verified the server its session may be resumed, in seconds."""

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

    __slots__ = ("_incoming", "_object", "_outgoing", "closed", "fault")

    def __init__(
        self, context: ssl.SSLContext, server_hostname: str, session: ssl.SSLSession | None = None
    ) -> None:
        self._incoming = ssl.MemoryBIO()
        self._outgoing = ssl.MemoryBIO()
        self._object = context.wrap_bio(
            self._incoming, self._outgoing, server_hostname=server_hostname, session=session
        )
        self.closed = False
        """Whether the peer has sent `close_notify`: nothing follows, and nothing was cut off."""
        self.fault: ssl.SSLError | None = None
        """What broke the session after the plaintext that `decrypt` returned last: nothing follows."""

    @property
    def alpn(self) -> str | None:
        """The protocol negotiated, None if the server does not negotiate."""
        return self._object.selected_alpn_protocol()

    @property
    def resumed(self) -> bool:
        """Whether the server took up the session that was offered."""
        return bool(self._object.session_reused)

    def session(self) -> ssl.SSLSession | None:
        """Return what this session is resumed with, None where the server has given nothing (yet).

        With TLS 1.3 that is a ticket, which comes after the handshake. Not for each read: it costs 0.1 ms.
        """
        session = self._object.session
        if session is None or session.has_ticket:
            return session
        return session if session.id and self._object.version() != "TLSv1.3" else None

    def handshake(self, data: bytes) -> bool:
        """Take what the peer sent and return True once the session stands. Send what `take` returns either way."""
        self._incoming.write(data)
        try:
            self._object.do_handshake()
        except ssl.SSLWantReadError:
            return False
        return True

    def decrypt(self, data: bytes) -> bytes:
        """Return the plaintext that `data` completes; `b""` if it completes none.

        A record that breaks the session does not swallow the sound ones before it: they are returned, and `fault` is set.
        """
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
        except ssl.SSLError as error:
            if not parts:
                raise
            self.fault = error
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def encrypt(self, data: bytes | memoryview) -> None:
        """Add plaintext to be sent; `take` has the ciphertext.

        Raises RemoteProtocolError if the peer has begun another handshake (TLS 1.2, where a caller's context allows it),
        whose answers would have to be read first.
        """
        try:
            self._object.write(data)
        except ssl.SSLWantReadError as exc:
            raise RemoteProtocolError(
                "the server wants another TLS handshake while the request is sent"
            ) from exc

    def take(self) -> bytes:
        """Return the ciphertext to be sent now."""
        return self._outgoing.read()

    def close(self) -> None:
        """Add a `close_notify` to be sent."""
        with contextlib.suppress(
            ssl.SSLError
        ):  # it always wants the peer's own alert next, for which we do not wait
            self._object.unwrap()


SessionKey = tuple[ssl.SSLContext, str, int, str]
"""Who may resume a session: the same context, for the same host, port and server name."""


@attrs.frozen
class _Kept:
    session: ssl.SSLSession
    since: float


class Sessions:
    """The sessions to be resumed: at most `MAX_SESSIONS`, each for `SESSION_S` seconds."""

    __slots__ = ("_kept",)

    def __init__(self) -> None:
        self._kept: dict[SessionKey, _Kept] = {}
        """The one that was not used for longest first."""

    def __len__(self) -> int:
        return len(self._kept)

    def find(self, key: SessionKey, *, now: float) -> ssl.SSLSession | None:
        """Return the session to offer, or None."""
        kept = self._kept.pop(key, None)
        if kept is None or not 0 <= now - kept.since < SESSION_S:
            return None
        self._kept[key] = kept
        return kept.session

    def keep(self, key: SessionKey, layer: TLSLayer, *, now: float) -> None:
        """Keep a layer's session, if it has one that can be resumed, and none is kept."""
        if key in self._kept:
            return
        session = layer.session()
        if session is None:
            return
        self._kept[key] = _Kept(session, now)
        while len(self._kept) > MAX_SESSIONS:
            del self._kept[next(iter(self._kept))]

    def drop(self, key: SessionKey, session: ssl.SSLSession) -> None:
        """Offer it no more: it was refused. One that has taken its place is kept."""
        kept = self._kept.get(key)
        if kept is not None and kept.session is session:
            del self._kept[key]
