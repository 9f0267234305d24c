"""`HttpSource`: one request to a provider, made as often as the ladder allows, read into a stream.

The chain from bytes to journal is one synchronous call (`BodyReader.feed`); what is here is around it. `attempt.py` makes one
attempt and returns how it failed; `ladder.py` decides, without any I/O, what is done then; this file carries that out.

A stream that was stopped, or given up, may leave the provider generating for nobody. Where the provider can be told, it is told,
and asked what the answer used, in what remains of the cleanup time. So it is of an answer whose place another attempt is to take:
while that one waits for its turn, and for at most `GIVE_UP_S`.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Final

import attrs
import msgspec
import trio

from supervisor.dialects import Call, Dialect, Fault, Usage
from supervisor.errors import ConfigurationError, UpstreamError
from supervisor.upstream.attempt import Answered, Attempt, Transport, ask
from supervisor.upstream.ladder import Breaker, Failure, Ladder, Standing, Step
from supervisor.upstream.retry import RetryPolicy
from supervisor.upstream.veil import Veil, veil_for

if TYPE_CHECKING:
    from supervisor.streams import Output
    from supervisor.upstream.catalog import Upstream

__all__ = ["Answered", "HttpSource", "Transport"]

MAX_REQUEST_BYTES: Final = 32 << 20
"""The largest request body."""

GIVE_UP_S: Final = 2.0
"""How long the provider of an answer that another takes the place of is given to stop it, before the next attempt, in seconds."""

_RETRIEVED_BYTES: Final = 8 << 20
_CLEANUP_SHARE: Final = 0.8
_ASK_AGAIN_S: Final = 0.25


class HttpSource:
    """A source that sends one request to an upstream and reads its stream.

    upstream: where and how. request: the JSON object to send, or its bytes; `"stream": true` is put in where it is
    missing and the dialect wants it. transport: shared by all streams. retry: in place of the upstream's policy. circuits:
    returns the circuit of an upstream by its name.

    first: makes the request that starts an answer, for whoever passes on somebody else's: then `request`, in bytes, is not looked
    at; only later calls about the answer go by it. It may ask for an answer that is no stream. answered: told how each attempt was
    answered, of a stream before its first event is added; it must not raise.

    Cancelled, it closes its connection at once, in whatever phase. Raises ConfigurationError for a request that is no JSON
    object, is too large, or says `"stream": false`, and for a credential that is missing, of any upstream that may be asked:
    they are looked for here, and read again for each attempt.
    """

    __slots__ = (
        "_answered",
        "_circuits",
        "_draw",
        "_first",
        "_request",
        "_retry",
        "_targets",
        "_transport",
        "dialect",
        "upstream",
    )

    def __init__(
        self,
        upstream: Upstream,
        request: Mapping[str, Any] | bytes,
        *,
        transport: Transport,
        retry: RetryPolicy | None = None,
        circuits: Callable[[str], Breaker | None] | None = None,
        first: Callable[[Upstream], Call] | None = None,
        answered: Callable[[Answered], None] | None = None,
        draw: Callable[[], float] = random.random,
    ) -> None:
        self._request = _as_bytes(
            request, streaming=upstream.dialect.asking.first is None, as_it_is=first is not None
        )
        self._first = first
        self._answered = answered
        self._transport = transport
        self._retry = upstream.retry if retry is None else retry
        self._circuits = circuits or _no_circuit
        self._draw = draw
        self._targets = (upstream, *upstream.fallback)
        self.dialect: Dialect = upstream.dialect
        self.upstream: str = upstream.name
        for target in self._targets:  # what is wrong with a request or a credential is told now
            (target.first(self._request) if first is None else first(target))
            target.secret()

    @property
    def bytes_held(self) -> int:
        """The request, which is kept for further attempts."""
        return len(self._request)

    def __repr__(self) -> str:
        return f"<HttpSource {self.upstream}: {len(self._request)} bytes to {self._targets[0].url}>"

    async def __call__(self, out: Output, /) -> None:
        """Make attempts until the stream is sealed. The stream's clocks bound all that is waited for here."""
        climb = _Climb(self, out)
        try:
            await climb.run()
        finally:
            # Not sealed: cancelled by the embedding program, or an error; the stream seals by it, but only once this has ended.
            if out.abandoned or not out.sealed:
                with trio.move_on_after(_CLEANUP_SHARE * out.cleanup_s, shield=True) as patience:
                    await climb.stop_there()
                if patience.cancelled_caught:
                    out.cleanup_failed(
                        "the provider did not say in time that it has stopped, or what it used"
                    )

    def _ladder(self) -> Ladder:
        return Ladder(
            self._request,
            self._targets,
            self._retry,
            draw=self._draw,
            breakers=self._circuits,
            first=self._first,
        )


class _Climb:
    """The attempts of one stream."""

    __slots__ = (
        "_attempt",
        "_first_event_id",
        "_ladder",
        "_last_event_id",
        "_out",
        "_owner",
        "_retry_ms",
        "_source",
        "_stopped_there",
    )

    def __init__(self, source: HttpSource, out: Output) -> None:
        self._source = source
        self._out = out
        self._ladder = source._ladder()  # noqa: SLF001  # one object in two: what is shared by runs, and one run
        self._attempt: Attempt | None = None
        self._owner: Upstream | None = None  # of the answer as it stands
        self._first_event_id = self._last_event_id = ""
        # The response that its provider has stopped, for another attempt.
        self._stopped_there: str | None = None
        self._retry_ms: int | None = None

    async def run(self) -> None:
        out, ladder = self._out, self._ladder
        if self._stopped(None):
            return
        step = ladder.first(trio.current_time())
        while True:
            out.attempt(
                ladder.made,
                cause=step.cause,
                delay_s=round(step.delay_s, 3),
                rung=step.rung,
                dropped=step.dropped,
                upstream=step.upstream.name,
                **step.details,
            )
            failure = await self._make(step)
            if failure is None or out.sealed or self._stopped(failure.fault):
                return
            further = ladder.next(failure, self._standing(), trio.current_time())
            if further is None:
                self._fail(ladder.last(failure))
                return
            out.waiting()
            wanted = await self._pause(further, failure)
            if self._stopped(failure.fault) or wanted is None:
                return
            step = wanted

    def _stopped(self, fault: Fault | None) -> bool:
        """End a stream that is being stopped, as no attempt is being made that could let its answer end. False if none was asked for."""
        if not self._out.stopping:
            return False
        self._out.stop(fault)
        return True

    async def _pause(self, step: Step, failure: Failure) -> Step | None:
        """Wait before an attempt; return it if it is still to be made. If not, its circuit gets back the trial it may have given."""
        wanted = False
        due = trio.current_time() + step.delay_s
        try:
            if step.rung != "sequence" and not (failure.began and failure.reason == "provider_error"):
                step = await self._give_up(step)
            await trio.sleep_until(due)
            wanted = not (self._out.sealed or self._out.stopping)
        finally:
            circuit = self._source._circuits(step.upstream.name)  # noqa: SLF001  # as above
            if not wanted and circuit is not None:
                circuit.abandoned(trio.current_time())
        return step if wanted else None

    async def _give_up(self, step: Step) -> Step:
        """Have the provider stop the answer that this attempt will not go on with. A failure of that is told in its record.

        A cancel leaves the provider to `stop_there`.
        """
        there = self._there()
        if there is None or there.response_id == self._stopped_there:
            return step
        why: str | None = "it did not answer in time"
        with trio.move_on_after(GIVE_UP_S):
            answered = await there.ask(there.cancel)
            why = answered if isinstance(answered, str) else there.refusal(*answered)
        if why is not None:
            return attrs.evolve(step, details={**step.details, "not_stopped": why})
        self._stopped_there = there.response_id
        return step

    def _there(self) -> _Kept | None:
        """Return the answer as the provider has it, if it can be stopped there."""
        upstream, response_id = self._owner, self._out.answer.response_id
        if upstream is None or upstream.dialect.asking.cancel is None or response_id is None:
            return None
        request = upstream.asked(self._source._request)  # noqa: SLF001  # as above
        call = upstream.dialect.asking.cancel(request, response_id)
        if call is None:
            return None
        return _Kept(
            transport=self._source._transport,  # noqa: SLF001
            upstream=upstream,
            request=request,
            response_id=response_id,
            cancel=call,
            max_event_bytes=self._out.max_event_bytes,
        )

    async def _make(self, step: Step) -> Failure | None:
        source, circuit = self._source, self._source._circuits(step.upstream.name)  # noqa: SLF001  # as above
        goes_on = step.rung == "sequence" and self._attempt is not None

        counted = False

        def begun() -> None:
            nonlocal counted
            self._owner = step.upstream
            if circuit is not None and circuit.state(trio.current_time()) != "closed":
                counted = True
                circuit.succeeded(trio.current_time())

        if step.rung == "fallback":
            self._retry_ms = None  # another event stream's
        self._attempt = attempt = Attempt(
            self._out,
            step.upstream,
            transport=source._transport,  # noqa: SLF001
            policy=source._retry,  # noqa: SLF001
            ends=step.upstream.dialect.asking.resume_ends if step.rung == "sequence" else frozenset(),
            reader=self._attempt.reader if goes_on and self._attempt is not None else None,
            last_event_id=self._last_event_id if goes_on else "",
            first_event_id=self._first_event_id if goes_on else "",
            on_begun=begun,
            on_answered=source._answered,  # noqa: SLF001
        )
        failure: Failure | None = None
        try:
            failure = await attempt.run(step.call)
        finally:
            body = attempt.let_go()
            if circuit is not None:
                if failure is not None and (failure.again or failure.began):
                    circuit.failed(trio.current_time())
                elif not attempt.begun:
                    circuit.abandoned(trio.current_time())
                elif not counted:
                    circuit.succeeded(trio.current_time())
        if body is not None:
            self._last_event_id = body.last_event_id
            self._first_event_id = body.first_event_id
            self._retry_ms = body.retry_ms if body.retry_ms is not None else self._retry_ms
        elif not goes_on:
            self._last_event_id = ""  # it was of a stream that this attempt did not go on with
        return failure

    def _standing(self) -> Standing:
        out, retry_ms = self._out, self._retry_ms
        return Standing(
            begun=out.begun,
            answer=out.answer,
            spilled=out.spilled,
            seq=out.tail_seq,
            reader=None if self._attempt is None else self._attempt.reader,
            last_event_id=self._last_event_id,
            retry_s=None if retry_ms is None else retry_ms / 1000,
        )

    def _fail(self, failure: Failure) -> None:
        out, ladder = self._out, self._ladder
        if failure.event is not None:
            out.append(*failure.event)
        if ladder.telling:
            out.note(not_resumed=ladder.passed_over)
        out.fail(failure.reason, _counted(failure.fault, ladder.made))

    async def stop_there(self) -> None:
        """Have the provider stop an answer that nobody will read, and report what it used. Bounded by the caller."""
        there, out = self._there(), self._out
        if there is None:
            return
        call = there.retrieve() if there.response_id == self._stopped_there else there.cancel
        while call is not None:
            answered = await there.ask(call)
            if isinstance(answered, str):
                out.cleanup_failed(f"the provider could not be told to stop: {answered}")
                return
            if (usage := there.usage(*answered)) is not None:
                out.report_usage(usage)
                return
            if call.method != "GET" and (why := there.refusal(*answered)) is not None:
                out.cleanup_failed(f"the provider refused to stop: {why}")
                return
            if call.method == "GET":
                await trio.sleep(_ASK_AGAIN_S)
            call = there.retrieve()


@attrs.define(kw_only=True)
class _Kept:
    """An answer that its provider goes on with whether anybody listens or not, and that can be stopped there."""

    transport: Transport
    upstream: Upstream
    request: Mapping[str, Any]
    response_id: str
    cancel: Call
    """The request that stops it."""
    max_event_bytes: int
    _veil: Veil | None = None
    """Over what the provider says: it may repeat the credential."""

    async def ask(self, call: Call) -> tuple[int, bytes] | str:
        """Make a request about the answer; return the status and the body, or why there is none."""
        try:
            self._veil = veil_for(self.upstream.secret(), self.max_event_bytes)
            answered = await ask(
                self.transport, self.upstream, self.upstream.placed(call), max_bytes=_RETRIEVED_BYTES
            )
        except (UpstreamError, ConfigurationError, trio.ClosedResourceError) as exc:
            return self._hidden(str(exc))
        return answered.status, answered.body

    def retrieve(self) -> Call | None:
        """Return the request that asks how it stands."""
        retrieve = self.upstream.dialect.asking.retrieve
        return None if retrieve is None else retrieve(self.request, self.response_id)

    def usage(self, status: int, body: bytes) -> Usage | None:
        """Return the usage that an answer states, if it does."""
        usage = self.upstream.dialect.asking.usage
        return usage(body) if usage is not None and 200 <= status < 300 else None

    def refusal(self, status: int, body: bytes) -> str | None:
        """Return why the provider did not do what it was asked; None if it did."""
        if 200 <= status < 300:
            return None
        return self._hidden(self.upstream.dialect.fault(status, body).message)

    def _hidden(self, message: str) -> str:
        return message if self._veil is None else self._veil.shortened(message)


def _no_circuit(name: str) -> None:
    del name


def _as_bytes(request: Mapping[str, Any] | bytes, *, streaming: bool, as_it_is: bool) -> bytes:
    """Return the request as JSON; `streaming`: with `"stream": true` in it, unless it is to stay `as_it_is`."""
    given = request if isinstance(request, bytes) else None
    if given is not None and as_it_is:
        return _bounded(given)
    if given is not None:
        try:
            request = msgspec.json.decode(given, type=dict[str, Any])
        except (msgspec.DecodeError, RecursionError):
            raise ConfigurationError("request", f"({len(given)} bytes)", "a JSON object") from None
    if not isinstance(request, Mapping):
        raise ConfigurationError("request", type(request), "a JSON object: a mapping, or its bytes")
    stream = request.get("stream")
    if stream not in (None, True):
        raise ConfigurationError("request.stream", stream, "true, or nothing: a supervised stream is one")
    if given is not None and (stream is True or not streaming):
        body = given
    else:
        try:
            body = msgspec.json.encode({**request, "stream": True} if streaming else dict(request))
        except (TypeError, ValueError, RecursionError) as exc:
            raise ConfigurationError("request", f"({type(exc).__name__})", f"JSON values: {exc}") from None
    return _bounded(body)


def _bounded(body: bytes) -> bytes:
    if len(body) > MAX_REQUEST_BYTES:
        raise ConfigurationError("request", f"({len(body)} bytes)", f"at most {MAX_REQUEST_BYTES} bytes")
    return body


def _counted(fault: Fault, attempts: int) -> Fault:
    if attempts == 1:
        return fault
    return msgspec.structs.replace(fault, message=f"{fault.message} (after {attempts} attempts)")
