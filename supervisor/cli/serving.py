"""`serve` and `check-config`."""

from __future__ import annotations

import argparse
import contextlib
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import attrs
import msgspec
import trio

from supervisor.cli.connecting import run_reporting
from supervisor.cli.exits import Exit
from supervisor.cli.parser import CONFIG_VARIABLE
from supervisor.cli.render import complain, console, fields_table, print_json
from supervisor.config import Config, load
from supervisor.daemon import SIMULATED, Ready, run
from supervisor.errors import ConfigurationError
from supervisor.logs import logging_to

__all__ = ["check_config", "configured", "serve"]


def serve(options: argparse.Namespace) -> int:
    """Run the daemon in the foreground until it is told to end."""
    try:
        config = _with_options(configured(options), options)
        _check(config, options)
        secrets = _secrets(config, os.environ)
        log = config.log
        with (
            logging_to(log.file, level=log.level, style=log.format, secrets=secrets) as handler,
            _ready_file(options.ready_file) as announce,
        ):

            def ready(state: Ready) -> None:
                announce(state)
                with contextlib.suppress(
                    BrokenPipeError
                ):  # nobody listens to the one line; the daemon still serves
                    if options.json:
                        print_json(attrs.asdict(state))
                    else:
                        where = state.url if state.http is None else f"{state.url} and {state.http}"
                        print(f"stream-supervisor is listening on {where}", flush=True)  # noqa: T201  # the ready line

            return run_reporting(lambda: run(config, ready=ready, log=handler, simulated=options.simulated))
    except ConfigurationError as error:
        complain(str(error))
        return Exit.USAGE
    except OSError as error:
        complain(str(error))
        return Exit.FAILURE


def check_config(options: argparse.Namespace) -> int:
    """Read a configuration as `serve` would, and print what it comes to, without a secret in it."""
    options.config = options.file or options.config
    try:
        config = configured(options)
        _check(config, options)
        token = config.control.token.read(os.environ) is not None
        upstreams = config.all_upstreams(os.environ)
    except ConfigurationError as error:
        if options.json:
            print_json({"ok": False, "error": str(error), "field": error.field, "expected": error.expected})
        complain(str(error))
        return Exit.USAGE
    told: dict[str, Any] = {
        "ok": True,
        "source": config.source,
        "token": "configured" if token else "none (loopback only)",
        "store": config.store.located(os.environ),
        "upstreams": {},
        "warnings": config.warnings(os.environ),
    }
    for name, upstream in sorted(upstreams.items()):
        credential = upstream.credential
        told["upstreams"][name] = {
            "url": upstream.url,
            "dialect": upstream.dialect.name,
            "credential": "none" if credential is None else str(credential),
        }
    if not upstreams and not options.simulated:
        told["warnings"].append("no upstreams: none is configured and no API key is in the environment")
    settings = msgspec.to_builtins(
        {
            field.name: getattr(config, field.name)
            for field in attrs.fields(Config)
            if field.name not in _APART
        },
        order="deterministic",
        enc_hook=str,
    )
    told["settings"] = settings
    if options.json:
        print_json(told)
    else:
        for warning in told["warnings"]:
            complain(f"warning: {warning}")
        console().print(fields_table({name: value for name, value in told.items() if name != "warnings"}))
    return Exit.OK


_APART = {"upstreams", "source"}


def _check(config: Config, options: argparse.Namespace) -> None:
    """Raise ConfigurationError for what would be refused when the daemon starts to listen; names the option, or the table."""
    try:
        trio.run(config.check, os.environ, (SIMULATED,) if options.simulated else ())
    except ConfigurationError as error:
        key = error.field.rpartition(" ")[2]
        if getattr(options, key, None) is None:
            raise
        field = f"--{key.replace('_', '-')}"
        raise ConfigurationError(field, error.value, error.expected, told=error.told) from None


def configured(options: argparse.Namespace) -> Config:
    """Return the configuration that the options, or the environment, name. Raises ConfigurationError."""
    path = options.config or os.environ.get(CONFIG_VARIABLE)
    return load(path) if path else Config()


def _with_options(config: Config, options: argparse.Namespace) -> Config:
    """Return the configuration with what the command line says in its place."""

    def given(**values: object) -> dict[str, Any]:
        return {name: value for name, value in values.items() if value is not None}

    try:
        control = given(host=options.host, port=options.port, token_file=options.token_file)
        if options.token_file is not None:
            control["token_env"] = None
        if options.web_port is not None:
            config = _with_web_port(config, options.web_port)
        return attrs.evolve(
            config,
            web=attrs.evolve(config.web, **given(host=options.host)),
            control=attrs.evolve(config.control, **control),
            store=attrs.evolve(config.store, **given(path=options.store)),
            shutdown=attrs.evolve(config.shutdown, **given(grace_s=options.grace)),
            log=attrs.evolve(
                config.log, **given(file=options.log_file, level=options.log_level, format=options.log_format)
            ),
        )
    except ConfigurationError as error:
        names = {"port": "--port", "path": "--store", "grace_s": "--grace", "token_env": "--token-file"}
        raise ConfigurationError(names.get(error.field, error.field), error.value, error.expected) from None


def _with_web_port(config: Config, port: int | str) -> Config:
    try:
        web = attrs.evolve(config.web, port=port if isinstance(port, int) else None)
    except ConfigurationError as error:
        raise ConfigurationError("--web-port", error.value, error.expected.replace("None", "none")) from None
    return attrs.evolve(config, web=web)


def _secrets(config: Config, environ: Mapping[str, str]) -> list[str]:
    """Return the values that no log line may show."""
    found = []
    for upstream in config.all_upstreams(environ).values():
        if upstream.credential is not None:
            with contextlib.suppress(ConfigurationError):  # one that is missing is reported when it is needed
                found.append(upstream.credential.secret(environ))
    token = config.control.token.read(environ)
    return found if token is None else [*found, token]


@contextlib.contextmanager
def _ready_file(path: Path | None) -> Iterator[Any]:
    """Give a function that writes the file, whole or not at all; remove the file at the end."""

    def announce(state: Ready) -> None:
        if path is not None:
            part = path.with_name(f".{path.name}.{os.getpid()}")
            part.write_bytes(msgspec.json.encode(attrs.asdict(state)) + b"\n")
            part.replace(path)

    try:
        yield announce
    finally:
        if path is not None:
            path.unlink(missing_ok=True)
