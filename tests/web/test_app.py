"""Who may ask what of the HTTP front, and what every answer carries."""

from __future__ import annotations

from starlette.requests import Request
from starlette.responses import Response

from supervisor.control.auth import Token
from supervisor.web.app import Part, WebAccess, answer, route
from tests.web.scene import scene

TOKEN = "a-token-for-tests-0123456789"


async def hello(request: Request) -> Response:
    return answer({"hello": request.method})


PARTS = [Part(routes=[route("/hello", GET=hello, POST=hello)])]


async def test_health_is_open_and_the_rest_is_not() -> None:
    """With a token, /healthz answers anybody; other routes answer 401 until the token is shown, and then as they do."""
    async with scene(access=WebAccess(token=Token(TOKEN)), parts=PARTS) as front, front.client() as client:
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
