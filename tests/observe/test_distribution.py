"""Percentiles are right to within 5 %, of any values, in a bounded space."""

from __future__ import annotations

import math

from hypothesis import given
from hypothesis import strategies as st

from supervisor.observe import Distribution

values = st.lists(st.floats(1e-6, 1e12), min_size=1, max_size=60)


@given(values, st.sampled_from([0.0, 0.01, 0.5, 0.9, 0.99, 1.0]))
def test_quantiles(given_values, share):
    """Each is within 5 % of the value that has its rank, and no value is exceeded."""
    seen = Distribution()
    for value in given_values:
        seen.add(value)
    exact = sorted(given_values)[max(1, math.ceil(share * len(given_values))) - 1]
    told = seen.quantile(share)
    assert abs(told - exact) <= 0.0505 * exact
    assert seen.percentiles().max <= max(given_values) * 1.001
    assert seen.quantile(1.0) == seen.percentiles().max


@given(values, values)
def test_two_added_up_are_as_one(one, other):
    """Minutes make an hour."""
    left, right, whole = Distribution(), Distribution(), Distribution()
    for value in one:
        left.add(value)
        whole.add(value)
    for value in other:
        right.add(value)
        whole.add(value)
    left.update(right)
    assert left.percentiles() == whole.percentiles()
    assert left.at_least(0) == len(one) + len(other)


def test_what_is_kept_is_bounded():
    """Whatever values come, there are at most 460 buckets; what is out of range is counted at the end that it is beyond."""
    seen = Distribution()
    for exponent in range(-3000, 3000):
        seen.add(10 ** (exponent / 10))
    seen.add(0)
    seen.add(-5)
    assert seen.count == 6002
    assert len(seen._buckets) <= 461
    assert seen.quantile(0.0) == 0


def test_of_nothing_nothing_is_told():
    """No value is made up."""
    told = Distribution().percentiles()
    assert (told.count, told.p50, told.p99, told.max) == (0, None, None, None)


@given(st.lists(st.integers(0, 10**9), min_size=1, max_size=40))
def test_of_whole_numbers_whole_numbers_are_told(given_values):
    """Nobody is told of 2.989 events; small numbers are exact."""
    seen = Distribution()
    for value in given_values:
        seen.add(value)
    told = seen.percentiles()
    assert all(isinstance(value, int) for value in (told.p50, told.p90, told.p99, told.max))
    assert told.max == max(given_values)
    if max(given_values) <= 9:
        assert told.p50 == sorted(given_values)[math.ceil(len(given_values) / 2) - 1]
