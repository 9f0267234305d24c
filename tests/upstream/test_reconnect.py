"""Event streams that are asked for again by the standard's rules: ids, reconnection times, 204, redirects."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import attrs
import pytest
import trio
import trio.testing

from supervisor.dialects.generic import generic
from supervisor.stores import Event
from supervisor.streams import Outcome, Stream, open_supervisor
from supervisor.testing import Script, SimulatedUpstream
from supervisor.upstream import RetryPolicy, StreamTransport, Upstream
from supervisor.upstream.source import HttpSource
from supervisor.wire.event import WireEvent
from supervisor.wire.sse import SSEDecoder
from tests.cases import cases_dir
from tests.upstream.scripted import Peer, serve

POLICY = RetryPolicy(attempts=4, wait_initial_s=1.0, wait_max_s=4.0)
FEED = generic("feed", method="GET")


@pytest.fixture
def virtual() -> trio.testing.MockClock:
    """Waits between attempts take no time."""
    clock = trio.testing.MockClock()
    clock.autojump_threshold = 0.02
    return clock


@attrs.define
class Run:
    outcome: Outcome
    events: list[Event]
    requests: list[tuple[float, dict[str, str]]]
    """When each came, and its header fields with the request line as `:request`."""
    stream: Stream

    @property
    def ending(self) -> tuple[str, str]:
        return str(self.outcome.state), self.outcome.reason


@asynccontextmanager
async def play(
    script: list[dict[str, Any]],
    request: dict[str, Any] | None = None,
    *,
    policy: RetryPolicy = POLICY,
    **options: Any,
) -> AsyncIterator[Run]:
    """Serve a script, an entry a request (past its end: 204), to a stream, and give what came of it."""
    requests: list[tuple[float, dict[str, str]]] = []

    async def handle(peer: Peer) -> None:
        head, _ = await peer.request()
        first, *lines = head.decode("latin-1").split("\r\n")
        fields = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
        requests.append((trio.current_time(), {":request": first, **fields}))
        entry = script[len(requests) - 1] if len(requests) <= len(script) else {"status": 204}
        status = entry.get("status", 200)
        location = f"Location: {entry['location']}\r\n" if "location" in entry else ""
        body = entry.get("send", "").encode()
        length = "" if status == 204 else f"Content-Length: {len(body) + (entry.get('then') == 'drop')}\r\n"
        await peer.send(
            f"HTTP/1.1 {status} X\r\nContent-Type: text/event-stream\r\n{location}{length}Connection: close\r\n\r\n".encode()
        )
        await peer.send(body)

    async with trio.open_nursery() as nursery:
        server = await serve(nursery, handle)
        async with open_supervisor() as sup, StreamTransport(trust_env=False) as transport:
            options.setdefault("dialect", FEED)
            upstream = Upstream(name="u", base_url=f"http://127.0.0.1:{server.port}", path="/feed", **options)
            source = HttpSource(upstream, request or {}, transport=transport, retry=policy, draw=lambda: 0.5)
            stream = await sup.start(source)
            outcome = await stream.wait()
            with stream.subscribe() as told:
                events = [event async for event in told]
            yield Run(outcome, events, requests, stream)
        nursery.cancel_scope.cancel()


def cases() -> list[dict[str, Any]]:
    return json.loads((cases_dir() / "sse_reconnect_cases.json").read_text("utf-8"))


@pytest.mark.parametrize("case", cases(), ids=lambda case: case["name"])
async def test_published_reconnect_cases(case: dict[str, Any], virtual: trio.testing.MockClock) -> None:
    """What each request must carry, when it must come, which events come of it all, and when there is no other request."""
    script = case["script"]
    async with play(script) as run:
        for number, entry in enumerate(script):
            for name, value in entry.get("expect_request", {}).items():
                assert run.requests[number][1].get(name) == value
            if "expect_delay_ms" in entry:
                waited = run.requests[number][0] - run.requests[number - 1][0]
                wanted = entry["expect_delay_ms"] / 1000
                assert abs(waited - wanted) <= wanted * entry["tolerance"]
        if "expected" in case:
            decoded: list[WireEvent] = []
            decoder = SSEDecoder()
            for entry in script:
                decoded += decoder.feed(entry.get("send", "").encode())
            told = [event for event in run.events if event.kind == "data"]
            assert [event["data"] for event in case["expected"]] == [event.payload.decode() for event in told]
            assert [event["id"] for event in case["expected"]] == [event.id for event in decoded]
        if script[0].get("status", 200) != 200:
            assert len(run.requests) == 1
            assert run.outcome.state == "failed"
        else:
            # The 204 after the script's end: with an id it says that there is nothing after that event.
            complete = bool(run.requests[-1][1].get("last-event-id"))
            assert run.ending == (("completed", "done") if complete else ("failed", "truncated"))


async def test_an_id_stays_the_last_until_there_is_another(virtual: trio.testing.MockClock) -> None:
    """Over connections that send none; the standard keeps it with the stream, not with the connection."""
    script = [
        {"send": "id: 7\ndata: a\n\n"},
        {"send": "data: b\n\n", "then": "drop"},
        {"send": "retry: 9000\nid: 8\ndata: c\n\n"},
        {"send": "data: d\n\n"},
    ]
    policy = attrs.evolve(POLICY, attempts=9)
    async with play(script, policy=policy) as run:
        ids = [fields.get("last-event-id") for _, fields in run.requests]
        assert ids == [None, "7", "7", "8", "8"]
        assert run.stream.snapshot().text == "abcd"
        times = [at for at, _ in run.requests]
        assert times[3] - times[2] == pytest.approx(9, abs=0.2)
        assert times[4] - times[3] == pytest.approx(9, abs=0.2)  # so does the reconnection time


async def test_an_answer_without_ids_is_not_asked_for_again(virtual: trio.testing.MockClock) -> None:
    """A POST would have the model begin anew, and the text would be doubled: it is truncated instead."""
    async with play([{"send": "data: Hello\n\n"}], {"prompt": "hi"}, dialect=generic("answers")) as run:
        assert run.ending == ("failed", "truncated")
        assert len(run.requests) == 1
        assert run.stream.snapshot().text == "Hello"


async def test_an_answer_with_ids_is(virtual: trio.testing.MockClock) -> None:
    """A server that gives ids can be asked for what follows one: the same request, with the id."""
    script = [
        {"send": "id: 1\ndata: Hello\n\n", "then": "drop"},
        {"send": "id: 2\ndata:  there\n\ndata: [DONE]\n\n"},
    ]
    async with play(script, {"prompt": "hi"}, dialect=generic("answers")) as run:
        assert run.ending == ("completed", "done")
        assert [fields[":request"].split(" ")[0] for _, fields in run.requests] == ["POST", "POST"]
        assert run.requests[1][1]["last-event-id"] == "1"
        assert run.requests[1][1][":request"] == run.requests[0][1][":request"]
        assert run.stream.snapshot().text == "Hello there"
        assert run.outcome.rungs == ("sequence",)


async def test_a_server_that_begins_anew(virtual: trio.testing.MockClock) -> None:
    """It does not know `Last-Event-ID`: what it sends again is not joined to what there is; with leave the answer is restarted."""
    again = [{"send": "id: 1\ndata: a\n\nid: 2\ndata: b\n\n", "then": "drop"}] * 2
    script = [*again, {"send": "id: 1\ndata: a\n\nid: 2\ndata: b\n\nid: 3\ndata: c\n\ndata: [DONE]\n\n"}]
    async with play(script) as run:
        assert run.ending == ("failed", "truncated")
        assert run.stream.snapshot().text == "ab"
        assert len(run.requests) == 2
        assert "began its event stream anew" in run.outcome.message
    async with play(script, policy=attrs.evolve(POLICY, resume=("sequence", "restart"))) as run:
        assert run.ending == ("completed", "done")
        assert run.stream.snapshot().text == "abc"
        assert run.outcome.rungs == ("sequence", "restart")


async def test_a_204_without_an_id_says_nothing_of_the_answer(virtual: trio.testing.MockClock) -> None:
    """The server was not told what there was, so it cannot say that this was all."""
    async with play([{"send": "data: half\n\n"}]) as run:
        assert run.ending == ("failed", "truncated")
        assert len(run.requests) == 2
        assert "no end marker" in run.outcome.message


async def test_a_policy_without_the_rung(virtual: trio.testing.MockClock) -> None:
    """Is obeyed by feeds as well."""
    async with play([{"send": "id: 1\ndata: x\n\n"}], policy=attrs.evolve(POLICY, resume=())) as run:
        assert run.ending == ("failed", "truncated")
        assert len(run.requests) == 1


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
async def test_a_feed_may_move_on_its_host(status: int, virtual: trio.testing.MockClock) -> None:
    """A GET is redirected there, with its headers; the attempt is the same one."""
    script = [{"status": status, "location": "/elsewhere?x=1"}, {"send": "data: a\n\ndata: [DONE]\n\n"}]
    async with play(script) as run:
        assert run.ending == ("completed", "done")
        assert run.requests[1][1][":request"] == "GET /elsewhere?x=1 HTTP/1.1"
        assert run.outcome.attempts == 1


@pytest.mark.parametrize(
    "location",
    ["", "http://127.0.0.1:9/feed", "//127.0.0.1:9/feed", "https://127.0.0.1/feed", "http://[", "ftp:x"],
)
async def test_where_a_feed_may_not_move(location: str, virtual: trio.testing.MockClock) -> None:
    """To another host, port or scheme, or to nowhere: the fault says so, and nobody else is asked."""
    async with play([{"status": 301, "location": location}]) as run:
        assert run.ending == ("failed", "http_status")
        assert len(run.requests) == 1
        assert "redirect" in run.outcome.message


async def test_redirects_in_a_circle(virtual: trio.testing.MockClock) -> None:
    """End after a few."""
    async with play([{"status": 302, "location": "/feed"}] * 50) as run:
        assert run.ending == ("failed", "http_status")
        assert len(run.requests) == 6
        assert "more than 5 times" in run.outcome.message


async def test_a_post_is_not_redirected(virtual: trio.testing.MockClock) -> None:
    """Not even on its host: most clients would make a GET of it."""
    async with play([{"status": 307, "location": "/there"}], {"a": 1}, dialect=generic("answers")) as run:
        assert run.ending == ("failed", "http_status")
        assert len(run.requests) == 1


@pytest.mark.parametrize("at", range(1, 9))
async def test_the_simulated_endpoint_drops_at_each_event(at: int, virtual: trio.testing.MockClock) -> None:
    """The text is whole, each part told once, and each request carries the id of the last event."""
    whole = Script(text="One two three four five.", retry_ms=1500)
    async with (
        SimulatedUpstream(default=whole) as up,
        open_supervisor() as sup,
        StreamTransport(trust_env=False) as transport,
    ):
        up.enqueue(attrs.evolve(whole, fault="drop", at_event=at))
        upstream = Upstream(name="u", base_url=up.base_url, path="/events", dialect=FEED)
        stream = await sup.start(HttpSource(upstream, {}, transport=transport, retry=POLICY))
        outcome = await stream.wait()
        assert outcome.state == "completed", outcome
        assert stream.snapshot().text == whole.text
        assert (await stream.read_snapshot()).text == whole.text
        if outcome.attempts == 2:
            assert up.requests[1].header("last-event-id") == str(at)
            assert up.ledger[1].resumed_after == at


async def test_an_upstream_is_not_asked_by_anothers_event_id(virtual: trio.testing.MockClock) -> None:
    """What a fallback has sent is its own to number: it is asked from its beginning, however often, in its own time."""
    asked: dict[str, list[tuple[float, str | None]]] = {"one": [], "two": []}

    def handler(name: str, *answers: bytes) -> Any:
        async def handle(peer: Peer) -> None:
            head, _ = await peer.request()
            named = [line for line in head.decode().split("\r\n") if line.startswith("Last-Event-ID:")]
            asked[name].append((trio.current_time(), named[0] if named else None))
            await peer.send(answers[len(asked[name]) - 1])

        return handle

    dead = b"HTTP/1.1 %d X\r\nContent-Length: 0\r\n\r\n"
    stream = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nConnection: close\r\n\r\n"
    async with trio.open_nursery() as nursery:
        one = await serve(nursery, handler("one", stream + b"retry: 30000\nid: 5\n\n", dead % 404))
        two = await serve(nursery, handler("two", dead % 503, stream + b"data: hi\n\ndata: [DONE]\n\n"))
        async with open_supervisor() as sup, StreamTransport(trust_env=False) as transport:
            first, second = (
                Upstream(
                    name=f"u{server.port}", base_url=f"http://127.0.0.1:{server.port}", dialect=FEED, path="/"
                )
                for server in (one, two)
            )
            upstream = attrs.evolve(first, fallback=[second])
            told = await sup.start(HttpSource(upstream, {}, transport=transport, retry=POLICY))
            outcome = await told.wait()
        nursery.cancel_scope.cancel()
    assert [named for _, named in asked["one"]] == [None, "Last-Event-ID: 5"]
    assert [named for _, named in asked["two"]] == [None, None]
    assert asked["two"][1][0] - asked["two"][0][0] < 10
    assert (outcome.state, outcome.rungs, told.snapshot().text) == (
        "completed",
        ("sequence", "fallback", "retry"),
        "hi",
    )
