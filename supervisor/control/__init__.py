"""The control channel: JSON-RPC 2.0 over WebSocket."""
