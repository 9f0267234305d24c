"""What TLS says in the middle of a stream: new keys, tickets, requests for another handshake.

Python's `ssl` cannot be made to send these, so after the handshake the server's records are written here, with the secrets that its
context logs. Its reading end is the library's own: it tells whether what the client answers is right.
"""

from __future__ import annotations

import ssl
import struct
from pathlib import Path

import httpx
import pytest
import trio
import trio.testing
from cryptography.hazmat.primitives import hashes, hmac
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from supervisor.errors import RemoteProtocolError, UpstreamClosedError
from supervisor.upstream import tls
from supervisor.upstream.transport import StreamTransport

from .scripted import serve

HANDSHAKE, DATA = 22, 23
KEY_UPDATE = b"\x18\x00\x00\x01\x01"
"""New keys from here on, and would you do the same."""
TICKET = (
    b"\x04" + struct.pack(">I", 22)[1:] + struct.pack(">II", 7200, 1) + b"\x01a\x00\x08" + b"t" * 8 + b"\0\0"
)
HELLO_REQUEST = b"\x00\x00\x00\x00"


def mac(key: bytes, data: bytes) -> bytes:
    maker = hmac.HMAC(key, hashes.SHA384())
    maker.update(data)
    return maker.finalize()


def expand(secret: bytes, label: bytes, size: int) -> bytes:
    """HKDF-Expand-Label of RFC 8446, for what fits into one block."""
    label = b"tls13 " + label
    return mac(secret, struct.pack(">HB", size, len(label)) + label + b"\0\x01")[:size]


class Records13:
    """The writing end of a TLS 1.3 server with AES-256-GCM."""

    def __init__(self, secret: bytes) -> None:
        self.rekey(secret)

    def rekey(self, secret: bytes) -> None:
        self.secret, self.number = secret, 0
        self.cipher = AESGCM(expand(secret, b"key", 32))
        self.start = int.from_bytes(expand(secret, b"iv", 12), "big")

    def write(self, kind: int, data: bytes) -> bytes:
        head = b"\x17\x03\x03" + struct.pack(">H", len(data) + 17)
        nonce = (self.start ^ self.number).to_bytes(12, "big")
        self.number += 1
        sealed = head + self.cipher.encrypt(nonce, data + bytes([kind]), head)
        if data == KEY_UPDATE:
            self.rekey(expand(self.secret, b"traffic upd", 48))
        return sealed


class Records12:
    """The writing end of a TLS 1.2 server with AES-256-GCM, after its Finished."""

    def __init__(self, master: bytes, client_random: bytes, server_random: bytes) -> None:
        seed = b"key expansion" + server_random + client_random
        block, link = b"", seed
        while len(block) < 72:  # two keys and two salts
            link = mac(master, link)
            block += mac(master, link + seed)
        self.cipher, self.salt, self.number = AESGCM(block[32:64]), block[68:72], 1

    def write(self, kind: int, data: bytes) -> bytes:
        explicit = struct.pack(">Q", self.number)
        self.number += 1
        about = explicit + bytes([kind, 3, 3]) + struct.pack(">H", len(data))
        sealed = self.cipher.encrypt(self.salt + explicit, data, about)
        return bytes([kind, 3, 3]) + struct.pack(">H", len(sealed) + 8) + explicit + sealed


class Server:
    """The server's end of one connection: it reads as the library does, and writes its own records."""

    def __init__(self, raw: trio.SocketStream, context: ssl.SSLContext) -> None:
        self.raw = raw
        self.log = Path(context.keylog_filename)
        self.incoming, self.outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        self.tls = context.wrap_bio(self.incoming, self.outgoing, server_side=True)

    async def handshake(self) -> None:
        hellos: list[bytes] = []
        while True:
            data = await self.raw.receive_some()
            hellos.append(data)
            self.incoming.write(data)
            try:
                self.tls.do_handshake()
            except ssl.SSLWantReadError:
                done = False
            else:
                done = True
            answer = self.outgoing.read()
            if len(hellos) == 1:
                randoms = data[11:43], answer[11:43]
            await self.raw.send_all(answer)
            if done:
                break
        secrets = {
            line.split()[0]: bytes.fromhex(line.split()[2])
            for line in self.log.read_text().splitlines()
            if line[0] != "#"
        }
        if self.tls.version() == "TLSv1.3":
            self.records = Records13(secrets["SERVER_TRAFFIC_SECRET_0"])
        else:
            self.records = Records12(secrets["CLIENT_RANDOM"], *randoms)

    async def write(self, kind: int, data: bytes) -> None:
        await self.raw.send_all(self.records.write(kind, data))

    async def read(self) -> bytes:
        while True:
            try:
                return self.tls.read(1 << 16)
            except ssl.SSLWantReadError:
                data = await self.raw.receive_some()
                if not data:
                    return b""
                self.incoming.write(data)


@pytest.fixture
def context(server_context: ssl.SSLContext, tmp_path: Path) -> ssl.SSLContext:
    server_context.keylog_filename = str(tmp_path / "keys")
    server_context.num_tickets = 0
    return server_context


@pytest.mark.parametrize("pumped", [True, False])
async def test_messages_in_a_tls_1_3_stream(nursery, client_context, context, pumped):
    """New keys, asked for both ways, and late tickets leave the stream as it is; the request after them is readable."""
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    requests, got = [], []

    async def handler(peer):
        server = Server(peer.raw, context)
        await server.handshake()
        requests.append(await server.read())
        await server.write(DATA, b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nabc")
        await opened.wait()
        for part in (b"def", b"ghi"):
            await server.write(HANDSHAKE, TICKET)
            await server.write(HANDSHAKE, KEY_UPDATE)
            await server.write(DATA, part)
        requests.append(await server.read())  # with the client's new keys, twice over
        await server.write(DATA, b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok")
        await peer.closed()

    opened = trio.Event()
    server = await serve(nursery, handler)
    url = f"https://127.0.0.1:{server.port}/"
    async with StreamTransport(trust_env=False, ssl_context=client_context) as transport:
        exchange = await transport.open(httpx.Request("POST", url, content=b"1"))
        opened.set()
        if pumped:
            assert not await exchange.pump(lambda body: got.append(body) or True)
        else:
            while body := await exchange.receive():
                got.append(body)
        await exchange.aclose()
        assert b"".join(got) == b"abcdefghi"
        exchange = await transport.open(httpx.Request("POST", url, content=b"2"))
        assert await exchange.receive() == b"ok"
        await exchange.aclose()
    assert [request[-1:] for request in requests] == [b"1", b"2"]
    assert server.connections == 1


async def test_a_tls_1_2_server_that_wants_another_handshake(nursery, monkeypatch, client_context, context):
    """Our own context refuses, as TLS has it: with a warning, after which the stream goes on."""
    monkeypatch.setattr(tls.httpx, "create_ssl_context", lambda: client_context)
    ours = tls.shared_context.__wrapped__()
    context.maximum_version = ssl.TLSVersion.TLSv1_2
    context.set_ciphers("ECDHE+AESGCM+AES256")
    refused = []

    async def handler(peer):
        server = Server(peer.raw, context)
        await server.handshake()
        await server.read()
        await server.write(DATA, b"HTTP/1.1 200 OK\r\nContent-Length: 6\r\n\r\n")
        await opened.wait()
        await server.write(HANDSHAKE, HELLO_REQUEST)
        await server.write(DATA, b"abc")
        with pytest.raises(ssl.SSLError, match="NO_RENEGOTIATION"):
            await server.read()
        refused.append(True)
        await server.write(DATA, b"def")
        await peer.closed()

    opened = trio.Event()
    server = await serve(nursery, handler)
    async with StreamTransport(trust_env=False, ssl_context=ours) as transport:
        exchange = await transport.open(
            httpx.Request("POST", f"https://127.0.0.1:{server.port}/", content=b"1")
        )
        opened.set()
        with trio.fail_after(5):
            got = await exchange.receive()
            while len(got) < 6:
                got += await exchange.receive()
        assert got == b"abcdef"
        await exchange.aclose()
    assert refused == [True]


@pytest.mark.parametrize("pumped", [True, False])
@pytest.mark.parametrize("where", ["by itself", "behind the body", "behind the head"])
async def test_a_message_that_has_no_place(nursery, client_context, context, where, pumped):
    """A handshake message that TLS 1.3 does not have after the handshake ends the connection, not the stream as complete.

    The body that came before it, in the same read or not, is read all the same.
    """
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    got = []

    def take(data):
        got.append(data)
        opened.set()
        return True

    async def handler(peer):
        server = Server(peer.raw, context)
        await server.handshake()
        await server.read()
        write = server.records.write
        head, body = write(DATA, b"HTTP/1.1 200 OK\r\n\r\n"), write(DATA, b"abc")
        message = write(HANDSHAKE, HELLO_REQUEST)
        if where == "by itself":
            await peer.raw.send_all(head + body)
            await opened.wait()
            await peer.raw.send_all(message)
        elif where == "behind the body":
            await peer.raw.send_all(head)
            await begun.wait()
            await peer.raw.send_all(body + message)
        else:
            await peer.raw.send_all(head + body + message)
        await peer.closed()

    begun, opened = trio.Event(), trio.Event()
    server = await serve(nursery, handler)
    async with StreamTransport(trust_env=False, ssl_context=client_context) as transport:
        exchange = await transport.open(
            httpx.Request("POST", f"https://127.0.0.1:{server.port}/", content=b"1")
        )
        begun.set()
        with trio.fail_after(5):
            if not pumped:
                take(await exchange.receive())
            with pytest.raises(UpstreamClosedError):
                await (exchange.pump(take) if pumped else exchange.receive())
        assert got == [b"abc"]
        assert transport.statistics().open == 0


async def test_another_handshake_while_the_request_is_sent(nursery, client_context, context):
    """Where a caller's context allows it there is an error that says so, and no waiting for what cannot come."""
    client_context.options &= ~ssl.OP_NO_RENEGOTIATION
    context.maximum_version = ssl.TLSVersion.TLSv1_2
    context.set_ciphers("ECDHE+AESGCM+AES256")

    async def handler(peer):
        server = Server(peer.raw, context)
        await server.handshake()
        await server.write(HANDSHAKE, HELLO_REQUEST)
        # The client has read it, and waits for the sockets to be emptied.
        await trio.testing.wait_all_tasks_blocked(0.05)
        await peer.closed()

    server = await serve(nursery, handler)
    request = httpx.Request("POST", f"https://127.0.0.1:{server.port}/", content=b"x" * (16 << 20))
    async with StreamTransport(trust_env=False, ssl_context=client_context) as transport:
        with trio.fail_after(5), pytest.raises(RemoteProtocolError, match="another TLS handshake"):
            await transport.open(request)
        assert transport.statistics().open == 0
