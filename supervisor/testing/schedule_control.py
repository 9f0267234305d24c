# ruff: noqa: SLF001  # the one module that reaches into trio's run loop; `check_trio` fails clearly when trio changes
"""Runs a trio program with its order of tasks decided by a callable.

Theory. trio's run loop works in batches: it takes all tasks that are runnable now, puts them in some order, and runs each
for one *step*, up to where it next yields to the loop; whatever becomes runnable meanwhile waits for the next batch. The
order within a batch is the only thing that trio leaves open. It draws it from a module-level `random.Random`, and since
trio 0.12 can be told to sort the batch by age of the tasks first and then call `shuffle` (python-trio/trio#890; a public
way is asked for in python-trio/trio#2675). So an object of ours in the place of that `Random` decides the order.

`shuffle` is handed the very list that the loop then pops its tasks from. Reordering it again between two steps (from the
`after_task_step` instrument) makes each choice as late as possible: one choice at a time, with the state of the program
at that moment in view, rather than a whole permutation in advance. The orders that can be had are the same.

The first batch of a run has two tasks, the program and trio's own task that serves `run_sync_soon`. It is no choice here:
trio's goes first. Nothing is lost, for that step of it finds an empty queue and goes to wait; a callback enqueued by the
program's first step then runs in the next batch, in every order relative to what that step made runnable, which includes
the order it would have had.

A run that is of no more interest (pruned, out of time, drawn too long), or that would never end (deadlock, too many
steps), is *wound down*: its program is cancelled, then its shields are lifted, then, should it swallow even that, the run
is broken off. What it does while it is wound down is not recorded.

Prior art: loom (Rust) and CHESS control every memory access; here the places where a task yields are trio's checkpoints,
so a program is explored as it is, without instrumenting it.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import math
import os
import random
import threading
import time
from collections.abc import Awaitable, Callable, Hashable, Iterator, MutableSequence, Sequence
from typing import Any, final

import attrs
import outcome
import trio
import trio.testing
from trio._core import _run

from supervisor.errors import ConfigurationError
from supervisor.testing.schedule_errors import DeadlockError, LivelockError, Step, TrioChangedError

__all__ = ["Control", "OutOfTimeError", "Ran", "check_trio", "short_name"]

WIND_DOWN_STEPS = 10_000
"""The steps a program gets for its cleanup at each stage of winding down."""
FOREVER_S = 3600.0
"""A wait for I/O this long, by the real clock, with no I/O to wait for, is never meant."""

Choose = Callable[[int], int]
"""Given how many tasks are runnable, at least 2, say which one runs next: 0 is the one that was spawned first."""


class OutOfTimeError(Exception):
    """The run was given up at its time limit."""


class _BrokenOffError(BaseException):
    """Leaves trio's run loop from within."""


@attrs.frozen
class Ran:
    """What came of one run."""

    value: Any
    """What the program returned."""
    error: BaseException | None
    """What the program raised. None for a run that was stopped."""
    stopped_by: BaseException | None
    """Why the run was stopped: what `choose` raised, a deadlock, too many steps or out of time."""
    choices: tuple[int, ...]
    widths: tuple[int, ...]
    """How many tasks there were to choose from at each choice."""
    steps: int
    trace: tuple[Step, ...]


@final
@attrs.define(eq=False, kw_only=True)
class Control(trio.abc.Instrument):
    """Runs a program once, in the order that `choose` says. To be used for one run only.

    An exception from `choose` stops the run and becomes `Ran.stopped_by`.
    """

    async_fn: Callable[..., Awaitable[Any]]
    args: tuple[Any, ...]
    choose: Choose
    max_steps: int
    give_up_at: float | None = None
    """When to stop the run, by `time.monotonic()`."""
    tracing: bool = False
    positions: bool = False
    """Whether `position` will be asked for."""

    steps: int = attrs.field(default=0, init=False)
    _choices: list[int] = attrs.field(factory=list, init=False)
    _widths: list[int] = attrs.field(factory=list, init=False)
    _trace: list[Step] = attrs.field(factory=list, init=False)
    _batch: MutableSequence[Any] = attrs.field(factory=list, init=False)
    _last_step: dict[Any, int] = attrs.field(factory=dict, init=False)
    _steps_of: dict[Any, int] = attrs.field(factory=dict, init=False)
    _base: int = attrs.field(default=0, init=False)
    _steps_at_last_wait: int = attrs.field(default=-1, init=False)
    _picked: tuple[int, tuple[str, ...]] | None = attrs.field(default=None, init=False)
    _scope: trio.CancelScope = attrs.field(factory=trio.CancelScope, init=False)
    _stopped_by: BaseException | None = attrs.field(default=None, init=False)
    _limit: int = attrs.field(default=0, init=False)
    _wound: int = attrs.field(default=0, init=False)
    _abandoned: list[Any] | None = attrs.field(default=None, init=False)

    def run(self, *, clock: trio.abc.Clock | None, instruments: Sequence[trio.abc.Instrument] = ()) -> Ran:
        """Run the program; what it raises is part of the result.

        An error from before its first step passes through, and so does KeyboardInterrupt while it is wound down.
        """
        self._limit = self.max_steps
        value: Any = None
        error: BaseException | None = None
        with _installed(self):
            try:
                value = trio.run(self._main(), clock=clock, instruments=[*instruments, self])
            except BaseException as raised:  # noqa: ASYNC103, BLE001  # part of the result, unless raised again below
                error = raised
        if error is not None and (
            not self.steps or (self._stopped_by is not None and isinstance(error, KeyboardInterrupt))
        ):
            raise error
        if self._abandoned is not None:
            _close(self._abandoned)
        if self._stopped_by is not None:
            error = None
        return Ran(
            value=value,
            error=error,
            stopped_by=self._stopped_by,
            choices=tuple(self._choices),
            widths=tuple(self._widths),
            steps=self.steps,
            trace=tuple(self._trace),
        )

    def _main(self) -> Callable[[], Awaitable[Any]]:
        async def main() -> Any:
            with self._scope:
                return await self.async_fn(*self.args)

        plain = self.async_fn
        while isinstance(plain, functools.partial):
            plain = plain.func
        functools.update_wrapper(main, plain)  # so that trio names the task after the program
        return main

    # --- the order -----------------------------------------------------------------------------------------------------

    def shuffle(self, batch: MutableSequence[Any]) -> None:
        """Order a batch: called by trio's loop, with the tasks from oldest to youngest; it pops them from the end."""
        if self._abandoned is not None:
            raise _BrokenOffError
        batch.reverse()
        self._batch = batch
        self._pick()

    def _pick(self) -> None:
        """Choose which of the rest of the batch is popped next."""
        batch = self._batch
        width = len(batch)
        self._picked = None
        if width < 2 or self._stopped_by is not None:
            return
        if self.steps == 1:  # only trio's init task has run: the program and trio's run_sync_soon task start
            if _is_ours(batch[-1]):
                batch.reverse()
            return
        chosen = outcome.capture(self.choose, width)  # what it raises, trio would log, and go on without us
        if isinstance(chosen, outcome.Error):
            self.stop(chosen.error)
            return
        choice = chosen.value
        if not 0 <= choice < width:
            self.stop(ConfigurationError("choice", choice, f"one of 0 to {width - 1}"))
            return
        self._choices.append(choice)
        self._widths.append(width)
        if choice:
            batch.append(batch.pop(width - 1 - choice))
        if self.tracing:
            self._picked = choice, tuple(self._name(task) for task in batch[-2::-1])

    # --- the instrument ------------------------------------------------------------------------------------------------

    def before_task_step(self, task: trio.lowlevel.Task) -> None:
        """Record what is about to run."""
        if self.steps == 0:
            self._base = task._counter
        if self.tracing and self._stopped_by is None and not _is_trios(task):
            choice, others = self._picked if self._picked is not None else (None, ())
            self._trace.append(Step(self._name(task), _where(task), choice, others))

    def after_task_step(self, task: trio.lowlevel.Task) -> None:
        """Count the step, and choose the next one of the batch."""
        self.steps += 1
        if self.positions:
            self._last_step[task] = self.steps
            self._steps_of[task] = self._steps_of.get(task, 0) + 1
        if self.steps >= self._limit:
            self.stop(LivelockError(self.max_steps))
        elif not self.steps & 63:
            self._check_time()
        self._pick()

    def before_io_wait(self, timeout: float) -> None:
        """Notice that nothing will ever happen again.

        trio is about to wait `timeout` seconds for I/O. With an autojump clock that is 0, again and again; so the second
        such wait in which no task has run is the sign. With any other clock it is a wait of a day.
        """
        idle = self._steps_at_last_wait == self.steps
        self._steps_at_last_wait = self.steps
        if timeout < FOREVER_S and not idle:
            return
        self._check_time()
        statistics = trio.lowlevel.current_statistics()
        if (
            statistics.tasks_runnable
            or statistics.run_sync_soon_queue_size
            or (timeout < FOREVER_S and statistics.seconds_to_next_deadline != math.inf)
            or _waiting_for_io(statistics.io_statistics)
            or trio.testing.active_thread_count()
        ):
            return
        self.stop(
            DeadlockError([(self._name(task), _where(task)) for task in _living() if not _is_trios(task)])
        )

    def _check_time(self) -> None:
        if self.give_up_at is not None and self._stopped_by is None and time.monotonic() >= self.give_up_at:
            self.stop(OutOfTimeError())

    # --- the end of a run that would not end by itself -----------------------------------------------------------------

    def stop(self, why: BaseException) -> None:
        """Stop the run; called again, wind it down more sharply."""
        if self._stopped_by is None:
            self._stopped_by = why
        self._limit = self.steps + WIND_DOWN_STEPS
        try:  # not at once: this wakes a loop that is about to wait for I/O, too
            trio.lowlevel.current_trio_token().run_sync_soon(self._wind_down)
        except (
            trio.RunFinishedError
        ):  # all that is left is finalizers of async generators, which cannot be cancelled
            self._abandoned = _living()

    def _wind_down(self) -> None:
        self._wound += 1
        if self._wound == 1:
            self._scope.cancel()
        elif self._wound == 2:
            for task in _living():
                for scope in _scopes(task):
                    scope.shield = False
        else:
            self._abandoned = _living()
            trio.lowlevel.current_trio_token().run_sync_soon(
                lambda: None
            )  # a runnable task, so a batch, so `shuffle`

    # --- where the program stands --------------------------------------------------------------------------------------

    def position(self) -> Hashable:
        """Return where the program stands, as far as trio and the interpreter know it.

        The time; every task's place in the tree of tasks and in its code, the steps it has taken (which tells rounds of a
        loop apart), what it is about to be sent, whether it has still to run in this batch, its cancel scopes with their
        deadlines, and what its nurseries have collected; and in which order the blocked tasks came to be blocked. Not the
        values of variables, nor the contents of objects.

        What is compared by identity is held by the result, so that an address used again is never taken for the same.
        """
        tasks = _living()
        number = {task: index for index, task in enumerate(tasks)}
        remaining = set(self._batch)
        entries = []
        blocked = []
        for task in tasks:
            if task._next_send_fn is None:
                blocked.append(task)
            parent = task.parent_nursery
            entries.append(
                (
                    task.name,
                    None if parent is None else number.get(parent.parent_task),
                    None if parent is None else parent.parent_task._child_nurseries.index(parent),
                    tuple((_Code(frame.f_code), frame.f_lasti) for frame, _ in task.iter_await_frames()),
                    inspect.getcoroutinestate(task.coro),
                    self._steps_of.get(task, 0),
                    task in remaining,
                    task._next_send_fn is None or _message(task._next_send),
                    tuple((scope._cancel_called, scope.shield, scope.deadline) for scope in _scopes(task)),
                    tuple(
                        tuple(_message(error) for error in nursery._pending_excs)
                        for nursery in task._child_nurseries
                    ),
                )
            )
        blocked.sort(key=lambda task: self._last_step.get(task, 0))
        return trio.current_time(), tuple(entries), tuple(number[task] for task in blocked)

    def _name(self, task: trio.lowlevel.Task) -> str:
        # numbers from 1 for the program: trio's init task is 0, its run_sync_soon task 2
        number = task._counter - self._base
        return f"{short_name(task.name)}#{number - 1 if number > 2 else number}"


def short_name(name: str) -> str:
    """Return the last part of a dotted name, or of one local to a function; any other name as it is."""
    tail = name.rpartition(".")[2]
    return tail if tail.isidentifier() else name


@attrs.frozen(eq=False)
class _Identity:
    """Equal only to another of the same object, which it keeps alive."""

    it: object

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Identity) and self.it is other.it

    def __hash__(self) -> int:
        return id(self.it)


_Code = (
    _Identity  # code objects compare by value, slowly; those of one program are the same objects in each run
)


def _message(sent: object) -> Hashable:
    """Return what a task is about to be sent, so that equal results mean an equal future."""
    if isinstance(sent, outcome.Value):
        value = sent.value
        try:
            hash(value)
        except TypeError:
            return _Identity(value)
        return type(value), value
    error = sent.error if isinstance(sent, outcome.Error) else sent
    if isinstance(error, trio.Cancelled):
        return trio.Cancelled
    return _Identity(error) if error is not None else None


def _is_ours(task: Any) -> bool:
    """Whether this is the program's main task."""
    file: str = task.coro.cr_code.co_filename
    return file == __file__


def _is_trios(task: trio.lowlevel.Task) -> bool:
    """Whether this is one of the tasks that every run has: init, and the one that serves `run_sync_soon`."""
    return task.name in {"<init>", "<TrioToken.run_sync_soon task>"}


def _living() -> list[Any]:
    """Return the tasks of this run, each nursery's in the order of their spawning."""
    tasks: list[Any] = []
    root = trio.lowlevel.current_root_task()
    pending = [root] if root is not None else []
    while pending:
        task = pending.pop()
        tasks.append(task)
        for nursery in reversed(task._child_nurseries):
            pending.extend(sorted(nursery.child_tasks, key=lambda child: child._counter, reverse=True))
    return tasks


def _scopes(task: Any) -> Iterator[trio.CancelScope]:
    status = task._cancel_status
    while status is not None:
        yield status._scope
        status = status._parent


_HIDDEN = (os.path.join(os.path.dirname(trio.__file__), ""), __file__, contextlib.__file__)  # noqa: PTH118, PTH120  # compared with code's co_filename, which is text


def _where(task: trio.lowlevel.Task) -> str:
    """Return where a task stands in the program's own code: the innermost frame that is neither trio's nor ours."""
    place = ""
    for frame, line in task.iter_await_frames():
        code = frame.f_code
        if not code.co_filename.startswith(_HIDDEN):
            place = f"{os.path.basename(code.co_filename)}:{line} in {code.co_name}"  # noqa: PTH119  # as above
    if inspect.getcoroutinestate(task.coro) == inspect.CORO_CREATED:
        return f"starts at {place}" if place else "starts"
    return place or "?"


def _waiting_for_io(io_statistics: object) -> bool:
    """Whether a task other than trio's own run_sync_soon task waits for I/O; the names differ by platform."""
    waiting: int = sum(
        getattr(io_statistics, name) for name in dir(io_statistics) if name.startswith("tasks_waiting")
    )
    return waiting > 1


def _close(tasks: list[Any]) -> None:
    """Close the coroutines of a run that was broken off, so that their remains say nothing when they are collected."""
    for task in reversed(tasks):
        for nursery in task._child_nurseries:
            nursery._children.clear()
        for _ in range(100):  # a coroutine may await in a `finally`; it is then asked again
            closed = outcome.capture(task.coro.close)  # outside of a run its cleanup may raise anything
            if not isinstance(closed, outcome.Error) or "ignored GeneratorExit" not in str(closed.error):
                break


# --- in the place of trio's random numbers ----------------------------------------------------------------------------

_lock = threading.Lock()
_controls: dict[int, Control] = {}
"""The runs under control, by thread."""
_saved: dict[str, object] = {}


class _Order(random.Random):
    """Stands in for `trio._core._run._r`.

    A run in another thread is shuffled as ever; and trio's system clock, which starts at a random offset drawn from the
    same object, gets the same one each time.
    """

    def shuffle(self, x: MutableSequence[Any]) -> None:
        control = _controls.get(threading.get_ident())
        if control is None:
            super().shuffle(x)
        else:
            control.shuffle(x)


@contextlib.contextmanager
def _installed(control: Control) -> Iterator[None]:
    """Put `_Order` in place while at least one controlled run lasts."""
    thread = threading.get_ident()
    names = vars(_run)
    with _lock:
        outer = _controls.get(thread)
        if not _controls:
            _saved.update({name: names[name] for name in ("_r", "_ALLOW_DETERMINISTIC_SCHEDULING")})
            names.update(_r=_Order(0), _ALLOW_DETERMINISTIC_SCHEDULING=True)
        _controls[thread] = control
    try:
        yield
    finally:
        with _lock:
            if outer is None:
                del _controls[thread]
            else:  # a run inside a run, which trio has refused
                _controls[thread] = outer
            if not _controls:
                names.update(_saved)
                _saved.clear()


@functools.cache
def check_trio() -> None:
    """Raise TrioChangedError unless the order of tasks is really under control. Done once per process."""
    try:
        seen = [_sample([]), _sample([2, 0, 1, 1])]
    except Exception as exc:
        raise TrioChangedError(trio.__version__, f"{type(exc).__name__}: {exc}") from exc
    expected = [("abcabc", (3, 2, 3, 2)), ("cabbca", (3, 2, 3, 2))]
    if seen != expected:
        raise TrioChangedError(trio.__version__, f"a sample program ran as {seen}, not as {expected}")


def _sample(order: list[int]) -> tuple[str, tuple[int, ...]]:
    """Run three tasks of two steps each in an order; return who ran, and how many there were to choose from."""
    log: list[str] = []

    async def worker(name: str) -> None:
        log.append(name)
        await trio.lowlevel.checkpoint()
        log.append(name)

    async def program() -> None:
        async with trio.open_nursery() as nursery:
            for name in "abc":
                nursery.start_soon(worker, name)

    rest = iter(order)
    control = Control(
        async_fn=program, args=(), choose=lambda _: next(rest, 0), max_steps=1000, positions=True
    )
    ran = control.run(clock=None)
    if ran.error is not None:
        raise ran.error
    return "".join(log), ran.widths
