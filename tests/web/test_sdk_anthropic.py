"""Anthropic's own SDK for Python, unchanged, with the gateway for its `base_url`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import anthropic
import pytest
import trio
from anthropic import Anthropic, AsyncAnthropic

from tests.web.gateways import Place, gateway_at, in_thread
from tests.web.sdks import Recordings, Seen, asked_twice, check, seen

RECORDINGS = Recordings("anthropic")
ASKED: Any = {"max_tokens": 9, "messages": [{"role": "user", "content": "Hi"}]}


def options(url: str) -> dict[str, Any]:
    return {"base_url": url, "api_key": "key-of-a-client", "max_retries": 0}


def piece(event: Any) -> Any:
    return event.model_dump(warnings="none")


def streamed(client: Anthropic, model: str) -> Iterator[Any]:
    """What a program sees of a stream, and the message that the SDK makes of it."""
    with client.messages.stream(model=model, **ASKED) as events:
        yield from map(piece, events)
        yield piece(events.get_final_message())


async def test_every_recording() -> None:
    """Every recorded stream, and the message it adds up to, come out of the SDK as they do without the gateway."""
    async with RECORDINGS.served() as place:
        there, here = await asked_twice(
            RECORDINGS, "anthropic", place, lambda url: Anthropic(**options(url)), streamed
        )
    check(RECORDINGS, "anthropic", there, here, "APIStatusError")


FAULTS = ("400", "401", "404", "413", "429?retry_after=7", "500", "529", "error?after=0", "error?after=2")


async def test_every_error_is_the_sdks_own() -> None:
    """A refusal raises the SDK's exception for it, in the provider's words, as without the gateway."""

    def work(url: str) -> dict[str, Seen]:
        with Anthropic(**options(url)) as client:
            return {fault: seen(lambda fault=fault: streamed(client, f"sim/{fault}")) for fault in FAULTS}

    async with gateway_at() as place:
        there, here = await in_thread(lambda: work(place.direct)), await in_thread(lambda: work(place.here))
    assert here == there
    assert [here[fault][-1][0] for fault in ("401", "429?retry_after=7")] == [
        "AuthenticationError",
        "RateLimitError",
    ]


async def test_a_cut_off_answer_raises() -> None:
    """An answer that the upstream broke off raises, where the SDK alone would give the half as a message."""

    def work(place: Place) -> None:
        with (
            Anthropic(**options(place.here)) as client,
            pytest.raises(anthropic.APIStatusError, match="broke off"),
        ):
            list(streamed(client, "sim/end?after=3"))

    async with gateway_at() as place:
        await in_thread(lambda: work(place))


async def test_answers_as_a_whole() -> None:
    """Without a stream the message is the same, the beta client's too, and so is the list of models."""

    def work(url: str) -> list[Any]:
        with Anthropic(**options(url)) as client:
            message = client.messages.create(model="sim/ok", **ASKED)
            beta = client.beta.messages.create(model="sim/ok", betas=["one", "two"], **ASKED)
            return [piece(message), piece(beta), [model.id for model in client.models.list()]]

    async with gateway_at() as place:
        there, here = await in_thread(lambda: work(place.direct)), await in_thread(lambda: work(place.here))
        asked = [
            [r.header(name) for name in ("anthropic-version", "anthropic-beta")] for r in place.up.requests
        ]
    assert here == there
    assert asked[:2] == asked[3:5]


@pytest.mark.parametrize("how", ["close", "cancel"])
async def test_an_abort_reaches_the_upstream(how: str) -> None:
    """A program that closes its stream, or is cancelled in it, ends the answer at the provider."""
    async with gateway_at() as place, AsyncAnthropic(**options(place.here)) as client:
        with trio.CancelScope() as scope:
            async with client.messages.stream(model="sim/endless", **ASKED) as events:
                assert [await anext(events), await anext(events)]
                if how == "cancel":
                    scope.cancel()
                    await trio.lowlevel.checkpoint()
        await place.up.wait_open(0)
        assert (await place.outcome()).reason == "detached"
