"""`prune`, on a file: what it tells, what it removes, and whose file it leaves alone."""

from __future__ import annotations

import json
import sqlite3
import time
from pathlib import Path

import pytest
import trio

from supervisor.cli import Exit, main
from supervisor.stores import SQLiteStore
from tests.stores.records import events, head, opened, write_ended

DAY_S = 86_400.0


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """A closed file: streams that ended now and up to four days ago, two of them a tenant's; and one that never ended."""
    path = tmp_path / "streams.db"
    trio.run(fill, path)
    return path


async def fill(path: Path) -> None:
    async with opened(SQLiteStore(path)) as store:
        for days in range(5):
            tenant = "acme" if days < 2 else None
            write_ended(store, f"s{days}", 10, ended_at=time.time() - days * DAY_S, tenant=tenant)
        store.create(head("live"))
        store.append("live", events(1, 3))
        await store.wait_durable("live", 3)


def ids(path: Path) -> list[str]:
    connection = sqlite3.connect(path)
    found = [row[0] for row in connection.execute("SELECT id FROM streams ORDER BY id")]
    connection.close()
    return found


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    code = main(["prune", *arguments])
    told = capsys.readouterr()
    return code, told.out, told.err


def test_a_dry_run_tells_by_rule_and_the_prune_does_it(file, tmp_path, capsys):
    """By the configuration's rules, in words and as JSON; the file is as it was, and then it is not."""
    config = tmp_path / "my.toml"
    config.write_text(
        f'[store]\npath = "{file}"\n[retention]\nmax_age_s = {2.5 * DAY_S}\n[retention.tenants.acme]\nmax_ended = 1\n'
    )
    before = file.read_bytes()
    code, out, err = run(capsys, "--config", str(config), "--dry-run", "--json")
    told = json.loads(out)
    assert (code, err, told["dry_run"], told["store"], told["streams"]) == (0, "", True, str(file), 3)
    assert {rule: removed["streams"] for rule, removed in told["rules"].items()} == {
        "max_age_s": 2,
        "tenants.acme.max_ended": 1,
    }
    assert told["bytes"] == sum(removed["bytes"] for removed in told["rules"].values()) > 0
    code, out, err = run(capsys, "--config", str(config), "--dry-run")
    assert "tenants.acme.max_ended" in out
    assert f"3 ended streams of {told['bytes']} bytes would be removed" in out + err
    assert (before, len(ids(file))) == (file.read_bytes(), 6)
    code, out, err = run(capsys, "--config", str(config))
    assert (code, ids(file)) == (0, ["live", "s0", "s2"])
    assert "3 ended streams" in out + err
    assert "were removed" in out + err


def test_options_take_the_place_of_the_configuration(file, capsys):
    """Also none at all, of what has ended."""
    code, out, _ = run(
        capsys, "--store", str(file), "--max-age", str(1.5 * DAY_S), "--max-bytes", "1000000", "--json"
    )
    assert (code, json.loads(out)["rules"].keys()) == (0, {"max_age_s"})
    assert ids(file) == ["live", "s0", "s1"]
    assert run(capsys, "--store", str(file), "--max-ended", "0")[0] == 0
    assert ids(file) == ["live"]
    code, _, err = run(capsys, "--store", str(file), "--max-age", "-1")
    assert (code, "--max-age" in err) == (Exit.USAGE, True)


async def test_a_file_that_is_in_use_is_left_alone_but_can_be_told_of(file, capsys):
    """The lock is respected, with who has it; a dry run needs none, and sees what the daemon has written."""
    async with opened(SQLiteStore(file)) as store:
        write_ended(store, "s9", 1, ended_at=time.time())
        await store.wait_durable("s9", 2)
        code, out, err = await trio.to_thread.run_sync(
            lambda: run(capsys, "--store", str(file), "--max-ended", "0")
        )
        assert code == Exit.FAILURE
        assert "in use by process" in err
        assert "--dry-run" in err
        code, out, _ = await trio.to_thread.run_sync(
            lambda: run(capsys, "--store", str(file), "--max-ended", "0", "--dry-run", "--json")
        )
        assert (code, json.loads(out)["streams"]) == (0, 6)
        assert len(await store.list()) == 6


def test_what_is_no_file_of_ours_is_left_alone(file, tmp_path, capsys):
    """Nothing is made where there is nothing; another program's, or another version's, file is named and not touched."""
    missing = tmp_path / "nowhere.db"
    for options in ((), ("--dry-run",)):
        code, _, err = run(capsys, "--store", str(missing), *options)
        assert (code, "there is no such file" in err, missing.exists()) == (Exit.FAILURE, True, False)
    other = tmp_path / "other.db"
    other.write_bytes(b"my diary\n" * 1000)
    assert run(capsys, "--store", str(other), "--dry-run")[0] == Exit.FAILURE
    assert other.read_bytes() == b"my diary\n" * 1000
    connection = sqlite3.connect(file)
    connection.execute("PRAGMA user_version = 1")
    connection.close()
    code, _, err = run(capsys, "--store", str(file), "--dry-run")
    assert (code, "schema 1" in err) == (Exit.FAILURE, True)
    code, _, err = run(capsys, "--store", ":memory:")
    assert (code, "in memory" in err) == (Exit.FAILURE, True)
