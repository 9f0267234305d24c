"""What the tests of HttpSource share: a real supervisor, a real transport and a simulated upstream, run to the outcome."""

from __future__ import annotations

import json
import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import attrs
import trio

from supervisor.stores.base import Store
from supervisor.streams import Deadlines, Outcome, Stream, Supervisor, open_supervisor
from supervisor.testing import SimulatedUpstream
from supervisor.upstream.catalog import Credential, Upstream
from supervisor.upstream.retry import RetryPolicy
from supervisor.upstream.source import HttpSource
from supervisor.upstream.transport import StreamTransport

VARIABLE = "STREAM_SUPERVISOR_TEST_KEY"
SECRET = "sk-test-0123456789abcdef"
QUICK = RetryPolicy(attempts=3, wait_initial_s=1.0, wait_max_s=8.0)


@attrs.define(kw_only=True)
class Bench:
    up: SimulatedUpstream
    sup: Supervisor
    transport: StreamTransport
    upstream: Upstream

    def source(self, model: str, *, retry: RetryPolicy = QUICK, **more: Any) -> HttpSource:
        request = {"model": model, "messages": [], **more}
        return HttpSource(
            self.upstream, request, transport=self.transport, retry=retry, draw=random.Random(1).random
        )

    async def start(self, model: str, **options: Any) -> Stream:
        return await self.sup.start(self.source(model, **options))

    async def run(self, model: str, **options: Any) -> Result:
        stream = await self.start(model, **options)
        outcome = await stream.wait()
        return await self.result(stream, outcome)

    async def result(self, stream: Stream, outcome: Outcome) -> Result:
        records: list[tuple[str, bytes]] = []
        async with stream.subscribe() as events:
            records = [(event.kind, event.payload) async for event in events]
        text = (await stream.read_snapshot()).text
        return Result(outcome=outcome, records=records, text=text)


@attrs.define(kw_only=True)
class Result:
    outcome: Outcome
    records: list[tuple[str, bytes]]
    text: str

    @property
    def ending(self) -> tuple[str, str]:
        return str(self.outcome.state), self.outcome.reason

    @property
    def attempts(self) -> list[dict[str, Any]]:
        return [json.loads(payload) for kind, payload in self.records if kind == "attempt"]


@asynccontextmanager
async def bench(
    *,
    deadlines: Deadlines | None = None,
    store: Store | None = None,
    base_url: str | None = None,
    ssl_context: Any = None,
    **options: Any,
) -> AsyncIterator[Bench]:
    """Open all three; leaving checks that the upstream sees every connection closed."""
    async with SimulatedUpstream(**options) as up:
        transport = StreamTransport(trust_env=False, ssl_context=ssl_context)
        upstream = Upstream(
            name="sim",
            base_url=base_url or up.base_url,
            credential=Credential.from_env(VARIABLE),
            headers={"X-Title": "tests"},
        )
        async with open_supervisor(deadlines=deadlines, store=store) as sup:
            yield Bench(up=up, sup=sup, transport=transport, upstream=upstream)
        await transport.aclose()
        with trio.fail_after(5):
            await up.wait_open(0)
