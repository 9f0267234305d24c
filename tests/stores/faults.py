"""Connections that fail as told, for what a disk does to a store."""

from __future__ import annotations

import sqlite3
import threading
from typing import TYPE_CHECKING

import attrs

from supervisor.stores.database import Database

if TYPE_CHECKING:
    from collections.abc import Callable

    import pytest


@attrs.define
class Faults:
    """What the writing connections do: `before` and `after` see each statement, and may raise in its place."""

    before: Callable[[str], None] = lambda _: None
    after: Callable[[str], None] = lambda _: None
    rewrite: dict[str, str] = attrs.field(factory=dict)
    """Statements to run others in the place of."""
    connections: int = 0
    writes: threading.Event = attrs.field(factory=threading.Event)
    """While it is not set, a BEGIN waits."""


class _Connection:
    def __init__(self, real: sqlite3.Connection, faults: Faults) -> None:
        self._real = real
        self._faults = faults

    def __getattr__(self, name):
        return getattr(self._real, name)

    def execute(self, statement, *args):
        if statement.startswith("BEGIN"):
            self._faults.writes.wait(10)
        self._faults.before(statement)
        result = self._real.execute(self._faults.rewrite.get(statement, statement), *args)
        self._faults.after(statement)
        return result


def install(monkeypatch: pytest.MonkeyPatch) -> Faults:
    """Make every writing connection that is opened from now on go through the faults."""
    faults = Faults()
    faults.writes.set()
    connect = Database._connect

    def faulty(self, *, reader=False):
        real = connect(self, reader=reader)
        if reader:
            return real
        faults.connections += 1
        return _Connection(real, faults)

    monkeypatch.setattr(Database, "_connect", faulty)
    return faults


def failing(word: str, times: int, code: int = sqlite3.SQLITE_IOERR) -> Callable[[str], None]:
    """Return a fault that fails the next `times` statements that begin with `word`, as SQLite would."""
    left = [times]

    def fault(statement: str) -> None:
        if statement.startswith(word) and left[0]:
            left[0] -= 1
            error = sqlite3.OperationalError(f"simulated: {word} failed")
            error.sqlite_errorcode = code
            raise error

    return fault
