"""Whether another attempt is made, and after how long.

Before the first event, when nothing of an answer has been seen, attempts are repeated. Even then a request whose connection
died after it was sent may have been worked on; that is accepted, as the providers' own SDKs accept it, and each attempt is in
the journal. Once an answer has begun, the provider has generated, and billed, what was received, and a second answer would be
another one: what is done then is decided on the ladder (`supervisor.upstream.ladder`), and only the rungs that `resume` names
are climbed. By default that is the one which costs nothing and changes nothing, `sequence`.

The delay is exponential backoff with *full jitter* (a uniform draw between zero and the exponential bound), which spreads
the clients of a provider that recovers best. A `Retry-After` is obeyed in place of it, plus a little jitter, since a
thousand streams that were refused together were told the same number. One that is longer than `retry_after_max_s` ends the
stream with the provider's fault: holding it that long is the caller's decision, and the fault carries the number.
"""

from __future__ import annotations

import email.utils
import math
import random
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import attrs

from supervisor.dialects import Fault
from supervisor.errors import ConfigurationError

__all__ = ["RETRIED_STATUSES", "RUNGS", "RetryPolicy", "retry_after_s", "should_retry"]

RETRIED_STATUSES = frozenset({408, 409, 425, 429, 500, 502, 503, 504, 529})
"""The HTTP statuses that are retried by default. 409 is what a provider's lock timeout looks like."""

RUNGS = ("sequence", "continuation", "restart")
"""What `RetryPolicy.resume` may name."""

_NEVER = frozenset({"auth", "context_length", "content_filter"})
_MAX_SECONDS = 1e9


def _finite(instance: object, attribute: attrs.Attribute[Any], value: object) -> None:
    del instance
    good = isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < math.inf
    if not good:
        raise ConfigurationError(f"retry.{attribute.name}", value, "a number of seconds, 0 or more")


def _attempts(instance: object, attribute: attrs.Attribute[Any], value: object) -> None:
    del instance
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= 100:
        raise ConfigurationError(f"retry.{attribute.name}", value, "a whole number from 1 to 100")


def _statuses(instance: object, attribute: attrs.Attribute[Any], value: frozenset[object]) -> None:
    del instance
    wrong = {status for status in value if not (isinstance(status, int) and 400 <= status <= 599)}
    if wrong:
        raise ConfigurationError(
            f"retry.{attribute.name}", sorted(wrong, key=str), "HTTP statuses from 400 to 599"
        )


def _rungs(instance: object, attribute: attrs.Attribute[Any], value: tuple[object, ...]) -> None:
    del instance
    if not set(value) <= set(RUNGS) or len(set(value)) != len(value):
        raise ConfigurationError(f"retry.{attribute.name}", value, f"any of {', '.join(RUNGS)}, each once")


def _as_rungs(value: Iterable[str]) -> tuple[str, ...]:
    if isinstance(value, str):
        raise ConfigurationError("retry.resume", value, f"a list of any of {', '.join(RUNGS)}")
    try:
        return tuple(value)
    except TypeError:
        raise ConfigurationError("retry.resume", value, f"a list of any of {', '.join(RUNGS)}") from None


def _as_statuses(value: Iterable[int]) -> frozenset[int]:
    try:
        return frozenset(value)
    except TypeError:
        raise ConfigurationError("retry.statuses", value, "HTTP statuses from 400 to 599") from None


@attrs.frozen(kw_only=True)
class RetryPolicy:
    """How often and how fast a stream's attempts are made, and what may be done once an answer has begun.

    Raises ConfigurationError naming the field (`retry.attempts`, …) for a value it cannot have.
    """

    attempts: int = attrs.field(default=4, validator=_attempts)
    """Of one stream, in all; 1: no second one, whatever happens."""
    wait_initial_s: float = attrs.field(default=0.5, validator=_finite)
    """The bound of the wait before the second attempt; it doubles with each."""
    wait_max_s: float = attrs.field(default=30.0, validator=_finite)
    """The bound of every wait that the upstream did not ask for."""
    jitter_s: float = attrs.field(default=0.5, validator=_finite)
    """The most that is added, at random, to a wait that the upstream asked for."""
    retry_after_max_s: float = attrs.field(default=60.0, validator=_finite)
    """A longer `Retry-After` is not waited for: the stream fails with the upstream's fault."""
    statuses: frozenset[int] = attrs.field(
        default=RETRIED_STATUSES, converter=_as_statuses, validator=_statuses
    )
    resume: tuple[str, ...] = attrs.field(default=("sequence",), converter=_as_rungs, validator=_rungs)
    """What may be done when an attempt dies after its first event: `sequence` (have the provider send the rest of the same
    answer), `continuation` (have the model go on from the text received), `restart` (withdraw what was received and ask again).
    Each where the dialect, the model and the request allow it, in this order."""

    def __attrs_post_init__(self) -> None:
        if self.wait_max_s < self.wait_initial_s:
            raise ConfigurationError(
                "retry.wait_max_s",
                self.wait_max_s,
                f"at least retry.wait_initial_s ({self.wait_initial_s:g})",
            )

    def bound_s(self, failed: int) -> float:
        """Return the longest wait, in seconds, after `failed` attempts (1 or more) without a `Retry-After`."""
        # ldexp of a large exponent overflows; past 64 doublings any initial wait of use is over any bound of use
        return min(self.wait_max_s, math.ldexp(self.wait_initial_s, min(failed - 1, 64)))

    def delay_s(
        self, failed: int, *, asked_s: float | None = None, draw: Callable[[], float] = random.random
    ) -> float | None:
        """Return the wait in seconds after so many failures in a row, None if the upstream asks for one that is too long.

        The upstream asked for a wait of `asked_s`, if it did. `draw` gives a number in [0, 1).
        """
        if asked_s is None:
            return draw() * self.bound_s(failed)
        if asked_s > self.retry_after_max_s:
            return None
        return asked_s + draw() * self.jitter_s


def should_retry(policy: RetryPolicy, status: int, fault: Fault, headers: Mapping[str, str]) -> bool:
    """Say whether an HTTP error is worth another attempt.

    An `x-should-retry` of the provider decides; else the status, unless the fault is one that time does not heal (a
    refused credential, a used-up quota, a prompt that is too long).
    """
    said = headers.get("x-should-retry", "").strip().lower()
    if said in {"true", "false"}:
        return said == "true"
    if fault.kind in _NEVER or (fault.kind == "rate_limit" and not fault.temporary):
        return False
    return status in policy.statuses


def retry_after_s(headers: Mapping[str, str], *, now: float | None = None) -> float | None:
    """Return the wait that a response asks for, in seconds; None if it does not, or not in a way that can be read.

    `retry-after-ms` is preferred, as the more exact; then `Retry-After` in seconds or as a date (RFC 9110 section 10.2.3),
    which is taken relative to the response's own `Date` where there is one, so that a wrong clock does no harm.
    """
    milliseconds = _number(headers.get("retry-after-ms"))
    if milliseconds is not None:
        return milliseconds / 1000
    value = headers.get("retry-after")
    if value is None:
        return None
    seconds = _number(value)
    if seconds is not None:
        return seconds
    due = _date(value)
    if due is None:
        return None
    since = _date(headers.get("date", ""))
    if since is None:
        since = time.time() if now is None else now
    return max(0.0, due - since)


def _number(value: str | None) -> float | None:
    try:
        number = float(value or "")
    except ValueError:
        return None
    return number if 0 <= number <= _MAX_SECONDS else None


def _date(value: str) -> float | None:
    try:
        return email.utils.parsedate_to_datetime(value).timestamp()
    except (ValueError, TypeError, OverflowError, IndexError):
        return None
