"""Public helpers for testing: simulated upstreams with faults, and the schedule explorer."""

from __future__ import annotations

from supervisor.testing.upstream import Script, SimulatedUpstream

__all__ = ["Script", "SimulatedUpstream"]
