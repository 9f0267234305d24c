"""How the orders of a program's tasks are searched, and a failing one made short.

Theory. A trio program that uses only trio's own means in one process (tasks, events, channels, locks, cancel scopes, a
mock clock) is decided by one thing: in which order the run loop runs the tasks that are runnable at the same time. Each
time it has `n >= 2` to choose from is a *choice*, and a run is its list of choices: 0 is the task that was spawned
first, and so on. The list of zeros is the *default order*, so a list may leave out its trailing zeros, and then every
list names exactly one run: that is the *schedule* that is printed, and that `run` replays. A choice other than 0 is a
*deviation*.

Exploring is a search of the tree of these lists. A run of a schedule `p` goes on in the default order after `p`, and
shows how many tasks there were at each further choice; its children deviate once more, at one of those choices. Each
schedule is the child of exactly one other (itself without its last deviation), so no order is run twice and none is
left out. What is left to decide is which child is next:

- `fewest-first` (the default) runs all schedules with one deviation, then all with two, and so on. Cut short by a bound,
  it can say that all orders with up to so many deviations were seen; and the first failure it meets has the fewest there
  can be. It keeps what is still to be done in memory: some bytes for each choice of each run.
- `depth-first` changes the latest choice first. Its memory is that of a few runs, however long it goes on; cut short, it
  has seen much of how the program ends and little of how it begins.

How many orders there are. A batch of `n` tasks has `n!` orders, and a run of `k` such batches `(n!)^k`. With at most `d`
deviations and `c` choices a run there are about `(c * (n - 1))^d / d!`, a polynomial in `c`. That few deviations find
most bugs is what CHESS (Musuvathi and Qadeer, 2007) and delay-bounded scheduling (Emmi, Qadeer and Rakamarić, 2011)
showed; the bound is called `max_preemptions` after theirs and loom's, though a trio task is never preempted, only kept
waiting.

Reductions. Three are used without being asked for, since they lose nothing: a single runnable task is no choice; the
start of trio's own task is none (see `schedule_control`); and what a stopped run does while it is wound down is not
explored. A fourth depends on the caller, `state`: a run is cut off at a choice where it stands as an earlier run
stood, because all that can follow is explored from there. "Stands" is `Control.position` together with
what `state()` returns. It is sound for failures that show as an exception or a deadlock if equal results of the two mean
equal futures. With a bound on deviations a run is only cut off if the earlier one had used as few of them; choices that
`max_branches` leaves unvaried do not count as explored. Reductions from knowing which steps commute (DPOR) would need
to know what each step touches, which nothing here can see.
"""

from __future__ import annotations

import functools
import time
from collections import deque
from collections.abc import Awaitable, Callable, Hashable, Iterator, Sequence
from typing import Any, Literal

import attrs
import trio

from supervisor.errors import ConfigurationError
from supervisor.testing.schedule_control import Control, OutOfTimeError, Ran, short_name
from supervisor.testing.schedule_errors import (
    DeadlockError,
    LivelockError,
    NondeterminismError,
    ScheduleFailure,
    counted,
    render,
)

__all__ = [
    "DEFAULT_BOUNDS",
    "MAX_STEPS",
    "Bounds",
    "ClockFactory",
    "Exploration",
    "Explorer",
    "Follow",
    "finish",
]

Order = tuple[int, ...]
ClockFactory = Callable[[], trio.abc.Clock | None]
BoundName = Literal["runs", "seconds", "branches", "preemptions"]

MINIMISING_RUNS = 200
MINIMISING_S = 5.0
MAX_STEPS = 100_000


def _whole(least: int, *, none: bool = False) -> Callable[[object, attrs.Attribute[Any], object], None]:
    def check(_: object, attribute: attrs.Attribute[Any], value: object) -> None:
        if value is None and none:
            return
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            raise ConfigurationError(
                attribute.name, value, f"a whole number of at least {least}" + ", or None for no limit" * none
            )

    return check


def _seconds(_: object, attribute: attrs.Attribute[Any], value: object) -> None:
    if value is None:
        return
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not value > 0:
        raise ConfigurationError(attribute.name, value, "a number of seconds above 0, or None for no limit")


@attrs.frozen(kw_only=True)
class Bounds:
    """How far to explore. None is no limit. A bad value raises ConfigurationError."""

    max_runs: int | None = attrs.field(default=100_000, validator=_whole(1, none=True))
    """Orders to run."""
    max_seconds: float | None = attrs.field(default=60.0, validator=_seconds)
    """Real seconds for the whole exploration. A run in progress is stopped."""
    max_branches: int = attrs.field(default=10_000, validator=_whole(1))
    """Choices in a run that are varied; those after them are left in the default order."""
    max_preemptions: int | None = attrs.field(default=None, validator=_whole(0, none=True))
    """Deviations from the default order in one run. Polynomial instead of exponential: 2 or 3 finds most bugs."""
    max_steps: int = attrs.field(default=MAX_STEPS, validator=_whole(1))
    """Steps of tasks in one run; a program that takes more fails with LivelockError."""


DEFAULT_BOUNDS = Bounds()


@attrs.frozen(kw_only=True)
class Exploration:
    """What an exploration that found no failure has covered."""

    runs: int
    """Orders run, including those cut off because of a repeated state."""
    choices: int
    """The most choices in one run."""
    steps: int
    """Steps of tasks in all runs."""
    pruned: int
    """Runs cut off because of a repeated state."""
    seconds: float
    hit: frozenset[BoundName]
    """The bounds that left something out."""
    covered_preemptions: int | None
    """All orders with at most this many deviations were seen. None: all orders, or nothing can be said (`hit`)."""

    @property
    def complete(self) -> bool:
        """Whether every order was seen that `max_preemptions` allows."""
        return self.hit <= {"preemptions"}

    @property
    def exhaustive(self) -> bool:
        """Whether every order was seen."""
        return not self.hit

    def __str__(self) -> str:
        covered = "all of them"
        if not self.exhaustive:
            named = ", ".join(sorted(self.hit))
            covered = f"cut short by the bound on {named}"
            if self.covered_preemptions is not None:
                covered += f"; all with up to {counted(self.covered_preemptions, 'deviation')}"
        pruned = f", {self.pruned} cut off at a repeated state" if self.pruned else ""
        return (
            f"{counted(self.runs, 'order')} run ({covered}){pruned}; up to {counted(self.choices, 'choice')} in a run, "
            f"{counted(self.steps, 'step')}, {self.seconds:.2f} s"
        )


class _RepeatedStateError(Exception):
    """Ends a run that has nothing new to show."""


@attrs.define
class Follow:
    """Chooses by a list, and by the default order after its end."""

    order: Order
    expected: Order | None = None
    """How many tasks there were to choose from when the list was found."""
    position: int = 0

    def __call__(self, width: int) -> int:
        """Return the next choice. Raises NondeterminismError if there is no such choice."""
        position = self.position
        self.position += 1
        if position >= len(self.order):
            return 0
        if self.expected is not None and width != self.expected[position]:
            raise NondeterminismError(
                f"choice {position} was between {self.expected[position]} tasks, and in the same order is between {width}"
            )
        choice = self.order[position]
        if choice >= width:
            raise NondeterminismError(
                f"choice {position} asks for task {choice}, but there are only 0 to {width - 1}"
            )
        return choice


@attrs.define
class Explorer:
    """One exploration. `explore` is called once."""

    async_fn: Callable[..., Awaitable[object]]
    args: tuple[object, ...]
    bounds: Bounds
    clock: ClockFactory
    state: Callable[[], Hashable] | None
    instruments: Sequence[trio.abc.Instrument]
    runs: int = 0
    pruned: int = 0
    hit: set[BoundName] = attrs.field(factory=set)
    seen: dict[Hashable, int] = attrs.field(factory=dict)
    """The states met so far, with the fewest deviations by which each was reached."""

    def explore(self, *, breadth: bool) -> Exploration:
        """Run the orders, fewest deviations first (`breadth`) or depth first, up to the first failure or bound."""
        bounds = self.bounds
        began = time.monotonic()
        give_up_at = None if bounds.max_seconds is None else began + bounds.max_seconds
        choices = steps = 0
        cut_at: Order | None = None
        frontier: deque[Iterator[tuple[Order, Order]]] = deque([iter([((), ())])])
        while (following := _take(frontier, breadth=breadth)) is not None:
            order, widths = following
            if self.runs == bounds.max_runs:
                self.hit.add("runs")
                cut_at = order
                break
            ran = self._run(order, widths, give_up_at)
            steps += ran.steps
            if isinstance(ran.stopped_by, OutOfTimeError):
                self.hit.add("seconds")
                cut_at = order
                break
            self.runs += 1
            self._judge(ran, order)
            choices = max(choices, len(ran.widths))
            frontier.append(self._children(order, ran.widths, breadth=breadth))
        covered = None
        if cut_at is None:
            covered = bounds.max_preemptions
        elif breadth:
            covered = _deviations(cut_at) - 1
        if not self.hit or "branches" in self.hit or covered == -1:
            covered = None
        return Exploration(
            runs=self.runs,
            choices=choices,
            steps=steps,
            pruned=self.pruned,
            seconds=time.monotonic() - began,
            hit=frozenset(self.hit),
            covered_preemptions=covered,
        )

    def _run(self, order: Order, widths: Order, give_up_at: float | None) -> Ran:
        follow = Follow(order, widths)
        deviations = _deviations(order)
        state = self.state

        def choose_new(width: int) -> int:
            position = follow.position
            choice = follow(width)
            if state is not None and len(order) <= position < self.bounds.max_branches:
                here = state(), control.position()
                known = self.seen.get(here)
                if known is not None and known <= deviations:
                    raise _RepeatedStateError
                self.seen[here] = deviations
            return choice

        control = Control(
            async_fn=self.async_fn,
            args=self.args,
            choose=follow if state is None else choose_new,
            max_steps=self.bounds.max_steps,
            give_up_at=give_up_at,
            positions=state is not None,
        )
        return control.run(clock=self.clock(), instruments=self.instruments)

    def _judge(self, ran: Ran, order: Order) -> None:
        """Raise what the run calls for, if anything."""
        if isinstance(ran.stopped_by, _RepeatedStateError):
            self.pruned += 1
        elif isinstance(ran.error, Exception) or isinstance(ran.stopped_by, (DeadlockError, LivelockError)):
            self._fail(ran)
        elif ran.error is not None or ran.stopped_by is not None:
            finish(ran)
        elif len(ran.choices) < len(order):
            raise NondeterminismError(
                f"a run that had {counted(len(order), 'choice')} or more ended after {len(ran.choices)} in the same order"
            )

    def _children(self, order: Order, widths: Order, *, breadth: bool) -> Iterator[tuple[Order, Order]]:
        """Yield the schedules that deviate once more than this one, each with the widths that it has to meet again."""
        bounds = self.bounds
        if len(widths) > bounds.max_branches:
            self.hit.add("branches")
        positions = range(len(order), min(len(widths), bounds.max_branches))
        if _deviations(order) == bounds.max_preemptions:
            if positions:
                self.hit.add("preemptions")
            return iter(())
        return (
            ((*order, *(0,) * (position - len(order)), choice), widths)
            for position in (positions if breadth else reversed(positions))
            for choice in range(1, widths[position])
        )

    def _fail(self, ran: Ran) -> None:
        """Make the failing order short, and raise ScheduleFailure for it."""
        failure = ran.error or ran.stopped_by
        kind = _kind(failure)
        left = iter(range(MINIMISING_RUNS))
        give_up_at = time.monotonic() + MINIMISING_S

        def fails(order: Order) -> bool:
            if next(left, None) is None or time.monotonic() >= give_up_at:
                return False
            again = self._replay(order)
            return _kind(again.error or again.stopped_by) == kind

        order = _minimised(trimmed(ran.choices), fails)
        last = self._replay(order, tracing=True)
        again = last.error or last.stopped_by
        if again is None or _kind(again) != kind:
            raise NondeterminismError(
                f"the program failed with schedule {list(order)}, and not in that way when it was replayed"
            ) from failure
        raise ScheduleFailure(
            _named(self.async_fn), again, schedule=list(order), trace=last.trace, runs=self.runs
        ) from again

    def _replay(self, order: Order, *, tracing: bool = False) -> Ran:
        control = Control(
            async_fn=self.async_fn,
            args=self.args,
            choose=Follow(order),
            max_steps=self.bounds.max_steps,
            tracing=tracing,
        )
        return control.run(clock=self.clock(), instruments=self.instruments)


def _take(frontier: deque[Iterator[tuple[Order, Order]]], *, breadth: bool) -> tuple[Order, Order] | None:
    """Return what is to be run next; None when nothing is left."""
    while frontier:
        following = next(frontier[0 if breadth else -1], None)
        if following is not None:
            return following
        if breadth:
            frontier.popleft()
        else:
            frontier.pop()
    return None


def _minimised(order: Order, fails: Callable[[Order], bool]) -> Order:
    """Return a schedule that fails as well and has fewer deviations, or is shorter, or chooses lower; greedily."""
    better = True
    while better:
        better = False
        for index in reversed(range(len(order))):
            if index >= len(order) or not order[index]:
                continue
            before, choice, after = order[:index], order[index], order[index + 1 :]
            zeros = index - len(trimmed(before))
            candidates = [
                (*before, 0, *after),
                (*before, *after),
                *((*before[: index - fewer], choice, *after) for fewer in _halvings(zeros)),
                *((*before, lower, *after) for lower in range(1, choice)),
            ]
            for candidate in map(trimmed, candidates):
                if candidate != order and fails(candidate):
                    order = candidate
                    better = True
                    break
    return order


def _halvings(number: int) -> list[int]:
    """Return 1 to 4, and the number with its halves, its quarters and so on, as far as they are not above it; falling."""
    found = {small for small in range(1, 5) if small <= number}
    while number:
        found.add(number)
        number //= 2
    return sorted(found, reverse=True)


def trimmed(order: Order) -> Order:
    """Drop the trailing zeros."""
    end = len(order)
    while end and not order[end - 1]:
        end -= 1
    return order[:end]


def _deviations(order: Order) -> int:
    return len(order) - order.count(0)


def _kind(error: BaseException | None) -> object:
    """Return what makes two failures the same one: the type and place of the exception, or those of a group's members."""
    if error is None:
        return None
    if isinstance(error, BaseExceptionGroup):
        return frozenset(_kind(member) for member in error.exceptions)
    place = None
    trace = error.__traceback__
    while trace is not None:
        place = trace.tb_frame.f_code.co_filename, trace.tb_lineno
        trace = trace.tb_next
    return type(error), place


def finish(ran: Ran) -> Any:
    """Return the program's result, or raise what it raised or why it was stopped."""
    __tracebackhide__ = True
    failure = ran.error or ran.stopped_by
    if failure is None:
        return ran.value
    if ran.error is not None or isinstance(failure, (DeadlockError, LivelockError)):
        note = f"order of tasks: schedule={list(trimmed(ran.choices))}"
        failure.add_note(f"{note}\n{render(ran.trace)}" if ran.trace else note)
    raise failure


def _named(async_fn: object) -> str:
    while isinstance(async_fn, functools.partial):
        async_fn = async_fn.func
    return short_name(getattr(async_fn, "__qualname__", repr(async_fn)))
