"""CPU per event of consuming OpenAI-style event streams: a flood and a paced load, plain and over TLS.

The figure is the CPU time (user and system, all threads) of the consuming process alone, divided by the events it took; the
upstream (`pacer.py`) is a process of its own. The loads are regimes: in a flood a read brings hundreds of events, each in an
HTTP chunk of its own as providers flush them, and the cost is parsing (`bulk` is a flood of chunks of 256 events, as some proxy
may join them); in the paced load (200 streams of 50 events/s) each event is a wake-up of its own and the cost is waiting.

Contenders, and what each of them does with an event:

- `raw trio`: reads the socket and counts `data: ` in the bytes. No HTTP, no parsing: the floor of a task per stream on trio.
- `ours, no journal`: the project's transport, framing, event-stream decoder and OpenAI dialect (each event's JSON decoded
  into deltas) into a sink that counts: all layers but the journal.
- `ours`: the whole supervisor: the same, and journal, fold, clocks, account of memory, MemoryStore.
- `ours, read`: the same with a subscriber on each stream that takes every event.
- `ours, SQLite`: `ours` with a SQLiteStore in a directory of its own, its thread's CPU included.
- `httpx`: stock httpx on trio, `aiter_raw`, and `handwritten.EventJob`: events cut, JSON decoded by msgspec, kept in a list.
- `httpx raw`: the same without decoding; counts `data: ` in the chunks.
- `httpx-sse`: stock httpx on trio and httpx-sse's decoder. No JSON.
- `uvloop`: a client written for speed: asyncio's protocols on uvloop, chunked framing by hand, the same `EventJob`.
- `openai`: the `openai` SDK's async client on asyncio (each event becomes a pydantic model).

`EventJob` folds nothing and journals nothing, knows one way to write an event and trusts what it is sent; `uvloop` beside it
has no deadlines, limits, back-pressure or endings. They are what the whole supervisor is measured against all the same.
"""

from __future__ import annotations

import asyncio
import json
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import attrs
import handwritten
import measure
import pacer
import trio

SCRIPT = __file__
CONTENDERS = (
    "httpx",
    "ours",
    "uvloop",
    "ours, SQLite",
    "ours, no journal",
    "ours, read",
    "raw trio",
    "httpx raw",
    "httpx-sse",
    "openai",
)
NEEDS = {"httpx-sse": "httpx_sse", "openai": "openai", "uvloop": "uvloop"}
"""What is not among the project's own dependencies; without it the contender is left out, and the results say so."""
ON_ASYNCIO = ("openai", "uvloop")
ROUNDS = 5
LOADS = ("flood", "bulk", "paced")
WIRES = ("plain", "TLS")
FLOOD_EVENTS = {"openai": 0.05, "httpx-sse": 0.2, "httpx raw": 0.5, "httpx": 0.5}
"""The share of the flood that slow contenders get, so that a round takes seconds: the cost per event is constant."""


@attrs.frozen
class Target:
    """Where requests go, and what they ask for beside what every chat request has."""

    base_url: str
    model: str = "pacer"
    asking: dict[str, Any] = attrs.field(factory=dict)
    """For a `pacer`: `flood` or `stall`. The simulated upstream is told by its model."""
    ca_pem: str | None = None

    def body(self, number: int = 0) -> bytes:
        """Return a chat request as JSON; a `pacer` reports on its stream under `number`."""
        return body(self.model, number, **self.asking)

    def verify(self) -> Any:
        """Return what httpx is to verify with."""
        return pacer.trusting(self.ca_pem) or True

    def transport(self):
        """Return the project's transport."""
        from supervisor.upstream.transport import StreamTransport

        return StreamTransport(trust_env=False, ssl_context=pacer.trusting(self.ca_pem))


@attrs.define
class Tally:
    """What a contender counts into."""

    streams: int
    events: int = 0
    live: int = 0
    """Streams that have had an event."""
    ended_events: int = 0
    """Of the events, those of streams that have ended, where `events` is asked of the live ones."""


def body(model: str, number: int = 0, **asking: Any) -> bytes:
    request = {
        "model": model,
        "stream": True,
        "user": str(number),
        "messages": [{"role": "user", "content": "go"}],
        **asking,
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

    def skip(self, payload, why, name="") -> None:  # noqa: ARG002 (the sink's protocol)
        raise AssertionError(why)

    def touch(self) -> None: ...

    def mark(self, reason) -> None: ...

    def complete(self, reason) -> bool:  # noqa: ARG002 (the sink's protocol)
        self.sealed = True
        return True

    def fail(self, reason, fault) -> bool:
        raise AssertionError(f"{reason}: {fault}")


async def ours_without_journal(target: Target, tally: Tally, run) -> None:
    import httpx

    from supervisor.dialects.openai_chat import OPENAI_CHAT
    from supervisor.dialects.reading import BodyReader

    transport = target.transport()

    async def consume(number: int) -> None:
        request = httpx.Request(
            "POST",
            f"{target.base_url}/chat/completions",
            content=target.body(number),
            headers={"Content-Type": "application/json"},
        )
        exchange = await transport.open(request)
        try:
            sink = _Count(tally)
            reader = BodyReader(OPENAI_CHAT, sink)

            def take(data: bytes) -> bool:
                reader.feed(data)
                return not sink.sealed

            assert await exchange.pump(take), "the flood ended early"
        finally:
            exchange.abort()

    await run(consume)


async def _supervised(target: Target, tally: Tally, run, *, read: bool = False, store: Any = None) -> None:
    from supervisor import open_supervisor
    from supervisor.upstream.catalog import Upstream

    transport = target.transport()
    upstream = Upstream(name="simulated", base_url=target.base_url)
    async with open_supervisor(store=store) as sup:

        async def consume(number: int) -> None:
            stream = await sup.start(upstream.source(target.body(number), transport=transport))
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


async def ours(target: Target, tally: Tally, run) -> None:
    await _supervised(target, tally, run)


async def ours_read(target: Target, tally: Tally, run) -> None:
    await _supervised(target, tally, run, read=True)


async def ours_sqlite(target: Target, tally: Tally, run) -> None:
    from supervisor import SQLiteStore

    with tempfile.TemporaryDirectory() as directory:
        await _supervised(target, tally, run, store=SQLiteStore(Path(directory) / "streams.db"))


async def raw_trio(target: Target, tally: Tally, run) -> None:
    host, port = target.base_url.split("/")[2].split(":")
    context = pacer.trusting(target.ca_pem)

    async def consume(number: int) -> None:
        content = target.body(number)
        with trio.socket.socket() as sock:
            await sock.connect((host, int(port)))
            send, receive = sock.send, sock.recv
            if context is not None:
                stream = trio.SSLStream(trio.SocketStream(sock), context, server_hostname=host)
                send, receive = stream.send_all, stream.receive_some
            await send(
                b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\n"
                b"Content-Length: %d\r\n\r\n%b" % (len(content), content)
            )
            begun = False
            while data := await receive(65536):
                tally.events += data.count(b"data: ")
                if data.endswith(handwritten.LAST_CHUNK):
                    return
                if not begun and tally.events:
                    begun = True
                    tally.live += 1

    await run(consume)


def stock_client(httpx, target: Target):
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=100)
    return httpx.AsyncClient(limits=limits, timeout=None, trust_env=False, verify=target.verify())


async def httpx_decoded(target: Target, tally: Tally, run) -> None:
    import httpx

    async with stock_client(httpx, target) as client:

        async def consume(number: int) -> None:
            job = handwritten.EventJob()
            begun = False
            async with client.stream(
                "POST", f"{target.base_url}/chat/completions", content=target.body(number)
            ) as response:
                async for data in response.aiter_raw():
                    tally.events += job.feed(data)
                    if not begun:
                        begun = True
                        tally.live += 1

        await run(consume)


async def httpx_raw(target: Target, tally: Tally, run) -> None:
    import httpx

    async with stock_client(httpx, target) as client:

        async def consume(number: int) -> None:
            begun = False
            async with client.stream(
                "POST", f"{target.base_url}/chat/completions", content=target.body(number)
            ) as response:
                async for data in response.aiter_raw():
                    tally.events += data.count(b"data: ")
                    if not begun:
                        begun = True
                        tally.live += 1

        await run(consume)


async def httpx_sse(target: Target, tally: Tally, run) -> None:
    import httpx
    from httpx_sse import aconnect_sse

    async with stock_client(httpx, target) as client:

        async def consume(number: int) -> None:
            begun = False
            async with aconnect_sse(
                client, "POST", f"{target.base_url}/chat/completions", content=target.body(number)
            ) as source:
                async for _ in source.aiter_sse():
                    tally.events += 1
                    if not begun:
                        begun = True
                        tally.live += 1

        await run(consume)


async def openai_sdk(target: Target, tally: Tally, run) -> None:
    from openai import AsyncOpenAI, DefaultAsyncHttpxClient

    async with AsyncOpenAI(
        base_url=target.base_url,
        api_key="none",
        timeout=3600,
        max_retries=0,
        http_client=DefaultAsyncHttpxClient(verify=target.verify()),
    ) as client:

        async def consume(number: int) -> None:
            begun = False
            answer = await client.chat.completions.create(
                model=target.model,
                messages=[{"role": "user", "content": "go"}],
                stream=True,
                user=str(number),
                extra_body=target.asking,
            )
            async for _ in answer:
                tally.events += 1
                if not begun:
                    begun = True
                    tally.live += 1

        await run(consume)


async def on_uvloop(target: Target, tally: Tally, run) -> None:
    host, port = target.base_url.split("/")[2].split(":")
    context = pacer.trusting(target.ca_pem)
    loop = asyncio.get_running_loop()

    async def consume(number: int) -> None:
        def took(events: int, *, first: bool) -> None:
            tally.events += events
            tally.live += first

        transport, protocol = await loop.create_connection(
            lambda: handwritten.Client(target.body(number), took),
            host,
            int(port),
            ssl=context,
        )
        try:
            await protocol.done
        finally:
            transport.abort()

    await run(consume)


RUNNERS = {
    "httpx": httpx_decoded,
    "uvloop": on_uvloop,
    "ours, SQLite": ours_sqlite,
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
    target = Target(given["base_url"], asking=given["asking"], ca_pem=given["ca_pem"])
    tally = Tally(streams=given["streams"])
    window: dict[str, float] = {}
    on_asyncio = given["contender"] in ON_ASYNCIO

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
            await contender(target, tally, paced)
            return
        # Imports, connections and caches once, outside of what is measured.
        await contender(attrs.evolve(target, asking={"flood": 1024}), tally, flood)
        tally.events = tally.live = tally.ended_events = 0
        before = time.process_time()
        await contender(target, tally, flood)
        window["cpu"] -= before

    if given["contender"] == "uvloop":
        import uvloop

        uvloop.run(main())
    elif on_asyncio:
        asyncio.run(main())
    else:
        trio.run(main)
    return {"cpu_us": 1e6 * window["cpu"] / window["events"], "live": tally.live, **window}


def main() -> None:
    options = measure.arguments(__doc__ or "", rounds=ROUNDS, parts={"load": LOADS, "wire": WIRES})
    if options.worker:
        print(json.dumps(worker(json.loads(options.worker))))
        return
    quick = options.quick
    flood_streams, flood_events = (2, 4_096) if quick else (8, 51_200)
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

    def flood(name: str, upstream: dict[str, Any], *, bulk: bool) -> dict[str, Any]:
        events = max(512, int(flood_events * FLOOD_EVENTS.get(name, 1)))
        given = {"load": "flood", "streams": flood_streams, "asking": {"flood": events, "bulk": bulk}}
        result = run(name, upstream, given)
        # Who counts `data: ` misses one that is split between two reads.
        if result["events"] < 0.999 * flood_streams * events:
            raise measure.WorkerError(f"{name} took {result['events']} of {flood_streams * events} events")
        return result

    def paced(name: str, upstream: dict[str, Any]) -> dict[str, Any]:
        given = {
            "load": "paced",
            "streams": streams,
            "asking": {},
            "start_s": 30,
            "settle_s": 0.1 if quick else 1.0,
            "window_s": window_s,
        }
        return run(name, upstream, given)

    def run(name: str, upstream: dict[str, Any], given: dict[str, Any]) -> dict[str, Any]:
        where = {"contender": name, "base_url": upstream["base_url"], "ca_pem": upstream["ca_pem"]}
        return measure.run_worker(SCRIPT, given | where, timeout_s=180)

    for wire in options.wire:
        with measure.program(
            str(Path(SCRIPT).with_name("pacer.py")),
            "--rate",
            str(rate),
            *(["--tls"] if wire == "TLS" else []),
        ) as upstream:
            for load in options.load:
                one = paced if load == "paced" else partial(flood, bulk=load == "bulk")
                runs_of = measure.in_turn(
                    contenders,
                    options.rounds,
                    lambda name, one=one, upstream=upstream: one(name, upstream),
                    only=options.only,
                )
                remarks = {}
                if load == "paced":
                    for name, runs in runs_of.items():
                        got = sum(r["events"] / r["wall"] for r in runs) / len(runs)
                        remarks[name] = f"{got:.0f} of {streams * rate} events/s taken"
                report.table(
                    f"{load}, {wire}: CPU per event",
                    "µs",
                    {name: [r["cpu_us"] for r in runs] for name, runs in runs_of.items()},
                    baseline="httpx",
                    remarks=remarks,
                )
    print()
    for wire in options.wire:
        _aims(report, wire, options.load)
    for name in CONTENDERS:
        if name not in contenders:
            report.note(f"{name} is not installed and was left out.")
    report.note("uvloop runs on asyncio and uvloop, the openai SDK on asyncio, everything else on trio.")
    report.write(options.json)


def _aims(report: measure.Report, wire: str, loads: list[str]) -> None:
    flooded, pace = f"flood, {wire}: CPU per event", f"paced, {wire}: CPU per event"
    if "paced" in loads:
        text = f"paced, {wire}: ours / "
        report.aim(f"{text}httpx at most 0.25", report.ratio(pace, "ours", "httpx"), most=0.25)
        report.aim(f"{text}uvloop at most 1.3", report.ratio(pace, "ours", "uvloop"), most=1.3)
        sqlite = report.ratio(pace, "ours, SQLite", "ours")
        report.aim(f"paced, {wire}: ours with SQLite / ours at most 1.5", sqlite, most=1.5)
    if "flood" in loads:
        text = f"flood, {wire}: ours / "
        report.aim(f"{text}httpx at most 0.2", report.ratio(flooded, "ours", "httpx"), most=0.2)
        report.aim(f"{text}uvloop at most 1.3", report.ratio(flooded, "ours", "uvloop"), most=1.3)
        sqlite = report.ratio(flooded, "ours, SQLite", "ours")
        report.aim(f"flood, {wire}: ours with SQLite / ours at most 3", sqlite, most=3)
        openai = report.ratio(flooded, "openai", "ours")
        report.aim(f"flood, {wire}: openai / ours at least 40", openai, least=40)


if __name__ == "__main__":
    sys.exit(main())
