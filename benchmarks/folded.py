"""What NVFP4 weights folded to FP8 could gain: torch's grouped fp8 product, which reads 8-bit weights, beside ours, which decodes 4-bit ones.

    python benchmarks/folded.py        # one sm_90 GPU

Each line is GEMM1 of a layer with so many rows per expert: TFLOP/s of `torch._scaled_grouped_mm` (CUTLASS, scales of rows) and of the kernel that
`fused_moe(activations="fp8")` chooses. See docs/weights.md, "Residency".
"""

from __future__ import annotations

from functools import partial

import torch

import halfbyte as hb
from halfbyte.bench.inputs import random_experts
from halfbyte.bench.shapes import NAMED_SHAPES
from halfbyte.bench.timing import time_calls
from halfbyte.kernels.problem import Size
from halfbyte.kernels.shared.sort import run as sort
from halfbyte.kernels.sm90 import expert_rows
from halfbyte.kernels.sm90.quantize_rows import quantize_tokens
from halfbyte.weights.hopper.layout import padded_size

ROWS = {"qwen3-235b": (64, 128, 256, 1024), "dsr1": (64, 128, 256), "mixtral": (256, 1024, 2048)}
DEVICE = torch.device("cuda")
OPTIONS = {"out_dtype": torch.bfloat16, "use_fast_accum": True}


def measure(name: str, rows: int) -> tuple[float, float]:
    """TFLOP/s of torch and of ours, every expert with `rows` rows."""
    shape = NAMED_SHAPES[name]
    count, columns, features = shape.num_experts * rows, shape.hidden, 2 * shape.intermediate
    flops = 2 * count * columns * features
    folded = torch.randint(0, 0x77, (shape.num_experts, features, columns), dtype=torch.uint8, device=DEVICE).view(torch.float8_e4m3fn)
    x, x_scale = torch.randn(count, columns, device=DEVICE).to(torch.float8_e4m3fn), torch.ones(count, device=DEVICE)
    w_scale, ends = (
        torch.ones((shape.num_experts, features), device=DEVICE),
        torch.arange(1, shape.num_experts + 1, device=DEVICE, dtype=torch.int32) * rows,
    )
    torch_us = time_calls([partial(torch._scaled_grouped_mm, x, folded.mT, x_scale, w_scale, offs=ends, **OPTIONS)], DEVICE).median_us

    experts = hb.prepare(random_experts(shape, hb.NVFP4, DEVICE, seed=0), "hopper").storage
    hidden = torch.randn(count, columns, device=DEVICE).bfloat16()
    ids = torch.arange(count, device=DEVICE, dtype=torch.int32).remainder(shape.num_experts).unsqueeze(1)
    config = expert_rows.choose_config(expert_rows.problem_of("expert_rows", hidden, experts, "fp8"), Size(count))
    work = sort(ids, 0, shape.num_experts, config.max_rows)
    codes, scales = quantize_tokens(hidden, work, padded_size(columns))
    h = torch.empty((count, padded_size(shape.intermediate)), dtype=torch.bfloat16, device=DEVICE)
    x = expert_rows._operand(codes, config)
    ours_us = time_calls([lambda: expert_rows._prefill_gemm(x, scales, h, experts, work, config, is_w13=True)], DEVICE).median_us
    return flops / torch_us / 1e6, flops / ours_us / 1e6


if __name__ == "__main__":
    if not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0):
        raise SystemExit("folded.py multiplies on the fp8 tensor cores of an sm_90 GPU (H100, H200), and there is none here")
    for name, sizes in ROWS.items():
        for rows in sizes:
            theirs, ours = measure(name, rows)
            print(f"{name}, {rows} rows per expert: torch, folded weights {theirs:.0f} TFLOP/s, halfbyte, packed weights {ours:.0f}", flush=True)
            torch.cuda.empty_cache()
