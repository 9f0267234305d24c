"""The bounds of the store in memory: what goes first, what never goes, and that a reader can tell."""

from __future__ import annotations

import pytest

from supervisor.errors import ConfigurationError
from supervisor.stores import MemoryStore

from .records import event, events, head, opened, pruned, write_ended


async def test_reads_give_the_same_objects():
    """No copy is made of an event."""
    store = MemoryStore()
    async with opened(store):
        written = events(1, 3)
        store.create(head("s1"))
        store.append("s1", written)
        assert all(a is b for a, b in zip(written, await store.read("s1", after_seq=0, limit=9), strict=True))


async def test_the_stream_that_ended_first_goes_first():
    """Beyond `max_streams` ended streams whole ones go, in the order they ended; live ones do not count."""
    store = MemoryStore(max_streams=2)
    async with opened(store):
        store.create(head("s0"))
        for stream_id in ("s3", "s1", "s2"):
            write_ended(store, stream_id, 1, key="k")
        assert [stream.id for stream in await store.list()] == ["s2", "s1"]
        assert await store.get(stream_id="s3") is None
        assert [stream.id for stream in await store.unfinished()] == ["s0"]
        found = await store.get(key="k")
        assert found is not None
        assert found.id == "s2"
        await store.wait_durable(
            "s3", 2
        )  # it was durable, in this store's sense, and its writer may still ask


async def test_ended_streams_go_before_any_live_event():
    """Beyond `max_bytes` the ended streams go, all but the last, before a live stream loses anything."""
    store = MemoryStore(max_bytes=100_000)
    async with opened(store):
        store.create(head("live"))
        store.append("live", events(1, 10, size=2000))
        for index in range(10):
            write_ended(store, f"s{index}", 9, size=2000)
        assert [stream.id for stream in await store.list()] == ["s9", "s8", "s7"]
        live = await store.get(stream_id="live")
        assert live is not None
        assert (live.first_seq, live.last_seq) == (1, 10)


async def test_a_reader_sees_the_gap_that_a_bound_made():
    """Live streams lose their oldest events, in turn; first_seq says so and a read begins there."""
    store = MemoryStore(max_bytes=200_000)
    async with opened(store):
        for stream_id in ("a", "b"):
            store.create(head(stream_id))
        for seq in range(1, 401):
            store.append("a", [event(seq, size=1000)])
            if seq % 10 == 0:
                store.append("b", [event(seq // 10, size=1000)])
            assert store.statistics().held_bytes <= 200_000
        for stream_id, last in (("a", 400), ("b", 40)):
            found = await store.get(stream_id=stream_id)
            assert found is not None
            assert last == found.last_seq
            assert found.first_seq > 1
            got = await store.read(stream_id, after_seq=0, limit=1000)
            assert events(found.first_seq, last, size=1000) == list(got)
        assert store.statistics().evicted_events > 200


async def test_heads_and_the_last_outcome_outlive_any_bound():
    """A bound smaller than anything leaves live heads and the outcome of the stream that ended last."""
    store = MemoryStore(max_bytes=1)
    async with opened(store):
        store.create(head("live"))
        store.append("live", events(1, 5))
        live = await store.get(stream_id="live")
        assert live is not None
        assert (live.first_seq, live.last_seq) == (6, 5)
        store.append("live", events(6, 6))
        write_ended(store, "s1", 3)
        assert [event(4, kind="outcome")] == list(await store.read("s1", after_seq=0, limit=9))


async def test_bytes_are_given_back():
    """Pruning everything brings the accounted bytes back to those of what is left."""
    store = MemoryStore()
    async with opened(store):
        for index in range(5):
            write_ended(store, f"s{index}", 10)
        assert store.statistics().held_bytes > 0
        assert await pruned(store, max_ended=0) == 5
        assert store.statistics().held_bytes == 0


@pytest.mark.parametrize("options", [{"max_streams": 0}, {"max_bytes": 0}])
def test_impossible_options_are_refused(options):
    """A bound below one names the field."""
    with pytest.raises(ConfigurationError, match=next(iter(options))):
        MemoryStore(**options)
