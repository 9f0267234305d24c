from __future__ import annotations

import inspect
import json

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from supervisor import errors
from supervisor.control import messages, rpc
from supervisor.control.messages import (
    CancelParams,
    DeadlinesMessage,
    StartParams,
    StreamParams,
    SubscribeParams,
)
from supervisor.control.rpc import Call, RpcError, error_for, parse, read_params
from supervisor.control.session import Session
from supervisor.errors import (
    AdmissionError,
    ConfigurationError,
    GapError,
    StoreError,
    StoreUnavailableError,
    SupervisorError,
    UnknownStreamError,
)


def one(text: str) -> Call:
    (call,), batch = parse(text, max_batch=4)
    assert not batch
    return call


def refused(text: str, kind: type[msgspec.Struct]) -> RpcError:
    with pytest.raises(RpcError) as caught:
        read_params(msgspec.Raw(text.encode()), kind)
    return caught.value


def test_a_request_is_read_with_its_id_as_it_came() -> None:
    """An id is echoed byte for byte: numbers keep their spelling, strings their escapes, null is an id too."""
    for raw in ("1", "-3", "1.50", "1e3", '"a\\u0062"', "null", "123456789012345678901234567890"):
        call = one(f'{{"jsonrpc": "2.0", "id": {raw}, "method": "hello", "params": {{}}}}')
        assert call.error is None
        assert call.id is not None
        assert bytes(call.id) == raw.encode()


def test_without_an_id_it_is_a_notification() -> None:
    """A call without the member `id` is a notification; with `"id": null` it is not."""
    assert one('{"jsonrpc": "2.0", "method": "hello"}').id is None
    assert one('{"jsonrpc": "2.0", "method": "hello", "id": null}').id is not None


@pytest.mark.parametrize(
    ("text", "code"),
    [
        ("", -32700),
        ("{", -32700),
        ("nonsense", -32700),
        ('{"jsonrpc": "2.0"} trailing', -32700),
        ("[" * 100_000, -32700),
        ('{"params":' * 50_000, -32700),
        ("\ud800", -32700),
        ("[]", -32600),
        ("[1,2,3,4,5]", -32600),
    ],
)
def test_a_message_that_cannot_be_answered_call_by_call(text: str, code: int) -> None:
    """Broken JSON, however deep, is a parse error; an empty or an oversized batch is an invalid request."""
    with pytest.raises(RpcError) as caught:
        parse(text, max_batch=4)
    assert caught.value.error.code == code


@pytest.mark.parametrize(
    ("text", "answer_to"),
    [
        ("1", "null"),
        ('"x"', "null"),
        ("null", "null"),
        ('{"method": "hello", "id": 4}', "4"),
        ('{"jsonrpc": "1.0", "method": "hello", "id": 4}', "4"),
        ('{"jsonrpc": "2.0", "method": 1, "id": 4}', "4"),
        ('{"jsonrpc": "2.0", "id": 4}', "4"),
        ('{"jsonrpc": "2.0", "method": "hello", "id": 4, "params": 1}', "4"),
        ('{"jsonrpc": "2.0", "method": "hello", "id": {}}', "null"),
        ('{"jsonrpc": "2.0", "method": "hello", "id": true}', "null"),
        ('{"jsonrpc": "2.0", "method": "hello", "id": "' + "x" * 300 + '"}', "null"),
        ('{"jsonrpc": "2.0", "id": "no method, and a notification is not meant"}', None),
    ],
)
def test_what_is_not_a_request_is_answered_as_such(text: str, answer_to: str | None) -> None:
    """Each way of not being a JSON-RPC 2.0 request is -32600, to its id where that could be read, else to null."""
    call = one(text)
    assert call.error is not None
    assert call.error.code == -32600
    assert call.id is not None
    if answer_to is not None:
        assert bytes(call.id) == answer_to.encode()


def test_a_batch_is_read_call_by_call() -> None:
    """One bad call in a batch does not spoil the others."""
    calls, batch = parse(
        '[{"jsonrpc":"2.0","id":1,"method":"hello"}, 7, {"jsonrpc":"2.0","method":"x"}]', max_batch=4
    )
    assert batch
    assert [call.error is None for call in calls] == [True, False, True]
    assert [call.id is None for call in calls] == [False, False, True]


@given(st.text(max_size=60) | st.recursive(st.none() | st.integers() | st.text(), st.lists).map(json.dumps))
def test_no_message_raises_anything_else(text: str) -> None:
    """Whatever the text, reading it gives calls or one error with a code of JSON-RPC's own."""
    code = 0
    try:
        calls, _ = parse(text, max_batch=4)
    except RpcError as error:
        code = error.error.code
    assert calls if code == 0 else code in {-32700, -32600}


def test_params_errors_name_the_field_and_what_is_right() -> None:
    """Unknown, missing, mistyped, out of range, nested: the field is named, in the message and in `field`."""
    unknown = refused('{"id": "a", "idd": 1}', StreamParams).error
    assert unknown.code == -32602
    assert unknown.data["field"] == "idd"
    assert "known here are: id, key" in unknown.message
    missing = refused('{"request": {}}', StartParams).error
    assert missing.data["field"] == "upstream"
    assert "required" in missing.message
    for neither_or_both in ('{"upstream": "u"}', '{"upstream": "u", "request": {}, "prompt": ""}'):
        assert "exactly one of: request, prompt" in refused(neither_or_both, StartParams).error.message
    mistyped = refused('{"id": "a", "credit": "many"}', SubscribeParams).error
    assert mistyped.data["field"] == "credit"
    assert mistyped.message == "credit: 'many' is not valid; expected a whole number from 0 to 1,000,000"
    negative = refused('{"id": "a", "credit": -1}', SubscribeParams).error
    assert negative.data["field"] == "credit"
    assert "-1 is not valid" in negative.message
    nested = refused('{"upstream": "u", "request": {}, "deadlines": {"idle": 1}}', StartParams).error
    assert nested.data["field"] == "deadlines.idle"
    assert "known here are: connect_s, first_event_s, idle_s, total_s" in nested.message
    enum = refused('{"upstream": "u", "request": {}, "on_conflict": "no"}', StartParams).error
    assert enum.message == "on_conflict: 'no' is not valid; expected one of 'attach', 'reject', 'replace'"
    for params, kind, said in (
        (
            {"retry": {"attempts": 0}},
            StartParams,
            "retry.attempts: 0 is not valid; expected a whole number from 1 to 100",
        ),
        ({"key": ""}, StartParams, "key: '' is not valid; expected a string of 1 to 256 characters or null"),
        (
            {"key": [1]},
            StartParams,
            "key: an array is not valid; expected a string of 1 to 256 characters or null",
        ),
        (
            {"labels": {"a": 3}},
            StartParams,
            "labels: an object is not valid; expected values that are a string of at most",
        ),
        (
            {"labels": {"": ""}},
            StartParams,
            "labels: an object is not valid; expected names that are a string of 1 to 64",
        ),
        (
            {"retry": {"resume": ["all"]}},
            StartParams,
            "retry.resume[0]: 'all' is not valid; expected one of 'continuation',",
        ),
        (
            {"after": {"epoch": 0, "seq": 0}},
            SubscribeParams,
            "after.epoch: 0 is not valid; expected a whole number of at",
        ),
        (
            {"after": True},
            SubscribeParams,
            "after: true is not valid; expected an object or one of 'snapshot', 'start',",
        ),
        (
            {"deadlines": {"idle_s": 0}},
            StartParams,
            "deadlines.idle_s: 0 is not valid; expected a number above 0, up to",
        ),
    ):
        more = {"upstream": "u", "prompt": ""} if kind is StartParams else {"id": "a"}
        assert refused(json.dumps({**more, **params}), kind).error.message.startswith(said)
    array = refused('["a"]', StreamParams).error
    assert array.message == "parameters are given by name: id, key"


def test_errors_do_not_repeat_all_that_was_sent() -> None:
    """A field's name or a value of a megabyte is cut in the error that quotes it."""
    long = "x" * 1_000_000
    unknown = refused(json.dumps({long: 1}), StreamParams).error
    for error in (unknown, error_for(StoreError(long)), error_for(ConfigurationError("x", long, "y"))):
        assert len(error.message) <= rpc.MAX_ERROR_CHARS
        assert len(json.dumps(error.data)) < 1000
    assert unknown.data["field"].startswith("xxx")


@pytest.mark.parametrize(
    "text", ["{}", '{"id": "a", "key": "b"}', '{"labels": {}}', '{"id": "a", "all": true}']
)
def test_a_selector_is_exactly_one(text: str) -> None:
    """A cancel names exactly one of id, key, labels and all, and labels are not empty: that would be all by accident."""
    error = refused(text, CancelParams).error
    assert error.code == -32602


def test_deadlines_tell_left_out_from_null() -> None:
    """Null turns a clock off; a clock that is left out keeps its default."""
    deadlines = read_params(msgspec.Raw(b'{"idle_s": null, "total_s": 5}'), DeadlinesMessage)
    assert deadlines.given() == {"idle_s": None, "total_s": 5.0}


def test_every_error_of_ours_has_a_row() -> None:
    """Each SupervisorError maps to a kind of its own group, with its fields; nothing falls through to `internal`."""
    for value in vars(errors).values():
        if inspect.isclass(value) and issubclass(value, SupervisorError):
            assert any(issubclass(value, row.raised) for row in rpc.ERRORS if row.raised is not None)
    unavailable = error_for(StoreUnavailableError("disk full", retry_after_s=2.5))
    assert unavailable.data == {"kind": "store", "temporary": True, "retry_after_s": 2.5}
    assert "disk full" in unavailable.message
    admission = error_for(AdmissionError(live=5, limit=5, retry_after_s=2.5))
    assert (admission.code, admission.data["kind"], admission.data["temporary"]) == (
        -32003,
        "admission",
        True,
    )
    assert admission.data["retry_after_s"] == 2.5
    gap = error_for(GapError(stream_id="s", epoch=2, after_epoch=1, after_seq=3, earliest_seq=9, tail_seq=12))
    assert {name: gap.data[name] for name in ("id", "epoch", "earliest", "tail")} == {
        "id": "s",
        "epoch": 2,
        "earliest": 9,
        "tail": 12,
    }
    assert error_for(UnknownStreamError(key="k")).data["key"] == "k"
    assert error_for(ConfigurationError("upstream", "x", "y")).data["field"] == "upstream"


def test_an_unexpected_error_tells_nothing() -> None:
    """What a bug says is for the log: the client hears `internal` and none of the words."""
    error = error_for(KeyError("secret"))
    assert error.code == -32603
    assert "secret" not in error.message


def test_codes_do_not_clash_and_every_method_has_a_handler() -> None:
    """One code means one kind, but for the two ways of a bad parameter; each method in the table can be called."""
    codes = [row.code for row in rpc.ERRORS if row.kind != "configuration"]
    assert len(codes) == len(set(codes))
    assert set(messages.METHODS) == set(Session.HANDLERS)
    assert all(4000 <= code <= 4999 for code in messages.CLOSE_CODES)
