"""The transport over TLS: verification, both protocol versions, truncation, and cancels that never wait for a goodbye."""

from __future__ import annotations

import socket
import ssl
from collections.abc import AsyncIterator

import httpx
import pytest
import trio
import trio.testing
import trustme

from supervisor.errors import ConfigurationError, ConnectError, RemoteProtocolError, UpstreamClosedError
from supervisor.upstream import tls
from supervisor.upstream.connection import Connection, Counters, Origin
from supervisor.upstream.transport import StreamTransport

from .scripted import Peer, serve

CHUNKED = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"


@pytest.fixture
async def transport(client_context: ssl.SSLContext) -> AsyncIterator[StreamTransport]:
    async with StreamTransport(trust_env=False, ssl_context=client_context) as transport:
        yield transport


def post(url: str, content: bytes = b"{}", **kwargs) -> httpx.Request:
    return httpx.Request("POST", url, content=content, **kwargs)


async def whole(transport: StreamTransport, url: str, content: bytes = b"{}", **kwargs) -> bytes:
    exchange = await transport.open(post(url, content, **kwargs))
    parts = []
    while part := await exchange.receive():
        parts.append(part)
    await exchange.aclose()
    return b"".join(parts)


@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
async def test_large_bodies_both_ways_and_reuse(nursery, transport, server_context, version):
    """Bodies of several megabytes pass in both directions over TLS 1.2 and 1.3, on one connection used twice."""
    server_context.minimum_version = server_context.maximum_version = version
    chosen = []

    async def handler(peer):
        while True:
            _, body = await peer.request()
            chosen.append((peer.stream.version(), peer.stream.selected_alpn_protocol()))
            await peer.send(CHUNKED)
            for start in range(0, len(body), 50_000):
                piece = body[start : start + 50_000]
                await peer.send(b"%x\r\n%s\r\n" % (len(piece), piece))
            await peer.send(b"0\r\n\r\n")

    server = await serve(nursery, handler, ssl_context=server_context)
    content = bytes(range(256)) * (12 << 10)
    for _ in range(2):
        assert await whole(transport, server.url, content) == content
    assert server.connections == 1
    name = {ssl.TLSVersion.TLSv1_2: "TLSv1.2", ssl.TLSVersion.TLSv1_3: "TLSv1.3"}[version]
    assert chosen == [(name, None)] * 2  # the caller's context negotiates nothing, and is used as it is


async def test_records_split_at_every_byte(nursery, client_context, server_context):
    """TLS records that arrive a byte at a time are read like whole ones."""

    async def handler(peer):
        await peer.request()
        await peer.answer(b"abc" * 100)

    server = await serve(nursery, handler, ssl_context=server_context)
    async with StreamTransport(trust_env=False, ssl_context=client_context, read_bytes=1) as transport:
        assert await whole(transport, server.url) == b"abc" * 100


async def test_verification(nursery, transport, authority, server_context):
    """A name the certificate is not for, and a certificate of an unknown authority, are refused with their reason."""

    async def handler(peer):
        await peer.request()
        await peer.answer()

    server = await serve(nursery, handler, ssl_context=server_context)
    with pytest.raises(
        ConnectError, match=rf"https://127.0.0.1:{server.port}: .*not valid for 'other\.test'"
    ):
        await transport.open(post(server.url, extensions={"sni_hostname": "other.test"}))
    assert await whole(transport, server.url, extensions={"sni_hostname": "localhost"}) == b"ok"
    stranger = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    trustme.CA().issue_cert("127.0.0.1").configure_cert(stranger)
    server = await serve(nursery, handler, ssl_context=stranger)
    with pytest.raises(ConnectError, match="certificate is not trusted"):
        await transport.open(post(server.url))
    assert transport.statistics().open == transport.statistics().idle


async def test_sni_is_sent(nursery, transport, server_context):
    """The server is told the name it is asked for."""
    names = []
    server_context.sni_callback = lambda _socket, name, _context: names.append(name)

    async def handler(peer):
        await peer.request()
        await peer.answer()

    server = await serve(nursery, handler, ssl_context=server_context)
    assert await whole(transport, f"https://localhost:{server.port}/") == b"ok"
    assert names == ["localhost"]


async def test_a_server_that_speaks_no_tls(nursery, transport):
    """Plain text where TLS was expected, and an immediate close, are ConnectErrors."""

    async def plain(peer):
        await peer.raw.receive_some()
        await peer.raw.send_all(b"HTTP/1.1 400 Bad Request\r\n\r\n")
        await peer.closed()

    async def nothing(peer):
        await peer.raw.receive_some()

    for handler, why in ((plain, "TLS failed"), (nothing, "closed during the TLS handshake")):
        server = await serve(nursery, handler)
        with pytest.raises(ConnectError, match=why):
            await transport.open(post(f"https://127.0.0.1:{server.port}/"))
    assert transport.statistics().open == 0


async def test_a_context_that_negotiates_another_protocol_is_refused(nursery, client_context, server_context):
    """A caller's context that offers h2 and gets it is an error that says so, not a garbled response."""
    client_context.set_alpn_protocols(["h2"])

    async def handler(peer):
        await peer.request()

    server = await serve(nursery, handler, ssl_context=server_context)
    async with StreamTransport(trust_env=False, ssl_context=client_context) as transport:
        with pytest.raises(ConnectError, match="the server chose h2"):
            await transport.open(post(server.url))
        assert transport.statistics().open == 0


@pytest.mark.parametrize(
    ("head", "body"),
    [
        (b"HTTP/1.1 200 OK\r\n\r\n", b"abc"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\n", b"abc"),
        (CHUNKED, b"3\r\nabc\r\n"),
    ],
)
@pytest.mark.parametrize("goodbye", [True, False])
@pytest.mark.parametrize("pumped", [True, False])
async def test_truncation(nursery, transport, server_context, head, body, goodbye, pumped):
    """A body without a length ends with close_notify only: a bare end of file is a truncation, whatever the framing.

    So it is for who waits for the body itself, and for whom the shared reader reads.
    """

    async def handler(peer):
        await peer.request()
        await peer.send(head + body)
        await read.wait()
        if goodbye:
            await peer.stream.aclose()
        else:
            await peer.cut()

    read = trio.Event()
    clean = goodbye and head == b"HTTP/1.1 200 OK\r\n\r\n"

    async def rest():
        return await exchange.pump(lambda _: False) if pumped else await exchange.receive()

    server = await serve(nursery, handler, ssl_context=server_context)
    exchange = await transport.open(post(server.url))
    assert await exchange.receive() == b"abc"
    read.set()
    if clean:
        assert not await rest()
    else:
        with pytest.raises(UpstreamClosedError) as caught:
            await rest()
        assert caught.value.sent
    await exchange.aclose()
    assert transport.statistics().open == 0
    assert transport.statistics().aborted == (not clean)


@pytest.mark.parametrize("framed", [False, True])
async def test_close_notify_with_the_socket_left_open(nursery, transport, server_context, framed):
    """A goodbye that comes together with body bytes ends the body after them, though the socket stays open."""

    async def handler(peer):
        await peer.request()
        await peer.send(b"HTTP/1.1 200 OK\r\n%s\r\n" % (b"Content-Length: 6\r\n" if framed else b""))
        await opened.wait()
        await peer.send(b"abc")
        await peer.send(b"def")
        async with trio.open_nursery() as waiting:
            waiting.start_soon(peer.stream.unwrap)  # says goodbye, and waits for ours
            await trio.testing.wait_all_tasks_blocked()
            sent.set()

    opened, sent = trio.Event(), trio.Event()
    server = await serve(nursery, handler, ssl_context=server_context)
    exchange = await transport.open(post(server.url))
    opened.set()
    await sent.wait()
    with trio.fail_after(5):
        assert await exchange.receive() == b"abcdef"
        assert await exchange.receive() == b""
    assert not exchange.reusable
    await exchange.aclose()
    assert transport.statistics().open == 0
    assert transport.statistics().aborted == 0


class Talkative:
    """A TLS layer that wants to answer each record it gets, as TLS does to a request for new keys."""

    closed = False
    fault = None

    def __init__(self, answer: bytes) -> None:
        self.answer = answer
        self.outgoing = b""

    def decrypt(self, data: bytes) -> bytes:
        self.outgoing += self.answer
        return data

    def take(self) -> bytes:
        data, self.outgoing = self.outgoing, b""
        return data


def test_what_tls_says_of_its_own_is_sent_and_bounded():
    """Answers that TLS makes while reading are sent at once; a peer that provokes them and does not read is refused."""
    ours, theirs = socket.socketpair()
    with theirs:
        ours.setblocking(False)
        theirs.setblocking(False)
        origin = Origin(scheme="https", host="h", port=1)
        connection = Connection(ours, origin, read_bytes=100, counters=Counters())
        connection._layers = (Talkative(b"new keys"),)
        assert connection.decode(b"data") == b"data"
        assert theirs.recv(100) == b"new keys"
        connection._layers = (Talkative(b"k" * 20_000),)
        with pytest.raises(RemoteProtocolError, match="makes TLS answer"):
            for _ in range(10_000):
                connection.decode(b"data")
        connection.abort()


async def test_a_connection_the_server_said_goodbye_on_is_not_used_again(nursery, transport, server_context):
    """A close_notify after a complete response makes the idle connection stale."""

    async def handler(peer):
        await peer.request()
        await peer.answer()
        await trio.testing.wait_all_tasks_blocked()
        if peer.number == 1:
            await peer.stream.aclose()
            gone.set()
        await trio.sleep_forever()

    gone = trio.Event()
    server = await serve(nursery, handler, ssl_context=server_context)
    await whole(transport, server.url)
    await gone.wait()
    assert await whole(transport, server.url) == b"ok"
    assert server.connections == 2
    assert transport.statistics().retried == 0


@pytest.mark.parametrize("phase", ["handshake", "silent", "mid-body", "sending"])
async def test_cancel_closes_the_socket_without_a_goodbye(nursery, transport, server_context, phase):
    """In each phase the server sees the raw end of the connection at once; nothing is shielded, nothing stays open."""

    async def handler(peer):
        if phase == "handshake":
            await peer.raw.receive_some()  # the ClientHello, which gets no answer
        elif phase == "sending":
            await peer.stream.receive_some(100)
        else:
            await peer.request()
        if phase == "mid-body":
            await peer.send(CHUNKED + b"3\r\nabc\r\n")
        reached.set()
        await cancelled.wait()
        while True:
            try:
                if not await peer.raw.receive_some():
                    break
            except trio.BrokenResourceError:
                break
        done.set()

    async def client():
        url = f"https://127.0.0.1:{server.port}/"
        exchange = await transport.open(post(url, b"x" * (64 << 20 if phase == "sending" else 10)))
        assert await exchange.receive() == b"abc"
        await exchange.receive()

    reached, cancelled, done = trio.Event(), trio.Event(), trio.Event()
    server = await serve(nursery, handler, ssl_context=None if phase == "handshake" else server_context)
    with trio.fail_after(10):
        async with trio.open_nursery() as own:
            own.start_soon(client)
            await reached.wait()
            await trio.testing.wait_all_tasks_blocked()
            assert transport.statistics().open == 1
            own.cancel_scope.cancel()
        assert transport.statistics().open == 0
        cancelled.set()
        await done.wait()


async def test_a_reset_in_the_middle_of_tls(nursery, transport, server_context):
    """Bytes that are no TLS record after the handshake are an UpstreamClosedError."""

    async def handler(peer):
        await peer.request()
        await peer.send(CHUNKED + b"3\r\nabc\r\n")
        await read.wait()
        await peer.raw.send_all(b"\x17\x03\x03\x00\x20" + b"\0" * 32)
        await peer.closed()

    read = trio.Event()
    server = await serve(nursery, handler, ssl_context=server_context)
    exchange = await transport.open(post(server.url))
    assert await exchange.receive() == b"abc"
    read.set()
    with pytest.raises(UpstreamClosedError, match=f"127.0.0.1:{server.port}"):
        await exchange.receive()
    assert transport.statistics().open == 0


async def test_early_answer_to_a_large_request(nursery, transport, server_context):
    """Over TLS too, a server that answers without reading the request on is heard at once."""

    async def handler(peer):
        await peer.stream.receive_some(100)
        await peer.answer(b"too large")
        await trio.sleep_forever()

    server = await serve(nursery, handler, ssl_context=server_context)
    with trio.fail_after(10):
        assert await whole(transport, server.url, b"x" * (64 << 20)) == b"too large"
    assert transport.statistics().open == 0


async def test_idle_connections_are_closed_with_a_goodbye(nursery, transport, server_context):
    """Closing the transport tells the peer of an idle connection, so that it need not suspect a truncation."""

    async def handler(peer):
        await peer.request()
        await peer.answer()
        assert await peer.stream.receive_some() == b""  # without a close_notify this would raise
        done.set()

    done = trio.Event()
    server = await serve(nursery, handler, ssl_context=server_context)
    await whole(transport, server.url)
    await transport.aclose()
    with trio.fail_after(5):
        await done.wait()


def test_the_shared_context_is_made_once_and_verifies():
    """There is one context for the process, with verification on."""
    context = tls.shared_context()
    assert context is tls.shared_context()
    assert context.verify_mode is ssl.CERT_REQUIRED
    assert context.check_hostname
    assert StreamTransport()._context() is StreamTransport()._context() is context


async def test_the_shared_context_speaks_http_1_1_and_distrusts_strangers(nursery, server_context):
    """By default a certificate that no public authority has signed is refused; ALPN says http/1.1."""
    offered = []

    async def handler(peer):
        hello = await peer.raw.receive_some()
        offered.append(hello)

    server = await serve(nursery, handler)
    async with StreamTransport(trust_env=False) as transport:
        with pytest.raises(ConnectError):
            await transport.open(post(f"https://127.0.0.1:{server.port}/"))
        assert b"\x08http/1.1" in offered[0]
        assert b"\x02h2" not in offered[0]
        server = await serve(nursery, Peer.request, ssl_context=server_context)
        with pytest.raises(ConnectError, match="not trusted"):
            await transport.open(post(server.url))


def test_unreadable_certificates_are_a_configuration_error(monkeypatch, tmp_path):
    """SSL_CERT_FILE is honoured; one that cannot be read is named as the mistake it is."""
    monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "missing.pem"))
    with pytest.raises(ConfigurationError, match="SSL_CERT_FILE"):
        tls.shared_context.__wrapped__()
