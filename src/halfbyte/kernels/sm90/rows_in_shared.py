"""Rows of x in the shared memory of a program of the direct decode kernel, as they are or rounded to fp8.

    scale of a row = amax(row) / 448, value = e4m3(x / scale), bit for bit as `kernels.shared.encode_rows` has them; bf16 holds the values exactly

Every program reads whole rows anyway, out of the L2. Rounding two columns takes a thread 17 instructions: of 7,168 columns 5 % of what decoding the
weights takes.

A block of 64 columns lies there as [2, rows, 32]: of the 16 columns of a thread the first eight, those of the next thread, and so on; then the last
eight. Two rows that are read together are in different banks so. Where words are coded for fp8, the two columns of pairs of odd steps are exchanged
(`dequantize`).
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from halfbyte.gluon_compat import reinterpret
from halfbyte.kernels.arithmetic import ceil_div
from halfbyte.kernels.quantizers.fp8 import divide, fp32_scale, prepare_division

_STEPS = gl.constexpr(16)  # blocks of a chunk, which four warps write, 8 columns a thread
_LARGER_MAGNITUDE = gl.constexpr("{ .reg .b32 t; and.b32 t, $1, 0x7FFF7FFF; max.u16x2 $0, t, $2; }")
# Two fp32 through e4m3 to bf16: the compiler's own conversion to bf16 is one of a slow unit, an element at a time.
_ROUND = gl.constexpr("""{
.reg .b16 codes, low, high; .reg .b32 both; .reg .f32 x, y;
cvt.rn.satfinite.e4m3x2.f32 codes, $2, $1; cvt.rn.f16x2.e4m3x2 both, codes; mov.b32 {low, high}, both;
cvt.f32.f16 x, low; cvt.f32.f16 y, high; cvt.rn.bf16x2.f32 $0, y, x;
}""")


def tiles_in_shared(column_tiles: int, parts: int, slices: int) -> int:
    """Blocks of 64 columns that a program keeps of a row: whole runs of four tiles, and whole chunks."""
    steps = 4 * ceil_div(column_tiles, 4 * parts * slices)
    return slices * ceil_div(steps, _STEPS.value) * _STEPS.value


@gluon.constexpr_function
def _read_layout(slices: int, rows: int) -> gl.DistributedLinearLayout:
    """[slices, 4, 8 / rows, 2, rows, 32]: the four warps of a slice have its block, a thread 16 columns of a row; the rows again up to eight."""
    bits = [[0, 0, 0, 0, 1 << bit, 0] for bit in range(rows.bit_length() - 1)]
    bits += [[0, 0, 1 << bit, 0, 0, 0] for bit in range((8 // rows).bit_length() - 1)]
    warps = [[0, 1, 0, 0, 0, 0], [0, 2, 0, 0, 0, 0]] + [[1 << bit, 0, 0, 0, 0, 0] for bit in range(slices.bit_length() - 1)]
    registers = [[0, 0, 0, 0, 0, 1], [0, 0, 0, 0, 0, 2], [0, 0, 0, 0, 0, 4], [0, 0, 0, 1, 0, 0]]
    return gl.DistributedLinearLayout(registers, [[0, 0, 0, 0, 0, 8], [0, 0, 0, 0, 0, 16], *bits], warps, [], [slices, 4, 8 // rows, 2, rows, 32])


@gluon.jit
def allocate_rows(STEPS: gl.constexpr, SLICES: gl.constexpr, ROWS: gl.constexpr):
    """bf16 [chunks, _STEPS, SLICES, 2, ROWS, 32], for STEPS blocks of 64 columns of each slice."""
    CHUNKS: gl.constexpr = (STEPS + _STEPS - 1) // _STEPS
    LAYOUT: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, order=[4, 3, 2, 1, 0])
    return gl.allocate_shared_memory(gl.bfloat16, [CHUNKS, _STEPS, SLICES, 2, ROWS, 32], LAYOUT)


@gluon.jit
def _amax_of_row(x_row, K: gl.constexpr, SLICES: gl.constexpr):
    """max |x| of K columns, fp32; NaN where an element is."""
    AT_ONCE: gl.constexpr = 1024 * SLICES
    column = gl.arange(0, AT_ONCE, layout=gl.BlockedLayout([8], [32], [4 * SLICES], [0]))
    largest = gl.full([AT_ONCE], 0, gl.int16, layout=column.type.layout)
    for start in gl.static_range(0, K, AT_ONCE):
        x = gl.load(x_row + start + column, mask=start + column < K, other=0.0).to(gl.int16, bitcast=True)
        largest = gl.inline_asm_elementwise(_LARGER_MAGNITUDE, "=r,r,r", [x, largest], dtype=gl.int16, is_pure=True, pack=2)
    return (gl.max(largest.to(gl.int32), 0) << 16).to(gl.float32, bitcast=True)


@gluon.jit
def _in_order_of_shared(x, EXCHANGED: gl.constexpr):
    """[16, slices, 1, 64] to [16, slices, 2, 1, 32]; no instruction where x is fp32."""
    SLICES: gl.constexpr = x.shape[1]
    x = gl.permute(gl.reshape(x, (_STEPS, SLICES, 4, 2, 8)), (0, 1, 3, 2, 4))
    if EXCHANGED:
        even, odd = gl.split(gl.permute(gl.reshape(x, (_STEPS, SLICES, 8, 2, 2, 2)), (0, 1, 2, 4, 5, 3)))  # step, p, e to p, e, step
        low, high = gl.split(odd)
        x = gl.permute(gl.join(even, gl.join(high, low)), (0, 1, 2, 5, 3, 4))
    return gl.reshape(x, (_STEPS, SLICES, 2, 1, 32))


@gluon.jit
def put_row(x_row, rows, ROW: gl.constexpr, first_column, STEPS: gl.constexpr, K: gl.constexpr, ROUNDED: gl.constexpr, EXCHANGED: gl.constexpr):
    """Put a row into `rows` as row ROW, from column `first_column` on, zeros beyond K; returns its scale, 1 unless it is ROUNDED."""
    CHUNKS: gl.constexpr = rows.shape[0]
    SLICES: gl.constexpr = rows.shape[2]
    LAYOUT: gl.constexpr = gl.BlockedLayout([1, 1, 8], [4, 1, 8], [4, SLICES, 1], [2, 1, 0])
    step = gl.arange(0, _STEPS, layout=gl.SliceLayout(1, gl.SliceLayout(2, LAYOUT)))[:, None, None]
    slice_ = gl.arange(0, SLICES, layout=gl.SliceLayout(0, gl.SliceLayout(2, LAYOUT)))[None, :, None]
    column = gl.arange(0, 64, layout=gl.SliceLayout(0, gl.SliceLayout(1, LAYOUT)))[None, None, :]
    column = first_column + (slice_ * STEPS + step) * 64 + column
    scale = 1.0
    if ROUNDED:
        scale = fp32_scale(_amax_of_row(x_row, K, SLICES))
        factor, divisor, inverse = prepare_division(scale, True)
        whole = gl.zeros([_STEPS, SLICES, 64], gl.float32, layout=LAYOUT)
        divisor, inverse = whole + divisor, whole + inverse
    for chunk in gl.static_range(CHUNKS):
        x = gl.load(x_row + column, mask=column < K, other=0.0)
        column += _STEPS * 64
        if ROUNDED:
            q = _in_order_of_shared(divide(x.to(gl.float32), factor, divisor, inverse, True), EXCHANGED)
            x = gl.inline_asm_elementwise(_ROUND, "=r,f,f", [q], dtype=gl.bfloat16, is_pure=True, pack=2)
        else:
            x = _in_order_of_shared(x, EXCHANGED)
        rows.index(chunk).slice(ROW, 1, dim=3).store(x)
    return scale


@gluon.jit
def load_block(rows, step):
    """Block `step` of each slice, [4 slices, 8, 64] in the layout in which the decode kernel loads x."""
    CHUNKS: gl.constexpr = rows.shape[0]
    SLICES: gl.constexpr = rows.shape[2]
    ROWS: gl.constexpr = rows.shape[4]
    LAYOUT: gl.constexpr = _read_layout(SLICES, ROWS)
    BLOCK: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, order=[3, 2, 1, 0])
    blocks = reinterpret(rows, gl.bfloat16, [CHUNKS * _STEPS, SLICES, 2, ROWS, 32], BLOCK)
    x = blocks.index(step).load(gl.SliceLayout(1, gl.SliceLayout(2, LAYOUT)))
    x = gl.expand_dims(gl.expand_dims(x, 1), 2)
    x, _ = gl.broadcast(x, gl.zeros((SLICES, 4, 8 // ROWS, 2, ROWS, 32), gl.bfloat16, layout=LAYOUT))
    x = gl.permute(gl.reshape(x, (SLICES, 4, 8 // ROWS, 2, ROWS, 4, 8)), (0, 1, 2, 4, 5, 3, 6))
    return gl.reshape(x, (4 * SLICES, 8, 64))
