"""The commands that ask the daemon one thing and print the answer."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

from supervisor.cli.connecting import as_client
from supervisor.cli.exits import Exit
from supervisor.cli.render import (
    complain,
    console,
    duration,
    fields_table,
    moment,
    print_json,
    say,
    show_text,
    streams_table,
    styled_state,
    table,
    told_outcome,
)
from supervisor.control import CancelResultMessage, ControlClient, StreamMessage
from supervisor.errors import GapError

__all__ = ["cancel", "drain", "health", "list_streams", "reap", "show", "shutdown", "stats"]

_PAGE = 500


def list_streams(options: argparse.Namespace) -> int:
    """Print a page of streams."""
    return as_client(options, _list)


async def _list(client: ControlClient, options: argparse.Namespace) -> int:
    found: list[StreamMessage] = []
    before = options.before
    while True:
        page = await client.list(
            states=options.states,
            labels=dict(options.labels) or None,
            key=options.key,
            upstream=options.upstream,
            tenant=options.tenant,
            live=options.live,
            before=before,
            limit=min(options.limit - len(found), _PAGE),
        )
        found += page.streams
        before = page.next
        if before is None or len(found) >= options.limit:
            break
    if options.json:
        for stream in found:
            print_json(stream)
    else:
        console().print(streams_table(found, after=before))
    return Exit.OK


def show(options: argparse.Namespace) -> int:
    """Print all that is known of one stream."""
    if _missing_selector(options):
        return Exit.USAGE
    return as_client(options, _show)


async def _show(client: ControlClient, options: argparse.Namespace) -> int:
    stream = await client.get(options.id, key=options.key)
    snapshot = await client.snapshot(stream.id)
    if options.json:
        told = {"stream": msgspec.to_builtins(stream), "snapshot": msgspec.to_builtins(snapshot)}
        print_json({"id": stream.id, **told})
        return Exit.OK
    attempts = await _attempts(client, stream)
    console().print(
        fields_table(
            {
                "id": stream.id,
                "key": stream.key,
                "state": styled_state(stream.state),
                "outcome": told_outcome(stream.outcome),
                **({} if stream.tenant is None else {"tenant": stream.tenant}),
                "upstream": stream.upstream,
                "dialect": stream.dialect,
                "labels": stream.labels,
                "meta": stream.meta,
                "started": moment(stream.created_at),
                "ended": moment(stream.ended_at) or "-",
                "lasted": duration(stream.age_s),
                "attempts": attempts,
                **({"joined at": snapshot.joined_at} if snapshot.joined_at else {}),
                "events": f"{stream.events} read, {stream.skipped} unreadable",
                "journal": f"epoch {stream.epoch}, {stream.tail_seq} events, {stream.durable_seq} durable",
                "readers": stream.readers,
                "held": f"{stream.bytes_held} bytes, {stream.pending_bytes} of them not durable yet",
                "finish reason": snapshot.finish_reason,
                "usage": snapshot.usage or "-",
                "model": snapshot.model,
            }
        )
    )
    for title, text in (
        ("reasoning", snapshot.reasoning),
        ("refusal", snapshot.refusal),
        ("text", snapshot.text),
    ):
        if text:
            show_text(f"\n--- {title}\n{text}\n")
    for call in snapshot.tool_calls:
        show_text(f"\n--- tool call {call.name} [{call.id}]\n{call.arguments}\n")
    return Exit.OK


async def _attempts(client: ControlClient, stream: StreamMessage) -> str:
    """Tell each attempt, of which upstream it was, and whose text holds; of a single one nothing but that it was one.

    That stands in the journal only, so the journal of a stream with several attempts is read through: of one that has ended
    its text, of a live one every event up to now.
    """
    rungs: Sequence[str] = (stream.outcome or {}).get("rungs") or ()
    if stream.attempts < 2 and not rungs:
        return str(stream.attempts)
    told: list[str] = []
    holding: set[int] = set()
    withdrawn: set[int] = set()
    try:
        async with client.subscribe(
            stream.id, view="events" if stream.ended_at is None else "text"
        ) as events:
            async for event in events:
                if event.kind == "attempt" and event.details is not None:
                    told.append(f"{event.details.get('rung') or 'first'} at {event.details.get('upstream')}")
                elif event.kind == "withdrawn":
                    withdrawn |= holding
                    holding.clear()
                elif event.text:
                    holding.add(len(told) - 1)
                if event.seq >= stream.tail_seq:
                    break
    except GapError:
        return f"{stream.attempts} ({', '.join(rungs)})"
    return ", ".join(
        what + (": answered" if number in holding else ": withdrawn" if number in withdrawn else "")
        for number, what in enumerate(told)
    )


def cancel(options: argparse.Namespace) -> int:
    """Cancel by id, key, labels or all."""
    chosen = [options.id is not None, options.key is not None, bool(options.labels), options.all]
    if sum(chosen) != 1:
        complain("cancel needs exactly one of: an ID, --key, --label (any number), --all")
        return Exit.USAGE
    return as_client(options, _cancel)


async def _cancel(client: ControlClient, options: argparse.Namespace) -> int:
    how: dict[str, Any] = {
        "reason": options.reason,
        "mode": options.mode,
        "drain_s": options.drain_s,
        "drain_tokens": options.drain_tokens,
        "wait_s": options.wait_s,
    }
    results: tuple[CancelResultMessage, ...]
    if options.id is not None or options.key is not None:
        results = (await client.cancel(options.id, key=options.key, **how),)
    else:
        results = await client.cancel_many(
            labels=dict(options.labels) or None, all_streams=options.all, **how
        )
    if options.json:
        for result in results:
            print_json(result)
    elif not results:
        say("nothing matched: no live stream has these labels" if options.labels else "no stream is live")
    else:
        rows = ((r.id, r.key, r.outcome, styled_state(r.state or "-"), r.reason or "") for r in results)
        console().print(table(("id", "key", "cancel", "state", "reason"), rows))
    unrecorded = [result for result in results if result.error]
    for result in unrecorded:
        complain(f"{result.id}: {result.error}")
    return Exit.FAILURE if unrecorded else Exit.OK


def stats(options: argparse.Namespace) -> int:
    """Print the daemon's figures."""
    return as_client(options, _stats)


async def _stats(client: ControlClient, options: argparse.Namespace) -> int:
    _fields(await client.stats(), options)
    return Exit.OK


def health(options: argparse.Namespace) -> int:
    """Print whether the daemon is well."""
    return as_client(options, _health)


async def _health(client: ControlClient, options: argparse.Namespace) -> int:
    told = await client.health()
    _fields(told, options)
    return Exit.OK if told.get("status") == "ok" else Exit.FAILURE


def reap(options: argparse.Namespace) -> int:
    """Run the memory manager, or ask what it would do."""
    return as_client(options, _reap)


async def _reap(client: ControlClient, options: argparse.Namespace) -> int:
    report = await client.reap(dry_run=options.dry_run)
    if options.json:
        print_json(report)
        return Exit.OK
    if report.reaped or report.spilled:
        rows = (
            (
                one.id,
                one.key,
                one.reason,
                duration(one.age_s),
                duration(one.idle_s),
                one.bytes_held,
                one.message,
            )
            for one in (*report.spilled, *report.reaped)
        )
        console().print(table(("id", "key", "reason", "age", "idle", "bytes", "why"), rows))
    verb = "would be" if report.dry_run else "were"
    spilled = f", {len(report.spilled)} spilled" if report.spilled else ""
    say(f"{len(report.reaped)} {verb} reaped{spilled}")
    if not report.dry_run and (open_ends := sum(not one.settled for one in report.reaped)):
        say(f"{open_ends} of them had no durable outcome yet")
    return Exit.OK


def drain(options: argparse.Namespace) -> int:
    """Let the daemon start nothing more, and wait."""
    return as_client(options, _drain)


async def _drain(client: ControlClient, options: argparse.Namespace) -> int:
    live = await client.drain(timeout_s=options.timeout)
    if options.json:
        print_json({"live": live})
    else:
        say("drained: no stream is live" if not live else f"{live} streams are still live")
    return Exit.NOT_COMPLETED if live else Exit.OK


def shutdown(options: argparse.Namespace) -> int:
    """End the daemon."""
    return as_client(options, _shutdown)


async def _shutdown(client: ControlClient, options: argparse.Namespace) -> int:
    result = await client.shutdown(grace_s=options.grace)
    if options.json:
        print_json(result)
    else:
        say("the daemon is shutting down")
    return Exit.OK


def _fields(told: Mapping[str, Any], options: argparse.Namespace) -> None:
    if options.json:
        print_json(told)
    else:
        console().print(fields_table(told))


def _missing_selector(options: argparse.Namespace) -> bool:
    if options.id is None and options.key is None:
        complain("which stream? give its ID, or --key")
        return True
    return False
