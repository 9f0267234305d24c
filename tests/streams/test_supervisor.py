"""The registry: claiming keys, tombstones, limits, draining, shutting down, and whose cancel is whose."""

from __future__ import annotations

import pytest
import trio
import trio.lowlevel

from supervisor import (
    AdmissionError,
    ConfigurationError,
    Cursor,
    GapError,
    KeyConflictError,
    Limits,
    MemoryPolicy,
    MemoryStore,
    State,
    StoreError,
    SupervisorClosedError,
    UnknownStreamError,
    open_supervisor,
)
from supervisor.stores import Event, StoredStream
from supervisor.streams.spec import StreamSpec

from .gated import GatedStore


async def silent(out):
    await trio.sleep_forever()


async def words(out):
    for word in ("one ", "two ", "three"):
        await out.send(word)


# --- keys ------------------------------------------------------------------------------------------------------------


async def test_a_repeated_start_joins_the_stream_live_or_ended():
    """A key names one piece of work: asking again never pays for it again."""
    ran = []

    async def source(out):
        ran.append(True)
        await out.send("answer")

    async with open_supervisor() as sup:
        first = sup.start_nowait(source, key="k")
        again = sup.start_nowait(source, key="k")
        await first.stream.wait()
        late = sup.start_nowait(source, key="k")
        statistics = sup.statistics()

    assert (first.created, again.created, late.created) == (True, False, False)
    assert first.stream is again.stream is late.stream
    assert ran == [True]
    assert (statistics.started, statistics.attached) == (1, 2)


async def test_reject_tells_who_has_the_key():
    """The error carries the holder's id and state; nothing was started."""
    async with open_supervisor() as sup:
        stream = await sup.start(silent, key="k")
        with pytest.raises(KeyConflictError) as caught:
            await sup.start(silent, key="k", on_conflict="reject")
        assert (caught.value.key, caught.value.stream_id) == ("k", stream.id)
        assert sup.statistics().live == 1
        await stream.cancel()


async def test_replace_ends_the_holder_and_takes_the_key():
    """The old stream ends as replaced, by the new one; the key is the new one's at once."""
    async with open_supervisor() as sup:
        old = await sup.start(silent, key="k")
        new = await sup.start(words, key="k", on_conflict="replace")
        assert sup.get_by_key("k") is new
        replaced, completed = await old.wait(), await new.wait()
        newest = await sup.start(words, key="k", on_conflict="replace")

    assert (replaced.state, replaced.reason, replaced.actor) == (State.CANCELLED, "replaced", new.id)
    assert completed.state is State.COMPLETED
    assert newest is not new


async def test_a_start_that_is_refused_changes_nothing():
    """A replace that is not admitted leaves the holder, and a bad option leaves everything."""
    async with open_supervisor(limits=Limits(max_live=1)) as sup:
        done = await sup.start(words, key="done")
        await done.wait()
        holder = await sup.start(silent, key="k")
        with pytest.raises(AdmissionError):
            await sup.start(silent, key="done", on_conflict="replace")
        with pytest.raises(ConfigurationError, match="on_conflict"):
            await sup.start(silent, key="k", on_conflict="join")
        with pytest.raises(ConfigurationError, match="meta"):
            await sup.start(silent, meta={"x": object()})
        with pytest.raises(ConfigurationError, match="source"):
            await sup.start(None)
        assert sup.get_by_key("done") is done
        assert sup.get_by_key("k") is holder
        replaced = await sup.start(words, key="k", on_conflict="replace")
        assert (await replaced.wait()).state is State.COMPLETED, "the holder's own place is free for it"


async def test_a_cancel_that_arrives_before_its_start_is_not_lost():
    """Stop pressed before the start came: the start is cancelled at once, once, and its source never runs."""
    ran = []

    async def source(out):
        ran.append(True)

    async with open_supervisor() as sup:
        (result,) = await sup.cancel(key="k", reason="changed my mind", actor="me")
        assert (result.outcome, result.id, sup.statistics().tombstones) == ("tombstoned", None, 1)
        stream = await sup.start(source, key="k")
        outcome = await stream.wait()
        assert sup.statistics().tombstones == 0

    assert (outcome.state, outcome.reason, outcome.message, outcome.actor) == (
        State.CANCELLED,
        "requested",
        "changed my mind",
        "me",
    )
    assert ran == []


async def test_tombstones_are_bounded_in_number_and_time(autojump_clock):
    """The oldest makes room; one that expired cancels nothing."""
    async with open_supervisor(limits=Limits(max_tombstones=2, tombstone_s=10)) as sup:
        for key in ("a", "b", "c"):
            await sup.cancel(key=key)
        assert sup.statistics().tombstones == 2
        assert (await (await sup.start(words, key="a")).wait()).state is State.COMPLETED
        assert (await (await sup.start(words, key="b")).wait()).state is State.CANCELLED
        await trio.sleep(11)
        assert (await (await sup.start(words, key="c")).wait()).state is State.COMPLETED
        with pytest.raises(ConfigurationError, match="key"):
            await sup.cancel(key="k" * 1000)


# --- finding ---------------------------------------------------------------------------------------------------------


async def test_streams_are_found_by_id_key_label_and_state():
    """In memory first, then in the store; what never was raises."""
    async with open_supervisor(limits=Limits(max_finished=1)) as sup:
        old = await sup.start(words, key="old", labels={"user": "a"})
        await old.wait()
        new = await sup.start(words, labels={"user": "b"}, upstream="here")
        await new.wait()
        live = await sup.start(silent, labels={"user": "a"})

        with pytest.raises(UnknownStreamError):
            sup.get(old.id)
        found = await sup.find(old.id)
        by_key = await sup.find(key="old")
        assert found.outcome == old.outcome == by_key.outcome
        assert (await found.read_snapshot()).text == "one two three"
        with found.subscribe(Cursor(1, 1)) as events:
            assert [event.text async for event in events] == ["two ", "three", ""]
        for missing in ({"stream_id": "nothing"}, {"key": "nothing"}):
            with pytest.raises(UnknownStreamError):
                await sup.find(**missing)
        with pytest.raises(ConfigurationError, match="exactly one of"):
            await sup.find(old.id, key="old")

        assert [info.id for info in sup.list()] == [live.id, new.id]
        assert [info.id for info in sup.list(live=True)] == [live.id]
        assert [info.id for info in sup.list(labels={"user": "b"})] == [new.id]
        assert [info.id for info in sup.list(upstream="here")] == [new.id]
        assert [info.id for info in sup.list(states=["completed"])] == [new.id]
        assert [info.id for info in await sup.history()] == [live.id, new.id, old.id]
        assert [info.id for info in await sup.history(labels={"user": "a"})] == [live.id, old.id]
        first = await sup.history(limit=2)
        second = await sup.history(limit=2, before_id=first[-1].id)
        assert [info.id for info in [*first, *second]] == [live.id, new.id, old.id]
        await live.cancel()


async def test_finished_streams_leave_memory_by_count_and_age(autojump_clock):
    """And their keys with them; the store still has them."""
    async with open_supervisor(limits=Limits(max_finished=2, finished_s=100)) as sup:
        streams = [await sup.start(words, key=str(n)) for n in range(3)]
        for stream in streams:
            await stream.wait()
        assert sup.statistics().finished_in_memory == 2
        assert sup.statistics().keys == 2
        await trio.sleep(101)
        await (await sup.start(words)).wait()
        assert sup.statistics().finished_in_memory == 1
        assert sup.statistics().keys == 0


# --- limits ----------------------------------------------------------------------------------------------------------


async def test_one_over_the_limit_is_rejected_with_what_to_do():
    """The error says how many are live, the limit, and when to try again."""
    async with open_supervisor(limits=Limits(max_live=2, retry_after_s=7)) as sup:
        streams = [await sup.start(silent) for _ in range(2)]
        with pytest.raises(AdmissionError) as caught:
            await sup.start(silent)
        assert (caught.value.live, caught.value.limit, caught.value.retry_after_s) == (2, 2, 7)
        assert sup.statistics().rejected == 1
        assert sup.health().status == "degraded"
        for stream in streams:
            await stream.cancel()
        assert sup.health().status == "ok"


async def test_the_oldest_makes_room_where_that_is_asked_for():
    """It is reaped, with the reason recorded."""
    async with open_supervisor(limits=Limits(max_live=2, when_full="reap_oldest")) as sup:
        streams = [await sup.start(silent) for _ in range(4)]
        outcomes = [await stream.wait() for stream in streams[:2]]
        assert [(o.state, o.reason, o.actor) for o in outcomes] == [
            (State.EXPIRED, "reaped_count", "memory")
        ] * 2
        assert sup.statistics().live == 2
        assert sup.statistics().memory.reaped == {"reaped_count": 2}
        await sup.cancel(all_streams=True)


async def test_streams_that_are_settling_are_limited_too():
    """A start storm against a store that hangs is refused, not piled up."""
    store = GatedStore()
    async with open_supervisor(store=store, limits=Limits(max_live=64, when_full="reap_oldest")) as sup:
        store.hold()
        with pytest.raises(AdmissionError):
            for _ in range(1000):
                sup.start_nowait(silent)
        assert sup.statistics().live == 64
        assert sup.statistics().settling == 64
        store.release()
        await sup.cancel(all_streams=True)


# --- memory ----------------------------------------------------------------------------------------------------------


async def test_old_streams_are_reaped_by_age(autojump_clock):
    """By age, also while they talk."""

    async def talking(out):
        while True:
            await out.send("x")
            await trio.sleep(1)

    async with open_supervisor(memory=MemoryPolicy(max_age_s=10)) as sup:
        start = trio.current_time()
        outcome = await (await sup.start(talking)).wait()

    assert (outcome.state, outcome.reason, outcome.actor) == (State.EXPIRED, "reaped_age", "memory")
    assert trio.current_time() - start == pytest.approx(10, abs=1.1)


async def test_stale_streams_are_reaped_and_talking_ones_are_not(autojump_clock):
    """Staleness counts from the last event; the reap says how long that was."""

    async def stalls(out):
        for _ in range(3):
            await out.send("x")
            await trio.sleep(4)
        await trio.sleep_forever()

    async with open_supervisor(memory=MemoryPolicy(stale_s=5)) as sup:
        start = trio.current_time()
        stream = await sup.start(stalls)
        outcome = await stream.wait()

    assert (outcome.reason, outcome.events) == ("reaped_stale", 3)
    assert trio.current_time() - start == pytest.approx(13, abs=1.1)


async def test_too_many_streams_are_reaped_oldest_first(autojump_clock):
    """Where the limit is lowered, the next sweep sees to it; a dry run says who would go and changes nothing."""
    async with open_supervisor(memory=MemoryPolicy(sweep_every_s=1000)) as sup:
        streams = [sup.start_nowait(silent).stream for _ in range(4)]
        sup.memory.policy = MemoryPolicy(max_count=2, sweep_every_s=1000)
        report = await sup.reap(dry_run=True)
        assert [entry.id for entry in report.reaped] == [stream.id for stream in streams[:2]]
        assert {entry.reason for entry in report.reaped} == {"reaped_count"}
        assert (report.dry_run, report.live, sup.statistics().live) == (True, 4, 4)

        outcomes = [await stream.wait() for stream in streams[:2]]
        assert [outcome.reason for outcome in outcomes] == ["reaped_count"] * 2
        assert [info.id for info in sup.list(live=True)] == [streams[3].id, streams[2].id]
        assert (await sup.reap()).reaped == ()
        await sup.cancel(all_streams=True)


async def test_a_stream_over_its_bytes_is_reaped_and_its_neighbours_are_not():
    """As the store takes nothing, it cannot spill. What it held is given back; the partial is kept."""
    store = GatedStore()
    store.hold()

    async def hoards(out):
        while True:
            await out.send("x" * 1000)

    async with open_supervisor(store=store, memory=MemoryPolicy(max_stream_bytes=100_000)) as sup:
        quiet = await sup.start(silent)
        hoarding = await sup.start(hoards)
        while hoarding.state is not State.STOPPING:  # noqa: ASYNC110  # it hoards in the meantime; nothing tells
            await trio.lowlevel.checkpoint()
        store.release()
        outcome = await hoarding.wait()
        assert sup.statistics().memory.bytes_held == 0
        assert quiet.state is State.CONNECTING
        await quiet.cancel()

    assert outcome.reason == "reaped_bytes"
    assert 20 < outcome.events < 200


async def test_over_the_bytes_in_all_the_oldest_go_until_it_fits():
    """No more than needed."""
    go = trio.Event()

    async def holds(out):
        await out.send("x" * 10_000)
        await go.wait()
        await out.send("y" * 10_000)
        await trio.sleep_forever()

    policy = MemoryPolicy(max_bytes=190_000, at_max_bytes="reap_oldest")
    async with open_supervisor(memory=policy) as sup:
        streams = [await sup.start(holds) for _ in range(5)]
        await trio.testing.wait_all_tasks_blocked()
        assert sup.statistics().live == 5
        go.set()
        reaped = [await stream.wait() for stream in streams[:2]]
        await trio.testing.wait_all_tasks_blocked()
        assert [outcome.reason for outcome in reaped] == ["reaped_bytes"] * 2
        assert [stream.state for stream in streams[2:]] == [State.STREAMING] * 3
        assert sup.statistics().memory.bytes_held <= 190_000
        await sup.cancel(all_streams=True)
        assert sup.statistics().memory.bytes_held == 0


# --- many at once ----------------------------------------------------------------------------------------------------


async def test_cancel_by_label_and_all():
    """Each stopped stream gets its own answer; an empty selection is no error."""
    async with open_supervisor() as sup:
        a = [await sup.start(silent, labels={"user": "a"}) for _ in range(100)]
        b = await sup.start(silent, labels={"user": "b"})
        results = await sup.cancel(labels={"user": "a"}, actor="admin")
        assert [result.id for result in results] == [stream.id for stream in a]
        assert {result.outcome for result in results} == {"won"}
        assert b.state is State.CONNECTING
        assert [result.id for result in await sup.cancel(all_streams=True)] == [b.id]
        assert await sup.cancel(all_streams=True) == []
        with pytest.raises(ConfigurationError, match="exactly one of"):
            await sup.cancel(b.id, all_streams=True)
        with pytest.raises(UnknownStreamError):
            await sup.cancel("nothing")


async def test_drain_refuses_starts_and_waits_for_the_live(autojump_clock):
    """Health says so; a timeout tells how many are left."""

    async def slow(out):
        await trio.sleep(5)

    async with open_supervisor() as sup:
        await sup.start(slow)
        assert await sup.drain(timeout_s=1) == 1
        with pytest.raises(SupervisorClosedError, match="draining"):
            await sup.start(words)
        assert sup.health().status == "draining"
        assert await sup.drain() == 0


async def test_shutdown_gives_grace_and_then_ends_everything(autojump_clock):
    """What ends within the grace completes; the rest is cancelled(shutdown)."""

    async def slow(out):
        await trio.sleep(5)

    async with open_supervisor() as sup:
        short = await sup.start(slow)
        long = [await sup.start(silent) for _ in range(200)]
        start = trio.current_time()
        await sup.shutdown(grace_s=6)
        assert trio.current_time() - start == pytest.approx(6)
        assert short.outcome.state is State.COMPLETED
        assert {(s.outcome.state, s.outcome.reason) for s in long} == {(State.CANCELLED, "shutdown")}


# --- ours and theirs -------------------------------------------------------------------------------------------------


async def test_leaving_the_block_waits_for_the_streams():
    """As a nursery does."""
    async with open_supervisor() as sup:
        stream = await sup.start(words)

    assert stream.outcome.state is State.COMPLETED
    with pytest.raises(SupervisorClosedError, match="closed"):
        await sup.start(words)


async def test_the_blocks_own_exception_comes_out_as_it_was_raised():
    """Not grouped, with its streams ended as shut down by the parent."""
    error = ValueError("mine")
    with pytest.raises(ValueError, match="mine") as caught:
        async with open_supervisor() as sup:
            stream = await sup.start(silent)
            raise error

    assert caught.value is error
    assert error.__context__ is None
    outcome = stream.outcome
    assert (outcome.state, outcome.reason, outcome.actor) == (State.CANCELLED, "shutdown", "parent")


async def test_the_parents_cancelled_passes_through_unchanged():
    """A single `trio.Cancelled` comes out of the block, and the streams have their outcomes by then."""
    seen: list[BaseException] = []
    with trio.CancelScope() as scope:
        try:
            async with open_supervisor() as sup:
                streams = [await sup.start(silent) for _ in range(20)]
                await trio.testing.wait_all_tasks_blocked()
                scope.cancel()
                await trio.sleep_forever()
        except BaseException as error:
            seen.append(error)
            raise

    assert [type(error) for error in seen] == [trio.Cancelled]
    assert scope.cancelled_caught
    assert {(s.outcome.state, s.outcome.reason, s.outcome.actor) for s in streams} == {
        (State.CANCELLED, "shutdown", "parent")
    }


async def test_a_supervisors_cancel_never_leaks_as_an_exception():
    """Whoever waits for a cancelled stream gets a value."""
    async with open_supervisor() as sup:
        stream = await sup.start(silent)
        with trio.CancelScope() as scope:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(stream.cancel)
                assert (await stream.wait()).state is State.CANCELLED

    assert not scope.cancelled_caught


async def test_a_source_cannot_swallow_the_parents_cancel():
    """A source that turns its Cancelled into an exception of its own has failed; the parent's cancel still passes."""

    async def bad(out):
        try:
            await trio.sleep_forever()
        except trio.Cancelled:
            raise RuntimeError("no") from None  # noqa: ASYNC104  # the offence that is tested

    with trio.move_on_after(5) as scope:
        async with open_supervisor() as sup:
            stream = await sup.start(bad)
            await trio.testing.wait_all_tasks_blocked()
            scope.cancel()
            await trio.sleep_forever()

    assert scope.cancelled_caught
    assert stream.outcome.state is State.CANCELLED or stream.outcome.reason == "source_error"


# --- after a crash ---------------------------------------------------------------------------------------------------


async def crashed_store() -> MemoryStore:
    """A store as a crash leaves it: one ended stream, one live with three durable events."""
    store = MemoryStore()
    async with open_supervisor(store=store) as sup:
        await (await sup.start(words, key="whole")).wait()
    again = MemoryStore()
    again._kept, again._ended, again._by_key = store._kept, store._ended, store._by_key
    head = b'{"key":"cut","dialect":"native","labels":{"user":"u"}}'
    again.create(StoredStream(id="0" * 26, key="cut", created_at=100.0, head=head))
    attempt = Event(1, 1, 100.0, "attempt", b'{"attempt":1}')
    told = [Event(1, n + 1, 100.0 + n, "data", b'{"text":"%d"}' % n) for n in (1, 2, 3)]
    again.append("0" * 26, [attempt, *told])
    return again


async def test_after_a_crash_each_stream_has_one_outcome():
    """What had ended has ended the same way; what was live is interrupted, with its durable prefix."""
    async with open_supervisor(store=await crashed_store()) as sup:
        whole, cut = await sup.find(key="whole"), await sup.find(key="cut")
        assert whole.outcome.state is State.COMPLETED
        outcome = await cut.wait()
        assert (outcome.state, outcome.reason, outcome.last_seq) == (State.FAILED, "interrupted", 5)
        assert (outcome.events, outcome.attempts) == (3, 1)
        assert (await cut.read_snapshot()).text == "123"
        assert cut.labels == {"user": "u"}
        assert not sup.start_nowait(words, key="whole").created, "its key is still claimed"
        assert await sup.cancel(key="cut") != []


async def test_a_reader_that_saw_more_than_was_durable_is_told_so():
    """A cursor past the durable end is not continued with something else."""
    async with open_supervisor(store=await crashed_store()) as sup:
        cut = await sup.find(key="cut")
        with pytest.raises(GapError) as caught:
            cut.subscribe(Cursor(1, 6))
        assert (caught.value.epoch, caught.value.tail_seq) == (2, 5)
        with cut.subscribe(Cursor(1, 4)) as events:
            assert [event.kind async for event in events] == ["outcome"]


async def test_a_store_that_refuses_a_new_stream_changes_nothing():
    """The start raises the store's error; the key's holder goes on, and nothing is left of the new one."""

    class Choosy(MemoryStore):
        full = False

        def create(self, stream):
            if self.full:
                raise StoreError("no room")
            super().create(stream)

    store = Choosy()
    async with open_supervisor(store=store) as sup:
        holder = await sup.start(silent, key="k")
        store.full = True
        with pytest.raises(StoreError, match="no room"):
            await sup.start(silent, key="k", on_conflict="replace")
        assert sup.get_by_key("k") is holder
        assert [info.id for info in sup.list()] == [holder.id]
        await holder.cancel()


async def test_a_store_that_dies_ends_everything_and_nobody_is_told_an_ending():
    """Its error comes out of the block by itself; whoever waits for a stream gets it too."""

    class Dying(MemoryStore):
        dying = trio.Event()

        async def run(self, *, task_status=trio.TASK_STATUS_IGNORED):
            async with trio.open_nursery() as nursery:
                await nursery.start(super().run)
                task_status.started()
                await self.dying.wait()
                raise StoreError("the disk is gone")

    store = Dying()
    told = []
    with pytest.raises(StoreError, match="the disk is gone"):
        async with open_supervisor(store=store) as sup:
            stream = await sup.start(silent)

            async def wait():
                try:
                    await stream.wait()
                except StoreError as error:
                    told.append(error)

            async with trio.open_nursery() as nursery:
                nursery.start_soon(wait)
                await trio.testing.wait_all_tasks_blocked()
                store.dying.set()

    assert stream.outcome is None
    assert stream.state is State.STOPPING


async def test_a_stream_may_start_others_while_the_block_is_left():
    """As a task in a nursery may."""
    inner = []

    async def outer(out):
        await trio.lowlevel.checkpoint()
        inner.append(await sup.start(words))

    async with open_supervisor() as sup:
        await sup.start(outer)

    assert inner[0].outcome.state is State.COMPLETED


async def test_a_store_that_cannot_be_opened_is_the_programs_error():
    """By itself, not in a group."""

    class Broken(MemoryStore):
        async def run(self, *, task_status=trio.TASK_STATUS_IGNORED):
            raise StoreError("not today")

    with pytest.raises(StoreError, match="not today"):
        async with open_supervisor(store=Broken()):
            pass


def test_the_head_of_a_stream_needs_no_field():
    """A head written by an earlier version, without fields that came later, can be read."""
    import msgspec

    assert msgspec.json.decode(b"{}", type=StreamSpec) == StreamSpec()


@pytest.mark.parametrize(
    ("option", "said"),
    [
        ({"store": "x.db"}, r"^store: 'x\.db' is not valid; expected a store, such as SQLiteStore"),
        ({"limits": {"max_live": 3}}, r"^limits: \{'max_live': 3\} is not valid; expected a Limits"),
        ({"deadlines": 3}, r"^deadlines: 3 is not valid; expected a Deadlines"),
        ({"memory": {}}, r"^memory: \{\} is not valid; expected a MemoryPolicy"),
    ],
)
async def test_an_option_of_another_kind_is_refused(option, said):
    """What is no store, and a mapping in place of a class of limits, is named with what would be right."""
    with pytest.raises(ConfigurationError, match=said):
        async with open_supervisor(**option):
            pass


async def test_a_generator_is_no_source():
    """A source that yields in place of sending is refused at the start, as calling it would do nothing."""

    async def yielding(out):
        yield "a word"

    def plain(out):
        yield "a word"

    async with open_supervisor() as sup:
        for source in (yielding, plain):
            with pytest.raises(ConfigurationError, match="an async callable"):
                await sup.start(source)
