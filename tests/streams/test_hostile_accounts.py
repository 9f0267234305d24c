"""What a program, a client or a store does to what is counted and held: it is told, or borne, and is nobody else's trouble."""

from __future__ import annotations

from typing import Any

import pytest
import trio

from supervisor import MemoryGroup, MemoryPolicy, Output, State, open_supervisor
from supervisor.streams.pools import Pools


async def silent(out: Output) -> None:
    """Hold nothing."""
    await trio.sleep_forever()


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
