"""The same SDK asked twice, at the provider and at the gateway: what its program sees of either.

The provider plays back recordings: the model's name says which.
"""

from __future__ import annotations

import json
from collections.abc import AsyncIterable, Callable, Iterable
from contextlib import AbstractAsyncContextManager
from typing import Any

from supervisor.testing.upstream import Script, UpstreamRequest
from tests.cases import transcripts
from tests.web.gateways import Place, gateway_at, in_thread

Seen = list[Any]
"""What a program sees of an answer: its pieces, and the exception that ended it, if one did."""


class Recordings:
    """The recordings of some dialects, as a provider that plays them."""

    def __init__(self, *dialects: str) -> None:
        self.cases = {case["id"]: case for case in transcripts(*dialects)}

    def respond(self, request: UpstreamRequest) -> Script | None:
        """Return what is recorded for the model that is asked for; None for any other."""
        named = json.loads(request.body or b"{}").get("model")
        name = named or request.target.partition("/models/")[2].partition(":")[0]
        case = self.cases.get(name)
        return None if case is None else Script(body=case["body"], content_type=case["content_type"])

    def served(self, **options: Any) -> AbstractAsyncContextManager[Place]:
        """Serve them, with a gateway before."""
        return gateway_at(respond=self.respond, **options)


def seen(pieces: Callable[[], Iterable[Any]]) -> Seen:
    """Return what a program sees."""
    gathered: Seen = []
    try:
        gathered.extend(pieces())
    except Exception as error:  # noqa: BLE001  # whatever it is: it has to be the same
        gathered.append(told(error))
    return gathered


async def seen_async(pieces: Callable[[], AsyncIterable[Any]]) -> Seen:
    """Return what a program sees."""
    gathered: Seen = []
    try:
        async for piece in pieces():
            gathered.append(piece)
    except Exception as error:  # noqa: BLE001  # as above
        gathered.append(told(error))
    return gathered


def told(error: Exception) -> tuple[str, ...]:
    """Return what tells one exception from another."""
    return type(error).__name__, *(
        str(getattr(error, name, None)) for name in ("status_code", "code", "type", "body")
    )


def check(
    recordings: Recordings, dialect: str, there: dict[str, Seen], here: dict[str, Seen], cut_off: str
) -> None:
    """Compare: equal, but that an answer which broke off is told by an exception of this type, and looks complete nowhere."""
    names = [name for name, case in recordings.cases.items() if case["dialect"] == dialect]
    assert sorted(names) == sorted(here) == sorted(there)
    assert names
    for name in names:
        if recordings.cases[name]["expected_terminal"] == "incomplete":
            *pieces, last = here[name]
            assert last[0] == cut_off, name
            assert pieces == there[name][: len(pieces)], name
            assert len(there[name]) <= len(pieces) + 1, name
        else:
            assert here[name] == there[name], name


async def asked_twice(
    recordings: Recordings,
    dialect: str,
    place: Place,
    make: Callable[[str], Any],
    ask: Callable[[Any, str], Any],
) -> tuple[dict[str, Seen], dict[str, Seen]]:
    """Have a synchronous SDK, made for an address, ask for each recording, there and here."""

    def work() -> tuple[dict[str, Seen], dict[str, Seen]]:
        names = [name for name, case in recordings.cases.items() if case["dialect"] == dialect]
        with make(place.direct) as there, make(place.here) as here:
            first, second = (
                {name: seen(lambda client=client, name=name: ask(client, name)) for name in names}
                for client in (there, here)
            )
        return first, second

    both: tuple[dict[str, Seen], dict[str, Seen]] = await in_thread(work)
    return both
