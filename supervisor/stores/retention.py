"""What is kept of ended streams, and which of them go.

Three limits, each of which may be off: how long ago a stream ended, how many there are, and the bytes that they take in the
store. Each counts from the outcome: a live stream is never looked at, however long it has lived. They hold for all streams
together, and again for each tenant by itself, so that one that keeps much costs the others nothing: tenants are brought
under their own limits first, and what is left is brought under those of all. What ended first goes first.

Which streams go is decided here, once, for every kind of store and for a dry run alike (`select`): a store gives the sums
of its tenants and walks its ended streams from the oldest, as far as they go and one further. A sweep that finds nothing
to do has looked at the sums and at no stream.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import attrs
import trio

from supervisor.errors import ConfigurationError, StoreError

if TYPE_CHECKING:
    from supervisor.stores.base import Store

__all__ = ["EndedStream", "Keep", "PruneReport", "Removed", "Retention", "Totals", "retain", "select"]

_log = logging.getLogger("supervisor.stores")


def _not_negative(instance: object, attribute: attrs.Attribute[Any], value: object) -> None:
    number = isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < float("inf")
    if value is not None and not number:
        name = f"{type(instance).__name__}.{attribute.name}"
        raise ConfigurationError(name, value, "a number, 0 or more, or None for no limit")


def _tenants(_instance: object, attribute: attrs.Attribute[Any], value: object) -> None:
    good = isinstance(value, Mapping) and all(
        isinstance(name, str) and isinstance(keep, Keep) for name, keep in value.items()
    )
    if not good:
        raise ConfigurationError(attribute.name, value, "a mapping of tenants' names to Keep(…)")


@attrs.frozen(kw_only=True)
class Keep:
    """How much is kept of ended streams; None is no limit."""

    max_ended: int | None = attrs.field(default=None, validator=_not_negative)
    """The last so many to end are kept."""
    max_age_s: float | None = attrs.field(default=None, validator=_not_negative)
    """Those that ended longer ago are removed."""
    max_bytes: int | None = attrs.field(default=None, validator=_not_negative)
    """Together they take at most this in the store; those that ended first make room."""

    @property
    def given(self) -> bool:
        """Whether any of these limits is on."""
        return any(limit is not None for limit in (self.max_ended, self.max_age_s, self.max_bytes))


@attrs.frozen(kw_only=True)
class Retention(Keep):
    """How much is kept of the ended streams of all tenants together, and of each. `Retention()` keeps everything."""

    tenant: Keep = attrs.field(factory=Keep, validator=attrs.validators.instance_of(Keep))
    """Of each tenant that is not named in `tenants`. Streams without a tenant count for all together only."""
    tenants: Mapping[str, Keep] = attrs.field(factory=dict, validator=_tenants)
    """Of tenants by name, in place of `tenant`."""

    @property
    def limited(self) -> bool:
        """Whether anything can go by it."""
        return self.given or self.tenant.given or any(keep.given for keep in self.tenants.values())

    def of(self, tenant: str) -> tuple[Keep, str]:
        """Return what is kept of a tenant, and what these rules are called: as in a configuration file."""
        named = self.tenants.get(tenant)
        return (self.tenant, "tenant.") if named is None else (named, f"tenants.{tenant}.")


@attrs.frozen
class Totals:
    """The ended streams of one tenant (None: those without one)."""

    tenant: str | None
    streams: int
    nbytes: int
    oldest_at: float
    """When the first of them ended."""


@attrs.frozen
class EndedStream:
    """One ended stream, as far as retention looks at it."""

    ref: int | str
    """What the store finds it by."""
    ended_at: float
    nbytes: int
    """What it takes in the store."""


@attrs.frozen
class Removed:
    """How much went, or would go, by one rule."""

    streams: int
    nbytes: int


@attrs.frozen(kw_only=True)
class PruneReport:
    """What a prune removed, or, of a dry run, would remove."""

    rules: Mapping[str, Removed]
    """By the rule that was met first, called as in a configuration file: `max_age_s`, `tenant.max_bytes`, `tenants.NAME.max_ended`."""
    complete: bool
    """Whether nothing is left to be removed; if not, the call's `limit` was reached."""

    @property
    def streams(self) -> int:
        """How many streams."""
        return sum(removed.streams for removed in self.rules.values())

    @property
    def nbytes(self) -> int:
        """How many bytes they took in the store."""
        return sum(removed.nbytes for removed in self.rules.values())

    @classmethod
    def of(cls, chosen: Iterable[tuple[EndedStream, str]], *, complete: bool) -> PruneReport:
        """Return the sums of what `select` chose."""
        rules: dict[str, Removed] = {}
        for ended, rule in chosen:
            before = rules.get(rule, Removed(0, 0))
            rules[rule] = Removed(before.streams + 1, before.nbytes + ended.nbytes)
        return cls(rules=dict(sorted(rules.items())), complete=complete)


@attrs.define
class _Excess:
    """What is over the limits of one `Keep`, as the oldest are taken away one by one."""

    keep: Keep
    now: float
    streams: int
    nbytes: int

    def rule(self, oldest_at: float) -> str | None:
        """Return the rule by which the oldest that is left is to go; None if it may stay, and so all after it."""
        keep = self.keep
        if keep.max_age_s is not None and oldest_at < self.now - keep.max_age_s:
            return "max_age_s"
        if keep.max_ended is not None and self.streams > keep.max_ended:
            return "max_ended"
        if keep.max_bytes is not None and self.nbytes > keep.max_bytes:
            return "max_bytes"
        return None

    def without(self, nbytes: int) -> None:
        self.streams -= 1
        self.nbytes -= nbytes


def select(
    retention: Retention,
    *,
    now: float,
    totals: Iterable[Totals],
    oldest: Callable[[str | None], Iterator[EndedStream]],
    limit: int,
) -> tuple[list[tuple[EndedStream, str]], bool]:
    """Return up to `limit` streams that are to go, each with the rule, in order; and whether those are all.

    `oldest(tenant)` walks the ended streams of a tenant, `oldest(None)` all there are, by `(ended_at, id)`.
    """
    chosen: dict[int | str, tuple[EndedStream, str]] = {}
    whole = _Excess(retention, now, 0, 0)
    for group in totals:
        whole.streams += group.streams
        whole.nbytes += group.nbytes
        if group.tenant is None:
            continue
        keep, prefix = retention.of(group.tenant)
        excess = _Excess(keep, now, group.streams, group.nbytes)
        if excess.streams < 1 or excess.rule(group.oldest_at) is None:
            continue
        for ended in oldest(group.tenant):
            rule = excess.rule(ended.ended_at)
            if rule is None:
                break
            if len(chosen) >= limit:
                return list(chosen.values()), False
            chosen[ended.ref] = ended, prefix + rule
            excess.without(ended.nbytes)
    for ended, _ in chosen.values():
        whole.without(ended.nbytes)
    if whole.streams < 1:
        return list(chosen.values()), True
    for ended in oldest(None):
        if ended.ref in chosen:
            continue
        rule = whole.rule(ended.ended_at)
        if rule is None:
            break
        if len(chosen) >= limit:
            return list(chosen.values()), False
        chosen[ended.ref] = ended, rule
        whole.without(ended.nbytes)
    return list(chosen.values()), True


async def retain(store: Store, retention: Retention, *, every_s: float = 60.0) -> None:
    """Prune a running store again and again, until cancelled: at once, and then `every_s` after each sweep.

    A sweep that fails is logged, and the next one tries again.
    """
    while True:
        complete = True
        try:
            report = await store.prune(retention)
        except StoreError as error:
            _log.error("retention: %s", error)
        else:
            complete = report.complete
            if report.streams:
                rules = ", ".join(f"{rule} {removed.streams}" for rule, removed in report.rules.items())
                _log.info(
                    "retention: removed %d ended streams of %d bytes (%s)",
                    report.streams,
                    report.nbytes,
                    rules,
                )
        if complete:
            await trio.sleep(every_s)
