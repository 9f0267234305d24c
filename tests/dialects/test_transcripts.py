"""Recorded streams of every provider give what was expected of them, however they arrive and wherever they are cut."""

from __future__ import annotations

import random
import re
from typing import Any

import pytest

from supervisor.dialects import BUILTIN
from supervisor.dialects.reading import BodyReader
from supervisor.dialects.replay import ReplayResult, replay
from tests.cases import transcripts
from tests.dialects.bodies import RecordingSink
from tests.dialects.expected import JUDGED_WRONG, STATES, boundaries, check, data_of, has_ended, wrong

ALL = transcripts()
TRANSCRIPTS = [case for case in ALL if case["dialect"] in BUILTIN and case["expected_terminal"] in STATES]
SHORT_BYTES = 2500
LONG_BYTES = 20_000
CUTS = 40

each = pytest.mark.parametrize("case", TRANSCRIPTS, ids=lambda case: case["id"])


def framing(case: dict[str, Any]) -> str:
    return BUILTIN[case["dialect"]].framing


def checked(case: dict[str, Any], result: ReplayResult) -> None:
    check(case, result.to_json_object(), result.snapshot)


@each
def test_whole(case: dict[str, Any]) -> None:
    """Read in one piece, nothing unreadable but what is no JSON."""
    result = replay(case["dialect"], case["body"])
    checked(case, result)
    assert result.skipped == (1 if case["terminal_detail"] == "malformed_json" else 0)


@each
def test_splits(case: dict[str, Any]) -> None:
    """Short ones split in two at every byte; all of them at random places, and byte by byte but for the longest."""
    name, body = case["dialect"], case["body"]
    checked(case, replay(name, body, chunk=1 if len(body) < LONG_BYTES else 7))
    whole = replay(name, body)
    if len(body) <= SHORT_BYTES:
        for at in range(1, len(body)):
            assert whole == replay(name, [body[:at], body[at:]])
    chosen = random.Random(case["id"])
    for _ in range(3):
        cuts = sorted(chosen.choices(range(len(body) + 1), k=CUTS))
        assert whole == replay(name, [body[a:b] for a, b in zip([0, *cuts], [*cuts, None], strict=True)])


def as_lines(body: bytes) -> bytes:
    return body.replace(b"\r\n", b"\n")


VARIANTS = {
    "sse": {
        "crlf": lambda body: as_lines(body).replace(b"\n", b"\r\n"),
        "cr": lambda body: as_lines(body).replace(b"\n", b"\r"),
        "bom": lambda body: b"\xef\xbb\xbf" + body,
        "comments": lambda body: (
            b": hello\n\n" + as_lines(body).replace(b"\n\n", b"\n: alive\n\n: still\n\n")
        ),
        "no-space": lambda body: re.sub(rb"(?m)^(data|event|id): ", rb"\1:", as_lines(body)),
    },
    "ndjson": {
        "blank-lines": lambda body: b"\n\n" + as_lines(body).replace(b"\n", b"\n\n \n"),
        "crlf": lambda body: as_lines(body).replace(b"\n", b"\r\n"),
        "spaces": lambda body: b"  " + as_lines(body).replace(b"\n", b" \n\t"),
        "no-last-line-end": lambda body: body.rstrip(b"\n"),
        "bom": lambda body: b"\xef\xbb\xbf" + body,
    },
    "json-array": {
        "compact": lambda body: b"[" + b",".join(one.encode() for one in data_of("json-array", body)) + b"]",
        "spacious": lambda body: (
            b"\n [ \n"
            + b" \r\n,\t\n".join(one.encode() for one in data_of("json-array", body))
            + b"\n\n ]\n "
        ),
        "crlf": lambda body: as_lines(body).replace(b"\n", b"\r\n"),
        "one-line": lambda body: as_lines(body).replace(b"\n", b" "),
        "bom": lambda body: b"\xef\xbb\xbf" + body,
    },
}


@pytest.mark.parametrize(
    ("case", "variant"),
    [
        pytest.param(case, variant, id=f"{case['id']}-{variant}")
        for case in TRANSCRIPTS
        for variant in VARIANTS[framing(case)]
    ],
)
def test_variants(case: dict[str, Any], variant: str) -> None:
    """What a framing allows changes nothing: line ends, a byte order mark, comments, blank lines, white space."""
    changed = VARIANTS[framing(case)][variant](case["body"])
    assert changed != case["body"] or variant in {
        "crlf",
        "compact",
        "no-space",
        "one-line",
        "no-last-line-end",
    }
    checked(case, replay(case["dialect"], changed))
    checked(case, replay(case["dialect"], changed, chunk=113))


@each
def test_cut_at_every_event_boundary(case: dict[str, Any]) -> None:
    """A body that ends between two events, or a connection that dies there, is truncated unless the answer had ended.

    Whether it had is said by a rule that knows nothing of the reader. What was read so far is kept in every case.
    """
    dialect, body = BUILTIN[case["dialect"]], case["body"]
    live = RecordingSink()
    growing = BodyReader(dialect, live)
    ends = boundaries(dialect.framing, body)
    assert ends or not body
    step = max(1, len(ends) // CUTS)
    start = 0
    for count, end in enumerate(ends, 1):
        growing.feed(body[start:end])
        start = end
        if count % step and count < len(ends) - 4:
            continue
        over = has_ended(dialect.name, data_of(dialect.framing, body[:end]))
        for clean in (True, False):
            sink = RecordingSink()
            reader = BodyReader(dialect, sink)
            reader.feed(body[:end])
            reader.end(clean=clean)
            assert live.snapshot == sink.snapshot
            if live.sealed:
                assert live.ending == sink.ending
                assert over or (live.state == "failed" and case["expected_terminal"] == "error")
            elif over and (clean or dialect.endings.markers):
                assert sink.state == "completed"
                assert bool(live.marks) == bool(dialect.endings.markers)
            else:
                assert sink.ending in {("failed", "truncated"), ("failed", "protocol")}
                assert sink.reason == "truncated" or reader.skipped
                assert sink.fault is not None


@each
def test_nothing_is_lost_between_two_cuts(case: dict[str, Any]) -> None:
    """With each further event the text so far is the text before and more: nothing is taken back or told twice."""
    dialect, body = BUILTIN[case["dialect"]], case["body"]
    sink = RecordingSink()
    reader = BodyReader(dialect, sink)
    start = 0
    seen = ""
    for end in boundaries(dialect.framing, body):
        reader.feed(body[start:end])
        start = end
        text = sink.snapshot.text
        assert text.startswith(seen)
        seen = text
    assert (case["expected_text"] or "").startswith(seen) or "text" in wrong(case)


UNLISTED = [case for case in ALL if case["expected_terminal"] not in STATES]


def test_every_transcript_is_tested() -> None:
    """All transcripts are of a dialect that exists or of one that nobody has written down an expectation for."""
    assert len(TRANSCRIPTS) + len(UNLISTED) == len(ALL)
    assert {case["dialect"] for case in UNLISTED}.isdisjoint(BUILTIN)
    assert JUDGED_WRONG.keys() <= {case["id"] for case in ALL}


@pytest.mark.parametrize("case", UNLISTED, ids=lambda case: case["id"])
def test_streams_of_no_dialect(case: dict[str, Any]) -> None:
    """What no dialect is for is read as `generic`, to its end, with its text and nothing unreadable, under every split."""
    body = case["body"]
    told = replay("generic", body)
    assert (told.state, told.skipped, told.fault) == ("completed", 0, None)
    assert told.snapshot.text
    assert told == replay("generic", body, chunk=1) == replay("generic", body, chunk=113)


@pytest.mark.parametrize(
    "case", [case for case in ALL if case["file"].endswith(".sse")], ids=lambda case: case["id"]
)
def test_events_as_they_are(case: dict[str, Any]) -> None:
    """The events of every event stream are cut out of it as they are, whatever they mean, and under every split."""
    told = replay("sse", case["body"])
    assert [event.data.decode() for event in told.wire_events] == data_of("sse", case["body"])
    assert told.fault is None
    assert told == replay("sse", case["body"], chunk=1 if len(case["body"]) < LONG_BYTES else 5)
    assert told == replay("sse", case["body"], chunk=113)
