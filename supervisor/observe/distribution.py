"""How many values were how large, in a bounded space.

Values are counted in buckets whose bounds grow by a tenth, so that a percentile is right to within 5 % whatever the values are:
nothing has to be known of them in advance, and of millions of values no more is kept than of a few hundred. Two of them can be
added up, which is what makes an hour of sixty minutes. (The same idea: DDSketch, Masson, Rim and Lee 2019.)
"""

from __future__ import annotations

import math

import msgspec

__all__ = ["Distribution", "Percentiles"]

_GROWTH = 1.1
_LOG = math.log(_GROWTH)
_LEAST = math.ceil(math.log(1e-6) / _LOG) - 1  # of all values below a millionth
_MOST = math.ceil(math.log(1e13) / _LOG)


class Percentiles(msgspec.Struct, frozen=True, kw_only=True):
    """How large values were, to within 5 %. Null: there was none."""

    count: int
    p50: float | None
    p90: float | None
    p95: float | None
    p99: float | None
    max: float | None
    """Exact."""


class Distribution:
    """Values, of which only their sizes are kept: at most 460 buckets."""

    __slots__ = ("_buckets", "_whole", "count", "least", "most")

    def __init__(self) -> None:
        self._buckets: dict[int, int] = {}
        self._whole = True  # whether all values are whole numbers: then percentiles are too
        self.count = 0
        self.least = math.inf
        self.most = -math.inf

    def __repr__(self) -> str:
        return f"<Distribution of {self.count} values in {len(self._buckets)} buckets>"

    def add(self, value: float) -> None:
        """Count a value; one below 0 counts as 0."""
        value = max(value, 0)
        bucket = _bucket(value)
        self._buckets[bucket] = self._buckets.get(bucket, 0) + 1
        self._whole = self._whole and isinstance(value, int)
        self.count += 1
        self.least = min(self.least, value)
        self.most = max(self.most, value)

    def update(self, other: Distribution) -> None:
        """Count all that another one has counted."""
        for bucket, count in other._buckets.items():
            self._buckets[bucket] = self._buckets.get(bucket, 0) + count
        self._whole = self._whole and other._whole
        self.count += other.count
        self.least = min(self.least, other.least)
        self.most = max(self.most, other.most)

    def at_least(self, value: float) -> int:
        """Return how many values were this large, to within what one bucket holds."""
        least = _bucket(value)
        return sum(count for bucket, count in self._buckets.items() if bucket >= least)

    def quantile(self, share: float) -> float | None:
        """Return the value that a share of the values does not exceed; None if there is none."""
        return self._quantiles(share)[0]

    def percentiles(self) -> Percentiles:
        """Return what is usually told."""
        p50, p90, p95, p99 = self._quantiles(0.5, 0.9, 0.95, 0.99)
        most = self._rounded(self.most) if self.count else None
        return Percentiles(count=self.count, p50=p50, p90=p90, p95=p95, p99=p99, max=most)

    def _quantiles(self, *shares: float) -> list[float | None]:
        """Return the quantiles, of shares in ascending order."""
        if not self.count:
            return [None for _ in shares]
        found: list[float | None] = []
        wanted = iter(shares)
        rank = max(1, math.ceil(next(wanted) * self.count))
        below = 0
        for bucket in sorted(self._buckets):
            below += self._buckets[bucket]
            while below >= rank:
                # The middle of a bucket is as wrong at one bound as at the other.
                told = self.least if bucket == _LEAST else _GROWTH**bucket * 2 / (1 + _GROWTH)
                if rank == self.count:
                    told = self.most
                found.append(self._rounded(min(max(told, self.least), self.most)))
                share = next(wanted, None)
                if share is None:
                    return found
                rank = max(1, math.ceil(share * self.count))
        raise AssertionError("the last bucket reaches every rank")

    def _rounded(self, value: float) -> float:
        """Round to four digits, and whole numbers to one: more would be made up."""
        if self._whole:
            return round(value)
        return value if not value else round(value, 3 - math.floor(math.log10(value)))


def _bucket(value: float) -> int:
    return _LEAST if value <= 0 else min(max(math.ceil(math.log(value) / _LOG), _LEAST), _MOST)
