"""Streams over plain HTTP: the same answers as the control channel's, and events that a browser can read and resume."""

from __future__ import annotations

import json

import pytest
import trio
import trio.testing

from supervisor.control import answers
from supervisor.control.messages import ListParams
from supervisor.stores import MemoryStore
from supervisor.streams import Limits, Output
from tests.web.scene import scene, until
from tests.wire.whatwg import Interpretation, interpret

TEXT = "".join(f"t{number} " for number in range(10))


def text_of(found: Interpretation) -> str:
    """Return the text that events add up to, as a page would put it together."""
    text = ""
    for event in found.events:
        told = json.loads(event.data)
        if event.event == "gap":
            text = ""
        elif event.event == "snapshot":
            text = told["snapshot"]["text"]
        else:
            text += told.get("text", "")
    return text


async def test_a_stream_from_start_to_delete() -> None:
    """A start answers 201 and where the stream is, again with its key 200; it is got, listed, deleted, and deleted again."""
    async with scene() as front:
        asked = {"upstream": "forever", "prompt": "Hi", "key": "k", "labels": {"a": "b"}}
        first = await front.ask("POST", "/streams", asked)
        assert (first.status, first.json["created"]) == (201, True)
        stream_id = first.json["id"]
        assert first.headers["location"] == f"/streams/{stream_id}"
        again = await front.ask("POST", "/streams", asked)
        assert (again.status, again.json["created"], again.json["id"]) == (200, False, stream_id)
        got = await front.ask("GET", f"/streams/{stream_id}")
        assert (got.json["key"], got.json["labels"]) == ("k", {"a": "b"})
        deleted = await front.ask("DELETE", f"/streams/{stream_id}")
        assert (deleted.json["outcome"], deleted.json["reason"]) == ("won", "requested")
        assert (await front.ask("DELETE", f"/streams/{stream_id}")).json["outcome"] == "already_terminal"
        outcome = (await front.ask("GET", f"/streams/{stream_id}")).json["outcome"]
        assert (outcome["state"], outcome["actor"]) == ("cancelled", "http")


async def test_a_cancel_by_what_it_names() -> None:
    """A cancel takes a reason by path, or a key, labels or all in its body; a key nobody has yet leaves a tombstone."""
    async with scene() as front:
        one = await front.start("forever")
        told = await front.ask("POST", f"/streams/{one}/cancel", {"reason": "enough", "actor": "me"})
        assert told.json["outcome"] == "won"
        outcome = (await front.ask("GET", f"/streams/{one}")).json["outcome"]
        assert (outcome["message"], outcome["actor"]) == ("enough", "me")
        two = await front.start("forever", labels={"user": "7"})
        (result,) = (await front.ask("POST", "/streams/cancel", {"labels": {"user": "7"}})).json["results"]
        assert (result["id"], result["outcome"]) == (two, "won")
        assert (await front.ask("POST", "/streams/cancel", {"key": "late"})).json["outcome"] == "tombstoned"
        for other in ({"key": "other"}, {"id": two}, {"all": True}):
            refused = await front.ask("POST", f"/streams/{one}/cancel", other)
            assert (refused.status, refused.kind) == (400, "invalid_params")


async def test_a_key_names_a_stream_in_a_path() -> None:
    """`key:KEY` stands for the id of the stream that has the key, everywhere; a cancel of a key nobody has yet is kept."""
    async with scene() as front:
        stream_id = await front.ended(key="chat 7")
        assert (await front.ask("GET", "/streams/key:chat%207")).json["id"] == stream_id
        assert (await front.ask("GET", "/streams/key:chat%207/snapshot")).json["text"] == TEXT
        assert text_of(await front.events("key:chat%207")) == TEXT
        assert (await front.ask("DELETE", "/streams/key:chat%207")).json["id"] == stream_id
        assert (await front.ask("POST", "/streams/key:late/cancel")).json["outcome"] == "tombstoned"
        unknown = await front.ask("GET", "/streams/key:nobody")
        assert (unknown.status, unknown.json["error"]["key"]) == (404, "nobody")
        assert (await front.ask("GET", "/streams/key:")).status == 400


async def test_a_list_is_filtered_and_paged_as_the_control_channel_does() -> None:
    """Each filter of a list is a parameter of the query; `next` leads on; the streams are the control channel's."""
    async with scene() as front:
        ids = [
            await front.ended(
                labels={"n": str(number % 2)}, tenant="acme" if number else None, key=f"k{number}"
            )
            for number in range(4)
        ]
        live = await front.start("forever")

        async def listed(query: str) -> list[str]:
            answer = await front.ask("GET", f"/streams{query}")
            assert answer.status == 200, answer
            return [stream["id"] for stream in answer.json["streams"]]

        assert await listed("") == [live, *reversed(ids)]
        assert await listed("?state=completed&state=failed&label.n=1") == [ids[3], ids[1]]
        assert await listed("?live=true") == [live]
        assert await listed("?live=false&tenant=acme&upstream=ten") == [ids[3], ids[2], ids[1]]
        assert await listed("?key=k2") == [ids[2]]
        page = (await front.ask("GET", "/streams?limit=2&live=false")).json
        assert [stream["id"] for stream in page["streams"]] == [ids[3], ids[2]]
        assert await listed(f"?limit=2&live=false&before={page['next']}") == [ids[1], ids[0]]
        params = ListParams(states=("completed",))
        same = await answers.list_streams(front.supervisor, params)
        here = (await front.ask("GET", "/streams?state=completed")).json["streams"]
        assert [stream.created_at for stream in same.streams] == [stream["created_at"] for stream in here]


@pytest.mark.parametrize(
    ("method", "target", "body", "status", "kind", "said"),
    [
        ("GET", "/streams/nope", None, 404, "unknown_stream", "nope"),
        ("GET", "/streams/nope/events", None, 404, "unknown_stream", "nope"),
        ("POST", "/streams/nope/cancel", None, 404, "unknown_stream", "nope"),
        ("GET", "/streams?limit=0", None, 400, "invalid_params", "limit"),
        ("GET", "/streams?limit=many", None, 400, "invalid_params", "'many' is not valid"),
        ("GET", "/streams?live=perhaps", None, 400, "invalid_params", "live"),
        ("GET", "/streams?state=asleep", None, 400, "invalid_params", "state: 'asleep'"),
        ("GET", "/streams?state=" + "&state=failed" * 9, None, 400, "invalid_params", "state: "),
        ("GET", "/streams?stat=completed", None, 400, "invalid_params", "stat: unknown parameter"),
        ("GET", "/streams?key=a&key=b", None, 400, "invalid_params", "given twice"),
        ("GET", "/streams/ID/events?after=soon", None, 400, "invalid_params", "1-42"),
        ("GET", "/streams/ID/events?after=1-42x", None, 400, "invalid_params", "1-42"),
        ("GET", "/streams/ID/events?view=all", None, 400, "invalid_params", "view"),
        ("POST", "/streams", b"{", 400, "parse_error", "JSON"),
        ("POST", "/streams", b"[]", 400, "invalid_params", "by name"),
        ("POST", "/streams", b"[" * 100_000, 400, "invalid_params", "by name"),
        ("POST", "/streams", b'{"request": ' + b'{"a":' * 100_000, 400, "invalid_params", "deep"),
        ("POST", "/streams", b'{"upstream": "x", "prompt": ""}', 400, "configuration", "upstream"),
        ("POST", "/streams/ID/cancel", b"7", 400, "invalid_params", "object"),
        ("PUT", "/streams", None, 405, "method_not_allowed", ""),
        ("GET", "/stream", None, 404, "not_found", ""),
    ],
)
async def test_what_cannot_be_answered_says_why(
    method: str, target: str, body: bytes | None, status: int, kind: str, said: str
) -> None:
    """A mistake is answered with its status, its kind, and words that name it; the connection stays usable."""
    async with scene() as front, front.client() as client:
        stream_id = await front.ended()
        answer = await client.ask(method, target.replace("ID", stream_id), body=body or b"")
        assert (answer.status, answer.kind) == (status, kind), answer
        assert said in answer.json["error"]["message"]
        assert (await client.ask("GET", "/healthz")).status == 200


async def test_events_come_in_order_with_their_positions_and_end_with_the_outcome() -> None:
    """Each event has `epoch-seq` for an id, without a hole; the outcome is the last; whoever has seen it is told 204."""
    async with scene() as front:
        stream_id = await front.ended()
        async with front.client() as client:
            for _ in range(2):  # over one connection: the end of an answer is not that of the connection
                found = interpret((await client.ask("GET", f"/streams/{stream_id}/events")).body)
                await trio.testing.wait_all_tasks_blocked()
                assert front.server.statistics().busy == 0
        assert [event.id for event in found.events] == [f"1-{seq}" for seq in range(1, len(found.events) + 1)]
        assert found.events[-1].event == "outcome"
        assert json.loads(found.events[-1].data)["outcome"]["state"] == "completed"
        assert text_of(found) == TEXT
        joined = await front.events(stream_id, "?view=text")
        assert text_of(joined) == TEXT
        assert [event.event for event in joined.events] == ["text", "outcome"]
        for again in (
            await front.ask("GET", f"/streams/{stream_id}/events", last_event_id=found.last_event_id),
            await front.ask("GET", f"/streams/{stream_id}/events?after={found.last_event_id}"),
            await front.ask("GET", f"/streams/{stream_id}/events?after=tail"),
        ):
            assert (again.status, again.body) == (204, b"")


@pytest.mark.parametrize(
    "query", ["?view=events", "?view=text", "?after=snapshot", "?after=tail", "?max_behind=3"]
)
async def test_a_browser_that_loses_its_connection_anywhere_gets_the_rest_and_nothing_twice(
    query: str,
) -> None:
    """Cut off after any byte, and come again with the last id as `EventSource` does, a reader ends with the whole text."""
    async with scene() as front:
        go = trio.Event()

        async def slow(out: Output) -> None:
            await out.send("t0 ")
            await go.wait()
            for number in range(1, 10):
                await out.send(f"t{number} ")

        front.sources["slow"] = slow
        stream_id = await front.start("slow")
        async with front.client() as client:
            await client.send(
                f"GET /streams/{stream_id}/events{query} HTTP/1.1\r\nhost: localhost\r\n\r\n".encode()
            )
            whole = await until(client, b"retry: 1000\nid: 1-")  # it stands where it began, whatever comes
            go.set()
            whole += await client.rest()
        expected = text_of(interpret(whole))
        assert expected == (TEXT.removeprefix("t0 ") if query == "?after=tail" else TEXT)
        rests: dict[str, Interpretation] = {}
        for at in range(len(whole)):
            seen = interpret(whole[:at])
            if seen.last_event_id not in rests:
                if not seen.last_event_id:
                    continue  # nothing came at all: it asks as it did at first
                rests[seen.last_event_id] = await front.events(
                    stream_id, query, last_event_id=seen.last_event_id
                )
            rest = rests[seen.last_event_id]
            both = Interpretation(events=[*seen.events, *rest.events])
            assert text_of(both) == expected, at
            assert [event.event for event in both.events].count("outcome") == 1


async def test_silence_is_filled_with_comments_that_have_no_id() -> None:
    """While nothing happens a comment is sent now and then; it is no event, and does not touch the last id."""
    async with scene(keep_alive_s=0.005) as front, front.client() as client:
        stream_id = await front.start("forever")
        await client.send(f"GET /streams/{stream_id}/events HTTP/1.1\r\nhost: localhost\r\n\r\n".encode())
        found = interpret(await until(client, b": keep-alive\n\n: keep-alive\n\n"))
        assert found.comments >= 2
        assert [event.id for event in found.events] == [found.last_event_id]


async def test_a_gap_is_told_and_what_can_be_read_follows() -> None:
    """A position that is not in the history is answered with `gap`, then with what there is; coming again repeats no gap."""
    async with scene() as front:
        stream_id = await front.ended()
        found = await front.events(stream_id, "?after=1-999")
        gap = json.loads(found.events[0].data)
        assert (found.events[0].event, gap["kind"], gap["earliest"]) == ("gap", "gap", 1)
        assert text_of(found) == TEXT
        again = await front.events(stream_id, "?after=1-999", last_event_id=found.events[0].id)
        assert [event.event for event in again.events] == [event.event for event in found.events[1:]]


async def test_a_position_is_good_for_its_stream_alone() -> None:
    """Under a key whose stream has been replaced, the place in the old one is a gap, and the new one follows from its start."""
    async with scene() as front:
        one = await front.ended(key="k")
        path = "/streams/key:k/events?view=text"
        whole = interpret((await front.ask("GET", path)).body)
        assert whole.events[0].id.endswith(f"-{one}")
        last = whole.events[0].id  # its text; the outcome is still to come
        rest = interpret((await front.ask("GET", path, last_event_id=last)).body)
        assert [event.event for event in rest.events] == ["outcome"]
        assert (await front.ask("GET", path, last_event_id=whole.last_event_id)).status == 204
        by_id = await front.events(one, "?view=text", last_event_id=last)
        assert [event.event for event in by_id.events] == ["outcome"]
        two = await front.ended(key="k", on_conflict="replace")
        for position in (last, "1-1", f"1-0-{one}"):
            found = interpret((await front.ask("GET", path, last_event_id=position)).body)
            assert [event.event for event in found.events] == ["gap", "text", "outcome"]
            gap = json.loads(found.events[0].data)
            assert (gap["kind"], gap["id"], gap["earliest"]) == ("gap", two, 1)
            assert found.events[0].id == f"1-0-{two}"
        again = interpret((await front.ask("GET", path, last_event_id=f"1-0-{two}")).body)
        assert [event.event for event in again.events] == ["text", "outcome"]
        other = await front.events(two, f"?view=text&after={last}")
        assert [event.event for event in other.events] == ["gap", "text", "outcome"]


async def test_a_gap_on_the_way() -> None:
    """History that is gone when its reader gets to it is told where it is missing, and reading goes on behind it."""
    store = MemoryStore(max_bytes=6000)
    async with scene(store=store, streams=Limits(tail_events=4)) as front:

        async def many(out: Output) -> None:
            for number in range(100):
                await out.send(f"t{number} ")

        front.sources["many"] = many
        stream_id = await front.ended("many")
        found = await front.events(stream_id)
        gap = json.loads(found.events[0].data)
        assert found.events[0].event == "gap"
        assert found.events[0].id == f"1-{gap['earliest'] - 1}"
        assert [event.id for event in found.events[1:]] == [
            f"1-{seq}" for seq in range(gap["earliest"], gap["tail"] + 1)
        ]


async def test_who_leaves_is_no_reader_any_more() -> None:
    """A client that closes its connection detaches at once, though nothing is being sent; the stream goes on."""
    async with scene() as front:
        stream_id = await front.start("forever")
        stream = front.supervisor.get(stream_id)
        async with front.client() as client:
            await client.send(f"GET /streams/{stream_id}/events HTTP/1.1\r\nhost: localhost\r\n\r\n".encode())
            await until(client, b"begun")
            assert stream.info().readers == 1
        with trio.fail_after(2):
            while stream.info().readers:
                await trio.testing.wait_all_tasks_blocked()
        assert str(stream.state) == "streaming"


async def test_a_reader_that_reads_nothing_holds_nothing_up() -> None:
    """A stream ends beside a reader that takes nothing, which is dropped when its time is over, and can come again."""
    async with scene(send_s=0.05) as front, front.client(receive_buffer=4096) as client:

        async def large(out: Output) -> None:
            for _ in range(100):
                await out.send("x" * 50_000)

        front.sources["large"] = large
        stream_id = await front.start("large")
        await client.send(f"GET /streams/{stream_id}/events HTTP/1.1\r\nhost: localhost\r\n\r\n".encode())
        await front.supervisor.get(stream_id).wait()
        while not front.server.statistics().stalled:
            await trio.testing.wait_all_tasks_blocked(0.01)
        seen = (await client.cut_short()).rpartition(b"\n\n")[0]  # without the event that was cut short
        assert b"event: outcome" not in seen
        last = seen.rpartition(b"id: ")[2].partition(b"\n")[0].decode()
        rest = await front.ask("GET", f"/streams/{stream_id}/events", last_event_id=last)
        assert seen.count(b"event: data") + rest.body.count(b"event: data") == 100


@pytest.mark.parametrize("what", ["/snapshot", "/events?after=snapshot", "/events?max_behind=1"])
@pytest.mark.parametrize("room", [True, False])
async def test_who_does_not_take_a_large_answer_holds_up_nobody(what: str, room: bool) -> None:
    """Beside a large answer that is not taken others get theirs: what is small always, what is large if there is room, or a 503."""
    async with scene(large_answers=1, answers_bytes=64 << 20 if room else 16 << 20) as front:

        async def large(out: Output) -> None:
            for _ in range(25):
                await out.send("x" * 400_000)
            await trio.sleep_forever()

        front.sources["large"] = large
        stream_id, small = await front.start("large"), await front.ended()
        while front.supervisor.get(stream_id).tail_seq < 25:
            await trio.testing.wait_all_tasks_blocked()
        asked = f"GET /streams/{stream_id}{what} HTTP/1.1\r\nhost: localhost\r\n\r\n".encode()
        begun = b"event: snapshot" if "events" in what else b'{"id":'
        async with front.client(receive_buffer=4096) as stalled, front.client() as other:
            await stalled.send(asked)
            await until(stalled, begun)
            for path in ("/streams", f"/streams/{small}/snapshot", f"/streams/{small}/events?after=snapshot"):
                assert (await front.ask("GET", path)).status == 200
            if room:
                await other.send(asked)
                await until(other, begun)
                return
            for _ in range(2):
                answer = await front.ask("GET", f"/streams/{stream_id}{what}")
                if "max_behind" in what:
                    told = json.loads(interpret(answer.body).events[-1].data)
                else:
                    assert (answer.status, answer.headers["retry-after"]) == (503, "1")
                    told = answer.json["error"]
                assert (told["kind"], told["temporary"], told["retry_after_s"]) == ("overloaded", True, 1)
            await trio.aclose_forcefully(stalled.stream)
            await trio.testing.wait_all_tasks_blocked(0.01)
            await other.send(asked)
            await until(other, begun)


@pytest.mark.parametrize("query", ["?after=snapshot", "?max_behind=1"])
async def test_who_has_its_snapshot_holds_up_nobody(query: str) -> None:
    """Once its snapshot is sent, a reader goes on for as long as it likes, and others get theirs."""
    async with scene(large_answers=1) as front:

        async def begun(out: Output) -> None:
            for _ in range(3):
                await out.send("begun ")
            await trio.sleep_forever()

        front.sources["begun"] = begun
        stream_id = await front.start("begun")
        asked = f"GET /streams/{stream_id}/events{query} HTTP/1.1\r\nhost: localhost\r\n\r\n".encode()
        async with front.client() as first, front.client() as second:
            for client in (first, second):
                await client.send(asked)
                await until(client, b"event: snapshot")


async def test_a_head_is_no_reader() -> None:
    """HEAD of events answers as GET would begin, and ends."""
    async with scene() as front:
        stream_id = await front.start("forever")
        answer = await front.ask("HEAD", f"/streams/{stream_id}/events")
        assert (answer.status, answer.headers["content-type"]) == (200, "text/event-stream; charset=utf-8")
        assert front.supervisor.get(stream_id).info().readers == 0


async def test_the_answer_so_far_and_figures() -> None:
    """A snapshot is the fold; /health and /stats are what the supervisor says of itself."""
    async with scene() as front:
        stream_id = await front.ended()
        assert (await front.ask("GET", f"/streams/{stream_id}/snapshot")).json["text"] == TEXT
        assert (await front.ask("GET", "/health")).json["status"] == "ok"
        assert (await front.ask("GET", "/stats")).json["supervisor"]["started"] == 1
