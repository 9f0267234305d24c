"""A supervisor driven step by step against a model, in a scheduling order that hypothesis draws.

Trio runs in a thread of its own and stands still between two steps, so each rule sees a settled supervisor; within a step
one or more operations start in the same instant and run in the drawn order. The model knows what may have come of them:
after a single operation exactly one ending, after several at once one of theirs; and what has ended never changes.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Awaitable, Callable
from typing import Any

import attrs
import pytest
import trio
import trio.testing
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from supervisor import (
    AdmissionError,
    Deadlines,
    KeyConflictError,
    Limits,
    MemoryPolicy,
    OnDetach,
    Outcome,
    Stream,
    open_supervisor,
)
from supervisor.stores import Event
from supervisor.testing.schedule import run_drawn

from .laws import MomentaryStore, iter_ids

MAX_LIVE = 4
GRACE_S = 50.0
TOTAL_S = 1000.0
Ending = tuple[str, str]
Operation = Callable[[], Awaitable[None]]


@attrs.define(eq=False)
class Model:
    """What the model knows of one stream."""

    stream: Stream
    told: trio.Event
    how: list[str]
    key: str | None
    started: float
    cancel_on_detach: bool
    readers: list[tuple[Any, list[Event]]] = attrs.field(factory=list)
    unread_since: float = 0.0
    wire_open: bool = False
    ended: Outcome | None = None


class SupervisorMachine(RuleBasedStateMachine):
    """Rules are what callers do; invariants are the laws."""

    @initialize(order=st.lists(st.integers(0, 5), max_size=120))
    def open(self, order: list[int]) -> None:
        self.now = 0.0
        self.models: list[Model] = []
        self.tombstones: set[str] = set()
        self.expected: dict[int, set[Ending]] = {}
        self.errors: list[BaseException] = []
        choices = iter(order)
        self._todo: queue.Queue[list[Operation] | None] = queue.Queue()
        self._done: queue.Queue[BaseException | None] = queue.Queue()
        self.clock = trio.testing.MockClock()

        def pick(width: int) -> int:
            return next(choices, 0) % width

        def run() -> None:
            try:
                run_drawn(self._main, draw=pick, clock=lambda: self.clock)
            except BaseException as error:  # noqa: ASYNC103, BLE001  # handed to the test's thread
                self._done.put(error)
            else:
                self._done.put(None)

        self._thread = threading.Thread(target=run)
        self._thread.start()
        self._settle()

    async def _main(self) -> None:
        self.store = MomentaryStore()
        async with (
            open_supervisor(
                store=self.store,
                limits=Limits(max_live=MAX_LIVE, tombstone_s=1e6),
                memory=MemoryPolicy(sweep_every_s=1e9, max_age_s=600.0),
                deadlines=Deadlines(first_event_s=None, idle_s=None, total_s=TOTAL_S),
                new_id=iter_ids(),
            ) as self.sup,
            trio.open_nursery() as nursery,
        ):
            while True:
                await trio.testing.wait_all_tasks_blocked()
                self._done.put(None)
                operations = self._todo.get()  # trio stands still here until the next step
                if operations is None:
                    await self.sup.shutdown()
                    break
                for operation in operations:
                    nursery.start_soon(operation)

    def _settle(self) -> None:
        error = self._done.get(timeout=30)
        if error is not None:
            raise error

    def _together(self, *operations: Operation) -> None:
        self._todo.put(list(operations))
        self._settle()

    # --- operations --------------------------------------------------------------------------------------------------

    def _source(
        self, told: trio.Event, how: list[str], state: list[Model]
    ) -> Callable[[Any], Awaitable[None]]:
        async def source(out: Any) -> None:
            state[0].wire_open = True
            try:
                out.send_nowait("x")
                await told.wait()
                if how[0] == "complete":
                    out.complete("stop")
                elif how[0] == "raise":
                    raise OSError("reset")
                await trio.sleep_forever()
            finally:
                state[0].wire_open = False

        return source

    def _start(self, key: str | None, on_conflict: str, *, cancel_on_detach: bool) -> Operation:
        async def operation() -> None:
            holder = self._holder(key)
            live = len(self._live())
            told, how, state = trio.Event(), [], []
            on_detach = OnDetach(mode="cancel" if cancel_on_detach else "keep", grace_s=GRACE_S)
            try:
                started = self.sup.start_nowait(
                    self._source(told, how, state), key=key, on_conflict=on_conflict, on_detach=on_detach
                )
            except KeyConflictError:
                assert holder is not None
                assert on_conflict == "reject"
                return
            except AdmissionError:
                assert live - (holder is not None and holder.ended is None) >= MAX_LIVE
                return
            if not started.created:
                assert holder is not None
                assert started.stream is holder.stream
                return
            model = Model(started.stream, told, how, key, self.now, cancel_on_detach, unread_since=self.now)
            state.append(model)
            self.models.append(model)
            if holder is not None and holder.ended is None:
                self._expect(holder, ("cancelled", "replaced"))
            if key in self.tombstones:
                self.tombstones.discard(key)
                self._expect(model, ("cancelled", "requested"))

        return operation

    def _tell(self, model: Model, how: str) -> Operation:
        async def operation() -> None:
            if not model.how:
                model.how.append(how)
                model.told.set()
                ending = ("completed", "stop") if how == "complete" else ("failed", "source_error")
                self._expect(model, ending)

        return operation

    def _cancel(self, model: Model, *, by_key: bool) -> Operation:
        async def operation() -> None:
            target = self._holder(model.key) if by_key and model.key is not None else model
            assert target is not None
            self._expect(target, ("cancelled", "requested"))
            if by_key and model.key is not None:
                (result,) = await self.sup.cancel(key=model.key)
            else:
                (result,) = await self.sup.cancel(model.stream.id)
            outcome = target.stream.outcome
            assert outcome is not None
            assert (result.state, result.reason) == (outcome.state, outcome.reason)
            if result.outcome == "won":
                assert outcome.reason == "requested"

        return operation

    def _cancel_key(self, key: str) -> Operation:
        async def operation() -> None:
            holder = self._holder(key)
            if holder is None:
                self.tombstones.add(key)
            else:
                self._expect(holder, ("cancelled", "requested"))
            (result,) = await self.sup.cancel(key=key)
            assert (result.outcome == "tombstoned") == (holder is None)

        return operation

    def _attach(self, model: Model) -> Operation:
        async def operation() -> None:
            got: list[Event] = []
            subscription = model.stream.subscribe()
            model.readers.append((subscription, got))
            with subscription:
                async for event in subscription:
                    if event.kind == "outcome":
                        assert self.store.durable_outcomes[model.stream.id] == event.payload
                    got.append(event)

        return operation

    # --- the model ---------------------------------------------------------------------------------------------------

    def _holder(self, key: str | None) -> Model | None:
        if key is None:
            return None
        return next((model for model in reversed(self.models) if model.key == key), None)

    def _live(self) -> list[Model]:
        return [model for model in self.models if not model.stream.sealed]

    def _expect(self, model: Model, ending: Ending) -> None:
        if model.ended is None:
            self.expected.setdefault(self.models.index(model), set()).add(ending)

    # --- rules -------------------------------------------------------------------------------------------------------

    @rule(
        key=st.sampled_from([None, "a", "b"]),
        on_conflict=st.sampled_from(["attach", "reject", "replace"]),
        cancel_on_detach=st.booleans(),
    )
    def start(self, key: str | None, on_conflict: str, cancel_on_detach: bool) -> None:
        self._together(self._start(key, on_conflict, cancel_on_detach=cancel_on_detach))

    @precondition(lambda self: self.models)
    @rule(data=st.data())
    def at_once(self, data: st.DataObject) -> None:
        """One or more operations on one stream in the same instant."""
        model = data.draw(st.sampled_from(self.models), "stream")
        operations = []
        for kind in data.draw(st.lists(st.sampled_from(range(6)), min_size=1, max_size=4), "operations"):
            if kind == 0:
                operations.append(self._tell(model, "complete"))
            elif kind == 1:
                operations.append(self._tell(model, "raise"))
            elif kind == 2:
                operations.append(self._cancel(model, by_key=False))
            elif kind == 3:
                operations.append(self._cancel(model, by_key=True))
            elif kind == 4:
                operations.append(self._attach(model))
            else:
                operations.append(self._start(model.key, "replace", cancel_on_detach=False))
        self._together(*operations)

    @rule(key=st.sampled_from(["a", "b", "c"]))
    def stop_key(self, key: str) -> None:
        self._together(self._cancel_key(key))

    @precondition(lambda self: any(model.readers for model in self.models))
    @rule(data=st.data())
    def detach(self, data: st.DataObject) -> None:
        model = data.draw(st.sampled_from([model for model in self.models if model.readers]))
        subscription, _ = model.readers[-1]

        async def operation() -> None:
            subscription.close()

        if not subscription.at_end:
            model.readers.pop()
        if not model.readers:
            model.unread_since = self.now
        self._together(operation)

    @rule(seconds=st.sampled_from([1.0, 30.0, 60.0, 700.0]))
    def pass_time(self, seconds: float) -> None:
        self.now += seconds
        for model in self._live():
            if self.now - model.started >= TOTAL_S:
                self._expect(model, ("expired", "total"))
            if model.cancel_on_detach and not model.readers and self.now - model.unread_since >= GRACE_S:
                self._expect(model, ("cancelled", "detached"))
        self.clock.jump(seconds)
        self._together()

    @rule()
    def reap(self) -> None:
        async def operation() -> None:
            old = [model for model in self._live() if self.now - model.started >= 600.0]
            for model in old:
                self._expect(model, ("expired", "reaped_age"))
            said = await self.sup.reap(dry_run=True)
            assert {entry.id for entry in said.reaped} == {model.stream.id for model in old}
            await self.sup.reap()

        self._together(operation)

    # --- the laws ----------------------------------------------------------------------------------------------------

    @invariant()
    def laws_hold(self) -> None:
        if not hasattr(self, "sup"):
            return
        for number, model in enumerate(self.models):
            outcome = model.stream.outcome
            allowed = self.expected.pop(number, set())
            if model.ended is not None:
                assert outcome == model.ended, "law 1: the ending changed"
                continue
            if outcome is None:
                assert not allowed, f"it should have ended as one of {allowed}"
                assert not model.stream.sealed, "sealed, and nobody is told"
                continue
            assert (outcome.state.value, outcome.reason) in allowed, f"not one of {allowed}"
            assert self.store.durable_outcomes[model.stream.id] == outcome.to_json(), "law 3"
            assert not model.wire_open, "law 4"
            model.ended = outcome
        for model in self.models:
            for _, got in model.readers:
                assert [event.seq for event in got] == list(range(1, len(got) + 1)), "law 5"
                if model.ended is not None:
                    assert got[-1].payload == model.ended.to_json(), "law 1: two truths"
        statistics = self.sup.statistics()
        assert statistics.live == len(self._live()) <= MAX_LIVE, "law 7"
        assert statistics.settling == 0
        assert statistics.tombstones == len(self.tombstones)
        ended: dict[str, dict[str, int]] = {}
        for model in self.models:
            if model.ended is not None:
                reasons = ended.setdefault(model.ended.state.value, {})
                reasons[model.ended.reason] = reasons.get(model.ended.reason, 0) + 1
        assert statistics.ended == ended, "a metric tells another story"

    def teardown(self) -> None:
        if hasattr(self, "_thread"):
            if self._thread.is_alive():
                self._todo.put(None)
                self._settle()
            self._thread.join(timeout=30)
            assert not self._thread.is_alive()


TestSupervisor = SupervisorMachine.TestCase
TestSupervisor.settings = settings(max_examples=150, stateful_step_count=25, deadline=None)
pytestmark = pytest.mark.slow
