"""The addresses of hosts: asked for once, kept for a moment, and one question for all who ask at the same time.

A daemon that starts a hundred streams in a second asks for one name a hundred times, each time in a thread. So an answer is
kept, for `keep_s` seconds: `getaddrinfo` does not tell for how long it holds (the TTL of its records), so the time is short
enough for a provider that moves its name elsewhere. What is not kept: a name that was not found, which may be there a moment later, and
an answer none of whose addresses could be connected to (`forget`).

Who asks for a name that is being asked for waits for that answer. The question is a task of its own, because it belongs to nobody: the
first to ask may be cancelled without the others noticing. It ends with its answer, or in the step in which the last
of those who wait leaves. (The thread under it cannot be interrupted and is left to finish by itself, as trio does.)
"""

from __future__ import annotations

import socket
from collections.abc import Sequence
from typing import Final

import attrs
import trio

__all__ = ["MAX_NAMES", "Address", "Names"]

MAX_NAMES: Final = 256
"""Answers kept; the oldest goes."""

Address = tuple[int, int, int, tuple[str | int | bytes, ...]]
"""What a socket is made of, and connected to: family, type, protocol, and the address as `connect` takes it."""


@attrs.define(eq=False)
class _Question:
    """A name that is being asked for."""

    scope: trio.CancelScope = attrs.field(factory=trio.CancelScope)
    answered: trio.Event = attrs.field(factory=trio.Event)
    asking: int = 0
    """How many wait for it."""
    answer: tuple[Address, ...] = ()
    error: Exception | None = None


@attrs.frozen
class _Kept:
    answer: tuple[Address, ...]
    until: float


class Names:
    """Answers of the resolver (`trio.socket.getaddrinfo`), each kept for `keep_s` seconds; 0: not at all."""

    __slots__ = ("_asked", "_keep_s", "_kept", "_token")

    def __init__(self, *, keep_s: float) -> None:
        self._keep_s = keep_s
        self._kept: dict[tuple[str, int], _Kept] = {}
        """Oldest first, which is the order in which they are over."""
        self._asked: dict[tuple[str, int], _Question] = {}
        self._token: trio.lowlevel.TrioToken | None = None

    def __repr__(self) -> str:
        return f"<Names: {len(self._kept)} kept, {len(self._asked)} asked for>"

    def __len__(self) -> int:
        return len(self._kept)

    async def addresses(self, host: str, port: int) -> tuple[Address, ...]:
        """Return the addresses to connect to, in the resolver's order. A checkpoint only where somebody is to be asked.

        Raises OSError saying why there are none, ValueError (a UnicodeError) for what cannot be a name.
        """
        try:
            return _addresses(
                socket.getaddrinfo(
                    host, port, type=socket.SOCK_STREAM, flags=socket.AI_NUMERICHOST | socket.AI_NUMERICSERV
                )
            )
        except socket.gaierror:
            pass  # a name
        key = (host, port)
        self._expire()
        kept = self._kept.get(key)
        if kept is not None:
            return kept.answer
        question = self._asked.get(key)
        if question is None:
            question = self._asked[key] = _Question()
            trio.lowlevel.spawn_system_task(self._ask, key, question, name=f"addresses of {host}")
        question.asking += 1
        try:
            await question.answered.wait()
        finally:
            question.asking -= 1
            if not question.asking:
                self._over(key, question)
        if question.error is not None:
            # Each raises an exception of its own: a shared one would collect the tracebacks of all.
            why = question.error.strerror if isinstance(question.error, OSError) else None
            raise ConnectionError(why or str(question.error)) from question.error
        return question.answer

    def forget(self, host: str, port: int, answer: Sequence[Address]) -> None:
        """Drop an answer that is of no use: nothing listens there. A newer one is kept."""
        kept = self._kept.get((host, port))
        if kept is not None and kept.answer is answer:
            del self._kept[host, port]

    async def _ask(self, key: tuple[str, int], question: _Question) -> None:
        host, port = key
        with question.scope:
            try:
                question.answer = _addresses(
                    await trio.socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
                )
            except Exception as error:  # noqa: BLE001  # a resolver may be a program's own; those who ask raise it
                question.error = error
            else:
                self._keep(key, question.answer)
            question.answered.set()
        self._over(key, question)

    def _keep(self, key: tuple[str, int], answer: tuple[Address, ...]) -> None:
        if self._keep_s > 0:
            self._kept[key] = _Kept(answer, trio.current_time() + self._keep_s)
            while len(self._kept) > MAX_NAMES:
                del self._kept[next(iter(self._kept))]

    def _over(self, key: tuple[str, int], question: _Question) -> None:
        if self._asked.get(key) is question:
            del self._asked[key]
        question.scope.cancel(reason="nobody waits for the answer any more")

    def _expire(self) -> None:
        token = trio.lowlevel.current_trio_token()
        if (
            token is not self._token
        ):  # another run, of which neither the clock nor the tasks are the last one's
            self._kept.clear()
            self._asked.clear()
            self._token = token
        now = trio.current_time()
        while self._kept:
            key = next(iter(self._kept))
            if self._kept[key].until > now:
                return
            del self._kept[key]


def _addresses(
    found: Sequence[tuple[int, int, int, str, tuple[str | int | bytes, ...]]],
) -> tuple[Address, ...]:
    return tuple((family, kind, protocol, where) for family, kind, protocol, _, where in found)
