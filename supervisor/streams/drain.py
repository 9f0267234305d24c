"""A stop that lets the answer end by itself first.

A drain is no ending: it keeps a verdict at hand, and the stream is sealed with it when a budget is spent, of time or of tokens, unless
something else has sealed it before. What completes while it drains has completed. An answer that has ended as far as seen takes no
more tokens: then only the time counts, and at its end the answer is complete.
"""

from __future__ import annotations

import attrs

from supervisor.dialects import Fault, Fold
from supervisor.streams.bill import TokenBudget
from supervisor.streams.lifecycle import Verdict

__all__ = ["Drain"]


class Drain:
    """The drain of one stream. Further ones can only tighten its budgets. That of time is a clock of the stream's."""

    __slots__ = ("budget", "verdict")

    def __init__(self, verdict: Verdict) -> None:
        self.verdict = verdict
        """What the stream ends in, if nothing else ends it."""
        self.budget: TokenBudget | None = None
        """Of tokens, if they are limited."""

    def __repr__(self) -> str:
        return f"<Drain with {self.budget!r}>"

    def tighten(self, tokens: int, fold: Fold) -> TokenBudget:
        """Allow so many tokens from now on, or what is left of fewer."""
        if self.budget is None or tokens < self.budget.left(fold):
            self.budget = TokenBudget(tokens, fold)
        return self.budget

    def begin_anew(self, fold: Fold) -> None:
        """Take note that another answer takes the place of the one there was: all that the fold holds from now on is new."""
        if self.budget is not None:
            self.budget = TokenBudget(self.budget.limit, fold)

    def verdict_with(self, fault: Fault | None) -> Verdict:
        """Return the verdict, with the fault that came upon the upstream meanwhile."""
        return self.verdict if fault is None else attrs.evolve(self.verdict, fault=fault)

    def decided(self, sealed: Verdict | None) -> bool:
        """Whether the verdict that a stream was sealed with is this one, perhaps with a fault."""
        if sealed is None or sealed.fault is None:
            return sealed is self.verdict
        return attrs.evolve(sealed, fault=None) == self.verdict
