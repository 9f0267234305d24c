"""OpenAI's own SDK for Python, unchanged, with the gateway for its `base_url`."""

from __future__ import annotations

import gc
from collections.abc import AsyncIterator, Iterator
from contextlib import aclosing
from typing import Any

import openai
import pytest
import trio
from openai import AsyncOpenAI, OpenAI

from tests.web.gateways import Place, gateway_at, in_thread
from tests.web.sdks import Recordings, Seen, asked_twice, check, seen, seen_async

DIALECTS = ("openai-chat", "openai-responses", "openai-completions")
RECORDINGS = Recordings(*DIALECTS)


def options(url: str) -> dict[str, Any]:
    return {"base_url": f"{url}/v1", "api_key": "key-of-a-client", "max_retries": 0}


def piece(event: Any) -> Any:
    return event.model_dump(warnings="none")


def chat(client: Any, model: str, **more: Any) -> Any:
    return client.chat.completions.create(
        model=model, messages=[{"role": "user", "content": "Hi"}], **{"stream": True, **more}
    )


def responses(client: Any, model: str, **more: Any) -> Any:
    return client.responses.create(model=model, input="Hi", **{"stream": True, **more})


def completions(client: Any, model: str, **more: Any) -> Any:
    return client.completions.create(model=model, prompt="Hi", **{"stream": True, **more})


ASKING = dict(zip(DIALECTS, (chat, responses, completions), strict=True))


@pytest.mark.parametrize("dialect", DIALECTS)
async def test_every_recording(dialect: str) -> None:
    """Every recorded stream comes out of the SDK as it does without the gateway, event for event."""

    def ask(client: OpenAI, model: str) -> Iterator[Any]:
        yield from map(piece, ASKING[dialect](client, model))

    async with RECORDINGS.served() as place:
        there, here = await asked_twice(RECORDINGS, dialect, place, lambda url: OpenAI(**options(url)), ask)
    check(RECORDINGS, dialect, there, here, "APIError")


@pytest.mark.filterwarnings("ignore:Async generator:ResourceWarning")  # the SDK leaves its own at `[DONE]`
async def test_every_recording_by_the_asynchronous_client() -> None:
    """The same of the asynchronous client, with all recorded chats at once."""

    async def ask(client: AsyncOpenAI, model: str) -> AsyncIterator[Any]:
        async for event in await chat(client, model):
            yield piece(event)

    async def one(client: AsyncOpenAI, model: str, found: dict[str, Seen]) -> None:
        found[model] = await seen_async(lambda: ask(client, model))

    names = [name for name, case in RECORDINGS.cases.items() if case["dialect"] == "openai-chat"]
    both: list[dict[str, Seen]] = []
    async with RECORDINGS.served() as place:
        for url in (place.direct, place.here):
            found: dict[str, Seen] = {}
            async with AsyncOpenAI(**options(url)) as client, trio.open_nursery() as nursery:
                for name in names:
                    nursery.start_soon(one, client, name, found)
            both.append(found)
    gc.collect()  # what the SDK left, while that is let pass
    check(RECORDINGS, "openai-chat", *both, "APIError")


FAULTS = (
    "401",
    "403",
    "404",
    "422",
    "429?retry_after=7",
    "500",
    "503",
    "error?after=0",
    "error?after=2",
    "silent",
)


async def test_every_error_is_the_sdks_own() -> None:
    """A refusal raises the SDK's exception for it, with the provider's words, headers and status, as without the gateway."""

    def work(place: Place, fault: str) -> list[Seen]:
        found = []
        for url in (place.direct, place.here):
            with OpenAI(**options(url), timeout=0.2 if fault == "silent" else 20) as client:
                for ask in ASKING.values():

                    def pieces(ask: Any = ask, client: OpenAI = client) -> Iterator[Any]:
                        yield from map(piece, ask(client, f"sim/{fault}"))

                    found.append(seen(pieces))
        return found

    async with gateway_at() as place:
        for fault in FAULTS:
            found = await in_thread(lambda fault=fault: work(place, fault))
            without_numbers = [str(one).replace("sim00", "").partition("resp_")[0] for one in found]
            assert without_numbers[:3] == without_numbers[3:], fault
            if fault == "429?retry_after=7":
                assert found[-1][-1][0] == "RateLimitError"


async def test_a_cut_off_answer_raises() -> None:
    """An answer that the upstream broke off raises, where the SDK alone would take it for complete."""

    def work(place: Place, ask: Any) -> list[int]:
        counts = []
        with OpenAI(**options(place.here)) as client, pytest.raises(openai.APIError, match="broke off"):
            for event in ask(client, "sim/end?after=3"):
                counts.append(event)
        return counts

    async with gateway_at() as place:
        for ask in ASKING.values():
            assert await in_thread(lambda ask=ask: work(place, ask))


async def test_answers_as_a_whole() -> None:
    """Without `stream` the answer is the same object, with the headers that the SDK reads."""

    def work(url: str) -> list[Any]:
        with OpenAI(**options(url)) as client:
            answers = [piece(ask(client, "sim/ok?tokens=3", stream=False)) for ask in ASKING.values()]
            raw = client.chat.completions.with_raw_response.create(model="sim/ok", messages=[])
            return [*answers, raw.parse().choices[0].message.content, [m.id for m in client.models.list()]]

    async with gateway_at() as place:
        there, here = await in_thread(lambda: work(place.direct)), await in_thread(lambda: work(place.here))
    there[1].pop("id"), here[1].pop("id")
    assert here == there


async def test_a_background_response_outlives_its_reader() -> None:
    """Left in the middle, read on where it was left, looked at and cancelled: by the SDK's own methods."""
    async with gateway_at() as place, AsyncOpenAI(**options(place.here)) as client:
        numbers: list[int] = []
        model = "sim/ok?tokens=6&interval_s=0.01"
        async with await responses(client, model, background=True) as events:
            async with aclosing(aiter(events)) as iterator:
                async for event in iterator:
                    numbers.append(event.sequence_number)
                    if len(numbers) == 5:
                        break
            response_id = (await client.responses.retrieve(place.up.ledger[0].response.id)).id  # type: ignore[union-attr]
        async with await client.responses.retrieve(
            response_id, stream=True, starting_after=numbers[-1]
        ) as rest:
            numbers += [event.sequence_number async for event in rest]
        assert numbers == list(range(len(numbers)))
        assert numbers[-1] > 10
        assert (await client.responses.cancel(response_id)).status == "completed"
        assert [request.method for request in place.up.requests] == ["POST", "GET", "GET", "POST"]
        with pytest.raises(openai.NotFoundError, match="not found"):
            await client.responses.retrieve("resp_unknown")


@pytest.mark.parametrize("how", ["close", "cancel", "sync close"])
async def test_an_abort_reaches_the_upstream(how: str) -> None:
    """A program that closes its stream, or is cancelled in it, ends the answer at the provider."""

    def work(place: Place) -> None:
        with OpenAI(**options(place.here)) as client:
            events = chat(client, "sim/endless")
            next(iter(events))
            events.close()

    async with gateway_at() as place, AsyncOpenAI(**options(place.here)) as client:
        if how == "sync close":
            await in_thread(lambda: work(place))
        else:
            with trio.CancelScope() as scope:
                async with await chat(client, "sim/endless") as events, aclosing(aiter(events)) as iterator:
                    await anext(iterator)
                    if how == "cancel":
                        scope.cancel()
                        await trio.lowlevel.checkpoint()
        await place.up.wait_open(0)
        outcome = await place.outcome()
        assert (outcome.state, outcome.reason) == ("cancelled", "detached")
        assert outcome.usage_quality in ("estimated", "provider_partial")
