"""Recorded streams over a real socket, and through the command line: the same answers and the same endings."""

from __future__ import annotations

import contextlib
import json
import random
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

import pytest
import trio

from supervisor import Deadlines, open_supervisor
from supervisor.cli import main
from supervisor.dialects import BUILTIN, Snapshot
from supervisor.dialects.replay import ReplayResult
from supervisor.streams import Outcome, Supervisor
from supervisor.upstream import RetryPolicy, StreamTransport, Upstream
from tests.cases import cases_dir, transcripts
from tests.dialects.expected import STATES, boundaries, check, data_of, has_ended
from tests.upstream.scripted import Peer, serve

ALL = transcripts()
TRANSCRIPTS = [case for case in ALL if case["expected_terminal"] in STATES]
UNLISTED = [case for case in ALL if case["expected_terminal"] not in STATES]
DIALECTS = sorted({case["dialect"] for case in TRANSCRIPTS})
AT_ONCE = 16
ONCE = RetryPolicy(attempts=1)

Pieces = Iterator[bytes]


def of(dialect: str) -> list[dict[str, Any]]:
    return [case for case in TRANSCRIPTS if case["dialect"] == dialect]


# --- a provider that plays back --------------------------------------------------------------------------------------


def cut_at_random(body: bytes, seed: str) -> Pieces:
    drawn = random.Random(seed)
    at = 0
    while at < len(body):
        end = at + drawn.choice((1, 7, 100, 1000, 5000))
        yield body[at:end]
        at = end


def chunked(body: bytes, seed: str) -> Pieces:
    """Chunks that end anywhere, each head and body in writes of their own now and then."""
    yield b"Transfer-Encoding: chunked\r\n\r\n"
    for piece in cut_at_random(body, seed):
        yield b"%x\r\n%b\r\n" % (len(piece), piece)
    yield b"0\r\n\r\n"


def with_length(body: bytes, seed: str) -> Pieces:
    yield b"Content-Length: %d\r\n\r\n" % len(body)
    yield from cut_at_random(body, seed)


def until_close(body: bytes, seed: str) -> Pieces:
    yield b"Connection: close\r\n\r\n"
    yield from cut_at_random(body, seed)


def broken(body: bytes, seed: str) -> Pieces:
    """A chunked body whose connection is closed instead of its end."""
    yield b"Transfer-Encoding: chunked\r\n\r\n"
    for piece in cut_at_random(body, seed):
        yield b"%x\r\n%b\r\n" % (len(piece), piece)


FRAMINGS: dict[str, Callable[[bytes, str], Pieces]] = {
    "chunked": chunked,
    "content-length": with_length,
    "until-close": until_close,
}


@contextlib.asynccontextmanager
async def played(frame: Callable[[bytes, str], Pieces], bodies: dict[str, bytes]) -> AsyncIterator[str]:
    """Serve bodies: which one is asked for by a header. Gives the base URL."""
    types = {case["id"]: case["content_type"] for case in ALL}

    async def handler(peer: Peer) -> None:
        head, _ = await peer.request()
        (name,) = [
            line.split(b": ")[1].decode()
            for line in head.split(b"\r\n")
            if line.lower().startswith(b"x-case:")
        ]
        await peer.send(b"HTTP/1.1 200 OK\r\nContent-Type: %b\r\n" % types[name].encode())
        for piece in frame(bodies[name], name):
            await peer.send(piece)

    async with trio.open_nursery() as nursery:
        server = await serve(nursery, handler)
        yield f"http://127.0.0.1:{server.port}/v1"
        nursery.cancel_scope.cancel()


async def run_all(
    cases: list[dict[str, Any]],
    frame: Callable[[bytes, str], Pieces],
    bodies: dict[str, bytes],
    dialect: str = "",
) -> dict[str, tuple[Outcome, Snapshot]]:
    """Run a stream for each case, some at once; return how each ended and what its snapshot is."""
    ended: dict[str, tuple[Outcome, Snapshot]] = {}
    turn = trio.CapacityLimiter(AT_ONCE)
    with trio.fail_after(60):
        async with (
            played(frame, bodies) as base_url,
            contextlib.aclosing(StreamTransport(trust_env=False)) as transport,
            open_supervisor(deadlines=Deadlines(first_event_s=20, idle_s=20)) as sup,
            trio.open_nursery() as nursery,
        ):
            for number, case in enumerate(cases):
                upstream = Upstream(
                    name=f"recorded-{number}",
                    base_url=base_url,
                    dialect=dialect or case["dialect"],
                    path="/recorded",
                    headers={"X-Case": case["id"]},
                    retry=ONCE,
                )
                nursery.start_soon(_run, sup, upstream, transport, turn, case["id"], ended)
    return ended


async def _run(
    sup: Supervisor,
    upstream: Upstream,
    transport: StreamTransport,
    turn: trio.CapacityLimiter,
    name: str,
    ended: dict[str, tuple[Outcome, Snapshot]],
) -> None:
    async with turn:
        request = {"model": "recorded", "messages": [{"role": "user", "content": "again"}]}
        stream = await sup.start(upstream.source(request, transport=transport))
        outcome = await stream.wait()
        ended[name] = outcome, await stream.read_snapshot()


def told(outcome: Outcome, snapshot: Snapshot) -> dict[str, Any]:
    """Return the object that `replay` would tell."""
    return ReplayResult(
        dialect="", state=outcome.state.value, reason=outcome.reason, snapshot=snapshot, fault=outcome.fault
    ).to_json_object()


# --- over a socket ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("framing", FRAMINGS)
@pytest.mark.parametrize("dialect", DIALECTS)
async def test_over_a_socket(dialect: str, framing: str) -> None:
    """However the body is framed and cut, the outcome and the snapshot are what is expected of the recording."""
    cases = of(dialect)
    ended = await run_all(cases, FRAMINGS[framing], {case["id"]: case["body"] for case in cases})
    for case in cases:
        outcome, snapshot = ended[case["id"]]
        check(case, told(outcome, snapshot), snapshot)
        if snapshot.usage is not None:
            assert (outcome.usage, outcome.usage_quality) in {
                (snapshot.usage, "exact"),
                (snapshot.usage, "provider_partial"),
            }
        else:
            assert outcome.usage_quality in {"estimated", "unknown"}
        assert outcome.skipped == (1 if case["terminal_detail"] == "malformed_json" else 0)


@pytest.mark.parametrize("dialect", DIALECTS)
async def test_a_connection_lost_in_the_middle(dialect: str) -> None:
    """What was received is kept, and the stream is truncated unless the answer had ended, or had failed, before."""
    framing = BUILTIN[dialect].framing
    drawn = random.Random(dialect)
    cases = [case for case in of(dialect) if len(boundaries(framing, case["body"])) > 1]
    bodies = {
        case["id"]: case["body"][
            : drawn.choice(boundaries(framing, case["body"])[:-1]) + drawn.choice((0, 3))
        ]
        for case in cases
    }
    ended = await run_all(cases, broken, bodies)
    for case in cases:
        outcome, snapshot = ended[case["id"]]
        ending = f"{outcome.state.value}({outcome.reason})"
        # Where there is no end marker, a finish reason may come with each chunk (Gemini's older models): there was more.
        marked = bool(BUILTIN[dialect].endings.markers)
        if has_ended(dialect, data_of(framing, bodies[case["id"]])) and marked:
            assert outcome.state.value == "completed" or case["expected_terminal"] == "error", case["id"]
        else:
            assert ending == "failed(truncated)" or case["expected_terminal"] == "error", case["id"]
        assert (case["expected_text"] or "").startswith(snapshot.text)


async def test_streams_without_a_dialect_over_a_socket() -> None:
    """What no dialect is for is read as `generic`: to its end, with text and usage, and nothing of it unreadable."""
    ended = await run_all(
        UNLISTED, FRAMINGS["chunked"], {case["id"]: case["body"] for case in UNLISTED}, dialect="generic"
    )
    for outcome, snapshot in ended.values():
        assert (outcome.state.value, outcome.skipped, outcome.fault) == ("completed", 0, None)
        assert snapshot.text
        assert snapshot.usage is not None


# --- through the command line ----------------------------------------------------------------------------------------


def files(cases: list[dict[str, Any]]) -> list[str]:
    return [str(cases_dir() / "transcripts" / case["file"]) for case in cases]


def snapshot_of(one: dict[str, Any]) -> Snapshot:
    """Return the snapshot that `replay` folded, which its object does not tell whole."""
    from supervisor.dialects.replay import replay

    case = next(case for case in TRANSCRIPTS if one["file"].endswith(case["file"]))
    return replay(case["dialect"], case["body"]).snapshot


@pytest.mark.parametrize("chunk", [None, "1", "4096"])
@pytest.mark.parametrize("dialect", DIALECTS)
def test_replayed(dialect: str, chunk: str | None, capsys: pytest.CaptureFixture[str]) -> None:
    """`replay --json` tells of every recording what is expected, fed whole or in pieces."""
    cases = [case for case in of(dialect) if chunk != "1" or len(case["body"]) < 20_000]
    more = [] if chunk is None else ["--chunk", chunk]
    assert main(["replay", "--dialect", dialect, "--json", *more, *files(cases)]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert files(cases) == [one["file"] for one in lines]
    for case, one in zip(cases, lines, strict=True):
        check(case, one, snapshot_of(one))


def test_replayed_as_generic(capsys: pytest.CaptureFixture[str]) -> None:
    """Recordings of no dialect end well as `generic`."""
    assert main(["replay", "--dialect", "generic", "--json", *files(UNLISTED)]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [(one["state"], one["error"]) for one in lines] == [("completed", None)] * len(UNLISTED)


def test_replayed_by_a_process() -> None:
    """The program does the same, with no daemon: one recording of each dialect."""
    for dialect in DIALECTS:
        case = min(of(dialect), key=lambda case: len(case["body"]))
        command = [
            sys.executable,
            "-m",
            "supervisor.cli",
            "replay",
            "--dialect",
            dialect,
            "--json",
            *files([case]),
        ]
        done = subprocess.run(command, capture_output=True, timeout=60, check=False)
        assert (done.returncode, done.stderr) == (0, b"")
        one = json.loads(done.stdout)
        check(case, one, snapshot_of(one))
