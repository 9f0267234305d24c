"""From cancel to the upstream seeing the close, with 1, 100 and 1000 live paced streams.

One stream is cancelled at a time, while all the others go on being consumed. What is measured is when the upstream's own
socket saw the end, minus when the cancel was called; both are read from the machine's one monotonic clock. It holds
everything: the call, the loop getting round to it, unwinding the task, the close, the upstream noticing.

- `ours`: `await stream.cancel()` on the whole supervisor, with an HttpSource and a MemoryStore.
- `httpx`: stock httpx on trio, one AsyncClient shared by all, `aiter_raw`; the stream's own cancel scope is cancelled.
- `httpx, asyncio`: the same on asyncio; `task.cancel()`.

Stock httpx may be unable to open, or to keep up with, 1000 streams. Starting is given a bounded time, and the results say
how many streams were live, which share of the events sent was taken, and how busy the process was.
"""

from __future__ import annotations

import asyncio
import gc
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import measure
import pacer
import trio

SCRIPT = __file__
CONTENDERS = ("httpx", "httpx, asyncio", "ours")
ROUNDS = 3
GAP_S = 0.02
"""Between two cancels."""


def _body(number: int) -> bytes:
    request = {
        "model": "pacer",
        "stream": True,
        "user": str(number),
        "messages": [{"role": "user", "content": "go"}],
    }
    return json.dumps(request).encode()


class Measured:
    """What a run gathers."""

    def __init__(self, given: dict[str, Any]) -> None:
        self.given = given
        self.streams: int = given["streams"]
        self.cancels: int = given["cancels"]
        self.live: set[int] = set()
        self.events = 0
        self.cancelled: dict[int, float] = {}
        self.window: dict[str, float] = {}
        self.count: Callable[[], None] = lambda: None
        """Brings `live` and `events` up to date, where they are not counted event by event."""

    def begin(self) -> None:
        self.count()
        self.window = {"cpu": time.process_time(), "wall": time.monotonic(), "events": self.events}

    def end(self) -> None:
        self.count()
        now = {"cpu": time.process_time(), "wall": time.monotonic(), "events": self.events}
        self.window = {name: value - self.window[name] for name, value in now.items()}

    def chosen(self) -> list[int]:
        """Return who is cancelled: spread evenly over the live streams."""
        live = sorted(self.live)
        step = max(1, len(live) // self.cancels)
        return live[::step][: self.cancels]

    def result(self, base_url: str) -> dict[str, Any]:
        give_up = time.monotonic() + 20
        while True:
            closed = pacer.report(base_url)["closed"]
            if all(str(number) in closed for number in self.cancelled) or time.monotonic() > give_up:
                break
            time.sleep(0.1)
        waits = [
            1e3 * (closed[str(number)] - at) for number, at in self.cancelled.items() if str(number) in closed
        ]
        return {
            "ms": waits,
            "unseen": len(self.cancelled) - len(waits),
            "live": len(self.live),
            "busy": self.window["cpu"] / self.window["wall"],
            "rate": self.window["events"] / self.window["wall"] / max(1, len(self.live)),
        }


# --- contenders ------------------------------------------------------------------------------------------------------


async def _drive(measured: Measured, start, cancel) -> None:
    """Start all, let them settle, cancel some, on trio. `start(number)` returns once it has been asked for."""
    give_up = trio.current_time() + measured.given["start_s"]
    for number in range(measured.streams):
        if trio.current_time() > give_up:
            break
        await start(number)
        # A few at a time, as an application would: a thousand connects at once would measure the accept queue.
        while number - len(measured.live) > 32 and trio.current_time() < give_up:
            await trio.sleep(0.001)
            measured.count()
    while len(measured.live) < measured.streams and trio.current_time() < give_up:
        await trio.sleep(0.01)
        measured.count()
    await trio.sleep(measured.given["settle_s"])
    chosen = measured.chosen()
    measured.begin()
    for number in chosen:
        measured.cancelled[number] = time.monotonic()
        await cancel(number)
        await trio.sleep(GAP_S)
    measured.end()


async def ours(measured: Measured, base_url: str) -> None:
    from supervisor import open_supervisor
    from supervisor.upstream.catalog import Upstream
    from supervisor.upstream.transport import StreamTransport

    transport = StreamTransport(trust_env=False)
    upstream = Upstream(name="pacer", base_url=base_url)
    streams: dict[int, Any] = {}

    async with open_supervisor() as sup:

        async def start(number: int) -> None:
            streams[number] = await sup.start(upstream.source(_body(number), transport=transport))

        async def cancel(number: int) -> None:
            await streams[number].cancel()

        def count() -> None:
            measured.live.update(n for n, stream in streams.items() if stream.tail_seq > 1)
            measured.events = sum(stream.info().events for stream in streams.values())

        measured.count = count
        await _drive(measured, start, cancel)
        await sup.shutdown()


def _client():
    import httpx

    limits = httpx.Limits(max_connections=None, max_keepalive_connections=100)
    return httpx.AsyncClient(limits=limits, timeout=None, trust_env=False)


async def _consume(client, base_url: str, measured: Measured, number: int) -> None:
    async with client.stream("POST", f"{base_url}/chat/completions", content=_body(number)) as response:
        async for data in response.aiter_raw():
            measured.events += data.count(b"data: ")
            measured.live.add(number)


async def httpx_trio(measured: Measured, base_url: str) -> None:
    scopes: dict[int, trio.CancelScope] = {}
    async with _client() as client, trio.open_nursery() as nursery:

        async def task(number: int) -> None:
            with scopes[number]:
                await _consume(client, base_url, measured, number)

        async def start(number: int) -> None:
            scopes[number] = trio.CancelScope()
            nursery.start_soon(task, number)

        async def cancel(number: int) -> None:
            scopes[number].cancel()

        await _drive(measured, start, cancel)
        nursery.cancel_scope.cancel()


async def httpx_asyncio(measured: Measured, base_url: str) -> None:
    tasks: dict[int, asyncio.Task[None]] = {}
    async with _client() as client:
        give_up = time.monotonic() + measured.given["start_s"]
        for number in range(measured.streams):
            if time.monotonic() > give_up:
                break
            tasks[number] = asyncio.create_task(_consume(client, base_url, measured, number))
            await asyncio.sleep(0)
            while number - len(measured.live) > 32 and time.monotonic() < give_up:  # noqa: ASYNC110 (polled as trio's are)
                await asyncio.sleep(0.001)
        while len(measured.live) < measured.streams and time.monotonic() < give_up:  # noqa: ASYNC110 (polled as trio's are)
            await asyncio.sleep(0.01)
        await asyncio.sleep(measured.given["settle_s"])
        chosen = measured.chosen()
        measured.begin()
        for number in chosen:
            measured.cancelled[number] = time.monotonic()
            tasks[number].cancel()
            await asyncio.sleep(GAP_S)
        measured.end()
        for task in tasks.values():
            task.cancel()
        await asyncio.wait(tasks.values())


class FullCollections:
    """Python's full garbage collections: each stops the process for tens of milliseconds, whatever it is doing."""

    def __init__(self) -> None:
        self.begun = 0.0
        self.spans: list[tuple[float, float]] = []
        gc.callbacks.append(self)

    def __call__(self, phase: str, info: dict[str, int]) -> None:
        if info["generation"] != 2:
            return
        if phase == "start":
            self.begun = time.monotonic()
        else:
            self.spans.append((self.begun, time.monotonic()))

    def hit(self, measured: Measured) -> int:
        """Return how many cancels a full collection began within 50 ms after."""
        return sum(0 <= begun - at < 0.05 for at in measured.cancelled.values() for begun, _ in self.spans)


def worker(given: dict[str, Any]) -> dict[str, Any]:
    measure.raise_descriptor_limit()
    collections, hit = FullCollections(), 0
    results: list[dict[str, Any]] = []
    with measure.program(str(Path(SCRIPT).with_name("pacer.py")), "--rate", str(given["rate"])) as upstream:
        base_url = upstream["base_url"]
        for repeat in range(given["repeats"]):
            measured = Measured(given)
            match given["contender"]:
                case "ours":
                    trio.run(ours, measured, base_url)
                case "httpx":
                    trio.run(httpx_trio, measured, base_url)
                case _:
                    asyncio.run(httpx_asyncio(measured, base_url))
            if repeat or given["repeats"] == 1:  # the first of several warms up
                results.append(measured.result(base_url))
                hit += collections.hit(measured)
        seen = pacer.report(base_url)
    return {
        "ms": [value for result in results for value in result["ms"]],
        "unseen": sum(result["unseen"] for result in results),
        "live": min(result["live"] for result in results),
        "busy": statistics.mean(result["busy"] for result in results),
        "rate": statistics.mean(result["rate"] for result in results),
        "collected": hit,
        "longest_collection_ms": 1e3
        * max((ended - begun for begun, ended in collections.spans), default=0.0),
        "upstream": {name: seen[name] for name in ("sent", "late", "behind", "cpu_s")},
    }


def main() -> None:
    options = measure.arguments(__doc__ or "", rounds=ROUNDS)
    if options.worker:
        print(json.dumps(worker(json.loads(options.worker))))
        return
    quick = options.quick
    # streams, events/s of each, cancels of a round, repeats in one process
    loads = [(1, 50, 1, 4), (20, 50, 10, 1)] if quick else [
        (1, 50, 1, 41), (100, 50, 50, 1), (1000, 10, 100, 1), (1000, 50, 100, 1),
    ]  # fmt: skip
    report = measure.Report("cancel", quick, {"rounds": options.rounds, "loads": loads, "gap_s": GAP_S})
    tails: dict[tuple[int, int], float] = {}
    for streams, rate, cancels, repeats in loads:

        def run(name: str, streams=streams, rate=rate, cancels=cancels, repeats=repeats) -> dict[str, Any]:
            given = {
                "contender": name,
                "streams": streams,
                "rate": rate,
                "cancels": cancels,
                "repeats": repeats,
                "start_s": 10 if quick else 60,
                "settle_s": 0.2 if streams == 1 or quick else 2.0,
            }
            return measure.run_worker(SCRIPT, given, timeout_s=300)

        results = measure.in_turn(CONTENDERS, options.rounds, run, only=options.only)
        title = f"{streams} live at {rate} events/s"
        remarks = {
            name: (
                f"live {min(r['live'] for r in runs)}, took {statistics.mean(r['rate'] for r in runs):.1f} events/s "
                f"each, {100 * statistics.mean(r['busy'] for r in runs):.0f}% of a core, "
                f"{sum(len(r['ms']) for r in runs)} cancels"
                + (
                    f", {hit} of them beside a full garbage collection of up to "
                    f"{max(r['longest_collection_ms'] for r in runs):.0f} ms"
                    if (hit := sum(r["collected"] for r in runs))
                    else ""
                )
                + (f", {lost} not seen to close" if (lost := sum(r["unseen"] for r in runs)) else "")
            )
            for name, runs in results.items()
        }
        for label, percent in (("p50", 50), ("p99", 99)):
            report.table(
                f"{title}: cancel to close, {label}",
                "ms",
                {
                    name: [measure.percentile(r["ms"], percent) for r in runs if r["ms"]]
                    for name, runs in results.items()
                },
                baseline="httpx",
                remarks=remarks if label == "p99" else None,
            )
        if "ours" in results:
            tails[streams, rate] = measure.percentile([ms for r in results["ours"] for ms in r["ms"]], 99)
    print()
    for streams, rate, *_ in loads:
        report.aim(
            f"cancel p99 at {streams} live streams of {rate} events/s at most 10 ms (all rounds pooled)",
            tails.get((streams, rate)),
            most=10,
        )
    report.note("p50 and p99 are of a round; the spread is over rounds.")
    report.write(options.json)


if __name__ == "__main__":
    sys.exit(main())
