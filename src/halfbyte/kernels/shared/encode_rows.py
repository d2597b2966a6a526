"""Activations to 8 or 4 bits and back into bf16, which holds them exactly: what W4A16 kernels multiply when `activations` is another format.

    x        [rows, K] bf16 or fp16, contiguous; columns in natural order or in bf16 fragment order (`weights.hopper.layout`)
    out      [rows, K] bf16, columns as they are
    scales   [rows] fp32: out[r] * scales[r] is `formats.activation_formats.round_trip` of x[r], bit for bit

| activations | out | significant bits | scale of a row |
|---|---|---|---|
| fp8 | e4m3 code | 4 | amax(row) / 448 |
| mxfp8 | e4m3 code * 2^(byte - 127) | 4 | none |
| nvfp4 | e2m1 code * e4m3 block scale, 2^-10 .. 2688 | 6 | the largest calibrated input scale of the layer; without one, of amax(row) |

bf16 has 8 significant bits and the exponents of fp32. An MXFP8 value is a rounded x, so it overflows where the format itself does in fp32, and blocks
too small for their e8m0 scale (amax below 2^-118) have codes on bf16's own grid. The scale of a row multiplies the product: multiplying by
bf16(code * scale) instead would flip 1 % of the codes of h, an error of 9e-3.

A group of 16 columns stays in one thread, also in fragment order, where its words are 4 apart.
One launch, one program per row, 2 bytes read and 2 written per element. Every program reads the layer's input scales (from L2) and takes the largest
itself, so that captured graphs follow new ones (`PreparedExperts.update_`). Not measured yet.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc

from halfbyte.device import current
from halfbyte.formats.activation_formats import ActivationFormat
from halfbyte.kernels.arithmetic import next_power_of_2
from halfbyte.kernels.launch import launch
from halfbyte.kernels.quantizers.blocks import INTERPRETED, converts_e4m3, e2m1_value, half, pack
from halfbyte.kernels.quantizers.chunk import load_words, nvfp4_block, prepare_global
from halfbyte.kernels.quantizers.fp8 import divide, e4m3_bytes, fp32_scale, prepare_division
from halfbyte.kernels.quantizers.rows import amax_of_row, mx_scales_of_row, nvfp4_scale_of_row, store_quad
from halfbyte.kernels.workspace import scratch
from halfbyte.weights.hopper.fragment_order import PAIR_STEP, first_position_of


@triton.jit
def _e4m3_float(byte):
    """e4m3 without sign and NaN to fp32: its bits moved, subnormals included."""
    return ((byte & 0x7F) << 20).to(tl.float32, bitcast=True) * 2.0**120


@triton.jit
def _e4m3_value(x, NATIVE: tl.constexpr):
    """x rounded to e4m3, fp32."""
    if NATIVE:
        return x.to(tl.float8e4nv).to(tl.float32)
    value = _e4m3_float(e4m3_bytes(x, False).to(tl.int32))
    value = (value.to(tl.int32, bitcast=True) | (x.to(tl.int32, bitcast=True) & -2147483648)).to(tl.float32, bitcast=True)
    return tl.where(x != x, float("nan"), value)


@triton.jit
def _e4m3_word(word, factor, divisor, inverse, scale, DIVIDE: tl.constexpr, BF16: tl.constexpr, NATIVE: tl.constexpr, ASM: tl.constexpr):
    """Of a word e4m3(x / scale), where `prepare_division` gave the other three, or e4m3(x * factor) * scale."""
    low, high = half(word, 0, BF16), half(word, 1, BF16)
    if DIVIDE:
        low, high = divide(low, factor, divisor, inverse, ASM), divide(high, factor, divisor, inverse, ASM)
        return pack(_e4m3_value(low, NATIVE), _e4m3_value(high, NATIVE), True, ASM)
    return pack(_e4m3_value(low * factor, NATIVE) * scale, _e4m3_value(high * factor, NATIVE) * scale, True, ASM)


@triton.jit
def _e4m3_words(w, factor, divisor, inverse, scale, DIVIDE: tl.constexpr, BF16: tl.constexpr, NATIVE: tl.constexpr, ASM: tl.constexpr):
    words = ()
    for i in tl.static_range(8):
        words = words + (_e4m3_word(w[i], factor, divisor, inverse, scale, DIVIDE, BF16, NATIVE, ASM),)
    return words


@triton.jit
def _e2m1_word(codes, scale, ASM: tl.constexpr):
    """The two lowest codes, times the block's scale."""
    return pack(e2m1_value(codes) * scale, e2m1_value(codes >> 4) * scale, True, ASM)


@triton.jit
def _encode(
    x_ptr, out_ptr, scales_ptr, input_scale_ptr,
    FORMAT: tl.constexpr, NUM_GROUPS: tl.constexpr, NUM_INPUT_SCALES: tl.constexpr, FRAGMENTS: tl.constexpr, GROUPS: tl.constexpr,
    INPUT_SCALES: tl.constexpr, BF16: tl.constexpr, NATIVE: tl.constexpr, ASM: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    STEP: tl.constexpr = PAIR_STEP if FRAGMENTS else 1
    group = tl.arange(0, GROUPS)[None, :]
    mask = group < NUM_GROUPS
    offset = row.to(tl.int64) * (NUM_GROUPS * 8) + (first_position_of(group) if FRAGMENTS else group * 8)
    if PDL:
        gdc.gdc_wait()
        gdc.gdc_launch_dependents()
    w = load_words(x_ptr.to(tl.pointer_type(tl.int32)) + offset, mask, STEP)
    if FORMAT == "nvfp4":
        if NUM_INPUT_SCALES > 0:
            entry = tl.arange(0, INPUT_SCALES)
            scale = tl.max(tl.load(input_scale_ptr + entry, mask=entry < NUM_INPUT_SCALES, other=0.0), 0)
        else:
            scale = nvfp4_scale_of_row(w, BF16)
        byte, low, high = nvfp4_block(w, prepare_global(scale, 6.0, ASM), BF16, False, NATIVE, ASM)
        block_scale = _e4m3_float(byte)
        e = ()
        for i in tl.static_range(8):
            e = e + (_e2m1_word((low if i < 4 else high) >> 8 * (i % 4), block_scale, ASM),)
        tl.store(scales_ptr + row, scale)
    elif FORMAT == "mxfp8":
        byte, factor = mx_scales_of_row(w, GROUPS, BF16, ASM)
        scale = tl.where(byte == 0, 0x400000, byte << 23).to(tl.float32, bitcast=True)
        e = _e4m3_words(w, factor, factor, factor, scale, False, BF16, NATIVE, ASM)
    else:
        scale = fp32_scale(amax_of_row(w, BF16))
        factor, divisor, inverse = prepare_division(scale, ASM)
        whole = tl.zeros((1, GROUPS), tl.float32)
        e = _e4m3_words(w, factor, whole + divisor, whole + inverse, scale, True, BF16, NATIVE, ASM)
        tl.store(scales_ptr + row, scale)
    out = out_ptr.to(tl.pointer_type(tl.int32)) + offset
    store_quad(out, e[0], e[1], e[2], e[3], mask, STEP)
    store_quad(out + 4 * STEP, e[4], e[5], e[6], e[7], mask, STEP)


def encode_rows(
    x: torch.Tensor,
    activations: ActivationFormat,
    input_scale: torch.Tensor | None = None,
    *,
    in_fragment_order: bool = False,
    out: torch.Tensor | None = None,
    launch_early: bool = False,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """x [rows, K] to `out` bf16 [rows, K] and scales fp32 [rows], as the module says; for "bf16", x itself and no scales.

    Args:
        x: bf16 or fp16, contiguous; K a multiple of 16 ("mxfp8": 32; in fragment order: 64).
        activations: the format.
        input_scale: calibrated decode multipliers, fp32 of any shape; only "nvfp4" has a use for them.
        in_fragment_order: columns are in bf16 fragment order.
        out: where to write; may share the storage of x.
        launch_early: programmatic dependent launch (compute capability 9.0).
    """
    if activations == "bf16":
        return x, None
    num_rows, columns = x.shape
    out = scratch((num_rows, columns), torch.bfloat16, x.device) if out is None else out
    scales = None if activations == "mxfp8" else scratch((num_rows,), torch.float32, x.device)
    if num_rows == 0:
        return out, scales
    num_scales = 0 if input_scale is None or activations != "nvfp4" else input_scale.numel()
    groups = max(4, next_power_of_2(columns // 16))
    with current(x.device):
        launch(
            _encode, (num_rows, 1, 1),
            (x, out, x if scales is None else scales, x if input_scale is None else input_scale.contiguous()),
            (activations, columns // 16, num_scales, in_fragment_order, groups, next_power_of_2(max(1, num_scales)),
             x.dtype == torch.bfloat16, converts_e4m3(), not INTERPRETED, launch_early),
            num_warps=min(8, max(1, groups // 32)), enable_fp_fusion=False, launch_pdl=launch_early,  # the codec rounds every product
        )  # fmt: skip
    return out, scales
