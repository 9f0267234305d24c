"""How much memory the process has, how much it may have, and whether that is too little.

What it has is its resident memory (RSS, https://man7.org/linux/man-pages/man5/proc_pid_statm.5.html). What it may have is the
tightest limit of its control group and those above it, version 2 (https://docs.kernel.org/admin-guide/cgroup-v2.html, `memory.max`)
or 1 (`memory.limit_in_bytes`), and never more than the machine's memory. On systems other than Linux neither is known, and there is
no pressure.

**Hysteresis.** Pressure begins at a high mark and ends at a low one. Between the two it stays what it was, so that a process at the
mark does not begin and end it again and again.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

__all__ = ["Pressure", "memory_limit", "resident_bytes"]

_STATM = "/proc/self/statm"
_UNLIMITED = 1 << 60  # version 1 has a limit of nearly 2^63 where there is none


def resident_bytes() -> int | None:
    """Return the process's resident memory now; None where that is not known."""
    try:
        with open(_STATM, "rb") as file:  # noqa: PTH123  # once a second, and not a place that anybody moves
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError, IndexError):
        return None


def memory_limit(root: Path = Path("/")) -> int | None:
    """Return how much memory the process may have; None where that is not known. `root` is where /proc and /sys are."""
    if not sys.platform.startswith("linux"):
        return None
    limits = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    try:
        lines = (root / "proc/self/cgroup").read_text("utf-8").splitlines()
    except (OSError, UnicodeError):
        lines = []
    for line in lines:
        _, controllers, path = [*line.split(":", 2), "", ""][:3]
        if not controllers:
            base, name = root / "sys/fs/cgroup", "memory.max"
        elif "memory" in controllers.split(","):
            base, name = root / "sys/fs/cgroup/memory", "memory.limit_in_bytes"
        else:
            continue
        group = base / path.lstrip("/")
        for directory in (group, *group.parents):
            limits += _limit(directory / name)
            if directory == base:
                break
    return min(limits)


def _limit(file: Path) -> list[int]:
    try:
        value = int(file.read_text("ascii"))
    except (OSError, ValueError):  # there is no such file, or it says "max"
        return []
    return [value] if 0 < value < _UNLIMITED else []


class Pressure:
    """Whether memory is short, with hysteresis. `high` and `low` are shares of `limit`; None turns it off."""

    __slots__ = ("high_bytes", "limit_bytes", "low_bytes", "on", "since", "used_bytes")

    def __init__(self, *, high: float | None, low: float, limit: int | None) -> None:
        self.limit_bytes = limit
        self.high_bytes = None if high is None or limit is None else int(high * limit)
        self.low_bytes = 0 if limit is None else int(low * limit)
        self.used_bytes: int | None = None
        """As of the last `update`."""
        self.on = False
        self.since = 0.0
        """When it began."""

    def __repr__(self) -> str:
        return f"<Pressure {'on' if self.on else 'off'}: {self.used_bytes} of {self.high_bytes} bytes>"

    def update(self, used: int | None, now: float) -> None:
        """Take note of the process's memory."""
        self.used_bytes = used
        if used is None or self.high_bytes is None:
            self.on = False
        elif used >= self.high_bytes and not self.on:
            self.on, self.since = True, now
        elif used < self.low_bytes:
            self.on = False

    @property
    def excess_bytes(self) -> int:
        """How much must go for it to end; 0 while it is off."""
        return max(0, self.used_bytes - self.low_bytes + 1) if self.on and self.used_bytes is not None else 0
