"""The addresses of names: asked for once, kept for a moment, shared by those who ask at the same time."""

from __future__ import annotations

import socket

import attrs
import httpx
import pytest
import trio
import trio.testing

from supervisor.errors import ConnectError
from supervisor.upstream.names import MAX_NAMES, Names
from supervisor.upstream.transport import StreamTransport

from .scripted import serve


@attrs.define(eq=False)
class Resolver(trio.abc.HostnameResolver):
    """Answers every name with 127.0.0.1, when it is let."""

    asked: list[str] = attrs.field(factory=list)
    cancelled: int = 0
    go: trio.Event | None = None
    error: Exception | None = None

    async def getaddrinfo(self, host, port, family=0, type=0, proto=0, flags=0):  # noqa: A002  # trio's signature
        self.asked.append(host.decode())
        if self.go is not None:
            try:
                await self.go.wait()
            except trio.Cancelled:
                self.cancelled += 1
                raise
        if self.error is not None:
            raise self.error
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", ("127.0.0.1", port))]

    async def getnameinfo(self, *args):
        raise NotImplementedError


@pytest.fixture
async def resolver() -> Resolver:
    resolver = Resolver()
    trio.socket.set_custom_hostname_resolver(resolver)
    return resolver


FOUND = ((socket.AF_INET, socket.SOCK_STREAM, 6, ("127.0.0.1", 80)),)


async def test_an_answer_is_kept_for_its_time(mock_clock, resolver):
    """Asked again within `keep_s` the answer is there; afterwards the resolver is asked. Each port is another question."""
    names = Names(keep_s=5)
    assert await names.addresses("a.test", 80) == FOUND
    mock_clock.jump(4.9)
    assert await names.addresses("a.test", 80) == FOUND
    assert await names.addresses("a.test", 81) != FOUND
    assert resolver.asked == ["a.test"] * 2
    mock_clock.jump(0.2)
    assert await names.addresses("a.test", 80) == FOUND
    assert resolver.asked == ["a.test"] * 3
    mock_clock.jump(5)
    await names.addresses("b.test", 80)
    assert len(names) == 1  # what is over is dropped by whatever comes next


async def test_nothing_is_kept_if_not_wanted(resolver):
    """With 0 seconds each question is asked."""
    names = Names(keep_s=0)
    for _ in range(2):
        assert await names.addresses("a.test", 80) == FOUND
    assert resolver.asked == ["a.test"] * 2
    assert len(names) == 0


async def test_an_address_is_not_asked_for(resolver):
    """It is its own answer, and neither the resolver nor another task has anything to do with it."""
    names = Names(keep_s=5)
    before = trio.lowlevel.current_statistics().tasks_living
    assert (await names.addresses("127.0.0.1", 80))[0][3] == ("127.0.0.1", 80)
    assert (await names.addresses("::1", 80))[0][3][:2] == ("::1", 80)
    assert trio.lowlevel.current_statistics().tasks_living == before
    assert resolver.asked == []
    assert len(names) == 0


@pytest.mark.parametrize("cancelled", [0, 1, 2])
async def test_one_question_for_all_who_ask(resolver, cancelled):
    """The cancel of one, be it the one that asked first, is not noticed by the others."""
    resolver.go = trio.Event()
    names = Names(keep_s=5)
    scopes = [trio.CancelScope() for _ in range(3)]
    got = []

    async def ask(number):
        with scopes[number]:
            got.append((number, await names.addresses("a.test", 80)))

    async with trio.open_nursery() as nursery:
        for number in range(3):
            nursery.start_soon(ask, number)
        await trio.testing.wait_all_tasks_blocked()
        scopes[cancelled].cancel()
        await trio.testing.wait_all_tasks_blocked()
        resolver.go.set()
    assert sorted(got) == [(number, FOUND) for number in range(3) if number != cancelled]
    assert resolver.asked == ["a.test"]
    assert resolver.cancelled == 0


async def test_a_question_that_nobody_waits_for_ends(resolver):
    """With the last who asked; who asks next asks anew, and no task is left."""
    resolver.go = trio.Event()
    names = Names(keep_s=5)
    before = trio.lowlevel.current_statistics().tasks_living
    async with trio.open_nursery() as nursery:
        for _ in range(2):
            nursery.start_soon(names.addresses, "a.test", 80)
        await trio.testing.wait_all_tasks_blocked()
        nursery.cancel_scope.cancel()
    assert "0 asked for" in repr(names)
    await trio.testing.wait_all_tasks_blocked()
    assert resolver.cancelled == 1
    assert trio.lowlevel.current_statistics().tasks_living == before
    resolver.go.set()
    assert await names.addresses("a.test", 80) == FOUND
    assert resolver.asked == ["a.test"] * 2


@pytest.mark.parametrize("error", [socket.gaierror(-2, "Name or service not known"), LookupError("odd")])
async def test_a_name_that_is_not_found_is_not_kept(resolver, error):
    """All who wait for it are told, each by an exception of its own; the next asks anew."""
    resolver.go, resolver.error = trio.Event(), error
    names = Names(keep_s=5)
    told = []

    async def ask():
        with pytest.raises(OSError, match=r"not known|odd") as caught:
            await names.addresses("a.test", 80)
        told.append(caught.value)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(ask)
        nursery.start_soon(ask)
        await trio.testing.wait_all_tasks_blocked()
        resolver.go.set()
    assert told[0] is not told[1]
    assert [one.__cause__ for one in told] == [error] * 2
    assert resolver.asked == ["a.test"]
    resolver.error = None
    assert await names.addresses("a.test", 80) == FOUND


async def test_the_answers_kept_are_bounded(resolver):
    """The oldest answer goes when there would be one too many."""
    names = Names(keep_s=5)
    for number in range(MAX_NAMES + 1):
        await names.addresses(f"{number}.test", 80)
    assert len(names) == MAX_NAMES
    resolver.asked.clear()
    for number in (1, 0):
        await names.addresses(f"{number}.test", 80)
    assert resolver.asked == ["0.test"]


def test_another_run_has_other_answers():
    """A run's answers are not the next one's, whose clock is another."""
    names = Names(keep_s=5)

    async def main() -> None:
        resolver = Resolver()
        trio.socket.set_custom_hostname_resolver(resolver)
        assert await names.addresses("a.test", 80) == FOUND
        assert resolver.asked == ["a.test"]

    for _ in range(2):
        trio.run(main, clock=trio.testing.MockClock())


# --- in the transport ------------------------------------------------------------------------------------------------


async def ask(transport: StreamTransport, url: str, port: int) -> None:
    exchange = await transport.open(httpx.Request("POST", f"http://{url}:{port}/", content=b"{}"))
    exchange.abort()


async def answer(peer):
    await peer.request()
    await peer.answer()
    await peer.closed()


async def test_a_transport_asks_once(nursery, resolver):
    """A second connection to a name does not ask for it, and knows the name all the same."""
    server = await serve(nursery, answer)
    async with StreamTransport(trust_env=False) as transport:
        for _ in range(2):
            await ask(transport, "a.test", server.port)
    assert server.connections == 2
    assert resolver.asked == ["a.test"]


async def test_an_answer_that_leads_nowhere_is_dropped(nursery, resolver):
    """When none of a name's addresses can be connected to, the next connect asks for it anew."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    async with StreamTransport(trust_env=False) as transport:
        for _ in range(2):
            with pytest.raises(ConnectError, match=rf"a\.test:{port}: Connection refused$"):
                await ask(transport, "a.test", port)
        assert resolver.asked == ["a.test"] * 2


async def test_a_newer_answer_is_not_dropped_for_an_older_one(mock_clock, resolver):
    """Who fails with an answer that has been replaced meanwhile does not take the new one away."""
    names = Names(keep_s=5)
    old = await names.addresses("a.test", 80)
    mock_clock.jump(6)
    new = await names.addresses("a.test", 80)
    names.forget("a.test", 80, old)
    assert await names.addresses("a.test", 80) is new
    names.forget("a.test", 80, new)
    names.forget("a.test", 80, new)
    assert len(names) == 0
