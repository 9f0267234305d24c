"""The checks that read single events: what a reader makes of odd ones, what it keeps, what it shares with others."""

from __future__ import annotations

import contextlib
import copy
import gc
import itertools
import json
import random
import tracemalloc
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Final

import msgspec

from supervisor.dialects import Delta, Fault, Fold, Reader
from supervisor.errors import ConfigurationError
from supervisor.testing.conformance_examples import ConformanceError, Examples, decoded, shown

__all__ = [
    "asks_without_changing_the_request",
    "is_unchanged_by_what_it_cannot_read",
    "makes_independent_readers",
    "raises_nothing_else",
    "reads_any_error_response",
    "stays_bounded",
]

_TRIALS: Final = 250
_LABEL_BYTES: Final = 16 << 10
_REPEATS: Final = 750
_SHAPES: Final = 8
_OTHER_TYPES: Final[tuple[Any, ...]] = (
    None,
    True,
    -1,
    1.5,
    "\ud800",
    [],
    {},
    [[]],
    [{}],
    {"": {}},
    1 << 70,
    "x" * 50,
)
_NOISE: Final = (
    b"", b" ", b"\0", b"\xff\xfe", b"{", b"}", b"[", b"null", b"true", b"0", b"-1e999", b'""', b'"x"', b"[]", b"[[]]", b"[null]",
    b"{}", b'{"":{}}', b'{"type":null}', b'{"error":null}', b'{"\\ud800":"\\udfff"}', b"NaN", b"\xef\xbb\xbf{}", b"[DONE", b"<html>",
    b"[" * 50_000, b'{"a":' * 20_000, b"9" * 5000,
)  # fmt: skip


_Told = list[tuple[tuple[Delta, ...] | None, str | None]]


def _told(examples: Examples, reader: Reader, events: Sequence[tuple[bytes, str]]) -> _Told:
    return [(examples.take(reader, data, name), reader.ending()) for data, name in events]


def makes_independent_readers(examples: Examples, body: bytes) -> None:
    """Check that two readers of the same stream, read in turn, share nothing."""
    events = examples.read(body).events
    make = examples.dialect.reader
    alone = _told(examples, make(), events)
    one, other = make(), make()
    if one is other:
        examples.fail("makes independent readers", "`reader` returned the same reader twice")
    both = [(_told(examples, one, [event])[0], _told(examples, other, [event])[0]) for event in events]
    for number, (expected, (first, second)) in enumerate(zip(alone, both, strict=True)):
        if not expected == first == second:
            what = f"event {number} is read otherwise by a reader when another reads the same stream"
            examples.fail("makes independent readers", what)


def is_unchanged_by_what_it_cannot_read(examples: Examples, body: bytes) -> None:
    """Check that an unreadable event, wherever it comes, changes nothing of what the others mean."""
    check = "is unchanged by what it cannot read"
    events = examples.read(body).events
    make = examples.dialect.reader
    expected = _told(examples, make(), events)
    drawn = random.Random(len(body))  # noqa: S311 - to be repeatable
    trials = [
        (at, data, events[at][1]) for at in range(len(events)) for data in _spoiled(events[at][0], drawn)
    ]
    for at, data, name in trials if len(trials) <= _TRIALS else drawn.sample(trials, _TRIALS):
        reader = make()
        _told(examples, reader, events[:at])
        before = reader.ending()
        if examples.take(reader, data, name) is not None:
            continue
        after = [(None, before), *expected[at:]]
        got = [(None, reader.ending()), *_told(examples, reader, events[at:])]
        if after != got:
            number = next(
                index for index, pair in enumerate(zip(after, got, strict=True)) if pair[0] != pair[1]
            )
            what = "`ending`" if number == 0 else f"event {at + number - 1}"
            examples.fail(check, f"{what} is otherwise after the unreadable event {shown(data)}")


def _spoiled(data: bytes, drawn: random.Random) -> Iterator[bytes]:
    """Yield what an event could be on a bad day: cut short, or with one value of another type."""
    yield data[: len(data) // 2]
    yield data[:-1]
    value = decoded(data)
    places = list(_places(value))
    for path in places if len(places) <= 24 else drawn.sample(places, 24):
        for other in drawn.sample(_OTHER_TYPES, 4):
            yield _encoded(_replaced(value, path, other))


def _places(value: Any, depth: int = 6) -> Iterator[tuple[Any, ...]]:
    """Yield the path of every value in a JSON value."""
    yield ()
    if depth and isinstance(value, dict):
        inner = list(value.items())
    elif depth and isinstance(value, list):
        inner = list(enumerate(value[:4]))
    else:
        return
    for key, item in inner:
        for path in _places(item, depth - 1):
            yield (key, *path)


def _replaced(value: Any, path: tuple[Any, ...], other: Any) -> Any:
    if not path:
        return other
    copied = dict(value) if isinstance(value, dict) else list(value)
    copied[path[0]] = _replaced(value[path[0]], path[1:], other)
    return copied


def raises_nothing_else(examples: Examples) -> None:
    """Check that whatever comes is read, or is an UnparseableError, as an event and as a body."""
    names = {name for body in examples.all for _, name in examples.read(body).events} | {
        "message",
        "error",
        "",
        "x",
    }
    drawn = random.Random(0)  # noqa: S311 - to be repeatable
    noise = [*_NOISE, *(drawn.randbytes(drawn.randrange(40)) for _ in range(50))]
    events = [event for body in examples.all for event in examples.read(body).events]
    for name in sorted(names):
        reader = examples.dialect.reader()
        for data in noise:
            examples.take(reader, data, name)
    for data, name in events[:: max(1, len(events) // 20)]:
        for spoiled in _spoiled(data, drawn):
            reader = examples.dialect.reader()
            for one in (spoiled, data, spoiled):
                for delta in examples.take(reader, one, name) or ():
                    _fits_in_a_record(examples, delta, one)
    for _ in range(100):
        parts = [
            drawn.choice((*examples.all, *noise[:24], b"\n", b"\n\n", b"data: ", b"data: [DONE]\n\n"))
            for _ in range(4)
        ]
        mixed = b"".join(part[drawn.randrange(len(part) + 1) :][: drawn.randrange(400)] for part in parts)
        examples.read(mixed)


def _fits_in_a_record(examples: Examples, delta: Delta, data: bytes) -> None:
    try:
        msgspec.json.encode(delta)
        Fold().apply(delta)
    except Exception as exc:
        what = f"the event {shown(data)} is read as a delta that cannot be kept ({type(exc).__name__}: {exc})"
        raise ConformanceError(examples.dialect.name, "raises nothing else", what) from exc


def reads_any_error_response(examples: Examples) -> None:
    """Check that every error response becomes a fault with a message."""
    for status, body in itertools.product((400, 429, 500, 599), (*_NOISE, *examples.errors)):
        try:
            fault: object = examples.dialect.fault(status, body)
        except Exception as exc:
            what = f"`fault({status}, {shown(body)})` raised {type(exc).__name__}: {exc}"
            raise ConformanceError(examples.dialect.name, "reads any error response", what) from exc
        if not isinstance(fault, Fault) or not fault.message:
            examples.fail("reads any error response", f"`fault({status}, {shown(body)})` has no message")


def asks_without_changing_the_request(examples: Examples) -> None:
    """Check that the functions of `asking` leave the request as it was."""
    asking = examples.dialect.asking
    if asking.prompt is not None:
        made: object = asking.prompt("Hi", "m")
        if not isinstance(made, Mapping) or "Hi" not in json.dumps(made, default=repr):
            examples.fail(
                "asks without changing the request",
                f"`asking.prompt` made {shown(repr(made).encode())}, which is no request with the prompt in it",
            )
    request: dict[str, Any] = {
        "model": "m",
        "messages": [{"role": "user", "content": "Hi"}],
        "input": "Hi",
        "prompt": "Hi",
    }
    asked: list[tuple[str, Callable[..., Any] | None, Any]] = [
        ("first", asking.first, asking.path or "/"),
        ("continuation", asking.continuation, "So far"),
        ("cancel", asking.cancel, "id"),
        ("retrieve", asking.retrieve, "id"),
    ]
    for name, ask, about in asked:
        if ask is not None:
            given = copy.deepcopy(request)
            with contextlib.suppress(ConfigurationError):  # it may refuse the request
                ask(given, about)
            if given != request:
                examples.fail(
                    "asks without changing the request", f"`asking.{name}` changed the request it was given"
                )


# --- memory ----------------------------------------------------------------------------------------------------------


def stays_bounded(examples: Examples) -> None:
    """Repeat each shape of event with ever new texts and numbers, and look at what the reader still holds."""
    shapes: dict[str, tuple[bytes, str]] = {}
    for body in (*examples.well, *examples.incomplete):
        for data, name in examples.read(body).events:
            shapes.setdefault(f"{name} {sorted(map(str, _places(decoded(data))))}", (data, name))
    largest = sorted(shapes.values(), key=lambda event: -len(event[0]))
    for data, name in largest[:_SHAPES]:
        value = decoded(data)
        if not isinstance(value, dict | list):
            continue
        held = _held(examples, value, name)
        if held > examples.max_reader_bytes:
            what = f"after {_REPEATS} events like {shown(data)}, each with new ids and texts, it holds {held >> 10} KiB"
            examples.fail("stays bounded", f"{what}; {examples.max_reader_bytes >> 10} KiB are allowed")


def _held(examples: Examples, value: Any, name: str) -> int:
    reader = examples.dialect.reader()
    fresh = itertools.count(1)
    gc.collect()
    tracemalloc.start()
    try:
        for _ in range(_REPEATS):
            examples.take(reader, _encoded(_renewed(value, fresh)), name)
        gc.collect()
        held, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    return held


def _renewed(value: Any, fresh: Iterator[int]) -> Any:
    """Return the value with new texts and numbers, but for those that say what it is."""
    if isinstance(value, dict):
        return {
            key: item if key in {"type", "object", "role", "event_type"} else _renewed(item, fresh)
            for key, item in value.items()
        }
    if isinstance(value, list):
        return [_renewed(item, fresh) for item in value]
    if isinstance(value, bool) or value is None:
        return value
    if isinstance(value, str):
        return f"{next(fresh)}".ljust(_LABEL_BYTES, "x")
    return next(fresh)


def _encoded(value: Any) -> bytes:
    return json.dumps(value).encode()
