"""The gateway over a socket: what reaches the upstream, what comes back, and whose it is."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import attrs
import httpx
import pytest
import trio
import trio.testing

from supervisor.config import parse
from supervisor.control.auth import Token
from supervisor.dialects import Fault, find
from supervisor.errors import ConfigurationError
from supervisor.streams import Deadlines, Limits, Outcome, State
from supervisor.testing.upstream import Script, unreachable_url
from supervisor.upstream import Credential, RetryPolicy, Upstream
from supervisor.web.app import WebAccess
from supervisor.web.gateway import GatewayClient, GatewayConfig, GatewayRoute
from supervisor.web.gateway.asked import ENDPOINTS
from supervisor.web.gateway.relay import failure_of
from tests.web.gateways import ONCE, asking_at, gateway_at, upstreams_at

TWO = "sim/ok?tokens=2"
CHAT = "/v1/chat/completions"
KEYS = ("UPSTREAM_KEY", "sk-upstream-0123456789")


def google(model: str, verb: str) -> str:
    return f"/v1beta/models/{quote(model, safe='')}:{verb}"


def asked(path: str, model: str = TWO, **more: Any) -> tuple[str, dict[str, Any]]:
    """Return a path and a body that suits it."""
    if path.startswith("google"):
        return google(model, path.partition(" ")[2]), {"contents": [], **more}
    return path, {"model": model, "messages": [], "prompt": "", "input": "", **more}


STREAMED = {
    "chat": asked(CHAT, stream=True),
    "completions": asked("/v1/completions", stream=True),
    "responses": asked("/v1/responses", stream=True),
    "messages": asked("/v1/messages", stream=True),
    "google events": asked("google streamGenerateContent?alt=sse"),
    "google array": asked("google streamGenerateContent"),
    "ollama chat": asked("/api/chat"),
    "ollama generate": asked("/api/generate"),
}
WHOLE = {
    "chat": asked(CHAT, stream=False),
    "completions": asked("/v1/completions"),
    "responses": asked("/v1/responses"),
    "background": asked("/v1/responses", background=True),
    "messages": asked("/v1/messages"),
    "google": asked("google generateContent"),
    "ollama chat": asked("/api/chat", stream=False),
    "ollama generate": asked("/api/generate", stream=False),
}


def with_model(path: str, body: dict[str, Any], model: str) -> tuple[str, dict[str, Any]]:
    """Ask the same of another model."""
    if "/models/" in path:
        return path.replace(quote(TWO, safe=""), quote(model, safe="")), body
    return path, {**body, "model": model}


def error_of(answer: bytes) -> Any:
    """Return the JSON of the last event of an answer, however it is framed."""
    text = answer.decode().strip()
    if text.startswith("["):
        return json.loads(text)[-1]
    return json.loads(text.splitlines()[-1].removeprefix("data: "))


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


# --- headers and keys ------------------------------------------------------------------------------------------------


def keyed(url: str) -> dict[str, Upstream]:
    return upstreams_at(url, credential=Credential.from_env(KEYS[0]))


async def test_headers_that_matter_are_passed_and_keys_are_not(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the provider's API knows is passed on, the client's key and cookies are not: the upstream's own key is sent."""
    monkeypatch.setenv(*KEYS)
    theirs = {
        "authorization": "Bearer client-key",
        "x-api-key": "client-key",
        "cookie": "a=client-key",
        "openai-beta": "one",
        "anthropic-beta": "two",
        "idempotency-key": "three",
        "x-sim-script": TWO,
        "x-other": "four",
    }
    async with gateway_at(upstreams=keyed) as place, place.client() as client:
        for path, _ in (STREAMED["chat"], STREAMED["messages"], STREAMED["google events"]):
            more = f"{path}{'&' if '?' in path else '?'}key=client-key&beta=true"
            answer = await client.post(more, json={"model": "m", "stream": True}, headers=theirs)
            assert answer.status_code == 200
            request = place.up.requests[-1]
            assert "client-key" not in f"{request.target}{request.headers}"
            assert KEYS[1] in str(request.headers)
            assert "beta=true" in request.target
            assert [request.header(name) for name in list(theirs)[3:]] == ["one", "two", "three", TWO, ""]
        path, body = STREAMED["messages"]
        await client.post(path, json=body, headers={"anthropic-version": "2099-01-01"})
        assert place.up.requests[-1].header("anthropic-version") == "2099-01-01"
        await client.post(path, json=body)
        assert place.up.requests[-1].header("anthropic-version") == "2023-06-01"


PLACES = {
    "bearer": {"authorization": "Bearer %"},
    "anthropic": {"x-api-key": "%"},
    "google": {"x-goog-api-key": "%"},
    "azure": {"api-key": "%"},
}


async def test_a_clients_key_says_whose_it_is(tmp_path: Path) -> None:
    """Wherever an SDK puts its key, it is looked up, and the stream is of its tenant; without a good one nothing is asked."""
    (tmp_path / "key").write_text("key-of-two\n")
    config = GatewayConfig(
        clients=(
            GatewayClient(tenant="one", key_env="ONE"),
            GatewayClient(tenant="two", key_file=tmp_path / "key"),
        )
    )
    path, body = WHOLE["chat"]
    access = WebAccess(token=Token("control"))
    async with (
        gateway_at(config=config, environ={"ONE": "key-of-one"}, access=access) as place,
        place.client() as client,
    ):
        for headers in PLACES.values():
            for tenant in ("one", "two"):
                shown = {name: value.replace("%", f"key-of-{tenant}") for name, value in headers.items()}
                assert (await client.post(path, json=body, headers=shown)).status_code == 200
                assert place.newest().tenant == tenant
        assert (await client.post(f"{path}?key=key-of-two", json=body)).status_code == 200
        count = place.up.request_count
        for headers in ({}, {"authorization": "Bearer control"}, {"x-api-key": "key-of-three"}):
            answer = await client.post(path, json=body, headers=headers)
            assert (answer.status_code, answer.json()["error"]["type"]) == (401, "authentication_error")
        assert place.up.request_count == count


async def test_without_clients_the_control_token_is_the_key() -> None:
    """Where no client is configured the daemon's token is asked for, in any of the places; where there is none, nothing."""
    path, body = WHOLE["messages"]
    async with gateway_at(access=WebAccess(token=Token("control"))) as place, place.client() as client:
        answer = await client.post(path, json=body)
        assert (answer.status_code, answer.json()["error"]["type"]) == (401, "authentication_error")
        for headers in PLACES.values():
            shown = {name: value.replace("%", "control") for name, value in headers.items()}
            assert (await client.post(path, json=body, headers=shown)).status_code == 200
    async with gateway_at() as place, place.client() as client:
        assert (await client.post(path, json=body)).status_code == 200


# --- where it goes ---------------------------------------------------------------------------------------------------


def several(url: str) -> dict[str, Upstream]:
    first = upstreams_at(url)
    other = attrs.evolve(first["openai-chat"], name="other", base_url=f"{url}/other/v1")
    return {**first, "other": other}


async def test_models_are_routed_by_pattern() -> None:
    """The first route that fits takes a request, of those to the client's API; a model that none fits is told so."""
    config = GatewayConfig(
        routes=(
            GatewayRoute(models=("sim/*",), upstream="anthropic"),
            GatewayRoute(models=("sim/ok?tokens=3",), upstream="other"),
            GatewayRoute(models=("sim/*", "x"), upstream="openai-chat"),
        )
    )
    async with gateway_at(config=config, upstreams=several) as place, place.client() as client:
        for model, target in ((TWO, f"{CHAT}"), ("sim/ok?tokens=3", f"/other{CHAT}")):
            await client.post(CHAT, json={"model": model})
            assert place.up.requests[-1].target == target
        answer = await client.post(CHAT, json={"model": "gpt-5"})
        assert (answer.status_code, answer.json()["error"]["code"]) == (404, "model_not_found")
    async with gateway_at(upstreams=lambda _: {}) as place, place.client() as client:
        answer = await client.post("/v1/messages", json={"model": "m"})
        assert (answer.status_code, answer.json()["error"]["type"]) == (404, "not_found_error")


async def test_an_upstream_of_the_very_api_comes_before_its_family() -> None:
    """Without routes a request goes to the first upstream of its API, whatever else speaks the provider's."""

    def two(url: str) -> dict[str, Upstream]:
        chat = upstreams_at(url)["openai-chat"]
        own = attrs.evolve(chat, name="own", base_url=f"{url}/own/v1", dialect=find("openai-responses"))
        return {"openai-chat": chat, "own": own}

    async with gateway_at(upstreams=two) as place, place.client() as client:
        for name, target in (("responses", "/own/v1/responses"), ("completions", "/v1/completions")):
            path, body = STREAMED[name]
            await client.post(path, json=body)
            assert place.up.requests[-1].target == target


async def test_a_fallback_answers_in_the_others_place(nowhere: str) -> None:
    """An upstream that cannot be reached is told by nothing but who answered; the fallback serves the same endpoint."""

    def broken(url: str) -> dict[str, Upstream]:
        made = upstreams_at(url)
        first = attrs.evolve(
            made["openai-chat"],
            name="broken",
            base_url=nowhere,
            fallback=(made["openai-chat"],),
            retry=attrs.evolve(ONCE, attempts=2),
        )
        return {"broken": first}

    path, body = STREAMED["responses"]
    async with gateway_at(upstreams=broken) as place, place.client() as client:
        answer = await client.post(path, json=body)
        assert (answer.status_code, place.up.requests[-1].target) == (200, "/v1/responses")
        assert (await place.outcome()).attempts == 2


async def test_a_request_does_not_go_in_a_circle() -> None:
    """A gateway that is its own upstream, as after an `OPENAI_BASE_URL` too many, says so; two in a row are well."""
    path, body = STREAMED["chat"]
    async with gateway_at() as inner, gateway_at(upstreams=lambda _: upstreams_at(inner.here)) as outer:
        async with outer.client() as client:
            assert (await client.post(path, json=body)).status_code == 200
        circle = Upstream(name="circle", base_url=f"{outer.here}/v1", retry=ONCE, proxy="direct")
        inner.upstreams.clear()
        inner.upstreams["circle"] = circle
        async with outer.client() as client:
            answer = await client.post(path, json=body)
        assert (answer.status_code, answer.json()["error"]["code"]) == (508, "loop")
        assert [info.upstream for info in inner.sup.list()] == ["circle", "openai-chat"]


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
    """A JSON answer that broke off comes as an error with a status; one that says that it failed comes as it is."""
    path, body = WHOLE["chat"]
    for cut, status in ((b'{"id":"x","choices":[{"ind', 502), (b'{"error":{"message":"no"}}', 200)):
        script = Script(body=cut, content_type="application/json")
        async with gateway_at(respond=lambda _, script=script: script) as place, place.client() as client:
            answer = await client.post(path, json=body)
            assert answer.status_code == status
            assert answer.json()["error"]["message"]
            assert (answer.content == cut) == (status == 200)


async def test_a_whole_answer_need_not_say_that_it_has_ended() -> None:
    """A response that is only queued is an answer, too: what is whole is told by the body's end."""
    queued = b'{"id":"resp_1","object":"response","status":"queued","output":[],"error":null}'
    path, body = WHOLE["background"]
    script = Script(body=queued, content_type="application/json")
    async with gateway_at(respond=lambda _: script) as place, place.client() as client:
        answer = await client.post(path, json=body)
        assert (answer.status_code, answer.content) == (200, queued)


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
}


@pytest.mark.parametrize("mistake", MISTAKES)
async def test_mistakes_are_told_in_the_providers_shape(mistake: str) -> None:
    """What cannot be understood is refused with a status and an error, and nothing is asked of the upstream."""
    path, body, headers, status = MISTAKES[mistake]
    async with gateway_at() as place, place.client() as client:
        answer = await client.post(path, content=body, headers=headers)
        assert answer.status_code == status
        assert answer.json()["error"]["message"]
        assert place.up.request_count == 0


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


async def test_a_missing_credential_is_the_operators_to_know() -> None:
    """A request that cannot be served for a mistake in the configuration says so, and not which."""
    path, body = STREAMED["chat"]
    async with gateway_at(upstreams=keyed) as place, place.client() as client:
        answer = await client.post(path, json=body)
        assert (answer.status_code, KEYS[0] in answer.text) == (500, False)


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


# --- keys and leaving ------------------------------------------------------------------------------------------------


async def test_a_key_joins_the_same_answer() -> None:
    """A request with the key of another, in flight or ended, gets the same answer; the upstream was asked once."""
    path, body = STREAMED["chat"]
    headers = {"x-stream-key": "k1"}
    async with gateway_at() as place, place.client() as client:
        first = await client.post(path, json=body, headers=headers)
        second = await client.post(path, json=body, headers=headers)
        assert (first.content, first.headers["content-type"]) == (
            second.content,
            second.headers["content-type"],
        )
        assert (first.headers["x-stream-id"], place.up.request_count) == (second.headers["x-stream-id"], 1)
        for status in (500, 200, 200):  # what failed before its first event is no answer
            again = {**body, "model": "sim/500?times=1"}
            answer = await client.post(path, json=again, headers={"x-stream-key": "k2"})
            assert answer.status_code == status
        for other_path, other in (WHOLE["chat"], STREAMED["messages"], (path, {**body, "model": "m"})):
            conflict = await client.post(other_path, json=other, headers=headers)
            assert conflict.status_code == 409
        assert place.up.request_count == 3


async def test_who_joins_sees_the_upstreams_own_refusal() -> None:
    """Two requests of one key, made before the upstream refuses, both get its answer, in its words and with its headers."""
    headers = {"x-stream-key": "k"}
    path, body = with_model(*STREAMED["chat"], "sim/429?head_after_s=0.05&retry_after=7&message=slow")
    answers: list[httpx.Response] = []
    async with gateway_at() as place, place.client() as client:

        async def ask() -> None:
            answers.append(await client.post(path, json=body, headers=headers))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(ask)
            nursery.start_soon(ask)
        assert place.up.request_count == 1
        assert {(one.status_code, one.headers["retry-after"], one.content) for one in answers} == {
            (429, "7", answers[0].content)
        }
        assert answers[0].json()["error"]["message"] == "slow"


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


async def test_a_key_is_its_tenants() -> None:
    """The stream of another tenant is not read by its key."""
    config = GatewayConfig(clients=tuple(GatewayClient(tenant=name, key_env=name) for name in ("a", "b")))
    path, body = STREAMED["chat"]
    async with (
        gateway_at(config=config, environ={"a": "key-a", "b": "key-b"}) as place,
        place.client() as client,
    ):
        for key, status in (("key-a", 200), ("key-b", 409)):
            headers = {"x-stream-key": "k", "x-api-key": key}
            assert (await client.post(path, json=body, headers=headers)).status_code == status


POLICIES: dict[str, tuple[GatewayConfig, dict[str, str], dict[str, Any], str]] = {
    "as it is": (GatewayConfig(), {}, {}, "cancelled"),
    "kept by a header": (GatewayConfig(), {"x-stream-on-disconnect": "keep"}, {}, "live"),
    "kept": (GatewayConfig(on_disconnect="keep"), {}, {}, "live"),
    "cancelled by a header": (
        GatewayConfig(on_disconnect="keep"),
        {"x-stream-on-disconnect": "cancel"},
        {},
        "cancelled",
    ),
    "by the route": (
        GatewayConfig(routes=(GatewayRoute(upstream="openai-chat", on_disconnect="keep"),)),
        {},
        {},
        "live",
    ),
    "with grace": (GatewayConfig(grace_s=60), {}, {}, "live"),
    "with the route's grace": (
        GatewayConfig(grace_s=60, routes=(GatewayRoute(upstream="openai-chat", grace_s=0),)),
        {},
        {},
        "cancelled",
    ),
    "in the background": (GatewayConfig(), {}, {"background": True}, "live"),
}


@pytest.mark.parametrize("policy", POLICIES)
async def test_what_becomes_of_an_answer_whose_client_has_left(policy: str) -> None:
    """It is cancelled, or kept, as the header says, or the route, or the gateway; a background response is kept."""
    config, headers, more, expected = POLICIES[policy]
    path, body = STREAMED["responses"]
    async with gateway_at(config=config) as place:
        asking = {**body, **more, "model": "sim/stall?after=1"}
        async with asking_at(place, path, asking, headers) as connection:
            assert b"200" in await connection.receive_some()
            stream = place.sup.get(place.newest().id)
            assert stream.info().readers == 1
        while stream.info().readers:  # noqa: ASYNC110  # nothing tells that a reader has left
            await trio.lowlevel.checkpoint()
        if expected == "cancelled":
            assert (await stream.wait()).reason == "detached"
            await place.up.wait_open(0)
        else:
            await trio.testing.wait_all_tasks_blocked(0.02)  # whatever would end it has had its turn
            assert stream.state == "streaming"
            assert len(place.up.open_connections) == 1


# --- what OpenAI keeps -----------------------------------------------------------------------------------------------


def first_and_chat(url: str) -> dict[str, Upstream]:
    chat = upstreams_at(url)["openai-chat"]
    return {
        "first": attrs.evolve(chat, name="first", base_url=f"{url}/first/v1"),
        "chat": attrs.evolve(chat, name="chat"),
    }


async def test_a_response_is_asked_of_the_upstream_that_made_it() -> None:
    """Reading on, looking, cancelling: at the upstream that has it, for the tenant whose it is, in the upstream's words."""
    config = GatewayConfig(
        routes=(GatewayRoute(models=("sim/*",), upstream="chat"), GatewayRoute(upstream="first")),
        clients=tuple(GatewayClient(tenant=name, key_env=name) for name in ("a", "b")),
    )
    environ = {"a": "key-a", "b": "key-b"}
    async with (
        gateway_at(upstreams=first_and_chat, config=config, environ=environ) as place,
        place.client(headers={"x-api-key": "key-a"}) as client,
    ):
        path, body = STREAMED["responses"]
        whole = await client.post(path, json={**body, "background": True, "model": "sim/ok?tokens=4"})
        created = json.loads(whole.text.partition("data: ")[2].partition("\n")[0])
        at = f"{path}/{created['response']['id']}"
        rest = await client.get(f"{at}?stream=true&starting_after=4")
        assert whole.text.endswith(rest.text)
        assert rest.text.startswith("event: ")
        looked = await client.get(at)
        assert (looked.json()["status"], looked.headers["content-type"]) == ("completed", "application/json")
        assert (await client.post(f"{at}/cancel")).status_code == 200
        assert {request.target.partition("?")[0] for request in place.up.requests} == {
            path,
            at,
            f"{at}/cancel",
        }
        count = place.up.request_count
        assert (await client.get(at, headers={"x-api-key": "key-b"})).status_code == 404
        assert place.up.request_count == count
        unknown = await client.get(f"{path}/resp_unknown")  # the first that could have made it
        assert place.up.requests[-1].target == "/first/v1/responses/resp_unknown"
        assert (unknown.status_code, unknown.json()["error"]["message"]) == (
            404,
            "Response with id 'resp_unknown' not found.",
        )
        assert (await client.delete(at)).status_code == 404  # which the simulated provider does not have
        assert place.up.requests[-1].method == "DELETE"


async def test_the_responses_remembered_are_bounded() -> None:
    """Of more responses than are remembered, the oldest are asked for where any could have been made."""
    path, body = STREAMED["responses"]
    config = GatewayConfig(
        max_responses=2,
        routes=(GatewayRoute(models=("sim/*",), upstream="chat"), GatewayRoute(upstream="first")),
    )
    async with gateway_at(upstreams=first_and_chat, config=config) as place, place.client() as client:
        for _ in range(3):
            assert (await client.post(path, json=body)).status_code == 200
        for number, base in ((1, "/first"), (2, ""), (3, "")):
            await client.get(f"{path}/resp_sim0000000{number}")
            assert place.up.requests[-1].target == f"{base}{path}/resp_sim0000000{number}"


async def test_the_models_of_all_upstreams_are_listed_once(nowhere: str) -> None:
    """Every upstream's models, where a request for one would reach it, with the names that stand for others."""

    def some(url: str) -> dict[str, Upstream]:
        made = upstreams_at(url, models={"short": "long"})
        gone = attrs.evolve(made["openai-chat"], name="gone", base_url=nowhere, models={"x": "y"})
        return {**made, "gone": gone}

    async with gateway_at(upstreams=some) as place, place.client() as client:
        told = (await client.get("/v1/models")).json()
        assert [(one["id"], one["object"]) for one in told["data"]] == [
            ("short", "model"),
            ("sim/ok", "model"),
        ]
        assert (told["object"], told["first_id"], told["last_id"]) == ("list", "short", "sim/ok")
        config_client = await client.get("/v1/models", headers={"anthropic-version": "2023-06-01"})
        assert [one["owned_by"] for one in config_client.json()["data"]] == ["anthropic", "sim"]
    config = GatewayConfig(routes=(GatewayRoute(models=("x", "sim/*"), upstream="gone"),))
    async with gateway_at(upstreams=some, config=config) as place, place.client() as client:
        assert [one["id"] for one in (await client.get("/v1/models")).json()["data"]] == ["x"]


# --- configuration ---------------------------------------------------------------------------------------------------

WRONG: list[tuple[Any, str]] = [
    (lambda: GatewayConfig(on_disconnect="stop"), "on_disconnect"),  # type: ignore[arg-type]
    (lambda: GatewayConfig(grace_s=-1), "grace_s"),
    (lambda: GatewayConfig(keep_alive_s=0), "keep_alive_s"),
    (lambda: GatewayConfig(headers=("X-Api-Key",)), "headers"),
    (lambda: GatewayClient(tenant="", key_env="A"), "tenant"),
    (lambda: GatewayClient(tenant="a"), "key_env or key_file"),
    (lambda: GatewayClient(tenant="a", key_env="sk-not a name"), "not shown"),
    (lambda: GatewayConfig(routes=(GatewayRoute(upstream="x"),)).check({}, {}), "routes.upstream"),
    (lambda: GatewayConfig(clients=(GatewayClient(tenant="a", key_env="A"),)).check({}, {}), "env:A"),
    (
        lambda: GatewayConfig(clients=tuple(GatewayClient(tenant=name, key_env="A") for name in "ab")).check(
            {}, {"A": "key"}
        ),
        "a key of its own",
    ),
]


@pytest.mark.parametrize(("make", "told"), WRONG)
def test_what_is_wrong_with_the_configuration_is_told(make: Any, told: str) -> None:
    """A mistake names the key, and never shows a secret."""
    with pytest.raises(ConfigurationError, match=told):
        make()


async def test_the_head_is_not_sent_before_there_is_something_to_tell() -> None:
    """A client of a slow upstream has no status until the first event."""
    path, body = with_model(*STREAMED["chat"], "sim/ok?first_after_s=0.05&tokens=1")
    async with gateway_at() as place, place.client() as client:
        with pytest.raises(httpx.ReadTimeout):
            await client.post(path, json=body, timeout=0.02)
        await place.outcome()


async def test_it_is_configured_by_the_file() -> None:
    """The daemon's file has it all, and a mistake in it is told with its table."""
    text = """
        discover = false
        [upstreams.openai]
        base_url = "https://api.openai.com/v1"
        [gateway]
        on_disconnect = "keep"
        [[gateway.routes]]
        models = ["gpt-*"]
        upstream = "openai"
        grace_s = 3
        [[gateway.clients]]
        tenant = "acme"
        key_env = "ACME_KEY"
    """
    config = parse(text)
    assert config.gateway == GatewayConfig(
        on_disconnect="keep",
        routes=(GatewayRoute(models=("gpt-*",), upstream="openai", grace_s=3),),
        clients=(GatewayClient(tenant="acme", key_env="ACME_KEY"),),
    )
    await config.check({"ACME_KEY": "key"})
    with pytest.raises(ConfigurationError, match=r"\[gateway\] credential env:ACME_KEY"):
        await config.check({})
    with pytest.raises(ConfigurationError, match=r"\[gateway\] routes.upstream: 'other'"):
        await parse(text.replace('upstream = "openai"', 'upstream = "other"')).check({"ACME_KEY": "key"})


async def test_the_guides_configuration() -> None:
    """The tables that docs/gateway.md shows are a configuration."""
    page = (Path(__file__).parents[2] / "docs" / "gateway.md").read_text("utf-8")
    config = parse(
        "discover = false\n" + "\n".join(re.findall(r"^```toml\n(.*?)^```", page, re.MULTILINE | re.DOTALL))
    )
    assert (len(config.gateway.routes), len(config.gateway.clients)) == (2, 1)
    await config.check({"ACME_GATEWAY_KEY": "key"})
    for path in [*ENDPOINTS, "/v1beta/models/{model}", "/v1/models"]:
        assert path.removeprefix("/v1") in page
