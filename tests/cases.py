"""Where the recorded provider streams and published decoding cases are, for the tests that read them.

They are kept beside the project, not in it: in the folder named by `STREAM_SUPERVISOR_CASES`, by default
`../shared/cases`. Without them these tests are skipped with this reason; in CI (`CI=true`) that is a failure.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

_DEFAULT = Path(__file__).resolve().parents[2] / "shared" / "cases"


def cases_dir() -> Path:
    """Return the folder of cases, or skip (in CI: fail) the calling test or module."""
    path = Path(os.environ.get("STREAM_SUPERVISOR_CASES", _DEFAULT))
    if path.is_dir():
        return path
    reason = f"the recorded cases are not at {path}; set STREAM_SUPERVISOR_CASES to where they are"
    if os.environ.get("CI") == "true":
        pytest.fail(reason)
    pytest.skip(reason, allow_module_level=True)


def transcripts(*dialects: str) -> list[dict[str, Any]]:
    """Return the recorded transcripts of these dialects, each with its `body` (bytes) beside the expected results."""
    root = cases_dir()
    rows = [json.loads(line) for line in (root / "transcripts.jsonl").read_text("utf-8").splitlines()]
    chosen = [row for row in rows if not dialects or row["dialect"] in dialects]
    for row in chosen:
        row["body"] = (root / "transcripts" / row["file"]).read_bytes()
    return chosen
