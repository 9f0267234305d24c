"""HTTP of a real daemon: it ends with its readers told, and what was read goes on after a crash."""

from __future__ import annotations

import json
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from supervisor.testing.upstream import Script
from tests.e2e.processes import TOKEN, WAIT_S, Daemon, daemon, simulated_upstream
from tests.wire.whatwg import Interpretation, interpret

HEADERS = {"authorization": f"Bearer {TOKEN}"}


@pytest.fixture(scope="module")
def upstream(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with simulated_upstream(tmp_path_factory.mktemp("upstream")) as base_url:
        yield base_url


def client(process: Daemon) -> httpx.Client:
    return httpx.Client(base_url=process.http, headers=HEADERS, timeout=WAIT_S, trust_env=False)


def start(asking: httpx.Client, model: str) -> str:
    answer = asking.post("/streams", json={"upstream": "sim", "request": {"model": model, "messages": []}})
    assert answer.status_code == 201, answer.text
    return str(answer.json()["id"])


def text_of(found: Interpretation) -> str:
    return "".join(json.loads(event.data).get("text", "") for event in found.events)


def test_a_daemon_that_ends_tells_its_readers(tmp_path: Path, upstream: str) -> None:
    """SIGTERM: a stream ends within the grace, its reader over HTTP gets the outcome, idle connections hold nothing up; exit 0."""
    with (
        daemon(tmp_path, upstream, "--grace", "20") as process,
        client(process) as asking,
        client(process) as idle,
    ):
        assert idle.get("/healthz").json() == {"status": "ok"}
        assert httpx.get(f"{process.http}/streams", trust_env=False).status_code == 401
        stream_id = start(asking, "sim/paced?tokens=30&interval_s=0.02")
        body = b""
        with asking.stream("GET", f"/streams/{stream_id}/events?view=text") as answer:
            for chunk in answer.iter_bytes():
                if b"event: text" in chunk and b"event: text" not in body:
                    process.signal(signal.SIGTERM)
                body += chunk
                over = time.monotonic()
        found = interpret(body)
        assert text_of(found) == Script(tokens=30).expected_text()
        assert found.events[-1].event == "outcome"
        assert process.wait() == 0
        assert time.monotonic() - over < 3


def test_a_reader_goes_on_after_a_crash(tmp_path: Path, upstream: str) -> None:
    """After SIGKILL a reader that comes again with its last id gets what is durable, and how the stream ended, once."""
    seen = b""
    with daemon(tmp_path, upstream) as process, client(process) as asking:
        stream_id = start(asking, "sim/paced?tokens=1000&interval_s=0.01")
        try:
            with asking.stream("GET", f"/streams/{stream_id}/events?view=text") as answer:
                for chunk in answer.iter_bytes():
                    seen += chunk
                    if seen.count(b"event: text") > 20:
                        process.signal(signal.SIGKILL)
        except httpx.RemoteProtocolError:
            pass
        process.wait()
    first = interpret(seen)
    with daemon(tmp_path, upstream) as again, client(again) as asking:
        answer = asking.get(
            f"/streams/{stream_id}/events?view=text", headers={"last-event-id": first.last_event_id}
        )
        rest = interpret(answer.content)
        whole: dict[str, Any] = asking.get(f"/streams/{stream_id}/snapshot").json()
        assert (
            asking.get(
                f"/streams/{stream_id}/events", headers={"last-event-id": rest.last_event_id}
            ).status_code
            == 204
        )
    kinds = [event.event for event in rest.events]
    assert kinds.count("outcome") == 1
    assert json.loads(rest.events[-1].data)["outcome"]["reason"] == "interrupted"
    together = text_of(rest) if kinds[0] == "gap" else text_of(first) + text_of(rest)
    assert together == whole["text"]
    assert Script(tokens=1000).expected_text().startswith(together)


def test_a_daemon_without_http(tmp_path: Path, upstream: str) -> None:
    """With `--web-port none` nothing is served over HTTP, and the ready line says so."""
    with daemon(tmp_path, upstream, "--store", ":memory:", "--web-port", "none") as process:
        assert process.said["http"] is None
