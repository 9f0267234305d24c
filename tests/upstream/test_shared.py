"""The one task that reads all sockets: what it hands on, to whom, and what leaves it when."""

from __future__ import annotations

import itertools
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import attrs
import pytest
import trio
import trio.testing

from supervisor.upstream.shared import FEW, SHARED_READ_BYTES, TURN_BYTES, EpollPoller, SharedReader


@attrs.define(eq=False)
class Pipe:
    """A body: one end of a socket pair, and what it does with what is read."""

    socket: socket.socket
    far: socket.socket
    take: Callable[[bytes], bool | None] | None = None
    got: list[bytes] = attrs.field(factory=list)

    def feed_read(self, raw: bytes) -> bool | None:
        self.got.append(raw)
        if self.take is not None:
            return self.take(raw)
        return None if raw else False


@contextmanager
def pipes(count: int) -> Iterator[list[Pipe]]:
    made = []
    for _ in range(count):
        near, far = socket.socketpair()
        near.setblocking(False)
        made.append(Pipe(near, far))
    try:
        yield made
    finally:
        for pipe in made:
            pipe.socket.close()
            pipe.far.close()


async def settle() -> None:
    """Let everything that can run, run: sockets included."""
    await trio.testing.wait_all_tasks_blocked(0.01)


async def test_each_gets_its_own() -> None:
    """What is sent to a socket is read once, by its body, and its end of file ends it."""
    reader = SharedReader(read_bytes=1 << 16)
    ended: list[int] = []

    async def read(number: int, pipe: Pipe) -> None:
        assert await reader.read(pipe) is False
        ended.append(number)

    with pipes(20) as made:
        async with trio.open_nursery() as nursery:
            for number, pipe in enumerate(made):
                nursery.start_soon(read, number, pipe)
            await settle()
            assert len(reader) == 20
            for round_ in range(3):
                for number, pipe in enumerate(made):
                    pipe.far.send(b"%d:%d" % (number, round_))
                await settle()
            for pipe in made:
                pipe.far.close()
        for number, pipe in enumerate(made):
            assert pipe.got == [b"%d:%d" % (number, round_) for round_ in range(3)] + [b""]
        assert sorted(ended) == list(range(20))
        assert len(reader) == 0


async def test_enough_for_now() -> None:
    """A body that wants a pause leaves, so that nothing more is read, and comes back for the rest."""
    reader = SharedReader(read_bytes=1 << 16)
    with pipes(1) as (pipe,):
        pipe.take = lambda raw: True
        pipe.far.send(b"one")
        assert await reader.read(pipe) is True
        pipe.far.send(b"two")
        await settle()
        assert pipe.got == [b"one"]
        assert await reader.read(pipe) is True
        assert pipe.got == [b"one", b"two"]


async def test_an_exception_is_its_own_streams() -> None:
    """It comes out of that stream's `read`; the others are read on."""
    reader = SharedReader(read_bytes=1 << 16)

    def fail(raw: bytes) -> bool | None:
        raise ZeroDivisionError(raw)

    with pipes(2) as (bad, good):
        bad.take = fail
        async with trio.open_nursery() as nursery:
            nursery.start_soon(reader.read, good)
            bad.far.send(b"x")
            with pytest.raises(ZeroDivisionError):
                await reader.read(bad)
            good.far.send(b"y")
            await settle()
            assert good.got == [b"y"]
            good.far.close()


async def test_a_broken_connection() -> None:
    """A reset is an OSError of the one whose connection it was."""
    reader = SharedReader(read_bytes=1 << 16)
    listener = socket.create_server(("127.0.0.1", 0))
    near = socket.create_connection(listener.getsockname())
    far, _ = listener.accept()
    near.setblocking(False)
    far.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
    with near, listener:
        far.close()
        with pytest.raises(ConnectionResetError):
            await reader.read(Pipe(near, far))
    assert len(reader) == 0


async def test_a_cancel_takes_the_socket_out() -> None:
    """In the same step: what comes afterwards is not handed on, and the number can be another's."""
    reader = SharedReader(read_bytes=1 << 16)
    with pipes(1) as (pipe,):
        with trio.CancelScope() as scope:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(reader.read, pipe)
                await settle()
                pipe.far.send(b"late")
                scope.cancel()
                assert len(reader) == 0
        assert pipe.got == []
        assert await trio.to_thread.run_sync(pipe.socket.recv, 9) == b"late"


@pytest.mark.parametrize("result", [None, True, False])
async def test_a_cancel_from_within_the_step(result: bool | None) -> None:
    """The step comes to its end. With a result that is the result; else the task is cancelled when it comes back."""
    reader = SharedReader(read_bytes=1 << 16)
    with pipes(1) as (pipe,), trio.CancelScope() as scope:

        def take(raw: bytes) -> bool | None:
            scope.cancel()
            return result

        pipe.take = take
        pipe.far.send(b"x")
        told = await reader.read(pipe)
        assert told is (True if result is None else result)
        pipe.far.send(b"y")
        await reader.read(pipe)
        pytest.fail("a cancelled task read on")
    assert scope.cancelled_caught
    assert pipe.got == [b"x"]
    assert len(reader) == 0


@pytest.mark.parametrize("inside", [True, False])
async def test_a_connection_that_is_closed_here(inside: bool) -> None:
    """By its own step or by somebody else: its task is told, and nothing more is read."""
    reader = SharedReader(read_bytes=1 << 16)
    with pipes(1) as (pipe,):

        def close(raw: bytes = b"") -> None:
            reader.forget(pipe.socket.fileno())
            pipe.socket.close()

        pipe.take = close
        async with trio.open_nursery() as nursery:

            async def read() -> None:
                with pytest.raises(trio.ClosedResourceError):
                    await reader.read(pipe)

            nursery.start_soon(read)
            await settle()
            if inside:
                pipe.far.send(b"x")
            else:
                close()
        with pytest.raises(trio.ClosedResourceError):
            await reader.read(pipe)
        assert len(reader) == 0


async def test_two_readers_of_one_socket() -> None:
    """A mistake of the caller, told to the second."""
    reader = SharedReader(read_bytes=1 << 16)
    with pipes(1) as (pipe,):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(reader.read, pipe)
            await settle()
            with pytest.raises(trio.BusyResourceError):
                await reader.read(pipe)
            nursery.cancel_scope.cancel()


async def test_a_flood_does_not_keep_others_waiting() -> None:
    """However much is ready, other tasks run after each turn's share, and no socket is read twice before another once."""
    reader = SharedReader(read_bytes=1 << 10)
    order: list[int] = []
    ran_after: list[int] = []

    with pipes(8) as made:
        for number, pipe in enumerate(made):
            pipe.take = lambda raw, number=number: order.append(number)  # type: ignore[misc]  # a lambda with a default
            pipe.far.setblocking(False)
            for _ in range(64):
                pipe.far.send(bytes(1 << 10))
        reads_per_turn = TURN_BYTES >> 10

        async def watch() -> None:
            while len(order) < 8 * 64:
                ran_after.append(len(order))
                await trio.lowlevel.checkpoint()
            nursery.cancel_scope.cancel()

        async with trio.open_nursery() as nursery:
            for pipe in made:
                nursery.start_soon(reader.read, pipe)
            nursery.start_soon(watch)
    steps = [after - before for before, after in itertools.pairwise(ran_after)]
    assert max(steps) <= reads_per_turn
    for start in range(0, len(order) - 8, 8):
        assert sorted(order[start : start + 8]) == list(range(8))


async def test_a_flood_is_read_in_small_pieces_where_others_wait() -> None:
    """What it brings in one read is bounded while more than a few sockets are ready, and is not where it is alone."""
    with pipes(FEW + 1) as made:
        flood, *others = made
        flood.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 20)
        flood.far.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 20)
        for ready in (others, []):
            flood.got.clear()
            flood.far.send(bytes(3 * SHARED_READ_BYTES))
            for pipe in ready:
                pipe.far.send(b"x")
            reader = SharedReader(read_bytes=64 << 10)
            async with trio.open_nursery() as nursery:
                for pipe in made:
                    nursery.start_soon(reader.read, pipe)
                await settle()
                nursery.cancel_scope.cancel()
            first = SHARED_READ_BYTES if ready else 3 * SHARED_READ_BYTES
            assert len(flood.got[0]) == first
            assert sum(map(len, flood.got)) == 3 * SHARED_READ_BYTES


async def test_a_turn_that_is_too_long_goes_on_where_it_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sockets that were ready and not reached come first in the next turn."""
    monkeypatch.setattr("supervisor.upstream.shared.TURN_BYTES", 3 << 10)
    reader = SharedReader(read_bytes=1 << 10)
    order: list[int] = []
    with pipes(8) as made:
        for number, pipe in enumerate(made):
            pipe.take = lambda raw, number=number: order.append(number)  # type: ignore[misc]  # a lambda with a default
            for _ in range(8):
                pipe.far.send(bytes(1 << 10))
        async with trio.open_nursery() as nursery:
            for pipe in made:
                nursery.start_soon(reader.read, pipe)
            await settle()
            nursery.cancel_scope.cancel()
    assert len(order) == 64
    for start in range(0, 64, 8):
        assert sorted(order[start : start + 8]) == list(range(8))


def test_a_reader_outlives_a_run_of_trio() -> None:
    """Another run of the loop has another task; nothing of the first one is left in it."""
    reader = SharedReader(read_bytes=1 << 16)

    async def main() -> None:
        with pipes(1) as (pipe,):
            pipe.far.send(b"x")
            pipe.far.close()
            assert await reader.read(pipe) is False
            assert pipe.got == [b"x", b""]

    trio.run(main)
    trio.run(main)


async def test_a_reader_that_fails_fails_its_streams_and_not_the_run() -> None:
    """The error is told to each stream that was being read; the next one has a new reader."""
    broken: list[Any] = []

    class Poller(EpollPoller):
        async def wait(self) -> None:
            await super().wait()
            if not broken:
                broken.append(self)
                raise OSError("bad poller")

    reader = SharedReader(read_bytes=1 << 16, poller=Poller)
    with pipes(2) as (one, two):
        errors = []

        async def read(pipe: Pipe) -> None:
            try:
                await reader.read(pipe)
            except OSError as error:
                errors.append(str(error))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(read, one)
            nursery.start_soon(read, two)
            await settle()
            one.far.send(b"x")
        assert errors == ["bad poller"] * 2
        two.far.send(b"y")
        two.far.close()
        assert await reader.read(two) is False


async def test_a_retired_reader_ends_with_its_last_socket() -> None:
    """What is under way is read to its end; then the task is gone."""
    reader = SharedReader(read_bytes=1 << 16)
    with pipes(1) as (pipe,):
        before = trio.lowlevel.current_statistics().tasks_living
        async with trio.open_nursery() as nursery:
            nursery.start_soon(reader.read, pipe)
            await settle()
            assert trio.lowlevel.current_statistics().tasks_living == before + 2
            reader.retire()
            pipe.far.send(b"rest")
            await settle()
            pipe.far.close()
        await settle()
        assert pipe.got == [b"rest", b""]
        assert trio.lowlevel.current_statistics().tasks_living == before


class Counting(EpollPoller):
    """An epoll that counts how often it is waited for, and what a wake-up finds."""

    found: list[int]

    def __init__(self) -> None:
        super().__init__()
        self.found = []

    def ready(self) -> Any:
        fds = super().ready()
        self.found.append(len(fds))
        return fds


async def flow(reader: SharedReader, made: list[Pipe]) -> None:
    """Send an event to one socket after the other, each in a turn of its own, and read them all."""
    async with trio.open_nursery() as nursery:
        for pipe in made:
            nursery.start_soon(reader.read, pipe)
        await trio.lowlevel.checkpoint()
        for pipe in made:
            pipe.far.send(b"x")
            for _ in range(3):
                await trio.lowlevel.checkpoint()
        while not all(pipe.got for pipe in made):  # noqa: ASYNC110  # the reader's turns are what is waited for
            await trio.lowlevel.checkpoint()
        nursery.cancel_scope.cancel()


async def test_under_load_a_wake_up_finds_several(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where time is real the reader wakes no more often than it says; everything is read all the same."""
    monkeypatch.setattr("supervisor.upstream.shared.MODERATION_S", 0.25)
    pollers: list[Counting] = []

    def poller() -> Counting:
        pollers.append(Counting())
        return pollers[-1]

    with pipes(30) as made:
        await flow(SharedReader(read_bytes=1 << 10, poller=poller), made)
        assert [pipe.got for pipe in made] == [[b"x"]] * 30
    assert max(pollers[0].found) > 10  # the second wake-up has all but the first few


async def test_a_virtual_clock_is_not_waited_for(mock_clock: trio.testing.MockClock) -> None:
    """Its time stands still until the test moves it: the reader would never wake."""
    with pipes(30) as made:
        await flow(SharedReader(read_bytes=1 << 10), made)
        assert [pipe.got for pipe in made] == [[b"x"]] * 30
    assert trio.current_time() == 0
