from __future__ import annotations

from typing import cast

import pytest
import trio
import trio.testing
import trio_websocket

from supervisor.control.frames import OP_PING, OP_TEXT, build_close, build_frame
from supervisor.control.link import GuardedStream, Link, LinkLimits, Outbox, _frame_end

from .harness import handshake

FRAME = build_frame(OP_TEXT, b"x" * 1000)


async def opened(limits: LinkLimits | None = None) -> tuple[GuardedStream, trio.abc.Stream]:
    """Return a server's guard with its handshake done, and the peer's end of the wire."""
    ours, theirs = trio.testing.lockstep_stream_pair()
    guard = GuardedStream(ours, client=False, limits=limits or LinkLimits())

    async def peer() -> None:
        await theirs.send_all(handshake(1))
        await theirs.receive_some()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(peer)
        assert (await guard.receive_some()).endswith(b"\r\n\r\n")
        await guard.send_all(b"HTTP/1.1 101 Switching Protocols\r\n\r\n")
    guard.opened()
    return guard, theirs


async def test_an_interrupted_send_ends_all_sending() -> None:
    """A frame cut by a cancel is never followed by another: the peer would read the rest of it as part of the first."""
    guard, theirs = await opened()
    with trio.CancelScope() as scope:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(guard.send_frames, FRAME)
            assert await theirs.receive_some(10) == FRAME[:10]
            scope.cancel()
    for send in (guard.send_frames, guard.send_all):
        with pytest.raises(trio.BrokenResourceError):
            await send(FRAME)
    with trio.move_on_after(0) as scope:
        await guard.shut(4000, "")  # writes no Close frame either
    rest = b""
    while data := await theirs.receive_some():
        rest += data
    assert rest == FRAME[10:]


async def test_a_cancel_while_waiting_for_the_turn_harms_nothing() -> None:
    """Only a send that has begun is spoilt by a cancel; one that waits for another to finish is merely not made."""
    guard, theirs = await opened()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(guard.send_frames, FRAME)
        await trio.testing.wait_all_tasks_blocked()
        with trio.CancelScope() as scope:
            scope.cancel()
            await guard.send_frames(b"never")
        received = b""
        nursery.start_soon(guard.send_frames, b"next")
        while len(received) < len(FRAME) + 4:
            received += await theirs.receive_some()
    assert received == FRAME + b"next"


async def test_a_send_without_progress_ends_the_connection(autojump_clock: trio.testing.MockClock) -> None:
    """A peer that takes nothing for `stall_s` is given up; one that takes a piece in each period is not."""
    guard, theirs = await opened(LinkLimits(stall_s=10, send_chunk_bytes=100))
    async with trio.open_nursery() as nursery:

        async def slow() -> None:
            received = 0
            while received < len(FRAME):
                await trio.sleep(9)
                received += len(await theirs.receive_some(100))

        nursery.start_soon(slow)
        await guard.send_frames(FRAME)
    assert trio.current_time() > 80
    before = trio.current_time()
    with pytest.raises(trio.BrokenResourceError):
        await guard.send_frames(FRAME)
    assert trio.current_time() - before == pytest.approx(10)
    assert guard.stalled
    assert guard.over.is_set()


def linked(guard: GuardedStream, limits: LinkLimits) -> Link:
    """Return a link that only sends."""
    return Link(cast("trio_websocket.WebSocketConnection", None), guard, limits, client=False)


async def test_what_the_writer_has_taken_is_not_lost_by_a_cancel() -> None:
    """A frame taken from the outbox in the instant of the cancel is sent all the same, ahead of the Close frame."""
    limits = LinkLimits(close_s=5)
    close = build_close(4000, "")
    for _ in range(20):  # whether the writer or `run` hears of it first is left to chance
        guard, theirs = await opened(limits)
        link = linked(guard, limits)
        received = bytearray()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(answer_close, theirs, received, close)
            async with trio.open_nursery() as inner:
                inner.start_soon(link.run)
                await trio.testing.wait_all_tasks_blocked()
                await link.send(b"last words")
                inner.cancel_scope.cancel()
            await link.close(4000, "")
        assert bytes(received) == build_frame(OP_TEXT, b"last words") + close


async def answer_close(theirs: trio.abc.Stream, received: bytearray, close: bytes) -> None:
    """Read everything, and answer the Close frame."""
    while data := await theirs.receive_some():
        received.extend(data)
        if received.endswith(close):
            await theirs.send_all(build_close(1000, "", mask=True))


async def test_a_cancel_just_before_a_send_harms_nothing() -> None:
    """A cancel that comes once the turn is taken, and before a byte is sent, leaves a connection that can still be used."""
    for _ in range(20):  # whether it comes before or after the turn is left to chance
        guard, theirs = await opened()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(guard.send_all, build_frame(0xA, b"never"))
            await trio.lowlevel.checkpoint()
            nursery.cancel_scope.cancel()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(guard.send_frames, FRAME)
            received = b""
            while len(received) < len(FRAME):
                received += await theirs.receive_some()
        assert received == FRAME


async def test_a_frame_under_way_is_finished_when_we_leave(autojump_clock: trio.testing.MockClock) -> None:
    """Cancelled in the middle of a frame, the link finishes it, sends what is queued and closes, all in `close_s`."""
    limits = LinkLimits(close_s=2)
    guard, theirs = await opened(limits)
    link = linked(guard, limits)
    received = bytearray()
    async with trio.open_nursery() as nursery:

        async def ours() -> None:
            with scope:
                await link.run()
            await link.close(4000, "")

        scope = trio.CancelScope()
        nursery.start_soon(ours)
        await link.send(b"x" * 1000)
        received += await theirs.receive_some(10)
        await link.send(b"queued")
        scope.cancel()
        await trio.sleep(1.5)
        while data := await theirs.receive_some():
            received += data
    assert bytes(received) == FRAME + build_frame(OP_TEXT, b"queued") + build_close(4000, "")


async def test_leaving_a_peer_that_takes_nothing_is_bounded(autojump_clock: trio.testing.MockClock) -> None:
    """What is under way and what is queued have `close_s` together; a peer that takes nothing costs no more."""
    limits = LinkLimits(close_s=2, stall_s=60)
    for taken in (10, 1004):
        guard, theirs = await opened(limits)
        link = linked(guard, limits)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(link.run)
            await link.send(b"x" * 1000)
            assert len(await theirs.receive_some(10)) == 10
            await link.send(b"queued")
            before = trio.current_time()
            nursery.cancel_scope.cancel()
            with trio.CancelScope(shield=True):
                await trio.sleep(1)
                if taken > 10:  # it takes the rest of the frame late, and then no more
                    await theirs.receive_some(taken)
        await link.close(4000, "")
        assert trio.current_time() - before == pytest.approx(2)


async def test_nothing_follows_a_close() -> None:
    """After our Close a Pong is dropped, a second Close too, and data is refused."""
    guard, theirs = await opened()
    received = bytearray()

    async def peer() -> None:
        while data := await theirs.receive_some():
            received.extend(data)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(peer)
        close = build_close(4000, "bye")
        await guard.send_close(close)
        await guard.send_all(build_frame(0xA, b""))
        await guard.send_all(build_close(1000, ""))
        with pytest.raises(trio.BrokenResourceError):
            await guard.send_frames(FRAME)
        await trio.testing.wait_all_tasks_blocked()
        nursery.cancel_scope.cancel()
    assert bytes(received) == close


async def test_closing_is_bounded(autojump_clock: trio.testing.MockClock) -> None:
    """A peer that neither reads our Close nor answers it holds us up for `close_s` and no longer."""
    for reads in (True, False):
        guard, theirs = await opened(LinkLimits(close_s=2))
        before = trio.current_time()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(guard.receive_some)
            if reads:
                nursery.start_soon(theirs.receive_some)
            await guard.shut(4000, "")
            assert trio.current_time() - before <= 2
            nursery.cancel_scope.cancel()


async def test_a_ping_after_our_close_is_not_passed_on() -> None:
    """Issue 184, on the wire: trio-websocket is not shown the Ping, and is shown the Close that follows."""
    guard, theirs = await opened()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(theirs.receive_some)
        await guard.send_close(build_close(4000, ""))
    close = build_close(1000, "", mask=True)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(theirs.send_all, build_frame(OP_PING, b"", mask=True) + close)
        assert await guard.receive_some() == close
    assert await guard.receive_some() == b""


async def test_the_outbox_is_bounded_and_fair() -> None:
    """`put` waits at the bound, a cancelled `put` queues nothing, and order is kept."""
    outbox = Outbox(10)
    await outbox.put(b"12345678")
    await outbox.put(b"long enough to go over")
    assert not outbox.has_room
    with trio.move_on_after(0):
        await outbox.put(b"cancelled")
    async with trio.open_nursery() as nursery:
        nursery.start_soon(outbox.put, b"later")
        await trio.testing.wait_all_tasks_blocked()
        assert outbox.nbytes == 30
        assert await outbox.take() == b"12345678long enough to go over"
    assert await outbox.take() == b"later"
    assert outbox.nbytes == 0


async def test_a_frame_is_made_when_there_is_room_for_it() -> None:
    """Of any number of frames that wait for room none exists yet, and each that is made fills the outbox for the others."""
    outbox = Outbox(10)
    await outbox.put(b"full enough")
    made = 0

    def make() -> bytes:
        nonlocal made
        made += 1
        return b"x" * 100

    async with trio.open_nursery() as nursery:
        for _ in range(5):
            nursery.start_soon(outbox.put_made, make)
        for wanted in range(6):
            await trio.testing.wait_all_tasks_blocked()
            assert made == wanted
            outbox.take_nowait()


async def test_answers_that_cannot_wait_have_a_bound_of_their_own() -> None:
    """Behind a full outbox an answer can still be queued, up to the same bound; a client that only asks is refused then."""
    outbox = Outbox(10)
    await outbox.put(b"events" * 100)
    outbox.put_nowait(b"answer 1")
    outbox.put_nowait(b"answer 2")
    with pytest.raises(trio.WouldBlock):
        outbox.put_nowait(b"answer 3")
    assert (await outbox.take()).endswith(b"answer 1answer 2")
    outbox.put_nowait(b"a long answer")
    assert outbox.has_room


@pytest.mark.parametrize("mask", [False, True])
def test_where_the_frame_ends_that_was_sent_in_part(mask: bool) -> None:
    """Of frames of every form of length, after any number of bytes, and if the first bytes are the rest of an earlier one."""
    frames = [build_frame(OP_TEXT, b"x" * size, mask=mask) for size in (0, 5, 125, 126, 65_535, 65_536)]
    for rest in (b"", b"the rest"):
        data, start = rest + b"".join(frames), len(rest)
        for frame in frames:
            for sent in (start + 1, start + len(frame) - 1, start + len(frame)):
                assert _frame_end(data, len(rest), sent) == start + len(frame)
            start += len(frame)
    assert _frame_end(data, 8, 3) == 8
