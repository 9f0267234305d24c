"""OpenTelemetry spans: one a stream, its attempts as children, with the conventions' attributes and nothing that was said."""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest
import trio
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, StatusCode

from supervisor import Delta, MemoryStore, Output, Usage, open_supervisor
from supervisor.config import parse
from supervisor.daemon import run
from supervisor.dialects import Fault
from supervisor.errors import ConfigurationError, StoreError
from supervisor.observe.spans import Spans


@pytest.fixture
def exporter() -> InMemorySpanExporter:
    return InMemorySpanExporter()


@pytest.fixture
def provider(exporter) -> TracerProvider:
    made = TracerProvider()
    made.add_span_processor(SimpleSpanProcessor(exporter))
    return made


async def answer(out: Output, *, fault: Fault | None = None) -> None:
    out.attempt(1, upstream="one")
    out.attempt(2, upstream="two", rung="fallback", cause="connect: refused", delay_s=0.25)
    out.append(b'{"said":"secret"}', "", (Delta(text="secret", usage=Usage(input=7, output=9)),))
    if fault is not None:
        out.fail("provider_error", fault)
    out.complete("stop")


async def test_a_stream_and_its_attempts(provider, exporter):
    """The stream's span has the whole of it, the attempts are below it; the wait between them belongs to neither."""
    with provider.get_tracer("a program").start_as_current_span("request") as request:
        async with open_supervisor() as sup:
            spans = Spans(provider)
            sup.observe(spans)
            stream = await sup.start(answer, upstream="one", key="k", meta={"model": "gpt"}, tenant="t")
            outcome = await stream.wait()
    first, second, whole, _ = exporter.get_finished_spans()
    assert (whole.name, whole.kind, whole.status.status_code) == (
        "chat gpt",
        SpanKind.CLIENT,
        StatusCode.UNSET,
    )
    assert whole.parent.span_id == request.get_span_context().span_id
    told = dict(whole.attributes)
    assert told.pop("gen_ai.response.time_to_first_chunk") == stream.first_event_s
    assert told == {
        "gen_ai.operation.name": "chat",
        "gen_ai.provider.name": "native",
        "gen_ai.request.model": "gpt",
        "gen_ai.usage.input_tokens": 7,
        "gen_ai.usage.output_tokens": 9,
        "gen_ai.response.finish_reasons": ("stop",),
        "stream_supervisor.stream.id": stream.id,
        "stream_supervisor.stream.key": "k",
        "stream_supervisor.upstream": "one",
        "stream_supervisor.tenant": "t",
        "stream_supervisor.state": "completed",
        "stream_supervisor.reason": "stop",
        "stream_supervisor.attempts": 2,
        "stream_supervisor.events": 1,
    }
    assert (whole.start_time, whole.end_time) == (int(stream.created_at * 1e9), int(outcome.ended_at * 1e9))
    assert [span.name for span in (first, second)] == ["attempt 1", "attempt 2"]
    assert {span.parent.span_id for span in (first, second)} == {whole.context.span_id}
    assert (first.status.status_code, first.status.description) == (StatusCode.ERROR, "connect: refused")
    assert second.status.status_code is StatusCode.UNSET
    assert second.start_time - first.end_time == pytest.approx(0.25e9, abs=1000)
    assert second.attributes["stream_supervisor.rung"] == "fallback"
    assert "secret" not in "".join(span.to_json() for span in exporter.get_finished_spans())
    assert repr(spans) == "<Spans: 0 open>"


async def test_what_is_an_error(provider, exporter):
    """A failure is, with the fault's kind; a cancelled stream is not, however it came to be; one without a model has a name too."""
    async with open_supervisor() as sup:
        sup.observe(Spans(provider))
        slow = Fault(kind="overloaded", message="too much")
        await (await sup.start(partial(answer, fault=slow))).wait()
        *_, failed = exporter.get_finished_spans()
        assert (failed.name, failed.status.status_code) == ("chat", StatusCode.ERROR)
        assert failed.status.description == "failed(provider_error): too much"
        assert failed.attributes["error.type"] == "overloaded"
        assert "gen_ai.response.finish_reasons" not in failed.attributes
        exporter.clear()
        stream = await sup.start(answer)
        await stream.cancel()
        (cancelled,) = exporter.get_finished_spans()
        assert (cancelled.status.status_code, "error.type" in cancelled.attributes) == (
            StatusCode.UNSET,
            False,
        )
        assert cancelled.attributes["stream_supervisor.state"] == "cancelled"


async def test_spans_are_never_left_open(provider, exporter, caplog):
    """Also a stream whose outcome is lost has an end; one that began before anybody looked has no span."""

    class Refusing(MemoryStore):
        def end(self, *args, **kwargs):
            raise StoreError("no")

    async with open_supervisor(store=Refusing()) as sup:
        early = await sup.start(answer)
        spans = Spans(provider)
        sup.observe(spans)
        with pytest.raises(StoreError):
            await early.wait()
        assert exporter.get_finished_spans() == ()
        assert not [record for record in caplog.records if "observer" in record.message]
        with pytest.raises(StoreError):
            await (await sup.start(answer)).wait()
    *_, lost = exporter.get_finished_spans()
    assert (lost.status.status_code, lost.attributes["error.type"]) == (StatusCode.ERROR, "store")
    assert repr(spans) == "<Spans: 0 open>"


@contextmanager
def collector() -> Iterator[tuple[str, list[bytes]]]:
    """Take what is sent by OTLP over HTTP."""
    bodies: list[bytes] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            bodies.append(self.rfile.read(int(self.headers["content-length"])))
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}", bodies
        finally:
            server.shutdown()
            thread.join()


async def test_a_daemon_sends_them(monkeypatch):
    """With `spans = "otlp"` a collector has the span of a stream by the time the daemon has ended, under the daemon's name."""
    from supervisor.control import connect

    config = parse(
        'discover = false\n[control]\nport = 0\n[web]\nport = "none"\n[store]\npath = ":memory:"\n[telemetry]\nspans = "otlp"'
    )
    up, down = trio.open_memory_channel(1)
    with collector() as (url, bodies):
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", url)
        with trio.fail_after(30):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(partial(run, config, ready=up.send_nowait, simulated=True, environ={}))
                async with connect((await down.receive()).url) as client:
                    started = await client.start("simulated", prompt="Hello", model="sim/ok")
                    await client.wait(started.id)
                    await client.shutdown(grace_s=0)
        sent = b"".join(bodies)
    assert all(
        part in sent for part in (b"chat sim/ok", b"attempt 1", started.id.encode(), b"stream-supervisor")
    )
    assert b"unknown_service" not in sent


def test_without_the_extra(monkeypatch):
    """A configuration that wants spans is refused, with the command that brings what is missing; one that does not is good."""
    monkeypatch.setitem(sys.modules, "opentelemetry.exporter.otlp.proto.http", None)
    trio.run(parse('store.path = ":memory:"').check, {})
    with pytest.raises(
        ConfigurationError, match=r"\[telemetry\] spans.*pip install stream-supervisor\[otel\]"
    ):
        trio.run(parse('[telemetry]\nspans = "otlp"').check, {})
