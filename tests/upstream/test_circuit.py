from __future__ import annotations

import json
import math

import msgspec
import pytest
import trio
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from supervisor import ConfigurationError, open_supervisor
from supervisor.upstream.circuit import Circuit, CircuitPolicy, Circuits

POLICY = CircuitPolicy(max_failures=5, decay_s=30, backoff_s=15)


def fail(circuit: Circuit, count: int, now: float = 0.0) -> Circuit:
    for _ in range(count):
        circuit.failed(now)
    return circuit


# --- opening ---------------------------------------------------------------------------------------------------------


def test_it_opens_at_one_more_failure_than_may_be():
    """Five are let pass, the sixth opens it, and from then on further attempts are refused."""
    circuit = fail(Circuit(POLICY), 5)
    assert circuit.state(0.0) == "closed"
    assert circuit.allows(0.0)
    fail(circuit, 1)
    assert circuit.state(0.0) == "open"
    assert not circuit.allows(0.0)
    assert not circuit.allows(14.9)
    assert (circuit.statistics(14.9).opened, circuit.statistics(14.9).refused) == (1, 2)


def test_failures_are_forgotten_with_time():
    """One failure every half-life never adds up to two, however long that goes on."""
    circuit = Circuit(POLICY)
    for number in range(1000):
        circuit.failed(30.0 * number)
        assert circuit.state(30.0 * number) == "closed"
    assert circuit.statistics(30.0 * 999).failures == pytest.approx(2.0, abs=0.001)
    assert circuit.statistics(30.0 * 1000).failures == pytest.approx(1.0, abs=0.001)


def test_a_busy_upstream_may_fail_now_and_then():
    """A tenth of a thousand attempts a minute fail: that is a hundred failures, and no reason to leave it alone."""
    circuit = Circuit(POLICY)
    for number in range(10_000):
        now = number * 0.06
        circuit.failed(now) if number % 10 == 9 else circuit.succeeded(now)
        assert circuit.state(now) == "closed"
        assert circuit.allows(now)


def test_a_busy_upstream_that_dies_is_noticed():
    """Once more fail than deliver, by the weight that time leaves them, it is left alone."""
    circuit = Circuit(POLICY)
    for number in range(1000):
        circuit.succeeded(number * 0.06)
    failures = 0
    while circuit.state(60 + failures * 0.06) == "closed" and failures < 2000:
        failures += 1
        circuit.failed(60 + failures * 0.06)
    # a thousand were delivered in the last minute, and most of them weigh half by now
    assert 400 < failures < 600


def test_an_upstream_that_breaks_every_answer_off_is_noticed():
    """Each attempt begins to deliver and then fails: it counts as both, and the failure is the younger."""
    circuit = Circuit(POLICY)
    for number in range(20):
        circuit.succeeded(number)
        circuit.failed(number + 0.5)
    assert circuit.state(20.0) != "closed"


def test_what_comes_while_it_is_open_does_not_hold_it_open():
    """First attempts of new streams go on and fail; the trial is due when it was, or it would never come."""
    circuit = fail(Circuit(POLICY), 6)
    for now in range(1, 15):
        circuit.failed(float(now))
        circuit.succeeded(float(now))
        assert circuit.state(float(now)) == "open"
    assert circuit.allows(15.0)


# --- the trial -------------------------------------------------------------------------------------------------------


def test_one_trial_is_let_through():
    """After the backoff one attempt may be made; until it is heard of, no other."""
    circuit = fail(Circuit(POLICY), 6)
    assert circuit.state(15.0) == "half_open"
    assert circuit.allows(15.0)
    assert circuit.state(15.0) == "half_open"
    assert not circuit.allows(15.0)
    assert not circuit.allows(29.9)


def test_a_trial_that_delivers_closes_it():
    """And the failures before it are forgotten: as many as at the beginning may follow."""
    circuit = fail(Circuit(POLICY), 50)
    assert circuit.allows(15.0)
    circuit.succeeded(16.0)
    assert circuit.state(16.0) == "closed"
    fail(circuit, 5, 16.0)
    assert circuit.state(16.0) == "closed"
    fail(circuit, 1, 16.0)
    assert circuit.state(16.0) == "open"


def test_a_trial_that_fails_opens_it_anew():
    """For a whole backoff from the failure on, though its failures alone may have decayed to less than the limit."""
    circuit = fail(Circuit(POLICY), 6)
    assert circuit.allows(300.0)
    circuit.failed(301.0)
    assert circuit.state(301.0) == "open"
    assert not circuit.allows(315.9)
    assert circuit.allows(316.0)
    assert circuit.statistics(316.0).opened == 2


def test_an_abandoned_trial_makes_room_for_the_next():
    """A cancelled trial says nothing of the upstream: another may be made at once, and one alone."""
    circuit = fail(Circuit(POLICY), 6)
    assert circuit.allows(15.0)
    circuit.abandoned(16.0)
    assert circuit.state(16.0) == "half_open"
    assert circuit.allows(16.0)
    assert not circuit.allows(16.0)


def test_a_trial_that_is_never_heard_of_does_not_hold_it_half_open():
    """A backoff later another trial may be made, and so on."""
    circuit = fail(Circuit(POLICY), 6)
    for now in (15.0, 30.0, 45.0):
        assert circuit.allows(now)
        assert not circuit.allows(now + 14.9)
        assert circuit.state(now + 14.9) == "half_open"


@pytest.mark.parametrize("failures", [0, 6])
def test_abandoning_what_is_no_trial_changes_nothing(failures):
    """A cancelled attempt neither counts nor closes, and does not shorten a backoff."""
    circuit = fail(Circuit(POLICY), failures)
    before = circuit.statistics(1.0)
    circuit.abandoned(1.0)
    assert circuit.statistics(1.0) == before


def test_a_new_stream_that_delivers_is_as_good_as_a_trial():
    """In half-open the first that is heard of decides, whether or not it asked."""
    circuit = fail(Circuit(POLICY), 6)
    circuit.succeeded(15.0)
    assert circuit.state(15.0) == "closed"
    other = fail(Circuit(POLICY), 6)
    other.failed(15.0)
    assert other.state(15.0) == "open"
    assert not other.allows(29.9)


def test_a_clock_that_stands_still_or_steps_back_does_no_harm():
    """Times out of order weigh as if they were the latest."""
    circuit = fail(Circuit(POLICY), 3, 100.0)
    fail(circuit, 3, 50.0)
    assert circuit.statistics(100.0).failures == 6
    assert circuit.state(50.0) == "open"


@given(st.floats(0, 1e300), st.floats(0, 1e300))
def test_no_time_is_too_long(first, then):
    """Decay to nothing is nothing, never an error."""
    circuit = fail(Circuit(POLICY), 6, first)
    circuit.succeeded(max(first, then))
    assert 0 <= circuit.statistics(max(first, then)).failures <= 6


# --- against a model -------------------------------------------------------------------------------------------------


class CircuitMachine(RuleBasedStateMachine):
    """A circuit beside a model that keeps every attempt there was, and weighs them all anew each time."""

    def __init__(self) -> None:
        super().__init__()
        self.policy = CircuitPolicy(max_failures=2.5, decay_s=10, backoff_s=7)
        self.circuit = Circuit(self.policy)
        self.now = 1000.0
        self.failures: list[float] = []
        self.successes: list[float] = []
        self.mode = "closed"
        self.until = 0.0
        self.refused = self.opened = 0

    def weigh(self, times: list[float]) -> float:
        return math.fsum(math.exp2((at - self.now) / 10) for at in times)

    def expected(self) -> str:
        return "half_open" if self.mode == "open" and self.now >= self.until else self.mode

    def open(self) -> None:
        self.mode, self.until = "open", self.now + 7
        self.opened += 1

    @rule(seconds=st.sampled_from([0.0, 0.5, 1.0, 3.0, 6.0, 7.0, 20.0]))
    def pass_time(self, seconds: float) -> None:
        self.now += seconds

    @rule()
    def fail(self) -> None:
        state = self.expected()
        self.failures.append(self.now)
        failures = self.weigh(self.failures)
        # just where floats decide which is more, the circuit may differ from the model: it is asked
        close = min(abs(failures - 2.5), abs(failures - self.weigh(self.successes))) < 1e-6
        self.circuit.failed(self.now)
        if close and state == "closed":
            many = self.circuit.state(self.now) == "open"
        else:
            many = failures > 2.5 and failures > self.weigh(self.successes)
        if state == "half_open" or (state == "closed" and many):
            self.open()

    @rule()
    def succeed(self) -> None:
        if self.expected() == "half_open":
            self.mode = "closed"
            self.failures.clear()
        self.successes.append(self.now)
        self.circuit.succeeded(self.now)

    @rule()
    def ask(self) -> None:
        state = self.expected()
        allowed = state == "closed" or (state == "half_open" and self.now >= self.until)
        assert self.circuit.allows(self.now) == allowed
        if not allowed:
            self.refused += 1
        elif state == "half_open":
            self.mode, self.until = "half_open", self.now + 7

    @rule()
    def abandon(self) -> None:
        if self.mode == "half_open":
            self.mode, self.until = "open", self.now
        self.circuit.abandoned(self.now)

    @invariant()
    def they_agree(self) -> None:
        figures = self.circuit.statistics(self.now)
        assert self.circuit.state(self.now) == figures.state == self.expected()
        assert figures.failures == pytest.approx(self.weigh(self.failures), abs=0.002)
        assert figures.successes == pytest.approx(self.weigh(self.successes), abs=0.002)
        assert (figures.opened, figures.refused) == (self.opened, self.refused)
        waits = None if self.expected() == "closed" else max(0.0, self.until - self.now)
        assert figures.trial_in_s == (None if waits is None else pytest.approx(waits, abs=0.002))


TestCircuit = CircuitMachine.TestCase


# --- policies and the registry ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("field", ["max_failures", "decay_s", "backoff_s"])
@pytest.mark.parametrize("value", [0, -1, math.inf, math.nan, True, "5", None])
def test_a_policy_names_the_field_that_it_cannot_have(field, value):
    """What could divide by nothing, or wait for ever, is refused where it is made."""
    with pytest.raises(ConfigurationError) as caught:
        CircuitPolicy(**{field: value})
    assert caught.value.field == f"circuit.{field}"


def test_there_is_one_circuit_for_each_name():
    """Whoever asks for an upstream's circuit gets the same one, with the policy of all."""
    circuits = Circuits(CircuitPolicy(max_failures=1))
    fail(circuits.of("a"), 2)
    assert circuits.of("a").state(0.0) == "open"
    assert circuits.of("b").state(0.0) == "closed"
    assert len(circuits) == 2


def test_names_without_end_are_bounded():
    """The circuit that was not asked for longest goes; the others keep what they know."""
    circuits = Circuits(max_circuits=3)
    for name in "abc":
        fail(circuits.of(name), 6)
    circuits.of("a")
    circuits.of("d")
    assert sorted(circuits.report(0.0)) == ["a", "c", "d"]
    assert circuits.report(0.0)["a"]["state"] == "open"
    with pytest.raises(ConfigurationError):
        Circuits(max_circuits=0)


# --- what health tells of them ---------------------------------------------------------------------------------------


async def test_health_tells_of_the_circuits(mock_clock):
    """Each upstream's circuit as it is at this moment, in plain values; an upstream that fails is no illness of ours."""
    circuits = Circuits()
    async with open_supervisor(circuits=circuits.report) as sup:
        assert sup.health().circuits == {}
        circuits.of("well").succeeded(trio.current_time())
        fail(circuits.of("dead"), 8, trio.current_time())
        circuits.of("dead").allows(trio.current_time())
        mock_clock.jump(5)
        health = sup.health()
        mock_clock.jump(10)
        later = sup.health()

    told = json.loads(msgspec.json.encode(health))
    assert (told["status"], told["problems"]) == ("ok", [])
    assert told["circuits"]["dead"] == {
        "state": "open",
        "failures": pytest.approx(8 * 0.5 ** (5 / 30), abs=0.001),
        "successes": 0.0,
        "opened": 1,
        "refused": 1,
        "trial_in_s": 10.0,
    }
    assert told["circuits"]["well"]["state"] == "closed"
    assert told["circuits"]["well"]["trial_in_s"] is None
    assert later.circuits["dead"]["state"] == "half_open"


async def test_without_circuits_health_has_none():
    """A supervisor that was given none says so by an empty mapping."""
    async with open_supervisor() as sup:
        assert sup.health().circuits == {}
