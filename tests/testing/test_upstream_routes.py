"""The simulated upstream's paths: each provider's API, stored responses, beginnings, event streams, and the ledger."""

from __future__ import annotations

import json
import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import attrs
import httpx
import pytest
import trio
import trio.testing

from supervisor.dialects.replay import replay
from supervisor.testing.upstream import SCRIPT_HEADER, Script, SimulatedUpstream, UpstreamExchange

WORDS = Script().expected_text()
MESSAGES = [{"role": "user", "content": "Hello"}]

ROUTES: list[tuple[str, str, dict[str, Any]]] = [
    ("openai-chat", "/v1/chat/completions", {"messages": MESSAGES, "stream": True}),
    ("openai-completions", "/v1/completions", {"prompt": "Hello", "stream": True}),
    ("openai-responses", "/v1/responses", {"input": "Hello", "stream": True}),
    ("anthropic", "/v1/messages", {"messages": MESSAGES, "stream": True}),
    ("gemini", "/v1beta/models/sim-1:streamGenerateContent?alt=sse", {"contents": []}),
    ("gemini-jsonarray", "/v1beta/models/sim-1:streamGenerateContent", {"contents": []}),
    ("ollama", "/api/chat", {"messages": MESSAGES}),
    ("ollama", "/api/generate", {"prompt": "Hello"}),
    ("cohere", "/v2/chat", {"messages": MESSAGES, "stream": True}),
]
WHOLE = [(name, path, {**body, "stream": False}) for name, path, body in ROUTES if "Generate" not in path]
WHOLE.append(("gemini", "/v1beta/models/sim-1:generateContent", {"contents": []}))


@attrs.define
class Got:
    status: int
    headers: httpx.Headers
    body: bytes
    whole: bool

    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def numbers(self) -> list[int]:
        return [int(n) for n in re.findall(rb'"sequence_number":(\d+)', self.body)]


@attrs.define
class Client:
    up: SimulatedUpstream
    http: httpx.AsyncClient

    async def ask(self, path: str, body: Any = None, *, script: str = "", **headers: str) -> Got:
        """Ask, and take what comes until the end or the break."""
        sent = {name.replace("_", "-"): value for name, value in headers.items()}
        if script:
            sent[SCRIPT_HEADER] = script
        method = "GET" if body is None else "POST"
        data, whole = b"", True
        async with self.http.stream(method, path, json=body, headers=sent) as response:
            try:
                async for piece in response.aiter_raw():
                    data += piece
            except httpx.TransportError:
                whole = False
        return Got(response.status_code, response.headers, data, whole)

    async def last(self) -> UpstreamExchange:
        """Return the ledger's line of the last request, once its answer has ended."""
        return await self.up.wait_ended(self.up.request_count)


@asynccontextmanager
async def client(**options: Any) -> AsyncIterator[Client]:
    async with SimulatedUpstream(**options) as up:
        url = httpx.URL(up.base_url).copy_with(path="/")
        async with httpx.AsyncClient(base_url=url, trust_env=False) as http:
            yield Client(up, http)


@pytest.fixture
def virtual() -> trio.testing.MockClock:
    """Pauses take no time."""
    clock = trio.testing.MockClock()
    clock.autojump_threshold = 0.02
    return clock


@pytest.mark.parametrize(("dialect", "path", "body"), ROUTES + WHOLE, ids=lambda value: str(value)[:40])
async def test_each_path_is_answered_in_its_providers_shape(
    dialect: str, path: str, body: dict[str, Any]
) -> None:
    """A well answer, streamed or whole, is read by the dialect of that provider; the ledger knows what it was."""
    async with client() as ask:
        got = await ask.ask(path, body)
        result = replay(dialect, got.body)
        assert (result.state, result.snapshot.text) == ("completed", WORDS)
        line = await ask.last()
        assert (line.dialect, line.ended, line.billed) == (dialect, "whole", 8)
        assert line.streamed is (got.headers["content-type"] != "application/json" or got.body[:1] == b"[")
        assert line.request.json() == body


@pytest.mark.parametrize(("dialect", "path", "body"), ROUTES, ids=lambda value: str(value)[:40])
async def test_faults_strike_in_every_shape_and_pass(dialect: str, path: str, body: dict[str, Any]) -> None:
    """A drop, an HTTP error and an error inside the stream, once each; what comes after is well."""
    async with client() as ask:
        for name in ("drop", "529", "error"):
            model = f"sim/{name}?times=1&message=no"
            first = await ask.ask(path, body, script=model)
            if name == "529":
                assert first.status == 529
                assert "no" in first.body.decode()
            else:
                assert first.whole is (name == "error")
                result = replay(dialect, first.body)
                assert (result.state, result.snapshot.text) == ("failed", "w0 w1 w2 ")
            assert replay(dialect, (await ask.ask(path, body, script=model)).body).state == "completed"
        lines = list(ask.up.ledger)
        assert [line.ended for line in lines[::2]] == ["upstream", "whole", "upstream"]
        assert [line.billed for line in lines] == [3, 8, 0, 8, 3, 8]


async def test_the_model_of_gemini_is_in_its_path() -> None:
    """A script may be the path's model, however much of it is escaped."""
    async with client() as ask:
        for model in ("sim%2F503%3Fmessage=gone", "sim/503"):
            got = await ask.ask(f"/v1beta/models/{model}:streamGenerateContent?alt=sse", {})
            assert (got.status, got.json()["error"]["status"]) == (503, "UNAVAILABLE")


# --- beginnings ----------------------------------------------------------------------------------------------------------

ASSISTANT = {"role": "assistant", "content": "w0 w1"}
BEGUN: list[tuple[str, str, dict[str, Any]]] = [
    ("openai-chat", "/v1/chat/completions", {"messages": [*MESSAGES, {**ASSISTANT, "prefix": True}], "stream": True}),
    ("openai-completions", "/v1/completions", {"prompt": "Now count: w0 w1", "stream": True}),
    ("anthropic", "/v1/messages", {"messages": [*MESSAGES, ASSISTANT], "stream": True}),
    ("anthropic", "/v1/messages", {
        "messages": [*MESSAGES, {"role": "assistant", "content": [{"type": "text", "text": "w0 w1"}]}], "stream": True,
    }),
    ("gemini", "/v1/models/sim-1:streamGenerateContent?alt=sse", {
        "contents": [{"role": "user", "parts": [{"text": "Hello"}]}, {"role": "model", "parts": [{"text": "w0 w1"}]}],
    }),
    ("ollama", "/api/chat", {"messages": [*MESSAGES, ASSISTANT]}),
    ("ollama", "/api/generate", {"prompt": "count: w0 w1", "raw": True}),
    ("cohere", "/v2/chat", {"messages": [*MESSAGES, ASSISTANT], "stream": True}),
]  # fmt: skip


@pytest.mark.parametrize(("dialect", "path", "body"), BEGUN, ids=lambda value: str(value)[:40])
async def test_an_answer_goes_on_after_its_beginning(dialect: str, path: str, body: dict[str, Any]) -> None:
    """Exactly after it: the joined text is the whole; or it starts anew, or is refused, as the script says."""
    async with client() as ask:
        got = replay(dialect, (await ask.ask(path, body)).body).snapshot
        assert "w0 w1" + got.text == WORDS
        line = await ask.last()
        assert (line.begun_with, line.billed) == (2, 7)
        ignored = await ask.ask(path, body, script="sim/ok?beginning=ignore")
        assert replay(dialect, ignored.body).snapshot.text == WORDS
        refused = await ask.ask(path, body, script="sim/ok?beginning=refuse")
        assert refused.status == 400
        assert "begun" in refused.body.decode() or "prefill" in refused.body.decode()
        assert (await ask.last()).billed == 0


@pytest.mark.parametrize(
    ("given", "rest"),
    [
        ("", "One two  three"),
        ("O", "ne two  three"),
        ("One", " two  three"),
        ("One ", "two  three"),
        ("One two", "  three"),
        ("One two ", " three"),
        ("One two  ", "three"),
        ("One two   ", "  three"),
        ("One two  three", ""),
        ("One two  three\n", ""),
        ("Two", "One two  three"),
        ("One two  three four", "One two  three"),
    ],
)
async def test_beginnings_may_end_anywhere(given: str, rest: str) -> None:
    """In a word, after its space or without it; a text that is no beginning of the answer is passed over."""
    async with client(default=Script(text="One two  three")) as ask:
        body = {"messages": [*MESSAGES, {"role": "assistant", "content": given}], "stream": True}
        got = await ask.ask("/v1/chat/completions", body)
        assert replay("openai-chat", got.body).snapshot.text == rest


async def test_a_prompt_that_happens_to_end_like_the_answers_first_letter() -> None:
    """A prompt begins an answer only if it has at least its first word."""
    async with client() as ask:
        got = await ask.ask("/v1/completions", {"prompt": "Tell me now", "stream": True})
        assert replay("openai-completions", got.body).snapshot.text == WORDS


async def test_anthropic_refuses_a_beginning_with_a_space_at_its_end() -> None:
    """As the provider does, in its words."""
    async with client() as ask:
        body = {"messages": [*MESSAGES, {"role": "assistant", "content": "w0 "}], "stream": True}
        got = await ask.ask("/v1/messages", body)
        assert (got.status, got.json()["error"]["type"]) == (400, "invalid_request_error")
        assert "trailing whitespace" in got.json()["error"]["message"]


async def test_a_continued_answer_can_break_off_as_well() -> None:
    """The fault counts the words of each request: an answer that drops each time still comes to its end."""
    async with client() as ask:
        text, drops = "", 0
        while True:
            begun = [{"role": "assistant", "content": text.rstrip()}] if text else []
            body = {"messages": [*MESSAGES, *begun], "stream": True}
            got = await ask.ask("/v1/messages", body, script="sim/drop?after=3&tokens=9&times=4")
            result = replay("anthropic", got.body)
            text = text.rstrip() + result.snapshot.text
            if result.state == "completed":
                break
            drops += 1
        assert (text, drops) == (Script(tokens=9).expected_text(), 4)


# --- stored responses ------------------------------------------------------------------------------------------------------

RESPONSES = "/v1/responses"
BACKGROUND = {"input": "Hello", "stream": True, "background": True}


@pytest.mark.parametrize("at", range(17))
async def test_a_background_response_is_resumed_after_each_event(at: int) -> None:
    """Whatever event the connection drops at, the rest is to be had, exactly: no number is missing or doubled."""
    async with client() as ask:
        model = f"sim/drop?at_event={at}&times=1"
        first = await ask.ask(RESPONSES, {**BACKGROUND, "model": model})
        numbers = first.numbers
        if first.body.count(b"\n\n") < len(numbers):
            numbers = numbers[: first.body.count(b"\n\n")]  # the event that the drop has cut
        assert numbers == list(range(at))
        response_id = (await ask.last()).response
        assert response_id is not None
        query = f"stream=true&starting_after={at - 1}" if at else "stream=true"
        rest = await ask.ask(f"{RESPONSES}/{response_id.id}?{query}")
        assert rest.numbers == list(range(at, 17))
        whole = first.body[: first.body.rfind(b"\n\n") + 2] if at else b""
        result = replay("openai-responses", whole + rest.body)
        assert (result.state, result.snapshot.text) == ("completed", WORDS)
        assert ask.up.response(response_id.id).resumed == [at]
        assert [line.resumed_after for line in ask.up.ledger] == [None, at]
        assert [line.billed for line in ask.up.ledger] == [8, 0 if at else 8]


async def test_generation_goes_on_without_a_reader_until_it_is_cancelled(
    virtual: trio.testing.MockClock,
) -> None:
    """What is billed grows with the clock, not with the readers, and stops at the cancel; the usage says so."""
    async with client() as ask:
        model = "sim/drop?after=2&tokens=100&interval_s=1"
        await ask.ask(RESPONSES, {**BACKGROUND, "model": model})
        line = await ask.last()
        assert line.response is not None
        assert (line.words_sent, line.billed, trio.current_time()) == (2, 2, pytest.approx(1))
        await trio.sleep(10)
        assert line.billed == 12
        path = f"{RESPONSES}/{line.response.id}"
        going = (await ask.ask(path)).json()
        assert (going["status"], going["usage"]) == ("in_progress", None)
        over = (await ask.ask(f"{path}/cancel", {})).json()
        assert (over["status"], over["usage"]["output_tokens"]) == ("cancelled", 12)
        await trio.sleep(10)
        assert line.billed == 12
        assert line.response.cancelled_at == pytest.approx(11)
        assert (await ask.ask(path)).json() == over
        assert (await ask.ask(f"{path}/cancel", {})).json() == over
        # What was made before the cancel is still to be had; after it, nothing comes, not even an end.
        rest = await ask.ask(f"{path}?stream=true&starting_after=4", script="")
        assert replay("openai-responses", rest.body).state == "failed"


async def test_a_cancel_ends_the_stream_that_is_being_read(virtual: trio.testing.MockClock) -> None:
    """A reader of a cancelled response gets no further event, and no end of the answer."""
    async with client() as ask, trio.open_nursery() as nursery:
        read: list[Got] = []

        async def reader() -> None:
            model = "sim/ok?tokens=100&interval_s=1"
            read.append(await ask.ask(RESPONSES, {**BACKGROUND, "model": model}))

        nursery.start_soon(reader)
        await ask.up.wait_requests(1)
        await trio.sleep(5.5)
        line = ask.up.ledger[0]
        assert line.response is not None
        await ask.ask(f"{RESPONSES}/{line.response.id}/cancel", {})
        await ask.up.wait_ended(2)
        assert line.words_sent == 6
    result = replay("openai-responses", read[0].body)
    assert (result.state, result.snapshot.text) == ("failed", Script(tokens=6).expected_text())


async def test_a_resumed_stream_waits_for_what_is_not_made_yet(virtual: trio.testing.MockClock) -> None:
    """Events come when they are due: at once if they were made, else at the response's own pace."""
    async with client() as ask:
        await ask.ask(RESPONSES, {**BACKGROUND, "model": "sim/drop?after=1&tokens=10&interval_s=1&times=1"})
        line = await ask.last()
        assert line.response is not None
        await trio.sleep(4.5)
        got = await ask.ask(f"{RESPONSES}/{line.response.id}?stream=true&starting_after=5")
        assert trio.current_time() == pytest.approx(9)
        assert got.numbers == list(range(6, 19))
        assert (await ask.ask(f"{RESPONSES}/{line.response.id}")).json()["usage"]["output_tokens"] == 10


async def test_what_cannot_be_resumed(virtual: trio.testing.MockClock) -> None:
    """Unknown and expired ids, and responses that were not made in the background, are refused in OpenAI's shape."""
    async with client() as ask:
        assert (await ask.ask(f"{RESPONSES}/resp_none?stream=true")).status == 404
        await ask.ask(RESPONSES, {**BACKGROUND, "model": "sim/ok?expires_s=60"})
        line = await ask.last()
        assert line.response is not None
        path = f"{RESPONSES}/{line.response.id}"
        assert (await ask.ask(path)).json()["status"] == "completed"
        await trio.sleep(61)
        for got in (await ask.ask(path), await ask.ask(f"{path}/cancel", {})):
            assert got.status == 404
            assert got.json()["error"]["message"] == f"Response with id '{line.response.id}' not found."
        await ask.ask(RESPONSES, {**BACKGROUND, "background": False})
        line = await ask.last()
        assert line.response is not None
        path = f"{RESPONSES}/{line.response.id}"
        assert (await ask.ask(path)).json()["status"] == "completed"
        assert (await ask.ask(f"{path}?stream=true")).status == 400
        assert (await ask.ask(f"{path}/cancel", {})).status == 400


async def test_a_foreground_response_that_was_cut_is_not_kept() -> None:
    """Without the background, what the client did not get is gone."""
    async with client() as ask:
        await ask.ask(RESPONSES, {"input": "Hello", "stream": True, "model": "sim/drop"})
        line = await ask.last()
        assert line.response is not None
        assert (await ask.ask(f"{RESPONSES}/{line.response.id}")).status == 404


async def test_stored_responses_are_bounded() -> None:
    """The oldest is forgotten first."""
    async with client(max_records=2) as ask:
        for _ in range(3):
            await ask.ask(RESPONSES, BACKGROUND)
        ids = [line.response.id for line in ask.up.ledger if line.response is not None]
        assert len(ids) == 2
        assert (await ask.ask(f"{RESPONSES}/{ids[1]}")).status == 200
        assert (await ask.ask(f"{RESPONSES}/resp_sim00000001")).status == 404


# --- plain event streams ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("had", range(12))
async def test_an_event_stream_goes_on_after_the_last_event_id(had: int) -> None:
    """The ten events have the ids 1 to 10; after the last there is nothing more, which a 204 says."""
    async with client() as ask:
        headers = {"last_event_id": str(had)} if had else {}
        got = await ask.ask("/events?sim=ok&retry_ms=1500", **headers)
        if had >= 10:
            assert (got.status, got.body) == (204, b"")
            return
        result = replay("sse", got.body)
        assert [event.id for event in result.wire_events] == [str(n) for n in range(had + 1, 11)]
        assert result.wire_events[0].retry == (None if had else 1500)
        assert got.body.startswith(b"retry: 1500\nid: 1\n") is not bool(had)
        assert (await ask.last()).resumed_after == (had or None)


async def test_an_event_stream_that_drops_each_time_comes_to_its_end() -> None:
    """Each connection gets three more events."""
    async with client() as ask:
        last, ids = "", []
        for _ in range(4):
            got = await ask.ask("/events?sim=end&at_event=3", **({"last_event_id": last} if last else {}))
            ids += [event.id for event in replay("sse", got.body).wire_events]
            last = ids[-1]
        assert ids == [str(n) for n in range(1, 11)]
        assert (await ask.ask("/events?sim=end&at_event=3", last_event_id=last)).status == 204


@pytest.mark.parametrize("ask_by", ["query", "header", "model"])
async def test_scripts_of_event_streams(ask_by: str) -> None:
    """By the query, by a header or by a posted model."""
    async with client() as ask:
        if ask_by == "query":
            got = await ask.ask("/events?sim=503&message=gone")
        elif ask_by == "header":
            got = await ask.ask("/events", script="sim/503?message=gone")
        else:
            got = await ask.ask("/events", {"model": "sim/503?message=gone"})
        assert (got.status, got.json()["error"]["message"]) == (503, "gone")


@pytest.mark.parametrize("location", ["/events?sim=ok", "", None])
async def test_redirects(location: str | None) -> None:
    """With a place, with an empty one, and with none."""
    script = Script(status=301, location=location)
    async with client() as ask:
        ask.up.enqueue(script)
        got = await ask.ask("/events")
        assert (got.status, got.headers.get("location"), got.body) == (301, location, b"")


@pytest.mark.parametrize(("fault", "whole"), [(None, True), ("drop", False), ("reset", False)])
async def test_a_body_given_as_it_is(fault: Any, whole: bool) -> None:
    """It is sent, and then the fault strikes: what a list of reconnection cases is played with."""
    async with client() as ask:
        ask.up.enqueue(Script(body=b"id: abc\ndata: Hello\n\n", fault=fault))
        got = await ask.ask("/events")
        assert got.whole is whole
        assert got.headers["content-type"] == "text/event-stream"
        if fault != "reset":
            assert got.body == b"id: abc\ndata: Hello\n\n"


# --- the ledger -----------------------------------------------------------------------------------------------------------


async def test_the_ledger_tells_who_left() -> None:
    """A client that goes away is billed for what was sent, or for all of it where generation runs on."""
    async with client() as ask:
        for model, billed in (("sim/stall?after=2", 2), ("sim/stall?after=2&runs_on=true", 8)):
            body = {"model": model, "messages": MESSAGES, "stream": True}
            with pytest.raises(httpx.ReadTimeout):
                await ask.http.post("/v1/messages", json=body, timeout=0.1)
            line = await ask.last()
            assert (line.ended, line.words_sent, line.events_sent, line.billed) == ("client", 2, 5, billed)


async def test_the_report_has_the_ledger() -> None:
    """A simulator in a process of its own tells the same."""
    async with client() as ask:
        await ask.ask(RESPONSES, BACKGROUND)
        report = (await ask.ask("/sim/report")).json()
        assert report["ledger"][0] == {
            "number": 1,
            "method": "POST",
            "target": RESPONSES,
            "dialect": "openai-responses",
            "resumed_after": None,
            "begun_with": 0,
            "response_id": "resp_sim00000001",
            "cancelled": False,
            "words_sent": 8,
            "events_sent": 17,
            "billed": 8,
            "ended": "whole",
        }


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", "/v1/chat/completions"),
        ("POST", "/v1/nothing"),
        ("POST", "/v1/responses/x"),
        ("PUT", "/v1/responses/x"),
    ],
)
async def test_there_is_nothing_at_other_paths(method: str, path: str) -> None:
    """Also not for another method at a path that there is."""
    async with client() as ask:
        got = await ask.http.request(method, path)
        assert got.status_code == 404
        assert got.json()["error"]["message"] == f"no such route: {method} {path}"


async def test_an_endless_answer_is_never_whole() -> None:
    """Asked for without a stream, it is waited for in vain; nothing breaks."""
    async with client() as ask:
        with pytest.raises(httpx.ReadTimeout):
            await ask.http.post("/v1/messages", json={"model": "sim/endless"}, timeout=0.05)
        assert (await ask.ask("/v1/messages", {"model": "sim/ok"})).status == 200
