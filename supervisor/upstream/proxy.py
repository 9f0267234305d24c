"""Which proxy a request goes through, and how a proxy is named without its credentials.

Two documented ways. `proxy="http://user:password@host:port"` (or `https://` for TLS to the proxy itself) sends
everything through that proxy. Otherwise, with `trust_env`, the variables that curl, Go and Python agree on:
`HTTP_PROXY`, `HTTPS_PROXY`, `ALL_PROXY`, `NO_PROXY`, in lower or upper case, lower case first.

- `HTTP_PROXY` in upper case is ignored when `REQUEST_METHOD` is set: under CGI a client could set it ("httpoxy").
- `NO_PROXY` is a comma-separated list: `*`, a host name (it and all below it; a leading dot or `*.` is allowed), an
  address, a network such as `10.0.0.0/8`; each but the network may carry `:port`.
- As in Go, the environment never sends loopback addresses or `localhost` through a proxy; the option does.
- SOCKS is not spoken. A SOCKS proxy in the environment is an error when it would be used, not a silent direct connection.
"""

from __future__ import annotations

import base64
import ipaddress
import re
from collections.abc import Mapping

import attrs
import httpx

from supervisor.errors import ConfigurationError

__all__ = ["EnvironmentProxies", "Proxy", "authority"]

_HOST = re.compile(r"[-.\w]+|[0-9a-fA-F:.]+", re.ASCII)
_DEFAULT_PORTS = {"http": 80, "https": 443}
_MAX_PORT = 65_535


@attrs.frozen(kw_only=True)
class Proxy:
    """A proxy. `str` and `repr` show its address and never its credentials."""

    scheme: str
    host: str
    port: int
    authorization: bytes | None = attrs.field(default=None, repr=False)
    """The value of `Proxy-Authorization`, if there are credentials."""

    def __str__(self) -> str:
        return f"{self.scheme}://{authority(self.host, self.port)}"

    @classmethod
    def parse(cls, value: str, *, field: str = "proxy") -> Proxy:
        """Read `[scheme://][user:password@]host[:port]`; without a scheme it is `http`.

        Raises ConfigurationError naming `field`; never shows the value, which may hold a password.
        """
        hidden = "(not shown)"
        expected = "http://[user:password@]host[:port] or https://…"
        try:
            url = httpx.URL(value if "://" in value else f"http://{value}")
            host = url.raw_host.decode("ascii")
        except (httpx.InvalidURL, ValueError, TypeError):
            raise ConfigurationError(field, hidden, expected) from None
        if url.scheme not in _DEFAULT_PORTS:
            raise ConfigurationError(field, f"{url.scheme}://… {hidden}", expected)
        if not _HOST.fullmatch(host) or url.path not in {"", "/"} or url.query:
            raise ConfigurationError(field, hidden, expected)
        if url.port is not None and not 0 < url.port <= _MAX_PORT:
            raise ConfigurationError(field, f"port {url.port}", "a port from 1 to 65535")
        authorization = None
        if url.userinfo:
            pair = f"{url.username}:{url.password}".encode()
            authorization = b"Basic " + base64.b64encode(pair)
        return cls(
            scheme=url.scheme,
            host=host,
            port=url.port or _DEFAULT_PORTS[url.scheme],
            authorization=authorization,
        )


class EnvironmentProxies:
    """The proxies that an environment asks for, read once. Choosing one is a dictionary look-up."""

    __slots__ = ("_exempt", "_found")

    def __init__(self, environ: Mapping[str, str]) -> None:
        self._found: dict[str, tuple[str, str]] = {}
        for scheme in ("http", "https", "all"):
            for name in (f"{scheme}_proxy", f"{scheme}_proxy".upper()):
                if name == "HTTP_PROXY" and "REQUEST_METHOD" in environ:
                    continue
                if name in environ:  # an empty lower-case variable switches the upper-case one off
                    if environ[name].strip():
                        self._found[scheme] = (name, environ[name].strip())
                    break
        entries = environ.get("no_proxy", environ.get("NO_PROXY", ""))
        self._exempt = [_Exemption.parse(entry) for entry in entries.split(",") if entry.strip()]

    def choose(self, scheme: str, host: str, port: int) -> Proxy | None:
        """Return the proxy for a target, None for a direct connection. Raises ConfigurationError if it is unusable."""
        found = self._found.get(scheme) or self._found.get("all")
        if found is None:
            return None
        address = _address(host)
        if (
            host == "localhost"
            or host.endswith(".localhost")
            or (address is not None and address.is_loopback)
        ):
            return None
        if any(exemption.covers(host, port, address) for exemption in self._exempt):
            return None
        name, value = found
        return Proxy.parse(value, field=name)


_Address = ipaddress.IPv4Address | ipaddress.IPv6Address
_Network = ipaddress.IPv4Network | ipaddress.IPv6Network


@attrs.frozen
class _Exemption:
    """One entry of NO_PROXY."""

    name: str
    port: int | None
    network: _Network | None

    @classmethod
    def parse(cls, entry: str) -> _Exemption:
        text = entry.strip().lower()
        try:
            return cls("", None, ipaddress.ip_network(text, strict=False))
        except ValueError:
            pass
        name, colon, port = text.rpartition(":")
        if not colon or not port.isdecimal():
            name, port = text, ""
        name = name.removeprefix("[").removesuffix("]")
        address = _address(name)
        if address is not None:
            return cls("", int(port) if port else None, ipaddress.ip_network(address))
        if name != "*":
            name = name.removeprefix("*").removeprefix(".")
        return cls(name, int(port) if port else None, None)

    def covers(self, host: str, port: int, address: _Address | None) -> bool:
        if self.port is not None and self.port != port:
            return False
        if self.network is not None:
            return address is not None and address in self.network
        return self.name in ("*", host) or host.endswith(f".{self.name}")


def _address(host: str) -> _Address | None:
    try:
        return ipaddress.ip_address(host)
    except ValueError:
        return None


def authority(host: str, port: int) -> str:
    """Return `host:port` as it stands in a URL: an IPv6 address in brackets."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
