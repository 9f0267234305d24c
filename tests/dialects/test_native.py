"""The dialect of an embedding program's own sources."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from supervisor.dialects import NATIVE, Delta, ToolCallDelta, UnparseableError, Usage
from supervisor.dialects.native import encode
from supervisor.errors import ConfigurationError


@settings(deadline=None)  # a test asserts no time
@given(
    st.builds(
        Delta,
        text=st.text(),
        reasoning=st.text(),
        choice=st.integers(0, 5),
        tool_calls=st.lists(st.builds(ToolCallDelta, st.integers(0, 3), st.text(), st.text(), st.text())).map(
            tuple
        ),
        finish_reason=st.none() | st.text(),
        usage=st.none() | st.builds(Usage, st.integers(0, 9), st.none()),
    )
)
def test_a_delta_comes_back_as_it_was(delta: Delta) -> None:
    """What is journalled for a delta reads as that delta."""
    payload, deltas = encode(delta)
    assert (delta,) == deltas == NATIVE.reader().read(payload)


def test_a_str_is_text() -> None:
    """A str is the text of choice 0, and the payload says only that."""
    assert (b'{"text":"hi"}', (Delta(text="hi"),)) == encode("hi")


def test_a_mapping_is_kept_whole_and_read_for_what_it_has() -> None:
    """A program's own record keeps its fields; those that are a delta's count."""
    payload, deltas = encode({"text": "a", "choice": "not a number", "mine": [1]})
    assert payload == b'{"text":"a","choice":"not a number","mine":[1]}'
    assert (Delta(text="a"),) == deltas == NATIVE.reader().read(payload)


@pytest.mark.parametrize(
    "item", [None, 5, b"bytes", ["list"], {"x": object()}, "\ud800", {1: {2, 3}.__iter__()}]
)
def test_anything_else_is_a_configuration_error(item: Any) -> None:
    """What is not a str, Delta or mapping, or cannot be JSON, is refused by name."""
    with pytest.raises(ConfigurationError) as caught:
        encode(item)
    assert caught.value.field == "item"


@settings(deadline=None)  # a test asserts no time
@given(st.binary(max_size=50))
def test_other_payloads_are_unparseable_at_worst(data: bytes) -> None:
    """A payload that is no JSON object raises UnparseableError and nothing else."""
    with contextlib.suppress(UnparseableError):
        NATIVE.reader().read(data)


def test_ending_is_the_finish_reason() -> None:
    """The reader ends with choice 0's finish reason; with a bare end marker as `done`."""
    reader = NATIVE.reader()
    assert reader.ending() is None
    reader.read(b'{"choice":1,"finish_reason":"length"}')
    reader.read(b'{"finish_reason":"stop"}')
    assert reader.ending() == "stop"
    other = NATIVE.reader()
    other.read(b'{"terminal":true}')
    assert other.ending() == "done"
