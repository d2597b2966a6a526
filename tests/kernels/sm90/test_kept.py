"""What calls of a layer share, on the host."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from random_experts import make_experts

import halfbyte as hb

pytest.importorskip("triton")

from halfbyte.kernels.sm90 import configs, expert_rows
from halfbyte.kernels.workspace import lend


def layer() -> hb.PreparedExperts:
    torch.manual_seed(0)
    return hb.prepare(make_experts(4, 128, 64, hb.NVFP4), "hopper")


def constants(experts: hb.PreparedExperts, activations: str = "bf16", num_tokens: int = 2) -> expert_rows.DecodeConstants:
    return expert_rows._decode_constants(experts.storage, True, num_tokens, 2, False, 128, activations)


def test_layers_alike_share_what_they_are_compiled_for_and_no_tensors() -> None:
    one, other = constants(layer()), constants(layer())
    assert one.spec is other.spec and one.weights[0] is not other.weights[0]
    assert constants(layer(), num_tokens=4).spec is not one.spec


def test_nothing_is_made_twice_for_a_layer() -> None:
    experts = layer()
    assert constants(experts) is constants(experts) is not constants(experts, "fp8")


def test_what_is_kept_goes_with_the_experts() -> None:
    experts = layer()
    words = weakref.ref(experts.storage.w13.words)
    constants(experts)
    del experts
    gc.collect()
    assert words() is None


def test_rows_are_rounded_by_the_direct_kernel_or_by_a_launch_before_it() -> None:
    experts = layer()
    assert not constants(experts).encodes and not constants(experts, "fp8").encodes and constants(experts, "nvfp4").encodes
    sorted_rows = expert_rows._decode_constants(experts.storage, True, 1, 0, False, 128, "fp8")
    assert sorted_rows.encodes and sorted_rows.spec.scaled and not sorted_rows.spec.direct


def test_operands_of_prefill_lie_where_the_workspace_says() -> None:
    workspace = hb.Workspace(torch.empty(1 << 20, dtype=torch.uint8))
    for config in (configs.TINY, configs.FP8_TINY):
        with lend(workspace):
            memory = expert_rows._prefill_memory(32, 128, 64, config, torch.device("cpu"))
        assert memory.x_desc.base is memory.x and memory.codes_desc.base is memory.codes
