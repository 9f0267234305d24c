from __future__ import annotations

import json

import pytest
import trio
from hypothesis import given
from hypothesis import strategies as st

from supervisor import (
    ConfigurationError,
    Cursor,
    Delta,
    Event,
    Fault,
    GapError,
    MemoryStore,
    OnDetach,
    Outcome,
    State,
    ToolCallDelta,
    Usage,
    open_supervisor,
)
from supervisor.dialects import NATIVE, Asking, Dialect, Fold
from supervisor.dialects.estimate import estimate_tokens, estimate_usage, output_bytes
from supervisor.stores.base import StoredStream
from supervisor.streams.bill import TokenBudget, billed

BILLED = Dialect(name="billed", framing="none", reader=NATIVE.reader, stop="drain")
"""A dialect whose provider bills an answer whether it is read or not, so that a cancel drains."""
ABORTED = Dialect(name="aborted", framing="none", reader=NATIVE.reader)


def put(out, delta: Delta) -> None:
    """Add one event."""
    out.append(b"{}", "", (delta,))
    out.flush()


def speaking(*deltas: Delta, every_s: float = 1.0, ends: str | None = "stop"):
    """A source that adds an event at once and another every second, and then ends."""

    async def source(out) -> None:
        for delta in deltas:
            put(out, delta)
            await trio.sleep(every_s)
        if ends is None:
            await trio.sleep_forever()
        out.complete(ends)

    return source


def four_bytes(count: int) -> list[Delta]:
    return [Delta(text="abcd")] * count


# --- the estimate ----------------------------------------------------------------------------------------------------


def test_a_token_is_four_bytes_rounded_up():
    """Nothing is no token, and anything is at least one."""
    assert [estimate_tokens(nbytes) for nbytes in (0, 1, 4, 5, 400)] == [0, 1, 1, 2, 100]


def test_all_that_the_model_wrote_counts():
    """Text, reasoning, refusal, names and arguments of tool calls, of every choice, as UTF-8; ids are the server's."""
    fold = Fold()
    assert estimate_usage(fold.output_bytes) is None
    fold.apply(Delta(text="äö", reasoning="why", refusal="no"))
    fold.apply(
        Delta(choice=3, tool_calls=(ToolCallDelta(index=0, id="x" * 99, name="look", arguments="{}"),))
    )
    fold.apply(Delta(text="\ud83d"))

    assert output_bytes(fold.snapshot()) == fold.output_bytes == 4 + 3 + 2 + 4 + 2 + 3
    assert estimate_usage(fold.output_bytes) == Usage(output=5)


# --- what a cancel does that does not say ----------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["stream", "id", "key", "labels", "all"])
@pytest.mark.parametrize("dialect", [BILLED, ABORTED])
async def test_a_cancel_does_what_the_dialect_does(dialect, how, autojump_clock):
    """It drains where an abort would save nothing and else aborts, whichever way the stream was named."""
    async with open_supervisor() as sup:
        stream = await sup.start(speaking(*four_bytes(5)), dialect=dialect, key="k", labels={"of": "us"})
        await trio.sleep(0.5)
        if how == "stream":
            result = await stream.cancel(wait_s=0)
        else:
            by = {"id": {"stream_id": stream.id}, "key": {"key": "k"}, "labels": {"labels": {"of": "us"}}}
            (result,) = await sup.cancel(**by.get(how, {"all_streams": True}), wait_s=0)
        state = stream.state
        outcome = await stream.wait()

    if dialect is BILLED:
        assert (result.outcome, state) == ("requested", State.STOPPING)
        assert (outcome.state, outcome.events) == (State.COMPLETED, 5)
    else:
        assert (outcome.state, outcome.events) == (State.CANCELLED, 1)


async def test_a_cancel_that_says_is_obeyed(autojump_clock):
    """`mode` goes before what the dialect does, either way."""
    async with open_supervisor() as sup:
        one = await sup.start(speaking(*four_bytes(5)), dialect=BILLED)
        other = await sup.start(speaking(*four_bytes(5)), dialect=ABORTED)
        await trio.sleep(0.5)
        assert (await one.cancel(mode="abort")).outcome == "won"
        assert (await other.cancel(mode="drain", wait_s=60)).state is State.COMPLETED


@pytest.mark.parametrize(
    "options",
    [
        {"mode": "kill"},
        {"drain_s": -1},
        {"drain_s": float("nan")},
        {"drain_s": float("inf")},
        {"drain_s": "10"},
        {"drain_tokens": -1},
        {"drain_tokens": 1.5},
        {"drain_tokens": True},
    ],
)
async def test_a_bad_option_is_refused_and_stops_nothing(options, autojump_clock):
    """The error names the option, also where there is nothing to stop, and the stream goes on."""
    async with open_supervisor() as sup:
        stream = await sup.start(speaking(*four_bytes(3)))
        await trio.sleep(0.5)
        for cancel in (stream.cancel, lambda **given: sup.cancel(key="none", **given)):
            with pytest.raises(ConfigurationError) as caught:
                await cancel(**options)
            assert caught.value.field in options
        assert (await stream.wait()).state is State.COMPLETED
        assert sup.statistics().tombstones == 0


# --- the budget of tokens --------------------------------------------------------------------------------------------


async def test_tokens_are_estimated_where_none_are_stated(autojump_clock):
    """Of an answer that says nothing of its usage, as much text is let through as the budget probably is."""
    async with open_supervisor() as sup:
        stream = await sup.start(speaking(*four_bytes(100)))
        await trio.sleep(9.5)  # ten have come
        result = await stream.cancel(mode="drain", drain_s=1000, drain_tokens=3, wait_s=60, actor="me")

    assert (result.outcome, result.state, result.reason) == ("won", State.CANCELLED, "requested")
    assert stream.outcome.events == 13
    assert stream.outcome.actor == "me"


@pytest.mark.parametrize("by", [{"key": "k"}, {"labels": {"of": "us"}}, {"all_streams": True}])
async def test_a_budget_reaches_every_stream_that_is_cancelled(by, autojump_clock):
    """Time and tokens limit the drain in whichever way the streams were chosen."""
    async with open_supervisor() as sup:
        stream = await sup.start(speaking(*four_bytes(60)), key="k", labels={"of": "us"})
        await trio.sleep(0.5)
        await sup.cancel(**by, mode="drain", drain_s=1000, drain_tokens=3, wait_s=100)
        assert stream.outcome.events == 4
        slow = await sup.start(speaking(*four_bytes(60)), key="k", labels={"of": "us"}, on_conflict="replace")
        await trio.sleep(0.5)
        await sup.cancel(**by, mode="drain", drain_s=5, wait_s=100)
        assert slow.outcome.events == 6


async def test_tokens_are_counted_as_stated_where_totals_run(autojump_clock):
    """The provider's figures go before the length of the text, in which tokens may be long or short."""
    totals = [Delta(text="a long word and a half", usage=Usage(output=number + 1)) for number in range(100)]
    async with open_supervisor() as sup:
        stream = await sup.start(speaking(*totals))
        await trio.sleep(9.5)
        await stream.cancel(mode="drain", drain_s=1000, drain_tokens=7, wait_s=60)

    assert (stream.outcome.state, stream.outcome.events) == (State.CANCELLED, 17)
    assert (stream.outcome.usage, stream.outcome.usage_quality) == (Usage(output=17), "provider_partial")


async def test_a_figure_from_the_beginning_stops_no_count(autojump_clock):
    """A provider that states one figure first and one last is counted by the text in between."""
    first = Delta(usage=Usage(input=50, output=1))
    async with open_supervisor() as sup:
        stream = await sup.start(speaking(first, *four_bytes(100)))
        await trio.sleep(5.5)
        await stream.cancel(mode="drain", drain_s=1000, drain_tokens=4, wait_s=60)

    assert (stream.outcome.state, stream.outcome.events) == (State.CANCELLED, 10)


@pytest.mark.parametrize("before", [None, 4, 900])
async def test_a_first_figure_after_the_stop_is_shared_out(before, autojump_clock):
    """Of the first figure that comes after the stop, what the answer took before the stop is not charged to the drain."""
    stated = [] if before is None else [Delta(usage=Usage(output=before))]
    async with open_supervisor() as sup:
        stream = await sup.start(
            speaking(
                *stated,
                *[Delta(text="abcd" * 30)] * 9,
                Delta(text="abcd" * 30, usage=Usage(output=1000)),
                *four_bytes(1000),
            )
        )
        await trio.sleep(len(stated) + 8.5)
        await stream.cancel(mode="drain", drain_s=10_000, drain_tokens=150, wait_s=6000)

    # 100 of the 1000 came since the stop: 50 more.
    assert stream.outcome.state is State.CANCELLED
    assert stream.outcome.events == len(stated) + 10 + 50


async def test_hidden_tokens_are_counted_when_they_are_stated(autojump_clock):
    """Reasoning that is never shown is output too: a figure that says so spends the budget without a word of text."""
    async with open_supervisor() as sup:
        stream = await sup.start(
            speaking(Delta(usage=Usage(output=10)), Delta(usage=Usage(output=500)), *four_bytes(9))
        )
        await trio.sleep(0.5)
        await stream.cancel(mode="drain", drain_s=1000, drain_tokens=300, wait_s=60)

    assert (stream.outcome.state, stream.outcome.events) == (State.CANCELLED, 2)


async def test_what_is_kept_beside_the_text_is_not_output(autojump_clock):
    """A stop before the first event: neither a choice's nor a call's bookkeeping nor an id is charged to the budget."""
    call = Delta(tool_calls=(ToolCallDelta(index=0, id="i" * 200, name="look", arguments="{}  "),))
    async with open_supervisor() as sup:
        stream = await sup.start(speaking(call, *four_bytes(10), every_s=1.0))
        await stream.cancel(mode="drain", drain_s=1000, drain_tokens=5, wait_s=60)

    assert (stream.outcome.state, stream.outcome.events) == (State.CANCELLED, 4)


async def test_an_answer_that_has_ended_takes_no_more_tokens(autojump_clock):
    """The read that spends the budget also ends the answer: it completes, with the usage that comes after the end."""

    async def source(out) -> None:
        put(out, Delta(text="abcd"))
        await trio.sleep(1)
        out.append(b"{}", "", (Delta(text="abcd" * 100, finish_reason="stop"),))
        out.mark("stop")
        out.flush()
        await trio.sleep(1)
        put(out, Delta(usage=Usage(input=1, output=101)))
        out.complete("stop")

    async with open_supervisor() as sup:
        stream = await sup.start(source)
        await trio.sleep(0.5)
        await stream.cancel(mode="drain", drain_s=1000, drain_tokens=5, wait_s=60)

    assert (stream.outcome.state, stream.outcome.reason) == (State.COMPLETED, "stop")
    assert (stream.outcome.usage.output, stream.outcome.usage_quality) == (101, "exact")


async def test_an_end_that_is_taken_back_takes_tokens_again(autojump_clock):
    """A further choice begins after the budget was spent: its first event ends the stream."""

    async def source(out) -> None:
        out.append(b"{}", "", (Delta(text="abcd" * 100, finish_reason="stop"),))
        out.mark("stop")
        out.flush()
        await trio.sleep(1)
        out.append(b"{}", "", (Delta(text="abcd", choice=1),))
        out.mark(None)
        out.flush()
        await trio.sleep_forever()

    async with open_supervisor() as sup:
        stream = await sup.start(source)
        await stream.cancel(mode="drain", drain_s=1000, drain_tokens=5, wait_s=60)

    assert (stream.outcome.state, stream.outcome.events) == (State.CANCELLED, 2)


@pytest.mark.parametrize("stated", [True, False])
async def test_an_answer_that_takes_the_place_of_another_is_counted_from_its_beginning(
    stated, autojump_clock
):
    """The stop came while a restart was waited for: the length of what that withdrew is no credit to it."""

    def word(number: int) -> Delta:
        return Delta(text="abcd", usage=Usage(output=number) if stated else None)

    async def source(out) -> None:
        out.attempt(1)
        for number in range(50):
            put(out, word(number + 1))
        out.attempt(2, rung="restart")
        for number in range(100):
            await trio.sleep(1)
            put(out, word(number + 1))
        out.complete("stop")

    async with open_supervisor() as sup:
        stream = await sup.start(source)
        await trio.sleep(0.5)
        await stream.cancel(mode="drain", drain_s=1000, drain_tokens=3, wait_s=200)

    assert (stream.outcome.state, stream.outcome.epoch, stream.outcome.events) == (State.CANCELLED, 3, 53)


@pytest.mark.parametrize("budget", [{"drain_tokens": 0}, {"drain_s": 0}])
async def test_no_budget_is_an_abort(budget, autojump_clock):
    """Nothing more may come: the stream ends before it gets another event."""
    async with open_supervisor() as sup:
        stream = await sup.start(speaking(*four_bytes(9)))
        await trio.sleep(0.5)
        start = trio.current_time()
        result = await stream.cancel(mode="drain", **budget)

    assert (result.outcome, stream.outcome.events) == ("won", 1)
    assert trio.current_time() == start


async def test_a_drain_without_a_limit_of_tokens_is_bounded_by_time(autojump_clock):
    """`drain_tokens=None` lets any amount through until `drain_s` has passed."""
    async with open_supervisor() as sup:
        stream = await sup.start(speaking(*[Delta(text="abcd" * 1000)] * 100))
        await trio.sleep(0.5)
        await stream.cancel(mode="drain", drain_s=5, wait_s=60)

    assert (stream.outcome.state, stream.outcome.events) == (State.CANCELLED, 6)


@pytest.mark.parametrize(
    ("first", "then", "events"),
    [
        ({"drain_s": 50}, {"drain_s": 2}, 3),
        ({"drain_s": 2}, {"drain_s": 50}, 3),
        ({"drain_tokens": 20}, {"drain_tokens": 2}, 3),
        ({"drain_tokens": 2}, {"drain_tokens": 20}, 3),
        ({"drain_tokens": 2}, {}, 3),
        ({}, {"drain_tokens": 2}, 3),
    ],
)
async def test_of_two_drains_the_tightest_budget_holds(first, then, events, autojump_clock):
    """Stop pressed again cannot make an answer longer than the first stop allowed, and it is the first that wins."""
    async with open_supervisor() as sup:
        stream = await sup.start(speaking(*four_bytes(60)))
        await trio.sleep(0.5)
        results = [None, None]

        async def stop(place, how):
            results[place] = await stream.cancel(mode="drain", **{"drain_s": 40, **how}, wait_s=100)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(stop, 0, first)
            await trio.testing.wait_all_tasks_blocked()
            nursery.start_soon(stop, 1, then)

    assert (stream.outcome.state, stream.outcome.events) == (State.CANCELLED, events)
    assert [result.outcome for result in results] == ["won", "already_terminal"]


async def test_an_abort_ends_a_drain_whose_tokens_are_limited(autojump_clock):
    """It wins at once; the drain is told that it did not."""
    async with open_supervisor() as sup:
        stream = await sup.start(speaking(*four_bytes(60)))
        await trio.sleep(0.5)
        await stream.cancel(mode="drain", drain_s=1000, drain_tokens=1000, wait_s=0)
        start = trio.current_time()
        assert (await stream.cancel(mode="abort", actor="impatient")).outcome == "won"
        assert trio.current_time() == start

    assert (stream.outcome.actor, stream.outcome.events) == ("impatient", 1)


async def test_a_stop_that_met_a_fault_has_won(autojump_clock):
    """The upstream breaks off while the answer drains: the stop ends it, with the fault, and is told that it won."""
    fault = Fault(kind="network", message="reset by peer")

    async def source(out) -> None:
        put(out, Delta(text="abcd"))
        await trio.sleep(1)
        assert out.stopping
        assert out.stop(fault)

    async with open_supervisor() as sup:
        stream = await sup.start(source)
        await trio.sleep(0.5)
        result = await stream.cancel(mode="drain", wait_s=60)

    assert (result.outcome, stream.outcome.state, stream.outcome.fault) == ("won", State.CANCELLED, fault)


pieces = st.lists(
    st.builds(
        Delta,
        text=st.text(max_size=12),
        reasoning=st.text(max_size=12),
        choice=st.integers(0, 2),
        tool_calls=st.lists(
            st.builds(
                ToolCallDelta,
                index=st.integers(0, 2),
                id=st.sampled_from(["", "call_1", "call_2"]),
                arguments=st.text(max_size=9),
            ),
            max_size=2,
        ).map(tuple),
    ),
    max_size=12,
)


@given(before=pieces, after=pieces, limit=st.integers(0, 60))
def test_the_short_cut_says_what_measuring_says(before, after, limit):
    """The cheap look at what the fold holds never lets the budget pass unseen, nor ends it early."""
    fold = Fold()
    for delta in before:
        fold.apply(delta)
    length = output_bytes(fold.snapshot())
    budget = TokenBudget(limit, fold)
    for delta in after:
        fold.apply(delta)
        left = limit - estimate_tokens(output_bytes(fold.snapshot()) - length)
        assert (budget.left(fold) == 0) == (left <= 0)
        assert budget.left(fold) <= max(0, left)


@given(
    steps=st.lists(st.tuples(st.integers(0, 40), st.integers(0, 9)), min_size=1, max_size=20),
    stop=st.integers(0, 20),
    limit=st.integers(1, 60),
)
def test_running_totals_are_counted_to_the_token(steps, stop, limit):
    """Where every event states the total, and did before the stop, the text does not matter and nothing is estimated."""
    fold, total = Fold(), 1
    fold.apply(Delta(usage=Usage(output=total)))
    budget, at_stop = None, 0
    for number, (length, tokens) in enumerate(steps):
        if number == min(stop, len(steps) - 1):
            budget, at_stop = TokenBudget(limit, fold), total
        total += tokens + 1
        fold.apply(Delta(text="x" * length, usage=Usage(output=total)))
        if budget is not None and number == min(stop, len(steps) - 1):
            at_stop = max(
                at_stop, total * (len(fold.snapshot().text) - length) // max(1, len(fold.snapshot().text))
            )
        if budget is not None:
            assert budget.left(fold) == max(0, limit - (total - at_stop))


# --- what is said of the usage ---------------------------------------------------------------------------------------

STATED = Usage(input=3, output=4)


@pytest.mark.parametrize(
    ("usage", "how", "expected"),
    [
        (STATED, {"completed": True}, (STATED, "exact")),
        (STATED, {"completed": False}, (STATED, "provider_partial")),
        (STATED, {"completed": True, "broken": True}, (STATED, "provider_partial")),
        (None, {"completed": True}, (Usage(output=2), "estimated")),
        (None, {"completed": False}, (Usage(output=2), "estimated")),
        (Usage(9, 1), {"completed": False}, (Usage(9, 2), "estimated")),
        (Usage(9, 1), {"completed": True}, (Usage(9, 1), "exact")),
        (Usage(9), {"completed": False}, (Usage(9, 2), "estimated")),
        (Usage(9, 1), {"completed": False, "estimate": False}, (Usage(9, 1), "provider_partial")),
        (None, {"completed": True, "estimate": False}, (None, "unknown")),
        (None, {"completed": False, "reported": (STATED, "exact")}, (STATED, "exact")),
        (Usage(output=1), {"completed": False, "reported": (STATED, "exact")}, (STATED, "exact")),
    ],
)
def test_the_quality_of_a_usage(usage, how, expected):
    """A row for each way in which an outcome can have come by its usage."""
    fold = Fold()
    fold.apply(Delta(text="eight by", usage=usage))
    assert billed(fold, **{"broken": False, "estimate": True, "reported": None, **how}) == expected


def test_nothing_received_is_nothing_estimated():
    """Without output there is no estimate: what the request cost is not known."""
    assert billed(Fold(), completed=False, broken=False, estimate=True, reported=None) == (None, "unknown")


async def test_a_stopped_answer_is_estimated_where_its_dialect_allows(autojump_clock):
    """The outcome of an answer that stated nothing has the output that it probably took, and says that this is a guess."""
    silent = Dialect(name="free", framing="none", reader=NATIVE.reader, asking=Asking(estimate=False))
    outcomes = []
    async with open_supervisor() as sup:
        for dialect in (ABORTED, silent):
            stream = await sup.start(speaking(*four_bytes(9)), dialect=dialect)
            await trio.sleep(2.5)
            await stream.cancel()
            outcomes.append(stream.outcome)

    assert [(outcome.usage, outcome.usage_quality) for outcome in outcomes] == [
        (Usage(output=3), "estimated"),
        (None, "unknown"),
    ]


def attempts(*rungs: str | None, stated: bool = True, empty: bool = False):
    """A source whose attempts each state a usage, and the last completes."""

    async def source(out) -> None:
        for number, rung in enumerate((None, *rungs), start=1):
            last = number == len(rungs) + 1
            out.attempt(number, rung=rung)
            if last or not empty:
                put(out, Delta(text="abcd", usage=Usage(output=number) if stated or last else None))
            await trio.lowlevel.checkpoint()
        out.complete("stop")

    return source


@pytest.mark.parametrize(
    ("source", "quality"),
    [
        (attempts(), "exact"),
        (attempts("retry", empty=True), "exact"),
        (attempts("fallback", empty=True), "exact"),
        (attempts("sequence"), "exact"),
        (attempts("sequence", "sequence", stated=False), "exact"),
        (attempts("continuation"), "provider_partial"),
        (attempts("continuation", stated=False), "provider_partial"),
        (attempts("continuation", "sequence"), "provider_partial"),
        (attempts("restart"), "provider_partial"),
        (attempts("fallback", stated=False), "provider_partial"),
    ],
)
async def test_an_answer_of_several_requests_is_exact_only_if_one_answered(source, quality):
    """A request that died half-way took tokens that no final figure counts; one that got no event, or went on, did not."""
    async with open_supervisor() as sup:
        stream = await sup.start(source, dialect=ABORTED)
        outcome = await stream.wait()

    assert (outcome.state, outcome.usage_quality) == (State.COMPLETED, quality)


async def test_the_outcome_tells_the_rungs_and_the_joints():
    """What each attempt after the first did, and where its text was joined to what there was."""

    async def source(out) -> None:
        for number, rung in enumerate((None, "retry", "sequence", "continuation"), start=1):
            out.attempt(number, rung=rung)
            if number > 1:
                put(out, Delta(text="abcd"))
        out.complete("stop")

    async with open_supervisor() as sup:
        stream = await sup.start(source)
        outcome = await stream.wait()

    assert (outcome.attempts, outcome.rungs) == (4, ("retry", "sequence", "continuation"))
    assert outcome.joined_at == (8,)


async def test_a_usage_that_was_asked_for_after_the_seal_is_preferred(autojump_clock):
    """A source that asks the provider what a stopped answer cost, within its cleanup, has the last word."""

    async def source(out) -> None:
        put(out, Delta(text="abcd", usage=Usage(output=1)))
        try:
            await trio.sleep_forever()
        finally:
            out.report_usage(Usage(input=7, output=40))

    async with open_supervisor() as sup:
        stream = await sup.start(source)
        await trio.sleep(1)
        await stream.cancel()

    assert (stream.outcome.usage, stream.outcome.usage_quality) == (Usage(input=7, output=40), "exact")


async def test_a_usage_that_was_asked_for_is_that_of_the_last_request(autojump_clock):
    """What the request before it is known to have used is added, and the sum is partial."""

    async def source(out) -> None:
        out.attempt(1)
        put(out, Delta(text="abcd", usage=Usage(input=5, output=1)))
        out.attempt(2, rung="restart")
        put(out, Delta(text="abcd"))
        try:
            await trio.sleep_forever()
        finally:
            out.report_usage(Usage(input=7, output=40))

    async with open_supervisor() as sup:
        stream = await sup.start(source)
        await trio.sleep(1)
        await stream.cancel()

    expected = (Usage(input=12, output=41), "provider_partial")
    assert (stream.outcome.usage, stream.outcome.usage_quality) == expected


# --- for nobody ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("readings", "unread"),
    [
        ([], 10),
        ([(1, 20)], 0),
        ([(1, 3)], 7),
        ([(4, 20)], 0),
        ([(2, 4), (6, 8)], 2),
        ([(1, 3), (2, 20)], 0),
        ([(1, 3), (2, 5)], 5),
        ([(2, 5), (1, 3)], 5),
    ],
)
async def test_events_that_came_after_the_last_reader_had_left(readings, unread, autojump_clock):
    """They were paid for and read by nobody: counted from when the last of all readers left, none while one is there."""
    async with open_supervisor() as sup:
        stream = await sup.start(speaking(*four_bytes(10)))

        async def read(since, until):  # as of so many events
            await trio.sleep(max(0, since - 0.5))
            with stream.subscribe("tail"), trio.move_on_after(until - since):
                await stream.wait()

        async with trio.open_nursery() as nursery:
            for since, until in readings:
                nursery.start_soon(read, since, until)
        outcome = await stream.wait()

    assert (outcome.events, outcome.events_unread) == (10, unread)


async def test_who_reads_after_the_end_has_not_read_it_live(autojump_clock):
    """The count is that of the seal: a reader that comes, or leaves, while the outcome settles changes nothing."""

    async def source(out) -> None:
        put(out, Delta(text="abcd"))
        out.complete("stop")
        try:
            await trio.sleep_forever()
        finally:
            with trio.CancelScope(shield=True):
                await trio.sleep(2)

    async with open_supervisor() as sup:
        late = await sup.start(source)
        early = await sup.start(source)
        with early.subscribe():
            await trio.sleep(1)
        with late.subscribe():
            pass
        assert (await late.wait()).events_unread == 1
        assert (await early.wait()).events_unread == 0


# --- records and figures ---------------------------------------------------------------------------------------------


def test_an_outcome_of_an_earlier_version_reads():
    """A record without the newer fields is read with their defaults."""
    old = Outcome(
        id="a", key=None, state=State.COMPLETED, reason="stop", last_seq=3, started_at=1.0, ended_at=2.0
    )
    record = json.loads(old.to_json())
    for name in ("events_unread", "rungs", "joined_at"):
        del record[name]
    assert Outcome.from_json(json.dumps(record).encode()) == old


async def test_after_a_crash_the_rungs_and_the_withdrawn_epochs_are_known():
    """Recovery reads them from the journal: a cursor of the withdrawn answer is told of the gap, as before the crash."""
    store = MemoryStore()
    head = b'{"dialect":"native"}'
    store.create(StoredStream(id="0" * 26, key="cut", created_at=100.0, head=head))
    store.append(
        "0" * 26,
        [
            Event(1, 1, 100.0, "attempt", b'{"attempt":1}'),
            Event(1, 2, 100.0, "data", b'{"text":"old"}'),
            Event(1, 3, 100.0, "data", b'{"text":"er"}'),
            Event(1, 4, 100.0, "attempt", b'{"attempt":2,"rung":"restart"}'),
            Event(3, 5, 100.0, "withdrawn", b'{"attempt":2,"first":1,"last":4}'),
            Event(3, 6, 100.0, "data", b'{"text":"new"}'),
        ],
    )
    async with open_supervisor(store=store) as sup:
        stream = await sup.find("0" * 26)
        outcome = await stream.wait()
        assert (outcome.rungs, outcome.attempts, outcome.last_seq) == (("restart",), 2, 7)
        assert outcome.epoch_starts == ((1, 1), (3, 5), (4, 7))
        assert (await stream.read_snapshot()).text == "new"
        with pytest.raises(GapError):
            stream.subscribe(Cursor(1, 6))
        with stream.subscribe(Cursor(3, 6)) as events:
            assert [event.kind async for event in events] == ["outcome"]


async def test_cancelled_is_counted_as_nothing_else(autojump_clock):
    """However a stream is cancelled it counts as that; one that completes or fails while it drains as what it did."""

    async def breaks(out) -> None:
        put(out, Delta(text="abcd"))
        await trio.sleep(1)
        out.fail("truncated", Fault(kind="truncated", message="cut off"))

    forever = speaking(*four_bytes(3), ends=None)
    async with open_supervisor() as sup:
        aborted = await sup.start(forever)
        await trio.sleep(0.5)
        await aborted.cancel()
        for budget in ({"drain_s": 1}, {"drain_tokens": 1}):
            drained = await sup.start(forever)
            await trio.sleep(0.5)
            await drained.cancel(mode="drain", **budget)
        for source in (speaking(*four_bytes(3)), breaks):
            ending = await sup.start(source)
            await trio.sleep(0.5)
            await ending.cancel(mode="drain")
        first = await sup.start(forever, key="k")
        await sup.start(forever, key="k", on_conflict="replace", on_detach=OnDetach(mode="cancel", grace_s=9))
        await first.wait()
        await trio.sleep(10)
        await sup.start(forever)
        await sup.shutdown()
        ended = {state: dict(reasons) for state, reasons in sup.statistics().ended.items()}
        reaped = sup.statistics().memory.reaped

    assert ended == {
        "cancelled": {"detached": 1, "replaced": 1, "requested": 3, "shutdown": 1},
        "completed": {"stop": 1},
        "failed": {"truncated": 1},
    }
    assert reaped == {}
