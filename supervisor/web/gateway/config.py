"""`[gateway]`: where requests go, whose they are, and what becomes of an answer whose client has left."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, Literal, get_args

import attrs

from supervisor.control.auth import Token
from supervisor.errors import ConfigurationError
from supervisor.upstream.catalog import Credential

__all__ = ["GatewayClient", "GatewayConfig", "GatewayRoute", "OnDisconnect"]

OnDisconnect = Literal["cancel", "keep"]

_MAX_NAME_CHARS = 256
_SECRET_HEADERS = frozenset(
    {"authorization", "proxy-authorization", "cookie", "x-api-key", "x-goog-api-key", "api-key"}
)


def _not_negative(instance: object, attribute: attrs.Attribute[Any], value: float | None) -> None:
    del instance
    if value is not None and not 0 <= value < float("inf"):
        raise ConfigurationError(attribute.name, value, "0 or more")


def _positive(instance: object, attribute: attrs.Attribute[Any], value: float) -> None:
    del instance
    if not 0 < value < float("inf"):
        raise ConfigurationError(attribute.name, value, "a number above 0")


def _policy(instance: object, attribute: attrs.Attribute[Any], value: str | None) -> None:
    del instance
    if value is not None and value not in get_args(OnDisconnect):
        raise ConfigurationError(attribute.name, value, "'cancel' or 'keep'")


@attrs.frozen(kw_only=True)
class GatewayRoute:
    """`[[gateway.routes]]`: where requests for some models go. The first that fits is taken."""

    models: tuple[str, ...] = ("*",)
    """Patterns of names: `*` stands for anything, `?` for a character, `[ab]` for one of some."""
    upstream: str
    """The name of an upstream of the provider's family that the client speaks to; those of others are passed over."""
    on_disconnect: OnDisconnect | None = attrs.field(default=None, validator=_policy)
    """In place of the gateway's."""
    grace_s: float | None = attrs.field(default=None, validator=_not_negative)
    """In place of the gateway's."""


@attrs.frozen(kw_only=True)
class GatewayClient:
    """`[[gateway.clients]]`: a key that clients show, and the tenant that they are by it."""

    tenant: str
    """On whose behalf their streams are, for limits, figures and retention."""
    key_env: str | None = None
    """The environment variable that holds the key."""
    key_file: Path | None = None
    """A file that holds the key alone."""

    def __attrs_post_init__(self) -> None:
        if not 0 < len(self.tenant) <= _MAX_NAME_CHARS:
            raise ConfigurationError("tenant", self.tenant, f"a string of 1 to {_MAX_NAME_CHARS} characters")
        if (self.key_env is None) == (self.key_file is None):
            raise ConfigurationError("tenant", self.tenant, "either key_env or key_file beside it")
        self._credential()

    def key(self, environ: Mapping[str, str]) -> Token:
        """Return the key. Raises ConfigurationError, which never shows it."""
        return Token(self._credential().secret(environ))

    def _credential(self) -> Credential:
        if self.key_file is not None:
            return Credential.from_file(self.key_file)
        return Credential.from_env(self.key_env or "")


@attrs.frozen(kw_only=True)
class GatewayConfig:
    """`[gateway]`: for clients that speak a provider's API to us in the provider's place."""

    on_disconnect: OnDisconnect = attrs.field(default="cancel", validator=_policy)
    """What becomes of an answer whose client has left: `cancel` it, or `keep` it going, to be read by other means. Background
    responses of OpenAI are kept."""
    grace_s: float = attrs.field(default=0.0, validator=_not_negative)
    """How long a cancel waits for another reader."""
    keep_alive_s: float = attrs.field(default=10.0, validator=_positive)
    """After so much silence an event stream's client is sent a comment, and the head of the answer with the first of them."""
    whole_answer_s: float = attrs.field(default=600.0, validator=_positive)
    """How long an answer may take that is asked for as a whole: it says nothing before it is complete."""
    headers: tuple[str, ...] = ()
    """Further headers of clients that are passed on to the upstream. Never for keys."""
    max_responses: int = attrs.field(default=10_000, validator=_positive)
    """Responses of OpenAI whose upstream is remembered, for requests about them; the oldest are forgotten."""
    routes: tuple[GatewayRoute, ...] = ()
    """`[[gateway.routes]]`. None: a request goes to the first upstream of its API, or else of its provider's family."""
    clients: tuple[GatewayClient, ...] = ()
    """`[[gateway.clients]]`. None: whoever has the control token, or anybody where there is none."""

    def __attrs_post_init__(self) -> None:
        for name in self.headers:
            if name.lower() in _SECRET_HEADERS:
                raise ConfigurationError("headers", name, "no header that carries a client's key")

    def check(self, upstreams: Collection[str], environ: Mapping[str, str]) -> None:
        """Raise ConfigurationError for an upstream (`upstreams`: their names) that there is not, and for a key that cannot be read or is there twice."""
        for route in self.routes:
            if route.upstream not in upstreams:
                known = ", ".join(sorted(upstreams)) or "there is none"
                raise ConfigurationError("routes.upstream", route.upstream, f"one of: {known}")
        keys: set[bytes] = set()
        for client in self.clients:
            key = client.key(environ).header()
            if key in keys:
                raise ConfigurationError("clients.tenant", client.tenant, "a key of its own")
            keys.add(key)
