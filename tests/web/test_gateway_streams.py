"""The gateway's answers as streams: joined by a key, left by their clients, and kept by their provider."""

from __future__ import annotations

import json
from typing import Any

import attrs
import httpx
import pytest
import trio
import trio.testing

from supervisor.errors import SupervisorError
from supervisor.streams import Deadlines, Limits
from supervisor.upstream import Upstream
from supervisor.web.gateway import GatewayClient, GatewayConfig, GatewayRoute
from tests.web.gateways import (
    STREAMED,
    WHOLE,
    asking_at,
    error_of,
    gateway_at,
    upstreams_at,
    with_model,
)

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
        others = (path, {**body, "model": "m"}), (path, {**body, "temperature": 0})
        for other_path, other in (WHOLE["chat"], STREAMED["messages"], *others):
            conflict = await client.post(other_path, json=other, headers=headers)
            assert conflict.status_code == 409
        assert place.up.request_count == 3


async def test_a_key_is_that_of_one_method_path_and_query() -> None:
    """Of requests whose bodies are the same, one that goes elsewhere is another one; a client's key in it does not count."""
    path, body = STREAMED["responses"]
    google, contents = STREAMED["google events"]
    async with gateway_at() as place, place.client() as client:

        async def ask(key: str, target: str, json: dict[str, Any] | None) -> int:
            headers = {"x-stream-key": key}
            method = "GET" if json is None else "POST"
            return (await client.request(method, target, json=json, headers=headers)).status_code

        created = (await client.post(path, json={**body, "background": True})).text
        at = f"{path}/{json.loads(created.partition('data: ')[2].partition(chr(10))[0])['response']['id']}"
        for target, status in (
            (f"{at}?stream=true", 200),
            (f"{at}?stream=true", 200),
            (f"{at}?stream=true&starting_after=1", 409),
            (f"{path}/resp_sim00000099?stream=true", 409),
        ):
            assert await ask("k1", target, None) == status
        for target, status in (
            (google, 200),
            (f"{google}&key=a", 200),
            (f"{google}&key=b", 200),
            (f"{google}&alt=media", 409),
            (google.partition("?")[0], 409),
            (google.replace("v1beta", "v1alpha"), 409),
        ):
            assert await ask("k2", target, contents) == status


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


@pytest.mark.parametrize("reason", ["detached", "first_event", "requested"])
async def test_what_ended_before_its_first_event_is_asked_anew(
    reason: str, mock_clock: trio.testing.MockClock
) -> None:
    """A key is not taken by an answer that its client did not wait for, or that did not come; by one that was cancelled it is."""
    path, body = with_model(*STREAMED["chat"], "sim/silent?times=1")
    headers = {"x-stream-key": "k"}
    async with gateway_at(deadlines=Deadlines(first_event_s=9)) as place, place.client() as client:
        async with asking_at(place, path, body, headers) as connection:
            await place.up.wait_requests(1)
            stream = place.sup.get_by_key("k")
            if reason == "requested":
                await stream.cancel(mode="abort")
            if reason == "first_event":
                mock_clock.jump(9.1)
            if reason != "detached":
                await connection.receive_some()
        assert (await stream.wait()).reason == reason
        again = await client.post(path, content=json.dumps(body), headers=headers)
        assert (again.status_code, place.up.request_count) == (
            (499, 1) if reason == "requested" else (200, 2)
        )


async def test_what_was_left_after_its_first_event_is_joined(mock_clock: trio.testing.MockClock) -> None:
    """There is an answer under the key, though it was cancelled: it is told, and how it ended."""
    del mock_clock  # no keep-alive
    path, body = with_model(*STREAMED["chat"], "sim/stall?after=1&times=1")
    headers = {"x-stream-key": "k"}
    async with gateway_at() as place, place.client() as client:
        async with asking_at(place, path, body, headers) as connection:
            assert b"200" in await connection.receive_some()
        await place.sup.get_by_key("k").wait()
        again = await client.post(path, content=json.dumps(body), headers=headers)
        assert (again.status_code, place.up.request_count) == (200, 1)
        assert error_of(again.content)["error"]["code"] == "detached"


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


GRACES = {
    "the gateway's": (GatewayConfig(grace_s=7), 7),
    "the route's": (
        GatewayConfig(grace_s=7, routes=(GatewayRoute(upstream="openai-chat", grace_s=3),)),
        3,
    ),
}


@pytest.mark.parametrize("whose", GRACES)
async def test_the_grace_is_as_long_as_configured(whose: str, mock_clock: trio.testing.MockClock) -> None:
    """An answer whose client has left is there until `grace_s` have passed, and not after that."""
    config, grace_s = GRACES[whose]
    path, body = with_model(*STREAMED["chat"], "sim/stall?after=1")
    async with gateway_at(config=config) as place:
        async with asking_at(place, path, body) as connection:
            assert b"200" in await connection.receive_some()
            stream = place.sup.get(place.newest().id)
        while stream.info().readers:  # noqa: ASYNC110  # nothing tells that a reader has left
            await trio.lowlevel.checkpoint()
        mock_clock.jump(grace_s - 0.01)
        await trio.testing.wait_all_tasks_blocked(0.005)
        assert stream.state == "streaming"
        mock_clock.jump(0.02)
        await trio.testing.wait_all_tasks_blocked(0.005)
        assert (str(stream.state), stream.info().reason) == ("cancelled", "detached")


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


async def test_a_response_is_remembered_from_its_beginning() -> None:
    """Also if its answer is too long to be kept in memory, or its client leaves after the first events."""
    path, body = STREAMED["responses"]
    routes = (GatewayRoute(models=("sim/*",), upstream="chat"), GatewayRoute(upstream="first"))
    config, limits = GatewayConfig(routes=routes), Limits(fold_bytes=16)
    async with (
        gateway_at(upstreams=first_and_chat, config=config, limits=limits) as place,
        place.client() as client,
    ):
        long = await client.post(path, json={**body, "model": "sim/ok?tokens=60"})
        assert (long.status_code, b"response.completed" in long.content) == (200, True)
        with pytest.raises(SupervisorError):
            place.sup.get(place.newest().id).snapshot()
        async with asking_at(place, path, {**body, "model": "sim/stall?after=1"}) as connection:
            assert b"response.created" in await connection.receive_some()
        for number in (1, 2):
            await client.get(f"{path}/resp_sim0000000{number}")
            assert place.up.requests[-1].target == f"{path}/resp_sim0000000{number}"


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
