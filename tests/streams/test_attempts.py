"""What an attempt does to what was received before it: in the live fold, in what is shown, and in clocks."""

from __future__ import annotations

import json
from typing import Any

import pytest
import trio

from supervisor import Deadlines, Delta, MemoryStore, State, open_supervisor
from supervisor.dialects.native import encode
from supervisor.streams.attempts import AttemptRecord, decode_attempt
from supervisor.streams.output import Output


def put(out: Output, text: str) -> None:
    payload, deltas = encode(Delta(text=text))
    out.append(payload, "", deltas)
    out.flush()


class HeldStore(MemoryStore):
    """A store in which events are durable as far as they are let go."""

    def __init__(self) -> None:
        super().__init__()
        self._upto = 0
        self._moved = trio.Event()

    def let_go(self, upto: int = 1 << 30) -> None:
        self._upto = upto
        self._moved.set()
        self._moved = trio.Event()

    def durable_seq(self, stream_id: str) -> int:
        return min(super().durable_seq(stream_id), self._upto)

    async def wait_durable(self, stream_id: str, seq: int) -> None:
        while seq > self._upto:
            await self._moved.wait()
        await super().wait_durable(stream_id, seq)


@pytest.mark.parametrize(
    ("rung", "dropped", "expected", "joined_at"),
    [("restart", 0, "new", ()), ("continuation", 1, "oldnew", (3,)), ("sequence", 0, "old new", ())],
)
async def test_what_a_durable_snapshot_shows_while_it_streams(
    autojump_clock: Any, rung: Any, dropped: int, expected: str, joined_at: tuple[int, ...]
) -> None:
    """It follows what is durable through withdrawals and joins as the live fold went through them."""
    store, go_on = HeldStore(), trio.Event()

    async def source(out: Output) -> None:
        out.attempt(1)
        put(out, "old ")
        out.attempt(2, rung=rung, dropped=dropped)
        put(out, "new")
        await go_on.wait()
        out.finish()

    async with open_supervisor(store=store) as sup:
        stream = sup.start_nowait(source, delivery="durable").stream
        await trio.sleep(1)
        assert stream.snapshot().text == ""
        store.let_go()
        await trio.sleep(1)
        assert stream.state is State.STREAMING
        assert (stream.snapshot().text, stream.snapshot().joined_at) == (expected, joined_at)
        go_on.set()
        await stream.wait()
        assert (await stream.read_snapshot()).text == expected


@pytest.mark.parametrize(
    ("rung", "expected", "joined_at", "epoch"),
    [("continuation", "oldnew", (3,), 1), ("restart", "new", (), 3)],
)
async def test_a_durable_snapshot_waits_for_the_event_that_changes_it(
    autojump_clock: Any, rung: Any, expected: str, joined_at: tuple[int, ...], epoch: int
) -> None:
    """A join or a withdrawal is shown, and a new epoch is, once the first event after it is durable: not with the attempt."""
    store, steps = HeldStore(), [trio.Event() for _ in range(3)]

    async def source(out: Output) -> None:
        out.attempt(1)
        put(out, "old ")
        await steps[0].wait()
        out.attempt(2, rung=rung, dropped=1 if rung == "continuation" else 0)
        await steps[1].wait()
        put(out, "new")
        await steps[2].wait()
        out.finish()

    async with open_supervisor(store=store) as sup:
        stream = sup.start_nowait(source, delivery="durable").stream
        await trio.sleep(1)
        store.let_go(2)
        for step in steps[:2]:  # the readers' task waits for the attempt's record when the event comes
            step.set()
            await trio.sleep(1)
        for upto, told in ((3, ("old ", (), 1)), (99, (expected, joined_at, epoch))):
            store.let_go(upto)
            await trio.sleep(1)
            shown = stream.snapshot()
            assert (shown.text, shown.joined_at, shown.epoch) == told
        steps[2].set()
        await stream.wait()


async def test_a_join_that_came_to_nothing_is_not_made_later(autojump_clock: Any) -> None:
    """An attempt that is no continuation does not take over that of one before it, which got no event."""

    async def source(out: Output) -> None:
        out.attempt(1)
        put(out, "old ")
        out.attempt(2, rung="continuation", dropped=1)
        out.attempt(3, rung="restart")
        put(out, "one ")
        out.attempt(4, rung="sequence")
        put(out, "two")
        out.finish()

    async with open_supervisor() as sup:
        stream = await sup.start(source)
        outcome = await stream.wait()
        assert (stream.snapshot().text, outcome.joined_at) == ("one two", ())


async def test_a_withdrawal_waits_for_the_first_event(autojump_clock: Any) -> None:
    """Until then the old text stands, also where an unreadable event is the first of the new attempt."""
    texts: list[str] = []

    async def source(out: Output) -> None:
        out.attempt(1)
        put(out, "old")
        for number, first in ((2, "read"), (3, "skipped")):
            out.attempt(number, rung="restart")
            texts.append(out.answer.text)
            if first == "skipped":
                out.skip(b"?", "no JSON")
                texts.append(out.answer.text)
            put(out, f"new {number}")
        out.finish()

    async with open_supervisor() as sup:
        stream = await sup.start(source)
        outcome = await stream.wait()
        with stream.subscribe() as events:
            told = [event async for event in events]
    assert texts == ["old", "new 2", ""]
    assert stream.snapshot().text == "new 3"
    withdrawn = [json.loads(event.payload) for event in told if event.kind == "withdrawn"]
    assert withdrawn == [{"attempt": 2, "first": 1, "last": 3}, {"attempt": 3, "first": 4, "last": 6}]
    assert [event.epoch for event in told if event.kind == "data"] == [1, 3, 5]
    assert outcome.epoch_starts == ((1, 1), (3, 4), (5, 7))
    assert outcome.rungs == ("restart", "restart")


async def test_nothing_is_withdrawn_where_there_is_nothing(autojump_clock: Any) -> None:
    """A fallback before the first event begins no epoch."""

    async def source(out: Output) -> None:
        out.attempt(1)
        out.attempt(2, rung="fallback")
        put(out, "text")
        out.finish()

    async with open_supervisor() as sup:
        stream = await sup.start(source)
        outcome = await stream.wait()
    assert (outcome.epoch, stream.snapshot().text) == (1, "text")


async def test_an_answer_that_seemed_ended_and_is_asked_for_again(autojump_clock: Any) -> None:
    """The mark of the attempt before it is no excuse for a clock that runs out on the next one."""

    async def source(out: Output) -> None:
        out.attempt(1)
        put(out, "all")
        out.mark("stop")
        out.attempt(2, rung="restart")
        put(out, "half")
        await trio.sleep_forever()

    async with open_supervisor() as sup:
        stream = await sup.start(source, deadlines=Deadlines(idle_s=5))
        outcome = await stream.wait()
    assert (outcome.state, outcome.reason) == (State.EXPIRED, "idle")


def test_a_record_may_say_more_than_is_read() -> None:
    """Details are the source's own; what decides how the journal is read has a shape."""
    payload = b'{"upstream": "x", "attempt": 2, "rung": "continuation", "dropped": 3, "kept": {"chars": 1}}'
    assert decode_attempt(payload) == AttemptRecord(2, "continuation", 3)
