"""FP8 layers outside the experts: products on fp8 tensor cores against the definition, and which device has which."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from devices import on_hopper
from helpers import assert_close_rel, relative_errors

from halfbyte.device import Target
from halfbyte.integrations.transformers import fp8
from halfbyte.kernels.quantize import quantize_fp8

HOPPER = replace(Target.of("cpu"), arch="sm_90")


def weight_of(rows: int, columns: int, kind: str) -> tuple[torch.Tensor, torch.Tensor]:
    """e4m3 codes [N, K] and scales [] or [N, 1], rows of very different sizes."""
    weight = torch.randn(rows, columns) * torch.logspace(-2, 2, rows).unsqueeze(1)
    scales = (weight.abs().amax(1, keepdim=True) if kind == "row" else weight.abs().max()) / 448
    return (weight / scales).to(torch.float8_e4m3fn), scales


def rounded(x: torch.Tensor) -> torch.Tensor:
    """x [T, K] as e4m3 with amax / 448 of each row as its scale holds it, in fp64."""
    scales = x.double().abs().amax(1, keepdim=True) / 448
    return (x.double() / scales).float().to(torch.float8_e4m3fn).double() * scales


def check_product(x: torch.Tensor, kind: str, device: str, bias: bool) -> None:
    weight, scales = weight_of(48, x.shape[-1], kind)
    added = torch.randn(48).bfloat16() if bias else None
    y = fp8.scaled_product(x.to(device), weight.to(device), scales.to(device), None if added is None else added.to(device)).cpu()
    expected = rounded(x.flatten(0, -2)) @ (weight.double() * scales.double()).T + (0 if added is None else added.double())
    assert y.shape == (*x.shape[:-1], 48) and y.dtype == x.dtype
    assert_close_rel(y.flatten(0, -2), expected.float())
    with pytest.raises(AssertionError):  # scales of 1
        assert_close_rel(y.flatten(0, -2), (rounded(x.flatten(0, -2)) @ weight.double().T).float())


@pytest.mark.parametrize("kind", ["tensor", "row"])
@pytest.mark.parametrize("bias", [False, True])
def test_scaled_product(kind: str, bias: bool) -> None:
    torch.manual_seed(0)
    check_product(torch.randn(3, 5, 64).bfloat16(), kind, "cpu", bias)


@on_hopper
@pytest.mark.parametrize("kind", ["tensor", "row"])
@pytest.mark.parametrize("tokens", [1, 7, 300])
def test_scaled_product_on_hopper(kind: str, tokens: int) -> None:
    torch.manual_seed(0)
    x = torch.randn(tokens, 256).bfloat16()
    check_product(x, kind, "cuda", True)
    weight, scales = (tensor.cuda() for tensor in weight_of(48, 256, kind))
    assert torch.equal(fp8.linear(x.cuda(), weight, scales, None), fp8.scaled_product(x.cuda(), weight, scales, None))


@pytest.mark.parametrize(
    ("target", "dtype", "shape", "scales", "runs"),
    [
        (HOPPER, torch.bfloat16, (64, 128), (), True),
        (HOPPER, torch.bfloat16, (64, 128), (64, 1), True),
        (HOPPER, torch.bfloat16, (256, 256), (2, 2), False),
        (HOPPER, torch.bfloat16, (16, 2048), (1, 16), False),
        (HOPPER, torch.bfloat16, (64, 72), (), False),
        (HOPPER, torch.bfloat16, (72, 64), (72, 1), False),
        (HOPPER, torch.float32, (64, 128), (), False),
        (replace(HOPPER, arch="sm_80"), torch.bfloat16, (64, 128), (), False),
        (Target.of("cpu"), torch.bfloat16, (64, 128), (), False),
    ],
)
def test_where_it_runs(target: Target, dtype: torch.dtype, shape: tuple, scales: tuple, runs: bool) -> None:
    assert fp8.multiplies_fp8(target, dtype, torch.Size(shape), torch.Size(scales)) is runs


def test_elsewhere_the_weight_is_dequantised() -> None:
    torch.manual_seed(0)
    weight, scales = weight_of(48, 64, "row")
    x = torch.randn(5, 64)
    y = fp8.linear(x, weight, scales, None)
    assert_close_rel(y, (x.double() @ (weight.double() * scales.double()).T).float(), token=1e-6, overall=1e-6)
    assert relative_errors(y, (rounded(x) @ (weight.double() * scales.double()).T).float())[1] > 0.005  # inputs are not rounded


def test_rounding_of_inputs_is_that_of_the_library() -> None:
    torch.manual_seed(0)
    x = torch.randn(5, 64).bfloat16()
    assert_close_rel(quantize_fp8(x).dequantize(), rounded(x).float(), token=1e-6, overall=1e-6)


def test_scales_of_tiles_reach_the_edges() -> None:
    weight = torch.randn(130, 200).to(torch.float8_e4m3fn)
    scales = torch.tensor([[1.0, 2.0], [4.0, 8.0]])
    expected = torch.tensor([[weight[r, c].float() * scales[r // 128, c // 128] for c in range(200)] for r in range(130)])
    assert torch.equal(fp8.dequantize(weight, scales, torch.float32), expected)
