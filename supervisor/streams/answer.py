"""A stream's answer as it is held in memory: the fold of what was received, and what of it may be shown.

With `delivery="durable"` a second fold follows what is durable, and that is what a snapshot shows; in between the deltas wait. Else
the two are one fold. Either lets go of its text where it has become long (`Limits.fold_bytes`), or where memory is short: then the
answer is folded again from the journal by whoever asks for it.
"""

from __future__ import annotations

from collections import deque

import trio

from supervisor.dialects import Delta, Dialect, Fold, Snapshot
from supervisor.streams.attempts import AttemptRecord, Refold, Withdrawal, climb
from supervisor.streams.journal import Cursor, Journal

__all__ = ["UNDURABLE_BYTES", "Answer", "read_back"]

UNDURABLE_BYTES = 160
"""What one event's deltas are accounted as, while they wait to be durable."""
_SHORT_BYTES = 4 << 10  # an answer of this length is not worth a read of the store when somebody asks for it
_PAGE = 256  # events folded between two checkpoints


class Answer:
    """The folds of one stream. The source folds what it receives into `fold`, and has it wait in `undurable`."""

    __slots__ = ("fold", "shown", "undurable")

    def __init__(self, *, durable_delivery: bool) -> None:
        self.fold = Fold()
        """Everything received."""
        self.shown = Fold() if durable_delivery else self.fold
        """What a snapshot shows."""
        self.undurable: deque[tuple[int, tuple[Delta, ...] | AttemptRecord | Withdrawal]] | None = (
            deque() if durable_delivery else None
        )
        """What is not in `shown` yet, each with the seq whose durability it waits for."""

    def __repr__(self) -> str:
        return f"<Answer of {self.fold.nbytes} bytes{', spilled' if self.fold.spilled else ''}>"

    def show(self, durable_seq: int) -> None:
        """Fold what has become durable into what a snapshot shows."""
        waiting = self.undurable
        while waiting and waiting[0][0] <= durable_seq:
            told = waiting.popleft()[1]
            if isinstance(told, AttemptRecord | Withdrawal):
                climb(self.shown, told)
            else:
                for delta in told:
                    self.shown.apply(delta)

    def show_all(self) -> None:
        """Show what was received: its outcome, and so all of it, is durable."""
        self.undurable = None
        self.shown = self.fold

    def spill(self) -> None:
        """Let go of the text."""
        self.fold.spill()
        self.shown.spill()

    @property
    def spillable_bytes(self) -> int:
        """How much `spill_unless_short` would let go of."""
        return sum(fold.spillable_bytes for fold in self._long_folds())

    def spill_unless_short(self) -> None:
        """Let go of the text, where that is worth it."""
        for fold in self._long_folds():
            fold.spill()

    def _long_folds(self) -> set[Fold]:
        return {fold for fold in (self.fold, self.shown) if fold.spillable_bytes > _SHORT_BYTES}


async def read_back(journal: Journal, dialect: Dialect) -> Snapshot:
    """Fold a journal again, from the first event to the last that may be seen. Raises GapError if part of it is gone."""
    refold = Refold(dialect)
    cursor, last = Cursor(1, 0), journal.visible_seq
    while cursor.seq < last:
        events = journal.take(cursor.seq, _PAGE)
        if not events:
            events = await journal.fetch(cursor, _PAGE, texts=False)
        for event in events:
            refold.apply(event)
            cursor = Cursor(event.epoch, event.seq)
        await trio.lowlevel.checkpoint()
    return refold.fold.snapshot(epoch=cursor.epoch, seq=cursor.seq)
