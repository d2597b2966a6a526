"""Routings have the distribution they are named after; weights are of the shape and size asked for."""

import pytest
import torch

from halfbyte import MXFP4, NVFP4
from halfbyte.bench.inputs import ROUTING_KINDS, random_call, random_experts
from halfbyte.bench.shapes import NAMED_SHAPES, MoEShape
from halfbyte.errors import InputError
from halfbyte.experts import GPT_OSS_SWIGLU

CPU = torch.device("cpu")
SHAPE = MoEShape("sixteen", 64, 32, num_experts=16, top_k=4)


def counts(call):
    return torch.bincount(call.ids.flatten(), minlength=16).float() / len(call.ids)


@pytest.mark.parametrize("routing", ROUTING_KINDS)
def test_a_token_chooses_distinct_experts(routing):
    call = random_call(SHAPE, 50, routing, CPU, seed=1)
    assert all(len(set(row)) == 4 for row in call.ids.tolist())
    assert call.ids.dtype == torch.int32 and call.hidden.dtype == torch.bfloat16 and call.hidden.shape == (50, 64)
    assert torch.allclose(call.weights.sum(1), torch.ones(50))
    again = random_call(SHAPE, 50, routing, CPU, seed=1)
    assert all(torch.equal(a, b) for a, b in zip(call, again, strict=True))


def test_distributions():
    uniform, skewed, one = (counts(random_call(SHAPE, 4000, routing, CPU, seed=2)) for routing in ROUTING_KINDS)
    assert uniform.sub(0.25).abs().max() < 0.05
    assert skewed.max() > 0.7 and 0 < skewed.min() < 0.15
    assert one.max() == 1 and one.sort().values[:-1].sub(3 / 15).abs().max() < 0.05


@pytest.mark.parametrize("format", [NVFP4, MXFP4])
def test_weights_are_as_counted(format):
    shape = MoEShape("biased", 64, 32, 4, 2, GPT_OSS_SWIGLU, has_bias=True)
    experts = random_experts(shape, format, CPU, seed=3)
    assert experts.nbytes == 4 * shape.expert_bytes(format) and experts.activation == GPT_OSS_SWIGLU
    rms = 0.02 if format is NVFP4 else 0.047
    assert all(weight.dequantize().square().mean().sqrt().item() == pytest.approx(rms, rel=0.2) for weight in (experts.w13, experts.w2))


def test_blocks_must_divide():
    with pytest.raises(InputError, match="hidden does not divide"):
        random_experts(MoEShape("odd", 72, 32, 4, 2), NVFP4, CPU, seed=0)


def test_every_named_shape_divides():
    assert all(size % shape.published.block == 0 for shape in NAMED_SHAPES.values() for size in (shape.hidden, shape.intermediate))
