from __future__ import annotations

import struct

import pytest
import wsproto
from hypothesis import given
from hypothesis import strategies as st
from wsproto.connection import Connection, ConnectionType
from wsproto.events import TextMessage

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


def scanner(**changes: int) -> FrameScanner:
    return FrameScanner(masked=True, **{"max_message_bytes": 1000, "max_fragments": 4, **changes})


def piece(opcode: int, payload: bytes, *, final: bool) -> bytes:
    frame = bytearray(build_frame(opcode, payload, mask=True))
    if not final:
        frame[0] &= 0x7F
    return bytes(frame)


@given(st.text(max_size=400), st.lists(st.integers(1, 50), max_size=30), st.booleans())
def test_built_frames_are_read_by_wsproto_at_any_split(text: str, cuts: list[int], mask: bool) -> None:
    """What we build is what wsproto reads, and passing it through the scanner in any pieces changes nothing."""
    raw = build_frame(OP_TEXT, text.encode(), mask=mask)
    guard = FrameScanner(masked=mask, max_message_bytes=10_000, max_fragments=4)
    passed = bytearray()
    at = 0
    for cut in [*cuts, len(raw)]:
        passed += guard.feed(raw[at : at + cut])
        at += cut
    assert bytes(passed) == raw
    oracle = Connection(ConnectionType.SERVER if mask else ConnectionType.CLIENT)
    oracle.receive_data(bytes(passed))
    events = list(oracle.events())
    assert "".join(event.data for event in events if isinstance(event, TextMessage)) == text


@pytest.mark.parametrize("length", [0, 125, 126, 65535, 65536, 100_000])
def test_every_length_has_its_form(length: int) -> None:
    """The three forms of a length, at their edges, are built so that wsproto accepts them."""
    oracle = Connection(ConnectionType.CLIENT)
    oracle.receive_data(build_frame(OP_TEXT, b"x" * length))
    assert sum(len(event.data) for event in oracle.events() if isinstance(event, TextMessage)) == length


def test_only_whole_frames_are_passed_on() -> None:
    """Byte by byte, nothing comes out before the last byte, and what is held is no more than the frame."""
    guard = scanner()
    raw = build_frame(OP_TEXT, b"hello", mask=True)
    assert [guard.feed(raw[i : i + 1]) for i in range(len(raw) - 1)] == [b""] * (len(raw) - 1)
    assert guard.buffered_bytes == len(raw) - 1
    assert guard.feed(raw[-1:]) == raw
    assert guard.buffered_bytes == 0


@pytest.mark.parametrize(
    ("raw", "code"),
    [
        (build_frame(OP_TEXT, b"x"), CloseCode.PROTOCOL_ERROR),
        (b"\xc1\x80\0\0\0\0", CloseCode.PROTOCOL_ERROR),
        (b"\x83\x80\0\0\0\0", CloseCode.PROTOCOL_ERROR),
        (b"\x80\x80\0\0\0\0", CloseCode.PROTOCOL_ERROR),
        (b"\x09\x80\0\0\0\0", CloseCode.PROTOCOL_ERROR),
        (b"\x89\xfe\0\x7e\0\0\0\0", CloseCode.PROTOCOL_ERROR),
        (b"\x81\xfe\0\x7d\0\0\0\0", CloseCode.PROTOCOL_ERROR),
        (b"\x81\xff" + struct.pack("!Q", 65535) + b"\0\0\0\0", CloseCode.PROTOCOL_ERROR),
        (b"\x81\xff" + struct.pack("!Q", 1 << 63) + b"\0\0\0\0", CloseCode.PROTOCOL_ERROR),
        (piece(OP_TEXT, b"a", final=False) + piece(OP_TEXT, b"b", final=True), CloseCode.PROTOCOL_ERROR),
        (build_frame(0x2, b"x", mask=True), CloseCode.UNSUPPORTED_DATA),
        (build_frame(OP_TEXT, b"x" * 1001, mask=True)[:8], CloseCode.MESSAGE_TOO_BIG),
        (b"\x81\xff" + struct.pack("!Q", 1 << 60), CloseCode.MESSAGE_TOO_BIG),
        (
            piece(OP_TEXT, b"x" * 600, final=False) + piece(0, b"x" * 401, final=True),
            CloseCode.MESSAGE_TOO_BIG,
        ),
        (
            piece(OP_TEXT, b"", final=False) + piece(0, b"", final=False) * 4,
            CloseCode.MESSAGE_TOO_BIG,
        ),
    ],
    ids=[
        "unmasked",
        "reserved bits",
        "unknown opcode",
        "continuation of nothing",
        "fragmented ping",
        "long ping",
        "16-bit length too short",
        "64-bit length too short",
        "64-bit length with its top bit",
        "message in a message",
        "binary",
        "too long, by its header alone",
        "absurdly long, by its header alone",
        "too long in two fragments",
        "empty fragments without end",
    ],
)
def test_what_is_refused(raw: bytes, code: int) -> None:
    """Each breach is refused as soon as its header is there, with the close code that the documentation gives it."""
    with pytest.raises(FrameError) as caught:
        scanner().feed(raw)
    assert caught.value.code == code


def test_the_limit_is_in_bytes() -> None:
    """A message of 400 characters and 1200 bytes is above a limit of 1000, where counting characters would let it in."""
    with pytest.raises(FrameError):
        scanner().feed(build_frame(OP_TEXT, "€".encode() * 400, mask=True))
    message = build_frame(OP_TEXT, "€".encode() * 333, mask=True)
    assert scanner().feed(message) == message


def test_limits_are_per_message() -> None:
    """A message at the limit may follow a message at the limit, and control frames between fragments do not count."""
    guard = scanner()
    for _ in range(3):
        for number, last in ((OP_TEXT, False), (0, False), (0, False), (0, True)):
            assert guard.feed(piece(number, b"x" * 250, final=last))
            assert guard.feed(build_frame(0xA, b"", mask=True))


def test_pings_that_come_together_are_answered_once() -> None:
    """Of a hundred Pings in one read the last is passed on, as RFC 6455 section 5.5.3 allows."""
    pings = [build_frame(OP_PING, str(number).encode(), mask=True) for number in range(100)]
    assert scanner().feed(b"".join(pings)) == pings[-1]


def test_after_our_close_only_the_peers_close_matters() -> None:
    """Closing, a Ping (issue 184's attack) and data are dropped, the Close passes, and what follows it does not."""
    guard = scanner()
    guard.closing = True
    close = build_close(1000, "", mask=True)
    ping = build_frame(OP_PING, b"x", mask=True)
    assert guard.feed(build_frame(OP_TEXT, b"x", mask=True) + ping + close + ping) == close
    assert guard.close_received
    assert guard.feed(ping) == b""
    assert guard.buffered_bytes == 0


def test_a_close_frame_fits_whatever_the_reason() -> None:
    """A long reason is cut between characters to the 123 bytes there are."""
    oracle = Connection(ConnectionType.CLIENT)
    oracle.receive_data(build_close(4001, "€" * 100))
    (event,) = oracle.events()
    assert isinstance(event, wsproto.events.CloseConnection)
    assert (event.code, event.reason) == (4001, "€" * 41)
    assert build_close(1000, "")[0] == 0x80 | OP_CLOSE
