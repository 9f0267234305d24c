"""SIGKILL at random moments: what was reported durable is there and the same, and the rest is a prefix."""

from __future__ import annotations

import os
import random
import signal
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest
import trio

from supervisor.stores import SQLiteStore

from .crash_writer import outcome, payload
from .records import opened

ROOT = Path(__file__).resolve().parents[2]
LIVES = 5


def live_and_die(path: Path, life: int, lines: int) -> list[list[str]]:
    """Run a writer until it has said so many lines, kill it, and return all it said (whole lines only)."""
    command = [sys.executable, "-m", "tests.stores.crash_writer", str(path), f"life{life}"]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, cwd=ROOT, env={**os.environ, "PYTHONPATH": "."}
    ) as writer:
        assert writer.stdout is not None
        said = []
        try:
            while len(said) < lines and (line := writer.stdout.readline()):
                said.append(line)
        finally:
            writer.send_signal(signal.SIGKILL)
        said += writer.stdout.readlines()
    assert writer.returncode == -signal.SIGKILL
    return [line.decode().split() for line in said if line.endswith(b"\n")]


async def check(path: Path, reached: dict[str, int], over: dict[str, tuple[str, int]]) -> None:
    async with opened(SQLiteStore(path)) as store:
        ended = {stream.id: stream for stream in await store.list(limit=1_000_000)}
        live = {stream.id: stream for stream in await store.unfinished()}
        assert not ended.keys() & live.keys()
        for stream_id, (state, seq) in over.items():
            stream = ended[stream_id]
            assert (state, seq, outcome(stream_id, state, seq).payload) == (
                stream.state,
                stream.last_seq,
                stream.outcome,
            )
        for stream_id, seq in reached.items():
            assert (ended.get(stream_id) or live[stream_id]).last_seq >= seq
        for stream in (*ended.values(), *live.values()):
            events = await store.read(stream.id, after_seq=0, limit=1000)
            assert list(range(1, stream.last_seq + 1)) == [event.seq for event in events]
            assert stream.head == stream.id.encode()
            for event in events:
                if event.kind == "outcome":
                    assert stream.state is not None
                    assert (outcome(stream.id, stream.state, stream.last_seq)) == event
                else:
                    assert payload(stream.id, event.seq) == event.payload
            kinds = [event.kind for event in events]
            assert (stream.state is not None) == (kinds[-1:] == ["outcome"])
            assert "outcome" not in kinds[:-1]
    connection = sqlite3.connect(path)
    assert connection.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
    connection.close()


@pytest.mark.slow
async def test_a_killed_writer_leaves_a_prefix_and_no_second_outcome(tmp_path):
    """Three files, each written by five processes in turn that are killed; the next life ends what the last left."""
    seed = random.SystemRandom().randrange(1 << 32)
    print(f"seed {seed}")  # shown when it fails
    choose = random.Random(seed)

    async def one_file(name: str) -> None:
        reached: dict[str, int] = {}
        over: dict[str, tuple[str, int]] = {}
        for life in range(LIVES):
            lines = choose.choice([1, 2, choose.randrange(3, 30), choose.randrange(30, 400)])
            if life == LIVES - 1:
                lines = 200  # so that each file has seen some outcomes
            said = await trio.to_thread.run_sync(live_and_die, tmp_path / name, life, lines)
            assert said[0] == ["open"]
            for word, stream_id, *rest in said[1:]:
                if word == "seq":
                    reached[stream_id] = int(rest[0])
                else:
                    assert stream_id not in over, "a second outcome was reported"
                    over[stream_id] = (rest[0], int(rest[1]))
            await check(tmp_path / name, reached, over)
        assert over

    async with trio.open_nursery() as nursery:
        for index in range(3):
            nursery.start_soon(one_file, f"store{index}.db")
