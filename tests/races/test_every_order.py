"""A completion and an abort in the same instant, in every order: one ending, durable before shown, the wire closed.

Each race is run under every scheduling order of its tasks, not a sample of them. What breaking the code does here was tried:
see the names of the laws in `laws.py`.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence

import pytest

from supervisor import Deadlines, State
from supervisor.testing.schedule import Bounds, explore

from . import laws
from .laws import Contender, Race, run_race

CANCELLED = (State.CANCELLED, "requested")
COMPLETED = (State.COMPLETED, "stop")
TRUNCATED = (State.FAILED, "truncated")
REAPED = (State.EXPIRED, "reaped_age")
SHUTDOWN = (State.CANCELLED, "shutdown")

ABORTS: dict[Contender, tuple[State, str]] = {
    laws.cancel_by_id: CANCELLED,
    laws.cancel_by_key: CANCELLED,
    laws.cancel_all: CANCELLED,
    laws.replace: (State.CANCELLED, "replaced"),
    laws.reap: REAPED,
    laws.shutdown: SHUTDOWN,
    laws.parent_cancel: SHUTDOWN,
}
ENDINGS = {
    "marker": COMPLETED,
    "reset": TRUNCATED,
    "returns": (State.COMPLETED, "done"),
    "raises": (State.FAILED, "source_error"),
}


LEADS = range(-3, 5)
"""Scheduling steps that the source is ahead of the abort: where the two meet is somewhere among these."""


def every_order(
    ends: str,
    contenders: Sequence[Contender],
    *,
    leads: Sequence[int] = (0,),
    readers: int = 0,
    waiters: int = 1,
    deadlines: Deadlines | None = None,
    bounds: Bounds | None = None,
) -> set[tuple[State, str]]:
    """Run the race in every order, with each lead; return the outcomes there were."""
    outcomes: set[tuple[State, str]] = set()

    def note(race: Race) -> None:
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
            deadlines=deadlines,
            check=note,
        )
        explored = explore(race, bounds=bounds or Bounds(max_runs=60_000, max_seconds=600))
        assert explored.complete, f"not every order was seen: {explored}"
    return outcomes


@pytest.mark.parametrize("ends", ENDINGS)
@pytest.mark.parametrize("abort", ABORTS, ids=lambda abort: abort.__name__)
def test_an_ending_against_an_abort(ends: str, abort: Contender):
    """Whichever seals first wins, both can, and everybody is told the same."""
    assert every_order(ends, [abort], leads=LEADS, waiters=0) == {ENDINGS[ends], ABORTS[abort]}


@pytest.mark.parametrize("abort", ABORTS, ids=lambda abort: abort.__name__)
def test_an_ending_against_an_abort_under_a_readers_eyes(abort: Contender):
    """A reader and a waiter look at every step: no event is lost or doubled, nothing is shown before it is durable."""
    assert every_order("marker", [abort], readers=1) <= {COMPLETED, ABORTS[abort]}


@pytest.mark.parametrize("ends", ENDINGS)
def test_an_ending_against_a_deadline(ends: str):
    """The total clock runs out in the instant in which the answer ends."""
    deadlines = Deadlines(first_event_s=None, idle_s=None, total_s=laws.INSTANT)
    outcomes = every_order(ends, [laws.no_one], leads=LEADS, deadlines=deadlines, readers=1, waiters=0)
    assert outcomes <= {ENDINGS[ends], (State.EXPIRED, "total")}
    assert outcomes == {ENDINGS[ends], (State.EXPIRED, "total")} or ends in {"returns", "raises"}


@pytest.mark.parametrize(
    "aborts",
    [
        pair
        for pair in itertools.combinations_with_replacement(ABORTS, 2)
        if pair.count(laws.replace) < 2 and pair.count(laws.shutdown) < 2
    ],
    ids=lambda pair: "-".join(abort.__name__ for abort in pair),
)
def test_two_aborts_of_a_silent_stream(aborts: tuple[Contender, Contender]):
    """Two different ways to stop one stream: one of them did, and the other is told so."""
    bounds = Bounds(max_preemptions=4, max_seconds=600)
    assert every_order("stalls", aborts, waiters=0, bounds=bounds) <= {ABORTS[abort] for abort in aborts}
