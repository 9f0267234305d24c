"""Circuits: how hard an upstream that fails is asked again.

A dead provider is not revived by being asked. One stream bounds itself by its retry policy, but a thousand streams that break
together, each with three more attempts to make, are a thousand times as many; what bounds those is one circuit per upstream.

**Prior art.** Erlang's supervisors restart a child at most *MaxR* times in *MaxT* seconds and then give up
(https://www.erlang.org/doc/system/sup_princ.html, "Maximum Restart Intensity"). thejerf/suture counts failures with exponential
decay in place of a window, and once there are too many waits out a backoff instead of giving up
(https://pkg.go.dev/github.com/thejerf/suture/v4, "FailureDecay", "FailureThreshold", "FailureBackoff"). That is what is done here,
with one difference. Both count the failures of one thing that runs once; an upstream has any number of streams, and of a thousand
attempts a minute some fail at the best of times. So attempts that deliver are counted too, with the same decay, and a circuit
opens only when failures are both too many *and* more than those.

**What it does.**

| state | further attempts | until |
|---|---|---|
| `closed` | let through | the decayed failures are more than `max_failures` and more than the decayed successes |
| `open` | refused | `backoff_s` have passed |
| `half_open` | one is let through, as a trial; others are refused | an attempt delivers (`closed`, and failures are forgotten) or fails (`open` anew) |

What is refused is *further* attempts: a retry, a resume, a continuation, a restart. The first attempt of a new stream never is:
nobody asked us to refuse work, its caller is told of the failure, and where there is a fallback it goes there. Those first
attempts count like any other, so while there are new streams they are what probes the upstream: in `half_open` whichever
attempt is heard of first decides.

A trial that is never heard of again (its stream was cancelled: `abandoned`) would leave the circuit half open for good. So a
trial holds its place for `backoff_s`, and then another may be made.

No I/O and no clock: every method is given the time, in seconds of any clock that does not go back (`trio.current_time()`).
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Mapping
from typing import Any, Literal

import attrs

from supervisor.errors import ConfigurationError

__all__ = ["Circuit", "CircuitPolicy", "CircuitState", "CircuitStatistics", "Circuits"]

CircuitState = Literal["closed", "open", "half_open"]

MAX_CIRCUITS = 1024


def _number(instance: object, attribute: attrs.Attribute[Any], value: object) -> None:
    del instance
    good = isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < math.inf
    if not good:
        raise ConfigurationError(f"circuit.{attribute.name}", value, "a number above 0")


@attrs.frozen(kw_only=True)
class CircuitPolicy:
    """When an upstream that fails is left alone, and for how long.

    Raises ConfigurationError naming the field (`circuit.max_failures`, …) for a value it cannot have.
    """

    max_failures: float = attrs.field(default=5.0, validator=_number)
    """Failed attempts, weighted by age, above which further ones are refused if failures also outweigh attempts that delivered."""
    decay_s: float = attrs.field(default=30.0, validator=_number)
    """After this time an attempt counts half."""
    backoff_s: float = attrs.field(default=15.0, validator=_number)
    """How long further attempts are refused before one is let through as a trial."""


@attrs.frozen(kw_only=True)
class CircuitStatistics:
    """A circuit's figures at one moment."""

    state: CircuitState
    failures: float
    """Failed attempts, weighted by age."""
    successes: float
    """Attempts that delivered, weighted by age."""
    opened: int
    """How often it has opened, a failed trial included."""
    refused: int
    """Further attempts that were refused."""
    trial_in_s: float | None
    """How long until an attempt is let through as a trial; None while closed."""


class Circuit:
    """The circuit of one upstream."""

    __slots__ = ("_at", "_failures", "_on_trial", "_opened", "_policy", "_refused", "_successes", "_trial_at")

    def __init__(self, policy: CircuitPolicy | None = None) -> None:
        self._policy = CircuitPolicy() if policy is None else policy
        self._failures = 0.0
        self._successes = 0.0
        self._at = -math.inf  # when the two were last decayed
        self._trial_at: float | None = None  # from when on a trial, or another one, may be made; None: closed
        self._on_trial = False
        self._opened = 0
        self._refused = 0

    def __repr__(self) -> str:
        how = "closed" if self._trial_at is None else f"next trial at {self._trial_at:g}"
        return f"<Circuit {how}: {self._failures:.1f} failed, {self._successes:.1f} delivered>"

    def state(self, now: float) -> CircuitState:
        """Return the state at this moment."""
        if self._trial_at is None:
            return "closed"
        return "half_open" if self._on_trial or now >= self._trial_at else "open"

    def allows(self, now: float) -> bool:
        """Say whether a further attempt may be made now. True in `half_open` takes the trial: ask only to make the attempt.

        One for which this was true and which then neither delivered nor failed, as its stream was cancelled or the fault was not the
        upstream's, is `abandoned`.
        """
        if self._trial_at is None:
            return True
        if now < self._trial_at:
            self._refused += 1
            return False
        self._on_trial = True
        self._trial_at = now + self._policy.backoff_s  # should nothing more be heard of it
        return True

    def failed(self, now: float) -> None:
        """Count an attempt that failed in a way that is the upstream's, or the way's to it."""
        self._decay(now)
        self._failures += 1
        state = self.state(now)
        many = self._failures > self._policy.max_failures and self._failures > self._successes
        if state == "half_open" or (state == "closed" and many):
            self._on_trial = False
            self._trial_at = now + self._policy.backoff_s
            self._opened += 1

    def succeeded(self, now: float) -> None:
        """Count an attempt that delivered; in `half_open` as soon as it begins to. Should that one break off, it has also `failed`."""
        self._decay(now)
        self._successes += 1
        if self.state(now) == "half_open":
            self._on_trial = False
            self._trial_at = None
            self._failures = 0.0

    def abandoned(self, now: float) -> None:
        """Count nothing, and let another attempt make the trial if one is being made.

        Which attempt it was is not asked: for one that was no trial this lets one attempt through early.
        """
        if self._on_trial:
            self._on_trial = False
            self._trial_at = now

    def statistics(self, now: float) -> CircuitStatistics:
        """Return the circuit's figures."""
        self._decay(now)
        return CircuitStatistics(
            state=self.state(now),
            failures=round(self._failures, 3),
            successes=round(self._successes, 3),
            opened=self._opened,
            refused=self._refused,
            trial_in_s=None if self._trial_at is None else round(max(0.0, self._trial_at - now), 3),
        )

    def _decay(self, now: float) -> None:
        if now > self._at:
            kept = 0.5 ** ((now - self._at) / self._policy.decay_s)
            self._failures *= kept
            self._successes *= kept
            self._at = now


class Circuits:
    """The circuits of a daemon's, or a program's, upstreams, by name; made when first asked for.

    There are as many as upstreams are configured; where a program makes up names without end, the one that was not asked for
    longest goes at `max_circuits`.
    """

    def __init__(self, policy: CircuitPolicy | None = None, *, max_circuits: int = MAX_CIRCUITS) -> None:
        if max_circuits < 1:
            raise ConfigurationError("max_circuits", max_circuits, "a whole number, 1 or more")
        self.policy = CircuitPolicy() if policy is None else policy
        self._max_circuits = max_circuits
        self._circuits: OrderedDict[str, Circuit] = OrderedDict()

    def __repr__(self) -> str:
        return f"<Circuits of {', '.join(self._circuits) or 'no upstream yet'}>"

    def __len__(self) -> int:
        return len(self._circuits)

    def of(self, upstream: str) -> Circuit:
        """Return the circuit of the upstream with this name."""
        circuit = self._circuits.get(upstream)
        if circuit is None:
            while len(self._circuits) >= self._max_circuits:
                self._circuits.popitem(last=False)
            circuit = self._circuits[upstream] = Circuit(self.policy)
        self._circuits.move_to_end(upstream)
        return circuit

    def report(self, now: float) -> Mapping[str, Mapping[str, Any]]:
        """Return the figures of each circuit (`CircuitStatistics`) by upstream: what `open_supervisor(circuits=…)` takes."""
        return {
            name: attrs.asdict(circuit.statistics(now)) for name, circuit in sorted(self._circuits.items())
        }
