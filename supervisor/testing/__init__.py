"""Public helpers for testing: simulated upstreams with faults, conformance of dialects, and the schedule explorer."""

from __future__ import annotations

from supervisor.testing.conformance import ConformanceError, check_dialect
from supervisor.testing.schedule import (
    Bounds,
    DeadlockError,
    Exploration,
    LivelockError,
    NondeterminismError,
    ScheduleError,
    ScheduleFailure,
    Step,
    TrioChangedError,
    explore,
    run,
    run_drawn,
)
from supervisor.testing.upstream import Script, SimulatedUpstream

__all__ = [
    "Bounds",
    "ConformanceError",
    "DeadlockError",
    "Exploration",
    "LivelockError",
    "NondeterminismError",
    "ScheduleError",
    "ScheduleFailure",
    "Script",
    "SimulatedUpstream",
    "Step",
    "TrioChangedError",
    "check_dialect",
    "explore",
    "run",
    "run_drawn",
]
