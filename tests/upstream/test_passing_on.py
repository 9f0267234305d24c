"""HttpSource for whoever passes on somebody else's request: sent as it is, and told how it was answered."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest

from supervisor.dialects import Call
from supervisor.errors import ConfigurationError
from supervisor.testing.upstream import Script
from supervisor.upstream.attempt import Answered, ask
from supervisor.upstream.catalog import Upstream
from supervisor.upstream.retry import RetryPolicy
from supervisor.upstream.source import HttpSource
from tests.upstream.attempts import SECRET, VARIABLE, Bench, Result, bench

BODY = b'{ "model":"m",  "stream" : true, "n": 1.0 }'
TARGET = "/v1/chat/completions?a=b"
ONCE = RetryPolicy(attempts=1)
AT_ONCE = RetryPolicy(attempts=3, wait_initial_s=0, wait_max_s=0, resume=("sequence", "continuation"))


@pytest.fixture(autouse=True)
def credential(monkeypatch: pytest.MonkeyPatch) -> None:
    """The upstream's key is in the environment."""
    monkeypatch.setenv(VARIABLE, SECRET)


def as_it_is(upstream: Upstream) -> Call:
    del upstream
    return Call(path="/chat/completions?a=b", body=BODY, headers={"OpenAI-Beta": "x", "Accept": "text/plain"})


async def passed_on(
    b: Bench,
    script: Script,
    *more: Script,
    request: bytes = BODY,
    first: Callable[[Upstream], Call] = as_it_is,
    retry: RetryPolicy = ONCE,
) -> tuple[Result, list[Answered], HttpSource]:
    told: list[Answered] = []
    b.up.enqueue(script, *more)
    source = b.upstream.source(request, transport=b.transport, retry=retry, first=first, answered=told.append)
    stream = await b.sup.start(source)
    return await b.result(stream, await stream.wait()), told, source


async def test_the_request_is_sent_as_it_is() -> None:
    """Bytes, path, query and headers are those of the program; the credential is the upstream's."""
    async with bench() as b:
        result, told, _ = await passed_on(b, Script(tokens=2))
        (request,) = b.up.requests
        assert (request.target, request.body) == (TARGET, BODY)
        assert request.header("openai-beta") == "x"
        assert request.header("accept") == "text/plain"
        assert request.header("authorization") == f"Bearer {SECRET}"
        assert result.ending == ("completed", "stop")
        (answered,) = told
        assert (answered.upstream, answered.status, answered.framing) == ("sim", 200, "sse")


async def test_every_attempt_is_made_by_the_program() -> None:
    """A repeated attempt asks the program again, and tells it again; no attempt goes on from a text in a request of ours."""
    async with bench() as b:
        result, told, _ = await passed_on(b, Script(status=500), Script(tokens=2), retry=AT_ONCE)
        assert result.ending == ("completed", "stop")
        assert [answered.status for answered in told] == [500, 200]
        assert [(request.target, request.body) for request in b.up.requests] == [(TARGET, BODY)] * 2
        b.up.requests.clear()
        result, told, _ = await passed_on(b, Script(tokens=4, fault="drop", after=2), retry=AT_ONCE)
        assert result.ending == ("failed", "truncated")
        assert len(b.up.requests) == 1
        notes = [json.loads(payload) for kind, payload in result.records if kind == "note"]
        assert notes[0]["not_resumed"]["continuation"] == "the request is sent as it is"


async def test_an_error_is_told_whole_but_for_the_credential() -> None:
    """Status, headers and body of an HTTP error come as they are, without the credential that they repeat."""
    async with bench() as b:
        headers = (("x-request-id", "r1"), ("x-hint", f"key {SECRET}"))
        refused = Script(
            status=429, message="slow down", retry_after="7", echo_credential=True, headers=headers
        )
        result, (answered,), _ = await passed_on(b, refused)
        assert result.ending == ("failed", "http_status")
        assert (answered.status, answered.framing) == (429, None)
        assert (answered.headers["retry-after"], answered.headers["x-request-id"]) == ("7", "r1")
        assert json.loads(answered.body)["error"]["message"].startswith("slow down")
        assert SECRET not in answered.body.decode() + str(answered.headers)


@pytest.mark.parametrize(
    ("body", "content_type", "framing"),
    [
        (b'data: {"choices":[]}\n\n', "application/json", "sse"),
        (b'{"choices":[]}\n', "text/event-stream", "json"),
        (b'[{"choices":[]}]\n', "application/json", "json-array"),
        (b'data: {"error":{"message":"no"}}\n\n', "text/event-stream", "sse"),
        (b"data: {{{\n\n", "text/event-stream", "sse"),
    ],
)
async def test_how_the_body_is_framed_is_told(body: bytes, content_type: str, framing: str) -> None:
    """The framing is what the body's bytes are, whatever they are called: also where the first event is an error or no JSON."""
    async with bench() as b:
        _, told, _ = await passed_on(b, Script(body=body, content_type=content_type))
        assert [answered.framing for answered in told] == [framing]


async def test_an_answer_that_is_no_stream_may_be_asked_for() -> None:
    """A program that makes the request itself may ask with `"stream": false`; nobody else may."""
    whole = b'{"model":"m","stream":false,"messages":[]}'

    def first(upstream: Upstream) -> Call:
        del upstream
        return Call(path="/chat/completions", body=whole)

    async with bench() as b:
        result, (answered,), source = await passed_on(b, Script(tokens=2), request=whole, first=first)
        assert (result.ending, result.text) == (("completed", "stop"), "w0 w1 ")
        assert answered.framing == "json"
        assert source.bytes_held == len(whole)
        assert [kind for kind, _ in result.records].count("data") == 1
        with pytest.raises(ConfigurationError, match="stream"):
            b.upstream.source(whole, transport=b.transport)


async def test_an_unreadable_event_is_kept_with_its_name() -> None:
    """What could not be read is in the journal as it came, up to 64 KiB, with the name of its event."""
    long = b"?" * 5000
    body = b"event: odd\ndata: " + long + b'\n\ndata: {"choices":[{"delta":{},"finish_reason":"stop"}]}\n\n'
    async with bench() as b:
        b.up.enqueue(Script(body=body))
        stream = await b.start("m")
        await stream.wait()
        async with stream.subscribe() as events:
            (skipped,) = [event async for event in events if event.kind == "skipped"]
        record: dict[str, Any] = json.loads(skipped.payload)
        assert (skipped.name, record["payload"], record["bytes"]) == ("odd", long.decode(), 5000)


async def test_a_plain_request_is_answered_with_head_and_body() -> None:
    """A request that is no stream gives status, headers and body, without the credential."""
    async with bench() as b:
        b.up.enqueue(Script(status=404, message="nothing", echo_credential=True))
        call = Call(path="/chat/completions", body={})
        answered = await ask(b.transport, b.upstream, call, max_bytes=1 << 20)
        assert (answered.status, answered.headers["content-type"]) == (404, "application/json")
        assert json.loads(answered.body)["error"]["message"].startswith("nothing")
        assert SECRET not in answered.body.decode()
