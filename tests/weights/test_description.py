"""Experts of every layout, taken apart into tensors and a string and put together again."""

from __future__ import annotations

import pytest
import torch
from random_experts import make_experts

import halfbyte as hb
from halfbyte.experts import RELU2, Activation
from halfbyte.weights.description import describe, rebuild


@pytest.mark.parametrize("activation", [Activation("swiglu", alpha=1.702, beta=1.0), RELU2], ids=lambda activation: activation.kind)
@pytest.mark.parametrize("format", [hb.NVFP4, hb.MXFP4], ids=repr)
@pytest.mark.parametrize("layout", ["canonical", "hopper", "hopper_fp8", "trtllm_gen", "cutlass"])
def test_nothing_is_lost(layout: str, format: hb.BlockFormat, activation: Activation) -> None:
    prepared = hb.prepare(make_experts(4, 128, 128, format, activation), layout)
    tensors = prepared.storage.tensors
    others = [torch.empty_like(tensor) for tensor in tensors.values()]
    again = rebuild(prepared.description, others)
    assert type(again) is type(prepared.storage) and again.format is format and again.activation == activation
    assert list(again.tensors) == list(tensors) and all(a is b for a, b in zip(again.tensors.values(), others, strict=True))
    assert describe(again) == prepared.description  # every other field
    assert (again.hidden, again.intermediate, again.num_global_experts) == (128, 128, 4)


def test_tensors_must_be_complete() -> None:
    prepared = hb.prepare(make_experts(4, 64, 32, hb.NVFP4))
    with pytest.raises(ValueError, match="zip"):
        rebuild(prepared.description, list(prepared.storage.tensors.values())[:-1])
