"""A whole row in the registers of one program (Triton): its scale, as the formats with a scale per row or per 32 columns define it.

A row is eight int32 words of two 16-bit floats for each group of 16 columns, as `chunk.load_words` brings them: [1, groups].
"""

from __future__ import annotations

import triton
import triton.language as tl

from halfbyte.formats import e2m1, e4m3
from halfbyte.gluon_compat import fix_cache_keys
from halfbyte.kernels.quantizers.blocks import amax8, half
from halfbyte.kernels.quantizers.fp8 import mx_scale

_INFINITY = tl.constexpr(float("inf"))
_SMALLEST_NORMAL = tl.constexpr(2.0**-126)
_NVFP4_RANGE = tl.constexpr(e2m1.MAX * e4m3.MAX)


@triton.jit
def _largest_half(w, HALF: tl.constexpr):
    """The largest of eight elements without their signs, as bits: those are in the order of the magnitudes, NaN above infinity."""
    SHIFT: tl.constexpr = 16 * HALF
    low = tl.maximum(tl.maximum(w[0] >> SHIFT & 0x7FFF, w[1] >> SHIFT & 0x7FFF), tl.maximum(w[2] >> SHIFT & 0x7FFF, w[3] >> SHIFT & 0x7FFF))
    high = tl.maximum(tl.maximum(w[4] >> SHIFT & 0x7FFF, w[5] >> SHIFT & 0x7FFF), tl.maximum(w[6] >> SHIFT & 0x7FFF, w[7] >> SHIFT & 0x7FFF))
    return tl.maximum(low, high)


@triton.jit
def amax_of_row(w, BF16: tl.constexpr):
    """max |x| of the row, fp32; NaN where an element is."""
    return half(tl.max(tl.maximum(_largest_half(w, 0), _largest_half(w, 1))), 0, BF16)


@triton.jit
def nvfp4_scale_of_row(w, BF16: tl.constexpr):
    """The global scale of a row that has its own, as `formats.block_format.nvfp4_decode_scale` defines it."""
    amax = amax_of_row(w, BF16)
    scale = tl.maximum(tl.div_rn(amax, _NVFP4_RANGE), _SMALLEST_NORMAL)
    return tl.where(amax == 0.0, 1.0, tl.where(amax < _INFINITY, scale, float("nan")))


@triton.jit
def mx_scales_of_row(w, GROUPS: tl.constexpr, BF16: tl.constexpr, ASM: tl.constexpr):
    """What `fp8.mx_scale` makes of the maxima of 32 columns, beside each of their two groups."""
    amax = tl.max(tl.reshape(amax8(w, BF16, ASM), (1, GROUPS // 2, 2)), axis=2, keep_dims=True)
    amax = tl.reshape(tl.broadcast_to(amax, (1, GROUPS // 2, 2)), (1, GROUPS))
    return mx_scale(amax.to(tl.int32, bitcast=True))


@triton.jit
def store_quad(pointers, w0, w1, w2, w3, mask, STEP: tl.constexpr = 1):
    """Four words of each group, STEP apart, at pointers [1, groups]."""
    quad = tl.reshape(tl.join(tl.join(w0, w2), tl.join(w1, w3)), (w0.shape[0], w0.shape[1], 4))
    tl.store(pointers[:, :, None] + STEP * tl.arange(0, 4)[None, None, :], quad, mask=mask[:, :, None])


fix_cache_keys(*globals().values())
