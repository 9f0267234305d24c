"""`trace`: what happened when in a stream, as a network debugger shows it, as JSON, or as a file for a trace viewer."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import msgspec
from rich.text import Text

from supervisor.cli.connecting import as_client
from supervisor.cli.exits import Exit
from supervisor.cli.render import complain, console, duration, print_json, size, spark, visible
from supervisor.control import ControlClient
from supervisor.observe import Percentiles, Trace, chrome_trace

__all__ = ["trace"]

_PIPE_BAR = 60
_LEAST_BAR = 20
_LABEL = 8
_STALLS = 10  # shown of those that are told
_WAITING, _ANSWERING, _PAUSED, _STALLED = "░", "█", "·", "~"


def trace(options: argparse.Namespace) -> int:
    """Show what happened when in one stream."""
    if options.id is None and options.key is None:
        complain("which stream? give its ID, or --key")
        return Exit.USAGE
    if options.json and options.perfetto == "-":
        complain("--perfetto -: not with --json, as both are written to standard output")
        return Exit.USAGE
    return as_client(options, _trace)


async def _trace(client: ControlClient, options: argparse.Namespace) -> int:
    told = await client.trace(options.id, key=options.key)
    if options.perfetto is not None:
        data = msgspec.json.encode(chrome_trace(told)) + b"\n"
        if options.perfetto == "-":
            sys.stdout.buffer.write(data)
            return Exit.OK
        try:
            Path(options.perfetto).write_bytes(data)  # noqa: ASYNC240  # a small file, and nothing else to do
        except OSError as error:
            complain(f"--perfetto {options.perfetto}: {error.strerror or error}")
            return Exit.FAILURE
        if not options.json:
            complain(
                f"written to {options.perfetto}; open it in https://ui.perfetto.dev, which keeps it in your browser"
            )
    if options.json:
        print_json(told)
    elif options.perfetto is None:
        out = console()
        width = out.width - _LABEL - 2 if out.is_terminal else _PIPE_BAR
        for line in _lines(told, max(_LEAST_BAR, min(width, 120))):
            out.print(line, soft_wrap=True)
    return Exit.OK


def _lines(told: Trace, width: int) -> Iterator[Text | str]:
    yield from _summary(told)
    yield ""
    end = duration(told.duration_ms / 1000)
    yield f"{'':{_LABEL}}0{end:>{width - 1}}"
    yield from _attempts(told, width)
    if told.stalls:
        spans = ((stall.from_ms, stall.to_ms, _STALLED) for stall in told.stalls)
        yield Text.assemble(_label("stalls"), (_bar(spans, told.duration_ms, width), "yellow"))
    for name, values in (("events", told.timeline.events), ("bytes", told.timeline.bytes)):
        if any(values):
            yield Text.assemble(_label(name), (spark(_stretched(values, told, width)), "green"))
    yield from _details(told)


def _summary(told: Trace) -> Iterator[Text | str]:
    ending = f"{told.state}({told.reason})" if told.ended else told.state
    yield Text(f"{told.id} {ending} after {duration(told.duration_ms / 1000)}", style="bold")
    about = [told.upstream, told.dialect, told.model, told.key and f"key {told.key}"]
    yield visible(" · ".join(part for part in about if part))
    first = "none" if told.first_event_ms is None else f"after {duration(told.first_event_ms / 1000)}"
    arrivals = f" in {told.arrivals} arrivals" if told.arrivals else ""
    skipped = f", {told.skipped} unreadable" if told.skipped else ""
    yield f"first event {first}; {told.events} events{arrivals}, {size(told.bytes)}{skipped}"
    if told.gap_ms.count:
        yield f"gaps between events: {_spread(told.gap_ms, 'ms')}"
    if told.event_bytes.count:
        yield f"sizes of events: {_spread(told.event_bytes, 'bytes')}"


def _spread(told: Percentiles, unit: str) -> str:
    return (
        f"median {told.p50:g}, 95 % up to {told.p95:g}, 99 % up to {told.p99:g}, at most {told.max:g} {unit}"
    )


def _attempts(told: Trace, width: int) -> Iterator[Text | str]:
    before: float | None = None
    last = told.attempts[-1].attempt if told.attempts else 0
    for number, attempt in enumerate(told.attempts):
        if told.attempts_left_out and number == len(told.attempts) // 2:
            yield f"{'':{_LABEL}}… {told.attempts_left_out} attempts in between …"
        first_ms = attempt.to_ms if attempt.first_event_ms is None else attempt.first_event_ms
        spans = [(attempt.from_ms, first_ms, _WAITING)]
        if before is not None:
            spans.insert(0, (before, attempt.from_ms, _PAUSED))
        if attempt.first_event_ms is not None:
            spans.append((first_ms, attempt.to_ms, _ANSWERING))
        bar = _bar(spans, told.duration_ms, width)
        style = "dim" if attempt.withdrawn else "red" if attempt.attempt < last else "blue"
        yield Text.assemble(_label(f"{attempt.attempt}"), (bar, style))
        before = attempt.to_ms
    if not told.attempts and told.first_event_ms is not None:
        spans = [(0.0, told.first_event_ms, _WAITING), (told.first_event_ms, told.duration_ms, _ANSWERING)]
        yield Text.assemble(_label("answer"), (_bar(spans, told.duration_ms, width), "blue"))


def _details(told: Trace) -> Iterator[Text | str]:
    for attempt in told.attempts:
        took = duration((attempt.to_ms - attempt.from_ms) / 1000)
        first = "no event"
        if attempt.first_event_ms is not None:
            waited = duration((attempt.first_event_ms - attempt.from_ms) / 1000)
            first = f"first event after {waited}, {attempt.events} events, {size(attempt.bytes)}"
        withdrawn = ", withdrawn" if attempt.withdrawn else ""
        yield ""
        what = f"attempt {attempt.attempt} ({attempt.rung or 'first'} at {attempt.upstream or '?'})"
        yield visible(f"{what}: {took} from {attempt.from_ms:.0f} ms on; {first}{withdrawn}")
        if attempt.cause:
            waited = f" (waited {duration(attempt.delay_ms / 1000)})" if attempt.delay_ms else ""
            yield visible(f"  because of {attempt.cause}{waited}")
    if told.outcome is not None and told.outcome.message:
        yield ""
        yield visible(f"ended: {told.outcome.message}")
    if told.stalls:
        yield ""
        longest = sorted(told.stalls, key=lambda stall: -stall.ms)[:_STALLS]
        yield f"stalls of {duration(told.stall_from_ms / 1000)} or more, the longest first:"
        for stall in longest:
            yield f"  {duration(stall.ms / 1000)} from {stall.from_ms:.0f} ms on, after event {stall.after_seq}"
        more = len(told.stalls) - len(longest) + told.stalls_left_out
        if more:
            yield f"  and {more} more"
    for mark in told.marks:
        details = msgspec.json.encode(mark.details).decode() if mark.details else ""
        yield visible(f"{mark.at_ms:.0f} ms: {mark.kind} {details}")
    for gone in told.left_out:
        yield f"not looked at: events {gone.first} to {gone.last}"


def _label(text: str) -> str:
    return f"{text:<{_LABEL}}"


def _bar(spans: Iterable[tuple[float, float, str]], duration_ms: float, width: int) -> str:
    """Draw spans of time into a line; each is at least one character, and later ones win."""
    line = [" "] * width
    for from_ms, to_ms, mark in spans:
        first = min(int(from_ms / max(duration_ms, 1e-9) * width), width - 1)
        last = min(max(first + 1, round(to_ms / max(duration_ms, 1e-9) * width)), width)
        if to_ms > from_ms or mark != _PAUSED:
            line[first:last] = mark * (last - first)
    return "".join(line).rstrip()


def _stretched(values: Sequence[int], told: Trace, width: int) -> list[float]:
    """Spread the steps of a timeline over the width of a line."""
    total_ms = max(told.duration_ms, 1e-9)
    cells = [0.0] * width
    for step, value in enumerate(values):
        first = min(int(step * told.timeline.step_ms / total_ms * width), width - 1)
        last = min(max(first + 1, int((step + 1) * told.timeline.step_ms / total_ms * width)), width)
        for cell in range(first, last):
            cells[cell] += value / (last - first)
    return cells
