"""What a stream counts as it goes, and the outcome that is made of it once the stream is sealed.

The source's half of a stream counts (`output.py`); nothing here decides how the stream ends.
"""

from __future__ import annotations

from supervisor.dialects import Fold, Usage
from supervisor.streams.attempts import Rung
from supervisor.streams.bill import billed
from supervisor.streams.journal import Journal
from supervisor.streams.lifecycle import Outcome, State, Verdict

__all__ = ["Tally"]


class Tally:
    """The counts of one stream."""

    __slots__ = (
        "_broken",
        "_left_at",
        "_reported_usage",
        "_rungs",
        "_unread",
        "attempts",
        "cleanup_error",
        "events",
        "first_event_s",
        "sealed_at",
        "skipped",
    )

    def __init__(self) -> None:
        self.attempts = 0
        self.events = 0
        self.skipped = 0
        self.first_event_s: float | None = None
        """From the start to the first event."""
        self.sealed_at: float | None = None
        """Seconds since the Unix epoch."""
        self.cleanup_error: str | None = None
        self._rungs: list[str] = []  # of the attempts after the first
        self._broken = False  # whether a request before the last one had begun to answer
        self._left_at = 0  # how many events there were when the last reader left
        self._unread = 0  # how many came after that, as of the seal
        # What the provider stated when asked after the seal, and the quality of that.
        self._reported_usage: tuple[Usage, str] | None = None

    def __repr__(self) -> str:
        return f"<Tally: {self.attempts} attempts, {self.events} events>"

    def attempt(self, number: int, rung: Rung | None) -> None:
        """Count an attempt that begins."""
        if rung is not None:
            self._rungs.append(rung)
        self.attempts = number
        if self.events and self._rungs[-1:] != ["sequence"]:
            self._broken = True  # it does not go on with the response of the one before

    def left(self) -> None:
        """Take note that a reader has left."""
        self._left_at = self.events

    def end(self, *, watched: bool) -> None:
        """Take note of the seal: whether anybody is there to read what has arrived."""
        self._unread = 0 if watched else self.events - self._left_at

    def report_usage(self, usage: Usage, fold: Fold) -> None:
        """Take the usage of the last request, as the provider stated it. With requests before it, it is a part of the sum."""
        whole = all(rung in ("retry", "sequence") for rung in self._rungs)
        reported = usage if whole else usage.plus(fold.spent)
        self._reported_usage = (reported, "exact" if whole else "provider_partial")

    def outcome(
        self,
        verdict: Verdict,
        journal: Journal,
        fold: Fold,
        *,
        key: str | None,
        started_at: float,
        estimate: bool,
    ) -> Outcome:
        """Return the outcome of a sealed stream. estimate: whether the dialect's tokens may be estimated."""
        assert self.sealed_at is not None, "a sealed stream has the time of its seal"
        usage, quality = billed(
            fold,
            completed=verdict.state is State.COMPLETED,
            broken=self._broken,
            estimate=estimate,
            reported=self._reported_usage,
        )
        return Outcome(
            id=journal.stream_id,
            key=key,
            state=verdict.state,
            reason=verdict.reason,
            actor=verdict.actor,
            message=verdict.message or self._incompleteness(),
            fault=verdict.fault,
            usage=usage,
            usage_quality=quality,
            attempts=self.attempts,
            events=self.events,
            skipped=self.skipped,
            epoch=journal.epoch,
            last_seq=journal.tail_seq + 1,
            epoch_starts=journal.epoch_starts,
            started_at=started_at,
            ended_at=self.sealed_at,
            events_unread=self._unread,
            rungs=tuple(self._rungs),
            joined_at=fold.joined_at,
            cleanup_error=self.cleanup_error,
        )

    def _incompleteness(self) -> str:
        """Say of an answer that is called complete what may be missing from it."""
        if not self.skipped:
            return ""
        return f"{self.skipped} events of the upstream could not be read, and are not in the answer"
