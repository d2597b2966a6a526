"""The words of the Hopper layout as a [64, 64] e4m3 operand in registers (Gluon); numerics: `rounding_fp8.py`.

A thread's 32 codes in a tile belong to two rows and have one scale each, so each row needs a table of 8 bytes, e4m3 of the 8 magnitudes times the
scale, from which a PRMT takes four at once. Values with one significant bit are a few exponents above the first; those with two (1.5, 3 and 6) come
from one fp16 product, rounded by an addition to its bits. A subnormal value would break this, so small scales count as the smallest that has none.

For 8 codes 6 masks and PRMTs and 1 multiplication (IMAD, a pipe of its own), which shifts, or 10 and 4 where words are coded for bf16; for the tables
of both rows 4 and 4 (MXFP4), or 5 PRMTs, 6 additions and maxima and some multiplications (NVFP4).
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from halfbyte.weights.hopper.dequant_bf16 import SCALE_LAYOUT, WORD_LAYOUT, four_times


@gluon.constexpr_function
def _assembly(scale_byte: int, nvfp4: bool, words_for: str) -> str:
    """PTX for the four words of a thread.

    Operands: $0-$7 results (step s, row half h at 2 s + h), $8-$11 words, $12 the scale word (repeated in $13-$15), $16-$19 and $20-$23 what
    `scale_limits` returns. `scale_byte` is 0 or 2: where this tile's two bytes are in the scale word.
    """
    lines = ["{", ".reg .b32 t, u, v, first, second, zero, low0, high0, low1, high1;", "mov.b32 zero, 0;"]
    if nvfp4:
        # The byte of e4m3(scale) in byte 0 or 2 of `first`, that of 1.5 times it in byte 1 or 3 of `second`.
        lines += [
            f"prmt.b32 t, $12, zero, {0x4140 + 0x101 * scale_byte}; max.s16x2 t, t, $16; add.u32 first, t, $20;",
            "mul.lo.u32 t, t, 0x80; mov.b32 u, 0x3E003E00; mul.f16x2 t, t, u;",
            "mad.lo.u32 u, $20, 0x100, 0x00800080; mad.lo.u32 second, t, 2, u;",
        ]
        tables = {"low0": (0x5001, -0x800), "high0": (0x5050, 0x10100808), "low1": (0x7223, -0x800), "high1": (0x7272, 0x10100808)}
        lines += [f"prmt.b32 t, first, second, {selector}; add.s32 {table}, t, {distances};" for table, (selector, distances) in tables.items()]
    else:
        for h in range(2):
            lines += [
                f"prmt.b32 t, $12, zero, {0x4440 + scale_byte + h}; max.s32 t, t, ${16 + 2 * h};",
                f"mad.lo.u32 low{h}, t, 0x08080800, ${20 + 2 * h}; mad.lo.u32 high{h}, t, 0x08080808, ${21 + 2 * h};",
            ]
    for h in range(2):
        for q in range(2):
            word, even, odd = f"${8 + 2 * h + q}", f"${4 * q + h}", f"${4 * q + 2 + h}"
            if words_for == "fp8":
                lines += [
                    f"and.b32 t, {word}, 0x77777777; prmt.b32 u, low{h}, high{h}, t;",
                    f"mul.lo.u32 v, {word}, 16; lop3.b32 {even}, v, 0x80808080, u, 0xEA;",
                    f"shr.u32 t, t, 16; prmt.b32 u, low{h}, high{h}, t; lop3.b32 {odd}, {word}, 0x80808080, u, 0xEA;",
                ]
            else:
                lines += [
                    # Codes i = 0, 1 of both halves: magnitudes to the low four nibbles, signs to the tops of bytes.
                    f"mul.lo.u32 t, {word}, 64; and.b32 t, t, 0x77007700; prmt.b32 t, t, zero, 0x4431;",
                    f"prmt.b32 u, low{h}, high{h}, t;",
                    f"mul.lo.u32 t, {word}, 16; prmt.b32 t, t, {word}, 0x7351; lop3.b32 {even}, t, 0x80808080, u, 0xEA;",
                    # Codes 2, 3; their signs are in the other half.
                    f"and.b32 t, {word}, 0x76017601; mul.lo.u32 t, t, 0x101; prmt.b32 t, t, zero, 0x4413; prmt.b32 u, low{h}, high{h}, t;",
                    f"and.b32 t, {word}, 0x00220022; mul.lo.u32 t, t, 0x440; lop3.b32 {odd}, t, 0x80808080, u, 0xEA;",
                ]
    return "\n".join([*lines, "}"])


_EIGHT_FP8 = gl.constexpr((gl.float8e4nv,) * 8)
_CONSTRAINTS = gl.constexpr(",".join(["=&r"] * 8 + ["r"] * 16))


@gluon.jit
def load_exponents(exponents_ptr):
    """The j of rows g and g + 8 of a tile, from int8 [64]: two int32 [16, 8], one of each per thread."""
    thread = gl.arange(0, 16, layout=gl.SliceLayout(1, SCALE_LAYOUT))[:, None] * 8 + gl.arange(0, 8, layout=gl.SliceLayout(0, SCALE_LAYOUT))[None, :]
    row = thread // 32 * 16 + thread % 32 // 4
    return gl.load(exponents_ptr + row).to(gl.int32), gl.load(exponents_ptr + row + 8).to(gl.int32)


@gluon.jit
def scale_limits(exponents, NVFP4: gl.constexpr):
    """What decoding takes from `load_exponents`: two int32 [16, 32], of which each thread has four values.

    NVFP4, four times the same, the first row in the low half: the smallest scale bytes; what added to the scale bytes makes e4m3 of the scales.
    MXFP4, two for each row: the smallest scale byte, twice; the tables of e4m3 bytes, magnitudes 0 to 3 and 4 to 7, without 8 times the scale byte.
    """
    first, second = exponents
    if NVFP4:
        both = first + (second << 16)
        first, second = (first + 16) * 8, (second + 16) * 8
        smallest = four_times((first & 0xFFFF) | (second << 16))
        tables = four_times(-8 * (both + 14 * 0x10001))
    else:
        i = gl.arange(0, 32, layout=gl.SliceLayout(0, WORD_LAYOUT))[None, :] % 4
        exponent = gl.where(i < 2, four_times(first), four_times(second))
        smallest = exponent + 122
        tables = -8 * (exponent + 120) * gl.where(i % 2 == 0, 0x01010100, 0x01010101) + gl.where(i % 2 == 0, 0x03FFF800, 0x14100C08)
    return smallest, tables


@gluon.jit
def dequantize_fp8(words, scales, smallest, tables, OPERAND: gl.constexpr, ODD: gl.constexpr, NVFP4: gl.constexpr, WORDS_FOR: gl.constexpr):
    """words, scales int32 [16, 32] to e4m3 [64, 64] in `OPERAND`, columns in fp8 fragment order; smallest, tables from `scale_limits`.

    ODD: whether the tile is the second one that `scales` serves.
    """
    asm: gl.constexpr = _assembly(2 if ODD else 0, NVFP4, WORDS_FOR)
    r0, r1, r2, r3, r4, r5, r6, r7 = gl.inline_asm_elementwise(
        asm, _CONSTRAINTS, [words, scales, smallest, tables], dtype=_EIGHT_FP8, is_pure=True, pack=4
    )
    # Result 2 s + h holds the four bytes b of step s; the joins append h, s % 2, s // 2.
    fragments = gl.join(gl.join(gl.join(r0, r1), gl.join(r2, r3)), gl.join(gl.join(r4, r5), gl.join(r6, r7)))
    fragments = gl.reshape(fragments, (4, 8, 4, 4, 2, 2, 2))  # w, g, t, b, h, s % 2, s // 2
    fragments = gl.permute(fragments, (0, 4, 1, 6, 5, 2, 3))  # w, h, g, s // 2, s % 2, t, b
    return gl.convert_layout(gl.reshape(fragments, (64, 64)), OPERAND, assert_trivial=True)
