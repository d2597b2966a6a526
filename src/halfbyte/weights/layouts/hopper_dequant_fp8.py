"""The words of `hopper.pack` as a [64, 64] e4m3 operand in registers (Gluon); numerics and slot order: `hopper_fp8.py`.

A thread's 32 codes in a tile belong to two rows and have one scale each, so each row needs a table of 8 values, e4m3(m * scale * 2^-j) for the 8
magnitudes m: fp16 products, which are exact, and the conversion instruction. Two PRMT then look up four codes at once. For 8 codes: 15 shifts,
masks and PRMTs and 3 multiply-shifts (IMAD, a pipe of its own); for a table about 6 integer instructions, 4 HMUL2 and 4 conversions.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from halfbyte.weights.layouts.hopper_dequant import SCALE_LAYOUT, four_times


@gluon.constexpr_function
def _assembly(scale_byte: int, nvfp4: bool) -> str:
    """PTX for the four words of a thread.

    Operands: $0-$7 results (word s, row half h at 2 s + h), $8-$11 words, $12 the scale word (repeated in $13-$15), $16 and $20 the scale byte that
    stands for zero in rows h = 0 and 1 (repeated too). `scale_byte` is 0 or 2: where this tile's two bytes are in the scale word.

    Bits of a word (`hopper.pack_codes`), for the row pairs A: h 0, p 0; B: h 1, p 0; C: h 0, p 1; D: h 1, p 1, in both halves: A sign 15, magnitude
    8-6; B 11, 4-2; C 5, 14-12 (of the other half); D 1 (of the other half), 10-9 and 0. `v` has the magnitudes as nibbles D, C, B, A in each half.
    """
    lines = ["{", ".reg .b32 t, u, v, d, zero, low0, high0, low1, high1;", ".reg .b16 a, b;", "mov.b32 zero, 0;"]
    for h in range(2):
        lines += [
            f"prmt.b32 t, $12, zero, 0x444{scale_byte + h}; sub.s32 t, t, ${16 + 4 * h}; max.s32 t, t, 0;",
            f"mul.lo.u32 d, t, {0x00800080 if nvfp4 else 0x04000400};",
        ]
        # fp16 pairs (0, 0.5), (1, 1.5), (2, 3), (4, 6): the magnitudes in the order of their codes.
        for half, first, second in (("low", 0x38000000, 0x3E003C00), ("high", 0x42004000, 0x46004400)):
            lines += [
                f"mov.b32 u, {first}; mul.f16x2 t, d, u; cvt.rn.satfinite.e4m3x2.f16x2 a, t;",
                f"mov.b32 u, {second}; mul.f16x2 t, d, u; cvt.rn.satfinite.e4m3x2.f16x2 b, t;",
                f"mov.b32 {half}{h}, {{a, b}};",
            ]
    for s in range(4):
        word, even, odd = f"${8 + s}", f"${2 * s}", f"${2 * s + 1}"
        lines += [
            f"shr.u32 t, {word}, 8; and.b32 v, t, 0x00760076;",
            f"mul.lo.u32 t, {word}, 64; lop3.b32 v, t, 0x77007700, v, 0xEA; lop3.b32 v, {word}, 0x00010001, v, 0xEA;",
            "shr.u32 u, v, 16;",
            f"prmt.b32 t, low0, high0, v; prmt.b32 d, low0, high0, u; prmt.b32 {even}, t, d, 0x7135;",
            f"prmt.b32 t, low1, high1, v; prmt.b32 d, low1, high1, u; prmt.b32 {odd}, t, d, 0x6420;",
            f"mul.lo.u32 t, {word}, 4; lop3.b32 t, {word}, 0xFF00FF00, t, 0xE2; lop3.b32 {even}, t, 0x80808080, {even}, 0xEA;",
            f"shf.r.wrap.b32 t, {word}, {word}, 10; mul.lo.u32 u, {word}, 16;",
            f"lop3.b32 t, u, 0xFF00FF00, t, 0xE2; lop3.b32 {odd}, t, 0x80808080, {odd}, 0xEA;",
        ]
    return "\n".join([*lines, "}"])


_EIGHT_FP8 = gl.constexpr((gl.float8e4nv,) * 8)
_CONSTRAINTS = gl.constexpr(",".join(["=&r"] * 8 + ["r"] * 16))


@gluon.jit
def zero_scales(exponents_ptr, NVFP4: gl.constexpr):
    """Rows g and g + 8 of a tile, from their j's int8 [64]: the scale bytes that count as zero, two int32 [16, 32] beside each word of every thread.

    A byte above it makes fp16: exponent and three mantissa bits (NVFP4), or the exponent (MXFP4).
    """
    thread = gl.arange(0, 16, layout=gl.SliceLayout(1, SCALE_LAYOUT))[:, None] * 8 + gl.arange(0, 8, layout=gl.SliceLayout(0, SCALE_LAYOUT))[None, :]
    row = thread // 32 * 16 + thread % 32 // 4
    first = gl.load(exponents_ptr + row).to(gl.int32)
    second = gl.load(exponents_ptr + row + 8).to(gl.int32)
    if NVFP4:
        first, second = (first + 6) * 8, (second + 6) * 8
    else:
        first, second = first + 112, second + 112
    return four_times(first), four_times(second)


@gluon.jit
def dequantize_fp8(words, scales, zero0, zero1, OPERAND: gl.constexpr, ODD: gl.constexpr, NVFP4: gl.constexpr):
    """words, scales int32 [16, 32] to e4m3 [64, 64] in `OPERAND`, columns in fp8 slot order; zero0, zero1 from `zero_scales`.

    ODD: whether the tile is the second one that `scales` serves.
    """
    asm: gl.constexpr = _assembly(2 if ODD else 0, NVFP4)
    r0, r1, r2, r3, r4, r5, r6, r7 = gl.inline_asm_elementwise(
        asm, _CONSTRAINTS, [words, scales, zero0, zero1], dtype=_EIGHT_FP8, is_pure=True, pack=4
    )
    # Result 2 s + h holds the four bytes b of word s; the joins append h, s % 2, s // 2.
    fragments = gl.join(gl.join(gl.join(r0, r1), gl.join(r2, r3)), gl.join(gl.join(r4, r5), gl.join(r6, r7)))
    fragments = gl.reshape(fragments, (4, 8, 4, 4, 2, 2, 2))  # w, g, t, b, h, s % 2, s // 2
    fragments = gl.permute(fragments, (0, 4, 1, 6, 5, 2, 3))  # w, h, g, s // 2, s % 2, t, b
    return gl.convert_layout(gl.reshape(fragments, (64, 64)), OPERAND, assert_trivial=True)
