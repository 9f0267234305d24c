"""The daemon as a process: how it starts, how it ends by each signal, and what it refuses."""

from __future__ import annotations

import errno
import json
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import attrs
import httpx
import pytest
import trio

from supervisor.config import Config, ControlConfig, StoreConfig, WebConfig, parse
from supervisor.control import ControlClient, StartParams, StartResult, connect
from supervisor.daemon import Ready, run
from supervisor.dialects import BUILTIN
from supervisor.errors import ConfigurationError, ControlClosedError, RequestError
from supervisor.testing.upstream import Script, SimulatedUpstream
from supervisor.upstream import CircuitPolicy, RetryPolicy, Upstream
from tests.e2e.processes import (
    CREDENTIAL,
    STOP_S,
    TOKEN,
    WAIT_S,
    Daemon,
    daemon,
    environment,
    outcome_of,
    simulated_upstream,
    start_stream,
    wait_events,
    wait_for_text,
)


@pytest.fixture(scope="module")
def upstream(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with simulated_upstream(tmp_path_factory.mktemp("upstream")) as base_url:
        yield base_url


def outcome_after_restart(folder: Path, upstream: str, stream_id: str) -> str:
    with daemon(folder, upstream) as again:
        return again.ask(outcome_of(stream_id))


def test_sigterm_lets_streams_end(tmp_path: Path, upstream: str) -> None:
    """Within the grace a live stream ends by itself, its watcher sees it end, and nothing new is started; exit 0."""
    with daemon(tmp_path, upstream, "--grace", "20") as process:

        async def watch(client: ControlClient) -> str:
            model = "sim/paced?tokens=60&interval_s=0.02"
            started = await client.start("sim", {"model": model})
            text = ""
            async with client.subscribe(started.id, view="text") as events:
                async for event in events:
                    if not text and event.text:
                        process.signal(signal.SIGTERM)
                        with pytest.raises(RequestError, match="draining"):  # until the signal is there
                            while True:
                                await client.start("sim", {"model": "sim/ok"}, key="late")
                    text += event.text
            assert text == Script(tokens=60).expected_text()
            outcome = await client.wait(started.id)
            assert outcome is not None
            assert outcome.reason == "stop"
            return started.id

        stream_id = process.ask(watch)
        assert process.wait() == 0
    assert outcome_after_restart(tmp_path, upstream, stream_id) == "completed(stop)"


def test_sigterm_cancels_what_is_left(tmp_path: Path, upstream: str) -> None:
    """After the grace the rest is cancelled(shutdown), recorded, and its watchers are told; exit 0."""
    with daemon(tmp_path, upstream, "--grace", "0.2") as process:
        stream_id = process.ask(start_stream("sim/endless"))

        async def watch(client: ControlClient) -> str:
            async with client.subscribe(stream_id, after="tail") as events:
                process.signal(signal.SIGTERM)
                last = [event async for event in events][-1]
            assert last.outcome is not None
            return f"{last.outcome['state']}({last.outcome['reason']}) by {last.outcome['actor']}"

        assert process.ask(watch) == "cancelled(shutdown) by SIGTERM"
        assert process.wait() == 0
    assert outcome_after_restart(tmp_path, upstream, stream_id) == "cancelled(shutdown)"


@pytest.mark.parametrize("first", [signal.SIGINT, signal.SIGTERM])
def test_a_further_sigint_aborts(tmp_path: Path, upstream: str, first: int) -> None:
    """SIGINT while draining cancels what is live at once, with outcomes; exit 130. A SIGTERM more changes nothing."""
    with daemon(tmp_path, upstream, "--grace", "1000") as process:
        stream_id = process.ask(start_stream("sim/endless"))
        process.signal(first)
        wait_for_text(tmp_path / "daemon.log", "draining for at most 1000 s")
        process.signal(signal.SIGTERM)
        assert process.ask(lambda client: client.get(stream_id)).state == "streaming"
        process.signal(signal.SIGINT)
        assert process.wait() == 130
    assert outcome_after_restart(tmp_path, upstream, stream_id) == "cancelled(shutdown)"


def test_sighup_reopens_the_log(tmp_path: Path, upstream: str) -> None:
    """After a rotation and SIGHUP the log goes on in a new file, and the streams go on."""
    log = tmp_path / "my.log"
    with daemon(tmp_path, upstream, "--log-file", str(log), "--log-format", "json") as process:
        stream_id = process.ask(start_stream("sim/endless"))
        log.rename(tmp_path / "my.log.1")
        process.signal(signal.SIGHUP)
        wait_for_text(log, "reopened")
        assert process.ask(lambda client: client.get(stream_id)).state == "streaming"
    lines = [
        json.loads(line)
        for path in ("my.log.1", "my.log")
        for line in (tmp_path / path).read_text().splitlines()
    ]
    assert "listening" in lines[0]["message"]
    assert lines[-1]["message"] == "stopped"


def test_shutdown_over_the_channel(tmp_path: Path, upstream: str) -> None:
    """`supervisor.shutdown` is a SIGTERM with its own grace; the client is told 4000, come back later."""
    with daemon(tmp_path, upstream) as process:

        async def ask(client: ControlClient) -> int | None:
            started = await client.start("sim", {"model": "sim/endless"})
            await client.shutdown(grace_s=0)
            with pytest.raises(ControlClosedError) as caught:
                await client.wait("nobody") if await client.wait(started.id) is None else await _until_closed(
                    client
                )
            return caught.value.code

        assert process.ask(ask) == 4000
        assert process.wait() == 0


async def _until_closed(client: ControlClient) -> None:
    while True:
        await client.health()


def test_ready(tmp_path: Path, upstream: str) -> None:
    """The ready line and file say where it listens and hold no secret; the file goes when the daemon does."""
    path = tmp_path / "ready.json"
    with daemon(tmp_path, upstream, "--ready-file", str(path)) as process:
        said = json.loads(path.read_text())
        assert said == process.said
        assert (process.process.pid, True, ["sim"]) == (
            said["pid"],
            said["token_required"],
            said["upstreams"],
        )
        assert said["url"].startswith("ws://127.0.0.1:")
        process.signal(signal.SIGTERM)
        assert process.wait() == 0
        assert not path.exists()
        assert not list(tmp_path.glob(".ready*"))


def serve(*options: str, **more: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "supervisor.cli", "serve", *options]
    return subprocess.run(
        command, env=environment(**more), capture_output=True, text=True, timeout=STOP_S, check=False
    )


def test_what_cannot_be_served(tmp_path: Path, upstream: str) -> None:
    """Beyond loopback without a token, a bad token file: exit 2. A port or a store in use, a broken file: exit 1."""
    with daemon(tmp_path, upstream) as process:
        port, store = process.url.rpartition(":")[2], str(tmp_path / "streams.db")
        broken = tmp_path / "broken.db"
        broken.write_bytes(b"this is not a database" * 1000)
        for options, code, said in (
            (["--host", "0.0.0.0", "--port", "0", "--store", ":memory:"], 2, "token"),
            (["--token-file", str(tmp_path / "missing"), "--store", ":memory:"], 2, "missing"),
            (["--port", "99999"], 2, "--port"),
            (["--config", str(tmp_path / "missing.toml")], 2, "missing.toml"),
            (
                ["--port", port, "--store", ":memory:"],
                1,
                f"cannot listen on 127.0.0.1:{port}: Address already in use",
            ),
            (["--port", port, "--store", ":memory:"], 1, "--port takes another"),
            (
                ["--host", "::1%none", "--port", "0", "--store", ":memory:"],
                1,
                "cannot listen on [::1%none]:0: ",
            ),
            (["--port", "0", "--store", store], 1, "streams.db"),
            (["--port", "0", "--store", str(broken)], 1, "broken.db"),
            (["--port", "0", "--store", "/nowhere/at/all.db"], 1, "/nowhere"),
            (["--port", "0", "--store", ":memory:", "--log-file", "/nowhere/log"], 1, "/nowhere"),
        ):
            done = serve(*options)
            assert (code, "") == (done.returncode, done.stdout), done.stderr
            assert said in done.stderr
            assert "Traceback" not in done.stderr


def test_credentials_are_looked_for_at_start(tmp_path: Path, upstream: str) -> None:
    """A start on an upstream whose credential is missing is refused, naming the variable; others work."""
    config = f'[upstreams.other]\nbase_url = {json.dumps(upstream)}\napi_key_env = "NOT_SET"\n'
    with daemon(tmp_path, upstream, "--store", ":memory:", config=config) as process:

        async def ask(client: ControlClient) -> None:
            with pytest.raises(RequestError, match="NOT_SET"):
                await client.start("other", {"model": "sim/ok"})
            with pytest.raises(RequestError, match="sim"):
                await client.start("simm", {"model": "sim/ok"})
            await client.start("sim", {"model": "sim/ok"})

        process.ask(ask)


def test_a_simulated_upstream(tmp_path: Path) -> None:
    """`serve --simulated` needs no key: its upstream answers at a pace; a configured one of its name is refused."""
    errors = tmp_path / "daemon.log"
    command = [sys.executable, "-m", "supervisor.cli", "serve", "--simulated", "--json", "--port", "0"]
    routed = tmp_path / "routed.toml"
    routed.write_text('[[gateway.routes]]\nupstream = "simulated"\n')
    command += ["--web-port", "0", "--config", str(routed)]
    process = Daemon([*command, "--store", ":memory:", "--grace", "0"], env=environment(), errors=errors)
    try:
        assert process.said["upstreams"] == ["simulated"]
        for model, text in (
            ("sim/paced", Script(tokens=100).expected_text()),
            ("any", "This answer is simulated"),
        ):
            client = [sys.executable, "-m", "supervisor.cli", "start", "simulated", "--model", model, "Hello"]
            done = subprocess.run(
                [*client, "--url", process.url],
                env=environment(),
                capture_output=True,
                text=True,
                timeout=STOP_S,
                check=False,
            )
            assert done.returncode == 0, done.stderr
            assert done.stdout.startswith(text)
            assert "completed(stop)" in done.stderr

        async def leave_one_live(client: ControlClient) -> None:
            started = await client.start("simulated", {"model": "sim/endless"})
            await wait_events(client, started.id, 1)

        process.ask(leave_one_live, token=None)
        process.signal(signal.SIGTERM)
        assert process.wait() == 0
    finally:
        process.end()
    assert "no upstream is configured" not in errors.read_text()
    config = tmp_path / "taken.toml"
    config.write_text('[upstreams.simulated]\nbase_url = "http://127.0.0.1:1/v1"\n')
    done = serve("--simulated", "--config", str(config), "--store", ":memory:", "--port", "0")
    assert done.returncode == 2
    assert "--simulated" in done.stderr


def test_without_an_upstream(tmp_path: Path) -> None:
    """A daemon that can start nothing says so, and what to do about it."""
    errors = tmp_path / "daemon.log"
    command = [
        sys.executable,
        "-m",
        "supervisor.cli",
        "serve",
        "--json",
        "--port",
        "0",
        "--web-port",
        "none",
        "--store",
        ":memory:",
    ]
    process = Daemon(command, env=environment(), errors=errors)
    try:
        (line,) = [line for line in errors.read_text().splitlines() if "no upstream is configured" in line]
    finally:
        process.end()
    assert "WARNING" in line.upper()
    for way in ("OPENAI_API_KEY", "--config", "[upstreams.", "--simulated"):
        assert way in line


def test_retention(tmp_path: Path, upstream: str) -> None:
    """Ended streams beyond the configured number are removed from the store."""
    config = "[retention]\nmax_ended = 2\nsweep_every_s = 0.05\n[limits]\nmax_finished = 1\n"
    with daemon(tmp_path, upstream, config=config) as process:

        async def ask(client: ControlClient) -> None:
            ids = []
            for _ in range(5):
                started = await client.start("sim", {"model": "sim/ok"})
                await client.wait(started.id)
                ids.append(started.id)
            while [stream.id for stream in (await client.list()).streams] != ids[:2:-1]:
                await client.health()  # bounded by `ask`

        process.ask(ask)


@asynccontextmanager
async def serving(config: Config) -> AsyncIterator[str]:
    """Run a daemon in this process; give its URL."""
    told: list[Ready] = []
    is_ready = trio.Event()

    def ready(state: Ready) -> None:
        told.append(state)
        is_ready.set()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(lambda: run(config, environ={}, ready=ready))
        await is_ready.wait()
        yield told[0].url
        nursery.cancel_scope.cancel()


async def test_in_process() -> None:
    """`run` serves until cancelled, and raises plainly, not in a group, what it cannot use."""
    told: list[Ready] = []
    is_ready = trio.Event()

    def ready(state: Ready) -> None:
        told.append(state)
        is_ready.set()

    config = Config(
        store=StoreConfig(path=":memory:"),
        control=ControlConfig(port=0),
        web=WebConfig(port=0),
        discover=False,
    )
    with trio.fail_after(WAIT_S):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(lambda: run(config, environ={}, ready=ready))
            await is_ready.wait()
            async with connect(told[0].url) as client:
                assert (await client.health())["status"] == "ok"
            async with httpx.AsyncClient(trust_env=False) as http:
                assert str(told[0].http) in (await http.get(told[0].url.replace("ws:", "http:"))).text
            port = int(told[0].url.rpartition(":")[2])
            taken = attrs.evolve(config, control=ControlConfig(port=port))
            with pytest.raises(OSError, match=f"cannot listen on 127.0.0.1:{port}") as caught:
                await run(taken, environ={})
            assert caught.value.errno == errno.EADDRINUSE
            assert told[0].http is not None
            port = int(told[0].http.rpartition(":")[2])
            with pytest.raises(
                OSError, match=f"cannot listen on 127.0.0.1:{port}.* --web-port takes another"
            ):
                await run(attrs.evolve(config, web=WebConfig(port=port)), environ={})
            nursery.cancel_scope.cancel()
        for open_one in (
            attrs.evolve(config, control=ControlConfig(host="0.0.0.0", port=0)),
            attrs.evolve(config, web=WebConfig(host="0.0.0.0", port=0)),
        ):
            with pytest.raises(ConfigurationError, match="token"):
                await run(open_one, environ={})


PROMPTED: dict[str, tuple[str, dict[str, Any]]] = {
    "anthropic": (
        "/messages",
        {"model": "m-1", "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 4096, "stream": True},
    ),
    "cohere": ("/chat", {"model": "m-1", "messages": [{"role": "user", "content": "Hi"}], "stream": True}),
    "gemini": (
        "/models/m-1:streamGenerateContent?alt=sse",
        {"contents": [{"role": "user", "parts": [{"text": "Hi"}]}]},
    ),
    "gemini-jsonarray": (
        "/models/m-1:streamGenerateContent",
        {"contents": [{"role": "user", "parts": [{"text": "Hi"}]}]},
    ),
    "generic": ("/events", {"model": "m-1", "prompt": "Hi"}),
    "ollama": (
        "/api/chat",
        {"model": "m-1", "messages": [{"role": "user", "content": "Hi"}], "stream": True},
    ),
    "openai-chat": (
        "/chat/completions",
        {"model": "m-1", "messages": [{"role": "user", "content": "Hi"}], "stream": True},
    ),
    "openai-completions": ("/completions", {"model": "m-1", "prompt": "Hi", "stream": True}),
    "openai-responses": ("/responses", {"model": "m-1", "input": "Hi", "stream": True}),
}
"""What a provider of each dialect is asked, and where, when `Hi` is all there is."""


async def test_a_prompt_is_asked_as_each_dialect_has_it() -> None:
    """The daemon makes the request of a prompt and a model: every dialect's provider understands it and answers."""
    assert set(PROMPTED) == set(BUILTIN) - {"native"}
    with trio.fail_after(WAIT_S):
        async with SimulatedUpstream() as provider:
            config = Config(
                store=StoreConfig(path=":memory:"),
                control=ControlConfig(port=0),
                web=WebConfig(port=None),
                discover=False,
                upstreams=(
                    *(
                        Upstream(
                            name=name,
                            dialect=name,
                            base_url=provider.base_url,
                            path="/events" if name == "generic" else None,
                            proxy="direct",
                            models={"alias": "m-2"},
                        )
                        for name in PROMPTED
                    ),
                    Upstream(
                        name="runs", dialect="openai-assistants", base_url=provider.base_url, path="/runs"
                    ),
                ),
            )
            async with serving(config) as url, connect(url) as client:

                async def start(name: str, **given: Any) -> str:
                    params = StartParams(upstream=name, **given)
                    return (await client.call("stream.start", params, StartResult)).id

                for name, (target, body) in PROMPTED.items():
                    stream = await start(name, prompt="Hi", model="m-1")
                    outcome = await client.wait(stream)
                    assert outcome is not None
                    assert (name, outcome.state) == (name, "completed")
                    assert (await client.snapshot(stream)).text == Script().expected_text()
                    asked = provider.ledger[-1].request
                    assert (asked.target.removeprefix("/v1"), asked.json()) == (target, body)
                    assert (await client.get(stream)).meta == {"model": "m-1"}
                await client.wait(await start("openai-chat", request={"model": "x", "n": 1}, model="alias"))
                assert provider.ledger[-1].request.json() == {"model": "m-2", "n": 1, "stream": True}
                assert await start("generic", prompt="Hi")
                for name in set(PROMPTED) - {"generic"}:
                    with pytest.raises(RequestError, match="model: it is missing"):
                        await start(name, prompt="Hi")
                with pytest.raises(RequestError, match="words alone"):
                    await start("runs", prompt="Hi", model="m-1")


async def test_the_circuit_of_a_failing_upstream() -> None:
    """Streams share it: once it is open their retries are refused, first attempts go on, and `health` shows it."""
    started: list[Ready] = []
    is_ready = trio.Event()

    def ready(state: Ready) -> None:
        started.append(state)
        is_ready.set()

    with trio.fail_after(WAIT_S):
        async with SimulatedUpstream() as provider, trio.open_nursery() as nursery:
            config = Config(
                store=StoreConfig(path=":memory:"),
                control=ControlConfig(port=0),
                web=WebConfig(port=None),
                discover=False,
                circuit=CircuitPolicy(max_failures=2.5, backoff_s=3600, decay_s=3600),
                upstreams=(
                    Upstream(
                        name="sim",
                        base_url=provider.base_url,
                        proxy="direct",
                        retry=RetryPolicy(attempts=5, wait_initial_s=0, wait_max_s=0, jitter_s=0),
                    ),
                ),
            )
            nursery.start_soon(lambda: run(config, environ={}, ready=ready))
            await is_ready.wait()
            async with connect(started[0].url) as client:
                assert (await client.health())["circuits"] == {}
                attempts = []
                for model in ("sim/503?times=99", "sim/503?times=99", "sim/ok"):
                    outcome = await client.wait((await client.start("sim", {"model": model})).id)
                    assert outcome is not None
                    attempts.append((str(outcome.state), outcome.attempts))
                health = await client.health()
            nursery.cancel_scope.cancel()
    assert attempts == [("failed", 3), ("failed", 1), ("completed", 1)]
    circuit = health["circuits"]["sim"]
    assert (health["status"], circuit["state"], circuit["opened"]) == ("ok", "open", 1)
    assert (circuit["failures"], circuit["successes"]) == (
        pytest.approx(4, abs=0.1),
        pytest.approx(1, abs=0.1),
    )
    assert circuit["refused"] == 2


def test_nothing_secret_is_left(tmp_path: Path, upstream: str) -> None:
    """With everything logged, at debug, neither credential nor token is in the log or the store."""
    with daemon(tmp_path, upstream, "--log-level", "debug") as process:
        process.ask(start_stream("sim/ok"))
        process.ask(_use_badly)
    for path in tmp_path.iterdir():
        data = path.read_bytes()
        assert CREDENTIAL.encode() not in data, path
        assert path.name == "token" or TOKEN.encode() not in data, path


async def _use_badly(client: ControlClient) -> None:
    for model in (
        "sim/401?echo_credential=true",
        "sim/error?echo_credential=true",
        "sim/garbage-head",
        "sim/reset",
    ):
        started = await client.start("sim", {"model": model})
        await client.wait(started.id)


async def test_a_credential_that_is_missing_is_told_of_at_start(caplog: pytest.LogCaptureFixture) -> None:
    """A daemon starts with an upstream whose key is not there, and its log says so at once."""
    config = parse(
        'discover = false\n[upstreams.x]\nbase_url = "http://127.0.0.1:1"\napi_key_env = "X_KEY"\n'
    )
    config = attrs.evolve(
        config, store=StoreConfig(path=":memory:"), control=ControlConfig(port=0), web=WebConfig(port=None)
    )
    with trio.CancelScope() as scope:
        await run(config, environ={}, ready=lambda _: scope.cancel())
    assert "upstream x: credential env:X_KEY: '(not set)' is not valid" in caplog.text
