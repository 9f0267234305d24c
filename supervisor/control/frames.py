"""WebSocket frames (RFC 6455 section 5) before and beside trio-websocket: what is let in, and what we write ourselves.

Sans-IO. trio-websocket and wsproto read a peer's frames correctly but not boundedly: their message limit counts characters,
a message may have any number of (empty) fragments, each Ping is answered, and one that arrives after our Close raises out
of the reader task (trio-websocket issue 184). `FrameScanner` sits in front of them. It reads frame headers only, and

- refuses before buffering: a message above the limit in bytes or fragments, a binary one, a frame with the wrong masking,
  reserved bits, a bad length or bad fragmentation;
- passes on whole frames only, so that a message is held in as many pieces as it has frames, not in as many as it came in;
- keeps only the last of the Pings that arrive together, which section 5.5.3 allows to be answered alone;
- after our own Close passes on the peer's Close and nothing else; after the peer's Close, nothing.

What is sent is built here too: a frame is made once and written as it is, without wsproto's bookkeeping per message.
"""

from __future__ import annotations

import os
import struct

from supervisor.control.messages import CloseCode

__all__ = [
    "OP_CLOSE",
    "OP_PING",
    "OP_TEXT",
    "FrameError",
    "FrameScanner",
    "build_close",
    "build_frame",
    "build_head",
]

OP_CONTINUATION = 0x0
OP_TEXT = 0x1
OP_BINARY = 0x2
OP_CLOSE = 0x8
OP_PING = 0x9
OP_PONG = 0xA

_KNOWN = {OP_CONTINUATION, OP_TEXT, OP_BINARY, OP_CLOSE, OP_PING, OP_PONG}
_MAX_CONTROL_BYTES = 125
_pack_medium = struct.Struct("!BBH").pack
_pack_large = struct.Struct("!BBQ").pack


class FrameError(Exception):
    """The peer broke the protocol or a limit: `code` and `reason` are for the Close frame."""

    def __init__(self, code: int, reason: str) -> None:
        super().__init__(reason)
        self.code = code
        self.reason = reason


def build_head(opcode: int, length: int, *, mask: bool = False) -> bytes:
    """Return the header of a final frame, up to where the mask's key would follow."""
    bit = 0x80 if mask else 0
    if length <= 125:
        return bytes((0x80 | opcode, bit | length))
    if length <= 0xFFFF:
        return _pack_medium(0x80 | opcode, bit | 126, length)
    return _pack_large(0x80 | opcode, bit | 127, length)


def build_frame(opcode: int, payload: bytes, *, mask: bool = False) -> bytes:
    """Return one final frame. A client masks, a server does not (section 5.1)."""
    length = len(payload)
    head = build_head(opcode, length, mask=mask)
    if not mask:
        return head + payload
    key = os.urandom(4)
    repeated = key * (length // 4 + 1)
    masked = int.from_bytes(payload, "big") ^ int.from_bytes(repeated[:length], "big")
    return head + key + masked.to_bytes(length, "big")


def build_close(code: int, reason: str, *, mask: bool = False) -> bytes:
    """Return a Close frame; the reason is cut to what fits (123 bytes)."""
    said = reason.encode("utf-8", "replace")[: _MAX_CONTROL_BYTES - 2].decode("utf-8", "ignore").encode()
    return build_frame(OP_CLOSE, struct.pack("!H", code) + said, mask=mask)


class FrameScanner:
    """Passes whole frames of one direction on, within limits. See the module's text."""

    def __init__(self, *, masked: bool, max_message_bytes: int, max_fragments: int) -> None:
        self._masked = masked
        self._max_message_bytes = max_message_bytes
        self._max_fragments = max_fragments
        self._buffer = bytearray()
        self._need = 0  # bytes of the frame at the head of the buffer, once its header is known
        self._opcode = 0
        self._in_message = False
        self._message_bytes = 0
        self._fragments = 0
        self.closing = False
        """Set when our Close has been sent: only the peer's Close matters from then on."""
        self.close_received = False

    @property
    def buffered_bytes(self) -> int:
        """Bytes held of a frame that is not whole yet; never more than the message limit and one read."""
        return len(self._buffer)

    def feed(self, data: bytes) -> bytes:
        """Take what was read; return the whole frames that may be passed on (b"" if none). Raises FrameError."""
        buffer = self._buffer
        buffer += data
        passed: list[bytes] = []
        last_ping: int | None = None
        at = 0
        while not self.close_received:
            if not self._need and not self._read_header(at):
                break
            if len(buffer) - at < self._need:
                break
            frame = bytes(buffer[at : at + self._need])
            at += self._need
            self._need = 0
            if self._opcode == OP_CLOSE:
                self.close_received = True
            elif self.closing:
                continue
            elif self._opcode == OP_PING:
                if last_ping is not None:
                    passed[last_ping] = b""
                last_ping = len(passed)
            passed.append(frame)
        if self.close_received:
            buffer.clear()
        else:
            del buffer[:at]
        return b"".join(passed)

    def _read_header(self, at: int) -> bool:
        """Read the header at `at` and judge it; False if it is not all there."""
        buffer = self._buffer
        available = len(buffer) - at
        if available < 2:
            return False
        first, second = buffer[at], buffer[at + 1]
        opcode, final, length = first & 0x0F, bool(first & 0x80), second & 0x7F
        if first & 0x70:
            raise FrameError(CloseCode.PROTOCOL_ERROR, "reserved bits are set; no extension was agreed")
        if opcode not in _KNOWN:
            raise FrameError(CloseCode.PROTOCOL_ERROR, f"unknown opcode {opcode:#x}")
        if bool(second & 0x80) != self._masked:
            wrong = (
                "a client's frames must be masked" if self._masked else "a server's frames must not be masked"
            )
            raise FrameError(CloseCode.PROTOCOL_ERROR, wrong)
        control = opcode >= OP_CLOSE
        if control and (length > _MAX_CONTROL_BYTES or not final):
            raise FrameError(
                CloseCode.PROTOCOL_ERROR, "a control frame that is fragmented or longer than 125 bytes"
            )
        header = 2
        if length == 126:
            header = 4
            if available < header:
                return False
            (length,) = struct.unpack_from("!H", buffer, at + 2)
            if length < 126:
                raise FrameError(CloseCode.PROTOCOL_ERROR, "a length not in its shortest form")
        elif length == 127:
            header = 10
            if available < header:
                return False
            (length,) = struct.unpack_from("!Q", buffer, at + 2)
            if length <= 0xFFFF or length >> 63:
                raise FrameError(CloseCode.PROTOCOL_ERROR, "a length not in its shortest form")
        if not control:
            self._judge_data(opcode, final=final, length=length)
        self._opcode = opcode
        self._need = header + (4 if self._masked else 0) + length
        return True

    def _judge_data(self, opcode: int, *, final: bool, length: int) -> None:
        if (opcode == OP_CONTINUATION) != self._in_message:
            wrong = "a new message inside a message" if self._in_message else "a continuation of nothing"
            raise FrameError(CloseCode.PROTOCOL_ERROR, wrong)
        if opcode == OP_BINARY:
            raise FrameError(
                CloseCode.UNSUPPORTED_DATA, "a binary message; every message is JSON in a text message"
            )
        self._message_bytes += length
        self._fragments += 1
        if self._message_bytes > self._max_message_bytes:
            raise FrameError(CloseCode.MESSAGE_TOO_BIG, f"a message above {self._max_message_bytes} bytes")
        if self._fragments > self._max_fragments:
            raise FrameError(
                CloseCode.MESSAGE_TOO_BIG, f"a message in more than {self._max_fragments} fragments"
            )
        self._in_message = not final
        if final:
            self._message_bytes = 0
            self._fragments = 0
