"""How things look: tables and colours on a terminal; on a pipe the same columns without colour, width or truncation.

Whatever comes from outside (an upstream's text, a caller's key) is made `visible` before a terminal sees it: an answer may
contain escape sequences. On a pipe text is passed on as it is.
"""

from __future__ import annotations

import datetime as dt
import json
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import IO, Any

import msgspec
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

__all__ = [
    "complain",
    "console",
    "fields_table",
    "print_json",
    "say",
    "show_text",
    "size",
    "spark",
    "streams_table",
    "styled_state",
    "table",
    "told_outcome",
    "visible",
]

_PIPE_COLUMNS = 100_000
_CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")
_BLOCKS = " ▁▂▃▄▅▆▇█"
_COLOURS = {
    "pending": "dim",
    "connecting": "cyan",
    "streaming": "blue",
    "stopping": "yellow",
    "completed": "green",
    "failed": "red",
    "cancelled": "magenta",
    "expired": "yellow",
}


def visible(text: str) -> str:
    """Return a text with its control characters, but for newline and tab, replaced by what they are called."""
    return _CONTROLS.sub(lambda found: f"\\x{ord(found[0]):02x}", text)


def console(*, stderr: bool = False) -> Console:
    """Return a console: on a terminal its width and colours, else neither."""
    file = sys.stderr if stderr else sys.stdout
    terminal = file.isatty()
    return Console(
        file=file,
        highlight=False,
        markup=False,
        emoji=False,
        width=None if terminal else _PIPE_COLUMNS,
        soft_wrap=False,
    )


def say(message: str) -> None:
    """Print a status line to standard error."""
    print(visible(message), file=sys.stderr, flush=True)  # noqa: T201  # for people, beside the output


def complain(message: str) -> None:
    """Print an error to standard error."""
    say(f"stream-supervisor: {message}")


def print_json(value: object) -> None:
    """Print one JSON object on a line, whatever it is made of."""
    print(json.dumps(msgspec.to_builtins(value, enc_hook=str)), flush=True)  # noqa: T201  # the command's output


def show_text(text: str, file: IO[str] | None = None) -> None:
    """Print a piece of an answer at once, as it is on a pipe and visible on a terminal."""
    out = sys.stdout if file is None else file
    out.write(visible(text) if out.isatty() else text)
    out.flush()


# --- tables ----------------------------------------------------------------------------------------------------------


def table(columns: Sequence[str], rows: Iterable[Sequence[object]], *, ids: Sequence[str] = ("id",)) -> Table:
    """Return a table; the columns in `ids` are never cut or folded."""
    made = Table(box=SIMPLE_HEAD, pad_edge=False, header_style="bold")
    for column in columns:
        made.add_column(column, no_wrap=column in ids, overflow="fold")
    for row in rows:
        made.add_row(*(cell if isinstance(cell, Text) else Text(_shown(cell)) for cell in row))
    return made


def fields_table(fields: Mapping[str, object]) -> Table:
    """Return a table of names and values; nested mappings are joined with dots."""
    made = Table(box=None, show_header=False, pad_edge=False)
    made.add_column(no_wrap=True, style="bold")
    made.add_column(overflow="fold")
    for name, value in _flat(fields):
        made.add_row(Text(name), value if isinstance(value, Text) else Text(_shown(value)))
    return made


def streams_table(streams: Iterable[Any], *, after: str | None = None) -> Table:
    """Return the table of streams that `list` and `watch` show; `after` is the id of the next page, if there is one."""
    shown = list(streams)
    tenants = any(stream.tenant for stream in shown)
    made = table(
        (
            *("id", "state", "reason", "upstream", "key", *["tenant"] * tenants),
            *("lasted", "events", "tries", "readers", "labels"),
        ),
        (
            (
                stream.id,
                styled_state(stream.state),
                stream.reason or "",
                stream.upstream or "",
                stream.key or "",
                *[stream.tenant or ""] * tenants,
                duration(stream.age_s),
                stream.events,
                stream.attempts,
                stream.readers,
                " ".join(f"{name}={value}" for name, value in sorted(stream.labels.items())),
            )
            for stream in shown
        ),
    )
    if after is not None:
        made.caption = f"there are more: --before {after}"
    return made


def styled_state(state: str) -> Text:
    """Return a state in its colour."""
    return Text(state, style=_COLOURS.get(state, ""))


def told_outcome(outcome: Mapping[str, Any] | None) -> str:
    """Say in one line how a stream ended."""
    if outcome is None:
        return "has not ended"
    parts = [f"{outcome['state']}({outcome['reason']})"]
    if outcome.get("message"):
        parts.append(f": {outcome['message']}")
    usage = outcome.get("usage")
    if usage:
        quality = outcome.get("usage_quality", "exact")
        known = {"exact": "", "provider_partial": ", or more"}.get(quality, f", {quality}")
        parts.append(f" [{usage.get('input', '?')} tokens in, {usage.get('output', '?')} out{known}]")
    attempts = f"after {outcome.get('attempts', 1)} attempts"
    if outcome.get("attempts", 1) > 1 and attempts not in (outcome.get("message") or ""):
        parts.append(f" {attempts}")
    return "".join(parts)


def duration(seconds: float) -> str:
    """Return a length of time as people write it: `350 ms`, `4.2 s`, `3 m 20 s`, `5 h 3 m`."""
    if seconds < 1:
        return f"{seconds * 1000:.0f} ms"
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(int(seconds), 60)
    return f"{minutes} m {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} m"


def size(nbytes: float) -> str:
    """Return a number of bytes as people write it: `512 B`, `4.2 kB`, `180 MB`."""
    value, units = float(nbytes), iter(("B", "kB", "MB", "GB"))
    unit = next(units)
    while value >= 1000 and (larger := next(units, None)) is not None:
        value, unit = value / 1000, larger
    return f"{value:.0f} {unit}" if unit == "B" or value >= 100 else f"{value:.1f} {unit}"


def spark(values: Sequence[float | None]) -> str:
    """Return a line of blocks as high as the values; a space for 0 and for what is not known."""
    most = max((value for value in values if value), default=0)
    return "".join(
        _BLOCKS[max(1, round(value / most * (len(_BLOCKS) - 1)))] if value else " " for value in values
    )


def moment(at: float | None) -> str:
    """Return a time since the Unix epoch as local time."""
    if at is None:
        return ""
    return dt.datetime.fromtimestamp(at, tz=dt.UTC).astimezone().isoformat(sep=" ", timespec="milliseconds")


def _flat(fields: Mapping[str, object], prefix: str = "") -> Iterable[tuple[str, object]]:
    for name, value in fields.items():
        if isinstance(value, Mapping) and value:
            yield from _flat(value, f"{prefix}{name}.")
        elif isinstance(value, list | tuple) and value and all(isinstance(one, Mapping) for one in value):
            for at, one in enumerate(value):
                yield from _flat(one, f"{prefix}{name}[{at}].")
        else:
            yield f"{prefix}{name}", value


def _shown(value: object) -> str:
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.3f}".rstrip("0").rstrip(".")
    if isinstance(value, list | tuple):
        return ", ".join(map(str, value)) or "-"
    if isinstance(value, Mapping):
        return "-"
    return visible(str(value))
