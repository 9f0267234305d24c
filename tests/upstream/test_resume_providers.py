"""Every rung at each provider that has it, dropped at each event of an answer: nothing lost, nothing doubled, nothing silent."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import attrs
import pytest
import trio
import trio.testing

from supervisor.dialects import Usage, find
from supervisor.streams import Cursor, Deadlines, Stream, Supervisor, open_supervisor
from supervisor.streams.attempts import Refold
from supervisor.testing import Script, SimulatedUpstream
from supervisor.upstream import RetryPolicy, StreamTransport, Upstream
from supervisor.upstream.source import HttpSource
from tests.upstream.scripted import Peer, serve

POLICY = RetryPolicy(attempts=6, wait_initial_s=1.0, wait_max_s=4.0, resume=("sequence", "continuation"))
TEXT = "One two three, four - fünf! And six."
INPUT = [{"role": "user", "content": "count"}]


@pytest.fixture
def virtual() -> trio.testing.MockClock:
    """Waits between attempts take no time."""
    clock = trio.testing.MockClock()
    clock.autojump_threshold = 0.02
    return clock


@attrs.define
class Bench:
    up: SimulatedUpstream
    sup: Supervisor
    transport: StreamTransport

    async def start(
        self, dialect: str, request: dict[str, Any], *, policy: RetryPolicy = POLICY, **options: Any
    ) -> Stream:
        deadlines = options.pop("deadlines", None)
        upstream = Upstream(name="sim", base_url=self.up.base_url, dialect=dialect, **options)
        source = HttpSource(upstream, request, transport=self.transport, retry=policy, draw=lambda: 0.5)
        return await self.sup.start(source, deadlines=deadlines)


@asynccontextmanager
async def bench(*scripts: Script) -> AsyncIterator[Bench]:
    async with SimulatedUpstream(default=scripts[-1]) as up:
        up.enqueue(*scripts[:-1])
        async with open_supervisor() as sup, StreamTransport(trust_env=False) as transport:
            yield Bench(up, sup, transport)
        with trio.fail_after(5):
            await up.wait_open(0)


async def attempts(stream: Stream) -> list[dict[str, Any]]:
    with stream.subscribe() as events:
        return [json.loads(event.payload) async for event in events if event.kind == "attempt"]


async def payloads(stream: Stream) -> list[dict[str, Any]]:
    with stream.subscribe() as events:
        return [json.loads(event.payload) async for event in events if event.kind == "data"]


async def check_text(stream: Stream, expected: str) -> None:
    """The live fold, a fold of the journal, and the texts of the events, read from any position on, all say the same."""
    assert stream.snapshot().text == expected
    refold = Refold(find(stream.dialect))
    with stream.subscribe() as events:
        told = [event async for event in events]
    for event in told:
        refold.apply(event)
    assert refold.fold.snapshot().text == expected
    if stream.snapshot().joined_at or stream.epoch > 1:
        return
    assert "".join([event.text for event in told]) == expected
    for after in told:
        with stream.subscribe(Cursor(after.epoch, after.seq), max_batch=3) as events:
            rest = [event.text async for event in events]
        assert rest == [event.text for event in told if event.seq > after.seq]


# --- sequence: OpenAI's background responses -------------------------------------------------------------------------


@pytest.mark.parametrize("at", range(1, 17))
async def test_a_background_response_goes_on_after_a_drop(at: int, virtual: trio.testing.MockClock) -> None:
    """Wherever the connection drops, each event is there once, in order, and the usage is the provider's own."""
    whole = Script(text=TEXT)
    async with bench(attrs.evolve(whole, fault="drop", at_event=at, times=1), whole) as b:
        stream = await b.start("openai-responses", {"model": "m", "input": INPUT, "background": True})
        outcome = await stream.wait()
        assert (outcome.state, outcome.reason) == ("completed", "completed")
        await check_text(stream, TEXT)
        numbers = [event["sequence_number"] for event in await payloads(stream)]
        assert numbers == list(range(len(numbers)))
        made = await attempts(stream)
        if outcome.attempts == 2:  # at the very end there was nothing left to drop
            assert made[1]["rung"] == "sequence"
            target = b.up.requests[1].target
            assert f"starting_after={at - 1}" in target
            assert b.up.requests[1].method == "GET"
        assert outcome.usage_quality == "exact"
        assert outcome.usage is not None
        assert outcome.epoch == 1


async def test_a_background_response_that_drops_again_and_again(virtual: trio.testing.MockClock) -> None:
    """Each attempt goes on from the last event of the journal."""
    whole = Script(text=TEXT)
    drops = [attrs.evolve(whole, fault="drop", at_event=at) for at in (3, 2, 1, 2)]
    async with bench(*drops, whole) as b:
        stream = await b.start("openai-responses", {"model": "m", "input": INPUT, "background": True})
        outcome = await stream.wait()
        assert outcome.state == "completed"
        assert outcome.rungs == ("sequence",) * (outcome.attempts - 1)
        assert outcome.attempts > 2
        await check_text(stream, TEXT)


async def test_a_resume_that_breaks_before_its_first_event(virtual: trio.testing.MockClock) -> None:
    """The next one asks for the same events again: after the last that is in the journal."""
    ids = {"item_id": "i", "output_index": 0, "content_index": 0}
    events = [
        {"type": "response.created", "response": {"id": "resp_1", "status": "in_progress"}},
        {"type": "response.output_text.delta", "delta": "Hello", **ids},
        {"type": "response.output_text.delta", "delta": " there", **ids},
        {"type": "response.completed", "response": {"id": "resp_1", "status": "completed", "output": []}},
    ]
    lines = [f"data: {json.dumps({**event, 'sequence_number': n})}\n\n" for n, event in enumerate(events)]
    targets: list[str] = []

    async def handle(peer: Peer) -> None:
        head, _ = await peer.request()
        targets.append(head.decode().split(" ")[1])
        body = "".join({1: lines[:2], 4: lines[2:]}.get(len(targets), [])).encode()
        if len(targets) == 2:
            await peer.send(b"HTTP/1.1 503 X\r\nContent-Length: 0\r\n\r\n")
        else:
            await peer.send(b"HTTP/1.1 200 OK\r\nContent-Length: 9999\r\n\r\n" + body)
        await peer.cut()

    async with trio.open_nursery() as nursery:
        server = await serve(nursery, handle)
        async with open_supervisor() as sup, StreamTransport(trust_env=False) as transport:
            url = f"http://127.0.0.1:{server.port}"
            upstream = Upstream(name="u", base_url=url, dialect=find("openai-responses"))
            request = {"model": "m", "input": INPUT, "background": True}
            stream = await sup.start(HttpSource(upstream, request, transport=transport, retry=POLICY))
            outcome = await stream.wait()
            assert (outcome.state, stream.snapshot().text) == ("completed", "Hello there")
        nursery.cancel_scope.cancel()
    again = "/responses/resp_1?stream=true&starting_after=1"
    assert targets == ["/responses", again, again, again]


@pytest.mark.parametrize("request_", [{}, {"background": True, "store": False}])
async def test_a_response_that_is_not_kept(request_: dict[str, Any], virtual: trio.testing.MockClock) -> None:
    """There is nothing to go on with, and no other rung is tried for it: the dialect takes no prefill."""
    async with bench(Script(text=TEXT, fault="drop", after=3)) as b:
        stream = await b.start("openai-responses", {"model": "m", "input": INPUT, **request_})
        outcome = await stream.wait()
        assert (outcome.state, outcome.reason, outcome.attempts) == ("failed", "truncated", 1)
        assert TEXT.startswith(stream.snapshot().text)


async def test_a_response_that_the_provider_has_forgotten(virtual: trio.testing.MockClock) -> None:
    """The partial answer stays, the ending says what broke it and that the rest could not be had."""
    script = Script(text=TEXT, fault="drop", after=3, expires_s=0.0)
    async with bench(script) as b:
        stream = await b.start("openai-responses", {"model": "m", "input": INPUT, "background": True})
        outcome = await stream.wait()
        assert (outcome.state, outcome.reason, outcome.attempts) == ("failed", "truncated", 2)
        assert "then sequence failed" in outcome.message
        assert stream.snapshot().text
    async with bench(script, Script(text=TEXT)) as b:
        policy = attrs.evolve(POLICY, resume=("sequence", "restart"))
        request = {"model": "m", "input": INPUT, "background": True}
        stream = await b.start("openai-responses", request, policy=policy)
        outcome = await stream.wait()
        assert (outcome.state, outcome.rungs) == ("completed", ("sequence", "restart"))
        assert stream.snapshot().text == TEXT


async def test_a_stop_stops_a_background_response_there(virtual: trio.testing.MockClock) -> None:
    """It is cancelled at the provider, which is then asked what it used."""
    async with bench(Script(tokens=500, interval_s=1.0)) as b:
        stream = await b.start("openai-responses", {"model": "m", "input": INPUT, "background": True})
        with stream.subscribe() as events:
            async for event in events:
                if event.text:
                    break
        await trio.sleep(10)
        result = await stream.cancel(wait_s=60)
        assert result.outcome == "won"
        outcome = await stream.wait()
        assert (outcome.state, outcome.cleanup_error) == ("cancelled", None)
        (response,) = {exchange.response for exchange in b.up.ledger if exchange.response is not None}
        assert response.cancelled_at is not None
        assert outcome.usage_quality == "exact"
        assert outcome.usage is not None
        assert outcome.usage.output == response.words(trio.current_time())
        assert 10 <= outcome.usage.output < 15


async def first_text(stream: Stream) -> None:
    with stream.subscribe() as events:
        async for event in events:
            if event.text:
                return


async def test_a_stop_that_the_provider_refuses(virtual: trio.testing.MockClock) -> None:
    """The stream ends all the same; the outcome says that the provider was not stopped, and estimates."""
    async with bench(Script(tokens=500, interval_s=1.0, expires_s=4.0)) as b:
        stream = await b.start("openai-responses", {"model": "m", "input": INPUT, "background": True})
        await first_text(stream)
        await trio.sleep(5)
        await stream.cancel(wait_s=60)
        outcome = await stream.wait()
        assert (outcome.state, outcome.reason) == ("cancelled", "requested")
        assert outcome.cleanup_error is not None
        assert "the provider refused to stop" in outcome.cleanup_error
        assert outcome.usage_quality == "estimated"


@pytest.mark.parametrize("problem", ["silent", "closed"])
async def test_a_stop_that_the_provider_does_not_hear(problem: str, virtual: trio.testing.MockClock) -> None:
    """The stream ends in its cleanup time, whatever becomes of the request to stop."""
    event = {
        "type": "response.created",
        "sequence_number": 0,
        "response": {"id": "resp_1", "status": "queued"},
    }
    delta = {
        "type": "response.output_text.delta",
        "sequence_number": 1,
        "item_id": "i",
        "delta": "Hello there",
    }
    body = "".join(f"data: {json.dumps(one)}\n\n" for one in (event, delta)).encode()
    targets = []

    async def handle(peer: Peer) -> None:
        head, _ = await peer.request()
        targets.append(head.split(b" ")[1])
        if head.startswith(b"POST /responses "):
            await peer.send(b"HTTP/1.1 200 OK\r\nContent-Length: 9999\r\n\r\n" + body)
        elif problem == "closed":
            return
        await trio.sleep_forever()

    async with trio.open_nursery() as nursery:
        server = await serve(nursery, handle)
        async with open_supervisor() as sup, StreamTransport(trust_env=False) as transport:
            url = f"http://127.0.0.1:{server.port}"
            upstream = Upstream(name="u", base_url=url, dialect=find("openai-responses"))
            request = {"model": "m", "input": INPUT, "background": True}
            stream = await sup.start(HttpSource(upstream, request, transport=transport))
            await first_text(stream)
            before = trio.current_time()
            await stream.cancel(wait_s=60)
            outcome = await stream.wait()
            assert trio.current_time() - before <= 5
        nursery.cancel_scope.cancel()
    assert targets == [b"/responses", b"/responses/resp_1/cancel"]
    assert (outcome.state, outcome.reason) == ("cancelled", "requested")
    assert outcome.cleanup_error is not None
    assert (outcome.usage_quality, outcome.usage) == ("estimated", Usage(output=3))


# --- continuation ----------------------------------------------------------------------------------------------------

PREFILLED: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "anthropic": ({"model": "claude-3-5-haiku-latest", "messages": INPUT, "max_tokens": 99}, {}),
    "ollama": ({"model": "m", "messages": INPUT}, {}),
    "openai-completions": ({"model": "m", "prompt": "count: "}, {}),
    "openai-chat": ({"model": "m", "messages": INPUT}, {"prefill": "continue_final_message"}),
}


@pytest.mark.parametrize("at", range(1, 9))
@pytest.mark.parametrize("dialect", PREFILLED)
async def test_the_model_goes_on(dialect: str, at: int, virtual: trio.testing.MockClock) -> None:
    """After any word: the joined text is the whole, and the join is where the first attempt stopped."""
    request, options = PREFILLED[dialect]
    script = Script(text=TEXT)
    async with bench(attrs.evolve(script, fault="drop", after=at, times=1), script) as b:
        stream = await b.start(dialect, request, **options)
        outcome = await stream.wait()
        assert outcome.state == "completed", outcome
        await check_text(stream, TEXT)
        if outcome.attempts == 2 and outcome.rungs == ("continuation",):
            (joined,) = outcome.joined_at
            assert stream.snapshot().joined_at == (joined,)
            assert 0 < joined <= len(TEXT)
            assert b.up.ledger[1].begun_with > 0


@pytest.mark.parametrize("dialect", PREFILLED)
async def test_a_provider_that_refuses_the_prefill(dialect: str, virtual: trio.testing.MockClock) -> None:
    """The answer stays as it was, and is truncated; with leave, it is asked for anew."""
    request, options = PREFILLED[dialect]
    drop = Script(text=TEXT, fault="drop", after=3, beginning="refuse")
    async with bench(drop) as b:
        stream = await b.start(dialect, request, **options)
        outcome = await stream.wait()
        assert (outcome.state, outcome.reason, outcome.rungs) == ("failed", "truncated", ("continuation",))
        assert TEXT.startswith(stream.snapshot().text)
        assert stream.snapshot().text
    async with bench(drop, drop, Script(text=TEXT)) as b:
        policy = attrs.evolve(POLICY, resume=("continuation", "restart"))
        stream = await b.start(dialect, request, policy=policy, **options)
        outcome = await stream.wait()
        assert (outcome.state, outcome.rungs) == ("completed", ("continuation", "restart"))
        assert stream.snapshot().text == TEXT
        assert stream.snapshot().joined_at == ()


@pytest.mark.parametrize("dialect", ["anthropic", "openai-chat", "ollama"])
async def test_a_tool_call_is_not_continued(dialect: str, virtual: trio.testing.MockClock) -> None:
    """Half a call cannot be given back: the answer is truncated, what was received kept."""
    request, options = PREFILLED[dialect]
    cut = 0
    for at in range(3, 12):
        async with bench(
            Script(text="Let me see. ", tool="weather", fault="drop", at_event=at, times=1)
        ) as b:
            stream = await b.start(dialect, request, **options)
            outcome = await stream.wait()
            if outcome.attempts == 1 and outcome.state != "completed":
                assert (outcome.state, outcome.reason) == ("failed", "truncated")
                assert stream.snapshot().tool_calls
                cut += 1
            else:
                assert outcome.rungs in ((), ("continuation",), ("restart",))
    assert cut


# --- restart, at each provider ---------------------------------------------------------------------------------------

ASKED: dict[str, dict[str, Any]] = {
    "openai-responses": {"model": "m", "input": INPUT},
    "gemini": {"model": "m", "contents": []},
    "gemini-jsonarray": {"model": "m", "contents": []},
    "cohere": {"model": "m", "messages": INPUT},
    **{name: request for name, (request, _) in PREFILLED.items()},
}


@pytest.mark.parametrize("dialect", ASKED)
async def test_a_restart_at_each_event(dialect: str, virtual: trio.testing.MockClock) -> None:
    """Whatever was received is withdrawn with the first event of the new answer, never before."""
    script = Script(text=TEXT, usage=True)
    policy = attrs.evolve(POLICY, resume=("restart",))
    for at in range(1, 12):
        async with bench(attrs.evolve(script, fault="drop", at_event=at), script) as b:
            stream = await b.start(dialect, ASKED[dialect], policy=policy)
            outcome = await stream.wait()
            assert outcome.state == "completed"
            assert stream.snapshot().text == (await stream.read_snapshot()).text == TEXT
            with stream.subscribe() as events:
                told = [event async for event in events]
            withdrawn = [event for event in told if event.kind == "withdrawn"]
            if outcome.attempts == 1:
                assert withdrawn == []
                continue
            received = sum(event.kind == "data" for event in told if event.epoch == 1)
            assert received == (0 if not withdrawn else received)
            assert len(withdrawn) == (1 if received else 0)
            assert outcome.rungs == (("restart",) if received else ("retry",))
            text = "".join(event.text for event in told if event.epoch == outcome.epoch)
            assert text == TEXT


@pytest.mark.parametrize("dialect", ASKED)
async def test_no_rung_named_and_none_climbed(dialect: str, virtual: trio.testing.MockClock) -> None:
    """With an empty `resume` an answer that breaks off is truncated at each event, everything received kept."""
    policy = attrs.evolve(POLICY, resume=())
    for at in (2, 4, 6):
        async with bench(Script(text=TEXT, fault="drop", at_event=at)) as b:
            stream = await b.start(dialect, ASKED[dialect], policy=policy, deadlines=Deadlines(total_s=600))
            outcome = await stream.wait()
            assert (outcome.state, outcome.reason) == ("failed", "truncated")
            assert TEXT.startswith(stream.snapshot().text)
            assert outcome.events or outcome.attempts == 6


async def test_usage_of_a_joined_answer_is_the_sum(virtual: trio.testing.MockClock) -> None:
    """Anthropic states the input at once: both requests' are counted, and the sum is called partial."""
    request, _ = PREFILLED["anthropic"]
    script = Script(text=TEXT)
    async with bench(attrs.evolve(script, fault="drop", after=4), script) as b:
        stream = await b.start("anthropic", request)
        outcome = await stream.wait()
        assert outcome.rungs == ("continuation",)
        assert outcome.usage_quality == "provider_partial"
        last = stream.snapshot().usage
        assert isinstance(last, Usage)
        assert last == outcome.usage
