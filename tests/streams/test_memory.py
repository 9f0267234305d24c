"""The memory manager's parts: the account, groups, spilling, what holds memory beside the streams, and the process's memory.

Who goes in which order is held against a model in `test_memory_model.py`.
"""

from __future__ import annotations

import tracemalloc
from pathlib import Path
from typing import Any

import pytest
import trio

from supervisor import (
    AdmissionError,
    ConfigurationError,
    Limits,
    MemoryGroup,
    MemoryPolicy,
    MemoryStore,
    Output,
    State,
    open_supervisor,
)
from supervisor.streams import Holder
from supervisor.streams.memory import SLICE
from supervisor.streams.process_memory import Pressure, memory_limit, resident_bytes
from supervisor.streams.tombstones import Tombstones
from supervisor.upstream.pool import IDLE_BYTES, IdlePool

from .gated import GatedStore


async def silent(out: Output) -> None:
    """Hold nothing."""
    await trio.sleep_forever()


def holding(nbytes: int) -> Any:
    async def source(out: Output) -> None:
        await out.send("x" * nbytes)
        await trio.sleep_forever()

    return source


# --- the account ------------------------------------------------------------------------------------------------------


async def test_what_is_counted_is_about_what_is_allocated():
    """For long events and for short ones, what is counted is between half and twice what Python allocates for it."""

    class Forgetful(MemoryStore):
        def _keep(self, stream_id: str, events: Any) -> Any:
            return super()._keep(stream_id, ())

    for text, count in (("word ", 900), ("x" * 2_000, 100)):
        ready = trio.Event()

        async def source(
            out: Output, text: str = text, count: int = count, ready: trio.Event = ready
        ) -> None:
            await ready.wait()
            for number in range(count):
                out.send_nowait(f"{number}{text}")
            await trio.sleep_forever()

        async with open_supervisor(store=Forgetful(), limits=Limits(tail_bytes=1 << 30)) as sup:
            streams = [await sup.start(source, delivery="immediate") for _ in range(5)]
            await trio.testing.wait_all_tasks_blocked()
            tracemalloc.start()
            ready.set()
            await trio.testing.wait_all_tasks_blocked()
            allocated = tracemalloc.get_traced_memory()[0]
            tracemalloc.stop()
            counted = sup.statistics().memory.bytes_held
            assert counted == sum(stream.info().bytes_held for stream in streams)
            assert allocated / 2 < counted < allocated * 2
            await sup.cancel(all_streams=True)


@pytest.mark.parametrize("delivery", ["immediate", "durable"])
async def test_every_byte_is_somebodys_from_the_start_to_the_end(delivery):
    """Live, ending and kept: the sums are those of the streams at every step, and come down to nothing."""
    async with open_supervisor(limits=Limits(max_finished=2)) as sup:
        streams = [await sup.start(holding(5_000), delivery=delivery, tenant=name) for name in "aab"]
        await trio.testing.wait_all_tasks_blocked()
        for left in (3, 2, 1, 0):
            memory = sup.statistics().memory
            held = [stream.bytes_held for stream in streams[3 - left :]]
            assert memory.bytes_held == sum(held)
            assert memory.ending_bytes == 0
            assert memory.beside["ended streams"] == sum(info.bytes_held for info in sup.list(live=False))
            assert {name: one.live for name, one in memory.tenants.items()} == {
                name: "aab"[3 - left :].count(name) for name in "ab" if name in "aab"[3 - left :]
            }
            if left:
                info = streams[3 - left].info()
                assert (info.tenant, info.pending_bytes) == ("aab"[3 - left], 0)
                assert info.bytes_held > info.tail_bytes > 10_000
                await streams[3 - left].cancel(wait_s=5)
        with streams[2].subscribe() as events:
            assert sup.statistics().memory.beside["ended streams"] == sup.statistics().finished_bytes
            assert [event.kind async for event in events] == ["data", "outcome"]


async def test_what_waits_to_be_shown_is_counted():
    """With `delivery="durable"` a stream holds what nobody may see yet, and what is shown beside what is received."""
    store = GatedStore()
    store.hold()
    async with open_supervisor(store=store) as sup:
        stream = await sup.start(holding(5_000), delivery="durable")
        await trio.testing.wait_all_tasks_blocked()
        info, fold = stream.info(), 512 + 5_000
        assert (info.pending_bytes, info.bytes_held) == (info.tail_bytes, info.tail_bytes + fold + 160)
        store.release()
        await trio.testing.wait_all_tasks_blocked()
        info = stream.info()
        assert (info.pending_bytes, info.bytes_held) == (0, info.tail_bytes + 2 * fold)
        assert sup.statistics().memory.bytes_held == info.bytes_held
        await stream.cancel()


# --- limits -----------------------------------------------------------------------------------------------------------


async def test_a_tenant_at_its_limit_is_told_to_come_back_and_the_others_are_not():
    """The refusal says what the limit is about; it is counted by the limit's name."""
    policy = MemoryPolicy(groups=(MemoryGroup(tenant="*", max_count=1), MemoryGroup(tenant="b", max_count=9)))
    async with open_supervisor(memory=policy, limits=Limits(retry_after_s=7)) as sup:
        await sup.start(silent, tenant="a")
        await sup.start(silent, tenant="b")
        await sup.start(silent)
        with pytest.raises(
            AdmissionError, match="1 live streams of the tenant 'a' and the limit is 1"
        ) as caught:
            await sup.start(silent, tenant="a")
        assert (caught.value.live, caught.value.limit, caught.value.retry_after_s) == (1, 1, 7)
        statistics = sup.statistics()
        assert statistics.memory.rejected == {"groups[0].max_count": 1}
        assert statistics.rejected == 1
        assert set(statistics.memory.groups) == {"the tenant 'a'", "the tenant 'b'"}
        await sup.cancel(all_streams=True)


async def test_of_a_label_set_the_least_watched_goes():
    """Each value of a label is by itself; of equals the oldest goes; a stream without the label is in no group."""
    group = MemoryGroup(labels={"plan": "free", "user": "*"}, max_count=2, at_max_count="reap_least_watched")
    async with open_supervisor(memory=MemoryPolicy(groups=(group,))) as sup:
        mine = {"plan": "free", "user": "me"}
        one, two = [await sup.start(silent, labels=mine) for _ in range(2)]
        others = [
            await sup.start(silent, labels=labels)
            for labels in ({"plan": "free", "user": "you"}, {"plan": "paid", "user": "me"}, {"plan": "free"})
        ]
        with one.subscribe():
            three = await sup.start(silent, labels=mine)
            outcome = await two.wait()
            assert outcome.reason == "reaped_count"
            assert outcome.message == (
                "groups[0].max_count: 2 live streams of plan 'free', user 'me', and one more is started; the limit is 2"
            )
            four = await sup.start(silent, labels=mine)
            assert (await three.wait()).reason == "reaped_count"
        await sup.start(silent, labels=mine)
        assert (await one.wait()).reason == "reaped_count"
        assert all(stream.state is State.CONNECTING for stream in [four, *others])
        await sup.cancel(all_streams=True)


async def test_a_group_over_its_bytes_gives_before_the_others_do():
    """Where a tenant is over its limit and all together are over theirs, the tenant's go first, and that is enough for both."""
    async with open_supervisor(memory=MemoryPolicy(sweep_every_s=1e6)) as sup:
        older = await sup.start(holding(2_000), tenant="a")
        streams = [await sup.start(holding(2_000), tenant="b") for _ in range(3)]
        await trio.testing.wait_all_tasks_blocked()
        one = older.bytes_held
        group = MemoryGroup(tenant="b", max_bytes=2 * one, at_max_bytes="reap_oldest")
        sup.memory.policy = MemoryPolicy(max_bytes=4 * one - 1, groups=(group,), sweep_every_s=1e6)
        outcome = await streams[0].wait()
        assert outcome.message == (
            f"groups[0].max_bytes: {3 * one} bytes are held by live streams of the tenant 'b'; the limit is {2 * one}"
        )
        await trio.testing.wait_all_tasks_blocked()
        assert [stream.state for stream in (older, *streams[1:])] == [State.STREAMING] * 3
        await sup.cancel(all_streams=True)


async def test_over_the_bytes_streams_spill_and_go_on():
    """What the store has is given up, by those who hold much, before anybody is ended; a dry run has said so."""
    async with open_supervisor(memory=MemoryPolicy(sweep_every_s=1e6)) as sup:
        streams = [await sup.start(holding(size)) for size in (1_000, 20_000, 30_000)]
        await trio.testing.wait_all_tasks_blocked()
        held = [stream.bytes_held for stream in streams]
        sup.memory.policy = MemoryPolicy(max_bytes=sum(held) - 100, sweep_every_s=1e6)
        would = await sup.reap(dry_run=True)
        assert ([entry.id for entry in would.spilled], would.reaped) == ([streams[1].id], ())
        assert would.spilled[0].message == (
            f"max_bytes: {sum(held)} bytes are held by live streams; the limit is {sum(held) - 100}"
        )
        await trio.testing.wait_all_tasks_blocked()
        assert [stream.bytes_held for stream in streams] == [held[0], 512, held[2]]
        assert sup.statistics().memory.spilled == 1
        assert (await streams[1].read_snapshot()).text == "x" * 20_000
        assert streams[1].state is State.STREAMING
        await sup.cancel(all_streams=True)


async def test_a_stream_spills_as_often_as_it_must():
    """One that goes on for long under a low limit is never ended for it, and its answer is whole."""

    async def long(out: Output) -> None:
        for number in range(60):
            await out.send(f"{number % 10}" * 9_000)
            await trio.testing.wait_all_tasks_blocked()

    async with open_supervisor(memory=MemoryPolicy(max_bytes=60_000)) as sup:
        stream = await sup.start(long)
        assert (await stream.wait()).state is State.COMPLETED
        assert sup.statistics().memory.spilled > 10
        assert (await stream.read_snapshot()).text == "".join(f"{n % 10}" * 9_000 for n in range(60))


async def test_what_is_only_kept_goes_before_what_is_live():
    """Ended streams, and what others can spare, are given up as far as that is needed, and no further."""
    spared: list[int] = []

    def spare(nbytes: int, most: int) -> int:
        if spared:
            return 0
        spared.append(nbytes)
        return 1

    async with open_supervisor(memory=MemoryPolicy(max_bytes=100_000)) as sup:
        sup.memory.register("a cache", Holder(held=lambda: 0 if spared else 30_000, spare=spare))
        ended = await sup.start(holding(8_000), key="k")
        await trio.testing.wait_all_tasks_blocked()
        await ended.cancel(wait_s=5)
        live = [await sup.start(holding(10_000)) for _ in range(2)]
        await trio.testing.wait_all_tasks_blocked()
        assert sup.statistics().memory.total_bytes < 100_000
        live.append(await sup.start(holding(10_000)))
        await trio.testing.wait_all_tasks_blocked()
        assert sup.statistics().finished_in_memory == 0
        assert sup.statistics().keys == 0
        assert len(spared) == 1
        assert all(stream.state is State.STREAMING for stream in live)
        assert sup.statistics().memory.spilled == 0
        await sup.cancel(all_streams=True)


async def test_a_sweep_that_finds_nothing_looks_at_nobody(autojump_clock):
    """With ten healthy streams or five hundred, under every rule there is."""
    looked = []
    for count in (10, 500):
        policy = MemoryPolicy(
            max_age_s=1e6,
            stale_s=1e6,
            max_count=600,
            max_bytes=1 << 30,
            groups=(MemoryGroup(tenant="*", max_bytes=1 << 30, at_max_bytes="reap_least_watched"),),
        )
        async with open_supervisor(memory=policy) as sup:
            for number in range(count):
                sup.start_nowait(holding(20_000), tenant=str(number % 7))
            await trio.testing.wait_all_tasks_blocked()
            before = sup.statistics().memory
            await trio.sleep(10.5)
            after = sup.statistics().memory
            looked.append((after.looked_at - before.looked_at, after.sweeps - before.sweeps))
            await sup.cancel(all_streams=True)
    assert looked == [(10, 10), (10, 10)]  # the oldest, whether it is too old


async def test_many_are_ended_in_slices(autojump_clock):
    """Between two turns of the loop no more than a slice is ended."""
    async with open_supervisor(limits=Limits(max_live=300)) as sup:
        for _ in range(200):
            sup.start_nowait(silent)
        await trio.sleep(0.5)
        most, live = 0, 200
        sup.memory.policy = MemoryPolicy(max_age_s=1e-9, sweep_every_s=1e6)
        while live:
            await trio.lowlevel.checkpoint()
            now = sup.statistics().live
            most, live = max(most, live - now), now
        assert SLICE <= most <= 2 * SLICE  # two, where this test is first in one turn and last in the next
        await trio.testing.wait_all_tasks_blocked()
        assert sup.statistics().memory.reaped == {"reaped_age": 200}


# --- the process ------------------------------------------------------------------------------------------------------


async def test_pressure_begins_high_and_ends_low(autojump_clock):
    """While it lasts starts are refused, first what can be spilled is, then a tenth goes with each sweep, the oldest first."""
    used = 500
    policy = MemoryPolicy(process_limit_bytes=1000, process_high=0.9, process_low=0.7)
    async with open_supervisor(memory=policy) as sup:
        sup.memory.process = lambda: used
        streams = [await sup.start(silent) for _ in range(20)]
        heavy = await sup.start(holding(50_000))
        await trio.sleep(5.5)
        assert not sup.statistics().memory.pressure
        used = 950
        await trio.sleep(1)
        assert (sup.statistics().memory.pressure, sup.statistics().live) == (True, 21)
        assert heavy.bytes_held == 512
        with pytest.raises(AdmissionError, match="950 bytes of process memory and the limit is 700"):
            await sup.start(silent)
        used = 800  # between the two marks: it goes on
        await trio.sleep(2)
        reaped = [await stream.wait() for stream in streams[:4]]
        assert {outcome.reason for outcome in reaped} == {"reaped_pressure"}
        assert reaped[0].message == (
            "process_high: 800 bytes of process memory; it began at 900 and ends below 700"
        )
        used = 699
        await trio.sleep(1)
        live = sup.statistics().live
        await trio.sleep(5)
        assert (sup.statistics().memory.pressure, sup.statistics().live) == (False, live)
        assert 21 - 2 * 3 <= live <= 21 - 2 * 2
        await (await sup.start(silent)).cancel()
        assert sup.statistics().memory.rejected == {"process_high": 1}
        await sup.cancel(all_streams=True)


def test_pressure_without_figures():
    """Where the process's memory is not known, or has no limit, there is none."""
    pressure = Pressure(high=0.9, low=0.8, limit=1000)
    pressure.update(950, 0.0)
    assert (pressure.on, pressure.excess_bytes) == (True, 151)
    pressure.update(None, 1.0)
    assert (pressure.on, pressure.excess_bytes) == (False, 0)
    for off in (Pressure(high=None, low=0.8, limit=1000), Pressure(high=0.9, low=0.8, limit=None)):
        off.update(1 << 40, 0.0)
        assert not off.on


@pytest.mark.parametrize(
    ("groups", "files", "limit"),
    [
        ("0::/a/b", {"a/b/memory.max": "5000", "a/memory.max": "3000"}, 3000),
        ("0::/a/b", {"a/b/memory.max": "max", "a/memory.max": "max"}, None),
        ("0::/", {"memory.max": "7000"}, 7000),
        ("5:cpu,memory:/x\n0::/", {"memory/x/memory.limit_in_bytes": "4000"}, 4000),
        ("5:memory:/x", {"memory/x/memory.limit_in_bytes": str((1 << 63) - 4096)}, None),
        ("5:memory:/gone", {"memory/memory.limit_in_bytes": "6000"}, 6000),
        ("nonsense", {}, None),
    ],
)
def test_what_the_control_group_allows(groups: str, files: dict[str, str], limit: int | None, tmp_path: Path):
    """The tightest limit of the group and those above it, of either version; without any, the machine's memory."""
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/self/cgroup").write_text(groups)
    for name, text in files.items():
        file = tmp_path / "sys/fs/cgroup" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(f"{text}\n")
    machine = memory_limit(tmp_path / "nowhere")
    assert machine is not None
    assert memory_limit(tmp_path) == (machine if limit is None else limit)
    assert 1 << 20 < (resident_bytes() or 0) < machine


# --- what holds memory beside the streams ------------------------------------------------------------------------------


async def test_what_is_overdue_goes_with_the_sweep(autojump_clock):
    """Ended streams and tombstones leave memory at their time, though nothing else happens; their bytes with them."""
    async with open_supervisor(limits=Limits(finished_s=10, tombstone_s=5)) as sup:
        stream = await sup.start(holding(5_000), key="k")
        await trio.testing.wait_all_tasks_blocked()
        await stream.cancel(wait_s=1)
        await sup.cancel(key="later")
        assert min(sup.statistics().memory.beside.values()) > 0
        await trio.sleep(6.5)
        assert (sup.statistics().tombstones, sup.statistics().finished_in_memory) == (0, 1)
        await trio.sleep(5)
        assert sup.statistics().finished_in_memory == sup.statistics().keys == 0
        assert sup.statistics().memory.total_bytes == 0


def test_tombstones_are_bounded():
    """The oldest makes room; one that is overdue is none; the same key again is one."""
    stones = Tombstones(max_count=2, keep_s=5)
    for number, key in enumerate(["a", "b", "b", "c"]):
        stones.bury(key, actor=None, reason="stop", now=float(number))
    assert len(stones) == 2
    assert stones.take("a", 4.0) is None
    assert stones.take("b", 7.0) is None
    assert stones.take("c", 7.0) is not None
    assert (len(stones), stones.bytes_held) == (0, 0)


def test_idle_connections_are_given_up():
    """The oldest first, as many as are needed; those that are overdue at any time."""

    class Idle:
        def __init__(self) -> None:
            self.origin, self.keep_s, self.closed = ("https", "host", 443), 10.0, False

        def close(self) -> None:
            self.closed = True

    pool = IdlePool(max_count=9, max_age_s=100.0)
    made: list[Any] = [Idle() for _ in range(5)]
    for at, connection in enumerate(made):
        pool.put(connection, now=float(at))
    assert pool.bytes_held == 5 * IDLE_BYTES
    assert pool.spare(IDLE_BYTES + 1, 64) == 2
    assert pool.expire(12.5, 64) == 1
    assert [connection.closed for connection in made] == [True, True, True, False, False]
    assert (pool.spare(1 << 62, 1), pool.spare(1 << 62, 64), pool.bytes_held) == (1, 1, 0)


# --- bad options ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "field"),
    [
        (lambda: MemoryGroup(max_count=1), "MemoryGroup.labels"),
        (lambda: MemoryGroup(tenant="a"), "MemoryGroup.max_count"),
        (lambda: MemoryGroup(tenant="a", max_count=0), "MemoryGroup.max_count"),
        (lambda: MemoryGroup(tenant="", max_count=1), "tenant"),
        (lambda: MemoryGroup(tenant="a", max_count=1, at_max_count="spill"), "MemoryGroup.at_max_count"),  # type: ignore[arg-type]  # the point
        (lambda: MemoryPolicy(process_high=1.5), "MemoryPolicy.process_high"),
        (lambda: MemoryPolicy(process_high=0.5, process_low=0.5), "MemoryPolicy.process_low"),
        (lambda: MemoryPolicy(groups=[MemoryGroup(tenant="a", max_count=1)]), "MemoryPolicy.groups"),  # type: ignore[arg-type]  # the point
        (lambda: MemoryPolicy(groups=(MemoryGroup(tenant="a", max_count=1),) * 17), "MemoryPolicy.groups"),
    ],
)
def test_a_bad_option_is_named(make: Any, field: str):
    """With the field, the value and what would be right."""
    with pytest.raises(ConfigurationError) as caught:
        make()
    assert caught.value.field == field
    assert "expected" in str(caught.value)
