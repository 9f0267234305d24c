"""A response that is made in the background: it goes on whether anybody reads it or not, until it is done or cancelled.

No task makes it. Which events there are is a function of its answer, and when each is there is one of its pace, so what
has been made so far is computed when somebody asks: how many words were generated, and billed, is exact at any time.
"""

from __future__ import annotations

from typing import Any

import attrs

from supervisor.testing.upstream.answers import OPENAI_RESPONSES, Answer, response, response_id

__all__ = ["StoredResponse"]


@attrs.define(eq=False, kw_only=True)
class StoredResponse:
    """One response of the Responses API. Times are by trio's clock."""

    answer: Answer
    made_at: float
    cancelled_at: float | None = None
    resumed: list[int] = attrs.field(factory=list)
    """After how many events it was resumed, each time."""
    retrieved: int = 0
    kept: bool = True
    """Whether it can still be asked for: always if it is made in the background, else once it was sent whole."""
    _opening: int = attrs.field(init=False)

    def __attrs_post_init__(self) -> None:
        self._opening = sum(1 for _ in OPENAI_RESPONSES.opening(self.answer))

    @property
    def id(self) -> str:
        """The id that the provider gave it."""
        return response_id(self.answer.number)

    def expired(self, now: float) -> bool:
        """Whether it is forgotten."""
        expires_s = self.answer.script.expires_s
        return not self.kept or (expires_s is not None and now >= self.made_at + expires_s)

    def due(self, at: int) -> float | None:
        """Return when the event with this number is there; None if it never will be, as the response was cancelled."""
        script, count = self.answer.script, self.answer.count
        made = at - self._opening + 1
        if count is not None:
            made = min(made, count)
        when = self.made_at
        if made > 0:
            when += script.first_after_s + (made - 1) * script.interval_s
        return None if self.cancelled_at is not None and when > self.cancelled_at else when

    def words(self, now: float) -> int:
        """Return how many words are generated at this time."""
        script, count = self.answer.script, self.answer.count
        if self.cancelled_at is not None:
            now = min(now, self.cancelled_at)
        since = now - self.made_at - script.first_after_s
        if since < 0:
            return 0
        made = int(since / script.interval_s + 1e-9) + 1 if script.interval_s else count
        return made or 0 if count is None else min(made or 0, count)

    def done(self, now: float) -> bool:
        """Whether all of it is generated."""
        return self.words(now) == self.answer.count

    def cancel(self, now: float) -> None:
        """Stop generating; of no effect once it is done or cancelled."""
        if self.cancelled_at is None and not self.done(now):
            self.cancelled_at = now

    def to_json_object(self, now: float) -> dict[str, Any]:
        """Return the response object as it stands."""
        if self.cancelled_at is not None:
            return response(self.answer, "cancelled", told=self.words(now))
        if self.done(now):
            return dict(OPENAI_RESPONSES.whole(self.answer))
        return response(self.answer, "in_progress")
