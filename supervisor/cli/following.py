"""`start` and `watch`: an answer as it comes, and what Ctrl-C means meanwhile.

Standard output carries the answer's text and nothing else; what is said about it goes to standard error, as a status line
that is redrawn on a terminal. The connection is made again if it is lost, and the text goes on where it was.

What has been written cannot be taken back: where an answer broke off and was asked for again, the text that was withdrawn stands in
the output, and where one went on, white space at the join may stand there twice. With `--final` nothing is written before the
stream has ended, and then the text that holds.

Ctrl-C never stops a stream by accident: it asks whether to detach (the stream goes on without us) or to cancel. Where there
is no terminal to ask on it detaches. A second Ctrl-C at the question detaches too.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import signal
import sys
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any, Literal

import attrs
import msgspec
import trio
from rich.live import Live
from rich.status import Status
from rich.text import Text

from supervisor.cli.connecting import as_client
from supervisor.cli.exits import Exit, for_outcome
from supervisor.cli.render import (
    complain,
    console,
    print_json,
    say,
    show_text,
    streams_table,
    told_outcome,
    visible,
)
from supervisor.control import (
    ControlClient,
    DeadlinesMessage,
    EventMessage,
    EventStream,
    OnDetachMessage,
    RetryMessage,
    StreamMessage,
)
from supervisor.errors import ControlError
from supervisor.streams import Cursor

__all__ = ["start", "watch"]

Choice = Literal["detach", "cancel"]
Policy = Literal["ask", "detach", "cancel"]
_TABLE_STREAMS = 200


def start(options: argparse.Namespace) -> int:
    """Start a stream and follow it; the exit code tells how it ended."""
    if options.final and (options.json or options.detach):
        complain(
            f"--final: not with {'--json (show --json tells it)' if options.json else '--detach, which follows nothing'}"
        )
        return Exit.USAGE
    try:
        options.request = _request(options)
    except ValueError as error:
        complain(str(error))
        return Exit.USAGE
    return as_client(options, _start, reconnect=not options.detach)


def _request(options: argparse.Namespace) -> dict[str, Any] | None:
    """Return the body for the provider; None: the daemon makes it of the prompt. Raises ValueError, saying what is wrong."""
    if options.request is None:
        if options.prompt is None:
            raise ValueError("what to ask? give a PROMPT with --model, or --request")
        return None
    text = options.request
    if text == "-":
        text = sys.stdin.read()
    elif text.startswith("@"):
        try:
            text = Path(text[1:]).read_text("utf-8")
        except (OSError, UnicodeError) as error:
            raise ValueError(
                f"--request {options.request}: {getattr(error, 'strerror', None) or error}"
            ) from None
    try:
        request = json.loads(text)
    except (json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"--request is not JSON: {error}") from None
    if not isinstance(request, dict):
        raise ValueError("--request must be a JSON object, the body for the provider")  # noqa: TRY004  # all its mistakes are one kind to the caller
    return request


async def _start(client: ControlClient, options: argparse.Namespace) -> int:
    started = await client.start(
        options.upstream,
        options.request,
        prompt=options.prompt,
        model=options.model,
        key=options.key,
        tenant=options.tenant,
        on_conflict=options.on_conflict,
        on_detach=_on_detach(options),
        deadlines=DeadlinesMessage(**dict(options.deadlines)),
        retry=_retry(options),
        labels=dict(options.labels),
        delivery="durable" if options.durable else "immediate",
    )
    if options.json:
        print_json({"kind": "started", **msgspec.to_builtins(started)})
    elif options.detach:
        print(started.id, flush=True)  # noqa: T201  # what --detach is for
        if not started.created:
            say(await _joined(client, started.id))
    else:
        say(f"started {started.id}" if started.created else await _joined(client, started.id))
    if options.detach:
        return Exit.OK
    return await _follow(client, client.subscribe(started.id, view="text"), options)


async def _joined(client: ControlClient, stream_id: str) -> str:
    """Say that a stream was joined; and if it has ended, which may be unexpected, how to have a new one."""
    outcome = (await client.get(stream_id)).outcome
    if outcome is None:
        return f"joined {stream_id}"
    ended = f"{outcome['state']}({outcome['reason']})"
    return f"joined {stream_id}, which has ended as {ended}; --on-conflict replace starts anew"


def _retry(options: argparse.Namespace) -> RetryMessage:
    given = {"attempts": options.attempts, "resume": options.resume}
    return RetryMessage(**{name: value for name, value in given.items() if value is not None})


def _on_detach(options: argparse.Namespace) -> OnDetachMessage:
    if options.on_detach is None:
        return OnDetachMessage()
    mode, grace_s = options.on_detach
    return OnDetachMessage(mode=mode) if grace_s is None else OnDetachMessage(mode=mode, grace_s=grace_s)


def watch(options: argparse.Namespace) -> int:
    """Follow one stream, or show all of them."""
    one = options.id is not None or options.key is not None
    for name, needed, given in (
        ("--events", "--json, and an ID or --key", one and options.json),
        ("--final", "an ID or --key, and no --json (show --json tells it)", one and not options.json),
    ):
        if getattr(options, name.removeprefix("--")) and not given:
            complain(f"{name} needs {needed}")
            return Exit.USAGE
    if not one:
        return as_client(options, _watch_all, reconnect=True)
    return as_client(options, _watch, reconnect=True)


async def _watch(client: ControlClient, options: argparse.Namespace) -> int:
    after = Cursor(*options.after) if isinstance(options.after, tuple) else options.after
    view: Literal["events", "text"] = "events" if options.events else "text"
    return await _follow(
        client, client.subscribe(options.id, key=options.key, after=after, view=view), options
    )


# --- one stream ------------------------------------------------------------------------------------------------------


@attrs.define
class _Following:
    """What following one stream has come to."""

    outcome: dict[str, Any] | None = None
    choice: Choice | None = None
    scope: trio.CancelScope = attrs.field(factory=trio.CancelScope)
    """Holds the reading: cancelled to detach."""
    answered: trio.Event | None = None
    """Set while Ctrl-C's question is open: nothing is written over it."""

    async def take(self, event: EventMessage) -> None:
        """Take an event, once no question is open."""
        if self.answered is not None:
            await self.answered.wait()
        self.outcome = event.outcome


async def _follow(client: ControlClient, events: EventStream, options: argparse.Namespace) -> int:
    """Show a stream until it has ended, or until Ctrl-C has been answered with detach."""
    following = _Following()
    with trio.open_signal_receiver(signal.SIGINT) as interrupts:
        async with events, trio.open_nursery() as nursery:
            following.scope = nursery.cancel_scope
            policy: Policy = options.on_interrupt or "ask"
            nursery.start_soon(_interrupted, client, events, interrupts, policy, following)
            await _show_events(events, options, following)
            nursery.cancel_scope.cancel(reason="the stream has ended")
    if following.outcome is None and following.choice != "detach":
        stream = await client.get(events.id)  # the outcome lies before where we began
        following.outcome = stream.outcome
        if options.json and stream.outcome is not None:
            print_json({"kind": "outcome", "seq": stream.tail_seq, "outcome": stream.outcome})
    if following.outcome is not None:
        if options.final:
            _show_final((await client.snapshot(events.id)).text)
        if not options.json:
            say(f"{events.id} {told_outcome(following.outcome)}")
        return for_outcome(following.outcome["state"])
    cursor = events.cursor
    place = f" --after {cursor.epoch}:{cursor.seq}" if cursor is not None else ""
    say(f"detached; the stream goes on: stream-supervisor watch {events.id}{place}")
    return Exit.INTERRUPTED


async def _show_events(events: EventStream, options: argparse.Namespace, following: _Following) -> None:
    if options.json:
        if events.snapshot is not None:
            print_json({"kind": "snapshot", **msgspec.to_builtins(events.snapshot)})
        async for event in events:
            await following.take(event)
            print_json(msgspec.to_builtins(event))
        return
    with _status(events, silent=options.final) as status:
        if events.snapshot is not None:
            status.write(events.snapshot.text)
        async for event in events:
            await following.take(event)
            status.take(event)


class _Status:
    """Writes the text, and says on standard error what is going on besides."""

    def __init__(self, stream_id: str, spinner: Status | None, *, silent: bool) -> None:
        self._id = stream_id
        self._spinner = spinner
        self._silent = silent
        self._ends_line = True
        self._characters = 0

    def take(self, event: EventMessage) -> None:
        if event.text:
            self.write(event.text)
        elif event.kind == "attempt" and event.details is not None and event.details.get("cause"):
            details = event.details
            rung = details.get("rung") or "retry"
            if rung == "fallback":
                rung = f"fallback to {details.get('upstream')}"
            self.remark(
                f"attempt {details['attempt']} ({rung}) after {details.get('delay_s', 0):g} s ({details['cause']})"
            )
        elif event.kind == "withdrawn":
            self.remark("the text so far is withdrawn; the answer begins anew")
        elif event.kind == "skipped" and event.details is not None:
            self.remark(f"an unreadable event was skipped: {event.details.get('why', '')}")
        if self._spinner is not None:
            self._spinner.update(Text(f"{self._id}: {self._characters} characters, {event.seq} events"))

    def write(self, text: str) -> None:
        self._characters += len(text)
        if self._silent:
            return
        show_text(text)
        self._ends_line = text.endswith("\n") if text else self._ends_line

    def remark(self, message: str) -> None:
        self.end_line()
        say(f"{self._id} {message}")

    def end_line(self) -> None:
        """On a terminal, where both outputs meet, start what is said next on a line of its own."""
        if not self._ends_line and sys.stdout.isatty():
            sys.stdout.write("\n")
            sys.stdout.flush()
            self._ends_line = True


def _show_final(text: str) -> None:
    show_text(text)
    if sys.stdout.isatty() and not text.endswith("\n"):
        show_text("\n")


@contextlib.contextmanager
def _status(events: EventStream, *, silent: bool) -> Iterator[_Status]:
    """Give the writer; with a line that shows progress where the text itself goes elsewhere."""
    with contextlib.ExitStack() as stack:
        spinner = None
        if sys.stderr.isatty() and (silent or not sys.stdout.isatty()):
            spinner = stack.enter_context(console(stderr=True).status(Text(events.id)))
        status = _Status(events.id, spinner, silent=silent)
        try:
            yield status
        finally:
            status.end_line()


# --- Ctrl-C ----------------------------------------------------------------------------------------------------------


async def _interrupted(
    client: ControlClient,
    events: EventStream,
    interrupts: AsyncIterator[int],
    policy: Policy,
    following: _Following,
) -> None:
    asked = False
    async for _ in interrupts:
        choice: Choice | Literal["go on"]
        if policy == "ask":
            following.answered = trio.Event()
            choice = await _ask(interrupts, events.id)
            following.answered.set()
        else:
            choice = policy
        if choice == "go on":
            continue
        following.choice = choice
        if choice == "detach":
            following.scope.cancel(reason="detached by Ctrl-C")
            return
        say(f"cancelling {events.id}")
        try:
            # asked again, an answer that is let end by itself has had its time
            result = await client.cancel(
                events.id, reason="Ctrl-C", actor="cli", mode="abort" if asked else None, wait_s=1
            )
            asked = True
            if result.outcome == "requested":
                say("its answer is let end by itself; Ctrl-C again ends it at once")
        except ControlError as error:
            complain(f"the stream may not be cancelled: {error}")


async def _ask(interrupts: AsyncIterator[int], stream_id: str) -> Literal["detach", "cancel", "go on"]:
    """Ask on the terminal, where there is one; a further Ctrl-C, or an end of input, is `detach`."""
    if not (sys.stdin.isatty() and sys.stderr.isatty()):
        return "detach"
    answer: list[str] = []

    async def read(scope: trio.CancelScope) -> None:
        answer.append(await trio.to_thread.run_sync(sys.stdin.readline, abandon_on_cancel=True))
        scope.cancel()

    async with trio.open_nursery() as nursery:
        sys.stderr.write(
            f"\n{stream_id}: [d]etach and let it go on, [c]ancel it, or [Enter] to go on watching? "
        )
        sys.stderr.flush()
        nursery.start_soon(read, nursery.cancel_scope)
        await anext(interrupts)
        sys.stderr.write("\n")
        nursery.cancel_scope.cancel()
    said = answer[0].strip().lower() if answer and answer[0] else "d"
    if said.startswith("c"):
        return "cancel"
    return "detach" if said.startswith("d") else "go on"


# --- all streams -----------------------------------------------------------------------------------------------------


async def _watch_all(client: ControlClient, options: argparse.Namespace) -> int:
    """Show a live table; on a pipe, a line for each change."""
    live = not options.json and sys.stdout.isatty()
    seen: dict[str, tuple[str, str | None]] = {}
    code = Exit.INTERRUPTED if options.until_idle else Exit.OK  # unless they all end before Ctrl-C
    with trio.open_signal_receiver(signal.SIGINT) as interrupts, contextlib.ExitStack() as stack:
        display = stack.enter_context(Live(console=console(), auto_refresh=False)) if live else None
        async with trio.open_nursery() as nursery:
            nursery.start_soon(_until_interrupt, interrupts, nursery.cancel_scope)
            while True:
                page = await client.list(limit=_TABLE_STREAMS)
                if display is not None:
                    display.update(streams_table(page.streams), refresh=True)
                else:
                    seen = _print_changes(page.streams, seen, as_json=options.json)
                if options.until_idle and all(stream.ended_at is not None for stream in page.streams):
                    code = Exit.OK
                    break
                await trio.sleep(options.interval)
            nursery.cancel_scope.cancel(reason="no stream is live")
    return code


async def _until_interrupt(interrupts: AsyncIterator[int], scope: trio.CancelScope) -> None:
    await anext(interrupts)
    scope.cancel(reason="Ctrl-C")


def _print_changes(
    streams: tuple[StreamMessage, ...], seen: dict[str, tuple[str, str | None]], *, as_json: bool
) -> dict[str, tuple[str, str | None]]:
    """Print the streams whose state has changed, oldest first; return what is known now."""
    known: dict[str, tuple[str, str | None]] = {}
    for stream in reversed(streams):
        known[stream.id] = (stream.state, stream.reason)
        if seen.get(stream.id) == known[stream.id]:
            continue
        if as_json:
            print_json(stream)
        else:
            state = stream.state if stream.reason is None else f"{stream.state}({stream.reason})"
            print(visible(f"{stream.id} {state} {stream.upstream or '-'} {stream.key or '-'}"), flush=True)  # noqa: T201  # the command's output
    return known
