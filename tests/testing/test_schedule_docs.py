"""docs/schedule-explorer.md says what is so: its examples run as written, and fail as shown."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from hypothesis import settings

from supervisor.testing import ScheduleFailure

PAGE = Path(__file__).parents[2] / "docs" / "schedule-explorer.md"


def example() -> dict[str, object]:
    source = "\n\n".join(
        re.findall(r"^```python\n(.*?)^```", PAGE.read_text("utf-8"), re.MULTILINE | re.DOTALL)
    )
    namespace: dict[str, object] = {"__name__": "test_job"}
    exec(compile(source, "test_job.py", "exec"), namespace)
    return namespace


def test_the_example_fails_as_shown():
    """The first example raises exactly the message printed on the page."""
    (shown,) = re.findall(r"^```text\n(.*?)^```", PAGE.read_text("utf-8"), re.MULTILINE | re.DOTALL)
    with pytest.raises(ScheduleFailure) as caught:
        example()["test_stopping"]()
    assert shown.rstrip("\n") == str(caught.value)


def test_the_replay_fails_the_same_way():
    """The schedule printed on the page replays to the same assertion."""
    with pytest.raises(AssertionError, match=re.escape("['done', 'stopped']")):
        example()["test_that_order"]()


@pytest.mark.parametrize("name", ["test_one_ending", "test_counting"])
def test_the_other_examples_pass(name):
    """Every other example is a test that passes."""
    example()[name]()


def test_the_drawn_example_passes():
    """The example under hypothesis passes; without hypothesis' limit on the time of an example, to be sure on any machine."""
    settings(deadline=None, database=None)(example()["test_drawn"])()


def test_no_example_is_left_out():
    """The tests above name every test function of the page."""
    defined = {name for name in example() if name.startswith("test_")}
    assert defined == {"test_stopping", "test_that_order", "test_one_ending", "test_drawn", "test_counting"}
