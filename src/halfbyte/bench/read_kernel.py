"""A kernel that only reads: the measure of memory bandwidth. Imported on CUDA devices alone."""

import torch
import triton
import triton.language as tl

# (elements a step, steps, warps) of one program: which is fastest differs between cards, so all are tried.
CONFIGS = ((2048, 16, 4), (4096, 16, 8), (4096, 64, 8), (8192, 32, 8), (8192, 8, 16))


@triton.jit
def _read(source, result, block: tl.constexpr, steps: tl.constexpr):  # type: ignore[no-untyped-def]
    program = tl.program_id(0).to(tl.int64)
    offsets = program * block * steps + tl.arange(0, block)
    total = tl.zeros((block,), dtype=tl.int32)
    for step in range(steps):
        total ^= tl.load(source + offsets + step * block)
    tl.store(result + program, tl.sum(total, 0))


def read_all(source: torch.Tensor, config: tuple[int, int, int]) -> torch.Tensor:
    """Read every element of `source` (int32, a multiple of block x steps elements) once; the result keeps the loads alive."""
    block, steps, num_warps = config
    programs = source.numel() // (block * steps)
    result = torch.empty(programs, dtype=torch.int32, device=source.device)
    _read[(programs,)](source, result, block, steps, num_warps=num_warps, enable_fp_fusion=True)
    return result
