"""Floors against numbers worked out by hand."""

import pytest

from halfbyte import MXFP4, NVFP4
from halfbyte.bench.ceilings import Ceilings
from halfbyte.bench.shapes import NAMED_SHAPES, MoEShape, floor_of
from halfbyte.errors import InputError
from halfbyte.experts import RELU2

TINY = MoEShape("tiny", hidden=64, intermediate=32, num_experts=4, top_k=2)
CEILINGS = Ceilings(read_gbps=1.0, copy_gbps=1.0, bf16_tflops=1.0, fp8_tflops=2.0)


def test_bytes_of_an_expert():
    # 3 * 64 * 32 = 6144 weights
    assert TINY.expert_bytes(NVFP4) == 3072 + 384 + 3 * 4
    assert TINY.expert_bytes(MXFP4) == 3072 + 192
    with_bias = MoEShape("bias", 64, 32, 4, 2, has_bias=True)
    assert with_bias.expert_bytes(MXFP4) == 3072 + 192 + 2 * (64 + 64)
    without_gate = MoEShape("plain", 64, 32, 4, 2, RELU2)
    assert without_gate.expert_bytes(NVFP4) == 2048 + 256 + 2 * 4


def test_bytes_and_flops_of_a_call():
    assert TINY.call_bytes(NVFP4, num_tokens=5, experts_touched=3.5) == 3.5 * 3468 + 4 * 5 * 64
    assert TINY.call_flops(num_tokens=5) == 2 * 5 * 2 * 6144


def test_floor_is_the_larger_of_the_two():
    memory = floor_of(TINY, NVFP4, 1, 2, CEILINGS, "bf16")
    assert memory.bound == "memory" and memory.us == pytest.approx((2 * 3468 + 256) / 1e3)
    slow_compute = Ceilings(read_gbps=1e3, copy_gbps=1.0, bf16_tflops=1e-3, fp8_tflops=2e-3)
    compute = floor_of(TINY, NVFP4, 100, 4, slow_compute, "bf16")
    assert compute.bound == "compute" and compute.us == pytest.approx(100 * 24576 / 1e3)
    assert floor_of(TINY, NVFP4, 100, 4, slow_compute, "fp8").us == pytest.approx(compute.us / 2)


def test_without_an_fp8_rate_the_bf16_one_counts():
    assert Ceilings(1.0, 1.0, 3.0, None).matmul_tflops("fp8") == 3.0


def test_a_known_layer():
    """DeepSeek-R1: 256 experts of 24.8 MB, 6.34 GB a layer."""
    assert 256 * NAMED_SHAPES["dsr1"].expert_bytes(NVFP4) / 1e9 == pytest.approx(6.342, abs=1e-3)
    assert NAMED_SHAPES["gptoss"].published is MXFP4


@pytest.mark.parametrize("sizes", [(0, 32, 4, 2), (64, 32, 4, 5), (64, 32, 4, -1)])
def test_no_such_layer(sizes):
    with pytest.raises(InputError, match="not a MoE layer"):
        MoEShape("bad", *sizes)
