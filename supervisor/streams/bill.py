"""The bill: how many tokens a stream that is being stopped may still take, and what an ended one is said to have taken.

**The budget.** A drain lets an answer end by itself, because some providers bill the whole answer whether or not anybody stays
to read it, and others only state the usage at its end. It is bounded by time and, if asked, by output tokens. Tokens are
counted in the provider's own figures where it states them as it goes. Most do not, or state one figure at the beginning and
one at the end, so what was received since the last figure (since the stop, if there was none) is estimated from its length:

    spent = last figure stated since the stop - output at the stop + estimate of what came after that figure

The output at the stop is the last figure before it, or, as that may be an old one, the share of the first figure after it that the
answer's length at the stop has in its length now, whichever is more. Where another answer takes the place of the one that there was
at the stop, all of it came after the stop.

The check runs once per read of a stream that has such a budget, and on no other. It looks at the number of bytes that the
fold holds, which grows at least as fast as the answer (but for a call's id that is replaced by a shorter one, a few bytes of an
estimate); only when that could be over the budget is the answer itself measured.

**The quality of a usage.** `exact` is a provider's final figure for all that was asked of it: the answer completed, and no request
before the last one had begun to answer. A request that died in the middle stated, at best, what it had used by then; with it the
sum is `provider_partial`. An answer that was cut may have grown since its provider's last figure (Anthropic states a first one at the
beginning and the next at the end): where what was received is plainly more than that, its estimate takes the place of the output
stated, and the whole is `estimated`.
"""

from __future__ import annotations

import msgspec

from supervisor.dialects import Fold, Usage
from supervisor.dialects.estimate import estimate_tokens, estimate_usage

__all__ = ["TokenBudget", "billed"]


class TokenBudget:
    """How much output may still come. Made at the stop, of the fold as it is then."""

    __slots__ = ("_before", "_counted", "_grown", "_length", "_measured", "_stated", "limit")

    def __init__(self, limit: int, fold: Fold) -> None:
        self.limit = limit
        self._stated = _output(fold.usage)
        self._length = fold.output_bytes
        self._before: int | None = None  # the output at the stop, once there is a figure to tell it by
        self._counted = 0  # tokens since the stop, by the provider's figures
        self._measured = self._length  # how long the answer was when they were last counted
        self._grown = fold.grown_bytes  # and what the fold came to then

    def __repr__(self) -> str:
        return f"<TokenBudget of {self.limit}, {self._counted} counted>"

    def left(self, fold: Fold) -> int:
        """Return how many tokens may still come: 0 once it is spent, and before that no more than there are."""
        stated = _output(fold.usage)
        # What a fold holds is more than text, and never less: `most` is too high, if anything.
        most = self._counted + estimate_tokens(max(0, fold.grown_bytes - self._grown))
        if most < self.limit and stated == self._stated:
            return self.limit - most
        length = fold.output_bytes
        if stated is not None and stated != self._stated:
            if self._before is None:
                share = stated * self._length // length if length else 0
                self._before = max(self._stated or 0, share)
            self._stated, self._grown, self._measured = stated, fold.grown_bytes, length
            self._counted = max(self._counted, stated - self._before)
        return max(0, self.limit - self._counted - estimate_tokens(max(0, length - self._measured)))


def billed(
    fold: Fold,
    *,
    completed: bool,
    broken: bool,
    estimate: bool,
    reported: tuple[Usage, str] | None,
) -> tuple[Usage | None, str]:
    """Return the usage of an ended stream and its quality (`Outcome.usage_quality`).

    broken: whether a request before the last one had begun to answer. estimate: whether the dialect's tokens may be estimated.
    reported: what the provider answered when it was asked for the usage of a stopped answer; it is preferred.
    """
    if reported is not None:
        return reported
    usage = fold.usage
    if usage is not None and completed:
        return usage, "provider_partial" if broken else "exact"
    guessed = estimate_usage(fold.output_bytes) if estimate else None
    if usage is None:
        return guessed, "unknown" if guessed is None else "estimated"
    if guessed is not None and (usage.output or 0) < (guessed.output or 0):
        return msgspec.structs.replace(usage, output=guessed.output), "estimated"
    return usage, "provider_partial"


def _output(usage: Usage | None) -> int | None:
    return None if usage is None else usage.output
