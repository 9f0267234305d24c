"""Where journals are kept: the protocol, in memory, and SQLite."""

from supervisor.stores.base import Event, Store, StoredStream
from supervisor.stores.memory import MemoryStore
from supervisor.stores.sqlite import SQLiteStore

__all__ = ["Event", "MemoryStore", "SQLiteStore", "Store", "StoredStream"]
