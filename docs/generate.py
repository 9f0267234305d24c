"""Writes what the documentation says of options, limits, exit codes and the control channel, from the code that decides it.

    python docs/generate.py            # writes README.md, docs/limits.md, and the tables of the other pages anew
    python docs/generate.py --check    # exits with 1 if a table is stale

The control session in the README is a real one: this script runs the daemon and a simulated upstream, and writes down what
went over the wire. It differs in ids and times whenever it is written, so `--check` (and the test) compare its shape.
"""

from __future__ import annotations

import argparse
import ast
import inspect
import json
import re
import sys
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import attrs
import trio
import trio_websocket

from supervisor import daemon, streams
from supervisor.cli.exits import EXIT_TABLE
from supervisor.config import Config, RetentionConfig, ShutdownConfig, described, parse, table_of
from supervisor.control import SUBPROTOCOL, ClientLimits, ControlLimits, LinkLimits, SessionLimits
from supervisor.dialects import BUILTIN, PRESETS, Dialect, FaultKind, faults
from supervisor.dialects.reading import BodyReader
from supervisor.observe import figures, timeline, tracing
from supervisor.stores import Keep, MemoryStore
from supervisor.stores.sqlite import SQLiteStore
from supervisor.streams import spec
from supervisor.streams.supervisor import MAX_DIALECTS
from supervisor.testing.upstream import SimulatedUpstream
from supervisor.upstream import (
    CircuitPolicy,
    Circuits,
    RetryPolicy,
    StreamTransport,
    attempt,
    dial,
    names,
    source,
    tls,
    transport,
)
from supervisor.web import metrics
from supervisor.web.gateway import GatewayConfig, service
from supervisor.web.server import WebLimits

ROOT = Path(__file__).resolve().parent.parent
README = ROOT / "README.md"
LIMITS = ROOT / "docs" / "limits.md"
CONFIGURATION = ROOT / "docs" / "configuration.md"
DIALECTS = ROOT / "docs" / "dialects.md"

# --- limits ----------------------------------------------------------------------------------------------------------


@attrs.frozen
class Limit:
    """One row: where it is set, what it is by default, and what it says."""

    owner: str
    name: str
    default: object
    told: str


CLASSES: Sequence[tuple[type, str, str]] = (
    (streams.Deadlines, "[deadlines]", "Clocks of a stream; `none` (in Python `None`) turns one off"),
    (streams.OnDetach, "on_detach of a start", "What happens when nobody reads"),
    (streams.Limits, "[limits]", "A supervisor and each of its streams"),
    (streams.MemoryPolicy, "[memory]", "What the memory manager does, and when; `none` turns a rule off"),
    (streams.MemoryGroup, "[[memory.groups]]", "Limits of a tenant, or of streams with certain labels"),
    (RetryPolicy, "[retry]", "Attempts, and what may be done once an answer has begun"),
    (CircuitPolicy, "[circuit]", "When an upstream that fails is left alone"),
    (ControlLimits, "[control.limits]", "The control channel"),
    (LinkLimits, "[control.limits.link]", "One connection of the control channel, at either end"),
    (SessionLimits, "[control.limits.session]", "One client of the control channel"),
    (WebLimits, "[web.limits]", "The HTTP front"),
    (GatewayConfig, "[gateway]", "The gateway"),
    (ClientLimits, "supervisor.control.connect(limits=…)", "The client library"),
    (
        RetentionConfig,
        "[retention]",
        "What the daemon's store keeps; a program's own: `supervisor.stores.Retention`",
    ),
    (Keep, "[retention.tenant] and [retention.tenants.NAME]", "What it keeps of each tenant"),
    (ShutdownConfig, "[shutdown]", "How the daemon ends"),
)
"""Options that are attrs classes: their fields document themselves."""

CALLABLES: Sequence[tuple[Any, str, str, dict[str, str]]] = (
    (
        SQLiteStore,
        "[store]",
        "A store in a file",
        {
            "synchronous": "What a commit waits for: OFF, NORMAL, FULL or EXTRA.",
            "commit_interval_s": "How long records are gathered before a commit.",
            "commit_bytes": "How many bytes are gathered before a commit.",
            "high_water_bytes": "Queued bytes from which sources are held back.",
            "low_water_bytes": "Queued bytes below which they go on; None: half of `high_water_bytes`.",
            "patience_s": "How long nothing may be written before whoever waits is told.",
            "busy_timeout_s": "How long one attempt waits for another program's lock on the file.",
        },
    ),
    (
        MemoryStore,
        "MemoryStore(…)",
        "A store in memory",
        {
            "max_streams": "Ended streams kept.",
            "max_bytes": "Bytes kept in all; the oldest history goes first.",
        },
    ),
    (
        StreamTransport,
        "StreamTransport(…)",
        "Connections to upstreams",
        {
            "max_head_bytes": "A response's head.",
            "max_idle_connections": "Connections kept for reuse.",
            "idle_s": "How long each is kept.",
            "names_s": "How long the addresses of a name are used before it is asked for again.",
            "drain_s": "How long the end of a body may be waited for, to reuse the connection.",
            "read_bytes": "What one read of a socket returns at most.",
        },
    ),
    (
        Circuits,
        "Circuits(…)",
        "The circuits of upstreams",
        {"max_circuits": "Upstreams; the one that was not asked for longest goes."},
    ),
    (
        BodyReader,
        "BodyReader(…)",
        "Reading one response body",
        {
            "max_unparseable": "Events that may be unreadable before the stream is `failed(protocol)`.",
            "max_line_bytes": "One line of an event stream.",
            "max_event_bytes": "One event of an event stream.",
        },
    ),
)
"""Options that are parameters."""

CONSTANTS: Sequence[tuple[str, str, object]] = (
    ("supervisor.streams.spec.MAX_KEY_CHARS", "Characters of a key.", spec.MAX_KEY_CHARS),
    ("supervisor.streams.spec.MAX_LABELS", "Labels of a stream.", spec.MAX_LABELS),
    (
        "supervisor.streams.spec.MAX_LABEL_CHARS",
        "Characters of a label's name or value.",
        spec.MAX_LABEL_CHARS,
    ),
    ("supervisor.streams.spec.MAX_META_BYTES", "The `meta` of a stream, as JSON.", spec.MAX_META_BYTES),
    (
        "supervisor.streams.supervisor.MAX_DIALECTS",
        "Dialects remembered that sources brought, beside those built in and given to the supervisor.",
        MAX_DIALECTS,
    ),
    (
        "supervisor.observe.figures.MAX_VALUES",
        "Values of one label of a metric that keep their names.",
        figures.MAX_VALUES,
    ),
    (
        "supervisor.observe.figures.MAX_CHILDREN",
        "Combinations of labels of one metric.",
        figures.MAX_CHILDREN,
    ),
    (
        "supervisor.observe.tracing.MAX_END_EVENTS",
        "Events that a trace reads from either end of a journal.",
        tracing.MAX_END_EVENTS,
    ),
    ("supervisor.observe.tracing.MAX_END_BYTES", "And bytes.", tracing.MAX_END_BYTES),
    (
        "supervisor.observe.timeline.MAX_ENDS",
        "Attempts that a trace tells from either end.",
        timeline.MAX_ENDS,
    ),
    (
        "supervisor.observe.timeline.MAX_STALLS",
        "Stalls that it tells, the longest.",
        timeline.MAX_STALLS,
    ),
    ("supervisor.observe.timeline.MAX_MARKS", "Notes and the like that it tells.", timeline.MAX_MARKS),
    ("supervisor.observe.timeline.MAX_STEPS", "Steps of its timeline.", timeline.MAX_STEPS),
    (
        "supervisor.web.metrics.MAX_TRACES",
        "Traces made for HTTP at a time; the others wait.",
        metrics.MAX_TRACES,
    ),
    ("supervisor.upstream.source.MAX_REQUEST_BYTES", "A request's body.", source.MAX_REQUEST_BYTES),
    (
        "supervisor.upstream.attempt.ERROR_BODY_BYTES",
        "Read of an HTTP error's body.",
        attempt.ERROR_BODY_BYTES,
    ),
    ("supervisor.upstream.attempt.ERROR_BODY_S", "How long it is waited for.", attempt.ERROR_BODY_S),
    (
        "supervisor.upstream.attempt.MAX_REDIRECTS",
        "Redirects that one attempt follows.",
        attempt.MAX_REDIRECTS,
    ),
    (
        "supervisor.upstream.transport.RACE_S",
        "How long after a request on a reused connection its silent end counts as the server's idle timeout.",
        transport.RACE_S,
    ),
    (
        "supervisor.web.gateway.service.MODELS_S",
        "How long an upstream's list of models is waited for.",
        service.MODELS_S,
    ),
    ("supervisor.web.gateway.service.MODELS_BYTES", "Read of it.", service.MODELS_BYTES),
    (
        "supervisor.web.gateway.service.ASK_S",
        "How long the answer to a request about a response of OpenAI is waited for.",
        service.ASK_S,
    ),
    ("supervisor.web.gateway.service.RESPONSE_BYTES", "Read of it.", service.RESPONSE_BYTES),
    ("supervisor.upstream.tls.MAX_SESSIONS", "TLS sessions kept to be resumed.", tls.MAX_SESSIONS),
    (
        "supervisor.upstream.tls.SESSION_S",
        "How long after a server was verified its session may be resumed.",
        tls.SESSION_S,
    ),
    ("supervisor.upstream.names.MAX_NAMES", "Names whose addresses are kept.", names.MAX_NAMES),
    (
        "supervisor.upstream.dial.MAX_ADDRESSES",
        "Addresses of a name that one connect tries.",
        dial.MAX_ADDRESSES,
    ),
    (
        "supervisor.upstream.dial.STAGGER_S",
        "How long an address may take before the next is tried beside it.",
        dial.STAGGER_S,
    ),
)
"""Limits that are not options."""

TOLD = {
    "OnDetach.mode": "What happens when nobody reads: `keep` the stream, or `cancel` it after `grace_s` without a reader.",
    "OnDetach.grace_s": "How long a stream to be cancelled may be without a reader.",
    "Limits.when_full": "At `max_live`: `reject` the start, `reap_oldest`, or `reap_least_watched`.",
    "Limits.tail_bytes": "The same, in bytes.",
    "Limits.tombstone_s": "How long each is remembered.",
    "Limits.finished_s": "How long each is kept.",
    "MemoryPolicy.max_age_s": "Age of a live stream.",
    "MemoryPolicy.sweep_every_s": "How often the rules are applied, beside on admission and on growth.",
    "RetryPolicy.statuses": "The HTTP statuses that are tried again.",
    "ControlLimits.max_connections": "Clients connected at the same time; one more is refused with 503.",
    "ControlLimits.max_handshakes": "Handshakes under way; the oldest makes room.",
    "ControlLimits.handshake_s": "How long a handshake may take.",
    "LinkLimits.send_chunk_bytes": "What is handed to the socket at once.",
    "LinkLimits.ping_every_s": "Silence after which the peer is asked for a sign of life.",
    "LinkLimits.ping_answer_s": "How long it may take to give one.",
    "ClientLimits.retry_initial_s": "The first pause before connecting again; it doubles.",
}
"""For options whose class says it in its own docstring, or whose name does."""

IN_README = (
    "Deadlines.connect_s",
    "Deadlines.first_event_s",
    "Deadlines.idle_s",
    "Deadlines.total_s",
    "OnDetach.mode",
    "Limits.max_live",
    "Limits.tail_events",
    "Limits.tail_bytes",
    "Limits.max_event_bytes",
    "Limits.max_readers",
    "Limits.max_tombstones",
    "Limits.tombstone_s",
    "Limits.max_finished",
    "Limits.cleanup_s",
    "MemoryPolicy.max_stream_bytes",
    "MemoryPolicy.max_bytes",
    "RetryPolicy.attempts",
    "RetryPolicy.retry_after_max_s",
    "SQLiteStore.commit_interval_s",
    "SQLiteStore.high_water_bytes",
    "RetentionConfig.max_ended",
    "RetentionConfig.max_age_s",
    "ShutdownConfig.grace_s",
    "ControlLimits.max_connections",
    "LinkLimits.max_message_bytes",
    "LinkLimits.stall_s",
    "SessionLimits.max_subscriptions",
)


def limits() -> dict[str, Limit]:
    """Return every limit by `Class.field`."""
    rows: dict[str, Limit] = {}
    for kind, where, _ in CLASSES:
        told = _attribute_docstrings(kind)
        for field in attrs.fields(kind):
            if not hasattr(field.default, "factory"):
                rows[f"{kind.__name__}.{field.name}"] = Limit(
                    where,
                    field.name,
                    field.default,
                    told.get(field.name) or TOLD[f"{kind.__name__}.{field.name}"],
                )
    for function, where, _, said in CALLABLES:
        parameters = inspect.signature(function).parameters
        for name, text in said.items():
            rows[f"{function.__name__}.{name}"] = Limit(where, name, parameters[name].default, text)
    for name, text, value in CONSTANTS:
        rows[name] = Limit("constant", name, value, text)
    return rows


def limits_page() -> str:
    """Return docs/limits.md."""
    rows = limits()
    lines = [
        "<!-- Generated by `python docs/generate.py`; do not edit. -->",
        "# Limits and defaults",
        "",
        "Everything that could grow is bounded. Times that end in `_s` are seconds, sizes that end in `_bytes` are bytes.",
        "What is named in brackets is a table of the daemon's TOML file; an embedding program gives the class to",
        "`open_supervisor`, or to what it bounds.",
    ]
    groups = [(kind.__name__, where, about) for kind, where, about in CLASSES]
    groups += [(function.__name__, where, about) for function, where, about, _ in CALLABLES]
    for owner, where, about in groups:
        lines += ["", f"## `{owner}`: {about[0].lower()}{about[1:]}", "", f"Set in `{where}`.", ""]
        lines += ["| limit | default | |", "|---|---|---|"]
        lines += [
            f"| `{row.name}` | {shown(row.name, row.default)} | {row.told} |"
            for name, row in rows.items()
            if name.startswith(f"{owner}.")
        ]
    lines += ["", "## Fixed", "", "| limit | value | |", "|---|---|---|"]
    lines += [f"| `{name}` | {shown(name, value)} | {text} |" for name, text, value in CONSTANTS]
    return "\n".join(lines) + "\n"


def limits_table() -> str:
    """Return the README's table: the limits that are met first."""
    rows = limits()
    lines = ["| limit | default | |", "|---|---|---|"]
    for name in IN_README:
        row = rows[name]
        lines.append(f"| `{name}` | {shown(row.name, row.default)} | {row.told} |")
    return "\n".join(lines)


def exit_codes() -> str:
    """Return the table of exit codes."""
    return "\n".join(
        ["| code | |", "|---|---|", *(f"| {int(code)} | {told} |" for code, told in EXIT_TABLE.items())]
    )


def shown(name: str, value: object) -> str:
    """Return a default as people read it."""
    if value is None or value == ():
        return "none"
    if isinstance(value, frozenset):
        return ", ".join(str(one) for one in sorted(value))
    if isinstance(value, str):
        return f"`{value}`"
    if isinstance(value, int | float) and name.lower().endswith("bytes"):
        for unit, size in (("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10)):
            if value >= size and value % size == 0:
                return f"{int(value // size)} {unit}"
        return f"{value:,} bytes"
    if isinstance(value, int | float) and name.lower().endswith("_s"):
        return f"{value:,g} s" if value < 1e6 else f"{value / 86_400:g} days"
    return f"{value:,}" if isinstance(value, int) else str(value)


def _attribute_docstrings(kind: type) -> dict[str, str]:
    """Return the docstrings under a class's fields, which are not kept at run time."""
    (definition,) = ast.parse(inspect.getsource(kind)).body
    assert isinstance(definition, ast.ClassDef), "a class is defined by its source"
    found = {}
    for statement, after in zip(definition.body, definition.body[1:], strict=False):
        if (
            isinstance(statement, ast.AnnAssign)
            and isinstance(statement.target, ast.Name)
            and isinstance(after, ast.Expr)
            and isinstance(after.value, ast.Constant)
        ):
            found[statement.target.id] = " ".join(str(after.value.value).split())
    return found


# --- the configuration -----------------------------------------------------------------------------------------------

UPSTREAM_KEYS = {
    "base_url": "Up to and with the version, as for the providers' SDKs: `https://api.openai.com/v1`. Required.",
    "path": "What follows `base_url`; by default the dialect's own, such as `/chat/completions`.",
    "dialect": "How its streams are read. Default: `openai-chat`.",
    "api_key_env": "The environment variable that holds the key, read for each request.",
    "api_key_file": "A file that holds the key alone, read for each request. Not beside `api_key_env`.",
    "api_key_header": "The header that takes the key as it is, or `bearer`, which is `Authorization: Bearer …`. Default: the dialect's.",
    "proxy": "`http://[user:password@]host:port`, or `direct`. Default: what `HTTPS_PROXY` and the like say.",
    "headers": "A table of headers sent with each request. Not for secrets.",
    "models": "A table of model names: a request's `model` that is a key here is sent as the value.",
    "prefill": "How an `openai-chat` server is told to go on from an assistant's text: `assistant`, `prefix`, `partial` or `continue_final_message`.",
    "fallback": "An array of upstreams of the same dialect, asked in turn when this one fails before the first event; after it, too, if `resume` in `[retry]` has `restart`.",
    "max_unparseable": "How many events of an answer may be unreadable; they are skipped and counted. Default: 10.",
    "deadlines": "A table with the keys of `[deadlines]`; what is left out is as there.",
    "retry": "A table with the keys of `[retry]`; what is left out is as there.",
}
"""`[upstreams.NAME]`, whose keys are not the fields of one class."""

TOLD_TABLES = {
    "": "before the first table",
    "control.limits": "what the control channel bounds",
    "limits": "a supervisor and each of its streams",
    "memory": "what the memory manager does, and when",
    "memory.groups": "limits of a tenant, or of streams with certain labels; any number of tables, up to 16",
    "deadlines": "the clocks of a stream; one that runs out ends it as `expired`",
    "retry": "attempts, and what may be done once an answer has begun",
    "circuit": "when an upstream that fails is left alone: further attempts are refused meanwhile; a stream's first goes to a fallback, if there is one",
    "control.limits.link": "one connection",
    "control.limits.session": "one client",
    "web.limits": "what the HTTP front bounds",
    "gateway.routes": "where requests for some models go; any number of tables, of which the first that fits is taken",
    "gateway.clients": "a key that clients show, and the tenant that they are by it; any number of tables",
    "retention.tenant": "how much it keeps of each tenant",
    "retention.tenants.NAME": "how much it keeps of the tenant NAME, in place of `[retention.tenant]`",
}
TOLD_OPTIONS = {
    **TOLD,
    **{f"StoreConfig.{name}": text for _, _, _, said in CALLABLES[:1] for name, text in said.items()},
    "LogConfig.level": "The least that is logged.",
    "StoreConfig.path": "A SQLite file, or `:memory:`. Default: `stream-supervisor/streams.db` in `$XDG_STATE_HOME` or `~/.local/state`.",
    "StoreConfig.synchronous": "What a commit waits for; `FULL` also survives a crash of the machine.",
}


@attrs.frozen
class Option:
    """One key of the file."""

    table: str
    key: str
    kind: str
    default: str
    told: str


def options(kind: type = Config, table: str = "") -> Iterator[Option]:
    """Yield every key of a table, then those of the tables in it, but not those of upstreams."""
    told, hints = _attribute_docstrings(kind), typing.get_type_hints(kind)
    inner: list[tuple[type, str]] = []
    for field in attrs.fields(kind):
        hint, name = hints[field.name], field.name
        if kind is Config and name in {"upstreams", "source"}:
            continue
        if attrs.has(hint):
            inner.append((hint, f"{table}.{name}".lstrip(".")))
            continue
        if typing.get_origin(hint) is Mapping and attrs.has(typing.get_args(hint)[1]):  # of names to tables
            inner.append((typing.get_args(hint)[1], f"{table}.{name}.NAME"))
            continue
        if (listed := table_of(hint)) is not None:
            inner.append((listed, f"{table}.{name}"))
            continue
        optional = type(None) in typing.get_args(hint)
        takes = described(
            next(arg for arg in typing.get_args(hint) if arg is not type(None)) if optional else hint
        ).removeprefix("one of ")
        said = TOLD_OPTIONS.get(f"{kind.__name__}.{name}") or told.get(name, "")
        off = optional and takes in {"a number", "a whole number"}
        takes = re.sub(r"'(\w+)'", r'`"\1"`', takes)
        yield Option(
            table,
            name,
            takes + (' or `"none"`' if off else ""),
            _in_toml(name, field.default, off=off),
            said,
        )
    for hint, within in inner:
        yield from options(hint, within)


def _in_toml(name: str, value: object, *, off: bool) -> str:
    if value is attrs.NOTHING:
        return "must be given"
    if value is None or hasattr(value, "factory"):
        return '`"none"`' if off else "not set"
    if isinstance(value, bool):
        return f"`{str(value).lower()}`"
    if isinstance(value, str):
        return f'`"{value}"`'
    if isinstance(value, tuple | frozenset):
        return f"`{json.dumps(sorted(value))}`"
    plain = f"`{str(value).removesuffix('.0')}`"
    read = shown(name, value)
    return f"{plain} ({read})" if read.endswith(("iB", "days")) else plain


def _heading(table: str) -> str:
    listed = table in {"memory.groups", "gateway.routes", "gateway.clients"}
    return f"[[{table}]]" if listed else f"[{table}]"


def configuration_tables() -> str:
    """Return the tables of docs/configuration.md."""
    by_table: dict[str, list[Option]] = {}
    for option in options():
        by_table.setdefault(option.table, []).append(option)
    docs = {
        name: inspect.cleandoc(kind.__doc__ or "")
        for name, kind in typing.get_type_hints(Config).items()
        if attrs.has(kind)
    }
    lines: list[str] = []
    for table, rows in by_table.items():
        about = TOLD_TABLES.get(table) or docs[table].partition("`: ")[2].rstrip(".")
        lines += [
            f"### {f'`{_heading(table)}`' if table else 'Top level'}: {about}",
            "",
            "| key | value | default | |",
            "|---|---|---|---|",
        ]
        lines += [f"| `{row.key}` | {row.kind} | {row.default} | {row.told} |" for row in rows]
        lines.append("")
    lines += [
        "### `[upstreams.NAME]`: a provider",
        "",
        "NAME is 1 to 64 letters, digits, `.`, `_` and `-`.",
        "",
        "| key | |",
        "|---|---|",
    ]
    lines += [f"| `{key}` | {told} |" for key, told in UPSTREAM_KEYS.items()]
    return "\n".join(lines)


# --- dialects --------------------------------------------------------------------------------------------------------

OURS = {
    "network": "no connection, or one that was lost before an answer",
    "truncated": "the body ended before the answer did",
    "protocol": "what came is not what the dialect or the framing allows",
    "timeout": "also a clock of ours that ran out",
}
"""Kinds of faults that are not, or not only, told by a provider."""
FRAMINGS = {"sse": "event stream", "ndjson": "NDJSON", "json-array": "JSON array", "none": "none"}
RUNGS = {"openai-chat": "continuation (if the upstream has `prefill`)"}
"""Rungs that depend on more than the dialect."""


def dialect_tables() -> Iterator[tuple[str, str]]:
    """Yield the tables of docs/dialects.md by name."""
    told = [BUILTIN[name] for name in sorted(BUILTIN)]
    yield (
        "endings",
        _table(
            ("dialect", "framing", "ends well", "truncated"),
            [
                (f"`{one.name}`", FRAMINGS[one.framing], one.endings.well, one.endings.truncated)
                for one in told
            ],
        ),
    )
    yield (
        "incomplete",
        _table(
            ("dialect", "reason", ""),
            [
                (names if first else "", f"`{reason}`", meaning)
                for names, reasons in _alike(told, lambda one: tuple(one.endings.incomplete.items()))
                for first, (reason, meaning) in _firsts(reasons)
            ],
        ),
    )
    yield (
        "errors",
        _table(
            ("dialect", "where it is told"),
            [
                (names if first else "", where)
                for names, places in _alike(told, lambda one: one.endings.errors)
                for first, where in _firsts(places)
            ],
        ),
    )
    yield (
        "stopping",
        _table(
            ("dialect", "usage", "does closing stop the bill?", "a cancel", "rungs"),
            [
                (
                    f"`{one.name}`",
                    one.usage_rule,
                    {True: "yes", False: "no", None: "not said"}[one.abort_stops_billing],
                    f"`{one.stop}`" + (", and cancels on the provider's side" if one.asking.cancel else ""),
                    _rungs(one),
                )
                for one in told
            ],
        ),
    )
    asked = [one for one in (*told, *(PRESETS[name] for name in sorted(PRESETS))) if one.framing != "none"]
    yield (
        "asking",
        _table(
            ("dialect", "path", "the credential", "`start UPSTREAM --model MODEL PROMPT` asks with"),
            [
                (
                    f"`{one.name}`",
                    f"`{one.asking.path}`" if one.asking.path else "each upstream says (`path`)",
                    "as a bearer"
                    if one.asking.key_header == "bearer"
                    else f"in the header `{one.asking.key_header}`",
                    _prompted(one),
                )
                for one in asked
            ],
        ),
    )
    yield (
        "faults",
        _table(("kind", "temporary", "HTTP statuses", "words of codes and types", ""), _fault_rows()),
    )


def _alike(
    dialects: Iterable[Dialect], ask: Callable[[Dialect], tuple[Any, ...]]
) -> Iterator[tuple[str, tuple[Any, ...]]]:
    """Yield each answer with the names of the dialects that give it."""
    found: dict[tuple[Any, ...], list[str]] = {}
    for one in dialects:
        found.setdefault(ask(one), []).append(f"`{one.name}`")
    for answer, whose in found.items():
        yield ", ".join(whose), answer


def _rungs(dialect: Dialect) -> str:
    if dialect.framing == "none":
        return "the source's own"
    asking = dialect.asking
    rungs = ["sequence"] if asking.resume else []
    rungs += (
        [RUNGS[dialect.name]] if dialect.name in RUNGS else ["continuation"] if asking.continuation else []
    )
    return ", ".join([*rungs, "restart"])


def _prompted(dialect: Dialect) -> str:
    make = dialect.asking.prompt
    if make is None:
        return "cannot: give a `--request`"
    return f"`{json.dumps(make('PROMPT', 'MODEL'))}`"


def _fault_rows() -> Iterator[tuple[str, ...]]:
    words: dict[str, list[str]] = {}
    for kind, parts in (*faults._WORDS, *faults._GENERAL):  # noqa: SLF001  # the data that decide
        words.setdefault(kind, []).extend(parts)
    statuses: dict[str, list[int]] = {}
    for status in range(400, 600):
        kind, _ = faults.classify(message="", status=status)
        statuses.setdefault(kind, []).append(status)
    for kind in typing.get_args(FaultKind):
        yield (
            f"`{kind}`",
            "yes" if kind in faults._TEMPORARY or kind == "truncated" else "no",  # noqa: SLF001  # as above
            _spans(statuses.get(kind, [])),
            ", ".join(f"`{word}`" for word in words.get(kind, [])),
            OURS.get(kind, ""),
        )


def _spans(numbers: Sequence[int]) -> str:
    """Return numbers as people write them: a range as such, and a class of statuses that is mostly there as the others."""
    if len(numbers) > 50:
        return f"the other {numbers[0] // 100}xx"
    return ", ".join(map(str, numbers))


def _firsts(items: Iterable[Any]) -> Iterator[tuple[bool, Any]]:
    return ((number == 0, item) for number, item in enumerate(items))


def _table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [f"| {' | '.join(heads)} |", f"|{'---|' * len(heads)}"]
    lines += [f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in row)} |" for row in rows]
    return "\n".join(line.replace("|  |", "| |").replace("|  |", "| |") for line in lines)


# --- the control session ---------------------------------------------------------------------------------------------

_CONFIG = """
discover = false
[control]
port = 0
[web]
port = "none"
[store]
path = ":memory:"
[upstreams.simulated]
base_url = "{base_url}"
proxy = "direct"
"""
_MODEL = "sim/stall?after=3&text=Tokens+come+slowly+and+cost+money"
"""Three words, and then nothing: there is something to watch, and something to stop."""
_SESSION_S = 30.0
"""How long all of it may take; it takes a tenth of a second."""


async def session() -> list[tuple[str, dict[str, Any]]]:
    """Run a daemon and a client; return what was said: (`>` or `<`, message)."""
    said: list[tuple[str, dict[str, Any]]] = []
    with trio.fail_after(_SESSION_S):
        await _session(said)
    return said


async def _session(said: list[tuple[str, dict[str, Any]]]) -> None:
    async with SimulatedUpstream() as provider, trio.open_nursery() as nursery:
        url = await nursery.start(_daemon, _CONFIG.format(base_url=provider.base_url))
        async with trio_websocket.open_websocket_url(url, subprotocols=[SUBPROTOCOL]) as socket:
            calls = _Calls(socket, said)
            await calls.call("hello", client="readme")
            request = {"model": _MODEL, "messages": [{"role": "user", "content": "Hi"}]}
            started = await calls.call("stream.start", upstream="simulated", request=request, key="chat-7")
            await calls.call("stream.subscribe", id=started["id"], view="text", credit=100)
            while len(calls.text.split()) < 3:
                await calls.receive()
                if calls.over:
                    raise RuntimeError(f"the stream ended by itself: {said[-1]}")
            await calls.call("stream.cancel", key="chat-7", reason="the reader pressed Stop")
            while not calls.over:
                await calls.receive()
            await calls.call("supervisor.shutdown", grace_s=0)
        nursery.cancel_scope.cancel()


async def _daemon(text: str, *, task_status: trio.TaskStatus[str]) -> None:
    await daemon.run(parse(text), environ={}, ready=lambda ready: task_status.started(ready.url))


@attrs.define
class _Calls:
    """The simplest client there is."""

    socket: trio_websocket.WebSocketConnection
    said: list[tuple[str, dict[str, Any]]]
    number: int = 0
    text: str = ""
    over: bool = False

    async def call(self, method: str, **params: Any) -> Any:
        self.number += 1
        message = {"jsonrpc": "2.0", "id": self.number, "method": method, "params": params}
        self.said.append((">", message))
        await self.socket.send_message(json.dumps(message))
        while (answer := await self.receive()).get("id") != self.number:
            pass
        return answer["result"]

    async def receive(self) -> dict[str, Any]:
        message: dict[str, Any] = json.loads(await self.socket.get_message())
        self.said.append(("<", message))
        if message.get("method") == "stream.events":
            for event in message["params"]["events"]:
                self.text += event.get("text", "")
                self.over = self.over or event["kind"] == "outcome"
        return message


def transcript(said: Sequence[tuple[str, dict[str, Any]]]) -> str:
    """Return a session as it is shown: a message a line."""
    lines = []
    for direction, message in said:
        body = {name: value for name, value in message.items() if name != "jsonrpc"}
        if "result" in body and "limits" in body["result"]:  # `hello` tells every limit and method
            body = {**body, "result": {**body["result"], "methods": ["…"], "limits": {"…": "…"}}}
        lines.append(f"{direction} {json.dumps(body, ensure_ascii=False)}")
    return "\n".join(lines)


def shape(shown_session: str) -> list[Any]:
    """Return what a session has to keep: its messages, with the types of their parts.

    How many events travel in one notification depends on the moment, so those that follow each other count as one; and
    whether the outcome or the answer to the cancel comes first is nobody's promise, so the order does not count.
    """
    found: list[Any] = []
    for line in shown_session.splitlines():
        direction, _, text = line.partition(" ")
        message = json.loads(text)
        if message.get("method") == "stream.events":
            kinds = {event["kind"]: _types(event) for event in message["params"]["events"]}
            if found and found[-1][1] == "stream.events":
                found[-1][3].update(kinds)
            else:
                found.append([direction, "stream.events", sorted(message["params"]), kinds])
        else:
            found.append([direction, _types(message)])
    return sorted(found, key=json.dumps)


def _types(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _types(part) for name, part in sorted(value.items())}
    if isinstance(value, list):
        return [_types(value[0])] if value else []
    return (
        "number" if isinstance(value, int | float) and not isinstance(value, bool) else type(value).__name__
    )


# --- writing ---------------------------------------------------------------------------------------------------------


def block(page: str, name: str) -> str:
    """Return what stands between a page's markers of this name. Raises ValueError if they are not there."""
    begin, end = f"<!-- {name}: begin -->\n", f"\n<!-- {name}: end -->"
    _, found, rest = page.partition(begin)
    inside, closed, _ = rest.partition(end)
    if not (found and closed):
        raise ValueError(f"the page has no {begin.strip()} … {end.strip()}")
    return inside


def put(page: str, name: str, text: str) -> str:
    """Return the page with `text` between its markers of this name."""
    inside = block(page, name)
    begin, end = f"<!-- {name}: begin -->\n", f"\n<!-- {name}: end -->"
    return page.replace(f"{begin}{inside}{end}", f"{begin}{text}{end}")


def tables() -> Iterator[tuple[str, str]]:
    """Yield the README's generated tables by name."""
    yield "limits", limits_table()
    yield "exit codes", exit_codes()


def shown_session(page: str) -> str:
    """Return the session that a page shows, without its fence."""
    (text,) = re.findall(r"^```text\n(.*?)\n```$", block(page, "session"), re.MULTILINE | re.DOTALL)
    return str(text)


def main(argv: list[str] | None = None) -> int:
    """Write, or say whether something is stale; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 if something is stale")
    options = parser.parse_args(argv)
    readme = README.read_text("utf-8")
    said = transcript(trio.run(session))
    if options.check:
        stale = [name for name, text in tables() if block(readme, name) != text]
        stale += [] if LIMITS.read_text("utf-8") == limits_page() else ["docs/limits.md"]
        page = CONFIGURATION.read_text("utf-8")
        stale += [] if block(page, "tables") == configuration_tables() else ["docs/configuration.md"]
        page = DIALECTS.read_text("utf-8")
        stale += [f"docs/dialects.md: {name}" for name, text in dialect_tables() if block(page, name) != text]
        stale += [] if shape(shown_session(readme)) == shape(said) else ["session"]
        print(f"stale: {', '.join(stale)}" if stale else "up to date")
        return int(bool(stale))
    for name, text in tables():
        readme = put(readme, name, text)
    README.write_text(put(readme, "session", f"```text\n{said}\n```"), "utf-8")
    LIMITS.write_text(limits_page(), "utf-8")
    CONFIGURATION.write_text(put(CONFIGURATION.read_text("utf-8"), "tables", configuration_tables()), "utf-8")
    page = DIALECTS.read_text("utf-8")
    for name, text in dialect_tables():
        page = put(page, name, text)
    DIALECTS.write_text(page, "utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
