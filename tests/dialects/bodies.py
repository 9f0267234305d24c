"""Builds OpenAI chat bodies, and reads them through the whole chain into a recording sink."""

from __future__ import annotations

import json
from typing import Any

from supervisor.dialects import Delta, Fault, Fold, Snapshot
from supervisor.dialects.openai_chat import OPENAI_CHAT
from supervisor.dialects.reading import BodyReader

DONE = b"data: [DONE]\n\n"


def event(value: Any, name: str = "") -> bytes:
    """Return one wire event; a str is sent as it is, anything else as JSON."""
    text = value if isinstance(value, str) else json.dumps(value)
    head = f"event: {name}\n" if name else ""
    return f"{head}data: {text}\n\n".encode()


def chunk(delta: dict[str, Any] | None = None, *, index: Any = 0, finish: Any = None, **fields: Any) -> bytes:
    """Return a chunk with one choice."""
    choice = {"index": index, "delta": delta or {}, "finish_reason": finish}
    return event({"object": "chat.completion.chunk", "choices": [choice], **fields})


def call(index: Any = 0, call_id: Any = None, name: Any = None, arguments: Any = None) -> bytes:
    """Return a chunk with one piece of a tool call; what is None is left out, but an index of `"null"` is null."""
    function = {key: value for key, value in (("name", name), ("arguments", arguments)) if value is not None}
    piece: dict[str, Any] = {"function": function}
    if index is not None:
        piece["index"] = None if index == "null" else index
    if call_id is not None:
        piece["id"] = call_id
    return chunk({"tool_calls": [piece]})


class RecordingSink:
    """Keeps everything a BodyReader says, and checks that it says nothing after the seal."""

    def __init__(self, *, seal_after: int | None = None) -> None:
        self.fold = Fold()
        self.payloads: list[bytes] = []
        self.names: list[str] = []
        self.skipped: list[bytes] = []
        self.touches = 0
        self.marks: list[str | None] = []
        self.state = ""
        self.reason = ""
        self.fault: Fault | None = None
        self._seal_after = seal_after

    @property
    def sealed(self) -> bool:
        return bool(self.state)

    @property
    def snapshot(self) -> Snapshot:
        return self.fold.snapshot()

    def append(self, payload: bytes, name: str, deltas: tuple[Delta, ...]) -> bool:
        assert not self.sealed
        self.payloads.append(payload)
        self.names.append(name)
        for delta in deltas:
            self.fold.apply(delta)
        if len(self.payloads) == self._seal_after:
            self._seal("expired", "reaped_bytes", None)
        return self.sealed

    def skip(self, payload: bytes, why: str, name: str = "") -> None:
        assert not self.sealed
        assert why
        self.skipped.append(payload)

    def touch(self) -> None:
        assert not self.sealed
        self.touches += 1

    def mark(self, reason: str | None) -> None:
        assert not self.sealed
        self.marks.append(reason)

    def complete(self, reason: str) -> bool:
        return self._seal("completed", reason, None)

    def fail(self, reason: str, fault: Fault) -> bool:
        return self._seal("failed", reason, fault)

    def _seal(self, state: str, reason: str, fault: Fault | None) -> bool:
        assert not self.sealed
        self.state, self.reason, self.fault = state, reason, fault
        return True

    @property
    def ending(self) -> tuple[str, str]:
        return self.state, self.reason


def read(*pieces: bytes, clean: bool = True, cause: str = "", **options: Any) -> RecordingSink:
    """Read a body to its end and return what the sink was told."""
    sink = RecordingSink()
    body = BodyReader(OPENAI_CHAT, sink, **options)
    for piece in pieces:
        body.feed(piece)
    body.end(clean=clean, cause=cause)
    assert sink.sealed
    assert body.events == len(sink.payloads)
    assert body.skipped == len(sink.skipped)
    return sink
