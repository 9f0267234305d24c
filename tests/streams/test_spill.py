"""An answer of any length takes a bounded amount of memory: what is over it is in the store alone, and nothing else changes."""

from __future__ import annotations

import tracemalloc
from collections.abc import Sequence

import msgspec
import pytest
import trio
from hypothesis import given
from hypothesis import strategies as st

from supervisor import Limits, MemoryStore, Output, SupervisorError, open_supervisor
from supervisor.dialects import Delta, Fold, Usage
from supervisor.dialects.base import ToolCallDelta
from supervisor.stores.base import Event
from supervisor.streams.bill import TokenBudget

from .gated import GatedStore

PIECES = [letter * (64 << 10) for letter in "abcdefg"]


class ThriftyStore(MemoryStore):
    """Keeps one copy of payloads that are alike, so that a long answer of few pieces takes no memory here."""

    def __init__(self) -> None:
        super().__init__(max_bytes=1 << 40)
        self._copies: dict[bytes, bytes] = {}

    def append(self, stream_id: str, events: Sequence[Event]) -> None:
        super().append(
            stream_id,
            [
                msgspec.structs.replace(
                    event, payload=self._copies.setdefault(event.payload, event.payload), text=""
                )
                for event in events
            ],
        )


async def test_a_hundred_megabytes_take_a_few():
    """While it streams, the whole process grows by less than the stream's limits allow; the snapshot is all of it."""
    count = (100 << 20) // len(PIECES[0])
    most = 0

    async def long(out: Output) -> None:
        nonlocal most
        for number in range(count):
            await out.send(PIECES[number % 7])
            most = max(most, out.stream.bytes_held)

    limits = Limits(fold_bytes=1 << 20, tail_bytes=256 << 10)
    async with open_supervisor(store=ThriftyStore(), limits=limits) as sup:
        tracemalloc.start()
        try:
            stream = await sup.start(long)
            outcome = await stream.wait()
            peak = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
        assert outcome.state == "completed"
        assert most <= limits.fold_bytes + limits.tail_bytes + 200_000
        assert peak < 8 << 20  # what is held, copies of it while it is joined, and a few pieces under way
        with pytest.raises(SupervisorError, match="read_snapshot"):
            stream.snapshot()
        text = (await stream.read_snapshot()).text
        assert len(text) == count * len(PIECES[0])
        assert all(text.startswith(PIECES[n % 7], n * len(PIECES[0])) for n in range(count))


@pytest.mark.parametrize("delivery", ["immediate", "durable"])
async def test_a_snapshot_of_what_is_in_the_store_and_of_what_is_not_yet(delivery, autojump_clock):
    """Of a live stream it has what readers may see, up to the last event, whichever of the two holds it; then it goes on."""
    store = GatedStore()
    written, more = trio.Event(), trio.Event()

    async def source(out: Output) -> None:
        for number in range(40):
            await out.send(f"{number} ")
        await trio.testing.wait_all_tasks_blocked()
        store.hold()
        for number in range(40, 60):
            await out.send(f"{number} ")
        written.set()
        await more.wait()
        await out.send("end")

    async with open_supervisor(store=store, limits=Limits(fold_bytes=540, tail_events=4)) as sup:
        stream = await sup.start(source, delivery=delivery)
        await written.wait()
        snapshot = await stream.read_snapshot()
        whole = "".join(f"{number} " for number in range(60))
        assert snapshot.seq == (40 if delivery == "durable" else 60)
        assert snapshot.text == "".join(f"{number} " for number in range(snapshot.seq))
        with pytest.raises(SupervisorError, match="no longer in memory"):
            stream.subscribe("snapshot")
        store.release()
        more.set()
        await stream.wait()
        assert (await stream.read_snapshot()).text == whole + "end"


# --- the fold ---------------------------------------------------------------------------------------------------------

texts = st.text(max_size=9)
deltas = st.builds(
    Delta,
    text=texts,
    reasoning=texts,
    choice=st.sampled_from([0, 0, 1]),
    finish_reason=st.sampled_from([None, None, "stop"]),
    usage=st.sampled_from([None, Usage(1, 2), Usage(output=30)]),
    tool_calls=st.lists(st.builds(ToolCallDelta, index=st.integers(0, 2), arguments=texts), max_size=2).map(
        tuple
    ),
)


def test_a_join_may_drop_what_was_let_go_of():
    """White space that is not kept at a join is counted off, also where it is no longer in memory."""
    whole, spilling = Fold(), Fold()
    for fold in (whole, spilling):
        fold.apply(Delta(text="ab  "))
    spilling.spill()
    for fold in (whole, spilling):
        fold.go_on(dropped=2)
        fold.apply(Delta(text="cd"))
        fold.go_on()
    assert whole.snapshot().joined_at == spilling.snapshot().joined_at == (2, 4)


def test_a_budget_counts_on_when_a_call_is_let_go_of():
    """What a fold is accounted as beside its text is no credit for text that comes later."""
    fold = Fold()
    fold.apply(Delta(tool_calls=(ToolCallDelta(index=0, id="x" * 300, arguments="{}"),)))
    budget = TokenBudget(10, fold)
    fold.spill()
    fold.apply(Delta(text="y" * 40))
    assert budget.left(fold) == 0


@given(
    st.lists(st.one_of(deltas, st.just("spill"), st.just("go on"), st.just("reset")), max_size=30), st.data()
)
def test_a_fold_that_spills_knows_all_but_the_text(steps, data):
    """Lengths, places of joins, finish reasons, usage and budgets are as if nothing had been let go of."""
    whole, spilling = Fold(), Fold()
    budgets: list[tuple[TokenBudget, TokenBudget]] = []
    for step in steps:
        if step == "spill":
            spilling.spill()
            assert spilling.nbytes <= 512 * 2
        elif step == "go on":
            text = whole.snapshot().text
            dropped = data.draw(st.integers(0, len(text) - len(text.rstrip())))
            whole.go_on(dropped=dropped)
            spilling.go_on(dropped=dropped)
        elif step == "reset":
            whole.reset()
            spilling.reset()
            budgets.clear()
        else:
            whole.apply(step)
            spilling.apply(step)
        if data.draw(st.integers(0, 5)) == 0:
            limit = data.draw(st.integers(0, 20))
            budgets.append((TokenBudget(limit, whole), TokenBudget(limit, spilling)))
        one, other = whole.snapshot(), spilling.snapshot()
        assert spilling.grown_bytes >= spilling.output_bytes
        assert whole.usage == spilling.usage
        assert one.joined_at == other.joined_at
        assert [(c.index, c.finish_reason) for c in one.choices] == [
            (c.index, c.finish_reason) for c in other.choices
        ]
        assert one.text.endswith(other.text)
        if not any(step == "go on" for step in steps):  # what is dropped at a join is counted in characters
            assert whole.output_bytes == spilling.output_bytes
            for here, there in budgets:
                assert (here.left(whole) == 0) == (there.left(spilling) == 0)
    if not spilling.spilled:
        assert whole.snapshot() == spilling.snapshot()
