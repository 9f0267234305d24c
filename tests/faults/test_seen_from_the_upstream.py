"""The whole path over real sockets, judged from the upstream's side: what it saw of a stream that was stopped."""

from __future__ import annotations

import gc
import os
import sys
import threading
from collections.abc import Awaitable, Callable

import pytest
import trio

from supervisor import (
    Deadlines,
    Limits,
    MemoryPolicy,
    MemoryStore,
    State,
    Stream,
    Supervisor,
    open_supervisor,
)
from supervisor.testing.upstream import Script, SimulatedUpstream, unreachable_url
from supervisor.upstream import StreamTransport
from supervisor.upstream.catalog import Upstream
from supervisor.upstream.retry import RetryPolicy

PHASES: dict[str, tuple[Script, int]] = {
    "silent before the head": (Script(fault="silent"), 0),
    "silent after the head": (Script(first_after_s=600.0), 0),
    "paced": (Script(tokens=None, interval_s=0.001), 5),
    "flooding": (Script(tokens=None, events_per_write=64), 5000),
    "stalled": (Script(fault="stall", after=3), 3),
    "trickling": (Script(tokens=None, trickle_bytes=1, trickle_interval_s=0.001), 0),
    "ended as far as seen": (Script(tokens=2, fault="hang-after-finish"), 2),
}
"""Where an upstream may be when its stream is stopped, and after how many events it is there."""


async def cancel_it(sup: Supervisor, stream: Stream, scope: trio.CancelScope) -> None:
    await stream.cancel()


async def replace_it(sup: Supervisor, stream: Stream, scope: trio.CancelScope) -> None:
    async def nothing(out) -> None:
        pass

    await sup.start(nothing, key="k", on_conflict="replace")


async def reap_it(sup: Supervisor, stream: Stream, scope: trio.CancelScope) -> None:
    sup.memory.policy = MemoryPolicy(max_age_s=1e-9)
    await sup.reap()


async def shut_down(sup: Supervisor, stream: Stream, scope: trio.CancelScope) -> None:
    await sup.shutdown()


async def cancel_the_parent(sup: Supervisor, stream: Stream, scope: trio.CancelScope) -> None:
    scope.cancel()
    await stream.wait()


STOPS: list[Callable[[Supervisor, Stream, trio.CancelScope], Awaitable[None]]] = [
    cancel_it,
    replace_it,
    reap_it,
    shut_down,
    cancel_the_parent,
]


def upstream_at(base_url: str, retry: RetryPolicy | None = None) -> Upstream:
    return Upstream(name="sim", base_url=base_url, retry=retry or RetryPolicy(attempts=1))


def request(model: str = "sim") -> dict[str, object]:
    return {"model": model, "messages": [{"role": "user", "content": "hello"}]}


@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.parametrize("stop", STOPS, ids=lambda stop: stop.__name__)
async def test_a_stopped_stream_closes_its_socket(phase: str, stop):
    """Whatever stops it and wherever the upstream is: the upstream sees the close, and no connection is left."""
    script, events = PHASES[phase]
    transport = StreamTransport()
    with trio.fail_after(30):
        async with SimulatedUpstream(default=script) as up:
            with trio.CancelScope() as scope:
                async with open_supervisor(deadlines=Deadlines(connect_s=None)) as sup:
                    source = upstream_at(up.base_url).source(request(), transport=transport)
                    stream = await sup.start(source, key="k")
                    await up.wait_requests(1)
                    (connection,) = up.open_connections
                    await connection.wait_events(events)
                    await stop(sup, stream, scope)
            await connection.wait_closed()
            assert connection.closed_by in {"eof", "reset"}
            assert up.open_connections == []
    assert transport.statistics().open == 0
    assert stream.outcome.state in {State.CANCELLED, State.EXPIRED}


@pytest.mark.parametrize("clock", ["first_event", "idle", "total"])
async def test_a_deadline_closes_the_socket(clock: str):
    """A clock that runs out reaches the wire as a cancel does."""
    script = Script(fault="silent") if clock == "first_event" else Script(fault="stall", after=2)
    deadlines = Deadlines(**{f"{clock}_s": 0.05})
    with trio.fail_after(30):
        async with SimulatedUpstream(default=script) as up, open_supervisor() as sup:
            source = upstream_at(up.base_url).source(request(), transport=StreamTransport())
            stream = await sup.start(source, deadlines=deadlines)
            outcome = await stream.wait()
            await up.wait_open(0)

    assert (outcome.state, outcome.reason) == (State.EXPIRED, clock)


async def test_a_stop_while_connecting_leaves_no_socket():
    """A connection that was never answered is given up in the same step."""
    before = open_files()
    with trio.fail_after(30), unreachable_url(mode="unanswered") as url:
        async with open_supervisor() as sup:
            stream = await sup.start(upstream_at(url).source(request(), transport=StreamTransport()))
            with stream.subscribe() as events:
                assert (await events.next_batch())[0].kind == "attempt"
            await trio.testing.wait_all_tasks_blocked(0.01)
            assert stream.state is State.CONNECTING
            assert (await stream.cancel()).outcome == "won"
    assert open_files() == before


async def test_a_stop_between_two_attempts_makes_no_further_one():
    """A stop while it waits to try again means that it does not."""
    script = Script(status=429, retry_after="30", tokens=1)
    transport = StreamTransport()
    with trio.fail_after(30):
        async with SimulatedUpstream(default=script) as up, open_supervisor() as sup:
            source = upstream_at(up.base_url, RetryPolicy(attempts=5)).source(request(), transport=transport)
            stream = await sup.start(source)
            await up.wait_requests(1)
            await trio.testing.wait_all_tasks_blocked(0.01)
            await stream.cancel()
            assert up.request_count == 1
            await transport.aclose()
    assert (stream.outcome.state, stream.outcome.attempts) == (State.CANCELLED, 1)


async def test_a_connection_that_ended_clean_is_used_again_and_an_aborted_one_is_not():
    """Reuse is for exchanges that were over on the wire, too."""
    transport = StreamTransport()
    with trio.fail_after(30):
        async with SimulatedUpstream() as up, open_supervisor() as sup:
            upstream = upstream_at(up.base_url)
            for _ in range(3):
                stream = await sup.start(upstream.source(request(), transport=transport))
                assert (await stream.wait()).state is State.COMPLETED
            assert up.accepted == 1
            up.enqueue(Script(fault="stall"))
            stream = await sup.start(upstream.source(request(), transport=transport))
            await up.wait_requests(4)
            await stream.cancel()
            await up.wait_open(0)
            stream = await sup.start(upstream.source(request(), transport=transport))
            assert (await stream.wait()).state is State.COMPLETED
            assert up.accepted == 2
        await transport.aclose()


@pytest.mark.slow
async def test_nothing_leaks_over_ten_thousand_starts_and_cancels():
    """Sockets, tasks, threads and memory are as they were: after 2,000 cycles and after 10,000."""
    script = Script(tokens=None, interval_s=1.0)
    batch = 100
    limits = Limits(max_finished=50)
    transport = StreamTransport()
    figures: list[tuple[int, int, int, int]] = []
    async with (
        SimulatedUpstream(default=script, max_records=50) as up,
        open_supervisor(limits=limits, store=MemoryStore(max_streams=50)) as sup,
    ):
        upstream = upstream_at(up.base_url)
        for cycle in range(10_000 // batch):
            streams = [await sup.start(upstream.source(request(), transport=transport)) for _ in range(batch)]
            if cycle % 2:  # half of them are stopped while they connect, half when they stream
                for stream in streams:
                    with stream.subscribe() as events:
                        while not any(event.kind == "data" for event in await events.next_batch()):
                            pass
            for stream in streams:
                await stream.cancel()
            del stream, streams
            if cycle in {19, 99}:
                await up.wait_open(0)
                await trio.testing.wait_all_tasks_blocked(0.05)
                gc.collect()
                figures.append(
                    (
                        open_files(),
                        trio.lowlevel.current_statistics().tasks_living,
                        threading.active_count(),
                        sys.getallocatedblocks(),
                    )
                )
        assert sup.statistics().ended == {"cancelled": {"requested": 10_000}}
        assert sup.statistics().memory.bytes_held == 0
        assert len(sup.watchdog) == 0

    early, late = figures
    assert all(after <= before for after, before in zip(late[:3], early[:3], strict=True)), (early, late)
    assert late[3] < early[3] * 1.02 + 1000, (
        f"memory blocks: {early[3]} after 2,000 cycles, {late[3]} after 10,000"
    )


def open_files() -> int:
    return len(os.listdir("/proc/self/fd"))  # noqa: PTH208  # a count, not paths
