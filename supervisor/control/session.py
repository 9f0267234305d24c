"""One client's session: its requests. How the events of its subscriptions get to it: `supervisor.control.delivery`.

Requests: a handler that need not wait is answered on the spot, in order; one that must wait gets a task, so that a
`stream.wait` delays nobody. Both are bounded (`max_requests`), and reading from the socket never waits for either: a Ping
and a Close are always seen. A client that goes on asking without reading the answers is dropped, whether it asks one by one
or in batches.

Replies: none is encoded before the outbox has room for it. Those that may be large, such as a snapshot, are not even begun
before, and no more than `max_large_replies` at a time, so that what a client can make the server hold for it by asking is
a few of them: one with the writer, one in the outbox, and those being made.

Leaving detaches: the subscriptions are closed, the streams go on.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Awaitable, Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar, NoReturn, Self, cast

import attrs
import msgspec
import trio

from supervisor.control import answers
from supervisor.control.delivery import Delivery, SessionLimits, Watch
from supervisor.control.link import Link
from supervisor.control.messages import (
    METHODS,
    SUBPROTOCOL,
    CancelManyResult,
    CancelParams,
    CancelResultMessage,
    CloseCode,
    CreditParams,
    CreditResult,
    DrainParams,
    DrainResult,
    HelloParams,
    HelloResult,
    ListParams,
    ListResult,
    Method,
    NoParams,
    ReapParams,
    ReapResult,
    RequestCancelParams,
    ShutdownParams,
    ShutdownResult,
    SnapshotMessage,
    StartParams,
    StartResult,
    StreamMessage,
    StreamParams,
    SubscribeParams,
    SubscribeResult,
    UnsubscribeParams,
    UnsubscribeResult,
    WaitParams,
    WaitResult,
)
from supervisor.control.rpc import (
    Call,
    ErrorMessage,
    RpcError,
    error_for,
    error_reply,
    parse,
    read_params,
    result_reply,
)
from supervisor.errors import ControlClosedError, SupervisorError
from supervisor.observe import Overview, Trace, overview
from supervisor.streams import (
    Cursor,
    Outcome,
    Supervisor,
)

if TYPE_CHECKING:
    from supervisor.control.server import Host

__all__ = ["Session", "SessionLimits"]

_log = logging.getLogger("supervisor.control")


# --- a session --------------------------------------------------------------------------------------------------------


_encode = msgspec.json.Encoder().encode
_AfterReply = Callable[[], None]


@attrs.frozen
class _Work:
    """A call that waits. Of the message it came in nothing is kept but the id."""

    method: str
    id: msgspec.Raw | None
    begin: Callable[[], Awaitable[Any]]
    large: bool


class _Turn:
    """The right to make large replies, once taken, up to the end of the block."""

    def __init__(self, turns: trio.Semaphore) -> None:
        self._turns = turns
        self._taken = False

    def __enter__(self) -> Self:
        return self

    async def take(self) -> None:
        """Wait for it. Does nothing if it has been taken."""
        if not self._taken:
            await self._turns.acquire()
            self._taken = True

    def __exit__(self, *_: object) -> None:
        if self._taken:
            self._turns.release()


class Session:
    """Serves one client until it leaves. Everything it holds ends with `run`."""

    def __init__(self, link: Link, host: Host) -> None:
        self._link = link
        self._host = host
        self._supervisor: Supervisor = host.supervisor
        self._limits: SessionLimits = host.limits.session
        self._client = ""
        self._turns = trio.Semaphore(self._limits.max_large_replies)
        self._delivery = Delivery(link, self._limits, host.deliveries, self._turns)
        self._pending = 0
        self._cancellable: dict[bytes, trio.CancelScope] = {}
        self._nursery: trio.Nursery

    def __repr__(self) -> str:
        return f"<Session {self._client!r} {self._pending} requests, {len(self._delivery)} subscriptions>"

    @property
    def subscriptions(self) -> int:
        """How many subscriptions it has."""
        return len(self._delivery)

    @property
    def pending(self) -> int:
        """How many requests it has not answered yet."""
        return self._pending

    @property
    def bytes_held(self) -> int:
        """What waits to be sent to its client."""
        return self._link.bytes_held

    async def run(self) -> NoReturn:
        """Serve until the connection is over. Raises ControlClosedError (in a group); a cancel passes through."""
        try:
            async with trio.open_nursery() as nursery:
                self._nursery = nursery
                nursery.start_soon(self._link.run)
                nursery.start_soon(self._delivery.run, nursery)
                while True:
                    self._message(await self._link.receive())
        finally:
            self._delivery.stop()

    # --- requests ----------------------------------------------------------------------------------------------------

    def _message(self, text: str | bytes) -> None:
        """Take one message. Does not wait for anything."""
        try:
            calls, batch = parse(text, max_batch=self._limits.max_batch)
        except RpcError as error:
            self._reply_now(error_reply(None, error.error))
            return
        slots = sum(call.method in _WAITING for call in calls)
        if self._pending + slots > self._limits.max_requests:
            refusal = RpcError(
                "too_many_requests",
                f"{self._pending} requests are unanswered",
                limit=self._limits.max_requests,
            )
            refusals = [error_reply(call.id, refusal.error) for call in calls if call.id is not None]
            if refusals:
                self._reply_now(_array(refusals) if batch else refusals[0])
            return
        replies: list[bytes] = []
        afters: list[_AfterReply] = []
        works = [work for call in calls if (work := self._begin(call, replies, afters)) is not None]
        if works:
            self._pending += len(works)
            if batch:
                self._nursery.start_soon(self._answer_batch, works, replies, afters)
            else:
                self._nursery.start_soon(self._answer, works[0])
            return
        if replies:
            self._reply_now(_array(replies) if batch else replies[0])
        for after in afters:
            after()

    def _reply_now(self, reply: bytes) -> None:
        try:
            self._link.send_nowait(reply)
        except trio.WouldBlock:
            raise ControlClosedError(
                CloseCode.FLOODED, "requests without end, and no answer is read"
            ) from None

    def _begin(self, call: Call, replies: list[bytes], afters: list[_AfterReply]) -> _Work | None:
        """Answer a call that need not wait; return what is to be done for one that must."""
        try:
            method = _method(call)
            params = read_params(call.params, method.params)
            handler = self.HANDLERS[call.method]
            if call.method in _WAITING:
                large = call.method in _LARGE and _LARGE[call.method](params)
                return _Work(call.method, call.id, partial(handler, self, params), large)
            result, after = _split(handler(self, params))
            if call.id is not None:
                replies.append(result_reply(call.id, result))
            if after is not None:
                afters.append(after)
        except Exception as error:  # noqa: BLE001  # becomes the error of this request; see error_for
            if call.id is not None:
                replies.append(error_reply(call.id, self._error(call.method, error)))
        return None

    async def _result(self, work: _Work, turn: _Turn) -> tuple[object, _AfterReply | None]:
        """Wait for a call's result, unless it is withdrawn; for a large one its turn comes first, and room to send it."""
        key = b"" if work.id is None else bytes(work.id)
        with trio.CancelScope() as scope:
            if key:
                self._cancellable[key] = scope
            try:
                if work.large:
                    await turn.take()
                    await self._link.outbox.wait_room()
                return _split(await work.begin())
            finally:
                if self._cancellable.get(key) is scope:
                    del self._cancellable[key]
        raise RpcError("request_cancelled", "withdrawn; what it had begun is not undone")

    async def _answer(self, work: _Work) -> None:
        """Wait for one call's result and reply."""
        after: _AfterReply | None = None
        try:
            with _Turn(self._turns) as turn:
                make: Callable[[], bytes] | None = None
                try:
                    result, after = await self._result(work, turn)
                    if work.id is not None:
                        make = partial(self._made, work, result)
                except Exception as error:  # noqa: BLE001  # becomes the error of this request; see error_for
                    if work.id is not None:
                        make = partial(error_reply, work.id, self._error(work.method, error))
                if make is not None:
                    await self._link.send_made(make)
        finally:
            self._pending -= 1
        if after is not None:
            after()

    def _made(self, work: _Work, result: object) -> bytes:
        try:
            return result_reply(cast("msgspec.Raw", work.id), result)
        except Exception as error:  # noqa: BLE001  # a result that cannot be encoded costs one request
            return error_reply(work.id, self._error(work.method, error))

    async def _answer_batch(
        self, works: Sequence[_Work], replies: list[bytes], afters: list[_AfterReply]
    ) -> None:
        """Answer the calls of a batch side by side, the large ones last and in turn, with one array once all are answered."""

        async def one(work: _Work) -> None:
            try:
                if work.large:
                    self._check_batch(replies)
                result, after = await self._result(work, turn)
                if work.id is not None:
                    replies.append(result_reply(work.id, result))
                if after is not None:
                    afters.append(after)
            except Exception as error:  # noqa: BLE001  # becomes the error of this call; see error_for
                if work.id is not None:
                    replies.append(error_reply(work.id, self._error(work.method, error)))

        try:
            with _Turn(self._turns) as turn:
                async with trio.open_nursery() as nursery:
                    for work in works:
                        if not work.large:
                            nursery.start_soon(one, work)
                for work in works:
                    if work.large:
                        await one(work)
                if replies:
                    await self._link.send_made(partial(_array, replies))
        finally:
            self._pending -= len(works)
        for after in afters:
            after()

    def _check_batch(self, replies: Sequence[bytes]) -> None:
        limit = self._limits.batch_reply_bytes
        if sum(map(len, replies)) >= limit:
            raise RpcError(
                "too_many_requests",
                "the replies to this batch are too large for one message; make this call by itself",
                limit=limit,
            )

    def _error(self, method: str, error: Exception) -> ErrorMessage:
        if not isinstance(error, RpcError | SupervisorError):
            _log.error("%s failed", method, exc_info=error)
            self._host.counts.handler_errors += 1
        return error_for(error)

    # --- handlers: those that wait are coroutines ---------------------------------------------------------------------

    def _hello(self, params: HelloParams) -> HelloResult:
        self._client = params.client
        return HelloResult(
            protocol=SUBPROTOCOL,
            server="stream-supervisor",
            version=self._host.version,
            instance=self._host.instance,
            methods=tuple(METHODS),
            limits=self._host.limits.told(),
        )

    async def _start(self, params: StartParams) -> StartResult:
        return await answers.start(self._supervisor, self._host.resolve, params)

    async def _get(self, params: StreamParams) -> StreamMessage:
        return await answers.get(self._supervisor, params)

    async def _list(self, params: ListParams) -> ListResult:
        return await answers.list_streams(self._supervisor, params)

    async def _cancel(self, params: CancelParams) -> CancelResultMessage | CancelManyResult:
        return await answers.cancel(self._supervisor, params, actor=self._client or "control")

    async def _subscribe(self, params: SubscribeParams) -> tuple[SubscribeResult, _AfterReply]:
        self._check_subscriptions()
        stream = await self._supervisor.find(params.id, key=params.key)
        self._check_subscriptions()  # again: others were answered meanwhile
        place = answers.place_of(params)
        snapshot: SnapshotMessage | None = None
        if place == "snapshot":
            folded = await stream.read_snapshot()  # it may no longer be in memory
            self._check_subscriptions()
            snapshot = answers.snapshot_message(stream, folded)
            place = Cursor(folded.epoch, folded.seq)
        events = stream.subscribe(place, max_behind=params.max_behind)
        events.__enter__()  # left when the delivery drops it, which `run` guarantees
        watch = self._delivery.add(stream, events, text=params.view == "text", credit=params.credit)
        result = SubscribeResult(
            sub=watch.sub,
            id=stream.id,
            epoch=events.cursor.epoch,
            from_=events.cursor.seq,
            tail=stream.tail_seq,
            state=str(stream.state),
            credit=watch.credit,
            snapshot=snapshot,
        )
        return result, partial(self._delivery.activate, watch)

    def _check_subscriptions(self) -> None:
        limit = self._limits.max_subscriptions
        if len(self._delivery) >= limit:
            raise RpcError(
                "too_many_subscriptions", f"this connection has {limit} subscriptions", limit=limit
            )

    def _credit(self, params: CreditParams) -> CreditResult:
        watch = self._watch(params.sub)
        return CreditResult(credit=self._delivery.grant(watch, params.credit))

    def _unsubscribe(self, params: UnsubscribeParams) -> UnsubscribeResult:
        watch = self._watch(params.sub)
        cursor = watch.events.cursor
        self._delivery.drop(watch)
        return UnsubscribeResult(epoch=cursor.epoch, seq=cursor.seq)

    def _watch(self, sub: str) -> Watch:
        watch = self._delivery.get(sub)
        if watch is None:
            raise RpcError(
                "unknown_subscription", f"there is no subscription {sub!r}; it may have ended", sub=sub
            )
        return watch

    async def _wait(self, params: WaitParams) -> WaitResult:
        stream = await self._supervisor.find(params.id, key=params.key)
        outcome: Outcome | None = None
        with trio.move_on_after(float("inf") if params.timeout_s is None else params.timeout_s):
            outcome = await stream.wait()
        return WaitResult(id=stream.id, state=str(stream.state), outcome=answers.outcome_json(outcome))

    async def _snapshot(self, params: StreamParams) -> SnapshotMessage:
        return await answers.snapshot(self._supervisor, params)

    async def _trace(self, params: StreamParams) -> Trace:
        return await answers.trace(self._supervisor, params)

    def _overview(self, params: NoParams) -> Overview:
        del params
        if self._host.figures is None:
            raise RpcError("unsupported", "the program that embeds this server keeps no figures")
        return overview(self._host.figures)

    def _stats(self, params: NoParams) -> dict[str, Any]:
        del params
        return {"supervisor": self._supervisor.statistics(), "control": self._host.statistics()}

    def _health(self, params: NoParams) -> Any:
        del params
        return self._supervisor.health()

    async def _reap(self, params: ReapParams) -> ReapResult:
        report = await self._supervisor.reap(dry_run=params.dry_run, wait_s=params.wait_s)
        return msgspec.convert(msgspec.to_builtins(report), ReapResult)

    async def _drain(self, params: DrainParams) -> DrainResult:
        return DrainResult(live=await self._supervisor.drain(timeout_s=params.timeout_s))

    def _shutdown(self, params: ShutdownParams) -> tuple[ShutdownResult, _AfterReply]:
        begin = self._host.on_shutdown
        if begin is None:
            raise RpcError("unsupported", "the program that embeds this server does not offer a shutdown")
        return ShutdownResult(accepted=True), partial(begin, params)

    def _withdraw(self, params: RequestCancelParams) -> None:
        scope = self._cancellable.get(_encode(params.id))
        if scope is not None:
            scope.cancel()

    HANDLERS: ClassVar[Mapping[str, Callable[[Session, Any], Any]]] = {
        "hello": _hello,
        "stream.start": _start,
        "stream.get": _get,
        "stream.list": _list,
        "stream.cancel": _cancel,
        "stream.subscribe": _subscribe,
        "stream.credit": _credit,
        "stream.unsubscribe": _unsubscribe,
        "stream.wait": _wait,
        "stream.snapshot": _snapshot,
        "stream.trace": _trace,
        "supervisor.overview": _overview,
        "supervisor.stats": _stats,
        "supervisor.health": _health,
        "supervisor.reap": _reap,
        "supervisor.drain": _drain,
        "supervisor.shutdown": _shutdown,
        "request.cancel": _withdraw,
    }


_WAITING = frozenset(
    name for name, handler in Session.HANDLERS.items() if inspect.iscoroutinefunction(handler)
)
"""The methods that may wait, and so take one of the connection's `max_requests`."""


def _always(_: object) -> bool:
    return True


_LARGE: Mapping[str, Callable[[Any], bool]] = {
    "stream.snapshot": _always,
    "stream.trace": _always,
    "stream.list": _always,
    "stream.subscribe": lambda params: params.after == "snapshot",
    "supervisor.reap": lambda params: params.dry_run,
}
"""The methods that do nothing but tell, and may tell much. (What ends streams must not wait until its answer can be sent.)"""


def _method(call: Call) -> Method:
    """Return what a call asks for. Raises RpcError if it cannot be asked for."""
    if call.error is not None:
        raise RpcError(call.error.data["kind"], call.error.message)
    method = METHODS.get(call.method)
    if method is None or (method.result is None and call.id is not None):
        known = ", ".join(METHODS)
        raise RpcError("method_not_found", f"there is no method {call.method[:64]!r}; known are: {known}")
    return method


def _split(answer: Any) -> tuple[object, _AfterReply | None]:
    return answer if isinstance(answer, tuple) else (answer, None)


def _array(replies: Sequence[bytes]) -> bytes:
    return b"[%b]" % b",".join(replies)
