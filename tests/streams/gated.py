"""A store whose commits happen when the test says so: to stand between an outcome and its durability."""

from __future__ import annotations

import trio

from supervisor.errors import StoreError
from supervisor.stores import MemoryStore


class GatedStore(MemoryStore):
    """Nothing enqueued after `hold` is durable before `release`; after `break_down` nothing ever is."""

    def __init__(self) -> None:
        super().__init__()
        self._gate = trio.Event()
        self._gate.set()
        self._held_from: dict[str, int] = {}
        self._broken: StoreError | None = None
        self.behind = False
        self._caught_up = trio.Event()
        self.trouble: str | None = None

    def hold(self) -> None:
        """From now on nothing new becomes durable."""
        self._held_from = {
            position.stream_id: super(GatedStore, self).durable_seq(position.stream_id)
            for position in self._positions
        }
        self._gate = trio.Event()

    def release(self) -> None:
        """Let everything become durable."""
        self._gate.set()

    def break_down(self) -> None:
        """Fail every wait from now on."""
        self._broken = StoreError("the disk is gone")
        self._gate.set()

    def durable_seq(self, stream_id: str) -> int:
        actual = super().durable_seq(stream_id)
        return actual if self._gate.is_set() else min(actual, self._held_from.get(stream_id, 0))

    async def wait_durable(self, stream_id: str, seq: int) -> None:
        if not self._gate.is_set() and seq > self._held_from.get(stream_id, -1):
            await self._gate.wait()
        if self._broken is not None:
            raise self._broken
        await super().wait_durable(stream_id, seq)

    @property
    def failing(self) -> str | None:
        return self.trouble

    @property
    def congested(self) -> bool:
        return self.behind

    async def wait_flow(self) -> None:
        if self.behind:
            await self._caught_up.wait()
        await trio.lowlevel.checkpoint()

    def catch_up(self) -> None:
        self.behind = False
        self._caught_up.set()
