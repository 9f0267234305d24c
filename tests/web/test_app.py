"""Who may ask what of the HTTP front, and what every answer carries."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from supervisor.control.auth import Token
from supervisor.streams import open_supervisor
from supervisor.web.app import Front, Part, WebAccess, alive, answer, create_app
from supervisor.web.server import WebServer
from tests.web.wire import Client, serving

TOKEN = "a-token-for-tests-0123456789"


async def hello(request: Request) -> Response:
    return answer({"hello": request.method})


@asynccontextmanager
async def front(**access: object) -> AsyncIterator[WebServer]:
    """Serve a front with one route, `/hello`, that is not open."""
    async with open_supervisor() as supervisor:
        made = Front(supervisor=supervisor, resolve=lambda params: 1 / 0, access=WebAccess(**access))
        parts = [alive(made), Part(routes=[Route("/hello", hello, methods=["GET", "POST"])])]
        async with serving(create_app(made, parts)) as server:
            yield server


async def test_health_is_open_and_the_rest_is_not() -> None:
    """With a token, /healthz answers anybody; other routes answer 401 until the token is shown, and then as they do."""
    async with front(token=Token(TOKEN)) as server, Client.of(server) as client:
        assert (await client.ask("GET", "/healthz")).json == {"status": "ok"}
        refused = await client.ask("GET", "/hello")
        assert (refused.status, refused.kind, refused.headers["www-authenticate"]) == (
            401,
            "unauthenticated",
            "Bearer",
        )
        wrong = await client.ask("GET", "/hello", headers={"authorization": "Bearer wrong"})
        assert wrong.status == 401
        shown = await client.ask("GET", "/hello", headers={"authorization": f"Bearer {TOKEN}"})
        assert shown.json == {"hello": "GET"}
