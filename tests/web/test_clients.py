"""Clients that know nothing of us: curl, and a browser's EventSource."""

from __future__ import annotations

import re
import shlex
import shutil
from pathlib import Path

import pytest
import trio
import trio.testing

from supervisor.streams import Output
from supervisor.web import events
from tests.e2e.browser import chromium
from tests.web.scene import Scene, scene, ten
from tests.wire.whatwg import interpret

PAGE = """
(url) => new Promise((resolve) => {
  const source = new EventSource(url);
  const told = { text: "", opened: 0, outcomes: [] };
  source.onopen = () => { told.opened += 1; };
  source.addEventListener("text", (event) => { told.text += JSON.parse(event.data).text; });
  source.addEventListener("outcome", (event) => { told.outcomes.push(JSON.parse(event.data).outcome.state); });
  source.onerror = () => { if (source.readyState === EventSource.CLOSED) resolve(told); };
})
"""
CUTS = 3
PAGE_OF_DOCS = Path(__file__).resolve().parents[2] / "docs" / "http.md"


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
                for connection in front.server._connections - set(front.server.idle):
                    connection._transport.socket.close()
                while stream.info().readers:
                    await trio.testing.wait_all_tasks_blocked(0.01)
            turns.close()
        assert seen == [{"text": expected, "opened": CUTS + 1, "outcomes": ["completed"]}]


async def test_curl_is_enough() -> None:
    """With the commands of docs/http.md, as they stand there, a stream is started, read to its end and cancelled."""
    assert shutil.which("curl"), "curl is needed"
    commands = re.findall(r"^curl .*$", PAGE_OF_DOCS.read_text("utf-8"), re.MULTILINE)
    assert len(commands) == 3
    said = []
    async with scene() as front:
        front.sources["simulated"] = ten
        for command in commands:
            base = f"http://127.0.0.1:{front.server.ports[0]}"
            words = shlex.split(command.replace("http://127.0.0.1:7434", base))
            done = await trio.run_process(
                [*words, "--silent", "--show-error", "--fail", "--max-time", "10"], capture_stdout=True
            )
            said.append(done.stdout)
    started, read, cancelled = said
    assert b'"created":true' in started
    assert [event.event for event in interpret(read).events] == ["text", "outcome"]
    assert b'"already_terminal"' in cancelled
