"""Ten thousand live streams against one thousand, at the same rate in all; and troublesome streams beside 500 healthy ones.

**Scale.** 10,000 streams of 1 event/s each, against 1000 of 10 events/s: 10,000 events/s in all, through the whole path (own transport,
shared reader, dialect, journal, fold, clocks, SQLiteStore). Each event is stamped by the upstream when it is sent and by the
journal when it is taken, and the stamps are read back from the store afterwards: while it is measured, nothing is added to what runs.

- CPU per event: user and system time of the whole process, the store's thread included.
- The longest time that any stream was without an event, in intervals of its own pace (1 if all come evenly); nothing is starved
  as long as that stays small. How late the upstream itself was with one event at worst is said beside it.
- Memory per live stream beyond the socket: resident memory with all live, less that with a few, divided by the difference; at
  the end, when the tails of the journals are full (`Limits.tail_bytes` is 16 KiB here and
  `fold_bytes` 4, as who holds so many would have it).
- Resident memory over time: a line is laid through its second half; the figure is that line's end divided by its beginning.
  It is judged with `--minutes 10`.
- Cancelling all by one call, with an instrument (`trio.abc.Instrument`) that watches the loop: the longest stall, the time to the
  last outcome and to the last close as the upstream saw it.

**Troubles.** 500 healthy streams of 10 events/s, each with a reader, and their latency from the upstream's send to the reader. Calm
and troubled spans take turns in one run. While it is troubled, there are beside them: an upstream that floods and never ends, an
answer of 100 MB as fast as it can be had, a reader of the flood that stalls, and, in a second supervisor of the same process,
a stream whose database is full. They come from a `pacer.py` of their own.

How one store for all behaves when it fails is a test (`tests/faults/test_troubles_at_once.py`): then all are held back, by design.
"""

from __future__ import annotations

import gc
import json
import statistics
import sys
import tempfile
import time
from array import array
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import attrs
import cancel
import consume
import measure
import pacer
import trio

from supervisor import Limits, SQLiteStore, State, Stream, Supervisor, garbage, open_supervisor
from supervisor.upstream.catalog import Upstream

SCRIPT = __file__
PARTS = ("scale", "troubles")
ROUNDS = 3
TAIL_BYTES = 16 << 10
FOLD_BYTES = 4 << 10
"""Of each stream's newest events, and of its text, in memory: as who holds ten thousand would have it. A stream is at both bounds within
four minutes of one event a second, and has to be, to tell what grows from what fills up."""
EVENTS_PER_S = 10_000
MIB = 1 << 20
LONG_S = 300.0
"""From how long a measurement on the memory's growth is judged."""
SPARE = 512
"""Descriptors for other things than streams."""


def stamp_of(payload: bytes) -> float:
    """Return when an event was sent."""
    at = payload.index(b'"content":"') + len(b'"content":"')
    return float(payload[at : payload.index(b'"', at)])


# --- ten thousand ----------------------------------------------------------------------------------------------------


@attrs.define
class Memory:
    """Resident memory over time."""

    every_s: float
    at: list[float] = attrs.field(factory=list)
    nbytes: list[int] = attrs.field(factory=list)

    async def watch(self) -> None:
        while True:
            self.at.append(time.monotonic())
            self.nbytes.append(measure.resident_bytes())
            await trio.sleep(self.every_s)

    def growth(self) -> float:
        """Return the end of a line through the second half, divided by its beginning."""
        half = len(self.at) // 2
        at, nbytes = self.at[half:], self.nbytes[half:]
        slope, start = statistics.linear_regression([when - at[0] for when in at], nbytes)
        return (start + slope * (at[-1] - at[0])) / start


async def hold(
    given: dict[str, Any], target: consume.Target, path: Path, stalls: cancel.Stalls
) -> dict[str, Any]:
    """Have the streams live, measure, cancel all."""
    count, warm_up = given["streams"], given["warm_up"]
    transport, upstream = target.transport(), Upstream(name="pacer", base_url=target.base_url)
    streams: list[Stream] = []
    memory = Memory(every_s=given["window_s"] / 100)
    limits = Limits(max_live=count, tail_bytes=TAIL_BYTES, fold_bytes=FOLD_BYTES)
    async with (
        open_supervisor(store=SQLiteStore(path), limits=limits) as sup,
        trio.open_nursery() as tending,
    ):
        tending.start_soon(garbage.tend, sup)  # as in a daemon

        async def start(number: int) -> None:
            number = len(streams)
            streams.append(await sup.start(upstream.source(target.body(number), transport=transport)))

        def live(number: int) -> bool:
            return streams[number].tail_seq > 1

        async def bring_to(total: int) -> int:
            first = len(streams)
            return first + await cancel.start_all(
                start, lambda n: live(first + n), total - first, given["start_s"]
            )

        await bring_to(warm_up)
        gc.collect()
        before = measure.resident_bytes()
        alive = await bring_to(count)
        await trio.sleep(given["settle_s"])
        pacer.report(target.base_url, target.ca_pem)  # begins a new account of how late it was
        began = {"wall": time.time(), "cpu": time.process_time(), "events": sum(s.tail_seq for s in streams)}
        stalls.watch()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(memory.watch)
            await trio.sleep(given["window_s"])
            nursery.cancel_scope.cancel()
        cpu_s, ended = time.process_time() - began["cpu"], time.time()
        events = sum(s.tail_seq for s in streams) - began["events"]
        stalls.watching, running_s = False, stalls.longest_s
        after = measure.resident_bytes()
        seen = await trio.to_thread.run_sync(pacer.report, target.base_url, target.ca_pem)
        accounted = sup.statistics().memory.bytes_held
        at = time.monotonic()
        stalls.watch()
        results = await sup.cancel(all_streams=True, wait_s=120)
        settled_s = time.monotonic() - at
        await trio.sleep(0.2)  # what comes after the answer stalls the loop as well
        stalls.watching = False
        assert all(result.outcome == "won" for result in results), results
        await sup.shutdown()
        tending.cancel_scope.cancel()
    return {
        "live": alive,
        "cpu_us": 1e6 * cpu_s / events,
        "busy": cpu_s / (ended - began["wall"]),
        "rate": events / (ended - began["wall"]),
        "kib": (after - before) / 1024 / max(1, alive - warm_up),
        "accounted_kib": accounted / 1024 / alive,
        "rss_mib": [round(nbytes / MIB, 1) for nbytes in memory.nbytes[::10]],
        "growth": memory.growth(),
        "running_stall_ms": 1e3 * running_s,
        "stall_ms": 1e3 * stalls.longest_s,
        "stall_cpu_ms": 1e3 * stalls.longest_cpu_s,
        "settled_ms": 1e3 * settled_s,
        "at": at,
        "window": (began["wall"], ended),
        "upstream": {name: seen[name] for name in ("late", "behind", "worst_s")},
        "ids": [stream.id for stream in streams],
    }


async def read_back(path: Path, told: dict[str, Any], rate: float) -> dict[str, Any]:
    """Read from the store when each event was sent and taken."""
    begin, end = told.pop("window")
    waits, longest = array("d"), 0.0
    store = SQLiteStore(path)
    async with trio.open_nursery() as nursery:
        await nursery.start(store.run)
        for stream_id in told.pop("ids"):
            last, seq = begin, 0
            while page := await store.read(stream_id, after_seq=seq, limit=1024):
                seq = page[-1].seq
                for event in page:
                    if event.kind == "data" and begin <= event.at <= end:
                        waits.append(event.at - stamp_of(event.payload))
                        longest = max(longest, event.at - last)
                        last = event.at
            longest = max(longest, end - last)
        await store.aclose()
    return {
        "gap": longest * rate,
        "p50_ms": 1e3 * measure.percentile(waits, 50),
        "p99_ms": 1e3 * measure.percentile(waits, 99),
    }


def scale(given: dict[str, Any]) -> dict[str, Any]:
    collections, stalls = cancel.FullCollections(), cancel.Stalls()
    with tempfile.TemporaryDirectory() as directory, cancel.pacing(given["rate"], "plain") as upstream:
        path = Path(directory) / "streams.db"
        target = consume.Target(upstream["base_url"], asking={"stamp": True})
        told = trio.run(hold, given, target, path, stalls, instruments=[stalls])
        give_up = time.monotonic() + 30
        while (seen := pacer.report(target.base_url))["streaming"] and time.monotonic() < give_up:
            time.sleep(0.1)
        told |= {
            "closed_ms": 1e3 * (max(seen["closed"].values()) - told["at"]),
            "unseen": given["streams"] - len(seen["closed"]),
            "collection_ms": 1e3
            * max((ended - begun for begun, ended in collections.spans if begun >= told["at"]), default=0.0),
        }
        return told | trio.run(read_back, path, told, given["rate"])


# --- troubles --------------------------------------------------------------------------------------------------------


@attrs.define
class Healthy:
    """The healthy streams and what their readers see."""

    live: int = 0
    waits: array[float] | None = None
    """Where latencies go, in seconds, while they are measured."""

    async def read(self, stream: Stream) -> None:
        begun = False
        with stream.subscribe() as events:
            while batch := await events.next_batch():
                now, waits = time.time(), self.waits
                for event in batch:
                    if event.kind != "data":
                        continue
                    if not begun:
                        begun, self.live = True, self.live + 1
                    if waits is not None:
                        waits.append(now - float(event.text))


class Troubles:
    """What makes trouble, for the length of `run`."""

    def __init__(
        self, sup: Supervisor, broken: Supervisor, source: Callable[..., Any], given: dict[str, Any]
    ) -> None:
        self.sup = sup
        self.broken = broken
        self.source = source
        self.given = given
        self.flooded = 0
        self.most: dict[str, float] = {}

    async def run(self, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Run until cancelled, then clear up, and see that each ended as it is documented to."""
        answer_events = self.given["answer_bytes"] // 1024
        flood = await self.sup.start(self.source(flood=1 << 40))
        answer = await self.sup.start(self.source(flood=answer_events, size=1000))
        unwritten = await self.broken.start(self.source(flood=1 << 40))
        with flood.subscribe() as stalled:
            await stalled.next_batch(1)  # and then no more
            task_status.started()
            try:
                while True:
                    self._look(flood=flood, answer=answer)
                    await trio.sleep(0.1)
            finally:
                with trio.move_on_after(60, shield=True):
                    self.flooded += flood.info().events
                    await flood.cancel()
                    outcome = await answer.wait()  # its text, a finish reason, the end marker
                    assert (outcome.state, outcome.events) == (State.COMPLETED, answer_events + 2), outcome
                    assert unwritten.state is State.STOPPING, repr(
                        unwritten
                    )  # its outcome could not be written
                    while self.sup.store.statistics().pending_records > 1000:  # noqa: ASYNC110 (a figure)
                        await trio.sleep(0.05)

    def _look(self, **streams: Stream) -> None:
        now = {f"bytes of the {name}": stream.info().bytes_held for name, stream in streams.items()}
        now["bytes of all streams"] = self.sup.statistics().memory.bytes_held
        now["bytes in the store's queue"] = self.sup.store.statistics().held_bytes
        for name, value in now.items():
            self.most[name] = max(self.most.get(name, 0), value)


async def alternate(
    given: dict[str, Any], healthy: consume.Target, trouble: consume.Target, directory: Path
) -> dict[str, Any]:
    transport = healthy.transport()
    upstream = Upstream(name="healthy", base_url=healthy.base_url)
    troubled = Upstream(name="trouble", base_url=trouble.base_url)
    told: dict[str, Any] = {"calm": [], "troubled": [], "taken": []}

    def source(**asking: Any) -> Any:
        return troubled.source(consume.body("pacer", **asking), transport=transport)

    seen = Healthy()
    small = SQLiteStore(directory / "small.db", high_water_bytes=MIB, patience_s=0.2)
    async with (
        open_supervisor(store=SQLiteStore(directory / "streams.db")) as sup,
        open_supervisor(store=small, limits=Limits(held_s=0.2, settle_s=0.1)) as broken,
        trio.open_nursery() as nursery,
    ):
        for number in range(given["streams"]):
            stream = await sup.start(upstream.source(healthy.body(number), transport=transport))
            nursery.start_soon(seen.read, stream)
        with trio.fail_after(30):
            while seen.live < given["streams"]:  # noqa: ASYNC110 (once, before anything is measured)
                await trio.sleep(0.05)
        troubles = Troubles(sup, broken, source, given)
        for turn in range(2 * given["turns"]):
            name = ("calm", "troubled")[(turn + turn // 2) % 2]  # calm, troubled, troubled, calm, …
            async with trio.open_nursery() as trying:
                if name == "troubled":
                    full_disk(small)
                    await trying.start(troubles.run)
                await trio.sleep(given["settle_s"])
                waits = seen.waits = array("d")
                await trio.sleep(given["window_s"])
                seen.waits = None
                trying.cancel_scope.cancel()
            mended(small)
            with trio.fail_after(30):
                while small.failing or broken.statistics().unrecorded:  # noqa: ASYNC110 (told when there is room again)
                    await trio.sleep(0.05)
            told["taken"].append(len(waits) / given["window_s"])
            told[name].append([1e3 * measure.percentile(waits, percent) for percent in (50, 99, 99.9)])
        told["unwritten"] = broken.statistics().ended
        told["most"], told["flooded"] = troubles.most, troubles.flooded
        await sup.shutdown()
    return told


def full_disk(store: SQLiteStore) -> None:
    """Let the store's file grow by no more than a few pages."""
    pages = store._database.writer.execute("PRAGMA page_count").fetchone()[0]
    store._database.writer.execute(f"PRAGMA max_page_count = {pages + 40}")


def mended(store: SQLiteStore) -> None:
    store._database.writer.execute("PRAGMA max_page_count = 1073741823")


def trouble(given: dict[str, Any]) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as directory, ExitStack() as stack:
        healthy, troubled = (stack.enter_context(cancel.pacing(given["rate"], "plain")) for _ in range(2))
        return trio.run(
            alternate,
            given,
            consume.Target(healthy["base_url"], asking={"stamp": True}),
            consume.Target(troubled["base_url"]),
            Path(directory),
        )


# --- both ------------------------------------------------------------------------------------------------------------


def worker(given: dict[str, Any]) -> dict[str, Any]:
    measure.raise_descriptor_limit(given["streams"] + SPARE)
    return scale(given) if given["part"] == "scale" else trouble(given)


def main() -> None:
    options = measure.arguments(
        __doc__ or "",
        rounds=ROUNDS,
        parts={"part": PARTS},
        numbers={"minutes": "how long each number of streams is measured; default: 20 s"},
    )
    if options.worker:
        print(json.dumps(worker(json.loads(options.worker))))
        return
    report = measure.Report("scale", options.quick, {"rounds": options.rounds, "minutes": options.minutes})
    aims: list[Callable[[], None]] = []
    if "scale" in options.part:
        aims += _scale(report, options)
    if "troubles" in options.part:
        aims += _troubles(report, options)
    print()
    for aim in aims:
        aim()
    report.write(options.json)


def _scale(report: measure.Report, options: Any) -> list[Callable[[], None]]:
    quick = options.quick
    wanted = 200 if quick else 10_000
    # A process has a descriptor per stream; its upstream, which is one of its own, too.
    room = measure.raise_descriptor_limit(wanted + SPARE) - SPARE
    most = min(wanted, room)
    few = most // 10
    total = EVENTS_PER_S * most / 10_000 if not quick else 1000.0
    window_s = 60 * options.minutes or (1.0 if quick else 20.0)
    loads = {f"{count} streams": count for count in (few, most)}
    report.parameters |= {"streams": [few, most], "events_per_s": total, "window_s": window_s}

    def run(name: str) -> dict[str, Any]:
        count = loads[name]
        given = {
            "part": "scale",
            "streams": count,
            "rate": total / count,
            "warm_up": max(5, few // 20),
            "start_s": 10 if quick else 120,
            "settle_s": 0.3 if quick else 3.0 + 2 * count / total,
            "window_s": window_s,
        }
        return measure.run_worker(SCRIPT, given, timeout_s=window_s * 2 + 300)

    results = measure.in_turn(list(loads), options.rounds, run, only=options.only)
    base, top = loads
    titles = {
        "cpu_us": ("CPU per event", "µs"),
        "gap": ("longest time without an event", "intervals"),
        "p50_ms": ("from the upstream's send to the journal, p50", "ms"),
        "p99_ms": ("from the upstream's send to the journal, p99", "ms"),
        "kib": ("memory per live stream", "KiB"),
        "growth": ("resident memory at the end", "of that halfway"),
        "running_stall_ms": ("longest stall of the event loop, running", "ms"),
        "stall_ms": ("longest stall of the event loop, cancelling all", "ms"),
        "settled_ms": ("cancelling all, to the last outcome", "ms"),
        "closed_ms": ("cancelling all, to the last close upstream", "ms"),
    }
    remarks = {
        "cpu_us": lambda runs: (
            f"{statistics.mean(r['rate'] for r in runs):.0f} of {total:.0f} events/s taken, "
            f"{100 * statistics.mean(r['busy'] for r in runs):.0f}% of a core, {min(r['live'] for r in runs)} live"
        ),
        "gap": lambda runs: (
            f"the upstream was {1e3 * max(r['upstream']['worst_s'] for r in runs):.0f} ms late at worst"
        ),
        "kib": lambda runs: (
            f"{statistics.mean(r['accounted_kib'] for r in runs):.1f} KiB of them in the account"
        ),
        "growth": lambda runs: " ".join(f"{mib:.0f}" for mib in runs[-1]["rss_mib"]) + " MiB",
        "stall_ms": lambda runs: (
            f"at most {max(r['stall_cpu_ms'] for r in runs):.0f} ms of CPU time; the longest full garbage collection "
            f"took {max(r['collection_ms'] for r in runs):.0f} ms"
        ),
        "closed_ms": lambda runs: f"{sum(r['unseen'] for r in runs)} not seen to close",
    }
    for field, (title, unit) in titles.items():
        report.table(
            title,
            unit,
            {name: [r[field] for r in runs] for name, runs in results.items()},
            baseline=base,
            remarks={name: remarks[field](runs) for name, runs in results.items()}
            if field in remarks
            else None,
        )
    if most < wanted:
        report.note(
            f"THE LIMIT OF OPEN FILES COULD NOT BE RAISED FAR ENOUGH FOR {wanted} STREAMS: {most} WERE HELD INSTEAD."
        )
    aims: list[tuple[str, float | None, float]] = [
        (
            f"CPU per event, {most} / {few} streams, at most 1.3",
            report.ratio("CPU per event", top, base),
            1.3,
        ),
        (
            "no stream without an event for more than 2 intervals",
            report.median("longest time without an event", top),
            2,
        ),
        ("at most 64 KiB a live stream, plus sockets", report.median("memory per live stream", top), 64),
        (
            "memory flat for 10 minutes: at the end of the second half at most 1.02 of its beginning",
            report.median("resident memory at the end", top) if window_s >= LONG_S else None,
            1.02,
        ),
        (
            "cancelling all: no stall of more than 50 ms",
            report.median("longest stall of the event loop, cancelling all", top),
            50,
        ),
    ]
    return [lambda aim=aim: report.aim(aim[0], aim[1], most=aim[2]) for aim in aims]


def _troubles(report: measure.Report, options: Any) -> list[Callable[[], None]]:
    quick = options.quick
    given = {
        "part": "troubles",
        "streams": 40 if quick else 500,
        "rate": 10,
        "turns": 2 if quick else 6,
        "settle_s": 0.2 if quick else 1.0,
        "window_s": 0.5 if quick else 4.0,
        "answer_bytes": (2 if quick else 100) * MIB,
    }
    report.parameters |= {"troubles": given}
    told = measure.run_worker(SCRIPT, given, timeout_s=300)
    for place, label in enumerate(("p50", "p99", "p99.9")):
        report.table(
            f"{given['streams']} healthy streams, from send to reader, {label}",
            "ms",
            {name: [span[place] for span in told[name]] for name in ("calm", "troubled")},
            baseline="calm",
        )
    report.note(
        f"The healthy ones took {min(told['taken']):.0f} to {max(told['taken']):.0f} of {10 * given['streams']} events/s; "
        f"the floods brought {told['flooded']} events beside them, and {given['turns']} answers of {given['answer_bytes'] / MIB:.0f} MiB "
        f"were complete."
    )
    report.note(
        "Most held: "
        + ", ".join(f"{name} {value / MIB:.1f} MiB" for name, value in told["most"].items())
        + "."
    )
    report.note(f"What the full disk did not take: {json.dumps(told['unwritten'])}.")
    aims = []
    for place, label in enumerate(("p50", "p99")):
        calm = sorted(span[place] for span in told["calm"])
        noise = calm[-1] / calm[0]
        ratio = report.ratio(
            f"{given['streams']} healthy streams, from send to reader, {label}", "troubled", "calm"
        )
        aims.append((f"{label} with the troubles / without, at most what calm spans differ by", ratio, noise))
    return [lambda aim=aim: report.aim(aim[0], aim[1], most=aim[2]) for aim in aims]


if __name__ == "__main__":
    sys.exit(main())
