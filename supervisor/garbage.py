"""When the garbage collector looks at everything: never while many streams are live, unless memory goes astray.

CPython frees almost everything by counting references; its collector is for the cycles. A full collection looks at every
object of the process, and stops all streams for as long as that takes: 0.2 ms a live stream, so that ten thousand stand still for
two seconds whenever the collector happens to think it is time. And it finds nothing, for neither a live stream nor an ended one is in
a cycle. In a process of our own we know better than the collector when a full collection is due:

- The young generations are collected as ever; they are small.
- Once in `every_s` what has survived them is *frozen* (`gc.freeze`, which takes no time): set aside, to be freed by its
  reference counts as before, and not looked at again.
- Everything is looked at, once it has been thawed, when nobody would notice (for `IDLE_S` no stream was live, and some were before), when the process has come to
  hold more than its streams account for, or when its memory is short. At most once in `LEAST_S`.

This is the daemon's. A program that embeds the supervisor has a collector of its own to decide on; it may run `tend` beside its
streams if the process is theirs. Source: https://docs.python.org/3/library/gc.html#gc.freeze.
"""

from __future__ import annotations

import gc
import logging
import sys
from typing import Final

import attrs
import trio

from supervisor.streams import Supervisor, SupervisorStatistics

__all__ = ["tend"]

LEAST_S: Final = 60.0
"""Between two full collections."""
IDLE_S: Final = 10.0
"""For how long no stream was live when nobody is taken to notice one."""
STREAM_BLOCKS: Final = 1000
"""How many blocks of memory a stream takes beside its events: its objects, its task, its connection. Generous."""
BLOCK_BYTES: Final = 48
"""What a block holds of the bytes accounted for, at least."""
STRAY_BLOCKS: Final = 500_000
STRAY_SHARE: Final = 0.25
"""By how many blocks that nothing accounts for it has to have grown: some 40 MB, and a quarter."""

_NEVER: Final = 2_000_000_000
_log = logging.getLogger("supervisor.garbage")


async def tend(supervisor: Supervisor, *, every_s: float = 1.0) -> None:
    """Decide for the garbage collector of this process, until cancelled; then it is as it was."""
    before = gc.get_threshold()
    gc.set_threshold(before[0], before[1], _NEVER)
    gc.collect()
    gc.freeze()
    due = _Due(supervisor.statistics(), trio.current_time())
    try:
        while True:
            await trio.sleep(every_s)
            now = trio.current_time()
            why = due.why(supervisor.statistics(), now)
            if why is None:
                gc.collect(1)
            else:
                gc.unfreeze()
                found = gc.collect()
                took_s = trio.current_time() - now
                _log.debug("a full garbage collection, as %s: %d objects, %.0f ms", why, found, 1e3 * took_s)
                due.done(supervisor.statistics(), trio.current_time())
            gc.freeze()
    finally:
        gc.unfreeze()
        gc.set_threshold(*before)


@attrs.define
class _Due:
    """Whether everything is to be looked at."""

    _figures: SupervisorStatistics
    _at: float
    _stray: float = attrs.field(init=False)
    _started: int = attrs.field(init=False)
    _busy_at: float = attrs.field(init=False)

    def __attrs_post_init__(self) -> None:
        self.done(self._figures, self._at)

    def done(self, figures: SupervisorStatistics, now: float) -> None:
        """Learn that it has just been done."""
        self._at = self._busy_at = now
        self._stray, self._started = _stray(figures), figures.started

    def why(self, figures: SupervisorStatistics, now: float) -> str | None:
        """Return why it is to be done now; None if it is not."""
        if figures.tasks:
            self._busy_at = now
        if now - self._at < LEAST_S:
            return None
        if now - self._busy_at >= IDLE_S and figures.started > self._started:
            return "no stream is live"
        if figures.memory.pressure:
            return "the process's memory is short"
        if _stray(figures) > self._stray + max(STRAY_BLOCKS, STRAY_SHARE * self._stray):
            return "nothing accounts for some of the process's memory"
        return None


def _stray(figures: SupervisorStatistics) -> float:
    """Return how many blocks of memory the interpreter has given out that nothing accounts for; none, rather than fewer."""
    streams = figures.tasks + figures.finished_in_memory
    accounted = (
        STREAM_BLOCKS * streams + (figures.memory.total_bytes + figures.store.held_bytes) / BLOCK_BYTES
    )
    return max(0.0, sys.getallocatedblocks() - accounted)
