"""What the benchmarks share: running contenders in turn, medians and spreads, ratios, aims, and the JSON.

A single figure from a shared machine says little: clocks, neighbours and caches move it by tens of percent between two
runs. So nothing here is compared across runs. Each contender runs in a process of its own, the contenders take turns
(A B C, A B C, …), and what is compared are the figures *of one round*: a ratio is computed per round, and its median and
range are printed. What is left is noise that hit one contender of a round and not the other, and the range shows it.

A worker is the same script, started with `--worker JSON`; it prints one JSON object as its last line.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import attrs

__all__ = [
    "Report",
    "WorkerError",
    "arguments",
    "in_turn",
    "percentile",
    "program",
    "progress",
    "raise_descriptor_limit",
    "resident_bytes",
    "run_worker",
    "simulator",
]

HERE = Path(__file__).resolve().parent
_PACKAGES = (
    "anthropic",
    "attrs",
    "h11",
    "httpcore",
    "httpx",
    "httpx-sse",
    "httpx2",
    "msgspec",
    "openai",
    "trio",
    "uvloop",
)


class WorkerError(Exception):
    """A contender's process failed or took too long."""


# --- the machine -----------------------------------------------------------------------------------------------------


def raise_descriptor_limit(wanted: int = 16_384) -> int:
    """Raise the limit of file descriptors as far as this process may, the hard one too; return what there is now."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        enough = hard if hard == resource.RLIM_INFINITY else max(hard, wanted)
        for limits in ((wanted, enough), (min(wanted, enough, hard), hard)):
            with contextlib.suppress(ValueError, OSError):
                resource.setrlimit(resource.RLIMIT_NOFILE, limits)
                break
    return resource.getrlimit(resource.RLIMIT_NOFILE)[0]


def resident_bytes() -> int:
    """Return this process's resident memory now (Linux), in bytes."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def machine() -> dict[str, Any]:
    """Describe where and with what this ran."""
    versions = {}
    for package in _PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[package] = metadata.version(package)
    return {
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "cpus": os.cpu_count(),
        "load_1m": round(os.getloadavg()[0], 2),
        "packages": versions,
    }


# --- processes -------------------------------------------------------------------------------------------------------


def arguments(
    description: str,
    *,
    rounds: int,
    parts: Mapping[str, Sequence[str]] | None = None,
    numbers: Mapping[str, str] | None = None,
    texts: Mapping[str, str] | None = None,
) -> argparse.Namespace:
    """Parse the options that every benchmark has, and its own.

    `parts` are options to run a part of it: all there are, by name. `numbers` are options that take a number: what for, by name; 0
    if not given. `texts` are options that take a text, likewise; None if not given.
    """
    parser = argparse.ArgumentParser(
        description=description.partition("\n\n")[0], formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", metavar="PATH", help="also write the results as JSON")
    parser.add_argument(
        "--quick", action="store_true", help="seconds instead of minutes; shows that it runs, little more"
    )
    parser.add_argument("--rounds", type=int, default=0, help=f"default {rounds}, with --quick 1")
    parser.add_argument(
        "--only", metavar="NAME,…", default="", help="only contenders whose name contains one of these"
    )
    for name, every in (parts or {}).items():
        parser.add_argument(
            f"--{name}", metavar="NAME,…", default=",".join(every), help="only these; default %(default)s"
        )
    for name, meaning in (numbers or {}).items():
        parser.add_argument(f"--{name}", metavar="N", type=float, default=0, help=meaning)
    for name, meaning in (texts or {}).items():
        parser.add_argument(f"--{name}", metavar="TEXT", help=meaning)
    parser.add_argument("--worker", metavar="JSON", help=argparse.SUPPRESS)
    options = parser.parse_args()
    options.rounds = options.rounds or (1 if options.quick else rounds)
    options.only = [name for name in options.only.split(",") if name]
    for name, every in (parts or {}).items():
        chosen = getattr(options, name).split(",")
        if unknown := set(chosen) - set(every):
            parser.error(f"--{name} has no {', '.join(sorted(unknown))}; there is {', '.join(every)}")
        setattr(options, name, chosen)
    return options


@contextlib.contextmanager
def program(*command: str) -> Iterator[dict[str, Any]]:
    """Run a server that prints one JSON line and stops when its standard input closes; give what it printed."""
    process = subprocess.Popen([sys.executable, *command], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        line = process.stdout.readline()
        if not line:
            raise WorkerError(f"{' '.join(command)} did not start (exit code {process.wait(10)})")
        yield json.loads(line)
    finally:
        process.stdin.close()
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        process.stdout.close()


def simulator(*options: str) -> contextlib.AbstractContextManager[dict[str, Any]]:
    """Run the simulated upstream in a process of its own."""
    return program("-m", "supervisor.testing.upstream", "--port", "0", "--until-stdin-closes", *options)


def run_worker(script: str, parameters: Mapping[str, Any], *, timeout_s: float) -> dict[str, Any]:
    """Run one contender once, in a new process, and return what it measured."""
    command = [sys.executable, script, "--worker", json.dumps(parameters)]
    environment = {name: value for name, value in os.environ.items() if not name.lower().endswith("_proxy")}
    try:
        done = subprocess.run(
            command, stdout=subprocess.PIPE, text=True, timeout=timeout_s, check=False, env=environment
        )
    except subprocess.TimeoutExpired as exc:
        raise WorkerError(f"{parameters} took more than {timeout_s:g} s") from exc
    if done.returncode != 0:
        raise WorkerError(f"{parameters} failed with exit code {done.returncode}")
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def in_turn(
    contenders: Sequence[str],
    rounds: int,
    run: Callable[[str], dict[str, Any]],
    *,
    only: Sequence[str] = (),
) -> dict[str, list[dict[str, Any]]]:
    """Run each contender once a round, in turn; return its results, by name, in the order of rounds."""
    chosen = [name for name in contenders if not only or any(part in name for part in only)]
    results: dict[str, list[dict[str, Any]]] = {name: [] for name in chosen}
    for number in range(rounds):
        for name in chosen:
            progress(f"round {number + 1}/{rounds}: {name}")
            results[name].append(run(name))
    progress("")
    return results


def progress(text: str) -> None:
    """Show what is going on, on a terminal only."""
    if sys.stderr.isatty():
        print(f"\r\033[K  {text}" if text else "\r\033[K", end="", file=sys.stderr, flush=True)


# --- what is said ----------------------------------------------------------------------------------------------------


def percentile(values: Sequence[float], percent: float) -> float:
    """Return the nearest-rank percentile."""
    ordered = sorted(values)
    rank = max(0, min(len(ordered) - 1, -(-len(ordered) * percent // 100) - 1))
    return ordered[int(rank)]


def _spread(values: Sequence[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def _shown(value: float) -> str:
    return f"{value:.0f}" if abs(value) >= 1000 else f"{value:#.3g}".rstrip(".")


@attrs.define
class Report:
    """The results of one run of one benchmark."""

    name: str
    quick: bool
    parameters: Mapping[str, Any] = attrs.field(factory=dict)
    tables: dict[str, dict[str, Any]] = attrs.field(factory=dict, init=False)
    aims: list[dict[str, Any]] = attrs.field(factory=list, init=False)
    notes: list[str] = attrs.field(factory=list, init=False)

    def table(
        self,
        title: str,
        unit: str,
        rows: Mapping[str, Sequence[float]],
        *,
        baseline: str,
        remarks: Mapping[str, str] | None = None,
    ) -> None:
        """Add figures, one list per contender with one value per round, and their ratios to the baseline's."""
        entries = {}
        for name, values in rows.items():
            if not values:
                continue
            entry: dict[str, Any] = {"values": list(values), **_spread(values)}
            base = rows.get(baseline, ())
            if len(base) == len(values) and all(base):
                entry["ratio"] = _spread([value / other for value, other in zip(values, base, strict=True)])
            if remarks and name in remarks:
                entry["remark"] = remarks[name]
            entries[name] = entry
        self.tables[title] = {"unit": unit, "baseline": baseline, "rows": entries}
        self._print_table(title)

    def aim(
        self, text: str, value: float | None, *, most: float | None = None, least: float | None = None
    ) -> None:
        """Say how far a result is from an aim: `value` is to be at most, or at least, so much. None: not measured."""
        bound = most if most is not None else least
        assert bound is not None
        met = None if value is None else (value <= bound if most is not None else value >= bound)
        limit = "most" if most is not None else "least"
        self.aims.append({"aim": text, "limit": limit, "bound": bound, "value": value, "met": met})
        if value is None:
            verdict = "not measured"
        elif met:
            verdict = f"{_shown(value)}: met"
        else:
            verdict = f"{_shown(value)}: missed, by a factor of {max(value, bound) / min(value, bound):.2f}"
        print(f"  aim: {text}: {verdict}")

    def ratio(self, title: str, of: str, to: str) -> float | None:
        """Return the median over rounds of one contender's figure divided by another's; None if either is missing."""
        rows = self.tables[title]["rows"]
        if of not in rows or to not in rows or len(rows[of]["values"]) != len(rows[to]["values"]):
            return None
        pairs = zip(rows[of]["values"], rows[to]["values"], strict=True)
        return statistics.median(value / other for value, other in pairs)

    def median(self, title: str, of: str) -> float | None:
        """Return a contender's median; None if it is missing."""
        row = self.tables[title]["rows"].get(of)
        return None if row is None else row["median"]

    def note(self, text: str) -> None:
        """Add a sentence that belongs to the results."""
        self.notes.append(text)
        print(f"  note: {text}")

    def write(self, path: str | None) -> None:
        """Write the JSON, if a path is given."""
        if path is None:
            return
        record = {
            "benchmark": self.name,
            "quick": self.quick,
            "parameters": dict(self.parameters),
            "machine": machine(),
            "tables": self.tables,
            "aims": self.aims,
            "notes": self.notes,
        }
        Path(path).write_text(json.dumps(record, indent=1) + "\n")

    def _print_table(self, title: str) -> None:
        table = self.tables[title]
        print(f"\n{title} [{table['unit']}]")
        width = max((len(name) for name in table["rows"]), default=0)
        for name, row in table["rows"].items():
            figures = f"{_shown(row['median']):>8}  ({_shown(row['min'])} to {_shown(row['max'])})"
            line = f"  {name:<{width}}  {figures:<30}"
            if "ratio" in row and name != table["baseline"]:
                ratio = row["ratio"]
                line += f"  x {_shown(ratio['median'])}  ({_shown(ratio['min'])} to {_shown(ratio['max'])})"
            elif name == table["baseline"]:
                line += "  baseline"
            if "remark" in row:
                line += f"  [{row['remark']}]"
            print(line.rstrip())
