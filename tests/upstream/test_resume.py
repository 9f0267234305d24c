"""Answers that break off, and how they go on: over a real socket, to the outcome, the journal and the snapshot."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any

import attrs
import pytest
import trio
import trio.testing

from supervisor.dialects import OPENAI_CHAT, Usage
from supervisor.streams import Cursor, Outcome, Stream, Supervisor, open_supervisor
from supervisor.streams.attempts import Refold
from supervisor.upstream import CircuitPolicy, Circuits, RetryPolicy, StreamTransport, Upstream
from supervisor.upstream.source import HttpSource
from tests.upstream.scripted import Peer, serve

WORDS = ("One", " two", " three", " four", ".")
QUICK = RetryPolicy(attempts=4, wait_initial_s=1.0, wait_max_s=8.0)


@pytest.fixture
def virtual() -> trio.testing.MockClock:
    """Waits between attempts take no time."""
    clock = trio.testing.MockClock()
    clock.autojump_threshold = 0.02
    return clock


@attrs.frozen
class Answer:
    """What a provider says to one request: these events, and then a break or the end."""

    events: Sequence[str]
    ends: bool = False
    status: int = 200
    headers: str = ""


@attrs.define
class Provider:
    """A server that answers each request with the next answer, and keeps what it was asked."""

    answers: list[Answer]
    url: str = ""
    asked: list[tuple[str, dict[str, str], Any]] = attrs.field(factory=list)

    async def handle(self, peer: Peer) -> None:
        while True:
            head, body = await peer.request()
            first, *lines = head.decode().split("\r\n")
            headers = {
                name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)
            }
            self.asked.append((first.rsplit(" ", 1)[0], headers, json.loads(body) if body else None))
            answer = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
            data = "".join(answer.events).encode()
            length = len(data) + (0 if answer.ends else 1)  # one byte that never comes
            await peer.send(
                f"HTTP/1.1 {answer.status} X\r\nContent-Length: {length}\r\n{answer.headers}"
                f"Content-Type: text/event-stream\r\n\r\n".encode()
            )
            for event in answer.events:
                await peer.send(event.encode())
            if not answer.ends:
                await peer.cut()
                return


@asynccontextmanager
async def providers(*scripts: Sequence[Answer]) -> AsyncIterator[list[Provider]]:
    async with trio.open_nursery() as nursery:
        made = []
        for script in scripts:
            provider = Provider(list(script))
            server = await serve(nursery, provider.handle)
            provider.url = f"http://127.0.0.1:{server.port}"
            made.append(provider)
        yield made
        nursery.cancel_scope.cancel()


@attrs.frozen
class Told:
    outcome: Outcome
    records: list[tuple[int, str, Any]]
    """Epoch, kind and decoded payload of each event."""
    text: str
    joined_at: tuple[int, ...]

    @property
    def ending(self) -> tuple[str, str]:
        return str(self.outcome.state), self.outcome.reason

    def of(self, kind: str) -> list[Any]:
        return [payload for _, what, payload in self.records if what == kind]

    @property
    def rungs(self) -> list[str | None]:
        return [record.get("rung") for record in self.of("attempt")]


async def told(stream: Stream) -> Told:
    outcome = await stream.wait()
    records: list[tuple[int, str, Any]] = []
    refold = Refold(OPENAI_CHAT)
    async with stream.subscribe() as events:
        async for event in events:
            refold.apply(event)
            payload = event.payload if event.kind == "data" else json.loads(event.payload)
            records.append((event.epoch, event.kind, payload))
    snapshot = await stream.read_snapshot()
    # A later reading of the journal says the same as the live fold.
    assert snapshot == stream.snapshot()
    assert attrs.evolve(snapshot, epoch=1, seq=0) == refold.fold.snapshot()
    return Told(outcome, records, snapshot.text, snapshot.joined_at)


async def run(
    sup: Supervisor,
    provider: Provider,
    policy: RetryPolicy,
    request: dict[str, Any] | None = None,
    **options: Any,
) -> Told:
    async with StreamTransport() as transport:
        upstream = Upstream(name="one", base_url=provider.url, **options)
        source = HttpSource(
            upstream, request or {"model": "m"}, transport=transport, retry=policy, draw=lambda: 0.5
        )
        return await told(await sup.start(source))


# --- OpenAI chat: continuation, restart, fallback --------------------------------------------------------------------


def chat(*words: str, finish: str | None = None, usage: tuple[int, int] | None = None) -> list[str]:
    events = [{"choices": [{"index": 0, "delta": {"content": word}}], "id": "c1"} for word in words]
    if finish is not None:
        events.append({"choices": [{"index": 0, "delta": {}, "finish_reason": finish}], "id": "c1"})
    if usage is not None:
        events.append({"choices": [], "usage": {"prompt_tokens": usage[0], "completion_tokens": usage[1]}})
    lines = [f"data: {json.dumps(event)}\n\n" for event in events]
    return lines if finish is None else [*lines, "data: [DONE]\n\n"]


def whole(*words: str, usage: tuple[int, int] | None = None) -> Answer:
    return Answer(chat(*words, finish="stop", usage=usage), ends=True)


MESSAGES = {"model": "m", "messages": [{"role": "user", "content": "count"}]}


@pytest.mark.parametrize("kept", range(1, len(WORDS)))
async def test_the_model_goes_on_from_its_own_words(kept: int, virtual: trio.testing.MockClock) -> None:
    """Wherever it broke off: nothing lost, nothing doubled, and the join is marked."""
    policy = attrs.evolve(QUICK, resume=("continuation",))
    script = [Answer(chat(*WORDS[:kept])), whole(*WORDS[kept:])]
    async with providers(script) as (one,), open_supervisor() as sup:
        told = await run(sup, one, policy, MESSAGES, prefill="prefix")
    assert told.ending == ("completed", "stop")
    assert told.text == "".join(WORDS)
    assert told.joined_at == (len("".join(WORDS[:kept])),)
    assert told.rungs == [None, "continuation"]
    assert told.of("attempt")[1]["kept"]["chars"] == told.joined_at[0]
    assert {epoch for epoch, _, _ in told.records} == {1}
    assert one.asked[1][2]["messages"][-1] == {
        "role": "assistant", "content": "".join(WORDS[:kept]), "prefix": True,
    }  # fmt: skip


async def test_white_space_at_the_join(virtual: trio.testing.MockClock) -> None:
    """What is not given back is not kept either, as the model brings it again."""
    policy = attrs.evolve(QUICK, resume=("continuation",))
    script = [Answer(chat("One", " ")), whole(" two")]
    async with providers(script) as (one,), open_supervisor() as sup:
        told = await run(sup, one, policy, MESSAGES, prefill="assistant")
    assert (told.text, told.joined_at) == ("One two", (3,))
    assert told.of("attempt")[1]["dropped"] == 1


async def test_two_continuations(virtual: trio.testing.MockClock) -> None:
    """Each is given all of the text so far."""
    policy = attrs.evolve(QUICK, resume=("continuation",))
    script = [Answer(chat("One")), Answer(chat(" two")), whole(" three", usage=(9, 1))]
    async with providers(script) as (one,), open_supervisor() as sup:
        told = await run(sup, one, policy, MESSAGES, prefill="prefix")
    assert (told.text, told.joined_at) == ("One two three", (3, 7))
    assert one.asked[2][2]["messages"][-1]["content"] == "One two"
    assert told.outcome.usage == Usage(9, 1)
    assert told.outcome.usage_quality == "provider_partial"  # what the first two used, nobody said
    assert told.outcome.rungs == ("continuation", "continuation")
    assert told.outcome.joined_at == (3, 7)


async def test_a_restart_withdraws_with_the_first_new_event(virtual: trio.testing.MockClock) -> None:
    """The old text stands until then; a reader that follows is told, and a cursor of before is still good."""
    policy = attrs.evolve(QUICK, resume=("restart",))
    script = [Answer(chat(*WORDS[:2])), Answer([]), Answer([], status=503, ends=True), whole(*WORDS)]
    async with providers(script) as (one,), open_supervisor() as sup:
        told = await run(sup, one, policy, MESSAGES)
    assert told.ending == ("completed", "stop")
    assert told.text == "".join(WORDS)
    assert told.rungs == [None, "restart", "restart", "restart"]
    kinds = [(epoch, kind) for epoch, kind, _ in told.records]
    withdrawn = kinds.index((3, "withdrawn"))
    assert [epoch for epoch, _ in kinds] == [1] * withdrawn + [3] * (len(kinds) - withdrawn)
    assert told.of("withdrawn") == [{"attempt": 4, "first": 1, "last": withdrawn}]
    assert kinds[withdrawn + 1] == (3, "data")
    assert told.outcome.epoch == 3


async def test_a_restart_that_comes_to_nothing_withdraws_nothing(virtual: trio.testing.MockClock) -> None:
    """The partial answer is all there is: it stays, and the ending says what broke it off."""
    policy = attrs.evolve(QUICK, resume=("restart",), attempts=3)
    script = [Answer(chat(*WORDS[:2])), Answer([], status=503, ends=True)]
    async with providers(script) as (one,), open_supervisor() as sup:
        told = await run(sup, one, policy, MESSAGES)
    assert told.ending == ("failed", "truncated")
    assert told.text == "".join(WORDS[:2])
    assert told.of("withdrawn") == []
    assert "then restart failed" in told.outcome.message


async def test_readers_across_a_restart(virtual: trio.testing.MockClock) -> None:
    """One that read the old text goes on by cursor; one that never saw the end of it has a gap neither."""
    policy = attrs.evolve(QUICK, resume=("restart",))
    script = [Answer(chat(*WORDS[:3])), whole(*WORDS)]
    async with providers(script) as (one,), open_supervisor() as sup, StreamTransport() as transport:
        upstream = Upstream(name="one", base_url=one.url)
        stream = await sup.start(HttpSource(upstream, MESSAGES, transport=transport, retry=policy))
        with stream.subscribe() as live:
            seen = [event async for event in live]
        assert [event.seq for event in seen] == list(range(1, len(seen) + 1))
        old = next(event for event in seen if event.kind == "data")
        with stream.subscribe(Cursor(old.epoch, old.seq)) as again:
            rest = [event.seq async for event in again]
        assert rest == list(range(old.seq + 1, len(seen) + 1))
        with stream.subscribe("snapshot") as late:
            assert late.first_snapshot is not None
            assert late.first_snapshot.text == "".join(WORDS)


async def test_a_continuation_that_comes_to_nothing_changes_nothing(virtual: trio.testing.MockClock) -> None:
    """The white space at the end is still there, and nothing is marked as joined."""
    policy = attrs.evolve(QUICK, resume=("continuation",), attempts=3)
    script = [Answer(chat("One", " ")), Answer([], status=503, ends=True)]
    async with providers(script) as (one,), open_supervisor() as sup:
        told = await run(sup, one, policy, MESSAGES, prefill="prefix")
    assert told.rungs == [None, "continuation", "continuation"]
    assert (told.ending, told.text, told.joined_at) == (("failed", "truncated"), "One ", ())


async def test_an_upstream_that_always_breaks_off_fails(virtual: trio.testing.MockClock) -> None:
    """Its circuit counts each attempt once, and as what it came to; the stream that it refused says so."""
    circuits = Circuits(CircuitPolicy(max_failures=2))
    policy = attrs.evolve(QUICK, resume=("restart",), attempts=9)
    async with (
        providers([Answer(chat("One"))]) as (one,),
        open_supervisor() as sup,
        StreamTransport() as transport,
    ):
        upstream = Upstream(name="one", base_url=one.url)
        source = HttpSource(upstream, MESSAGES, transport=transport, retry=policy, circuits=circuits.of)
        broken = await told(await sup.start(source))
        figures = circuits.of("one").statistics(trio.current_time())
    assert (figures.state, figures.successes) == ("open", 0)
    assert broken.outcome.attempts == 3
    assert "no further attempt, as the circuit of one is open" in broken.outcome.message
    assert "the circuit of one is open" in broken.of("note")[0]["not_resumed"].values()


@pytest.mark.parametrize("delivery", ["immediate", "durable"])
async def test_what_a_snapshot_shows(delivery: Any, virtual: trio.testing.MockClock) -> None:
    """The joined and the restarted answer, also where only what is durable is shown."""
    for resume, script, text in (
        (("restart",), [Answer(chat(*WORDS[:3])), whole("Anew", ".")], "Anew."),
        (("continuation",), [Answer(chat("One ")), whole(" two")], "One two"),
    ):
        async with providers(script) as (one,), open_supervisor() as sup, StreamTransport() as transport:
            upstream = Upstream(name="one", base_url=one.url, prefill="prefix")
            policy = attrs.evolve(QUICK, resume=resume)
            source = HttpSource(upstream, MESSAGES, transport=transport, retry=policy)
            stream = await sup.start(source, delivery=delivery)
            await stream.wait()
            assert stream.snapshot().text == text
            assert (await stream.read_snapshot()).text == text


async def test_by_default_an_answer_that_breaks_off_is_truncated(virtual: trio.testing.MockClock) -> None:
    """Asking again costs money and makes another answer: nobody is made to."""
    async with providers([Answer(chat(*WORDS[:2])), whole(*WORDS)]) as (one,), open_supervisor() as sup:
        told = await run(sup, one, QUICK, MESSAGES, prefill="prefix")
    assert (told.ending, told.rungs) == (("failed", "truncated"), [None])
    assert (told.text, len(one.asked)) == ("One two", 1)
    assert told.of("note") == []


async def test_why_nothing_was_done_is_noted(virtual: trio.testing.MockClock) -> None:
    """Where the policy hopes for more than there is, the journal says why it did not come."""
    policy = attrs.evolve(QUICK, resume=("sequence", "continuation"))
    async with providers([Answer(chat(*WORDS[:2]))]) as (one,), open_supervisor() as sup:
        told = await run(sup, one, policy, MESSAGES)
    assert told.ending == ("failed", "truncated")
    (note,) = told.of("note")
    assert note["not_resumed"]["continuation"] == "one is not known to take the beginning of an answer"
    assert "no way" in note["not_resumed"]["sequence"]


async def test_a_fallback_is_asked(virtual: trio.testing.MockClock) -> None:
    """The journal says which upstream answered, and why it was asked."""
    async with (
        providers([Answer([], status=500, ends=True)], [whole(*WORDS)]) as (one, two),
        open_supervisor() as sup,
    ):
        other = Upstream(name="two", base_url=two.url, models={"m": "their-m"})
        told = await run(sup, one, attrs.evolve(QUICK, attempts=3), MESSAGES, fallback=[other])
    assert told.ending == ("completed", "stop")
    assert told.rungs == [None, "retry", "fallback"]
    assert told.of("attempt")[2]["upstream"] == "two"
    assert (len(one.asked), len(two.asked), two.asked[0][2]["model"]) == (2, 1, "their-m")
    assert (told.of("withdrawn"), told.outcome.epoch) == ([], 1)  # there was nothing


async def test_a_fallback_that_takes_the_place_of_an_answer(virtual: trio.testing.MockClock) -> None:
    """Only where a restart is allowed, and only once it begins to answer."""
    async with (
        providers([Answer(chat(*WORDS[:2]))], [whole("Other", ".")]) as (one, two),
        open_supervisor() as sup,
    ):
        other = Upstream(name="two", base_url=two.url)
        policy = attrs.evolve(QUICK, attempts=2, resume=("restart",))
        told = await run(sup, one, policy, MESSAGES, fallback=[other])
    assert (told.ending, told.text) == (("completed", "stop"), "Other.")
    assert len(told.of("withdrawn")) == 1


async def test_the_total_clock_wins(virtual: trio.testing.MockClock) -> None:
    """Whatever rung is being climbed."""
    policy = RetryPolicy(attempts=100, wait_initial_s=10, wait_max_s=10, resume=("restart",))
    async with (
        providers([Answer(chat(*WORDS[:2])), Answer([], status=503, ends=True)]) as (one,),
        open_supervisor() as sup,
        StreamTransport() as transport,
    ):
        from supervisor.streams import Deadlines

        upstream = Upstream(name="one", base_url=one.url)
        source = HttpSource(upstream, MESSAGES, transport=transport, retry=policy, draw=lambda: 0.9)
        stream = await sup.start(source, deadlines=Deadlines(total_s=60))
        outcome = await stream.wait()
        assert (outcome.state, outcome.reason) == ("expired", "total")
        assert stream.snapshot().text == "One two"


async def test_a_stop_is_not_followed_by_another_attempt(virtual: trio.testing.MockClock) -> None:
    """An answer that breaks off while it drains is not asked for again: it was to stop, and it has."""
    release = trio.Event()

    async def handle(peer: Peer) -> None:
        await peer.request()
        await peer.send(b"HTTP/1.1 200 OK\r\nContent-Length: 10000\r\n\r\n" + "".join(chat("One")).encode())
        await release.wait()
        await peer.cut()

    async with trio.open_nursery() as nursery:
        server = await serve(nursery, handle)
        async with open_supervisor() as sup, StreamTransport() as transport:
            upstream = Upstream(name="one", base_url=f"http://127.0.0.1:{server.port}")
            policy = attrs.evolve(QUICK, resume=("restart",))
            stream = await sup.start(HttpSource(upstream, MESSAGES, transport=transport, retry=policy))
            with stream.subscribe() as events:
                async for event in events:
                    if event.kind == "data":
                        break
            stream.request_stop(mode="drain", drain_s=50)
            release.set()
            outcome = await stream.wait()
            assert (outcome.state, outcome.reason, outcome.attempts) == ("cancelled", "requested", 1)
            assert outcome.fault is not None
            assert outcome.fault.kind == "truncated"
        nursery.cancel_scope.cancel()


async def test_a_trial_that_is_not_made_is_given_back(virtual: trio.testing.MockClock) -> None:
    """A stream that is stopped while it waits for its turn does not keep its upstream's circuit half open."""
    told: list[str] = []

    class Circuit:
        def __getattr__(self, name: str) -> Any:
            def tell(now: float) -> Any:
                told.append(name)
                return "closed" if name == "state" else True

            return tell

    async with (
        providers([Answer([], status=503, ends=True)]) as (one,),
        open_supervisor() as sup,
        StreamTransport() as transport,
    ):
        upstream = Upstream(name="one", base_url=one.url)
        policy = RetryPolicy(wait_initial_s=100, wait_max_s=100)
        source = HttpSource(
            upstream,
            MESSAGES,
            transport=transport,
            retry=policy,
            circuits=lambda _: Circuit(),
            draw=lambda: 0.5,
        )
        stream = await sup.start(source)
        await trio.sleep(10)
        await stream.cancel()
    assert told == ["state", "failed", "allows", "abandoned"]
