"""Sans-IO: wire events in, deltas, terminal marker, usage and errors out. One file per provider."""

from supervisor.dialects.base import (
    Choice,
    Delta,
    Dialect,
    Fault,
    FaultKind,
    Reader,
    Snapshot,
    ToolCall,
    ToolCallDelta,
    UnparseableError,
    Usage,
)
from supervisor.dialects.catalog import BUILTIN, find
from supervisor.dialects.fold import Fold
from supervisor.dialects.native import NATIVE

__all__ = [
    "BUILTIN",
    "NATIVE",
    "Choice",
    "Delta",
    "Dialect",
    "Fault",
    "FaultKind",
    "Fold",
    "Reader",
    "Snapshot",
    "ToolCall",
    "ToolCallDelta",
    "UnparseableError",
    "Usage",
    "find",
]
