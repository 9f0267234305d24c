"""Sans-IO: wire events in, deltas, terminal marker, usage and errors out. One file per provider."""

from supervisor.dialects.base import (
    Choice,
    Delta,
    Dialect,
    Fault,
    Reader,
    Snapshot,
    ToolCall,
    ToolCallDelta,
    UnparseableError,
    Usage,
)
from supervisor.dialects.fold import Fold

__all__ = [
    "Choice",
    "Delta",
    "Dialect",
    "Fault",
    "Fold",
    "Reader",
    "Snapshot",
    "ToolCall",
    "ToolCallDelta",
    "UnparseableError",
    "Usage",
]
