"""TLS sessions: taken up again where the server allows it, never the reason of a failure, and bounded."""

from __future__ import annotations

import ssl
from collections.abc import AsyncIterator

import httpx
import pytest
import trio
import trio.testing
import trustme

from supervisor.errors import ConnectError
from supervisor.upstream.tls import MAX_SESSIONS, SESSION_S, Sessions, TLSLayer
from supervisor.upstream.transport import StreamTransport

from .scripted import serve
from .test_transport_proxy import connect_proxy

BOTH = pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])


@pytest.fixture
async def transport(client_context: ssl.SSLContext) -> AsyncIterator[StreamTransport]:
    async with StreamTransport(trust_env=False, ssl_context=client_context) as transport:
        yield transport


@pytest.fixture
def resumed() -> list[bool]:
    """Whether each connection was resumed, as the server sees it."""
    return []


@pytest.fixture
def handler(resumed):
    async def handler(peer):
        await peer.request()
        resumed.append(peer.stream.session_reused)
        await peer.answer()
        await peer.closed()

    return handler


async def ask(transport: StreamTransport, url: str, **kwargs) -> None:
    """Make a request on a connection that is not used again."""
    exchange = await transport.open(httpx.Request("POST", url, content=b"{}", **kwargs))
    assert await exchange.receive() == b"ok"
    exchange.abort()


def server_of(authority: trustme.CA, version: ssl.TLSVersion) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("127.0.0.1", "localhost").configure_cert(context)
    context.minimum_version = context.maximum_version = version
    return context


@BOTH
async def test_a_reconnect_resumes(nursery, transport, authority, handler, resumed, version):
    """All connections after the first take up its session, though each was closed without a goodbye."""
    server = await serve(nursery, handler, ssl_context=server_of(authority, version))
    for _ in range(3):
        await ask(transport, server.url)
    assert resumed == [False, True, True]
    assert transport.statistics().resumed == 2
    assert len(transport._sessions) == 1


@BOTH
async def test_a_session_that_is_refused(nursery, transport, authority, handler, resumed, version):
    """A server that has forgotten its keys shakes hands in full, on the same connection, and its new session is used."""
    contexts = [server_of(authority, version) for _ in range(2)]
    contexts.append(contexts[-1])
    server = await serve(nursery, handler, ssl_context=lambda: contexts[server.connections - 1])
    for _ in range(3):
        await ask(transport, server.url)
    assert resumed == [False, False, True]
    assert server.connections == 3


@BOTH
async def test_a_server_that_breaks_off_when_a_session_is_offered(
    nursery, transport, authority, handler, resumed, version
):
    """Resumption must not be why a connect fails: it is made once more, without the session, which is not offered again."""
    contexts = [server_of(authority, version) for _ in range(2)]

    async def fragile(peer):
        if peer.number == 2:
            await peer.raw.receive_some()
            return
        peer.stream = trio.SSLStream(peer.raw, contexts[peer.number > 2], server_side=True)
        await handler(peer)

    server = await serve(nursery, fragile)
    for _ in range(3):
        await ask(transport, f"https://127.0.0.1:{server.port}/")
    assert resumed == [False, False, True]
    assert server.connections == 4
    assert transport.statistics().open == 0


async def test_a_server_that_always_breaks_off(nursery, transport, authority, handler):
    """It is tried once more and no oftener; the error is that of the handshake without a session."""
    context = server_of(authority, ssl.TLSVersion.TLSv1_3)

    async def gone(peer):
        if peer.number > 1:
            await peer.raw.receive_some()
            return
        peer.stream = trio.SSLStream(peer.raw, context, server_side=True)
        await handler(peer)

    server = await serve(nursery, gone)
    await ask(transport, f"https://127.0.0.1:{server.port}/")
    with pytest.raises(ConnectError, match="closed during the TLS handshake"):
        await ask(transport, f"https://127.0.0.1:{server.port}/")
    assert server.connections == 3
    assert transport.statistics().open == 0


async def test_a_cancel_in_the_handshake_keeps_the_session(nursery, transport, authority, handler, resumed):
    """Who is cancelled has learnt nothing against the session: the next connection resumes it."""
    context = server_of(authority, ssl.TLSVersion.TLSv1_3)

    async def slow(peer):
        if peer.number == 2:
            await peer.raw.receive_some()
            reached.set()
            await peer.closed()
            return
        peer.stream = trio.SSLStream(peer.raw, context, server_side=True)
        await handler(peer)

    reached = trio.Event()
    server = await serve(nursery, slow)
    url = f"https://127.0.0.1:{server.port}/"
    await ask(transport, url)
    async with trio.open_nursery() as own:
        own.start_soon(ask, transport, url)
        await reached.wait()
        own.cancel_scope.cancel()
    await ask(transport, url)
    assert resumed == [False, True]


async def test_a_name_is_verified_for_itself(nursery, transport, authority, handler, resumed):
    """A session of one name is not offered for another, for which its certificate was not looked at."""
    server = await serve(nursery, handler, ssl_context=server_of(authority, ssl.TLSVersion.TLSv1_2))
    await ask(transport, server.url)
    with pytest.raises(ConnectError, match="not valid for 'other"):
        await ask(transport, server.url, extensions={"sni_hostname": "other.test"})
    await ask(transport, server.url, extensions={"sni_hostname": "localhost"})
    await ask(transport, server.url)
    assert resumed == [False, False, True]


async def test_a_certificate_is_looked_at_again(nursery, mock_clock, transport, authority, handler, resumed):
    """A session is resumed for a time that begins with its full handshake; using it does not prolong that."""
    server = await serve(nursery, handler, ssl_context=server_of(authority, ssl.TLSVersion.TLSv1_3))
    await ask(transport, server.url)
    for step in (SESSION_S - 1, 2, 1):
        mock_clock.jump(step)
        await ask(transport, server.url)
    assert resumed == [False, True, False, True]


async def test_a_server_without_sessions(nursery, monkeypatch, transport, authority, handler, resumed):
    """Nothing is kept where no ticket came, and each connection is asked for it once."""
    asked = []
    session = TLSLayer.session
    monkeypatch.setattr(TLSLayer, "session", lambda layer: asked.append(layer) or session(layer))
    context = server_of(authority, ssl.TLSVersion.TLSv1_3)
    context.num_tickets = 0

    async def twice(peer):
        await peer.request()
        await peer.answer()
        await handler(peer)

    server = await serve(nursery, twice, ssl_context=context)
    for _ in range(2):
        first = await transport.open(httpx.Request("POST", server.url, content=b"{}"))
        await first.aclose()
        await ask(transport, server.url)
    assert resumed == [False, False]
    assert len(asked) == 2
    assert len(transport._sessions) == 0


async def test_both_layers_through_a_proxy(nursery, client_context, authority, handler, resumed):
    """With TLS to the proxy and through it, each is resumed with its own."""
    upstream = await serve(nursery, handler, ssl_context=server_of(authority, ssl.TLSVersion.TLSv1_3))
    proxy = await connect_proxy(nursery, [], ssl_context=server_of(authority, ssl.TLSVersion.TLSv1_3))
    option = f"https://user:p%40ss@127.0.0.1:{proxy.port}"
    async with StreamTransport(proxy=option, ssl_context=client_context) as transport:
        for _ in range(2):
            await ask(transport, upstream.url)
        assert resumed == [False, True]
        assert transport.statistics().resumed == 2


class Layer:
    """A layer that has a session, which is asked for as seldom as can be: it is expensive."""

    def __init__(self, session: object) -> None:
        self.made = session
        self.asked = 0

    def session(self) -> object:
        self.asked += 1
        return self.made


def test_the_sessions_kept_are_bounded(client_context):
    """The one that was not used for longest goes; one that is there is not asked for again, nor dropped for another."""
    sessions = Sessions()

    def key(number):
        return (client_context, "h", number, "h")

    layers = [Layer(object()) for _ in range(MAX_SESSIONS + 1)]
    for number, layer in enumerate(layers[:-1]):
        sessions.keep(key(number), layer, now=0)
        sessions.keep(key(number), layer, now=0)
    assert sessions.find(key(0), now=1) is layers[0].made
    sessions.keep(key(MAX_SESSIONS), layers[-1], now=1)
    assert len(sessions) == MAX_SESSIONS
    assert sessions.find(key(1), now=1) is None
    assert sessions.find(key(0), now=1) is layers[0].made
    assert {layer.asked for layer in layers} == {1}
    sessions.drop(key(0), layers[1].made)
    assert sessions.find(key(0), now=1) is layers[0].made
    assert sessions.find(key(0), now=-1) is None  # another run's clock
