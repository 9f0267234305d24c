"""What a source raised: whose it is, and what is said of it.

A source may raise anything, and groups of anything. Exceptions are its own, and its stream's ending; what is no `Exception`
(`trio.Cancelled` from outside the stream, a Ctrl-C) belongs to the embedding program and goes on unchanged.
"""

from __future__ import annotations

from supervisor.errors import StreamSealedError

__all__ = ["is_only_sealed", "split", "told"]


def split(error: BaseException) -> tuple[BaseException | None, BaseException | None]:
    """Return the part of what was raised that is the source's own, and the part that is the embedding program's."""
    if isinstance(error, BaseExceptionGroup):
        return error.split(Exception)
    return (error, None) if isinstance(error, Exception) else (None, error)


def is_only_sealed(error: BaseException, stream_id: str) -> bool:
    """Whether an error is nothing but the sign that this stream had been sealed."""
    if isinstance(error, BaseExceptionGroup):
        return all(is_only_sealed(part, stream_id) for part in error.exceptions)
    return isinstance(error, StreamSealedError) and error.stream_id == stream_id


def told(error: BaseException) -> str:
    """Say what an exception is, in one line: of a group, its parts."""
    if isinstance(error, BaseExceptionGroup):
        return "; ".join(told(part) for part in error.exceptions)
    try:
        text = str(error)
    except Exception:  # noqa: BLE001  # an exception that cannot say what it is still has a name
        text = "(it cannot be shown)"
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
