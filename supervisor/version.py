"""Which version this is."""

from __future__ import annotations

import importlib.metadata

__all__ = ["version"]


def version() -> str:
    """Return the version of this distribution; "0" if it is not installed."""
    try:
        return importlib.metadata.version("stream-supervisor")
    except importlib.metadata.PackageNotFoundError:
        return "0"
