"""Which answer a request gets: the rules by which a script is chosen, and what the provider keeps between requests.

Requests come in, steps go out; what is between is synchronous. The only state is what makes one request's answer depend on
another's: how often a script has struck (`times`), and the responses that are made in the background.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Callable, Iterator
from typing import Any, Final

import attrs
import msgspec

from supervisor.errors import ConfigurationError
from supervisor.testing.upstream.answers import EVENTS, OPENAI_CHAT, OPENAI_RESPONSES, Shape
from supervisor.testing.upstream.asked import Asked, begin, read
from supervisor.testing.upstream.plan import Step, plan, total_events
from supervisor.testing.upstream.records import UpstreamExchange, UpstreamRequest
from supervisor.testing.upstream.script import Script, script_for_model
from supervisor.testing.upstream.stored import StoredResponse

__all__ = ["Responder"]

_MODELS: Final = {"object": "list", "data": [{"id": "sim/ok", "object": "model", "owned_by": "sim"}]}


@attrs.define(eq=False, kw_only=True)
class Responder:
    """Chooses scripts and plans answers. `limit` bounds each of its tables; the oldest entries are forgotten first."""

    limit: int
    queue: deque[Script] = attrs.field(factory=deque)
    stored: OrderedDict[str, StoredResponse] = attrs.field(factory=OrderedDict)
    _struck: OrderedDict[Script, int] = attrs.field(factory=OrderedDict)

    def answer(
        self,
        request: UpstreamRequest,
        exchange: UpstreamExchange,
        *,
        respond: Callable[[UpstreamRequest], Script | None] | None,
        default: Script,
        report: Callable[[], Any],
    ) -> Iterator[Step]:
        """Return the steps of the answer, and note in the exchange what it is."""
        path = request.target.partition("?")[0]
        if request.method == "GET" and path.endswith("/models"):
            return self._json(exchange, _MODELS)
        if request.method == "GET" and path == "/sim/report":
            return self._json(exchange, report())
        asked = None
        try:
            asked = read(request)
            if asked is None:
                return self._refusal(exchange, OPENAI_CHAT, 404, f"no such route: {request.method} {path}")
            exchange.dialect = asked.shape.name
            if asked.stored is not None:
                return self._stored(request, exchange, asked)
            script = self._script(request, asked, respond, default)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError, ConfigurationError) as exc:
            return self._refusal(exchange, OPENAI_CHAT if asked is None else asked.shape, 400, str(exc))
        return self._told(request, exchange, asked, script)

    def _told(
        self, request: UpstreamRequest, exchange: UpstreamExchange, asked: Asked, script: Script
    ) -> Iterator[Step]:
        shape = asked.shape
        exchange.script = script
        answer = begin(asked, script, request.number)
        if isinstance(answer, str):
            return self._refusal(exchange, shape, 400, answer)
        if shape is EVENTS and asked.had:
            exchange.resumed_after = asked.had
            total = total_events(shape, answer) if script.status == 200 and script.body is None else None
            if total is not None and asked.had >= total:
                script = exchange.script = attrs.evolve(script.well(), status=204)
        due = None
        if script.status == 200 and script.body is None:
            exchange.answer = answer
            exchange.streamed = asked.stream and not (script.content_type or "").startswith(
                "application/json"
            )
            if shape is OPENAI_RESPONSES:
                exchange.response = self._keep(StoredResponse(answer=answer, made_at=request.at, kept=False))
                if asked.background:
                    exchange.response.kept = True
                    due = exchange.response.due
                    if not asked.stream:
                        return self._json(exchange, exchange.response.to_json_object(request.at))
        return plan(
            script,
            shape=shape,
            answer=answer,
            credential=request.credential,
            stream=asked.stream,
            skip=asked.had,
            due=due,
        )

    def _script(
        self,
        request: UpstreamRequest,
        asked: Asked,
        respond: Callable[[UpstreamRequest], Script | None] | None,
        default: Script,
    ) -> Script:
        script = self.queue.popleft() if self.queue else None
        if script is None and respond is not None:
            script = respond(request)
        if script is None and asked.model is not None:
            script = script_for_model(asked.model)
        return self._counted(default if script is None else script)

    def _counted(self, script: Script) -> Script:
        """Return the script, or, once it has struck as often as it says, the same answer without its fault."""
        if script.times is None:
            return script
        seen = self._struck.pop(script, 0)
        self._struck[script] = seen + 1
        while len(self._struck) > self.limit:
            self._struck.popitem(last=False)
        return script if seen < script.times else script.well()

    # --- stored responses

    def _keep(self, response: StoredResponse) -> StoredResponse:
        self.stored[response.id] = response
        while len(self.stored) > self.limit:
            self.stored.popitem(last=False)
        return response

    def _stored(self, request: UpstreamRequest, exchange: UpstreamExchange, asked: Asked) -> Iterator[Step]:
        shape, now = OPENAI_RESPONSES, request.at
        response = self.stored.get(asked.response_id)
        if response is None or response.expired(now):
            return self._refusal(exchange, shape, 404, f"Response with id '{asked.response_id}' not found.")
        exchange.response = response
        script = response.answer.script
        if asked.stored == "retrieve":
            response.retrieved += 1
            return self._json(exchange, response.to_json_object(now))
        if not response.answer.background:
            message = f"Only a response made with background=true can be {_PAST[asked.stored or 'stream']}."
            return self._refusal(exchange, shape, 400, message)
        if asked.stored == "cancel":
            response.cancel(now)
            return self._json(exchange, response.to_json_object(now))
        exchange.resumed_after, exchange.streamed = asked.had, True
        response.resumed.append(asked.had)
        exchange.answer = response.answer
        script = exchange.script = self._counted(script)
        return plan(
            script,
            shape=shape,
            answer=response.answer,
            credential=request.credential,
            skip=asked.had,
            due=response.due,
        )

    # --- other answers

    def _json(self, exchange: UpstreamExchange, value: object) -> Iterator[Step]:
        body = msgspec.json.encode(value)
        exchange.script = Script(body=body, content_type="application/json")
        return plan(exchange.script)

    def _refusal(self, exchange: UpstreamExchange, shape: Shape, status: int, message: str) -> Iterator[Step]:
        exchange.script = Script(status=status, message=message, code=_CODES.get(shape.name))
        return plan(exchange.script, shape=shape)


_PAST: Final = {"stream": "streamed again", "cancel": "cancelled"}
_CODES: Final = {OPENAI_CHAT.name: "simulated_upstream"}
"""Where a refusal has a code: in OpenAI's own shape, which is also that of a route that does not exist."""
