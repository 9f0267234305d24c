"""Supervise token streams on trio: one nursery per stream, one ending, nothing lost.

This is the embedding API. `open_supervisor` gives a supervisor for the length of a block; any `async def source(out)` becomes
a supervised stream. The HTTP sources are in `supervisor.upstream`, the daemon's control channel in `supervisor.control`,
testing helpers in `supervisor.testing`.
"""

from supervisor.dialects import Choice, Delta, Fault, Snapshot, ToolCall, ToolCallDelta, Usage
from supervisor.errors import (
    AdmissionError,
    ConfigurationError,
    GapError,
    KeyConflictError,
    StoreError,
    StreamSealedError,
    SupervisorClosedError,
    SupervisorError,
    UnknownStreamError,
)
from supervisor.stores import Event, MemoryStore
from supervisor.streams import (
    CancelResult,
    Cursor,
    Deadlines,
    Limits,
    MemoryPolicy,
    OnDetach,
    Outcome,
    Output,
    ReapReport,
    Source,
    Started,
    State,
    Stream,
    StreamInfo,
    Subscription,
    Supervisor,
    open_supervisor,
)

__all__ = [
    "AdmissionError",
    "CancelResult",
    "Choice",
    "ConfigurationError",
    "Cursor",
    "Deadlines",
    "Delta",
    "Event",
    "Fault",
    "GapError",
    "KeyConflictError",
    "Limits",
    "MemoryPolicy",
    "MemoryStore",
    "OnDetach",
    "Outcome",
    "Output",
    "ReapReport",
    "Snapshot",
    "Source",
    "Started",
    "State",
    "StoreError",
    "Stream",
    "StreamInfo",
    "StreamSealedError",
    "Subscription",
    "Supervisor",
    "SupervisorClosedError",
    "SupervisorError",
    "ToolCall",
    "ToolCallDelta",
    "UnknownStreamError",
    "Usage",
    "open_supervisor",
]
