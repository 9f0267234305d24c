"""`replay`: recorded bodies through the command line, one JSON object a line and file."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from supervisor.cli import main
from tests.cases import cases_dir, transcripts

TRANSCRIPTS = transcripts("openai-chat")
FOLDER = cases_dir() / "transcripts"
STATES = {"completed": "completed", "error": "failed", "incomplete": "failed"}
FIELDS = [
    "file", "state", "reason", "text", "reasoning", "refusal", "tool_calls", "choices", "finish_reason", "usage",
    "error", "events",
]  # fmt: skip


def check(case: dict[str, Any], told: dict[str, Any]) -> None:
    assert list(told) == FIELDS
    assert STATES[case["expected_terminal"]] == told["state"]
    assert case["expected_text"] == told["text"]
    assert case["expected_reasoning"] == told["reasoning"]
    assert case["expected_refusal"] == told["refusal"]
    assert case["expected_tool_calls"] == told["tool_calls"]
    assert case["expected_finish"] == told["finish_reason"]
    assert case["expected_usage"] == told["usage"]
    assert (told["error"] is None) == (told["state"] == "completed")


def lines(capsys: pytest.CaptureFixture[str]) -> list[dict[str, Any]]:
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


@pytest.mark.parametrize("chunk", [None, "1", "7"])
def test_transcripts(capsys: pytest.CaptureFixture[str], chunk: str | None) -> None:
    """Every recorded stream of the dialect gives what is expected of it, fed whole or in small pieces."""
    chosen = TRANSCRIPTS if chunk != "1" else [case for case in TRANSCRIPTS if len(case["body"]) < 5000]
    files = [str(FOLDER / case["file"]) for case in chosen]
    more = [] if chunk is None else ["--chunk", chunk]
    assert main(["replay", "--dialect", "openai-chat", "--json", *more, *files]) == 0
    told = lines(capsys)
    assert files == [one["file"] for one in told]
    for case, one in zip(chosen, told, strict=True):
        check(case, one)


def test_as_a_program() -> None:
    """The installed command does the same, with no daemon, in any folder."""
    files = [case["file"] for case in TRANSCRIPTS]
    command = [sys.executable, "-m", "supervisor.cli", "replay", "--dialect", "openai-chat", "--json", *files]
    done = subprocess.run(command, cwd=FOLDER, capture_output=True, timeout=60, check=False)
    assert (done.returncode, done.stderr) == (0, b"")
    for case, line in zip(TRANSCRIPTS, done.stdout.splitlines(), strict=True):
        check(case, json.loads(line))


def test_event_stream(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """With `--dialect sse` the events themselves are printed, and the last id."""
    path = tmp_path / "body"
    path.write_bytes("id: 7\nevent: \u00fc\nretry: 10\ndata: a\ndata: b\n\n: c\n\ndata: cut".encode())
    assert main(["replay", "--dialect", "sse", "--json", "--chunk", "1", str(path)]) == 0
    expected = {
        "file": str(path),
        "events": [{"event": "\u00fc", "data": "a\nb", "id": "7", "retry": 10}],
        "last_event_id": "7",
    }
    assert [expected] == lines(capsys)


def test_a_missing_file_is_no_reason_to_stop(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A file that is not there, or is a folder, is named on standard error, exit 2; the others are still done."""
    path = tmp_path / "body"
    path.write_bytes(b"data: [DONE]\n\n")
    missing = str(tmp_path / "missing")
    assert (
        main(["replay", "--dialect", "openai-chat", "--json", missing, str(path), str(tmp_path), str(path)])
        == 2
    )
    printed = capsys.readouterr()
    assert [str(path)] * 2 == [json.loads(line)["file"] for line in printed.out.splitlines()]
    assert missing in printed.err
    assert str(tmp_path) in printed.err
    assert "Traceback" not in printed.err


@pytest.mark.parametrize(
    ("options", "said"), [(["--dialect", "opnai-chat"], "openai-chat"), (["--dialect", "openai-assistant"], "openai-assistants"),
                          (["--dialect", "native"], "openai-chat"),
                          (["--dialect", "sse", "--chunk", "0"], "1 or more")]
)  # fmt: skip
def test_wrong_options(capsys: pytest.CaptureFixture[str], options: list[str], said: str) -> None:
    """An unknown dialect or a chunk of nothing is exit 2, and says what would be right, before any file is read."""
    assert main(["replay", *options, "--json", "/nowhere"]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert said in printed.err
    assert "/nowhere" not in printed.err


def test_a_dialect_that_nobody_knows(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Is read as generic, and that is said: an unknown provider's stream most likely has one of the common shapes."""
    path = tmp_path / "body"
    path.write_bytes(b'data: {"text": "Hi"}\n\ndata: [DONE]\n\n')
    assert main(["replay", "--dialect", "acme-stream", "--json", str(path)]) == 0
    out, err = capsys.readouterr()
    assert (json.loads(out)["state"], json.loads(out)["text"]) == ("completed", "Hi")
    assert "'acme-stream'" in err
    assert "read as generic" in err


def test_for_people(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Without --json the same is told in words, and what could drive a terminal is shown as what it is."""
    path = tmp_path / "body"
    chunk = {
        "choices": [
            {"index": 0, "delta": {"content": "a\x1b[2Jb", "reasoning": "r"}, "finish_reason": "stop"}
        ]
    }
    path.write_bytes(b"data: " + json.dumps(chunk).encode() + b"\n\ndata: [DONE]\n\n")
    assert main(["replay", "--dialect", "openai-chat", str(path)]) == 0
    out = capsys.readouterr().out
    assert "completed(stop)" in out
    assert "\x1b" not in out
    path.write_bytes(b"data: \x1b]0;x\x07\n\n")
    assert main(["replay", "--dialect", "sse", str(path)]) == 0
    assert "\x1b" not in capsys.readouterr().out


def test_half_a_character(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A lone surrogate, which JSON can write and UTF-8 cannot, is printed as JSON writes it."""
    path = tmp_path / "body"
    path.write_bytes(b'data: {"choices":[{"index":0,"delta":{"content":"a\\ud83d"}}]}\n\ndata: [DONE]\n\n')
    assert main(["replay", "--dialect", "openai-chat", "--json", str(path)]) == 0
    assert lines(capsys)[0]["text"].startswith("a")
