"""Start/cancel churn: streams started, given their first event, and cancelled, per second.

A fixed number of workers each start a stream, wait for its first event, cancel it, and wait until it is over, again and
again. Two figures: the CPU time of the client per cycle, and cycles per second of wall time. The upstream is the lean one
(`pacer.py`) in a process of its own; where it or the kernel is the bottleneck, the CPU per cycle is the one to compare.

- `ours`: the whole supervisor: start, subscribe, first batch, cancel, outcome durable in the MemoryStore and announced.
- `ours, no journal`: the project's transport alone: open, first bytes, abort.
- `httpx`: stock httpx on trio, one shared AsyncClient; first chunk of `aiter_raw`, then its cancel scope is cancelled.
- `httpx, asyncio`: the same on asyncio; `task.cancel()`.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import consume
import measure
import pacer
import trio

SCRIPT = __file__
CONTENDERS = ("httpx", "httpx, asyncio", "ours, no journal", "ours")
ROUNDS = 5

Cycle = Callable[[int], Awaitable[None]]


async def ours(base_url: str, run) -> None:
    from supervisor import open_supervisor
    from supervisor.upstream.catalog import Upstream
    from supervisor.upstream.transport import StreamTransport

    transport = StreamTransport(trust_env=False)
    upstream = Upstream(name="pacer", base_url=base_url)
    async with open_supervisor() as sup:

        async def cycle(number: int) -> None:
            source = upstream.source(consume.body("pacer", number), transport=transport)
            stream = await sup.start(source)
            with stream.subscribe() as events:
                seen = False
                while not seen:
                    seen = any(event.kind == "data" for event in await events.next_batch())
            result = await stream.cancel()
            assert result.outcome == "won", result

        await run(cycle)


async def ours_without_journal(base_url: str, run) -> None:
    import httpx

    from supervisor.upstream.transport import StreamTransport

    transport = StreamTransport(trust_env=False)

    async def cycle(number: int) -> None:
        request = httpx.Request("POST", f"{base_url}/chat/completions", content=consume.body("pacer", number))
        exchange = await transport.open(request)
        try:
            await exchange.receive()
        finally:
            exchange.abort()

    await run(cycle)


async def httpx_trio(base_url: str, run) -> None:
    import httpx

    async with consume.stock_client(httpx, consume.Target(base_url)) as client:

        async def stream(number: int, first: trio.Event) -> None:
            async with client.stream(
                "POST", f"{base_url}/chat/completions", content=consume.body("pacer", number)
            ) as response:
                async for _ in response.aiter_raw():
                    first.set()

        async def cycle(number: int) -> None:
            async with trio.open_nursery() as nursery:
                first = trio.Event()
                nursery.start_soon(stream, number, first)
                await first.wait()
                nursery.cancel_scope.cancel()

        await run(cycle)


async def httpx_asyncio(base_url: str, run) -> None:
    import httpx

    async with consume.stock_client(httpx, consume.Target(base_url)) as client:

        async def stream(number: int, first: asyncio.Event) -> None:
            async with client.stream(
                "POST", f"{base_url}/chat/completions", content=consume.body("pacer", number)
            ) as response:
                async for _ in response.aiter_raw():
                    first.set()

        async def cycle(number: int) -> None:
            first = asyncio.Event()
            task = asyncio.create_task(stream(number, first))
            await first.wait()
            task.cancel()
            await asyncio.wait([task])

        await run(cycle)


RUNNERS = {
    "ours": ours,
    "ours, no journal": ours_without_journal,
    "httpx": httpx_trio,
    "httpx, asyncio": httpx_asyncio,
}


def worker(given: dict[str, Any]) -> dict[str, Any]:
    measure.raise_descriptor_limit()
    on_asyncio = given["contender"] == "httpx, asyncio"
    done = {"cycles": 0}
    window: dict[str, float] = {}

    async def several(cycle: Cycle, cycles: int, until: float) -> None:
        left = iter(range(cycles))

        async def work() -> None:
            for number in left:
                if time.monotonic() > until:
                    return
                await cycle(number)
                done["cycles"] += 1

        if on_asyncio:
            async with asyncio.TaskGroup() as group:
                for _ in range(given["workers"]):
                    group.create_task(work())
        else:
            async with trio.open_nursery() as nursery:
                for _ in range(given["workers"]):
                    nursery.start_soon(work)

    async def run(cycle: Cycle) -> None:
        await several(cycle, 2 * given["workers"], time.monotonic() + 10)
        done["cycles"] = 0
        cpu, wall = time.process_time(), time.monotonic()
        await several(cycle, given["cycles"], wall + given["limit_s"])
        window.update(cpu=time.process_time() - cpu, wall=time.monotonic() - wall)

    async def main() -> None:
        await RUNNERS[given["contender"]](given["base_url"], run)

    if on_asyncio:
        asyncio.run(main())
    else:
        trio.run(main)
    cycles = done["cycles"]
    return {"cycles": cycles, "cpu_us": 1e6 * window["cpu"] / cycles, "per_s": cycles / window["wall"]}


def main() -> None:
    options = measure.arguments(__doc__ or "", rounds=ROUNDS)
    if options.worker:
        print(json.dumps(worker(json.loads(options.worker))))
        return
    quick = options.quick
    workers_cycles = [(1, 20), (8, 40)] if quick else [(1, 500), (64, 2000)]
    report = measure.Report("churn", quick, {"rounds": options.rounds, "workers_cycles": workers_cycles})
    for workers, cycles in workers_cycles:
        with measure.program(str(Path(SCRIPT).with_name("pacer.py")), "--rate", "20") as upstream:

            def run(
                name: str, workers: int = workers, cycles: int = cycles, base_url: str = upstream["base_url"]
            ) -> dict[str, Any]:
                given = {
                    "contender": name,
                    "base_url": base_url,
                    "workers": workers,
                    "cycles": cycles,
                    "limit_s": 5 if quick else 30,
                }
                return measure.run_worker(SCRIPT, given, timeout_s=120)

            results = measure.in_turn(CONTENDERS, options.rounds, run, only=options.only)
            left_open = pacer.report(upstream["base_url"])["streaming"]
        at_once = f"{workers} at once"
        report.table(
            f"churn, {at_once}: client CPU per start and cancel",
            "µs",
            {name: [r["cpu_us"] for r in runs] for name, runs in results.items()},
            baseline="httpx",
        )
        report.table(
            f"churn, {at_once}: starts and cancels per second",
            "1/s",
            {name: [r["per_s"] for r in runs] for name, runs in results.items()},
            baseline="httpx",
        )
        report.note(f"{at_once}: {left_open} streams still open at the upstream afterwards.")
    report.write(options.json)


if __name__ == "__main__":
    sys.exit(main())
