"""What this machine can do at most, measured in the run that uses it: memory bandwidth and matrix products."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch

from halfbyte.bench.timing import time_calls

_CUDA_BYTES = 4 << 30  # far above any L2
_CPU_BYTES = 256 << 20  # above the caches of most CPUs
_CUDA_SIDE, _CPU_SIDE = 8192, 1024


@dataclass(frozen=True)
class Ceilings:
    """Measured limits of one device.

    Attributes:
        read_gbps: reading only, GB/s.
        copy_gbps: copying, GB/s, each byte counted twice (read and written).
        bf16_tflops: a square matrix product of random numbers in bf16 (on a CPU in fp32, which its reference kernel computes in).
        fp8_tflops: the same in e4m3; None where the device has none.
    """

    read_gbps: float
    copy_gbps: float
    bf16_tflops: float
    fp8_tflops: float | None

    def matmul_tflops(self, activations: str) -> float:
        """The rate that `activations` could reach: 8-bit and 4-bit ones that of fp8, where there is one (of 4-bit MMA we know no measurement)."""
        return self.bf16_tflops if activations == "bf16" or self.fp8_tflops is None else self.fp8_tflops


def measure_ceilings(device: torch.device) -> Ceilings:
    """Measure `device`, in about two seconds; needs 8 GiB on a GPU, 512 MiB on a CPU, for the time it takes."""
    return _cuda_ceilings(device) if device.type == "cuda" else _cpu_ceilings()


def measure_copy_gbps(device: torch.device) -> float:
    """Copying alone, GB/s, each byte counted twice."""
    nbytes = _CUDA_BYTES if device.type == "cuda" else _CPU_BYTES
    source = torch.ones(nbytes // 4, dtype=torch.int32, device=device)
    target = torch.empty_like(source)
    return _gbps(2 * nbytes, time_calls([lambda: target.copy_(source)], device, graph=False).median_us)  # in a graph it may go to a copy engine


def _cpu_ceilings() -> Ceilings:
    cpu = torch.device("cpu")
    source = torch.ones(_CPU_BYTES // 4, dtype=torch.float32)
    matrix = torch.randn(_CPU_SIDE, _CPU_SIDE, dtype=torch.float32)
    read_us = time_calls([source.sum], cpu).median_us
    matmul_us = time_calls([lambda: matrix @ matrix.T], cpu).median_us
    return Ceilings(_gbps(_CPU_BYTES, read_us), measure_copy_gbps(cpu), _tflops(_CPU_SIDE, matmul_us), None)


def _cuda_ceilings(device: torch.device) -> Ceilings:
    read_gbps, copy_gbps = _cuda_bandwidth(device)
    # Random numbers: on zeros the multipliers draw less power and the card clocks higher than any real work lets it.
    a, b = (torch.randn(_CUDA_SIDE, _CUDA_SIDE, dtype=torch.bfloat16, device=device) for _ in range(2))
    bf16_us = time_calls([lambda: a @ b.T], device, sample_ms=300).median_us
    fp8_tflops = None
    if torch.cuda.get_device_capability(device) >= (8, 9):
        a8, b8, one = a.to(torch.float8_e4m3fn), b.to(torch.float8_e4m3fn), torch.ones((), dtype=torch.float32, device=device)

        def product() -> torch.Tensor:
            return torch._scaled_mm(a8, b8.T, one, one, out_dtype=torch.bfloat16, use_fast_accum=True)

        fp8_tflops = _tflops(_CUDA_SIDE, time_calls([product], device, sample_ms=300).median_us)
    return Ceilings(read_gbps, copy_gbps, _tflops(_CUDA_SIDE, bf16_us), fp8_tflops)


def _cuda_bandwidth(device: torch.device) -> tuple[float, float]:
    """Read and copy, GB/s."""
    from halfbyte.bench.read_kernel import CONFIGS, read_all

    source = torch.empty(_CUDA_BYTES // 4, dtype=torch.int32, device=device).random_()
    read_us = min(time_calls([functools.partial(read_all, source, config)], device).median_us for config in CONFIGS)
    del source
    return _gbps(_CUDA_BYTES, read_us), measure_copy_gbps(device)


def _gbps(nbytes: int, us: float) -> float:
    return nbytes / us / 1e3


def _tflops(side: int, us: float) -> float:
    return 2 * side**3 / us / 1e6
