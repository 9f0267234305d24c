"""HTTP to the provider: one connection per stream, on trio."""

from supervisor.upstream.transport import Exchange, StreamTransport, TransportStatistics

__all__ = ["Exchange", "StreamTransport", "TransportStatistics"]
