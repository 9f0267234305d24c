"""The documentation says what is so: its examples run as written, its tables are the code's, what it names exists."""

from __future__ import annotations

import ast
import contextlib
import importlib.util
import inspect
import io
import os
import re
import subprocess
import sys
import tomllib
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any, get_args

import attrs
import httpx
import pytest
import trio
from trio.testing import MockClock

import supervisor
from supervisor import daemon, dialects, observe, open_supervisor
from supervisor.cli import main, tracing
from supervisor.config import DEFAULT_PORT, parse
from supervisor.dialects import BUILTIN, FaultKind, Snapshot
from supervisor.stores import Event
from supervisor.streams import Outcome, diagram
from supervisor.testing import Script, SimulatedUpstream
from supervisor.testing.upstream.script import PRESETS, FaultName
from supervisor.upstream import RetryPolicy, StreamTransport, Upstream

ROOT = Path(__file__).resolve().parents[1]
README = ROOT / "README.md"
PAGES = [README, ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))]

_BLOCK = re.compile(
    r"(?P<real><!-- real time -->\n)?^```python\n(?P<code>.*?)^```\n(?:\n^```text\n(?P<out>.*?)^```\n)?",
    re.MULTILINE | re.DOTALL,
)


def generator() -> ModuleType:
    """Load docs/generate.py, which is no part of the package."""
    spec = importlib.util.spec_from_file_location("docs_generate", ROOT / "docs" / "generate.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


# --- examples --------------------------------------------------------------------------------------------------------


def test_the_readme_example():
    """It has at most ten lines, runs as written, and prints what the README says."""
    page = README.read_text("utf-8")
    (match,) = _BLOCK.finditer(page)
    code = match["code"]
    assert len([line for line in code.splitlines() if line.strip()]) <= 10
    ran = subprocess.run(
        [sys.executable, "-c", code], check=False, capture_output=True, text=True, timeout=60
    )
    assert (match["out"], "", 0) == (ran.stdout, ran.stderr, ran.returncode)


@pytest.mark.parametrize(("name", "least"), [("embedding.md", 16), ("dialects.md", 4)])
def test_the_guides(name, least, tmp_path, monkeypatch):
    """Every block of these pages runs, in order and sharing names, and prints what is shown under it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MY_KEY", "")
    page = (ROOT / "docs" / name).read_text("utf-8")
    blocks = list(_BLOCK.finditer(page))
    assert page.count("```python") == len(blocks) >= least
    assert page.count("```text") == len([block for block in blocks if block["out"] is not None])
    namespace: dict[str, Any] = {"__name__": "guide"}
    for block in blocks:
        above = page.count("\n", 0, block.start("code"))
        shown = _run("\n" * above + block["code"], namespace, real_time=block["real"] is not None)
        assert (block["out"] or "") == shown, block["code"]


def _run(code: str, namespace: dict[str, Any], *, real_time: bool) -> str:
    """Run one block, inside a supervisor if it needs one; return what it printed."""
    printed = io.StringIO()
    compiled = compile(code, "docs/embedding.md", "exec", ast.PyCF_ALLOW_TOP_LEVEL_AWAIT, dont_inherit=True)
    with contextlib.redirect_stdout(printed):
        if not compiled.co_flags & inspect.CO_COROUTINE:
            exec(compiled, namespace)
            return printed.getvalue()

        async def inside() -> None:
            async with open_supervisor() as sup:
                namespace["sup"] = sup
                await eval(compiled, namespace)
                await sup.shutdown()

        trio.run(inside, clock=None if real_time else MockClock(autojump_threshold=0))
    return printed.getvalue()


def test_the_embedding_guide_names_every_field():
    """Its tables of Event, Outcome and Snapshot leave out no field and invent none."""
    page = (ROOT / "docs" / "embedding.md").read_text("utf-8")
    for start, fields in (
        ("| field | |", set(Event.__struct_fields__)),
        ("| field of `Outcome` | |", {field.name for field in attrs.fields(Outcome)} | {"duration_s"}),
        ("| field of `Snapshot` | |", {field.name for field in attrs.fields(Snapshot)}),
    ):
        rows = page.partition(start)[2].partition("\n\n")[0].splitlines()[2:]
        assert {name for row in rows for name in re.findall(r"`(\w+)`", row.split("|")[1])} == fields


async def test_the_trace_in_the_readme():
    """What `trace` prints of such a stream now is the README's sample, but for ids, figures and the lengths of bars."""
    page = README.read_text("utf-8")
    (command, sample), *_ = re.findall(
        r'^\$ stream-supervisor start simulated --model "(.*?)".*\n\$ .* trace \w+\n(.*?)^```$',
        page,
        re.MULTILINE | re.DOTALL,
    )
    model = command.replace("=0.02", "=0.001").replace("=0.2", "=0.01")
    assert model != command
    async with (
        SimulatedUpstream() as provider,
        contextlib.aclosing(StreamTransport()) as transport,
        open_supervisor() as sup,
    ):
        retry = RetryPolicy(wait_initial_s=0.01, resume=("restart",))
        upstream = Upstream(name="simulated", base_url=provider.base_url, proxy="direct", retry=retry)
        source = upstream.source({"model": model, "messages": []}, transport=transport)
        stream = await sup.start(source, meta={"model": model})
        with trio.fail_after(10):
            await stream.wait()
        printed = "\n".join(str(line) for line in tracing._lines(await observe.trace(stream), 60))
    assert _without_figures(printed) == _without_figures(sample)


def _without_figures(text: str) -> list[str]:
    text = re.sub(r"\b\w{26}\b", "ID", text.rstrip())
    text = re.sub(r"[░█·▁▂▃▄▅▆▇]{2,}|[░█▁▂▃▄▅▆▇]", "", text)
    text = re.sub(r"\d[\d.,]*( (k?B|m?s)\b)?", "#", text)
    text = text.replace(" (waited #)", "")  # drawn at random, and so it may be none
    return [" ".join(line.split()) for line in text.splitlines()]


# --- what is generated -----------------------------------------------------------------------------------------------


def test_the_diagram_of_states():
    """The diagram is what the table of transitions says; `python -m supervisor.streams.diagram` writes it anew."""
    page = (ROOT / "docs" / "architecture.md").read_text("utf-8")
    assert diagram.insert(page) == page
    for state, after in supervisor.streams.TRANSITIONS.items():
        for target in after - supervisor.streams.TERMINAL_STATES:
            assert f"{state} --> {target}" in page


def test_the_diagram_tool_tells_a_stale_page(tmp_path):
    """`--check` answers 1 for a page that differs, 0 for one just written; a page without markers is refused."""
    page = tmp_path / "page.md"
    page.write_text(f"before\n{diagram.BEGIN}\nold\n{diagram.END}\nafter\n", "utf-8")
    assert diagram.main(["--check", str(page)]) == 1
    assert diagram.main([str(page)]) == 0
    assert diagram.main(["--check", str(page)]) == 0
    assert page.read_text("utf-8").startswith("before\n")
    assert page.read_text("utf-8").endswith("\nafter\n")
    with pytest.raises(ValueError, match="no place"):
        diagram.insert("nothing")


def test_limits_and_exit_codes():
    """Every default and exit code in the documentation is the code's; `python docs/generate.py` writes them anew."""
    generate = generator()
    assert generate.LIMITS.read_text("utf-8") == generate.limits_page()
    page = README.read_text("utf-8")
    for name, text in generate.tables():
        assert generate.block(page, name) == text, name


def test_the_tables_of_dialects():
    """What the page says of endings and errors is what the dialects say of themselves, and leaves none of them out."""
    generate = generator()
    page = generate.DIALECTS.read_text("utf-8")
    for name, text in generate.dialect_tables():
        assert generate.block(page, name) == text, name
    assert set(re.findall(r"^\| `([\w-]+)` \|", generate.block(page, "endings"), re.MULTILINE)) == set(
        BUILTIN
    )
    assert set(re.findall(r"^\| `([\w-]+)` \|", generate.block(page, "asking"), re.MULTILINE)) == (
        {*BUILTIN, *dialects.PRESETS} - {"native"}
    )
    assert set(re.findall(r"^\| `(\w+)` \|", generate.block(page, "faults"), re.MULTILINE)) == set(
        get_args(FaultKind)
    )


def test_every_limit_is_listed():
    """No field of a class of limits is left out of the page, and each is explained."""
    generate = generator()
    rows = generate.limits()
    for kind in (
        supervisor.Limits,
        supervisor.MemoryPolicy,
        supervisor.Deadlines,
        supervisor.OnDetach,
    ):
        for name in inspect.signature(kind).parameters:
            assert f"{kind.__name__}.{name}" in rows
    assert [name for name, row in rows.items() if not row.told] == []


def test_the_configuration_example(tmp_path, capsys):
    """The example file is accepted as it is printed, and says what its comments say."""
    page = (ROOT / "docs" / "configuration.md").read_text("utf-8")
    (example,) = re.findall(r"^```toml\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)
    file = tmp_path / "example.toml"
    file.write_text(example, "utf-8")
    assert (main(["check-config", str(file)]), capsys.readouterr().out.splitlines()[0].split()[0]) == (
        0,
        "ok",
    )
    config = parse(example)
    openai, azure, anthropic, local = config.upstreams
    assert anthropic.url == "https://api.anthropic.com/v1/messages"
    assert openai.deadlines == supervisor.Deadlines(first_event_s=300, idle_s=90, total_s=None)
    assert (openai.retry.attempts, openai.retry.retry_after_max_s) == (3, 10)
    assert azure.credential.header == "api-key"
    assert local.url == "http://127.0.0.1:8000/v1/chat/completions"
    assert config.retention.max_ended is None
    assert [group.max_count for group in config.memory.groups] == [100, 3]
    used = {key for table in tomllib.loads(example)["upstreams"].values() for key in table}
    assert used == set(supervisor.config._UPSTREAM_KEYS)


def test_the_configuration_tables():
    """Every key is on the page with its default and a meaning; `python docs/generate.py` writes them anew."""
    generate = generator()
    assert (
        generate.block(generate.CONFIGURATION.read_text("utf-8"), "tables") == generate.configuration_tables()
    )
    assert [option for option in generate.options() if not option.told] == []
    assert set(generate.UPSTREAM_KEYS) == set(supervisor.config._UPSTREAM_KEYS)


async def test_the_control_session():
    """The session in the README has the shape of one held now: same messages, same fields, same types."""
    generate = generator()
    shown = generate.shown_session(README.read_text("utf-8"))
    assert generate.shape(shown) == generate.shape(generate.transcript(await generate.session()))


async def test_the_client_example(capsys):
    """The example of the control channel's page, asked of a daemon with a simulated upstream, prints what is shown under it."""
    page = (ROOT / "docs" / "control-protocol.md").read_text("utf-8")
    (match,) = _BLOCK.finditer(page)
    code, _, last = match["code"].rstrip().rpartition("\n")
    assert last == f'trio.run(ask, "ws://127.0.0.1:{DEFAULT_PORT}")'
    namespace: dict[str, Any] = {}
    exec(code, namespace)
    config = parse(
        'discover = false\n[control]\nport = 0\n[web]\nport = "none"\n[store]\npath = ":memory:"\n[shutdown]\ngrace_s = 0'
    )
    up, down = trio.open_memory_channel[daemon.Ready](1)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(partial(daemon.run, config, ready=up.send_nowait, simulated=True, environ={}))
        with trio.fail_after(30):
            await namespace["ask"]((await down.receive()).url)
        nursery.cancel_scope.cancel()
    assert capsys.readouterr().out == match["out"]


async def test_the_simulated_models_end_as_the_page_says():
    """Every preset and fault is in the table, every row ends as it says, and every field that is listed exists."""
    page = (ROOT / "docs" / "simulated-upstream.md").read_text("utf-8")
    rows = re.findall(r"^\| (`sim/.*?) \| .* \| `(.*)` \|$", page, re.MULTILINE)
    said = {model: ending for models, ending in rows for model in re.findall(r"`(sim/\S+)`", models)}
    listed = {model.partition("?")[0].removeprefix("sim/") for model in said}
    assert listed == {*PRESETS, *get_args(FaultName), "429", "500", "401"}
    ended: dict[str, str] = {}
    async with (
        SimulatedUpstream() as provider,
        contextlib.aclosing(StreamTransport()) as transport,
        open_supervisor() as sup,
    ):
        upstream = Upstream(
            name="simulated",
            base_url=provider.base_url,
            proxy="direct",
            retry=RetryPolicy(wait_initial_s=0.01, wait_max_s=0.02),
        )

        async def run(model: str) -> None:
            total_s = 0.5 if model == "sim/endless" else None
            stream = await sup.start(
                upstream.source({"model": model, "messages": []}, transport=transport),
                deadlines=supervisor.Deadlines(first_event_s=4, idle_s=2, total_s=total_s),
            )
            outcome = await stream.wait()
            ended[model] = f"{outcome.state.value}({outcome.reason})"

        with trio.fail_after(30):
            async with trio.open_nursery() as nursery:
                for model in said:
                    nursery.start_soon(run, model)
    assert ended == said
    fields = page.partition("| field | default | |")[2].partition("\n\n")[0].splitlines()[2:]
    names = {name for row in fields for name in re.findall(r"`(\w+)`", row.split("|")[1])}
    assert names - {field.name for field in attrs.fields(Script)} == set()


async def test_which_faults_a_whole_answer_has():
    """Of all faults, exactly those that the page names strike whoever asks for no stream."""
    page = (ROOT / "docs" / "simulated-upstream.md").read_text("utf-8")
    told = page.partition("What comes in\nplace of an answer (")[2].partition(")")[0]
    struck = set()
    async with SimulatedUpstream() as provider, httpx.AsyncClient(transport=StreamTransport()) as client:
        url = f"{provider.base_url}/chat/completions"
        for fault in set(get_args(FaultName)) - {"silent"}:  # which is waited for
            try:
                answer = await client.post(url, json={"model": f"sim/{fault}", "stream": False})
                assert answer.json()["choices"][0]["message"]["content"] == Script().expected_text()
            except httpx.TransportError:
                struck.add(f"sim/{fault}")
    assert struck | {"sim/silent"} == set(re.findall(r"`(.*?)`", told))


# --- what is named ---------------------------------------------------------------------------------------------------


def test_the_laws_name_their_tests():
    """Each of the ten laws names at least one test, and every test that is named exists."""
    page = (ROOT / "docs" / "architecture.md").read_text("utf-8")
    laws = re.split(
        r"^\d+\. \*\*", page.partition("## The laws")[2].partition("\n## ")[0], flags=re.MULTILINE
    )[1:]
    assert len(laws) == 10
    for law in laws:
        named = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", law)
        assert named, law
        for path, test in named:
            tree = ast.parse((ROOT / path).read_text("utf-8"))
            functions = {
                node.name
                for node in ast.walk(tree)
                if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
            }
            assert test in functions, f"{path}::{test}"


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_links_lead_somewhere(path):
    """Every relative link of a page is to a file, and to a heading of it where it names one."""
    text = re.sub(r"^```.*?^```", "", path.read_text("utf-8"), flags=re.MULTILINE | re.DOTALL)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if "://" in target or target.startswith("mailto:"):
            continue
        file, _, anchor = target.partition("#")
        other = path if not file else (path.parent / file).resolve()
        assert other.is_file(), target
        if anchor:
            headings = re.findall(r"^#+ (.*)$", other.read_text("utf-8"), re.MULTILINE)
            assert anchor in {_anchor(heading) for heading in headings}, target


def _anchor(heading: str) -> str:
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


def test_commands_of_the_command_line_are_the_readmes():
    """Each command that the README's table lists exists, and none is missing from it."""
    from supervisor.cli.parser import build_parser

    page = README.read_text("utf-8")
    listed = set(re.findall(r"^\| `stream-supervisor ([\w-]+)", page, re.MULTILINE))
    (commands,) = [action.choices for action in build_parser()._actions if getattr(action, "choices", None)]
    assert listed == set(commands)


def test_ci_runs_the_readmes_test_command():
    """The command that `.ci/run` runs is the one that the README gives."""
    (command,) = re.findall(r"^(python3? -m venv .*nox)$", README.read_text("utf-8"), re.MULTILINE)
    assert command in (ROOT / ".ci" / "run").read_text("utf-8")
    assert os.access(ROOT / ".ci" / "run", os.X_OK)


def test_the_typed_example_uses_all_of_the_embedding_api():
    """`tests/typing/api.py`, which the type checkers read as a user's program, leaves out no public name."""
    page = (ROOT / "tests" / "typing" / "api.py").read_text("utf-8")
    assert [name for name in supervisor.__all__ if not re.search(rf"\b{name}\b", page)] == []
