"""`top`: streams and figures on the whole terminal, live.

What is shown is in `Screen`, which knows neither terminal nor daemon: it is given what the daemon tells and the keys that are pressed, and says
what is to be done and how it looks. Around it are two tasks: one asks the daemon, again and again, and one reads keys. A
connection that is lost is made again; meanwhile the screen stays, and says so.
"""

from __future__ import annotations

import argparse
import contextlib
import math
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import attrs
import trio
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from supervisor.cli.connecting import as_client
from supervisor.cli.exits import Exit
from supervisor.cli.render import complain, console, duration, size, spark, styled_state, visible
from supervisor.control import ControlClient, StreamMessage
from supervisor.errors import ControlClosedError, ControlError
from supervisor.observe import Overview

__all__ = ["Screen", "keys_in", "top"]

_MOST = 500
_LATE_S = 3.0
_NEVER_AGAIN = 4500  # close codes from here on say that the same would happen again
_KEYS = {
    b"\x1b[A": "up",
    b"\x1bOA": "up",
    b"k": "up",
    b"\x1b[B": "down",
    b"\x1bOB": "down",
    b"j": "down",
    b"\x1b[5~": "page up",
    b"\x1b[6~": "page down",
    b"\x1b[H": "first",
    b"\x1b[F": "last",
}
_LONGEST_KEY = max(map(len, _KEYS))


@attrs.frozen
class _Row:
    """A stream as it is shown."""

    stream: StreamMessage
    rate: float
    """Events a second, since it was last looked at."""


_SORTS: Mapping[str, Callable[[_Row], Any]] = {
    "newest": lambda row: row.stream.age_s,
    "events/s": lambda row: -row.rate,
    "bytes": lambda row: -(row.stream.journal_bytes or 0),
    "idle": lambda row: -(row.stream.idle_s or 0.0),
}


def keys_in(data: bytes) -> Iterator[str]:
    """Give the keys in what a terminal has sent: the names of `_KEYS`, or the character itself."""
    while data:
        for length in range(min(_LONGEST_KEY, len(data)), 0, -1):
            if data[:length] in _KEYS:
                yield _KEYS[data[:length]]
                data = data[length:]
                break
        else:
            yield data[:1].decode("latin-1")
            data = data[1:]


class Screen:
    """What is shown, and what a key does."""

    def __init__(self) -> None:
        self.sort = "newest"
        self.chosen: str | None = None
        """The id of the stream under the cursor."""
        self.asking: str | None = None
        """The id of the stream that is to be cancelled, until that is confirmed."""
        self.message = ""
        self._overview: Overview | None = None
        self._rows: list[_Row] = []
        self._more = False
        self._seen: dict[str, tuple[float, int]] = {}
        self._told_at = -math.inf
        self._page = 1

    def __repr__(self) -> str:
        return f"<Screen of {len(self._rows)} streams, at {self.chosen}>"

    # --- what comes in -----------------------------------------------------------------------------------------------

    def tell(self, overview: Overview, streams: Sequence[StreamMessage], *, more: bool, now: float) -> None:
        """Take what the daemon says; `more`: there are more live streams than these."""
        seen = {}
        rows = []
        for stream in streams:
            at, events = self._seen.get(stream.id, (now - max(stream.age_s, 1e-3), 0))
            rows.append(_Row(stream, max(0, stream.events - events) / max(now - at, 1e-3)))
            seen[stream.id] = (now, stream.events)
        self._overview, self._rows, self._more = overview, rows, more
        self._seen, self._told_at = seen, now
        self._order()

    def press(self, key: str) -> str | None:
        """Do what a key says; return `quit`, or the id of a stream to cancel, or None."""
        if self.asking is not None:
            asked, self.asking = self.asking, None
            self.message = f"cancelling {asked} …" if key in {"y", "Y"} else "not cancelled"
            return asked if key in {"y", "Y"} else None
        self.message = ""
        steps = {"up": -1, "down": 1, "page up": -self._page, "page down": self._page}
        steps |= {"first": -len(self._rows), "last": len(self._rows)}
        if key == "q":
            return "quit"
        if key in steps:
            self._move(steps[key])
        elif key == "c":
            self.asking = self.chosen
            self.message = "" if self.chosen else "there is no stream to cancel"
        elif key == "s":
            names = list(_SORTS)
            self.sort = names[(names.index(self.sort) + 1) % len(names)]
            self._order()
        return None

    def _move(self, by: int) -> None:
        if self._rows:
            at = min(max(self._at + by, 0), len(self._rows) - 1)
            self.chosen = self._rows[at].stream.id

    @property
    def _at(self) -> int:
        """The row of the stream under the cursor."""
        return next((at for at, row in enumerate(self._rows) if row.stream.id == self.chosen), 0)

    def _order(self) -> None:
        at = self._at
        self._rows.sort(key=_SORTS[self.sort])
        if all(row.stream.id != self.chosen for row in self._rows):  # it has ended: the next takes its place
            self.chosen = self._rows[min(at, len(self._rows) - 1)].stream.id if self._rows else None

    # --- how it looks ------------------------------------------------------------------------------------------------

    def render(self, width: int, height: int, now: float) -> RenderableType:
        """Return the screen."""
        if self._overview is None:
            return Text("asking the daemon …", style="dim")
        head = list(_head(self._overview, width))
        if now - self._told_at > _LATE_S:
            head[0].append(f"  no answer for {duration(now - self._told_at)}", style="bold red")
        self._page = max(1, height - len(head) - 4)
        foot = self._foot()
        for line in (*head, foot):
            line.no_wrap, line.overflow = True, "ellipsis"
        return Group(*head, Text(), self._table(width), foot)

    def _table(self, width: int) -> Table:
        made = Table(box=None, pad_edge=False, header_style="bold reverse", padding=(0, _GAP, 0, 0))
        shown = _columns(width)
        for column in shown:
            made.add_column(
                column.name,
                justify="right" if column.numeric else "left",
                no_wrap=True,
                overflow="ellipsis",
                width=column.width,
            )
        at = self._at
        first = max(0, min(at - self._page // 2, len(self._rows) - self._page))
        for row in self._rows[first : first + self._page]:
            chosen = row.stream.id == self.chosen
            made.add_row(*(column.cell(row) for column in shown), style="reverse" if chosen else "")
        return made

    def _foot(self) -> Text:
        if self.asking is not None:
            return Text(f"Cancel {self.asking}? y: yes, any other key: no", style="bold yellow")
        if self.message:
            return Text(visible(self.message), style="bold")
        more = f"the newest {len(self._rows)}; " if self._more else ""
        return Text(f"{more}by {self.sort} · ↑↓ choose · c cancel · s sort · q end", style="dim")


@attrs.frozen
class _Column:
    name: str
    width: int
    told: Callable[[_Row], str | Text]
    numeric: bool = False

    def cell(self, row: _Row) -> Text:
        told = self.told(row)
        return told if isinstance(told, Text) else Text(visible(told))


_GAP = 2
_COLUMNS = (
    _Column("id", 26, lambda row: row.stream.id),
    _Column("state", 10, lambda row: styled_state(row.stream.state)),
    _Column("age", 9, lambda row: duration(row.stream.age_s), numeric=True),
    _Column("ev/s", 6, lambda row: f"{row.rate:.1f}", numeric=True),
    _Column("events", 7, lambda row: str(row.stream.events), numeric=True),
    _Column("size", 7, lambda row: size(row.stream.journal_bytes or 0), numeric=True),
    _Column("upstream", 12, lambda row: row.stream.upstream or ""),
    _Column("readers", 7, lambda row: str(row.stream.readers), numeric=True),
    _Column("tries", 5, lambda row: str(row.stream.attempts), numeric=True),
    _Column("model", 18, lambda row: str(row.stream.meta.get("model") or "")),
    _Column("key", 24, lambda row: row.stream.key or ""),
)
"""The first of them that fit are shown."""


def _columns(width: int) -> Sequence[_Column]:
    shown: list[_Column] = []
    left = width
    for column in _COLUMNS:
        left -= column.width + _GAP
        if left < -_GAP and shown:
            break
        shown.append(column)
    return shown


def _head(told: Overview, width: int) -> Iterator[Text]:
    active, hour, memory = told.active, told.hour, told.memory
    colour = {"ok": "green", "draining": "yellow"}.get(told.status, "red")
    yield Text.assemble(
        (told.status, f"bold {colour}"),
        f"  {active.live} live ({active.waiting} waiting, {active.answering} answering, {active.settling} ending), "
        f"{active.readers} readers, up {duration(told.at - told.since)}",
    )
    ended = hour.ended
    rate = "" if hour.success_rate is None else f" ({100 * hour.success_rate:.0f} % well)"
    yield Text(
        f"hour: {hour.started} started, {ended['completed']} completed, {ended['failed']} failed, "
        f"{ended['expired']} expired{rate}, {ended['cancelled']} cancelled"
    )
    if hour.duration_s.count:
        first = hour.first_event_s
        yield Text(
            f"lasted {_told_s(hour.duration_s.p50)} (95 %: {_told_s(hour.duration_s.p95)}), "
            f"first event after {_told_s(first.p50)} (95 %: {_told_s(first.p95)}), {hour.retried} retried"
        )
    process = "" if memory.process_bytes is None else f", process {size(memory.process_bytes)}"
    limit = "" if memory.max_bytes is None else f" of {size(memory.max_bytes)}"
    yield Text(
        f"memory {size(memory.total_bytes)}{limit}{process}; store {told.store['state']}, "
        f"{told.store['lag_events']} records behind"
    )
    minutes = told.minutes.started[-max(10, width - 34) :]
    if any(minutes):
        yield Text.assemble("starts a minute ", (spark(minutes), "green"), f" {max(minutes)} at most")
    for problem in told.problems:
        yield Text(visible(problem), style="bold red")
    for name, circuit in told.circuits.items():
        if circuit["state"] != "closed":
            yield Text(f"the circuit of {visible(name)} is {circuit['state']}", style="yellow")
    for error in hour.errors[:1]:
        what = f"{error.state}({error.reason}) at {error.upstream or '?'}: {error.last_message}"
        yield Text(f"commonest error: {error.count} times {visible(what)}")


def _told_s(seconds: float | None) -> str:
    return "-" if seconds is None else duration(seconds)


# --- the terminal ----------------------------------------------------------------------------------------------------


def top(options: argparse.Namespace) -> int:
    """Show streams and figures on the whole terminal."""
    if options.json:
        complain("--json: not with top, which is for people; list and stats have it")
        return Exit.USAGE
    if not (sys.stdin.isatty() and sys.stdout.isatty()):
        complain("top needs a terminal; watch and stats need none")
        return Exit.USAGE
    return as_client(options, _top, reconnect=True)


async def _top(client: ControlClient, options: argparse.Namespace) -> int:
    return await show(client, console(), sys.stdin.fileno(), interval_s=options.interval)


async def show(client: ControlClient, out: Console, keyboard: int, *, interval_s: float) -> int:
    """Show the screen until a key ends it; `keyboard` is the terminal's file descriptor."""
    screen = Screen()
    with (
        _key_by_key(keyboard),
        trio.open_signal_receiver(signal.SIGINT) as interrupts,
        Live(console=out, screen=True, auto_refresh=False, vertical_overflow="crop") as live,
    ):

        def draw() -> None:
            live.update(screen.render(out.width, out.height, time.monotonic()), refresh=True)

        async def look() -> None:
            while True:
                try:
                    overview = await client.overview()
                    page = await client.list(live=True, limit=_MOST)
                except (
                    ControlClosedError
                ) as error:  # it is made again; until then the screen says what is missing
                    if error.code is not None and error.code >= _NEVER_AGAIN:
                        raise
                else:
                    screen.tell(overview, page.streams, more=page.next is not None, now=time.monotonic())
                    draw()
                await trio.sleep(interval_s)

        async def tick() -> None:
            while True:  # so that what is late is seen to be, and a new size of the terminal is taken
                draw()
                await trio.sleep(max(interval_s, 1.0))

        async def cancel(stream_id: str) -> None:
            try:
                result = await client.cancel(stream_id, reason="cancelled in top", wait_s=5)
                ended = f"{result.state}({result.reason})" if result.reason else str(result.state)
                screen.message = f"{stream_id}: {result.outcome}, {ended}"
            except ControlError as error:
                screen.message = f"{stream_id}: {error}"
            draw()

        async def press(nursery: trio.Nursery) -> None:
            while True:
                await trio.lowlevel.wait_readable(keyboard)
                data = os.read(keyboard, 1024)
                for key in keys_in(data) if data else ("q",):  # nothing: the terminal has gone
                    todo = screen.press(key)
                    if todo == "quit":
                        nursery.cancel_scope.cancel()
                    elif todo is not None:
                        nursery.start_soon(cancel, todo)
                draw()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(look)
            nursery.start_soon(tick)
            nursery.start_soon(press, nursery)
            async for _ in interrupts:
                nursery.cancel_scope.cancel()
    return Exit.OK


@contextlib.contextmanager
def _key_by_key(keyboard: int) -> Iterator[None]:
    """Have a terminal give each key at once, and not show it, for the length of a block."""
    import termios  # noqa: PLC0415  # there is none on Windows, where the other commands work
    import tty  # noqa: PLC0415

    before = termios.tcgetattr(keyboard)
    tty.setcbreak(keyboard)
    try:
        yield
    finally:
        termios.tcsetattr(keyboard, termios.TCSADRAIN, before)
