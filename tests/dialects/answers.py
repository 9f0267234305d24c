"""Reads bodies of any dialect into a recording sink, and makes JSON that no provider sends."""

from __future__ import annotations

import itertools
import json
from typing import Any

from hypothesis import strategies as st

from supervisor.dialects import Delta, Dialect, Fold, Snapshot, UnparseableError
from supervisor.dialects.base import Reader
from supervisor.dialects.reading import BodyReader
from tests.dialects.bodies import RecordingSink

WORDS = st.text(st.characters(exclude_categories=["Cs"]), max_size=6)
CUTS = st.lists(st.integers(0, 2000), max_size=6)


def read(dialect: Dialect, *pieces: bytes, clean: bool = True) -> RecordingSink:
    """Read a body to its end and return what the sink was told."""
    sink = RecordingSink()
    body = BodyReader(dialect, sink)
    for piece in pieces:
        body.feed(piece)
    body.end(clean=clean)
    assert sink.sealed
    return sink


def read_cut(dialect: Dialect, body: bytes, cuts: list[int]) -> RecordingSink:
    """Read a body cut at these places."""
    bounds = [0, *sorted(min(cut, len(body)) for cut in cuts), len(body)]
    return read(dialect, *(body[a:b] for a, b in itertools.pairwise(bounds)))


def tell(reader: Reader, *values: Any, event: str = "message") -> list[Delta]:
    """Have a reader read these events, given as JSON values, and return all deltas."""
    return [delta for value in values for delta in reader.read(json.dumps(value).encode(), event)]


def folded(deltas: list[Delta]) -> Snapshot:
    """Return the answer that deltas add up to."""
    fold = Fold()
    for delta in deltas:
        fold.apply(delta)
    return fold.snapshot()


def refused(reader: Reader, value: Any) -> str:
    """Return why a reader refuses an event."""
    try:
        reader.read(value if isinstance(value, bytes) else json.dumps(value).encode())
    except UnparseableError as exc:
        return str(exc)
    raise AssertionError(f"{value!r} was read")


def odd_json(*words: str) -> st.SearchStrategy[Any]:
    """Return JSON whose names, and some of its texts, are these."""
    names = st.sampled_from(words)
    scalars = (
        st.none()
        | st.booleans()
        | st.integers(-2, 3)
        | st.integers()
        | st.floats()
        | names
        | st.sampled_from(["", "$.a", "$.a[1].b", "$.a.b", "STOP", "ERROR", "stop", "[DONE]"])
        | st.text(max_size=5)
    )
    return st.recursive(
        scalars,
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(names, inner, max_size=5),
        max_leaves=20,
    )


def survives(dialect: Dialect, values: list[Any], event: str) -> None:
    """Check that a reader reads or refuses each value, and that its deltas can be folded."""
    reader = dialect.reader()
    fold = Fold()
    for value in values:
        try:
            deltas = reader.read(json.dumps(value).encode(), event)
        except UnparseableError:
            continue
        for delta in deltas:
            assert delta.fault is None or delta.fault.message
            fold.apply(delta)
    reader.ending()
    fold.snapshot()
