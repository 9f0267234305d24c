"""The retry policy: its bounds for any numbers, what it refuses, and how a Retry-After is read."""

from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from supervisor.dialects import Fault
from supervisor.errors import ConfigurationError
from supervisor.upstream.retry import RetryPolicy, retry_after_s, should_retry

seconds = st.floats(min_value=0, max_value=1e6)
draws = st.floats(min_value=0, max_value=1, exclude_max=True)


@st.composite
def policies(draw: st.DrawFn) -> RetryPolicy:
    initial = draw(seconds)
    return RetryPolicy(
        attempts=draw(st.integers(1, 100)),
        wait_initial_s=initial,
        wait_max_s=initial + draw(seconds),
        jitter_s=draw(seconds),
        retry_after_max_s=draw(seconds),
    )


@given(policies(), st.integers(1, 200), draws)
def test_backoff_is_bounded(policy: RetryPolicy, failed: int, draw: float) -> None:
    """Any wait is between zero and both bounds, and the bounds never shrink."""
    delay = policy.delay_s(failed, draw=lambda: draw)
    assert delay is not None
    assert 0 <= delay <= policy.bound_s(failed) <= policy.wait_max_s
    assert policy.bound_s(failed) <= policy.bound_s(failed + 1)


@given(policies(), st.integers(1, 200), seconds, draws)
def test_what_the_upstream_asks_for_is_kept_or_refused(
    policy: RetryPolicy, failed: int, asked: float, draw: float
) -> None:
    """Never sooner than asked, never more than the jitter later, and not at all past the limit."""
    delay = policy.delay_s(failed, asked_s=asked, draw=lambda: draw)
    if asked > policy.retry_after_max_s:
        assert delay is None
    else:
        assert delay is not None
        assert asked <= delay <= asked + policy.jitter_s


def test_backoff_doubles() -> None:
    """With the defaults, the bounds are 0.5, 1, 2 … and at most 30 seconds."""
    policy = RetryPolicy()
    assert [policy.bound_s(n) for n in (1, 2, 3, 7, 100)] == [0.5, 1.0, 2.0, 30.0, 30.0]


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("attempts", 0),
        ("attempts", 1.5),
        ("attempts", True),
        ("attempts", 101),
        ("wait_initial_s", -1),
        ("wait_max_s", math.inf),
        ("wait_max_s", math.nan),
        ("wait_max_s", 0.1),
        ("jitter_s", "1"),
        ("retry_after_max_s", -0.1),
        ("statuses", [200]),
        ("statuses", ["500"]),
        ("statuses", 500),
    ],
)
def test_bad_values_are_named(field: str, value: Any) -> None:
    """Each refusal names the field."""
    options = {field: value}
    with pytest.raises(ConfigurationError) as caught:
        RetryPolicy(**options)
    assert caught.value.field == f"retry.{field}"


@pytest.mark.parametrize(
    ("headers", "expected"),
    [
        ({}, None),
        ({"retry-after": "3"}, 3.0),
        ({"retry-after": " 1.5 "}, 1.5),
        ({"retry-after": "-3"}, None),
        ({"retry-after": "nan"}, None),
        ({"retry-after": "inf"}, None),
        ({"retry-after": "soon"}, None),
        ({"retry-after": "99999999999999"}, None),
        ({"retry-after-ms": "250", "retry-after": "9"}, 0.25),
        ({"retry-after-ms": "x", "retry-after": "9"}, 9.0),
        ({"retry-after": "Wed, 21 Oct 2015 07:28:00 GMT"}, 60.0),
        ({"retry-after": "Wed, 21 Oct 2015 07:28:00 GMT", "date": "Wed, 21 Oct 2015 07:27:45 GMT"}, 15.0),
        ({"retry-after": "Wed, 21 Oct 2015 07:00:00 GMT"}, 0.0),
        ({"retry-after": "Wed, 99 Oct 2015 07:28:00 GMT"}, None),
    ],
)
def test_retry_after_is_read(headers: dict[str, str], expected: float | None) -> None:
    """Milliseconds, seconds and dates; what cannot be read is no wish."""
    assert retry_after_s(headers, now=1445412420.0) == expected


@given(st.text(max_size=60))
def test_any_retry_after_is_survived(value: str) -> None:
    """Whatever the header says, the result is None or a number of seconds."""
    found = retry_after_s({"retry-after": value, "date": value})
    assert found is None or 0 <= found < math.inf


def test_faults_that_time_does_not_heal() -> None:
    """A refused credential or a long prompt is not tried again, whatever the status."""
    policy = RetryPolicy()
    assert should_retry(policy, 500, Fault(kind="server", message="", temporary=True), {})
    assert should_retry(policy, 409, Fault(kind="invalid_request", message=""), {})
    for kind in ("auth", "context_length", "content_filter", "rate_limit"):
        fault = Fault(kind=kind, message="")
        assert not should_retry(policy, 500, fault, {})
        assert should_retry(policy, 500, fault, {"x-should-retry": "true"})
    assert not should_retry(policy, 418, Fault(kind="server", message="", temporary=True), {})
