"""One stream from start to outcome: every way to end, and what is shown when."""

from __future__ import annotations

import contextlib
import json

import pytest
import trio

from supervisor import (
    ConfigurationError,
    Cursor,
    Deadlines,
    Delta,
    Fault,
    Limits,
    OnDetach,
    State,
    StoreError,
    StreamSealedError,
    ToolCallDelta,
    Usage,
    open_supervisor,
)

from .gated import GatedStore


async def words(out):
    for word in ("one ", "two ", "three"):
        await out.send(word)


async def silent(out):
    await trio.sleep_forever()


async def talking(out):
    while True:
        await out.send("x")
        await trio.sleep(1)


async def read_all(stream, after="start"):
    with stream.subscribe(after) as events:
        return [event async for event in events]


# --- endings ---------------------------------------------------------------------------------------------------------


async def test_a_source_that_returns_is_completed():
    """The journal has what it sent, then the outcome, and the snapshot is the fold of it."""
    async with open_supervisor() as sup:
        stream = await sup.start(words)
        outcome = await stream.wait()
        events = await read_all(stream)

    assert (outcome.state, outcome.reason) == (State.COMPLETED, "done")
    assert [event.text for event in events] == ["one ", "two ", "three", ""]
    assert [event.seq for event in events] == [1, 2, 3, 4]
    assert json.loads(events[-1].payload)["state"] == "completed"
    assert outcome.last_seq == 4
    assert stream.snapshot().text == "one two three"


async def test_a_source_says_how_it_finished():
    """`finish` seals; what the source does after that is cut off at its next checkpoint."""

    async def source(out):
        await out.send(Delta(text="cut", finish_reason="length", usage=Usage(input=1, output=2)))
        assert out.finish("length") is True
        assert out.finish("stop") is False
        with pytest.raises(StreamSealedError):
            out.send_nowait("more")
        await trio.sleep_forever()

    async with open_supervisor() as sup:
        outcome = await (await sup.start(source)).wait()

    assert (outcome.state, outcome.reason, outcome.events) == (State.COMPLETED, "length", 1)
    assert (outcome.usage, outcome.usage_quality) == (Usage(input=1, output=2), "exact")


async def test_a_source_that_raises_is_failed_and_its_error_stays_inside():
    """The embedding program goes on; the partial is kept and the outcome says what was raised."""

    async def source(out):
        await out.send("partial")
        raise KeyError("missing")

    async with open_supervisor() as sup:
        stream = await sup.start(source)
        outcome = await stream.wait()
        other = await (await sup.start(words)).wait()

    assert (outcome.state, outcome.reason, outcome.message) == (
        State.FAILED,
        "source_error",
        "KeyError: 'missing'",
    )
    assert stream.snapshot().text == "partial"
    assert other.state is State.COMPLETED


async def test_what_came_with_the_end_is_part_of_the_answer():
    """Events added in the same read as the terminal marker, and not flushed yet, are in the journal before the seal."""

    async def source(out):
        out.append(b'{"text":"the "}', "", (Delta(text="the "),))
        out.append(b'{"text":"end"}', "", (Delta(text="end"),))
        out.complete("stop")

    async with open_supervisor() as sup:
        stream = await sup.start(source)
        outcome = await stream.wait()
        assert [event.text for event in await read_all(stream)] == ["the ", "end", ""]
        assert outcome.last_seq == 3


async def test_what_is_not_an_error_of_the_source_passes_through(autojump_clock):
    """A KeyboardInterrupt in a source is the program's: it comes out of the supervisor, and the stream has its outcome."""

    async def source(out):
        await out.send("x")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        async with open_supervisor() as sup:
            stream = await sup.start(source)
            await trio.sleep(5)

    assert (stream.outcome.state, stream.outcome.reason, stream.outcome.actor) == (
        State.CANCELLED,
        "shutdown",
        "parent",
    )


async def test_a_source_can_say_that_it_failed():
    """`fail` keeps the fault as it was told."""
    fault = Fault(kind="overloaded", message="try later", temporary=True, retry_after_s=3.0)

    async def source(out):
        out.fail("provider_error", fault)
        await trio.sleep_forever()

    async with open_supervisor() as sup:
        outcome = await (await sup.start(source)).wait()

    assert (outcome.state, outcome.reason, outcome.fault) == (State.FAILED, "provider_error", fault)


async def test_helpers_live_in_the_streams_nursery(autojump_clock):
    """A source's helpers end with the stream, whoever ends it; a stream is not over before its helpers are."""
    ended = []

    async def helper(name):
        try:
            await trio.sleep(5)
        finally:
            ended.append(name)

    async def source(out):
        out.nursery.start_soon(helper, "kept")
        await out.send("text")

    async def stopped(out):
        out.nursery.start_soon(helper, "stopped")
        await trio.sleep_forever()

    async with open_supervisor() as sup:
        start = trio.current_time()
        await (await sup.start(source)).wait()
        assert trio.current_time() - start == pytest.approx(5)
        stream = await sup.start(stopped)
        await trio.testing.wait_all_tasks_blocked()
        await stream.cancel()

    assert ended == ["kept", "stopped"]


async def test_a_failing_helper_fails_the_stream():
    """An exception of the stream's nursery, grouped or not, becomes one message in one outcome."""

    async def helper():
        raise OSError("no route")

    async def source(out):
        out.nursery.start_soon(helper)
        await trio.sleep_forever()

    async with open_supervisor() as sup:
        outcome = await (await sup.start(source)).wait()

    assert (outcome.reason, outcome.message) == ("source_error", "OSError: no route")


async def test_a_cancel_wins_and_is_repeatable():
    """The first cancel wins; the same asked again gives the same ending, as already terminal."""
    async with open_supervisor() as sup:
        stream = await sup.start(talking)
        first = await stream.cancel(reason="the reader pressed Stop", actor="reader 7")
        again = await stream.cancel()

    assert (first.outcome, first.state, first.reason) == ("won", State.CANCELLED, "requested")
    assert (again.outcome, again.state, again.reason) == ("already_terminal", State.CANCELLED, "requested")
    assert (stream.outcome.message, stream.outcome.actor) == ("the reader pressed Stop", "reader 7")


async def test_a_cancel_before_the_first_step_means_the_source_never_runs():
    """The scope is there before the task is: nothing starts, and the outcome says so."""
    ran = []

    async def source(out):
        ran.append(True)

    async with open_supervisor() as sup:
        stream = sup.start_nowait(source).stream
        result = await stream.cancel()

    assert (result.outcome, ran) == ("won", [])


async def test_an_error_while_unwinding_changes_nothing_but_is_told():
    """A source that raises after the seal leaves the ending alone; the error is in the outcome, not lost."""

    async def source(out):
        try:
            await trio.sleep_forever()
        finally:
            raise RuntimeError("close failed")

    async with open_supervisor() as sup:
        stream = await sup.start(source)
        await trio.testing.wait_all_tasks_blocked()
        result = await stream.cancel()

    assert (result.outcome, result.state) == ("won", State.CANCELLED)
    assert stream.outcome.cleanup_error == "RuntimeError: close failed"


async def test_a_source_that_will_not_end_cannot_hold_the_outcome(autojump_clock):
    """After `cleanup_s` the stream is settled without it; only its own task remains."""
    let_go = trio.Event()

    async def stubborn(out):
        try:
            await trio.sleep_forever()
        finally:
            with trio.CancelScope(shield=True):
                await let_go.wait()

    async with open_supervisor(limits=Limits(cleanup_s=2)) as sup:
        stream = await sup.start(stubborn)
        await trio.testing.wait_all_tasks_blocked()
        start = trio.current_time()
        result = await stream.cancel(wait_s=10)
        assert trio.current_time() - start == pytest.approx(2)
        let_go.set()

    assert (result.outcome, result.state) == ("won", State.CANCELLED)
    assert stream.outcome.cleanup_error == "the source did not end within 2 s"


# --- clocks ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "deadlines", "after"),
    [
        ("first_event", Deadlines(first_event_s=3), 3),
        ("total", Deadlines(first_event_s=None, total_s=4), 4),
    ],
)
async def test_a_silent_source_expires(autojump_clock, kind, deadlines, after):
    """The clock that runs out first is the reason."""
    async with open_supervisor(deadlines=deadlines) as sup:
        start = trio.current_time()
        outcome = await (await sup.start(silent)).wait()

    assert (outcome.state, outcome.reason) == (State.EXPIRED, kind)
    assert trio.current_time() - start == pytest.approx(after)


async def test_a_stalled_source_expires_idle(autojump_clock):
    """Each event starts the idle clock anew; the partial is kept."""

    async def source(out):
        for _ in range(5):
            await out.send("x")
            await trio.sleep(9)
        await trio.sleep_forever()

    async with open_supervisor() as sup:
        start = trio.current_time()
        stream = await sup.start(source, deadlines=Deadlines(idle_s=10))
        outcome = await stream.wait()

    assert (outcome.state, outcome.reason, outcome.events) == (State.EXPIRED, "idle", 5)
    assert trio.current_time() - start == pytest.approx(46)


async def test_attempts_have_their_own_clocks_and_waiting_none(autojump_clock):
    """The connect clock begins with each attempt and rests in between; the total clock runs through."""

    async def source(out):
        out.attempt(1)
        await trio.sleep(4)
        out.waiting()
        await trio.sleep(60)
        out.attempt(2, cause="refused", delay_s=60.0)
        await trio.sleep_forever()

    async with open_supervisor() as sup:
        start = trio.current_time()
        stream = await sup.start(source, deadlines=Deadlines(connect_s=5, first_event_s=1))
        outcome = await stream.wait()
        kinds = [(event.kind, json.loads(event.payload)) for event in await read_all(stream)]

    assert (outcome.reason, outcome.attempts) == ("connect", 2)
    assert trio.current_time() - start == pytest.approx(69)
    assert kinds[:2] == [
        ("attempt", {"attempt": 1, "cause": None, "delay_s": 0.0}),
        ("attempt", {"attempt": 2, "cause": "refused", "delay_s": 60.0}),
    ]


async def test_an_answer_that_has_ended_as_far_as_seen_completes_when_the_body_stalls(autojump_clock):
    """After the finish reason, a clock that runs out is not the answer's fault."""

    async def source(out):
        await out.send(Delta(text="all of it", finish_reason="stop"))
        out.mark("stop")
        await trio.sleep_forever()

    async with open_supervisor() as sup:
        outcome = await (await sup.start(source)).wait()

    assert (outcome.state, outcome.reason) == (State.COMPLETED, "stop")


async def test_an_answer_that_goes_on_after_all_is_not_complete(autojump_clock):
    """A further choice takes the mark back: a clock that runs out then is an expiry."""

    async def source(out):
        await out.send(Delta(text="one", finish_reason="stop"))
        out.mark("stop")
        await out.send(Delta(text="two", choice=1))
        out.mark(None)
        await trio.sleep_forever()

    async with open_supervisor() as sup:
        outcome = await (await sup.start(source)).wait()

    assert (outcome.state, outcome.reason) == (State.EXPIRED, "idle")


async def test_a_drain_lets_the_answer_end_by_itself(autojump_clock):
    """Within the budget the stream completes, and the cancel says that it did not win."""

    async def source(out):
        for _ in range(5):
            await out.send("x")
            await trio.sleep(1)

    async with open_supervisor() as sup:
        stream = await sup.start(source)
        await trio.sleep(1.5)
        requested = await stream.cancel(mode="drain", drain_s=60, wait_s=0)
        assert (requested.outcome, requested.state) == ("requested", State.STOPPING)
        outcome = await stream.wait()

    assert (outcome.state, outcome.events) == (State.COMPLETED, 5)


async def test_a_drain_past_its_budget_is_a_cancel(autojump_clock):
    """The budget ends it, and the cancel that asked for it won."""
    async with open_supervisor() as sup:
        stream = await sup.start(talking)
        await trio.sleep(0.5)
        start = trio.current_time()
        result = await stream.cancel(mode="drain", drain_s=3, wait_s=60, actor="me")

    assert (result.outcome, result.state) == ("won", State.CANCELLED)
    assert stream.outcome.actor == "me"
    assert trio.current_time() - start == pytest.approx(3)


async def test_an_abort_cuts_a_drain_short(autojump_clock):
    """Who cannot wait any longer aborts; the drain then has not won."""
    async with open_supervisor() as sup:
        stream = await sup.start(talking)
        await trio.sleep(0.5)
        await stream.cancel(mode="drain", drain_s=30, wait_s=0)
        start = trio.current_time()
        result = await stream.cancel()

    assert result.outcome == "won"
    assert trio.current_time() == start


# --- durability ------------------------------------------------------------------------------------------------------


async def test_nothing_of_the_ending_is_shown_before_it_is_durable():
    """State, info, readers, `wait` and the cancel's reply all hold back until the store has the outcome."""
    store = GatedStore()
    async with open_supervisor(store=store) as sup:
        stream = await sup.start(talking)
        seen, each, results = [], [], []

        async def watch():
            with stream.subscribe() as events:
                seen.extend([event async for event in events if event.kind == "outcome"])

        async def watch_each():
            with stream.subscribe("tail") as events:
                async for event in events:
                    each.append(event.kind)

        async def stop():
            results.append(await stream.cancel(wait_s=60))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(watch)
            nursery.start_soon(watch_each)
            await trio.testing.wait_all_tasks_blocked()
            store.hold()
            nursery.start_soon(stop)
            await trio.testing.wait_all_tasks_blocked()

            assert (stream.state, stream.outcome, results, seen) == (State.STOPPING, None, [], [])
            assert "outcome" not in each
            assert stream.info().outcome is stream.info().reason is None
            assert sup.statistics().ended == {}
            early = await stream.cancel(wait_s=0)
            assert (early.outcome, early.state) == ("requested", State.STOPPING)
            with trio.move_on_after(0) as waited:
                await stream.wait()
            assert waited.cancelled_caught

            store.release()

    assert (results[0].outcome, seen[-1].kind, each[-1]) == ("won", "outcome", "outcome")


async def test_an_outcome_that_cannot_be_recorded_is_an_error_to_everybody():
    """Nobody is told an ending that a restart would not confirm; the other streams go on."""
    store = GatedStore()
    async with open_supervisor(store=store) as sup:
        stream = await sup.start(talking)
        reader = stream.subscribe()
        with reader:
            await reader.next_batch()
            store.break_down()
            with pytest.raises(StoreError, match="the disk is gone"):
                await stream.cancel()
            with pytest.raises(StoreError, match="the disk is gone"):
                await stream.wait()
            with pytest.raises(StoreError, match="the disk is gone"):
                while await reader.next_batch():
                    pass
        assert (stream.state, stream.outcome) == (State.STOPPING, None)
        assert sup.statistics().ended == {}


async def test_an_outcome_that_takes_too_long_is_an_error(autojump_clock):
    """`settle_s` bounds the wait: a store that hangs cannot hold a stream for ever."""
    store = GatedStore()
    async with open_supervisor(store=store, limits=Limits(settle_s=7)) as sup:
        stream = await sup.start(talking)
        await trio.testing.wait_all_tasks_blocked()
        store.hold()
        start = trio.current_time()
        with pytest.raises(StoreError, match="not durable after 7 s"):
            await stream.cancel(wait_s=60)
        assert trio.current_time() - start == pytest.approx(7)


async def test_a_source_is_slowed_while_the_store_is_behind(no_share):
    """`send` waits for the store to catch up; nothing is buffered meanwhile."""
    store = GatedStore()
    async with open_supervisor(store=store) as sup:
        store.behind = True
        stream = await sup.start(words)
        await trio.testing.wait_all_tasks_blocked()
        assert stream.tail_seq == 0
        store.catch_up()
        assert (await stream.wait()).events == 3


async def test_who_has_little_waiting_is_not_held_back_for_others():
    """While the store is behind, a stream of which little waits goes on, and one of which much does is held; if nothing can be written, both."""
    store = GatedStore()
    took: list[str] = []

    async def source(out):
        while True:
            await out.send("x" * (20_000 if out is flood else 10))
            took.append("flood" if out is flood else "other")
            await more.wait()

    flood: object = None

    async def flooding(out):
        nonlocal flood
        flood = out
        await source(out)

    more = trio.Event()
    async with open_supervisor(store=store) as sup:
        store.hold()
        await sup.start(flooding)
        await sup.start(source)
        await trio.testing.wait_all_tasks_blocked()
        store.behind = True
        for trouble, went_on in ((None, ["other"]), ("disk full", [])):
            took.clear()
            store.trouble = trouble
            before, more = more, trio.Event()
            before.set()
            await trio.testing.wait_all_tasks_blocked()
            assert took == went_on
        store.catch_up()
        store.release()
        await sup.cancel(all_streams=True)


async def test_a_stream_does_not_expire_because_the_store_is_behind(autojump_clock, no_share):
    """While a source waits for the store its idle clock rests; afterwards it starts anew."""

    async def source(out):
        await out.send("x")
        store.behind = True
        await out.send("y")
        await trio.sleep_forever()

    store = GatedStore()
    async with open_supervisor(store=store) as sup:
        start = trio.current_time()
        stream = await sup.start(source, deadlines=Deadlines(idle_s=5))
        await trio.sleep(50)
        assert stream.state is State.STREAMING
        store.catch_up()
        outcome = await stream.wait()

    assert (outcome.reason, outcome.events) == ("idle", 2)
    assert trio.current_time() - start == pytest.approx(55)


# --- readers ---------------------------------------------------------------------------------------------------------


async def test_a_reader_can_come_at_any_time_and_go_on_from_its_cursor():
    """From the start, from a cursor, from the tail, from a snapshot: together always the whole, once."""
    go = trio.Event()

    async def source(out):
        for word in "abcdef":
            await out.send(word)
        await go.wait()
        for word in "ghi":
            await out.send(word)

    async with open_supervisor(limits=Limits(tail_events=2)) as sup:
        stream = await sup.start(source)
        await trio.testing.wait_all_tasks_blocked()
        first = ""
        with stream.subscribe() as events:
            async for event in events:
                first += event.text
                if event.text == "d":
                    break
            cursor = events.cursor
        tail = stream.subscribe("tail")
        shot = stream.subscribe("snapshot")
        go.set()
        rest = "".join(event.text for event in await read_all(stream, cursor))
        with tail, shot:
            from_tail = "".join([event.text async for event in tail])
            from_shot = "".join([event.text async for event in shot])

    assert (first, cursor) == ("abcd", Cursor(1, 4))
    assert first + rest == "abcdefghi"
    assert from_tail == "ghi"
    assert shot.first_snapshot.text + from_shot == "abcdefghi"


async def test_a_stalled_reader_holds_nothing():
    """A reader that never reads neither slows the stream nor keeps its events in memory."""

    async def flood(out):
        for _ in range(5000):
            out.send_nowait("x" * 100)

    async with open_supervisor(limits=Limits(tail_events=10)) as sup:
        stream = await sup.start(flood)
        with stream.subscribe() as events:
            first = await events.next_batch(1)
            outcome = await stream.wait()
            assert outcome.events == 5000
            assert stream._journal.tail_bytes <= 6000
            rest = [event.seq async for event in events]

    assert [first[0].seq, *rest] == list(range(1, 5002))


async def test_leaving_is_detaching_not_cancelling(autojump_clock):
    """The default keeps a stream that nobody reads."""

    async def source(out):
        for _ in range(10):
            await out.send("x")
            await trio.sleep(1)

    async with open_supervisor() as sup:
        stream = await sup.start(source)
        with stream.subscribe() as events:
            await events.next_batch()
        outcome = await stream.wait()

    assert outcome.state is State.COMPLETED


async def test_on_detach_cancel_gives_a_grace_that_a_reader_stops(autojump_clock):
    """Without a reader the grace runs, from the start too; a reader stops it, and it runs anew when the last one leaves."""
    async with open_supervisor() as sup:
        start = trio.current_time()
        never_read = await sup.start(talking, on_detach=OnDetach(mode="cancel", grace_s=5))
        outcome = await never_read.wait()
        assert (outcome.state, outcome.reason) == (State.CANCELLED, "detached")
        assert trio.current_time() - start == pytest.approx(5)

        read = await sup.start(talking, on_detach=OnDetach(mode="cancel", grace_s=5))
        await trio.sleep(4)
        with read.subscribe():
            await trio.sleep(20)
        await trio.sleep(4)
        with read.subscribe():
            await trio.sleep(1)
        start = trio.current_time()
        assert (await read.wait()).reason == "detached"
        assert trio.current_time() - start == pytest.approx(5)


async def test_wrong_use_of_a_subscription_is_told():
    """Reading without entering, entering twice, or starting nowhere raises a sentence that names the right way."""
    async with open_supervisor() as sup:
        stream = await sup.start(words)
        events = stream.subscribe()
        with pytest.raises(RuntimeError, match="enter the subscription first"):
            await events.next_batch()
        with events, pytest.raises(RuntimeError, match="entered once"):
            events.__enter__()
        with pytest.raises(ConfigurationError, match="'start', 'tail' or 'snapshot'"):
            stream.subscribe("now")


async def test_closing_wakes_a_reader_that_waits():
    """A `next_batch` that waits when its subscription is closed returns nothing more."""
    got = []
    async with open_supervisor() as sup:
        stream = await sup.start(silent)
        events = stream.subscribe().__enter__()

        async def read():
            got.append(await events.next_batch())

        async with trio.open_nursery() as nursery:
            nursery.start_soon(read)
            await trio.testing.wait_all_tasks_blocked()
            events.close()
        assert stream.info().readers == 0
        await stream.cancel()

    assert got == [()]


async def test_readers_are_limited():
    """One more than `max_readers` is refused, and the limit is tied to leaving the subscription."""
    async with open_supervisor(limits=Limits(max_readers=2)) as sup:
        stream = await sup.start(silent)
        with contextlib.ExitStack() as stack:
            for _ in range(2):
                stack.enter_context(stream.subscribe())
            with pytest.raises(Exception, match="the limit is 2"):
                stream.subscribe().__enter__()
        with stream.subscribe():
            assert stream.info().readers == 1
        await stream.cancel()


# --- what a source may send ------------------------------------------------------------------------------------------


async def test_deltas_and_objects_are_folded():
    """Text, reasoning, tool calls and usage come together in the snapshot, whatever shape they were sent in."""

    async def source(out):
        await out.send("a")
        await out.send({"text": "b", "reasoning": "r", "mine": [1]})
        await out.send(Delta(tool_calls=(ToolCallDelta(index=0, id="c1", name="f", arguments="{"),)))
        await out.send(Delta(tool_calls=(ToolCallDelta(index=0, arguments="}"),), finish_reason="tool_calls"))

    async with open_supervisor() as sup:
        stream = await sup.start(source)
        outcome = await stream.wait()
        live = stream.snapshot()
        events = await read_all(stream)

    assert (live.text, live.reasoning, live.finish_reason) == ("ab", "r", "tool_calls")
    assert [(call.id, call.name, call.arguments) for call in live.tool_calls] == [("c1", "f", "{}")]
    assert outcome.reason == "tool_calls"
    assert json.loads(events[1].payload)["mine"] == [1]


@pytest.mark.parametrize("item", [None, 3, b"bytes", {"text": object()}])
async def test_an_item_that_cannot_be_sent_is_refused(item):
    """The source gets the error; nothing was added."""
    caught = []

    async def source(out):
        try:
            await out.send(item)
        except ConfigurationError as error:
            caught.append(error)
        await out.send("still alive")

    async with open_supervisor() as sup:
        outcome = await (await sup.start(source)).wait()

    assert len(caught) == 1
    assert (outcome.state, outcome.events) == (State.COMPLETED, 1)


async def test_an_event_over_the_limit_is_refused():
    """One event is bounded, whoever adds it."""

    async def source(out):
        await out.send("x" * 2000)

    async with open_supervisor(limits=Limits(max_event_bytes=1000)) as sup:
        outcome = await (await sup.start(source)).wait()

    assert (outcome.reason, outcome.events) == ("source_error", 0)
    assert "at most 1000 bytes" in outcome.message


async def test_notes_and_unreadable_payloads_are_journalled():
    """They are part of the record, not of the answer."""

    async def source(out):
        out.note(step="retrieval", documents=3)
        out.skip(b"\xff{", "not JSON")
        await out.send("text")

    async with open_supervisor() as sup:
        stream = await sup.start(source)
        outcome = await stream.wait()
        events = await read_all(stream)

    assert [event.kind for event in events] == ["note", "skipped", "data", "outcome"]
    assert json.loads(events[0].payload) == {"step": "retrieval", "documents": 3}
    assert json.loads(events[1].payload) == {"why": "not JSON", "bytes": 2, "payload_b64": "/3s="}
    assert (outcome.events, outcome.skipped) == (1, 1)
