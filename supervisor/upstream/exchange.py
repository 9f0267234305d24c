"""One request and its response, on one connection.

The body comes in two ways that share everything but the waiting. `receive` waits for the socket and returns the body bytes
of one read. A reader that serves many sockets does the same in synchronous steps: `first` once, then, for each read of
`socket`, `feed_raw`, until `at_end` or `framing.fault`; at end of file `feed_eof`.

How an exchange ends decides what becomes of its connection. Only one that ended clean is used again: the framing
complete, nothing after it, HTTP/1.1 with no `Connection: close` from either side, the request sent in full. Everything
else closes the socket in the same step.
"""

from __future__ import annotations

import socket as sockets
from collections.abc import Callable

import httpx
import trio

from supervisor.errors import UpstreamClosedError, UpstreamError
from supervisor.upstream.connection import Connection, Counters
from supervisor.upstream.head import ResponseHead
from supervisor.upstream.shared import SharedReader
from supervisor.wire.http1 import ContentLengthBody, Framing, UntilCloseBody

__all__ = ["Exchange"]

_DRAIN_BYTES = 16 << 10
"""How much of an unwanted rest `aclose` reads at most, so that the connection can be used again."""


class Exchange:
    """A response whose head has been read. Made by `StreamTransport.open`; for one task at a time.

    End it with `aclose` or `abort`; both are idempotent, and either may follow the other. A cancel, an error or an abort
    in `receive` has closed the socket already.
    """

    __slots__ = (
        "_connection",
        "_counters",
        "_drain_s",
        "_keep_alive",
        "_label",
        "_over",
        "_reader",
        "_release",
        "_rest",
        "_take",
        "framing",
        "headers",
        "http_version",
        "reason",
        "status",
    )

    def __init__(
        self,
        connection: Connection,
        head: ResponseHead,
        *,
        rest: bytes,
        framing: Framing,
        keep_alive: bool,
        drain_s: float,
        release: Callable[[Connection], None],
        counters: Counters,
        label: str,
        reader: SharedReader | None = None,
    ) -> None:
        self.status = head.status
        self.reason = head.reason
        """The reason phrase, as received."""
        self.http_version = head.http_version
        self.headers = httpx.Headers(list(head.headers))
        self.framing = framing
        self._connection = connection
        self._rest = rest
        self._keep_alive = keep_alive
        self._drain_s = drain_s
        self._release = release
        self._counters = counters
        self._label = label
        self._reader = reader
        self._take: Callable[[bytes], bool] = _nothing_more
        self._over = False

    def __repr__(self) -> str:
        state = "complete" if self.at_end else "closed" if self._over else "streaming"
        return f"<Exchange {self._label} {self.status} {state}>"

    @property
    def socket(self) -> sockets.socket:
        """The raw, non-blocking socket, for a reader that waits for many. Not to be read past `at_end`."""
        return self._connection.socket

    @property
    def at_end(self) -> bool:
        """Whether the body is complete: nothing more is to be read."""
        return self.framing.complete and not self._rest

    @property
    def reusable(self) -> bool:
        """Whether the connection, as it stands, can carry another request."""
        return (
            self._keep_alive
            and not self._rest
            and self.framing.reusable
            and not self._connection.closed
            and not self._connection.ended
        )

    # --- the synchronous steps ---------------------------------------------------------------------------------------

    def first(self) -> bytes:
        """Return the body bytes that came with the head, once. Call it before the first `feed_raw`.

        Raises RemoteProtocolError.
        """
        rest, self._rest = self._rest, b""
        return self.framing.feed(rest) if rest else b""

    def feed_raw(self, data: bytes) -> bytes:
        """Turn the bytes of one read of the socket into body bytes, of which there may be none. Synchronous.

        Under TLS, `close_notify` ends the connection without an end of file: then `at_end` says whether the body is
        complete, and `feed_eof` is due if it is not. Raises RemoteProtocolError for broken framing, UpstreamClosedError if TLS failed; the caller then aborts.
        """
        try:
            data = self._connection.decode(data)
        except OSError as exc:
            raise self._closed(f": {exc.strerror or exc}") from exc
        return self.framing.feed(data)

    def feed_eof(self) -> None:
        """Take note that the peer has closed. Raises UpstreamClosedError unless that is how this body ends."""
        self._keep_alive = False
        if self.at_end:
            return
        if (fault := self._connection.fault) is not None:
            raise self._closed(f": {fault.strerror or fault}")
        if self._connection.truncatable:
            raise self._closed(": TLS ended without its close_notify, so the body may have been cut off")
        if not self.framing.end():
            raise self._closed("")

    # --- and with the waiting ----------------------------------------------------------------------------------------

    async def receive(self) -> bytes:
        """Return the body bytes of one read of the socket (never empty), or `b""` at the clean end of the body.

        Always a checkpoint. Raises UpstreamClosedError if the connection is closed or reset before the body is
        complete, RemoteProtocolError if its framing is broken, trio.ClosedResourceError if this exchange was ended here.
        After an error or a cancel the socket is closed.
        """
        framing = self.framing
        if framing.complete and not self._rest:
            await trio.lowlevel.checkpoint()
            return b""
        if self._over:
            raise trio.ClosedResourceError("this exchange was ended here")
        connection = self._connection
        try:
            if self._rest:
                await trio.lowlevel.checkpoint()
                body = self.first()
                if body or framing.complete:
                    return body
            while framing.fault is None and not connection.ended:
                raw = await connection.receive_raw()
                if not raw:
                    break
                # As `feed_raw` does; what a failing `decode` raises is reported below.
                body = framing.feed(connection.decode(raw))
                if body or framing.complete:
                    return body
            if framing.fault is not None:
                framing.feed(b"")  # raises what broke after the body bytes of the read before
            self.feed_eof()
        except trio.BusyResourceError:
            raise  # a second reader is a mistake of the caller, and not the first one's end
        except OSError as exc:
            self.abort()
            raise self._closed(f": {exc.strerror or exc}") from exc
        except BaseException:
            self.abort()
            raise
        return b""

    async def pump(self, take: Callable[[bytes], bool]) -> bool:
        """Give the body bytes of each read to `take`, until it returns False (then True) or the body has ended (then False).

        By the transport's shared reader, in whose step `take` is called, or where there is none by `receive`: `take` must
        not wait, and may not tell the difference. Otherwise as `receive`: a checkpoint, the same errors, and after one of
        them, or a cancel, the socket is closed. An exception of `take` comes out as it is.
        """
        reader = self._reader
        if reader is None:
            while body := await self.receive():
                if not take(body):
                    return True
            return False
        while (  # as long as the socket is not what is next: bytes that came with the head, and what they brought about
            self._rest
            or self.at_end
            or self._over
            or self.framing.fault is not None
            or self._connection.ended
        ):
            body = await self.receive()
            if not body:
                return False
            if not take(body):
                return True
        self._take = take
        try:
            return await reader.read(self)
        except trio.BusyResourceError:
            raise  # as in `receive`
        except OSError as exc:
            self.abort()
            raise self._closed(f": {exc.strerror or exc}") from exc
        except BaseException:
            self.abort()
            raise

    def feed_read(self, raw: bytes) -> bool | None:
        """Take what one read of the socket brought. See `supervisor.upstream.shared.Body`."""
        framing = self.framing
        if raw:
            connection = self._connection
            body = framing.feed(connection.decode(raw) if connection.encrypted else raw)
            if body and not self._take(body):
                return True
            if framing.complete:
                return False
            if framing.fault is None and not (connection.encrypted and connection.ended):
                return None
            if framing.fault is not None:
                framing.feed(b"")  # raises what broke after the body bytes of this read
        self.feed_eof()
        return False

    def abort(self) -> None:
        """Close the socket now: synchronous, no `close_notify`, no waiting. A task that waits in `receive` is woken."""
        if self._over:
            return
        self._over = True
        if not self.at_end:
            self._counters.aborted += 1
        if self._reader is not None and not self._connection.closed:
            self._reader.forget(self._connection.socket.fileno())
        self._connection.abort()

    async def aclose(self, *, drain_s: float | None = None) -> None:
        """End the exchange and give the connection back if it ended clean, else close it.

        If the body is not complete, its end may be about to arrive (the terminator of a chunked body often comes in a
        packet of its own): up to 16 KiB are read and dropped, for at most `drain_s` seconds (by default the transport's),
        shielded from cancellation, because a source that has seen its end marker is usually cancelled by then. 0 reads
        nothing. Raises nothing; not a checkpoint where there is nothing to read.
        """
        if self._over:
            return
        try:
            self.first()
            if self._may_end_soon():
                with trio.move_on_after(self._drain_s if drain_s is None else drain_s, shield=True):
                    await self._drain()
        except (UpstreamError, OSError):
            pass  # nobody wants the rest; the connection is closed below
        finally:
            self._finish()

    def _may_end_soon(self) -> bool:
        framing = self.framing
        if self.at_end or not self._keep_alive or isinstance(framing, UntilCloseBody):
            return False
        return not isinstance(framing, ContentLengthBody) or framing.remaining <= _DRAIN_BYTES

    async def _drain(self) -> None:
        left = _DRAIN_BYTES
        while left > 0 and not self.at_end and not self._connection.ended:
            raw = await self._connection.receive_raw()
            if not raw:
                self.feed_eof()
                return
            left -= len(raw)
            self.feed_raw(raw)

    def _finish(self) -> None:
        if self._over:
            return
        if not self.reusable:
            self.abort()
            return
        self._over = True
        self._release(self._connection)

    def _closed(self, why: str) -> UpstreamClosedError:
        return UpstreamClosedError(
            f"the connection to {self._connection.origin} was closed before the response was complete{why}",
            sent=True,
        )


def _nothing_more(_: bytes) -> bool:
    return False
