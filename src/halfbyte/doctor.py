"""`report`: what halfbyte finds on this machine. Each probe stands alone, so a broken part is one line of the report and never its end."""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import itertools
import os
import platform
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import halfbyte
from halfbyte import env
from halfbyte.errors import HalfbyteError

OPTIONAL_PACKAGES = {"transformers": "hf", "accelerate": "hf", "huggingface_hub": "hf", "matplotlib": "bench", "flashinfer-python": "flashinfer"}


@dataclass(frozen=True)
class Finding:
    """One line of the report; `ok` is False only for what is broken, not for what is merely absent."""

    section: str
    name: str
    value: str
    ok: bool = True


Probe = Callable[[], Iterable[tuple[str, str]]]


def report() -> list[Finding]:
    """Run every probe, in order. A probe that fails gives one finding with `ok` False and the error's text.

    >>> from halfbyte.doctor import report
    >>> [finding.value for finding in report() if finding.name == "halfbyte"] == [halfbyte.__version__]
    True
    """
    probes: list[tuple[str, str, Probe]] = [
        ("software", "python", _python),
        ("software", "torch", lambda: _imported("torch")),
        ("software", "triton", lambda: _imported("triton")),
        ("software", "safetensors", lambda: _imported("safetensors")),
        *(("software", name, lambda name=name, extra=extra: _installed(name, extra)) for name, extra in OPTIONAL_PACKAGES.items()),
        ("hardware", "cpu", _cpu),
        ("hardware", "cuda", _gpus),
        ("settings", "cache directory", _cache_directory),
        ("settings", "environment", _environment),
        ("kernels", "kernel table", lambda: itertools.chain(_layers(), _kernels(), _tables())),
    ]
    findings: list[Finding] = []
    for section, name, probe in probes:
        try:
            findings += [Finding(section, *line) for line in probe()]
        except (ImportError, OSError, RuntimeError, AttributeError, HalfbyteError) as error:
            findings.append(Finding(section, name, f"broken: {type(error).__name__}: {error}", ok=False))
    return findings


def verdict(findings: list[Finding]) -> str:
    """In one line: whether FP4 MoE layers run here, on what, and how fast."""
    broken = [finding.name for finding in findings if not finding.ok]
    if any(name in broken for name in ("torch", "kernel table")):
        return f"FP4 MoE does not run here: {', '.join(broken)} broken"
    return f"FP4 MoE runs here: {'; '.join(_layer_kernels())}" + (f"; broken: {', '.join(broken)}" if broken else "")


def next_step() -> str:
    """What to try first on this machine."""
    if not all(importlib.util.find_spec(name) for name in ("transformers", "matplotlib")):
        return "pip install 'halfbyte[demo]', then: halfbyte demo"
    return "halfbyte demo"


def render(findings: list[Finding]) -> str:
    """Lay the findings out as aligned text under their section names, broken ones marked with an exclamation mark."""
    width = max(len(finding.name) for finding in findings)
    lines: list[str] = []
    for index, finding in enumerate(findings):
        if index == 0 or finding.section != findings[index - 1].section:
            lines += ["", finding.section]
        lines.append(f"{'  ' if finding.ok else '! '}{finding.name:<{width}}  {finding.value}")
    return "\n".join(lines[1:])


def _python() -> Iterable[tuple[str, str]]:
    yield "halfbyte", halfbyte.__version__
    yield "python", f"{platform.python_version()} ({sys.executable})"
    yield "platform", platform.platform()


def _imported(name: str) -> Iterable[tuple[str, str]]:
    """Import for real: a wheel that does not fit the machine only fails there."""
    module = importlib.import_module(name)
    yield name, getattr(module, "__version__", importlib.metadata.version(name))


def _installed(name: str, extra: str) -> Iterable[tuple[str, str]]:
    try:
        yield name, importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        yield name, f"not installed (optional: pip install 'halfbyte[{extra}]')"


def _cpu() -> Iterable[tuple[str, str]]:
    cpuinfo = Path("/proc/cpuinfo")
    names = [line.partition(":")[2].strip() for line in cpuinfo.read_text().splitlines() if line.startswith("model name")] if cpuinfo.exists() else []
    yield "cpu", f"{names[0] if names else platform.machine()}, {os.cpu_count()} cores"


def _gpus() -> Iterable[tuple[str, str]]:
    import torch

    from halfbyte.device import Target

    if not torch.cuda.is_available():
        yield "cuda", "no device" if torch.version.cuda else "no device (this torch is built without CUDA)"
        return
    for index in range(torch.cuda.device_count()):
        target = Target.of(f"cuda:{index}")
        size = torch.cuda.get_device_properties(index).total_memory / 2**30
        yield f"cuda:{index}", f"{target.name}, {target.arch}, {target.num_sms} SMs, {size:.0f} GiB, {target.read_gbps or 'unknown'} GB/s"


def _cache_directory() -> Iterable[tuple[str, str]]:
    path = env.cache_dir()
    existing = next(parent for parent in (path, *path.absolute().parents) if parent.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
        raise PermissionError(f"cannot write to {path}: {existing} is {'not writable' if existing.is_dir() else 'not a directory'}")
    yield "cache directory", f"{path} ({'writable' if existing == path else 'not there yet, can be created'})"


def _environment() -> Iterable[tuple[str, str]]:
    for variable in env.VARIABLES:
        yield variable.name, variable.get() or f"not set: {variable.meaning}"


def _layer_kernels() -> Iterable[str]:
    """Of every kind of device: the kernel of an NVFP4 layer prepared for it."""
    import torch

    from halfbyte.device import Target
    from halfbyte.formats import NVFP4
    from halfbyte.kernels.problem import Problem
    from halfbyte.kernels.table import choose, wanted_layout

    gpus = [Target.of(f"cuda:{index}") for index in range(torch.cuda.device_count())]
    for target in dict.fromkeys(gpus) or [Target.of("cpu")]:
        layout, _ = wanted_layout(Problem("fused_moe", target, NVFP4, activations="bf16"))
        kernel = choose(Problem("fused_moe", target, NVFP4, layout, "bf16", torch.bfloat16, num_experts=8, hidden=1024, intermediate=1024)).name
        on = "CPU, no GPU found" if target.is_cpu else f"{gpus.count(target)} x {target.name}"
        yield f"{on}, {'plain torch, for trying out' if kernel == 'reference' else f'kernel {kernel!r}'}"


def _tables() -> Iterable[tuple[str, str]]:
    """On every GPU: the tables of configurations that calls look into, in order."""
    import torch

    from halfbyte.device import Target
    from halfbyte.kernels.tuned import tables_for

    for target in dict.fromkeys(Target.of(f"cuda:{index}") for index in range(torch.cuda.device_count())):
        for origin, table in tables_for(target):
            won = sum(race.config is not None for layer in table.layers for race in layer.races)
            yield f"{target.arch} tuning", f"{origin}: {len(table.layers)} layers of {table.device.name}, {won} buckets in which the rule lost"


def _layers() -> Iterable[tuple[str, str]]:
    """On every device: the layout that `prepare` takes for calibrated experts, and the kernel that reads it."""
    import torch

    from halfbyte.device import Target
    from halfbyte.formats import FORMATS
    from halfbyte.formats.activation_formats import ACTIVATION_FORMATS
    from halfbyte.kernels.problem import Problem
    from halfbyte.kernels.table import support, wanted_layout

    devices = ["cpu", *(f"cuda:{index}" for index in range(torch.cuda.device_count()))]
    for target in dict.fromkeys(Target.of(device) for device in devices):
        for format in FORMATS.values():
            for activations in ACTIVATION_FORMATS:
                problem = Problem("fused_moe", target, format, activations=activations, dtype=torch.bfloat16, calibrated=True)
                layout, _ = wanted_layout(problem)
                kernel = next(name for name, answer in support(problem._replace(layout=layout)).items() if answer.runs)
                yield f"{target.arch} {format!r} x {activations}", f"{kernel}, layout {layout}"


def _kernels() -> Iterable[tuple[str, str]]:
    """Every kernel of the table on every device (bf16 activations), with the reason where it cannot be used."""
    import torch

    from halfbyte.device import Target
    from halfbyte.formats import FORMATS
    from halfbyte.kernels.problem import Problem
    from halfbyte.kernels.table import PROVIDERS, support
    from halfbyte.weights.layouts import LAYOUTS

    layouts = [name for name, layout in LAYOUTS.items() if not layout.foreign]
    weights = [(format, layout) for format in (*FORMATS.values(), None) for layout in layouts if format or layout == "canonical"]
    devices = ["cpu", *(f"cuda:{index}" for index in range(torch.cuda.device_count()))]
    for target in dict.fromkeys(Target.of(device) for device in devices):
        for op in PROVIDERS:
            is_layer = op in ("fused_moe", "expert_rows")
            for format, layout in weights if is_layer else [(None, None)]:
                label = f"{target.arch} {op}" + (f" {repr(format) if format else 'dense'} {layout}" if layout else "")
                for name, answer in support(Problem(op, target, format, layout, "bf16" if is_layer else None, torch.bfloat16)).items():
                    verdict = {"yes": "yes", "slow": "yes, slowly", "no": f"no: {answer.reason}"}[answer.verdict]
                    yield label, f"{name}: {verdict}"
