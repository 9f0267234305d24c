"""The memory manager: keeps the account of bytes, and ends or spills streams where a limit is reached, always with a recorded reason.

It owns the policy and the account; it ends a stream only through the seal, like everybody else, so a stream that completes in
the same instant is completed.

**The account.** A stream says by how much what it holds has changed, once for a read, and that goes to the pools it is in
(`pools.py`): all live streams, those of its tenant, those of a group; then those that are ending; then the ended ones in memory. So
each sum is exact at any moment. What is counted of a stream is told in docs/embedding.md.

**When.** A limit on a number is applied where a stream starts, before it does: never is there one more. One on bytes wakes the
sweep, which comes in the next turn of the loop: until then, and while the sweep is between two slices, it can be exceeded by what is
read in that time. Age, staleness and the process's memory are looked at every `sweep_every_s`.

**Order.** Age, staleness, bytes of one stream; then groups; then number and bytes of all; then the process's memory. A stream is
taken by the first that applies. Where a rule needs *some* stream to go, it is the oldest, or the least watched. Before a live
stream goes for the bytes of all, ended ones in memory and what others can spare (`Holder`) do; and where the limit says `spill`,
live ones first give up what the store has of them, in the order in which they came to hold much. A live stream goes only while live
streams alone hold more than the limit: what others hold, such as the connections of clients that take nothing, has starts refused
or streams spill, but to end a stream for it would free nothing.

**Cost.** Everything is found at the head of an order that is kept as streams come and go; staleness has the lazy heap of the clocks, by
which a stream is looked at once per `stale_s`. A sweep that finds nothing costs the same with ten streams or ten thousand
(`MemoryStatistics.looked_at`). What it finds it does in slices, for sealing thousands in one go would hold up everybody's events. With
`dry_run` the same plan is made, and told.
"""

from __future__ import annotations

import contextlib
import heapq
import logging
import math
import operator
from collections.abc import Callable, Generator, Iterator, Mapping
from typing import TYPE_CHECKING, ParamSpec

import attrs
import trio

from supervisor.errors import AdmissionError
from supervisor.streams.clocks import LazyHeap
from supervisor.streams.finished import Finished
from supervisor.streams.plan import Act, Plan
from supervisor.streams.pools import HEAVY_BYTES, NEVER, Bound, Pool, Pools
from supervisor.streams.process_memory import Pressure, memory_limit, resident_bytes
from supervisor.streams.report import MemoryStatistics, PoolStatistics, Reaped, ReapReport
from supervisor.streams.spec import Limits, MemoryPolicy, StreamSpec

if TYPE_CHECKING:
    from supervisor.streams.stream import Stream

__all__ = ["SLICE", "Holder", "MemoryManager"]

_P = ParamSpec("_P")
_log = logging.getLogger("supervisor.streams")

SLICE = 16
"""Streams sealed between two checkpoints, wherever many are ended together. A seal closes a socket, which takes up to half a millisecond."""
SPILL_COST = 2
"""How many seals the spilling of one stream counts for in a slice."""
TOLD = 100
"""Tenants and groups told of in statistics: those that hold most."""


@attrs.frozen(kw_only=True)
class Holder:
    """What holds memory beside the streams, for `MemoryManager.register`: it is counted, and may be asked to let go.

    One that raises, or tells what is no number, is logged and counted as 0 for that time.
    """

    held: Callable[[], int]
    """Tells how many bytes it holds. Asked once a sweep: it must be cheap."""
    expire: Callable[[float, int], int] | None = None
    """Given the time on trio's clock and a number, lets go of so many overdue pieces at most; tells how many it did."""
    spare: Callable[[int, int], int] | None = None
    """Given bytes and a number, gives up pieces until that was so many bytes, so many pieces at most; tells how many."""


class MemoryManager:
    """Applies a `MemoryPolicy`. `process` tells the resident memory (None: not known), for tests."""

    def __init__(
        self,
        policy: MemoryPolicy,
        limits: Limits,
        *,
        dropped: Callable[[Stream], None],
        process: Callable[[], int | None] = resident_bytes,
    ) -> None:
        self.limits = limits
        self.process = process
        self.live = Pool()
        self.ending = Pool()
        self.finished = Finished(limits, dropped)
        finished = self.finished
        self._holders: dict[str, Holder] = {
            "ended streams": Holder(
                held=lambda: finished.bytes_held, expire=finished.expire, spare=finished.spare
            )
        }
        self._stale: LazyHeap[Stream] = LazyHeap()
        self._oversize: dict[str, Stream] = {}
        self._over: dict[Pool, None] = {}
        self._beside = 0  # held by what is registered, as of the last look; that of finished streams is exact
        self._short = False  # whether all together were over `max_bytes` at the last look
        self._started = 0
        self._sweeps = 0
        self._looked_at = 0
        self._spilled = 0
        self._reaped: dict[str, int] = {}
        self._rejected: dict[str, int] = {}
        self._round_at = -math.inf  # of reaping for the process's memory
        self._round_left = self._round_bytes = 0
        self._wake = trio.Event()
        self._install(policy)

    def __repr__(self) -> str:
        return f"<MemoryManager {len(self.live)} live, {self.live.nbytes} bytes, {sum(self._reaped.values())} reaped>"

    # --- the policy --------------------------------------------------------------------------------------------------

    @property
    def policy(self) -> MemoryPolicy:
        """What is applied. Setting it has the next sweep apply it to the streams there are."""
        return self._policy

    @policy.setter
    def policy(self, policy: MemoryPolicy) -> None:
        live = list(self.live.streams.values())
        for stream in live:
            self._leave(stream)
        self._install(policy)
        for stream in live:
            self._enter(stream)
        self._over.update(dict.fromkeys([*self._pools, self.live]))
        self._wake.set()

    def _install(self, policy: MemoryPolicy) -> None:
        self._policy = policy
        limits = self.limits
        self.live.bind(
            Bound("max_live", limits.max_live, limits.when_full),
            None if policy.max_count is None else Bound("max_count", policy.max_count, policy.at_max_count),
            nbytes=None
            if policy.max_bytes is None
            else Bound("max_bytes", policy.max_bytes, policy.at_max_bytes),
        )
        if policy.at_process_high == "reap_least_watched":
            self.live.rank()
        self._pools = Pools(policy.groups)
        limit = memory_limit() if policy.process_limit_bytes is None else policy.process_limit_bytes
        self._pressure = Pressure(high=policy.process_high, low=policy.process_low, limit=limit)
        self._stream_alarm = NEVER if policy.max_stream_bytes is None else policy.max_stream_bytes
        self._set_alarm()

    def register(self, name: str, holder: Holder) -> None:
        """Count what something beside the streams holds, and have it let go where memory is short."""
        self._holders[name] = Holder(
            held=_borne(name, holder.held),
            expire=None if holder.expire is None else _borne(name, holder.expire),
            spare=None if holder.spare is None else _borne(name, holder.spare),
        )

    # --- the account -------------------------------------------------------------------------------------------------

    def admitted(self, stream: Stream) -> None:
        """Take in a new stream."""
        self._started += 1
        stream.number = self._started
        self._enter(stream)

    def alarm(self, pool: Pool) -> None:
        """Take note that a pool holds too much: streams add up what they hold themselves, and say so here."""
        self._over[pool] = None
        self._wake.set()

    def note(self, stream: Stream) -> None:
        """Put a stream that holds much where it is found, and say from what on it is to be looked at again."""
        if stream.bytes_held > self._stream_alarm:
            self._oversize[stream.id] = stream
            self._wake.set()
            stream.note_at = NEVER
        else:
            stream.note_at = self._stream_alarm
        for pool in stream.pools:
            pool.heavy[stream.id] = stream

    def watched(self, stream: Stream) -> None:
        """Take note that a reader has come or gone."""
        for pool in stream.pools:
            pool.watched(stream)

    def sealed(self, stream: Stream) -> None:
        """Take note that a live stream has been sealed."""
        self._leave(stream)
        stream.pools = (self.ending,)
        self.ending.add(stream)

    def settled(self, stream: Stream) -> None:
        """Take note that a sealed stream has its outcome, and keep it."""
        if stream.id in self.ending.streams:
            self.ending.remove(stream)
        self.keep(stream)

    def keep(self, stream: Stream) -> None:
        """Keep an ended stream in memory."""
        self.finished.keep(stream, trio.current_time())
        self._set_alarm()

    def _enter(self, stream: Stream) -> None:
        self.live.add(stream)
        stream.pools = (self.live, *self._pools.join(stream, stream.spec))
        if self._policy.stale_s is not None:
            self._stale.arm(stream, stream.last_event_at + self._policy.stale_s, stream.number)
        for pool in stream.pools:
            if pool.nbytes > pool.alarm:
                self.alarm(pool)
        stream.note_at = min(HEAVY_BYTES, self._stream_alarm)
        if stream.bytes_held > stream.note_at:
            self.note(stream)

    def _leave(self, stream: Stream) -> None:
        self._stale.discard(stream)
        self._oversize.pop(stream.id, None)
        self.live.remove(stream)
        self._pools.leave(stream, stream.pools[1:])
        for pool in stream.pools:
            if not pool.streams:
                self._over.pop(pool, None)
        stream.pools = ()
        stream.note_at = NEVER

    def _set_alarm(self) -> None:
        """Say from how many bytes of the live streams on a sweep is to come at once; one is due if all together hold too much.

        Once that is known, and not mended by the sweep, the periodic ones look at it, unless live streams alone are over the limit.
        """
        bound = self.live.bytes_bound
        if bound is None or bound.action == "reject":
            return
        room = bound.limit - self._beside - self.finished.bytes_held
        short = self.live.nbytes > room
        self.live.alarm = bound.limit if short else room
        if short:
            self._over[self.live] = None
            if not self._short:
                self._wake.set()
        self._short = short

    def statistics(self) -> MemoryStatistics:
        """Return the manager's figures."""
        beside = {name: holder.held() for name, holder in sorted(self._holders.items())}
        groups = {pool.of.removeprefix(" of "): pool for pool in self._pools}
        return MemoryStatistics(
            bytes_held=self.live.nbytes,
            ending_bytes=self.ending.nbytes,
            total_bytes=self.live.nbytes + self.ending.nbytes + sum(beside.values()),
            beside=beside,
            tenants=_most(self._pools.tenants),
            groups=_most(groups),
            process_bytes=self._pressure.used_bytes,
            process_limit_bytes=self._pressure.limit_bytes,
            pressure=self._pressure.on,
            sweeps=self._sweeps,
            looked_at=self._looked_at,
            reaped=dict(sorted(self._reaped.items())),
            spilled=self._spilled,
            rejected=dict(sorted(self._rejected.items())),
        )

    def count(self, reason: str) -> None:
        """Count an outcome, if it was a reap."""
        if reason.startswith("reaped_"):
            self._reaped[reason] = self._reaped.get(reason, 0) + 1

    def refused(self, name: str) -> None:
        """Count a start that was refused, by what refused it: a limit, or the store."""
        self._rejected[name] = self._rejected.get(name, 0) + 1

    # --- admission ---------------------------------------------------------------------------------------------------

    def admit(self, spec: StreamSpec, *, replacing: Stream | None, tasks: int) -> list[Act]:
        """Say which streams are to make room for one more, `replacing` being ended anyway; or raise AdmissionError.

        tasks: of streams, those of sources that have not ended after the seal included.
        """
        # Streams that are settling, and such sources, hold memory and perhaps sockets too: there may be as many of them again as
        # live ones, and no more.
        ending, most = max(len(self.ending), tasks - len(self.live)), max(self.limits.max_live, SLICE)
        if ending >= most:
            raise self._refusal("max_live", ending, most, "streams that are ending")
        if self._pressure.on:
            raise self._refusal(
                "process_high",
                self._pressure.used_bytes or 0,
                self._pressure.low_bytes,
                "bytes of process memory",
            )
        leaving = {} if replacing is None or replacing.sealed else {replacing.id: replacing}
        acts: list[Act] = []
        for pool in (*self._pools.of(spec), self.live):
            freed = [one for one in leaving.values() if pool in one.pools]
            bound = pool.bytes_bound
            if bound is not None and bound.action == "reject":
                held = pool.nbytes - sum(one.bytes_held for one in freed)
                held += self._beside + self.finished.bytes_held if pool is self.live else 0
                if held >= bound.limit:
                    raise self._refusal(bound.name, held, bound.limit, f"bytes held by live streams{pool.of}")
            busy = len(pool) - len(freed)
            for bound in pool.count_bounds:
                if busy >= bound.limit and bound.action == "reject":
                    raise self._refusal(bound.name, busy, bound.limit, f"live streams{pool.of}")
            for bound in pool.count_bounds:
                if busy >= bound.limit:
                    message = _reached(bound, f"{busy} live streams{pool.of}, and one more is started")
                    for stream in pool.first(bound.action, leaving, min(busy - bound.limit + 1, SLICE)):
                        leaving[stream.id] = stream
                        acts.append(Act(stream, "reaped_count", message))
                    busy = bound.limit - 1
        return acts

    def _refusal(self, name: str, value: int, limit: int, what: str) -> AdmissionError:
        self.refused(name)
        return AdmissionError(live=value, limit=limit, retry_after_s=self.limits.retry_after_s, what=what)

    # --- the sweep ---------------------------------------------------------------------------------------------------

    async def run(self) -> None:
        """Sweep periodically, and whenever the streams come to be over a limit, until cancelled."""
        while True:
            with trio.move_on_after(self._policy.sweep_every_s):
                await self._wake.wait()
            self._wake = trio.Event()
            await self.sweep()

    async def sweep(self, *, dry_run: bool = False, wait_s: float = 0.0) -> ReapReport:
        """Do what the policy says, in slices, and wait at most `wait_s` for the outcomes.

        With `dry_run` only say what would be done. Cancelling it ends nothing half-way.
        """
        live = len(self.live)
        await trio.lowlevel.checkpoint()
        now = trio.current_time()
        done: list[tuple[Act, Reaped]] = []
        plan = Plan()
        if not dry_run:
            self._sweeps += 1
            await self._tend(now)
        else:
            plan.spared = sum(holder.held() for holder in self._holders.values() if holder.spare is not None)
        while True:
            if not dry_run:
                await self._spare()
            acts = self._slice(now, plan)
            if not acts:
                break
            for act in acts:
                entry = self._entry(act, now)
                if dry_run or self._done(act):
                    done.append((act, entry))
            if not dry_run:
                plan = Plan()
                self._set_alarm()
            await trio.lowlevel.checkpoint()
            if not dry_run and trio.current_time() - now > self._policy.sweep_every_s:
                self._wake.set()  # what is left is for the next sweep, which sees the time anew
                break
        ended = [act.stream for act, _ in done if act.reason != "spilled"]
        if ended and wait_s > 0 and not dry_run:
            with trio.move_on_after(wait_s):
                for stream in ended:
                    await stream.settled()
        return ReapReport(
            dry_run=dry_run,
            live=live,
            reaped=tuple(
                attrs.evolve(entry, settled=act.stream.outcome is not None)
                for act, entry in done
                if act.reason != "spilled"
            ),
            spilled=tuple(entry for act, entry in done if act.reason == "spilled"),
        )

    async def _tend(self, now: float) -> None:
        """Have everybody let go of what is overdue, and of what can be spared if that is needed; see how memory is."""
        for holder in tuple(self._holders.values()):
            while holder.expire is not None and holder.expire(now, SLICE) >= SLICE:  # noqa: ASYNC110  # work in slices
                await trio.lowlevel.checkpoint()
        self._pressure.update(self.process(), now)
        self._look_beside()
        if self._pressure.on and self._policy.at_process_high != "reject" and now >= self._round_at:
            self._over[self.live] = None
            # What is spilled shows in the process's memory a little later: so nobody is reaped before another look.
            first = self._pressure.since == now and self._policy.at_process_high == "spill"
            self._round_left = 0 if first else max(1, len(self.live) // 10)
            self._round_bytes = self._pressure.excess_bytes
            self._round_at = now + self._policy.sweep_every_s

    async def _spare(self) -> None:
        """Have others give up what they can, as far as that is needed."""
        for holder in tuple(self._holders.values()):
            while holder.spare is not None and (excess := self._to_spare()) and holder.spare(excess, SLICE):
                self._look_beside()
                await trio.lowlevel.checkpoint()

    def _look_beside(self) -> None:
        self._beside = sum(holder.held() for holder in self._holders.values()) - self.finished.bytes_held
        self._set_alarm()

    def _to_spare(self) -> int:
        bound = self.live.bytes_bound
        over = (
            0 if bound is None else self.live.nbytes + self._beside + self.finished.bytes_held - bound.limit
        )
        return max(0, over, NEVER if self._pressure.on else 0)

    def _done(self, act: Act) -> bool:
        stream = act.stream
        if act.reason == "spilled":
            self._spilled += 1
            for pool in stream.pools:
                pool.heavy.pop(stream.id, None)
            stream.spill()
            held = stream.bytes_held
            if held <= self._stream_alarm:
                self._oversize.pop(stream.id, None)
                stream.note_at = min(max(HEAVY_BYTES, 2 * held), self._stream_alarm)
            return True
        if act.reason == "reaped_pressure":
            self._round_left -= 1
            self._round_bytes -= stream.bytes_held
        return stream.reaped(act.reason, act.message)

    def _entry(self, act: Act, now: float) -> Reaped:
        stream = act.stream
        return Reaped(
            id=stream.id,
            key=stream.key,
            reason=act.reason,
            message=act.message,
            age_s=now - stream.started,
            idle_s=now - stream.last_event_at,
            bytes_held=stream.bytes_held,
        )

    # --- the plan: changes nothing but its own notes ------------------------------------------------------------------

    def _slice(self, now: float, plan: Plan) -> list[Act]:
        """Return what is to be done next, not more than a slice."""
        acts: list[Act] = []
        cost = 0
        with contextlib.closing(self._acts(now, plan)) as planned:
            for act in planned:
                acts.append(act)
                cost += SPILL_COST if act.reason == "spilled" else 1
                if cost >= SLICE:
                    break
        return acts

    def _acts(self, now: float, plan: Plan) -> Generator[Act, None, None]:
        yield from self._by_age(now, plan)
        yield from self._by_staleness(now, plan)
        yield from self._by_own_bytes(plan)
        for pool in sorted(self._over, key=lambda pool: pool is self.live):
            yield from self._by_count(pool, plan)
            yield from self._by_bytes(pool, plan)
            if pool is self.live:
                yield from self._by_pressure(plan)
            if not plan.gone and not plan.spilled:
                self._over.pop(pool, None)

    def _by_age(self, now: float, plan: Plan) -> Iterator[Act]:
        limit = self._policy.max_age_s
        if limit is None:
            return
        for stream in self.live.streams.values():
            self._looked_at += 1
            age = now - stream.started
            if age < limit:
                return
            if stream.id not in plan.gone:
                plan.reap(stream)
                yield Act(stream, "reaped_age", f"max_age_s: {age:.3f} s old; the limit is {limit:g} s")

    def _by_staleness(self, now: float, plan: Plan) -> Iterator[Act]:
        limit = self._policy.stale_s
        if limit is None:
            return
        seen: set[Stream] = set()
        due: list[Stream] = []
        try:
            for stream in self._stale.pop_due(now):
                if stream not in seen:
                    # It may have been armed for a time before its own, at which it comes again.
                    self._looked_at += 1
                    seen.add(stream)
                    self._stale.arm(stream, stream.last_event_at + limit, stream.number)
                    continue
                due.append(stream)
                if stream.id not in plan.gone:
                    plan.reap(stream)
                    idle = now - stream.last_event_at
                    message = f"stale_s: no event for {idle:.3f} s; the limit is {limit:g} s"
                    yield Act(stream, "reaped_stale", message)
        finally:
            for stream in due:  # until they have gone
                self._stale.arm(stream, stream.last_event_at + limit, stream.number)

    def _by_own_bytes(self, plan: Plan) -> Iterator[Act]:
        for stream in tuple(self._oversize.values()):
            self._looked_at += 1
            held, limit = stream.bytes_held, self._stream_alarm
            message = f"max_stream_bytes: it holds {held} bytes; the limit is {limit}"
            if held <= limit:  # it has shrunk by itself
                del self._oversize[stream.id]
                stream.note_at = limit
            elif stream.id not in plan.spilled and stream.spillable_bytes:
                plan.spill(stream)
                yield Act(stream, "spilled", message)
            elif stream.id not in plan.gone and plan.held(stream) > limit:
                plan.reap(stream)
                yield Act(stream, "reaped_bytes", message)

    def _by_count(self, pool: Pool, plan: Plan) -> Iterator[Act]:
        """End those that are too many: only after the policy was changed, for a start makes room before there are."""
        for bound in pool.count_bounds:
            busy = plan.live(pool)
            if busy <= bound.limit:
                continue
            message = _reached(bound, f"{busy} live streams{pool.of}")
            for stream in pool.first(bound.action, plan.gone, min(busy - bound.limit, SLICE)):
                self._looked_at += 1
                plan.reap(stream)
                yield Act(stream, "reaped_count", message)

    def _by_bytes(self, pool: Pool, plan: Plan) -> Iterator[Act]:
        bound = pool.bytes_bound
        if bound is None or bound.action == "reject":
            return
        beside = self._beside + self.finished.bytes_held if pool is self.live else 0
        told = f"{pool.nbytes} bytes are held by live streams{pool.of}"
        if bound.action == "spill":
            room = bound.limit - max(0, beside - plan.spared)
            message = _reached(bound, f"{told}, and {beside} beside them" if beside else told)
            yield from self._spills(pool, plan, message, lambda: plan.nbytes(pool) > room)
        yield from self._reaps(
            pool,
            plan,
            bound.action,
            ("reaped_bytes", _reached(bound, told)),
            needed=lambda: plan.nbytes(pool) > bound.limit,
        )

    def _by_pressure(self, plan: Plan) -> Iterator[Act]:
        pressure, action = self._pressure, self._policy.at_process_high
        if not pressure.on or action == "reject":
            return
        held = plan.nbytes(self.live)
        message = (
            f"process_high: {pressure.used_bytes} bytes of process memory; it began at {pressure.high_bytes} and "
            f"ends below {pressure.low_bytes}"
        )
        if action == "spill":
            yield from self._spills(self.live, plan, message, lambda: True)
        most = plan.live(self.live) - self._round_left
        yield from self._reaps(
            self.live,
            plan,
            action,
            ("reaped_pressure", message),
            needed=lambda: held - plan.nbytes(self.live) < self._round_bytes and plan.live(self.live) > most,
        )

    def _spills(self, pool: Pool, plan: Plan, message: str, needed: Callable[[], bool]) -> Iterator[Act]:
        for stream in pool.heavy.values():
            if not needed():
                return
            self._looked_at += 1
            if stream.id not in plan.gone and stream.id not in plan.spilled and stream.spillable_bytes:
                plan.spill(stream)
                yield Act(stream, "spilled", message)

    def _reaps(
        self, pool: Pool, plan: Plan, action: str, told: tuple[str, str], *, needed: Callable[[], bool]
    ) -> Iterator[Act]:
        while needed() and (first := pool.first(action, plan.gone, SLICE)):
            for stream in first:
                if not needed():
                    return
                self._looked_at += 1
                plan.reap(stream)
                yield Act(stream, *told)


def _borne(name: str, function: Callable[_P, int]) -> Callable[_P, int]:
    """Bear with what a program registered: what it raises is its own trouble, logged once."""
    logged = False

    def borne(*args: _P.args, **kwargs: _P.kwargs) -> int:
        nonlocal logged
        try:
            return max(0, operator.index(function(*args, **kwargs)))
        except Exception:  # noqa: BLE001  # whatever it is, the streams are not to end for it
            if not logged:
                logged = True
                _log.exception("the memory holder %r raised; it counts as 0, and is not logged again", name)
            return 0

    return borne


def _reached(bound: Bound, value: str) -> str:
    return f"{bound.name}: {value}; the limit is {bound.limit}"


def _most(pools: Mapping[str, Pool]) -> dict[str, PoolStatistics]:
    chosen = heapq.nlargest(TOLD, pools.items(), key=lambda item: item[1].nbytes)
    return {name: PoolStatistics(live=len(pool), bytes_held=pool.nbytes) for name, pool in chosen}
