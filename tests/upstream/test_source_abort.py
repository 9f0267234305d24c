"""A seal closes the wire in its own step, and never takes that for a failure of the source."""

from __future__ import annotations

import pytest
import trio
import trio.testing

from tests.upstream.attempts import SECRET, VARIABLE, Bench, bench


@pytest.fixture(autouse=True)
def credential(monkeypatch: pytest.MonkeyPatch) -> None:
    """The upstream's key is in the environment."""
    monkeypatch.setenv(VARIABLE, SECRET)


async def _flowing(b: Bench, model: str):
    stream = await b.start(model)
    with stream.subscribe() as events:
        while not any(event.kind == "data" for event in await events.next_batch()):
            pass
    return stream


async def test_a_stop_closes_the_socket_before_it_returns() -> None:
    """The synchronous part of a cancel closes the connection: no task has to be scheduled for it."""
    async with bench() as b:
        stream = await _flowing(b, "sim/endless")
        assert b.transport.statistics().open == 1
        verdict = stream.request_stop()
        assert b.transport.statistics().open == 0
        assert (await stream.stopped(verdict)).outcome == "won"
        assert stream.outcome.cleanup_error is None


async def test_a_deadline_closes_the_socket_too() -> None:
    """Every ending but completion closes the connection at the seal: here the idle clock's."""
    async with bench() as b:
        stream = await _flowing(b, "sim/stall")
        stream.expire("idle")
        assert b.transport.statistics().open == 0
        outcome = await stream.wait()
        assert (outcome.state, outcome.reason) == ("expired", "idle")


async def test_a_completed_answer_keeps_its_connection() -> None:
    """Completion leaves the wire to the source, which gives the connection back for the next request."""
    async with bench() as b:
        assert (await b.run("sim/ok")).ending == ("completed", "stop")
        assert b.transport.statistics().idle == 1


async def test_nothing_is_closed_that_is_no_longer_held() -> None:
    """A stop between two attempts finds no connection to close, and the outcome is the stop."""
    async with bench() as b:
        stream = await b.start("sim/500")
        await trio.testing.wait_all_tasks_blocked(0.05)
        assert b.transport.statistics().open <= 1
        assert (await stream.cancel()).outcome == "won"
        assert stream.outcome.cleanup_error is None


async def test_a_stop_beside_data_that_has_just_come_is_a_stop() -> None:
    """The source may be about to run with data when the stop closes its socket: that is no error of the source."""
    async with bench() as b:
        streams = [await b.start("sim/flood?tokens=100000000") for _ in range(20)]
        for stream in streams:
            while stream.tail_seq < 2:  # noqa: ASYNC110  # a reader would change when data is taken
                await trio.lowlevel.checkpoint()
            verdict = stream.request_stop()
            result = await stream.stopped(verdict)
            assert result.outcome == "won"
            assert stream.outcome.cleanup_error is None
