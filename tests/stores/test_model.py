"""The SQLite store against the store in memory: whatever is done to both, both tell the same, over restarts too."""

from __future__ import annotations

import queue
import tempfile
import threading
from pathlib import Path

import trio
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, initialize, rule

from supervisor.errors import StoreError
from supervisor.stores import Event, Keep, MemoryStore, Retention, SQLiteStore, StoredStream, segments

STATES = ("completed", "failed", "cancelled")


KEEPS = st.fixed_dictionaries(
    {},
    optional={"max_ended": st.integers(0, 4), "max_age_s": st.integers(0, 6), "max_bytes": st.just(1 << 30)},
)


class _Loop:
    """A trio loop in a thread, for a state machine whose rules are plain functions."""

    def __init__(self) -> None:
        tokens: queue.Queue[trio.lowlevel.TrioToken] = queue.Queue()

        async def main() -> None:
            self._stop = trio.Event()
            async with trio.open_nursery() as self.nursery:
                tokens.put(trio.lowlevel.current_trio_token())
                await self._stop.wait()

        self._thread = threading.Thread(target=trio.run, args=(main,))
        self._thread.start()
        self._token = tokens.get()

    def run(self, function, *args):
        return trio.from_thread.run(function, *args, trio_token=self._token)

    def stop(self) -> None:
        trio.from_thread.run_sync(self._stop.set, trio_token=self._token)
        self._thread.join()


class Stores(RuleBasedStateMachine):
    """Each rule is done to both stores and their answers compared; `durable` makes both see it."""

    ids = Bundle("ids")

    def __init__(self) -> None:
        super().__init__()
        self.loop = _Loop()
        self.directory = tempfile.TemporaryDirectory()
        self.model = MemoryStore()
        self.last: dict[str, int] = {}
        self.epochs: dict[str, int] = {}
        self.created = 0

    @initialize(page=st.sampled_from([1, 200, 256 << 10]), commit=st.sampled_from([1, 256 << 10]))
    def start(self, page, commit):
        """Segments and batches of very different sizes."""
        self.segment_bytes, segments.SEGMENT_BYTES = segments.SEGMENT_BYTES, page
        self.commit_bytes = commit
        self.loop.run(self.open)
        self.loop.run(self.loop.nursery.start, self.model.run)

    async def open(self) -> None:
        path = Path(self.directory.name) / "store.db"
        self.store = SQLiteStore(path, commit_interval_s=0, commit_bytes=self.commit_bytes)
        self.scope = await self.loop.nursery.start(self.run_store)

    async def run_store(self, *, task_status) -> None:
        with trio.CancelScope() as scope:
            async with trio.open_nursery() as nursery:
                await nursery.start(self.store.run)
                task_status.started(scope)

    def both(self, call, stream_id: str | None = None) -> None:
        """Do a write to both; either both take it or both refuse it at once, and it becomes durable."""

        async def do() -> None:
            refused = []
            for store in (self.model, self.store):
                try:
                    call(store)
                except StoreError:
                    refused.append(store)
            assert refused in ([], [self.model, self.store])
            if not refused and stream_id is not None:
                await self.store.wait_durable(stream_id, self.last[stream_id])
                assert self.last[stream_id] == self.store.durable_seq(stream_id)

        self.loop.run(do)

    def ask(self, call) -> object:
        """Ask both; return the answer, which is the same."""

        async def do() -> object:
            ours, theirs = await call(self.store), await call(self.model)
            assert theirs == ours if not isinstance(ours, list) else list(theirs) == ours
            return ours

        return self.loop.run(do)

    @rule(
        target=ids,
        prefix=st.sampled_from(["a", "b", "Ä", "a\0"]),
        key=st.sampled_from([None, "", "k", "ü"]),
        tenant=st.sampled_from([None, "", "acme", "ß"]),
    )
    def create(self, prefix, key, tenant):
        self.created += 1
        stream_id = f"{prefix}{self.created}"
        self.last[stream_id], self.epochs[stream_id] = 0, 1
        stream = StoredStream(
            id=stream_id, key=key, tenant=tenant, created_at=self.created / 3, head=stream_id.encode()
        )
        self.both(lambda store: store.create(stream), stream_id)
        return stream_id

    @rule(
        stream_id=ids,
        payloads=st.lists(st.binary(max_size=300), min_size=1, max_size=6),
        kind=st.sampled_from(["data", "skipped", "note"]),
        name=st.sampled_from(["", "delta", "ß"]),
        at=st.floats(0, 2e9),
        turn=st.booleans(),
    )
    def append(self, stream_id, payloads, *, kind, name, at, turn):
        first, epoch = self.last[stream_id] + 1, self.epochs[stream_id]
        written = [
            Event(epoch + (turn and index > 1), first + index, at, kind if index else "data", payload, name)
            for index, payload in enumerate(payloads)
        ]
        if self.is_live(stream_id):
            self.last[stream_id] += len(written)
            self.epochs[stream_id] = written[-1].epoch
        self.both(lambda store: store.append(stream_id, written), stream_id)

    @rule(stream_id=ids, state=st.sampled_from(STATES), ended_at=st.integers(0, 5))
    def end(self, stream_id, state, ended_at):
        event = Event(self.epochs[stream_id], self.last[stream_id] + 1, 1.0, "outcome", state.encode())
        if self.is_live(stream_id):
            self.last[stream_id] += 1
        self.both(lambda store: store.end(stream_id, event, state=state, ended_at=float(ended_at)), stream_id)

    @rule(stream_id=ids, off=st.sampled_from([-1, 1]))
    def out_of_line(self, stream_id, off):
        event = Event(1, self.last[stream_id] + 1 + off, 1.0, "data", b"")
        self.both(lambda store: store.append(stream_id, [event]))

    def is_live(self, stream_id: str) -> bool:
        position = self.model._positions.get(stream_id)
        return position is not None and not position.ended

    @rule(stream_id=ids)
    def forget(self, stream_id):
        if not self.is_live(stream_id):
            self.both(lambda store: store.forget(stream_id))

    @rule(
        stream_id=ids,
        after=st.integers(0, 12),
        limit=st.integers(0, 9),
        max_bytes=st.sampled_from([1, 700, 1 << 20]),
    )
    def read(self, stream_id, after, limit, max_bytes):
        async def everything(store):
            found = []
            while page := await store.read(stream_id, after_seq=found[-1].seq if found else 0, limit=5):
                found += page
            return found

        self.ask(lambda store: store.read(stream_id, after_seq=after, limit=limit, max_bytes=max_bytes))
        self.ask(everything)

    @rule(stream_id=ids, key=st.sampled_from(["", "k", "ü", "nobody"]))
    def get(self, stream_id, key):
        self.ask(lambda store: store.get(stream_id=stream_id))
        self.ask(lambda store: store.get(key=key))

    @rule(
        before=st.none() | ids,
        states=st.none() | st.lists(st.sampled_from([*STATES, "expired"])),
        limit=st.integers(0, 5),
    )
    def list(self, before, states, limit):
        self.ask(lambda store: store.list(before_id=before, states=states, limit=limit))
        self.ask(lambda store: store.unfinished())

    @rule(
        whole=KEEPS,
        each=KEEPS,
        named=st.dictionaries(
            st.sampled_from(["", "acme"]), KEEPS.map(lambda kept: Keep(**kept)), max_size=1
        ),
        now=st.integers(0, 8).map(float),
        limit=st.integers(0, 3),
        dry_run=st.booleans(),
    )
    def prune(self, *, whole, each, named, now, limit, dry_run):
        """Both remove, or would remove, as many by each rule; bytes are counted by each store in its own way."""
        retention = Retention(**whole, tenant=Keep(**each), tenants=named)

        async def do(store):
            report = await store.prune(retention, now=now, limit=limit, dry_run=dry_run)
            return {rule: removed.streams for rule, removed in report.rules.items()}, report.complete

        self.ask(do)

    @rule(closed=st.booleans())
    def reopen(self, closed):
        """Start anew, after a close or a cancel: what was durable is there, and ended streams are no longer written."""

        async def do() -> None:
            if closed:
                await self.store.aclose()
            else:
                self.scope.cancel()
                await self.store._closed.wait()
            await self.open()
            for stream_id in self.last:
                if not self.is_live(stream_id):
                    self.model.forget(stream_id)

        self.loop.run(do)

    def teardown(self) -> None:
        async def do() -> None:
            await self.model.aclose()
            await self.store.aclose()

        if hasattr(self, "store"):
            self.loop.run(do)
            segments.SEGMENT_BYTES = self.segment_bytes
        self.loop.stop()
        self.directory.cleanup()


TestStores = Stores.TestCase
TestStores.settings = settings(
    max_examples=25, stateful_step_count=25, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
