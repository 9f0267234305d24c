"""HTTP to the provider: one connection per stream, on trio."""

from supervisor.upstream.catalog import Credential, Upstream, discover
from supervisor.upstream.circuit import Circuit, CircuitPolicy, Circuits, CircuitStatistics
from supervisor.upstream.retry import RetryPolicy
from supervisor.upstream.source import Answered, HttpSource
from supervisor.upstream.transport import Exchange, StreamTransport, TransportStatistics

__all__ = [
    "Answered",
    "Circuit",
    "CircuitPolicy",
    "CircuitStatistics",
    "Circuits",
    "Credential",
    "Exchange",
    "HttpSource",
    "RetryPolicy",
    "StreamTransport",
    "TransportStatistics",
    "Upstream",
    "discover",
]
