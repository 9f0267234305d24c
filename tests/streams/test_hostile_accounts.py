"""What a program, a client or a store does to what is counted and held: it is told, or borne, and is nobody else's trouble."""

from __future__ import annotations

from functools import partial
from typing import Any

import attrs
import pytest
import trio

from supervisor import (
    ConfigurationError,
    Limits,
    MemoryGroup,
    MemoryPolicy,
    Output,
    State,
    StoreError,
    open_supervisor,
)
from supervisor.dialects import Delta
from supervisor.dialects.native import NATIVE
from supervisor.stores import SQLiteStore
from supervisor.streams import Holder
from supervisor.streams.pools import Pools

from .gated import GatedStore


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


async def one_event(out: Output) -> None:
    await out.send("x")


@pytest.fixture
async def refusing(tmp_path):
    """A supervisor whose ids come again, over a store that has streams of these already."""
    path = tmp_path / "s.db"
    for last in (False, True):
        ids = (f"id{number}" for number in range(1000))
        limits = Limits(max_live=10, max_finished=1, settle_s=5)
        store = SQLiteStore(path, synchronous="OFF")
        async with open_supervisor(store=store, new_id=partial(next, ids), limits=limits) as sup:
            if last:
                yield sup
            else:
                for _ in range(4):
                    await (await sup.start(one_event)).wait()


async def test_a_stream_that_the_store_refuses_is_ended_and_let_go_of(refusing, caplog):
    """It ends with its next event and says why; nothing of it is kept as live or as waiting, and health tells."""
    sup = refusing
    told: list[Exception] = []
    go = trio.Event()

    async def stubborn(out: Output) -> None:
        await go.wait()
        while True:
            try:
                await out.send("y" * 1000)
            except Exception as error:  # noqa: BLE001  # as a program does that goes on whatever happens
                told.append(error)

    with trio.fail_after(20):
        stream = await sup.start(stubborn)
        with pytest.raises(StoreError, match="refuses its records"):
            await stream.recorded()
        go.set()
        with pytest.raises(StoreError, match="refuses its records"):
            await stream.wait()
        quick = await sup.start(one_event)  # has ended before the store has said so
        with pytest.raises(StoreError, match="refuses its records"):
            await quick.wait()
    figures = sup.statistics()
    assert (figures.live, figures.settling, figures.unrecorded) == (0, 0, 0)
    assert "refuses its records" in str(told[0])
    assert stream.info().tail_bytes < 3000
    assert sup.store.refusal(stream.id) is sup.store.refusal(quick.id) is None  # forgotten
    assert any(
        "2 streams could not be recorded" in problem and "id1" in problem for problem in sup.health().problems
    )


async def test_an_outcome_refused_late_is_not_waited_for(autojump_clock, caplog):
    """One that is overdue is told of by health, and, once the store refuses it, no longer waited for."""

    class Undecided(GatedStore):
        refused: StoreError | None = None

        def refusal(self, stream_id: str) -> StoreError | None:
            return self.refused

    store = Undecided()
    async with open_supervisor(store=store, limits=Limits(settle_s=1)) as sup:
        store.hold()
        stream = await sup.start(one_event)
        with pytest.raises(StoreError, match="not durable after 1 s"):
            await stream.wait()
        assert sup.statistics().unrecorded == 1
        assert "1 outcomes are not durable yet" in str(sup.health().problems)
        store.refused = StoreError("never")
        await trio.sleep(3)
        assert (sup.statistics().unrecorded, sup.statistics().settling) == (0, 0)
        with pytest.raises(StoreError, match="never"):
            await stream.wait()
        await trio.sleep(301)
        assert sup.health().problems == ()
        store.release()


@pytest.mark.parametrize("rung", ["restart", "continuation"])
@pytest.mark.parametrize("how", ["too big", "sealed", "unreadable"])
async def test_nothing_is_withdrawn_without_something_in_its_place(rung, how):
    """An event that is refused, where it would take the place of the answer so far, leaves the answer as it is."""

    async def source(out: Output) -> None:
        out.attempt(1)
        out.append(b'{"text":"abc"}', "", (Delta(text="abc"),))
        out.flush()
        out.attempt(2, rung=rung, dropped=2 if rung == "continuation" else 0)
        if how == "unreadable":
            out.skip(b"?" * 200, "not JSON")
            return
        if how == "sealed":
            out.stream.stop_for("requested", actor=None)
        out.append(b'{"text":"d"}' * (20 if how == "too big" else 1), "", (Delta(text="d"),))

    async with open_supervisor(limits=Limits(max_event_bytes=120)) as sup:
        stream = await sup.start(source)
        outcome = await stream.wait()
        with stream.subscribe() as events:
            kinds = [event.kind async for event in events]
        assert (await stream.read_snapshot()).text == "abc"
    assert outcome.epoch_starts == ((1, 1),)
    assert kinds == ["attempt", "data", "attempt", "outcome"]


@pytest.mark.parametrize("wrong", [lambda *_: 1 // 0, lambda *_: None, lambda *_: -1 << 60])
async def test_a_holder_that_is_wrong_is_borne_with(autojump_clock, caplog, wrong):
    """What a registered holder raises, or tells that is no amount, counts as nothing; the others count, and the streams go on."""
    policy = MemoryPolicy(max_bytes=50_000, sweep_every_s=0.1, process_high=None)
    async with open_supervisor(memory=policy) as sup:
        sup.memory.register("mine", Holder(held=wrong, expire=wrong, spare=wrong))
        sup.memory.register("sound", Holder(held=lambda: 60_000))
        stream = await sup.start(holding(100))
        await trio.sleep(5)
        memory = sup.statistics().memory
        assert (memory.beside["mine"], memory.beside["sound"]) == (0, 60_000)
        assert stream.state is State.STREAMING
        await stream.cancel()
    assert len(caplog.records) in (0, 3)  # once for each callback


async def test_requests_and_meta_are_counted():
    """What a source says it holds counts from the start until the stream has ended, its meta for as long as it is in memory."""

    class Asking:
        bytes_held = 30_000

        async def __call__(self, out: Output) -> None:
            await trio.sleep_forever()

    meta = {"m": [str(number) for number in range(1000)]}
    policy = MemoryPolicy(max_bytes=100_000, process_high=None, sweep_every_s=1000)
    async with open_supervisor(memory=policy) as sup:
        first = await sup.start(Asking(), meta=meta)
        held = first.bytes_held
        assert 80_000 < held < 110_000
        assert sup.statistics().memory.bytes_held == held
        await first.cancel()
        assert sup.statistics().finished_bytes == first.bytes_held == held - 30_000
        others = [await sup.start(Asking()) for _ in range(4)]
        with trio.fail_after(5):
            assert (await others[0].wait()).reason == "reaped_bytes"  # before any has received anything
        assert sup.statistics().memory.bytes_held == 90_000
        await sup.cancel(all_streams=True)


async def test_dialects_that_sources_bring_are_bounded(monkeypatch):
    """Of the dialects that starts bring the newest are remembered; a stream reads in its own all the same."""
    monkeypatch.setattr("supervisor.streams.supervisor.MAX_DIALECTS", 2)
    async with open_supervisor() as sup:
        streams = [
            await sup.start(silent, dialect=attrs.evolve(NATIVE, name=f"d{number}")) for number in range(4)
        ]
        assert sup.dialect("d3").name == "d3"
        assert sup.dialect("native") is NATIVE
        with pytest.raises(ConfigurationError):
            sup.dialect("d1")
        await sup.cancel(all_streams=True)
        assert (await streams[0].read_snapshot()).text == ""
