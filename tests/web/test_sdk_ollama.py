"""Ollama's own SDK for Python, unchanged, with the gateway for its host."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import ollama
import pytest

from tests.web.gateways import Place, gateway_at, in_thread
from tests.web.sdks import Recordings, Seen, asked_twice, check, seen

RECORDINGS = Recordings("ollama")


def client_of(url: str) -> ollama.Client:
    return ollama.Client(host=url, trust_env=False)


def generated(client: ollama.Client, model: str) -> Iterator[Any]:
    yield from (one.model_dump() for one in client.generate(model=model, prompt="Hi", stream=True))


def chatted(client: ollama.Client, model: str) -> Iterator[Any]:
    messages = [{"role": "user", "content": "Hi"}]
    yield from (one.model_dump() for one in client.chat(model=model, messages=messages, stream=True))


async def test_every_recording() -> None:
    """Every recorded stream comes out of the SDK as it does without the gateway, line for line."""
    async with RECORDINGS.served() as place:
        there, here = await asked_twice(RECORDINGS, "ollama", place, client_of, generated)
    check(RECORDINGS, "ollama", there, here, "ResponseError")


FAULTS = ("400", "404", "500", "503", "error?after=0", "error?after=2", "ok")


async def test_chats_and_errors() -> None:
    """A chat is the same, and a refusal raises the SDK's exception in the provider's words."""

    def work(url: str) -> dict[str, Seen]:
        with client_of(url) as client:
            return {fault: seen(lambda fault=fault: chatted(client, f"sim/{fault}")) for fault in FAULTS}

    async with gateway_at() as place:
        there, here = await in_thread(lambda: work(place.direct)), await in_thread(lambda: work(place.here))
    assert here == there
    assert here["404"][-1][:2] == ("ResponseError", "404")
    assert len(here["ok"]) > 8


async def test_a_cut_off_answer_raises() -> None:
    """An answer that the upstream broke off raises, where the SDK alone would take it for complete."""

    def work(place: Place) -> None:
        with client_of(place.here) as client:
            for ask in (generated, chatted):
                with pytest.raises(ollama.ResponseError, match="broke off"):
                    list(ask(client, "sim/end?after=3"))

    async with gateway_at() as place:
        await in_thread(lambda: work(place))


async def test_answers_as_a_whole() -> None:
    """Without a stream the answer is the same."""

    def work(url: str) -> list[Any]:
        with client_of(url) as client:
            answers = client.generate(model="sim/ok", prompt="Hi"), client.chat(model="sim/ok")
            return [answer.model_dump() for answer in answers]

    async with gateway_at() as place:
        there, here = await in_thread(lambda: work(place.direct)), await in_thread(lambda: work(place.here))
    assert here == there


async def test_an_abort_reaches_the_upstream() -> None:
    """A program that closes its stream ends the answer at the provider."""

    def work(place: Place) -> None:
        with client_of(place.here) as client:
            lines = chatted(client, "sim/endless")
            next(lines)
            lines.close()  # type: ignore[attr-defined]

    async with gateway_at() as place:
        await in_thread(lambda: work(place))
        await place.up.wait_open(0)
        assert (await place.outcome()).reason == "detached"
