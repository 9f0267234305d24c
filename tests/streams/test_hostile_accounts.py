"""What a program, a client or a store does to what is counted and held: it is told, or borne, and is nobody else's trouble."""

from __future__ import annotations

from typing import Any

import pytest
import trio

from supervisor import MemoryGroup, MemoryPolicy, Output, State, open_supervisor
from supervisor.streams import Holder
from supervisor.streams.pools import Pools


async def silent(out: Output) -> None:
    """Hold nothing."""
    await trio.sleep_forever()


def holding(nbytes: int) -> Any:
    return talking(1, nbytes)


def talking(events: int, nbytes: int) -> Any:
    async def source(out: Output) -> None:
        for _ in range(events):
            await out.send("x" * nbytes)
        await trio.sleep_forever()

    return source


async def test_labels_and_meta_are_the_streams_own():
    """What the caller does with its labels and meta after the start changes nothing, in whatever depth."""
    labels, meta = {"user": "a"}, {"tools": ["x"]}
    policy = MemoryPolicy(groups=(MemoryGroup(labels={"user": "*"}, max_count=5),))
    async with open_supervisor(memory=policy) as sup:
        one = await sup.start(silent, labels=labels, meta=meta)
        labels["user"] = "b"
        meta["tools"].append("y")
        two = await sup.start(silent, labels=labels, meta=meta)
        assert (one.labels, one.info().meta) == ({"user": "a"}, {"tools": ["x"]})
        assert (two.labels, two.info().meta) == ({"user": "b"}, {"tools": ["x", "y"]})
        await sup.cancel(all_streams=True)
        assert not sup.statistics().memory.groups


async def test_a_stream_leaves_the_pools_that_it_joined():
    """Labels that were changed where they are kept do not make the books wrong."""
    policy = MemoryPolicy(groups=(MemoryGroup(labels={"user": "*"}, max_count=5),))
    async with open_supervisor(memory=policy) as sup:
        stream: Any = await sup.start(silent, labels={"user": "a"}, tenant="t")
        stream.labels["user"] = "b"
        assert (await stream.cancel()).outcome == "won"
        memory = sup.statistics().memory
        assert not memory.groups
        assert not memory.tenants


async def test_a_seal_that_goes_wrong_ends_the_source_and_cuts_the_wire(monkeypatch, caplog):
    """An error in the books, and one of the source's own cutting, leave no source running."""
    ended = trio.Event()

    async def source(out: Output) -> None:
        out.on_abort(lambda: 1 // 0)
        try:
            await trio.sleep_forever()
        finally:
            ended.set()

    def wrong(*_: object) -> None:
        raise KeyError("books")

    async with open_supervisor() as sup:
        stream = await sup.start(source)
        await trio.testing.wait_all_tasks_blocked()
        with monkeypatch.context() as patch:
            patch.setattr(Pools, "leave", wrong)
            with pytest.raises(KeyError, match="books"):
                await stream.cancel()
        with trio.fail_after(5):
            await ended.wait()
            assert (await stream.wait()).state is State.CANCELLED
    assert "its wire could not be cut" in caplog.text


@pytest.mark.parametrize("action", ["spill", "reap_oldest"])
async def test_no_stream_ends_for_what_others_hold(autojump_clock, action):
    """What clients hold has streams spill, but ends none, and no sweep follows on another; what streams hold does end the oldest."""
    beside = 0
    policy = MemoryPolicy(max_bytes=100_000, at_max_bytes=action, process_high=None)
    async with open_supervisor(memory=policy) as sup:
        sup.memory.register("connections", Holder(held=lambda: beside))
        streams = [await sup.start(holding(10_000)) for _ in range(2)]
        await trio.sleep(1.5)
        beside, before = 500_000, sup.statistics().memory.sweeps
        await trio.sleep(10)
        memory = sup.statistics().memory
        assert memory.reaped == {}
        assert memory.spilled == (2 if action == "spill" else 0)
        assert memory.sweeps - before < 15
        assert all(stream.state is State.STREAMING for stream in streams)
        streams.append(await sup.start(holding(4_000)))  # does not make a sweep for each read either
        big = await sup.start(talking(60, 4_000))
        await trio.testing.wait_all_tasks_blocked()
        if action == "spill":
            assert sup.statistics().memory.reaped == {}
        else:
            message = (await streams[0].wait()).message
            held = int(message.removeprefix("max_bytes: ").split()[0])
            assert message.endswith("bytes are held by live streams; the limit is 100000")
            assert 100_000 < held < 400_000
        beside = 0
        await big.cancel()
        await sup.cancel(all_streams=True)
