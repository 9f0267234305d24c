"""The SSE twin of the control channel: streams over plain HTTP, for curl and for a browser's `EventSource`.

What is asked and answered is what the control channel knows (`supervisor.control.messages`, `supervisor.control.answers`); here
it is given paths, statuses and, for events, the wire format of the WHATWG's server-sent events.

**Not twice, and nothing left out.** Each event has its position as `id: EPOCH-SEQ`; whoever comes again with the last one it got,
as a browser does by itself (`Last-Event-ID`), is given what comes after it. The first thing sent is an `id` without data,
which a client notes and does not show: so also one that lost the connection before its first event, and had asked for what
is new (`after=tail`), goes on from where it stood. Keep-alives are comments and have no `id`.

Under a key there may be another stream by the time that a client comes again, so there a position names its stream too:
`EPOCH-SEQ-STREAM`. One of another stream, or under a key of none, is no place to go on from: see *A gap*.

**The end.** The outcome is the last event. An `EventSource` takes the end of the answer for a lost connection and comes again; one
that has seen the outcome is then told 204, which is how HTTP says to stop (WHATWG HTML, 9.2).

**A gap** is an event, `gap`, not the end: it says from where on the history can be read (`earliest`), and that follows at once. Who
puts the answer together from events forgets what came before it. It is told as an event also at the start, because an
`EventSource` does not show the body of an error.

**A slow reader** holds one batch of events and its position. The socket holds it back; a piece that it does not take for
`send_s` ends its connection, and it can come again. What may be larger than a batch, a snapshot or a long list, is made in turn, by
`large_answers` at a time, which does not depend on how anybody reads. What then waits for its client counts in `answers_bytes`;
what does not fit any more is refused, 503 or as a `failed` event, so that who takes nothing costs others no time. What is small
takes no turn and is not counted.
"""

from __future__ import annotations

import re
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, asynccontextmanager, contextmanager
from typing import Any

import msgspec
import trio
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from supervisor.control import answers
from supervisor.control.messages import (
    CancelParams,
    EventMessage,
    ListParams,
    StartParams,
    SubscribeParams,
)
from supervisor.control.notifications import (
    cut,
    encode_event,
    event_messages,
    snapshot_event,
    text_messages,
)
from supervisor.control.rpc import RpcError, error_for, read_params
from supervisor.errors import GapError, SupervisorError
from supervisor.stores import Event
from supervisor.streams import After, Cursor, Stream, Subscription
from supervisor.web.app import Front, Part, answer, route, which
from supervisor.web.server import WebLimits

__all__ = ["EventStream", "part"]

_ACTOR = "http"
_BATCH_EVENTS = 256
_BATCH_BYTES = 64 << 10
_SMALL_BYTES = 64 << 10
_SMALL_LIST = 100
_RETRY_MS = 1000
_KEEP_ALIVE = b": keep-alive\n\n"
_POSITION = re.compile(r"([1-9][0-9]{0,8})-(0|[1-9][0-9]{0,17})(?:-([!-~]{1,256}))?", re.ASCII)
_EVENT_STREAM = "text/event-stream; charset=utf-8"
_HEADERS = (
    (b"content-type", _EVENT_STREAM.encode()),
    (b"cache-control", b"no-store"),
    (b"x-accel-buffering", b"no"),  # nginx holds answers back unless told otherwise
)
_encode = msgspec.json.Encoder().encode


def part(front: Front) -> Part:
    """Return `/streams` and what is below it, `/health` and `/stats`."""
    supervisor = front.supervisor
    room = _Room(front.limits)

    async def start(request: Request) -> Response:
        params = read_params(msgspec.Raw(await request.body()), StartParams)
        started = await answers.start(supervisor, front.resolve, params)
        status = 201 if started.created else 200
        return answer(started, status, {"location": f"/streams/{started.id}", "x-stream-id": started.id})

    async def listing(request: Request) -> Response:
        params = _list_params(request)
        small = params.limit <= _SMALL_LIST
        return _Large(room, lambda: answers.list_streams(supervisor, params), small=small)

    async def get(request: Request) -> Response:
        return answer(await answers.get(supervisor, which(request)))

    async def snapshot(request: Request) -> Response:
        params = which(request)
        stream = await supervisor.find(params.id, key=params.key)

        async def make() -> object:
            return answers.snapshot_message(stream, await stream.read_snapshot())

        return _Large(room, make, small=_is_small(stream))

    async def events(request: Request) -> Response:
        params, named = _subscribe_params(request)
        stream = await supervisor.find(params.id, key=params.key)
        if request.method == "HEAD":  # no reader
            return Response(headers={"content-type": _EVENT_STREAM})
        return EventStream(stream, params, named, room, keep_alive_s=front.limits.keep_alive_s)

    async def cancel(request: Request) -> Response:
        given = _object(await request.body())
        if "id" in request.path_params:
            for name in given.keys() & {"id", "key", "labels", "all"}:
                raise RpcError("invalid_params", f"{name}: the path says which stream", field=name)
            given |= msgspec.to_builtins(which(request))
        params = read_params(msgspec.Raw(_encode(given)), CancelParams)
        return answer(await answers.cancel(supervisor, params, actor=_ACTOR))

    async def delete(request: Request) -> Response:
        named = which(request)
        params = CancelParams(id=named.id, key=named.key, mode="abort")
        return answer(await answers.cancel(supervisor, params, actor=_ACTOR))

    async def health(_: Request) -> Response:
        return answer(supervisor.health())

    async def stats(_: Request) -> Response:
        return answer(
            {"supervisor": supervisor.statistics(), **{name: told() for name, told in front.stats.items()}}
        )

    return Part(
        routes=[
            route("/streams", GET=listing, POST=start),
            route("/streams/cancel", POST=cancel),
            route("/streams/{id}", GET=get, DELETE=delete),
            route("/streams/{id}/snapshot", GET=snapshot),
            route("/streams/{id}/events", GET=events),
            route("/streams/{id}/cancel", POST=cancel),
            route("/health", GET=health),
            route("/stats", GET=stats),
        ]
    )


# --- what is asked ---------------------------------------------------------------------------------------------------


def _object(body: bytes) -> dict[str, Any]:
    """Read a body that may be left out. Raises RpcError."""
    try:
        return msgspec.json.decode(body or b"{}", type=dict[str, Any])
    except msgspec.ValidationError:
        raise RpcError("invalid_params", "give the parameters as a JSON object", field=None) from None
    except (msgspec.DecodeError, UnicodeError) as error:
        raise RpcError("parse_error", f"not JSON: {error}") from None
    except RecursionError:
        raise RpcError("invalid_params", "nested too deeply", field=None) from None


def _list_params(request: Request) -> ListParams:
    """Read a filter: `state` any number of times, labels as `label.NAME`. Raises RpcError."""
    given: dict[str, Any] = {}
    for name, value in _query(
        request, {"state", "upstream", "tenant", "key", "live", "before", "limit"}, "state", "label."
    ):
        if name == "state":
            given.setdefault("states", []).append(value)
        elif name.startswith("label."):
            given.setdefault("labels", {})[name.removeprefix("label.")] = value
        elif name == "live":
            given[name] = {"true": True, "false": False}.get(value, value)
        else:
            given[name] = _number(value) if name == "limit" else value
    return read_params(msgspec.Raw(_encode(given)), ListParams, one_by_one={"states": "state"})


def _subscribe_params(request: Request) -> tuple[SubscribeParams, str | None]:
    """Read what to watch, and the stream that the position names; a `Last-Event-ID` wins over `after`. Raises RpcError."""
    given: dict[str, Any] = msgspec.to_builtins(which(request))
    for name, value in _query(request, {"after", "view", "max_behind"}):
        given[name] = _number(value) if name == "max_behind" else value
    last = request.headers.get("last-event-id", "")
    if last:
        given["after"] = last
    after = given.get("after", "start")
    named = None
    if after not in {"start", "tail", "snapshot"}:
        position = _POSITION.fullmatch(after)
        if position is None:
            field = "Last-Event-ID" if last else "after"
            raise RpcError(
                "invalid_params",
                f"{field}: expected a position such as 1-42, or in `after` 'start', 'tail' or 'snapshot'",
                field=field,
            )
        given["after"] = {"epoch": int(position[1]), "seq": int(position[2])}
        named = position[3]
    return read_params(msgspec.Raw(_encode(given)), SubscribeParams), named


def _query(request: Request, known: set[str], many: str = "", prefix: str = "") -> Iterator[tuple[str, str]]:
    """Yield the parameters in a query. Raises RpcError for one that is not known, or is given twice."""
    seen: set[str] = set()
    for name, value in request.query_params.multi_items():
        if name not in known and not (prefix and name.startswith(prefix)):
            told = ", ".join(sorted(known)) + (f", {prefix}NAME" if prefix else "")
            raise RpcError(
                "invalid_params", f"{name[:64]}: unknown parameter; known here are: {told}", field=name[:64]
            )
        if name in seen and name != many:
            raise RpcError("invalid_params", f"{name[:64]}: given twice", field=name[:64])
        seen.add(name)
        yield name, value


def _number(value: str) -> int | str:
    """Read a number; what is none stays what it is, and is refused with the rest."""
    return int(value) if value.isascii() and value.isdecimal() and len(value) < 19 else value


# --- what is answered: events ----------------------------------------------------------------------------------------


class _Room:
    """What large answers may take: turns to be made in, and bytes to be held in until their clients have taken them."""

    def __init__(self, limits: WebLimits) -> None:
        self._turns = trio.CapacityLimiter(limits.large_answers)
        self._most = limits.answers_bytes
        self._held = 0

    @asynccontextmanager
    async def turn(self, *, small: bool) -> AsyncIterator[None]:
        """Make an answer in this block. Raises HTTPException 503, if it is not small and there is no room for any."""
        if small:
            yield
            return
        self._check(1)
        async with self._turns:
            self._check(1)
            yield

    @contextmanager
    def holding(self, size: int) -> Iterator[None]:
        """Hold so many bytes for a client. One answer that is larger than all the room may be there by itself.

        Raises HTTPException 503.
        """
        if size <= _SMALL_BYTES:
            yield
            return
        self._check(size)
        self._held += size
        try:
            yield
        finally:
            self._held -= size

    def _check(self, size: int) -> None:
        if self._held and self._held + size > self._most:
            message = "large answers that their clients have yet to take fill all the room there is"
            raise HTTPException(503, message, {"retry-after": "1"})


def _is_small(stream: Stream) -> bool:
    """Whether a snapshot is small, going by the journal that it is made of."""
    nbytes = stream.info().journal_bytes
    return nbytes is not None and nbytes <= _SMALL_BYTES


class _Large(Response):
    """An answer that may be large: made when its turn has come, and counted until it has been sent."""

    def __init__(self, room: _Room, make: Callable[[], Awaitable[object]], *, small: bool) -> None:
        self._room = room
        self._make = make
        self._small = small

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with self._room.turn(small=self._small):
            made = answer(await self._make())
        with self._room.holding(len(made.body)):
            await made(scope, receive, send)


class EventStream(Response):
    """An answer that goes on until the outcome, or until the client leaves; 204 if there is nothing to come."""

    def __init__(
        self,
        stream: Stream,
        params: SubscribeParams,
        named: str | None,
        room: _Room,
        *,
        keep_alive_s: float,
    ) -> None:
        self._stream = stream
        self._params = params
        self._named = named
        self._of = b"" if params.key is None else b"-" + stream.id.encode()
        """What the ids of events end with: under a key, which stream it is."""
        self._room = room
        self._keep_alive_s = keep_alive_s
        self._events: Subscription

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send it. Returns early if the client leaves. Raises SupervisorError, before anything is sent."""
        async with self._room.turn(small=self._params.after != "snapshot" or _is_small(self._stream)):
            first = await self._open()
        if self._events.at_end:
            await Response(status_code=204)(scope, receive, send)
            return
        complete = False
        with ExitStack() as held:
            held.enter_context(self._room.holding(len(first)))
            async with trio.open_nursery() as nursery:
                nursery.start_soon(_until_gone, receive, nursery.cancel_scope)
                await send({"type": "http.response.start", "status": 200, "headers": list(_HEADERS)})
                await send(_body(first))
                del first
                held.close()
                while await self._read(send):
                    pass
                complete = True
                nursery.cancel_scope.cancel(reason="the answer is complete")
        if complete:  # not in the nursery: with the end of an answer comes http.disconnect
            await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _open(self) -> bytes:
        """Find the place to read from; return what is sent at once."""
        stream, place = self._stream, answers.place_of(self._params)
        first = b"retry: %d\n" % _RETRY_MS
        if isinstance(place, Cursor) and self._is_of_another():
            self._events = self._subscribed("start")
            return b"%b\n%b" % (first, self._another(place))
        shown = b""
        if place == "snapshot":
            folded = await stream.read_snapshot()  # it may no longer be in memory
            over = stream.outcome is not None and folded.seq == stream.tail_seq
            place = Cursor(folded.epoch, folded.seq - over)  # the outcome is to follow
            told = answers.snapshot_message(stream, folded)
            shot = EventMessage(
                kind="snapshot", at=time.time(), seq=place.seq, first=1, last=place.seq, snapshot=told
            )
            shown = b"event: snapshot\ndata: %b\n" % encode_event(shot)
        try:
            self._events = self._subscribed(place)
        except GapError as error:
            self._events = self._subscribed(_after_gap(error))
            return b"%b\n%b" % (first, self._gap(error))
        return b"%bid: %b\n%b\n" % (first, self._id(self._events.cursor), shown)

    def _is_of_another(self) -> bool:
        """Whether the position is one of another stream; under a key, also whether it does not say."""
        return self._params.key is not None if self._named is None else self._named != self._stream.id

    def _id(self, at: Cursor) -> bytes:
        return b"%d-%d%b" % (at.epoch, at.seq, self._of)

    def _subscribed(self, place: After) -> Subscription:
        return self._stream.subscribe(place, max_behind=self._params.max_behind)

    async def _read(self, send: Send) -> bool:
        """Send what there is up to the outcome; True if a gap was met, and there is more behind it."""
        with self._events as events:
            while True:
                at, batch = events.cursor, None
                small = not events.far_behind or _is_small(
                    self._stream
                )  # far behind, what comes is a snapshot
                try:
                    with trio.move_on_after(self._keep_alive_s):
                        async with self._room.turn(small=small):
                            batch = await events.next_batch(_BATCH_EVENTS)
                except SupervisorError as error:
                    if isinstance(error, GapError) and (place := _after_gap(error)) != at:
                        await send(_body(self._gap(error)))
                        self._events = self._subscribed(place)
                        return True
                    await send(_body(b"event: failed\ndata: %b\n\n" % _encode(_told(error))))
                    return False
                except HTTPException as error:
                    await send(_body(_full(error)))
                    return False
                if batch is None:
                    await send(_body(_KEEP_ALIVE))
                    continue
                if not batch:
                    return False
                while batch:
                    taken = cut(batch, _BATCH_EVENTS, _BATCH_BYTES)
                    batch = batch[len(taken) :]
                    data = self._encoded(taken, at.seq)
                    if taken[0].kind == "snapshot":
                        try:
                            with self._room.holding(len(data)):
                                del taken
                                await send(_body(data))
                        except HTTPException as error:
                            await send(_body(_full(error)))
                            return False
                    elif data:
                        await send(_body(data))
                del data

    def _encoded(self, events: Sequence[Event], after: int) -> bytes:
        """Return events of one epoch as they are sent. A `snapshot`, made in place of events that were missed, comes alone."""
        epoch = events[0].epoch
        if events[0].kind == "snapshot":
            state = str(self._stream.state)
            messages = [snapshot_event(events[0], after=after, stream_id=self._stream.id, state=state)]
        else:
            text = self._params.view == "text"
            messages = text_messages(events) if text else event_messages(events)
        return b"".join(
            [
                b"id: %b\nevent: %b\ndata: %b\n\n"
                % (self._id(Cursor(epoch, m.seq)), m.kind.encode(), encode_event(m))
                for m in messages
            ]
        )

    def _gap(self, error: GapError, message: str | None = None) -> bytes:
        """Return a gap as an event: who comes again with its id is given what can still be read, and not the gap once more."""
        told = _told(error) if message is None else {**_told(error), "message": message}
        return b"id: %b\nevent: gap\ndata: %b\n\n" % (self._id(_after_gap(error)), _encode(told))

    def _another(self, place: Cursor) -> bytes:
        """Return the gap between a position of another stream and this one, which is read from its start."""
        stream = self._stream
        error = GapError(
            stream_id=stream.id,
            epoch=1,
            after_epoch=place.epoch,
            after_seq=place.seq,
            earliest_seq=1,
            tail_seq=stream.tail_seq,
        )
        whose = (
            "does not say of which stream it is" if self._named is None else f"is one of stream {self._named}"
        )
        return self._gap(
            error, f"position {place.epoch}-{place.seq} {whose}; stream {stream.id} follows from its start"
        )


def _body(data: bytes) -> dict[str, Any]:
    return {"type": "http.response.body", "body": data, "more_body": True}


def _after_gap(error: GapError) -> Cursor:
    return Cursor(error.epoch, error.earliest_seq - 1)


def _full(error: HTTPException) -> bytes:
    """Return what is told to who cannot be sent a snapshot now: to come again."""
    told = {"kind": "overloaded", "message": error.detail, "temporary": True, "retry_after_s": 1}
    return b"event: failed\ndata: %b\n\n" % _encode(told)


def _told(error: Exception) -> Mapping[str, Any]:
    told = error_for(error)
    return {"kind": told.data["kind"], "message": told.message, **told.data}


async def _until_gone(receive: Receive, scope: trio.CancelScope) -> None:
    """Cancel when the client has left; what it still sends is of no interest."""
    while (await receive())["type"] != "http.disconnect":
        pass
    scope.cancel(reason="the client has left")
