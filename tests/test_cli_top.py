"""`top`, as a person at a terminal sees it."""

from __future__ import annotations

import io
import os
import pty
import signal
import termios
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, nullcontext
from functools import partial
from typing import Any, TextIO

import attrs
import msgspec
import pyte
import pytest
import trio
from rich.console import Console

from supervisor import Limits, Output, Supervisor, open_supervisor
from supervisor.cli import main
from supervisor.cli.top import Screen, keys_in, show
from supervisor.control import ClientLimits, ControlServer, connect
from supervisor.control.messages import ListResult
from supervisor.errors import ControlClosedError
from supervisor.observe import Figures

WIDTH, HEIGHT = 160, 20


@attrs.define
class Terminal:
    """The person's side of a pseudo-terminal."""

    master: int
    supervisor: Supervisor
    serve: Callable[[], Awaitable[trio.CancelScope]]
    """Serves the control channel, on the same port each time, until the scope is cancelled."""
    serving: trio.CancelScope
    drawn: pyte.Screen = attrs.field(factory=lambda: pyte.Screen(WIDTH, HEIGHT))

    async def until(self, seen: Callable[[str], bool]) -> str:
        """Read what is drawn until it is as expected."""
        with trio.fail_after(20):
            while not seen(text := "\n".join(self.drawn.display)):
                await trio.lowlevel.wait_readable(self.master)
                self._feed(os.read(self.master, 65536))
        return text

    def _feed(self, data: bytes) -> None:
        pyte.ByteStream(self.drawn).feed(data)

    async def press(self, keys: bytes) -> None:
        os.write(self.master, keys)


async def streaming(out: Output) -> None:
    await out.send("begun")
    await trio.sleep_forever()


def _writing(slave: int) -> TextIO:
    return open(slave, "w", encoding="utf-8", closefd=False)


@asynccontextmanager
async def shown(results: list[int], **limits: Any) -> AsyncIterator[Terminal]:
    """Show top on a terminal, of a daemon's parts, for the length of a block; `results` gets what it returned."""
    master, slave = pty.openpty()
    before = termios.tcgetattr(slave)
    async with open_supervisor(limits=Limits(**limits)) as sup, trio.open_nursery() as nursery:
        figures, port = Figures(sup), 0

        async def run(*, task_status: trio.TaskStatus[trio.CancelScope]) -> None:
            nonlocal port
            with trio.CancelScope() as scope:
                async with trio.open_nursery() as inner:
                    (port,) = await inner.start(ControlServer(sup, figures=figures).run, "127.0.0.1", port)
                    task_status.started(scope)

        serve = partial(nursery.start, run)
        serving = await serve()
        with _writing(slave) as out:
            screen = Console(file=out, force_terminal=True, width=WIDTH, height=HEIGHT, legacy_windows=False)
            try:
                async with (
                    connect(
                        f"ws://127.0.0.1:{port}", reconnect=True, limits=ClientLimits(retry_initial_s=0.05)
                    ) as client,
                    trio.open_nursery() as tasks,
                ):

                    async def watch() -> None:
                        results.append(await show(client, screen, slave, interval_s=0.02))

                    tasks.start_soon(watch)
                    yield Terminal(master, sup, serve, serving)
                    with trio.fail_after(20):
                        while not results:  # it writes until it ends, and must not find the terminal full
                            with trio.move_on_after(0.01):
                                await trio.lowlevel.wait_readable(master)
                                os.read(master, 65536)
                    tasks.cancel_scope.cancel()
                assert termios.tcgetattr(slave) == before  # the terminal is as it was
            finally:
                os.close(slave)
                os.close(master)
        await sup.shutdown()
        nursery.cancel_scope.cancel()


async def test_a_session() -> None:
    """Streams are seen, chosen with the arrows, and cancelled once that is confirmed; then it ends and leaves the terminal as it was."""
    results: list[int] = []
    async with shown(results) as terminal:
        sup = terminal.supervisor
        ids = [(await sup.start(streaming, upstream="up", key=f"key {n}")).id for n in range(3)]
        text = await terminal.until(lambda seen: all(stream_id in seen for stream_id in ids))
        assert "3 live (" in text
        assert "hour: 3 started" in text
        lines = [line for line in text.splitlines() if line.startswith("01")]
        assert [line.split()[0] for line in lines] == ids[::-1]  # the newest first
        await terminal.until(lambda seen: "streaming" in seen and "3 answering" in seen)
        await terminal.press(b"\x1b[B")
        await terminal.press(b"c")
        await terminal.until(lambda seen: f"Cancel {ids[1]}?" in seen)
        await terminal.press(b"n")
        await terminal.until(lambda seen: "not cancelled" in seen)
        assert sup.statistics().live == 3
        await terminal.press(b"cy")
        await terminal.until(lambda seen: f"{ids[1]}: won, cancelled(requested)" in seen)
        assert sup.get(ids[1]).outcome.message == "cancelled in top"
        assert [sup.get(one).state for one in (ids[0], ids[2])] == ["streaming"] * 2
        await terminal.until(lambda seen: "1 cancelled" in seen and "2 live" in seen)
        await terminal.press(b"q")
    assert results == [0]


async def test_a_daemon_that_is_restarted(monkeypatch: pytest.MonkeyPatch) -> None:
    """While it is away the screen stays and says so; once it is back, it is as it was."""
    monkeypatch.setattr("supervisor.cli.top._LATE_S", 0.05)
    results: list[int] = []
    async with shown(results) as terminal:
        stream = await terminal.supervisor.start(streaming)
        await terminal.until(lambda seen: stream.id in seen)
        terminal.serving.cancel()
        text = await terminal.until(lambda seen: "no answer for" in seen)
        assert stream.id in text
        await terminal.serve()
        await terminal.until(lambda seen: "no answer" not in seen and "1 live" in seen)
        await terminal.press(b"q")
    assert results == [0]


async def test_an_interrupt_ends_it() -> None:
    """Ctrl-C is q."""
    results: list[int] = []
    async with shown(results) as terminal:
        await terminal.until(lambda seen: "0 live" in seen)
        signal.raise_signal(signal.SIGINT)
    assert results == [0]


def test_keys() -> None:
    """Keys are told apart wherever the terminal cuts what it sends; what is no key is the characters that it is."""
    assert list(keys_in(b"\x1b[Aj\x1bOBq\x1b[5~\x1b[6~x")) == [
        "up",
        "down",
        "down",
        "q",
        "page up",
        "page down",
        "x",
    ]
    assert list(keys_in(b"\x1b[Z\xff")) == ["\x1b", "[", "Z", "\xff"]


async def _told(count: int) -> tuple[Any, Any]:
    """Return an overview, and so many streams."""
    async with open_supervisor() as sup, trio.open_nursery() as nursery:
        server = ControlServer(sup, figures=Figures(sup))
        (port,) = await nursery.start(server.run)
        for number in range(count):
            await sup.start(streaming, key=f"\x1b[31m{number}")
        await trio.testing.wait_all_tasks_blocked()
        async with connect(f"ws://127.0.0.1:{port}") as client:
            told = await client.overview(), (await client.list(live=True)).streams
        await sup.shutdown()
        nursery.cancel_scope.cancel()
    return told


def drawn(screen: Screen, now: float, *, width: int = WIDTH, height: int = HEIGHT) -> list[str]:
    out = Console(width=width, height=height, force_terminal=False)
    with out.capture() as captured:
        out.print(screen.render(width, height, now))
    return captured.get().rstrip("\n").splitlines()


async def test_many_streams_on_a_small_screen() -> None:
    """It never draws more lines than there are; the cursor stays in sight; keys of others are made visible."""
    overview, streams = await _told(60)
    screen = Screen()
    screen.tell(overview, streams, more=True, now=0.0)
    screen.press("down")
    for key in ["page down", "page down", "down", "last", "up", "first", "page up"]:
        assert screen.press(key) is None
        lines = drawn(screen, 0.0)
        assert len(lines) <= HEIGHT
        assert any(line.startswith(str(screen.chosen)) for line in lines)
        assert not any("\x1b" in line for line in lines)
    assert screen.chosen == streams[0].id
    assert "newest 60" in drawn(screen, 0.0)[-1]
    assert len(drawn(screen, 0.0, height=8)) <= 8 + 3  # of a terminal that is too small, the rest is cut off
    for width in (20, 40, 80, 100, 120, 300):
        lines = drawn(screen, 0.0, width=width)
        assert len(lines) <= HEIGHT
        assert max(map(len, lines)) <= width
        assert width < 26 or any(
            streams[1].id in line for line in lines
        )  # a column is shown whole, or is not


@pytest.mark.parametrize(("code", "goes_on"), [(None, True), (4000, True), (4500, False)])
async def test_a_connection_that_is_lost_under_a_question(code: int | None, goes_on: bool) -> None:
    """It asks again, unless the same would happen again."""
    told, _ = await _told(0)
    asked = 0

    class Flaky:
        async def overview(self) -> Any:
            nonlocal asked
            asked += 1
            if asked == 2:
                raise ControlClosedError(code, "lost")
            if asked == 4:
                os.write(master, b"q")
            return told

        async def list(self, **_: Any) -> Any:
            return ListResult(streams=(), next=None)

    master, slave = pty.openpty()
    out = Console(file=io.StringIO(), force_terminal=True, width=WIDTH, height=HEIGHT)
    try:
        with trio.fail_after(20), nullcontext() if goes_on else pytest.RaisesGroup(ControlClosedError):
            assert await show(Flaky(), out, slave, interval_s=0) == 0  # type: ignore[arg-type]  # all that it asks
    finally:
        os.close(slave)
        os.close(master)
    assert (asked >= 4) == goes_on


async def test_rates_and_order() -> None:
    """Events a second are those since the last look; the order is by what was asked for, the cursor staying on its stream."""
    overview, streams = await _told(3)
    one, two, three = streams
    screen = Screen()
    screen.tell(overview, streams, more=False, now=0.0)
    screen.press("down")
    assert screen.chosen == two.id
    for answer, cancelled in (("n", None), ("q", None), ("\x1b", None), ("y", two.id)):
        assert (screen.press("c"), screen.asking) == (None, two.id)
        assert (screen.press(answer), screen.asking) == (cancelled, None)
    later = [one, two, msgspec.structs.replace(three, events=three.events + 50)]
    screen.tell(overview, later, more=False, now=2.0)
    assert [row.rate for row in screen._rows] == [0, 0, 25]
    screen.press("s")
    assert (screen.sort, screen.chosen) == ("events/s", two.id)
    assert screen._rows[0].stream.id == three.id
    screen.tell(overview, [later[2], one], more=False, now=3.0)  # it has ended
    assert screen.chosen in {one.id, three.id}
    screen.tell(overview, [], more=False, now=4.0)
    assert (screen.chosen, screen.press("c"), screen.asking) == (None, None, None)
    assert "no answer" not in drawn(screen, 5.0)[0]
    assert "no answer for 6.0 s" in drawn(screen, 10.0)[0]


def test_without_a_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    """It says what to use instead."""
    assert main(["top"]) == 2
    assert "top needs a terminal" in capsys.readouterr().err
    assert main(["top", "--json"]) == 2
