"""The daemon: a supervisor, its store, its upstreams and the control channel, from start to an orderly end.

**Ending.** SIGTERM or a first SIGINT begins the end: nothing new is started, live streams go on for `shutdown.grace_s`, those
still live then are cancelled as `cancelled(shutdown)`, and the daemon leaves once every outcome is durable. Clients stay
connected meanwhile and see their streams end. A SIGINT while that goes on cuts the grace short: the rest is cancelled at
once. One more after that ends the process on the spot, as a crash would, which the store is built to survive.
`supervisor.shutdown` of the control channel is the same as the first signal, with the grace that it names.

**Nesting.** Signals are received outermost, so that they count from the first moment; then the supervisor with its store;
then, in a nursery that is cancelled once all streams have settled, the listener and the housekeeping. The listener goes
before the store does: no request can find a store that is closed.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import resource
import signal
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from typing import Any, NoReturn

import attrs
import trio

from supervisor import garbage
from supervisor.config import Config
from supervisor.control.auth import Token, require_safe_address
from supervisor.control.messages import ShutdownParams, StartParams
from supervisor.control.server import ControlServer, Resolved
from supervisor.errors import ConfigurationError
from supervisor.logs import ReopeningHandler
from supervisor.observe import Figures, StreamLog
from supervisor.stores import retain
from supervisor.streams import Holder, Supervisor, open_supervisor
from supervisor.upstream.catalog import Upstream
from supervisor.upstream.circuit import Circuits
from supervisor.upstream.tls import shared_context
from supervisor.upstream.transport import StreamTransport
from supervisor.version import version
from supervisor.web import events, metrics, openapi
from supervisor.web.app import Front, Part, WebAccess, alive, create_app
from supervisor.web.dashboard import dashboard
from supervisor.web.gateway import gateway
from supervisor.web.server import WebServer

__all__ = ["ABORTED", "SIMULATED", "Ready", "run"]

_log = logging.getLogger("supervisor.daemon")

ABORTED = 130
"""The exit code after a second SIGINT: 128 + SIGINT, as shells have it."""
SIMULATED = "simulated"
"""The name of the upstream that a daemon serves itself, if it is asked to."""

_TELL_S = 2.0
_LOOK_S = 0.01
_WANTED_FILES = 65_536
_SIMULATED_ANSWER = (
    "This answer is simulated: it was written in advance and comes a word at a time, "
    "as a model's answer would, from within the daemon."
)
_SIMULATED_PACE_S = 0.05
_SIMULATED_RECORDS = 100


@attrs.frozen(kw_only=True)
class Ready:
    """What a daemon that has just become ready says of itself."""

    url: str
    http: str | None
    """Where HTTP is served; None: nowhere."""
    pid: int
    version: str
    store: str
    upstreams: tuple[str, ...]
    token_required: bool


@attrs.define(eq=False)
class _Ending:
    """The request to end, and how urgent it is."""

    grace_s: float
    actor: str = ""
    requested: trio.Event = attrs.field(factory=trio.Event)
    starting: trio.CancelScope = attrs.field(factory=trio.CancelScope)
    """Holds everything until the daemon is ready: to end before that is simply not to start."""
    started: bool = False
    grace: trio.CancelScope = attrs.field(factory=trio.CancelScope)
    aborted: bool = False

    def request(self, actor: str, grace_s: float | None = None) -> None:
        """Begin the end; asked again, a shorter grace holds."""
        if not self.requested.is_set():
            self.actor = actor
            self.grace_s = self.grace_s if grace_s is None else grace_s
            self.requested.set()
            if not self.started:
                self.starting.cancel(reason=f"{actor} before the daemon was ready")
        elif grace_s is not None:
            self.grace.deadline = min(self.grace.deadline, trio.current_time() + grace_s)

    def abort(self) -> None:
        """Cut the grace short."""
        self.aborted = True
        self.grace.cancel(reason="a second interrupt")


async def run(
    config: Config,
    *,
    environ: Mapping[str, str] | None = None,
    ready: Callable[[Ready], None] = lambda _: None,
    log: logging.Handler | None = None,
    simulated: bool = False,
) -> int:
    """Run a daemon until it is told to end; return the exit code: 0, or `ABORTED` after a second SIGINT.

    `ready` is called once clients can connect; `log` is reopened on SIGHUP; `simulated` adds an upstream,
    `simulated`, which this process serves on loopback. Raises ConfigurationError for what cannot be
    used, StoreError if the store cannot be opened, OSError if it cannot listen. A cancel ends it as an exception in
    `open_supervisor`'s block does: live streams are `cancelled(shutdown)`.
    """
    daemon = _Daemon(config, os.environ if environ is None else environ, ready, simulated=simulated)
    ending = daemon.ending
    try:
        with _receiving() as signals:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(_obey, signals, ending, log, name="signals")
                with ending.starting:
                    await daemon.run()
                nursery.cancel_scope.cancel(reason="the daemon has ended")
    except BaseExceptionGroup as group:
        raise _first(group) from None
    _log.info("stopped%s", " by an abort" if ending.aborted else "")
    return ABORTED if ending.aborted else 0


# --- signals ---------------------------------------------------------------------------------------------------------


def _receiving() -> contextlib.AbstractContextManager[AsyncIterator[int]]:
    return trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


async def _obey(signals: AsyncIterator[int], ending: _Ending, log: logging.Handler | None) -> None:
    """Do what the signals say, until cancelled."""
    async for number in signals:
        name = signal.Signals(number).name
        if number == signal.SIGHUP:
            _reopen(log)
        elif not ending.requested.is_set():
            _log.info("%s: draining for at most %g s; SIGINT cuts that short", name, ending.grace_s)
            ending.request(name)
        elif number == signal.SIGINT and not ending.aborted:
            _log.warning("%s again: cancelling what is still live", name)
            ending.abort()
        elif number == signal.SIGINT:
            _log.critical(
                "%s once more: leaving on the spot; a restart will find live streams interrupted", name
            )
            logging.shutdown()
            os._exit(ABORTED)


def _reopen(log: logging.Handler | None) -> None:
    if not isinstance(log, ReopeningHandler):
        _log.info("SIGHUP: the log is not a file; nothing to reopen")
        return
    try:
        log.reopen()
    except OSError as error:
        _log.error("SIGHUP: the log could not be reopened, the old one stays: %s", error)
    else:
        _log.info("SIGHUP: the log was reopened")


# --- the parts -------------------------------------------------------------------------------------------------------


class _Daemon:
    """One run."""

    def __init__(
        self,
        config: Config,
        environ: Mapping[str, str],
        ready: Callable[[Ready], None],
        *,
        simulated: bool,
    ) -> None:
        self._config = config
        self._simulated = simulated
        self._ready = ready
        self._upstreams = config.all_upstreams(environ)
        if simulated and SIMULATED in self._upstreams:
            raise ConfigurationError(
                "--simulated", True, f"no upstream of the name {SIMULATED!r} in the configuration"
            )
        self._environ = environ
        self._token = config.control.token.read(environ)
        self._path = config.store.located(environ)
        self._store = config.store.open(environ)
        context = None
        if any(upstream.base_url.startswith("https:") for upstream in self._upstreams.values()):
            # now: reading the CAs would hold up the first streams for tens of milliseconds
            context = shared_context()
        self._transport = StreamTransport(ssl_context=context)
        self._circuits = Circuits(config.circuit)
        self.ending = _Ending(config.shutdown.grace_s)

    async def run(self) -> None:
        """Open everything, serve until told to end, and wind down."""
        _raise_file_limit()
        config = self._config
        async with (
            self._provider(),
            contextlib.aclosing(self._transport),
            open_supervisor(
                store=self._store,
                limits=config.limits,
                deadlines=config.deadlines,
                memory=config.memory,
                circuits=self._circuits.report,
            ) as supervisor,
            self._spans(supervisor),
            trio.open_nursery() as nursery,
        ):
            idle = self._transport.idle
            supervisor.memory.register(
                "idle connections",
                Holder(held=lambda: idle.bytes_held, expire=idle.expire, spare=idle.spare),
            )
            figures = Figures(supervisor)
            nursery.start_soon(figures.run, name="figures")
            supervisor.observe(StreamLog())
            control = config.control
            server = ControlServer(
                supervisor,
                resolve=self.resolve,
                on_shutdown=self._shutdown_asked,
                figures=figures,
                token=self._token,
                origins=control.origins,
                limits=control.limits,
            )
            port = await _listening(nursery, server.run, control.host, control.port, "--port")
            front = self._front(supervisor, server)
            web = WebServer(create_app(front, self._parts(front, figures)), limits=config.web.limits)
            http = None
            front.stats["web"] = web.statistics
            supervisor.memory.register("HTTP requests", Holder(held=lambda: web.body_bytes))
            if config.web.port is not None:
                await require_safe_address(
                    config.web.host, None if self._token is None else Token(self._token)
                )
                taken = await _listening(nursery, web.run, config.web.host, config.web.port, "--web-port")
                http = server.http = f"http://{_address(config.web.host, taken)}"
            if config.retention.limited:
                nursery.start_soon(self._retain, name="retention")
            self.ending.started = True
            nursery.start_soon(garbage.tend, supervisor, name="garbage")
            self._announce(port, http)
            await self.ending.requested.wait()
            await self._wind_down(supervisor)
            await _tell(server, web)
            nursery.cancel_scope.cancel(reason="all streams have settled")

    async def _retain(self) -> None:
        """Remove from the store what retention no longer keeps, until cancelled."""
        policy = self._config.retention
        await retain(self._store, policy, every_s=policy.sweep_every_s)

    @contextlib.asynccontextmanager
    async def _spans(self, supervisor: Supervisor) -> AsyncIterator[None]:
        """Send spans for the length of a block, if that is asked for."""
        if self._config.telemetry.spans is None:
            yield
            return
        from supervisor.observe.spans import otlp_spans  # noqa: PLC0415  # needs an extra

        async with otlp_spans() as spans:
            supervisor.observe(spans)
            yield

    @contextlib.asynccontextmanager
    async def _provider(self) -> AsyncIterator[None]:
        """Serve the simulated upstream for the length of a block, if there is to be one."""
        if not self._simulated:
            yield
            return
        from supervisor.testing.upstream import Script, SimulatedUpstream  # noqa: PLC0415  # only for who asks for it

        script = Script(text=_SIMULATED_ANSWER, interval_s=_SIMULATED_PACE_S)
        async with SimulatedUpstream(default=script, max_records=_SIMULATED_RECORDS) as provider:
            self._upstreams[SIMULATED] = Upstream(
                name=SIMULATED, base_url=provider.base_url, proxy="direct", retry=self._config.retry
            )
            yield

    def _front(self, supervisor: Supervisor, server: ControlServer) -> Front:
        """Return what the parts of the HTTP front have in common."""
        web = self._config.web
        return Front(
            supervisor=supervisor,
            resolve=self.resolve,
            access=WebAccess(
                token=None if self._token is None else Token(self._token),
                origins=frozenset(web.origins),
                hosts=frozenset(web.hosts),
            ),
            limits=web.limits,
            stats={"control": server.statistics},
        )

    def _parts(self, front: Front, figures: Figures) -> Iterator[Part]:
        """Give the parts of the HTTP front, put together here for they know nothing of each other; see `supervisor.web.app`."""
        yield alive(front)
        yield dashboard()
        yield events.part(front)
        yield openapi.part(front)
        yield metrics.ready(front)
        yield metrics.part(front, figures)
        yield gateway(
            front,
            self._config.gateway,
            upstreams=self._upstreams,
            transport=self._transport,
            circuits=self._circuits.of,
            environ=self._environ,
        )

    def _announce(self, port: int, http: str | None) -> None:
        ready = Ready(
            url=f"ws://{_address(self._config.control.host, port)}",
            http=http,
            pid=os.getpid(),
            version=version(),
            store=self._path,
            upstreams=tuple(sorted(self._upstreams)),
            token_required=self._token is not None,
        )
        _log.info(
            "listening on %s and %s; store %s; upstreams: %s",
            ready.url,
            ready.http or "no HTTP",
            ready.store,
            ", ".join(ready.upstreams) or "none",
        )
        for warning in self._config.warnings(self._environ):
            _log.warning("%s", warning)
        if not self._upstreams:
            _log.warning(
                "no upstream is configured, so nothing can be started: set OPENAI_API_KEY in the environment, or give "
                "--config FILE with a table [upstreams.NAME], or try --simulated, which needs no key"
            )
        self._ready(ready)

    async def _wind_down(self, supervisor: Supervisor) -> None:
        grace = self.ending.grace
        grace.deadline = min(grace.deadline, trio.current_time() + self.ending.grace_s)
        with grace:
            await supervisor.drain()
        live = supervisor.statistics().live
        if live:
            _log.warning("%d streams are still live and will be cancelled", live)
        await supervisor.shutdown(actor=self.ending.actor)

    def _shutdown_asked(self, params: ShutdownParams) -> None:
        self.ending.request("control", params.grace_s)
        _log.info(
            "shutdown was asked for over the control channel; draining for at most %g s", self.ending.grace_s
        )

    def resolve(self, params: StartParams) -> Resolved:
        """Turn a start request into a source. Raises ConfigurationError."""
        upstream = self._upstreams.get(params.upstream)
        if upstream is None:
            known = (
                ", ".join(sorted(self._upstreams))
                or "none is configured, and no API key is in the environment"
            )
            raise ConfigurationError("upstream", params.upstream, f"a configured upstream: {known}")
        retry: dict[str, Any] = {**params.retry.given()}
        request = _request(params, upstream)
        source = upstream.source(
            request,
            transport=self._transport,
            circuits=self._circuits.of,
            retry=attrs.evolve(upstream.retry, **retry),
        )
        model = request.get("model")
        return Resolved(
            source=source,
            deadlines=upstream.deadlines,
            meta={"model": model} if isinstance(model, str) else {},
        )


def _request(params: StartParams, upstream: Upstream) -> Mapping[str, Any]:
    """Return the body for the provider: as it is given, or made of a prompt. Raises ConfigurationError."""
    if params.request is not None:
        return params.request if params.model is None else {**params.request, "model": params.model}
    made_of, dialect = params.prompt, upstream.dialect
    assert made_of is not None, "the parameters have been checked"
    if dialect.asking.prompt is None:
        raise ConfigurationError(
            "prompt", made_of[:50], f"a request: the dialect {dialect.name} cannot be asked with words alone"
        )
    return dialect.asking.prompt(made_of, params.model)


def _address(host: str, port: int) -> str:
    return f"{f'[{host}]' if ':' in host else host}:{port}"


async def _listening(
    nursery: trio.Nursery, run: Callable[..., Awaitable[NoReturn]], host: str, port: int, option: str
) -> int:
    """Start a server; return its port. Raises OSError that says which option would help."""
    try:
        ports: tuple[int, ...] = await nursery.start(run, host, port)
    except OSError as error:
        raise _cannot_listen(host, port, error, option) from None
    return ports[0]


def _cannot_listen(host: str, port: int, error: OSError, option: str) -> OSError:
    """Return the error with the address in it, and what to do; its errno stays."""
    message = f"cannot listen on {_address(host, port)}: {error.strerror or error}"
    if error.errno == errno.EADDRINUSE:
        message += (
            f"; another daemon may be running there. {option} takes another port, or 0 for any free one"
        )
    told = OSError(message)
    told.errno = error.errno
    return told


async def _tell(server: ControlServer, web: WebServer) -> None:
    """Give the clients a moment to be sent the outcomes that they watch or wait for."""
    with trio.move_on_after(_TELL_S):
        await web.end()
    with trio.move_on_after(_TELL_S):
        while (figures := server.statistics()).subscriptions or figures.pending_requests:  # noqa: ASYNC110  # a last look, bounded; nothing tells
            await trio.sleep(_LOOK_S)
        await trio.sleep(_LOOK_S)  # what was queued last is still on its way to the socket


def _raise_file_limit() -> None:
    """Ask for as many open files as this process may have: every live stream has a socket."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _WANTED_FILES if hard == resource.RLIM_INFINITY else min(_WANTED_FILES, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        with contextlib.suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def _first(group: BaseExceptionGroup[BaseException]) -> BaseException:
    """Return the exception that a group is about: the one that is not a consequence."""
    leaves: list[BaseException] = []
    pending: list[BaseException] = [group]
    while pending:
        error = pending.pop(0)
        if isinstance(error, BaseExceptionGroup):
            pending.extend(error.exceptions)
        else:
            leaves.append(error)
    real = [leaf for leaf in leaves if not isinstance(leaf, trio.Cancelled)]
    return (real or leaves)[0]
