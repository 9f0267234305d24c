"""The state machine by itself: a table and a seal."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from supervisor.dialects import Fault, Usage
from supervisor.streams.lifecycle import (
    LIVE_STATES,
    REASONS,
    TERMINAL_STATES,
    TRANSITIONS,
    Lifecycle,
    Outcome,
    State,
    Verdict,
)

COMPLETED = Verdict(state=State.COMPLETED, reason="stop")
CANCELLED = Verdict(state=State.CANCELLED, reason="requested", actor="reader")


def test_the_table_names_every_state_and_terminal_states_lead_nowhere():
    """Every state has a row; the four terminal ones have no way out, and every live one has a way to each of them."""
    assert set(TRANSITIONS) == set(State) == LIVE_STATES | TERMINAL_STATES
    for state in State:
        assert (TRANSITIONS[state] == frozenset()) == (state in TERMINAL_STATES)
        assert state in TERMINAL_STATES or TRANSITIONS[state] >= TERMINAL_STATES
    assert set(REASONS) == TERMINAL_STATES


def test_every_state_can_be_reached_from_pending():
    """No row of the table is dead."""
    reached, frontier = {State.PENDING}, [State.PENDING]
    while frontier:
        for state in TRANSITIONS[frontier.pop()] - reached:
            reached.add(state)
            frontier.append(state)

    assert reached == set(State)


def test_the_first_seal_decides():
    """Of two verdicts the first stands, and the second caller is told that it lost."""
    for first, second in itertools.permutations([COMPLETED, CANCELLED]):
        lifecycle = Lifecycle()

        assert lifecycle.seal(first) is True
        assert lifecycle.seal(second) is False
        assert lifecycle.verdict is first


def test_between_seal_and_announcement_only_stopping_is_visible():
    """A verdict that is not durable yet is shown to nobody."""
    lifecycle = Lifecycle()
    lifecycle.advance(State.CONNECTING)
    lifecycle.advance(State.STREAMING)
    assert lifecycle.visible is State.STREAMING

    lifecycle.seal(COMPLETED)
    assert lifecycle.visible is State.STOPPING
    assert not lifecycle.announced

    lifecycle.announce()
    assert lifecycle.visible is State.COMPLETED


def test_a_sealed_stream_cannot_advance_and_an_unsealed_one_cannot_be_announced():
    """Nothing moves after the seal, and nothing is shown before it."""
    lifecycle = Lifecycle()
    with pytest.raises(RuntimeError, match="once it is sealed"):
        lifecycle.announce()
    lifecycle.seal(CANCELLED)

    assert lifecycle.advance(State.STREAMING) is False
    assert lifecycle.visible is State.STOPPING


@given(st.lists(st.sampled_from(sorted(State))))
def test_advance_follows_the_table_and_never_ends_a_stream(steps: list[State]):
    """Whatever is asked for, the state only takes steps of the table, and never a terminal one without a seal."""
    lifecycle = Lifecycle()
    for step in steps:
        before = lifecycle.visible
        moved = lifecycle.advance(step)

        assert moved == (step in TRANSITIONS[before] and step not in TERMINAL_STATES)
        assert lifecycle.visible == (step if moved else before)


@pytest.mark.parametrize("state", sorted(LIVE_STATES))
def test_a_verdict_needs_a_terminal_state(state: State):
    """A stream cannot be sealed into a live state."""
    with pytest.raises(ValueError, match="terminal state"):
        Verdict(state=state, reason="requested")


def test_a_verdict_needs_a_reason_of_its_state():
    """A reason that does not belong to the state is refused by name."""
    with pytest.raises(ValueError, match="'idle' is not a reason of cancelled"):
        Verdict(state=State.CANCELLED, reason="idle")


def test_an_outcome_reads_back_as_it_was_written():
    """What is stored is what was decided, to the last field."""
    outcome = Outcome(
        id="a",
        key="k",
        state=State.FAILED,
        reason="provider_error",
        actor=None,
        message="overloaded",
        fault=Fault(kind="overloaded", message="overloaded", status=529, temporary=True, retry_after_s=2.5),
        usage=Usage(input=3, output=4),
        usage_quality="provider_partial",
        attempts=2,
        events=7,
        skipped=1,
        epoch=2,
        last_seq=9,
        epoch_starts=((1, 1), (2, 5)),
        started_at=10.0,
        ended_at=12.5,
    )

    assert Outcome.from_json(outcome.to_json()) == outcome
    assert outcome.duration_s == 2.5
