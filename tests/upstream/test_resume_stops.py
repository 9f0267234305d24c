"""Stops while an answer takes several attempts: who is told, what is still asked, and what of it may be shown."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import attrs
import pytest
import trio
import trio.testing

from supervisor.streams import Stream, open_supervisor
from supervisor.upstream import RetryPolicy, StreamTransport, Upstream
from supervisor.upstream.catalog import Credential
from supervisor.upstream.source import HttpSource
from tests.upstream.scripted import Peer, serve

SECRET = "sk-test-0123456789abcdef"
BACKGROUND = {"model": "m", "input": "count", "background": True}
CREATED = {"type": "response.created", "sequence_number": 0, "response": {"id": "resp_1", "status": "queued"}}
DELTA = {"type": "response.output_text.delta", "sequence_number": 1, "item_id": "i", "delta": "Hello there"}
DONE = {
    "type": "response.completed",
    "sequence_number": 2,
    "response": {"id": "resp_1", "status": "completed", "output": []},
}
STOPPED = b'{"id": "resp_1", "status": "cancelled", "usage": {"input_tokens": 3, "output_tokens": 4}}'


@pytest.fixture
def virtual() -> trio.testing.MockClock:
    """Waits between attempts take no time."""
    clock = trio.testing.MockClock()
    clock.autojump_threshold = 0.02
    return clock


@attrs.define
class Provider:
    """A provider whose answers are made by `answer`, of its requests so far; it keeps what it was asked."""

    answer: Callable[[Provider], bytes | None]
    """None: it does not answer."""
    asked: list[str] = attrs.field(factory=list)
    url: str = ""

    async def handle(self, peer: Peer) -> None:
        head, _ = await peer.request()
        self.asked.append(head.decode().split(" HTTP/")[0])
        answer = self.answer(self)
        if answer is not None:
            await peer.send(answer)
        if answer is None or b"Content-Length: 9999" in answer:
            await peer.closed()


def events(*told: dict[str, Any], cut: bool = False) -> bytes:
    """Say these events, and stay silent after them, or break off."""
    body = "".join(f"data: {json.dumps(event)}\n\n" for event in told).encode()
    return b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%s" % (len(body) + 1 if cut else 9999, body)


def whole(status: int, body: bytes) -> bytes:
    return b"HTTP/1.1 %d X\r\nContent-Length: %d\r\n\r\n%s" % (status, len(body), body)


@asynccontextmanager
async def providers(*made: Provider) -> AsyncIterator[None]:
    async with trio.open_nursery() as nursery:
        for provider in made:
            provider.url = f"http://127.0.0.1:{(await serve(nursery, provider.handle)).port}"
        yield
        nursery.cancel_scope.cancel()


def responses(provider: Provider, name: str = "one", **options: Any) -> Upstream:
    return Upstream(name=name, base_url=provider.url, dialect="openai-responses", **options)


async def first_text(stream: Stream) -> None:
    with stream.subscribe() as told:
        async for event in told:
            if event.text:
                return


# --- what the provider is told -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "answer",
    [
        whole(401, json.dumps({"error": {"message": f"Incorrect API key provided: {SECRET}"}}).encode()),
        b"HTTP/1.1 %s X\r\n\r\n" % SECRET.encode(),
    ],
    ids=["refused", "not HTTP"],
)
async def test_a_provider_that_repeats_the_credential_when_told_to_stop(
    answer: bytes, virtual: trio.testing.MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The outcome says that it has not stopped, and not what the credential is."""
    monkeypatch.setenv("A_KEY", SECRET)
    one = Provider(lambda self: events(CREATED, DELTA) if len(self.asked) == 1 else answer)
    async with providers(one), open_supervisor() as sup, StreamTransport(trust_env=False) as transport:
        upstream = responses(one, credential=Credential.from_env("A_KEY"))
        stream = await sup.start(HttpSource(upstream, BACKGROUND, transport=transport))
        await first_text(stream)
        await stream.cancel(mode="abort")
        outcome = await stream.wait()
    assert one.asked == ["POST /responses", "POST /responses/resp_1/cancel"]
    assert outcome.cleanup_error is not None
    assert "[credential removed]" in outcome.cleanup_error
    assert SECRET[:12] not in outcome.to_json().decode()


async def test_a_stop_while_another_upstream_is_asked(virtual: trio.testing.MockClock) -> None:
    """Told to stop, and asked what it used, is the provider whose answer there is; not the one that has not answered yet."""
    partial, gone, stopped = events(CREATED, DELTA, cut=True), whole(404, b"{}"), whole(200, STOPPED)
    one = Provider(lambda self: (partial, gone, stopped, stopped)[len(self.asked) - 1])
    two = Provider(lambda _: None)
    async with providers(one, two), open_supervisor() as sup, StreamTransport(trust_env=False) as transport:
        upstream = responses(one, fallback=[responses(two, "two")])
        policy = RetryPolicy(attempts=3, resume=("sequence", "restart"))
        stream = await sup.start(HttpSource(upstream, BACKGROUND, transport=transport, retry=policy))
        await trio.sleep(10)
        await stream.cancel(mode="abort")
        outcome = await stream.wait()
    assert outcome.rungs == ("sequence", "fallback")
    assert one.asked[2:] == ["POST /responses/resp_1/cancel", "GET /responses/resp_1"]
    assert two.asked == ["POST /responses"]
    assert outcome.cleanup_error is None
    assert outcome.usage is not None
    assert (outcome.usage.input, outcome.usage_quality) == (3, "provider_partial")


@pytest.mark.parametrize(
    ("stopping", "told", "waited"),
    [
        (whole(200, STOPPED), None, 1.0),
        (whole(500, b'{"error": "cannot stop"}'), "cannot stop", 1.0),
        (None, "it did not answer in time", 2.0),
    ],
    ids=["stopped", "refused", "silent"],
)
async def test_an_answer_that_another_takes_the_place_of_is_stopped(
    stopping: bytes | None, told: str | None, waited: float, virtual: trio.testing.MockClock
) -> None:
    """Its provider is told before the next attempt, which says so if it did not stop, and waits for it no longer than 2 s."""
    partial = events(CREATED, DELTA, cut=True)
    told_last: list[float] = []

    def answer(self: Provider) -> bytes | None:
        if self.asked[-1].endswith("/cancel"):
            return stopping
        told_last.append(trio.current_time())
        return partial if len(self.asked) == 1 else events(CREATED, DELTA, DONE)

    one = Provider(answer)
    async with providers(one), open_supervisor() as sup, StreamTransport(trust_env=False) as transport:
        policy = RetryPolicy(attempts=2, wait_initial_s=2.0, resume=("restart",))
        source = HttpSource(responses(one), BACKGROUND, transport=transport, retry=policy, draw=lambda: 0.5)
        stream = await sup.start(source)
        outcome = await stream.wait()
        with stream.subscribe() as all_events:
            made = [json.loads(one.payload) async for one in all_events if one.kind == "attempt"]
    assert one.asked == ["POST /responses", "POST /responses/resp_1/cancel", "POST /responses"]
    assert (outcome.state, outcome.rungs, stream.snapshot().text) == (
        "completed",
        ("restart",),
        "Hello there",
    )
    assert made[1].get("not_stopped") == told
    assert told_last[1] - told_last[0] == pytest.approx(waited, abs=0.5)


@pytest.mark.parametrize("rung", ["provider_error", "sequence"])
async def test_an_answer_that_need_not_be_stopped(rung: str, virtual: trio.testing.MockClock) -> None:
    """One that the provider ended, or that is gone on with, is left alone."""
    failed = {
        "type": "response.failed",
        "sequence_number": 2,
        "response": {"error": {"code": "server_error"}},
    }
    first = events(CREATED, DELTA, failed) if rung == "provider_error" else events(CREATED, DELTA, cut=True)
    again = events(CREATED, DELTA, DONE) if rung == "provider_error" else events(DONE)
    one = Provider(lambda self: first if len(self.asked) == 1 else again)
    async with providers(one), open_supervisor() as sup, StreamTransport(trust_env=False) as transport:
        policy = RetryPolicy(attempts=2, resume=("sequence", "restart"))
        stream = await sup.start(HttpSource(responses(one), BACKGROUND, transport=transport, retry=policy))
        outcome = await stream.wait()
    assert (outcome.state, stream.snapshot().text) == ("completed", "Hello there")
    assert [asked for asked in one.asked if "cancel" in asked] == []


async def test_an_answer_is_stopped_once(virtual: trio.testing.MockClock) -> None:
    """However many attempts it takes until another takes its place."""
    partial, full = events(CREATED, DELTA, cut=True), events(CREATED, DELTA, DONE)
    answers = (partial, whole(200, STOPPED), whole(503, b"{}"), full)
    one = Provider(lambda self: answers[len(self.asked) - 1])
    async with providers(one), open_supervisor() as sup, StreamTransport(trust_env=False) as transport:
        policy = RetryPolicy(attempts=3, resume=("restart",))
        stream = await sup.start(HttpSource(responses(one), BACKGROUND, transport=transport, retry=policy))
        outcome = await stream.wait()
    assert (outcome.state, outcome.rungs) == ("completed", ("restart", "restart"))
    assert [asked for asked in one.asked if "cancel" in asked] == ["POST /responses/resp_1/cancel"]


async def test_a_stop_while_an_answer_is_given_up(virtual: trio.testing.MockClock) -> None:
    """The provider that has not answered the first time is told again, within the cleanup time; no other attempt is made."""
    partial = events(CREATED, DELTA, cut=True)
    one = Provider(lambda self: (partial, None, whole(200, STOPPED))[len(self.asked) - 1])
    async with providers(one), open_supervisor() as sup, StreamTransport(trust_env=False) as transport:
        policy = RetryPolicy(attempts=3, wait_initial_s=10, wait_max_s=10, resume=("restart",))
        source = HttpSource(responses(one), BACKGROUND, transport=transport, retry=policy, draw=lambda: 0.5)
        stream = await sup.start(source)
        await trio.sleep(1)
        await stream.cancel(mode="abort")
        outcome = await stream.wait()
    assert one.asked[1:] == ["POST /responses/resp_1/cancel"] * 2
    assert (outcome.state, outcome.attempts, outcome.cleanup_error) == ("cancelled", 1, None)
    assert outcome.usage is not None
    assert (outcome.usage.output, outcome.usage_quality) == (4, "exact")


async def test_a_program_that_is_cancelled_stops_its_providers(virtual: trio.testing.MockClock) -> None:
    """The cancel of the program ends the stream like any stop, and the provider is told before it passes on."""
    one = Provider(lambda self: events(CREATED, DELTA) if len(self.asked) == 1 else whole(200, STOPPED))
    async with providers(one):
        with trio.CancelScope() as program:
            async with StreamTransport(trust_env=False) as transport, open_supervisor() as sup:
                stream = await sup.start(HttpSource(responses(one), BACKGROUND, transport=transport))
                await first_text(stream)
                program.cancel()
                await trio.sleep_forever()
        assert program.cancelled_caught
    assert one.asked == ["POST /responses", "POST /responses/resp_1/cancel"]
    outcome = stream.outcome
    assert outcome is not None
    assert (outcome.state, outcome.reason, outcome.actor) == ("cancelled", "shutdown", "parent")
    assert outcome.usage is not None
    assert (outcome.usage.output, outcome.usage_quality) == (4, "exact")


async def test_a_program_that_is_cancelled_and_has_closed_its_transport(
    virtual: trio.testing.MockClock,
) -> None:
    """The provider cannot be told; that is said, and the ending is the same."""
    one = Provider(lambda _: events(CREATED, DELTA))
    async with providers(one):
        transport = StreamTransport(trust_env=False)
        with trio.CancelScope() as program:
            async with open_supervisor() as sup:
                stream = await sup.start(HttpSource(responses(one), BACKGROUND, transport=transport))
                await first_text(stream)
                await transport.aclose()
                program.cancel()
                await trio.sleep_forever()
        assert program.cancelled_caught
    outcome = stream.outcome
    assert outcome is not None
    assert (outcome.state, outcome.reason, outcome.actor) == ("cancelled", "shutdown", "parent")
    assert outcome.cleanup_error is not None
    assert "could not be told to stop: this transport was closed" in outcome.cleanup_error


# --- what is no longer asked ---------------------------------------------------------------------------------------------


class Circuit:
    """A circuit that lets everything through, and keeps what it is told."""

    def __init__(self) -> None:
        self.told: list[str] = []

    def allows(self, now: float) -> bool:
        self.told.append("allows")
        return True

    def state(self, now: float) -> str:
        return "half_open"

    def succeeded(self, now: float) -> None:
        self.told.append("succeeded")

    def failed(self, now: float) -> None:
        self.told.append("failed")

    def abandoned(self, now: float) -> None:
        self.told.append("abandoned")


async def test_a_drain_before_the_next_attempt(virtual: trio.testing.MockClock) -> None:
    """The attempt that was being waited for is not made: there is no answer to be let end. Its circuit gets the trial back."""
    one, circuit = Provider(lambda _: whole(503, b"{}")), Circuit()
    async with providers(one), open_supervisor() as sup, StreamTransport(trust_env=False) as transport:
        source = HttpSource(
            Upstream(name="one", base_url=one.url),
            {"model": "m"},
            transport=transport,
            retry=RetryPolicy(wait_initial_s=20, wait_max_s=20),
            circuits=lambda _: circuit,
            draw=lambda: 0.5,
        )
        stream = await sup.start(source)
        await trio.sleep(2)
        result = await stream.cancel(mode="drain", drain_s=60, wait_s=100)
        outcome = await stream.wait()
    assert result.outcome == "won"
    assert (outcome.state, outcome.reason, outcome.attempts) == ("cancelled", "requested", 1)
    assert outcome.fault is not None
    assert outcome.fault.status == 503
    assert len(one.asked) == 1
    assert circuit.told == ["failed", "allows", "abandoned"]


@pytest.mark.parametrize("state", ["closed", "half_open"])
async def test_an_attempt_that_delivers_counts_once(state: str, virtual: trio.testing.MockClock) -> None:
    """At its first event where a circuit waits for that, else at its end; never both, or failures would be outweighed."""
    circuit = Circuit()
    circuit.state = lambda now: state  # type: ignore[method-assign]  # what this test is about
    one = Provider(lambda _: events(CREATED, DELTA, DONE))
    async with providers(one), open_supervisor() as sup, StreamTransport(trust_env=False) as transport:
        source = HttpSource(responses(one), BACKGROUND, transport=transport, circuits=lambda _: circuit)
        stream = await sup.start(source)
        await stream.wait()
    assert circuit.told == ["succeeded"]


async def test_a_drain_before_the_first_attempt(virtual: trio.testing.MockClock) -> None:
    """Nothing is asked for a stream that is stopped before it has begun, in whatever mode."""
    one = Provider(lambda _: whole(200, b"data: [DONE]\n\n"))
    async with providers(one), open_supervisor() as sup, StreamTransport(trust_env=False) as transport:
        upstream = Upstream(name="one", base_url=one.url)
        stream = await sup.start(HttpSource(upstream, {"model": "m"}, transport=transport))
        result = await stream.cancel(mode="drain", wait_s=60)
        outcome = await stream.wait()
    assert result.outcome == "won"
    assert (outcome.state, outcome.reason, outcome.attempts) == ("cancelled", "requested", 0)
    assert (outcome.fault, one.asked) == (None, [])
