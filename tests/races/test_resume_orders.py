"""A connection that drops, an answer that goes on, and a stop, in the same instant and in every order.

The upstream is pretended, below the source that climbs the ladder: exchanges that deliver, break and are counted. Broken on
purpose, to see it seen: a ladder that goes on after the seal; an attempt that is recorded after it; a withdrawal at the start
of an attempt rather than at its first event; a continuation that keeps the white space that it says it drops.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Awaitable, Callable, Sequence

import attrs
import httpx
import pytest
import trio

from supervisor import State
from supervisor.errors import ConnectError, UpstreamClosedError
from supervisor.testing.schedule import Bounds, explore
from supervisor.upstream import RetryPolicy, Upstream
from supervisor.upstream.shared import SharedReader
from supervisor.upstream.source import HttpSource

from . import laws
from .laws import Contender, Race, Wire, run_race

COMPLETED = (State.COMPLETED, "stop")
TRUNCATED = (State.FAILED, "truncated")
ABORTS: dict[Contender, tuple[State, str]] = {
    laws.cancel_by_id: (State.CANCELLED, "requested"),
    laws.reap: (State.EXPIRED, "reaped_age"),
    laws.shutdown: (State.CANCELLED, "shutdown"),
    laws.parent_cancel: (State.CANCELLED, "shutdown"),
}


def event(word: str) -> bytes:
    return b"data: %s\n\n" % json.dumps({"choices": [{"index": 0, "delta": {"content": word}}]}).encode()


FINISH = b'data: {"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]}\n\ndata: [DONE]\n\n'


@attrs.define(eq=False)
class Exchange:
    """A pretended response: gives its pieces, then waits for its moment, then breaks or ends."""

    wire: Wire
    pieces: list[bytes]
    moment: Callable[[], Awaitable[None]] | None
    breaks: bool
    reader: SharedReader | None = None
    poller: Poller | None = None
    status: int = 200
    headers: httpx.Headers = attrs.field(factory=httpx.Headers)
    at_end: bool = False
    closed: bool = False
    take: Callable[[bytes], bool] | None = None

    async def pump(self, take: Callable[[bytes], bool]) -> bool:
        """By the stream's own task, or by the shared reader's."""
        try:
            if self.reader is not None:
                self.take = take
                return await self.reader.read(self)  # type: ignore[arg-type]  # pretends to be its own socket
            while True:
                await trio.lowlevel.checkpoint()
                if self.closed:
                    raise trio.ClosedResourceError  # noqa: TRY301  # as the real one does
                if not self.pieces and self.moment is not None:
                    moment, self.moment = self.moment, None
                    await moment()
                    continue
                going_on = self.feed_read(self.pieces.pop(0) if self.pieces else b"", take)
                if going_on is not None:
                    return going_on
        except BaseException:
            self.abort()
            raise

    def feed_read(self, raw: bytes, take: Callable[[bytes], bool] | None = None) -> bool | None:
        take = take or self.take
        assert take is not None
        if raw:
            return None if take(raw) else True
        if self.breaks:
            raise UpstreamClosedError("reset by peer", sent=True)
        self.at_end = True
        return False

    # What the shared reader sees of a socket.

    @property
    def socket(self) -> Exchange:
        return self

    def fileno(self) -> int:
        return -1 if self.closed else id(self)

    @property
    def readable(self) -> bool:
        return bool(self.pieces) or self.moment is None

    def recv(self, size: int) -> bytes:
        if not self.readable:
            raise BlockingIOError
        return self.pieces.pop(0) if self.pieces else b""

    async def let_the_moment_come(self) -> None:
        assert self.moment is not None
        assert self.poller is not None
        await self.moment()
        self.moment = None
        self.poller.notify()

    def abort(self) -> None:
        if not self.closed:
            if self.reader is not None:
                self.reader.forget(id(self))
            self.closed = True
            self.wire.closed += 1

    async def aclose(self) -> None:
        self.abort()


@attrs.define
class Poller:
    """A pretended epoll of pretended sockets."""

    watched: dict[int, Exchange] = attrs.field(factory=dict)
    all: dict[int, Exchange] = attrs.field(factory=dict)
    changed: trio.Event = attrs.field(factory=trio.Event)

    def add(self, fd: int) -> None:
        self.watched[fd] = self.all[fd]
        self.notify()

    def remove(self, fd: int) -> None:
        del self.watched[fd]

    def ready(self) -> list[int]:
        return [fd for fd, exchange in self.watched.items() if exchange.readable]

    async def wait(self) -> None:
        await trio.lowlevel.checkpoint()
        while not self.ready():
            self.changed = trio.Event()
            await self.changed.wait()

    def notify(self) -> None:
        self.changed.set()

    def close(self) -> None:
        assert not self.watched, "the reader has ended, and reads"


@attrs.define
class Provider:
    """The pretended transport: one exchange after the other, or none."""

    wire: Wire
    exchanges: list[Exchange | None]
    shared: bool
    poller: Poller = attrs.field(factory=Poller)
    reader: SharedReader | None = None

    async def open(self, request: httpx.Request, *, on_sent: Callable[[], None] | None = None) -> Exchange:
        await trio.lowlevel.checkpoint()
        exchange = self.exchanges.pop(0)
        if exchange is None:
            raise ConnectError("refused")
        self.wire.opened += 1
        if self.shared:
            if self.reader is None:
                self.reader = SharedReader(read_bytes=1 << 16, poller=lambda: self.poller)
            exchange.reader, exchange.poller = self.reader, self.poller
            self.poller.all[id(exchange)] = exchange
            if exchange.moment is not None:
                trio.lowlevel.spawn_system_task(exchange.let_the_moment_come)
        if on_sent is not None:
            on_sent()
        return exchange


def dropping(resume: Sequence[str], second: Sequence[bytes] | None, *, shared: bool) -> laws.Sourcing:
    """Make a source whose first connection drops in the instant, and whose second one, if it comes, gives `second`."""

    def make(wire: Wire, lag: int) -> HttpSource:
        first = Exchange(
            wire, [event("One "), event(" ")], functools.partial(laws.the_instant, lag), breaks=True
        )
        more = None if second is None else Exchange(wire, list(second), None, breaks=False)
        upstream = Upstream(name="u", base_url="http://u.test", prefill="prefix")
        policy = RetryPolicy(attempts=2, wait_initial_s=0, resume=resume)
        request = {"model": "m", "messages": [{"role": "user", "content": "?"}]}
        transport = Provider(wire, [first, more], shared)
        return HttpSource(upstream, request, transport=transport, retry=policy, draw=lambda: 0.0)  # type: ignore[arg-type]  # pretended

    return make


TEXTS = {
    "restart": {"One  ", "Two", "Two."},
    "continuation": {"One  ", "One", "One two", "One two."},
}
SECOND = {"restart": ("Two", "."), "continuation": (" two", ".")}


LEADS = range(-2, 12)
"""Scheduling steps that the drop is ahead of the stop: where the two meet is somewhere among these."""


def every_order(source: laws.Sourcing, abort: Contender, lead: int, check: Callable[[Race], None]) -> None:
    race = functools.partial(run_race, source, [abort], readers=1, waiters=0, lead=lead, check=check)
    explored = explore(race, bounds=Bounds(max_preemptions=2, max_runs=60_000, max_seconds=600))
    assert explored.complete, f"not every order was seen: {explored}"


DRIVERS = pytest.mark.parametrize("shared", [True, False], ids=["shared-reader", "own-loop"])


@DRIVERS
@pytest.mark.parametrize("rung", TEXTS)
@pytest.mark.parametrize("abort", ABORTS, ids=lambda abort: abort.__name__)
def test_a_drop_and_a_stop(rung: str, abort: Contender, shared: bool):
    """One ending; each text that can be left is one that was, whole: never both answers, never half a join."""
    outcomes: set[tuple[State, str]] = set()
    texts: set[str] = set()

    def note(race: Race) -> None:
        outcome = race.stream.outcome
        assert outcome is not None
        outcomes.add((outcome.state, outcome.reason))
        texts.add(race.stream.snapshot().text)
        assert 0 <= outcome.attempts - race.wire.opened <= 1  # the last may be stopped on its way
        assert (outcome.epoch == 3) == (race.stream.snapshot().text.startswith("Two"))

    second = [*map(event, SECOND[rung]), FINISH]
    for lead in LEADS if shared else LEADS[::2]:
        every_order(dropping([rung], second, shared=shared), abort, lead, note)
    assert outcomes == {COMPLETED, ABORTS[abort]}
    assert len(texts) > 1
    assert texts <= TEXTS[rung]


@DRIVERS
def test_a_drop_and_no_other_connection(shared: bool):
    """The attempt that could not be made leaves the answer as it was, against a stop in the same instant."""
    texts: set[str] = set()
    outcomes: set[tuple[State, str]] = set()

    def note(race: Race) -> None:
        outcome = race.stream.outcome
        assert outcome is not None
        outcomes.add((outcome.state, outcome.reason))
        texts.add(race.stream.snapshot().text)
        assert outcome.epoch == 1

    for lead in LEADS:
        every_order(dropping(["restart"], None, shared=shared), laws.cancel_by_id, lead, note)
    assert outcomes == {TRUNCATED, (State.CANCELLED, "requested")}
    assert texts == {"One  "}
