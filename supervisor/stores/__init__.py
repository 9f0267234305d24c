"""Where journals are kept: the protocol, a store in memory and one in an SQLite file."""

from __future__ import annotations

from supervisor.stores.base import Event, EventKind, Store, StoredStream, StoreHealth, StoreStatistics
from supervisor.stores.memory import MemoryStore
from supervisor.stores.retention import Keep, PruneReport, Removed, Retention, retain
from supervisor.stores.sqlite import SQLiteStore

__all__ = [
    "Event",
    "EventKind",
    "Keep",
    "MemoryStore",
    "PruneReport",
    "Removed",
    "Retention",
    "SQLiteStore",
    "Store",
    "StoreHealth",
    "StoreStatistics",
    "StoredStream",
    "retain",
]
