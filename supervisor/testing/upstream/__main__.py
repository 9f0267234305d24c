"""Run a simulated upstream as a process of its own: `python -m supervisor.testing.upstream --port 0`.

Prints one JSON line, `{"base_url": …, "host": …, "port": …, "pid": …}`, and serves until SIGTERM, SIGINT, or, with
`--until-stdin-closes`, until its parent is gone.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys

import trio

from supervisor.errors import ConfigurationError
from supervisor.testing.upstream import Script, SimulatedUpstream, script_for_model

__all__ = ["main"]


def main(argv: list[str] | None = None) -> int:
    """Serve until told to stop; return the exit code: 0, or 2 for a bad option."""
    parser = argparse.ArgumentParser(prog="python -m supervisor.testing.upstream", description=__doc__)
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=0, help="0: any free port (default)")
    parser.add_argument(
        "--default", default="sim/ok", metavar="MODEL", help="the script for other models (default sim/ok)"
    )
    parser.add_argument("--max-connections", type=int, default=4096)
    parser.add_argument("--until-stdin-closes", action="store_true", help="stop when standard input ends")
    options = parser.parse_args(argv)
    try:
        default = script_for_model(options.default) or Script()
    except ConfigurationError as exc:
        parser.error(str(exc))
    up = SimulatedUpstream(
        default=default, host=options.host, port=options.port, max_connections=options.max_connections
    )
    trio.run(_serve, up, options.until_stdin_closes)
    return 0


async def _serve(up: SimulatedUpstream, until_stdin_closes: bool) -> None:  # noqa: FBT001 (trio.run passes positionally)
    with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as signals:
        async with up, trio.open_nursery() as nursery:
            line = {"base_url": up.base_url, "host": up.host, "port": up.port, "pid": os.getpid()}
            print(json.dumps(line), flush=True)  # noqa: T201 (the one line that this program is asked for)
            if until_stdin_closes:
                nursery.start_soon(_watch_stdin, nursery.cancel_scope)
            async for _ in signals:
                nursery.cancel_scope.cancel()
                break


async def _watch_stdin(scope: trio.CancelScope) -> None:
    # Unbuffered: a thread left inside a buffered read at exit makes the interpreter abort.
    while await trio.to_thread.run_sync(os.read, sys.stdin.fileno(), 4096, abandon_on_cancel=True):
        pass
    scope.cancel()


if __name__ == "__main__":
    sys.exit(main())
