"""Figures as Prometheus reads them: its text format (https://prometheus.io/docs/instrumenting/exposition_formats/, version 0.0.4).

Made when it is asked for, of figures that are kept anyway; between two scrapes nothing is done for it. It is made in the loop that serves
streams, so it has to be quick: what is written of a combination of labels is kept, and a thousand histograms take milliseconds.
What a name means is in docs/observability.md, which a test holds to this file.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Iterable, Iterator, Mapping
from itertools import accumulate

from supervisor.observe.figures import Counts, Figures, Histograms, Labels
from supervisor.version import version

__all__ = ["CONTENT_TYPE", "exposition"]

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

_PREFIX = "stream_supervisor_"
_STATES = ("closed", "half_open", "open")


def exposition(figures: Figures) -> bytes:
    """Return all metrics."""
    parts: list[str] = []
    for section in (_streams, _memory, _store, _circuits, _process):
        for family in section(figures):
            parts.extend(family)
    return "".join(parts).encode("utf-8", "replace")


def _streams(figures: Figures) -> Iterator[Iterable[str]]:
    told = figures.supervisor.statistics()
    unsettled = told.live + told.settling
    answering = min(figures.answering, unsettled)
    now = {"waiting": unsettled - answering, "answering": answering}
    yield _gauge("build_info", "1; the version is its label.", "version", {version(): 1})
    yield _gauge("streams", "Streams that have not settled, by what they do.", "activity", now)
    yield _one("streams_settling", "Of these, sealed ones whose outcome is not durable yet.", told.settling)
    yield _one("streams_overdue", "Of these, those whose outcome is overdue.", told.unrecorded)
    yield _one("streams_max", "Limits.max_live.", figures.supervisor.limits.max_live)
    yield _one("readers", "Subscriptions.", told.readers)
    yield _one("tombstones", "Cancels remembered for keys not seen yet.", told.tombstones)
    yield _total("attached", "Starts that joined a stream by its key.", told.attached)
    yield _totals("rejected", "Starts that were refused, by the limit.", "limit", told.memory.rejected)
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


def _memory(figures: Figures) -> Iterator[Iterable[str]]:
    supervisor = figures.supervisor
    told = supervisor.memory.statistics()
    held = {"live": told.bytes_held, "ending": told.ending_bytes, **told.beside}
    yield _gauge("memory_bytes", "Bytes that are counted, by what holds them.", "holder", held)
    yield _one("memory_max_bytes", "MemoryPolicy.max_bytes.", supervisor.memory.policy.max_bytes)
    yield _one("memory_pressure", "1 while the process's memory is short.", int(told.pressure))
    yield _one("process_limit_bytes", "What the process may have.", told.process_limit_bytes)
    yield _totals("reaped", "Streams that the memory manager ended.", "reason", told.reaped)
    yield _total("spilled", "How often a stream gave up what the store has.", told.spilled)


def _store(figures: Figures) -> Iterator[Iterable[str]]:
    store = figures.supervisor.store
    told = store.statistics()
    yield _one("store_up", "0 while nothing can be written.", int(store.failing is None))
    yield _one("store_congested", "1 while sources are held back.", int(store.congested))
    yield _one("store_pending_records", "Records that are not durable yet.", told.pending_records)
    yield _one("store_pending_bytes", "What they take.", told.pending_bytes)
    yield _one("store_lag_seconds", "How long the first of them has waited.", told.lag_s)
    yield _one("store_last_commit_seconds", "How long the last commit took.", told.last_commit_s)
    yield _total("store_records", "Records written.", told.committed_records)
    yield _total("store_commits", "Commits.", told.commits)
    yield _total("store_failed_commits", "Commits that failed.", told.failed_commits)


def _circuits(figures: Figures) -> Iterator[Iterable[str]]:
    circuits = figures.supervisor.health().circuits
    states: dict[Labels, float] = {
        (upstream, state): int(circuit["state"] == state)
        for upstream, circuit in circuits.items()
        for state in _STATES
    }
    name = f"{_PREFIX}circuit_state"
    yield _family(name, "gauge", "1 for the state that it is in.", ("upstream", "state"), states)
    for what, about in (("opened", "How often it has opened."), ("refused", "Attempts refused.")):
        counts = {upstream: circuit[what] for upstream, circuit in circuits.items()}
        yield _totals(f"circuit_{what}", about, "upstream", counts)


def _process(figures: Figures) -> Iterator[Iterable[str]]:
    resident = figures.supervisor.memory.statistics().process_bytes
    known: dict[Labels, float] = {} if resident is None else {(): resident}
    cpu: dict[Labels, float] = {(): time.process_time()}
    yield _family(
        "process_resident_memory_bytes", "gauge", "Resident memory, as of the last sweep.", (), known
    )
    yield _family("process_cpu_seconds_total", "counter", "User and system CPU time.", (), cpu)


# --- the format ------------------------------------------------------------------------------------------------------


def _one(name: str, about: str, value: float | None) -> Iterable[str]:
    """Return a gauge without labels; one that is not known has no value."""
    return _family(_PREFIX + name, "gauge", about, (), {} if value is None else {(): value})


def _gauge(name: str, about: str, label: str, values: Mapping[str, float]) -> Iterable[str]:
    children: dict[Labels, float] = {(given,): value for given, value in values.items()}
    return _family(_PREFIX + name, "gauge", about, (label,), children)


def _total(name: str, about: str, value: float) -> Iterable[str]:
    return _family(f"{_PREFIX}{name}_total", "counter", about, (), {(): value})


def _totals(name: str, about: str, label: str, values: Mapping[str, float]) -> Iterable[str]:
    children: dict[Labels, float] = {(given,): value for given, value in values.items()}
    return _family(f"{_PREFIX}{name}_total", "counter", about, (label,), children)


def _counts(name: str, about: str, counts: Counts) -> Iterable[str]:
    return _family(f"{_PREFIX}{name}_total", "counter", about, counts.labels, counts.children)


def _family(
    name: str, kind: str, about: str, labels: Labels, children: Mapping[Labels, float]
) -> Iterator[str]:
    yield _head(name, kind, about)
    for values, value in children.items():
        given = _labels(labels, values)
        yield f"{name}{{{given}}} {value}\n" if given else f"{name} {value}\n"


def _histograms(name: str, about: str, histograms: Histograms) -> Iterator[str]:
    yield _head(name, "histogram", about)
    bounds = [*map(str, histograms.bounds), "+Inf"]
    for values, child in histograms.children.items():
        given = _labels(histograms.labels, values)
        count = 0
        for bound, count in zip(bounds, accumulate(child.counts), strict=True):
            yield f'{name}_bucket{{{given},le="{bound}"}} {count}\n'
        yield f"{name}_count{{{given}}} {count}\n{name}_sum{{{given}}} {child.total}\n"


def _head(name: str, kind: str, about: str) -> str:
    return f"# HELP {name} {about}\n# TYPE {name} {kind}\n"


@functools.lru_cache(maxsize=4096)
def _labels(names: Labels, values: Labels) -> str:
    """Return labels as they stand between the braces; one without a value is as if it were not there."""
    return ",".join(f'{name}="{_escaped(value)}"' for name, value in zip(names, values, strict=True) if value)


def _escaped(value: str) -> str:
    return value.replace("\\", "\\\\").replace("\n", "\\n").replace('"', '\\"')
