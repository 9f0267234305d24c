"""When a process that belongs to its streams collects all its garbage, and when it does not."""

from __future__ import annotations

import gc
import sys
import weakref

import attrs
import pytest
import trio
import trio.testing

from supervisor import Limits, open_supervisor
from supervisor.garbage import IDLE_S, LEAST_S, STRAY_BLOCKS, tend


class Knot:
    """A cycle: only the collector can free it."""

    def __init__(self) -> None:
        self.itself = self


@attrs.define
class Collections:
    """Full collections."""

    made: int = 0

    def note(self, phase: str, info: dict[str, int]) -> None:
        self.made += phase == "start" and info["generation"] == 2


@pytest.fixture
def collections():
    """Count full collections, from one that has just been made on."""
    seen = Collections()
    gc.collect()
    gc.callbacks.append(seen.note)
    yield seen
    gc.callbacks.remove(seen.note)


@pytest.fixture
async def tended(nursery, collections):
    """A supervisor whose process's garbage is tended, for ten seconds so far."""
    async with open_supervisor(limits=Limits(max_finished=1)) as sup:
        nursery.start_soon(tend, sup)
        await trio.sleep(10.5)
        collections.made = 0
        yield sup
        await sup.shutdown()
        nursery.cancel_scope.cancel()


async def old_knot():
    """Tie a knot, let go of it when it has been set aside, and return what tells whether it is still there."""
    knot = Knot()
    await trio.sleep(2)
    return weakref.ref(knot)


async def silent(_out):
    """Say nothing, for ever."""
    await trio.sleep_forever()


async def test_nothing_is_looked_at_again_while_streams_are_live(autojump_clock, tended, collections):
    """However many objects come and stay, no full collection is made as long as streams account for them."""
    await tended.start(silent)
    kept = []
    for _ in range(100):
        kept += [[None] for _ in range(1500)]  # enough for a few young collections a second
        await trio.sleep(1)
    assert collections.made == 0
    assert gc.get_freeze_count() > len(kept)


async def test_all_is_looked_at_when_no_stream_is_live(autojump_clock, tended, collections):
    """Once there has been none for a while, and only if there was one since the last time."""
    await trio.sleep(3 * LEAST_S)
    assert collections.made == 0
    stream = await tended.start(silent)
    knot = await old_knot()
    await trio.sleep(LEAST_S)
    await stream.cancel()
    await trio.sleep(IDLE_S - 2)
    assert collections.made == 0
    await trio.sleep(4)
    assert (collections.made, knot()) == (1, None)
    await trio.sleep(3 * LEAST_S)
    assert collections.made == 1


async def test_memory_that_goes_astray_is_looked_for(autojump_clock, tended, collections, monkeypatch):
    """What nothing accounts for is collected once there is much of it, though streams are live; not more than once a minute."""
    await tended.start(silent)
    blocks, knots = sys.getallocatedblocks(), []
    monkeypatch.setattr(sys, "getallocatedblocks", lambda: blocks)
    await trio.sleep(2 * LEAST_S)
    assert collections.made == 0
    for more in (0.9, 0.2, 1.2):
        knots.append(await old_knot())
        blocks += int(more * max(STRAY_BLOCKS, 0.25 * blocks))
    await trio.sleep(2)
    assert (collections.made, knots[0]()) == (1, None)  # by the second, and the third came too soon
    await trio.sleep(LEAST_S)
    assert collections.made == 2


async def test_short_memory_is_looked_for(autojump_clock, tended, collections):
    """While the process's memory is short, all is looked at once a minute."""
    await tended.start(silent)
    tended.memory.process = lambda: 1 << 60
    await trio.sleep(2.5 * LEAST_S)
    assert collections.made == 2


async def test_the_collector_is_as_it_was_in_the_end(autojump_clock, nursery):
    """What has been set aside is looked at again, and full collections are made by themselves again."""
    before = gc.get_threshold(), gc.get_freeze_count()
    async with open_supervisor() as sup:
        nursery.start_soon(tend, sup)
        await trio.sleep(1.5)
        assert gc.get_freeze_count() > 10_000
        assert gc.get_threshold()[2] > 1_000_000
        nursery.cancel_scope.cancel()
        with trio.CancelScope(shield=True):
            await trio.testing.wait_all_tasks_blocked()
        assert (gc.get_threshold(), gc.get_freeze_count()) == before
