"""Clients that leave: before the head, in the middle, and in the instant in which the answer is complete."""

from __future__ import annotations

import random
import socket
import struct
from collections import Counter
from collections.abc import Awaitable, Callable
from functools import partial

import pytest
import trio

from supervisor.streams import Outcome
from tests.web.gateways import Place, asking_at, gateway_at

TIMES = 200
AT_ONCE = 20
CHAT = "/v1/chat/completions"

Asked = Callable[[], Awaitable[object]]
"""Waits until all that leave together have been asked of the upstream."""
Leaving = Callable[[Asked, trio.SocketStream, random.Random], Awaitable[None]]


async def before_the_head(asked: Asked, connection: trio.SocketStream, drawn: random.Random) -> None:
    """Leave as soon as the upstream has been asked, or a little later."""
    del connection
    await asked()
    for _ in range(drawn.randrange(30)):
        await trio.lowlevel.checkpoint()


async def in_the_middle(asked: Asked, connection: trio.SocketStream, drawn: random.Random) -> None:
    """Leave after some of the words."""
    del asked
    data = b""
    while b'"w%d ' % drawn.randrange(3) not in data:
        data += await connection.receive_some(4096)


async def as_it_completes(asked: Asked, connection: trio.SocketStream, drawn: random.Random) -> None:
    """Leave on the last word, on the finish reason, or on the end marker, or a little later."""
    del asked
    data, mark = b"", drawn.choice((b'"w2 ', b'"stop"', b'"prompt_tokens"', b"[DONE]"))
    while mark not in data:
        data += await connection.receive_some(4096)
    for _ in range(drawn.choice((0, 0, 1, 3, 10))):
        await trio.lowlevel.checkpoint()


MOMENTS: dict[str, tuple[str, Leaving]] = {
    "before the head": ("sim/silent", before_the_head),
    "in the middle": ("sim/endless?interval_s=0.001", in_the_middle),
    "as it completes": ("sim/ok?tokens=3&interval_s=0.002", as_it_completes),
}


async def leave(place: Place, model: str, how: Leaving, asked: Asked, drawn: random.Random) -> None:
    """Ask, wait for the moment, and go: by closing, or by a reset."""
    body = {"model": model, "stream": True, "stream_options": {"include_usage": True}}
    async with asking_at(place, CHAT, body) as connection:
        await how(asked, connection, drawn)
        if drawn.random() < 0.5:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


@pytest.mark.parametrize("moment", MOMENTS)
async def test_a_client_that_leaves(moment: str) -> None:
    """The upstream is let go of, and there is one outcome, the last record, with the right reason and what was used."""
    model, how = MOMENTS[moment]
    async with gateway_at() as place:
        for batch in range(TIMES // AT_ONCE):
            async with trio.open_nursery() as nursery:
                for number in range(AT_ONCE):
                    drawn = random.Random(f"{moment} {batch} {number}")
                    asked = partial(place.up.wait_requests, (batch + 1) * AT_ONCE)
                    nursery.start_soon(leave, place, model, how, asked, drawn)
        streams = [place.sup.get(info.id) for info in place.sup.list()]
        assert len(streams) == place.up.request_count == TIMES
        outcomes: list[Outcome] = []
        for stream in streams:
            outcomes.append(await stream.wait())
            with stream.subscribe() as events:
                kinds = [event.kind async for event in events]
            assert kinds.count("outcome") == 1
            assert kinds[-1] == "outcome"
        await place.up.wait_ended(TIMES)
        endings = Counter((str(one.state), one.reason, one.usage_quality) for one in outcomes)
        if moment == "before the head":
            assert endings == {("cancelled", "detached", "unknown"): TIMES}
            assert {exchange.ended for exchange in place.up.ledger} == {"client"}
        elif moment == "in the middle":
            assert endings == {("cancelled", "detached", "estimated"): TIMES}
            assert {exchange.ended for exchange in place.up.ledger} == {"client"}
        else:
            # What has completed is complete, and has its usage, whatever the client did after that.
            assert set(endings) <= {
                ("completed", "stop", "exact"),
                ("cancelled", "detached", "estimated"),
                ("cancelled", "detached", "provider_partial"),
            }
            assert endings["completed", "stop", "exact"] > TIMES // 8
            done = [one for one in outcomes if one.state == "completed"]
            assert {(one.usage.input, one.usage.output) for one in done if one.usage} == {(7, 3)}
        assert place.sup.readers == 0
