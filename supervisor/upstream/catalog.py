"""Upstreams: the configured provider endpoints, and the credentials for them.

A `Credential` does not hold a secret; it says where one is. The secret is read when a request is built and lives in that
request only, so there is nothing in an upstream, in its `repr`, in a pickle or a record that could leak. Secrets are
also the reason for two refusals: a base URL with user information or a query, and a plain header whose name says that it
carries a credential.
"""

from __future__ import annotations

import ipaddress
import os
import re
import socket
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import attrs
import httpx
import msgspec

from supervisor.dialects import Call, Dialect
from supervisor.dialects.catalog import find
from supervisor.dialects.openai_chat import OPENAI_CHAT
from supervisor.dialects.prefill import PrefillForm, chat_continuation
from supervisor.errors import ConfigurationError
from supervisor.streams import Deadlines
from supervisor.upstream.proxy import Proxy
from supervisor.upstream.retry import RetryPolicy
from supervisor.upstream.source import HttpSource

if TYPE_CHECKING:
    from supervisor.upstream.attempt import Answered, Transport
    from supervisor.upstream.ladder import Breaker

__all__ = ["Credential", "Upstream", "discover", "leads_to"]

MAX_SECRET_BYTES = 16 << 10
MAX_HEADER_CHARS = 8 << 10
MAX_HEADERS = 64
MAX_UNPARSEABLE = 1_000_000

_DECODER = msgspec.json.Decoder(dict[str, Any])

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,254}")
_TOKEN = re.compile(r"[!#$%&'*+\-.^_`|~0-9A-Za-z]{1,128}")  # RFC 9110 section 5.6.2
_SECRET_HEADER = re.compile(
    r"(^|[-_])(authorization|auth|api[-_]?key|access[-_]?key|subscription[-_]?key|token|secret|password|cookie|credentials?)$",
    re.IGNORECASE,
)
_OURS = frozenset(
    {
        "accept", "accept-encoding", "connection", "content-encoding", "content-length", "content-type", "expect", "host",
        "keep-alive", "proxy-connection", "te", "trailer", "transfer-encoding", "upgrade",
    }
)  # fmt: skip

_KNOWN: tuple[tuple[str, str, str, str], ...] = (
    ("openai", "OPENAI_API_KEY", "https://api.openai.com/v1", "openai-chat"),
    ("openai-responses", "OPENAI_API_KEY", "https://api.openai.com/v1", "openai-responses"),
    ("anthropic", "ANTHROPIC_API_KEY", "https://api.anthropic.com/v1", "anthropic"),
    ("gemini", "GEMINI_API_KEY", "https://generativelanguage.googleapis.com/v1beta", "gemini"),
    ("cohere", "COHERE_API_KEY", "https://api.cohere.com/v2", "cohere"),
    ("openrouter", "OPENROUTER_API_KEY", "https://openrouter.ai/api/v1", "openai-chat"),
    ("groq", "GROQ_API_KEY", "https://api.groq.com/openai/v1", "openai-chat"),
    ("mistral", "MISTRAL_API_KEY", "https://api.mistral.ai/v1", "openai-chat"),
    ("deepseek", "DEEPSEEK_API_KEY", "https://api.deepseek.com/v1", "openai-chat"),
    ("xai", "XAI_API_KEY", "https://api.x.ai/v1", "openai-chat"),
    ("together", "TOGETHER_API_KEY", "https://api.together.xyz/v1", "openai-chat"),
    ("fireworks", "FIREWORKS_API_KEY", "https://api.fireworks.ai/inference/v1", "openai-chat"),
)
"""Name, variable of the key, base URL and dialect of the providers that are found by their key."""


# --- credentials -----------------------------------------------------------------------------------------------------


@attrs.frozen(kw_only=True)
class Credential:
    """Where the secret for an upstream is, and the header it goes into. Made by `from_env` or `from_file`."""

    kind: Literal["env", "file"]
    where: str
    """The variable's name, or the file's path."""
    header: str | None = None
    """`bearer` (`Authorization: Bearer …`), or the name of a header that takes the secret as it is; None: the dialect's."""

    def __attrs_post_init__(self) -> None:
        if self.kind not in ("env", "file"):
            raise ConfigurationError("credential.kind", self.kind, "'env' or 'file'")
        # What does not look like a variable's name may be the secret itself, put in the wrong place: never shown.
        if self.kind == "env" and not _VARIABLE.fullmatch(self.where):
            raise ConfigurationError("credential.env", "(not shown)", "the name of an environment variable")
        if self.kind == "file" and (not self.where or "\0" in self.where):
            raise ConfigurationError("credential.file", "(not shown)", "the path of a file")
        if self.header is not None and (not _TOKEN.fullmatch(self.header) or self.header.lower() in _OURS):
            raise ConfigurationError("credential.header", self.header, "'bearer' or the name of a header")

    def __str__(self) -> str:
        return f"{self.kind}:{self.where}"

    @classmethod
    def from_env(cls, name: str, *, header: str | None = None) -> Credential:
        """Take the secret from an environment variable, read at each use."""
        return cls(kind="env", where=name, header=header)

    @classmethod
    def from_file(cls, path: str | os.PathLike[str], *, header: str | None = None) -> Credential:
        """Take the secret from a file, read at each use; white space around it is dropped."""
        return cls(kind="file", where=os.fspath(path), header=header)

    def secret(self, environ: Mapping[str, str] | None = None) -> str:
        """Return the secret. Do not keep it.

        Raises ConfigurationError, naming the variable or file and never its content, if it is missing, or is not one
        word of ASCII.
        """
        value = (
            self._from_env(os.environ if environ is None else environ)
            if self.kind == "env"
            else self._from_file()
        )
        value = value.strip()
        if not value:
            raise ConfigurationError(f"credential {self}", "(empty)", "a secret")
        if not value.isascii() or not value.isprintable() or " " in value or len(value) > MAX_SECRET_BYTES:
            raise ConfigurationError(
                f"credential {self}",
                "(not shown)",
                f"one word of at most {MAX_SECRET_BYTES} ASCII characters",
            )
        return value

    def header_for(self, secret: str, *, default: str = "bearer") -> tuple[str, str]:
        """Return the name and value of the header that carries a secret."""
        header = self.header or default
        return ("Authorization", f"Bearer {secret}") if header.lower() == "bearer" else (header, secret)

    def _from_env(self, environ: Mapping[str, str]) -> str:
        try:
            return environ[self.where]
        except KeyError:
            raise ConfigurationError(f"credential {self}", "(not set)", "the variable to be set") from None

    def _from_file(self) -> str:
        try:
            with Path(self.where).open("rb") as file:
                return file.read(MAX_SECRET_BYTES + 64).decode("ascii", "replace")
        except OSError as exc:
            raise ConfigurationError(
                f"credential {self}", f"({exc.strerror or type(exc).__name__})", "a file that can be read"
            ) from None


# --- upstreams -------------------------------------------------------------------------------------------------------


def _as_dialect(value: str | Dialect) -> Dialect:
    return find(value) if isinstance(value, str) else value


def _as_headers(value: Mapping[str, str]) -> Mapping[str, str]:
    try:
        return dict(value)
    except (TypeError, ValueError):
        raise ConfigurationError("upstream.headers", type(value), "a mapping of names to values") from None


def _check_name(_: object, attribute: attrs.Attribute[Any], value: object) -> None:
    if not (isinstance(value, str) and _NAME.fullmatch(value)):
        raise ConfigurationError(f"upstream.{attribute.name}", value, f"a name matching {_NAME.pattern}")


def _check_base_url(instance: Upstream, attribute: attrs.Attribute[Any], value: object) -> None:
    field = f"upstream {instance.name}: {attribute.name}"
    expected = "an http:// or https:// URL with a host and without user information, query or fragment"
    hidden = "(not shown: it may hold a secret)"
    try:
        url = httpx.URL(value if isinstance(value, str) else "")
    except (httpx.InvalidURL, UnicodeError):
        raise ConfigurationError(field, hidden, expected) from None
    if url.userinfo or url.query or url.fragment or (isinstance(value, str) and {"?", "#", "@"} & set(value)):
        raise ConfigurationError(field, hidden, expected)
    if url.scheme not in ("http", "https") or not url.raw_host:
        raise ConfigurationError(field, value, expected)


def _check_dialect(instance: Upstream, _: attrs.Attribute[Any], value: Dialect) -> None:
    if value.framing == "none":
        raise ConfigurationError(
            f"upstream {instance.name}: dialect", value.name, "a dialect that is read from a response's body"
        )


def _check_path(instance: Upstream, _: attrs.Attribute[Any], value: str | None) -> None:
    field = f"upstream {instance.name}: path"
    if value is None:
        asking = instance.dialect.asking
        if asking.path is None and asking.first is None:
            raise ConfigurationError(
                field, value, f"a path, as the dialect {instance.dialect.name} has no default for it"
            )
    elif (
        not value.startswith("/") or not value.isascii() or not value.isprintable() or set(value) & set(" #?")
    ):
        raise ConfigurationError(field, value, "a path that begins with /, without query or fragment")


def _check_headers(instance: Upstream, _: attrs.Attribute[Any], value: Mapping[object, object]) -> None:
    field = f"upstream {instance.name}: headers"
    if len(value) > MAX_HEADERS:
        raise ConfigurationError(field, f"{len(value)} headers", f"at most {MAX_HEADERS}")
    for name, text in value.items():
        if not isinstance(name, str) or not _TOKEN.fullmatch(name):
            raise ConfigurationError(field, name, "names that are HTTP tokens")
        if name.lower() in _OURS:
            raise ConfigurationError(field, name, "headers other than those that the transport sets itself")
        credential = instance.credential
        if _SECRET_HEADER.search(name) or (
            credential is not None
            and name.lower() == (credential.header or instance.dialect.asking.key_header).lower()
        ):
            raise ConfigurationError(
                field, name, f"no header that carries a secret: use credential with header = {name!r}"
            )
        if not isinstance(text, str) or not text.isascii() or not (text.isprintable() or not text):
            raise ConfigurationError(f"{field}.{name}", "(not shown)", "printable ASCII, without line breaks")
        if len(text) > MAX_HEADER_CHARS:
            raise ConfigurationError(
                f"{field}.{name}", "(not shown)", f"at most {MAX_HEADER_CHARS} characters"
            )


def _check_proxy(instance: Upstream, _: attrs.Attribute[Any], value: str | None) -> None:
    if value not in (None, "direct"):
        field = f"upstream {instance.name}: proxy"
        if value.strip().lower() in {"direct", "none"}:  # else the name of a host
            raise ConfigurationError(field, value, "'direct', or the URL of a proxy")
        Proxy.parse(value, field=field)


def _instance_of(kind: type, *, optional: bool = False) -> Any:
    def check(instance: Upstream, attribute: attrs.Attribute[Any], value: object) -> None:
        if not (isinstance(value, kind) or (optional and value is None)):
            raise ConfigurationError(
                f"upstream {instance.name}: {attribute.name}", type(value), f"a {kind.__name__}"
            )

    return check


def _as_upstreams(value: Iterable[Upstream]) -> tuple[Upstream, ...]:
    return tuple(value)


def _as_models(value: Mapping[str, str]) -> Mapping[str, str]:
    try:
        return dict(value)
    except (TypeError, ValueError):
        raise ConfigurationError("upstream.models", type(value), "a mapping of names to names") from None


def _check_models(instance: Upstream, _: attrs.Attribute[Any], value: Mapping[object, object]) -> None:
    for ours, theirs in value.items():
        if not isinstance(ours, str) or not isinstance(theirs, str) or not theirs:
            raise ConfigurationError(
                f"upstream {instance.name}: models", {ours: theirs}, "names of models, each a string"
            )


def _check_fallback(instance: Upstream, _: attrs.Attribute[Any], value: tuple[object, ...]) -> None:
    field = f"upstream {instance.name}: fallback"
    names = [instance.name]
    for upstream in value:
        if not isinstance(upstream, Upstream):
            raise ConfigurationError(field, type(upstream), "upstreams")
        if upstream.dialect != instance.dialect:
            raise ConfigurationError(
                field,
                f"{upstream.name} ({upstream.dialect.name})",
                f"upstreams of the same dialect, {instance.dialect.name}: a stream is read in one",
            )
        if upstream.name in names:
            raise ConfigurationError(field, upstream.name, "other upstreams, each once")
        names.append(upstream.name)


def _check_prefill(instance: Upstream, _: attrs.Attribute[Any], value: str | None) -> None:
    if value is None:
        return
    field = f"upstream {instance.name}: prefill"
    if value not in get_args(PrefillForm):
        raise ConfigurationError(field, value, f"one of {', '.join(get_args(PrefillForm))}")
    if instance.dialect.name != "openai-chat":
        raise ConfigurationError(
            field, value, "nothing: only upstreams of the dialect openai-chat differ in it"
        )


def _check_count(instance: Upstream, attribute: attrs.Attribute[Any], value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= MAX_UNPARSEABLE:
        raise ConfigurationError(
            f"upstream {instance.name}: {attribute.name}",
            value,
            f"a whole number from 0 to {MAX_UNPARSEABLE}",
        )


def _as_object(request: Mapping[str, Any] | bytes) -> Mapping[str, Any]:
    return _DECODER.decode(request) if isinstance(request, bytes) else request


def _is_below(path: str, other: str) -> bool:
    """Whether a path is another's beginning, up to the end of one of its segments."""
    return other.startswith(path) and other[len(path) :][:1] in ("", "/", "?")


def _header_names(headers: Mapping[str, str]) -> str:
    return f"<{', '.join(headers)}>"


@attrs.frozen(kw_only=True)
class Upstream:
    """A configured provider endpoint. Raises ConfigurationError naming the field for a value it cannot have."""

    name: str = attrs.field(validator=_check_name)
    base_url: str = attrs.field(validator=_check_base_url)
    """Up to and with the version, as for the providers' SDKs: `https://api.openai.com/v1`."""
    dialect: Dialect = attrs.field(default=OPENAI_CHAT, converter=_as_dialect, validator=_check_dialect)
    """How its streams are read; a name stands for a built-in one."""
    path: str | None = attrs.field(default=None, validator=_check_path)
    """What follows `base_url`; None: the dialect's own, such as `/chat/completions`."""
    credential: Credential | None = attrs.field(
        default=None, validator=_instance_of(Credential, optional=True)
    )
    headers: Mapping[str, str] = attrs.field(
        factory=dict, converter=_as_headers, validator=_check_headers, repr=_header_names, hash=False
    )
    """Sent with each request. Not for secrets."""
    proxy: str | None = attrs.field(default=None, validator=_check_proxy, repr=False)
    """`http://[user:password@]host:port`, or `direct`; None: the transport's choice."""
    retry: RetryPolicy = attrs.field(factory=RetryPolicy, validator=_instance_of(RetryPolicy))
    deadlines: Deadlines | None = attrs.field(default=None, validator=_instance_of(Deadlines, optional=True))
    """What streams of this upstream get that ask for none; None: the supervisor's."""

    fallback: tuple[Upstream, ...] = attrs.field(
        default=(), converter=_as_upstreams, validator=_check_fallback
    )
    """Asked in turn when this one fails before the first event (after it, if the policy's `resume` names `restart`). Of the
    same dialect; their own fallbacks are not asked."""
    models: Mapping[str, str] = attrs.field(
        factory=dict, converter=_as_models, validator=_check_models, hash=False
    )
    """This upstream's names for models: a request's `model` that is a key here is sent as the value."""
    prefill: PrefillForm | None = attrs.field(default=None, validator=_check_prefill)
    """How an `openai-chat` server is told to go on from an assistant's text; None: it cannot be. Other dialects know."""

    max_unparseable: int = attrs.field(default=10, validator=_check_count)
    """How many events of an answer may be unreadable: they are skipped, counted and recorded. With one more the attempt has
    failed (`protocol`). 0: an answer is whole or it is none."""

    @property
    def url(self) -> str:
        """Where requests are posted; of a dialect whose path depends on the request, the base URL."""
        path = self.path if self.path is not None else self.dialect.asking.path
        return f"{self.base_url.rstrip('/')}{path or ''}"

    def secret(self) -> str:
        """Return the credential's secret, "" if there is no credential. Do not keep it. Raises ConfigurationError."""
        return "" if self.credential is None else self.credential.secret()

    def asked(self, request: Mapping[str, Any] | bytes) -> Mapping[str, Any]:
        """Return a request as the JSON object that this upstream is asked with, the model named as it names it."""
        asked = _as_object(request)
        model = asked.get("model")
        if isinstance(model, str) and model in self.models:
            return {**asked, "model": self.models[model]}
        return asked

    def first(self, request: Mapping[str, Any] | bytes) -> Call | bytes:
        """Return the call that starts an answer; bytes: a body to post to `url`. Raises ConfigurationError."""
        asking = self.dialect.asking
        if asking.first is not None:
            return asking.first(self.asked(request), self.path or asking.path or "")
        if isinstance(request, bytes) and not self.models:
            return request
        return msgspec.json.encode({**self.asked(request), "stream": True})

    def placed(self, call: Call) -> Call:
        """Return a later call about an answer, below this upstream's own path if that is not the dialect's."""
        usual = self.dialect.asking.path
        if self.path is None or not usual or _is_below(self.path, call.path):
            return call
        if not _is_below(usual, call.path):
            return call
        return attrs.evolve(call, path=self.path.rstrip("/") + call.path[len(usual) :])

    def continued(self, request: Mapping[str, Any] | bytes, text: str) -> Mapping[str, Any] | str:
        """Return the request that has the model go on after a text of its own, or the reason why there is none."""
        make = self.dialect.asking.continuation
        if make is None and self.prefill is not None:
            make = chat_continuation(self.prefill)
        if make is None:
            return f"{self.name} is not known to take the beginning of an answer"
        return make(self.asked(request), text)

    def source(
        self,
        request: Mapping[str, Any] | bytes,
        *,
        transport: Transport,
        retry: RetryPolicy | None = None,
        circuits: Callable[[str], Breaker | None] | None = None,
        first: Callable[[Upstream], Call] | None = None,
        answered: Callable[[Answered], None] | None = None,
    ) -> HttpSource:
        """Return the source for one request. Raises ConfigurationError for a bad request or a missing credential."""
        return HttpSource(
            self,
            request,
            transport=transport,
            retry=retry,
            circuits=circuits,
            first=first,
            answered=answered,
        )


def leads_to(upstream: Upstream, host: str, port: int) -> bool:
    """Say whether an upstream's base URL is the address of a listener on this machine, as far as that is told without asking for names."""
    url = httpx.URL(upstream.base_url)
    asked = url.port or (443 if url.scheme == "https" else 80)
    if asked != port or upstream.proxy not in (None, "direct"):
        return False
    return url.host == host.lower() or (_is_here(host) and _is_here(url.host))


def _is_here(host: str) -> bool:
    """Say whether a host is this machine's loopback, or all of its addresses."""
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return host.lower().rstrip(".") in {"localhost", socket.gethostname().lower()}
    return address.is_loopback or address.is_unspecified


def discover(environ: Mapping[str, str] | None = None) -> list[Upstream]:
    """Return the upstreams that the environment has a key for: `OPENAI_API_KEY` (with `OPENAI_BASE_URL`) and the like.

    The keys are looked at only for whether they are set; each is read from the process's environment when used. Raises
    ConfigurationError for an `OPENAI_BASE_URL` that is no URL.
    """
    environ = os.environ if environ is None else environ
    found = []
    for name, variable, base_url, dialect in _KNOWN:
        if not environ.get(variable, "").strip():
            continue
        own = environ.get("OPENAI_BASE_URL", "").strip() if variable == "OPENAI_API_KEY" else ""
        credential = Credential.from_env(variable)
        found.append(
            Upstream(name=name, base_url=own or base_url, dialect=find(dialect), credential=credential)
        )
    return found
