"""`HttpSource`: one request to a provider, made as often as the ladder allows, read into a stream.

The chain from bytes to journal is one synchronous call (`BodyReader.feed`); what is here is around it. `attempt.py` makes one
attempt and returns how it failed; `ladder.py` decides, without any I/O, what is done then; this file carries that out.

A stream that was stopped, or given up, may leave the provider generating for nobody. Where the provider can be told, it is told,
and asked what the answer used, in what remains of the cleanup time.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Final

import msgspec
import trio

from supervisor.dialects import Dialect, Fault
from supervisor.errors import ConfigurationError, UpstreamError
from supervisor.upstream.attempt import Attempt, Transport, ask
from supervisor.upstream.ladder import Breaker, Failure, Ladder, Standing, Step
from supervisor.upstream.retry import RetryPolicy
from supervisor.upstream.veil import veil_for

if TYPE_CHECKING:
    from supervisor.streams import Output
    from supervisor.upstream.catalog import Upstream

__all__ = ["HttpSource", "Transport"]

MAX_REQUEST_BYTES: Final = 32 << 20
"""The largest request body."""

_RETRIEVED_BYTES: Final = 8 << 20
_CLEANUP_SHARE: Final = 0.8
_ASK_AGAIN_S: Final = 0.25


class HttpSource:
    """A source that sends one request to an upstream and reads its stream.

    upstream: where and how. request: the JSON object to send, or its bytes; `"stream": true` is put in where it is
    missing and the dialect wants it. transport: shared by all streams. retry: in place of the upstream's policy. circuits:
    returns the circuit of an upstream by its name.

    Cancelled, it closes its connection at once, in whatever phase. Raises ConfigurationError for a request that is no JSON
    object, is too large, or says `"stream": false`, and for a credential that is missing, of any upstream that may be asked:
    they are looked for here, and read again for each attempt.
    """

    __slots__ = (
        "_circuits",
        "_draw",
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
        draw: Callable[[], float] = random.random,
    ) -> None:
        self._request = _as_bytes(request, streaming=upstream.dialect.asking.first is None)
        self._transport = transport
        self._retry = upstream.retry if retry is None else retry
        self._circuits = circuits or _no_circuit
        self._draw = draw
        self._targets = (upstream, *upstream.fallback)
        self.dialect: Dialect = upstream.dialect
        self.upstream: str = upstream.name
        for target in self._targets:  # what is wrong with a request or a credential is told now
            target.first(self._request)
            target.secret()

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
        return Ladder(self._request, self._targets, self._retry, draw=self._draw, breakers=self._circuits)


class _Climb:
    """The attempts of one stream."""

    __slots__ = (
        "_attempt",
        "_first_event_id",
        "_ladder",
        "_last_event_id",
        "_last_payload",
        "_out",
        "_owner",
        "_retry_ms",
        "_source",
    )

    def __init__(self, source: HttpSource, out: Output) -> None:
        self._source = source
        self._out = out
        self._ladder = source._ladder()  # noqa: SLF001  # one object in two: what is shared by runs, and one run
        self._attempt: Attempt | None = None
        self._owner: Upstream | None = None  # of the answer as it stands
        self._last_payload = b""
        self._first_event_id = self._last_event_id = ""
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
            wanted = await self._pause(further)
            if self._stopped(failure.fault) or not wanted:
                return
            step = further

    def _stopped(self, fault: Fault | None) -> bool:
        """End a stream that is being stopped, as no attempt is being made that could let its answer end. False if none was asked for."""
        if not self._out.stopping:
            return False
        self._out.stop(fault)
        return True

    async def _pause(self, step: Step) -> bool:
        """Wait before an attempt; say whether it is still to be made. If not, its circuit gets back the trial it may have given."""
        wanted = False
        try:
            await trio.sleep(step.delay_s)
            wanted = not (self._out.sealed or self._out.stopping)
        finally:
            circuit = self._source._circuits(step.upstream.name)  # noqa: SLF001  # as above
            if not wanted and circuit is not None:
                circuit.abandoned(trio.current_time())
        return wanted

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
        )
        failure: Failure | None = None
        try:
            failure = await attempt.run(step.call)
        finally:
            if circuit is not None:
                if failure is not None and (failure.again or failure.began):
                    circuit.failed(trio.current_time())
                elif not attempt.begun:
                    circuit.abandoned(trio.current_time())
                elif not counted:
                    circuit.succeeded(trio.current_time())
        self._last_payload = attempt.last_payload or self._last_payload
        if attempt.body is not None:
            self._last_event_id = attempt.body.last_event_id
            self._first_event_id = attempt.body.first_event_id
            self._retry_ms = attempt.body.retry_ms if attempt.body.retry_ms is not None else self._retry_ms
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
            last_payload=self._last_payload,
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
        upstream, out = self._owner, self._out
        if upstream is None:
            return
        transport = self._source._transport  # noqa: SLF001  # as above
        asking, response_id = upstream.dialect.asking, out.answer.response_id
        if asking.cancel is None or response_id is None:
            return
        request = upstream.asked(self._source._request)  # noqa: SLF001
        call = asking.cancel(request, response_id)
        veil = None  # what is answered may repeat the credential
        while call is not None:
            try:
                veil = veil_for(upstream.secret(), out.max_event_bytes)
                status, body = await ask(
                    transport, upstream, upstream.placed(call), max_bytes=_RETRIEVED_BYTES
                )
            except (UpstreamError, ConfigurationError, trio.ClosedResourceError) as exc:
                why = str(exc) if veil is None else veil.shortened(str(exc))
                out.cleanup_failed(f"the provider could not be told to stop: {why}")
                return
            usage = asking.usage(body) if asking.usage is not None and 200 <= status < 300 else None
            if usage is not None:
                out.report_usage(usage)
                return
            if not 200 <= status < 300 and call.method != "GET":
                message = upstream.dialect.fault(status, body).message
                message = message if veil is None else veil.shortened(message)
                out.cleanup_failed(f"the provider refused to stop: {message}")
                return
            if call.method == "GET":
                await trio.sleep(_ASK_AGAIN_S)
            call = asking.retrieve(request, response_id) if asking.retrieve is not None else None


def _no_circuit(name: str) -> None:
    del name


def _as_bytes(request: Mapping[str, Any] | bytes, *, streaming: bool) -> bytes:
    """Return the request as JSON; `streaming`: with `"stream": true` in it."""
    given = request if isinstance(request, bytes) else None
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
    if len(body) > MAX_REQUEST_BYTES:
        raise ConfigurationError("request", f"({len(body)} bytes)", f"at most {MAX_REQUEST_BYTES} bytes")
    return body


def _counted(fault: Fault, attempts: int) -> Fault:
    if attempts == 1:
        return fault
    return msgspec.structs.replace(fault, message=f"{fault.message} (after {attempts} attempts)")
