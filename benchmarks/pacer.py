"""A lean paced upstream: one epoll loop that holds thousands of streams at a steady pace and records when each closed.

The simulated upstream of `supervisor.testing` spends a task or two and ~100 µs on an event, so at 1000 streams of 50 events/s
it would be what is measured. This one sends prebuilt bytes, a few µs an event, and notices a close between any two slices
of sends. It speaks just enough HTTP to be a streaming provider: POST anything, get an endless event stream, or GET
`/report`. The request's JSON field `user` names the stream in the report. No faults, no TLS, no other routes.

`python benchmarks/pacer.py --rate 50` prints one JSON line with `base_url`, and stops when its standard input closes.
"""

from __future__ import annotations

import argparse
import heapq
import json
import os
import select
import socket
import sys
import time
from typing import Any

import measure

_SLICE = 16
"""Sends between two looks at who has closed."""
_HEAD = (
    b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ncache-control: no-cache\r\n"
    b"transfer-encoding: chunked\r\n\r\n"
)


def _events() -> list[bytes]:
    blocks = []
    for number in range(64):
        choice = {"index": 0, "delta": {"content": f"w{number} "}, "finish_reason": None}
        chunk = {
            "id": "chatcmpl-pacer",
            "object": "chat.completion.chunk",
            "created": 1_700_000_000,
            "model": "pacer",
            "choices": [choice],
        }
        event = b"data: " + json.dumps(chunk, separators=(",", ":")).encode() + b"\n\n"
        blocks.append(b"%x\r\n%b\r\n" % (len(event), event))
    return blocks


class _Client:
    __slots__ = ("at", "due", "key", "received", "rest", "sock")

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self.received = bytearray()
        self.key = ""
        self.due = 0.0
        self.at = 0
        self.rest = b""


class Pacer:
    """Serves until standard input closes."""

    def __init__(self, rate: float) -> None:
        self.interval = 1 / rate
        self.blocks = _events()
        self.listener = socket.create_server(("127.0.0.1", 0), backlog=1024)
        self.listener.setblocking(False)
        self.poll = select.epoll()
        self.clients: dict[int, _Client] = {}
        self.heap: list[tuple[float, int, int]] = []
        self.order = 0
        self.closed: dict[str, float] = {}
        self.sent = self.late = self.behind = self.streaming = 0

    def run(self) -> None:
        listener, stdin = self.listener.fileno(), sys.stdin.fileno()
        self.poll.register(listener, select.EPOLLIN)
        self.poll.register(stdin, select.EPOLLIN)
        while True:
            now = time.monotonic()
            wait = -1.0 if not self.heap else max(0.0, self.heap[0][0] - now)
            for fd, _ in self.poll.poll(wait):
                if fd == listener:
                    self._accept()
                elif fd == stdin:
                    if not os.read(stdin, 4096):
                        return
                else:
                    self._readable(fd)
            self._send_due()

    def _accept(self) -> None:
        for _ in range(64):
            try:
                sock, _address = self.listener.accept()
            except OSError:
                return
            sock.setblocking(False)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self.clients[sock.fileno()] = _Client(sock)
            self.poll.register(sock.fileno(), select.EPOLLIN)

    def _readable(self, fd: int) -> None:
        client = self.clients.get(fd)
        if client is None:
            return
        try:
            data = client.sock.recv(65536)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if not data:
            self._gone(fd, client)
            return
        client.received += data
        head, found, rest = client.received.partition(b"\r\n\r\n")
        if not found or client.key:
            return
        length = 0
        for line in head.lower().split(b"\r\n")[1:]:
            name, _, value = line.partition(b":")
            if name == b"content-length":
                length = int(value)
        if len(rest) < length:
            return
        client.received.clear()
        if head.startswith(b"GET "):
            self._report(client)
            return
        client.key = json.loads(rest).get("user", "?")
        self.streaming += 1
        client.rest = _HEAD
        self._send(fd, client)

    def _send_due(self) -> None:
        for _ in range(_SLICE):
            now = time.monotonic()
            if not self.heap or self.heap[0][0] > now:
                return
            due, order, fd = heapq.heappop(self.heap)
            client = self.clients.get(fd)
            if client is not None and client.due == order:
                if now - due > self.interval:
                    self.behind += 1
                self._send(fd, client, due)

    def _send(self, fd: int, client: _Client, due: float | None = None) -> None:
        """Send one event, and arrange for the next."""
        data = client.rest + self.blocks[client.at % len(self.blocks)]
        client.at += 1
        try:
            done = client.sock.send(data)
            client.rest = data[done:]
            self.sent += 1
        except BlockingIOError:
            self.late += 1  # the client's buffers are full: this event is not sent
        except OSError:
            self._gone(fd, client)
            return
        now = time.monotonic()
        next_due = now + self.interval if due is None else max(due + self.interval, now - 1)
        self.order += 1
        client.due = self.order
        heapq.heappush(self.heap, (next_due, self.order, fd))

    def _gone(self, fd: int, client: _Client) -> None:
        if client.key:
            self.closed[client.key] = time.monotonic()
            self.streaming -= 1
        del self.clients[fd]
        client.sock.close()

    def _report(self, client: _Client) -> None:
        report: dict[str, Any] = {
            "closed": self.closed,
            "streaming": self.streaming,
            "sent": self.sent,
            "late": self.late,
            "behind": self.behind,
            "cpu_s": time.process_time(),
            "monotonic_s": time.monotonic(),
        }
        body = json.dumps(report).encode()
        client.sock.setblocking(True)
        client.sock.sendall(
            b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\nconnection: close\r\n\r\n%b" % (len(body), body)
        )
        client.sock.setblocking(False)


def report(base_url: str) -> dict[str, Any]:
    """Ask a pacer what it saw. Blocks for the round trip."""
    host, port = base_url.split("/")[2].split(":")
    with socket.create_connection((host, int(port)), timeout=30) as sock:
        sock.sendall(b"GET /report HTTP/1.1\r\nhost: x\r\n\r\n")
        data = b""
        while b"\r\n\r\n" not in data:
            data += sock.recv(1 << 16)
        head, _, body = data.partition(b"\r\n\r\n")
        length = int(head.lower().split(b"content-length: ")[1].split(b"\r\n")[0])
        while len(body) < length:
            body += sock.recv(1 << 20)
    found: dict[str, Any] = json.loads(body)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rate", type=float, required=True, help="events per second and stream")
    rate = parser.parse_args().rate
    measure.raise_descriptor_limit()
    pacer = Pacer(rate)
    host, port = pacer.listener.getsockname()
    print(json.dumps({"base_url": f"http://{host}:{port}/v1", "pid": os.getpid()}), flush=True)
    pacer.run()


if __name__ == "__main__":
    main()
