"""`[web]`: what the HTTP front is told."""

from __future__ import annotations

import attrs

from supervisor.errors import ConfigurationError
from supervisor.web.app import WebAccess
from supervisor.web.server import WebLimits

__all__ = ["DEFAULT_WEB_PORT", "WebConfig"]

DEFAULT_WEB_PORT = 7434


@attrs.frozen(kw_only=True)
class WebConfig:
    """`[web]`: where HTTP is served. The token is that of `[control]`."""

    host: str = "127.0.0.1"
    """The address to listen on. Beyond loopback only with a token."""
    port: int | None = DEFAULT_WEB_PORT
    """0: any free port; the ready line says which. `"none"`: no HTTP."""
    origins: tuple[str, ...] = ()
    """Other web origins whose pages may call, such as `https://example.org`."""
    hosts: tuple[str, ...] = ()
    """Names it is reached by. Without them: those of loopback, or any if there is a token."""
    limits: WebLimits = attrs.field(factory=WebLimits)
    """`[web.limits]`: what bounds clients."""

    def __attrs_post_init__(self) -> None:
        if self.port is not None and not 0 <= self.port <= 65535:
            raise ConfigurationError("port", self.port, "a port: 0 (any free one) to 65535, or None")
        WebAccess(origins=self.origins)  # raises for what is no origin
