"""SIGKILL of the daemon at random moments under load, again and again, on one store.

A client starts streams of every kind and keeps what it is told: outcomes, events, and how far they were durable. After each
restart on the same store

- a stream that it was told is over, is over in the same way, to the last field of the outcome, then and ever after;
- every other stream that it was told was started has an outcome: `failed(interrupted)`, or one that it had not heard of;
- what it was told was durable is there, and is what the provider sent, byte for byte, without a gap;
- the outcome is the last record of a journal, and there is one.

The seed is printed; `STREAM_SUPERVISOR_SEED` replays it (the moments, not the machine's timing), `STREAM_SUPERVISOR_KILLS` is
how often.
"""

from __future__ import annotations

import os
import random
import secrets
import time
from pathlib import Path
from typing import Any

import attrs
import pytest
import trio

from supervisor.control import ControlClient, EventMessage, connect
from supervisor.errors import ControlError
from supervisor.testing.upstream import script_for_model
from tests.e2e.processes import TOKEN, Daemon, daemon, simulated_upstream, start_daemon

KILLS = int(os.environ.get("STREAM_SUPERVISOR_KILLS", "50"))
SEED = os.environ.get("STREAM_SUPERVISOR_SEED") or secrets.token_hex(8)
STREAMS = 20
MAX_S = 300.0
MODELS = (
    "sim/ok?tokens=5",
    "sim/ok?tokens=400&key=long",
    "sim/paced?tokens=30&interval_s=0.005",
    "sim/paced?tokens=400&interval_s=0.002",
    "sim/endless?interval_s=0.002",
    "sim/endless?interval_s=0.01&events_per_write=20",
    "sim/end?after=7&interval_s=0.01",
    "sim/drop?after=20&interval_s=0.005",
    "sim/error?after=10&interval_s=0.005",
    "sim/500",
    "sim/stall?after=3",
)


@attrs.define
class Told:
    """What a client was told of one stream."""

    id: str
    model: str
    durable_delivery: bool
    outcome: dict[str, Any] | None = None
    events: dict[int, tuple[str, str]] = attrs.field(factory=dict)
    """By seq: the kind and what it carried."""
    durable_seq: int = 0
    """The highest position that it was told was durable, in whatever way."""

    def take(self, event: EventMessage) -> None:
        if event.kind == "outcome":
            assert event.outcome is not None
            self.over(event.outcome)
            return
        self.events[event.seq] = content(event)
        if self.durable_delivery:
            self.durable_seq = max(self.durable_seq, event.seq)

    def over(self, outcome: dict[str, Any]) -> None:
        assert self.outcome in (None, outcome), "two outcomes"
        self.outcome = outcome
        self.durable_seq = max(self.durable_seq, outcome["last_seq"])


def content(event: EventMessage) -> tuple[str, str]:
    return event.kind, f"{event.data}{event.details}"


# --- the load --------------------------------------------------------------------------------------------------------


async def load(process: Daemon, chance: random.Random, told: list[Told]) -> None:
    """Start streams, watch them, cancel some, and kill the daemon in the middle of it."""
    moment = chance.uniform(0.0, 0.5)
    durable = chance.choice((0.0, 0.5))  # where some wait for it, everything is committed at once
    with trio.fail_after(30):
        async with trio.open_nursery() as nursery:
            try:
                async with connect(process.url, TOKEN) as client, trio.open_nursery() as inner:
                    for _ in range(STREAMS):
                        inner.start_soon(one_stream, client, random.Random(chance.random()), durable, told)
                    inner.start_soon(look, client, told)
                    nursery.start_soon(kill_after, moment, process)
                    await trio.sleep_forever()
            except* ControlError:
                pass  # the daemon is gone
    process.process.wait(10)


async def kill_after(seconds: float, process: Daemon) -> None:
    await trio.sleep(seconds)
    process.process.kill()


async def one_stream(client: ControlClient, chance: random.Random, share: float, told: list[Told]) -> None:
    """Start a stream and follow it; half of them are also cancelled at some moment."""
    await trio.sleep(chance.uniform(0.0, 0.2))
    model, durable = chance.choice(MODELS), chance.random() < share
    started = await client.start("sim", {"model": model}, delivery="durable" if durable else "immediate")
    stream = Told(started.id, model, durable)
    told.append(stream)
    async with trio.open_nursery() as nursery:
        if chance.random() < 0.5:
            nursery.start_soon(cancel_after, chance.uniform(0.0, 0.3), client, stream)
        async with client.subscribe(stream.id) as events:
            async for event in events:
                stream.take(event)


async def cancel_after(seconds: float, client: ControlClient, stream: Told) -> None:
    await trio.sleep(seconds)
    result = await client.cancel(stream.id)
    if result.outcome in {"won", "already_terminal"}:
        info = await client.get(stream.id)
        assert info.outcome is not None
        assert (result.state, result.reason) == (info.outcome["state"], info.outcome["reason"])
        stream.over(info.outcome)


async def look(client: ControlClient, told: list[Told]) -> None:
    """Ask again and again how far each stream is durable."""
    while True:
        page = await client.list(limit=STREAMS * 2)
        by_id = {stream.id: stream for stream in told}
        for info in page.streams:
            if info.id in by_id:
                stream = by_id[info.id]
                stream.durable_seq = max(stream.durable_seq, info.durable_seq)
                if info.outcome is not None:
                    stream.over(info.outcome)
        await trio.sleep(0.01)


# --- what must hold after a restart ----------------------------------------------------------------------------------


async def verify(client: ControlClient, stream: Told) -> dict[str, Any]:
    """Hold what is recorded against what was told; return the outcome."""
    info, snapshot = await client.get(stream.id), await client.snapshot(stream.id)
    outcome = info.outcome
    assert outcome is not None, f"{stream.id} has no outcome"
    if stream.outcome is not None:
        assert stream.outcome == outcome
    async with client.subscribe(stream.id) as events:
        recorded = [event async for event in events]
    assert [event.seq for event in recorded] == list(range(1, len(recorded) + 1))
    assert [event.kind for event in recorded].count("outcome") == 1
    assert recorded[-1].outcome == outcome
    assert outcome["last_seq"] == len(recorded)
    interrupted = outcome["reason"] == "interrupted"
    kept = len(recorded) - interrupted  # the interrupted outcome took the place of what was not durable
    assert kept >= stream.durable_seq, f"{stream.durable_seq} events were durable and {kept} are left"
    for event in recorded[:-1]:
        assert stream.events.get(event.seq, content(event)) == content(event)
    script = script_for_model(stream.model)
    assert script is not None
    words = sum(bool(event.text) for event in recorded)
    assert snapshot.text == "".join(event.text for event in recorded) == script.expected_text(words)
    if outcome["state"] == "completed":
        assert snapshot.text == script.expected_text()
    return outcome


async def verify_all(
    process: Daemon, told: list[Told], settled: dict[str, dict[str, Any]], sample: list[str]
) -> None:
    """Verify the last round's streams; those of a sample of earlier rounds must be what they were."""
    with trio.fail_after(30):
        async with connect(process.url, TOKEN) as client:
            for stream in told:
                settled[stream.id] = await verify(client, stream)
            for stream_id in sample:
                assert (await client.get(stream_id)).outcome == settled[stream_id]


async def verify_history(process: Daemon, settled: dict[str, dict[str, Any]]) -> int:
    """Every stream that was ever recorded, told of or not, is over, and in the way it was after its round."""
    count, before = 0, None
    with trio.fail_after(30):
        async with connect(process.url, TOKEN) as client:
            while True:
                page = await client.list(limit=500, before=before)
                for info in page.streams:
                    assert info.outcome is not None
                    assert settled.get(info.id, info.outcome) == info.outcome
                count, before = count + len(page.streams), page.next
                if before is None:
                    return count


@pytest.mark.slow
def test_sigkill(tmp_path: Path) -> None:
    """Fifty times: what was told to be over is over in the same way, the rest is interrupted with its durable prefix."""
    print(f"\nSTREAM_SUPERVISOR_SEED={SEED} STREAM_SUPERVISOR_KILLS={KILLS}")
    chance = random.Random(SEED)
    settled: dict[str, dict[str, Any]] = {}
    told: list[Told] = []
    reasons: dict[str, int] = {}
    over = unheard = 0
    until = time.monotonic() + MAX_S
    with simulated_upstream(tmp_path) as base_url:
        for kill in range(KILLS):
            assert time.monotonic() < until, f"only {kill} kills in {MAX_S:g} s"
            interval_s = chance.choice((0.02, 0.1))
            config = f"[store]\ncommit_interval_s = {interval_s}\n"
            with daemon(tmp_path, base_url, config=config) as process:
                earlier = chance.sample(sorted(settled), min(20, len(settled)))
                trio.run(verify_all, process, told, settled, earlier)
                told = []
                trio.run(load, process, chance, told)
            over += sum(stream.outcome is not None for stream in told)
            unheard += sum(stream.outcome is None for stream in told)
        process = start_daemon(tmp_path, base_url)
        try:
            trio.run(verify_all, process, told, settled, [])
            count = trio.run(verify_history, process, settled)
        finally:
            process.end()
    for outcome in settled.values():
        name = f"{outcome['state']}({outcome['reason']})"
        reasons[name] = reasons.get(name, 0) + 1
    print(
        f"{KILLS} kills, {count} streams recorded, {over} told over, {unheard} not: {dict(sorted(reasons.items()))}"
    )
    assert count >= len(settled) == over + unheard
    if KILLS >= 10:  # otherwise nothing was shown
        assert reasons.get("failed(interrupted)", 0) >= KILLS
        assert over >= KILLS
