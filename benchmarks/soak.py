"""Does anything grow? Hundreds of thousands of short streams, most of which are cancelled, fail, or are left by their readers.

Two soaks, each of four equal phases, after each of which everything has ended and is counted. The first fills what is kept up to a
bound; then nothing may be more than it was after the second.

- **Virtual time**: `--streams` streams of a program's own sources, with a MemoryStore. The sources send at random paces, end well,
  return early, raise, hang, refuse to end at once, leave helpers behind; the readers attach, go, and come back with their cursors; they
  wait, cancel, drain, replace and start again by keys, cancel what has not started, let deadlines and graces pass. All is drawn
  from `--seed`, and time is trio's `MockClock`.
- **Real time**, for `--minutes`: the same readers, with `HttpSource` on a simulated upstream (a process of its own), which breaks off,
  stalls, trickles, refuses and lies as models like `sim/reset?after=2` tell it to, and a SQLiteStore with retention.

What is counted: trio's tasks; threads; file descriptors and, of them, sockets (without idle connections kept for reuse, which are
bounded); live Python heap (tracemalloc, after a collection); streams in the store beyond what retention keeps, and of SQLite's
segments those of no stream; and of the supervisor's own figures all that should be nothing when nothing runs.

Exit code 1, with what grew and by how much, if anything did.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import logging
import random
import sqlite3
import sys
import tempfile
import threading
import time
import tracemalloc
from collections.abc import Awaitable, Callable
from functools import partial
from pathlib import Path
from typing import Any

import attrs
import measure
import trio
import trio.testing

from supervisor import (
    AdmissionError,
    Cursor,
    Deadlines,
    GapError,
    KeyConflictError,
    Limits,
    MemoryStore,
    OnDetach,
    SQLiteStore,
    Stream,
    Supervisor,
    open_supervisor,
)
from supervisor.stores.retention import Retention, retain
from supervisor.upstream.catalog import Upstream
from supervisor.upstream.retry import RetryPolicy
from supervisor.upstream.transport import StreamTransport

PHASES = 4
AT_ONCE = {"virtual": 200, "real": 32}
KEPT = 100
"""Ended streams that the store keeps."""
LIMITS = Limits(
    max_live=250,
    max_finished=50,
    max_tombstones=50,
    tombstone_s=5,
    tail_events=8,
    cleanup_s=1,
    held_s=5,
)
HEAP_SLACK_BYTES = 96 << 10
HEAP_BYTES_A_STREAM = 16
"""What the heap may differ by between two phases: caches that fill late. The smallest thing lost per stream is more."""
MODELS = (
    "ok", "ok", "ok", "paced?tokens=5&interval_s=0.01", "reset?after=2", "drop?after=1", "end?after=2", "stall?after=2",
    "error?after=2", "bad-json?after=1", "bad-chunk?after=2", "silent", "drop-head", "reset-head", "garbage-head", "429?times=1&retry_after_ms=10",
    "500", "trickle?tokens=2", "hang-after-finish", "extra-after-done", "no-marker", "endless?interval_s=0.005",
)  # fmt: skip

Sources = Callable[[random.Random], Any]


# --- sources ---------------------------------------------------------------------------------------------------------


class SourceError(Exception):
    """What a source raises here."""


def drawn_source(rng: random.Random) -> Any:
    """Draw a program's own source."""
    count, pace = rng.randrange(12), rng.choice((0.0, 0.0, 0.01, 0.3))
    ending = rng.choice(("finish", "return", "return", "raise", "hang", "cling", "helper"))

    async def source(out) -> None:
        for index in range(count):
            await out.send(f"{index} ")
            if pace:
                await trio.sleep(pace)
        match ending:
            case "finish":
                out.finish()
            case "raise":
                raise SourceError
            case "hang":
                await trio.sleep_forever()
            case "cling":
                with trio.CancelScope(shield=True):  # longer than `cleanup_s`, at times
                    await trio.sleep(1.5 * rng.random())
            case "helper":
                out.nursery.start_soon(trio.sleep, 0.5)
                out.nursery.start_soon(trio.sleep_forever)
                await trio.sleep(0.1)
                out.finish()

    return source


# --- readers ---------------------------------------------------------------------------------------------------------


@attrs.define
class Soak:
    """Starts streams, and does to them what users do."""

    sup: Supervisor
    source: Sources
    seed: int
    started: int = 0
    refused: int = 0
    gaps: int = 0

    async def work(self, go_on: Callable[[], bool]) -> None:
        while go_on():
            self.started += 1
            await self.live(random.Random(self.seed * 1_000_003 + self.started))

    async def live(self, rng: random.Random) -> None:
        """Start one stream and see it to its end, or leave it."""
        key = f"k{rng.randrange(100)}" if rng.random() < 0.3 else None
        if key is not None and rng.random() < 0.2:
            await self.sup.cancel(key=key, wait_s=rng.random())  # of a key that is not known: a tombstone
        on_detach = OnDetach(mode=rng.choice(("keep", "cancel")), grace_s=rng.choice((0.0, 0.05, 1.0)))
        deadlines = Deadlines(
            connect_s=1,
            first_event_s=rng.choice((0.3, 1)),
            idle_s=rng.choice((0.3, 1)),
            total_s=rng.choice((0.5, 1)),
        )
        try:
            stream = await self.sup.start(
                self.source(rng),
                key=key,
                on_conflict=rng.choice(("attach", "reject", "replace")),
                on_detach=on_detach,
                deadlines=deadlines,
                delivery=rng.choice(("immediate", "durable")),
                labels={"n": str(rng.randrange(100))},
            )
        except (KeyConflictError, AdmissionError):
            self.refused += 1
            await trio.sleep(0.01)
            return
        async with trio.open_nursery() as nursery:
            for _ in range(rng.randrange(3)):
                nursery.start_soon(self.read, stream, random.Random(rng.random()))
            await trio.sleep(rng.choice((0.0, 0.0, 0.02, 0.2)))
            await self.end(stream, rng)

    async def read(self, stream: Stream, rng: random.Random) -> None:
        """Attach, take some, go; come back where it was."""
        cursor = Cursor(1, 0)
        for _ in range(rng.randrange(1, 4)):
            try:
                with stream.subscribe(cursor) as events:
                    for _ in range(rng.randrange(1, 5)):
                        with trio.move_on_after(rng.choice((0.0, 0.05, 1.0))):
                            await events.next_batch(rng.randrange(1, 6))
                    cursor = events.cursor
            except (AdmissionError, GapError):
                self.gaps += 1
                return
            await trio.sleep(rng.choice((0.0, 0.03, 0.1)))

    async def end(self, stream: Stream, rng: random.Random) -> None:
        match rng.randrange(7):
            case 0:
                await stream.cancel(wait_s=rng.random())
            case 1:
                await stream.cancel(mode="drain", drain_s=rng.random(), wait_s=rng.random())
            case 2:
                await stream.cancel(mode="drain", drain_tokens=3, wait_s=0)
            case 3:
                with trio.move_on_after(0.01):  # somebody who asked and did not wait
                    await stream.cancel()
            case 4:
                await self.sup.cancel(labels=dict(stream.labels), wait_s=0.1)
            case 5:
                await stream.wait()
            case _:
                pass  # it is left to itself


# --- counting --------------------------------------------------------------------------------------------------------


@attrs.frozen
class Count:
    """What there is when nothing runs."""

    tasks: int
    threads: int
    descriptors: int
    sockets: int
    heap_bytes: int
    streams_kept: int
    """In the store."""
    orphans: int
    """Records of no stream, in the store."""
    leftovers: int
    """Live and settling streams, tasks of theirs, readers, bytes of live streams: the supervisor's own figures."""


def open_files() -> tuple[int, int]:
    """Return how many descriptors are open, and how many of them are sockets."""
    kinds = []
    for fd in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(OSError):
            kinds.append(str(fd.readlink()))
    return len(kinds), sum(kind.startswith("socket:") for kind in kinds)


def stored(store: MemoryStore | SQLiteStore) -> tuple[int, int]:
    """Return how many streams there are in a store, and how many records of none."""
    if isinstance(store, MemoryStore):
        return len(store._kept), len(list(store._positions)) + len(set(store._with_events) - set(store._kept))
    with contextlib.closing(sqlite3.connect(store.path)) as connection:
        (streams,) = connection.execute("SELECT count(*) FROM streams").fetchone()
        (orphans,) = connection.execute(
            "SELECT count(*) FROM segments WHERE stream NOT IN (SELECT n FROM streams)"
        ).fetchone()
    return streams, orphans + len(list(store._positions))


async def count(sup: Supervisor, transport: StreamTransport | None) -> Count:
    """Wait until nothing runs, prune, collect, and count."""
    with trio.fail_after(60):
        while (now := sup.statistics()).live or now.settling or now.tasks:  # noqa: ASYNC110 (figures)
            await trio.sleep(0.05)
        await trio.sleep(0.1)  # what is woken by the last outcome
        while not (await sup.store.prune(Retention(max_ended=KEPT))).complete:
            pass
    for _ in range(2):
        gc.collect()
    idle = 0 if transport is None else transport.statistics().idle
    descriptors, sockets = open_files()
    kept, orphans = stored(sup.store)
    figures = sup.statistics()
    return Count(
        tasks=trio.lowlevel.current_statistics().tasks_living,
        threads=threading.active_count(),
        descriptors=descriptors - idle,
        sockets=sockets - idle,
        heap_bytes=tracemalloc.get_traced_memory()[0],
        streams_kept=kept,
        orphans=orphans,
        leftovers=figures.live
        + figures.settling
        + figures.unrecorded
        + figures.tasks
        + figures.readers
        + figures.memory.bytes_held,
    )


def grown(before: Count, after: Count, streams: int) -> list[str]:
    """Say what is more than it was, and may not be. `streams` were run in between."""
    allowed = {
        "tasks": 0,
        "threads": max(0, 4 - before.threads),  # trio keeps a few that are idle for ten seconds
        "descriptors": 0,
        "sockets": 0,
        "heap_bytes": HEAP_SLACK_BYTES + HEAP_BYTES_A_STREAM * streams,
        "streams_kept": KEPT - before.streams_kept,
        "orphans": -before.orphans,
        "leftovers": -before.leftovers,
    }
    then, now = attrs.asdict(before), attrs.asdict(after)
    return [
        f"{name.replace('_', ' ')}: {then[name]} after the second phase, {now[name]} after the last"
        for name, most in allowed.items()
        if now[name] - then[name] > most
    ]


# --- the two soaks ---------------------------------------------------------------------------------------------------


@attrs.define
class Result:
    counts: list[Count] = attrs.field(factory=list)
    after: list[int] = attrs.field(factory=list)
    """Streams started by the end of each phase."""
    ended: dict[str, Any] = attrs.field(factory=dict)
    refused: int = 0
    gaps: int = 0
    largest: list[str] = attrs.field(factory=list)
    """Where the heap grew most between the second phase and the last."""

    @property
    def growth(self) -> list[str]:
        return grown(self.counts[1], self.counts[-1], self.after[-1] - self.after[1])


async def phases(
    soak: Soak,
    at_once: int,
    go_on: Callable[[int], Callable[[], bool]],
    transport: StreamTransport | None,
) -> Result:
    result = Result()
    before = None
    tracemalloc.start()
    try:
        for phase in range(PHASES):
            async with trio.open_nursery() as nursery:
                for _ in range(at_once):
                    nursery.start_soon(soak.work, go_on(phase))
            result.counts.append(await count(soak.sup, transport))
            result.after.append(soak.started)
            if phase == 1:
                before = tracemalloc.take_snapshot()
        assert before is not None
        if any("heap" in line for line in result.growth):
            differences = tracemalloc.take_snapshot().compare_to(before, "lineno")
            result.largest = [str(difference) for difference in differences[:8]]
    finally:
        tracemalloc.stop()
    result.ended = {state: dict(reasons) for state, reasons in soak.sup.statistics().ended.items()}
    result.refused, result.gaps = soak.refused, soak.gaps
    return result


async def virtual(streams: int, seed: int) -> Result:
    async with open_supervisor(store=MemoryStore(max_streams=2 * KEPT), limits=LIMITS) as sup:
        soak = Soak(sup, drawn_source, seed)
        return await phases(
            soak,
            AT_ONCE["virtual"],
            lambda phase: lambda: soak.started < streams * (phase + 1) // PHASES,
            None,
        )


async def real(minutes: float, seed: int, base_url: str, path: Path) -> Result:
    upstream = Upstream(
        name="sim",
        base_url=base_url,
        retry=RetryPolicy(attempts=2, wait_initial_s=0.01, wait_max_s=0.02),
    )
    transport = StreamTransport(trust_env=False, idle_s=5)

    def source(rng: random.Random) -> Any:
        request = {"model": f"sim/{rng.choice(MODELS)}", "messages": [{"role": "user", "content": "go"}]}
        return upstream.source(request, transport=transport)

    def go_on(_phase: int) -> Callable[[], bool]:
        until = time.monotonic() + 60 * minutes / PHASES
        return lambda: time.monotonic() < until

    async with open_supervisor(store=SQLiteStore(path), limits=LIMITS) as sup, trio.open_nursery() as nursery:
        nursery.start_soon(partial(retain, sup.store, Retention(max_ended=KEPT), every_s=1.0))
        result = await phases(Soak(sup, source, seed), AT_ONCE["real"], go_on, transport)
        nursery.cancel_scope.cancel()
    await transport.aclose()
    return result


def told(report: measure.Report, name: str, result: Result, took_s: float) -> None:
    """Print and record what was counted."""
    for field in attrs.fields_dict(Count):
        report.table(
            f"{name} time: {field.replace('_', ' ')}",
            "KiB" if field == "heap_bytes" else "",
            {
                f"after {streams} streams": [getattr(counted, field) / (1024 if field == "heap_bytes" else 1)]
                for counted, streams in zip(result.counts, result.after, strict=True)
            },
            baseline=f"after {result.after[1]} streams",
        )
    report.note(f"{name} time: {result.after[-1]} starts in {took_s:.0f} s, {result.refused} refused.")
    report.note(f"{name} time: ended {json.dumps(result.ended)}.")
    for line in [*result.growth, *result.largest]:
        report.note(f"{name} time: GROWN: {line}")


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__.partition("\n\n")[0], formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--streams", type=int, help="in virtual time; default 200000, with --quick 2000; 0: none"
    )
    parser.add_argument(
        "--minutes", type=float, help="in real time; default none, with --quick a few seconds"
    )
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--json", metavar="PATH", help="also write the results as JSON")
    parser.add_argument("--quick", action="store_true", help="seconds instead of minutes")
    options = parser.parse_args()
    streams = options.streams if options.streams is not None else 2000 if options.quick else 200_000
    minutes = options.minutes if options.minutes is not None else 0.02 if options.quick else 0.0
    logging.getLogger("supervisor").setLevel(logging.CRITICAL)  # sources that raise are what this is about
    report = measure.Report(
        "soak", options.quick, {"streams": streams, "minutes": minutes, "seed": options.seed}
    )
    growth: list[str] = []

    def run(name: str, soak: Callable[[], Awaitable[Result]], **how: Any) -> None:
        began = time.monotonic()
        result = trio.run(soak, **how)
        told(report, name, result, time.monotonic() - began)
        growth.extend(f"{name} time: {line}" for line in result.growth)

    if streams:
        clock = trio.testing.MockClock(autojump_threshold=0)
        run("virtual", partial(virtual, streams, options.seed), clock=clock)
    if minutes:
        with measure.simulator() as upstream, tempfile.TemporaryDirectory() as directory:
            path = Path(directory) / "streams.db"
            run("real", partial(real, minutes, options.seed, upstream["base_url"], path))
    print("\n" + ("\n".join(["GROWN:", *growth]) if growth else "nothing grew"))
    report.write(options.json)
    return 1 if growth else 0


if __name__ == "__main__":
    sys.exit(main())
