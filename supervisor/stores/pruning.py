"""Retention in the database file: which streams go, and removing them without holding up who writes.

What is to go is found on the reading connection, by sums and walks over indexes that have all they need, so that writers
do not notice. It stays true until it is acted upon: an ended stream does not change, and one prune runs at a time. Then
streams are removed in transactions that are bounded by what they touch, and the file is shrunk in steps of as little; the
writer's commits take turns with them.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator, Sequence
from typing import Final

from supervisor.stores.retention import EndedStream, Retention, Totals, select
from supervisor.stores.schema import SEGMENT_BYTES

__all__ = ["can_shrink", "plan", "remove", "shrink"]

PRUNE_SEGMENTS: Final = 256
PRUNE_BYTES: Final = 4 << 20
"""What one transaction of a prune removes at most, so that it never holds up a commit for long."""
VACUUM_PAGES: Final = 256
VACUUM_SLACK: Final = 0.1
"""How much of the file may be free pages, which later writes use, before it is shrunk."""


_OLDEST = "SELECT n, ended_at, nbytes FROM streams WHERE ended_at IS NOT NULL ORDER BY ended_at, id"
_OLDEST_OF_TENANT = (
    "SELECT n, ended_at, nbytes FROM streams WHERE tenant = ? AND ended_at IS NOT NULL ORDER BY ended_at, id"
)


def plan(
    reader: sqlite3.Connection, retention: Retention, now: float, limit: int
) -> tuple[list[tuple[EndedStream, str]], bool]:
    """Return up to `limit` streams that are to go, by their numbers, each with the rule; and whether those are all."""

    def oldest(tenant: str | None) -> Iterator[EndedStream]:
        rows = reader.execute(_OLDEST) if tenant is None else reader.execute(_OLDEST_OF_TENANT, (tenant,))
        return (EndedStream(*row) for row in rows)

    rows = reader.execute(
        "SELECT tenant, count(*), sum(nbytes), min(ended_at) FROM streams WHERE ended_at IS NOT NULL GROUP BY tenant"
    ).fetchall()
    return select(retention, now=now, totals=[Totals(*row) for row in rows], oldest=oldest, limit=limit)


def remove(writer: sqlite3.Connection, numbers: Sequence[int]) -> int:
    """Remove streams, the first ones first, as far as a small transaction goes; return how many are gone entirely.

    To be called within a transaction, and again for the rest. The next one may have lost its oldest events.
    """
    segments, nbytes = PRUNE_SEGMENTS, PRUNE_BYTES
    for done, number in enumerate(numbers):
        last, freed = None, 0
        for seq, size in writer.execute(
            "SELECT last_seq, length(body) FROM segments WHERE stream = ? ORDER BY last_seq", (number,)
        ):
            if segments <= 0 or nbytes <= 0:
                break
            last, segments, nbytes = seq, segments - 1, nbytes - size
            freed += size + SEGMENT_BYTES
        else:
            writer.execute("DELETE FROM segments WHERE stream = ?", (number,))
            writer.execute("DELETE FROM streams WHERE n = ?", (number,))
            segments -= 1  # the stream's own row counts too
            continue
        if last is not None:
            writer.execute("DELETE FROM segments WHERE stream = ? AND last_seq <= ?", (number, last))
            writer.execute(
                "UPDATE streams SET first_seq = ?, nbytes = nbytes - ? WHERE n = ?", (last + 1, freed, number)
            )
        return done
    return len(numbers)


def can_shrink(connection: sqlite3.Connection) -> bool:
    """Return whether the file was made so that it can give free pages back."""
    mode: int = connection.execute("PRAGMA auto_vacuum").fetchone()[0]
    return mode != 0


def shrink(writer: sqlite3.Connection) -> bool:
    """Give some free pages back to the file system; return whether there are more to give."""
    pages: int = writer.execute("PRAGMA page_count").fetchone()[0]
    free: int = writer.execute("PRAGMA freelist_count").fetchone()[0]
    excess = free - int(pages * VACUUM_SLACK)
    if excess <= 0 or not can_shrink(writer):
        return False
    # executescript, since execute() steps a statement without columns once, and a step frees one page
    writer.executescript(f"PRAGMA incremental_vacuum({min(excess, VACUUM_PAGES)})")
    return excess > VACUUM_PAGES
