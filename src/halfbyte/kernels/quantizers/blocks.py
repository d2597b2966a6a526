"""A block of 16-bit floats to FP4 in the registers of one thread: block maximum, scale, codes. Bit for bit what `formats.quantizer` defines.

Words are int32 tensors that hold two neighbouring elements each, low half first; everything here is elementwise, so a block never leaves its thread.

**Division without dividing.** The codec rounds x / d to fp32, and that to e2m1. With y = fl(1 / d) and z = (1 - d * y) * y, rounded up,
fl(x * y + fl(x * z)) lies on the same side of every tie as fl(x / d), or on the tie as it does: z is what y lacks, and x has only 8 or 11 bits. A
test goes through every mantissa of d. Nothing may underflow, so x and d are multiplied by 2^64, 1 or 2^-64 before. Two instructions of the fp32
pipe, which has room; the integer pipe has half its rate. Scales are divided by Markstein's way (1990), which gives fl(x / d) itself: `quotient`.

**Rounding without cases.** The code of |q| is its rank in 0, .5, 1, 1.5, 2, 3, 4, 6, and rank = round(min(2 q, q + 2, q / 2 + 4)), ties to even.
Adding 2^23 rounds to an integer, and min commutes with rounding. Positive floats are in the order of their bits, and sm_90 has an instruction for the
least of three integers. MXFP4 divides by a power of two, which one multiplication does.

**Ordinary blocks**, without NaN and with a d that is neither tiny nor huge, need no factor and no care for NaN. Others take a branch of their own
(NVFP4).

`tests/ptx.py` runs the assembly on a CPU, so that all of this is proven without a GPU.

ASM False is the same in plain Triton, for the interpreter, which has no inline assembly and rounds an fma twice.
"""

import functools
from collections.abc import Hashable, Sequence

import triton
import triton.language as tl

from halfbyte.gluon_compat import fix_cache_keys

INTERPRETED = triton.knobs.runtime.interpret  # then ASM is False
_ROUND = tl.constexpr(8388608.0)  # 2^23: adding it rounds to an integer, found in the low bits
_CUT = tl.constexpr(6.5)  # |q| is cut here: above 6, and below the 7 that would round to a ninth code
_CUT_BITS = 0x40D00000  # of this float
_INFINITY = tl.constexpr(float("inf"))


def converts_e4m3() -> bool:
    """NATIVE of these kernels: whether the current GPU has instructions for e4m3 (compute capability 8.9)."""
    return not INTERPRETED and _capability(triton.runtime.driver.active.get_current_device()) >= 89


@functools.cache
def _capability(current_device: Hashable) -> int:
    """90 for 9.0. Triton asks torch for all properties of the device, at every call."""
    return triton.runtime.driver.active.get_current_target().arch


def _unpack(dtype: str, word: str, low: str, high: str) -> str:
    if dtype == "bf16":
        return f"shl.b32 t, {word}, 16; mov.b32 {low}, t; and.b32 t, {word}, 0xffff0000; mov.b32 {high}, t;"
    return f"mov.b32 {{hl, hh}}, {word}; cvt.f32.f16 {low}, hl; cvt.f32.f16 {high}, hh;"


def _amax_lines(dtype: str, words: range, nan: str) -> str:
    """`amax` (f32) = max |x| over `words`."""
    first, *rest = (f"abs.{dtype}x2 t, ${word};" for word in words)
    largest = " ".join(f"{line} max{nan}.{dtype}x2 m, m, t;" for line in rest)
    return f"{first} mov.b32 m, t; {largest} {_unpack(dtype, 'm', 'a', 'b')} max{nan}.f32 amax, a, b;"


def _amax_asm(dtype: str) -> str:
    """$0 (f32) = max |x| over the words $1 .. $8: max ignores NaN, and a block of nothing else gives 0."""
    return f"{{ .reg .b32 m, t; .reg .b16 hl, hh; .reg .f32 a, b, amax; {_amax_lines(dtype, range(1, 9), '')} max.f32 $0, amax, 0f00000000; }}"


def _amax_and_nan_asm(dtype: str) -> str:
    """$0 (f32) = max |x| over the words $2 .. $9 in the same way, $1 = whether there is a NaN."""
    words = range(2, 10)
    lines = ["{ .reg .b32 m, t; .reg .b16 hl, hh; .reg .f32 a, b, amax; .reg .pred ordinary;", _amax_lines(dtype, words, ".NaN")]
    lines.append("mov.b32 $1, 0; setp.num.f32 ordinary, amax, amax; @ordinary bra DONE;")
    lines.append(f"mov.b32 $1, 1; {_amax_lines(dtype, words, '')} max.f32 amax, amax, 0f00000000;")
    lines.append("DONE: mov.f32 $0, amax; }")
    return "\n".join(lines)


def _signs(target: str, words: Sequence[str]) -> str:
    """The signs of four words, bits 15 and 31, where the nibbles want them: bit 3 (even elements) and 7 (odd ones) of each byte."""
    w0, w1, w2, w3 = words
    return (
        f"prmt.b32 a, {w0}, {w1}, 0x7351; prmt.b32 t, {w2}, {w3}, 0x7351; prmt.b32 even, a, t, 0x5410; prmt.b32 odd, a, t, 0x7632; "
        f"shr.u32 even, even, 4; and.b32 even, even, 0x08080808; and.b32 odd, odd, 0x80808080; or.b32 {target}, even, odd;"
    )


_RANKS_TOO_MUCH = 0x4B000000 * 0x11111111 & 0xFFFFFFFF  # what eight times 2^23, four bits apart, add to the codes


def _sum_of_codes(target: str) -> str:
    return f"sub.u32 sum, sum, {_RANKS_TOO_MUCH:#x}; add.u32 {target}, sum, even;"


def _second_part(divisor: str) -> str:
    """z = what the reciprocal `y` lacks."""
    return f"neg.f32 z, {divisor}; fma.rn.f32 z, z, y, 0f3F800000; mul.rp.f32 z, z, y;"


def _quotient(x: str) -> str:
    """x = x / d for the purposes of rounding, of which `y` and `z` are the reciprocal."""
    return f"mul.rn.f32 q, {x}, z; fma.rn.f32 {x}, {x}, y, q;"


def _append_code(x: str) -> str:
    """sum = 16 sum + 2^23 + the code of x."""
    # 2 q, q + 2, q / 2 + 4
    ranks = f"fma.rn.f32 c, {x}, 0f40000000, 0f4B000000; add.rn.f32 d, {x}, 0f4B000002; fma.rn.f32 q, {x}, 0f3F000000, 0f4B000004;"
    least = "mov.b32 a0, c; mov.b32 a1, d; mov.b32 a2, q; min.s32 a0, a0, a1; min.s32 a0, a0, a2;"  # one instruction from sm_90 on
    return f"{ranks} {least} mad.lo.u32 sum, sum, 16, a0;"


def _magnitudes(dtype: str, word: str, signed: str, *, guarded: bool) -> str:
    """x0 and x1 = |x| of the word, cut at `cut`. `guarded`: times `factor`, and `signed` becomes the word with its signs; a NaN becomes the positive
    one by the multiplication, and by min the largest code. `factor` and `cut` are pairs of bf16 for bf16, fp32 for fp16."""
    if dtype == "bf16":
        scaled = f"fma.rn.bf16x2 {signed}, {word}, factor, odd;" if guarded else ""
        return f"{scaled} abs.bf16x2 a, {signed if guarded else word}; min.bf16x2 a, a, cut; {_unpack(dtype, 'a', 'x0', 'x1')}"
    cut = "min.f32 x0, x0, cut; min.f32 x1, x1, cut;"
    if not guarded:
        return f"abs.f16x2 a, {word}; {_unpack(dtype, 'a', 'x0', 'x1')} {cut}"
    scaled = f"{_unpack(dtype, word, 'x0', 'x1')} mul.rn.f32 x0, x0, factor; mul.rn.f32 x1, x1, factor;"
    return f"{scaled} mov.b32 a, x0; mov.b32 t, x1; prmt.b32 {signed}, a, t, 0x7632; abs.f32 x0, x0; abs.f32 x1, x1; {cut}"


def _codes(dtype: str, target: str, words: Sequence[str], *, guarded: bool, divide: bool) -> str:
    """target = the eight codes of four words: of their `_magnitudes`, divided if `divide`, and their signs."""
    signed = [f"s{number}" for number in range(4)] if guarded else words
    lines = ["mov.b32 sum, 0;", "mov.b32 odd, 0x80008000;" if guarded else ""]
    for word, with_signs in reversed(list(zip(words, signed, strict=True))):
        lines.append(_magnitudes(dtype, word, with_signs, guarded=guarded))
        lines += [f"{_quotient(x) if divide else ''} {_append_code(x)}" for x in ("x1", "x0")]
    return "\n".join([*lines, _signs("even", signed), _sum_of_codes(target)])


def _registers(dtype: str) -> str:
    kind = "b32" if dtype == "bf16" else "f32"
    integers = "s<4>, a, t, sum, even, odd, a0, a1, a2"
    return f".reg .b32 {integers}; .reg .b16 hl, hh; .reg .f32 x0, x1, q, c, d, y, z, f; .reg .{kind} factor, cut; .reg .pred ordinary;"


def _parameter(dtype: str, target: str, value: str) -> str:
    """target = the fp32 `value`, as `_magnitudes` wants it."""
    return f"cvt.rz.bf16x2.f32 {target}, {value}, {value};" if dtype == "bf16" else f"mov.f32 {target}, {value};"


def _divided_asm(dtype: str) -> str:
    """$0 and $1 = the sixteen codes of the words $2 .. $9, times $10, divided by $11, of which $12 is the reciprocal; $13: whether there is a NaN."""
    halves = [("$0", [f"${word}" for word in range(2, 6)]), ("$1", [f"${word}" for word in range(6, 10)])]
    lines = [f"{{ {_registers(dtype)}", f"mul.rn.f32 f, $11, 0f{_CUT_BITS:08X};", _parameter(dtype, "cut", "f")]
    lines.append(f"mov.f32 y, $12; {_second_part('$11')}")
    lines.append("setp.eq.f32 ordinary, $10, 0f3F800000; setp.eq.and.s32 ordinary, $13, 0, ordinary; @!ordinary bra GUARDED;")
    lines += [_codes(dtype, target, words, guarded=False, divide=True) for target, words in halves]
    lines += ["bra DONE; GUARDED:", _parameter(dtype, "factor", "$10")]
    lines += [_codes(dtype, target, words, guarded=True, divide=True) for target, words in halves]
    return "\n".join([*lines, "DONE: }"])


def _codes_asm(dtype: str) -> str:
    """$0 = the eight codes of the words $1 .. $4, times $5."""
    lines = [f"{{ {_registers(dtype)}", _parameter(dtype, "factor", "$5"), f"mov.f32 f, 0f{_CUT_BITS:08X};", _parameter(dtype, "cut", "f")]
    return "\n".join([*lines, _codes(dtype, "$0", ["$1", "$2", "$3", "$4"], guarded=True, divide=False), "}"])


_AMAX_BF16, _AMAX_F16 = tl.constexpr(_amax_asm("bf16")), tl.constexpr(_amax_asm("f16"))
_AMAX_AND_NAN_BF16, _AMAX_AND_NAN_F16 = tl.constexpr(_amax_and_nan_asm("bf16")), tl.constexpr(_amax_and_nan_asm("f16"))
_PACK_BF16, _PACK_F16 = tl.constexpr("cvt.rn.bf16x2.f32 $0, $1, $2;"), tl.constexpr("cvt.rn.f16x2.f32 $0, $1, $2;")
_RECIPROCAL = tl.constexpr("{ .reg .f32 y, n, e; rcp.approx.ftz.f32 y, $1; neg.f32 n, $1; fma.rn.f32 e, n, y, 0f3F800000; fma.rn.f32 $0, e, y, y; }")
_CODES_BF16, _CODES_F16 = tl.constexpr(_codes_asm("bf16")), tl.constexpr(_codes_asm("f16"))
_DIVIDED_BF16, _DIVIDED_F16 = tl.constexpr(_divided_asm("bf16")), tl.constexpr(_divided_asm("f16"))


@triton.jit
def half(word, HALF: tl.constexpr, BF16: tl.constexpr):
    """The low (0) or high (1) element of a word, fp32."""
    if BF16:
        return (word << 16 if HALF == 0 else word & -65536).to(tl.float32, bitcast=True)
    return (word >> (16 * HALF)).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)


@triton.jit
def pack(low, high, BF16: tl.constexpr, ASM: tl.constexpr):
    """Two fp32 numbers rounded to the 16-bit dtype, as a word."""
    if ASM:
        return tl.inline_asm_elementwise(_PACK_BF16 if BF16 else _PACK_F16, "=r,f,f", [high, low], dtype=tl.int32, is_pure=True, pack=1)
    return _rounded(low, BF16) | (_rounded(high, BF16) << 16)


@triton.jit
def _rounded(x, BF16: tl.constexpr):
    if BF16:
        bits = x.to(tl.int32, bitcast=True)
        return tl.where(x != x, 0x7FFF, ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16) & 0xFFFF)
    return x.to(tl.float16).to(tl.int16, bitcast=True).to(tl.int32) & 0xFFFF


@triton.jit
def _swiglu(gate, up, ALPHA: tl.constexpr, BETA: tl.constexpr, LIMIT: tl.constexpr):
    if LIMIT is not None:
        gate = tl.where(gate > LIMIT, LIMIT, gate)
        up = tl.where(up > LIMIT, LIMIT, tl.where(up < -LIMIT, -LIMIT, up))
    return (up + BETA) * gate * (1.0 / (1.0 + tl.exp(-ALPHA * gate)))


@triton.jit
def swiglu(gate, up, ALPHA: tl.constexpr, BETA: tl.constexpr, LIMIT: tl.constexpr, BF16: tl.constexpr, ASM: tl.constexpr):
    """The activation of two words, rounded to their dtype."""
    low = _swiglu(half(gate, 0, BF16), half(up, 0, BF16), ALPHA, BETA, LIMIT)
    return pack(low, _swiglu(half(gate, 1, BF16), half(up, 1, BF16), ALPHA, BETA, LIMIT), BF16, ASM)


@triton.jit
def normed(word, weight, factor, BF16: tl.constexpr, ASM: tl.constexpr):
    """x * factor * weight of two words, rounded to their dtype."""
    low = half(word, 0, BF16) * factor * half(weight, 0, BF16)
    return pack(low, half(word, 1, BF16) * factor * half(weight, 1, BF16), BF16, ASM)


@triton.jit
def _finite_abs(word, HALF: tl.constexpr, BF16: tl.constexpr):
    magnitude = tl.abs(half(word, HALF, BF16))
    return tl.where(magnitude != magnitude, 0.0, magnitude)


@triton.jit
def _amax4(w0, w1, w2, w3, BF16: tl.constexpr):
    low = tl.maximum(tl.maximum(_finite_abs(w0, 0, BF16), _finite_abs(w1, 0, BF16)), tl.maximum(_finite_abs(w2, 0, BF16), _finite_abs(w3, 0, BF16)))
    high = tl.maximum(tl.maximum(_finite_abs(w0, 1, BF16), _finite_abs(w1, 1, BF16)), tl.maximum(_finite_abs(w2, 1, BF16), _finite_abs(w3, 1, BF16)))
    return tl.maximum(low, high)


@triton.jit
def amax8(w, BF16: tl.constexpr, ASM: tl.constexpr):
    """max |x| of the 16 elements of eight words, NaN ignored: fp32."""
    if ASM:
        return tl.inline_asm_elementwise(_AMAX_BF16 if BF16 else _AMAX_F16, "=f,r,r,r,r,r,r,r,r", w, dtype=tl.float32, is_pure=True, pack=1)
    return tl.maximum(_amax4(w[0], w[1], w[2], w[3], BF16), _amax4(w[4], w[5], w[6], w[7], BF16))


@triton.jit
def amax8_and_nan(w, BF16: tl.constexpr, ASM: tl.constexpr):
    """`amax8`, and int32: not 0 where an element is NaN."""
    if ASM:
        amax, has_nan = tl.inline_asm_elementwise(
            _AMAX_AND_NAN_BF16 if BF16 else _AMAX_AND_NAN_F16, "=&f,=&r,r,r,r,r,r,r,r,r", w, dtype=(tl.float32, tl.int32), is_pure=True, pack=1
        )
    else:
        amax, has_nan = amax8(w, BF16, ASM), tl.zeros_like(w[0])  # asked for by the assembly alone
    return amax, has_nan


@triton.jit
def range_factor(d):
    """The power of two that brings a divisor near 1, to where Markstein's division is exact."""
    return tl.where(d < 2.0**-50, 2.0**64, tl.where(d > 2.0**50, 2.0**-64, 1.0))


@triton.jit
def reciprocal(d, ASM: tl.constexpr):
    """1 / d correctly rounded, d within 2^-100 .. 2^100: what the compiler's own division starts with, without its check of the range."""
    if ASM:
        return tl.inline_asm_elementwise(_RECIPROCAL, "=f,f", [d], dtype=tl.float32, is_pure=True, pack=1)
    return tl.div_rn(1.0, d)


@triton.jit
def quotient(x, d, inverse, ASM: tl.constexpr):
    """x / d correctly rounded, d within 2^-100 .. 2^100 and `inverse` its reciprocal. Where it would overflow: NaN."""
    if ASM:
        q = x * inverse
        return tl.fma(tl.fma(-q, d, x), inverse, q)
    return tl.div_rn(x, d)


@triton.jit
def _rank(q):
    """fp32 whose low bits are the code of q >= 0."""
    return tl.minimum(tl.minimum(q * 2.0 + _ROUND, q + (_ROUND + 2.0)), q * 0.5 + (_ROUND + 4.0))


@triton.jit
def _code(word, HALF: tl.constexpr, factor, divisor, BF16: tl.constexpr, DIVIDE: tl.constexpr):
    """The code of one element, as `_codes` computes it."""
    x = half(word, HALF, BF16) * factor
    q = tl.div_rn(tl.abs(x), divisor) if DIVIDE else tl.abs(x)
    is_nan = x != x
    sign = (x.to(tl.int32, bitcast=True) >> 28) & 8
    return tl.where(is_nan, 7, (_rank(tl.where(is_nan, 0.0, tl.minimum(q, _CUT))).to(tl.int32, bitcast=True) & 7) | sign)


@triton.jit
def _codes2(word, factor, divisor, BF16: tl.constexpr, DIVIDE: tl.constexpr):
    return _code(word, 0, factor, divisor, BF16, DIVIDE) | (_code(word, 1, factor, divisor, BF16, DIVIDE) << 4)


@triton.jit
def _codes4(w0, w1, w2, w3, factor, divisor, BF16: tl.constexpr, DIVIDE: tl.constexpr):
    low = _codes2(w0, factor, divisor, BF16, DIVIDE) | (_codes2(w1, factor, divisor, BF16, DIVIDE) << 8)
    return low | (_codes2(w2, factor, divisor, BF16, DIVIDE) << 16) | (_codes2(w3, factor, divisor, BF16, DIVIDE) << 24)


@triton.jit
def codes4(w0, w1, w2, w3, factor, BF16: tl.constexpr, ASM: tl.constexpr):
    """The eight e2m1 codes of x * factor, a power of two, element 0 in the lowest nibble: int32."""
    if ASM:
        asm: tl.constexpr = _CODES_BF16 if BF16 else _CODES_F16
        return tl.inline_asm_elementwise(asm, "=&r,r,r,r,r,f", [w0, w1, w2, w3, factor], dtype=tl.int32, is_pure=True, pack=1)
    return _codes4(w0, w1, w2, w3, factor, factor, BF16, False)


@triton.jit
def divided_codes(w, factor, divisor, inverse, has_nan, BF16: tl.constexpr, ASM: tl.constexpr):
    """The sixteen e2m1 codes of x * factor / divisor in two words, element 0 in the lowest nibble of the first: int32.

    `factor` is a power of two or 0, `divisor` within 2^-100 .. 2^100, `inverse` its correctly rounded reciprocal; `has_nan` as of `amax8_and_nan`.
    """
    if ASM:
        low, high = tl.inline_asm_elementwise(
            _DIVIDED_BF16 if BF16 else _DIVIDED_F16, "=&r,=&r,r,r,r,r,r,r,r,r,f,f,f,r",
            [w[0], w[1], w[2], w[3], w[4], w[5], w[6], w[7], factor, divisor, inverse, has_nan],
            dtype=(tl.int32, tl.int32), is_pure=True, pack=1,
        )  # fmt: skip
    else:
        low = _codes4(w[0], w[1], w[2], w[3], factor, divisor, BF16, True)
        high = _codes4(w[4], w[5], w[6], w[7], factor, divisor, BF16, True)
    return low, high


@triton.jit
def e2m1_value(codes):
    """The value of the lowest four bits, fp32."""
    rank = (codes & 7).to(tl.float32)
    value = tl.maximum(tl.maximum(rank * 0.5, rank - 2.0), rank * 2.0 - 8.0)
    # The sign as a bit: Triton 3.6 makes -value of 0 - value, and +0 of code 8.
    return (value.to(tl.int32, bitcast=True) | ((codes & 8) << 28)).to(tl.float32, bitcast=True)


@triton.jit
def e4m3_of(x, NATIVE: tl.constexpr):
    """Round x in 0 .. 448 to e4m3: its byte (int32) and its value (fp32). NATIVE: `converts_e4m3`."""
    if NATIVE:
        rounded = x.to(tl.float8e4nv)
        return rounded.to(tl.uint8, bitcast=True).to(tl.int32), rounded.to(tl.float32)
    bits = x.to(tl.int32, bitcast=True)
    normal = (bits + 0x7FFFF + ((bits >> 20) & 1)) >> 20
    subnormal = x + 16384.0  # 2^14, whose last bit is worth 2^-9
    value = tl.where(x < 2.0**-6, subnormal - 16384.0, (normal << 20).to(tl.float32, bitcast=True))
    return tl.where(x < 2.0**-6, subnormal.to(tl.int32, bitcast=True) & 15, normal - (120 << 3)), value


@triton.jit
def e8m0_of(amax, RULE: tl.constexpr):
    """The e8m0 byte (int32) of a block of e2m1 elements with this maximum (a bf16 or fp16 value in fp32), and 2^-(byte - 127) as fp32.

    ceil: amax / 6 is (mantissa / 1.5) * 2^(exponent - 2), so the power of two above it is exponent - 2, or - 1 when the mantissa exceeds 1.5. A
    16-bit mantissa is too short for the rounding of amax / 6 to reach a power of two.
    """
    rounding: tl.constexpr = 0x3FFFFF if RULE == "ceil" else (0x200000 if RULE == "even" else 0)
    bits = amax.to(tl.int32, bitcast=True)
    byte = tl.maximum(((bits + rounding) >> 23) - 2, 0)
    byte = tl.where(amax == _INFINITY, 254, byte)
    reciprocal = (254 - byte) << 23
    return byte, tl.where(byte == 254, 0x400000, reciprocal).to(tl.float32, bitcast=True)


fix_cache_keys(*globals().values())
