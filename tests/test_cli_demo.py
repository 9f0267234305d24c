"""`demo` shows what it promises, judges itself honestly, and leaves nothing behind."""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from supervisor.cli import Exit
from supervisor.cli import demo as demo_module
from supervisor.cli.render import console
from tests.e2e.processes import WAIT_S, environment, wait_for_text

EXPECTED = {
    "answer 1": "completed(stop)",
    "answer 2": "completed(stop)",
    "answer 3": "completed(stop)",
    "cancelled": "cancelled(requested)",
    "stalled": "expired(idle)",
    "truncated": "failed(truncated)",
    "retried": "completed(stop)",
    "over the limit": "expired(reaped_bytes)",
    "detached": "completed(stop)",
}


def children_of(folder: Path) -> list[str]:
    """Return the command lines of processes that speak of a folder."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            try:
                line = (entry / "cmdline").read_bytes()
            except OSError:
                continue
            if os.fsencode(folder) in line:
                found.append(line.decode("utf-8", "replace"))
    return found


def test_demo(tmp_path: Path) -> None:
    """Every ending is what it should be, exit 0, with no key in the environment; no process and no file is left."""
    command = [sys.executable, "-m", "supervisor.cli", "demo", "--json"]
    env = environment(TMPDIR=str(tmp_path))
    done = subprocess.run(command, env=env, capture_output=True, timeout=90, check=False)
    *scenes, last = [json.loads(line) for line in done.stdout.splitlines()]
    assert (done.returncode, done.stderr) == (0, b""), done.stdout
    assert {scene["stream"]: scene["actual"] for scene in scenes} == EXPECTED
    assert all(scene["ok"] for scene in scenes)
    assert (last["ok"], last["fault"]) == (True, None)
    assert list(tmp_path.iterdir()) == []
    assert children_of(tmp_path) == []


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupted(tmp_path: Path, number: int) -> None:
    """Ctrl-C, or SIGTERM, in the middle ends it at once, with its daemon and its files."""
    shown = tmp_path / "shown"
    temporary = tmp_path / "tmp"
    temporary.mkdir()
    with (
        shown.open("wb") as file,
        subprocess.Popen(
            [sys.executable, "-m", "supervisor.cli", "demo"],
            env=environment(TMPDIR=str(temporary)),
            stdout=file,
            stderr=subprocess.STDOUT,
        ) as process,
    ):
        wait_for_text(shown, "streaming")
        assert children_of(temporary)
        process.send_signal(number)
        assert process.wait(WAIT_S) == 128 + number
    assert "Traceback" not in shown.read_text()
    assert list(temporary.iterdir()) == []
    assert children_of(temporary) == []


def test_it_can_fail(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A scene that ends otherwise, or whose text is not what was sent, is named, and the exit code is 1."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    scene = demo_module._Scene
    scenes = [
        scene("good", "sim/ok?key=good", "completed(stop)", demo_module._whole),
        scene("wrong", "sim/ok?key=wrong", "failed(truncated)", demo_module._whole),
        scene("short", "sim/ok?key=short", "completed(stop)", partial(demo_module._cut, 3)),
    ]
    monkeypatch.setattr(demo_module, "_scenes", lambda: scenes)
    assert demo_module.demo(argparse.Namespace(json=False, plain=True)) == Exit.FAILURE
    out = capsys.readouterr().out
    assert "1 of 3 as they should be" in out
    assert [name for name in ("good", "wrong", "short") if f"{name}" in out.partition("verdict")[2]] == [
        "good",
        "wrong",
        "short",
    ]
    assert "NOT OK: the 3 words sent were kept" in out
    assert list(tmp_path.iterdir()) == []


def test_a_daemon_that_does_not_start(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the daemon said is shown, exit 1, and nothing is left."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(demo_module, "_CONFIG", "nonsense = {token}{store}{upstream}{base_url}{variable}")
    assert demo_module.demo(argparse.Namespace(json=True, plain=True)) == Exit.FAILURE
    printed: Any = capsys.readouterr()
    assert "did not start" in printed.err
    assert json.loads(printed.out.splitlines()[-1])["ok"] is False
    assert list(tmp_path.iterdir()) == []


def test_live_table() -> None:
    """The live table can be drawn at any moment of a scene."""
    scenes = demo_module._scenes()
    assert set(EXPECTED) == {scene.name for scene in scenes}
    scenes[0].text = "\x1b[2J" * 20
    made = console()
    with made.capture() as captured:
        made.print(demo_module._table(scenes))
    assert "over the limit" in captured.get()
    assert "\x1b" not in captured.get()
