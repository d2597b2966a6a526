"""`Target`: what a kernel needs to know about the hardware. The only place that asks the hardware."""

from __future__ import annotations

import functools
import reprlib
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch

from halfbyte.errors import InputError


@dataclass(frozen=True)
class Target:
    """One kind of device.

    `arch` is "cpu" or "sm_90" style; `num_sms` counts multiprocessors (CPU: threads); `l2` is the L2 size in bytes; `read_gbps` is
    the memory read ceiling in GB/s (0 where it is not known).
    """

    name: str
    arch: str
    num_sms: int
    l2: int
    read_gbps: float

    @property
    def is_cpu(self) -> bool:
        return self.arch == "cpu"

    @staticmethod
    def of(device: torch.device | str) -> Target:
        """Describe `device`.

        Raises:
            InputError: `device` is neither a CPU nor a CUDA device (meta tensors included), or no device at all.
        """
        if isinstance(device, torch.device) and device.type == "cuda" and device.index is not None:  # what every call of a kernel asks
            return _cuda_target(device.index)
        try:
            device = torch.device(device)
        except (RuntimeError, TypeError, ValueError) as error:
            raise InputError("no such device", where="Target", given=reprlib.repr(device), needed="cpu or cuda") from error
        if device.type == "cpu":
            return Target("CPU", "cpu", torch.get_num_threads(), 0, 0.0)
        if device.type == "cuda":
            return _cuda_target(torch.cuda.current_device() if device.index is None else device.index)
        raise InputError("no kernels for this kind of device", given=device.type, needed="cpu or cuda")


def model_dtype(device: torch.device, asked: str = "auto") -> str:
    """The dtype to load a model in, as transformers names it: `asked`, unless that is "auto", the model's own, and `device` is slow: then "float32".

    Slow is a CPU without instructions for bf16 or AVX512. torch multiplies matrices of bf16 and fp16 element by element there: 512 x 256 by
    256 x 1024 in 42 ms on a core of an AMD EPYC with AVX2, fp32 in 4 (2026-11-30, torch 2.13). fp32 holds such weights exactly, in twice the memory.

    >>> model_dtype(torch.device("cuda")), model_dtype(torch.device("cpu"), asked="bfloat16")
    ('auto', 'bfloat16')
    """
    return "float32" if asked == "auto" and device.type == "cpu" and not _cpu_multiplies_bf16() else asked


def _cpu_multiplies_bf16() -> bool:
    """What torch itself asks before it leaves a product of bf16 matrices to oneDNN."""
    return torch.backends.mkldnn.is_available() and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def free_bytes(device: torch.device) -> int | None:
    """Memory that `device` still has, what torch keeps for itself included; None where the system does not say.

    On a CPU it is what the machine has, or what the limits of the process's container leave of it.
    """
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    available = _numbers(_PROC / "meminfo").get("MemAvailable:")
    return min([*([] if available is None else [1024 * available]), *_within_limits()], default=None)


def _within_limits() -> Iterator[int]:
    """What each memory limit of the process's control groups (versions 1 and 2), and of those around them, leaves.

    Pages of files that nobody uses count as free: Linux drops them first. In a container the path of a group may be the host's; then only the root
    is there, which is the container.
    """
    for line in _lines(_PROC / "self" / "cgroup"):
        _, controllers, path = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        root = _CGROUPS / "memory" if controllers else _CGROUPS
        limit, usage, unused = _VERSION_1 if controllers else _VERSION_2
        group = root / path.lstrip("/")
        for place in (group, *(parent for parent in group.parents if parent.is_relative_to(root))):
            values = [next(iter(_lines(place / name)), "") for name in (limit, usage)]
            if all(map(str.isdecimal, values)):
                yield max(0, int(values[0]) - int(values[1]) + _numbers(place / "memory.stat").get(unused, 0))


def _numbers(file: Path) -> dict[str, int]:
    """The second word of each line by its first."""
    return {words[0]: int(words[1]) for words in map(str.split, _lines(file)) if len(words) > 1 and words[1].isdecimal()}


def _lines(file: Path) -> list[str]:
    try:
        return file.read_text().splitlines()
    except OSError:
        return []


def current(device: torch.device) -> AbstractContextManager[object]:
    """Make `device` the current CUDA device within: Triton launches there. Does nothing where it is so already, or on a CPU."""
    if device.type != "cuda" or device.index in (None, torch.cuda.current_device()):
        return nullcontext()
    return torch.cuda.device(device)


@contextmanager
def on_default_stream(device: torch.device) -> Iterator[None]:
    """Within, the default stream of a CUDA device is the current one; behind, the one that was waits for it. Does nothing on a CPU."""
    if device.type != "cuda":
        yield
        return
    before, default = torch.cuda.current_stream(device), torch.cuda.default_stream(device)
    default.wait_stream(before)
    with torch.cuda.stream(default):
        yield
    before.wait_stream(default)


_PROC, _CGROUPS = Path("/proc"), Path("/sys/fs/cgroup")
# Files with the limit ("max" for none) and the usage of a control group, and the line of memory.stat with the bytes of files that can be dropped.
_VERSION_1 = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
_VERSION_2 = ("memory.max", "memory.current", "inactive_file")

# Read bandwidth in GB/s: measured for the H200 (docs/lab-notes/2026-11-26.md), otherwise the vendor's data sheet.
_READ_GBPS = {"H200": 4600.0, "H100": 3350.0, "H20": 4000.0, "B200": 8000.0, "A100": 2039.0}


@functools.cache
def _cuda_target(index: int) -> Target:
    properties = torch.cuda.get_device_properties(index)
    gbps = next((value for key, value in _READ_GBPS.items() if key in properties.name), 0.0)
    return Target(
        name=properties.name,
        arch=f"sm_{properties.major}{properties.minor}",
        num_sms=properties.multi_processor_count,
        l2=properties.L2_cache_size,
        read_gbps=gbps,
    )
