"""What a dialect is: how a provider's stream is read, how it ends, and how it is asked. All of it data and pure functions.

A dialect is one object of this class. The built-in ones are made in the file of their provider; a program makes its own the
same way and passes it to `Upstream` and `open_supervisor` (see docs/dialects.md, and `supervisor.testing.check_dialect`,
which holds it to what a dialect promises).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, Literal, get_args

import attrs

from supervisor.dialects.base import Fault, Reader, Snapshot, Usage
from supervisor.dialects.faults import http_fault
from supervisor.errors import ConfigurationError

__all__ = ["Asking", "Call", "Dialect", "Endings", "Framing", "Progress", "chat_prompt", "named_model"]

Framing = Literal["sse", "ndjson", "json-array", "none"]
"""How events are cut out of the body. `none`: events do not come from a body (an embedding program's source)."""

_NONE: Mapping[str, str] = MappingProxyType({})


def _check_name(_: object, attribute: attrs.Attribute[str], value: object) -> None:
    if not (isinstance(value, str) and value and value == value.strip()):
        raise ConfigurationError(
            f"dialect.{attribute.name}", value, "a name, without white space around it, such as 'openai-chat'"
        )


def _check_framing(instance: Dialect, attribute: attrs.Attribute[Framing], value: object) -> None:
    if value not in get_args(Framing):
        raise ConfigurationError(
            f"dialect {instance.name}: {attribute.name}", value, f"one of {', '.join(get_args(Framing))}"
        )


def _check_callable(instance: Dialect, attribute: attrs.Attribute[Any], value: object) -> None:
    if not callable(value):
        raise ConfigurationError(f"dialect {instance.name}: {attribute.name}", value, "a callable")


@attrs.frozen(kw_only=True)
class Endings:
    """How a stream of this dialect ends: the rows of the table in docs/dialects.md, and what the reader goes by."""

    markers: tuple[str, ...] = ()
    """What ends the answer unconditionally: a `[DONE]`, the name of an event, a field such as `done: true`."""
    well: str = ""
    """What ends it well, in a sentence."""
    incomplete: Mapping[str, str] = attrs.field(default=_NONE, hash=False)
    """Finish reasons, as the provider says them, of an answer that ended but is not whole, and what each means."""
    errors: tuple[str, ...] = ()
    """Where errors are told, besides an HTTP status: each makes the stream failed(`provider_error`)."""
    truncated: str = "the body ends, or the connection is lost, before any of these"
    """What is failed(`truncated`)."""
    clean_end: bool | Literal["whole"] = False
    """Whether the end of a body whose framing is complete, and which leaves no event open, is an ending: only for servers that
    send no marker at all. `whole`: of a body that is no event stream, where the answer was asked for as one JSON value. What a
    connection's loss cuts off is truncated all the same."""


@attrs.frozen(kw_only=True)
class Call:
    """One HTTP request, in a dialect's terms. The upstream adds its base URL, its headers and the credential."""

    path: str
    """What follows the base URL; it may have a query."""
    method: Literal["DELETE", "GET", "POST"] = "POST"
    body: Mapping[str, Any] | bytes | None = None
    """The JSON object to send; bytes: as they are."""
    headers: Mapping[str, str] = attrs.field(default=_NONE, hash=False)


@attrs.frozen(kw_only=True)
class Progress:
    """What a broken attempt left behind, for the request that goes on from there."""

    snapshot: Snapshot
    reader: Reader | None = None
    """The dialect's reader, which has read all events so far: it may know where they stopped."""
    last_event_id: str = ""
    """The event stream's last event id (WHATWG HTML, "Server-sent events"); empty if it has none."""
    path: str = ""
    """The upstream's path, as `Asking.first` was given it."""


def named_model(model: str | None) -> str:
    """Return the model. Raises ConfigurationError if none is named, for a request that cannot be without."""
    if not model:
        raise ConfigurationError(
            "model", model, "the name of a model: the provider has to be told which", told="it is missing"
        )
    return model


def chat_prompt(prompt: str, model: str | None) -> Mapping[str, Any]:
    """Return the request for an answer to one message of a user, as most chat APIs take it."""
    return {"model": named_model(model), "messages": [{"role": "user", "content": prompt}]}


@attrs.frozen(kw_only=True)
class Asking:
    """How an upstream of this dialect is asked. Pure functions of the request, a JSON object; none may change it."""

    path: str | None = None
    """What follows the base URL; None: every upstream of this dialect must say."""
    key_header: str = "bearer"
    """Where the credential goes: `bearer` (`Authorization: Bearer …`), or the name of a header that takes it as it is."""
    prompt: Callable[[str, str | None], Mapping[str, Any]] | None = chat_prompt
    """Make the request of a user's words and the name of a model, if one was given: the shortest that there is. None: words
    are not enough. Raises ConfigurationError for a model that is missing."""
    first: Callable[[Mapping[str, Any], str], Call] | None = None
    """Make the request that starts the answer, of the JSON object and the upstream's path. None: post the object with
    `"stream": true` to the path. Raises ConfigurationError for an object that cannot be a streaming request."""
    choices: Callable[[bytes], int] | None = None
    """Tell how many answers a request, as it is sent, asks for. None: as many as come. A lost connection is an ending only if
    so many have ended."""
    resume: Callable[[Mapping[str, Any], Progress], Call | None] | None = None
    """Rung *sequence*: ask for the rest of the same answer. None, or returning None: it cannot be had."""
    resume_ends: frozenset[int] = frozenset()
    """HTTP statuses that answer a resume with: there is nothing more (204 for event streams)."""
    continuation: Callable[[Mapping[str, Any], str], Mapping[str, Any] | str] | None = None
    """Rung *continuation*: the request that has the model go on after this text, or the reason why there is none."""
    cancel: Callable[[Mapping[str, Any], str], Call | None] | None = None
    """Make the request that stops the answer with this response id on the provider's side; None if it has no such thing."""
    retrieve: Callable[[Mapping[str, Any], str], Call | None] | None = None
    """Make the request whose JSON answer states the usage of a stopped answer."""
    usage: Callable[[bytes], Usage | None] | None = None
    """Read the usage out of that."""
    estimate: bool = True
    """Whether the output's tokens may be estimated from its text where the provider did not state a usage."""


@attrs.frozen(kw_only=True)
class Dialect:
    """How one provider's stream is read, ended and asked for. Stateless; shared by all streams that speak it.

    Raises ConfigurationError for a name or a framing that it cannot have.
    """

    name: str = attrs.field(validator=_check_name)
    """The name used in configuration, records and messages, such as `openai-chat`."""
    framing: Framing = attrs.field(validator=_check_framing)
    reader: Callable[[], Reader] = attrs.field(validator=_check_callable)
    """Return a new reader for one response body."""
    fault: Callable[[int, bytes], Fault] = attrs.field(default=http_fault, validator=_check_callable)
    """Read an HTTP error response (status, body), or a JSON body in place of a stream: the provider's message, never a guess."""
    endings: Endings = Endings()
    asking: Asking = Asking()
    abort_stops_billing: bool | None = None
    """Whether closing the connection stops generation and billing; None: the provider does not say."""
    stop: Literal["abort", "drain"] = "abort"
    """What a cancel does that does not say: `drain` where an abort saves nothing."""
    usage_rule: str = ""
    """When the provider states usage, and what counts, in a sentence."""
