"""The public API as a user would write it, for type checkers: never run, but read by mypy and pyright, both strict.

What a checker infers where the user annotates nothing is part of the interface too: `assert_type` holds it.
"""

from __future__ import annotations

import random
import ssl
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal, assert_type

import httpx
import trio
from trio.testing import MockClock

import supervisor
import supervisor.control
import supervisor.stores
import supervisor.streams
import supervisor.testing
import supervisor.upstream
from supervisor import (
    AdmissionError,
    CancelResult,
    Choice,
    ConfigurationError,
    Cursor,
    Deadlines,
    Delta,
    Event,
    Fault,
    GapError,
    KeyConflictError,
    Limits,
    MemoryGroup,
    MemoryPolicy,
    MemoryStore,
    OnDetach,
    Outcome,
    Output,
    ReapReport,
    Snapshot,
    Source,
    SQLiteStore,
    Started,
    State,
    StoreCorruptError,
    StoreError,
    StoreLockedError,
    StoreUnavailableError,
    Stream,
    StreamInfo,
    StreamSealedError,
    Subscription,
    Supervisor,
    SupervisorClosedError,
    SupervisorError,
    ToolCall,
    ToolCallDelta,
    UnknownStreamError,
    Usage,
    open_supervisor,
)
from supervisor.dialects import Dialect, UnparseableError
from supervisor.upstream import (
    Circuit,
    CircuitPolicy,
    Circuits,
    Credential,
    HttpSource,
    RetryPolicy,
    StreamTransport,
    Upstream,
    discover,
)

# --- sources ---------------------------------------------------------------------------------------------------------


async def plain(out: Output) -> None:
    """A function is a source, and so is anything that can be called like one."""
    await out.send("text")
    await out.send(Delta(text="text", reasoning="why", tool_calls=(ToolCallDelta(index=0, name="look"),)))
    await out.send({"text": "text", "confidence": 0.9})
    out.send_nowait("more")
    out.note(model="m", tries=1)
    out.touch()
    out.nursery.start_soon(trio.sleep, 1)
    assert_type(out.id, str)
    assert_type(out.sealed, bool)
    assert_type(out.congested, bool)
    assert_type(out.finish(), bool)
    assert_type(out.finish("length"), bool)
    out.fail("provider_error", Fault(kind="overloaded", message="busy", temporary=True, retry_after_s=1.0))


async def from_a_wire(out: Output) -> None:
    out.attempt(1, cause=None, delay_s=0.0, host="example.org")
    out.connected()
    out.append(b"{}", "", (Delta(usage=Usage(input=1, output=2)),))
    out.skip(b"?", "not JSON")
    out.on_abort(lambda: None)
    out.mark("stop")
    out.flush()
    out.waiting()
    await out.flow()
    assert_type(out.complete("stop"), bool)


class Repeating:
    """A source with parameters and attributes of its own."""

    upstream = "mine"

    def __init__(self, words: Sequence[str]) -> None:
        self._words = words

    async def __call__(self, out: Output, /) -> None:
        for word in self._words:
            await out.send(word)


sources: list[Source] = [plain, from_a_wire, Repeating(["a", "b"])]


class MyReader:
    def read(self, data: bytes, event: str = "message") -> tuple[Delta, ...]:
        if event != "message":
            raise UnparseableError(event)
        return (Delta(text=data.decode()),)

    def ending(self) -> str | None:
        return None


def my_fault(status: int, body: bytes) -> Fault:
    return Fault(kind="server", message=body.decode(), status=status)


dialect = Dialect(name="mine", framing="none", reader=MyReader, fault=my_fault)
plain_dialect: Dialect = Dialect(name="plain", framing="sse", reader=MyReader)


# --- a supervisor ----------------------------------------------------------------------------------------------------


async def opening(path: Path) -> None:
    async with open_supervisor() as sup:
        assert_type(sup, Supervisor)
    async with open_supervisor(
        store=MemoryStore(max_streams=10, max_bytes=1 << 20),
        limits=Limits(max_live=10, when_full="reap_oldest", tail_events=10, finished_s=None),
        deadlines=Deadlines(connect_s=1, first_event_s=None, idle_s=0.5, total_s=60),
        memory=MemoryPolicy(
            max_age_s=60,
            stale_s=10.0,
            max_count=5,
            max_bytes=1 << 30,
            at_max_bytes="spill",
            groups=(MemoryGroup(tenant="*", labels={"plan": "free"}, max_count=3, at_max_count="reject"),),
        ),
        dialects=[dialect],
        new_id=supervisor.streams.monotonic_ids(),
    ):
        pass
    async with open_supervisor(store=SQLiteStore(path, synchronous="FULL", commit_interval_s=0.01)):
        pass
    async with open_supervisor(store=SQLiteStore(str(path))):
        pass


async def starting(sup: Supervisor) -> None:
    stream = await sup.start(plain)
    assert_type(stream, Stream)
    await sup.start(
        Repeating(["a"]),
        key="k",
        on_conflict="replace",
        on_detach=OnDetach(mode="cancel", grace_s=1),
        deadlines=Deadlines(),
        labels={"user": "ada"},
        dialect=dialect,
        upstream="mine",
        delivery="durable",
        meta={"model": "m", "n": 1},
    )
    started = sup.start_nowait(plain, key="k", on_conflict="attach")
    assert_type(started, Started)
    assert_type(started.stream, Stream)
    assert_type(started.created, bool)


async def finding(sup: Supervisor) -> None:
    assert_type(sup.get("id"), Stream)
    assert_type(sup.get_by_key("k"), Stream)
    assert_type(await sup.find("id"), Stream)
    assert_type(await sup.find(key="k"), Stream)
    infos = sup.list(
        states=[State.STREAMING, "completed"], labels={"user": "ada"}, live=True, upstream="mine"
    )
    assert_type(infos, list[StreamInfo])
    page = await sup.history(states=["failed"], before_id=infos[-1].id, limit=10)
    assert_type(page, list[StreamInfo])
    info = page[0]
    assert_type(info.key, str | None)
    assert_type(info.state, State)
    assert_type(info.labels, Mapping[str, str])
    assert_type(info.meta, Mapping[str, Any])
    assert_type(info.age_s, float)
    assert_type(info.outcome, Outcome | None)


async def ending(sup: Supervisor, stream: Stream) -> None:
    results = await sup.cancel(
        "id", reason="enough", actor="me", mode="drain", drain_s=1, drain_tokens=9, wait_s=2
    )
    assert_type(results, list[CancelResult])
    await sup.cancel(key="k")
    await sup.cancel(labels={"user": "ada"})
    await sup.cancel(all_streams=True)
    result = await stream.cancel(reason="enough", actor="me", mode="abort")
    await stream.cancel(mode=None, drain_tokens=None)
    assert_type(result, CancelResult)
    assert_type(result.outcome, Literal["won", "already_terminal", "requested", "tombstoned"])
    assert_type(result.state, State | None)
    report = await sup.reap(dry_run=True)
    assert_type(report, ReapReport)
    assert_type([(one.id, one.reason, one.age_s) for one in report.reaped], list[tuple[str, str, float]])
    assert_type(await sup.drain(timeout_s=1), int)
    await sup.shutdown(grace_s=1)


def telling(sup: Supervisor) -> None:
    figures = sup.statistics()
    assert_type(figures, supervisor.streams.SupervisorStatistics)
    assert_type(figures.ended, Mapping[str, Mapping[str, int]])
    assert_type(figures.store.pending_bytes, int)
    assert_type(figures.memory.bytes_held, int)
    assert_type(figures.memory.tenants, Mapping[str, supervisor.streams.PoolStatistics])
    held = supervisor.streams.Holder(held=lambda: 0)
    sup.memory.register("a cache", held)
    health = sup.health()
    assert_type(health.status, Literal["ok", "degraded", "draining"])
    assert_type(health.problems, tuple[str, ...])
    assert_type(health.circuits, Mapping[str, Mapping[str, Any]])


# --- a stream --------------------------------------------------------------------------------------------------------


async def reading(stream: Stream) -> None:
    with stream.subscribe() as events:
        assert_type(events, Subscription)
        async for event in events:
            assert_type(event, Event)
            assert_type((event.epoch, event.seq, event.at), tuple[int, int, float])
            assert_type((event.kind, event.payload, event.text), tuple[str, bytes, str])
        assert_type(events.cursor, Cursor)
        assert_type(events.at_end, bool)
        cursor = events.cursor
    async with stream.subscribe(after=cursor, max_batch=10) as events:
        batch = await events.next_batch(5)
        assert_type(batch, Sequence[Event])
        assert_type(events.take_nowait(), Sequence[Event] | None)
        events.wake = trio.Event().set
        events.close()
    with stream.subscribe(after="snapshot") as events:
        assert_type(events.first_snapshot, Snapshot | None)
    stream.subscribe(after="tail")
    stream.subscribe(after=Cursor(1, 0))


async def looking(stream: Stream) -> None:
    assert_type((stream.id, stream.key, stream.created_at), tuple[str, str | None, float])
    assert_type((stream.upstream, stream.dialect), tuple[str | None, str])
    assert_type(stream.labels, Mapping[str, str])
    assert_type(stream.state, State)
    assert_type((stream.epoch, stream.tail_seq), tuple[int, int])
    assert_type(stream.info(), StreamInfo)
    await stream.recorded()
    outcome = await stream.wait()
    assert_type(outcome, Outcome)
    assert_type((outcome.state, outcome.reason, outcome.actor), tuple[State, str, str | None])
    assert_type(outcome.fault, Fault | None)
    assert_type(outcome.usage, Usage | None)
    assert_type(outcome.duration_s, float)
    assert_type(Outcome.from_json(outcome.to_json()), Outcome)
    assert_type(stream.outcome, Outcome | None)
    snapshot = stream.snapshot()
    assert_type(snapshot, Snapshot)
    assert_type(await stream.read_snapshot(), Snapshot)
    assert_type(snapshot.text, str)
    assert_type(snapshot.tool_calls, tuple[ToolCall, ...])
    assert_type(snapshot.choices, tuple[Choice, ...])
    if outcome.state is State.COMPLETED:
        assert_type(snapshot.finish_reason, str | None)


async def errors(sup: Supervisor) -> None:
    try:
        await sup.start(plain)
    except AdmissionError as error:
        assert_type((error.live, error.limit, error.retry_after_s), tuple[int, int, float])
    except KeyConflictError as error:
        assert_type((error.key, error.stream_id, error.state), tuple[str, str, str])
    except GapError as error:
        assert_type((error.epoch, error.earliest_seq, error.tail_seq), tuple[int, int, int])
    except ConfigurationError as error:
        assert_type((error.field, error.value, error.expected), tuple[str, object, str])
    except UnknownStreamError as error:
        assert_type((error.stream_id, error.key), tuple[str | None, str | None])
    except StoreUnavailableError as error:
        assert_type(error.retry_after_s, float)
    except (StoreLockedError, StoreCorruptError) as error:
        assert_type(error, StoreLockedError | StoreCorruptError)
    except (StreamSealedError, SupervisorClosedError, StoreError) as error:
        assert_type(error, StreamSealedError | SupervisorClosedError | StoreError)
    except SupervisorError as error:
        assert_type(error, SupervisorError)


# --- HTTP ------------------------------------------------------------------------------------------------------------


async def http(sup: Supervisor) -> None:
    transport = StreamTransport(ssl_context=ssl.create_default_context(), proxy="http://proxy:3128", idle_s=5)
    upstream = Upstream(
        name="mine",
        base_url="https://example.org/v1",
        dialect="openai-chat",
        credential=Credential.from_env("MY_KEY"),
        headers={"x-team": "ours"},
        retry=RetryPolicy(attempts=2, wait_initial_s=0.1, statuses=[429, 503]),
        deadlines=Deadlines(idle_s=5),
    )
    Credential.from_file(Path("key"), header="x-api-key")
    assert_type(discover({"OPENAI_API_KEY": "x"}), list[Upstream])
    source = upstream.source({"model": "m", "messages": []}, transport=transport)
    assert_type(source, HttpSource)
    await sup.start(source, key="k")
    circuits = Circuits(CircuitPolicy(max_failures=3, decay_s=60, backoff_s=5.0))
    upstream.source({}, transport=transport, circuits=circuits.of)
    assert_type(circuits.of("mine"), Circuit)
    async with open_supervisor(circuits=circuits.report):
        pass
    await sup.start(HttpSource(upstream, b"{}", transport=transport, retry=RetryPolicy(attempts=1)))
    exchange = await transport.open(httpx.Request("POST", upstream.url))
    assert_type(exchange, supervisor.upstream.Exchange)
    assert_type((exchange.status, await exchange.receive()), tuple[int, bytes])
    exchange.abort()
    await exchange.aclose()
    assert_type(transport.statistics().open, int)
    async with httpx.AsyncClient(transport=transport) as client:
        await client.get("https://example.org")


# --- the control channel ---------------------------------------------------------------------------------------------


async def serving(sup: Supervisor) -> None:
    def resolve(params: supervisor.control.StartParams) -> supervisor.control.Resolved:
        return supervisor.control.Resolved(source=Repeating([params.upstream]), deadlines=Deadlines())

    limits = supervisor.control.ControlLimits(
        max_connections=2,
        link=supervisor.control.LinkLimits(stall_s=1),
        session=supervisor.control.SessionLimits(max_requests=4),
    )
    server = supervisor.control.ControlServer(sup, resolve=resolve, limits=limits, token="t" * 32, origins=())
    async with trio.open_nursery() as nursery:
        await nursery.start(server.run, "127.0.0.1", 0)
        assert_type(server.statistics(), supervisor.control.ControlStatistics)
        ports = await nursery.start(partial(supervisor.control.serve, sup, resolve=resolve))
        assert_type(ports, Any)


async def controlling() -> None:
    async with supervisor.control.connect("ws://127.0.0.1:7433", token="t" * 32, reconnect=True) as client:
        assert_type(client, supervisor.control.ControlClient)
        started = await client.start(
            "openai",
            {"model": "m", "messages": []},
            key="k",
            on_conflict="attach",
            on_detach=supervisor.control.OnDetachMessage(mode="cancel", grace_s=5),
            deadlines=supervisor.control.DeadlinesMessage(idle_s=5),
            retry=supervisor.control.RetryMessage(attempts=1),
            labels={"user": "ada"},
            delivery="durable",
        )
        assert_type(started, supervisor.control.StartResult)
        async with client.subscribe(started.id, after="start", view="text") as events:
            assert_type(events, supervisor.control.EventStream)
            async for event in events:
                assert_type(event, supervisor.control.EventMessage)
                assert_type(supervisor.control.payload_of(event), bytes)
        client.subscribe(key="k", after=Cursor(1, 5), view="events", window=10)
        assert_type(await client.cancel(started.id, reason="enough"), supervisor.control.CancelResultMessage)
        assert_type(await client.wait(started.id), Outcome | None)
        assert_type(await client.get(key="k"), supervisor.control.StreamMessage)
        listed = await client.list(states=["failed"], labels={"user": "ada"}, limit=10)
        assert_type(listed, supervisor.control.ListResult)
        assert_type(await client.reap(dry_run=True), supervisor.control.ReapResult)
        many = await client.cancel_many(labels={"user": "ada"}, mode="drain", drain_tokens=100)
        assert_type(many, tuple[supervisor.control.CancelResultMessage, ...])
        assert_type(await client.snapshot(started.id), supervisor.control.SnapshotMessage)
        assert_type(await client.stats(), dict[str, Any])
        assert_type(await client.health(), dict[str, Any])
        assert_type(await client.hello(), supervisor.control.HelloResult)
        assert_type(await client.drain(timeout_s=1), int)
        assert_type((await client.shutdown(grace_s=1)).accepted, bool)


# --- testing ---------------------------------------------------------------------------------------------------------


async def simulated() -> None:
    script = supervisor.testing.Script(tokens=3, interval_s=0.1)
    async with supervisor.testing.SimulatedUpstream(default=script) as provider:
        assert_type(provider, supervisor.testing.SimulatedUpstream)
        assert_type(provider.base_url, str)
        provider.enqueue(supervisor.testing.Script(tokens=None))
        await provider.connections[0].wait_closed()
        assert_type([request.method for request in provider.requests], list[str])


async def program(count: int) -> int:
    await trio.sleep(count)
    return count


def exploring() -> None:
    bounds = supervisor.testing.Bounds(max_runs=10, max_seconds=1, max_preemptions=2)
    seen = supervisor.testing.explore(program, 1, bounds=bounds, search="depth-first", state=lambda: ())
    assert_type(seen, supervisor.testing.Exploration)
    assert_type((seen.runs, seen.exhaustive, seen.complete), tuple[int, bool, bool])
    assert_type(supervisor.testing.run(program, 1, schedule=[0, 1], clock=MockClock), int)
    assert_type(supervisor.testing.run_drawn(program, 1, draw=random.Random(7).randrange), int)
    try:
        supervisor.testing.run(program, 1)
    except supervisor.testing.ScheduleFailure as failure:
        assert_type(failure.schedule, list[int])


stores: list[supervisor.stores.Store] = [MemoryStore(), SQLiteStore("streams.db")]
