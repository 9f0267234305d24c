"""What Prometheus, a dashboard and a load balancer are told over HTTP, and what it costs."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import attrs
import msgspec
import trio
from hypothesis import example, given
from hypothesis import strategies as st
from prometheus_client.parser import text_string_to_metric_families as parsed

from supervisor import Delta, MemoryPolicy, Output, Usage, open_supervisor
from supervisor.control import Resolved
from supervisor.control.auth import Token
from supervisor.observe import Figures, Overview, Trace, exposition
from supervisor.upstream import Circuits
from supervisor.web.app import Front, WebAccess, create_app
from supervisor.web.metrics import part, ready
from tests.streams.gated import GatedStore

DOCS = Path(__file__).resolve().parents[2] / "docs" / "observability.md"


@attrs.frozen
class Answer:
    status: int
    type: str
    body: bytes


async def ask(app: Any, path: str, **headers: str) -> Answer:
    """Ask an application, without a socket between."""
    sent: list[Any] = []

    async def receive() -> Any:
        return {"type": "http.request", "body": b"", "more_body": False}

    async def send(message: Any) -> None:
        sent.append(message)

    given = {"host": "localhost", **headers}
    scope = {
        "type": "http",
        "http_version": "1.1",
        "method": "GET",
        "path": path,
        "raw_path": path.encode(),
        "query_string": b"",
        "headers": [(name.encode(), value.encode()) for name, value in given.items()],
        "server": ("127.0.0.1", 1),
    }
    await app(scope, receive, send)
    told = dict(sent[0]["headers"])
    body = b"".join(message.get("body", b"") for message in sent[1:])
    return Answer(sent[0]["status"], told.get(b"content-type", b"").decode(), body)


_TABLE = DOCS.read_text("utf-8").partition("| metric | labels |")[2].partition("\n\n")[0]
DOCUMENTED = re.findall(r"^\| `(\w+)` \|", _TABLE, re.MULTILINE)
FAMILIES = [name.removesuffix("_total") for name in DOCUMENTED]


def app_of(front: Front) -> Any:
    return create_app(front, [ready(front), part(front, Figures(front.supervisor))])


def resolve(params: Any) -> Resolved:
    raise AssertionError


async def answer(out: Output) -> None:
    out.attempt(1, upstream="up")
    out.append(b"{}", "", (Delta(text="hello", usage=Usage(input=100, output=20)),))
    out.complete("stop")


async def never(out: Output) -> None:
    await trio.sleep_forever()


async def test_a_scrape() -> None:
    """Prometheus' own parser reads it; what became of two streams is in it, under the conventions' names."""
    circuits = Circuits()
    circuits.of("up")
    async with open_supervisor(circuits=circuits.report, memory=MemoryPolicy(max_bytes=None)) as sup:
        app = app_of(Front(supervisor=sup, resolve=resolve))
        stream = await sup.start(answer, upstream="up", meta={"model": 'a "model"\n'})
        outcome = await stream.wait()
        live = await sup.start(never)
        told = await ask(app, "/metrics")
        assert told.type == "text/plain; version=0.0.4; charset=utf-8"
        families = {family.name: family for family in parsed(told.body.decode())}
        asked = {
            "gen_ai_operation_name": "chat",
            "gen_ai_provider_name": "native",
            "gen_ai_request_model": 'a "model"\n',
            "upstream": "up",
        }
        ended = {**asked, "state": "completed"}

        def value(family: str, name: str, **labels: str) -> float:
            (found,) = [
                sample.value
                for sample in families[family].samples
                if sample.name == name and sample.labels == labels
            ]
            return found

        duration = "gen_ai_client_operation_duration_seconds"
        assert value(duration, f"{duration}_count", **ended) == 1
        assert value(duration, f"{duration}_sum", **ended) == outcome.duration_s
        assert value(duration, f"{duration}_bucket", le="81.92", **ended) == 1
        first = "gen_ai_client_operation_time_to_first_chunk_seconds"
        assert value(first, f"{first}_bucket", le="+Inf", **asked) == 1
        tokens = "gen_ai_client_token_usage"
        assert value(tokens, f"{tokens}_bucket", le="64.0", **asked, gen_ai_token_type="input") == 0
        assert value(tokens, f"{tokens}_bucket", le="256.0", **asked, gen_ai_token_type="input") == 1
        ours = "stream_supervisor_streams"
        assert value(f"{ours}_started", f"{ours}_started_total", upstream="up") == 1
        assert (
            value(f"{ours}_ended", f"{ours}_ended_total", upstream="up", state="completed", reason="stop")
            == 1
        )
        assert value(ours, ours, activity="waiting") == 1
        assert value("stream_supervisor_store_up", "stream_supervisor_store_up") == 1
        assert (
            families["stream_supervisor_memory_max_bytes"].samples == []
        )  # there is none: 0 would say something else
        circuit = "stream_supervisor_circuit_state"
        assert value(circuit, circuit, upstream="up", state="closed") == 1
        assert value(circuit, circuit, upstream="up", state="open") == 0
        assert value("process_cpu_seconds", "process_cpu_seconds_total") > 0
        assert {family.type for family in families.values()} == {"gauge", "counter", "histogram"}
        await live.cancel()


@given(st.lists(st.text(st.characters(exclude_categories=())), min_size=2, max_size=2, unique=True))
@example(["half a pair: \ud800", "b"])
def test_any_label_can_be_written(names: list[str]) -> None:
    """Whatever a client calls its model, Prometheus' parser reads that name, and nothing else is put into the page."""

    async def written() -> str:
        async with open_supervisor() as sup:
            figures = Figures(sup)
            for name in names:
                figures.tokens.add(("chat", "p", name, "up", "input"), 5.0)
            return exposition(figures).decode()

    families = {family.name: family for family in parsed(trio.run(written))}
    assert set(families) == set(FAMILIES)
    counts = [
        sample for sample in families["gen_ai_client_token_usage"].samples if sample.name.endswith("_count")
    ]
    read = [sample.labels.get("gen_ai_request_model", "") for sample in counts]
    assert read == [name.encode("utf-8", "replace").decode() for name in names]


async def test_every_metric_is_in_the_documentation() -> None:
    """The page names each of ours, with its labels, and no other."""
    async with open_supervisor() as sup:
        families = {
            family.name + ("_total" if family.type == "counter" else "")
            for family in parsed(exposition(Figures(sup)).decode())
        }
    assert set(DOCUMENTED) == families


async def test_a_scrape_costs_nothing_in_proportion_to_streams() -> None:
    """Neither its size nor what it looks at grows with how many streams are live."""
    async with open_supervisor() as sup:
        figures = Figures(sup)
        app = create_app(
            Front(supervisor=sup, resolve=resolve), [part(Front(supervisor=sup, resolve=resolve), figures)]
        )

        async def sizes() -> Iterator[int]:
            metrics, overview = await ask(app, "/metrics"), await ask(app, "/overview")
            return iter((metrics.body.count(b"\n"), overview.body.count(b",")))

        await sup.start(never)
        few = list(await sizes())
        for _ in range(200):
            await sup.start(never)
        assert list(await sizes()) == few
        await sup.shutdown()


async def test_the_overview_and_a_trace() -> None:
    """They are read back as the types that the control channel has; a trace of nothing is a 404."""
    async with open_supervisor() as sup:
        app = app_of(Front(supervisor=sup, resolve=resolve))
        stream = await sup.start(answer)
        await stream.wait()
        overview = msgspec.json.decode((await ask(app, "/overview")).body, type=Overview)
        assert overview.hour.ended["completed"] == 1
        told = await ask(app, f"/streams/{stream.id}/trace")
        trace = msgspec.json.decode(told.body, type=Trace)
        assert (told.status, trace.id, trace.state, trace.events) == (200, stream.id, "completed", 1)
        assert (await ask(app, "/streams/nothing/trace")).status == 404


async def test_ready_is_whether_a_start_would_be_taken() -> None:
    """Not while the store cannot write, nor while draining; and it needs no token, unlike the figures."""

    class Failing(GatedStore):
        why: str | None = None

        @property
        def failing(self) -> str | None:
            return self.why

        def statistics(self) -> Any:
            return attrs.evolve(super().statistics(), last_error=self.why)

    store = Failing()
    async with open_supervisor(store=store) as sup:
        access = WebAccess(token=Token("a-token-for-tests-0123456789"))
        app = app_of(Front(supervisor=sup, resolve=resolve, access=access))
        for path in ("/metrics", "/overview", "/streams/x/trace"):
            assert (await ask(app, path)).status == 401
        shown = {"authorization": "Bearer a-token-for-tests-0123456789"}
        assert (await ask(app, "/metrics", **shown)).status == 200
        assert ((await ask(app, "/readyz")).status, (await ask(app, "/readyz")).body) == (
            200,
            b'{"ready":true,"problems":[]}',
        )
        store.why = "secret/path: no space left"
        told = await ask(app, "/readyz")
        assert (told.status, b"store" in told.body, b"secret" in told.body) == (503, True, False)
        store.why = None
        await sup.drain()
        told = await ask(app, "/readyz")
        assert (told.status, b"draining" in told.body) == (503, True)
