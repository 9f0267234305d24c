"""One WebSocket connection, seen from either end: what both the server's sessions and the client library stand on.

trio-websocket does the handshake, puts messages together and answers Pings. Around it stands `GuardedStream`, through which
all its bytes pass both ways, and beside it `Link`, which does all the sending of data. The reasons:

- A send that is cancelled half-way leaves half a frame on the wire, and everything after it is garbage. So one writer task
  sends, no caller does; a send that makes no progress within `stall_s` ends the connection, and the peer is told so if it takes
  the rest of the frame within `close_s`; and a connection whose send was interrupted otherwise is never written to again. When we are the ones who leave, the writer finishes what
  it has begun and `close` sends what it has not, both within one `close_s`.
- Closing is ours too. trio-websocket raises out of its reader task if a Ping arrives after its own Close (its issue 184),
  always records a local close as 1000, and waits without limit for the peer. We write the Close frame ourselves, so that
  its state stays "open"; from then on the guard lets in nothing but the peer's Close, and drops what is still sent.
- What can be sent at once is: `Link.write` hands whole frames to the socket in the step that made them, without a task
  switch. Only what the socket does not take is for the writer, and if it took a part of a frame, the rest of that goes out
  before anything else does, trio-websocket's frames included.
- What waits to be sent is bounded in bytes (`Outbox`): who produces waits, or is refused, and nothing grows.
- A peer that is gone without a word is noticed by a heartbeat: any byte received is a sign of life.

Cancelling `Link.send` or `Link.receive` loses nothing and breaks nothing.
"""

from __future__ import annotations

import math
import os
import re
from collections import deque
from collections.abc import Callable
from typing import NoReturn

import attrs
import trio
import trio_websocket

from supervisor.control.frames import (
    OP_CLOSE,
    OP_PING,
    OP_TEXT,
    FrameError,
    FrameScanner,
    build_close,
    build_frame,
)
from supervisor.control.messages import CloseCode
from supervisor.errors import ControlClosedError

__all__ = ["GuardedStream", "Link", "LinkLimits", "Outbox"]

_HEAD_END = b"\r\n\r\n"
_REQUEST = re.compile(rb"[A-Z]+ \S+ HTTP/1\.[01]\r\n")
_UPGRADE = re.compile(rb"\r\nupgrade[ \t]*:[^\r\n]*websocket", re.IGNORECASE)
_READ_BYTES = 64 << 10
_DRAIN_BYTES = 1 << 20  # how much of a misbehaving peer's data is read away so that it can see our Close
ABNORMAL = 1006
NORMAL = 1000


@attrs.frozen(kw_only=True)
class LinkLimits:
    """What bounds one connection at either end. Times in seconds, sizes in bytes."""

    max_message_bytes: int = 8 << 20
    """One message received, in bytes of UTF-8."""
    max_fragments: int = 1024
    """Frames of one message received."""
    max_head_bytes: int = 16 << 10
    """The HTTP head of the handshake."""
    outbox_bytes: int = 256 << 10
    """Waiting to be sent; one message may go over it."""
    send_chunk_bytes: int = 256 << 10
    stall_s: float = 10.0
    """Every `send_chunk_bytes` must be taken by the peer in this time."""
    ping_every_s: float = 20.0
    ping_answer_s: float = 20.0
    close_s: float = 2.0
    """How long what is still to be sent when the connection is closed may take, and the closing handshake as long again."""


class GuardedStream(trio.abc.Stream):
    """The transport as trio-websocket sees it, with the rules of this module in both directions."""

    def __init__(self, transport: trio.abc.Stream, *, client: bool, limits: LinkLimits) -> None:
        self._transport = transport
        self._client = client
        self._limits = limits
        self._scanner = FrameScanner(
            masked=not client, max_message_bytes=limits.max_message_bytes, max_fragments=limits.max_fragments
        )
        self._lock = trio.Lock()
        self._head: bytearray | None = bytearray()  # None once the handshake's head has been read
        self._framed = False
        self._answered = False
        self._broken = False
        self._rest = b""  # of a frame that the socket took a part of, and of those that follow it
        self._rest_cut = 0  # where in that the first of them begins
        self._fileno = _descriptor(transport)
        self._close_sent = False
        self._open = False
        self._reading = False
        self._shut = False
        self.last_received = trio.current_time()
        self.told_http = b""
        """What a peer is answered that asks for HTTP, and not for a WebSocket. Nothing: it is for trio-websocket to refuse."""
        self._asked_http = False
        self.fault: FrameError | None = None
        """What the peer did wrong, if that is why nothing more is received."""
        self.stalled = False
        self.over = trio.Event()
        """Set when nothing more will be received, for whatever reason, or nothing more can be sent."""
        self.when_unfinished: Callable[[], None] | None = None
        """Called when `send_nowait` has sent a part of a frame: see `unfinished`."""

    # --- receiving: only trio-websocket's reader task ----------------------------------------------------------------

    async def receive_some(self, max_bytes: int | None = None) -> bytes:
        """Return bytes that trio-websocket may see; b"" when there will be no more."""
        del max_bytes  # whole frames are passed on, whatever their size; it was judged before they were kept
        try:
            while not self.over.is_set() and not (self._close_sent and self._scanner.close_received):
                data = await self._read()
                if not data:
                    break
                try:
                    allowed = self._admit(data)
                except FrameError as fault:
                    self.fault = fault
                    break
                if self._asked_http:
                    await self._tell_http()
                    break
                if allowed:
                    return allowed
        except trio.Cancelled:
            self.over.set()  # the reader task is ending: `shut` reads on in its place
            raise
        self.over.set()
        return b""

    async def _tell_http(self) -> None:
        """Answer, and read until the peer leaves: closing a socket with unread data in it would take the answer away."""
        try:
            await self._write(self.told_http)
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            return
        left = _DRAIN_BYTES
        while left > 0 and (data := await self._read()):
            left -= len(data)

    async def _read(self) -> bytes:
        self._reading = True
        try:
            data = bytes(await self._transport.receive_some(_READ_BYTES))
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            return b""
        finally:
            self._reading = False
        self.last_received = trio.current_time()
        return data

    def _admit(self, data: bytes) -> bytes:
        if not self._framed:
            return self._handshake_bytes(data)
        if not (self._client or self._answered):
            raise FrameError(CloseCode.PROTOCOL_ERROR, "frames before the handshake was answered")
        return self._scanner.feed(data)

    def _handshake_bytes(self, data: bytes) -> bytes:
        if self._head is None:  # after the head, but not framed: a client is reading the body of a refusal
            return data
        self._head += data
        end = self._head.find(_HEAD_END)
        if len(self._head) > self._limits.max_head_bytes and not 0 <= end < self._limits.max_head_bytes:
            raise FrameError(CloseCode.PROTOCOL_ERROR, "the handshake is too long")
        if end < 0:
            return data
        before = len(self._head) - len(data)
        cut = end + len(_HEAD_END) - before
        accepted = not self._client or b" 101 " in self._head[:end].partition(b"\r\n")[0]
        if self.told_http and _REQUEST.match(self._head) and not _UPGRADE.search(self._head, 0, end):
            self._asked_http = True
            return b""
        self._head = None
        if not accepted:
            return data
        self._framed = True
        self._open = self._client
        rest = data[cut:]
        if not rest:
            return data
        if not self._client:
            raise FrameError(CloseCode.PROTOCOL_ERROR, "frames before the handshake was answered")
        return data[:cut] + self._scanner.feed(rest)

    # --- sending -----------------------------------------------------------------------------------------------------

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        """Send what trio-websocket wants to send: the handshake, Pongs and its answer to a Close."""
        raw = bytes(data)
        if not self._framed or (not self._answered and not self._client):
            self._answered = True
            await self._write(raw)
        elif raw and raw[0] == 0x80 | OP_CLOSE:
            await self.send_close(raw)
        elif self._close_sent:
            await (
                trio.lowlevel.checkpoint()
            )  # a Pong after our Close: legal to leave out, and what issue 184 dies of
        else:
            await self._write(raw)

    async def send_frames(self, data: bytes) -> None:
        """Send whole frames. Raises BrokenResourceError if they cannot be; a cancel ends the sending for good."""
        if self._close_sent:
            raise trio.BrokenResourceError("the connection is closing")
        await self._write(data)

    @property
    def rest_bytes(self) -> int:
        """How much of a frame that was sent in part is still to be sent."""
        return len(self._rest)

    @property
    def unfinished(self) -> bool:
        """Whether a frame has been sent in part: `send_frames`, of no more frames if there are none, sends the rest."""
        return bool(self._rest)

    def send_nowait(self, data: bytes) -> bool:
        """Send whole frames without waiting; False if not even a part of them can be sent now, and all is as before.

        What the socket does not take is kept, see `unfinished`. A lost connection is told by `over`.
        """
        if self._rest or self._broken or self._close_sent or self._fileno is None:
            return False
        try:
            sent = os.write(self._fileno(), data)  # trio's own `send` is a coroutine
        except BlockingIOError:
            return False
        except OSError:
            self._broken = True
            self.over.set()
            return True  # nothing can be kept for a peer that is gone: it comes back for what it has not seen
        if sent != len(data):
            self._rest = data[sent:]
            self._rest_cut = _frame_end(data, 0, sent) - sent
            if self.when_unfinished is not None:
                self.when_unfinished()
        return True

    def _offer(self, data: bytes | memoryview) -> int:
        """Send what the socket takes at once; return how much. Raises BrokenResourceError."""
        if self._fileno is None:
            return 0
        try:
            return os.write(self._fileno(), data)  # as in `send_nowait`, which does without this call
        except BlockingIOError:
            return 0
        except OSError as error:
            self._broken = True
            self.over.set()
            raise trio.BrokenResourceError(f"the connection was lost: {error}") from error

    async def send_close(self, frame: bytes) -> None:
        """Send a Close frame unless one was sent; nothing is sent after it. Raises BrokenResourceError."""
        if self._close_sent:
            await trio.lowlevel.checkpoint()
            return
        self._close_sent = True
        self._scanner.closing = True
        await self._write(frame)

    async def _write(self, data: bytes) -> None:
        async with self._lock:
            if self._broken:
                raise trio.BrokenResourceError("an earlier send was interrupted")
            await trio.lowlevel.checkpoint_if_cancelled()  # while nothing is broken by it
            first_frame = 0
            if self._rest:
                data, self._rest, first_frame = self._rest + data, b"", self._rest_cut
            sent = self._offer(data)
            self._broken = sent < len(data)  # until all of it is out: also if we are cancelled in between
            view, fileno = memoryview(data), self._fileno
            try:
                while sent < len(view):
                    end = sent + self._limits.send_chunk_bytes
                    with trio.fail_after(self._limits.stall_s):
                        if fileno is None:
                            await self._transport.send_all(view[sent:end])
                            sent += len(view[sent:end])
                        else:
                            while sent < min(end, len(view)):
                                await trio.lowlevel.wait_writable(fileno())
                                sent += self._offer(view[sent:end])
            except trio.TooSlowError:
                self.stalled = True
                self.over.set()
                if fileno is not None:
                    self._rest = data[sent : _frame_end(data, first_frame, sent)]
                raise trio.BrokenResourceError("the peer does not take what is sent to it") from None
            except (trio.BrokenResourceError, trio.ClosedResourceError):
                self.over.set()
                raise
            self._broken = False

    async def wait_send_all_might_not_block(self) -> None:
        """Not needed by trio-websocket."""
        await self._transport.wait_send_all_might_not_block()

    def opened(self) -> None:
        """Note that the handshake was accepted: from now on a Close frame is how this ends."""
        self._open = True

    # --- the end -----------------------------------------------------------------------------------------------------

    async def aclose(self) -> None:
        """Note that trio-websocket is done with the stream. The transport is closed by `shut`, after our Close."""
        self.over.set()
        await trio.lowlevel.checkpoint()

    async def shut(self, code: int, reason: str) -> None:
        """Close the connection: our Close frame, the peer's, then the transport; at most `close_s`, then by force.

        Only the first call does anything.
        """
        if self._shut:
            await trio.lowlevel.checkpoint()
            return
        self._shut = True
        try:
            with trio.move_on_after(self._limits.close_s, shield=True):
                close = build_close(code, reason, mask=self._client)
                if self._open and self.stalled:
                    await self._close_after_rest(close)
                elif self._open:
                    await self.send_close(close)
                    if not self._scanner.close_received:
                        await self._wait_for_close()
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            pass
        finally:
            self._rest = b""
            with trio.CancelScope(shield=True):
                await trio.aclose_forcefully(self._transport)

    async def _close_after_rest(self, close: bytes) -> None:
        """Tell a peer that has stalled, should it take something again: the rest of the frame it was sent in part, and why."""
        if self._fileno is None or self._close_sent:  # then it is not known how much of a frame it was sent
            await trio.lowlevel.checkpoint()
            return
        self._close_sent = True
        left = memoryview(self._rest + close)
        while left:
            await trio.lowlevel.wait_writable(self._fileno())
            left = left[self._offer(left) :]

    async def _wait_for_close(self) -> None:
        """Read until the peer's Close: closing a socket with unread data in it would take our own Close away."""
        if self._reading:  # then trio-websocket's reader task goes on until there is no more
            await self.over.wait()
        self.over.set()  # else it is busy with what it has read, or gone: we read on in its place
        left = _DRAIN_BYTES
        while left > 0 and not self._scanner.close_received:
            data = await self._read()
            if not data:
                return
            left -= len(data)
            if self.fault is None:
                try:
                    self._scanner.feed(data)
                except FrameError as fault:
                    self.fault = fault


def _frame_end(data: bytes, start: int, sent: int) -> int:
    """Return where the frame ends that was sent up to a position; a frame begins at `start`, which may lie after that."""
    while start < sent:
        length = data[start + 1] & 0x7F
        mask = 4 if data[start + 1] & 0x80 else 0
        if length < 126:
            start += 2 + mask + length
        else:
            size = 2 if length == 126 else 8
            start += 2 + size + mask + int.from_bytes(data[start + 2 : start + 2 + size], "big")
    return start


def _descriptor(transport: trio.abc.Stream) -> Callable[[], int] | None:
    """Return what gives the transport's descriptor, if it is one that can be written to as it is; -1 once it is closed."""
    if os.name == "posix" and isinstance(transport, trio.SocketStream):
        return transport.socket.fileno
    return None


class Outbox:
    """Frames waiting for the writer, bounded in bytes; one frame may go over a bound.

    Two bounds of the same size: one for what can wait to be queued (events, answers that took time), one for what cannot (an
    answer given on the spot). So a client that is behind with its events can still ask, and one that only asks is noticed.
    """

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self._frames: deque[bytes] = deque()
        self._urgent_bytes = 0
        self._woken = False
        self._filled = trio.Event()
        self._room = trio.Event()
        self.nbytes = 0
        """Bytes waiting."""
        self.has_room = True
        """Whether more is accepted now of what can wait."""
        self.when_room: Callable[[], None] | None = None
        """Called once, when there is room again."""

    def put_nowait(self, frame: bytes) -> None:
        """Queue a frame that cannot wait. Raises WouldBlock when too much of that kind is queued."""
        if self._urgent_bytes >= self.max_bytes:
            raise trio.WouldBlock
        self._urgent_bytes += len(frame)
        self.append(frame)

    def append(self, frame: bytes) -> None:
        """Queue a frame whether or not there is room: for one who has looked before a bounded batch."""
        self._frames.append(frame)
        self.nbytes += len(frame)
        self.has_room = self.nbytes - self._urgent_bytes < self.max_bytes
        self._filled.set()

    async def put(self, frame: bytes) -> None:
        """Queue a frame when there is room. A checkpoint; a cancel queues nothing."""
        await self.put_made(lambda: frame)

    async def put_made(self, make: Callable[[], bytes]) -> None:
        """Queue a frame that is made when there is room for it, so that no number of large ones waits. As `put`."""
        await trio.lowlevel.checkpoint()
        while not self.has_room:
            await self.wait_room()
        self.append(make())

    async def wait_room(self) -> None:
        """Wait until there may be room."""
        if self.has_room:
            await trio.lowlevel.checkpoint()
            return
        self._room = trio.Event() if self._room.is_set() else self._room
        await self._room.wait()

    def wake(self) -> None:
        """Have `take` return although nothing may wait here: there is something else to be sent."""
        self._woken = True
        self._filled.set()

    async def take(self) -> bytes:
        """Wait for something to send and take all of it, joined; b"" if woken by `wake`."""
        while not self._frames and not self._woken:
            self._filled = trio.Event()
            await self._filled.wait()
        self._woken = False
        return self.take_nowait()

    def take_nowait(self) -> bytes:
        """Take all that waits, joined; b"" if nothing does."""
        data = b"".join(self._frames)
        self._frames.clear()
        self.nbytes = self._urgent_bytes = 0
        self.has_room = True
        self._room.set()
        if self.when_room is not None:
            call, self.when_room = self.when_room, None
            call()
        return data


class Link:
    """An open connection: `run` it in a nursery of its own, `send` and `receive` messages, `close` it at the end."""

    def __init__(
        self,
        socket: trio_websocket.WebSocketConnection,
        guard: GuardedStream,
        limits: LinkLimits,
        *,
        client: bool,
    ) -> None:
        self._socket = socket
        self._guard = guard
        self._limits = limits
        self._client = client
        self.outbox = Outbox(limits.outbox_bytes)
        guard.when_unfinished = self.outbox.wake
        self._writing = trio.CancelScope(shield=True)
        self._taken = b""  # what the writer has taken from the outbox and not sent
        self._sending = False
        self._left_s = limits.close_s  # for what is still to be sent when we leave

    def frame(self, message: bytes) -> bytes:
        """Return the frame of one text message. A server's frame can be sent to any number of links."""
        return build_frame(OP_TEXT, message, mask=self._client)

    async def send(self, message: bytes) -> None:
        """Queue a message, waiting for room. It is sent unless the connection ends first."""
        await self.outbox.put(self.frame(message))

    async def send_made(self, make: Callable[[], bytes]) -> None:
        """Queue a message that is made only once there is room for it. As `send`."""
        await self.outbox.put_made(lambda: self.frame(make()))

    def send_nowait(self, message: bytes) -> None:
        """Queue a message that cannot wait. Raises WouldBlock when too much of that kind is waiting."""
        self.outbox.put_nowait(self.frame(message))

    def write(self, data: bytes) -> None:
        """Send whole frames at once, as far as the socket takes them; the writer sends the rest. Does not wait.

        For one who has looked for room in the outbox before a bounded batch.
        """
        if self._taken or self.outbox.nbytes or not self._guard.send_nowait(data):
            self.outbox.append(data)

    async def receive(self) -> str | bytes:
        """Wait for the next message. Raises ControlClosedError when there will be none."""
        try:
            return await self._socket.get_message()
        except trio_websocket.ConnectionClosed:
            raise self.ending() from None

    def ending(self) -> ControlClosedError:
        """Say why the connection ended, as far as is known: the peer's Close, its fault, or nothing at all."""
        guard = self._guard
        if guard.fault is not None:
            return ControlClosedError(guard.fault.code, guard.fault.reason)
        if guard.stalled:
            return ControlClosedError(CloseCode.STALLED, "what was sent was not taken in time")
        closed = self._socket.closed
        if closed is None:
            return ControlClosedError(ABNORMAL, "the connection was lost")
        if closed.code == 1007:  # wsproto decodes text; the guard reads headers only
            return ControlClosedError(CloseCode.INVALID_TEXT, "a text message that is not UTF-8")
        return ControlClosedError(int(closed.code), closed.reason or "")

    async def run(self) -> NoReturn:
        """Write what is queued and keep the heartbeat, until cancelled. Raises ControlClosedError when it is over.

        When cancelled, a send under way has `close_s` to finish; what else is queued is kept for `close`.
        """
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._heartbeat, nursery.cancel_scope)
            nursery.start_soon(self._write, nursery.cancel_scope)
            try:
                await self._guard.over.wait()
                nursery.cancel_scope.cancel()
            finally:
                if self._sending:
                    self._writing.deadline = trio.current_time() + self._limits.close_s
                else:
                    self._writing.cancel()
        raise self._silent if self._silent is not None else self.ending()

    _silent: ControlClosedError | None = None

    async def _write(self, scope: trio.CancelScope) -> None:
        with (
            self._writing
        ):  # shielded: `run` says when this ends, so that it does not cut a frame that can be finished
            try:
                while self._writing.deadline == math.inf:
                    self._taken = await self.outbox.take()
                    self._sending = True
                    await self._guard.send_frames(self._taken)
                    self._sending = False
                    self._taken = b""
            except (trio.BrokenResourceError, trio.ClosedResourceError):
                scope.cancel()
        if self._writing.deadline != math.inf:
            self._left_s = max(0.0, self._writing.deadline - trio.current_time())

    async def _heartbeat(self, scope: trio.CancelScope) -> None:
        guard, limits = self._guard, self._limits
        ping = build_frame(OP_PING, b"", mask=self._client)
        while True:
            quiet_until = guard.last_received + limits.ping_every_s
            if trio.current_time() < quiet_until:
                await trio.sleep_until(quiet_until)
                continue
            await self.outbox.put(ping)
            asked = trio.current_time()
            await trio.sleep_until(asked + limits.ping_answer_s)
            if guard.last_received < asked:
                self._silent = ControlClosedError(CloseCode.HEARTBEAT, "no answer to a ping")
                scope.cancel()

    @property
    def bytes_held(self) -> int:
        """What waits to be sent: queued, with the writer, or the rest of a frame."""
        return self.outbox.nbytes + len(self._taken) + self._guard.rest_bytes

    async def close(self, code: int, reason: str) -> None:
        """Send what is queued or was taken and not sent, close, and give the transport up.

        Bounded by `close_s` for each of the two, and not interrupted by a cancel.
        """
        with trio.move_on_after(self._left_s, shield=True):
            try:
                rest, self._taken = self._taken + self.outbox.take_nowait(), b""
                if rest or self._guard.unfinished:
                    await self._guard.send_frames(rest)
            except (trio.BrokenResourceError, trio.ClosedResourceError):
                pass
        await self._guard.shut(code, reason)
