"""Options are validated where they are made, with an error that says what would be right."""

from __future__ import annotations

import math

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from supervisor import ConfigurationError, Deadlines, Limits, MemoryPolicy, OnDetach
from supervisor.streams.spec import StreamSpec, monotonic_ids


@pytest.mark.parametrize(
    ("make", "field"),
    [
        (lambda: Deadlines(idle_s=0), "Deadlines.idle_s"),
        (lambda: Deadlines(total_s=math.nan), "Deadlines.total_s"),
        (lambda: Deadlines(connect_s=True), "Deadlines.connect_s"),
        (lambda: Deadlines(first_event_s="soon"), "Deadlines.first_event_s"),
        (lambda: OnDetach(mode="stop"), "OnDetach.mode"),
        (lambda: OnDetach(grace_s=-1), "OnDetach.grace_s"),
        (lambda: Limits(max_live=0), "Limits.max_live"),
        (lambda: Limits(tail_bytes=1.5), "Limits.tail_bytes"),
        (lambda: Limits(when_full="drop"), "Limits.when_full"),
        (lambda: MemoryPolicy(max_count=-1), "MemoryPolicy.max_count"),
        (lambda: MemoryPolicy(sweep_every_s=math.inf), "MemoryPolicy.sweep_every_s"),
        (lambda: StreamSpec(key=""), "key"),
        (lambda: StreamSpec(key="k" * 257), "key"),
        (lambda: StreamSpec(labels={"a": 1}), "labels"),
        (lambda: StreamSpec(labels={str(n): "" for n in range(33)}), "labels"),
        (lambda: StreamSpec(labels=["a"]), "labels"),
        (lambda: StreamSpec(delivery="later"), "StreamSpec.delivery"),
        (lambda: StreamSpec(deadlines={"idle_s": 1}), "deadlines"),
        (lambda: StreamSpec(on_detach="keep"), "on_detach"),
    ],
)
def test_a_bad_option_is_refused_by_name(make, field):
    """The error names the field and what would be right, and is both ours and a ValueError."""
    with pytest.raises(ConfigurationError) as caught:
        make()

    assert caught.value.field == field
    assert field in str(caught.value)
    assert "expected" in str(caught.value)
    assert isinstance(caught.value, ValueError)


def test_a_spec_reads_back_as_it_was_written():
    """A stream's head in the store gives the same spec again, whatever a later process runs with."""
    spec = StreamSpec(
        key="k",
        upstream="openai",
        dialect="openai-chat",
        labels={"user": "u1"},
        deadlines=Deadlines(idle_s=None, total_s=5),
        on_detach=OnDetach(mode="cancel", grace_s=0),
        delivery="durable",
        meta={"model": "m", "n": [1, None]},
    )

    assert msgspec.json.decode(msgspec.json.encode(spec), type=StreamSpec) == spec


@given(st.lists(st.floats(min_value=1e9, max_value=4e9), min_size=2, max_size=50))
def test_ids_sort_in_the_order_they_were_made(times: list[float]):
    """Also within one millisecond, and when the clock goes back."""
    clock = iter(times)
    new_id = monotonic_ids(lambda: next(clock))
    made = [new_id() for _ in times]

    assert made == sorted(set(made))
    assert all(len(one) == 26 and one.isalnum() and one == one.lower() for one in made)
