"""Proxies: which one a request goes through, tunnels, absolute form, and credentials that stay unseen."""

from __future__ import annotations

import base64
import ssl

import httpx
import pytest
import trio
import trio.testing

from supervisor.errors import ConfigurationError, ConnectError
from supervisor.upstream.proxy import EnvironmentProxies, Proxy
from supervisor.upstream.transport import StreamTransport

from .scripted import Server, serve

CREDENTIALS = b"Proxy-Authorization: Basic " + base64.b64encode(b"user:p@ss")


def post(url: str, **kwargs) -> httpx.Request:
    return httpx.Request("POST", url, content=b"{}", **kwargs)


async def whole(transport: StreamTransport, url: str, **kwargs) -> bytes:
    exchange = await transport.open(post(url, **kwargs))
    parts = []
    while part := await exchange.receive():
        parts.append(part)
    await exchange.aclose()
    return b"".join(parts)


async def ok(peer):
    while True:
        await peer.request()
        await peer.answer()


async def connect_proxy(
    nursery: trio.Nursery, heads: list[bytes], *, ssl_context: ssl.SSLContext | None = None
) -> Server:
    """A small CONNECT proxy: it wants `user:p@ss`, and carries bytes both ways until either side ends."""

    async def carry(source, sink, scope):
        async for data in source:
            await sink.send_all(data)
        scope.cancel()

    async def handler(peer):
        head, _ = await peer.request()
        heads.append(head)
        if CREDENTIALS not in head:
            await peer.send(b"HTTP/1.1 407 Proxy Authentication Required\r\nContent-Length: 0\r\n\r\n")
            return
        host, _, port = head.split()[1].rpartition(b":")
        target = await trio.open_tcp_stream(host.decode(), int(port))
        async with target:
            await peer.send(b"HTTP/1.1 200 Connection established\r\n\r\n")
            async with trio.open_nursery() as both:
                both.start_soon(carry, peer.stream, target, both.cancel_scope)
                both.start_soon(carry, target, peer.stream, both.cancel_scope)

    return await serve(nursery, handler, ssl_context=ssl_context)


@pytest.mark.parametrize("secure", [False, True])
async def test_https_through_a_tunnel(nursery, client_context, server_context, secure):
    """A request by https goes through CONNECT (over TLS to the proxy, if asked), is verified end to end, and is reused."""
    heads = []
    upstream = await serve(nursery, ok, ssl_context=server_context)
    proxy = await connect_proxy(nursery, heads, ssl_context=server_context if secure else None)
    option = f"{'https' if secure else 'http'}://user:p%40ss@127.0.0.1:{proxy.port}"
    async with StreamTransport(proxy=option, ssl_context=client_context) as transport:
        for _ in range(2):
            assert await whole(transport, upstream.url) == b"ok"
        assert transport.statistics().reused == 1
        assert "p@ss" not in repr(transport)
        assert f"127.0.0.1:{proxy.port}" in repr(transport)
    assert len(heads) == 1
    lines = heads[0].split(b"\r\n")
    assert lines[0] == b"CONNECT 127.0.0.1:%d HTTP/1.1" % upstream.port
    assert b"Host: 127.0.0.1:%d" % upstream.port in lines


async def test_http_in_absolute_form(nursery):
    """A request by http is sent to the proxy with the whole URL, without its userinfo, and with the proxy's credentials."""
    seen = []

    async def handler(peer):
        while True:
            seen.append((await peer.request())[0])
            await peer.answer()

    proxy = await serve(nursery, handler)
    async with StreamTransport(proxy=f"http://user:p%40ss@127.0.0.1:{proxy.port}") as transport:
        for _ in range(2):
            assert await whole(transport, "http://me:secret@api.test:81/v1?x=1") == b"ok"
    assert proxy.connections == 1
    for head in seen:
        assert head.startswith(b"POST http://api.test:81/v1?x=1 HTTP/1.1\r\n")
        assert CREDENTIALS in head.split(b"\r\n")
        assert b"\r\nHost: api.test:81" in head
        assert b"secret" not in head


@pytest.mark.parametrize(
    ("answer", "why"),
    [
        (b"HTTP/1.1 407 Proxy Authentication Required\r\n\r\n", "407 Proxy Authentication Required"),
        (b"HTTP/1.1 502 Bad\xffGateway\r\n\r\n", "502 Bad"),
        (b"", "without an answer"),
        (b"hello\r\n\r\n", "the proxy failed"),
        (b"HTTP/1.1 200 OK\r\n\r\nearly", "data of its own"),
    ],
)
async def test_a_refused_tunnel_is_a_connect_error(nursery, answer, why):
    """What the proxy says is in the message; the credentials and the URL's query are not."""

    async def handler(peer):
        await peer.request()
        await peer.send(answer)

    proxy = await serve(nursery, handler)
    async with StreamTransport(proxy=f"http://user:p%40ss@127.0.0.1:{proxy.port}") as transport:
        with pytest.raises(ConnectError, match=why) as caught:
            await transport.open(post("https://api.test/v1?key=secret"))
        text = f"{caught.value} {caught.value.__cause__!r}"
        assert f"https://api.test:443 through the proxy http://127.0.0.1:{proxy.port}" in text
        assert "ss@" not in text
        assert "secret" not in text
        assert transport.statistics().open == 0


async def test_cancel_in_the_tunnels_handshake(nursery):
    """A proxy that never answers CONNECT sees its connection end when the client is cancelled."""

    async def handler(peer):
        await peer.request()
        reached.set()
        await peer.closed()
        done.set()

    reached, done = trio.Event(), trio.Event()
    proxy = await serve(nursery, handler)
    async with StreamTransport(proxy=f"http://127.0.0.1:{proxy.port}") as transport:
        with trio.fail_after(5):
            async with trio.open_nursery() as own:
                own.start_soon(transport.open, post("https://api.test/"))
                await reached.wait()
                own.cancel_scope.cancel()
            await done.wait()
        assert transport.statistics().open == 0


async def test_the_requests_own_proxy(nursery):
    """The `proxy` extension overrides the transport's: another one, or none; connections are not shared across them."""
    proxy = await serve(nursery, ok)
    upstream = await serve(nursery, ok)
    async with StreamTransport(trust_env=False) as transport:
        await whole(transport, upstream.url)
        await whole(transport, upstream.url, extensions={"proxy": f"http://127.0.0.1:{proxy.port}"})
        assert (upstream.connections, proxy.connections) == (1, 1)
    async with StreamTransport(proxy=f"http://127.0.0.1:{proxy.port}") as transport:
        await whole(transport, upstream.url, extensions={"proxy": None})
        assert (upstream.connections, proxy.connections) == (2, 1)


async def test_the_environment_is_used_if_trusted(nursery, monkeypatch):
    """`HTTP_PROXY` is honoured by default, and not with `trust_env=False` or an explicit proxy."""
    first = await serve(nursery, ok)
    second = await serve(nursery, ok)
    for name in ("http_proxy", "all_proxy", "no_proxy", "NO_PROXY", "ALL_PROXY", "REQUEST_METHOD"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HTTP_PROXY", f"127.0.0.1:{first.port}")
    async with StreamTransport() as transport:
        await whole(transport, "http://api.test/")
    async with StreamTransport(proxy=f"http://127.0.0.1:{second.port}") as transport:
        await whole(transport, "http://api.test/")
    assert (first.connections, second.connections) == (1, 1)
    async with StreamTransport(trust_env=False) as transport:
        await whole(transport, second.url)
    assert (first.connections, second.connections) == (1, 2)


@pytest.mark.parametrize(
    ("environ", "target", "chosen"),
    [
        ({}, ("https", "api.test", 443), None),
        ({"HTTPS_PROXY": "http://p:1"}, ("https", "api.test", 443), "http://p:1"),
        ({"HTTPS_PROXY": "http://p:1"}, ("http", "api.test", 80), None),
        (
            {"https_proxy": "http://low:1", "HTTPS_PROXY": "http://up:1"},
            ("https", "a.test", 443),
            "http://low:1",
        ),
        ({"https_proxy": "", "HTTPS_PROXY": "http://up:1"}, ("https", "a.test", 443), None),
        ({"ALL_PROXY": "p"}, ("http", "api.test", 80), "http://p:80"),
        ({"ALL_PROXY": "https://p"}, ("https", "api.test", 443), "https://p:443"),
        ({"ALL_PROXY": "p:1", "HTTP_PROXY": "q:2"}, ("http", "api.test", 80), "http://q:2"),
        ({"HTTP_PROXY": "p:1", "REQUEST_METHOD": "GET"}, ("http", "api.test", 80), None),
        ({"http_proxy": "p:1", "REQUEST_METHOD": "GET"}, ("http", "api.test", 80), "http://p:1"),
        ({"ALL_PROXY": "p:1"}, ("http", "localhost", 80), None),
        ({"ALL_PROXY": "p:1"}, ("http", "127.0.0.9", 80), None),
        ({"ALL_PROXY": "p:1"}, ("http", "::1", 80), None),
        ({"ALL_PROXY": "p:1", "NO_PROXY": "*"}, ("http", "api.test", 80), None),
        ({"ALL_PROXY": "p:1", "NO_PROXY": "api.test"}, ("http", "api.test", 80), None),
        ({"ALL_PROXY": "p:1", "NO_PROXY": "other, .TEST"}, ("http", "api.test", 80), None),
        ({"ALL_PROXY": "p:1", "NO_PROXY": "*.test"}, ("http", "api.test", 80), None),
        ({"ALL_PROXY": "p:1", "NO_PROXY": "test"}, ("http", "atest", 80), "http://p:1"),
        ({"ALL_PROXY": "p:1", "NO_PROXY": "api.test:81"}, ("http", "api.test", 80), "http://p:1"),
        ({"ALL_PROXY": "p:1", "NO_PROXY": "api.test:81"}, ("http", "api.test", 81), None),
        ({"ALL_PROXY": "p:1", "no_proxy": "10.0.0.0/8"}, ("http", "10.2.3.4", 80), None),
        ({"ALL_PROXY": "p:1", "no_proxy": "10.0.0.0/8"}, ("http", "11.2.3.4", 80), "http://p:1"),
        ({"ALL_PROXY": "p:1", "no_proxy": "10.1.1.1:80"}, ("http", "10.1.1.1", 80), None),
        ({"ALL_PROXY": "p:1", "no_proxy": "[fd00::1]:80,"}, ("http", "fd00::1", 80), None),
        ({"ALL_PROXY": "p:1", "no_proxy": "fd00::/8"}, ("http", "fd00::1", 80), None),
    ],
)
def test_choice_by_environment(environ, target, chosen):
    """The variables are read as the module says."""
    found = EnvironmentProxies(environ).choose(*target)
    assert chosen == (None if found is None else str(found))


@pytest.mark.parametrize(
    "value", ["socks5://u:s3cret@p:1", "ftp://u:s3cret@p", "http://u:s3cret@:1", "http://[s3cret"]
)
def test_unusable_proxies_are_named_without_their_value(value):
    """A proxy that cannot be used is the option's or the variable's error, and its password is not shown."""
    with pytest.raises(ConfigurationError, match=r"^proxy") as caught:
        StreamTransport(proxy=value)
    assert "s3cret" not in f"{caught.value!r} {caught.value.value!r} {caught.value.__cause__!r}"
    environment = EnvironmentProxies({"ALL_PROXY": value})
    assert environment.choose("http", "localhost", 80) is None
    with pytest.raises(ConfigurationError, match=r"^ALL_PROXY") as caught:
        environment.choose("http", "api.test", 80)
    assert "s3cret" not in f"{caught.value!r}"


def test_a_proxy_never_shows_its_credentials():
    """Neither `str` nor `repr` of a proxy has the password, plain or encoded."""
    proxy = Proxy.parse("http://user:p%40ss@[fd00::1]:3128")
    assert proxy.authorization == b"Basic " + base64.b64encode(b"user:p@ss")
    assert str(proxy) == "http://[fd00::1]:3128"
    assert "p@ss" not in repr(proxy)
    assert base64.b64encode(b"user:p@ss").decode() not in repr(proxy)
