"""What every store keeps: one suite over all of them."""

from __future__ import annotations

import pytest
import trio
import trio.testing

from supervisor.errors import ConfigurationError, StoreError
from supervisor.stores import MemoryStore, SQLiteStore, Store

from .records import event, events, head, opened, pruned, write_ended


@pytest.fixture(params=["memory", "sqlite"])
def store(request, tmp_path) -> Store:
    if request.param == "memory":
        return MemoryStore()
    return SQLiteStore(tmp_path / "store.db", commit_interval_s=0)


async def test_a_stream_reads_back_as_it_was_written(store):
    """Head, events of every kind and the outcome come back equal, and the description says where the journal is."""
    written = [
        event(1),
        event(2, kind="attempt"),
        event(3, name="delta"),
        event(4, kind="skipped", size=5000),
    ]
    async with opened(store):
        store.create(head("s1", "k"))
        store.append("s1", written[:1])
        store.append("s1", written[1:])
        store.end("s1", event(5, kind="outcome"), state="failed", ended_at=1234.5)
        await store.wait_durable("s1", 5)
        assert [*written, event(5, kind="outcome")] == list(await store.read("s1", after_seq=0, limit=100))
        found = await store.get(stream_id="s1")
        assert found is not None
        assert (head("s1").head, 1000.0, "k") == (found.head, found.created_at, found.key)
        assert (found.state, found.ended_at, found.outcome) == ("failed", 1234.5, b"1:5:outcome")
        assert (found.epoch, found.first_seq, found.last_seq) == (1, 1, 5)


async def test_reading_starts_after_any_seq_and_stops_at_any_limit(store):
    """Every cursor and every limit gives exactly the events between them, whatever the cuts they were written in."""
    async with opened(store):
        store.create(head("s1"))
        for first, last in ((1, 1), (2, 5), (6, 6), (7, 11)):
            store.append("s1", events(first, last))
            await store.wait_durable("s1", last)
        for after in range(13):
            for limit in range(1, 13):
                got = await store.read("s1", after_seq=after, limit=limit)
                assert events(after + 1, min(after + limit, 11)) == list(got)


async def test_reading_stops_at_its_bytes_but_gives_one_event(store):
    """`max_bytes` bounds what a read gives, as accounted, and an event larger than it is given alone."""
    async with opened(store):
        store.create(head("s1"))
        store.append("s1", events(1, 10, size=1000))
        await store.wait_durable("s1", 10)
        assert events(1, 3, size=1000) == list(
            await store.read("s1", after_seq=0, limit=9, max_bytes=3 * 1160)
        )
        assert events(5, 5, size=1000) == list(await store.read("s1", after_seq=4, limit=9, max_bytes=10))
        store.append("s1", [event(seq, name="n" * 2000) for seq in (11, 12)])
        await store.wait_durable("s1", 12)
        assert len(await store.read("s1", after_seq=10, limit=9, max_bytes=2 * 1160)) == 1


async def test_a_new_epoch_goes_on_with_the_same_seqs(store):
    """Epochs are kept per event, and the description has the last one."""
    async with opened(store):
        store.create(head("s1"))
        store.append("s1", [*events(1, 3), *events(4, 6, epoch=2)])
        await store.wait_durable("s1", 6)
        assert [*events(1, 3), *events(4, 6, epoch=2)] == list(await store.read("s1", after_seq=0, limit=9))
        live = await store.get(stream_id="s1")
        assert live is not None
        assert (live.epoch, live.last_seq, live.state) == (2, 6, None)
        store.end("s1", event(7, epoch=2, kind="outcome"), state="completed", ended_at=1.0)
        await store.wait_durable("s1", 7)
        ended = await store.get(stream_id="s1")
        assert ended is not None
        assert (ended.epoch, ended.last_seq, ended.state) == (2, 7, "completed")


async def test_what_is_not_there_is_none(store):
    """Reading an unknown stream gives nothing, and asking for one gives None."""
    async with opened(store):
        assert list(await store.read("nobody", after_seq=0, limit=10)) == []
        assert await store.get(stream_id="nobody") is None
        assert await store.get(key="nobody") is None
        assert list(await store.unfinished()) == []
        assert list(await store.list()) == []
        with pytest.raises(StoreError, match="not in the store"):
            await store.wait_durable("nobody", 0)


@pytest.mark.parametrize("selectors", [{}, {"stream_id": "a", "key": "b"}])
async def test_get_wants_one_selector(store, selectors):
    """Neither and both are refused."""
    async with opened(store):
        with pytest.raises(ConfigurationError, match="exactly one"):
            await store.get(**selectors)


async def test_a_key_finds_its_newest_stream(store):
    """Of several streams with one key the highest id is found, live or ended."""
    async with opened(store):
        write_ended(store, "s1", 1, key="k")
        write_ended(store, "s3", 1, key="k")
        write_ended(store, "s2", 1, key="k")
        write_ended(store, "s4", 1, key="other")
        store.create(head("s0", "k"))
        for stream_id, seq in (("s1", 2), ("s2", 2), ("s3", 2), ("s4", 2), ("s0", 0)):
            await store.wait_durable(stream_id, seq)
        found = await store.get(key="k")
        assert found is not None
        assert found.id == "s3"


async def test_the_list_pages_by_id_downwards(store):
    """Ended streams are listed newest first, by page, filtered by state; live ones are not in it."""
    async with opened(store):
        for index in range(20):
            state = ("completed", "failed", "cancelled")[index % 3]
            write_ended(store, f"s{index:02}", 1, state=state)
            await store.wait_durable(f"s{index:02}", 2)
        store.create(head("s99"))
        await store.wait_durable("s99", 0)
        paged: list[str] = []
        before = None
        while page := await store.list(before_id=before, limit=7):
            paged += [stream.id for stream in page]
            before = page[-1].id
        assert [f"s{index:02}" for index in reversed(range(20))] == paged
        some = await store.list(states=["failed", "cancelled", "failed"], before_id="s17", limit=4)
        assert [stream.id for stream in some] == ["s16", "s14", "s13", "s11"]
        assert list(await store.list(states=[])) == []
        assert list(await store.list(states=["expired"])) == []
        assert list(await store.list(limit=0)) == []


async def test_unfinished_streams_are_those_without_an_outcome(store):
    """They come oldest first, with the last seq that is durable."""
    async with opened(store):
        write_ended(store, "s2", 3)
        store.create(head("s3"))
        store.append("s3", events(1, 2))
        store.create(head("s1"))
        for stream_id, seq in (("s2", 4), ("s3", 2), ("s1", 0)):
            await store.wait_durable(stream_id, seq)
        assert [(s.id, s.last_seq) for s in await store.unfinished()] == [("s1", 0), ("s3", 2)]


async def test_misuse_is_refused_by_the_call_and_changes_nothing(store):
    """Append and end of an unknown or ended stream, a second create, and a seq out of line raise StoreError."""
    async with opened(store):
        with pytest.raises(StoreError, match="never created"):
            store.append("s1", events(1, 1))
        with pytest.raises(StoreError, match="never created"):
            store.end("s1", event(1, kind="outcome"), state="completed", ended_at=1.0)
        store.create(head("s1"))
        with pytest.raises(StoreError, match="created twice"):
            store.create(head("s1"))
        with pytest.raises(StoreError, match="does not follow seq 0"):
            store.append("s1", events(2, 3))
        with pytest.raises(StoreError, match="does not follow seq 0"):
            store.append("s1", [event(1), event(3)])
        with pytest.raises(StoreError, match="does not follow seq 0"):
            store.end("s1", event(2, kind="outcome"), state="completed", ended_at=1.0)
        store.append("s1", [])
        store.append("s1", events(1, 2))
        store.end("s1", event(3, kind="outcome"), state="completed", ended_at=1.0)
        with pytest.raises(StoreError, match="end after its outcome"):
            store.end("s1", event(4, kind="outcome"), state="failed", ended_at=2.0)
        with pytest.raises(StoreError, match="append after its outcome"):
            store.append("s1", events(4, 4))
        await store.wait_durable("s1", 3)
        with pytest.raises(StoreError, match="there will be no 4"):
            await store.wait_durable("s1", 4)
        found = await store.get(stream_id="s1")
        assert found is not None
        assert (found.state, found.last_seq) == ("completed", 3)
        assert [*events(1, 2), event(3, kind="outcome")] == list(await store.read("s1", after_seq=0, limit=9))


async def test_waiting_for_a_seq_to_come(store):
    """A wait for a seq not yet appended ends when it is durable, and with an error when the store is closed."""
    done: list[str] = []

    async def wait(seq: int) -> None:
        try:
            await store.wait_durable("s1", seq)
        except StoreError as exc:
            done.append(str(exc))
        else:
            done.append(f"{seq} is durable")

    async with trio.open_nursery() as waiters, opened(store):
        store.create(head("s1"))
        waiters.start_soon(wait, 2)
        waiters.start_soon(wait, 9)
        await trio.testing.wait_all_tasks_blocked()
        store.append("s1", events(1, 3))
        await store.wait_durable("s1", 3)
        await trio.testing.wait_all_tasks_blocked()
        assert done == ["2 is durable"]
    assert done[1:] == ["stream s1: the store has stopped before seq 9 was written"]


async def test_a_cancelled_wait_leaves_nothing_behind(store):
    """After a cancelled wait the stream is written, waited for and read as ever."""
    async with opened(store):
        store.create(head("s1"))
        with trio.move_on_after(0):
            await store.wait_durable("s1", 1)
        store.append("s1", events(1, 1))
        await store.wait_durable("s1", 1)
        assert store.durable_seq("s1") == 1


async def test_a_forgotten_stream_is_still_readable(store):
    """`forget` drops the position (durable_seq is unknown, writing is refused); the journal and its wait remain."""
    async with opened(store):
        write_ended(store, "s1", 2)
        store.forget("s1")
        await store.wait_durable("s1", 3)
        assert store.durable_seq("s1") == 0
        assert len(await store.read("s1", after_seq=0, limit=9)) == 3
        await store.wait_durable("s1", 3)
        with pytest.raises(StoreError, match="seq 4 is not in the store"):
            await store.wait_durable("s1", 4)
        with pytest.raises(StoreError, match="was forgotten"):
            store.append("s1", events(4, 4))
        store.forget("s1")
        store.forget("nobody")


async def test_prune_removes_what_ended_first(store):
    """By time, by number kept, by both (the larger), and never more than the limit; live streams stay."""
    async with opened(store):
        order = [4, 0, 3, 1, 2, 7, 5, 6]
        for place, index in enumerate(order):
            write_ended(store, f"s{index}", 1, key=f"k{index}", ended_at=100.0 + place)
            await store.wait_durable(f"s{index}", 2)
        store.create(head("s9"))
        await store.wait_durable("s9", 0)

        async def left() -> set[int]:
            return {int(stream.id[1:]) for stream in await store.list()}

        assert await pruned(store) == 0
        assert await pruned(store, ended_before=100.0) == 0
        assert await pruned(store, max_ended=8) == 0
        assert await pruned(store, max_ended=0, limit=0) == 0
        assert await pruned(store, ended_before=102.0) == 2
        assert set(order[2:]) == await left()
        assert await pruned(store, max_ended=3, limit=1) == 1
        assert set(order[3:]) == await left()
        assert await pruned(store, ended_before=104.0, max_ended=2) == 3
        assert set(order[6:]) == await left()
        assert await store.get(key="k4") is None
        assert list(await store.read("s4", after_seq=0, limit=9)) == []
        assert await pruned(store, max_ended=0) == 2
        assert [stream.id for stream in await store.unfinished()] == ["s9"]


async def test_ended_at_the_same_time_goes_by_id(store):
    """Streams with equal ended_at are pruned lowest id first, and `keep` counts exactly."""
    async with opened(store):
        for stream_id in ("b", "a", "c", "a\x01"):
            write_ended(store, stream_id, 1, ended_at=5.0)
            await store.wait_durable(stream_id, 2)
        assert await pruned(store, max_ended=3) == 1
        assert [stream.id for stream in await store.list()] == ["c", "b", "a\x01"]
        assert await pruned(store, max_ended=1) == 2
        assert [stream.id for stream in await store.list()] == ["c"]


async def test_a_closed_store_refuses(store):
    """After `aclose` writing is refused, closing again is nothing, and it does not run twice."""
    async with opened(store):
        store.create(head("s1"))
        with pytest.raises(StoreError, match="runs once"):
            await store.run()
    await store.aclose()
    with pytest.raises(StoreError, match="closed"):
        store.create(head("s2"))
    with pytest.raises(StoreError, match="closed"):
        store.append("s1", events(1, 1))
    with pytest.raises(StoreError, match="runs once"):
        await store.run()


async def test_a_store_that_never_ran_closes(store):
    """`aclose` without `run` returns, and `run` after it is refused."""
    await store.aclose()
    with pytest.raises(StoreError, match="runs once"):
        await store.run()


async def test_flow_and_statistics_at_rest(store):
    """A store with nothing to write is not congested, `wait_flow` returns, and the figures add up."""
    async with opened(store):
        write_ended(store, "s1", 5)
        await store.wait_durable("s1", 6)
        assert not store.congested
        await store.wait_flow()
        figures = store.statistics()
        assert (
            figures.committed_records,
            figures.pending_records,
            figures.pending_bytes,
            figures.last_error,
        ) == (7, 0, 0, None)
        assert figures.commits >= 1
        assert "Store" in repr(store)
