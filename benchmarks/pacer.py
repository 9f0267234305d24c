"""A lean upstream: one epoll loop that holds thousands of streams at a steady pace, or floods a few, and records when each closed.

The simulated upstream of `supervisor.testing` spends a task or two and ~100 µs on an event, so at 1000 streams of 50 events/s
it would be what is measured. This one sends prebuilt bytes, a few µs an event, and notices a close between any two slices
of sends. It speaks just enough HTTP to be a streaming provider: POST anything, get an endless event stream, or GET
`/report`. Of the request's JSON, `user` names the stream in the report, and `flood` (a number of events) has that many sent
as fast as they are taken, followed by the end of the answer (an HTTP chunk for each, or with `bulk` for 256 at a time; with `size`
each has so many bytes of text), `stall` (likewise) makes it fall silent after so many, and with `stamp` the text of each paced
event is the time at which it is sent, in seconds since the Unix epoch. No faults, no other routes.

A paced event has an HTTP chunk and a send of its own, at its own time: the streams' phases are drawn at random (the same in
every run), as those of independent providers would be, and a `timerfd` wakes the loop to the microsecond where an
`epoll_wait` would wait for whole milliseconds and then send everything that has come due at once. `--coarse` has it do
that.

`--tls` serves the same over TLS, with a certificate made for the occasion (trustme); the line printed has its authority.

`python benchmarks/pacer.py --rate 50` prints one JSON line with `base_url`, and stops when its standard input closes.
"""

from __future__ import annotations

import argparse
import ctypes
import functools
import heapq
import json
import os
import random
import select
import socket
import ssl
import sys
import time
import urllib.parse
from typing import Any

import measure

_SLICE = 16
"""Sends between two looks at who has closed."""
_EVENTS_A_WRITE = 256
_HEAD = (
    b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ncache-control: no-cache\r\n"
    b"transfer-encoding: chunked\r\n\r\n"
)
_NOT_NOW = (BlockingIOError, ssl.SSLWantReadError, ssl.SSLWantWriteError)


def _chunk(data: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(data), data)


def _event(delta: dict[str, str], finish_reason: str | None = None) -> bytes:
    choice = {"index": 0, "delta": delta, "finish_reason": finish_reason}
    chunk = {
        "id": "chatcmpl-pacer",
        "object": "chat.completion.chunk",
        "created": 1_700_000_000,
        "model": "pacer",
        "choices": [choice],
    }
    return b"data: " + json.dumps(chunk, separators=(",", ":")).encode() + b"\n\n"


@functools.cache
def _events(size: int) -> list[bytes]:
    return [_event({"content": f"w{number} ".ljust(size, ".")}) for number in range(_EVENTS_A_WRITE)]


@functools.cache
def _pieces(size: int, *, bulk: bool) -> bytes:
    """Return what one write of a flood has."""
    events = _events(size)
    return _chunk(b"".join(events)) if bulk else b"".join(map(_chunk, events))


class _Timer:
    """A file descriptor that is readable at a time: Linux's timerfd, which Python has since 3.13 only."""

    class _Spec(ctypes.Structure):
        _fields_ = [(name, ctypes.c_long) for name in ("every_s", "every_ns", "s", "ns")]

    def __init__(self) -> None:
        self.libc = ctypes.CDLL(None, use_errno=True)
        self.fd = self.libc.timerfd_create(time.CLOCK_MONOTONIC, os.O_NONBLOCK | os.O_CLOEXEC)
        if self.fd < 0:
            raise OSError(ctypes.get_errno(), "timerfd_create")
        self.spec = self._Spec(0, 0, 0, 0)
        self.pointer = ctypes.byref(self.spec)

    def at(self, when: float) -> None:
        """Become readable at a time of `time.monotonic()`, which is what this clock is on Linux."""
        self.spec.s, self.spec.ns = int(when), max(1, int(when % 1 * 1e9))
        self.libc.timerfd_settime(self.fd, 1, self.pointer, None)  # 1: an absolute time


class _Client:
    __slots__ = (
        "at",
        "bulk",
        "due",
        "flood",
        "key",
        "received",
        "rest",
        "shaking",
        "size",
        "sock",
        "stall",
        "stamp",
    )

    def __init__(self, sock: socket.socket, *, shaking: bool) -> None:
        self.sock = sock
        self.shaking = shaking
        self.received = bytearray()
        self.key = ""
        self.due = 0.0
        self.at = 0
        self.flood = -1
        """Events that are still to be sent in a flood; -1 in a paced stream."""
        self.bulk = False
        self.size = 0
        self.stamp = False
        self.stall = 0
        """After how many events a paced stream falls silent; 0 for never."""
        self.rest: bytes | memoryview = b""


class Pacer:
    """Serves until standard input closes."""

    def __init__(self, rate: float, *, context: ssl.SSLContext | None = None, coarse: bool = False) -> None:
        self.interval = 1 / rate
        self.context = context
        self.coarse = coarse
        self.blocks = [_chunk(event) for event in _events(0)]
        before, _, after = _chunk(_event({"content": f"{0:17.6f} "})).partition(b"%17.6f" % 0)
        self.stamped = before + b"%17.6f" + after
        self.end = _chunk(_event({}, "stop") + b"data: [DONE]\n\n") + b"0\r\n\r\n"
        self.listener = socket.create_server(("127.0.0.1", 0), backlog=4096)
        self.listener.setblocking(False)
        self.poll = select.epoll()
        self.clients: dict[int, _Client] = {}
        self.heap: list[tuple[float, int, int]] = []
        self.order = 0
        self.closed: dict[str, float] = {}
        self.sent = self.late = self.behind = self.streaming = 0
        self.worst_s = 0.0
        self.phases = random.Random(1)

    def run(self) -> None:
        listener, stdin = self.listener.fileno(), sys.stdin.fileno()
        self.poll.register(listener, select.EPOLLIN)
        self.poll.register(stdin, select.EPOLLIN)
        timer = None
        if not self.coarse and sys.platform == "linux":
            timer = _Timer()
            self.poll.register(timer.fd, select.EPOLLIN | select.EPOLLET)
        while True:
            wait = -1.0
            if self.heap:
                now, due = time.monotonic(), self.heap[0][0]
                wait = max(0.0, due - now)
                if timer is not None and wait:
                    timer.at(due)
                    wait = -1.0
            for fd, what in self.poll.poll(wait):
                if fd == listener:
                    self._accept()
                elif fd == stdin:
                    if not os.read(stdin, 4096):
                        return
                elif timer is None or fd != timer.fd:
                    if what & ~select.EPOLLOUT:
                        self._readable(fd)
                    if what & select.EPOLLOUT:
                        self._writable(fd)
            self._send_due()

    def _accept(self) -> None:
        for _ in range(64):
            try:
                sock, _address = self.listener.accept()
            except OSError:
                return
            sock.setblocking(False)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            if self.context is not None:
                sock = self.context.wrap_socket(sock, server_side=True, do_handshake_on_connect=False)
            self.clients[sock.fileno()] = _Client(sock, shaking=self.context is not None)
            self.poll.register(sock.fileno(), select.EPOLLIN)

    def _readable(self, fd: int) -> None:
        client = self.clients.get(fd)
        if client is None:
            return
        try:
            if client.shaking:
                client.sock.do_handshake()
                client.shaking = False
            data = client.sock.recv(65536)
        except _NOT_NOW:
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
        request = json.loads(rest)
        client.key = request.get("user") or "?"
        said = request["messages"][-1]["content"] if request.get("messages") else ""
        if said.startswith("user "):
            client.key, _, asked = said[5:].partition("?")
            request |= dict(urllib.parse.parse_qsl(asked))
        self.streaming += 1
        client.rest = _HEAD
        client.flood = int(request.get("flood", -1))
        client.bulk = bool(request.get("bulk", False))
        client.size = int(request.get("size", 0))
        client.stamp = bool(request.get("stamp", False))
        client.stall = int(request.get("stall", 0))
        if client.flood >= 0:
            self.poll.modify(fd, select.EPOLLIN | select.EPOLLOUT)
            return
        # The first event at once, and the rest from a phase of its own on.
        self._send(fd, client, time.monotonic() - self.interval * self.phases.random())

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
                self.worst_s = max(self.worst_s, now - due)
                self._send(fd, client, due)

    def _send(self, fd: int, client: _Client, due: float) -> None:
        """Send one event, and arrange for the next."""
        if client.stamp:
            data = client.rest + self.stamped % time.time()
        else:
            data = client.rest + self.blocks[client.at % len(self.blocks)]
        client.at += 1
        try:
            done = client.sock.send(data)
            client.rest = data[done:]
            self.sent += 1
        except _NOT_NOW:
            self.late += 1  # the client's buffers are full: this event is not sent
        except OSError:
            self._gone(fd, client)
            return
        if client.at == client.stall:
            return
        next_due = max(due + self.interval, time.monotonic() - 1)
        self.order += 1
        client.due = self.order
        heapq.heappush(self.heap, (next_due, self.order, fd))

    def _writable(self, fd: int) -> None:
        """Send more of a flood."""
        client = self.clients.get(fd)
        if client is None:
            return
        try:
            if not client.rest:
                count = min(client.flood, _EVENTS_A_WRITE)
                client.flood -= count
                self.sent += count
                if count == _EVENTS_A_WRITE:
                    client.rest = memoryview(_pieces(client.size, bulk=client.bulk))
                else:
                    client.rest = b"".join(map(_chunk, _events(client.size)[:count])) + self.end
                    client.flood = -1
            client.rest = client.rest[client.sock.send(client.rest) :]
        except _NOT_NOW:
            return
        except OSError:
            self._gone(fd, client)
            return
        if client.flood < 0 and not client.rest:  # the answer is complete: the connection may carry another
            self.streaming -= 1
            client.key = ""
            self.poll.modify(fd, select.EPOLLIN)

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
            "worst_s": self.worst_s,
            "cpu_s": time.process_time(),
            "monotonic_s": time.monotonic(),
        }
        self.worst_s = 0.0  # since the last report
        body = json.dumps(report).encode()
        client.sock.setblocking(True)
        client.sock.sendall(
            b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\nconnection: close\r\n\r\n%b" % (len(body), body)
        )
        client.sock.setblocking(False)


def trusting(ca_pem: str | None) -> ssl.SSLContext | None:
    """Return a client's context for a pacer's certificate; None for a pacer without TLS."""
    if ca_pem is None:
        return None
    context = ssl.create_default_context(cadata=ca_pem)
    context.set_alpn_protocols(["http/1.1"])
    return context


def report(base_url: str, ca_pem: str | None = None) -> dict[str, Any]:
    """Ask a pacer what it saw. Blocks for the round trip."""
    host, port = base_url.split("/")[2].split(":")
    context = trusting(ca_pem)
    with socket.create_connection((host, int(port)), timeout=30) as plain:
        sock = plain if context is None else context.wrap_socket(plain, server_hostname=host)
        sock.sendall(b"GET /report HTTP/1.1\r\nhost: x\r\n\r\n")
        data = b""
        while b"\r\n\r\n" not in data:
            data += sock.recv(1 << 16)
        head, _, body = data.partition(b"\r\n\r\n")
        length = int(head.lower().split(b"content-length: ")[1].split(b"\r\n")[0])
        while len(body) < length:
            body += sock.recv(1 << 20)
        sock.close()
    found: dict[str, Any] = json.loads(body)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rate", type=float, required=True, help="events per second and stream")
    parser.add_argument("--tls", action="store_true", help="serve over TLS; needs trustme")
    parser.add_argument(
        "--coarse", action="store_true", help="wake in whole milliseconds, as epoll_wait does"
    )
    options = parser.parse_args()
    measure.raise_descriptor_limit()
    context, ca_pem = None, None
    if options.tls:
        import trustme

        authority = trustme.CA()
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        authority.issue_cert("127.0.0.1").configure_cert(context)
        ca_pem = authority.cert_pem.bytes().decode()
    pacer = Pacer(options.rate, context=context, coarse=options.coarse)
    host, port = pacer.listener.getsockname()
    scheme = "https" if options.tls else "http"
    line = {"base_url": f"{scheme}://{host}:{port}/v1", "pid": os.getpid(), "ca_pem": ca_pem}
    print(json.dumps(line), flush=True)
    pacer.run()


if __name__ == "__main__":
    main()
