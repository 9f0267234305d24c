"""From options to a connected client, and from errors to messages and exit codes, for every command that is a client."""

from __future__ import annotations

import argparse
import os
from collections.abc import Awaitable, Callable
from contextlib import AbstractAsyncContextManager
from pathlib import Path

import trio

from supervisor.cli.exits import Exit, for_kind
from supervisor.cli.parser import DEFAULT_URL, TOKEN_VARIABLE, URL_VARIABLE
from supervisor.cli.render import complain
from supervisor.control import ClientLimits, ControlClient, connect
from supervisor.control.auth import Token
from supervisor.errors import (
    AuthenticationError,
    ConfigurationError,
    ControlClosedError,
    GapError,
    RequestError,
    SupervisorError,
)

__all__ = ["as_client", "connecting", "run_reporting"]

Command = Callable[[ControlClient, argparse.Namespace], Awaitable[int]]


def connecting(
    options: argparse.Namespace, *, reconnect: bool = False
) -> AbstractAsyncContextManager[ControlClient]:
    """Return a client that connects as the options and the environment say."""
    url = options.url or os.environ.get(URL_VARIABLE) or DEFAULT_URL
    return connect(
        url,
        _token(options.token_file),
        name="cli",
        reconnect=reconnect,
        limits=ClientLimits(wait_s=options.connect_s),
    )


def _token(file: Path | None) -> str | None:
    where, shown = ("--token-file", str(file)) if file is not None else (f"${TOKEN_VARIABLE}", "its value")
    try:
        if file is not None:
            token = file.read_text("ascii").strip()
        elif not (token := os.environ.get(TOKEN_VARIABLE, "").strip()):
            return None
        Token(token)
    except (OSError, UnicodeError) as error:
        why = error.strerror if isinstance(error, OSError) else "it is not ASCII"
        raise ConfigurationError(where, shown, f"a file that holds the token alone ({why})") from None
    except ConfigurationError as error:
        what = "a file that holds the token alone, " if file is not None else ""
        raise ConfigurationError(where, shown, f"{what}{error.expected}") from None
    return token


def as_client(options: argparse.Namespace, command: Command, *, reconnect: bool = False) -> int:
    """Connect, carry a command out, and report what goes wrong; return the exit code."""

    async def run() -> int:
        async with connecting(options, reconnect=reconnect) as client:
            return await command(client, options)

    return run_reporting(run)


def run_reporting(main: Callable[[], Awaitable[int]]) -> int:
    """Run a program under trio; what it raises of this package's errors becomes a message and an exit code."""

    async def run() -> int:
        return await main()

    try:
        return trio.run(run)
    except (Exception, KeyboardInterrupt, BaseExceptionGroup) as error:
        first = _first(error)
        if isinstance(first, BrokenPipeError):
            raise first from None
        if isinstance(first, KeyboardInterrupt):
            return Exit.INTERRUPTED
        if isinstance(first, SupervisorError):
            return _report(first)
        if isinstance(first, OSError):
            complain(str(first))
            return Exit.FAILURE
        raise


def _report(error: BaseException) -> int:
    message = str(error)
    code = Exit.FAILURE
    if isinstance(error, AuthenticationError):
        message += f"; give the token by --token-file or ${TOKEN_VARIABLE}"
        code = Exit.UNREACHABLE
    elif isinstance(error, ControlClosedError):
        if error.code is None:
            message = f"{error.reason}; is the daemon running (stream-supervisor serve), and --url right?"
        code = Exit.UNREACHABLE
    elif isinstance(error, RequestError):
        if error.kind == "key_conflict":
            told = error.data
            message = (
                f"the key {told.get('key')!r} is claimed by stream {told.get('id')} ({told.get('state')}); "
                f"--on-conflict attach joins it, --on-conflict replace ends it and starts anew"
            )
        elif error.kind == "configuration" and error.data.get("field") == "model":
            message += "; give it with --model"
        elif error.kind == "unknown_stream" and error.data.get("id") is not None:
            message += "; for the stream with a key, give --key KEY or key:KEY"
        if error.retry_after_s is not None:
            message += f" (retry after {error.retry_after_s:g} s)"
        code = for_kind(error.kind)
    elif isinstance(error, ConfigurationError):
        code = Exit.USAGE
    elif isinstance(error, GapError):
        message = _told_gap(error)
    complain(message)
    return code


def _told_gap(error: GapError) -> str:
    """Say what can be read, in the words of the options."""
    there = f"{error.epoch}:{error.earliest_seq} to {error.epoch}:{error.tail_seq}"
    what = (
        f"what follows {error.after_epoch}:{error.after_seq} is not kept any more"
        if error.after_seq < error.earliest_seq
        else f"there is no position {error.after_epoch}:{error.after_seq}"
    )
    return (
        f"stream {error.stream_id}: {what}; its events {there} can be read: --after {error.epoch}:{error.earliest_seq - 1} "
        f"gives all of them, --after snapshot the text so far and what follows"
    )


def _first(error: BaseException) -> BaseException:
    """Return what a group is about, by its first exception; nurseries wrap what comes out of them."""
    return _first(error.exceptions[0]) if isinstance(error, BaseExceptionGroup) else error
