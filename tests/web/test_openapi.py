"""The OpenAPI document, and the front held to it by schemathesis: requests made of it, good and bad, over a socket."""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import attrs
import hypothesis
import hypothesis.strategies as st
import pytest
import requests
import schemathesis
import trio
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    negative_data_rejection,
    positive_data_acceptance,
    response_schema_conformance,
    status_code_conformance,
)

from supervisor.config import parse
from supervisor.observe import Figures
from supervisor.web import metrics, openapi
from supervisor.web.app import STATUS, Front, Part
from supervisor.web.openapi import OPERATIONS, Operation, document
from tests.web.scene import scene, ten

CHECKS = [
    not_a_server_error,
    content_type_conformance,
    negative_data_rejection,
    positive_data_acceptance,
    response_schema_conformance,
    status_code_conformance,
]
SCHEMA = schemathesis.openapi.from_dict(document())


@attrs.define
class Served:
    """A front in a thread of its own: schemathesis is no trio program."""

    url: str = ""
    stream_id: str = ""
    ready: threading.Event = attrs.field(factory=threading.Event)
    token: trio.lowlevel.TrioToken | None = None
    over: trio.Event = attrs.field(factory=trio.Event)

    async def main(self) -> None:
        self.token = trio.lowlevel.current_trio_token()
        async with scene(otherwise=ten, within_s=120, more=parts) as front:
            self.url = f"http://127.0.0.1:{front.server.ports[0]}"
            self.stream_id = await front.ended()
            self.ready.set()
            await self.over.wait()


def parts(front: Front) -> list[Part]:
    """Return what the daemon has besides what every scene has, but for the gateway and the page."""
    return [metrics.part(front, Figures(front.supervisor)), metrics.ready(front), openapi.part(front)]


def written(value: Any) -> Any:
    """Return JSON as it is commonly written: to a schema 32.0 is a whole number, here only 32 is."""
    if isinstance(value, dict):
        return {name: written(one) for name, one in value.items()}
    if isinstance(value, list):
        return [written(one) for one in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value


@pytest.fixture(scope="module")
def served() -> Iterator[Served]:
    served = Served()
    thread = threading.Thread(target=trio.run, args=(served.main,))
    thread.start()
    assert served.ready.wait(20)
    yield served
    assert served.token is not None
    served.token.run_sync_soon(served.over.set)
    thread.join(20)


@pytest.mark.parametrize("operation", OPERATIONS, ids=lambda one: f"{one.method} {one.path}")
def test_every_answer_is_as_the_document_says(served: Served, operation: Operation) -> None:
    """Whatever is asked, in the document's terms or against them, the answer has a status, a type and a schema that are in it."""
    described = SCHEMA[operation.path][operation.method]
    modes = [schemathesis.GenerationMode.POSITIVE]
    if operation.query or operation.body:
        modes.append(schemathesis.GenerationMode.NEGATIVE)
    with requests.Session() as session:
        for mode in modes:

            @hypothesis.settings(
                max_examples=8,
                deadline=None,
                database=None,
                derandomize=True,
                phases=[hypothesis.Phase.generate],
                suppress_health_check=list(hypothesis.HealthCheck),
            )
            @hypothesis.given(case=described.as_strategy(generation_mode=mode), known=st.booleans())
            def ask(case: Any, known: bool) -> None:
                if known and "id" in case.path_parameters:
                    case.path_parameters["id"] = served.stream_id
                if isinstance(case.body, dict):
                    case.body = written(case.body)
                answer = case.call(base_url=served.url, session=session, timeout=20)
                case.validate_response(answer, checks=CHECKS)

            ask()


async def test_the_document_has_every_route() -> None:
    """What is served and what is described are the same paths with the same methods."""
    async with scene(more=parts) as front:
        served = {
            (route.path, method.lower()) for route in front.routes for method in route.methods - {"HEAD"}
        }
        assert served == {(operation.path, operation.method) for operation in OPERATIONS}
        assert (await front.ask("GET", "/openapi.json")).json == json.loads(json.dumps(document()))


def test_the_page_has_every_path_and_every_kind_of_error() -> None:
    """docs/http.md lists the same paths and statuses, and its configuration can be read."""
    page = (Path(__file__).resolve().parents[2] / "docs" / "http.md").read_text("utf-8")
    listed = page.partition("## What there is")[2].partition("\n## ")[0]
    cells = [row.split("|")[1] for row in listed.splitlines() if row.startswith("| `")]
    paths = {path for cell in cells for path in re.findall(r"(/[a-z{}/._]+)", cell)}
    assert paths == {operation.path for operation in OPERATIONS}
    table = page.partition("| status | kinds |")[2].partition("\n## ")[0]
    told = {
        (status, kind)
        for row in re.findall(r"^\| ([0-9, ]+) \| (.*) \|$", table, re.MULTILINE)
        for status in row[0].split(", ")
        for kind in re.findall(r"`([a-z_]+)`", row[1].replace("`field`", ""))
    }
    assert {kind for _, kind in told} == {*STATUS, "too_many_connections"}
    for kind, status in STATUS.items():
        assert (str(status), kind) in told
    (toml,) = re.findall(r"```toml\n(.*?)```", page, re.DOTALL)
    assert parse(toml).web.hosts == ("streams.example.org",)
