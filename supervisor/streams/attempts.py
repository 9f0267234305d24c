"""The `attempt` event: what the journal says of each connection, and what a fold of the journal makes of it.

An answer may take several attempts. What an attempt does to what was received before it is its *rung*, on the ladder that is
climbed when an attempt has died:

| rung | what was received before | the reader |
|---|---|---|
| (the first) | nothing | new |
| `retry` | nothing: the attempts before it got no event | new |
| `sequence` | is the beginning of the same response; this attempt sends the rest | goes on |
| `continuation` | is kept; with this attempt's first event its text is joined (`dropped` characters of white space are not kept) | new |
| `restart`, `fallback` | stands until this attempt's first event; then it is withdrawn | new |

What is withdrawn is told by an event of its own, `withdrawn`, which begins a new epoch. So an answer is only given up once there
is another in its place: attempts that come to nothing leave what was received before them as it was.

The live fold and every later reading of the journal go by these two records, and by nothing else.
"""

from __future__ import annotations

from typing import Literal

import msgspec

from supervisor.dialects import Dialect, Fold, UnparseableError
from supervisor.stores.base import Event

__all__ = ["AttemptRecord", "Refold", "Rung", "Texts", "Withdrawal", "climb", "decode_attempt"]

Rung = Literal["retry", "sequence", "continuation", "restart", "fallback"]


class AttemptRecord(msgspec.Struct, frozen=True, omit_defaults=True):
    """What of an `attempt` event decides how the journal is read. The event's payload may say more."""

    attempt: int
    rung: str | None = None
    dropped: int = 0
    """With `continuation`: how many characters at the end of the text are not kept."""


class Withdrawal(msgspec.Struct, frozen=True):
    """The payload of a `withdrawn` event: which part of the journal is no longer part of the answer."""

    attempt: int
    """The attempt whose first event follows."""
    first: int
    """The first seq that is withdrawn."""
    last: int


_DECODER = msgspec.json.Decoder(AttemptRecord)


def decode_attempt(payload: bytes) -> AttemptRecord:
    """Read the payload of an `attempt` event."""
    return _DECODER.decode(payload)


def climb(fold: Fold, record: AttemptRecord | Withdrawal) -> None:
    """Do to a fold what an attempt does to what was received before it."""
    if isinstance(record, Withdrawal):
        fold.reset()
    elif record.rung == "continuation":
        fold.go_on(dropped=record.dropped)


class Refold:
    """Folds a journal that is read back, event by event and in order from the first."""

    __slots__ = ("_dialect", "_joins", "_reader", "fold")

    def __init__(self, dialect: Dialect) -> None:
        self._dialect = dialect
        self._reader = dialect.reader()
        self._joins: AttemptRecord | None = None
        self.fold = Fold()

    def apply(self, event: Event) -> None:
        """Take one event. Raises UnparseableError for one that it cannot read."""
        if event.kind == "attempt":
            record = decode_attempt(event.payload)
            self._joins = record if record.rung == "continuation" else None
            if record.rung != "sequence":
                self._reader = self._dialect.reader()
        elif event.kind == "withdrawn":
            self.fold.reset()
        elif event.kind == "data":
            if self._joins is not None:
                climb(self.fold, self._joins)
                self._joins = None
            for delta in self._reader.read(event.payload, event.name or "message"):
                self.fold.apply(delta)


class Texts:
    """Tells again the text that each event of a journal had when it was new: what it adds to choice 0.

    `whole`: the first event given is the first of the journal. If it is not, `doubtful` says whether an event came whose
    text depends on those before.
    """

    __slots__ = ("_dialect", "_reader", "_whole", "doubtful")

    def __init__(self, dialect: Dialect, *, whole: bool) -> None:
        self._dialect = dialect
        self._reader = dialect.reader()
        self._whole = whole
        self.doubtful = False

    def of(self, event: Event) -> str:
        """Return the text of one event."""
        if event.kind == "attempt" and decode_attempt(event.payload).rung != "sequence":
            self._reader = self._dialect.reader()
            self._whole = True
        if event.kind != "data":
            return event.text
        try:
            deltas = self._reader.read(event.payload, event.name or "message")
        except UnparseableError:  # it could be read once, after events that are not here
            return event.text
        if event.text:
            return event.text
        if not self._whole and any(delta.restated for delta in deltas):
            self.doubtful = True
        return "".join([delta.text for delta in deltas if not delta.choice])
