"""The floor under consuming paced streams: what the kernel charges an event, measured in C, and what each reader adds to it.

`floor.c` is compiled with the machine's C compiler for each run. It reads the same 200 streams of 50 events/s as the paced
load of `consume.py`, from the same upstream, with one `recv` an event and as many calls of `epoll_wait` as it takes, and
counts. No client of any kind can spend less on this machine, and what another spends above it is its own: interpreter,
event loop, HTTP, JSON, journal.

- `C`: epoll_wait and recv.
- `C, sent on`: and one send of what was read to a loopback connection: the floor of a relay.
- `raw trio`, `uvloop`, `ours, no journal`, `ours`: as in `consume.py`.

Without a C compiler on a Linux machine this is skipped, and the reason is printed.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import consume
import measure

SCRIPT = __file__
IN_C = {"C": "0", "C, sent on": "1"}
CONTENDERS = (*IN_C, "raw trio", "uvloop", "ours, no journal", "ours")
ROUNDS = 5


def main() -> None:
    options = measure.arguments(__doc__ or "", rounds=ROUNDS)
    quick = options.quick
    streams, rate = (10, 50) if quick else (200, 50)
    settle_s, window_s = (0.2, 0.3) if quick else (1.0, 4.0)
    contenders = [name for name in CONTENDERS if find_spec(consume.NEEDS.get(name, "trio")) is not None]
    report = measure.Report(
        "floor",
        quick,
        {"rounds": options.rounds, "streams": streams, "events_per_s": rate, "window_s": window_s},
    )
    compiler = next(filter(None, map(shutil.which, ("cc", "gcc", "clang"))), None)
    if compiler is None or sys.platform != "linux":
        why = "there is no C compiler (cc, gcc or clang)" if compiler is None else "epoll is Linux's"
        report.note(f"skipped: {why}")
        report.write(options.json)
        return
    with (
        tempfile.TemporaryDirectory() as directory,
        measure.program(str(Path(SCRIPT).with_name("pacer.py")), "--rate", str(rate)) as upstream,
    ):
        program = str(Path(directory) / "floor")
        subprocess.run([compiler, "-O2", "-o", program, str(Path(SCRIPT).with_name("floor.c"))], check=True)

        def run(name: str) -> dict[str, Any]:
            if name in IN_C:
                host, port = upstream["base_url"].split("/")[2].split(":")
                body = consume.body("pacer").decode()
                command = [program, host, port, str(streams), str(settle_s), str(window_s), IN_C[name], body]
                done = subprocess.run(command, stdout=subprocess.PIPE, check=True, timeout=60)
                result: dict[str, Any] = json.loads(done.stdout)
                return result
            given = {
                "contender": name,
                "load": "paced",
                "base_url": upstream["base_url"],
                "ca_pem": None,
                "streams": streams,
                "asking": {},
                "start_s": 30,
                "settle_s": settle_s,
                "window_s": window_s,
            }
            return measure.run_worker(consume.SCRIPT, given, timeout_s=120)

        results = measure.in_turn(contenders, options.rounds, run, only=options.only)
    remarks = {}
    for name, runs in results.items():
        took = sum(r["events"] / r["wall"] for r in runs) / len(runs)
        remarks[name] = f"{took:.0f} of {streams * rate} events/s taken"
        if name in IN_C:
            for field, what in (("waits", "epoll_waits"), ("reads", "reads")):
                remarks[name] += f", {sum(r[field] for r in runs) / len(runs):.2f} {what} an event"
    report.table(
        "paced, plain: CPU per event",
        "µs",
        {name: [r["cpu_us"] for r in runs] for name, runs in results.items()},
        baseline="C",
        remarks=remarks,
    )
    report.note(
        "A reader that takes longer over an event finds more of them at its next epoll_wait, and pays for fewer."
    )
    report.write(options.json)


if __name__ == "__main__":
    sys.exit(main())
