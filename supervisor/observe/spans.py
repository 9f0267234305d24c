"""OpenTelemetry traces: one span a stream, its attempts as children. Needs the extra: `pip install stream-supervisor[otel]`.

Names and attributes are those of the conventions for generative AI (https://github.com/open-telemetry/semantic-conventions-genai): the
span covers all attempts, and prompts and answers are nowhere in it. A span's parent is whatever span is current where the stream is started.
Nothing is done for an event, and what is kept is one pair of spans for each stream that has not ended.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import AsyncIterator, Mapping
from typing import Any

import attrs
import trio
from opentelemetry import trace
from opentelemetry.trace import Span, SpanKind, Status, StatusCode, TracerProvider

from supervisor.observe.figures import conventional
from supervisor.streams import Outcome, State, Stream

__all__ = ["Spans", "otlp_spans"]

_OURS = "stream_supervisor."
_NS = 1_000_000_000
_FLUSH_S = 5.0


@attrs.define
class _Open:
    """The spans of a stream that has not ended."""

    stream: Span
    attempt: Span | None = None


class Spans:
    """An observer that makes spans: `supervisor.observe(Spans())`. Without a provider it is the global one."""

    def __init__(self, provider: TracerProvider | None = None) -> None:
        self._tracer = trace.get_tracer("stream-supervisor", tracer_provider=provider)
        self._open: dict[str, _Open] = {}

    def __repr__(self) -> str:
        return f"<Spans: {len(self._open)} open>"

    def started(self, stream: Stream) -> None:
        """Begin the stream's span."""
        operation, provider = conventional(stream.dialect)
        model = stream.spec.meta.get("model")
        told = {
            "gen_ai.operation.name": operation,
            "gen_ai.provider.name": provider,
            "gen_ai.request.model": model if isinstance(model, str) else None,
            f"{_OURS}stream.id": stream.id,
            f"{_OURS}stream.key": stream.key,
            f"{_OURS}upstream": stream.upstream,
            f"{_OURS}tenant": stream.tenant,
        }
        name = f"{operation} {model}" if isinstance(model, str) else operation
        at = int(stream.created_at * _NS)
        span = self._tracer.start_span(name, kind=SpanKind.CLIENT, attributes=_known(told), start_time=at)
        self._open[stream.id] = _Open(span)

    def attempted(self, stream: Stream, record: Mapping[str, Any]) -> None:
        """Begin an attempt's span, a child of the stream's; the one before it has failed, before the wait between the two."""
        spans = self._open.get(stream.id)
        if spans is None:  # it was started before anybody observed
            return
        now = time.time()
        if spans.attempt is not None:
            spans.attempt.set_status(Status(StatusCode.ERROR, record.get("cause")))
            spans.attempt.end(int((now - (record.get("delay_s") or 0.0)) * _NS))
        told = {
            f"{_OURS}attempt": record["attempt"],
            f"{_OURS}rung": record.get("rung"),
            f"{_OURS}upstream": record.get("upstream"),
        }
        spans.attempt = self._tracer.start_span(
            f"attempt {record['attempt']}",
            context=trace.set_span_in_context(spans.stream),
            kind=SpanKind.CLIENT,
            attributes=_known(told),
            start_time=int(now * _NS),
        )

    def began(self, stream: Stream) -> None:
        """Say when the first event came."""
        spans = self._open.get(stream.id)
        if spans is not None and stream.first_event_s is not None:
            spans.stream.set_attribute("gen_ai.response.time_to_first_chunk", stream.first_event_s)

    def ended(self, stream: Stream, outcome: Outcome | None) -> None:
        """End the stream's span, and that of its last attempt."""
        spans = self._open.pop(stream.id, None)
        if spans is None:
            return
        status, told = _ending(outcome)
        spans.stream.set_attributes(told)
        at = int((time.time() if outcome is None else outcome.ended_at) * _NS)
        for span in (spans.attempt, spans.stream):
            if span is not None:
                if status is not None:
                    span.set_status(status)
                span.end(at)


def _ending(outcome: Outcome | None) -> tuple[Status | None, dict[str, Any]]:
    """Return the status of a span, None for one that has not failed, and what is told of the ending."""
    if outcome is None:
        return Status(StatusCode.ERROR, "the outcome could not be recorded"), {"error.type": "store"}
    usage = outcome.usage if outcome.usage_quality != "estimated" else None
    completed = outcome.state is State.COMPLETED
    told: dict[str, Any] = {
        "gen_ai.usage.input_tokens": None if usage is None else usage.input,
        "gen_ai.usage.output_tokens": None if usage is None else usage.output,
        "gen_ai.response.finish_reasons": (outcome.reason,) if completed else None,
        f"{_OURS}state": outcome.state.value,
        f"{_OURS}reason": outcome.reason,
        f"{_OURS}attempts": outcome.attempts,
        f"{_OURS}events": outcome.events,
    }
    status = None
    if outcome.state in (State.FAILED, State.EXPIRED):
        told["error.type"] = outcome.reason if outcome.fault is None else outcome.fault.kind
        why = f": {outcome.message}" if outcome.message else ""
        status = Status(StatusCode.ERROR, f"{outcome.state}({outcome.reason}){why}")
    return status, _known(told)


def _known(told: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in told.items() if value is not None}


@contextlib.asynccontextmanager
async def otlp_spans() -> AsyncIterator[Spans]:
    """Give spans that are sent by OTLP over HTTP, from a thread of its own, to where `OTEL_EXPORTER_OTLP_ENDPOINT` and the like say.

    Sends at the end what is left, for at most five seconds.
    """
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter  # noqa: PLC0415  # takes its time
    from opentelemetry.sdk.resources import Resource  # noqa: PLC0415
    from opentelemetry.sdk.trace import TracerProvider as Provider  # noqa: PLC0415
    from opentelemetry.sdk.trace.export import BatchSpanProcessor  # noqa: PLC0415

    named = Resource.create()  # by OTEL_SERVICE_NAME and OTEL_RESOURCE_ATTRIBUTES
    if str(named.attributes.get("service.name", "")).startswith("unknown_service"):
        named = named.merge(Resource({"service.name": "stream-supervisor"}))
    provider = Provider(resource=named)
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
    try:
        yield Spans(provider)
    finally:
        with trio.move_on_after(_FLUSH_S, shield=True):
            await trio.to_thread.run_sync(provider.shutdown, abandon_on_cancel=True)
