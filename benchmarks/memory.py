"""Memory per live stream: resident memory with n more streams live, less that without them, divided by n.

Each contender's process first starts some streams (imports, caches, arenas), collects garbage, and reads its resident
size; then, keeping those, it starts n more, waits until each has had its events and all are silent, collects, and reads it
again. Kernel socket buffers are not in it. Two answers are held: one of a single event, which shows what the machinery of a
stream costs, and one of 100 events, because `ours` keeps the answer (journal tail, fold, MemoryStore), and httpx does not.

- `ours, no journal`: transport and BodyReader into a sink that keeps nothing.
- `ours`: the whole supervisor with a MemoryStore.
- `httpx`: stock httpx on trio, one shared AsyncClient, `aiter_raw`, nothing kept.

Over TLS, OpenSSL's session and buffers come on top, for every contender; they belong to the socket, and no aim is for them.
"""

from __future__ import annotations

import gc
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import consume
import measure
import trio

SCRIPT = __file__
CONTENDERS = ("httpx", "ours, no journal", "ours")
ROUNDS = 3
RUNNERS = {"httpx": consume.httpx_raw, "ours, no journal": consume.ours_without_journal, "ours": consume.ours}


def worker(given: dict[str, Any]) -> dict[str, Any]:
    measure.raise_descriptor_limit()
    streams, events = given["streams"], given["events"]
    target = consume.Target(given["base_url"], asking={"stall": events}, ca_pem=given["ca_pem"])
    tally = consume.Tally(streams=streams)
    read: dict[str, float] = {}

    async def load(consume_one: consume.Consume, refresh: Callable[[], None] = lambda: None) -> None:
        async with trio.open_nursery() as nursery:
            give_up = trio.current_time() + given["start_s"]

            async def bring_to(first: int, count: int) -> int:
                """Have `count` streams live and silent; return the resident memory."""
                for number in range(first, count):
                    nursery.start_soon(consume_one, number)
                    while number - tally.live > 32 and trio.current_time() < give_up:
                        await trio.sleep(0.002)
                        refresh()
                before = -1
                while trio.current_time() < give_up and (
                    tally.live < count or tally.events < count * events or tally.events != before
                ):
                    before = tally.events
                    await trio.sleep(0.1)
                    refresh()
                gc.collect()
                return measure.resident_bytes()

            read["before"] = await bring_to(0, given["warm_up"])
            read["after"] = await bring_to(given["warm_up"], given["warm_up"] + streams)
            nursery.cancel_scope.cancel()

    async def main() -> None:
        await RUNNERS[given["contender"]](target, tally, load)

    trio.run(main)
    live = tally.live - given["warm_up"]
    if live < 0.9 * streams:
        raise measure.WorkerError(f"only {live} of {streams} streams came to life in {given['start_s']} s")
    return {
        "kib": (read["after"] - read["before"]) / 1024 / live,
        "live": live,
        "events_each": tally.events / max(1, tally.live),
        "before_mib": read["before"] / (1 << 20),
        "after_mib": read["after"] / (1 << 20),
    }


def main() -> None:
    options = measure.arguments(__doc__ or "", rounds=ROUNDS, parts={"wire": consume.WIRES})
    if options.worker:
        print(json.dumps(worker(json.loads(options.worker))))
        return
    quick = options.quick
    streams, warm_up = (40, 10) if quick else (1000, 50)
    report = measure.Report(
        "memory",
        quick,
        {"rounds": options.rounds, "streams": streams, "warm_up": warm_up, "events": [1, 100]},
    )
    titles = {
        (events, wire): f"memory per live stream, {events} event{'s' * (events > 1)} each, {wire}"
        for wire in options.wire
        for events in (1, 100)
    }
    for (events, wire), title in titles.items():
        with measure.program(
            str(Path(SCRIPT).with_name("pacer.py")), "--rate", "50", *(["--tls"] if wire == "TLS" else [])
        ) as upstream:

            def run(name: str, events: int = events, upstream: dict[str, Any] = upstream) -> dict[str, Any]:
                given = {
                    "contender": name,
                    "streams": streams,
                    "warm_up": warm_up,
                    "events": events,
                    "base_url": upstream["base_url"],
                    "ca_pem": upstream["ca_pem"],
                    "start_s": 10 if quick else 120,
                }
                return measure.run_worker(SCRIPT, given, timeout_s=300)

            results = measure.in_turn(CONTENDERS, options.rounds, run, only=options.only)
        report.table(
            title,
            "KiB",
            {name: [r["kib"] for r in runs] for name, runs in results.items()},
            baseline="httpx",
            remarks={
                name: f"{min(r['live'] for r in runs)} live, {runs[-1]['before_mib']:.0f} to {runs[-1]['after_mib']:.0f} MiB"
                for name, runs in results.items()
            },
        )
    print()
    for (events, wire), title in titles.items():
        if wire == "plain":
            for name in ("ours, no journal", "ours"):
                report.aim(
                    f"{name}, {events} event{'s' * (events > 1)}: at most 40 KiB a live stream, plus sockets",
                    report.median(title, name),
                    most=40,
                )
    report.note(
        "A longer answer costs `ours` its journal tail, at most Limits.tail_bytes (256 KiB), and its text."
    )
    report.write(options.json)


if __name__ == "__main__":
    sys.exit(main())
