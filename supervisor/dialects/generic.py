"""Any stream of text: event streams, NDJSON and JSON arrays of servers that have no dialect of their own.

`generic(...)` makes a dialect of where, in a server's JSON, things stand: JSON pointers for the text, the error, the finish
reason and the usage, and the markers that end the answer. `GENERIC` is made of the places and markers that are common.

**Text.** The first pointer that finds a non-empty string gives an event's text; the one that did is tried first from then
on. Data that is no JSON object is text itself, if the empty pointer is among the pointers (it is by default): a JSON
string is what it spells, anything else stands as it came. A stream that has shown JSON objects is not plain text any more, and
there data that is no JSON is unreadable; in one that has shown plain text, an object that says nothing known is text. An
event that closes the answer and repeats all of it (its name says so: `done`, `completed`) adds nothing.

**Endings.** A marker is one of

- `"/done=true"`: a JSON pointer and the JSON value that stands there; without a value, anything but null, false, 0 or empty;
- `"data:END"`: data that is this text (`"[DONE]"` is short for `"data:[DONE]"`);
- any other word: the name of an event, in the `event` field of an event stream, or in the JSON's own `type`, `event` or
  `event_type`.

With the marker the answer is complete; it is also when a finish reason was given and then the body ended. Otherwise the
end of the body, clean or not, is a truncation: `end="marker"`, the default. A server that sends no marker at all can be
read with `end="clean"`: then a body whose framing was complete, in which no event and no JSON array was left open, and
which had at least one event, is a complete answer. The price is that a server which stops in the middle and closes its
response in good order is believed.

**Errors** are what stands at the error pointers, an event of which the name says that it is one, JSON that says so of
itself (see `supervisor.dialects.faults`), and a finish reason that begins with `error` or is `failed`.

**Going on after a break** is what the event-stream standard has (WHATWG HTML, 9.2): the same request again, with the last
event id in the header `Last-Event-ID`. A server that gives ids says by that that it can be asked so. Without an id the
standard's algorithm asks again, too. For a feed, which is what it was made for, that is right; for an answer it would have
the model begin anew and its text would be doubled. So without an id only a `GET` is repeated (`method="GET"`, or an empty
request), unless `reconnect` says otherwise. Status 204 means that there is nothing more.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final, Literal
from urllib.parse import urlencode

import attrs
import msgspec

from supervisor.dialects.base import Delta, Fault, UnparseableError, Usage
from supervisor.dialects.dialect import Asking, Call, Dialect, Endings, Progress
from supervisor.dialects.faults import error_fault, find_fault, http_fault, shown
from supervisor.dialects.lenient import count, loads
from supervisor.dialects.places import (
    DONE,
    ERROR,
    FINISH,
    INPUT_TOKENS,
    OUTPUT_TOKENS,
    REASONING,
    TEXT,
    Places,
    markers,
    pointers,
    strings,
)
from supervisor.dialects.pointers import MISSING, Pointer, lookup, pointer
from supervisor.errors import ConfigurationError

__all__ = ["GENERIC", "generic"]

MAX_LABEL_CHARS: Final = 256
"""What is kept of a finish reason. A longer name of the model or id of the response is none."""

_IGNORED: Final = frozenset({"ping", "keepalive", "keep-alive", "heartbeat"})
# Events whose data, if it is no JSON, is about the stream and not of the answer.
_ABOUT: Final = frozenset(
    {"open", "connected", "ready", "start", "status", "info", "metadata", "debug", "log"}
)
_CLOSING: Final = ("done", "completed", "complete", "end", "stop", "finish", "finished", "final")
_THOUGHTS: Final = ("think", "thought", "reason")
_TOOLS: Final = ("argument", "function_call", "input_json", "tool_call", "tool-call")
_NO_FINISH: Final = frozenset(
    {
        "",
        "null",
        "none",
        "not_finished",
        "in_progress",
        "queued",
        "running",
        "pending",
        "finish_reason_unspecified",
    }
)
_EMPTY: Final[tuple[Any, ...]] = (None, False, 0, "", [], {}, MISSING)
_NOTHING: Final = Delta()

_decode_any = msgspec.json.Decoder().decode


# --- the reader ------------------------------------------------------------------------------------------------------


class _GenericReader:
    __slots__ = (
        "_finish",
        "_last",
        "_model",
        "_places",
        "_plain",
        "_response_id",
        "_streamed",
        "_structured",
        "_terminal",
        "_usage",
    )

    def __init__(self, places: Places) -> None:
        self._places = places
        self._last: Pointer | None = None
        """Where text was found last."""
        self._plain = False
        """It has shown data that is text itself."""
        self._structured = False
        """It has shown JSON objects."""
        self._streamed = False
        """There was text."""
        self._finish: str | None = None
        self._usage: Usage | None = None
        self._model: str | None = None
        self._response_id: str | None = None
        self._terminal = False

    def read(self, data: bytes, event: str = "message") -> tuple[Delta, ...]:
        """Say what one event means. Raises UnparseableError, and is then as it was before."""
        places = self._places
        name = "" if event == "message" else event.casefold()
        if name in _IGNORED:
            return ()
        bare = data.strip(b" \t\r\n\"'")
        if bare in places.done_data:
            self._terminal = True
            return (Delta(terminal=True),)
        try:
            value = _decode_any(data)
        except (ValueError, RecursionError):
            return self._read_text(data, bare, name)
        if isinstance(value, dict):
            return self._read_object(value, data, name)
        if isinstance(value, list):
            return self._read_list(value, data, name)
        return self._read_text(data, bare, name, value)

    def ending(self) -> str | None:
        """Return the finish reason, or `done` if there was a marker without one."""
        return self._finish or ("done" if self._terminal else None)

    # --- data that is no object ---

    def _read_text(self, data: bytes, bare: bytes, name: str, value: Any = MISSING) -> tuple[Delta, ...]:
        """Read data that is no JSON (then there is no `value`), or a JSON string, number or such."""
        places = self._places
        if name in places.error_names:
            return (Delta(fault=error_fault(value if isinstance(value, str) else shown(data, 2000))),)
        if name in places.done_names:
            self._terminal = True
            return (Delta(terminal=True),)
        if not data or name in _ABOUT:
            return ()
        if not self._plain:
            if value is None or (not bare and self._structured):
                return ()
            if value is MISSING and (self._structured or not places.plain or bare.startswith((b'{"', b"[{"))):
                mended = loads(data)
                return self._read_object(mended, b"", name) if isinstance(mended, dict) else ()
            if not places.plain or (self._structured and not isinstance(value, str)):
                raise UnparseableError(f"neither a JSON object nor a marker: {shown(data, 100)}")
        if isinstance(value, str) and not self._plain:
            text = value
        else:
            text = data.decode("utf-8", "replace")
            self._plain = True
        if not text:
            return ()
        self._streamed = True
        return (Delta(text),)

    def _read_list(self, value: list[Any], data: bytes, name: str) -> tuple[Delta, ...]:
        if self._plain:
            return self._read_text(data, data, name)
        if not all(isinstance(item, dict) for item in value):
            raise UnparseableError(f"a list of other things than objects: {shown(data, 100)}")
        return tuple(delta for item in value for delta in self._read_object(item, b"", name))

    # --- objects ---

    def _read_object(self, value: dict[str, Any], data: bytes, name: str) -> tuple[Delta, ...]:
        places = self._places
        kind = _kind(value)
        text = self._text(value)
        if (fault := self._fault(value, name, kind, text)) is not None:
            return (Delta(fault=fault),)
        closing = name in places.done_names or kind in places.done_names
        if text and self._streamed and (closing or _closes(name) or _closes(kind)):
            text = ""
        reasoning = _string(value, places.reasoning)
        if text and _speaks_of(value, kind, _TOOLS):
            text = ""
        if text and places.reasoning and _speaks_of(value, kind, _THOUGHTS):
            text, reasoning = "", reasoning or text
        finish = _finish(value, places.finish)
        usage = self._counted(value)
        terminal = closing or any(_stands(value, *marker) for marker in places.done)
        model = _label(value.get("model")) if self._model is None else None
        response_id = _label(value.get("id")) if self._response_id is None else None
        delta = Delta(
            text,
            reasoning,
            finish_reason=finish,
            usage=usage,
            model=model,
            response_id=response_id,
            terminal=terminal,
        )
        if delta == _NOTHING:
            if self._plain and data:
                return self._read_text(data, data, name)
            self._structured = True
            return ()
        self._structured = True
        self._streamed = self._streamed or bool(text)
        self._finish = finish or self._finish
        self._usage = usage or self._usage
        self._model = model or self._model
        self._response_id = response_id or self._response_id
        self._terminal = self._terminal or terminal
        failed = finish is not None and (
            finish.casefold().startswith("error") or finish.casefold() == "failed"
        )
        if failed:
            message = f"the provider ended the answer with the finish reason {finish!r}"
            return (delta, Delta(fault=error_fault({"message": message, "code": finish})))
        return (delta,)

    def _text(self, value: dict[str, Any]) -> str:
        last = self._last
        if last is not None:
            found = lookup(value, last)
            if isinstance(found, str) and found:
                return found
        for where in self._places.text:
            if where and where[0] in value:
                found = lookup(value, where)
                if isinstance(found, str) and found:
                    self._last = where
                    return found
        return ""

    def _fault(self, value: dict[str, Any], name: str, kind: str, text: str) -> Fault | None:
        places = self._places
        for where in places.errors:
            found = lookup(value, where)
            if found not in _EMPTY:
                return error_fault(value if found is True else found, around=_around(value, where))
        if name in places.error_names or kind in places.error_names:
            return find_fault(value) or error_fault(value)
        if places.guess_errors and (not text or self._last == ("message",)):
            return find_fault(value)
        return None

    def _counted(self, value: dict[str, Any]) -> Usage | None:
        """Return the usage with what this event says of it; None if it says nothing."""
        places = self._places
        read, written = _count(value, places.input), _count(value, places.output)
        if read is None and written is None:
            return None
        known = self._usage or Usage()
        return Usage(known.input if read is None else read, known.output if written is None else written)


def _kind(value: dict[str, Any]) -> str:
    """Return the name that an event's JSON gives itself."""
    for field in ("type", "event_type", "event"):
        name = value.get(field)
        if isinstance(name, str):
            return name[:MAX_LABEL_CHARS].casefold()
    return ""


def _closes(name: str) -> bool:
    """Whether an event's name says that something is over: what it repeats has been told."""
    return bool(name) and name.replace("_", ".").replace("-", ".").rpartition(".")[2] in _CLOSING


def _speaks_of(value: dict[str, Any], kind: str, words: tuple[str, ...]) -> bool:
    """Whether the type of an event, or of the delta in it, has one of these words in it."""
    delta = value.get("delta")
    inner = delta.get("type") if isinstance(delta, dict) else None
    if isinstance(inner, str):
        kind = f"{kind} {inner[:MAX_LABEL_CHARS].casefold()}"
    return bool(kind) and any(word in kind for word in words)


def _string(value: dict[str, Any], places: tuple[Pointer, ...]) -> str:
    for where in places:
        found = lookup(value, where)
        if isinstance(found, str) and found:
            return found
    return ""


def _finish(value: dict[str, Any], places: tuple[Pointer, ...]) -> str | None:
    for where in places:
        found = lookup(value, where)
        if isinstance(found, str) and found.casefold() not in _NO_FINISH:
            return found[:MAX_LABEL_CHARS]
    return None


def _count(value: dict[str, Any], places: tuple[Pointer, ...]) -> int | None:
    for where in places:
        found = lookup(value, where)
        if found is not MISSING and (number := count(found)) is not None:
            return number
    return None


def _stands(value: dict[str, Any], where: Pointer, wanted: Any) -> bool:
    found = lookup(value, where)
    if wanted is MISSING:
        return found not in _EMPTY
    return type(found) is type(wanted) and bool(found == wanted)


def _around(value: dict[str, Any], where: Pointer) -> dict[str, Any]:
    """Return what stands beside an error: its code may be there."""
    parent = lookup(value, where[:-1])
    return {key: item for key, item in parent.items() if key != where[-1]} if isinstance(parent, dict) else {}


def _label(value: Any) -> str | None:
    return value if isinstance(value, str) and 0 < len(value) <= MAX_LABEL_CHARS else None


# --- the dialect -----------------------------------------------------------------------------------------------------


def _prompt(prompt: str, model: str | None) -> Mapping[str, Any]:
    return {"prompt": prompt} if model is None else {"model": model, "prompt": prompt}


def generic(
    name: str = "generic",
    *,
    text: str | Sequence[str] = TEXT,
    reasoning: str | Sequence[str] = REASONING,
    error: str | Sequence[str] = ERROR,
    finish: str | Sequence[str] = FINISH,
    done: str | Sequence[str] = DONE,
    input_tokens: str | Sequence[str] = INPUT_TOKENS,
    output_tokens: str | Sequence[str] = OUTPUT_TOKENS,
    framing: Literal["sse", "ndjson", "json-array"] = "sse",
    end: Literal["marker", "clean"] = "marker",
    method: Literal["GET", "POST"] = "POST",
    path: str | None = None,
    prompt: Callable[[str, str | None], Mapping[str, Any]] | None = _prompt,
    reconnect: bool | None = None,
    abort_stops_billing: bool | None = None,
) -> Dialect:
    """Make a dialect of where things stand in a server's events. See the module for what each of them may be.

    text, reasoning, finish, input_tokens, output_tokens: JSON pointers, in order of preference; `text` with "" among
    them takes plain text, too. error: JSON pointers, and names of events. done: markers. framing: how the body is most
    likely cut; what it really is is seen. end: what the end of a body without a marker is. method: how an answer is asked
    for; with GET the request's fields go into the query. path: what follows the base URL. prompt: how a request is made
    of a user's words and a model (`{"prompt": …}`); None: not at all. reconnect: whether a broken
    stream without event ids is asked for again; None: if it is an event stream got by GET.

    Raises ConfigurationError, naming the field.
    """
    if not _is_text(name):
        raise ConfigurationError("name", name, "a name")
    for field, value, allowed in (
        ("framing", framing, ("sse", "ndjson", "json-array")),
        ("end", end, ("marker", "clean")),
        ("method", method, ("GET", "POST")),
    ):
        if value not in allowed:
            raise ConfigurationError(field, value, f"one of {', '.join(allowed)}")
    if path is not None and not (_is_text(path) and path.startswith("/")):
        raise ConfigurationError("path", path, "a path that begins with /")
    texts = pointers("text", text)
    if not texts:
        raise ConfigurationError("text", text, "at least one JSON pointer")
    places, data, names = markers(done)
    endings = pointers("finish", finish)
    if end == "marker" and not (places or data or names or endings):
        raise ConfigurationError(
            "done", done, 'a marker, a `finish` pointer, or end="clean": nothing would end an answer'
        )
    errors = strings("error", error)
    looked_for = Places(
        text=texts,
        plain=() in texts,
        reasoning=pointers("reasoning", reasoning),
        errors=tuple(pointer("error", one) for one in errors if one.startswith("/")),
        error_names=frozenset(one.casefold() for one in errors if not one.startswith("/")),
        guess_errors=error is ERROR,
        finish=endings,
        input=pointers("input_tokens", input_tokens),
        output=pointers("output_tokens", output_tokens),
        done=tuple(places),
        done_data=frozenset(data),
        done_names=frozenset(names),
    )
    asking = _Asking(method=method, path=path, framing=framing, reconnect=reconnect)
    well = "a marker; or, without it, a finish reason and then the end of the body"
    if end == "clean":
        well += "; or the clean end of a body that had an event and leaves none open"
    return Dialect(
        name=name,
        framing=framing,
        reader=lambda: _GenericReader(looked_for),
        fault=http_fault,
        endings=Endings(
            markers=strings("done", done),
            well=well,
            errors=(
                "what stands at an error pointer",
                "an event with a name of an error",
                "JSON that says of itself that it is an error, if no error pointers are given",
                "a finish reason `failed`, or one that begins with `error`",
            ),
            clean_end=end == "clean",
        ),
        asking=Asking(
            path=path,
            prompt=prompt,
            first=asking.first,
            resume=asking.resume,
            resume_ends=frozenset({204}),
        ),
        abort_stops_billing=abort_stops_billing,
        usage_rule="what stands at the usage pointers; the last statement of each number counts",
    )


@attrs.frozen(kw_only=True)
class _Asking:
    """How a generic upstream is asked, first and after a break."""

    method: Literal["GET", "POST"]
    path: str | None
    framing: str
    reconnect: bool | None

    def first(self, request: Mapping[str, Any], path: str) -> Call:
        """Post the object as it is; get, if there is none or the dialect says so, with its fields in the query."""
        if request and self.method == "POST":
            return Call(path=path, body=request)
        query = {field: _in_query(field, value) for field, value in request.items()}
        return Call(path=f"{path}?{urlencode(query)}" if query else path, method="GET")

    def resume(self, request: Mapping[str, Any], progress: Progress) -> Call | None:
        """Ask again, from the last event id on. None where that would begin a second answer: see the module."""
        call = self.first(request, progress.path or self.path or "")
        last_id = progress.last_event_id
        if last_id:
            # HTTP clients and servers disagree on other characters in a header.
            sendable = last_id.isascii() and last_id.isprintable() and last_id == last_id.strip()
            return attrs.evolve(call, headers={"Last-Event-ID": last_id}) if sendable else None
        again = self.reconnect
        if again is None:
            again = call.method == "GET" and self.framing == "sse"
        return call if again else None


def _is_text(value: object) -> bool:
    return isinstance(value, str) and bool(value)


def _in_query(field: str, value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str | int | float):
        return str(value)
    raise ConfigurationError(f"request.{field}", value, "a string or a number: it goes into a query")


GENERIC: Final = generic()
