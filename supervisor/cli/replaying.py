"""`replay`: recorded response bodies, read as a live stream would read them. Needs no daemon."""

from __future__ import annotations

import argparse
import difflib
import json
import sys
from pathlib import Path

from supervisor.cli.exits import Exit
from supervisor.cli.render import complain, visible
from supervisor.dialects.catalog import BUILTIN, PRESETS
from supervisor.dialects.replay import SSE, ReplayResult, replay
from supervisor.errors import ConfigurationError

__all__ = ["replay_files"]


def replay_files(options: argparse.Namespace) -> int:
    """Replay each file; one that cannot be read is reported and the others are still done (exit 2)."""
    dialect = options.dialect
    try:
        replay(dialect, b"", chunk=options.chunk)  # judges the options before any file is opened
    except ConfigurationError as error:
        mistyped = difflib.get_close_matches(dialect, [*BUILTIN, *PRESETS, SSE], n=1, cutoff=0.85)
        if error.field != "dialect" or mistyped:
            complain(str(error))
            return Exit.USAGE
        complain(f"{error}; read as generic, which knows the common shapes")
        dialect = "generic"
    code = Exit.OK
    for file in options.files:
        try:
            data = sys.stdin.buffer.read() if file == "-" else Path(file).read_bytes()
        except OSError as error:
            complain(f"{file}: {error.strerror or error}")
            code = Exit.USAGE
            continue
        result = replay(dialect, data, chunk=options.chunk)
        if options.json:
            print(json.dumps(result.to_json_object(file)))  # noqa: T201  # the command's output
        else:
            print(visible(_told(file, result)))  # noqa: T201  # as above
    return code


def _told(file: str, result: ReplayResult) -> str:
    if result.dialect == SSE:
        fault = f", {result.fault.message}" if result.fault is not None else ""
        lines = [f"{file}: {len(result.wire_events)} events{fault}"]
        lines += [
            f"  {event.event}: {event.data.decode('utf-8', 'replace')!r}" for event in result.wire_events
        ]
        return "\n".join(lines)
    answer = result.snapshot
    lines = [f"{file}: {result.state}({result.reason}), {result.events} events, {result.skipped} skipped"]
    if result.fault is not None:
        lines.append(f"  error      {result.fault.kind}: {result.fault.message}")
    if answer.usage is not None:
        lines.append(f"  usage      {answer.usage.input} in, {answer.usage.output} out")
    for name in ("reasoning", "refusal", "text"):
        if getattr(answer, name):
            lines.append(f"  {name:<10} {getattr(answer, name)!r}")
    lines += [f"  tool call  {call.name}({call.arguments}) [{call.id}]" for call in answer.tool_calls]
    return "\n".join(lines)
