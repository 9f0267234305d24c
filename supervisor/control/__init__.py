"""The control channel: JSON-RPC 2.0 over WebSocket, its server and its client library."""

from supervisor.control.auth import Access, Token
from supervisor.control.client import ClientLimits, ControlClient, connect
from supervisor.control.event_stream import EventStream, payload_of
from supervisor.control.link import LinkLimits
from supervisor.control.messages import (
    SUBPROTOCOL,
    CancelResultMessage,
    CloseCode,
    CursorMessage,
    DeadlinesMessage,
    EventMessage,
    HelloResult,
    ListResult,
    OnDetachMessage,
    ReapResult,
    RetryMessage,
    ShutdownParams,
    ShutdownResult,
    SnapshotMessage,
    StartParams,
    StartResult,
    StreamMessage,
)
from supervisor.control.server import (
    ControlLimits,
    ControlServer,
    ControlStatistics,
    Resolve,
    Resolved,
    serve,
)
from supervisor.control.session import SessionLimits

__all__ = [
    "SUBPROTOCOL",
    "Access",
    "CancelResultMessage",
    "ClientLimits",
    "CloseCode",
    "ControlClient",
    "ControlLimits",
    "ControlServer",
    "ControlStatistics",
    "CursorMessage",
    "DeadlinesMessage",
    "EventMessage",
    "EventStream",
    "HelloResult",
    "LinkLimits",
    "ListResult",
    "OnDetachMessage",
    "ReapResult",
    "Resolve",
    "Resolved",
    "RetryMessage",
    "SessionLimits",
    "ShutdownParams",
    "ShutdownResult",
    "SnapshotMessage",
    "StartParams",
    "StartResult",
    "StreamMessage",
    "Token",
    "connect",
    "payload_of",
    "serve",
]
