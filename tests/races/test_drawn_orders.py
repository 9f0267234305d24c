"""Larger races, whose orders are too many to try them all: hypothesis draws who competes and in which order all run."""

from __future__ import annotations

import functools

import trio
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from supervisor import Deadlines, Limits, State, Supervisor, open_supervisor
from supervisor.testing.schedule import run_drawn

from . import laws
from .laws import MomentaryStore, iter_ids, run_race

CONTENDERS = [
    laws.cancel_by_id,
    laws.cancel_by_key,
    laws.cancel_all,
    laws.replace,
    laws.reap,
    laws.shutdown,
    laws.parent_cancel,
]


@settings(max_examples=1000, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    data=st.data(),
    ends=st.sampled_from(["marker", "reset", "returns", "raises", "stalls"]),
    contenders=st.lists(st.sampled_from(CONTENDERS), min_size=1, max_size=5),
    readers=st.integers(0, 4),
    waiters=st.integers(0, 2),
    lead=st.integers(-4, 6),
    total_s=st.sampled_from([laws.INSTANT, 900.0]),
)
def test_any_number_of_endings_and_aborts(data, ends, contenders, readers, waiters, lead, total_s):
    """Whoever competes, in whatever order: the laws hold."""
    deadlines = Deadlines(first_event_s=None, idle_s=None, total_s=total_s)
    race = functools.partial(
        run_race, ends, contenders, readers=readers, waiters=waiters, lead=lead, deadlines=deadlines
    )
    run_drawn(race, draw=data)


@settings(max_examples=200, deadline=None)
@given(data=st.data(), stops=st.integers(1, 3))
def test_a_stop_and_its_start_in_any_order(data, stops):
    """A cancel by key and the start with that key, in the same instant: the stream never survives the stop."""

    async def scenario() -> None:
        ran: list[bool] = []

        async def source(out) -> None:
            ran.append(True)
            await trio.sleep_forever()

        store = MomentaryStore()
        async with open_supervisor(store=store, new_id=iter_ids(), limits=Limits(cleanup_s=500)) as sup:

            async def start() -> None:
                stream = await sup.start(source, key="k")
                outcome = await stream.wait()
                assert (outcome.state, outcome.reason) == (State.CANCELLED, "requested")

            async def stop(sup: Supervisor) -> None:
                (result,) = await sup.cancel(key="k")
                assert result.outcome in {"won", "tombstoned", "already_terminal"}

            async with trio.open_nursery() as nursery:
                nursery.start_soon(start)
                for _ in range(stops):
                    nursery.start_soon(stop, sup)

    run_drawn(scenario, draw=data)
