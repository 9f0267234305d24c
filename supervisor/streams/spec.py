"""What a stream is asked to be: options with their defaults, all validated where they are made.

Every option is keyword-only and has a documented default; a bad one raises `ConfigurationError` naming the field, the value
and what would be right. Times are seconds and end in `_s`, sizes are bytes and end in `_bytes`.
"""

from __future__ import annotations

import math
import secrets
import sys
import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Literal, Protocol, TypeGuard, get_args

import attrs
import msgspec

from supervisor.errors import ConfigurationError

if TYPE_CHECKING:
    from supervisor.streams.output import Output

__all__ = [
    "CircuitReport",
    "Deadlines",
    "Delivery",
    "IdFactory",
    "Limits",
    "MemoryGroup",
    "MemoryPolicy",
    "OnConflict",
    "OnDetach",
    "Source",
    "StopMode",
    "StreamSpec",
    "check_stop",
    "monotonic_ids",
]

OnConflict = Literal["attach", "reject", "replace"]
Delivery = Literal["immediate", "durable"]
DetachMode = Literal["keep", "cancel"]
CountAction = Literal["reject", "reap_oldest", "reap_least_watched"]
"""What a limit on the number of streams does to one more: refuse it, or end another for it."""
BytesAction = Literal["spill", "reject", "reap_oldest", "reap_least_watched"]
"""What a limit on bytes does: `spill` has streams give up what the store has of them, and reaps the oldest if that is not enough."""
StopMode = Literal["abort", "drain"]
"""How a cancel ends a stream: at once, or by letting the answer end by itself within a budget."""
IdFactory = Callable[[], str]
CircuitReport = Callable[[float], Mapping[str, Mapping[str, Any]]]
"""Given the time on trio's clock, tells the state of each upstream's circuit, by its name, in JSON values."""

MAX_KEY_CHARS = 256
MAX_LABELS = 32
MAX_LABEL_CHARS = 256
MAX_GROUPS = 16
MAX_META_BYTES = 64 << 10
ANY = "*"
"""In a `MemoryGroup`: any value, each by itself."""

_JSON_OBJECT = msgspec.json.Decoder(dict[str, Any])


class Source(Protocol):
    """The async callable that feeds a stream.

    It runs in the stream's own nursery and cancel scope. It may carry `dialect` (a `Dialect`), `upstream` (a name) and
    `bytes_held` (what it holds for the stream, such as a request: asked at the start, and counted until the stream has ended) as
    attributes. When the stream is sealed it sees `trio.Cancelled` at its next checkpoint and must let it pass.
    """

    async def __call__(self, out: Output, /) -> None:
        """Feed `out` until there is nothing more."""
        ...


# --- validators ------------------------------------------------------------------------------------------------------


def _named(instance: object, attribute: attrs.Attribute[Any]) -> str:
    return f"{type(instance).__name__}.{attribute.name}"


def _positive_or_none(instance: object, attribute: attrs.Attribute[Any], value: object) -> None:
    if value is not None and not (_is_number(value) and value > 0):
        raise ConfigurationError(_named(instance, attribute), value, "a number above 0, or None for no limit")


def _positive(instance: object, attribute: attrs.Attribute[Any], value: object) -> None:
    if not (_is_number(value) and value > 0):
        raise ConfigurationError(_named(instance, attribute), value, "a number above 0")


def _not_negative(instance: object, attribute: attrs.Attribute[Any], value: object) -> None:
    if not (_is_number(value) and value >= 0):
        raise ConfigurationError(_named(instance, attribute), value, "a number, 0 or more")


def _whole(instance: object, attribute: attrs.Attribute[Any], value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ConfigurationError(_named(instance, attribute), value, "a whole number, 1 or more")


def _fraction_or_none(instance: object, attribute: attrs.Attribute[Any], value: object) -> None:
    if value is not None and not (_is_number(value) and 0 < value <= 1):
        raise ConfigurationError(
            _named(instance, attribute), value, "above 0 and at most 1, or None to turn it off"
        )


def _whole_or_none(instance: object, attribute: attrs.Attribute[Any], value: object) -> None:
    if value is not None:
        _whole(instance, attribute, value)


def _one_of(*values: str) -> Callable[[object, attrs.Attribute[Any], object], None]:
    def check(instance: object, attribute: attrs.Attribute[Any], value: object) -> None:
        if value not in values:
            raise ConfigurationError(_named(instance, attribute), value, " or ".join(map(repr, values)))

    return check


def _is_number(value: object) -> TypeGuard[float]:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def check_stop(mode: object, drain_s: object, drain_tokens: object) -> None:
    """Raise ConfigurationError for options of a cancel that it cannot have."""
    if mode not in (None, *get_args(StopMode)):
        raise ConfigurationError("mode", mode, "'abort', 'drain', or None for what the dialect does")
    if not (_is_number(drain_s) and drain_s >= 0):
        raise ConfigurationError("drain_s", drain_s, "a number of seconds, 0 or more")
    whole = isinstance(drain_tokens, int) and not isinstance(drain_tokens, bool) and drain_tokens >= 0
    if not (drain_tokens is None or whole):
        raise ConfigurationError(
            "drain_tokens", drain_tokens, "a whole number, 0 or more, or None for no limit"
        )


# --- options ---------------------------------------------------------------------------------------------------------


@attrs.frozen(kw_only=True)
class Deadlines:
    """The four clocks, in seconds; None turns one off. A clock that runs out ends the stream as `expired`."""

    connect_s: float | None = attrs.field(default=10.0, validator=_positive_or_none)
    """From the start of an attempt until the request is sent. Each attempt has its own."""
    first_event_s: float | None = attrs.field(default=120.0, validator=_positive_or_none)
    """From there until the first event."""
    idle_s: float | None = attrs.field(default=60.0, validator=_positive_or_none)
    """Between two events. A keep-alive comment counts as one; bytes that complete nothing do not."""
    total_s: float | None = attrs.field(default=3600.0, validator=_positive_or_none)
    """From the start of the stream, attempts and waits between them included."""


@attrs.frozen(kw_only=True)
class OnDetach:
    """What happens when nobody reads a stream: `keep` it, or `cancel` it once it was without a reader for `grace_s`.

    The grace also runs from the start until the first reader attaches.
    """

    mode: DetachMode = attrs.field(default="keep", validator=_one_of(*get_args(DetachMode)))
    grace_s: float = attrs.field(default=30.0, validator=_not_negative)


@attrs.frozen(kw_only=True)
class Limits:
    """What bounds a supervisor and each of its streams."""

    max_live: int = attrs.field(default=10_000, validator=_whole)
    """Live streams. One more start is rejected with AdmissionError, or ends another stream: see `when_full`."""
    when_full: CountAction = attrs.field(default="reject", validator=_one_of(*get_args(CountAction)))
    retry_after_s: float = attrs.field(default=1.0, validator=_positive)
    """What a rejected start is told."""
    tail_events: int = attrs.field(default=1024, validator=_whole)
    """Newest events of a live stream kept in memory; older ones are read from the store."""
    tail_bytes: int = attrs.field(default=256 << 10, validator=_whole)
    fold_bytes: int = attrs.field(default=1 << 20, validator=_whole)
    """Of a live stream's answer kept in memory; once there is more, a snapshot is read back from the store."""
    max_tombstones: int = attrs.field(default=10_000, validator=_whole)
    """Cancels remembered for keys not seen yet; the oldest makes room."""
    tombstone_s: float = attrs.field(default=60.0, validator=_positive)
    max_finished: int = attrs.field(default=1000, validator=_whole)
    """Ended streams kept in memory (their keys stay claimed meanwhile); the store keeps its own."""
    max_finished_bytes: int = attrs.field(default=64 << 20, validator=_whole)
    """What the ended streams kept in memory may hold; the oldest go first."""
    finished_s: float | None = attrs.field(default=3600.0, validator=_positive_or_none)
    max_readers: int = attrs.field(default=1000, validator=_whole)
    """Subscriptions of one stream."""
    max_event_bytes: int = attrs.field(default=4 << 20, validator=_whole)
    """One event, as added by a source."""
    cleanup_s: float = attrs.field(default=5.0, validator=_positive)
    """How long a source may take to unwind after the seal before its stream is settled without it."""
    held_s: float = attrs.field(default=60.0, validator=_positive)
    """How long a source may be held back by a store that cannot keep up, or cannot write, before its stream is `expired(reaped_pressure)`."""
    settle_s: float = attrs.field(default=60.0, validator=_positive)
    """How long an outcome may take to become durable before `wait` raises StoreError."""


def _groups(_instance: object, attribute: attrs.Attribute[Any], value: object) -> None:
    if not isinstance(value, tuple) or not all(isinstance(group, MemoryGroup) for group in value):
        raise ConfigurationError(f"MemoryPolicy.{attribute.name}", value, "a tuple of MemoryGroup(…)")
    if len(value) > MAX_GROUPS:
        raise ConfigurationError(f"MemoryPolicy.{attribute.name}", len(value), f"at most {MAX_GROUPS} groups")


def _tenant(_instance: object, _attribute: attrs.Attribute[Any], value: object) -> None:
    if value is not None and not (isinstance(value, str) and 0 < len(value) <= MAX_KEY_CHARS):
        raise ConfigurationError("tenant", value, f"a string of 1 to {MAX_KEY_CHARS} characters, or None")


def _labels(_instance: object, _attribute: attrs.Attribute[Any], value: object) -> None:
    if not isinstance(value, Mapping):
        raise ConfigurationError("labels", value, "a mapping of strings to strings")
    good = len(value) <= MAX_LABELS and all(
        isinstance(name, str) and isinstance(text, str) and 0 < len(name) <= MAX_LABEL_CHARS >= len(text)
        for name, text in value.items()
    )
    if not good:
        raise ConfigurationError(
            "labels",
            dict(value),
            f"at most {MAX_LABELS} pairs of strings of at most {MAX_LABEL_CHARS} characters",
        )


def _own_labels(value: Mapping[str, str]) -> Mapping[str, str]:
    """Copy labels: what the caller does with theirs later is not the stream's."""
    given: object = value  # whatever it is said to be: the validator tells
    return dict(value) if isinstance(given, Mapping) else value


@attrs.frozen(kw_only=True)
class MemoryGroup:
    """Limits on the live streams of a tenant, or on those that have certain labels. `*` stands for each value by itself."""

    tenant: str | None = attrs.field(default=None, validator=_tenant)
    """Only streams of this tenant; `*`: those of each tenant by themselves."""
    labels: Mapping[str, str] = attrs.field(factory=dict, converter=_own_labels, validator=_labels)
    """Only streams that have all of these; with the value `*`, those of each value by themselves."""
    max_count: int | None = attrs.field(default=None, validator=_whole_or_none)
    """Live streams of the group."""
    at_max_count: CountAction = attrs.field(default="reject", validator=_one_of(*get_args(CountAction)))
    """What one more does: `reject` it, `reap_oldest`, or `reap_least_watched` (of the fewest readers; the oldest of those)."""
    max_bytes: int | None = attrs.field(default=None, validator=_whole_or_none)
    """Bytes that the group's live streams hold in memory."""
    at_max_bytes: BytesAction = attrs.field(default="spill", validator=_one_of(*get_args(BytesAction)))
    """What happens over it: as in `MemoryPolicy`."""

    def __attrs_post_init__(self) -> None:
        if self.tenant is None and not self.labels:
            raise ConfigurationError(
                "MemoryGroup.labels", dict(self.labels), "a tenant, or at least one label"
            )
        if self.max_count is None and self.max_bytes is None:
            raise ConfigurationError("MemoryGroup.max_count", None, "a limit: max_count, max_bytes or both")


@attrs.frozen(kw_only=True)
class MemoryPolicy:
    """What the memory manager does, and when; None turns a rule off. Only memory is limited by default.

    A reap is an ending like any other: `expired`, with a reason and a message that names the limit, its bound and the value.
    """

    max_age_s: float | None = attrs.field(default=None, validator=_positive_or_none)
    stale_s: float | None = attrs.field(default=None, validator=_positive_or_none)
    """Seconds without an event."""
    max_count: int | None = attrs.field(default=None, validator=_whole_or_none)
    """Live streams. A softer limit than `Limits.max_live`, which it may have beside it."""
    at_max_count: CountAction = attrs.field(default="reap_oldest", validator=_one_of(*get_args(CountAction)))
    """What one more does: `reject` it, `reap_oldest`, or `reap_least_watched` (of the fewest readers; the oldest of those)."""
    max_stream_bytes: int | None = attrs.field(default=64 << 20, validator=_whole_or_none)
    """Bytes one stream holds in memory. Over it, it spills; one that then still is over it is reaped."""
    max_bytes: int | None = attrs.field(default=1 << 30, validator=_whole_or_none)
    """Bytes held in all: by live streams, by ended ones kept in memory, by connections and what else is counted. Ended streams and
    idle connections are given up first; live streams are reaped only for what live streams hold."""
    at_max_bytes: BytesAction = attrs.field(default="spill", validator=_one_of(*get_args(BytesAction)))
    """What happens over it: `spill` (streams give up what the store has of them; then the oldest are reaped), `reject` (starts are, and what
    there is may grow up to its own limits), `reap_oldest`, or `reap_least_watched`."""
    process_high: float | None = attrs.field(default=0.9, validator=_fraction_or_none)
    """The process's resident memory, as a share of what it may have (the cgroup's limit, or else the machine's memory). From there until
    it is below `process_low` starts are rejected, and `at_process_high` is done. Linux only."""
    process_low: float = attrs.field(default=0.8, validator=_fraction_or_none)
    """Where that ends."""
    at_process_high: BytesAction = attrs.field(default="spill", validator=_one_of(*get_args(BytesAction)))
    """As `at_max_bytes`. Reaps are made once every `sweep_every_s`, of a tenth of the live streams at most."""
    process_limit_bytes: int | None = attrs.field(default=None, validator=_whole_or_none)
    """What the process may have, in place of what the system says."""
    sweep_every_s: float = attrs.field(default=1.0, validator=_positive)
    groups: tuple[MemoryGroup, ...] = attrs.field(default=(), validator=_groups)
    """`[[memory.groups]]`: limits per tenant or label."""

    def __attrs_post_init__(self) -> None:
        if self.process_high is not None and not self.process_low < self.process_high:
            raise ConfigurationError(
                "MemoryPolicy.process_low",
                self.process_low,
                f"below process_high, which is {self.process_high:g}",
            )


def _key(_instance: object, _attribute: attrs.Attribute[Any], value: object) -> None:
    if value is not None and not (isinstance(value, str) and 0 < len(value) <= MAX_KEY_CHARS):
        raise ConfigurationError("key", value, f"a string of 1 to {MAX_KEY_CHARS} characters, or None")


def _made_of(kind: type) -> Callable[[object, attrs.Attribute[Any], object], None]:
    def check(_instance: object, attribute: attrs.Attribute[Any], value: object) -> None:
        if not isinstance(value, kind):
            raise ConfigurationError(attribute.name, value, f"a {kind.__name__}(…)")

    return check


def _upstream(_instance: object, _attribute: attrs.Attribute[Any], value: object) -> None:
    if value is not None and not (isinstance(value, str) and 0 < len(value) <= MAX_KEY_CHARS):
        raise ConfigurationError("upstream", value, f"a name of 1 to {MAX_KEY_CHARS} characters, or None")


def _own_meta(value: object) -> Mapping[str, Any]:
    """Check meta and copy it, to the bottom: what the caller does with theirs later is not the stream's."""
    if not isinstance(value, Mapping) or not all(isinstance(name, str) for name in value):
        raise ConfigurationError("meta", value, "a mapping of strings to JSON values")
    try:
        told = msgspec.json.encode(value)
    except (TypeError, ValueError, RecursionError) as error:
        raise ConfigurationError("meta", value, "values that JSON can hold") from error
    if len(told) > MAX_META_BYTES:
        raise ConfigurationError("meta", "(it is too long)", f"at most {MAX_META_BYTES} bytes as JSON")
    return _JSON_OBJECT.decode(told)


@attrs.frozen(kw_only=True)
class StreamSpec:
    """What is known of a stream before it starts; kept with it, and written to the store as its head."""

    key: str | None = attrs.field(default=None, validator=_key)
    tenant: str | None = attrs.field(default=None, validator=_tenant)
    """On whose behalf it runs, for limits and figures."""
    upstream: str | None = attrs.field(default=None, validator=_upstream)
    dialect: str = attrs.field(default="native", validator=attrs.validators.instance_of(str))
    labels: Mapping[str, str] = attrs.field(factory=dict, converter=_own_labels, validator=_labels)
    deadlines: Deadlines = attrs.field(factory=Deadlines, validator=_made_of(Deadlines))
    on_detach: OnDetach = attrs.field(factory=OnDetach, validator=_made_of(OnDetach))
    delivery: Delivery = attrs.field(default="immediate", validator=_one_of(*get_args(Delivery)))
    meta: Mapping[str, Any] = attrs.field(factory=dict, converter=_own_meta)
    """Small facts for the record, such as the model asked for. JSON values, at most 64 KiB of them."""

    @property
    def bytes_held(self) -> int:
        """What the labels and meta take in memory."""
        return (_bytes_of(self.labels) if self.labels else 0) + (_bytes_of(self.meta) if self.meta else 0)


def _bytes_of(value: object) -> int:
    """Return what a JSON value takes in memory, with all that is in it."""
    held = sys.getsizeof(value)
    if isinstance(value, Mapping):
        held += sum(_bytes_of(name) + _bytes_of(of_it) for name, of_it in value.items())
    elif isinstance(value, list):
        held += sum(map(_bytes_of, value))
    return held


# --- ids -------------------------------------------------------------------------------------------------------------

_ID_CHARS = 26
_BASE32 = "0123456789abcdefghjkmnpqrstvwxyz"  # Crockford's alphabet, lower case: sorts as the number does


def monotonic_ids(clock: Callable[[], float] = time.time, *, after: str | None = None) -> IdFactory:
    """Return a maker of ids that sort by the time they were made: 26 characters, a ULID in lower case.

    Within one millisecond, and when the clock goes back, the random part counts up instead
    (https://github.com/ulid/spec, "Monotonicity"). With `after` all sort after that id, if it is one of these.
    """
    last = 0
    if after is not None and len(after) == _ID_CHARS and all(char in _BASE32 for char in after):
        last = sum(_BASE32.index(char) << (5 * place) for place, char in enumerate(reversed(after)))

    def new_id() -> str:
        nonlocal last
        fresh = (int(clock() * 1000) << 80) | secrets.randbits(79)
        last = fresh if fresh > last else last + 1
        return "".join(_BASE32[(last >> shift) & 31] for shift in range(125, -5, -5))

    return new_id
