"""One stream in a race, and the laws it has to keep whatever the order.

The parts are small on purpose, so that every scheduling order can be tried: a source that reads a pretended wire, a store
that takes a moment to make things durable, readers and a waiter that check at each look that nothing is shown too early.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence

import attrs
import trio
import trio.testing

from supervisor import (
    Deadlines,
    Fault,
    Limits,
    MemoryPolicy,
    MemoryStore,
    OnDetach,
    Outcome,
    State,
    Stream,
    Supervisor,
    open_supervisor,
)
from supervisor.stores import Event
from supervisor.streams import TERMINAL_STATES, CancelResult, Subscription

INSTANT = 1.0
"""The moment, in virtual seconds, at which everything happens at once."""


class MomentaryStore(MemoryStore):
    """What is enqueued is durable a moment later, and the store knows what was durable when."""

    def __init__(self) -> None:
        super().__init__()
        self.durable_outcomes: dict[str, bytes] = {}
        self._ends: dict[str, bytes] = {}

    def end(self, stream_id: str, event: Event, *, state: str, ended_at: float) -> None:
        super().end(stream_id, event, state=state, ended_at=ended_at)
        self._ends[stream_id] = event.payload

    async def wait_durable(self, stream_id: str, seq: int) -> None:
        await super().wait_durable(stream_id, seq)
        await trio.lowlevel.checkpoint()
        if stream_id in self._ends:
            self.durable_outcomes[stream_id] = self._ends[stream_id]


async def the_instant(steps: int) -> None:
    """Wait for the instant, and then so many scheduling steps more."""
    await trio.sleep(INSTANT)
    for _ in range(steps):
        await trio.lowlevel.checkpoint()


@attrs.define
class Wire:
    """A pretended connection: whether it was opened, and whether it was closed again."""

    opened: int = 0
    closed: int = 0


@attrs.define
class Seen:
    """What everybody was shown."""

    events: list[list[Event]] = attrs.field(factory=list)
    outcomes: list[Outcome] = attrs.field(factory=list)
    results: list[CancelResult] = attrs.field(factory=list)


@attrs.define
class Told:
    """What an observer was told, as figures and spans are: laws 1 and 3 hold for it too.

    What it raises would only be logged, so it writes down what is wrong.
    """

    store: MomentaryStore
    live: list[str] = attrs.field(factory=list)
    outcomes: dict[str, Outcome] = attrs.field(factory=dict)
    wrong: list[str] = attrs.field(factory=list)

    def started(self, stream: Stream) -> None:
        self.live.append(stream.id)

    def attempted(self, stream: Stream, record: object) -> None:
        pass

    def began(self, stream: Stream) -> None:
        pass

    def ended(self, stream: Stream, outcome: Outcome | None) -> None:
        if stream.id not in self.live:
            self.wrong.append(f"law 1: {stream.id} ended twice")
        elif outcome is None or self.store.durable_outcomes.get(stream.id) != outcome.to_json():
            self.wrong.append(f"law 3: {stream.id} was told before it was durable")
        else:
            self.live.remove(stream.id)
            self.outcomes[stream.id] = outcome


@attrs.define
class Race:
    """One run of one race; `check` raises AssertionError if a law was broken."""

    sup: Supervisor
    stream: Stream
    store: MomentaryStore
    wire: Wire
    seen: Seen
    parent: trio.CancelScope
    told: Told
    lead: int = 0
    keeper: Subscription | None = None
    """A reader from the first moment on, where there is an `on_detach`: it does not read, and leaves when it is closed."""

    async def the_instant(self) -> None:
        """Wait for it, and for the steps that the source is ahead."""
        await the_instant(self.lead)

    def look(self) -> None:
        """Laws 3 and 4: whatever is shown of an ending is durable by then, and the wire is closed."""
        info = self.stream.info()
        if info.state in TERMINAL_STATES or info.outcome is not None or self.stream.outcome is not None:
            assert self.stream.id in self.store.durable_outcomes, "law 3: shown before it was durable"
            assert self.wire.opened == self.wire.closed, "law 4: over, and the wire is open"

    async def read(self) -> None:
        """Laws 2, 3 and 5, as a reader sees them."""
        got: list[Event] = []
        self.seen.events.append(got)
        with self.stream.subscribe() as events:
            async for event in events:
                assert not got or got[-1].kind != "outcome", "an event after the outcome"
                got.append(event)
                self.look()

    async def wait(self) -> None:
        """Laws 1 and 3, as a waiter sees them."""
        outcome = await self.stream.wait()
        self.look()
        self.seen.outcomes.append(outcome)

    def record(self, results: Sequence[CancelResult]) -> None:
        """Law 3, as somebody who pressed Stop sees it."""
        self.look()
        self.seen.results.extend(result for result in results if result.id == self.stream.id)

    def check(self) -> None:
        """Check laws 1 to 5 once everything is over."""
        stream, outcome = self.stream, self.stream.outcome
        assert outcome is not None, "law 1: no outcome"
        assert stream.state is outcome.state
        assert self.store.durable_outcomes == {**self.store.durable_outcomes, stream.id: outcome.to_json()}
        assert all(seen == outcome for seen in self.seen.outcomes), "law 1: two truths"
        assert not self.told.wrong
        assert (self.told.live, self.told.outcomes[stream.id]) == ([], outcome), "law 1: two truths, or none"
        ended = self.sup.statistics().ended
        mine = ended[outcome.state.value][outcome.reason]
        others = self.sup.statistics().started - 1
        assert 1 <= mine <= 1 + others
        assert sum(sum(reasons.values()) for reasons in ended.values()) == 1 + others, "law 1: counted twice"
        for got in self.seen.events:
            assert [event.seq for event in got] == list(range(1, outcome.last_seq + 1)), "law 5"
            assert [event.kind for event in got].count("outcome") == 1, "law 1: not one outcome"
            assert got[-1].payload == outcome.to_json(), "law 1: two truths"
        wins = [result for result in self.seen.results if result.outcome == "won"]
        if outcome.reason != "requested":
            assert not wins, "a cancel says it won, and the outcome says it did not"
        assert all(
            result.state is outcome.state and result.reason == outcome.reason
            for result in self.seen.results
            if result.outcome in ("won", "already_terminal")
        ), "law 1: two truths"
        assert self.wire.opened == self.wire.closed, "law 4: the wire is still open"


Contender = Callable[[Race], Awaitable[None]]


# --- who competes ----------------------------------------------------------------------------------------------------


async def cancel_by_id(race: Race) -> None:
    await race.the_instant()
    race.record([await race.stream.cancel(actor="id")])


async def cancel_by_key(race: Race) -> None:
    await race.the_instant()
    race.record(await race.sup.cancel(key="k", actor="key"))


async def cancel_all(race: Race) -> None:
    await race.the_instant()
    race.record(await race.sup.cancel(all_streams=True))


async def replace(race: Race) -> None:
    await race.the_instant()
    if race.sup.health().status != "draining":

        async def nothing(out: object) -> None:
            pass

        race.sup.start_nowait(nothing, key="k", on_conflict="replace")


async def reap(race: Race) -> None:
    await race.the_instant()
    await race.sup.reap()
    race.look()


async def shutdown(race: Race) -> None:
    await race.the_instant()
    await race.sup.shutdown()
    race.look()


async def parent_cancel(race: Race) -> None:
    await race.the_instant()
    race.parent.cancel()


async def no_one(race: Race) -> None:
    """The deadline alone."""


def source_that(ends: str, wire: Wire, lag: int) -> Callable[..., Awaitable[None]]:
    """A source with a wire: one event, and at the instant the terminal marker, a reset, or nothing."""

    async def source(out) -> None:
        wire.opened += 1
        try:
            await out.send("partial ")
            if ends == "stalls":
                await trio.sleep_forever()
            await the_instant(lag)
            if ends == "marker":
                out.send_nowait("the end")
                out.complete("stop")
            elif ends == "reset":
                out.fail("truncated", Fault(kind="network", message="reset by peer"))
            elif ends == "returns":
                return
            elif ends == "raises":
                raise OSError("reset by peer")
            await trio.sleep_forever()
        finally:
            wire.closed += 1

    return source


Sourcing = Callable[[Wire, int], Callable[..., Awaitable[None]]]


async def run_race(
    ends: str | Sourcing,
    contenders: Sequence[Contender],
    *,
    readers: int = 1,
    waiters: int = 1,
    lead: int = 0,
    deadlines: Deadlines | None = None,
    on_detach: OnDetach | None = None,
    check: Callable[[Race], None] | None = None,
) -> None:
    """Run one race under the scheduling order in force, and check the laws.

    `ends` says how the source ends, or makes another one, of the wire to count on and its lag in steps.

    `lead` is how many scheduling steps the source is ahead of the contenders (below 0: behind them): each of them takes some
    steps to get to its seal, and the race is where they meet.
    """
    store, wire = MomentaryStore(), Wire()
    policy = MemoryPolicy(max_age_s=INSTANT, sweep_every_s=1000.0)
    race: Race | None = None
    with trio.CancelScope() as parent:
        async with open_supervisor(
            store=store, memory=policy, limits=Limits(cleanup_s=500), new_id=iter_ids()
        ) as sup:
            await trio.testing.wait_all_tasks_blocked()  # the orders before the race are not what it is about
            told = Told(store)
            sup.observe(told)
            lag = max(0, -lead)
            stream = sup.start_nowait(
                source_that(ends, wire, lag) if isinstance(ends, str) else ends(wire, lag),
                key="k",
                deadlines=deadlines or Deadlines(first_event_s=None, idle_s=None, total_s=900),
                on_detach=on_detach or OnDetach(),
            ).stream
            race = Race(sup, stream, store, wire, Seen(), parent, told, max(0, lead))
            if on_detach is not None:
                race.keeper = stream.subscribe().__enter__()
            await trio.testing.wait_all_tasks_blocked()
            async with trio.open_nursery() as nursery:
                for task in [*[Race.read] * readers, *[Race.wait] * waiters, *contenders]:
                    nursery.start_soon(task, race)
                    await trio.testing.wait_all_tasks_blocked()
    assert race is not None
    if not parent.cancelled_caught:
        race.check()
    else:
        race.seen.events.clear()  # law 9: readers and waiters were the parent's, and were cancelled with it
        race.check()
    if check is not None:
        check(race)


def iter_ids() -> Callable[[], str]:
    """Ids that are the same in every run."""
    count = 0

    def new_id() -> str:
        nonlocal count
        count += 1
        return f"{count:026}"

    return new_id


def state_is(*expected: tuple[State, str]) -> Callable[[Race], None]:
    """Check that the outcome is one of those that the race can have."""

    def check(race: Race) -> None:
        assert race.stream.outcome is not None
        assert (race.stream.outcome.state, race.stream.outcome.reason) in expected

    return check
