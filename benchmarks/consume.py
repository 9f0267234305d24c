"""CPU per event of consuming OpenAI-style event streams: a flood, and a paced load.

The figure is the CPU time (user and system) of the consuming process alone, divided by the events it took; the simulated
upstream is a process of its own. The two loads are two regimes: in a flood a read brings hundreds of events and the cost is
parsing; in the paced load (200 streams of 50 events/s) each event is a wake-up of its own and the cost is waiting.

Contenders, and what each of them does with an event:

- `raw trio`: reads the socket and counts `data: ` in the bytes. No HTTP, no parsing: the floor on trio.
- `ours, no journal`: the project's transport, framing, event-stream decoder and OpenAI dialect (each event's JSON decoded
  into deltas) into a sink that counts: all layers but the journal.
- `ours`: the whole supervisor: the same, and journal, fold, clocks, account of memory, MemoryStore.
- `ours, read`: the same with a subscriber on each stream that takes every event.
- `httpx raw`: stock httpx on trio, `aiter_raw`; counts `data: ` in the chunks. No decoding, no JSON.
- `httpx-sse`: stock httpx on trio and httpx-sse's decoder. No JSON.
- `openai`: the `openai` SDK's async client on asyncio (each event becomes a pydantic model).
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from collections.abc import Awaitable, Callable
from importlib.util import find_spec
from typing import Any

import attrs
import measure
import trio

SCRIPT = __file__
CONTENDERS = ("httpx raw", "ours, no journal", "ours", "ours, read", "raw trio", "httpx-sse", "openai")
NEEDS = {"httpx-sse": "httpx_sse", "openai": "openai"}
"""What is not among the project's own dependencies; without it the contender is left out, and the results say so."""
ROUNDS = 5
FLOOD_EVENTS = {"openai": 0.05, "httpx-sse": 0.2, "httpx raw": 0.5}
"""The share of the flood that slow contenders get, so that a round takes seconds: the cost per event is constant."""


@attrs.define
class Tally:
    """What a contender counts into."""

    streams: int
    events: int = 0
    live: int = 0
    """Streams that have had an event."""
    ended_events: int = 0
    """Of the events, those of streams that have ended, where `events` is asked of the live ones."""


def body(model: str, number: int = 0) -> bytes:
    request = {
        "model": model,
        "stream": True,
        "user": str(number),
        "messages": [{"role": "user", "content": "go"}],
    }
    return json.dumps(request).encode()


# --- contenders: each consumes one stream to its end, or until it is cancelled ---------------------------------------

Consume = Callable[[int], Awaitable[None]]


class _Count:
    """A sink that keeps nothing."""

    def __init__(self, tally: Tally) -> None:
        self.tally = tally
        self.sealed = False
        self.begun = False

    def append(self, payload, name, deltas) -> None:  # noqa: ARG002 (the sink's protocol)
        self.tally.events += 1
        if not self.begun:
            self.begun = True
            self.tally.live += 1

    def skip(self, payload, why) -> None:  # noqa: ARG002 (the sink's protocol)
        raise AssertionError(why)

    def touch(self) -> None: ...

    def mark(self, reason) -> None: ...

    def complete(self, reason) -> bool:  # noqa: ARG002 (the sink's protocol)
        self.sealed = True
        return True

    def fail(self, reason, fault) -> bool:
        raise AssertionError(f"{reason}: {fault}")


async def ours_without_journal(base_url: str, model: str, tally: Tally, run) -> None:
    import httpx

    from supervisor.dialects.openai_chat import OPENAI_CHAT
    from supervisor.dialects.reading import BodyReader
    from supervisor.upstream.transport import StreamTransport

    transport = StreamTransport(trust_env=False)

    async def consume(number: int) -> None:
        request = httpx.Request(
            "POST",
            f"{base_url}/chat/completions",
            content=body(model, number),
            headers={"Content-Type": "application/json"},
        )
        exchange = await transport.open(request)
        try:
            sink = _Count(tally)
            reader = BodyReader(OPENAI_CHAT, sink)
            while not sink.sealed:
                data = await exchange.receive()
                assert data, "the flood ended early"
                reader.feed(data)
        finally:
            exchange.abort()

    await run(consume)


async def _supervised(base_url: str, model: str, tally: Tally, run, *, read: bool) -> None:
    from supervisor import open_supervisor
    from supervisor.upstream.catalog import Upstream
    from supervisor.upstream.transport import StreamTransport

    transport = StreamTransport(trust_env=False)
    upstream = Upstream(name="simulated", base_url=base_url)
    async with open_supervisor() as sup:

        async def consume(number: int) -> None:
            stream = await sup.start(upstream.source(body(model, number), transport=transport))
            counted = 0
            try:
                if read:
                    with stream.subscribe() as events:
                        while batch := await events.next_batch():
                            if not counted:
                                tally.live += 1
                            counted += len(batch)
                            tally.events += len(batch)
                else:
                    # Nobody reads: what was consumed is what the journal has.
                    live.add(stream)
                    await stream.wait()
            finally:
                stream.request_stop()
                live.discard(stream)
                tally.ended_events += stream.info().events

        live: set[Any] = set()

        def refresh() -> None:
            if not read:
                tally.events = tally.ended_events + sum(stream.info().events for stream in live)
                tally.live = sum(stream.tail_seq > 1 for stream in live)

        await run(consume, refresh)


async def ours(base_url: str, model: str, tally: Tally, run) -> None:
    await _supervised(base_url, model, tally, run, read=False)


async def ours_read(base_url: str, model: str, tally: Tally, run) -> None:
    await _supervised(base_url, model, tally, run, read=True)


async def raw_trio(base_url: str, model: str, tally: Tally, run) -> None:
    host, port = base_url.split("/")[2].split(":")

    async def consume(number: int) -> None:
        content = body(model, number)
        with trio.socket.socket() as sock:
            await sock.connect((host, int(port)))
            await sock.send(
                b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nConnection: close\r\n"
                b"Content-Length: %d\r\n\r\n%b" % (len(content), content)
            )
            begun = False
            while data := await sock.recv(65536):
                tally.events += data.count(b"data: ")
                if not begun and tally.events:
                    begun = True
                    tally.live += 1

    await run(consume)


def stock_client(httpx):
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=100)
    return httpx.AsyncClient(limits=limits, timeout=None, trust_env=False)


async def httpx_raw(base_url: str, model: str, tally: Tally, run) -> None:
    import httpx

    async with stock_client(httpx) as client:

        async def consume(number: int) -> None:
            begun = False
            async with client.stream(
                "POST", f"{base_url}/chat/completions", content=body(model, number)
            ) as response:
                async for data in response.aiter_raw():
                    tally.events += data.count(b"data: ")
                    if not begun:
                        begun = True
                        tally.live += 1

        await run(consume)


async def httpx_sse(base_url: str, model: str, tally: Tally, run) -> None:
    import httpx
    from httpx_sse import aconnect_sse

    async with stock_client(httpx) as client:

        async def consume(number: int) -> None:
            begun = False
            async with aconnect_sse(
                client, "POST", f"{base_url}/chat/completions", content=body(model, number)
            ) as source:
                async for _ in source.aiter_sse():
                    tally.events += 1
                    if not begun:
                        begun = True
                        tally.live += 1

        await run(consume)


async def openai_sdk(base_url: str, model: str, tally: Tally, run) -> None:
    from openai import AsyncOpenAI

    async with AsyncOpenAI(base_url=base_url, api_key="none", timeout=3600, max_retries=0) as client:

        async def consume(_number: int) -> None:
            begun = False
            answer = await client.chat.completions.create(
                model=model, messages=[{"role": "user", "content": "go"}], stream=True
            )
            async for _ in answer:
                tally.events += 1
                if not begun:
                    begun = True
                    tally.live += 1

        await run(consume)


RUNNERS = {
    "ours, no journal": ours_without_journal,
    "ours": ours,
    "ours, read": ours_read,
    "raw trio": raw_trio,
    "httpx raw": httpx_raw,
    "httpx-sse": httpx_sse,
    "openai": openai_sdk,
}


# --- the loads, for trio and for asyncio -----------------------------------------------------------------------------


def worker(given: dict[str, Any]) -> dict[str, Any]:  # noqa: PLR0915 (two loads on two event loops)
    measure.raise_descriptor_limit()
    contender = RUNNERS[given["contender"]]
    tally = Tally(streams=given["streams"])
    window: dict[str, float] = {}
    on_asyncio = given["contender"] == "openai"

    async def sleep(seconds: float) -> None:
        if on_asyncio:
            await asyncio.sleep(seconds)
        else:
            await trio.sleep(seconds)

    async def many(consume: Consume, count: int) -> None:
        if on_asyncio:
            async with asyncio.TaskGroup() as group:
                for number in range(count):
                    group.create_task(consume(number))
        else:
            async with trio.open_nursery() as nursery:
                for number in range(count):
                    nursery.start_soon(consume, number)

    async def flood(consume: Consume, refresh: Callable[[], None] = lambda: None) -> None:
        await many(consume, given["streams"])
        refresh()
        window["cpu"], window["events"] = time.process_time(), tally.events

    async def paced(consume: Consume, refresh: Callable[[], None] = lambda: None) -> None:
        async def watch() -> None:
            give_up = time.monotonic() + given["start_s"]
            refresh()
            while tally.live < given["streams"] and time.monotonic() < give_up:
                await sleep(0.05)
                refresh()
            await sleep(given["settle_s"])
            refresh()
            events, cpu, begun = tally.events, time.process_time(), time.monotonic()
            await sleep(given["window_s"])
            window["cpu"] = time.process_time() - cpu
            window["wall"] = time.monotonic() - begun
            refresh()
            window["events"] = tally.events - events

        if on_asyncio:
            tasks = [asyncio.create_task(consume(number)) for number in range(given["streams"])]
            await watch()
            for task in tasks:
                task.cancel()
            await asyncio.wait(tasks)
        else:
            async with trio.open_nursery() as nursery:
                for number in range(given["streams"]):
                    nursery.start_soon(consume, number)
                await watch()
                nursery.cancel_scope.cancel()

    async def main() -> None:
        if given["load"] == "paced":
            await contender(given["base_url"], given["model"], tally, paced)
            return
        # Imports, connections and caches once, outside of what is measured.
        await contender(given["base_url"], "sim/ok?tokens=200", tally, flood)
        tally.events = tally.live = tally.ended_events = 0
        before = time.process_time()
        await contender(given["base_url"], given["model"], tally, flood)
        window["cpu"] -= before

    if on_asyncio:
        asyncio.run(main())
    else:
        trio.run(main)
    return {"cpu_us": 1e6 * window["cpu"] / window["events"], "live": tally.live, **window}


def main() -> None:
    options = measure.arguments(__doc__ or "", rounds=ROUNDS)
    if options.worker:
        print(json.dumps(worker(json.loads(options.worker))))
        return
    quick = options.quick
    flood_streams, flood_events = (2, 4_000) if quick else (8, 50_000)
    streams, rate = (10, 50) if quick else (200, 50)
    window_s = 0.3 if quick else 4.0
    contenders = [name for name in CONTENDERS if find_spec(NEEDS.get(name, "trio")) is not None]
    report = measure.Report(
        "consume",
        quick,
        {
            "rounds": options.rounds,
            "flood": {"streams": flood_streams, "events_per_stream": flood_events},
            "paced": {"streams": streams, "events_per_s": rate, "window_s": window_s},
        },
    )
    with measure.simulator() as upstream:

        def flood(name: str) -> dict[str, Any]:
            tokens = max(500, int(flood_events * FLOOD_EVENTS.get(name, 1)))
            given = {
                "contender": name,
                "load": "flood",
                "base_url": upstream["base_url"],
                "streams": flood_streams,
                "model": f"sim/flood?tokens={tokens}&events_per_write=256",
            }
            result = measure.run_worker(SCRIPT, given, timeout_s=180)
            # Who counts `data: ` misses one that is split between two reads.
            if result["events"] < 0.999 * flood_streams * tokens:
                raise measure.WorkerError(
                    f"{name} took {result['events']} of {flood_streams * tokens} events"
                )
            return result

        def paced(name: str) -> dict[str, Any]:
            given = {
                "contender": name,
                "load": "paced",
                "base_url": upstream["base_url"],
                "streams": streams,
                "model": f"sim/endless?interval_s={1 / rate}",
                "start_s": 30,
                "settle_s": 0.1 if quick else 1.0,
                "window_s": window_s,
            }
            return measure.run_worker(SCRIPT, given, timeout_s=120)

        results = {
            "flood": measure.in_turn(contenders, options.rounds, flood, only=options.only),
            "paced": measure.in_turn(contenders, options.rounds, paced, only=options.only),
        }
    for load, runs_of in results.items():
        remarks = {}
        if load == "paced":
            for name, runs in runs_of.items():
                got = sum(run["events"] / run["wall"] for run in runs) / len(runs)
                remarks[name] = f"{got:.0f} of {streams * rate} events/s taken"
        report.table(
            f"{load}: CPU per event",
            "µs",
            {name: [run["cpu_us"] for run in runs] for name, runs in runs_of.items()},
            baseline="httpx raw",
            remarks=remarks,
        )
    print()
    flooded, pace = "flood: CPU per event", "paced: CPU per event"
    for name in ("ours, no journal", "ours"):
        report.aim(f"flood, httpx raw / {name} at least 4", report.ratio(flooded, "httpx raw", name), least=4)
        report.aim(f"flood, openai / {name} at least 30", report.ratio(flooded, "openai", name), least=30)
        report.aim(f"paced, {name} / httpx raw at most 0.5", report.ratio(pace, name, "httpx raw"), most=0.5)
    for name in set(CONTENDERS) - set(contenders):
        report.note(f"{name} is not installed and was left out.")
    report.note(
        "The aims were set for all layers but the journal; they are shown for the whole supervisor too."
    )
    report.note("The openai SDK runs on asyncio here, everything else on trio.")
    report.write(options.json)


if __name__ == "__main__":
    sys.exit(main())
