"""The dashboard in a real browser, served by a real daemon that reads a simulated upstream.

Nothing of the page is faked: what it shows is compared with what the daemon says over HTTP. Every page must in the end have
said nothing in the console and have asked nobody but its daemon (`tests.e2e.browser.opened`).
"""

from __future__ import annotations

import re
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest
from playwright.sync_api import Browser, Page, Route, expect

from tests.e2e.browser import chromium, opened, picture, violations
from tests.e2e.processes import TOKEN, WAIT_S, Daemon, simulated_upstream, start_daemon

Start = Callable[..., str]
PHONE = {"viewport": {"width": 390, "height": 844}, "is_mobile": True, "has_touch": True}
STREAMS = ["done", "cut", "late", "stopped", "halted", "waiting", "going"]


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium() as running:
        yield running


@pytest.fixture(scope="module")
def upstream(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with simulated_upstream(tmp_path_factory.mktemp("upstream")) as base_url:
        yield base_url


@pytest.fixture(scope="module")
def daemon(upstream: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    config = f'[upstreams.goes-on]\nbase_url = "{upstream}"\nproxy = "direct"\nprefill = "assistant"'
    running = start_daemon(tmp_path_factory.mktemp("daemon"), upstream, config=config)
    try:
        yield running
    finally:
        running.end()


@pytest.fixture
def api(daemon: Daemon) -> Iterator[httpx.Client]:
    with client(daemon) as asking:
        yield asking


def client(daemon: Daemon) -> httpx.Client:
    return httpx.Client(base_url=daemon.http, headers={"Authorization": f"Bearer {TOKEN}"}, trust_env=False)


def start(api: httpx.Client, model: str, **options: Any) -> str:
    """Start a stream; return its id."""
    asked = {
        "upstream": "sim",
        "request": {"model": model, "messages": [{"role": "user", "content": "Hello"}]},
        **options,
    }
    started = api.post("/streams", json=asked)
    assert started.status_code == 201, started.text
    return str(started.json()["id"])


def snapshot_text(api: httpx.Client, stream_id: str) -> str:
    return str(api.get(f"/streams/{stream_id}/snapshot").json()["text"])


def told(api: httpx.Client, stream_id: str, of: Callable[[dict[str, Any]], bool]) -> None:
    """Return once this is so of a stream. The daemon tells of it when it is asked, and not otherwise."""
    until = time.monotonic() + WAIT_S
    while not of(stream := api.get(f"/streams/{stream_id}").json()):
        assert time.monotonic() < until, stream


def text_of(page: Page) -> str:
    return page.locator("#text").text_content() or ""


def wait_for_text(page: Page, characters: int) -> None:
    """Return once the page shows so much text."""
    page.wait_for_function(
        "least => document.getElementById('text').textContent.length >= least", arg=characters
    )


def expect_text(page: Page, text: str) -> None:
    """Wait until the page shows this text and no other."""
    page.wait_for_function("text => document.getElementById('text').textContent === text", arg=text)


def words(page: Page) -> dict[str, str]:
    """Return the word in each row, by what the row is called."""
    rows = (
        "rows => Object.fromEntries(rows.map(row => [row.querySelector('a').textContent, row.dataset.word]))"
    )
    shown: dict[str, str] = page.locator("#rows tr").evaluate_all(rows)
    return shown


def expect_rows(page: Page, names: set[str]) -> None:
    """Wait until the table has exactly these rows."""
    page.wait_for_function(
        "names => JSON.stringify([...document.querySelectorAll('#rows a')].map(a => a.textContent).sort()) === names",
        arg=str(sorted(names)).replace("'", '"').replace(", ", ","),
    )


def filter_by(page: Page, needle: str) -> None:
    page.locator("#needle").fill(needle)


def test_start_watch_and_stop(browser: Browser, daemon: Daemon, api: httpx.Client) -> None:
    """From the page a stream is started, watched as it comes, and stopped; what is kept is what was shown."""
    refused = "the server responded with a status of 40[01]"  # to the wrong token, and to the upstream that is not there
    with opened(browser, daemon.http, token=None, allowed=[refused]) as page:
        page.get_by_label("Token").fill("not the token")
        page.get_by_role("button", name="Sign in").click()
        expect(page.locator("#token-wrong")).to_have_text("This is not the token.")
        page.get_by_label("Token").fill(TOKEN)
        page.get_by_role("button", name="Sign in").click()
        page.get_by_role("button", name="New stream").click()
        asking = page.get_by_role("dialog")
        asking.get_by_label("Upstream").fill("nobody")
        asking.get_by_label("Model").fill("sim/endless")
        asking.get_by_label("Prompt").fill("Hello")
        asking.get_by_label("Key").fill("from-the-page")
        asking.get_by_role("button", name="Start", exact=True).click()
        expect(page.locator("#start-wrong")).to_contain_text("a configured upstream: goes-on, sim")
        expect(asking.get_by_label("Upstream")).to_be_focused()
        asking.get_by_label("Upstream").fill("simulated")
        expect(asking.get_by_label("Model")).to_have_attribute("placeholder", "sim/paced")
        asking.get_by_label("Upstream").fill("sim")
        asking.get_by_label("Model").fill("")
        asking.get_by_role("button", name="Start", exact=True).click()
        expect(page.locator("#start-wrong")).to_contain_text("model: it is missing")
        expect(asking.get_by_label("Model")).to_be_focused()
        asking.get_by_label("Model").fill("sim/endless")
        asking.get_by_role("button", name="Start", exact=True).click()

        expect(page.locator("#detail-title")).to_have_text("from-the-page")
        wait_for_text(page, 60)
        expect(page.locator("#detail-pill")).to_have_text("streaming")
        expect(page.locator("#rows tr[data-selected] .c-state .pill")).to_have_text("streaming")

        page.locator("#detail").get_by_role("button", name="Stop").click()
        dialog = page.get_by_role("dialog")
        expect(dialog).to_contain_text("from-the-page")
        dialog.get_by_role("button", name="Keep it running").click()
        page.locator("#detail").get_by_role("button", name="Stop").click()
        dialog.get_by_label("Reason").fill("seen enough")
        dialog.get_by_role("button", name="Stop the stream").click()
        expect(page.locator("#detail-pill")).to_have_text("cancelled")
        expect(page.locator("#rows tr[data-selected] .c-state")).to_have_text("cancelledcancelled(requested)")
        expect(page.locator("#announce")).to_have_text(
            "from-the-page has ended: cancelled, cancelled(requested)."
        )
        expect(page.locator("#timeline .moments")).to_contain_text("cancelled(requested)")

        (stream,) = api.get("/streams", params={"key": "from-the-page"}).json()["streams"]
        assert (stream["outcome"]["message"], stream["outcome"]["actor"]) == ("seen enough", "dashboard")
        assert text_of(page) == snapshot_text(api, stream["id"])


def test_the_words_for_states(browser: Browser, daemon: Daemon, api: httpx.Client) -> None:
    """Each row says idle, streaming, complete, cancelled or error, as its stream is; rows are found by word, label, key and order."""
    models = {
        "done": "sim/ok",
        "cut": "sim/no-marker",
        "late": "sim/stall?after=1",
        "stopped": "sim/endless",
        "halted": "sim/endless",
        "waiting": "sim/silent",
        "going": "sim/endless",
    }
    ids = {
        key: start(
            api,
            models[key],
            key=key,
            labels={"set": "words"},
            deadlines={"idle_s": 0.2} if key == "late" else {},
        )
        for key in STREAMS
    }
    for key in ("stopped", "halted"):
        api.post(f"/streams/{ids[key]}/cancel", json={})
    with opened(browser, daemon.http, token=TOKEN) as page:
        filter_by(page, "set=words")
        expect_rows(page, set(STREAMS))
        expect(page.locator("tr[data-word=error]")).to_have_count(2)
        expect(page.locator("tr[data-word=streaming]")).to_have_count(1)
        assert words(page) == {
            "done": "complete",
            "cut": "error",
            "late": "error",
            "stopped": "cancelled",
            "halted": "cancelled",
            "waiting": "idle",
            "going": "streaming",
        }
        expect(page.locator("tr", has_text="cut").locator(".c-state")).to_have_text("errorfailed(truncated)")
        expect(page.locator("tr", has_text="late").locator(".c-state")).to_have_text("errorexpired(idle)")

        for word, names in {
            "error": {"cut", "late"},
            "live": {"waiting", "going"},
            "all": set(STREAMS),
        }.items():
            page.locator(f"#words input[value={word}]").check()
            expect_rows(page, names)

        heading = page.get_by_role("columnheader", name="Stream", exact=True)
        heading.get_by_role("button").click()
        names = page.locator("#rows a").all_text_contents()
        assert names == sorted(STREAMS)
        expect(heading).to_have_attribute("aria-sort", "ascending")

        # The figures at the head are the daemon's.
        hour = api.get("/overview").json()["hour"]
        errors = hour["ended"]["failed"] + hour["ended"]["expired"]
        assert len({errors, *hour["ended"].values()}) > 1
        expect(page.locator("#success-of")).to_have_text(f"{errors} errors")
        expect(page.locator("#success-foot")).to_contain_text(
            f"{hour['ended']['cancelled']} cancelled, not counted"
        )
        expect(page.locator("#live")).to_have_text(str(api.get("/overview").json()["active"]["live"]))
        expect(page.locator("#errors")).to_contain_text("failed(truncated)")
        expect(page.locator("#errors")).to_contain_text("expired(idle)")

        filter_by(page, "going")
        page.keyboard.press("Enter")
        expect(page.locator("#detail-title")).to_have_text("going")
    for key in ("waiting", "going"):
        api.delete(f"/streams/{ids[key]}")


def test_more_streams_than_one_answer_tells(browser: Browser, daemon: Daemon, api: httpx.Client) -> None:
    """Page by page all live streams are found, those that end as well as those that begin; older ended ones when asked for."""
    ids = [start(api, "sim/silent", key=f"many-{number}", labels={"set": "many"}) for number in range(7)]
    live, ended = "**/streams?live=true*", "**/streams?live=false*"
    with opened(browser, daemon.http, token=TOKEN) as page:
        page.route(live, lambda route: route.continue_(url=route.request.url.replace("limit=500", "limit=4")))
        page.route(
            ended, lambda route: route.continue_(url=re.sub(r"limit=\d+", "limit=2", route.request.url))
        )
        page.reload()
        filter_by(page, "set=many")
        expect_rows(page, {f"many-{number}" for number in range(7)})
        for number in (6, 5, 0):  # the last is not among the newest two of the ended
            api.delete(f"/streams/{ids[number]}")
        expect(page.locator("#rows tr", has_text="many-0").locator(".c-state")).to_contain_text(
            "cancelled(requested)"
        )
        ids.append(start(api, "sim/silent", key="many-7", labels={"set": "many"}))
        expect(page.locator("#rows tr", has_text="many-7")).to_be_visible()
        for stream_id in ids[1:5] + ids[7:]:
            api.delete(f"/streams/{stream_id}")
        page.locator("#words input[value=cancelled]").check()
        page.reload()
        filter_by(page, "set=many")
        expect(page.locator("#rows tr")).to_have_count(2)
        while page.locator("#rows tr").count() < 8:
            before = page.locator("#rows tr").count()
            page.get_by_role("button", name="Load older").click()
            expect(page.locator("#rows tr")).not_to_have_count(before)
        expect_rows(page, {f"many-{number}" for number in range(8)})


@pytest.mark.parametrize(
    ("rung", "between"), [("continuation", False), ("continuation", True), ("restart", False)]
)
def test_text_over_several_attempts(
    browser: Browser, daemon: Daemon, api: httpx.Client, rung: str, between: bool
) -> None:
    """Where an answer breaks off and goes on, or begins anew, the page shows the text that holds: live, afterwards, and if opened between."""
    first_after_s = 0.8 if between else 0
    model = f"sim/ok?tokens=40&interval_s=0.02&fault=drop&after=25&times=1&first_after_s={first_after_s}&key={rung}{between}"
    upstream = "goes-on" if rung == "continuation" else "sim"
    with opened(browser, daemon.http, token=TOKEN) as page:
        expect(page.locator("#status-word")).to_have_text("ok")
        stream_id = start(api, model, upstream=upstream, retry={"resume": [rung]})
        page.evaluate("id => { location.hash = `#/streams/${id}` }", stream_id)
        wait_for_text(page, 5)
        if between:
            told(api, stream_id, lambda stream: stream["attempts"] == 2)
            page.reload()
        expect(page.locator("#detail-pill")).to_have_text("complete")
        stream = api.get(f"/streams/{stream_id}").json()
        assert stream["outcome"]["rungs"] == [rung]
        live, kept = text_of(page), snapshot_text(api, stream_id)
        assert live == kept
        expect(page.locator(".seam")).to_have_count(1 if rung == "continuation" else 0)
        expect(page.locator("#timeline .moments")).to_contain_text(f"attempt 2 ({rung}) to {upstream}")
        page.reload()
        expect(page.locator("#detail-pill")).to_have_text("complete")
        expect_text(page, kept)


def test_a_hidden_page_lets_go_and_goes_on(browser: Browser, daemon: Daemon, api: httpx.Client) -> None:
    """A page that is not seen holds no connection; seen again it goes on where it was, and nothing is lost or doubled."""
    stream_id = start(api, "sim/endless")
    with opened(browser, daemon.http, token=TOKEN, place=f"#/streams/{stream_id}") as page:
        for share in (40, 120, 200):
            wait_for_text(page, share)
            hide(page, hidden=True)
            told(api, stream_id, lambda stream: stream["readers"] == 0)
            hide(page, hidden=False)
        wait_for_text(page, 250)
        api.delete(f"/streams/{stream_id}")
        expect(page.locator("#timeline .moments")).to_contain_text("cancelled(requested)")
        assert text_of(page) == snapshot_text(api, stream_id)


def test_what_is_no_text(browser: Browser, daemon: Daemon, api: httpx.Client) -> None:
    """Reasoning is shown while there is no text yet; tool calls once the answer is whole; and of a stream that is not there, that."""
    thinking = start(api, "sim/stall?at_event=4&reasoning=Let+me+think", key="thinking")
    model = "sim/ok?reasoning=A+tool+will+do&tool=weather&tool_arguments=%7B%22city%22%3A%22Paris%22%7D"
    calling = start(api, model, key="calling")
    refused = start(api, "sim/401")
    missing = "the server responded with a status of 404"
    with opened(browser, daemon.http, token=TOKEN, place=f"#/streams/{thinking}", allowed=[missing]) as page:
        expect(page.locator("#thoughts-text")).to_be_visible()
        expect(page.locator("#thoughts-text")).to_have_text("Let me think")
        page.evaluate("id => { location.hash = `#/streams/${id}` }", calling)
        expect(page.locator("#calls-text")).to_have_text('weather({"city":"Paris"})')
        expect(page.locator("#thoughts-text")).to_have_text("A tool will do")
        for _ in range(2):  # what is the same as before is shown again
            page.evaluate("id => { location.hash = `#/streams/${id}` }", refused)
            expect(page.locator("#timeline .moments")).to_contain_text("failed(http_status)")
            expect(page.locator("#facts")).to_contain_text("HTTP 401")
            page.locator("#close").click()
        page.evaluate("location.hash = '#/streams/nobody'")
        expect(page.locator("#detail-said")).to_have_text("There is no such stream: it has been removed.")
        for what in ("#calls", "#stop", "#detail-pill .pill"):
            expect(page.locator(what)).to_be_hidden()
        page.evaluate("location.hash = '#/streams/key:calling'")
        expect(page.locator("#detail-pill")).to_have_text("complete")
        expect(page.locator("#facts")).to_contain_text(calling)
        expect(page.locator("#stop")).to_be_hidden()
        assert page.url.endswith(f"#/streams/{calling}")
    api.delete(f"/streams/{thinking}")


def hide(page: Page, *, hidden: bool) -> None:
    page.evaluate(
        "hidden => { Object.defineProperty(document, 'hidden', { value: hidden, configurable: true });"
        " document.dispatchEvent(new Event('visibilitychange')) }",
        hidden,
    )


def test_the_daemon_is_killed_and_comes_back(browser: Browser, upstream: str, tmp_path: Path) -> None:
    """Over a SIGKILL and a restart the page says so, comes back by itself, and shows the text that was kept: not more, not less.

    One stream is in full flow, and has shown text that was not durable; of the other everything was, and it stands still.
    """
    config = "[store]\ncommit_interval_s = 0.3"
    first = start_daemon(tmp_path, upstream, config=config)
    refused = r"net::ERR_(CONNECTION_REFUSED|INCOMPLETE_CHUNKED_ENCODING|EMPTY_RESPONSE|CONNECTION_RESET)"
    second = None
    try:
        with client(first) as api:
            flowing = start(api, "sim/endless", key="flowing")
            still = start(api, "sim/stall?after=6", key="still")
        with (
            opened(browser, first.http, token=TOKEN, place=f"#/streams/{flowing}", allowed=[refused]) as page,
            opened(browser, first.http, token=TOKEN, place=f"#/streams/{still}", allowed=[refused]) as other,
        ):
            wait_for_text(other, 18)
            wait_for_text(page, 150)
            whole = text_of(other)
            first.signal(signal.SIGKILL)
            first.wait()
            seen = text_of(page)
            expect(page.locator("#lost")).to_be_visible()
            expect(page.locator("#link")).to_have_text("Connection lost.")
            assert text_of(page) == seen
            assert violations(page) == []

            port = str(urlsplit(first.http).port)
            second = start_daemon(tmp_path, upstream, "--web-port", port, config=config)
            for each in (page, other):
                expect(each.locator("#detail-pill")).to_have_text("error")
                expect(each.locator("#detail-line")).to_contain_text("failed(interrupted)")
                expect(each.locator("#lost")).to_be_hidden()
            expect(page.locator("#rows tr", has_text="flowing").locator(".c-state .pill")).to_have_text(
                "error"
            )
            with client(second) as api:
                kept = snapshot_text(api, flowing)
                assert seen.startswith(kept)
                assert whole == snapshot_text(api, still)
                for each, text in ((page, kept), (other, whole)):
                    expect(each.locator("#timeline .moments")).to_contain_text("failed(interrupted)")
                    expect_text(each, text)
                start(api, "sim/ok", key="afterwards")
            expect(page.locator("#rows tr", has_text="afterwards").locator(".c-state .pill")).to_have_text(
                "complete"
            )
    finally:
        first.end()
        if second is not None:
            second.end()


def test_keyboard(browser: Browser, daemon: Daemon, api: httpx.Client) -> None:
    """By keyboard alone a stream is found, opened, nearly stopped and closed, and the focus is where one left it."""
    ids = [start(api, "sim/silent", key=f"key-{number}", labels={"set": "keys"}) for number in range(3)]
    with opened(browser, daemon.http, token=TOKEN) as page:
        expect(page.locator("#rows tr", has_text="key-2")).to_be_visible()
        page.keyboard.press("/")
        page.keyboard.type("set=keys")
        expect_rows(page, {"key-0", "key-1", "key-2"})
        page.locator("#rows a", has_text="key-2").focus()
        page.keyboard.press("ArrowDown")
        expect(page.locator("#rows a", has_text="key-1")).to_be_focused()
        page.keyboard.press("Delete")
        expect(page.get_by_role("dialog")).to_contain_text("key-1")
        page.keyboard.press("Escape")
        expect(page.get_by_role("dialog")).to_have_count(0)
        page.keyboard.press("Enter")
        expect(page.locator("#detail-title")).to_have_text("key-1")
        page.keyboard.press("Escape")
        expect(page.locator("#detail")).to_be_hidden()
        expect(page.locator("#rows a", has_text="key-1")).to_be_focused()
        page.locator("#words input[value=live]").focus()
        page.keyboard.press("?")
        expect(page.get_by_role("dialog")).to_contain_text("from stream to stream")
    for stream_id in ids:
        assert api.delete(f"/streams/{stream_id}").json()["outcome"] == "won"


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_for_everybody(browser: Browser, daemon: Daemon, api: httpx.Client, scheme: str) -> None:
    """axe-core finds nothing wrong: with a stream open, in every dialog, in both colour schemes, on a desk and on a phone."""
    stream_id = start(
        api,
        "sim/ok?tokens=60&fault=drop&after=20&times=1&interval_s=0.005",
        key=f"axe-{scheme}",
        retry={"resume": ["restart"]},
    )
    start(api, "sim/no-marker")
    try:
        live = start(api, "sim/endless", key=f"axe-live-{scheme}")
        with opened(browser, daemon.http, token=TOKEN, color_scheme=scheme) as page:
            expect(page.locator("#rows tr[data-word=streaming]").first).to_be_visible()
            expect(page.locator("#live-foot")).not_to_be_empty()
            assert violations(page) == []
            picture(page, f"streams-{scheme}")
            page.goto(f"{daemon.http}/#/streams/{stream_id}")
            expect(page.locator("#timeline .moments")).to_contain_text("completed(stop)")
            assert violations(page) == []
            picture(page, f"stream-{scheme}")
            for button in ("New stream", "Keyboard", f"Stop axe-live-{scheme}"):
                page.get_by_role("button", name=button, exact=True).click()
                assert violations(page, "dialog[open]") == []
                page.keyboard.press("Escape")
            if scheme == "light":
                ground = "getComputedStyle(document.body).backgroundColor"
                before = page.evaluate(ground)
                page.emulate_media(color_scheme="dark")
                assert page.evaluate(ground) != before
        with opened(
            browser, daemon.http, token=TOKEN, color_scheme=scheme, place=f"#/streams/{stream_id}", **PHONE
        ) as page:
            expect(page.locator("#timeline .moments")).to_contain_text("completed(stop)")
            assert violations(page) == []
    finally:
        api.delete(f"/streams/{live}")


def test_what_is_wrong_is_told(browser: Browser, daemon: Daemon) -> None:
    """Problems, limits that are near and open circuits stand out in words, not in colour alone, and go when they are over."""
    trouble = True

    def worse(route: Route) -> None:
        answer = route.fetch()
        told = answer.json()
        if trouble:
            told |= {"status": "degraded", "problems": ["the store cannot write: disk full"]}
            told["active"]["live"] = 9_500
            told["memory"]["pressure"] = True
            told["hour"]["events"] |= {"count": 1, "p50": 1.02}
            told["hour"]["bytes"] |= {"count": 1, "p50": 100.0, "p95": 100.0}
            circuit = {
                "state": "open",
                "failures": 9,
                "successes": 1,
                "opened": 2,
                "refused": 7,
                "trial_in_s": 4.0,
            }
            told["circuits"]["broken"] = circuit
        route.fulfill(response=answer, json=told)

    with opened(browser, daemon.http, token=TOKEN) as page:
        page.route("**/overview", worse)
        expect(page.locator("#problems")).to_have_text("the store cannot write: disk full")
        expect(page.locator("#status")).to_have_text("degraded")
        expect(page.locator("#tile-live")).to_have_attribute("data-alarm", "high")
        expect(page.locator("#memory-foot")).to_contain_text("short of memory")
        expect(page.locator("#events-foot")).to_contain_text("a stream: 1 event,")
        expect(page.locator("#circuits li").first).to_contain_text("circuit open")
        expect(page.locator("#circuits li").first).to_contain_text("refused 7 · tried again in 4.0 s")
        assert violations(page) == []
        trouble = False
        expect(page.locator("#problems")).to_be_hidden()
        expect(page.locator("#status")).to_have_text("ok")
        expect(page.locator("#circuits")).not_to_contain_text("circuit open")
        page.unroute_all(behavior="wait")


def test_on_a_phone(browser: Browser, daemon: Daemon, api: httpx.Client) -> None:
    """At phone width, and down to 320 pixels, nothing is cut off or scrolls sideways, and what is pressed is large enough."""
    stream_id = start(
        api, "sim/endless", key="a-key-that-is-long-enough-to-be-too-long-for-a-telephone/" + "x" * 60
    )
    longest = "document.getElementById('status-word').textContent = 'degraded'"
    wide = f"() => {{ {longest}; return document.documentElement.scrollWidth }}"
    with opened(browser, daemon.http, token=TOKEN, **PHONE) as page:
        row = page.locator(f"#rows tr[data-id='{stream_id}']")
        expect(row).to_be_visible()
        for width in (390, 320):
            page.set_viewport_size({"width": width, "height": 844})
            assert page.evaluate(wide) == width
            for part in (".pill", "a", "button", ".c-age", ".c-rate"):
                box = row.locator(part).first.bounding_box()
                assert box is not None
                assert box["x"] >= 0
                assert box["x"] + box["width"] <= width
            box = row.get_by_role("button").bounding_box()
            assert box is not None
            assert min(box["width"], box["height"]) >= 40
        page.set_viewport_size({"width": 390, "height": 844})
        picture(page, "phone-streams")
        row.locator("a").tap()
        wait_for_text(page, 40)
        assert page.evaluate(wide) == 390
        expect(page.locator("#list")).to_be_hidden()
        expect(page.locator("#stop")).to_be_in_viewport()
        expect(page.locator("#text")).to_be_in_viewport()
        expect(page.locator("#timeline svg")).to_be_visible()
        picture(page, "phone-stream")
        page.locator("#close").tap()
        expect(row).to_be_visible()
    api.delete(f"/streams/{stream_id}")


# What makes a row as wide as it gets is put into it, then it is told what is wrong with where its Stop is.
STOP_IN_SIGHT = """([id, state]) => {
  const row = document.querySelector(`#rows tr[data-id='${id}']`);
  const widest = { age: "23 h 59 m", silence: "59 m 59 s", rate: "1.23K", events: "1.23M", held: "1023 KiB", attempts: "12" };
  widest["state small"] = state;
  widest["upstream small"] = "a-model-of-a-provider/with-a-name-of-some-length";
  for (const [where, text] of Object.entries(widest)) row.querySelector(`.c-${where}`).textContent = text.replaceAll(" ", "\\u00a0");
  const list = document.getElementById("list");
  const [button, within] = list.checkVisibility() ? [row.querySelector("button"), list] : [document.getElementById("stop"), document.body];
  button.scrollIntoView({ block: "center", inline: "nearest" });
  const scrolled = document.querySelector(".scroll");
  scrolled.scrollLeft = 0;
  const [box, sight] = [button.getBoundingClientRect(), within.getBoundingClientRect()];
  const wrong = [];
  if (box.width === 0 || box.left < sight.left || box.right > sight.right) wrong.push("cut off");
  if (document.elementFromPoint((box.left + box.right) / 2, (box.top + box.bottom) / 2) !== button) wrong.push("covered");
  if (scrolled.scrollWidth > scrolled.clientWidth) wrong.push(`${scrolled.scrollWidth - scrolled.clientWidth} px too wide`);
  return wrong;
}"""


def test_stop_is_in_sight_at_every_width(browser: Browser, daemon: Daemon, api: httpx.Client) -> None:
    """From 320 to 1920 pixels, with a stream open or not, Stop is there without scrolling sideways."""
    stream_id = start(api, "sim/endless", upstream="goes-on", key="a-key-of-some-length/" + "x" * 60)
    row = [stream_id, "failed(provider_error)"]
    wider = [stream_id, "failed(of_a_reason_that_is_longer_than_any_that_there_is)"]
    wrong = {}
    with opened(browser, daemon.http, token=TOKEN) as page:
        expect(page.locator(f"#rows tr[data-id='{stream_id}'][data-word=streaming]")).to_be_visible()
        for width in (
            320,
            480,
            639,
            640,
            800,
            959,
            960,
            1024,
            1100,
            1200,
            1279,
            1280,
            1400,
            1440,
            1600,
            1920,
        ):
            page.set_viewport_size({"width": width, "height": 900})
            wrong[width, "closed"] = page.evaluate(STOP_IN_SIGHT, row)
        page.evaluate("id => { location.hash = `#/streams/${id}` }", stream_id)
        expect(page.locator("#detail-pill")).to_have_text("streaming")
        for width in (320, 640, 959, 960, 1024, 1200, 1280, 1400, 1440, 1600, 1920):
            page.set_viewport_size({"width": width, "height": 900})
            wrong[width, "open"] = page.evaluate(STOP_IN_SIGHT, row)
        page.set_viewport_size({"width": 960, "height": 900})
        (too_wide,) = page.evaluate(STOP_IN_SIGHT, wider)
        assert "px too wide" in too_wide
    api.delete(f"/streams/{stream_id}")
    assert {place: what for place, what in wrong.items() if what} == {}
