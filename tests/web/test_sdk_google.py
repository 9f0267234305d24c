"""Google's own SDK for Python, unchanged, with the gateway for its `base_url`."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
from google import genai
from google.genai import errors, types

from supervisor.web.gateway import GatewayConfig
from tests.web.gateways import Place, gateway_at, in_thread
from tests.web.sdks import Recordings, Seen, asked_twice, check, seen

RECORDINGS = Recordings("gemini")

pytestmark = pytest.mark.filterwarnings(
    "ignore:.* is not a valid:UserWarning"  # enums of the recordings that are newer, or made up
)


def client_of(url: str, **headers: str) -> genai.Client:
    return genai.Client(
        api_key="key-of-a-client", http_options=types.HttpOptions(base_url=url, headers=headers)
    )


def scripted(url: str, script: str) -> genai.Client:
    """Return a client whose requests say what they are to be answered."""
    return client_of(url, **{"x-sim-script": script})


def piece(event: Any) -> Any:
    return event.model_dump(mode="json", exclude={"sdk_http_response"}, warnings="none")


def streamed(client: genai.Client, model: str) -> Iterator[Any]:
    yield from map(piece, client.models.generate_content_stream(model=model, contents="Hi"))


async def test_every_recording() -> None:
    """Every recorded stream comes out of the SDK as it does without the gateway, event for event."""
    async with RECORDINGS.served() as place:
        there, here = await asked_twice(RECORDINGS, "gemini", place, client_of, streamed)
    check(RECORDINGS, "gemini", there, here, "ServerError")


async def test_every_recorded_array() -> None:
    """What the API sends as an array, which the SDK does not ask for, is the same array."""
    recordings = Recordings("gemini-jsonarray")
    async with recordings.served() as place, place.client() as client:
        for name, case in recordings.cases.items():
            path = f"/v1beta/models/{name}:streamGenerateContent"
            there, here = [await client.post(base + path, json={}) for base in (place.direct, place.here)]
            assert here.json() == there.json() == json.loads(case["body"])
            assert here.headers["content-type"] == there.headers["content-type"]


FAULTS = ("400", "403", "429", "500", "503", "error?after=0", "error?after=2")


async def test_every_error_is_the_sdks_own() -> None:
    """A refusal raises the SDK's exception for it, in the provider's words, as without the gateway."""

    def work(url: str) -> dict[str, Seen]:
        found = {}
        for fault in FAULTS:
            with scripted(url, f"sim/{fault}") as client:
                found[fault] = seen(lambda client=client: streamed(client, "m"))
        return found

    async with gateway_at() as place:
        there, here = await in_thread(lambda: work(place.direct)), await in_thread(lambda: work(place.here))
    assert here == there
    assert {fault: one[-1][0] for fault, one in here.items()}["429"] == "ClientError"


async def test_a_cut_off_answer_raises() -> None:
    """An answer that the upstream broke off raises, where the SDK alone would take it for complete."""

    def work(place: Place) -> None:
        with (
            scripted(place.here, "sim/end?after=3") as client,
            pytest.raises(errors.ServerError, match="broke off"),
        ):
            list(streamed(client, "m"))

    async with gateway_at() as place:
        await in_thread(lambda: work(place))


async def test_answers_as_a_whole() -> None:
    """Without a stream the answer is the same."""

    def work(url: str) -> Any:
        with scripted(url, "sim/ok?tokens=3") as client:
            return piece(client.models.generate_content(model="m", contents="Hi"))

    async with gateway_at() as place:
        there, here = await in_thread(lambda: work(place.direct)), await in_thread(lambda: work(place.here))
    assert here == there


async def test_a_sign_of_life_is_passed_over() -> None:
    """What is sent in silence is nothing to the SDK, which takes a comment for a line of JSON."""
    script = "sim/ok?tokens=3&first_after_s=0.05"

    def work(url: str) -> Seen:
        with scripted(url, script) as client:
            return seen(lambda: streamed(client, "m"))

    config = GatewayConfig(keep_alive_s=0.01, headers=("x-sim-script",))
    async with gateway_at(config=config) as place:
        there, here = await in_thread(lambda: work(place.direct)), await in_thread(lambda: work(place.here))
    assert here == there


async def test_an_abort_reaches_the_upstream() -> None:
    """A program that closes its stream ends the answer at the provider."""

    def work(place: Place) -> None:
        with scripted(place.here, "sim/endless") as client:
            events = client.models.generate_content_stream(model="m", contents="Hi")
            next(events)
            events.close()  # type: ignore[attr-defined]

    async with gateway_at() as place:
        await in_thread(lambda: work(place))
        await place.up.wait_open(0)
        assert (await place.outcome()).reason == "detached"
