"""A subscription, seen from the client: events in order, credit granted as they are consumed, the place kept for a resume.

What has been received and not consumed never exceeds the window: the credit granted is the window less what is held. Credit
is counted in journal events, in either view, and is given back when all of a notification has been handed out. A snapshot that
the server sends in place of many events counts as one.
"""

from __future__ import annotations

import base64
from collections import deque
from collections.abc import Iterable
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

import msgspec
import trio

from supervisor.control.messages import (
    CreditParams,
    CursorMessage,
    EventMessage,
    EventsNotification,
    SnapshotMessage,
    SubscribeParams,
    SubscribeResult,
)
from supervisor.errors import ConfigurationError
from supervisor.streams import Cursor

if TYPE_CHECKING:
    from supervisor.control.client import ControlClient

__all__ = ["EventStream", "payload_of"]


def _cost(notification: EventsNotification) -> int:
    """Return what a notification costs in credit."""
    if notification.events and notification.events[0].kind == "snapshot":
        return 1
    return notification.last - notification.first + 1


def payload_of(event: EventMessage) -> bytes:
    """Return the upstream's payload of a `data` event, exactly as it was received."""
    if event.data_b64 is not None:
        return base64.b64decode(event.data_b64)
    return (event.data or "").encode()


class EventStream:
    """A subscription, seen from the client: enter it with `async with`, then iterate; the outcome is the last event.

    Iterating raises GapError when retention has removed what comes next, RequestError when the server ends the subscription
    for another reason, and ControlClosedError when the connection is lost and is not made again. Leaving unsubscribes; the
    stream itself goes on.
    """

    def __init__(self, client: ControlClient, params: SubscribeParams, *, window: int, resume: bool) -> None:
        if window < 1:
            raise ConfigurationError("window", window, "a whole number, 1 or more")
        self._client = client
        self._params = params
        self._window = window
        self.resume = resume
        self.sub: str | None = None
        self.id: str = params.id or ""
        """The stream's id, once entered."""
        self.state = ""
        """The stream's state when it was subscribed to."""
        self.snapshot: SnapshotMessage | None = None
        """With `after="snapshot"`: the answer up to where the events start."""
        self._received: Cursor | None = None
        self._handed_out: Cursor | None = None
        self._notifications: deque[EventsNotification] = deque()
        self._current: Iterable[EventMessage] = iter(())
        self._current_cost = 0
        self._held = 0  # credit of what was received and not consumed
        self._owed = 0  # credit consumed and not granted again
        self._arrived = trio.Event()
        self._error: Exception | None = None
        self._over = False
        self._entered = False

    @property
    def cursor(self) -> Cursor | None:
        """The position after the last event handed out: subscribe after it to go on. None before it is entered."""
        return self._handed_out

    async def __aenter__(self) -> Self:
        if self._entered:
            raise RuntimeError(
                "an event stream can be entered once; subscribe again, after its cursor, to go on"
            )
        self._entered = True
        try:
            await self._client.open_events(self)
        except BaseException:
            self._client.close_events(self)
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._over = True
        self._client.close_events(self)

    def __aiter__(self) -> Self:
        if not self._entered:
            raise RuntimeError("enter the event stream first: `async with client.subscribe(...) as events:`")
        return self

    async def __anext__(self) -> EventMessage:
        await trio.lowlevel.checkpoint_if_cancelled()
        while True:
            for event in self._current:
                self._handed_out = Cursor(self._epoch, event.seq)
                if event.kind == "outcome":
                    self._over = True
                return event
            self._held -= self._current_cost
            self._owed += self._current_cost
            self._current_cost = 0
            if self._owed * 2 >= self._window and not self._over:
                await self._grant()
            if self._notifications:
                notification = self._notifications.popleft()
                self._current = iter(notification.events)
                self._current_cost = _cost(notification)
                self._epoch = notification.epoch
            elif self._error is not None:
                raise self._error
            elif self._over:
                raise StopAsyncIteration
            else:
                self._arrived = trio.Event()
                await self._arrived.wait()

    _epoch = 1

    async def _grant(self) -> None:
        sub, owed = self.sub, self._owed
        if sub is not None:
            await self._client.notify("stream.credit", CreditParams(sub=sub, credit=owed))
            if self.sub == sub:  # a new subscription has started with full credit meanwhile
                self._owed -= owed

    # --- called by the client ----------------------------------------------------------------------------------------

    def request(self) -> SubscribeParams:
        """Return what to subscribe with, now: after the last event received."""
        credit = max(0, self._window - self._held)
        changes: dict[str, Any] = {"credit": credit}
        if self._received is not None:
            changes["after"] = CursorMessage(epoch=self._received.epoch, seq=self._received.seq)
        if self.id:
            changes |= {"id": self.id, "key": None}
        return msgspec.structs.replace(self._params, **changes)

    def subscribed(self, result: SubscribeResult) -> None:
        """Take the server's answer."""
        self.sub, self.id, self.state = result.sub, result.id, result.state
        self._owed = 0
        if self._received is None:
            self._received = self._handed_out = Cursor(result.epoch, result.from_)
            self.snapshot = result.snapshot
        if result.from_ >= result.tail and result.state in {"completed", "failed", "cancelled", "expired"}:
            self.lost(None)  # the outcome lies before where we start: nothing will follow

    def take(self, notification: EventsNotification) -> None:
        """Take events."""
        self._received = Cursor(notification.epoch, notification.last)
        self._held += _cost(notification)
        self._notifications.append(notification)
        self._arrived.set()

    def lost(self, error: Exception | None) -> None:
        """Take note that nothing more will come; None: because all has come."""
        if error is None:
            self._over = True
        elif self._error is None and not self._over:
            self._error = error
        self._arrived.set()
