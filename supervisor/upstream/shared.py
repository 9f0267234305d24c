"""One task that reads all sockets: the driver of every streaming body where the platform has epoll or kqueue.

**Why.** Streams are slow and many: each read finds one event. A loop in each stream's task then pays, for that one event, a
failed or fresh registration with trio's poller, a reschedule and a task switch, several times what reading and decoding it
costs. Here one task waits for one epoll of its own (trio waits for that epoll's file descriptor), reads each ready socket
once, and hands the bytes on in a plain call: framing, wire events, dialect and journal run in the reader's step. With many
busy sockets a turn of the loop finds many of them ready, and its price is shared.

**Whose it is.** The stream still owns its nursery, its clocks and its cancel scope; its task is parked in `read` meanwhile, and
is rescheduled once, with the result or the error. What may happen to a socket that is being read:

| what | who | then |
|---|---|---|
| the body ends, breaks, or `take` wants no more | the reader, in its step | the socket leaves, the task goes on with the result |
| `take` raises | the reader, in its step | the socket leaves, the exception is the task's: nobody else's |
| the task is cancelled | trio, calling the abort function | the socket leaves in that call; the task gets its Cancelled |
| the task is cancelled from within `take` (a seal does that) | as above | the abort waits: `take` returns, and the task goes on with the result |
| the connection is closed here (`abort`) | whoever calls it | the socket leaves first, so that no number is ever another's |

Nothing is called for a socket that has left, because the only way to a `take` is the table it has left.

**Fairness.** One read per socket and turn, a small one where others wait as well, and no more than `TURN_BYTES` in all before other tasks get theirs; sockets that were
ready and not reached come first in the next turn. epoll is level-triggered: what is not read is found again.

**Moderation.** With hundreds of streams whose events come evenly, each would wake the loop for itself, and a turn of the loop
costs more than the event. So the reader wakes no more often than once in `MODERATION_S`, as network cards moderate their
interrupts: at rest an event is read at once, under load a wake-up finds several, and none waits longer than that. Only
where time is real: a virtual clock must not be waited for.

The reader's task is a system task of the trio run: it holds nothing of anybody's, starts with the first socket and ends when
the transport is closed or the run is over. If it should fail, its sockets fail with it, and the next one starts another.
"""

from __future__ import annotations

import logging
import math
import select
import socket
from collections.abc import Callable, Sequence
from typing import Any, Final, Protocol

import attrs
import outcome
import trio

__all__ = [
    "Body",
    "EpollPoller",
    "KqueuePoller",
    "Poller",
    "SharedReader",
    "platform_poller",
    "shared_reading_works",
]

TURN_BYTES: Final = 256 << 10
"""How much one turn of the reader reads before other tasks run."""
FEW: Final = 2
SHARED_READ_BYTES: Final = 16 << 10
"""The most that one read returns where more than `FEW` sockets are ready: what a flood brings is worked through before the next
socket's event is looked at."""
MODERATION_S: Final = 0.001
"""The least time between two wake-ups of the reader, in seconds: what comes sooner than that after one waits for the next."""

_log = logging.getLogger("supervisor.upstream")


def shared_reading_works() -> bool:
    """Whether this platform has what the shared reader needs. Elsewhere each stream reads for itself."""
    return hasattr(select, "epoll") or hasattr(select, "kqueue")


class Body(Protocol):
    """What is read: a body on a connection."""

    @property
    def socket(self) -> socket.socket:
        """The raw, non-blocking socket."""
        ...

    def feed_read(self, raw: bytes) -> bool | None:
        """Take what one read of the socket brought (`b""`: its end of file).

        None: go on. True: enough for now. False: the body has ended well. Raises what ended it otherwise.
        """
        ...


class Poller(Protocol):
    """Tells which of many sockets can be read."""

    def add(self, fd: int) -> None:
        """Watch a socket, from now until `remove`."""
        ...

    def remove(self, fd: int) -> None:
        """Watch it no longer. It is still open."""
        ...

    def ready(self) -> Sequence[int]:
        """Return sockets that can be read now, without waiting; those not read are returned again."""
        ...

    async def wait(self) -> None:
        """Wait until there may be some. A checkpoint."""
        ...

    def close(self) -> None:
        """Be of no more use."""
        ...


class EpollPoller:
    """The poller of Linux."""

    __slots__ = ("_epoll",)

    def __init__(self) -> None:
        self._epoll = select.epoll()

    def add(self, fd: int) -> None:
        """Watch a socket."""
        self._epoll.register(fd, select.EPOLLIN)

    def remove(self, fd: int) -> None:
        """Watch it no longer."""
        self._epoll.unregister(fd)

    def ready(self) -> Sequence[int]:
        """Return sockets that can be read, have ended or are broken."""
        return [fd for fd, _ in self._epoll.poll(0)]

    async def wait(self) -> None:
        """Wait until there are some: an epoll is readable when one of its own is."""
        await trio.lowlevel.wait_readable(self._epoll.fileno())

    def close(self) -> None:
        """Close the epoll; the sockets are not its."""
        self._epoll.close()


class KqueuePoller:
    """The poller of macOS and the BSDs. It has been tested with a pretended kqueue, and not yet been run on one."""

    __slots__ = ("_kqueue", "_select")

    MOST_EVENTS: Final = 1024
    """What one look returns; those that had no place are the first of the next."""

    def __init__(self) -> None:
        self._select: Any = select  # typeshed has kqueue for these platforms only
        self._kqueue = self._select.kqueue()

    def add(self, fd: int) -> None:
        """Watch a socket."""
        self._change(fd, self._select.KQ_EV_ADD)

    def remove(self, fd: int) -> None:
        """Watch it no longer."""
        self._change(fd, self._select.KQ_EV_DELETE)

    def ready(self) -> Sequence[int]:
        """Return sockets that can be read, have ended or are broken."""
        return [event.ident for event in self._kqueue.control(None, self.MOST_EVENTS, 0)]

    async def wait(self) -> None:
        """Wait until there are some: a kqueue may be watched by another, which is how trio waits."""
        await trio.lowlevel.wait_readable(self._kqueue.fileno())

    def close(self) -> None:
        """Close the kqueue; the sockets are not its."""
        self._kqueue.close()

    def _change(self, fd: int, how: int) -> None:
        self._kqueue.control([self._select.kevent(fd, self._select.KQ_FILTER_READ, how)], 0)


def platform_poller() -> Poller:
    """Return a poller of this platform's own kind."""
    return EpollPoller() if hasattr(select, "epoll") else KqueuePoller()


@attrs.define(eq=False)
class _Reading:
    """A socket in the table: its body, and the task that is parked until it leaves."""

    body: Body
    fd: int
    recv: Callable[[int], bytes]
    task: trio.lowlevel.Task
    in_step: bool = False
    cancelled: bool = False
    """The task was cancelled in the step, which has yet to come to its end."""


class SharedReader:
    """Reads the bodies of any number of streams in one task. See the module.

    poller: makes what tells which sockets are ready. read_bytes: the most that one read returns.
    """

    __slots__ = (
        "_make_poller",
        "_poller",
        "_read_bytes",
        "_readings",
        "_retiring",
        "_scope",
        "_token",
        "_waiting",
    )

    def __init__(self, *, read_bytes: int, poller: Callable[[], Poller] = platform_poller) -> None:
        self._read_bytes = read_bytes
        self._make_poller = poller
        self._poller: Poller | None = None
        self._readings: dict[int, _Reading] = {}
        self._waiting: list[int] = []
        """Sockets that were ready and not reached, the next one last."""
        self._retiring = False
        self._scope: trio.CancelScope | None = None
        self._token: trio.lowlevel.TrioToken | None = None

    def __repr__(self) -> str:
        return f"<SharedReader of {len(self._readings)} sockets>"

    def __len__(self) -> int:
        return len(self._readings)

    async def read(self, body: Body) -> bool:
        """Read a body until `feed_read` returns True (enough for now) or False (it has ended well), and return that.

        Raises what `feed_read` raised, OSError if the connection broke, trio.ClosedResourceError if it was closed here. A
        checkpoint. A cancel takes the socket out in the same step.
        """
        poller = self._running()
        sock = body.socket
        fd = sock.fileno()
        if fd < 0:
            raise trio.ClosedResourceError("this connection was closed here")
        if fd in self._readings:
            raise trio.BusyResourceError("another task is reading this connection")
        reading = _Reading(body, fd, sock.recv, trio.lowlevel.current_task())
        poller.add(fd)
        self._readings[fd] = reading

        def abort(_: object) -> trio.lowlevel.Abort:
            if reading.in_step:
                reading.cancelled = True
                return trio.lowlevel.Abort.FAILED
            self._remove(reading)
            return trio.lowlevel.Abort.SUCCEEDED

        ended: bool = await trio.lowlevel.wait_task_rescheduled(abort)
        return ended

    def forget(self, fd: int) -> None:
        """Take a socket out that is about to be closed, if it is here: its task gets trio.ClosedResourceError.

        From within its own step: what the step comes to is the result.
        """
        reading = self._readings.get(fd)
        if reading is None:
            return
        if reading.in_step:
            self._remove(reading)
        else:
            self._leave(reading, outcome.Error(trio.ClosedResourceError("this connection was closed here")))

    def retire(self) -> None:
        """End the reader's task once the last socket has left. Another socket starts another."""
        self._retiring = True
        self._end_if_done()

    # --- the reader's task -------------------------------------------------------------------------------------------

    def _running(self) -> Poller:
        """Return the poller of the task that runs in this run of trio, started if there is none."""
        token = trio.lowlevel.current_trio_token()
        if self._poller is None or self._token is not token:
            self._readings.clear()  # of a run that is over
            self._waiting.clear()
            self._poller, self._token = self._make_poller(), token
            self._scope = trio.CancelScope()
            trio.lowlevel.spawn_system_task(self._run, self._poller, self._scope, name="shared reader")
        return self._poller

    async def _run(self, poller: Poller, scope: trio.CancelScope) -> None:
        woken = -math.inf
        try:
            with scope:
                while True:
                    if self._waiting:
                        await trio.lowlevel.checkpoint()
                    else:
                        if (pause_s := _moderation_s(woken)) > 0:
                            await trio.sleep(pause_s)
                            self._waiting = list(poller.ready())  # under load there are some
                        if not self._waiting:
                            await poller.wait()
                            self._waiting = list(poller.ready())
                        woken = trio.current_time()
                    self._turn()
        except Exception as error:  # noqa: BLE001  # a mistake of ours must not take the whole run with it; the streams tell
            _log.exception("the shared reader failed; its streams fail with it")
            if self._poller is poller:
                self._end(error)
        finally:
            if self._poller is poller:
                self._end(trio.ClosedResourceError("the run is over"))
            poller.close()

    def _turn(self) -> None:
        """Read ready sockets, once each, until there are no more or the turn's share is used up."""
        waiting, readings, size = self._waiting, self._readings, self._read_bytes
        left = TURN_BYTES
        if len(waiting) > FEW:
            size = min(size, SHARED_READ_BYTES)
        while waiting and left > 0:
            reading = readings.get(waiting.pop())
            if reading is None:
                continue
            reading.in_step = True
            try:
                try:
                    raw = reading.recv(size)
                except BlockingIOError:
                    continue
                left -= len(raw)
                result = reading.body.feed_read(raw)
            except BaseException as error:  # noqa: ASYNC103, BLE001  # whatever it is, it is this stream's: its task raises it
                self._leave(reading, outcome.Error(error))
            else:
                if result is not None:
                    self._leave(reading, outcome.Value(result))
                elif reading.cancelled:  # the task is told when it comes back for more
                    self._leave(reading, outcome.Value(True))
                elif reading.fd not in readings:  # closed in its own step, which wanted to go on all the same
                    closed = trio.ClosedResourceError("this connection was closed here")
                    trio.lowlevel.reschedule(reading.task, outcome.Error(closed))
            finally:
                reading.in_step = False

    def _remove(self, reading: _Reading) -> None:
        if self._readings.get(reading.fd) is reading:
            del self._readings[reading.fd]
            assert self._poller is not None, "a socket is only in the table of a running reader"
            self._poller.remove(reading.fd)
            self._end_if_done()

    def _end_if_done(self) -> None:
        if self._retiring and not self._readings and self._scope is not None:
            self._scope.cancel(reason="nothing is left to be read")
            self._poller = self._scope = None

    def _leave(self, reading: _Reading, result: outcome.Outcome[bool]) -> None:
        self._remove(reading)
        trio.lowlevel.reschedule(reading.task, result)

    def _end(self, error: Exception) -> None:
        for reading in tuple(self._readings.values()):
            if not reading.in_step:
                self._leave(reading, outcome.Error(error))
        self._waiting.clear()
        self._poller = self._scope = None


def _moderation_s(woken: float) -> float:
    """Return how long to wait before looking again, in seconds, given when the reader woke last. 0 where time is virtual."""
    due = woken + MODERATION_S
    now = trio.current_time()
    if now >= due:
        return 0.0
    # A clock that says when a deadline comes is real, or one that runs like it; a test's stands still, and would not come.
    real = trio.lowlevel.current_clock().deadline_to_sleep_time(due) <= MODERATION_S
    return due - now if real else 0.0
