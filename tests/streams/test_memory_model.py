"""The memory manager against a model of it: who goes, in which order and why, and that no limit is exceeded by more than its slack.

The model says in lists and sums what the manager does with orders kept as streams come and go. Time is virtual.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Awaitable, Callable
from typing import Any
from unittest import mock

import attrs
import trio
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from supervisor import (
    AdmissionError,
    Deadlines,
    Limits,
    MemoryGroup,
    MemoryPolicy,
    Output,
    Stream,
    open_supervisor,
)
from supervisor.dialects import Delta
from supervisor.streams.pools import HEAVY_BYTES

COUNTS = ["reject", "reap_oldest", "reap_least_watched"]
ACTIONS = ["spill", *COUNTS]
SIZES = [100, 3_000, 9_000, 30_000]
EVENT, CHOICE, SHORT = 160, 512, 4 << 10


@attrs.define(eq=False)
class Live:
    """What the model knows of one stream."""

    number: int
    stream: Stream
    out: list[Output]
    tenant: str
    started: float
    last: float
    tail: int = 0
    fold: int = 0
    note_at: float = HEAVY_BYTES
    readers: list[Any] = attrs.field(factory=list)

    @property
    def held(self) -> int:
        return self.tail + self.fold

    @property
    def spillable(self) -> int:
        text = max(0, self.fold - CHOICE)
        return self.tail + (text if text > SHORT else 0)


class MemoryMachine(RuleBasedStateMachine):
    """Rules are what programs and upstreams do."""

    @initialize(
        max_live=st.integers(2, 5),
        when_full=st.sampled_from(COUNTS),
        max_bytes=st.sampled_from([40_000, 120_000]),
        at_max_bytes=st.sampled_from(ACTIONS),
        group=st.builds(
            MemoryGroup,
            tenant=st.sampled_from(["*", "a"]),
            max_count=st.integers(1, 3),
            at_max_count=st.sampled_from(COUNTS),
            max_bytes=st.sampled_from([None, 30_000, 70_000]),
            at_max_bytes=st.sampled_from(ACTIONS),
        ),
    )
    def open(self, **options: Any) -> None:
        self.group: MemoryGroup = options.pop("group")
        self.limits = Limits(
            max_live=options.pop("max_live"), when_full=options.pop("when_full"), tail_bytes=1 << 30
        )
        self.policy = MemoryPolicy(
            max_age_s=100,
            stale_s=30,
            max_stream_bytes=50_000,
            groups=(self.group,),
            process_high=None,
            sweep_every_s=1e9,
            **options,
        )
        self.now = 0.0
        self.live: list[Live] = []
        self.heavy: list[Live] = []
        self.numbers = 0
        self.expected: list[tuple[str, str]] = []
        self.did: list[tuple[str, str]] = []
        self._todo: queue.Queue[Callable[[], Awaitable[None]] | None] = queue.Queue()
        self._done: queue.Queue[BaseException | None] = queue.Queue()
        self.clock = trio.testing.MockClock()
        reaped, spill, did = Stream.reaped, Stream.spill, self.did

        def noted(stream: Stream, reason: str, message: str) -> bool:
            assert message.partition(":")[0]
            did.append((stream.id, reason))
            return reaped(stream, reason, message)

        def spilled(stream: Stream) -> None:
            did.append((stream.id, "spilled"))
            spill(stream)

        self._patch = mock.patch.multiple(Stream, reaped=noted, spill=spilled)
        self._patch.start()
        self._thread = threading.Thread(target=self._run)
        self._thread.start()
        self._settle()

    def _run(self) -> None:
        try:
            trio.run(self._main, clock=self.clock)
        except BaseException as error:  # noqa: ASYNC103, BLE001  # handed to the test's thread
            self._done.put(error)
        else:
            self._done.put(None)

    async def _main(self) -> None:
        deadlines = Deadlines(first_event_s=None, idle_s=None, total_s=None)
        async with open_supervisor(limits=self.limits, memory=self.policy, deadlines=deadlines) as self.sup:
            while True:
                await trio.testing.wait_all_tasks_blocked()
                self._done.put(None)
                operation = self._todo.get()  # trio stands still here until the next step
                if operation is None:
                    await self.sup.shutdown()
                    return
                await operation()

    def _settle(self) -> None:
        error = self._done.get(timeout=30)
        if error is not None:
            raise error

    def _do(self, operation: Callable[[], Awaitable[None]]) -> None:
        self._todo.put(operation)
        self._settle()

    def teardown(self) -> None:
        if hasattr(self, "_thread"):
            if self._thread.is_alive():
                self._todo.put(None)
            self._thread.join(30)
            self._patch.stop()

    # --- the model ---------------------------------------------------------------------------------------------------

    def _grouped(self, tenant: str) -> bool:
        return self.group.tenant in ("*", tenant)

    def _members(self, tenant: str | None) -> list[Live]:
        return [one for one in self.live if tenant is None or one.tenant == tenant]

    def _first(self, members: list[Live], action: str) -> Live:
        if action == "reap_least_watched":
            return min(members, key=lambda one: (len(one.readers), one.number))
        return members[0]

    def _gone(self, one: Live, reason: str) -> None:
        self.live.remove(one)
        if one in self.heavy:
            self.heavy.remove(one)
        self.expected.append((one.stream.id, reason))

    def _spill(self, one: Live) -> None:
        self.expected.append((one.stream.id, "spilled"))
        one.fold -= one.spillable - one.tail
        one.tail = 0
        if one in self.heavy:
            self.heavy.remove(one)
        one.note_at = max(HEAVY_BYTES, 2 * one.held)

    def _pools(self) -> list[tuple[str | None, int | None, str]]:
        tenants = sorted({one.tenant for one in self.live if self._grouped(one.tenant)})
        groups = [(name, self.group.max_bytes, self.group.at_max_bytes) for name in tenants]
        return [*groups, (None, self.policy.max_bytes, self.policy.at_max_bytes)]

    def _over(self, tenant: str | None, limit: int | None, action: str) -> bool:
        held = sum(one.held for one in self._members(tenant))
        return limit is not None and action != "reject" and held > limit

    def _sweep(self) -> None:
        for one in list(self.live):
            if self.now - one.started >= 100:
                self._gone(one, "reaped_age")
        for one in sorted(self.live, key=lambda one: (one.last, one.number)):
            if self.now - one.last >= 30:
                self._gone(one, "reaped_stale")
        for one in list(self.live):
            if one.held > 50_000:
                self._spill(one)
        for tenant, limit, action in self._pools():
            if action == "spill":
                for one in [one for one in self.heavy if one in self._members(tenant) and one.spillable]:
                    if self._over(tenant, limit, action):
                        self._spill(one)
            while self._over(tenant, limit, action):
                self._gone(self._first(self._members(tenant), action), "reaped_bytes")

    def _sweep_if_over(self) -> None:
        if any(self._over(*pool) for pool in self._pools()) or any(one.held > 50_000 for one in self.live):
            self._sweep()

    def _room(self, tenant: str) -> list[Live] | None:
        """Return who makes room for one more; None if it is to be refused."""
        leaving: list[Live] = []
        bounds: list[tuple[str | None, int | None, str, int | None, str]] = [
            (
                None,
                self.limits.max_live,
                self.limits.when_full,
                self.policy.max_bytes,
                self.policy.at_max_bytes,
            )
        ]
        if self._grouped(tenant):
            group = self.group
            bounds.insert(
                0, (tenant, group.max_count, group.at_max_count, group.max_bytes, group.at_max_bytes)
            )
        for name, count, at_count, nbytes, at_bytes in bounds:
            members = [one for one in self._members(name) if one not in leaving]
            held = sum(one.held for one in members)
            if name is None:
                held += self.sup.memory.finished.bytes_held
            if at_bytes == "reject" and nbytes is not None and held >= nbytes:
                return None
            if count is not None and len(members) >= count:
                if at_count == "reject":
                    return None
                leaving.append(self._first(members, at_count))
        return leaving

    # --- the rules ---------------------------------------------------------------------------------------------------

    @rule(tenant=st.sampled_from(["a", "a", "b"]))
    def start(self, tenant: str) -> None:
        out: list[Output] = []

        async def source(given: Output) -> None:
            out.append(given)
            await trio.sleep_forever()

        async def operation() -> None:
            leaving = self._room(tenant)
            try:
                stream = self.sup.start_nowait(source, tenant=tenant).stream
            except AdmissionError:
                assert leaving is None
                return
            assert leaving is not None
            for one in leaving:
                self._gone(one, "reaped_count")
            self.numbers += 1
            self.live.append(Live(self.numbers, stream, out, tenant, self.now, self.now))

        self._do(operation)

    @precondition(lambda self: self.live)
    @rule(which=st.integers(0, 9), size=st.sampled_from(SIZES), text=st.booleans())
    def feed(self, which: int, size: int, *, text: bool) -> None:
        one = self.live[which % len(self.live)]

        async def operation() -> None:
            words = "x" * size if text else ""
            before = self.sup.memory.live.nbytes
            one.out[0].append(b"p" * size, "", (Delta(text=words),))
            one.out[0].flush()
            one.last = self.now
            one.tail += size + len(words) + EVENT
            if words:
                one.fold += len(words) + (0 if one.fold else CHOICE)
            change = self.sup.memory.live.nbytes - before
            assert change <= size + 2 * len(words) + EVENT + CHOICE, "exceeded by more than what was read"
            if one.held > one.note_at:
                one.note_at = 50_000
                if one not in self.heavy:
                    self.heavy.append(one)
            self._sweep_if_over()

        self._do(operation)

    @precondition(lambda self: self.live)
    @rule(which=st.integers(0, 9), more=st.booleans())
    def read(self, which: int, *, more: bool) -> None:
        one = self.live[which % len(self.live)]

        async def operation() -> None:
            if more:
                one.readers.append(one.stream.subscribe().__enter__())
            elif one.readers:
                one.readers.pop().close()

        self._do(operation)

    @precondition(lambda self: self.live)
    @rule(which=st.integers(0, 9))
    def end(self, which: int) -> None:
        one = self.live[which % len(self.live)]

        async def operation() -> None:
            one.out[0].complete("stop")
            self.live.remove(one)
            if one in self.heavy:
                self.heavy.remove(one)

        self._do(operation)

    @rule(seconds=st.sampled_from([1.0, 10.0, 25.0]))
    def pass_time(self, seconds: float) -> None:
        self.now += seconds
        before = len(self.expected)

        async def operation() -> None:
            would = await self.sup.reap(dry_run=True)
            assert self.did == self.expected[:before], "a dry run does nothing"
            report = await self.sup.reap()
            assert [(e.id, e.reason, e.message) for e in (*would.spilled, *would.reaped)] == [
                (e.id, e.reason, e.message) for e in (*report.spilled, *report.reaped)
            ]
            self._sweep()

        self.clock.jump(seconds)
        self._do(operation)

    # --- what holds --------------------------------------------------------------------------------------------------

    @invariant()
    def they_agree(self) -> None:
        if not hasattr(self, "sup"):
            return
        assert self.did == self.expected, "who, in which order, and why"
        assert [one.stream.id for one in self.live] == list(self.sup.memory.live.streams)
        assert [one.stream.bytes_held for one in self.live] == [one.held for one in self.live]

    @invariant()
    def no_limit_is_exceeded(self) -> None:
        if not hasattr(self, "sup"):
            return
        memory = self.sup.statistics().memory
        assert memory.ending_bytes == 0
        assert memory.bytes_held == sum(one.held for one in self.live)
        assert memory.total_bytes == memory.bytes_held + sum(memory.beside.values())
        assert len(self.live) <= self.limits.max_live
        if self.policy.at_max_bytes != "reject":
            assert memory.total_bytes <= (self.policy.max_bytes or 0)
        for tenant in ("a", "b"):
            members = self._members(tenant)
            told = memory.tenants.get(tenant)
            assert (len(members), sum(one.held for one in members)) == (
                (told.live, told.bytes_held) if told is not None else (0, 0)
            )
            if self._grouped(tenant):
                assert len(members) <= (self.group.max_count or 0)
                if self.group.at_max_bytes != "reject" and self.group.max_bytes is not None:
                    assert sum(one.held for one in members) <= self.group.max_bytes


MemoryMachine.TestCase.settings = settings(
    max_examples=30, stateful_step_count=40, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
test_the_model_and_the_manager_agree = MemoryMachine.TestCase
