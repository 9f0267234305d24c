"""Connecting to whichever of a host's addresses answers first: happy eyeballs (RFC 8305).

A host has addresses of two families, and either may be broken on the way: an IPv6 route that leads nowhere would cost each connect
the kernel's two minutes. So the addresses are tried one after the other, the families taking turns (section 4), beginning with the one
that the resolver prefers; the next is tried `STAGGER_S` seconds after the one before it, or at once when that one has
failed (section 5). The first to be connected is taken and the others are closed in the same step, as they all are by a cancel.
When none is left, what each of them said is told.

trio's own `open_tcp_stream` does nearly this. It resolves names itself, so an answer could not be kept; only its first two addresses
are of different families; and it does not say which address gave which error.
"""

from __future__ import annotations

import errno
import itertools
import os
import socket
from collections.abc import Iterable, Sequence
from typing import Final

import trio

from supervisor.upstream.names import Address

__all__ = ["MAX_ADDRESSES", "STAGGER_S", "dial", "interleaved"]

STAGGER_S: Final = 0.25
"""How long an address may take before the next is tried beside it, in seconds."""
MAX_ADDRESSES: Final = 16
"""How many addresses of a host are tried."""

_UNDER_WAY = frozenset({errno.EINPROGRESS, errno.EWOULDBLOCK})


async def dial(addresses: Sequence[Address]) -> socket.socket:
    """Return a connected, non-blocking socket with `TCP_NODELAY`. A checkpoint.

    A cancel closes every socket in the step in which it is delivered. Raises OSError: the only address's own, or one that tells
    the reasons of all of them, with an ExceptionGroup of these as its cause.
    """
    won: socket.socket | None = None
    failures: dict[Address, OSError] = {}

    async def attempt(address: Address, failed: trio.Event) -> None:
        nonlocal won
        try:
            sock = await _connect(address)
        except OSError as error:
            failures[address] = error
            failed.set()
            return
        if won is None:
            won = sock
            nursery.cancel_scope.cancel(reason="another address was connected")
        else:  # two at once
            sock.close()

    try:
        async with trio.open_nursery() as nursery:
            for address in interleaved(addresses)[:MAX_ADDRESSES]:
                failed = trio.Event()
                nursery.start_soon(attempt, address, failed)
                with trio.move_on_after(STAGGER_S):
                    await failed.wait()
    except BaseException:
        if won is not None:  # a cancel from outside in the very moment
            won.close()
        raise
    if won is None:
        raise _told(failures)
    return won


def interleaved(addresses: Iterable[Address]) -> list[Address]:
    """Return the addresses, each once, the families taking turns, otherwise in the order they have."""
    families: dict[int, dict[Address, None]] = {}
    for address in addresses:
        families.setdefault(address[0], {})[address] = None
    turns = itertools.chain.from_iterable(itertools.zip_longest(*families.values()))
    return [address for address in turns if address is not None]


async def _connect(address: Address) -> socket.socket:
    family, kind, protocol, where = address
    sock = socket.socket(family, kind, protocol)
    connected = False
    try:
        sock.setblocking(False)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        error = sock.connect_ex(where)
        if error in _UNDER_WAY:
            await trio.lowlevel.wait_writable(sock)
            error = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        connected = not error
    finally:
        if not connected:
            sock.close()
    if error:
        raise OSError(error, os.strerror(error))
    return sock


def _told(failures: dict[Address, OSError]) -> OSError:
    """Return the error that tells of all: each reason once, and whose it is."""
    if not failures:
        return ConnectionError("the name has no addresses")
    if len(failures) == 1:
        return next(iter(failures.values()))
    reasons: dict[str, list[str]] = {}
    for (_, _, _, where), error in failures.items():
        reasons.setdefault(error.strerror or str(error), []).append(str(where[0]))
    told = ConnectionError("; ".join(f"{why} ({', '.join(hosts)})" for why, hosts in reasons.items()))
    told.__cause__ = ExceptionGroup("no address could be connected to", list(failures.values()))
    return told
