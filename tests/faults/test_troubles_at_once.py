"""Everything goes wrong at once, in one process and through one transport: each trouble is its own stream's, and nobody else's."""

from __future__ import annotations

import json
from contextlib import asynccontextmanager

import attrs
import pytest
import trio

from supervisor import Limits, SQLiteStore, State, StoreError, Stream, Supervisor, open_supervisor
from supervisor.stores import sqlite
from supervisor.streams import supervisor as registry
from supervisor.testing.upstream import Script, SimulatedUpstream
from supervisor.upstream import StreamTransport
from supervisor.upstream.catalog import Upstream
from tests.stores.records import until

KIB, MIB = 1 << 10, 1 << 20
HEALTHY = 50
WORDS = Script(tokens=40, interval_s=0.005)
FLOOD = Script(tokens=None, events_per_write=64)
PIECES = [f"{number} ".ljust(64 * KIB, ".") for number in range(320)]
"""20 MiB of text, told in as many events."""
HIGH_WATER_BYTES = 2 * MIB
LIMITS = Limits(tail_bytes=64 * KIB, fold_bytes=64 * KIB, held_s=10)
SLACK_BYTES = 512 * KIB
"""What a turn of the reader, over which marks are not looked at, comes to in memory at most."""


def large_answer() -> Script:
    """Return one answer of 20 MiB as a body that is sent as fast as it is taken."""
    chunks = [{"choices": [{"index": 0, "delta": {"content": piece}}]} for piece in PIECES]
    chunks.append({"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]})
    body = b"".join(b"data: %b\n\n" % json.dumps(chunk).encode() for chunk in chunks) + b"data: [DONE]\n\n"
    return Script(body=body, content_type="text/event-stream")


@attrs.define
class Most:
    """The most that was held at any moment somebody looked."""

    sup: Supervisor
    store: SQLiteStore
    troubled: list[Stream] = attrs.field(factory=list)
    live_bytes: int = 0
    queue_bytes: int = 0
    stream_bytes: int = 0

    def look(self) -> None:
        self.live_bytes = max(self.live_bytes, self.sup.statistics().memory.bytes_held)
        self.queue_bytes = max(self.queue_bytes, self.store.statistics().held_bytes)
        self.stream_bytes = max([self.stream_bytes, *(one.info().bytes_held for one in self.troubled)])

    def check(self) -> None:
        """What is held is the tails, the folds, and what waits for the store: however much has gone through."""
        assert self.queue_bytes < HIGH_WATER_BYTES + SLACK_BYTES
        of_one = LIMITS.tail_bytes + LIMITS.fold_bytes + HIGH_WATER_BYTES + SLACK_BYTES
        assert self.stream_bytes < of_one
        assert self.live_bytes < of_one + HEALTHY * 32 * KIB


@attrs.define
class Scene:
    """Fifty healthy streams, and beside them a flood with a reader that stalls, and a large answer."""

    sup: Supervisor
    store: SQLiteStore
    most: Most
    healthy: list[Stream]
    flood: Stream
    answer: Stream
    texts: dict[str, str]
    """What the readers of the healthy ones have been told, by stream."""

    async def read(self, stream: Stream) -> None:
        async with stream.subscribe() as events:
            async for event in events:
                self.texts[stream.id] = self.texts.get(stream.id, "") + event.text
                self.most.look()

    async def check_healthy(self) -> None:
        """Each is complete, and its reader has been told all of it, as it is in the store."""
        for stream in self.healthy:
            assert (await stream.wait()).state is State.COMPLETED
            assert self.texts[stream.id] == WORDS.expected_text()
            assert (await stream.read_snapshot()).text == WORDS.expected_text()

    async def check_answer(self) -> None:
        outcome = await self.answer.wait()
        assert (outcome.state, outcome.reason) == (State.COMPLETED, "stop")
        assert (await self.answer.read_snapshot()).text == "".join(PIECES)


@asynccontextmanager
async def scene(path):
    """Start everything, in real time and short of it."""
    store = SQLiteStore(
        path / "streams.db", commit_interval_s=0, high_water_bytes=HIGH_WATER_BYTES, patience_s=5
    )
    scripts = {"healthy": WORDS, "flood": FLOOD, "answer": large_answer()}
    with trio.fail_after(30):
        async with (
            SimulatedUpstream(respond=lambda request: scripts[request.json()["model"]]) as up,
            open_supervisor(store=store, limits=LIMITS) as sup,
        ):
            transport = StreamTransport(trust_env=False)
            upstream = Upstream(name="sim", base_url=up.base_url)

            async def start(model: str) -> Stream:
                request = {"model": model, "messages": []}
                return await sup.start(upstream.source(request, transport=transport))

            flood, answer = await start("flood"), await start("answer")
            healthy = [await start("healthy") for _ in range(HEALTHY)]
            most = Most(sup, store, [flood, answer])
            try:
                yield Scene(sup, store, most, healthy, flood, answer, {})
            finally:
                await transport.aclose()  # noqa: ASYNC102 (it does not wait)
            await up.wait_open(0)


class Disk:
    """The room of a database: `fill` leaves it hardly any to grow by, `mend` all it wants."""

    def __init__(self, store: SQLiteStore) -> None:
        self._store = store

    def fill(self) -> None:
        pages = self._run("PRAGMA page_count")
        self._run(f"PRAGMA max_page_count = {pages + 10}")

    def mend(self) -> None:
        self._run("PRAGMA max_page_count = 1073741823")

    def _run(self, statement: str) -> int:
        return self._store._database.writer.execute(statement).fetchone()[0]


@pytest.fixture
def impatient(monkeypatch):
    """Look again at what failed, and at outcomes that are late, at once."""
    monkeypatch.setattr(sqlite, "BACKOFF_INITIAL_S", 0.001)
    monkeypatch.setattr(sqlite, "BACKOFF_MAX_S", 0.001)
    monkeypatch.setattr(registry, "_LATE_S", 0.001)


async def test_a_stalled_reader_a_flood_a_large_answer_and_a_full_disk_cost_the_healthy_nothing(
    tmp_path, impatient
):
    """Fifty complete, each reader told every word; memory stays within its limits; and each trouble ends as it is said to."""
    small = SQLiteStore(tmp_path / "small.db", commit_interval_s=0, high_water_bytes=MIB, patience_s=0.05)
    broken_limits = Limits(held_s=0.05, settle_s=0.05)
    async with (
        scene(tmp_path) as it,
        open_supervisor(store=small, limits=broken_limits) as broken,
        trio.open_nursery() as nursery,
    ):
        # A disk that is full: its stream is held back, ended, and its outcome told when there is room again.
        disk = Disk(small)
        disk.fill()

        async def chatter(out) -> None:
            while True:
                await out.send("".ljust(20_000, "."))

        unwritten = await broken.start(chatter)
        with it.flood.subscribe() as stalled:
            (first,) = await stalled.next_batch(1)  # and then no more
            for stream in it.healthy:
                nursery.start_soon(it.read, stream)
            await it.check_healthy()
            await it.check_answer()
            with pytest.raises(StoreError, match="full"):
                await unwritten.wait()
            assert unwritten.state is State.STOPPING
            it.most.look()
            it.most.check()
            assert small.statistics().held_bytes < MIB + 64 * KIB

            # The flood has gone on by itself; its reader goes on where it was, and has missed nothing.
            flooded = it.flood.tail_seq
            assert it.flood.state is State.STREAMING
            assert (await it.flood.cancel()).outcome == "won"
            assert flooded > LIMITS.tail_events
            seqs = [first.seq]
            while seqs[-1] < flooded and (batch := await stalled.next_batch(1024)):
                seqs += [event.seq for event in batch]
            assert seqs == list(range(1, len(seqs) + 1))
            assert len(seqs) >= flooded

        disk.mend()
        await until(lambda: unwritten.outcome is not None)
        assert (unwritten.outcome.state, unwritten.outcome.reason) == (State.EXPIRED, "reaped_pressure")
    assert it.sup.statistics().ended == {"cancelled": {"requested": 1}, "completed": {"stop": HEALTHY + 1}}
    assert broken.statistics().ended == {"expired": {"reaped_pressure": 1}}


async def test_a_full_disk_of_all_holds_all_back_and_loses_nothing(tmp_path, impatient):
    """With one store for all there is one queue: a flood fills it, all are held back by TCP, and all go on when there is room."""
    async with scene(tmp_path) as it, trio.open_nursery() as nursery:
        disk = Disk(it.store)
        for stream in it.healthy:
            nursery.start_soon(it.read, stream)
        await until(lambda: it.flood.tail_seq > 100)
        disk.fill()
        await until(lambda: it.store.congested and it.store.failing is not None)
        failed = it.store.statistics().failed_commits
        await until(lambda: it.store.statistics().failed_commits > failed + 10)
        it.most.look()
        assert it.sup.health().status == "degraded"
        assert it.sup.statistics().ended.get("expired") is None
        disk.mend()
        await it.check_healthy()
        await it.check_answer()
        assert (await it.flood.cancel()).outcome == "won"
        it.most.check()
    assert it.sup.statistics().ended == {"cancelled": {"requested": 1}, "completed": {"stop": HEALTHY + 1}}
