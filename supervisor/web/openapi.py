"""The OpenAPI document of the HTTP front, made of the types that it reads and answers with, and served as `/openapi.json`.

The schemas are msgspec's own of the very types, so they cannot say what the code does not do; what a type checks beyond them
(exactly one of several fields) is added here (`_BEYOND`). The paths are the table `OPERATIONS`; a test holds it to the routes, and
schemathesis holds the answers to it. The gateway is not in it: its paths are the providers', and so are their documents.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import attrs
import msgspec
from starlette.requests import Request
from starlette.responses import Response

from supervisor.control.messages import (
    CancelManyResult,
    CancelParams,
    CancelResultMessage,
    EventMessage,
    ListResult,
    SnapshotMessage,
    StartParams,
    StartResult,
    StreamMessage,
)
from supervisor.observe import Overview, Trace
from supervisor.streams import Health
from supervisor.version import version
from supervisor.web.app import SESSION_S, Front, Part, answer, route

__all__ = ["OPERATIONS", "Operation", "document", "part"]


def _ref(name: str) -> dict[str, str]:
    return {"$ref": f"#/components/schemas/{name}"}


_EVENTS = "text/event-stream"
_METRICS = "text/plain"
_OBJECT = {"type": "object"}
_SESSION = {
    "type": "object",
    "properties": {"required": {"type": "boolean"}, "authenticated": {"type": "boolean"}},
    "required": ["required", "authenticated"],
}
_PROBLEM = {
    "type": "object",
    "description": "What is wrong, with further fields by its kind, as on the control channel.",
    "properties": {
        "kind": {"type": "string"},
        "message": {"type": "string"},
        "temporary": {"type": "boolean"},
        "retry_after_s": {"type": ["number", "null"]},
    },
    "required": ["kind", "message", "temporary", "retry_after_s"],
}

_EVENT = {
    "type": "object",
    "description": "each event of the stream",
    "properties": {
        "id": {"type": "string", "description": "`EPOCH-SEQ`; under a key `EPOCH-SEQ-STREAM`"},
        "event": {"type": "string", "description": "its kind, or `gap`, or `failed`"},
        "data": {
            "type": "string",
            "contentMediaType": "application/json",
            "contentSchema": {"anyOf": [_ref("EventMessage"), _ref("Problem")]},
        },
    },
}


@attrs.frozen(kw_only=True)
class Operation:
    """One method of one path."""

    method: str
    path: str
    summary: str
    answers: Mapping[int, Any]
    """A type, a schema, a media type, or None for an answer without a body."""
    query: Sequence[Mapping[str, Any]] = ()
    body: Mapping[str, Any] | None = None
    body_required: bool = True
    errors: Sequence[int] = ()
    open: bool = False


_NAME = {"type": "string", "minLength": 1, "maxLength": 256}
_ID = {
    "name": "id",
    "in": "path",
    "required": True,
    "description": "The stream's id, or `key:KEY`.",
    "schema": {**_NAME, "pattern": "^(?!key:$)"},
}
_AFTER = {
    "name": "after",
    "description": "From where on: `start`, `tail` (only what is new), `snapshot` (first the answer so far), or a position: the id of an event.",
    "schema": {
        "type": "string",
        "pattern": "^(start|tail|snapshot|[1-9][0-9]{0,8}-(0|[1-9][0-9]{0,17})(-[!-~]{1,256})?)$",
        "default": "start",
    },
}
_VIEW = {
    "name": "view",
    "description": "`events`: each as it is. `text`: runs of text joined.",
    "schema": {"enum": ["events", "text"], "default": "events"},
}
_BEHIND = {
    "name": "max_behind",
    "description": "Further behind than so many events, be sent one `snapshot` in place of them.",
    "schema": {"type": "integer", "minimum": 1, "maximum": 1_000_000},
}
_STATES = ("pending", "connecting", "streaming", "stopping", "completed", "failed", "cancelled", "expired")
_FILTER: Sequence[Mapping[str, Any]] = (
    {
        "name": "state",
        "description": "Given any number of times.",
        "schema": {"type": "array", "items": {"enum": list(_STATES)}, "maxItems": 8},
    },
    {"name": "upstream", "schema": _NAME},
    {"name": "tenant", "schema": _NAME},
    {"name": "key", "schema": _NAME},
    {"name": "live", "schema": {"type": "boolean"}},
    {"name": "before", "description": "`next` of the page before.", "schema": _NAME},
    {"name": "limit", "schema": {"type": "integer", "minimum": 1, "maximum": 500, "default": 100}},
)
_ID_ERRORS = (400, 404)

OPERATIONS: Sequence[Operation] = (
    Operation(
        method="post",
        path="/streams",
        summary="Start a stream, or join the one that has the key (200). Location says where it is.",
        body=_ref("StartParams"),
        answers={201: StartResult, 200: StartResult},
        errors=(400, 409, 429, 503),
    ),
    Operation(
        method="get",
        path="/streams",
        summary="Streams by filter, newest first, page by page. Labels: `label.NAME=VALUE`, any number of them.",
        query=_FILTER,
        answers={200: ListResult},
        errors=(400,),
    ),
    Operation(
        method="post",
        path="/streams/cancel",
        summary="Cancel by id, key, labels, or all. Idempotent.",
        body=_ref("CancelParams"),
        answers={200: {"anyOf": [_ref("CancelResultMessage"), _ref("CancelManyResult")]}},
        errors=_ID_ERRORS,
    ),
    Operation(
        method="get",
        path="/streams/{id}",
        summary="What is known of a stream, live or stored.",
        answers={200: StreamMessage},
        errors=_ID_ERRORS,
    ),
    Operation(
        method="delete",
        path="/streams/{id}",
        summary="End a stream at once. Idempotent; its record stays for as long as retention keeps it.",
        answers={200: CancelResultMessage},
        errors=_ID_ERRORS,
    ),
    Operation(
        method="post",
        path="/streams/{id}/cancel",
        summary="Cancel a stream, with a reason, or letting the answer end by itself first. Idempotent.",
        body=_ref("CancelOne"),
        body_required=False,
        answers={200: CancelResultMessage},
        errors=_ID_ERRORS,
    ),
    Operation(
        method="get",
        path="/streams/{id}/events",
        summary="A stream's events from a position on, up to its outcome, as server-sent events (`data` is an EventMessage). "
        "`Last-Event-ID` wins over `after`. 204: the outcome has been read.",
        query=(_AFTER, _VIEW, _BEHIND),
        answers={200: _EVENTS, 204: None},
        errors=_ID_ERRORS,
    ),
    Operation(
        method="get",
        path="/streams/{id}/snapshot",
        summary="The answer so far of any stream, live or stored.",
        answers={200: SnapshotMessage},
        errors=(*_ID_ERRORS, 410),
    ),
    Operation(
        method="get",
        path="/streams/{id}/trace",
        summary="The timeline of any stream, live or stored.",
        answers={200: Trace},
        errors=(*_ID_ERRORS, 410),
    ),
    Operation(method="get", path="/overview", summary="What a dashboard shows.", answers={200: Overview}),
    Operation(
        method="get",
        path="/health",
        summary="Whether the supervisor is well, and why not.",
        answers={200: Health},
    ),
    Operation(
        method="get",
        path="/stats",
        summary="Figures of the supervisor and its channels.",
        answers={200: _OBJECT},
    ),
    Operation(method="get", path="/metrics", summary="Figures for Prometheus.", answers={200: _METRICS}),
    Operation(method="get", path="/openapi.json", summary="This document.", answers={200: _OBJECT}),
    Operation(
        method="get",
        path="/session",
        summary="Whether a token is asked for, and whether this request shows one, or a session.",
        answers={200: _SESSION},
        open=True,
    ),
    Operation(
        method="post",
        path="/session",
        summary=f"Show the token once and have a cookie for it, good for {SESSION_S // 3600} hours.",
        body={
            "type": "object",
            "properties": {"token": {"type": "string"}},
            "required": ["token"],
            "additionalProperties": False,
        },
        answers={200: _SESSION},
        errors=(400, 401),
        open=True,
    ),
    Operation(method="delete", path="/session", summary="Forget the cookie.", answers={204: None}, open=True),
    Operation(
        method="get",
        path="/healthz",
        summary="Whether the process is there.",
        answers={200: _OBJECT},
        open=True,
    ),
    Operation(
        method="get",
        path="/readyz",
        summary="Whether a start would be taken; 503 and why not.",
        answers={200: _OBJECT, 503: _OBJECT},
        open=True,
    ),
)


def part(_: Front) -> Part:
    """Return `/openapi.json`."""
    made = document()

    async def openapi(_: Request) -> Response:
        return answer(made)

    return Part(routes=[route("/openapi.json", GET=openapi)])


def document() -> dict[str, Any]:
    """Return the document: OpenAPI 3.1, whose schemas are JSON Schema 2020-12, as msgspec's are."""
    types = [
        kind
        for operation in OPERATIONS
        for kind in operation.answers.values()
        if kind is not None and not isinstance(kind, str | dict)
    ]
    types += [StartParams, CancelParams, CancelManyResult, EventMessage]
    schemas, components = msgspec.json.schema_components(types, ref_template="#/components/schemas/{name}")
    by_type = dict(zip(map(id, types), schemas, strict=True))
    for name, more in _BEYOND.items():
        components[name] = {**components[name], **more}
    components["CancelOne"] = _without(components["CancelParams"], "id", "key", "labels", "all")
    components["Problem"] = _PROBLEM
    error = {"type": "object", "properties": {"error": _ref("Problem")}, "required": ["error"]}
    components["Error"] = error
    paths: dict[str, dict[str, Any]] = {}
    for operation in OPERATIONS:
        told = paths.setdefault(operation.path, {})
        told[operation.method] = _operation(operation, by_type)
        if "{id}" in operation.path:
            told["parameters"] = [_ID]
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "stream-supervisor",
            "version": version(),
            "license": {"name": "MIT", "identifier": "MIT"},
        },
        "security": [{"token": []}, {"session": []}, {}],
        "paths": paths,
        "components": {
            "schemas": components,
            "securitySchemes": {
                "token": {"type": "http", "scheme": "bearer"},
                "session": {
                    "type": "apiKey",
                    "in": "cookie",
                    "name": "stream-supervisor-7434",
                    "description": "set by `POST /session`; named after the port",
                },
            },
        },
    }


_BEYOND: Mapping[str, Mapping[str, Any]] = {
    "StartParams": {
        "oneOf": [
            {"properties": {"request": {"type": "object"}}, "required": ["request"]},
            {"properties": {"prompt": {"type": "string"}}, "required": ["prompt"]},
        ]
    },
    "CancelParams": {
        "oneOf": [
            {"properties": {"id": {"type": "string"}}, "required": ["id"]},
            {"properties": {"key": {"type": "string"}}, "required": ["key"]},
            {"properties": {"labels": {"type": "object"}}, "required": ["labels"]},
            {"properties": {"all": {"const": True}}, "required": ["all"]},
        ],
        "allOf": [
            {"properties": {"labels": {"anyOf": [{"type": "null"}, {"type": "object", "minProperties": 1}]}}}
        ],
    },
}
"""What the types check beyond what their schemas say."""


def _without(schema: Mapping[str, Any], *names: str) -> dict[str, Any]:
    properties = {name: told for name, told in schema["properties"].items() if name not in names}
    kept = {key: value for key, value in schema.items() if key not in {"oneOf", "allOf"}}
    return {**kept, "title": "CancelOne", "properties": properties}


def _operation(operation: Operation, by_type: Mapping[int, Mapping[str, Any]]) -> dict[str, Any]:
    words = operation.path.replace("{id}", "one").replace(".json", "").strip("/").replace("/", "_")
    told: dict[str, Any] = {
        "operationId": f"{operation.method}_{words}",
        "summary": operation.summary,
        "responses": {
            str(status): _answer(status, kind, by_type) for status, kind in operation.answers.items()
        },
    }
    errors = operation.errors if operation.open else (*operation.errors, 401)
    for status in sorted(errors):
        told["responses"][str(status)] = _json("What is wrong.", _ref("Error"))
    if operation.query:
        told["parameters"] = [{"in": "query", **parameter} for parameter in operation.query]
    if operation.body is not None:
        told["requestBody"] = {
            "required": operation.body_required,
            "content": {"application/json": {"schema": operation.body}},
        }
    if operation.open:
        told["security"] = []
    return told


def _answer(status: int, kind: Any, by_type: Mapping[int, Mapping[str, Any]]) -> dict[str, Any]:
    said = {200: "The answer.", 201: "It has been started.", 204: "There is nothing more.", 503: "Not now."}[
        status
    ]
    if kind is None:
        return {"description": said}
    if isinstance(kind, str):
        schema = _EVENT if kind == _EVENTS else {"type": "string"}
        return {"description": said, "content": {kind: {"schema": schema}}}
    return _json(said, kind if isinstance(kind, dict) else by_type[id(kind)])


def _json(said: str, schema: Mapping[str, Any]) -> dict[str, Any]:
    return {"description": said, "content": {"application/json": {"schema": schema}}}
