"""Whose a request to the gateway is, and where it goes; what of its headers goes with it; how that is configured."""

from __future__ import annotations

import re
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import attrs
import httpx
import pytest
import trio
import trio.testing

from supervisor.config import ControlConfig, StoreConfig, WebConfig, parse
from supervisor.control.auth import Token
from supervisor.daemon import Ready, run
from supervisor.dialects import find
from supervisor.errors import ConfigurationError
from supervisor.testing.upstream import SimulatedUpstream, unreachable_url
from supervisor.upstream import Credential, Exchange, StreamTransport, Upstream
from supervisor.web.app import WebAccess
from supervisor.web.gateway import GatewayClient, GatewayConfig, GatewayRoute
from supervisor.web.gateway.asked import ENDPOINTS
from supervisor.web.gateway.service import MODELS_S
from tests.web.gateways import (
    CHAT,
    ONCE,
    PATIENCE_S,
    STREAMED,
    TWO,
    WHOLE,
    gateway_at,
    upstreams_at,
)

KEYS = ("UPSTREAM_KEY", "sk-upstream-0123456789")


@pytest.fixture
def nowhere() -> Iterator[str]:
    """An address that refuses connections."""
    with unreachable_url() as url:
        yield url.removesuffix("/v1")


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
            more = f"{path}{'&' if '?' in path else '?'}key=client-key&%6bey=client-key&beta=true"
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


@pytest.mark.parametrize("title", ["Caf\u00e9\t\u2603".encode(), b"Caf\xe9", b""])
async def test_the_bytes_of_a_header_are_passed_on(title: bytes) -> None:
    """Whatever they are the text of, also where the answer is no stream."""
    path, body = STREAMED["chat"]
    async with gateway_at() as place, place.client(headers={b"x-title": title}) as client:
        assert (await client.post(path, json=body)).status_code == 200
        await client.get("/v1/responses/resp_a")
        for request in place.up.requests:
            assert request.header("x-title", "none").encode("latin-1") == title


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
            told = "not one that this gateway knows" if headers else "a key is required"
            assert told in answer.json()["error"]["message"]
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


async def test_a_missing_credential_is_the_operators_to_know() -> None:
    """A request that cannot be served for a mistake in the configuration says so, and not which."""
    path, body = STREAMED["chat"]
    async with gateway_at(upstreams=keyed) as place, place.client() as client:
        answer = await client.post(path, json=body)
        assert (answer.status_code, KEYS[0] in answer.text) == (500, False)


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


async def test_a_list_of_models_does_not_go_in_a_circle() -> None:
    """A gateway that is its own upstream, or another's that is its, refuses its own question at once."""

    def none(url: str) -> dict[str, Upstream]:
        del url
        return {}

    async with gateway_at(upstreams=none) as inner, gateway_at(upstreams=none) as outer:
        for here, there in ((outer, outer), (outer, inner), (inner, outer)):
            circle = Upstream(name="circle", base_url=f"{there.here}/v1", proxy="direct")
            here.upstreams["circle"] = circle
            served = [place.server.statistics().requests for place in (outer, inner)]
            with trio.fail_after(MODELS_S * 0.8):
                async with outer.client() as client:
                    answer = await client.get("/v1/models")
            assert (answer.status_code, answer.json()["data"]) == (200, [])
            more = [place.server.statistics().requests for place in (outer, inner)]
            assert sum(more) - sum(served) <= 3


async def test_the_models_are_asked_for_once_for_all_who_want_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """Who asks for the list while it is being fetched gets the same one."""
    original, fetching, asking, may = StreamTransport.open, trio.Semaphore(0), 0, trio.Event()

    async def slow(self: StreamTransport, request: httpx.Request, **options: Any) -> Exchange:
        nonlocal asking
        asking += 1
        fetching.release()
        await may.wait()
        return await original(self, request, **options)

    async with gateway_at(upstreams=lambda url: {"only": upstreams_at(url)["openai-chat"]}) as place:
        monkeypatch.setattr(StreamTransport, "open", slow)
        told: list[list[str]] = []

        async def ask() -> None:
            async with place.client() as client:
                told.append([one["id"] for one in (await client.get("/v1/models")).json()["data"]])

        async with trio.open_nursery() as nursery:
            nursery.start_soon(ask)
            await fetching.acquire()
            nursery.start_soon(ask)
            nursery.start_soon(ask)
            while place.server.statistics().requests < 3:  # noqa: ASYNC110  # a count, which has no event
                await trio.lowlevel.checkpoint()
            may.set()
        assert (told, asking) == ([["sim/ok"]] * 3, 1)


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


@asynccontextmanager
async def daemon_at(store: Path, upstream: str) -> AsyncIterator[str]:
    """Run a daemon in this process; give its HTTP address."""
    told: list[Ready] = []
    is_ready = trio.Event()

    def ready(state: Ready) -> None:
        told.append(state)
        is_ready.set()

    config = attrs.evolve(
        parse(f'discover = false\n[upstreams.sim]\nbase_url = "{upstream}"\nproxy = "direct"'),
        store=StoreConfig(path=str(store)),
        control=ControlConfig(port=0),
        web=WebConfig(port=0),
    )
    async with trio.open_nursery() as nursery:
        nursery.start_soon(lambda: run(config, environ={}, ready=ready))
        await is_ready.wait()
        assert told[0].http is not None
        yield told[0].http
        nursery.cancel_scope.cancel()


async def test_a_daemon_answers_and_its_successor_knows_the_answer(tmp_path: Path) -> None:
    """The daemon serves the gateway; after a restart the same request with its key reads the same answer from the store."""
    path, body = STREAMED["chat"]
    answers: list[httpx.Response] = []
    with trio.fail_after(PATIENCE_S):
        async with SimulatedUpstream() as up:
            for _ in range(2):
                async with (
                    daemon_at(tmp_path / "streams.db", up.base_url) as url,
                    httpx.AsyncClient(base_url=url, trust_env=False) as client,
                ):
                    for asked_as, asking in ((path, body), WHOLE["chat"]):
                        key = f"key of {asking['stream']}".replace(" ", "-")
                        answer = await client.post(asked_as, json=asking, headers={"x-stream-key": key})
                        answers.append(answer)
            assert up.request_count == 2
    assert [answer.status_code for answer in answers] == [200] * 4
    assert [answer.content for answer in answers[:2]] == [answer.content for answer in answers[2:]]
    assert answers[2].headers["x-stream-id"] == answers[0].headers["x-stream-id"]
    assert answers[3].headers["content-type"] == "application/json"
