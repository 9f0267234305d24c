"""Who is told what becomes of streams: for figures, spans and the like.

An observer is told a few times in a stream's life, and never of an event: once it is started, for each attempt, when its answer
begins, and when it has ended and that is durable (law 3 holds for figures too). It is called synchronously in the steps that
decide these things, so it must be quick and must not wait. What it raises is logged, and is no stream's trouble.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from supervisor.streams.lifecycle import Outcome
    from supervisor.streams.stream import Stream

__all__ = ["Observer", "Observers"]

_log = logging.getLogger("supervisor.streams")


class Observer(Protocol):
    """What `Supervisor.observe` takes."""

    def started(self, stream: Stream) -> None:
        """Take note of a new stream, in the task of whoever started it."""

    def attempted(self, stream: Stream, record: Mapping[str, Any]) -> None:
        """Take note of an attempt; `record` is what the journal says of it."""

    def began(self, stream: Stream) -> None:
        """Take note of a stream's first event. Once, however many attempts it takes."""

    def ended(self, stream: Stream, outcome: Outcome | None) -> None:
        """Take note of an ending, once it is durable; None: it could not be recorded, and never will be."""


class Observers:
    """The observers of one supervisor."""

    __slots__ = ("_all",)

    def __init__(self) -> None:
        self._all: tuple[Observer, ...] = ()

    def __repr__(self) -> str:
        return f"<Observers: {len(self._all)}>"

    def __bool__(self) -> bool:
        return bool(self._all)

    def add(self, observer: Observer) -> Callable[[], None]:
        """Tell an observer from now on; return what ends that."""
        self._all += (observer,)

        def remove() -> None:
            self._all = tuple(one for one in self._all if one is not observer)

        return remove

    def started(self, stream: Stream) -> None:
        """Tell them of a start."""
        for observer in self._all:
            try:
                observer.started(stream)
            except Exception:  # noqa: BLE001  # the observer's own trouble, here and below
                self._raised(observer, stream)

    def attempted(self, stream: Stream, record: Mapping[str, Any]) -> None:
        """Tell them of an attempt."""
        for observer in self._all:
            try:
                observer.attempted(stream, record)
            except Exception:  # noqa: BLE001
                self._raised(observer, stream)

    def began(self, stream: Stream) -> None:
        """Tell them of a first event."""
        for observer in self._all:
            try:
                observer.began(stream)
            except Exception:  # noqa: BLE001
                self._raised(observer, stream)

    def ended(self, stream: Stream, outcome: Outcome | None) -> None:
        """Tell them of an ending."""
        for observer in self._all:
            try:
                observer.ended(stream, outcome)
            except Exception:  # noqa: BLE001
                self._raised(observer, stream)

    def _raised(self, observer: Observer, stream: Stream) -> None:
        _log.exception("stream %s: the observer %r raised", stream.id, observer)
