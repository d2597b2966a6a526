"""`launch` takes for a call the kernel that Triton would take."""

from __future__ import annotations

import pytest
import torch
from compile_only import compiling

pytest.importorskip("triton")

import triton
import triton.language as tl

from halfbyte.kernels.launch import launch


@triton.jit
def _copy(tensors, other, block: tl.constexpr):
    source, destination = tensors
    offsets = tl.arange(0, block)
    tl.store(destination + offsets, tl.load(source + offsets) + tl.load(other + offsets))


def test_tensors_in_a_tuple_and_beside_one_are_told_apart_by_dtype_and_alignment() -> None:
    x = torch.empty(32, dtype=torch.float32)
    pairs = [(x, x), (torch.empty_like(x), x), (x.bfloat16(), x), (x[1:], x), (x, x[1:])]
    with compiling(90) as compiled:
        for pair in pairs:
            launch(_copy, (1, 1, 1), (pair, x), (16,))
        launch(_copy, (1, 1, 1), (pairs[0], x[1:]), (16,))
    assert len(compiled) == 5  # all but the second, whose tensors are like those of the first


class Kind(torch.Tensor):
    pass


def test_a_parameter_and_a_subclass_are_launched_as_the_tensor_that_they_are() -> None:
    x, halves = torch.empty(32), torch.empty(32, dtype=torch.bfloat16)
    with compiling(90) as compiled:
        for other in (x, torch.nn.Parameter(x), torch.nn.Parameter(halves), x.as_subclass(Kind)):
            launch(_copy, (1, 1, 1), ((x, x), other), (16,))
    assert len(compiled) == 2
