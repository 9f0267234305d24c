"""A configuration says what it means, or says exactly what is wrong with it."""

from __future__ import annotations

import contextlib
import json
import re
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import attrs
import pytest
from hypothesis import given
from hypothesis import strategies as st

from supervisor.config import DEFAULT_PORT, MEMORY, Config, default_store_path, load, parse
from supervisor.dialects import PRESETS
from supervisor.errors import ConfigurationError
from supervisor.stores import Keep, MemoryStore
from supervisor.stores.sqlite import SQLiteStore
from supervisor.streams import Deadlines, Limits, MemoryPolicy

SECRET = "sk-very-secret-value"

FULL = """
discover = false

[control]
host = "::1"
port = 0
token_env = "CONTROL_TOKEN"
origins = ["https://example.org"]
[control.limits]
max_connections = 7
[control.limits.link]
stall_s = 3
[control.limits.session]
max_requests = 9

[store]
path = "/somewhere/streams.db"
synchronous = "FULL"
commit_interval_s = 0.1

[retention]
max_ended = 10
max_age_s = "none"
[retention.tenant]
max_bytes = 1000
[retention.tenants.acme]
max_age_s = 9

[shutdown]
grace_s = 0

[log]
level = "debug"
format = "json"
file = "/somewhere/log"

[limits]
max_live = 5
when_full = "reap_oldest"
finished_s = "none"

[memory]
max_age_s = 60
max_bytes = "none"

[deadlines]
total_s = "none"
idle_s = 5

[retry]
attempts = 2
statuses = [500]

[upstreams.local]
base_url = "http://127.0.0.1:1/v1"
dialect = "openai-chat"
path = "/x"
api_key_env = "LOCAL_KEY"
api_key_header = "x-api-key"
proxy = "direct"
[upstreams.local.headers]
x-title = "me"
[upstreams.local.deadlines]
connect_s = 1
[upstreams.local.retry]
wait_max_s = 9

[upstreams.file]
base_url = "https://example.org"
api_key_file = "/somewhere/key"
"""


def refused(text: str) -> str:
    with pytest.raises(ConfigurationError) as caught:
        parse(text, source="my.toml")
    assert "my.toml" in str(caught.value)
    return str(caught.value)


def test_nothing_is_needed() -> None:
    """An empty file is the defaults, which are those of the classes that use them."""
    config = parse("")
    assert attrs.evolve(config, source="x") == attrs.evolve(Config(), source="x")
    assert (Limits(), MemoryPolicy(), Deadlines()) == (config.limits, config.memory, config.deadlines)
    assert (config.control.host, config.control.port) == ("127.0.0.1", DEFAULT_PORT)
    assert config.shutdown.grace_s == 30
    assert config.control.token.read({}) is None


def test_everything_can_be_said() -> None:
    """Every table is read, by name, with `none` turning limits off."""
    config = parse(FULL)
    assert config.discover is False
    assert config.control.token.read({"CONTROL_TOKEN": " t \n"}) == "t"
    assert (
        config.control.limits.max_connections,
        config.control.limits.link.stall_s,
        config.control.limits.session.max_requests,
    ) == (7, 3, 9)
    assert config.store.synchronous == "FULL"
    assert (config.retention.max_ended, config.retention.max_age_s) == (10, None)
    assert (config.retention.tenant, config.retention.tenants) == (
        Keep(max_bytes=1000),
        {"acme": Keep(max_age_s=9)},
    )
    assert config.log.file == Path("/somewhere/log")
    assert (
        config.limits.max_live,
        config.limits.when_full,
        config.limits.finished_s,
    ) == (5, "reap_oldest", None)
    assert (config.memory.max_age_s, config.memory.max_bytes) == (60, None)
    assert (config.deadlines.total_s, config.deadlines.idle_s, config.deadlines.connect_s) == (None, 5, 10)
    local, file = config.upstreams
    assert local.url == "http://127.0.0.1:1/v1/x"
    assert str(local.credential) == "env:LOCAL_KEY"
    assert local.credential is not None
    assert local.credential.header == "x-api-key"
    assert dict(local.headers) == {"x-title": "me"}
    assert str(file.credential) == "file:/somewhere/key"


def test_upstreams_inherit() -> None:
    """An upstream's deadlines and retry are the file's own, but for the keys that it states."""
    local, file = parse(FULL).upstreams
    assert local.deadlines is not None
    assert (local.deadlines.connect_s, local.deadlines.idle_s, local.deadlines.total_s) == (1, 5, None)
    assert (2, 9, frozenset({500})) == (local.retry.attempts, local.retry.wait_max_s, local.retry.statuses)
    assert file.retry.attempts == 2


def test_environment_offers_upstreams() -> None:
    """Keys in the environment make upstreams; one of the file with the same name wins; `discover` turns it off."""
    environ = {"OPENAI_API_KEY": SECRET, "OPENAI_BASE_URL": "http://127.0.0.1:9/v1", "GROQ_API_KEY": SECRET}
    found = parse("[retry]\nattempts = 3").all_upstreams(environ)
    assert sorted(found) == ["groq", "openai", "openai-responses"]
    assert found["openai"].base_url == "http://127.0.0.1:9/v1"
    assert found["openai"].retry.attempts == 3
    assert SECRET not in repr(found)
    mine = parse('[upstreams.openai]\nbase_url = "http://127.0.0.1:8"').all_upstreams(environ)
    assert mine["openai"].base_url == "http://127.0.0.1:8"
    assert parse("discover = false").all_upstreams(environ) == {}


@pytest.mark.parametrize(
    ("url", "here"),
    [
        ("http://127.0.0.1:7434/v1", True),
        ("http://localhost:7434", True),
        ("http://[::1]:7433/v1", True),
        ("http://LOCALHOST.:7434/v1", True),
        ("http://127.0.0.1:7435/v1", False),
        ("http://example.org:7434/v1", False),
        ("http://127.0.0.1/v1", False),
        ("https://api.openai.com/v1", False),
    ],
)
async def test_a_daemon_is_not_its_own_upstream(url: str, here: bool) -> None:
    """The daemon's own address is refused in the file, by the upstream's name; of the environment it makes none, and a warning."""
    environ = {"OPENAI_API_KEY": SECRET, "OPENAI_BASE_URL": url, "GROQ_API_KEY": SECRET}
    config = parse("")
    assert sorted(config.all_upstreams(environ)) == [
        "groq",
        *(() if here else ("openai", "openai-responses")),
    ]
    await config.check(environ)
    told = "\n".join(config.warnings(environ))
    assert (f"OPENAI_BASE_URL ({url})" in told, "openai, openai-responses" in told) == (here, here)
    written = parse(f'discover = false\n[upstreams.x]\nbase_url = "{url}"', source="my.toml")
    if not here:
        await written.check({})
        return
    with pytest.raises(ConfigurationError) as caught:
        await written.check({})
    assert str(caught.value).startswith(
        f"my.toml: [upstreams.x] base_url: {url!r} is this daemon's own address; expected"
    )


async def test_a_daemon_is_found_by_the_address_that_it_is_given() -> None:
    """Its own host and ports count, loopback of a daemon that listens everywhere too; a proxy's 127.0.0.1 is another."""
    everywhere = '[web]\nhost = "0.0.0.0"\nport = 80\n[control]\ntoken_env = "T"\n'
    for host, url, more, here in (
        ("0.0.0.0", "http://127.0.0.1", "", True),
        ("0.0.0.0", "http://127.0.0.1", 'proxy = "http://proxy:1"', False),
        ("192.0.2.7", "http://192.0.2.7/v1", "", True),
        ("192.0.2.7", "http://127.0.0.1/v1", "", False),
    ):
        text = everywhere.replace("0.0.0.0", host)
        config = parse(f'discover = false\n{text}[upstreams.x]\nbase_url = "{url}"\n{more}')
        with pytest.raises(ConfigurationError, match="own address") if here else nullcontext():
            await config.check({"T": "token"})


RESUMING = """
[upstreams.main]
base_url = "http://127.0.0.1:1"
prefill = "continue_final_message"
fallback = ["spare", "last"]
retry.resume = ["sequence", "continuation", "restart"]
[upstreams.main.models]
"ours" = "vendor/theirs"
[upstreams.spare]
base_url = "http://127.0.0.1:2"
[upstreams.last]
base_url = "http://127.0.0.1:3"
fallback = ["main"]
"""


def test_what_an_upstream_may_do_when_it_fails() -> None:
    """Fallbacks are upstreams of the file, wherever in it they stand; a fallback's own are not asked."""
    main, spare, last = parse(RESUMING).upstreams
    assert [upstream.name for upstream in main.fallback] == ["spare", "last"]
    assert [upstream.fallback for upstream in main.fallback] == [(), ()]
    assert [upstream.name for upstream in last.fallback] == ["main"]
    assert (main.prefill, main.models) == ("continue_final_message", {"ours": "vendor/theirs"})
    assert main.retry.resume == ("sequence", "continuation", "restart")
    assert spare.retry.resume == ("sequence",)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[limits]\nmax_liv = 1", ["[limits]", "'max_liv'", "'max_live'"]),
        ("[limit]\n", ["'limit'", "'limits'"]),
        ("[control]\nhosts = 'x'", ["[control]", "'hosts'", "'host'"]),
        ("[control.limits.link]\nstall = 1", ["[control.limits.link]", "'stall'", "'stall_s'"]),
        ("[upstreams.x]\nbase-url = 'x'", ["[upstreams.x]", "'base-url'", "'base_url'"]),
        ("[upstreams.x.deadlines]\ntotal = 1", ["[upstreams.x.deadlines]", "'total'", "'total_s'"]),
        ("[limits]\nmax_live = 0", ["[limits] max_live", "0 is not valid", "whole number"]),
        ("[limits]\nmax_live = '3'", ["[limits] max_live", "'3'", "a whole number"]),
        ("[limits]\nmax_live = true", ["[limits] max_live", "True", "a whole number"]),
        ("[limits]\nmax_live = 1.5", ["[limits] max_live", "1.5", "a whole number"]),
        ("[limits]\nwhen_full = 'drop'", ["[limits] when_full", "'drop'", "'reap_oldest'"]),
        ("[memory]\ngroups = 3", ["[memory] groups", "3", "[[memory.groups]]"]),
        ("[[memory.groups]]\nmax_count = 3", ["[memory.groups[0]] labels", "a tenant"]),
        (
            "[[memory.groups]]\ntenant = '*'\nmax_cuont = 3",
            ["[memory.groups[0]]", "max_cuont", "'max_count'"],
        ),
        ("[[memory.groups]]\nlabels = {user = 3}\nmax_count = 1", ["labels", "a table of strings"]),
        ("[deadlines]\nidle_s = -1", ["[deadlines] idle_s", "-1"]),
        ("[deadlines]\nidle_s = inf", ["[deadlines] idle_s", "inf"]),
        ("[deadlines]\nidle_s = 'never'", ["[deadlines] idle_s", "'never'", '"none"']),
        ("[control]\nport = 70000", ["[control] port", "70000", "65535"]),
        ("[control]\norigins = 'x'", ["[control] origins", "an array of strings"]),
        ("[control]\ntoken_env = 'A'\ntoken_file = 'b'", ["[control] token_env", "only one of"]),
        ("[control.limits]\nmax_connections = 0", ["[control.limits] max_connections", "above 0"]),
        ("[store]\npath = ''", ["[store] path", "':memory:'"]),
        ("[store]\nsynchronous = 'full'", ["[store] synchronous", "'FULL'"]),
        ("[retention]\nmax_ended = 0", ["[retention] max_ended", "at least 1"]),
        ("[retention.tenant]\nmax_bytes = -1", ["[retention.tenant] max_bytes", "0 or more"]),
        ("[retention]\ntenants = 1", ["[retention] tenants", "[retention.tenants.NAME]"]),
        ("[retention.tenants.a]\nmax_sge_s = 1", ["[retention.tenants.a]", "max_age_s"]),
        ('[retention.tenants.a]\nmax_age_s = "1"', ["[retention.tenants.a] max_age_s", "a number"]),
        ("[shutdown]\ngrace_s = -1", ["[shutdown] grace_s", "0 or more"]),
        ("[log]\nlevel = 'loud'", ["[log] level", "'loud'", "'warning'"]),
        ("[log]\nfile = 3", ["[log] file", "3", "the path of a file"]),
        ("[retry]\nattempts = 0", ["[retry] attempts", "1 to 100"]),
        ("[retry]\nwait_max_s = 0.1", ["[retry] wait_max_s", "0.1"]),
        ("discover = 'yes'", ["discover", "'yes'", "true or false"]),
        ("limits = 3", ["limits", "3", "a table, [limits]"]),
        ("upstreams = 3", ["upstreams", "[upstreams.NAME]"]),
        ("[upstreams]\nx = 3", ["upstreams.x", "a table, [upstreams.x]"]),
        ("[upstreams.'a b']\nbase_url = 'http://h'", ["[upstreams]", "'a b'", "a name"]),
        ("[upstreams.x]\n", ["[upstreams.x] base_url", "https://api.openai.com/v1"]),
        ("[upstreams.x]\nbase_url = 'http://h'\nfallback = ['y']", ["[upstreams.x] fallback", "'y'"]),
        ("[upstreams.x]\nbase_url = 'http://h'\nfallback = ['x']", ["[upstreams.x] fallback", "'x'"]),
        (
            "[upstreams]\nx = {base_url = 'http://h', fallback = ['y']}\ny = {base_url = 'http://h', dialect = 'anthropic'}",
            ["[upstreams.x] fallback", "y (anthropic)", "the same dialect"],
        ),
        ("[upstreams.x]\nbase_url = 'http://h'\nprefill = 'yes'", ["[upstreams.x] prefill", "'yes'"]),
        ("[upstreams.x]\nbase_url = 'http://h'\nmodels = {a = 3}", ["[upstreams.x.models] a", "a string"]),
        ("[retry]\nresume = ['sequenz']", ["[retry] resume", "sequenz", "continuation"]),
        ("[upstreams.x]\nbase_url = 'ftp://h'", ["[upstreams.x] base_url", "http://"]),
        ("[upstreams.'a.b']\nbase_url = 'ftp://h'", ["[upstreams.a.b] base_url", "http://"]),
        (
            "[upstreams.x]\nbase_url = 'http://h'\ndialect = 'opnai'",
            ["[upstreams.x] dialect", "'opnai'", "openai-chat"],
        ),
        (
            "[upstreams.x]\nbase_url = 'http://h'\napi_key_env = 'A'\napi_key_file = 'b'",
            ["api_key_file", "only one of"],
        ),
        *(
            (
                f"[upstreams.x]\nbase_url = 'http://h'\ndialect = '{name}'",
                ["[upstreams.x] path", f"a path, as the dialect {name} has no default"],
            )
            for name in ("generic", *PRESETS)
        ),
        ("[upstreams.x]\nbase_url = 'http://h'\napi_key_header = 'a'", ["api_key_header", "beside it"]),
        (
            "[upstreams.x]\nbase_url = 'http://h'\nheaders = 3",
            ["[upstreams.x] headers", "a table of strings"],
        ),
        ("[deadlines]\nidle_s = 0", ["[deadlines] idle_s", 'or "none" for no limit']),
        ("[retry]\nstatuses = [200, 500, 999]", ["[retry] statuses: [200, 999] is not valid", "400 to 599"]),
        ("[control]\norigins = ['https://a/b']", ["[control] origins: 'https://a/b'", "without a path"]),
        (
            "[upstreams.x]\nbase_url = 'http://h'\nproxy = 'http://h:99999'",
            ["[upstreams.x] proxy", "1 to 65535"],
        ),
        (
            "[upstreams.x]\nbase_url = 'http://h'\nproxy = 'http://h/p'",
            ["[upstreams.x] proxy", "host[:port]"],
        ),
        ("[upstreams.x]\nbase_url = 'http://h'\nproxy = 'none'", ["[upstreams.x] proxy", "'direct'"]),
        (
            "[upstreams.x]\nbase_url = 'http://h'\nmodels = 3",
            ["[upstreams.x] models: 3", "a table of strings"],
        ),
        ("[upstreams.x]\nbase_url = 'http://h'\nmodels = {a = ['b']}", ["[upstreams.x.models] a: ['b']"]),
        (
            "[upstreams.x]\nbase_url = 'http://h'\napi_key_env = 'A'\napi_key_header = 'a b'",
            ["[upstreams.x] api_key_header: 'a b'", "the name of a header"],
        ),
        ("\nx = ?", ["TOML", "line 2"]),
        ("a = " + "[" * 5000, ["TOML"]),
    ],
)
def test_what_is_wrong_is_said(text: str, said: list[str]) -> None:
    """An error names the file, the table, the key, the value and what would be right."""
    message = refused(text)
    for part in said:
        assert part in message


@pytest.mark.parametrize(
    "text",
    [
        "[upstreams.x]\nbase_url = 'http://h'\napi_key = '{}'",
        "[upstreams.x]\nbase_url = 'http://h'\ntoken = '{}'",
        "[upstreams.x]\nbase_url = 'http://user:{}@h'",
        "[upstreams.x]\nbase_url = 'http://h?key={}'",
        "[upstreams.x]\nbase_url = 'http://h'\napi_key_env = '{}'",
        "[upstreams.x]\nbase_url = 'http://h'\nproxy = 'ftp://u:{}@p'",
        "[upstreams.x]\nbase_url = 'http://h'\nheaders.Authorization = 'Bearer {}'",
        "[upstreams.x]\nbase_url = 'http://h'\nheaders.x-api-key = '{}'",
        "[upstreams.x]\nbase_url = 'http://h'\nheaders.x-other = \"{}\\u0000\"",
        "[upstreams.x]\nbase_url = 'http://h'\nheaders.x-other = ['{}']",
        "[upstreams]\nx = '{}'",
        "[control]\ntoken = '{}'",
        "[control]\ntoken_env = ['{}']",
        "key = '{}",
    ],
)
def test_a_misplaced_secret_is_not_shown(text: str) -> None:
    """Where a secret was written into the file itself, the refusal does not repeat it."""
    assert SECRET not in refused(text.replace("{}", SECRET))


TEXT = st.text(st.characters(exclude_categories=["C"]), max_size=8)
SCALARS = (
    st.none() | st.booleans() | st.integers(-10, 10) | st.floats(allow_nan=True) | TEXT | st.just("none")
)
VALUES = st.recursive(
    SCALARS.filter(lambda value: value is not None),
    lambda inner: (
        st.lists(inner, max_size=2)
        | st.dictionaries(st.text("ab_s", min_size=1, max_size=5), inner, max_size=2)
    ),
    max_leaves=4,
)
KEYS = [
    (table.name, field.name)
    for table in attrs.fields(Config)
    if table.name not in {"source", "discover", "upstreams"}
    for field in attrs.fields(type(getattr(Config(), table.name)))
]


def toml(value: Any) -> str:
    if isinstance(value, dict):
        return "{" + ", ".join(f"{json.dumps(key)} = {toml(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(toml, value)) + "]"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, float):
        text = repr(value)
        return text if any(mark in text for mark in ".en") else f"{text}.0"
    return json.dumps(value, ensure_ascii=False) if isinstance(value, str) else str(value)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (
            "[[gateway.clients]]\nkey_env = 'X'",
            "[gateway.clients[0]] tenant: None is not valid; expected a string",
        ),
        (
            "[[gateway.routes]]\nmodels = ['m']",
            "[gateway.routes[0]] upstream: None is not valid; expected a string",
        ),
    ],
)
def test_a_key_that_cannot_be_left_out(text: str, said: str) -> None:
    """A table that lacks a key which has no default is refused by the name of the key."""
    with pytest.raises(ConfigurationError, match=re.escape(said)):
        parse(text)


@given(st.sampled_from(KEYS), VALUES)
def test_any_value_is_taken_or_refused(key: tuple[str, str], value: Any) -> None:
    """Whatever stands at any key, the result is a configuration or a ConfigurationError that names the place."""
    table, field = key
    text = f"[{table}]\n{field} = {toml(value)}"
    try:
        config = parse(text, source="my.toml")
    except ConfigurationError as error:
        assert str(error).startswith((f"my.toml: [{table}", f"my.toml: {table}.{field}"))  # noqa: PT017  # either way is right
        assert isinstance(value, dict) or field in f"{error.field} {error.expected}"  # noqa: PT017  # as above
    else:
        assert isinstance(config, Config)


@given(st.text(max_size=60) | st.text("[]={}.\"'\n# abc_1-", max_size=60))
def test_any_text_is_taken_or_refused(text: str) -> None:
    """Whatever the file holds, nothing but a ConfigurationError comes out."""
    with contextlib.suppress(ConfigurationError):
        parse(text)


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    """A missing file, a folder, bytes that are not text, and a huge file are named."""
    binary, huge = tmp_path / "binary.toml", tmp_path / "huge.toml"
    binary.write_bytes(b"\xff\xfe")
    huge.write_bytes(b"#" * ((1 << 20) + 1))
    for path in (tmp_path / "missing.toml", tmp_path, binary, huge):
        with pytest.raises(ConfigurationError) as caught:
            load(path)
        assert str(path) in str(caught.value)


def test_token_files(tmp_path: Path) -> None:
    """A token is read from its file; one that cannot be a token, or a file that is not there, is refused unshown."""
    path = tmp_path / "token"
    source = parse(f"[control]\ntoken_file = {json.dumps(str(path))}").control.token
    with pytest.raises(ConfigurationError, match="token_file"):
        source.read({})
    path.write_text(f"{SECRET}\n")
    assert source.read({}) == SECRET
    path.write_text(f"{SECRET} {SECRET}")
    with pytest.raises(ConfigurationError) as caught:
        source.read({})
    assert SECRET not in str(caught.value)
    path.write_text("\n")
    with pytest.raises(ConfigurationError, match=rf"^token_file: '{path}' is not valid; .*\(it is empty\)$"):
        source.read({})
    with pytest.raises(ConfigurationError, match="NOT_SET"):
        parse("[control]\ntoken_env = 'NOT_SET'").control.token.read({})


def test_the_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The store is in memory, at the path given, or in the state directory, which is made for nobody else to read."""
    assert isinstance(parse(f"[store]\npath = '{MEMORY}'").store.open({}), MemoryStore)
    given_path = parse(f"[store]\npath = '{tmp_path}/a.db'").store.open({})
    assert isinstance(given_path, SQLiteStore)
    assert given_path.path == tmp_path / "a.db"
    environ = {"XDG_STATE_HOME": str(tmp_path / "state")}
    default = parse("").store.open(environ)
    assert isinstance(default, SQLiteStore)
    assert (
        default.path == tmp_path / "state" / "stream-supervisor" / "streams.db" == default_store_path(environ)
    )
    assert default.path.parent.stat().st_mode & 0o777 == 0o700
    monkeypatch.setenv("HOME", str(tmp_path))
    assert default_store_path({"XDG_STATE_HOME": "relative"}).is_relative_to(tmp_path / ".local" / "state")
