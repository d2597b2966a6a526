"""Engines as processes: what is started, how it is watched, how it ends. The engine here is a few lines of Python."""

from __future__ import annotations

import io
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from types import SimpleNamespace

import pytest

from halfbyte import device, serve
from halfbyte.errors import CheckpointError, HalfbyteError, InputError, UnsupportedError
from halfbyte.serve import ENGINES, Launch, Server, choose_engine, model_argument, reserve_port

HEALTHY = """
import http.server, subprocess, sys
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200 if self.path == "/health" else 404)
        self.end_headers()
print("child", child.pid, flush=True)
server = http.server.HTTPServer(("127.0.0.1", int(sys.argv[1])), Handler)
"""
SERVING = HEALTHY + "server.serve_forever()"
STUBBORN = HEALTHY + "import signal; signal.signal(signal.SIGINT, signal.SIG_IGN); server.serve_forever()"
LEAVING = HEALTHY + "server.handle_request(); child.kill(); sys.exit('no memory left')"
BROKEN = "import sys; print('loading 10%\\rloading 20%'); sys.exit('RuntimeError: no such tensor')"


@contextmanager
def started(source: str) -> Iterator[tuple[Server, io.BytesIO]]:
    reserved, log = reserve_port("127.0.0.1", 0), io.BytesIO()
    launch = Launch("model", "model", port=reserved.getsockname()[1])
    server = Server([sys.executable, "-c", source, str(launch.port)], launch, log)
    try:
        yield server, log
    finally:
        server.stop()
        reserved.close()


def child_of(log: io.BytesIO) -> int:
    return int(log.getvalue().decode().split("child ")[1].split()[0])


def is_running(pid: int) -> bool:
    """Whether the process runs; one that ended and that nobody waited for does not."""
    try:
        with open(f"/proc/{pid}/stat") as stat:  # noqa: PTH123 - not a file of ours
            return stat.read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.parametrize("source", [SERVING, STUBBORN])
def test_nothing_is_left_of_a_stopped_engine(source: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serve, "_STOP_S", 1.0)
    with started(source) as (server, log):
        server.wait_until_ready()
        child = child_of(log)
        assert is_running(child)
        server.stop()
        deadline = time.monotonic() + 60
        while is_running(child) and time.monotonic() < deadline:
            time.sleep(0.05)
        assert not is_running(child)


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells a child that its parent has ended")
def test_an_engine_ends_with_a_process_that_is_killed() -> None:
    program = "import sys; from halfbyte.serve import Launch, Server; server = Server([sys.executable, '-c', sys.argv[1], '0'], Launch('m', 'm'));"
    program += "print(server._process.pid, flush=True); server.wait()"
    with subprocess.Popen([sys.executable, "-c", program, SERVING], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as parent:
        engine, child = int(parent.stdout.readline()), int(parent.stderr.readline().split()[1])
        parent.kill()
        deadline = time.monotonic() + 60
        while is_running(engine) and time.monotonic() < deadline:
            time.sleep(0.05)
        os.kill(child, signal.SIGKILL)  # engines end their own children, this one does not
        assert not is_running(engine)


def test_an_engine_outlives_the_thread_that_started_it() -> None:
    with ThreadPoolExecutor(1) as pool:
        server = pool.submit(Server, [sys.executable, "-c", "import time; print('loading', flush=True); time.sleep(600)"], Launch("m", "m")).result()
    try:
        with pytest.raises(subprocess.TimeoutExpired):
            server._process.wait(0.5)
    finally:
        server.stop()


def test_an_engine_goes_on_when_nobody_reads_its_log() -> None:
    class Closed(io.BytesIO):
        def write(self, block: object) -> int:
            raise BrokenPipeError

    server = Server([sys.executable, "-c", "print('x' * 1_000_000); raise SystemExit('it got so far')"], Launch("model", "model"), Closed())
    with pytest.raises(HalfbyteError, match=r"the engine ended .*it got so far"):
        server.wait()


def test_an_engine_that_cannot_start_is_quoted() -> None:
    with (
        started(BROKEN) as (server, log),
        pytest.raises(HalfbyteError, match=r"before it was ready \(given exit code 1, RuntimeError: no such tensor\)"),
    ):
        server.wait_until_ready()
    assert b"loading 20%" in log.getvalue()


def test_an_engine_that_ends_later_is_quoted() -> None:
    with started(LEAVING) as (server, _):
        server.wait_until_ready()
        with pytest.raises(HalfbyteError, match=r"model: the engine ended \(given exit code 1, no memory left\)"):
            server.wait()


def test_a_taken_port_is_an_error_at_once() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(InputError, match=r"cannot listen there.*--port 0"):
            reserve_port("127.0.0.1", taken.getsockname()[1])


def test_a_reserved_port_is_not_given_to_others() -> None:
    with reserve_port("127.0.0.1", 0) as reserved, socket.socket() as other, pytest.raises(OSError, match="in use"):
        other.bind(reserved.getsockname())


def test_urls_reach_this_machine() -> None:
    assert Launch("m", "m", host="::", port=1).url == "http://[::1]:1"
    assert Launch("m", "m", host="localhost", port=1).url == "http://localhost:1"


def pretend(monkeypatch: pytest.MonkeyPatch, *installed: str, plugins: tuple[str, ...] = ()) -> None:
    monkeypatch.setattr(serve.importlib.util, "find_spec", lambda name: name if name in installed else None)
    monkeypatch.setattr(serve.metadata, "entry_points", lambda group: [SimpleNamespace(value=value) for value in plugins])


def test_auto_takes_what_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    ours = ("other.plugin:load", "halfbyte.integrations.engine:register")
    pretend(monkeypatch, "sglang", "transformers", plugins=ours)
    assert choose_engine("auto").name == "sglang"
    pretend(monkeypatch, "vllm", "sglang", plugins=ours)
    assert choose_engine("auto").name == "vllm" and choose_engine("sglang").name == "sglang"
    pretend(monkeypatch, "transformers", "fastapi", "uvicorn", "openai")
    assert choose_engine("auto").name == "transformers"


def test_an_engine_that_is_missing_or_does_not_know_halfbyte(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, "transformers", "uvicorn")
    with pytest.raises(UnsupportedError, match=r"transformers cannot serve \(given no fastapi, openai\)\. Run: pip install 'halfbyte\[serve\]'"):
        choose_engine("auto")
    pretend(monkeypatch, "vllm", plugins=("other.plugin:load",))
    with pytest.raises(UnsupportedError, match=r"vllm does not see halfbyte \(given no entry point of halfbyte in vllm\.general_plugins\)"):
        choose_engine("auto")


@pytest.mark.parametrize("name", ENGINES)
def test_commands_name_model_place_and_options(name: str) -> None:
    command = ENGINES[name].command(Launch("/models/m", "m", host="127.0.0.1", port=81, options=("--max-model-len", "512")))
    assert command[0] == sys.executable and "/models/m" in command and command[-2:] == ["--max-model-len", "512"]
    assert command[command.index("--host") + 1] == "127.0.0.1" and command[command.index("--port") + 1] == "81"


@pytest.mark.parametrize(("engine", "option"), [("vllm", "--additional-config"), ("sglang", "--json-model-override-args")])
def test_activations_reach_the_plugin(engine: str, option: str) -> None:
    command = ENGINES[engine].command(Launch("m", "m", activations="fp8"))
    assert json.loads(command[command.index(option) + 1]) == {"halfbyte": {"activations": "fp8"}}
    with pytest.raises(InputError, match="given twice"):
        ENGINES[engine].command(Launch("m", "m", activations="fp8", options=(f"{option}={{}}",)))
    assert option not in ENGINES[engine].command(Launch("m", "m"))


@pytest.mark.parametrize(
    ("options", "added"),
    [((), True), (("--device", "cpu"), True), (("--device=cuda",), False), (("--dtype=bfloat16",), False), (("--dtype", "float32"), False)],
)
def test_a_slow_cpu_serves_in_fp32(options: tuple[str, ...], added: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "_cpu_multiplies_bf16", lambda: False)
    monkeypatch.setattr(serve.torch.accelerator, "is_available", lambda: False)
    command = ENGINES["transformers"].command(Launch("m", "m", options=options))
    assert command[len(command) - len(options) :] == list(options)
    assert (command[-2 - len(options) : len(command) - len(options)] == ["--dtype", "float32"]) == added


def test_models_are_directories_or_left_to_the_engine(tmp_path) -> None:
    assert model_argument("org/name") == "org/name"
    assert model_argument(str(tmp_path)) == str(tmp_path)
    assert model_argument("demo").endswith("demo_model")
    with pytest.raises(CheckpointError, match="not a model directory"):
        model_argument("./org/name")
