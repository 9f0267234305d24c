"""Who may connect: a bearer token, the Origin of a web page, and the rule that only loopback goes without a token.

A token is compared in constant time, is never part of a `repr`, a message or a log line, and is taken from the
`Authorization` header only: a URL's query would end up in other programs' logs. A browser always states the Origin of the
page that connects, and no other client does; so with no Origin allowed, no web page can reach a daemon on loopback, not
even one whose name was rebound to 127.0.0.1.
"""

from __future__ import annotations

import hmac
import ipaddress
from collections.abc import Iterable, Sequence

import attrs
import trio

from supervisor.errors import AuthenticationError, ConfigurationError

__all__ = ["Access", "Token", "require_safe_address"]

_MAX_TOKEN_CHARS = 4096


class Token:
    """A bearer token that does not show itself."""

    __slots__ = ("_value",)

    def __init__(self, value: str) -> None:
        """Raise ConfigurationError for a token that cannot be sent in a header."""
        if (
            not value
            or len(value) > _MAX_TOKEN_CHARS
            or not value.isascii()
            or not value.isprintable()
            or " " in value
        ):
            raise ConfigurationError(
                "token", Hidden(), f"1 to {_MAX_TOKEN_CHARS} printable ASCII characters without spaces"
            )
        self._value = value.encode()

    def __repr__(self) -> str:
        return "Token(hidden)"

    def matches(self, offered: bytes) -> bool:
        """Compare in a time that does not depend on where the two differ."""
        return hmac.compare_digest(self._value, offered)

    def header(self) -> bytes:
        """Return the value of the `Authorization` header that carries it."""
        return b"Bearer " + self._value


class Hidden:
    """Stands for a secret where its value would be shown."""

    def __repr__(self) -> str:
        return "(hidden)"


def _as_origins(given: Iterable[str]) -> frozenset[str]:
    for origin in given:
        scheme, mark, host = origin.partition("://")
        if not (mark and scheme and host) or "/" in host or "*" in origin:
            raise ConfigurationError("origins", origin, "origins such as https://example.org, without a path")
    return frozenset(origin.lower() for origin in given)


@attrs.frozen(kw_only=True)
class Access:
    """What a handshake must show. No token: whoever reaches the address may connect."""

    token: Token | None = None
    origins: frozenset[str] = attrs.field(default=frozenset(), converter=_as_origins)
    """Web origins that may connect, as browsers write them (`https://example.org`); none by default."""

    def check(self, headers: Sequence[tuple[bytes, bytes]]) -> None:
        """Judge a handshake's headers (names in lower case). Raises AuthenticationError; says nothing of the token."""
        origins = [value for name, value in headers if name == b"origin"]
        if origins and (len(origins) > 1 or origins[0].decode("latin-1").lower() not in self.origins):
            raise AuthenticationError("this Origin may not connect; allow it in the server's configuration")
        if self.token is None:
            return
        offered = [value for name, value in headers if name == b"authorization"]
        if len(offered) != 1:
            raise AuthenticationError("a bearer token is required: Authorization: Bearer …")
        scheme, _, credential = offered[0].partition(b" ")
        if scheme.lower() != b"bearer" or not self.token.matches(credential.strip(b" \t")):
            raise AuthenticationError("the bearer token is not the right one")


async def require_safe_address(host: str | None, token: Token | None) -> None:
    """Raise ConfigurationError if `host` can be reached from beyond this machine and there is no token."""
    if token is not None:
        return
    if host and await _is_loopback(host):
        return
    raise ConfigurationError("host", host, "a loopback address such as 127.0.0.1, or a token beside it")


async def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        pass
    try:
        found = await trio.socket.getaddrinfo(host, None)
    except OSError:
        return False
    return bool(found) and all(
        ipaddress.ip_address(str(row[4][0]).partition("%")[0]).is_loopback for row in found
    )
