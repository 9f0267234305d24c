"""What becomes of streams is in the log, with its facts as fields, and nothing of what was said."""

from __future__ import annotations

import json

from supervisor import Output, open_supervisor
from supervisor.dialects import Fault
from supervisor.logs import logging_to
from supervisor.observe import StreamLog


async def good(out: Output) -> None:
    await out.send("a secret answer")


async def bad(out: Output) -> None:
    out.attempt(1, upstream="one")
    out.attempt(2, upstream="two", rung="fallback", cause="http_status: slow down")
    out.fail("http_status", Fault(kind="rate_limit", message="slow down"))


async def logged(path, level: str) -> list[dict[str, object]]:
    with logging_to(path, style="json", level=level):
        async with open_supervisor() as sup:
            sup.observe(StreamLog())
            ids = [(await (await sup.start(good, key="k")).wait()).id]
            ids.append((await (await sup.start(bad, upstream="one", tenant="t")).wait()).id)
    text = path.read_text()
    assert "secret" not in text
    found = [json.loads(line) for line in text.splitlines()]
    lines = [line for line in found if line["logger"] == "supervisor.streams" and line["stream"] in ids]
    return [
        {
            name: value
            for name, value in line.items()
            if name not in ("time", "logger", "stream", "duration_s")
        }
        for line in lines
    ]


async def test_what_went_wrong_is_told_and_the_rest_for_who_debugs(tmp_path) -> None:
    """At INFO a failure and each further attempt; at DEBUG starts, first events and every ending."""
    another = {
        "level": "info",
        "message": "another attempt: http_status: slow down",
        "upstream": "one",
        "tenant": "t",
        "attempt": 2,
        "rung": "fallback",
        "at": "two",
    }
    failed = {
        "level": "info",
        "message": "failed(http_status): slow down",
        "upstream": "one",
        "tenant": "t",
        "attempts": 2,
        "events": 0,
    }
    assert await logged(tmp_path / "info", "info") == [another, failed]
    everything = await logged(tmp_path / "debug", "debug")
    assert [line["message"] for line in everything] == [
        "started",
        "the answer has begun",
        "completed(done)",
        "started",
        "another attempt: http_status: slow down",
        "failed(http_status): slow down",
    ]
    assert everything[2] == {
        "level": "debug",
        "message": "completed(done)",
        "key": "k",
        "attempts": 0,
        "events": 1,
    }
