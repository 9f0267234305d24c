"""Holds a dialect to what every dialect promises: for programs that add one, and for the built-in ones.

A dialect is easy to write so that it reads the one stream that its author looked at. What goes wrong later is always the
same: an answer that was cut off counts as whole, an error as an ending, a restated text is told twice, an odd event leaves
the reader half changed, two streams share a list. None of that needs the provider to be found. So this takes example
bodies, and from them makes those that a bad day would bring: cut at every byte and after every event, with every value of
every event replaced by one of another type, mixed with noise, repeated with ever new ids.

What it cannot know is what the examples should mean: give their text beside them, and that is compared, too.

Each check is one function that raises `ConformanceError` with a sentence; the first that fails ends it. Nothing is drawn
anew: the same dialect and examples always give the same result. A dialect takes about a second.
"""

from __future__ import annotations

import itertools
import json
import random
from collections.abc import Iterator, Sequence
from typing import Any, Final

from supervisor.dialects import Dialect, Snapshot
from supervisor.dialects.pointers import MISSING, lookup, pointer
from supervisor.errors import ConfigurationError
from supervisor.testing import conformance_events as events
from supervisor.testing.conformance_examples import ConformanceError, Examples, decoded, shown

__all__ = ["ConformanceError", "check_dialect"]

MAX_EXAMPLE_BYTES: Final = 64 << 10
"""The largest example: each is read thousands of times."""
MAX_READER_BYTES: Final = 8 << 20
"""What a reader may hold, whatever it was sent."""

_ALL_SPLITS_BYTES: Final = 1024
_EMPTY: Final[tuple[Any, ...]] = (None, False, 0, "", [], {}, MISSING)
_CUTS: Final = 100


def check_dialect(
    dialect: Dialect,
    streams: Sequence[bytes | tuple[bytes, str]],
    *,
    incomplete: Sequence[bytes] = (),
    errors: Sequence[bytes] = (),
    max_reader_bytes: int = MAX_READER_BYTES,
) -> None:
    """Check a dialect with example bodies; return if it keeps every promise.

    streams: bodies of answers that end well, each alone or with its text. incomplete: bodies of answers that end with one
    of the reasons in `endings.incomplete`. errors: bodies in which the provider reports an error. Each at most 64 KiB, and
    best with everything in it that the provider sends: text, tool calls, usage, several choices.

    Raises ConformanceError, an AssertionError, that says what is broken, and ConfigurationError for examples or a framing
    that cannot be checked.
    """
    if dialect.framing == "none":
        raise ConfigurationError("dialect", dialect.name, "a dialect whose events come from a body")
    texts: list[str | None] = []
    bodies: list[bytes] = []
    for given in streams:
        body, text = given if isinstance(given, tuple) else (given, None)
        bodies.append(body)
        texts.append(text)
    if not bodies:
        raise ConfigurationError("streams", "nothing", "at least one body of an answer that ends well")
    for body in (*bodies, *incomplete, *errors):
        if not 0 < len(body) <= MAX_EXAMPLE_BYTES:
            raise ConfigurationError(
                "streams", f"{len(body)} bytes", f"bodies of 1 to {MAX_EXAMPLE_BYTES} bytes"
            )
    examples = Examples(dialect, bodies, list(incomplete), list(errors), max_reader_bytes)
    _describes_itself(examples)
    for body, text in zip(bodies, texts, strict=True):
        _ends_well(examples, body, text)
    for body in incomplete:
        _ends_incomplete(examples, body)
    for body in errors:
        _ends_in_an_error(examples, body)
    _declares_its_markers(examples)
    for body in examples.all:
        _reads_the_same_under_every_split(examples, body)
    for body in (*bodies, *incomplete):
        _tells_a_cut_from_an_ending(examples, body)
    for body in bodies:
        events.makes_independent_readers(examples, body)
    for body in examples.all:
        events.is_unchanged_by_what_it_cannot_read(examples, body)
    events.raises_nothing_else(examples)
    events.reads_any_error_response(examples)
    events.asks_without_changing_the_request(examples)
    events.stays_bounded(examples)
    _says_when_usage_is_stated(examples)


# --- what it says of itself ------------------------------------------------------------------------------------------


def _describes_itself(examples: Examples) -> None:
    check = "describes itself"
    dialect = examples.dialect
    if not dialect.endings.well:
        examples.fail(check, "`endings.well` does not say what ends an answer well")
    if examples.errors and not dialect.endings.errors:
        examples.fail(
            check, "`endings.errors` does not say where errors are told, but there are examples of some"
        )
    if dialect.stop == "abort" and dialect.abort_stops_billing is False:
        examples.fail(
            check, "an abort does not stop the billing, but `stop` is `abort`: it should be `drain`"
        )


def _says_when_usage_is_stated(examples: Examples) -> None:
    # last: it is a sentence for the reader, and no fault of the dialect should have to wait for it
    if not examples.dialect.usage_rule:
        examples.fail(
            "describes itself", "`usage_rule` does not say when a usage is stated, or that it never is"
        )


def _ends_well(examples: Examples, body: bytes, text: str | None) -> None:
    check = "ends well"
    sink = examples.read(body)
    if sink.skipped:
        examples.fail(check, f"an event of an example cannot be read: {sink.skipped}")
    if sink.state != "completed":
        why = sink.fault.message if sink.fault else ""
        examples.fail(check, f"an example that ends well is {sink.ending}: {why}")
    if sink.reason in examples.dialect.endings.incomplete:
        examples.fail(
            check, f"an example that ends well ends with {sink.reason!r}, which is in `endings.incomplete`"
        )
    if text is not None and sink.fold.snapshot().text != text:
        got = shown(sink.fold.snapshot().text.encode("utf-8", "replace"))
        examples.fail(check, f"the text of an example is read as {got}, not as {shown(text.encode())}")


def _ends_incomplete(examples: Examples, body: bytes) -> None:
    check = "ends incomplete"
    sink = examples.read(body)
    if sink.state != "completed":
        examples.fail(
            check, f"an example that ends incomplete is {sink.ending}, not completed with its reason"
        )
    if sink.reason not in examples.dialect.endings.incomplete:
        examples.fail(check, f"it ends with {sink.reason!r}, which is not in `endings.incomplete`")


def _ends_in_an_error(examples: Examples, body: bytes) -> None:
    check = "tells errors"
    for clean in (True, False):
        sink = examples.read(body, clean=clean)
        if sink.ending != "failed(provider_error)":
            examples.fail(
                check,
                f"an example with an error is {sink.ending}, not failed(provider_error): {shown(body)}",
            )
        if sink.fault is None or not sink.fault.message:
            examples.fail(check, f"the error has no message: {shown(body)}")


def _declares_its_markers(examples: Examples) -> None:
    check = "declares its markers"
    markers = examples.dialect.endings.markers
    seen = False
    for body in (*examples.well, *examples.incomplete):
        sink = examples.read(body)
        if sink.terminal is None:
            continue
        data, name = sink.terminal
        if not any(_is_marked(marker, data, name) for marker in markers):
            examples.fail(
                check,
                f"the event {shown(data)} ({name}) ends an example, but is none of `endings.markers` {markers}",
            )
        seen = True
    if markers and not seen:
        examples.fail(check, f"`endings.markers` are {markers}, but none of them ends any of the examples")


def _is_marked(marker: str, data: bytes, name: str) -> bool:
    """Whether an event has this marker: as its name, in its data, or as a field of its JSON that has this value.

    Fields are written `done: true`, or as `generic` has them: `/done=true`, or `/end` for anything that is not empty.
    """
    marker = marker.replace("`", "")
    if marker.casefold() == name.casefold() or marker.removeprefix("data:").strip().encode() in data:
        return True
    told = decoded(data)
    if marker.startswith("/"):
        where, sign, wanted = marker.partition("=")
        found = lookup(told, pointer("endings.markers", where))
        if not sign:
            return found not in _EMPTY
        return found is not MISSING and json.dumps(found) == json.dumps(decoded(wanted.encode()))
    field, sign, wanted = marker.partition(": ")
    return bool(sign) and isinstance(told, dict) and json.dumps(told.get(field)) == wanted


# --- bodies ----------------------------------------------------------------------------------------------------------


def _reads_the_same_under_every_split(examples: Examples, body: bytes) -> None:
    whole = examples.read(body).result()

    def compare(how: str, *pieces: bytes) -> None:
        sink = examples.read(*pieces)
        if sink.result() != whole:
            examples.fail(
                "reads the same under every split",
                f"a body is read otherwise {how}: {_differing(whole, sink.result())}",
            )

    compare("byte by byte", *(body[at : at + 1] for at in range(len(body))))
    drawn = random.Random(len(body))  # noqa: S311 - to be repeatable
    places = (
        range(1, len(body))
        if len(body) <= _ALL_SPLITS_BYTES
        else sorted(drawn.sample(range(1, len(body)), _CUTS))
    )
    for at in places:
        compare(f"when cut at byte {at}", body[:at], body[at:])
    for _ in range(10):
        cuts = [0, *sorted(drawn.choices(range(len(body) + 1), k=12)), len(body)]
        compare(f"when cut at {cuts[1:-1]}", *(body[a:b] for a, b in itertools.pairwise(cuts)))


def _differing(one: tuple[Any, ...], other: tuple[Any, ...]) -> str:
    names = ("ending", "fault", "snapshot", "events", "unreadable events")
    for name, left, right in zip(names, one, other, strict=True):
        if left != right:
            return f"{name} {shown(repr(right).encode(), 300)} in place of {shown(repr(left).encode(), 300)}"
    return ""


def _tells_a_cut_from_an_ending(examples: Examples, body: bytes) -> None:
    check = "tells a cut from an ending"
    whole = examples.read(body)
    final = whole.fold.snapshot()
    ends = [end for end in examples.boundaries(body) if end < len(body)]
    step = max(1, len(ends) // _CUTS)
    for end in {*ends[::step], *ends[-5:], 0}:
        for clean in (True, False):
            sink = examples.read(body[:end], clean=clean)
            so_far = sink.fold.snapshot()
            for name, told, complete in _texts(so_far, final):
                if not complete.startswith(told):
                    what = f"{name} {shown(told.encode('utf-8', 'replace'))} is not how that of the whole answer begins"
                    examples.fail(
                        check, f"after {end} bytes its {what}: something was told twice, or taken back"
                    )
            if sink.ending == "failed(truncated)":
                continue
            how = "ends cleanly" if clean else "is lost"
            if clean and examples.dialect.endings.clean_end and sink.ending == "completed(done)":
                continue
            if sink.ending != whole.ending:
                what = f"{sink.ending}, neither failed(truncated) nor {whole.ending} as the whole answer"
                examples.fail(check, f"a body that {how} after {end} of its {len(body)} bytes is {what}")
            for name, told, complete in _texts(so_far, final):
                if told != complete:
                    examples.fail(
                        check,
                        f"a body that {how} after {end} of its {len(body)} bytes is {sink.ending}, but its {name} went on",
                    )


def _texts(some: Snapshot, whole: Snapshot) -> Iterator[tuple[str, str, str]]:
    """Yield each text of an answer's beginning with that of the whole: a name, the beginning, the whole."""
    found = {choice.index: choice for choice in some.choices}
    for choice in whole.choices:
        begun = found.get(choice.index)
        for name in ("text", "reasoning", "refusal"):
            yield name, getattr(begun, name, ""), getattr(choice, name)
        calls = begun.tool_calls if begun else ()
        for number, call in enumerate(choice.tool_calls):
            arguments = calls[number].arguments if number < len(calls) else ""
            yield f"arguments of the tool call {number}", arguments, call.arguments
