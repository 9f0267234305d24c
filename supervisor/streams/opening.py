"""Opening a supervisor for the length of a block, and everything that leaving the block means.

**Nesting.** The store's writer and the watchdog run in an outer nursery, shielded, and end last; the streams and the memory
manager run in the root nursery inside it. Leaving `open_supervisor` waits for the live streams, as leaving a nursery waits for its children; an
exception in the block ends them as `cancelled(shutdown)` first. A stream never raises into the root nursery, so what comes
out of the block is the block's own exception, unwrapped, or the embedding program's own `Cancelled`.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Sequence

import trio

from supervisor.dialects import Dialect
from supervisor.errors import ConfigurationError, StoreError
from supervisor.stores.base import Store
from supervisor.stores.memory import MemoryStore
from supervisor.streams.spec import CircuitReport, Deadlines, IdFactory, Limits, MemoryPolicy
from supervisor.streams.supervisor import Supervisor

__all__ = ["open_supervisor"]

_log = logging.getLogger("supervisor.streams")


@contextlib.asynccontextmanager
async def open_supervisor(
    *,
    store: Store | None = None,
    limits: Limits | None = None,
    deadlines: Deadlines | None = None,
    memory: MemoryPolicy | None = None,
    dialects: Sequence[Dialect] = (),
    circuits: CircuitReport | None = None,
    new_id: IdFactory | None = None,
) -> AsyncIterator[Supervisor]:
    """Open a supervisor for the length of an `async with` block.

    `store` defaults to one in memory; with a durable one, streams that a crash interrupted are first given the outcome
    `failed(interrupted)`. `dialects` adds to those built in. `circuits` is asked, by `Supervisor.health`, for the state of the
    upstreams' circuits: give it `supervisor.upstream.Circuits.report`.

    Leaving the block waits for the live streams, as a nursery does (`shutdown` ends them instead). An exception in the block
    ends them as `cancelled(shutdown)` and then comes out as it was raised. If the block is cancelled from outside, its
    streams end the same way, and `trio.Cancelled` passes on once their outcomes are durable, which is shielded and bounded by
    `Limits.settle_s`. Raises StoreError if the store cannot be opened, ConfigurationError for an option that is no such thing.
    """
    for name, value, kind in (
        ("limits", limits, Limits),
        ("deadlines", deadlines, Deadlines),
        ("memory", memory, MemoryPolicy),
    ):
        if value is not None and not isinstance(value, kind):
            raise ConfigurationError(name, value, f"a {kind.__name__}(…), or None")
    if store is not None and not callable(getattr(store, "run", None)):
        raise ConfigurationError(
            "store", store, "a store, such as SQLiteStore('streams.db') or MemoryStore()"
        )
    chosen_store = MemoryStore() if store is None else store
    housekeeping = trio.CancelScope(shield=True)
    try:
        async with trio.open_nursery() as outer, _closing(chosen_store, housekeeping):
            # A start that is cancelled half-way would leave the store running.
            with trio.CancelScope(shield=True):
                await outer.start(_run_store, chosen_store)
            await trio.lowlevel.checkpoint()
            async with trio.open_nursery() as root:
                supervisor = Supervisor(
                    root,
                    store=chosen_store,
                    limits=Limits() if limits is None else limits,
                    deadlines=Deadlines() if deadlines is None else deadlines,
                    memory=MemoryPolicy() if memory is None else memory,
                    dialects=dialects,
                    circuits=circuits,
                    new_id=new_id,
                )
                await supervisor.recover()
                # The watchdog outlives a cancel of the block: it bounds how long streams take to end because of it.
                outer.start_soon(_keep, housekeeping, supervisor.watchdog.run, name="watchdog")
                root.start_soon(supervisor.memory.run, name="memory manager")  # noqa: ASYNC113  # nothing to set up
                try:
                    yield supervisor
                except BaseException:
                    with trio.CancelScope(shield=True):
                        await supervisor.shutdown(actor="parent")
                    raise
                await supervisor.close()
    except BaseExceptionGroup as group:
        _reraise(group)
        raise


@contextlib.asynccontextmanager
async def _closing(store: Store, housekeeping: trio.CancelScope) -> AsyncIterator[None]:
    """End the housekeeping and close the store after a block, whatever ended it, without hiding why it ended."""
    try:
        yield
    except BaseException as error:
        housekeeping.cancel()
        with trio.CancelScope(shield=True):
            try:
                await store.aclose()
            except StoreError as lost:
                _log.error("the store could not be closed well: %s", lost)  # the error says it all
                for leaf in _leaves(error):
                    if not isinstance(leaf, trio.Cancelled):
                        leaf.add_note(f"and the store could not be closed well: {lost}")
        raise
    housekeeping.cancel()
    with trio.CancelScope(shield=True):
        await store.aclose()


async def _keep(scope: trio.CancelScope, run: Callable[[], Awaitable[object]]) -> None:
    with scope:
        await run()


async def _run_store(store: Store, *, task_status: trio.TaskStatus[None]) -> None:  # noqa: ASYNC128  # `run` reports as started
    """Run the store out of reach of the embedding program's cancel: it is ended by `aclose`, after the streams."""
    with trio.CancelScope(shield=True):
        await store.run(task_status=task_status)


def _reraise(group: BaseExceptionGroup[BaseException]) -> None:
    """Raise a group's one exception by itself, or the first of several that say the same; else return."""
    leaves = list(_leaves(group))
    if len(leaves) == 1 or any(
        all(isinstance(leaf, kind) for leaf in leaves) for kind in (trio.Cancelled, StoreError)
    ):
        leaf = leaves[0]
        context = leaf.__context__
        try:
            raise leaf
        finally:
            leaf.__context__ = (
                context  # not the group: the nurseries in between are no part of the caller's story
            )
            del leaf, leaves, group


def _leaves(error: BaseException) -> Iterable[BaseException]:
    if isinstance(error, BaseExceptionGroup):
        for part in error.exceptions:
            yield from _leaves(part)
    else:
        yield error
