"""The command line: `stream-supervisor serve` and the commands that are clients of it.

Each command imports what it needs when it runs, so that `--help`, `replay` and `list` do not wait for the daemon's parts.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from supervisor.cli.exits import Exit

__all__ = ["Exit", "main"]


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; return its exit code (see `Exit`). Arguments default to the process's own.

    Wrong usage, and `--help`, leave by SystemExit, as argparse has it.
    """
    from supervisor.cli.parser import build_parser  # noqa: PLC0415  # see the module

    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(
                errors="backslashreplace"
            )  # whatever an upstream sends, printing it does not fail
    options = build_parser().parse_args(argv)
    try:
        code: int = options.run(options)
        sys.stdout.flush()
    except KeyboardInterrupt:
        return Exit.INTERRUPTED
    except BrokenPipeError:
        # Whoever read our output has left, as `head` does. Python would complain once more when it closes stdout.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return Exit.OK
    return code
