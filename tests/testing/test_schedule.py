"""The schedule explorer finds what depends on the order of tasks, counts right, and keeps within its bounds."""

from __future__ import annotations

import contextlib
import math
import pickle
import random
import socket

import pytest
import trio
import trio.testing
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from supervisor.errors import ConfigurationError
from supervisor.testing import (
    Bounds,
    DeadlockError,
    LivelockError,
    NondeterminismError,
    ScheduleFailure,
    explore,
    run,
    run_drawn,
)

SEARCHES = ["fewest-first", "depth-first"]


async def side_by_side(tasks, checkpoints):
    """So many tasks with so many checkpoints each, all runnable in each batch."""

    async def worker():
        for _ in range(checkpoints):
            await trio.lowlevel.checkpoint()

    async with trio.open_nursery() as nursery:
        for _ in range(tasks):
            nursery.start_soon(worker)


async def lost_update():
    """Fails only if the late task reads before the early one has written: not in the default order."""
    total = 0

    async def early():
        nonlocal total
        await trio.lowlevel.checkpoint()
        total += 1

    async def late():
        nonlocal total
        await trio.lowlevel.checkpoint()
        read = total
        await trio.lowlevel.checkpoint()
        total = read + 1

    async with trio.open_nursery() as nursery:
        nursery.start_soon(early)
        nursery.start_soon(late)
    assert total == 2


async def lost_wakeup():
    """Waits for an event that is replaced after it was set: blocks for ever if the setter goes first."""
    bell = {"event": trio.Event()}

    async def waiter():
        await trio.sleep(1)
        bell["event"] = trio.Event()
        await bell["event"].wait()

    async def ringer():
        await trio.sleep(1)
        bell["event"].set()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(waiter)
        nursery.start_soon(ringer)


async def note(outcomes, outcome):
    """Add an outcome, unless the run has been cut off: it is then being cancelled."""
    await trio.lowlevel.checkpoint()
    outcomes.add(outcome)


async def three_tasks():
    """Three tasks that log their names in each of four batches."""
    log = []

    async def worker(name):
        for _ in range(4):
            log.append(name)
            await trio.lowlevel.checkpoint()

    async with trio.open_nursery() as nursery:
        for name in "abc":
            nursery.start_soon(worker, name)
    return log


async def third_first():
    """Fails if the third of three tasks is first in the second batch, and the second one first in the third."""
    log = await three_tasks()
    assert not (log[3] == "c" and log[6] == "b"), log


# --- finding ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("search", SEARCHES)
def test_finds_a_lost_update(search):
    """A race that the default order does not show is found by both searches, with its shortest order."""
    run(lost_update)
    with pytest.raises(ScheduleFailure) as caught:
        explore(lost_update, search=search)
    assert caught.value.schedule == [0, 1]
    assert isinstance(caught.value.__cause__, AssertionError)
    message = str(caught.value)
    assert "run(lost_update, schedule=[0, 1])" in message
    assert "  * [1] late#3" in message
    assert "late#3        test_schedule.py:" in message


@pytest.mark.parametrize("search", SEARCHES)
def test_finds_a_lost_wakeup(search):
    """A task that waits for an event set too early is a deadlock that names the task, under an autojump clock."""
    run(lost_wakeup)
    with pytest.raises(ScheduleFailure) as caught:
        explore(lost_wakeup, search=search)
    deadlock = caught.value.__cause__
    assert isinstance(deadlock, DeadlockError)
    assert [task for task, _ in deadlock.blocked] == ["lost_wakeup#1", "waiter#2"]
    assert deadlock.blocked[1][1].endswith("in waiter")
    assert deadlock.blocked[1][1] in str(caught.value)


@pytest.mark.parametrize(
    "clock",
    [lambda: None, trio.testing.MockClock, lambda: trio.testing.MockClock(autojump_threshold=0)],
    ids=["real", "stopped", "autojump"],
)
def test_a_deadlock_is_found_under_every_clock(clock):
    """Two locks taken crosswise end the run at once, whether trio would sleep for a day or spin."""

    async def locks():
        left, right = trio.Lock(), trio.Lock()

        async def taking(first, second):
            async with first, second:
                pass

        async with trio.open_nursery() as nursery:
            nursery.start_soon(taking, left, right)
            nursery.start_soon(taking, right, left)

    with pytest.raises(DeadlockError) as caught:
        run(locks, clock=clock)
    assert [task for task, _ in caught.value.blocked] == ["locks#1", "taking#2", "taking#3"]


def test_a_deadlock_behind_a_shield_ends():
    """A program blocked where cancellation cannot reach is reported as well, and gets its Cancelled all the same."""

    async def shielded():
        try:
            with trio.CancelScope(shield=True):
                await trio.sleep_forever()
        except trio.Cancelled:
            left.append("cancelled")
            raise

    left = []
    with pytest.raises(DeadlockError):
        run(shielded)
    assert left == ["cancelled"]


def test_a_stopped_program_can_clean_up():
    """Cleanup behind a shield, with time of its own, is let finish before the run ends."""

    async def tidy():
        try:
            await trio.sleep_forever()
        finally:
            with trio.CancelScope(shield=True):
                await trio.sleep(5)
                cleaned.append(trio.current_time())

    cleaned = []
    with pytest.raises(DeadlockError):
        run(tidy)
    assert cleaned == [5]


def test_an_interrupt_during_cleanup_is_not_lost():
    """Ctrl-C that arrives while a stopped program cleans up ends the exploration."""

    async def interrupted():
        try:
            await trio.sleep_forever()
        except trio.Cancelled:
            raise KeyboardInterrupt from None  # noqa: ASYNC104  # as trio itself does on Ctrl-C

    with pytest.raises(KeyboardInterrupt):
        explore(interrupted)


def test_what_may_still_wake_up_is_no_deadlock():
    """Waiting for a thread, for idleness or for a far deadline is not reported."""

    async def waits():
        assert await trio.to_thread.run_sync(pickle.dumps, 1)
        await trio.testing.wait_all_tasks_blocked(0.01)
        await trio.sleep(80_000)
        return trio.current_time()

    assert run(waits) == 80_000


class AfterIdleness(trio.abc.Instrument):
    """Does something when the loop has found nothing to run for so many rounds."""

    def __init__(self, rounds, act):
        self.left = rounds
        self.act = act

    def before_io_wait(self, timeout):
        if not trio.lowlevel.current_statistics().tasks_runnable:
            self.left -= 1
            if not self.left:
                self.act()


def test_waiting_for_a_socket_is_no_deadlock():
    """A task that waits for a socket may be woken from outside, so the run goes on until it is."""
    left, right = socket.socketpair()

    async def asks():
        await trio.lowlevel.wait_readable(left)
        return left.recv(1)

    with left, right:
        assert run(asks, instruments=[AfterIdleness(20, lambda: right.send(b"x"))]) == b"x"


def test_waking_a_task_from_an_instrument_is_no_deadlock():
    """A loop that has been given something to run in the last moment is not at its end."""
    scopes = []

    async def waits():
        with trio.CancelScope() as scope:
            scopes.append(scope)
            await trio.sleep_forever()
        return scope.cancelled_caught

    def cancel():
        scopes[0].cancel()

    assert run(waits, instruments=[AfterIdleness(2, cancel)]) is True


def test_finds_an_endless_loop():
    """A program that never ends is stopped after `max_steps` and says so."""

    async def spins():
        while True:  # noqa: ASYNC110  # it is to spin
            await trio.lowlevel.checkpoint()

    with pytest.raises(ScheduleFailure) as caught:
        explore(spins, bounds=Bounds(max_steps=500))
    assert isinstance(caught.value.__cause__, LivelockError)
    assert "not ended after 500 steps" in str(caught.value)
    assert "not shown" in str(caught.value)


def test_a_loop_that_swallows_cancellation_ends():
    """A program that cannot be stopped by cancelling it is broken off, without a word from its remains."""

    async def stubborn():
        while True:
            with contextlib.suppress(trio.Cancelled):
                await trio.sleep(1)

    with pytest.raises(LivelockError):
        run(stubborn, max_steps=100)
    assert run(side_by_side, 2, 2) is None


def test_a_failure_in_a_child_task_keeps_its_group():
    """The cause is what `trio.run` would have raised, and the headline looks into a group of one."""

    async def fails():
        async def child():
            raise LookupError("no such thing\nsecond line")

        async with trio.open_nursery() as nursery:  # noqa: ASYNC112  # for the group that it makes
            nursery.start_soon(child)

    with pytest.raises(ScheduleFailure, match=r"\n  LookupError: no such thing\n") as caught:
        explore(fails)
    assert isinstance(caught.value.__cause__, ExceptionGroup)
    assert caught.value.schedule == []


def test_what_is_not_a_failure_passes_through():
    """KeyboardInterrupt and the like are not the program's verdict: they leave unchanged, with the order as a note."""

    async def interrupted():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt) as caught:
        explore(interrupted)
    assert caught.value.__notes__ == ["order of tasks: schedule=[]"]


def test_a_failing_order_is_made_short():
    """Depth first meets the failure at the end of a run; what is shown is its earliest and shortest form."""

    async def somewhere():
        log = await three_tasks()
        firsts = log[0::3]
        assert "cb" not in "".join(firsts), log

    with pytest.raises(ScheduleFailure) as caught:
        explore(somewhere, search="depth-first")
    assert caught.value.schedule == [2, 0, 1]
    with pytest.raises(AssertionError):
        run(somewhere, schedule=caught.value.schedule)


# --- counting ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("search", SEARCHES)
@pytest.mark.parametrize(
    ("tasks", "checkpoints"), [(1, 3), (2, 0), (2, 1), (2, 4), (3, 0), (3, 1), (3, 2), (4, 0)]
)
def test_counts_every_order_once(tasks, checkpoints, search):
    """K checkpoints make k+1 batches of all tasks, of n! orders each: (n!)^(k+1) runs."""
    seen = explore(side_by_side, tasks, checkpoints, search=search)
    assert math.factorial(tasks) ** (checkpoints + 1) == seen.runs
    assert (tasks - 1) * (checkpoints + 1) == seen.choices
    assert seen.exhaustive
    assert seen.complete
    assert seen.covered_preemptions is None


@pytest.mark.parametrize("search", SEARCHES)
def test_the_orders_are_all_different(search):
    """Three tasks of two steps have 36 logs, and 36 runs see each of them."""
    logs = []

    async def program():
        log = []
        logs.append(log)

        async def worker(name):
            log.append(name)
            await trio.lowlevel.checkpoint()
            log.append(name)

        async with trio.open_nursery() as nursery:
            for name in "abc":
                nursery.start_soon(worker, name)

    assert explore(program, search=search).runs == 36
    assert len({"".join(log) for log in logs}) == 36


def test_spawned_tasks_and_deadlines_are_choices():
    """Tasks woken by one deadline, and tasks spawned by them, are ordered too: 2 (start) * 2 (wake) * 2 (children)."""

    async def program():
        async def parent(nursery):
            await trio.sleep(5)
            nursery.start_soon(trio.lowlevel.checkpoint)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(parent, nursery)
            nursery.start_soon(parent, nursery)

    # the children have two steps: one more batch of two
    assert explore(program).runs == 2 * 2 * 2 * 2


def test_run_sync_soon_is_explored():
    """A callback enqueued in the program's first step is seen before and after what runs next."""
    seen = set()

    async def program():
        log = []
        trio.lowlevel.current_trio_token().run_sync_soon(log.append, "callback")
        await trio.lowlevel.checkpoint()
        log.append("program")
        await trio.testing.wait_all_tasks_blocked()
        seen.add(tuple(log))

    assert explore(program).exhaustive
    assert {("callback", "program"), ("program", "callback")} == seen


def test_memory_streams_and_channels():
    """A conversation over memory streams and channels is explored to the end, and every order gives the same answer."""

    async def program():
        left, right = trio.testing.memory_stream_pair()
        send, receive = trio.open_memory_channel(1)

        async def pump():
            async with send:
                async for data in right:
                    await send.send(data)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(pump)
            await left.send_all(b"one")
            await left.aclose()
            got = b"".join([part async for part in receive])
        assert got == b"one"

    assert explore(program).exhaustive


# --- bounds -----------------------------------------------------------------------------------------------------------


def test_bound_on_runs():
    """No more runs than asked for; exactly as many as there are is not cut short."""
    seen = explore(side_by_side, 2, 3, bounds=Bounds(max_runs=15))
    assert (15, {"runs"}, False) == (seen.runs, seen.hit, seen.complete)
    assert seen.covered_preemptions == 3
    assert "cut short by the bound on runs; all with up to 3 deviations" in str(seen)
    assert explore(side_by_side, 2, 3, bounds=Bounds(max_runs=16)).exhaustive


def test_bound_on_seconds():
    """The time limit stops the exploration in the middle of a run that would not end."""

    async def spins():
        while True:  # noqa: ASYNC110  # it is to spin
            await trio.lowlevel.checkpoint()

    seen = explore(spins, bounds=Bounds(max_seconds=0.02, max_steps=10**9))
    assert (0, {"seconds"}, False) == (seen.runs, seen.hit, seen.complete)
    assert seen.covered_preemptions is None


def test_bound_on_branches():
    """Only the first choices of a run are varied: 3 of 5 leave 2^3 orders."""
    seen = explore(side_by_side, 2, 4, bounds=Bounds(max_branches=3))
    assert (8, 5, {"branches"}) == (seen.runs, seen.choices, seen.hit)
    assert not seen.complete


@pytest.mark.parametrize("search", SEARCHES)
@pytest.mark.parametrize("most", [0, 1, 2, 3, 6])
def test_bound_on_preemptions(search, most):
    """With at most d of 6 choices between two deviating there are sum(C(6, i) for i <= d) orders."""
    seen = explore(side_by_side, 2, 5, search=search, bounds=Bounds(max_preemptions=most))
    assert sum(math.comb(6, count) for count in range(most + 1)) == seen.runs
    assert seen.complete
    if most < 6:
        assert {"preemptions"} == seen.hit
        assert most == seen.covered_preemptions
    else:
        assert seen.exhaustive


def test_the_first_failure_has_the_fewest_deviations():
    """Fewest-first finds a failure of one deviation before any run of two, whatever comes first in the tree."""

    async def program():
        log = []

        async def worker(name):
            for _ in range(3):
                log.append(name)
                await trio.lowlevel.checkpoint()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(worker, "a")
            nursery.start_soon(worker, "b")
        assert "".join(log) not in {"baba" + "ab", "abab" + "ba"}

    with pytest.raises(ScheduleFailure) as caught:
        explore(program)
    assert caught.value.schedule == [0, 0, 1]
    assert caught.value.runs <= 1 + 4


@pytest.mark.parametrize(
    "wrong",
    [
        {"max_runs": 0},
        {"max_seconds": 0},
        {"max_branches": None},
        {"max_preemptions": -1},
        {"max_steps": 1.5},
    ],
)
def test_a_bad_bound_is_named(wrong):
    """A bound that makes no sense raises ConfigurationError with its name."""
    (name,) = wrong
    with pytest.raises(ConfigurationError, match=name):
        Bounds(**wrong)


# --- replaying --------------------------------------------------------------------------------------------------------


def test_a_replay_fails_identically():
    """Replaying runs the same steps in the same places to the same exception, each time."""
    with pytest.raises(ScheduleFailure) as caught:
        explore(third_first)
    notes = []
    for _ in range(3):
        with pytest.raises(AssertionError) as again:
            run(third_first, schedule=caught.value.schedule)
        notes.append(again.value.__notes__)
        assert str(caught.value.__cause__) == str(again.value)
    assert notes[0] == notes[1] == notes[2]
    (note,) = notes[0]
    assert note.startswith(f"order of tasks: schedule={caught.value.schedule}\n")
    assert str(caught.value).endswith(note.partition("\n")[2])


def test_run_returns_the_result():
    """A program that passes gives back what it returned, in the default order or any other."""

    async def log(names):
        seen = []

        async def worker(name):
            seen.append(name)

        async with trio.open_nursery() as nursery:
            for name in names:
                nursery.start_soon(worker, name)
        return "".join(seen)

    assert run(log, "abc") == "abc"
    assert run(log, "abc", schedule=[1]) == "bac"
    assert run(log, "abc", schedule=[2, 1]) == "cba"


@pytest.mark.parametrize("schedule", [[2], [0, 0, 0, 1]])
def test_a_schedule_that_does_not_fit_is_refused(schedule):
    """A choice that is not there, and choices left over, mean that the program is not the one of the schedule."""
    with pytest.raises(NondeterminismError):
        run(side_by_side, 2, 1, schedule=schedule)


def test_an_impossible_choice_is_refused():
    """A negative choice is the caller's error, and so is one out of range from a callable."""
    with pytest.raises(ConfigurationError, match="schedule"):
        run(side_by_side, 2, 1, schedule=[-1])
    with pytest.raises(ConfigurationError, match="choice"):
        run_drawn(side_by_side, 2, 1, draw=lambda width: width)


def test_state_left_over_is_found():
    """A program that spawns more tasks each time it is run is not explored but reported, with what to do."""
    runs = []

    async def program():
        runs.append(None)
        await side_by_side(len(runs) + 1, 1)

    with pytest.raises(
        NondeterminismError, match="choice 0 was between 2 tasks, and in the same order is between 3"
    ):
        explore(program)


def test_a_run_that_ends_early_is_found():
    """A run that has fewer choices than the order it follows is reported too."""
    runs = []

    async def program():
        runs.append(None)
        await side_by_side(2, 3 if len(runs) == 1 else 0)

    with pytest.raises(NondeterminismError, match="ended after 1 in the same order"):
        explore(program, search="depth-first")


def test_a_failure_that_does_not_come_again_is_found():
    """A failure that has nothing to do with the order is not passed off as one that replays."""
    runs = []

    async def program():
        runs.append(None)
        await side_by_side(2, 1)
        assert len(runs) != 3

    with pytest.raises(NondeterminismError, match="not in that way when it was replayed"):
        explore(program)


# --- drawing ----------------------------------------------------------------------------------------------------------


def test_hypothesis_finds_and_shrinks():
    """Hypothesis draws the order, finds a race of two deviations and shrinks it to the smallest schedule."""

    @settings(
        max_examples=400,
        deadline=None,
        database=None,
        derandomize=True,
        phases=[Phase.generate, Phase.shrink],
    )
    @given(st.data())
    def race(data):
        run_drawn(third_first, draw=data)

    with pytest.raises(AssertionError) as caught:
        race()
    (note,) = [note for note in caught.value.__notes__ if note.startswith("order of tasks: ")]
    assert note.startswith("order of tasks: schedule=[0, 0, 2, 0, 1]\n")


def test_what_draw_raises_passes_through():
    """The end of hypothesis' patience, or any error of the callable, ends the run cleanly and comes out as it is."""

    class EnoughError(BaseException):
        pass

    def draw(_):
        raise EnoughError

    cleaned = []

    async def program():
        try:
            await side_by_side(2, 2)
        finally:
            cleaned.append(True)

    with pytest.raises(EnoughError):
        run_drawn(program, draw=draw)
    assert cleaned == [True]


def test_a_plain_random_finds_too():
    """Any callable that chooses will do; after `max_draws` choices the default order is followed."""
    drawn = []

    def draw(width):
        drawn.append(width)
        return random.Random(len(drawn)).randrange(width)

    run_drawn(side_by_side, 3, 9, draw=draw, max_draws=5)
    assert drawn == [3, 2, 3, 2, 3]


# --- repeated states --------------------------------------------------------------------------------------------------


async def counting(world, workers, rounds, fails_at=None):
    """Several tasks count together; what has been counted is all they share."""
    world["log"] = log = []
    world["done"] = 0

    async def worker(name):
        for _ in range(rounds):
            await trio.lowlevel.checkpoint()
            log.append(name)
            world["done"] += 1

    async with trio.open_nursery() as nursery:
        for name in range(workers):
            nursery.start_soon(worker, name)
    if fails_at is not None:
        assert log[-2:] != fails_at


@pytest.mark.parametrize("search", SEARCHES)
def test_repeated_states_are_cut_off(search):
    """By hand: 5 other orders in each of 2 batches of three; 3 in the last, whose ended tasks do not differ; and 1."""
    world = {}
    seen = explore(counting, world, 3, 2, state=lambda: world["done"], search=search)
    assert seen.runs == 1 + 2 * 5 + 3
    assert seen.exhaustive
    assert "cut off at a repeated state" in str(seen)
    assert explore(counting, world, 3, 2, search=search).runs == 6**3


@pytest.mark.parametrize("search", SEARCHES)
def test_cutting_off_still_finds_the_failure(search):
    """With a state that tells apart what the failure depends on, it is found, and replays."""
    world = {}
    with pytest.raises(ScheduleFailure) as fewer:
        explore(counting, world, 3, 3, [2, 0], search=search, state=lambda: tuple(world["log"][-2:]))
    with pytest.raises(AssertionError):
        run(counting, world, 3, 3, [2, 0], schedule=fewer.value.schedule)


@pytest.mark.parametrize("search", SEARCHES)
@pytest.mark.parametrize("most", [1, 2, 3])
def test_cutting_off_loses_nothing_under_a_bound(search, most):
    """With a bound on deviations the same final states are reached with and without cutting off."""
    reached = {True: set(), False: set()}
    for cutting in (True, False):
        world = {}

        async def program(world=world, cutting=cutting):
            await counting(world, 3, 2)
            await note(reached[cutting], tuple(world["log"]))

        explore(
            program,
            search=search,
            bounds=Bounds(max_preemptions=most),
            state=(lambda world=world: tuple(world["log"])) if cutting else None,
        )
    assert reached[False] == reached[True]


def test_what_is_on_its_way_tells_states_apart():
    """Two orders that differ only in a value on its way to a waiting task are not taken for one state."""
    got = set()
    world = {}

    async def program():
        send, receive = trio.open_memory_channel(0)
        taken = world["taken"] = []

        async def taking():
            taken.append(await receive.receive())

        async def giving(value):
            await trio.lowlevel.checkpoint()
            with contextlib.suppress(trio.WouldBlock):
                send.send_nowait(value)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(taking)
            nursery.start_soon(giving, "x", name="giving")
            nursery.start_soon(giving, "y", name="giving")
            nursery.start_soon(side_by_side, 2, 3)
        await note(got, taken[0])

    explore(program, state=lambda: tuple(world["taken"]))
    assert {"x", "y"} == got


def test_the_order_of_waiting_tells_states_apart():
    """Two orders that differ only in who waits first in line for a lock are not taken for one state."""
    first = set()
    world = {}

    async def program():
        lock = trio.Lock()
        log = world["log"] = []

        async def waiting(name):
            async with lock:
                log.append(name)

        async with trio.open_nursery() as nursery, lock:
            nursery.start_soon(waiting, 1, name="one")
            nursery.start_soon(waiting, 2, name="two")
            await side_by_side(2, 2)
        await note(first, log[0])

    explore(program, state=lambda: tuple(world["log"]))
    assert first == {1, 2}


def test_the_batch_of_a_task_tells_states_apart():
    """Two orders that differ only in whether a woken task runs in this batch or in the next are not taken for one state."""
    seen = set()
    world = {}

    async def program():
        event = trio.Event()
        log = world["log"] = []
        world["flag"] = False

        async def waking():
            await trio.lowlevel.checkpoint()
            if world["flag"]:
                event.set()
            await trio.lowlevel.checkpoint()
            log.append("waking")
            event.set()

        async def allowing():
            await trio.lowlevel.checkpoint()
            world["flag"] = True

        async def woken():
            await event.wait()
            log.append("woken")

        async def bystander():
            await trio.lowlevel.checkpoint()
            await trio.lowlevel.checkpoint()
            log.append("bystander")

        async with trio.open_nursery() as nursery:
            for task in (waking, allowing, woken, bystander, bystander):
                nursery.start_soon(task)
        await note(seen, tuple(log))

    explore(program, state=lambda: (tuple(world["log"]), world["flag"]))
    assert ("waking", "woken", "bystander", "bystander") in seen


def test_deadlines_tell_states_apart():
    """Two orders that differ only in the deadline that a cancel scope was given last are not taken for one state."""
    ends = set()

    async def program():
        scope = trio.CancelScope()

        async def setting(deadline):
            await trio.lowlevel.checkpoint()
            scope.deadline = deadline
            await trio.lowlevel.checkpoint()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(setting, 1)
            nursery.start_soon(setting, 2)
            with scope:
                await trio.sleep_forever()
            end = trio.current_time()
        await note(ends, end)

    explore(program, state=lambda: None)
    assert ends == {1, 2}


def test_a_state_reached_again_with_fewer_deviations_is_explored_again():
    """Depth first reaches a state by two deviations, then by one: with a bound of two, only then can it go on."""
    world = {}
    seen = set()

    async def program():
        world["score"] = 0
        firsts = world["firsts"] = [None] * 4

        async def worker(name):
            for batch, worth in enumerate((2, 1, 1, 0)):
                if firsts[batch] is None:
                    firsts[batch] = name
                    if name == "late":
                        world["score"] = min(2, world["score"] + worth)
                await trio.lowlevel.checkpoint()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(worker, "early")
            nursery.start_soon(worker, "late")
        await note(seen, (world["score"], firsts[3]))

    explore(
        program,
        search="depth-first",
        bounds=Bounds(max_preemptions=2),
        state=lambda: (world["score"], world["firsts"][3]),
    )
    assert (2, "late") in seen


OPERATIONS = [
    "yield",
    "sleep",
    "set",
    "wait",
    "lock",
    "unlock",
    "send",
    "receive",
    "raise flag",
    "if flag",
    "log",
    "log",
]


@settings(max_examples=50, deadline=None, database=None, derandomize=True, phases=[Phase.generate])
@given(
    st.lists(st.lists(st.sampled_from(OPERATIONS), min_size=2, max_size=6), min_size=2, max_size=3),
    st.sampled_from(SEARCHES),
    st.integers(1, 2),
)
def test_cutting_off_loses_no_outcome_of_any_program(scripts, search, most):
    """Of small programs made at random, the same outcomes are seen with and without cutting off, under a bound."""
    outcomes = {True: set(), False: set()}
    world = {}

    async def program(cutting):
        event, lock = trio.Event(), trio.Lock()
        send, receive = trio.open_memory_channel(0)
        log = world["log"] = []
        world["flag"] = False

        async def actor(name, script):
            for operation in script:
                match operation:
                    case "yield":
                        await trio.lowlevel.checkpoint()
                    case "sleep":
                        await trio.sleep(1)
                    case "set":
                        event.set()
                    case "wait":
                        await event.wait()
                    case "lock" if lock.statistics().owner is not trio.lowlevel.current_task():
                        await lock.acquire()
                    case "unlock" if lock.statistics().owner is trio.lowlevel.current_task():
                        lock.release()
                    case "send":
                        await send.send(name)
                    case "receive":
                        log.append((name, await receive.receive()))
                    case "raise flag":
                        world["flag"] = True
                    case "if flag" if world["flag"]:
                        await trio.lowlevel.checkpoint()
                    case "log":
                        log.append(name)
            if lock.statistics().owner is trio.lowlevel.current_task():
                lock.release()

        with trio.move_on_after(10):
            async with trio.open_nursery() as nursery:
                for name, script in enumerate(scripts):
                    nursery.start_soon(actor, name, script, name=f"actor {name}")
        await note(outcomes[cutting], tuple(log))

    async def cut():
        await program(True)

    async def whole():
        await program(False)

    bounds = Bounds(max_preemptions=most)
    every = explore(whole, search=search, bounds=bounds)
    fewer = explore(cut, search=search, bounds=bounds, state=lambda: (tuple(world["log"]), world["flag"]))
    assert fewer.runs <= every.runs
    assert outcomes[True] == outcomes[False]


def test_an_error_in_state_comes_out():
    """A `state` that raises is the caller's error: it stops the exploration and comes out as it is."""
    with pytest.raises(ZeroDivisionError):
        explore(side_by_side, 2, 1, state=lambda: 1 // 0)
