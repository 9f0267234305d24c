"""The shared reader on a platform with kqueue, as far as that can be shown where there is none.

The kqueue is pretended, after kqueue(2) and Python's `select`: what is watched, deleted and reported, in which order, and which errors there
are. Its file descriptor is an epoll's, so trio really waits for it. The tests are those of the other poller.
"""

from __future__ import annotations

import errno
import os
import select
import socket
from types import SimpleNamespace

import attrs
import httpx
import pytest
import trio

from supervisor.upstream import shared
from supervisor.upstream.shared import EpollPoller, KqueuePoller, SharedReader, platform_poller
from supervisor.upstream.transport import StreamTransport

from .scripted import serve
from .test_shared import (  # noqa: F401  # they are run again here, with the other poller
    pipes,
    settle,
    test_a_broken_connection,
    test_a_cancel_takes_the_socket_out,
    test_a_connection_that_is_closed_here,
    test_a_flood_does_not_keep_others_waiting,
    test_a_retired_reader_ends_with_its_last_socket,
    test_each_gets_its_own,
    test_enough_for_now,
)

READ, ADD, DELETE, EOF = -1, 0x1, 0x2, 0x8000


@attrs.frozen
class Kevent:
    ident: int
    filter: int = READ
    flags: int = ADD
    fflags: int = 0
    data: int = 0


class Kqueue:
    """A pretended kqueue that knows EVFILT_READ."""

    made = 0

    def __init__(self) -> None:
        type(self).made += 1
        self._epoll = select.epoll()
        self._order: list[int] = []
        """The sockets watched; what was reported goes to the end, as the kernel's queue has it."""

    def fileno(self) -> int:
        return self._epoll.fileno()

    def close(self) -> None:
        self._epoll.close()

    def control(self, changes: list[Kevent] | None, most: int, timeout: float | None = None) -> list[Kevent]:
        for change in changes or ():
            assert change.filter == READ
            if change.flags == DELETE:
                if change.ident not in self._order:
                    raise OSError(errno.ENOENT, os.strerror(errno.ENOENT))
                self._order.remove(change.ident)
                self._epoll.unregister(change.ident)
            else:
                assert change.flags == ADD
                if change.ident not in self._order:  # adding twice modifies, and is no error
                    self._epoll.register(change.ident, select.EPOLLIN | select.EPOLLRDHUP)
                    self._order.append(change.ident)
        if not most:
            return []
        assert timeout == 0
        found = dict(self._epoll.poll(0))
        reported = [fd for fd in self._order if fd in found][:most]
        self._order = [fd for fd in self._order if fd not in reported] + reported
        ended = select.EPOLLRDHUP | select.EPOLLHUP | select.EPOLLERR
        return [Kevent(fd, READ, EOF if found[fd] & ended else 0) for fd in reported]


PLATFORM = SimpleNamespace(
    kqueue=Kqueue, kevent=Kevent, KQ_FILTER_READ=READ, KQ_EV_ADD=ADD, KQ_EV_DELETE=DELETE
)


@pytest.fixture(autouse=True)
def kqueue(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have the reader, and it alone, find a kqueue and no epoll."""
    monkeypatch.setattr(Kqueue, "made", 0)
    monkeypatch.setattr(shared, "select", PLATFORM)


def test_each_platform_has_its_poller(monkeypatch):
    """That is an epoll where there is one, else a kqueue; where there is neither, each stream reads for itself."""
    poller = platform_poller()
    assert isinstance(poller, KqueuePoller)
    poller.close()
    assert shared.shared_reading_works()
    monkeypatch.setattr(shared, "select", select)
    poller = platform_poller()
    assert isinstance(poller, EpollPoller)
    poller.close()
    monkeypatch.setattr(shared, "select", SimpleNamespace())
    assert not shared.shared_reading_works()


async def test_a_transport_reads_by_kqueue(nursery):
    """A transport takes the shared reader where there is a kqueue and no epoll."""

    async def handler(peer):
        await peer.request()
        await peer.send(b"HTTP/1.1 200 OK\r\nContent-Length: 6\r\n\r\n")
        await opened.wait()
        await peer.send(b"abcdef")
        await peer.closed()

    opened = trio.Event()
    got = []
    server = await serve(nursery, handler)
    async with StreamTransport(trust_env=False) as transport:
        exchange = await transport.open(httpx.Request("POST", server.url, content=b"{}"))
        opened.set()
        assert not await exchange.pump(lambda body: got.append(body) or True)
        exchange.abort()
    assert b"".join(got) == b"abcdef"
    assert Kqueue.made == 1


async def test_more_are_ready_than_are_told_at_once(monkeypatch):
    """Each gets its turn: what had no place in one look comes in the next."""
    monkeypatch.setattr(KqueuePoller, "MOST_EVENTS", 2)
    reader = SharedReader(read_bytes=1)
    with pipes(5) as made:
        for pipe in made:
            pipe.far.send(b"xyz")
        async with trio.open_nursery() as nursery:
            for pipe in made:
                nursery.start_soon(reader.read, pipe)
            await settle()
            nursery.cancel_scope.cancel()
        assert [pipe.got for pipe in made] == [[b"x", b"y", b"z"]] * 5


def test_what_was_removed_is_not_told():
    """And removing it twice is the error that the kernel makes of it."""
    near, far = socket.socketpair()
    with near, far:
        poller = KqueuePoller()
        poller.add(near.fileno())
        far.send(b"x")
        assert poller.ready() == [near.fileno()] == poller.ready()
        poller.remove(near.fileno())
        assert poller.ready() == []
        with pytest.raises(FileNotFoundError):
            poller.remove(near.fileno())
        poller.close()
        with pytest.raises(ValueError, match="closed"):
            poller.ready()
