"""The resume ladder: what is done next when an attempt has failed. Decisions only: no I/O, no clock of its own.

While nothing of the answer has been received, an attempt is simply made again (`retry`). Once something has, there are four
rungs, tried in this order, each only where it is possible and the retry policy names it in `resume`:

1. **sequence**: the provider still has the answer and sends the rest of it (a background response; an event stream with ids);
2. **continuation**: the model is asked to go on from the text received so far, given to it as its own beginning. Never with
   tool calls, reasoning or several choices begun, whose middle cannot be given back, and only in a form that the upstream is
   known to take;
3. **restart**: the question is asked again; with the first event of the new answer the old one is withdrawn;
4. **fallback**: another upstream is asked. Before the first event that needs no leave; after it, it withdraws as a restart does,
   so the policy must allow that.

**A rung that is refused is not tried again** (the provider does not know the response, the model takes no prefill); one that
fails for a reason that time heals is. Why a rung was passed over is told in the record of the attempt that was made instead, or,
if there is none, in a note.

**Budgets.** `attempts` bounds all attempts of a stream, whatever their rung and upstream; one is kept back for each fallback that
is still to be asked, unless its circuit is open. Each upstream has a circuit, which refuses further attempts (never a stream's
first) while the upstream fails more than it delivers. And the stream's total clock ends it in any state.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final, Protocol

import attrs
import msgspec

from supervisor.dialects import Call, Delta, Fault, Progress, Reader, Snapshot
from supervisor.upstream.retry import RetryPolicy

if TYPE_CHECKING:
    from supervisor.streams.attempts import Rung
    from supervisor.upstream.catalog import Upstream

__all__ = ["Breaker", "Failure", "Ladder", "Standing", "Step"]

_CAUSE_CHARS: Final = 500
_ELSEWHERE_TOO: Final = frozenset({"context_length", "content_filter"})
"""Faults that another upstream would find as well."""


class Breaker(Protocol):
    """What the ladder needs of an upstream's circuit. Times are in seconds, of any steady clock."""

    def allows(self, now: float) -> bool:
        """Say whether a further attempt may be made; a half-open circuit's one trial is taken by asking."""
        ...

    def state(self, now: float) -> str:
        """Return `closed`, `open` or `half_open`."""
        ...

    def succeeded(self, now: float) -> None:
        """Learn that an attempt has begun to deliver."""
        ...

    def failed(self, now: float) -> None:
        """Learn that an attempt has failed."""
        ...

    def abandoned(self, now: float) -> None:
        """Learn that an attempt came to nothing that says anything of the upstream."""
        ...


@attrs.frozen
class Failure:
    """How an attempt failed: what the stream's outcome will say, unless there is another attempt."""

    reason: str
    fault: Fault
    again: bool
    """Whether time may heal it."""
    event: tuple[bytes, str, tuple[Delta, ...]] | None = None
    """The upstream's event that told it, where it was the first: for the journal, if it is the ending."""
    began: bool = False
    """Whether this attempt received anything of the answer."""


@attrs.frozen(kw_only=True)
class Standing:
    """What there is of the answer when an attempt has failed."""

    begun: bool
    """Whether anything of it, as it now stands, is in the journal."""
    answer: Snapshot
    spilled: bool
    """Whether the text of `answer` is only a part, as all of it is too long to be held."""
    seq: int
    """The last event of the journal."""
    reader: Reader | None
    """What has read it, and reads on if the same response is gone on with."""
    last_event_id: str
    retry_s: float | None
    """The reconnection time that the event stream asked for."""


@attrs.frozen(kw_only=True)
class Step:
    """An attempt to make."""

    rung: Rung | None
    """None: the first."""
    upstream: Upstream
    call: Call | bytes
    """What to send; bytes: the body to post as it is."""
    delay_s: float = 0.0
    cause: str | None = None
    dropped: int = 0
    details: Mapping[str, Any] = attrs.field(factory=dict)
    """What else the attempt's record says: what was kept, and which rungs were passed over and why."""


class Ladder:
    """The climb of one stream: `first`, then `next` after each failure until it returns None; then `last` is the ending."""

    __slots__ = (
        "_breakers",
        "_burned",
        "_draw",
        "_first",
        "_given_up",
        "_here",
        "_lost",
        "_made",
        "_open_circuit",
        "_own",
        "_owner",
        "_policy",
        "_request",
        "_rung",
        "_targets",
        "_tries",
        "passed_over",
    )

    def __init__(
        self,
        request: bytes,
        targets: Sequence[Upstream],
        policy: RetryPolicy,
        *,
        draw: Callable[[], float],
        breakers: Callable[[str], Breaker | None],
        first: Callable[[Upstream], Call] | None = None,
    ) -> None:
        self._request = request
        self._own = first is not None
        """Whether what starts an answer is made by the program: then it cannot be made anew, to go on from a text."""
        self._first: Callable[[Upstream], Call | bytes] = first or self._usual
        self._targets = list(targets)
        self._policy = policy
        self._draw = draw
        self._breakers = breakers
        self._here = 0
        self._owner = 0
        """The upstream that the answer, as it stands, came from."""
        self._made = 0
        self._tries = 0
        """Failures in a row at this upstream, on which the backoff goes by."""
        self._rung: Rung | None = None
        self._burned: set[str] = set()
        self._given_up = False
        """Whether a request that does not go on with the standing answer's response was made since. What would read that response
        further is gone with it: it would take what the provider tells again for news."""
        self._lost: Failure | None = None
        """The failure that broke the answer off: what is told if no attempt to go on comes to anything."""
        self._open_circuit = ""
        """Which circuit refused the attempt that would have been made."""
        self.passed_over: dict[str, str] = {}
        """Why rungs were not taken at the last decision."""

    def __repr__(self) -> str:
        return f"<Ladder: {self._made} of {self._policy.attempts} attempts made, at {self._upstream.name}>"

    @property
    def _upstream(self) -> Upstream:
        return self._targets[self._here]

    @property
    def telling(self) -> bool:
        """Whether why no further attempt is made is worth a note: there was something to hope for."""
        hoped = (
            bool(set(self._policy.resume) - {"sequence"}) or self._upstream.dialect.asking.resume is not None
        )
        hoped = len(self._targets) > 1 or (self._lost is not None and hoped) or bool(self._open_circuit)
        return bool(self.passed_over) and hoped

    @property
    def made(self) -> int:
        """How many attempts were decided on."""
        return self._made

    def first(self, now: float) -> Step:
        """Return the first attempt: at the first upstream whose circuit is not open, at the first if all are."""
        for index, upstream in enumerate(self._targets):
            if self._may_ask(upstream, now):
                self._here = index
                break
        self._made = 1
        if not self._here:
            return Step(rung=None, upstream=self._upstream, call=self._first(self._upstream))
        self._rung = "fallback"
        skipped = ", ".join(upstream.name for upstream in self._targets[: self._here])
        return Step(
            rung="fallback",
            upstream=self._upstream,
            call=self._first(self._upstream),
            cause=f"circuit open: {skipped}",
        )

    def next(self, failure: Failure, at: Standing, now: float) -> Step | None:
        """Return the attempt to make after this failure, None if there is none to make."""
        self.passed_over = {}
        self._open_circuit = ""
        # Only what an attempt added to the answer shows that the upstream is well; a restart begins at nothing each time.
        progress = failure.began and self._rung in (None, "sequence", "continuation")
        self._tries = 1 if progress else self._tries + 1
        if failure.began or not at.begun:
            self._lost = failure if at.begun else None
            self._owner = self._here
            self._given_up = False
        if not (failure.began or failure.again) and self._rung is not None:
            self._burned.add(self._rung)
        if self._made >= self._policy.attempts:
            self.passed_over["attempts"] = f"all {self._policy.attempts} are made"
            return None
        step = self._further(failure, at, now) or self._elsewhere(failure, at, now)
        if step is None:
            return None
        self._made += 1
        self._rung = step.rung
        self._given_up = self._given_up or step.rung != "sequence"
        cause = f"{failure.reason}: {failure.fault.message}"[:_CAUSE_CHARS]
        details: dict[str, Any] = dict(step.details)
        if at.begun and step.rung in ("sequence", "continuation"):
            details["kept"] = {"seq": at.seq}
            if not at.spilled:
                details["kept"]["chars"] = len(at.answer.text) - step.dropped
        if self.passed_over:
            details["passed_over"] = dict(self.passed_over)
        return attrs.evolve(step, cause=cause, details=details)

    def last(self, failure: Failure) -> Failure:
        """Return the failure to end the stream with, given the last one: the one that broke the answer off, if any did."""
        if self._open_circuit:
            message = f"{failure.fault.message}; no further attempt, as {self._open_circuit}"
            failure = attrs.evolve(failure, fault=msgspec.structs.replace(failure.fault, message=message))
        if self._lost is None or self._lost is failure:
            return failure
        fault = self._lost.fault
        message = f"{fault.message}; then {self._rung or 'another attempt'} failed: {failure.fault.message}"
        return attrs.evolve(self._lost, fault=msgspec.structs.replace(fault, message=message), event=None)

    def _usual(self, upstream: Upstream) -> Call | bytes:
        return upstream.first(self._request)

    # --- the rungs ---------------------------------------------------------------------------------------------------

    def _further(self, failure: Failure, at: Standing, now: float) -> Step | None:
        """Return an attempt at the same upstream, or None, the reasons noted."""
        rungs = self._rungs(failure, at)
        chosen: Step | None = None
        for rung, decide in rungs:
            if rung in self._burned:
                self.passed_over[rung] = "it was refused before"
                continue
            decided = decide(failure, at)
            if isinstance(decided, str):
                self.passed_over[rung] = decided
                continue
            if decided.rung in self._burned:  # a continuation of nothing is a restart
                self.passed_over[rung] = f"it would be a {decided.rung}, which was refused before"
                continue
            chosen = decided
            break
        if chosen is None or chosen.rung is None:
            return None
        left = sum(self._may_ask(target, now) for target in self._targets[self._here + 1 :])
        if left and self._policy.attempts - self._made <= left and self._may_leave(at):
            self.passed_over[chosen.rung] = "the attempts left are kept for the fallbacks"
            return None
        delay_s = self._delay_s(failure, at)
        if delay_s is None:
            self.passed_over[chosen.rung] = (
                f"the upstream asks for a wait of more than {self._policy.retry_after_max_s:g} s"
            )
            return None
        breaker = self._breakers(self._upstream.name)
        if breaker is not None and not breaker.allows(now):
            self.passed_over[chosen.rung] = self._open_circuit = (
                f"the circuit of {self._upstream.name} is open"
            )
            return None
        return attrs.evolve(chosen, delay_s=delay_s)

    def _rungs(
        self, failure: Failure, at: Standing
    ) -> Sequence[tuple[str, Callable[[Failure, Standing], Step | str]]]:
        if not at.begun and not at.last_event_id:
            return (("retry", self._retry),)
        if failure.began and not failure.again:
            return ()
        choices = at.answer.choices
        # Where nothing else ends an answer, a finish reason may come with each event: it does not say that there was no more.
        if (
            choices
            and self._upstream.dialect.endings.markers
            and all(choice.finish_reason is not None for choice in choices)
        ):
            self.passed_over["resume"] = "the answer had finished; only its end marker is missing"
            return (("sequence", self._sequence),)
        if not at.begun:
            return ("sequence", self._sequence), ("retry", self._retry)
        return (
            ("sequence", self._sequence),
            ("continuation", self._continuation),
            ("restart", self._restart),
        )

    def _retry(self, failure: Failure, at: Standing) -> Step | str:
        del at
        if not failure.again:
            return "time does not heal this failure"
        return Step(rung="retry", upstream=self._upstream, call=self._first(self._upstream))

    def _sequence(self, failure: Failure, at: Standing) -> Step | str:
        if failure.began and failure.reason == "provider_error":
            return "the provider ended the answer itself"
        if "sequence" not in self._policy.resume:
            return "the policy does not name it"
        if self._here != self._owner:
            return "another upstream began this answer"
        if self._given_up:
            return "the answer was given up for another"
        asking = self._upstream.dialect.asking
        if asking.resume is None:
            return f"{self._upstream.dialect.name} has no way to ask for the rest of an answer"
        progress = Progress(
            snapshot=at.answer,
            reader=at.reader,
            last_event_id=at.last_event_id,
            path=self._upstream.path or asking.path or "",
        )
        call = asking.resume(self._upstream.asked(self._request), progress)
        if call is None:
            return "the provider does not keep this answer"
        details = {"last_event_id": at.last_event_id} if at.last_event_id else {}
        call = self._upstream.placed(call)
        return Step(rung="sequence", upstream=self._upstream, call=call, details=details)

    def _continuation(self, failure: Failure, at: Standing) -> Step | str:
        del failure
        if "continuation" not in self._policy.resume:
            return "the policy does not name it"
        if self._own:
            return "the request is sent as it is"
        if self._here != self._owner:
            return "another upstream began this answer"
        answer = at.answer
        if at.spilled:
            return "the answer is too long to be given back"
        if len(answer.choices) > 1:
            return "several choices had begun"
        if answer.tool_calls:
            return "a tool call had begun"
        if answer.reasoning or answer.refusal:
            return "reasoning or a refusal had begun, which cannot be given back"
        text = answer.text.rstrip()
        if not text:  # to go on from nothing is to ask again; nobody misses what is withdrawn
            return Step(rung="restart", upstream=self._upstream, call=self._first(self._upstream))
        request = self._upstream.continued(self._request, text)
        if isinstance(request, str):
            return request
        return Step(
            rung="continuation",
            upstream=self._upstream,
            call=self._upstream.first(request),
            dropped=len(answer.text) - len(text),
        )

    def _restart(self, failure: Failure, at: Standing) -> Step | str:
        del failure, at
        if "restart" not in self._policy.resume:
            return "the policy does not name it"
        return Step(rung="restart", upstream=self._upstream, call=self._first(self._upstream))

    def _may_ask(self, upstream: Upstream, now: float) -> bool:
        """Whether an upstream's circuit is not open. Takes no trial."""
        breaker = self._breakers(upstream.name)
        return breaker is None or breaker.state(now) != "open"

    def _may_leave(self, at: Standing) -> bool:
        return not at.begun or "restart" in self._policy.resume

    def _elsewhere(self, failure: Failure, at: Standing, now: float) -> Step | None:
        """Return an attempt at the next upstream that may be asked, or None."""
        if self._here + 1 >= len(self._targets):
            return None
        fault = failure.fault
        if fault.kind in _ELSEWHERE_TOO or (fault.kind == "invalid_request" and fault.status in (400, 422)):
            self.passed_over["fallback"] = "another upstream would find the same fault"
            return None
        if not self._may_leave(at):
            self.passed_over["fallback"] = "events were received, and the policy does not name restart"
            return None
        if at.begun and "resume" in self.passed_over:
            return None
        if failure.began and not failure.again:
            return None
        for index in range(self._here + 1, len(self._targets)):
            upstream = self._targets[index]
            breaker = self._breakers(upstream.name)
            if breaker is not None and not breaker.allows(now):
                self.passed_over[f"fallback to {upstream.name}"] = "its circuit is open"
                continue
            self._here = index
            self._tries = 0
            self._burned.clear()
            return Step(rung="fallback", upstream=upstream, call=self._first(upstream))
        return None

    def _delay_s(self, failure: Failure, at: Standing) -> float | None:
        asked_s = failure.fault.retry_after_s
        if asked_s is None and at.retry_s is not None:
            # The event stream's own reconnection time (WHATWG HTML, "Server-sent events"); with each failure in a row more.
            if at.retry_s > self._policy.retry_after_max_s:
                return None
            more = self._policy.delay_s(self._tries - 1, draw=self._draw) if self._tries > 1 else 0.0
            return at.retry_s + (more or 0.0)
        return self._policy.delay_s(self._tries, asked_s=asked_s, draw=self._draw)
