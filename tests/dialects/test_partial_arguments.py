"""Arguments told as values at paths become one JSON object, in whatever order they come."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from supervisor.dialects import UnparseableError
from supervisor.dialects.partial_arguments import (
    MAX_DEPTH,
    MAX_GAPS,
    MAX_KEPT_BYTES,
    ArgumentsBudget,
    ArgumentsWriter,
    PartialValue,
    parse_path,
)
from tests.dialects.answers import WORDS


def write(*values: tuple[str, Any] | tuple[str, Any, bool]) -> list[str]:
    """Return the pieces of text that a writer gives for these values, the closing one last."""
    writer = ArgumentsWriter(ArgumentsBudget())
    pieces = [writer.add(PartialValue(parse_path(path), *rest)) for path, *rest in values]
    return [*pieces, writer.finish()]


@pytest.mark.parametrize(
    ("path", "steps"),
    [
        ("$", ()),
        ("$.", ()),
        ("$.a", ("a",)),
        ("$.a.b[0].c", ("a", "b", 0, "c")),
        ("$['a b'][2]", ("a b", 2)),
        ('$["a.b"].c', ("a.b", "c")),
        (r"$['it\'s']", ("it's",)),
        (r"$['\u00e9\n\ud800']", ("é\n\ufffd",)),
        ("$.größe", ("größe",)),
    ],
)
def test_paths(path: str, steps: tuple[str | int, ...]) -> None:
    """Names in dots or in either quotes, with escapes, and indexes."""
    assert steps == parse_path(path)


@pytest.mark.parametrize(
    "path",
    [
        "",
        "a",
        "$a",
        "$..a",
        "$.*",
        "$[*]",
        "$.a[-1]",
        "$.a[1:2]",
        "$.a[?@.b]",
        "$[0]",
        "$['a",
        "$.a[9999999999]",
        "$" + ".a" * (MAX_DEPTH + 1),
    ],
)
def test_paths_that_name_no_one_place(path: str) -> None:
    """Wildcards, slices, filters, negative or huge indexes, lists at the root, and too deep ones are refused."""
    with pytest.raises(UnparseableError):
        parse_path(path)


def test_text_is_written_as_the_values_come() -> None:
    """What is open stays open until a path leaves it; a string goes on until it is whole."""
    pieces = write(
        ("$.ops[0].action", "ad", True),
        ("$.ops[0].action", 'd"', True),
        ("$.ops[0].action", "", False),
        ("$.ops[0].n", 1),
        ("$.ops[1].n", 0.5),
        ("$.list[0]", True),
        ("$.list[1]", None),
        ("$.deep.er.est", "x", True),
    )
    assert pieces == [
        '{"ops":[{"action":"ad',
        'd\\"',
        '"',
        ',"n":1',
        '},{"n":0.5',
        '}],"list":[true',
        ",null",
        '],"deep":{"er":{"est":"x',
        '"}}}',
    ]


def test_nothing_told_is_an_empty_object() -> None:
    """No values, or values at the root, which nothing can be said of, make no arguments."""
    assert write() == ["{}"]
    assert write(("$", "x")) == ["", "{}"]


def test_a_second_close_of_a_string_means_nothing() -> None:
    """An empty string for one that is whole already is its end told again, not a change."""
    assert write(("$.a", "x"), ("$.a", ""), ("$.b", 1)) == ['{"a":"x"', "", ',"b":1', "}"]


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([("$.a.x", 1), ("$.b", 2), ("$.a.y", 3)], {"a": {"x": 1, "y": 3}, "b": 2}),
        ([("$.a[1]", 1), ("$.a[0]", 2)], {"a": [2, 1]}),
        ([("$.l[0].x", 1), ("$.l[1].x", 2), ("$.l[0].y", 3)], {"l": [{"x": 1, "y": 3}, {"x": 2}]}),
        ([("$.a", 1), ("$.a", 2)], {"a": 2}),
        ([("$.a", "x"), ("$.a", "y")], {"a": "xy"}),
        ([("$.a", "x", True), ("$.a", 5)], {"a": 5}),
        ([("$.a", "x", True), ("$.b", 1), ("$.a", "y")], {"a": "xy", "b": 1}),
        ([("$.a", 1), ("$.a.b", 2)], {"a": {"b": 2}}),
        ([("$.a", "x", True), ("$.a.b", 2)], {"a": {"b": 2}}),
        ([("$.a.b", 1), ("$.a[0]", 2)], {"a": [2]}),
        ([("$.a[0]", 1), ("$.a.b", 2), ("$.a.c", "z")], {"a": {"b": 2, "c": "z"}}),
        ([("$.a", 1), ("$.a", 2), ("$.c", 3), ("$.c", 4)], {"a": 2, "c": 4}),
        ([("$.a[2]", 1)], {"a": [None, None, 1]}),
        ([("$.a[0]", 0), ("$.b", 1), ("$.a[3]", 3)], {"a": [0, None, None, 3], "b": 1}),
    ],
)
def test_values_out_of_order(values: list[Any], expected: dict[str, Any]) -> None:
    """A path that goes back is written once more at the end; the later member counts."""
    assert expected == json.loads("".join(write(*values)))


def test_gaps_are_bounded() -> None:
    """Far too large an index takes the next place instead of so many nulls."""
    text = "".join(write(("$.a[900]", 1), ("$.a[999999999]", 2), ("$.b[500]", 3)))
    told = json.loads(text)
    assert (len(told["a"]), told["a"][-2:], told["b"]) == (902, [1, 2], [3])
    assert len(text) < MAX_GAPS * 5 + 200


def test_what_is_kept_is_bounded() -> None:
    """Values beyond the budget of the response are refused before they are taken."""
    budget = ArgumentsBudget()
    writer = ArgumentsWriter(budget)
    piece = PartialValue(("a",), "x" * (MAX_KEPT_BYTES // 4), True)
    for _ in range(3):
        budget.check([piece])
        writer.add(piece)
    budget.check([])
    with pytest.raises(UnparseableError, match="streamed arguments"):
        budget.check([piece])
    assert writer.finish() == '"}'


SCALARS = st.none() | st.booleans() | st.integers(-(2**53), 2**53) | WORDS
TREES = st.dictionaries(
    WORDS,
    st.recursive(
        SCALARS,
        lambda inner: (
            st.lists(inner, min_size=1, max_size=3) | st.dictionaries(WORDS, inner, min_size=1, max_size=3)
        ),
        max_leaves=8,
    ),
    max_size=4,
)


def leaves(value: Any, path: str = "$") -> list[tuple[str, Any]]:
    """Return the scalars of a value with their paths."""
    if isinstance(value, dict):
        return [leaf for name, item in value.items() for leaf in leaves(item, f"{path}[{json.dumps(name)}]")]
    if isinstance(value, list):
        return [leaf for index, item in enumerate(value) for leaf in leaves(item, f"{path}[{index}]")]
    return [(path, value)]


@settings(deadline=None)  # a test asserts no time
@given(TREES, st.randoms(use_true_random=False), st.booleans())
def test_any_object_comes_back(tree: dict[str, Any], chosen: Any, shuffled: bool) -> None:
    """Whatever object is told by its leaves, in order or not, strings in pieces, is the object that is written."""
    values: list[tuple[str, Any, bool]] = []
    told = leaves(tree)
    if shuffled:
        chosen.shuffle(told)
    for path, value in told:
        if isinstance(value, str) and value:
            at = chosen.randrange(len(value) + 1)
            values += [(path, value[:at], True), (path, value[at:], chosen.random() < 0.5)]
        else:
            values.append((path, value, False))
    pieces = write(*values)
    assert tree == json.loads("".join(pieces))
