"""What the daemon writes about itself: stdlib logging and structlog, for people or as JSON lines, to standard error or a file.

Two things are added to every record. The stream it is about: whatever logs within a stream's task (also libraries that
know nothing of streams) has its id bound, found from trio's own task tree, so no logger has to be handed around. And
nothing secret: the values of all known credentials are replaced before a line is written, exception texts included. No
code of ours logs one; this is for the day when something else does, such as a provider that repeats the key it refuses.

Records of either kind, `logging.getLogger` and `structlog.get_logger`, go the same way through structlog's processors, with what was
bound to them or to the context (`structlog.contextvars`) and what was given as `extra`. A line for people is one line, whatever
an upstream says: what would begin another, or move a terminal's cursor, is written as what it is called.
"""

from __future__ import annotations

import contextlib
import datetime as dt
import logging
import os
import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Literal, TextIO

import msgspec
import structlog
import trio
from structlog.typing import EventDict, Processor

__all__ = ["ReopeningHandler", "StreamFilter", "logging_to"]

_ROOT = "supervisor"
_TASK = "stream "
_HIDDEN = "(hidden)"
_MIN_SECRET_CHARS = 4
_CONTROLS = re.compile(r"[\x00-\x08\x0a-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069]")


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


# --- from a record to a line -----------------------------------------------------------------------------------------


class _Formatter(structlog.stdlib.ProcessorFormatter):
    """Renders records of both kinds, and replaces what is secret in what came of it."""

    def __init__(self, secrets: Iterable[str], rendering: Sequence[Processor]) -> None:
        super().__init__(
            foreign_pre_chain=[structlog.contextvars.merge_contextvars],
            processors=[_described, structlog.stdlib.ProcessorFormatter.remove_processors_meta, *rendering],
        )
        chosen = {secret for secret in secrets if len(secret) >= _MIN_SECRET_CHARS}
        self._secrets = sorted(chosen, key=len, reverse=True)

    def format(self, record: logging.LogRecord) -> str:
        line = super().format(record)
        for secret in self._secrets:
            line = line.replace(secret, _HIDDEN)
        return line


def _described(logger: object, name: str, event: EventDict) -> EventDict:
    """Put what every record has before what this one says: `time, level, logger, message`, and `stream` where it is about one."""
    del logger, name
    record: logging.LogRecord = event["_record"]
    told: EventDict = {
        "time": dt.datetime.fromtimestamp(record.created, tz=dt.UTC).astimezone(),
        "level": record.levelname.lower(),
        "logger": record.name,
        "message": event.pop("event"),
    }
    stream = event.get("stream") or getattr(record, "stream", None)
    if stream is not None:
        told["stream"] = stream
    _EXTRA(logging.root, "", event)
    for known in (*told, "stream", "taskName", "_logger", "_name"):
        event.pop(known, None)
    return {**told, **event}


_EXTRA = structlog.stdlib.ExtraAdder()


def _as_json() -> Sequence[Processor]:
    """One JSON object a line, an exception's text in `exception`."""

    def render(logger: object, name: str, event: EventDict) -> str:
        del logger, name
        event["time"] = event["time"].isoformat(timespec="milliseconds")
        return msgspec.json.encode(event, enc_hook=str).decode()

    return [structlog.processors.format_exc_info, render]


def _for_people(*, colours: bool) -> Sequence[Processor]:
    """`2026-01-02 03:04:05.678 WARNING supervisor.streams: stream=01j… message name=value`, an exception's text below."""
    dim, bold, reset = (_DIM, _BOLD, _RESET) if colours else ("", "", "")

    def column(key: str, style: str = "", *, named: bool = False, after: str = "") -> structlog.dev.Column:
        formatter = structlog.dev.KeyValueColumnFormatter(
            dim if named else None, style, reset, _one_line, postfix=after
        )
        return structlog.dev.Column(key, formatter)

    def level(key: str, value: object) -> str:
        del key
        return f"{_LEVELS.get(str(value), '') if colours else ''}{str(value).upper()}{reset}"

    def people(logger: object, name: str, event: EventDict) -> EventDict:
        del logger, name
        event["time"] = event["time"].strftime("%Y-%m-%d %H:%M:%S.%f")[:-3]
        if event.get("stream") is not None and str(event["stream"]) in str(event["message"]):
            del event["stream"]
        return event

    columns = [
        column("time", dim),
        structlog.dev.Column("level", level),
        column("logger", dim, after=":"),
        column("stream", named=True),
        column("message", bold),
        column("", named=True),  # of all that have none
    ]
    renderer = structlog.dev.ConsoleRenderer(
        columns=columns, exception_formatter=structlog.dev.plain_traceback, sort_keys=False
    )
    return [people, renderer]


_DIM, _BOLD, _RESET = "\x1b[2m", "\x1b[1m", "\x1b[0m"
_LEVELS = {"warning": "\x1b[33m", "error": "\x1b[31m", "critical": "\x1b[31;1m"}


def _one_line(value: object) -> str:
    return _CONTROLS.sub(lambda found: found[0].encode("unicode_escape").decode(), str(value))


# --- where to --------------------------------------------------------------------------------------------------------


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
    colours = file is None and sys.stderr.isatty() and not os.environ.get("NO_COLOR")
    handler.setFormatter(_Formatter(secrets, _as_json() if style == "json" else _for_people(colours=colours)))
    handler.addFilter(StreamFilter())
    root, ours = logging.getLogger(), logging.getLogger(_ROOT)
    before = root.level, ours.level
    wanted = logging.getLevelNamesMapping()[level.upper()]
    root.addHandler(handler)
    root.setLevel(wanted if wanted <= logging.DEBUG else max(wanted, logging.WARNING))
    ours.setLevel(wanted)
    logging.captureWarnings(capture=True)
    try:
        with _structlog_goes_there():
            yield handler
    finally:
        logging.captureWarnings(capture=False)
        root.setLevel(before[0])
        ours.setLevel(before[1])
        root.removeHandler(handler)
        handler.close()


@contextlib.contextmanager
def _structlog_goes_there() -> Iterator[None]:
    """Have structlog's own loggers write to stdlib's for the length of a block, unless the program has configured them itself."""
    if structlog.is_configured():
        yield
        return
    structlog.configure(
        processors=[
            structlog.contextvars.merge_contextvars,
            structlog.stdlib.PositionalArgumentsFormatter(),
            structlog.stdlib.ProcessorFormatter.wrap_for_formatter,
        ],
        logger_factory=structlog.stdlib.LoggerFactory(),
        wrapper_class=structlog.stdlib.BoundLogger,
    )
    try:
        yield
    finally:
        structlog.reset_defaults()
