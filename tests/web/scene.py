"""A front on loopback whose upstreams are functions, and a browser's way of reading events."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Any

import attrs
import h11
import trio

from supervisor.control import Resolved, StartParams
from supervisor.errors import ConfigurationError
from supervisor.stores import Store
from supervisor.streams import Limits, Output, Supervisor, open_supervisor
from supervisor.web import events
from supervisor.web.app import Front, Part, WebAccess, alive, create_app
from supervisor.web.server import WebLimits, WebServer
from tests.web.wire import WAIT_S, Answer, Client
from tests.wire.whatwg import Interpretation, interpret

SourceFunction = Callable[[Output], Awaitable[None]]


async def ten(out: Output) -> None:
    """Ten events of text, then the end."""
    for number in range(10):
        await out.send(f"t{number} ")


async def forever(out: Output) -> None:
    """One event of text, then nothing, until it is stopped."""
    await out.send("begun ")
    await trio.sleep_forever()


@attrs.define
class Scene:
    """A front under test."""

    supervisor: Supervisor
    server: WebServer
    sources: dict[str, SourceFunction]
    routes: Sequence[Any]

    def client(self, **options: Any) -> AbstractAsyncContextManager[Client]:
        return Client.of(self.server, **options)

    async def ask(self, method: str, target: str, given: object = None, **headers: str) -> Answer:
        """Ask over a connection of its own."""
        body = b"" if given is None else json.dumps(given).encode()
        async with self.client() as client:
            answer: Answer = await client.ask(
                method,
                target,
                headers={name.replace("_", "-"): text for name, text in headers.items()},
                body=body,
            )
            return answer

    async def start(self, upstream: str = "ten", **options: Any) -> str:
        """Start a stream; return its id."""
        answer = await self.ask("POST", "/streams", {"upstream": upstream, "prompt": "Hi", **options})
        assert answer.status in {200, 201}, answer
        return str(answer.json["id"])

    async def ended(self, upstream: str = "ten", **options: Any) -> str:
        """Start a stream, and return its id once it has ended."""
        stream_id = await self.start(upstream, **options)
        await self.supervisor.get(stream_id).wait()
        return stream_id

    async def events(self, stream_id: str, query: str = "", **headers: str) -> Interpretation:
        """Read events to their end, as a browser understands them."""
        answer = await self.ask("GET", f"/streams/{stream_id}/events{query}", **headers)
        assert answer.status == 200, answer
        return interpret(answer.body)


@asynccontextmanager
async def scene(
    *,
    access: WebAccess | None = None,
    parts: Iterable[Part] = (),
    store: Store | None = None,
    streams: Limits | None = None,
    otherwise: SourceFunction | None = None,
    more: Callable[[Front], Iterable[Part]] = lambda _: (),
    within_s: float = WAIT_S,
    **limits: Any,
) -> AsyncIterator[Scene]:
    """Serve a front for the length of a block; `otherwise` is every upstream that is not in `sources`."""
    sources: dict[str, SourceFunction] = {"ten": ten, "forever": forever}

    def resolve(params: StartParams) -> Resolved:
        source = sources.get(params.upstream, otherwise)
        if source is None:
            raise ConfigurationError("upstream", params.upstream, f"one of {sorted(sources)}")
        return Resolved(source=source)

    with trio.fail_after(within_s):
        async with open_supervisor(store=store, limits=streams) as supervisor, trio.open_nursery() as nursery:
            front = Front(
                supervisor=supervisor,
                resolve=resolve,
                access=access or WebAccess(),
                limits=WebLimits(**limits),
            )
            app = create_app(front, [alive(front), events.part(front), *parts, *more(front)])
            server = WebServer(app, limits=front.limits)
            await nursery.start(server.run)
            yield Scene(supervisor, server, sources, app.routes)
            await supervisor.shutdown()
            nursery.cancel_scope.cancel()


async def until(client: Client, text: bytes) -> bytes:
    """Read an answer until something is in its body; return the body so far."""
    body = b""
    while text not in body:
        event = await client.event()
        assert not isinstance(event, h11.EndOfMessage), f"{text!r} never came: {body!r}"
        if isinstance(event, h11.Data):
            body += event.data
    return body
