"""Clients that know nothing of us: curl, and a browser's EventSource."""

from __future__ import annotations

import re
import shlex
import shutil
import socket
from functools import partial
from pathlib import Path
from typing import Any, cast

import pytest
import trio
import trio.testing

from supervisor import daemon
from supervisor.config import parse
from supervisor.streams import Output
from supervisor.testing.upstream.script import PRESETS
from supervisor.web import events
from tests.e2e.browser import chromium
from tests.web.scene import Scene, scene
from tests.wire.whatwg import interpret

PAGE = """
(url) => new Promise((resolve) => {
  const source = new EventSource(url);
  const told = { text: "", opened: 0, outcomes: [] };
  source.onopen = () => { told.opened += 1; };
  source.addEventListener("text", (event) => { told.text += JSON.parse(event.data).text; });
  source.addEventListener("outcome", (event) => { told.outcomes.push(JSON.parse(event.data).outcome.state); });
  source.onerror = () => { if (source.readyState === EventSource.CLOSED) resolve(told); };
  setTimeout(() => resolve(told), 30000);
})
"""
CUTS = 3
ROOT = Path(__file__).resolve().parents[2]


def read_in_a_browser(front: Scene, stream_id: str) -> dict[str, object]:
    """Have a page read a stream's text until its EventSource gives up; return what it saw."""
    base = f"http://127.0.0.1:{front.server.ports[0]}"
    with chromium() as browser:
        page = browser.new_page()
        page.goto(f"{base}/healthz")
        told: dict[str, object] = page.evaluate(PAGE, f"{base}/streams/{stream_id}/events?view=text")
        return told


async def test_a_browser_reads_on_over_lost_connections_and_stops_at_the_end(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Cut off again and again, an EventSource shows the whole text once, and after the outcome it does not come again."""
    if shutil.which("chromium") is None:
        with chromium():  # says so, here: in a thread it would not be heard
            pass
    monkeypatch.setattr(events, "_RETRY_MS", 20)
    turns, turn = trio.open_memory_channel[int](CUTS)

    async def told(out: Output) -> None:
        async for number in turn:
            for part in range(10):
                await out.send(f"t{number}{part} ")

    expected = "".join(f"t{number}{part} " for number in range(CUTS) for part in range(10))
    seen: list[object] = []
    async with scene(within_s=60) as front:
        front.sources["told"] = told
        stream_id = await front.start("told")
        stream = front.supervisor.get(stream_id)

        async def read() -> None:
            seen.append(await trio.to_thread.run_sync(read_in_a_browser, front, stream_id))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(read)
            for number in range(CUTS):
                while not stream.info().readers:
                    await trio.testing.wait_all_tasks_blocked(0.01)
                turns.send_nowait(number)
                await trio.testing.wait_all_tasks_blocked(0.01)
                cut = front.server._connections - set(front.server.idle)
                for connection in cut:
                    connection._transport.socket.shutdown(socket.SHUT_RDWR)  # its descriptor stays its own
                while cut & front.server._connections:  # not until nobody reads: the page may be back already
                    await trio.testing.wait_all_tasks_blocked(0.01)
            turns.close()
        assert seen == [{"text": expected, "opened": CUTS + 1, "outcomes": ["completed"]}]


@pytest.mark.parametrize(("page", "told"), [("README.md", 2), ("docs/http.md", 3)])
async def test_curl_is_enough(monkeypatch: pytest.MonkeyPatch, page: str, told: int) -> None:
    """With the commands of a page, as they stand there, a stream of `serve --simulated` is started, read to its end and cancelled."""
    assert shutil.which("curl"), "curl is needed"
    monkeypatch.setitem(cast("dict[str, Any]", PRESETS), "paced", {"tokens": 100})  # not at its pace
    commands = re.findall(r"^curl .*$", (ROOT / page).read_text("utf-8"), re.MULTILINE)
    assert len(commands) == told
    config = parse(
        'discover = false\n[control]\nport = 0\n[web]\nport = 0\n[store]\npath = ":memory:"\n[shutdown]\ngrace_s = 0'
    )
    said = []
    up, down = trio.open_memory_channel[daemon.Ready](1)
    with trio.fail_after(30):
        async with trio.open_nursery() as nursery:
            run = partial(daemon.run, config, ready=up.send_nowait, simulated=True, environ={})
            nursery.start_soon(run)
            base = (await down.receive()).http
            assert base is not None
            for command in commands:
                words = shlex.split(command.replace("http://127.0.0.1:7434", base.rstrip("/")))
                assert "7434" not in "".join(words)
                done = await trio.run_process(
                    [*words, "--silent", "--show-error", "--fail-with-body", "--max-time", "10"],
                    capture_stdout=True,
                    check=False,
                )
                assert done.returncode == 0, done.stdout
                said.append(done.stdout)
            nursery.cancel_scope.cancel()
    started, read, *cancelled = said
    assert b'"created":true' in started
    events_read = interpret(read).events
    assert {event.event for event in events_read} == {"attempt", "text", "outcome"}
    assert b'"state":"completed"' in events_read[-1].data
    assert all(b'"already_terminal"' in one for one in cancelled)
