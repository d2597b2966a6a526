"""Activations to FP4: the public functions, which check, allocate, and ask the table for a kernel. `formats.quantizer` defines what comes out.

Codes have no gradient, so neither have the scales: a Parameter can be quantised.
"""

from __future__ import annotations

import reprlib
from typing import NamedTuple

import torch

from halfbyte.arguments import check_numbers, check_tensors, check_type
from halfbyte.device import Target
from halfbyte.errors import InputError
from halfbyte.experts import SWIGLU, Activation
from halfbyte.formats import NVFP4, BlockFormat, QuantTensor
from halfbyte.formats.block_format import as_format, check_blocks
from halfbyte.formats.e8m0 import ScaleRule
from halfbyte.formats.fp8_tensor import Fp8Scaling, Fp8Tensor, check_fp8
from halfbyte.formats.quantizer import check_arguments, count_nonfinite
from halfbyte.formats.scale_layout import ScaleLayout, check_scale_layout, max_padded_rows, padded_shape, tile_rows
from halfbyte.kernels.problem import Problem
from halfbyte.kernels.table import KernelChoice, choose


@torch.no_grad()
def quantize(
    x: torch.Tensor,
    format: BlockFormat | str,
    global_scale: torch.Tensor | float | None = None,
    *,
    four_over_six: bool = False,
    scale_rule: ScaleRule = "ceil",
    scale_layout: ScaleLayout = "linear",
    check: bool = False,
    backend: str | None = None,
) -> QuantTensor:
    """Quantise x [..., N, K] to `format`, blocks along K. The bits are the same on every device and with every kernel.

    Args:
        x: fp32, bf16 or fp16, [..., N, K]; K a multiple of the block (16 or 32). On a GPU, bf16 and fp16 take one pass.
        format: NVFP4 or MXFP4, or its name.
        global_scale: NVFP4 only: the fp32 *decode* multiplier, > 0, one per matrix [...] or one per row group [..., G]; None computes it from the
            finite values of each matrix, in passes of its own.
        four_over_six: NVFP4 only: choose per block between mapping its maximum to 6 and to 4, by squared error.
        scale_rule: MXFP4 only: "ceil", "floor" or "even" (see `formats.e8m0`).
        scale_layout: layout of the returned scales: "linear", "128x4" or "8x4"; padding is zero.
        check: refuse NaN and infinity, which otherwise become ordinary numbers (6 times the scale of their block, or 0). Waits for the device.
        backend: the only kernel allowed.

    Raises:
        InputError: x is no tensor of floats, fewer than two dimensions, K not a multiple of the block, an option of the other format, or a global
            scale that is not finite and > 0 (not looked at on a GPU).

    >>> q = halfbyte.quantize(torch.linspace(-1, 1, 64).view(2, 32), halfbyte.MXFP4)
    >>> q.codes.shape, q.scales.shape, q.global_scale
    (torch.Size([2, 16]), torch.Size([2, 1]), None)
    """
    where = "quantize"
    format = as_format(format, where)
    check_arguments(x, format, global_scale, four_over_six, scale_rule, where)
    _check_global_scale(global_scale, where)
    check_scale_layout(scale_layout, where)
    if check and (bad := count_nonfinite(x)):
        raise InputError("x has NaN or infinity", where=where, given=f"{bad} of {x.numel()} elements", needed="finite numbers")
    kernel = _kernel("quantize", x, format, backend, where)
    return kernel.run(x, format, global_scale, four_over_six=four_over_six, scale_rule=scale_rule, scale_layout=scale_layout)


@torch.no_grad()
def silu_mul_quantize(
    gate_up: torch.Tensor,
    format: BlockFormat | str,
    global_scale: torch.Tensor | float | None = None,
    *,
    activation: Activation = SWIGLU,
    four_over_six: bool = False,
    scale_rule: ScaleRule = "ceil",
    scale_layout: ScaleLayout = "linear",
    backend: str | None = None,
) -> QuantTensor:
    """quantize(round(silu(gate) * up)) of gate_up [..., N, 2K], gate columns then up columns, in one pass.

    The product is computed in fp32 and rounded to the dtype of `gate_up` before it is quantised, as FlashInfer, SGLang and vLLM do. exp is the
    device's: a product can differ by one rounding between devices, and its code with it.

    Args:
        gate_up: fp32, bf16 or fp16 [..., N, 2K]; K a multiple of the block.
        format: NVFP4 or MXFP4, or its name.
        global_scale: NVFP4 only, and needed: nobody knows the largest product yet. As in `quantize`.
        activation: any of kind "swiglu", with its alpha, beta and limit.
        four_over_six, scale_rule, scale_layout, backend: as in `quantize`.

    Raises:
        InputError: an argument does not fit.

    >>> gate_up = torch.tensor([[0.0, 20.0] * 16 + [6.0] * 32])
    >>> halfbyte.silu_mul_quantize(gate_up, halfbyte.NVFP4, 1.0).dequantize()[0, :2].tolist()
    [0.0, 120.0]
    """
    where = "silu_mul_quantize"
    format = as_format(format, where)
    check_tensors(where, gate_up=gate_up)
    _check_activation(gate_up, activation, where)
    check_arguments(gate_up[..., : gate_up.shape[-1] // 2], format, global_scale, four_over_six, scale_rule, where)
    if format.has_global_scale and global_scale is None:
        raise InputError("needs a global scale", where=where, given=None, needed="the calibrated decode multiplier of the product")
    _check_global_scale(global_scale, where)
    check_scale_layout(scale_layout, where)
    kernel = _kernel("quantize", gate_up, format, backend, where)
    options = {"four_over_six": four_over_six, "scale_rule": scale_rule, "scale_layout": scale_layout}
    return kernel.run(gate_up, format, global_scale, activation=activation, **options)


@torch.no_grad()
def rms_norm_quantize(
    x: torch.Tensor,
    weight: torch.Tensor,
    format: BlockFormat | str,
    global_scale: torch.Tensor | float | None = None,
    *,
    eps: float = 1e-6,
    four_over_six: bool = False,
    scale_rule: ScaleRule = "ceil",
    scale_layout: ScaleLayout = "linear",
    backend: str | None = None,
) -> QuantTensor:
    """quantize(round(x / sqrt(mean(x^2) + eps) * weight)) of x [..., N, K]; the normed rows are never written.

    Computed in fp32 and rounded to the dtype of x before quantising. The sum of a row is added up in another order than torch's, so that one element
    in thousands can round the other way.

    Args:
        x: fp32, bf16 or fp16 [..., N, K]; K a multiple of the block.
        weight: [K], dtype and device of x.
        format: NVFP4 or MXFP4, or its name.
        global_scale: NVFP4 only, and needed. As in `quantize`.
        eps: added to the mean square.
        four_over_six, scale_rule, scale_layout, backend: as in `quantize`.

    Raises:
        InputError: an argument does not fit.

    >>> halfbyte.rms_norm_quantize(torch.full((1, 32), 5.0), torch.ones(32), halfbyte.MXFP4, eps=0.0).dequantize()[0, 0].item()
    1.0
    """
    where = "rms_norm_quantize"
    format = as_format(format, where)
    check_tensors(where, weight=weight)
    check_numbers(where, eps=eps)
    check_arguments(x, format, global_scale, four_over_six, scale_rule, where)
    if weight.shape != x.shape[-1:] or weight.dtype != x.dtype or weight.device != x.device:
        given = f"{weight.dtype} {tuple(weight.shape)} on {weight.device}"
        raise InputError("the weight does not fit", where=where, given=given, needed=f"{x.dtype} ({x.shape[-1]},) on {x.device}")
    if format.has_global_scale and global_scale is None:
        raise InputError("needs a global scale", where=where, given=None, needed="the calibrated decode multiplier of the normed rows")
    _check_global_scale(global_scale, where)
    check_scale_layout(scale_layout, where)
    kernel = _kernel("quantize", x, format, backend, where)
    options = {"four_over_six": four_over_six, "scale_rule": scale_rule, "scale_layout": scale_layout}
    return kernel.run(x, format, global_scale, norm=(weight, float(eps)), **options)


@torch.no_grad()
def quantize_fp8(
    x: torch.Tensor,
    scaling: Fp8Scaling = "token",
    *,
    scale_layout: ScaleLayout = "linear",
    backend: str | None = None,
) -> Fp8Tensor:
    """Quantise x [..., N, K] to e4m3 with one scale per token, a block of 128 ("block") or a block of 32 ("mx", MXFP8), each by its own maximum.

    Args:
        x: fp32, bf16 or fp16 [..., N, K]; K a multiple of the block.
        scaling: "token", "block" or "mx".
        scale_layout: of "mx" scales: "linear", "128x4" or "8x4".
        backend: the only kernel allowed.

    Raises:
        InputError: an argument does not fit.

    >>> halfbyte.quantize_fp8(torch.full((1, 32), 449.0), "mx").scales.tolist()
    [[128]]
    """
    check_fp8(x, scaling, scale_layout)
    kernel = _kernel("quantize_fp8", x, None, backend, "quantize_fp8")
    return kernel.run(x, scaling, scale_layout=scale_layout)


def _kernel(op: str, x: torch.Tensor, format: BlockFormat | None, backend: str | None, where: str) -> KernelChoice:
    if backend is not None:
        check_type(where, str, backend=backend)
    return choose(Problem(op, Target.of(x.device), format, dtype=x.dtype), backend)


def _check_global_scale(scale: object, where: str) -> None:
    """Raise InputError for a decode multiplier that is not finite and > 0. On a GPU it is not looked at: nothing waits for the device."""
    if isinstance(scale, torch.Tensor):
        check_tensors(where, global_scale=scale)
        if scale.device.type == "meta" or not scale.is_floating_point():
            given = f"{scale.dtype} on {scale.device}"
            raise InputError("a global scale is not usable", where=where, given=given, needed="finite floats > 0")
        if scale.device.type != "cpu" or torch.compiler.is_compiling():
            return
        usable = bool(((scale > 0) & (scale < torch.inf)).all())
    else:
        usable = scale is None or (isinstance(scale, int | float) and 0 < scale < torch.inf)
    if not usable:
        raise InputError("a global scale is not usable", where=where, given=reprlib.repr(scale), needed="a finite number > 0")


def _check_activation(x: torch.Tensor, activation: Activation, where: str) -> None:
    check_type(where, Activation, activation=activation)
    if activation.kind != "swiglu":
        raise InputError("this activation is not fused", where=where, given=activation.kind, needed="swiglu", next_step="activate, then quantize")
    if x.ndim < 2 or x.shape[-1] % 2:
        raise InputError("gate and up columns do not make pairs", where=where, given=tuple(x.shape), needed="[..., N, 2K]")


class QuantizedExperts(NamedTuple):
    """Rows sorted by expert, in FP4.

    Attributes:
        codes: uint8 [M, K/2].
        scales: e4m3 (NVFP4) or uint8 e8m0 (MXFP4). "128x4" and "8x4": [rows, columns padded to 4], the scales of expert e from row
            scale_offsets[e] on, its rows padded to whole tiles with zeros. "linear": [M, K/block].
        scale_offsets: int32 [E + 1]; for "linear", the expert offsets.
    """

    codes: torch.Tensor
    scales: torch.Tensor
    scale_offsets: torch.Tensor


@torch.no_grad()
def quantize_experts(
    x: torch.Tensor,
    expert_offsets: torch.Tensor,
    global_scales: torch.Tensor | None,
    format: BlockFormat | str = NVFP4,
    *,
    scale_layout: ScaleLayout = "128x4",
    activation: Activation | None = None,
    out: QuantizedExperts | None = None,
    backend: str | None = None,
) -> QuantizedExperts:
    """Quantise rows sorted by expert, each expert with its own global scale and its own tiles of block scales.

    Rows expert_offsets[e] to expert_offsets[e + 1] belong to expert e. The scale buffer holds M rows and as many more as the experts present can
    need to fill their tiles: nothing waits for the device to learn how many. Rows that no expert covers, and scale rows beyond the last expert's,
    are not written. Deterministic.

    Args:
        x: fp32, bf16 or fp16 [M, K], K a multiple of the block.
        expert_offsets: int32 [E + 1], rising, within 0 .. M; checked where they are on a CPU, since nothing waits for a GPU.
        global_scales: NVFP4 only: fp32 [E], decode multipliers, > 0.
        format: NVFP4 or MXFP4, or its name.
        scale_layout: "128x4", "8x4" or "linear".
        activation: x is [M, 2K], gate columns then up columns, and this is applied first, as in `silu_mul_quantize`.
        out: the result of an earlier call with the same sizes, to write into.
        backend: the only kernel allowed.

    Raises:
        InputError: an argument does not fit.

    >>> x, offsets = torch.ones(3, 32), torch.tensor([0, 2, 2, 3], dtype=torch.int32)
    >>> q = halfbyte.quantize_experts(x, offsets, torch.ones(3))
    >>> q.codes.shape, q.scales.shape, q.scale_offsets.tolist()
    (torch.Size([3, 16]), torch.Size([384, 4]), [0, 128, 128, 256])
    """
    where = "quantize_experts"
    format = as_format(format, where)
    check_scale_layout(scale_layout, where)
    check_tensors(where, x=x, expert_offsets=expert_offsets, **({} if global_scales is None else {"global_scales": global_scales}))
    if activation is not None:
        _check_activation(x, activation, where)
    _check_experts(x, expert_offsets, global_scales, format, halves=1 if activation is None else 2)
    width = x.shape[1] if activation is None else x.shape[1] // 2
    if out is None:
        out = allocate_experts(x[:, :width], expert_offsets, format, scale_layout)
    else:
        check_type(where, QuantizedExperts, out=out)
        given, needed = _description(out), _description(allocate_experts(x[:, :width].to("meta"), expert_offsets, format, scale_layout))
        if given != needed or out.codes.device != x.device:
            raise InputError("out does not fit", where=where, given=given, needed=f"{needed} on {x.device}")
    if x.numel() == 0:
        if scale_layout != "linear":
            out.scale_offsets.zero_()
        return out
    kernel = _kernel("quantize_experts", x, format, backend, where)
    kernel.run(x, expert_offsets, global_scales, format, scale_layout, *out, activation=activation)
    return out


def allocate_experts(x: torch.Tensor, expert_offsets: torch.Tensor, format: BlockFormat, layout: ScaleLayout) -> QuantizedExperts:
    """What `quantize_experts` fills for x [M, K], uninitialised."""
    num_rows, width = x.shape
    columns = padded_shape(layout, 0, width // format.block)[1]
    scale_rows = max_padded_rows(num_rows, expert_offsets.numel() - 1, tile_rows(layout))
    codes = torch.empty((num_rows, width // 2), dtype=torch.uint8, device=x.device)
    scales = torch.empty((scale_rows, columns), dtype=format.scale_dtype, device=x.device)
    return QuantizedExperts(codes, scales, expert_offsets if layout == "linear" else torch.empty_like(expert_offsets))


def _description(parts: QuantizedExperts) -> str:
    return ", ".join(f"{part.dtype} {tuple(part.shape)}{'' if part.is_contiguous() else ' not contiguous'}" for part in parts)


def _check_experts(x: torch.Tensor, expert_offsets: torch.Tensor, global_scales: torch.Tensor | None, format: BlockFormat, halves: int) -> None:
    where = "quantize_experts"
    if x.ndim != 2 or x.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        given = f"{x.dtype} {tuple(x.shape)}"
        raise InputError("cannot quantise these rows", where=where, given=given, needed="float32, bfloat16 or float16 [M, K]")
    check_blocks(x.shape[1] // halves, format, where)
    if expert_offsets.dtype != torch.int32 or expert_offsets.ndim != 1 or expert_offsets.numel() < 2 or not expert_offsets.is_contiguous():
        given = f"{expert_offsets.dtype} {tuple(expert_offsets.shape)}"
        raise InputError("expert_offsets do not fit", where=where, given=given, needed="contiguous int32 [E + 1], E >= 1")
    num_experts = expert_offsets.numel() - 1
    if not format.has_global_scale:
        if global_scales is not None:
            raise InputError(f"{format!r} has no global scales", where=where, given=tuple(global_scales.shape), needed=None)
    elif global_scales is None or global_scales.dtype != torch.float32 or global_scales.shape != (num_experts,) or not global_scales.is_contiguous():
        scales = None if global_scales is None else f"{global_scales.dtype} {tuple(global_scales.shape)}"
        raise InputError("global_scales do not fit", where=where, given=scales, needed=f"contiguous float32 ({num_experts},)")
    devices = {part.device for part in (x, expert_offsets, global_scales) if part is not None}
    if len(devices) > 1:
        raise InputError("tensors are on different devices", where=where, given=", ".join(sorted(map(str, devices))), needed="one device")
    _check_global_scale(global_scales, where)
    if expert_offsets.device.type == "cpu" and not torch.compiler.is_compiling():
        bounds = [0, *expert_offsets.tolist(), x.shape[0]]
        if bounds != sorted(bounds):
            raise InputError(
                "expert_offsets do not rise from 0 to the rows", where=where, given=bounds[1:-1], needed=f"rising, within 0 .. {x.shape[0]}"
            )
    if x.shape[0] + 128 * num_experts >= 2**31:
        raise InputError("too many rows", where=where, given=x.shape[0], needed="rows + 128 * experts below 2^31")
