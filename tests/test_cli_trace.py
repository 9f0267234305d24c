"""How `trace` draws what happened when."""

from __future__ import annotations

import msgspec
import pytest
from rich.text import Text

from supervisor.cli.render import size, spark
from supervisor.cli.tracing import _bar, _lines
from supervisor.observe import Trace
from supervisor.observe.distribution import Percentiles
from supervisor.observe.timeline import TraceAttempt, TraceMark, TraceRange, TraceStall, TraceTimeline

NOTHING = Percentiles(count=0, p50=None, p90=None, p95=None, p99=None, max=None)
SOME = Percentiles(count=9, p50=10, p90=20, p95=20, p99=30, max=600.5)


def attempt(
    number: int, from_ms: float, first_ms: float | None, to_ms: float, **fields: object
) -> TraceAttempt:
    given = {
        "attempt": number,
        "rung": None,
        "upstream": "one",
        "from_ms": from_ms,
        "first_event_ms": first_ms,
        "to_ms": to_ms,
        "events": 5,
        "bytes": 5000,
        "first_seq": 2,
        "last_seq": 6,
        "withdrawn": False,
        "delay_ms": 0.0,
        "cause": None,
        "details": {},
    }
    return TraceAttempt(**{**given, **fields})


TOLD = Trace(
    id="01a",
    key="k",
    state="completed",
    reason="stop",
    tenant=None,
    upstream="one",
    dialect="openai-chat",
    model="m\x1b[31m",
    labels={},
    started_at=0.0,
    ended=True,
    duration_ms=1000.0,
    first_event_ms=100.0,
    deadlines={},
    events=10,
    bytes=10_000,
    skipped=1,
    arrivals=9,
    attempts=(
        attempt(1, 0, 100, 300, withdrawn=True),
        attempt(
            2, 500, 700, 1000, rung="restart", upstream="two", delay_ms=200.0, cause="connect: lost\x1b[2J"
        ),
    ),
    attempts_left_out=0,
    gap_ms=SOME,
    event_bytes=SOME,
    stall_from_ms=250.0,
    stalls=(TraceStall(from_ms=720, to_ms=980, ms=260, attempt=2, after_seq=8),),
    stalls_left_out=3,
    marks=(TraceMark(at_ms=500, kind="withdrawn", seq=7, details={"first": 1}),),
    marks_left_out=0,
    timeline=TraceTimeline(step_ms=100, events=(0, 5, 0, 0, 0, 0, 0, 3, 0, 2), bytes=(0,) * 10),
    outcome=None,
    left_out=(TraceRange(first=20, last=30),),
)


def lines(told: Trace, width: int = 20) -> list[str]:
    return [line.plain if isinstance(line, Text) else line for line in _lines(told, width)]


def test_the_drawing() -> None:
    """Waiting, answering and the wait between attempts are drawn to scale, and stalls and events under them."""
    assert lines(TOLD)[:9] == [
        "01a completed(stop) after 1.0 s",
        "one · openai-chat · m\\x1b[31m · key k",
        "first event after 100 ms; 10 events in 9 arrivals, 10.0 kB, 1 unreadable",
        "gaps between events: median 10, 95 % up to 20, 99 % up to 30, at most 600.5 ms",
        "sizes of events: median 10, 95 % up to 20, 99 % up to 30, at most 600.5 bytes",
        "",
        "        0              1.0 s",
        "1       ░░████",
        "2             ····░░░░██████",
    ]
    assert lines(TOLD)[9:] == [
        "stalls                ~~~~~~",
        "events    ██          ▅▅  ▃▃",
        "",
        "attempt 1 (first at one): 300 ms from 0 ms on; first event after 100 ms, 5 events, 5.0 kB, withdrawn",
        "",
        "attempt 2 (restart at two): 500 ms from 500 ms on; first event after 200 ms, 5 events, 5.0 kB",
        "  because of connect: lost\\x1b[2J (waited 200 ms)",
        "",
        "stalls of 250 ms or more, the longest first:",
        "  260 ms from 720 ms on, after event 8",
        "  and 3 more",
        '500 ms: withdrawn {"first":1}',
        "not looked at: events 20 to 30",
    ]


def test_what_there_is_less_of() -> None:
    """A source without attempts has one bar, a stream without an event none; attempts that are left out are told of."""
    replace = msgspec.structs.replace
    assert "answer  ░░██████████████████" in lines(replace(TOLD, attempts=()))
    silent = replace(
        TOLD,
        ended=False,
        state="connecting",
        first_event_ms=None,
        attempts=(attempt(1, 0, None, 1000),),
        gap_ms=NOTHING,
        event_bytes=NOTHING,
        timeline=TraceTimeline(step_ms=1000, events=(0,), bytes=(0,)),
        stalls=(),
        marks=(),
        left_out=(),
    )
    told = lines(silent)
    assert told[0] == "01a connecting after 1.0 s"
    assert told[2].startswith("first event none")
    assert told[4:6] == ["        0              1.0 s", f"1       {'░' * 20}"]
    assert told[-1] == "attempt 1 (first at one): 1.0 s from 0 ms on; no event"
    many = replace(TOLD, attempts=tuple(attempt(n, n, n, n) for n in range(4)), attempts_left_out=96)
    assert "        … 96 attempts in between …" in lines(many)


@pytest.mark.parametrize("width", [1, 20, 100])
@pytest.mark.parametrize("duration_ms", [0.0, 1.0, 1e9])
def test_a_bar_is_never_longer_than_its_line(width: int, duration_ms: float) -> None:
    """However long or short a stream was, and also where an event is dated after its end."""
    spans = [
        (0.0, duration_ms, "a"),
        (duration_ms, duration_ms, "b"),
        (duration_ms * 2, duration_ms * 3, "c"),
    ]
    drawn = _bar(spans, duration_ms, width)
    assert 0 < len(drawn) <= width
    assert drawn[-1] == "c"


def test_sizes_and_blocks() -> None:
    """Sizes have two or three digits; what is not 0 is seen, however small."""
    assert [size(n) for n in (0, 999, 1000, 99_940, 180_000, 1.5e6, 5e9, 5e12)] == [
        "0 B",
        "999 B",
        "1.0 kB",
        "99.9 kB",
        "180 kB",
        "1.5 MB",
        "5.0 GB",
        "5000 GB",
    ]
    assert spark([0, 1, 1000, None, 500]) == " ▁█ ▄"
    assert spark([]) == ""
