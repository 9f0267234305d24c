"""Retention in the database file: which streams go, and removing them without holding up who writes.

What is to go is found on the reading connection, by sums and walks over indexes that have all they need, so that writers
do not notice. It stays true until it is acted upon: an ended stream does not change, and one prune runs at a time. Then a
stream goes at once and as a whole: its row is deleted, and its number noted in `removed`. The segments that numbers in
`removed` have left are garbage, and are deleted in the order of the file: streams that were written side by side lie in the
same pages, and stream by stream each page would be written as often as it has streams (measured: four times the time). All
of this, and shrinking the file, is done in transactions that are bounded by what they touch, and the writer's commits take turns
with them. What a crash or a cancel leaves undone is garbage still, for the next prune.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator, Sequence
from typing import Final

import attrs

from supervisor.stores.retention import EndedStream, Retention, Totals, select

__all__ = ["Garbage", "can_shrink", "collect", "garbage", "plan", "remove", "shrink"]

PRUNE_STREAMS: Final = 64
PRUNE_SEGMENTS: Final = 512
PRUNE_BYTES: Final = 4 << 20
"""What one transaction of a prune removes at most, so that it never holds up a commit for long."""
LOOK_SEGMENTS: Final = 8192
"""How much garbage is looked for at a time."""
VACUUM_PAGES: Final = 256
VACUUM_SLACK: Final = 0.1
"""How much of the file may be free pages, which later writes use, before it is shrunk."""


@attrs.define
class Garbage:
    """Segments of streams that are gone, with their sizes, and those streams that have no others."""

    segments: list[tuple[int, int]] = attrs.field(factory=list)
    streams: list[int] = attrs.field(factory=list)


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
    """Remove streams, the first ones first, as many as a small transaction takes; return how many. Within a transaction.

    They are gone from then on; their events are left to `collect`.
    """
    some = [(number,) for number in numbers[:PRUNE_STREAMS]]
    writer.executemany("INSERT OR IGNORE INTO removed SELECT n FROM streams WHERE n = ?", some)
    writer.executemany("DELETE FROM streams WHERE n = ?", some)
    return len(some)


def garbage(reader: sqlite3.Connection) -> Garbage:
    """Return some of what streams that are gone have left behind, in the order of the file; nothing if nothing is left."""
    found = Garbage()
    for (stream,) in reader.execute("SELECT stream FROM removed ORDER BY stream"):
        found.segments += reader.execute(
            "SELECT n, length(body) FROM segments WHERE stream = ? ORDER BY last_seq LIMIT ?",
            (stream, LOOK_SEGMENTS - len(found.segments)),
        )
        if len(found.segments) >= LOOK_SEGMENTS:
            break
        found.streams.append(stream)
    found.segments.sort()
    return found


def collect(writer: sqlite3.Connection, left: Garbage) -> int:
    """Delete the first segments of some garbage, as many as a small transaction takes; return how many. Within a transaction."""
    count, nbytes = 0, PRUNE_BYTES
    for _, size in left.segments[:PRUNE_SEGMENTS]:
        if nbytes <= 0:
            break
        nbytes -= size
        count += 1
    writer.executemany("DELETE FROM segments WHERE n = ?", [(n,) for n, _ in left.segments[:count]])
    if count == len(left.segments):
        writer.executemany("DELETE FROM removed WHERE stream = ?", [(stream,) for stream in left.streams])
    return count


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
