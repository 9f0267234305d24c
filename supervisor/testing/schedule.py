"""The schedule explorer: runs a trio program under every order of its runnable tasks.

`explore` searches all orders within bounds, `run_drawn` follows one that hypothesis draws, and `run` replays one that
was printed. What an order is, how the search goes and when it may be cut off: `schedule_search`. How trio is made to
follow an order: `schedule_control`. For users: docs/schedule-explorer.md.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Hashable, Sequence
from typing import Any, Literal, Protocol, TypeVar, TypeVarTuple

import trio
import trio.testing

from supervisor.errors import ConfigurationError
from supervisor.testing.schedule_control import Choose, Control, Ran, check_trio
from supervisor.testing.schedule_errors import (
    DeadlockError,
    LivelockError,
    NondeterminismError,
    ScheduleError,
    ScheduleFailure,
    Step,
    TrioChangedError,
    counted,
)
from supervisor.testing.schedule_search import (
    DEFAULT_BOUNDS,
    MAX_STEPS,
    Bounds,
    ClockFactory,
    Exploration,
    Explorer,
    Follow,
    finish,
)

__all__ = [
    "Bounds",
    "DeadlockError",
    "Exploration",
    "LivelockError",
    "NondeterminismError",
    "ScheduleError",
    "ScheduleFailure",
    "Step",
    "TrioChangedError",
    "explore",
    "run",
    "run_drawn",
]

T = TypeVar("T")
Ts = TypeVarTuple("Ts")


class Draws(Protocol):
    """What hypothesis' `st.data()` gives."""

    def draw(self, strategy: Any, label: Any = None) -> Any:
        """Draw a value from a strategy."""
        ...


def autojump_clock() -> trio.abc.Clock:
    """Return a new clock that jumps to the next deadline whenever all tasks are blocked."""
    return trio.testing.MockClock(autojump_threshold=0)


def explore(
    async_fn: Callable[[*Ts], Awaitable[object]],
    *args: *Ts,
    bounds: Bounds = DEFAULT_BOUNDS,
    search: Literal["fewest-first", "depth-first"] = "fewest-first",
    clock: ClockFactory = autojump_clock,
    state: Callable[[], Hashable] | None = None,
    instruments: Sequence[trio.abc.Instrument] = (),
) -> Exploration:
    """Run a trio program under every order of its runnable tasks, and raise ScheduleFailure for the first that fails.

    To be called where trio is not running, such as in a plain test function. The program is any async function; it is
    run many times, and has to build everything it uses anew. It fails by raising an exception, by a deadlock
    (DeadlockError) or by not ending within `bounds.max_steps` (LivelockError). The failing order is made as short as
    can be found before it is shown.

    Returning does not mean that every order was seen: `assert explore(program).complete` does.

    `clock` makes the clock of each run; returning None, it gives trio's own, in real time. `state` cuts off runs that
    repeat a state: it returns a hashable value of all that the program's future depends on besides what trio knows
    (variables, the contents of channels and of the program's objects); docs/schedule-explorer.md says exactly when that
    is sound. `instruments` are passed to each run.

    Raises NondeterminismError when the same order leads to different runs, TrioChangedError when this trio cannot be
    controlled. An exception that is not an Exception (KeyboardInterrupt, `pytest.skip`) passes unchanged.
    """
    __tracebackhide__ = True
    if search not in {"fewest-first", "depth-first"}:
        raise ConfigurationError("search", search, '"fewest-first" or "depth-first"')
    check_trio()
    explorer = Explorer(async_fn, args, bounds, clock, state, instruments)
    return explorer.explore(breadth=search == "fewest-first")


def run(
    async_fn: Callable[[*Ts], Awaitable[T]],
    *args: *Ts,
    schedule: Sequence[int] = (),
    clock: ClockFactory = autojump_clock,
    instruments: Sequence[trio.abc.Instrument] = (),
    max_steps: int = MAX_STEPS,
) -> T:
    """Run a trio program under one order of its tasks, the default order after the list's end; return its result.

    The program's exception is raised as `trio.run` would raise it, with the order and what ran in it as a note. Raises
    DeadlockError and LivelockError where `explore` would find them, and NondeterminismError if the program has no such
    order (any more).
    """
    __tracebackhide__ = True
    order = tuple(schedule)
    if any(choice < 0 for choice in order):
        raise ConfigurationError("schedule", schedule, "a list of whole numbers, none below 0")
    check_trio()
    ran = _run_once(
        async_fn,
        args,
        Follow(order),
        clock=clock,
        instruments=instruments,
        max_steps=max_steps,
        tracing=True,
    )
    if ran.error is None and ran.stopped_by is None and any(order[len(ran.choices) :]):
        raise NondeterminismError(
            f"the schedule has {counted(len(order), 'choice')}, but the run ended after {len(ran.choices)}"
        )
    result: T = finish(ran)
    return result


def run_drawn(
    async_fn: Callable[[*Ts], Awaitable[T]],
    *args: *Ts,
    draw: Callable[[int], int] | Draws,
    max_draws: int = 2_000,
    clock: ClockFactory = autojump_clock,
    instruments: Sequence[trio.abc.Instrument] = (),
    max_steps: int = MAX_STEPS,
) -> T:
    """Run a trio program under an order that is drawn choice by choice; return its result.

    `draw` is hypothesis' `data` (from `st.data()`), or a callable that is given a number of tasks and returns which is
    next, such as `random.Random(7).randrange`. Under hypothesis a failing order shrinks towards the default order. After
    `max_draws` choices the default order is followed, so that a long program does not exhaust what hypothesis lets a test
    draw.

    Raises as `run` does; what `draw` raises ends the run and passes through unchanged.
    """
    __tracebackhide__ = True
    check_trio()
    if callable(draw):
        pick: Choose = draw
    else:
        # a Random that draws when it is asked, and one line in hypothesis' report where data.draw makes one per choice
        from hypothesis import strategies as st  # noqa: PLC0415  # an optional dependency

        pick = draw.draw(st.randoms(use_true_random=False), "order of tasks").randrange
    left = iter(range(max_draws))
    ran = _run_once(
        async_fn,
        args,
        lambda width: 0 if next(left, None) is None else pick(width),
        clock=clock,
        instruments=instruments,
        max_steps=max_steps,
        tracing=True,
    )
    result: T = finish(ran)
    return result


def _run_once(
    async_fn: Callable[..., Awaitable[Any]],
    args: tuple[Any, ...],
    choose: Choose,
    *,
    clock: ClockFactory,
    instruments: Sequence[trio.abc.Instrument],
    max_steps: int,
    tracing: bool,
) -> Ran:
    if max_steps < 1:
        raise ConfigurationError("max_steps", max_steps, "a whole number of at least 1")
    control = Control(async_fn=async_fn, args=args, choose=choose, max_steps=max_steps, tracing=tracing)
    return control.run(clock=clock(), instruments=instruments)
