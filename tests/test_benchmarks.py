"""The benchmarks run, and write the JSON that benchmarks/README.md documents. No time is asserted: machines differ."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

COMPILER = any(map(shutil.which, ("cc", "gcc", "clang")))
BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"


def _run(script: str, tmp_path: Path) -> dict:
    path = tmp_path / "results.json"
    done = subprocess.run(
        [sys.executable, str(BENCHMARKS / script), "--quick", "--json", str(path)],
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(path.read_text())


@pytest.mark.benchmark
@pytest.mark.parametrize(
    ("script", "tables", "contenders", "aims"),
    [
        pytest.param(
            "consume.py",
            {
                f"{load}, {wire}: CPU per event"
                for load in ("flood", "bulk", "paced")
                for wire in ("plain", "TLS")
            },
            {"httpx", "httpx raw", "ours", "ours, SQLite", "ours, no journal", "ours, read", "raw trio"},
            14,
            id="consume",
        ),
        pytest.param(
            "decode.py",
            {
                f"events, {lines}, {reads}"
                for lines in ("data", "event, data", "id, data", "id, event, data")
                for reads in ("64 KiB reads", "4 KiB reads", "one event a read")
            }
            | {
                f"deltas, {dialect}, {reads}"
                for dialect in (["openai-chat"] + (["anthropic"] if find_spec("anthropic") else []))
                for reads in ("4 KiB reads", "one event a read")
            },
            {"ours"},
            16 if find_spec("anthropic") else 14,
            id="decode",
        ),
        pytest.param(
            "cancel.py",
            {
                f"{load}: cancel to close, {share}"
                for load in (
                    "1 live at 50 events/s, plain",
                    "20 live at 50 events/s, plain",
                    "20 live at 50 events/s, TLS",
                )
                for share in ("p50", "p99")
            }
            | {
                f"all of 200, {wire}: {what}"
                for wire in ("plain", "TLS")
                for what in (
                    "longest stall of the event loop",
                    "to the last outcome",
                    "to the last close upstream",
                )
            },
            {"ours"},
            5,
            id="cancel",
        ),
        pytest.param(
            "memory.py",
            {
                f"memory per live stream, {events} each, {wire}"
                for events in ("1 event", "100 events")
                for wire in ("plain", "TLS")
            },
            {"httpx", "ours", "ours, no journal"},
            4,
            id="memory",
        ),
        pytest.param(
            "churn.py",
            {
                "churn, 1 at once: client CPU per start and cancel",
                "churn, 1 at once: starts and cancels per second",
                "churn, 8 at once: client CPU per start and cancel",
                "churn, 8 at once: starts and cancels per second",
            },
            {"httpx", "httpx, asyncio", "ours", "ours, no journal"},
            0,
            id="churn",
        ),
        pytest.param(
            "store.py",
            {
                f"{what}, {history}"
                for what in ("reading back", "bytes an event")
                for history in ("flood", "paced")
            }
            | {f"commit over after it was due at 1000 events/s, {which}" for which in ("worst", "p50")},
            {"ours"},
            4,
            id="store",
        ),
        pytest.param(
            "control.py",
            {
                "one stream to many subscribers, back to back: CPU per delivery",
                "one stream to many subscribers, at rest: CPU per delivery",
                "many streams over one connection: CPU per event",
            },
            set(),
            4,
            id="control",
        ),
        pytest.param(
            "scale.py",
            {
                "CPU per event",
                "longest time without an event",
                "from the upstream's send to the journal, p50",
                "from the upstream's send to the journal, p99",
                "memory per live stream",
                "resident memory at the end",
                "longest stall of the event loop, running",
                "longest stall of the event loop, cancelling all",
                "cancelling all, to the last outcome",
                "cancelling all, to the last close upstream",
            }
            | {f"40 healthy streams, from send to reader, {share}" for share in ("p50", "p99", "p99.9")},
            set(),
            7,
            id="scale",
        ),
        pytest.param(
            "gateway.py",
            {
                "flood: CPU per event",
                "5 streams of 50 events/s: CPU per event",
                "5 streams: from the upstream's send to the client, p50",
                "5 streams: from the upstream's send to the client, p99",
                "5 streams: memory per stream",
                "to the first byte, p50",
                "to the first byte, p99",
                "disconnect to the upstream's close, p50",
                "disconnect to the upstream's close, p99",
            },
            {"ours", "fastapi"},
            7,
            id="gateway",
        ),
        pytest.param(
            "floor.py",
            {"paced, plain: CPU per event"} if COMPILER and sys.platform == "linux" else set(),
            {"C", "C, sent on", "ours", "raw trio"},
            0,
            id="floor",
        ),
    ],
)
def test_a_benchmark_runs_and_writes_its_results(script, tables, contenders, aims, tmp_path):
    """Each script runs in seconds with --quick, compares its contenders with a baseline, and judges its aims by what it measured."""
    results = _run(script, tmp_path)
    assert results["benchmark"] == script.removesuffix(".py")
    assert results["quick"] is True
    assert {"python", "system", "cpus", "packages"} <= results["machine"].keys()
    assert tables == results["tables"].keys()
    for table in results["tables"].values():
        assert contenders <= table["rows"].keys()
        assert table["baseline"] in table["rows"]
        assert table["rows"][table["baseline"]]["ratio"]["median"] == 1
        for row in table["rows"].values():
            assert row["values"]
            assert row["min"] <= row["median"] <= row["max"]
    assert aims == len(results["aims"])
    for aim in results["aims"]:
        # A commit that is over before it is due is behind by less than nothing.
        assert aim["value"] is None or aim["value"] > 0 or script == "store.py"
        reached = {
            "most": lambda value, bound: value <= bound,
            "least": lambda value, bound: value >= bound,
        }[aim["limit"]]
        assert aim["met"] == (None if aim["value"] is None else reached(aim["value"], aim["bound"]))
    if script == "churn.py":
        assert [note for note in results["notes"] if " 0 streams still open" in note] == results["notes"]


@pytest.mark.benchmark
def test_the_soak_runs_and_finds_nothing_that_grows(tmp_path):
    """Two thousand streams under virtual time, and a few seconds of real ones, leave nothing behind; its exit code says so."""
    results = _run("soak.py", tmp_path)
    assert results["benchmark"] == "soak"
    assert {"python", "system", "cpus", "packages"} <= results["machine"].keys()
    for time in ("virtual", "real"):
        assert f"{time} time: heap bytes" in results["tables"]
        for figure in ("orphans", "leftovers"):
            rows = results["tables"][f"{time} time: {figure}"]["rows"]
            assert len(rows) == 4
            assert all(row["values"] == [0] for row in rows.values())
    assert not any("GROWN" in note for note in results["notes"])
