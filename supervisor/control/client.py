"""The client library of the control channel: what the CLI, the demo and other programs drive a daemon with.

    async with connect("ws://127.0.0.1:7433", token=token) as client:
        started = await client.start("openai", {"model": "…", "messages": […]})
        async with client.subscribe(started.id) as events:
            async for event in events:
                print(event.text, end="")
        outcome = await client.wait(started.id)

Any number of tasks may use one client. A call that is cancelled leaves the connection as it was: its answer, when it comes,
is dropped, and the server is told that nobody waits for it (what it had begun, such as a stream, goes on).

An event stream grants the server credit as its events are consumed, so a slow consumer holds at most `window` events. With
`connect(..., reconnect=True)` a lost connection is made again, with growing pauses, unless its close code says not to; calls
that were under way raise ControlClosedError (whether they were carried out is not known: `key` makes a start repeatable),
and event streams go on after the last event they received, with neither gap nor repetition.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import random
import ssl
import urllib.parse
from collections.abc import AsyncIterator, Callable, Iterable, Mapping
from typing import Any, Literal, NoReturn, TypeVar

import attrs
import msgspec
import trio
import trio_websocket

from supervisor.control.auth import Token
from supervisor.control.event_stream import EventStream
from supervisor.control.link import NORMAL, GuardedStream, Link, LinkLimits
from supervisor.control.messages import (
    SUBPROTOCOL,
    CancelManyResult,
    CancelParams,
    CancelResultMessage,
    DeadlinesMessage,
    DrainParams,
    DrainResult,
    EventsNotification,
    FailedNotification,
    HelloParams,
    HelloResult,
    ListParams,
    ListResult,
    NoParams,
    OnDetachMessage,
    ReapParams,
    ReapResult,
    RequestCancelParams,
    RetryMessage,
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
    WaitParams,
)
from supervisor.control.mistakes import find_mistake
from supervisor.control.rpc import ErrorMessage
from supervisor.errors import (
    AuthenticationError,
    ConfigurationError,
    ControlClosedError,
    ControlError,
    GapError,
    RequestError,
)
from supervisor.observe import Overview, Trace
from supervisor.streams import Cursor, Outcome

__all__ = ["ClientLimits", "ControlClient", "connect"]

_T = TypeVar("_T")
_encode = msgspec.json.Encoder().encode
After = Cursor | Literal["start", "tail", "snapshot"]
View = Literal["events", "text"]


@attrs.frozen(kw_only=True)
class ClientLimits:
    """What bounds a client. Times in seconds."""

    connect_s: float = 10.0
    """One attempt to connect, handshake included."""
    wait_s: float = 0.0
    """How long the first connection is tried for while it is refused: a server that is just starting does not listen yet."""
    retry_initial_s: float = 0.1
    retry_max_s: float = 5.0
    """Pauses between attempts to reconnect: doubled each time up to this, with jitter."""
    link: LinkLimits = attrs.field(factory=lambda: LinkLimits(max_message_bytes=64 << 20))


class _Incoming(msgspec.Struct):
    id: int | str | None = None
    method: str = ""
    params: msgspec.Raw = msgspec.Raw(b"{}")
    result: msgspec.Raw = msgspec.Raw(b"null")
    error: ErrorMessage | None = None


class _Settled(msgspec.Struct):
    outcome: Outcome | None


_incoming = msgspec.json.Decoder(_Incoming)
_events = msgspec.json.Decoder(EventsNotification)
_failed = msgspec.json.Decoder(FailedNotification)


@attrs.define(eq=False)
class _Pending:
    """A call that has not been answered."""

    on_result: Callable[[msgspec.Raw], object]
    """Decodes the result, in the reader: before anything that follows it on the wire is looked at."""
    done: trio.Event = attrs.field(factory=trio.Event)
    result: object = None
    error: Exception | None = None


class ControlClient:
    """A connection to a supervisor's control channel. Made by `connect`.

    Every method raises RequestError when the server refuses, GapError where history is gone, and ControlClosedError when
    the connection is lost before the answer. A cancelled call leaves the client usable.
    """

    def __init__(
        self, url: str, *, token: Token | None, name: str, reconnect: bool, limits: ClientLimits
    ) -> None:
        self._url = url
        self._address = _Address.parse(url)
        self._token = token
        self._name = name
        self._reconnect = reconnect
        self._limits = limits
        self._ids = itertools.count(1)
        self._link: Link | None = None
        self._changed = trio.Event()
        self._ended: ControlClosedError | None = None
        self._pending: dict[int, _Pending] = {}
        self._orphans: set[int] = (
            set()
        )  # subscribe calls that were cancelled: unsubscribe when they are answered
        self._open: set[EventStream] = set()
        self._subs: dict[str, EventStream] = {}
        self.server: HelloResult | None = None
        """What the server said of itself when the connection was made."""

    def __repr__(self) -> str:
        state = (
            "connected" if self._link is not None else "closed" if self._ended is not None else "connecting"
        )
        return f"<ControlClient {self._url} {state}: {len(self._pending)} calls, {len(self._open)} event streams>"

    # --- methods -----------------------------------------------------------------------------------------------------

    async def start(
        self,
        upstream: str,
        request: Mapping[str, Any] | None = None,
        *,
        prompt: str | None = None,
        model: str | None = None,
        key: str | None = None,
        on_conflict: Literal["attach", "reject", "replace"] = "attach",
        on_detach: OnDetachMessage | None = None,
        deadlines: DeadlinesMessage | None = None,
        retry: RetryMessage | None = None,
        labels: Mapping[str, str] | None = None,
        tenant: str | None = None,
        delivery: Literal["immediate", "durable"] = "immediate",
    ) -> StartResult:
        """Start a stream, or join the one that has the key. Returns once it is recorded in the store.

        Exactly one of `request`, the body for the provider, and `prompt`, a user's words of which the server makes it. `model` wins
        over the one in `request`. Raises ConfigurationError for both or neither.

        Cancelling the call does not stop the stream if the server had begun it: give a `key` to find it again.
        """
        params = _params(
            StartParams,
            upstream=upstream,
            request=None if request is None else dict(request),
            prompt=prompt,
            model=model,
            key=key,
            on_conflict=on_conflict,
            on_detach=on_detach or OnDetachMessage(),
            deadlines=deadlines or DeadlinesMessage(),
            retry=retry or RetryMessage(),
            labels=dict(labels or {}),
            tenant=tenant,
            delivery=delivery,
        )
        return await self.call("stream.start", params, StartResult)

    async def get(self, stream_id: str | None = None, *, key: str | None = None) -> StreamMessage:
        """Return what is known of a stream, live or stored."""
        return await self.call("stream.get", _params(StreamParams, id=stream_id, key=key), StreamMessage)

    async def list(
        self,
        *,
        states: Iterable[str] | None = None,
        labels: Mapping[str, str] | None = None,
        key: str | None = None,
        upstream: str | None = None,
        tenant: str | None = None,
        live: bool | None = None,
        before: str | None = None,
        limit: int = 100,
    ) -> ListResult:
        """Return a page of the matching streams, newest first; `next` of the result is the next page's `before`."""
        params = _params(
            ListParams,
            states=None if states is None else [str(state) for state in states],
            labels=None if labels is None else dict(labels),
            key=key,
            upstream=upstream,
            tenant=tenant,
            live=live,
            before=before,
            limit=limit,
        )
        return await self.call("stream.list", params, ListResult)

    async def cancel(
        self,
        stream_id: str | None = None,
        *,
        key: str | None = None,
        reason: str = "",
        actor: str | None = None,
        mode: Literal["abort", "drain"] | None = None,
        drain_s: float = 10.0,
        drain_tokens: int | None = None,
        wait_s: float = 5.0,
    ) -> CancelResultMessage:
        """Cancel one stream and return what that came to, from its settled state. Idempotent.

        `mode="abort"` ends it at once, `"drain"` lets the answer end by itself first, for at most `drain_s` and `drain_tokens` of
        output (None: no limit but the time). None: what the stream's dialect does.
        """
        params = _params(
            CancelParams,
            id=stream_id,
            key=key,
            reason=reason,
            actor=actor,
            mode=mode,
            drain_s=drain_s,
            drain_tokens=drain_tokens,
            wait_s=wait_s,
        )
        return await self.call("stream.cancel", params, CancelResultMessage)

    async def cancel_many(
        self,
        *,
        labels: Mapping[str, str] | None = None,
        all_streams: bool = False,
        reason: str = "",
        actor: str | None = None,
        mode: Literal["abort", "drain"] | None = None,
        drain_s: float = 10.0,
        drain_tokens: int | None = None,
        wait_s: float = 5.0,
    ) -> tuple[CancelResultMessage, ...]:
        """Cancel every live stream that has all of `labels`, or all there are. The rest as in `cancel`."""
        params = _params(
            CancelParams,
            labels=None if labels is None else dict(labels),
            all=all_streams,
            reason=reason,
            actor=actor,
            mode=mode,
            drain_s=drain_s,
            drain_tokens=drain_tokens,
            wait_s=wait_s,
        )
        return (await self.call("stream.cancel", params, CancelManyResult)).results

    def subscribe(
        self,
        stream_id: str | None = None,
        *,
        key: str | None = None,
        after: After = "start",
        view: View = "events",
        window: int = 1024,
        max_behind: int | None = None,
        resume: bool = True,
    ) -> EventStream:
        """Watch a stream from a position on: `async with client.subscribe(id) as events: async for event in events: …`.

        At most `window` events are held here at any time. With `max_behind`, whenever the iteration is more than that many events
        behind what the server has sent for, the server sends one `snapshot` event in place of what was missed: its `snapshot` has
        the whole answer so far. `resume=False`: a lost connection ends the iteration with
        ControlClosedError even where the client reconnects.
        """
        place = {"epoch": after.epoch, "seq": after.seq} if isinstance(after, Cursor) else after
        params = _params(
            SubscribeParams, id=stream_id, key=key, after=place, view=view, max_behind=max_behind
        )
        return EventStream(self, params, window=window, resume=resume)

    async def wait(
        self, stream_id: str | None = None, *, key: str | None = None, timeout_s: float | None = None
    ) -> Outcome | None:
        """Wait for a stream's durable outcome; None if `timeout_s` ran out first."""
        params = _params(WaitParams, id=stream_id, key=key, timeout_s=timeout_s)
        return (await self.call("stream.wait", params, _Settled)).outcome

    async def snapshot(self, stream_id: str | None = None, *, key: str | None = None) -> SnapshotMessage:
        """Return the answer so far of any stream, live or stored."""
        return await self.call(
            "stream.snapshot", _params(StreamParams, id=stream_id, key=key), SnapshotMessage
        )

    async def trace(self, stream_id: str | None = None, *, key: str | None = None) -> Trace:
        """Return what happened when in any stream, live or stored."""
        return await self.call("stream.trace", _params(StreamParams, id=stream_id, key=key), Trace)

    async def overview(self) -> Overview:
        """Return how the supervisor is now, and how the last hour went."""
        return await self.call("supervisor.overview", NoParams(), Overview)

    async def stats(self) -> dict[str, Any]:
        """Return the figures of the supervisor and of the channel."""
        return await self.call("supervisor.stats", NoParams(), dict[str, Any])

    async def health(self) -> dict[str, Any]:
        """Return whether the supervisor is well, and why not."""
        return await self.call("supervisor.health", NoParams(), dict[str, Any])

    async def reap(self, *, dry_run: bool = False, wait_s: float = 5.0) -> ReapResult:
        """Run the memory manager now, and wait at most `wait_s` for the outcomes; with `dry_run` only say who would go.

        Each entry says whether its outcome was durable by then (`settled`).
        """
        return await self.call(
            "supervisor.reap", _params(ReapParams, dry_run=dry_run, wait_s=wait_s), ReapResult
        )

    async def drain(self, *, timeout_s: float | None = None) -> int:
        """Let the server start nothing more and wait for what is live; return how many streams still are."""
        return (
            await self.call("supervisor.drain", _params(DrainParams, timeout_s=timeout_s), DrainResult)
        ).live

    async def shutdown(self, *, grace_s: float | None = None) -> ShutdownResult:
        """Shut the server down. Live streams may go on for `grace_s` (None: the server's default)."""
        return await self.call(
            "supervisor.shutdown", _params(ShutdownParams, grace_s=grace_s), ShutdownResult
        )

    async def hello(self) -> HelloResult:
        """Ask the server for its version, methods and limits."""
        return await self.call("hello", HelloParams(client=self._name), HelloResult)

    # --- calls -------------------------------------------------------------------------------------------------------

    async def call(self, method: str, params: msgspec.Struct, result: type[_T]) -> _T:
        """Call a method with its parameters, and return its result as a `result`; the types are those of `METHODS`.

            await client.call("stream.get", StreamParams(key="k"), StreamMessage)

        `dict[str, Any]` is the result as it came. For methods that have none of their own here: the others do the same by themselves.
        """
        decoder = msgspec.json.Decoder(result)
        decoded: _T = await self._call(method, params, decoder.decode)
        return decoded

    async def notify(self, method: str, params: msgspec.Struct) -> None:
        """Send a notification: a call that is not answered."""
        link = await self._connected()
        await link.send(_encode({"jsonrpc": "2.0", "method": method, "params": params}))

    async def _call(
        self, method: str, params: msgspec.Struct, on_result: Callable[[msgspec.Raw], object]
    ) -> Any:
        link = await self._connected()
        call_id = next(self._ids)
        pending = self._pending[call_id] = _Pending(on_result)
        sent = False
        try:
            await link.send(_encode({"jsonrpc": "2.0", "id": call_id, "method": method, "params": params}))
            sent = True
            await pending.done.wait()
        finally:
            del self._pending[call_id]
            if sent and not pending.done.is_set() and link is self._link:  # cancelled
                if method == "stream.subscribe":
                    self._orphans.add(call_id)
                self._tell("request.cancel", RequestCancelParams(id=call_id))
        if pending.error is not None:
            raise pending.error
        return pending.result

    def _tell(self, method: str, params: msgspec.Struct) -> None:
        """Send a notification if there is room for it; it only saves the server some work."""
        if self._link is not None:
            with contextlib.suppress(trio.WouldBlock):
                self._link.send_nowait(_encode({"jsonrpc": "2.0", "method": method, "params": params}))

    async def _connected(self) -> Link:
        while self._link is None:
            if self._ended is not None:
                raise ControlClosedError(self._ended.code, self._ended.reason)
            await self._changed.wait()
        return self._link

    # --- event streams -----------------------------------------------------------------------------------------------

    async def open_events(self, events: EventStream) -> None:
        """Subscribe for an event stream that is being entered."""
        await self._subscribe(events)
        self._open.add(events)

    async def _subscribe(self, events: EventStream) -> None:
        def register(raw: msgspec.Raw) -> None:
            result = msgspec.json.decode(raw, type=SubscribeResult)
            self._subs[result.sub] = events
            events.subscribed(result)

        await self._call("stream.subscribe", events.request(), register)

    async def _resume(self, events: EventStream) -> None:
        """Subscribe again on a new connection."""
        try:
            await self._subscribe(events)
        except ControlClosedError:
            return  # the next connection will
        except ControlError as error:
            events.lost(error)
        except GapError as error:
            events.lost(error)

    def close_events(self, events: EventStream) -> None:
        """Unsubscribe an event stream that is being left."""
        self._open.discard(events)
        if events.sub is not None and self._subs.get(events.sub) is events:
            del self._subs[events.sub]
            self._tell("stream.unsubscribe", UnsubscribeParams(sub=events.sub))

    # --- what comes in -----------------------------------------------------------------------------------------------

    def _message(self, text: str | bytes) -> None:
        message = _incoming.decode(text)
        if message.method:
            self._notification(message)
            return
        pending = self._pending.get(message.id) if isinstance(message.id, int) else None
        if pending is None:
            if message.id in self._orphans and message.error is None:
                result = msgspec.json.decode(message.result, type=SubscribeResult)
                self._tell("stream.unsubscribe", UnsubscribeParams(sub=result.sub))
            self._orphans.discard(message.id)
            return
        if message.error is not None:
            pending.error = _request_error(message.error)
        else:
            pending.result = pending.on_result(message.result)
        pending.done.set()

    def _notification(self, message: _Incoming) -> None:
        if message.method == "stream.events":
            notification = _events.decode(message.params)
            events = self._subs.get(notification.sub)
            if events is None:
                self._tell("stream.unsubscribe", UnsubscribeParams(sub=notification.sub))
            else:
                events.take(notification)
                if notification.events and notification.events[-1].kind == "outcome":
                    del self._subs[notification.sub]
                    self._open.discard(events)
        elif message.method in {"stream.gap", "stream.failed"}:
            failed = _failed.decode(message.params)
            events = self._subs.pop(failed.sub, None)
            if events is not None:
                self._open.discard(events)
                events.lost(_request_error(failed.error))

    # --- connections -------------------------------------------------------------------------------------------------

    async def run(self, *, task_status: trio.TaskStatus[None]) -> None:  # noqa: ASYNC114  # started in `connect` only
        """Keep the connection until it is lost for good. Raises what the first attempt fails with."""
        started = False
        pause = self._limits.retry_initial_s
        given_up = trio.current_time() + self._limits.wait_s

        def up() -> None:
            nonlocal started, pause
            pause = self._limits.retry_initial_s
            if not started:
                started = True
                task_status.started()

        while True:
            ending = await self._connection(up)
            if not started:
                if not _refused(ending) or trio.current_time() >= given_up:
                    raise ending
                await trio.sleep(min(pause, max(0.0, given_up - trio.current_time())))
                continue
            closed = (
                ending if isinstance(ending, ControlClosedError) else ControlClosedError(None, str(ending))
            )
            again = self._reconnect and not isinstance(ending, AuthenticationError)
            again = again and not (closed.code is not None and 4500 <= closed.code <= 4999)
            self._down(closed, again=again)
            if not again:
                return
            await trio.sleep(pause * random.uniform(0.5, 1.0))  # noqa: S311  # spreads reconnects; not a secret
            pause = min(pause * 2, self._limits.retry_max_s)

    async def _connection(self, up: Callable[[], None]) -> ControlError:
        """Make one connection and serve it to its end; return why it ended."""
        ending: ControlError | None = None
        try:
            await self._serve(up)
        except* ControlError as group:
            ending = _first(group)
        except* (
            trio_websocket.HandshakeError,
            trio_websocket.ConnectionClosed,
            OSError,
            msgspec.DecodeError,
        ) as group:
            ending = ending or _connect_error(self._url, _first(group))
        except* Exception as group:  # noqa: BLE001  # trio-websocket's reader can raise wsproto's errors
            ending = ending or ControlClosedError(None, f"the connection failed: {_first(group)!r}")
        assert ending is not None, "a connection ends with an exception"
        return ending

    async def _serve(self, up: Callable[[], None]) -> NoReturn:
        limits = self._limits.link
        with trio.CancelScope(deadline=trio.current_time() + self._limits.connect_s) as connecting:
            transport = await self._address.open()
            guard = GuardedStream(transport, client=True, limits=limits)
            try:
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(_cancel_when_over, guard, connecting)
                    headers = [] if self._token is None else [(b"Authorization", self._token.header())]
                    socket = await trio_websocket.wrap_client_stream(
                        nursery,
                        guard,  # type: ignore[arg-type]  # declared too narrowly: any trio.abc.Stream will do
                        self._address.authority,
                        self._address.resource,
                        subprotocols=[SUBPROTOCOL],
                        extra_headers=headers,
                        message_queue_size=8,
                        max_message_size=limits.max_message_bytes,
                        receive_buffer_size=None,
                    )
                    if socket.subprotocol != SUBPROTOCOL:
                        raise ControlClosedError(None, f"{self._url} does not speak {SUBPROTOCOL}")
                    connecting.deadline = math.inf
                    link = Link(socket, guard, limits, client=True)
                    try:
                        await self._use(link, nursery, up)
                    finally:
                        await link.close(NORMAL, "")  # noqa: ASYNC102  # shields and bounds itself
            finally:
                await guard.shut(NORMAL, "")  # noqa: ASYNC102  # shields and bounds itself
        raise ControlClosedError(
            None, f"{self._url} did not answer as a control channel in {self._limits.connect_s:g} s"
        )

    async def _use(self, link: Link, nursery: trio.Nursery, up: Callable[[], None]) -> NoReturn:
        nursery.start_soon(link.run)
        self._link = link
        self._changed.set()
        self._changed = trio.Event()
        for events in self._open:
            nursery.start_soon(self._resume, events)
        nursery.start_soon(self._greet, up)
        while True:
            self._message(await link.receive())

    async def _greet(self, up: Callable[[], None]) -> None:
        try:
            self.server = await self.hello()
        except ControlError:
            return  # the connection is lost, and its own ending says why
        up()

    def _down(self, ending: ControlClosedError, *, again: bool) -> None:
        """Take note that the connection is lost."""
        self._link = None
        self._orphans.clear()
        self._subs.clear()
        if not again:
            self._ended = ending
        for pending in self._pending.values():
            pending.error = ControlClosedError(ending.code, ending.reason)
            pending.done.set()
        for events in list(self._open):
            events.sub = None
            if not (again and events.resume):
                self._open.discard(events)
                events.lost(ControlClosedError(ending.code, ending.reason))
        self._changed.set()
        self._changed = trio.Event()


@attrs.frozen
class _Address:
    host: str
    port: int
    authority: str
    resource: str
    tls: bool

    @classmethod
    def parse(cls, url: str) -> _Address:
        expected = "a URL such as ws://127.0.0.1:7433, without a query: a token goes into `token`"
        parts = urllib.parse.urlsplit(url)
        try:
            port = parts.port
        except ValueError:
            said = parts.netloc.rpartition(":")[2]
            shown = f"port {said}" if said.isdecimal() else "(hidden)"
            raise ConfigurationError("url", shown, "a URL with a port from 1 to 65535") from None
        if (
            parts.scheme not in {"ws", "wss"}
            or not parts.hostname
            or parts.query
            or parts.username is not None
        ):
            raise ConfigurationError("url", f"{parts.scheme}://…", expected)
        tls = parts.scheme == "wss"
        return cls(parts.hostname, port or (443 if tls else 80), parts.netloc, parts.path or "/", tls)

    async def open(self) -> trio.abc.Stream:
        if self.tls:
            return await trio.open_ssl_over_tcp_stream(
                self.host, self.port, https_compatible=True, ssl_context=ssl.create_default_context()
            )
        return await trio.open_tcp_stream(self.host, self.port)


async def _cancel_when_over(guard: GuardedStream, scope: trio.CancelScope) -> None:
    """End an attempt whose server has hung up: trio-websocket would wait on for its answer."""
    await guard.over.wait()
    if scope.deadline != math.inf:
        scope.cancel()


def _params(kind: type[_T], **given: Any) -> _T:
    """Make parameters of what a caller gave, checked as the server would. Raises ConfigurationError."""
    stated = {name: value for name, value in given.items() if value is not None}
    try:
        return msgspec.convert(stated, kind)
    except msgspec.ValidationError as error:
        mistake = find_mistake(error, stated, kind)
        field = mistake.field or "parameters"
        raise ConfigurationError(field, mistake.value, mistake.expected) from None


def _request_error(error: ErrorMessage) -> Exception:
    data = error.data
    if data.get("kind") == "gap":
        return GapError(
            stream_id=data["id"],
            epoch=data["epoch"],
            after_epoch=data["after_epoch"],
            after_seq=data["after_seq"],
            earliest_seq=data["earliest"],
            tail_seq=data["tail"],
        )
    return RequestError(
        error.message,
        code=error.code,
        kind=str(data.get("kind", "unknown")),
        temporary=bool(data.get("temporary", False)),
        retry_after_s=data.get("retry_after_s"),
        data=data,
    )


def _connect_error(url: str, error: BaseException) -> ControlError:
    if isinstance(error, trio_websocket.ConnectionRejected):
        said = (error.body or b"").decode("utf-8", "replace")[:200]
        if error.status_code in {401, 403}:
            return AuthenticationError(f"{url} refused the connection: {said}")
        kind = dict(error.headers or ()).get(b"content-type", b"text/plain").decode("latin-1")
        if not kind.startswith("text/plain"):  # ours are short and plain
            said = "that is an HTTP address, and the control channel has its own: ws://HOST:7433 by default"
        return ControlClosedError(None, f"{url} refused the connection with HTTP {error.status_code}: {said}")
    if isinstance(error, msgspec.DecodeError):
        return ControlClosedError(None, f"{url} sent what is not a message of this protocol: {error}")
    lost = ControlClosedError(None, f"no connection to {url}: {error}")
    lost.__cause__ = error.__cause__  # of a name with several addresses: what each of them said
    return lost


def _refused(ending: ControlError) -> bool:
    """Say whether a connection failed because nobody listens where it should go to."""
    cause = ending.__cause__
    said = cause.exceptions if isinstance(cause, BaseExceptionGroup) else [cause]
    return all(isinstance(one, ConnectionRefusedError) for one in said)


def _first(group: BaseExceptionGroup[Any]) -> Any:
    first = group.exceptions[0]
    return _first(first) if isinstance(first, BaseExceptionGroup) else first


@contextlib.asynccontextmanager
async def connect(
    url: str,
    token: str | None = None,
    *,
    name: str = "",
    reconnect: bool = False,
    limits: ClientLimits | None = None,
) -> AsyncIterator[ControlClient]:
    """Connect to a control channel for the length of an `async with` block.

    `name` is shown in the server's log and as the actor of cancels. With `reconnect` a lost connection is made again.

    Raises ConfigurationError for a URL or token that cannot be right, AuthenticationError if the server refuses the token,
    and ControlClosedError if there is no connection to be had. Leaving closes the connection; streams go on.
    """
    client = ControlClient(
        url,
        token=None if token is None else Token(token),
        name=name,
        reconnect=reconnect,
        limits=ClientLimits() if limits is None else limits,
    )
    try:
        async with trio.open_nursery() as nursery:
            await nursery.start(client.run)
            try:
                yield client
            finally:
                nursery.cancel_scope.cancel()
    except BaseExceptionGroup as group:
        _reraise(group)
        raise


def _reraise(group: BaseExceptionGroup[BaseException]) -> None:
    """Raise a group's one exception as it was before the nursery wrapped it; return if there are several."""
    if len(group.exceptions) > 1:
        return
    inner = group.exceptions[0]
    context = inner.__context__
    try:
        raise inner
    finally:
        inner.__context__ = context
        del inner, group
