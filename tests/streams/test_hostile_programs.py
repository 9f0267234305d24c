"""Sources, readers, stores and callers that misbehave: each hurts only itself, and nothing hangs."""

from __future__ import annotations

import signal

import pytest
import trio

from supervisor import (
    AdmissionError,
    ConfigurationError,
    Cursor,
    Deadlines,
    Delta,
    Fault,
    Limits,
    MemoryPolicy,
    MemoryStore,
    SQLiteStore,
    State,
    StoreCorruptError,
    StoreError,
    Usage,
    open_supervisor,
)
from supervisor.stores import Event, StoredStream
from supervisor.streams import monotonic_ids

from .gated import GatedStore


async def silent(out):
    await trio.sleep_forever()


async def words(out):
    for word in ("one ", "two ", "three"):
        await out.send(word)


class UnspeakableError(Exception):
    def __str__(self) -> str:
        raise RuntimeError("no text")


async def raises_surrogates(out):
    raise ValueError("bad name \udcff")


async def raises_what_cannot_be_told(out):
    raise UnspeakableError


async def finishes_with_no_reason(out):
    out.finish(object())
    await trio.sleep_forever()


async def fails_with_odd_text(out):
    out.fail("provider_error", Fault(kind="server", message="\udcff" * 10_000, code="\ud800"))
    await trio.sleep_forever()


async def sends_what_is_no_delta(out):
    await out.send(Delta(text=5, usage=Usage(input="many")))


async def raises_megabytes(out):
    raise ValueError("m" * 5_000_000)


# --- one stream's oddity is its own ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "source",
    [
        raises_surrogates,
        raises_what_cannot_be_told,
        finishes_with_no_reason,
        fails_with_odd_text,
        sends_what_is_no_delta,
        raises_megabytes,
    ],
)
async def test_an_odd_ending_is_that_streams_alone(tmp_path, caplog, source):
    """It is failed, with an outcome that can be stored and read again; its neighbour completes."""
    path = tmp_path / "s.db"
    # A report with surrogates in it cannot be sent between the workers of pytest.
    caplog.set_level("CRITICAL", logger="supervisor")
    with trio.fail_after(20):
        async with open_supervisor(store=SQLiteStore(path)) as sup:
            go = trio.Event()

            async def neighbour(out):
                await go.wait()

            good = await sup.start(neighbour)
            bad = await sup.start(source)
            outcome = await bad.wait()
            go.set()
            assert (await good.wait()).state is State.COMPLETED
        assert outcome.state is State.FAILED
        assert len(outcome.to_json()) < 20_000
        async with open_supervisor(store=SQLiteStore(path)) as sup:
            assert (await sup.find(bad.id)).outcome == outcome


async def test_the_seal_of_another_stream_is_an_error_like_any_other():
    """A source that writes to a stream that has ended, not its own, has failed."""
    outs = []

    async def other(out):
        outs.append(out)
        await trio.sleep_forever()

    async def tee(out):
        stream = await sup.start(other)
        await trio.testing.wait_all_tasks_blocked()
        await stream.cancel()
        await outs[0].send("x")

    with trio.fail_after(20):
        async with open_supervisor() as sup:
            outcome = await (await sup.start(tee)).wait()

    async def finished_tee(out):
        out.finish()
        outs[0].send_nowait("x")

    assert (outcome.state, outcome.reason) == (State.FAILED, "source_error")
    assert "StreamSealedError" in outcome.message
    async with open_supervisor() as sup:
        outcome = await (await sup.start(finished_tee)).wait()
    assert outcome.state is State.COMPLETED
    assert "StreamSealedError" in outcome.cleanup_error


@pytest.mark.parametrize("text", [5, object(), b"x"])
async def test_a_caller_that_gives_no_text_is_told_so(text):
    """A reason or an actor that is no text is refused before anything is stopped."""
    with trio.fail_after(20):
        async with open_supervisor() as sup:
            stream = await sup.start(silent)
            with pytest.raises(ConfigurationError, match="actor"):
                await stream.cancel(actor=text)
            with pytest.raises(ConfigurationError, match="message"):
                await stream.cancel(reason=text)
            with pytest.raises(ConfigurationError, match="upstream"):
                await sup.start(silent, upstream=text)
            with pytest.raises(ConfigurationError, match="meta"):
                await sup.start(silent, meta=[text])
            with pytest.raises(ConfigurationError, match="meta"):
                await sup.start(silent, meta={"x": "y" * 70_000})
            assert not stream.sealed
            await stream.cancel(reason="\ud800" * 5000, actor="a" * 5000)

    assert (len(stream.outcome.message), len(stream.outcome.actor)) == (2000, 256)


async def test_a_provider_cannot_fill_the_metrics_with_reasons():
    """Distinct reasons are counted up to a bound, the rest together."""

    def finishing(number):
        async def source(out):
            out.finish(f"reason {number}" + "x" * 10_000)
            await trio.sleep_forever()

        return source

    with trio.fail_after(20):
        async with open_supervisor() as sup:
            for number in range(100):
                await (await sup.start(finishing(number))).wait()
            counted = sup.statistics().ended["completed"]

    assert len(counted) == 65
    assert counted["other"] == 36
    assert all(len(reason) <= 64 for reason in counted)


async def test_what_is_journalled_beside_the_answer_is_bounded_too():
    """A note or an attempt over the limit of an event is refused, and counts for nothing."""

    async def source(out):
        with pytest.raises(ConfigurationError, match="max_event_bytes"):
            out.note(x="y" * 2000)
        with pytest.raises(ConfigurationError, match="max_event_bytes"):
            out.attempt(7, x="y" * 2000)

    with trio.fail_after(20):
        async with open_supervisor(limits=Limits(max_event_bytes=1000)) as sup:
            outcome = await (await sup.start(source)).wait()

    assert (outcome.state, outcome.attempts, outcome.last_seq) == (State.COMPLETED, 0, 1)


async def test_nothing_is_counted_after_the_seal():
    """An attempt or an unreadable event that came too late is in neither journal nor outcome."""

    async def source(out):
        out.finish()
        for late in (lambda: out.attempt(7), lambda: out.skip(b"x", "y"), lambda: out.note(x=1)):
            with pytest.raises(Exception, match="sealed"):
                late()

    with trio.fail_after(20):
        async with open_supervisor() as sup:
            outcome = await (await sup.start(source)).wait()

    assert (outcome.attempts, outcome.skipped, outcome.last_seq) == (0, 0, 1)


# --- readers ---------------------------------------------------------------------------------------------------------


async def test_a_readers_wake_that_raises_is_the_readers_trouble():
    """The stream goes on, and seals, and the other reader reads."""

    def bad_wake():
        raise RuntimeError("not ready")

    with trio.fail_after(20):
        async with open_supervisor() as sup:
            stream = await sup.start(words)
            with stream.subscribe() as bad, stream.subscribe() as good:
                bad.wake = bad_wake
                assert len([event async for event in good]) == 4
            assert (await stream.wait()).state is State.COMPLETED


async def test_stalled_readers_of_ended_streams_hold_next_to_nothing():
    """What they have not read is in the store, and is read from there."""

    async def source(out):
        for _ in range(200):
            await out.send("x" * 1000)

    with trio.fail_after(20):
        async with open_supervisor() as sup:
            stream = await sup.start(source)
            with stream.subscribe() as events:
                await stream.wait()
                assert stream._journal.tail_bytes <= 16 << 10
                assert [event.seq async for event in events] == list(range(1, 202))


async def test_folds_of_ended_streams_are_bounded_in_bytes():
    """The oldest leave memory; the store has them."""

    async def source(out):
        await out.send("x" * 10_000)

    with trio.fail_after(20):
        async with open_supervisor(limits=Limits(max_finished_bytes=50_000)) as sup:
            streams = []
            for _ in range(20):
                streams.append(await sup.start(source))
                await streams[-1].wait()
            statistics = sup.statistics()
            assert statistics.finished_bytes <= 50_000
            assert 3 <= statistics.finished_in_memory <= 5
            assert len((await (await sup.find(streams[0].id)).read_snapshot()).text) == 10_000


# --- stores ----------------------------------------------------------------------------------------------------------


class OddStore(MemoryStore):
    """Raises what no store should."""

    broken: str | None = None

    def append(self, stream_id, events):
        if self.broken == "append":
            raise OSError("not a StoreError")
        super().append(stream_id, events)

    def end(self, stream_id, event, *, state, ended_at):
        if self.broken == "end":
            raise OSError("not a StoreError")
        super().end(stream_id, event, state=state, ended_at=ended_at)

    async def wait_durable(self, stream_id, seq):
        if self.broken == "wait":
            raise OSError("not a StoreError")
        await super().wait_durable(stream_id, seq)


@pytest.mark.parametrize("call", ["append", "end", "wait"])
async def test_whatever_a_store_raises_the_stream_is_closed_and_nothing_hangs(call):
    """Its readers and waiters get a StoreError; its source is ended; the block can be left."""
    ended = []

    async def source(out):
        try:
            await out.send("x")
            out.append(b'{"text":"y"}', "", ())
            await trio.sleep_forever()
        finally:
            ended.append(True)

    store = OddStore()
    with trio.fail_after(20):
        async with open_supervisor(store=store) as sup:
            stream = await sup.start(source)
            await trio.testing.wait_all_tasks_blocked()
            store.broken = call
            with pytest.raises(StoreError):
                await stream.cancel()
            store.broken = None
            assert (await (await sup.start(words)).wait()).state is State.COMPLETED

    assert ended == [True]


async def test_an_outcome_that_becomes_durable_late_is_announced_late(autojump_clock):
    """Who asks in time gets the error; who asks after the store is well again gets the one ending, as the store has it."""
    store = GatedStore()
    async with open_supervisor(store=store, limits=Limits(settle_s=3)) as sup:
        stream = await sup.start(silent)
        await trio.testing.wait_all_tasks_blocked()
        store.hold()
        with pytest.raises(StoreError):
            await stream.cancel(wait_s=10)
        assert (sup.statistics().unrecorded, stream.state) == (1, State.STOPPING)
        store.release()
        await trio.sleep(2)
        assert (stream.state, (await stream.wait()).reason) == (State.CANCELLED, "requested")
        assert (sup.statistics().unrecorded, sup.statistics().settling) == (0, 0)
        assert sup.statistics().ended == {"cancelled": {"requested": 1}}
        assert len(store._positions) == 0


async def test_one_that_cannot_be_recorded_does_not_hide_the_others():
    """A cancel of many answers for each."""
    store = OddStore()
    with trio.fail_after(20):
        async with open_supervisor(store=store) as sup:
            bad, good = await sup.start(silent), await sup.start(silent)
            await trio.testing.wait_all_tasks_blocked()

            async def break_one():
                store.broken = "wait"
                with pytest.raises(StoreError):
                    await bad.cancel()
                store.broken = None

            await break_one()
            bad._supervisor._live[bad.id] = bad  # as it is while both are being stopped
            results = await sup.cancel(all_streams=True)
            sup._live.pop(bad.id, None)

    assert {result.id: (result.outcome, result.error is None) for result in results} == {
        bad.id: ("requested", False),
        good.id: ("won", True),
    }


async def test_one_unreadable_record_does_not_close_the_store(tmp_path):
    """It is logged and left out; everything else opens, and an interrupted stream with a bad head still gets its outcome."""
    path = tmp_path / "s.db"
    store = SQLiteStore(path)
    async with trio.open_nursery() as nursery:
        await nursery.start(store.run)
        for number, head in enumerate([b'{"key": 5}', b"not JSON", b"{}"]):
            store.create(StoredStream(id=f"{number:026}", key=None, created_at=1.0, head=head))
            store.end(
                f"{number:026}",
                Event(1, 1, 1.0, "outcome", b'{"actor": 42}'),
                state="completed",
                ended_at=1.0,
            )
        store.create(StoredStream(id="9" * 26, key=None, created_at=1.0, head=b"not JSON"))
        await store.aclose()
    with trio.fail_after(20):
        async with open_supervisor(store=SQLiteStore(path)) as sup:
            assert (await (await sup.start(words)).wait()).state is State.COMPLETED
            assert len(await sup.history()) == 1
            with pytest.raises(StoreCorruptError, match="cannot be read"):
                await sup.find("0" * 26)


async def test_a_closing_error_does_not_hide_why_the_block_ended(autojump_clock):
    """The block's exception, or the parent's Cancelled, comes out; the store's error is a note on it."""

    class LosesAtTheEnd(MemoryStore):
        async def aclose(self):
            await super().aclose()
            raise StoreError("three records were lost")

    with pytest.raises(ValueError, match="mine") as caught:
        async with open_supervisor(store=LosesAtTheEnd()):
            raise ValueError("mine")
    assert "three records were lost" in caught.value.__notes__[0]

    with trio.move_on_after(1) as scope:
        async with open_supervisor(store=LosesAtTheEnd()):
            await trio.sleep_forever()
    assert scope.cancelled_caught

    with pytest.raises(StoreError, match="three records"):
        async with open_supervisor(store=LosesAtTheEnd()):
            pass


async def test_a_refused_start_reaps_nobody():
    """The oldest makes room only for a stream that is really started."""

    class Full(MemoryStore):
        full = False

        def create(self, stream):
            if self.full:
                raise StoreError("no room")
            super().create(stream)

    store = Full()
    with trio.fail_after(20):
        async with open_supervisor(store=store, limits=Limits(max_live=1, when_full="reap_oldest")) as sup:
            oldest = await sup.start(silent)
            store.full = True
            with pytest.raises(StoreError):
                await sup.start(silent)
            assert not oldest.sealed
            await oldest.cancel()


# --- opening, closing, clocks ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("delay_s", [0, 0.001])
async def test_a_cancel_while_the_store_opens_is_obeyed(tmp_path, delay_s):
    """The block is not entered, and leaving it does not hang."""
    for store in (MemoryStore(), SQLiteStore(tmp_path / "s.db")):
        with trio.fail_after(20), trio.move_on_after(delay_s):
            async with open_supervisor(store=store):
                await trio.sleep_forever()
    async with open_supervisor(store=SQLiteStore(tmp_path / "s.db")):
        pass


def test_a_ctrl_c_in_the_middle_of_a_seal_comes_after_it():
    """It is delivered when the seal is whole: the stream ends, and so does the block."""
    rang, streams, aborted = [], [], []

    def ring():
        if not rang:
            rang.append(True)
            signal.raise_signal(signal.SIGINT)

    async def source(out):
        await out.send("x")
        out.append(b'{"text":"y"}', "", ())
        out.on_abort(lambda: aborted.append(True))
        await trio.sleep_forever()

    async def main():
        with trio.fail_after(20):
            async with open_supervisor() as sup:
                streams.append(await sup.start(source))
                await trio.testing.wait_all_tasks_blocked()
                with streams[0].subscribe() as events:
                    events.wake = ring
                    await streams[0].cancel()
                    await trio.sleep(5)

    # In the background of a shell it is ignored.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            trio.run(main)
    finally:
        signal.signal(signal.SIGINT, before)
    assert rang == aborted == [True]
    assert streams[0].outcome.reason == "requested"


async def test_the_cleanup_clock_runs_whatever_the_source_does_after_the_seal(autojump_clock):
    """A phase begun too late does not replace it."""

    async def source(out):
        try:
            await trio.sleep_forever()
        finally:
            out.connected()
            with trio.CancelScope(shield=True):
                await trio.sleep(50)

    async with open_supervisor(limits=Limits(cleanup_s=2)) as sup:
        stream = await sup.start(source, deadlines=Deadlines(first_event_s=1))
        await trio.testing.wait_all_tasks_blocked()
        start = trio.current_time()
        assert (await stream.cancel(wait_s=20)).outcome == "won"
        assert trio.current_time() - start == pytest.approx(2)


async def test_the_cleanup_clock_outlives_the_parents_cancel(autojump_clock):
    """A source that shields itself holds up the block, but not the outcome."""
    streams = []
    start = trio.current_time()

    async def source(out):
        with trio.CancelScope(shield=True):
            await trio.sleep(60)

    async def program():
        with trio.move_on_after(5):
            async with open_supervisor(limits=Limits(cleanup_s=2)) as sup:
                streams.append(await sup.start(source))
                await trio.sleep_forever()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(program)
        await trio.testing.wait_all_tasks_blocked()
        outcome = await streams[0].wait()
        assert trio.current_time() - start == pytest.approx(7)

    assert outcome.reason == "shutdown"


async def test_sources_that_do_not_end_count_against_the_limit(autojump_clock):
    """Settled without their task, they still hold it: there may not be any number of them."""

    async def shields(out):
        with trio.CancelScope(shield=True):
            await trio.sleep(1000)

    async with open_supervisor(limits=Limits(max_live=64, cleanup_s=1)) as sup:
        refused = 0
        for _ in range(300):
            try:
                await sup.start(shields, key="k", on_conflict="replace")
            except AdmissionError:
                refused += 1
            await trio.sleep(1)
        assert sup.statistics().tasks <= 130
        assert refused > 100
        await sup.cancel(all_streams=True)


async def test_two_helpers_that_wait_for_the_store_give_the_clock_back(autojump_clock, no_share):
    """The idle clock rests until the last of them goes on, and then runs."""
    store = GatedStore()

    async def source(out):
        async def helper():
            await out.send("helper")

        await out.send("begin")
        store.behind = True
        out.nursery.start_soon(helper)
        out.nursery.start_soon(helper)
        await trio.sleep_forever()

    async with open_supervisor(store=store) as sup:
        stream = await sup.start(source, deadlines=Deadlines(idle_s=5))
        await trio.sleep(30)
        store.catch_up()
        start = trio.current_time()
        assert (await stream.wait()).reason == "idle"
        assert trio.current_time() - start == pytest.approx(5)


async def test_a_reap_tells_whether_its_outcome_is_durable(autojump_clock):
    """The report does not call settled what a crash could take back, and counts no reap before it is one."""
    store = GatedStore()
    async with open_supervisor(store=store, memory=MemoryPolicy(max_age_s=1, sweep_every_s=1e6)) as sup:
        stream = await sup.start(silent)
        await trio.sleep(2)
        store.hold()
        report = await sup.reap(wait_s=3)
        assert [(entry.id, entry.settled) for entry in report.reaped] == [(stream.id, False)]
        assert sup.statistics().memory.reaped == {}
        store.release()
        await stream.wait()
        assert sup.statistics().memory.reaped == {"reaped_age": 1}
        other = await sup.start(silent)
        await trio.sleep(2)
        report = await sup.reap()
        assert [(entry.id, entry.settled) for entry in report.reaped] == [(other.id, True)]


# --- delivery="durable" ----------------------------------------------------------------------------------------------


async def test_a_snapshot_of_durable_delivery_shows_only_what_is_durable():
    """And its cursor is one to go on from."""
    go = trio.Event()

    async def source(out):
        await out.send("a")
        await go.wait()
        await out.send("b")
        await trio.sleep_forever()

    store = GatedStore()
    with trio.fail_after(20):
        async with open_supervisor(store=store) as sup:
            stream = await sup.start(source, delivery="durable")
            await trio.testing.wait_all_tasks_blocked()
            store.hold()
            go.set()
            await trio.testing.wait_all_tasks_blocked()
            snapshot = stream.snapshot()
            assert (snapshot.text, snapshot.seq) == ("a", 1)
            with stream.subscribe(Cursor(snapshot.epoch, snapshot.seq)) as events:
                store.release()
                assert [event.text for event in await events.next_batch()] == ["b"]
            assert stream.snapshot().text == "ab"
            await stream.cancel()
    assert stream.snapshot().text == "ab"


async def test_durable_delivery_goes_on_after_a_store_was_ill(autojump_clock):
    """A moment's failure delays what readers see; it does not blind them."""

    class Ill(MemoryStore):
        ill = False

        async def wait_durable(self, stream_id, seq):
            if self.ill:
                raise StoreError("full for a moment")
            await super().wait_durable(stream_id, seq)

    async def source(out):
        for letter in "abcdef":
            await out.send(letter)
            await trio.sleep(1)

    store = Ill()
    got = []
    async with open_supervisor(store=store) as sup:
        stream = await sup.start(source, delivery="durable")
        await trio.sleep(0.5)
        store.ill = True
        await trio.sleep(2)
        store.ill = False
        with stream.subscribe() as events:
            async for event in events:
                got.append((event.text, stream.state.value))
    assert [text for text, _ in got] == [*"abcdef", ""]
    assert ("d", "streaming") in got


# --- ids -------------------------------------------------------------------------------------------------------------


async def test_ids_go_on_after_the_stores_though_the_clock_was_set_back(tmp_path):
    """The newest stream of a key has the highest id, whatever the wall clock says."""
    path = tmp_path / "s.db"
    hour_ahead = monotonic_ids(lambda: 4_000_000_000.0)
    async with open_supervisor(store=SQLiteStore(path), new_id=hour_ahead) as sup:
        old = await sup.start(words, key="k")
        await old.wait()
    async with open_supervisor(store=SQLiteStore(path)) as sup:
        new = await sup.start(words, key="k", on_conflict="replace")
        await new.wait()
    async with open_supervisor(store=SQLiteStore(path)) as sup:
        assert (await sup.find(key="k")).id == new.id > old.id
