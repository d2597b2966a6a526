"""An engine with and without halfbyte, one process after the other on the same weights: its start and checks, its throughput, its server."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from halfbyte.bench.serve_checks import LAYER_LIMITS
from halfbyte.bench.serve_client import Goodput, Requests, send_requests
from halfbyte.bench.serve_engines import ENVIRONMENT, WITHOUT_PLUGINS, Plan
from halfbyte.bench.serve_rows import ServerRow, StartRow, ThroughputRow, Workload
from halfbyte.bench.serve_weights import GEOMETRIES
from halfbyte.bench.serve_worker import vocabulary_of
from halfbyte.errors import HalfbyteError
from halfbyte.formats.activation_formats import ActivationFormat
from halfbyte.serve import ENGINES, Launch, Server, reserve_port

_PEER_LIMIT = 1e-2  # of the error of a layer of the engine's own; Marlin's was 5e-3
Row = StartRow | ThroughputRow | ServerRow


@dataclass(frozen=True)
class System:
    """What is measured: `name` is "stock", another backend of the engine's own, or "halfbyte" with its activations."""

    name: str
    activations: ActivationFormat = "bf16"

    @property
    def is_ours(self) -> bool:
        return self.name == "halfbyte"

    @property
    def layer_limit(self) -> float:
        return LAYER_LIMITS[self.activations] if self.is_ours else _PEER_LIMIT

    def __str__(self) -> str:
        return self.name if self.activations == "bf16" else f"{self.name}, {self.activations}"


@dataclass(frozen=True)
class Options:
    """What is measured, and how.

    Attributes:
        engine: a key of `serve_engines.OFFLINE`; version: of its package.
        model: a directory; "" with a geometry.
        geometry: a key of `GEOMETRIES`; "" with a model.
        workloads: those without a server.
        requests: those to the server; None starts no server.
        goodput: limits of a good request.
        engine_options: of the engine's command line.
        repeats, seed: how often each workload is timed at least; of weights and prompts.
        limit_s: seconds after which a system's process is ended.
        logs: a directory that keeps what the engines print.
    """

    engine: str
    version: str
    model: str
    geometry: str
    workloads: Sequence[Workload]
    requests: Requests | None = None
    goodput: Goodput = field(default_factory=Goodput)
    engine_options: tuple[str, ...] = ()
    repeats: int = 2
    seed: int = 0
    limit_s: float | None = None
    logs: Path | None = None

    @property
    def title(self) -> str:
        return self.geometry or Path(self.model).name

    def fields(self, system: System) -> dict[str, Any]:
        """What all rows of a system have."""
        return {"model": self.title, "engine": f"{self.engine} {self.version}", "system": str(system)}


def bench_serve(options: Options, systems: Sequence[System]) -> Iterator[Row]:
    """Measure each system in turn; speed-ups are over the first, workload by workload.

    A system whose layer is wrong, or whose tokens differ from run to run though it is ours, is refused, and with it all that it would have timed.
    """
    base: dict[Workload, float] = {}
    for system in systems:
        with tempfile.TemporaryDirectory(prefix="halfbyte-bench-") as scratch:
            start: StartRow | None = None
            for row in _offline(options, system, Path(scratch)):
                if isinstance(row, ThroughputRow) and row.seconds is not None:
                    if system is systems[0]:
                        base[row.workload] = row.seconds
                    elif row.workload in base:
                        row = replace(row, speedup=base[row.workload] / row.seconds)
                start = row if isinstance(row, StartRow) else start
                yield row
            if options.requests is not None and start is not None and start.status == "ok":
                yield _serve(options, system, options.requests, Path(scratch))


def _offline(options: Options, system: System, scratch: Path) -> Iterator[StartRow | ThroughputRow]:
    fields = options.fields(system)
    pending = dict(enumerate(options.workloads))
    start: StartRow | None = None
    log = _log(options, system, scratch, "offline")
    with _worker(_plan(options, system, scratch), system, log, options.limit_s) as events:
        for event in events:
            if "start" in event:
                start = _judged(StartRow(**fields, status="ok", layer_limit=system.layer_limit, **event["start"]), system)
                yield start
                if start.status == "refused":
                    break
            else:
                workload = pending.pop(event.pop("index"))
                yield ThroughputRow(**fields, status="ok", workload=workload, tokens_per_s=workload.tokens / event["seconds"], **event)
    status, reason = ("refused", start.reason) if start is not None and start.status == "refused" else ("skipped", _last_line(log))
    if start is None:
        yield StartRow(**fields, status="skipped", reason=reason)
    for workload in pending.values():
        yield ThroughputRow(**fields, status=status, reason=reason, workload=workload)  # type: ignore[arg-type]


def _plan(options: Options, system: System, scratch: Path) -> Plan:
    return Plan(
        engine=options.engine,
        system=system.name,
        activations=system.activations,
        model=str(GEOMETRIES[options.geometry].directory()) if options.geometry else options.model,
        geometry=options.geometry,
        seed=options.seed,
        options=keyword_arguments(options.engine_options),
        workloads=[asdict(workload) for workload in options.workloads],
        repeats=options.repeats,
        scratch=str(scratch),
        launched=time.time(),
    )


def keyword_arguments(options: Sequence[str]) -> dict[str, Any]:
    """Options of a command line as the engine's Python interface takes them.

    >>> keyword_arguments(["--max-model-len", "512", "--enforce-eager", "--dtype=float16"])
    {'max_model_len': 512, 'enforce_eager': True, 'dtype': 'float16'}
    """
    arguments: dict[str, Any] = {}
    for option in options:
        if option.startswith("--"):
            name, has_value, value = option[2:].partition("=")
            name = name.replace("-", "_")
            arguments[name] = _value(value) if has_value else True
        elif arguments:
            arguments[next(reversed(arguments))] = _value(option)
    return arguments


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text


def _judged(row: StartRow, system: System) -> StartRow:
    """The row, refused where a result is wrong."""
    reason = ""
    if row.layer_error is not None and not row.layer_error <= system.layer_limit:
        reason = f"a layer is {row.layer_error:.1e} from fp32 (limit {system.layer_limit:.0e})"
    elif system.is_ours and row.layer_error is None:
        reason = f"no layer was compared with fp32: {row.checked}"
    elif system.is_ours and row.repeats is False:
        reason = "the same prompts gave other tokens the second time"
    return replace(row, status="refused" if reason else "ok", reason=reason)


@contextlib.contextmanager
def _worker(plan: Plan, system: System, log: Path, limit_s: float | None) -> Iterator[Iterator[dict[str, Any]]]:
    """A process of `serve_worker`: its events, as they come. What it prints goes to `log`. It ends with the block, or after `limit_s` seconds."""
    file = Path(plan.scratch) / "plan.json"
    plan.write(file)
    command = [sys.executable, "-m", "halfbyte.bench.serve_worker", str(file)]
    with log.open("wb") as errors:
        environment = _environment(plan.engine, system)
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True, env=environment, start_new_session=True)
        alarm = threading.Timer(limit_s or threading.TIMEOUT_MAX, _kill, [process.pid])
        alarm.daemon = True
        alarm.start()
        try:
            assert process.stdout is not None
            yield (json.loads(line) for line in process.stdout)
        finally:
            alarm.cancel()
            _kill(process.pid)
            process.wait()


def _environment(engine: str, system: System) -> dict[str, str]:
    """Of a system's process: without plug-ins where it is the engine alone."""
    return {**os.environ, **ENVIRONMENT[engine], **({} if system.is_ours else WITHOUT_PLUGINS[engine])}


def _log(options: Options, system: System, scratch: Path, kind: str) -> Path:
    """The file for what the system's process prints."""
    words = (options.title, options.engine, system.name, system.activations, kind)
    return (options.logs or scratch) / f"{'-'.join(words)}.log"


def _kill(group: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(group, signal.SIGKILL)


def _last_line(log: Path) -> str:
    lines = [line.strip() for line in log.read_text(errors="replace").replace("\r", "\n").splitlines() if line.strip()]
    return f"the engine ended: {lines[-1][:300]}" if lines else "the engine ended without a word"


def _serve(options: Options, system: System, requests: Requests, scratch: Path) -> ServerRow:
    """The engine's server under load."""
    workload = Workload("server", requests.num_requests, requests.tokens_in, requests.tokens_out)
    fields = {**options.fields(system), "workload": workload, "concurrency": requests.concurrency}
    engine = ENGINES[options.engine]
    with reserve_port("127.0.0.1", 0) as reserved, _log(options, system, scratch, "server").open("wb") as log:
        own = () if system.is_ours or system.name == "stock" else (_BACKEND_OPTION[options.engine], system.name)
        launch = Launch(
            options.model, options.title, port=reserved.getsockname()[1], activations=system.activations, options=(*own, *options.engine_options)
        )
        server = Server(engine.command(launch), launch, log, environment=_environment(options.engine, system))
        try:
            server.wait_until_ready()
            numbers = send_requests(launch, requests, vocabulary_of(options.model), options.goodput, options.seed)
            return ServerRow(**fields, status="ok", **numbers)
        except HalfbyteError as error:
            return ServerRow(**fields, status="skipped", reason=str(error).splitlines()[0])
        finally:
            server.stop()


_BACKEND_OPTION: Mapping[str, str] = {"vllm": "--moe-backend", "sglang": "--moe-runner-backend"}
