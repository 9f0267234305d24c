"""The store in SQLite: reading back by cursor, bytes an event, and how far the writer falls behind.

- **Reading back**: events/s of `read` in pages of 1024 events, stream after stream, from `Store.read` to the list of `Event`
  that it returns, by the wall clock and warm. Two histories: one of a flood, where a commit has hundreds of events of a stream,
  and one written at a pace, where each commit has one event of each of 200 streams; such a history is in as many pieces as it
  has events. `ours` is `SQLiteStore`; `a row an event` is the table that one would write without it (`WITHOUT ROWID`, keyed by
  stream and seq, the other fields in columns), read in the same pages through the same thread into the same `Event`; `ours, with
  text` is what a subscriber to a stored stream gets: the text of each event is derived from its payload once more.
- **Bytes an event**: the file after a checkpoint, divided by the events in it; `payload` is what was to be stored.
- **Lag**: 20,000 events/s, from 200 streams, each event appended at its own time. An event is due to be committed one commit
  interval after it was appended; the figure is how much later than that its commit was over, at worst. `ours` is the store alone
  with a writer of events beside it; `ours, consuming` is the whole supervisor that reads the 20,000 events/s (400 streams of
  50/s) from `pacer.py`.
"""

from __future__ import annotations

import json
import sqlite3
import sys
import tempfile
import time
from collections import deque
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import consume
import measure
import trio

from supervisor import Cursor, Event, SQLiteStore, open_supervisor
from supervisor.dialects.openai_chat import OPENAI_CHAT
from supervisor.stores import StoredStream
from supervisor.streams.journal import Journal
from supervisor.upstream.catalog import Upstream

SCRIPT = __file__
HISTORIES = ("flood", "paced")
READERS = ("a row an event", "ours", "ours, with text")
WRITERS = ("ours", "ours, consuming")
ROUNDS = 5
PAGE = 1024
INTERVAL_S = 0.02
EVENTS_PER_S = 20_000


def payload(number: int) -> bytes:
    choice = {"index": 0, "delta": {"content": f"w{number} "}, "finish_reason": None}
    chunk = {
        "id": "chatcmpl-store",
        "object": "chat.completion.chunk",
        "created": 1_700_000_000,
        "model": "store",
        "choices": [choice],
    }
    return json.dumps(chunk, separators=(",", ":")).encode()


def event(seq: int) -> Event:
    return Event(1, seq, 1_700_000_000 + seq / 50, "data", payload(seq))


# --- the two kinds of table ------------------------------------------------------------------------------------------


class Rows:
    """A table with a row an event, as far as this benchmark needs one."""

    def __init__(self, path: Path) -> None:
        self.connection = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
        self.connection.executescript(
            "PRAGMA journal_mode = WAL; PRAGMA synchronous = NORMAL;"
            "CREATE TABLE events (stream TEXT, seq INTEGER, epoch INTEGER, at REAL, kind TEXT, payload BLOB, name TEXT,"
            " PRIMARY KEY (stream, seq)) WITHOUT ROWID"
        )
        self.limiter = trio.CapacityLimiter(1)

    def write(self, batch: Sequence[tuple[str, Sequence[Event]]]) -> None:
        rows = (
            (stream, e.seq, e.epoch, e.at, e.kind, e.payload, e.name)
            for stream, events in batch
            for e in events
        )
        self.connection.execute("BEGIN")
        self.connection.executemany("INSERT INTO events VALUES (?, ?, ?, ?, ?, ?, ?)", rows)
        self.connection.execute("COMMIT")

    def page(self, stream: str, after_seq: int) -> list[Event]:
        rows = self.connection.execute(
            "SELECT epoch, seq, at, kind, payload, name FROM events WHERE stream = ? AND seq > ? ORDER BY seq LIMIT ?",
            (stream, after_seq, PAGE),
        )
        return [Event(*row) for row in rows]

    async def read(self, stream: str, after_seq: int) -> list[Event]:
        return await trio.to_thread.run_sync(self.page, stream, after_seq, limiter=self.limiter)


def batches(history: str, streams: int, events: int):
    """Yield what each commit writes: `(stream, events)`, of all streams."""
    names = [f"s{number:06}" for number in range(streams)]
    size = 1 if history == "paced" else 256
    for first in range(1, events + 1, size):
        run = [event(seq) for seq in range(first, min(first + size, events + 1))]
        if history == "paced":
            yield [(name, run) for name in names]
        else:
            for name in names:
                yield [(name, run)]


async def _write_ours(store: SQLiteStore, given: dict[str, Any]) -> list[str]:
    """Write a history; return the names of its streams."""
    names: dict[str, int] = {}
    for batch in batches(given["history"], given["streams"], given["events"]):
        for name, events in batch:
            if name not in names:
                store.create(StoredStream(id=name, key=None, created_at=0.0, head=b"{}"))
            names[name] = events[-1].seq
            store.append(name, events)
        await store.wait_durable(name, names[name])
    return list(names)


async def _pages(read: Callable[[str, int], Any], names: Sequence[str]) -> int:
    count = 0
    for name in names:
        seq = 0
        while page := await read(name, seq):
            count += len(page)
            seq = page[-1].seq
    return count


async def _timed(read: Callable[[str, int], Any], names: Sequence[str], events: int) -> float:
    """Return events/s of the second of two passes: the first one warms up."""
    for _ in range(2):
        began = time.perf_counter()
        count = await _pages(read, names)
        took = time.perf_counter() - began
    assert count == events, (count, events)
    return events / took


async def _read(store: SQLiteStore, name: str, seq: int) -> Sequence[Event]:
    return await store.read(name, after_seq=seq, limit=PAGE)


async def _fetch(journals: dict[str, Journal], name: str, seq: int) -> Sequence[Event]:
    journal = journals[name]
    return () if seq == journal.visible_seq else await journal.fetch(Cursor(1, seq), PAGE)


def _journal(name: str, store: SQLiteStore, last_seq: int) -> Journal:
    """Return the journal of a stream that has ended, as a subscriber reads it."""
    journal = Journal(name, store, dialect=OPENAI_CHAT, tail_events=PAGE, tail_bytes=1 << 18)
    journal.restore(last_seq=last_seq, epoch_starts=((1, 1),))
    return journal


async def reading(given: dict[str, Any], path: Path) -> dict[str, Any]:
    total = given["streams"] * given["events"]
    if given["contender"] == "a row an event":
        rows = Rows(path)
        names = [f"s{number:06}" for number in range(given["streams"])]
        for batch in batches(given["history"], given["streams"], given["events"]):
            rows.write(batch)
        rate = await _timed(rows.read, names, total)
        rows.connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        rows.connection.close()
    else:
        store = SQLiteStore(path, commit_interval_s=INTERVAL_S)
        async with trio.open_nursery() as nursery:
            await nursery.start(store.run)
            names = await _write_ours(store, given)
            read = partial(_read, store)
            if given["contender"] == "ours, with text":
                read = partial(_fetch, {name: _journal(name, store, given["events"]) for name in names})
            rate = await _timed(read, names, total)
            await store.aclose()
    return {"events_per_s": rate, "total": total}


# --- lag -------------------------------------------------------------------------------------------------------------


class Watched(SQLiteStore):
    """A store that notes how long each record took to become durable."""

    def __init__(self, path: Path) -> None:
        super().__init__(path, commit_interval_s=INTERVAL_S)
        self.enqueued: deque[float] = deque()
        self.watching = False
        self.lags: list[float] = []

    def _enqueue(self, write: Any) -> None:
        self.enqueued.append(time.monotonic())
        super()._enqueue(write)

    def _done(self, writes: Sequence[Any]) -> None:
        super()._done(writes)
        now = time.monotonic()
        stamps = [self.enqueued.popleft() for _ in writes]
        if self.watching:
            self.lags += [now - stamp for stamp in stamps]


async def lagging(given: dict[str, Any], path: Path) -> dict[str, Any]:
    store = Watched(path)
    began = [0.0]

    async def watch() -> None:
        await trio.sleep(given["settle_s"])
        store.watching, began[0] = True, time.monotonic()
        before = store.statistics()
        await trio.sleep(given["window_s"])
        store.watching = False
        after = store.statistics()
        took = time.monotonic() - began[0]
        told["events_per_s"] = (after.committed_records - before.committed_records) / took
        told["commits_per_s"] = (after.commits - before.commits) / took

    told: dict[str, Any] = {}
    if given["contender"] == "ours":
        async with trio.open_nursery() as nursery:
            await nursery.start(store.run)
            async with trio.open_nursery() as writing:
                writing.start_soon(_append, store, given["events_per_s"])
                await watch()
                writing.cancel_scope.cancel()
            await store.aclose()
    else:
        await _consume(store, given, watch)
    late = [1e3 * (lag - INTERVAL_S) for lag in store.lags]
    return told | {"worst_ms": max(late), "p50_ms": measure.percentile(late, 50)}


async def _append(store: SQLiteStore, per_s: int) -> None:
    """Append events of 200 streams in turn, each at its time."""
    names = [f"s{number:06}" for number in range(200)]
    for name in names:
        store.create(StoredStream(id=name, key=None, created_at=0.0, head=b"{}"))
    began, count = trio.current_time(), 0
    while True:
        due = int((trio.current_time() - began) * per_s)
        for number in range(count, due):
            seq, which = divmod(number, len(names))
            store.append(names[which], [event(seq + 1)])
        count = due
        await trio.sleep(0.0005)


async def _consume(store: SQLiteStore, given: dict[str, Any], watch: Callable[[], Any]) -> None:
    rate = 50
    streams = given["events_per_s"] // rate
    with measure.program(str(Path(SCRIPT).with_name("pacer.py")), "--rate", str(rate)) as pacer:
        target = consume.Target(pacer["base_url"])
        upstream, transport = Upstream(name="pacer", base_url=target.base_url), target.transport()
        async with open_supervisor(store=store) as sup:
            started = [
                await sup.start(upstream.source(target.body(number), transport=transport))
                for number in range(streams)
            ]
            while not all(stream.tail_seq > 1 for stream in started):  # noqa: ASYNC110 (once, before anything is measured)
                await trio.sleep(0.05)
            await watch()
            await sup.shutdown()


def worker(given: dict[str, Any]) -> dict[str, Any]:
    measure.raise_descriptor_limit()
    with tempfile.TemporaryDirectory() as directory:
        job = lagging if given["part"] == "lag" else reading
        path = Path(directory) / "streams.db"
        told: dict[str, Any] = trio.run(job, given, path)
        if "total" in told:
            told["bytes"] = path.stat().st_size / told["total"]
        return told


def main() -> None:
    options = measure.arguments(__doc__ or "", rounds=ROUNDS, parts={"part": (*HISTORIES, "lag")})
    if options.worker:
        print(json.dumps(worker(json.loads(options.worker))))
        return
    quick = options.quick
    sizes = (
        {"flood": (4, 2560), "paced": (20, 100)} if quick else {"flood": (20, 10_240), "paced": (200, 500)}
    )
    per_s, window_s = (1000, 0.5) if quick else (EVENTS_PER_S, 5.0)
    report = measure.Report(
        "store",
        quick,
        {"rounds": options.rounds, "page": PAGE, "lag": {"events_per_s": per_s, "window_s": window_s}},
    )

    def run(name: str, given: dict[str, Any]) -> dict[str, Any]:
        return measure.run_worker(SCRIPT, given | {"contender": name}, timeout_s=180)

    for history in HISTORIES:
        if history not in options.part:
            continue
        streams, events = sizes[history]
        given = {"part": "read", "history": history, "streams": streams, "events": events}
        results = measure.in_turn(READERS, options.rounds, partial(run, given=given), only=options.only)
        report.table(
            f"reading back, {history}",
            "events/s",
            {name: [r["events_per_s"] for r in runs] for name, runs in results.items()},
            baseline="a row an event",
        )
        mean = sum(len(payload(seq)) for seq in range(1, events + 1)) / events
        rows = {name: [r["bytes"] for r in runs] for name, runs in results.items() if "text" not in name}
        report.table(
            f"bytes an event, {history}",
            "B",
            {"payload": [mean] * options.rounds, **rows},
            baseline="payload",
        )
    if "lag" in options.part:
        given = {
            "part": "lag",
            "events_per_s": per_s,
            "settle_s": 0.2 if quick else 1.0,
            "window_s": window_s,
        }
        results = measure.in_turn(WRITERS, options.rounds, partial(run, given=given), only=options.only)
        remarks = {}
        for name, runs in results.items():
            events_per_s = sum(r["events_per_s"] for r in runs) / len(runs)
            commits = sum(r["commits_per_s"] for r in runs) / len(runs)
            remarks[name] = f"{events_per_s:.0f} of {per_s} events/s, {commits:.0f} commits/s"
        for label, field in (("worst", "worst_ms"), ("p50", "p50_ms")):
            report.table(
                f"commit over after it was due at {per_s} events/s, {label}",
                "ms",
                {name: [r[field] for r in runs] for name, runs in results.items()},
                baseline="ours",
                remarks=remarks if label == "worst" else None,
            )
    print()
    for history in HISTORIES:
        if history in options.part:
            report.aim(
                f"reading back, {history}, at least 500000 events/s",
                report.median(f"reading back, {history}", "ours"),
                least=500_000,
            )
    if "lag" in options.part:
        for name in WRITERS:
            worst = report.median(f"commit over after it was due at {per_s} events/s, worst", name)
            report.aim(
                f"{name}: never more than one commit interval behind at {per_s} events/s, in intervals at most 1",
                None if worst is None else worst / (1e3 * INTERVAL_S),
                most=1,
            )
    report.write(options.json)


if __name__ == "__main__":
    sys.exit(main())
