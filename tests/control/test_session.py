from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import attrs
import pytest
import trio

from supervisor.control import ControlLimits, EventMessage, LinkLimits, SessionLimits, payload_of
from supervisor.control.notifications import cut, encode_events, encode_text
from supervisor.dialects import NATIVE, Delta, Dialect
from supervisor.errors import StoreError
from supervisor.stores import Event, MemoryStore, SQLiteStore
from supervisor.streams import Limits, MemoryPolicy, Output

from .harness import Closed, open_scene


def told(message: dict[str, Any]) -> tuple[int, int]:
    return message["params"]["first"], message["params"]["last"]


def small(**changes: Any) -> ControlLimits:
    return attrs.evolve(ControlLimits(), session=SessionLimits(**changes))


async def test_a_stream_from_start_to_outcome() -> None:
    """Start, watch to the outcome, get, wait, snapshot and list all tell the same, settled story."""
    async with open_scene() as scene:
        peer = await scene.peer()
        started = (
            await peer.call("stream.start", upstream="ten", request={"model": "m"}, labels={"a": "b"})
        )["result"]
        assert started["created"] is True
        assert scene.started[0].request == {"model": "m"}
        subscribed = (await peer.call("stream.subscribe", id=started["id"]))["result"]
        assert (subscribed["id"], subscribed["epoch"], subscribed["from"]) == (started["id"], 1, 0)
        events: list[dict[str, Any]] = []
        while not events or events[-1]["kind"] != "outcome":
            message = await peer.message()
            assert (message["method"], message["params"]["sub"]) == ("stream.events", subscribed["sub"])
            assert told(message)[0] == (events[-1]["seq"] + 1 if events else 1)
            events += message["params"]["events"]
        data = [event for event in events if event["kind"] == "data"]
        assert "".join(event["text"] for event in data) == "".join(f"t{n} " for n in range(10))
        assert json.loads(data[3]["data"]) == {"text": "t3 "}
        outcome = events[-1]["outcome"]
        assert (outcome["state"], outcome["last_seq"]) == ("completed", events[-1]["seq"])
        info = (await peer.call("stream.get", id=started["id"]))["result"]
        assert info["outcome"] == outcome
        assert (info["meta"], info["labels"], info["upstream"]) == ({"model": "m"}, {"a": "b"}, "ten")
        waited = (await peer.call("stream.wait", id=started["id"]))["result"]
        assert (waited["outcome"], waited["state"]) == (outcome, "completed")
        snapshot = (await peer.call("stream.snapshot", id=started["id"]))["result"]
        assert snapshot["text"] == "".join(f"t{n} " for n in range(10))
        page = (await peer.call("stream.list", labels={"a": "b"}, states=["completed"]))["result"]
        assert [row["outcome"] for row in page["streams"]] == [outcome]
        assert scene.server.statistics().subscriptions == 0


async def test_credit_is_kept_to_the_event() -> None:
    """With credit 4 exactly four events come; each grant brings as many more; the subscription costs nothing meanwhile."""
    async with open_scene() as scene:
        peer = await scene.peer()
        stream = (await peer.call("stream.start", upstream="ten", request={}))["result"]["id"]
        await peer.call("stream.wait", id=stream)
        sub = (await peer.call("stream.subscribe", id=stream, credit=4))["result"]["sub"]
        assert told(await peer.message()) == (1, 4)
        reply = await peer.call("hello")  # were there more to come, it would have come before this
        assert reply["result"]["protocol"] == "stream-supervisor.v1"
        await peer.call("stream.credit", sub=sub, credit=1)
        assert told(await peer.message()) == (5, 5)
        await peer.tell("stream.credit", sub=sub, credit=100)
        last = await peer.message()
        assert told(last) == (6, 11)
        assert last["params"]["events"][-1]["kind"] == "outcome"
        gone = await peer.call("stream.credit", sub=sub, credit=1)
        assert gone["error"]["data"]["kind"] == "unknown_subscription"


async def test_positions() -> None:
    """After a cursor, the tail, a snapshot and the end: each says where it starts, and nothing is repeated."""
    async with open_scene() as scene:
        peer = await scene.peer()
        release = trio.Event()

        async def two_halves(out: Output) -> None:
            await out.send("one ")
            await out.send("two ")
            await release.wait()
            await out.send("three ")

        scene.sources["halves"] = two_halves
        stream = (await peer.call("stream.start", upstream="halves", request={}))["result"]["id"]
        while (await peer.call("stream.get", id=stream))["result"]["tail_seq"] < 2:
            pass
        tail = (await peer.call("stream.subscribe", id=stream, after="tail"))["result"]
        assert (tail["from"], tail["tail"]) == (2, 2)
        snapshot = (await peer.call("stream.subscribe", id=stream, after="snapshot"))["result"]
        assert (snapshot["from"], snapshot["snapshot"]["text"]) == (2, "one two ")
        cursor = (await peer.call("stream.subscribe", id=stream, after={"epoch": 1, "seq": 1}))["result"]
        message = await peer.message()
        assert (message["params"]["sub"], told(message)) == (cursor["sub"], (2, 2))
        gap = await peer.call("stream.subscribe", id=stream, after={"epoch": 1, "seq": 9})
        assert gap["error"]["code"] == -32004
        assert gap["error"]["data"]["tail"] == 2
        release.set()
        firsts: dict[str, int] = {}
        ended: set[str] = set()
        while len(ended) < 3:
            message = await peer.message()
            firsts.setdefault(message["params"]["sub"], told(message)[0])
            if message["params"]["events"][-1]["kind"] == "outcome":
                ended.add(message["params"]["sub"])
        assert firsts == {tail["sub"]: 3, snapshot["sub"]: 3, cursor["sub"]: 3}
        over = (await peer.call("stream.subscribe", id=stream, after="snapshot"))["result"]
        assert (over["from"], over["state"], over["snapshot"]["text"]) == (
            over["tail"],
            "completed",
            "one two three ",
        )
        assert scene.server.statistics().subscriptions == 0


def test_the_view_text_joins_what_it_can() -> None:
    """In the view `text` runs of text become one event each, the rest stays, and positions are still contiguous."""
    events = [
        Event(1, 1, 1.0, "attempt", b'{"number":1}'),
        Event(1, 2, 2.0, "data", b"{}", text="a"),
        Event(1, 3, 3.0, "data", b"{}"),
        Event(1, 4, 4.0, "data", b"{}", text="b"),
        Event(1, 5, 5.0, "note", b'{"x":1}'),
        Event(1, 6, 6.0, "data", b"{}", text="\ud83d"),
        Event(1, 7, 7.0, "outcome", b'{"state":"completed"}'),
    ]
    assert json.loads(encode_text(events)) == [
        {"kind": "attempt", "at": 1.0, "seq": 1, "details": {"number": 1}},
        {"kind": "text", "at": 4.0, "seq": 4, "first": 2, "last": 4, "text": "ab"},
        {"kind": "note", "at": 5.0, "seq": 5, "details": {"x": 1}},
        {"kind": "text", "at": 6.0, "seq": 6, "first": 6, "last": 6, "text": "\ufffd"},
        {"kind": "outcome", "at": 7.0, "seq": 7, "outcome": {"state": "completed"}},
    ]


def test_payloads_go_over_the_wire_exactly() -> None:
    """Quotes, control characters and U+2028 survive as a JSON string; what is not UTF-8 goes as base64."""
    payloads = [b'{"a": "\\u2028"}', "{\u2028}".encode(), b'\x00\x1f"\\', b"\xff\xfe", b""]
    encoded = json.loads(encode_events([Event(1, i, 0.0, "data", p) for i, p in enumerate(payloads, 1)]))
    assert encoded[3] == {"kind": "data", "at": 0.0, "seq": 4, "data_b64": "//4="}
    assert [payload_of(EventMessage(**event)) for event in encoded] == payloads


async def test_history_is_read_from_the_store_while_the_connection_lives_on() -> None:
    """Events beyond the tail in memory are fetched, in order, bounded per notification, beside other work."""
    async with open_scene(limits=small(notification_events=7)) as scene:
        peer = await scene.peer()
        many = 2000

        async def source(out: Output) -> None:
            for number in range(many):
                await out.send(f"{number},")

        scene.sources["many"] = source
        stream = (await peer.call("stream.start", upstream="many", request={}))["result"]["id"]
        await peer.call("stream.wait", id=stream)
        await peer.call("stream.subscribe", id=stream, credit=5000)
        text, last, kind = "", 0, ""
        while kind != "outcome":
            message = await peer.message()
            first, end = told(message)
            assert first == last + 1
            assert end - first < 7
            last = end
            kind = message["params"]["events"][-1]["kind"]
            text += "".join(event.get("text", "") for event in message["params"]["events"])
        assert text == "".join(f"{number}," for number in range(many))


async def test_a_wait_delays_nobody() -> None:
    """While `stream.wait` is under way the same connection cancels the stream; both answers tell the settled state."""
    async with open_scene() as scene:
        peer = await scene.peer()
        stream = (await peer.call("stream.start", upstream="forever", request={}, key="k"))["result"]["id"]
        wait_id = await peer.ask("stream.wait", id=stream)
        cancel_id = await peer.ask("stream.cancel", key="k", reason="enough", actor="me")
        replies = {(reply := await peer.message())["id"]: reply["result"] for _ in range(2)}
        assert replies[cancel_id] == {
            "outcome": "won",
            "id": stream,
            "key": "k",
            "state": "cancelled",
            "reason": "requested",
        }
        outcome = replies[wait_id]["outcome"]
        assert (outcome["state"], outcome["actor"], outcome["message"]) == ("cancelled", "me", "enough")
        again = (await peer.call("stream.cancel", id=stream))["result"]
        assert (again["outcome"], again["state"]) == ("already_terminal", "cancelled")


class Talking:
    """A source that never ends, in a dialect whose cancel drains."""

    dialect = Dialect(name="billed", framing="none", reader=NATIVE.reader, stop="drain")

    async def __call__(self, out: Output) -> None:
        while True:
            out.append(b"{}", "", (Delta(text="abcd"),))
            out.flush()
            await trio.sleep(0.001)


async def test_a_drain_has_the_budgets_that_it_is_given() -> None:
    """Without a mode the dialect's holds; `drain_tokens` and `drain_s` end it; what is no number of tokens is refused."""
    async with open_scene() as scene:
        scene.sources["talking"] = Talking()
        peer = await scene.peer()
        for budget in (
            {"drain_tokens": 3, "drain_s": 3600},
            {"drain_s": 0.01},
            {"mode": "drain", "drain_tokens": 0},
        ):
            stream = (await peer.call("stream.start", upstream="talking", request={}))["result"]["id"]
            told = (await peer.call("stream.cancel", id=stream, wait_s=60, **budget))["result"]
            assert (told["outcome"], told["reason"]) == ("won", "requested")
        stream = (await peer.call("stream.start", upstream="talking", request={}))["result"]["id"]
        for unsaid in ({}, {"mode": None}):
            draining = (await peer.call("stream.cancel", id=stream, drain_s=3600, wait_s=0, **unsaid))[
                "result"
            ]
            assert (draining["outcome"], draining["state"]) == ("requested", "stopping")
        for tokens in (-1, 1.5, "3"):
            error = (await peer.call("stream.cancel", id=stream, drain_tokens=tokens))["error"]
            assert "drain_tokens" in error["message"]
        aborted = (await peer.call("stream.cancel", id=stream, mode="abort"))["result"]
        assert (aborted["outcome"], aborted["state"]) == ("won", "cancelled")
        ended = (await peer.call("supervisor.stats"))["result"]["supervisor"]["ended"]
        assert ended == {"cancelled": {"requested": 4}}


async def test_cancel_by_key_before_start_and_by_labels() -> None:
    """A key not seen yet is remembered; labels and all are answered stream by stream."""
    async with open_scene() as scene:
        peer = await scene.peer()
        buried = (await peer.call("stream.cancel", key="early"))["result"]
        assert buried["outcome"] == "tombstoned"
        late = (await peer.call("stream.start", upstream="forever", request={}, key="early"))["result"]
        assert (await peer.call("stream.wait", id=late["id"]))["result"]["state"] == "cancelled"
        for team in ("x", "x", "y"):
            await peer.call("stream.start", upstream="forever", request={}, labels={"team": team})
        some = (await peer.call("stream.cancel", labels={"team": "x"}))["result"]["results"]
        assert [result["outcome"] for result in some] == ["won", "won"]
        rest = (await peer.call("stream.cancel", all=True))["result"]["results"]
        assert [result["outcome"] for result in rest] == ["won"]


async def test_start_conflicts_and_options() -> None:
    """`key` attaches, rejects or replaces; clocks are the upstream's unless stated; a bad upstream is named."""
    async with open_scene() as scene:
        peer = await scene.peer()
        first = (await peer.call("stream.start", upstream="forever", request={}, key="k"))["result"]
        joined = (await peer.call("stream.start", upstream="forever", request={}, key="k"))["result"]
        assert (joined["id"], joined["created"]) == (first["id"], False)
        rejected = await peer.call(
            "stream.start", upstream="forever", request={}, key="k", on_conflict="reject"
        )
        assert rejected["error"]["data"]["kind"] == "key_conflict"
        assert rejected["error"]["data"]["id"] == first["id"]
        third = (
            await peer.call(
                "stream.start",
                upstream="forever",
                request={},
                key="k",
                on_conflict="replace",
                deadlines={"total_s": 3, "first_event_s": None},
                on_detach={"mode": "cancel", "grace_s": 99},
            )
        )["result"]
        assert third["created"] is True
        replaced = (await peer.call("stream.wait", id=first["id"]))["result"]["outcome"]
        assert (replaced["state"], replaced["reason"]) == ("cancelled", "replaced")
        spec = scene.supervisor.get(third["id"])._spec
        assert (spec.deadlines.total_s, spec.deadlines.first_event_s, spec.deadlines.idle_s) == (
            3.0,
            None,
            7.0,
        )
        assert (spec.on_detach.mode, spec.on_detach.grace_s) == ("cancel", 99.0)
        unknown = await peer.call("stream.start", upstream="nope", request={})
        assert (unknown["error"]["code"], unknown["error"]["data"]["field"]) == (-32602, "upstream")


async def test_the_limit_of_live_streams_is_told_as_temporary() -> None:
    """A start beyond the limit is refused with `retry_after_s`, and has started nothing."""
    async with open_supervisor_scene(max_live=1) as scene:
        peer = await scene.peer()
        await peer.call("stream.start", upstream="forever", request={})
        full = (await peer.call("stream.start", upstream="forever", request={}))["error"]
        assert (full["code"], full["data"]["temporary"], full["data"]["retry_after_s"]) == (-32003, True, 1.0)
        page = (await peer.call("stream.list", live=True))["result"]
        assert len(page["streams"]) == 1


def open_supervisor_scene(*, control: ControlLimits | None = None, **changes: Any) -> Any:
    return open_scene(limits=control, supervisor_limits=Limits(**changes))


async def test_pages_of_a_list() -> None:
    """Pages are newest first, and `next` leads through all of them once."""
    async with open_scene() as scene:
        peer = await scene.peer()
        ids = [
            (await peer.call("stream.start", upstream="ten", request={}))["result"]["id"] for _ in range(5)
        ]
        for stream in ids:
            await peer.call("stream.wait", id=stream)
        for filters in ({}, {"live": False}):
            seen: list[str] = []
            before = None
            while True:
                more = {} if before is None else {"before": before}
                page = (await peer.call("stream.list", limit=2, **filters, **more))["result"]
                seen += [row["id"] for row in page["streams"]]
                before = page["next"]
                if before is None:
                    break
            assert seen == ids[::-1]


async def test_batches() -> None:
    """A batch is answered with one array, side by side, errors in place; notifications in it are not answered."""
    async with open_scene() as scene:
        peer = await scene.peer()
        stream = (await peer.call("stream.start", upstream="forever", request={}))["result"]["id"]
        calls = [
            {"jsonrpc": "2.0", "id": "w", "method": "stream.wait", "params": {"id": stream}},
            {"jsonrpc": "2.0", "id": "c", "method": "stream.cancel", "params": {"id": stream}},
            {"jsonrpc": "2.0", "id": "s", "method": "stream.subscribe", "params": {"id": stream}},
            {"jsonrpc": "2.0", "method": "hello"},
            {"jsonrpc": "2.0", "id": "n", "method": "no.such"},
            5,
        ]
        await peer.text(json.dumps(calls))
        replies = {reply["id"]: reply for reply in await peer.message()}
        assert set(replies) == {"w", "c", "s", "n", None}
        assert replies["w"]["result"]["state"] == "cancelled"
        assert replies["n"]["error"]["code"] == -32601
        assert replies[None]["error"]["code"] == -32600
        assert (await peer.message())["params"]["sub"] == replies["s"]["result"]["sub"]
        await peer.text('[{"jsonrpc": "2.0", "method": "hello"}]')
        await peer.text("[]")
        assert (await peer.message())["error"]["code"] == -32600


async def test_a_batch_that_asks_for_too_much_is_answered_in_part() -> None:
    """Past `batch_reply_bytes` calls for more of what may be large are refused, to be made one by one; others are answered."""
    async with open_scene(limits=small(batch_reply_bytes=1200)) as scene:
        peer = await scene.peer()
        stream = (await peer.call("stream.start", upstream="ten", request={}))["result"]["id"]
        await peer.call("stream.wait", id=stream)
        calls = [
            {"jsonrpc": "2.0", "id": number, "method": "stream.snapshot", "params": {"id": stream}}
            for number in range(9)
        ]
        last = {"jsonrpc": "2.0", "id": "w", "method": "stream.wait", "params": {"id": stream}}
        await peer.text(json.dumps([*calls, last]))
        replies = {reply["id"]: reply for reply in await peer.message()}
        assert len(replies) == 10
        assert replies["w"]["result"]["state"] == "completed"
        assert replies[0]["result"]["text"].startswith("t0 t1 ")
        refused = replies[8]["error"]["data"]
        assert (refused["kind"], refused["temporary"], refused["limit"]) == ("too_many_requests", True, 1200)
        assert scene.server.statistics().pending_requests == 0


async def test_bad_messages_are_answered_and_survived() -> None:
    """Broken JSON, unknown methods and bad parameters are each answered as JSON-RPC says; the connection goes on."""
    async with open_scene() as scene:
        peer = await scene.peer()
        for text, code in (
            ("{", -32700),
            ("[" * 50_000, -32700),
            ("7", -32600),
            ('{"jsonrpc":"2.0","id":1,"method":"nope"}', -32601),
            ('{"jsonrpc":"2.0","id":1,"method":"request.cancel","params":{"id":1}}', -32601),
            ('{"jsonrpc":"2.0","id":1,"method":"stream.get","params":{}}', -32602),
        ):
            await peer.text(text)
            assert (await peer.message())["error"]["code"] == code
        assert (await peer.call("stream.get", id="nope"))["error"]["code"] == -32001
        await peer.tell("stream.get", bad=1)  # not answered, being no request
        assert (await peer.call("supervisor.health"))["result"]["status"] == "ok"
        assert scene.server.statistics().handler_errors == 0


async def test_a_bug_in_a_handler_costs_one_request(caplog: pytest.LogCaptureFixture) -> None:
    """An unexpected exception is logged and counted, and answered as `internal`; the connection goes on."""
    async with open_scene() as scene:

        def broken(_: object) -> Any:
            raise KeyError("secret detail")

        scene.server._resolve = broken
        peer = await scene.peer()
        error = (await peer.call("stream.start", upstream="ten", request={}))["error"]
        assert (error["code"], "secret" in json.dumps(error)) == (-32603, False)
        assert (await peer.call("hello"))["result"]
        assert scene.server.statistics().handler_errors == 1
    assert "stream.start failed" in caplog.text


async def test_requests_in_flight_are_bounded_and_can_be_withdrawn() -> None:
    """One more than `max_requests` is refused as temporary, quick ones still pass, and a withdrawn one makes room."""
    async with open_scene(limits=small(max_requests=3)) as scene:
        peer = await scene.peer()
        stream = (await peer.call("stream.start", upstream="forever", request={}))["result"]["id"]
        waits = [await peer.ask("stream.wait", id=stream) for _ in range(3)]
        refused = (await peer.call("stream.wait", id=stream))["error"]
        assert (refused["data"]["kind"], refused["data"]["temporary"]) == ("too_many_requests", True)
        assert (await peer.call("supervisor.health"))["result"]["live"] == 1
        await peer.tell("stream.wait", id=stream)  # takes no slot it has not
        await peer.tell("request.cancel", id=waits[1])
        withdrawn = await peer.message()
        assert (withdrawn["id"], withdrawn["error"]["data"]["kind"]) == (waits[1], "request_cancelled")
        assert (await peer.call("stream.get", id=stream))["result"]["state"] == "streaming"


async def test_subscriptions_are_bounded() -> None:
    """One more than `max_subscriptions` is refused; one given up makes room."""
    async with open_scene(limits=small(max_subscriptions=2)) as scene:
        peer = await scene.peer()
        stream = (await peer.call("stream.start", upstream="forever", request={}))["result"]["id"]
        subs = [
            (await peer.call("stream.subscribe", id=stream, after="tail"))["result"]["sub"] for _ in range(2)
        ]
        refused = (await peer.call("stream.subscribe", id=stream, after="tail"))["error"]
        assert refused["data"] == {
            "kind": "too_many_subscriptions",
            "temporary": False,
            "retry_after_s": None,
            "limit": 2,
        }
        left = (await peer.call("stream.unsubscribe", sub=subs[0]))["result"]
        assert left["epoch"] == 1
        assert "result" in await peer.call("stream.subscribe", id=stream, after="tail")


async def test_leaving_detaches_and_does_not_cancel() -> None:
    """When a connection ends its subscriptions are closed, and the streams it started go on."""
    async with open_scene() as scene:
        peer = await scene.peer()
        stream = (await peer.call("stream.start", upstream="forever", request={}))["result"]["id"]
        await peer.call("stream.subscribe", id=stream)
        assert scene.supervisor.get(stream).info().readers == 1
        await peer.stream.aclose()
        other = await scene.peer()
        while (info := (await other.call("stream.get", id=stream))["result"])["readers"]:
            pass
        assert info["state"] == "streaming"


async def test_operations() -> None:
    """Stats, health, reap, drain and shutdown do what they say; after a drain a start is refused as temporary."""
    async with open_scene() as scene:
        peer = await scene.peer()
        started = (await peer.call("stream.start", upstream="forever", request={}, tenant="t"))["result"]
        told = (await peer.call("stream.get", id=started["id"]))["result"]
        stats = (await peer.call("supervisor.stats"))["result"]
        assert (stats["supervisor"]["live"], stats["control"]["connections"]) == (1, 1)
        assert told["tenant"] == "t"
        assert told["bytes_held"] >= told["tail_bytes"] >= told["pending_bytes"] >= 0
        memory = stats["supervisor"]["memory"]
        assert memory["tenants"] == {"t": {"live": 1, "bytes_held": memory["bytes_held"]}}
        assert memory["beside"]["connections"] == stats["control"]["bytes_held"]
        report = (await peer.call("supervisor.reap", dry_run=True))["result"]
        assert (report["dry_run"], report["live"], report["reaped"]) == (True, 1, [])
        assert (await peer.call("supervisor.drain", timeout_s=0))["result"]["live"] == 1
        closed = (await peer.call("stream.start", upstream="ten", request={}))["error"]
        assert (closed["data"]["kind"], closed["data"]["temporary"]) == ("closed", True)
        assert (await peer.call("supervisor.health"))["result"]["status"] == "draining"
        assert (await peer.call("supervisor.shutdown", grace_s=3))["result"] == {"accepted": True}
        assert [params.grace_s for params in scene.shutdowns] == [3.0]
    async with open_scene(shutdown=False) as scene:
        peer = await scene.peer()
        assert (await peer.call("supervisor.shutdown"))["error"]["data"]["kind"] == "unsupported"


async def test_a_server_that_ends_says_so() -> None:
    """When the server is cancelled, what is queued is sent, and connections are closed with the code to reconnect."""
    async with open_scene() as scene:
        peer = await scene.peer()
        await peer.call("hello")
        scene.nursery.cancel_scope.cancel()
        with pytest.raises(Closed) as closed, trio.CancelScope(shield=True):
            while True:
                await peer.frame()
        assert closed.value.code == 4000
        await peer.stream.aclose()


def test_a_notification_stays_within_its_epoch_and_its_size() -> None:
    """A batch is cut where the epoch changes, at the number of events, and before its payload grows too large."""

    def event(seq: int, *, epoch: int = 1, size: int = 10) -> Event:
        return Event(epoch, seq, 0.0, "data", b"x" * size)

    def parts(*events: Event) -> list[list[int]]:
        found: list[list[int]] = []
        while events:
            part = cut(events, 3, 100)
            found.append([event.seq for event in part])
            events = events[len(part) :]
        return found

    assert parts(event(1), event(2), event(3, epoch=2), event(4, epoch=2)) == [[1, 2], [3, 4]]
    assert parts(*map(event, range(1, 8))) == [[1, 2, 3], [4, 5, 6], [7]]
    assert parts(event(1, size=60), event(2, size=60), event(3, size=500), event(4)) == [[1], [2], [3], [4]]


class HesitantStore(MemoryStore):
    """A store whose heads become durable when it is told."""

    def __init__(self) -> None:
        super().__init__()
        self.asked = trio.Event()
        self.go = trio.Event()

    async def wait_durable(self, stream_id: str, seq: int) -> None:
        if not seq:
            self.asked.set()
            await self.go.wait()
        await super().wait_durable(stream_id, seq)


async def test_a_start_is_answered_when_it_is_recorded() -> None:
    """The reply to `stream.start` waits for the head to be durable: what was promised survives a crash."""
    store = HesitantStore()
    async with open_scene(store=store) as scene:
        peer = await scene.peer()
        start = await peer.ask("stream.start", upstream="forever", request={})
        await store.asked.wait()
        hello = await peer.ask("hello")
        assert (await peer.message())["id"] == hello
        store.go.set()
        assert (await peer.message())["id"] == start


class ForgetfulStore(MemoryStore):
    """A store that keeps heads and can make nothing else durable."""

    async def wait_durable(self, stream_id: str, seq: int) -> None:
        if seq:
            raise StoreError("the disk is full")
        await super().wait_durable(stream_id, seq)


async def test_an_outcome_that_cannot_be_recorded_ends_the_subscription_with_an_error() -> None:
    """No outcome is shown that is not durable: watchers and waiters are told of the store's failure instead."""
    async with open_scene(store=ForgetfulStore()) as scene:
        peer = await scene.peer()
        stream = (await peer.call("stream.start", upstream="ten", request={}))["result"]["id"]
        sub = (await peer.call("stream.subscribe", id=stream))["result"]["sub"]
        while (message := await peer.message())["method"] == "stream.events":
            assert all(event["kind"] == "data" for event in message["params"]["events"])
        assert (message["method"], message["params"]["sub"]) == ("stream.failed", sub)
        assert message["params"]["error"]["data"]["kind"] == "store"
        assert (await peer.call("stream.wait", id=stream))["error"]["code"] == -32006
        assert (await peer.call("stream.get", id=stream))["result"]["outcome"] is None
        assert scene.server.statistics().subscriptions == 0


async def test_a_cancel_of_many_tells_which_outcome_could_not_be_recorded() -> None:
    """Cancelled by labels or all, a stream whose outcome cannot be recorded has its `error`; the others have no such field."""
    async with open_scene(store=ForgetfulStore()) as scene:
        peer = await scene.peer()
        stream = (await peer.call("stream.start", upstream="forever", request={}))["result"]["id"]
        (result,) = (await peer.call("stream.cancel", all=True))["result"]["results"]
        assert (result["id"], "the disk is full" in result["error"]) == (stream, True)
    async with open_scene() as scene:
        peer = await scene.peer()
        await peer.call("stream.start", upstream="forever", request={})
        (result,) = (await peer.call("stream.cancel", all=True))["result"]["results"]
        assert (result["outcome"], "error" in result) == ("won", False)


class ReluctantStore(MemoryStore):
    """A store that makes outcomes durable when it is told."""

    def __init__(self) -> None:
        super().__init__()
        self.go = trio.Event()

    async def wait_durable(self, stream_id: str, seq: int) -> None:
        if seq:
            await self.go.wait()
        await super().wait_durable(stream_id, seq)


async def test_a_reap_says_what_has_settled() -> None:
    """`supervisor.reap` waits up to `wait_s` for the outcomes of what it reaped, and says of each whether it is durable."""
    store = ReluctantStore()
    policy = MemoryPolicy(max_age_s=1e-9, sweep_every_s=3600)
    async with open_scene(store=store, memory=policy) as scene:
        peer = await scene.peer()
        for ready in (False, True):
            stream = (await peer.call("stream.start", upstream="forever", request={}))["result"]["id"]
            (would,) = (await peer.call("supervisor.reap", dry_run=True))["result"]["reaped"]
            assert (would["id"], would["settled"]) == (stream, False)
            if ready:
                store.go.set()
            with trio.move_on_after(4) as scope:  # less than the default of `wait_s`
                reply = await peer.call("supervisor.reap", wait_s=60 if ready else 0)
            if scope.cancelled_caught:
                store.go.set()  # else the supervisor could not be left
                pytest.fail("it waited for longer than it was told to")
            (reaped,) = reply["result"]["reaped"]
            assert (reaped["id"], reaped["reason"], reaped["settled"]) == (stream, "reaped_age", ready)
        negative = (await peer.call("supervisor.reap", wait_s=-1))["error"]["data"]
        assert negative["field"] == "wait_s"


async def test_streams_of_an_earlier_run_are_read_from_the_store(tmp_path: Path) -> None:
    """After a restart ended streams are found, watched, waited for and folded as if nothing had happened."""
    path = tmp_path / "journal.db"
    async with open_scene(store=SQLiteStore(path)) as scene:
        peer = await scene.peer()
        stream = (await peer.call("stream.start", upstream="ten", request={}, key="k"))["result"]["id"]
        outcome = (await peer.call("stream.wait", id=stream))["result"]["outcome"]
    async with open_scene(store=SQLiteStore(path)) as scene:
        peer = await scene.peer()
        assert (await peer.call("stream.wait", key="k"))["result"]["outcome"] == outcome
        snapshot = (await peer.call("stream.snapshot", id=stream))["result"]
        assert snapshot["text"] == "".join(f"t{n} " for n in range(10))
        placed = (await peer.call("stream.subscribe", id=stream, after="snapshot"))["result"]
        assert placed["snapshot"]["text"] == snapshot["text"]
        await peer.call("stream.subscribe", id=stream, after={"epoch": 1, "seq": 9})
        message = await peer.message()
        assert told(message) == (10, 11)
        assert message["params"]["events"][-1]["outcome"] == outcome


async def test_one_slow_subscription_does_not_hold_up_another() -> None:
    """A subscription without credit stands still while another of the same connection is served to its end."""
    async with open_scene() as scene:
        peer = await scene.peer()
        stream = (await peer.call("stream.start", upstream="ten", request={}))["result"]["id"]
        await peer.call("stream.wait", id=stream)
        still = (await peer.call("stream.subscribe", id=stream, credit=0))["result"]["sub"]
        flowing = (await peer.call("stream.subscribe", id=stream))["result"]["sub"]
        message = await peer.message()
        assert message["params"]["sub"] == flowing
        assert message["params"]["events"][-1]["kind"] == "outcome"
        await peer.call("stream.credit", sub=still, credit=1)
        assert told(await peer.message()) == (1, 1)


def test_limits_are_checked() -> None:
    """A limit that could not work is refused where it is given."""
    with pytest.raises(ValueError, match="stall_s"):
        ControlLimits(link=LinkLimits(stall_s=0))
