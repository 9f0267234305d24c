"""The fold of deltas into an answer."""

from __future__ import annotations

import attrs
from hypothesis import given, settings
from hypothesis import strategies as st

from supervisor.dialects import Delta, Fold, ToolCall, ToolCallDelta, Usage
from supervisor.dialects.fold import CALL_OVERHEAD_BYTES, CHOICE_OVERHEAD_BYTES, PIECES


@settings(deadline=None)  # a test asserts no time
@given(st.lists(st.tuples(st.integers(0, 2), st.text(max_size=5), st.booleans()), max_size=60))
def test_text_is_the_concatenation_per_choice(pieces: list[tuple[int, str, bool]]) -> None:
    """Whatever the order of choices and the moments of snapshots, each choice's text is its pieces joined."""
    fold = Fold()
    joined = ["", "", ""]
    for choice, text, look in pieces:
        fold.apply(Delta(text=text, choice=choice))
        joined[choice] += text
        if look:
            fold.snapshot()
    snapshot = fold.snapshot()
    assert [joined[choice.index] for choice in snapshot.choices] == [
        choice.text for choice in snapshot.choices
    ]
    assert joined[0] == snapshot.text
    held = sum(len(text.encode()) for text in joined)
    assert held + CHOICE_OVERHEAD_BYTES * len(snapshot.choices) == fold.nbytes


def test_many_pieces_are_compacted() -> None:
    """A long answer in tiny pieces is kept in few strings, and comes out whole."""
    fold = Fold()
    count = PIECES * PIECES + PIECES + 3
    for number in range(count):
        fold.apply(Delta(text=str(number % 10), reasoning="r"))
    texts = fold._choices[0].text
    assert len(texts._pieces) + len(texts._blocks) < PIECES
    snapshot = fold.snapshot()
    assert "".join(str(number % 10) for number in range(count)) == snapshot.text
    assert "r" * count == snapshot.reasoning
    assert 2 * count + CHOICE_OVERHEAD_BYTES == fold.nbytes


def test_snapshots_do_not_change_afterwards() -> None:
    """A snapshot taken earlier is not touched by later deltas."""
    fold = Fold()
    fold.apply(Delta(text="a"))
    before = fold.snapshot(2, 7)
    fold.apply(Delta(text="b", finish_reason="stop"))
    assert (before.text, before.finish_reason, before.epoch, before.seq) == ("a", None, 2, 7)
    assert fold.snapshot().text == "ab"


def test_a_later_usage_replaces_the_earlier_whole() -> None:
    """Usages are running totals: the last one counts, also where it states less."""
    fold = Fold()
    fold.apply(Delta(usage=Usage(input=5, output=1, reasoning=3)))
    fold.apply(Delta(usage=Usage(input=5, output=2)))
    assert Usage(input=5, output=2) == fold.usage == fold.snapshot().usage


def test_tool_calls_are_kept_by_choice_and_index() -> None:
    """Pieces of interleaved calls are joined; calls stand in the order of their indexes."""
    fold = Fold()
    fold.apply(Delta(tool_calls=(ToolCallDelta(1, "b", "g", "{"), ToolCallDelta(0, "a", "f", ""))))
    fold.apply(Delta(tool_calls=(ToolCallDelta(0, arguments="[]"),)))
    fold.apply(Delta(tool_calls=(ToolCallDelta(1, arguments="}"),)))
    fold.apply(Delta(tool_calls=(ToolCallDelta(0, "z", "h", "1"),), choice=1))
    snapshot = fold.snapshot()
    assert (ToolCall("a", "f", "[]"), ToolCall("b", "g", "{}")) == snapshot.tool_calls
    assert (ToolCall("z", "h", "1"),) == snapshot.choices[1].tool_calls
    assert fold.nbytes == 2 * CHOICE_OVERHEAD_BYTES + 3 * CALL_OVERHEAD_BYTES + 11


def test_contentless_deltas_open_no_choice() -> None:
    """Usage, model and end marker belong to no choice; a mention of a later choice opens it."""
    fold = Fold()
    fold.apply(Delta(usage=Usage(1, 2), model="m", response_id="r"))
    fold.apply(Delta(terminal=True))
    assert fold.snapshot().choices == ()
    assert (fold.snapshot().model, fold.snapshot().response_id) == ("m", "r")
    fold.apply(Delta(choice=1))
    assert [choice.index for choice in fold.snapshot().choices] == [1]
    assert fold.snapshot().text == ""


def test_reset_begins_anew() -> None:
    """After a reset nothing of the earlier epoch is left, nor accounted, but what it used."""
    fold = Fold()
    fold.apply(Delta(text="é", usage=Usage(1, 1), model="m", finish_reason="stop"))
    fold.reset()
    assert fold.nbytes == 0
    assert attrs.evolve(Fold().snapshot(), usage=Usage(1, 1)) == fold.snapshot()
    assert fold.finish_reason is None
    fold.apply(Delta(text="again", usage=Usage(1, 4, cached=1)))
    assert fold.usage == Usage(2, 5, cached=1)


def test_another_request_goes_on_from_the_text() -> None:
    """What it brings is joined, the place is known, and white space that it will bring again is not kept."""
    fold = Fold()
    for text in ("é", "t", "é \n"):
        fold.apply(Delta(text=text))
    fold.apply(Delta(usage=Usage(7, 3), model="m", response_id="r1"))
    fold.go_on(dropped=2)
    assert (fold.snapshot().text, fold.snapshot().joined_at) == ("été", (3,))
    fold.apply(Delta(text=" et hiver", response_id="r2"))
    fold.go_on()
    fold.apply(Delta(text=".", usage=Usage(9, 1)))
    told = fold.snapshot()
    assert (told.text, told.joined_at, told.usage) == ("été et hiver.", (3, 12), Usage(16, 4))
    assert fold.nbytes == 512 + len("été et hiver.".encode())
