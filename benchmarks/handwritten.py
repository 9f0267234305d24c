"""What one writes by hand to consume a chat stream as cheaply as Python allows; for the benchmarks to compare with.

`EventJob` is the job: cut the bytes into events, decode each event's JSON into the two fields that are used, keep it in a list.
`Client` is an HTTP/1.1 client around it, as an asyncio protocol: one request, chunked framing, no task step per read.

Both are honest in what they count (every event is found, decoded and kept, however the reads fall) and in nothing else:
lines end in LF, events have one `data:` line, the response is a 200 and chunked, and nothing is bounded.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import msgspec

__all__ = ["LAST_CHUNK", "Client", "EventJob"]

LAST_CHUNK = b"0\r\n\r\n"


class _Delta(msgspec.Struct, gc=False):
    content: str = ""


class _Choice(msgspec.Struct, gc=False):
    delta: _Delta
    finish_reason: str | None = None


class _Chunk(msgspec.Struct, gc=False):
    choices: list[_Choice]


_decode = msgspec.json.Decoder(_Chunk).decode


class EventJob:
    """The events of one stream."""

    __slots__ = ("chunks", "ended", "rest")

    def __init__(self) -> None:
        self.rest = b""
        self.chunks: list[_Chunk] = []
        self.ended = False

    def feed(self, data: bytes) -> int:
        """Take body bytes; return how many events they completed."""
        blocks = (self.rest + data).split(b"\n\n")
        self.rest = blocks.pop()
        append = self.chunks.append
        for block in blocks:
            if block == b"data: [DONE]":
                self.ended = True
            else:
                append(_decode(memoryview(block)[6:]))
        return len(blocks)


class Client(asyncio.Protocol):
    """One request and its answer. `done` is set when the answer is complete, or fails with why it is not."""

    def __init__(self, body: bytes, took: Callable[..., None]) -> None:
        self.body = body
        self.took = took
        self.job = EventJob()
        self.buffer = b""
        self.head = True
        self.begun = False
        self.done: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def connection_made(self, transport) -> None:
        """Send the request."""
        transport.write(
            b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
            b"Content-Length: %d\r\n\r\n%b" % (len(self.body), self.body)
        )

    def data_received(self, data: bytes) -> None:
        """Take the bytes of one read."""
        data = self.buffer + data
        at = 0
        if self.head:
            end = data.find(b"\r\n\r\n")
            if end < 0:
                self.buffer = data
                return
            assert data.startswith(b"HTTP/1.1 200 "), data[:100]
            self.head = False
            at = end + 4
        parts, ended = [], False
        while (line := data.find(b"\r\n", at)) >= 0:
            size = int(data[at:line], 16)
            end = line + 2 + size
            if len(data) < end + 2:
                break
            if not size:
                ended = True
                break
            parts.append(data[line + 2 : end])
            at = end + 2
        self.buffer = data[at:]
        events = self.job.feed(parts[0] if len(parts) == 1 else b"".join(parts)) if parts else 0
        if events:
            self.took(events, first=not self.begun)
            self.begun = True
        if ended:
            self.done.set_result(None)

    def connection_lost(self, exc: Exception | None) -> None:
        """Fail, unless the answer is complete."""
        if not self.done.done():
            self.done.set_exception(exc or ConnectionError("the answer was cut off"))
