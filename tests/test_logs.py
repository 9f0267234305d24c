"""What is logged says which stream it is about, and holds no secret."""

from __future__ import annotations

import json
import logging
import warnings
from pathlib import Path

import pytest

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
