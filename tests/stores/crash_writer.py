"""A process that writes streams as fast as it can and says what it was told is durable, until it is killed.

Run as `python -m tests.stores.crash_writer PATH LIFE`. Lines: `open`, `seq ID N` (N is durable), `over ID STATE N`.
"""

from __future__ import annotations

import itertools
import sys

import trio

from supervisor.stores import Event, SQLiteStore, StoredStream


def payload(stream_id: str, seq: int) -> bytes:
    return f"{stream_id}/{seq}/".encode() * (1 + seq % 40)


def outcome(stream_id: str, state: str, seq: int) -> Event:
    return Event(1, seq, 1.0, "outcome", f"{stream_id} {state} {seq}".encode())


async def one_after_another(store: SQLiteStore, life: str, lane: int) -> None:
    for turn in itertools.count():
        stream_id = f"{life}-{lane}-{turn}"
        store.create(StoredStream(id=stream_id, key=None, created_at=0.0, head=stream_id.encode()))
        length = (lane * 7 + turn * 3) % 23
        for seq in range(1, length + 1):
            store.append(stream_id, [Event(1, seq, 1.0, "data", payload(stream_id, seq))])
            if seq % 5 == lane % 5:
                await store.wait_durable(stream_id, seq)
                say(f"seq {stream_id} {seq}")
            else:
                await trio.lowlevel.checkpoint()
        store.end(stream_id, outcome(stream_id, "completed", length + 1), state="completed", ended_at=1.0)
        await store.wait_durable(stream_id, length + 1)
        say(f"over {stream_id} completed {length + 1}")
        store.forget(stream_id)


async def main(path: str, life: str) -> None:
    store = SQLiteStore(path, commit_interval_s=0.001)
    async with trio.open_nursery() as nursery:
        await nursery.start(store.run)
        say("open")
        for stream in await store.unfinished():
            seq = stream.last_seq + 1
            store.end(stream.id, outcome(stream.id, "failed", seq), state="failed", ended_at=1.0)
            await store.wait_durable(stream.id, seq)
            say(f"over {stream.id} failed {seq}")
        for lane in range(8):
            nursery.start_soon(one_after_another, store, life, lane)


def say(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    trio.run(main, *sys.argv[1:])
