"""`prune`: retention, applied to a store's file by hand."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from supervisor.cli.exits import Exit
from supervisor.cli.render import complain, console, print_json, say, table
from supervisor.cli.serving import configured
from supervisor.config import RetentionConfig
from supervisor.errors import ConfigurationError, StoreError, StoreLockedError
from supervisor.stores import PruneReport, Retention
from supervisor.stores.offline import prune_file

__all__ = ["prune"]


def prune(options: argparse.Namespace) -> int:
    """Remove ended streams from a file, or tell which rules would remove how many."""
    try:
        config = configured(options)
        path = options.store or config.store.located(os.environ)
        report = prune_file(Path(path), _rules(config.retention, options), dry_run=options.dry_run)
    except ConfigurationError as error:
        complain(str(error))
        return Exit.USAGE
    except StoreLockedError as error:
        complain(f"{error}. A daemon prunes by its [retention] by itself; --dry-run can be used beside it")
        return Exit.FAILURE
    except StoreError as error:
        complain(str(error))
        return Exit.FAILURE
    _tell(report, path, options)
    return Exit.OK


def _rules(retention: RetentionConfig, options: argparse.Namespace) -> Retention:
    try:
        return Retention(
            max_ended=options.max_ended if options.max_ended is not None else retention.max_ended,
            max_age_s=options.max_age if options.max_age is not None else retention.max_age_s,
            max_bytes=options.max_bytes if options.max_bytes is not None else retention.max_bytes,
            tenant=retention.tenant,
            tenants=retention.tenants,
        )
    except ConfigurationError as error:
        option = error.field.rpartition(".")[2].removesuffix("_s").replace("_", "-")
        expected = error.expected.removesuffix(", or None for no limit")
        raise ConfigurationError(f"--{option}", error.value, expected) from None


def _tell(report: PruneReport, path: str, options: argparse.Namespace) -> None:
    if options.json:
        print_json(
            {
                "dry_run": options.dry_run,
                "store": path,
                "streams": report.streams,
                "bytes": report.nbytes,
                "rules": {
                    rule: {"streams": removed.streams, "bytes": removed.nbytes}
                    for rule, removed in report.rules.items()
                },
            }
        )
        return
    if report.rules:
        rows = ((rule, removed.streams, removed.nbytes) for rule, removed in report.rules.items())
        console().print(table(("rule", "streams", "bytes"), rows))
    verb = "would be" if options.dry_run else "were"
    say(f"{report.streams} ended streams of {report.nbytes} bytes {verb} removed from {path}")
