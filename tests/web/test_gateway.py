"""The gateway over a socket: what reaches the upstream, and what comes back, byte for byte; what goes wrong, and silence."""

from __future__ import annotations

import json
from collections.abc import Iterator
from urllib.parse import quote

import attrs
import httpx
import pytest
import trio
import trio.testing

from supervisor.dialects import Fault
from supervisor.streams import Deadlines, Limits, Outcome, State
from supervisor.testing.upstream import Script, unreachable_url
from supervisor.upstream import RetryPolicy, Upstream
from supervisor.web.gateway import GatewayConfig
from supervisor.web.gateway.relay import failure_of
from tests.web.gateways import (
    CHAT,
    STREAMED,
    TWO,
    WHOLE,
    error_of,
    gateway_at,
    google,
    upstreams_at,
    with_model,
)


@pytest.fixture
def nowhere() -> Iterator[str]:
    """An address that refuses connections."""
    with unreachable_url() as url:
        yield url.removesuffix("/v1")


# --- byte for byte ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "what", [*(f"streamed {name}" for name in STREAMED), *(f"whole {name}" for name in WHOLE)]
)
async def test_an_answer_is_the_upstreams(what: str) -> None:
    """Status, content type and body are those that the provider gives to the same request, which it gets in the same bytes."""
    kind, _, name = what.partition(" ")
    path, body = (STREAMED if kind == "streamed" else WHOLE)[name]
    sent = json.dumps(body, indent=1).encode()
    async with gateway_at() as place, place.client() as client:
        there = await client.post(place.direct + path, content=sent)
        here = await client.post(path, content=sent)
        first, second = place.up.requests
        assert (first.target, first.body) == (second.target, second.body) == (second.target, sent)
        assert (here.status_code, here.headers["content-type"]) == (200, there.headers["content-type"])
        if name == "google array":  # whose commas may be framed in other ways
            assert here.json() == there.json()
        else:
            assert here.content.strip().replace(b"sim00000002", b"sim00000001") == there.content.strip()
        outcome = await place.outcome()
        assert (outcome.state, outcome.usage_quality) == ("completed", "exact")
        assert here.headers["x-stream-id"] == outcome.id


async def test_what_could_not_be_read_is_passed_on() -> None:
    """An event that is no JSON comes to the client as it came from the upstream, under its name."""
    body = (
        b"event: odd\ndata: {{{\ndata: more\n\n"
        b'data: {"choices":[{"index":0,"delta":{"content":"a"},"finish_reason":"stop"}]}\n\ndata: [DONE]\n\n'
    )
    path, asking = STREAMED["chat"]
    async with gateway_at(respond=lambda _: Script(body=body)) as place, place.client() as client:
        assert (await client.post(path, json=asking)).content == body
        assert (await place.outcome()).skipped == 1


async def test_what_could_not_be_read_nor_kept_is_no_silent_gap() -> None:
    """An unreadable event that is too long to be kept ends the answer with an error, not with a hole."""
    body = b"data: " + b"{" * 70_000 + b"\n\ndata: [DONE]\n\n"
    path, asking = STREAMED["chat"]
    async with gateway_at(respond=lambda _: Script(body=body)) as place, place.client() as client:
        answer = await client.post(path, json=asking)
        assert (answer.status_code, answer.json()["error"]["code"]) == (502, "protocol")


async def test_another_name_for_the_model_changes_nothing_else() -> None:
    """Where the upstream has another name for a model, it is put in; every other value stays as it was written."""
    body = b'{"a": 1.0, "model":"short",  "n" : 12345678901234567890123, "stream":true,"s":"\\u00e9"}'

    def named(url: str) -> dict[str, Upstream]:
        return upstreams_at(url, models={"short": TWO})

    async with gateway_at(upstreams=named) as place, place.client() as client:
        assert (await client.post(CHAT, content=body)).status_code == 200
        sent = place.up.requests[-1].body
        assert sent == (
            b'{"a":1.0,"model":"sim/ok?tokens=2","n":12345678901234567890123,"stream":true,"s":"\\u00e9"}'
        )
        assert (await client.post(google("short", "generateContent"), json={})).status_code == 200
        assert place.up.requests[-1].target == f"/v1beta/models/{quote(TWO, safe='')}:generateContent"
        await client.post(CHAT, json={"model": TWO, "stream": True})
        assert json.loads(place.up.requests[-1].body)["model"] == TWO


# --- what goes wrong -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", STREAMED)
async def test_an_error_of_the_upstream_is_passed_on(name: str) -> None:
    """Before anything was sent the client gets the provider's own status, body, type, and when to come back."""
    path, body = with_model(*STREAMED[name], "sim/429?retry_after=7")
    headers = (("x-request-id", "r1"), ("openai-organization", "ours"), ("set-cookie", "a=b"))

    def respond(_: object) -> Script:
        return Script(status=429, retry_after="7", headers=headers)

    async with gateway_at(respond=respond) as place, place.client() as client:
        there = await client.post(place.direct + path, json=body)
        here = await client.post(path, json=body)
        assert (here.status_code, here.content) == (429, there.content)
        assert [here.headers[one] for one in ("content-type", "retry-after", "x-request-id")] == [
            there.headers["content-type"],
            "7",
            "r1",
        ]
        assert not {"openai-organization", "set-cookie"} & set(here.headers)
        assert here.headers["x-stream-id"] == place.newest().id


@pytest.mark.parametrize("name", STREAMED)
@pytest.mark.parametrize("fault", ["drop", "end", "error"])
async def test_an_answer_that_breaks_off_never_looks_complete(name: str, fault: str) -> None:
    """What was received is followed by an error in the provider's shape: ours, or the provider's own if it told one."""
    path, body = with_model(*STREAMED[name], f"sim/{fault}?after=2&tokens=9")
    async with gateway_at() as place, place.client() as client:
        answer = await client.post(path, json=body)
        outcome = await place.outcome()
    assert answer.status_code == 200
    assert b"w1 " in answer.content
    assert outcome.reason == ("provider_error" if fault == "error" else "truncated")
    told = error_of(answer.content)
    error = told["response"]["error"] if "response" in told else told["error"]
    message = error if isinstance(error, str) else error["message"]
    assert message == (
        "simulated failure inside the stream"
        if fault == "error"
        else "the upstream's answer broke off before its end"
    )
    assert (b"broke off" in answer.content) == (fault != "error")
    assert b"127.0.0.1" not in answer.content


@pytest.mark.parametrize("name", [*STREAMED])
async def test_an_upstream_that_cannot_be_reached(name: str, nowhere: str) -> None:
    """The client is told by a status and the provider's shape of an error, with the stream's id and no address."""
    path, body = STREAMED[name]
    async with (
        gateway_at(upstreams=lambda _: upstreams_at(nowhere)) as place,
        place.client() as client,
    ):
        answer = await client.post(path, json=body)
        assert (answer.status_code, answer.headers["x-stream-id"]) == (502, place.newest().id)
        told = answer.json()["error"]
        assert "could not be reached" in (told if isinstance(told, str) else told["message"])
        assert b"127.0.0.1" not in answer.content


async def test_a_whole_answer_is_sent_whole_or_not_at_all() -> None:
    """A JSON answer that broke off comes as an error with a status; one that says that it failed gets a status, too."""
    path, body = WHOLE["chat"]
    for cut, kept in ((b'{"id":"x","choices":[{"ind', False), (b'{"error":{"message":"no"}}', True)):
        script = Script(body=cut, content_type="application/json")
        async with gateway_at(respond=lambda _, script=script: script) as place, place.client() as client:
            answer = await client.post(path, json=body)
            assert answer.status_code == 502
            assert answer.json()["error"]["message"]
            assert (answer.content == cut) == kept


async def test_a_whole_answer_need_not_say_that_it_has_ended() -> None:
    """A response that is only queued is an answer, too: what is whole is told by the body's end."""
    queued = b'{"id":"resp_1","object":"response","status":"queued","output":[],"error":null}'
    path, body = WHOLE["background"]
    script = Script(body=queued, content_type="application/json")
    async with gateway_at(respond=lambda _: script) as place, place.client() as client:
        answer = await client.post(path, json=body)
        assert (answer.status_code, answer.content) == (200, queued)


async def test_an_event_stream_in_place_of_a_whole_answer_has_to_say_that_it_has_ended() -> None:
    """Asked for a whole answer, an upstream streams one and stops in the middle: that is no answer, however the body ended."""
    cut = b'data: {"id":"x","choices":[{"index":0,"delta":{"content":"Half"}}]}\n\n'
    path, body = WHOLE["chat"]
    async with gateway_at(respond=lambda _: Script(body=cut)) as place, place.client() as client:
        answer = await client.post(path, json=body)
        assert b'"truncated"' in answer.content, answer.content


async def test_a_get_that_nobody_reads_asks_no_upstream() -> None:
    """What another site's page has a browser fetch, and a HEAD, are refused before an upstream is asked."""
    async with gateway_at() as place, place.client() as client:
        path = "/v1/responses/resp_1?stream=true"
        assert (await client.head(path)).status_code == 405
        for given in ({"sec-fetch-site": "cross-site"}, {"origin": "http://evil.example"}):
            assert (await client.get(path, headers=given)).status_code == 403
        assert place.up.request_count == 0


async def test_a_choice_that_never_began_is_missed_when_the_connection_is_lost() -> None:
    """The first of two answers asked for has ended, and the connection is lost: it is told as an error, not as the end."""
    first = b'data: {"id":"x","choices":[{"index":0,"delta":{"content":"A"},"finish_reason":"stop"}]}\n\n'
    path, body = STREAMED["chat"]
    lost = Script(body=first, fault="drop")
    async with gateway_at(respond=lambda _: lost) as place, place.client() as client:
        for n, said in ((1, False), (2, True)):
            answer = await client.post(path, json={**body, "n": n})
            assert (b'"truncated"' in answer.content) == said


async def test_a_whole_answer_has_clocks_of_its_own() -> None:
    """It says nothing until it is complete: the first event of a stream is waited for less long."""
    clocks, slow = Deadlines(first_event_s=0.02, idle_s=0.02), "sim/ok?head_after_s=0.1"
    async with gateway_at(deadlines=clocks) as place, place.client() as client:
        path, body = with_model(*STREAMED["chat"], slow)
        answer = await client.post(path, json=body)
        assert (answer.status_code, answer.json()["error"]["code"]) == (504, "first_event")
        assert (await client.post(path, json={**body, "stream": False})).status_code == 200


async def test_what_was_sent_is_not_taken_back() -> None:
    """An upstream that may be asked anew is not, once something was passed on; before that it is."""
    policy = RetryPolicy(
        attempts=3, wait_initial_s=0, wait_max_s=0, resume=("sequence", "continuation", "restart")
    )

    def patient(url: str) -> dict[str, Upstream]:
        return upstreams_at(url, retry=policy)

    path, body = STREAMED["chat"]
    async with gateway_at(upstreams=patient) as place, place.client() as client:
        answer = await client.post(path, json={**body, "model": "sim/drop?after=2&times=1"})
        assert error_of(answer.content)["error"]["code"] == "truncated"
        assert place.up.request_count == 1
        answer = await client.post(path, json={**body, "model": "sim/500?times=1"})
        assert answer.content.endswith(b"data: [DONE]\n\n")
        assert place.up.request_count == 3


async def test_an_answers_own_headers_are_passed_on() -> None:
    """Request ids and what is said of rate limits come with an answer, streamed or whole; cookies and accounts do not."""
    headers = (("x-request-id", "r1"), ("x-ratelimit-remaining-tokens", "9"), ("openai-organization", "ours"))

    async with gateway_at(respond=lambda _: Script(headers=headers)) as place, place.client() as client:
        for path, body in (STREAMED["chat"], WHOLE["chat"]):
            answer = await client.post(path, json=body)
            assert [answer.headers.get(name) for name, _ in headers] == ["r1", "9", None]


async def test_a_json_answer_to_a_request_for_a_stream() -> None:
    """An upstream that answers with one JSON value, though asked for a stream, is passed on as that."""
    path, body = with_model(*STREAMED["chat"], "sim/json?tokens=2")
    async with gateway_at() as place, place.client() as client:
        there = await client.post(place.direct + path, json=body)
        here = await client.post(path, json=body)
        assert (here.content, here.headers["content-type"]) == (there.content, "application/json")


MISTAKES = {
    "no JSON": (CHAT, b"{", {}, 400),
    "no object": (CHAT, b"[]", {}, 400),
    "no text": (CHAT, b'{"model":"m","x":"\xff"}', {}, 400),
    "deep": (CHAT, b'{"a":' + b"[" * 100_000, {}, 400),
    "no model": (CHAT, b"{}", {}, 400),
    "a long model": (CHAT, b'{"model":"%b"}' % (b"m" * 513), {}, 400),
    "a number for a model": ("/v1/messages", b'{"model":3}', {}, 400),
    "encoded": (CHAT, b"\x1f\x8b", {"content-encoding": "gzip"}, 415),
    "an odd verb": ("/v1beta/models/m:countTokens", b"{}", {}, 404),
    "a way out": ("/v1beta/models/..%2F..%2Fadmin:generateContent", b"{}", {}, 404),
    "another way out": ("/v1/responses/%2E%2E/cancel", b"", {}, 404),
    "more than an id": ("/v1/responses/a%3Fb/cancel", b"", {}, 404),
    "a bad key": (CHAT, b'{"model":"m"}', {"x-stream-key": "a b"}, 400),
    "a bad policy": (CHAT, b'{"model":"m"}', {"x-stream-on-disconnect": "maybe"}, 400),
    "a control character": (CHAT, b'{"model":"m"}', {"traceparent": "a\x01"}, 400),
    "a delete": (STREAMED["google array"][0], b"{}", {"x-title": "a\x7fb"}, 400),
    "one about a response": ("/v1/responses/a/cancel", b"", {"openai-beta": "\x1fa"}, 400),
}


@pytest.mark.parametrize("mistake", MISTAKES)
async def test_mistakes_are_told_in_the_providers_shape(mistake: str) -> None:
    """What cannot be understood is refused with a status and an error, and nothing is asked of the upstream."""
    path, body, headers, status = MISTAKES[mistake]
    async with gateway_at() as place, place.client() as client:
        answer = await client.post(path, content=body, headers=headers)
        assert answer.status_code == status
        assert answer.json()["error"]["message"]
        assert answer.headers["x-should-retry"] == "false"
        assert place.up.request_count == 0


ASTRAY = {
    ("POST", "/chat/completions"): (
        404,
        "no /chat/completions here, but /v1/chat/completions: the",
        "HERE/v1",
    ),
    ("POST", "/v1/v1/responses"): (404, "no /v1/v1/responses here, but /v1/responses: the", "HERE/v1"),
    ("POST", "/messages"): (404, "no /messages here, but /v1/messages: the", "HERE/v1"),
    ("POST", "/v1/v1/messages"): (404, "no /v1/v1/messages here, but /v1/messages: the", "HERE"),
    ("POST", "/v1/api/chat"): (404, "no /v1/api/chat here, but /api/chat: the", "HERE"),
    ("GET", "/models"): (404, "no /models here, but /v1/models: the", "HERE/v1"),
    ("POST", "/v1/embeddings"): (404, "/v1/embeddings is not served here: ", "embeddings, files"),
    ("POST", "/embeddings"): (404, "/embeddings is not served here: ", "embeddings, files"),
    ("POST", "/v1/messages/count_tokens"): (
        404,
        "/v1/messages/count_tokens is not served here: ",
        "counting",
    ),
    ("GET", "/api/tags"): (404, "/api/tags is not served here: ", ""),
    ("GET", "/v1beta/models"): (404, "is not served here", ""),
    ("GET", "/v1/chat/completions"): (405, "is asked by POST here, not by GET", ""),
    ("POST", "/v1/models"): (405, "is asked by GET here, not by POST", ""),
    ("PUT", "/v1/responses/resp_1"): (405, "is asked by DELETE or GET here, not by PUT", ""),
}


@pytest.mark.parametrize(("method", "path"), ASTRAY)
async def test_a_request_astray_is_told_where_to_go(method: str, path: str) -> None:
    """A base URL that is nearly right, and what is not served, are told in the provider's shape with words that help."""
    status, *words = ASTRAY[method, path]
    async with gateway_at() as place, place.client() as client:
        answer = await client.request(method, path, content=b"{}")
        assert answer.status_code == status
        assert (answer.headers.get("allow") is not None) == (status == 405)
        error = answer.json()["error"]
        message = error if "/api" in path else error["message"]
        if "/messages" in path:
            assert answer.json()["type"] == "error"
        if "/v1beta" in path:
            assert error["status"] == "NOT_FOUND"
        for said in words:
            wanted = str(said).replace("HERE", place.here)
            assert wanted in message
            assert "HERE" not in str(said) or message.endswith(wanted)


async def test_too_many_and_too_late_are_told_with_when_to_come_back() -> None:
    """At the limit of live streams 429, while draining 503, both in the provider's shape and with Retry-After."""
    path, body = STREAMED["chat"]
    stalled = {**body, "model": "sim/stall?after=1"}
    async with gateway_at(limits=Limits(max_live=1, retry_after_s=3)) as place, place.client() as client:
        async with client.stream("POST", path, json=stalled) as answer:
            assert answer.status_code == 200
            refused = await client.post(path, json=body)
            assert (refused.status_code, refused.headers["retry-after"]) == (429, "3")
            assert refused.json()["error"]["type"] == "rate_limit_error"
        await place.outcome()
        await place.sup.drain()
        refused = await client.post("/v1/messages", json=body)
        assert (refused.status_code, refused.json()["error"]["type"]) == (503, "overloaded_error")


async def test_a_stop_by_an_operator_is_told() -> None:
    """Cancelled before the head: 499, not to be repeated; in the middle: an error event."""
    async with gateway_at() as place, place.client() as client, trio.open_nursery() as nursery:
        path, body = STREAMED["messages"]

        async def early() -> None:
            answer = await client.post(path, json={**body, "model": "sim/silent"})
            assert (answer.status_code, answer.headers["x-should-retry"]) == (499, "false")
            assert answer.json()["error"]["message"] == "the answer was cancelled by ops: enough"

        nursery.start_soon(early)
        await place.up.wait_requests(1)
        await place.sup.cancel(place.newest().id, reason="enough", actor="ops")
        async with client.stream("POST", path, json={**body, "model": "sim/stall?after=1"}) as answer:
            await place.sup.cancel(place.newest().id, actor="ops")
            text = (await answer.aread()).decode()
        assert text.endswith(
            '"error":{"type":"invalid_request_error","message":"the answer was cancelled by ops"},'
            f'"request_id":"{answer.headers["x-stream-id"]}"}}\n\n'
        )


def test_a_refusal_is_told_from_the_outcome_alone() -> None:
    """Where the upstream's own answer is not known any more, its status and words are those of the outcome."""
    fault = Fault(kind="rate_limit", message="slow", code="busy", status=429, temporary=True, retry_after_s=7)
    outcome = Outcome(
        id="s",
        key=None,
        state=State.FAILED,
        reason="http_status",
        fault=fault,
        last_seq=1,
        started_at=0,
        ended_at=1,
    )
    told = failure_of(outcome)
    assert (told.status, told.code, told.message, told.retry_after_s) == (429, "busy", "slow", 7)
    redirected = attrs.evolve(outcome, fault=Fault(kind="invalid_request", message="to http://x", status=302))
    assert (failure_of(redirected).status, "http" in failure_of(redirected).message) == (502, False)


# --- silence ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "sign"), [("chat", b": keep-alive\n\n"), ("google events", b"\n")])
async def test_a_silent_stream_gives_signs_of_life(name: str, sign: bytes) -> None:
    """In silence the head and comments are sent, in a form that the provider's SDK passes over; an error is then an event."""
    path, body = with_model(*STREAMED[name], "sim/silent")
    config = GatewayConfig(keep_alive_s=0.01)
    async with gateway_at(config=config) as place, place.client() as client:
        async with client.stream("POST", path, json=body) as answer:
            assert (answer.status_code, answer.headers["content-type"]) == (
                200,
                "text/event-stream; charset=utf-8",
            )
            pieces = answer.aiter_raw()
            assert (await anext(pieces)).startswith(sign)
            await place.sup.cancel(place.newest().id, actor="ops", mode="abort")
            rest = b"".join([piece async for piece in pieces])
        assert "cancelled by ops" in error_of(rest)["error"]["message"]


async def test_what_has_no_comments_is_silent() -> None:
    """Lines of JSON, and an answer that is one value, wait for what there is to tell."""
    config = GatewayConfig(keep_alive_s=0.001)
    for path, body in (STREAMED["ollama chat"], WHOLE["chat"], STREAMED["google array"]):
        slow = with_model(path, body, "sim/ok?tokens=2&head_after_s=0.02")
        async with gateway_at(config=config) as place, place.client() as client:
            answer = await client.post(slow[0], json=slow[1])
            assert answer.status_code == 200
            assert not answer.content.startswith((b":", b"\n"))
            late = with_model(path, body, "sim/500?head_after_s=0.02")
            assert (await client.post(late[0], json=late[1])).status_code == 500


async def test_the_head_is_not_sent_before_there_is_something_to_tell() -> None:
    """A client of a slow upstream has no status until the first event."""
    path, body = with_model(*STREAMED["chat"], "sim/ok?first_after_s=0.05&tokens=1")
    async with gateway_at() as place, place.client() as client:
        with pytest.raises(httpx.ReadTimeout):
            await client.post(path, json=body, timeout=0.02)
        await place.outcome()
