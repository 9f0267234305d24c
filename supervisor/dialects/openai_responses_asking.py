"""How a background response of OpenAI is gone on with, cancelled and asked for its usage.

A response made with `"background": true` is made whether anybody listens or not, and kept (OpenAI API, "Background mode"): its
events can be had again from a sequence number on. It cannot be had when `"store": false` was asked for.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, Final
from urllib.parse import quote

from supervisor.dialects import lenient
from supervisor.dialects.base import UnparseableError, Usage
from supervisor.dialects.dialect import Call, Progress
from supervisor.dialects.openai_response_items import usage_of

__all__ = ["cancel", "resume", "retrieve", "retrieved_usage"]

_ID: Final = re.compile(r"(?=[^.])[\w.:~=+@-]{1,256}", re.ASCII)
"""What may stand in a path as an id: not a `/`, a `..`, or what would need more than quoting."""


def _kept(request: Mapping[str, Any], response_id: str | None) -> str | None:
    """Return the path of a response that the provider keeps while it is made; None if it keeps none."""
    if request.get("background") is not True or request.get("store") is False:
        return None
    if not response_id or not _ID.fullmatch(response_id):
        return None
    return f"/responses/{quote(response_id, safe='')}"


def resume(request: Mapping[str, Any], progress: Progress) -> Call | None:
    """Ask for the events after the last one that was received; None if the response is not kept."""
    path = _kept(request, progress.snapshot.response_id)
    if path is None:
        return None
    number: int | None = getattr(progress.reader, "last_number", None)  # the dialect's reader has it
    if number is None:
        return None
    query = f"stream=true&starting_after={number}"
    include = request.get("include")
    if isinstance(include, list):
        query += "".join(f"&include[]={quote(name, safe='')}" for name in include if isinstance(name, str))
    return Call(path=f"{path}?{query}", method="GET")


def cancel(request: Mapping[str, Any], response_id: str) -> Call | None:
    """Ask the provider to stop making a background response; None if it is none."""
    path = _kept(request, response_id)
    return None if path is None else Call(path=f"{path}/cancel")


def retrieve(request: Mapping[str, Any], response_id: str) -> Call | None:
    """Ask for a background response as it stands; None if it is none."""
    path = _kept(request, response_id)
    return None if path is None else Call(path=path, method="GET")


def retrieved_usage(body: bytes) -> Usage | None:
    """Read the usage out of a response that has ended: before that it may still grow."""
    try:
        value = lenient.loads(body)
    except UnparseableError:
        return None
    if not isinstance(value, dict) or value.get("status") in ("queued", "in_progress"):
        return None
    return usage_of(value.get("usage"))
