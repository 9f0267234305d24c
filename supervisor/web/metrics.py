"""`/metrics` for Prometheus, `/overview` and a stream's trace as JSON, and `/readyz`.

The exposition is made when it is asked for, of figures that are kept anyway; between two scrapes nothing is done for it. It is written in
whichever of Prometheus' formats the scraper asks for. What a name means is in docs/observability.md, which a test holds to this file.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import accumulate

import trio
from prometheus_client import CollectorRegistry, ProcessCollector
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.exposition import choose_encoder
from prometheus_client.registry import Collector
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from supervisor.control import answers
from supervisor.observe import Figures, overview
from supervisor.observe.figures import Counts, Histograms
from supervisor.version import version
from supervisor.web.app import Front, Part, answer, which

__all__ = ["Exposition", "part", "ready"]

_PREFIX = "stream_supervisor_"
MAX_TRACES = 4
"""Traces made at a time; the others wait."""
_STATES = ("closed", "half_open", "open")


def part(front: Front, figures: Figures) -> Part:
    """`/metrics`, `/overview`, `/streams/{id}/trace`."""
    registry = CollectorRegistry()
    registry.register(Exposition(figures))
    ProcessCollector(registry=registry)
    tracing = trio.CapacityLimiter(MAX_TRACES)

    async def metrics(request: Request) -> Response:
        encode, content_type = choose_encoder(request.headers.get("accept", ""))
        return Response(encode(registry), headers={"content-type": content_type})

    async def told_overview(request: Request) -> Response:
        del request
        return answer(overview(figures))

    async def told_trace(request: Request) -> Response:
        async with tracing:
            return answer(await answers.trace(front.supervisor, which(request)))

    return Part(
        routes=[
            Route("/metrics", metrics),
            Route("/overview", told_overview),
            Route("/streams/{id}/trace", told_trace),
        ]
    )


def ready(front: Front) -> Part:
    """`/readyz`: whether a start would be taken: the store can be written, and nobody is draining. 503 says why not."""

    async def readyz(request: Request) -> Response:
        del request
        health = front.supervisor.health()
        problems = ["the supervisor is draining"] if health.status == "draining" else []
        if health.store.state == "failing":
            problems.append("the store cannot write")
        return answer({"ready": not problems, "problems": problems}, 503 if problems else 200)

    return Part(routes=[Route("/readyz", readyz)], open=True)


class Exposition(Collector):
    """A supervisor's figures as Prometheus' metric families. Also for a registry of your own: `registry.register(Exposition(figures))`."""

    def __init__(self, figures: Figures) -> None:
        self._figures = figures

    def __repr__(self) -> str:
        return f"<Exposition of {self._figures!r}>"

    def collect(self) -> Iterator[Metric]:
        """Give every metric family."""
        yield _gauge("build_info", "1; the version is its label.", {("version",): {(version(),): 1}})
        yield from self._streams()
        yield from self._memory()
        yield from self._store()
        yield from self._circuits()

    def _streams(self) -> Iterator[Metric]:
        figures = self._figures
        told = figures.supervisor.statistics()
        unsettled = told.live + told.settling
        answering = min(figures.answering, unsettled)
        now = {"waiting": unsettled - answering, "answering": answering}
        yield _gauge("streams", "Streams that have not settled, by what they do.", _by("activity", now))
        yield _one(
            "streams_settling", "Of these, sealed ones whose outcome is not durable yet.", told.settling
        )
        yield _one("streams_overdue", "Of these, those whose outcome is overdue.", told.unrecorded)
        yield _one("streams_max", "Limits.max_live.", figures.supervisor.limits.max_live)
        yield _one("readers", "Subscriptions.", told.readers)
        yield _one("tombstones", "Cancels remembered for keys not seen yet.", told.tombstones)
        yield _counter("attached", "Starts that joined a stream by its key.", {(): {(): told.attached}})
        rejected = _by("limit", told.memory.rejected)
        yield _counter("rejected", "Starts that were refused, by the limit.", rejected)
        yield _counts("streams_started", "Streams started.", figures.started_by)
        yield _counts("streams_ended", "Streams ended, their outcomes durable.", figures.ended_by)
        yield _counts("attempts", "Attempts, by the upstream that was asked.", figures.attempts_by)
        yield _counts("stream_events", "Events of ended streams.", figures.events_by)
        yield _counts("stream_bytes", "Journalled bytes of ended streams.", figures.bytes_by)
        yield _histograms(
            "gen_ai_client_operation_duration_seconds",
            "From a stream's start to its end (gen_ai.client.operation.duration).",
            figures.duration_s,
        )
        yield _histograms(
            "gen_ai_client_operation_time_to_first_chunk_seconds",
            "From a stream's start to its first event (gen_ai.client.operation.time_to_first_chunk).",
            figures.first_event_s,
        )
        yield _histograms(
            "gen_ai_client_token_usage",
            "Tokens as the provider stated them (gen_ai.client.token.usage).",
            figures.tokens,
        )

    def _memory(self) -> Iterator[Metric]:
        supervisor = self._figures.supervisor
        told = supervisor.memory.statistics()
        held = {"live": told.bytes_held, "ending": told.ending_bytes, **told.beside}
        yield _gauge("memory_bytes", "Bytes that are counted, by what holds them.", _by("holder", held))
        yield _one("memory_max_bytes", "MemoryPolicy.max_bytes.", supervisor.memory.policy.max_bytes)
        yield _one("process_limit_bytes", "What the process may have.", told.process_limit_bytes)
        yield _one("memory_pressure", "1 while the process's memory is short.", int(told.pressure))
        yield _counter("reaped", "Streams that the memory manager ended.", _by("reason", told.reaped))
        yield _counter("spilled", "How often a stream gave up what the store has.", {(): {(): told.spilled}})

    def _store(self) -> Iterator[Metric]:
        store = self._figures.supervisor.store
        told = store.statistics()
        yield _one("store_up", "0 while nothing can be written.", int(store.failing is None))
        yield _one("store_congested", "1 while sources are held back.", int(store.congested))
        yield _one("store_pending_records", "Records that are not durable yet.", told.pending_records)
        yield _one("store_pending_bytes", "What they take.", told.pending_bytes)
        yield _one("store_lag_seconds", "How long the first of them has waited.", told.lag_s)
        yield _one("store_last_commit_seconds", "How long the last commit took.", told.last_commit_s)
        yield _counter("store_records", "Records written.", {(): {(): told.committed_records}})
        yield _counter("store_commits", "Commits.", {(): {(): told.commits}})
        yield _counter("store_failed_commits", "Commits that failed.", {(): {(): told.failed_commits}})

    def _circuits(self) -> Iterator[Metric]:
        circuits = self._figures.supervisor.health().circuits
        states: dict[tuple[str, ...], float] = {
            (upstream, state): int(circuit["state"] == state)
            for upstream, circuit in circuits.items()
            for state in _STATES
        }
        yield _gauge("circuit_state", "1 for the state that it is in.", {("upstream", "state"): states})
        for name, about in (("opened", "How often it has opened."), ("refused", "Attempts refused.")):
            counts = {upstream: circuit[name] for upstream, circuit in circuits.items()}
            yield _counter(f"circuit_{name}", about, _by("upstream", counts))


_Children = Mapping[tuple[str, ...], Mapping[tuple[str, ...], float]]


def _by(label: str, values: Mapping[str, float]) -> _Children:
    return {(label,): {(name,): value for name, value in values.items()}}


def _one(name: str, about: str, value: float | None) -> Metric:
    """Return a gauge without labels; one that is not known has no value."""
    return _gauge(name, about, {(): {} if value is None else {(): value}})


def _gauge(name: str, about: str, values: _Children) -> Metric:
    ((labels, children),) = values.items()
    family = GaugeMetricFamily(_PREFIX + name, about, labels=labels)
    for given, value in children.items():
        family.add_metric(given, value)
    return family


def _counter(name: str, about: str, values: _Children) -> Metric:
    ((labels, children),) = values.items()
    family = CounterMetricFamily(_PREFIX + name, about, labels=labels)
    for given, value in children.items():
        family.add_metric(given, value)
    return family


def _counts(name: str, about: str, counts: Counts) -> Metric:
    return _counter(name, about, {counts.labels: counts.children})


def _histograms(name: str, about: str, histograms: Histograms) -> Metric:
    family = HistogramMetricFamily(name, about, labels=histograms.labels)
    for given, child in histograms.children.items():
        bounds = [*(str(float(bound)) for bound in child.bounds), "+Inf"]
        family.add_metric(given, list(zip(bounds, accumulate(child.counts), strict=True)), child.total)
    return family
