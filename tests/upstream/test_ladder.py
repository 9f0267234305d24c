"""The ladder's decisions: which rung, when not, and within which budgets. No I/O."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import attrs
import pytest
from hypothesis import given
from hypothesis import strategies as st

from supervisor.dialects import (
    OPENAI_CHAT,
    Asking,
    Call,
    Choice,
    Dialect,
    Endings,
    Fault,
    Progress,
    Snapshot,
    ToolCall,
)
from supervisor.upstream import RetryPolicy, Upstream
from supervisor.upstream.ladder import Failure, Ladder, Standing, Step

EVERY = ("sequence", "continuation", "restart")
CUT = Failure("truncated", Fault(kind="truncated", message="cut", temporary=True), again=True, began=True)
REFUSED = Failure("connect", Fault(kind="network", message="refused", temporary=True), again=True)
BAD = Failure("http_status", Fault(kind="invalid_request", message="no", status=400), again=False)
LOST = Failure("http_status", Fault(kind="invalid_request", message="gone", status=404), again=False)


def resume(request: Mapping[str, Any], progress: Progress) -> Call | None:
    return Call(path=f"/after/{progress.last_event_id}", method="GET") if request.get("keep") else None


def go_on(request: Mapping[str, Any], text: str) -> Mapping[str, Any] | str:
    return {**request, "prefill": text} if request.get("prefill") != "never" else "the model takes none"


KEEPING = Dialect(
    name="keeping",
    framing="sse",
    reader=OPENAI_CHAT.reader,
    endings=Endings(markers=("[DONE]",)),
    asking=Asking(path="/ask", resume=resume, continuation=go_on),
)


class Circuit:
    """A circuit that a test opens and closes."""

    def __init__(self) -> None:
        self.is_open = False

    def allows(self, now: float) -> bool:
        return not self.is_open

    def state(self, now: float) -> str:
        return "open" if self.is_open else "closed"

    def succeeded(self, now: float) -> None: ...

    def failed(self, now: float) -> None: ...

    def abandoned(self, now: float) -> None: ...


def upstream(name: str = "one", **options: Any) -> Upstream:
    return Upstream(name=name, base_url=f"http://{name}.test", dialect=KEEPING, **options)


def ladder(
    *rungs: str,
    request: bytes = b'{"keep": true}',
    others: tuple[str, ...] = (),
    circuits: Mapping[str, Circuit] | None = None,
    **policy: Any,
) -> Ladder:
    chosen = RetryPolicy(resume=rungs, **policy)
    targets = [upstream(), *map(upstream, others)]
    made = Ladder(request, targets, chosen, draw=lambda: 0.5, breakers=(circuits or {}).get)
    made.first(0.0)
    return made


def standing(text: str = "half an ans", **options: Any) -> Standing:
    choice = Choice(index=0, text=text, reasoning="", refusal="", tool_calls=(), finish_reason=None)
    answer = attrs.evolve(Snapshot(text=text, choices=(choice,)), **options.pop("answer", {}))
    given: dict[str, Any] = {
        "begun": True, "answer": answer, "seq": 9, "reader": None, "last_event_id": "", "retry_s": None,
    }  # fmt: skip
    return Standing(spilled=False, **(given | options))


NOTHING = standing(begun=False, answer={"text": "", "choices": ()}, seq=1)


def rung(step: Step | None) -> str | None:
    return None if step is None else step.rung


def test_before_the_first_event_it_is_asked_again() -> None:
    """A retry needs no leave from `resume`; the backoff grows with each failure."""
    climb = ladder(attempts=4)
    delays = []
    for _ in range(3):
        step = climb.next(REFUSED, NOTHING, 0.0)
        assert step is not None
        assert (step.rung, step.call) == ("retry", b'{"keep": true}')
        delays.append(step.delay_s)
    assert delays == [0.25, 0.5, 1.0]
    assert climb.next(REFUSED, NOTHING, 0.0) is None
    assert climb.passed_over == {"attempts": "all 4 are made"}


def test_the_rungs_come_in_order() -> None:
    """What costs least and changes least first; each only if the policy names it."""
    assert rung(ladder(*EVERY).next(CUT, standing(), 0.0)) == "sequence"
    assert rung(ladder(*EVERY[1:]).next(CUT, standing(), 0.0)) == "continuation"
    assert rung(ladder("restart").next(CUT, standing(), 0.0)) == "restart"
    none = ladder()
    assert none.next(CUT, standing(), 0.0) is None
    assert none.passed_over == dict.fromkeys(EVERY, "the policy does not name it")


def test_the_order_of_the_policy_does_not_matter() -> None:
    """The ladder's order is fixed; the policy only says what is on it."""
    assert rung(ladder("restart", "sequence").next(CUT, standing(), 0.0)) == "sequence"


def test_a_refused_rung_is_not_tried_again_and_the_next_is_climbed() -> None:
    """A 404 to a resume leads to the continuation, a 400 to that to a restart; each record says why."""
    climb = ladder(*EVERY, attempts=10)
    first = climb.next(CUT, standing(), 0.0)
    second = climb.next(LOST, standing(), 0.0)
    third = climb.next(BAD, standing(), 0.0)
    assert [rung(first), rung(second), rung(third)] == ["sequence", "continuation", "restart"]
    assert third is not None
    assert third.details["passed_over"] == dict.fromkeys(EVERY[:2], "it was refused before")
    assert third.cause == "http_status: no"
    assert climb.next(BAD, standing(), 0.0) is None


def test_a_refused_rung_is_not_tried_again_before_the_first_event_either() -> None:
    """An event stream that has sent an id, and no event, is asked for the rest; if it refuses, once."""
    climb = ladder("sequence", attempts=10, others=("two",))
    at = attrs.evolve(NOTHING, last_event_id="7")
    assert rung(climb.next(attrs.evolve(CUT, began=False), at, 0.0)) == "sequence"
    assert rung(climb.next(REFUSED, at, 0.0)) == "sequence"
    step = climb.next(LOST, at, 0.0)
    assert rung(step) == "fallback"
    assert step is not None
    assert step.details["passed_over"]["sequence"] == "it was refused before"


def test_a_rung_that_failed_for_a_while_is_tried_again() -> None:
    """A refused connection says nothing of the rung."""
    climb = ladder(*EVERY)
    climb.next(CUT, standing(), 0.0)
    assert rung(climb.next(REFUSED, standing(), 0.0)) == "sequence"


@pytest.mark.parametrize(
    ("answer", "why"),
    [
        ({"tool_calls": (ToolCall(id="c", name="f", arguments="{"),)}, "a tool call had begun"),
        ({"reasoning": "hm"}, "reasoning or a refusal had begun, which cannot be given back"),
        ({"refusal": "no"}, "reasoning or a refusal had begun, which cannot be given back"),
    ],
)
def test_what_cannot_be_continued(answer: dict[str, Any], why: str) -> None:
    """Only plain text of one choice can be given back as a beginning."""
    climb = ladder("continuation")
    assert climb.next(CUT, standing(answer=answer), 0.0) is None
    assert climb.passed_over["continuation"] == why


def test_to_go_on_from_nothing_is_to_ask_again() -> None:
    """A policy that lets the model go on lets it begin, where only the preamble of an answer was received."""
    for text in ("", " \n"):
        step = ladder("continuation").next(CUT, standing(text), 0.0)
        assert step is not None
        assert (step.rung, step.call) == ("restart", b'{"keep": true}')
    assert ladder("sequence", request=b"{}").next(CUT, standing(""), 0.0) is None


def test_to_go_on_from_nothing_is_refused_like_a_restart() -> None:
    """Asked once in vain, it is not asked again under either name."""
    climb = ladder("continuation", "restart", attempts=10)
    nothing = standing(answer={"text": " "})
    assert rung(climb.next(CUT, nothing, 0.0)) == "restart"
    assert climb.next(LOST, nothing, 0.0) is None
    assert climb.passed_over["continuation"] == "it would be a restart, which was refused before"
    assert climb.passed_over["restart"] == "it was refused before"


def test_several_choices_cannot_be_continued() -> None:
    """There is no request for the rest of two answers."""
    both = standing().answer.choices * 2
    climb = ladder("continuation")
    assert climb.next(CUT, standing(answer={"choices": both}), 0.0) is None
    assert climb.passed_over["continuation"] == "several choices had begun"


def test_a_model_that_takes_no_prefill() -> None:
    """The dialect's reason is told, and the next rung climbed."""
    climb = ladder("continuation", "restart", request=b'{"prefill": "never"}')
    step = climb.next(CUT, standing(), 0.0)
    assert step is not None
    assert step.rung == "restart"
    assert step.details["passed_over"]["continuation"] == "the model takes none"


def test_an_answer_that_is_not_held_is_not_given_back() -> None:
    """One too long to be in memory is gone on with where the provider has it, and never continued from its end alone."""
    climb = ladder("continuation", "restart")
    step = climb.next(CUT, attrs.evolve(standing(), spilled=True), 0.0)
    assert step is not None
    assert step.rung == "restart"
    assert step.details["passed_over"]["continuation"] == "the answer is too long to be given back"
    assert "kept" not in step.details


def test_white_space_at_the_end_is_not_given_back() -> None:
    """Providers refuse a prefill that ends in it; the model brings it again."""
    step = ladder("continuation").next(CUT, standing("some text \n"), 0.0)
    assert step is not None
    assert step.dropped == 2
    assert step.details["kept"] == {"seq": 9, "chars": 9}
    assert b'"prefill":"some text"' in step.call  # type: ignore[operator]  # posted as bytes


@pytest.mark.parametrize("rungs", [EVERY, ("restart",)])
def test_a_finished_answer_is_only_resumed(rungs: tuple[str, ...]) -> None:
    """With a finish reason and no end marker there is nothing to generate: the rest may be fetched, no more."""
    ended = standing().answer.choices[0]
    at = standing(answer={"choices": (attrs.evolve(ended, finish_reason="stop"),)})
    climb = ladder(*rungs, request=b"{}", others=("two",))
    assert climb.next(CUT, at, 0.0) is None
    assert "resume" in climb.passed_over


@pytest.mark.parametrize("failure", [attrs.evolve(BAD, began=True), attrs.evolve(LOST, began=True)])
def test_what_time_does_not_heal_ends_an_answer_that_had_begun(failure: Failure) -> None:
    """A provider that says in the middle that the answer is refused is not asked again, there or elsewhere."""
    assert ladder(*EVERY, others=("two",)).next(failure, standing(), 0.0) is None


def test_a_provider_that_ends_the_answer_itself_has_no_rest() -> None:
    """An error in the stream is no lost connection: the sequence is passed over."""
    failure = attrs.evolve(CUT, reason="provider_error")
    step = ladder(*EVERY).next(failure, standing(), 0.0)
    assert rung(step) == "continuation"


def test_a_response_that_was_given_up_is_not_gone_back_to() -> None:
    """Once the question was asked again, the rest of the first response is nothing that anybody could still read."""
    climb = ladder("sequence", "restart", attempts=10)
    first = climb.next(attrs.evolve(CUT, reason="provider_error"), standing(), 0.0)
    second = climb.next(REFUSED, standing(), 0.0)
    assert [rung(first), rung(second)] == ["restart", "restart"]
    assert second is not None
    assert second.details["passed_over"]["sequence"] == "the answer was given up for another"
    assert rung(climb.next(CUT, standing(), 0.0)) == "sequence"  # of the new one


# --- fallbacks -------------------------------------------------------------------------------------------------------


def test_a_fallback_before_the_first_event() -> None:
    """Needs no leave; one attempt is kept back for each."""
    climb = ladder(attempts=3, others=("two",))
    first, second = climb.next(REFUSED, NOTHING, 0.0), climb.next(REFUSED, NOTHING, 0.0)
    assert [rung(first), rung(second)] == ["retry", "fallback"]
    assert second is not None
    assert second.upstream.name == "two"
    assert second.delay_s == 0
    assert climb.next(REFUSED, NOTHING, 0.0) is None


def test_a_permanent_refusal_goes_to_the_fallback_at_once() -> None:
    """A wrong key here may be a right one there; a request that is wrong is wrong everywhere."""
    denied = Failure("http_status", Fault(kind="auth", message="no", status=401), again=False)
    assert rung(ladder(others=("two",)).next(denied, NOTHING, 0.0)) == "fallback"
    assert ladder(others=("two",)).next(BAD, NOTHING, 0.0) is None
    for kind in ("context_length", "content_filter"):
        wrong = Failure("http_status", Fault(kind=kind, message="no", status=400), again=False)  # type: ignore[arg-type]  # they are kinds
        assert ladder(others=("two",)).next(wrong, NOTHING, 0.0) is None


def test_a_fallback_after_the_first_event_needs_leave_to_restart() -> None:
    """It would withdraw what was received."""
    assert ladder("sequence", request=b"{}", others=("two",)).next(CUT, standing(), 0.0) is None
    climb = ladder("restart", attempts=2, others=("two",))
    assert rung(climb.next(CUT, standing(), 0.0)) == "fallback"


def test_a_fallback_does_not_go_on_with_anothers_answer() -> None:
    """What it has is neither its response nor its model's words."""
    climb = ladder(*EVERY, attempts=10, others=("two",))
    climb._burned.update(EVERY)
    assert rung(climb.next(CUT, standing(), 0.0)) == "fallback"
    step = climb.next(REFUSED, standing(), 0.0)
    assert rung(step) == "restart"
    assert step is not None
    assert step.upstream.name == "two"
    assert step.details["passed_over"]["sequence"] == "another upstream began this answer"
    assert step.details["passed_over"]["continuation"] == "another upstream began this answer"
    resumed = climb.next(CUT, standing(), 0.0)
    assert rung(resumed) == "sequence"  # now it is its own


def test_models_have_each_upstreams_own_names() -> None:
    """A request names the model as the first upstream does; each is asked for what it calls it."""
    targets = [upstream(), upstream("two", models={"m": "vendor/m"})]
    climb = Ladder(
        b'{"model":"m"}', targets, RetryPolicy(attempts=2), draw=lambda: 0.5, breakers=lambda _: None
    )
    assert climb.first(0.0).call == b'{"model":"m"}'
    step = climb.next(REFUSED, NOTHING, 0.0)
    assert step is not None
    assert step.call == b'{"model":"vendor/m","stream":true}'


# --- circuits --------------------------------------------------------------------------------------------------------


def test_an_open_circuit_refuses_further_attempts_only() -> None:
    """The first attempt of a stream is made in any case; a second one is not."""
    circuit = Circuit()
    circuit.is_open = True
    climb = ladder(circuits={"one": circuit})
    assert climb.made == 1
    assert climb.next(REFUSED, NOTHING, 0.0) is None
    assert climb.passed_over == {"retry": "the circuit of one is open"}
    assert climb.telling  # although there is no other upstream: it would have been asked again


def test_an_open_circuit_sends_the_first_attempt_to_the_fallback() -> None:
    """Which has to be asked sooner or later."""
    circuit = Circuit()
    circuit.is_open = True
    climb = Ladder(
        b"{}", [upstream(), upstream("two")], RetryPolicy(), draw=lambda: 0.5, breakers={"one": circuit}.get
    )
    step = climb.first(0.0)
    assert (step.upstream.name, step.rung, step.cause) == ("two", "fallback", "circuit open: one")


def test_a_fallback_with_an_open_circuit_is_passed_over() -> None:
    """The one after it is asked."""
    circuit = Circuit()
    circuit.is_open = True
    climb = ladder(attempts=2, others=("two", "three"), circuits={"two": circuit})
    step = climb.next(REFUSED, NOTHING, 0.0)
    assert step is not None
    assert step.upstream.name == "three"


def test_no_attempt_is_kept_for_a_fallback_with_an_open_circuit() -> None:
    """It would be kept in vain: the upstream that is there is asked again."""
    circuit = Circuit()
    circuit.is_open = True
    climb = ladder(attempts=2, others=("two",), circuits={"two": circuit})
    assert rung(climb.next(REFUSED, NOTHING, 0.0)) == "retry"
    assert climb.next(REFUSED, NOTHING, 0.0) is None


# --- waits -----------------------------------------------------------------------------------------------------------


def test_the_streams_own_reconnection_time() -> None:
    """`retry:` is waited exactly, and with each further failure in a row the backoff is added."""
    climb = ladder("sequence")
    at = standing(retry_s=3.0, last_event_id="7")
    first, second = climb.next(CUT, at, 0.0), climb.next(REFUSED, at, 0.0)
    assert first is not None
    assert second is not None
    assert (first.delay_s, second.delay_s) == (3.0, 3.25)
    assert first.details["last_event_id"] == "7"


def test_a_reconnection_time_that_is_too_long() -> None:
    """Is treated as such a Retry-After: the stream ends and its caller decides."""
    climb = ladder("sequence")
    assert climb.next(CUT, standing(retry_s=61.0), 0.0) is None
    assert "60 s" in climb.passed_over["sequence"]


# --- the ending ------------------------------------------------------------------------------------------------------


def test_what_broke_the_answer_off_is_told_in_the_end() -> None:
    """A refused resume does not hide that the answer was cut off."""
    climb = ladder("sequence")
    climb.next(CUT, standing(), 0.0)
    assert climb.next(LOST, standing(), 0.0) is None
    told = climb.last(LOST)
    assert told.reason == "truncated"
    assert told.fault.message == "cut; then sequence failed: gone"


def test_a_failure_before_any_event_is_told_as_it_is() -> None:
    """There is nothing that it could hide."""
    climb = ladder(attempts=1)
    assert climb.next(BAD, NOTHING, 0.0) is None
    assert climb.last(BAD) is BAD


FAILURES = st.sampled_from([CUT, REFUSED, BAD, LOST, attrs.evolve(CUT, reason="provider_error")])


@given(
    st.integers(1, 6),
    st.lists(st.sampled_from(EVERY), unique=True),
    st.integers(0, 3),
    st.lists(st.tuples(FAILURES, st.booleans()), min_size=8, max_size=8),
)
def test_budgets_hold_whatever_happens(
    attempts: int, rungs: list[str], fallbacks: int, events: list[tuple[Failure, bool]]
) -> None:
    """Never more attempts than allowed, no rung that is not named, no upstream left and come back to."""
    names = ("two", "three", "four")[:fallbacks]
    climb = ladder(*rungs, attempts=attempts, others=names)
    order = ["one", *names]
    here, begun, made = 0, False, 1
    for failure, delivered in events:
        began = delivered and failure is not REFUSED
        begun = begun or began
        at = standing() if begun else NOTHING
        step = climb.next(attrs.evolve(failure, began=began), at, 0.0)
        if step is None:
            assert climb.passed_over or not failure.again or began
            break
        made += 1
        assert step.rung is not None
        assert step.rung in {"retry", "fallback", *rungs}
        assert step.rung != "retry" or not begun
        assert step.rung != "fallback" or not begun or "restart" in rungs
        there = order.index(step.upstream.name)
        assert there > here if step.rung == "fallback" else there == here
        here = there
    assert made <= attempts
    assert climb.made == made
