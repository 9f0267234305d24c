"""A simulated upstream: a provider on loopback that speaks every dialect, with scripted faults, which records what it saw."""

from __future__ import annotations

from supervisor.testing.upstream.asked import SCRIPT_HEADER
from supervisor.testing.upstream.records import UpstreamConnection, UpstreamExchange, UpstreamRequest
from supervisor.testing.upstream.script import PRESETS, ErrorShape, FaultName, Script, script_for_model
from supervisor.testing.upstream.server import AcceptMode, SimulatedUpstream
from supervisor.testing.upstream.stored import StoredResponse
from supervisor.testing.upstream.unreachable import unreachable_url

__all__ = [
    "PRESETS",
    "SCRIPT_HEADER",
    "AcceptMode",
    "ErrorShape",
    "FaultName",
    "Script",
    "SimulatedUpstream",
    "StoredResponse",
    "UpstreamConnection",
    "UpstreamExchange",
    "UpstreamRequest",
    "script_for_model",
    "unreachable_url",
]
