"""A trace and the overview over the control channel."""

from __future__ import annotations

import pytest
import trio

from supervisor import Output, open_supervisor
from supervisor.control import ControlServer, connect
from supervisor.errors import RequestError
from supervisor.observe import Figures, trace


async def answer(out: Output) -> None:
    for _ in range(3):
        await out.send("word ")


async def test_both_are_told_as_they_are() -> None:
    """A client has the trace by id or key, and the overview, as the types that the server made; an unknown stream is refused."""
    async with open_supervisor() as sup, trio.open_nursery() as nursery:
        figures = Figures(sup)
        server = ControlServer(sup, figures=figures)
        (port,) = await nursery.start(server.run)
        stream = await sup.start(answer, key="k")
        await stream.wait()
        async with connect(f"ws://127.0.0.1:{port}") as client:
            assert await client.trace(stream.id) == await trace(stream)
            assert await client.trace(key="k") == await trace(stream)
            with pytest.raises(RequestError, match="nothing"):
                await client.trace("nothing")
            told = await client.overview()
            assert (told.hour.ended["completed"], told.active.live) == (1, 0)
            assert told.since == figures.since
        nursery.cancel_scope.cancel()


async def test_without_figures_there_is_no_overview() -> None:
    """A program that keeps none is said not to offer it; traces need none."""
    async with open_supervisor() as sup, trio.open_nursery() as nursery:
        server = ControlServer(sup)
        (port,) = await nursery.start(server.run)
        stream = await sup.start(answer)
        async with connect(f"ws://127.0.0.1:{port}") as client:
            with pytest.raises(RequestError) as refused:
                await client.overview()
            assert refused.value.kind == "unsupported"
            await stream.wait()
            assert (await client.trace(stream.id)).events == 3
        nursery.cancel_scope.cancel()
