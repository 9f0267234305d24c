"""Which streams are meant: those that match every filter given, or exactly the one that was named."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

import attrs

from supervisor.errors import ConfigurationError
from supervisor.streams.lifecycle import State

if TYPE_CHECKING:
    from supervisor.streams.stream import Stream

__all__ = ["Selection", "check_exactly_one"]


def _states(states: Iterable[str] | None) -> frozenset[State] | None:
    return None if states is None else frozenset(State(state) for state in states)


@attrs.frozen(kw_only=True)
class Selection:
    """Filters of streams; None means any. Raises ValueError for a state that is none."""

    states: frozenset[State] | None = attrs.field(default=None, converter=_states)
    labels: Mapping[str, str] | None = None
    """Which a stream has to have, whatever others it has."""
    key: str | None = None
    upstream: str | None = None
    tenant: str | None = None

    def matches(self, stream: Stream) -> bool:
        """Whether a stream matches every filter."""
        return (
            (self.states is None or stream.state in self.states)
            and (self.key is None or stream.key == self.key)
            and (self.upstream is None or stream.upstream == self.upstream)
            and (self.tenant is None or stream.tenant == self.tenant)
            and (
                self.labels is None
                or all(stream.labels.get(name) == text for name, text in self.labels.items())
            )
        )


def check_exactly_one(**selectors: object) -> None:
    """Raise ConfigurationError unless exactly one of the selectors is not None."""
    given = {name: value for name, value in selectors.items() if value is not None}
    if len(given) != 1:
        raise ConfigurationError("selector", given, f"exactly one of {', '.join(selectors)}")
