"""What stands between an SDK and its provider: the daemon's gateway against LiteLLM, Portkey, a FastAPI relay, and nginx.

All contenders pass the same streams of one lean upstream (`pacer.py`) on to one lean client (this process), plain HTTP, each on
its own, in turn. `ours` is the daemon as it is started by hand, with SQLite: it reads every event, keeps a journal, stores it, and knows how
the answer ends. LiteLLM and Portkey read the events too, and keep nothing; the FastAPI relay (`relay.py`: httpx's client, Starlette's
StreamingResponse, uvicorn) and nginx, with buffering off, pass bytes on. `direct` is the upstream without anything between.

- **Flood**: a few streams as fast as they are taken, CPU time per event of the contender with all its processes.
- **Paced**: 50 and 200 streams of 50 events/s, the same, and each event's way from the upstream's send to the client.
- **First byte**: one request at a time, to the first byte of the body.
- **Memory**: resident memory per stream with 200 live, beyond what there was with none.
- **Disconnect**: the client of one of 100 live streams closes its socket; until the upstream sees its own closed.

LiteLLM and Portkey are to be had in a place of their own: `--litellm` is the program `litellm` of a virtual environment
(`pip install 'litellm[proxy]'`), `--portkey` a directory where npm has installed @portkey-ai/gateway 1.15.2 with hono 4.9.7 and @hono/node-server 1.3.3 (as `overrides`: with newer
ones it answers every stream with HTTP 500); nginx is looked for in PATH. What is not there is left out, and said to be.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import select
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from array import array
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import attrs
import measure
import pacer

SCRIPT = __file__
ROUNDS = 3
PARTS = ("flood", "paced", "first", "disconnect")
CONTENDERS = ("ours", "fastapi", "nginx", "litellm", "portkey", "direct")
START_S = 120.0
"""How long a contender may take to start."""
_STAMP = re.compile(rb'"content":\s*"(\d+\.\d{6})')
_TICKS = os.sysconf("SC_CLK_TCK")


# --- the contenders --------------------------------------------------------------------------------------------------


@attrs.frozen
class Served:
    """A contender that is ready."""

    port: int
    path: str
    pid: int
    """Of its first process; 0 for none."""
    headers: Mapping[str, str] = attrs.field(factory=dict)
    model: str = "pacer"


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        return int(taken.getsockname()[1])


@contextlib.contextmanager
def _running(command: list[str], directory: Path, **environment: str) -> Iterator[subprocess.Popen[bytes]]:
    """Run a program, with its processes in a group of their own, and end them all."""
    kept = {name: value for name, value in os.environ.items() if not name.lower().endswith("_proxy")}
    with (directory / "log").open("wb") as log:
        process = subprocess.Popen(
            command,
            cwd=directory,
            env=kept | {"NO_PROXY": "*"} | environment,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    try:
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGTERM)
        try:
            process.wait(15)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def _wait_for(port: int, process: subprocess.Popen[bytes], directory: Path) -> None:
    give_up = time.monotonic() + START_S
    while time.monotonic() < give_up:
        if process.poll() is not None:
            break
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
            return
        time.sleep(0.05)
    log = (directory / "log").read_text(errors="replace")[-2000:]
    raise measure.WorkerError(f"{process.args} is not there on port {port}: {log}")


@contextlib.contextmanager
def _ours(upstream: str, directory: Path, _given: Mapping[str, Any]) -> Iterator[Served]:
    port = _free_port()
    (directory / "config.toml").write_text(
        f'discover = false\n[store]\npath = "{directory}/streams.db"\n[control]\nport = 0\n[web]\nport = {port}\n'
        f'[limits]\nmax_live = 2000\n[upstreams.pacer]\nbase_url = "{upstream}"\n'
    )
    command = [sys.executable, "-m", "supervisor.cli", "serve", "--config", "config.toml"]
    with _running(command, directory, PYTHONPATH=str(measure.HERE.parent)) as process:
        _wait_for(port, process, directory)
        yield Served(port, "/v1/chat/completions", process.pid)


@contextlib.contextmanager
def _fastapi(upstream: str, directory: Path, _given: Mapping[str, Any]) -> Iterator[Served]:
    port = _free_port()
    command = [sys.executable, str(measure.HERE / "relay.py"), "--port", str(port), "--upstream", upstream]
    with _running(command, directory) as process:
        _wait_for(port, process, directory)
        yield Served(port, "/v1/chat/completions", process.pid)


@contextlib.contextmanager
def _nginx(upstream: str, directory: Path, given: Mapping[str, Any]) -> Iterator[Served]:
    port = _free_port()
    address = upstream.split("/")[2]
    (directory / "nginx.conf").write_text(
        f"daemon off; worker_processes 1; pid {directory}/nginx.pid; error_log {directory}/log;\n"
        f"worker_rlimit_nofile 8192; events {{ worker_connections 4096; }}\n"
        f"http {{ access_log off; client_body_temp_path {directory}/body; proxy_temp_path {directory}/proxy;\n"
        f"fastcgi_temp_path {directory}/f; uwsgi_temp_path {directory}/u; scgi_temp_path {directory}/s;\n"
        f"server {{ listen 127.0.0.1:{port}; location / {{ proxy_pass http://{address}; proxy_http_version 1.1;\n"
        f'proxy_set_header Connection ""; proxy_buffering off; proxy_read_timeout 600s; }} }} }}\n'
    )
    with _running([given["nginx"], "-c", str(directory / "nginx.conf"), "-e", "log"], directory) as process:
        _wait_for(port, process, directory)
        yield Served(port, "/v1/chat/completions", process.pid)


@contextlib.contextmanager
def _litellm(upstream: str, directory: Path, given: Mapping[str, Any]) -> Iterator[Served]:
    port = _free_port()
    (directory / "config.yaml").write_text(
        "model_list:\n- model_name: pacer\n  litellm_params:\n    model: openai/pacer\n"
        f"    api_base: {upstream}\n    api_key: none\n"
        "general_settings:\n  dangerously_permit_weak_or_unset_master_key: true\n"
    )
    command = [given["litellm"], "--config", "config.yaml", "--host", "127.0.0.1", "--port", str(port)]
    environment = {"LITELLM_LOCAL_MODEL_COST_MAP": "True", "LITELLM_LOG": "ERROR", "DISABLE_ADMIN_UI": "True"}
    with _running(command, directory, **environment) as process:
        _wait_for(port, process, directory)
        yield Served(port, "/v1/chat/completions", process.pid)


@contextlib.contextmanager
def _portkey(upstream: str, directory: Path, given: Mapping[str, Any]) -> Iterator[Served]:
    port = _free_port()
    start = Path(given["portkey"]) / "node_modules/@portkey-ai/gateway/build/start-server.js"
    headers = {
        "x-portkey-provider": "openai",
        "x-portkey-custom-host": upstream,
        "authorization": "Bearer none",
    }
    hosts = {"TRUSTED_CUSTOM_HOSTS": "localhost,127.0.0.1"}
    with _running(
        ["node", str(start), f"--port={port}", "--headless"], directory, NODE_ENV="production", **hosts
    ) as process:
        _wait_for(port, process, directory)
        yield Served(port, "/v1/chat/completions", process.pid, headers)


@contextlib.contextmanager
def _direct(upstream: str, _directory: Path, _given: Mapping[str, Any]) -> Iterator[Served]:
    yield Served(int(upstream.rpartition(":")[2].split("/")[0]), "/v1/chat/completions", 0)


SERVE: Mapping[str, Callable[..., contextlib.AbstractContextManager[Served]]] = {
    "ours": _ours,
    "fastapi": _fastapi,
    "nginx": _nginx,
    "litellm": _litellm,
    "portkey": _portkey,
    "direct": _direct,
}


def _processes(pid: int) -> list[int]:
    """Return a process and all below it."""
    found = [pid] if pid else []
    for one in found:
        with contextlib.suppress(OSError):
            for task in Path(f"/proc/{one}/task").iterdir():
                found += map(int, (task / "children").read_text().split())
    return found


def _cpu_s(pid: int) -> float:
    """Return the CPU time, user and system, of a process and all below it."""
    ticks = 0
    for one in _processes(pid):
        with contextlib.suppress(OSError):
            fields = Path(f"/proc/{one}/stat").read_text().rpartition(") ")[2].split()
            ticks += int(fields[11]) + int(fields[12])
    return ticks / _TICKS


def _resident(pid: int) -> int:
    pages = 0
    for one in _processes(pid):
        with contextlib.suppress(OSError):
            pages += int(Path(f"/proc/{one}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


# --- the client ------------------------------------------------------------------------------------------------------


class Reader:
    """Many streams read by one epoll loop; counts events by their `data: `."""

    def __init__(self, served: Served) -> None:
        self.served = served
        self.poll = select.epoll()
        self.open: dict[int, socket.socket] = {}
        self.by_key: dict[str, socket.socket] = {}
        self.cut: dict[int, bytes] = {}
        self.events = 0
        self.ended = 0
        self.failed = 0
        self.waits: array[float] | None = None

    def start(self, key: str, asked: str = "") -> socket.socket:
        """Ask for a stream."""
        served = self.served
        body = json.dumps(
            {
                "model": served.model,
                "messages": [{"role": "user", "content": f"user {key}?{asked}"}],
                "stream": True,
            }
        )
        headers = {
            "host": f"127.0.0.1:{served.port}",
            "content-type": "application/json",
            "content-length": str(len(body)),
            **served.headers,
        }
        head = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
        sock = socket.create_connection(("127.0.0.1", served.port), timeout=60)
        sock.sendall(f"POST {served.path} HTTP/1.1\r\n{head}\r\n{body}".encode())
        sock.setblocking(False)
        self.open[sock.fileno()] = self.by_key[key] = sock
        self.poll.register(sock, select.EPOLLIN)
        return sock

    def read(self, until: float) -> None:
        """Read what comes until a time, or until all have ended."""
        while self.open and (left := until - time.monotonic()) > 0:
            for fd, _ in self.poll.poll(left):
                self._take(fd)

    def _take(self, fd: int) -> None:
        sock = self.open[fd]
        try:
            data = sock.recv(1 << 18)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if self.waits is not None:
            now = time.time()
            self.waits.extend(now - float(stamp) for stamp in _STAMP.findall(data))
        # A mark may be in two reads: then its beginning, not long enough to be one itself, is kept. Where it is in two of
        # HTTP's chunks, as of what cuts anew, it is missed.
        self.events += (self.cut.get(fd, b"") + data).count(b"data: ")
        self.cut[fd] = data[-5:]
        if data.startswith(b"HTTP/1.1 ") and not data.startswith(b"HTTP/1.1 200"):
            self.failed += 1
            raise measure.WorkerError(f"{self.served}: {data[:500]!r}")
        if not data or data.endswith(b"0\r\n\r\n"):
            self.ended += 1
            self.close(fd)

    def close(self, fd: int) -> None:
        sock = self.open.pop(fd)
        self.cut.pop(fd, None)
        self.poll.unregister(sock)
        sock.close()

    def close_all(self) -> None:
        for fd in list(self.open):
            self.close(fd)


# --- what is measured ------------------------------------------------------------------------------------------------


def flood(served: Served, given: Mapping[str, Any]) -> dict[str, Any]:
    streams, events = given["flood_streams"], given["flood_events"]
    reader = Reader(served)
    reader.start("warm", "flood=2000")
    reader.read(time.monotonic() + 60)
    reader.events = reader.ended = 0
    cpu, began = _cpu_s(served.pid), time.monotonic()
    for number in range(streams):
        reader.start(f"f{number}", f"flood={events}")
    reader.read(time.monotonic() + given["flood_s"])
    took = time.monotonic() - began
    if reader.ended != streams or reader.events < 0.99 * streams * events:
        raise measure.WorkerError(f"{reader.ended} of {streams} ended, with {reader.events} events")
    return {
        "flood_us": 1e6 * (_cpu_s(served.pid) - cpu) / (streams * events),
        "flood_rate": streams * events / took,
    }


def paced(served: Served, given: Mapping[str, Any], base_url: str) -> dict[str, Any]:
    told: dict[str, Any] = {}
    for streams in given["paced_streams"]:
        reader = Reader(served)
        rested = _resident(served.pid)
        for number in range(streams):
            reader.start(f"p{streams}-{number}", "stamp=1")
            reader.read(time.monotonic() + 0.005)
        reader.read(time.monotonic() + given["settle_s"])
        cpu, began, reader.events = _cpu_s(served.pid), time.monotonic(), 0
        reader.waits = array("d")
        reader.read(began + given["window_s"])
        took = time.monotonic() - began
        waits = reader.waits or array("d", [took])  # who brought nothing took longer
        told |= {
            f"paced_us_{streams}": 1e6 * (_cpu_s(served.pid) - cpu) / max(1, reader.events),
            f"rate_{streams}": reader.events / took / streams,
            f"p50_{streams}": 1e3 * measure.percentile(waits, 50),
            f"p99_{streams}": 1e3 * measure.percentile(waits, 99),
            f"kib_{streams}": (_resident(served.pid) - rested) / 1024 / streams,
        }
        reader.close_all()
        _until_quiet(base_url)
    return told


def first(served: Served, given: Mapping[str, Any], base_url: str) -> dict[str, Any]:
    waits = []
    for number in range(given["firsts"]):
        reader = Reader(served)
        began = time.monotonic()
        sock = reader.start(f"t{number}", "flood=1")
        data = b""
        while b"data: " not in data:
            select.select([sock], [], [], 30)
            data += sock.recv(1 << 16)
        waits.append(1e3 * (time.monotonic() - began))
        reader.close_all()
    _until_quiet(base_url)
    return {"first_p50": statistics.median(waits), "first_p99": measure.percentile(waits, 99)}


def disconnect(served: Served, given: Mapping[str, Any], base_url: str) -> dict[str, Any]:
    live, closes = given["live"], given["closes"]
    reader = Reader(served)
    for number in range(live + closes):
        reader.start(f"d{number}")
        reader.read(time.monotonic() + 0.005)
    reader.read(time.monotonic() + given["settle_s"])
    at = {}
    for number in range(closes):
        key = f"d{number}"
        at[key] = time.monotonic()
        reader.close(reader.by_key[key].fileno())
        reader.read(time.monotonic() + 0.03)
    reader.read(time.monotonic() + given["settle_s"])
    seen, now = pacer.report(base_url)["closed"], time.monotonic()
    waits = [1e3 * (seen.get(key, now) - when) for key, when in at.items()]  # what is not closed took longer
    reader.close_all()
    _until_quiet(base_url)
    return {
        "close_p50": measure.percentile(waits, 50),
        "close_p99": measure.percentile(waits, 99),
        "unclosed": len(at.keys() - seen.keys()),
    }


def _until_quiet(base_url: str) -> None:
    """Wait until the upstream sends nothing more."""
    give_up = time.monotonic() + 20
    while pacer.report(base_url)["streaming"] and time.monotonic() < give_up:
        time.sleep(0.05)


def worker(given: Mapping[str, Any]) -> dict[str, Any]:
    measure.raise_descriptor_limit()
    told: dict[str, Any] = {}
    with (
        tempfile.TemporaryDirectory() as directory,
        measure.program(str(measure.HERE / "pacer.py"), "--rate", "50") as upstream,
        SERVE[given["name"]](upstream["base_url"], Path(directory), given) as served,
    ):
        base_url = upstream["base_url"]
        if "flood" in given["parts"]:
            told |= flood(served, given)
        if "first" in given["parts"]:
            told |= first(served, given, base_url)
        if "paced" in given["parts"]:
            told |= paced(served, given, base_url)
        if "disconnect" in given["parts"]:
            told |= disconnect(served, given, base_url)
    return told


# --- what is said ----------------------------------------------------------------------------------------------------


def _places(options: Any) -> dict[str, str]:
    """Return where the others are, of those that are there."""
    places = {
        "nginx": shutil.which("nginx", path=f"{os.environ.get('PATH', '')}:/usr/sbin"),
        "litellm": shutil.which(options.litellm or "litellm"),
        "portkey": options.portkey,
    }
    return {name: place for name, place in places.items() if place}


def main() -> None:
    options = measure.arguments(
        __doc__ or "",
        rounds=ROUNDS,
        parts={"part": PARTS},
        texts={"litellm": "the program litellm", "portkey": "where npm has installed Portkey's gateway"},
    )
    if options.worker:
        print(json.dumps(worker(json.loads(options.worker))))
        return
    places = _places(options)
    names = [name for name in CONTENDERS if name in places or name in {"ours", "fastapi", "direct"}]
    quick = options.quick
    given = {
        "parts": options.part,
        "flood_streams": 2 if quick else 8,
        "flood_s": 30 if quick else 300,
        "flood_events": 500 if quick else 20_000,
        "paced_streams": [5] if quick else [50, 200],
        "settle_s": 0.3 if quick else 2.0,
        "window_s": 1.0 if quick else 10.0,
        "firsts": 5 if quick else 200,
        "live": 5 if quick else 100,
        "closes": 5 if quick else 100,
    }
    report = measure.Report("gateway", quick, {"rounds": options.rounds, **given})

    def run(name: str) -> dict[str, Any]:
        return measure.run_worker(SCRIPT, {**given, **places, "name": name}, timeout_s=900)

    results = measure.in_turn(names, options.rounds, run, only=options.only)
    titles: dict[str, tuple[str, str, str]] = {}
    if "flood" in options.part:
        titles["flood_us"] = ("flood: CPU per event", "µs", "flood_rate")
    if "paced" in options.part:
        for streams in given["paced_streams"]:
            titles |= {
                f"paced_us_{streams}": (
                    f"{streams} streams of 50 events/s: CPU per event",
                    "µs",
                    f"rate_{streams}",
                ),
                f"p50_{streams}": (
                    f"{streams} streams: from the upstream's send to the client, p50",
                    "ms",
                    "",
                ),
                f"p99_{streams}": (
                    f"{streams} streams: from the upstream's send to the client, p99",
                    "ms",
                    "",
                ),
                f"kib_{streams}": (f"{streams} streams: memory per stream", "KiB", ""),
            }
    if "first" in options.part:
        titles["first_p50"] = ("to the first byte, p50", "ms", "")
        titles["first_p99"] = ("to the first byte, p99", "ms", "")
    if "disconnect" in options.part:
        titles["close_p50"] = ("disconnect to the upstream's close, p50", "ms", "")
        titles["close_p99"] = ("disconnect to the upstream's close, p99", "ms", "unclosed")
    for field, (title, unit, beside) in titles.items():
        of_process = field.startswith(("flood", "paced", "kib"))
        rows = {
            name: [run[field] for run in runs]
            for name, runs in results.items()
            if not (of_process and name == "direct")
        }
        words = {"unclosed": "{:.0f} not seen to close"}.get(beside, "{:.0f} events/s" if beside else "")
        remarks = {
            name: words.format(statistics.mean(run[beside] for run in runs))
            for name, runs in results.items()
            if beside
        }
        report.table(title, unit, rows, baseline="ours", remarks=remarks)
    print()
    for name in CONTENDERS:
        if name not in names:
            report.note(f"{name} was not there")
    _aims(report, options.part, given)
    report.write(options.json)


def _aims(report: measure.Report, parts: list[str], given: Mapping[str, Any]) -> None:
    if "flood" in parts:
        title = "flood: CPU per event"
        report.aim("flood: LiteLLM / ours", report.ratio(title, "litellm", "ours"), least=20)
        report.aim("flood: ours / FastAPI relay", report.ratio(title, "ours", "fastapi"), most=1)
    if "paced" in parts:
        for streams in given["paced_streams"]:
            title = f"{streams} streams of 50 events/s: CPU per event"
            report.aim(f"{streams} paced: LiteLLM / ours", report.ratio(title, "litellm", "ours"), least=5)
            report.aim(
                f"{streams} paced: ours / FastAPI relay", report.ratio(title, "ours", "fastapi"), most=1
            )
    if "disconnect" in parts:
        title = "disconnect to the upstream's close, p99"
        for other in ("fastapi", "litellm", "portkey"):
            report.aim(f"disconnect, p99: ours / {other}", report.ratio(title, "ours", other), most=1)


if __name__ == "__main__":
    main()
