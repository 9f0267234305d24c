"""Each command against a real daemon on loopback: what it prints, what it exits with, and that no secret is in any of it."""

from __future__ import annotations

import json
import os
import pty
import re
import shlex
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import attrs
import pytest
import trio

from supervisor.cli import Exit, following, main
from supervisor.cli.parser import TOKEN_VARIABLE, URL_VARIABLE, build_parser
from supervisor.control import CancelResultMessage, ControlClient
from supervisor.testing.upstream import Script
from tests.e2e.processes import (
    CREDENTIAL,
    TOKEN,
    WAIT_S,
    Daemon,
    daemon,
    environment,
    outcome_of,
    simulated_upstream,
    start_stream,
    wait_events,
)

ID = re.compile(r"[0-9a-hjkmnp-tv-z]{26}")


@attrs.define
class Shell:
    """Runs commands in this process and keeps all they printed."""

    daemon: Daemon
    folder: Path
    capsys: pytest.CaptureFixture[str] | None = None
    printed: list[str] = attrs.field(factory=list)

    def __call__(self, *argv: str) -> tuple[int, str, str]:
        assert self.capsys is not None
        self.capsys.readouterr()
        try:
            code = main(argv)
        except SystemExit as left:
            code = int(left.code or 0)
        out, err = self.capsys.readouterr()
        self.printed += [out, err]
        return code, out, err

    def json(self, *argv: str, code: int = 0) -> list[dict[str, Any]]:
        got, out, err = self(*argv, "--json")
        assert (got, "") == (code, "" if got == code else err)
        return [json.loads(line) for line in out.splitlines()]

    def start(self, model: str, *more: str) -> str:
        code, out, _ = self("start", "sim", "hello", "--model", model, "--detach", *more)
        assert code == 0
        assert ID.fullmatch(out.strip())
        return out.strip()


RESUMING = """
[retry]
wait_initial_s = 0.05
[upstreams.going-on]
base_url = "{base_url}"
proxy = "direct"
prefill = "assistant"
fallback = ["other"]
models = {{ stuck = "sim/401" }}
[upstreams.other]
base_url = "{base_url}"
proxy = "direct"
models = {{ stuck = "sim/stall?at_event=1" }}
"""


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Shell]:
    folder = tmp_path_factory.mktemp("daemon")
    with simulated_upstream(folder) as base_url:
        config = RESUMING.format(base_url=base_url)
        with daemon(folder, base_url, config=config) as process:
            yield Shell(process, folder)


@pytest.fixture
def shell(running: Shell, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Shell:
    monkeypatch.setenv(URL_VARIABLE, running.daemon.url)
    monkeypatch.setenv(TOKEN_VARIABLE, TOKEN)
    running.capsys = capsys
    return running


# --- start -----------------------------------------------------------------------------------------------------------


def test_start_follows(shell: Shell) -> None:
    """Standard output is the answer, exactly; what is said about it is on standard error."""
    code, out, err = shell("start", "sim", "hello", "--model", "sim/ok")
    assert (Exit.OK, Script().expected_text()) == (code, out)
    assert "completed(stop)" in err
    assert ID.search(err)


def test_start_as_json(shell: Shell) -> None:
    """With --json every event is a line, the start first and the outcome last."""
    events = shell.json("start", "sim", "hello", "--model", "sim/ok")
    assert (events[0]["kind"], events[-1]["kind"]) == ("started", "outcome")
    assert Script().expected_text() == "".join(event.get("text", "") for event in events)
    assert events[-1]["outcome"]["id"] == events[0]["id"]


@pytest.mark.parametrize(
    ("model", "options", "ending"),
    [
        ("sim/end?after=3", [], "failed(truncated)"),
        ("sim/401", [], "failed(http_status)"),
        ("sim/error?after=2", [], "failed(provider_error)"),
        ("sim/stall?after=2", ["--deadline", "idle=0.2"], "expired(idle)"),
        ("sim/silent", ["--deadline", "first-event=0.2", "--deadline", "total=none"], "expired(first_event)"),
    ],
)
def test_start_exit_codes(shell: Shell, model: str, options: list[str], ending: str) -> None:
    """A stream that did not complete is exit 4, and standard error says how it ended."""
    code, _, err = shell("start", "sim", "hello", "--model", model, *options)
    assert code == Exit.NOT_COMPLETED
    assert ending in err


def test_start_tells_of_retries(shell: Shell) -> None:
    """A further attempt is said on standard error, with its cause; the answer is whole."""
    code, out, err = shell("start", "sim", "hello", "--model", "sim/429?times=1&retry_after=0&key=told")
    assert (0, Script().expected_text()) == (code, out)
    assert "attempt 2" in err
    assert "after 2 attempts" in err


BREAKS = "sim/drop?after=3&text=one+two+three+four&times={times}&beginning={beginning}&key={key}"
ANSWER = "one two three four"


def test_the_running_text_of_an_answer_that_went_on(shell: Shell) -> None:
    """White space at a join may be there twice in what is written as it comes; `--final` prints what holds, once."""
    argv = ("start", "going-on", "hello", "--resume", "continuation")
    model = BREAKS.format(times=1, beginning="continue", key="joined")
    code, out, err = shell(*argv, "--model", model, "--key", "joined")
    assert (code, out) == (Exit.OK, "one two three  four")
    assert "attempt 2 (continuation) after" in err
    model = BREAKS.format(times=1, beginning="continue", key="joined at last")
    code, out, err = shell(*argv, "--model", model, "--final")
    assert (code, out) == (Exit.OK, ANSWER)
    assert "attempt 2 (continuation) after" in err
    assert shell("watch", "--key", "joined", "--final")[1] == ANSWER
    shown = shell("show", "--key", "joined")[1]
    assert re.search(
        r"^attempts +first at going-on: answered, continuation at going-on: answered *$", shown, re.MULTILINE
    )
    assert re.search(r"^joined at +13 *$", shown, re.MULTILINE)


def test_the_running_text_of_an_answer_that_was_asked_for_again(shell: Shell) -> None:
    """What was withdrawn stands in what is written as it comes, not with `--final`; who answered is told."""
    model = BREAKS.format(times=3, beginning="refuse", key="again")
    argv = ("start", "going-on", "hello", "--resume", "continuation,restart", "--key", "again")
    code, out, err = shell(*argv, "--model", model)
    assert (code, out) == (Exit.OK, "one two three " * 2 + ANSWER)
    assert "attempt 3 (restart) after" in err
    assert "attempt 4 (fallback to other) after" in err
    assert err.count("is withdrawn") == 2
    code, out, err = shell("watch", "--key", "again", "--final")
    assert (code, out) == (Exit.OK, ANSWER)
    assert err.count("is withdrawn") == 2
    assert re.search(
        r"^attempts +first at going-on: withdrawn, continuation at going-on, restart at going-on: withdrawn, "
        r"fallback at other: answered *$",
        shell("show", "--key", "again")[1],
        re.MULTILINE,
    )


def test_show_does_not_wait_for_what_a_live_stream_says_next(shell: Shell) -> None:
    """Of a live stream with several attempts it tells those that there are, also where its last event has no text."""
    argv = ("start", "going-on", "hello", "--model", "stuck", "--detach")
    stream_id = shell(*argv)[1].strip()

    async def data(client: ControlClient) -> None:
        async with client.subscribe(stream_id) as events:
            async for event in events:
                if event.kind == "data":
                    assert not event.text
                    return

    shell.daemon.ask(data)
    assert re.search(
        r"^attempts +first at going-on, fallback at other *$", shell("show", stream_id)[1], re.MULTILINE
    )
    shell("cancel", stream_id)


def test_attempts_are_counted_once(shell: Shell) -> None:
    """Where the message says after how many attempts, the line does not say it again."""
    _, _, err = shell(
        "start", "other", "hello", "--model", "sim/503?times=9&retry_after=0", "--attempts", "2"
    )
    assert err.count("after 2 attempts") == 1


def test_start_takes_requests(shell: Shell, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A request is taken as it is, from a file, or from standard input; --model wins over its model."""
    body = json.dumps({"model": "sim/401", "messages": []})
    path = tmp_path / "body.json"
    path.write_text(body)
    for text in (body, f"@{path}"):
        assert shell("start", "sim", "--request", text)[0] == Exit.NOT_COMPLETED
        assert shell("start", "sim", "--request", text, "--model", "sim/ok")[0] == Exit.OK
    with path.open() as file:
        monkeypatch.setattr(sys, "stdin", file)
        assert shell("start", "sim", "--request", "-", "--model", "sim/ok")[0] == Exit.OK


@pytest.mark.parametrize(
    "line",
    [
        "sim hello --model sim/ok --label a=b",
        "sim --model sim/ok hello --label a=b",
        "sim --model sim/ok --label a=b hello",
        "--model sim/ok sim hello --label a=b",
        "--model sim/ok sim --label a=b hello",
        "--model sim/ok --label a=b sim hello",
        "--model sim/ok --label a=b -- sim hello",
    ],
)
def test_any_order(line: str) -> None:
    """PROMPT may stand anywhere among the options."""
    options = build_parser().parse_args(["start", *line.split()])
    assert (options.upstream, options.prompt, options.model) == ("sim", "hello", "sim/ok")
    assert options.labels == [("a", "b")]


def test_the_first_command_of_the_readme() -> None:
    """What the README says to type is understood, word for word."""
    readme = Path(__file__).parents[1].joinpath("README.md").read_text("utf-8")
    lines = re.findall(r"^stream-supervisor (start .*)$", readme, re.MULTILINE)
    assert lines
    for line in lines:
        options = build_parser().parse_args(shlex.split(line, comments=True))
        assert options.upstream
        assert options.prompt
        assert options.model


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["start", "sim"], "PROMPT"),
        (["start", "sim", "--model", "m", "hello", "twice"], "twice"),
        (["start", "sim", "--request", "{}", "hello"], "not allowed"),
        (["start", "--model", "m"], "UPSTREAM"),
        (["watch", "x", "--key", "k"], "not allowed"),
        (["watch", "x", "--events"], "--events needs --json"),
        (["watch", "--events", "--json"], "--events needs --json, and an ID"),
        (["watch", "--final"], "--final needs an ID"),
        (["watch", "x", "--final", "--json"], "--final needs an ID or --key, and no --json"),
        (["start", "sim", "x", "--model", "m", "--final", "--json"], "--final: not with --json"),
        (["start", "sim", "x", "--model", "m", "--final", "--detach"], "--final: not with --detach"),
        (["cancel", "--key", "k", "x"], "not allowed"),
        (["start", "sim", "hello"], "--model"),
        (["start", "sim", "hello", "--request", "{}"], "not allowed"),
        (["start", "sim", "--request", "{"], "not JSON"),
        (["start", "sim", "--request", "[]"], "a JSON object"),
        (["start", "sim", "--request", "@/nowhere"], "/nowhere"),
        (["start", "sim", "--request", '{"stream": false}'], "stream"),
        (["start", "nobody", "hello", "--model", "m"], "sim"),
        (["start", "sim", "x", "--model", "m", "--deadline", "tea=1"], "first_event"),
        (["start", "sim", "x", "--model", "m", "--deadline", "idle=x"], "seconds"),
        (["start", "sim", "x", "--model", "m", "--label", "x"], "NAME=VALUE"),
        (["start", "sim", "x", "--model", "m", "--on-detach", "drop"], "keep"),
        (["start", "sim", "x", "--model", "m", "--attempts", "0"], "attempts"),
        (["watch", "x", "--after", "1-2"], "EPOCH:SEQ"),
        (["cancel"], "exactly one"),
        (["cancel", "x", "--all"], "exactly one"),
        (["show"], "--key"),
        (["list", "--state", "done"], "completed"),
        (["dance"], "start"),
        ([], "COMMAND"),
    ],
)
def test_wrong_usage(shell: Shell, argv: list[str], said: str) -> None:
    """Wrong usage is exit 2, and says what would be right."""
    code, out, err = shell(*argv)
    assert (code, out) == (Exit.USAGE, "")
    assert said in err
    assert "Traceback" not in err


def test_keys(shell: Shell) -> None:
    """A key joins, is refused, or is replaced, as asked."""
    first = shell.start("sim/endless", "--key", "work", "--label", "kind=keys")
    assert first == shell.start("sim/endless", "--key", "work")
    code, _, err = shell("start", "sim", "x", "--model", "sim/ok", "--key", "work", "--on-conflict", "reject")
    assert code == Exit.REFUSED
    assert first in err
    assert re.search(r"\((pending|connecting|streaming)\)", err)
    assert "--on-conflict attach" in err
    assert "--on-conflict replace" in err
    assert "on_conflict=" not in err
    second = shell.start("sim/endless", "--key", "work", "--on-conflict", "replace")
    assert first != second
    assert shell.daemon.ask(outcome_of(first)) == "cancelled(replaced)"
    assert shell.json("show", "--key", "work")[0]["stream"]["id"] == second
    assert shell.json("cancel", "--key", "work")[0]["outcome"] == "won"


def test_joining_what_has_ended(shell: Shell) -> None:
    """Who joins a stream that has ended is told so, and how to start anew; a live one is only joined."""
    argv = ("start", "sim", "x", "--model", "sim/ok", "--key", "ended")
    assert "joined" not in shell(*argv)[2]
    code, out, err = shell(*argv)
    assert (code, out) == (0, Script().expected_text())
    assert ", which has ended as completed(stop); --on-conflict replace starts anew" in err
    code, out, err = shell(*argv, "--detach")
    assert ID.fullmatch(out.strip())
    assert f"joined {out.strip()}, which has ended" in err
    assert "joined" not in shell(*argv, "--on-conflict", "replace")[2]
    live = ("start", "sim", "x", "--model", "sim/endless", "--key", "live", "--detach")
    stream_id = shell(*live)[1].strip()
    assert f"joined {stream_id}\n" == shell(*live)[2]
    shell("cancel", stream_id)


def test_on_detach(shell: Shell) -> None:
    """`--on-detach cancel:0` ends a stream that nobody reads."""
    stream_id = shell.start("sim/endless", "--on-detach", "cancel:0")
    assert shell.daemon.ask(outcome_of(stream_id)) == "cancelled(detached)"


# --- watch, show, list -----------------------------------------------------------------------------------------------


def test_watch_from_anywhere(shell: Shell) -> None:
    """Watching from the start, from a cursor, from a snapshot or from the tail gives what lies after it."""
    model = "sim/ok?tokens=30"
    stream_id = shell.start(model)
    whole = Script(tokens=30).expected_text()
    assert (0, whole) == shell("watch", stream_id)[:2]
    assert (0, whole) == shell("watch", stream_id, "--after", "snapshot")[:2]
    code, out, err = shell("watch", stream_id, "--after", "tail")
    assert (code, out) == (0, "")
    assert "completed(stop)" in err
    events = shell.json("watch", stream_id, "--events")
    assert {"attempt", "data", "outcome"} == {event["kind"] for event in events}
    tenth = next(event["seq"] for event in events if event.get("text") == "w9 ")
    rest = shell("watch", stream_id, "--after", f"1:{tenth}")[1]
    assert whole == Script(tokens=10).expected_text() + rest
    assert [event["kind"] for event in shell.json("watch", stream_id, "--after", "tail")] == ["outcome"]
    code, out, err = shell("watch", stream_id, "--after", "1:9999999")
    assert (code, out) == (1, "")
    assert f"there is no position 1:9999999; its events 1:1 to 1:{events[-1]['seq']} can be read" in err
    assert "--after 1:0 gives all" in err


def test_watch_all(shell: Shell) -> None:
    """Without an id the streams are told, one a line and change, until none is live."""
    stream_id = shell.start("sim/ok")
    shell("cancel", "--all")
    code, out, _ = shell("watch", "--until-idle", "--interval", "0")
    assert code == 0
    assert any(stream_id in line and "completed(stop)" in line for line in out.splitlines())
    assert stream_id in {stream["id"] for stream in shell.json("watch", "--until-idle")}


def test_show(shell: Shell) -> None:
    """All about one stream: what it is, how it ended, what it said, in words and as JSON."""
    stream_id = shell.start("sim/ok", "--label", "kind=[red]show", "--key", "shown\x1b[2J")
    shell("watch", stream_id)
    code, out, _ = shell("show", stream_id)
    assert code == 0
    for part in (
        stream_id,
        "completed(stop)",
        "[red]show",
        Script().expected_text(),
        "openai-chat",
        "sim/ok",
    ):
        assert part in out
    assert "\x1b" not in out
    (told,) = shell.json("show", "--key", "shown\x1b[2J")
    assert told["id"] == told["stream"]["id"] == stream_id
    assert shell.json("show", "key:shown\x1b[2J")[0]["id"] == stream_id
    assert told["snapshot"]["text"] == Script().expected_text()


def test_trace(shell: Shell, tmp_path: Path) -> None:
    """As a drawing, as JSON, and as a file for a viewer; by id or key; what is wrong is said."""
    stream_id = shell.start("sim/429?times=1", "--key", "traced")
    assert shell("watch", stream_id)[0] == 0
    code, out, _ = shell("trace", stream_id)
    assert code == 0
    assert f"{stream_id} completed(stop)" in out
    assert "attempt 2 (retry at sim)" in out
    (told,) = shell.json("trace", "--key", "traced")
    assert (told["id"], len(told["attempts"]), told["outcome"]["attempts"]) == (stream_id, 2, 2)
    code, out, err = shell("trace", stream_id, "--perfetto", str(tmp_path / "file.json"))
    assert (code, out) == (0, "")
    assert "ui.perfetto.dev" in err
    file = json.loads((tmp_path / "file.json").read_text())
    assert json.loads(shell("trace", stream_id, "--perfetto", "-")[1]) == file
    assert any("retry" in event["name"] for event in file["traceEvents"])
    for argv, said, expected in (
        (("trace",), "which stream?", 2),
        (("trace", "--json", "--perfetto", "-", stream_id), "--perfetto -", 2),
        (("trace", stream_id, "--perfetto", str(tmp_path)), str(tmp_path), 1),
    ):
        code, out, err = shell(*argv)
        assert (code, out) == (expected, "")
        assert said in err


def test_list(shell: Shell) -> None:
    """Filters choose, pages continue, and a pipe gets whole ids and neither colours nor a width."""
    ids = [
        shell.start("sim/ok", "--label", "kind=list", "--label", f"n={n}", "--key", f"key-{n}" * 12)
        for n in range(5)
    ]
    for stream_id in ids:
        shell("watch", stream_id)
    code, out, _ = shell("list", "--label", "kind=list")
    assert code == 0
    assert all(stream_id in out for stream_id in ids)
    assert "key-4" * 12 in out
    assert "lasted" in out
    assert "\x1b" not in out
    pages = [shell.json("list", "--label", "kind=list", "--limit", "2")]
    while len(pages[-1]) == 2:
        pages.append(
            shell.json("list", "--label", "kind=list", "--limit", "2", "--before", pages[-1][-1]["id"])
        )
    assert list(reversed(ids)) == [stream["id"] for page in pages for stream in page]
    assert f"--before {ids[-2]}" in shell("list", "--label", "kind=list", "--limit", "2")[1]
    (one,) = shell.json("list", "--key", "key-3" * 12)
    assert (ids[3], "completed") == (one["id"], one["state"])
    assert shell.json("list", "--label", "kind=list", "--live") == []
    assert len(shell.json("list", "--label", "kind=list", "--ended", "--state", "completed")) == 5
    assert shell.json("list", "--state", "expired", "--label", "kind=list") == []
    assert shell.json("list", "--upstream", "nobody") == []


def test_unknown_streams(shell: Shell) -> None:
    """An id that nobody has is exit 5, whoever asks, and the way to name a key is told; a key is named once."""
    for argv in (["show", "nobody"], ["watch", "nobody"], ["cancel", "nobody"], ["watch", "--key", "nobody"]):
        code, out, err = shell(*argv)
        assert (code, out) == (Exit.UNKNOWN_STREAM, "")
        assert "nobody" in err
        assert ("--key KEY or key:KEY" in err) == ("--key" not in argv)
    for wrong in (["show", "key:"], ["show", "key:a", "--key", "b"], ["show", "a", "--key", "b"]):
        assert shell(*wrong)[0] == Exit.USAGE


# --- cancel and the rest ---------------------------------------------------------------------------------------------


def test_cancel(shell: Shell) -> None:
    """By id, by label, by all, and by a key not seen yet; each answered from the settled state."""
    one = shell.daemon.ask(start_stream("sim/endless"))
    code, out, _ = shell("cancel", one, "--reason", "no longer needed")
    assert code == 0
    assert "won" in out
    assert shell.json("cancel", one)[0]["outcome"] == "already_terminal"
    (told,) = shell.json("show", one)
    assert tuple(told["stream"]["outcome"][name] for name in ("reason", "message")) == (
        "requested",
        "no longer needed",
    )
    budgeted = shell.start("sim/endless?interval_s=0.01")
    how = ("--mode", "drain", "--drain-tokens", "2", "--drain-s", "3600")
    assert shell.json("cancel", budgeted, *how)[0]["outcome"] == "won"
    assert "tokens in, " in (shown := shell("show", budgeted)[1])
    assert "out, estimated]" in shown
    assert shell("cancel", budgeted, "--drain-tokens", "-1")[0] == Exit.USAGE
    assert shell("cancel", "--label", "kind=cancel") == (
        0,
        "",
        "nothing matched: no live stream has these labels\n",
    )
    few = {shell.start("sim/endless", "--label", "kind=cancel") for _ in range(3)}
    other = shell.start("sim/endless")
    assert few == {result["id"] for result in shell.json("cancel", "--label", "kind=cancel")}
    assert {other} == {result["id"] for result in shell.json("cancel", "--all")}
    assert shell.json("cancel", "--key", "not yet")[0]["outcome"] == "tombstoned"
    late = shell.start("sim/endless", "--key", "not yet")
    assert shell.daemon.ask(outcome_of(late)) == "cancelled(requested)"


def test_figures(shell: Shell) -> None:
    """stats, health and reap say what the daemon says, as a table and as JSON."""
    assert shell.json("stats")[0]["supervisor"]["state"] == "open"
    assert "supervisor.store.commits" in shell("stats")[1]
    assert shell.json("health")[0]["status"] == "ok"
    assert "ok" in shell("health")[1]
    (report,) = shell.json("reap", "--dry-run")
    assert (report["dry_run"], report["reaped"]) == (True, [])
    assert "0 were reaped" in shell("reap")[2]


def test_a_daemon_out_of_reach(shell: Shell, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No daemon, no token or a wrong one is exit 3; a token file is as good as the variable; never an argument's value."""
    dial, dialled = trio.open_tcp_stream, []

    async def counted(*args: Any) -> trio.SocketStream:
        dialled.append(args)
        return await dial(*args)

    with monkeypatch.context() as patch:
        patch.setattr(trio, "open_tcp_stream", counted)
        for wait_s, times in (("0", 1), ("0.01", 2)):
            dialled.clear()
            code = shell("health", "--url", "ws://127.0.0.1:1", "--connect-s", wait_s)[0]
            assert (code, len(dialled)) == (Exit.UNREACHABLE, times)
    assert build_parser().parse_args(["health"]).connect_s == 3
    assert shell("health", "--url", "http://127.0.0.1:1")[0] == Exit.USAGE
    monkeypatch.delenv(TOKEN_VARIABLE)
    code, _, err = shell("health")
    assert code == Exit.UNREACHABLE
    assert "--token-file" in err
    path = tmp_path / "token"
    assert shell("health", "--token-file", str(path))[0] == Exit.USAGE
    path.write_text("wrong")
    assert shell("health", "--token-file", str(path))[0] == Exit.UNREACHABLE
    path.write_text(f"{TOKEN}\n")
    assert shell("health", "--token-file", str(path))[0] == Exit.OK


def test_help_and_version(shell: Shell) -> None:
    """The exit codes are in --help; --version names the version."""
    code, out, _ = shell("--help")
    assert code == 0
    for exit_code in Exit:
        assert re.search(rf"^ +{int(exit_code)}  ", out, re.MULTILINE)
    assert shell("--version")[1].startswith("stream-supervisor ")
    for command in ("serve", "start", "watch", "list", "show", "cancel", "demo", "replay", "check-config"):
        assert shell(command, "--help")[0] == 0


def test_check_config(shell: Shell, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A good configuration is printed with its upstreams and warnings; a bad one is exit 2 and says where."""
    path = tmp_path / "my.toml"
    path.write_text(
        'discover = false\n[upstreams.x]\nbase_url = "http://127.0.0.1:1"\napi_key_env = "X_KEY"\n'
    )
    code, out, err = shell("check-config", str(path))
    assert code == 0
    assert "env:X_KEY" in out
    assert "X_KEY" in err  # not set: a warning
    monkeypatch.setenv("X_KEY", CREDENTIAL)
    (told,) = shell.json("check-config", "--config", str(path))
    assert (told["ok"], told["warnings"], told["upstreams"]["x"]["dialect"]) == (True, [], "openai-chat")
    assert told["settings"]["limits"]["max_live"] == 10_000
    path.write_text("[limits]\nmax_liv = 1")
    code, _, err = shell("check-config", str(path))
    assert code == Exit.USAGE
    assert "'max_live'" in err
    (told,) = shell.json("check-config", str(path), code=Exit.USAGE)
    assert told["ok"] is False
    assert shell("serve", "--config", str(path))[0] == Exit.USAGE


def test_a_route_to_the_simulated_upstream(shell: Shell, tmp_path: Path) -> None:
    """What `serve --simulated` serves itself can be named by a route; without the option it is not there."""
    path = tmp_path / "my.toml"
    path.write_text('[[gateway.routes]]\nupstream = "simulated"\n')
    assert shell.json("check-config", "--simulated", str(path))[0]["warnings"] == []
    code, _, err = shell("check-config", str(path))
    assert (code, "'simulated' is not valid" in err) == (Exit.USAGE, True)


def test_check_config_refuses_what_serve_refuses(shell: Shell, tmp_path: Path) -> None:
    """An address beyond this machine without a token, or a token that is none, is refused by both: by file and table, or option."""
    path, empty = tmp_path / "my.toml", tmp_path / "empty"
    empty.write_text("")
    for text, said in (
        ('host = "0.0.0.0"', f"{path}: [control] host: '0.0.0.0' is not valid; expected a loopback address"),
        (
            f'token_file = "{empty}"',
            f"{path}: [control] token_file: '{empty}' is not valid; expected a file that",
        ),
        ('token_env = "NOT_SET"', f"{path}: [control] token_env: 'NOT_SET' is not valid"),
    ):
        path.write_text(f"[control]\n{text}")
        for command in ("check-config", "serve"):
            code, _, err = shell(command, "--config", str(path))
            assert code == Exit.USAGE
            assert said in err
    for options, said in (
        (["--host", "0.0.0.0"], "--host: '0.0.0.0' is not valid; expected a loopback address"),
        (["--token-file", str(empty)], f"--token-file: '{empty}' is not valid; expected a file that holds"),
    ):
        code, _, err = shell("serve", *options)
        assert code == Exit.USAGE
        assert said in err
    code, _, err = shell("health", "--token-file", str(empty))
    assert (code, f"--token-file: '{empty}' is not valid" in err) == (Exit.USAGE, True)


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        ("start u x --attempts 0", "argument --attempts: '0' is not a whole number from 1 to 100"),
        ("start u x --key=", "argument --key: '' is not a name of 1 to 256 characters"),
        ("start u x --deadline idle=-1", "'idle=-1': '-1' is not a number of seconds above 0, or none"),
        ("start u x --deadline idle=0", "'0' is not a number of seconds above 0, or none"),
        ("start u x --modle m", "usage: stream-supervisor start"),
        ("start u x --modle=m", "unrecognized arguments: --modle=m; did you mean --model?"),
        ("start u x y", "usage: stream-supervisor start"),
        ("start u x --on-conflict atach", "; did you mean attach?"),
        ("cancle u", "; did you mean cancel?"),
        ("list --limit 0", "argument --limit: '0' is not a whole number of at least 1"),
        ("cancel x --wait-s -1", "'-1' is not a number of seconds, 0 or more"),
        (
            "prune --store /nowhere --max-ended -1",
            "--max-ended: -1 is not valid; expected a number, 0 or more\n",
        ),
        (
            "health --url ws://127.0.0.1:99999",
            "url: 'port 99999' is not valid; expected a URL with a port from 1 to",
        ),
        (
            "start sim x --model sim/stall?after=abc",
            "model field after: 'abc' is not valid; expected a value of type int",
        ),
    ],
)
def test_what_is_wrong_with_a_command_is_said(shell: Shell, argv: str, said: str) -> None:
    """Each mistake is told with its option, its value and what would be right; or, misspelt, with what was meant."""
    code, _, err = shell(*argv.split(" "))
    assert code in {Exit.USAGE, Exit.NOT_COMPLETED}
    assert said in err


def test_tenants(shell: Shell) -> None:
    """A stream is started for a tenant, shown with it, and listed by it; the column is there where a tenant is."""
    mine, other = (shell.start("sim/ok", "--tenant", tenant) for tenant in ("acme", "other"))
    assert re.search(r"^tenant +acme *$", shell("show", mine)[1], re.MULTILINE)
    assert [row["id"] for row in shell.json("list", "--tenant", "acme")] == [mine]
    shell("watch", other)
    assert [row["id"] for row in shell.json("list", "--tenant", "other", "--ended")] == [other]
    assert re.search(r"\bkey +tenant +lasted\b", shell("list", "--tenant", "acme")[1])
    assert "tenant" not in shell("list", "--key", "nobody's")[1]


def test_check_config_prints_groups_as_fields(shell: Shell, tmp_path: Path) -> None:
    """A list of tables is told field by field, like a table; a set in order."""
    path = tmp_path / "my.toml"
    path.write_text(
        '[[memory.groups]]\nlabels = {user = "*"}\nmax_count = 3\n[retry]\nstatuses = [503, 429, 500]\n'
    )
    out = shell("check-config", str(path))[1]
    assert re.search(r"^settings\.memory\.groups\[0\]\.max_count +3 *$", out, re.MULTILINE)
    assert re.search(r"^settings\.memory\.groups\[0\]\.labels\.user +\* *$", out, re.MULTILINE)
    assert re.search(r"^settings\.retry\.statuses +429, 500, 503 *$", out, re.MULTILINE)


def test_drain_and_shutdown(shell: Shell, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A drain refuses starts (exit 6) and says what still lives (exit 4); a shutdown ends the daemon with 0."""
    base_url = json.loads(json.dumps(shell.json("show", shell.start("sim/ok"))[0]["stream"]["upstream"]))
    assert base_url == "sim"
    with simulated_upstream(tmp_path) as base_url, daemon(tmp_path, base_url, "--store", ":memory:") as other:
        monkeypatch.setenv(URL_VARIABLE, other.url)
        stream_id = shell.start("sim/endless")
        assert shell.json("drain", "--timeout", "0", code=Exit.NOT_COMPLETED) == [{"live": 1}]
        assert shell("start", "sim", "x", "--model", "sim/ok")[0] == Exit.REFUSED
        assert shell("health")[0] == Exit.FAILURE
        shell("cancel", stream_id)
        assert shell.json("drain") == [{"live": 0}]
        assert shell.json("shutdown", "--grace", "0") == [{"accepted": True}]
        assert other.wait() == 0
        assert shell("health", "--connect-s", "0")[0] == Exit.UNREACHABLE


# --- Ctrl-C ----------------------------------------------------------------------------------------------------------


def interrupt(shell: Shell, ready: Callable[[ControlClient], Any], *argv: str) -> tuple[int, bytes, bytes]:
    """Run a command as a process, press Ctrl-C once `ready`, and return how it ended and what it printed."""
    command = [sys.executable, "-m", "supervisor.cli", *argv]
    env = environment(**{URL_VARIABLE: shell.daemon.url, TOKEN_VARIABLE: TOKEN})
    with subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=env,
        start_new_session=True,
    ) as process:
        try:
            shell.daemon.ask(ready)
            process.send_signal(signal.SIGINT)
            out, err = process.communicate(timeout=WAIT_S)
        finally:
            process.kill()
    return process.returncode, out, err


async def test_a_second_interrupt_does_not_wait_for_a_drain(capsys: pytest.CaptureFixture[str]) -> None:
    """The first cancels as suits the dialect and says that the answer may go on; the next aborts."""
    asked: list[str | None] = []

    class Client:
        async def cancel(self, _: str, *, mode: str | None, **__: object) -> CancelResultMessage:
            asked.append(mode)
            return CancelResultMessage(outcome="won" if mode == "abort" else "requested")

    async def twice() -> AsyncIterator[int]:
        for _ in range(2):
            await trio.lowlevel.checkpoint()
            yield signal.SIGINT

    events: Any = type("Events", (), {"id": "x"})()
    client: Any = Client()
    await following._interrupted(client, events, twice(), "cancel", following._Following())
    assert asked == [None, "abort"]
    assert capsys.readouterr().err.count("Ctrl-C again") == 1


def read_by(stream_id: str, count: int) -> Callable[[ControlClient], Any]:
    """Return a question that is answered once a stream has so many readers: others than this one."""

    async def question(client: ControlClient) -> None:
        async with client.subscribe(
            stream_id, view="text"
        ) as events:  # paced: each event is a chance to look
            async for _ in events:
                if (await client.get(stream_id)).readers > count:
                    return

    return question


@pytest.mark.parametrize(
    ("policy", "code", "ending"), [([], Exit.INTERRUPTED, None), (["--on-interrupt", "detach"], Exit.INTERRUPTED, None),
                                   (["--on-interrupt", "cancel"], Exit.NOT_COMPLETED, "cancelled(requested)")]
)  # fmt: skip
def test_interrupt_without_a_terminal(shell: Shell, policy: list[str], code: int, ending: str | None) -> None:
    """Ctrl-C detaches where nobody can be asked, unless it is told to cancel."""
    stream_id = shell.start("sim/endless")
    got, out, err = interrupt(shell, read_by(stream_id, 1), "watch", stream_id, *policy)
    assert (code, b"w0 ") == (got, out[:3])
    assert b"Traceback" not in err
    if ending is None:
        assert f"watch {stream_id} --after 1:".encode() in err
        assert [s["id"] for s in shell.json("list", "--live")] == [stream_id]
    else:
        assert ending.encode() in err
    shell("cancel", stream_id)


@pytest.mark.parametrize(
    ("answer", "code"),
    [(b"d\n", Exit.INTERRUPTED), (b"c\n", Exit.NOT_COMPLETED), (b"\n\x03", Exit.INTERRUPTED)],
)
def test_interrupt_asks(shell: Shell, answer: bytes, code: int) -> None:
    """On a terminal Ctrl-C asks: detach, cancel, or go on (and then asks again, where a second Ctrl-C detaches)."""
    stream_id = shell.start("sim/endless?interval_s=0.01")
    ours, theirs = pty.openpty()
    command = [sys.executable, "-m", "supervisor.cli", "watch", stream_id]
    env = environment(**{URL_VARIABLE: shell.daemon.url, TOKEN_VARIABLE: TOKEN})
    with subprocess.Popen(
        command,
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        env=env,
        start_new_session=True,
        preexec_fn=_own_terminal,  # noqa: PLW1509  # no threads run here, and nothing else can give it the terminal
    ) as process:
        os.close(theirs)
        try:
            screen = _until(ours, b"", b"w20 ")
            os.write(ours, b"\x03")
            screen = _until(ours, screen, b"? ")
            os.write(ours, answer[:-1] + answer[-1:] if not answer.endswith(b"\x03") else answer[:-1])
            if answer.endswith(b"\x03"):
                screen = _until(ours, b"", b"w")
                os.write(ours, b"\x03")
                _until(ours, b"", b"? ")
                os.write(ours, b"\x03")
            _rest(ours)
            assert process.wait(WAIT_S) == code
        finally:
            process.kill()
            os.close(ours)
    states = shell.json("cancel", stream_id)[0]
    assert states["outcome"] == ("already_terminal" if code == Exit.NOT_COMPLETED else "won")


def _own_terminal() -> None:
    import fcntl
    import termios

    fcntl.ioctl(0, termios.TIOCSCTTY, 0)


def _until(terminal: int, screen: bytes, text: bytes) -> bytes:
    import select

    while text not in screen:
        assert select.select([terminal], [], [], WAIT_S)[0], screen
        screen += os.read(terminal, 65536)
    return screen


def _rest(terminal: int) -> None:
    try:
        while os.read(terminal, 65536):
            pass
    except OSError:  # Linux tells the end of a terminal this way
        pass


# --- secrets ---------------------------------------------------------------------------------------------------------


def test_credentials_are_nowhere(shell: Shell) -> None:
    """Neither the provider's credential nor the token is in any output, log or store file, even where a provider repeats it."""
    for model in (
        "sim/401?echo_credential=true",
        "sim/error?after=1&echo_credential=true",
        "sim/500?echo_credential=true",
    ):
        assert shell("start", "sim", "x", "--model", model, "--attempts", "2")[0] == Exit.NOT_COMPLETED
    shell("list", "--json")
    shell.daemon.ask(wait_for_nothing)
    printed = "".join(shell.printed)
    assert "Incorrect API key provided" in printed  # the provider did repeat it
    files = {path.name: path.read_bytes() for path in shell.folder.iterdir()}
    assert {"streams.db", "daemon.log", "token"} <= set(files)
    for secret in (CREDENTIAL, TOKEN):
        assert secret not in printed
        assert [name for name, data in files.items() if secret.encode() in data] == (
            ["token"] if secret == TOKEN else []
        )


async def wait_for_nothing(client: ControlClient) -> None:
    """Run one stream to its end, so that all before it is in the file."""
    started = await client.start("sim", {"model": "sim/ok", "messages": []})
    await wait_events(client, started.id, 1)
    await client.wait(started.id)
