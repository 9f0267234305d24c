"""A real browser for tests: Debian's Chromium, driven by Playwright, and pages that must give no cause for complaint.

Chromium is not part of the project: without it these tests are skipped with the reason; in CI (`CI=true`) that is a failure. Pictures go to the folder that `STREAM_SUPERVISOR_ARTIFACTS` names, else to a temporary one.
"""

from __future__ import annotations

import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Browser, ConsoleMessage, Page, Request, expect, sync_playwright

OPTIONS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
PATIENCE_MS = 15_000
_LOUD = {"error", "warning"}

expect.set_options(timeout=PATIENCE_MS)


@contextmanager
def chromium() -> Iterator[Browser]:
    """Run Chromium for the length of a block, or skip (in CI: fail) the test that asks for it."""
    path = shutil.which("chromium")
    if path is None:
        reason = "there is no chromium; as root: apt-get install chromium"
        if os.environ.get("CI") == "true":
            pytest.fail(reason)
        pytest.skip(reason)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=OPTIONS)
        try:
            yield browser
        finally:
            browser.close()


@contextmanager
def opened(
    browser: Browser,
    url: str,
    *,
    token: str | None,
    place: str = "",
    allowed: Sequence[str] = (),
    **options: Any,
) -> Iterator[Page]:
    """Open the page, signed in with a token. In the end nothing may have been complained of, and nobody else asked.

    allowed: patterns of what the console may say after all.
    """
    said: list[str] = []
    asked: list[str] = []

    def hear(message: ConsoleMessage) -> None:
        if message.type in _LOUD and not any(re.search(pattern, message.text) for pattern in allowed):
            said.append(f"{message.type}: {message.text}")

    def see(request: Request) -> None:
        if not request.url.startswith((f"{url}/", "data:")):
            asked.append(request.url)

    context = browser.new_context(**{"viewport": {"width": 1440, "height": 900}, **options})
    try:
        context.set_default_timeout(PATIENCE_MS)
        page = context.new_page()
        page.on("console", hear)
        page.on("pageerror", lambda error: said.append(str(error)))
        page.on("request", see)
        if token is not None:
            assert context.request.post(f"{url}/session", data={"token": token}).ok
        page.goto(f"{url}/{place}")
        try:
            yield page
        except BaseException:
            picture(page, "failed")
            raise
        assert (said, asked) == ([], [])
    finally:
        context.close()


def picture(page: Page, name: str) -> None:
    """Keep what the page looks like, for people to see."""
    folder = Path(
        os.environ.get("STREAM_SUPERVISOR_ARTIFACTS") or Path(tempfile.gettempdir()) / "stream-supervisor"
    )
    folder.mkdir(parents=True, exist_ok=True)
    page.screenshot(path=folder / f"dashboard-{name}.png")


def violations(page: Page, within: str = "html") -> list[tuple[str, list[str]]]:
    """Return what axe-core finds wrong for people with disabilities: the rule, and where it is broken."""
    found = Axe().run(page, context=within).response["violations"]
    return [(rule["id"], [str(node["target"]) for node in rule["nodes"]]) for rule in found]
