"""Who may ask what of the HTTP front, and what every answer carries."""

from __future__ import annotations

import json
import time

import pytest
from starlette.requests import Request
from starlette.responses import Response

from supervisor.control.auth import Token
from supervisor.control.rpc import ERRORS, RpcError
from supervisor.errors import AdmissionError, ConfigurationError
from supervisor.web import app as app_module
from supervisor.web.app import STATUS, Part, WebAccess, answer, route
from supervisor.web.config import WebConfig
from tests.web.scene import scene

TOKEN = "a-token-for-tests-0123456789"
WITH_TOKEN = WebAccess(token=Token(TOKEN))


async def hello(request: Request) -> Response:
    return answer({"hello": request.method})


PARTS = [Part(routes=[route("/hello", GET=hello, POST=hello)])]


async def test_health_is_open_and_the_rest_is_not() -> None:
    """With a token, /healthz answers anybody; other routes answer 401 until the token is shown, and then as they do."""
    async with scene(access=WITH_TOKEN, parts=PARTS) as front, front.client() as client:
        assert (await client.ask("GET", "/healthz")).json == {"status": "ok"}
        refused = await client.ask("GET", "/hello")
        assert (refused.status, refused.kind) == (401, "unauthenticated")
        assert refused.headers["www-authenticate"] == "Bearer"
        for wrong in ("Bearer wrong", f"Basic {TOKEN}", TOKEN, f"Bearer {TOKEN}x", "Bearer"):
            answer = await client.ask("GET", "/hello", headers={"authorization": wrong})
            told = "is not the right one" if wrong.startswith("Bearer ") else "is required"
            assert (answer.status, told in answer.json["error"]["message"]) == (401, True)
        shown = await client.ask("GET", "/hello", headers={"authorization": f"Bearer {TOKEN}"})
        assert shown.json == {"hello": "GET"}


@pytest.mark.parametrize(
    "target",
    [
        "/hello",
        "//hello",
        "/./hello",
        "/healthz/../hello",
        "/%68ello",
        "/hello/",
        "/hello?x",
        "/HELLO",
        "/hello%00",
        "/hello;x",
        "/streams/..%2f..%2fhello",
        "http://localhost/hello",
        "/healthz%2f..%2fhello",
        "/\\hello",
        "/%c0%afhello",
        "/%ff",
        "/%",
        "/streams/%0d%0aset-cookie:%20a=b/events",
    ],
)
async def test_no_path_leads_around_the_token(target: str) -> None:
    """However a path is written, what is behind the token is not answered without it, and headers hold no bytes of it."""
    async with scene(access=WITH_TOKEN, parts=PARTS) as front, front.client() as client:
        refused = await client.ask("GET", target)
        assert refused.status in {400, 401, 404}, refused
        assert "set-cookie" not in refused.headers


async def test_a_browser_shows_the_token_once() -> None:
    """POST /session with the token sets a cookie that opens the rest, which no script can read and no other site sends along."""
    async with scene(access=WITH_TOKEN, parts=PARTS) as front, front.client() as client:

        async def enter(token: object) -> object:
            return await client.ask("POST", "/session", body=json.dumps({"token": token}).encode())

        assert (await client.ask("GET", "/session")).json == {"required": True, "authenticated": False}
        assert (await enter("wrong")).status == 401
        assert (await enter("\N{SNOWMAN}")).status == 401
        assert (await enter(7)).status == 400
        entered = await enter(TOKEN)
        cookie, *flags = entered.headers["set-cookie"].split("; ")
        assert {"HttpOnly", "SameSite=strict", "Path=/"} <= set(flags)
        assert TOKEN not in cookie
        assert (await client.ask("GET", "/hello", headers={"cookie": cookie})).status == 200
        assert (await client.ask("GET", "/session", headers={"cookie": cookie})).json["authenticated"]
        name, _, value = cookie.partition("=")
        until, _, signature = value.partition(".")
        for forged in (
            f"{int(until) + 1}.{signature}",
            f"{until}.{'0' * 64}",
            f"{until}.",
            until,
            "",
            f"²{until}.{signature}",
            "9" * 100_00,
        ):
            told = await client.ask("GET", "/hello", headers={"cookie": f"{name}={forged}"})
            assert told.status == 401, forged
        left = await client.ask("DELETE", "/session", headers={"cookie": cookie})
        assert (left.status, "Max-Age=0" in left.headers["set-cookie"]) == (204, True)


async def test_a_session_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    """A cookie is good for half a day, and one made with another token never."""
    scope = {"type": "http", "headers": [], "server": ("127.0.0.1", 7434)}
    name, value = WITH_TOKEN.session(scope)
    shown = {**scope, "headers": [(b"cookie", f"{name}={value}".encode())]}
    assert WITH_TOKEN.allows(shown)
    assert not WebAccess(token=Token("another-token-of-the-same-kind")).allows(shown)
    assert not WITH_TOKEN.allows({**shown, "server": ("127.0.0.1", 7435)}), (
        "another daemon's, on another port"
    )
    later = time.time() + app_module.SESSION_S + 1
    monkeypatch.setattr(app_module.time, "time", lambda: later)
    assert not WITH_TOKEN.allows(shown)


@pytest.mark.parametrize(
    ("headers", "allowed"),
    [
        ({}, True),
        ({"origin": "http://localhost"}, True),
        ({"origin": "https://good.example"}, True),
        ({"origin": "https://evil.example"}, False),
        ({"origin": "null"}, False),
        ({"origin": "http://localhost:8080"}, False),
        ({"origin": "http://localhost.evil.example"}, False),
        ({"origin": ""}, False),
        ({"sec-fetch-site": "same-origin"}, True),
        ({"sec-fetch-site": "none"}, True),
        ({"sec-fetch-site": "same-site"}, False),
        ({"sec-fetch-site": "cross-site"}, False),
        ({"origin": "https://evil.example", "sec-fetch-site": "same-origin"}, False),
    ],
)
async def test_pages_of_other_sites_change_nothing(headers: dict[str, str], allowed: bool) -> None:
    """A request that may change something is refused if its page is of another site, unless that origin is configured."""
    access = WebAccess(origins=["https://good.example"])
    async with scene(access=access, parts=PARTS) as front, front.client() as client:
        posted = await client.ask("POST", "/hello", headers=headers)
        assert posted.status == (200 if allowed else 403)
        deleted = await client.ask("DELETE", "/streams/x", headers=headers)
        assert deleted.status == (404 if allowed else 403)
        assert (await client.ask("GET", "/hello", headers=headers)).status == 200


async def test_an_origin_that_is_configured_is_told_so() -> None:
    """A preflight from a configured origin is allowed, and answers name it; any other origin is told nothing."""
    access = WebAccess(origins=["https://good.example"])
    async with scene(access=access, parts=PARTS) as front, front.client() as client:
        for origin, name in (
            ("https://good.example", "https://good.example"),
            ("https://evil.example", None),
        ):
            asked = {
                "origin": origin,
                "access-control-request-method": "POST",
                "access-control-request-headers": "authorization",
            }
            flight = await client.ask("OPTIONS", "/hello", headers=asked)
            read = await client.ask("GET", "/hello", headers={"origin": origin})
            for told in (flight, read):
                assert told.headers.get("access-control-allow-origin") == name


@pytest.mark.parametrize(
    ("host", "access", "allowed"),
    [
        ("localhost", WebAccess(), True),
        ("LOCALHOST:7434", WebAccess(), True),
        ("127.0.0.1:7434", WebAccess(), True),
        ("[::1]:7434", WebAccess(), True),
        ("[::1]", WebAccess(), True),
        ("rebound.example", WebAccess(), False),
        ("localhost.evil.example", WebAccess(), False),
        ("127.0.0.1.evil.example:7434", WebAccess(), False),
        ("our.example:7434", WebAccess(hosts=["our.example"]), True),
        ("localhost", WebAccess(hosts=["our.example"]), True),
        ("other.example", WebAccess(hosts=["our.example"]), False),
        ("anything.example", WITH_TOKEN, True),
        ("anything.example", WebAccess(token=Token(TOKEN), hosts=["our.example"]), False),
        ("our.example", WebAccess(token=Token(TOKEN), hosts=["OUR.example"]), True),
    ],
)
async def test_a_name_that_is_not_ours_is_refused(host: str, access: WebAccess, allowed: bool) -> None:
    """Without a token only loopback's names and the configured ones are answered to, so that rebinding a name gets nowhere."""
    async with scene(access=access) as front, front.client() as client:
        told = await client.ask("GET", "/healthz", headers={"host": host})
        assert told.status == (200 if allowed else 421)


async def test_every_answer_has_the_headers_that_keep_browsers_from_guessing() -> None:
    """Answers, refusals and errors say: do not guess the type, do not store, send no Referer; nothing says which server it is."""
    async with scene(access=WITH_TOKEN) as front, front.client() as client:
        for method, target in (
            ("GET", "/healthz"),
            ("GET", "/streams"),
            ("GET", "/nothing"),
            ("PATCH", "/healthz"),
        ):
            told = await client.ask(method, target)
            assert told.headers["x-content-type-options"] == "nosniff"
            assert told.headers["cache-control"] == "no-store"
            assert told.headers["referrer-policy"] == "no-referrer"
            assert "server" not in told.headers


async def test_errors_have_their_status_and_say_when_to_come_again(caplog: pytest.LogCaptureFixture) -> None:
    """What is raised becomes an error as on the control channel, with its status; what nobody expected is 500, without details."""
    raised: list[Exception] = []

    async def fail(_: Request) -> Response:
        raise raised[0]

    async with scene(parts=[Part(routes=[route("/fail", GET=fail)])]) as front, front.client() as client:
        raised[:] = [AdmissionError(live=5, limit=5, retry_after_s=2.5)]
        told = await client.ask("GET", "/fail")
        assert (told.status, told.kind, told.headers["retry-after"]) == (429, "admission", "2")
        assert told.json["error"]["retry_after_s"] == 2.5
        assert told.json["error"]["live"] == 5
        raised[:] = [RpcError("gap", "gone")]
        assert (await client.ask("GET", "/fail")).status == 410
        raised[:] = [ValueError("a secret of ours")]
        told = await client.ask("GET", "/fail")
        assert (told.status, told.kind) == (500, "internal")
        assert b"secret" not in told.body
    assert "a secret of ours" in caplog.text


def test_every_kind_of_error_has_a_status() -> None:
    """Each kind of the control channel's errors that HTTP can meet has a status of its own."""
    no_connection = {
        "method_not_found",
        "too_many_subscriptions",
        "unknown_subscription",
        "request_cancelled",
    }
    assert {row.kind for row in ERRORS} - no_connection <= set(STATUS)


def test_the_configuration_is_checked() -> None:
    """A port that is none and an origin with a path are refused where they are given; no port at all is fine."""
    assert WebConfig(port=None).port is None
    with pytest.raises(ConfigurationError, match="port"):
        WebConfig(port=70_000)
    with pytest.raises(ConfigurationError, match="origins"):
        WebConfig(origins=("https://example.org/path",))
    with pytest.raises(ConfigurationError, match="head_s"):
        app_module.WebLimits(head_s=0)
