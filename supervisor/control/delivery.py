"""How events get from the journals to the connections: all of a server's subscriptions, served in one place.

    journal ──wake──▶ topic ──turn──▶ staged ──one write──▶ socket
                                          └──(when it takes no more)──▶ outbox (bounded) ──writer──▶ socket

A subscription (`Watch`) holds a cursor and a credit, no events. All that are on one stream share a `Topic`, which the journal
wakes, once for a read from the upstream, however many they are. That only queues the topic. In the next turn of the loop
*one* task takes all that is queued: for each topic it goes over the watches that are *in step*, encodes what is new once, and
stages a frame for each; then each connection that has something staged is written to, once, in the same step. So an event
at rest waits for one turn; under load more events are in a turn, and a turn costs each connection one write.

There is no task of its own for this. Each connection has one that waits here, and whichever is woken first does the turn for
all; an error in serving one connection is raised in that connection's own nursery (`_fail_by`), and nowhere else.

A connection that does not take what is written at once goes on in its writer (`supervisor.control.link`). Once its outbox is
full, its watches leave their topics and queue up *behind*: when there is room, they are served from there in turn, a
notification each, and go back in step when they have caught up. So a stalled socket costs a cursor per subscription. History
that is no longer in memory is fetched from the store in a task per subscription, few at a time, each holding one batch.

What is encoded is kept only for those who may come for the same: with more than one watch on a topic, and no longer than
until all of them have passed it in step; in all no more than `shared_bytes`, the oldest going first.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from typing import NoReturn

import attrs
import msgspec
import trio

from supervisor.control.link import Link
from supervisor.control.notifications import NOTHING, Batch, cut, sub_prefix
from supervisor.control.rpc import error_for
from supervisor.errors import GapError, SupervisorError
from supervisor.stores import Event
from supervisor.streams import Stream, Subscription

__all__ = ["Deliveries", "Delivery", "DeliveryStatistics", "SessionLimits", "Watch"]

_STEP = 1024
"""Notifications, and events encoded, between two checkpoints: a few milliseconds."""
_encode = msgspec.json.Encoder().encode


@attrs.frozen(kw_only=True)
class SessionLimits:
    """What bounds one client, beside its connection's own limits."""

    max_requests: int = 64
    """Requests of one connection that are not answered yet."""
    max_batch: int = 32
    """Calls in one batch."""
    max_subscriptions: int = 1024
    """Subscriptions of one connection."""
    max_credit: int = 1_000_000
    """Events one subscription may be sent before it grants more."""
    notification_events: int = 256
    """Events in one `stream.events`."""
    notification_bytes: int = 64 << 10
    """Payload in one `stream.events`; a single larger event goes alone."""
    max_fetches: int = 4
    """Batches of one connection read from the store at the same time."""
    max_large_replies: int = 2
    """Replies of one connection that may be large (snapshots, lists, what a reap would do), and snapshots for its subscriptions, being made at the same time; none is begun before the outbox has room."""
    batch_reply_bytes: int = 1 << 20
    """Replies to one batch; past it, calls in it whose reply may be large are refused, to be made one by one."""


@attrs.frozen(kw_only=True)
class DeliveryStatistics:
    """The figures of a server's deliveries. Counts are since it was made."""

    encoded: int
    """Batches encoded in memory's reach."""
    shared: int
    """Notifications that were made of a batch encoded for another subscription."""
    shared_bytes: int
    """What is kept of batches now."""


@attrs.define(eq=False)
class Watch:
    """One subscription of a connection."""

    sub: str
    topic: Topic
    delivery: Delivery
    events: Subscription
    text: bool
    credit: int
    prefix: bytes
    alike: bool
    """Whether what others are sent from the same place is right for it too: not for one that may be owed a snapshot."""
    active: bool = False
    """Whether the reply to `stream.subscribe` has been queued: nothing may be sent before it."""
    fetching: bool = False
    settling: bool = False
    closed: bool = False
    scopes: set[trio.CancelScope] = attrs.field(factory=set)
    """Of what waits on the subscription's behalf."""


@attrs.define(eq=False)
class Topic:
    """The watches of one stream."""

    stream: Stream
    wake: Callable[[], None] = attrs.field(init=False)
    watches: int = 0
    in_step: dict[Watch, None] = attrs.field(factory=dict)
    """Those that can be sent what is new. The others have no credit, or are fetching, or behind."""
    queued: bool = False
    kept: dict[tuple[bool, int], Batch] = attrs.field(factory=dict)


class Deliveries:
    """What all connections of a server share: the topics, the turns, and what is encoded for several."""

    def __init__(self, shared_bytes: int) -> None:
        self._shared_bytes = shared_bytes
        self._topics: dict[Stream, Topic] = {}
        self._queue: deque[Topic] = deque()
        self._behind: deque[Delivery] = deque()
        self.staged: list[Delivery] = []
        """Who has something to be written at the end of this turn; some perhaps twice."""
        self._cost = 0  # of this turn
        self._until = _STEP
        self._lot = trio.lowlevel.ParkingLot()
        self._awake = False
        self._kept: OrderedDict[Batch, Topic] = OrderedDict()
        self._kept_bytes = 0
        self._encoded = 0
        self._shared = 0

    def statistics(self) -> DeliveryStatistics:
        """Return the figures."""
        return DeliveryStatistics(encoded=self._encoded, shared=self._shared, shared_bytes=self._kept_bytes)

    @property
    def bytes_held(self) -> int:
        """What is kept of encoded batches."""
        return self._kept_bytes

    def within_step(self) -> bool:
        """Whether more may be done in this turn."""
        return self._cost < self._until

    # --- turns -------------------------------------------------------------------------------------------------------

    async def run(self) -> NoReturn:
        """Do turns whenever this task is the one that is woken, until cancelled. Any number of tasks may run this."""
        try:
            while True:
                while self._queue or self._behind:
                    self._turn()
                    await trio.lowlevel.checkpoint()
                self._awake = False
                await self._lot.park()
        finally:
            self._awake = False
            if self._queue or self._behind:
                self._wake()

    def _wake(self) -> None:
        if not self._awake and self._lot:
            self._awake = True
            self._lot.unpark()

    def queue(self, topic: Topic) -> None:
        """Have a topic served in the next turn. Called by the journal: cheap, and any number of times."""
        if not topic.queued and topic.in_step:
            topic.queued = True
            self._queue.append(topic)
            if not self._awake:
                self._wake()

    def queue_behind(self, delivery: Delivery) -> None:
        """Have what is behind on a connection served when it is its turn."""
        if not delivery.queued:
            delivery.queued = True
            self._behind.append(delivery)
            if not self._awake:
                self._wake()

    def _turn(self) -> None:
        """Serve what is queued, not more than a step's worth, and write it. Does not wait, and does not raise."""
        self._cost = 0
        for _ in range(len(self._queue)):
            self._serve(self._queue.popleft())
            if self._cost >= _STEP:
                break
        self._until = max(
            _STEP, self._cost + _STEP // 4
        )  # so that those in step do not keep those behind there for ever
        for _ in range(len(self._behind)):
            if not self.within_step():
                break
            delivery = self._behind.popleft()
            delivery.queued = False
            try:
                delivery.catch_up()
            except Exception as error:  # noqa: BLE001  # raised in the connection it belongs to
                delivery.fail_by(error)
        staged, self.staged = self.staged, []
        for delivery in staged:
            try:
                delivery.write()
            except Exception as error:  # noqa: BLE001  # as above
                delivery.fail_by(error)

    def _serve(self, topic: Topic) -> None:
        """Stage what is new on a stream for all who are in step.

        If nobody is to get anything else in this turn, those who have nothing staged are written to as it goes: there is
        no more to come that could go with it, and what a connection needs for it is in the caches.
        """
        topic.queued = False
        batch = NOTHING  # or what the watch before was served with
        after, text, count, prefix, framed, epoch, seq = -1, False, 0, b"", b"", 0, 0
        shared = 0
        staged = self.staged
        at_once = not self._queue and not self._behind
        ending = topic.stream.state == "stopping"
        watches = tuple(topic.in_step)
        self._cost += len(watches)
        for watch in watches:
            delivery, events = watch.delivery, watch.events
            try:
                if (
                    events.seq != after
                    or watch.text is not text
                    or watch.credit <= count
                    or not watch.alike
                    or delivery.frames
                    or delivery.behind
                    or not delivery.outbox.has_room
                ):
                    batch = delivery.serve(watch)
                    if batch is NOTHING or ending or watch.closed:  # at an end there is more than sending
                        after = -1
                    else:
                        after, text, count = batch.after, batch.text, batch.count
                        epoch, seq = batch.epoch, batch.last
                        prefix, framed = batch.prefix, batch.framed
                    continue
                # What `serve` comes to for the many that differ in nothing. What a delivery costs, it costs here.
                frame = framed if watch.prefix == prefix else batch.frame(watch.prefix)
                if at_once:
                    delivery.send(frame)
                else:
                    delivery.frames.append(frame)
                    staged.append(delivery)
                events.advance(epoch, seq)
                watch.credit -= count
                shared += 1
            except Exception as error:  # noqa: BLE001  # raised in the connection it belongs to
                delivery.fail_by(error)
        self._shared += shared
        if topic.kept and len(topic.in_step) == topic.watches:
            self._let_go(topic)

    # --- what is encoded ---------------------------------------------------------------------------------------------

    def batch(self, watch: Watch, limits: SessionLimits) -> Batch | None:
        """Return the next batch for a watch: `NOTHING` if nothing is new, None if it must be fetched.

        Raises StoreError if nothing more will come because the stream's outcome could not be recorded.
        """
        topic, events = watch.topic, watch.events
        if not watch.alike and events.far_behind:
            return None
        if topic.kept:
            kept = topic.kept.get((watch.text, events.seq))
            if kept is not None and kept.count <= watch.credit and (kept.full or kept.last == events.tail):
                self._shared += 1
                return kept
        most = limits.notification_events
        found = events.peek_nowait(min(watch.credit, most))
        if not found:
            return None if found is None else NOTHING
        part = cut(found, most, limits.notification_bytes)
        full = len(part) < len(found) or len(part) == most
        batch = Batch.of(part, text=watch.text, full=full)
        self._encoded += 1
        self._cost += len(part)
        if topic.watches > 1 and (full or batch.last == events.tail):
            self._keep(topic, batch)
        return batch

    def _keep(self, topic: Topic, batch: Batch) -> None:
        key = batch.text, batch.after
        before = topic.kept.get(key)
        if before is not None:
            self._forget(before)
        topic.kept[key] = batch
        self._kept[batch] = topic
        self._kept_bytes += batch.nbytes
        while self._kept_bytes > self._shared_bytes:
            self._forget(next(iter(self._kept)))

    def _forget(self, batch: Batch) -> None:
        del self._kept.pop(batch).kept[batch.text, batch.after]
        self._kept_bytes -= batch.nbytes

    def _let_go(self, topic: Topic) -> None:
        for batch in tuple(topic.kept.values()):
            self._forget(batch)

    # --- who watches what --------------------------------------------------------------------------------------------

    def join(self, stream: Stream, events: Subscription) -> Topic:
        """Count one more watch on a stream."""
        topic = self._topics.get(stream)
        if topic is None:
            topic = self._topics[stream] = Topic(stream)
            topic.wake = partial(self.queue, topic)
        topic.watches += 1
        events.wake_by(topic.wake)
        return topic

    def leave(self, watch: Watch) -> None:
        """Count one watch less."""
        topic = watch.topic
        topic.in_step.pop(watch, None)
        topic.watches -= 1
        if not topic.watches:
            watch.events.wake_no_more(topic.wake)
            self._let_go(topic)
            del self._topics[topic.stream]


class Delivery:
    """The subscriptions of one connection."""

    def __init__(
        self, link: Link, limits: SessionLimits, deliveries: Deliveries, large: trio.Semaphore
    ) -> None:
        self._link = link
        self._limits = limits
        self._deliveries = deliveries
        self._large = large  # the connection's turns to make what may be large
        self._watches: dict[str, Watch] = {}
        self._next_sub = 0
        self._fetches = trio.Semaphore(limits.max_fetches)
        self._stopped = False
        self._staged_bytes = 0
        self._nursery: trio.Nursery
        self.outbox = link.outbox
        self.send = link.write
        """Writes a frame now: for one who has nothing staged."""
        self.frames: list[bytes] = []
        """What is staged in this turn."""
        self.behind: OrderedDict[Watch, None] = OrderedDict()
        """Those that have something to be sent and wait for room, in turn; one that is dropped is taken out."""
        self.queued = False

    def __len__(self) -> int:
        return len(self._watches)

    async def run(self, nursery: trio.Nursery) -> NoReturn:
        """Deliver until cancelled, then drop all subscriptions. `nursery` is the connection's own: an error is raised there."""
        self._nursery = nursery
        try:
            await self._deliveries.run()
        finally:
            self.stop()

    def stop(self) -> None:
        """Drop all subscriptions, and take no more. Idempotent."""
        self._stopped = True
        for watch in tuple(self._watches.values()):
            self.drop(watch)

    def fail_by(self, error: Exception) -> None:
        """End the connection by an error that nobody expected."""
        if not self._stopped:
            self.stop()
            self._nursery.start_soon(_raise, error)

    # --- subscriptions -----------------------------------------------------------------------------------------------

    def add(self, stream: Stream, events: Subscription, *, text: bool, credit: int) -> Watch:
        """Take over a subscription that is entered; nothing is sent before `activate`."""
        self._next_sub += 1
        sub = f"s{self._next_sub}"
        watch = Watch(
            sub=sub,
            topic=self._deliveries.join(stream, events),
            delivery=self,
            events=events,
            text=text,
            credit=min(credit, self._limits.max_credit),
            prefix=sub_prefix(sub),
            alike=events.max_behind is None,
        )
        self._watches[sub] = watch
        return watch

    def get(self, sub: str) -> Watch | None:
        """Return a subscription; None if there is none of this name."""
        return self._watches.get(sub)

    def activate(self, watch: Watch) -> None:
        """Begin to send."""
        watch.active = True
        self._put_in_step(watch)

    def grant(self, watch: Watch, credit: int) -> int:
        """Add credit; return what there is now."""
        watch.credit = min(watch.credit + credit, self._limits.max_credit)
        self._put_in_step(watch)
        return watch.credit

    def drop(self, watch: Watch) -> None:
        """End a subscription: detach from the stream. Idempotent."""
        if not watch.closed:
            watch.closed = True
            watch.credit = 0
            self._deliveries.leave(watch)
            watch.events.close()
            self._watches.pop(watch.sub, None)
            self.behind.pop(watch, None)
            for scope in tuple(watch.scopes):
                scope.cancel()

    def _put_in_step(self, watch: Watch) -> None:
        """Have a watch served, in this turn or the next, if it can be."""
        if (
            watch.active
            and watch.credit
            and not watch.fetching
            and not watch.closed
            and watch not in self.behind
        ):
            watch.topic.in_step[watch] = None
            self._deliveries.queue(watch.topic)

    # --- serving -----------------------------------------------------------------------------------------------------

    def serve(self, watch: Watch) -> Batch:
        """Stage a notification for a watch in step, and return what it was made of. It goes behind if there is no room."""
        topic = watch.topic
        if self.behind or not self.outbox.has_room:
            topic.in_step.pop(watch, None)
            if not watch.closed:
                self.behind[watch] = None
                self._wait_for_room()
            return NOTHING
        batch = self._take(watch)
        if watch.fetching or not watch.credit:
            topic.in_step.pop(watch, None)
        elif watch.events.seq < watch.events.tail:
            self._deliveries.queue(topic)
        return batch

    def catch_up(self) -> None:
        """Stage notifications for those that are behind, one each in turn, while there is room and the step lasts."""
        behind, outbox = self.behind, self.outbox
        while behind and outbox.has_room and self._deliveries.within_step():
            watch, _ = behind.popitem(last=False)
            self._take(watch)
            if watch.credit and not watch.fetching:
                if watch.events.seq < watch.events.tail:
                    behind[watch] = None
                else:
                    watch.topic.in_step[watch] = None
        if behind:
            self._wait_for_room()

    def _wait_for_room(self) -> None:
        if self.outbox.has_room:
            self._deliveries.queue_behind(self)
        else:
            self.outbox.when_room = partial(self._deliveries.queue_behind, self)

    def _take(self, watch: Watch) -> Batch:
        """Stage one batch of a subscription; return it, or `NOTHING`."""
        try:
            batch = self._deliveries.batch(watch, self._limits)
        except SupervisorError as error:
            self._fail(watch, error)
            return NOTHING
        if batch is None:
            watch.fetching = True
            self._nursery.start_soon(self._beside, watch, self._fetch)
            return NOTHING
        events = watch.events
        if batch is not NOTHING:
            self._stage(batch.frame(watch.prefix))
            watch.credit -= batch.last - batch.after
            events.advance(batch.epoch, batch.last)
        if events.at_end:
            self.drop(watch)
        elif not watch.settling and events.seq >= events.tail and watch.topic.stream.state == "stopping":
            watch.settling = True
            self._nursery.start_soon(self._beside, watch, self._settle)
        return batch

    def _stage(self, frame: bytes) -> None:
        if not self.frames:
            self._deliveries.staged.append(self)
        self.frames.append(frame)
        self._staged_bytes += len(frame)
        if self._staged_bytes >= self.outbox.max_bytes:
            self.write()

    def write(self) -> None:
        """Write what is staged: to the socket, and what that does not take to the outbox."""
        frames = self.frames
        if frames:
            data = frames.pop() if len(frames) == 1 else b"".join(frames)
            frames.clear()
            self._staged_bytes = 0
            self.send(data)

    # --- what waits on a subscription's behalf -----------------------------------------------------------------------

    async def _beside(self, watch: Watch, work: Callable[[Watch], Awaitable[None]]) -> None:
        """Wait for something on a subscription's behalf, until it is dropped."""
        with trio.CancelScope() as scope:
            watch.scopes.add(scope)
            try:
                if not watch.closed:
                    await work(watch)
            except SupervisorError as error:
                self._fail(watch, error)
            finally:
                watch.scopes.discard(scope)

    async def _fetch(self, watch: Watch) -> None:
        """Read one batch of a subscription from the store, or make it a snapshot, and queue it."""
        limits = self._limits
        may_be_large = not watch.alike
        async with self._large if may_be_large else self._fetches:
            if may_be_large:
                await self.outbox.wait_room()  # what is not begun before holds nothing, and is of now
            sent = watch.events.cursor
            events: Sequence[Event] = await watch.events.next_batch(
                min(watch.credit, limits.notification_events)
            )
            watch.events.advance(sent.epoch, sent.seq)  # what is read is not sent: it may be given up yet
            while events:
                part = cut(events, limits.notification_events, limits.notification_bytes)
                await self.outbox.put_made(partial(self._made, watch, part))
                watch.events.advance(part[-1].epoch, part[-1].seq)
                watch.credit = max(0, watch.credit - len(part))
                events = events[len(part) :]
        watch.fetching = False
        if watch.events.at_end:
            self.drop(watch)
        else:
            self._put_in_step(watch)

    def _made(self, watch: Watch, events: Sequence[Event]) -> bytes:
        if events[0].kind == "snapshot":
            stream = watch.topic.stream
            batch = Batch.of_snapshot(
                events[0], after=watch.events.seq, stream_id=stream.id, state=str(stream.state)
            )
        else:
            batch = Batch.of(events, text=watch.text, full=True)
        return batch.frame(watch.prefix)

    async def _settle(self, watch: Watch) -> None:
        """Follow a stream that is ending: if its outcome cannot be recorded there will be no last event to send."""
        await watch.topic.stream.wait()

    def _fail(self, watch: Watch, error: SupervisorError) -> None:
        """Tell that a subscription has ended before its stream's outcome."""
        if not watch.closed:
            method = "stream.gap" if isinstance(error, GapError) else "stream.failed"
            params = {"sub": watch.sub, "error": error_for(error)}
            self.write()
            self.outbox.append(
                self._link.frame(_encode({"jsonrpc": "2.0", "method": method, "params": params}))
            )
            self.drop(watch)


async def _raise(error: Exception) -> NoReturn:
    await trio.lowlevel.checkpoint()
    raise error
