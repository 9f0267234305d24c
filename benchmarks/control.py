"""CPU of the control channel's server: one stream watched by many, and many streams watched over one connection.

**Fan-out.** One event at a time to 100 connections, CPU per delivery. `ours` is the whole way: the event is appended to the
journal and folded, each subscriber is woken, the notification is encoded, framed and written. `trio-websocket` is handed
the finished text of that notification and does `send_message` on each connection. `write` is handed the finished frame and
does one system call for each: what nobody can do without. All are in one process, their windows take turns, and an event is begun
when the one before has been written, so that nothing is batched: `back to back`, as on a busy server, or `at rest`, 5 ms
apart, when what the event before left in the processor's caches is partly gone.

**One connection.** 200 streams of 50 events/s, all subscribed to over one connection, CPU per event from the append to the
write. The streams' phases are evenly spread. In `ticks` the load wakes each millisecond and appends the ten or so events that
are due, as a busy machine's timers and sockets have it; in `singly` each event has a turn of the loop, and so a write, of
its own. `unread` is the same with nobody subscribed: what the streams, and the load itself, cost in any case.

The readers are in a process of their own, and throw away what they get after counting it.
"""

from __future__ import annotations

import base64
import contextlib
import json
import os
import select
import socket
import struct
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from typing import Any

import attrs
import measure
import trio
import trio_websocket

from supervisor.control import SUBPROTOCOL, ControlServer
from supervisor.control.frames import OP_TEXT, build_frame
from supervisor.control.notifications import encode_events
from supervisor.dialects import Delta
from supervisor.streams import Output, Stream, Supervisor, open_supervisor

SCRIPT = __file__
ROUNDS = 7
FANOUT = "one stream to many subscribers, {}: CPU per delivery"
PACES = {"back to back": 0.0, "at rest": 0.005}
WATCHED = "many streams over one connection: CPU per event"
LOADS = (
    "unread, ticks",
    "subscribed, ticks",
    "subscribed as text, ticks",
    "unread, singly",
    "subscribed, singly",
)
PAYLOAD = json.dumps(
    {
        "id": "chatcmpl-AbCdEfGhIjKlMnOpQrStUvWxYz012",
        "object": "chat.completion.chunk",
        "created": 1_700_000_000,
        "model": "gpt-4o-mini-2024-07-18",
        "service_tier": "default",
        "system_fingerprint": "fp_0123456789",
        "choices": [{"index": 0, "delta": {"content": " token"}, "logprobs": None, "finish_reason": None}],
    },
    separators=(",", ":"),
).encode()
_TURNS = 2  # of the loop, for an event to be delivered: the one it comes in and the next
_TICK_S = 0.001
DELTAS = (Delta(text=" token"),)


# --- the readers: a process of their own ------------------------------------------------------------------------------


def read(given: dict[str, Any]) -> None:
    """Connect to each port, subscribe to what is named, and count what comes until standard input closes."""
    measure.raise_descriptor_limit()
    poll = select.epoll()
    sockets: dict[int, socket.socket] = {}
    for port, streams in given["connections"]:
        connection = socket.create_connection(("127.0.0.1", port))
        connection.sendall(_upgrade(port))
        head = b""
        while b"\r\n\r\n" not in head:
            head += connection.recv(4096)
        assert b" 101 " in head, head
        for number, stream in enumerate(streams):
            params = {"id": stream, "credit": 1_000_000, "view": given["view"], "after": "tail"}
            call = {"jsonrpc": "2.0", "id": number, "method": "stream.subscribe", "params": params}
            connection.sendall(_masked(json.dumps(call).encode()))
            if (
                number % 32 == 31 or number == len(streams) - 1
            ):  # no more than the limit of unanswered requests
                _skip_replies(connection, number % 32 + 1)
        connection.setblocking(False)
        sockets[connection.fileno()] = connection
        poll.register(connection, select.EPOLLIN)
    poll.register(0, select.EPOLLIN)
    print(json.dumps({"connected": len(sockets)}), flush=True)
    counted = 0
    while True:
        for descriptor, _ in poll.poll():
            if descriptor == 0:
                print(json.dumps({"counted": counted}), flush=True)
                return
            data = sockets[descriptor].recv(1 << 18)
            if not data:
                poll.unregister(descriptor)
            counted += data.count(b'"kind":"')


def _upgrade(port: int) -> bytes:
    lines = [
        "GET / HTTP/1.1",
        f"Host: 127.0.0.1:{port}",
        "Connection: Upgrade",
        "Upgrade: websocket",
        "Sec-WebSocket-Version: 13",
        f"Sec-WebSocket-Key: {base64.b64encode(os.urandom(16)).decode()}",
        f"Sec-WebSocket-Protocol: {SUBPROTOCOL}",
    ]
    return "\r\n".join([*lines, "", ""]).encode()


def _masked(payload: bytes) -> bytes:
    """Return a client's text frame whose mask is zero."""
    return struct.pack("!BBH", 0x81, 0x80 | 126, len(payload)) + bytes(4) + payload


def _skip_replies(connection: socket.socket, count: int) -> None:
    data = b""
    while data.count(b'"result":') < count:
        data += connection.recv(1 << 16)
        assert b'"error"' not in data, data


@contextlib.asynccontextmanager
async def readers(
    connections: Sequence[tuple[int, Sequence[str]]], *, view: str = "events"
) -> AsyncIterator[Callable[[], Awaitable[int]]]:
    """Run the readers; give a function that stops them and returns how many events they got."""
    command = [sys.executable, SCRIPT, "--read", json.dumps({"connections": connections, "view": view})]
    process = await trio.lowlevel.open_process(command, stdin=-1, stdout=-1)
    assert process.stdin is not None
    assert process.stdout is not None
    stdin, stdout = process.stdin, process.stdout

    async def line() -> dict[str, int]:
        data = b""
        while not data.endswith(b"\n"):
            more = await stdout.receive_some()
            assert more, "the readers failed"
            data += more
        return json.loads(data)

    async def stop() -> int:
        await stdin.aclose()
        return (await line())["counted"]

    try:
        assert (await line())["connected"] == len(connections)
        yield stop
    finally:
        with trio.CancelScope(shield=True):
            process.kill()
            await process.wait()
            await stdin.aclose()
            await stdout.aclose()


# --- the server: what is measured -------------------------------------------------------------------------------------


@attrs.define
class Fed:
    """A stream whose source only waits; this script writes to it."""

    stream: Stream
    out: Output

    def append(self) -> None:
        self.out.append(PAYLOAD, "", DELTAS)
        self.out.flush()


@attrs.define
class Scene:
    server: ControlServer
    port: int
    fed: list[Fed]


@contextlib.asynccontextmanager
async def scene(streams: int) -> AsyncIterator[Scene]:
    """Serve a supervisor with so many live streams on loopback."""
    async with open_supervisor() as supervisor:
        async with trio.open_nursery() as nursery:
            server = ControlServer(supervisor)
            (port,) = await nursery.start(server.run)
            yield Scene(server, port, [await _feed(supervisor) for _ in range(streams)])
            nursery.cancel_scope.cancel()
        await supervisor.shutdown()


async def _feed(supervisor: Supervisor) -> Fed:
    begun = trio.Event()
    outs: list[Output] = []

    async def source(out: Output) -> None:
        outs.append(out)
        out.append(PAYLOAD, "", DELTAS)
        out.flush()
        begun.set()
        await trio.sleep_forever()

    started = await supervisor.start(source)
    await begun.wait()
    return Fed(started, outs[0])


async def fan_out(given: dict[str, Any]) -> dict[str, Any]:
    """Deliver events to many, ours and trio-websocket's in turn; return CPU per delivery of each window, in µs."""
    count, events = given["subscribers"], given["events"]
    results: dict[str, list[float]] = {"ours": [], "trio-websocket": [], "write": []}
    theirs: list[trio_websocket.WebSocketConnection] = []
    done = trio.Event()

    async def accept(request: trio_websocket.WebSocketRequest) -> None:
        theirs.append(await request.accept(subprotocol=SUBPROTOCOL))
        await done.wait()

    async with scene(1) as there, trio.open_nursery() as nursery:
        (fed,) = there.fed
        message = _notification(fed)
        frame = build_frame(OP_TEXT, message.encode())
        other: trio_websocket.WebSocketServer = await nursery.start(
            trio_websocket.serve_websocket, accept, "127.0.0.1", 0, None
        )
        connections = [(there.port, (fed.stream.id,))] * count + [(other.port, ())] * count

        async def rest() -> None:
            for _ in range(_TURNS):
                await trio.lowlevel.checkpoint()
            if given["pause_s"]:
                await trio.sleep(given["pause_s"])

        async def ours() -> None:
            for _ in range(events):
                fed.append()
                await rest()

        async def with_trio_websocket() -> None:
            for _ in range(events):
                for connection in theirs:
                    await connection.send_message(message)
                await rest()

        async def write() -> None:
            sockets = [connection._stream.socket.fileno() for connection in theirs]
            for _ in range(events):
                for descriptor in sockets:
                    await _written(descriptor, frame)
                await rest()

        contenders = {"ours": ours, "trio-websocket": with_trio_websocket, "write": write}
        async with readers(connections) as stop:
            for number in range(given["rounds"] + 1):
                for name, run in contenders.items():
                    before = time.process_time()
                    await run()
                    cpu = time.process_time() - before
                    if number:  # the first round warms up
                        results[name].append(1e6 * cpu / (events * count))
            await trio.sleep(0.2)
            counted = await stop()
        done.set()
        nursery.cancel_scope.cancel()
    expected = len(results) * (given["rounds"] + 1) * events * count
    return {"results": results, "counted": counted, "expected": expected}


async def _written(descriptor: int, frame: bytes) -> None:
    try:
        sent = os.write(descriptor, frame)
    except BlockingIOError:
        sent = 0
    while sent < len(frame):  # the readers are late
        await trio.sleep(_TICK_S)
        with contextlib.suppress(BlockingIOError):
            sent += os.write(descriptor, frame[sent:])


def _notification(fed: Fed) -> str:
    """Return the text that a subscriber gets for one event."""
    with fed.stream.subscribe("start") as subscription:
        (event,) = subscription.take_nowait() or ()
    events = encode_events([event]).decode()
    return (
        '{"jsonrpc":"2.0","method":"stream.events","params":'
        f'{{"sub":"s1","epoch":1,"first":{event.seq},"last":{event.seq},"events":{events}}}}}'
    )


async def watched(given: dict[str, Any]) -> dict[str, Any]:
    """Feed many streams at their pace, one connection subscribed to all of them or nobody; return CPU per event in µs."""
    load, streams = given["load"], given["streams"]
    singly, view = load.endswith("singly"), "text" if "as text" in load else "events"
    interval = 1 / (given["rate"] * streams)
    async with scene(streams) as there:
        ids = [fed.stream.id for fed in there.fed]
        connections = [] if load.startswith("unread") else [(there.port, ids)]

        async def feed(seconds: float) -> int:
            begun = trio.current_time()
            appended, wanted = 0, int(seconds / interval)
            while appended < wanted:
                due = min(wanted, int((trio.current_time() - begun) / interval))
                while appended < due:
                    there.fed[appended % streams].append()
                    appended += 1
                    if singly:
                        for _ in range(4):  # the pump's turn and the writer's, and one more each
                            await trio.lowlevel.checkpoint()
                # Whole ticks, so that both loads wake as often, whatever else makes the loop turn.
                await trio.sleep_until(begun + _TICK_S * (1 + (trio.current_time() - begun) // _TICK_S))
            return appended

        async with readers(connections, view=view) as stop:
            fed = await feed(given["settle_s"])
            before, wall = time.process_time(), time.monotonic()
            events = await feed(given["window_s"])
            cpu = time.process_time() - before
            wall = time.monotonic() - wall
            await trio.sleep(0.2)
            counted = await stop()
    return {
        "cpu_us": 1e6 * cpu / events,
        "rate": events / wall,
        "counted": counted,
        "expected": (fed + events) if connections else 0,
    }


def worker(given: dict[str, Any]) -> dict[str, Any]:
    measure.raise_descriptor_limit()
    return trio.run(fan_out if "subscribers" in given else watched, given)


def _check(name: str, result: dict[str, Any]) -> None:
    # Who counts by text misses one that is split between two reads; as text, events of one turn are joined.
    if "as text" not in name and result["counted"] < 0.99 * result["expected"]:
        raise measure.WorkerError(f"{name}: {result['counted']} of {result['expected']} events arrived")


def main() -> None:
    if sys.argv[1:2] == ["--read"]:
        read(json.loads(sys.argv[2]))
        return
    options = measure.arguments(__doc__ or "", rounds=ROUNDS)
    if options.worker:
        print(json.dumps(worker(json.loads(options.worker))))
        return
    quick = options.quick
    fanned = {
        "subscribers": 20 if quick else 100,
        "events": 20 if quick else 100,
        "rounds": options.rounds,
    }
    paced = {
        "streams": 20 if quick else 200,
        "rate": 50,
        "settle_s": 0.1 if quick else 0.5,
        "window_s": 0.3 if quick else 3.0,
    }
    report = measure.Report("control", quick, {"rounds": options.rounds, "fan_out": fanned, "watched": paced})
    fanned_out = {}
    for pace, pause_s in PACES.items():
        measure.progress(f"one stream to many subscribers, {pace}")
        fanned_out[pace] = measure.run_worker(SCRIPT, fanned | {"pause_s": pause_s}, timeout_s=300)
        _check(pace, fanned_out[pace])

    def run(load: str) -> dict[str, Any]:
        result = measure.run_worker(SCRIPT, paced | {"load": load}, timeout_s=120)
        _check(load, result)
        return result

    results = measure.in_turn(LOADS, options.rounds, run, only=options.only)
    for pace, result in fanned_out.items():
        report.table(FANOUT.format(pace), "µs", result["results"], baseline="trio-websocket")
    report.table(
        WATCHED,
        "µs",
        {name: [result["cpu_us"] for result in runs] for name, runs in results.items()},
        baseline="unread, ticks",
        remarks={
            name: f"{sum(result['rate'] for result in runs) / len(runs):.0f} of {paced['streams'] * paced['rate']} events/s"
            for name, runs in results.items()
        },
    )
    print()
    for pace in PACES:
        report.aim(
            f"fan-out {pace}: trio-websocket / ours at least 4",
            report.ratio(FANOUT.format(pace), "trio-websocket", "ours"),
            least=4,
        )
    for load in ("ticks", "singly"):
        report.aim(
            f"one connection, {load}: at most 15 µs an event",
            report.median(WATCHED, f"subscribed, {load}"),
            most=15,
        )
    report.note(
        "An absolute time, such as the 15 µs, is that of this machine, and so is what `write` leaves for a ratio."
    )
    report.write(options.json)


if __name__ == "__main__":
    sys.exit(main())
