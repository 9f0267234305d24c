"""What a source writes to: the source's half of a stream.

The chain from bytes to journal is synchronous: `append` for each wire event, `flush` once per read. Nothing here blocks but
`send` and `flow`, which are where a source is slowed while the store is behind, and cancelled when the stream is sealed.
"""

from __future__ import annotations

import base64
import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Final

import msgspec
import trio

from supervisor.dialects import Delta, Fault, Snapshot, Usage
from supervisor.dialects.native import encode
from supervisor.errors import ConfigurationError, StoreError
from supervisor.streams.attempts import AttemptRecord, Rung, Withdrawal, climb
from supervisor.streams.lifecycle import State, Verdict

if TYPE_CHECKING:
    from supervisor.streams.stream import Stream

__all__ = ["SMALL_SHARE_BYTES", "Output"]

SMALL_SHARE_BYTES: Final = 16 << 10
"""What a stream may have waiting to be written while the store is behind, and go on all the same."""

_MAX_SKIPPED_BYTES = 64 << 10  # of an unparseable payload, what the journal keeps


class Output:
    """What a source writes to.

    A program's own source uses `send`, and `finish` to say how it ended. A source that reads a wire uses the rest: it is
    the sink of `supervisor.dialects.reading.BodyReader`.
    """

    __slots__ = (
        "_begun",
        "_clocks",
        "_fold",
        "_joins",
        "_journal",
        "_lifecycle",
        "_max_event_bytes",
        "_store",
        "_stream",
        "_streaming",
        "_tally",
        "_undurable",
        "_withdraws",
        "id",
        "nursery",
    )

    def __init__(self, stream: Stream, nursery: trio.Nursery) -> None:
        self._stream = stream
        self._journal = stream._journal  # noqa: SLF001  # the source's half of the stream, as is all below
        self._fold = stream._answer.fold  # noqa: SLF001
        self._clocks = stream._clocks  # noqa: SLF001
        self._store = stream._supervisor.store  # noqa: SLF001
        self._lifecycle = stream._lifecycle  # noqa: SLF001
        self._max_event_bytes = stream._max_event_bytes  # noqa: SLF001
        self._tally = stream._tally  # noqa: SLF001
        self._undurable = stream._answer.undurable  # noqa: SLF001
        self._streaming = False
        self._begun = False  # whether the answer, as it stands, has anything of the upstream in it
        self._joins: AttemptRecord | None = None  # what the next event goes on from
        self._withdraws = False  # whether the next event takes the place of all before it
        self.id = stream.id
        self.nursery = nursery
        """The stream's own nursery, for the source's helpers: they end with the stream."""

    def __repr__(self) -> str:
        return f"<Output of {self._stream!r}>"

    @property
    def stream(self) -> Stream:
        """The stream this feeds."""
        return self._stream

    @property
    def sealed(self) -> bool:
        """Whether the stream's ending is decided: stop, and let `trio.Cancelled` pass."""
        return self._lifecycle.sealed

    # --- a program's own source --------------------------------------------------------------------------------------

    async def send(self, item: str | Delta | Mapping[str, Any]) -> None:
        """Add an event: text, a `Delta`, or any JSON object (whose fields named as in `Delta` are folded).

        A checkpoint: here the source is cancelled when the stream is stopped, and slowed while the store is behind. A
        cancel adds nothing. Raises ConfigurationError for an item it cannot encode, or one over `Limits.max_event_bytes`.
        """
        await trio.lowlevel.checkpoint()
        if self.congested:
            await self.flow()
        self.send_nowait(item)

    def send_nowait(self, item: str | Delta | Mapping[str, Any]) -> None:
        """Add an event without a checkpoint or back-pressure. Raises StreamSealedError once the stream is sealed."""
        if self._stream._spec.dialect != "native":  # noqa: SLF001
            raise ConfigurationError(
                "dialect", self._stream.dialect, "'native' (the default) for a source that uses send"
            )
        payload, deltas = encode(item)
        self.append(payload, "", deltas)
        self.flush()

    def finish(self, reason: str = "stop") -> bool:
        """End the stream as completed. True if this decided its ending. The source is cancelled at its next checkpoint."""
        return self.complete(reason)

    # --- a source that reads a wire ----------------------------------------------------------------------------------

    def attempt(
        self,
        number: int,
        *,
        cause: str | None = None,
        delay_s: float = 0.0,
        rung: Rung | None = None,
        dropped: int = 0,
        **details: Any,
    ) -> None:
        """Journal the start of an attempt; its connect clock starts. `details` are JSON values.

        `rung` says what becomes, when this attempt's first event comes, of what the attempts before it received: see
        `supervisor.streams.attempts`. With `restart` and `fallback` that is withdrawn, and a new epoch begins; with
        `continuation` what follows is joined to the text, of which the last `dropped` characters are not kept.
        """
        record = details | {"attempt": number, "cause": cause, "delay_s": delay_s}
        if rung is not None:
            record["rung"] = rung
        if dropped:
            record["dropped"] = dropped
        stream = self._stream
        self._journal.add(time.time(), "attempt", msgspec.json.encode(record))
        self._tally.attempt(number, rung)
        stream._marked = None  # noqa: SLF001
        self._streaming = False
        self._joins = AttemptRecord(number, rung, dropped) if rung == "continuation" else None
        self._withdraws = self._begun and rung in ("restart", "fallback")
        stream._enter(State.CONNECTING, "connect")  # noqa: SLF001
        self.flush()
        stream._supervisor.observers.attempted(stream, record)  # noqa: SLF001

    def _withdraw(self) -> None:
        """Begin a new epoch: what was received before this attempt is no longer part of the answer."""
        journal = self._journal
        told = Withdrawal(
            attempt=self._tally.attempts,
            first=journal.epoch_starts[-1][1],
            last=journal.tail_seq,
        )
        record = msgspec.json.encode(told)
        journal.check_add(record)
        journal.new_epoch()
        journal.add(time.time(), "withdrawn", record)
        self._withdraws = False
        self._climb(told)
        drain = self._stream._drain  # noqa: SLF001
        if drain is not None:
            drain.begin_anew(self._fold)

    def _climb(self, record: AttemptRecord | Withdrawal) -> None:
        climb(self._fold, record)
        if self._undurable is not None:  # shown with the event that follows on this
            self._undurable.append((self._journal.tail_seq + 1, record))

    def waiting(self) -> None:
        """Between two attempts: only the total clock runs."""
        self._stream._enter(State.CONNECTING, None)  # noqa: SLF001

    def connected(self) -> None:
        """Say that the request is sent: the first-event clock starts."""
        if not self._streaming:
            self._stream._enter(State.CONNECTING, "first_event")  # noqa: SLF001

    def note(self, **details: Any) -> None:
        """Journal a fact about the stream that is not part of the answer. `details` are JSON values."""
        self._journal.add(time.time(), "note", msgspec.json.encode(details))
        self.flush()

    def append(self, payload: bytes, name: str, deltas: tuple[Delta, ...]) -> None:
        """Add one wire event and fold its deltas. Not published before `flush`. Raises StreamSealedError once sealed."""
        begins = not self._streaming
        if begins:
            self._journal.check_add(payload)  # nothing is withdrawn or dropped without something in its place
            if self._withdraws:
                self._withdraw()
            elif self._joins is not None:
                self._climb(self._joins)
                self._joins = None
        if len(deltas) == 1:
            delta = deltas[0]
            self._journal.add(time.time(), "data", payload, name, "" if delta.choice else delta.text)
            self._fold.apply(delta)
        else:
            text = "".join([delta.text for delta in deltas if not delta.choice])
            self._journal.add(time.time(), "data", payload, name, text)
            for delta in deltas:
                self._fold.apply(delta)
        if self._undurable is not None:
            self._undurable.append((self._journal.tail_seq, deltas))
        if begins:
            self._streaming = self._begun = True
            self._stream._enter(State.STREAMING, "idle")  # noqa: SLF001
            if self._tally.first_event_s is None:
                self._stream.answer_began()
        self._tally.events += 1

    def skip(self, payload: bytes, why: str, name: str = "") -> None:
        """Count and journal a payload that could not be read, of an event of this name."""
        kept = payload[:_MAX_SKIPPED_BYTES]
        record: dict[str, Any] = {"why": why, "bytes": len(payload)}
        try:
            record["payload"] = kept.decode()
        except UnicodeDecodeError:
            record["payload_b64"] = base64.b64encode(kept).decode()
        encoded = msgspec.json.encode(record)
        if self._withdraws:
            self._journal.check_add(encoded)
            self._withdraw()
        self._journal.add(time.time(), "skipped", encoded, name)
        self._begun = True
        self._tally.skipped += 1

    def touch(self) -> None:
        """Note that the upstream shows life without an event."""
        self._clocks.touched = trio.current_time()

    def mark(self, reason: str | None) -> None:
        """Note that the answer has ended as far as seen: unless an error follows, whatever ends the body completes it.

        None takes that back: a further choice has begun.
        """
        self._stream._marked = reason  # noqa: SLF001

    @property
    def answer(self) -> Snapshot:
        """The answer so far, for a source that goes on with it; of its text only what is still in memory (see `spilled`)."""
        return self._fold.snapshot()

    @property
    def spilled(self) -> bool:
        """Whether the text of `answer` is not all of it, as that is too long to be held."""
        return self._fold.spilled

    @property
    def begun(self) -> bool:
        """Whether anything of the answer, as it now stands, has been received: an event, read or not."""
        return self._begun

    @property
    def stopping(self) -> bool:
        """Whether somebody has asked for the stream to be stopped and lets the answer end by itself: make no new attempt."""
        return self._stream._drain is not None  # noqa: SLF001

    def stop(self, fault: Fault | None) -> bool:
        """Seal the stream by the stop that was asked for: the upstream failed meanwhile (`fault`), or was not asked.

        True if this decided its ending.
        """
        drain = self._stream._drain  # noqa: SLF001
        assert drain is not None, "only for a stream that is stopping"
        return self._stream._seal(drain.verdict_with(fault))  # noqa: SLF001

    @property
    def abandoned(self) -> bool:
        """Whether the stream ended, and not because its answer did: what the provider still does for it is for nobody."""
        verdict = self._lifecycle.verdict
        return (
            verdict is not None
            and verdict.state is not State.COMPLETED
            and verdict.reason != "provider_error"
        )

    def report_usage(self, usage: Usage) -> None:
        """Give the outcome the usage of the last request, which the provider stated although the stream was abandoned.

        With requests before it that had begun to answer, it is a part of the sum.
        """
        self._tally.report_usage(usage, self._fold)

    def cleanup_failed(self, why: str) -> None:
        """Have the outcome say what went wrong after the seal. It changes nothing about the ending."""
        self._tally.cleanup_error = why

    @property
    def tail_seq(self) -> int:
        """The last event of the journal; 0 if there is none."""
        return self._journal.tail_seq

    @property
    def cleanup_s(self) -> float:
        """How long a source may take to end after the seal before the outcome is written without it."""
        return self._stream._supervisor.limits.cleanup_s  # noqa: SLF001

    @property
    def max_event_bytes(self) -> int:
        """The most that `append` takes in one event."""
        return self._max_event_bytes

    def complete(self, reason: str) -> bool:
        """Seal the stream as completed. True if this decided its ending."""
        return self._stream._seal(Verdict(state=State.COMPLETED, reason=reason))  # noqa: SLF001

    def fail(self, reason: str, fault: Fault) -> bool:
        """Seal the stream as failed, everything received kept. True if this decided its ending."""
        return self._stream._seal(  # noqa: SLF001
            Verdict(state=State.FAILED, reason=reason, fault=fault, message=fault.message)
        )

    def on_abort(self, close: Callable[[], None] | None) -> None:
        """Have `close` called when the stream is sealed other than as completed, in that very step; None takes it back.

        For a source that holds a wire, whose own task may be a long way from its next step. It must not block or raise,
        and the source still closes its wire in a `finally`: this is only sooner.
        """
        self._stream._abort_wire = close  # noqa: SLF001

    def flush(self) -> bool:
        """Publish what was appended: once per read, not per event. Return whether to read on.

        False once the stream is sealed, or while it is held back: then `await flow()` before reading on.
        """
        try:
            if self._journal.publish():
                self._stream._published()  # noqa: SLF001
        except StoreError as error:  # what cannot be recorded is not gone on with
            self._stream._refused(str(error))  # noqa: SLF001
            raise
        return not (self._lifecycle.sealed or self.congested)

    @property
    def congested(self) -> bool:
        """Whether the store is behind, with this stream among those whose events wait: a source should `await flow()` before it reads on.

        A stream of which no more than `SMALL_SHARE_BYTES` wait is not held back for what others have the store write, as long
        as it does write.
        """
        store = self._store
        return store.congested and (
            self._journal.pending_bytes > SMALL_SHARE_BYTES or store.failing is not None
        )

    async def flow(self) -> None:
        """Wait until the store has caught up; of the clocks only the total runs meanwhile. A cancel leaves nothing behind.

        A stream that was held back for `Limits.held_s` is ended: what it has received is queued, and written if it still can be.
        """
        limits = self._stream._supervisor.limits  # noqa: SLF001  # as above
        until = trio.current_time() + limits.held_s
        self._clocks.hold(trio.current_time())
        try:
            with trio.move_on_at(until):
                await self._store.wait_flow()
        finally:
            self._clocks.release(trio.current_time())
            if not self.sealed:
                self._stream._supervisor.watchdog.arm(self._stream)  # noqa: SLF001  # as above
        if self._store.congested and trio.current_time() >= until:
            self._give_up_on_store(limits.held_s)

    def _give_up_on_store(self, held_s: float) -> None:
        """Seal a stream that was held back for too long. An answer that has ended as far as seen lacks nothing."""
        stream = self._stream
        if stream._marked is not None:  # noqa: SLF001
            self.complete(stream._marked)  # noqa: SLF001
            return
        why = self._store.failing or "it is behind with what it was given before"
        stream._refused(f"the store could not take this stream's events for {held_s:g} s: {why}")  # noqa: SLF001
