"""Many deadlines, one task: the lazy heap against a model, and the watchdog under virtual time."""

from __future__ import annotations

import math

import pytest
import trio
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from supervisor import Deadlines
from supervisor.streams.clocks import Clocks, LazyHeap, Watchdog


class HeapAgainstModel(RuleBasedStateMachine):
    """The heap promises each item's earliest armed time, and forgets what is discarded."""

    def __init__(self) -> None:
        super().__init__()
        self.heap: LazyHeap[int] = LazyHeap()
        self.model: dict[int, float] = {}

    @rule(item=st.integers(0, 200), due=st.integers(0, 50) | st.just(math.inf))
    def arm(self, item: int, due: float) -> None:
        earliest = min(self.model.values(), default=math.inf)
        changed = self.heap.arm(item, due)
        if due < self.model.get(item, math.inf):
            self.model[item] = due
        if due < earliest:
            assert changed, "an earlier earliest time has to be told"

    @rule(items=st.lists(st.integers(0, 200), max_size=100))
    def discard(self, items: list[int]) -> None:
        for item in items:
            self.heap.discard(item)
            self.model.pop(item, None)

    @rule(now=st.integers(0, 50))
    def pop(self, now: int) -> None:
        popped = list(self.heap.pop_due(now))
        times = [self.model.pop(item) for item in popped]

        assert times == sorted(times)
        assert all(time <= now for time in times)
        assert all(time > now for time in self.model.values())

    @invariant()
    def agrees(self) -> None:
        assert len(self.heap) == len(self.model)
        assert self.heap.next_due() == min(self.model.values(), default=math.inf)
        assert len(self.heap._heap) <= 2 * len(self.model) + 66, "discarded items are not kept"


TestHeapAgainstModel = HeapAgainstModel.TestCase


@given(st.data())
def test_next_due_is_the_earliest_clock_that_runs(data: st.DataObject):
    """Over every combination of phase and single deadlines, and only of those that run."""
    limit = st.none() | st.floats(0.1, 100)
    deadlines = Deadlines(
        connect_s=data.draw(limit),
        first_event_s=data.draw(limit),
        idle_s=data.draw(limit),
        total_s=data.draw(limit),
    )
    clocks = Clocks(deadlines, 1000.0)
    expected = {"total": 1000.0 + (deadlines.total_s or math.inf)}
    phase = data.draw(st.sampled_from([None, "connect", "first_event", "idle"]))
    clocks.begin(phase, 1001.0)
    clocks.touched = data.draw(st.floats(1001.0, 1100.0))
    if phase is not None:
        expected[phase] = clocks.touched + (getattr(deadlines, f"{phase}_s") or math.inf)
    for kind in ("drain", "detach", "cleanup"):
        if data.draw(st.booleans()):
            expected[kind] = data.draw(st.floats(1001.0, 1200.0))
            clocks.set(kind, expected[kind])

    due, kind = clocks.next_due()

    assert due == min(expected.values())
    assert expected[kind] == due
    clocks.stop()
    assert clocks.next_due()[0] == math.inf


async def test_the_watchdog_expires_at_the_real_deadline_not_the_promised_one(autojump_clock):
    """An event moves the deadline by writing a timestamp; the watchdog looks, finds it moved, and comes back later."""
    clocks = {"a": Clocks(Deadlines(idle_s=10, total_s=None), trio.current_time())}
    clocks["a"].begin("idle", trio.current_time())
    start = trio.current_time()
    expired: list[tuple[str, str, float]] = []

    def expire(item: str, kind: str) -> None:
        expired.append((item, kind, trio.current_time() - start))
        clocks[item].stop()

    dog = Watchdog(clocks.__getitem__, expire)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(dog.run)
        dog.arm("a")
        for _ in range(5):
            await trio.sleep(7)
            clocks["a"].touched = trio.current_time()
        await trio.sleep(100)
        nursery.cancel_scope.cancel()

    assert expired == [("a", "idle", pytest.approx(45))]


async def test_an_earlier_deadline_wakes_a_sleeping_watchdog(autojump_clock):
    """A phase with a shorter clock that begins while the watchdog sleeps is kept to the moment."""
    clocks = {"a": Clocks(Deadlines(total_s=1000), trio.current_time())}
    start = trio.current_time()
    expired: list[float] = []

    def expire(item: str, kind: str) -> None:
        expired.append(trio.current_time() - start)
        clocks[item].stop()

    dog = Watchdog(clocks.__getitem__, expire)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(dog.run)
        dog.arm("a")
        await trio.sleep(5)
        clocks["a"].set("drain", trio.current_time() + 1)
        dog.arm("a")
        await trio.sleep(3)
        nursery.cancel_scope.cancel()

    assert expired == [pytest.approx(6)]


async def test_many_deadlines_at_once_are_taken_in_slices(autojump_clock):
    """Between two slices other tasks run, so that a wave of expiries does not hold up everybody's events."""
    clocks = {n: Clocks(Deadlines(total_s=5), trio.current_time()) for n in range(1000)}
    expired: list[int] = []
    seen_between: set[int] = set()

    def expire(item: int, kind: str) -> None:
        expired.append(item)
        clocks[item].stop()

    dog = Watchdog(clocks.__getitem__, expire)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(dog.run)
        for item in clocks:
            dog.arm(item)
        await trio.sleep(5)
        while len(expired) < 1000:
            seen_between.add(len(expired))
            await trio.lowlevel.checkpoint()
        nursery.cancel_scope.cancel()

    assert len(seen_between) >= 7  # of 16: the dog may go last in one batch and first in the next
    assert len(dog) == 0
