"""From cancel to the upstream seeing the close, with 1, 100 and 1000 live paced streams, plain and over TLS; and cancelling all.

One stream is cancelled at a time, while all the others go on being consumed. What is measured is when the upstream's own
socket saw the end, minus when the cancel was called; both are read from the machine's one monotonic clock. It holds
everything: the call, the loop getting round to it, unwinding the task, the close, the upstream noticing.

- `ours`: `await stream.cancel()` on the whole supervisor, with an HttpSource and a MemoryStore; garbage is tended as in a daemon.
- `httpx`: stock httpx on trio, one AsyncClient shared by all, `aiter_raw`; the stream's own cancel scope is cancelled.
- `httpx, asyncio`: the same on asyncio; `task.cancel()`.

Then all of 10,000 streams are cancelled by one call. What matters there is the others who use the event loop: the figure is
the longest stall, the longest time that the loop went without looking at its sockets and deadlines, seen by an instrument
(`trio.abc.Instrument`) from the call to the last outcome; and how long it all took, up to the last close at the upstream.

- `ours`: `supervisor.cancel(all_streams=True)`, MemoryStore; `ours, SQLite`: the same with a SQLiteStore.
- `raw trio`: a task per stream that reads its socket and does nothing else, in one nursery, whose cancel scope is cancelled.

Stock httpx may be unable to open, or to keep up with, 1000 streams. Starting is given a bounded time, and the results say
how many streams were live, which share of the events sent was taken, and how busy the process was.
"""

from __future__ import annotations

import asyncio
import gc
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import consume
import measure
import pacer
import trio

SCRIPT = __file__
CONTENDERS = ("httpx", "httpx, asyncio", "ours")
OF_ALL = ("raw trio", "ours", "ours, SQLite")
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

    def result(self, upstream: dict[str, Any]) -> dict[str, Any]:
        give_up = time.monotonic() + 20
        while True:
            closed = pacer.report(upstream["base_url"], upstream["ca_pem"])["closed"]
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


async def ours(measured: Measured, target: consume.Target) -> None:
    from supervisor import garbage, open_supervisor
    from supervisor.upstream.catalog import Upstream

    transport = target.transport()
    upstream = Upstream(name="pacer", base_url=target.base_url)
    streams: dict[int, Any] = {}

    async with open_supervisor() as sup, trio.open_nursery() as tending:
        tending.start_soon(garbage.tend, sup)

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
        tending.cancel_scope.cancel()


async def _consume(client, target: consume.Target, measured: Measured, number: int) -> None:
    async with client.stream(
        "POST", f"{target.base_url}/chat/completions", content=_body(number)
    ) as response:
        async for data in response.aiter_raw():
            measured.events += data.count(b"data: ")
            measured.live.add(number)


async def httpx_trio(measured: Measured, target: consume.Target) -> None:
    import httpx

    scopes: dict[int, trio.CancelScope] = {}
    async with consume.stock_client(httpx, target) as client, trio.open_nursery() as nursery:

        async def task(number: int) -> None:
            with scopes[number]:
                await _consume(client, target, measured, number)

        async def start(number: int) -> None:
            scopes[number] = trio.CancelScope()
            nursery.start_soon(task, number)

        async def cancel(number: int) -> None:
            scopes[number].cancel()

        await _drive(measured, start, cancel)
        nursery.cancel_scope.cancel()


async def httpx_asyncio(measured: Measured, target: consume.Target) -> None:
    import httpx

    tasks: dict[int, asyncio.Task[None]] = {}
    async with consume.stock_client(httpx, target) as client:
        give_up = time.monotonic() + measured.given["start_s"]
        for number in range(measured.streams):
            if time.monotonic() > give_up:
                break
            tasks[number] = asyncio.create_task(_consume(client, target, measured, number))
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


def pacing(rate: float, wire: str):
    """Run a pacer."""
    program = str(Path(SCRIPT).with_name("pacer.py"))
    return measure.program(program, "--rate", str(rate), *(["--tls"] if wire == "TLS" else []))


def worker(given: dict[str, Any]) -> dict[str, Any]:
    if given["all"]:
        return cancel_all(given)
    measure.raise_descriptor_limit()
    collections, hit = FullCollections(), 0
    results: list[dict[str, Any]] = []
    with pacing(given["rate"], given["wire"]) as upstream:
        target = consume.Target(upstream["base_url"], ca_pem=upstream["ca_pem"])
        for repeat in range(given["repeats"]):
            measured = Measured(given)
            match given["contender"]:
                case "ours":
                    trio.run(ours, measured, target)
                case "httpx":
                    trio.run(httpx_trio, measured, target)
                case _:
                    asyncio.run(httpx_asyncio(measured, target))
            if repeat or given["repeats"] == 1:  # the first of several warms up
                results.append(measured.result(upstream))
                hit += collections.hit(measured)
        seen = pacer.report(target.base_url, target.ca_pem)
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


# --- all at once -----------------------------------------------------------------------------------------------------


class Stalls(trio.abc.Instrument):
    """The longest time from one return of the loop's wait for its sockets to the next call of it, while `watching`."""

    def __init__(self) -> None:
        self.watching = False
        self.returned = time.perf_counter()
        self.returned_cpu = time.thread_time()
        self.longest_s = self.longest_cpu_s = 0.0
        """By the wall clock, and in CPU time of the loop's thread: the difference is what other programs, or threads, took."""

    def after_io_wait(self, timeout: float) -> None:  # noqa: ARG002 (trio's signature)
        self.returned = time.perf_counter()
        if self.watching:
            self.returned_cpu = time.thread_time()

    def before_io_wait(self, timeout: float) -> None:  # noqa: ARG002 (trio's signature)
        if self.watching:
            self.longest_s = max(self.longest_s, time.perf_counter() - self.returned)
            self.longest_cpu_s = max(self.longest_cpu_s, time.thread_time() - self.returned_cpu)

    def watch(self) -> None:
        """Begin anew, from now on."""
        self.watching = True
        self.returned, self.returned_cpu = time.perf_counter(), time.thread_time()
        self.longest_s = self.longest_cpu_s = 0.0


async def start_all(start: Callable[[int], Any], live: Callable[[int], bool], streams: int, start_s: float):
    """Start streams, a few at a time; return how many came to life."""
    alive, waiting = 0, list[int]()
    give_up = trio.current_time() + start_s
    for number in range(streams):
        await start(number)
        waiting.append(number)
        while len(waiting) > (32 if number < streams - 1 else 0) and trio.current_time() < give_up:
            await trio.sleep(0.001)
            still = [n for n in waiting if not live(n)]
            alive, waiting = alive + len(waiting) - len(still), still
    return alive


async def _all_of_ours(given: dict[str, Any], target: consume.Target, stalls: Stalls) -> dict[str, float]:
    from supervisor import Limits, SQLiteStore, garbage, open_supervisor
    from supervisor.upstream.catalog import Upstream

    transport = target.transport()
    upstream = Upstream(name="pacer", base_url=target.base_url)
    count = given["streams"]
    streams: list[Any] = []
    with tempfile.TemporaryDirectory() as directory:
        store = SQLiteStore(Path(directory) / "streams.db") if "SQLite" in given["contender"] else None
        limits = Limits(max_live=count)
        async with open_supervisor(store=store, limits=limits) as sup, trio.open_nursery() as tending:
            tending.start_soon(garbage.tend, sup)

            async def start(number: int) -> None:
                streams.append(await sup.start(upstream.source(_body(number), transport=transport)))

            alive = await start_all(start, lambda n: streams[n].tail_seq > 1, count, given["start_s"])
            await trio.sleep(given["settle_s"])
            at = time.monotonic()
            stalls.watch()
            results = await sup.cancel(all_streams=True, wait_s=60)
            settled_s = time.monotonic() - at
            await trio.sleep(0.2)  # what comes after the answer stalls the loop as well
            stalls.watching = False
            assert all(result.outcome == "won" for result in results), results
            await sup.shutdown()
            tending.cancel_scope.cancel()
    return {"at": at, "settled_s": settled_s, "live": alive}


async def _all_of_raw_trio(given: dict[str, Any], target: consume.Target, stalls: Stalls) -> dict[str, float]:
    tally = consume.Tally(streams=given["streams"])
    told: dict[str, float] = {}

    async def load(consume_one: consume.Consume) -> None:
        async with trio.open_nursery() as nursery:

            async def start(number: int) -> None:
                nursery.start_soon(consume_one, number)

            told["live"] = await start_all(
                start, lambda n: tally.live > n, given["streams"], given["start_s"]
            )
            await trio.sleep(given["settle_s"])
            told["at"] = time.monotonic()
            stalls.watch()
            nursery.cancel_scope.cancel()
        told["settled_s"] = time.monotonic() - told["at"]
        await trio.sleep(0.2)
        stalls.watching = False

    await consume.raw_trio(target, tally, load)
    return told


def cancel_all(given: dict[str, Any]) -> dict[str, Any]:
    collections, stalls = FullCollections(), Stalls()
    measure.raise_descriptor_limit(given["streams"] + 1024)
    with pacing(given["rate"], given["wire"]) as upstream:
        target = consume.Target(upstream["base_url"], ca_pem=upstream["ca_pem"])
        run = _all_of_raw_trio if given["contender"] == "raw trio" else _all_of_ours
        told = trio.run(run, given, target, stalls, instruments=[stalls])
        give_up = time.monotonic() + 30
        while (seen := pacer.report(target.base_url, target.ca_pem))[
            "streaming"
        ] and time.monotonic() < give_up:
            time.sleep(0.1)
    spans = [ended - begun for begun, ended in collections.spans if begun >= told["at"]]
    return {
        "stall_ms": 1e3 * stalls.longest_s,
        "settled_ms": 1e3 * told["settled_s"],
        "closed_ms": 1e3 * (max(seen["closed"].values()) - told["at"]),
        "unseen": seen["streaming"],
        "live": told["live"],
        "collection_ms": 1e3 * max(spans, default=0.0),
    }


def _report_of_all(report: measure.Report, title: str, results: dict[str, list[dict[str, Any]]]) -> None:
    def collected(runs: list[dict[str, Any]]) -> str:
        longest = max(r["collection_ms"] for r in runs)
        return f", a full garbage collection of up to {longest:.0f} ms among it" if longest else ""

    remarks = {
        name: f"{min(r['live'] for r in runs)} live{collected(runs)}"
        + (f", {lost} not seen to close" if (lost := sum(r["unseen"] for r in runs)) else "")
        for name, runs in results.items()
    }
    for what, field in (
        ("longest stall of the event loop", "stall_ms"),
        ("to the last outcome", "settled_ms"),
        ("to the last close upstream", "closed_ms"),
    ):
        report.table(
            f"{title}: {what}",
            "ms",
            {name: [r[field] for r in runs] for name, runs in results.items()},
            baseline="raw trio",
            remarks=remarks if field == "stall_ms" else None,
        )


def main() -> None:
    options = measure.arguments(
        __doc__ or "", rounds=ROUNDS, parts={"part": ("one", "all"), "wire": consume.WIRES}
    )
    if options.worker:
        print(json.dumps(worker(json.loads(options.worker))))
        return
    quick = options.quick
    # streams, events/s of each, cancels of a round, repeats in one process, wire
    loads = [(1, 50, 1, 4, "plain"), (20, 50, 10, 1, "plain"), (20, 50, 10, 1, "TLS")] if quick else [
        (1, 50, 1, 41, "plain"), (100, 50, 50, 1, "plain"), (1000, 10, 100, 1, "plain"),
        (1000, 50, 100, 1, "plain"), (1000, 50, 100, 1, "TLS"),
    ]  # fmt: skip
    loads = [load for load in loads if "one" in options.part and load[-1] in options.wire]
    wanted = 200 if quick else 10_000
    # The worker and its upstream have a descriptor per stream each, and a few besides.
    room = measure.raise_descriptor_limit(wanted + 1024) - 512
    whole = min(wanted, room)
    report = measure.Report(
        "cancel", quick, {"rounds": options.rounds, "loads": loads, "gap_s": GAP_S, "all": whole}
    )
    tails: dict[tuple[int, int, str], float] = {}
    for streams, rate, cancels, repeats, wire in loads:
        given = {
            "all": False,
            "streams": streams,
            "rate": rate,
            "wire": wire,
            "cancels": cancels,
            "repeats": repeats,
            "start_s": 10 if quick else 60,
            "settle_s": 0.2 if streams == 1 or quick else 2.0,
        }
        results = _in_turn(CONTENDERS, options, given)
        tails[streams, rate, wire] = _report_of_one(
            report, f"{streams} live at {rate} events/s, {wire}", results
        )
    for wire in options.wire if "all" in options.part else ():
        given = {
            "all": True,
            "streams": whole,
            "rate": 1,
            "wire": wire,
            "start_s": 10 if quick else 120,
            "settle_s": 0.2 if quick else 2.0,
        }
        _report_of_all(report, f"all of {whole}, {wire}", _in_turn(OF_ALL, options, given))
    print()
    for (streams, rate, wire), tail in tails.items():
        most = 4 if (streams, rate) == (1000, 50) else 10
        report.aim(
            f"cancel p99 at {streams} live streams of {rate} events/s, {wire}, at most {most} ms (all rounds pooled)",
            tail,
            most=most,
        )
    for wire in options.wire if "all" in options.part else ():
        title = f"all of {whole}, {wire}: longest stall of the event loop"
        report.aim(f"{title} at most 50 ms", report.median(title, "ours"), most=50)
    report.note("p50 and p99 are of a round; the spread is over rounds.")
    if whole < wanted:
        report.note(
            f"The limit of open files could not be raised far enough for {wanted} streams: {whole} were cancelled."
        )
    report.write(options.json)


def _in_turn(
    contenders: tuple[str, ...], options: Any, given: dict[str, Any]
) -> dict[str, list[dict[str, Any]]]:
    def run(name: str) -> dict[str, Any]:
        return measure.run_worker(SCRIPT, given | {"contender": name}, timeout_s=400)

    return measure.in_turn(contenders, options.rounds, run, only=options.only)


def _report_of_one(
    report: measure.Report, title: str, results: dict[str, list[dict[str, Any]]]
) -> float | None:
    """Add the tables; return the p99 of ours, all rounds pooled."""
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
    if "ours" not in results:
        return None
    return measure.percentile([ms for r in results["ours"] for ms in r["ms"]], 99)


if __name__ == "__main__":
    sys.exit(main())
