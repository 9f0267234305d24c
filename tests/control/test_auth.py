from __future__ import annotations

import logging

import pytest
import trio

from supervisor.control import ControlServer, Token, connect
from supervisor.control.auth import Access, require_safe_address
from supervisor.errors import AuthenticationError, ConfigurationError
from supervisor.streams import open_supervisor

from .harness import Peer, handshake, open_scene

SECRET = "s3cret-t0ken"


async def status(port: int, *headers: str, subprotocol: str | None = "stream-supervisor.v1") -> int:
    peer = await Peer.dial(port)
    await peer.send(handshake(port, *headers, subprotocol=subprotocol))
    code, _ = await peer.head()
    await peer.stream.aclose()
    return code


async def test_who_gets_in() -> None:
    """Only the right token, once, in the right header; not in the URL, and no Origin unless it was configured."""
    async with open_scene(token=SECRET) as scene:
        assert await status(scene.port, f"Authorization: Bearer {SECRET}") == 101
        assert await status(scene.port, f"authorization: bearer {SECRET}") == 101
        assert await status(scene.port) == 401
        assert await status(scene.port, "Authorization: Bearer wrong") == 401
        assert await status(scene.port, f"Authorization: Basic {SECRET}") == 401
        assert await status(scene.port, "Authorization: Bearer") == 401
        both = [f"Authorization: Bearer {SECRET}", "Authorization: Bearer wrong"]
        assert await status(scene.port, *both) == 401
        assert (
            await status(scene.port, f"Authorization: Bearer {SECRET}", "Origin: https://evil.example") == 401
        )
        assert await status(scene.port, f"Authorization: Bearer {SECRET}", subprotocol=None) == 400
        assert await status(scene.port, f"Authorization: Bearer {SECRET}", subprotocol="chat") == 400
        counts = scene.server.statistics()
        assert counts.refused_unauthenticated == 6
        assert counts.accepted == 2


async def test_without_a_token_a_web_page_is_still_refused() -> None:
    """On loopback without a token a request that states an Origin is refused: a browser always states one."""
    async with open_scene() as scene:
        assert await status(scene.port) == 101
        assert await status(scene.port, "Origin: http://localhost:3000") == 401


def test_a_configured_origin_may_connect() -> None:
    """An allowed origin passes, whatever its case; two origins, or another port, do not."""
    access = Access(origins=["https://Console.example:8443"])
    access.check([(b"origin", b"https://console.example:8443")])
    for headers in (
        [(b"origin", b"https://console.example")],
        [(b"origin", b"null")],
        [(b"origin", b"https://console.example:8443"), (b"origin", b"https://console.example:8443")],
    ):
        with pytest.raises(AuthenticationError):
            access.check(headers)
    for wrong in ("*", "example.org", "https://example.org/path", "https://"):
        with pytest.raises(ConfigurationError):
            Access(origins=[wrong])


async def test_the_token_is_never_shown(caplog: pytest.LogCaptureFixture) -> None:
    """Neither side's repr, errors nor log lines at DEBUG contain the token, right or wrong."""
    caplog.set_level(logging.DEBUG)
    shown: list[str] = []
    async with open_scene(token=SECRET) as scene:
        async with connect(scene.url, SECRET) as client:
            shown += [
                repr(client),
                repr(scene.server),
                repr(await client.hello()),
                repr(await client.stats()),
            ]
        with pytest.raises(AuthenticationError) as refused:
            async with connect(scene.url, "wr0ng-t0ken"):
                pass
        shown.append(str(refused.value))
    with pytest.raises(ConfigurationError) as bad:
        Token("has a space " + SECRET)
    shown += [str(bad.value), repr(bad.value.value), repr(Token(SECRET)), repr(Access(token=Token(SECRET)))]
    text = "\n".join([*shown, caplog.text])
    assert SECRET not in text
    assert "wr0ng" not in text
    assert "a connection was refused" in caplog.text


async def test_beyond_loopback_needs_a_token() -> None:
    """Without a token the server does not even bind to an address that others could reach."""
    async with open_supervisor() as supervisor:
        for host in ("0.0.0.0", "::", "", "192.0.2.1", "no-such-host.invalid"):
            with pytest.raises(ConfigurationError) as refused:
                await ControlServer(supervisor).run(host)
            assert refused.value.field == "host"
        for host in ("127.0.0.1", "127.8.9.1", "::1", "localhost"):
            await require_safe_address(host, None)
        await require_safe_address("0.0.0.0", Token(SECRET))


async def test_the_listener_reports_its_port() -> None:
    """`run` is startable: it reports the ports once connections are taken."""
    async with open_supervisor() as supervisor, trio.open_nursery() as nursery:
        server = ControlServer(supervisor)
        ports = await nursery.start(server.run)
        assert ports == server.ports
        async with connect(f"ws://127.0.0.1:{ports[0]}"):
            pass
        nursery.cancel_scope.cancel()
