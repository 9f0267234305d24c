"""What a daemon is told: one TOML file, every key of which has a default.

A configuration is a tree of attrs classes, one a table, and the tables are the classes that the rest of the package takes
its options from (`Limits`, `Deadlines`, `MemoryPolicy`, `RetryPolicy`): a key is documented, defaulted and validated where it
is used, and once. This file only reads: it takes a table's keys from the fields of its class, converts strictly by their
types, and turns whatever is wrong into a `ConfigurationError` that names the file, the table, the key, the value and what
would be right. A key that nobody knows is an error, for a misspelt limit is a limit that is not there.

TOML has no null, so a limit that can be turned off is turned off with `"none"`.

Secrets are never values here: a credential or token is the name of an environment variable or of a file. A key or header
that looks like the secret itself is refused without showing its value.
"""

from __future__ import annotations

import difflib
import importlib.util
import os
import re
import tomllib
import types
import typing
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args, get_origin

import attrs
import msgspec

from supervisor.control.auth import Access, Token, require_safe_address
from supervisor.control.server import ControlLimits
from supervisor.errors import ConfigurationError
from supervisor.stores import MemoryStore, Retention
from supervisor.stores.base import Store
from supervisor.stores.sqlite import SQLiteStore, Synchronous
from supervisor.streams import Deadlines, Limits, MemoryPolicy
from supervisor.upstream.catalog import Credential, Upstream, discover, leads_to
from supervisor.upstream.circuit import CircuitPolicy
from supervisor.upstream.retry import RetryPolicy
from supervisor.web.config import WebConfig
from supervisor.web.gateway.config import GatewayConfig

__all__ = [
    "DEFAULT_PORT",
    "MEMORY",
    "Config",
    "ControlConfig",
    "LogConfig",
    "RetentionConfig",
    "ShutdownConfig",
    "StoreConfig",
    "TelemetryConfig",
    "TokenSource",
    "WebConfig",
    "default_store_path",
    "described",
    "load",
    "parse",
    "table_of",
]

DEFAULT_PORT = 7433
MEMORY = ":memory:"
"""The store's `path` that keeps everything in memory, for as long as the daemon runs."""

LogFormat = Literal["console", "json"]
LogLevel = Literal["debug", "info", "warning", "error"]

_T = TypeVar("_T")
_MAX_FILE_BYTES = 1 << 20
_UPSTREAM_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_MAY_BE_SECRET = re.compile(r"key|token|secret|password|credential|authorization|cookie|proxy", re.IGNORECASE)
_NO_SECRET = re.compile(r"_(header|file)$")
_SECRET_KEY = re.compile(
    r"(^|[-_])(key|token|secret|password|credential|authorization|cookie)s?$", re.IGNORECASE
)


@attrs.frozen
class _Hidden:
    """Stands for a value that is not shown: it may be, or hold, a secret."""

    called: str = "(hidden)"

    def __repr__(self) -> str:
        return self.called


# --- the tables ------------------------------------------------------------------------------------------------------


def _port(_instance: object, attribute: attrs.Attribute[Any], value: int) -> None:
    if not 0 <= value <= 65535:
        raise ConfigurationError(attribute.name, value, "a port: 0 (any free one) to 65535")


def _not_negative(_instance: object, attribute: attrs.Attribute[Any], value: float) -> None:
    if not 0 <= value < float("inf"):
        raise ConfigurationError(attribute.name, value, "0 or more")


def _positive(_instance: object, attribute: attrs.Attribute[Any], value: float | None) -> None:
    if value is not None and not 0 < value < float("inf"):
        raise ConfigurationError(attribute.name, value, "a number above 0")


def _whole(_instance: object, attribute: attrs.Attribute[Any], value: int | None) -> None:
    if value is not None and value < 1:
        raise ConfigurationError(attribute.name, value, "a whole number of at least 1")


@attrs.frozen(kw_only=True)
class TokenSource:
    """Where the bearer token of the control channel is kept: at most one of a file and an environment variable."""

    file: Path | None = None
    env: str | None = None

    def read(self, environ: Mapping[str, str]) -> str | None:
        """Return the token, or None if none is configured. Raises ConfigurationError; never shows the token."""
        if self.file is not None:
            try:
                text = self.file.read_text("ascii")
            except (OSError, UnicodeError) as error:
                raise ConfigurationError(
                    "token_file",
                    str(self.file),
                    f"a readable file that holds the token alone ({_why(error)})",
                ) from None
            return _checked(text, "token_file", str(self.file), "a file")
        if self.env is not None:
            if not environ.get(self.env):
                raise ConfigurationError("token_env", self.env, "an environment variable that is set")
            return _checked(environ[self.env], "token_env", self.env, "a variable")
        return None


def _checked(text: str, key: str, where: str, what: str) -> str:
    token = text.strip()
    try:
        Token(token)
    except ConfigurationError as error:
        found = "it holds something else" if token else "it is empty"
        raise ConfigurationError(
            key, where, f"{what} that holds the token alone, {error.expected} ({found})"
        ) from None
    return token


@attrs.frozen(kw_only=True)
class ControlConfig:
    """`[control]`: where clients connect, and who may."""

    host: str = "127.0.0.1"
    """The address to listen on. Beyond loopback only with a token."""
    port: int = attrs.field(default=DEFAULT_PORT, validator=_port)
    """0: any free port; the ready line says which."""
    token_file: Path | None = None
    """A file that holds the bearer token alone."""
    token_env: str | None = None
    """The environment variable that holds it."""
    origins: tuple[str, ...] = ()
    """Web origins whose pages may connect, such as `https://example.org`."""
    limits: ControlLimits = attrs.field(factory=ControlLimits)
    """`[control.limits]`, with `[control.limits.link]` and `[control.limits.session]`: what bounds clients."""

    def __attrs_post_init__(self) -> None:
        if self.token_file is not None and self.token_env is not None:
            raise ConfigurationError("token_env", self.token_env, "only one of token_file and token_env")
        Access(origins=self.origins)  # raises for what is no origin

    @property
    def token(self) -> TokenSource:
        """Where the token is kept."""
        return TokenSource(file=self.token_file, env=self.token_env)


@attrs.frozen(kw_only=True)
class StoreConfig:
    """`[store]`: where journals are kept."""

    path: str | None = None
    """A SQLite file, or `:memory:`. The default is `streams.db` in the state directory (see `default_store_path`)."""
    synchronous: Synchronous = "NORMAL"
    """What a commit waits for; see `supervisor.stores.sqlite`."""
    commit_interval_s: float = attrs.field(default=0.02, validator=_not_negative)
    commit_bytes: int = attrs.field(default=256 << 10, validator=_whole)
    high_water_bytes: int = attrs.field(default=64 << 20, validator=_whole)
    patience_s: float = attrs.field(default=30.0, validator=_positive)
    busy_timeout_s: float = attrs.field(default=5.0, validator=_not_negative)

    def __attrs_post_init__(self) -> None:
        if self.path == "":
            raise ConfigurationError("path", self.path, f"the path of a file, or {MEMORY!r}")

    def located(self, environ: Mapping[str, str]) -> str:
        """Return the path, with its default."""
        if self.path is None:
            return str(default_store_path(environ))
        return self.path if self.path == MEMORY else str(Path(self.path).expanduser())

    def open(self, environ: Mapping[str, str]) -> Store:
        """Return the store, not yet running; makes the default's directory (mode 0700) if it is missing."""
        path = self.located(environ)
        if path == MEMORY:
            return MemoryStore()
        if self.path is None:
            try:
                Path(path).parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            except OSError as error:
                raise ConfigurationError(
                    "store.path", path, f"a place that can be written ({_why(error)})"
                ) from None
        return SQLiteStore(
            path,
            synchronous=self.synchronous,
            commit_interval_s=self.commit_interval_s,
            commit_bytes=self.commit_bytes,
            high_water_bytes=self.high_water_bytes,
            patience_s=self.patience_s,
            busy_timeout_s=self.busy_timeout_s,
        )


@attrs.frozen(kw_only=True)
class RetentionConfig(Retention):
    """`[retention]`: how long the store keeps ended streams."""

    max_ended: int | None = attrs.field(default=100_000, validator=_whole)
    """The last so many to end are kept."""
    max_age_s: float | None = attrs.field(default=30 * 86_400.0, validator=_positive)
    """Those that ended longer ago are removed."""
    max_bytes: int | None = attrs.field(default=10 << 30, validator=_whole)
    """Together they take at most this in the store; those that ended first make room."""
    sweep_every_s: float = attrs.field(default=60.0, validator=_positive)
    """How often the store is looked through."""


@attrs.frozen(kw_only=True)
class ShutdownConfig:
    """`[shutdown]`: how the daemon ends."""

    grace_s: float = attrs.field(default=30.0, validator=_not_negative)
    """How long live streams may go on after SIGTERM or a first SIGINT before they are cancelled."""


@attrs.frozen(kw_only=True)
class LogConfig:
    """`[log]`: what is logged, how and where."""

    level: LogLevel = "info"
    format: LogFormat = "console"
    """`console`: a line for people; `json`: one JSON object a line."""
    file: Path | None = None
    """The default is standard error. SIGHUP reopens a file, so that it can be rotated."""


@attrs.frozen(kw_only=True)
class TelemetryConfig:
    """`[telemetry]`: what is sent to others. Metrics are not: they are fetched, from `/metrics`."""

    spans: Literal["otlp"] | None = None
    """`otlp`: an OpenTelemetry span for each stream and attempt, sent over HTTP to where the environment says
    (`OTEL_EXPORTER_OTLP_ENDPOINT`, …). Needs the extra `stream-supervisor[otel]`."""

    def check(self) -> None:
        """Raise ConfigurationError where the extra is wanted and not there."""
        if self.spans is not None and not _is_installed("opentelemetry.exporter.otlp.proto.http"):
            expected = "one for which the extra is installed: pip install stream-supervisor[otel]"
            raise ConfigurationError("spans", self.spans, expected)


@attrs.frozen(kw_only=True)
class Config:
    """Everything a daemon is told. `Config()` is a daemon that runs with no file at all."""

    control: ControlConfig = attrs.field(factory=ControlConfig)
    web: WebConfig = attrs.field(factory=WebConfig)
    gateway: GatewayConfig = attrs.field(factory=GatewayConfig)
    store: StoreConfig = attrs.field(factory=StoreConfig)
    retention: RetentionConfig = attrs.field(factory=RetentionConfig)
    shutdown: ShutdownConfig = attrs.field(factory=ShutdownConfig)
    log: LogConfig = attrs.field(factory=LogConfig)
    telemetry: TelemetryConfig = attrs.field(factory=TelemetryConfig)
    limits: Limits = attrs.field(factory=Limits)
    memory: MemoryPolicy = attrs.field(factory=MemoryPolicy)
    deadlines: Deadlines = attrs.field(factory=Deadlines)
    retry: RetryPolicy = attrs.field(factory=RetryPolicy)
    circuit: CircuitPolicy = attrs.field(factory=CircuitPolicy)
    discover: bool = True
    """Whether upstreams are also found by `OPENAI_API_KEY` and the like; those of the file win over them."""
    upstreams: tuple[Upstream, ...] = ()
    source: str = "the defaults"
    """Where it was read from."""

    def all_upstreams(self, environ: Mapping[str, str]) -> dict[str, Upstream]:
        """Return the upstreams by name, with those that the environment offers."""
        return self._found(environ, here=False) | {up.name: up for up in self.upstreams}

    def _found(self, environ: Mapping[str, str], *, here: bool) -> dict[str, Upstream]:
        """Return what the environment offers beside the file; `here`: only what is this very daemon, else only what is not."""
        found = discover(environ) if self.discover else []
        return {up.name: attrs.evolve(up, retry=self.retry) for up in found if self._leads_here(up) is here}

    def _leads_here(self, upstream: Upstream) -> bool:
        """Say whether an upstream is the daemon itself, so that a request for it would go in a circle."""
        listening = ((self.control.host, self.control.port), (self.web.host, self.web.port))
        return any(leads_to(upstream, host, port) for host, port in listening if port)

    def _check_upstream(self, upstream: Upstream) -> None:
        if self._leads_here(upstream):
            told = f"{upstream.base_url!r} is this daemon's own address"
            raise ConfigurationError("base_url", upstream.base_url, "the provider's", told=told)

    def warnings(self, environ: Mapping[str, str]) -> list[str]:
        """Return what a daemon starts with all the same, but hardly as it was meant."""
        told = []
        if here := self._found(environ, here=True):
            url = next(iter(here.values())).base_url
            told.append(
                f"OPENAI_BASE_URL ({url}) is this daemon's own address, so that no upstream is made of it ({', '.join(here)}): "
                "it is for the shell of a client, not for that of `serve`"
            )
        for name, upstream in sorted(self.all_upstreams(environ).items()):
            if upstream.credential is not None:
                try:
                    upstream.credential.secret(environ)
                except ConfigurationError as error:
                    told.append(f"upstream {name}: {error}")
        return told

    async def check(self, environ: Mapping[str, str], more: Collection[str] = ()) -> None:
        """Raise ConfigurationError, naming the file and the table, for what a daemon would refuse when it starts to listen.

        more: names of upstreams that it will have beside those of the file and the environment.
        """
        where = _Where(self.source, ("telemetry",))
        try:
            self.telemetry.check()
            where = _Where(self.source, ("control",))
            read = self.control.token.read(environ)
            token = None if read is None else Token(read)
            await require_safe_address(self.control.host, token)
            for upstream in self.upstreams:
                where = _Where(self.source, ("upstreams", upstream.name))
                self._check_upstream(upstream)
            if self.web.port is not None:
                where = _Where(self.source, ("web",))
                await require_safe_address(self.web.host, token)
                where = _Where(self.source, ("gateway",))
                self.gateway.check({*self.all_upstreams(environ), *more}, environ)
        except ConfigurationError as error:
            field = where.field(error.field)
            raise ConfigurationError(field, error.value, error.expected, told=error.told) from None


def _is_installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:
        return False


def default_store_path(environ: Mapping[str, str]) -> Path:
    """Return where the store is by default: `$XDG_STATE_HOME/stream-supervisor/streams.db`, or under `~/.local/state`."""
    state = environ.get("XDG_STATE_HOME", "")
    # https://specifications.freedesktop.org/basedir-spec: a relative path is invalid and ignored
    base = Path(state) if state.startswith("/") else Path.home() / ".local" / "state"
    return base / "stream-supervisor" / "streams.db"


# --- reading ---------------------------------------------------------------------------------------------------------


def load(path: str | os.PathLike[str]) -> Config:
    """Read a configuration file. Raises ConfigurationError, which names the file."""
    name = os.fspath(path)
    try:
        with Path(path).open("rb") as file:
            data = file.read(_MAX_FILE_BYTES + 1)
    except OSError as error:
        raise ConfigurationError("config", name, f"a TOML file that can be read ({_why(error)})") from None
    if len(data) > _MAX_FILE_BYTES:
        raise ConfigurationError("config", name, f"a file of at most {_MAX_FILE_BYTES} bytes")
    try:
        text = data.decode()
    except UnicodeDecodeError as error:
        raise ConfigurationError(
            "config", name, f"a TOML file in UTF-8 (byte {error.start} is not)"
        ) from None
    return parse(text, source=name)


def parse(text: str, *, source: str = "configuration") -> Config:
    """Read a configuration from TOML. `source` names it in errors. Raises ConfigurationError."""
    try:
        document = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ConfigurationError(source, _Hidden("the file"), f"TOML: {error}") from None
    except RecursionError:
        raise ConfigurationError(source, _Hidden("the file"), "TOML that is nested less deeply") from None
    top = _Where(source, ())
    tables: dict[str, Any] = {}
    hints = typing.get_type_hints(Config)
    known = [field.name for field in attrs.fields(Config) if field.name != "source"]
    for key, value in document.items():
        if key not in known:
            raise top.unknown(key, known)
        if key != "upstreams":
            tables[key] = _converted(value, hints[key], top, key)
    defaults = Config(**tables)
    upstreams = _upstreams(document.get("upstreams", {}), top.table("upstreams"), defaults)
    return attrs.evolve(defaults, upstreams=upstreams, source=source)


@attrs.frozen
class _Where:
    """A table of a file, to be named in errors."""

    source: str
    path: tuple[str, ...]

    def table(self, key: str) -> _Where:
        return _Where(self.source, (*self.path, key))

    def field(self, key: str) -> str:
        table = f" [{'.'.join(self.path)}]" if self.path else ""
        return f"{self.source}:{table} {key}"

    def error(self, key: str, value: object, expected: str) -> ConfigurationError:
        hidden = bool(_MAY_BE_SECRET.search(key)) and not _NO_SECRET.search(key)
        hidden = hidden and not isinstance(value, bool | int | float | None)
        return ConfigurationError(self.field(key), _Hidden() if hidden else value, expected)

    def refused(self, error: ConfigurationError) -> ConfigurationError:
        """Return an error of a table's class as one of this file; the class names the field in its own way."""
        key = error.field.rpartition(": ")[2]
        first, dot, rest = key.partition(".")
        if dot and (first == self.path[-1] or first[0].isupper()):  # the table's own name, or its class's
            key = rest
        expected = re.sub(r"\bNone\b", '"none"', error.expected)  # as TOML has it
        return self.error(_FIELD_KEYS.get(key, key), error.value, expected)

    def unknown(self, key: str, known: Sequence[str], *, hint: str = "") -> ConfigurationError:
        near = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
        meant = f"{near[0]!r} (the nearest key here), or another of: " if near else "one of: "
        return ConfigurationError(
            self.field("key").rstrip(), key, hint or f"{meant}{', '.join(sorted(known))}"
        )


def _read(cls: type[_T], value: object, where: _Where, **extra: Any) -> _T:
    """Read one table into its class."""
    if not isinstance(value, dict):
        raise ConfigurationError(
            f"{where.source}: {'.'.join(where.path)}", value, f"a table, [{'.'.join(where.path)}]"
        )
    hints = typing.get_type_hints(cls)
    known = [field.name for field in attrs.fields(cls) if field.init]  # type: ignore[arg-type]  # every table is attrs
    options: dict[str, Any] = {}
    for key, given in value.items():
        if key not in known:
            raise where.unknown(key, known)
        options[key] = _converted(given, hints[key], where, key)
    for field in attrs.fields(cls):  # type: ignore[arg-type]  # as above
        if field.default is attrs.NOTHING and field.name not in {*options, *extra}:
            raise where.error(field.name, None, f"{described(hints[field.name])}: it cannot be left out")
    try:
        return cls(**options, **extra)
    except ConfigurationError as error:
        raise where.refused(error) from None


def _converted(value: object, hint: Any, where: _Where, key: str) -> Any:
    """Convert a TOML value to the type of a field, strictly: no numbers from strings, no truth from numbers."""
    optional = type(None) in get_args(hint) and get_origin(hint) in {typing.Union, types.UnionType}
    if optional:
        if value == "none":
            return None
        (hint,) = (arg for arg in get_args(hint) if arg is not type(None))
    if attrs.has(hint):
        return _read(hint, value, where.table(key))
    if (table := table_of(hint)) is not None:
        if not isinstance(value, list):
            raise where.error(key, value, f"tables, [[{'.'.join((*where.path, key))}]]")
        return tuple(_read(table, one, where.table(f"{key}[{at}]")) for at, one in enumerate(value))
    if get_origin(hint) is Mapping and attrs.has(get_args(hint)[1]):
        if not isinstance(value, dict):
            raise where.error(key, value, f"tables, [{'.'.join(where.path)}.{key}.NAME]")
        return {
            name: _read(get_args(hint)[1], table, where.table(key).table(name))
            for name, table in value.items()
        }
    expected = described(hint) + (' or "none"' if optional else "")
    if hint is Path:
        if not isinstance(value, str) or not value:
            raise where.error(key, value, expected)
        return Path(value).expanduser()
    try:
        return msgspec.convert(value, hint)
    except msgspec.ValidationError:
        raise where.error(key, value, expected) from None


def table_of(hint: Any) -> type | None:
    """Return the class of an array of tables; None for any other hint."""
    inner = next(iter(get_args(hint)), None) if get_origin(hint) is tuple else None
    return inner if isinstance(inner, type) and attrs.has(inner) else None


def described(hint: Any) -> str:
    """Say what a field of this type takes, as errors and docs/configuration.md do."""
    if get_origin(hint) is Literal:
        return f"one of {', '.join(map(repr, get_args(hint)))}"
    if get_origin(hint) is Mapping:
        return "a table of strings"
    if get_origin(hint) in {tuple, frozenset}:
        return "an array of strings" if get_args(hint)[0] is str else "an array of whole numbers"
    words = {
        int: "a whole number",
        float: "a number",
        str: "a string",
        bool: "true or false",
        Path: "the path of a file",
    }
    return words.get(hint, str(hint))


# --- upstreams -------------------------------------------------------------------------------------------------------

_FIELD_KEYS = {
    "credential.env": "api_key_env",
    "credential.file": "api_key_file",
    "credential.header": "api_key_header",
}
"""Fields of classes that have another name in the file."""

_UPSTREAM_KEYS = {
    "dialect": str,
    "base_url": str,
    "path": str,
    "api_key_env": str,
    "api_key_file": Path,
    "api_key_header": str,
    "proxy": str,
    "headers": dict,
    "models": dict,
    "prefill": str,
    "fallback": tuple[str, ...],
    "max_unparseable": int,
    "deadlines": Deadlines,
    "retry": RetryPolicy,
}


def _upstreams(value: object, where: _Where, defaults: Config) -> tuple[Upstream, ...]:
    if not isinstance(value, dict):
        raise ConfigurationError(f"{where.source}: upstreams", value, "tables, [upstreams.NAME]")
    made: dict[str, Upstream] = {}
    fallbacks: dict[str, tuple[str, ...]] = {}
    for name, table in value.items():
        made[name], fallbacks[name] = _upstream(name, table, where.table(name), defaults)
    return tuple(
        _with_fallback(upstream, fallbacks[name], made, where.table(name)) for name, upstream in made.items()
    )


def _with_fallback(
    upstream: Upstream, names: tuple[str, ...], made: Mapping[str, Upstream], where: _Where
) -> Upstream:
    for name in names:
        if name not in made:
            known = ", ".join(sorted(made.keys() - {upstream.name})) or "there is no other"
            raise where.error("fallback", name, f"upstreams of this file: {known}")
    try:
        return attrs.evolve(upstream, fallback=[made[name] for name in names])
    except ConfigurationError as error:
        raise where.refused(error) from None


def _upstream(name: str, value: object, where: _Where, defaults: Config) -> tuple[Upstream, tuple[str, ...]]:
    if not _UPSTREAM_NAME.fullmatch(name):
        raise ConfigurationError(
            f"{where.source}: [upstreams]", name, "a name of 1 to 64 letters, digits, '.', '_' and '-'"
        )
    if not isinstance(value, dict):
        raise ConfigurationError(
            f"{where.source}: upstreams.{name}", _Hidden(), f"a table, [upstreams.{name}]"
        )
    options: dict[str, Any] = {}
    for key, given in value.items():
        if key not in _UPSTREAM_KEYS:
            advice = "api_key_env (the name of an environment variable) or api_key_file: a secret is not written here"
            raise where.unknown(key, list(_UPSTREAM_KEYS), hint=advice if _SECRET_KEY.search(key) else "")
        if key in {"headers", "models"}:
            options[key] = _strings(given, where, key)
        elif key == "deadlines":
            options[key] = _merged(defaults.deadlines, given, where.table(key))
        elif key == "retry":
            options[key] = _merged(defaults.retry, given, where.table(key))
        else:
            options[key] = _converted(given, _UPSTREAM_KEYS[key], where, key)
    if "base_url" not in options:
        raise where.error("base_url", None, "the provider's base URL, such as 'https://api.openai.com/v1'")
    options.setdefault("retry", defaults.retry)
    env, file = options.pop("api_key_env", None), options.pop("api_key_file", None)
    header = options.pop("api_key_header", None)
    if env is not None and file is not None:
        raise where.error("api_key_file", str(file), "only one of api_key_env and api_key_file")
    if header is not None and env is None and file is None:
        raise where.error("api_key_header", header, "api_key_env or api_key_file beside it")
    try:
        if env is not None:
            options["credential"] = Credential.from_env(env, header=header)
        elif file is not None:
            options["credential"] = Credential.from_file(file, header=header)
        fallback = options.pop("fallback", ())
        upstream = Upstream(name=name, **options)
    except ConfigurationError as error:
        raise where.refused(error) from None
    if upstream.path is None and upstream.dialect.asking.path is None:
        raise where.error(
            "path", None, f"a path, as the dialect {upstream.dialect.name} has no default for it"
        )
    return upstream, fallback


def _merged(default: _T, value: object, where: _Where) -> _T:
    """Read a table whose keys that are not given are those of `default`."""
    given = _read(type(default), value, where)
    assert isinstance(value, dict), "_read has checked it"
    return attrs.evolve(default, **{key: getattr(given, key) for key in value})  # type: ignore[misc]  # every table is attrs


def _strings(value: object, where: _Where, key: str) -> dict[str, str]:
    def shown(given: object) -> object:
        return _Hidden() if key == "headers" and not isinstance(given, bool | int | float) else given

    if not isinstance(value, dict):
        raise ConfigurationError(where.field(key), shown(value), "a table of strings")
    for name, text in value.items():
        if not isinstance(text, str):
            raise ConfigurationError(where.table(key).field(name), shown(text), "a string")
    return dict(value)


def _why(error: Exception) -> str:
    return error.strerror or str(error) if isinstance(error, OSError) else "it is not text"
