"""HttpSource against the simulated upstream: every fault over a real socket, with the outcome and what the upstream saw."""

from __future__ import annotations

import json
import re
import ssl
from typing import Any

import attrs
import httpx
import msgspec
import pytest
import trio
import trio.testing
import trustme

from supervisor.dialects import Delta, Dialect, Fault, Fold, ToolCallDelta
from supervisor.dialects.openai_chat import OPENAI_CHAT
from supervisor.errors import ConfigurationError, ConnectError
from supervisor.stores import MemoryStore
from supervisor.streams import Deadlines, Limits, Output, open_supervisor
from supervisor.testing.upstream import Script, SimulatedUpstream, unreachable_url
from supervisor.upstream.catalog import Credential, Upstream
from supervisor.upstream.retry import RetryPolicy
from supervisor.upstream.source import MAX_REQUEST_BYTES, HttpSource
from supervisor.upstream.transport import StreamTransport
from tests.upstream.attempts import QUICK, SECRET, VARIABLE, Bench, Result, bench


@pytest.fixture(autouse=True)
def credential(monkeypatch: pytest.MonkeyPatch) -> None:
    """The upstream's key is in the environment."""
    monkeypatch.setenv(VARIABLE, SECRET)


@pytest.fixture
def virtual() -> trio.testing.MockClock:
    """Virtual time that leaves loopback the time it needs."""
    return trio.testing.MockClock(autojump_threshold=0.02)


# --- what is sent ---


async def test_a_stream_is_requested_and_read() -> None:
    """The request has the headers, the credential and `stream: true`; the answer is complete; the connection is kept."""
    async with bench() as b:
        result = await b.run("sim/ok?tokens=20")
        assert result.ending == ("completed", "stop")
        assert result.text == Script(tokens=20).expected_text()
        assert result.outcome.usage is not None
        assert (result.outcome.usage.input, result.outcome.usage.output) == (7, 20)
        assert [(a["attempt"], a["cause"], a["upstream"]) for a in result.attempts] == [(1, None, "sim")]
        request = b.up.requests[0]
        assert (request.method, request.target) == ("POST", "/v1/chat/completions")
        assert request.json() == {"model": "sim/ok?tokens=20", "messages": [], "stream": True}
        assert request.header("authorization") == f"Bearer {SECRET}"
        for name, value in (
            ("accept", "text/event-stream"),
            ("accept-encoding", "identity"),
            ("content-type", "application/json"),
            ("x-title", "tests"),
        ):
            assert [v for k, v in request.headers if k == name] == [value]
        await b.run("sim/ok")
        assert (b.up.request_count, b.up.accepted) == (2, 1)


async def test_the_state_moves_with_the_request(virtual: trio.testing.MockClock) -> None:
    """The connect clock stops when the request is sent, not when the answer begins: silence is `first_event`'s."""
    async with bench(deadlines=Deadlines(connect_s=5, first_event_s=30)) as b:
        start = trio.current_time()
        result = await b.run("sim/silent")
        assert result.ending == ("expired", "first_event")
        assert trio.current_time() - start == pytest.approx(30, abs=0.5)
        assert result.outcome.attempts == 1


async def test_events_are_seen_as_they_come() -> None:
    """A subscriber reads the first events while the upstream still holds the rest back."""
    async with bench() as b:
        stream = await b.start("sim/stall?after=2")
        seen = b""
        with trio.fail_after(10):  # less than the idle clock, whose expiry would publish them too
            async with stream.subscribe() as events:
                async for event in events:
                    seen += event.payload
                    if b'"w1 "' in seen:
                        break
        assert stream.snapshot().text == "w0 w1 "
        await stream.cancel()


async def test_a_slow_store_slows_the_reading(no_share) -> None:
    """While the store is behind nothing is read: the upstream is held back by TCP."""

    class Behind(MemoryStore):
        flowing = trio.Event()
        waits = 0

        @property
        def congested(self) -> bool:
            return not self.flowing.is_set()

        async def wait_flow(self) -> None:
            self.waits += 1
            await self.flowing.wait()

    store = Behind()
    async with bench(store=store, default=Script(tokens=200_000, events_per_write=64)) as b:
        stream = await b.start("m")
        await b.up.wait_requests(1)
        await trio.testing.wait_all_tasks_blocked(0.05)
        assert store.waits == 1
        held = b.up.connections[0].events_sent
        await trio.testing.wait_all_tasks_blocked(0.05)
        assert b.up.connections[0].events_sent == held < 200_000
        await stream.cancel()


BAD_REQUESTS: list[tuple[Any, str]] = [
    ({"stream": False}, "request.stream"),
    (b'{"stream": false}', "request.stream"),
    ({"stream": 1.5}, "request.stream"),
    (b"[]", "request"),
    (b"{", "request"),
    (b"[" * 100_000, "request"),
    ("text", "request"),
    ({"a": object()}, "request"),
    ({"a": "x" * (MAX_REQUEST_BYTES + 1)}, "request"),
]


@pytest.mark.parametrize(("request_", "field"), BAD_REQUESTS, ids=range(len(BAD_REQUESTS)))
def test_bad_requests_are_refused_at_once(request_: Any, field: str) -> None:
    """A body that is no streaming JSON object is the caller's error, named before anything is started."""
    upstream = Upstream(name="sim", base_url="http://127.0.0.1:9/v1")
    with pytest.raises(ConfigurationError) as caught:
        HttpSource(upstream, request_, transport=StreamTransport(trust_env=False))
    assert caught.value.field == field


async def test_bytes_that_stream_are_sent_unchanged() -> None:
    """A gateway's body goes out as it came in."""
    async with bench() as b:
        body = b'{"model":  "sim/ok", "stream": true, "x": 1.0e2}'
        stream = await b.sup.start(HttpSource(b.upstream, body, transport=b.transport))
        await stream.wait()
        assert b.up.requests[0].body == body


def test_a_missing_credential_is_named_not_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without its variable a source is not made; the message has the variable's name."""
    monkeypatch.delenv(VARIABLE)
    upstream = Upstream(name="sim", base_url="http://h/v1", credential=Credential.from_env(VARIABLE))
    with pytest.raises(ConfigurationError, match=VARIABLE):
        upstream.source({}, transport=StreamTransport(trust_env=False))


# --- attempts before the first event ---


@pytest.mark.parametrize("status", [408, 409, 425, 429, 500, 502, 503, 504, 529])
async def test_temporary_statuses_are_tried_again(status: int, virtual: trio.testing.MockClock) -> None:
    """Two failures, then an answer: three attempts in the journal, each with its cause and delay."""
    async with bench() as b:
        result = await b.run(f"sim/{status}?times=2&message=later")
        assert result.ending == ("completed", "stop")
        assert result.text == Script().expected_text()
        assert result.outcome.attempts == 3
        first, second, third = result.attempts
        assert (first["cause"], first["delay_s"]) == (None, 0.0)
        assert second["cause"] == third["cause"] == "http_status: later"
        assert 0 <= second["delay_s"] <= 1
        assert 0 <= third["delay_s"] <= 2
        assert b.up.request_count == 3


async def test_the_last_failure_is_the_outcome(virtual: trio.testing.MockClock) -> None:
    """When the attempts are used up the stream fails with the provider's message, its status, and their number."""
    async with bench() as b:
        result = await b.run("sim/503?message=overloaded%20today")
        assert result.ending == ("failed", "http_status")
        fault = result.outcome.fault
        assert fault is not None
        assert (fault.message, fault.status) == ("overloaded today (after 3 attempts)", 503)
        assert (result.outcome.attempts, b.up.request_count) == (3, 3)


@pytest.mark.parametrize("status", [400, 401, 403, 404, 413, 422])
async def test_permanent_statuses_are_not(status: int) -> None:
    """One attempt, and the provider's message as it was."""
    async with bench() as b:
        result = await b.run(f"sim/{status}?message=no")
        assert result.ending == ("failed", "http_status")
        assert result.outcome.fault is not None
        assert (result.outcome.fault.message, result.outcome.fault.status) == ("no", status)
        assert b.up.request_count == 1


async def test_a_used_up_quota_is_not_tried_again() -> None:
    """A 429 that time does not heal ends the stream."""
    async with bench() as b:
        result = await b.run(
            "sim/429?code=insufficient_quota&message=You%20exceeded%20your%20current%20quota"
        )
        assert result.ending == ("failed", "http_status")
        assert b.up.request_count == 1


@pytest.mark.parametrize(("status", "said", "requests"), [(503, "false", 1), (400, "true", 3)])
async def test_the_provider_may_decide(
    status: int, said: str, requests: int, virtual: trio.testing.MockClock
) -> None:
    """`x-should-retry` overrules the status."""
    script = Script(status=status, headers=(("x-should-retry", said),))
    async with bench(default=script) as b:
        await b.run("m")
        assert b.up.request_count == requests


@pytest.mark.parametrize(
    ("asked", "wait"),
    [("retry_after=7", 7.0), ("retry_after_ms=2500&retry_after=60", 2.5), ("retry_after=0", 0.0)],
)
async def test_retry_after_is_obeyed(asked: str, wait: float, virtual: trio.testing.MockClock) -> None:
    """The next attempt comes when the upstream said, and at most the jitter later."""
    async with bench() as b:
        result = await b.run(f"sim/429?times=1&{asked}")
        assert result.ending == ("completed", "stop")
        assert wait <= result.attempts[1]["delay_s"] <= wait + QUICK.jitter_s
        assert b.up.requests[1].at - b.up.requests[0].at >= wait


async def test_a_long_retry_after_is_reported_not_waited_for(virtual: trio.testing.MockClock) -> None:
    """Past `retry_after_max_s` the stream fails at once; the fault says how long was asked for."""
    async with bench() as b:
        start = trio.current_time()
        result = await b.run("sim/429?retry_after=3600")
        assert result.ending == ("failed", "http_status")
        assert result.outcome.fault is not None
        assert result.outcome.fault.retry_after_s == 3600
        assert trio.current_time() - start < 2


@pytest.mark.parametrize("fault", ["drop-head", "reset-head", "drop", "reset", "end"])
async def test_a_connection_that_dies_before_the_first_event(
    fault: str, virtual: trio.testing.MockClock
) -> None:
    """It is tried again, and if it goes on dying the stream is truncated, not complete."""
    async with bench() as b:
        well = await b.run(f"sim/{fault}?after=0&times=1")
        assert well.ending == ("completed", "stop")
        assert well.outcome.attempts == 2
        assert well.attempts[1]["cause"].startswith("truncated: ")
        assert well.text == Script().expected_text()
        ill = await b.run(f"sim/{fault}?after=0")
        assert ill.ending == ("failed", "truncated")
        assert ill.outcome.message.endswith("(after 3 attempts)")


async def test_a_refused_connection(virtual: trio.testing.MockClock) -> None:
    """Nobody listens: three attempts, then failed(connect)."""
    with unreachable_url() as url:
        async with bench(base_url=url) as b:
            result = await b.run("m")
            assert result.ending == ("failed", "connect")
            assert result.outcome.fault is not None
            assert (result.outcome.fault.kind, result.outcome.fault.temporary) == ("network", True)
            assert "(after 3 attempts)" in result.outcome.message


@pytest.mark.parametrize("mode", ["close", "reset"])
async def test_a_connection_ended_before_the_request(mode: Any, virtual: trio.testing.MockClock) -> None:
    """The first connection is ended as it opens; the second is served."""
    async with bench(accept=lambda n: mode if n == 1 else "normal") as b:
        result = await b.run("sim/ok")
        assert result.ending == ("completed", "stop")
        assert result.outcome.attempts == 2


async def test_no_answer_to_the_connect(virtual: trio.testing.MockClock) -> None:
    """A connect that nobody answers is ended by its clock."""
    with unreachable_url(mode="unanswered") as url:
        async with bench(base_url=url, deadlines=Deadlines(connect_s=3)) as b:
            assert (await b.run("m")).ending == ("expired", "connect")


async def test_no_clock_but_the_total_runs_between_attempts(virtual: trio.testing.MockClock) -> None:
    """A wait longer than connect and first_event together expires nothing."""
    async with bench(deadlines=Deadlines(connect_s=1, first_event_s=1, idle_s=1)) as b:
        result = await b.run("sim/503?times=1&retry_after=30")
        assert result.ending == ("completed", "stop")
    async with bench(deadlines=Deadlines(total_s=10)) as b:
        assert (await b.run("sim/503?retry_after=30")).ending == ("expired", "total")


async def test_a_cancel_during_the_wait_ends_it(virtual: trio.testing.MockClock) -> None:
    """Cancelled between two attempts, the stream makes no other."""
    async with bench() as b:
        stream = await b.start("sim/503?retry_after=5")
        await b.up.wait_requests(1)
        await trio.sleep(2)
        await stream.cancel()
        assert (await stream.wait()).reason == "requested"
        await trio.sleep(9)
        assert b.up.request_count == 1


async def test_one_attempt_means_no_retry() -> None:
    """`attempts=1` switches it off."""
    async with bench() as b:
        result = await b.run("sim/503", retry=RetryPolicy(attempts=1))
        assert result.ending == ("failed", "http_status")
        assert b.up.request_count == 1


async def test_a_certificate_that_is_not_trusted_is_not_tried_again() -> None:
    """Our own refusal of a connection is final, and says why."""
    authority = trustme.CA()
    server = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    authority.issue_cert("localhost").configure_cert(server)
    trusting = ssl.create_default_context()
    authority.configure_trust(trusting)
    async with SimulatedUpstream(ssl_context=server, server_name="localhost") as up, open_supervisor() as sup:
        upstream = Upstream(name="tls", base_url=up.base_url)
        for context, ending in ((ssl.create_default_context(), "connect"), (trusting, "stop")):
            transport = StreamTransport(trust_env=False, ssl_context=context)
            outcome = await (await sup.start(upstream.source({}, transport=transport))).wait()
            assert (outcome.reason, outcome.attempts) == (ending, 1)
            if ending == "connect":
                assert "certificate" in outcome.message
                assert outcome.fault is not None
                assert not outcome.fault.temporary
            await transport.aclose()


async def test_a_proxy_of_the_upstream_goes_before_the_transports() -> None:
    """`proxy` is used for its upstream, and `direct` goes round the transport's."""
    async with bench() as b:
        with unreachable_url() as url:
            dead = url.removesuffix("/v1")
            quick = RetryPolicy(attempts=1)
            for own, transports, reason in (
                (dead, None, "connect"),
                ("direct", dead, "stop"),
                (None, dead, "connect"),
            ):
                transport = StreamTransport(trust_env=False, proxy=transports)
                upstream = Upstream(name="sim", base_url=b.up.base_url, proxy=own)
                stream = await b.sup.start(upstream.source({}, transport=transport, retry=quick))
                assert (await stream.wait()).reason == reason
                await transport.aclose()


# --- faults inside the answer ---

ENDINGS: list[tuple[str, tuple[str, str], str | None]] = [
    ("drop?after=2", ("failed", "truncated"), "w0 w1 "),
    ("reset?after=2", ("failed", "truncated"), None),  # a RST may overtake what was sent before it
    ("end?after=2", ("failed", "truncated"), "w0 w1 "),
    ("no-marker?tokens=2", ("failed", "truncated"), "w0 w1 "),
    ("no-done?tokens=2", ("completed", "stop"), "w0 w1 "),
    ("ok?tokens=2&finish_reason=length", ("completed", "length"), "w0 w1 "),
    ("extra-after-done?tokens=2", ("completed", "stop"), "w0 w1 "),
    ("bad-json?after=1&tokens=2", ("completed", "stop"), "w0 w1 "),
    ("trickle?tokens=2", ("completed", "stop"), "w0 w1 "),
    ("ok?tokens=2&newline=crlf&comment_every=1", ("completed", "stop"), "w0 w1 "),
    ("ok?tokens=2&framing=until-close", ("completed", "stop"), "w0 w1 "),
    ("ok?tokens=2&framing=content-length", ("completed", "stop"), "w0 w1 "),
    ("drop?after=2&framing=content-length", ("failed", "truncated"), "w0 w1 "),
    ("end?after=2&framing=until-close", ("failed", "truncated"), "w0 w1 "),
    ("oversized?after=1&tokens=2", ("failed", "protocol"), "w0 "),
    ("bad-chunk?after=2", ("failed", "protocol"), "w0 w1 "),
    ("garbage-head", ("failed", "protocol"), ""),
    ("huge-head", ("failed", "protocol"), ""),
    ("error-after-finish?tokens=2&message=boom", ("failed", "provider_error"), "w0 w1 "),
    ("json?tokens=2", ("completed", "stop"), "w0 w1 "),
]


@pytest.mark.parametrize(("model", "ending", "text"), ENDINGS)
async def test_how_an_answer_ends(model: str, ending: tuple[str, str], text: str | None) -> None:
    """Each fault gives its outcome, with the partial kept, in one attempt."""
    async with bench() as b:
        result = await b.run(f"sim/{model}")
        assert result.ending == ending
        if text is not None:
            assert result.text == text
        assert (result.outcome.attempts, b.up.request_count) == (1, 1)


@pytest.mark.parametrize("shape", ["data", "event", "field", "bare"])
async def test_an_error_as_the_first_event(shape: str, virtual: trio.testing.MockClock) -> None:
    """An error before any part of an answer is tried again if it is temporary; the last one is in the journal."""
    async with bench() as b:
        result = await b.run(f"sim/error?after=0&times=2&error_shape={shape}")
        assert result.ending == ("completed", "stop")
        assert [a["attempt"] for a in result.attempts] == [1, 2, 3]
        assert result.text == Script().expected_text()
        result = await b.run(f"sim/error?after=0&error_shape={shape}&message=boom")
        assert result.ending == ("failed", "provider_error")
        assert result.outcome.message == "boom (after 3 attempts)"
        if shape in ("data", "event"):
            assert sum(kind == "data" and b"boom" in payload for kind, payload in result.records) == 1


@pytest.mark.parametrize("shape", ["data", "event", "chunk", "field", "bare", "string", "flat"])
async def test_errors_in_the_middle_have_the_providers_words(shape: str) -> None:
    """An error inside the stream is failed(provider_error) in every shape, and is not tried again."""
    async with bench() as b:
        result = await b.run(f"sim/error?after=2&error_shape={shape}&message=the%20pool%20is%20dry")
        assert result.ending == ("failed", "provider_error")
        assert result.outcome.fault is not None
        assert result.outcome.fault.message == "the pool is dry"
        assert result.text == "w0 w1 "
        assert b.up.request_count == 1


async def test_an_error_in_place_of_a_stream_is_tried_again(virtual: trio.testing.MockClock) -> None:
    """A 200 whose body is a temporary error is no answer yet."""
    error = Script(
        body=b'{"error": {"message": "overloaded", "type": "overloaded_error"}}',
        content_type="application/json",
    )
    async with bench() as b:
        b.up.enqueue(error)
        result = await b.run("sim/ok")
        assert result.ending == ("completed", "stop")
        assert result.attempts[1]["cause"] == "provider_error: overloaded"
        b.up.enqueue(error, error, error)
        result = await b.run("sim/ok")
        assert result.ending == ("failed", "provider_error")


async def test_a_body_that_is_no_stream() -> None:
    """HTML with status 200 is failed(protocol), at once."""
    async with bench(default=Script(body=b"<html><title>Sign in</title>", content_type="text/html")) as b:
        result = await b.run("m")
        assert result.ending == ("failed", "protocol")
        assert b.up.request_count == 1


async def test_a_body_encoded_against_our_wish() -> None:
    """A compressed body is refused by name rather than read as garbage."""
    async with bench(default=Script(headers=(("content-encoding", "gzip"),))) as b:
        result = await b.run("m")
        assert result.ending == ("failed", "protocol")
        assert "gzip" in result.outcome.message


async def test_redirects_are_not_followed() -> None:
    """The fault names the place without its secrets; nobody else gets the credential."""
    async with bench() as b, bench() as other:
        place = httpx.URL(other.up.base_url).copy_with(username="u", password="geheim", query=b"token=geheim")
        b.up.enqueue(Script(status=307, location=str(place)))
        result = await b.run("m")
        assert result.ending == ("failed", "http_status")
        assert result.outcome.fault is not None
        assert result.outcome.fault.status == 307
        assert "http://127.0.0.1; only a GET is redirected" in result.outcome.message
        assert "geheim" not in result.outcome.message
        assert other.up.accepted == 0


async def test_error_bodies_are_bounded_in_size_and_time(virtual: trio.testing.MockClock) -> None:
    """An endless and a stalled error body end in the status; what came of the message is used."""
    async with bench() as b:
        size = 32 << 20
        b.up.enqueue(Script(status=400, body=b'{"error": "x' + b"x" * size))
        result = await b.run("m")
        assert result.ending == ("failed", "http_status")
        assert len(result.outcome.message) < 5000
        with trio.fail_after(5):
            await b.up.connections[0].wait_closed()
        assert b.up.connections[0].closed_by in ("eof", "reset")
        assert b.up.connections[0].bytes_sent < size
        b.up.enqueue(Script(status=400, trickle_bytes=60, trickle_interval_s=60, message="slow words"))
        start = trio.current_time()
        result = await b.run("m")
        assert result.ending == ("failed", "http_status")
        assert result.outcome.fault is not None
        assert result.outcome.fault.status == 400
        assert trio.current_time() - start < 300


# --- the wire ---


@pytest.mark.parametrize(
    "model",
    ["silent", "stall?after=2", "endless", "flood?tokens=1000000", "503?retry_after=50", "hang-after-finish"],
)
async def test_a_cancel_reaches_the_wire(model: str) -> None:
    """After a cancel the upstream sees the close, whether it was silent, stalled, flowing, refusing or finishing."""
    async with bench() as b:
        stream = await b.start(f"sim/{model}")
        await b.up.wait_requests(1)
        connection = b.up.connections[0]
        if "flood" in model or model == "endless":
            await connection.wait_events(2)
        else:
            await trio.testing.wait_all_tasks_blocked(0.01)
        await stream.cancel()
        await stream.wait()
        if not model.startswith("503"):
            with trio.fail_after(2):
                await connection.wait_closed()
            assert connection.closed_by in ("eof", "reset")


async def test_a_cancel_while_shaking_hands() -> None:
    """A cancel during TLS closes the socket."""
    async with bench(accept="silent") as b:
        upstream = Upstream(name="tls", base_url=b.up.base_url.replace("http://", "https://"))
        stream = await b.sup.start(HttpSource(upstream, {}, transport=b.transport))
        connection = await b.up.wait_accepted(1)
        await stream.cancel()
        with trio.fail_after(2):
            await connection.wait_closed()


async def test_idle_expiry_reaches_the_wire(virtual: trio.testing.MockClock) -> None:
    """A stalled stream expires after its idle time, and its socket is closed; comments keep it alive."""
    async with bench(deadlines=Deadlines(idle_s=4, total_s=13)) as b:
        assert (await b.run("sim/stall?after=2")).ending == ("expired", "idle")
        assert (await b.run("sim/stall?after=2&heartbeat_s=3")).ending == ("expired", "total")
        await b.up.wait_open(0)


async def test_a_truncated_connection_is_not_reused() -> None:
    """Only connections that ended clean carry another request."""
    async with bench() as b:
        await b.run("sim/ok")
        await b.run("sim/drop?after=1")
        await b.run("sim/ok")
        assert [r.connection for r in b.up.requests] == [1, 1, 2]


# --- the credential ---


@pytest.mark.parametrize(
    "model",
    ["401?echo_credential=true", "503?echo_credential=true"]
    + [
        f"error?after=1&echo_credential=true&error_shape={s}"
        for s in ("data", "event", "chunk", "field", "bare", "string")
    ],
)
async def test_an_echoed_credential_goes_nowhere(
    model: str, virtual: trio.testing.MockClock, caplog: pytest.LogCaptureFixture
) -> None:
    """A provider that repeats the key in its error gets it removed from fault, message, journal, info and log."""
    async with bench() as b:
        result = await b.run(f"sim/{model}")
        assert result.outcome.state == "failed"
        assert result.outcome.fault is not None
        assert "[credential removed]" in result.outcome.fault.message
        everything = (
            repr(result.outcome) + repr(result.records) + result.outcome.to_json().decode() + caplog.text
        )
        everything += repr(b.sup.list())
        assert SECRET not in everything
        assert b.up.requests[0].credential == SECRET


async def test_a_credential_in_the_text_and_in_garbage_is_removed_too() -> None:
    """Also from tokens and from unreadable events; the text shown and the payload stored agree."""
    async with bench(default=Script(text=f"your key is {SECRET} indeed")) as b:
        result = await b.run("m")
        assert result.text == "your key is [credential removed] indeed"
        assert SECRET not in repr(result.records)
    async with bench(default=Script(body=b"data: {" + SECRET.encode() + b"\n\ndata: [DONE]\n\n")) as b:
        result = await b.run("m")
        assert any(kind == "skipped" for kind, _ in result.records)
        assert SECRET not in repr(result.records)


def escaped(text: str, levels: int = 1) -> str:
    """Return text as the inside of a JSON string with every character escaped, so many strings deep."""
    for _ in range(levels):
        text = "".join(f"\\u{ord(character):04x}" for character in text)
    return text


def spelled_out(text: str) -> str:
    """Return text followed by what its escapes stand for, however deep."""
    for _ in range(8):
        plain = re.sub(r"\\u([0-9a-fA-F]{4})", lambda m: chr(int(m[1], 16)), text)
        text += re.sub(r"\\(.)", r"\1", plain) if plain == text else plain
        if len(text) > 1 << 20:
            break
    return text


async def everything_told(b: Bench, model: str = "m") -> tuple[Result, str]:
    """Run to the outcome; return it, and all that the stream tells, escapes undone, its payloads read again."""
    stream = await b.start(model, retry=RetryPolicy(attempts=1))
    result = await b.result(stream, await stream.wait())
    reader, again = OPENAI_CHAT.reader(), Fold()
    told = [result.outcome.to_json().decode(), repr(stream.snapshot()), repr(b.sup.list())]
    async with stream.subscribe() as events:
        async for event in events:
            told += [event.name, event.payload.decode("utf-8", "replace")]
            if event.kind == "data":
                for delta in reader.read(event.payload, event.name or "message"):
                    again.apply(delta)
    told.append(repr(again.snapshot()))
    return result, "\n".join(spelled_out(text) for text in told)


CHUNK = '{"id":"c","model":"m","choices":[{"index":0,"delta":%s}]}'
PLACES = {
    "content": CHUNK % '{"content":"a KEY b"}',
    "reasoning": CHUNK % '{"reasoning":"KEY"}',
    "refusal": CHUNK % '{"refusal":"KEY"}',
    "arguments": CHUNK % '{"tool_calls":[{"index":0,"id":"i","function":{"name":"f","arguments":"KEY"}}]}',
    "arguments object": CHUNK
    % '{"tool_calls":[{"index":0,"function":{"name":"f","arguments":{"a":["KEY"],"KEY":1}}}]}',
    "tool name": CHUNK % '{"tool_calls":[{"index":0,"function":{"name":"KEY"}}]}',
    "tool id": CHUNK % '{"tool_calls":[{"index":0,"id":"KEY","function":{"name":"f"}}]}',
    "model": '{"model":"KEY","choices":[{"delta":{"content":"x"}}]}',
    "response id": '{"id":"KEY","choices":[{"delta":{"content":"x"}}]}',
    "finish reason": '{"choices":[{"delta":{},"finish_reason":"KEY"}]}',
    "cut finish reason": '{"choices":[{"delta":{},"finish_reason":"' + "x" * 45 + 'KEY"}]}',
    "finish reason cut twice": '{"choices":[{"delta":{},"finish_reason":"' + "x" * 240 + 'KEY"}]}',
    "a field nobody reads": '{"choices":[{"delta":{"content":"x"}}],"echo":[{"a":"KEY"}]}',
    "the name of a field": '{"choices":[{"delta":{"content":"x"}}],"KEY":1}',
    "a field told twice": '{"x":"KEY","x":"y","choices":[{"delta":{"content":"x"}}]}',
    "an error": '{"error":{"message":"bad KEY","code":"KEY"}}',
    "an error of text": '{"error":"bad KEY"}',
    "no JSON": '{"a": "KEY',
    "no JSON, broken": '{"KEY\udcff',
    "broken UTF-8": CHUNK % '{"content":"KEY \udcff"}',
    "a number beyond range": '{"n":' + "9" * 400 + ',"choices":[{"delta":{"content":"KEY"}}]}',
    "nested deeply": '{"n":' + "[" * 900 + "]" * 900 + ',"choices":[{"delta":{"content":"KEY"}}]}',
}
SPELLINGS = {
    "plain": SECRET,
    "one letter": "\\u0073" + SECRET[1:],
    "one hyphen": SECRET.replace("-", "\\u002D", 1),
    "all": escaped(SECRET),
    "twice": "\\" + escaped(SECRET[0]) + SECRET[1:],
    "all twice": escaped(SECRET, 2),
    "escaped backslash": "\\u005cu0073" + SECRET[1:],
}


@pytest.mark.parametrize("spelling", SPELLINGS.values(), ids=SPELLINGS)
@pytest.mark.parametrize("place", PLACES.values(), ids=PLACES)
async def test_a_credential_in_any_place_and_spelling(
    place: str, spelling: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Wherever it is echoed, and as JSON may escape it, it is in no payload, name, snapshot, reason, fault or info."""
    body = "data: " + place.replace("KEY", spelling) + "\n\ndata: [DONE]\n\n"
    marks: list[str | None] = []
    monkeypatch.setattr(Output, "mark", lambda _, reason: marks.append(reason))
    async with bench(default=Script(body=body.encode("utf-8", "surrogateescape"))) as b:
        result, told = await everything_told(b)
        assert SECRET[:12] not in spelled_out(repr(marks))
        assert SECRET[:12] not in told
        assert (
            "[credential removed]" in told or place == PLACES["a field told twice"]
        )  # the first of two is dropped
        assert str(result.outcome.state) in ("completed", "failed")
        assert len(result.outcome.reason) < 100


@pytest.mark.parametrize(
    "data",
    [
        CHUNK % json.dumps({"content": [SECRET[:9], {"type": "text", "text": SECRET[9:]}]}),
        CHUNK % json.dumps({"content": [{"thinking": SECRET[:9]}, {"thinking": SECRET[9:]}]}),
        '{"echo":"' + SECRET + '",' + (CHUNK % json.dumps({"content": [SECRET[:9], SECRET[9:]]}))[1:],
    ],
    ids=["text", "reasoning", "and whole"],
)
async def test_a_credential_put_together_from_parts_of_an_event(data: str) -> None:
    """Where only the meaning of an event has it, the meaning loses it and the payload is withheld."""
    async with bench(default=Script(body=f"data: {data}\n\ndata: [DONE]\n\n".encode())) as b:
        result, told = await everything_told(b)
        assert result.ending == ("completed", "done")
        assert SECRET not in told
        assert SECRET[9:] not in told
        assert "[credential removed]" in told


async def test_a_name_in_pieces_is_not_put_together() -> None:
    """A tool's name that becomes the credential with its last piece is not told, nor is that piece kept."""
    calls = [
        CHUNK % json.dumps({"tool_calls": [{"index": 0, "function": {"name": name}}]})
        for name in (SECRET[:9], SECRET[9:])
    ]
    body = "".join(f"data: {data}\n\n" for data in (*calls, "[DONE]"))
    async with bench(default=Script(body=body.encode())) as b:
        _, told = await everything_told(b)
        assert SECRET not in told
        assert SECRET[9:] not in told


async def test_what_else_is_in_a_payload_is_kept() -> None:
    """A payload with an escaped credential is encoded anew: all else in it stays, also JSON in its strings."""
    secret = "\\u0073" + SECRET[1:]
    arguments = json.dumps({"a": [1, SECRET], SECRET: "é"}).replace(SECRET, secret)
    call = {"index": 0, "id": "i", "function": {"name": "f", "arguments": arguments}}
    data = json.dumps({"n": 1.5, "KEY": None, "choices": [{"delta": {"tool_calls": [call]}}]})
    body = f"data: {data.replace('KEY', secret)}\n\ndata: [DONE]\n\n"
    async with bench(default=Script(body=body.encode())) as b:
        result = await b.run("m")
        payload = json.loads(next(payload for kind, payload in result.records if kind == "data"))
        kept = payload["choices"][0]["delta"]["tool_calls"][0]["function"].pop("arguments")
        assert json.loads(kept) == {"a": [1, "[credential removed]"], "[credential removed]": "é"}
        assert payload == {
            "n": 1.5,
            "[credential removed]": None,
            "choices": [{"delta": {"tool_calls": [{"index": 0, "id": "i", "function": {"name": "f"}}]}}],
        }


async def test_a_credential_as_the_name_of_an_event() -> None:
    """Names of events are looked through as well."""
    data = CHUNK % '{"content":"x"}'
    async with bench(default=Script(body=f"event: {SECRET}\ndata: {data}\n\ndata: [DONE]\n\n".encode())) as b:
        result, told = await everything_told(b)
        assert (result.ending, result.text) == (("completed", "done"), "x")
        assert SECRET not in told


async def test_a_credential_with_a_slash(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its slashes may come escaped, as some encoders always do; quotes and the like are recognized too."""
    for secret, spelling in (
        ("ab/cd+ef/gh==", "ab\\/cd+ef\\/gh=="),
        ("ab/cd+ef/gh==", "ab\\\\\\/cd+ef/gh=="),
        ('key"with<quotes', 'key\\"with\\u003Cquotes'),
    ):
        monkeypatch.setenv(VARIABLE, secret)
        for data in (
            CHUNK % f'{{"content":"{spelling}"}}',
            f'{{"choices":[],"echo":"{spelling}"}}',
            f'{{"error":"{spelling}"}}',
            f'{{"{spelling}',
        ):
            async with bench(default=Script(body=f"data: {data}\n\ndata: [DONE]\n\n".encode())) as b:
                _, told = await everything_told(b)
                assert secret not in told
                assert "[credential removed]" in told


async def test_escapes_without_the_credential_change_nothing() -> None:
    """A payload with escapes of its own, even doubtful ones, is journaled byte for byte."""
    content = r"\u0061\\u0062 \/ \u00e9 \ud83d\ude00 \" \n " + SECRET[:-1].replace("-", r"\u002d")
    data = CHUNK % f'{{"content": "{content}" }}'
    async with bench(default=Script(body=f"data: {data}\n\ndata: [DONE]\n\n".encode())) as b:
        result = await b.run("m")
        assert ("data", data.encode()) in result.records
        assert result.text == json.loads(data)["choices"][0]["delta"]["content"]


@pytest.mark.parametrize("struct", [Delta, ToolCallDelta, Fault])
async def test_every_text_of_an_events_meaning(struct: Any) -> None:
    """Each field that can hold text is looked through, by its type: one added later is found missing here."""

    @attrs.frozen
    class Telling:
        told: tuple[Delta, ...]

        def read(self, data: bytes, event: str = "message") -> tuple[Delta, ...]:
            return self.told

        def ending(self) -> str | None:
            return "stop"

    texts = [field.name for field in msgspec.structs.fields(struct) if field.type in (str, str | None)]
    assert texts
    seen: list[Any] = []
    kept = Output.append

    def append(out: Output, payload: bytes, name: str, deltas: Any) -> None:
        seen.append((payload, name, deltas))
        kept(out, payload, name, deltas)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Output, "append", append)
        for text in texts:
            value = {"kind": "server", "message": "m", "index": 0, text: f"a {SECRET} b"}
            inner = msgspec.convert({k: v for k, v in value.items() if k in struct.__struct_fields__}, struct)
            delta = (
                Delta(fault=inner)
                if struct is Fault
                else Delta(tool_calls=(inner,))
                if struct is ToolCallDelta
                else inner
            )
            async with bench(default=Script(body=b"data: x\n\n")) as b:
                telling = Telling((Delta(text="before"), delta))
                dialect = Dialect(name="telling", framing="sse", reader=lambda telling=telling: telling)
                upstream = attrs.evolve(b.upstream, dialect=dialect, path="/chat/completions")
                source = HttpSource(upstream, {}, transport=b.transport, retry=RetryPolicy(attempts=1))
                stream = await b.sup.start(source)
                result = await b.result(stream, await stream.wait())
                assert SECRET not in repr(result)
    assert len(seen) == len(texts)
    assert SECRET not in repr(seen)
    assert repr(seen).count("[credential removed]") >= len(texts)


async def test_a_payload_that_would_outgrow_its_limit_is_withheld(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where taking out a short credential makes an event larger than is allowed, the stream goes on without it."""
    monkeypatch.setenv(VARIABLE, "sk-12345")
    text = "sk-12345" * (Limits().max_event_bytes // 10)
    body = f"data: {CHUNK % json.dumps({'content': text})}\n\ndata: [DONE]\n\n"
    async with bench(default=Script(body=body.encode())) as b:
        result = await b.run("m")
        assert result.ending == ("completed", "done")
        assert b"sk-12345" not in b"".join(payload for _, payload in result.records)


@pytest.mark.parametrize("status", [200, 400, 503])
async def test_an_escaped_credential_in_an_unreadable_error(status: int) -> None:
    """An error that is shown as it came, as it is no JSON, does not show an escaped credential."""
    for spelling in (SECRET, "\\u0073" + SECRET[1:], escaped(SECRET)):
        body = ("{'message': '" + spelling).encode()
        async with bench(default=Script(status=status, body=body, content_type="text/plain")) as b:
            result, told = await everything_told(b)
            assert str(result.outcome.state) == "failed"
            assert SECRET[:12] not in told
            assert "[credential removed]" in result.outcome.message


async def test_a_credential_as_the_encoding_of_a_body() -> None:
    """The name of an encoding that is refused is looked through."""
    async with bench(default=Script(headers=(("content-encoding", SECRET),))) as b:
        result, told = await everything_told(b)
        assert result.ending == ("failed", "protocol")
        assert SECRET[:12] not in told


async def test_a_shortened_message_keeps_no_beginning_of_the_credential() -> None:
    """Where a message is cut inside the credential, the part before the cut is removed as well."""
    body = b"<p>" + b"x" * 475 + SECRET.encode()
    async with bench(default=Script(body=body, content_type="text/html")) as b:
        assert SECRET[:13] not in (await b.run("m")).outcome.message
    async with bench(default=Script(status=400, body=body)) as b:
        assert SECRET[:13] not in (await b.run("m")).outcome.message
    async with bench(default=Script(body=b"x" * 180 + SECRET.encode(), content_type="text/plain")) as b:
        assert SECRET[:13] not in (await b.run("m")).outcome.message


async def test_a_rotated_credential_is_used_by_the_next_attempt(
    virtual: trio.testing.MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The secret is read for each attempt."""
    async with bench() as b:
        stream = await b.start("sim/503?times=1&retry_after=5")
        await b.up.wait_requests(1)
        monkeypatch.setenv(VARIABLE, "sk-rotated-key")
        await stream.wait()
        assert [r.credential for r in b.up.requests] == [SECRET, "sk-rotated-key"]


async def test_a_transports_error_is_looked_through_too(virtual: trio.testing.MockClock) -> None:
    """Whatever raises, and whatever it says, the credential is not in it afterwards."""

    class Failing:
        async def open(self, request: httpx.Request, **_: Any) -> Any:
            await trio.lowlevel.checkpoint()
            raise ConnectError(f"cannot send {request.headers['authorization']}")

    async with bench() as b:
        stream = await b.sup.start(HttpSource(b.upstream, {}, transport=Failing(), retry=QUICK))
        result = await b.result(stream, await stream.wait())
        assert "cannot send Bearer [credential removed]" in result.outcome.message
        assert SECRET not in repr(result)


async def test_nothing_shows_the_credential() -> None:
    """Neither source nor upstream nor transport has it in its repr."""
    async with bench() as b:
        source = b.source("sim/ok")
        await (await b.sup.start(source)).wait()
        assert SECRET not in repr(source) + repr(b.upstream) + repr(b.transport) + json.dumps(b.up.report())
