"""What the schedule explorer raises, and how an order of tasks is shown to a reader."""

from __future__ import annotations

from collections.abc import Sequence
from textwrap import indent

import attrs

from supervisor.errors import SupervisorError

__all__ = [
    "DeadlockError",
    "LivelockError",
    "NondeterminismError",
    "ScheduleError",
    "ScheduleFailure",
    "Step",
    "TrioChangedError",
]

SHOWN_STEPS = 60
"""A trace longer than this is shown with the steps between its deviations left out."""


@attrs.frozen
class Step:
    """One step of one task: what it ran from one place where it yields to trio to the next."""

    task: str
    """The task's name and its number in order of spawning, such as `worker#3`."""
    where: str
    """Where the task went on from, such as `test_bank.py:12 in worker`."""
    choice: int | None
    """Which of the runnable tasks this was; None when there was nothing to choose."""
    others: tuple[str, ...] = ()
    """The tasks that could have run in its place."""


class ScheduleError(SupervisorError):
    """The base of what the schedule explorer raises."""


class ScheduleFailure(ScheduleError):  # noqa: N818  # a test's verdict on the program, not a malfunction of ours
    """The program fails under some order of its tasks. The program's own exception is the `__cause__`.

    `schedule` is the order, as short as could be found; `trace` what ran in it; `runs` how many orders were run until
    the failure was found, without those that made it shorter.
    """

    def __init__(
        self, program: str, cause: BaseException, *, schedule: list[int], trace: Sequence[Step], runs: int
    ) -> None:
        deviations = sum(1 for choice in schedule if choice)
        kind = (
            "the default order"
            if not schedule
            else f"an order with {counted(deviations, 'deviation')} from the default"
        )
        super().__init__(
            f"{program} fails under {kind} (run {runs} of the exploration)\n"
            f"{indent(_headline(cause), '  ')}\n"
            f"replay it with\n"
            f"  run({program}, schedule={schedule})\n"
            f"{render(trace)}"
        )
        self.schedule = schedule
        self.trace = tuple(trace)
        self.runs = runs


class DeadlockError(ScheduleError):
    """Every task of the program is blocked, and nothing is left that could wake one: no deadline, I/O or thread."""

    def __init__(self, blocked: Sequence[tuple[str, str]]) -> None:
        lines = "\n".join(f"  {task} at {where}" for task, where in blocked)
        super().__init__(f"all tasks are blocked and nothing is left that could wake one\n{lines}")
        self.blocked = tuple(blocked)


class LivelockError(ScheduleError):
    """The program was still running after `max_steps` steps of its tasks."""

    def __init__(self, max_steps: int) -> None:
        super().__init__(
            f"the program has not ended after {max_steps} steps of its tasks; it loops, or it is long and needs a larger max_steps"
        )
        self.max_steps = max_steps


class NondeterminismError(ScheduleError):
    """The same order of tasks did not lead to the same run, so neither exploring nor replaying means anything."""

    def __init__(self, what: str) -> None:
        super().__init__(
            f"{what}; the program depends on something besides the order of its tasks. Usual causes: state left over from "
            "an earlier run (build it inside the program), the real clock, random numbers, sockets, threads or signals, "
            "iteration over a set; or, for a schedule written down earlier, a program that has changed since"
        )


class TrioChangedError(ScheduleError):
    """This version of trio does not let the order of tasks be controlled in the way this package knows."""

    def __init__(self, version: str, what: str) -> None:
        super().__init__(
            f"the schedule explorer cannot control the order of tasks in trio {version}: {what}. It relies on private parts "
            "of trio; use a release of this package made for this trio, or an earlier trio"
        )
        self.version = version


def render(trace: Sequence[Step]) -> str:
    """Return a trace as lines: choice, whether it deviates, the task, where it went on from, and who waited."""
    width = max((len(step.task) for step in trace), default=0)
    shown = _worth_showing(trace)
    lines = ["what ran, in order ([choice], * where it deviates from the default order):"]
    skipped = 0
    for number, step in enumerate(trace):
        if number not in shown:
            skipped += 1
            continue
        if skipped:
            lines.append(f"      … {counted(skipped, 'step')} not shown")
            skipped = 0
        choice = "   " if step.choice is None else f"[{step.choice}]"
        mark = "*" if step.choice else " "
        others = f"   (before {', '.join(step.others)})" if step.others else ""
        lines.append(f"  {mark} {choice} {step.task:<{width}} {step.where}{others}")
    if skipped:
        lines.append(f"      … {counted(skipped, 'step')} not shown")
    return "\n".join(lines)


def counted(number: int, noun: str) -> str:
    """Return a number with its noun, in the plural where it needs one."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def _worth_showing(trace: Sequence[Step]) -> set[int]:
    """Choose the steps to show: all of a short trace; else the start, the end and those around each deviation."""
    count = len(trace)
    if count <= SHOWN_STEPS:
        return set(range(count))
    shown = set(range(8)) | set(range(count - 20, count))
    for number, step in enumerate(trace):
        if step.choice and len(shown) < SHOWN_STEPS:
            shown |= {near for near in range(number - 2, number + 3) if 0 <= near < count}
    return shown


def _headline(error: BaseException) -> str:
    """Return an exception's type and first line (all lines of one of ours), looking into groups of one."""
    while isinstance(error, BaseExceptionGroup) and len(error.exceptions) == 1:
        error = error.exceptions[0]
    text = str(error) if isinstance(error, ScheduleError) else str(error).partition("\n")[0]
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
