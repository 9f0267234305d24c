"""`/metrics` for Prometheus, `/overview` and a stream's trace as JSON, and `/readyz`."""

from __future__ import annotations

import trio
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from supervisor.control import answers
from supervisor.observe import Figures, exposition, overview
from supervisor.observe.exposition import CONTENT_TYPE
from supervisor.web.app import Front, Part, answer, which

__all__ = ["part", "ready"]

MAX_TRACES = 4
"""Traces made at a time; the others wait."""


def part(front: Front, figures: Figures) -> Part:
    """`/metrics`, `/overview`, `/streams/{id}/trace`."""
    tracing = trio.CapacityLimiter(MAX_TRACES)

    async def metrics(request: Request) -> Response:
        del request
        return Response(exposition(figures), headers={"content-type": CONTENT_TYPE})

    async def told_overview(request: Request) -> Response:
        del request
        return answer(overview(figures))

    async def told_trace(request: Request) -> Response:
        async with tracing:
            return answer(await answers.trace(front.supervisor, which(request)))

    return Part(
        routes=[
            Route("/metrics", metrics),
            Route("/overview", told_overview),
            Route("/streams/{id}/trace", told_trace),
        ]
    )


def ready(front: Front) -> Part:
    """`/readyz`: whether a start would be taken: the store can be written, and nobody is draining. 503 says why not."""

    async def readyz(request: Request) -> Response:
        del request
        health = front.supervisor.health()
        problems = ["the supervisor is draining"] if health.status == "draining" else []
        if health.store.state == "failing":
            problems.append("the store cannot write")
        return answer({"ready": not problems, "problems": problems}, 503 if problems else 200)

    return Part(routes=[Route("/readyz", readyz)], open=True)
