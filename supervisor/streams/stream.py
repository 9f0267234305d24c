"""One supervised stream: a nursery, a cancel scope, clocks, a journal, and the way from seal to outcome.

**The task.** `Stream.run` is one task in the supervisor's root nursery. Its cancel scope exists before the task does, so a
stop that comes before the first step is not lost. Inside the scope is the stream's own nursery, in which the source runs;
`seal` cancels the scope, and leaving the nursery is what closes the wire, because the source closes it in its `finally`.
A source whose wire can be closed without waiting says how (`Output.on_abort`): then `seal` closes it in the same step, unless
the answer is complete. A cancel among thousands of busy streams need not wait for the loop to come round to the task.

**What ends it.** Whoever calls `seal` first: the source (a terminal marker, a fault), a stop, a clock, a reap. If the source
ends without a seal, then how it ended is the verdict: an exception is `failed(source_error)`; a return is
`completed` for a program's own source, and for a source that reads a wire `failed(truncated)`, for no marker was seen.

**Ours and theirs.** The scope catches only its own cancellation. The embedding program's `Cancelled` comes out of the scope,
seals the stream as `cancelled(shutdown)` with the actor `parent`, and goes on unchanged after a bounded, shielded settling.

**Stopping.** A cancel seals at once (*abort*), or lets the answer end by itself within a budget of time and of tokens (*drain*); one
that does not say does what the dialect does, for whether an abort saves money is the provider's doing. See `drain.py`.

**Settling.** Once the source has unwound (or after `Limits.cleanup_s` without it: then the watchdog settles the stream,
and the task that will not end only keeps its own nursery), the outcome is written, waited for until durable, and only then
announced: to `wait`, to readers, to whoever asked for the stop.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

import trio

from supervisor.dialects import Dialect, Fault, Snapshot
from supervisor.errors import AdmissionError, SupervisorError
from supervisor.stores.base import Event
from supervisor.streams import raised
from supervisor.streams.answer import UNDURABLE_BYTES, Answer, read_back
from supervisor.streams.bill import TokenBudget
from supervisor.streams.clocks import ClockKind, Clocks, Phase
from supervisor.streams.drain import Drain
from supervisor.streams.journal import Cursor, Journal
from supervisor.streams.lifecycle import Lifecycle, Outcome, State, Verdict
from supervisor.streams.output import Output
from supervisor.streams.pools import NEVER, Pool
from supervisor.streams.report import CancelOutcome, CancelResult, StreamInfo, describe
from supervisor.streams.settling import Settling
from supervisor.streams.spec import Source, StopMode, StreamSpec, check_stop
from supervisor.streams.subscription import After, Subscription
from supervisor.streams.tally import Tally

if TYPE_CHECKING:
    from supervisor.streams.supervisor import Supervisor

__all__ = ["Stream"]

_log = logging.getLogger("supervisor.streams")

_ENDED_TAIL_BYTES = 16 << 10


class Stream:
    """A supervised stream, live or ended. Made by `Supervisor.start`, never directly."""

    __slots__ = (
        "__weakref__",
        "_abort_wire",
        "_answer",
        "_clocks",
        "_dialect",
        "_drain",
        "_fold_bytes",
        "_held",
        "_journal",
        "_last_event",
        "_lifecycle",
        "_marked",
        "_max_event_bytes",
        "_readers",
        "_restored",
        "_scope",
        "_settling",
        "_source",
        "_source_bytes",
        "_spec",
        "_spec_bytes",
        "_started",
        "_supervisor",
        "_tally",
        "created_at",
        "id",
        "note_at",
        "number",
        "pools",
    )

    def __init__(
        self,
        supervisor: Supervisor,
        stream_id: str,
        spec: StreamSpec,
        source: Source | None,
        *,
        dialect: Dialect | None,
        created_at: float | None = None,
    ) -> None:
        limits = supervisor.limits
        now = trio.current_time()
        self.id = stream_id
        self.created_at = time.time() if created_at is None else created_at
        """When it was started: seconds since the Unix epoch."""
        self._supervisor = supervisor
        self._spec = spec
        self._source = source
        self._dialect = dialect
        self._max_event_bytes = limits.max_event_bytes
        self._fold_bytes = limits.fold_bytes
        self._lifecycle = Lifecycle()
        self._journal = Journal(
            stream_id,
            supervisor.store,
            dialect=dialect,
            tail_events=limits.tail_events,
            tail_bytes=limits.tail_bytes,
            max_event_bytes=limits.max_event_bytes,
            durable_delivery=spec.delivery == "durable",
            on_durable=self._show,
        )
        self._answer = Answer(durable_delivery=spec.delivery == "durable")
        self._clocks = Clocks(spec.deadlines, now)
        self._scope = trio.CancelScope()
        self._settling = Settling(self._journal, supervisor.store)
        self._started = now
        self._last_event = now
        self._tally = Tally()
        self._drain: Drain | None = None
        self._marked: str | None = None
        self._abort_wire: Callable[[], None] | None = None  # set by a source that holds a wire
        self._readers = 0
        self._spec_bytes = spec.bytes_held
        self._source_bytes = _bytes_of(source)
        self._held = self._spec_bytes + self._source_bytes
        self.number = 0
        """Which one it is of those that the memory manager was given."""
        self.pools: tuple[Pool, ...] = ()
        """Where its bytes are counted. The memory manager's, as is `note_at`: from how many bytes on it wants to be told."""
        self.note_at = NEVER
        self._restored = False

    def __repr__(self) -> str:
        key = f" key={self.key!r}" if self.key is not None else ""
        return f"<Stream {self.id}{key} {self.state} {self._journal.published_seq} events, {self._readers} readers>"

    # --- what anybody may see ----------------------------------------------------------------------------------------

    @property
    def key(self) -> str | None:
        """The caller-chosen key."""
        return self._spec.key

    @property
    def labels(self) -> Mapping[str, str]:
        """The caller's labels."""
        return self._spec.labels

    @property
    def tenant(self) -> str | None:
        """On whose behalf it runs."""
        return self._spec.tenant

    @property
    def upstream(self) -> str | None:
        """The name of the upstream it is read from."""
        return self._spec.upstream

    @property
    def dialect(self) -> str:
        """The name of the dialect it is read in."""
        return self._spec.dialect

    @property
    def state(self) -> State:
        """The state, as durable as anything that is shown: `stopping` until the outcome is."""
        return self._lifecycle.visible

    @property
    def outcome(self) -> Outcome | None:
        """The outcome, once it is durable."""
        return self._settling.outcome

    @property
    def epoch(self) -> int:
        """The journal's epoch."""
        return self._journal.epoch

    @property
    def tail_seq(self) -> int:
        """The last event readers may see; 0 if none."""
        return self._journal.visible_seq

    @property
    def journal_bytes(self) -> int | None:
        """What its journal comes to: payloads, names and text; None if that is not known any more, after a restart."""
        return self._journal.total_bytes

    def info(self) -> StreamInfo:
        """Describe the stream at this moment."""
        return describe(
            self,
            self._journal,
            self._tally,
            now=trio.current_time(),
            durable=self._supervisor.store.durable_seq(self.id),
        )

    def subscribe(
        self, after: After = "start", *, max_batch: int = 256, max_behind: int | None = None
    ) -> Subscription:
        """Read the stream from a position: `"start"`, `"tail"` (only what is new), `"snapshot"`, or after a `Cursor`.

        A reader that is more than `max_behind` events behind gets one `snapshot` event in place of them; with None it gets all
        events, however many. Raises GapError if the cursor is not part of this stream's history. Does not block; enter the
        result to read.
        """
        return Subscription(self, self._journal, after, max_batch=max_batch, max_behind=max_behind)

    async def wait(self) -> Outcome:
        """Wait for the outcome. Raises StoreError if it could not be made durable. Cancelling the wait stops nothing."""
        await self._settling.done.wait()
        if self._journal.failure is not None:
            raise self._journal.failure
        assert self._settling.outcome is not None, "a settled stream has an outcome or a store error"
        return self._settling.outcome

    async def settled(self) -> None:
        """Wait until the outcome is durable, or could not be made so: `wait` tells which."""
        await self._settling.done.wait()

    def snapshot(self) -> Snapshot:
        """Return the fold of everything received so far; with `delivery="durable"`, of everything durable.

        Raises SupervisorError for what is no longer in memory, an ended stream or an answer of more than `Limits.fold_bytes`:
        `read_snapshot` reads it from the store.
        """
        if not self._lifecycle.sealed and self._journal.publish():  # so that its cursor is one to go on from
            self._published()
        if self._restored or self._answer.shown.spilled:
            raise SupervisorError(
                f"the answer of stream {self.id} is no longer in memory; use `await stream.read_snapshot()`"
            )
        return self._answer.shown.snapshot(epoch=self._journal.visible_epoch, seq=self._journal.visible_seq)

    async def read_snapshot(self) -> Snapshot:
        """Return the fold, from memory or by reading the stored journal. Raises GapError if part of that is gone."""
        await trio.lowlevel.checkpoint()
        if not (self._restored or self._answer.shown.spilled):
            return self.snapshot()
        return await read_back(self._journal, self._dialect or self._supervisor.dialect(self.dialect))

    async def page(self, after_seq: int, max_events: int = 1024) -> Sequence[Event]:
        """Return events after a seq as the journal has them now, `()` if there are none yet, without being a reader.

        For who looks at the journal; `Event.text` may be missing. Raises GapError if they are gone, StoreError.
        """
        await trio.lowlevel.checkpoint()
        events = self._journal.take(after_seq, max_events)
        if events is not None:
            return events
        return await self._journal.fetch(Cursor(1, after_seq), max_events, texts=False)

    async def recorded(self) -> None:
        """Wait until a crash can no longer lose that this stream was started. Raises StoreError."""
        if self._journal.closed:
            await trio.lowlevel.checkpoint()
        else:
            await self._supervisor.store.wait_durable(self.id, 0)

    async def cancel(
        self,
        *,
        reason: str = "",
        actor: str | None = None,
        mode: StopMode | None = None,
        drain_s: float = 10.0,
        drain_tokens: int | None = None,
        wait_s: float = 5.0,
    ) -> CancelResult:
        """Stop the stream, and tell what that came to. Idempotent.

        The stop itself happens before this function's first checkpoint: cancelling the call does not take it back.
        `mode="abort"` ends it at once; `mode="drain"` lets the answer end by itself first, for at most `drain_s` and, unless
        that is None, `drain_tokens` of output from now on (as the provider states them, else estimated). None: what the
        stream's dialect does (`Dialect.stop`). A further drain can only shorten one that runs, and an abort ends it. Waits at most
        `wait_s` for the outcome to be durable. `reason` is free text for the outcome's message. Raises ConfigurationError for a
        bad option, StoreError if the outcome could not be recorded.
        """
        verdict = self.request_stop(
            reason=reason, actor=actor, mode=mode, drain_s=drain_s, drain_tokens=drain_tokens
        )
        return await self.stopped(verdict, wait_s=wait_s)

    def request_stop(
        self,
        *,
        reason: str = "",
        actor: str | None = None,
        mode: StopMode | None = None,
        drain_s: float = 10.0,
        drain_tokens: int | None = None,
    ) -> Verdict:
        """Make the synchronous part of `cancel`: give the result to `stopped` to learn what it came to."""
        check_stop(mode, drain_s, drain_tokens)
        verdict = Verdict(state=State.CANCELLED, reason="requested", actor=actor, message=reason)
        if mode is None and self._dialect is not None:
            mode = self._dialect.stop
        if mode == "drain":
            self._begin_drain(verdict, drain_s, drain_tokens)
        else:
            self._seal(verdict)
        return verdict

    def _begin_drain(self, verdict: Verdict, drain_s: float, drain_tokens: int | None) -> None:
        """Let the answer end by itself within the budgets; of several drains the tightest budgets hold."""
        if self._lifecycle.sealed:
            return
        if self._drain is None:
            self._drain = Drain(verdict)
            self._lifecycle.advance(State.STOPPING)
        self._clocks.shorten("drain", trio.current_time() + drain_s)
        self._supervisor.watchdog.arm(self)
        if drain_tokens is not None:
            self._look_at_budget(self._drain.tighten(drain_tokens, self._answer.fold))

    def _look_at_budget(self, budget: TokenBudget) -> None:
        """Seal with the stop if its tokens are spent. An answer that has ended as far as seen takes none."""
        assert self._drain is not None, "a budget belongs to a drain"
        if self._marked is None and not budget.left(self._answer.fold):
            self._seal(self._drain.verdict)

    async def stopped(self, verdict: Verdict, *, wait_s: float = 5.0) -> CancelResult:
        """Wait at most `wait_s` for the outcome, and tell what the stop that `request_stop` returned came to."""
        with trio.move_on_after(wait_s):
            await self._settling.done.wait()
        if self._journal.failure is not None:
            raise self._journal.failure
        sealed, drain = self._lifecycle.verdict, self._drain
        won = drain.decided(sealed) if drain is not None and drain.verdict is verdict else sealed is verdict
        outcome: CancelOutcome = "requested"
        if self._settling.outcome is not None:
            outcome = "won" if won else "already_terminal"
        return CancelResult(
            outcome=outcome,
            id=self.id,
            key=self.key,
            state=self.state,
            reason=self._settling.outcome.reason if self._settling.outcome is not None else None,
        )

    # --- the machinery -----------------------------------------------------------------------------------------------

    async def run(self) -> None:
        """Run the stream to its outcome: the one task of a stream. Raises only what belongs to the embedding program."""
        passing: BaseException | None = None
        try:
            await self._run_source()
        except BaseException as error:  # noqa: ASYNC103, BLE001  # split by whose it is; theirs is raised again below
            passing = self._source_raised(error)
        try:
            await self._finish()
        finally:
            self._supervisor.stream_unwound()
        if passing is not None:
            raise passing

    async def _run_source(self) -> None:
        if self._lifecycle.sealed:  # stopped before its first step: the source never runs
            return
        assert self._source is not None, "only a live stream runs"
        with self._scope:
            async with trio.open_nursery() as nursery:
                self._enter(State.CONNECTING, "first_event")
                await self._source(Output(self, nursery))
        if not self._lifecycle.sealed:
            self._seal(self._source_returned())

    def _source_returned(self) -> Verdict:
        if self._marked is not None:
            return Verdict(state=State.COMPLETED, reason=self._marked)
        if self._dialect is None or self._dialect.framing == "none":
            return Verdict(state=State.COMPLETED, reason=self._answer.fold.finish_reason or "done")
        fault = Fault(kind="truncated", message="the source ended without the answer's terminal marker")
        return Verdict(state=State.FAILED, reason="truncated", message=fault.message, fault=fault)

    def _source_raised(self, error: BaseException) -> BaseException | None:
        """Seal by what the source raised, and return the part of it that is not the source's own."""
        ours, theirs = raised.split(error)
        if ours is not None and not (self._lifecycle.sealed and raised.is_only_sealed(ours, self.id)):
            message = raised.told(ours)
            if self._seal(Verdict(state=State.FAILED, reason="source_error", message=message)):
                _log.warning("stream %s: its source raised: %s", self.id, message, exc_info=ours)
            else:
                self._tally.cleanup_error = message
                _log.warning(
                    "stream %s: its source raised after the seal: %s", self.id, message, exc_info=ours
                )
        if theirs is not None:
            self._seal(Verdict(state=State.CANCELLED, reason="shutdown", actor="parent"))
        return theirs

    def _enter(self, state: State, phase: Phase | None) -> None:
        if not self._lifecycle.sealed:  # a sealed stream has one clock left: that of its cleanup
            self._lifecycle.advance(state)
            self._clocks.begin(phase, trio.current_time())
            self._supervisor.watchdog.arm(self)

    def _published(self) -> None:
        self._last_event = self._clocks.touched = trio.current_time()
        if self._answer.fold.nbytes > self._fold_bytes:
            self._answer.spill()
        self._weigh()
        if self._drain is not None and self._drain.budget is not None:
            self._look_at_budget(self._drain.budget)

    def _weigh(self) -> None:
        """Bring the account up to date. Once for a read: all that an event costs it is done where it is added."""
        answer = self._answer
        held = self._journal.tail_bytes + answer.fold.nbytes + self._spec_bytes + self._source_bytes
        if answer.undurable is not None:
            held += answer.shown.nbytes + len(answer.undurable) * UNDURABLE_BYTES
        change = held - self._held
        self._held = held
        for pool in self.pools:
            pool.nbytes += change
            if pool.nbytes > pool.alarm:
                self._supervisor.memory.alarm(pool)
        if held > self.note_at:
            self._supervisor.memory.note(self)

    @trio.lowlevel.enable_ki_protection  # a Ctrl-C between its steps would leave a stream that can never end
    def _seal(self, verdict: Verdict) -> bool:
        """Decide the ending, first writer wins, and start the end: nothing is added from here on. No await inside."""
        if not self._lifecycle.seal(verdict):
            return False
        self._tally.sealed_at = time.time()
        try:
            self._hand_over_the_last()
            self._tally.end(watched=self._readers > 0)
            self._journal.seal()
            self._clocks.stop()
            self._clocks.set("cleanup", trio.current_time() + self._supervisor.limits.cleanup_s)
            self._supervisor.watchdog.arm(self)
            self._supervisor.stream_sealed(self)
        finally:  # whatever goes wrong with the books: the source ends, and the wire is cut
            self._scope.cancel(reason=f"stream sealed: {verdict.state}({verdict.reason})")
            if verdict.state is not State.COMPLETED:
                self._cut_wire()
        return True

    def _hand_over_the_last(self) -> None:
        try:
            if self._journal.publish():
                self._published()
        except Exception:  # noqa: BLE001  # a seal does not fail: the outcome will find the store in the same state, and tell
            _log.exception("stream %s: its last events could not be handed to the store", self.id)

    def _cut_wire(self) -> None:
        try:
            if self._abort_wire is not None:
                self._abort_wire()
        except Exception:  # noqa: BLE001  # the source's own; it closes its wire in its `finally` too
            _log.exception("stream %s: its wire could not be cut", self.id)

    def expire(self, kind: ClockKind) -> None:
        """Act on a clock that ran out."""
        if self._lifecycle.sealed:
            self._clocks.stop()
            if kind == "cleanup" and not self._settling.begun:
                _log.warning(
                    "stream %s: its source has not ended %g s after the seal; settling without it",
                    self.id,
                    self._supervisor.limits.cleanup_s,
                )
                self._tally.cleanup_error = (
                    f"the source did not end within {self._supervisor.limits.cleanup_s:g} s"
                )
                self._supervisor.spawn(self._finish)
        elif kind == "detach":
            self._seal(Verdict(state=State.CANCELLED, reason="detached"))
        elif self._marked is not None:
            self._seal(Verdict(state=State.COMPLETED, reason=self._marked))
        elif kind == "drain":
            assert self._drain is not None, "the drain clock runs for a drain"
            self._seal(self._drain.verdict)
        else:
            message = f"the {kind} deadline of {getattr(self._spec.deadlines, f'{kind}_s'):g} s passed"
            self._seal(Verdict(state=State.EXPIRED, reason=kind, message=message))

    def _refused(self, message: str) -> None:
        """Seal by what the store says: it does not take what there is."""
        verdict = Verdict(state=State.EXPIRED, reason="reaped_pressure", actor="store", message=message)
        self._seal(verdict if self._drain is None else self._drain.verdict)

    def reaped(self, reason: str, message: str) -> bool:
        """Seal the stream for the memory manager. False if it had been sealed before."""
        return self._seal(Verdict(state=State.EXPIRED, reason=reason, actor="memory", message=message))

    def stop_for(self, reason: str, *, actor: str | None, message: str = "") -> bool:
        """Seal the stream as cancelled for the supervisor. False if it had been sealed before."""
        return self._seal(Verdict(state=State.CANCELLED, reason=reason, actor=actor, message=message))

    @trio.lowlevel.enable_ki_protection
    async def _finish(self) -> None:
        """Write the outcome, wait until it is durable, announce it. Once; shielded, and bounded by `settle_s`."""
        settling = self._settling
        if settling.begun:
            return
        settling.begun = True
        failure = await settling.write(self._conclude, settle_s=self._supervisor.limits.settle_s)
        self._clocks.stop()
        self._supervisor.watchdog.discard(self)
        self._source, self._source_bytes = None, 0
        self._weigh()
        if failure is None:
            self._announce()
        else:
            _log.error("stream %s: its outcome could not be recorded: %s", self.id, failure)
            self._journal.fail(failure)
            settling.done.set()
            self._note_unrecorded()

    def _note_unrecorded(self) -> None:
        """Say that the outcome is not durable: it may be later, unless the store has refused it or was never given it."""
        refusal = self._supervisor.store.refusal(self.id)
        if refusal is not None:
            self._journal.failure = refusal
        self._supervisor.stream_unrecorded(self, hopeless=self._settling.event is None or refusal is not None)

    def _announce(self) -> None:
        """Show the ending, now that it is durable."""
        event = self._settling.event
        assert event is not None, "what is durable was written"
        self._lifecycle.announce()
        self._answer.show_all()
        self._journal.failure = None
        self._journal.close(event)
        self._settling.done.set()
        self._let_go()
        self._supervisor.stream_settled(self)

    def announce_late(self) -> bool:
        """Announce an outcome that took longer than anybody was made to wait. False if it is not durable yet, or never will be."""
        if not self._settling.has_come():
            if self._supervisor.store.refusal(self.id) is not None:
                self._note_unrecorded()
            return False
        self._announce()
        return True

    def answer_began(self) -> None:
        """Take note of the stream's first event."""
        self._tally.first_event_s = trio.current_time() - self._started
        self._supervisor.observers.began(self)

    def _show(self, durable_seq: int) -> None:
        self._answer.show(durable_seq)
        self._weigh()

    def _conclude(self) -> Outcome:
        verdict = self._lifecycle.verdict
        assert verdict is not None, "a stream finishes sealed"
        return self._tally.outcome(
            verdict,
            self._journal,
            self._answer.fold,
            key=self.key,
            started_at=self.created_at,
            estimate=self._dialect is not None and self._dialect.asking.estimate,
        )

    def restore(self, outcome: Outcome) -> None:
        """Become the ended stream that the store remembers."""
        self._restored = True
        self._settling.outcome = outcome
        self._lifecycle.seal(Verdict(state=outcome.state, reason=outcome.reason))
        self._lifecycle.announce()
        self._clocks.stop()
        self._journal.restore(last_seq=outcome.last_seq, epoch_starts=outcome.epoch_starts)
        self._settling.done.set()

    @property
    def loss(self) -> str:
        """Why the outcome could not be recorded; empty if it could."""
        return "" if self._journal.failure is None else str(self._journal.failure)

    @property
    def first_event_s(self) -> float | None:
        """How long after its start the first event came, in seconds; None if there was none yet, or it was before a restart."""
        return self._tally.first_event_s

    @property
    def last_event_at(self) -> float:
        """When the last event was published, in trio's clock; the start if there was none."""
        return self._last_event

    @property
    def sealed(self) -> bool:
        """Whether the ending is decided. Internal to this package: `state` is what may be shown."""
        return self._lifecycle.sealed

    @property
    def clocks(self) -> Clocks:
        """The stream's clocks, for the watchdog."""
        return self._clocks

    @property
    def bytes_held(self) -> int:
        """What the stream holds in memory: its tail, its fold, its labels and meta, and what its source says it holds, in bytes."""
        return self._held

    @property
    def spillable_bytes(self) -> int:
        """Of that, what `spill` would let go of."""
        return self._journal.tail_bytes - self._journal.pending_bytes + self._answer.spillable_bytes

    def spill(self) -> None:
        """Let go of what the store has: of the tail, and of the answer unless it is short. The stream goes on."""
        self._journal.spill()
        self._answer.spill_unless_short()
        self._weigh()

    @property
    def spec(self) -> StreamSpec:
        """What it was asked to be."""
        return self._spec

    @property
    def readers(self) -> int:
        """How many read it now."""
        return self._readers

    @property
    def started(self) -> float:
        """When it was started, in trio's clock."""
        return self._started

    def arm_first_clocks(self) -> None:
        """Start the clocks that run from the start: total, and the grace until the first reader."""
        self._arm_detach()
        self._supervisor.watchdog.arm(self)

    def _attach(self, waker: Callable[[], None]) -> None:
        if self._readers >= self._supervisor.limits.max_readers:
            limit = self._supervisor.limits
            raise AdmissionError(
                live=self._readers, limit=limit.max_readers, retry_after_s=limit.retry_after_s
            )
        self._journal.add_waker(waker)
        self._readers += 1
        self._supervisor.readers += 1
        self._supervisor.memory.watched(self)
        self._clocks.set("detach", None)

    def _detach(self, waker: Callable[[], None]) -> None:
        self._journal.remove_waker(waker)
        self._readers -= 1
        self._supervisor.readers -= 1
        self._supervisor.memory.watched(self)
        self._tally.left()
        if not self._lifecycle.sealed:
            self._arm_detach()
            self._supervisor.watchdog.arm(self)
        self._let_go()

    def _arm_detach(self) -> None:
        if self._spec.on_detach.mode == "cancel" and not self._readers:
            self._clocks.set("detach", trio.current_time() + self._spec.on_detach.grace_s)

    def _let_go(self) -> None:
        """Release the tail of an ended stream, but what its readers most likely still want: the store has it."""
        if self._journal.closed and not self._restored:
            self._journal.release_tail(keep_bytes=_ENDED_TAIL_BYTES if self._readers else 0)
            self._weigh()

    async def follow_durability(self) -> None:
        """Show readers what becomes durable, for `delivery="durable"`."""
        await self._journal.follow_durability()


def _bytes_of(source: Source | None) -> int:
    """Return what a source says it holds for its stream, such as the request."""
    held: object = getattr(source, "bytes_held", 0)
    return held if isinstance(held, int) and held > 0 else 0
