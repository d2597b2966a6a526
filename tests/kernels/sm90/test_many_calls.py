"""Hundreds of calls give the same bits: weights at new addresses, a cold L2, other tests on the same GPU. On a GPU.

Kernels that gave a stage of weights back too early were wrong in one of eight to one of a thousand calls of such layers, where 14 processes shared
an H200.
"""

from __future__ import annotations

import pytest
import torch
from devices import hopper
from helpers import assert_equal_bits
from hopper_layers import configs, in_turns, make_experts, make_tokens

import halfbyte as hb

pytestmark = hopper

SIZES = [(1536, 736), (2048, 768)]
LAYERS, CALLS = 5, 120


def turned(tensor: torch.Tensor, by: int) -> torch.Tensor:
    """The same experts at other places; a roll of bytes, because not all of torch knows e4m3."""
    rows = tensor.view(torch.uint8) if tensor.dtype.itemsize == 1 else tensor
    return rows.roll(by, 0).view(tensor.dtype)


@pytest.mark.parametrize(
    ("name", "format", "hidden", "intermediate"), in_turns(("micro", "tiny", "small", "medium", "fp8_tiny", "fp8_wide"), SIZES), ids=str
)
def test_many_calls_give_the_same_bits(name: str, format: hb.BlockFormat, hidden: int, intermediate: int) -> None:
    w, config = make_experts(5, hidden, intermediate, format), configs()[name]
    activations = "fp8" if name.startswith("fp8") else "bf16"
    cold = torch.empty(2 * hb.Target.of("cuda").l2, dtype=torch.uint8, device="cuda")
    layers = []
    for seed in range(LAYERS):
        other = w.with_tensors({key: turned(tensor, seed) for key, tensor in w.tensors.items()})
        layers.append(hb.prepare(other, activations=activations))  # all are kept, so that each lies where none has lain
        x, ids, weights = make_tokens(301, hidden, 5, 3, seed)
        cold.fill_(seed)
        first = hb.fused_moe(x, layers[-1], ids, weights, config=config)
        for _ in range(CALLS):
            assert_equal_bits(hb.fused_moe(x, layers[-1], ids, weights, config=config), first)
