"""trio is under control during a run, back as it was after it, and a trio that has changed is noticed."""

from __future__ import annotations

import ast
import inspect
import random
import threading

import pytest
import trio
import trio.testing
from trio._core import _run

from supervisor.testing import ScheduleFailure, TrioChangedError, explore, run, run_drawn, schedule_control
from supervisor.testing.schedule_control import check_trio, short_name


@pytest.fixture
def fresh_check():
    """The check is done anew in this test and in the next."""
    check_trio.cache_clear()
    yield
    check_trio.cache_clear()


@pytest.fixture
def before():
    """What trio's run loop has before the test, to compare with afterwards."""
    return _run._r, _run._ALLOW_DETERMINISTIC_SCHEDULING


async def passes():
    await trio.lowlevel.checkpoint()


async def fails():
    assert isinstance(_run._r, schedule_control._Order)
    raise LookupError


def test_trio_is_as_it_was_after_a_run(before):
    """After success, after failure and after a run that was stopped, trio has its own random numbers again."""
    explore(passes)
    assert before == (_run._r, _run._ALLOW_DETERMINISTIC_SCHEDULING)
    with pytest.raises(ScheduleFailure):
        explore(fails)
    assert before == (_run._r, _run._ALLOW_DETERMINISTIC_SCHEDULING)
    with pytest.raises(LookupError):
        run(fails)
    assert before == (_run._r, _run._ALLOW_DETERMINISTIC_SCHEDULING)
    with pytest.raises(schedule_control.DeadlockError):
        run(trio.sleep_forever)
    assert before == (_run._r, _run._ALLOW_DETERMINISTIC_SCHEDULING)
    assert schedule_control._controls == {}


async def test_refuses_to_run_inside_trio(before):
    """Called where trio is running it says so at once, and changes nothing."""
    with pytest.raises(RuntimeError, match="from inside"):
        run(passes)
    with pytest.raises(RuntimeError, match="from inside"):
        schedule_control.Control(async_fn=passes, args=(), choose=lambda _: 0, max_steps=9).run(clock=None)
    assert before == (_run._r, _run._ALLOW_DETERMINISTIC_SCHEDULING)


async def three_side_by_side():
    async with trio.open_nursery() as nursery:
        for _ in range(3):
            nursery.start_soon(trio.lowlevel.checkpoint)


def test_other_threads_are_left_alone(before):
    """A run in another thread during an exploration gets its own shuffling and ends as ever; two explorers do not mix."""
    asked = set()
    seen = []

    def draw(_):
        asked.add(threading.get_ident())
        return 0

    async def program():
        await trio.to_thread.run_sync(trio.run, three_side_by_side)
        seen.append(await trio.to_thread.run_sync(explore, three_side_by_side))

    run_drawn(program, draw=draw)
    assert asked <= {threading.get_ident()}
    assert seen[0].runs == 6 * 6
    assert before == (_run._r, _run._ALLOW_DETERMINISTIC_SCHEDULING)


def test_the_real_clock_starts_at_the_same_time_each_run():
    """Trio's system clock takes its random start from the same place: it still gets one, the same for each run."""
    starts = []

    async def look():
        starts.append(trio.lowlevel.current_clock().offset)

    for _ in range(3):
        run(look, clock=lambda: None)
    assert starts[0] == starts[1] == starts[2]
    assert 10_000 <= starts[0] <= 200_000


def test_instruments_see_each_run():
    """Instruments of the caller's are part of each run, and the task has the program's name."""

    class Names(trio.abc.Instrument):
        def task_spawned(self, task):
            names.append(task.name)

    names = []
    explore(passes, instruments=[Names()])
    assert [n for n in names if n.endswith("test_schedule_control.passes")]


def test_the_check_passes(fresh_check):
    """With the trio that is installed, a sample program runs in exactly the order asked for."""
    check_trio()


def test_the_check_notices_a_loop_that_does_not_ask(fresh_check, monkeypatch):
    """If trio no longer shuffled with that object, exploring would refuse to start, and say what it saw."""
    monkeypatch.setattr(schedule_control._Order, "shuffle", random.Random.shuffle)
    with pytest.raises(TrioChangedError, match=f"trio {trio.__version__}: a sample program ran as"):
        explore(passes)


def test_the_check_notices_a_missing_name(fresh_check, monkeypatch):
    """If trio's private names were gone, the error would say which."""
    monkeypatch.delattr(_run, "_ALLOW_DETERMINISTIC_SCHEDULING")
    with pytest.raises(TrioChangedError, match="_ALLOW_DETERMINISTIC_SCHEDULING"):
        explore(passes)


def test_the_check_notices_a_copied_batch(fresh_check, monkeypatch):
    """If trio shuffled a copy of what it runs from, later choices would be lost: that is noticed too."""
    monkeypatch.setattr(
        schedule_control._Order, "shuffle", lambda self, x: x.__setitem__(slice(None), _ordered(list(x)))
    )
    with pytest.raises(TrioChangedError):
        explore(passes)


def _ordered(batch):
    schedule_control._controls[threading.get_ident()].shuffle(batch)
    return batch


def test_trio_uses_its_random_numbers_for_nothing_else():
    """In trio's source, `_r` shuffles batches, flips a coin where it does not sort, and starts the system clock."""
    tree = ast.parse(inspect.getsource(_run))
    attributes = {
        node.attr
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "_r"
    }
    assert {"random", "shuffle", "uniform"} == attributes


def test_what_is_read_of_trio_is_there():
    """Each private attribute that `position` and the end of a stubborn run rely on exists in this trio."""
    assert {"_counter", "_next_send", "_next_send_fn", "_cancel_status", "_child_nurseries"} <= {
        field.name for field in trio.lowlevel.Task.__attrs_attrs__
    }
    assert {"_scope", "_parent"} <= {field.name for field in _run.CancelStatus.__attrs_attrs__}

    async def look():
        async with trio.open_nursery() as nursery:
            assert nursery._pending_excs == []
            assert nursery._children == set()
            assert nursery.cancel_scope._cancel_called is False

    run(look)


@pytest.mark.parametrize(
    ("name", "short"),
    [
        ("pkg.module.main", "main"),
        ("tests.t.f.<locals>.worker", "worker"),
        ("stream 7", "stream 7"),
        ("a.b c", "a.b c"),
    ],
)
def test_names_are_short(name, short):
    """A task's dotted name is cut to its last part; a name that somebody gave stays."""
    assert short == short_name(name)
