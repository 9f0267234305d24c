"""The gateway before upstreams that answer byte for byte as each test wants: large, by halves, encoded, or as no API does."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import httpx
import pytest
import trio

from supervisor.web.gateway import service
from tests.upstream.scripted import Peer, serve
from tests.web.gateways import STREAMED, WHOLE, Place, error_of, gateway_at, upstreams_at

ABOUT = "/v1/responses/resp_1"


@asynccontextmanager
async def saying(
    head: str, body: bytes = b"", *, base: str | None = None
) -> AsyncIterator[tuple[Place, httpx.AsyncClient]]:
    """Serve before an upstream that says this to whatever it is asked, and closes; or before another one."""

    async def answer(peer: Peer) -> None:
        await peer.request()
        await peer.send(f"HTTP/1.1 200 OK\r\n{head}connection: close\r\n\r\n".encode() + body)

    async with trio.open_nursery() as nursery:
        server = await serve(nursery, answer)
        url = f"http://127.0.0.1:{server.port}" if base is None else base
        async with gateway_at(upstreams=lambda _: upstreams_at(url)) as place, place.client() as client:
            yield place, client
        nursery.cancel_scope.cancel()


# --- whole answers ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("what", ["an answer", "what is kept"])
async def test_a_whole_answer_may_be_large(what: str) -> None:
    """What does not fit into a socket at once, and so is still being written when the last was told, comes whole."""
    body = json.dumps({"id": "x", "choices": [{"message": {"content": "a" * 4_000_000}}]}).encode()
    head = f"content-type: application/json\r\ncontent-length: {len(body)}\r\n"
    async with saying(head, body) as (_, client):
        path, asking = WHOLE["chat"]
        answer = await (client.get(ABOUT) if what == "what is kept" else client.post(path, json=asking))
        assert (answer.status_code, answer.content == body) == (200, True)


CALLED_FAILED = {
    "chat": (b'{"error":{"message":"no","code":503}}', True),
    "chat, flat": (b'{"object":"error","message":"no","code":500}', False),
    "chat, by its finish": (b'{"choices":[{"index":0,"message":{},"finish_reason":"error"}]}', False),
    "responses": (b'{"object":"response","status":"failed","error":{"message":"no"}}', True),
    "messages": (b'{"type":"error","error":{"type":"overloaded_error","message":"no"}}', True),
    "messages, as others": (b'{"error":{"message":"no"}}', False),
    "google": (b'{"error":{"code":503,"message":"no","status":"UNAVAILABLE"}}', True),
    "google, without a code": (b'{"error":{"message":"no"}}', False),
    "ollama chat": (b'{"error":"no"}', True),
    "ollama chat, as others": (b'{"error":{"message":"no"}}', False),
}


@pytest.mark.parametrize("what", CALLED_FAILED)
async def test_a_whole_answer_that_failed_has_a_status(what: str) -> None:
    """An SDK looks at the status alone. The body is the upstream's if it is an error as the API has it, else one of ours."""
    body, kept = CALLED_FAILED[what]
    async with saying("content-type: application/json\r\n", body) as (place, client):
        path, asking = WHOLE[what.partition(",")[0]]
        answer = await client.post(path, json=asking)
        assert (await place.outcome()).reason == "provider_error"
        assert answer.status_code in (502, 503)
        assert (answer.content == body) == kept
        assert answer.json()["error"]


KEPT_ODDLY = {
    "half of it": ("content-length: 99\r\n", b'{"id":'),
    "half of it, until the end": ("", b'{"id":"resp_1","status":'),
    "nothing": ("content-length: 0\r\n", b""),
    "encoded": ("content-encoding: gzip\r\n", b'{"id":"resp_1"}'),
    "a page": ("", b"<html>"),
    "too much": ("", b'{"id":"resp_1"}' + b" " * 90),
}


@pytest.mark.parametrize("what", KEPT_ODDLY)
async def test_what_is_kept_comes_whole_or_not_at_all(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What an upstream tells of a response is not passed on by halves, nor as something else than it is."""
    monkeypatch.setattr(service, "RESPONSE_BYTES", 99)
    head, body = KEPT_ODDLY[what]
    async with saying(f"content-type: application/json\r\n{head}", body) as (_, client):
        answer = await client.get(ABOUT)
        assert (answer.status_code, answer.json()["error"]["type"]) == (502, "server_error")


@pytest.mark.parametrize(("base", "code"), [("http://127.0.0.1:1", "connect"), (None, "truncated")])
async def test_who_asks_for_what_is_kept_learns_no_address(base: str | None, code: str) -> None:
    """What goes wrong on the way to the upstream is told without its address, which the log has."""
    half = b'{"id":'
    async with saying("content-length: 9\r\n", half, base=base) as (_, client):
        answer = await client.get(ABOUT)
        assert (answer.status_code, answer.json()["error"]["code"]) == (502, code)
        assert b"127.0.0.1" not in answer.content


# --- streams ---------------------------------------------------------------------------------------------------------

_CHAT = b'data: {"choices":[{"index":0,"delta":{"content":"Half"},"finish_reason":null}]}\n\n'
_MESSAGES = b'event: message_start\ndata: {"type":"message_start","message":{"id":"m"}}\n\n'
_GOOGLE = b'data: {"candidates":[{"content":{"parts":[{"text":"Half"}]}}]}\n\n'
_OLLAMA = b'{"message":{"role":"assistant","content":"Half"},"done":false}\n'
_CREATED = b'data: {"type":"response.created","response":{"id":"r"}}\n\n'
SAID_FAILED = {
    "chat": (_CHAT + b'data: {"error":{"message":"no"}}\n\n', True),
    "chat, in a chunk": (_CHAT + b'data: {"choices":[],"error":{"message":"no"}}\n\n', True),
    "chat, flat": (_CHAT + b'data: {"object":"error","message":"no","code":500}\n\n', False),
    "chat, by its finish": (_CHAT + b'data: {"choices":[{"index":0,"finish_reason":"error"}]}\n\n', False),
    "chat, by a name": (_CHAT + b'event: error\ndata: {"message":"no"}\n\n', False),
    "chat, in a list": (_CHAT + b'data: [{"error":{"message":"no"}}]\n\n', False),
    "responses": (_CREATED + b'event: error\ndata: {"type":"error","message":"no"}\n\n', True),
    "responses, its own": (
        _CREATED + b'data: {"type":"response.failed","response":{"error":{"message":"no"}}}\n\n',
        True,
    ),
    "responses, flat": (_CREATED + b'data: {"object":"error","message":"no","code":500}\n\n', False),
    "messages": (_MESSAGES + b'event: error\ndata: {"type":"error","error":{"message":"no"}}\n\n', True),
    "messages, no name": (_MESSAGES + b'data: {"type":"error","error":{"message":"no"}}\n\n', False),
    "messages, no type": (_MESSAGES + b'event: error\ndata: {"error":{"message":"no"}}\n\n', False),
    "google events": (_GOOGLE + b'data: {"error":{"code":503,"message":"no"}}\n\n', True),
    "google events, a list": (_GOOGLE + b'data: [{"error":{"code":503,"message":"no"}}]\n\n', False),
    "google events, not first": (_GOOGLE + b'data: {"a":1,"error":{"code":503,"message":"no"}}\n\n', False),
    "google events, no code": (_GOOGLE + b'data: {"error":{"message":"no"}}\n\n', False),
    "ollama chat": (_OLLAMA + b'{"error":"no"}\n', True),
    "ollama chat, an object": (_OLLAMA + b'{"error":{"message":"no"}}\n', False),
}


@pytest.mark.parametrize("what", SAID_FAILED)
async def test_a_failure_is_told_in_words_that_sdks_know(what: str) -> None:
    """The upstream's last event is the end if SDKs raise on just that shape; after any other comes an error of ours."""
    body, known = SAID_FAILED[what]
    kind = "application/x-ndjson" if what.startswith("ollama") else "text/event-stream"
    async with saying(f"content-type: {kind}\r\n", body) as (place, client):
        path, asking = STREAMED[what.partition(",")[0]]
        answer = await client.post(path, json=asking)
        assert (await place.outcome()).reason == "provider_error"
        assert answer.content.startswith(body)
        assert (answer.content == body) == known
        assert known or error_of(answer.content)["error"]


# --- pages -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("what", ["streamed", "whole", "what is kept", "refused", "models"])
async def test_nothing_is_a_page_of_ours(what: str) -> None:
    """Whatever type an upstream gives its answer, no browser runs it on our origin: not as a page, nor by a guess."""
    body = SAID_FAILED["chat"][0] if what == "streamed" else b'{"id":"x"}'
    async with saying("content-type: text/html\r\n", body) as (_, client):
        if what in ("streamed", "whole"):
            path, asking = STREAMED["chat"] if what == "streamed" else WHOLE["chat"]
            answer = await client.post(path, json=asking)
        else:
            places = {"what is kept": ABOUT, "refused": "/v1/responses/%20", "models": "/v1/models"}
            answer = await client.get(places[what])
        assert answer.headers.get_list("content-security-policy") == ["default-src 'none'; sandbox"]
        assert answer.headers.get_list("x-content-type-options") == ["nosniff"]
