"""What CI runs: `nox` with no arguments, from a clean checkout. `nox -R` reuses the environments of the last run.

Every session installs what it needs from the dependency groups in pyproject.toml, and uses the interpreter that nox runs on;
`nox -s tests -P 3.13` runs on another. What a session does not do here it says, with the reason; in CI nothing is left out.
"""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

import nox

nox.needs_version = ">=2024.10.9"  # dependency groups
nox.options.sessions = ["lint", "types", "bench", "tests"]
nox.options.stop_on_first_error = False
nox.options.reuse_existing_virtualenvs = True

PROJECT = nox.project.load_toml("pyproject.toml")
SOURCES = ["supervisor", "tests", "benchmarks", "docs", "noxfile.py"]
COVERAGE_FLOOR = 94
"""Percent, branches included. Measured: 95.2, without the processes that tests start (the daemon, most of the command line)."""


ON_ALL_CORES = ["--numprocesses=logical", "--dist=loadfile"]
CHECKS = ["-m", "not benchmark"]


def install(session: nox.Session, group: str) -> None:
    """Install a dependency group, and the package as it is in this checkout."""
    session.install("-e", ".", *nox.project.dependency_groups(PROJECT, group))


@nox.session
def lint(session: nox.Session) -> None:
    """Check style and layers: ruff, flake8-async, import-linter."""
    install(session, "lint")
    session.run("ruff", "check", ".")
    session.run("ruff", "format", "--check", ".")
    session.run("flake8", *SOURCES)
    session.run("lint-imports")


@nox.session
def types(session: nox.Session) -> None:
    """Check types: mypy strict over the package, pyright strict over the API as a user calls it."""
    install(session, "types")
    session.run("mypy")
    session.run("pyright", env={"PYRIGHT_PYTHON_IGNORE_WARNINGS": "1"})  # else it asks PyPI for a newer one


@nox.session
def tests(session: nox.Session) -> None:
    """Run pytest, on all cores. Arguments after `--` go to pytest."""
    install(session, "tests")
    session.run("pytest", *ON_ALL_CORES, *(session.posargs or CHECKS))
    version = session.python or ".".join(map(str, sys.version_info[:2]))
    session.log(
        f"not run here: versions of Python other than {version}; for one of them, `nox -s tests -P VERSION`"
    )
    if os.environ.get("CI") != "true" and shutil.which("chromium") is None:
        session.warn(
            "skipped: the tests of the dashboard, as there is no chromium (apt-get install chromium)"
        )
    if os.environ.get("CI") != "true" and "STREAM_SUPERVISOR_CASES" not in os.environ:
        cases = Path("..") / "shared" / "cases"
        if not cases.is_dir():
            session.warn(
                f"skipped: the tests of recorded provider streams, which are not at {cases} (see README.md)"
            )


@nox.session
def bench(session: nox.Session) -> None:
    """Run each benchmark once, quickly, to see that it runs. What it measures on a busy machine says nothing."""
    install(session, "bench")
    session.run("pytest", "-m", "benchmark", "tests/test_benchmarks.py", *session.posargs)


@nox.session
def coverage(session: nox.Session) -> None:
    """Run the tests with branch coverage, for which they take twice as long; not one of the sessions that run by default."""
    install(session, "tests")
    measured = ["--cov", "--cov-report=term:skip-covered", f"--cov-fail-under={COVERAGE_FLOOR}"]
    session.run("pytest", *ON_ALL_CORES, *measured, *CHECKS)
