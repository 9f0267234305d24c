"""Addresses on loopback to which no connection can be made."""

from __future__ import annotations

import select
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

__all__ = ["unreachable_url"]


@contextmanager
def unreachable_url(*, mode: Literal["refused", "unanswered"] = "refused") -> Iterator[str]:
    """Give a base URL on loopback to which no connection can be made, and keep its port while the block runs.

    `refused`: the kernel answers with a RST. `unanswered`: a listener whose backlog is full and who never accepts, so that
    a connect waits (Linux; elsewhere the connect may succeed and be met with silence).
    """
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{sock.getsockname()[1]}/v1"
        fillers: list[socket.socket] = []
        try:
            if mode == "unanswered":
                sock.listen(0)
                while len(fillers) < 8:
                    filler = socket.socket()
                    filler.setblocking(False)
                    filler.connect_ex(sock.getsockname())
                    fillers.append(filler)
                    if not select.select([], [filler], [], 0.02)[1]:
                        break  # this one's SYN was dropped: the backlog is full
            yield url
        finally:
            for filler in fillers:
                filler.close()
