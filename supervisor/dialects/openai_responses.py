"""OpenAI Responses, as streamed by OpenAI, Azure, xAI, and the servers and gateways that imitate it.

The wire is server-sent events, each a JSON object with a `type` (OpenAI API reference, "Streaming events"). An answer is a
list of items, each opened by `response.output_item.added`; their content comes in deltas, is told again whole by the
`.done` event of each part and item, and once more by the whole response in the last event. So everything is told up to
four times, and this module's care is to take it once:

- what came in deltas is taken from them, and its repetitions mean nothing;
- what came without deltas (some servers send only `.done` events, some only the last one) is taken from the first
  repetition that has it;
- items are told apart by `output_index`, else by id (some gateways make a new id for each event), else by being the last
  of their kind that is not done.

Text is that of `message` items; reasoning is summaries and, where a provider shows it, the reasoning itself; tool calls are
`function_call` and `custom_tool_call`, by their `call_id`. What the provider runs itself (searches, code, MCP, images, shells)
is not part of the answer. Events of unknown types mean nothing.

**How it ends.** Only by `response.completed`, `.incomplete` or `.cancelled`: the finish reason is the status, or why it is
incomplete. `response.failed`, an event `error`, and an error in any other event are that error and nothing else.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Final

import msgspec

from supervisor.dialects import lenient
from supervisor.dialects.base import Delta, ToolCallDelta, UnparseableError
from supervisor.dialects.dialect import Asking, Dialect, Endings, named_model
from supervisor.dialects.faults import error_fault, find_fault, flat_fault, http_fault, shown
from supervisor.dialects.openai_response_items import (
    MAX_LABEL_CHARS,
    ArgumentsDelta,
    Kind,
    ReasoningDelta,
    SummaryDelta,
    TextDelta,
    Where,
    Whole,
    WireDelta,
    decode_delta,
    delta_text,
    in_range,
    incomplete_reason,
    index_of,
    json_text,
    label,
    place,
    usage_of,
    whole_item,
)
from supervisor.dialects.openai_response_numbers import EventNumbers
from supervisor.dialects.openai_responses_asking import cancel, resume, retrieve, retrieved_usage
from supervisor.dialects.tool_calls import MAX_CALLS

__all__ = ["OPENAI_RESPONSES"]

MAX_ITEMS = 1024
"""How many items are remembered. Past it repetitions can no longer be told from news, and only deltas are taken."""
MAX_PARTS = 4096
"""How many parts of items are remembered, with the same consequence."""


class _Item:
    """What was told of one item of the output."""

    __slots__ = ("call_id", "done", "id", "index", "kind", "name", "ordinal", "told")

    def __init__(self, kind: Kind, where: Where, ordinal: int) -> None:
        self.kind = kind
        self.id = where.id
        self.index = where.index
        self.ordinal = ordinal
        """Of a call: its place among the calls."""
        self.call_id = ""
        self.name = ""
        self.told: set[tuple[str, int]] = set()
        """Its parts that were told, each by field and index."""
        self.done = False


_FIELDS: Final[Mapping[type[WireDelta], tuple[Kind, str]]] = {
    TextDelta: ("message", "text"),
    ReasoningDelta: ("reasoning", "content"),
    SummaryDelta: ("reasoning", "summary"),
}
_NOWHERE: Final = _Item("message", Where(None, ""), 0)


# --- the reader ------------------------------------------------------------------------------------------------------


class _ResponseReader:
    __slots__ = (
        "_by_id",
        "_by_index",
        "_calls",
        "_finish_reason",
        "_full",
        "_hot_id",
        "_hot_index",
        "_hot_item",
        "_hot_kind",
        "_hot_part",
        "_items",
        "_last",
        "_model",
        "_numbers",
        "_parts",
        "_response_id",
    )

    def __init__(self) -> None:
        # An index or an id that all items share still tells kinds apart.
        self._by_index: dict[tuple[Kind, int], _Item] = {}
        self._by_id: dict[tuple[Kind, str], _Item] = {}
        self._last: dict[Kind, _Item] = {}
        self._items = 0
        self._parts = 0
        self._full = False
        self._calls = 0
        # The place of the last delta: what follows there needs no looking up.
        self._hot_index: int | None = None
        self._hot_id: str | None = None
        self._hot_kind: type[WireDelta] | None = None
        self._hot_part: int | None = None
        self._hot_item = _NOWHERE
        self._model: str | None = None
        self._response_id: str | None = None
        self._finish_reason: str | None = None
        self._numbers = EventNumbers()

    def read(self, data: bytes, event: str = "message") -> tuple[Delta, ...]:
        """Say what one event means. Raises UnparseableError, and is then as it was before."""
        if event == "error":
            return self._read_error(data)
        try:
            wire = decode_delta(data)
        except (ValueError, RecursionError):
            return self._read_tolerant(data, event)
        number, numbers = wire.sequence_number, self._numbers
        if number is not None and number <= numbers.last and numbers.is_repeated(number, data, type(wire)):
            return ()
        text = wire.delta
        delta: Delta | None = None
        if text:
            kind = type(wire)
            index = wire.output_index
            if (
                index is None
                or index != self._hot_index
                or kind is not self._hot_kind
                or wire.part != self._hot_part
                or wire.item_id != self._hot_id
            ):
                self._find_hot(wire, kind)
            if kind is TextDelta:
                delta = Delta(text)
            elif kind is ArgumentsDelta:
                delta = self._add_arguments(self._hot_item, text)
            else:
                delta = Delta("", text)
        if number is not None:
            numbers.count(number, data, type(wire))
        return () if delta is None else (delta,)

    def ending(self) -> str | None:
        """Return the finish reason, once the response has ended."""
        return self._finish_reason

    @property
    def last_number(self) -> int | None:
        """The last sequence number; None if there is none, or they are not to be relied on."""
        return self._numbers.reliable_last

    def _read_error(self, data: bytes) -> tuple[Delta, ...]:
        value: Any
        try:
            value = lenient.loads(data)
        except UnparseableError:
            value = shown(data, 2000)
        return (Delta(fault=find_fault(value) or error_fault(value)),)

    def _read_tolerant(self, data: bytes, event: str) -> tuple[Delta, ...]:
        marker = data.strip(b" \t\r\n\"'")
        if not marker or marker == b"[DONE]":  # some imitations send it; it ends nothing
            return ()
        value = lenient.loads(data)
        if not isinstance(value, dict):
            if (fault := find_fault(value)) is not None:
                return (Delta(fault=fault),)
            raise UnparseableError(f"not a JSON object: {shown(data, 100)}")
        kind = value.get("type")
        if kind is None:
            kind = event if event != "message" else None
        if kind is None and value.get("object") == "response":
            return self._read_body(value)
        if kind in ("error", "response.error"):
            return (Delta(fault=find_fault(value) or error_fault(value)),)
        if kind is None or (isinstance(kind, str) and "_call" not in kind and "mcp" not in kind):
            told = value if kind is None else {name: value.get(name) for name in ("error", "errors")}
            if (fault := find_fault(told)) is not None:
                return (Delta(fault=fault),)
        if (not isinstance(kind, str) or kind not in _EVENTS) and (fault := flat_fault(value)) is not None:
            return (Delta(fault=fault),)
        if not isinstance(kind, str):
            raise UnparseableError(f"an event without a type: {shown(data, 100)}")
        number = value.get("sequence_number")
        if not isinstance(number, int) or isinstance(number, bool):
            number = None
        numbers = self._numbers
        if number is not None and number <= numbers.last and numbers.is_repeated(number, data, kind):
            return ()
        read = _EVENTS.get(kind)
        deltas = () if read is None else read(self, value)
        self._hot_index = None
        if number is not None:
            numbers.count(number, data, kind)
        return deltas

    # --- items ---

    def _find_hot(self, wire: WireDelta, kind: type[WireDelta]) -> None:
        """Find the item of a delta, and remember that it is told in deltas."""
        where = Where(in_range(wire.output_index), label(wire.item_id) or "")
        part = in_range(wire.part)
        if kind is ArgumentsDelta:
            item = self._call(where)
        else:
            item_kind, field = _FIELDS[kind]
            item = self._find(item_kind, where) or self._open(item_kind, where)
            self._tell(item, field, part or 0)
        self._hot_index, self._hot_id, self._hot_part = where.index, wire.item_id, part
        self._hot_kind, self._hot_item = kind, item

    def _find(self, kind: Kind, where: Where) -> _Item | None:
        """Return the item that an event is about, if it is known."""
        item = self._by_id.get((kind, where.id)) if where.id else None
        if item is not None and (where.index is None or item.index in (None, where.index)):
            return item
        if where.index is not None:
            return self._by_index.get((kind, where.index))
        item = self._last.get(kind)
        return item if item is not None and not item.done else None

    def _open(self, kind: Kind, where: Where) -> _Item:
        """Begin a new item; it is remembered while there is room."""
        item = _Item(kind, where, self._calls)
        if kind == "call":
            self._calls += 1
        self._last[kind] = item
        if self._items >= MAX_ITEMS:
            self._full = True
        else:
            self._items += 1
            if where.index is not None:
                self._by_index[kind, where.index] = item
            if where.id:
                self._by_id[kind, where.id] = item
        return item

    def _tell(self, item: _Item, field: str, part: int) -> None:
        if (field, part) not in item.told:
            self._parts += 1
            self._full = self._full or self._parts > MAX_PARTS
            if not self._full:
                item.told.add((field, part))

    def _check_room(self, calls: int) -> None:
        if self._calls + calls > MAX_CALLS:
            raise UnparseableError(f"more than {MAX_CALLS} tool calls")

    def _call(self, where: Where) -> _Item:
        item = self._find("call", where)
        if item is None:
            self._check_room(1)
            item = self._open("call", where)
        return item

    def _add_arguments(self, item: _Item, arguments: str) -> Delta | None:
        if ("whole", 0) in item.told:
            return None
        self._tell(item, "arguments", 0)
        return Delta("", "", "", (ToolCallDelta(item.ordinal, "", "", arguments),))

    def _restate(self, item: _Item, whole: Whole) -> list[Delta]:
        """Tell what an item, told whole, has that was not told before."""
        if item.kind == "call":
            return self._restate_call(item, whole)
        if self._full:
            return []
        deltas = []
        if item.kind == "reasoning" and item.told:
            return []
        for field, part, text in whole.texts:
            if text and (field, part) not in item.told:
                self._tell(item, field, part)
                deltas.append(_restated(field, text))
        return deltas

    def _restate_call(self, item: _Item, whole: Whole) -> list[Delta]:
        call_id = whole.call_id if whole.call_id[:MAX_LABEL_CHARS] != item.call_id else ""
        name = whole.name if whole.name[:MAX_LABEL_CHARS] != item.name else ""
        arguments = ""
        if whole.completed and not self._full and not item.told:
            arguments = whole.arguments
        if arguments:
            self._tell(item, "whole", 0)
        if not (call_id or name or arguments):
            return []
        item.call_id = call_id[:MAX_LABEL_CHARS] or item.call_id
        item.name = name[:MAX_LABEL_CHARS] or item.name
        piece = ToolCallDelta(item.ordinal, call_id, name, arguments)
        return [Delta(tool_calls=(piece,), restated=whole.completed)]

    # --- events ---

    def _begin(self, value: dict[str, Any]) -> tuple[Delta, ...]:
        response = value.get("response")
        if not isinstance(response, dict):
            return ()
        model, response_id = self._identify(response)
        if model is None and response_id is None:
            return ()
        return (Delta(model=model, response_id=response_id),)

    def _add_item(self, value: dict[str, Any]) -> tuple[Delta, ...]:
        whole = whole_item(value.get("item"))
        where = place(value, whole.id if whole else "")
        if whole is None:
            return ()
        item = self._find(whole.kind, where)
        if item is not None and (
            (item.id != where.id and (item.id or item.done))
            or (item.call_id and whole.call_id[:MAX_LABEL_CHARS] != item.call_id)
        ):
            item = None  # another item on the same place
        if item is None:
            if whole.kind == "call":
                self._check_room(1)
            item = self._open(whole.kind, where)
        return tuple(self._restate_call(item, whole)) if whole.kind == "call" else ()

    def _finish_item(self, value: dict[str, Any]) -> tuple[Delta, ...]:
        whole = whole_item(value.get("item"), done=True)
        where = place(value, whole.id if whole else "")
        if whole is None:
            return ()
        item = self._find(whole.kind, where)
        if item is None:
            if whole.kind == "call":
                self._check_room(1)
            item = self._open(whole.kind, where)
        item.done = True
        return tuple(self._restate(item, whole))

    def _add_text(self, value: dict[str, Any], kind: Kind, field: str, at: str) -> tuple[Delta, ...]:
        text = delta_text(value.get("delta"))
        where, part = place(value), index_of(value, at) or 0
        if not text:
            return ()
        self._tell(self._find(kind, where) or self._open(kind, where), field, part)
        return (_delta(field, text),)

    def _finish_text(
        self, value: dict[str, Any], kind: Kind, field: str, at: str, source: str
    ) -> tuple[Delta, ...]:
        text = lenient.text(value.get(source), source)
        where, part = place(value), index_of(value, at) or 0
        if not text or self._full:
            return ()
        item = self._find(kind, where) or self._open(kind, where)
        if (field, part) in item.told:
            return ()
        self._tell(item, field, part)
        return (_restated(field, text),)

    def _add_input(self, value: dict[str, Any]) -> tuple[Delta, ...]:
        arguments = json_text(value.get("delta"))
        where = place(value)
        delta = self._add_arguments(self._call(where), arguments) if arguments else None
        return () if delta is None else (delta,)

    def _finish_input(self, value: dict[str, Any]) -> tuple[Delta, ...]:
        given = value.get("arguments")
        whole = Whole(
            "call",
            "",
            call_id=lenient.text(value.get("call_id"), "a call's id"),
            name=lenient.text(value.get("name"), "a call's name"),
            arguments=json_text(value.get("input") if given is None else given),
            completed=True,
        )
        return tuple(self._restate_call(self._call(place(value)), whole))

    # --- the end ---

    def _read_body(self, response: dict[str, Any]) -> tuple[Delta, ...]:
        """Take a response that came in place of a stream: it has ended if its status says so."""
        status = response.get("status")
        if status in ("completed", "failed", "incomplete", "cancelled"):
            return self._end(response, status)
        if response.get("error") and (fault := find_fault(response)) is not None:
            return (Delta(fault=fault),)
        return self._begin({"response": response})

    def _finish(self, value: dict[str, Any], told: str) -> tuple[Delta, ...]:
        response = value.get("response")
        if response is None:
            response = value if value.get("object") == "response" else {}
        if not isinstance(response, dict):
            raise UnparseableError(f"a response is a {type(response).__name__}")
        status = response.get("status")
        if told == "completed" and status in ("failed", "incomplete", "cancelled"):
            told = status
        return self._end(response, told)

    def _end(self, response: dict[str, Any], status: str) -> tuple[Delta, ...]:
        usage = usage_of(response.get("usage"))
        if status == "failed":
            model, response_id = self._identify(response)
            about = Delta(usage=usage, model=model, response_id=response_id)
            error = response.get("error") or {"code": "failed"}
            fault = find_fault({"error": error}) or error_fault(error)
            return (about, Delta(fault=fault))
        rest = self._rest(response)
        model, response_id = self._identify(response)
        reason = incomplete_reason(response) if status == "incomplete" else status
        self._finish_reason = reason[:MAX_LABEL_CHARS]
        last = Delta(
            finish_reason=self._finish_reason,
            usage=usage,
            model=model,
            response_id=response_id,
            terminal=True,
        )
        return (*rest, last)

    def _rest(self, response: dict[str, Any]) -> list[Delta]:
        """Tell what only the whole response has."""
        output = response.get("output")
        wholes = [whole_item(item, done=True) for item in output] if isinstance(output, list) else []
        found: list[tuple[Whole, _Item | None, int]] = []
        streamed = set(self._last)
        for index, whole in enumerate(wholes):
            if whole is None:
                continue
            item = self._by_id.get((whole.kind, whole.id)) if whole.id else None
            if item is None:
                item = self._by_index.get((whole.kind, index))
            if item is not None or whole.kind not in streamed:
                found.append((whole, item, index))
            # Otherwise items of its kind were streamed, and it may be any of them.
        self._check_room(sum(whole.kind == "call" and item is None for whole, item, _ in found))
        text = response.get("output_text")
        deltas: list[Delta] = []
        for whole, item, index in found:
            known = self._open(whole.kind, Where(index, whole.id)) if item is None else item
            deltas += self._restate(known, whole)
        if isinstance(text, str) and text and not wholes and "message" not in streamed and not self._full:
            deltas.append(_restated("text", text))
        return deltas

    def _identify(self, response: dict[str, Any]) -> tuple[str | None, str | None]:
        """Return the model and the id of the response where they are new."""
        model = response_id = None
        if self._model is None:
            model = self._model = label(response.get("model"))
        if self._response_id is None:
            response_id = self._response_id = label(response.get("id"))
        return model, response_id


_Read = Callable[[_ResponseReader, dict[str, Any]], tuple[Delta, ...]]


def _ends(status: str) -> _Read:
    """Return what reads the event that ends a response."""
    return lambda reader, value: reader._finish(value, status)  # noqa: SLF001 - the reader's own method


def _texts(kind: Kind, field: str, at: str, source: str | None = None) -> _Read:
    """Return what reads the deltas, or the whole in `source`, of a field of items of a kind."""
    if source is None:
        return lambda reader, value: reader._add_text(value, kind, field, at)  # noqa: SLF001 - the reader's own method
    return lambda reader, value: reader._finish_text(value, kind, field, at, source)  # noqa: SLF001 - as above


_EVENTS: Final[Mapping[str, _Read]] = {
    # The reader's own methods, by the type of event they read.
    "response.created": _ResponseReader._begin,  # noqa: SLF001 - as are all the following
    "response.queued": _ResponseReader._begin,  # noqa: SLF001
    "response.in_progress": _ResponseReader._begin,  # noqa: SLF001
    "response.output_item.added": _ResponseReader._add_item,  # noqa: SLF001
    "response.output_item.done": _ResponseReader._finish_item,  # noqa: SLF001
    "response.output_text.delta": _texts("message", "text", "content_index"),
    "response.output_text.done": _texts("message", "text", "content_index", "text"),
    "response.refusal.delta": _texts("message", "refusal", "content_index"),
    "response.refusal.done": _texts("message", "refusal", "content_index", "refusal"),
    "response.reasoning_summary_text.delta": _texts("reasoning", "summary", "summary_index"),
    "response.reasoning_summary_text.done": _texts("reasoning", "summary", "summary_index", "text"),
    "response.reasoning_text.delta": _texts("reasoning", "content", "content_index"),
    "response.reasoning_text.done": _texts("reasoning", "content", "content_index", "text"),
    "response.function_call_arguments.delta": _ResponseReader._add_input,  # noqa: SLF001
    "response.function_call_arguments.done": _ResponseReader._finish_input,  # noqa: SLF001
    "response.custom_tool_call_input.delta": _ResponseReader._add_input,  # noqa: SLF001
    "response.custom_tool_call_input.done": _ResponseReader._finish_input,  # noqa: SLF001
    "response.completed": _ends("completed"),
    "response.done": _ends("completed"),
    "response.incomplete": _ends("incomplete"),
    "response.failed": _ends("failed"),
    "response.cancelled": _ends("cancelled"),
}


def _delta(field: str, text: str) -> Delta:
    if field == "text":
        return Delta(text)
    return Delta(refusal=text) if field == "refusal" else Delta(reasoning=text)


def _restated(field: str, text: str) -> Delta:
    return msgspec.structs.replace(_delta(field, text), restated=True)


def _prompt(prompt: str, model: str | None) -> Mapping[str, Any]:
    return {"model": named_model(model), "input": prompt}


OPENAI_RESPONSES: Final = Dialect(
    name="openai-responses",
    framing="sse",
    reader=_ResponseReader,
    fault=http_fault,
    endings=Endings(
        markers=("response.completed", "response.incomplete", "response.cancelled", "response.failed"),
        well="`response.completed`",
        incomplete={
            "max_output_tokens": "the limit of tokens was reached",
            "content_filter": "the provider's filter cut the answer off",
            "incomplete": "the provider does not say why",
            "cancelled": "a background response was cancelled on the provider's side",
        },
        errors=(
            "`response.failed`",
            "an event named `error`, or of that type",
            "an `error` in any other event",
            "an object that calls itself an error, or is only a message, where an event should be",
        ),
        truncated="the body ends, or the connection is lost, before any of these, even after the last `.done` of an item",
    ),
    asking=Asking(
        path="/responses",
        prompt=_prompt,
        resume=resume,
        cancel=cancel,
        retrieve=retrieve,
        usage=retrieved_usage,
    ),
    abort_stops_billing=True,
    usage_rule=(
        "once, in the response of the last event; input includes what was cached, output includes reasoning. A response made with "
        "`background` goes on, and is billed, when the connection is closed: it has to be cancelled, and then states its usage"
    ),
)
