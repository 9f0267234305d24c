"""Sans-IO: bytes in, wire events out. Nothing here knows of trio, sockets or providers.

- `http1` cuts the body out of an HTTP/1.1 response
- `framing` tells how a body is to be cut
- `sse`, `ndjson` and `json_array` cut events out of it
- `event` is what they come to
"""

from __future__ import annotations

from supervisor.wire.event import WireEvent
from supervisor.wire.json_array import JSONArrayDecoder
from supervisor.wire.ndjson import NDJSONDecoder
from supervisor.wire.sse import SSEDecoder

__all__ = ["JSONArrayDecoder", "NDJSONDecoder", "SSEDecoder", "WireEvent"]
