"""The gate lets right results through and nothing else."""

from dataclasses import replace

import pytest
import torch

import halfbyte
from halfbyte import MXFP4, NVFP4
from halfbyte.bench.gate import PEER_LIMIT, PEER_SPREAD, Allowance, Verdict, expected_output, fp8_allowance, judge
from halfbyte.bench.inputs import Call, random_call, random_experts
from halfbyte.bench.peers import TorchLayer
from halfbyte.bench.shapes import MoEShape
from halfbyte.experts import GPT_OSS_SWIGLU, ExpertWeights
from halfbyte.formats.activation_formats import round_trip
from halfbyte.kernels.reference.activation import activate
from halfbyte.weights.hopper.rounding_fp8 import round_to_fp8

CPU = torch.device("cpu")


@pytest.fixture
def expected():
    return torch.randn(6, 64, generator=torch.Generator().manual_seed(0))


def one_token_off(x):
    x = x.clone()
    x[3] *= 1.02
    return x


def nan_in_one_place(x):
    x = x.clone()
    x[2, 5] = torch.nan
    return x


@pytest.mark.parametrize(
    "damage",
    [torch.zeros_like, torch.neg, lambda x: x / 2, lambda x: x.roll(1, 0), one_token_off, nan_in_one_place, lambda x: x[:5], lambda x: x * torch.inf],
)
def test_wrong_results_fail(damage, expected):
    assert not judge(damage(expected), expected).passed
    assert not judge(damage(expected), expected, global_limit=0.1).passed


def test_rounding_to_bf16_passes(expected):
    assert judge(expected.bfloat16(), expected).passed


def test_the_looser_limit_is_for_all_tokens_only():
    assert not Verdict(6e-3, 6e-3).passed and Verdict(6e-3, 6e-3, global_limit=7e-3).passed
    assert not Verdict(2e-2, 6e-3, global_limit=7e-3).passed


@pytest.mark.parametrize("format", [NVFP4, MXFP4])
@pytest.mark.parametrize("activations", ["bf16", "fp8", "mxfp8", "nvfp4"])
def test_agrees_with_the_reference_kernel(format, activations):
    shape = MoEShape("biased", 64, 32, 5, 3, GPT_OSS_SWIGLU, has_bias=True)
    experts = random_experts(shape, format, CPU, seed=1)
    call = random_call(shape, 7, "skewed", CPU, seed=2)
    actual = halfbyte.fused_moe(call.hidden.float(), halfbyte.prepare(experts), call.ids, call.weights, activations=activations)
    # The kernel is given fp32, so that nothing is rounded on its way; quantised activations see bf16 in the one, fp32 in the other.
    verdict = judge(actual, expected_output(experts, call._replace(hidden=call.hidden.float()), activations))
    assert verdict.global_error < 1e-5 and verdict.token_error < 1e-5


def test_matmul_precision_of_the_process_is_left_alone():
    shape = MoEShape("tiny", 64, 32, 4, 2)
    torch.set_float32_matmul_precision("high")
    try:
        expected_output(random_experts(shape, NVFP4, CPU, 0), random_call(shape, 2, "uniform", CPU, 0), "bf16")
        assert torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision("highest")


def test_weights_that_a_kernel_rounds_are_rounded_on_both_sides():
    shape = MoEShape("small", 128, 64, 4, 2)
    experts = random_experts(shape, NVFP4, CPU, seed=1)
    call = random_call(shape, 9, "uniform", CPU, seed=2)
    exact, rounded = (expected_output(experts, call, "fp8", fp8_weights) for fp8_weights in (False, True))
    dense = replace(experts, w13=round_to_fp8(experts.w13), w2=round_to_fp8(experts.w2))
    assert judge(expected_output(dense, call, "fp8"), rounded).passed
    assert not judge(exact, rounded).passed and judge(exact, rounded).token_error < 0.1


FEW = (1, 2, 16)


def parts(call: Call, num_tokens: int) -> list[slice]:
    return [slice(first, first + num_tokens) for first in range(0, len(call.hidden) - num_tokens + 1, num_tokens)]


def as_fp8_tensor_cores_sum(experts: ExpertWeights, call: Call) -> torch.Tensor:
    """The layer with fp8 activations, whose first product is 1.2e-3 away from fp32."""
    generator, output = torch.Generator().manual_seed(0), torch.zeros(call.hidden.shape, dtype=torch.float32)
    for expert in call.ids.unique().tolist():
        token, slot = (call.ids == expert).nonzero(as_tuple=True)
        gate_up = round_trip(call.hidden[token], "fp8", None) @ experts.w13[expert].dequantize().T
        noise = torch.randn(gate_up.shape, dtype=torch.float32, generator=generator)
        h = activate(gate_up + noise * (1.2e-3 * gate_up.square().mean(1, keepdim=True).sqrt()), experts.activation)
        rows = round_trip(h.bfloat16(), "fp8", None) @ experts.w2[expert].dequantize().T
        output.index_add_(0, token, rows * call.weights[token, slot, None])
    return output


@pytest.mark.parametrize("sizes", [(64, 32, 4, 1), (256, 128, 16, 4), (256, 512, 4, 1)])
def test_right_results_of_few_tokens_pass_and_wrong_ones_do_not(sizes: tuple[int, int, int, int]) -> None:
    """Hundreds of samples, of which the limit for many tokens would refuse some; half of one, another sign or another token's stay wrong."""
    shape = MoEShape("sized", *sizes)
    experts, call = random_experts(shape, NVFP4, CPU, seed=3), random_call(shape, 256, "uniform", CPU, seed=5)
    peers = TorchLayer(experts, shape)(*call), expected_output(experts, call, "bf16"), Allowance(PEER_LIMIT, PEER_SPREAD)
    fp8 = as_fp8_tensor_cores_sum(experts, call), expected_output(experts, call, "fp8"), fp8_allowance(shape)
    for actual, expected, allowance in (peers, fp8):
        refused = 0
        for num_tokens in FEW:
            limits = allowance.limits(num_tokens)
            for part in parts(call, num_tokens):
                verdict = judge(actual[part], expected[part], *limits)
                assert verdict.passed, (num_tokens, verdict)
                refused += not judge(actual[part], expected[part], allowance.many, limits[1]).passed
                for wrong in (expected[part] / 2, -expected[part], expected.roll(1, 0)[part]):
                    assert not judge(wrong, expected[part], *limits).passed
        assert refused or actual is not fp8[0]
        assert judge(actual, expected).global_error < allowance.many
