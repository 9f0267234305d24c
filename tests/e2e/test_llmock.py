"""Every provider that `llmock` speaks and every fault that it has, against the supervisor; and its verdict on us.

`llmock` (PyPI; written against 0.2.2) is a mock server by other hands: it answers in the shapes of ten providers, fails on
request, and judges its client from the requests that it saw. It knows nothing of what a client made of an answer, only
whether it asked again, and it takes a request for a repetition only if its body is the same. So where an answer breaks off
in the middle, the verdict is asked with `restart` allowed; `test_what_the_verdict_cannot_see` has the rest.

All streams of a provider run at once, each with a model of its own, by which the server tells its faults apart.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import aclosing, asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

import attrs
import httpx
import pytest
import trio

from supervisor import Deadlines, Snapshot
from supervisor.streams import Outcome, Supervisor, open_supervisor
from supervisor.upstream import HttpSource, RetryPolicy, StreamTransport, Upstream
from tests.e2e.processes import Running, environment

LAUNCH = """
import json, sys
from llmock.testing import LLMockServer
with LLMockServer() as server:
    print(json.dumps({"url": server.url}), flush=True)
    sys.stdin.read()
"""
TEXT = "Simulated words, one after another, until the end."
RESTART = RetryPolicy(wait_initial_s=0.06, jitter_s=0.02, resume=("sequence", "restart"))
FUNCTION = {
    "name": "weather",
    "description": "Get the weather",
    "parameters": {"type": "object", "properties": {}},
}
MESSAGES = {"messages": [{"role": "user", "content": "Hello"}]}


@attrs.frozen(kw_only=True)
class Provider:
    dialect: str
    base: str
    request: dict[str, Any]
    tools: Any = attrs.field(factory=lambda: [{"type": "function", "function": FUNCTION}])
    length: str = "length"
    """What it calls an answer that reached its limit."""


CHAT = {
    name: Provider(dialect="openai-chat", base=base, request=MESSAGES)
    for name, base in {
        "openai": "/v1",
        "mistral": "/mistral/v1",
        "groq": "/groq/openai/v1",
        "together": "/together/v1",
        "perplexity": "/perplexity/v1",
        "ai21": "/ai21/v1",
        "xai": "/xai/v1",
    }.items()
}
PROVIDERS = CHAT | {
    "openai-responses": Provider(
        dialect="openai-responses",
        base="/v1",
        request={"input": "Hello"},
        tools=[{"type": "function", **FUNCTION}],
        length="max_output_tokens",
    ),
    "anthropic": Provider(
        dialect="anthropic",
        base="/anthropic/v1",
        request=MESSAGES | {"max_tokens": 100},
        tools=[{"name": "weather", "input_schema": {"type": "object", "properties": {}}}],
        length="max_tokens",
    ),
    "gemini": Provider(
        dialect="gemini",
        base="/gemini/v1beta",
        request={"contents": [{"role": "user", "parts": [{"text": "Hello"}]}]},
        tools=[{"functionDeclarations": [FUNCTION]}],
        length="MAX_TOKENS",
    ),
    "cohere": Provider(dialect="cohere", base="/cohere/v2", request=MESSAGES, length="MAX_TOKENS"),
}


# --- the server, and what is asked of it ---------------------------------------------------------------------------------


@contextmanager
def running(folder: Path, **options: str) -> Iterator[str]:
    """Run a server in a process of its own; give its URL."""
    command = [sys.executable, "-c", LAUNCH]
    process = Running(
        command, env=environment(**options), stdin=subprocess.PIPE, errors=folder / "llmock.log"
    )
    try:
        yield process.said["url"]
    finally:
        process.end()


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The URL of a server that all tests share."""
    with running(tmp_path_factory.mktemp("llmock")) as url:
        yield url


@pytest.fixture(scope="module")
def paced(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The URL of a server that pauses between chunks, and so sees a client leave before it has sent them all."""
    with running(tmp_path_factory.mktemp("paced"), LLMOCK_STREAM_CHUNK_DELAY_MS="30") as url:
        yield url


@attrs.frozen
class Told:
    outcome: Outcome
    snapshot: Snapshot

    @property
    def ending(self) -> str:
        """How it ended, and by which further attempts: `completed(stop) restart`."""
        return " ".join([f"{self.outcome.state.value}({self.outcome.reason})", *self.outcome.rungs])


@attrs.define
class Bench:
    provider: Provider
    url: str
    sup: Supervisor
    transport: StreamTransport
    admin: httpx.AsyncClient

    async def script(self, model: str, *behaviors: dict[str, Any]) -> None:
        match = {"match": {"model": model}}
        reply = {"type": "reply", "text": TEXT, "times": None}
        asked = [
            *behaviors,
            *([] if any(b["type"] in ("reply", "tool_fault") for b in behaviors) else [reply]),
        ]
        response = await self.admin.post("scenario", json={"behaviors": [b | match for b in asked]})
        response.raise_for_status()

    async def stream(
        self,
        model: str,
        retry: RetryPolicy = RESTART,
        deadlines: Deadlines | None = None,
        max_unparseable: int = 10,
        **more: Any,
    ) -> Told:
        upstream = Upstream(
            name="llmock",
            base_url=self.url + self.provider.base,
            dialect=self.provider.dialect,
            proxy="direct",
            retry=retry,
            max_unparseable=max_unparseable,
        )
        request = {**self.provider.request, "model": model, **more}
        source = HttpSource(upstream, request, transport=self.transport, draw=lambda: 1.0)
        stream = await self.sup.start(source, deadlines=deadlines)
        outcome = await stream.wait()
        return Told(outcome, await stream.read_snapshot())

    async def requests(self) -> list[dict[str, Any]]:
        return (await self.admin.get("requests")).json()["requests"]

    async def findings(self) -> list[tuple[str, str, tuple[str, ...]]]:
        """Return each finding's severity, code and the models that it is about."""
        models = {request["seq"]: request["model"] for request in await self.requests()}
        verdict = (await self.admin.get("verdict")).json()
        return [
            (f["severity"], f["code"], tuple(sorted({models[seq] for seq in f["requests"]})))
            for f in verdict["findings"]
        ]


@asynccontextmanager
async def bench(server: str, provider: Provider) -> AsyncIterator[Bench]:
    async with (
        httpx.AsyncClient(base_url=f"{server}/_llmock/", trust_env=False, timeout=20) as admin,
        aclosing(StreamTransport(trust_env=False)) as transport,
        open_supervisor() as sup,
    ):
        (await admin.post("reset")).raise_for_status()
        with trio.fail_after(25):  # noqa: ASYNC100  # the checkpoints are those of the block
            yield Bench(provider, server, sup, transport, admin)


def fail(status: int, *, times: int | None = 1, after_s: float = 0.05, **more: Any) -> dict[str, Any]:
    return {"type": "fail", "status": status, "times": times, "retry_after": after_s, **more}


def cut(kind: str, after: int, *, times: int | None = 1) -> dict[str, Any]:
    return {"type": "stream_fault", "kind": kind, "after_chunks": after, "times": times, "stall_seconds": 30}


WELL = "completed(stop)"
CASES: dict[str, tuple[list[dict[str, Any]], str]] = {
    "well": ([], WELL),
    "delay": ([{"type": "delay", "seconds": 0.2}], WELL),
    "slow-first-token": ([{"type": "slow_first_token", "seconds": 0.2}], WELL),
    "limited": ([fail(429, times=2, after_s=0.3)], f"{WELL} retry retry"),
    "limited-to-the-second": ([fail(429, after_s=1.0)], f"{WELL} retry"),
    "down": ([fail(503, times=None)], "failed(http_status) retry retry retry"),
    **{f"fails-{status}": ([fail(status)], f"{WELL} retry") for status in (408, 409, 500, 502, 503, 504, 529)},
    **{f"refuses-{status}": ([fail(status, times=None)], "failed(http_status)") for status in (400, 401, 403, 404, 422)},
    "too-long": ([fail(400, code="context_length_exceeded", message="maximum context length exceeded")], "failed(http_status)"),
    "disconnect-at-once": ([cut("disconnect", 0)], f"{WELL} retry"),
    "disconnect": ([cut("disconnect", 3)], f"{WELL} restart"),
    "truncate-at-once": ([cut("truncate", 0)], f"{WELL} retry"),
    "truncate": ([cut("truncate", 3)], f"{WELL} restart"),
    "stall-at-once": ([cut("stall", 0)], "expired(first_event)"),
    "stall": ([cut("stall", 3)], "expired(idle)"),
}  # fmt: skip
SHORT = {
    "stall-at-once": Deadlines(first_event_s=0.5),
    "stall": Deadlines(idle_s=0.5),
}
WAITED = {"limited": 0.6, "limited-to-the-second": 1.0, "down": 0.15}


def reason(provider: Provider, ending: str) -> str:
    """Return an ending in the provider's own word for having come to a stop."""
    said = {"anthropic": "end_turn", "gemini": "STOP", "cohere": "COMPLETE", "openai-responses": "completed"}
    return ending.replace("stop", said.get(provider.dialect, "stop"))


@pytest.mark.parametrize("provider", PROVIDERS.values(), ids=PROVIDERS)
async def test_every_fault_ends_as_it_should_and_nothing_is_held_against_us(
    server: str, provider: Provider
) -> None:
    """All faults at once: the outcomes are right, every Retry-After is waited for, and the verdict has no finding."""
    told: dict[str, Told] = {}
    took: dict[str, float] = {}
    async with bench(server, provider) as at:

        async def run(name: str, behaviors: list[dict[str, Any]]) -> None:
            await at.script(name, *behaviors)
            begun = trio.current_time()
            told[name] = await at.stream(name, deadlines=SHORT.get(name))
            took[name] = trio.current_time() - begun

        async with trio.open_nursery() as nursery:
            for name, (behaviors, _) in CASES.items():
                nursery.start_soon(run, name, behaviors)
        ended = {name: told[name].ending for name in CASES}
        assert ended == {name: reason(provider, ending) for name, (_, ending) in CASES.items()}
        assert await at.findings() == []
    for name, one in told.items():
        if one.outcome.state == "completed":
            assert one.snapshot.text == TEXT, name
            assert one.outcome.usage is not None or provider.dialect == "openai-chat"
        else:
            assert TEXT.startswith(one.snapshot.text), name
            assert (one.outcome.fault is not None) is (one.outcome.state == "failed"), name
    assert {name: took[name] >= least for name, least in WAITED.items()} == dict.fromkeys(WAITED, True)
    fault = told["too-long"].outcome.fault
    assert fault is not None
    assert (fault.kind, fault.message) == ("context_length", "maximum context length exceeded")


@pytest.mark.parametrize("provider", PROVIDERS.values(), ids=PROVIDERS)
@pytest.mark.parametrize("kind", ["disconnect", "truncate"])
async def test_cut_after_each_chunk(server: str, provider: Provider, kind: str) -> None:
    """Wherever an answer breaks off before it has ended, it is asked for again, and the whole of it is what is kept."""
    retry = attrs.evolve(RESTART, attempts=2, wait_initial_s=0.02)
    told: dict[int, Told] = {}
    async with bench(server, provider) as at:
        await at.script("whole")
        await at.stream("whole")
        chunks = (await at.requests())[0]["chunks_sent"]

        async def run(after: int) -> None:
            await at.script(f"cut-{after}", cut(kind, after))
            told[after] = await at.stream(f"cut-{after}", retry)

        async with trio.open_nursery() as nursery:
            for after in range(chunks):
                nursery.start_soon(run, after)
        findings = await at.findings()
    # A cut that leaves out only what follows the finish reason leaves nothing to ask again for.
    ended = [after for after in range(chunks) if not told[after].outcome.rungs]
    assert ended == list(range(chunks - len(ended), chunks))
    for after in range(chunks):
        one = told[after]
        if after not in ended:
            assert (one.ending, one.snapshot.text) == (
                reason(provider, f"{WELL} {'restart' if after else 'retry'}"),
                TEXT,
            )
        else:
            assert one.snapshot.text == TEXT
            assert one.ending == (
                "failed(truncated)" if provider.dialect == "anthropic" else reason(provider, WELL)
            )
    assert len(ended) == {"openai-chat": 1, "anthropic": 1}.get(provider.dialect, 0)
    # Of these it cannot know: it looks for a repetition, not for what was made of the answer.
    code = {"disconnect": ("warning", "gave_up"), "truncate": ("error", "truncated_stream_accepted")}[kind]
    assert findings == [(*code, (f"cut-{after}",)) for after in ended]


@pytest.mark.parametrize("provider", PROVIDERS.values(), ids=PROVIDERS)
async def test_tool_calls_and_limits(server: str, provider: Provider) -> None:
    """Tool calls arrive whole, also after a break inside one; broken ones as they were sent; a limit is no good end."""
    called = {
        "type": "reply",
        "tool_calls": [{"name": "weather", "arguments": {"city": "Paris"}}],
        "times": None,
    }
    cases = {
        "called": [called],
        "called-and-cut": [called, cut("disconnect", 0 if provider.dialect == "gemini" else 2)],
        "unknown": [{"type": "tool_fault", "kind": "unknown_tool"}],
        "limit": [{"type": "reply", "text": TEXT, "finish_reason": "length", "times": None}],
    }
    if provider.dialect != "gemini":  # where arguments are an object, and cannot be malformed
        cases["malformed"] = [{"type": "tool_fault", "kind": "malformed_arguments"}]
    told: dict[str, Told] = {}
    async with bench(server, provider) as at:

        async def run(name: str) -> None:
            await at.script(name, *cases[name])
            told[name] = await at.stream(name, tools=provider.tools)

        async with trio.open_nursery() as nursery:
            for name in cases:
                nursery.start_soon(run, name)
        assert await at.findings() == []
    for name in ("called", "called-and-cut"):
        (call,) = told[name].snapshot.tool_calls
        assert (call.name, json.loads(call.arguments)) == ("weather", {"city": "Paris"})
    assert told["called-and-cut"].outcome.rungs
    assert {name: one.outcome.state.value for name, one in told.items()} == dict.fromkeys(cases, "completed")
    assert told["unknown"].snapshot.tool_calls[0].name not in ("", "weather")
    if "malformed" in told:
        with pytest.raises(json.JSONDecodeError):
            json.loads(told["malformed"].snapshot.tool_calls[0].arguments)
    assert (told["limit"].outcome.reason, told["limit"].snapshot.text) == (provider.length, TEXT)


async def test_a_quota_that_refills(tmp_path: Path) -> None:
    """Refused for tokens a minute, we wait as long as the quota needs, in every provider's own way of saying so."""
    large = "word " * 4_600
    with running(tmp_path, LLMOCK_TPM="6000") as url:
        for name in ("openai", "anthropic", "cohere"):
            provider = PROVIDERS[name]
            filler = {"metadata": {"user_id": large}}
            async with bench(url, provider) as at:
                await at.stream("first", **filler)
                one = await at.stream("second", padding=large[:900])
                assert (one.outcome.state, one.outcome.rungs) == ("completed", ("retry",))
                assert [request["status"] for request in await at.requests()] == [200, 429, 200]
                assert await at.findings() == []


async def test_restarts_back_off(server: str) -> None:
    """An answer that breaks off again and again is asked for ever more slowly."""
    async with bench(server, PROVIDERS["openai"]) as at:
        await at.script("twice", cut("disconnect", 2, times=2))
        assert (await at.stream("twice")).ending == f"{WELL} restart restart"
        assert await at.findings() == []


@pytest.mark.parametrize("provider", PROVIDERS.values(), ids=PROVIDERS)
async def test_a_malformed_chunk_is_told_of(server: str, provider: Provider) -> None:
    """An answer that lacks a piece, as that could not be read, says so: the outcome counts it, and nothing else is amiss."""
    async with bench(server, provider) as at:
        await at.script("bad", cut("malformed", 4))
        one = await at.stream("bad")
        assert await at.findings() in ([], [("warning", "malformed_chunk_ignored", ("bad",))])
    assert one.outcome.skipped == 1 or one.outcome.state == "failed" or one.outcome.rungs


@pytest.mark.parametrize("provider", PROVIDERS.values(), ids=PROVIDERS)
async def test_a_malformed_chunk_is_not_read_over(paced: str, provider: Provider) -> None:
    """With no unreadable event allowed, such an answer is no answer: it is asked for again, and the verdict is clean."""
    async with bench(paced, provider) as at:
        await at.script("bad", cut("malformed", 4, times=1))
        one = await at.stream("bad", max_unparseable=0)
        assert await at.findings() == []
    assert one.outcome.state == "completed"
    assert one.outcome.attempts == 1 + len(one.outcome.rungs)


@pytest.mark.parametrize("provider", PROVIDERS.values(), ids=PROVIDERS)
async def test_what_the_verdict_cannot_see(server: str, provider: Provider) -> None:
    """Without leave to ask again, a truncated answer fails with its partial text; the verdict, not knowing, complains."""
    retry = RetryPolicy(resume=())
    async with bench(server, provider) as at:
        for kind in ("truncate", "disconnect"):
            await at.script(kind, cut(kind, 3))
            one = await at.stream(kind, retry)
            assert one.ending == "failed(truncated)"
            assert TEXT.startswith(one.snapshot.text)
        findings = await at.findings()
    assert findings == [
        ("error", "truncated_stream_accepted", ("truncate",)),
        ("warning", "gave_up", ("disconnect",)),
    ]
