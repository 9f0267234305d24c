"""Every error this package raises, split by whose fault it is.

One base class, `SupervisorError`. Below it:

- the caller's: `ConfigurationError`, `UnknownStreamError`, `KeyConflictError`, `AdmissionError`, `GapError`,
  `StreamSealedError`, `SupervisorClosedError`
- the upstream's: `UpstreamError` and its kinds
- the store's: `StoreError` and its kinds
- the control channel's: `ControlError` and its kinds

Each carries attributes, so that nothing has to be parsed out of a message, and its message says what happened, what was
kept and what to do. How a stream ended is never an exception: it is an `Outcome`.
"""

from __future__ import annotations

from typing import Any

__all__ = [
    "AdmissionError",
    "AuthenticationError",
    "ConfigurationError",
    "ConnectError",
    "ControlClosedError",
    "ControlError",
    "GapError",
    "KeyConflictError",
    "RemoteProtocolError",
    "RequestError",
    "StoreCorruptError",
    "StoreError",
    "StoreLockedError",
    "StoreUnavailableError",
    "StreamSealedError",
    "SupervisorClosedError",
    "SupervisorError",
    "UnknownStreamError",
    "UpstreamClosedError",
    "UpstreamError",
]


class SupervisorError(Exception):
    """The base of every error raised by this package."""


# --- the caller's ----------------------------------------------------------------------------------------------------


class ConfigurationError(SupervisorError, ValueError):
    """An option has a value it cannot have: names the field, the value and what would be right.

    told: what is wrong, where "VALUE is not valid" does not say it.
    """

    def __init__(self, field: str, value: object, expected: str, *, told: str | None = None) -> None:
        super().__init__(f"{field}: {told or f'{_shown(value)} is not valid'}; expected {expected}")
        self.field = field
        self.value = value
        self.expected = expected
        self.told = told


class UnknownStreamError(SupervisorError, LookupError):
    """No stream has this id or key, neither live nor in the store."""

    def __init__(self, *, stream_id: str | None = None, key: str | None = None) -> None:
        what = f"id {stream_id!r}" if stream_id is not None else f"key {key!r}"
        super().__init__(f"no stream has the {what}; it may never have existed, or retention has removed it")
        self.stream_id = stream_id
        self.key = key


class KeyConflictError(SupervisorError):
    """The key is claimed by another stream and the start asked for `on_conflict="reject"`."""

    def __init__(self, key: str, *, stream_id: str, state: str) -> None:
        super().__init__(
            f"the key {key!r} is claimed by stream {stream_id} ({state}); "
            f'start with on_conflict="attach" to join it or "replace" to end it'
        )
        self.key = key
        self.stream_id = stream_id
        self.state = state


class AdmissionError(SupervisorError):
    """At a limit, by default that of live streams: nothing was started; try again after `retry_after_s`."""

    def __init__(self, *, live: int, limit: int, retry_after_s: float, what: str = "live streams") -> None:
        super().__init__(
            f"there are {live} {what} and the limit is {limit}; nothing was started, retry in {retry_after_s:g} s"
        )
        self.what = what
        self.live = live
        self.limit = limit
        self.retry_after_s = retry_after_s


class GapError(SupervisorError):
    """The history after a cursor is gone: reading on from it would skip events without saying so.

    `earliest_seq` is the first event that can still be read and `tail_seq` the last one there is, both in `epoch`.
    """

    def __init__(
        self,
        *,
        stream_id: str,
        epoch: int,
        after_epoch: int,
        after_seq: int,
        earliest_seq: int,
        tail_seq: int,
    ) -> None:
        gone = (
            f"the events after ({after_epoch}, {after_seq}) are gone"
            if after_seq < earliest_seq
            else f"({after_epoch}, {after_seq}) is no position in its history (any more)"
        )
        super().__init__(
            f"stream {stream_id}: {gone}; epoch {epoch} can be read from seq {earliest_seq} to {tail_seq}; "
            f"take a snapshot, or subscribe after ({epoch}, {earliest_seq - 1})"
        )
        self.stream_id = stream_id
        self.epoch = epoch
        self.after_epoch = after_epoch
        self.after_seq = after_seq
        self.earliest_seq = earliest_seq
        self.tail_seq = tail_seq


class StreamSealedError(SupervisorError):
    """The stream has ended: nothing can be added to it. A source that sees this has been stopped and should return."""

    def __init__(self, stream_id: str) -> None:
        super().__init__(f"stream {stream_id} has been sealed; nothing more can be added to it")
        self.stream_id = stream_id


class SupervisorClosedError(SupervisorError):
    """The supervisor accepts no new streams: it is draining, shutting down or closed."""

    def __init__(self, state: str) -> None:
        super().__init__(f"the supervisor is {state} and accepts no new streams")
        self.state = state


# --- the upstream's --------------------------------------------------------------------------------------------------


class UpstreamError(SupervisorError):
    """The provider, or the way to it, failed."""


class ConnectError(UpstreamError):
    """No connection: name resolution, TCP, TLS or the proxy failed. Nothing of the request was sent."""


class UpstreamClosedError(UpstreamError):
    """The connection was closed or reset in the middle. `sent` tells whether the request may have been processed."""

    def __init__(self, message: str, *, sent: bool) -> None:
        super().__init__(message)
        self.sent = sent


class RemoteProtocolError(UpstreamError):
    """The upstream broke its protocol, or a limit on what we accept from it."""


# --- the store's -----------------------------------------------------------------------------------------------------


class StoreError(SupervisorError):
    """The store failed. The message says what was kept and what to do."""


class StoreLockedError(StoreError):
    """Another process holds the store."""


class StoreUnavailableError(StoreError):
    """The store cannot write at present, so that nothing new could be recorded: nothing was started; try again after `retry_after_s`."""

    def __init__(self, why: str, *, retry_after_s: float) -> None:
        super().__init__(f"the store cannot write ({why}); nothing was started, retry in {retry_after_s:g} s")
        self.retry_after_s = retry_after_s


class StoreCorruptError(StoreError):
    """The store's file is damaged, or is not one of ours."""


# --- the control channel's -------------------------------------------------------------------------------------------


class ControlError(SupervisorError):
    """A fault of the control channel."""


class AuthenticationError(ControlError):
    """The token is missing or wrong, or the Origin is not allowed."""


class ControlClosedError(ControlError):
    """The connection is gone. `code` is the WebSocket close code: 4500 to 4999 mean do not reconnect."""

    def __init__(self, code: int | None, reason: str) -> None:
        super().__init__(f"the control connection is closed ({code}): {reason or 'no reason given'}")
        self.code = code
        self.reason = reason


class RequestError(ControlError):
    """The server answered a request with an error: `code` and `kind` as in the protocol reference."""

    def __init__(
        self,
        message: str,
        *,
        code: int,
        kind: str,
        temporary: bool = False,
        retry_after_s: float | None = None,
        data: dict[str, Any] | None = None,
    ) -> None:
        super().__init__(message)
        self.code = code
        self.kind = kind
        self.temporary = temporary
        self.retry_after_s = retry_after_s
        self.data = data or {}


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 200 else f"{text[:200]}… ({len(text)} characters)"
