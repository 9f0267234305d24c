"""What is logged says which stream it is about, and holds no secret."""

from __future__ import annotations

import json
import logging
import warnings
from pathlib import Path

import pytest
import structlog

from supervisor import Output, open_supervisor
from supervisor.logs import ReopeningHandler, logging_to

SECRET = "sk-secret-0123456789"
log = logging.getLogger("supervisor.something")
other = logging.getLogger("another.library")


async def test_stream_ids_are_bound(tmp_path: Path) -> None:
    """Whatever logs in a stream's task, or in a helper's of its nursery, has the stream's id; nothing else has one."""
    path = tmp_path / "log"

    async def helper() -> None:
        other.warning("from a helper")

    async def source(out: Output) -> None:
        log.info("from the source")
        out.nursery.start_soon(helper)

    with logging_to(path, style="json"):
        log.info("before")
        async with open_supervisor() as sup:
            stream = await sup.start(source)
            await stream.wait()
        log.info("with its own", extra={"stream": "given", "attempt": 3})
    lines = {line["message"]: line for line in map(json.loads, path.read_text().splitlines())}
    assert "stream" not in lines["before"]
    assert lines["from the source"]["stream"] == lines["from a helper"]["stream"] == stream.id
    assert (lines["with its own"]["stream"], lines["with its own"]["attempt"]) == ("given", 3)


@pytest.mark.parametrize("style", ["console", "json"])
def test_secrets_are_replaced(tmp_path: Path, style: str) -> None:
    """A known secret is replaced wherever it stands: in the message, its arguments, an exception, an extra."""
    path = tmp_path / "log"
    with logging_to(path, style=style, secrets=[SECRET, ""]):  # type: ignore[arg-type]  # a parameter's two literals
        log.error("here %s", SECRET)
        log.error("extra", extra={"header": f"Bearer {SECRET}"})
        try:
            int(SECRET)
        except ValueError:
            log.exception("raised")
    text = path.read_text()
    assert SECRET not in text
    assert text.count("(hidden)") >= 2
    assert "ValueError" in text


def test_levels_and_cleanup(tmp_path: Path) -> None:
    """The level is ours; other packages are heard from WARNING on; all is as before once the block is left."""
    root, ours = logging.getLogger(), logging.getLogger("supervisor")
    before = (root.level, ours.level, list(root.handlers))
    path = tmp_path / "log"
    with logging_to(path, level="info"), warnings.catch_warnings():
        warnings.simplefilter("always")
        log.debug("too little")
        log.info("ours")
        other.info("theirs, too little")
        other.warning("theirs")
        warnings.warn("a warning", UserWarning, stacklevel=1)
    text = path.read_text()
    assert "too little" not in text
    assert all(part in text for part in ("ours", "theirs", "a warning"))
    assert before == (root.level, ours.level, list(root.handlers))
    assert path.stat().st_mode & 0o777 == 0o600


def test_reopen(tmp_path: Path) -> None:
    """After a rotation, `reopen` goes on in a new file; where it cannot, in the old one."""
    path = tmp_path / "log"
    with logging_to(path) as handler:
        assert isinstance(handler, ReopeningHandler)
        log.info("one")
        path.rename(tmp_path / "log.1")
        log.info("two")
        handler.reopen()
        log.info("three")
        path.rename(tmp_path / "log.2")
        path.mkdir()
        with pytest.raises(OSError, match="directory"):
            handler.reopen()
        log.info("four")
    assert [line.rpartition(" ")[2] for line in (tmp_path / "log.1").read_text().splitlines()] == [
        "one",
        "two",
    ]
    assert [line.rpartition(" ")[2] for line in (tmp_path / "log.2").read_text().splitlines()] == [
        "three",
        "four",
    ]


def test_structlog_goes_the_same_way(tmp_path: Path) -> None:
    """What structlog's loggers write has the same fields, with what was bound to them, hides secrets, and is off again afterwards."""
    path = tmp_path / "log"
    with logging_to(path, style="json", secrets=[SECRET]):
        bound = structlog.get_logger("supervisor.plugin").bind(user="me", time="not ours", stream="01s")
        with structlog.contextvars.bound_contextvars(request=7):
            bound.warning("hello %s", "you", key=SECRET)
            log.info("plain")
        bound.debug("too little")
        try:
            int("x")
        except ValueError:
            bound.exception("raised")
    told, plain, raised = map(json.loads, path.read_text().splitlines())
    assert told.pop("time").startswith("20")
    assert told == {
        "level": "warning",
        "logger": "supervisor.plugin",
        "message": "hello you",
        "stream": "01s",
        "user": "me",
        "request": 7,
        "key": "(hidden)",
    }
    assert (plain["message"], plain["request"]) == ("plain", 7)
    assert "ValueError" in raised["exception"]
    assert not structlog.is_configured()


def test_structlog_as_the_program_has_it(tmp_path: Path) -> None:
    """A program that has configured structlog itself keeps what it has."""
    written: list[str] = []

    def keep(logger: object, name: str, event: dict[str, object]) -> dict[str, object]:
        written.append(str(event["event"]))
        raise structlog.DropEvent

    structlog.configure(processors=[keep])  # type: ignore[list-item]  # a processor of a test
    try:
        with logging_to(tmp_path / "log"):
            structlog.get_logger().warning("theirs")
        assert structlog.is_configured()
    finally:
        structlog.reset_defaults()
    assert (written, (tmp_path / "log").read_text()) == (["theirs"], "")


def test_a_line_for_people(tmp_path: Path) -> None:
    """Time, level, logger, stream, message, what else is known, and an exception below; one line whatever it is made of."""
    path = tmp_path / "log"
    with logging_to(path):
        log.warning("it \x1b[31mends\n2026-01-01 ERROR forged\u2028", extra={"stream": "01a", "tries": 2})
        log.info("stream 01a: known", extra={"stream": "01a"})
        try:
            local = SECRET
            int("x")
        except ValueError:
            log.exception("raised", extra={"local": len(local)})
    lines = path.read_text("utf-8").splitlines()
    name = "supervisor.something"
    assert lines[0][24:] == (
        rf"WARNING {name}: stream=01a it \x1b[31mends\n2026-01-01 ERROR forged\u2028 tries=2"
    )
    assert lines[1][24:] == f"INFO {name}: stream 01a: known"
    assert lines[2][24:] == f"ERROR {name}: raised local=20"
    assert lines[3] == "Traceback (most recent call last):"
    assert lines[-1] == "ValueError: invalid literal for int() with base 10: 'x'"
    assert SECRET not in path.read_text()  # not by the values of locals either


@pytest.mark.parametrize("terminal", [True, False])
def test_colours_are_for_terminals(
    terminal: bool, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Standard error is coloured where it is a terminal, and nobody has set NO_COLOR."""
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    monkeypatch.delenv("NO_COLOR", raising=False)
    if not terminal:
        monkeypatch.setenv("NO_COLOR", "1")
    with logging_to(None):
        log.warning("here")
    assert ("\x1b[33mWARNING" in capsys.readouterr().err) == terminal
