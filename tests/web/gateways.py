"""A gateway on loopback before a simulated provider, and transcripts that are played by it."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import aclosing, asynccontextmanager
from typing import Any
from urllib.parse import quote

import attrs
import httpx
import trio

from supervisor.streams import Deadlines, Limits, Outcome, StreamInfo, Supervisor, open_supervisor
from supervisor.testing.upstream import Script, SimulatedUpstream, UpstreamRequest
from supervisor.upstream import Circuits, RetryPolicy, StreamTransport, Upstream
from supervisor.web.app import Front, WebAccess, create_app
from supervisor.web.gateway import GatewayConfig, gateway
from supervisor.web.server import WebLimits, WebServer

ONCE = RetryPolicy(attempts=1)
PATIENCE_S = 120.0
"""How long a test may take: an SDK is asked hundreds of times, perhaps on a busy machine."""
BASES = {
    "openai-chat": "/v1",
    "anthropic": "/v1",
    "gemini": "/v1beta",
    "ollama": "",
}
"""What an upstream of a dialect has for the path of its base URL."""


# --- what is asked ---------------------------------------------------------------------------------------------------

TWO = "sim/ok?tokens=2"
CHAT = "/v1/chat/completions"


def google(model: str, verb: str) -> str:
    return f"/v1beta/models/{quote(model, safe='')}:{verb}"


def asked(path: str, model: str = TWO, **more: Any) -> tuple[str, dict[str, Any]]:
    """Return a path and a body that suits it."""
    if path.startswith("google"):
        return google(model, path.partition(" ")[2]), {"contents": [], **more}
    return path, {"model": model, "messages": [], "prompt": "", "input": "", **more}


STREAMED = {
    "chat": asked(CHAT, stream=True),
    "completions": asked("/v1/completions", stream=True),
    "responses": asked("/v1/responses", stream=True),
    "messages": asked("/v1/messages", stream=True),
    "google events": asked("google streamGenerateContent?alt=sse"),
    "google array": asked("google streamGenerateContent"),
    "ollama chat": asked("/api/chat"),
    "ollama generate": asked("/api/generate"),
}
WHOLE = {
    "chat": asked(CHAT, stream=False),
    "completions": asked("/v1/completions"),
    "responses": asked("/v1/responses"),
    "background": asked("/v1/responses", background=True),
    "messages": asked("/v1/messages"),
    "google": asked("google generateContent"),
    "ollama chat": asked("/api/chat", stream=False),
    "ollama generate": asked("/api/generate", stream=False),
}


def with_model(path: str, body: dict[str, Any], model: str) -> tuple[str, dict[str, Any]]:
    """Ask the same of another model."""
    if "/models/" in path:
        return path.replace(quote(TWO, safe=""), quote(model, safe="")), body
    return path, {**body, "model": model}


def error_of(answer: bytes) -> Any:
    """Return the JSON of the last event of an answer, however it is framed."""
    text = answer.decode().strip()
    if text.startswith("["):
        return json.loads(text)[-1]
    return json.loads(text.splitlines()[-1].removeprefix("data: "))


# --- where it is asked -----------------------------------------------------------------------------------------------


@attrs.define(kw_only=True)
class Place:
    """Where both can be asked, and what they saw."""

    up: SimulatedUpstream
    sup: Supervisor
    server: WebServer
    upstreams: dict[str, Upstream]

    @property
    def direct(self) -> str:
        """The provider's address."""
        return self.up.base_url.removesuffix("/v1")

    @property
    def here(self) -> str:
        """The gateway's."""
        return f"http://127.0.0.1:{self.server.ports[0]}"

    def client(self, **options: Any) -> httpx.AsyncClient:
        """Return a client of the gateway."""
        return httpx.AsyncClient(base_url=self.here, trust_env=False, timeout=20, **options)

    def newest(self) -> StreamInfo:
        return self.sup.list()[0]

    async def outcome(self) -> Outcome:
        """Wait for the newest stream."""
        return await self.sup.get(self.newest().id).wait()


def upstreams_at(url: str, **options: Any) -> dict[str, Upstream]:
    """Return an upstream for each provider's family, named as its dialect."""
    options = {"retry": ONCE, "proxy": "direct", **options}
    return {
        dialect: Upstream(name=dialect, base_url=f"{url}{base}", dialect=dialect, **options)
        for dialect, base in BASES.items()
    }


@asynccontextmanager
async def gateway_at(
    *,
    respond: Callable[[UpstreamRequest], Script | None] | None = None,
    config: GatewayConfig | None = None,
    access: WebAccess | None = None,
    environ: Mapping[str, str] | None = None,
    deadlines: Deadlines | None = None,
    limits: Limits | None = None,
    upstreams: Callable[[str], dict[str, Upstream]] | None = None,
    **options: Any,
) -> AsyncIterator[Place]:
    """Serve for the length of a block."""
    async with (
        SimulatedUpstream(respond=respond, **options) as up,
        aclosing(StreamTransport(trust_env=False)) as transport,
        open_supervisor(deadlines=deadlines, limits=limits) as sup,
    ):
        made = (upstreams or upstreams_at)(up.base_url.removesuffix("/v1"))
        front = Front(supervisor=sup, resolve=_nothing, access=access or WebAccess())
        part = gateway(
            front,
            config or GatewayConfig(headers=("x-sim-script",)),
            upstreams=made,
            transport=transport,
            circuits=Circuits().of,
            environ=environ or {},
        )
        server = WebServer(create_app(front, [part]), limits=WebLimits(leave_s=PATIENCE_S))
        with trio.fail_after(PATIENCE_S):
            async with trio.open_nursery() as nursery:
                await nursery.start(server.run)
                yield Place(up=up, sup=sup, server=server, upstreams=made)
                nursery.cancel_scope.cancel()
        await sup.shutdown()


@asynccontextmanager
async def asking_at(
    place: Place, path: str, body: Mapping[str, Any], headers: Mapping[str, str] | None = None
) -> AsyncIterator[trio.SocketStream]:
    """Send a request on a connection of its own, which is closed when the block is left."""
    content = json.dumps(body).encode()
    lines = {"host": "localhost", "content-length": str(len(content)), **(headers or {})}
    head = "".join(f"{name}: {value}\r\n" for name, value in lines.items())
    async with await trio.open_tcp_stream("127.0.0.1", place.server.ports[0]) as connection:
        await connection.send_all(f"POST {path} HTTP/1.1\r\n{head}\r\n".encode() + content)
        yield connection


def _nothing(params: object) -> Any:
    raise AssertionError(params)


async def in_thread(work: Callable[[], Any]) -> Any:
    """Run what blocks, such as a synchronous SDK."""
    return await trio.to_thread.run_sync(work)
