"""The dashboard as files: how it is served, that it needs nobody else, and that its parts fit. In a browser: tests/e2e."""

from __future__ import annotations

import re
from importlib import resources

from supervisor.control.auth import Token
from supervisor.streams import State
from supervisor.web.app import WebAccess
from supervisor.web.dashboard import CONTENT_SECURITY_POLICY, dashboard
from tests.web.scene import scene

FILES = {
    entry.name: entry.read_text("utf-8") for entry in (resources.files("supervisor.web") / "static").iterdir()
}
SCRIPTS = {name: text for name, text in FILES.items() if name.endswith(".js")}
PAGE = FILES["index.html"]
WORDS = {"idle", "streaming", "complete", "cancelled", "error"}
TYPES = {
    "html": "text/html; charset=utf-8",
    "css": "text/css; charset=utf-8",
    "js": "text/javascript; charset=utf-8",
}


async def test_the_files_are_public_and_kept_to_themselves() -> None:
    """Anybody gets the page and its files, each with its type and the policy; asked again they are unchanged; nothing else is there."""
    access = WebAccess(token=Token("a-token-for-tests-0123456789"))
    async with scene(access=access, parts=[dashboard()]) as front, front.client() as client:
        for name, text in FILES.items():
            target = "/" if name == "index.html" else f"/static/{name}"
            got = await client.ask("GET", target)
            assert (got.status, got.body.decode()) == (200, text)
            assert got.headers["content-type"] == TYPES[name.rpartition(".")[2]]
            assert got.headers["content-security-policy"] == CONTENT_SECURITY_POLICY
            assert (got.headers["x-content-type-options"], got.headers["cache-control"]) == (
                "nosniff",
                "no-cache",
            )
            again = await client.ask("GET", target, headers={"if-none-match": got.headers["etag"]})
            assert (again.status, again.body) == (304, b"")
        for target in ("/static/", "/static/index.html", "/static/..%2fapp.py", "/static/../app.py"):
            assert (await client.ask("GET", target)).status == 404
        assert (await client.ask("POST", "/")).status == 405


def test_nothing_is_asked_of_anybody_else() -> None:
    """No address but our own is in the files, nothing inline that the policy forbids, and no text is ever read as markup."""
    for name, text in FILES.items():
        told = re.sub(r"http://www\.w3\.org/2000/svg", "", text)
        assert not re.search(r"https?:|//[a-z]+\.", told), name
    assert not re.search(r"\s(style|on[a-z]+)=", PAGE)
    assert not re.search(r"<script(?![^>]* src=)|<style", PAGE)
    for name, text in SCRIPTS.items():
        assert not re.search(
            r"innerHTML|outerHTML|insertAdjacent|document\.write|\beval\b|new Function", text
        ), name


def test_the_parts_fit() -> None:
    """Every file that is named is there and every file is named; every id that a script looks up is in the page, once."""
    named = set(re.findall(r'"static/([^"]+)"', PAGE))
    for text in SCRIPTS.values():
        named |= set(re.findall(r'from "\./([^"]+)"', text))
    assert named | {"index.html"} == set(FILES)
    ids = re.findall(r'\bid="([^"]+)"', PAGE)
    assert len(ids) == len(set(ids))
    for name, text in SCRIPTS.items():
        assert set(re.findall(r'byId\("([^"]+)"\)', text)) <= set(ids), name
    referred = re.findall(r'\b(?:aria-labelledby|aria-describedby|list|href)="#?([^"/]+)"', PAGE)
    assert set(referred) <= set(ids)
    for dialog in re.findall(r"<dialog[^>]*>", PAGE):
        assert "aria-labelledby=" in dialog


def test_every_state_has_one_of_five_words() -> None:
    """Each state of a stream is idle, streaming, complete, cancelled or error on the page, and each word has a sign and a filter."""
    table = re.search(r"const WORDS = \{(.*?)\};", FILES["words.js"], re.DOTALL)
    assert table is not None
    word_of = dict(re.findall(r'(\w+): "(\w+)"', table[1]))
    assert set(word_of) == {state.value for state in State}
    assert set(word_of.values()) == WORDS
    ended = {state: word for state, word in word_of.items() if word not in {"idle", "streaming"}}
    assert ended == {"completed": "complete", "cancelled": "cancelled", "failed": "error", "expired": "error"}
    for word in WORDS:
        assert f'id="icon-{word}"' in PAGE
        assert f'name="word" value="{word}"' in PAGE
