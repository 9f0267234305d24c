"""`check_dialect`: the built-in dialects keep every promise, and each promise that is broken is found and named."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import attrs
import msgspec
import pytest

from supervisor.dialects import (
    BUILTIN,
    NATIVE,
    Asking,
    Call,
    Delta,
    Dialect,
    Endings,
    Fault,
    ToolCallDelta,
    UnparseableError,
    generic,
)
from supervisor.dialects.faults import error_fault
from supervisor.errors import ConfigurationError
from supervisor.testing import ConformanceError, check_dialect
from tests.dialects.bodies import event
from tests.dialects.examples import EXAMPLES


@pytest.mark.parametrize("name", sorted(BUILTIN.keys() - {"native"}))
def test_the_built_in_dialects(name: str) -> None:
    """Every dialect of this package that reads bodies keeps all promises."""
    examples = EXAMPLES[name]
    check_dialect(BUILTIN[name], examples.streams, incomplete=examples.incomplete, errors=examples.errors)


# --- a small dialect, and ways of breaking it ------------------------------------------------------------------------


class SmallReader:
    """Reads `{"t": text}`, `{"call": [name, arguments]}`, `{"error": message}` and, at last, `{"end": reason, "n": tokens}`."""

    def __init__(self) -> None:
        self.reason: str | None = None
        self.calls = 0

    def read(self, data: bytes, event: str = "message") -> tuple[Delta, ...]:
        try:
            value = msgspec.json.decode(data)
        except (ValueError, RecursionError):
            raise UnparseableError("no JSON") from None
        if not isinstance(value, dict):
            raise UnparseableError("no object")
        return self.meaning(value)

    def meaning(self, value: dict[str, Any]) -> tuple[Delta, ...]:
        if "error" in value:
            return (Delta(fault=error_fault(value["error"])),)
        if "end" in value:
            reason, tokens = text(value["end"]), value.get("n", 0)
            if not isinstance(tokens, int):
                raise UnparseableError("n is no number")
            self.reason = reason
            return (Delta(finish_reason=reason, terminal=True),)
        if "call" in value:
            call = value["call"]
            if not isinstance(call, list) or len(call) != 2:
                raise UnparseableError("a call is no pair")
            name, arguments = text(call[0]), text(call[1])
            self.calls += 1
            return (Delta(tool_calls=(ToolCallDelta(self.calls - 1, "", name, arguments),)),)
        return (Delta(text=text(value.get("t", ""))),)

    def ending(self) -> str | None:
        return self.reason


def text(value: Any) -> str:
    if not isinstance(value, str):
        raise UnparseableError("no text")
    return value.encode("utf-8", "replace").decode()


WELL = (
    event({"t": "Good "})
    + event({"t": "day"})
    + event({"call": ["look", "{}"]})
    + event({"end": "stop", "n": 3})
)
CUT = event({"t": "Once"}) + event({"end": "length"})
ERROR = event({"t": "Once"}) + event({"error": {"message": "it broke"}})
SMALL = Dialect(
    name="small",
    framing="sse",
    reader=SmallReader,
    endings=Endings(
        markers=("end",),
        well="an `end`",
        incomplete={"length": "the limit of tokens was reached"},
        errors=("an `error`",),
    ),
    usage_rule="never",
)


def check(dialect: Dialect, **given: Any) -> None:
    arguments = {"streams": [(WELL, "Good day")], "incomplete": [CUT], "errors": [ERROR], **given}
    check_dialect(dialect, arguments.pop("streams"), **arguments)


def changed(**fields: Any) -> Dialect:
    return attrs.evolve(SMALL, **fields)


def ended(**fields: Any) -> Dialect:
    return changed(endings=attrs.evolve(SMALL.endings, **fields))


def test_the_small_dialect() -> None:
    """What the broken ones are made of is not broken."""
    check(SMALL)
    check(SMALL, streams=[WELL])


class Doubling(SmallReader):
    """Tells each text twice."""

    def meaning(self, value):
        deltas = super().meaning(value)
        return tuple(Delta(text=2 * delta.text) if delta.text else delta for delta in deltas)


class Endless(SmallReader):
    """Knows no ending."""

    def meaning(self, value):
        return () if "end" in value else super().meaning(value)

    def ending(self):
        return None


class Picky(SmallReader):
    """Refuses some events of its own examples."""

    def meaning(self, value):
        if value.get("t") == "day":
            raise UnparseableError("not today")
        return super().meaning(value)


class Deaf(SmallReader):
    """Does not hear errors."""

    def meaning(self, value):
        return () if "error" in value else super().meaning(value)


class Forgiving(SmallReader):
    """Takes an error for an ending."""

    def meaning(self, value):
        if "error" in value:
            self.reason = "stop"
            return (Delta(finish_reason="stop", terminal=True),)
        return super().meaning(value)


class Mute(SmallReader):
    """Reports errors without their message."""

    def meaning(self, value):
        return (
            (Delta(fault=Fault(kind="server", message="")),) if "error" in value else super().meaning(value)
        )


class Hasty(SmallReader):
    """Holds every answer for ended as soon as it has begun."""

    def ending(self):
        return self.reason or "stop"


class Vague(SmallReader):
    """Gives another reason for an answer that was cut off."""

    def ending(self):
        return self.reason or ("begun" if self.calls else None)


class Restless(SmallReader):
    """Reads every tenth body otherwise."""

    made = 0

    def __init__(self):
        super().__init__()
        Restless.made += 1
        self.loud = Restless.made % 10 == 0

    def meaning(self, value):
        deltas = super().meaning(value)
        return tuple(
            Delta(text=delta.text.upper()) if delta.text and self.loud else delta for delta in deltas
        )


class Sharing(SmallReader):
    """Keeps how many calls there were in one place for all readers, though each begins it anew."""

    shared: ClassVar[dict[str, int]] = {}

    def __init__(self):
        super().__init__()
        self.shared["calls"] = 0

    def meaning(self, value):
        deltas = super().meaning(value)
        if deltas and deltas[0].tool_calls:
            self.shared["calls"] += 1
            call = deltas[0].tool_calls[0]
            return (
                Delta(tool_calls=(ToolCallDelta(self.shared["calls"] - 1, "", call.name, call.arguments),)),
            )
        return deltas


class Halfway(SmallReader):
    """Has already believed the end when it finds that it cannot read it."""

    def meaning(self, value):
        if "end" in value and isinstance(value["end"], str):
            self.reason = text(value["end"])
        return super().meaning(value)


class Counting(SmallReader):
    """Counts a call before it has looked at it."""

    def meaning(self, value):
        if "call" in value:
            self.calls += 1
            try:
                return super().meaning(value)
            finally:
                self.calls -= 1 if isinstance(value["call"], list) else 0
        return super().meaning(value)


class Trusting(SmallReader):
    """Believes that every value is of the type it should be."""

    def meaning(self, value):
        return (Delta(text=value["t"] + ""),) if "t" in value else super().meaning(value)


class Shallow(SmallReader):
    """Does not expect deep JSON, broken UTF-8 or no JSON at all."""

    def read(self, data, event="message"):
        return self.meaning(value) if isinstance(value := json.loads(data), dict) else ()


class Listing(SmallReader):
    """Returns a list."""

    def meaning(self, value):
        return list(super().meaning(value))


class Truthful(SmallReader):
    """Says of some answers whether they have ended, but not how."""

    def ending(self):
        return self.reason or (False if self.calls > 1 else None)


class Surrogate(SmallReader):
    """Lets half a character through, which no record can keep."""

    def read(self, data, event="message"):
        try:
            value = json.loads(data)
        except (ValueError, RecursionError):
            raise UnparseableError("no JSON") from None
        if isinstance(value, dict) and isinstance(value.get("t"), str):
            return (Delta(text=value["t"]),)
        return super().read(data, event)


class Hoarding(SmallReader):
    """Keeps everything."""

    def __init__(self):
        super().__init__()
        self.kept: list[Any] = []

    def meaning(self, value):
        self.kept.append(value)
        return super().meaning(value)


class Collecting(SmallReader):
    """Keeps each text that it has not had before."""

    def __init__(self):
        super().__init__()
        self.kept: set[str] = set()

    def meaning(self, value):
        deltas = super().meaning(value)
        self.kept.update(delta.text for delta in deltas)
        return deltas


READERS = [
    (Endless, "ends well", "failed"),
    (Doubling, "ends well", "Good Good "),
    (Picky, "ends well", "not today"),
    (Deaf, "tells errors", "failed(truncated)"),
    (Forgiving, "tells errors", "completed(stop)"),
    (Mute, "tells errors", "no message"),
    (Hasty, "tells a cut from an ending", "completed(stop)"),
    (Vague, "tells a cut from an ending", "completed(begun)"),
    (Restless, "reads the same under every split", "GOOD DAY"),
    (Sharing, "makes independent readers", "event 2"),
    (Halfway, "is unchanged by what it cannot read", "`ending`"),
    (Counting, "is unchanged by what it cannot read", "event 2"),
    (Trusting, "raises nothing else", "TypeError"),
    (Shallow, "raises nothing else", "UnparseableError"),
    (Listing, "raises nothing else", "tuple of Delta"),
    (Truthful, "raises nothing else", "str or None"),
    (Surrogate, "raises nothing else", "cannot be kept"),
    (Hoarding, "stays bounded", "KiB"),
    (Collecting, "stays bounded", "KiB"),
]


@pytest.mark.parametrize(("reader", "name", "told"), READERS, ids=lambda one: getattr(one, "__name__", None))
def test_a_broken_reader(reader: Callable[[], Any], name: str, told: str) -> None:
    """Each way of getting a reader wrong fails the check that is for it, with a sentence about what was seen."""
    with pytest.raises(ConformanceError) as caught:
        check(changed(reader=reader))
    assert (caught.value.dialect, caught.value.check) == ("small", name)
    assert told in str(caught.value)


def test_one_reader_for_all() -> None:
    """A factory that always returns the same reader is found, even if it resets it."""

    class Reset(SmallReader):
        def __call__(self):
            self.__init__()  # type: ignore[misc]  # the bug that is to be found
            return self

    with pytest.raises(ConformanceError) as caught:
        check(changed(reader=Reset()))
    assert caught.value.check == "makes independent readers"


def changing(request: Mapping[str, Any], _path: str) -> Call:
    request["stream"] = True  # type: ignore[index]  # the bug that is to be found
    return Call(path="/", body=request)


def copying(request: Mapping[str, Any], path: str) -> Call:
    return Call(path=path, body={**copy.deepcopy(request), "stream": True})


def raising(_status: int, body: bytes) -> Fault:
    return Fault(kind="server", message=json.loads(body)["message"])


@pytest.mark.parametrize(
    ("dialect", "name", "told"),
    [
        (changed(usage_rule=""), "describes itself", "usage_rule"),
        (changed(abort_stops_billing=False), "describes itself", "drain"),
        (ended(well=""), "describes itself", "endings.well"),
        (ended(errors=()), "describes itself", "endings.errors"),
        (ended(incomplete={"stop": "?"}), "ends well", "'stop'"),
        (ended(incomplete={}), "ends incomplete", "'length'"),
        (ended(markers=()), "declares its markers", '{"end": "stop"'),
        (ended(markers=("[DONE]",)), "declares its markers", "[DONE]"),
        (changed(fault=raising), "reads any error response", "raised"),
        (
            changed(fault=lambda status, body: Fault(kind="server", message="")),
            "reads any error response",
            "no message",
        ),
        (changed(asking=Asking(first=changing)), "asks without changing the request", "asking.first"),
        (
            changed(asking=Asking(prompt=lambda prompt, model: {"model": model})),
            "asks without changing the request",
            "asking.prompt",
        ),
    ],
)
def test_a_broken_description(dialect: Dialect, name: str, told: str) -> None:
    """What a dialect says of itself is held against what it does."""
    with pytest.raises(ConformanceError) as caught:
        check(dialect)
    assert caught.value.check == name
    assert told in str(caught.value)


def test_markers_that_no_example_shows() -> None:
    """A marker that is declared has to be seen: in a dialect where a finish reason is enough, too."""

    class Soft(SmallReader):
        def meaning(self, value):
            return tuple(
                Delta(d.text, tool_calls=d.tool_calls, finish_reason=d.finish_reason, fault=d.fault)
                for d in super().meaning(value)
            )

    check(attrs.evolve(ended(markers=()), reader=Soft))
    with pytest.raises(ConformanceError, match="none of them ends any of the examples"):
        check(changed(reader=Soft))


@pytest.mark.parametrize("marker", ["end", '`end: "stop"`', '/end="stop"', '"stop"'])
def test_ways_of_writing_a_marker(marker: str) -> None:
    """A marker is an event's name, a part of its data, or a field with its value."""
    check(ended(markers=(marker, "length")))


@pytest.mark.parametrize(
    ("marker", "last"),
    [
        ("/end", '{"end": "yes"}'),
        ("/chunk/last=true", '{"chunk": {"last": true}}'),
        ('/why={"a":1}', '{"why": {"a": 1}}'),
        ("/parts/1/over", '{"parts": [{}, {"over": 1}]}'),
        ("data:OVER", "OVER"),
        ("[END]", "[END]"),
        ("Bye", '{"type": "bye"}'),
    ],
)
def test_every_marker_of_a_generic_dialect(marker: str, last: str) -> None:
    """Whatever `generic` takes as a marker, the check knows again; and another that ends the answer is not that one."""
    name = "event: bye\n" if marker == "Bye" else ""
    body = f'data: {{"text": "Hi"}}\n\n{name}data: {last}\n\n'.encode()
    check_dialect(generic("feed", text="/text", done=[marker]), [(body, "Hi")])
    other = attrs.evolve(
        generic("feed", text="/text", done=[marker]), endings=Endings(markers=("/x",), well="?")
    )
    with pytest.raises(ConformanceError, match="is none of"):
        check_dialect(other, [body])


def test_a_missing_usage_rule_hides_no_graver_fault() -> None:
    """What a dialect does comes before what it says about usage."""
    with pytest.raises(ConformanceError) as caught:
        check(changed(usage_rule="", reader=Endless))
    assert caught.value.check == "ends well"


@pytest.mark.parametrize(
    ("wrong", "field", "expected"),
    [
        ({"framing": "csv"}, "dialect small: framing", "sse, ndjson, json-array, none"),
        ({"framing": ["sse"]}, "dialect small: framing", "sse"),
        ({"name": " x"}, "dialect.name", "a name"),
        ({"name": ""}, "dialect.name", "a name"),
        ({"name": None}, "dialect.name", "a name"),
        ({"reader": 3}, "dialect small: reader", "a callable"),
        ({"fault": None}, "dialect small: fault", "a callable"),
    ],
)
def test_a_name_or_framing_that_cannot_be(wrong: dict[str, Any], field: str, expected: str) -> None:
    """They are refused when the dialect is made, not when its first stream is read."""
    with pytest.raises(ConfigurationError) as caught:
        changed(**wrong)
    assert caught.value.field == field
    assert expected in caught.value.expected


def test_a_dialect_that_ends_with_its_body() -> None:
    """For one whose answers end with the body, a clean end in the middle is no failure, but a lost connection is."""

    class Bare(SmallReader):
        def meaning(self, value):
            return () if "end" in value else super().meaning(value)

    bare = attrs.evolve(ended(markers=(), incomplete={}, clean_end=True), reader=Bare)
    check(bare, incomplete=[])
    with pytest.raises(ConformanceError, match="failed"):
        check(attrs.evolve(bare, endings=attrs.evolve(bare.endings, clean_end=False)), incomplete=[])


def test_asking_that_refuses() -> None:
    """A request may be copied, or refused by a ConfigurationError."""

    def refusing(request, text):
        raise ConfigurationError("model", "m", "another")

    check(changed(asking=Asking(first=copying, continuation=refusing, cancel=lambda request, _: None)))


def test_an_example_with_an_error_is_kept_apart() -> None:
    """An example is what it is said to be: an incomplete one does not fail, one that ends well is not cut off."""
    with pytest.raises(ConformanceError, match="ends incomplete"):
        check(SMALL, incomplete=[ERROR])
    with pytest.raises(ConformanceError, match="ends well"):
        check(SMALL, streams=[WELL, CUT])
    with pytest.raises(ConformanceError, match="ends well"):
        check(SMALL, streams=[WELL[:-30]])
    with pytest.raises(ConformanceError, match="tells errors"):
        check(SMALL, errors=[WELL])


@pytest.mark.parametrize(
    ("dialect", "streams", "field"),
    [
        (NATIVE, [WELL], "dialect"),
        (SMALL, [], "streams"),
        (SMALL, [b""], "streams"),
        (SMALL, [WELL + b": x\n" * 20_000], "streams"),
    ],
)
def test_what_cannot_be_checked(dialect: Dialect, streams: list[bytes], field: str) -> None:
    """No body, no example, an empty or a huge one: the argument is named."""
    with pytest.raises(ConfigurationError, match=field):
        check_dialect(dialect, streams)


def test_the_limit_of_memory_is_an_option() -> None:
    """A dialect that has to keep more may say so."""
    check(changed(reader=Hoarding), max_reader_bytes=1 << 30)
