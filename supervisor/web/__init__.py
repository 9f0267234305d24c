"""The HTTP front: the SSE twin of the control channel, the gateway, the dashboard and metrics, over one ASGI stack."""
