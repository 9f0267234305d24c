"""An ended stream is freed with its last reference. Were it left to the garbage collector, ten thousand would be freed in one long stall."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator

import pytest
import trio
import trio.testing

from supervisor import Limits, open_supervisor
from supervisor.testing import SimulatedUpstream
from supervisor.upstream import StreamTransport
from supervisor.upstream.catalog import Upstream
from supervisor.upstream.retry import RetryPolicy

KINDS = {
    "Attempt",
    "BodyReader",
    "Connection",
    "Exchange",
    "HttpSource",
    "Journal",
    "Output",
    "Stream",
    "Subscription",
    "_Climb",
}
MODELS = (
    "ok",
    "drop?after=2",
    "no-marker",
    "500",
    "drop-head",
    "error",
    "bad-chunk",
    "stall?after=1",
    "silent",
)


@pytest.fixture
def left() -> Iterator[Callable[[], set[str]]]:
    """Have nothing collected but by the test; tell what is ours that nothing but the collector would have freed, of `KINDS`."""

    def found() -> set[str]:
        gc.set_debug(gc.DEBUG_SAVEALL)
        gc.collect()
        gc.set_debug(0)
        kinds = {type(one).__qualname__ for one in gc.garbage}
        gc.garbage.clear()
        gc.collect()  # they were saved, and are garbage again
        return kinds & KINDS

    gc.disable()
    yield found
    gc.enable()


async def complete(out) -> None:
    await out.send("all")


async def raise_(out) -> None:
    await out.send("some")
    raise ValueError


async def hang(out) -> None:
    await out.send("some")
    await trio.sleep_forever()


async def test_streams_of_a_programs_own_are_freed_with_their_last_reference(left):
    """However they ended, each with a reader."""
    async with open_supervisor(limits=Limits(max_finished=1)) as sup:
        left()  # of other tests
        for source in (complete, raise_, hang):
            for delivery in ("immediate", "durable"):
                stream = await sup.start(source, delivery=delivery)
                with stream.subscribe() as events:
                    assert await events.next_batch()
                await stream.cancel()
                await stream.wait()
        del stream, events
        await (await sup.start(complete)).wait()  # takes its place among the ended ones that are kept
        await trio.testing.wait_all_tasks_blocked()
        assert left() == set()


async def test_streams_of_an_upstream_are_freed_with_their_last_reference(left):
    """However their attempts ended, with their connections and what read them."""
    transport = StreamTransport(trust_env=False)
    with trio.fail_after(10):
        async with SimulatedUpstream() as up, open_supervisor(limits=Limits(max_finished=1)) as sup:
            left()  # of other tests
            retry = RetryPolicy(attempts=2, wait_initial_s=0.001, wait_max_s=0.001)
            upstream = Upstream(name="sim", base_url=up.base_url, retry=retry)
            for model in MODELS:
                request = {"model": f"sim/{model}", "messages": []}
                stream = await sup.start(upstream.source(request, transport=transport))
                if model in ("stall?after=1", "silent"):
                    await up.wait_requests(up.request_count + 1)
                    await up.open_connections[-1].wait_events(model != "silent")
                    await stream.cancel()
                await stream.wait()
            del stream
            await (await sup.start(complete)).wait()
            await transport.aclose()
            await trio.testing.wait_all_tasks_blocked()
            assert left() == set()
