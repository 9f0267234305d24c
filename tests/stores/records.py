"""What the store tests write: streams and events with contents that tell them apart."""

from __future__ import annotations

from contextlib import asynccontextmanager
from itertools import count
from typing import TYPE_CHECKING

import trio

from supervisor.stores import Event, Retention, Store, StoredStream

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable


def head(stream_id: str, key: str | None = None, *, tenant: str | None = None) -> StoredStream:
    about = f'{{"of":"{stream_id}"}}'.encode()
    return StoredStream(id=stream_id, key=key, tenant=tenant, created_at=1000.0, head=about)


def event(seq: int, *, epoch: int = 1, kind: str = "data", size: int = 0, name: str = "") -> Event:
    payload = f"{epoch}:{seq}:{kind}".encode().ljust(size, b".")
    return Event(epoch=epoch, seq=seq, at=1000.0 + seq / 8, kind=kind, payload=payload, name=name)


def events(first: int, last: int, *, epoch: int = 1, size: int = 0) -> list[Event]:
    return [event(seq, epoch=epoch, size=size) for seq in range(first, last + 1)]


def write_ended(
    store: Store, stream_id: str, count: int, *, key: str | None = None, ended_at: float = 2000.0, **options
):
    """Enqueue a whole stream: its head, `count` events and an outcome."""
    state = options.pop("state", "completed")
    store.create(head(stream_id, key, tenant=options.pop("tenant", None)))
    store.append(stream_id, events(1, count, **options))
    store.end(stream_id, event(count + 1, kind="outcome"), state=state, ended_at=ended_at)


@asynccontextmanager
async def opened(store: Store) -> AsyncIterator[Store]:
    """Run a store for the body and close it after, as a supervisor does. All within 30 s, so that nothing hangs."""
    with trio.fail_after(30):
        async with trio.open_nursery() as nursery:
            await nursery.start(store.run)
            try:
                yield store
            finally:
                with trio.move_on_after(5, shield=True):
                    await store.aclose()


async def until(condition: Callable[[], bool]) -> None:
    """Let other tasks and threads go on until a condition holds; fails after 10 s."""
    with trio.fail_after(10):
        for _ in count():
            if condition():
                return
            await trio.lowlevel.checkpoint()


async def pruned(store: Store, *, ended_before: float | None = None, limit: int = 1000, **keep) -> int:
    """Prune by the limits given; return how many streams went."""
    if ended_before is not None:
        keep["max_age_s"] = 0
    return (await store.prune(Retention(**keep), now=ended_before, limit=limit)).streams
