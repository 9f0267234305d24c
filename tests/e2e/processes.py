"""Real processes for tests: a daemon and a simulated upstream, started, spoken to and ended within bounds."""

from __future__ import annotations

import json
import os
import select
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import trio

from supervisor.control import ControlClient, connect

T = TypeVar("T")
CREDENTIAL = "sk-test-credential-0123456789abcdef"
TOKEN = "control-token-fedcba9876543210"
START_S = 20.0
STOP_S = 20.0
WAIT_S = 20.0


class Running:
    """A process and what it said first."""

    def __init__(
        self, command: list[str], *, env: dict[str, str], stdin: int = subprocess.DEVNULL, errors: Path
    ) -> None:
        with errors.open("ab") as file:
            self.process = subprocess.Popen(
                command, stdin=stdin, stdout=subprocess.PIPE, stderr=file, env=env, start_new_session=True
            )
        self.errors = errors
        self.said = self._first_line()

    def _first_line(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        data, until = b"", time.monotonic() + START_S
        while not data.endswith(b"\n"):
            ready = select.select([self.process.stdout], [], [], max(0.0, until - time.monotonic()))[0]
            more = os.read(self.process.stdout.fileno(), 4096) if ready else b""
            if not more:
                self.end()
                raise RuntimeError(f"{self.process.args} did not start: {self.errors.read_text()}")
            data += more
        said: dict[str, Any] = json.loads(data)
        return said

    def signal(self, number: int) -> None:
        self.process.send_signal(number)

    def wait(self) -> int:
        return self.process.wait(STOP_S)

    def end(self) -> None:
        """End it however it takes; nothing if it has ended."""
        if self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(5)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait(5)
        for pipe in (self.process.stdin, self.process.stdout):
            if pipe is not None:
                pipe.close()


def environment(**more: str) -> dict[str, str]:
    """Return the process's environment without anybody's keys, and with `more`."""
    kept = {name: value for name, value in os.environ.items() if not name.endswith("_API_KEY")}
    kept = {
        name: value for name, value in kept.items() if not name.startswith(("OPENAI_", "STREAM_SUPERVISOR_"))
    }
    return {**kept, **more}


@contextmanager
def simulated_upstream(folder: Path, *options: str) -> Iterator[str]:
    """Run a simulated upstream; give its base URL."""
    command = [
        sys.executable,
        "-m",
        "supervisor.testing.upstream",
        "--port",
        "0",
        "--until-stdin-closes",
        *options,
    ]
    running = Running(command, env=environment(), stdin=subprocess.PIPE, errors=folder / "upstream.log")
    try:
        yield running.said["base_url"]
    finally:
        running.end()


class Daemon(Running):
    """A `serve` process."""

    @property
    def url(self) -> str:
        return str(self.said["url"])

    @property
    def http(self) -> str:
        return str(self.said["http"])

    def ask(self, question: Callable[[ControlClient], Awaitable[T]], *, token: str | None = TOKEN) -> T:
        """Connect, and return what `question(client)` does."""

        async def main() -> T:
            with trio.fail_after(WAIT_S):
                async with connect(self.url, token) as client:
                    return await question(client)

        return trio.run(main)


def start_daemon(
    folder: Path, base_url: str, *options: str, config: str = "", token: str | None = TOKEN
) -> Daemon:
    """Start a daemon with its store, log and token in `folder` and one upstream, `sim`."""
    toml = folder / "config.toml"
    toml.write_text(
        f"{config}\n[upstreams.sim]\nbase_url = {json.dumps(base_url)}\n"
        'api_key_env = "SIM_KEY"\nproxy = "direct"\n[upstreams.sim.retry]\nwait_initial_s = 0.05\njitter_s = 0.0\n'
    )
    command = [
        sys.executable,
        "-m",
        "supervisor.cli",
        "serve",
        "--config",
        str(toml),
        "--port",
        "0",
        "--web-port",
        "0",
        "--json",
    ]
    if token is not None:
        token_file = folder / "token"
        token_file.write_text(token + "\n")
        command += ["--token-file", str(token_file)]
    if "--grace" not in options:
        command += ["--grace", "0"]
    if "--store" not in options:
        command += ["--store", str(folder / "streams.db")]
    return Daemon([*command, *options], env=environment(SIM_KEY=CREDENTIAL), errors=folder / "daemon.log")


@contextmanager
def daemon(folder: Path, base_url: str, *options: str, **more: Any) -> Iterator[Daemon]:
    """Run a daemon for the length of a block."""
    running = start_daemon(folder, base_url, *options, **more)
    try:
        yield running
    finally:
        running.end()


def wait_for_text(path: Path, text: str, *, seconds: float = WAIT_S) -> None:
    """Wait until a file has a text in it. A file cannot be waited on otherwise than by looking."""
    until = time.monotonic() + seconds
    while text not in (path.read_text() if path.exists() else ""):
        assert time.monotonic() < until, (
            f"{path} never said {text!r}: {path.read_text() if path.exists() else 'no file'}"
        )
        select.select([], [], [], 0.01)


async def wait_events(client: ControlClient, stream_id: str, count: int) -> None:
    """Return once a stream has shown `count` text events."""
    seen = 0
    async with client.subscribe(stream_id) as events:
        async for event in events:
            seen += bool(event.text)
            if seen >= count:
                return
    raise AssertionError(f"the stream ended after {seen} events")


def start_stream(model: str, **options: Any) -> Callable[[ControlClient], Awaitable[str]]:
    """Return a question that starts a stream on `sim`, waits for its first text, and gives its id."""

    async def question(client: ControlClient) -> str:
        started = await client.start("sim", {"model": model, "messages": []}, **options)
        await wait_events(client, started.id, 1)
        return started.id

    return question


def outcome_of(stream_id: str) -> Callable[[ControlClient], Awaitable[str]]:
    """Return a question for how a stream ended, as `state(reason)`."""

    async def question(client: ControlClient) -> str:
        outcome = await client.wait(stream_id)
        assert outcome is not None
        return f"{outcome.state}({outcome.reason})"

    return question
