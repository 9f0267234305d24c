"""A drain, its two budgets, the answer's own ending and an abort in the same instant, in every order: one ending, told to all.

The drains begin before the instant or in it; their time runs out in it, and what spends their tokens comes in it.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import pytest
import trio

from supervisor import Deadlines, State
from supervisor.testing.schedule import Bounds, explore

from . import laws
from .laws import INSTANT, Contender, Race, run_race
from .test_every_order import ABORTS, CANCELLED, COMPLETED, ENDINGS, LEADS

EARLY_S = INSTANT / 2
LONG_S = 500.0


def draining(*, begins_s: float, drain_s: float, drain_tokens: int | None = None) -> Contender:
    """A drain that begins so long after the start: half-way to the instant, or in it."""

    async def drain(race: Race) -> None:
        if begins_s < INSTANT:
            await trio.sleep(begins_s)
        else:
            await race.the_instant()
        result = await race.stream.cancel(
            mode="drain", actor="drain", drain_s=drain_s, drain_tokens=drain_tokens, wait_s=LONG_S * 2
        )
        race.record([result])
        assert result.outcome != "requested", "both budgets are spent, and it is not over"

    return drain


TIME_IN_THE_INSTANT = draining(begins_s=EARLY_S, drain_s=INSTANT - EARLY_S)
TOKENS_IN_THE_INSTANT = draining(begins_s=EARLY_S, drain_s=LONG_S, drain_tokens=1)
BOTH_IN_THE_INSTANT = draining(begins_s=EARLY_S, drain_s=INSTANT - EARLY_S, drain_tokens=1)
BEGINS_IN_THE_INSTANT = draining(begins_s=INSTANT, drain_s=LONG_S, drain_tokens=1)
LONG = draining(begins_s=EARLY_S, drain_s=LONG_S, drain_tokens=100)
NO_BUDGET = draining(begins_s=INSTANT, drain_s=LONG_S, drain_tokens=0)


def check(race: Race) -> None:
    """What the laws do not say: who won, and that a drained stream is counted as what it ended as, and as nothing else."""
    outcome = race.stream.outcome
    assert outcome is not None
    assert race.sup.statistics().ended == {outcome.state.value: {outcome.reason: 1}}
    told = race.seen.results  # of nobody, if the program itself was cancelled
    wins = sum(result.outcome == "won" for result in told)
    assert wins == (1 if told and outcome.reason == "requested" else 0)


def outcomes_of(
    ends: str,
    contenders: Sequence[Contender],
    *,
    leads: Sequence[int] = (0,),
    readers: int = 0,
    waiters: int = 0,
    bounds: Bounds | None = None,
) -> set[tuple[State, str]]:
    """Run the race in every order, with each lead; return the outcomes there were."""
    outcomes: set[tuple[State, str]] = set()

    def note(race: Race) -> None:
        check(race)
        assert race.stream.outcome is not None
        outcomes.add((race.stream.outcome.state, race.stream.outcome.reason))

    for lead in leads:
        race = functools.partial(
            run_race,
            ends,
            contenders,
            readers=readers,
            waiters=waiters,
            lead=lead,
            deadlines=Deadlines(first_event_s=None, idle_s=None, total_s=900),
            check=note,
        )
        explored = explore(race, bounds=bounds or Bounds(max_runs=60_000, max_seconds=600))
        assert explored.complete, f"not every order was seen: {explored}"
    return outcomes


@pytest.mark.parametrize("ends", ENDINGS)
def test_the_time_of_a_drain_runs_out_as_the_answer_ends(ends: str):
    """Either decides, by who is first; there is no third ending."""
    outcomes = outcomes_of(ends, [TIME_IN_THE_INSTANT], leads=LEADS, waiters=1)
    assert outcomes <= {ENDINGS[ends], CANCELLED}
    # how a source that leaves without a word has ended is known only once its nursery is closed: the clock is first
    assert outcomes == {ENDINGS[ends], CANCELLED} or ends in {"returns", "raises"}


def test_the_last_piece_of_an_answer_spends_the_tokens():
    """The event that spends the budget ends the stream before the end marker that comes after it is looked at."""
    assert outcomes_of("marker", [TOKENS_IN_THE_INSTANT], readers=1) == {CANCELLED}
    assert outcomes_of("reset", [TOKENS_IN_THE_INSTANT], readers=1) == {ENDINGS["reset"]}


@pytest.mark.parametrize("ends", ["marker", "reset"])
@pytest.mark.parametrize("drain", [BEGINS_IN_THE_INSTANT, NO_BUDGET], ids=["one token", "no token"])
def test_a_drain_begins_as_the_answer_ends(ends: str, drain: Contender):
    """What was there before the stop is not charged to it, and what comes after it is."""
    expected = {ENDINGS[ends]}
    if ends == "marker" or drain is NO_BUDGET:
        expected.add(CANCELLED)
    assert outcomes_of(ends, [drain], leads=LEADS) == expected


@pytest.mark.parametrize("drain", [TIME_IN_THE_INSTANT, BOTH_IN_THE_INSTANT], ids=["time", "both"])
@pytest.mark.parametrize(
    "abort", [abort for abort in ABORTS if abort is not laws.replace], ids=lambda abort: abort.__name__
)
def test_a_drain_that_is_spent_and_an_abort_of_a_silent_stream(abort: Contender, drain: Contender):
    """One of the two ended it, and the other is told so, in whatever way it was aborted."""
    bounds = Bounds(max_preemptions=3, max_seconds=600)
    assert outcomes_of("stalls", [drain, abort], bounds=bounds) <= {CANCELLED, ABORTS[abort]}


@pytest.mark.parametrize("abort", [laws.cancel_by_id, laws.shutdown], ids=lambda abort: abort.__name__)
def test_an_abort_does_not_wait_for_a_drain(abort: Contender):
    """A drain with much of its budgets left, and an abort as the answer ends: whichever of these two is first."""
    outcomes = outcomes_of("marker", [LONG, abort], leads=range(-2, 4), bounds=Bounds(max_preemptions=2))
    assert outcomes == {COMPLETED, ABORTS[abort]}


@pytest.mark.parametrize("drain", [BOTH_IN_THE_INSTANT, BEGINS_IN_THE_INSTANT], ids=["spent", "begins"])
def test_a_drain_an_abort_and_the_answers_own_ending(drain: Contender):
    """All three in the same instant, under a reader's eyes: the answer is whole, or stopped once."""
    bounds = Bounds(max_preemptions=2, max_seconds=600)
    outcomes = outcomes_of("marker", [drain, laws.cancel_by_id], leads=range(-2, 4), readers=1, bounds=bounds)
    assert outcomes <= {COMPLETED, CANCELLED}
    assert CANCELLED in outcomes


def test_two_drains_and_the_end_marker():
    """Stop pressed twice, with different budgets, as the answer ends: at most one of the two won."""
    bounds = Bounds(max_preemptions=2, max_seconds=600)
    outcomes = outcomes_of(
        "marker", [TIME_IN_THE_INSTANT, BEGINS_IN_THE_INSTANT], leads=range(-2, 4), bounds=bounds
    )
    assert outcomes == {COMPLETED, CANCELLED}
