"""Upstreams and credentials: what is refused, by which name, and that no secret is shown by anything."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import attrs
import pytest

from supervisor.dialects import Call
from supervisor.dialects.catalog import find
from supervisor.errors import ConfigurationError
from supervisor.upstream.attempt import make_request
from supervisor.upstream.catalog import Credential, Upstream, discover

URL = "https://api.example.com/v1"
SECRET = "sk-geheim-0123456789"


def test_the_defaults() -> None:
    """A name and a URL make an OpenAI-compatible upstream."""
    upstream = Upstream(name="a", base_url=URL + "/")
    assert upstream.url == URL + "/chat/completions"
    assert upstream.dialect is find("openai-chat")
    assert Upstream(name="a", base_url=URL, path="/other").url == URL + "/other"
    assert upstream == pickle.loads(pickle.dumps(upstream))
    assert hash(upstream) == hash(copy.copy(upstream))


BAD: list[tuple[str, Any]] = [
    ("name", ""),
    ("name", "-a"),
    ("name", "a" * 65),
    ("name", "a b"),
    ("name", 1),
    ("base_url", "ftp://h/"),
    ("base_url", "https://"),
    ("base_url", "api.example.com"),
    ("base_url", f"https://user:{SECRET}@h/v1"),
    ("base_url", f"https://h/v1?key={SECRET}"),
    ("base_url", f"https://h/v1#{SECRET}"),
    ("base_url", "https://h/v1?"),
    ("base_url", 7),
    ("base_url", "https://[::1/v1"),
    ("dialect", "nonesuch"),
    ("dialect", "native"),
    ("path", "no-slash"),
    ("path", "/a?key=b"),
    ("path", "/a\r\nb"),
    ("headers", {"Authorization": f"Bearer {SECRET}"}),
    ("headers", {"x-api-key": SECRET}),
    ("headers", {"API-Key": SECRET}),
    ("headers", {"X-Goog-Api-Key": SECRET}),
    ("headers", {"Cookie": SECRET}),
    ("headers", {"X-Auth-Token": SECRET}),
    ("headers", {"X-Client-Secret": SECRET}),
    ("headers", {"Content-Length": "3"}),
    ("headers", {"Transfer-Encoding": "chunked"}),
    ("headers", {"X-A": f"b\r\nX-C: {SECRET}"}),
    ("headers", {"X-A": f"b\0{SECRET}"}),
    ("headers", {"X-A": "é"}),
    ("headers", {"X-A": 3}),
    ("headers", {"X A": "b"}),
    ("headers", {"X-A\r\nX-B": "b"}),
    ("headers", {"X-A": "x" * 9000}),
    ("headers", {f"X-{n}": "x" for n in range(65)}),
    ("headers", 5),
    ("proxy", f"socks5://u:{SECRET}@h"),
    ("proxy", f"http://u:{SECRET}@"),
    ("credential", SECRET),
    ("retry", {"attempts": 3}),
    ("deadlines", 5),
]


@pytest.mark.parametrize(("field", "value"), BAD, ids=range(len(BAD)))
def test_bad_values_are_named_and_secrets_not_shown(field: str, value: Any) -> None:
    """Each refusal names the field; a value that may hold a secret is not repeated."""
    options = {"name": "up", "base_url": URL} | {field: value}
    with pytest.raises(ConfigurationError) as caught:
        Upstream(**options)
    assert field in caught.value.field
    assert SECRET not in str(caught.value)
    assert SECRET not in repr(caught.value)


def test_harmless_headers_are_allowed() -> None:
    """Names that only resemble a credential's are not refused."""
    headers = {
        "OpenAI-Organization": "org",
        "HTTP-Referer": "x",
        "Idempotency-Key": "1",
        "X-Max-Tokens-Policy": "",
    }
    assert Upstream(name="a", base_url=URL, headers=headers).headers == headers


def test_a_header_of_the_credential_cannot_also_be_plain() -> None:
    """The credential's own header is refused among the others, whatever its name."""
    with pytest.raises(ConfigurationError, match="x-mine"):
        Upstream(
            name="a",
            base_url=URL,
            headers={"x-mine": "v"},
            credential=Credential.from_env("K", header="X-Mine"),
        )


def test_credentials_are_read_at_use(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """From a variable or a file, each time anew."""
    env = Credential.from_env("TEST_KEY")
    monkeypatch.setenv("TEST_KEY", SECRET)
    assert env.secret() == SECRET
    monkeypatch.setenv("TEST_KEY", "other")
    assert env.secret() == "other"
    assert env.secret({"TEST_KEY": " third\n"}) == "third"
    path = tmp_path / "key"
    path.write_text(f"{SECRET}\n")
    file = Credential.from_file(path, header="x-api-key")
    assert file.secret() == SECRET
    assert file.header_for(SECRET) == ("x-api-key", SECRET)
    assert env.header_for(SECRET) == ("Authorization", f"Bearer {SECRET}")


@pytest.mark.parametrize(
    "value", ["", "  ", "two words", "a\nb", "a\r\nX-B: c", "ключ", "x" * 20_000, "a\0b"]
)
def test_bad_secrets_are_refused_without_showing_them(value: str, tmp_path: Path) -> None:
    """Empty, broken or huge: the message names the place, never the content."""
    path = tmp_path / "key"
    path.write_text(value)
    for credential in (Credential.from_env("TEST_KEY"), Credential.from_file(path)):
        with pytest.raises(ConfigurationError) as caught:
            credential.secret({"TEST_KEY": value})
        assert credential.where in str(caught.value)
        if value.strip():
            assert value not in str(caught.value)


def test_missing_secrets_are_named(tmp_path: Path) -> None:
    """The variable or the path is in the message, with the reason."""
    with pytest.raises(ConfigurationError, match=r"TEST_KEY.*not set"):
        Credential.from_env("TEST_KEY").secret({})
    with pytest.raises(ConfigurationError, match="No such file"):
        Credential.from_file(tmp_path / "none").secret()
    with pytest.raises(ConfigurationError, match="directory"):
        Credential.from_file(tmp_path).secret()


def test_a_secret_in_place_of_its_name_is_not_shown() -> None:
    """Somebody who writes the key where the variable's name belongs does not find it in a log."""
    with pytest.raises(ConfigurationError) as caught:
        Credential.from_env(SECRET)
    assert SECRET not in str(caught.value)
    for wrong in ("", "Content-Length", "a b"):
        with pytest.raises(ConfigurationError):
            Credential.from_env("K", header=wrong)


def test_no_way_to_show_a_secret(monkeypatch: pytest.MonkeyPatch) -> None:
    """repr, str, format, pickle and asdict of a credential that was used hold its place only."""
    monkeypatch.setenv("TEST_KEY", SECRET)
    credential = Credential.from_env("TEST_KEY")
    upstream = Upstream(name="a", base_url=URL, credential=credential, proxy=f"http://u:{SECRET}@h")
    credential.secret()
    shown = [
        repr(credential),
        str(credential),
        f"{credential}",
        repr(pickle.dumps(credential)),
        repr(upstream),
    ]
    shown += [str(attrs.asdict(credential)), f"{upstream}"]
    assert SECRET not in "".join(shown)
    assert "TEST_KEY" in shown[0]


def test_discovery() -> None:
    """An upstream for each known key that is set (two for OpenAI's, of its two dialects), with its OPENAI_BASE_URL."""
    keys = ["OPENAI", "ANTHROPIC", "GEMINI", "COHERE", "OPENROUTER", "GROQ", "MISTRAL", "DEEPSEEK"]
    keys += ["XAI", "TOGETHER", "FIREWORKS"]
    found = discover({f"{key}_API_KEY": SECRET for key in keys})
    names = [upstream.name for upstream in found]
    assert names == ["openai", "openai-responses", *[key.lower() for key in keys[1:]]]
    assert all(upstream.base_url.startswith("https://") for upstream in found)
    assert {str(upstream.credential) for upstream in found} == {f"env:{key}_API_KEY" for key in keys}
    assert {upstream.dialect.name for upstream in found} == {
        "openai-chat", "openai-responses", "anthropic", "gemini", "cohere",
    }  # fmt: skip
    assert SECRET not in repr(found)


@pytest.mark.parametrize(
    ("dialect", "name"),
    [("openai-chat", "authorization"), ("anthropic", "x-api-key"), ("gemini", "x-goog-api-key")],
)
def test_each_dialect_has_its_header_for_the_key(dialect: str, name: str) -> None:
    """Unless the credential says another."""
    request = {"model": "m", "messages": [], "contents": []}
    upstream = Upstream(
        name="u", base_url="http://h", dialect=find(dialect), credential=Credential.from_env("K")
    )
    sent = make_request(upstream, upstream.first(request), SECRET)
    assert SECRET in sent.headers[name]
    other = attrs.evolve(upstream, credential=Credential.from_env("K", header="api-key"))
    sent = make_request(other, other.first(request), SECRET)
    assert sent.headers["api-key"] == SECRET
    assert name not in sent.headers


def test_the_base_url_of_openai_is_that_of_both_its_dialects() -> None:
    """As for its SDKs."""
    own, responses = discover(
        {"OPENAI_API_KEY": "k", "OPENAI_BASE_URL": "http://127.0.0.1:8000/v1", "XAI_API_KEY": " "}
    )
    assert own.url == "http://127.0.0.1:8000/v1/chat/completions"
    assert responses.url == "http://127.0.0.1:8000/v1/responses"
    assert discover({}) == []
    with pytest.raises(ConfigurationError, match="base_url"):
        discover({"OPENAI_API_KEY": "k", "OPENAI_BASE_URL": "nonsense"})


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        (None, "/responses/r1/cancel"),
        ("/responses", "/responses/r1/cancel"),
        ("/v2/responses", "/v2/responses/r1/cancel"),
        ("/response", "/response/r1/cancel"),
        ("/v2/responses/", "/v2/responses/r1/cancel"),
        ("/", "/r1/cancel"),
    ],
)
def test_later_calls_are_made_below_the_upstreams_own_path(path: str | None, expected: str) -> None:
    """Also where the beginning of its last segment is that of the dialect's."""
    upstream = Upstream(name="u", base_url="https://u.test", dialect="openai-responses", path=path)
    assert upstream.placed(Call(path="/responses/r1/cancel")).path == expected
