"""What is done to a store's file without running the store: synchronous, for the command line."""

from __future__ import annotations

import contextlib
import sys
import time
from pathlib import Path

from supervisor.errors import StoreError
from supervisor.stores.database import Database
from supervisor.stores.retention import PruneReport, Retention

__all__ = ["prune_file"]

_BUSY_TIMEOUT_S = 5.0


def prune_file(
    path: Path, retention: Retention, *, dry_run: bool = False, now: float | None = None
) -> PruneReport:
    """Remove from the file at `path` what is more than `retention` keeps, and shrink it; with `dry_run` only tell.

    Takes the lock of a store that runs, or is told who has it: StoreLockedError. A dry run takes none and changes nothing, so
    that it can be made beside a daemon. Raises StoreError, also where there is no such file.
    """
    if not path.is_file():
        raise StoreError(
            f"{path}: there is no such file, and so nothing to remove; a store in memory is its daemon's alone"
        )
    now = time.time() if now is None else now
    database = Database(path, "NORMAL", _BUSY_TIMEOUT_S)
    with contextlib.ExitStack() as stack:
        stack.callback(database.close_writer)
        stack.callback(database.close_reader)
        if dry_run:
            database.open_to_read()
        else:
            database.open()
        chosen, complete = database.plan(retention, now, sys.maxsize)
        if not dry_run:
            left = [int(ended.ref) for ended, _ in chosen]
            while left:
                del left[: database.remove(left)]
            while (garbage := database.garbage()).streams or garbage.segments:
                while database.collect(garbage):
                    pass
            while database.shrink():
                pass
    return PruneReport.of(chosen, complete=complete)
