"""The heart: streams, their journals and clocks, the memory manager, and the supervisor that owns them."""

from supervisor.streams.journal import Cursor
from supervisor.streams.lifecycle import (
    LIVE_STATES,
    REASONS,
    TERMINAL_STATES,
    TRANSITIONS,
    Outcome,
    State,
    Verdict,
)
from supervisor.streams.memory import Holder
from supervisor.streams.observers import Observer
from supervisor.streams.opening import open_supervisor
from supervisor.streams.output import Output
from supervisor.streams.report import (
    CancelOutcome,
    CancelResult,
    Health,
    MemoryStatistics,
    PoolStatistics,
    Reaped,
    ReapReport,
    StreamInfo,
    SupervisorStatistics,
)
from supervisor.streams.spec import (
    Deadlines,
    Delivery,
    Limits,
    MemoryGroup,
    MemoryPolicy,
    OnConflict,
    OnDetach,
    Source,
    monotonic_ids,
)
from supervisor.streams.stream import Stream
from supervisor.streams.subscription import After, Subscription
from supervisor.streams.supervisor import Started, Supervisor

__all__ = [
    "LIVE_STATES",
    "REASONS",
    "TERMINAL_STATES",
    "TRANSITIONS",
    "After",
    "CancelOutcome",
    "CancelResult",
    "Cursor",
    "Deadlines",
    "Delivery",
    "Health",
    "Holder",
    "Limits",
    "MemoryGroup",
    "MemoryPolicy",
    "MemoryStatistics",
    "Observer",
    "OnConflict",
    "OnDetach",
    "Outcome",
    "Output",
    "PoolStatistics",
    "ReapReport",
    "Reaped",
    "Source",
    "Started",
    "State",
    "Stream",
    "StreamInfo",
    "Subscription",
    "Supervisor",
    "SupervisorStatistics",
    "Verdict",
    "monotonic_ids",
    "open_supervisor",
]
