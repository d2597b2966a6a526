"""The memory bound stated in `kernels.reference.fused_moe`, measured by torch's allocator events."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from helpers import peak_bytes

import halfbyte as hb

MIB = 1 << 20


def random_experts(num_experts: int, hidden: int, intermediate: int) -> hb.PreparedExperts:
    def matrix(rows: int, columns: int) -> hb.QuantTensor:
        codes = torch.randint(0, 256, (num_experts, rows, columns // 2), dtype=torch.uint8)
        scales = torch.full((num_experts, rows, columns // 16), 56, dtype=torch.uint8)  # e4m3 1.0
        return hb.QuantTensor(codes, scales, torch.full((num_experts,), 1e-2), hb.NVFP4)

    return hb.prepare(hb.ExpertWeights(matrix(2 * intermediate, hidden), matrix(hidden, intermediate)))


def peak_of_layer(num_experts: int, hidden: int, intermediate: int, num_tokens: int, top_k: int, activations: str, folder: Path) -> int:
    experts = random_experts(num_experts, hidden, intermediate)
    x = torch.randn(num_tokens, hidden, dtype=torch.bfloat16)
    routing = hb.route(torch.randn(num_tokens, num_experts), top_k)
    return peak_bytes(lambda: hb.fused_moe(x, experts, *routing, activations=activations), folder)


@pytest.mark.parametrize(
    "sizes",
    [
        (16, 64, 32, 3000, 4, "bf16"),  # rows dominate
        (16, 64, 256, 2000, 4, "bf16"),  # wide intermediate
        (16, 64, 32, 3000, 4, "nvfp4"),
        (64, 512, 512, 8, 8, "bf16"),  # weights dominate: 192 MiB if all were dequantised
        (4, 2048, 1536, 2, 2, "bf16"),  # one expert's w13 is more than a block
    ],
    ids=str,
)
def test_peak_memory_is_bounded(sizes, tmp_path):
    _, hidden, intermediate, num_tokens, top_k, _ = sizes
    rows = num_tokens * top_k
    weights = 4 * max(2 * intermediate * hidden, 1 << 22)
    peak = peak_of_layer(*sizes, tmp_path)
    assert peak <= 24 * rows * (hidden + intermediate) + weights + 64 * MIB
    if rows * (hidden + intermediate) * 24 > 20 * MIB:  # negative control: the bound is not many times what is used
        assert peak > 0.25 * 24 * rows * (hidden + intermediate)


def test_peak_memory_does_not_grow_with_the_experts(tmp_path):
    few, many = (peak_of_layer(num_experts, 512, 512, 16, 8, "bf16", tmp_path) for num_experts in (16, 64))
    assert many < 1.1 * few
