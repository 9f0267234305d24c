"""Exit codes, and what a stream's outcome is as one."""

from __future__ import annotations

import enum

__all__ = ["EXIT_TABLE", "Exit", "for_kind", "for_outcome"]


class Exit(enum.IntEnum):
    """What the commands exit with."""

    OK = 0
    FAILURE = 1
    USAGE = 2
    UNREACHABLE = 3
    NOT_COMPLETED = 4
    UNKNOWN_STREAM = 5
    REFUSED = 6
    INTERRUPTED = 130


EXIT_TABLE = {
    Exit.OK: "done; of start and watch: the stream completed, or was started with --detach; "
    "replay: every file was read, however its answer ended",
    Exit.FAILURE: "failed: the daemon reported an error, or could not start; demo: an outcome was not as expected",
    Exit.USAGE: "wrong usage or configuration; replay: a file that is not there, or a dialect that is nearly a known one "
    "(any other unknown one is read as generic)",
    Exit.UNREACHABLE: "the daemon cannot be reached, or does not accept the token",
    Exit.NOT_COMPLETED: "the stream ended, but not as completed: failed, cancelled or expired",
    Exit.UNKNOWN_STREAM: "no stream has this id or key",
    Exit.REFUSED: "not now: at the limit of live streams, draining, or the key is claimed",
    Exit.INTERRUPTED: "left by Ctrl-C; start and watch: detached, the stream goes on; serve: aborted by a second SIGINT",
}
"""For `--help` and the documentation."""

_KINDS = {
    "unknown_stream": Exit.UNKNOWN_STREAM,
    "admission": Exit.REFUSED,
    "closed": Exit.REFUSED,
    "key_conflict": Exit.REFUSED,
    "configuration": Exit.USAGE,
    "invalid_params": Exit.USAGE,
}


def for_kind(kind: str) -> Exit:
    """Return the exit code for an error that the daemon answered with."""
    return _KINDS.get(kind, Exit.FAILURE)


def for_outcome(state: str) -> Exit:
    """Return the exit code for a stream that ended in this state."""
    return Exit.OK if state == "completed" else Exit.NOT_COMPLETED
