"""A simulated upstream: an OpenAI-compatible server on loopback with scripted faults, which records what it saw."""

from __future__ import annotations

from supervisor.testing.upstream.script import PRESETS, ErrorShape, FaultName, Script, script_for_model
from supervisor.testing.upstream.server import (
    AcceptMode,
    SimulatedUpstream,
    UpstreamConnection,
    UpstreamRequest,
    unreachable_url,
)

__all__ = [
    "PRESETS",
    "AcceptMode",
    "ErrorShape",
    "FaultName",
    "Script",
    "SimulatedUpstream",
    "UpstreamConnection",
    "UpstreamRequest",
    "script_for_model",
    "unreachable_url",
]
