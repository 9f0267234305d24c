"""Happy eyeballs: which address is tried when, what becomes of the others, and what is told if there is none."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from types import SimpleNamespace

import pytest
import trio
import trio.testing

from supervisor.upstream import dial as module
from supervisor.upstream.dial import MAX_ADDRESSES, STAGGER_S, dial, interleaved
from supervisor.upstream.names import Address

FOUR, SIX = socket.AF_INET, socket.AF_INET6


def at(port: int, host: str = "127.0.0.1") -> Address:
    return (FOUR, socket.SOCK_STREAM, 0, (host, port))


def named(*names: str) -> list[Address]:
    """Return addresses that are only to be told apart: `6a` is of IPv6."""
    return [(SIX if name[0] == "6" else FOUR, socket.SOCK_STREAM, 0, (name, 1)) for name in names]


@contextmanager
def listening() -> Iterator[int]:
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server.getsockname()[1]


@contextmanager
def silent() -> Iterator[int]:
    """A port that does not answer: its backlog is full."""
    with ExitStack() as stack:
        full = stack.enter_context(socket.socket())
        full.bind(("127.0.0.1", 0))
        full.listen(0)
        for _ in range(2):
            filler = stack.enter_context(socket.socket())
            filler.setblocking(False)
            filler.connect_ex(full.getsockname())
        yield full.getsockname()[1]


def free() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[socket.socket]:
    """Every socket that `dial` makes."""
    made: list[socket.socket] = []

    class Socket(socket.socket):
        def __init__(self, *args: int) -> None:
            super().__init__(*args)
            made.append(self)

    monkeypatch.setattr(module, "socket", SimpleNamespace(**{**vars(socket), "socket": Socket}))
    return made


async def settle() -> None:
    await trio.testing.wait_all_tasks_blocked(0.005)


@pytest.mark.parametrize(
    ("given", "order"),
    [
        (["6a", "6b", "6c", "4a", "4b"], ["6a", "4a", "6b", "4b", "6c"]),
        (["4a", "6a", "6b"], ["4a", "6a", "6b"]),
        (["4a", "4b"], ["4a", "4b"]),
        (["4a", "6a", "4a", "6b", "6a"], ["4a", "6a", "6b"]),
        ([], []),
    ],
)
def test_the_families_take_turns(given, order):
    """Beginning with the one the resolver prefers, each address once."""
    assert interleaved(named(*given)) == named(*order)


async def test_a_silent_address_is_not_waited_for(mock_clock, made):
    """The next is tried beside it when its time is over and not before; the slower socket is closed."""
    found = []

    async def connect():
        found.append(await dial([at(quiet), at(port)]))

    with silent() as quiet, listening() as port:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(connect)
            await settle()
            mock_clock.jump(STAGGER_S - 0.01)
            await settle()
            assert len(made) == 1
            mock_clock.jump(0.02)
        assert found[0].getpeername()[1] == port
        assert not found[0].getblocking()
        assert found[0].getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
        assert found == made[1:]
        assert made[0].fileno() == -1
        found[0].close()


async def test_a_slow_address_may_still_win(mock_clock, monkeypatch):
    """While the second is being tried the first goes on; whichever is connected first is taken."""
    near, far = socket.socketpair()
    late = trio.Event()
    gone = []

    async def connect(address):
        if address == at(1):
            await late.wait()
            return near
        try:
            await trio.sleep_forever()
        finally:
            gone.append(address)

    async def answer_late():
        await settle()
        mock_clock.jump(STAGGER_S)
        await settle()
        late.set()

    monkeypatch.setattr(module, "_connect", connect)
    with near, far:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(answer_late)
            assert await dial([at(1), at(2)]) is near
    assert gone == [at(2)]


async def test_a_refusal_is_not_waited_for(mock_clock, made):
    """The next address is tried at once, on a clock that stands still."""
    with listening() as port:
        with await dial([at(free()), at(free(), "127.0.0.2"), at(port)]) as sock:
            assert sock.getpeername()[1] == port
        assert [one.fileno() for one in made] == [-1] * 3


async def test_a_cancel_closes_all(mock_clock, made):
    """In the step in which it is delivered, however many are being tried."""
    with silent() as one, silent() as two:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(dial, [at(one), at(two)])
            await settle()
            mock_clock.jump(STAGGER_S)
            await settle()
            assert [sock.fileno() >= 0 for sock in made] == [True, True]
            nursery.cancel_scope.cancel()
        assert [sock.fileno() for sock in made] == [-1, -1]


async def test_a_cancel_in_the_moment_of_success(monkeypatch):
    """The connected socket is nobody's, so it is closed."""
    near, far = socket.socketpair()

    async def connect(_address):
        scope.cancel()
        return near

    monkeypatch.setattr(module, "_connect", connect)
    with far, trio.CancelScope() as scope:
        sock = await dial([at(1)])
        sock.close()  # or the caller has it, and meets the cancel at its next checkpoint
    assert near.fileno() == -1


async def test_two_at_once(mock_clock, monkeypatch):
    """Of two that are connected in the same turn one is taken, and the other closed."""
    pairs = [socket.socketpair() for _ in range(2)]
    both = trio.Event()

    async def connect(address):
        await both.wait()
        return pairs[address[3][1]][0]

    async def answer():
        await settle()
        mock_clock.jump(STAGGER_S)
        await settle()
        both.set()

    monkeypatch.setattr(module, "_connect", connect)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(answer)
        won = await dial([at(0), at(1)])
    assert sorted(near.fileno() >= 0 for near, _ in pairs) == [False, True]
    assert won.fileno() >= 0
    for near, far in pairs:
        near.close()
        far.close()


async def test_what_each_address_said_is_told(made):
    """Each reason once, with the addresses that gave it; the errors themselves in the cause."""
    nowhere = ("255.255.255.255", 1)
    with socket.socket() as probe:
        why = os.strerror(probe.connect_ex(nowhere))
    with pytest.raises(ConnectionError) as caught:
        await dial([at(free()), at(*reversed(nowhere)), at(free(), "127.0.0.2")])
    assert str(caught.value) == f"Connection refused (127.0.0.1, 127.0.0.2); {why} (255.255.255.255)"
    assert isinstance(caught.value.__cause__, ExceptionGroup)
    assert len(caught.value.__cause__.exceptions) == 3
    assert [sock.fileno() for sock in made] == [-1] * 3
    with pytest.raises(ConnectionRefusedError):
        await dial([at(free())])
    with pytest.raises(ConnectionError, match="no addresses"):
        await dial([])


async def test_a_family_that_is_not_there_is_one_more_failure(made):
    """An address of which no socket can be made does not keep the others from being tried."""
    with listening() as port, await dial([(12345, socket.SOCK_STREAM, 0, ("x", 1)), at(port)]) as sock:
        assert sock.getpeername()[1] == port


async def test_the_number_of_addresses_is_bounded(mock_clock, monkeypatch):
    """Of a name with very many addresses only some are tried, so that no name costs any number of sockets."""
    tried = []

    async def connect(address):
        tried.append(address)
        raise ConnectionRefusedError

    monkeypatch.setattr(module, "_connect", connect)
    with pytest.raises(ConnectionError):
        await dial([at(port) for port in range(100)])
    assert tried == [at(port) for port in range(MAX_ADDRESSES)]
