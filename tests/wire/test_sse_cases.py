"""`SSEDecoder` against the published cases of other implementations and of the web platform's own tests."""

from __future__ import annotations

import json
from collections.abc import Iterable

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings

from tests.cases import cases_dir
from tests.wire.feeding import cut, decode
from tests.wire.whatwg import interpret

places = st.lists(st.integers(0, 200), max_size=12)


def _published() -> list[dict[str, object]]:
    root = cases_dir()
    cases = json.loads((root / "sse_cases.json").read_text("utf-8"))
    assert all(case["dialect"] == "whatwg" and case["encoding"] == "latin-1" for case in cases)
    return cases


def _is_as_published(case: dict, pieces: Iterable[bytes]) -> None:
    events, decoder = decode(pieces)
    shown = [{"event": e.event, "data": e.data.decode("utf-8"), "id": e.id, "retry": e.retry} for e in events]
    assert case["expected"] == shown
    assert case["final_last_event_id"] == decoder.last_event_id
    assert case["final_retry"] == decoder.retry
    if "expected_comments" in case:
        assert len(case["expected_comments"]) == decoder.comments


@pytest.mark.parametrize("case", _published(), ids=lambda case: case["name"])
class TestPublishedCases:
    def test_as_cut_by_the_case(self, case):
        """Each published case decodes to what its source expects, in the chunks it came with."""
        _is_as_published(case, [chunk.encode("latin-1") for chunk in case["chunks"]])

    def test_at_every_split(self, case):
        """Where the stream is cut in two makes no difference, and neither does byte by byte."""
        stream = "".join(case["chunks"]).encode("latin-1")
        for at in range(len(stream) + 1):
            _is_as_published(case, cut(stream, [at]))
        _is_as_published(case, [bytes([byte]) for byte in stream])

    def test_agrees_with_the_standard(self, case):
        """The oracle of these tests is right itself about the published cases."""
        stream = "".join(case["chunks"]).encode("latin-1")
        expected = [(e["event"], e["data"], e["id"], e["retry"]) for e in case["expected"]]
        found = interpret(stream)
        assert expected == [(e.event, e.data.decode(), e.id, e.retry) for e in found.events]
        assert (case["final_last_event_id"], case["final_retry"]) == (found.last_event_id, found.retry)


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_published_cases_at_random_splits(data):
    """Any number of cuts, empty reads among them, changes nothing."""
    case = data.draw(st.sampled_from(_published()))
    stream = "".join(case["chunks"]).encode("latin-1")
    _is_as_published(case, cut(stream, data.draw(places)))
