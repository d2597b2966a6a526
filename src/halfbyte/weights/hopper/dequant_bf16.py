"""The in-kernel inverse of `pack`: 16 bytes per thread become a [64, 64] bf16 operand in registers (Gluon).

A code's three magnitude bits at the bottom of bf16's exponent are worth e2m1 * 2^-126, subnormals included, so multiplying by the scale finishes the
conversion. e2m1 times an e4m3 or e8m0 scale is exact in bf16: nothing is rounded here.

A word of 8 codes takes 9 integer instructions and 4 bf16x2 multiplies, a scale one PRMT and one IMAD. Where words are coded for fp8, a word takes
10, and 5 multiplications more (IMAD, a pipe of its own); 9 and 5 where x has the two columns of pairs of odd steps exchanged, as their signs lie.

Compiled for sm_90; runs on sm_80 and newer.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl


@gluon.constexpr_function
def _assembly(scale_byte: int, nvfp4: bool, words_for: str, exchanged: bool) -> str:
    """PTX for the four words of a thread.

    Operands: $0-$15 results (step s, half p, row half h at 4 s + 2 p + h), $16-$19 words, $20 the scale word (repeated in $21-$23), and for MXFP4 $24
    the bias to add (repeated in $25-$27). `scale_byte` is 0 or 2: where this tile's two bytes are in the scale word. `exchanged`: see `dequantize`.
    """
    lines = ["{", ".reg .b32 t, u, v, d0, d1, zero, bias;", "mov.b32 zero, 0;"]
    lines.append("mov.b32 bias, 0x70007000;" if nvfp4 else "mov.b32 bias, $24;")
    for h in range(2):
        byte = scale_byte + h
        lines.append(f"prmt.b32 t, $20, zero, 0x4{byte}4{byte}; mad.lo.u32 d{h}, t, {16 if nvfp4 else 128}, bias;")
    for h in range(2):
        for q in range(2):
            word = f"${16 + 2 * h + q}"
            r0, r1, r2, r3 = (f"${4 * (2 * q + i // 2) + 2 * (i % 2) + h}" for i in range(4))
            if words_for == "fp8":
                lines += [
                    # Two magnitudes to the bottom of each half; the signs of i = 0 and 1 nine bits above theirs, of i = 2 to the tops.
                    f"and.b32 v, {word}, 0x08080808; mul.lo.u32 v, v, 0x44; prmt.b32 u, {word}, v, 0x7150;",
                    f"and.b32 t, u, 0x02070207; mul.lo.u32 {r0}, t, 64; and.b32 t, u, 0x20702070; mul.lo.u32 {r1}, t, 4;",
                    f"prmt.b32 u, {word}, {word}, {'0x2302' if exchanged else '0x0223'};",
                    f"mul.lo.u32 t, u, 64; and.b32 t, t, 0x01C001C0; lop3.b32 {r2}, u, 0x80008000, t, 0xEA;",
                    f"mul.lo.u32 t, u, 4; and.b32 t, t, 0x01C001C0; {'' if exchanged else f'shf.r.wrap.b32 v, {word}, {word}, 16; '}"
                    f"lop3.b32 {r3}, {word if exchanged else 'v'}, 0x80008000, t, 0xEA;",
                ]
            else:
                lines += [
                    f"shl.b32 t, {word}, 4; and.b32 {r0}, t, 0x81C081C0;",
                    f"and.b32 {r1}, {word}, 0x81C081C0;",
                    f"shf.r.wrap.b32 t, {word}, {word}, 2; and.b32 u, t, 0x81808180;",
                    f"shl.b32 t, {word}, 6; lop3.b32 {r2}, t, 0x00400040, u, 0xEA;",
                    f"shf.r.wrap.b32 t, {word}, {word}, 6; and.b32 {r3}, t, 0x81C081C0;",
                ]
            lines += [f"mul.bf16x2 {result}, {result}, d{h};" for result in (r0, r1, r2, r3)]
    return "\n".join([*lines, "}"])


_EIGHT_BF16 = gl.constexpr((gl.bfloat16,) * 8)
_TWO_INPUTS = gl.constexpr(",".join(["=&r"] * 16 + ["r"] * 8))
_THREE_INPUTS = gl.constexpr(",".join(["=&r"] * 16 + ["r"] * 12))


@gluon.constexpr_function
def word_layout(num_warps: int) -> gl.BlockedLayout:
    """Of words [4 num_warps, 32]: thread (w, 4 g + t) is row 4 w + g // 2, columns 16 (g % 2) + 4 t .. + 3."""
    return gl.BlockedLayout([1, 4], [4, 8], [num_warps, 1], [1, 0])


@gluon.constexpr_function
def scale_layout(num_warps: int) -> gl.SliceLayout:
    """Of scale words [4 num_warps, 8], one per thread."""
    return gl.SliceLayout(2, gl.BlockedLayout([1, 1, 4], [4, 8, 1], [num_warps, 1, 1], [2, 1, 0]))


WORD_LAYOUT = gl.constexpr(word_layout(4))
SCALE_LAYOUT = gl.constexpr(scale_layout(4))


@gluon.jit
def stored_tile(row_tile, ROW_TILES: gl.constexpr, IS_GATED: gl.constexpr):
    """Where in `HopperMatrix` a row tile is, counted in the order of the columns of the result. IS_GATED: the matrix is w13 with gate and up."""
    return row_tile // 2 + row_tile % 2 * (ROW_TILES // 2) if IS_GATED else row_tile


@gluon.jit
def word_offsets(WARPS: gl.constexpr):
    """[4 WARPS, 32] offsets of a tile's words: 16 contiguous bytes per thread. Every four warps have the tile."""
    LAYOUT: gl.constexpr = word_layout(WARPS)
    row = gl.arange(0, 4 * WARPS, layout=gl.SliceLayout(1, LAYOUT)) % 16
    column = gl.arange(0, 32, layout=gl.SliceLayout(0, LAYOUT))
    return row[:, None] * 32 + column[None, :]


@gluon.jit
def scale_offsets(NVFP4: gl.constexpr, WARPS: gl.constexpr):
    """[4 WARPS, 8] offsets of a run of four tiles' scale words: one per thread, shared by two in MXFP4. Every four warps have the run."""
    LAYOUT: gl.constexpr = scale_layout(WARPS)
    row = gl.arange(0, 4 * WARPS, layout=gl.SliceLayout(1, LAYOUT)) % 16
    column = gl.arange(0, 8, layout=gl.SliceLayout(0, LAYOUT))
    thread = row[:, None] * 8 + column[None, :]
    return thread if NVFP4 else thread // 2


@gluon.jit
def four_times(scale):
    """int32 [16, 8], one value per thread, to [16, 32] with the value beside each of the thread's words; no instruction."""
    ROWS: gl.constexpr = scale.shape[0]
    PARENT: gl.constexpr = scale.type.layout.parent
    wide, _ = gl.broadcast(gl.expand_dims(scale, 2), gl.zeros((ROWS, 8, 4), gl.int32, layout=PARENT))
    return gl.convert_layout(gl.reshape(wide, (ROWS, 32)), word_layout(ROWS // 4), assert_trivial=True)


@gluon.jit
def split_scales(scales):
    """int64 [16, 8] scale words to the two int32 [16, 32] that serve tiles 0, 1 and 2, 3 of the run."""
    return four_times(scales.to(gl.int32)), four_times((scales >> 32).to(gl.int32))


# Where thread (w, 4 g + t) finds the two halves of its scale word in shared memory: entry 32 w + 4 g + t of NVFP4's [8, 32], 16 w + 2 g + t // 2 of
# MXFP4's [8, 16] words of 32 bits.
_NVFP4_SCALE_WORDS = gl.constexpr(gl.BlockedLayout([1, 2], [2, 16], [4, 1], [1, 0]))
_MXFP4_SCALE_WORDS = gl.constexpr(gl.DistributedLinearLayout([[0, 1]], [[0, 0], [0, 2], [0, 4], [0, 8], [1, 0]], [[2, 0], [4, 0]], [], [8, 16]))
_MXFP4_SCALE_PAIRS = gl.constexpr(
    gl.DistributedLinearLayout([], [[0, 0, 1], [0, 1, 0], [0, 2, 0], [0, 4, 0], [1, 0, 0]], [[2, 0, 0], [4, 0, 0]], [], [8, 8, 2])
)


@gluon.jit
def _every_thread(scale, NVFP4: gl.constexpr):
    """One scale word for one (NVFP4) or two (MXFP4) threads to int32 [16, 8], one per thread; no instruction."""
    if not NVFP4:
        scale = gl.convert_layout(scale, gl.SliceLayout(2, _MXFP4_SCALE_PAIRS), assert_trivial=True)
        scale, _ = gl.broadcast(gl.expand_dims(scale, 2), gl.zeros((8, 8, 2), gl.int32, layout=_MXFP4_SCALE_PAIRS))
    return gl.convert_layout(gl.reshape(scale, (16, 8)), SCALE_LAYOUT, assert_trivial=True)


@gluon.jit
def load_scales(stage, NVFP4: gl.constexpr):
    """A run's scale words in shared memory, int32 [8, 32] (NVFP4) or [8, 16] (MXFP4), to what `split_scales` returns."""
    words = stage.load(_NVFP4_SCALE_WORDS if NVFP4 else _MXFP4_SCALE_WORDS)
    low, high = gl.split(gl.reshape(words, (8, stage.shape[1] // 2, 2)))
    return four_times(_every_thread(low, NVFP4)), four_times(_every_thread(high, NVFP4))


@gluon.jit
def dequantize(
    words, scales, bias, OPERAND: gl.constexpr, ODD: gl.constexpr, NVFP4: gl.constexpr, WORDS_FOR: gl.constexpr, EXCHANGED: gl.constexpr = False
):
    """words, scales int32 [4 w, 32] of w warps to bf16 [16 w, 64], or [w, 16, 64] where `OPERAND` has three dimensions; columns in fragment order.

    ODD: whether the tile is the second one that `scales` serves. bias: int32 [4 w, 32], MXFP4 only (`exponent_bias`). EXCHANGED: of words for fp8,
    the two columns of a pair of an odd step are exchanged, as in x then.
    """
    WARPS: gl.constexpr = words.shape[0] // 4
    SHAPE: gl.constexpr = (16 * WARPS, 64) if len(OPERAND.parent.warps_per_cta) == 2 else (WARPS, 16, 64)
    asm: gl.constexpr = _assembly(2 if ODD else 0, NVFP4, WORDS_FOR, EXCHANGED)
    if NVFP4:
        r0, r1, r2, r3, r4, r5, r6, r7 = gl.inline_asm_elementwise(asm, _TWO_INPUTS, [words, scales], dtype=_EIGHT_BF16, is_pure=True, pack=4)
    else:
        r0, r1, r2, r3, r4, r5, r6, r7 = gl.inline_asm_elementwise(asm, _THREE_INPUTS, [words, scales, bias], dtype=_EIGHT_BF16, is_pure=True, pack=4)
    # Result 2 s + p holds (h, e) of step s; the joins append p, s % 2, s // 2.
    fragments = gl.join(gl.join(gl.join(r0, r1), gl.join(r2, r3)), gl.join(gl.join(r4, r5), gl.join(r6, r7)))
    fragments = gl.reshape(fragments, (WARPS, 8, 4, 2, 2, 2, 2, 2))  # w, g, t, h, e, p, s % 2, s // 2
    fragments = gl.permute(fragments, (0, 3, 1, 7, 6, 5, 2, 4))  # w, h, g, s // 2, s % 2, p, t, e
    return gl.convert_layout(gl.reshape(fragments, SHAPE), OPERAND, assert_trivial=True)


@gluon.jit
def exponent_bias(shift, WARPS: gl.constexpr = 4):
    """MXFP4: the expert's exponent shift, placed for both halves of a bf16x2 register, beside each word of every thread."""
    return gl.full((4 * WARPS, 32), shift * 0x00800080, gl.int32, layout=word_layout(WARPS))
