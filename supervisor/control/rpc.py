"""JSON-RPC 2.0 (https://www.jsonrpc.org/specification) as the control channel speaks it: envelopes, parameters, errors.

An envelope keeps `id` and `params` as the raw JSON received: the id is echoed byte for byte, and the parameters are decoded
once, straight into the method's own type. Exceptions become wire errors in one table, `ERRORS`, and nowhere else.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import attrs
import msgspec

from supervisor.control.mistakes import find_mistake
from supervisor.errors import (
    AdmissionError,
    AuthenticationError,
    ConfigurationError,
    GapError,
    KeyConflictError,
    StoreError,
    StreamSealedError,
    SupervisorClosedError,
    SupervisorError,
    UnknownStreamError,
    UpstreamError,
)

__all__ = [
    "ERRORS",
    "Call",
    "ErrorKind",
    "ErrorMessage",
    "RpcError",
    "error_for",
    "error_reply",
    "parse",
    "read_params",
    "result_reply",
]

# --- errors -----------------------------------------------------------------------------------------------------------

ErrorKind = str
"""The `kind` in an error's data; the table `ERRORS` has them all."""

PARSE_ERROR = -32700
INVALID_REQUEST = -32600
METHOD_NOT_FOUND = -32601
INVALID_PARAMS = -32602
INTERNAL_ERROR = -32603


@attrs.frozen
class ErrorRow:
    """One row of the error table."""

    kind: ErrorKind
    code: int
    temporary: bool
    meaning: str
    raised: type[Exception] | None = None
    fields: tuple[tuple[str, str], ...] = ()
    """What goes into `data` beside the kind: (name on the wire, attribute of the exception)."""


ERRORS: Sequence[ErrorRow] = (
    ErrorRow("parse_error", PARSE_ERROR, False, "The message is not JSON, or is nested too deeply."),
    ErrorRow("invalid_request", INVALID_REQUEST, False, "JSON, but not a JSON-RPC 2.0 request."),
    ErrorRow("method_not_found", METHOD_NOT_FOUND, False, "There is no such method."),
    ErrorRow(
        "invalid_params", INVALID_PARAMS, False, "A parameter is missing, unknown or wrong; `field` names it."
    ),
    ErrorRow(
        "internal", INTERNAL_ERROR, False, "The server failed in a way it did not expect; its log says more."
    ),
    ErrorRow(
        "configuration",
        INVALID_PARAMS,
        False,
        "A parameter is well formed but cannot be used, such as an upstream that is not configured.",
        ConfigurationError,
        (("field", "field"), ("expected", "expected")),
    ),
    ErrorRow(
        "unknown_stream",
        -32001,
        False,
        "No stream has this id or key.",
        UnknownStreamError,
        (("id", "stream_id"), ("key", "key")),
    ),
    ErrorRow(
        "key_conflict",
        -32002,
        False,
        "The key is claimed by another stream.",
        KeyConflictError,
        (("key", "key"), ("id", "stream_id"), ("state", "state")),
    ),
    ErrorRow(
        "admission",
        -32003,
        True,
        "The limit of live streams is reached; nothing was started.",
        AdmissionError,
        (("live", "live"), ("limit", "limit")),
    ),
    ErrorRow(
        "gap",
        -32004,
        False,
        "The history after the cursor is gone; take a snapshot, or subscribe from `earliest`.",
        GapError,
        (
            ("id", "stream_id"),
            ("epoch", "epoch"),
            ("after_epoch", "after_epoch"),
            ("after_seq", "after_seq"),
            ("earliest", "earliest_seq"),
            ("tail", "tail_seq"),
        ),
    ),
    ErrorRow(
        "closed",
        -32005,
        True,
        "The supervisor is draining or shutting down and starts nothing.",
        SupervisorClosedError,
        (("state", "state"),),
    ),
    ErrorRow("store", -32006, True, "The store failed; the message says what was kept.", StoreError),
    ErrorRow("sealed", -32007, False, "The stream has ended.", StreamSealedError, (("id", "stream_id"),)),
    ErrorRow("upstream", -32008, True, "The provider, or the way to it, failed.", UpstreamError),
    ErrorRow(
        "too_many_requests",
        -32009,
        True,
        "Too many requests of this connection are unanswered, or a batch asks for more than one message should carry.",
    ),
    ErrorRow("too_many_subscriptions", -32010, False, "This connection has as many subscriptions as it may."),
    ErrorRow("unknown_subscription", -32011, False, "This connection has no such subscription."),
    ErrorRow("request_cancelled", -32012, False, "The request was withdrawn with `request.cancel`."),
    ErrorRow(
        "unsupported", -32013, False, "This server is embedded in a program that does not offer the method."
    ),
    ErrorRow(
        "unauthenticated", -32014, False, "The token or the Origin is not accepted.", AuthenticationError
    ),
    ErrorRow("supervisor", -32000, False, "Any other error of the supervisor.", SupervisorError),
)

_BY_KIND = {row.kind: row for row in ERRORS}
_BY_TYPE: Sequence[tuple[type[Exception], ErrorRow]] = tuple(
    (row.raised, row) for row in ERRORS if row.raised is not None
)


MAX_ERROR_CHARS = 4096
"""The longest error message; one that quotes what was sent is cut."""
MAX_FIELD_CHARS = 256
"""The longest field name that an error repeats."""


def _clipped(text: str, limit: int) -> str:
    return text if len(text) <= limit else f"{text[: limit - 1]}…"


class ErrorMessage(msgspec.Struct, frozen=True):
    """The error object of a JSON-RPC reply."""

    code: int
    message: str
    data: dict[str, Any]
    """`kind`, `temporary`, `retry_after_s` (null if not known) and the fields of the kind."""


class RpcError(Exception):
    """A request that is answered with an error."""

    def __init__(self, kind: ErrorKind, message: str, **fields: Any) -> None:
        message = _clipped(message, MAX_ERROR_CHARS)
        super().__init__(message)
        row = _BY_KIND[kind]
        self.error = ErrorMessage(
            row.code,
            message,
            {
                "kind": kind,
                "temporary": row.temporary,
                "retry_after_s": fields.pop("retry_after_s", None),
                **fields,
            },
        )


def error_for(error: Exception) -> ErrorMessage:
    """Return the error object for an exception: the one place where exceptions become wire errors."""
    if isinstance(error, RpcError):
        return error.error
    for raised, row in _BY_TYPE:
        if isinstance(error, raised):
            fields = {name: getattr(error, attribute) for name, attribute in row.fields}
            retry_after_s = getattr(error, "retry_after_s", None)
            return RpcError(row.kind, str(error), retry_after_s=retry_after_s, **fields).error
    return RpcError("internal", "the server failed in a way it did not expect; its log says more").error


# --- envelopes --------------------------------------------------------------------------------------------------------

_NULL = msgspec.Raw(b"null")
_EMPTY = msgspec.Raw(b"{}")
MAX_ID_BYTES = 256
"""The longest request id, in bytes of JSON."""


class _Envelope(msgspec.Struct, rename=None):
    jsonrpc: Any = None
    method: Any = None
    id: msgspec.Raw | msgspec.UnsetType = msgspec.UNSET
    params: msgspec.Raw | msgspec.UnsetType = msgspec.UNSET


@attrs.frozen
class Call:
    """One request or notification of a message, or what is wrong with it (`error`)."""

    method: str
    params: msgspec.Raw
    id: msgspec.Raw | None
    """The raw id to answer to; None for a notification."""
    error: ErrorMessage | None = None


_raw_list = msgspec.json.Decoder(list[msgspec.Raw])
_envelope = msgspec.json.Decoder(_Envelope)
_encode = msgspec.json.Encoder().encode


def parse(text: str | bytes, *, max_batch: int) -> tuple[list[Call], bool]:
    """Read one message: the calls in it, and whether it was a batch.

    Raises RpcError (`parse_error`, `invalid_request`) when the message as a whole cannot be answered call by call.
    """
    try:
        data = text.encode() if isinstance(text, str) else text
        if data.lstrip(b" \t\r\n")[:1] != b"[":
            return [_call(data)], False
        items = _raw_list.decode(data)
    except (msgspec.DecodeError, UnicodeError) as error:
        raise RpcError("parse_error", f"not JSON: {error}") from None
    except RecursionError:
        raise RpcError("parse_error", "nested too deeply") from None
    if not items:
        raise RpcError("invalid_request", "an empty batch")
    if len(items) > max_batch:
        raise RpcError(
            "invalid_request", f"a batch of {len(items)} calls; the limit is {max_batch}", limit=max_batch
        )
    return [_call(bytes(item)) for item in items], True


def _call(data: bytes) -> Call:
    """Read one call. Raises DecodeError when it is not JSON; what else is wrong is said in the call."""
    try:
        envelope = _envelope.decode(data)
    except msgspec.ValidationError:
        return _bad("a call is a JSON object", _NULL)
    call_id: msgspec.Raw | None
    if envelope.id is msgspec.UNSET:
        call_id = None
    else:
        call_id = (
            envelope.id.copy()
        )  # else it would keep the whole message for as long as it waits for its answer
        raw = bytes(call_id)
        if raw[:1] not in b'"-0123456789n' or len(raw) > MAX_ID_BYTES:
            return _bad(f"an id is a string, a number or null, of at most {MAX_ID_BYTES} bytes", _NULL)
    answer_to = _NULL if call_id is None else call_id
    if envelope.jsonrpc != "2.0":
        return _bad('"jsonrpc" must be "2.0"', answer_to)
    if not isinstance(envelope.method, str):
        return _bad('"method" must be a string', answer_to)
    params = _EMPTY if envelope.params is msgspec.UNSET else envelope.params
    if bytes(params)[:1] not in {b"{", b"["}:
        return _bad('"params" must be an object or an array', answer_to)
    return Call(envelope.method, params, call_id)


def _bad(message: str, answer_to: msgspec.Raw) -> Call:
    return Call("", _EMPTY, answer_to, RpcError("invalid_request", message).error)


_T = TypeVar("_T", bound=msgspec.Struct)


def read_params(params: msgspec.Raw, kind: type[_T], *, one_by_one: Mapping[str, str] | None = None) -> _T:
    """Decode a call's parameters. Raises RpcError (`invalid_params`) naming the field and what is right.

    one_by_one: the lists that were given an item at a time, each with the name that the item has.
    """
    if bytes(params)[:1] == b"[":
        names = ", ".join(field.encode_name for field in msgspec.structs.fields(kind))
        raise RpcError("invalid_params", f"parameters are given by name: {names or 'none'}", field=None)
    try:
        decoded: _T = _decoder(kind).decode(params)
    except msgspec.ValidationError as error:
        mistake = find_mistake(error, _read(params), kind)
        given_as = (one_by_one or {}).get(mistake.field.partition("[")[0])
        field = _clipped(given_as or mistake.field, MAX_FIELD_CHARS)
        told = f"{field}: {mistake.told}" if field else mistake.told
        raise RpcError("invalid_params", told, field=field or None) from None
    except (msgspec.DecodeError, UnicodeError) as error:
        raise RpcError("parse_error", f"not JSON: {error}") from None
    except RecursionError:
        raise RpcError("invalid_params", "nested too deeply", field=None) from None
    return decoded


def _read(params: msgspec.Raw) -> object:
    """Return parameters as they were given; None if what follows the mistake is no better."""
    try:
        return msgspec.json.decode(params)
    except (msgspec.DecodeError, UnicodeError, RecursionError):
        return None


_decoders: dict[type[Any], msgspec.json.Decoder[Any]] = {}


def _decoder(kind: type[Any]) -> msgspec.json.Decoder[Any]:
    decoder = _decoders.get(kind)
    if decoder is None:
        decoder = _decoders[kind] = msgspec.json.Decoder(kind)
    return decoder


def result_reply(call_id: msgspec.Raw, result: object) -> bytes:
    """Encode the reply to a call that succeeded."""
    return b'{"jsonrpc":"2.0","id":%b,"result":%b}' % (bytes(call_id), _encode(result))


def error_reply(call_id: msgspec.Raw | None, error: ErrorMessage) -> bytes:
    """Encode the reply to a call that failed; `call_id` None where the id could not be read."""
    return b'{"jsonrpc":"2.0","id":%b,"error":%b}' % (
        b"null" if call_id is None else bytes(call_id),
        _encode(error),
    )
