"""Sans-IO: bytes in, wire events out. Nothing here knows of trio, sockets or providers.

- `http1` cuts the body out of an HTTP/1.1 response
- `sse` cuts events out of an event-stream body
- `event` is what they come to
"""

from __future__ import annotations

from supervisor.wire.event import WireEvent
from supervisor.wire.sse import SSEDecoder

__all__ = ["SSEDecoder", "WireEvent"]
