"""`demo`: the whole thing at work, on this machine alone: a real daemon, a simulated provider, every kind of ending.

The daemon is a process of its own (`serve`, on a free port, with a store in a temporary folder and a token), driven over its
control channel like any other. The provider is a `SimulatedUpstream` in this process. Each scene starts a stream, does
something to it, and says what should have come of it; the demo succeeds only if each did, and what was received is compared
with what the provider sent byte for byte.

Nothing is left behind: the daemon's process and the folder go when the demo ends, however it ends.
"""

from __future__ import annotations

import argparse
import os
import secrets
import signal
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from functools import partial
from pathlib import Path

import attrs
import msgspec
import trio
from rich.console import Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from supervisor.cli.connecting import run_reporting
from supervisor.cli.exits import Exit
from supervisor.cli.render import complain, console, print_json, styled_state, table, visible
from supervisor.control import ControlClient, DeadlinesMessage, EventMessage, EventStream, connect
from supervisor.errors import SupervisorError
from supervisor.testing.upstream import SimulatedUpstream, UpstreamRequest, script_for_model
from supervisor.version import version

__all__ = ["demo"]

_UPSTREAM = "simulated"
_TOKEN_FILE = "token"  # noqa: S105  # the name of a file
_KEY_VARIABLE = "STREAM_SUPERVISOR_DEMO_KEY"
_PACKAGE = str(Path(__file__).resolve().parents[2])
_LIMIT_S = 60.0
_STOP_S = 10.0
_SHOWN_CHARS = 36

_CONFIG = """\
discover = false

[control]
port = 0
token_file = {token}

[web]
port = "none"

[store]
path = {store}

[shutdown]
grace_s = 1.0

[memory]
sweep_every_s = 0.2

[[memory.groups]]
labels = {{ scene = "over the limit" }}
max_bytes = 200_000
at_max_bytes = "reap_oldest"

[retry]
wait_initial_s = 0.1

[upstreams.{upstream}]
base_url = {base_url}
api_key_env = "{variable}"
proxy = "direct"
"""


def demo(options: argparse.Namespace) -> int:
    """Run every scene, show them, and judge them."""
    with tempfile.TemporaryDirectory(prefix="stream-supervisor-demo-") as folder:
        return run_reporting(lambda: _demo(options, Path(folder)))


# --- scenes ----------------------------------------------------------------------------------------------------------


@attrs.define(eq=False)
class _Scene:
    """One stream: what is done to it, what should come of it, and what did."""

    name: str
    model: str
    """The simulated provider's script."""
    expected: str
    """The outcome, as `state(reason)`."""
    play: Callable[[_Stage, _Scene], Awaitable[None]]
    idle_s: float | None = None
    stream_id: str = ""
    state: str = "waiting"
    actual: str = "-"
    events: int = 0
    text: str = ""
    note: str = ""
    failures: list[str] = attrs.field(factory=list)
    done: bool = False

    @property
    def ok(self) -> bool:
        """Whether it came out as it should."""
        return self.done and self.actual == self.expected and not self.failures

    def check(self, what: str, *, holds: bool) -> None:
        """Note what does not hold."""
        if not holds:
            self.failures.append(what)

    def take(self, event: EventMessage) -> None:
        """Take note of an event."""
        self.events = max(self.events, event.seq)
        self.text += event.text
        if event.kind == "attempt":
            self.state = "connecting"
            if event.details is not None and event.details.get("cause"):
                self.note = f"attempt {event.details['attempt']}"
        elif event.text:
            self.state = "streaming"
        if event.outcome is not None:
            self.state = event.outcome["state"]
            self.actual = f"{event.outcome['state']}({event.outcome['reason']})"

    def sent(self, events: int | None = None) -> str:
        """Return what the provider sends: in all, or in so many events."""
        script = script_for_model(self.model)
        assert script is not None, "every scene's model is a script"
        return script.expected_text(events)


@attrs.frozen(kw_only=True)
class _Stage:
    """What scenes play on."""

    client: ControlClient
    provider: SimulatedUpstream
    connect: Callable[[], AbstractAsyncContextManager[ControlClient]]

    async def start(self, scene: _Scene) -> None:
        """Start the scene's stream."""
        started = await self.client.start(
            _UPSTREAM,
            {"model": scene.model, "messages": [{"role": "user", "content": scene.name}]},
            key=scene.name.replace(" ", "-"),
            labels={"scene": scene.name},
            deadlines=DeadlinesMessage() if scene.idle_s is None else DeadlinesMessage(idle_s=scene.idle_s),
        )
        scene.stream_id, scene.state = started.id, started.state

    async def follow(self, scene: _Scene) -> None:
        """Start the scene's stream and read it to its end."""
        await self.start(scene)
        async with self.client.subscribe(scene.stream_id, view="text") as events:
            async for event in events:
                scene.take(event)

    def requests(self, scene: _Scene) -> list[UpstreamRequest]:
        """Return what the provider was asked for this scene."""
        return [request for request in self.provider.requests if request.json().get("model") == scene.model]


async def _whole(stage: _Stage, scene: _Scene) -> None:
    await stage.follow(scene)
    scene.check("every byte of the answer", holds=scene.text == scene.sent())


async def _cut(words: int, stage: _Stage, scene: _Scene) -> None:
    await stage.follow(scene)
    scene.check(f"the {words} words sent were kept", holds=scene.text == scene.sent(words))


async def _retried(stage: _Stage, scene: _Scene) -> None:
    await _whole(stage, scene)
    scene.check("two requests were made", holds=len(stage.requests(scene)) == 2)


async def _cancelled(stage: _Stage, scene: _Scene) -> None:
    await stage.start(scene)
    async with stage.client.subscribe(scene.stream_id, view="text") as events:
        await _take(events, scene, words=12)
        result = await stage.client.cancel(scene.stream_id, reason="the reader has left")
        scene.check("the cancel won", holds=result.outcome == "won")
        async for event in events:
            scene.take(event)
    _check_prefix(scene)
    scene.check("the provider was asked", holds=bool(stage.requests(scene)))
    if scene.failures:
        return
    number = stage.requests(scene)[0].connection
    connection = next(one for one in stage.provider.connections if one.number == number)
    with trio.move_on_after(2):
        await connection.wait_closed()
    scene.check("the provider saw its connection close", holds=connection.closed_by in {"eof", "reset"})


async def _reaped(stage: _Stage, scene: _Scene) -> None:
    await stage.follow(scene)
    _check_prefix(scene)


async def _detached(stage: _Stage, scene: _Scene) -> None:
    """Read some on a connection of its own, drop the connection, let the stream go on unread, and read on elsewhere."""
    await stage.start(scene)
    async with stage.connect() as client, client.subscribe(scene.stream_id, view="text", window=10) as events:
        await _take(events, scene, words=8)  # the window keeps it from being ahead of its own reading
        cursor = events.cursor
    assert cursor is not None, "events were read"
    scene.note = "detached"
    unread = False
    with trio.move_on_after(10):
        while not unread:
            stream = await stage.client.get(scene.stream_id)
            unread = stream.readers == 0 and stream.tail_seq >= cursor.seq + 15
            scene.note = f"detached: {stream.readers} readers, {stream.tail_seq} events"
            await trio.sleep(0.05)
    scene.check(f"it went on unread ({scene.note})", holds=unread)
    scene.note = f"re-attached after ({cursor.epoch}, {cursor.seq})"
    async with stage.client.subscribe(scene.stream_id, after=cursor, view="text") as events:
        async for event in events:
            scene.take(event)
    scene.check("not a token was lost or repeated", holds=scene.text.encode() == scene.sent().encode())
    snapshot = await stage.client.snapshot(scene.stream_id)
    scene.check("the recorded answer is the same", holds=snapshot.text == scene.text)


async def _take(events: EventStream, scene: _Scene, *, words: int) -> None:
    async for event in events:
        scene.take(event)
        if len(scene.text.split()) >= words:
            return


def _check_prefix(scene: _Scene) -> None:
    words = len(scene.text.split())
    scene.check(
        "what came is what was sent", holds=words > 0 and scene.sent(words + 1).startswith(scene.text)
    )


def _scenes() -> list[_Scene]:
    paced = "sim/paced?tokens={tokens}&interval_s={interval}&key={key}"
    return [
        *(
            _Scene(
                f"answer {n}",
                paced.format(tokens=40 + 20 * n, interval=0.04, key=n),
                "completed(stop)",
                _whole,
            )
            for n in (1, 2, 3)
        ),
        _Scene("cancelled", "sim/endless?interval_s=0.05&key=cancelled", "cancelled(requested)", _cancelled),
        _Scene(
            "stalled",
            "sim/stall?after=6&interval_s=0.05&key=stalled",
            "expired(idle)",
            partial(_cut, 6),
            idle_s=1.5,
        ),
        _Scene(
            "truncated",
            "sim/end?after=14&interval_s=0.05&tokens=50&key=cut",
            "failed(truncated)",
            partial(_cut, 14),
        ),
        _Scene(
            "retried", "sim/429?times=1&retry_after=1&tokens=20&interval_s=0.04", "completed(stop)", _retried
        ),
        _Scene(
            "over the limit",
            "sim/endless?interval_s=0.05&events_per_write=32&key=over",
            "expired(reaped_bytes)",
            _reaped,
        ),
        _Scene(
            "detached", paced.format(tokens=100, interval=0.03, key="detached"), "completed(stop)", _detached
        ),
    ]


# --- the stage -------------------------------------------------------------------------------------------------------


async def _demo(options: argparse.Namespace, folder: Path) -> int:
    """Play everything; return the exit code."""
    scenes = _scenes()
    interrupted: list[int] = []
    began = trio.current_time()
    fault = ""
    with (
        trio.open_signal_receiver(signal.SIGINT, signal.SIGTERM, signal.SIGHUP) as signals,
        trio.move_on_after(_LIMIT_S) as limit,
    ):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(_until_signal, signals, interrupted, nursery.cancel_scope)
            try:
                fault = await _play(options, scenes, folder)
            except* (SupervisorError, OSError, _DaemonError) as group:
                fault = "; ".join(map(str, _leaves(group)))
            nursery.cancel_scope.cancel(reason="the demo is over")
    if interrupted:
        return 128 + interrupted[0]
    if limit.cancelled_caught:
        fault = f"not over after {_LIMIT_S:g} s"
    return _judge(options, scenes, fault, trio.current_time() - began)


def _leaves(group: BaseExceptionGroup[BaseException]) -> list[BaseException]:
    return [
        leaf
        for error in group.exceptions
        for leaf in (_leaves(error) if isinstance(error, BaseExceptionGroup) else [error])
    ]


async def _until_signal(signals: AsyncIterator[int], interrupted: list[int], scope: trio.CancelScope) -> None:
    interrupted.append(await anext(signals))
    scope.cancel(reason="a signal")


async def _play(options: argparse.Namespace, scenes: list[_Scene], folder: Path) -> str:
    """Play the scenes, all at once; return what went wrong with the daemon itself."""
    key = f"sk-demo-{secrets.token_hex(16)}"
    token = secrets.token_hex(16)
    async with SimulatedUpstream() as provider, _daemon(provider, folder, key=key, token=token) as daemon:
        stage_connect = partial(connect, daemon.url, token, name="demo")
        async with stage_connect() as client, trio.open_nursery() as nursery:
            stage = _Stage(client=client, provider=provider, connect=stage_connect)
            nursery.start_soon(_show, options, scenes, nursery.cancel_scope)
            for scene in scenes:
                nursery.start_soon(_play_one, stage, scene)
    if daemon.exit_code != 0:
        return f"the daemon ended with exit code {daemon.exit_code}"
    if any(request.credential != key for request in provider.requests):
        return "the provider was not given its credential"
    return _leak(folder, key, token)


def _leak(folder: Path, *kept: str) -> str:
    """Say which file holds a secret that it must not hold; "" if none does."""
    for file in folder.iterdir():
        data = file.read_bytes()
        if file.name != _TOKEN_FILE and any(secret.encode() in data for secret in kept):
            return f"{file.name} holds a secret"
    return ""


async def _play_one(stage: _Stage, scene: _Scene) -> None:
    try:
        await scene.play(stage, scene)
    except SupervisorError as error:
        scene.failures.append(str(error))
    scene.done = True


class _DaemonError(Exception):
    """The daemon did not start."""


@attrs.define
class _DaemonProcess:
    url: str
    exit_code: int | None = None


@asynccontextmanager
async def _daemon(
    provider: SimulatedUpstream, folder: Path, *, key: str, token: str
) -> AsyncIterator[_DaemonProcess]:
    """Run `serve` for the length of a block; ended by SIGTERM, and if that does not help by SIGKILL."""
    token_file, config, log = folder / _TOKEN_FILE, folder / "config.toml", folder / "daemon.log"
    token_file.touch(mode=0o600)
    token_file.write_text(token)
    config.write_text(
        _CONFIG.format(
            token=_toml(token_file),
            store=_toml(folder / "streams.db"),
            upstream=_UPSTREAM,
            base_url=_toml(provider.base_url),
            variable=_KEY_VARIABLE,
        )
    )
    paths = [_PACKAGE, *filter(None, [os.environ.get("PYTHONPATH")])]
    command = [sys.executable, "-P", "-m", "supervisor.cli", "serve", "--config", str(config), "--json"]
    environ = {**os.environ, _KEY_VARIABLE: key, "PYTHONPATH": os.pathsep.join(paths)}
    with log.open("wb") as errors:
        process = await trio.lowlevel.open_process(
            [*command, "--log-format", "json"],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=errors,
            env=environ,
            start_new_session=True,  # Ctrl-C is for the demo, which then ends the daemon
        )
        try:
            line = await _first_line(process)
            if not line:
                raise _DaemonError(f"the daemon did not start: {log.read_text('utf-8', 'replace').strip()}")
            daemon = _DaemonProcess(msgspec.json.decode(line)["url"])
            yield daemon
            process.terminate()
            with trio.move_on_after(_STOP_S):
                daemon.exit_code = await process.wait()
        finally:
            with trio.CancelScope(shield=True):
                await _end(process)


async def _first_line(process: trio.Process) -> bytes:
    """Read the ready line; b"" if the process ends without one."""
    assert process.stdout is not None, "it is a pipe"
    data = b""
    while not data.endswith(b"\n"):
        more = await process.stdout.receive_some(4096)
        if not more:
            return b""
        data += more
    return data


async def _end(process: trio.Process) -> None:
    if process.returncode is None:
        process.terminate()
        with trio.move_on_after(3):
            await process.wait()
    if process.returncode is None:
        process.kill()
        await process.wait()
    if process.stdout is not None:
        await process.stdout.aclose()


def _toml(value: object) -> str:
    """Return a basic string of TOML; JSON's are a subset of its."""
    return msgspec.json.encode(str(value)).decode()


# --- showing ---------------------------------------------------------------------------------------------------------


async def _show(options: argparse.Namespace, scenes: list[_Scene], scope: trio.CancelScope) -> None:
    """Show the scenes until all are done: a live table on a terminal, else a line for each change."""
    if not options.plain and not options.json and sys.stdout.isatty():
        with Live(console=console(), auto_refresh=False, transient=True) as live:
            while not all(scene.done for scene in scenes):
                live.update(_table(scenes), refresh=True)
                await trio.sleep(0.1)
    else:
        shown: dict[str, tuple[str, str]] = {}
        finished = False
        while not finished:
            finished = all(scene.done for scene in scenes)
            for scene in scenes:
                now = (scene.state, scene.note)
                if shown.get(scene.name) != now and not options.json:
                    shown[scene.name] = now
                    print(f"{scene.name:<15} {' '.join(now).strip()}", flush=True)  # noqa: T201  # the demo's output
            await trio.sleep(0.05)
    scope.cancel(reason="every scene is done")


def _table(scenes: list[_Scene]) -> Table:
    return table(
        ("stream", "state", "events", "text", ""),
        (
            (
                scene.name,
                styled_state(scene.state),
                scene.events,
                Text(f"…{visible(scene.text)[-_SHOWN_CHARS:]}".rjust(_SHOWN_CHARS + 1)),
                scene.note,
            )
            for scene in scenes
        ),
        ids=("stream", "state", "text"),
    )


def _judge(options: argparse.Namespace, scenes: list[_Scene], fault: str, took_s: float) -> int:
    """Print what was expected and what came, and return the exit code."""
    ok = all(scene.ok for scene in scenes) and not fault
    if options.json:
        for scene in scenes:
            print_json(
                {
                    "stream": scene.name,
                    "id": scene.stream_id,
                    "expected": scene.expected,
                    "actual": scene.actual,
                    "ok": scene.ok,
                    "events": scene.events,
                    "failures": scene.failures,
                }
            )
        print_json({"ok": ok, "seconds": round(took_s, 3), "fault": fault or None, "version": version()})
    else:
        rows = (
            (
                scene.name,
                scene.expected,
                Text(scene.actual, style="" if scene.actual == scene.expected else "red"),
                scene.events,
                Text("ok", style="green")
                if scene.ok
                else Text("NOT OK: " + ", ".join(scene.failures), style="red"),
            )
            for scene in scenes
        )
        columns = ("stream", "expected", "actual", "events", "verdict")
        said = f"{sum(scene.ok for scene in scenes)} of {len(scenes)} as they should be, in {took_s:.1f} s"
        console().print(Group(table(columns, rows, ids=columns[:3]), Text(said)))
    if fault:
        complain(fault)
    return Exit.OK if ok else Exit.FAILURE
