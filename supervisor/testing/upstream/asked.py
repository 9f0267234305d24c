"""What a request asks for: which provider's API its path belongs to, which script, and where the answer is to begin."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, Final, Literal
from urllib.parse import parse_qsl, unquote, urlencode

import attrs
import msgspec

from supervisor.testing.upstream.answers import (
    ANTHROPIC,
    COHERE,
    EVENTS,
    GEMINI,
    GEMINI_ARRAY,
    OLLAMA_CHAT,
    OLLAMA_GENERATE,
    OPENAI_CHAT,
    OPENAI_COMPLETIONS,
    OPENAI_RESPONSES,
    Answer,
    Shape,
)
from supervisor.testing.upstream.records import UpstreamRequest
from supervisor.testing.upstream.script import Script, word

__all__ = ["SCRIPT_HEADER", "Asked", "begin", "read"]

SCRIPT_HEADER: Final = "x-sim-script"
"""The header that names a script where the request's model cannot, or must not."""

Stored = Literal["stream", "retrieve", "cancel"]

_MAX_PROMPT_CHARS: Final = 1 << 16
_GEMINI: Final = re.compile(r"/models/(?P<model>[^/].*):(?P<verb>streamGenerateContent|generateContent)$")
_STORED: Final = re.compile(r"/responses/(?P<id>[^/]+)(?P<cancel>/cancel)?$")
# The longer suffixes come first: each is the end of a path, and Cohere's is the end of others.
_PATHS: Final[tuple[tuple[str, Shape], ...]] = (
    ("/chat/completions", OPENAI_CHAT),
    ("/completions", OPENAI_COMPLETIONS),
    ("/responses", OPENAI_RESPONSES),
    ("/messages", ANTHROPIC),
    ("/api/chat", OLLAMA_CHAT),
    ("/api/generate", OLLAMA_GENERATE),
    ("/chat", COHERE),
    ("/events", EVENTS),
)


@attrs.frozen(kw_only=True)
class Asked:
    """One request, understood."""

    shape: Shape
    body: Mapping[str, Any] = attrs.field(factory=dict)
    model: str | None = None
    """What may name a script."""
    stream: bool = True
    background: bool = False
    had: int = 0
    """How many events of the answer the client has had."""
    stored: Stored | None = None
    """What is asked of a stored response."""
    response_id: str = ""


def read(request: UpstreamRequest) -> Asked | None:
    """Understand a request; None if there is no such route. Raises msgspec.DecodeError for a body that is no object."""
    path, _, query = request.target.partition("?")
    said = dict(parse_qsl(query, keep_blank_values=True))
    if (found := _STORED.search(path)) is not None:
        return _stored(request.method, found, said)
    if request.method == "GET" and path.endswith("/events"):
        return _events(request, {}, said)
    if request.method != "POST":
        return None
    body = msgspec.json.decode(request.body or b"{}", type=dict[str, Any])
    if (found := _GEMINI.search(path)) is not None:
        streamed = found["verb"] == "streamGenerateContent"
        shape: Shape = GEMINI if said.get("alt") == "sse" or not streamed else GEMINI_ARRAY
        return Asked(shape=shape, body=body, model=_model(request, unquote(found["model"])), stream=streamed)
    known = next((shape for suffix, shape in _PATHS if path.endswith(suffix)), None)
    if known is None:
        return None
    shape = known
    if shape is EVENTS:
        return _events(request, body, said)
    stream = body.get("stream") is not False if shape.framing == "ndjson" else body.get("stream") is True
    return Asked(
        shape=shape,
        body=body,
        model=_model(request, body.get("model")),
        stream=stream,
        background=shape is OPENAI_RESPONSES and body.get("background") is True,
    )


def _model(request: UpstreamRequest, named: Any) -> str | None:
    said = request.header(SCRIPT_HEADER) or named
    return said if isinstance(said, str) else None


def _stored(method: str, found: re.Match[str], said: Mapping[str, str]) -> Asked | None:
    if (method == "POST") != bool(found["cancel"]) or method not in ("GET", "POST"):
        return None
    asked: Stored = "cancel" if method == "POST" else "stream" if said.get("stream") == "true" else "retrieve"
    after = said.get("starting_after", "")
    had = int(after) + 1 if after.isascii() and after.isdigit() else 0
    return Asked(shape=OPENAI_RESPONSES, stored=asked, response_id=unquote(found["id"]), had=had)


def _events(request: UpstreamRequest, body: Mapping[str, Any], said: Mapping[str, str]) -> Asked:
    named = body.get("model")
    if said:
        fields = {name: value for name, value in said.items() if name != "sim"}
        named = f"sim/{said.get('sim', 'ok')}?{urlencode(fields)}"
    last = request.header("last-event-id")
    had = int(last) if last.isascii() and last.isdigit() else 0
    return Asked(shape=EVENTS, body=body, model=_model(request, named), had=had)


# --- where the answer begins ---------------------------------------------------------------------------------------------


def begin(asked: Asked, script: Script, number: int) -> Answer | str:
    """Return what is to be told, after the text that the request gave as its beginning; a str: why that is refused."""
    shape = asked.shape
    whole = Answer(script=script, number=number, background=asked.background)
    if shape.prompt is not None:
        prompt = shape.prompt(asked.body)
        begun = None if prompt is None else _after_prompt(script, prompt)
        given = None if begun is None else prompt
    else:
        given = None if shape.prefix is None else shape.prefix(asked.body)
        begun = None if given is None else _after(script, given)
    if given is None or script.beginning == "ignore":
        return whole
    if script.beginning == "refuse":
        return shape.refusal
    if shape.space_refusal is not None and given != given.rstrip():
        return shape.space_refusal
    if begun is None:
        return whole
    return attrs.evolve(whole, start=begun[0], lead=begun[1])


def _after(script: Script, given: str) -> tuple[int, str] | None:
    """Return how many words of the answer this text has begun, and what it leaves of the last; None: it is no beginning."""
    for text in dict.fromkeys((given, given.rstrip())):
        at = i = 0
        while at < len(text) and i != script.pieces:
            piece = word(script, i)
            i += 1
            if text.startswith(piece, at):
                at += len(piece)
            elif piece.startswith(text[at:]):
                return i, piece[len(text) - at :]
            else:
                break
        if at == len(text):
            return i, ""
    return None


def _after_prompt(script: Script, prompt: str) -> tuple[int, str] | None:
    """Look for the answer's beginning, at least its first word, at the end of a prompt."""
    if script.pieces == 0:
        return None
    first = word(script, 0).strip()
    prompt = prompt[-_MAX_PROMPT_CHARS:]
    at = prompt.find(first)
    while at >= 0:
        if (begun := _after(script, prompt[at:])) is not None:
            return begun
        at = prompt.find(first, at + 1)
    return None
