"""Figures of what becomes of streams: since the start, for Prometheus, and of the last hour, for the overview.

They are fed by the supervisor's observers: at a start, at an attempt, at a first event and at a durable ending; never by an event. What
a client may choose, such as the name of a model, is a label only up to a bound: the first so many values keep their names, the others
are `other`. So whatever is asked for, there is an end to what is kept and to what a scrape costs.

Names of metrics and attributes are those of OpenTelemetry's conventions for generative AI where it has one
(https://github.com/open-telemetry/semantic-conventions-genai), as Prometheus writes them; the rest has `stream_supervisor_` before it.
"""

from __future__ import annotations

import time
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NoReturn

import attrs
import trio

from supervisor.observe.window import ErrorKey, Window
from supervisor.streams import Outcome, State, Stream, Supervisor

__all__ = ["Figures", "Histogram", "Histograms", "Labels", "conventional"]

Labels = tuple[str, ...]

MAX_VALUES = 64
"""Values of one label that keep their names."""
MAX_CHILDREN = 1000
"""Combinations of labels in one metric."""
_MAX_CHARS = 128  # of a label's value
_OTHER = "other"
_SAMPLE_S = 10.0

# Of the conventions: gen_ai.client.operation.duration, …time_to_first_chunk, gen_ai.client.token.usage.
_DURATION_S = (0.01, 0.02, 0.04, 0.08, 0.16, 0.32, 0.64, 1.28, 2.56, 5.12, 10.24, 20.48, 40.96, 81.92)
_FIRST_S = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0)
_TOKENS = tuple(4.0**power for power in range(14))

_CONVENTIONAL: Mapping[str, tuple[str, str]] = MappingProxyType(
    {
        "anthropic": ("chat", "anthropic"),
        "cohere": ("chat", "cohere"),
        "gemini": ("generate_content", "gcp.gemini"),
        "ollama": ("chat", "ollama"),
        "openai-chat": ("chat", "openai"),
        "openai-completions": ("text_completion", "openai"),
        "openai-responses": ("chat", "openai"),
    }
)


def conventional(dialect: str) -> tuple[str, str]:
    """Return `gen_ai.operation.name` and `gen_ai.provider.name` for a dialect: that it speaks as the provider does is all we know."""
    return _CONVENTIONAL.get(dialect, ("chat", dialect))


class Histogram:
    """Counts of values by fixed bounds, as Prometheus has them."""

    __slots__ = ("bounds", "counts", "total")

    def __init__(self, bounds: Sequence[float]) -> None:
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        """Of each bucket by itself; the last is of values above every bound."""
        self.total = 0.0

    def __repr__(self) -> str:
        return f"<Histogram of {sum(self.counts)} values>"

    def add(self, value: float) -> None:
        """Count a value."""
        self.counts[bisect_left(self.bounds, value)] += 1
        self.total += value


class Histograms:
    """One histogram for each combination of labels that was met, and one for all beyond the first thousand."""

    __slots__ = ("bounds", "children", "labels")

    def __init__(self, bounds: Sequence[float], *labels: str) -> None:
        self.bounds = bounds
        self.labels = labels
        self.children: dict[Labels, Histogram] = {}

    def __repr__(self) -> str:
        return f"<Histograms by {', '.join(self.labels)}: {len(self.children)}>"

    def add(self, values: Labels, value: float) -> None:
        """Count a value under its labels."""
        child = self.children.get(values)
        if child is None:
            child = self._new(values)
        child.add(value)

    def _new(self, values: Labels) -> Histogram:
        if len(self.children) >= MAX_CHILDREN:
            values = (_OTHER,) * len(values)
        return self.children.setdefault(values, Histogram(self.bounds))


class Counts:
    """One count for each combination of labels that was met, and one for all beyond the first thousand."""

    __slots__ = ("children", "labels")

    def __init__(self, *labels: str) -> None:
        self.labels = labels
        self.children: Counter[Labels] = Counter()

    def __repr__(self) -> str:
        return f"<Counts by {', '.join(self.labels)}: {len(self.children)}>"

    def add(self, values: Labels, count: int = 1) -> None:
        """Count under these labels."""
        if values not in self.children and len(self.children) >= MAX_CHILDREN:
            values = (_OTHER,) * len(values)
        self.children[values] += count


class _Names:
    """The values of one label: the first keep their names."""

    __slots__ = ("_known",)

    def __init__(self) -> None:
        self._known: set[str] = set()

    def __call__(self, value: object) -> str:
        name = value[:_MAX_CHARS] if isinstance(value, str) else ""
        if name not in self._known:
            if len(self._known) >= MAX_VALUES:
                return _OTHER
            self._known.add(name)
        return name


_ASKED = ("gen_ai_operation_name", "gen_ai_provider_name", "gen_ai_request_model", "upstream")


@attrs.frozen
class _About:
    """A stream's labels."""

    upstream: str
    asked: Labels


class Figures:
    """What is counted of one supervisor's streams, from when it was made. `run` adds what can only be looked at now and then."""

    def __init__(self, supervisor: Supervisor, *, clock: Callable[[], float] = time.time) -> None:
        self.supervisor = supervisor
        self.since = clock()
        """Seconds since the Unix epoch."""
        self._clock = clock
        self.window = Window(clock)
        self.started_by = Counts("upstream")
        self.ended_by = Counts("upstream", "state", "reason")
        self.attempts_by = Counts("upstream", "rung")
        self.events_by = Counts("upstream")
        self.bytes_by = Counts("upstream")
        self.duration_s = Histograms(_DURATION_S, *_ASKED, "state", "error_type")
        self.first_event_s = Histograms(_FIRST_S, *_ASKED)
        self.tokens = Histograms(_TOKENS, *_ASKED, "gen_ai_token_type")
        self._upstreams, self._models, self._dialects = _Names(), _Names(), _Names()
        self._reasons, self._errors, self._rungs = _Names(), _Names(), _Names()
        self._answering: set[str] = set()
        self._records = supervisor.store.statistics().committed_records
        self._leave = supervisor.observe(self)

    def __repr__(self) -> str:
        return f"<Figures of {self.supervisor!r}>"

    def close(self) -> None:
        """Count nothing more."""
        self._leave()

    async def run(self) -> NoReturn:
        """Look at the figures that nobody tells of, every ten seconds, until cancelled."""
        while True:
            self.sample()
            await trio.sleep(_SAMPLE_S)

    def sample(self) -> None:
        """Take note of the figures of this moment."""
        told = self.supervisor.statistics()
        records = told.store.committed_records
        self.window.now.saw(
            live=told.live,
            bytes_held=told.memory.total_bytes,
            process_bytes=told.memory.process_bytes,
            records=records - self._records,
        )
        self._records = records

    @property
    def answering(self) -> int:
        """How many streams that have not settled have had their first event."""
        return len(self._answering)

    # --- an observer -------------------------------------------------------------------------------------------------

    def started(self, stream: Stream) -> None:
        """Count a start."""
        self.window.now.started += 1
        self.started_by.add((self._upstreams(stream.upstream),))

    def attempted(self, stream: Stream, record: Mapping[str, Any]) -> None:
        """Count an attempt, at the upstream that it is made at."""
        upstream = self._upstreams(record.get("upstream") or stream.upstream)
        self.attempts_by.add((upstream, self._rungs(record.get("rung") or "first")))

    def began(self, stream: Stream) -> None:
        """Count a first event."""
        self._answering.add(stream.id)
        first_s = stream.first_event_s
        assert first_s is not None, "it has just come"
        self.window.now.first_event_s.add(first_s)
        self.first_event_s.add(self._about(stream).asked, first_s)

    def ended(self, stream: Stream, outcome: Outcome | None) -> None:
        """Count an ending; of one that was lost, only that the stream is gone."""
        self._answering.discard(stream.id)
        if outcome is None:
            return
        about = self._about(stream)
        state, wrong = outcome.state.value, outcome.state in (State.FAILED, State.EXPIRED)
        kind = None if outcome.fault is None else outcome.fault.kind
        self.ended_by.add((about.upstream, state, self._reasons(outcome.reason)))
        self.events_by.add((about.upstream,), outcome.events)
        error = self._errors(kind or outcome.reason) if wrong else ""
        self.duration_s.add((*about.asked, state, error), outcome.duration_s)
        minute = self.window.now
        minute.ended[state] += 1
        minute.retried += outcome.attempts > 1
        minute.duration_s.add(outcome.duration_s)
        minute.events.add(outcome.events)
        nbytes = stream.journal_bytes
        if nbytes is not None:
            self.bytes_by.add((about.upstream,), nbytes)
            minute.bytes.add(nbytes)
        for tokens, what in self._stated(outcome):
            self.tokens.add((*about.asked, what), tokens)
            if what == "output":
                minute.output_tokens.add(tokens)
        if wrong:
            key = ErrorKey(state, outcome.reason, kind, stream.upstream)
            minute.failed(key, at=outcome.ended_at, stream_id=stream.id, message=outcome.message)

    def _about(self, stream: Stream) -> _About:
        operation, provider = conventional(self._dialects(stream.dialect))
        upstream = self._upstreams(stream.upstream)
        return _About(upstream, (operation, provider, self._models(stream.spec.meta.get("model")), upstream))

    @staticmethod
    def _stated(outcome: Outcome) -> Iterator[tuple[int, str]]:
        """Give the tokens that the provider stated; estimates are none of its figures."""
        if outcome.usage is not None and outcome.usage_quality != "estimated":
            for tokens, what in ((outcome.usage.input, "input"), (outcome.usage.output, "output")):
                if tokens is not None:
                    yield tokens, what
