"""The grace of `on_detach`, a reader that comes back, the answer's own ending and a stop, in the same instant and in every order.

Whoever is a reader before the seal and stays keeps the stream; whoever comes after it reads how it ended.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import pytest

from supervisor import OnDetach, State
from supervisor.testing.schedule import Bounds, explore

from . import laws
from .laws import INSTANT, Contender, Race, run_race
from .test_every_order import ABORTS, CANCELLED, COMPLETED, ENDINGS, LEADS

DETACHED = (State.CANCELLED, "detached")
KEPT = (State.EXPIRED, "total")
"""What becomes of a silent stream that is watched to the end of its time."""
RUNS_OUT_IN_THE_INSTANT = OnDetach(mode="cancel", grace_s=INSTANT)
NO_GRACE = OnDetach(mode="cancel", grace_s=0)


async def leaves_at_once(race: Race) -> None:
    """The reader from the first moment leaves: the grace is running when the instant comes."""
    assert race.keeper is not None
    race.keeper.close()


async def leaves(race: Race) -> None:
    """The reader from the first moment leaves in the instant, as early as may be."""
    await laws.the_instant(0)
    assert race.keeper is not None
    race.keeper.close()


async def comes_back(race: Race) -> None:
    """A reader comes in the instant, and stays. If it came before the seal, the stream was not given up for want of one."""
    await race.the_instant()
    in_time = not race.stream.sealed
    await race.read()
    outcome = race.stream.outcome
    assert outcome is not None
    assert not (in_time and outcome.reason == "detached"), "cancelled as detached under its reader's eyes"


async def looks_in(race: Race) -> None:
    """A reader comes in the instant and leaves again: if it was in time, the grace runs anew, from then."""
    await race.the_instant()
    race.stream.subscribe().__enter__().close()


def outcomes_of(
    ends: str,
    contenders: Sequence[Contender],
    on_detach: OnDetach,
    *,
    leads: Sequence[int] = (0,),
    bounds: Bounds | None = None,
) -> set[tuple[State, str]]:
    """Run the race in every order, with each lead; return the outcomes there were."""
    outcomes: set[tuple[State, str]] = set()

    def note(race: Race) -> None:
        assert race.stream.outcome is not None
        assert race.stream.readers == 0
        outcomes.add((race.stream.outcome.state, race.stream.outcome.reason))

    for lead in leads:
        race = functools.partial(
            run_race, ends, contenders, readers=0, waiters=0, lead=lead, on_detach=on_detach, check=note
        )
        explored = explore(race, bounds=bounds or Bounds(max_runs=60_000, max_seconds=600))
        assert explored.complete, f"not every order was seen: {explored}"
    return outcomes


def test_the_grace_runs_out_as_a_reader_comes_back():
    """Either it was in time, and the stream is kept for it, or it reads that nobody was there."""
    assert outcomes_of("stalls", [leaves_at_once, comes_back], RUNS_OUT_IN_THE_INSTANT) == {DETACHED, KEPT}


@pytest.mark.parametrize("ends", ENDINGS)
def test_the_grace_runs_out_as_the_answer_ends(ends: str):
    """A stream that nobody watches is complete, or is cancelled, by who is first."""
    outcomes = outcomes_of(ends, [leaves_at_once], RUNS_OUT_IN_THE_INSTANT, leads=LEADS)
    assert outcomes <= {ENDINGS[ends], DETACHED}
    # how a source that leaves without a word has ended is known only once its nursery is closed: the clock is first
    assert outcomes == {ENDINGS[ends], DETACHED} or ends in {"returns", "raises"}


def test_the_grace_a_reader_and_the_answers_own_ending():
    """All three in the same instant: the reader gets every event up to the one ending, whichever it is."""
    outcomes = outcomes_of(
        "marker",
        [leaves_at_once, comes_back],
        RUNS_OUT_IN_THE_INSTANT,
        leads=range(-1, 3),
        bounds=Bounds(max_preemptions=2, max_seconds=600),
    )
    assert outcomes == {COMPLETED, DETACHED}


def test_the_last_reader_leaves_as_another_comes():
    """With no grace at all: whoever comes in time keeps the stream, and no timer of the other one's is left to end it."""
    bounds = Bounds(max_preemptions=2, max_seconds=600)
    assert outcomes_of("stalls", [leaves, comes_back], NO_GRACE, leads=range(4), bounds=bounds) == {
        DETACHED,
        KEPT,
    }


def test_the_last_reader_leaves_as_the_answer_ends():
    """With no grace at all: it is complete, or it is cancelled, and nothing of the timer is left once it has ended."""
    bounds = Bounds(max_preemptions=2, max_seconds=600)
    assert outcomes_of("marker", [leaves], NO_GRACE, leads=LEADS, bounds=bounds) == {COMPLETED, DETACHED}


def test_one_comes_to_stay_and_one_to_look():
    """Who leaves again takes nothing from the one who stays."""
    outcomes = outcomes_of(
        "stalls",
        [leaves_at_once, looks_in, comes_back],
        RUNS_OUT_IN_THE_INSTANT,
        bounds=Bounds(max_preemptions=3, max_seconds=600),
    )
    assert outcomes == {DETACHED, KEPT}


@pytest.mark.parametrize(
    "abort", [abort for abort in ABORTS if abort is not laws.replace], ids=lambda abort: abort.__name__
)
def test_the_grace_runs_out_as_somebody_stops_the_stream(abort: Contender):
    """One of the two ended it, and who asked for the stop is told which."""
    outcomes = outcomes_of(
        "stalls",
        [leaves_at_once, abort],
        RUNS_OUT_IN_THE_INSTANT,
        bounds=Bounds(max_preemptions=3, max_seconds=600),
    )
    assert outcomes <= {DETACHED, ABORTS[abort]}
    # the others take some steps to get to their seal, and the clock takes none
    assert outcomes == {DETACHED, CANCELLED} or ABORTS[abort] != CANCELLED
