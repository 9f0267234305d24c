"""The commands and their options, as data for argparse. What the commands do is in the modules beside."""

from __future__ import annotations

import argparse
import difflib
import importlib
import math
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from supervisor.cli.exits import EXIT_TABLE

__all__ = ["DEFAULT_URL", "TOKEN_VARIABLE", "URL_VARIABLE", "build_parser"]

DEFAULT_URL = "ws://127.0.0.1:7433"
URL_VARIABLE = "STREAM_SUPERVISOR_URL"
TOKEN_VARIABLE = "STREAM_SUPERVISOR_TOKEN"  # noqa: S105  # the name of a variable
CONFIG_VARIABLE = "STREAM_SUPERVISOR_CONFIG"

_STATES = ("pending", "connecting", "streaming", "stopping", "completed", "failed", "cancelled", "expired")
_CLOCKS = ("connect", "first_event", "idle", "total")
_MAX_NAME_CHARS = 256
_RUNGS = ("sequence", "continuation", "restart")

_INVALID_CHOICE = re.compile(r"invalid choice: '(.*)' \(choose from (.*)\)")

Options = argparse.Namespace


def _command(where: str) -> Callable[[Options], int]:
    """Return the function `module:name`, imported when it is called."""
    module, _, name = where.partition(":")

    def run(options: Options) -> int:
        code: int = getattr(importlib.import_module(f"supervisor.cli.{module}"), name)(options)
        return code

    return run


class _Version(argparse.Action):
    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        from supervisor.version import version  # noqa: PLC0415  # reads the package's metadata

        print(f"stream-supervisor {version()}")  # noqa: T201  # what was asked for
        parser.exit()


class _Parser(argparse.ArgumentParser):
    """A parser that names what was probably meant."""

    def error(self, message: str) -> NoReturn:
        wrong = _INVALID_CHOICE.search(message)
        if wrong is not None:
            message += _nearest(wrong[1], re.findall(r"[\w-]+", wrong[2]))
        super().error(message)


class _Command(_Parser):
    """A command's parser, which takes options and positional arguments in any order.

    argparse gives all positional arguments their values as soon as it meets the first of them: an optional PROMPT would
    get its default before an option, and what follows the option would be left over. Here options are read first, and
    then, from what is left, the positional arguments.
    """

    either: tuple[str, str] | None = None
    """A positional argument and an option of which one at most may be given, by their `dest`; argparse's own groups
    cannot have positional arguments where these are read by themselves."""
    _options_first = False

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        if self._options_first:  # called back by what is called below
            return super().parse_known_args(args, namespace)
        self._options_first = True
        try:
            options, rest = self.parse_known_intermixed_args(args, namespace)
        finally:
            self._options_first = False
        if self.either is not None and all(getattr(options, name) is not None for name in self.either):
            argument, option = self.either
            self.error(f"argument --{option}: not allowed with argument {argument.upper()}")
        if rest:  # here, as argparse would give the usage of the whole command line
            known = list(self._option_string_actions)
            near = _nearest(rest[0].partition("=")[0], known) if rest[0].startswith("-") else ""
            self.error(f"unrecognized arguments: {' '.join(rest)}{near}")
        return options, rest


def _nearest(given: str, known: Sequence[str]) -> str:
    near = difflib.get_close_matches(given, known, n=1)
    return f"; did you mean {near[0]}?" if near else ""


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the whole command line; `options.run(options)` carries the command out."""
    codes = "\n".join(f"  {int(code):>3}  {meaning}" for code, meaning in EXIT_TABLE.items())
    parser = _Parser(
        prog="stream-supervisor",
        description="Supervise token streams: start, watch, list and cancel them on a daemon that owns them.",
        epilog=f"exit codes:\n{codes}\n\n"
        f"environment:\n"
        f"  {URL_VARIABLE}     where the daemon is (default {DEFAULT_URL})\n"
        f"  {TOKEN_VARIABLE}   the bearer token, where the daemon wants one (or --token-file)\n"
        f"  {CONFIG_VARIABLE}  the configuration of serve, check-config and prune (or --config)",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action=_Version, nargs=0, help="print the version and exit")
    commands = parser.add_subparsers(
        title="commands", metavar="COMMAND", required=True, parser_class=_Command
    )
    _add_daemon(commands)
    _add_streams(commands)
    _add_views(commands)
    _add_control(commands)
    _add_tools(commands)
    return parser


def _add(commands: Any, name: str, where: str, about: str, **options: Any) -> _Command:
    parser: _Command = commands.add_parser(
        name, help=about, description=about[0].upper() + about[1:] + ".", allow_abbrev=False, **options
    )
    parser.add_argument("--json", action="store_true", help="print JSON: one object a line")
    parser.set_defaults(run=_command(where))
    return parser


def _client(commands: Any, name: str, where: str, about: str, **options: Any) -> _Command:
    parser = _add(commands, name, where, about, **options)
    group = parser.add_argument_group("the daemon")
    group.add_argument("--url", metavar="URL", help=f"default: ${URL_VARIABLE}, or {DEFAULT_URL}")
    group.add_argument(
        "--token-file",
        type=Path,
        metavar="FILE",
        help=f"the bearer token (default: ${TOKEN_VARIABLE}, if set)",
    )
    group.add_argument(
        "--connect-s",
        type=_seconds,
        default=3.0,
        metavar="S",
        help="how long to try while nobody listens there, as when the daemon is just starting (3)",
    )
    return parser


# --- the commands ----------------------------------------------------------------------------------------------------


def _add_daemon(commands: Any) -> None:
    serve = _add(
        commands,
        "serve",
        "serving:serve",
        "run the daemon, until SIGTERM or Ctrl-C",
        epilog="SIGTERM, or SIGINT once: drain for the grace, then cancel the rest. SIGINT twice: cancel at once; three "
        "times: leave on the spot. SIGHUP: reopen the log file.",
    )
    _config_option(serve)
    serve.add_argument(
        "--host", help="the address to listen on (127.0.0.1); beyond loopback only with a token"
    )
    serve.add_argument("--port", type=int, help="the port of the control channel (7433); 0: any free one")
    serve.add_argument(
        "--web-port",
        type=_web_port,
        metavar="PORT",
        help="the port of HTTP (7434); 0: any free one; none: no HTTP",
    )
    serve.add_argument(
        "--simulated",
        action="store_true",
        help="also offer an upstream `simulated`, which is served here and needs no key; try it with: "
        'start simulated --model sim/paced "Hello"',
    )
    serve.add_argument("--store", metavar="PATH", help="the SQLite file, or :memory:")
    serve.add_argument(
        "--token-file", type=Path, metavar="FILE", help="a file that holds the bearer token clients need"
    )
    serve.add_argument(
        "--grace", type=float, metavar="S", help="seconds that live streams may go on at the end (30)"
    )
    serve.add_argument("--log-file", type=Path, metavar="FILE", help="default: standard error")
    serve.add_argument("--log-level", choices=("debug", "info", "warning", "error"))
    serve.add_argument("--log-format", choices=("console", "json"))
    serve.add_argument(
        "--ready-file", type=Path, metavar="FILE", help="written (JSON) once ready, removed at the end"
    )
    check = _add(
        commands, "check-config", "serving:check_config", "check a configuration and print what it comes to"
    )
    check.add_argument("--simulated", action="store_true", help="as it would be for `serve --simulated`")
    check.add_argument(
        "file", nargs="?", type=Path, metavar="FILE", help=f"default: --config, or ${CONFIG_VARIABLE}"
    )
    _config_option(check)
    _add_prune(commands)


def _web_port(value: str) -> int | str:
    """Read a port, or `none`. Raises ArgumentTypeError."""
    if value == "none" or value.isdecimal():
        return value if value == "none" else int(value)
    raise argparse.ArgumentTypeError(f"{value!r} is not valid; expected a port, or none")


def _add_prune(commands: Any) -> None:
    prune = _add(
        commands,
        "prune",
        "pruning:prune",
        "remove from the store's file what retention does not keep, and tell by which rule",
        epilog="Works on the file, which a daemon must not have open: it prunes by itself. --dry-run works beside one.",
    )
    _config_option(prune)
    prune.add_argument("--store", metavar="PATH", help="the SQLite file (default: the configuration's)")
    prune.add_argument("--dry-run", action="store_true", help="only tell what would go")
    rules = prune.add_argument_group(
        "what is kept, of all ended streams", "default: as [retention] of the configuration says"
    )
    rules.add_argument("--max-ended", type=int, metavar="N", help="the last N to end")
    rules.add_argument("--max-age", type=float, metavar="S", help="those that ended within so many seconds")
    rules.add_argument("--max-bytes", type=int, metavar="N", help="the last to end, up to so many bytes")


def _config_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--config",
        type=Path,
        metavar="FILE",
        help=f"a TOML file (default: ${CONFIG_VARIABLE}, or all defaults)",
    )


def _add_streams(commands: Any) -> None:
    start = _client(commands, "start", "following:start", "start a stream and follow its text")
    start.add_argument("upstream", metavar="UPSTREAM")
    start.add_argument(
        "prompt",
        nargs="?",
        metavar="PROMPT",
        help="a user's words; the daemon makes the request of them, as the upstream's dialect has it",
    )
    start.add_argument(
        "--request",
        metavar="JSON|@FILE|-",
        help="in place of PROMPT: the body for the provider; -: from standard input",
    )
    start.either = "prompt", "request"
    start.add_argument(
        "--model", help="the model; wins over the one in --request. Most providers have to be told one"
    )
    start.add_argument("--key", type=_name, help="your name for this work: starting it again joins it")
    start.add_argument(
        "--tenant", type=_name, metavar="NAME", help="on whose behalf it runs, for limits and figures"
    )
    start.add_argument("--on-conflict", choices=("attach", "reject", "replace"), default="attach")
    start.add_argument(
        "--label", type=_pair, action="append", default=[], metavar="NAME=VALUE", dest="labels"
    )
    start.add_argument(
        "--deadline",
        type=_deadline,
        action="append",
        default=[],
        metavar="CLOCK=S",
        dest="deadlines",
        help=f"{', '.join(_CLOCKS)}; seconds, or none",
    )
    start.add_argument("--attempts", type=_count(100), metavar="N", help="how often to try, in all")
    start.add_argument(
        "--resume",
        type=_rungs,
        metavar="RUNGS",
        help="what may be done when an answer breaks off: sequence, continuation, restart (with commas), or none",
    )
    start.add_argument(
        "--on-detach",
        type=_on_detach,
        metavar="keep|cancel[:S]",
        help="when nobody reads it (keep); S: after seconds",
    )
    start.add_argument("--durable", action="store_true", help="show only what is recorded")
    start.add_argument("--detach", action="store_true", help="do not follow: print the id")
    _final_option(start)
    _interrupt_option(start)
    watch = _client(
        commands, "watch", "following:watch", "follow a stream's text; without ID, all streams as a table"
    )
    _selector(watch)
    watch.add_argument(
        "--after",
        type=_after,
        default="start",
        metavar="start|tail|snapshot|EPOCH:SEQ",
        help="where to begin (start)",
    )
    watch.add_argument(
        "--events", action="store_true", help="every event as received, not only the text; needs --json"
    )
    watch.add_argument(
        "--interval", type=_seconds, default=0.5, metavar="S", help="without ID: how often to look (0.5)"
    )
    watch.add_argument("--until-idle", action="store_true", help="without ID: end once no stream is live")
    _final_option(watch)
    _interrupt_option(watch)
    listing = _client(commands, "list", "inspecting:list_streams", "list streams, newest first")
    listing.add_argument("--state", action="append", choices=_STATES, dest="states")
    listing.add_argument(
        "--label", type=_pair, action="append", default=[], metavar="NAME=VALUE", dest="labels"
    )
    listing.add_argument("--key", type=_name)
    listing.add_argument("--upstream", type=_name, metavar="NAME")
    listing.add_argument("--tenant", type=_name, metavar="NAME")
    live = listing.add_mutually_exclusive_group()
    live.add_argument("--live", action="store_true", default=None, help="only those that have not ended")
    live.add_argument(
        "--ended", action="store_false", dest="live", default=None, help="only those that have, in memory"
    )
    listing.add_argument("--before", metavar="ID", help="go on after this id: the next page")
    listing.add_argument("--limit", type=_count(), default=100, metavar="N", help="at most so many (100)")
    show = _client(
        commands, "show", "inspecting:show", "show a stream: what it is, how it ended, what it said"
    )
    _selector(show)
    cancel = _client(commands, "cancel", "inspecting:cancel", "cancel streams by id, key, label, or all")
    _selector(cancel)
    cancel.add_argument(
        "--label", type=_pair, action="append", default=[], metavar="NAME=VALUE", dest="labels"
    )
    cancel.add_argument("--all", action="store_true", help="every live stream")
    cancel.add_argument("--reason", default="", help="kept with the outcome")
    cancel.add_argument(
        "--mode",
        choices=("abort", "drain"),
        help="abort: at once; drain: let it end by itself first (default: as suits the dialect)",
    )
    cancel.add_argument(
        "--drain-s", type=_seconds, default=10.0, metavar="S", help="how long a drain may take (10)"
    )
    cancel.add_argument(
        "--drain-tokens", type=int, metavar="N", help="how many tokens of output may still come (any number)"
    )
    cancel.add_argument(
        "--wait-s", type=_seconds, default=5.0, metavar="S", help="how long to wait for the end (5)"
    )


def _add_views(commands: Any) -> None:
    trace = _client(
        commands,
        "trace",
        "tracing:trace",
        "show what happened when in a stream, live or ended: attempts, gaps, stalls, sizes",
    )
    _selector(trace)
    trace.add_argument(
        "--perfetto",
        metavar="FILE",
        help="write it as a file for https://ui.perfetto.dev or chrome://tracing (-: to standard output)",
    )
    top = _client(
        commands,
        "top",
        "top:top",
        "show streams and figures on the whole terminal, live",
        epilog="Keys: up and down choose a stream, c cancels it (and asks first), s sorts by another column, q ends.",
    )
    top.add_argument("--interval", type=_seconds, default=1.0, metavar="S", help="how often to look (1)")


def _add_control(commands: Any) -> None:
    _client(commands, "stats", "inspecting:stats", "print the daemon's figures")
    _client(commands, "health", "inspecting:health", "tell whether the daemon is well; exit 1 if it is not")
    reap = _client(commands, "reap", "inspecting:reap", "run the memory manager now")
    reap.add_argument("--dry-run", action="store_true", help="only say what would be reaped, and why")
    drain = _client(
        commands, "drain", "inspecting:drain", "start nothing more, and wait until no stream is live"
    )
    drain.add_argument(
        "--timeout", type=_seconds, metavar="S", help="wait at most so long; exit 4 if some still live"
    )
    shutdown = _client(commands, "shutdown", "inspecting:shutdown", "end the daemon")
    shutdown.add_argument("--grace", type=_seconds, metavar="S", help="default: as configured")


def _add_tools(commands: Any) -> None:
    replay = _add(
        commands,
        "replay",
        "replaying:replay_files",
        "read recorded response bodies as a live stream would, without a daemon",
        epilog="Exits with 0 once every file has been read, however its answer ended: that is its first line, or `state` and "
        "`reason` with --json.",
    )
    replay.add_argument(
        "--dialect",
        required=True,
        metavar="NAME",
        help="such as openai-chat; sse: no dialect. A name that is nearly a known one is an error, any other unknown one is "
        "read as generic",
    )
    replay.add_argument("--chunk", type=int, metavar="N", help="feed N bytes at a time")
    replay.add_argument("files", nargs="+", metavar="FILE", help="-: standard input")
    demo = _add(
        commands,
        "demo",
        "demo:demo",
        "show it all on a daemon and a simulated provider of its own; needs no key",
    )
    demo.add_argument("--plain", action="store_true", help="no live table")


def _selector(parser: _Command) -> None:
    parser.add_argument("id", nargs="?", metavar="ID", action=_IdOrKey, help="its id, or key:KEY")
    parser.add_argument("--key", type=_name, help="the stream with this key, in place of ID")
    parser.either = "id", "key"


class _IdOrKey(argparse.Action):
    """An id; or, as in a URL of the daemon, `key:KEY` for what `--key KEY` is."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        del option_string
        named, prefix, key = (values or "").partition("key:")
        if named or not prefix:
            namespace.id = values
        elif namespace.key is not None:
            parser.error("argument --key: not allowed with argument ID")
        else:
            try:
                namespace.key = _name(key)
            except argparse.ArgumentTypeError as error:
                raise argparse.ArgumentError(self, str(error)) from None


def _final_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--final",
        action="store_true",
        help="print the text once, when the stream has ended: without what was withdrawn when the answer was asked for again, "
        "which the running text cannot take back, and with the joins of an answer that went on made good",
    )


def _interrupt_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--on-interrupt",
        choices=("ask", "detach", "cancel"),
        help="what Ctrl-C does (ask; where there is no terminal to ask on: detach)",
    )


# --- the types of options --------------------------------------------------------------------------------------------


def _pair(text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not equals or not name:
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=VALUE")
    return name, value


def _name(text: str) -> str:
    if not 0 < len(text) <= _MAX_NAME_CHARS:
        raise argparse.ArgumentTypeError(f"{text[:50]!r} is not a name of 1 to {_MAX_NAME_CHARS} characters")
    return text


def _count(most: int | None = None) -> Callable[[str], int]:
    bounds = "of at least 1" if most is None else f"from 1 to {most}"

    def count(text: str) -> int:
        if not (text.isascii() and text.isdecimal()) or not 1 <= int(text) <= (most or math.inf):
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number {bounds}")
        return int(text)

    return count


def _seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of seconds, 0 or more")
    return value


def _deadline(text: str) -> tuple[str, float | None]:
    clock, equals, value = text.partition("=")
    name = clock.removesuffix("_s").replace("-", "_")
    if not equals or name not in _CLOCKS:
        raise argparse.ArgumentTypeError(f"{text!r} is not CLOCK=S; the clocks are {', '.join(_CLOCKS)}")
    if value == "none":
        return f"{name}_s", None
    try:
        seconds = _seconds(value)
    except argparse.ArgumentTypeError:
        seconds = 0.0
    if not seconds:
        raise argparse.ArgumentTypeError(f"{text!r}: {value!r} is not a number of seconds above 0, or none")
    return f"{name}_s", seconds


def _rungs(text: str) -> tuple[str, ...]:
    rungs = () if text == "none" else tuple(rung.strip() for rung in text.split(","))
    if not set(rungs) <= set(_RUNGS) or len(set(rungs)) != len(rungs):
        raise argparse.ArgumentTypeError(f"{text!r}: give any of {', '.join(_RUNGS)}, with commas, or none")
    return rungs


def _on_detach(text: str) -> tuple[str, float | None]:
    mode, colon, grace = text.partition(":")
    if mode not in {"keep", "cancel"} or (colon and mode == "keep"):
        raise argparse.ArgumentTypeError(f"{text!r} is not keep, cancel or cancel:SECONDS")
    return mode, _seconds(grace) if colon else None


def _after(text: str) -> str | tuple[int, int]:
    if text in {"start", "tail", "snapshot"}:
        return text
    epoch, colon, seq = text.partition(":")
    if colon and epoch.isdecimal() and seq.isdecimal() and epoch.isascii() and seq.isascii() and int(epoch):
        return int(epoch), int(seq)
    raise argparse.ArgumentTypeError(f"{text!r} is not start, tail, snapshot or EPOCH:SEQ")
