"""What the simulated upstream remembers: requests as they arrived, connections as they ended, and what was answered."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, Literal

import attrs
import msgspec
import trio

from supervisor.testing.upstream.answers import Answer
from supervisor.testing.upstream.script import Script
from supervisor.testing.upstream.stored import StoredResponse

__all__ = ["UpstreamConnection", "UpstreamExchange", "UpstreamRequest"]


@attrs.frozen(kw_only=True)
class UpstreamRequest:
    """One request as it arrived."""

    number: int
    """From 1, over all connections."""
    connection: int
    method: str
    target: str
    headers: tuple[tuple[str, str], ...]
    """Names in lower case, in the order sent."""
    body: bytes
    at: float
    """By trio's clock."""

    def header(self, name: str, default: str = "") -> str:
        """Return the first value of a header."""
        return next((value for key, value in self.headers if key == name.lower()), default)

    def json(self) -> Any:
        """Return the body, decoded. Raises msgspec.DecodeError."""
        return msgspec.json.decode(self.body)

    @property
    def credential(self) -> str:
        """The bearer token or `x-api-key` of the request."""
        scheme, _, token = self.header("authorization").partition(" ")
        return token if scheme.lower() == "bearer" else self.header("x-api-key") or self.header("api-key")


@attrs.define(eq=False, kw_only=True)
class UpstreamConnection:
    """One connection, seen from the upstream's side. Times are by trio's clock."""

    number: int
    opened_at: float
    closed_at: float | None = None
    closed_monotonic_s: float | None = None
    """`time.monotonic()` at the close, comparable with another process on the same machine."""
    closed_by: Literal["eof", "reset", "upstream"] | None = None
    """How it ended: the client's FIN, the client's RST (or its death while we wrote), or our own doing. None: open."""
    bytes_received: int = 0
    bytes_sent: int = 0
    events_sent: int = 0
    """Token events of all answers on this connection."""
    requests: int = 0
    _lot: trio.lowlevel.ParkingLot = attrs.field(factory=trio.lowlevel.ParkingLot, init=False, repr=False)

    @property
    def open(self) -> bool:
        """Whether neither side has closed it."""
        return self.closed_by is None

    async def wait_closed(self) -> None:
        """Wait until the upstream has seen the end of the connection. May be cancelled."""
        await self._wait_until(lambda: not self.open)

    async def wait_events(self, count: int) -> None:
        """Wait until so many events were written, or the connection has ended. May be cancelled."""
        await self._wait_until(lambda: self.events_sent >= count or not self.open)

    async def _wait_until(self, true: Callable[[], bool]) -> None:
        await trio.lowlevel.checkpoint()
        while not true():
            await self._lot.park()

    def _sent(self, nbytes: int, events: int) -> None:
        self.bytes_sent += nbytes
        self.events_sent += events
        self._lot.unpark_all()

    def _closed(self, by: Literal["eof", "reset", "upstream"]) -> None:
        if self.closed_by is None:
            self.closed_by = by
            self.closed_at = trio.current_time()
            self.closed_monotonic_s = time.monotonic()
            self._lot.unpark_all()


@attrs.define(eq=False, kw_only=True)
class UpstreamExchange:
    """One request, and what became of its answer: a line of the ledger."""

    request: UpstreamRequest
    dialect: str = ""
    """The provider's shape in which it was answered; empty if there was no such route."""
    script: Script = attrs.field(factory=Script)
    answer: Answer | None = None
    """What was to be told; None: an error, or nothing of an answer."""
    streamed: bool = False
    resumed_after: int | None = None
    """How many events of the answer were left out, as the client said that it had them; None: it said nothing."""
    response: StoredResponse | None = None
    """The stored response that it made, resumed, retrieved or cancelled."""
    words_sent: int = 0
    events_sent: int = 0
    """Events of any kind; what a fault sends does not count."""
    ended: Literal["whole", "upstream", "client"] | None = None
    """Whether the answer was sent as planned, cut by the script, or left by the client. None: under way."""

    @property
    def begun_with(self) -> int:
        """How many words of the answer the request gave as its beginning."""
        return 0 if self.answer is None else self.answer.start

    @property
    def billed(self) -> int | None:
        """How many words were generated for this request so far, reasoning not counted; None: without end.

        What is generated in the background belongs to the request that began it.
        """
        answer = self.answer
        if answer is None or self.resumed_after:
            return 0
        if self.response is not None and self.response.answer.background:
            return self.response.words(trio.current_time())
        if self.script.runs_on or not self.streamed:
            return answer.count
        return self.words_sent

    def to_json_object(self) -> dict[str, Any]:
        """Return it as JSON-able data, as in the report."""
        return {
            "number": self.request.number,
            "method": self.request.method,
            "target": self.request.target,
            "dialect": self.dialect,
            "resumed_after": self.resumed_after,
            "begun_with": self.begun_with,
            "response_id": None if self.response is None else self.response.id,
            "cancelled": self.response is not None and self.response.cancelled_at is not None,
            "words_sent": self.words_sent,
            "events_sent": self.events_sent,
            "billed": self.billed,
            "ended": self.ended,
        }
