"""What the daemon writes about itself: stdlib logging, for people or as JSON lines, to standard error or a file.

Two things are added to every record. The stream it is about: whatever logs within a stream's task (also libraries that
know nothing of streams) has its id bound, found from trio's own task tree, so no logger has to be handed around. And
nothing secret: the values of all known credentials are replaced before a line is written, exception texts included. No
code of ours logs one; this is for the day when something else does, such as a provider that repeats the key it refuses.
"""

from __future__ import annotations

import contextlib
import datetime as dt
import logging
import os
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Literal, TextIO

import msgspec
import trio

__all__ = ["ReopeningHandler", "StreamFilter", "logging_to"]

_ROOT = "supervisor"
_TASK = "stream "
_HIDDEN = "(hidden)"
_MIN_SECRET_CHARS = 4
_PLAIN = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "stream", "taskName"}


class StreamFilter(logging.Filter):
    """Binds `record.stream`: the id of the stream in whose task it was logged, or None."""

    def filter(self, record: logging.LogRecord) -> bool:
        """Add the id; keep every record."""
        if not hasattr(record, "stream"):
            record.stream = _current_stream()
        return True


def _current_stream() -> str | None:
    try:
        task: trio.lowlevel.Task | None = trio.lowlevel.current_task()
    except RuntimeError:  # not in trio: a thread, or before the loop has started
        return None
    while task is not None:
        if task.name.startswith(_TASK):  # as the supervisor names them; a test holds the two together
            return task.name[len(_TASK) :]
        nursery = task.parent_nursery
        task = None if nursery is None else nursery.parent_task
    return None


class _Formatter(logging.Formatter):
    def __init__(self, secrets: Iterable[str]) -> None:
        super().__init__()
        chosen = {secret for secret in secrets if len(secret) >= _MIN_SECRET_CHARS}
        self._secrets = sorted(chosen, key=len, reverse=True)

    def format(self, record: logging.LogRecord) -> str:
        line = self.line(record)
        for secret in self._secrets:
            line = line.replace(secret, _HIDDEN)
        return line

    def line(self, record: logging.LogRecord) -> str:
        raise NotImplementedError


class _ConsoleFormatter(_Formatter):
    """`2026-01-02 03:04:05.678 WARNING supervisor.streams 01j… message`."""

    def line(self, record: logging.LogRecord) -> str:
        at = _time(record).strftime("%Y-%m-%d %H:%M:%S.%f")[:-3]
        message = record.getMessage()
        stream = getattr(record, "stream", None)
        about = f" stream={stream}" if stream is not None and stream not in message else ""
        raised = f"\n{self.formatException(record.exc_info)}" if record.exc_info else ""
        return f"{at} {record.levelname} {record.name}:{about} {message}{raised}"


class _JSONFormatter(_Formatter):
    """One JSON object a line: `time, level, logger, message`, `stream` where it is about one, `exception`, extras."""

    def line(self, record: logging.LogRecord) -> str:
        told: dict[str, Any] = {
            "time": _time(record).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        stream = getattr(record, "stream", None)
        if stream is not None:
            told["stream"] = stream
        told |= {name: value for name, value in vars(record).items() if name not in _PLAIN}
        if record.exc_info:
            told["exception"] = self.formatException(record.exc_info)
        return msgspec.json.encode(told, enc_hook=str).decode()


def _time(record: logging.LogRecord) -> dt.datetime:
    return dt.datetime.fromtimestamp(record.created, tz=dt.UTC).astimezone()


class ReopeningHandler(logging.StreamHandler[TextIO]):
    """Writes to a file (mode 0600) that can be rotated: `reopen` goes on in whatever has the name now."""

    def __init__(self, path: Path) -> None:
        """Open the file. Raises OSError."""
        self.path = path
        super().__init__(self._open())

    def _open(self) -> TextIO:
        def private(name: str, flags: int) -> int:
            return os.open(name, flags, 0o600)

        return open(self.path, "a", encoding="utf-8", errors="backslashreplace", opener=private)

    def reopen(self) -> None:
        """Close the file and open the one that now has its name. Raises OSError, and then goes on as before."""
        fresh = self._open()
        old = self.setStream(fresh)
        if old is not None:
            old.close()

    def close(self) -> None:
        """Close the file."""
        self.stream.close()
        super().close()


@contextlib.contextmanager
def logging_to(
    file: Path | None,
    *,
    level: str = "info",
    style: Literal["console", "json"] = "console",
    secrets: Iterable[str] = (),
) -> Iterator[logging.Handler]:
    """Log for the length of a block; gives the handler. Raises OSError if the file cannot be opened.

    Everything below WARNING from other packages is left out, unless `level` is `debug`.
    """
    handler: logging.Handler = logging.StreamHandler(sys.stderr) if file is None else ReopeningHandler(file)
    handler.setFormatter(_JSONFormatter(secrets) if style == "json" else _ConsoleFormatter(secrets))
    handler.addFilter(StreamFilter())
    root, ours = logging.getLogger(), logging.getLogger(_ROOT)
    before = root.level, ours.level
    wanted = logging.getLevelNamesMapping()[level.upper()]
    root.addHandler(handler)
    root.setLevel(wanted if wanted <= logging.DEBUG else max(wanted, logging.WARNING))
    ours.setLevel(wanted)
    logging.captureWarnings(capture=True)
    try:
        yield handler
    finally:
        logging.captureWarnings(capture=False)
        root.setLevel(before[0])
        ours.setLevel(before[1])
        root.removeHandler(handler)
        handler.close()
