"""FP8 layers outside the experts: products on fp8 tensor cores against the definition, and which device has which."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from devices import on_hopper
from fuzz.sound import sound, write
from helpers import assert_close_rel, relative_errors

from halfbyte.device import Target
from halfbyte.integrations.transformers import fp8, load
from halfbyte.kernels.quantize import quantize_fp8

HOPPER = replace(Target.of("cpu"), arch="sm_90")


def weight_of(rows: int, columns: int, kind: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """e4m3 codes [N, K], scales [], [N, 1] or [N/128, K/128], and the value in fp64; rows of very different sizes."""
    weight = torch.randn(rows, columns) * torch.logspace(-2, 2, rows).unsqueeze(1)
    if kind == "block":
        scales = weight.unflatten(0, (-1, 128)).unflatten(2, (-1, 128)).abs().amax((1, 3)) / 448
        full = torch.stack([torch.stack([scales[r // 128, c // 128] for c in range(columns)]) for r in range(rows)])
    else:
        full = scales = (weight.abs().amax(1, keepdim=True) if kind == "row" else weight.abs().max()) / 448
    codes = (weight / full).to(torch.float8_e4m3fn)
    return codes, scales, codes.double() * full.double()


def rounded(x: torch.Tensor, block: int = 0) -> torch.Tensor:
    """x [T, K] as e4m3 holds it, with amax / 448 of each row (or block of it) as the scale; in fp64."""
    groups = x.float().unflatten(-1, (-1, block or x.shape[-1]))
    scales = groups.abs().amax(-1, keepdim=True) / 448
    return ((groups / scales).to(torch.float8_e4m3fn).double() * scales.double()).flatten(-2)


def check_product(x: torch.Tensor, rows: int, kind: str, device: str, bias: bool) -> None:
    weight, scales, value = weight_of(rows, x.shape[-1], kind)
    added = torch.randn(rows).bfloat16() if bias else None
    y = fp8.scaled_product(x.to(device), weight.to(device), scales.to(device), None if added is None else added.to(device)).cpu()
    tokens = rounded(x.flatten(0, -2), 128 if kind == "block" else 0)
    expected = tokens @ value.T + (0 if added is None else added.double())
    assert y.shape == (*x.shape[:-1], rows) and y.dtype == x.dtype
    assert_close_rel(y.flatten(0, -2), expected.float())
    with pytest.raises(AssertionError):  # scales of 1
        assert_close_rel(y.flatten(0, -2), (tokens @ weight.double().T).float())


def scaled_mm(a: torch.Tensor, b: torch.Tensor, scale_a: torch.Tensor, scale_b: torch.Tensor, out_dtype: torch.dtype, bias=None) -> torch.Tensor:
    """What torch._scaled_mm means: a e4m3 [M, K] row-major, b e4m3 [K, N] column-major, fp32 scales of rows and columns, or of blocks of 128."""
    assert a.dtype == b.dtype == torch.float8_e4m3fn and a.is_contiguous() and b.t().is_contiguous()
    (m, k), n = a.shape, b.shape[1]
    if scale_a.shape != (m, 1):
        assert scale_a.shape == (m, k // 128) and scale_a.stride() == (1, m) and m % 16 == 0
        assert scale_b.shape == (k // 128, n // 128) and scale_b.stride() == (1, k // 128)
        scale_a, scale_b = scale_a.repeat_interleave(128, 1), scale_b.repeat_interleave(128, 0).repeat_interleave(128, 1)
    else:
        assert scale_b.shape == (1, n) and scale_b.is_contiguous()
    y = (a.double() * scale_a.double()) @ (b.double() * scale_b.double())
    return (y if bias is None else y + bias).to(out_dtype)


@pytest.mark.parametrize("kind", ["tensor", "row", "block"])
@pytest.mark.parametrize("bias", [False, True])
def test_scaled_product(kind: str, bias: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the definition in the place of torch's product, which few CPUs have."""
    monkeypatch.setattr(torch, "_scaled_mm", scaled_mm)
    torch.manual_seed(0)
    check_product(torch.randn(3, 5, 512).bfloat16(), 256, kind, "cpu", bias)


@on_hopper
@pytest.mark.parametrize("kind", ["tensor", "row", "block"])
@pytest.mark.parametrize("tokens", [1, 7, 16, 300])
def test_scaled_product_on_hopper(kind: str, tokens: int) -> None:
    torch.manual_seed(0)
    x = torch.randn(tokens, 512).bfloat16()
    check_product(x, 256, kind, "cuda", True)
    weight, scales, _ = (tensor.cuda() for tensor in weight_of(256, 512, kind))
    assert torch.equal(fp8.linear(x.cuda(), weight, scales, None), fp8.scaled_product(x.cuda(), weight, scales, None))


def test_compiled_without_a_break() -> None:
    torch.manual_seed(0)
    weight, scales, _ = weight_of(48, 64, "row")
    x = torch.randn(5, 64)
    compiled = torch.compile(fp8.linear, fullgraph=True, backend="eager")
    assert torch.equal(compiled(x, weight, scales, None), fp8.linear(x, weight, scales, None))


@on_hopper
@pytest.mark.parametrize("kind", ["tensor", "row", "block"])
def test_compiled_on_hopper(kind: str) -> None:
    torch.manual_seed(0)
    weight, scales, value = (tensor.cuda() for tensor in weight_of(256, 512, kind))
    x = torch.randn(7, 512).bfloat16().cuda()
    tokens = x.double() if kind == "block" else rounded(x)  # blocks are dequantised there
    compiled = torch.compile(fp8.linear, fullgraph=True, dynamic=False)
    assert_close_rel(compiled(x, weight, scales, None), (tokens @ value.T).float())


@pytest.mark.parametrize(
    ("target", "shape", "scales", "runs"),
    [
        (HOPPER, (64, 128), (), True),
        (HOPPER, (64, 128), (64, 1), True),
        (HOPPER, (256, 1024), (2, 8), True),
        (HOPPER, (256, 256), (2, 2), False),
        (HOPPER, (192, 512), (2, 4), False),
        (HOPPER, (16, 2048), (1, 16), False),
        (HOPPER, (64, 72), (), False),
        (HOPPER, (72, 64), (72, 1), False),
        (replace(HOPPER, arch="sm_100"), (256, 1024), (2, 8), False),
        (replace(HOPPER, arch="sm_100"), (64, 128), (), True),
        (replace(HOPPER, arch="sm_80"), (64, 128), (), False),
        (Target.of("cpu"), (64, 128), (), False),
    ],
)
def test_where_it_runs(target: Target, shape: tuple, scales: tuple, runs: bool) -> None:
    assert fp8.multiplies_fp8(fp8.capability(target), torch.Size(shape), torch.Size(scales)) is runs


def test_elsewhere_the_weight_is_dequantised() -> None:
    torch.manual_seed(0)
    weight, scales, value = weight_of(48, 64, "row")
    x = torch.randn(5, 64)
    y = fp8.linear(x, weight, scales, None)
    assert_close_rel(y, (x.double() @ value.T).float(), token=1e-6, overall=1e-6)
    assert relative_errors(y, (rounded(x) @ value.T).float())[1] > 0.005  # inputs are not rounded


def test_rounding_of_inputs_is_that_of_the_library() -> None:
    torch.manual_seed(0)
    x = torch.randn(5, 64).bfloat16()
    assert_close_rel(quantize_fp8(x).dequantize(), rounded(x).float(), token=1e-6, overall=1e-6)


def test_scales_of_tiles_reach_the_edges() -> None:
    weight = torch.randn(130, 200).to(torch.float8_e4m3fn)
    scales = torch.tensor([[1.0, 2.0], [4.0, 8.0]])
    expected = torch.tensor([[weight[r, c].float() * scales[r // 128, c // 128] for c in range(200)] for r in range(130)])
    assert torch.equal(fp8.dequantize(weight, scales, torch.float32), expected)


def test_a_model_of_fp8_experts_is_held_in_the_dtype_that_is_asked_for(tmp_path: Path) -> None:
    """A CPU has no use for FP8: transformers dequantises it, to bf16 whatever it is told."""
    path = write(sound("fp8-block"), tmp_path / "model")
    stored, _ = load(path)
    assert {parameter.dtype for parameter in stored.parameters()} == {torch.bfloat16}
    ids = torch.arange(5, dtype=torch.int64).unsqueeze(0)
    with torch.inference_mode():
        expected = stored(input_ids=ids).logits.float()
        for dtype in ("float32", torch.float16):
            model, _ = load(path, dtype=dtype)
            assert {str(parameter.dtype).removeprefix("torch.") for parameter in model.parameters()} == {str(dtype).removeprefix("torch.")}
            assert_close_rel(model(input_ids=ids).logits.float()[0], expected[0], token=5e-2, overall=2e-2)
