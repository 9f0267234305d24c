"""The examples that a dialect is checked with, and how they are read: what the checks of `conformance` share."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from typing import Any, NoReturn

import attrs

from supervisor.dialects import BodyReader, Delta, Dialect, Fault, Fold, Reader, UnparseableError

__all__ = ["ConformanceError", "Examples", "Sink", "decoded", "shown"]


class ConformanceError(AssertionError):
    """A dialect breaks a promise. `check` names the promise, `dialect` is the dialect's name."""

    def __init__(self, dialect: str, check: str, what: str) -> None:
        super().__init__(f"the dialect {dialect!r} fails {check!r}: {what}")
        self.dialect = dialect
        self.check = check


@attrs.define(eq=False)
class Sink:
    """Keeps what a body was read as."""

    fold: Fold = attrs.Factory(Fold)
    events: list[tuple[bytes, str]] = attrs.Factory(list)
    terminal: tuple[bytes, str] | None = None
    state: str = ""
    reason: str = ""
    fault: Fault | None = None
    skipped: str = ""
    """Why the first of the events that could not be read could not."""

    @property
    def sealed(self) -> bool:
        """Whether the ending is decided."""
        return bool(self.state)

    def append(self, payload: bytes, name: str, deltas: tuple[Delta, ...]) -> None:
        """Keep the event, and fold what it means."""
        self.events.append((payload, name or "message"))
        for delta in deltas:
            self.fold.apply(delta)
            if delta.terminal:
                self.terminal = self.events[-1]

    def skip(self, payload: bytes, why: str, name: str = "") -> None:  # noqa: ARG002 - only why counts
        """Keep why the first one could not be read."""
        self.skipped = self.skipped or f"{why}: {shown(payload)}"

    def touch(self) -> None:
        """Nothing: there is no clock."""

    def mark(self, reason: str | None) -> None:
        """Nothing: the body will end."""

    def complete(self, reason: str) -> bool:
        """Seal as completed."""
        return self._seal("completed", reason, None)

    def fail(self, reason: str, fault: Fault) -> bool:
        """Seal as failed."""
        return self._seal("failed", reason, fault)

    def _seal(self, state: str, reason: str, fault: Fault | None) -> bool:
        if self.state:
            return False
        self.state, self.reason, self.fault = state, reason, fault
        return True

    @property
    def ending(self) -> str:
        """The state and its reason."""
        return f"{self.state}({self.reason})"

    def result(self) -> tuple[Any, ...]:
        """Return all that may not depend on how the body came."""
        return self.ending, self.fault, self.fold.snapshot(), self.events, bool(self.skipped)


@attrs.frozen
class Examples:
    """A dialect, the bodies it is checked with, and ways of reading them."""

    dialect: Dialect
    well: list[bytes]
    incomplete: list[bytes]
    errors: list[bytes]
    max_reader_bytes: int

    @property
    def all(self) -> list[bytes]:
        """All bodies."""
        return [*self.well, *self.incomplete, *self.errors]

    def read(self, *pieces: bytes, clean: bool = True) -> Sink:
        """Read a body in these pieces to its end."""
        sink = Sink()
        with self._watched("reading a body"):
            body = BodyReader(self.dialect, sink)
            for piece in pieces:
                body.feed(piece)
            body.end(clean=clean)
        return sink

    def boundaries(self, body: bytes) -> list[int]:
        """Return where each event of a body has been read."""
        ends: list[int] = []
        sink = Sink()
        reader = BodyReader(self.dialect, sink)
        for at in range(len(body)):
            before = reader.events + reader.skipped
            reader.feed(body[at : at + 1])
            if reader.events + reader.skipped != before:
                ends.append(at + 1)
        return ends

    def take(self, reader: Reader, data: bytes, name: str) -> tuple[Delta, ...] | None:
        """Have one event read; None if it cannot be. Whatever else is raised or returned is a failure."""
        with self._watched(f"the event {shown(data)}"):
            try:
                deltas: object = reader.read(data, name)
                ending: object = reader.ending()
            except UnparseableError:
                return None
        if not isinstance(deltas, tuple) or not all(isinstance(delta, Delta) for delta in deltas):
            self.fail(
                "raises nothing else",
                f"`read` returned {shown(repr(deltas).encode())}, not a tuple of Delta",
            )
        if not isinstance(ending, str | None):
            self.fail("raises nothing else", f"`ending` returned {ending!r}, not a str or None")
        return deltas

    @contextlib.contextmanager
    def _watched(self, what: str) -> Iterator[None]:
        try:
            yield
        except (UnparseableError, ConformanceError):
            raise
        except Exception as exc:
            told = f"{type(exc).__name__}: {shown(str(exc).encode('utf-8', 'replace'))}"
            message = f"{what} raised {told}; what cannot be read is an UnparseableError"
            raise ConformanceError(self.dialect.name, "raises nothing else", message) from exc

    def fail(self, check: str, what: str) -> NoReturn:
        """Raise the ConformanceError of a check."""
        raise ConformanceError(self.dialect.name, check, what)


def shown(data: bytes, limit: int = 120) -> str:
    """Return the beginning of some bytes as a message quotes it."""
    text = data.decode("utf-8", "replace")
    return repr(text if len(text) <= limit else f"{text[:limit]}…")


def decoded(data: bytes) -> Any:
    """Return the JSON value, or None if it is not one."""
    try:
        return json.loads(data)
    except (ValueError, RecursionError):
        return None
